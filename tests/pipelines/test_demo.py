from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import shlex

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from curate.encoder import load_encoder
from curate.errors import FingerprintError
from curate.images import decode
from curate.pool import Pool
from curate.shards import read_parts
from pipelines import demo, demo_model, demo_pool
from pipelines.demo_model import Pairs

ROWS = 800
SMALL = {"rows": ROWS, "steps": 40, "seeds": 1, "epsilon": 1e-5}


@pytest.fixture(scope="module")
def scans():
    return demo_pool.load_scans(0)


@pytest.fixture(scope="module")
def pool(scans, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "pool"
    demo_pool.build_pool(folder, scans[2], seed=0, rows=ROWS)
    return folder


def files(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("*.parquet")
    }


# --- The pool ---------------------------------------------------------------------------------


def test_no_scan_is_trusted_held_out_and_in_the_pool(scans):
    numbers = np.concatenate([part.number for part in scans])
    assert [len(part) for part in scans] == [237, 360, 1200]
    assert sorted(numbers.tolist()) == list(range(1797))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(scans, pool, tmp_path):
    demo_pool.build_pool(tmp_path / "again", scans[2], seed=0, rows=ROWS)
    demo_pool.build_pool(tmp_path / "other", scans[2], seed=1, rows=ROWS)
    assert files(tmp_path / "again") == files(pool)
    assert files(tmp_path / "other") != files(pool)


def test_the_shares_of_spoiled_rows_are_as_stated(pool):
    rows = read_parts(pool, demo_pool.SHARDS)
    images = [decode(image["bytes"]) for image in rows["image"].to_pylist()]
    junk = rows["scan"].to_numpy() == demo_pool.NO_SCAN
    wrong = rows["caption_is_wrong"].to_numpy()
    broken = np.array([image.status != "ok" for image in images])
    assert (wrong.sum(), junk.sum(), broken.sum()) == (280, 80, 4)
    assert not (wrong & junk).any() and not (broken & (junk | wrong)).any()


def test_a_caption_is_wrong_exactly_if_it_names_another_digit(scans, pool):
    rows = read_parts(pool, demo_pool.SHARDS).to_pylist()
    digit = dict(zip(scans[2].number.tolist(), scans[2].digits.tolist(), strict=True))
    for row in rows:
        if row["scan"] != demo_pool.NO_SCAN:
            right = demo_model.named_digit(row["text"]) == digit[row["scan"]]
            assert row["caption_is_wrong"] is not right


def test_popular_scans_come_again_as_other_bytes_and_nearly_the_same_picture(scans, pool):
    rows = read_parts(pool, demo_pool.SHARDS).to_pylist()
    scan = np.array([row["scan"] for row in rows])
    numbers, counts = np.unique(scan[scan != demo_pool.NO_SCAN], return_counts=True)
    popular = numbers[counts.argmax()]
    # Zipf: the most popular of 1,200 has 13% of the draws, a middling one 0.02%.
    assert counts.max() > 0.08 * ROWS and np.median(counts) <= 2
    copies = [row["image"]["bytes"] for row in rows if row["scan"] == popular]
    assert len(set(copies)) > 0.95 * len(copies)
    original = scans[2].images[scans[2].number == popular][0].astype(float)
    other = scans[2].images[scans[2].number != popular].astype(float)
    shown = [decode(data).image for data in copies]
    near = [np.abs(np.asarray(i.getchannel(0)) - original).mean() for i in shown if i is not None]
    assert np.median(near) < np.median(np.abs(other - original).mean(axis=(1, 2)))


def test_the_pool_opens_as_any_pool(pool):
    opened = Pool.open(pool)
    assert len(opened) == ROWS
    assert (opened.mapping.uid, opened.mapping.image, opened.mapping.text) == (
        "uid",
        "image",
        "text",
    )
    metadata = pq.read_schema(pool / "part-00000.parquet").metadata
    features = json.loads(metadata[b"huggingface"])["info"]["features"]
    assert list(features) == opened.columns and features["image"] == {"_type": "Image"}


# --- The model --------------------------------------------------------------------------------


def test_the_toolkits_encoder_loads_the_saved_model_and_agrees_with_it(scans, tmp_path):
    trusted, held_out, _ = scans
    pairs = Pairs(trusted.images, demo_pool.captions_for(trusted.digits, 0, "trusted"))
    demo_model.build_model(tmp_path, pairs, held_out, seed=0, steps=2)
    model = demo_model.new_model(0).eval()
    model.load_state_dict(load_file(tmp_path / demo_model.WEIGHTS_FILE))
    encoder = load_encoder(
        str(tmp_path / demo_model.CONFIG_FILE),
        str(tmp_path / demo_model.WEIGHTS_FILE),
        device="cpu",
        precision="fp32",
    )
    images = [decode(demo_pool._saved(image, "PNG")).image for image in held_out.images[:8]]
    inputs = torch.stack([encoder.preprocess(image) for image in images])
    ours = demo_model.prepare(torch.from_numpy(held_out.images[:8]))
    assert torch.allclose(inputs, ours, atol=1e-6)
    with torch.inference_mode():
        image = model.encode_image(ours, normalize=True).numpy()
        text = model.encode_text(demo_model.tokenize(["the number six"]), normalize=True).numpy()
    np.testing.assert_allclose(encoder.encode_images(inputs), image, atol=1e-4)
    np.testing.assert_allclose(encoder.encode_texts(["the number six"]), text, atol=1e-4)


def test_every_caption_fits_the_models_context():
    longest = [template.format("seven") for template in demo_pool.TEMPLATES]
    end = demo_model.CONFIG["text_cfg"]["vocab_size"] - 1
    tokens = demo_model.tokenize(longest)
    # The tokenizer writes the end over the last word of a caption that is too long.
    seven = int(demo_model.tokenize(["seven"])[0, 1])
    assert ((tokens == end).sum(dim=1) == 1).all()
    assert ((tokens == seven).sum(dim=1) == 1).all()


def test_training_depends_on_the_seed_alone_and_leaves_the_random_state(scans):
    trusted = scans[0]
    pairs = Pairs(trusted.images, demo_pool.captions_for(trusted.digits, 0, "trusted"))
    before = torch.get_rng_state()
    states = []
    for seed in (0, 0, 1):
        with demo_model._threads(1):
            model = demo_model.new_model(seed)
            demo_model.train(model, pairs, steps=3, seed=seed, augment=True)
        states.append(model.get_parameter("logit_scale").item())
    assert torch.equal(before, torch.get_rng_state())
    assert states[0] == states[1] != states[2]


def test_pairs_are_as_many_images_as_captions():
    with pytest.raises(ValueError, match="2 images, but 1 captions"):
        Pairs(np.zeros((2, 32, 32), np.uint8), ["one"])


# --- The whole --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "curate-demo"
    stream = io.StringIO()
    result = demo.run_demo(out, **SMALL, stream=stream)
    return out, result, stream.getvalue()


def test_it_runs_the_real_prune_and_meets_the_budget(ran):
    out, result, _ = ran
    budget = math.floor(0.28 * ROWS + 0.5)
    assert result.counts["kept"] == result.after.rows == budget
    assert sum(result.counts.values()) == result.before.rows == ROWS
    assert result.counts["decode_failed"] == 4
    assert result.report == out / "run" / "report.html" and result.report.exists()
    assert set(result.accuracy) == {"full", "random", "pruned"}
    assert all(0 <= value <= 1 for values in result.accuracy.values() for value in values)


def test_the_kept_rows_keep_their_columns(ran):
    out, result, _ = ran
    before = {row["uid"]: row for row in read_parts(out / "pool", demo_pool.SHARDS).to_pylist()}
    kept = read_parts(out / "run" / "pool", demo_pool.SHARDS).to_pylist()
    assert len(kept) == result.after.rows
    assert all(row == before[row["uid"]] for row in kept)


def test_the_story_says_what_came_out(ran):
    out, result, story = ran
    assert max(map(len, story.replace(str(out), "curate-demo").splitlines())) <= 88
    for reason, count in result.counts.items():
        assert f"  {reason:<18}{count:>8,}\n" in story
    assert f"{100 * result.after.wrong_captions / result.after.rows:.1f}%" in story
    assert f"{100 * result.accuracy['pruned'][0]:.1f}" in story
    assert story.endswith(f"report  {result.report}\n")


def test_the_printed_command_prunes_the_same(ran):
    from pipelines.cli import app
    from pipelines.pruning import run_prune

    out, result, story = ran
    printed = story[story.index("curate prune") : story.index("\n\nthe ledger")]
    words = shlex.split(printed.replace("\\\n", " "))
    assert words == list(result.command)
    _, bound, _ = app.parse_args(words[1:], exit_on_error=False, print_error=False)
    (config,) = bound.args
    run_prune(dataclasses.replace(config, out=out.parent / "by-hand"))
    assert files(out.parent / "by-hand" / "pool") == files(out / "run" / "pool")


def test_a_second_run_uses_what_the_first_has_made(ran):
    out, result, _ = ran
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    stream = io.StringIO()
    again = demo.run_demo(out, **SMALL, stream=stream)
    assert again.accuracy == result.accuracy and again.counts == result.counts
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == made


def test_a_folder_of_other_parameters_or_other_files_is_left_alone(ran, tmp_path):
    out, _, _ = ran
    stream = io.StringIO()
    with pytest.raises(FingerprintError, match="left alone"):
        demo.run_demo(out, **SMALL, keep=0.29, stream=stream)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FingerprintError, match="Choose another --out"):
        demo.run_demo(tmp_path, stream=stream)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert stream.getvalue() == ""


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"seeds": 0}, {"rows": 3}, {"keep": 1.0}])
def test_numbers_out_of_range_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="are needed"):
        demo.run_demo(tmp_path / "out", stream=io.StringIO(), **wrong)
    assert not (tmp_path / "out").exists()


def test_a_worse_result_is_called_worse():
    assert demo._compared((0.5,), (0.75,)) == "25.0 points worse"
    assert demo._compared((0.98, 0.96), (0.80, 0.84)) == "15.0 points better"
    within = demo._compared((0.9, 0.8), (0.88, 0.84))
    assert within == "1.0 points worse, less than the spread of the seeds"
