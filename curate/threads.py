"""Work on blocks of rows in threads, each block small enough for one core's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")

# Between two operations a thread holds Python's lock for a few microseconds: more than so many
# threads would wait for each other, and let torch split their operations instead.
_MOST_THREADS = 16


@contextmanager
def in_threads(device: torch.device) -> Iterator[Callable[[Callable[[T], Any], Iterable[T]], None]]:
    """Give a function that calls another on each item, several at a time on a CPU.

    One operation of torch at a time, spread over the cores, waits for its slowest part and sends
    all it computes through memory. Blocks that stay in a core's own cache, one for each thread,
    are up to twice as fast. The error that is raised is that of the first item that fails.
    """
    cores = torch.get_num_threads()
    if device.type != "cpu" or cores == 1:
        yield one_by_one
        return
    threads = min(cores, _MOST_THREADS)
    try:
        with ThreadPoolExecutor(
            threads, "rows", torch.set_num_threads, (cores // threads,)
        ) as pool:

            def each(work: Callable[[T], Any], items: Iterable[T]) -> None:
                for _ in pool.map(work, items):
                    pass

            yield each
    finally:
        torch.set_num_threads(cores)  # a part of what the threads set is the process's


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
