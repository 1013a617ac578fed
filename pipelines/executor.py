"""Where shards run. A task is the number of a shard: a worker reads and writes its own part.

Nothing large passes through an executor, and resuming needs no support of it: the caller asks for
the shards whose parts are missing.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Protocol

from curate.errors import CurateError
from curate.runtime import WORKER_VARIABLE


@dataclass(frozen=True)
class ShardReport:
    """What a worker says about a shard that it finished."""

    shard: int
    rows: int


# Called for each shard; one with `in_threads` may be called for several at a time.
Worker = Callable[[int], ShardReport]
_MOST_THREADS = 4  # each may hold a shard


class Executor(Protocol):
    """Anything that can run a worker over shards."""

    def map(
        self, make_worker: Callable[[], Worker], shards: Sequence[int]
    ) -> Iterator[ShardReport]:
        """Run the shards in any order; `make_worker` is called once in each process."""
        ...


@dataclass(frozen=True)
class LocalExecutor:
    """Runs shards in this process, or in spawned ones.

    Processes are spawned, never forked: after any OpenMP work in the parent a forked child hangs.

    Attributes
    ----------
    workers : int
        Processes; 1 means this one.
    """

    workers: int = 1

    def runs_here(self, shards: Sequence[int]) -> bool:
        """Return whether these shards would run in this process."""
        return self.workers == 1 or len(shards) <= 1

    def map(
        self, make_worker: Callable[[], Worker], shards: Sequence[int]
    ) -> Iterator[ShardReport]:
        """Run the shards and yield their reports as they come."""
        if not shards:
            return
        if self.runs_here(shards):
            worker = make_worker()
            if getattr(worker, "in_threads", False):
                yield from _in_threads(worker, shards)
            else:
                yield from map(worker, shards)
            return
        workers = min(self.workers, len(shards))
        context = multiprocessing.get_context("spawn")
        numbers = context.Queue()
        for number in range(workers):
            numbers.put(number)
        with ProcessPoolExecutor(
            workers, context, initializer=_start, initargs=(make_worker, numbers, workers)
        ) as processes:
            futures = [processes.submit(_run, shard) for shard in shards]
            try:
                for future in as_completed(futures):
                    yield future.result()
            except BrokenProcessPool as error:
                raise CurateError(
                    "a worker process died (out of memory?); what it had finished is kept: "
                    "run the same command again, perhaps with fewer --workers"
                ) from error
            finally:
                for future in futures:
                    future.cancel()


def _in_threads(worker: Worker, shards: Sequence[int]) -> Iterator[ShardReport]:
    """Run several shards at a time of a worker that leaves Python's lock to others."""
    threads = min(len(shards), os.cpu_count() or 1, _MOST_THREADS)
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(worker, shard) for shard in shards]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


_worker: Worker | None = None


def _start(
    make_worker: Callable[[], Worker], numbers: multiprocessing.Queue[int], workers: int
) -> None:
    global _worker
    os.environ[WORKER_VARIABLE] = str(numbers.get())
    # Read when torch is loaded, which only the workers that embed do.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    _worker = make_worker()


def _run(shard: int) -> ShardReport:
    if _worker is None:
        raise RuntimeError("the worker process was not started")
    return _worker(shard)


def make_executor(kind: str, workers: int, device: str) -> Executor:
    """Return the executor that the flags name.

    Parameters
    ----------
    kind : {"local", "ray"}
    workers : int
        Processes, or actors.
    device : str
        A Ray actor holds a GPU if it is to use one.
    """
    if kind == "local":
        return LocalExecutor(workers)
    from curate.runtime import resolve_device
    from pipelines.ray_executor import RayExecutor

    gpus = 1.0 if resolve_device(device).type == "cuda" else 0.0
    return RayExecutor(workers, gpus)
