"""The charts of a report, as inline SVG: no script, colours from the page's style sheet.

All charts are drawn 480 units wide, so that their lettering has one size and stays readable on a
narrow screen. Nothing here writes text from the data without escaping it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from pipelines.report_figures import Histogram, round_step

WIDTH = 480
_HEIGHT = 268
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 26, 46
_MOST_MARKS = 800

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic mapping from values to places on the chart."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, values: Floats | NDArray[np.int64] | float) -> Floats:
        """Return where values lie, held within the axis."""
        points = np.clip(np.asarray(values, dtype=np.float64), self.low, self.high)
        low, high = self.low, self.high
        if self.log:
            points, low, high = np.log10(points), math.log10(low), math.log10(high)
        placed: Floats = self.start + (points - low) / (high - low) * (self.end - self.start)
        return placed

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """Return round values on the axis, with their text."""
        if self.log and len(decades := self._log_ticks(most)) > 1:
            return [(value, count_text(value)) for value in decades]
        step = round_step((self.high - self.low) / most)
        first = math.ceil(self.low / step - 1e-6)
        last = math.floor(self.high / step + 1e-6)
        values = [number * step for number in range(first, last + 1)]
        if step >= 1:
            return [(value, count_text(value)) for value in values]
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [(value, f"{value + 0.0:.{digits}f}") for value in values]

    def _log_ticks(self, most: int) -> list[float]:
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            ticks = [f * 10.0**e for e in exponents for f in factors]
            ticks = [tick for tick in ticks if self.low <= tick <= self.high]
            if len(ticks) <= most:
                break
        return ticks


def count_text(value: float) -> str:
    """Return a count as short as an axis needs it.

    Examples
    --------
    >>> count_text(950), count_text(2500), count_text(40_000), count_text(3_000_000)
    ('950', '2,500', '40k', '3M')
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            unit = 1e3 if letter == "k" else size
            return f"{value / unit:,.10g}{letter}"
    return f"{value:,.10g}"


def histogram_chart(
    data: Histogram, *, name: str, title: str, x_label: str, mark_label: str = ""
) -> str:
    """Draw two series stacked, so that the outline is that of all rows.

    Parameters
    ----------
    data : Histogram
        The counts; the first series stands at the bottom.
    name : str
        An identifier, unique on the page.
    title, x_label, mark_label : str
        What the chart shows, its axis, and what its mark means.
    """
    total = data.first + data.second
    x = Scale(float(data.edges[0]), float(data.edges[-1]), _LEFT, WIDTH - _RIGHT)
    y = Scale(0.0, max(1.0, float(total.max()) * 1.04), _HEIGHT - _BOTTOM, _TOP)
    left, right = x.place(data.edges[:-1]), x.place(data.edges[1:])
    base = np.full(len(total), y.start)
    lower, upper = y.place(data.first.astype(np.float64)), y.place(total.astype(np.float64))
    parts = [
        *_frame(x, y, x_label, "rows"),
        _bars("first", left, right, base, lower),
        _bars("second", left, right, lower, upper),
        _base_line(),
    ]
    if data.mark is not None and x.low <= data.mark <= x.high:
        parts += _vertical_mark(float(x.place(data.mark)), mark_label)
    return svg(name, title, parts)


def _bars(name: str, left: Floats, right: Floats, low: Floats, high: Floats) -> str:
    # One path for all bars: fewer bytes than a rectangle each. The gap between bars is the paper.
    drawn = np.flatnonzero(low - high > 0.01)
    path = "".join(
        f"M{left[i] + 0.4:.1f} {low[i]:.1f}V{high[i]:.1f}H{right[i] - 0.4:.1f}V{low[i]:.1f}Z"
        for i in drawn
    )
    return f'<path class="{name}" d="{path}"/>'


