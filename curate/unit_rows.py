"""Unit rows read in blocks, and the exact arithmetic that makes results independent of row order.

Every number that decides something is a sum of float64 terms on a grid of powers of two, so that
it is exact, whatever the order of summation, the block size, the threads or the device:

- rows lie on multiples of 2^-26 (every float16 in [-1, 1] does; other types are rounded to it);
- centroids lie on multiples of 2^-24, cosine distances and similarities on multiples of 2^-23;
- hence dot products of two unit vectors are exact in float64 (fewer than 2^53 steps of 2^-52), and
  so are the sums of up to 2^27 rows (2^29 of float16) and of 2^29 distances.

The fast products (`curate.codes`) only propose: what lies within `tolerance` of a tie is decided
exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from curate.runtime import resolve_devices, rng

ROW_GRID = 2.0**26
CENTROID_GRID = 2.0**24
DISTANCE_GRID = 2.0**23
UNIT_TOLERANCE = 1e-2  # float16 on disk, and encoders that normalise in half precision


class RowSource(Protocol):
    """Rows that can be read in blocks: a NumPy array or memory map, a tensor, lazy shards."""

    @property
    def shape(self) -> Any:
        """The number of rows and of columns."""

    def __getitem__(self, rows: Any, /) -> Any:
        """Return the rows of a slice or of an integer array, as a NumPy array or a tensor."""


class Rows:
    """Unit rows of an (n, d) source, read as float32 blocks of bounded bytes.

    Parameters
    ----------
    x : (n, d) float16 or float32
        NumPy array or memory map, tensor, or anything that `RowSource` describes.
    device : str or torch.device
        Where the blocks go; ``"auto"`` is all GPUs where there are some.
    block_bytes : int, optional
        About how much memory a block and its products may take; 64 MiB on a CPU, where more is
        no faster, and 1 GiB on a GPU. Results do not depend on it.

    Raises
    ------
    ValueError
        If ``x`` is not of two dimensions, or ``block_bytes`` is not positive.
    """

    def __init__(
        self, x: RowSource, device: str | torch.device = "auto", block_bytes: int | None = None
    ) -> None:
        shape = tuple(getattr(x, "shape", ()))
        if len(shape) != 2 or shape[1] < 1:
            raise ValueError(
                f"x has shape {shape}; it must be (rows, dimensions), one unit vector per row"
            )
        if block_bytes is not None and block_bytes < 1:
            raise ValueError(f"block_bytes is {block_bytes}; it must be at least 1, or None")
        self.source = x
        self.n, self.d = int(shape[0]), int(shape[1])
        self.devices = resolve_devices(device)
        self.device = self.devices[0]
        default = 1 << 30 if self.device.type == "cuda" else 64 << 20
        self.block_bytes = block_bytes or default

    def on(self, device: torch.device) -> Rows:
        """Return the same rows, read to one of `devices`."""
        other = copy(self)
        other.device, other.devices = device, [device]
        return other

    def block_rows(self, columns: int) -> int:
        """Return how many rows fit a block when each also fills that many float32 products."""
        return max(1, self.block_bytes // (24 * self.d + 8 * columns))

    @property
    def held_rows(self) -> int:
        """How many rows fit a block, without products."""
        return max(1, self.block_bytes // (8 * self.d))

    @property
    def query_rows(self) -> int:
        """Rows of a tile of products: just large enough for fast ones, and in a core's cache."""
        return min(1024 if self.device.type == "cpu" else 8192, self.block_rows(0))

    @property
    def tile_columns(self) -> int:
        """Columns of a tile of products."""
        most = 512 if self.device.type == "cpu" else 8192
        return max(1, min(most, self.block_bytes // (16 * self.query_rows)))

    def read(self, rows: slice | NDArray[np.int64], *, check: bool = False) -> torch.Tensor:
        """Return float32 rows on the device, on the 2^-26 grid; `check` that they are unit.

        Raises
        ------
        TypeError
            If the rows are not of a floating type.
        ValueError
            If a row is not finite or not of length 1.
        """
        return self.widen(self.raw(rows), rows if check else None)

    def raw(self, rows: slice | NDArray[np.int64]) -> torch.Tensor:
        """Return rows as they are stored, where they are stored."""
        return _as_tensor(self._take(rows))

    def widen(self, block: torch.Tensor, check: slice | NDArray[np.int64] | None) -> torch.Tensor:
        """Return stored rows as `read` does; `check` names them if they are to be checked."""
        if not block.dtype.is_floating_point:
            raise TypeError(f"x has dtype {block.dtype}; use float16, float32 or float64 rows")
        if self.device.type == "cuda" and block.device.type == "cpu":
            block = block.pin_memory()  # from which a copy runs beside what the device computes
        wide = block.to(self.device, non_blocking=True).float()
        if check is not None:
            _check_unit(wide, check)
        if block.dtype != torch.float16:  # whose values lie on the grid
            wide = torch.round(wide * ROW_GRID) / ROW_GRID
        return wide

    def _take(self, rows: slice | NDArray[np.int64]) -> Any:
        if isinstance(self.source, torch.Tensor) and not isinstance(rows, slice):
            return self.source[torch.from_numpy(rows).to(self.source.device)]
        return self.source[rows]


def _as_tensor(rows: Any) -> torch.Tensor:
    if isinstance(rows, torch.Tensor):
        return rows.detach()
    array = np.asarray(rows)
    # torch warns about read-only memory, such as a memory map: hand it a copy of the block.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _check_unit(block: torch.Tensor, rows: slice | NDArray[np.int64]) -> None:
    lengths = torch.linalg.vector_norm(block, dim=1)
    bad = torch.nonzero(~((lengths - 1).abs() <= UNIT_TOLERANCE))[:, 0].cpu().numpy()
    if len(bad) == 0:
        return
    named = bad + rows.start if isinstance(rows, slice) else rows[bad]
    first = int(named.argmin())
    length = float(lengths[int(bad[first])])
    what = f"has length {length:.4g}" if np.isfinite(length) else "holds NaN or infinity"
    raise ValueError(
        f"row {named[first]} of x {what}; rows must be finite and of length 1 (within "
        f"{UNIT_TOLERANCE}): divide each row by its norm, and leave out rows that are zero "
        "or failed to embed"
    )


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep float32 products in float32: no TF32 or bfloat16 shortcut that a program turned on."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def tolerance(d: int) -> float:
    """Return the gap between two fast products below which their order is not certain."""
    # Rounding errors of d float32 additions grow like sqrt(d) * 2^-24: this is above 15 of them.
    return max(1e-5, 1e-6 * float(np.sqrt(d)))


def lengths64(block: torch.Tensor) -> torch.Tensor:
    """Return the float64 lengths of float64 rows on the grid: the root of an exact sum."""
    lengths: torch.Tensor = torch.linalg.vector_norm(block, dim=1)
    return lengths


def row_dots(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the (n,) exact dot products of row i of a and row i of b, float64 on the grid."""
    if a.device.type == "cpu":  # without the (n, d) array of products: five times as fast
        return torch.from_numpy(np.einsum("ij,ij->i", a.numpy(), b.numpy()))
    return (a * b).sum(dim=1)


def exact_cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the (len(a), len(b)) cosine similarities of float64 rows on the grid, unrounded."""
    return (a @ b.T) / (lengths64(a)[:, None] * lengths64(b)[None, :])


def exact_row_cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the (n,) cosine similarities of row i of a and row i of b, unrounded float64."""
    return row_dots(a, b) / (lengths64(a) * lengths64(b))


def on_grid(values: torch.Tensor, low: float) -> torch.Tensor:
    """Return float64 values on the 2^-23 grid, clipped to [low, low + 2]; float32 holds them."""
    return (torch.round(values * DISTANCE_GRID) / DISTANCE_GRID).clamp(low, low + 2.0)


def unit_centroids(vectors: NDArray[Any]) -> NDArray[np.float32]:
    """Return unit float32 vectors on the 2^-24 grid; vectors that are so already stay as is.

    Raises
    ------
    ValueError
        If the vectors are not an array of two dimensions, or one is zero or not finite.
    """
    wide = np.asarray(vectors, dtype=np.float64)
    if wide.ndim != 2 or wide.shape[1] < 1:
        raise ValueError(f"centroids have shape {wide.shape}; they must be (k, d)")
    lengths = np.sqrt((wide * wide).sum(axis=1))
    bad = np.flatnonzero(~((lengths > 0) & np.isfinite(lengths)))
    if len(bad):
        raise ValueError(
            f"centroid {bad[0]} is zero or not finite; every centroid needs a direction: take "
            "the centroids that curate.kmeans.fit returned, or leave that one out"
        )
    steps = wide * CENTROID_GRID
    # Dividing again by a length that rounding left at 1 + 1e-8 could move a value by one step. No
    # more than rounding leaves: near ties are decided by products that take centroids for unit.
    close = 1.001 * 2.0**-25 * np.sqrt(wide.shape[1])
    settled = (np.abs(lengths - 1) < close) & (steps == np.rint(steps)).all(axis=1)
    scale = np.where(settled, 1.0, lengths)[:, None]
    return np.asarray(np.rint(steps / scale) / CENTROID_GRID, dtype=np.float32)


def row_identity(keys: NDArray[np.uint64] | None, n: int) -> NDArray[np.uint64]:
    """Return what orders rows that are equal otherwise: the keys, or else the row numbers.

    Raises
    ------
    ValueError
        If ``keys`` is not (n,) uint64.
    """
    if keys is None:
        return np.arange(n, dtype=np.uint64)
    given = np.asarray(keys)
    if given.shape != (n,) or given.dtype != np.uint64:
        raise ValueError(
            f"keys are {given.dtype} of shape {given.shape}; they must be uint64 of shape ({n},): "
            "runtime.row_keys(uids, seed) makes them"
        )
    return given


def mixed_keys(keys: NDArray[np.uint64], seed: int, *path: str) -> NDArray[np.uint64]:
    """Return keys shuffled by the seed and the stream's name: SplitMix64 of key + salt.

    The finaliser of Steele, Lea and Flood (2014), "Fast splittable pseudorandom number
    generators", is a bijection: distinct keys stay distinct.

    Examples
    --------
    >>> mixed_keys(np.arange(3, dtype=np.uint64), 0, "example").argsort().shape
    (3,)
    """
    salt = rng(seed, *path).integers(0, 2**64 - 1, dtype=np.uint64, endpoint=True)
    mixed = keys + salt
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
