import os

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from coreset.score_store import ScoreRecorder, ScoreStore
from curate.errors import ShardError
from tests.references import dynamics_reference as reference

N, C, D, EPOCHS = 30, 4, 5, 6


def training(seed=0, epochs=EPOCHS):
    generator = np.random.default_rng(seed)
    logits = 2 * generator.normal(size=(epochs, N, C)).astype(np.float32)
    features = generator.normal(size=(epochs, N, D)).astype(np.float32)
    return logits, generator.integers(C, size=N), features


def batches(seed, size=7):
    order = np.random.default_rng(seed).permutation(N)
    return [order[i : i + size] for i in range(0, N, size)]


def play(recorder, logits, labels, features=None, epochs=None, wrap=np.asarray):
    for epoch in epochs if epochs is not None else range(len(logits)):
        for rows in batches(epoch):
            h = None if features is None else wrap(features[epoch][rows])
            recorder.record(
                rows, wrap(logits[epoch][rows]), wrap(labels[rows]), epoch=epoch, features=h
            )


def recorded(path, seed=0, **options):
    logits, labels, features = training(seed)
    with ScoreRecorder(path, n=N, classes=C, divergence=True, **options) as recorder:
        play(recorder, logits, labels, features)
    return logits, labels, features, ScoreStore.open(path)


@pytest.mark.parametrize("wrap", [np.asarray, torch.tensor])
def test_every_measure_is_that_of_the_papers(tmp_path, wrap):
    logits, labels, features = training()
    with ScoreRecorder(tmp_path / "s", n=N, classes=C, divergence=True) as recorder:
        play(recorder, logits, labels, features, wrap=wrap)
    store = ScoreStore.open(tmp_path / "s")
    p = reference.softmax(logits)
    p_y = p[:, np.arange(N), labels]
    step = p[1:] * np.log(p[1:] / p[:-1])
    first = np.full((1, N), np.nan)
    wanted = {
        "loss": -np.log(p_y),
        "p_y": p_y,
        "margin": reference.margins(logits, labels),
        "p_margin": reference.margins(p, labels),
        "correct": p.argmax(axis=2) == labels,
        "el2n": reference.el2n(logits, labels),
        "entropy": -(p * np.log(p)).sum(axis=2),
        "grand": reference.gradient_lengths(logits, labels, features),
        "divergence": np.concatenate([first, step.sum(axis=2)]),
        "absolute_divergence": np.concatenate([first, np.abs(step).sum(axis=2)]),
    }
    for name, value in wanted.items():
        assert store.values(name).dtype == np.float32
        np.testing.assert_allclose(store.values(name), value, rtol=2e-5, atol=2e-6, err_msg=name)


def test_grand_is_the_gradient_that_autograd_finds(tmp_path):
    _, labels, features = training(epochs=1)
    layer = torch.nn.Linear(D, C).double()
    h = torch.from_numpy(features[0]).double()
    with ScoreRecorder(tmp_path / "s", n=N, classes=C) as recorder:
        recorder.record(np.arange(N), layer(h), labels, epoch=0, features=h)
    found = ScoreStore.open(tmp_path / "s").values("grand")[0]
    for i in range(N):
        layer.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            layer(h[i : i + 1]), torch.tensor(labels[i : i + 1])
        )
        loss.backward()
        length = torch.cat([layer.weight.grad.flatten(), layer.bias.grad]).norm()
        assert found[i] == pytest.approx(float(length), rel=1e-6)


def test_half_precision_logits_keep_small_errors_apart(tmp_path):
    """Published EL2N in float16 is 0 for all sure rows: 1 - 0.9999 rounds to 0."""
    logits = np.array([[10.0, 0, 0, 0], [12.0, 0, 0, 0]], np.float16)
    assert np.float16(1) - np.float16(reference.softmax(logits)[1, 0]) == 0
    with ScoreRecorder(tmp_path / "s", n=2, classes=4) as recorder:
        recorder.record([0, 1], torch.from_numpy(logits), [0, 0], epoch=0)
    found = ScoreStore.open(tmp_path / "s").values("el2n")
    np.testing.assert_allclose(found, reference.el2n(logits[None], [0, 0]), rtol=1e-5)


