import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from curate import codes, search
from tests.conftest import REPOSITORY

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


def plain(rows, columns, bias):
    product = rows.int() @ columns.int().T + bias
    first, column = product.max(dim=1)
    product[torch.arange(len(rows)), column] = -(1 << 30)
    return first, column.int(), product.max(dim=1).values


CHECK = """
import torch
from curate.fused import best_two
from tests.curate.test_fused import plain
g = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randint(-127, 128, shape, generator=g).to(torch.int8)
for n, k, d in ((1, 1, 1), (130, 257, 70), (64, 5, 512)):
    rows, columns = draw(n, d), draw(k, d)
    columns[k // 2] = columns[0]  # ties
    bias = torch.randint(-(1 << 20), 1 << 20, (k,), generator=g, dtype=torch.int32)
    bias[k // 2] = bias[0]
    for got, expected in zip(best_two(rows, columns, bias), plain(rows, columns, bias)):
        assert torch.equal(got, expected), (n, k, d)
"""


@needs_triton
def test_kernel_in_the_interpreter():
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", CHECK], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@needs_triton
def test_kernel_on_a_gpu():
    from curate.fused import best_two

    generator = torch.Generator().manual_seed(0)
    rows, columns = (
        torch.randint(-127, 128, (n, 512), generator=generator).to(torch.int8).cuda()
        for n in (10_000, 3_000)
    )
    bias = torch.randint(-1000, 1000, (3000,), generator=generator, dtype=torch.int32).cuda()
    product = torch._int_mm(rows, columns.T) + bias
    first, column, second = best_two(rows, columns, bias)
    expected = product.topk(2, dim=1).values
    assert torch.equal(first, expected[:, 0]) and torch.equal(second, expected[:, 1])
    at = torch.arange(len(rows), device="cuda")
    assert torch.equal(product[at, column.long()], first)


def test_search_by_the_kernel_equals_that_by_tiles(monkeypatch):
    monkeypatch.setitem(sys.modules, "curate.fused", SimpleNamespace(best_two=plain))
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(300, 24, generator=generator), dim=1)
    c = torch.cat((x[:30], x[:10], x[20:40] + 1e-3))  # copies, near copies
    columns = codes.encoded(c, codes.Frame.of(x))
    queries = columns.queries(x)
    exact = search.Exact(lambda row: x[row], lambda column: c[column], 64, rounded=False)
    fused = search._fused(columns, queries, exact, (32, 16))
    tiled = search._tiled(columns, queries, exact, (32, 16))
    assert np.array_equal(fused.column, tiled.column)
    np.testing.assert_array_equal(fused.similarity, tiled.similarity)
    assert (fused.gap > 0).sum() > 50
    np.testing.assert_allclose(fused.gap, tiled.gap, atol=1e-5)
