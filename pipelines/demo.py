"""`curate demo`: prune a small real pool, spoiled as the web is, and train on what is left.

A small CLIP that is trained on a few scans that can be trusted scores and embeds the pool (the idea
of Fang et al., "Data Filtering Networks", 2023); the very same `prune` as on any pool chooses the
rows; then one model is trained from scratch on the full pool, on a random part of it and on what
was kept, for equally many steps, and tested on scans that none of them has seen.
"""

from __future__ import annotations

import shlex
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curate.errors import FingerprintError
from curate.images import decode
from curate.manifest import StepFolder, locked, open_step, read_manifest
from curate.runtime import rng
from curate.selection import Selection
from curate.shards import read_parts
from pipelines import demo_model, demo_pool
from pipelines.demo_model import Pairs
from pipelines.demo_pool import Contents, Scans
from pipelines.pruning import prune

#: Far less than prune's default of 0.05, which suits models of the web: this one has only ten
#: things to tell apart and draws all scans of a digit together.
EPSILON = 0.001


@dataclass(frozen=True)
class DemoResult:
    """What came out.

    Attributes
    ----------
    out, report : Path
        The demo's folder, and the report of the pruning.
    command : tuple of str
        The command line that prunes in the same way.
    keep : float
    steps : int
        Batches that every model was trained for.
    counts : mapping of str to int
        Rows per reason, from the ledger.
    before, after : Contents
        Of the pool, and of the kept rows.
    scorer_accuracy : float
        Zero-shot accuracy of the model that scored the pool; accuracies are in [0, 1].
    accuracy : mapping of str to tuple of float
        Of the models trained on the sets ``full``, ``random`` and ``pruned``, one per seed.
    seconds : mapping of str to float
        Per phase, and ``total``; little for what was there already.
    """

    out: Path
    report: Path
    command: tuple[str, ...]
    keep: float
    steps: int
    counts: Mapping[str, int]
    before: Contents
    after: Contents
    scorer_accuracy: float
    accuracy: Mapping[str, tuple[float, ...]]
    seconds: Mapping[str, float]


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    keep: float = 0.28,
    rows: int = 12_000,
    steps: int = 300,
    seeds: int = 3,
    epsilon: float = EPSILON,
    stream: TextIO,
) -> DemoResult:
    """Build a spoiled pool, prune it, train on the result, and write down what came out.

    What an earlier run of the same parameters has finished is used again.

    Parameters
    ----------
    out : Path
        The demo's folder: ``pool/``, ``model/``, ``run/`` (what `prune` writes), ``evaluation/``.
    seed : int
        Seed of everything that is drawn.
    keep : float
        Kept fraction of the pool's rows.
    rows : int
        Rows of the pool.
    steps : int
        Batches that every model is trained for.
    seeds : int
        Models per set.
    epsilon : float
        See `prune`. A model that was trained for fewer steps draws everything nearer together.
    stream : text file
        Where the story goes.

    Returns
    -------
    DemoResult

    Raises
    ------
    ValueError
        If a number is out of range.
    FingerprintError
        If the folder holds something else; it is left alone.
    BudgetError
        If fewer rows survive the first stages of the pruning than must be kept.
    """
    if min(steps, seeds) < 1 or rows < demo_pool.SHARDS or not 0 < keep < 1:
        raise ValueError(
            f"steps={steps}, seeds={seeds}, rows={rows}, keep={keep}: at least 1, 1 and "
            f"{demo_pool.SHARDS} are needed, and a keep between 0 and 1"
        )
    out = Path(out)
    with locked(out):
        demo = _Demo(out, stream, seed, keep, rows, steps, seeds, epsilon)
        step = _open(out, demo.params())
        result = demo.run()
        if not step.complete:
            step.finish()
    return result


def _open(out: Path, params: dict[str, float]) -> StepFolder:
    manifest = read_manifest(out)
    if manifest is not None and (manifest["step"], manifest["params"]) != ("demo", params):
        raise FingerprintError(
            f"{out} holds the result of {manifest['step']} with {manifest['params']}, not of demo "
            f"with {params}; it is left alone. Choose another --out"
        )
    return open_step(out, step="demo", step_version=1, params=params, inputs={})


