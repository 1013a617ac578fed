import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coreset import facility_tiles
from coreset.facility_graph import ResidualGraph
from coreset.facility_location import facility_location, facility_location_steps
from coreset.similarity import Similarity
from tests.references import submodular_reference as reference

KINDS = ("cosine", "dot", "euclidean")


def rows(n, d=5, seed=0, lattice=False):
    x = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    if lattice:
        x = np.round(x)
        x[~x.any(axis=1)] = 1
    return x


def plain(x, budget, kind, selected=()):
    """Greedy by definition; the first choice of k-medoids has no smaller set to compare with."""
    s = reference.similarities(x, kind)
    value = reference.facility_location(s - s.min() if kind == "euclidean" else s)
    return reference.greedy(value, len(x), budget, selected)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(0, 1000),
    st.sampled_from(KINDS),
    st.booleans(),
    st.sampled_from(["lazy", "greedy"]),
)
def test_choices_and_gains_are_those_of_greedy_by_definition(n, seed, kind, lattice, maximizer):
    x = rows(n, seed=seed, lattice=lattice)
    found = facility_location(x, n, similarity=kind, maximizer=maximizer)
    chosen, gains = plain(x, n, kind)
    assert found.indices.tolist() == chosen
    # k-medoids adds no constant: its first gain is the sum of similarities itself.
    first = 1 if kind == "euclidean" else 0
    np.testing.assert_allclose(found.gains[first:], gains[first:], atol=1e-9)
    s = reference.similarities(x, kind)
    assert found.gains[0] == pytest.approx(s[:, chosen[0]].sum(), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lattice", [False, True])
def test_every_way_of_keeping_bounds_gives_the_same_choices(kind, lattice, monkeypatch):
    """Pages of columns, refreshes and the sparse graph, each forced by a memory limit."""
    x = rows(150, seed=3, lattice=lattice)
    s = reference.similarities(x, kind)
    s = s - s.min() if kind == "euclidean" else s
    expected, _ = reference.greedy(reference.facility_location(s), 150, 60)
    monkeypatch.setattr(facility_tiles, "PAGE", 16)
    for block_bytes in (None, 20_000, 1_000):
        found = facility_location(x, 60, similarity=kind, block_bytes=block_bytes)
        assert found.indices.tolist() == expected


def test_pages_alone_and_refreshes_alone_are_exact(monkeypatch):
    x = rows(200, seed=4)
    expected = facility_location(x, 120, maximizer="greedy").indices
    monkeypatch.setattr(facility_tiles, "PAGE", 8)
    monkeypatch.setattr(facility_tiles, "_pairs", lambda *_: np.inf)
    for share in (1e9, 0.1, 0.0):
        monkeypatch.setattr(facility_tiles, "REFRESH", share)
        for block_bytes in (1_500, 10_000):
            found = facility_location(x, 120, block_bytes=block_bytes)
            assert np.array_equal(found.indices, expected)


def test_lazy_evaluates_far_fewer_columns_than_greedy():
    rng = np.random.default_rng(0)
    sizes = rng.integers(10, 200, 30)
    x = np.repeat(5 * rng.normal(size=(30, 16)), sizes, axis=0) + rng.normal(size=(sum(sizes), 16))
    engine = facility_tiles.LazyGreedy(Similarity(x, block_bytes=30_000), np.empty(0, np.int64))
    for _ in range(30):
        engine.choose()
    assert engine.graph is None
    assert engine.evaluated < 8 * len(x)  # greedy: 30 * len(x)


@pytest.mark.parametrize("kind", KINDS)
def test_selected_rows_serve_already(kind):
    x, selected = rows(40, seed=5), [7, 3, 30]
    found = facility_location(x, 37, similarity=kind, selected=selected)
    chosen, gains = plain(x, 37, kind, selected)
    assert found.indices.tolist() == chosen
    np.testing.assert_allclose(found.gains, gains, atol=1e-9)
    whole = facility_location(x, 20, similarity=kind)
    rest = facility_location(x, 12, similarity=kind, selected=whole.indices[:8])
    assert np.array_equal(rest.indices, whole.indices[8:])


def test_steps_are_the_choices_and_every_budget_is_a_prefix():
    x = rows(50, seed=6)
    steps = list(facility_location_steps(x))
    assert len(steps) == 50
    for budget in (0, 1, 13, 49, 50):
        found = facility_location(x, budget)
        assert found.indices.tolist() == [step.row for step in steps[:budget]]
        np.testing.assert_allclose(found.gains, [step.gain for step in steps[:budget]])
    assert list(facility_location_steps(x, selected=np.arange(50))) == []


def test_weights_are_the_rows_served_and_the_objective_is_the_function():
    x = rows(60, seed=7)
    found = facility_location(x, 9)
    s = reference.similarities(x, "cosine")
    nearest = s[:, found.indices].argmax(axis=1)
    assert np.array_equal(found.weights, np.bincount(nearest, minlength=9))
    assert found.weights.sum() == 60
    value = reference.facility_location(s)(found.indices)
    assert found.facts["objective"] == pytest.approx(value)
    assert found.gains.sum() == pytest.approx(value)
    opposite = facility_location(
        np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), 1, similarity="dot"
    )
    assert opposite.weights.sum() == 3


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [1, 2, 4])
def test_value_is_within_1_minus_1_over_e_of_the_best_of_all_subsets(seed, budget):
    x = rows(11, d=3, seed=seed)
    value = reference.facility_location(reference.similarities(x, "dot"))
    found = facility_location(x, budget, similarity="dot").facts["objective"]
    assert found >= (1 - 1 / np.e) * reference.best_value(value, 11, budget) - 1e-9


