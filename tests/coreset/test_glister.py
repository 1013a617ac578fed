import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coreset.glister import glister
from coreset.gradients import LastLayerGradients
from tests.references import glister_reference as reference
from tests.references.gradients_reference import materialised, softmax


def made(n=40, m=15, classes=3, d=4, seed=0, **options):
    rng = np.random.default_rng(seed)
    weight, bias = rng.normal(size=(classes, d)), rng.normal(size=classes)
    x = rng.normal(size=(n + m, d)).astype(np.float32)
    y = rng.integers(classes, size=n + m)
    p = softmax(x @ weight.T + bias)
    train = LastLayerGradients.of(p[:n], y[:n], x[:n], **options)
    held_out = LastLayerGradients.of(p[n:], y[n:], x[n:], **options)
    return train, held_out, (weight, bias, x[n:].astype(np.float64), y[n:])


@given(st.integers(0, 40), st.sampled_from([0.01, 0.1, 1.0]), st.integers(1, 20))
@settings(deadline=None, max_examples=30)
def test_is_greedy_with_the_head_moved(seed, eta, k):
    train, held_out, rest = made(seed=seed)
    whole = materialised(train.errors, train.features.source)
    rows, gains = reference.glister(whole, *rest, k, eta)
    found = glister(train, k, validation=held_out, eta=eta)
    assert found.indices.tolist() == rows
    np.testing.assert_allclose(found.gains, gains, rtol=1e-3, atol=1e-6 * eta)


def test_small_steps_rank_by_the_product_with_the_validation_gradient():
    train, held_out, _ = made()
    products = train.times(held_out.total() / len(held_out))
    found = glister(train, 20, validation=held_out, eta=1e-9)
    assert found.indices.tolist() == np.argsort(-products, kind="stable")[:20].tolist()


def test_the_validation_gradient_is_updated():
    """DeepCore passes upadate_state=, so that its GLISTER is a plain ranking."""
    train, held_out, _ = made()
    ranked = glister(train, 20, validation=held_out, eta=1e-9)
    moved = glister(train, 20, validation=held_out, eta=0.5)
    assert moved.indices.tolist() != ranked.indices.tolist()
    once = glister(train, 20, validation=held_out, eta=0.5, refresh=20)
    assert once.indices.tolist() == ranked.indices.tolist()


def test_choices_lower_the_validation_loss_more_than_chance():
    train, held_out, (weight, bias, h, y) = made(200, 100)

    def loss(rows):
        step = train.subset(rows).total()
        logits = h @ (weight - 0.02 * step[:, :-1]).T + bias - 0.02 * step[:, -1]
        return -np.log(softmax(logits)[np.arange(len(y)), y]).mean()

    found = glister(train, 30, validation=held_out, eta=0.02)
    rng = np.random.default_rng(0)
    chance = [loss(rng.choice(200, 30, replace=False)) for _ in range(20)]
    assert loss(found.indices) < min(chance)


@pytest.mark.parametrize("refresh", [1, 4, 7])
def test_a_smaller_budget_is_a_prefix(refresh):
    train, held_out, _ = made()
    large = glister(train, 23, validation=held_out, eta=0.3, refresh=refresh)
    for k in (0, 1, 6, 14):
        small = glister(train, k, validation=held_out, eta=0.3, refresh=refresh)
        assert small.indices.tolist() == large.indices[:k].tolist()


@pytest.mark.parametrize("block_bytes", [1, 500])
def test_blocks(block_bytes):
    one, two = made(), made(block_bytes=block_bytes)
    a = glister(one[0], 20, validation=one[1], eta=0.3)
    b = glister(two[0], 20, validation=two[1], eta=0.3)
    assert a.indices.tolist() == b.indices.tolist()


def test_held_out_rows_that_are_very_wrong_still_count():
    train, _, _ = made(classes=2)
    h = np.ones((1, 4))
    wrong = LastLayerGradients.of([[0.0, 1.0]], [0], h)
    found = glister(train, 10, validation=wrong, eta=0.1)
    assert np.isfinite(found.gains).all() and found.gains[0] > 0


def test_edges():
    train, held_out, _ = made(6)
    assert len(glister(train, 0, validation=held_out)) == 0
    assert sorted(glister(train, 6, validation=held_out).indices.tolist()) == list(range(6))
    twice = train.subset(np.tile(np.arange(6), 2))
    assert sorted(glister(twice, 12, validation=held_out).indices.tolist()) == list(range(12))
    for options in ({"eta": 0.0}, {"eta": np.nan}, {"refresh": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            glister(train, 2, validation=held_out, **options)
    with pytest.raises(ValueError, match="held-out"):
        glister(train, 2, validation=held_out.subset([]))
    with pytest.raises(ValueError, match="same classes"):
        glister(train, 2, validation=LastLayerGradients.of([[1.0, 0.0]], [0]))
    with pytest.raises(ValueError, match="budget"):
        glister(train, 7, validation=held_out)