@dataclass(frozen=True)
class _Loaded:
    """A pool in memory: what its rows are, and the pairs of those that can be decoded."""

    contents: Contents
    pairs: Pairs
    uids: NDArray[np.object_]
    decoded: NDArray[np.bool_]

    def among(self, uids: Sequence[str]) -> Pairs:
        """Return the pairs of those uids; a row that cannot be decoded has none."""
        chosen = set(uids)
        rows = [row for row, uid in enumerate(self.uids[self.decoded]) if uid in chosen]
        return self.pairs.take(np.array(rows, dtype=np.int64))


def _load(folder: Path) -> _Loaded:
    rows = read_parts(folder, demo_pool.SHARDS)
    images = [decode(image["bytes"]).image for image in rows["image"].to_pylist()]
    decoded = np.array([image is not None for image in images])
    # The scans are grey: the three channels are the same.
    pixels = [np.asarray(image.getchannel(0)) for image in images if image is not None]
    captions = rows["text"].filter(pa.array(decoded)).to_pylist()
    contents = demo_pool.count_contents(rows, decoded)
    uids = rows["uid"].to_numpy().astype(object)
    return _Loaded(contents, Pairs(np.stack(pixels), captions), uids, decoded)


@dataclass
class _Demo:
    """One run; the methods are its phases, in their order, each followed by its account."""

    out: Path
    stream: TextIO
    seed: int
    keep: float
    rows: int
    steps: int
    seeds: int
    epsilon: float
    seconds: dict[str, float] = field(default_factory=dict)

    def params(self) -> dict[str, float]:
        """Return what decides the result."""
        names = ("seed", "keep", "rows", "steps", "seeds", "epsilon")
        return {name: getattr(self, name) for name in names}

    def run(self) -> DemoResult:
        """Run the phases."""
        start = time.perf_counter()
        with self.timed("pool"):
            trusted, held_out, scans = demo_pool.load_scans(self.seed)
        pool = self.build_pool(scans)
        scorer_accuracy = self.train_scorer(trusted, held_out)
        selection = self.prune()
        after = self.account(pool.contents)
        accuracy = self.evaluate(pool, selection, held_out)
        self.seconds["total"] = time.perf_counter() - start
        result = DemoResult(
            out=self.out,
            report=self.out / "run" / "report.html",
            command=self.command,
            keep=self.keep,
            steps=self.steps,
            counts=selection.counts,
            before=pool.contents,
            after=after,
            scorer_accuracy=scorer_accuracy,
            accuracy=accuracy,
            seconds=self.seconds,
        )
        self.say(_conclusion(result))
        return result

    def say(self, text: str) -> None:
        """Write a part of the story at once: the next part can take a while."""
        self.stream.write(text + "\n")
        self.stream.flush()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Take the time of a phase."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def build_pool(self, scans: Scans) -> _Loaded:
        """Build the pool and load it."""
        self.say(
            f"pool    {self.rows:,} pairs made of {len(scans):,} real scans of handwritten digits; "
            "popular\n        scans come again as shifted and re-encoded copies (Zipf's law)"
        )
        with self.timed("pool"):
            demo_pool.build_pool(self.out / "pool", scans, seed=self.seed, rows=self.rows)
            pool = _load(self.out / "pool")
        shares = (
            _share(count, self.rows)
            for count in (
                pool.contents.wrong_captions,
                pool.contents.junk_images,
                self.rows - len(pool.pairs),
            )
        )
        self.say(
            "        {} wrong captions, {} junk images, {} undecodable files".format(*shares)
            + self._took("pool")
        )
        return pool

    def train_scorer(self, trusted: Scans, held_out: Scans) -> float:
        """Train the model that scores the pool; return its zero-shot accuracy."""
        self.say(
            f"model   a small CLIP of open_clip, trained for {self.steps} steps on {len(trusted)} "
            "trusted scans"
        )
        captions = demo_pool.captions_for(trusted.digits, self.seed, "trusted")
        with self.timed("model"):
            accuracy = demo_model.build_model(
                self.out / "model",
                Pairs(trusted.images, captions),
                held_out,
                seed=self.seed,
                steps=self.steps,
            )
        self.say(
            f"        zero-shot accuracy on {len(held_out)} held-out scans: {100 * accuracy:.1f}%"
            + self._took("model")
        )
        return accuracy

    @property
    def command(self) -> tuple[str, ...]:
        """The command line that does what `prune` does here."""
        flags = {"pool": self.out / "pool", "keep": self.keep, **self._options()}
        return "curate", "prune", *(part for k, v in flags.items() for part in (f"--{k}", str(v)))

    def _options(self) -> dict[str, object]:
        model = self.out / "model"
        return {
            "model": str(model / demo_model.CONFIG_FILE),
            "pretrained": str(model / demo_model.WEIGHTS_FILE),
            "epsilon": self.epsilon,
            "seed": self.seed,
            "out": self.out / "run",
        }

    def prune(self) -> Selection:
        """Prune the pool as anyone would, all else at its default."""
        self.say(f"prune   {_wrapped_command(self.command)}")
        with self.timed("prune"):
            selection = prune(self.out / "pool", keep=self.keep, **self._options())
        self.say(f"\n{'the ledger':<20}{'rows':>8}{self._took('prune')}")
        for reason, count in selection.counts.items():
            self.say(f"  {reason:<18}{count:>8,}")
        return selection

    def account(self, before: Contents) -> Contents:
        """Compare what was kept with the pool; return what the kept rows are."""
        after = _load(self.out / "run" / "pool").contents
        self.say(f"\n{'in the rows':<20}{'before':>8}{'after':>8}")
        for name, was, now in (
            ("wrong captions", before.wrong_captions, after.wrong_captions),
            ("junk images", before.junk_images, after.junk_images),
        ):
            shares = f"{_share(was, before.rows):>8}{_share(now, after.rows):>8}"
            self.say(f"  {name:<18}{shares}")
        scans = f"{before.distinct_scans:>8,}{after.distinct_scans:>8,}"
        self.say(f"  {'distinct scans':<18}{scans}")
        return after

    def evaluate(
        self, pool: _Loaded, selection: Selection, held_out: Scans
    ) -> dict[str, tuple[float, ...]]:
        """Train on each set from scratch, for equally many steps."""
        chance = rng(self.seed, "demo", "random part")
        drawn = chance.choice(pool.uids, size=len(selection.kept_uids), replace=False).tolist()
        sets = {
            "full": pool.pairs,
            "random": pool.among(drawn),
            "pruned": pool.among(selection.kept_uids),
        }
        with self.timed("train"):
            accuracy = demo_model.evaluate_sets(
                self.out / "evaluation",
                sets,
                held_out,
                seeds=[self.seed + number for number in range(self.seeds)],
                steps=self.steps,
            )
        self.say(
            f"\nthe same model from scratch, {self.steps} steps, {self.seeds} seeds"
            f"{self._took('train')}\n{'':<20}{'pairs':>8}    zero-shot accuracy"
        )
        for name, pairs in sets.items():
            words = _set_name(name, self.keep)
            self.say(f"  {words:<18}{len(pairs):>8,}    {_percent(accuracy[name])}")
        return accuracy

    def _took(self, phase: str) -> str:
        return f"   [{self.seconds[phase]:.1f} s]"


