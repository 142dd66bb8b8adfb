"""The blind comparison at a real terminal; what a copy holds; what unblinding makes of it."""

import json
import os
import pty
import random
import re
import select
import signal
import sys
import termios
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from unittest import mock

import pytest
from helpers.commands import assert_refused

from alpaca.common.errors import run_command
from alpaca.common.files import claim_run_folder
from alpaca.evaluation import blind, evaluate, win_rate
from alpaca.evaluation.blind import Copy

MODEL, BASELINE = "Zephyrus-13b", "quillbot-xl"
SECRETS = (b"zephyrus", b"quillbot", b"13b", b"-xl")


def write(folder: Path, name: str, texts: dict[str, str]) -> Path:
    """In a folder that is called as the model is."""
    folder.mkdir()
    lines = [
        {"instruction": task, "output": text, "generator": name, "dataset": "d"}
        for task, text in texts.items()
    ]
    (folder / "model_outputs.json").write_text(json.dumps(lines))
    return folder


@pytest.fixture
def two(tmp_path):
    ours = {f"Task {n}: say it.": f"Ours, {n} times" for n in range(9)}
    theirs = {task: f"Theirs are {n}" for n, task in enumerate(ours)}
    ours["Task 8: say it."] = theirs["Task 8: say it."] = "The same"
    return write(tmp_path / MODEL, MODEL, ours), write(tmp_path / BASELINE, BASELINE, theirs)


def start(command, two, out, *more):
    return command(evaluate, "blind", "start", *two, "--out", out, *more)


def unblind(command, folder, two, *more):
    return command(evaluate, "blind", "unblind", folder, *two, *more)


def rated(folder: Path, wanted: dict[str, str]) -> None:
    """Rate without a terminal: "Ours", "Theirs", "tie" or "skip" for the beginnings of tasks."""
    copy = Copy(folder)
    for place, item in enumerate(copy.items):
        choice = wanted.get(item["instruction"].split(":")[0])
        if choice in ("Ours", "Theirs"):
            choice = next(side for side in "ab" if item[side].startswith(choice))
        if choice:
            copy.say(place, choice)


class Terminal:
    """`blind rate` at a pseudo-terminal, in a process that has all imports behind it; what it
    showed is in `seen`."""

    def __init__(self, folder: Path):
        self.pid, self.screen = pty.fork()
        if self.pid == 0:
            sys.stdin = os.fdopen(0)  # pytest has put its own there
            sys.stdout = sys.stderr = os.fdopen(1, "w")
            signal.signal(signal.SIGINT, signal.default_int_handler)  # also in a background
            sys.argv = ["evaluate.py", "blind", "rate", str(folder)]
            code = 1
            try:
                run_command(evaluate.main)
                code = 0
            except SystemExit as exit_:
                code = exit_.code
            finally:
                with suppress(OSError):
                    sys.stdout.flush()
                os._exit(code)
        self.seen, self.code = "", None

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *exception) -> None:
        if self.code is None:
            self.kill(signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.screen)

    def waits_for_enter(self) -> bool:
        """As a terminal does, and shows what is typed: rating has it otherwise."""
        flags = termios.tcgetattr(self.screen)[3]
        return bool(flags & termios.ICANON and flags & termios.ECHO)

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait_for(self, wanted: str, after: int = 0) -> None:
        until = time.monotonic() + 60
        while wanted not in self.seen[after:]:
            left = max(0, until - time.monotonic())
            assert select.select([self.screen], [], [], left)[0], self.seen
            self.seen += os.read(self.screen, 65536).decode(errors="replace")

    def prompted(self, place: int, of: int = 8) -> None:
        """Wait until pair `place` (from 1) is the last thing shown, and its prompt."""
        self.wait_for(f"===== {place} of {of} =====")
        self.wait_for("q: stop > ", self.seen.rindex(f"===== {place} of {of} ====="))

    def press(self, keys: str) -> None:
        self.shown_before = len(self.seen)
        os.write(self.screen, keys.encode())

    def then(self, place: int) -> None:
        """Wait for pair `place` to be shown after the last key."""
        self.wait_for(f"===== {place} of 8 =====", self.shown_before)
        self.wait_for("q: stop > ", self.seen.index(f"===== {place} of", self.shown_before))

    def interrupt(self) -> None:
        """Ctrl-C. A signal just before the process begins to wait is heard at the next key only:
        again, then."""
        for _ in range(30):
            time.sleep(0.5)
            self.kill(signal.SIGINT)
            if select.select([self.screen], [], [], 2)[0]:
                return

    def end(self) -> int:
        """Its exit code; what it still has to show is read first, or it could not end."""
        with suppress(OSError):  # the other end is closed
            while True:
                assert select.select([self.screen], [], [], 60)[0], self.seen
                self.seen += os.read(self.screen, 65536).decode(errors="replace")
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code


