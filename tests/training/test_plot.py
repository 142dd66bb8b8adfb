"""`alpaca plot`: pictures and tables of runs that train, have trained, or are none."""

import csv
import json
import xml.etree.ElementTree as ET

import pytest
from helpers.commands import assert_refused

from alpaca.common.charts import COLOURS
from alpaca.training.plot import compare_runs, plot_run, round_starts, smoothed

STEPS = [
    {"step": n, "epoch": n * 0.2, "loss": 8 / n, "lr": 1e-3, "tokens": 9, "tokens_per_s": 9}
    for n in range(1, 13)
]
RUN = [{"step": 0, "held_out_loss": 9.0}, *STEPS, {"step": 12, "held_out_loss": 1.5}]


@pytest.fixture
def write_run(tmp_path):
    def write(name: str, records=RUN, torn: str = ""):
        (tmp_path / name).mkdir(parents=True)
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / name / "metrics.jsonl").write_text(lines + torn)
        return tmp_path / name

    return write


def texts(picture: str) -> list[str | None]:
    return [node.text for node in ET.fromstring(picture).iter() if node.tag.endswith("text")]


def test_smoothed_is_the_mean_over_neighbours():
    points = [(n, float(n % 2)) for n in range(50)]  # two on either side
    means = [0, 1 / 3, *[2 / 5, 3 / 5] * 23, 1 / 2, 2 / 3]
    assert smoothed(points) == [(n, pytest.approx(mean)) for n, mean in enumerate(means)]
    assert smoothed(points[:24]) == points[:24] and smoothed([]) == []


def test_picture_of_a_run_has_held_out_points_rate_and_rounds():
    picture = plot_run(RUN, "loss")
    names = ["Loss", "training", "held out", "epoch 2", "epoch 3", "learning rate", "0.001"]
    assert set(names) <= {*texts(picture)}
    (steps,) = (x for x in ET.fromstring(picture).iter() if x.get("stroke-width") == "0.5")
    assert len(steps.get("d", "").split()) == 12 and steps.get("stroke") == COLOURS[0]
    rounds = {f"epoch {n + 1}": pytest.approx(5 * n) for n in range(1, 3)}
    assert round_starts(RUN) == rounds, "twelve steps of a fifth of an epoch"
    many = [{"step": 1, "epoch": 0.5}, {"step": 2000, "epoch": 1000}]
    assert list(round_starts(many)) == [f"epoch {n}01" for n in range(1, 10)]
    plain = texts(plot_run([{"step": 1, "loss": 1.0}], "loss"))
    assert "held out" not in plain and "epoch 2" not in plain, "logged by an older version"
    both = texts(compare_runs({"one": RUN, "<b>": STEPS}, "loss"))
    assert {"one", "<b>"} <= {*both} and "learning rate" not in both


def test_runs_are_named_by_their_folders(command, write_run, tmp_path):
    first, second, other = write_run("a/dpo"), write_run("b/dpo", torn='{"st'), write_run("b/group")
    out = tmp_path / "all.svg"
    assert command("plot", second, other, "--out", out) == (0, f"wrote {out}\n", "")
    assert texts(out.read_text())[-2:] == ["dpo", "group"]
    command("plot", first, second, "--out", out)
    assert texts(out.read_text())[-2:] == ["a/dpo", "b/dpo"]


def test_csv_has_a_line_for_each_step(command, write_run, tmp_path):
    names = ("--out", tmp_path / "a.svg", "--csv", tmp_path / "a.csv")
    assert command("plot", write_run("one"), write_run("two", STEPS), *names)[0] == 0
    with open(tmp_path / "a.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(r["run"], r["step"]) for r in lines] == [
        *(("one", str(n)) for n in range(13)),
        *(("two", str(n)) for n in range(1, 13)),
    ]
    for line, record in zip(lines[1:13], STEPS, strict=True):
        assert {name: float(line[name]) for name in record} == record
    assert [lines[n]["held_out_loss"] for n in (0, 1, 12, 24)] == ["9.0", "", "1.5", ""]


def test_rewards_are_plotted_if_all_runs_have_them(command, write_run, tmp_path):
    rewards = [{**record, "reward": 0.5} for record in STEPS]
    run, out = write_run("group", rewards), tmp_path / "p.svg"
    command("plot", run, "--out", out)
    assert texts(out.read_text())[0] == "Reward"
    command("plot", run, write_run("sft"), "--out", out)
    assert texts(out.read_text())[0].startswith("Loss")


def test_what_is_no_run_is_refused(command, write_run, tmp_path):
    out = ("--out", tmp_path / "p.svg")
    for records in ([], RUN[:1]):
        folder = write_run(f"new{len(records)}", records)
        assert_refused(command("plot", folder, *out), f"{folder}: no step in a metrics.jsonl")
    assert_refused(command("plot", tmp_path / "none", *out), "none: no step in a metrics.jsonl")
    odd = write_run("odd", [{**STEPS[0], "lr": "x"}])
    assert_refused(command("plot", odd, *out), "metrics.jsonl: lr is", "a number was expected")
    odd = write_run("cut", [{"step": 1, "loss": 2.0}])
    assert_refused(command("plot", odd, *out), "metrics.jsonl: tokens is missing")
    run = write_run("run")
    assert_refused(command("plot", run, "--out", run / "metrics.jsonl"), "is an input")
    assert_refused(command("plot", run, *out, "--csv", run / "metrics.jsonl"), "is an input")
    assert_refused(command("plot", run, *out, "--csv", out[1]), "--out and --csv are both")
    assert not (tmp_path / "p.svg").exists()
