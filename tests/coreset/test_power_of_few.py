import numpy as np
import pytest
import torch

from coreset import select
from coreset.base import Coreset
from coreset.power_of_few import broadcast_weights, learn_weights, power_of_few


def clouds(n=300, seed=0, noise=0.3):
    rng = np.random.default_rng(seed)
    centers = 2 * rng.normal(size=(3, 8))
    y = rng.integers(3, size=n)
    x = centers[y] + rng.normal(size=(n, 8))
    bad = rng.random(n) < noise
    given = np.where(bad, (y + 1 + rng.integers(2, size=n)) % 3, y)
    return x.astype(np.float32), y, given, bad


@pytest.mark.parametrize("n", [1, 2, 9, 100])
def test_rows_nearest_to_the_median_distance(n):
    x = np.random.default_rng(n).normal(size=(n, 5)).astype(np.float32)
    wide = x.astype(np.float64)
    distance = np.linalg.norm(wide - wide.mean(axis=0), axis=1)
    off = np.abs(distance - np.sort(distance)[(n - 1) // 2])
    for k in {0, 1, n // 2, n}:
        found = power_of_few(x, k)
        np.testing.assert_allclose(found.gains, -np.sort(off)[:k], atol=1e-12)
        np.testing.assert_allclose(off[found.indices], np.sort(off)[:k], atol=1e-12)


def test_neither_the_middle_nor_outliers():
    x = np.random.default_rng(0).normal(size=(200, 2))
    x[0], x[1] = x[2:].mean(axis=0), 100.0
    assert not {0, 1} & set(power_of_few(x, 100).indices.tolist())


@pytest.mark.parametrize("block_bytes", [1, 999])
def test_containers_and_blocks(block_bytes, tmp_path):
    x = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float16)
    x[30:] = x[:30]
    np.save(tmp_path / "x.npy", x)
    first = power_of_few(x.astype(np.float64), 20)
    for other in (np.load(tmp_path / "x.npy", mmap_mode="r"), torch.from_numpy(x)):
        assert power_of_few(other, 20, block_bytes=block_bytes).indices.tolist() == (
            first.indices.tolist()
        )


def test_median_of_each_class_through_select():
    x, y, *_ = clouds()
    found = select(x, 30, method="power-of-few", labels=y, per_class="balanced")
    for c in range(3):
        rows = np.flatnonzero(y == c)
        mine = found.indices[y[found.indices] == c]
        assert mine.tolist() == rows[power_of_few(x[rows], 10).indices].tolist()


def test_wrong_labels_weigh_less():
    for seed in range(3):
        x, y, given, bad = clouds(seed=seed)
        w = learn_weights(x[60:], given[60:], x[:60], y[:60], rounds=60, seed=seed)
        assert w.dtype == np.float32 and ((w >= 0) & (w <= 1)).all()
        assert w[bad[60:]].mean() < 0.2 * w[~bad[60:]].mean()


def test_the_weights_of_clean_labels_help_a_classifier():
    x, y, given, _ = clouds(2000, noise=0.45)
    w = learn_weights(x[100:400], given[100:400], x[:100], y[:100])
    found = Coreset.of(np.arange(100, 400))
    assert len(broadcast_weights(x, found, w)) == 2000

    def accuracy(weights):
        a = np.c_[x[100:400], np.ones(300)] * np.sqrt(weights)[:, None]
        b = np.eye(3)[given[100:400]] * np.sqrt(weights)[:, None]
        head = np.linalg.lstsq(a, b, rcond=None)[0]
        return ((np.c_[x[400:], np.ones(1600)] @ head).argmax(axis=1) == y[400:]).mean()

    assert accuracy(w + 1e-9) > accuracy(np.ones(300))


def test_learning_is_repeatable_and_leaves_global_streams_alone():
    x, y, given, _ = clouds(50)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    one, two, other = (
        learn_weights(x, given, torch.from_numpy(x), torch.from_numpy(y), rounds=5, seed=seed)
        for seed in (0, 0, 1)
    )
    assert one.tolist() == two.tolist() != other.tolist()
    assert torch.equal(before, torch.random.get_rng_state())


def test_bad_tables_are_refused():
    x, y, *_ = clouds(10)
    with pytest.raises(ValueError, match="one label per row"):
        learn_weights(x, y[:-1], x, y)
    with pytest.raises(ValueError, match="class numbers"):
        learn_weights(x, y, x, y.astype(str))
    with pytest.raises(ValueError, match="columns"):
        learn_weights(x, y, x[:, :3], y)
    with pytest.raises(ValueError, match="NaN"):
        learn_weights(x, y, np.full_like(x, np.nan), y)


@pytest.mark.parametrize("block_bytes", [None, 1, 2000])
def test_every_row_gets_the_weight_of_its_nearest_choice(block_bytes):
    rng = np.random.default_rng(0)
    x = (1000 + rng.normal(size=(80, 4))).astype(np.float32)
    chosen = rng.permutation(80)[:12]
    w = rng.random(12)
    wide = x.astype(np.float64)
    nearest = ((wide[:, None] - wide[chosen][None]) ** 2).sum(axis=2).argmin(axis=1)
    found = broadcast_weights(x, Coreset.of(chosen), w, block_bytes=block_bytes)
    np.testing.assert_array_equal(found, w[nearest].astype(np.float32))


def test_of_equally_near_choices_the_earliest_counts():
    for seed in range(20):
        ends = np.random.default_rng(seed).integers(-999, 999, size=(3, 3)).astype(np.float32)
        ends[2] = 5000.0  # moves the centre: sums round
        x = np.concatenate([ends, (ends[:1] + ends[1:2]) / 2])
        for first, second in ((0, 1), (1, 0)):
            found = broadcast_weights(x, Coreset.of([first, second, 2]), [1.0, 2.0, 3.0])
            assert found[3] == 1.0


def test_copies_and_own_weights():
    x = np.repeat(np.random.default_rng(0).normal(size=(5, 3)), 2, axis=0)
    found = broadcast_weights(x, Coreset.of([1, 0, 4], weights=[5.0, 7.0, 9.0]))
    assert found[[0, 1, 4, 5]].tolist() == [7.0, 5.0, 9.0, 9.0]
    with pytest.raises(ValueError, match="coreset"):
        broadcast_weights(x, Coreset.of([]))
    with pytest.raises(ValueError, match="coreset"):
        broadcast_weights(x, Coreset.of([10]))
    with pytest.raises(ValueError, match="one number per row"):
        broadcast_weights(x, Coreset.of([1]), [1.0, 2.0])
