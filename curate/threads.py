"""Work on blocks of rows in threads: one for each core of a CPU, two for each GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")

# Between two operations a thread holds Python's lock for a few microseconds: more than so many
# threads would wait for each other, and let torch split their operations instead.
_MOST_THREADS = 16
_PER_GPU = 2  # one reads and copies rows while the other one's are computed on
_own = threading.local()


@contextmanager
def in_threads(
    device: torch.device, *more: torch.device, most: int | None = None
) -> Iterator[Callable[[Callable[[T], Any], Iterable[T]], None]]:
    """Give a function that calls another on each item, several at a time.

    One operation of torch at a time, spread over the cores, waits for its slowest part and sends
    all it computes through memory. Blocks that stay in a core's own cache, one for each thread,
    are up to twice as fast. The error that is raised is that of the first item that fails.

    Parameters
    ----------
    *devices : torch.device
        Where it runs. What the function does on a GPU must be within `on_stream`.
    most : int, optional
        At most so many threads, default 16; the cores of a CPU are shared between them.
    """
    cores = torch.get_num_threads()
    if device.type == "cuda":
        with ThreadPoolExecutor(_PER_GPU * (1 + len(more)), "gpu") as pool:
            yield _each(pool)
        return
    if device.type != "cpu" or cores == 1:
        yield one_by_one
        return
    threads = min(cores, most or _MOST_THREADS)
    try:
        with ThreadPoolExecutor(
            threads, "rows", torch.set_num_threads, (cores // threads,)
        ) as pool:
            yield _each(pool)
    finally:
        torch.set_num_threads(cores)  # a part of what the threads set is the process's


def _each(pool: ThreadPoolExecutor) -> Callable[[Callable[[T], Any], Iterable[T]], None]:
    def each(work: Callable[[T], Any], items: Iterable[T]) -> None:
        for _ in pool.map(work, items):
            pass

    return each


@contextmanager
def on_stream(device: torch.device) -> Iterator[None]:
    """Run what follows on a stream of this thread's own, where the device is a GPU.

    It begins after all that was asked of the device before the threads, and is done at the end.
    """
    if device.type != "cuda":
        yield
        return
    streams = _own.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream = streams[device]
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def one_by_one(work: Callable[[T], Any], items: Iterable[T]) -> None:
    """Call a function on each item, in order."""
    for item in items:
        work(item)


@contextmanager
def one_thread(device: torch.device | None = None) -> Iterator[None]:
    """Keep the operations of torch on one thread: small ones wait more than they gain."""
    cores = torch.get_num_threads()
    if (device is not None and device.type != "cpu") or cores == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(cores)
