"""Charts as SVG text, which every browser shows: no library, no script, nothing to download.

    line_chart(title, x_label, lines, points)   named lines and points over an axis: losses
    interval_chart(title, rows, start, end)     (low, middle, high) of several kinds: a leaderboard
    scatter_chart(title, x_label, y_label, points)   intervals along two axes: style and capability
    sunburst(names, caption)                    a ring of names and a ring of their parts: diversity
    html_page(title, body)                      a page to put them on

Names come from downloaded files and from models, so every text is escaped. The colours, most of
them Okabe and Ito's, differ for the colour-blind, too, and stand out from white and from black;
dashes and shapes differ as well. In dark mode, the background is dark.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from html import escape

from alpaca.common.errors import escape_control

INK, FAINT = "currentColor", "#8886"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#767676", "#961ef0")
GREY = 4  # for what is no series
DASHES = ("none", "7 3", "2 3", "9 3 2 3")
MARKERS = ("m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "m-4-4h8v8h-8", "m0-5 5 9h-10", "m-5 0 5-5 5 5-5 5")
STYLE = """<style>svg { background: #fff; color: #1f2328 }
@media (prefers-color-scheme: dark) { svg { background: #0d1117; color: #e6edf3 }
[fill^="#"], [stroke^="#"] { filter: brightness(1.3) } .paper { fill: #0d1117 } }</style>"""
MAX_DOTS = 12  # a line of fewer points shows each
LOG_RANGE = 20  # positive values that differ by a larger factor get a logarithmic axis
NONE: Mapping = {}
Bars = list[tuple[str, int]]
Series = list[tuple[float, float]]


def svg(width: int, height: int, parts: Iterable[str]) -> str:
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    font = 'font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>{STYLE}{"".join(parts)}</svg>\n'


def html_page(title: str, body: str) -> str:
    """A page that loads nothing. `body` is HTML."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"/>
<meta name="color-scheme" content="light dark"/>
<style>
body {{ font-family: sans-serif; margin: 2em }}
table {{ border-collapse: collapse; margin-top: 2em }}
th, td {{ padding: .3em 1em; border-bottom: 1px solid #8888; text-align: left }}
td {{ white-space: nowrap }}
</style></head><body><h1>{title}</h1>
{body}</body></html>
"""


def clean(text: str) -> str:
    """Escape what would be a tag or would control a terminal."""
    return escape(escape_control(text))


def label(text: str, x: float, y: float, anchor="middle", colour=INK, limit=200, size=12) -> str:
    text = clean(text if len(text) <= limit else text[: limit - 1] + "…")
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text {place} fill="{colour}">{text}</text>'


def line(path: str, colour: str = FAINT, width: float = 1, dash: str = "none") -> str:
    how = f'stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dash}"'
    return f'<path d="{path}" fill="none" {how}/>'


def curve(n: int, places: Iterable[tuple[float, float]], width: float = 2) -> str:
    """In the n-th name's colour and dashes."""
    path = "M" + " ".join(f"{x},{y}" for x, y in places)
    return line(path, COLOURS[n % len(COLOURS)], width, DASHES[n % len(DASHES)])


def dot(x: float, y: float, colour: str, radius: int = 4) -> str:
    return f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{colour}"/>'


def marker(n: int, x: float, y: float) -> str:
    """In the n-th name's colour and shape."""
    return f'<path d="M{x} {y}{MARKERS[n % len(MARKERS)]}z" fill="{COLOURS[n % len(COLOURS)]}"/>'


def axis(
    values: Iterable[float], start: int, end: int, *, log: bool = False, tight: bool = False
) -> tuple[Callable, list[float]]:
    """The function from a value to its pixel between start and end, and round values to mark. The
    axis reaches from the first mark to the last, or if `tight` from the first value to the last."""
    values = list(values) or [0.0]
    low, high = min(values), max(values)
    if log:
        digits = (1, 2, 5) if high < 1e4 * low else (1,)
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        marks = [float(f"{digit}e{power}") for power in powers for digit in digits]
        first, last = max(m for m in marks if m <= low), min(m for m in marks if m >= high)
        marks = [mark for mark in marks if first <= mark <= last]
    else:
        flat = high - low <= 1e-9 * abs(high) + 1e-300
        margin = flat * (1 + abs(low) / 10)
        low, high = low - margin, high + margin
        size = 10.0 ** math.floor(math.log10(high - low))
        step = next(size / n for n in (5, 2, 1, 0.5) if n * (high - low) <= 7 * size)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        marks = [step * n for n in range(first, last + 1)]
    if not tight:
        low, high = marks[0], marks[-1]
    scale = math.log if log else float
    bottom, length = scale(low), scale(high) - scale(low)
    marks = [mark for mark in marks if low <= mark <= high]
    return lambda value: round(start + (scale(value) - bottom) / length * (end - start), 1), marks


def finite_points(named: Mapping[str, Series]) -> dict[str, Series]:
    """Without NaN and infinity; a name that has no other points is left out."""
    found = {n: [p for p in each if all(abs(v) < 1e300 for v in p)] for n, each in named.items()}
    return {name: points for name, points in found.items() if points}


def line_chart(
    title: str,
    x_label: str,
    lines: Mapping[str, Series],
    points: Mapping[str, Series] = NONE,
    thin: Mapping[str, Series] = NONE,
    ticks: Mapping[str, float] = NONE,
    strip: Mapping[str, Series] = NONE,
) -> str:
    """Lines, points and thin lines of one name share a colour. `ticks` mark places of the x axis.
    `strip` is a line below the others, with a scale of its own from 0 on."""
    lines, points, thin, strip = map(finite_points, (lines, points, thin, strip))
    names = list(dict.fromkeys((*lines, *points)))
    dots = {name: each for name, each in lines.items() if len(each) < MAX_DOTS} | points
    shown = [p for some in (lines, points, thin) for each in some.values() for p in each]
    values = [b for _, b in shown]
    log = 1e-9 < LOG_RANGE * min(values, default=0) < max(values, default=0)
    top = 48 + 18 * math.ceil(len(names) / 2)
    bottom, end = top + 300, top + 300 + 56 * len(strip)
    x, x_marks = axis((a for a, _ in shown), 64, 704, tight=True)
    y, y_marks = axis(values, bottom, top, log=log)
    parts = [label(title + ", log scale" * log, 360, 22, size=15), label(x_label, 360, end + 40)]
    parts += [line(f"M64 {y(mark)}H704") for mark in y_marks]
    parts += [label(f"{mark:g}", 58, y(mark) + 4, "end") for mark in y_marks]
    parts += [label(f"{mark:g}", x(mark), end + 18) for mark in x_marks]
    for text, a in ticks.items():
        parts += [line(f"M{x(a)} {bottom}v-8", INK), label(text, x(a), bottom - 12, size=10)]
    for some, width in ((thin, 0.5), (lines, 2)):
        for name, each in some.items():
            parts.append(curve(names.index(name), ((x(a), y(b)) for a, b in each), width))
    for n, name in enumerate(names):
        left, height = 64 + 320 * (n % 2), 44 + 18 * (n // 2)
        parts += [curve(n, [(left, height), (left + 32, height)])] if name in lines else []
        parts += [marker(n, left + 16, height)] if name in dots else []
        parts += [marker(n, x(a), y(b)) for a, b in dots.get(name, ())]
        parts.append(label(name, left + 40, height + 4, "start", limit=40))
    for name, each in strip.items():
        z, (*_, highest) = axis((0, *(b for _, b in each)), end, end - 32)
        parts += [curve(GREY, ((x(a), z(b)) for a, b in each)), label(name, 700, end - 24, "end")]
        parts += [line(f"M64 {end}H704"), label("0", 58, end + 4, "end")]
        parts.append(label(f"{highest:g}", 58, end - 28, "end"))
    return svg(720, end + 52, parts)


def interval_chart(title: str, rows: dict[str, dict[str, tuple]], start: float, end: float) -> str:
    """Name → kind → (low, middle, high). A name may lack a kind."""
    kinds = list(dict.fromkeys(kind for intervals in rows.values() for kind in intervals))
    step = 22 + 6 * len(kinds)
    bottom, (x, marks) = 64 + step * len(rows), axis((start, end), 240, 704)
    parts = [label(title, 360, 22, size=15)]
    parts += [line(f"M{x(mark)} 56V{bottom}") for mark in marks]
    parts += [label(f"{mark:g}", x(mark), bottom + 20) for mark in marks]
    for n, kind in enumerate(kinds):
        parts += [marker(n, 246 + 160 * n, 40), label(kind, 256 + 160 * n, 44, "start")]
        for row, (name, intervals) in enumerate(rows.items()):
            centre = 64 + step * (row + 0.5)
            y = centre + 10 * n - 5 * (len(kinds) - 1)
            parts += [label(name, 228, centre + 4, "end", limit=34)] if n == 0 else []
            if kind not in intervals:
                continue
            low, middle, high = intervals[kind]
            if math.isfinite(high - low):  # else the bounds are unknown: only the middle
                parts.append(line(f"M{x(low)} {y}H{x(high)}", COLOURS[n % len(COLOURS)], 2))
            parts.append(marker(n, x(middle), y))
    return svg(720, bottom + 32, parts)


def scatter_chart(
    title: str, x_label: str, y_label: str, points: dict[str, tuple[tuple, tuple]]
) -> str:
    """Name → (low, middle, high) on either axis: a numbered dot with two bars."""
    x, x_marks = axis((value for across, _ in points.values() for value in across), 64, 480)
    y, y_marks = axis((value for _, up in points.values() for value in up), 432, 40)
    parts = [label(title, 360, 22, size=15), label(x_label, 272, 470, limit=90)]
    upwards = label(y_label, 0, 0, limit=60)
    parts.append(f'<g transform="translate(20 236) rotate(-90)">{upwards}</g>')
    parts += [line(f"M{x(mark)} 40V432") + label(f"{mark:g}", x(mark), 450) for mark in x_marks]
    parts += [line(f"M64 {y(mark)}H480") for mark in y_marks]
    parts += [label(f"{mark:g}", 58, y(mark) + 4, "end") for mark in y_marks]
    for n, (name, (across, up)) in enumerate(points.items()):
        colour, (left, a, right), (bottom, b, top) = COLOURS[n % len(COLOURS)], across, up
        parts.append(line(f"M{x(left)} {y(b)}H{x(right)}M{x(a)} {y(bottom)}V{y(top)}", colour, 2))
        parts.append(dot(x(a), y(b), colour, 9) + label(f"{n + 1}", x(a), y(b) + 4, colour="#fff"))
        parts.append(label(f"{n + 1}  {name}", 500, 54 + 18 * n, "start", limit=30))
    return svg(720, max(484, 60 + 18 * len(points)), parts)


def sunburst(names: list[tuple[str, int, Bars]], caption: str) -> str:
    """Each name as wide as it is frequent; in the outer ring its parts, which share that width."""
    total, start, parts = sum(count for _, count, _ in names), 0.0, [label(caption, 0, 4)]
    for n, (name, count, others) in enumerate(names):
        colour, turn, place = COLOURS[n % len(COLOURS)], count / total, start
        parts.append(sector(start, turn, 160, f"{colour}a0", name, f"{name}: {count:,}"))
        for other, k in others:
            part, tip = turn * k / sum(k for _, k in others), f"{name} {other}: {k:,}"
            parts.append(sector(place, part, 281, f"{colour}60", other, tip))
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
