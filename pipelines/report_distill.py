"""The report of a distilled set: its images and what they began as, its bytes, how good it is."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.errors import ShardError
from curate.manifest import NAME
from distill.distilled import encode_image
from pipelines.distilled_rows import SET, DistilledRows
from pipelines.report_bars import Bar, bar_chart
from pipelines.report_distill_pictures import MOST_EXAMPLES, Grid, Picture, collect_grid
from pipelines.report_page import header, page
from pipelines.report_text import (
    DASH,
    attribute,
    facts_table,
    figure,
    number,
    percent,
    plain,
    reason_text,
    safe,
)
from pipelines.report_validation import validation_section

if TYPE_CHECKING:
    from pipelines.report_distill_pictures import Pixels

_EXAMPLES = 10
_SMALL = 64

_BEGUN = {
    "noise": "noise",
    "real": "a real image",
    "patch": "parts of real images, chosen by the first teacher",
}


def distill_report(run: Path, manifest: Mapping[str, Any], *, examples: int | None = None) -> str:
    """Return the report of a run of `curate distill` as HTML.

    Parameters
    ----------
    run : Path
        The run's folder.
    manifest : mapping
        Its manifest.
    examples : int, optional
        The most images per class, 0 to 12; 10 by default.

    Raises
    ------
    ShardError
        If the run was not finished, or what it made is missing or damaged.
    ValueError
        If `examples` is out of range.
    """
    wanted = _EXAMPLES if examples is None else examples
    if not 0 <= wanted <= MOST_EXAMPLES:
        raise ValueError(f"examples is {wanted}; it must be from 0 to {MOST_EXAMPLES}")
    if not {"images", "bytes", "teachers", "rows", "counts"} <= manifest.keys():
        raise ShardError(
            f"{run / NAME} is not the manifest of a finished run; run the same command again to "
            "finish it"
        )
    rows = DistilledRows.open(run / SET)
    grid, pictures = collect_grid(run, rows, examples=wanted)
    told = {**manifest, "pool": {"path": manifest["pool"]["path"], **_mapping(manifest)}}
    told["params"] = {name: _joined(value) for name, value in manifest["params"].items()}
    headline = (
        f"{len(rows):,} images distilled from {manifest['counts'].get('ok', 0):,}: "
        f"{rows.ipc:,} for each of {len(rows.class_names):,} classes"
    )
    sections = [
        header("distill", headline, manifest=told, fingerprint=str(manifest["fingerprint"])),
        _images_section(rows, grid, pictures),
        _set_section(rows, manifest),
        validation_section(run, manifest, classes=len(rows.class_names)),
        _use_section(manifest),
        _footer(str(manifest["fingerprint"])),
    ]
    return page(headline, [section for section in sections if section])


def _mapping(manifest: Mapping[str, Any]) -> dict[str, Any]:
    # Of the columns that a pool may have, distillation reads the image and the class.
    mapping = manifest["pool"].get("mapping") or {}
    return {"mapping": {name: mapping.get(name) for name in ("image", "uid")}}


def _joined(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


# --- the images ---------------------------------------------------------------------------------


def _images_section(rows: DistilledRows, grid: Grid, pictures: Mapping[int, Picture]) -> str:
    if not pictures:
        return ""
    confidence = rows.values("teacher_conf")
    pairs = any(picture.begun is not None for picture in pictures.values())
    classes = "".join(
        _class(int(label), rows, grid, pictures, confidence, pairs=pairs) for label in grid.classes
    )
    judged = (
        " The number is the first teacher's probability of the class at the end."
        if np.isfinite(confidence).any()
        else ""
    )
    return (
        f"<section>\n<h2>The images</h2>\n<p>{_legend(rows, pictures, pairs=pairs)}{judged}"
        f"{_left_out(rows, grid)}</p>\n{classes}</section>"
    )


def _legend(rows: DistilledRows, pictures: Mapping[int, Picture], *, pairs: bool) -> str:
    kinds = sorted({picture.init_kind for picture in pictures.values()})
    what = safe(" or ".join(_BEGUN.get(kind, kind) for kind in kinds))
    if pairs:
        return f"In each pair, above: what the image began as ({what}). Below: what it is now."
    if rows.provenance.get("recipe", {}).get("iterations") == 0:
        return f"This recipe takes no steps: the images are as they began, {what}."
    return f"The images began as {what}, which this run did not keep."


def _left_out(rows: DistilledRows, grid: Grid) -> str:
    missing = []
    if len(grid.classes) < grid.count:
        missing.append(f"{grid.count - len(grid.classes):,} of {grid.count:,} classes")
    if grid.ranks < rows.ipc:
        missing.append(f"{rows.ipc - grid.ranks:,} of {rows.ipc:,} images of each class")
    return f" Left out of this page: {' and '.join(missing)}." if missing else ""


def _class(
    label: int,
    rows: DistilledRows,
    grid: Grid,
    pictures: Mapping[int, Picture],
    confidence: np.ndarray[Any, np.dtype[np.float64]],
    *,
    pairs: bool,
) -> str:
    name = rows.class_names[label]
    items = "".join(
        f"<li>{_tile(pictures[row], name, rank, float(confidence[row]), pairs=pairs)}</li>"
        for rank, row in enumerate(range(label, grid.ranks * grid.count, grid.count))
    )
    mean = _mean(confidence[label :: grid.count])
    of_class = f"mean over its {rows.ipc:,} images {percent(mean, 1)}" if mean == mean else ""
    return (
        f'<article class="cluster"><h3>{safe(name, 80)} <span class="muted small">{of_class}'
        f'</span></h3><ul class="images">{items}</ul></article>'
    )


def _tile(picture: Picture, name: str, rank: int, confidence: float, *, pairs: bool) -> str:
    told = f"{plain(name, 60)}, image {rank}"
    before = ""
    if pairs:
        source = f" of {picture.init_id}" if picture.init_id else ""
        before = _image(picture.begun, f"{told}: began as {picture.init_kind}{source}")
    after = _image(picture.pixels, f"{told}: distilled")
    share = percent(confidence, 1) if np.isfinite(confidence) else ""
    return f'<div class="tile">{before}{after}{share}</div>'


def _image(pixels: Pixels | None, says: str) -> str:
    if pixels is None:
        return '<span class="blank">not kept</span>'
    data = base64.b64encode(encode_image(pixels, "PNG")).decode("ascii")
    kind = ' class="small-image"' if len(pixels) <= _SMALL else ""
    text = attribute(says, 200)
    return f'<img{kind} alt="{text}" title="{text}" src="data:image/png;base64,{data}">'


# --- teachers, losses, bytes --------------------------------------------------------------------


def _set_section(rows: DistilledRows, manifest: Mapping[str, Any]) -> str:
    return (
        "<section>\n<h2>Teachers, labels and bytes</h2>\n"
        f'<div class="pair"><div class="stack">{_teachers(manifest["teachers"])}{_bytes(manifest)}'
        f'</div><div class="stack">{_ends(rows)}{_rows_table(manifest)}</div></div>\n'
        f"<details><summary>All numbers of the recipe {safe(manifest['params'].get('method', ''))}"
        f'</summary><div class="pair">{_recipe(rows)}</div></details></section>'
    )


def _teachers(teachers: list[Mapping[str, Any]]) -> str:
    listed = "".join(
        f'<tr><th scope="row">{safe(teacher["network"])}</th>'
        f'<td class="n">{teacher["epochs"]:,}</td>'
        f'<td class="n">{DASH if teacher["accuracy"] is None else percent(teacher["accuracy"], 1)}'
        f"</td><td><code>{safe(str(teacher['sha256'])[:12])}</code></td></tr>"
        for teacher in teachers
    )
    unknown = any(teacher["accuracy"] is None for teacher in teachers)
    why = "; without --test-pool their accuracy is not known" if unknown else ""
    return (
        f'<div class="scroll"><table><caption>Teachers{why}</caption><thead><tr>'
        '<th scope="col">network</th><th scope="col" class="n">epochs</th>'
        '<th scope="col" class="n">test accuracy</th><th scope="col">sha256</th></tr></thead>'
        f"<tbody>{listed}</tbody></table></div>"
    )


def _bytes(manifest: Mapping[str, Any]) -> str:
    images, labels = int(manifest["bytes"]["images"]), int(manifest["bytes"]["labels"])
    chart = bar_chart(
        [
            Bar("Images", f"{images:,} bytes", images),
            Bar("Soft labels", f"{labels:,} bytes", labels, kind="second"),
        ],
        name="bytes",
        title="Bytes of the images and of the soft labels",
    )
    epochs = int(manifest.get("label_epochs") or 0)
    text = "There are no soft labels."
    if labels:
        text = f"Labels for {epochs:,} epochs of views, {labels / images:.2f} x the images."
    return figure(chart, "Bytes on disk", "", text)


def _ends(rows: DistilledRows) -> str:
    """Return how the images ended, as far as it was measured."""
    confidence = rows.values("teacher_conf")
    facts = {
        "teacher's probability of the class, mean": _or_none(_mean(confidence)),
        "the same, lowest": _or_none(float(np.min(confidence))),
        "loss of the last step, mean": _or_none(_mean(rows.values("recover_loss"))),
        "distance of statistics, mean": _or_none(_mean(rows.values("bn_loss"))),
    }
    return facts_table("How the images ended", facts)


def _mean(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _or_none(value: float) -> str | None:
    return number(value, 4) if np.isfinite(value) else None


def _rows_table(manifest: Mapping[str, Any]) -> str:
    counts = {str(name): int(count) for name, count in manifest["counts"].items()}
    facts = {"usable": counts.pop("ok", 0)}
    facts |= {reason_text(name): count for name, count in sorted(counts.items())}
    return facts_table("Rows of the pool", {**facts, "all": int(manifest["rows"])})


def _recipe(rows: DistilledRows) -> str:
    recipe = {
        str(name).replace("_", " "): value
        for name, value in rows.provenance.get("recipe", {}).items()
    }
    half = -(-len(recipe) // 2)
    items = list(recipe.items())
    return facts_table("Recipe", dict(items[:half])) + facts_table(
        "Recipe, continued", dict(items[half:])
    )


# --- how to use it ------------------------------------------------------------------------------

_LOAD = """import datasets
images = datasets.load_dataset("RUN/distilled", "images", split="train")"""
_LOAD_LABELS = """
views = datasets.load_dataset("RUN/distilled", "labels", split="train", streaming=True)"""
_OPEN = """

