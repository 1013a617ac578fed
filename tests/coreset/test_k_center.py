import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import pairwise_distances

from coreset.distances import Points
from coreset.k_center import k_center, k_center_steps
from coreset.k_center_exact import k_center_exact
from coreset.k_center_robust import k_center_robust
from tests.references.k_center_reference import farthest_first, optimum


def gaussian(n=400, d=16, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def clustered(n=400, d=16, spread=0.1, seed=0):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(20, d))
    return (centers[rng.integers(20, size=n)] + spread * rng.normal(size=(n, d))).astype(np.float32)


def duplicated(n=400, d=16, distinct=60, seed=0):
    return gaussian(distinct, d, seed)[np.random.default_rng(seed).integers(distinct, size=n)]


def grid():
    return np.stack(np.meshgrid(*[np.arange(20.0)] * 2), -1).reshape(-1, 2).astype(np.float32)


def bits():
    return np.random.default_rng(0).integers(0, 2, size=(300, 12)).astype(np.float32)


def outlier():
    x = gaussian(300, 8)
    x[7] = 1e6
    return x


def mixed_scales():
    return gaussian(300, 8) * np.logspace(-9, 3, 300, dtype=np.float32)[:, None]


def nearly_equidistant():
    """Orthonormal rows: all distances differ only from the seventh digit on."""
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(150, 150)))[0]
    return q.astype(np.float32)


DATA = {
    "nearly equidistant": nearly_equidistant(),
    "gaussian": gaussian(),
    "clustered": clustered(),
    "tight clusters far apart": clustered(spread=1e-6),
    "duplicated": duplicated(),
    "all equal": np.ones((50, 3), np.float32),
    "a grid of ties": grid(),
    "binary": bits(),
    "mean 1000": gaussian() + np.float32(1000),
    "float64 on mean 1e6": 1e6 + np.random.default_rng(0).normal(size=(300, 5)),
    "float16": gaussian().astype(np.float16),
    "scale 1e6": gaussian() * np.float32(1e6),
    "scale 1e-6": gaussian() * np.float32(1e-6),
    "scale 1e-20": gaussian() * np.float32(1e-20),
    "scale 1e18": gaussian(100) * np.float32(1e18),
    "scale 1e100": gaussian(100).astype(np.float64) * 1e100,
    "mixed scales": mixed_scales(),
    "one far outlier": outlier(),
    "one column": gaussian(200, 1),
}


def same(found, x, budget, **options):
    rows, gains, radius = farthest_first(x, budget, **options)
    assert found.indices.tolist() == rows.tolist()
    assert found.gains.tolist() == gains.tolist()
    assert found.facts["radius"] == radius


@pytest.mark.parametrize("candidates", [None, 7])
@pytest.mark.parametrize("name", DATA)
def test_the_sequence_is_that_of_the_plain_loop(name, candidates):
    x = DATA[name]
    for budget in (len(x) // 3, len(x)):
        same(k_center(x, budget, start=3, candidates=candidates), x, budget, start=3)


@pytest.mark.parametrize("name", ["gaussian", "clustered", "duplicated", "float16", "mean 1000"])
def test_cosine_is_the_loop_on_unit_rows(name):
    x = DATA[name]
    found = k_center(x, 100, start=3, metric="cosine", candidates=20)
    same(found, x, 100, start=3, metric="cosine")
    chord = np.sqrt(2 * pairwise_distances(x.astype(float), x[found.indices], metric="cosine"))
    assert found.facts["radius"] == pytest.approx(chord.min(axis=1).max(), abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 3), st.data())
def test_small_integer_points_full_of_ties(seed, n, d, data):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 4, size=(n, d)).astype(np.float32)
    selected = rng.permutation(n)[: data.draw(st.integers(0, n - 1))]
    budget = data.draw(st.integers(0, n - len(selected)))
    start = None if len(selected) else int(rng.integers(n))
    if len(selected) or budget:
        found = k_center(
            x, budget, selected=selected, start=start, candidates=data.draw(st.integers(1, 9))
        )
        same(found, x, budget, selected=selected.tolist(), start=start)


def test_the_radius_agrees_with_scikit_learn():
    x = gaussian(1000, 30)
    found = k_center(x, 40, seed=5)
    nearest = pairwise_distances(x.astype(np.float64), x[found.indices]).min(axis=1)
    assert found.facts["radius"] == pytest.approx(nearest.max(), rel=1e-9)
    assert found.facts["lower_bound"] == found.facts["radius"] / 2


