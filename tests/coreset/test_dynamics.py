import numpy as np
import pytest

from coreset import dynamics, scores
from coreset.score_store import ScoreRecorder, ScoreStore
from tests.references import dynamics_reference as reference

N, C, EPOCHS = 40, 3, 14


def training(seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(C, size=N)
    drift = np.linspace(0, 2, EPOCHS)[:, None, None] * np.eye(C)[labels]
    ease = generator.uniform(-0.5, 1.5, size=(1, N, 1))
    return (drift * ease + generator.normal(size=(EPOCHS, N, C))).astype(np.float32), labels


def store_of(path, *runs, labels, hidden=None):
    """A store of runs of logits; rows that are hidden (E, n) were not seen."""
    for run, logits in enumerate(runs):
        with ScoreRecorder(path, n=N, classes=C, run=run, divergence=True) as recorder:
            for epoch, z in enumerate(logits):
                rows = np.arange(N) if hidden is None else np.flatnonzero(~hidden[epoch])
                recorder.record(rows, z[rows], labels[rows], epoch=epoch, features=z[rows])
    return ScoreStore.open(path)


@pytest.fixture
def one(tmp_path):
    logits, labels = training()
    return logits, labels, store_of(tmp_path / "s", logits, labels=labels)


def close(a, b):
    assert a.dtype == np.float64
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_el2n_and_grand_average_epochs_and_runs(tmp_path):
    (a, labels), (b, _) = training(), training(1)
    store = store_of(tmp_path / "s", a, b, labels=labels)
    el2n = np.stack([reference.el2n(z, labels) for z in (a, b)])
    close(scores.el2n(store), el2n.mean(axis=(0, 1)))
    close(scores.el2n(store, epoch=3), el2n[:, 3].mean(axis=0))
    grand = np.stack([reference.gradient_lengths(z, labels, z) for z in (a, b)])
    close(scores.grand(store, epoch=5), grand[:, 5].mean(axis=0))
    assert dynamics.el2n(store, 5, epoch=3).indices.tolist() == (
        np.argsort(-el2n[:, 3].mean(axis=0), kind="stable")[:5].tolist()
    )


def test_forgetting(one, tmp_path):
    logits, labels, store = one
    wanted = reference.forgetting(logits, labels)
    assert (wanted > 0).any()
    never = np.isinf(wanted)
    found = scores.forgetting(store)
    assert found[~never].tolist() == wanted[~never].tolist()
    assert (found[never] == EPOCHS + 1).all()


def test_rows_that_were_never_learned_are_the_most_forgettable(tmp_path):
    """DeepCore counts 0 events for them, which drops the hardest rows."""
    logits = np.zeros((4, N, C), np.float32)
    labels = np.zeros(N, np.int64)
    logits[:, :, 0] = 1.0
    logits[:, 7, 1] = 2.0  # never right
    logits[1::2, 3, 1] = 2.0  # forgotten at every chance
    store = store_of(tmp_path / "s", logits, labels=labels)
    assert scores.forgetting(store)[[7, 3, 0]].tolist() == [5, 2, 0]
    assert dynamics.forgetting(store, 3).indices.tolist() == [7, 3, 0]


def test_forgetting_counts_from_one_sight_of_a_row_to_the_next(tmp_path):
    logits = np.zeros((4, N, C), np.float32)
    logits[:, :, 0] = 1.0
    logits[2:, 0, 1] = 2.0  # right, not seen, wrong, wrong
    hidden = np.zeros((4, N), dtype=bool)
    hidden[1, 0] = True
    labels = np.zeros(N, np.int64)
    store = store_of(tmp_path / "s", logits, labels=labels, hidden=hidden)
    assert scores.forgetting(store)[0] == 1


def test_aum_is_the_mean_of_all_epochs(one):
    """The DUAL repository zeroes the sum in every epoch: its AUM is the last epoch's margin."""
    logits, labels, store = one
    margin = reference.margins(logits, labels)
    close(scores.aum(store), margin.mean(axis=0))
    assert not np.allclose(scores.aum(store), margin[-1], atol=0.1)
    close(
        scores.aum(store, of="probabilities"),
        reference.margins(reference.softmax(logits), labels).mean(axis=0),
    )


def test_aum_keeps_the_lowest_and_can_leave_the_very_lowest_to_the_end(one):
    _, _, store = one
    order = np.argsort(scores.aum(store), kind="stable").tolist()
    assert dynamics.aum(store, 6).indices.tolist() == order[:6]
    later = dynamics.aum(store, N, drop_hardest=0.1)
    assert later.indices.tolist() == order[4:] + order[:4][::-1]
    np.testing.assert_array_equal(later.gains, -scores.aum(store)[later.indices])
    assert dynamics.aum(store, 6, drop_hardest=0.1).indices.tolist() == order[4:10]


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize(("epochs", "window"), [(14, 10), (12, 4), (5, 5), (14, 3)])
def test_tdds(one, epochs, window, absolute):
    logits, _, store = one
    wanted = reference.tdds(logits, epochs, window, 0.9, absolute)
    measure = "absolute_divergence" if absolute else "divergence"
    found = scores.tdds(store, epochs=epochs, window=window, measure=measure)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6)
    assert dynamics.tdds(
        store, N, epochs=epochs, window=window, measure=measure
    ).gains.tolist() == (sorted(found.tolist(), reverse=True))


