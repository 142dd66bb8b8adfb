"""Charts are well-formed XML for every input; their lines stay inside; no text escapes."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from alpaca.common import charts

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>&\x1b[2J"


def drawn(picture: str, colour: str) -> tuple[list[ET.Element], list[tuple[float, float]]]:
    """The lines of a colour, and the places of its markers."""
    paths = [*ET.fromstring(picture).iter(f"{SVG}path")]
    dots = [path.get("d") for path in paths if path.get("fill") == colour]
    return [path for path in paths if path.get("stroke") == colour], [place(dot) for dot in dots]


def place(path: str) -> tuple[float, float]:
    x, y = re.match(r"M([\d.]+)[ ,]([\d.]+)", path).groups()
    return float(x), float(y)


def test_line_chart_stays_inside_and_dots_few_points():
    points = [(step, 5 / (step + 1)) for step in range(19)] + [(20, math.nan)]
    lines = {"train": points, "other": [(0, 4.0), (9, 4.0)]}
    picture = charts.line_chart("loss", "step", lines, {"held out": [(0, 1.0), (18, 2.0)]})
    (train, _), dots = drawn(picture, charts.COLOURS[0])
    places = [tuple(map(float, p.split(","))) for p in train.get("d")[1:].split()]
    assert len(places) == 19 and not dots, "a long line has no dots, NaN is left out"
    (other, _), (_, *dots) = drawn(picture, charts.COLOURS[1])
    assert other.get("d") == "M" + " ".join(f"{x},{y}" for x, y in dots)
    lines, (_, *held_out) = drawn(picture, charts.COLOURS[2])
    assert not lines and len(held_out) == 2, "points are not connected"
    for x, y in places + dots + held_out:
        assert 64 <= x <= 704 and 84 <= y <= 384
    for series in ([(1, 1)], [(1, math.nan)], [(0, 1e300), (1, -1e300)], [(2**63, 0.0)]):
        ET.fromstring(charts.line_chart("odd", "step", {"a": series}))
    less, more = math.nextafter(1e-8, 0), math.nextafter(1e5, math.inf)
    for values in ((less, 1), (1, more), (less, 1e-8), (0, 1e-320)):  # rounded logarithms, no range
        ET.fromstring(charts.line_chart("odd", "step", {"a": [*enumerate(values)]}))


def test_line_chart_has_a_log_scale_if_positive_values_span_it():
    def is_log(*values: float) -> bool:
        return ", log scale" in charts.line_chart("loss", "step", {"a": [*enumerate(values)]})

    assert is_log(0.3, 8.0)
    assert not any((is_log(0.5, 8.0), is_log(-1.0, 8.0), is_log(0.0, 8.0), is_log()))


@pytest.mark.parametrize(
    ("values", "log", "marks"),
    [
        ((0, 675), False, [0, 100, 200, 300, 400, 500, 600, 700]),
        ((0.3, 0.6), False, [0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6]),
        ((-3, 5), False, [-4, -2, 0, 2, 4, 6]),
        ((4, 4), False, [2.5, 3, 3.5, 4, 4.5, 5, 5.5]),
        ((0.03, 8), True, [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]),
        ((0.001, 3000), True, [0.001, 0.01, 0.1, 1, 10, 100, 1000, 10_000]),
    ],
)
def test_axis_marks_round_values(values, log, marks):
    pixel, found = charts.axis(values, 100, 500, log=log)
    assert found == pytest.approx(marks) and (pixel(marks[0]), pixel(marks[-1])) == (100, 500)
    middle = math.sqrt(marks[0] * marks[-1]) if log else (marks[0] + marks[-1]) / 2
    assert pixel(middle) == 300


def test_interval_chart_draws_no_bar_without_bounds():
    kinds = {"plain": (10, 20, 30), "controlled": (math.nan, 25, math.nan)}
    picture = charts.interval_chart("rates", {"m" * 40: kinds}, 0, 100)
    (bar,), (_, (x, _)) = drawn(picture, charts.COLOURS[0])
    assert (bar.get("d").split()[0], x) == ("M286.4", 332.8)
    bars, (_, (x, _)) = drawn(picture, charts.COLOURS[1])
    assert not bars and x == 356.0 and f"{'m' * 33}…" in picture


def test_scatter_chart_draws_bars_along_both_axes():
    points = {"a": ((30, 45, 50), (41, 50, 59)), "b": ((70, 75, 80), (20, 25, 31))}
    picture = ET.fromstring(charts.scatter_chart("t", "x", "y", points))
    texts = ["".join(node.itertext()) for node in picture.iter(f"{SVG}text")]
    assert texts[3:9] == ["30", "40", "50", "60", "70", "80"] and texts[9:14] == [
        "20", "30", "40", "50", "60",
    ]  # fmt: skip
    bars = [path.get("d") for path in picture.iter(f"{SVG}path") if path.get("stroke-width") == "2"]
    across, up = (480 - 64) / 50, (432 - 40) / 40  # pixels of a unit
    places = re.findall(r"[\d.]+", bars[0])
    wanted = [64, 432 - 30 * up, 64 + 20 * across, 64 + 15 * across, 432 - 21 * up, 432 - 39 * up]
    assert [float(place) for place in places] == pytest.approx(wanted, abs=0.06)
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in picture.iter(f"{SVG}circle")]
    assert dots[1] == pytest.approx((64 + 45 * across, 432 - 5 * up), abs=0.06) and len(bars) == 2
    assert texts[-4:] == ["1", "1  a", "2", "2  b"]
    ET.fromstring(charts.scatter_chart("t", "x", "y", {"a": ((100,) * 3, (0,) * 3)}))


def test_sunburst_sectors_fill_both_rings():
    names = [("write", 3, [("poem", 2), ("essay", 1)]), ("give", 1, [])]
    rings = list(ET.fromstring(charts.sunburst(names, "4 of 4")).iter(f"{SVG}circle"))
    tips = [ring.find(f"{SVG}title").text for ring in rings]
    assert tips == ["write: 3", "write poem: 2", "write essay: 1", "give: 1"]
    assert [ring.get("transform") for ring in rings] == [
        "rotate(-90.00)", "rotate(-90.00)", "rotate(90.00)", "rotate(180.00)",
    ]  # fmt: skip
    for ring, share in zip(rings, (3 / 4, 2 / 4, 1 / 4, 1 / 4), strict=True):
        dash, around = map(float, ring.get("stroke-dasharray").split())
        assert dash == pytest.approx(share * around - 1, abs=0.2)
    narrow = charts.sunburst([("often", 999, []), ("rare", 1, [])], "")
    assert "often</text>" in narrow and "rare: 1</title>" in narrow and "rare</text>" not in narrow


@pytest.mark.parametrize(
    "picture",
    [
        charts.line_chart(HOSTILE, HOSTILE, {HOSTILE: [(0, 1), (1, 2)]}),
        charts.interval_chart(HOSTILE, {HOSTILE: {HOSTILE: (1, 2, 3)}}, 0, 4),
        charts.scatter_chart(HOSTILE, HOSTILE, HOSTILE, {HOSTILE: ((1, 2, 3), (1, 2, 3))}),
        charts.sunburst([(HOSTILE, 3, [(HOSTILE, 2)])], HOSTILE),
    ],
    ids=["line", "interval", "scatter", "sunburst"],
)
def test_hostile_names_are_escaped(picture):
    texts = ["".join(node.itertext()) for node in ET.fromstring(picture).iter(f"{SVG}text")]
    assert any("<script>&\\x1b[2J" in text for text in texts)
    assert "<script>" not in picture and "\x1b" not in picture


def test_label_cuts_long_text():
    assert f">{'y' * 34}</text>" in charts.label("y" * 34, 0, 0, limit=34)
    assert f">{'y' * 33}…</text>" in charts.label("y" * 35, 0, 0, limit=34)
