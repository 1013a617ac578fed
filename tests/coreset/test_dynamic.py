import copy
import json
import pickle
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from coreset.dynamic import DynamicPruner, DynamicRandom, InfoBatch, SeTa
from coreset.dynamic_policies import group_by_loss
from coreset.indexed import WithIndex
from tests.conftest import REPOSITORY
from tests.references.infobatch_reference import full_epochs, lloyd, low_rows, merged


def losses_of(n, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).exponential(size=n)).float()


def after_one_epoch(n=200, epochs=40, **options):
    pruner = DynamicPruner(n, epochs=epochs, **options)
    rows = torch.tensor(list(pruner.sampler))
    pruner.reduce(losses_of(n)[rows], rows)
    pruner.set_epoch(1)
    return pruner


# ---- InfoBatch -------------------------------------------------------------------------------


@given(
    st.lists(st.one_of(st.just(np.nan), st.integers(0, 5).map(float)), min_size=1, max_size=30),
    st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_infobatch_leaves_out_exactly_its_part_of_the_low_rows(scores, ratio, seed):
    scores = np.array(scores)
    kept = InfoBatch(ratio=ratio).choose(scores, 1, 10, np.random.default_rng(seed))
    low = low_rows(scores) if np.isfinite(scores).any() else set()
    left_out = set(range(len(scores))) - set(kept.rows.tolist())
    assert len(np.unique(kept.rows)) == len(kept.rows)
    assert left_out <= low
    assert len(left_out) == int(Fraction(str(ratio)) * len(low))
    weights = dict(zip(kept.rows.tolist(), kept.weights.tolist(), strict=True))
    for row, weight in weights.items():
        expected = len(low) / (len(low) - len(left_out)) if row in low else 1
        assert weight == pytest.approx(expected)
    assert sum(weights.values()) == pytest.approx(len(scores), rel=1e-6)


def test_infobatch_weights_are_one_over_one_minus_ratio_where_that_divides():
    scores = np.array([0.0] * 10 + [1.0] * 10)
    kept = InfoBatch(ratio=0.6).choose(scores, 1, 10, np.random.default_rng(0))
    assert sorted(kept.weights.tolist()) == [1.0] * 10 + [2.5] * 4
    assert len(kept.rows) == 20 - 0.6 * 10


def test_expected_weighted_gradient_is_the_full_gradient():
    n, draws = 37, 4000
    rng = np.random.default_rng(1)
    gradients = rng.normal(size=(n, 3)) + 1
    scores = rng.exponential(size=n)
    sums = np.array(
        [
            kept.weights @ gradients[kept.rows]
            for seed in range(draws)
            for kept in [InfoBatch(ratio=0.7).choose(scores, 1, 9, np.random.default_rng(seed))]
        ]
    )
    error = np.abs(sums.mean(axis=0) - gradients.sum(axis=0))
    assert (error < 4 * sums.std(axis=0) / np.sqrt(draws)).all()
    # The check can fail: without weights it does.
    assert (sums.std(axis=0) > 0).all()
    plain = np.mean([gradients[kept.rows].sum(axis=0) for kept in [kept_of(scores)]], axis=0)
    assert np.abs(plain - gradients.sum(axis=0)).max() > 1


def kept_of(scores):
    return InfoBatch(ratio=0.7).choose(scores, 1, 9, np.random.default_rng(0))


@pytest.mark.parametrize("epochs", [1, 7, 8, 10, 89, 90, 200])
@pytest.mark.parametrize("anneal", [0.0, 0.125, 0.3, 1.0])
def test_published_bug_annealing_keeps_its_weights(epochs, anneal):
    """Published: the switch tests floats for equality, so of 90 epochs all 11 stay at weight 2."""
    scores = np.array([0.1] * 6 + [5.0] * 4)
    full = []
    for epoch in range(epochs):
        kept = InfoBatch(anneal=anneal).choose(scores, epoch, epochs, np.random.default_rng(0))
        if len(kept.rows) == 10:
            assert (kept.weights == 1).all()
            full.append(epoch)
    assert full == full_epochs(epochs, 1 - anneal)


def test_ninety_epochs_end_with_eleven_full_ones():
    assert full_epochs(90, 0.875) == list(range(79, 90))


# ---- the pruner ------------------------------------------------------------------------------


def test_reduce_is_the_mean_of_weighted_losses_and_leaves_them_alone():
    pruner = after_one_epoch(policy=InfoBatch())
    rows = torch.tensor(list(pruner.sampler)[:32])
    leaf = torch.rand(32, requires_grad=True)
    losses = leaf * 2
    before = losses.detach().clone()
    pruner.reduce(losses, rows).backward()
    assert torch.equal(losses.detach(), before)
    weights = pruner.weights(rows)
    assert len(set(weights.tolist())) == 2
    assert weights.max() == pytest.approx(2, abs=0.03)
    assert torch.allclose(leaf.grad, 2 * weights / 32)


def test_full_normalisation_makes_a_step_unbiased():
    n = 60
    per_row = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    steps, full = [], per_row.mean(dim=0)
    for seed in range(600):
        pruner = DynamicPruner(n, epochs=9, policy=InfoBatch(), seed=seed, normalize="full")
        pruner.reduce(losses_of(n), torch.arange(n))
        pruner.set_epoch(1)
        rows = torch.tensor(list(pruner.sampler)[:20])
        w = torch.zeros(4, requires_grad=True)
        pruner.reduce(per_row[rows] @ w, rows).backward()
        steps.append(w.grad)
    steps = torch.stack(steps)
    assert ((steps.mean(0) - full).abs() < 4 * steps.std(0) / 600**0.5).all()


def test_batch_normalisation_is_larger_by_all_over_kept():
    one = after_one_epoch(policy=InfoBatch(), normalize="batch")
    other = after_one_epoch(policy=InfoBatch(), normalize="full")
    rows = torch.tensor(list(one.sampler)[:10])
    kept = one.epoch_stats.kept
    ratio = one.reduce(torch.ones(10), rows) / other.reduce(torch.ones(10), rows)
    assert float(ratio) == pytest.approx(200 / kept)


def test_losses_of_rows_that_were_not_seen_stay():
    pruner = after_one_epoch(policy=InfoBatch())
    first = pruner.scores
    rows = torch.tensor(list(pruner.sampler))
    pruner.reduce(torch.full((len(rows),), 9.0), rows)
    assert np.array_equal(pruner.scores, first)  # taken up at the end of the epoch
    pruner.set_epoch(2)
    expected = first.copy()
    expected[rows.numpy()] = 9
    assert np.array_equal(pruner.scores, expected)


def test_a_loss_that_is_not_finite_is_no_loss():
    pruner = DynamicPruner(4, epochs=9, policy=InfoBatch())
    pruner.reduce(torch.tensor([1.0, float("nan"), float("inf"), 2.0]), torch.arange(4))
    pruner.set_epoch(1)
    assert np.isnan(pruner.scores[[1, 2]]).all()
    assert pruner.epoch_stats.seen == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_losses_of_other_types_and_large_row_numbers(dtype):
    """Published: row numbers travel as floats of the loss's type; 40001 becomes 39936."""
    pruner = DynamicPruner(50_000, epochs=9, policy=InfoBatch())
    rows = torch.tensor([40_001, 39_936, 49_999])
    loss = pruner.reduce(torch.tensor([0.5, 1.5, 2.5], dtype=dtype), rows)
    assert loss.dtype == dtype
    pruner.set_epoch(1)
    assert np.flatnonzero(np.isfinite(pruner.scores)).tolist() == [39_936, 40_001, 49_999]
    assert pruner.scores[40_001] == 0.5


def test_a_row_outside_of_the_epoch_is_an_error():
    pruner = after_one_epoch(policy=InfoBatch())
    outside = min(set(range(200)) - set(pruner.sampler))
    with pytest.raises(ValueError, match=f"row {outside} is not part of epoch 1"):
        pruner.reduce(torch.ones(1), torch.tensor([outside]))


def test_a_mean_loss_is_an_error():
    with pytest.raises(ValueError, match="reduction='none'"):
        after_one_epoch(policy=InfoBatch()).reduce(torch.tensor(1.0), torch.arange(3))


def test_epoch_stats_and_the_same_epoch_twice():
    pruner = after_one_epoch(policy=InfoBatch())
    stats = pruner.epoch_stats
    rows = list(pruner.sampler)
    assert stats == (1, len(rows), pytest.approx(1 - len(rows) / 200), 200)
    pruner.reduce(torch.ones(len(rows)), torch.tensor(rows))
    pruner.set_epoch(1)
    pruner.sampler.set_epoch(1)
    assert list(pruner.sampler) == rows


def test_lengths_that_are_not_known_yet_are_refused():
    with pytest.raises(ValueError, match="once per epoch"):
        DynamicPruner(10, epochs=3, policy=InfoBatch()).sampler.total_steps(2, 3)


@pytest.mark.parametrize("policy", [InfoBatch(), SeTa(window=0.4), DynamicRandom()])
@pytest.mark.parametrize("stop", [0, 3])
def test_killed_in_an_epoch_and_continued_is_never_killed(policy, stop):
    def make():
        return DynamicPruner(90, epochs=6, policy=policy, seed=5)

    def train(pruner, until=None):
        """Rows of every batch from where the pruner is; losses are a function of row and epoch."""
        found = []
        for epoch in range(pruner.epoch, 6):
            pruner.set_epoch(epoch)
            loader = DataLoader(WithIndex(range(90)), 8, sampler=pruner.sampler)
            for batch, (rows, _) in enumerate(loader):
                if (epoch, batch) == until:
                    return found
                pruner.reduce((rows * 7 + epoch * 11) % 13 + 0.5, rows)
                found.append(rows.tolist())
        return found

    wanted = train(make())
    killed = make()
    begun = train(killed, until=(2, stop))
    state = killed.state_dict()
    # The loader had fetched one batch more than was trained on.
    state["sampler"] = killed.sampler.state_dict(consumed=8 * stop)
    fresh = make()
    fresh.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert begun + train(fresh) == wanted


def test_published_bug_wrappers_recurse_when_copied():
    pruner = after_one_epoch(policy=InfoBatch())
    for other in (copy.deepcopy(pruner), pickle.loads(pickle.dumps(pruner))):
        assert list(other.sampler) == list(pruner.sampler)
        other.set_epoch(2)
        assert (other.sampler.epoch, pruner.sampler.epoch) == (2, 1)


def test_published_bug_the_epoch_never_ends():
    pruner = after_one_epoch(policy=InfoBatch())
    loader = DataLoader(WithIndex(range(200)), 16, sampler=pruner.sampler, num_workers=2)
    assert sum(len(rows) for rows, _ in loader) == pruner.epoch_stats.kept == len(pruner.sampler)


def test_published_bug_the_global_random_state_is_seeded():
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    list(after_one_epoch(policy=SeTa()).sampler)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_the_pruner_trains_on_what_is_hard():
    x = torch.linspace(-1, 1, 400)[:, None]
    y = (x[:, 0] > 0).long()
    model = torch.nn.Linear(1, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    pruner = DynamicPruner(400, epochs=8, policy=InfoBatch())
    loader = DataLoader(WithIndex(list(zip(x, y, strict=True))), 20, sampler=pruner.sampler)
    used = torch.zeros(400)
    for epoch in range(8):
        pruner.set_epoch(epoch)
        for rows, (inputs, targets) in loader:
            losses = torch.nn.functional.cross_entropy(model(inputs), targets, reduction="none")
            optimizer.zero_grad()
            pruner.reduce(losses, rows).backward()
            optimizer.step()
            used[rows] += 1
    assert used.min() >= 2  # the first epoch and a full one
    assert used[150:250].mean() > used[:100].mean() + 1
    assert 0.1 < 1 - used.sum() / (8 * 400) < 0.5


# ---- SeTa and dynamic random -----------------------------------------------------------------


@given(
    st.lists(st.one_of(st.integers(0, 6).map(float), st.floats(0, 10)), min_size=1, max_size=40),
    st.integers(1, 6),
)
@settings(max_examples=150, deadline=None)
def test_groups_are_those_of_plain_k_means(losses, groups):
    losses = np.array(losses)
    found = group_by_loss(losses, groups)
    assert (np.diff(found[np.argsort(losses, kind="stable")]) >= 0).all()
    spread = losses.max() - losses.min()
    centers = [losses[found == g].mean() for g in np.unique(found)]
    distance = np.abs(losses[:, None] - np.array(centers))
    own = np.abs(losses - np.array([losses[found == g].mean() for g in found]))
    assert (own <= distance.min(axis=1) + 1e-9 * (1 + spread)).all()


def test_groups_agree_with_the_reference():
    for seed in range(20):
        losses = np.random.default_rng(seed).exponential(size=60)
        for groups in (1, 2, 5):
            assert np.array_equal(group_by_loss(losses, groups), lloyd(losses, groups))


def test_seta_slides_from_easy_to_hard_and_ends_at_random():
    scores = np.repeat([0.0, 1.0, 2.0, 3.0, 4.0], 20)
    policy = SeTa(ratio=0.0, groups=5, window=0.6)
    for epoch in range(40):
        kept = policy.choose(scores, epoch, 40, np.random.default_rng(epoch))
        if epoch >= 35:
            assert len(kept.rows) == 100
        else:
            start = epoch % 3
            assert sorted(set(scores[kept.rows])) == [start, start + 1, start + 2]
            assert len(kept.rows) == 60
    assert len(SeTa(ratio=0.1).choose(scores, 39, 40, np.random.default_rng(0)).rows) == 90


def test_seta_published_bug_the_first_rows_are_kept():
    """Published: the random part is the first n (1 - ratio) rows, whole classes on sorted data."""
    policy = SeTa(ratio=0.5)
    seen = np.zeros(100)
    for seed in range(50):
        seen[policy.choose(np.full(100, np.nan), 0, 9, np.random.default_rng(seed)).rows] += 1
    assert seen.min() > 5
    assert seen.max() < 45


def test_seta_rows_without_a_loss_are_kept():
    scores = np.array([0.0, 1.0, 2.0, np.nan])
    for epoch in range(3):
        kept = SeTa(ratio=0.0, groups=3, window=0.34).choose(
            scores, epoch, 99, np.random.default_rng(0)
        )
        assert sorted(kept.rows.tolist()) == [epoch, 3]


def test_dynamic_random_keeps_an_exact_count_of_fresh_rows():
    policy = DynamicRandom(ratio=0.3, anneal=0.5)
    found = [
        policy.choose(np.full(10, np.nan), e, 4, np.random.default_rng(e)).rows for e in range(4)
    ]
    assert [len(rows) for rows in found] == [7, 7, 10, 10]
    assert set(found[0].tolist()) != set(found[1].tolist())


@pytest.mark.parametrize(
    "make",
    [
        lambda: InfoBatch(ratio=1.0),
        lambda: InfoBatch(anneal=-0.1),
        lambda: SeTa(groups=0),
        lambda: SeTa(window=0),
        lambda: DynamicRandom(ratio=-1),
        lambda: DynamicPruner(5, epochs=0, policy=InfoBatch()),
        lambda: DynamicPruner(0, epochs=1, policy=InfoBatch()),
        lambda: DynamicPruner(5, epochs=1, policy=InfoBatch(), normalize="mean"),
        lambda: DynamicPruner(2, epochs=1, policy=InfoBatch()).load_state_dict(
            DynamicPruner(3, epochs=1, policy=InfoBatch()).state_dict()
        ),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(ValueError, match=r"must be|at least|would not"):
        make()


# ---- two processes ---------------------------------------------------------------------------

WORKER = """
import json, sys
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from coreset.dynamic import DynamicPruner, InfoBatch
from coreset.indexed import WithIndex
rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
n = 41
pruner = DynamicPruner(n, epochs=8, policy=InfoBatch(), seed=3, num_replicas=2, rank=rank)
found = []
for epoch in range(8):
    pruner.set_epoch(epoch)
    scores = pruner.scores
    recorded, batches = {}, []
    for rows, _ in DataLoader(WithIndex(range(n)), 4, sampler=pruner.sampler):
        losses = ((rows * 5 + epoch * 3) % 7 + 0.25 * rank).float()
        pruner.reduce(losses, rows)
        recorded.update(zip(rows.tolist(), losses.tolist()))
        batches.append(rows.tolist())
    found.append({
        "scores": [None if s != s else s for s in scores.tolist()],
        "recorded": recorded,
        "rows": sum(batches, []),
        "kept": pruner.epoch_stats.kept,
    })
print(json.dumps(found))
dist.destroy_process_group()
"""


def test_two_processes_merge_losses_once_an_epoch(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store")],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        outputs.append(json.loads(out))
    expected = np.full(41, np.nan)
    for epoch, (one, other) in enumerate(zip(*outputs, strict=True)):
        assert one["scores"] == other["scores"]
        scores = np.array([np.nan if s is None else s for s in one["scores"]])
        assert np.array_equal(scores, expected.astype(np.float32), equal_nan=True)
        assert one["kept"] == other["kept"] == len({*one["rows"], *other["rows"]})
        assert len(one["rows"]) == len(other["rows"]) == -(-one["kept"] // 2)
        if 0 < epoch < 7:
            assert one["kept"] < 41
        parts = [{int(k): v for k, v in out["recorded"].items()} for out in (one, other)]
        fresh = merged(parts, 41)
        expected = np.where(np.isnan(fresh), expected, fresh)