def test_rows_that_are_not_seen_are_missing_and_the_last_record_of_an_epoch_counts(tmp_path):
    logits, labels, _ = training(epochs=3)
    with ScoreRecorder(tmp_path / "s", n=N, classes=C, divergence=True) as recorder:
        recorder.record([], np.zeros((0, C)), [], epoch=0)
        rows = np.array([4, 9, 4])
        given = logits[[0, 0, 1], rows]
        recorder.record(rows, given, labels[rows], epoch=0)
        recorder.record([9], logits[2][[9]], labels[[9]], epoch=0)
        recorder.record([4], logits[2][[4]], labels[[4]], epoch=5)
    store = ScoreStore.open(tmp_path / "s")
    assert store.epochs == (0, 5)
    margin = store.values("margin")
    assert np.isfinite(margin).tolist() == [
        [i in (4, 9) for i in range(N)],
        [i == 4 for i in range(N)],
    ]
    wanted = reference.margins(logits, labels)
    np.testing.assert_allclose(margin[0, [4, 9]], [wanted[1, 4], wanted[2, 9]], rtol=1e-5)
    p = reference.softmax(logits)
    kl = (p[2, 4] * np.log(p[2, 4] / p[1, 4])).sum()
    np.testing.assert_allclose(store.values("divergence")[1, 4], kl, rtol=1e-4)


def test_a_run_that_was_killed_and_goes_on_is_the_run_that_was_not(tmp_path):
    logits, labels, features, whole = recorded(tmp_path / "whole")
    recorder = ScoreRecorder(tmp_path / "s", n=N, classes=C, divergence=True)
    play(recorder, logits, labels, features, epochs=range(4))
    del recorder  # epoch 3 was not ended: the process is gone
    assert ScoreStore.open(tmp_path / "s").epochs == (0, 1, 2)
    with ScoreRecorder(tmp_path / "s", n=N, classes=C, divergence=True) as recorder:
        play(recorder, logits, labels, features, epochs=range(3, EPOCHS))
    again = ScoreStore.open(tmp_path / "s")
    assert again.epochs == whole.epochs
    for name in ("loss", "margin", "grand", "divergence"):
        np.testing.assert_array_equal(again.values(name), whole.values(name))


def test_an_epoch_that_an_error_broke_off_is_not_written(tmp_path):
    logits, labels, _ = training()
    with (
        pytest.raises(KeyboardInterrupt),
        ScoreRecorder(tmp_path / "s", n=N, classes=C) as recorder,
    ):
        play(recorder, logits, labels, epochs=[0])
        recorder.record([1], logits[1][[1]], labels[[1]], epoch=1)
        raise KeyboardInterrupt
    assert ScoreStore.open(tmp_path / "s").epochs == (0,)


def test_training_again_from_an_epoch(tmp_path):
    logits, labels, _, whole = recorded(tmp_path / "s")
    before = whole.values("loss")
    with (
        pytest.raises(ValueError, match="resume_at=3"),
        ScoreRecorder(tmp_path / "s", n=N, classes=C) as recorder,
    ):
        play(recorder, logits, labels, epochs=[3])
    with ScoreRecorder(tmp_path / "s", n=N, classes=C, resume_at=3) as recorder:
        play(recorder, logits[::-1], labels, epochs=[3])
    again = ScoreStore.open(tmp_path / "s")
    assert again.epochs == (0, 1, 2, 3)
    np.testing.assert_array_equal(again.values("loss")[:3], before[:3])
    np.testing.assert_array_equal(again.values("loss")[3], before[EPOCHS - 1 - 3])


def test_runs_and_ranks_share_a_folder(tmp_path):
    logits, labels, _ = training()
    other, *_ = training(1)
    for rank in range(2):
        with ScoreRecorder(tmp_path / "s", n=N, classes=C, rank=rank) as recorder:
            rows = np.arange(rank, N, 2)
            recorder.record(rows, logits[0][rows], labels[rows], epoch=0)
    with ScoreRecorder(tmp_path / "s", n=N, classes=C, run=7) as recorder:
        play(recorder, other[:1], labels)
    store = ScoreStore.open(tmp_path / "s")
    assert store.runs == (0, 7) and store.records == ((0, 0), (7, 0))
    wanted = reference.margins(np.stack([logits[0], other[0]]), labels)
    np.testing.assert_allclose(store.values("margin"), wanted, rtol=1e-5)
    np.testing.assert_allclose(store.of_run(7).values("margin"), wanted[1:], rtol=1e-5)
    with pytest.raises(ValueError, match=r"run 3; there are runs 0, 7"):
        store.of_run(3)


