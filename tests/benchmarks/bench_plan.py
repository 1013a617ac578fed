"""What `curate plan` says against what `curate prune` then takes, step by step.

Prints Markdown for RESULTS.md. Run on an idle machine:
``python -m tests.benchmarks.bench_plan 1000000 10000000`` (3 GB of disk for each million rows).
``--run-first`` takes them in the other order, to see whether the files in memory matter.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipelines.plan_sample import FOLDERS
from tests.benchmarks.bench_prune import DIMENSIONS, write_pool

FLAGS = ["--keep", "0.28", "--log-format", "json"]


def command(verb: str, pool: Path, out: Path) -> tuple[float, float, str]:
    """Run a verb; return its seconds, its peak of memory (maps included) in GiB, its output."""
    start = time.perf_counter()
    arguments = [sys.executable, "-m", "pipelines", verb, "--pool", str(pool), "--out", str(out)]
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen([*arguments, *FLAGS], stdout=said, stderr=subprocess.DEVNULL) as process,
    ):
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read().decode()
    if process.returncode:
        raise SystemExit(f"curate {verb} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20, text


def step_seconds(run: Path) -> dict[str, float]:
    """What the manifests of a run say."""
    found = {}
    for step, name in FOLDERS.items():
        paths = (run / name / "manifest.json", run / f"{name}.manifest.json")
        for path in paths:
            if path.exists():
                found[step] = float(json.loads(path.read_text())["times"]["seconds"])
    return found


def compare(folder: Path, rows: int, *, run_first: bool) -> None:
    pool, run = folder / "pool", folder / "run"
    # In a process of its own: a child's peak of memory begins at what its parent holds.
    maker = multiprocessing.get_context("spawn").Process(target=write_pool, args=(pool, rows))
    maker.start()
    maker.join()
    load = os.getloadavg()[0]
    if run_first:
        seconds, peak, _ = command("prune", pool, run)
    measuring, _, said = command("plan", pool, folder / "planned")
    if not run_first:
        seconds, peak, _ = command("prune", pool, run)
    plan = json.loads(said)
    ratio = plan["seconds"] / seconds
    sys.stdout.write(
        f"\n{rows:,} x {DIMENSIONS}, load {load:.1f} before; planning took {measuring:.0f} s\n\n"
        "| step | plan | run | plan / run |\n|---|---|---|---|\n"
        f"| **whole command** | {plan['seconds']:.1f} s | {seconds:.1f} s | **{ratio:.2f}** |\n"
    )
    planned = {step["step"]: step["seconds"] for step in plan["steps"]}
    for step, real in step_seconds(run).items():
        told = sum(seconds for name, seconds in planned.items() if name.split()[0] == step)
        sys.stdout.write(f"| {step} | {told:.2f} s | {real:.2f} s | {told / real:.2f} |\n")
    told = plan["memory_bytes"] / 2**30
    sys.stdout.write(f"| peak memory | {told:.2f} GiB | {peak:.2f} GiB | |\n")
    sys.stdout.flush()


def main() -> None:
    run_first = "--run-first" in sys.argv
    sizes = [int(a) for a in sys.argv[1:] if not a.startswith("--")] or [50_000, 200_000]
    place = os.environ.get("TMPDIR", "/tmp")
    sys.stdout.write(f"{os.cpu_count()} cores\n")
    for rows in sizes:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            compare(Path(folder), rows, run_first=run_first)


if __name__ == "__main__":
    main()
