import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.kmeans import assign, fit
from curate.prune import PRESETS, allocate, project, prune_by_complexity, prune_clusters
from curate.unit_rows import unit_centroids
from tests.references import allocation_reference, prune_reference


@st.composite
def programs(draw):
    k = draw(st.integers(1, 12))
    high = draw(st.lists(st.integers(0, 50), min_size=k, max_size=k))
    low = [draw(st.integers(0, h)) for h in high]
    target = draw(st.lists(st.floats(-20, 90), min_size=k, max_size=k))
    return target, low, high, draw(st.integers(sum(low), sum(high)))


def clustered(seed, n, k, *, ties=False, nulls=False):
    g = np.random.default_rng(seed)
    cluster = g.integers(-1 if nulls else 0, k, size=n).astype(np.int32)
    steps = g.integers(1, 4, size=n) if ties else g.permutation(n) + 1
    distance = (steps / (8 * max(n, 1))).astype(np.float32)
    distance[cluster < 0] = np.nan
    centroids = unit_centroids(g.standard_normal((k, 6)))
    return cluster, distance, centroids, g.permutation(n).astype(np.uint64)


@settings(max_examples=200, deadline=None)
@given(programs())
def test_projection_meets_the_optimality_conditions(program):
    target, low, high, budget = program
    x = project(*program)
    assert x.sum() == pytest.approx(budget, abs=1e-9)
    assert (x >= low).all() and (x <= high).all()
    shift = x - np.array(target)
    inside = (x > np.array(low) + 1e-9) & (x < np.array(high) - 1e-9)
    if inside.any():
        lam = shift[inside][0]
        np.testing.assert_allclose(shift[inside], lam, atol=1e-9)
        # At a lower bound the target would have to be raised more, at an upper bound less.
        at_low = (x <= np.array(low) + 1e-9) & (np.array(low) < high)
        at_high = (x >= np.array(high) - 1e-9) & (np.array(low) < high)
        assert (shift[at_low] >= lam - 1e-8).all() and (shift[at_high] <= lam + 1e-8).all()


@settings(max_examples=40, deadline=None)
@given(programs())
def test_projection_equals_a_solver(program):
    target = program[0]
    theirs = allocation_reference.project(*program)
    mine = project(*program)
    assert ((mine - target) ** 2).sum() <= ((theirs - target) ** 2).sum() + 1e-6
    np.testing.assert_allclose(mine, theirs, atol=1e-3)


@settings(max_examples=100, deadline=None)
@given(programs(), st.data())
def test_projection_grows_with_the_budget(program, data):
    target, low, high, budget = program
    more = data.draw(st.integers(budget, sum(high)))
    assert (project(target, low, high, more) >= project(*program) - 1e-9).all()


@settings(max_examples=200, deadline=None)
@given(programs())
def test_allocation_is_exact_within_bounds_and_next_to_the_projection(program):
    _, low, high, budget = program
    got = allocate(*program)
    assert got.dtype == np.int64 and got.sum() == budget
    assert (got >= low).all() and (got <= high).all()
    assert np.abs(got - project(*program)).max() < 1 + 1e-8


def test_huge_targets_still_sum_to_the_budget():
    g = np.random.default_rng(0)
    target = g.random(1000) * 1e13
    got = allocate(target, 0, 10**14, int(target.sum()) + 7)
    assert got.sum() == int(target.sum()) + 7


def test_ties_go_to_the_smaller_priority_then_the_smaller_index():
    assert allocate([1.5] * 4, 0, 9, 6).tolist() == [2, 2, 1, 1]
    priority = np.array([3, 2, 1, 0], np.uint64)
    assert allocate([1.5] * 4, 0, 9, 6, priority=priority).tolist() == [1, 1, 2, 2]
    # 0.1 + 0.2 and 0.3 differ in the last bit only.
    assert allocate([1.3, 1.1 + 0.2, 0.1, 0.3], 0, 9, 3).tolist() == [2, 1, 0, 0]


