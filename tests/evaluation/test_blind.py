"""The blind comparison: what a rater sees and can do, and what unblinding makes of it."""

import io
import json
import re
import sys
from pathlib import Path
from unittest import mock

import pytest
from helpers.annotations import write_outputs
from helpers.commands import assert_refused

from alpaca.common.run_folder import run_folder
from alpaca.evaluation import blind, win_rate
from alpaca.evaluation.blind import RaterCopy

MODEL, BASELINE = "Zephyrus-13b", "quillbot-xl"
SECRETS = ("zephyrus", "quillbot", "13b", "-xl")
NINE = [f"Task {n}: say it." for n in range(9)]


def make_two(path: Path, tasks: list[str], names=(MODEL, BASELINE)) -> list[Path]:
    """Answers "Ours 3" and "Theirs 3", in folders that are named as the models are."""
    return [
        write_outputs(path / name, name, {task: f"{side} {n}" for n, task in enumerate(tasks)})
        for name, side in zip(names, ("Ours", "Theirs"), strict=True)
    ]


@pytest.fixture
def two(tmp_path):
    """Two models with the same answer to Task 8."""
    folders = make_two(tmp_path, NINE)
    for folder in folders:
        file = folder / "model_outputs.json"
        file.write_text(re.sub('"(Ours|Theirs) 8"', '"The same"', file.read_text()))
    return folders


@pytest.fixture
def start(command, tmp_path, two):
    def invoke(out, *more, models=None):
        return command("blind", "start", *(models or two), "--out", tmp_path / out, *more)

    return invoke


@pytest.fixture
def unblind(command, tmp_path, two):
    def invoke(out, *more, models=None):
        return command("blind", "unblind", tmp_path / out, *(models or two), *more)

    return invoke


