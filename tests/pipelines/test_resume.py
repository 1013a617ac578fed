"""Killed half-way and continued is the same as never killed, byte for byte but for times."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipelines
from curate.manifest import read_manifest
from pipelines import stages
from tests.conftest import MakePool, embedded_table, image_table, tree

Kill = dict[str, float]
Files = dict[str, object]

STEPS = ("index", "embeddings", "scores", "duplicates", "clusters", "selection", "pool")


class Server:
    """The process that runs and kills commands (killing.py)."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("killing.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the helper process died"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, arguments: list[str], **kill: float | str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"arguments": arguments, **kill}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def finish_after_kills(server: Server, arguments: list[str], kills: list[Kill], log: Path) -> int:
    """Run with one kill after another, then to the end; return how many kills struck."""
    struck = 0
    for kill in kills:
        struck += server.run(arguments, **kill, log=str(log))["killed"]
    end = server.run(arguments, log=str(log))
    assert end == end | {"killed": False, "code": 0}, log.read_text()
    return struck


def check_kills(
    server: Server, command: list[str], tmp_path: Path, *, chains: int, by_time: int
) -> int:
    whole = tmp_path / "whole"
    uninterrupted = server.run([*command, "--out", str(whole)], log=str(tmp_path / "log"))
    assert uninterrupted["code"] == 0, (tmp_path / "log").read_text()
    expected = tree(whole)
    rng = np.random.default_rng(0)
    events, seconds = uninterrupted["events"], uninterrupted["seconds"]
    struck = 0
    for chain in range(chains):
        # The kills of a chain fall on ever later moments of what is left, over all the stages.
        kills = [{"kill_at_event": int(rng.integers(1, max(2, events // 3)))} for _ in range(4)]
        kills += [{"kill_after": float(rng.uniform(0, 0.6 * seconds))} for _ in range(by_time)]
        out = tmp_path / f"killed-{chain}"
        struck += finish_after_kills(
            server, [*command, "--out", str(out)], kills, tmp_path / f"log-{chain}"
        )
        found = tree(out)
        assert found.keys() == expected.keys()
        for name, content in expected.items():
            assert found[name] == content, name
    return struck


def test_killed_at_random_moments(server: Server, make_pool: MakePool, tmp_path: Path) -> None:
    """At least 20 kills, over all stages, on a pool of four shards."""
    pool = make_pool(embedded_table(400), shards=4)
    command = ["prune", "--pool", str(pool), "--keep", "0.3", "--clusters", "6"]
    assert check_kills(server, command, tmp_path, chains=5, by_time=2) >= 20


def test_killed_while_decoding_and_embedding(
    server: Server, make_pool: MakePool, tiny_clip: Path, tmp_path: Path
) -> None:
    """The same with images that are decoded and embedded, some of them broken."""
    pool = make_pool(image_table(150), shards=5)
    command = ["prune", "--pool", str(pool), "--keep", "0.3", "--epsilon", "1e-6"]
    command += ["--model", str(tiny_clip), "--pretrained", "none", "--batch-size", "16"]
    assert check_kills(server, command, tmp_path, chains=2, by_time=3) >= 8


def step_struck(run: Path, steps: Sequence[str]) -> str:
    """What a killed run was at: the step that was begun and is not complete."""
    for step in steps:
        manifest = read_manifest(run / step)
        if manifest is None:
            return f"before {step}"
        if not manifest["complete"]:
            return step
    return "report and manifest"


def check_kill(
    server: Server,
    command: list[str],
    out: Path,
    moment: int,
    expected: Files,
    steps: Sequence[str] = STEPS,
) -> str:
    """Kill a run at one moment, finish it, compare; return what it was at."""
    arguments, log = [*command, "--out", str(out)], out.with_suffix(".log")
    ended = server.run(arguments, kill_at_event=moment, log=str(log))
    assert ended == {"killed": True}, (moment, ended)
    struck = step_struck(out, steps)
    finish_after_kills(server, arguments, [], log)
    found = tree(out)
    assert found.keys() == expected.keys(), moment
    for name, content in expected.items():
        assert found[name] == content, (moment, name)
    return struck


def uninterrupted(server: Server, command: list[str], out: Path) -> tuple[int, Files]:
    """Run to the end; return how many moments of writing there were, and what was written."""
    ended = server.run([*command, "--out", str(out)])
    assert ended["code"] == 0
    return ended["events"], tree(out)


def test_killed_at_evenly_spread_moments_of_the_whole_run(
    server: Server, make_pool: MakePool, tmp_path: Path
) -> None:
    """One kill in each of 14 runs; together they strike every step, and the very end."""
    pool = make_pool(embedded_table(200), shards=2)
    command = ["prune", "--pool", str(pool), "--keep", "0.3", "--clusters", "4"]
    events, expected = uninterrupted(server, command, tmp_path / "whole")
    struck = {
        check_kill(server, command, tmp_path / f"killed-{moment}", int(moment), expected)
        for moment in np.linspace(1, events - 1, 14).round()
    }
    assert struck >= {*STEPS, "report and manifest"}


def test_coreset_killed_at_evenly_spread_moments(
    server: Server, make_pool: MakePool, tmp_path: Path
) -> None:
    pool = make_pool(embedded_table(60), shards=2)
    command = ["coreset", "--pool", str(pool), "--method", "k-center", "--budget", "7"]
    events, expected = uninterrupted(server, command, tmp_path / "whole")
    steps = ("index", "embeddings", "coreset", "selection", "pool")
    struck = {
        check_kill(server, command, tmp_path / f"killed-{moment}", int(moment), expected, steps)
        for moment in np.linspace(1, events - 1, 12).round()
    }
    assert struck >= {*steps, "report and manifest"}


class Killed(BaseException):
    """Stands in for a kill inside a process."""


@pytest.mark.parametrize("which", [1, 4, 9, 15])
def test_k_means_goes_on_where_it_was_killed(
    make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """Its checkpoints are minutes apart; here there is one after every iteration."""
    monkeypatch.setattr(stages, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    pool = make_pool(embedded_table(600, groups=30))
    options = {"keep": 0.3, "clusters": 25, "dedup_clusters": 5, "kmeans_tolerance": 0}
    pipelines.prune(pool, out=tmp_path / "whole", **options)
    write, written = stages.write_array, []

    def write_and_die(path: Path, array: np.ndarray) -> None:
        write(path, array)
        written.append(path.name)
        if len(written) == which:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stages, "write_array", write_and_die)
        pipelines.prune(pool, out=tmp_path / "run", **options)
    assert written[-1].startswith("iteration-") or written[-1] == "centroids.npy"
    pipelines.prune(pool, out=tmp_path / "run", **options)
    assert tree(tmp_path / "run") == tree(tmp_path / "whole")