def assert_blind(folder: Path, *shown: str) -> None:
    """No name in any byte of any file, in any file's name, in anything that was shown."""
    files = sorted(folder.rglob("*"))
    assert len(files) >= 3
    for file in files:
        told = str(file.relative_to(folder)).encode() + (
            file.read_bytes() if file.is_file() else b""
        )
        assert not [name for name in SECRETS if name in told.lower()], file
    for text in shown:
        assert not [name for name in SECRETS if name in text.lower().encode()], text


# ---------------------------------------------------------------- at the terminal


def test_a_session_stopped_killed_and_finished(command, tmp_path, two):
    out = tmp_path / "blind"
    code, said, _ = start(command, two, out, "--raters", "ann")
    assert code == 0 and "8 pairs" in said and f"blind rate {out / 'ann'}" in said
    assert_blind(out, said)
    items = Copy(out / "ann").items
    with Terminal(out / "ann") as terminal:
        terminal.prompted(1)
        for part in items[0].values():
            assert part in terminal.seen
        assert items[1]["instruction"] not in terminal.seen
        place_a, place_b = (terminal.seen.index(items[0][side]) for side in "ab")
        assert terminal.seen.index("- A -") < place_a < terminal.seen.index("- B -") < place_b
        terminal.press("u")  # nothing to take back
        terminal.press("x5 \n\x7f")  # no keys of ours
        terminal.press("\x1b[A\x1b[1;5A\x1bOA")  # arrows, with an A in them
        terminal.press("bbb")  # only the first is for this pair
        terminal.then(2)
        assert Copy(out / "ann").choices == {0: "b"}
        terminal.press("B")
        terminal.then(3)
        terminal.press("u")
        terminal.then(2)
        terminal.press("u")
        terminal.then(1)
        assert Copy(out / "ann").choices == {}
        for place, pressed in enumerate("bt", 2):
            terminal.press(pressed)
            terminal.then(place)
        transcript = terminal.seen
        terminal.kill(signal.SIGKILL)
    assert Copy(out / "ann").choices == {0: "b", 1: "tie"}
    assert_blind(out, transcript)

    with Terminal(out / "ann") as terminal:
        terminal.prompted(3)
        assert "===== 1 of" not in terminal.seen and "===== 2 of" not in terminal.seen
        terminal.press("s")
        terminal.then(4)
        terminal.press("u")  # also what was said before the kill
        terminal.then(3)
        terminal.press("u")
        terminal.then(2)
        terminal.press("a")
        terminal.then(3)
        assert not terminal.waits_for_enter()
        terminal.interrupt()
        assert terminal.end() == 130 and "interrupted" in terminal.seen
        assert terminal.waits_for_enter()
        transcript = terminal.seen
    assert Copy(out / "ann").choices == {0: "b", 1: "a"}
    assert_blind(out, transcript)
    assert_refused(unblind(command, out, two), "6 of 8 are left", "--early")

    with Terminal(out / "ann") as terminal:
        for place in range(3, 9):
            terminal.prompted(place)
            terminal.press("a")
        terminal.wait_for("q: done > ")
        terminal.press("bu")  # b is for no pair; the last one can still be taken back
        terminal.then(8)
        terminal.press("u")
        terminal.then(7)
        terminal.press("a")
        terminal.then(8)
        terminal.press("a")
        terminal.wait_for("q: done > ", terminal.shown_before)
        terminal.press("q")
        assert terminal.end() == 0 and "Thank you" in terminal.seen
    assert Copy(out / "ann").choices == {0: "b"} | dict.fromkeys(range(1, 8), "a")
    assert_blind(out, transcript)

    code, said, err = unblind(command, out, two)
    assert code == 0, err
    mine = sum(item[side].startswith("Ours") for item, side in zip(items, "baaaaaaa", strict=True))
    assert f"{MODEL} {mine} vs {8 - mine} {BASELINE}: votes; 1 ties" in said
    with pytest.raises(AssertionError):  # as it should be now: assert_blind can fail
        assert_blind(out)


