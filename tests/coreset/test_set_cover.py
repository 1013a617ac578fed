import math

import numpy as np
import pytest
import torch

from coreset.set_cover import set_cover, set_cover_steps
from tests.references import submodular_reference as reference


def rows(n, d=3, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("radius", [0.0, 0.2, 0.8, 10.0])
@pytest.mark.parametrize("lattice", [False, True])
def test_choices_and_gains_are_greedy_by_definition(metric, radius, lattice):
    x = rows(36, seed=1)
    if lattice:  # distances of exactly the radius
        x, radius = np.round(x) + 0.5, round(5 * radius) if metric == "euclidean" else radius
    within = reference.distances(x, metric) <= radius + 1e-9
    chosen, gains = reference.greedy(reference.coverage(within), 36, 36)
    for block_bytes in (None, 300, 1):
        found = set_cover(x, 36, radius=radius, metric=metric, block_bytes=block_bytes)
        assert found.indices.tolist() == chosen
        assert found.gains.tolist() == gains
    assert found.facts == {"covered": 36.0, "radius": radius}


@pytest.mark.parametrize("block_bytes", [None, 100])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_concepts(block_bytes, kind):
    covers = np.random.default_rng(2).random((40, 25)) < 0.1
    chosen, gains = reference.greedy(reference.coverage(covers), 40, 40)
    x = torch.from_numpy(covers) if kind == "torch" else covers
    found = set_cover(x, 40, block_bytes=block_bytes)
    assert found.indices.tolist() == chosen
    assert found.gains.tolist() == gains
    assert found.facts == {"covered": float(covers.any(axis=0).sum())}


def test_when_all_is_covered_the_lowest_rows_follow():
    x = np.zeros((8, 2))
    found = set_cover(x, 8, radius=1.0, selected=None)
    assert found.indices.tolist() == list(range(8))
    assert found.gains.tolist() == [8, 0, 0, 0, 0, 0, 0, 0]
    assert set_cover(x, 3, radius=1.0, selected=[0, 2]).indices.tolist() == [1, 3, 4]


@pytest.mark.parametrize("seed", range(4))
def test_coverage_is_within_1_minus_1_over_e_and_wolseys_bound(seed):
    covers = np.random.default_rng(seed).random((12, 14)) < 0.25
    value = reference.coverage(covers)
    for budget in (1, 2, 4):
        best = reference.best_value(value, 12, budget)
        assert set_cover(covers, budget).facts["covered"] >= (1 - 1 / math.e) * best
    every = value(range(12))
    fewest = next(k for k in range(13) if reference.best_value(value, 12, k) == every)
    used = next(k for k in range(13) if set_cover(covers, k).facts["covered"] == every)
    assert used <= (1 + math.log(covers.sum(axis=1).max())) * fewest


def test_usual_radius_has_a_hundredth_of_the_rows_within_it():
    x = rows(1000, d=2, seed=3)
    found = set_cover(x, 5)
    within = (reference.distances(x) <= found.facts["radius"]).sum(axis=1) - 1
    assert 7 <= np.median(within) <= 13
    assert set_cover(x, 9).facts["radius"] == found.facts["radius"]
    scaled = set_cover(8 * x, 5)
    assert np.array_equal(scaled.indices, found.indices)


def test_selected_prefixes_steps_and_containers(tmp_path):
    half = rows(60, seed=4).astype(np.float16)
    whole = set_cover(half.astype(np.float32), 60, radius=0.7)
    steps = list(set_cover_steps(half, radius=0.7))
    assert [step.row for step in steps] == whole.indices.tolist()
    rest = set_cover(half, 20, radius=0.7, selected=whole.indices[:5])
    assert np.array_equal(rest.indices, whole.indices[5:25])
    assert np.array_equal(rest.gains, whole.gains[5:25])
    np.save(tmp_path / "x.npy", half)
    for x in (np.load(tmp_path / "x.npy", mmap_mode="r"), torch.from_numpy(half)):
        assert np.array_equal(set_cover(x, 17, radius=0.7).indices, whole.indices[:17])


def test_edges_and_bad_options():
    x = rows(9)
    assert len(set_cover(x, 0)) == 0
    assert set_cover(x[:1], 1).indices.tolist() == [0]
    for change, message in (
        ({"radius": -1.0}, "radius"),
        ({"radius": np.nan}, "radius"),
        ({"metric": "manhattan"}, "metric"),
    ):
        with pytest.raises(ValueError, match=message):
            set_cover(x, 2, **change)
    with pytest.raises(ValueError, match="concepts"):
        set_cover(x > 0, 2, radius=1.0)
    x[3] = np.nan
    with pytest.raises(ValueError, match="row 3"):
        set_cover(x, 2)
