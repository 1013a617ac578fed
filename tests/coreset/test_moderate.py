import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coreset.moderate import moderate
from tests.references import moderate_reference as reference


def rows_of(n=60, d=5, seed=0, classes=3):
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=n)
    x = 4 * generator.normal(size=(classes, d))[labels] + generator.normal(size=(n, d))
    return x.astype(np.float32), labels


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 50),
    d=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    block_bytes=st.sampled_from([1, 300, None]),
)
def test_agrees_with_the_definition(n, d, seed, block_bytes):
    x, labels = rows_of(n, d, seed)
    budget = int(np.random.default_rng(seed).integers(n + 1))
    found = moderate(x, budget, labels=labels, device="cpu", block_bytes=block_bytes)
    score = reference.scores(x, labels.tolist())
    np.testing.assert_allclose(found.gains, score[found.indices], rtol=1e-9, atol=1e-12)
    window = np.sort(score)[(n - budget) // 2 : (n - budget) // 2 + budget]
    np.testing.assert_allclose(np.sort(found.gains), window, rtol=1e-9, atol=1e-12)


def test_the_rows_are_those_of_the_reference():
    x, labels = rows_of(201, 7)
    for budget in (1, 2, 60, 100, 200, 201):
        found = moderate(x, budget, labels=labels, device="cpu").indices
        assert set(found.tolist()) == reference.moderate(x, labels.tolist(), budget)


def test_from_the_median_outwards_and_nested():
    x, labels = rows_of(90)
    whole = moderate(x, 90, labels=labels, device="cpu")
    away = np.abs(np.argsort(np.argsort(whole.gains)) - 44.5)
    assert (np.diff(away) >= 0).all()
    for budget in range(91):
        part = moderate(x, budget, labels=labels, device="cpu").indices
        np.testing.assert_array_equal(part, whole.indices[:budget])


def test_d2_repository_bug_of_the_extremes_the_middle_is_chosen():
    x, labels = rows_of(200)
    score = reference.scores(x, labels.tolist())
    found = moderate(x, 40, labels=labels, device="cpu").indices
    low, high = np.quantile(score, [0.35, 0.65])
    assert ((score[found] > low) & (score[found] < high)).all()


def test_without_labels_there_is_one_class():
    x, _ = rows_of()
    found = moderate(x, 20, device="cpu").indices
    np.testing.assert_array_equal(found, moderate(x, 20, labels=["a"] * 60, device="cpu").indices)


def test_the_median_withstands_what_moves_the_mean():
    x = np.concatenate([np.arange(9.0), [1e6]])[:, None]
    found = moderate(x, 10, device="cpu")
    assert found.gains[found.indices.tolist().index(9)] == 1e6 - 4.5


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_containers_and_blocks_agree(tmp_path, dtype):
    x, labels = rows_of(300)
    x = x.astype(dtype)
    wanted = moderate(x, 100, labels=labels, device="cpu")
    np.save(tmp_path / "x.npy", x)
    before = x.copy()
    for other, block_bytes in [
        (np.load(tmp_path / "x.npy", mmap_mode="r"), None),
        (torch.from_numpy(x), 1000),
        (x.astype(np.float64), 1),
    ]:
        found = moderate(other, 100, labels=labels, device="cpu", block_bytes=block_bytes)
        np.testing.assert_array_equal(found.indices, wanted.indices)
        np.testing.assert_array_equal(found.gains, wanted.gains)
    np.testing.assert_array_equal(x, before)


def test_edges():
    x, labels = rows_of(6)
    assert len(moderate(x, 0, labels=labels, device="cpu")) == 0
    assert moderate(x[:1], 1, labels=[7], device="cpu").indices.tolist() == [0]
    assert moderate(np.ones((4, 2)), 4, device="cpu").indices.tolist() == [1, 2, 0, 3]
    with pytest.raises(ValueError, match="one per row"):
        moderate(x, 2, labels=labels[:3], device="cpu")
    with pytest.raises(ValueError, match="budget is 7"):
        moderate(x, 7, device="cpu")
    x[2, 0] = np.inf
    with pytest.raises(ValueError, match="row 2 of x holds NaN or infinity"):
        moderate(x, 2, device="cpu")
