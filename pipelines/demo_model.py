"""The demo's model: a CLIP of open_clip, small enough to train in seconds on one core."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from curate.manifest import atomic_path, atomic_write_json, open_step
from curate.progress import task
from pipelines.demo_pool import DIGITS, SIDE, TEMPLATES, Scans

#: What open_clip builds the model from. The vocabulary is that of its tokenizer; 8 tokens hold the
#: longest caption.
CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "image_size": SIDE},
    "text_cfg": {
        "context_length": 8,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 1,
    },
}
CONFIG_FILE, WEIGHTS_FILE = "digits.json", "digits.safetensors"
BATCH = 64
_LEARNING_RATE = 3e-3
_MOST_GRADIENT_NORM = 1.0
_MOST_LOGIT_SCALE = 100.0
_MOST_SHIFT = 4
_NOISE = 0.3
_EVALUATED_AT_ONCE = 512
_MOST_TRAINERS = 8


@dataclass(frozen=True)
class Pairs:
    """Images and captions in memory.

    Attributes
    ----------
    images : (n, 32, 32) uint8
    captions : sequence of str
        Each names one digit.
    """

    images: NDArray[np.uint8]
    captions: Sequence[str]

    def __post_init__(self) -> None:
        if len(self.images) != len(self.captions):
            raise ValueError(f"{len(self.images)} images, but {len(self.captions)} captions")

    def __len__(self) -> int:
        return len(self.captions)

    def fingerprint(self) -> str:
        """Return the sha256 of the images and captions."""
        state = hashlib.sha256(self.images.tobytes())
        state.update("\n".join(self.captions).encode())
        return state.hexdigest()

    def take(self, rows: NDArray[np.int64]) -> Pairs:
        """Return some of the pairs."""
        return Pairs(self.images[rows], [self.captions[row] for row in rows.tolist()])


def named_digit(caption: str) -> int:
    """Return the digit that a caption names.

    Examples
    --------
    >>> named_digit("a scan of the digit seven")
    7
    """
    return next(digit for digit, word in enumerate(DIGITS) if word in caption.split())


def new_model(seed: int) -> torch.nn.Module:
    """Return an untrained model; the caller's random state is left alone."""
    from open_clip.model import CLIP

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: torch.nn.Module = CLIP(**CONFIG)
    # 49,408 rows of which a dozen are ever read: as they are, they tell the words apart well
    # enough, and without them a step of the optimizer costs next to nothing.
    model.get_parameter("token_embedding.weight").requires_grad_(False)
    # On a CPU, batch norm and small convolutions are a third faster with the channels innermost.
    return model.to(memory_format=torch.channels_last)


