import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coreset import craig as module
from coreset import select
from coreset.craig import craig
from coreset.gradients import LastLayerGradients
from tests.coreset.toy import toy
from tests.references import craig_reference as reference
from tests.references.gradients_reference import materialised


def made(n=50, classes=3, seed=0, **options):
    inputs = toy(n, classes=classes, seed=seed)
    x = inputs["features"]
    p = inputs["probabilities"] ** 0.3  # surer ones have gradients of hardly any length
    p /= p.sum(axis=1, keepdims=True)
    g = LastLayerGradients.of(p, inputs["labels"], x, **options)
    return g, materialised(g.errors, x), inputs["labels"]


@given(st.integers(1, 60), st.integers(0, 30), st.data())
@settings(deadline=None, max_examples=40)
def test_is_the_greedy_of_the_paper(n, seed, data):
    g, whole, _ = made(n, min(3, n), seed)
    k = data.draw(st.integers(1, n))
    rows, counts = reference.craig(whole, k)
    found = craig(g, k)
    assert found.indices.tolist() == rows
    assert found.weights.tolist() == counts.tolist()


@pytest.mark.parametrize("seed", range(6))
def test_greedy_is_near_the_best_choice(seed):
    g, whole, _ = made(9, 3, seed)
    far = 2 * np.linalg.norm(whole, axis=1).max()
    for k in (1, 2, 3):
        found = craig(g, k)
        served = reference.served(whole, found.indices, far)
        assert served >= (1 - 1 / np.e) * reference.best(whole, k, far)
        assert found.gains.sum() == pytest.approx(served, rel=1e-4)


@pytest.mark.parametrize("k", [1, 5, 20, 49])
def test_error_is_below_the_bound_and_weights_sum_to_n(k):
    """DeepCore's CRAIG weights start at 1 and then count every row: their sum is n + k."""
    g, whole, _ = made()
    found = craig(g, k)
    assert found.weights.sum() == 50 and found.weights.min() >= 1
    error = np.linalg.norm(whole.sum(axis=0) - found.weights @ whole[found.indices])
    nearest = reference.distances(whole)[:, found.indices].min(axis=1).sum()
    assert found.facts["error_bound"] == pytest.approx(nearest, rel=1e-5)
    assert error <= found.facts["error_bound"] * (1 + 1e-6)
    assert (np.diff(found.gains) <= 1e-9 * found.gains[0]).all()


def test_duplicates_are_told_apart():
    """cords finds rows by the argmax of similarity columns: copies collapse onto one row."""
    g, _, _ = made(20)
    twice = g.subset(np.tile(np.arange(20), 2))
    once, both = craig(g, 8), craig(twice, 8)
    assert both.indices.tolist() == once.indices.tolist()
    assert both.weights.tolist() == (2 * once.weights).tolist()
    every = craig(twice, 40)
    assert sorted(every.indices.tolist()) == list(range(40))
    assert every.weights.tolist() == [1.0] * 40
    assert every.indices[20:].tolist() == sorted(every.indices[20:].tolist())


@pytest.mark.parametrize("block_bytes", [1, 2000, 9999])
def test_distances_need_not_be_held(block_bytes):
    """DeepCore holds all n^2 distances as float64: 20 GB for CIFAR."""
    g, _, _ = made()
    small, _, _ = made(block_bytes=block_bytes)
    whole, parts = craig(g, 30), craig(small, 30, block_bytes=block_bytes)
    assert whole.indices.tolist() == parts.indices.tolist()
    assert whole.weights.tolist() == parts.weights.tolist()
    np.testing.assert_allclose(whole.gains, parts.gains, rtol=1e-9, atol=1e-9)


def test_held_distances_made_tile_by_tile():
    small, _, _ = made(53, block_bytes=2000)
    tiles = craig(small, 30)  # first: memory that is used again may hold the right distances
    g, _, _ = made(53)
    whole = craig(g, 30)
    assert whole.indices.tolist() == tiles.indices.tolist()
    assert whole.weights.tolist() == tiles.weights.tolist()


def test_fewer_gains_than_rows_are_evaluated(monkeypatch):
    g, _, _ = made(400, 1)
    evaluated = 0
    rows = module._Distances.rows

    def counted(self, chosen):
        nonlocal evaluated
        evaluated += len(chosen)
        return rows(self, chosen)

    monkeypatch.setattr(module._Distances, "rows", counted)
    craig(g.resident(), 40)
    assert 40 <= evaluated < 400 * 40 / 2


def test_select_weighs_class_by_class():
    g, _, labels = made(60)
    found = select(None, 9, method="craig", gradients=g, labels=labels)
    for c in range(3):
        assert found.weights[labels[found.indices] == c].sum() == (labels == c).sum()
    pooled = select(None, 9, method="craig", gradients=g, labels=labels, per_class="pooled")
    assert pooled.indices.tolist() == craig(g, 9).indices.tolist()


def test_edges():
    g, _, _ = made(4)
    assert len(craig(g, 0)) == 0
    assert craig(g.subset([2]), 1).weights.tolist() == [1.0]
    assert craig(g, 4).weights.tolist() == [1.0] * 4
    none = LastLayerGradients.of(np.tile([1.0, 0.0], (5, 1)), np.zeros(5, int))
    found = craig(none, 3)
    assert found.indices.tolist() == [0, 1, 2] and found.weights.tolist() == [3.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="budget"):
        craig(g, 5)
