import numpy as np
import pytest
import torch

from coreset.cal import cal
from tests.references.cal_reference import cal as reference


def rows(n=60, d=4, classes=3, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(n, d)).astype(np.float32)
    return x, generator.dirichlet(np.full(classes, 0.5), size=n)


@pytest.mark.parametrize("divergence", ["kl", "symmetric"])
@pytest.mark.parametrize(("n", "k", "seed"), [(60, 10, 0), (25, 3, 1), (8, 10, 2), (2, 1, 3)])
def test_scores_are_those_of_brute_force(n, k, seed, divergence):
    x, p = rows(n, seed=seed)
    wanted = reference(x, p, k, 1e-8, divergence == "symmetric")
    found = cal(x, n, probabilities=p, neighbours=k, divergence=divergence)
    np.testing.assert_allclose(found.gains, wanted[found.indices], rtol=1e-9)
    assert found.indices.tolist() == np.argsort(-wanted, kind="stable").tolist()


def test_the_row_that_contradicts_its_neighbours_is_chosen():
    """DeepCore keeps the lowest scores: the rows that agree with their neighbours."""
    x, _ = rows(40)
    p = np.tile([0.9, 0.05, 0.05], (40, 1))
    p[13] = [0.05, 0.9, 0.05]
    assert cal(x, 1, probabilities=p).indices.tolist() == [13]


def test_probabilities_of_zero_are_finite():
    x, p = rows(30)
    p[:15] = np.eye(3)[np.arange(15) % 3]
    found = cal(x, 30, probabilities=p)
    assert np.isfinite(found.gains).all() and len(found) == 30
    np.testing.assert_allclose(
        found.gains, reference(x, p, 10, 1e-8, False)[found.indices], rtol=1e-9
    )


def test_blocks_and_containers_do_not_matter(tmp_path):
    x, p = rows(80)
    x, p = x.astype(np.float16), p.astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    whole = cal(x, 20, probabilities=p)
    for features, predictions, options in (
        (x, p, {"block_bytes": 300}),
        (np.load(tmp_path / "x.npy", mmap_mode="r"), p.astype(np.float64), {}),
        (torch.from_numpy(x.copy()), torch.from_numpy(p.copy()), {}),
    ):
        found = cal(features, 20, probabilities=predictions, **options)
        assert found.indices.tolist() == whole.indices.tolist()


def test_edges_and_options():
    x, p = rows(5)
    assert len(cal(x, 0, probabilities=p)) == 0
    assert cal(x[:1], 1, probabilities=p[:1]).indices.tolist() == [0]
    same = cal(np.ones((6, 2)), 6, probabilities=np.full((6, 2), 0.5))
    assert same.indices.tolist() == list(range(6)) and (same.gains == 0).all()
    with pytest.raises(ValueError, match="probabilities have 4 rows"):
        cal(x, 1, probabilities=p[:4])
    with pytest.raises(ValueError, match="not logits"):
        cal(x, 1, probabilities=10 * p)
    for options in ({"neighbours": 0}, {"divergence": "js"}, {"floor": 0.0}, {"floor": 0.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            cal(x, 1, probabilities=p, **options)