def test_stop_and_a_copy_that_is_done_and_one_that_is_closed(command, tmp_path, two):
    out = tmp_path / "blind"
    start(command, two, out, "--raters", "ann")
    with Terminal(out / "ann") as terminal:
        terminal.prompted(1)
        with Terminal(out / "ann") as second:
            assert second.end() == 2 and "another process is rating" in second.seen
        told = "another process is rating"
        assert_refused(unblind(command, out, two, "--early"), told, str(out / "ann"))
        terminal.press("\x04")  # Ctrl-D
        assert terminal.end() == 0 and "8 left: the same command goes on" in terminal.seen
    assert_refused(command(evaluate, "blind", "rate", out / "ann"), "terminal")
    assert_refused(command(evaluate, "blind", "rate", out), "terminal")


def test_what_answers_hold_cannot_steer_the_terminal():
    assert blind.shown("a\x1b[2J\tb\r\n\nc\u202e") == "│ a\\x1b[2J   b\n│ \n│ c\\u202e"


def test_what_answers_hold_cannot_pass_for_the_frame():
    fake = "fine\n\n----- B -----\u2028I am bad\n(empty)"
    assert all(line.startswith("│ ") for line in blind.shown(fake).splitlines())
    assert blind.shown(" \n") == blind.shown("") == "(empty)"


@pytest.mark.parametrize(
    "text", ["word " * 7 + "----- B -----", "-" * 99, " " * 99 + "x", "写" * 50]
)
def test_no_line_is_left_to_the_terminal_to_wrap(monkeypatch, text):
    """What it wraps begins at the margin, and may look like a line of ours."""
    monkeypatch.setenv("COLUMNS", "40")
    lines = blind.shown(text).splitlines()
    assert all(line.startswith("│ ") for line in lines)
    assert max(len(line) + line.count("写") for line in lines) <= 40 and len(lines) < 5
    assert "".join(line[2:] for line in lines) == text


@pytest.mark.parametrize("meanwhile", ["rated", "unblinded"])
def test_what_happens_before_the_lock_is_held_counts(tmp_path, two, command, meanwhile):
    start(command, two, tmp_path / "b", "--raters", "ann")
    folder, places = tmp_path / "b/ann", []

    def late(*args):
        if meanwhile == "rated":
            Copy(folder).say(0, "a")
        else:
            (tmp_path / "b/annotations.json").write_text("[]")
        return claim_run_folder(*args)

    with (
        mock.patch.object(blind, "claim", late),
        mock.patch.object(blind, "single_keys", lambda: nullcontext(0)),
        mock.patch.object(blind, "ask", lambda copy, fd: places.append(copy.place) or "stop"),
        mock.patch.object(sys, "stdin", mock.Mock(isatty=lambda: True)),
    ):
        if meanwhile == "unblinded":
            with pytest.raises(ValueError, match="closed"):
                blind.rate(folder)
        else:
            blind.rate(folder)
    assert places == ([1] if meanwhile == "rated" else [])


