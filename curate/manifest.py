"""The manifest of a folder that a step writes: what it was made from, and whether it is whole.

A step's fingerprint is the hash of its name, its version, the parameters that change the result and
the fingerprints of its inputs. It decides what happens when the folder is there already: the same
and complete, nothing to do; the same and incomplete, the missing parts; another one, an error that
names each key that differs, unless the caller says `overwrite`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from curate.errors import FingerprintError, ShardError

NAME = "manifest.json"
FORMAT = "curate/1"
_PACKAGES = ("curate-distill", "numpy", "pyarrow", "torch", "open_clip_torch", "timm", "pillow")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` when the block ends without an error.

    The temporary file is fsynced and renamed, so that a file of the final name is always whole,
    and removed if the block fails. Its name is fixed: a run that was killed leaves at most one,
    which the run that continues overwrites.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_temporary(path.name))
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)  # a write that fails does not say where
        raise
    _fsync_folder(path.parent)


def _temporary(name: str) -> str:
    return f".{name}.tmp"


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file or nothing."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write_bytes(path, (text + "\n").encode())


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(value: Any) -> str:
    """Return the sha256 of a value that JSON can hold, whatever the order of its keys.

    Examples
    --------
    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def manifest_beside(folder: Path) -> Path:
    """Return where the manifest of a folder lies that holds Parquet parts and nothing else.

    Whoever reads a folder as one table (polars, pandas, Arrow, `datasets`) stumbles over any other
    file in it.
    """
    return folder.with_name(f"{folder.name}.{NAME}")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest in a folder or beside it, or None where there is none.

    Raises
    ------
    ShardError
        If the file is there but is no manifest of ours.
    """
    path = folder / NAME
    if not path.exists():
        path = manifest_beside(folder)
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ShardError(f"{path} is not readable as JSON ({error}); remove the folder") from error
    needed = {"format": str, "step": str, "fingerprint": str, "complete": bool, "times": dict}
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ShardError(f"{path} was not written by this tool; choose another output folder")
    if not all(isinstance(manifest.get(key), kind) for key, kind in needed.items()):
        raise ShardError(
            f"{path} is damaged: it lacks what every manifest holds; remove the folder"
        )
    return manifest


@dataclass
class StepFolder:
    """A folder that one step owns, with its manifest.

    Made by `open_step`; `complete` says whether there is anything left to do.
    """

    path: Path
    manifest: dict[str, Any]
    file: Path
    started: float = field(default_factory=time.time)

    @property
    def complete(self) -> bool:
        """Whether the step has written all that it writes."""
        return bool(self.manifest["complete"])

    @property
    def fingerprint(self) -> str:
        """What identifies the content: the hash of step, version, parameters and inputs."""
        return str(self.manifest["fingerprint"])

    def record(self, **fields: Any) -> None:
        """Add fields to the manifest on disk before the step is complete."""
        self.manifest.update(fields)
        atomic_write_json(self.file, self.manifest)

    def finish(self, **fields: Any) -> None:
        """Mark the folder as whole, with what the step wants to say about its result."""
        seconds = round(time.time() - self.started, 3)
        times = {**self.manifest["times"], "finished": _now(), "seconds": seconds}
        self.record(**fields, complete=True, times=times)


def open_step(
    path: Path,
    *,
    step: str,
    step_version: int,
    params: Mapping[str, Any],
    inputs: Mapping[str, str],
    overwrite: bool = False,
    keep_content: bool = False,
    beside: bool = False,
) -> StepFolder:
    """Open the folder of a step: begin it, continue it, or find it complete.

    Parameters
    ----------
    path : Path
        The folder; made if it is not there.
    step, step_version : str, int
        Which step, and the version of its results.
    params : mapping
        The parameters that change the result (not the device, workers or inference batch size).
    inputs : mapping of str to str
        Name and fingerprint of each input.
    overwrite : bool
        Replace a result of other parameters or inputs instead of refusing.
    keep_content : bool
        When replacing, keep what lies in the folder: its parts are steps of their own, each with
        a manifest, and those whose fingerprint still holds are used again.
    beside : bool
        Keep the manifest beside the folder (`manifest_beside`).

    Raises
    ------
    FingerprintError
        If the folder holds another result, or files that no step wrote, and `overwrite` is off.
    """
    path = Path(path)
    identity = _identity(step, step_version, params, inputs)
    file = manifest_beside(path) if beside else path / NAME
    manifest = _same_or_refused(path, identity, overwrite=overwrite)
    if manifest is not None and manifest["fingerprint"] == digest(identity):
        return StepFolder(path, manifest, file)
    if manifest is not None and not keep_content:
        _clear(path, file)
    folder = StepFolder(
        path,
        {
            "format": FORMAT,
            **identity,
            "fingerprint": digest(identity),
            "complete": False,
            "versions": _versions(),
            "times": {"started": _now()},
        },
        file,
    )
    folder.record()
    return folder


def check_step(
    path: Path,
    *,
    step: str,
    step_version: int,
    params: Mapping[str, Any],
    inputs: Mapping[str, str],
    overwrite: bool = False,
) -> None:
    """Raise what `open_step` would raise, and write nothing."""
    identity = _identity(step, step_version, params, inputs)
    _same_or_refused(Path(path), identity, overwrite=overwrite)


def _identity(
    step: str, step_version: int, params: Mapping[str, Any], inputs: Mapping[str, str]
) -> dict[str, Any]:
    identity = {"step": step, "step_version": step_version, "params": dict(params)}
    identity["inputs"] = dict(inputs)
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def _same_or_refused(
    path: Path, identity: Mapping[str, Any], *, overwrite: bool
) -> dict[str, Any] | None:
    """Return the manifest that is there, if the folder may be continued or replaced."""
    manifest = read_manifest(path)
    if manifest is None:
        # A run that was killed in its first moment leaves nothing but the temporary manifest.
        if path.is_dir() and any(child.name != _temporary(NAME) for child in path.iterdir()):
            raise FingerprintError(
                f"{path} holds files but no {NAME}: it was not made by this tool and is left "
                "alone. Choose another --out"
            )
    elif manifest["fingerprint"] != digest(identity) and not overwrite:
        raise FingerprintError(describe_difference(path, manifest, identity))
    return manifest


def describe_difference(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return the message that names every key in which a folder differs from what is asked."""
    pairs = []
    for group in ("params", "inputs"):
        before, after = old.get(group, {}), new.get(group, {})
        pairs += [
            (key, before.get(key), after.get(key))
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key)
        ]
    pairs += [(k, old.get(k), new.get(k)) for k in ("step", "step_version") if old[k] != new[k]]
    listed = ", ".join(
        f"{key} (made with {_short(before)}, asked for {_short(after)})"
        for key, before, after in pairs
    )
    return (
        f"{path} holds another result; different: {listed}. "
        "Choose another --out, or pass --overwrite to replace it"
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    is_hash = isinstance(value, str) and len(value) == 64
    return text[:13] + '..."' if is_hash else text


def _clear(path: Path, file: Path) -> None:
    # The manifest goes first: a kill half-way must not leave a folder that claims to be whole.
    # What it leaves is a folder of parts without a manifest, hence the marker that it is ours.
    manifest = json.loads(file.read_text(encoding="utf-8"))
    manifest.update(complete=False, fingerprint="cleared", params={"cleared": True}, inputs={})
    atomic_write_json(file, manifest)
    for child in path.iterdir() if path.exists() else ():
        if child == file:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, so that two runs never write into it at once.

    The lock is the system's and dies with the process; it leaves no file.

    Raises
    ------
    FingerprintError
        If another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise FingerprintError(
            f"{folder} is not a folder and cannot become one, since a file is in its place; "
            "choose another --out"
        ) from error
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FingerprintError(
                f"{folder} is being written by another process; wait for it or choose another --out"
            ) from error
        try:
            yield
        except BaseException:
            with suppress(OSError):  # a run that failed before it wrote leaves no empty folder
                folder.rmdir()
            raise
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
