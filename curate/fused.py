"""The best two of all 8-bit products of each row, on a GPU, without writing the products to memory.

Not measured on a GPU yet; its arithmetic is tested by Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROWS, _COLUMNS, _DIMENSIONS = 128, 128, 64
NEVER = tl.constexpr(-(1 << 30))


@triton.jit  # type: ignore[untyped-decorator]
def _best_two(  # type: ignore[no-untyped-def]
    rows_at,
    columns_at,
    bias_at,
    first_at,
    place_at,
    second_at,
    n,
    k,
    d,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIMENSIONS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_start = row[:, None].to(tl.int64) * d
    first = tl.full((ROWS,), NEVER, tl.int32)
    second = tl.full((ROWS,), NEVER, tl.int32)
    place = tl.full((ROWS,), -1, tl.int32)
    here = tl.arange(0, COLUMNS)
    for start in range(0, k, COLUMNS):
        column = start + here
        column_start = column[None, :].to(tl.int64) * d
        product = tl.zeros((ROWS, COLUMNS), tl.int32)
        for at in range(0, d, DIMENSIONS):
            x = at + tl.arange(0, DIMENSIONS)
            a_there = (row[:, None] < n) & (x[None, :] < d)
            b_there = (column[None, :] < k) & (x[:, None] < d)
            a = tl.load(rows_at + row_start + x[None, :], mask=a_there, other=0)
            b = tl.load(columns_at + column_start + x[:, None], mask=b_there, other=0)
            product = tl.dot(a, b, product)
        product += tl.load(bias_at + column, mask=column < k, other=0)[None, :]
        product = tl.where(column[None, :] < k, product, NEVER)
        largest = tl.max(product, axis=1)
        index = tl.argmax(product, axis=1)
        others = tl.where(here[None, :] == index[:, None], NEVER, product)
        second = tl.maximum(tl.minimum(first, largest), tl.maximum(second, tl.max(others, axis=1)))
        place = tl.where(largest > first, start + index, place)
        first = tl.maximum(first, largest)
    tl.store(first_at + row, first, mask=row < n)
    tl.store(place_at + row, place, mask=row < n)
    tl.store(second_at + row, second, mask=row < n)


def best_two(
    rows: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each row's largest product, its column, and the second largest.

    Parameters
    ----------
    rows : (n, d) int8
    columns : (k, d) int8
    bias : (k,) int32
        Added to the products.

    Returns
    -------
    first, column, second : (n,) int32
    """
    n, k = len(rows), len(columns)
    first, place, second = (torch.empty(n, dtype=torch.int32, device=rows.device) for _ in range(3))
    _best_two[(triton.cdiv(n, _ROWS),)](
        rows.contiguous(),
        columns.contiguous(),
        bias,
        first,
        place,
        second,
        n,
        k,
        rows.shape[1],
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        DIMENSIONS=_DIMENSIONS,
    )
    return first, place, second
