import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from coreset.crest import CrestBatchSampler
from coreset.crest_batches import minibatch_coreset
from coreset.crest_model import QuadraticModel
from coreset.indexed import WithIndex
from tests.references import crest_reference as reference


def data(n=300, d=4, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = 1.5 * rng.normal(size=(classes, d))[y] + rng.normal(size=(n, d))
    return torch.from_numpy(x).float(), torch.from_numpy(y)


def linear(d=4, classes=3, seed=0):
    model = torch.nn.Linear(d, classes, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(classes, d, generator=torch.Generator().manual_seed(seed)))
    return model


def sampler_of(x, y, model, **options):
    options = {"batch_size": 16, "pool": 0.4, "logits_of": lambda rows: model(x[rows])} | options
    return CrestBatchSampler(y, model, **options)


def train(sampler, x, y, model, epochs, rate=0.5, log=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    loader = DataLoader(WithIndex(list(zip(x, y, strict=True))), batch_sampler=sampler)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for rows, (inputs, targets) in loader:
            losses = functional.cross_entropy(model(inputs), targets, reduction="none")
            optimizer.zero_grad()
            (losses * sampler.weights(rows)).mean().backward()
            optimizer.step()
            sampler.observe()
            if log is not None:
                log.append(rows.tolist())


# ---- one batch -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_batch_is_greedy_facility_location_in_each_class(seed):
    rng = np.random.default_rng(seed)
    residuals, classes = rng.normal(size=(40, 3)), rng.integers(3, size=40)
    chosen, weights = minibatch_coreset(torch.from_numpy(residuals), classes, 10)
    assert weights.mean() == pytest.approx(1)
    for c in range(3):
        rows = np.flatnonzero(classes == c)
        mine = np.isin(chosen, rows)
        picks, sizes = reference.facility_location(residuals[rows], int(mine.sum()))
        assert chosen[mine].tolist() == rows[picks].tolist()
        assert np.allclose(weights[mine] * 40 / 10, sizes)


def test_classes_are_pooled_where_one_would_give_no_row():
    rng = np.random.default_rng(0)
    residuals, classes = rng.normal(size=(30, 3)), np.repeat([0, 1, 2], [28, 1, 1])
    chosen, weights = minibatch_coreset(torch.from_numpy(residuals), classes, 5)
    picks, sizes = reference.facility_location(residuals, 5)
    assert chosen.tolist() == picks
    assert np.allclose(weights * 6, sizes)


@pytest.mark.parametrize("size", [2, 9])
def test_distances_are_those_of_softmax_less_the_label(size):
    # Within a class the label moves all rows alike; between classes, of 2 rows, it counts.
    x, y = data(30)
    model = linear()
    sampler = sampler_of(x, y, model, pool=30, batch_size=size, steps_per_epoch=1)
    batch = next(iter(sampler))
    pool = sampler._union
    logits = model(x).detach().double().numpy()
    residuals = (reference.softmax(logits) - np.eye(3)[y])[pool]
    classes = y.numpy()[pool] if size > 2 else np.zeros(30, int)
    expected = [
        int(rows[pick])
        for c in np.unique(classes)
        for rows in [np.flatnonzero(classes == c)]
        for pick in reference.facility_location(residuals[rows], size // len(set(classes)))[0]
    ]
    assert batch == pool[expected].tolist()


def test_copies_each_stand_for_themselves():
    chosen, weights = minibatch_coreset(torch.ones(4, 2).double(), np.zeros(4, int), 4)
    assert sorted(chosen.tolist()) == [0, 1, 2, 3]
    assert weights.tolist() == [1, 1, 1, 1]


def test_a_pool_that_is_too_large_to_compare_is_refused():
    with pytest.raises(ValueError, match="lower pool"):
        minibatch_coreset(torch.zeros(9000, 1).double(), np.zeros(9000, int), 2)


def test_batches_estimate_the_full_gradient_with_less_variance_than_random_ones():
    x, y = data(400)
    model = linear()
    w = model.weight.detach().numpy().astype(float)
    per_row = reference.row_gradients(w, x.numpy().astype(float), y.numpy()).reshape(400, -1)
    full = per_row.mean(axis=0)
    found = []
    for seed in range(40):
        sampler = sampler_of(x, y, model, pool=0.25, seed=seed)
        for batch in list(sampler)[:5]:
            weights = sampler.weights(torch.tensor(batch)).numpy()
            found.append((weights[:, None] * per_row[batch]).mean(axis=0))
    rng = np.random.default_rng(0)
    random = [per_row[rng.choice(400, 16, replace=False)].mean(axis=0) for _ in range(200)]
    variance = ((np.array(found) - full) ** 2).sum(axis=1).mean()
    assert variance < 0.75 * ((np.array(random) - full) ** 2).sum(axis=1).mean()
    bias = np.mean(found, axis=0) - full
    assert (bias**2).sum() < 0.1 * variance
    assert np.linalg.norm(bias) < 0.15 * np.linalg.norm(full)


# ---- the quadratic model ---------------------------------------------------------------------


def bowl(w, a, b):
    return lambda: 0.5 * (a * (w - b) ** 2).sum() + 1


@pytest.mark.parametrize("decays", [(0.9, 0.999), (0.0, 0.0)])
def test_rho_is_zero_for_an_exact_quadratic(decays):
    w = torch.nn.Parameter(torch.randn(6, dtype=torch.float64))
    loss = bowl(w, torch.arange(1.0, 7), torch.randn(6, dtype=torch.float64))
    model = QuadraticModel([w], gradient_decay=decays[0], curvature_decay=decays[1])
    draw = torch.Generator().manual_seed(0)
    for _ in range(3 if decays[0] == 0 else 1):
        model.fit([(0.25, loss), (0.75, loss)], draw)
        with torch.no_grad():
            w += torch.randn(6)
        assert model.error(float(loss().detach())) < 1e-12
    # The check can fail: a loss that is off by a tenth is seen.
    assert model.error(float(loss().detach()) * 1.1) == pytest.approx(0.1 / 1.1)


def test_the_diagonal_is_that_of_the_hessian():
    x, y = data(200)
    w = linear().weight.double().detach().requires_grad_()
    w = torch.nn.Parameter(w)
    model = QuadraticModel([w], gradient_decay=0, curvature_decay=0)

    def loss():
        return functional.cross_entropy(x.double() @ w.T, y)

    model.fit([(1 / 3000, loss)] * 3000, torch.Generator().manual_seed(1))
    exact = reference.hessian_diagonal(w.detach().numpy(), x.double().numpy(), y.numpy())
    assert np.allclose(model._curvature[0].numpy(), exact, atol=0.08 * exact.max())
    gradient = reference.row_gradients(w.detach().numpy(), x.double().numpy(), y.numpy())
    assert np.allclose(model._gradient[0].numpy(), gradient.mean(axis=0))
    assert model.curvature_norm == pytest.approx(np.linalg.norm(exact), rel=0.05)


def test_averages_have_no_bias_to_zero():
    w = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    model = QuadraticModel([w])
    draw = torch.Generator().manual_seed(0)
    for curvature in (1.0, 3.0):
        model.fit([(1.0, bowl(w, torch.full((3,), curvature), 1.0))], draw)
    expected = (0.999 * 1 + 3) / 1.999
    assert model.curvature_norm == pytest.approx(expected * math.sqrt(3), rel=1e-9)
    with torch.no_grad():
        w += 0.1
    g = -(0.9 * 1 + 3) / 1.9
    assert model.predict() == pytest.approx(model.loss + 3 * (0.1 * g + 0.005 * expected))


def test_a_linear_loss_has_no_curvature():
    w = torch.nn.Parameter(torch.ones(2))
    model = QuadraticModel([w, torch.nn.Parameter(torch.ones(1))])  # the second is not used
    model.fit([(1.0, lambda: w.sum())], torch.Generator())
    assert model.curvature_norm == 0
    with torch.no_grad():
        w += 1
    assert model.error(4.0) == pytest.approx(0, abs=1e-6)


def test_errors_that_are_not_numbers_are_infinite():
    w = torch.nn.Parameter(torch.ones(2))
    model = QuadraticModel([w])
    model.fit([(1.0, lambda: (w**2).sum())], torch.Generator())
    assert model.error(math.nan) == math.inf
    assert model.error(0.0) == math.inf


# ---- the sampler -----------------------------------------------------------------------------


def test_published_bug_the_gradient_is_doubled():
    """Published: a second backward without zero_grad hands the optimiser twice the gradient."""
    x, y = data()
    model = linear()
    sampler = sampler_of(x, y, model, tau=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in list(sampler)[:3]:
        rows = torch.tensor(batch)
        weights = sampler.weights(rows)
        optimizer.zero_grad()
        losses = functional.cross_entropy(model(x[rows]), y[rows], reduction="none")
        (losses * weights).mean().backward()
        sampler.observe()
        sampler._worn_out = True
        next(iter(sampler))  # chooses again
        w = model.weight.detach().numpy().astype(float)
        per_row = reference.row_gradients(w, x[rows].numpy().astype(float), y[rows].numpy())
        expected = (weights.numpy()[:, None, None] * per_row).mean(axis=0)
        assert np.allclose(model.weight.grad.numpy(), expected, atol=1e-5)
    assert sampler.selections > 1


def test_modes_and_global_random_state_are_left_alone():
    x, y = data()
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3)
    )
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    sampler = sampler_of(x, y, model)
    next(iter(sampler))
    sampler.observe()
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    assert all(p.grad is None for p in model.parameters())


def test_a_data_set_and_logits_of_give_the_same_batches():
    x, y = data()
    model = linear()
    dataset = list(zip(x, y, strict=True))
    one = CrestBatchSampler(y, model, dataset, batch_size=16, pool=0.4)
    assert list(one) == list(sampler_of(x, y, model))


def test_a_worn_out_model_leads_to_new_batches_and_a_good_one_does_not():
    x, y = data()
    for tau, rate, expected in ((0.0, 0.1, "many"), (1e9, 0.1, "one"), (0.05, 0.0, "one")):
        model = linear()
        sampler = sampler_of(x, y, model, tau=tau)
        train(sampler, x, y, model, 2, rate=rate)
        assert sampler.checks > 2
        if expected == "one":
            assert sampler.selections == 1
        else:
            assert sampler.selections == sampler.checks + (not sampler._worn_out)


def test_checks_are_as_far_apart_as_the_curvature_allows():
    x, y = data()
    model = linear()
    sampler = sampler_of(x, y, model, interval=3.0, batches_per_check=2)
    list(sampler)
    assert sampler._check_every == 3
    assert len(sampler._batches) == 2  # before any curvature is known, as for one step
    sampler._first_norm *= 2
    sampler._worn_out = True
    next(iter(sampler))
    assert len(sampler._batches) == 6
    assert sampler._check_every in (5, 6, 7)
    sampler.quadratic.curvature_norm = 0.0
    assert sampler._steps_between_checks() == sampler.steps_per_epoch


def test_training_on_coresets_reduces_the_loss():
    x, y = data()
    model = linear()
    before = float(functional.cross_entropy(model(x), y).detach())
    train(sampler_of(x, y, model), x, y, model, 4, rate=0.1)
    after = float(functional.cross_entropy(model(x), y).detach())
    reference_model = linear()
    optimizer = torch.optim.LBFGS(reference_model.parameters(), max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(reference_model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    best = float(closure().detach())
    assert after < best + 0.2 * (before - best)


def test_killed_half_way_and_continued_is_never_killed():
    x, y = data()

    def run(stop=None):
        model = linear()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        sampler = sampler_of(x, y, model, tau=0.01, learned_below=0.05, learned_after=1)
        found, step = [], 0
        for epoch in range(3):
            sampler.set_epoch(epoch)
            iterator = iter(sampler)
            while (batch := next(iterator, None)) is not None:
                rows = torch.tensor(batch)
                losses = functional.cross_entropy(model(x[rows]), y[rows], reduction="none")
                optimizer.zero_grad()
                (losses * sampler.weights(rows)).mean().backward()
                optimizer.step()
                sampler.observe()
                found.append(batch)
                step += 1
                if step == stop:
                    state = pickle.loads(pickle.dumps(sampler.state_dict()))
                    weights = copy.deepcopy(model.state_dict())
                    model = linear(seed=9)
                    model.load_state_dict(weights)
                    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
                    sampler = sampler_of(x, y, model, tau=0.01, learned_below=0.05, learned_after=1)
                    sampler.load_state_dict(state)
                    iterator = iter(sampler)
        return found, sampler

    wanted, sampler = run()
    assert sampler.selections > 2
    for stop in (1, 7, 19, 20):
        assert run(stop)[0] == wanted


def test_the_same_seed_gives_the_same_run():
    x, y = data()
    logs = []
    for seed in (0, 0, 1):
        log: list = []
        model = linear()
        train(sampler_of(x, y, model, seed=seed), x, y, model, 2, log=log)
        logs.append(log)
    assert logs[0] == logs[1] != logs[2]


def test_learned_rows_are_left_out_but_not_too_many():
    x, y = data()
    model = linear()
    train(sampler_of(x, y, model), x, y, model, 5)
    for keep, threshold in ((0.7, 0.05), (0.99, 0.05), (0.7, 1e-9)):
        sampler = sampler_of(
            x, y, model, learned_below=threshold, learned_after=2, keep_at_least=keep
        )
        list(sampler)
        losses = functional.cross_entropy(model(x), y, reduction="none").detach().double().numpy()
        sampler.set_epoch(1)
        assert len(sampler.active) == 300
        sampler.set_epoch(2)
        gone = np.setdiff1d(np.arange(300), sampler.active)
        assert (losses[gone] < threshold).all()
        assert len(sampler.active) >= math.ceil(keep * 300)
        if threshold == 0.05:
            seen = np.unique(sampler._union)
            learned = (losses[seen] < threshold).sum()
            assert len(gone) == min(learned, 300 - math.ceil(keep * 300)) > 0
        sampler._worn_out = True
        list(sampler)
        assert not set(sampler._union.tolist()) & set(gone.tolist())


def test_published_bug_weights_of_a_row_in_two_batches():
    """Published: weights lie by row, and a row in two batches has the weight of the last."""
    x, y = data(60)
    sampler = sampler_of(x, y, linear(), pool=40, batch_size=20, steps_per_epoch=5)
    batches = [list(map(int, batch)) for batch in sampler]
    tables = [
        dict(zip(batch, sampler.weights(torch.tensor(batch)).tolist(), strict=True))
        for batch in batches
    ]
    shared = [row for row in range(60) if len({t[row] for t in tables if row in t}) > 1]
    assert shared
    assert all(sum(table.values()) == pytest.approx(20, rel=1e-5) for table in tables)


def test_other_rows_have_no_weights():
    x, y = data()
    sampler = sampler_of(x, y, linear())
    batch = next(iter(sampler))
    with pytest.raises(KeyError, match="another order"):
        sampler.weights(torch.tensor(batch[::-1]))


def test_forgetting_to_observe_is_an_error():
    x, y = data(30)
    sampler = sampler_of(x, y, linear(), batch_size=4, steps_per_epoch=2000)
    with pytest.raises(RuntimeError, match="observe"):
        list(sampler)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": 0.01}, "raise pool"),
        ({"batch_size": 0}, "at least the rows"),
        ({"logits_of": None}, "either"),
        ({"dataset": [1]}, "either"),
        ({"interval": 0}, "interval"),
        ({"batches_per_check": 0}, "batches_per_check"),
        ({"gradient_decay": 1.0}, "decay"),
    ],
)
def test_nonsense_is_refused(options, message):
    x, y = data()
    with pytest.raises(ValueError, match=message):
        sampler_of(x, y, linear(), **options)


@pytest.mark.parametrize("labels", [[0.5, 1.0], [-1, 0], [[0], [1]]])
def test_labels_that_no_logit_belongs_to_are_refused(labels):
    with pytest.raises(ValueError, match="whole numbers from 0"):
        CrestBatchSampler(labels, linear(), [0, 1], batch_size=1, pool=1)


def test_the_state_of_another_data_set_is_refused():
    x, y = data()
    sampler = sampler_of(x, y, linear())
    with pytest.raises(ValueError, match="rows"):
        sampler.load_state_dict(sampler.state_dict() | {"n": 3})
