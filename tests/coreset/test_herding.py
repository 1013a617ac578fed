import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coreset.herding import herding, herding_steps
from tests.references.herding_reference import herding as reference


def rows_of(n=60, d=5, seed=0, dtype=np.float32):
    return (np.random.default_rng(seed).gamma(1.5, size=(n, d)) + 2).astype(dtype)


def unit(x):
    wide = x.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    block_bytes=st.sampled_from([1, 500, None]),
    normed=st.booleans(),
)
def test_agrees_with_the_formula_of_the_paper(n, d, seed, block_bytes, normed):
    x = rows_of(n, d, seed)
    before = np.random.default_rng(seed).permutation(n)[: n // 4].tolist()
    found = herding(
        x, n - len(before), unit=normed, selected=before, device="cpu", block_bytes=block_bytes
    )
    chosen, errors = reference(unit(x) if normed else x, n - len(before), before)
    if normed and d == 1:  # all rows are the same: ties
        assert found.indices.tolist() == sorted(set(range(n)) - set(before))
        return
    if d == 1:  # two rows can be equally good but for rounding
        np.testing.assert_allclose(found.gains, errors, atol=1e-9)
        return
    # The last two rows always tie in what they leave behind, so that only rounding tells them.
    assert found.indices.tolist()[:-2] == chosen[:-2]
    np.testing.assert_allclose(found.gains, errors, atol=1e-9)


def test_the_mean_stays_near_and_goes_like_one_over_t():
    x = rows_of(2000, 16)
    found = herding(x, 400, device="cpu")
    mean = x.astype(np.float64).mean(axis=0)
    generator = np.random.default_rng(0)
    random = [np.linalg.norm(x[generator.permutation(2000)[:400]].mean(0) - mean) for _ in range(9)]
    assert found.facts["mean_error"] == found.gains[-1] < 0.2 * min(random)
    np.testing.assert_allclose(
        found.gains[-1], np.linalg.norm(x[found.indices].astype(np.float64).mean(0) - mean)
    )
    t = np.arange(1, 401)
    assert (found.gains * t).max() < 4 * np.linalg.norm(x - mean, axis=1).mean()


def test_deepcore_bug_of_argmax_the_first_choice_is_near_the_mean_not_far():
    x = rows_of(300, 3)
    distance = np.linalg.norm(x - x.mean(axis=0), axis=1)
    assert herding(x, 1, device="cpu").indices[0] == distance.argmin() != distance.argmax()
    wrong = x[np.argsort(-distance)[:30]].mean(axis=0) - x.mean(axis=0)
    assert herding(x, 30, device="cpu").facts["mean_error"] < 0.1 * np.linalg.norm(wrong)


def test_a_large_common_offset_changes_nothing():
    x = np.random.default_rng(0).integers(-50, 50, size=(200, 4)).astype(np.float32)
    wanted = herding(x, 50, device="cpu").indices
    np.testing.assert_array_equal(herding(x + 2.0**15, 50, device="cpu").indices, wanted)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_containers_and_blocks_agree(tmp_path, dtype):
    x = rows_of(200, dtype=dtype)
    for normed in (False, True):
        wanted = herding(x, 60, unit=normed, device="cpu")
        np.save(tmp_path / "x.npy", x)
        for other in (np.load(tmp_path / "x.npy", mmap_mode="r"), torch.from_numpy(x)):
            found = herding(other, 60, unit=normed, device="cpu")
            np.testing.assert_array_equal(found.indices, wanted.indices)
        found = herding(x.astype(np.float64), 60, unit=normed, device="cpu", block_bytes=100)
        np.testing.assert_array_equal(found.indices, wanted.indices)
        np.testing.assert_allclose(found.gains, wanted.gains, rtol=1e-9)


def test_prefix_steps_and_selected_continue():
    x = rows_of(80)
    whole = herding(x, 80, device="cpu").indices
    np.testing.assert_array_equal(herding(x, 9, device="cpu").indices, whole[:9])
    assert [row for row, _ in herding_steps(x, device="cpu")] == whole.tolist()
    rest = herding(x, 30, selected=whole[:20], device="cpu").indices
    np.testing.assert_array_equal(rest, whole[20:50])
    steps = herding_steps(x, selected=whole[:20], device="cpu")
    assert [next(steps).row for _ in range(3)] == whole[20:23].tolist()


def test_copies_are_taken_by_row_number_and_only_once_each():
    x = np.ones((6, 3), np.float32)
    assert herding(x, 6, device="cpu").indices.tolist() == [0, 1, 2, 3, 4, 5]
    x[4] = 5
    assert sorted(herding(x, 6, device="cpu").indices.tolist()) == [0, 1, 2, 3, 4, 5]


def test_edges():
    x = rows_of(5)
    assert len(herding(x, 0, device="cpu")) == 0
    assert herding(x[:1], 1, device="cpu").indices.tolist() == [0]
    assert list(herding_steps(x[:1], selected=[0], device="cpu")) == []
    with pytest.raises(ValueError, match="budget is 6"):
        herding(x, 6, device="cpu")
    x[3, 1] = np.nan
    with pytest.raises(ValueError, match="row 3 of x holds NaN"):
        herding(x, 2, device="cpu")
    x[3] = 0
    with pytest.raises(ValueError, match="row 3 of x is zero"):
        herding(x, 2, unit=True, device="cpu")
