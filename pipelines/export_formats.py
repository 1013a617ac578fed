"""`curate export`: what a run kept, in the format that the next tool reads."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from curate.errors import PoolError
from curate.manifest import StepFolder, atomic_path, locked, open_step
from curate.progress import task
from curate.shards import missing_parts, part_path, write_parquet, write_part
from pipelines.distilled_rows import is_distilled
from pipelines.executor import LocalExecutor
from pipelines.kept_rows import KeptRows
from pipelines.url_list import command_line, img2dataset_arguments, url_columns
from pipelines.webdataset_export import check_images, write_tars

logger = logging.getLogger(__name__)

To = Literal["parquet", "webdataset", "datacomp", "img2dataset", "uids", "image-folder"]

#: As img2dataset and DataComp do.
SAMPLES_PER_TAR = 10_000

_UIDS = pa.schema([("uid", pa.string()), ("weight", pa.float32())])


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes
    ----------
    path : Path
        The folder.
    to : str
        The format.
    rows : int
        Kept rows of the run, or its distilled images.
    written : int
        Samples or entries in the export; fewer than `rows` where rows have no image, more where a
        weight repeats a row.
    notes : tuple of str
        What to know and what to run next, a line each.
    """

    path: Path
    to: To
    rows: int
    written: int
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """Return it as text for a terminal."""
        if self.to == "image-folder":
            return "\n".join([f"{self.to:<11} {self.path} ({self.written:,} images)", *self.notes])
        head = f"{self.to:<11} {self.path} ({self.written:,} of {self.rows:,} kept rows)"
        if self.written > self.rows:
            head = f"{self.to:<11} {self.path} ({self.written:,} entries, {self.rows:,} kept rows)"
        return "\n".join([head, *self.notes])


def run_export(
    run: str | Path,
    to: To,
    out: str | Path | None = None,
    *,
    samples_per_tar: int = SAMPLES_PER_TAR,
    workers: int = 1,
    overwrite: bool = False,
) -> Exported:
    """Write the kept rows of a run, or its distilled images, in another format.

    Parameters
    ----------
    run : str or Path
        A folder that `curate prune`, `curate coreset` or `curate distill` wrote.
    to : {"parquet", "webdataset", "datacomp", "img2dataset", "uids", "image-folder"}
        Parquet shards (the run's own ``pool/``, or hard links to it); tars for streaming; the
        subset file of DataComp's resharder; a list of addresses for img2dataset; the uids alone.
        Of `curate distill`: PNG files in a folder for each class.
    out : str or Path, optional
        Where to write; ``RUN/export-TO`` if not given.
    samples_per_tar : int
        Kept rows per tar.
    workers : int
        Processes that write tars.
    overwrite : bool
        Replace an export of another selection.

    Returns
    -------
    Exported

    Raises
    ------
    PoolError
        If `run` is not a run, or not of the kind that the format is for, or its rows lack what the
        format needs: images, addresses, uids of 32 hexadecimal digits.
    ShardError
        If the run is not complete, or its parts do not belong together.
    FingerprintError
        If the folder holds another export and `overwrite` is off.
    ValueError
        If the format is unknown, or a count is below 1.
    """
    if to not in get_args(To):
        raise ValueError(f"to must be one of {', '.join(get_args(To))}; got {to!r}")
    if samples_per_tar < 1 or workers < 1:
        raise ValueError(
            f"samples_per_tar and workers must be at least 1, got {samples_per_tar} and {workers}"
        )
    _check_out(Path(run), out)
    if to == "image-folder":
        from pipelines.export_distilled import export_images  # it loads torch

        return export_images(Path(run), out, overwrite=overwrite)
    if is_distilled(Path(run)):
        raise PoolError(
            f"{run} is a run of curate distill, whose images are no rows of the pool: --to {to} "
            "does not apply. Use --to image-folder; its distilled/ holds Parquet already"
        )
    rows = KeptRows.open(run)
    if to == "parquet" and out is None:
        return _in_place(rows)
    task_of_format = _Export(rows, to, samples_per_tar, workers)
    task_of_format.check()
    folder = rows.run / f"export-{to}" if out is None else Path(out)
    with locked(folder):
        step = open_step(
            folder,
            step="export",
            step_version=1,
            params={"to": to, **({"samples_per_tar": samples_per_tar} if to == _TARS else {})},
            inputs={"selection": rows.fingerprint},
            overwrite=overwrite,
        )
        exported = task_of_format.write(step)
    for note in exported.notes:
        if note.startswith("warning: "):
            logger.warning("%s", note.removeprefix("warning: "))
    return exported


