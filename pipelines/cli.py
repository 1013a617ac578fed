"""The `curate` command: parsing, messages and exit codes; the work is in the verbs' own modules.

Exit codes: 0 done; 1 failed, or finished with more failed rows than --max-failed; 2 wrong usage;
3 the data cannot meet the request; 130 interrupted (the same command continues).
With CURATE_DEBUG=1 in the environment errors keep their traceback.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import cyclopts
from cyclopts import App, Group, Parameter

from pipelines.config import CoresetConfig, DownloadConfig, EmbedConfig, PruneConfig
from pipelines.distill_config import DistillConfig
from pipelines.finished_config import DemoConfig, ExplainConfig, ExportConfig, ReportConfig
from pipelines.plan_config import PlanConfig

if TYPE_CHECKING:
    from curate.selection import Selection

OK, FAILED, WRONG_USAGE, CANNOT_BE_MET, INTERRUPTED = 0, 1, 2, 3, 130

_EPILOGUE = """Examples:

curate prune --pool laion.parquet --keep 0.28

curate prune --pool 'shards/*.parquet' --keep 0.5 --embeddings emb --clip-fraction 1

curate coreset --pool photos.parquet --method k-center --budget 5000

curate distill --pool cifar10.parquet --ipc 10

curate embed --pool photos/ --model timm:vit_large_patch14_dinov2.lvd142m --out emb

