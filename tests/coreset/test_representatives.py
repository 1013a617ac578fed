import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coreset.features import Features
from coreset.representatives import cluster_rows, kmeans


def rows_of(n=200, d=6, seed=0, classes=6):
    generator = np.random.default_rng(seed)
    centers = 4 * generator.normal(size=(classes, d))
    x = centers[generator.integers(classes, size=n)] + generator.normal(size=(n, d))
    return x.astype(np.float32)


def clusters_of(x, k, seed=0):
    return cluster_rows(Features(x, device="cpu", unit=True), k, seed=seed)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 60), seed=st.integers(0, 10**6), share=st.floats(0, 1), copies=st.booleans()
)
def test_nearest_rows_stand_for_all(n, seed, share, copies):
    x = rows_of(n, 4, seed)
    if copies:
        x[n // 3 :] = x[: n - n // 3]
    budget = round(share * n)
    found = kmeans(x, budget, seed=seed, device="cpu")
    assert len(found) == budget
    if budget == 0:
        return
    assert found.weights.sum() == pytest.approx(n, rel=1e-6)
    cluster, distance = clusters_of(x, budget, seed)
    np.testing.assert_array_equal(found.gains, distance[found.indices])
    # Every cluster that is not empty gives its nearest row, the lowest of equally near ones.
    for c in set(cluster.tolist()):
        members = np.flatnonzero(cluster == c)
        chosen = [i for i in found.indices.tolist() if cluster[i] == c]
        order = members[np.argsort(distance[members], kind="stable")]
        assert chosen == order[: len(chosen)].tolist() and chosen
        np.testing.assert_allclose(
            found.weights[np.isin(found.indices, members)], len(members) / len(chosen), rtol=1e-6
        )


def test_the_nearest_row_to_each_centroid_is_that_of_all_rows():
    x = rows_of(600, 8)
    unit = x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
    found = kmeans(x, 12, device="cpu")
    cluster, _ = clusters_of(x, 12)
    for row, weight in zip(found.indices, found.weights, strict=True):
        members = unit[cluster == cluster[row]]
        mean = members.mean(axis=0)
        assert weight == len(members)
        best = (members @ mean).max()
        assert unit[row] @ mean == pytest.approx(best, abs=1e-6)
    assert (np.diff(found.weights) <= 0).all()


def test_prototypes_cover_better_than_chance():
    x = rows_of(600, 8)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    found = kmeans(x, 20, device="cpu").indices
    generator = np.random.default_rng(0)
    random = [(unit @ unit[generator.permutation(600)[:20]].T).max(1).mean() for _ in range(20)]
    assert (unit @ unit[found].T).max(axis=1).mean() > max(random)


def test_many_clusters_start_on_drawn_rows_and_cover_as_well(monkeypatch):
    x = rows_of(900, 8)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    seeded = kmeans(x, 100, device="cpu")
    monkeypatch.setattr("coreset.representatives._SEEDED", 99)
    drawn = kmeans(x, 100, device="cpu")
    assert drawn.indices.tolist() != seeded.indices.tolist()
    assert drawn.indices.tolist() == kmeans(x, 100, device="cpu").indices.tolist()
    away = [1 - (unit @ unit[c.indices].T).max(axis=1).mean() for c in (seeded, drawn)]
    assert away[1] < 1.1 * away[0] and len(set(drawn.indices.tolist())) == 100
    assert drawn.weights.sum() == pytest.approx(900)


def test_hard_and_easy_are_the_two_ends_of_one_ranking():
    x = rows_of()
    _, distance = clusters_of(x, 6)
    hard = kmeans(x, 40, clusters=6, which="hard", device="cpu")
    easy = kmeans(x, 40, clusters=6, which="easy", device="cpu")
    np.testing.assert_array_equal(hard.indices, np.argsort(-distance, kind="stable")[:40])
    np.testing.assert_array_equal(easy.indices, np.argsort(distance, kind="stable")[:40])
    np.testing.assert_array_equal(hard.gains, distance[hard.indices])
    whole = kmeans(x, 200, clusters=6, which="hard", device="cpu")
    np.testing.assert_array_equal(whole.indices[:40], hard.indices)


def test_fewer_clusters_than_the_budget_share_it_by_size():
    x = rows_of()
    cluster, _ = clusters_of(x, 3)
    found = kmeans(x, 40, clusters=3, device="cpu")
    sizes, chosen = np.bincount(cluster), np.bincount(cluster[found.indices])
    assert (np.abs(chosen - 40 * sizes / 200) <= 2).all() and chosen.sum() == 40
    assert len(set(cluster[found.indices[:3]].tolist())) == 3
    assert found.weights.sum() == pytest.approx(200, rel=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_containers_and_blocks_agree(tmp_path, dtype):
    x = rows_of().astype(dtype)
    before = x.copy()
    np.save(tmp_path / "x.npy", x)
    wanted = kmeans(x, 15, device="cpu")
    for other, block_bytes in [
        (np.load(tmp_path / "x.npy", mmap_mode="r"), None),
        (torch.from_numpy(x), 3000),
        (x.astype(np.float64), 1),
    ]:
        found = kmeans(other, 15, device="cpu", block_bytes=block_bytes)
        np.testing.assert_array_equal(found.indices, wanted.indices)
        np.testing.assert_array_equal(found.weights, wanted.weights)
    np.testing.assert_array_equal(x, before)


def test_edges():
    x = rows_of(8)
    assert len(kmeans(x, 0, device="cpu")) == 0
    whole = kmeans(x, 8, device="cpu")
    assert sorted(whole.indices.tolist()) == list(range(8)) and (whole.weights == 1).all()
    ones = kmeans(np.ones((6, 2)), 4, device="cpu")
    assert ones.indices.tolist() == [0, 1, 2, 3] and (ones.weights == 1.5).all()
    for options, message in [
        ({"which": "best"}, "which is 'best'"),
        ({"which": "hard"}, "needs clusters"),
        ({"clusters": 4}, r"1 \.\.\. 3"),
        ({"clusters": 9, "which": "easy"}, r"1 \.\.\. 8"),
        ({"clusters": 0}, "clusters is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            kmeans(x, 3, device="cpu", **options)
    x[5] = 0
    with pytest.raises(ValueError, match="row 5 of x is zero"):
        kmeans(x, 2, device="cpu")
