"""The CLIP score and the filter by it, one row at a time."""

from __future__ import annotations

import math


def clip_score(image, text):
    """Cosine of two vectors; None if one of them has no direction."""
    dot = math.fsum(float(a) * float(b) for a, b in zip(image, text, strict=True))
    lengths = [math.sqrt(math.fsum(float(a) ** 2 for a in v)) for v in (image, text)]
    if not all(map(math.isfinite, [dot, *lengths])) or 0 in lengths:
        return None
    return dot / (lengths[0] * lengths[1])


def best(scores, uids, count):
    """The `count` rows of the highest scores; the smaller uid wins a tie, no score comes last."""
    rows = range(len(scores))
    order = sorted(rows, key=lambda i: (scores[i] is None, -(scores[i] or 0.0), uids[i]))
    return set(order[:count])