def _share(count: int, rows: int) -> str:
    return f"{100 * count / rows:.1f}%"


def _set_name(name: str, keep: float) -> str:
    return "full pool" if name == "full" else f"{name} {100 * keep:.3g}%"


def _percent(values: tuple[float, ...]) -> str:
    """Return mean and standard deviation in percent; one value has no spread."""
    spread = f" +- {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def _wrapped_command(command: tuple[str, ...]) -> str:
    """Return the command over several lines that a shell reads as one."""
    words = [shlex.quote(word) for word in command]
    flags = [" ".join(pair) for pair in zip(words[2::2], words[3::2], strict=True)]
    return " \\\n            ".join([" ".join(words[:2]), *flags])


def _conclusion(result: DemoResult) -> str:
    """Say plainly how the pruned set compares, whatever came out."""
    lines = [
        f"{f'pruned against {other}':<24}{_compared(result.accuracy['pruned'], accuracy)}"
        for other, accuracy in result.accuracy.items()
        if other != "pruned"
    ]
    seconds = result.seconds["total"]
    return "\n".join(["", *lines, "", f"time    {seconds:.0f} s", f"report  {result.report}"])


def _compared(ours: tuple[float, ...], theirs: tuple[float, ...]) -> str:
    """Return the difference of two means in words.

    Examples
    --------
    >>> _compared((0.98, 0.96), (0.80, 0.84)), _compared((0.9, 0.8), (0.88, 0.84))
    ('15.0 points better', '1.0 points worse, less than the spread of the seeds')
    """
    points = 100 * (statistics.fmean(ours) - statistics.fmean(theirs))
    spread = max(100 * statistics.stdev(v) if len(v) > 1 else 0.0 for v in (ours, theirs))
    within = ", less than the spread of the seeds" if abs(points) < spread else ""
    return f"{abs(points):.1f} points {'better' if points > 0 else 'worse'}{within}"
