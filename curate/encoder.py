"""Encoders: images and texts in, unit vectors out, the same whatever batch a row is in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from curate.cuda_graph import Captured
from curate.fast_blocks import TextTower, is_causal, speed_up
from curate.model_sources import Network, build_network
from curate.runtime import cpu_multiplies_bf16, resolve_device
from curate.threads import in_threads, one_by_one

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Matrix kernels work in tiles of 16 rows or a divisor of it. With whole tiles every row takes the
# same path (0 of 750 rows differ, tests/curate/test_encoder.py); a batch of 7 changed 27 of 66.
_TILE = 16
# Texts run in groups of like length: a text's own length decides its group, so that its vector does
# not depend on the others. Small steps compute less padding, large ones fill whole runs sooner.
_STEPS = {"cpu": 4}
_STEP = 16


class Encoder(Protocol):
    """What turns images, and mostly texts, into vectors of one space."""

    @property
    def name(self) -> str:
        """The model as the user named it."""

    @property
    def width(self) -> int:
        """The number of dimensions of an embedding."""

    @property
    def has_text(self) -> bool:
        """Whether `encode_texts` works."""

    @property
    def fingerprint(self) -> str:
        """A sha256 of all that changes the vectors: model, weights, precision, preprocessing."""

    @property
    def rows_at_once(self) -> int:
        """The number of images to encode together, for speed; vectors do not depend on it."""

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Turn an RGB image into the model's (3, height, width) input; safe in threads."""

    def encode_images(self, batch: torch.Tensor) -> NDArray[np.float32]:
        """Return (b, width) unit rows for (b, 3, height, width) inputs."""

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return (b, width) unit rows for b texts."""


class TorchEncoder:
    """An `Encoder` on a torch model of open_clip or timm.

    The model always runs on the same number of rows, the last ones padded, since matrix kernels for
    other shapes round differently: so a row's vector does not depend on its neighbours, on its
    place, or on how many rows were asked for together. On CUDA that number is `batch_size`. On a
    CPU it is 16, and each run has one core to itself: nothing waits at the end of each operation,
    and vectors depend neither on `batch_size` nor on the number of threads.

    Parameters
    ----------
    name : str
        The model as the user named it.
    network : Network
        The model and its preprocessing.
    device : torch.device
        Where it runs.
    precision : {"fp32", "bf16", "fp16"}
        The type that the network was built in; vectors are normalised in float32.
    batch_size : int
        Rows per run on CUDA, rounded up to a multiple of 16.

    Attributes
    ----------
    name, width, has_text, fingerprint, rows_at_once
        See `Encoder`.
    device, precision, batch_size
        As resolved.
    """

    def __init__(
        self, name: str, network: Network, *, device: torch.device, precision: str, batch_size: int
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.name = name
        self.width = network.width
        self.has_text = network.tokenizer is not None
        self.device = device
        self.precision = precision
        self.batch_size = -(-batch_size // _TILE) * _TILE
        self.fingerprint = _fingerprint(network, precision)
        self._network = network
        self._module = network.module.eval().requires_grad_(False)
        # Convolutions run faster with the channels innermost; a ViT does not mind.
        self._module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        on_cpu = device.type == "cpu"
        self._run_rows = _TILE if on_cpu else self.batch_size
        self._layout = torch.channels_last
        if on_cpu and speed_up(self._module):
            self._layout = torch.contiguous_format
        encode: Any = self._module.encode_image if self.has_text else self._module
        self._encode_image = Captured(encode) if device.type == "cuda" else encode
        causal = self.has_text and is_causal(self._module)
        self._text = TextTower(self._module, fast=on_cpu) if causal else None

    @property
    def rows_at_once(self) -> int:
        """The number of images to encode together: on a CPU enough for all of its cores."""
        if self.device.type != "cpu":
            return self.batch_size
        return max(self.batch_size, _TILE * torch.get_num_threads())

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Turn an image into the model's input, by the model's own validation transform.

        Parameters
        ----------
        image : PIL.Image.Image
            An RGB image of any size.

        Returns
        -------
        (3, height, width) float32
        """
        return self._network.transform(image)

    def encode_images(self, batch: torch.Tensor) -> NDArray[np.float32]:
        """Return the images' embeddings.

        Parameters
        ----------
        batch : (b, 3, height, width) float32
            What `preprocess` returned, stacked; b may be 0, or more than `batch_size`.

        Returns
        -------
        (b, width) float32
            Unit rows; not finite where the model overflowed (fp16).
        """
        if batch.ndim != 4:
            raise ValueError(f"a batch is (b, 3, height, width); got {tuple(batch.shape)}")

        def forward(rows: torch.Tensor) -> torch.Tensor:
            if self.device.type == "cuda":
                rows = rows.pin_memory()
            rows = rows.to(self.device, _DTYPES[self.precision], non_blocking=True)
            features: torch.Tensor = self._encode_image(rows.contiguous(memory_format=self._layout))
            return features

        spans = range(0, len(batch), self._run_rows)
        return self._run([(slice(at, at + self._run_rows), batch) for at in spans], forward)

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the texts' embeddings.

        Parameters
        ----------
        texts : sequence of str
            b texts; the model's tokenizer cuts them to its context length.

        Returns
        -------
        (b, width) float32
            Unit rows.

        Raises
        ------
        ValueError
            If the model reads images only.
        """
        tokenizer = self._network.tokenizer
        if tokenizer is None:
            raise ValueError(f"{self.name} encodes images only; texts need a model of open_clip")
        if not texts:
            return np.empty((0, self.width), np.float32)
        tokens = tokenizer(list(texts))
        if self._text is None:
            encode: Any = self._module.encode_text
            return self._run(self._grouped(tokens, None), lambda rows: encode(rows.to(self.device)))
        tower, ends = self._text, self._text.ends(tokens)

        def forward(rows: torch.Tensor) -> torch.Tensor:
            rows = rows.to(self.device)
            return tower(rows[:, 1:], rows[:, 0])

        # The end goes along as a column of its own: cut tokens need not show it any more.
        return self._run(self._grouped(torch.column_stack([ends, tokens]), ends), forward)

    def _grouped(
        self, tokens: torch.Tensor, ends: torch.Tensor | None
    ) -> list[tuple[NDArray[np.int64], torch.Tensor]]:
        """Return runs of texts of like length: their places, and all tokens cut to that length."""
        context = tokens.shape[1]
        lengths = np.full(len(tokens), context)
        if ends is not None:
            step = _STEPS.get(self.device.type, _STEP)
            # One more column, which is the end itself.
            lengths = np.minimum((ends.numpy() // step + 1) * step + 1, context)
        runs = []
        for length in np.unique(lengths)[::-1]:  # the longest first: the cores end together
            places = np.flatnonzero(lengths == length)
            for at in range(0, len(places), self._run_rows):
                runs.append((places[at : at + self._run_rows], tokens[:, :length]))
        return runs

    def _run(
        self,
        runs: Sequence[tuple[slice | NDArray[np.int64], torch.Tensor]],
        forward: Callable[[torch.Tensor], torch.Tensor],
    ) -> NDArray[np.float32]:
        """Run the model on some rows of a tensor at a time, each on a core of its own."""
        vectors = np.empty((len(runs[0][1]) if runs else 0, self.width), np.float32)

        def work(run: tuple[slice | NDArray[np.int64], torch.Tensor]) -> None:
            places, rows = run
            chosen = rows[places]
            with torch.inference_mode():
                features = forward(_padded(chosen, self._run_rows)).float()
                unit = torch.nn.functional.normalize(features, dim=-1)[: len(chosen)]
                vectors[places] = unit.cpu().numpy()

        with _exact_kernels(self.device):
            if self.device.type != "cpu":
                one_by_one(work, runs)
                return vectors
            # A sum that torch splits depends on how many threads there are: here none is.
            with in_threads(self.device, most=torch.get_num_threads()) as each:
                each(work, runs)
        return vectors


def load_encoder(
    model: str,
    pretrained: str | None = None,
    *,
    device: str | torch.device = "auto",
    precision: str = "auto",
    batch_size: int | None = None,
) -> TorchEncoder:
    """Load a model and its weights.

    Parameters
    ----------
    model : str
        A model of open_clip (``"ViT-B-32"``), ``"hf-hub:ORG/NAME"`` for open_clip models on the
        Hugging Face Hub, ``"timm:NAME"`` for image-only models of timm, or a path: an open_clip
        model config (JSON), or a folder with ``open_clip_config.json`` and weights.
    pretrained : str, optional
        A tag of the model's published weights, which are downloaded; a ``.safetensors`` file, or
        a torch file of plain tensors; ``"random"`` for an untrained model. By default
        ``laion2b_s34b_b79k`` for ``ViT-B-32``, the only tag where there is one, timm's own
        default, and a folder's own weights.
    device : str or torch.device
        See `curate.runtime.resolve_device`.
    precision : {"auto", "fp32", "bf16", "fp16"}
        ``"auto"`` is bf16 on CUDA, or fp16 where the device lacks bf16; on the CPU it is bf16 where
        the CPU multiplies bf16 (AVX512-BF16 or AMX), and fp32 elsewhere.
    batch_size : int, optional
        Rows per run of the model on CUDA, rounded up to a multiple of 16; 256 by default. On the
        CPU a run is 16 rows, and this has no effect on vectors.

    Returns
    -------
    TorchEncoder

    Raises
    ------
    ModelError
        If the model or the weights are not known, cannot be downloaded, or do not fit together.
    ValueError
        If the device or the precision is not possible.

    References
    ----------
    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.
    """
    resolved = resolve_device(device)
    precision = resolve_precision(precision, resolved)
    network = build_network(model, pretrained, precision=precision)
    if batch_size is None:
        batch_size = 256 if resolved.type == "cuda" else 32
    return TorchEncoder(model, network, device=resolved, precision=precision, batch_size=batch_size)


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return the number type that a model runs in on that device: fp32, bf16 or fp16.

    Raises
    ------
    ValueError
        If the precision is not known, or is fp16 on a CPU.

    Examples
    --------
    >>> resolve_precision("fp32", torch.device("cpu"))
    'fp32'
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not known; use {', '.join(PRECISIONS)}")
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("precision fp16 is for GPUs; on the CPU use fp32, or bf16")
    if precision != "auto":
        return precision
    if device.type == "cpu":
        return "bf16" if cpu_multiplies_bf16() else "fp32"
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _fingerprint(network: Network, precision: str) -> str:
    described = {**network.identity, "precision": precision}
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def _padded(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Repeat the first row up to that size: zeros could be no text at all to some models."""
    if len(rows) == size:
        return rows
    return torch.cat([rows, rows[:1].expand(size - len(rows), *rows.shape[1:])])


@contextmanager
def _exact_kernels(device: torch.device) -> Iterator[None]:
    """Keep TF32 out of float32 and fix the choice of convolution kernels, on CUDA."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
