"""Progress of long steps: silent unless a program switches it on.

The command line chooses a `mode`; libraries and notebooks stay quiet. Every mode shows the rate and
the time left. What was done in an earlier, interrupted run does not count towards the rate.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

logger = logging.getLogger(__name__)

Mode = Literal["silent", "log", "bar"]
Advance = Callable[[int], None]

_SECONDS_BETWEEN_LINES = 5.0
_mode: Mode = "silent"


def show(mode: Mode) -> Mode:
    """Choose how progress is shown in this process: not at all, as log lines, or as a bar.

    Returns what was chosen before.
    """
    global _mode
    before, _mode = _mode, mode
    return before


@contextmanager
def task(label: str, *, total: int, unit: str = "rows", done: int = 0) -> Iterator[Advance]:
    """Report on one step; yields a function to call with the number of units just finished.

    Parameters
    ----------
    label : str
        The step's name.
    total : int
        Units in all, `done` included.
    unit : str
        What is counted.
    done : int
        Units finished before this run began.

    Examples
    --------
    >>> with task("embed", total=10) as advance:
    ...     advance(10)
    """
    if _mode == "bar":
        with _bar(label, total, unit, done) as advance:
            yield advance
    elif _mode == "log":
        with _lines(label, total, unit, done) as advance:
            yield advance
    else:
        yield lambda count: None


@contextmanager
def _lines(label: str, total: int, unit: str, done: int) -> Iterator[Advance]:
    start = last = time.monotonic()
    count = done

    def line(now: float, *, last: bool) -> None:
        rate = (count - done) / max(now - start, 1e-9)
        left = (total - count) / rate if rate > 0 else float("nan")
        so_far = f"{count:,}" if last else f"{count:,} of {total:,}"
        end = f"in {_duration(now - start)}" if last else f"{_duration(left)} left"
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}"
        logger.info(
            "%s: %s %s %s (%s/s)",
            label,
            so_far,
            unit,
            end,
            speed,
            extra={
                "event": "progress",
                "step": label,
                "done": count,
                "total": total,
                "unit": unit,
                "rate": round(rate, 3),
                "seconds_left": 0.0 if last else None if left != left else round(left, 1),
            },
        )

    def advance(finished: int) -> None:
        nonlocal count, last
        count += finished
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            line(now, last=False)

    yield advance
    line(time.monotonic(), last=True)


@contextmanager
def _bar(label: str, total: int, unit: str, done: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Task as RichTask
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: RichTask) -> Text:
            seconds = task.elapsed or 0.0
            rate = (task.completed - done) / seconds if seconds > 0 else 0.0
            return Text(f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2f} {unit}/s")

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        number = bar.add_task(label, total=total, completed=done)
        yield lambda finished: bar.advance(number, finished)


def _duration(seconds: float) -> str:
    """Return a duration as a person would say it.

    Examples
    --------
    >>> _duration(75), _duration(4000), _duration(float("nan"))
    ('1m15s', '1h06m', 'unknown time')
    """
    if seconds != seconds:
        return "unknown time"
    if seconds < 60:
        return f"{seconds:.0f}s"
    if seconds < 3600:
        return f"{int(seconds // 60)}m{int(seconds % 60):02d}s"
    return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m"
