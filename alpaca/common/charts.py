"""Pictures as SVG, which every browser shows: no library, no script, nothing from elsewhere.

    line_chart(title, x_label, lines)        named lines over (x, y) points
    interval_chart(title, rows, start, end)  low, middle and high of each name: a leaderboard
    bar_chart(bars)                          labels and their counts
    sunburst(names, below)                   names in a ring, around each of them others

Names come from downloaded files and from models. `safe` is their one way into a picture: it escapes
what would be a tag, or would steer a terminal.

Shown by tests/test_charts.py: test_a_chart_is_well_formed_and_its_lines_stay_inside.
"""

import math
from collections.abc import Iterable
from html import escape
from itertools import chain

from alpaca.common.errors import escape_control

COLOURS = ("#1f6feb", "#d1570a", "#1a7f37", "#8250df", "#9a6700", "#57606a")
GRID = "#d0d7de"
FEW = 12  # points of a line that are shown as such
Bars = list[tuple[str, int]]


def svg(width: int, height: float, parts: Iterable[str]) -> str:
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    style = 'font-family="sans-serif" font-size="12" style="background:#fff"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{"".join(parts)}</svg>\n'


def words(text: str, most: int = 200, **how: object) -> str:
    """A line of text; `how` are its attributes, with _ for -."""
    text = text if len(text) <= most else text[: most - 1] + "…"
    told = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in how.items())
    return f"<text{told}>{safe(text)}</text>"


def safe(text: str) -> str:
    return escape(escape_control(text))


def heading(text: str, width: int) -> str:
    return words(text, x=width / 2, y=22, text_anchor="middle", font_size=15)


def span(values: Iterable[float]) -> tuple[float, float]:
    """From the least to the greatest; some room around a value alone."""
    values = list(values)
    alone = min(values) == max(values)
    return min(values) - alone, max(values) + alone


