import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate import complexity as module
from curate.complexity import complexity
from curate.kmeans import Clusters
from curate.unit_rows import unit_centroids
from tests.references import complexity_reference


def clustered(seed, n, k, d=5):
    g = np.random.default_rng(seed)
    cluster = g.integers(-1, k, size=n).astype(np.int32)
    distance = (np.rint(g.random(n) * 2**23) / 2**23).astype(np.float32)
    distance[cluster < 0] = np.nan
    return Clusters(cluster, distance, unit_centroids(g.standard_normal((k, d))))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 40), st.integers(1, 15), st.integers(1, 20))
def test_equals_the_definition(seed, n, k, neighbours):
    c = clustered(seed, n, k)
    got = complexity(c, neighbours=neighbours)
    expected = complexity_reference.complexity(
        c.cluster, c.cosine_distance, c.centroids, neighbours
    )
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == np.float64 and mine.shape == (k,)
        np.testing.assert_allclose(mine, theirs, atol=2**-23)


def test_order_of_rows_and_clusters_changes_no_bit(monkeypatch):
    c = clustered(0, 500, 40)
    expected = complexity(c, neighbours=7)
    g = np.random.default_rng(1)
    rows, names = g.permutation(500), g.permutation(40)
    renamed = np.where(c.cluster < 0, -1, np.argsort(names)[c.cluster])[rows].astype(np.int32)
    monkeypatch.setattr(module, "BLOCK_BYTES", 3000)
    got = complexity(Clusters(renamed, c.cosine_distance[rows], c.centroids[names]), neighbours=7)
    for mine, theirs in zip(got, expected, strict=True):
        assert np.array_equal(mine, theirs[names], equal_nan=True)


def test_only_one_cluster_with_rows():
    c = Clusters(
        np.array([2, 2], np.int32), np.array([0.25, 0.5], np.float32), np.eye(4, dtype=np.float32)
    )
    got = complexity(c)
    assert np.array_equal(got.d_intra, [np.nan, np.nan, 0.375, np.nan], equal_nan=True)
    assert np.array_equal(got.d_inter, [np.nan, np.nan, 0.0, np.nan], equal_nan=True)
    assert np.array_equal(got.complexity, got.d_inter, equal_nan=True)


def test_no_rows():
    c = Clusters(np.empty(0, np.int32), np.empty(0, np.float32), np.eye(2, dtype=np.float32))
    assert np.isnan(complexity(c).complexity).all()


def test_neighbours_must_be_positive():
    with pytest.raises(ValueError, match="at least 1"):
        complexity(clustered(0, 5, 2), neighbours=0)
