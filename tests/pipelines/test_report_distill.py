"""The report of `curate distill` on toy pools: the pictures, and what the page says."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

import distill
import pipelines
from curate.errors import ShardError
from curate.manifest import open_step
from distill.dd_ranking import label_robust_score
from pipelines import report_distill_pictures
from pipelines.cli import run as command
from pipelines.report_distill_pictures import Grid, keep_beginnings
from pipelines.reporting import write_report
from tests.conftest import tree
from tests.pipelines.distilled_run import (
    NAMES,
    TINY,
    copy_of,
    make_judged,
    make_plain,
    many,
    quick,
)
from tests.pipelines.test_reporting import Page


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick():
        yield


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_judged(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_plain(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def pool(judged: Path) -> Path:
    return judged.with_name("pool.parquet")


@pytest.fixture
def told(judged: Path, tmp_path: Path) -> Path:
    """The run with accuracies that all differ, which those on a toy pool do not."""
    run = copy_of(judged, tmp_path / "told")
    path, rng = run / "validation" / "results.json", np.random.default_rng(0)
    results = json.loads(path.read_text())
    for row in results["rows"]:
        row["values"] = rng.uniform(0.1, 0.9, len(row["values"])).round(4).tolist()
    path.write_text(json.dumps(results))
    return run


def page_of(run: Path, **options: Any) -> Page:
    return Page(write_report(run, **options).read_text(encoding="utf-8"))


def shown(page: Page) -> dict[str, np.ndarray]:
    """Decode the pictures of a page, by what they say."""
    found = {}
    for attrs in page.all("img"):
        data = base64.b64decode(attrs["src"].removeprefix("data:image/png;base64,"))
        found[attrs["alt"]] = np.asarray(Image.open(io.BytesIO(data)))
    return found


# --- the images -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["default", "cda", "edc"])
def test_each_image_stands_beside_what_it_began_as(pool: Path, tmp_path: Path, method: str) -> None:
    """The reference is recover itself, without a step: patches, noise, real images."""
    out = tmp_path / "run"
    options = {**TINY, "label_epochs": 0, "seed": 3}
    found = pipelines.distill_pool(pool, out=out, ipc=3, method=method, **options).images
    teacher = distill.Teacher.load(out / "teacher-0" / "teacher.safetensors")
    cells = pq.read_table(pool)["image"].to_pylist()
    real = np.stack([np.asarray(Image.open(io.BytesIO(cell["bytes"]))) for cell in cells])
    train = distill.ImageSet.of(
        real, [i % 2 for i in range(24)], class_names=NAMES, ids=[f"<u{i}>" for i in range(24)]
    )
    begun = distill.recover(
        [teacher], train, ipc=3, method=method, iterations=0, seed=3, device="cpu"
    )
    assert not np.array_equal(begun.pixels, found.pixels)
    pictures = shown(page_of(out))
    assert len(pictures) == 2 * len(found)
    for row in range(len(found)):
        name = f"{NAMES[row % 2]}, image {row // 2}"
        source = f" of {begun.init_id[row]}" if begun.init_id[row] else ""
        before = pictures[f"{name}: began as {begun.init_kind[row]}{source}"]
        np.testing.assert_array_equal(before, begun.pixels[row])
        np.testing.assert_array_equal(pictures[f"{name}: distilled"], found.pixels[row])
        if method == "edc":
            np.testing.assert_array_equal(before, real[int(begun.init_id[row][2:-1])])


@pytest.mark.parametrize("method", ["dwa", "cudd", "datadam"])
def test_whole_images_are_those_of_the_pool(pool: Path, tmp_path: Path, method: str) -> None:
    """Whoever chose them: their ids are in the set, so that nothing is made again."""
    options = {**TINY, "iterations": 1, "label_epochs": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(report_distill_pictures, "initialise")
        found = pipelines.distill_pool(pool, out=tmp_path / "run", ipc=1, method=method, **options)
    cells, pictures = pq.read_table(pool)["image"].to_pylist(), shown(page_of(tmp_path / "run"))
    for label, uid in enumerate(found.images.init_id.tolist()):
        real = Image.open(io.BytesIO(cells[int(uid[2:-1])]["bytes"]))
        before = pictures[f"{NAMES[label]}, image 0: began as real of {uid}"]
        np.testing.assert_array_equal(before, np.asarray(real))


def test_a_recipe_without_steps_has_no_before(pool: Path, tmp_path: Path) -> None:
    options = {**TINY, "method": "rded", "iterations": None, "label_epochs": 0}
    found = pipelines.distill_pool(pool, out=tmp_path / "run", ipc=1, **options)
    page = page_of(tmp_path / "run")
    assert "takes no steps" in page.text and "not keep" not in page.text
    assert len(shown(page)) == len(found.images)
    assert not (tmp_path / "run" / "beginnings").exists()


def test_beginnings_of_another_set_are_not_shown(judged: Path, plain: Path, tmp_path: Path) -> None:
    run = copy_of(judged, tmp_path / "run")
    whole = len(shown(page_of(run)))
    shutil.rmtree(run / "beginnings")
    gone = page_of(run)
    assert len(shown(gone)) == whole // 2 == 4 and "did not keep" in gone.text
    shutil.copytree(plain / "beginnings", run / "beginnings")
    assert len(shown(page_of(run))) == 4


def test_what_is_made_again_under_another_id_is_not_shown(
    judged: Path, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another device might choose other patches."""
    run, original = copy_of(judged, tmp_path / "run"), report_distill_pictures._made_again
    teacher = distill.Teacher.load(run / "teacher-0" / "teacher.safetensors")
    pixels = np.load(run / "images" / "pixels.npy")
    train = distill.ImageSet.of(
        pixels, [i % 2 for i in range(24)], class_names=NAMES, ids=[f"<u{i}>" for i in range(24)]
    )

    def other(*given: Any, **options: Any) -> dict[int, Any]:
        found = original(*given, **options)
        return found | {1: (("patch", "<u99>"), found[1][1])}

    monkeypatch.setattr(report_distill_pictures, "_made_again", other)
    shutil.rmtree(run / "beginnings")
    recipe = distill.recipe_for("default", size=8, classes=2)
    keep_beginnings(run, train, [teacher], recipe=recipe, seed=0)
    page = page_of(run)
    assert len(shown(page)) == 7 and page.text.count("not kept") == 1


