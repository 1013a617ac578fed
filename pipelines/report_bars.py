"""Bars of measured values with their spread, as inline SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from pipelines.report_charts import WIDTH, Scale, svg


@dataclass(frozen=True)
class Bar:
    """One bar of a bar chart.

    Attributes
    ----------
    label, text : str
        What it is, and its value in words.
    value : float
    kind : {"first", "second", "third"}
        Its colour.
    spread : float, optional
        Drawn to both sides of the value.
    points : tuple of float
        Single measurements.
    """

    label: str
    text: str
    value: float
    kind: str = "first"
    spread: float | None = None
    points: tuple[float, ...] = ()


def bar_chart(bars: Sequence[Bar], *, name: str, title: str, mark: float | None = None) -> str:
    """Draw bars of one scale from 0 on, each below its label, with a line across at `mark`."""
    reach = [bar.value + (bar.spread or 0) for bar in bars]
    reach += [point for bar in bars for point in bar.points]
    x = Scale(0.0, max([*reach, mark or 0.0]) or 1.0, 0.0, float(WIDTH) - 4)
    parts = []
    for number, bar in enumerate(bars):
        top = 46 * number
        parts.append(
            f'<text class="label strong" x="0" y="{top + 14}">{escape(bar.label)}</text>'
            f'<text class="label number" x="{WIDTH}" y="{top + 14}" text-anchor="end">'
            f"{escape(bar.text)}</text>"
            f'<rect class="track" x="0" y="{top + 20}" width="{WIDTH}" height="14"/>'
            f'<rect class="{bar.kind}" x="0" y="{top + 20}" '
            f'width="{float(x.place(bar.value)):.1f}" height="14"/>'
        )
        parts += _spread(x, bar, top + 27)
        if mark is not None:
            place = float(x.place(mark))
            parts.append(
                f'<line class="mark" x1="{place:.1f}" x2="{place:.1f}" '
                f'y1="{top + 18}" y2="{top + 36}"/>'
            )
    return svg(name, title, parts, height=46 * len(bars) - 6)


def _spread(x: Scale, bar: Bar, y: int) -> Iterator[str]:
    """Yield the points of a bar, and its spread as a line with ends."""
    for place in x.place(np.array(bar.points)):
        yield f'<circle class="point" cx="{place:.1f}" cy="{y}" r="2.4"/>'
    if bar.spread:
        low, high = x.place(np.array([bar.value - bar.spread, bar.value + bar.spread]))
        yield (
            f'<path class="whisker" d="M{low:.1f} {y}H{high:.1f}M{low:.1f} {y - 5}v10'
            f'M{high:.1f} {y - 5}v10"/>'
        )
