import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from coreset.features import Features, RowSubset
from coreset.neighbours import balls, nearest, nearest_of_another
from tests.references import neighbours_reference as reference


def rows_of(n=200, d=6, seed=0, mean=0.0, dtype=np.float32):
    return (np.random.default_rng(seed).normal(size=(n, d)) + mean).astype(dtype)


def features(x, **options):
    return Features(x, device="cpu", **options)


def all_balls(x, radius, rows=None):
    out = {}
    for centers, sizes, members in balls(x, radius, rows):
        parts = np.split(members, np.cumsum(sizes)[:-1])
        out.update({int(c): part.tolist() for c, part in zip(centers, parts, strict=True)})
    return out


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 5),
    values=st.sampled_from([2, 3, 1000]),
    seed=st.integers(0, 10**6),
    block_bytes=st.sampled_from([1, 20_000, None]),
)
def test_nearest_is_brute_force_with_ties_and_copies(n, d, values, seed, block_bytes):
    generator = np.random.default_rng(seed)
    x = generator.integers(values, size=(n, d)).astype(np.float32)
    k = int(generator.integers(n))
    index, squared = nearest(features(x, block_bytes=block_bytes), k)
    wanted, distance = reference.nearest(x, k)
    np.testing.assert_array_equal(index, wanted)
    np.testing.assert_array_equal(squared, distance)  # whole numbers: exact


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_nearest_agrees_with_scikit_learn(mean):
    x = rows_of(1200, 48, mean=mean)
    index, squared = nearest(features(x), 12)
    distance, wanted = (
        NearestNeighbors(n_neighbors=12, algorithm="kd_tree").fit(x.astype(np.float64)).kneighbors()
    )
    np.testing.assert_array_equal(index, wanted)
    np.testing.assert_allclose(np.sqrt(squared), distance, rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_float32_squares_do_not_leave_their_range(scale):
    x = rows_of(60)
    index, squared = nearest(features(x * np.float32(scale)), 5)
    np.testing.assert_array_equal(index, nearest(features(x), 5)[0])
    assert np.isfinite(squared).all() and (squared > 0).all()


def test_one_far_row_does_not_blur_the_others():
    x = np.concatenate([rows_of(100), np.full((1, 6), 1e6, np.float32)])
    np.testing.assert_array_equal(nearest(features(x), 4)[0], reference.nearest(x, 4)[0])


def test_float64_rows_closer_than_float32_can_tell():
    x = np.array([[1.0], [1.0 + 3e-12], [1.0 + 1e-12], [2.0]])
    assert nearest(features(x), 1)[0].ravel().tolist() == [2, 2, 0, 1]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_containers_and_block_sizes_agree(tmp_path, dtype):
    x = rows_of(300, dtype=dtype)
    wanted = nearest(features(x), 7)
    path = tmp_path / "x.npy"
    np.save(path, x)
    same = [
        features(np.load(path, mmap_mode="r")),
        features(torch.from_numpy(x)),
        features(x.astype(np.float32), block_bytes=30_000),
        features(RowSubset(x, np.arange(300)), block_bytes=1),
    ]
    for other in same:
        index, squared = nearest(other, 7)
        np.testing.assert_array_equal(index, wanted[0])
        np.testing.assert_array_equal(squared, wanted[1])


def test_many_copies_take_the_lowest_numbers():
    x = np.concatenate([np.ones((300, 3)), rows_of(20, 3)]).astype(np.float32)
    index, squared = nearest(features(x, block_bytes=30_000), 3)
    assert index[5].tolist() == [0, 1, 2] and index[1].tolist() == [0, 2, 3]
    assert (squared[:300] == 0).all()


def test_edges():
    index, squared = nearest(features(np.ones((1, 2))), 0)
    assert index.shape == squared.shape == (1, 0)
    for k in (-1, 3):
        with pytest.raises(ValueError, match=r"0 \.\.\. 2"):
            nearest(features(rows_of(3)), k)


def test_the_rows_are_not_modified():
    x = rows_of(50)
    before = x.copy()
    nearest(features(x), 3)
    list(balls(features(x), 1.0))
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("radius", [0.0, 0.5, 2.0, 9.0])
@pytest.mark.parametrize("block_bytes", [1, None])
def test_balls_are_brute_force(radius, block_bytes):
    x = rows_of(70, 4)
    wanted = reference.balls(x, radius)
    assert all_balls(features(x, block_bytes=block_bytes), radius) == dict(enumerate(wanted))
    some = np.array([44, 3, 69])
    assert all_balls(features(x), radius, some) == {i: wanted[i] for i in some.tolist()}


def test_a_ball_is_open_and_the_same_from_both_ends():
    x = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 4.999999]])
    assert all_balls(features(x), 5.0) == {0: [0, 2], 1: [1, 2], 2: [0, 1, 2]}


@pytest.mark.parametrize("block_bytes", [1, None])
def test_nearest_of_another_group(block_bytes):
    x = np.random.default_rng(0).integers(4, size=(60, 3)).astype(np.float32)
    groups = np.random.default_rng(1).integers(3, size=60)
    rows = np.arange(60)[::-2]
    index, squared = nearest_of_another(features(x, block_bytes=block_bytes), groups, rows)
    wanted, distance = reference.nearest_of_another(x, groups, rows)
    np.testing.assert_array_equal(index, wanted)
    np.testing.assert_array_equal(squared, distance)


def test_nearest_of_another_where_there_is_none():
    index, squared = nearest_of_another(features(rows_of(4)), np.zeros(4, np.int64), np.arange(2))
    assert index.tolist() == [4, 4] and np.isinf(squared).all()
