"""The report of a run: one HTML file that says what was kept, what was not, and why.

`summarise` checks that the ledger says what the manifest says, `format_summary` prints that for a
terminal, `write_report` writes ``report.html`` into the run folder.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.errors import PoolError, ShardError
from curate.manifest import NAME, atomic_write_bytes
from curate.shards import read_part
from pipelines.report_figures import LEDGER, collect_figures, part_numbers, reason_codes

if TYPE_CHECKING:
    from curate.pool import Pool

REPORT = "report.html"


@dataclass(frozen=True)
class StageCounts:
    """What one stage of a run did: `rows_in` less the rows of `dropped` is `rows_out`."""

    stage: str
    rows_in: int
    dropped: Mapping[str, int]
    rows_out: int


@dataclass(frozen=True)
class RunSummary:
    """What a run did, as its manifest says it and its ledger confirms it.

    Attributes
    ----------
    step, fingerprint : str
    rows, kept : int
        Rows of the pool, and how many of them stayed.
    budget : int or None
        How many were to stay.
    counts : mapping of str to int
        Rows per reason; they add up to `rows`.
    stages : tuple of StageCounts
        In the order in which they ran.
    warnings : tuple of str
    manifest : mapping
        The whole manifest, for what only the report shows.
    """

    step: str
    fingerprint: str
    rows: int
    kept: int
    budget: int | None
    counts: Mapping[str, int]
    stages: tuple[StageCounts, ...]
    warnings: tuple[str, ...]
    manifest: Mapping[str, Any]

    @property
    def headline(self) -> str:
        """One sentence: what happened."""
        share = f"{100 * self.kept / self.rows:.2f} %" if self.rows else "none"
        if self.budget is None:
            asked = ""
        elif self.budget == self.kept:
            asked = ", as asked"
        else:
            asked = f"; {self.budget:,} were asked for"
        return f"{self.kept:,} of {self.rows:,} rows kept ({share}{asked})"


def summarise(run: Path) -> RunSummary:
    """Read what a run did, and check the manifest against the ledger.

    Parameters
    ----------
    run : Path
        A run folder, as `curate prune` and `curate coreset` write it.

    Raises
    ------
    ShardError
        If there is no manifest or no ledger, or if their numbers differ or do not add up.
    """
    run = Path(run)
    manifest = _read_manifest(run / NAME)
    if manifest.get("step") == "distill":
        raise PoolError(f"{run} is a run of curate distill, which keeps no rows and has no ledger")
    try:
        stages = tuple(
            StageCounts(
                str(stage["stage"]),
                int(stage["rows_in"]),
                {str(reason): int(count) for reason, count in stage["dropped"].items()},
                int(stage["rows_out"]),
            )
            for stage in manifest.get("stages", [])
        )
        counts = {str(reason): int(count) for reason, count in manifest["counts"].items()}
        budget = manifest.get("budget")
        summary = RunSummary(
            step=str(manifest["step"]),
            fingerprint=str(manifest["fingerprint"]),
            rows=int(manifest["rows"]),
            kept=counts.get("kept", 0),
            budget=None if budget is None else int(budget),
            counts=counts,
            stages=stages,
            warnings=tuple(str(warning) for warning in manifest.get("warnings", [])),
            manifest=manifest,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ShardError(
            f"{run / NAME} is not the manifest of a finished run ({error!r}); "
            "run the same command again to finish it"
        ) from error
    _check(run, summary)
    return summary


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ShardError(f"{path.parent} is not a run folder: it has no {path.name}") from error
    except (ValueError, OSError) as error:
        raise ShardError(f"{path} is not readable as JSON ({error})") from error
    if not isinstance(manifest, dict):
        raise ShardError(f"{path} is not a manifest: it holds a {type(manifest).__name__}")
    return manifest


def _check(run: Path, summary: RunSummary) -> None:
    """Raise if the numbers do not add up, or if the ledger does not confirm them."""
    rows = summary.rows
    for stage in summary.stages:
        if stage.rows_in != rows or stage.rows_in - sum(stage.dropped.values()) != stage.rows_out:
            raise ShardError(
                f"stage {stage.stage!r} of {run / NAME} does not add up: {rows:,} rows came, "
                f"{stage.rows_in:,} went in, {sum(stage.dropped.values()):,} were dropped, "
                f"{stage.rows_out:,} came out"
            )
        rows = stage.rows_out
    counted = ledger_counts(run)
    recorded = {reason: count for reason, count in summary.counts.items() if count}
    if counted != recorded or sum(counted.values()) != summary.rows:
        differing = ", ".join(
            f"{reason} ({recorded.get(reason, 0):,} in the manifest, {counted.get(reason, 0):,} "
            "in the ledger)"
            for reason in sorted(counted.keys() | recorded.keys())
            if counted.get(reason) != recorded.get(reason)
        )
        total = f"rows ({summary.rows:,} in the manifest, {sum(counted.values()):,} in the ledger)"
        raise ShardError(
            f"manifest and ledger of {run} differ: {differing or total}; "
            "run the same command again with --overwrite"
        )
    if summary.stages and rows != summary.kept:
        raise ShardError(
            f"{run / NAME}: {rows:,} rows came out of the last stage, {summary.kept:,} were kept"
        )


def ledger_counts(run: Path) -> dict[str, int]:
    """Count the rows of the ledger by reason, one part at a time.

    Raises
    ------
    ShardError
        If a part is damaged, or if a row is kept for another reason than ``kept``.
    """
    counts: Counter[str] = Counter()
    for index in part_numbers(run / LEDGER):
        table = read_part(run / LEDGER, index, ["kept", "reason"])
        codes, reasons = reason_codes(table)
        says_kept = np.array([reason == "kept" for reason in reasons], dtype=np.bool_)[codes]
        kept = np.asarray(table.column("kept").to_numpy(), dtype=np.bool_)
        if not np.array_equal(says_kept, kept):
            row = int(np.flatnonzero(says_kept != kept)[0])
            raise ShardError(
                f"row {row:,} of part {index} of {run / LEDGER} has kept = {bool(kept[row])} but "
                f"reason = {reasons[codes[row]]!r}"
            )
        tally = np.bincount(codes, minlength=len(reasons))
        counts.update({reason: int(n) for reason, n in zip(reasons, tally, strict=True)})
    return dict(counts)


def format_summary(run: Path) -> str:
    """Return what a run did as a small table of plain text.

    Raises
    ------
    ShardError
        As `summarise`.
    """
    summary = summarise(run)
    lines = [("stage", "rows in", "dropped", "reason", "rows out")]
    for stage in summary.stages:
        dropped = [(f"{n:,}", reason) for reason, n in stage.dropped.items() if n] or [("0", "")]
        for number, (count, reason) in enumerate(dropped):
            first, last = number == 0, number == len(dropped) - 1
            lines.append(
                (
                    stage.stage if first else "",
                    f"{stage.rows_in:,}" if first else "",
                    count,
                    reason,
                    f"{stage.rows_out:,}" if last else "",
                )
            )
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    text = [summary.headline]
    if summary.stages:
        text += ["", *(_aligned(line, widths) for line in lines)]
    text += [f"warning: {warning}" for warning in summary.warnings]
    return "\n".join(text)


def _aligned(cells: tuple[str, ...], widths: list[int]) -> str:
    # Names stand left, numbers right.
    sides = "<>><>"
    joined = (f"{c:{s}{w}}" for c, s, w in zip(cells, sides, widths, strict=True))
    return "  ".join(joined).rstrip()


def write_report(run: Path, *, examples: int | None = None, pool: Pool | None = None) -> Path:
    """Write ``report.html`` into a run folder, whole or not at all.

    The file needs nothing but itself: no scripts, fonts or pictures from elsewhere. It holds no
    times, so that the same run gives the same bytes.

    Parameters
    ----------
    run : Path
        A run folder, as `curate prune`, `curate coreset` and `curate distill` write it.
    examples : int, optional
        Most rows in each strip of example rows, or images of each class of a distilled set, 0 to
        12; by default 6 rows, or 10 images.
    pool : Pool, optional
        The pool that the run read; opened from where the manifest says it lies if not given. If
        it cannot be read any more, the report has a note in place of pictures.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ShardError
        As `summarise`; for a distilled set, if it is missing or damaged.
    ValueError
        If `examples` is out of range.
    """
    run = Path(run)
    path, manifest = run / REPORT, _read_manifest(run / NAME)
    if manifest.get("step") == "distill":
        from pipelines.report_distill import distill_report

        text = distill_report(run, manifest, examples=examples)
    else:
        text = _ledger_report(run, 6 if examples is None else examples, pool)
    atomic_write_bytes(path, text.encode())
    return path


def _ledger_report(run: Path, examples: int, pool: Pool | None) -> str:
    from pipelines.report_coreset import collect_choice
    from pipelines.report_examples import MOST_EXAMPLES, collect_examples
    from pipelines.report_page import render

    if not 0 <= examples <= MOST_EXAMPLES:
        raise ValueError(f"examples is {examples}; it must be from 0 to {MOST_EXAMPLES}")
    summary = summarise(run)
    epsilon = summary.manifest.get("params", {}).get("epsilon")
    figures = collect_figures(
        run,
        epsilon=float(epsilon) if isinstance(epsilon, int | float) else None,
        low_scores=summary.counts.get("low_clip_score", 0) > 0,
    )
    shown = collect_examples(run, summary, figures.clusters, count=examples, pool=pool)
    choice = collect_choice(run, summary.kept) if summary.step == "coreset" else None
    return render(summary, figures, shown, choice)
