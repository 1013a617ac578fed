import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coreset.features import Features
from coreset.representatives import cluster_rows
from coreset.typiclust import typiclust
from tests.references import typiclust_reference as reference


def rows_of(n=120, d=6, seed=0, classes=6):
    generator = np.random.default_rng(seed)
    centers = 4 * generator.normal(size=(classes, d))
    x = centers[generator.integers(classes, size=n)] + generator.normal(size=(n, d))
    return x.astype(np.float32)


def clusters_of(x, k, seed=0):
    return cluster_rows(Features(x, device="cpu", unit=True), k, seed=seed)[0]


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 60),
    seed=st.integers(0, 10**6),
    max_clusters=st.sampled_from([1, 4, 500]),
    neighbours=st.sampled_from([1, 3, 20]),
)
def test_agrees_with_the_reference(n, seed, max_clusters, neighbours):
    x = rows_of(n, 4, seed)
    generator = np.random.default_rng(seed)
    before = generator.permutation(n)[: generator.integers(n // 2 + 1)].tolist()
    budget = int(generator.integers(1, n - len(before) + 1))
    found = typiclust(
        x,
        budget,
        selected=before,
        max_clusters=max_clusters,
        neighbours=neighbours,
        seed=seed,
        device="cpu",
    )
    cluster = clusters_of(x, min(budget + len(before), max_clusters), seed).tolist()
    # Two rows that are each other's only neighbour are equally typical: sums may differ in the
    # last digit, so compare what is the same under ties.
    wanted = reference.typiclust(x, cluster, budget, before, neighbours)
    assert len(found) == budget and not set(found.indices.tolist()) & set(before)
    assert [cluster[i] for i in found.indices] == [cluster[i] for i in wanted]
    typical = {}
    for c in set(cluster):
        typical.update(reference.typicality(x, np.flatnonzero(np.equal(cluster, c)), neighbours))
    np.testing.assert_allclose(found.gains, [typical[i] for i in found.indices], rtol=1e-9)
    np.testing.assert_allclose(found.gains, [typical[i] for i in wanted], rtol=1e-9)


def test_published_bug_distances_are_not_squared():
    """The authors' index returns squared distances, which moves the most typical row."""
    angle = np.array([0.0, 0.5, -0.5, 0.8, 0.81, -0.02, 0.12, 1.9, 1.92, 2.1])
    x = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    found = typiclust(x, 1, neighbours=20, device="cpu").indices[0]
    distance = np.sort(np.linalg.norm(x[:, None] - x, axis=2), axis=1)[:, 1:6]
    assert found == distance.mean(axis=1).argmin() != (distance**2).mean(axis=1).argmin()


def test_one_row_of_each_cluster_the_largest_first():
    x = rows_of(300)
    found = typiclust(x, 6, device="cpu").indices
    cluster = clusters_of(x, 6)
    sizes = np.bincount(cluster)
    assert len(set(cluster[found].tolist())) == 6
    assert (np.diff(sizes[cluster[found]]) <= 0).all()


def test_small_clusters_wait_until_the_large_ones_are_used_up():
    x = np.concatenate([np.tile([1.0, 0.0, 0.0], (8, 1)), np.eye(3)[1:]])
    x[:8, 1] = np.linspace(0, 0.1, 8)
    found = typiclust(x, 3, device="cpu")
    assert (found.indices < 8).all()
    found = typiclust(x, 10, max_clusters=3, device="cpu")
    assert sorted(found.indices[:8].tolist()) == list(range(8))
    assert sorted(found.indices[8:].tolist()) == [8, 9] and np.isnan(found.gains[8:]).all()


def test_clusters_with_selected_rows_come_later():
    x = rows_of(300)
    cluster = clusters_of(x, 6)
    largest = np.argsort(-np.bincount(cluster))[:3]
    before = [int(np.flatnonzero(cluster == c)[0]) for c in largest]
    found = typiclust(x, 3, selected=before, device="cpu").indices
    assert set(cluster[found]) == set(range(6)) - set(largest)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_containers_and_blocks_agree(tmp_path, dtype):
    x = rows_of().astype(dtype)
    before = x.copy()
    np.save(tmp_path / "x.npy", x)
    wanted = typiclust(x, 30, max_clusters=8, device="cpu")
    for other, block_bytes in [
        (np.load(tmp_path / "x.npy", mmap_mode="r"), None),
        (torch.from_numpy(x), 3000),
        (x.astype(np.float32), 1),
    ]:
        found = typiclust(other, 30, max_clusters=8, device="cpu", block_bytes=block_bytes)
        np.testing.assert_array_equal(found.indices, wanted.indices)
        np.testing.assert_array_equal(found.gains, wanted.gains)
    np.testing.assert_array_equal(x, before)


def test_edges():
    x = rows_of(12)
    assert len(typiclust(x, 0, device="cpu")) == 0
    assert sorted(typiclust(x, 12, device="cpu").indices.tolist()) == list(range(12))
    assert typiclust(x[:1], 1, device="cpu").indices.tolist() == [0]
    copies = typiclust(np.ones((12, 3)), 12, device="cpu")
    assert copies.indices.tolist() == list(range(12)) and np.isinf(copies.gains).all()
    for options in ({"neighbours": 0}, {"max_clusters": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            typiclust(x, 2, device="cpu", **options)
    with pytest.raises(ValueError, match="budget is 11"):
        typiclust(x, 11, selected=[3, 4], device="cpu")
    x[4, 1] = np.nan
    with pytest.raises(ValueError, match="row 4 of x holds NaN"):
        typiclust(x, 2, device="cpu")
