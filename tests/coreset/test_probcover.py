import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coreset.features import Features
from coreset.probcover import probcover, probcover_steps
from coreset.representatives import cluster_rows
from tests.references import probcover_reference as reference


def rows_of(n=80, d=6, seed=0, classes=4):
    generator = np.random.default_rng(seed)
    centers = 4 * generator.normal(size=(classes, d))
    x = centers[np.arange(n) % classes] + generator.normal(size=(n, d))
    return x.astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 30),
    delta=st.sampled_from([0.01, 0.2, 0.5, 1.0, 2.1]),
    seed=st.integers(0, 10**6),
    edge_bytes=st.sampled_from([0, 200, 1 << 20]),
    copies=st.booleans(),
)
def test_agrees_with_the_reference_until_all_are_chosen(n, delta, seed, edge_bytes, copies):
    x = rows_of(n, 4, seed)
    if copies:
        x[n // 2 :] = x[: n - n // 2]
    generator = np.random.default_rng(seed)
    before = generator.permutation(n)[: generator.integers(n // 2 + 1)].tolist()
    budget = n - len(before)
    found = probcover(x, budget, delta=delta, selected=before, edge_bytes=edge_bytes, device="cpu")
    chosen, gains = reference.probcover(x, budget, delta, before)
    assert found.indices.tolist() == chosen
    assert found.gains.tolist() == gains


def test_graph_that_is_kept_and_graph_that_is_worked_out_again_agree():
    x = rows_of(300)
    kept = probcover(x, 60, delta=0.4, device="cpu")
    for options in ({"edge_bytes": 0}, {"block_bytes": 20_000}, {"edge_bytes": 9000}):
        found = probcover(x, 60, delta=0.4, device="cpu", **options)
        np.testing.assert_array_equal(found.indices, kept.indices)
        np.testing.assert_array_equal(found.gains, kept.gains)


def test_published_bug_the_last_rows_have_balls_too():
    """In the authors' code the last n % 500 rows got no out-edges and could never be chosen."""
    x = np.concatenate([np.eye(502)[:500], np.tile(np.eye(502)[501], (20, 1))])
    x[500:, 500] = np.linspace(0, 0.01, 20)
    found = probcover(x, 1, delta=0.5, device="cpu")
    assert found.indices[0] >= 500 and found.gains[0] == 20


def test_the_distance_is_strict():
    x = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert probcover(x, 1, delta=2.0, device="cpu").gains[0] == 3
    assert probcover(np.eye(3)[:2], 1, delta=1.0, device="cpu").gains[0] == 1
    x = np.array([[1.0, 0.0], [0.6, 0.8]])
    exact = float(np.sqrt(np.sum((x[0] - x[1]) ** 2)))
    for delta, covered in [(exact * (1 - 1e-12), 1), (exact * (1 + 1e-12), 2)]:
        assert probcover(x, 1, delta=delta, device="cpu").gains[0] == covered


def test_gains_fall_within_the_first_round_and_coverage_is_their_sum():
    x = rows_of(200)
    found = probcover(x, 30, delta=0.3, device="cpu")
    round_ = np.cumsum(found.gains) <= 200
    assert (np.diff(found.gains[round_]) <= 0).all()
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    distance = np.linalg.norm(unit[:, None] - unit[found.indices], axis=2).min(axis=1)
    assert found.facts["coverage"] == (distance < 0.3).mean()


def test_the_default_delta_is_the_largest_with_pure_balls():
    x = rows_of(150)
    cluster, _ = cluster_rows(Features(x, device="cpu", unit=True), 4, seed=3)
    for purity in (0.5, 0.95, 1.0):
        delta = probcover(x, 0, clusters=4, purity=purity, seed=3, device="cpu").facts["delta"]
        assert reference.purity(x, cluster, delta * (1 - 1e-9)) >= purity
        assert reference.purity(x, cluster, delta * (1 + 1e-9)) < purity


def test_the_default_delta_of_a_sample_is_near_that_of_all(monkeypatch):
    x = rows_of(2000)
    whole = probcover(x, 0, clusters=4, device="cpu").facts["delta"]
    monkeypatch.setattr("coreset.probcover._SAMPLE", 500)
    sample = probcover(x, 0, clusters=4, device="cpu").facts["delta"]
    assert sample == pytest.approx(whole, rel=0.15) and sample != whole


def test_steps_prefix_and_selected_continue():
    x = rows_of()
    whole = probcover(x, 80, delta=0.5, device="cpu").indices
    np.testing.assert_array_equal(probcover(x, 7, delta=0.5, device="cpu").indices, whole[:7])
    assert [row for row, _ in probcover_steps(x, delta=0.5, device="cpu")] == whole.tolist()
    rest = probcover(x, 20, delta=0.5, selected=whole[:15], device="cpu").indices
    np.testing.assert_array_equal(rest, whole[15:35])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_containers_agree(tmp_path, dtype):
    x = rows_of().astype(dtype)
    before = x.copy()
    np.save(tmp_path / "x.npy", x)
    wanted = probcover(x, 30, device="cpu")
    for other in (np.load(tmp_path / "x.npy", mmap_mode="r"), torch.from_numpy(x), x.astype("f8")):
        found = probcover(other, 30, device="cpu")
        np.testing.assert_array_equal(found.indices, wanted.indices)
        assert found.facts["delta"] == wanted.facts["delta"]
    np.testing.assert_array_equal(x, before)


def test_edges():
    x = rows_of(6)
    assert len(probcover(x, 0, device="cpu")) == 0
    assert probcover(x[:1], 1, device="cpu").indices.tolist() == [0]
    assert list(probcover_steps(x[:1], selected=[0], device="cpu")) == []
    ones = probcover(np.ones((5, 2)), 5, device="cpu")
    assert ones.indices.tolist() == [0, 1, 2, 3, 4] and ones.facts["coverage"] == 1
    for options, message in [
        ({"delta": 0.0}, "delta is 0"),
        ({"delta": float("nan")}, "delta is nan"),
        ({"purity": 0.0}, "purity is 0"),
        ({"clusters": 7}, "k is 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            probcover(x, 2, device="cpu", **options)
    x[4] = 0
    with pytest.raises(ValueError, match="row 4 of x is zero"):
        probcover(x, 2, device="cpu")