def test_images_per_class_are_asked_for(judged: Path, tmp_path: Path) -> None:
    run = copy_of(judged, tmp_path / "run")
    none, one, all_ = (page_of(run, examples=n) for n in (0, 1, 12))
    assert [len(shown(page)) for page in (none, one, all_)] == [0, 4, 8]
    assert "1 of 2 images of each class" in one.text and "Left out" not in all_.text
    for wrong in (-1, 13):
        with pytest.raises(ValueError, match="from 0 to 12"):
            write_report(run, examples=wrong)


@pytest.mark.parametrize(("size", "ranks"), [(32, 10), (128, 1)])
def test_many_classes_are_bounded(tmp_path: Path, size: int, ranks: int) -> None:
    run = many(tmp_path / "run", classes=100, ipc=11 if size == 32 else 2, size=size)
    path = write_report(run)
    assert 1_000_000 < path.stat().st_size < 4_000_000
    page = Page(path.read_text())
    pictures = shown(page)
    assert len(pictures) == 2 * 30 * ranks
    assert all(max(picture.shape) == min(size, 96) for picture in pictures.values())
    assert "Left out of this page: 70 of 100 classes and 1 of" in page.text
    assert "c0, image 0: distilled" in pictures and "c99, image 0: distilled" in pictures


@pytest.mark.parametrize("size", [8, 32, 64, 96, 224])
@pytest.mark.parametrize("classes", [2, 10, 29, 30, 31, 1000])
def test_the_grid_is_bounded_for_all_sizes(size: int, classes: int) -> None:
    rows = type("Rows", (), {"class_names": [""] * classes, "ipc": 50, "size": size})
    grid = Grid.of(rows, 12)  # type: ignore[arg-type]
    side = min(size, 96)
    assert len(grid.rows) * 2 * (3 * side * side + 600) * 4 / 3 < 4_000_000
    assert len(set(grid.classes)) == len(grid.classes) == min(classes, 30)
    assert 1 <= grid.ranks <= 12 and grid.rows.max() < 50 * classes
    assert set(Grid.of(rows, 5).rows) <= set(grid.rows)  # type: ignore[arg-type]