def train(
    model: Any,
    pairs: Pairs,
    *,
    steps: int,
    seed: int,
    augment: bool = False,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Train a model contrastively, in place.

    Only ten things are named here, so most captions of a batch say the same as a row's own. They
    are positives of that row, not negatives: both directions' targets are spread over the pairs
    that name the same digit (Yang et al., "Unified Contrastive Learning in Image-Text-Label
    Space", 2022, eq. 1-3).

    Parameters
    ----------
    model : torch.nn.Module
        A CLIP of open_clip.
    pairs : Pairs
        What it is trained on; batches of 64 are drawn with replacement.
    steps : int
        Batches.
    seed : int
        Decides the batches and the augmentation.
    augment : bool
        Shift each image by up to 4 pixels and add noise: what a model that sees few scans needs.
    cancelled : callable
        Asked before each step; training ends when it returns True.
    """
    draw = torch.Generator().manual_seed(seed)
    texts = _Texts(pairs.captions)
    images = torch.from_numpy(pairs.images)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    for _ in range(steps):
        if cancelled():
            return
        rows = torch.randint(len(pairs), (BATCH,), generator=draw)
        batch = images[rows]
        inputs = _varied(batch, draw) if augment else prepare(batch)
        loss = _loss(model, inputs, texts, rows)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        # Wrong captions now and then make a gradient from which a model would not recover in time.
        torch.nn.utils.clip_grad_norm_(trained, _MOST_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
    model.eval()


class _Texts:
    """The captions of a training set, each distinct one tokenized once."""

    def __init__(self, captions: Sequence[str]) -> None:
        distinct, place = np.unique(np.asarray(captions), return_inverse=True)
        self.tokens = tokenize(distinct.tolist())
        self.place = torch.from_numpy(place)
        self.digit = torch.tensor([named_digit(caption) for caption in distinct.tolist()])


def _loss(model: Any, inputs: torch.Tensor, texts: _Texts, rows: torch.Tensor) -> torch.Tensor:
    # A caption that occurs twice in a batch is encoded once.
    distinct, place = torch.unique(texts.place[rows], return_inverse=True)
    image = model.encode_image(inputs, normalize=True)
    text = model.encode_text(texts.tokens[distinct], normalize=True)[place]
    logits = image @ text.T * model.logit_scale.exp().clamp(max=_MOST_LOGIT_SCALE)
    digit = texts.digit[distinct][place]
    same = (digit[:, None] == digit).float()
    target = same / same.sum(dim=1, keepdim=True)
    return (
        functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
    ) / 2


@cache
def _tokenizer() -> Callable[[list[str]], torch.Tensor]:
    from open_clip import SimpleTokenizer

    tokenizer: Callable[[list[str]], torch.Tensor] = SimpleTokenizer(
        context_length=CONFIG["text_cfg"]["context_length"]
    )
    return tokenizer


def tokenize(captions: list[str]) -> torch.Tensor:
    """Return (n, 8) int64 tokens, as the encoder of the toolkit makes them."""
    return _tokenizer()(captions)


def prepare(images: torch.Tensor) -> torch.Tensor:
    """Turn (n, 32, 32) uint8 into the model's input, as the encoder of the toolkit does.

    Returns
    -------
    (n, 3, 32, 32) float32
    """
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    mean = torch.tensor(OPENAI_DATASET_MEAN)[:, None, None]
    spread = torch.tensor(OPENAI_DATASET_STD)[:, None, None]
    inputs = (images[:, None].float() / 255 - mean) / spread
    return inputs.contiguous(memory_format=torch.channels_last)


def _varied(images: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    count, most = len(images), _MOST_SHIFT
    down, right = torch.randint(2 * most + 1, (2, count), generator=draw)
    padded = functional.pad(images[:, None], (most,) * 4)[:, 0]
    side = torch.arange(SIDE)
    rows = (down[:, None] + side)[:, :, None]
    columns = (right[:, None] + side)[:, None, :]
    inputs = prepare(padded[torch.arange(count)[:, None, None], rows, columns])
    return inputs + _NOISE * torch.randn(inputs.shape, generator=draw)


@torch.inference_mode()
def zero_shot_accuracy(model: Any, scans: Scans) -> float:
    """Return the share of scans whose nearest prompt names their digit.

    A digit's prompt is the mean of its captions' unit vectors, one per template, as usual
    (Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021,
    section 3.1.4). The model, a CLIP of open_clip, must be in evaluation mode.
    """
    prompts = [template.format(word) for word in DIGITS for template in TEMPLATES]
    text = model.encode_text(tokenize(prompts), normalize=True)
    prompt = functional.normalize(text.view(len(DIGITS), len(TEMPLATES), -1).mean(dim=1), dim=-1)
    found = [
        (model.encode_image(prepare(part), normalize=True) @ prompt.T).argmax(dim=1)
        for part in torch.split(torch.from_numpy(scans.images), _EVALUATED_AT_ONCE)
    ]
    return float((torch.cat(found) == torch.from_numpy(scans.digits)).float().mean())


def build_model(folder: Path, trusted: Pairs, test: Scans, *, seed: int, steps: int) -> float:
    """Train a model on trusted pairs and save it, unless it is there already.

    The folder gets ``digits.json`` and ``digits.safetensors``: what ``curate prune`` takes as
    ``--model`` and ``--pretrained``. Returned is the model's zero-shot accuracy on the test scans.
    """
    from safetensors.torch import save_file

    params = {"seed": seed, "steps": steps, "scans": len(trusted), "config": CONFIG}
    step = open_step(
        folder, step="demo-model", step_version=1, params=params, inputs={}, overwrite=True
    )
    if step.complete and (folder / WEIGHTS_FILE).exists() and (folder / CONFIG_FILE).exists():
        return float(step.manifest["accuracy"])
    with _threads(1):
        model = new_model(seed)
        train(model, trusted, steps=steps, seed=seed, augment=True)
        accuracy = zero_shot_accuracy(model, test)
    atomic_write_json(folder / CONFIG_FILE, CONFIG)
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, temporary)
    step.finish(accuracy=accuracy)
    return accuracy


def evaluate_sets(
    folder: Path, sets: Mapping[str, Pairs], test: Scans, *, seeds: Sequence[int], steps: int
) -> dict[str, tuple[float, ...]]:
    """Train a model from scratch on each set with each seed; return the zero-shot accuracies.

    They are written down as they come, so that a run that was stopped continues. Each model is
    trained by one thread and several at once: small as they are, that is faster than sharing one
    model among the threads, and the result does not depend on their number.
    """
    step = open_step(
        folder,
        step="demo-evaluate",
        step_version=1,
        params={"seeds": list(seeds), "steps": steps, "config": CONFIG},
        inputs={name: pairs.fingerprint() for name, pairs in sets.items()},
        overwrite=True,
    )
    found: dict[str, float] = step.manifest.get("accuracy", {})
    jobs = {f"{name}, seed {seed}": (name, seed) for name in sets for seed in seeds}
    todo = {job: chosen for job, chosen in jobs.items() if job not in found}
    stop = threading.Event()

    def measure(model: torch.nn.Module, pairs: Pairs, seed: int) -> float:
        train(model, pairs, steps=steps, seed=seed, cancelled=stop.is_set)
        return zero_shot_accuracy(model, test)

    with (
        _threads(1),
        _trainers(stop) as trainers,
        task("train", total=len(jobs), unit="models", done=len(found)) as advance,
    ):
        running = {
            trainers.submit(measure, new_model(seed), sets[name], seed): job
            for job, (name, seed) in todo.items()
        }
        for future in as_completed(running):
            found[running[future]] = future.result()
            step.record(accuracy=found)
            advance(1)
    if not step.complete:
        step.finish(accuracy=found)
    return {name: tuple(found[f"{name}, seed {seed}"] for seed in seeds) for name in sets}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use that many threads per operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _trainers(stop: threading.Event) -> Iterator[ThreadPoolExecutor]:
    """Yield threads that train a model each; on an error they stop at the next step."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(count or 1, _MOST_TRAINERS)
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
