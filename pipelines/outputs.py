"""Where a verb writes unless it is told, and where it must not."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from curate.errors import PoolError


def default_out(pool: str, what: str) -> Path:
    """Return the folder beside the pool that a verb writes to without --out.

    Examples
    --------
    >>> default_out("data/laion.parquet", "pruned").as_posix()
    'data/laion-pruned'
    """
    if "://" in pool:
        return Path(f"{Path(pool).stem}-{what}")
    path = Path(pool)
    while any(mark in path.name for mark in "*?["):
        path = path.parent
    path = path.resolve() if path.name in ("", "..") else path
    return path.with_name(f"{path.stem if path.suffix else path.name}-{what}")


def with_paths(options: dict[str, Any]) -> dict[str, Any]:
    """Let Python callers name folders by strings."""
    names = ("out", "embeddings", "image_root")
    return {k: Path(v) if k in names and v is not None else v for k, v in options.items()}


def check_out(pool: str, out: Path) -> None:
    """Refuse an output folder whose files the pool's glob would find the next time.

    Raises
    ------
    PoolError
    """
    if not any(mark in pool for mark in "*?["):
        return
    pattern = str(Path(pool).expanduser().absolute())
    for name in ("pool/part-00000.parquet", "embeddings/metadata/metadata_0000.parquet"):
        path = str(out.absolute() / name)
        if ("**" in pattern or pattern.count("/") == path.count("/")) and fnmatch(path, pattern):
            raise PoolError(
                f"--out {out} lies where --pool {pool} looks: its files would be rows of the next "
                "run; choose a folder elsewhere"
            )