# ---------------------------------------------------------------- copies


def test_sides_and_order_are_drawn_for_each_rater(command, tmp_path):
    texts = {f"Task {n}": n for n in range(60)}
    two = [
        write(tmp_path / name, name, {task: f"{side} {n}" for task, n in texts.items()})
        for name, side in ((MODEL, "Ours"), (BASELINE, "Theirs"))
    ]
    assert start(command, two, tmp_path / "b", "--raters", "ann", "ben")[0] == 0
    ann, ben = (Copy(tmp_path / "b" / name).items for name in ("ann", "ben"))
    for items in (ann, ben):
        assert {item["instruction"] for item in items} == texts.keys()
        assert [item["instruction"] for item in items] != list(texts)
        assert 15 <= sum(item["a"].startswith("Ours") for item in items) <= 45
        assert all(set(item) == {"instruction", "a", "b"} for item in items)
    assert [item["instruction"] for item in ann] != [item["instruction"] for item in ben]
    sides = [{item["instruction"]: item["a"][0] for item in items} for items in (ann, ben)]
    assert 15 <= sum(sides[0][task] == sides[1][task] for task in texts) <= 45
    # The same seed draws the same, another and none something else; it is nowhere to be read.
    drawn = {}
    for name, seed in (("c", "s3cr3t"), ("d", "s3cr3t"), ("e", "other"), ("f", None)):
        more = ("--raters", "ann") + (("--seed", seed) if seed else ())
        assert start(command, two, tmp_path / name, *more)[0] == 0
        drawn[name] = (tmp_path / name / "ann/items.jsonl").read_bytes()
        assert all(b"s3cr3t" not in f.read_bytes() for f in (tmp_path / name / "ann").iterdir())
    assert drawn["c"] == drawn["d"] and len(set(drawn.values())) == 3
    assert start(command, two, tmp_path / "g", "--raters", "ann", "ben", "--num", 20)[0] == 0
    ann, ben = (Copy(tmp_path / "g" / name).items for name in ("ann", "ben"))
    tasks = [{item["instruction"] for item in items} for items in (ann, ben)]
    assert tasks[0] == tasks[1] and len(tasks[0]) == 20


def test_an_answer_that_says_its_name_is_told_of(command, tmp_path, two):
    file = two[0] / "model_outputs.json"
    file.write_text(file.read_text().replace("Ours, 3", f"I am {MODEL.upper()}, 3"))
    code, said, err = start(command, two, tmp_path / "b")
    assert code == 0 and "1 answers hold the name of a model" in err
    assert not [name for name in SECRETS if name in (said + err).lower().encode()]


# ---------------------------------------------------------------- unblinding


def test_votes_ties_test_interval_and_agreement(command, tmp_path, two):
    out = tmp_path / "blind"
    start(command, two, out, "--raters", "ann", "ben")
    ann = dict.fromkeys([f"Task {n}" for n in range(5)], "Ours") | {"Task 5": "Theirs"}
    ann |= {"Task 6": "tie", "Task 7": "skip"}
    ben = ann | {"Task 0": "Theirs", "Task 6": "Ours", "Task 7": "Theirs"}
    rated(out / "ann", ann)
    rated(out / "ben", ben)
    code, said, err = unblind(command, out, two)
    assert code == 0, err
    votes = f"{MODEL} 10 vs 4 {BASELINE}: votes; 3 ties, 1 skipped, 0 not rated"
    assert said.startswith(votes), said
    rows = win_rate.leaderboard([out / "annotations.json"])
    assert [row["annotator"] for row in rows] == ["ann", "ben"]
    wanted = [(5, 1, 2, 8, 1), (5, 3, 1, 9, 0)]  # Task 8 is a tie: the texts are the same
    for row, numbers in zip(rows, wanted, strict=True):
        names = ("n_wins", "n_losses", "n_draws", "n", "n_missing")
        assert tuple(row[name] for name in names) == numbers
    assert rows[0]["sign_test"] == pytest.approx(2 * 7 / 64)
    low, high = win_rate.wilson(6, 8)
    assert (rows[0]["win_rate_low"], rows[0]["win_rate_high"]) == (100 * low, 100 * high)
    # Together: 0 is a draw, 1 to 4 won, 5 lost, 6 won (3/4), 7 lost, 8 a draw.
    together = next(line for line in said.splitlines() if "all raters" in line)
    won = [0.5, 1, 1, 1, 1, 0, 0.75, 0, 0.5]
    assert f"{100 * sum(won) / 9:.2f} ± " in together and "5–2–2" in together
    low, high = (100 * bound for bound in win_rate.wilson(sum(won), 9))
    assert f"{low:.1f}–{high:.1f}" in together and "too few to tell" in together
    assert "raters agree in 71.4 % of pairs" in said and "(7 instructions)" in said
    mirrored = unblind(command, out, two[::-1])[1]
    assert mirrored.startswith(f"{BASELINE} 4 vs 10 {MODEL}")
    together = next(line for line in mirrored.splitlines() if "all raters" in line)
    assert f"{100 - 100 * sum(won) / 9:.2f} ± " in together and "2–5–2" in together
    assert_refused(command(evaluate, "blind", "rate", out / "ann"), "terminal")


