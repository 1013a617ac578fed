"""The steps of recover for one batch of groups: views, losses, Adam, stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from curate.runtime import rng
from distill import terms
from distill.curriculum import Draws, axis_weights, draw, resample
from distill.groups import Group
from distill.prepared import Prepared
from distill.recipes import Recipe

_WARM_UP = 3


class Batch:
    """The state of one batch of groups; `step` moves it on by one.

    Nothing in a step waits for the device: crops, learning rates and what else changes with the
    step lie in tables there, and the step number is a tensor too.

    Parameters
    ----------
    groups : sequence of Group
        Of one shape and start.
    begun : (G, B, 3, size, size) float
        What the images begin as.
    recipe : Recipe
    networks : sequence of Prepared
        The teachers, in the order of their turns.
    student : Prepared, optional
        For the adversarial term.
    limits : (tensor, tensor)
        The normalised black and white of each channel.
    seed : int
    graphs : bool
        Record the step as a CUDA graph and replay it.
    features : sequence of (G, B, D) float
        What each network should see in the images; for the feature residual.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        begun: torch.Tensor,
        *,
        recipe: Recipe,
        networks: Sequence[Prepared],
        student: Prepared | None,
        limits: tuple[torch.Tensor, torch.Tensor],
        seed: int,
        graphs: bool,
        features: Sequence[torch.Tensor] = (),
    ) -> None:
        self.recipe, self.networks, self.student = recipe, networks, student
        self.begun, device = begun, begun.device
        self.limits = tuple(limit.to(device, begun.dtype) for limit in limits)
        self.labels = torch.from_numpy(np.stack([g.labels for g in groups])).to(device)
        self.per_class, self.start = groups[0].per_class, groups[0].start
        self.x = begun.clone().requires_grad_(True)
        self.first, self.second = torch.zeros_like(begun), torch.zeros_like(begun)
        self.average = begun.clone() if recipe.flatness else None
        self.features = [one.to(begun.dtype) for one in features]
        self.classwise = [network.class_target(self.labels) for network in networks]
        self.states = [network.states(len(groups)) for network in networks]
        self.loss = torch.full((len(groups),), torch.nan, device=device, dtype=begun.dtype)
        self.distance = self.loss.clone()
        self.now = torch.full((1,), self.start, device=device, dtype=torch.int64)
        self.next = self.start
        self._draw(groups, seed)
        self._tabulate()
        self._runner = _Runner(device, graphs)

    def _draw(self, groups: Sequence[Group], seed: int) -> None:
        recipe, device = self.recipe, self.begun.device
        self.size = self.begun.shape[-1]
        drawn = [
            draw(
                group.name,
                size=self.size,
                iterations=recipe.iterations,
                crop=recipe.crop,
                curriculum=recipe.curriculum,
                milestone=recipe.milestone,
                scale=recipe.scale,
                pad=recipe.pad,
                flip=recipe.flip,
                jitter=recipe.jitter,
                seed=seed,
            )
            for group in groups
        ]
        self.draws = Draws.stack(drawn, device)
        layers = max(network.convolutions for network in self.networks)
        self.keep: torch.Tensor | None = None
        if layers and recipe.convolution_drop:
            shape = (recipe.iterations, layers)
            kept = [
                rng(seed, "recover", "dropped", *group.name).random(shape)
                >= recipe.convolution_drop
                for group in groups
            ]
            self.keep = torch.from_numpy(np.stack(kept)).to(device, self.begun.dtype)

    def _tabulate(self) -> None:
        recipe, steps = self.recipe, self.recipe.iterations
        turns = len(self.networks)
        size, root, momentum = [], [], []
        ends, since = stage_ends(recipe), 0
        for t in range(self.start, steps):
            since += 1
            rate = recipe.learning_rate * (1 + math.cos(math.pi * t / steps)) / 2
            size.append(rate / (1 - recipe.betas[0] ** since))
            root.append(1 / math.sqrt(1 - recipe.betas[1] ** since))
            # A network's first turn has no past to remember.
            momentum.append(recipe.momentum if t - self.start >= turns else 0.0)
            since = 0 if t + 1 in ends else since
        table = torch.tensor([size, root, momentum], dtype=torch.float64)
        padded = torch.cat([torch.zeros(3, self.start, dtype=torch.float64), table], dim=1)
        self.table = padded.to(self.begun.device, self.begun.dtype)

    def step(self) -> None:
        """Take one step, and what follows it at the end of a stage."""
        turn = (self.next - self.start) % len(self.networks)
        out = self._view_size()
        self._runner((turn, out), lambda: self._descend(turn, out))
        self.next += 1
        if self.next in stage_ends(self.recipe):
            self._end_stage()

    def _view_size(self) -> int:
        stage = self.next * self.recipe.stages // max(self.recipe.iterations, 1)
        small = self.recipe.small_view < 1 and stage % 2 == 0
        return round(self.size * self.recipe.small_view) if small else self.size

    def _views(self, out: int) -> Callable[[torch.Tensor], torch.Tensor]:
        recipe = self.recipe
        if (
            out == self.size
            and recipe.crop == "none"
            and not recipe.flip
            and not any(recipe.jitter)
        ):
            return lambda images: images
        box = self.draws.box.index_select(1, self.now)[:, 0].to(self.begun.dtype)
        flip = self.draws.flip.index_select(1, self.now)[:, 0]
        roll = self.draws.roll.index_select(1, self.now)[:, 0]
        rows = axis_weights(box[:, 0], box[:, 2], source=self.size, out=out, roll=roll[:, 0])
        columns = axis_weights(
            box[:, 1], box[:, 3], source=self.size, out=out, flip=flip, roll=roll[:, 1]
        )
        return lambda images: resample(images, rows, columns)

    def _descend(self, turn: int, out: int) -> None:
        total, distance = self._losses(turn, out)
        (gradient,) = torch.autograd.grad(total.sum(), self.x)
        self.loss.copy_(total.detach())
        self.distance.copy_(distance.detach())
        self._adam(gradient)
        self.now += 1

    def _losses(self, turn: int, out: int) -> tuple[torch.Tensor, torch.Tensor]:
        recipe, network = self.recipe, self.networks[turn]
        show = self._views(out)
        seen = show(self.x)
        keep = None
        if self.keep is not None:
            keep = self.keep.index_select(1, self.now)[:, 0, : network.convolutions]
        logits, distance = network.distances(
            seen,
            classwise=self.classwise[turn],
            states=self.states[turn],
            momentum=self.table[2].index_select(0, self.now),
            keep=keep,
        )
        total = recipe.cross_entropy * terms.cross_entropy(logits, self.labels)
        total = total + recipe.statistics * distance
        if recipe.feature_residual:
            near = terms.feature_residual(
                network.take_features(self.labels.shape), self.features[turn]
            )
            total = total + recipe.feature_residual * near
        if self.average is not None:
            flat = terms.flatness(
                logits,
                self._past_logits(network, show),
                self.labels.shape,
                temperature=recipe.flatness_temperature,
            )
            total = total + recipe.flatness * flat
        return self._with_beginning(total, seen, logits, show), distance

    @torch.no_grad()
    def _past_logits(
        self, network: Prepared, show: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        assert self.average is not None
        logits = network(show(self.average).flatten(0, 1))
        self.average.lerp_(self.x, 1 - self.recipe.flatness_decay)
        return logits

    def _with_beginning(
        self,
        total: torch.Tensor,
        seen: torch.Tensor,
        logits: torch.Tensor,
        show: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        recipe = self.recipe
        if recipe.residual:
            total = total + recipe.residual * terms.image_residual(seen, show(self.begun))
        if recipe.adversarial and self.student is not None:
            guess = self.student(seen.flatten(0, 1))
            total = total + recipe.adversarial * terms.adversarial(guess, logits, self.labels)
        return self._with_priors(total, seen)

    def _with_priors(self, total: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        recipe = self.recipe
        if recipe.densify and self.per_class > 1:
            total = total + recipe.densify * terms.densification(
                seen, self.per_class, temperature=recipe.densify_temperature
            )
        if recipe.total_variation:
            total = total + recipe.total_variation * terms.total_variation(seen)
        if recipe.image_norm:
            total = total + recipe.image_norm * terms.image_norm(seen)
        return total

    @torch.no_grad()
    def _adam(self, gradient: torch.Tensor) -> None:
        # Written out on the tensor: every element for itself, so that merged groups and resumed
        # runs are the same as separate and uninterrupted ones.
        size, root, _ = self.table.index_select(1, self.now).unbind()
        self.first.lerp_(gradient, 1 - self.recipe.betas[0])
        self.second.mul_(self.recipe.betas[1])
        self.second.addcmul_(gradient, gradient, value=1 - self.recipe.betas[1])
        scale = self.second.sqrt().mul_(root).add_(self.recipe.epsilon)
        self.x -= scale.reciprocal_().mul_(self.first).mul_(size)
        self.x.clamp_(*self.limits)

    @torch.no_grad()
    def _end_stage(self) -> None:
        self.x.lerp_(self.begun, 1 - self.recipe.stage_keep)
        if self.average is not None:
            self.average.copy_(self.x)
        self.first.zero_()
        self.second.zero_()

    def state(self) -> dict[str, torch.Tensor]:
        """Return all that a step changes; with `load` the run goes on exactly."""
        moving = {
            f"state.{turn}.{number}": tensor
            for turn, tensors in enumerate(self.states)
            for number, tensor in enumerate(tensors)
        }
        own = {
            "x": self.x.detach(),
            "first": self.first,
            "second": self.second,
            "loss": self.loss,
            "distance": self.distance,
            "now": self.now,
        }
        if self.average is not None:
            own["average"] = self.average
        return {**own, **moving}

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take up the state of an interrupted run."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self.next = int(state["now"])


def stage_ends(recipe: Recipe) -> set[int]:
    """Return the numbers of steps after which a stage ends and another follows.

    Examples
    --------
    >>> from distill.recipes import RECIPES
    >>> sorted(stage_ends(RECIPES["fadrm"]))
    [500, 1000, 1500]
    """
    steps = recipe.iterations
    return {k * steps // recipe.stages for k in range(1, recipe.stages)} - {0, steps}


class _Runner:
    """Runs a step, on CUDA as a recorded graph once it is warm; one graph for each key."""

    def __init__(self, device: torch.device, graphs: bool) -> None:
        self.recording = graphs and device.type == "cuda"
        self.warm: dict[tuple[int, int], int] = {}
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def __call__(self, key: tuple[int, int], work: Callable[[], None]) -> None:
        if not self.recording:
            work()
            return
        if key not in self.graphs and self.warm.get(key, 0) < _WARM_UP:
            self.warm[key] = self.warm.get(key, 0) + 1
            side: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                work()
            torch.cuda.current_stream().wait_stream(side)
            return
        if key not in self.graphs:
            self.graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[key]):
                work()
        self.graphs[key].replay()
