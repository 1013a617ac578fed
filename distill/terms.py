"""The terms of recover's loss: each gives one number for every group of images.

Groups never touch each other, so a batch of several groups has for each of them the loss and the
gradient that it would have alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from distill.statistics import Moments

_TINY = 1e-30


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return (G,) mean cross-entropies of (G * B, C) logits and (G, B) labels."""
    each = functional.cross_entropy(logits, labels.flatten(), reduction="none")
    return each.view(labels.shape).mean(dim=1)


class LayerNorms:
    """L2 norms (not squared) of the parts of a vector, summed with a weight for each part.

    Parameters
    ----------
    widths : sequence of int
        Entries of each part.
    weights : sequence of float
        One for each part.
    device, dtype
        Of the vectors.

    Examples
    --------
    >>> norms = LayerNorms([2, 1], [10.0, 1.0], torch.device("cpu"))
    >>> norms(torch.tensor([[3.0, 4.0, -2.0]])).tolist()
    [52.0]
    """

    def __init__(
        self,
        widths: Sequence[int],
        weights: Sequence[float],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        owner = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(list(widths)))
        member = functional.one_hot(owner, len(widths)).to(device, dtype)
        self.member = member
        self.weights = torch.tensor(list(weights), device=device, dtype=dtype)

    def __call__(self, difference: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Return (G,) sums of (G, D) differences; `keep`, (G, parts), drops parts of a group."""
        square = difference**2 @ self.member
        # The floor gives a norm of zero the gradient zero instead of 0 / 0.
        norm = square.clamp(min=_TINY).sqrt() * self.weights
        return (norm if keep is None else norm * keep).sum(dim=1)


def statistics_distance(
    seen: Moments,
    target: Moments,
    norms: LayerNorms,
    *,
    variance_weight: float = 1.0,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return (G,) distances of layer statistics from their targets (SRe2L, Yin et al. 2023).

    ``sum over layers w_l (||mean - target mean|| + v ||variance - target variance||)``

    Parameters
    ----------
    seen : Moments
        (G, D) of the synthetic images.
    target : Moments
        (1, D) or (G, D).
    norms : LayerNorms
        The layers and their weights w_l.
    variance_weight : float
        v.
    keep : (G, layers) float, optional
        Zero leaves a layer out.
    """
    means = norms(seen.mean - target.mean, keep)
    return means + variance_weight * norms(seen.variance - target.variance, keep)


def smoothed(seen: Moments, state: Moments, momentum: torch.Tensor) -> Moments:
    """Return the moving average of the statistics, with the gradient of the present ones.

    The state is updated in place. A momentum of 0 forgets it, as at the first step, so that the
    average never begins at zero (in G-VBSM's published code it does).

    Parameters
    ----------
    seen, state : Moments
        (G, D) each.
    momentum : () float tensor
        The weight of the past.
    """
    parts = []
    for now, past in ((seen.mean, state.mean), (seen.variance, state.variance)):
        past.copy_(momentum * past + (1 - momentum) * now.detach())
        parts.append(past + now - now.detach())
    return Moments(parts[0], parts[1])


def densification(seen: torch.Tensor, per_class: int, *, temperature: float) -> torch.Tensor:
    """Return (G,) data densification losses (Shao et al. 2024, G-VBSM).

    For the images X of a class, the eigenvalues of ``X X'`` are pulled towards a flatter spread of
    themselves: ``KL(softmax(l / T) || softmax(l))``, summed over the classes of the group.

    Parameters
    ----------
    seen : (G, B, c, h, w) float
        Images of a class lie next to each other.
    per_class : int
        How many.
    temperature : float
        T.
    """
    groups = seen.shape[0]
    rows = seen.float() if seen.dtype != torch.float64 else seen
    x = rows.reshape(groups, -1, per_class, rows[0, 0].numel())
    eigenvalues = torch.linalg.eigvalsh(x @ x.transpose(-1, -2))
    flatter = (eigenvalues.detach() / temperature).softmax(dim=-1)
    divergence = functional.kl_div(eigenvalues.log_softmax(dim=-1), flatter, reduction="none")
    return divergence.sum(dim=(1, 2))


def image_residual(seen: torch.Tensor, begun: torch.Tensor) -> torch.Tensor:
    """Return (G,) mean squared differences of two (G, B, c, h, w) batches of views (CUDD)."""
    return ((seen - begun) ** 2).mean(dim=(1, 2, 3, 4))


def feature_residual(features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return (G,) mean squared differences of (G, B, D) features from their targets."""
    return ((features - target) ** 2).mean(dim=(1, 2))


def flatness(
    logits: torch.Tensor, past: torch.Tensor, shape: torch.Size, *, temperature: float
) -> torch.Tensor:
    """Return (G,) divergences ``KL(softmax(past / T) || softmax(logits / T))``, mean over images.

    Shao et al. 2024 (EDC): `past` is what the teacher says of a moving average of the images. An
    image that moved into a sharp valley is drawn back to where its average lies. The published
    code, where it is not commented out, divides by the number of classes too.

    Parameters
    ----------
    logits, past : (G * B, C) float
        The gradient goes through the first alone.
    shape : (G, B)
    temperature : float
        T.
    """
    wanted = (past.detach() / temperature).log_softmax(dim=1)
    found = (logits / temperature).log_softmax(dim=1)
    each = (wanted.exp() * (wanted - found)).sum(dim=1)
    return each.view(shape).mean(dim=1)


def adversarial(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return (G,) means of ``-log(1 - p_student(label))`` where the teacher is right (CUDD).

    Parameters
    ----------
    student, teacher : (G * B, C) float
        Logits.
    labels : (G, B) int64
    """
    probability = student.softmax(dim=1).gather(1, labels.view(-1, 1))[:, 0]
    each = -torch.log1p(-probability.clamp(max=1 - 1e-6)).view(labels.shape)
    right = (teacher.argmax(dim=1).view(labels.shape) == labels).to(each.dtype)
    return (each * right).sum(dim=1) / right.sum(dim=1).clamp(min=1)


def total_variation(seen: torch.Tensor) -> torch.Tensor:
    """Return (G,) sums of the L2 norms of the four neighbour differences of a group's views."""
    pairs = (
        (seen[..., :, :-1], seen[..., :, 1:]),
        (seen[..., :-1, :], seen[..., 1:, :]),
        (seen[..., 1:, :-1], seen[..., :-1, 1:]),
        (seen[..., :-1, :-1], seen[..., 1:, 1:]),
    )
    norms = [_norm((one - other).flatten(1)) for one, other in pairs]
    return torch.stack(norms).sum(dim=0)


def image_norm(seen: torch.Tensor) -> torch.Tensor:
    """Return (G,) mean L2 norms of the images of each group."""
    return _norm(seen.flatten(2)).mean(dim=1)


def _norm(x: torch.Tensor) -> torch.Tensor:
    return (x**2).sum(dim=-1).clamp(min=_TINY).sqrt()
