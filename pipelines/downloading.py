"""`curate download`: from addresses to a pool with images, by img2dataset.

img2dataset runs as a program of its own and is never imported: its dependencies are older than ours
and may live in another environment. A folder of this verb holds ``_index`` and ``_urls`` (what it
is given; the underscore hides them from whoever opens the folder as a pool) and ``images`` (what it
wrote), so that the folder is a pool.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from curate.errors import CurateError, PoolError
from curate.manifest import StepFolder, locked, open_step
from curate.pool import Pool
from curate.progress import task
from curate.shards import missing_parts, write_part
from curate.uids import narrow
from pipelines.download_shards import ImageShards, merge_retried, write_failed
from pipelines.executor import LocalExecutor
from pipelines.img2dataset_process import Fetch, Img2datasetProcess, find_img2dataset, wait
from pipelines.indexing import index_pool, read_uids
from pipelines.url_list import (
    UrlColumns,
    command_line,
    img2dataset_arguments,
    url_columns,
)

logger = logging.getLogger(__name__)

_LOG = "_img2dataset.log"
_REASONS_SHOWN = 10
_SECONDS_BETWEEN_LOOKS = 1.0
# img2dataset's glob would read them as patterns, and find neither its input nor what is done.
_WILD = "*?[]"


@dataclass(frozen=True)
class Downloaded:
    """What a download brought.

    Attributes
    ----------
    path : Path
        The folder, which is a pool.
    rows, successes : int
        Rows of the pool, and those with an image.
    failures : dict of str to int
        Rows without one by img2dataset's message, the most frequent first.
    """

    path: Path
    rows: int
    successes: int
    failures: dict[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        """Return it as text for a terminal."""
        share = f"{100 * self.successes / self.rows:.2f} %"
        lines = [
            f"images      {self.path} ({self.successes:,} of {self.rows:,} rows, {share})",
            *(f"{n:>10,}  {why}" for why, n in list(self.failures.items())[:_REASONS_SHOWN]),
        ]
        more = list(self.failures.values())[_REASONS_SHOWN:]
        if more:
            lines.append(
                f"{sum(more):>10,}  {len(more):,} other reasons, in the column error_message"
            )
        return "\n".join(lines)


def run_download(
    pool: Pool,
    out: str | Path,
    *,
    fetch: Fetch | None = None,
    retry_failed: bool = False,
    overwrite: bool = False,
) -> Downloaded:
    """Download the images of a pool of addresses.

    Every column of the pool is kept, and every row: one without an image has the reason in
    ``status`` and ``error_message``. The rows of a shard are in the order in which they arrived;
    ``uid`` says which is which. Opt-out headers (``X-Robots-Tag: noai`` and the like, `noml`
    included) are obeyed; robots.txt is not read.

    Parameters
    ----------
    pool : Pool
        With a column of addresses.
    out : str or Path
        The folder; a download that was interrupted goes on where it stopped.
    fetch : Fetch, optional
        How img2dataset is to work.
    retry_failed : bool
        Ask again for what failed, but for what servers have opted out.
    overwrite : bool
        Replace a download of another pool or with other parameters.

    Returns
    -------
    Downloaded

    Raises
    ------
    PoolError
        If the pool has no addresses, or not one image came.
    CurateError
        If img2dataset is not installed, fails, or leaves shards out.
    FingerprintError
        If the folder holds another download and `overwrite` is off.
    """
    fetch, out = fetch or Fetch(), Path(out)
    columns = url_columns(pool.schema, pool.mapping, source=_place(pool))
    if any(sign in str(out.absolute()) for sign in _WILD):
        raise ValueError(f"--out {out} has one of {_WILD} in it, which img2dataset cannot take")
    program = find_img2dataset(fetch.program)
    with locked(out):
        step = open_step(
            out,
            step="download",
            step_version=1,
            params=fetch.result_params(),
            inputs={"pool": pool.fingerprint()},
            overwrite=overwrite,
        )
        run = _Download(pool, columns, fetch, program, step)
        run.run()
        if retry_failed:
            run.retry()
        return run.finish()


def describe_download(pool: Pool, out: str | Path, *, fetch: Fetch | None = None) -> str:
    """Return what a download would do, and the command that it would run; nothing is written."""
    fetch, out = fetch or Fetch(), Path(out)
    columns = url_columns(pool.schema, pool.mapping, source=_place(pool))
    arguments = img2dataset_arguments(out / "_urls", out / "images", columns, fetch.options())
    shards = sum(-(-shard.rows // fetch.samples_per_shard) for shard in pool.shards)
    return (
        f"pool        {len(pool):,} addresses\n"
        f"out         {out} ({shards:,} shards of at most {fetch.samples_per_shard:,} rows)\n"
        f"runs        {command_line('img2dataset', arguments)}"
    )


def _place(pool: Pool) -> str:
    files = pool.source.files
    return files[0].path if len(files) == 1 else pool.source.root


@dataclass(frozen=True)
class _Download:
    """One download; the methods are its stages."""

    pool: Pool
    columns: UrlColumns
    fetch: Fetch
    program: str
    step: StepFolder

    @property
    def images(self) -> ImageShards:
        """The shards that img2dataset is to write."""
        counts = [shard.rows for shard in self.pool.shards]
        return ImageShards.plan(self.step.path / "images", counts, self.fetch.samples_per_shard)

    def run(self) -> None:
        """Download the shards that are not there yet."""
        images = self.images
        if self.step.complete and not images.missing():
            return
        self.write_list()
        images.remove_damaged()
        self.call(self.step.path / "_urls", images, "download")
        missing = images.missing()
        if missing:
            raise CurateError(
                f"img2dataset left out {len(missing):,} of {len(images):,} shards "
                f"({self.last_words()}); run the same command again to continue"
            )

    def write_list(self) -> None:
        """Write the addresses, one part for each shard of the pool."""
        index, folder = self.step.path / "_index", self.step.path / "_urls"
        index_pool(self.pool, index, executor=LocalExecutor(), overwrite=True)
        uids = read_uids(self.pool, index)
        schema = self.columns.schema(self.pool.schema)
        for part in missing_parts(folder, len(self.pool.shards)):
            write_part(folder, part, self.addresses(part, uids), schema=schema)

    def addresses(self, part: int, uids: pa.LargeStringArray) -> Iterator[pa.RecordBatch]:
        """Yield the rows of the list that belong to a shard of the pool."""
        shard = self.pool.shards[part]
        row = shard.first_row
        for batch in self.pool.batches(shards=[shard], columns=self.columns.originals):
            yield self.columns.batch(batch, narrow(uids.slice(row, batch.num_rows)))
            row += batch.num_rows

    def retry(self) -> None:
        """Ask again for the rows that failed, and put what comes into their shards."""
        images, folder = self.images, self.step.path / "_retry"
        # What a run that was killed has left is old: the failures are found anew.
        shutil.rmtree(folder, ignore_errors=True)
        retried = write_failed(images, folder / "urls", self.columns)
        if not retried:
            logger.info("nothing to ask for again")
            return
        # Every part fits into one shard, so that shard k is what was asked for part k again.
        again = ImageShards(folder / "images", tuple(retried.values()))
        self.call(folder / "urls", again, "retry")
        for number, shard in enumerate(retried):
            if number not in again.missing():
                merge_retried(again, number, images, shard)
        shutil.rmtree(folder)

    def call(self, urls: Path, images: ImageShards, label: str) -> None:
        """Run img2dataset and report on its progress."""
        images.folder.mkdir(parents=True, exist_ok=True)
        arguments = img2dataset_arguments(urls, images.folder, self.columns, self.fetch.options())
        logger.info("%s", command_line(self.program, arguments))
        done = images.done_rows()
        with (
            (self.step.path / _LOG).open("wb") as log,
            task(label, total=sum(images.counts), done=done) as advance,
            Img2datasetProcess([self.program, *arguments], log.fileno()) as process,
        ):
            ended = False
            while not ended:
                ended = wait(process, _SECONDS_BETWEEN_LOOKS)
                now = images.done_rows()
                if now > done:
                    advance(now - done)
                done = now
        if process.returncode:
            raise CurateError(
                f"img2dataset ended with exit code {process.returncode}: {self.last_words()}; its "
                f"messages are in {self.step.path / _LOG}"
            )

    def last_words(self) -> str:
        """Return the last line that img2dataset wrote."""
        log = self.step.path / _LOG
        text = log.read_text("utf-8", "replace") if log.exists() else ""
        lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it said nothing"

    def finish(self) -> Downloaded:
        """Count what came; refuse to call a folder without a single image a success."""
        rows, successes, failures = self.images.outcome()
        found = Downloaded(self.step.path, rows, successes, _ordered(failures))
        if rows < len(self.pool):
            logger.warning("img2dataset dropped %s rows without a word", len(self.pool) - rows)
        if not successes:
            worst = ", ".join(f"{n:,} x {why}" for why, n in list(found.failures.items())[:3])
            raise PoolError(
                f"not one of {rows:,} images could be downloaded ({worst}). Check the network and "
                "--url-col, then run the same command again with --retry-failed"
            )
        facts = {"successes": successes, "failures": dict(list(found.failures.items())[:1000])}
        self.step.finish(rows=rows, parts=len(self.images), **facts)
        return found


def _ordered(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