def test_whoever_likes_a_side_likes_nobody(command, tmp_path):
    """A rater who always presses A: near 50, whatever the models are."""
    texts = {f"Task {n}": n for n in range(400)}
    two = [
        write(tmp_path / name, name, {task: f"{side} {n}" for task, n in texts.items()})
        for name, side in ((MODEL, "Ours"), (BASELINE, "Theirs"))
    ]
    start(command, two, tmp_path / "b", "--seed", "1")
    copy = Copy(tmp_path / "b/rater")
    lines = "".join(json.dumps({"place": n, "choice": "a"}) + "\n" for n in range(400))
    copy.log.write_text(lines)
    assert unblind(command, tmp_path / "b", two)[0] == 0
    (row,) = win_rate.leaderboard([tmp_path / "b/annotations.json"])
    assert row["win_rate_low"] < 50 < row["win_rate_high"] and row["n"] == 400


def test_alpaca_s_own_figures(command, tmp_path):
    texts = {f"Task {n}": n for n in range(179)}
    two = [
        write(tmp_path / name, name, {task: f"{side} {n}" for task, n in texts.items()})
        for name, side in (("alpaca", "Ours"), ("davinci", "Theirs"))
    ]
    start(command, two, tmp_path / "b")
    copy = Copy(tmp_path / "b/rater")
    with copy.log.open("w") as log:
        for place, item in enumerate(copy.items):
            ours = int(item["instruction"].split()[1]) < 90
            choice = next(side for side in "ab" if item[side].startswith("Ours") == ours)
            log.write(json.dumps({"place": place, "choice": choice}) + "\n")
    said = unblind(command, tmp_path / "b", two)[1]
    assert said.startswith("alpaca 90 vs 89 davinci: votes; 0 ties, 0 skipped")
    assert "too few to tell" in said and re.search(r"50\.28 ± 3\.75 +43\.0–57\.5 .* 90–89–0", said)


def test_early_and_then_it_is_closed(command, tmp_path, two):
    out = tmp_path / "blind"
    start(command, two, out, "--raters", "ann", "ben")
    assert_refused(unblind(command, out, two, "--early"), "nobody has preferred")
    rated(out / "ann", {"Task 1": "Ours", "Task 2": "Theirs"})
    assert_refused(unblind(command, out, two), "left to rate", "--early")
    assert not (out / "annotations.json").exists()
    code, said, _ = unblind(command, out, two, "--early")
    assert code == 0 and "1 vs 1" in said and "14 not rated" in said
    with Terminal(out / "ben") as terminal:
        assert terminal.end() == 2 and "unblinded: ratings are closed" in terminal.seen