@pytest.mark.parametrize("seed", range(12))
def test_radius_is_within_twice_the_optimum_and_the_bound_below_it(seed):
    rng = np.random.default_rng(seed)
    n, budget = int(rng.integers(5, 13)), int(rng.integers(1, 5))
    x = rng.normal(size=(n, 2)) if seed % 2 else rng.integers(0, 5, size=(n, 2)).astype(float)
    selected = rng.permutation(n)[: seed % 3].tolist() if n - budget > 2 else []
    found = k_center(x, budget, seed=seed, selected=selected)
    best = optimum(x, budget, selected)
    slack = 1 + 1e-12
    assert found.facts["lower_bound"] <= best * slack
    assert best <= found.facts["radius"] * slack <= 2 * best * slack**2
    if not selected:
        exact = k_center_exact(x, budget)
        assert exact.facts["radius"] == pytest.approx(best, rel=1e-12)
        assert len(exact) == budget


def test_gains_never_increase_and_smaller_budgets_are_prefixes():
    x = clustered(500, 8, 0.5)
    full = k_center(x, 500, seed=1)
    assert sorted(full.indices.tolist()) == list(range(500))
    assert (np.diff(full.gains[1:]) <= 0).all()
    for budget in (0, 1, 2, 77, 499):
        part = k_center(x, budget, seed=1)
        assert part.indices.tolist() == full.indices[:budget].tolist()
        assert part.facts["radius"] == full.gains[budget]
    steps = list(k_center_steps(x, seed=1))
    assert [step.row for step in steps] == full.indices.tolist()
    assert [step.gain for step in steps] == full.gains.tolist()


def test_selected_rows_continue_a_traversal():
    x = gaussian()
    full = k_center(x, 60, start=0)
    rest = k_center(x, 40, selected=full.indices[:20])
    assert rest.indices.tolist() == full.indices[20:].tolist()
    assert rest.gains.tolist() == full.gains[20:].tolist()
    steps = itertools.islice(k_center_steps(x, selected=full.indices[:20]), 40)
    assert [step.row for step in steps] == rest.indices.tolist()


@pytest.mark.parametrize("name", ["gaussian", "duplicated", "a grid of ties", "float16"])
def test_blocks_threads_and_containers_do_not_change_the_result(name, tmp_path):
    x = DATA[name]
    expected = k_center(x, 100, start=0, candidates=30)

    def check(rows, **options):
        found = k_center(rows, 100, start=0, **{"candidates": 30, **options})
        assert found.indices.tolist() == expected.indices.tolist()
        assert found.gains.tolist() == expected.gains.tolist()

    for block_bytes in (1000, 20_000):
        check(x, block_bytes=block_bytes)
    check(x, candidates=400)
    torch.set_num_threads(2)
    check(x)
    np.save(tmp_path / "x.npy", x)
    check(np.load(tmp_path / "x.npy", mmap_mode="r"))
    check(torch.from_numpy(x))
    check(x.astype(np.float32))
    check(x.astype(np.float64))
    check(np.asfortranarray(x))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_lower_matmul_precision_changes_no_choice(precision):
    expected = k_center(DATA["gaussian"], 100, start=0)
    torch.set_float32_matmul_precision(precision)
    try:
        found = k_center(DATA["gaussian"], 100, start=0)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert found.indices.tolist() == expected.indices.tolist()


def test_the_error_bound_of_products_holds():
    """Also where it is tested hardest: float32 against float64, equal rows, far from the mean."""
    x = np.concatenate([gaussian(200, 300), gaussian(100, 300), 1e3 + gaussian(50, 300)])
    points = Points(x)
    rows = np.arange(len(x))
    exact = points.exact(rows)
    truth = ((exact[:, None] - exact[None]) ** 2).sum(axis=2)
    for wide in (False, True):
        moved, length = points.placed(rows, wide)
        reach = (length[:, None] + length) ** 2
        products = (moved @ moved.T).double().numpy()
        found = length[:, None] ** 2 + length**2 - 2 * products
        error = (np.abs(found - truth) / reach).max()
        assert 0 < error <= points.tolerance(wide)


def test_first_choice_is_in_the_result_unlike_anomalib():
    """Anomalib issues 1332 and 3459: the seed point is left out of the coreset."""
    x = gaussian(50)
    assert k_center(x, 5, start=17).indices[0] == 17
    drawn = {int(k_center(x, 1, seed=seed).indices[0]) for seed in range(20)}
    assert len(drawn) > 5


