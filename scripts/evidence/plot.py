"""Line plots as SVG text: a few lines of numbers, the same bytes on every machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 360, 64, 44, 12, 170
COLOURS = ("#c2185b", "#1565c0", "#2e7d32", "#b08900", "#6b7280", "#7b1fa2", "#00838f", "#5d4037", "#e65100")


@dataclass(frozen=True)
class Line:
    name: str
    points: Sequence[tuple[float, float]]
    errors: Sequence[float] = ()
    """Of every point, for a band around the line."""


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round values between low and high."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 8)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def plot(lines: Sequence[Line], *, x: str, y: str, marked: float | None = None) -> str:
    """An SVG picture of the lines, y from 0. marked: a vertical line there."""
    xs = [point[0] for line in lines for point in line.points]
    top = max(y + error for line in lines for y, error in _with_errors(line)) * 1.05
    low, high = min(xs), max(xs)

    def at(px: float, py: float) -> str:
        across = LEFT + (px - low) / (high - low) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - py / top * (HEIGHT - BOTTOM - TOP)
        return f"{across:.1f},{down:.1f}"

    def text(px: float, py: float, content: str, anchor: str = "middle", colour: str = "#1b1b1f") -> str:
        return f'<text x="{px:.1f}" y="{py:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(content)}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"',
        ' font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for value in ticks(low, high):
        px = float(at(value, 0).split(",")[0])
        parts.append(text(px, HEIGHT - BOTTOM + 16, f"{value:g}"))
    for value in ticks(0, top):
        py = float(at(low, value).split(",")[1])
        parts.append(f'<path d="M{LEFT},{py:.1f}H{WIDTH - RIGHT}" stroke="#e5e5ea"/>')
        parts.append(text(LEFT - 6, py + 4, f"{value:g}", "end"))
    if marked is not None and low <= marked <= high:
        parts.append(f'<path d="M{at(marked, 0)}L{at(marked, top)}" stroke="#bbbbbb" stroke-dasharray="4"/>')
    for i, line in enumerate(lines):
        colour = COLOURS[i % len(COLOURS)]
        if line.errors:
            upper = [at(x, y + error) for (x, y), error in zip(line.points, line.errors, strict=True)]
            lower = [at(x, max(0.0, y - error)) for (x, y), error in zip(line.points, line.errors, strict=True)]
            parts.append(f'<polygon points="{" ".join(upper + lower[::-1])}" fill="{colour}" fill-opacity="0.15"/>')
        path = " ".join(at(*point) for point in line.points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{2.5 if i == 0 else 1.3}"/>'
        )
        parts.append(text(WIDTH - RIGHT + 10, TOP + 14 + 16 * i, line.name, "start", colour))
    parts += [text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x), text(LEFT, TOP - 1, y, "start"), "</svg>"]
    return "\n".join(parts) + "\n"


def _with_errors(line: Line) -> list[tuple[float, float]]:
    return [(y, error) for (_, y), error in zip(line.points, line.errors or [0.0] * len(line.points), strict=True)]