def line_chart(title: str, x_label: str, lines: dict[str, list[tuple[float, float]]]) -> str:
    """Points that are not finite are left out."""
    width, height, left, top, right, bottom = 720, 400, 64, 40, 16, 48
    finite = {
        name: [point for point in points if all(map(math.isfinite, point))]
        for name, points in lines.items()
    }
    xs, ys = zip(*(list(chain(*finite.values())) or [(0, 0)]), strict=True)
    (x0, x1), (y0, y1) = span(xs), span(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x0) / (x1 - x0) * (width - left - right)
        down = height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom)
        return round(across, 1), round(down, 1)

    parts = [heading(title, width)]
    parts.append(words(x_label, x=width / 2, y=height - 8, text_anchor="middle"))
    for step in range(6):  # five intervals of grid, with their figures
        x, y = x0 + (x1 - x0) * step / 5, y0 + (y1 - y0) * step / 5
        across, down = place(x, y)
        parts.append(f'<path d="M{left} {down}H{width - right}" stroke="{GRID}"/>')
        parts.append(words(f"{y:.4g}", x=left - 6, y=down + 4, text_anchor="end"))
        below = height - bottom + 18
        parts.append(words(f"{x:.4g}", x=across, y=below, text_anchor="middle"))
    for index, (name, points) in enumerate(finite.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join("{},{}".format(*place(x, y)) for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        few = points if len(points) < FEW else []  # what lies between them nobody has measured
        parts += [
            '<circle cx="{}" cy="{}" r="4" fill="{}"/>'.format(*place(*p), colour) for p in few
        ]
        corner = {"x": width - right - 4, "y": top + 14 + 16 * index}
        parts.append(words(name, **corner, fill=colour, text_anchor="end"))
    return svg(width, height, parts)


def interval_chart(
    title: str,
    rows: dict[str, dict[str, tuple[float, float, float]]],
    start: float,
    end: float,
) -> str:
    """Intervals (low, middle, high) between start and end, of the same kinds for each name."""
    kinds = next(iter(rows.values()))
    width, left, right, top, step = 720, 240, 16, 64, 22 + 6 * len(kinds)
    height = top + step * len(rows) + 32

    def across(x: float) -> float:
        return round(left + (x - start) / (end - start) * (width - left - right), 1)

    parts = [heading(title, width)]
    for tick in range(5):
        x = start + (end - start) * tick / 4
        parts.append(f'<path d="M{across(x)} {top - 8}V{height - 32}" stroke="{GRID}"/>')
        parts.append(words(f"{x:g}", x=across(x), y=height - 12, text_anchor="middle"))
    for place, (kind, colour) in enumerate(zip(kinds, COLOURS, strict=False)):
        parts.append(words(f"● {kind}", x=left + 160 * place, y=top - 20, fill=colour))
    for row, (name, intervals) in enumerate(rows.items()):
        middle = top + step * row + step / 2
        parts.append(words(name, 34, x=left - 12, y=middle + 4, text_anchor="end"))
        for place, (low, mid, high) in enumerate(intervals.values()):
            y, colour = middle + 10 * (place - (len(intervals) - 1) / 2), COLOURS[place]
            if math.isfinite(high - low):  # or nobody knows: no bar
                bar = f"M{across(low)} {y}H{across(high)}"
                parts.append(f'<path d="{bar}" stroke="{colour}" stroke-width="2"/>')
            parts.append(f'<circle cx="{across(mid)}" cy="{y}" r="4" fill="{colour}"/>')
    return svg(width, height, parts)


def bar_chart(bars: Bars) -> str:
    most, parts = max((count for _, count in bars), default=1), []
    for row, (label, count) in enumerate(bars):
        long, down = round(460 * count / most, 1), 18 * row
        parts.append(f'<rect x="80" y="{down + 2}" width="{long}" height="14" fill="#58e"/>')
        parts.append(words(label, x=70, y=down + 13, text_anchor="end"))
        parts.append(words(f"{count:,}", x=86 + long, y=down + 13))
    return svg(620, 18 * len(bars) + 4, parts)


def sunburst(names: list[tuple[str, int, Bars]], below: str) -> str:
    """Each name as wide as it is frequent; around it, sharing its width, what goes with it."""
    total, parts, start = sum(count for _, count, _ in names), [], 0.0
    for number, (name, count, others) in enumerate(names):
        hue, width, place = 360 * number // len(names), count / total, start
        for other, n in others:
            stop, told = place + width * n / sum(n for _, n in others), f"{name} {other}: {n:,}"
            parts.append(sector(place, stop, 215, 345, f"hsl({hue},60%,84%)", other, told))
            place = stop
        stop, told = start + width, f"{name}: {count:,}"
        parts.append(sector(start, stop, 100, 215, f"hsl({hue},60%,70%)", name, told))
        start = stop
    return svg(720, 720, [*parts, words(below, x=360, y=364, text_anchor="middle")])


def sector(
    start: float, stop: float, inner: int, outer: int, colour: str, name: str, told: str
) -> str:
    """Part of a ring, from one turn (0 is the top, 1 all around) to another, and its name."""
    stop = min(stop, start + 0.9999)  # an arc that ends where it began would be none

    def point(radius: float, turn: float) -> str:
        angle = 2 * math.pi * turn
        return f"{360 + radius * math.sin(angle):.1f} {360 - radius * math.cos(angle):.1f}"

    large, turn, middle = int(stop - start > 0.5), (start + stop) / 2, (inner + outer) / 2
    path = f"M{point(inner, start)}L{point(outer, start)}"
    path += f"A{outer} {outer} 0 {large} 1 {point(outer, stop)}L{point(inner, stop)}"
    path += f"A{inner} {inner} 0 {large} 0 {point(inner, start)}Z"
    part = f'<path d="{path}" fill="{colour}" stroke="#fff"><title>{safe(told)}</title></path>'
    if (stop - start) * 2 * math.pi * middle < 13:  # pixels: no room for a line of text
        return part
    place = f"translate({point(middle, turn)}) rotate({360 * turn + (90, -90)[turn < 0.5]:.1f})"
    return part + words(name, 18, transform=place, text_anchor="middle", dy=4)
