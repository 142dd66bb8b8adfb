"""Charts as SVG text, which every browser shows: no library, no script, nothing to download.

    line_chart(title, x_label, lines)        named lines through (x, y) points: losses
    interval_chart(title, rows, start, end)  (low, middle, high) of several kinds: a leaderboard
    scatter_chart(title, x_label, y_label, points)   intervals along two axes: style and capability
    sunburst(names, caption)                 a ring of names and a ring of their parts: diversity

Names come from downloaded files and from models, so every text is escaped.
"""

import math
from collections.abc import Callable, Iterable
from html import escape

from alpaca.common.errors import escape_control

COLOURS = ("#1f6feb", "#d1570a", "#1a7f37", "#8250df", "#9a6700", "#57606a")
MAX_DOTS = 12  # a line of fewer points shows each as a dot
Bars = list[tuple[str, int]]


def svg(width: int, height: int, parts: Iterable[str]) -> str:
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    style = 'font-family="sans-serif" font-size="12" style="background:#fff"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{"".join(parts)}</svg>\n'


def clean(text: str) -> str:
    """Escape what would be a tag or would control a terminal."""
    return escape(escape_control(text))


def label(text: str, x: float, y: float, anchor="middle", colour="#000", limit=200, size=12) -> str:
    text = clean(text if len(text) <= limit else text[: limit - 1] + "…")
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text {place} fill="{colour}">{text}</text>'


def line(path: str, colour: str = "#d0d7de", width: int = 1) -> str:
    return f'<path d="{path}" stroke="{colour}" stroke-width="{width}"/>'


def dot(x: float, y: float, colour: str, radius: int = 4) -> str:
    return f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{colour}"/>'


def axis(values: Iterable[float], start: int, end: int, ticks: int) -> tuple[Callable, list[float]]:
    """The function from a value to its pixel between start and end, and values for tick marks."""
    values = list(values) or [0.0]
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 1, high + 1
    marks = [low + (high - low) * n / (ticks - 1) for n in range(ticks)]
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 1), marks