def test_the_window_of_tdds_slides(tmp_path):
    """The DUAL repository takes the first window every time: what comes later does not matter."""
    logits, labels = training()
    other = logits.copy()
    other[8:] = training(5)[0][8:]
    a, b = (
        scores.tdds(store_of(tmp_path / name, z, labels=labels), window=4, decay=0.5)
        for name, z in (("a", logits), ("b", other))
    )
    assert not np.allclose(a, b, rtol=0.01)


@pytest.mark.parametrize(("epochs", "window"), [(30, 10), (12, 5), (2, 2)])
def test_dual(one, epochs, window):
    logits, labels, store = one
    p_y = reference.softmax(logits)[:, np.arange(N), labels]
    close(scores.dual(store, epochs=epochs, window=window), reference.dual(p_y, epochs, window))


def test_dual_draws_with_the_weights_of_the_paper(one):
    """First draws over many seeds follow score times Beta density (scipy's), by chi-square."""
    logits, labels, store = one
    p_y = reference.softmax(logits)[:, np.arange(N), labels]
    budget = 8
    weights = reference.dual_weights(
        reference.dual(p_y, 30, 10), p_y.mean(axis=0), 1 - budget / N, 4.0
    )
    score, mean = scores.dual(store), scores.mean_of(store, "p_y")
    ours = np.exp(dynamics._log_weights(score, mean, 1 - budget / N, 4.0))
    np.testing.assert_allclose(ours / ours.sum(), weights, rtol=1e-3)
    draws = 400
    first = [dynamics.dual(store, budget, seed=s).indices[0] for s in range(draws)]
    counts = np.bincount(first, minlength=N)
    common = draws * weights >= 5
    expected = np.append(draws * weights[common], draws * weights[~common].sum())
    observed = np.append(counts[common], counts[~common].sum())
    from scipy.stats import chi2

    assert ((observed - expected) ** 2 / expected).sum() < chi2.ppf(0.9999, len(expected) - 1)


def test_dual_takes_more_easy_rows_the_more_is_pruned(tmp_path):
    logits, labels = training()
    store = store_of(tmp_path / "s", logits, labels=labels)
    mean = scores.mean_of(store, "p_y")

    def ease(pruned):
        weights = np.exp(dynamics._log_weights(scores.dual(store), mean, pruned, 4.0))
        return (weights * mean).sum() / weights.sum()

    assert ease(0.3) < ease(0.7) < ease(0.95)


def test_dual_draws_exactly_the_budget_where_scores_are_zero(tmp_path):
    """Drawing by probabilities fails where fewer rows have a score than are asked for."""
    logits = np.zeros((EPOCHS, N, C), np.float32)
    logits[:, :3] = training()[0][:, :3]
    store = store_of(tmp_path / "s", logits, labels=np.zeros(N, np.int64))
    assert (scores.dual(store) > 0).sum() == 3
    found = dynamics.dual(store, 9)
    assert sorted(found.indices[:3].tolist()) == [0, 1, 2]
    assert found.indices[3:].tolist() == list(range(3, 9))
    assert len(dynamics.dual(store, N)) == N and len(dynamics.dual(store, 0)) == 0


