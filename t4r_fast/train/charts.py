"""Line and bar charts as inline SVG: text, colours and dark mode come from the page's CSS."""

from __future__ import annotations

import dataclasses
import math
from html import escape

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 14, 40


@dataclasses.dataclass
class Series:
    """One line: points in data units; `tone` names its CSS colour; `marks` draws its points."""

    title: str
    tone: str
    points: list[tuple[float, float]]
    dashed: bool = False
    line: bool = True
    marks: bool = True


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About `wanted` round numbers that cover low..high: 0, 0.02, 0.04, ..."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / max(wanted - 1, 1)
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(s * scale for s in (1, 2, 2.5, 5, 10) if s * scale >= 0.8 * raw)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A tick label or tooltip: four significant digits, thousands apart, no needless zeros."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


class _Frame:
    """Maps data units to the drawing area and draws the axes."""

    def __init__(self, x_range: tuple[float, float], y_ticks: list[float]) -> None:
        self.x0, self.x1 = x_range
        self.y_ticks = y_ticks
        self.y0, self.y1 = y_ticks[0], y_ticks[-1]

    def x(self, value: float) -> float:
        span = (self.x1 - self.x0) or 1.0
        return LEFT + (value - self.x0) / span * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        span = (self.y1 - self.y0) or 1.0
        return HEIGHT - BOTTOM - (value - self.y0) / span * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> list[str]:
        out = []
        for tick in self.y_ticks:
            y = self.y(tick)
            out.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            out.append(
                f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">'
                f"{number(tick)}</text>"
            )
        return out

    def x_label(self, value: float, text: str) -> str:
        return (
            f'<text class="tick" x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 18}"'
            f' text-anchor="middle">{escape(text)}</text>'
        )

    def x_title(self, text: str) -> str:
        middle = (LEFT + WIDTH - RIGHT) / 2
        return (
            f'<text class="axis" x="{middle:.1f}" y="{HEIGHT - 4}"'
            f' text-anchor="middle">{escape(text)}</text>'
        )


def _svg(parts: list[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}">'
        + "".join(parts)
        + "</svg>"
    )


def line_chart(
    series: list[Series],
    *,
    label: str,
    x_title: str,
    x_ticks: list[tuple[float, str]],
    y_range: tuple[float, float],
    x_range: tuple[float, float] | None = None,
    dividers: list[float] = (),  # type: ignore[assignment]
) -> str:
    """Lines over a common x axis.

    label     what the chart shows, for screen readers
    x_ticks   [(value, text)]
    y_range   (low, high) to cover; widened to round ticks
    dividers  x values of dashed vertical lines
    """
    if x_range is None:
        xs = [x for x, _ in x_ticks]
        margin = 0.25 if len(xs) > 1 else 0.5
        x_range = (min(xs) - margin, max(xs) + margin)
    frame = _Frame(x_range, nice_ticks(*y_range))
    parts = frame.grid()
    for at in dividers:
        x = frame.x(at)
        parts.append(
            f'<line class="divider" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        )
    parts += [frame.x_label(value, text) for value, text in x_ticks]
    parts.append(frame.x_title(x_title))
    for one in series:
        parts += _line(frame, one)
    return _svg(parts, label)


def _line(frame: _Frame, one: Series) -> list[str]:
    placed = [(frame.x(x), frame.y(y), x, y) for x, y in one.points]
    parts = []
    if one.line and len(placed) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in placed)
        dash = " dashed" if one.dashed else ""
        parts.append(f'<polyline class="line tone-{one.tone}{dash}" points="{path}"/>')
    if one.marks:
        parts += [
            f'<circle class="mark tone-{one.tone}" cx="{x:.1f}" cy="{y:.1f}" r="3.6">'
            f"<title>{escape(one.title)}: {number(value)}</title></circle>"
            for x, y, _, value in placed
        ]
    return parts


def bar_chart(bars: list[tuple[str, float]], *, label: str, x_title: str, tone: str = "bar") -> str:
    """Vertical bars from zero; every bar tells its number on hover, few bars carry it on top."""
    high = max((value for _, value in bars), default=1.0)
    frame = _Frame((-0.5, len(bars) - 0.5), nice_ticks(0.0, high * (1.08 if len(bars) <= 8 else 1)))
    parts = frame.grid()
    width = (WIDTH - LEFT - RIGHT) / max(len(bars), 1) * 0.72
    every = math.ceil(len(bars) / 12)
    for i, (text, value) in enumerate(bars):
        x, y = frame.x(i), frame.y(value)
        parts.append(
            f'<rect class="tone-{tone}" x="{x - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}"'
            f' height="{HEIGHT - BOTTOM - y:.1f}" rx="1.5">'
            f"<title>{escape(text)}: {number(value)}</title></rect>"
        )
        if len(bars) <= 8:
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{y - 4:.1f}" text-anchor="middle">'
                f"{number(value)}</text>"
            )
        if i % every == 0:
            parts.append(frame.x_label(i, text))
    parts.append(frame.x_title(x_title))
    return _svg(parts, label)
