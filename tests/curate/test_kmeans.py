import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curate import kmeans
from curate.kmeans import Clusters, assign, assign_only, fit
from curate.runtime import row_keys
from curate.unit_rows import mixed_keys, unit_centroids


def unit(a):
    return a / np.linalg.norm(a, axis=1, keepdims=True)


def mixture(n=3000, d=32, k=12, spread=0.12, seed=0, dtype=np.float16):
    generator = np.random.default_rng(seed)
    centers = unit(generator.standard_normal((k, d)))
    rows = centers[generator.integers(k, size=n)] + spread * generator.standard_normal((n, d))
    return unit(rows).astype(dtype)


def same(a, b):
    assert np.array_equal(a.centroids, b.centroids)
    assert np.array_equal(a.counts, b.counts)
    assert (a.objective, a.iterations) == (b.objective, b.iterations)


def objective(x, centroids):
    wide = x.astype(np.float64)
    cosine = unit(wide) @ unit(np.asarray(centroids, dtype=np.float64)).T
    return cosine.max(axis=1).mean()


class Lazy:
    """What the pipeline passes: shape and rows, nothing else."""

    def __init__(self, array):
        self.array, self.shape, self.most = array, array.shape, 0

    def __getitem__(self, rows):
        block = self.array[rows]
        self.most = max(self.most, len(block))
        return block


@pytest.mark.parametrize("spread", [0.1, 0.3])
def test_objective_is_within_one_percent_of_scikit_learn_and_faiss(spread):
    from sklearn.cluster import KMeans

    x = mixture(n=4000, spread=spread)
    ours = [fit(x, 12, iterations=50, seed=seed, device="cpu") for seed in range(3)]
    best = max(found.objective for found in ours)
    theirs = KMeans(12, n_init=3, random_state=0).fit(x.astype(np.float32))
    assert best >= 0.99 * objective(x, theirs.cluster_centers_)
    assert best == pytest.approx(max(objective(x, found.centroids) for found in ours), abs=1e-7)
    # From the same start FAISS takes the same way.
    with_faiss = fit(x, 12, iterations=50, device="cpu", backend="faiss")
    assert with_faiss.backend == "faiss" and ours[0].backend == "torch"
    assert ours[0].objective == pytest.approx(with_faiss.objective, rel=0.01)


def test_converged_centroids_are_the_directions_of_their_rows():
    x = mixture()
    found = fit(x, 12, iterations=200, tolerance=0, device="cpu")
    assert found.iterations < 200
    cluster, _ = assign(x, found.centroids, device="cpu")
    means = np.stack([x[cluster == j].astype(np.float64).sum(axis=0) for j in range(12)])
    np.testing.assert_allclose(found.centroids, unit(means), atol=2**-24)
    assert np.array_equal(found.counts, np.bincount(cluster))


def test_tolerance_stops_once_little_is_gained():
    x = mixture(spread=0.5)
    whole = fit(x, 40, iterations=200, tolerance=0, device="cpu")
    some = fit(x, 40, iterations=200, tolerance=0.01, device="cpu")
    assert some.iterations < whole.iterations
    assert 0 < whole.objective - some.objective < 0.03


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_result_does_not_depend_on_order_blocks_or_threads(dtype):
    x = mixture(n=1200, dtype=dtype)
    x[100:200] = x[:100]  # ties
    keys = row_keys(map(str, range(len(x))), 0)
    expected = fit(x, 40, device="cpu", keys=keys)
    order = np.random.default_rng(1).permutation(len(x))
    same(expected, fit(x[order], 40, device="cpu", keys=keys[order]))
    same(expected, fit(x, 40, device="cpu", keys=keys, block_bytes=100_000))
    torch.set_num_threads(2)
    same(expected, fit(x, 40, device="cpu", keys=keys))
    cluster, distance = assign(x, expected.centroids, device="cpu")
    again = assign(x[order], expected.centroids, device="cpu", block_bytes=50_000)
    assert np.array_equal(cluster[order], again[0])
    assert np.array_equal(distance[order], again[1])


def test_every_kind_of_rows_gives_the_same_result(tmp_path):
    x = mixture(n=500)
    np.save(tmp_path / "x.npy", x)
    lazy = Lazy(x)
    expected = fit(x, 5, device="cpu", block_bytes=50_000)
    same(expected, fit(np.load(tmp_path / "x.npy", mmap_mode="r"), 5, device="cpu"))
    same(expected, fit(torch.from_numpy(x), 5, device="cpu"))
    same(expected, fit(x.astype(np.float32), 5, device="cpu"))
    same(expected, fit(lazy, 5, device="cpu", block_bytes=50_000))
    assign(lazy := Lazy(x), expected.centroids, device="cpu", block_bytes=50_000)
    assert 1 < lazy.most < 100  # never the whole


