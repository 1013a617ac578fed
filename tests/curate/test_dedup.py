import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curate import dedup
from curate.dedup import MODES, duplicate_evidence, find_duplicates, threshold_duplicates
from curate.search import Exact
from tests.references import dedup_reference


@pytest.fixture(autouse=True, scope="module")
def as_large_clusters():
    """Small ones are worked on in a way of their own."""
    before, dedup._FEW = dedup._FEW, 0
    yield
    dedup._FEW = before


def unit(a):
    return a / np.linalg.norm(a, axis=1, keepdims=True)


def planted(seed, n, d=8, clusters=3, dtype=np.float16):
    """Rows with exact copies, near copies and chains; some rows without a cluster."""
    g = np.random.default_rng(seed)
    base = unit(g.standard_normal((max(1, n // 3), d)))
    noise = g.choice([0.0, 0.0, 0.02, 0.1], size=(n, 1)) * g.standard_normal((n, d))
    source = g.integers(len(base), size=n)
    x = unit(base[source] + noise).astype(dtype)
    cluster = np.where(g.random(n) < 0.1, -1, source % clusters).astype(np.int32)
    distance = (np.round(g.random(n) * 8) / 8).astype(np.float32)  # many ties
    keys = g.permutation(n).astype(np.uint64)
    return x, cluster, distance, keys


def circle():
    angles = np.deg2rad(10.0 * np.arange(5))
    x = np.stack((np.cos(angles), np.sin(angles)), axis=1).astype(np.float32)
    return x, np.zeros(5, np.int32), np.linspace(0.5, 0.1, 5, dtype=np.float32)


def check(got, expected):
    assert np.array_equal(got[0], expected[0])
    assert np.array_equal(got[1].astype(np.float64), expected[1], equal_nan=True)
    assert got[0].dtype == np.int64 and got[1].dtype == np.float32


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(0, 90),
    epsilon=st.sampled_from([0.0, 1e-6, 0.003, 0.05, 0.3, 1.5]),
    block_bytes=st.sampled_from([None, 3000]),
    dtype=st.sampled_from([np.float16, np.float32]),
    complete=st.booleans(),
    few=st.sampled_from([0, 20, 256]),
)
def test_equals_the_definition(mode, seed, n, epsilon, block_bytes, dtype, complete, few):
    x, cluster, distance, keys = planted(seed, n, dtype=dtype)
    expected = dedup_reference.find_duplicates(x, cluster, distance, epsilon, mode, keys=keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "_FEW", few)
        got = find_duplicates(
            x,
            cluster,
            distance,
            epsilon=epsilon,
            mode=mode,
            keys=keys,
            least_similarity=-1 if complete else None,
            device="cpu",
            block_bytes=block_bytes,
        )
    if mode == "max-earlier" and not complete:
        with np.errstate(invalid="ignore"):
            above = expected[1] >= min(0.8, 1 - epsilon)
        expected = (expected[0], np.where(above, expected[1], np.nan))
    if dtype == np.float16:
        check(got, expected)
    elif complete:  # the reference does not round rows to the grid
        np.testing.assert_allclose(got[1], expected[1], atol=2**-22)


@pytest.mark.parametrize("mode", MODES)
def test_equals_the_definition_on_300_rows(mode):
    x, cluster, distance, keys = planted(1, 300, d=64, clusters=1)
    args = (x, cluster, distance)
    options = {"least_similarity": -1, "device": "cpu", "block_bytes": 40_000}
    check(
        find_duplicates(*args, mode=mode, keys=keys, **options),
        dedup_reference.find_duplicates(*args, 0.05, mode, keys=keys),
    )


@pytest.mark.parametrize(
    ("mode", "removed"), [("max-earlier", 4), ("greedy", 2), ("components", 4)]
)
def test_five_points_ten_degrees_apart(mode, removed):
    epsilon = 1 - np.cos(np.deg2rad(11))
    duplicate_of, _ = find_duplicates(*circle(), epsilon=epsilon, mode=mode, device="cpu")
    assert (duplicate_of >= 0).sum() == removed
    expected = {
        "max-earlier": [-1, 0, 1, 2, 3],
        "greedy": [-1, 0, -1, 2, -1],
        "components": [-1, 0, 0, 0, 0],
    }
    assert duplicate_of.tolist() == expected[mode]


@pytest.mark.parametrize("mode", MODES)
def test_result_does_not_depend_on_order_blocks_or_threads(mode):
    x, cluster, distance, keys = planted(5, 200, d=32, clusters=2, dtype=np.float32)
    options = {"mode": mode, "device": "cpu", "epsilon": 0.02}
    expected = find_duplicates(x, cluster, distance, keys=keys, **options)
    for block_bytes in (10_000, 1 << 30):
        check(
            find_duplicates(x, cluster, distance, keys=keys, block_bytes=block_bytes, **options),
            expected,
        )
    order = np.random.default_rng(0).permutation(len(x))
    duplicate_of, evidence = find_duplicates(
        x[order], cluster[order], distance[order], keys=keys[order], **options
    )
    assert np.array_equal(np.where(duplicate_of < 0, -1, order[duplicate_of]), expected[0][order])
    assert np.array_equal(evidence, expected[1][order], equal_nan=True)
    torch.set_num_threads(2)
    check(find_duplicates(x, cluster, distance, keys=keys, **options), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.gpu
def test_gpu_gives_the_cpu_result(mode):
    x, cluster, distance, keys = planted(5, 3000, d=64, clusters=2)
    cpu = find_duplicates(x, cluster, distance, keys=keys, mode=mode, device="cpu")
    check(find_duplicates(x, cluster, distance, keys=keys, mode=mode, device="cuda"), cpu)


@pytest.mark.parametrize("mode", ["max-earlier", "connected-components"])
def test_one_pass_serves_every_epsilon(mode):
    x, cluster, distance, keys = planted(3, 200)
    nearest, evidence = duplicate_evidence(
        x, cluster, distance, mode=mode, keys=keys, least_similarity=-1, device="cpu"
    )
    removed = []
    for epsilon in (0.0, 0.0005, 0.01, 0.05, 0.2, 0.7):
        got = threshold_duplicates(nearest, evidence, epsilon=epsilon, mode=mode)
        expected = dedup_reference.find_duplicates(x, cluster, distance, epsilon, mode, keys=keys)
        assert np.array_equal(got, expected[0])
        assert np.array_equal(got >= 0, evidence > 1 - epsilon)
        removed.append((got >= 0).sum())
    assert removed == sorted(removed) and removed[0] == 0 < removed[-1]


def test_greedy_leaves_no_similar_pair_and_no_row_without_reason():
    x, cluster, distance, _ = planted(2, 250, clusters=1)
    duplicate_of, evidence = find_duplicates(
        x, cluster, distance, mode="greedy", epsilon=0.05, device="cpu"
    )
    kept = np.flatnonzero((duplicate_of < 0) & (cluster >= 0))
    s = dedup_reference.similarities(x[kept])
    np.fill_diagonal(s, 0)
    assert s.max() <= 0.95
    removed = np.flatnonzero(duplicate_of >= 0)
    assert np.isin(duplicate_of[removed], kept).all() and (evidence[removed] > 0.95).all()


def test_components_keep_one_row_each():
    x, cluster, distance, _ = planted(4, 250)
    duplicate_of, _ = find_duplicates(
        x, cluster, distance, mode="connected-components", device="cpu"
    )
    removed = np.flatnonzero(duplicate_of >= 0)
    assert (duplicate_of[duplicate_of[removed]] == -1).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [1, 2, 700])
def test_identical_rows(mode, n):
    x = np.repeat(unit(np.random.default_rng(0).standard_normal((1, 48))), n, axis=0)
    cluster, distance = np.zeros(n, np.int32), np.zeros(n, np.float32)
    for dtype in (np.float16, np.float32):
        options = {"mode": mode, "device": "cpu", "block_bytes": 200_000}
        duplicate_of, evidence = find_duplicates(
            x.astype(dtype), cluster, distance, epsilon=1e-6, **options
        )
        assert duplicate_of.tolist() == [-1] + [0] * (n - 1)
        assert np.isnan(evidence[0]) and (evidence[1:] == 1).all()
        strict, _ = find_duplicates(x.astype(dtype), cluster, distance, epsilon=0, **options)
        assert (strict == -1).all()  # no similarity is above 1


@pytest.mark.parametrize("mode", MODES)
def test_which_row_stays(mode):
    x = np.repeat(unit(np.random.default_rng(0).standard_normal((1, 8))), 4, axis=0)
    x = x.astype(np.float16)
    cluster, distance = np.zeros(4, np.int32), np.array([0.1, 0.4, 0.2, 0.3], np.float32)

    def stays(**options):
        duplicate_of, _ = find_duplicates(x, cluster, distance, mode=mode, device="cpu", **options)
        assert set(duplicate_of[duplicate_of >= 0]) == set(np.flatnonzero(duplicate_of < 0))
        return int(np.flatnonzero(duplicate_of < 0)[0])

    assert stays() == 1  # hardest
    assert stays(priority=-distance.astype(np.float64)) == 0  # easiest
    assert stays(priority=np.array([0.2, 0.1, 0.9, np.nan])) == 2  # best score
    assert stays(priority=np.array([-np.inf, np.nan, np.nan, np.nan])) == 0  # NaN is last
    flat = {"priority": np.zeros(4)}
    assert stays(**flat) == 0
    assert stays(**flat, keys=np.array([3, 2, 1, 0], np.uint64)) == 3


def test_rows_without_a_cluster_are_not_read():
    x = np.eye(3, dtype=np.float16)[[0, 0, 0, 1]]
    x[1] = np.nan
    cluster = np.array([0, -1, 0, 1], np.int32)
    distance = np.array([0.1, np.nan, 0.0, 0.0], np.float32)
    duplicate_of, evidence = find_duplicates(x, cluster, distance, device="cpu")
    assert duplicate_of.tolist() == [-1, -1, 0, -1]
    assert np.array_equal(evidence, [np.nan, np.nan, 1, np.nan], equal_nan=True)
    with pytest.raises(ValueError, match="row 1 of x holds NaN"):
        find_duplicates(x, np.zeros(4, np.int32), np.zeros(4, np.float32), device="cpu")


def test_lengths_do_not_matter_within_the_tolerance():
    x = np.eye(2, dtype=np.float32)[[0, 0, 1]] * np.array([[1.008], [0.992], [1.0]], np.float32)
    zero = np.zeros(3)
    args = (x, zero.astype(np.int32), zero.astype(np.float32))
    _, evidence = find_duplicates(*args, least_similarity=-1, device="cpu")
    assert np.array_equal(evidence, [np.nan, 1, 0], equal_nan=True)
    _, evidence = find_duplicates(*args, device="cpu")
    assert np.array_equal(evidence, [np.nan, 1, np.nan], equal_nan=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": -0.1}, "must lie in 0 ... 2"),
        ({"epsilon": np.nan}, "must lie in 0 ... 2"),
        ({"mode": "triu"}, "use one of max-earlier"),
        ({"least_similarity": 0.96}, "must not be above that"),
        ({"cluster": np.zeros(4, np.int32)}, "both"),
        ({"cluster": np.zeros(5)}, "integers"),
        ({"cosine_distance": np.full(5, np.nan, np.float32)}, "row 0 is nan"),
        ({"priority": np.zeros(4)}, "priority has shape"),
        ({"keys": np.zeros(5)}, "uint64"),
        ({"x": np.eye(4, 2, dtype=np.float32)}, "x has 4 rows"),
    ],
)
def test_wrong_requests(change, message):
    x, cluster, distance = circle()
    arguments = {"x": x, "cluster": cluster, "cosine_distance": distance, "device": "cpu"} | change
    with pytest.raises(ValueError, match=message):
        find_duplicates(**arguments)


def test_greedy_has_no_evidence_for_every_epsilon():
    with pytest.raises(ValueError, match="find_duplicates"):
        duplicate_evidence(*circle(), mode="greedy", device="cpu")


class Lazy:
    """What the pipeline passes: shape and rows, nothing else."""

    def __init__(self, array):
        self.array, self.shape, self.most = array, array.shape, 0

    def __getitem__(self, rows):
        block = self.array[rows]
        self.most = max(self.most, len(block))
        return block


@pytest.mark.parametrize("mode", MODES)
def test_large_cluster_is_read_in_tiles(mode):
    x, cluster, distance, _ = planted(0, 300, d=16, clusters=1)
    lazy = Lazy(x)
    options = {"mode": mode, "device": "cpu"}
    got = find_duplicates(lazy, cluster, distance, block_bytes=20_000, **options)
    assert 1 < lazy.most <= 20_000 // (8 * 16)
    check(got, find_duplicates(torch.from_numpy(x), cluster, distance, **options))


@pytest.mark.parametrize("mode", MODES)
def test_near_ties_in_high_dimension_are_decided_exactly(mode):
    g = np.random.default_rng(0)
    base = unit(g.standard_normal((20, 512)))
    # Copies at about the same distance of each other: float32 products cannot order them.
    x = unit(np.repeat(base, 12, axis=0) + 1e-3 * unit(g.standard_normal((240, 512))))
    x = np.round(x * 2**24).astype(np.float32) / np.float32(2**24)
    cluster, distance = np.zeros(240, np.int32), np.zeros(240, np.float32)
    check(
        find_duplicates(
            x, cluster, distance, epsilon=1e-6, mode=mode, least_similarity=-1, device="cpu"
        ),
        dedup_reference.find_duplicates(x, cluster, distance, 1e-6, mode),
    )


def test_many_copies_of_one_row_cost_no_exact_products(monkeypatch):
    x = planted(0, 40, d=16, clusters=1)[0]
    x = np.concatenate([x, np.repeat(x[3:4], 3000, axis=0)])[
        np.random.default_rng(0).permutation(3040)
    ]
    cluster, distance = np.zeros(3040, np.int32), np.zeros(3040, np.float32)
    read = []
    monkeypatch.setattr(Exact, "dense", lambda *args: read.append(args))
    pairs = Exact.pairs
    monkeypatch.setattr(Exact, "pairs", lambda *a: read.append(len(a[1])) or pairs(*a))
    duplicate_of, evidence = find_duplicates(x, cluster, distance, device="cpu")
    copy = (x == x[(duplicate_of >= 0).argmax()]).all(axis=1)
    assert (evidence[np.flatnonzero(copy)[1:]] == 1).all()
    assert len(set(duplicate_of[np.flatnonzero(copy)[1:]])) == 1
    assert sum(read) < 200
