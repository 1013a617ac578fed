"""Every distillation method on CIFAR-10 beside real images with the same labels.

One JSON line per (method, images per class, seed) goes to ``--out``; a run that is started again
does only what is missing, and ``--table`` prints the lines as Markdown. The protocol is in
RESULTS.md.

``python -m tests.benchmarks.bench_distill_cifar10 --data DIR --out lines.jsonl`` is the reduced
task for a CPU; ``--rows 50000 --size 32 --network resnet18 --ipc 10 50 --squeeze-epochs 20
--iterations 0 --label-epochs 1000`` the published one (0: each method's own number).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

import distill
from curate.images import decode
from curate.runtime import rng
from distill.baselines import coreset_subset, penultimate, random_subset
from distill.replay import ReplayedBatches, Source
from distill.student_batches import HardBatches
from distill.students import StudentConfig, train_student
from distill.validate import usual_batch

RANDOM, CORESET = "random real images", "herding coreset"


def images(path: Path, rows: int | None, size: int) -> distill.ImageSet:
    """Some rows of a file, resized by area."""
    table = pq.read_table(path)
    order = np.sort(rng(0, "cifar10").permutation(len(table))[:rows])
    image, label = table.column_names[0], table.column_names[1]
    pixels, labels = [], []
    for row in table.take(order).to_pylist():
        opened = decode(row[image]["bytes"]).image
        if opened is None:
            raise ValueError(f"{path} holds an image that cannot be decoded")
        pixels.append(np.asarray(opened.resize((size, size), Image.Resampling.BOX)))
        labels.append(row[label])
    return distill.ImageSet.of(np.stack(pixels), np.array(labels))


def run(options: argparse.Namespace) -> None:
    train = images(options.data / "cifar10-train.parquet", options.rows, options.size)
    test = images(options.data / "cifar10-test.parquet", options.test_rows, options.size)
    done = {(r["method"], r["ipc"], r["seed"]) for r in lines(options.out)}
    names = options.methods or [RANDOM, CORESET, *distill.RECIPES, *distill.MATCH_RECIPES]
    for seed in options.seeds:
        missing = [(n, ipc) for n in names for ipc in options.ipc if (n, ipc, seed) not in done]
        if not missing:
            continue
        start = time.perf_counter()
        teacher = distill.squeeze(
            train, test=test, network=options.network, epochs=options.squeeze_epochs, seed=seed
        )
        spent = time.perf_counter() - start
        write(options.out, method="teacher", ipc=0, seed=seed, soft=100 * teacher.accuracy,
              squeezing=spent)  # fmt: skip
        for name, ipc in missing:
            write(options.out, method=name, ipc=ipc, seed=seed,
                  **trial(name, ipc, seed, train, test, teacher, options))  # fmt: skip


def trial(
    name: str,
    ipc: int,
    seed: int,
    train: distill.ImageSet,
    test: distill.ImageSet,
    teacher: distill.Teacher,
    options: argparse.Namespace,
) -> dict[str, float]:
    """Percent right of a student on soft labels and of one on hard labels, in the same views."""
    start = time.perf_counter()
    made = synthesized(name, ipc, seed, train, teacher, options)
    recovering = time.perf_counter() - start
    batch = usual_batch(made)
    labels = distill.relabel(
        made, [teacher], epochs=options.label_epochs, batch_size=batch, seed=seed
    )
    source = Source.distilled(made)
    sources: dict[str, Callable[[], Any]] = {
        "soft": lambda: ReplayedBatches(source, labels, batch_size=batch),
        "hard": lambda: HardBatches(source, labels, batch_size=batch, device="cpu"),
    }
    out = {"recovering": recovering, "label_bytes": float(labels.nbytes)}
    for kind, batches in sources.items():
        student = train_student(
            batches(), options.network, StudentConfig(epochs=options.label_epochs),
            labels=kind, size=options.size, seed=seed,
        )  # fmt: skip
        out[kind] = 100 * distill.accuracy(student, test)
    return out


def synthesized(
    name: str,
    ipc: int,
    seed: int,
    train: distill.ImageSet,
    teacher: distill.Teacher,
    options: argparse.Namespace,
) -> distill.DistilledImages:
    iterations = options.iterations or None
    if name in (RANDOM, CORESET):
        like = distill.recover([teacher], train, ipc=ipc, method="rded", seed=seed)
        if name == RANDOM:
            return random_subset(train, like, seed=seed)
        return coreset_subset(train, penultimate(teacher, train), like, method="herding")
    if name in distill.MATCH_RECIPES:
        # A step sees a batch of real images of every class: half as many take as long.
        half = max(iterations // 2, 1) if iterations else None
        return distill.match(train, ipc=ipc, method=name, iterations=half, seed=seed)
    if name == "rded":
        iterations = None  # it has none
    return distill.recover([teacher], train, ipc=ipc, method=name, iterations=iterations, seed=seed)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(path: Path, **line: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def table(found: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, best on soft labels first, and each seed's rank."""
    cells: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in found:
        if line["ipc"]:
            cells.setdefault((line["method"], line["ipc"]), []).append(line)

    def shown(values: list[float]) -> str:
        spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}"

    out = []
    for ipc in sorted({ipc for _, ipc in cells}):
        here = {name: sorted(v, key=lambda line: line["seed"])
                for (name, of), v in cells.items() if of == ipc}  # fmt: skip
        ranks: dict[str, list[str]] = {name: [] for name in here}
        for place in range(min(len(v) for v in here.values())):
            ordered = sorted(here, key=lambda name: -here[name][place]["soft"])
            for rank, name in enumerate(ordered, 1):
                ranks[name].append(str(rank))
        out += [f"{ipc} images per class", "",
                "| method | soft labels | hard labels | rank by seed | recover |",
                "|---|---|---|---|---|"]  # fmt: skip
        best = sorted(here, key=lambda name: -statistics.mean(r["soft"] for r in here[name]))
        for name in best:
            took = statistics.mean(line["recovering"] for line in here[name])
            soft, hard = ([line[kind] for line in here[name]] for kind in ("soft", "hard"))
            out.append(
                f"| {name} | {shown(soft)} | {shown(hard)} | {' '.join(ranks[name])} | "
                f"{took:.0f} s |"
            )
        out.append("")
    teachers = [line for line in found if line["method"] == "teacher"]
    out.append(f"Teacher: {shown([line['soft'] for line in teachers])}.")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--test-rows", type=int, default=2000)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--network", default="convnet3")
    parser.add_argument("--ipc", type=int, nargs="+", default=[10])
    parser.add_argument("--squeeze-epochs", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--label-epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+")
    options = parser.parse_args()
    if options.table:
        sys.stdout.write(table(lines(options.out)) + "\n")
    else:
        run(options)


if __name__ == "__main__":
    main()