_TARS = "webdataset"


@dataclass(frozen=True)
class _Export:
    """One export: a check before anything is written, and a writer, for each format."""

    rows: KeptRows
    to: To
    samples_per_tar: int
    workers: int

    def check(self) -> None:
        """Refuse what cannot work before a folder is made."""
        if self.to == _TARS:
            check_images(self.rows)
        elif self.to == "img2dataset":
            self.rows.check_pool()
            url_columns(self.rows.schema(), self.rows.mapping, source=f"{self.rows.pool}")
        elif self.to == "parquet":
            self.rows.check_pool()
        else:
            for table in self.rows.uids():
                _CHECKS[self.to](table["uid"])

    def write(self, step: StepFolder) -> Exported:
        """Write what is missing, and finish the step."""
        writers: dict[str, Callable[[Path], Exported]] = {
            "parquet": self._parquet,
            _TARS: self._tars,
            "datacomp": self._datacomp,
            "img2dataset": self._url_list,
            "uids": self._uid_list,
        }
        exported = writers[self.to](step.path)
        if not step.complete:
            step.finish(rows=exported.rows, written=exported.written, notes=list(exported.notes))
        return exported

    def _parquet(self, out: Path) -> Exported:
        for part in missing_parts(out, self.rows.parts):
            _link(part_path(self.rows.pool, part), part_path(out, part))
        card = self.rows.pool / "README.md"
        if card.exists():
            _link(card, out / card.name)
        count = int(self.rows.part_rows().sum())
        return Exported(out, self.to, count, count)

    def _tars(self, out: Path) -> Exported:
        total, counts = write_tars(
            self.rows,
            out,
            samples_per_tar=self.samples_per_tar,
            executor=LocalExecutor(self.workers),
        )
        last = f"{len(counts.sizes) - 1:05d}"
        shards = "00000.tar" if len(counts.sizes) == 1 else f"{{00000..{last}}}.tar"
        notes = [
            "train       python -m open_clip_train.main --dataset-type webdataset "
            f"--train-data '{out.absolute()}/{shards}' --train-num-samples {counts.samples} ..."
        ]
        left_out = {name: n for name, n in counts.statuses.items() if name != "success"}
        if left_out:
            listed = ", ".join(f"{n:,} {name}" for name, n in sorted(left_out.items()))
            notes.append(
                f"warning: {total - counts.samples:,} kept rows are not in the tars ({listed}); "
                "the column status of the Parquet file beside each tar names them"
            )
        return Exported(out, self.to, total, counts.samples, tuple(notes))

    def _datacomp(self, out: Path) -> Exported:
        tables = list(self.rows.uids())
        subset = np.concatenate([subset_entries(t["uid"], t["weight"]) for t in tables])
        # By the upper, then the lower half: the order that np.searchsorted has for this type.
        subset = subset[np.lexsort((subset["f1"], subset["f0"]))]
        path = out / "subset.npy"
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, subset, allow_pickle=False)
        count = sum(table.num_rows for table in tables)
        notes = [f"next        python resharder.py -s {path.absolute()} -i SHARDS -o OUT"]
        if self.rows.mapping.uid is None:
            notes.append(
                "warning: the pool has no uid column, so its uids were derived here; DataComp's "
                "shards do not hold them, and the resharder will find none"
            )
        if len(subset) != count:
            notes.append(
                f"warning: weights above 1 make {len(subset):,} entries of {count:,} rows; the "
                "resharder writes a row as often as its uid occurs"
            )
        return Exported(out, self.to, count, len(subset), tuple(notes))

    def _url_list(self, out: Path) -> Exported:
        columns = url_columns(self.rows.schema(), self.rows.mapping, source=f"{self.rows.pool}")
        schema = columns.schema(self.rows.schema())
        counts = self.rows.part_rows()
        todo = missing_parts(out, self.rows.parts)
        with task(
            "export", total=int(counts.sum()), done=int(counts.sum() - counts[todo].sum())
        ) as (advance):
            for part in todo:
                batches: Iterator[pa.RecordBatch] = (
                    columns.batch(batch, uids)
                    for uids, batch in self.rows.part_batches(part, columns.originals)
                )
                advance(write_part(out, part, batches, schema=schema))
        images = out.absolute().with_name(f"{out.absolute().name}-images")
        arguments = img2dataset_arguments(out, images, columns)
        notes = [
            f"next        curate download --pool {out} --out {images}",
            f"or          {command_line('img2dataset', arguments)}",
        ]
        renamed = [f"{old} is {new}" for old, new in columns.others if old != new]
        if renamed:
            notes.append(
                f"renamed     {', '.join(renamed)}: img2dataset keeps the names for itself"
            )
        total = int(counts.sum())
        return Exported(out, self.to, total, total, tuple(notes))

    def _uid_list(self, out: Path) -> Exported:
        tables = [table.cast(_UIDS) for table in self.rows.uids()]
        with atomic_path(out / "kept.txt") as temporary, temporary.open("wb") as file:
            for table in tables:
                file.writelines(f"{uid}\n".encode() for uid in table["uid"].to_pylist())
        with atomic_path(out / "kept.parquet") as temporary:
            write_parquet(temporary, pa.concat_tables(tables))
        count = sum(table.num_rows for table in tables)
        return Exported(out, self.to, count, count)