# --- the page -------------------------------------------------------------------------------------


def test_page_is_whole_loads_nothing_and_can_be_read_aloud(judged: Path) -> None:
    page = page_of(judged)
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    for tag, attrs in page.elements:
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "style"):
            assert attrs.get(name, "data:image/png;base64,").startswith("data:image/png;base64,")
    policy = next(a for a in page.all("meta") if a.get("http-equiv"))["content"]
    assert "default-src 'none'" in policy and "script-src" not in policy
    style = (judged / "report.html").read_text().split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert page.all("svg") and all(attrs["aria-labelledby"] in ids for attrs in page.all("svg"))
    assert all(attrs["alt"] for attrs in page.all("img"))
    assert len(page.all("table")) == len(page.all("caption"))


def test_hostile_names_stay_text(judged: Path) -> None:
    text = write_report(judged).read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text and "<img src=x" not in text and "<u0>" not in text
    assert all(name in page.text for name in NAMES)


def test_page_says_what_the_run_recorded(judged: Path) -> None:
    page, manifest = page_of(judged), json.loads((judged / "manifest.json").read_text())
    (teacher,) = manifest["teachers"]
    assert f"convnet3 1 {100 * teacher['accuracy']:.2f} % {teacher['sha256'][:12]}" in page.text
    for size in manifest["bytes"].values():
        assert f"{size:,} bytes" in page.text
    assert "4 images distilled from 24: 2 for each of 2 classes" in page.text
    assert "squeeze epochs 1" in page.text and "learning rate 0.25" in page.text
    confidence = distill.DistilledSet.open(judged / "distilled").images.teacher_confidence
    for value in confidence:
        assert f"{100 * float(value):.2f} %" in page.text
    assert f"class, mean {confidence.mean():.4f}" in page.text
    assert f"lowest {confidence.min():.4f}" in page.text


def test_validation_is_shown_as_it_is(told: Path) -> None:
    page = page_of(told)
    results = json.loads((told / "validation" / "results.json").read_text())
    assert {row["name"] for row in results["rows"]} == {
        "distilled", "random", "coreset", "teacher"
    }  # fmt: skip
    by_name = {(row["name"], row["labels"]): row["values"] for row in results["rows"]}
    for row in results["rows"]:
        each = " ".join(f"{100 * value:.2f}" for value in row["values"])
        spread = f" ± {100 * np.std(row['values'], ddof=1):.2f}" if len(row["values"]) > 1 else ""
        accuracy = f"{100 * np.mean(row['values']):.2f}{spread} %"
        assert f"{accuracy} {each} {row['image_bytes']:,} {row['label_bytes']:,}" in page.text
    (full,) = by_name["teacher", "hard"]
    scores = [
        label_robust_score(real_hard=full, distilled_hard=hard, distilled=soft, random=random)
        for hard, soft, random in zip(
            by_name["distilled", "hard"],
            by_name["distilled", "soft"],
            by_name["random", "soft"],
            strict=True,
        )
    ]
    assert f"{np.mean(scores):.4f} ± {np.std(scores, ddof=1):.4f}" in page.text
    assert "chance, 50.00 %" in page.text
    circles = page.all("circle")
    assert len(circles) == sum(len(values) for values in by_name.values() if len(values) > 1)