@pytest.mark.gpu
def test_gpu_gives_the_cpu_result():
    x = mixture()
    same(fit(x, 40, device="cpu"), fit(x, 40, device="cuda"))
    same(fit(x, 40, device="cpu"), fit(torch.from_numpy(x).cuda(), 40))


def test_seed_changes_the_start_and_init_replaces_it():
    x = mixture()
    first = fit(x, 12, iterations=1, device="cpu")
    assert not np.array_equal(
        first.centroids, fit(x, 12, iterations=1, seed=1, device="cpu").centroids
    )
    rest = fit(x, 12, iterations=200, init=first.centroids, device="cpu")
    whole = fit(x, 12, iterations=200, device="cpu")
    assert np.array_equal(rest.centroids, whole.centroids)
    assert rest.iterations == whole.iterations - 1


def test_progress_is_called_after_every_move():
    calls = []
    found = fit(mixture(), 12, device="cpu", progress=lambda *step: calls.append(step))
    assert calls == [(i + 1, 20) for i in range(found.iterations)]


def test_assign_is_exact_and_ties_go_to_the_smallest_number():
    x = mixture(n=700, dtype=np.float32)
    centroids = unit_centroids(x[:50])
    doubled = np.concatenate((centroids, centroids))
    cluster, distance = assign(x, doubled, device="cpu")
    cosine = unit(x.astype(np.float64)) @ unit(doubled.astype(np.float64)).T
    assert np.array_equal(cluster, (cosine[:, :50]).argmax(axis=1))
    assert cluster.dtype == np.int32 and distance.dtype == np.float32
    np.testing.assert_allclose(distance, 1 - cosine.max(axis=1), atol=2**-23)
    assert np.array_equal(distance * 2**23, np.rint(distance * 2**23))
    assert (distance[:50] == 0).all()


def test_row_between_two_centroids():
    x = np.array([[0.6, 0.8], [0.8, 0.6]], dtype=np.float32)
    middle = unit(np.array([[1.0, 1.0]])).astype(np.float32)
    assert assign(middle, x, device="cpu")[0] == [0]
    assert assign(middle, x[::-1].copy(), device="cpu")[0] == [0]
    opposite, distance = assign(-x[:1], x[:1] * 7, device="cpu")
    assert (opposite[0], distance[0]) == (0, 2.0)


def test_assign_no_rows():
    cluster, distance = assign(np.empty((0, 3), np.float16), np.eye(3), device="cpu")
    assert len(cluster) == len(distance) == 0


def test_edges_of_k():
    x = mixture(n=60)
    one = fit(x, 1, device="cpu")
    np.testing.assert_allclose(
        one.centroids, unit(x.astype(np.float64).sum(axis=0, keepdims=True)), atol=2**-24
    )
    every = fit(x, 60, device="cpu")
    assert (every.counts == 1).all() and every.objective == 1.0 and every.empty_clusters == 0
    single = fit(x[:1], 1, device="cpu")
    assert single.objective == 1.0 and single.counts == [1]


def test_fewer_distinct_rows_than_clusters():
    x = np.repeat(mixture(n=5, spread=1.0), 20, axis=0)
    found = fit(x, 9, device="cpu")
    assert found.empty_clusters == 4 and found.objective == 1.0
    assert sorted(found.counts) == [0] * 4 + [20] * 5
    assert np.allclose(np.linalg.norm(found.centroids, axis=1), 1)


def test_empty_clusters_take_the_farthest_rows():
    x = mixture(n=400, spread=0.4)
    init = np.repeat(x[:1].astype(np.float32), 10, axis=0)
    found = fit(x, 10, init=init, device="cpu")
    assert found.empty_clusters == 0 and (found.counts > 0).all()
    keys = row_keys(map(str, range(len(x))), 0)
    order = np.random.default_rng(1).permutation(len(x))
    same(
        fit(x, 10, init=init, device="cpu", keys=keys),
        fit(x[order], 10, init=init, device="cpu", keys=keys[order]),
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.data())
def test_no_cluster_is_empty_while_distinct_rows_are_left(seed, n, data):
    generator = np.random.default_rng(seed)
    distinct = unit(generator.standard_normal((data.draw(st.integers(1, n)), 6)))
    x = distinct[generator.integers(len(distinct), size=n)].astype(np.float16)
    k = data.draw(st.integers(1, n))
    found = fit(x, k, seed=seed, device="cpu")
    assert found.counts.sum() == n
    assert found.empty_clusters == max(0, k - len(np.unique(x, axis=0)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "must lie in 1 ... 30"),
        ({"k": 31}, "must lie in 1 ... 30"),
        ({"backend": "cuml"}, "use one of auto, torch, faiss"),
        ({"tolerance": 1}, "lie in 0 ... 1"),
        ({"iterations": 0}, "at least 1"),
        ({"block_bytes": 0}, "at least 1"),
        ({"keys": np.arange(30)}, "uint64"),
        ({"init": np.eye(2)}, "must be"),
        ({"x": np.zeros(3, np.float32)}, "rows, dimensions"),
    ],
)
def test_wrong_requests(change, message):
    with pytest.raises(ValueError, match=message):
        fit(**{"x": mixture(n=30), "k": 2, "device": "cpu"} | change)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "row 17 of x holds NaN"),
        (0.0, "row 17 of x has length 0"),
        (1.0, "row 17 .* 5.657"),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_bad_rows_are_named(value, message, backend):
    x = mixture(n=30)
    x[17] = x[20] = value
    with pytest.raises(ValueError, match=message):
        fit(x, 2, device="cpu", backend=backend)
    with pytest.raises(ValueError, match=message):
        assign(x, np.eye(1, 32), device="cpu", block_bytes=10_000)


