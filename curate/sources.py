"""Find the files of a pool: a file, a folder, a glob or a remote address."""

from __future__ import annotations

import hashlib
import io
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from curate.errors import PoolError

Kind = Literal["parquet", "tar"]
Layout = Literal["files", "clip-retrieval", "datacomp"]

_SUFFIXES: dict[str, Kind] = {".parquet": "parquet", ".pq": "parquet", ".tar": "tar"}
_WILD = "*?["
_FINGERPRINT_BLOCKS = 16
_FINGERPRINT_BLOCK_BYTES = 64 << 10


@dataclass(frozen=True)
class SourceFile:
    """One file of a pool.

    Attributes
    ----------
    path : str
        An absolute local path, or an address with its protocol.
    name : str
        The path relative to the pool's root.
    size : int
        In bytes.
    """

    path: str
    name: str
    size: int


@dataclass(frozen=True)
class Source:
    """The files of a pool in their order.

    Attributes
    ----------
    root : str
        The folder that all of them lie in.
    kind : {"parquet", "tar"}
        Their format.
    layout : {"files", "clip-retrieval", "datacomp"}
        What lies beside them.
    files : tuple of SourceFile
        Sorted by name.
    """

    root: str
    kind: Kind
    layout: Layout
    files: tuple[SourceFile, ...]

    @property
    def remote(self) -> bool:
        """Whether the files are read over the network."""
        return "://" in self.root


@dataclass(frozen=True)
class Shard:
    """A run of consecutive rows of one file, small enough to be a unit of work.

    Attributes
    ----------
    index : int
        Its place among the pool's shards.
    path : str
        The file.
    row_groups : (int, int) or None
        The Parquet row groups ``[start, stop)``; None for a tar file, which is one shard.
    rows : int
        The number of rows, at least 1.
    first_row : int
        The first row's position in the pool.
    file_row : int
        The first row's position in the file.
    """

    index: int
    path: str
    row_groups: tuple[int, int] | None
    rows: int
    first_row: int
    file_row: int = 0

    @property
    def label(self) -> str:
        """What errors call it."""
        if self.row_groups is None:
            return self.path
        return f"{self.path} (row groups {self.row_groups[0]} to {self.row_groups[1] - 1})"


def _filesystem(path: str) -> tuple[Any, str]:
    """Return the file system of an address, and the address as that system spells it."""
    if "://" not in path:
        return LocalFileSystem(), str(Path(path).expanduser().absolute())
    try:
        return cast("tuple[Any, str]", fsspec.core.url_to_fs(path))
    except (ImportError, ValueError) as error:
        protocol = path.split("://", 1)[0]
        raise PoolError(
            f"{path} cannot be opened: {error}. Files of {protocol}:// are read through fsspec; "
            f"install what it names for that protocol"
        ) from error


def open_file(path: str) -> BinaryIO:
    """Open a pool's file, local or remote, for reading with seeks."""
    filesystem, inner = _filesystem(path)
    return cast(BinaryIO, filesystem.open(inner, "rb"))


