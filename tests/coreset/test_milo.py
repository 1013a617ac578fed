import copy
import itertools
import math

import numpy as np
import pytest
import torch

from coreset.milo import MiloSampler, disparity_order, stochastic_graph_cut, taylor_softmax
from tests.references import milo_reference as reference


def features(n=60, d=5, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def unit(x):
    return torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("cut", [0.4, 1.0])
def test_with_all_candidates_it_is_the_plain_greedy_graph_cut(seed, cut):
    x = features(25, 3, seed)
    draw = np.random.default_rng(seed)
    found = stochastic_graph_cut(unit(x), 10, draw, cut, epsilon=1e-30)
    assert found.tolist() == reference.greedy_graph_cut(reference.similarity(x), 10, cut)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_and_gains_are_those_of_disparity_min(seed):
    x = features(25, 3, seed)
    order, gains = reference.disparity_gains(reference.similarity(x))
    assert [row for row, _ in disparity_order(unit(x))] == order
    sampler = MiloSampler(x, ratio=0.2, epochs=6)
    assert np.allclose(sampler.probabilities, reference.taylor(gains))


def test_distances_never_increase_along_the_order():
    x = unit(features(300, 4))
    found = [distance for _, distance in disparity_order(x)]
    assert found[0] == math.inf
    assert all(a >= b for a, b in itertools.pairwise(found))
    nearest = reference.similarity(x.numpy())
    order = [row for row, _ in disparity_order(x)]
    for i in (1, 7, 160, 299):
        assert found[i] == pytest.approx(1 - nearest[order[i], order[:i]].max())


def test_published_bug_stochastic_draws_are_all_one():
    """submodlib seeds its generator with 1 in every call: 300 "stochastic" subsets are one."""
    sampler = MiloSampler(features(200), ratio=0.2, epochs=60, epsilon=0.1)
    found = {tuple(sorted(sampler.epoch_indices(epoch))) for epoch in range(10)}
    assert len(found) == 10


def test_greedy_subsets_are_better_cuts_than_random_ones():
    x = features(120, 6)
    s = reference.similarity(x)
    sampler = MiloSampler(x, ratio=0.1, epochs=60)
    best = reference.graph_cut(s, reference.greedy_graph_cut(s, 12, 0.4), 0.4)
    draws = [reference.graph_cut(s, sampler.epoch_indices(e).tolist(), 0.4) for e in range(10)]
    rng = np.random.default_rng(0)
    random = [reference.graph_cut(s, list(rng.permutation(120)[:12]), 0.4) for _ in range(50)]
    assert min(draws) > max(random)
    assert min(draws) > 0.98 * best


@pytest.mark.parametrize(
    ("epochs", "kappa", "expected"),
    [(6, 1 / 6, 1), (7, 1 / 6, 2), (200, 1 / 6, 34), (12, 1 / 6, 2), (9, 0.0, 0), (9, 1.0, 9)],
)
def test_the_switch_is_at_the_ceiling(epochs, kappa, expected):
    sampler = MiloSampler(features(), ratio=0.2, epochs=epochs, kappa=kappa)
    assert sampler.greedy_epochs == expected
    # Importance draws need the order of all rows, greedy ones do not.
    for epoch in range(expected):
        sampler.epoch_indices(epoch)
    assert sampler._probabilities is None
    sampler.epoch_indices(expected)
    assert sampler._probabilities is not None


def test_published_bug_rank_ordered_probabilities_are_read_by_row():
    """cords reads probabilities that are sorted by rank at row numbers: correlation .005.

    With one row of each class, how often a row is drawn is its probability.
    """
    x, labels = features(24, 3), np.arange(24) % 2
    sampler = MiloSampler(x, labels, ratio=2, epochs=6, kappa=0, importance="distance")
    draws = 6000
    often = np.zeros(24)
    for epoch in range(draws):
        often[sampler.epoch_indices(epoch)] += 1
    p = sampler.probabilities
    for c in range(2):
        s = reference.similarity(x[labels == c])
        order = reference.disparity_gains(s)[0]
        distance = [1 - max((s[i, j] for j in order[:k]), default=0) for k, i in enumerate(order)]
        distance[0] = distance[1]
        expected = np.empty(12)
        expected[order] = distance
        assert np.allclose(p[labels == c], reference.taylor(expected))
    assert np.abs(often - draws * p).max() < 4.5 * np.sqrt(draws * p.max())
    assert np.corrcoef(often, p)[0, 1] > 0.9


def test_draws_without_replacement_are_successive_draws():
    x = features(10, 3)
    sampler = MiloSampler(x, ratio=4, epochs=6, kappa=0, importance="distance", temperature=0.05)
    draws = 5000
    ours, theirs = np.zeros(10), np.zeros(10)
    rng = np.random.default_rng(0)
    for epoch in range(draws):
        ours[sampler.epoch_indices(epoch)] += 1
        theirs[rng.choice(10, 4, replace=False, p=sampler.probabilities)] += 1
    assert sampler.probabilities.max() > 3 * sampler.probabilities.min()
    assert np.abs(ours - theirs).max() < 4.5 * np.sqrt(2 * draws * 0.25)


def test_classes_give_their_share_in_every_epoch():
    labels = np.repeat([3, 5, 9], [50, 30, 20])
    sampler = MiloSampler(features(100), labels, ratio=0.2, epochs=12)
    for epoch in range(5):
        rows = sampler.epoch_indices(epoch)
        assert len(set(rows.tolist())) == 20
        assert np.bincount(labels[rows])[[3, 5, 9]].tolist() == [10, 6, 4]


def test_epochs_share_a_subset_but_not_its_order():
    sampler = MiloSampler(features(), ratio=0.3, epochs=12, every=3)
    found = [sampler.epoch_indices(epoch).tolist() for epoch in range(9)]
    assert sorted(found[3]) == sorted(found[4]) == sorted(found[5]) != sorted(found[6])
    assert found[3] != found[4]


def test_an_epoch_is_a_function_of_seed_and_epoch():
    x = features()
    one = MiloSampler(x, ratio=0.3, epochs=12, seed=2)
    found = {epoch: one.epoch_indices(epoch).tolist() for epoch in (0, 7, 1, 3)}
    other = MiloSampler(x, ratio=0.3, epochs=12, seed=2)
    for epoch in (3, 1, 0, 7):
        assert other.epoch_indices(epoch).tolist() == found[epoch]
        assert copy.deepcopy(other).epoch_indices(epoch).tolist() == found[epoch]
    assert MiloSampler(x, ratio=0.3, epochs=12, seed=3).epoch_indices(0).tolist() != found[0]


def test_containers_blocks_and_scale_do_not_matter(tmp_path):
    x = features().astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    before = x.copy()
    options = {"ratio": 0.3, "epochs": 12, "labels": np.arange(60) % 2}
    wanted = MiloSampler(x, **options)
    for other in (
        np.load(tmp_path / "x.npy", mmap_mode="r"),
        torch.from_numpy(x),
        x.astype(np.float32),
        4 * x.astype(np.float64),
    ):
        sampler = MiloSampler(other, block_bytes=64, **options)
        for epoch in (0, 5):
            assert sampler.epoch_indices(epoch).tolist() == wanted.epoch_indices(epoch).tolist()
    assert np.array_equal(x, before)


def test_duplicates_and_single_rows():
    x = np.ones((6, 2))
    sampler = MiloSampler(x, [0, 0, 0, 0, 0, 1], ratio=6, epochs=2, kappa=0.5)
    for epoch in range(2):
        assert sorted(sampler.epoch_indices(epoch)) == list(range(6))
    assert sampler.probabilities.tolist() == [0.2] * 5 + [1.0]
    alone = MiloSampler(np.ones((1, 2)), ratio=1, epochs=2, importance="distance", kappa=0)
    assert alone.epoch_indices(0).tolist() == [0]


def test_taylor_softmax_is_the_reference():
    g = np.array([-3.0, 0.0, 2.5])
    assert np.allclose(taylor_softmax(g), reference.taylor(g))


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"epochs": 3, "every": 0},
        {"epochs": 3, "kappa": 1.5},
        {"epochs": 3, "epsilon": 0.0},
        {"epochs": 3, "importance": "size"},
        {"epochs": 3, "temperature": 0.0},
        {"epochs": 3, "ratio": 0.001},
        {"epochs": 3, "labels": [1]},
    ],
)
def test_nonsense_is_refused(options):
    with pytest.raises(ValueError, match=r"must be|no row"):
        MiloSampler(features(), **options)


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_rows_without_a_direction_are_refused(value):
    x = features()
    x[7] = value
    with pytest.raises(ValueError, match="row 7"):
        MiloSampler(x, epochs=3)
