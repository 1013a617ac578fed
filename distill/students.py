"""Train one student from scratch on a small set, by soft or by hard labels."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from math import cos, pi
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, mse_loss, softmax

from curate.errors import FingerprintError
from curate.manifest import atomic_path, digest
from curate.runtime import resolve_device, rng
from distill.networks import build
from distill.replay import Batch
from distill.squeeze import Precision
from distill.student_batches import BatchSource
from distill.teacher import Teacher

LabelKind = Literal["soft", "hard"]
Loss = Literal["kl", "mse+ce"]
Schedule = Literal["smoothing", "cosine"]
_CHECKPOINT_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """How students are trained; the same for every set that is compared.

    Attributes
    ----------
    epochs : int
    lr : float
        Peak learning rate of AdamW.
    weight_decay : float
    schedule : {"smoothing", "cosine"}
        The rate at step i of n is ``lr (1 + cos(pi i / (zeta n))) / 2``. Smoothing has zeta = 2
        and ends at half the rate (Shao et al. 2024, EDC); cosine has zeta = 1 and ends at 0.
    loss : {"kl", "mse+ce"}
        For soft labels. KL is ``KL(softmax(t / T) || softmax(z / T))``, the mean over the batch,
        without a factor of T^2 (Yin et al. 2023, SRe2L): AdamW does not notice a constant factor.
        The other is the squared error of the logits, the mean over all of them, plus `ce_weight`
        times the cross-entropy with the hard labels, mixed as the pixels are. Labels of the
        ``top-k`` codec are log-probabilities; the squared error then aims at these.
        Hard labels always have the cross-entropy, at a temperature of 1.
    temperature : float
        T of the KL loss. At 20, the choice of SRe2L and RDED for logits of a trained teacher, the
        small logits count almost as much as the large ones.
    ce_weight : float
        0.025 in EDC, 0.1 to 0.15 in G-VBSM.
    ema : float, optional
        Decay of a moving average of the weights that is evaluated in their place (EDC: 0.99); over
        the first steps t it is at most ``(1 + t) / (10 + t)``.
    precision : {"auto", "fp32", "bf16"}
        Auto is bf16 on a GPU and fp32 on a CPU.

    Raises
    ------
    ValueError
        If a value makes no sense.
    """

    epochs: int
    lr: float = 1e-3
    weight_decay: float = 0.01
    schedule: Schedule = "smoothing"
    loss: Loss = "kl"
    temperature: float = 20.0
    ce_weight: float = 0.025
    ema: float | None = None
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs is {self.epochs}; it must be at least 1")
        if not (self.lr > 0 and self.temperature > 0):
            raise ValueError("lr and temperature must be above 0")
        if self.weight_decay < 0 or self.ce_weight < 0:
            raise ValueError("weight_decay and ce_weight must not be negative")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; it must be in [0, 1), or None")
        for name, allowed in (
            ("schedule", ("smoothing", "cosine")),
            ("loss", ("kl", "mse+ce")),
            ("precision", ("auto", "fp32", "bf16")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}"
                )

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step.

        Examples
        --------
        >>> config = StudentConfig(epochs=1, lr=1.0)
        >>> [round(config.rate(step, 100), 4) for step in (0, 50, 100)]
        [1.0, 0.8536, 0.5]
        """
        zeta = 2 if self.schedule == "smoothing" else 1
        return self.lr * (1 + cos(pi * step / (zeta * steps))) / 2


def student_loss(
    z: torch.Tensor, batch: Batch, labels: LabelKind, config: StudentConfig
) -> torch.Tensor:
    """Return the loss of (b, C) logits of a student; see `StudentConfig`."""
    z = z.float()
    if labels == "hard":
        return cross_entropy(z, batch.targets)
    if config.loss == "mse+ce":
        return mse_loss(z, batch.logits) + config.ce_weight * cross_entropy(z, batch.targets)
    t = config.temperature
    return kl_div(
        log_softmax(z / t, dim=1), softmax(batch.logits / t, dim=1), reduction="batchmean"
    )


