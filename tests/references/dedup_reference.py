"""Duplicates by the definitions: every pair in float64, one cluster at a time, plain loops."""

from __future__ import annotations

import numpy as np
from scipy.sparse.csgraph import connected_components


def similarities(x):
    wide = x.astype(np.float64)
    wide /= np.sqrt((wide * wide).sum(axis=1))[:, None]
    return np.clip(np.round(wide @ wide.T * 2**23) / 2**23, -1, 1)


def ranked(cluster, cosine_distance, priority=None, keys=None):
    """Yield each cluster's rows: highest priority (hardest) first, NaN last, ties by key."""
    score = cosine_distance.astype(float) if priority is None else priority
    keys = np.arange(len(cluster)) if keys is None else keys
    for c in sorted(set(cluster.tolist()) - {-1}):
        members = np.flatnonzero(cluster == c).tolist()
        members.sort(
            key=lambda i: (np.isnan(score[i]), 0 if np.isnan(score[i]) else -score[i], keys[i])
        )
        yield members


def find_duplicates(x, cluster, cosine_distance, epsilon, mode, priority=None, keys=None):
    n = len(x)
    duplicate_of, evidence = np.full(n, -1), np.full(n, np.nan)
    rules = {"max-earlier": max_earlier, "greedy": greedy, "connected-components": components}
    for members in ranked(cluster, cosine_distance, priority, keys):
        rules[mode](similarities(x[members]), members, 1 - epsilon, duplicate_of, evidence)
    return duplicate_of, evidence


def max_earlier(s, members, threshold, duplicate_of, evidence):
    for j in range(1, len(members)):
        best = int(np.argmax(s[j, :j]))
        evidence[members[j]] = s[j, best]
        if s[j, best] > threshold:
            duplicate_of[members[j]] = members[best]


def greedy(s, members, threshold, duplicate_of, evidence):
    kept = []
    for j, row in enumerate(members):
        if kept:
            best = kept[int(np.argmax(s[j, kept]))]
            evidence[row] = s[j, best]
            if s[j, best] > threshold:
                duplicate_of[row] = members[best]
                continue
        kept.append(j)


def components(s, members, threshold, duplicate_of, evidence):
    """The evidence is the best path to an earlier row, a path being as good as its worst pair."""
    path = s.copy()
    for via in range(len(s)):
        path = np.maximum(path, np.minimum(path[:, via, None], path[None, via, :]))
    for j in range(1, len(s)):
        evidence[members[j]] = path[j, :j].max()
    for j, first in enumerate(first_of_component(s > threshold)):
        if first != j:
            duplicate_of[members[j]] = members[first]


def first_of_component(linked):
    _, name = connected_components(linked, directed=False)
    return [int(np.flatnonzero(name == c)[0]) for c in name]
