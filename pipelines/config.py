"""The parameters of each verb: field = flag = TOML key = manifest key, with its help text.

The only place for the defaults of steps. Nothing heavy is imported here, since `curate --help`
reads these classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter, Token, convert
from cyclopts.validators import Number

from coreset.methods import METHODS

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]  # what --help lists and a typo is compared with

FRACTION = Parameter(validator=Number(gt=0, lte=1))
_SHARE = Parameter(validator=Number(gte=0, lte=1))
_POSITIVE = Parameter(validator=Number(gt=0))
_DISTANCE = Parameter(validator=Number(gte=0, lte=2))


def _whole(kind: Any, tokens: Sequence[Token]) -> Any:
    """Convert to a whole number or a word; cyclopts alone would round 2.5."""
    if "." in tokens[0].value:
        raise ValueError(f'"{tokens[0].value}" is not a whole number (int)')
    return convert(kind, tokens)


_WHOLE = Parameter(converter=_whole)
COUNT = Parameter(validator=Number(gte=0), converter=_whole)
AT_LEAST_ONE = Parameter(validator=Number(gte=1), converter=_whole)

_POOL = Group("Pool", sort_key=1)
_MODEL = Group("Embedding", sort_key=2)
_DEDUP = Group("Duplicates", sort_key=3)
_SCORE = Group("CLIP score", sort_key=4)
_PRUNE = Group("Pruning", sort_key=5)
_CORESET = Group("Coreset", sort_key=5)
_DOWNLOAD = Group("Download", sort_key=5)
_RUN = Group("Run", sort_key=6)

DEFAULT_MAX_PIXELS = 89_478_485


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Which pool, and which of its columns are what.

    Attributes
    ----------
    pool
        Parquet file, folder or glob of Parquet shards, folder of WebDataset tars, clip-retrieval
        or DataComp folder; s3:// and the like through fsspec.
    image_col
        Column of images: struct<bytes, path>, binary, or file paths. [default: by name]
    text_col
        Column of captions. [default: by name: text, caption, ...]
    url_col
        Column of addresses. [default: by name]
    uid_col
        Column of unique row ids. [default: uid, else derived from the content]
    score_col
        Column of CLIP scores to use instead of computing them. [default: by name, where there are
        no caption embeddings]
    embedding_col
        Column of image embeddings. [default: by name]
    image_root
        Folder that image paths are relative to and must not leave. [default: the pool's folder]
    """

    pool: Annotated[str, Parameter(group=_POOL)]
    image_col: Annotated[str | None, Parameter(group=_POOL)] = None
    text_col: Annotated[str | None, Parameter(group=_POOL)] = None
    url_col: Annotated[str | None, Parameter(group=_POOL)] = None
    uid_col: Annotated[str | None, Parameter(group=_POOL)] = None
    score_col: Annotated[str | None, Parameter(group=_POOL)] = None
    embedding_col: Annotated[str | None, Parameter(group=_POOL)] = None
    image_root: Annotated[Path | None, Parameter(group=_POOL)] = None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the result goes and how the run behaves; none of it changes the result but the seed.

    Attributes
    ----------
    out
        Output folder. [default: NAME-pruned, NAME-coreset or NAME-embeddings beside the pool]
    seed
        Seed of everything that is drawn.
    device
        auto, cpu, cuda or cuda:1. Auto takes CUDA where there is one.
    workers
        Processes that decode, embed and write, each a shard at a time; with several GPUs, one each.
    executor
        Where shards run: processes of this machine, or actors of a Ray cluster (extra ray) on
        which every node reaches the pool and the output folder.
    overwrite
        Replace a result of other parameters in the same folder. Steps that are not affected are
        used again.
    dry_run
        Print the steps, rows and bytes, and do nothing.
    max_failed
        Share of rows that may fail (broken, missing or huge images) before the command ends with
        exit code 1. They are recorded in any case.
    """

    out: Annotated[Path | None, Parameter(group=_RUN)] = None
    seed: Annotated[int, Parameter(group=_RUN), COUNT] = 0
    device: Annotated[str, Parameter(group=_RUN)] = "auto"
    workers: Annotated[int, Parameter(group=_RUN), AT_LEAST_ONE] = 1
    executor: Annotated[Literal["local", "ray"], Parameter(group=_RUN)] = "local"
    overwrite: Annotated[bool, Parameter(group=_RUN, negative="")] = False
    dry_run: Annotated[bool, Parameter(group=_RUN, negative="")] = False
    max_failed: Annotated[float, Parameter(group=_RUN), _SHARE] = 0.5


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which encoder, or embeddings that are there already.

    Attributes
    ----------
    model
        An open_clip model (ViT-B-32, hf-hub:...), a model configuration in JSON, or timm:NAME for
        an image-only encoder (timm:vit_large_patch14_dinov2.lvd142m is the pruning paper's best).
        [default: the embeddings that the pool brings, else ViT-B-32]
    pretrained
        open_clip's tag of the weights, a local file (.safetensors, .pt), or none for untrained
        weights. [default: laion2b_s34b_b79k for ViT-B-32]
    embeddings
        Use this folder of embeddings instead of computing them (ours, or clip-retrieval's layout).
    batch_size
        Rows per forward pass on a GPU; a CPU runs 16 on each core.
    precision
        auto is bf16 on a GPU and on a CPU with AVX512-BF16 or AMX, else fp32.
    max_pixels
        Images with more pixels are not decoded.
    """

    model: Annotated[str | None, Parameter(group=_MODEL)] = None
    pretrained: Annotated[str | None, Parameter(group=_MODEL)] = None
    embeddings: Annotated[Path | None, Parameter(group=_MODEL)] = None
    batch_size: Annotated[int, Parameter(group=_MODEL), AT_LEAST_ONE] = 64
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], Parameter(group=_MODEL)] = "auto"
    max_pixels: Annotated[int, Parameter(group=_MODEL), AT_LEAST_ONE] = DEFAULT_MAX_PIXELS


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class EmbedConfig(PoolConfig, ModelConfig, RunConfig):
    """Embed a pool."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PruneConfig(PoolConfig, ModelConfig, RunConfig):
    """Prune a pool.

    Attributes
    ----------
    download
        Download the images of a pool that holds only addresses first, to NAME-images beside it
        (curate download has more options).
    keep
        Kept fraction of the pool's rows; exactly floor(keep * rows + 0.5) rows stay.
    epsilon
        Rows closer than this (cosine distance) are duplicates.
    dedup_mode
        max-earlier as the SemDeDup authors' code, greedy (compare with kept rows only),
        connected-components (one row per group), or none.
    dedup_keep
        Which row of a group stays: the one of the highest CLIP score (hard where there is none),
        the farthest from its centroid (hard), the nearest (easy), or random.
    dedup_clusters
        Clusters inside which duplicates are sought. Auto: one up to 20,000 rows (every pair is
        compared), then sqrt(rows / 4). Their centroids come from 256 rows per cluster, at least
        50,000; every row is assigned.
    clip_fraction
        Share of the rows left that stays by CLIP score, never below the budget; 1 turns it off.
        Auto: sqrt(keep).
    min_clip_score
        Drop rows whose CLIP score is below this.
    clusters
        Concept clusters. Auto: sqrt(rows) / 4, at most 500.
    kmeans_iterations
        Most passes of k-means over the rows.
    kmeans_tolerance
        k-means stops when a pass would lower the mean distance by less than this part of it.
    backend
        k-means by torch (auto) or by faiss.
    preset
        Values of temperature, neighbours and lower bound: the paper's (0.1, 20, 1 row) or those of
        the authors' code (0.5, 20, half of an equal share).
    temperature
        Of the softmax over complexities; lower favours complex clusters more. [default: preset]
    neighbours
        Nearest centroids that d_inter averages over. [default: preset]
    lower
        Fewest rows that a cluster keeps. [default: preset]
    lower_ratio
        Fewest rows that a cluster keeps, as a fraction of an equal share. [default: preset]
    allocation
        Rows per cluster by complexity, or uniform (self-supervised prototypes).
    which
        Rows that stay inside a cluster: the farthest from the centroid (hard), the nearest (easy),
        or random.
    allow_fewer
        Keep what there is where fewer rows survive than must be kept, instead of exit code 3.
    """

    download: Annotated[bool, Parameter(group=_POOL, negative="")] = False
    keep: Annotated[float, Parameter(group=_PRUNE), FRACTION]
    epsilon: Annotated[
        float, Parameter(group=_DEDUP), Parameter(validator=Number(gte=0, lte=2))
    ] = 0.05
    dedup_mode: Annotated[
        Literal["max-earlier", "greedy", "connected-components", "none"], Parameter(group=_DEDUP)
    ] = "max-earlier"
    dedup_keep: Annotated[
        Literal["clip-score", "hard", "easy", "random"], Parameter(group=_DEDUP)
    ] = "clip-score"
    dedup_clusters: Annotated[Literal["auto"] | int, Parameter(group=_DEDUP), _WHOLE] = "auto"
    clip_fraction: Annotated[Literal["auto"] | float, Parameter(group=_SCORE)] = "auto"
    min_clip_score: Annotated[float | None, Parameter(group=_SCORE)] = None
    clusters: Annotated[Literal["auto"] | int, Parameter(group=_PRUNE), _WHOLE] = "auto"
    kmeans_iterations: Annotated[int, Parameter(group=_PRUNE), AT_LEAST_ONE] = 20
    kmeans_tolerance: Annotated[float, Parameter(group=_PRUNE), _SHARE] = 3e-4
    backend: Annotated[Literal["auto", "torch", "faiss"], Parameter(group=_PRUNE)] = "auto"
    preset: Annotated[Literal["paper", "repo"], Parameter(group=_PRUNE)] = "paper"
    temperature: Annotated[float | None, Parameter(group=_PRUNE), _POSITIVE] = None
    neighbours: Annotated[int | None, Parameter(group=_PRUNE), AT_LEAST_ONE] = None
    lower: Annotated[int | None, Parameter(group=_PRUNE), COUNT] = None
    lower_ratio: Annotated[float | None, Parameter(group=_PRUNE), _SHARE] = None
    allocation: Annotated[Literal["complexity", "uniform"], Parameter(group=_PRUNE)] = "complexity"
    which: Annotated[Literal["hard", "easy", "random"], Parameter(group=_PRUNE)] = "hard"
    allow_fewer: Annotated[bool, Parameter(group=_PRUNE, negative="")] = False

    def __post_init__(self) -> None:
        """Check what the types do not say; Python callers come here without the command line."""
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {self.keep}; for 28 percent pass 0.28")
        if self.clip_fraction != "auto" and not 0 < self.clip_fraction <= 1:
            raise ValueError(f"clip_fraction must be auto or in (0, 1], got {self.clip_fraction}")
        for name in ("temperature", "min_clip_score"):
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                raise ValueError(f"{name} must be a finite number, got {number}")
        for name in ("clusters", "dedup_clusters"):
            value = getattr(self, name)
            if value != "auto" and value < 1:
                raise ValueError(f"{name} must be auto or at least 1, got {value}")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CoresetConfig(EmbedConfig):
    """Select a coreset of a pool.

    Attributes
    ----------
    method
        How rows are chosen.
    budget
        Rows to choose, exactly; or give --fraction.
    fraction
        Fraction of the pool's rows to choose: exactly floor(fraction * rows + 0.5).
    modality
        Which embeddings are the features: of the images or of the captions.
    label_col
        Column of classes (numbers or strings), one per row.
    per_class
        Choose inside each class: in proportion to its rows, or the same number from each; pooled
        ignores classes. [default: what the method's paper does, for most pooled]
    difficulty_col
        Column of numbers, higher is harder, for the methods that go by difficulty.
    probabilities
        File .npy of a classifier's softmax outputs, (rows, classes), in the pool's order.
    dynamics
        What a training run recorded: a coreset.ScoreStore, rows in the pool's order.
    selected
        Rows that are selected already, which are not chosen again and do not count: a file of
        uids, one per line, or the folder of a run.
    option
        KEY=VALUE of the method itself, such as metric=cosine; may be given several times.
    allow_fewer
        Choose what there is where fewer rows can be used than are asked for, instead of exit
        code 3.
    """

    method: Annotated[MethodName, Parameter(group=_CORESET)]
    budget: Annotated[int | None, Parameter(group=_CORESET), AT_LEAST_ONE] = None
    fraction: Annotated[float | None, Parameter(group=_CORESET), FRACTION] = None
    modality: Annotated[Literal["image", "text"], Parameter(group=_CORESET)] = "image"
    label_col: Annotated[str | None, Parameter(group=_CORESET)] = None
    per_class: Annotated[
        Literal["pooled", "proportional", "balanced"] | None, Parameter(group=_CORESET)
    ] = None
    difficulty_col: Annotated[str | None, Parameter(group=_CORESET)] = None
    probabilities: Annotated[Path | None, Parameter(group=_CORESET)] = None
    dynamics: Annotated[Path | None, Parameter(group=_CORESET)] = None
    selected: Annotated[Path | None, Parameter(group=_CORESET)] = None
    option: Annotated[tuple[str, ...], Parameter(group=_CORESET, negative="")] = ()
    allow_fewer: Annotated[bool, Parameter(group=_CORESET, negative="")] = False

    def __post_init__(self) -> None:
        """Check what the types do not say; Python callers come here without the command line."""
        if (self.budget is None) == (self.fraction is None):
            given = "neither was" if self.budget is None else "both were"
            raise ValueError(f"give --budget (rows) or --fraction (of the pool), {given} given")
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"budget must be at least 1, got {self.budget}")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction}")
        for pair in self.option:
            if not pair.partition("=")[0] or "=" not in pair:
                raise ValueError(f"--option {pair!r} must be KEY=VALUE, such as metric=cosine")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DownloadConfig(PoolConfig):
    """Download the images of a pool of addresses with img2dataset.

    Attributes
    ----------
    out
        Output folder, which is a pool. [default: NAME-images beside the pool]
    image_size
        Resize to this many pixels. [default: JPEG files stay as they came, byte for byte; other
        formats become JPEG]
    resize_mode
        How to resize; used with --image-size only. keep_ratio goes by the shorter side.
    samples_per_shard
        Rows per file of images.
    processes
        Processes that download and decode.
    threads
        Downloads at a time in each process.
    timeout
        Seconds to wait for a server.
    retries
        Further attempts for each address.
    retry_failed
        Ask again for the rows that failed, except where servers have opted out.
    img2dataset
        The program, if it is in another environment. [default: $CURATE_IMG2DATASET, else found]
    overwrite
        Replace a download of another pool or with other parameters in the same folder.
    dry_run
        Print the command that would run, and do nothing.
    """

    out: Annotated[Path | None, Parameter(group=_RUN)] = None
    image_size: Annotated[int | None, Parameter(group=_DOWNLOAD), AT_LEAST_ONE] = None
    resize_mode: Annotated[
        Literal["keep_ratio", "keep_ratio_largest", "center_crop", "border"],
        Parameter(group=_DOWNLOAD),
    ] = "keep_ratio"
    samples_per_shard: Annotated[int, Parameter(group=_DOWNLOAD), AT_LEAST_ONE] = 10_000
    processes: Annotated[int, Parameter(group=_DOWNLOAD), AT_LEAST_ONE] = 1
    threads: Annotated[int, Parameter(group=_DOWNLOAD), AT_LEAST_ONE] = 32
    timeout: Annotated[int, Parameter(group=_DOWNLOAD), AT_LEAST_ONE] = 10
    retries: Annotated[int, Parameter(group=_DOWNLOAD), COUNT] = 0
    retry_failed: Annotated[bool, Parameter(group=_DOWNLOAD, negative="")] = False
    img2dataset: Annotated[Path | None, Parameter(group=_DOWNLOAD)] = None
    overwrite: Annotated[bool, Parameter(group=_RUN, negative="")] = False
    dry_run: Annotated[bool, Parameter(group=_RUN, negative="")] = False
