import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from curate import codes as code_module
from curate import kmeans, lloyd
from curate import nearest as nearest_rows
from curate.codes import CodedColumns, Columns, Frame, encoded, exact_int_product
from curate.dedup import MODES, find_duplicates
from curate.search import Exact, nearest
from curate.unit_rows import DISTANCE_GRID, ROW_GRID, unit_centroids
from tests.references import dedup_reference

TYPES = ("int8", "float32")


def use(monkeypatch, kind):
    monkeypatch.setattr("curate.dedup._FEW", 0)
    for module in (code_module, lloyd, nearest_rows, kmeans):
        monkeypatch.setattr(module, "product_type", lambda device: kind)


def unit(a):
    return a / np.linalg.norm(a, axis=1, keepdims=True)


def float32(a):
    """Rows on the 2^-26 grid, as they are read."""
    return (np.round(a * ROW_GRID) / ROW_GRID).astype(np.float32)


def signs(g, *shape):
    return g.choice([-1.0, 1.0], size=shape)


def random(g, n, d):
    x = unit(g.standard_normal((n, d)))
    return x, x


def clustered(g, n, d):
    x = unit(g.standard_normal((1, d)) + 0.05 * g.standard_normal((n, d)))
    return x, x


def constant(g, n, d):
    x = signs(g, n, 1) * np.ones((n, d)) / d**0.5
    return x, x


def one_hot(g, n, d):
    x = np.eye(d)[g.integers(d, size=n)] * signs(g, n, 1)
    return x, x


def sparse(g, n, d):
    x = g.standard_normal((n, d)) * (g.random((n, d)) < 3 / d)
    x[np.arange(n), g.integers(d, size=n)] = 1.0
    return unit(x), unit(x)


def equal(g, n, d):
    x = np.repeat(unit(g.standard_normal((1, d))), n, axis=0)
    return x, x


def half_steps(g, n, d):
    sample = unit(g.standard_normal((n, d)))
    frame = Frame.of(torch.from_numpy(float32(sample)))
    most = 0.5 * min(1.0, d**-0.5) / frame.step
    off = frame.step * (g.integers(-int(most), int(most) + 1, size=(n, d)) + 0.5)
    return frame.centre.numpy() + off, sample