def _check_out(run: Path, out: str | Path | None) -> None:
    """Refuse a folder that --overwrite would empty of the run itself."""
    if out is not None and run.resolve().is_relative_to(Path(out).resolve()):
        raise PoolError(f"--out {out} holds the run itself; choose another folder")


def _in_place(rows: KeptRows) -> Exported:
    rows.check_pool()
    count = int(rows.part_rows().sum())
    note = "the run's pool/ is the Parquet export already; name --out for a folder of its own"
    return Exported(rows.pool, "parquet", count, count, (note,))


def _link(source: Path, target: Path) -> None:
    """Link a file, or copy it where the file system cannot link: parts are never changed later."""
    with atomic_path(target) as temporary:
        # A run that was killed may have left one, and a link does not overwrite.
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def check_hexadecimal(uids: pa.ChunkedArray) -> None:
    """Check that uids are 128 bits in hexadecimal, as DataComp's are.

    Raises
    ------
    PoolError
        Naming the first that is not.
    """
    _refuse(
        uids,
        pc.invert(pc.match_substring_regex(uids, r"\A[0-9a-fA-F]{32}\z")),
        "is not 32 hexadecimal digits, which is all that a subset file of DataComp can hold; "
        "use --to uids",
    )


def check_one_line(uids: pa.ChunkedArray) -> None:
    """Check that each uid fits on a line.

    Raises
    ------
    PoolError
        Naming the first that does not.
    """
    _refuse(
        uids,
        pc.match_substring_regex(uids, r"[\r\n]"),
        "holds a line break, so a list of one uid per line cannot hold it; "
        "use --to parquet, or name another column with --uid-col when you prune",
    )


def _refuse(uids: pa.ChunkedArray, bad: Any, why: str) -> None:
    count = pc.sum(bad).as_py() or 0
    if count:
        first = uids.filter(bad)[0].as_py()
        raise PoolError(f"uid {first[:80]!r} ({count:,} of such a kind) {why}")


_CHECKS = {"datacomp": check_hexadecimal, "uids": check_one_line}


def subset_entries(uids: pa.ChunkedArray, weights: pa.ChunkedArray) -> NDArray[Any]:
    """Return the entries of DataComp's subset file, in the order of the rows.

    Parameters
    ----------
    uids : pyarrow.ChunkedArray of string
        32 hexadecimal digits each.
    weights : pyarrow.ChunkedArray of float
        How often each row counts; whole numbers.

    Returns
    -------
    (m,) structured array of dtype "u8,u8"
        Upper and lower 64 bits, each row as often as its weight says.

    Raises
    ------
    PoolError
        If a uid is something else, or a weight is not a whole number.

    Examples
    --------
    >>> uid = "00000000000000010000000000000002"
    >>> subset_entries(pa.chunked_array([[uid]]), pa.chunked_array([[2.0]])).tolist()
    [(1, 2), (1, 2)]
    """
    check_hexadecimal(uids)
    times = weights.to_numpy()
    if not np.array_equal(times, np.floor(times)):
        first = float(times[times != np.floor(times)][0])
        raise PoolError(
            f"weight {first} is not a whole number; a subset file of DataComp can only repeat "
            "rows. Use --to uids, whose kept.parquet has the weights"
        )
    halves = np.frombuffer(bytes.fromhex("".join(uids.to_pylist())), dtype=">u8").reshape(-1, 2)
    entries = np.empty(len(halves), dtype="u8,u8")
    entries["f0"], entries["f1"] = halves[:, 0], halves[:, 1]
    return np.repeat(entries, times.astype(np.int64))