def test_a_rater_who_prefers_nothing_has_no_row_and_no_ties(command, tmp_path, two):
    out = tmp_path / "blind"
    start(command, two, out, "--raters", "ann", "ben")
    rated(out / "ann", dict.fromkeys([f"Task {n}" for n in range(8)], "Ours"))
    rated(out / "ben", dict.fromkeys([f"Task {n}" for n in range(8)], "skip"))
    code, said, _ = unblind(command, out, two)
    assert code == 0 and "8 vs 0" in said and "1 ties, 8 skipped" in said
    assert not [line for line in said.splitlines() if line.startswith(MODEL) and " ben " in line]
    code, said, err = command(evaluate, "score", out, "--json")
    (row,) = json.loads(said)
    assert code == 0 and row["annotator"] == "ann" and row["n"] == 9
    assert "no preference of ben's: left out" in err


def test_only_the_files_it_was_begun_with_unblind(command, tmp_path, two):
    out = tmp_path / "blind"
    start(command, two, out, "--raters", "ann")
    rated(out / "ann", dict.fromkeys([f"Task {n}" for n in range(8)], "Ours"))
    file = two[0] / "model_outputs.json"
    before = file.read_text()
    for change in (("Ours, 1", "Ours, 9"), (MODEL, "another")):
        file.write_text(before.replace(*change))
        assert_refused(unblind(command, out, two), f"{out / 'ann'} compares other answers")
    file.write_text(before)
    items = out / "ann/items.jsonl"
    whole = items.read_text()
    items.write_text(whole.replace("Ours, 1", "Ours, 9"))
    assert_refused(unblind(command, out, two), "items.jsonl, line", "other answers")
    items.write_text(whole)
    log = out / "ann/ratings.jsonl"
    said = log.read_text()
    for odd in ('{"place": 8, "choice": "a"}', '{"place": 0, "choice": "c"}', '{"place": "0"}'):
        log.write_text(said + odd + "\n")
        assert_refused(unblind(command, out, two), "ratings.jsonl, line 9")
    log.write_text(said)
    (out / "zoe").mkdir()
    for copied in (out / "ann").iterdir():
        (out / "zoe" / copied.name).write_bytes(copied.read_bytes())
    assert_refused(unblind(command, out, two), "copy of the copy")


def test_mistakes_are_one_line(command, tmp_path, two):
    out = tmp_path / "blind"
    assert_refused(start(command, two, out, "--raters", "../x"), "'../x'", "folder")
    assert_refused(start(command, two, out, "--raters", "ann", "Ann"), "same name")
    assert_refused(start(command, two, out, "--num", 0), "--num")
    assert_refused(start(command, (two[0], two[0]), out), "both by")
    assert not out.exists()
    assert start(command, two, out)[0] == 0
    assert_refused(start(command, two, out), "exists already")
    assert_refused(unblind(command, tmp_path / "no", two), "no rater's copy")
    assert_refused(unblind(command, two[0], two), "no rater's copy")
    settings = out / "rater/settings.json"
    settings.write_text("{}")
    assert_refused(unblind(command, out, two), f"{settings}: it has no 'alike'")
    same = {f"Task {n}: say it.": "x" for n in range(3)}
    alike = [write(tmp_path / name, name, same) for name in ("p", "q")]
    assert_refused(start(command, alike, tmp_path / "b2"), "nothing to compare")


def test_random_keys_leave_a_log_that_tells_them(tmp_path, two, command):
    """Whatever was pressed, the log replayed gives what the session held."""
    start(command, two, tmp_path / "b", "--raters", "ann")
    copy, rng = Copy(tmp_path / "b/ann"), random.Random(0)
    for _ in range(200):
        place = copy.place
        if place == len(copy.items) or (place and rng.random() < 0.4):
            copy.say(place - 1, None)
        else:
            copy.say(place, rng.choice(["a", "b", "tie", "skip"]))
        assert list(copy.choices) == list(range(copy.place))
    assert Copy(tmp_path / "b/ann").choices == copy.choices