def far(g, n, d):
    """Around one point, opposite to it, anywhere: far outside the frame."""
    centre = signs(g, 1, d) / d**0.5
    sample = unit(centre + 1e-4 * g.standard_normal((n, d)) / d**0.5)
    anywhere = unit(g.standard_normal((n, d)))
    return np.concatenate((sample[: n // 3], -sample[: n // 3], anywhere))[:n], sample


def flat(g, n, d):
    """Every number a little outside the frame."""
    sample = 0.5 * unit(g.standard_normal((n, d)))
    frame = Frame.of(torch.from_numpy(float32(sample)))
    rows = (frame.step * (127 + g.random((n, 1)))) * np.repeat(signs(g, 1, d), n, axis=0)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1), sample


FAMILIES = (random, clustered, constant, one_hot, sparse, equal, half_steps, far, flat)


def problem(family, n, d, seed):
    """Rows, and the sample that the frame is made of."""
    g = np.random.default_rng(seed)
    rows, sample = family(g, n, d)
    return torch.from_numpy(float32(rows)), torch.from_numpy(float32(sample))


def coded(x, y, frame, *, own):
    """The columns in a frame of their own (k-means), or in that of the rows (duplicates)."""
    along = (y @ frame.centre).double()
    columns = encoded(y, frame) if own else CodedColumns(frame.encode(y), along, frame, frame)
    codes = frame.encode(x)
    return columns, columns.coded_queries(codes), columns.row_numbers(codes, x @ frame.centre)


def excess(x, y, frame, *, own):
    """By how much more than the slack each product is off, in products."""
    columns, queries, numbers = coded(x, y, frame, own=own)
    product = columns.products(queries, slice(0, len(y))).double()
    steps = torch.from_numpy(columns.slack).double() / 2
    similarity = (product - steps) * columns.unit + numbers[:, None]
    allowed = torch.from_numpy(queries.slack).double()[:, None] / 2 + steps
    return (similarity - x.double() @ y.double().T).abs() / columns.unit - allowed


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("d", [1, 3, 512, 4096])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_product_is_off_by_more_than_its_slack(family, d, own):
    for seed in range(2):
        x, sample = problem(family, 40, d, seed)
        frame = Frame.of(sample)
        assert excess(x, x.flip(0), frame, own=own).max() <= 0
        other, _ = problem(random, 20, d, seed + 100)
        assert excess(x, other, frame, own=own).max() <= 0
        assert excess(other, x, frame, own=own).max() <= 0


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    d=st.integers(1, 200),
    family=st.sampled_from(FAMILIES),
    own=st.booleans(),
    narrow=st.floats(1e-3, 1.5),
)
def test_the_slack_holds_for_any_frame(seed, d, family, own, narrow):
    x, sample = problem(family, 20, d, seed)
    frame = Frame.of(sample)
    frame = Frame(frame.centre, code_module._step(narrow * 127 * frame.step), frame.dither)
    assert excess(x, x.flip(0), frame, own=own).max() <= 0


def test_nothing_is_clipped_but_what_is_cut_off():
    d = 512
    frame = Frame(torch.zeros(d), 1e-3, code_module._dither("rows", torch.zeros(d)))
    x = torch.zeros((4, d))
    x[1, 0], x[1, 1], x[2], x[3, frame.dither.argmin()] = 0.2, -0.130, 0.127, 0.1274
    codes = frame.encode(x)
    np.testing.assert_allclose(codes.cut, [0, 0.073 + 0.003, 0, 0.0004], atol=1e-5)
    np.testing.assert_allclose(codes.length, torch.linalg.vector_norm(x, dim=1))
    assert codes.values.dtype == torch.int8 and codes.values.abs().max() <= 127
    joined = codes.joined([codes[2:], codes[torch.tensor([2, 0])]])
    assert len(joined) == 4 and torch.equal(joined.values, codes.values[[2, 3, 2, 0]])
    assert torch.equal(joined.cut, codes.cut[[2, 3, 2, 0]])


@pytest.mark.parametrize("value", [0.0, 0.3, 0.5, 12.25, 126.5, 126.99, 127.0, 127.2, 130.0])
def test_errors_of_one_value_are_uniform(value):
    """Whatever the value, also at the frame's border: over the dither of 4096 dimensions."""
    d, step = 4096, 1e-3
    frame = Frame(torch.zeros(d), step, code_module._dither("rows", torch.zeros(d)))
    codes = frame.encode(torch.full((1, d), value * step))
    inside = min(value, 127.0)  # the rest is cut off
    error = inside - (codes.values[0].double() - frame.dither.double()).numpy()
    assert kstest(error, "uniform", args=(-0.5, 1.0)).pvalue > 0.01
    assert np.abs(error).max() <= 0.5 + 1e-4
    assert float(codes.cut) == pytest.approx(d * max(0.0, value - 127) * step, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("family", [random, clustered, half_steps])
def test_errors_of_many_rows_are_uniform_and_their_products_as_wide_as_stated(family):
    d = 512
    x, sample = problem(family, 200, d, 3)
    frame = Frame.of(sample)
    codes = frame.encode(x).values.double() - frame.dither.double()
    error = (x - frame.centre).double() / frame.step - codes
    v, _ = problem(random, 300, d, 4)
    along = (error @ v.double().T).numpy() * 12**0.5  # v has length 1
    # Rows share their dither, but each dimension has its own: a row's products are independent.
    assert all(kstest(row, "uniform", args=(-0.5, 1.0)).pvalue > 1e-5 for row in error.numpy())
    columns, queries, numbers = coded(x, v, frame, own=True)
    product = columns.products(queries, slice(0, len(v))) - torch.from_numpy(columns.slack // 2)
    off = product * columns.unit + numbers[:, None] - x.double() @ v.double().T
    allowed = (queries.slack[:, None] + columns.slack) * (columns.unit / 2)
    assert (allowed > 9 * off.square().mean().sqrt().item()).all()
    assert along.std() == pytest.approx(1, abs=0.1) and np.abs(along).max() < 6.5


def test_a_frame_holds_most_rows_and_is_not_stretched_by_outliers():
    g = np.random.default_rng(0)
    x = unit(g.standard_normal((1000, 64)))
    usual = Frame.of(torch.from_numpy(float32(x)))
    assert (usual.encode(torch.from_numpy(float32(x))).cut == 0).all()
    x[:20] = 0
    x[:20, 3] = 1
    stretched = Frame.of(torch.from_numpy(float32(x)))
    assert stretched.step < 1.3 * usual.step
    codes = stretched.encode(torch.from_numpy(float32(x)))
    assert (codes.cut[:20] > 0.1).all() and (codes.cut[20:] == 0).float().mean() > 0.95
    columns = torch.from_numpy(float32(5 * x))
    own = stretched.for_columns(columns)
    assert (own.encode(columns).cut == 0).all()
    assert not torch.equal(own.dither, stretched.dither)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 2), (7, 1, 5), (3, 513, 17), (33, 65, 129)])
def test_int_products_are_exact_on_odd_shapes(shape):
    m, d, k = shape
    g = np.random.default_rng(0)
    for low, high in ((-127, 128), (127, 128), (-127, -126)):
        a, b = g.integers(low, high, (m, d)), g.integers(-127, 128, (k, d))
        b[0] = 127
        product = torch._int_mm(torch.from_numpy(a).to(torch.int8), torch.from_numpy(b).char().T)
        assert product.dtype == torch.int32 and np.array_equal(product.numpy(), a @ b.T)


