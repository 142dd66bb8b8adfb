"""Pictures are well-formed, whatever they are of, and their lines stay inside."""

import math
import xml.etree.ElementTree as ET

import pytest

from alpaca.common import charts

SPACE = "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>&\x1b[2J"


def test_a_chart_is_well_formed_and_its_lines_stay_inside():
    points = [(step, 5 / (step + 1)) for step in range(20)] + [(20, math.nan)]
    lines = {"train": points, "held out": [(0, 4.0), (9, 4.0)]}
    picture = ET.fromstring(charts.line_chart("loss", "step", lines))
    drawn, dots = (picture.findall(SPACE + shape) for shape in ("polyline", "circle"))
    assert len(drawn) == 2
    few = [f"{dot.get('cx')},{dot.get('cy')}" for dot in dots]
    assert few == drawn[1].get("points").split(), "two measurements are shown as two"
    for line in drawn:
        for point in line.get("points").split():
            x, y = map(float, point.split(","))
            assert 64 <= x <= 704 and 40 <= y <= 352
    assert len(drawn[0].get("points").split()) == 20
    ET.fromstring(charts.line_chart("one point", "step", {"a": [(1, 1)]}))
    ET.fromstring(charts.line_chart("nothing yet", "step", {"a": [(1, math.nan)]}))


@pytest.mark.parametrize(
    "picture",
    [
        charts.line_chart(HOSTILE, HOSTILE, {HOSTILE: [(0, 1), (1, 2)]}),
        charts.interval_chart(HOSTILE, {HOSTILE: {HOSTILE: (1, 2, 3)}}, 0, 4),
        charts.bar_chart([(HOSTILE, 7)]),
        charts.sunburst([(HOSTILE, 3, [(HOSTILE, 2)])], HOSTILE),
    ],
    ids=["line", "interval", "bar", "sunburst"],
)
def test_a_name_is_no_tag_and_steers_nothing(picture):
    texts = ["".join(node.itertext()) for node in ET.fromstring(picture).iter(f"{SPACE}text")]
    assert any("<script>&\\x1b[2J" in text for text in texts)
    assert "<script>" not in picture and "\x1b" not in picture


def test_a_long_name_is_cut():
    assert charts.words("y" * 34, 34) == f"<text>{'y' * 34}</text>"
    assert charts.words("y" * 35, 34, font_size=9) == f'<text font-size="9">{"y" * 33}…</text>'
