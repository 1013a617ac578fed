"""The classes of a pool: which column, which names, and the number of every row's class."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt
from numpy.typing import NDArray

from curate.columns import no_such_column
from curate.errors import BudgetError, PoolError
from curate.pool import Pool

logger = logging.getLogger(__name__)

_LABEL_NAMES = ("label", "labels", "class", "target", "cls")  # cls: WebDataset
_EXACT = 2.0**53  # floats from here on stand for several whole numbers


@dataclass(frozen=True)
class Labels:
    """The class of every row of a pool.

    Attributes
    ----------
    column : str
        Where they were read.
    numbers : (n,) int64
        Places in `names`; -1 where a row has no class.
    names : tuple of str
        Classes that have rows, in the order of their numbers.
    """

    column: str
    numbers: NDArray[np.int64]
    names: tuple[str, ...]

    @classmethod
    def read(cls, pool: Pool, column: str | None) -> Labels:
        """Read them; classes without a row are left out and the rest numbered anew.

        Raises
        ------
        PoolError
            If there is no such column, or it holds no classes.
        """
        described = _class_labels(pool)
        name = _label_column(pool, column, described)
        batches = [batch.column(0) for batch in pool.batches(65_536, columns=[name])]
        values = pa.chunked_array(batches, pool.schema.field(name).type)
        if pt.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        values = _as_classes(values, name)
        listed = described.get(name) if pt.is_integer(values.type) else None
        found = _by_name(values, listed, name) if listed else _by_value(values)
        numbers, names = found
        counts = np.bincount(numbers[numbers >= 0], minlength=len(names))
        there = np.flatnonzero(counts)
        if len(there) < len(names):
            gone = [names[number] for number in np.flatnonzero(counts == 0)]
            logger.warning("%s of %s classes have no rows: %s", len(gone), len(names), _few(gone))
        return cls(name, _renumbered(numbers, there), tuple(names[number] for number in there))

    def ordered_as(self, names: Sequence[str]) -> Labels:
        """Return the same classes with the numbers that another pool gave to their names.

        Raises
        ------
        PoolError
            If the two pools have different classes.
        """
        if set(names) != set(self.names):
            lacking, strange = set(names) - set(self.names), set(self.names) - set(names)
            parts = [f"without {_few(sorted(lacking))}"] if lacking else []
            parts += [f"with {_few(sorted(strange))} that --pool does not have"] if strange else []
            raise PoolError(
                f"--test-pool has other classes than --pool: {' and '.join(parts)}; both must have "
                "the same class names"
            )
        places = {name: number for number, name in enumerate(names)}
        place = np.array([places[name] for name in self.names], np.int64)
        numbers = np.where(self.numbers < 0, -1, place[self.numbers])
        return Labels(self.column, numbers, tuple(names))

    @property
    def counts(self) -> NDArray[np.int64]:
        """Rows of each class, (C,) int64."""
        labelled = self.numbers[self.numbers >= 0]
        return np.bincount(labelled, minlength=len(self.names)).astype(np.int64)


def check_classes(labels: Labels, counts: NDArray[np.int64], ipc: int) -> None:
    """Check that there are classes to tell apart, with as many images as are asked for.

    Raises
    ------
    PoolError
        If there are fewer than two classes.
    BudgetError
        If a class has fewer than `ipc` images.
    """
    if len(labels.names) < 2:
        what = f"only one class, {labels.names[0]!r}" if labels.names else "no class"
        raise PoolError(
            f"--label-col {labels.column} holds {what}; distillation needs at least two"
        )
    least = int(counts.argmin())
    if counts[least] < ipc:
        raise BudgetError(
            f"--ipc {ipc} asks for {ipc:,} images per class, but class {labels.names[least]!r} has "
            f"{counts[least]:,} usable ones; lower --ipc to at most {counts[least]:,}, or leave "
            "the class out of the pool"
        )


def _class_labels(pool: Pool) -> dict[str, list[str]]:
    """Return the class names of the columns that Hugging Face's metadata calls ClassLabel."""
    try:
        described = json.loads((pool.schema.metadata or {}).get(b"huggingface", b"{}"))
        features = dict(described["info"]["features"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {
        name: [str(one) for one in feature["names"]]
        for name, feature in features.items()
        if isinstance(feature, dict)  # lists of features are described by lists
        and feature.get("_type") == "ClassLabel"
        and isinstance(feature.get("names"), list)
        and name in pool.columns
    }


def _label_column(pool: Pool, given: str | None, described: dict[str, list[str]]) -> str:
    if given is not None:
        if given not in pool.columns:
            raise no_such_column(given, pool.columns, "--label-col")
        return given
    if len(described) == 1:
        return next(iter(described))
    for alias in _LABEL_NAMES:
        for column in pool.columns:
            if column.lower() == alias:
                return column
    raise PoolError(
        "the pool has no column of classes that is known by its name; name it with --label-col. "
        f"Columns: {', '.join(pool.columns)}"
    )


def _as_classes(values: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    kind = values.type
    if pt.is_floating(kind):  # pandas makes floats of whole numbers with gaps
        return _whole_numbers(values, name)
    text = pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind)
    if not (pt.is_integer(kind) or pt.is_boolean(kind) or text):
        raise PoolError(
            f"--label-col {name} has type {kind}; classes are whole numbers or strings, one per row"
        )
    return values


def _whole_numbers(values: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    numbers = values.cast(pa.float64()).to_numpy()
    missing = np.isnan(numbers)
    wrong = ~missing & ((np.abs(numbers) >= _EXACT) | (numbers != np.rint(numbers)))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise PoolError(
            f"--label-col {name} has type {values.type} and row {row:,} holds {numbers[row]}; "
            "classes are whole numbers or strings, one per row"
        )
    whole = np.where(missing, 0, numbers).astype(np.int64)
    return pa.chunked_array([pa.array(whole, mask=missing)])


def _by_name(
    values: pa.ChunkedArray, listed: list[str], column: str
) -> tuple[NDArray[np.int64], list[str]]:
    """Return numbers into the listed names; -1 is how Hugging Face writes a hidden class."""
    # Unsigned columns cannot hold the -1; numbers too large for int64 become negative ones.
    signed = values.cast(pa.int64(), safe=False).fill_null(-1)
    numbers: NDArray[np.int64] = signed.to_numpy()
    if numbers.max(initial=-1) >= len(listed) or numbers.min(initial=0) < -1:
        wrong = int(np.flatnonzero((numbers >= len(listed)) | (numbers < -1))[0])
        raise PoolError(
            f"--label-col {column}: row {wrong:,} has class {values[wrong]}, but the pool's "
            f"metadata names {len(listed)} classes, 0 to {len(listed) - 1}"
        )
    if len(set(listed)) < len(listed):
        listed = [f"{name} ({number})" for number, name in enumerate(listed)]
    return numbers, listed


def _by_value(values: pa.ChunkedArray) -> tuple[NDArray[np.int64], list[str]]:
    unique = sorted(value for value in values.unique().to_pylist() if value is not None)
    places = pc.index_in(values, value_set=pa.array(unique, values.type))
    missing = places.is_null().to_numpy()
    numbers = np.where(missing, -1, places.fill_null(0).to_numpy()).astype(np.int64)
    return numbers, [str(value) for value in unique]


def _renumbered(numbers: NDArray[np.int64], there: NDArray[np.int64]) -> NDArray[np.int64]:
    found = np.searchsorted(there, numbers)
    return np.where(numbers < 0, -1, found).astype(np.int64)


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > 5 else shown