def _suffix(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def _hidden(path: str) -> bool:
    return posixpath.basename(path.rstrip("/")).startswith((".", "_"))


def _broken_link(entry: dict[str, Any]) -> bool:
    return bool(entry.get("islink")) and not Path(entry["name"]).exists()


def _known(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep the Parquet and tar files, in order of their names; what is hidden is left out."""
    kept = [
        entry
        for entry in entries
        # A broken link stays in, to be an error; sockets and pipes would block who opens them.
        if (entry["type"] in ("file", "link") or _broken_link(entry))
        and _suffix(entry["name"]) in _SUFFIXES
        and not _hidden(entry["name"])
    ]
    return sorted(kept, key=lambda entry: str(entry["name"]))


def _list_folder(filesystem: Any, folder: str, source: str) -> tuple[list[dict[str, Any]], bool]:
    """Return the files of a folder or of its subfolders, and whether it is clip-retrieval's."""
    entries = filesystem.ls(folder, detail=True)
    folders = {
        posixpath.basename(entry["name"].rstrip("/")): entry["name"]
        for entry in entries
        if entry["type"] == "directory" and not _hidden(entry["name"])
    }
    if "img_emb" in folders and "metadata" in folders:
        return _known(filesystem.ls(folders["metadata"], detail=True)), True
    here = _known(entries)
    below = [
        entry
        for name in sorted(folders)
        for entry in _known(filesystem.ls(folders[name], detail=True))
    ]
    if here and below:
        raise PoolError(
            f"{source} holds pool files ({posixpath.basename(here[0]['name'])}, ...) and so does "
            f"its subfolder {posixpath.basename(posixpath.dirname(below[0]['name']))}; name the "
            f"ones you mean with a glob such as '{source}/*{_suffix(here[0]['name'])}'"
        )
    return here or below, False


def _choose_kind(entries: Sequence[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    """Return the files of the one format; img2dataset's Parquet beside its tars is a sidecar."""
    by_kind: dict[Kind, list[dict[str, Any]]] = {"parquet": [], "tar": []}
    for entry in entries:
        by_kind[_SUFFIXES[_suffix(entry["name"])]].append(entry)
    if not by_kind["tar"] or not by_kind["parquet"]:
        return by_kind["tar"] or by_kind["parquet"]
    stems = {posixpath.splitext(entry["name"])[0] for entry in by_kind["tar"]}
    for entry in by_kind["parquet"]:
        if posixpath.splitext(entry["name"])[0] not in stems:
            raise PoolError(
                f"{source} holds tar shards and also {posixpath.basename(entry['name'])}, which "
                f"belongs to none of them; name the pool with a glob: '{source}/*.tar' or "
                f"'{source}/*.parquet'"
            )
    return by_kind["tar"]


def _find(filesystem: Any, inner: str, source: str) -> tuple[str, list[dict[str, Any]], Layout]:
    """Return the root, the files and the layout that a source stands for."""
    if filesystem.isfile(inner):
        if _suffix(inner) not in _SUFFIXES:
            raise PoolError(
                f"{source} is not a pool: it must end in .parquet, .pq or .tar (uncompressed). "
                "Convert it, for example with polars.read_csv(...).write_parquet(...)"
            )
        return posixpath.dirname(inner), [filesystem.info(inner)], "files"
    if filesystem.isdir(inner):
        if filesystem.isdir(f"{inner}/selection") and filesystem.isdir(f"{inner}/pool"):
            raise PoolError(f"{source} is the folder of a run; its kept rows are {source}/pool")
        entries, clip_retrieval = _list_folder(filesystem, inner, source)
        return inner, entries, "clip-retrieval" if clip_retrieval else "files"
    if any(sign in inner for sign in _WILD):
        matches = filesystem.glob(inner, detail=True)
        root = inner[: min(inner.index(sign) for sign in _WILD if sign in inner)]
        return posixpath.dirname(root), _known(matches.values()), "files"
    raise PoolError(
        f"{source} does not exist; give a Parquet or tar file, a folder of them, or a quoted glob"
    )


def find_source(source: str | Path) -> Source:
    """Find the files of a pool.

    Parameters
    ----------
    source : str or Path
        A Parquet or tar file, a folder of them (or of folders of them), a glob, or an address
        that fsspec understands (``s3://...``, ``memory://...``).

    Returns
    -------
    Source

    Raises
    ------
    PoolError
        If there is nothing, or what is meant is not clear.
    """
    text = str(source)
    filesystem, inner = _filesystem(text)
    try:
        root, entries, layout = _find(filesystem, inner, text)
    except (OSError, ValueError) as error:
        raise PoolError(f"{text} cannot be listed: {type(error).__name__}: {error}") from error
    entries = _choose_kind(entries, text)
    if not entries:
        raise PoolError(f"{text} holds no .parquet and no .tar file; hidden files are not read")
    local = isinstance(filesystem, LocalFileSystem)
    files = tuple(
        SourceFile(
            path=entry["name"] if local else filesystem.unstrip_protocol(entry["name"]),
            name=posixpath.relpath(entry["name"], root or "/"),
            size=int(entry["size"] or 0),
        )
        for entry in entries
    )
    kind = _SUFFIXES[_suffix(files[0].path)]
    if kind == "parquet" and layout == "files" and local and has_embeddings_beside(files):
        layout = "datacomp"
    root = root if local else filesystem.unstrip_protocol(root)
    return Source(root=root, kind=kind, layout=layout, files=files)


def embeddings_beside(path: str) -> Path:
    """Return the name of DataComp's embedding file for a Parquet file: the same stem, .npz."""
    return Path(path).with_suffix(".npz")


def has_embeddings_beside(files: Sequence[SourceFile]) -> bool:
    """Tell whether DataComp's embedding files lie beside the Parquet files.

    Raises
    ------
    PoolError
        If only some files have one.
    """
    missing = [file for file in files if not embeddings_beside(file.path).is_file()]
    if missing and len(missing) < len(files):
        raise PoolError(
            f"{missing[0].name} has no {embeddings_beside(missing[0].name).name} beside it, but "
            "other files do; complete the download, or name the files with a glob"
        )
    return not missing


def fingerprint_file(file: SourceFile) -> bytes:
    """Return a digest of a file's name, size and 16 evenly spaced blocks of 64 KiB.

    Cheap on a terabyte, and it finds what happens to data in practice: another file, a longer
    one, one written anew. It does not prove that no byte in between was altered.
    """
    digest = hashlib.sha256(f"{file.name}\0{file.size}\0".encode("utf-8", "surrogateescape"))
    last = max(0, file.size - _FINGERPRINT_BLOCK_BYTES)
    steps = _FINGERPRINT_BLOCKS - 1
    try:
        with open_file(file.path) as opened:
            for offset in sorted({last * step // steps for step in range(steps + 1)}):
                opened.seek(offset, io.SEEK_SET)
                digest.update(opened.read(_FINGERPRINT_BLOCK_BYTES))
    except OSError as error:
        raise PoolError(f"{file.path} cannot be read: {error}") from error
    return digest.digest()


def fingerprint_files(files: Iterable[SourceFile], *facts: str) -> str:
    """Return the hash of some files, by `fingerprint_file`, and of what else identifies them."""
    state = hashlib.sha256("\x1f".join(facts).encode())
    for file in files:
        state.update(fingerprint_file(file))
    return state.hexdigest()


def shard_masks(
    shards: Iterable[Shard], rows: NDArray[np.int64]
) -> Iterator[tuple[Shard, NDArray[np.bool_]]]:
    """Yield the shards that hold some of the rows of a pool, and which of theirs these are."""
    for shard in shards:
        here = rows[(rows >= shard.first_row) & (rows < shard.first_row + shard.rows)]
        if len(here):
            mask = np.zeros(shard.rows, dtype=np.bool_)
            mask[here - shard.first_row] = True
            yield shard, mask
