"""Recover with EDC's flatness and a feature residual, written plainly.

Flatness (Shao et al. 2024): x_ema(t) = b x_ema(t-1) + (1 - b) x(t), and the loss is
KL(softmax(f(x_ema) / T) || softmax(f(x) / T)) of the same views. The feature residual is the mean
squared difference between what the last layer reads and given targets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy, kl_div

from tests.references.recover_reference import shown


def with_residuals(
    model: torch.nn.Module,
    head: torch.nn.Linear,
    begun: torch.Tensor,
    labels: torch.Tensor,
    views: Sequence[tuple[Sequence[int], bool, Sequence[int]]],
    *,
    learning_rate: float,
    limits: tuple[torch.Tensor, torch.Tensor],
    flatness: float,
    decay: float,
    temperature: float,
    near: float,
    targets: torch.Tensor,
) -> tuple[torch.Tensor, float]:
    """Return the last iterate and the last loss."""
    read: list[torch.Tensor] = []
    handle = head.register_forward_hook(lambda module, given, out: read.append(given[0]))
    x = begun.clone().requires_grad_(True)
    past = begun.clone()
    optimizer = torch.optim.Adam([x], lr=learning_rate, betas=(0.5, 0.9), eps=1e-8)
    for step, view in enumerate(views):
        rate = learning_rate * 0.5 * (1 + math.cos(math.pi * step / len(views)))
        optimizer.param_groups[0]["lr"] = rate
        read.clear()
        logits = model(shown(x, *view))
        loss = cross_entropy(logits, labels) + near * (read[0] - targets).pow(2).mean()
        with torch.no_grad():
            wanted = torch.softmax(model(shown(past, *view)) / temperature, dim=1)
            past = decay * past + (1 - decay) * x
        found = torch.log_softmax(logits / temperature, dim=1)
        loss = loss + flatness * kl_div(found, wanted, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        x.data = torch.minimum(torch.maximum(x.data, limits[0]), limits[1])
    handle.remove()
    return x.detach(), loss.item()