def train_student(
    batches: BatchSource,
    network: str,
    config: StudentConfig,
    *,
    labels: LabelKind,
    size: int,
    seed: int = 0,
    device: str | torch.device = "auto",
    checkpoint: Path | None = None,
) -> Teacher:
    """Train a student; the result is that of the last epoch, whatever any test set says.

    Each batch goes through the student once. A batch of a single image is left out, since batch
    norm has no moments of it.

    Parameters
    ----------
    batches : BatchSource
        Epochs are asked for by number, from 0.
    network : str
        Name for `distill.networks.build`.
    config : StudentConfig
    labels : {"soft", "hard"}
    size : int
        Pixels of a side of the views.
    seed : int
        Seed of the weights, and of dropout where the network has it; the order of the images is
        that of the batches.
    device : str or torch.device
    checkpoint : Path, optional
        A file that is written after an epoch, about every 30 seconds; a run that finds it goes on
        from there, to the same weights. Remove it when the student is stored.

    Returns
    -------
    Teacher
        The trained network with its normalisation; its accuracy is not known yet.

    Raises
    ------
    ValueError
        If no batch would have two images.
    FingerprintError
        If the checkpoint is that of another training.
    """
    where = resolve_device(device)
    steps = config.epochs * _steps_per_epoch(batches)
    source = batches.source
    facts = [asdict(config), network, labels, size, seed, source.identity, batches.batch_size]
    first = int(rng(seed, "student").integers(2**62))
    built = build(network, classes=len(source.class_names), size=size, seed=first)
    model = built.to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with _own_stream(first, where):
        training = _Training(model, config, where, steps, checkpoint, digest(facts))
        trained = training.run(batches, labels)
    names, mean, std = source.class_names, tuple(source.mean), tuple(source.std)
    return Teacher(trained, network, size, names, mean, std, float("nan"), config.epochs)


class _Training:
    """What a training changes, and its steps."""

    def __init__(
        self,
        model: nn.Module,
        config: StudentConfig,
        device: torch.device,
        steps: int,
        checkpoint: Path | None,
        identity: str,
    ) -> None:
        self.model, self.config, self.device, self.steps = model, config, device, steps
        self.checkpoint, self.identity = checkpoint, identity
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=device.type == "cuda",
        )
        bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
        self.autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
        self.average = None if config.ema is None else _Average(model, config.ema)
        self.step, self.epoch, self.kept = 0, 0, time.monotonic()

    def run(self, batches: BatchSource, labels: LabelKind) -> nn.Module:
        """Train, from the checkpoint where there is one, to the last epoch."""
        self.model.train()
        self._load()
        while self.epoch < self.config.epochs:
            for batch in batches.epoch(self.epoch):
                if len(batch.x) >= 2:
                    self._descend(batch, labels)
            self.epoch += 1
            self._save()
        return self.model if self.average is None else self.average.model

    def _descend(self, batch: Batch, labels: LabelKind) -> None:
        self.optimizer.param_groups[0]["lr"] = self.config.rate(self.step, self.steps)
        with self.autocast:
            z = self.model(batch.x)
        loss = student_loss(z, batch, labels, self.config)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.average is not None:
            self.average.add(self.model, self.step)
        self.step += 1

    def _save(self) -> None:
        if self.checkpoint is None or time.monotonic() - self.kept < _CHECKPOINT_SECONDS:
            return
        cuda = self.device.type == "cuda"
        state = {
            "identity": self.identity,
            "step": self.step,
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.model.state_dict(),
            "stream": torch.get_rng_state(),
            "cuda_stream": torch.cuda.get_rng_state(self.device) if cuda else None,
        }
        with atomic_path(self.checkpoint) as temporary:
            torch.save(state, temporary)
        self.kept = time.monotonic()

    def _load(self) -> None:
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        if state["identity"] != self.identity:
            raise FingerprintError(
                f"{self.checkpoint} is the checkpoint of another student (other images, network "
                "or parameters); remove it, or name another file"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.model.load_state_dict(state["average"])
        torch.set_rng_state(state["stream"])
        if state["cuda_stream"] is not None:
            torch.cuda.set_rng_state(state["cuda_stream"], self.device)
        self.step, self.epoch = state["step"], state["epoch"]


class _Average:
    """A moving average of the weights and of the statistics of batch norm."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = deepcopy(model), decay

    @torch.no_grad()
    def add(self, model: nn.Module, step: int) -> None:
        # Without a slow start the untrained weights would weigh most of a short training.
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for own, new in zip(
            self.model.state_dict().values(), model.state_dict().values(), strict=True
        ):
            if own.is_floating_point():
                own.lerp_(new, share)
            else:
                own.copy_(new)


def _steps_per_epoch(batches: BatchSource) -> int:
    n, b = len(batches.source), batches.batch_size
    steps = n // b + int(n % b > 1) if b > 1 else 0
    if steps == 0:
        raise ValueError(
            f"{n} images in batches of {b}: a student needs batches of at least two images "
            "(batch norm); use a larger batch_size"
        )
    return steps


@contextmanager
def _own_stream(seed: int, device: torch.device) -> Iterator[None]:
    """Give dropout a stream of its own, and the global one back afterwards."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
