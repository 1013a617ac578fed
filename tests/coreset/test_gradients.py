import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from coreset.gradients import LastLayerGradients
from tests.references.gradients_reference import materialised, per_example, softmax


def problem(n=40, classes=4, d=5, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)).astype(np.float32)
    weight, bias = rng.normal(size=(classes, d)), rng.normal(size=classes)
    return x, softmax(x @ weight.T + bias), rng.integers(classes, size=n), weight, bias


@given(
    st.integers(1, 30), st.integers(1, 5), st.integers(1, 6), st.integers(0, 9), st.integers(1, 900)
)
@settings(deadline=None, max_examples=40)
def test_factored_is_materialised(n, classes, d, seed, block_bytes):
    x, p, y, *_ = problem(n, classes, d, seed)
    g = LastLayerGradients.of(p, y, x, block_bytes=block_bytes)
    whole = materialised(g.errors, x)
    rng = np.random.default_rng(seed)
    rows, others = rng.integers(n, size=7), rng.integers(n, size=3)
    assert g.shape == (n, classes, d + 1) and len(g) == n
    np.testing.assert_allclose(g.norms(), np.linalg.norm(whole, axis=1), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(g.inner(rows, others), whole[rows] @ whole[others].T, atol=1e-12)
    gaps = ((whole[rows, None] - whole[None, others]) ** 2).sum(axis=2)
    np.testing.assert_allclose(g.squared_distances(rows, others), gaps, atol=1e-12)
    m = rng.normal(size=(classes, d + 1))
    np.testing.assert_allclose(g.times(m), whole @ m.ravel(), atol=1e-12)
    np.testing.assert_allclose(g.total().ravel(), whole.sum(axis=0), atol=1e-12)
    w = rng.random(n)
    np.testing.assert_allclose(g.total(w).ravel(), w @ whole, atol=1e-12)
    np.testing.assert_allclose(g.outputs(m), np.c_[x, np.ones(n)] @ m.T, atol=1e-12)
    np.testing.assert_allclose(g.subset(rows).total().ravel(), whole[rows].sum(axis=0), atol=1e-12)
    np.testing.assert_array_equal(g.subset(rows).subset([2, 0]).errors, g.errors[rows[[2, 0]]])


def test_factored_is_automatic_differentiation():
    x, p, y, weight, bias = problem()
    g = LastLayerGradients.of(p, y, x)
    whole = per_example(weight, bias, x, y)
    everything = np.arange(len(y))
    np.testing.assert_allclose(g.inner(everything, everything), whole @ whole.T, atol=2e-6)
    np.testing.assert_allclose(g.total().ravel(), whole.sum(axis=0), atol=2e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_without_bias_or_features(bias):
    x, p, y, *_ = problem()
    features = None if bias else x
    g = LastLayerGradients.of(p, y, features, bias=bias)
    whole = materialised(g.errors, features, bias)
    assert g.shape[2] == (1 if bias else 5)
    m = np.random.default_rng(1).normal(size=g.shape[1:])
    np.testing.assert_allclose(g.times(m), whole @ m.ravel(), atol=1e-12)
    np.testing.assert_allclose(g.total().ravel(), whole.sum(axis=0), atol=1e-12)
    np.testing.assert_allclose(g.norms(), np.linalg.norm(whole, axis=1), atol=1e-12)
    assert g.highest(m, np.ones(40, bool))[0] == (whole @ m.ravel()).argmax()
    with pytest.raises(ValueError, match="no gradient"):
        LastLayerGradients.of(p, y, bias=False)


@given(st.integers(0, 50), st.integers(1, 900))
@settings(deadline=None, max_examples=25)
def test_highest_is_the_argmax_of_free_rows(seed, block_bytes):
    x, p, y, *_ = problem(30, seed=seed)
    g = LastLayerGradients.of(p, y, x, block_bytes=block_bytes)
    rng = np.random.default_rng(seed)
    m, free = rng.normal(size=(4, 6)), rng.random(30) < 0.6
    free[rng.integers(30)] = True
    products = np.where(free, materialised(g.errors, x) @ m.ravel(), -np.inf)
    row, product = g.highest(m, free)
    assert row == products.argmax()
    assert product == pytest.approx(products.max(), rel=1e-12)


def test_highest_takes_the_lowest_of_equal_rows_where_float32_cannot_tell():
    x = np.ones((40, 3))
    x[:, 1] = 1e-9 * np.repeat(np.arange(20), 2)  # pairs, rising by less than float32 sees
    p = np.tile([0.25, 0.75], (40, 1))
    g = LastLayerGradients.of(p, np.zeros(40, int), x)
    m = np.array([[-1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    free = np.ones(40, bool)
    assert g.highest(m, free)[0] == 38
    free[37:39] = False
    assert g.highest(m, free)[0] == 39
    free[39] = False
    assert g.highest(m, free)[0] == 36
    free[:3] = False
    assert g.highest(0 * m, free)[0] == 3


def test_float32_only_proposes():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=200) + 1e-7 * rng.normal(size=(50, 200))
        g = LastLayerGradients.of(np.tile([0.25, 0.75], (50, 1)), np.zeros(50, int), x)
        m = rng.normal(size=(2, 201))
        products = materialised(g.errors, x) @ m.ravel()
        assert g.highest(m, np.ones(50, bool))[0] == products.argmax()


def test_distances_of_nearly_equal_gradients_keep_their_digits():
    x = np.array([[1e4, 1.0], [1e4, 1.0], [1e4, 1.0 + 1e-5]])
    g = LastLayerGradients.of(np.tile([0.4, 0.6], (3, 1)), [0, 0, 0], x)
    squared = g.squared_distances([0, 1, 2], [0, 1, 2])
    assert squared[0, 1] == squared[1, 1] == 0
    expected = float((g.errors[0].astype(float) ** 2).sum()) * (x[2, 1] - 1.0) ** 2
    assert squared[0, 2] == pytest.approx(expected, rel=1e-6)
    p = np.array([[0.4, 0.6], [0.4 + 1e-5, 0.6 - 1e-5]])
    g = LastLayerGradients.of(p, [0, 0], np.array([[1.0, 2.0], [1.0, 2.0 + 1e-5]]))
    whole = materialised(g.errors, g.features.source)
    expected = ((whole[0] - whole[1]) ** 2).sum()
    assert g.squared_distances([0], [1])[0, 0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("container", ["memmap", "tensor", "float64", "float16"])
def test_containers(container, tmp_path):
    x, p, y, *_ = problem()
    x = x.astype(np.float16)
    first = LastLayerGradients.of(p.astype(np.float32), y, x.astype(np.float32))
    other, labels, q = x, y, p.astype(np.float32)
    if container == "memmap":
        np.save(tmp_path / "x.npy", x)
        other = np.load(tmp_path / "x.npy", mmap_mode="r")
    elif container == "tensor":
        other, labels, q = torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(q)
    elif container == "float64":
        other, q = x.astype(np.float64), q.astype(np.float64)
    second = LastLayerGradients.of(q, labels, other, block_bytes=300)
    np.testing.assert_array_equal(first.errors, second.errors)
    np.testing.assert_allclose(first.total(), second.total(), rtol=1e-13, atol=1e-13)
    np.testing.assert_array_equal(second.total(), second.resident().total())


def test_bad_inputs_are_named():
    x, p, y, *_ = problem()
    with pytest.raises(ValueError, match="label of row 7 is 4"):
        LastLayerGradients.of(p, np.where(np.arange(40) == 7, 4, y), x)
    with pytest.raises(ValueError, match=r"class numbers"):
        LastLayerGradients.of(p, y.astype(str), x)
    with pytest.raises(ValueError, match="one per row"):
        LastLayerGradients.of(p, y[:-1], x)
    with pytest.raises(ValueError, match="features has 39 rows"):
        LastLayerGradients.of(p, y, x[:-1])
    with pytest.raises(ValueError, match="row 3 of probabilities"):
        LastLayerGradients.of(np.where(np.arange(40)[:, None] == 3, 5.0, p), y, x)
    x[6, 1] = np.inf
    with pytest.raises(ValueError, match="row 6 of x"):
        LastLayerGradients.of(p, y, x)
    g = LastLayerGradients.of(p, y)
    with pytest.raises(ValueError, match=r"matrix has shape \(3,\)"):
        g.times(np.ones(3))


def test_label_probability_survives_where_the_error_is_one():
    p = np.array([[1e-20, 1.0]])
    assert LastLayerGradients.of(p, [0]).label_probabilities[0] == pytest.approx(1e-20)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.body(x))


def test_from_model_is_each_rows_own_gradient_whatever_the_batches():
    """DeepCore's last-layer gradients are of mean losses: 1 / batch, more for the last batch."""
    torch.manual_seed(0)
    model = Small().train()
    x, y = torch.randn(11, 6), torch.randint(3, (11,))
    model.body[1].eval()
    g = LastLayerGradients.from_model(model, DataLoader(TensorDataset(x, y), batch_size=4))
    assert model.training and model.body[2].training and not model.body[1].training
    assert not model.head._forward_hooks
    model.eval()
    for i in range(11):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        own = torch.cat([model.head.weight.grad, model.head.bias.grad[:, None]], dim=1)
        np.testing.assert_allclose(g.subset([i]).total(), own.numpy(), atol=1e-6)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    np.testing.assert_allclose(g.total()[:, :-1], model.head.weight.grad.numpy(), atol=1e-5)
    other = LastLayerGradients.from_model(model, DataLoader(TensorDataset(x, y), batch_size=11))
    np.testing.assert_allclose(g.total(), other.total(), atol=1e-5)


def test_from_model_refuses_what_would_mislead():
    data = TensorDataset(torch.randn(8, 6), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ValueError, match="shuffles"):
        LastLayerGradients.from_model(Small(), DataLoader(data, batch_size=4, shuffle=True))
    model = nn.Sequential(nn.Linear(6, 3), nn.Softmax(dim=1))
    with pytest.raises(ValueError, match="not the layer's outputs"):
        LastLayerGradients.from_model(model, DataLoader(data))
    with pytest.raises(ValueError, match="no linear layer"):
        LastLayerGradients.from_model(nn.ReLU(), DataLoader(data))
    with pytest.raises(ValueError, match="empty"):
        LastLayerGradients.from_model(Small(), [])
    unbiased = nn.Linear(6, 3, bias=False)
    assert LastLayerGradients.from_model(unbiased, DataLoader(data)).shape == (8, 3, 6)


def test_importing_leaves_numpy_errors_alone():
    """cords sets np.seterr(all='raise') for the whole process when its solvers are imported."""
    code = (
        "import numpy as np; before = np.geterr();"
        "import coreset.gradmatch, coreset.craig, coreset.glister, coreset.power_of_few,"
        "coreset.augmentation; assert np.geterr() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
