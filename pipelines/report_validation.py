"""The part of a distilled set's report that says how well students learn from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from curate.errors import ShardError
from distill.validation import Row, Validation
from pipelines.report_bars import Bar, bar_chart
from pipelines.report_text import DASH, figure, percent, plain, safe

VALIDATION = "validation"

_KINDS = {"distilled": "first", "teacher": "third"}
_NAMES = {
    "distilled": "distilled images",
    "random": "random real images",
    "coreset": "coreset of real images",
    "teacher": "teacher, all real images",
}
_KEYS = (
    '<span class="key one">distilled</span> <span class="key two">as many real images</span> '
    '<span class="key three">teacher</span>'
)


def validation_section(run: Path, manifest: Mapping[str, Any], *, classes: int) -> str:
    """Return table, charts and scores of the validation, or that there was none.

    Parameters
    ----------
    run : Path
        The run's folder.
    manifest : mapping
        Its manifest.
    classes : int
        Classes of the set.

    Raises
    ------
    ShardError
        If the results are missing or damaged.
    """
    if not manifest.get("params", {}).get("validate_epochs"):
        return (
            "<section>\n<h2>Validation</h2>\n<p>No students were trained on this set. "
            "<code>--test-pool</code> and <code>--validate-epochs</code> do that, beside random "
            "images and a coreset with labels of the same bytes.</p>\n</section>"
        )
    path = run / VALIDATION / "results.json"
    try:
        found = _validation(json.loads(path.read_text(encoding="utf-8")))
        return _section(found, classes)
    except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise ShardError(
            f"{path} is missing or damaged ({error}); remove {path.parent} and run the same "
            "command again"
        ) from error


def _validation(facts: Mapping[str, Any]) -> Validation:
    rows = tuple(
        Row(
            str(row["name"]),
            str(row["network"]),
            row["labels"],
            bool(row["augmented"]),
            tuple(float(value) for value in row["values"]),
            int(row["image_bytes"]),
            int(row["label_bytes"]),
        )
        for row in facts["rows"]
    )
    return Validation(
        rows,
        tuple(facts["seeds"]),
        int(facts["ipc"]),
        int(facts["epochs"]),
        int(facts["batch_size"]),
        str(facts["coreset_method"]),
        {str(name): float(value) for name, value in facts["coreset_trials"].items()},
    )


def _section(found: Validation, classes: int) -> str:
    networks = list(dict.fromkeys(row.network for row in found.rows if row.name != "teacher"))
    charts = "".join(
        _chart(found, network, f"students-{place}", classes)
        for place, network in enumerate(networks)
    )
    soft = any(row.labels == "soft" for row in found.rows)
    labelled = ", their soft labels by the same teachers in the same code" if soft else ""
    text = (
        f"Students trained for {found.epochs:,} epochs in batches of {found.batch_size:,}, each "
        "judged once on the test images, after its last epoch. Random images and the coreset are "
        f"as many as the distilled ones ({found.ipc:,} per class){labelled}. The coreset is that "
        f"of {safe(found.coreset_method)}, chosen on training images."
    )
    return (
        f"<section>\n<h2>Validation</h2>\n<p>{text}</p>\n"
        f'<div class="pair">{charts}{_scores(found, networks)}</div>\n'
        f'<div class="cluster">{_table(found)}</div></section>'
    )


def _chart(found: Validation, network: str, name: str, classes: int) -> str:
    bars = [
        Bar(
            f"{plain(_NAMES.get(row.name, row.name), 30)}{_labels(row)}",
            _accuracy(row.mean, row.std, len(row.values)),
            row.mean,
            kind=_KINDS.get(row.name, "second"),
            spread=row.std if len(row.values) > 1 else None,
            points=row.values if len(row.values) > 1 else (),
        )
        for row in found.rows
        if row.network == network or row.name == "teacher"
    ]
    chart = bar_chart(
        bars,
        name=name,
        title=f"Test accuracy of students of network {plain(network, 60)}",
        mark=1 / classes,
    )
    text = (
        f"Test accuracy, mean ± standard deviation over {len(found.seeds)} seeds; a circle is one "
        f"student. The dashed lines are chance, {percent(1, classes)}."
    )
    return figure(chart, f"Students {safe(network, 60)}", _KEYS, text)


def _labels(row: Row) -> str:
    if row.name == "teacher":
        return ""
    return f", {row.labels} labels" + ("" if row.augmented else ", no augmentation")


def _accuracy(mean: float, std: float, count: int) -> str:
    return f"{100 * mean:.2f} %" if count < 2 else f"{100 * mean:.2f} ± {100 * std:.2f} %"


def _scores(found: Validation, networks: Sequence[str]) -> str:
    """Return DD-Ranking's scores, those for which there are students."""
    plains = any(not row.augmented for row in found.rows)
    rows = "".join(
        f'<tr><th scope="row">{safe(network)}</th>{_score(found.label_robust_scores(network))}'
        + (_score(found.augmentation_robust_scores(network)) if plains else f"<td>{DASH}</td>")
        + "</tr>"
        for network in networks
    )
    lacks = "" if plains else " ARS needs students without augmentation, which were not trained."
    return (
        "<div><table><caption>Scores of DD-Ranking, 0 to 1, the larger the better</caption>"
        '<thead><tr><th scope="col">student</th><th scope="col">label-robust (LRS)</th>'
        '<th scope="col">augmentation-robust (ARS)</th></tr></thead>'
        f'<tbody>{rows}</tbody></table><p class="muted small scores">The teacher stands for a '
        "network trained on all real images: one that was trained for a short time makes LRS look "
        f"better.{lacks}</p></div>"
    )


def _score(values: Sequence[float]) -> str:
    return f"<td>{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}</td>"


def _table(found: Validation) -> str:
    rows = "".join(
        f'<tr><th scope="row">{safe(_NAMES.get(row.name, row.name))}</th><td>{safe(row.network)}'
        f"</td><td>{safe(row.labels)}{'' if row.augmented else ', no augmentation'}</td>"
        f'<td class="n">{_accuracy(row.mean, row.std, len(row.values))}</td>'
        f'<td class="n">{" ".join(f"{100 * value:.2f}" for value in row.values)}</td>'
        f'<td class="n">{row.image_bytes:,}</td><td class="n">{row.label_bytes:,}</td></tr>'
        for row in found.rows
    )
    return (
        '<div class="scroll"><table class="wide">'
        "<caption>Test accuracy beside the bytes that it took</caption>"
        '<thead><tr><th scope="col">trained on</th><th scope="col">network</th>'
        '<th scope="col">labels</th><th scope="col" class="n">accuracy</th>'
        '<th scope="col" class="n">each seed, %</th><th scope="col" class="n">image bytes</th>'
        '<th scope="col" class="n">label bytes</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
