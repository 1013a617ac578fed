"""img2dataset as a program: where it is, what it is asked, and how it is started and stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from curate.errors import CurateError
from pipelines.url_list import OPT_OUT_DIRECTIVES

#: Names the program, where it is not installed beside this one.
VARIABLE = "CURATE_IMG2DATASET"
#: img2dataset's modes where a size is given; where none is, the bytes stay as they are.
RESIZE_MODES = ("keep_ratio", "keep_ratio_largest", "center_crop", "border")

_INSTALL = (
    "img2dataset is not installed: pip install 'curate-distill[download]', or install it in an "
    f"environment of its own and name the program with --img2dataset or {VARIABLE}"
)
_SECONDS_TO_STOP = 10.0


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """How img2dataset is to work.

    Attributes
    ----------
    image_size : int or None
        Resize to this many pixels; None keeps every JPEG as it came, byte for byte.
    resize_mode : str
        How, where a size is given.
    samples_per_shard : int
        Rows per file of images.
    processes, threads : int
        Processes, and downloads at a time in each.
    timeout : int
        Seconds to wait for a server.
    retries : int
        Further attempts for each address.
    program : str or Path or None
        img2dataset, if it is not to be found.

    Raises
    ------
    ValueError
        If the mode is unknown or a number is out of range.
    """

    image_size: int | None = None
    resize_mode: str = "keep_ratio"
    samples_per_shard: int = 10_000
    processes: int = 1
    threads: int = 32
    timeout: int = 10
    retries: int = 0
    program: str | Path | None = None

    def __post_init__(self) -> None:
        """Check what img2dataset would find out too late."""
        if self.resize_mode not in RESIZE_MODES:
            raise ValueError(
                f"resize_mode must be one of {', '.join(RESIZE_MODES)}; got {self.resize_mode!r}. "
                "Without image_size nothing is resized"
            )
        for name in ("image_size", "samples_per_shard", "processes", "threads", "timeout"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.retries < 0:
            raise ValueError(f"retries must be at least 0, got {self.retries}")

    def result_params(self) -> dict[str, object]:
        """Return what decides the result, for the fingerprint."""
        resize = {} if self.image_size is None else {"resize_mode": self.resize_mode}
        return {
            "image_size": self.image_size,
            **resize,
            "samples_per_shard": self.samples_per_shard,
            "disallowed_header_directives": list(OPT_OUT_DIRECTIVES),
        }

    def options(self) -> list[tuple[str, object]]:
        """Return img2dataset's options."""
        options: list[tuple[str, object]] = [("resize_mode", "no"), ("skip_reencode", True)]
        if self.image_size is not None:
            # Enlarging adds bytes and no picture; the modes of a fixed shape need it.
            shrinks = self.resize_mode.startswith("keep_ratio")
            options = [
                ("resize_mode", self.resize_mode),
                ("image_size", self.image_size),
                ("resize_only_if_bigger", shrinks),
                ("skip_reencode", True),
            ]
        return [
            *options,
            ("number_sample_per_shard", self.samples_per_shard),
            ("processes_count", self.processes),
            ("thread_count", self.threads),
            ("timeout", self.timeout),
            ("retries", self.retries),
        ]


def find_img2dataset(given: str | Path | None = None) -> str:
    """Return the path of the program: as given, as the environment says, ours, or on the PATH.

    Raises
    ------
    CurateError
        If there is none; the message has the command that installs it.
    """
    named = str(given) if given is not None else os.environ.get(VARIABLE)
    if named:
        found = shutil.which(named)
        if found is None:
            raise CurateError(f"{named} is not a program; {_INSTALL}")
        return found
    beside = shutil.which("img2dataset", path=str(Path(sys.executable).parent))
    found = beside or shutil.which("img2dataset")
    if found is None:
        raise CurateError(_INSTALL)
    return found


class Img2datasetProcess:
    """The program while it runs; neither it nor its children outlive the block."""

    def __init__(self, command: Sequence[str], log: int) -> None:
        environment = {
            **os.environ,
            # Otherwise every process asks the package index for a newer albumentations.
            "NO_ALBUMENTATIONS_UPDATE": "1",
            "WANDB_MODE": "disabled",
            "PYTHONUNBUFFERED": "1",
        }
        # A group of its own: img2dataset answers Ctrl-C with exit code 0 and leaves its workers.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )

    def __enter__(self) -> subprocess.Popen[bytes]:
        return self.process

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            _signal(self.process, signal.SIGTERM)
            if not wait(self.process, _SECONDS_TO_STOP):
                _signal(self.process, signal.SIGKILL)
                self.process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for the process; return whether it has ended."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True
