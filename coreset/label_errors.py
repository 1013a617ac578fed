"""Which labels are likely wrong: confident learning, and votes of nearest neighbours."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from coreset.base import Coreset, check_budget, check_labels, check_probabilities, top
from coreset.features import Features
from coreset.neighbours import nearest

Labels = NDArray[np.int64]
Probabilities = NDArray[np.float64]


def label_errors(
    probabilities: Any, budget: int, *, labels: ArrayLike, score: str = "self-confidence"
) -> Coreset:
    """Return the rows whose labels are least likely wrong (Northcutt et al. 2021).

    Rows that confident learning does not flag (`find_label_errors`) come first; among these, and
    then among the flagged, the highest `label_quality`.

    Parameters
    ----------
    probabilities : (n, C) float
        Softmax outputs of a model that was not trained on the row (cross-validation), or it would
        confirm a wrong label.
    budget : int
        Rows to choose. A smaller budget gives a prefix of a larger one.
    labels : (n,) int or str
        Column numbers; or C different names, whose columns are in sorted order.
    score : {"self-confidence", "normalized-margin"}
        As in `label_quality`.

    Returns
    -------
    Coreset
        Gains are the qualities, less 1 for flagged rows; ``facts["label_errors"]`` counts these.

    Raises
    ------
    ValueError
        If a row is not a distribution, labels are not columns, or the budget cannot be met.

    Examples
    --------
    >>> p = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8], [0.1, 0.9]])
    >>> label_errors(p, 3, labels=[0, 0, 0, 1, 1]).indices
    array([0, 4, 1])
    """
    p = check_probabilities(probabilities)
    y = _columns(labels, p)
    count = check_budget(budget, len(p))
    flagged = _flagged(p, y)
    quality = _quality(p, y, score) - flagged
    chosen = top(quality, count)
    return Coreset.of(chosen, gains=quality[chosen], label_errors=float(flagged.sum()))


def find_label_errors(probabilities: Any, labels: ArrayLike) -> NDArray[np.bool_]:
    """Return which labels are likely wrong, by confident learning (Northcutt et al. 2021).

    The confident joint counts, for each label i, the rows that are confidently of class j
    (`confident_joint`); scaled to the number of rows of each label, it estimates how many of label
    i are in truth j, and as many of label i with the highest ``p_j - p_i`` are flagged (pruning by
    noise rate). At least one row of every class is left, and no row is flagged whose label is the
    most probable class.

    Parameters
    ----------
    probabilities : (n, C) float
        Softmax outputs of a model that was not trained on the row.
    labels : (n,) int or str
        Column numbers; or C different names, whose columns are in sorted order.

    Returns
    -------
    (n,) bool

    Raises
    ------
    ValueError
        If a row is not a distribution or labels are not columns.

    Examples
    --------
    >>> p = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8], [0.1, 0.9]])
    >>> find_label_errors(p, [0, 0, 0, 1, 1])
    array([False, False,  True, False, False])
    """
    p = check_probabilities(probabilities)
    return _flagged(p, _columns(labels, p))


def confident_joint(probabilities: Any, labels: ArrayLike) -> Labels:
    """Return (C, C) counts: rows labelled i and confidently of class j (Northcutt et al. 2021).

    Class j is confident where ``p_j`` reaches the mean ``p_j`` of the rows labelled j. A row with
    several confident classes counts for the most probable of these, one with none does not count.
    The diagonal is 1 at least.

    Parameters and errors are those of `find_label_errors`.

    Returns
    -------
    (C, C) int64
    """
    p = check_probabilities(probabilities)
    return _joint(p, _columns(labels, p))


def label_quality(
    probabilities: Any, labels: ArrayLike, *, score: str = "self-confidence"
) -> NDArray[np.float64]:
    """Return how well each label fits the prediction: 1 well, 0 badly.

    Parameters
    ----------
    probabilities : (n, C) float
        Softmax outputs of a model that was not trained on the row.
    labels : (n,) int or str
        Column numbers; or C different names, whose columns are in sorted order.
    score : {"self-confidence", "normalized-margin"}
        ``p_y``, or ``(p_y - max p_other + 1) / 2``.

    Returns
    -------
    (n,) float64

    Raises
    ------
    ValueError
        If a row is not a distribution, labels are not columns, or the score is unknown.
    """
    p = check_probabilities(probabilities)
    return _quality(p, _columns(labels, p), score)


class LabelVotes(NamedTuple):
    """What the nearest rows say about each label.

    Attributes
    ----------
    agreement : (n,) float64
        Share of the neighbours that have the row's label, 0 to 1.
    majority : (n,) array of labels
        The most frequent label among the neighbours; of equally frequent ones the row's own, else
        the first in sorted order.
    errors : (n,) bool
        Where the majority is not the row's label.
    """

    agreement: NDArray[np.float64]
    majority: NDArray[Any]
    errors: NDArray[np.bool_]


def label_error_votes(
    features: Any,
    labels: ArrayLike,
    *,
    neighbours: int = 10,
    device: str | torch.device = "auto",
    block_bytes: int | None = None,
) -> LabelVotes:
    """Return the votes of the nearest rows by cosine about each label, without training.

    The voting of SimiFeat (Zhu et al. 2022), of all rows once.

    Parameters
    ----------
    features : (n, d) float16, float32 or float64
        Embeddings, none of them zero.
    labels : (n,) int or str
        Classes.
    neighbours : int
        How many nearest other rows vote; all where there are fewer.
    device, block_bytes
        Where neighbours are searched, and in blocks of what size.

    Returns
    -------
    LabelVotes

    Raises
    ------
    ValueError
        If a row is zero or holds NaN, labels do not match, or ``neighbours`` is less than 1.

    Examples
    --------
    >>> x = np.array([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [0.0, 1.0], [0.1, 1.0]])
    >>> label_error_votes(x, ["a", "a", "b", "b", "b"], neighbours=2).errors
    array([False, False,  True, False, False])
    """
    if neighbours < 1:
        raise ValueError(f"neighbours is {neighbours}; it must be at least 1")
    x = Features(features, device=device, block_bytes=block_bytes, unit=True)
    y = check_labels(labels, x.n)
    names = np.unique(labels.detach().cpu().numpy() if hasattr(labels, "detach") else labels)
    if x.n < 2:
        return LabelVotes(np.ones(x.n), names[y], np.zeros(x.n, dtype=bool))
    index, _ = nearest(x, min(neighbours, x.n - 1))
    votes = y[index]
    same = (votes == y[:, None]).sum(axis=1)
    majority = _majority(votes, y)
    return LabelVotes(same / index.shape[1], names[majority], majority != y)


def _majority(votes: Labels, own: Labels) -> Labels:
    """Return the most frequent vote of each row without an (n, C) table."""
    # Sorted votes, and for each how long its run is by then: the longest run is the majority.
    ordered = np.sort(votes, axis=1)
    length = np.ones_like(ordered)
    for c in range(1, ordered.shape[1]):
        again = ordered[:, c] == ordered[:, c - 1]
        length[:, c] = np.where(again, length[:, c - 1] + 1, 1)
    most = length.max(axis=1)
    first = np.take_along_axis(ordered, length.argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.where((votes == own[:, None]).sum(axis=1) == most, own, first)


def _columns(labels: Any, p: Probabilities) -> Labels:
    """Return each row's column; whole numbers are columns, even where some are absent."""
    n, classes = p.shape
    given = labels.detach().cpu().numpy() if hasattr(labels, "detach") else np.asarray(labels)
    numbers = check_labels(given, n)
    if given.dtype.kind in "iu":
        outside = np.flatnonzero((given < 0) | (given >= classes))
        if len(outside):
            raise ValueError(
                f"the label of row {outside[0]} is {given[outside[0]]}; with {classes} columns of "
                f"probabilities, labels are 0 to {classes - 1}"
            )
        return given.astype(np.int64)
    if n and numbers.max() + 1 != classes:
        raise ValueError(
            f"there are {numbers.max() + 1} different labels and {classes} columns of "
            "probabilities; number the labels by their columns"
        )
    return numbers