def test_wrong_types_and_centroids():
    x = mixture(n=30)
    with pytest.raises(TypeError, match=r"int64; use float16"):
        fit(np.eye(4, dtype=np.int64), 2, device="cpu")
    with pytest.raises(ValueError, match="centroid 1 is zero"):
        assign(x, np.eye(2, 32) * [[1], [0]], device="cpu")
    with pytest.raises(ValueError, match="same encoder"):
        assign(x, np.eye(2), device="cpu")


def test_missing_faiss_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'curate-distill\[cpu\]'"):
        fit(mixture(n=30), 2, backend="faiss", device="cpu")


def test_full_float32_even_where_a_program_asked_for_less():
    x = mixture()
    expected = fit(x, 12, device="cpu")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        same(expected, fit(x, 12, device="cpu"))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_centroids_on_the_grid_stay():
    c = unit_centroids(np.random.default_rng(0).standard_normal((500, 2)))
    assert np.array_equal(c, unit_centroids(c))
    assert np.array_equal(c * 2**24, np.rint(c * 2**24))


def test_mixed_keys_are_a_shuffle():
    keys = np.arange(10_000, dtype=np.uint64)
    a, b = mixed_keys(keys, 0, "a"), mixed_keys(keys, 1, "a")
    assert len(np.unique(a)) == len(keys) and not np.array_equal(a, b)
    assert abs((a >> np.uint64(63)).mean() - 0.5) < 0.02


def test_clusters_check_themselves():
    eye, distance = np.eye(2, dtype=np.float32), np.array([0.5, np.nan], np.float32)
    good = Clusters(np.array([1, -1], np.int32), distance, eye)
    assert good.counts.tolist() == [0, 1]
    for cluster, dist, message in [
        ([2, -1], distance, "0 ... k - 1"),
        ([-2, 0], distance, "0 ... k - 1"),
        ([0, 1], distance, "cosine_distance of row 1 is nan"),
        ([0], distance, "both"),
        ([0, 1], np.array([0, 2.5], np.float32), "row 1 is 2.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            Clusters(np.array(cluster, np.int32), dist, eye)
    assert kmeans.Clusters is Clusters


def test_float64_rows_are_taken_as_float32():
    x = mixture(dtype=np.float64)
    found, expected = (fit(rows, 5, device="cpu") for rows in (x, x.astype(np.float32)))
    assert np.array_equal(found.centroids, expected.centroids)
    for one, other in zip(
        assign(x, found.centroids, device="cpu"),
        assign(x.astype(np.float32), found.centroids, device="cpu"),
        strict=True,
    ):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("after", [1, 3, 14])
def test_a_fit_goes_on_from_any_checkpoint(after):
    x = mixture(spread=0.4)
    seen = {}
    whole = fit(x, 12, iterations=15, device="cpu", checkpoint=seen.__setitem__)
    assert list(seen) == list(range(1, whole.iterations + 1))
    done = min(after, whole.iterations)
    rest = fit(x, 12, iterations=15 - done, init=seen[done], device="cpu")
    assert np.array_equal(rest.centroids, whole.centroids)
    assert done + rest.iterations == whole.iterations


def test_clusters_alone_are_those_with_distances():
    x = mixture(400)
    expected = assign(x, x[:7], device="cpu")[0]
    np.testing.assert_array_equal(assign_only(x, x[:7], device="cpu"), expected)
    np.testing.assert_array_equal(assign_only(x, x[:7], device="cpu", block_bytes=5000), expected)
    with pytest.raises(ValueError, match="same encoder"):
        assign_only(x, x[:7, :-1], device="cpu")