def test_equal_rows_are_at_distance_zero_unlike_deepcore():
    """DeepCore's |x|^2 - 2xy + |y|^2 without centring gives .088 for a row and itself."""
    x = np.repeat(10 + gaussian(20, 64), 2, axis=0)
    found = k_center(x, 25, start=0)
    assert found.gains[20:].tolist() == [0.0] * 5
    assert sorted((found.indices[:20] // 2).tolist()) == list(range(20))
    assert found.facts["radius"] == 0


def test_order_is_kept_and_the_global_generator_left_alone_unlike_deepcore():
    """DeepCore (11): a sorted mask comes back, and numpy's global generator is seeded."""
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    found = k_center(gaussian(), 50, seed=3)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    assert found.indices.tolist() != sorted(found.indices.tolist())


def test_a_zero_row_has_no_cosine_unlike_deepcore():
    """DeepCore (12): the cosine similarity of a zero row is NaN, and goes unnoticed."""
    x = gaussian(10)
    x[4] = 0
    with pytest.raises(ValueError, match="row 4 of x is zero"):
        k_center(x, 2, metric="cosine")
    assert len(k_center(x, 2)) == 2


def test_wrong_arguments_are_named():
    x = gaussian(10)
    bad = x.copy()
    bad[6, 1] = np.nan
    cases = [
        (lambda: k_center(bad, 2), "row 6"),
        (lambda: k_center(x, 11), "budget is 11"),
        (lambda: k_center(x, 9, selected=[0, 1]), "budget is 9"),
        (lambda: k_center(x, 2, start=10), "start is 10"),
        (lambda: k_center(x, 2, start=-1), "start is -1"),
        (lambda: k_center(x, 2, start=1, selected=[0]), "start is the first choice"),
        (lambda: k_center(x, 2, metric="manhattan"), "manhattan"),
        (lambda: k_center(x, 2, candidates=0), "candidates is 0"),
        (lambda: k_center_steps(bad), "row 6"),
        (lambda: k_center_robust(x, 2, outliers=1.5), "outliers is 1.5"),
        (lambda: k_center_robust(x, 2, outliers=11), "outliers is 11"),
        (lambda: k_center_exact(np.zeros((2001, 2)), 2), "use method 'k-center'"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="outliers is True"):
        k_center_robust(x, 2, outliers=True)


def test_the_smallest_inputs():
    one = np.ones((1, 3), np.float32)
    for method in (k_center, k_center_robust, k_center_exact):
        assert method(one, 1).indices.tolist() == [0]
        assert method(one, 0).indices.tolist() == []
        assert len(method(np.empty((0, 3), np.float32), 0)) == 0
        assert sorted(method(grid()[:9], 9).indices.tolist()) == list(range(9))
    assert k_center(one, 1).facts["radius"] == 0
    assert k_center(one, 0).facts["radius"] == np.inf
    assert list(k_center_steps(np.empty((0, 3), np.float32))) == []


@pytest.mark.parametrize("outliers", [0, 1, 13])
@pytest.mark.parametrize("name", ["gaussian", "clustered", "duplicated", "one far outlier"])
def test_robust_is_the_plain_trimmed_loop(name, outliers):
    x = DATA[name]
    found = k_center_robust(x, 40, outliers=outliers, start=0, candidates=16)
    same(found, x, 40, start=0, outliers=outliers)
    assert found.facts["outliers"] == outliers


def test_robust_is_not_drawn_to_outliers():
    x = gaussian(500, 4)
    x[:5] = 1e4 * np.arange(1, 6)[:, None]
    found = k_center_robust(x, 20, outliers=0.01, start=100)
    assert found.facts["outliers"] == 5
    assert not set(range(5)) & set(found.indices.tolist())
    assert found.facts["radius"] < 5
    assert set(range(5)) <= set(k_center(x, 20, start=100).indices.tolist())


@pytest.mark.parametrize("n, outliers", [(30, 5), (30, 28), (30, 30)])
def test_robust_meets_any_budget(n, outliers):
    x = duplicated(n, distinct=10)
    for budget in (0, 1, 20, n):
        rows = k_center_robust(x, budget, outliers=outliers).indices
        assert len(set(rows.tolist())) == budget


@pytest.mark.parametrize("seed", range(8))
def test_with_outliers_exact_is_the_optimum_and_robust_is_certified(seed):
    rng = np.random.default_rng(seed)
    n, budget, outliers = int(rng.integers(5, 12)), int(rng.integers(1, 4)), int(rng.integers(0, 4))
    x = rng.integers(0, 6, size=(n, 2)).astype(np.float32)
    best = optimum(x, budget, outliers=outliers)
    exact = k_center_exact(x, budget, outliers=outliers)
    assert exact.facts["radius"] == pytest.approx(best, rel=1e-12)
    robust = k_center_robust(x, budget, outliers=outliers, seed=seed)
    slack = 1 + 1e-12
    assert robust.facts["lower_bound"] <= best * slack
    assert best <= robust.facts["radius"] * slack


def test_exact_beats_greedy_and_its_rows_have_its_radius():
    x = gaussian(120, 3)
    exact, greedy = k_center_exact(x, 6), k_center(x, 6)
    nearest = pairwise_distances(x.astype(np.float64), x[exact.indices]).min(axis=1).max()
    assert nearest == pytest.approx(exact.facts["radius"], rel=1e-9)
    assert greedy.facts["lower_bound"] <= exact.facts["radius"] < greedy.facts["radius"]
    assert exact.facts["lower_bound"] == exact.facts["radius"]