def test_dual_top(one):
    store = one[2]
    found = dynamics.dual(store, 5, sampling="top")
    assert found.indices.tolist() == np.argsort(-scores.dual(store), kind="stable")[:5].tolist()


def test_means_are_over_the_epochs_in_which_a_row_was_seen(tmp_path):
    logits, labels = training()
    hidden = np.random.default_rng(3).random((EPOCHS, N)) < 0.4
    store = store_of(tmp_path / "s", logits, labels=labels, hidden=hidden)
    el2n = np.where(hidden, np.nan, reference.el2n(logits, labels))
    close(scores.el2n(store), np.nanmean(el2n, axis=0))
    p_y = np.where(hidden, np.nan, reference.softmax(logits)[:, np.arange(N), labels])
    wanted = []
    for i in range(N):
        seen = [w[~np.isnan(w)] for w in (p_y[k : k + 10, i] for k in range(EPOCHS - 9))]
        wanted.append(np.mean([w.std(ddof=1) * (1 - w.mean()) for w in seen if len(w) > 1]))
    close(scores.dual(store), wanted)
    change = store.values("divergence")
    wanted = np.zeros(N)
    for k in range(EPOCHS - 9):
        for i in range(N):
            steps = [v for v in change[k + 1 : k + 10, i] if not np.isnan(v)]
            wanted[i] += 0.9 * 0.1 ** (EPOCHS - 10 - k) * np.linalg.norm(steps - np.mean(steps))
    close(scores.tdds(store), wanted)


def test_a_row_that_was_never_seen_is_named(tmp_path):
    logits, labels = training()
    hidden = np.zeros((EPOCHS, N), dtype=bool)
    hidden[:, 17] = True
    store = store_of(tmp_path / "s", logits, labels=labels, hidden=hidden)
    for score in (scores.el2n, scores.forgetting, scores.aum, scores.tdds, scores.dual):
        with pytest.raises(ValueError, match="row 17 has no"):
            score(store)


def test_what_was_not_recorded_is_said(tmp_path):
    logits, labels = training()
    with ScoreRecorder(tmp_path / "s", n=N, classes=C) as recorder:
        for epoch, z in enumerate(logits):
            recorder.record(np.arange(N), z, labels, epoch=epoch)
    store = ScoreStore.open(tmp_path / "s")
    with pytest.raises(ValueError, match="pass features="):
        scores.grand(store)
    with pytest.raises(ValueError, match="divergence=True"):
        scores.tdds(store)
    with pytest.raises(ValueError, match="there are runs 0 and epochs 0, 1"):
        scores.el2n(store, epoch=99)
    with pytest.raises(ValueError, match="14 epochs recorded, fewer than the window of 20"):
        scores.dual(store, window=20)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (dynamics.aum, {"drop_hardest": 1.5}),
        (dynamics.aum, {"of": "scores"}),
        (dynamics.tdds, {"window": 2}),
        (dynamics.tdds, {"decay": 0.0}),
        (dynamics.tdds, {"epochs": 5}),
        (dynamics.tdds, {"measure": "loss"}),
        (dynamics.dual, {"window": 1}),
        (dynamics.dual, {"sampling": "all"}),
        (dynamics.dual, {"c_d": 0.0}),
    ],
)
def test_options_out_of_range(one, function, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        function(one[2], 3, **options)


def test_difficulty_is_higher_for_harder_rows(one):
    _, _, store = one
    p_y = scores.mean_of(store, "p_y")
    for score in ("aum", "loss", "el2n"):
        assert np.corrcoef(scores.difficulty(store, score), p_y)[0, 1] < -0.3
    np.testing.assert_array_equal(scores.difficulty(store), -scores.aum(store))
    with pytest.raises(ValueError, match="'aumm' is not known"):
        scores.difficulty(store, "aumm")


def test_a_view_of_some_rows_scores_as_the_whole(one):
    store, rows = one[2], np.array([9, 2, 30])
    for score in (scores.el2n, scores.forgetting, scores.aum, scores.tdds, scores.dual):
        np.testing.assert_array_equal(score(store.subset(rows)), score(store)[rows])
