from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.scores import best_scores, clip_scores
from tests.references import clip_score_reference


def test_against_the_reference() -> None:
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2, 50, 8)).astype(np.float16)
    image[3], text[4], image[5, 0], text[6, 0] = 0, 0, np.nan, np.inf
    found = clip_scores(image, text)
    for row in range(50):
        expected = clip_score_reference.clip_score(image[row], text[row])
        if expected is None:
            assert np.isnan(found[row])
        else:
            assert found[row] == pytest.approx(expected, abs=2**-23)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"one shape.*\(2, 3\).*\(2, 4\)"):
        clip_scores(np.ones((2, 3)), np.ones((2, 4)))


def test_a_score_does_not_depend_on_the_other_rows() -> None:
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2, 500, 32)).astype(np.float16)
    whole = clip_scores(image, text)
    for start in (0, 1, 7, 499):
        assert np.array_equal(clip_scores(image[start:], text[start:]), whole[start:])


@given(
    scores=st.lists(
        st.one_of(st.none(), st.sampled_from([0.1, 0.2, 0.2000001, 0.3])), min_size=1, max_size=30
    ),
    data=st.data(),
)
def test_best_scores(scores: list[float | None], data: st.DataObject) -> None:
    """Exactly as many as asked for, ties and missing scores included."""
    n = len(scores)
    count = data.draw(st.integers(0, n))
    keys = data.draw(st.permutations(range(n)))
    values = np.array([np.nan if s is None else s for s in scores], dtype=np.float32)
    kept = best_scores(values, count, keys=np.array(keys, dtype=np.uint64))
    floats = [None if s is None else float(np.float32(s)) for s in scores]
    assert set(np.flatnonzero(kept)) == clip_score_reference.best(floats, keys, count)


def test_best_scores_refuses_impossible_counts() -> None:
    with pytest.raises(ValueError, match=r"\[0, 2\], got 3"):
        best_scores(np.zeros(2, np.float32), 3, keys=np.arange(2, dtype=np.uint64))