def test_rounding_alone_misses_the_budget():
    target = np.full(500, 1.5)  # np.rint gives 2 to each: 1000
    assert np.rint(target).sum() == 1000
    assert allocate(target, 0, 5, 750).sum() == 750


def test_full_clusters_pass_on_equal_parts():
    np.testing.assert_allclose(project([1, 5, 12], 0, [100, 100, 6], 18), [4, 8, 6])


def test_no_clusters():
    assert allocate([], [], [], 0).shape == (0,)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (([1, 2], 0, [1, 1], 3), r"budget is 3; the bounds allow 0 \.\.\. 2"),
        (([1, 2], 1, 2, 1), "the bounds allow 2"),
        (([1, 2], [0, 3], 2, 3), "lower is 3 and upper 2 at 1"),
        (([1, np.nan], 0, 2, 1), "not finite"),
        (([1, 2], 0.5, 2, 1), "whole number"),
        (([1, 2], [0, 0, 0], 2, 1), "one for each target"),
    ],
)
def test_impossible_allocations(program, message):
    with pytest.raises(ValueError, match=message):
        allocate(*program)
    with pytest.raises(ValueError, match=message):
        project(*program)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(30, 120), st.integers(1, 6), st.floats(0.3, 1))
def test_equals_the_paper(seed, n, k, keep):
    cluster, distance, centroids, _ = clustered(seed, n, k)
    cluster[:k] = np.arange(k)
    budget = int(keep * n)
    for which in ("hard", "easy"):
        got = prune_by_complexity(
            cluster, distance, centroids, budget, temperature=0.05, neighbours=3, which=which
        )
        expected = prune_reference.prune(cluster, distance, centroids, budget, 0.05, 3, which=which)
        # The solver is right to about 1e-4, so that a remainder may fall to a neighbour.
        moved = np.bincount(cluster[got], minlength=k) - np.bincount(cluster[expected], minlength=k)
        assert np.abs(moved).max() <= 1 and (got != expected).sum() == np.abs(moved).sum()
        assert np.abs(moved).sum() <= 2


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(0, 60),
    k=st.integers(1, 80),
    keep=st.floats(0, 1),
    which=st.sampled_from(["hard", "easy", "random"]),
    allocation=st.sampled_from(["complexity", "uniform"]),
    preset=st.sampled_from(sorted(PRESETS)),
)
def test_exact_budget_always(seed, n, k, keep, which, allocation, preset):
    cluster, distance, centroids, keys = clustered(seed, n, k, ties=True, nulls=True)
    there = int((cluster >= 0).sum())
    budget = int(np.floor(keep * there + 0.5))
    got = prune_clusters(
        cluster,
        distance,
        centroids,
        budget,
        which=which,
        allocation=allocation,
        keys=keys,
        **PRESETS[preset],
    )
    assert got.kept.dtype == bool and got.kept.sum() == got.allocated.sum() == budget
    assert not got.kept[cluster < 0].any()
    sizes = np.bincount(cluster[cluster >= 0], minlength=k)
    assert (got.allocated <= sizes).all()
    if there:
        assert got.target.sum() == pytest.approx(budget)
    if preset == "paper" and budget >= (sizes > 0).sum():
        assert (got.allocated >= np.minimum(1, sizes)).all()
    for j in range(k):
        assert sorted(got.rank[cluster == j]) == list(range(sizes[j]))
    assert (got.rank[cluster < 0] == -1).all() and got.rank.dtype == np.int32
    # Every kept row comes before every other row of its cluster.
    assert (got.rank[got.kept] < got.allocated[cluster[got.kept]]).all()


@pytest.mark.parametrize("which", ["hard", "easy", "random"])
@pytest.mark.parametrize("allocation", ["complexity", "uniform"])
def test_order_of_rows_and_clusters_changes_nothing(which, allocation):
    for seed in range(10):
        cluster, distance, centroids, keys = clustered(seed, 300, 25, ties=True, nulls=True)
        options = {"which": which, "allocation": allocation, "neighbours": 4}
        expected = prune_by_complexity(cluster, distance, centroids, 111, keys=keys, **options)
        g = np.random.default_rng(seed)
        rows, names = g.permutation(300), g.permutation(25)
        renamed = np.where(cluster < 0, -1, np.argsort(names)[cluster])[rows].astype(np.int32)
        got = prune_by_complexity(
            renamed, distance[rows], centroids[names], 111, keys=keys[rows], **options
        )
        assert np.array_equal(got, expected[rows])


