import numpy as np
import pytest
import torch

from coreset import pairwise_greedy
from coreset.log_det import log_det, log_det_steps
from tests.references import submodular_reference as reference


def rows(n, d=6, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def unit(x):
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("ridge", [0.01, 0.1, 3.0])
@pytest.mark.parametrize("buffer", [1, 6, 1024])
def test_choices_and_gains_are_greedy_by_definition(similarity, ridge, buffer, monkeypatch):
    """28 choices of 6 dimensions: far beyond the rank of the kernel."""
    monkeypatch.setattr(pairwise_greedy, "BUFFER", buffer)
    x = rows(28, seed=1)
    value = reference.log_det(unit(x) if similarity == "cosine" else x, ridge)
    chosen, gains = reference.greedy(value, 28, 28)
    for block_bytes in (None, 300, 1):
        found = log_det(x, 28, similarity=similarity, ridge=ridge, block_bytes=block_bytes)
        assert found.indices.tolist() == chosen
        np.testing.assert_allclose(found.gains, gains, rtol=1e-7)
    assert found.facts["objective"] == pytest.approx(value(chosen))


def test_many_choices_do_not_drift():
    x = rows(600, d=24, seed=2)
    found = log_det(x, 600, ridge=1e-3)
    value = reference.log_det(unit(x), 1e-3)
    assert found.facts["objective"] == pytest.approx(value(range(600)), rel=1e-10)
    last = value(found.indices) - value(found.indices[:-1])
    assert found.gains[-1] == pytest.approx(last, rel=1e-5)


def test_deepcores_sign_the_choice_is_better_than_random_not_worse():
    """DeepCore maximises what the choices already explain: its sets are worse than random ones."""
    x = rows(200, d=16, seed=3)
    value = reference.log_det(unit(x), 0.1)
    rng = np.random.default_rng(0)
    random = max(value(rng.choice(200, 12, replace=False)) for _ in range(20))
    assert log_det(x, 12).facts["objective"] > random
    # What is explained already comes last: a copy of the selected row.
    copies = np.vstack([x[:5], x[:1]])
    assert log_det(copies, 5, selected=[0]).indices[-1] == 5


def test_diminishing_returns():
    rng = np.random.default_rng(0)
    value = reference.log_det(unit(rows(30)), 0.1)
    for _ in range(100):
        order = rng.permutation(30)
        small, large = np.sort(rng.integers(0, 30, 2))
        j, S, T = order[-1], order[:small], order[:large]
        assert value([*S, j]) - value(S) >= value([*T, j]) - value(T) - 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_value_is_within_1_minus_1_over_e_of_the_best_subset(seed):
    x = rows(11, d=3, seed=seed)
    value = reference.log_det(unit(x), 0.1)
    for budget in (1, 2, 4):
        best = reference.best_value(value, 11, budget)
        assert log_det(x, budget).facts["objective"] >= (1 - 1 / np.e) * best


def test_selected_prefixes_steps_and_containers(tmp_path):
    half = rows(45, seed=4).astype(np.float16)
    whole = log_det(half.astype(np.float32), 45)
    steps = list(log_det_steps(half))
    assert [step.row for step in steps] == whole.indices.tolist()
    np.testing.assert_allclose([step.gain for step in steps], whole.gains)
    rest = log_det(half, 20, selected=whole.indices[:8])
    assert np.array_equal(rest.indices, whole.indices[8:28])
    np.testing.assert_allclose(rest.gains, whole.gains[8:28])
    np.save(tmp_path / "x.npy", half)
    for x in (np.load(tmp_path / "x.npy", mmap_mode="r"), torch.from_numpy(half)):
        assert np.array_equal(log_det(x, 17).indices, whole.indices[:17])


def test_edges_and_bad_options():
    x = rows(9)
    assert len(log_det(x, 0)) == 0
    assert log_det(x[:1], 1).indices.tolist() == [0]
    assert log_det(np.ones((9, 2)), 9).indices.tolist() == list(range(9))
    assert log_det(np.eye(6), 6).indices.tolist() == list(range(6))
    for change, message in (({"similarity": "rbf"}, "similarity"), ({"ridge": 0.0}, "ridge")):
        with pytest.raises(ValueError, match=message):
            log_det(x, 2, **change)
    x[3] = 0
    with pytest.raises(ValueError, match="row 3 of x is zero"):
        log_det(x, 2)
    assert log_det(x, 9, similarity="dot").indices[-1] == 3
