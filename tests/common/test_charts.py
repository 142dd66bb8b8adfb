"""Charts are well-formed XML for every input; their lines stay inside; no text escapes."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from alpaca.common import charts

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>&\x1b[2J"


def test_line_chart_stays_inside_and_dots_few_points():
    points = [(step, 5 / (step + 1)) for step in range(20)] + [(20, math.nan)]
    lines = {"train": points, "held out": [(0, 4.0), (9, 4.0)]}
    picture = ET.fromstring(charts.line_chart("loss", "step", lines))
    train, held_out = (line.get("points").split() for line in picture.iter(f"{SVG}polyline"))
    dots = [f"{dot.get('cx')},{dot.get('cy')}" for dot in picture.iter(f"{SVG}circle")]
    assert dots == held_out and len(train) == 20
    for x, y in (map(float, point.split(",")) for point in train + held_out):
        assert 64 <= x <= 704 and 40 <= y <= 352
    ET.fromstring(charts.line_chart("one point", "step", {"a": [(1, 1)]}))
    ET.fromstring(charts.line_chart("no point yet", "step", {"a": [(1, math.nan)]}))


def test_interval_chart_draws_no_bar_without_bounds():
    kinds = {"plain": (10, 20, 30), "controlled": (math.nan, 25, math.nan)}
    picture = ET.fromstring(charts.interval_chart("rates", {"m" * 40: kinds}, 0, 100))
    bars = [path for path in picture.iter(f"{SVG}path") if path.get("stroke-width") == "2"]
    assert [bar.get("d").split()[0] for bar in bars] == ["M286.4"]
    assert [dot.get("cx") for dot in picture.iter(f"{SVG}circle")] == ["332.8", "356.0"]
    assert f"{'m' * 33}…" in picture.itertext()


def test_scatter_chart_draws_bars_along_both_axes():
    points = {"a": ((30, 45, 50), (41, 50, 59)), "b": ((70, 75, 80), (20, 25, 31))}
    picture = ET.fromstring(charts.scatter_chart("t", "x", "y", points))
    texts = list(picture.itertext())
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