def curve_chart(
    x: NDArray[np.int64], y: Floats, *, name: str, title: str, x_label: str, y_label: str
) -> str:
    """Draw values against a count from 1 on, which is logarithmic; empty for less than two."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) < 2:
        return ""
    low, high = min(float(y.min()), 0.0), max(float(y.max()), 0.0)
    room = 0.04 * (high - low) or 1.0
    across = Scale(1.0, float(x.max()), _LEFT, WIDTH - _RIGHT, log=True)
    up = Scale(low - room * (low < 0), high + room, _HEIGHT - _BOTTOM, _TOP)
    points = zip(across.place(x), up.place(y), strict=True)
    path = "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
    parts = [*_frame(across, up, x_label, y_label), f'<path class="curve" d="M{path}"/>']
    return svg(name, title, [*parts, _base_line()])


def _vertical_mark(x: float, label: str) -> list[str]:
    anchor, shift = ("start", 5) if x < WIDTH * 0.6 else ("end", -5)
    return [
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 14}" y2="{_HEIGHT - _BOTTOM}"/>',
        f'<text class="mark-text" x="{x + shift:.1f}" y="{_TOP - 6}" text-anchor="{anchor}">'
        f"{escape(label)}</text>",
    ]


@dataclass(frozen=True)
class Line:
    """A reference line of a scatter chart through two points, with its name at the second."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    label: str = ""


def kept_by_size_chart(size: NDArray[np.int64], kept: NDArray[np.int64], *, name: str) -> str:
    """Draw kept rows against rows of each cluster, both logarithmic, with a lane for none kept."""
    size, kept = size[size > 0].astype(np.float64), kept[size > 0].astype(np.float64)
    lowest, most = _decade_below(float(size.min())), float(size.max()) * 1.25
    x = Scale(lowest, most, _LEFT, WIDTH - _RIGHT, log=True)
    lane = 20 if (kept == 0).any() else 0
    positive = kept[kept > 0]
    bottom = float(positive.min()) / 1.3 if positive.size else 1.0
    y = Scale(bottom, most, _HEIGHT - _BOTTOM - lane, _TOP, log=True)
    places = np.where(kept > 0, y.place(np.maximum(kept, bottom)), y.start + lane * 0.6)
    share = float(kept.sum() / size.sum())
    lines = [Line((lowest, most), (lowest, most))]
    if share > 0:
        lines.append(Line((lowest, most), (lowest * share, most * share)))
    parts = _frame(x, y, "rows of the cluster", "rows kept")
    if lane:
        parts.append(_lane(y.start, lane))
    parts += [*_lines(x, y, lines), *_marks(x.place(size), places), _base_line()]
    return svg(name, "Rows kept of each cluster against the rows it has", parts)


def share_by_complexity_chart(
    complexity: Floats, share: Floats, *, overall: float, name: str
) -> str:
    """Draw the kept share of each cluster against its complexity; empty if no value is finite."""
    finite = np.isfinite(complexity) & np.isfinite(share)
    complexity, share = complexity[finite], share[finite]
    if not complexity.size:
        return ""
    low, high = float(complexity.min()), float(complexity.max())
    room = 0.05 * (high - low) or max(abs(low), 1e-3) * 0.5
    x = Scale(low - room, high + room, _LEFT, WIDTH - _RIGHT)
    y = Scale(0.0, 104.0, _HEIGHT - _BOTTOM, _TOP)
    line = Line((x.low, x.high), (100 * overall, 100 * overall), "all clusters")
    parts = [
        *_frame(x, y, "complexity (d_inter · d_intra)", "kept, %"),
        *_marks(x.place(complexity), y.place(100 * share)),
        *_lines(x, y, [line]),
        _base_line(),
    ]
    return svg(name, "Kept share of each cluster against its complexity", parts)


def binned(count: int) -> bool:
    """Say whether so many clusters are drawn as squares of many, not one by one."""
    return count > _MOST_MARKS


def _marks(x: Floats, y: Floats) -> list[str]:
    if not binned(len(x)):
        path = "".join(
            f"M{px - 2.6:.1f} {py:.1f}a2.6 2.6 0 1 0 5.2 0a2.6 2.6 0 1 0-5.2 0Z"
            for px, py in zip(x, y, strict=True)
        )
        return [f'<path class="dots" d="{path}"/>']
    side = 6.0
    cells, counts = np.unique(
        np.stack([np.floor(x / side), np.floor(y / side)]), axis=1, return_counts=True
    )
    depth = np.log1p(counts) / np.log1p(counts.max())
    level = np.minimum((depth * 5).astype(np.int64), 4)
    marks = []
    for step in np.unique(level):
        path = "".join(
            f"M{cx * side:.0f} {cy * side:.0f}h{side:.0f}v{side:.0f}h-{side:.0f}Z"
            for cx, cy in cells[:, level == step].T
        )
        marks.append(f'<path class="first" fill-opacity="{0.2 + 0.2 * step:.1f}" d="{path}"/>')
    return marks