def test_function_has_diminishing_returns():
    rng = np.random.default_rng(0)
    value = reference.facility_location(reference.similarities(rows(30), "cosine"))
    for _ in range(200):
        order = rng.permutation(30)
        small, large = np.sort(rng.integers(0, 29, 2))
        j, S, T = order[-1], order[:small], order[:large]
        assert value([*S, j]) - value(S) >= value([*T, j]) - value(T) - 1e-9


def test_containers_and_types_do_not_change_the_choice(tmp_path):
    half = rows(80, seed=8).astype(np.float16)
    wide = half.astype(np.float32)
    expected = facility_location(wide, 30)
    path = tmp_path / "x.npy"
    np.save(path, half)
    for given_x in (half, np.load(path, mmap_mode="r"), torch.from_numpy(wide), wide.astype(float)):
        found = facility_location(given_x, 30)
        assert np.array_equal(found.indices, expected.indices)
        np.testing.assert_allclose(found.gains, expected.gains, rtol=1e-12)
    assert np.array_equal(wide, half.astype(np.float32))


def test_equal_rows_go_by_the_lowest_number():
    x = np.repeat(np.eye(3, dtype=np.float32), 300, axis=0)
    found = facility_location(x, 6)
    assert found.indices.tolist() == [0, 300, 600, 1, 2, 3]
    assert found.gains[3:].tolist() == [0, 0, 0]
    assert facility_location(x[:1], 1).indices.tolist() == [0]
    assert facility_location(np.eye(200), 200).indices.tolist() == list(range(200))


def test_apricots_outlier_does_not_change_euclidean_choices():
    """apricot subtracts distances from the largest one, which an outlier sets."""
    x = rows(60, seed=9)
    near = facility_location(x, 20, similarity="euclidean")
    far = facility_location(
        np.vstack([x, np.full((1, 5), 1e4, np.float32)]), 21, similarity="euclidean"
    )
    # The outlier is chosen second: it is the worst served. The others' gains do not move.
    assert far.indices.tolist()[1] == 60
    others = far.indices != 60
    assert np.array_equal(far.indices[others], near.indices)
    np.testing.assert_allclose(far.gains[others][1:], near.gains[1:], atol=1e-6)