def test_bars_are_as_long_as_their_values(told: Path) -> None:
    text = write_report(told).read_text()
    chart = re.search(r'<svg[^>]*aria-labelledby="students-0-title".*?</svg>', text, re.S)
    assert chart is not None
    widths = re.findall(r'<rect class="(first|second|third)"[^>]*width="([\d.]+)"', chart[0])
    rows = json.loads((told / "validation" / "results.json").read_text())["rows"]
    means = np.array([np.mean(row["values"]) for row in rows])
    drawn = np.array([float(width) for _, width in widths])
    assert len(drawn) == len(means) and drawn.max() <= 476
    np.testing.assert_allclose(drawn / drawn.max(), means / means.max(), atol=1e-3)
    kinds = {"distilled": "first", "teacher": "third"}
    assert [kind for kind, _ in widths] == [kinds.get(row["name"], "second") for row in rows]


def test_run_without_students_labels_and_test_images(plain: Path) -> None:
    page = page_of(plain)
    assert "No students were trained" in page.text and "±" not in page.text
    assert "without --test-pool their accuracy is not known" in page.text
    assert "There are no soft labels." in page.text and "torch_dataset" not in page.text
    assert len(shown(page)) == 4


def test_what_the_page_says_to_run_runs(
    judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    python, shell = re.findall(
        r'<pre class="code">(.*?)</pre>', write_report(judged).read_text(), re.S
    )
    scope: dict[str, Any] = {}
    exec(unescape(python).replace("RUN", str(judged)), scope)
    assert len(scope["images"]) == 4 and len(list(scope["views"])) == 8
    assert scope["found"].images.class_names == tuple(NAMES)
    words = unescape(shell).replace("RUN", str(judged)).replace("OUT", str(tmp_path / "out"))
    assert command(words.split()[1:]) == 0
    assert len(ImageFolder(tmp_path / "out")) == 4


def test_same_run_gives_the_same_bytes(judged: Path, tmp_path: Path) -> None:
    made_by_the_run = (judged / "report.html").read_bytes()
    assert command(["report", "--run", str(judged)]) == 0
    assert (judged / "report.html").read_bytes() == made_by_the_run
    elsewhere = copy_of(judged, tmp_path / "run", times={"seconds": 99})
    assert write_report(elsewhere).read_bytes() == made_by_the_run
    assert not list(judged.rglob("*.tmp"))


def test_the_same_command_writes_a_report_that_is_gone(plain: Path, tmp_path: Path) -> None:
    """As a run has none that an earlier version made."""
    run = copy_of(plain, tmp_path / "run")
    before = tree(run)
    (run / "report.html").unlink()
    shutil.rmtree(run / "beginnings")
    options = {**TINY, "ipc": 1, "method": "cda", "label_epochs": 0}
    pipelines.distill_pool(plain.with_name("pool.parquet"), out=run, **options)
    assert tree(run) == before


# --- runs that cannot be reported -----------------------------------------------------------------


def test_unfinished_and_damaged_runs(
    judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = tmp_path / "begun"
    open_step(begun, step="distill", step_version=1, params={}, inputs={})
    with pytest.raises(ShardError, match="not the manifest of a finished run"):
        write_report(begun)
    run = copy_of(judged, tmp_path / "run")
    (run / "validation" / "results.json").write_text('{"rows": [{}]}')
    with pytest.raises(ShardError, match=r"results\.json is missing or damaged"):
        write_report(run)
    (file,) = (run / "distilled" / "images").iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-200])
    assert command(["report", "--run", str(run)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no whole distilled set" in line
    file.unlink()
    with pytest.raises(ShardError, match="files of images are missing"):
        write_report(run)


def test_damaged_beginnings_are_left_out(judged: Path, tmp_path: Path) -> None:
    run = copy_of(judged, tmp_path / "run")
    (run / "beginnings" / "pixels.npy").write_bytes(b"no array")
    assert "did not keep" in page_of(run).text


def test_kept_pictures_are_made_once(
    judged: Path, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(report_distill_pictures, "initialise")
    (judged / "report.html").unlink()
    test = pool.with_name("test.parquet")
    options = {**TINY, "ipc": 2, "test_pool": test, "validate_epochs": 1}
    pipelines.distill_pool(pool, out=judged, **options)
    assert (judged / "report.html").exists()