def _joint(p: Probabilities, y: Labels) -> Labels:
    classes = p.shape[1]
    sizes = np.bincount(y, minlength=classes)
    own = np.bincount(y, weights=p[np.arange(len(y)), y], minlength=classes)
    # A class without a label has no rows to set its threshold: nothing reaches it.
    threshold = np.where(sizes > 0, own / np.maximum(sizes, 1), np.inf)
    # Means of equal numbers come out a rounding error above them.
    confident = p >= threshold - 1e-6
    sure = confident.any(axis=1)
    guess = np.where(confident, p, -1.0).argmax(axis=1)
    joint = np.zeros((classes, classes), np.int64)
    np.add.at(joint, (y[sure], guess[sure]), 1)
    np.fill_diagonal(joint, np.maximum(joint.diagonal(), 1))
    return joint


def _counts(joint: Labels, sizes: Labels) -> Labels:
    """Return how many rows of label i are of class j: rows sum to the sizes, by remainder."""
    # In whole numbers, where equal remainders are equal.
    counts, rest = np.divmod(joint * sizes[:, None], joint.sum(axis=1, keepdims=True))
    short = sizes - counts.sum(axis=1)
    rank = np.argsort(np.argsort(-rest, axis=1, kind="stable"), axis=1, kind="stable")
    counts += rank < short[:, None]
    out: Labels = counts
    return out


def _flagged(p: Probabilities, y: Labels) -> NDArray[np.bool_]:
    flagged = np.zeros(len(y), dtype=bool)
    counts = _counts(_joint(p, y), np.bincount(y, minlength=p.shape[1]))
    predicted = p.argmax(axis=1)
    for i in np.unique(y):
        rows = np.flatnonzero(y == i)
        for j in np.flatnonzero(counts[i]):
            if j != i:
                flagged[rows[top(p[rows, j] - p[rows, i], int(counts[i, j]))]] = True
        flagged[rows[predicted[rows] == i]] = False
        if flagged[rows].all():
            flagged[rows[p[rows, i].argmax()]] = False
    return flagged


def _quality(p: Probabilities, y: Labels, score: str) -> NDArray[np.float64]:
    rows = np.arange(len(y))
    own = p[rows, y]
    if score == "self-confidence":
        return own
    if score != "normalized-margin":
        raise ValueError(f"score is {score!r}; it must be 'self-confidence' or 'normalized-margin'")
    others = p.copy()
    others[rows, y] = 0.0
    out: NDArray[np.float64] = (own - others.max(axis=1) + 1) / 2
    return out
