"""Runs the command in children that are killed: a helper process of test_resume.py.

It imports everything once and forks a child for each run, since starting Python and torch again
for each of dozens of kills would take minutes. Nothing has used OpenMP here before the fork.

Each line on standard input is JSON: the command's arguments, and when to kill the child: after so
many seconds, or at the n-th step of writing a file (before the rename, or after it). Each line on
standard output says how the child ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import datasets  # noqa: F401
import open_clip  # noqa: F401
import polars  # noqa: F401
import torch  # noqa: F401

import pipelines.pruning
import pipelines.reporting
from curate import manifest
from pipelines.cli import run


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def count_events(kill_at: int | None, total: Any) -> None:
    """Count each moment of writing a file, in the child; die at the one that was asked for."""
    original = Path.replace

    def replace(self: Path, target: Path) -> Path:
        event(total, kill_at)
        result = original(self, target)
        event(total, kill_at)
        return result

    Path.replace = replace  # type: ignore[method-assign]


def event(total: Any, kill_at: int | None) -> None:
    total.append(1)
    if len(total) == kill_at:
        die()


def child(request: dict[str, Any], answer: int) -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
    sys.stderr = open(request.get("log", os.devnull), "a")  # noqa: SIM115, PTH123
    events: list[int] = []
    count_events(request.get("kill_at_event"), events)
    if "kill_after" in request:
        timer = threading.Timer(request["kill_after"], die)
        timer.daemon = True
        timer.start()
    start = time.monotonic()
    code = run(request["arguments"])
    sys.stderr.flush()
    report = {"code": code, "events": len(events), "seconds": time.monotonic() - start}
    os.write(answer, json.dumps(report).encode())
    os._exit(0)


def say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    assert manifest and pipelines.pruning and pipelines.reporting
    say({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            child(request, write)
        os.close(write)
        data = b""
        while chunk := os.read(read, 65536):
            data += chunk
        os.close(read)
        _, status = os.waitpid(pid, 0)
        killed = os.WIFSIGNALED(status)
        say({"killed": killed, **(json.loads(data) if data else {})})


if __name__ == "__main__":
    main()