def _lines(x: Scale, y: Scale, lines: Sequence[Line]) -> Iterator[str]:
    for line in lines:
        xs, ys = _clipped(line, x, y)
        px, py = x.place(np.array(xs)), y.place(np.array(ys))
        yield (
            f'<line class="reference" x1="{px[0]:.1f}" y1="{py[0]:.1f}" '
            f'x2="{px[1]:.1f}" y2="{py[1]:.1f}"/>'
        )
        if line.label:
            yield (
                f'<text class="halo" x="{px[1] - 4:.1f}" y="{py[1] - 5:.1f}" '
                f'text-anchor="end">{escape(line.label)}</text>'
            )


def _clipped(line: Line, x: Scale, y: Scale) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Cut the lower end of a rising line where it leaves the chart; a level line stays."""
    slope = line.y[0] / line.x[0] if line.x[0] else 0.0
    rising = line.y[0] != line.y[1]
    if rising and line.y[0] < y.low:
        return (y.low / slope, line.x[1]), (y.low, line.y[1])
    return line.x, line.y


def _decade_below(value: float) -> float:
    return max(value / 1.25, 0.8)


def _lane(start: float, height: int) -> str:
    y = start + height
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{start:.1f}" y2="{start:.1f}"/>'
        f'<text class="tick" x="{_LEFT - 7}" y="{y - height * 0.4 + 4:.1f}" '
        'text-anchor="end">0</text>'
    )


def _frame(x: Scale, y: Scale, x_label: str, y_label: str) -> list[str]:
    parts = []
    for value, text in y.ticks(6):
        place = float(y.place(value))
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" '
            f'y1="{place:.1f}" y2="{place:.1f}"/>'
            f'<text class="tick" x="{_LEFT - 7}" y="{place + 4:.1f}" '
            f'text-anchor="end">{escape(text)}</text>'
        )
    floor = _HEIGHT - _BOTTOM
    for value, text in x.ticks(8):
        place = float(x.place(value))
        parts.append(
            f'<line class="axis" x1="{place:.1f}" x2="{place:.1f}" y1="{floor}" y2="{floor + 4}"/>'
            f'<text class="tick" x="{place:.1f}" y="{floor + 17}" '
            f'text-anchor="middle">{escape(text)}</text>'
        )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="label" x="{middle:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text class="label" x="{_LEFT - 48}" y="{_TOP - 12}">{escape(y_label)}</text>'
    )
    return parts


def _base_line() -> str:
    floor = _HEIGHT - _BOTTOM
    return f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{floor}" y2="{floor}"/>'


@dataclass(frozen=True)
class FunnelBar:
    """One bar of the funnel: what is left, what was dropped to get there."""

    label: str
    value: int
    dropped: tuple[int, ...] = ()


def funnel_chart(bars: Sequence[FunnelBar], *, name: str) -> str:
    """Draw rows after each stage as bars of one scale, with what each stage took off."""
    widest = max([1, *(bar.value + sum(bar.dropped) for bar in bars)])
    x = Scale(0.0, float(widest), 0.0, float(WIDTH))
    parts = []
    for number, bar in enumerate(bars):
        top = 46 * number
        end = float(x.place(bar.value))
        parts.append(
            f'<text class="label strong" x="0" y="{top + 14}">{escape(bar.label)}</text>'
            f'<text class="label number" x="{WIDTH}" y="{top + 14}" text-anchor="end">'
            f"{bar.value:,}</text>"
            f'<rect class="track" x="0" y="{top + 20}" width="{WIDTH}" height="14"/>'
            f'<rect class="first" x="0" y="{top + 20}" width="{end:.1f}" height="14"/>'
        )
        reached = bar.value
        for count in bar.dropped:
            start, reached = float(x.place(reached)), reached + count
            width = max(float(x.place(reached)) - start - 1, 0.6)
            parts.append(
                f'<rect class="second" x="{min(start + 1, WIDTH - width):.1f}" y="{top + 20}" '
                f'width="{width:.1f}" height="14"/>'
            )
    return svg(name, "Rows left after each stage", parts, height=46 * len(bars) - 6)


def svg(name: str, title: str, parts: Sequence[str], height: int = _HEIGHT) -> str:
    """Return a chart of its parts; `name` is an identifier, unique on the page."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{name}-title">'
        f'<title id="{name}-title">{escape(title)}</title>{"".join(parts)}</svg>'
    )
