import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curate import codes, kmeans, lloyd, nearest, search, seeding
from curate.kmeans import assign, fit
from curate.lloyd import Lloyd
from curate.runtime import row_keys
from curate.unit_rows import Rows, unit_centroids
from tests.references import lloyd_reference

TYPES = ("int8", "float32")


def use(monkeypatch, kind):
    for module in (codes, lloyd, nearest, kmeans):
        monkeypatch.setattr(module, "product_type", lambda device: kind)


def unit(a):
    return a / np.linalg.norm(a, axis=1, keepdims=True)


def clustered(g, n, d):
    centres = unit(g.standard_normal((12, d)))
    return unit(centres[g.integers(12, size=n)] + 0.6 * unit(g.standard_normal((n, d))))


def structureless(g, n, d):
    return unit(g.standard_normal((n, d)))


def copies(g, n, d):
    """Exact and near copies of few rows."""
    x = unit(g.standard_normal((max(2, n // 20), d)))[g.integers(max(2, n // 20), size=n)]
    return unit(x + g.choice([0, 0, 1e-3, 0.3], (n, 1)) * unit(g.standard_normal((n, d))))


def clip_like(g, n, d):
    """Around a mean of norm 0.7 with one outlier dimension of 0.4, as CLIP's rows are."""
    mean = unit(g.standard_normal((1, d))) * (0.7**2 - 0.4**2) ** 0.5
    mean[0, d // 4] = 0.4
    topics = unit(g.standard_normal((12, d)))[g.integers(12, size=n)]
    return unit(mean + 0.5 * topics + 0.5 * unit(g.standard_normal((n, d))))


POOLS = (clustered, structureless, copies, clip_like)


def pool(make, n, d, seed=0, dtype=np.float16):
    return make(np.random.default_rng(seed), n, d).astype(dtype)


def by_lloyd(x, init, iterations, identity, block_bytes=None):
    found = Lloyd(Rows(x, "cpu", block_bytes), unit_centroids(init))
    done = found.run(iterations, identity)
    moved = found.centroids.copy()
    distance = found.settle(identity)
    return moved, done, found.centroids, found.cluster, distance


def by_definition(x, init, iterations, identity):
    moved, done = lloyd_reference.lloyd(x, unit_centroids(init), iterations, identity)
    return moved, done, *lloyd_reference.settle(x, moved, identity)


def check(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("make", POOLS)
def test_bounds_change_nothing(make, kind, monkeypatch):
    use(monkeypatch, kind)
    x, identity = pool(make, 1500, 24), np.arange(1500, dtype=np.uint64)
    expected = by_definition(x, x[:40].astype(float), 12, identity)
    for threads, block_bytes in ((1, None), (2, None), (2, 50_000)):
        torch.set_num_threads(threads)
        check(by_lloyd(x, x[:40], 12, identity, block_bytes), expected)


@pytest.mark.parametrize("kind", TYPES)
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    make=st.sampled_from(POOLS),
    n=st.integers(2, 120),
    d=st.sampled_from([2, 3, 16]),
    share=st.floats(0, 1),
    start=st.sampled_from(["rows", "one row", "opposite", "near"]),
    iterations=st.integers(1, 12),
)
def test_small_pools_as_by_definition(kind, seed, make, n, d, share, start, iterations):
    """Also where clusters are empty: at the start, later, or for want of distinct rows."""
    g = np.random.default_rng(seed)
    x = make(g, n, d).astype(np.float16)
    if d == 2:  # many rows at the same distance of two centroids
        angle = g.integers(16, size=n) * np.pi / 8
        x = np.stack((np.cos(angle), np.sin(angle)), axis=1).astype(np.float16)
    init = x[: 1 + int(share * (n - 1))].astype(np.float64)
    if start == "one row":
        init = np.repeat(init[:1], len(init), axis=0)
    elif start == "opposite":
        init = np.concatenate(
            (init[:1], -np.repeat(unit(init.mean(axis=0)[None] + 1e-9), 3, axis=0))
        )[:n]
    elif start == "near":
        init = unit(init[:1] + 1e-4 * g.standard_normal(init.shape))
    identity = g.permutation(n).astype(np.uint64)
    with pytest.MonkeyPatch.context() as patch:
        use(patch, kind)
        check(by_lloyd(x, init, iterations, identity), by_definition(x, init, iterations, identity))


def test_rows_of_almost_length_one_and_of_float32():
    g = np.random.default_rng(0)
    x = structureless(g, 600, 16) * g.uniform(0.991, 1.009, (600, 1))
    x = (np.round(x * 2**26) / 2**26).astype(np.float32)
    identity = np.arange(600, dtype=np.uint64)
    check(by_lloyd(x, x[:20], 30, identity), by_definition(x, x[:20].astype(float), 30, identity))


@pytest.mark.parametrize("kind", TYPES)
def test_settled_rows_are_not_looked_at_again(kind, monkeypatch):
    use(monkeypatch, kind)
    looked = []
    plain = lloyd._Share._queries

    def counted(self, part, *, check):
        queries = plain(self, part, check=check)
        looked.append(len(queries))
        return queries

    monkeypatch.setattr(lloyd._Share, "_queries", counted)
    x = pool(clustered, 2000, 64)
    found = Lloyd(Rows(x, "cpu"), unit_centroids(x[:12]))
    rows = []
    for _ in range(30):
        looked.clear()
        found.look()
        rows.append(sum(looked))
        means = found.means()
        if np.array_equal(means, found.centroids):
            break
        found.move(means)
    assert rows[0] == 2000 and sum(rows[1:]) < 0.6 * 2000 * len(rows[1:]) and rows[-1] < 400
    found.look()  # nothing moved since
    assert sum(looked) == rows[-1]


@pytest.mark.parametrize("kind", TYPES)
def test_any_moves_of_centroids_are_followed(kind, monkeypatch):
    """One alone that goes far, some that go anywhere, all a little."""
    use(monkeypatch, kind)
    x = pool(clustered, 300, 16)
    g = np.random.default_rng(0)
    found = Lloyd(Rows(x, "cpu"), unit_centroids(x[:10]))
    for turn in range(60):
        found.look(add=turn % 2 == 0)
        centroids = found.centroids.astype(np.float64)
        assert np.array_equal(found.cluster, lloyd_reference.assign(x.astype(float), centroids)[0])
        some = g.permutation(10)[: (1, 3, 10)[turn % 3]]
        size = (10.0, 0.3, 1e-3, 1e-6)[turn % 4]
        centroids[some] = unit(centroids[some] + size * g.standard_normal((len(some), 16)))
        found.move(unit_centroids(centroids))


def test_a_moved_centroid_is_seen_by_rows_that_tied():
    """The lead of a row in the middle is 0: it stays while nothing moves, and not when it does."""
    x = np.array([[0.6, 0.8], [0.8, 0.6], [0.7071, 0.7071]], np.float32)
    found = Lloyd(Rows(x, "cpu"), unit_centroids(x[:2]))
    found.look()
    assert found.cluster.tolist() == [0, 1, 0]
    found.move(unit_centroids(np.array([[0.6 - 1e-6, 0.8], [0.8, 0.6]])))
    found.look()
    assert found.cluster.tolist() == [0, 1, 1]
    found.move(unit_centroids(np.array([[0.6 - 1e-6, 0.8], [0.8 + 1e-5, 0.6]])))
    found.look()
    assert found.cluster.tolist() == [0, 1, 0]


@pytest.mark.parametrize("make", POOLS)
def test_fit_and_assign_are_the_same_for_every_type_thread_and_block(make, monkeypatch):
    x = pool(make, 1200, 40)
    x[1100:] = x[:100]
    results = []
    for kind in TYPES:
        use(monkeypatch, kind)
        for threads, block_bytes in ((1, None), (2, None), (2, 60_000)):
            torch.set_num_threads(threads)
            found = fit(x, 50, iterations=6, device="cpu", block_bytes=block_bytes)
            assert found.products == kind
            again = assign(x, found.centroids, device="cpu", block_bytes=block_bytes)
            check(again, (found.cluster, found.cosine_distance))
            results.append((found.centroids, found.objective, found.iterations, *again))
    for result in results[1:]:
        check(result, results[0])
    cluster, distance = lloyd_reference.assign(
        x.astype(np.float64), results[0][0].astype(np.float64)
    )
    check(results[0][3:], (cluster, distance.astype(np.float32)))


def test_rows_read_one_at_a_time(monkeypatch):
    x = pool(clip_like, 60, 8)
    expected = fit(x, 7, device="cpu")
    for kind in TYPES:
        use(monkeypatch, kind)
        found = fit(x, 7, device="cpu", block_bytes=1)
        check((found.centroids, found.cluster), (expected.centroids, expected.cluster))


def test_an_outlier_dimension_does_not_need_exact_products(monkeypatch):
    """Rows as of CLIP in 8 bits: few are near a tie, and the result is exact."""
    use(monkeypatch, "int8")
    x = pool(clip_like, 3000, 512)
    centroids = unit_centroids(x[:100])
    settled, compared = [], []
    plain_pairs, plain_near = search.Exact.pairs, search.Exact.near_best

    def pairs(self, row, column):
        settled.append(len(np.unique(row)))
        return plain_pairs(self, row, column)

    def near_best(self, row, column):
        compared.append(len(row))
        return plain_near(self, row, column)

    monkeypatch.setattr(search.Exact, "pairs", pairs)
    monkeypatch.setattr(search.Exact, "near_best", near_best)
    monkeypatch.setattr(search.Exact, "dense", None)  # not needed at all
    got = assign(x, centroids, device="cpu")
    assert sum(settled) < 0.02 * len(x) and sum(compared) < 0.05 * len(x) * len(centroids)
    cluster, distance = lloyd_reference.assign(x.astype(np.float64), centroids.astype(np.float64))
    check(got, (cluster, distance.astype(np.float32)))


@pytest.mark.parametrize("d", [1, 2, 3, 512, 4096])
def test_centroids_are_unit_but_for_rounding_and_stay(d):
    """A row on the grid of length 1 + 9e-6 is no centroid yet: products take lengths for 1."""
    g = np.random.default_rng(0)
    x = np.concatenate((structureless(g, 50, d), np.full((1, d), d**-0.5)))
    x = np.round(x * (1 + 9e-6) * 2**24) / 2**24
    centroids = unit_centroids(x).astype(np.float64)
    assert abs(np.linalg.norm(centroids, axis=1) - 1).max() <= 1.001 * 2**-25 * d**0.5
    assert np.array_equal(centroids, unit_centroids(centroids))
    assert np.array_equal(centroids, lloyd_reference.on_grid(x))


def test_rows_that_are_centroids_are_their_own(monkeypatch):
    x = pool(copies, 400, 16)
    x = np.unique(x, axis=0)
    for kind in TYPES:
        use(monkeypatch, kind)
        cluster, distance = assign(x, x, device="cpu")
        assert np.array_equal(cluster, np.arange(len(x))) and (distance == 0).all()


def starting(x, k, keys, *, threads=1, seed=0):
    torch.set_num_threads(threads)
    return seeding.start(Rows(x, "cpu"), k, seed, keys)


@pytest.mark.parametrize(("n", "d", "k"), [(500, 16, 20), (8500, 8, 6), (1500, 5, 1100)])
def test_seeds_are_the_same_for_every_type_order_and_thread(n, d, k, monkeypatch):
    """All rows are the sample; a sample of many rows; several draws a round."""
    x = pool(clustered, n, d)
    keys = row_keys(map(str, range(n)), 0)
    order = np.random.default_rng(1).permutation(n)
    use(monkeypatch, "float32")
    expected = starting(x, k, keys)
    assert np.array_equal(expected, starting(x[order], k, keys[order], threads=2))
    use(monkeypatch, "int8")
    assert np.array_equal(expected, starting(x, k, keys, threads=2))
    assert np.array_equal(expected, starting(x[order], k, keys[order]))
    assert not np.array_equal(expected, starting(x, k, keys, seed=1))


@pytest.mark.parametrize(("n", "k"), [(300, 300), (1500, 1100), (1200, 1200)])
def test_seeds_are_distinct_rows(n, k):
    x = pool(structureless, n, 4, dtype=np.float32)
    rows = Rows(x, "cpu")
    seeds = seeding.plus_plus(rows, np.arange(n), k, 0)
    assert seeds.shape == (k, 4) and len(np.unique(seeds, axis=0)) == k
    of_rows = {row.tobytes() for row in unit_centroids(rows.read(slice(0, n)).numpy())}
    assert all(seed.tobytes() in of_rows for seed in seeds)


@pytest.mark.parametrize(("distinct", "k"), [(5, 30), (700, 1100), (1150, 1100)])
def test_seeds_among_copies(distinct, k):
    """Copies of a row may be drawn; they stay empty, and are filled while rows are left."""
    x = np.tile(pool(structureless, distinct, 6), (3 if k > 1000 else 20, 1))
    assert len(np.unique(x, axis=0)) == distinct
    seeds = seeding.plus_plus(Rows(x, "cpu"), np.arange(len(x)), k, 0)
    assert len(np.unique(seeds, axis=0)) <= min(distinct, k)
    found = fit(x, k, iterations=2, device="cpu")
    assert found.empty_clusters == max(0, k - distinct)
    assert len(np.unique(found.centroids, axis=0)) == min(distinct, k)


def test_far_rows_are_drawn_before_near_ones():
    """Two tight groups and one row: three seeds are one of each."""
    g = np.random.default_rng(0)
    x = np.repeat(np.eye(3), [500, 499, 1], axis=0) + 1e-3 * g.standard_normal((1000, 3))
    x = unit(x).astype(np.float32)
    for seed in range(5):
        seeds = seeding.plus_plus(Rows(x, "cpu"), np.arange(1000), 3, seed)
        assert sorted(seeds.argmax(axis=1)) == [0, 1, 2]