def test_views(tmp_path):
    *_, store = recorded(tmp_path / "s")
    everything = store.values("loss")
    assert len(store) == store.n == N and store.classes == C
    part = store.subset([5, 2, 9]).subset([2, 0])
    assert len(part) == 2
    np.testing.assert_array_equal(part.values("loss"), everything[:, [9, 5]])
    np.testing.assert_array_equal(
        store.select_epochs(2, 4).subset([1]).values("loss"), everything[2:4, [1]]
    )
    with pytest.raises(ValueError, match=r"epoch from 90 to below 100; .* epochs 0, 1, 2, 3, 4, "):
        store.select_epochs(90, 100)


def test_any_parquet_reader_reads_the_folder(tmp_path):
    *_, store = recorded(tmp_path / "s.parquet")
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.num_rows == N * EPOCHS
    assert [str(table.schema.field(name).type) for name in ("row", "run", "epoch", "correct")] == [
        "int64",
        "int32",
        "int32",
        "uint8",
    ]
    loss = np.empty((EPOCHS, N), np.float32)
    loss[table["epoch"].to_numpy(), table["row"].to_numpy()] = table["loss"].to_numpy()
    np.testing.assert_array_equal(loss, store.values("loss"))
    assert table["divergence"].null_count == N  # the first epoch has nothing before it


def test_a_folder_of_other_data_is_refused(tmp_path):
    recorded(tmp_path / "s")
    for n, classes in ((N + 1, C), (N, C + 1)):
        with pytest.raises(ValueError, match="30 rows and 4 classes"):
            ScoreRecorder(tmp_path / "s", n=n, classes=classes)


def test_a_damaged_part_is_named(tmp_path):
    recorded(tmp_path / "s")
    part = sorted((tmp_path / "s").glob("run-*"))[2]
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ShardError, match=part.name):
        ScoreStore.open(tmp_path / "s")
    part.write_bytes(whole[:100] + bytes(200) + whole[300:])
    with pytest.raises(ShardError, match=part.name):
        ScoreStore.open(tmp_path / "s").values("loss")


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no recorded epoch"):
        ScoreStore.open(tmp_path / "nothing")
    *_, store = recorded(tmp_path / "s")
    with pytest.raises(ValueError, match=r"no 'los'; recorded are: loss, p_y"):
        store.values("los")


def test_a_part_of_no_store_is_refused(tmp_path):
    recorded(tmp_path / "s")
    part = next((tmp_path / "s").glob("run-*"))
    pq.write_table(pq.read_table(part).replace_schema_metadata({}), part)
    with pytest.raises(ShardError, match="not of a score store"):
        ScoreStore.open(tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": [N]}, "rows are 0 to 29"),
        ({"index": [-1]}, "rows are 0 to 29"),
        ({"labels": [C]}, "row 3 has a label that is not a class"),
        ({"labels": [-100]}, "row 3 has a label that is not a class"),
        ({"logits": np.zeros((1, C + 1))}, r"must be \(1, 4\)"),
        ({"logits": [[np.nan, 0, 0, 0]]}, "row 3 has logits that are NaN"),
        ({"logits": [[0, np.inf, 0, 0]]}, "row 3 has logits that are NaN"),
        ({"features": [[np.nan]]}, "row 3 has logits or features that are NaN"),
    ],
)
def test_a_batch_that_makes_no_sense_is_refused(tmp_path, change, message):
    batch = {"index": [3], "logits": np.zeros((1, C)), "labels": [0], **change}
    with ScoreRecorder(tmp_path / "s", n=N, classes=C) as recorder:
        with pytest.raises(ValueError, match=message):
            recorder.record(**batch, epoch=0)
        recorder.record([0], np.zeros((1, C)), [0], epoch=0)


def test_a_crash_while_writing_leaves_no_half_part(tmp_path, monkeypatch):
    logits, labels, _ = training()
    recorder = ScoreRecorder(tmp_path / "s", n=N, classes=C)
    play(recorder, logits, labels, epochs=[0, 1])

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        recorder.end_epoch()
    assert ScoreStore.open(tmp_path / "s").epochs == (0,)
    monkeypatch.undo()
    recorder.end_epoch()
    assert ScoreStore.open(tmp_path / "s").epochs == (0, 1)