@pytest.mark.parametrize("d", [1, 1040, 1041, 4097, 33_282, 33_283])
@pytest.mark.parametrize("kind", TYPES)
def test_exact_int_products_are_the_same_for_every_type(kind, d, monkeypatch):
    use(monkeypatch, kind)
    g = np.random.default_rng(0)
    a, b = (g.integers(low, 128, (9, d)) for low in (-127, 125))
    a[0], b[0], a[1] = 127, 127, -127
    got = exact_int_product(torch.from_numpy(a).char(), torch.from_numpy(b).char())
    assert np.array_equal(got.numpy(), a @ b.T)
    far = (got.diagonal()[0] * 4).item()
    assert abs(far) <= torch.iinfo(got.dtype).max


def test_shapes_are_padded_for_cuda():
    for m, d, k in ((1, 1, 1), (5, 13, 3), (40, 64, 8)):
        a, b = (torch.empty((n, d), dtype=torch.int8, device="meta") for n in (m, k))
        assert code_module._int_product(a, b).shape == (m, k)


def test_product_type_follows_the_processor(monkeypatch):
    decide = code_module.product_type.__wrapped__
    for flag in ("_is_vnni_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, flag, lambda: False, raising=False)
    assert decide("cpu") == "float32"
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    for enabled, expected in ((True, "int8"), (False, "float32")):
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
        assert decide("cpu") == expected
    for capability, expected in (((7, 5), "float32"), ((8, 0), "int8"), ((9, 0), "int8")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert decide("cuda") == expected
    monkeypatch.delattr(torch, "_int_mm")
    assert decide("cpu") == decide("cuda") == "float32"


def similarities(x, c, *, rounded):
    x, c = x.double().numpy(), c.double().numpy()
    dots = x @ c.T
    s = dots / (np.sqrt((x * x).sum(axis=1))[:, None] * np.sqrt((c * c).sum(axis=1)))
    return np.clip(np.round(s * DISTANCE_GRID) / DISTANCE_GRID, -1, 1) if rounded else s


def found_by(x, c, sample, kind, tile, *, rounded, mask=None, least=None):
    """`nearest` as k-means calls it, and, `rounded`, as the search for duplicates does."""
    exact = Exact(
        lambda rows: x[torch.from_numpy(rows)],
        lambda columns: c[torch.from_numpy(columns)],
        7,
        lambda columns: torch.linalg.vector_norm(c[torch.from_numpy(columns)], dim=1),
        rounded=rounded,
    )
    if kind == "float32":
        columns = Columns(len(c), lambda start, stop: c[start:stop])
        queries = columns.queries(x)
    else:
        columns, queries, numbers = coded(x, c, Frame.of(sample), own=not rounded)
        if least is not None:
            floor = columns.floor(queries, numbers, least)
            queries = code_module.Queries(queries.values, queries.slack, floor)
    hidden = None if mask is None else (lambda rows, part: as_asked(mask[rows, part]))
    return nearest(columns, queries, exact, tile, hidden)


def as_asked(mask):
    """A mask of all or none, now and then as one truth value."""
    return bool(mask.flat[0]) if (mask == mask.flat[0]).all() and mask.size % 2 else mask


def ties(g, n, d):
    """Near ties far below what fast products can tell, exact copies, zeros of both signs."""
    x = np.repeat(unit(g.standard_normal((1 + n // 25, d))), 25, axis=0)[:n]
    x = unit(x + g.choice([0, 1e-7, 1e-6, 1e-4], (n, 1)) * g.standard_normal((n, d)))
    x[g.random(n) < 0.2] *= -1
    if d > 1:
        x[:, 0] = np.where(g.random(n) < 0.5, -0.0, 0.0)
        x[(x == 0).all(axis=1), 1] = 1.0
    return x, x


def check(found, s, mask, least=None):
    seen = np.where(mask, -np.inf, s)
    best = np.where(np.isinf(seen).all(axis=1), -1, seen.argmax(axis=1))
    asked = np.ones(len(s), bool) if least is None else seen.max(axis=1) >= least
    assert np.array_equal(found.column[asked], best[asked])
    known = np.flatnonzero(~np.isnan(found.similarity))
    assert np.array_equal(found.similarity[known], s[known, found.column[known]])
    top = np.sort(np.concatenate((np.full((len(s), 1), -1e9), seen), axis=1), axis=1)
    there = (found.column >= 0) & np.isfinite(top[:, -2])
    assert (found.gap[there] <= top[there, -1] - top[there, -2]).all() and (found.gap >= 0).all()
    if least is not None:
        others = np.flatnonzero(~asked & (found.column >= 0))
        assert not mask[others, found.column[others]].any()


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("kind", TYPES)
@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    d=st.sampled_from([1, 2, 3, 16, 100]),
    n=st.integers(1, 60),
    k=st.integers(1, 60),
    family=st.sampled_from((ties, ties, *FAMILIES)),
    tile=st.sampled_from([(1, 1), (3, 2), (7, 16), (100, 59), (1000, 1000)]),
    hide=st.sampled_from([None, 0.0, 0.5, 0.97, 1.0]),
    least=st.sampled_from([None, None, 0.9, 0.0, -0.99]),
)
def test_nearest_equals_brute_force(kind, rounded, seed, d, n, k, family, tile, hide, least):
    both, sample = problem(family, n + k, d, seed)
    both[torch.linalg.vector_norm(both, dim=1) < 1e-3] = d**-0.5
    both = unit(both.double().numpy())
    x = torch.from_numpy(float32(both[:n]))
    c = torch.from_numpy(float32(both[n:]) if rounded else unit_centroids(both[n:]))
    g = np.random.default_rng(seed)
    mask = np.zeros((n, k), bool) if hide is None else g.random((n, k)) < hide
    found = found_by(
        *(x, c, sample, kind, tile), rounded=rounded, mask=None if hide is None else mask,
        least=least if kind == "int8" else None,
    )  # fmt: skip
    check(found, similarities(x, c, rounded=rounded), mask, least if kind == "int8" else None)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("kind", TYPES)
def test_more_near_ties_than_fast_products_can_tell(kind, rounded):
    """Hundreds within the slack of each row: whole tiles are settled exactly."""
    g = np.random.default_rng(0)
    both = unit(g.standard_normal((1, 512)) + 3e-5 * g.standard_normal((700, 512)))
    both[350:450] = both[330:430]
    x, c = torch.from_numpy(float32(both[:400])), torch.from_numpy(unit_centroids(both[300:]))
    found = found_by(x, c, x, kind, (64, 128), rounded=rounded)
    s = similarities(x, c, rounded=rounded)
    check(found, s, np.zeros(s.shape, bool))
    assert (~np.isnan(found.similarity)).mean() > 0.9  # what it takes


def test_tiles_do_not_change_the_gap_and_clear_rows_have_one():
    x, sample = problem(random, 150, 256, 0)
    c, _ = problem(random, 65, 256, 1)
    x[:65] = torch.nn.functional.normalize(c + 0.5 * x[:65])
    expected = found_by(x, c, sample, "int8", (1000, 1000), rounded=False).gap
    for tile in ((1, 1), (9, 1), (50, 64), (150, 13)):  # 65 = 64 + 1
        got = found_by(x, c, sample, "int8", tile, rounded=False).gap
        assert np.array_equal(got, expected)
    top = np.sort(similarities(x, c, rounded=False), axis=1)
    assert (expected[:65] > 0.8 * (top[:65, -1] - top[:65, -2])).all()
    assert (expected == 0).any()


def clusters_of(kind):
    """Hard for codes: a far row alone in the last tile; copies of each other, opposite to all."""
    g = np.random.default_rng(0)
    if kind == "outlier last":
        x = unit(g.standard_normal((1, 64)) + 0.02 * g.standard_normal((513, 64)))
        x[512] = unit(g.standard_normal((1, 64)))
    elif kind == "opposite copies":
        x = np.repeat(signs(g, 1, 64) / 8, 200, axis=0)
        x[[150, 171]] *= -1
    else:
        x = unit(g.standard_normal((20, 64)))[g.integers(20, size=200)]
        x = unit(x + g.choice([0, 1e-5, 1e-2], (200, 1)) * g.standard_normal((200, 64)))
    return x.astype(np.float16)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["outlier last", "opposite copies", "copies"])
def test_duplicates_are_the_same_for_every_type_and_thread(name, mode, monkeypatch):
    x = clusters_of(name)
    zero = np.zeros(len(x), np.int32)
    args = (x, zero, zero.astype(np.float32))
    options = {"mode": mode, "epsilon": 0.03, "least_similarity": 0.9, "device": "cpu"}
    duplicate_of, evidence = dedup_reference.find_duplicates(*args, 0.03, mode)
    if mode == "max-earlier":
        evidence[np.nan_to_num(evidence) < 0.9] = np.nan
    for kind in TYPES:
        use(monkeypatch, kind)
        for threads, block_bytes in ((1, None), (2, None), (1, 30_000), (2, 400_000)):
            torch.set_num_threads(threads)
            got = find_duplicates(*args, block_bytes=block_bytes, **options)
            assert np.array_equal(got[0], duplicate_of)
            assert np.array_equal(got[1].astype(float), evidence, equal_nan=True)