def test_deepcores_batch_offset_every_batch_of_rows_counts():
    """DeepCore adds up the first batch only: .16 of the gain at batch 32, n = 200."""
    x = rows(200, seed=10)
    engine = facility_tiles.LazyGreedy(Similarity(x, block_bytes=2_000), np.empty(0, np.int64))
    engine.choose()
    engine._load(torch.arange(100, 200))
    s = reference.similarities(x, "cosine")
    value = reference.facility_location(s)
    taken = np.flatnonzero(engine.taken.numpy()).tolist()
    fresh = np.flatnonzero(engine.fresh.numpy() & ~engine.taken.numpy())
    assert set(range(100, 200)) - set(taken) <= set(fresh.tolist())
    expected = [value([*taken, j]) - value(taken) for j in fresh]
    np.testing.assert_allclose(engine.gains.numpy()[fresh], expected, atol=1e-4)


def test_stochastic_draws_by_seed_and_comes_close():
    """submodlib calls srand(1) in every run: all of its stochastic choices are the same."""
    x = rows(400, seed=11)
    runs = [facility_location(x, 20, maximizer="stochastic", seed=seed) for seed in range(3)]
    assert len({tuple(run.indices) for run in runs}) == 3
    again = facility_location(x, 20, maximizer="stochastic", seed=1)
    assert np.array_equal(again.indices, runs[1].indices)
    whole = facility_location(x, 20).facts["objective"]
    assert all(run.facts["objective"] > 0.95 * whole for run in runs)
    every = facility_location(x, 1, maximizer="stochastic")  # one choice looks at every row
    assert every.indices[0] == facility_location(x, 1).indices[0]
    medoid = facility_location(x, 1, maximizer="stochastic", similarity="euclidean")
    assert medoid.indices[0] == facility_location(x, 1, similarity="euclidean").indices[0]


def test_deepcores_epsilon_of_9_tenths_is_refused():
    """DeepCore and apricot sample with epsilon .9: one row of 50,000, and no guarantee."""
    with pytest.raises(ValueError, match=r"1 - 1/e"):
        facility_location(rows(10), 2, maximizer="stochastic", epsilon=0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity": "rbf"}, "similarity is 'rbf'"),
        ({"maximizer": "slow"}, "maximizer is 'slow'"),
        ({"selected": [0, 0]}, "unique"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        facility_location(rows(10), 2, **options)
    with pytest.raises(ValueError, match="one row at a time"):
        next(facility_location_steps(rows(10), maximizer="stochastic"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_rows_are_named(bad):
    x = rows(10)
    x[4, 2] = bad
    with pytest.raises(ValueError, match="row 4"):
        facility_location(x, 2)
    x[4] = 0
    with pytest.raises(ValueError, match="row 4 of x is zero"):
        facility_location(x, 2)
    assert len(facility_location(x, 10, similarity="dot")) == 10


def test_graph_holds_the_pairs_that_matter_and_compacting_keeps_them():
    x = rows(50, seed=12)
    kernel = Similarity(x)
    s = kernel.tile(kernel.held, kernel.held)
    service = s[:, :3].amax(dim=1)
    graph = ResidualGraph(s.split(7), service, 2500)
    assert len(graph.value) == int((s > service[:, None]).sum())
    assert len(graph.value) == facility_tiles._pairs(kernel, service)
    assert not ResidualGraph(s.split(7), service, len(graph.value) - 1).fits
    better = s[:, :6].amax(dim=1)
    at = torch.nonzero(better > service)[:, 0]
    lost = graph.fall(at, service[at], better[at])
    expected = (s - service[:, None]).clamp(min=0).sum(0) - (s - better[:, None]).clamp(min=0).sum(
        0
    )
    np.testing.assert_allclose(lost, expected, atol=1e-4)
    graph.compact(better)
    assert len(graph.value) == int((s > better[:, None]).sum())


def test_cords_global_state_of_numpy_and_torch_is_left_alone():
    """cords sets np.seterr(all="raise") when it is imported, and draws from clocks."""
    errors, state = np.geterr(), torch.get_rng_state()
    facility_location(rows(50), 5, maximizer="stochastic")
    facility_location(rows(50), 5)
    assert np.geterr() == errors
    assert torch.equal(torch.get_rng_state(), state)
