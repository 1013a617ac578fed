from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coreset import contextual_diversity as module
from coreset.contextual_diversity import contextual_diversity, contextual_diversity_steps
from tests.references.contextual_reference import greedy, matrix

FLOOR = 1e-8


def predictions(n=60, classes=4, seed=0, concentration=0.5):
    return np.random.default_rng(seed).dirichlet(np.full(classes, concentration), size=n)


@pytest.mark.parametrize("candidates", [1, 3, 256])
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 25), classes=st.integers(2, 5))
def test_the_choices_are_those_of_brute_force(candidates, seed, n, classes):
    p = predictions(n, classes, seed)
    start = seed % n
    kept, module._CANDIDATES = module._CANDIDATES, candidates
    try:
        found = contextual_diversity(p, n, start=start)
    finally:
        module._CANDIDATES = kept
    rows, gains = greedy(p, n - 1, FLOOR, [start])
    assert found.indices.tolist() == [start, *rows]
    np.testing.assert_allclose(found.gains[1:], gains, rtol=1e-8, atol=1e-12)
    assert found.gains[0] == np.inf


def test_probabilities_of_zero_are_finite_and_bounded():
    """DeepCore takes log(0): NaN divergences, and argmax of NaN is the first row."""
    p = np.concatenate([np.eye(4), predictions(20)])
    found = contextual_diversity(p, 24, start=0)
    rows, _ = greedy(p, 23, FLOOR, [0])
    assert found.indices.tolist() == [0, *rows]
    assert np.isfinite(found.gains[1:]).all()


def test_memory_does_not_hold_all_pairs_by_classes(monkeypatch):
    """DeepCore repeats predictions to (m, n, C): 2000 x 20000 x 20 float32 would be 3 GB."""
    sizes, passes = [], []
    whole = module._Cover._divergences

    def watched(self, p, log_p, q, log_q):
        found = whole(self, p, log_p, q, log_q)
        sizes.append(8 * (found.numel() + 6 * p.numel()))
        passes.append(len(q))
        return found

    monkeypatch.setattr(module._Cover, "_divergences", watched)
    p = predictions(20_000, 20).astype(np.float32)
    assert len(contextual_diversity(p, 2000, block_bytes=8 << 20)) == 2000
    assert max(sizes) < 8 << 20
    blocks = -(-20_000 // (max(sizes) // (8 * (256 + 120))))
    # Read once for many choices: far fewer times than 2000.
    assert len(passes) < 300 * blocks


def test_it_goes_on_from_rows_that_are_selected():
    p = predictions(40)
    before = [7, 31, 2]
    found = contextual_diversity(p, 37, selected=before)
    rows, gains = greedy(p, 37, FLOOR, before)
    assert found.indices.tolist() == rows
    np.testing.assert_allclose(found.gains, gains, rtol=1e-8)
    stream = contextual_diversity_steps(p, selected=before)
    assert [step.row for step in islice(stream, 5)] == rows[:5]


def test_gains_never_rise_and_the_radius_is_the_next_gain():
    p = predictions(300, 6)
    found = contextual_diversity(p, 200, seed=4)
    assert (np.diff(found.gains) <= 1e-12).all()
    more = contextual_diversity(p, 201, seed=4)
    assert found.indices.tolist() == more.indices[:200].tolist()
    assert found.facts["radius"] == pytest.approx(more.gains[-1])
    d = matrix(p, FLOOR)[:, found.indices]
    assert found.facts["radius"] == pytest.approx(d.min(axis=1).max())


def test_duplicates_come_last_in_the_order_of_rows():
    p = predictions(8)
    found = contextual_diversity(np.concatenate([p, p, p]), 24, start=0)
    assert sorted(found.indices[:8].tolist()) == list(range(8))
    assert found.indices[8:].tolist() == list(range(8, 24))
    assert found.gains[8:].tolist() == [0.0] * 16 and found.facts["radius"] == 0.0


def test_equally_far_rows_go_by_row_number():
    p = np.array([[0.5, 0.5], [0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.1, 0.9]])
    assert contextual_diversity(p, 5, start=0).indices.tolist() == [0, 1, 2, 3, 4]


def test_rounding_does_not_decide_between_equally_far_rows():
    """Permuted classes are equally far from uniform, though their sums round differently."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        one = generator.dirichlet(np.full(7, 0.3))
        p = np.stack([np.full(7, 1 / 7), *(generator.permutation(one) for _ in range(30))])
        assert contextual_diversity(p, 2, start=0).indices.tolist() == [0, 1]


def test_blocks_and_containers_do_not_matter(tmp_path):
    p = predictions(400, 5).astype(np.float16)
    np.save(tmp_path / "p.npy", p)
    whole = contextual_diversity(p, 300, seed=1)
    for other, options in (
        (p, {"block_bytes": 900}),
        (np.load(tmp_path / "p.npy", mmap_mode="r"), {}),
        (torch.from_numpy(p.copy()), {}),
        (p.astype(np.float64), {"block_bytes": 50_000}),
    ):
        found = contextual_diversity(other, 300, seed=1, **options)
        assert found.indices.tolist() == whole.indices.tolist()
        np.testing.assert_allclose(found.gains, whole.gains, rtol=1e-9)


def test_edges_and_what_is_refused():
    p = predictions(6)
    assert len(contextual_diversity(p, 0)) == 0
    assert contextual_diversity(p[:1], 1).indices.tolist() == [0]
    assert contextual_diversity(np.ones((3, 1)), 3, start=1).indices.tolist() == [1, 0, 2]
    with pytest.raises(ValueError, match=r"row 4 .* not logits"):
        contextual_diversity(np.where(np.arange(6)[:, None] == 4, 3.0, p), 2)
    with pytest.raises(ValueError, match="start is 6"):
        contextual_diversity(p, 2, start=6)
    with pytest.raises(ValueError, match="floor"):
        contextual_diversity(p, 2, floor=0.25)
    with pytest.raises(ValueError, match="budget"):
        contextual_diversity(p, 5, selected=[0, 1])