import distill
found = distill.DistilledSet.open("RUN/distilled")
found.images.pixels      # (n, size, size, 3) uint8; labels, ipc_rank, init_id beside them"""
_REPLAY = """
found.torch_dataset()    # batches of the recorded views with the teachers' labels"""
_PREFIX = """
found.prefix(1)          # the first image of each class: a smaller set, balanced too"""


def _use_section(manifest: Mapping[str, Any]) -> str:
    labelled = bool(manifest["bytes"]["labels"])
    code = _LOAD + (_LOAD_LABELS if labelled else "") + _OPEN + (_REPLAY if labelled else "")
    code += _PREFIX
    shell = "curate export --run RUN --to image-folder --out OUT"
    return (
        "<section>\n<h2>Use it</h2>\n<p>RUN is the folder that this page lies in.</p>\n"
        f'<pre class="code">{escape(code)}</pre>\n'
        "<p>As files, for torchvision.datasets.ImageFolder:</p>\n"
        f'<pre class="code">{escape(shell)}</pre>\n</section>'
    )


def _footer(fingerprint: str) -> str:
    return (
        f'<footer class="muted">Made by curate from <code>manifest.json</code>, '
        f"<code>distilled/</code>, <code>beginnings/</code> and <code>validation/</code> of run "
        f"<code>{safe(fingerprint[:16])}</code>; the same run gives the same file. This page loads "
        "nothing and runs no scripts.</footer>"
    )