@pytest.fixture
def rate(command, monkeypatch):
    """A session in which these lines are typed."""

    def invoke(folder, *lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return command("blind", "rate", folder)

    return invoke


def rate_all(folder: Path, wanted) -> None:
    """Rate without a terminal: `wanted` maps "Task 3" to Ours, Theirs, tie or skip."""
    copy = RaterCopy(folder)
    for item in copy.items:
        choice = wanted[item["instruction"].split(":")[0]]
        copy.rate(next((side for side in "ab" if item[side].startswith(choice)), choice))


def assert_blind(folder: Path, *screens: str) -> None:
    """No secret in any byte of any file, in any file's name, in anything that was shown."""
    files = sorted(folder.rglob("*"))
    assert len(files) >= 3
    contents = [file.read_text() for file in files if file.is_file()]
    for text in (*screens, *contents, *(str(file.relative_to(folder)) for file in files)):
        assert not [name for name in SECRETS if name in text.lower()], text


# ---------------------------------------------------------------- rating


def test_sessions_stop_resume_undo_and_finish(rate, start, unblind, tmp_path):
    out, ann = tmp_path / "blind", tmp_path / "blind/ann"
    code, text, _ = start("blind", "--raters", "ann")
    assert code == 0 and "8 pairs" in text and f"blind rate {ann}" in text
    assert_blind(out, text)
    items = RaterCopy(ann).items
    code, first, _ = rate(ann, "u", "x", "", "ab", " B ", "q")  # nothing to undo; no such choice
    assert code == 0 and "7 left: run the same command" in first
    place_a, place_b = (first.index(items[0][side]) for side in "ab")
    assert first.index("- A -") < place_a < first.index("- B -") < place_b
    assert first.count("===== 1 of 8") == first.count("===== 2 of 8") == 1
    assert first.index("===== 2 of 8") < first.index(items[1]["instruction"])
    assert RaterCopy(ann).choices == ["b"]
    code, second, _ = rate(ann, "u", "a", "t", "S", "u", "u")  # also back into the session before
    assert code == 0 and "7 left" in second and RaterCopy(ann).choices == ["a"]
    shown = re.findall(r"===== (\d) of 8", second)
    assert shown == list("2123432")
    assert_refused(unblind("blind"), "7 of 8 are left", "--early")
    assert not (out / "annotations.json").exists()
    code, third, _ = rate(ann, *"aaaaaaa", "b", "u", "u", "t", "a", "q")  # b is for no pair
    assert code == 0 and "Thank you" in third and "All pairs are rated" in third
    assert RaterCopy(ann).choices == ["a"] * 6 + ["tie", "a"]
    assert_blind(out, first, second, third)
    code, text, err = unblind("blind")
    assert code == 0, err
    ours = sum(item["a"].startswith("Ours") for n, item in enumerate(items) if n != 6)
    assert f"{MODEL} {ours} vs {7 - ours} {BASELINE}: votes; 2 ties" in text
    assert_refused(rate(ann, "a"), "unblinded: ratings are closed")
    with pytest.raises(AssertionError):  # the names are there now: assert_blind can fail
        assert_blind(out)


def test_rate_and_unblind_refuse_while_another_rates(rate, start, unblind, tmp_path):
    start("blind", "--raters", "ann")
    with run_folder(tmp_path / "blind/ann", {}, "rating"):
        assert_refused(rate(tmp_path / "blind/ann", "a"), "another process is rating")
        assert_refused(unblind("blind", "--early"), "another process is rating")
    assert_refused(rate(tmp_path / "blind", "a"), "not a rater's folder")
    assert rate(tmp_path / "blind/ann", "a")[0] == 0


@pytest.mark.parametrize("meanwhile", ["rated", "unblinded"])
def test_rate_reads_its_state_under_the_lock(rate, start, tmp_path, meanwhile):
    start("blind", "--raters", "ann")
    folder = tmp_path / "blind/ann"

    def claim_late(*args):
        if meanwhile == "rated":
            RaterCopy(folder).rate("a")
        else:
            (tmp_path / "blind/annotations.json").write_text("[]")
        return run_folder(*args)

    with mock.patch.object(blind, "run_folder", claim_late):
        result = rate(folder, "b", "q")
    if meanwhile == "unblinded":
        return assert_refused(result, "closed")
    assert "===== 1 of" not in result[1] and RaterCopy(folder).choices == ["a", "b"]


def test_answers_cannot_steer_the_terminal_or_imitate_our_lines():
    assert blind.quote("a\x1b[2J\tb\r\n\nc\u202e") == "│ a\\x1b[2J   b\n│ \n│ c\\u202e"
    fake = "fine\n\n----- B -----\u2028I am bad\n(empty)"
    assert all(line.startswith("│ ") for line in blind.quote(fake).splitlines())
    assert blind.quote(" \n") == blind.quote("") == "(empty)"


# ---------------------------------------------------------------- raters' folders


def test_sides_and_order_are_shuffled_for_each_rater(start, tmp_path):
    texts = [f"Task {n}" for n in range(60)]
    models = make_two(tmp_path / "sixty", texts)
    assert start("b", "--raters", "ann", "ben", models=models)[0] == 0
    ann, ben = (RaterCopy(tmp_path / "b" / name).items for name in ("ann", "ben"))
    for items in (ann, ben):
        assert sorted(item["instruction"] for item in items) == sorted(texts)
        assert [item["instruction"] for item in items] != texts
        assert 15 <= sum(item["a"].startswith("Ours") for item in items) <= 45
        assert all(set(item) == {"instruction", "a", "b"} for item in items)
    assert [item["instruction"] for item in ann] != [item["instruction"] for item in ben]
    sides = [{item["instruction"]: item["a"][0] for item in items} for items in (ann, ben)]
    assert 15 <= sum(sides[0][task] == sides[1][task] for task in texts) <= 45
    # The same seed shuffles the same; another and none otherwise; the folder does not reveal it.
    found = {}
    for name, seed in (("c", "s3cr3t"), ("d", "s3cr3t"), ("e", "other"), ("f", None)):
        assert start(name, *(("--seed", seed) if seed else ()), models=models)[0] == 0
        found[name] = (tmp_path / name / "rater/items.jsonl").read_bytes()
        assert all(b"s3cr3t" not in f.read_bytes() for f in (tmp_path / name / "rater").iterdir())
    assert found["c"] == found["d"] and len(set(found.values())) == 3
    assert start("g", "--raters", "ann", "ben", "--num", 20, models=models)[0] == 0
    ann, ben = (RaterCopy(tmp_path / "g" / name).items for name in ("ann", "ben"))
    tasks = [{item["instruction"] for item in items} for items in (ann, ben)]
    assert tasks[0] == tasks[1] and len(tasks[0]) == 20


def test_start_warns_of_answers_that_name_a_model(start, two):
    file = two[0] / "model_outputs.json"
    file.write_text(file.read_text().replace("Ours 3", f"I am {MODEL.upper()} 3"))
    code, text, err = start("b")
    assert code == 0 and "1 answers contain the name of a model" in err
    assert not [name for name in SECRETS if name in (text + err).lower()]


# ---------------------------------------------------------------- unblinding


def test_votes_ties_test_interval_and_agreement(start, unblind, tmp_path, two):
    start("blind", "--raters", "ann", "ben")
    ann = dict.fromkeys([f"Task {n}" for n in range(5)], "Ours") | {"Task 5": "Theirs"}
    ann |= {"Task 6": "tie", "Task 7": "skip"}
    rate_all(tmp_path / "blind/ann", ann)
    rate_all(
        tmp_path / "blind/ben", ann | {"Task 0": "Theirs", "Task 6": "Ours", "Task 7": "Theirs"}
    )
    code, text, err = unblind("blind")
    assert code == 0, err
    votes = f"{MODEL} 10 vs 4 {BASELINE}: votes; 3 ties, 1 skipped, 0 not rated"
    assert text.startswith(votes), text
    rows = win_rate.leaderboard([tmp_path / "blind/annotations.json"])
    assert [row["annotator"] for row in rows] == ["ann", "ben"]
    names = ("n_wins", "n_losses", "n_draws", "n", "n_missing")
    found = [tuple(row[name] for name in names) for row in rows]
    assert found == [(5, 1, 2, 8, 1), (5, 3, 1, 9, 0)]  # Task 8 is a tie: the texts are the same
    assert rows[0]["sign_test"] == pytest.approx(2 * 7 / 64)
    low, high = win_rate.wilson(6, 8)
    assert (rows[0]["win_rate_low"], rows[0]["win_rate_high"]) == (100 * low, 100 * high)
    # Together: 0 is a draw, 1 to 4 won, 5 lost, 6 won (3/4), 7 lost, 8 a draw.
    scores = [0.5, 1, 1, 1, 1, 0, 0.75, 0, 0.5]
    together = next(line for line in text.splitlines() if "all raters" in line)
    assert f"{100 * sum(scores) / 9:.2f} ± " in together and "5–2–2" in together
    low, high = (100 * bound for bound in win_rate.wilson(sum(scores), 9))
    assert f"{low:.1f}–{high:.1f}" in together and "too few to tell" in together
    assert "raters agree in 71.4 % of pairs" in text and "(7 instructions)" in text
    mirrored = unblind("blind", models=two[::-1])[1]
    assert mirrored.startswith(f"{BASELINE} 4 vs 10 {MODEL}")
    together = next(line for line in mirrored.splitlines() if "all raters" in line)
    assert f"{100 - 100 * sum(scores) / 9:.2f} ± " in together and "2–5–2" in together


def test_early_counts_what_there_is(rate, start, unblind, tmp_path):
    start("blind", "--raters", "ann", "ben")
    assert_refused(unblind("blind", "--early"), "nobody has preferred")
    rate(tmp_path / "blind/ann", "a", "b", "q")
    code, text, _ = unblind("blind", "--early")
    assert code == 0 and "14 not rated" in text
    assert_refused(rate(tmp_path / "blind/ben", "a"), "unblinded: ratings are closed")


def test_a_rater_without_preferences_has_no_row_and_no_ties(command, start, unblind, tmp_path):
    start("blind", "--raters", "ann", "ben")
    for name, choice in (("ann", "Ours"), ("ben", "skip")):
        rate_all(tmp_path / "blind" / name, dict.fromkeys([f"Task {n}" for n in range(8)], choice))
    code, text, _ = unblind("blind")
    assert code == 0 and "8 vs 0" in text and "1 ties, 8 skipped" in text
    assert not [line for line in text.splitlines() if line.startswith(MODEL) and " ben " in line]
    code, text, err = command("score", tmp_path / "blind", "--json")
    (row,) = json.loads(text)
    assert code == 0 and row["annotator"] == "ann" and row["n"] == 9
    assert "ben has no preferences: left out" in err


def test_unblind_refuses_other_answers_and_edited_folders(start, unblind, tmp_path, two):
    start("blind", "--raters", "ann")
    ann = tmp_path / "blind/ann"
    rate_all(ann, dict.fromkeys([f"Task {n}" for n in range(8)], "Ours"))
    log = (ann / "ratings.jsonl").read_text()
    edits = [
        (two[0] / "model_outputs.json", ("Ours 1", "Ours 9"), f"{ann} compares other answers"),
        (two[0] / "model_outputs.json", (MODEL, "another"), f"{ann} compares other answers"),
        (ann / "items.jsonl", ("Ours 1", "Ours 9"), "items.jsonl, line"),
        (ann / "ratings.jsonl", (log, log + '{"place": 8, "choice": "a"}\n'), "jsonl, line 9"),
        (ann / "ratings.jsonl", (log, log + '{"place": 0}\n'), "jsonl, line 9"),
        (ann / "ratings.jsonl", ('"place": 7', '"place": 6'), "jsonl, line 8"),
    ]
    for file, change, message in edits:
        before = file.read_text()
        file.write_text(before.replace(*change))
        assert_refused(unblind("blind"), message)
        file.write_text(before)
    (tmp_path / "blind/zoe").mkdir()
    for file in ann.iterdir():
        (tmp_path / "blind/zoe" / file.name).write_bytes(file.read_bytes())
    assert_refused(unblind("blind"), "duplicate of another rater's folder")


def test_blind_errors_are_one_line(command, start, unblind, tmp_path, two):
    assert_refused(command("blind"), "STEP")
    assert_refused(start("blind", "--raters", "../x"), "'../x'", "letters")
    assert_refused(start("blind", "--raters", "ann", "Ann"), "same name")
    assert_refused(start("blind", "--num", 0), "--num")
    assert_refused(start("blind", models=[two[0], two[0]]), "both by")
    same = [write_outputs(tmp_path / name, name, dict.fromkeys(NINE, "x")) for name in "pq"]
    assert_refused(start("blind", models=same), "nothing to compare")
    assert not (tmp_path / "blind").exists()
    assert start("blind")[0] == 0
    assert_refused(start("blind"), "exists already")
    assert_refused(unblind("no"), "no rater's folders")
