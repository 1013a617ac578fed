"""Rows in 8 bits, and the fast products of rows and columns, of which the error is known.

On a processor with instructions for 8-bit products (VNNI, AMX; CUDA) rows and columns are rounded
to 8-bit codes, whose products are four times as fast as float32: with a fixed random dither u,

    x = centre + step * (code - u) + error,    code = round((x - centre) / step + u).

Whatever x is, the d numbers of the error are uniform in +-step / 2 and independent of each other
(Schuchman, 1964; "subtractive dither"). The product of the error and a vector v is then
sub-Gaussian, of standard deviation step |v| / sqrt(12): it exceeds 9 of these once in 10^17 times.
So columns further apart than that are in the right order; `curate.search` settles the rest.
Elsewhere the fast products are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from curate.runtime import rng
from curate.unit_rows import tolerance

_LEVELS = 127
_MOST_STEPS = 1 << 28
_DEVIATIONS = 9.0 / 12**0.5


@cache
def product_type(device: str) -> str:
    """Return the type of the fast products on a kind of device: "int8" or "float32"."""
    if not hasattr(torch, "_int_mm"):
        return "float32"
    if device == "cuda":
        return "int8" if torch.cuda.get_device_capability() >= (8, 0) else "float32"
    flags = ("_is_vnni_supported", "_is_amx_tile_supported")
    fast = any(getattr(torch.cpu, flag, bool)() for flag in flags)
    return "int8" if fast and torch.backends.mkldnn.enabled else "float32"


@dataclass(frozen=True)
class Frame:
    """Where the codes of rows lie: around `centre`, `step` apart, moved by the `dither`."""

    centre: torch.Tensor
    step: float
    dither: torch.Tensor

    @classmethod
    def of(cls, sample: torch.Tensor) -> Frame:
        """Return a frame for rows such as these (m, d) float32 ones."""
        centre = sample.mean(dim=0)
        largest = (sample - centre).abs().amax(dim=1).sort().values
        # With room for what is not in the sample. Outliers that reach further are cut off.
        usual = float(largest[int(0.9 * (len(largest) - 1))])
        reach = min(1.25 * float(largest[-1]), 1.5 * usual)
        return cls(centre, _step(reach), _dither("rows", centre))

    def for_columns(self, columns: torch.Tensor) -> Frame:
        """Return the frame around the same centre, of another dither, that holds the columns."""
        reach = float((columns - self.centre).abs().max())
        return Frame(self.centre, _step(reach), _dither("columns", self.centre))

    def encode(self, rows: torch.Tensor) -> Codes:
        """Return the codes of (m, d) float32 rows."""
        off = rows - self.centre
        length = torch.linalg.vector_norm(off, dim=1)
        steps = torch.add(self.dither, off, alpha=1 / self.step)
        cut = torch.zeros_like(length)
        largest = torch.maximum(steps.amax(dim=1), -steps.amin(dim=1))
        # What is above 127 steps without the dither: the rest's error is uniform, not biased.
        outside = torch.nonzero(largest > _LEVELS - 0.5)[:, 0]
        if len(outside):
            cut[outside] = off[outside].abs_().sub_(_LEVELS * self.step).relu_().sum(dim=1)
        return Codes(steps.round_().clamp_(-_LEVELS, _LEVELS).to(torch.int8), length, cut)


def _step(reach: float) -> float:
    # Not finer than what keeps products and biases of unit vectors far below 2^29, and makes 2^28
    # products worth more than 4, the largest error there is. The last half step is for the dither.
    return max(reach, 0.016) / (_LEVELS - 0.5)


def _dither(name: str, centre: torch.Tensor) -> torch.Tensor:
    return _uniform(name, len(centre)).to(centre.device)


@cache
def _uniform(name: str, d: int) -> torch.Tensor:
    return torch.from_numpy(rng(0, "dither", name).random(d, dtype=np.float32) - np.float32(0.5))


@dataclass(frozen=True)
class Codes:
    """Rows in 8 bits.

    Attributes
    ----------
    values : (m, d) int8
    length : (m,) float32
        Distance from the frame's centre.
    cut : (m,) float32
        Sum of what lies outside the codes' range.
    """

    values: torch.Tensor
    length: torch.Tensor
    cut: torch.Tensor

    def __getitem__(self, rows: slice | torch.Tensor) -> Codes:
        if isinstance(rows, slice):
            return Codes(self.values[rows], self.length[rows], self.cut[rows])
        # Twice as fast as brackets.
        parts = (self.values, self.length, self.cut)
        return Codes(*(part.index_select(0, rows) for part in parts))

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def joined(cls, parts: list[Codes]) -> Codes:
        """Return the rows of all parts."""
        values = torch.cat([part.values for part in parts])
        length = torch.cat([part.length for part in parts])
        return cls(values, length, torch.cat([part.cut for part in parts]))


@dataclass(frozen=True)
class Queries:
    """Rows that look for their best column.

    Attributes
    ----------
    values : (m, d) int8 or float32
    slack : (m,) int32 or float32
        Of products: by how much two of them may be in the wrong order because of the row.
    floor : (m,) int32 or float32, optional
        Products below it are of no interest.
    """

    values: torch.Tensor
    slack: NDArray[Any]
    floor: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.slack)

    def __getitem__(self, rows: slice) -> Queries:
        floor = None if self.floor is None else self.floor[rows]
        return Queries(self.values[rows], self.slack[rows], floor)


class Columns:
    """Unit vectors that blocks of rows are compared to.

    Parameters
    ----------
    count : int
    read : callable
        Returns float32 vectors of length 1, or so nearly that it does not matter.

    Attributes
    ----------
    unit : float
        What 1 in a product means as a difference of cosine similarities.
    slack : (k,) array or None
        Of products: how far one may lie below that of the column's exact place; the products
        themselves are as far above what they are without it.
    """

    unit = 1.0
    slack: NDArray[Any] | None = None

    def __init__(self, count: int, read: Callable[[int, int], torch.Tensor]) -> None:
        self.count, self.read = count, read

    def __len__(self) -> int:
        return self.count

    def queries(self, rows: torch.Tensor) -> Queries:
        """Return (m, d) float32 rows as queries."""
        return Queries(rows, np.full(len(rows), tolerance(rows.shape[1]), np.float32))

    def products(self, queries: Queries, part: slice) -> torch.Tensor:
        """Return the (m, k) fast products with a range of columns."""
        return queries.values @ self.read(part.start, part.stop).T


class CodedColumns(Columns):
    """Columns in 8 bits.

    Parameters
    ----------
    codes : Codes
        Of the columns, in the frame `own`. Unless they are the rows themselves, nothing is cut.
    along : (k,) float64
        Dot products of the columns and the centre.
    own, frame : Frame
        Of the columns and of the rows, around the same centre.
    """

    def __init__(self, codes: Codes, along: torch.Tensor, own: Frame, frame: Frame) -> None:
        self.codes, self.own, self.frame = codes, own, frame
        self.unit = frame.step * own.step
        # Of float32 sums, and of lengths that are not quite 1, in products.
        self.rounding = max(2e-6, 1e-7 * codes.values.shape[1] ** 0.5)
        furthest = float(codes.cut.max())
        self.reach = own.step * _LEVELS + furthest
        off = codes.length * (_DEVIATIONS * frame.step)
        off += codes.cut * (frame.step * _LEVELS + furthest)
        steps = _steps(off, self.unit)
        # row . column = (row - centre) . (column - centre) + centre . column + a number of the row.
        # The first is unit * (row code - u) . (column code - v): less u . column code, and again
        # a number of the row.
        self.mean_along = float(along.mean())
        bias = (along - self.mean_along) / self.unit
        bias -= (codes.values.float() @ frame.dither).double()
        self.bias = bias.round().int() + steps
        self.slack: NDArray[Any] = (2 * steps).cpu().numpy()

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, columns: slice | torch.Tensor) -> CodedColumns:
        """Return some of the columns."""
        some = copy(self)
        some.codes, some.bias = self.codes[columns], self.bias[columns]
        chosen = columns if isinstance(columns, slice) else columns.cpu().numpy()
        some.slack = self.slack[chosen]
        return some

    def queries(self, rows: torch.Tensor) -> Queries:
        """Return (m, d) float32 rows as queries."""
        return self.coded_queries(self.frame.encode(rows))

    def row_numbers(self, codes: Codes, along: torch.Tensor) -> torch.Tensor:
        """Return (m,) float64: what a row's products lack to be cosine similarities.

        Parameters
        ----------
        codes : Codes
            Of rows, in the rows' frame.
        along : (m,) float64
            Dot products of the rows and the centre.
        """
        u, v, m = self.frame.dither, self.own.dither, self.frame.centre.double()
        number = float(u.double() @ v.double()) - (codes.values.float() @ v).double()
        return number * self.unit + along - float(m @ m) + self.mean_along

    def floor(self, queries: Queries, numbers: torch.Tensor, least: float) -> NDArray[np.int32]:
        """Return products below which no column is as similar as `least` to a row."""
        steps = torch.floor((least - self.rounding - numbers) / self.unit).clamp_(
            -_MOST_STEPS, _MOST_STEPS
        )
        return np.asarray(steps.int().cpu().numpy() - queries.slack // 2 - 1, dtype=np.int32)

    def coded_queries(self, codes: Codes) -> Queries:
        """Return rows as queries by their codes alone."""
        # The product of both errors is below a quarter of the steps' product in each dimension.
        both = self.unit * codes.values.shape[1] / 4 + self.rounding
        off = codes.length * (_DEVIATIONS * self.own.step) + codes.cut * self.reach + both
        return Queries(codes.values, (2 * _steps(off, self.unit)).cpu().numpy())

    def products(self, queries: Queries, part: slice) -> torch.Tensor:
        """Return the (m, k) fast products with a range of columns."""
        return _int_product(queries.values, self.codes.values[part]).add_(self.bias[part])


def _steps(off: torch.Tensor, unit: float) -> torch.Tensor:
    """Return differences of similarities as integers of products, rounded up."""
    return (off / unit).ceil_().add_(1).clamp_(max=float(_MOST_STEPS)).int()


def encoded(columns: torch.Tensor, frame: Frame) -> CodedColumns:
    """Return (k, d) float32 columns in 8 bits, for rows of that frame."""
    own = frame.for_columns(columns)
    return CodedColumns(own.encode(columns), (columns @ frame.centre).double(), own, frame)


def _int_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the (len(a), len(b)) int32 products of int8 codes."""
    if a.device.type == "cpu":
        return torch._int_mm(a, b.T)
    # CUDA wants more than 16 rows, and multiples of 8 columns and dimensions.
    pad, wide = torch.nn.functional.pad, -a.shape[1] % 8
    a_padded = pad(a, (0, wide, 0, max(0, 32 - len(a))))
    b_padded = pad(b, (0, wide, 0, -len(b) % 8))
    return torch._int_mm(a_padded, b_padded.T)[: len(a), : len(b)]


def squares_type(d: int) -> torch.dtype:
    """Return the integers that hold the squared distances of (n, d) codes."""
    return torch.int32 if 4 * d * _LEVELS**2 < 2**31 else torch.int64


def exact_int_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the (len(a), len(b)) products of int8 codes, the same on every device."""
    whole = squares_type(a.shape[1])
    if product_type(a.device.type) == "int8":
        return _int_product(a, b).to(whole)
    # Sums of fewer than 2^24 are exact in float32 too, of fewer than 2^53 in float64.
    wide = torch.float32 if a.shape[1] * _LEVELS**2 < 2**24 else torch.float64
    return (a.to(wide) @ b.to(wide).T).to(whole)