def test_one_cluster_is_plain_hardest_first():
    cluster, distance, centroids, _ = clustered(0, 50, 1)
    kept = prune_by_complexity(cluster, distance, centroids, 20)
    assert np.array_equal(np.flatnonzero(kept), np.sort(np.argsort(-distance)[:20]))


def test_easy_keeps_nothing_of_a_cluster_without_a_share():
    cluster = np.repeat(np.arange(2, dtype=np.int32), 10)
    distance = np.r_[np.full(10, 0.001), np.full(10, 0.9)].astype(np.float32)
    got = prune_clusters(
        cluster,
        distance,
        np.eye(2, dtype=np.float32),
        8,
        which="easy",
        lower=0,
        temperature=0.01,
    )
    assert got.allocated.tolist() == [0, 8] and got.kept[:10].sum() == 0


def test_random_keeps_the_budget_and_follows_the_seed():
    cluster, distance, centroids, keys = clustered(0, 400, 4)
    first, second = (
        prune_by_complexity(cluster, distance, centroids, 100, which="random", seed=seed, keys=keys)
        for seed in (0, 1)
    )
    assert first.sum() == second.sum() == 100 and not np.array_equal(first, second)


def test_temperature_and_lower_bounds():
    cluster, distance, centroids, _ = clustered(3, 400, 5)
    distance *= (1 + cluster).astype(np.float32)
    cold, warm = (
        prune_clusters(cluster, distance, centroids, 60, temperature=t).target for t in (0.02, 0.5)
    )
    assert cold.max() > warm.max() and cold.min() < warm.min()
    tiny = prune_clusters(cluster, distance, centroids, 60, temperature=1e-320)
    assert np.isfinite(tiny.target).all() and tiny.allocated.min() == 1
    half = prune_clusters(cluster, distance, centroids, 60, temperature=0.01, lower_ratio=0.5)
    assert half.allocated.min() == 6
    uniform = prune_clusters(cluster, distance, centroids, 60, allocation="uniform")
    assert uniform.allocated.tolist() == [12] * 5
    few = prune_clusters(cluster, distance, centroids, 3)  # fewer than clusters
    assert few.kept.sum() == 3


def test_nothing_and_everything():
    cluster, distance, centroids, _ = clustered(0, 30, 40, nulls=True)
    there = cluster >= 0
    assert not prune_by_complexity(cluster, distance, centroids, 0).any()
    everything = prune_by_complexity(cluster, distance, centroids, int(there.sum()))
    assert np.array_equal(everything, there)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 31}, "budget is 31; of 30 rows 30 are in a cluster"),
        ({"budget": -1}, "must lie in 0"),
        ({"temperature": 0.0}, "must be positive"),
        ({"neighbours": 0}, "at least 1"),
        ({"lower": -1}, "0 or more"),
        ({"lower_ratio": 1.5}, "fraction"),
        ({"which": "best"}, "use one of hard, easy, random"),
        ({"allocation": "clustersize"}, "use one of complexity, uniform"),
    ],
)
def test_wrong_requests(change, message):
    cluster, distance, centroids, _ = clustered(0, 30, 3)
    with pytest.raises(ValueError, match=message):
        prune_clusters(
            **{
                "cluster": cluster,
                "cosine_distance": distance,
                "centroids": centroids,
                "budget": 5,
            }
            | change
        )


def test_from_rows_to_the_kept_set():
    g = np.random.default_rng(0)
    rows = g.standard_normal((500, 16))
    x = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    found = fit(x, 8, device="cpu")
    cluster, distance = assign(x, found.centroids, device="cpu")
    assert prune_by_complexity(cluster, distance, found.centroids, 140).sum() == 140
