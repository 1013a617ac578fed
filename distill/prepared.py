"""A teacher made ready for recover: frozen, in the fast layout and type, its statistics tapped."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from curate.runtime import cpu_multiplies_bf16
from distill.features import classifier
from distill.recipes import Recipe
from distill.statistics import Moments, RealStatistics, Taps
from distill.teacher import Teacher
from distill.terms import LayerNorms, smoothed, statistics_distance

Precision = Literal["auto", "bfloat16", "float32", "float64"]
_TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the type that networks compute in; ``auto`` takes bfloat16 where it is fast.

    Raises
    ------
    ValueError
        If the precision is unknown.
    """
    if precision == "auto":
        fast = device.type == "cuda" or (device.type == "cpu" and cpu_multiplies_bf16())
        return torch.bfloat16 if fast else torch.float32
    if precision not in _TYPES:
        raise ValueError(f"precision {precision!r} is not one of auto, {', '.join(_TYPES)}")
    return _TYPES[precision]


class Prepared:
    """A copy of a teacher that gives logits and statistics distances of groups of images.

    Parameters
    ----------
    teacher : Teacher
        Left as it is.
    recipe : Recipe
    reference : Teacher
        Whose normalisation the images have.
    device : torch.device
    dtype : torch.dtype
        What convolutions and products compute in; statistics are float32 or wider.
    real : RealStatistics, optional
        Needed for class-wise and convolution statistics.
    tapped : bool
        Whether statistics are wanted.

    Raises
    ------
    ValueError
        If statistics are wanted and the network has no batch norm.
    """

    def __init__(
        self,
        teacher: Teacher,
        recipe: Recipe,
        *,
        reference: Teacher,
        device: torch.device,
        dtype: torch.dtype,
        real: RealStatistics | None = None,
        tapped: bool = True,
    ) -> None:
        self.recipe, self.dtype, self.device = recipe, dtype, device
        self.exact = torch.float64 if dtype == torch.float64 else torch.float32
        self.model = deepcopy(teacher.model).to(device).to(memory_format=torch.channels_last)
        self._affine = between(reference, teacher, device, self.exact)
        self.taps: Taps | None = None
        if tapped and recipe.statistics > 0:
            self._tap(teacher, real)
        self._head: torch.Tensor | None = None
        if tapped and recipe.feature_residual:
            classifier(self.model, teacher.classes).register_forward_pre_hook(self._watch)
        _cast(self.model, dtype)

    def _tap(self, teacher: Teacher, real: RealStatistics | None) -> None:
        recipe = self.recipe
        self.taps = Taps(self.model, patch=recipe.convolution_patch)
        if not self.taps.norms:
            raise ValueError(
                f"network {teacher.network!r} has no batch norm, whose statistics "
                f"{recipe.name!r} matches: use another network, or a recipe with statistics=0"
            )
        first = 1.0 if recipe.convolution_patch else recipe.first_multiplier
        widths = self.taps.norm_widths()
        weights = [first] + [1.0] * (len(widths) - 1)
        self._norms = LayerNorms(widths, weights, self.device, self.exact)
        running = self.taps.running()
        self._running = Moments(running.mean.to(self.exact), running.variance.to(self.exact))
        if real is not None:
            self._classes = _moved(real.norm, self.device, self.exact)
            self._places = _moved(real.convolution, self.device, self.exact)
        if recipe.convolution_patch:
            layers = len(self.taps.convolutions)
            each = [recipe.first_multiplier] + [1.0] * (layers - 1)
            widths = self.taps.convolution_widths()
            self._conv_norms = LayerNorms(widths, each + each, self.device, self.exact)

    def _watch(self, module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        self._head = given[0]

    def take_features(self, shape: torch.Size) -> torch.Tensor:
        """Return the (G, B, D) features of the images that passed last."""
        assert self._head is not None
        features, self._head = self._head.flatten(1).to(self.exact), None
        return features.view(*shape, -1)

    @property
    def convolutions(self) -> int:
        """The number of convolutions whose statistics are matched."""
        return 0 if self.taps is None else len(self.taps.convolutions)

    def states(self, groups: int) -> list[torch.Tensor]:
        """Return zeros for the moving averages of so many groups."""
        if self.taps is None or not self.recipe.momentum:
            return []
        widths = [sum(self.taps.norm_widths())] * 2
        if self.convolutions:
            widths += [sum(self.taps.convolution_widths())] * 2
        return [torch.zeros(groups, w, device=self.device, dtype=self.exact) for w in widths]

    def __call__(self, seen: torch.Tensor) -> torch.Tensor:
        """Return (n, C) logits of (n, 3, h, w) images in the reference's normalisation."""
        if self._affine is not None:
            seen = seen * self._affine[0] + self._affine[1]
        x = seen.to(self.dtype).contiguous(memory_format=torch.channels_last)
        if self.dtype != torch.bfloat16:
            logits: torch.Tensor = self.model(x)
            return logits
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            return self.model(x).float()  # type: ignore[no-any-return]

    def distances(
        self,
        seen: torch.Tensor,
        *,
        classwise: Moments | None,
        states: list[torch.Tensor],
        momentum: torch.Tensor,
        keep: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits and each group's statistics distance, unweighted.

        Parameters
        ----------
        seen : (G, B, 3, h, w) float
        classwise : Moments, optional
            From `class_target`.
        states : list of tensor
            From `states`; updated.
        momentum : (1,) float
            Weight of the past.
        keep : (G, convolutions) float, optional
            Zero leaves a convolution out.
        """
        groups = len(seen)
        if self.taps is None:
            return self(seen.flatten(0, 1)), torch.zeros(groups, device=self.device)
        with self.taps.reading(groups):
            logits = self(seen.flatten(0, 1))
            found = self.taps.norm_moments()
            convolved = self.taps.convolution_moments() if self.convolutions else None
        if states:
            found = smoothed(found, Moments(states[0], states[1]), momentum)
        loss = self._norm_distance(found, classwise)
        if convolved is not None:
            if states:
                convolved = smoothed(convolved, Moments(states[2], states[3]), momentum)
            both = None if keep is None else torch.cat([keep, keep], dim=1)
            loss = loss + statistics_distance(convolved, self._places, self._conv_norms, keep=both)
        return logits, loss

    def _norm_distance(self, found: Moments, classwise: Moments | None) -> torch.Tensor:
        share, weight = self.recipe.class_fraction, self.recipe.variance_weight
        loss = torch.zeros(len(found.mean), device=self.device, dtype=self.exact)
        if share < 1:
            loss = (1 - share) * statistics_distance(
                found, self._running, self._norms, variance_weight=weight
            )
        if classwise is not None:
            loss = loss + share * statistics_distance(
                found, classwise, self._norms, variance_weight=weight
            )
        return loss

    def class_target(self, labels: torch.Tensor) -> Moments | None:
        """Return the mean of the class statistics of each group's images, if they are matched.

        Parameters
        ----------
        labels : (G, B) int64
        """
        if self.taps is None or not self.recipe.class_fraction:
            return None
        share = one_hot(labels, len(self._classes.mean)).to(self.exact).mean(dim=1)
        return Moments(share @ self._classes.mean, share @ self._classes.variance)


def _moved(moments: Moments, device: torch.device, dtype: torch.dtype) -> Moments:
    return Moments(moments.mean.to(device, dtype), moments.variance.to(device, dtype))


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        model.double()
    elif dtype == torch.bfloat16:
        # Once here instead of in every step: autocast keeps no copy of frozen weights.
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(dtype)


def between(
    reference: Teacher, teacher: Teacher, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the scale and shift from one teacher's normalisation to another's, if they differ."""
    if (reference.mean, reference.std) == (teacher.mean, teacher.std):
        return None
    m0, s0, m1, s1 = (
        torch.tensor(values, dtype=torch.float64)[:, None, None]
        for values in (reference.mean, reference.std, teacher.mean, teacher.std)
    )
    return (s0 / s1).to(device, dtype), ((m0 - m1) / s1).to(device, dtype)


def ascended(
    teacher: Teacher, x: torch.Tensor, labels: torch.Tensor, *, steps: int, radius: float
) -> Teacher:
    """Return a copy of a teacher whose weights ascended the cross-entropy of a batch.

    Directed Weight Adjustment (Du et al. 2024): `steps` times ``w += (radius / steps) g / ||g||``
    with the gradient g over all weights, batch norm in evaluation mode. The teacher itself is not
    changed, so that no batch sees the adjustment of another (in the published code they add up).

    Parameters
    ----------
    teacher : Teacher
    x : (b, 3, h, w) float
        Normalised for this teacher.
    labels : (b,) int64
    steps : int
    radius : float
        The length of the whole way.
    """
    model = deepcopy(teacher.model).to(x.device)
    weights = list(model.parameters())
    for weight in weights:
        weight.requires_grad_(True)
    for _ in range(steps):
        gradients = torch.autograd.grad(cross_entropy(model(x), labels), weights, allow_unused=True)
        found = [g for g in gradients if g is not None]
        length = torch.stack([g.square().sum() for g in found]).sum().sqrt().clamp(min=1e-12)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    weight.add_(gradient * (radius / steps / length))
    return replace(teacher, model=model)


def placed(teacher: Teacher, device: torch.device) -> Teacher:
    """Return the teacher on a device; itself where it is there already."""
    if all(tensor.device == device for tensor in teacher.model.state_dict().values()):
        return teacher
    return replace(teacher, model=deepcopy(teacher.model).to(device))
