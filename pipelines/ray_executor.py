"""Shards on a Ray cluster: the same workers as local ones, as actors (extra `ray`).

The pool and the output folder must lie where every node reaches them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from curate.errors import CurateError
from pipelines.executor import ShardReport, Worker


@dataclass(frozen=True)
class RayExecutor:
    """Runs shards as tasks of Ray actors, each of which makes its worker once.

    Attributes
    ----------
    workers : int
        Actors.
    gpus_per_worker : float
        GPUs that an actor holds; Ray then shows it no others.
    """

    workers: int
    gpus_per_worker: float = 0.0

    def map(
        self, make_worker: Callable[[], Worker], shards: Sequence[int]
    ) -> Iterator[ShardReport]:
        """Run the shards and yield their reports as they come."""
        if not shards:
            return
        ray = _ray()
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False, logging_level="warning")
        actor = ray.remote(num_cpus=1, num_gpus=self.gpus_per_worker)(_Actor)
        waiting = list(reversed(shards))
        running: dict[Any, Any] = {}
        for _ in range(min(self.workers, len(shards))):
            started = actor.remote(make_worker)
            running[started.run.remote(waiting.pop())] = started
        try:
            while running:
                ready, _ = ray.wait(list(running), num_returns=1)
                worker = running.pop(ready[0])
                report: ShardReport = ray.get(ready[0])
                if waiting:
                    running[worker.run.remote(waiting.pop())] = worker
                yield report
        except ray.exceptions.RayActorError as error:
            raise CurateError(
                "a Ray worker died (out of memory?); what it had finished is kept: run the same "
                "command again"
            ) from error
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error


class _Actor:
    def __init__(self, make_worker: Callable[[], Worker]) -> None:
        self._worker = make_worker()

    def run(self, shard: int) -> ShardReport:
        return self._worker(shard)


def _ray() -> Any:
    # Ray reports how it is used to its makers unless it is told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ImportError("--executor ray needs Ray: pip install 'curate-distill[ray]'") from error
    return ray