curate demo
"""


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("curate-distill")
    except PackageNotFoundError:
        return "unknown"


def _one_line(error: Exception) -> str:
    return "error: " + " ".join(str(error).split())


app = App(
    name="curate",
    help="Curate image-text datasets: exact counts, a reason for every row, runs that resume.",
    help_epilogue=_EPILOGUE,
    help_format="plaintext",  # rich's Markdown takes a sixth of the time to load
    version=_version,
    error_formatter=_one_line,
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)

_MESSAGES = Group("Messages and configuration", sort_key=9)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Messages:
    """What every verb takes besides its parameters.

    Attributes
    ----------
    config
        TOML file of parameters; flags override it.
    log_format
        text for people, json for machines: one object per line on stderr.
    """

    config: Annotated[Path | None, Parameter(group=_MESSAGES)] = None
    log_format: Annotated[Literal["text", "json"], Parameter(group=_MESSAGES)] = "text"


def _default(messages: Messages | None) -> Messages:
    return messages or Messages()


@app.command
def prune(config: PruneConfig, *, messages: Messages | None = None) -> int:
    """Prune a pool to the kept fraction: drop duplicates, poor pairs and easy rows.

    Exactly floor(keep * rows + 0.5) rows stay. The output folder holds the kept rows (pool/), a
    ledger with the fate of every row (selection/) and report.html.
    """
    _set_up(messages)
    if config.dry_run:
        from pipelines.dry_run import describe_prune

        return _write(describe_prune(config))
    from pipelines.pruning import run_prune

    return _finish(run_prune(config), config.max_failed)


@app.command
def coreset(config: CoresetConfig, *, messages: Messages | None = None) -> int:
    """Select a coreset: exactly so many rows, by any of the methods, with weights and order.

    The output folder holds the chosen rows (pool/), a ledger with the fate, weight and rank of
    every row (selection/) and report.html. Smaller budgets of the nested methods are prefixes.
    """
    _set_up(messages)
    if config.dry_run:
        from pipelines.dry_run import describe_coreset

        return _write(describe_coreset(config))
    from pipelines.coresets import run_coreset

    return _finish(run_coreset(config), config.max_failed)


@app.command
def distill(config: DistillConfig, *, messages: Messages | None = None) -> int:
    """Distill a labelled pool: a few synthetic images per class, with the teacher's soft labels.

    The output folder holds the distilled set (distilled/), which datasets.load_dataset reads,
    report.html, the teachers and the steps between. The same command continues an interrupted run.
    """
    _set_up(messages)
    if config.dry_run:
        from pipelines.dry_run import describe_distill

        return _write(describe_distill(config))
    from pipelines.distilling import describe_run, run_distill

    return _write(describe_run(run_distill(config)))


@app.command
def plan(config: PlanConfig, *, messages: Messages | None = None) -> int:
    """Say what curate prune with the same flags would cost here, after measuring for a while.

    Prints rows, bytes, memory and time of each step, as one JSON object with --log-format json.
    Nothing is left on the disk.
    """
    _set_up(messages)
    from pipelines.plan import run_plan

    found = run_plan(config)
    as_json = _default(messages).log_format == "json"
    return _write(found.to_json() if as_json else found.to_text())


@app.command
def embed(config: EmbedConfig, *, messages: Messages | None = None) -> int:
    """Embed the images and captions of a pool, in the layout that clip-retrieval writes."""
    _set_up(messages)
    if config.dry_run:
        from pipelines.dry_run import describe_embed

        return _write(describe_embed(config))
    from pipelines.embedding import check_failed, run_embed

    embeddings = run_embed(config)
    _write(f"embeddings  {embeddings.path} ({len(embeddings):,} x {embeddings.image.shape[1]})")
    check_failed(embeddings, config.max_failed)
    return OK


@app.command
def download(config: DownloadConfig, *, messages: Messages | None = None) -> int:
    """Download the images of a pool of addresses; the result is a pool with every column kept.

    Runs img2dataset. Opt-out headers (noai, noimageai, noindex, noimageindex, noml) are obeyed;
    robots.txt is not read. The same command continues a download that was interrupted.
    """
    _set_up(messages)
    from pipelines.downloading import describe_download, run_download
    from pipelines.img2dataset_process import Fetch
    from pipelines.outputs import default_out
    from pipelines.source import open_pool

    fetch = Fetch(
        image_size=config.image_size,
        resize_mode=config.resize_mode,
        samples_per_shard=config.samples_per_shard,
        processes=config.processes,
        threads=config.threads,
        timeout=config.timeout,
        retries=config.retries,
        program=config.img2dataset,
    )
    pool, out = open_pool(config), config.out or default_out(config.pool, "images")
    if config.dry_run:
        return _write(describe_download(pool, out, fetch=fetch))
    found = run_download(
        pool, out, fetch=fetch, retry_failed=config.retry_failed, overwrite=config.overwrite
    )
    return _write(found.summary())


@app.command
def export(config: ExportConfig, *, messages: Messages | None = None) -> int:
    """Write what a run kept, or distilled, in the format that the next tool reads."""
    _set_up(messages)
    from pipelines.export_formats import run_export

    exported = run_export(
        config.run,
        config.to,
        config.out,
        samples_per_tar=config.samples_per_tar,
        workers=config.workers,
        overwrite=config.overwrite,
    )
    return _write(exported.summary())


@app.command
def report(config: ReportConfig, *, messages: Messages | None = None) -> int:
    """Write report.html of a run again."""
    _set_up(messages)
    from pipelines.reporting import write_report

    return _write(f"report      {write_report(config.run, examples=config.examples)}")


@app.command
def explain(config: ExplainConfig, *, messages: Messages | None = None) -> int:
    """Say what happened to rows of a run, and why: one JSON object per uid."""
    _set_up(messages)
    from pipelines.explaining import explain_rows

    for row in explain_rows(config.run, config.uid):
        _write(json.dumps(row, ensure_ascii=False))
    return OK


@app.command
def demo(config: DemoConfig | None = None, *, messages: Messages | None = None) -> int:
    """Prune a small real pool, spoiled as the web is, and train on the result."""
    _set_up(messages)
    from pipelines.demo import run_demo

    config = config or DemoConfig()
    run_demo(config.out, seed=config.seed, stream=sys.stdout)
    return OK


def _finish(selection: Selection, max_failed: float) -> int:
    """Say what a run did and where it lies; an error if too many rows failed."""
    from pipelines.pruning import check_failed
    from pipelines.reporting import format_summary

    folder = selection.path or Path()
    _write(format_summary(folder))
    _write(f"kept rows   {folder / 'pool'}\nledger      {folder / 'selection'}")
    _write(f"report      {folder / 'report.html'}")
    check_failed(selection, max_failed)
    return OK


def _set_up(messages: Messages | None) -> None:
    from pipelines.logs import set_up

    set_up(_default(messages).log_format)


def _write(text: str) -> int:
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()
    return OK


def _toml(tokens: list[str]) -> list[Callable[..., Any]]:
    """Return cyclopts' reader for the file that --config names, if any.

    The file holds the parameters of one verb at its top, or a table per verb.
    """
    path = _config_path(tokens)
    if path is None:
        return []
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _UsageError(f"--config {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _UsageError(f"--config {path} is not TOML: {error}") from error
    verb = next((token for token in tokens if not token.startswith("-")), "")
    by_verb = isinstance(content.get(verb), dict)
    stray = [key for key, value in content.items() if not isinstance(value, dict)]
    if by_verb and stray:
        raise _UsageError(f"--config {path}: {', '.join(stray)} outside [{verb}]; move it in there")
    content = content[verb] if by_verb else content
    return [cyclopts.config.Dict(content, source=str(path), use_commands_as_keys=False)]


def _config_path(tokens: list[str]) -> Path | None:
    for number, token in enumerate(tokens):
        if token == "--config" and number + 1 < len(tokens):
            return Path(tokens[number + 1])
        if token.startswith("--config="):
            return Path(token.removeprefix("--config="))
    return None


_PATHS = ("--pool", "--test-pool", "--out", "--run", "--embeddings", "--config", "--selected")


def _refuse_empty(tokens: list[str]) -> None:
    """Refuse --out "$UNSET", which would be the current folder."""
    pairs = [*pairwise(tokens), *(token.split("=", 1) for token in tokens if "=" in token)]
    for flag, value in pairs:
        if flag in _PATHS and value == "":
            raise _UsageError(f"{flag} is empty; give a path (is a shell variable not set?)")


class _UsageError(Exception):
    """Wrong usage that cyclopts does not see."""


def main(tokens: list[str] | None = None) -> None:
    """Run the command and exit with its code."""
    # Threads that wait for each other must not spin: where the cores are shared with other
    # programs, or a container has fewer than it sees, spinning makes small steps 10 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(run(sys.argv[1:] if tokens is None else tokens))


def run(tokens: list[str]) -> int:
    """Run the command; return its exit code."""
    from curate.errors import CurateError

    errors = (cyclopts.CycloptsError, _UsageError, CurateError, ValueError, TypeError, ImportError)
    try:
        _refuse_empty(tokens)
        app.config = _toml(tokens)
        result = app(tokens, exit_on_error=False, print_error=False)
        return result if isinstance(result, int) else OK
    except (*errors, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
        if os.environ.get("CURATE_DEBUG"):
            raise
        code, message = _failure(error)
        if code is None:  # not of a kind that a user could mend: a bug, with its traceback
            raise
    finally:
        app.config = []  # a file named by one command is not read by the next in this process
    from pipelines.logs import write_error

    given = " ".join(tokens).replace("--log-format=", "--log-format ").split()
    write_error(message, "json" if ("--log-format", "json") in pairwise(given) else "text")
    return code


def _failure(error: BaseException) -> tuple[int | None, str]:
    """Return the exit code and the message of an error."""
    from curate.errors import BudgetError, CurateError

    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted; a command that writes a folder continues when run again"
    if isinstance(error, MemoryError):
        return FAILED, "out of memory; a smaller --batch-size or fewer --workers need less"
    if isinstance(error, RuntimeError):
        full = type(error).__name__ == "OutOfMemoryError"
        return (FAILED if full else None), "the GPU is out of memory; use a smaller --batch-size"
    if isinstance(error, OSError):
        return FAILED, _file_failure(error)
    if isinstance(error, CurateError | ImportError):
        return CANNOT_BE_MET if isinstance(error, BudgetError) else FAILED, str(error)
    hint = ""
    if isinstance(error, cyclopts.UnusedCliTokensError):
        hint = " They belong to no flag; a glob must be quoted: --pool 'shards/*.parquet'"
    return WRONG_USAGE, f"{error}{hint}"


def _file_failure(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    hint = "; what is whole is kept: make room and run the same command again" if full else ""
    return f"{error.strerror or error}{where}{hint}"
