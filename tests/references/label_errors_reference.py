"""Confident learning (Northcutt et al. 2021), row by row."""

import math

import numpy as np


def thresholds(p, y):
    out = []
    for j in range(p.shape[1]):
        own = [p[i, j] for i in range(len(p)) if y[i] == j]
        out.append(sum(own) / len(own) if own else math.inf)
    return out


def joint(p, y):
    t = thresholds(p, y)
    classes = p.shape[1]
    counts = [[0] * classes for _ in range(classes)]
    for i in range(len(p)):
        sure = [j for j in range(classes) if p[i, j] >= t[j] - 1e-6]
        if sure:
            counts[y[i]][max(sure, key=lambda j, i=i: p[i, j])] += 1
    for j in range(classes):
        counts[j][j] = max(counts[j][j], 1)
    return np.array(counts)


def errors(p, y):
    counts = joint(p, y)
    found = set()
    for i in range(p.shape[1]):
        rows = [r for r in range(len(p)) if y[r] == i]
        total = int(sum(counts[i]))
        whole = [len(rows) * int(c) // total for c in counts[i]]
        by_rest = sorted(range(len(whole)), key=lambda j: -(len(rows) * int(counts[i][j]) % total))
        for j in by_rest[: len(rows) - sum(whole)]:
            whole[j] += 1
        flagged = set()
        for j in range(p.shape[1]):
            if j != i:
                ranked = sorted(rows, key=lambda r: -(p[r, j] - p[r, i]))
                flagged |= set(ranked[: whole[j]])
        flagged -= {r for r in rows if int(np.argmax(p[r])) == i}
        if flagged and len(flagged) == len(rows):
            flagged.remove(max(rows, key=lambda r: p[r, i]))
        found |= flagged
    return np.array([r in found for r in range(len(p))])
