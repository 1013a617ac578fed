import numpy as np
import pytest
import torch

from coreset import pairwise_greedy
from coreset.disparity import (
    disparity_min,
    disparity_min_steps,
    disparity_sum,
    disparity_sum_steps,
)
from tests.references import submodular_reference as reference

METRICS = ("euclidean", "cosine")
VALUES = {disparity_sum: reference.disparity_sum, disparity_min: reference.disparity_min}
STEPS = {disparity_sum: disparity_sum_steps, disparity_min: disparity_min_steps}


def rows(n, d=4, seed=0, lattice=False):
    x = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return np.round(x) + 0.5 if lattice else x


def central(x, metric):
    """The row of the largest squared distances to all rows."""
    total = (reference.distances(x, metric) ** (1 if metric == "cosine" else 2)).sum(axis=0)
    return int(np.flatnonzero(total >= total.max() - 1e-9)[0])


def by_definition(method, d, first, budget):
    chosen, gains = [first], []
    for _ in range(budget - 1):
        share = d[:, chosen].sum(axis=1) if method is disparity_sum else d[:, chosen].min(axis=1)
        share[chosen] = -1
        chosen.append(int(np.flatnonzero(share >= share.max() - 1e-9)[0]))
        gains.append(share[chosen[-1]])
    return chosen, gains


@pytest.mark.parametrize("method", VALUES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("lattice", [False, True])
@pytest.mark.parametrize("buffer", [1, 1024])
def test_choices_are_those_of_greedy_by_definition(method, metric, lattice, buffer, monkeypatch):
    monkeypatch.setattr(pairwise_greedy, "BUFFER", buffer)
    x = rows(40, seed=1, lattice=lattice)
    d = reference.distances(x, metric)
    chosen, gains = by_definition(method, d, central(x, metric), 40)
    for block_bytes in (None, 300, 1):
        found = method(x, 40, metric=metric, block_bytes=block_bytes)
        assert found.indices.tolist() == chosen
        np.testing.assert_allclose(found.gains[1:], gains, atol=1e-6)
        assert found.gains[0] == (0 if method is disparity_sum else np.inf)


@pytest.mark.parametrize("method", VALUES)
@pytest.mark.parametrize("metric", METRICS)
def test_gains_add_up_to_the_function(method, metric):
    x = rows(30, seed=2)
    found = method(x, 7, metric=metric)
    value = VALUES[method](reference.distances(x, metric))(found.indices)
    assert found.facts["objective"] == pytest.approx(value)
    total = found.gains.sum() if method is disparity_sum else found.gains.min()
    assert total == pytest.approx(value)


@pytest.mark.parametrize("method", VALUES)
@pytest.mark.parametrize("seed", range(5))
def test_value_is_at_least_half_of_the_best_subset(method, seed):
    x = rows(11, d=2, seed=seed)
    value = VALUES[method](reference.distances(x))
    for budget in (2, 3, 4):
        best = reference.best_value(value, 11, budget)
        assert method(x, budget).facts["objective"] >= best / 2 - 1e-9


@pytest.mark.parametrize("method", VALUES)
def test_selected_prefixes_and_steps(method):
    x = rows(40, seed=3)
    whole = method(x, 40)
    steps = list(STEPS[method](x))
    assert [step.row for step in steps] == whole.indices.tolist()
    np.testing.assert_allclose([step.gain for step in steps[1:]], whole.gains[1:])
    rest = method(x, 20, selected=whole.indices[:7])
    assert np.array_equal(rest.indices, whole.indices[7:27])
    np.testing.assert_allclose(rest.gains, whole.gains[7:27])
    assert np.array_equal(method(x, 11).indices, whole.indices[:11])
    assert list(STEPS[method](x, selected=np.arange(40))) == []


@pytest.mark.parametrize("method", VALUES)
def test_equal_rows_edges_and_containers(method, tmp_path):
    same = np.full((20, 3), 7.25, np.float32)
    assert method(same, 20).indices.tolist() == list(range(20))
    assert method(same[:1], 1).indices.tolist() == [0]
    assert len(method(same, 0)) == 0
    half = rows(50, seed=4).astype(np.float16)
    np.save(tmp_path / "x.npy", half)
    expected = method(half.astype(np.float64), 50).indices
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for x in (half, mapped, torch.from_numpy(half)):
        assert np.array_equal(method(x, 50).indices, expected)


@pytest.mark.parametrize("method", VALUES)
def test_a_common_offset_does_not_change_the_choice(method):
    x = rows(50, seed=5).astype(np.float64)
    assert np.array_equal(method(x + 1e5, 20).indices, method(x, 20).indices)


@pytest.mark.parametrize("method", VALUES)
def test_bad_options_and_rows_are_named(method):
    x = rows(9)
    with pytest.raises(ValueError, match="metric is 'manhattan'"):
        method(x, 2, metric="manhattan")
    x[3] = 0
    assert len(method(x, 9)) == 9
    with pytest.raises(ValueError, match="row 3 of x is zero"):
        method(x, 2, metric="cosine")
