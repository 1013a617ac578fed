import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coreset.density import d2
from tests.references.density_reference import d2 as reference


def rows_of(n=80, d=5, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(4, d))[np.arange(n) % 4] + 0.4 * generator.normal(size=(n, d))
    return x.astype(np.float32), generator.random(n)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 40),
    neighbours=st.integers(1, 12),
    gamma_forward=st.sampled_from([0.3, 1.0, 5.0]),
    gamma_reverse=st.sampled_from([0.0, 0.1, 3.0]),
    seed=st.integers(0, 10**6),
    negative=st.booleans(),
)
def test_agrees_with_the_reference(n, neighbours, gamma_forward, gamma_reverse, seed, negative):
    x, difficulty = rows_of(n, 4, seed)
    difficulty = difficulty - 0.5 * negative
    found = d2(
        x,
        n,
        difficulty=difficulty,
        neighbours=neighbours,
        gamma_forward=gamma_forward,
        gamma_reverse=gamma_reverse,
        device="cpu",
    )
    chosen, gains = reference(x, difficulty, n, neighbours, gamma_forward, gamma_reverse)
    np.testing.assert_allclose(found.gains, gains, rtol=1e-6, atol=1e-9)
    # Rows that come out at the same number but for rounding may change places.
    clear = np.abs(np.diff(np.append(gains, -np.inf))) > 1e-9
    if clear.all():
        assert found.indices.tolist() == chosen


def test_published_bug_the_order_of_choice_is_kept_and_nested():
    """The authors return a Python set: the order of choice is lost."""
    x, difficulty = rows_of(120)
    whole = d2(x, 120, difficulty=difficulty, device="cpu")
    assert whole.indices.tolist() != sorted(whole.indices.tolist())
    positive = whole.gains[: int((whole.gains < 0).argmax())]
    assert len(positive) > 20 and (np.diff(positive) < 0).all()
    for budget in (1, 17, 60):
        part = d2(x, budget, difficulty=difficulty, device="cpu")
        np.testing.assert_array_equal(part.indices, whole.indices[:budget])


def test_squared_distances_as_in_the_paper_not_distances_as_in_the_code():
    x = np.array([[1.0, 0.0], [0.6, 0.8]])
    found = d2(x, 1, difficulty=[1.0, 1.0], neighbours=1, device="cpu")
    assert found.gains[0] == pytest.approx(1 + np.exp(-0.8))


def test_copies_of_a_chosen_row_are_passed_over():
    x = np.concatenate([np.tile([1.0, 0.0], (5, 1)), [[0.0, 1.0], [-1.0, 0.2], [0.2, -1.0]]])
    difficulty = np.array([9.0, 9, 9, 9, 9, 1, 1, 1])
    found = d2(x, 3, difficulty=difficulty, neighbours=4, gamma_reverse=0.0, device="cpu").indices
    assert (found < 5).sum() == 1


def test_without_messages_it_is_a_ranking_by_difficulty():
    x, difficulty = rows_of()
    found = d2(
        x, 30, difficulty=difficulty, gamma_forward=1e12, gamma_reverse=1e12, device="cpu"
    ).indices
    np.testing.assert_array_equal(found, np.argsort(-difficulty)[:30])


def test_features_as_they_are_or_of_length_one():
    x, difficulty = rows_of()
    unit = d2(x, 30, difficulty=difficulty, device="cpu").indices
    np.testing.assert_array_equal(d2(8 * x, 30, difficulty=difficulty, device="cpu").indices, unit)
    raw = d2(x, 30, difficulty=difficulty, unit=False, device="cpu").indices
    assert raw.tolist() != unit.tolist()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_containers_and_blocks_agree(tmp_path, dtype):
    x, difficulty = rows_of()
    x = x.astype(dtype)
    before = x.copy()
    np.save(tmp_path / "x.npy", x)
    wanted = d2(x, 30, difficulty=difficulty, device="cpu")
    for other, block_bytes in [
        (np.load(tmp_path / "x.npy", mmap_mode="r"), None),
        (torch.from_numpy(x), 3000),
        (x.astype(np.float64), 1),
    ]:
        found = d2(other, 30, difficulty=difficulty, device="cpu", block_bytes=block_bytes)
        np.testing.assert_array_equal(found.indices, wanted.indices)
        np.testing.assert_array_equal(found.gains, wanted.gains)
    np.testing.assert_array_equal(x, before)


def test_edges():
    x, difficulty = rows_of(6)
    assert len(d2(x, 0, difficulty=difficulty, device="cpu")) == 0
    assert sorted(d2(x, 6, difficulty=difficulty, device="cpu").indices.tolist()) == list(range(6))
    assert d2(x[:1], 1, difficulty=[0.5], device="cpu").gains.tolist() == [0.5]
    ones = d2(np.ones((4, 2)), 4, difficulty=np.ones(4), neighbours=1, device="cpu")
    assert ones.indices[0] == 0 and sorted(ones.indices.tolist()) == [0, 1, 2, 3]
    for options in ({"neighbours": 0}, {"gamma_forward": -1.0}, {"gamma_reverse": float("nan")}):
        with pytest.raises(ValueError, match="at least 1"):
            d2(x, 2, difficulty=difficulty, device="cpu", **options)
    with pytest.raises(ValueError, match="one number per row"):
        d2(x, 2, difficulty=difficulty[:3], device="cpu")
    difficulty[2] = np.nan
    with pytest.raises(ValueError, match="difficulty of row 2 is nan"):
        d2(x, 2, difficulty=difficulty, device="cpu")