def line_chart(title: str, x_label: str, lines: dict[str, list[tuple[float, float]]]) -> str:
    """Points that are not finite are left out."""
    lines = {n: [p for p in points if all(map(math.isfinite, p))] for n, points in lines.items()}
    x, x_marks = axis((a for points in lines.values() for a, _ in points), 64, 704, 6)
    y, y_marks = axis((b for points in lines.values() for _, b in points), 352, 40, 6)
    parts = [label(title, 360, 22, size=15), label(x_label, 360, 392)]
    parts += [label(f"{mark:.4g}", x(mark), 370) for mark in x_marks]
    parts += [label(f"{mark:.4g}", 58, y(mark) + 4, "end") for mark in y_marks]
    parts += [line(f"M64 {y(mark)}H704") for mark in y_marks]
    for n, (name, points) in enumerate(lines.items()):
        colour = COLOURS[n % len(COLOURS)]
        path = " ".join(f"{x(a)},{y(b)}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [dot(x(a), y(b), colour) for a, b in points if len(points) < MAX_DOTS]
        parts.append(label(name, 700, 54 + 16 * n, "end", colour))
    return svg(720, 400, parts)


def interval_chart(title: str, rows: dict[str, dict[str, tuple]], start: float, end: float) -> str:
    """Name → kind → (low, middle, high). A name may lack a kind."""
    kinds = list(dict.fromkeys(kind for intervals in rows.values() for kind in intervals))
    step = 22 + 6 * len(kinds)
    bottom, (x, marks) = 64 + step * len(rows), axis((start, end), 240, 704, 5)
    parts = [label(title, 360, 22, size=15)]
    parts += [line(f"M{x(mark)} 56V{bottom}") for mark in marks]
    parts += [label(f"{mark:g}", x(mark), bottom + 20) for mark in marks]
    for n, (kind, colour) in enumerate(zip(kinds, COLOURS, strict=False)):
        parts.append(label(f"● {kind}", 240 + 160 * n, 44, "start", colour))
        for row, (name, intervals) in enumerate(rows.items()):
            centre = 64 + step * (row + 0.5)
            y = centre + 10 * n - 5 * (len(kinds) - 1)
            parts += [label(name, 228, centre + 4, "end", limit=34)] if n == 0 else []
            if kind not in intervals:
                continue
            low, middle, high = intervals[kind]
            if math.isfinite(high - low):  # else the bounds are unknown: only the dot
                parts.append(line(f"M{x(low)} {y}H{x(high)}", colour, 2))
            parts.append(dot(x(middle), y, colour))
    return svg(720, bottom + 32, parts)


def scatter_chart(
    title: str, x_label: str, y_label: str, points: dict[str, tuple[tuple, tuple]]
) -> str:
    """Name → (low, middle, high) on either axis: a numbered dot with two bars. Axes go by tens."""
    x, x_marks = axis_by_tens((value for across, _ in points.values() for value in across), 64, 480)
    y, y_marks = axis_by_tens((value for _, up in points.values() for value in up), 432, 40)
    parts = [label(title, 360, 22, size=15), label(x_label, 272, 470, limit=90)]
    parts.append(
        f'<g transform="translate(20 236) rotate(-90)">{label(y_label, 0, 0, limit=60)}</g>'
    )
    parts += [line(f"M{x(mark)} 40V432") + label(f"{mark:g}", x(mark), 450) for mark in x_marks]
    parts += [
        line(f"M64 {y(mark)}H480") + label(f"{mark:g}", 58, y(mark) + 4, "end") for mark in y_marks
    ]
    for n, (name, (across, up)) in enumerate(points.items()):
        colour, (left, a, right), (bottom, b, top) = COLOURS[n % len(COLOURS)], across, up
        parts.append(line(f"M{x(left)} {y(b)}H{x(right)}M{x(a)} {y(bottom)}V{y(top)}", colour, 2))
        parts.append(dot(x(a), y(b), colour, 9) + label(f"{n + 1}", x(a), y(b) + 4, colour="#fff"))
        parts.append(label(f"{n + 1}  {name}", 500, 54 + 18 * n, "start", colour, limit=30))
    return svg(720, max(484, 60 + 18 * len(points)), parts)


def axis_by_tens(values: Iterable[float], start: int, end: int) -> tuple[Callable, list[float]]:
    values = list(values)
    low, high = 10 * math.floor(min(values) / 10), 10 * math.ceil(max(values) / 10)
    high = max(high, low + 10)
    return axis((low, high), start, end, (high - low) // 10 + 1)


def sunburst(names: list[tuple[str, int, Bars]], caption: str) -> str:
    """Each name as wide as it is frequent; in the outer ring its parts, which share that width."""
    total, start, parts = sum(count for _, count, _ in names), 0.0, [label(caption, 0, 4)]
    for n, (name, count, others) in enumerate(names):
        hue, turn, place = 360 * n // len(names), count / total, start
        parts.append(sector(start, turn, 160, f"hsl({hue},60%,70%)", name, f"{name}: {count:,}"))
        for other, k in others:
            part, tip = turn * k / sum(k for _, k in others), f"{name} {other}: {k:,}"
            parts.append(sector(place, part, 281, f"hsl({hue},60%,84%)", other, tip))
            place += part
        start += turn
    return svg(720, 720, ['<g transform="translate(360 360)">', *parts, "</g>"])


def sector(start: float, turn: float, radius: int, colour: str, name: str, tip: str) -> str:
    """Part of a ring around (0, 0): one dash of a dashed circle, 120 thick. 1 is a full turn."""
    around, middle = 2 * math.pi * radius, start + turn / 2
    dash = f'stroke-width="120" stroke-dasharray="{max(turn * around - 1, 0.3):.1f} {around:.1f}"'
    place = f'r="{radius}" fill="none" transform="rotate({360 * start - 90:.2f})"'
    ring = f'<circle {place} stroke="{colour}" {dash}><title>{clean(tip)}</title></circle>'
    if turn * around < 13:  # pixels: no room for a line of text
        return ring
    turned = f"rotate({360 * middle - 90:.1f}) translate({radius}) rotate({180 * (middle > 0.5)})"
    return f'{ring}<g transform="{turned}">{label(name, 0, 4, limit=18)}</g>'
