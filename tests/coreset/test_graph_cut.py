import numpy as np
import pytest
import torch

from coreset import pairwise_greedy
from coreset.graph_cut import graph_cut, graph_cut_steps
from tests.references import submodular_reference as reference


def rows(n, d=4, seed=0, lattice=False):
    x = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    if lattice:
        x = np.round(x)
        x[~x.any(axis=1)] = 1
    return x


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("lam", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("lattice", [False, True])
@pytest.mark.parametrize("buffer", [1, 6, 1024])
def test_choices_and_gains_are_greedy_by_definition(similarity, lam, lattice, buffer, monkeypatch):
    monkeypatch.setattr(pairwise_greedy, "BUFFER", buffer)
    x = rows(28, seed=1, lattice=lattice)
    value = reference.graph_cut(reference.similarities(x, similarity), lam)
    chosen, gains = reference.greedy(value, 28, 28)
    for block_bytes in (None, 300, 1):
        found = graph_cut(x, 28, similarity=similarity, lam=lam, block_bytes=block_bytes)
        assert found.indices.tolist() == chosen
        np.testing.assert_allclose(found.gains, gains, atol=1e-9)
    assert found.facts["objective"] == pytest.approx(value(chosen), abs=1e-9)


def test_diminishing_returns_and_monotone_from_a_weight_of_2():
    rng = np.random.default_rng(0)
    s = reference.similarities(rows(30), "cosine")
    for lam in (0.5, 2.0):
        value = reference.graph_cut(s, lam)
        for _ in range(100):
            order = rng.permutation(30)
            small, large = np.sort(rng.integers(0, 30, 2))
            j, S, T = order[-1], order[:small], order[:large]
            gain = value([*T, j]) - value(T)
            assert value([*S, j]) - value(S) >= gain - 1e-9
            assert lam < 2 or gain >= 0
    assert (graph_cut(rows(30), 30).gains > 0).all()
    assert (graph_cut(rows(30), 30, lam=0.5).gains < 0).any()


def test_deepcores_update_counts_both_orders_of_a_pair():
    """f has s_ij and s_ji: a choice lowers another's gain by twice their similarity."""
    x = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    found = graph_cut(x, 2, lam=2.0, selected=[0])
    # Row 1: 2 * (.5 + 1 + .5) - 1 - 2 * .5 = 2; row 2: 2 * (1 + .5 + 1) - 1 - 2 * 1 = 2.
    assert found.indices.tolist() == [1, 2]
    np.testing.assert_allclose(found.gains, [2.0, 1.0])


@pytest.mark.parametrize("seed", range(4))
def test_value_is_within_1_minus_1_over_e_of_the_best_subset(seed):
    x = rows(11, d=3, seed=seed)
    value = reference.graph_cut(reference.similarities(x, "cosine"), 2.0)
    for budget in (1, 2, 4):
        best = reference.best_value(value, 11, budget)
        assert graph_cut(x, budget).facts["objective"] >= (1 - 1 / np.e) * best


def test_selected_prefixes_steps_and_containers(tmp_path):
    half = rows(45, seed=2).astype(np.float16)
    whole = graph_cut(half.astype(np.float32), 45)
    steps = list(graph_cut_steps(half))
    assert [step.row for step in steps] == whole.indices.tolist()
    np.testing.assert_allclose([step.gain for step in steps], whole.gains)
    rest = graph_cut(half, 20, selected=whole.indices[:8])
    assert np.array_equal(rest.indices, whole.indices[8:28])
    np.testing.assert_allclose(rest.gains, whole.gains[8:28])
    np.save(tmp_path / "x.npy", half)
    for x in (np.load(tmp_path / "x.npy", mmap_mode="r"), torch.from_numpy(half)):
        assert np.array_equal(graph_cut(x, 17).indices, whole.indices[:17])


def test_edges_and_bad_options():
    x = rows(9)
    assert len(graph_cut(x, 0)) == 0
    assert graph_cut(x[:1], 1).indices.tolist() == [0]
    assert graph_cut(np.ones((9, 2)), 9).indices.tolist() == list(range(9))
    for change, message in (
        ({"similarity": "euclidean"}, "similarity"),
        ({"lam": -1.0}, "lam"),
        ({"lam": np.nan}, "lam"),
    ):
        with pytest.raises(ValueError, match=message):
            graph_cut(x, 2, **change)
    x[3] = 0
    with pytest.raises(ValueError, match="row 3 of x is zero"):
        graph_cut(x, 2)
