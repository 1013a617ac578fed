"""The CLIP score of a pair: the cosine similarity of its image and its caption."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Multiples of 2^-23 are exact in float32 over [-1, 1]: rounding to them takes away the last-bit
# noise of a dot product, so that equal pairs have equal scores on every machine.
_GRID = 2.0**23


def clip_scores(image: NDArray[np.floating], text: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return the cosine similarity of each image with its own caption.

    Parameters
    ----------
    image, text : (n, d) float
        Embeddings of the same model; zero or non-finite rows have no direction.

    Returns
    -------
    (n,) float32
        In [-1, 1]; NaN where the image or the caption has no embedding.

    Raises
    ------
    ValueError
        If the shapes differ.

    References
    ----------
    Radford et al. (2021), "Learning Transferable Visual Models From Natural Language Supervision";
    used as a filter by Gadre et al. (2023), "DataComp".

    Examples
    --------
    >>> clip_scores(np.array([[1.0, 0.0]]), np.array([[0.6, 0.8]])).round(3).tolist()
    [0.6000000238418579]
    """
    if image.shape != text.shape:
        raise ValueError(
            f"image and text must have one shape, got {image.shape} and {text.shape}; "
            "are both from the same model?"
        )
    a, b = np.asarray(image, dtype=np.float64), np.asarray(text, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        dot = np.einsum("ij,ij->i", a, b)
        lengths = np.sqrt(np.einsum("ij,ij->i", a, a) * np.einsum("ij,ij->i", b, b))
        similarity = np.clip(dot / lengths, -1.0, 1.0)
    rounded: NDArray[np.float32] = (np.rint(similarity * _GRID) / _GRID).astype(np.float32)
    return rounded


def best_scores(
    score: NDArray[np.float32], count: int, *, keys: NDArray[np.uint64]
) -> NDArray[np.bool_]:
    """Return which `count` rows have the highest scores.

    Exactly `count`, whatever ties there are: among equal scores the smaller key wins, and rows
    without a score (NaN) come last.

    Parameters
    ----------
    score : (n,) float32
    count : int
    keys : (n,) uint64
        What orders rows of equal score; the pipeline passes the rank of the uid.

    Raises
    ------
    ValueError
        If `count` is not in [0, n].
    """
    if not 0 <= count <= len(score):
        raise ValueError(f"count must be in [0, {len(score)}], got {count}")
    order = np.lexsort((keys, np.where(np.isnan(score), np.inf, -score)))
    kept = np.zeros(len(score), dtype=bool)
    kept[order[:count]] = True
    return kept
