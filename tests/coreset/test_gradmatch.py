import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coreset import select
from coreset.gradients import LastLayerGradients
from coreset.gradmatch import _Support, gradmatch, gradmatch_batches
from tests.coreset.toy import toy
from tests.references import gradmatch_reference as reference
from tests.references.gradients_reference import materialised


def made(n=50, classes=3, seed=0, features=True, **options):
    inputs = toy(n, classes=classes, seed=seed)
    x = inputs["features"] if features else None
    p = inputs["probabilities"] ** 0.3  # surer ones have gradients of hardly any length
    p /= p.sum(axis=1, keepdims=True)
    g = LastLayerGradients.of(p, inputs["labels"], x, **options)
    return g, materialised(g.errors, x), inputs["labels"]


def objective(whole, found, lam):
    w = found.weights.astype(np.float64)
    left = whole.sum(axis=0) - w @ whole[found.indices]
    return left @ left + lam * w @ w


@given(st.integers(1, 40), st.integers(0, 30), st.sampled_from([0.0, 0.5, 10.0]), st.data())
@settings(deadline=None, max_examples=40)
def test_is_pursuit_with_weights_solved_afresh(n, seed, lam, data):
    g, whole, _ = made(n, min(3, n), seed)
    # Past the rank of the gradients rounding decides which rows come in.
    k = data.draw(st.integers(1, min(n, 12)))
    rows, weights, value = reference.pursuit(whole, k, lam)
    found = gradmatch(g, k, lam=lam)
    if len(rows) == k:
        assert found.indices.tolist() == rows
        np.testing.assert_allclose(found.weights, weights, rtol=1e-4, atol=1e-5)
    assert found.facts["objective"] == pytest.approx(value, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("features", [True, False])
@pytest.mark.parametrize("lam", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_weights_are_optimal_on_the_choices_and_the_objective_falls(seed, lam, features):
    g, whole, _ = made(60, 4, seed, features)
    target, last = whole.sum(axis=0), np.inf
    for k in (1, 2, 5, 10, 20, 40, 60):
        found = gradmatch(g, k, lam=lam)
        value = objective(whole, found, lam)
        assert found.facts["objective"] == pytest.approx(value, rel=1e-4, abs=1e-5)
        best = reference.solve(whole, found.indices.tolist(), target, lam)[1]
        assert value <= best * (1 + 1e-4) + 1e-6
        assert value <= last * (1 + 1e-5) + 1e-6
        assert (found.gains >= 0).all()
        last = value
    assert last <= reference.solve(whole, list(range(60)), target, lam)[1] * (1 + 1e-4) + 1e-6


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_kkt_on_the_choices(lam):
    g, whole, _ = made(60, 4)
    found = gradmatch(g, 15, lam=lam)
    w = found.weights.astype(np.float64)
    slope = whole[found.indices] @ (whole.sum(axis=0) - w @ whole[found.indices]) - lam * w
    size = np.linalg.norm(whole.sum(axis=0)) * np.linalg.norm(whole[found.indices], axis=1)
    assert (w > 0).all()
    assert (np.abs(slope) <= 1e-6 * size).all()


def test_residual_never_grows_without_penalty():
    g, _, _ = made(60, 4)
    lengths = [gradmatch(g, k, lam=0.0).facts["residual"] for k in range(1, 25)]
    assert (np.diff(lengths) <= 1e-9).all() and lengths[-1] < 0.5 * lengths[0]


def test_exactly_k_rows_also_where_few_span_all_gradients():
    """DeepCore's GradMatch returns fewer rows where non-negative least squares gives zeros."""
    g, whole, _ = made(40, 3, features=False)  # rank 2
    found = gradmatch(g, 30, lam=0.0)
    assert len(set(found.indices.tolist())) == 30
    assert (found.weights > 0).sum() <= 3
    assert found.facts["residual"] < 1e-6
    rest = found.indices[(found.weights > 0).sum() :]
    products = whole[rest] @ whole.sum(axis=0)
    assert (np.diff(products) <= 1e-9).all()


def test_lam_is_used():
    """DeepCore's GradMatch ignores its lam, and cords' CPU path sets it to 0."""
    g, _, _ = made()
    free, ridge = (gradmatch(g, 10, lam=lam) for lam in (0.0, 50.0))
    assert (ridge.weights**2).sum() < (free.weights**2).sum()
    assert ridge.facts["residual"] > free.facts["residual"]


def test_factor_stays_the_inverse_cholesky_factor_when_rows_leave():
    g, whole, _ = made(30, 3)
    support = _Support(g, 0.3)
    for row in (4, 9, 1, 17, 22, 8):
        assert support._enter(row)
    support.weights = np.zeros(6)
    for j in (2, 0, 3):
        support._leave(j)
        k = len(support.rows)
        part = whole[support.rows]
        basis = support.basis[:k, :k]
        gram = part @ part.T + 0.3 * np.eye(k)
        np.testing.assert_allclose(basis @ gram @ basis.T, np.eye(k), atol=1e-10)
        np.testing.assert_allclose(np.triu(basis, 1), 0)
        solved = np.linalg.solve(gram, part @ whole.sum(axis=0))
        np.testing.assert_allclose(support.coordinates @ basis, solved, rtol=1e-8)
    assert support.rows == [9, 17, 22]


def test_copies_of_a_row():
    g, _, _ = made(15)
    twice = g.subset(np.tile(np.arange(15), 2))
    for lam in (0.0, 0.5):
        found = gradmatch(twice, 30, lam=lam)
        assert sorted(found.indices.tolist()) == list(range(30))
    alone, both = gradmatch(g, 5, lam=0.0), gradmatch(twice, 5, lam=0.0)
    assert both.indices.tolist() == alone.indices.tolist()
    np.testing.assert_allclose(both.weights, 2 * alone.weights, rtol=1e-4)


def test_a_rejected_row_leaves_the_support_as_it_was():
    g, _, _ = made(20)
    support = _Support(g, 0.0)
    for _ in range(6):
        assert support.grow()
    rows, gains, weights, value = support.rows, support.gains, support.weights, support.objective
    coordinates = support.coordinates
    support._restore(list(rows), list(gains), weights, value)
    assert support.rows == rows
    np.testing.assert_allclose(support.coordinates, coordinates, rtol=1e-8)


@pytest.mark.parametrize("block_bytes", [1, 700])
def test_blocks_and_float16_memory_maps(block_bytes, tmp_path):
    inputs = toy(50)
    x = inputs["features"].astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    stored = np.load(tmp_path / "x.npy", mmap_mode="r")
    p, y = inputs["probabilities"], inputs["labels"]
    one = gradmatch(LastLayerGradients.of(p, y, x.astype(np.float64)), 12)
    for other in (stored, torch.from_numpy(x)):
        two = gradmatch(LastLayerGradients.of(p, y, other, block_bytes=block_bytes), 12)
        assert one.indices.tolist() == two.indices.tolist()
        np.testing.assert_allclose(one.weights, two.weights, rtol=1e-5)


def test_select_matches_each_class():
    g, _, labels = made(60)
    found = select(None, 12, method="gradmatch", gradients=g, labels=labels)
    for c in range(3):
        rows = np.flatnonzero(labels == c)
        mine = labels[found.indices] == c
        alone = gradmatch(g.subset(rows), int(mine.sum()))
        assert found.indices[mine].tolist() == rows[alone.indices].tolist()


def test_batches_are_matched_by_their_means():
    g, whole, _ = made(50)
    cuts = [np.arange(s, min(s + 8, 50)) for s in range(0, 50, 8)]
    means = np.array([whole[rows].mean(axis=0) for rows in cuts])
    rows, weights, _ = reference.pursuit(means, 3, 0.5)
    for batches in (8, cuts):
        found = gradmatch_batches(g, batches, 3)
        assert found.indices.tolist() == rows
        np.testing.assert_allclose(found.weights, weights, rtol=1e-5)
    with pytest.raises(ValueError, match="batch 1 has no rows"):
        gradmatch_batches(g, [[1], []], 1)
    with pytest.raises(ValueError, match="batch size is 0"):
        gradmatch_batches(g, 0, 1)


def test_edges():
    g, _, _ = made(4)
    assert len(gradmatch(g, 0)) == 0
    assert gradmatch(g.subset([2]), 1, lam=0.0).weights == pytest.approx([1.0])
    assert len(gradmatch(g, 4)) == 4
    none = LastLayerGradients.of(np.tile([1.0, 0.0], (5, 1)), np.zeros(5, int))
    found = gradmatch(none, 3)
    assert found.indices.tolist() == [0, 1, 2] and found.weights.tolist() == [0.0] * 3
    for lam in (-1.0, np.nan):
        with pytest.raises(ValueError, match="lam"):
            gradmatch(g, 2, lam=lam)
    with pytest.raises(ValueError, match="budget"):
        gradmatch(g, 5)
