"""From seeds to records, against a server that answers, and one that does not."""

import asyncio
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from helpers.commands import ROOT, assert_refused
from helpers.teacher_server import ODD, THINGS, Server, answer
from rouge_score import rouge_scorer

import selfinstruct
from alpaca.common.files import lock_folder, read_jsonl, read_log
from alpaca.datagen import batch
from alpaca.datagen.four_stage import SelfInstruct
from rougel import rouge_l, tokenize, tokenize_unicode

SEEDS = ROOT / "data/seed_tasks.jsonl"
PRICES = ("--price-in", 1, "--price-out", 2)
EVERY_FAULT = ["429", "500", "503", "reset", "half", *ODD]


def arguments(out: Path, server: Server, num: int, *more) -> list[str]:
    quick = ("--retry-wait", 0.01, "--base-url", server.url, *PRICES)
    given = ("generate", "--out", out, "--num", num, *quick, *more)
    given = given if "--teacher" in given else (*given, "--teacher", "m")
    return [str(one) for one in given]


def start(out: Path, server: Server, num: int, *more, before="", **how) -> subprocess.Popen:
    code = f"from alpaca.common import errors\nimport selfinstruct\n{before}\n"
    code += "errors.run_command(selfinstruct.main)"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments(out, server, num, *more)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **how,
    )


def run(*args) -> str:
    """What a command prints that several tests share."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as said:
        patch.setattr(sys, "argv", ["selfinstruct.py", *map(str, args)])
        selfinstruct.main()
    return said.getvalue()


def lines(folder: Path, name: str) -> list[dict]:
    return list(read_jsonl(folder / f"{name}.jsonl"))


def same(folder: Path) -> list[dict]:
    """Records without what differs from run to run."""
    records = lines(folder, "records")
    for record in records:
        for name in ("time", "request_id", "url"):
            del record["provenance"][name]
    return records


def check_whole(folder: Path, num: int) -> None:
    """No record lost, none twice, each as it was sent, none like another; the cost exact."""
    records, responses = lines(folder, "records"), lines(folder, "responses")
    assert len(records) == num
    assert len({r["item"] for r in records + lines(folder, "rejected")}) == len(records) + len(
        lines(folder, "rejected")
    )
    assert len({r["id"] for r in responses}) == len(responses)
    order = [tuple(map(int, r["item"].split("."))) for r in records]
    assert order == sorted(order)
    for r in responses:
        assert r["cost"] == pytest.approx(
            (r["usage"]["prompt"] + 2 * r["usage"]["completion"]) / 1e6
        )


# ---------------------------------------------------------------- what is made


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run of 200 records, for the tests that only look."""
    out = tmp_path_factory.mktemp("made") / "run"
    with Server() as server:
        said = run(*arguments(out, server, 200, "--licence", "test only"))
        assert said.startswith("200 records in"), said
    return out


def test_records_have_alpaca_s_fields_and_tell_where_they_are_from(made):
    check_whole(made, 200)
    records = lines(made, "records")
    seeds = {seed["id"]: seed for seed in read_jsonl(SEEDS)}
    responses = {r["id"]: r for r in lines(made, "responses")}
    for record in records:
        source = record["provenance"]
        assert source["teacher"] == "m" and source["endpoint"] == "chat"
        assert source["licence"] == "test only" and re.match(r"20\d\d-\d\d-\d\dT", source["time"])
        body = json.loads(responses[source["request"]]["response"])
        assert source["request_id"] == body["id"] and len(set(source["prompt_seeds"])) == 3
        sent = body["choices"][0]["message"]["content"]
        assert record["instruction"] in sent and record["output"] in sent
        assert set(source["prompt_seeds"]) <= seeds.keys()
        assert len(record["most_similar_instructions"]) == 10


def test_similarities_are_rouge_score_s_against_seeds_and_all_kept_before(made):
    texts = [seed["instruction"] for seed in (*read_jsonl(SEEDS), *lines(made, "records"))]
    for place, record in [*enumerate(lines(made, "records"), 175)][::6]:
        pool = texts[:place]
        scores = [
            rouge_scorer._score_lcs(tokenize(record["instruction"]), tokenize(text)).fmeasure
            for text in pool
        ]
        assert max(scores) <= 0.7
        assert record["avg_similarity_score"] == pytest.approx(sum(scores) / len(scores), abs=1e-12)
        nearest = record["most_similar_instructions"]
        assert sorted(nearest.values()) == sorted(scores)[-10:]
        assert all(scores[pool.index(text)] == score for text, score in nearest.items())


def test_the_same_answers_make_the_same_records_however_they_arrive(made, tmp_path, command):
    with Server({"500": 0.2, "half": 0.2}, latency=0.02) as server:
        more = ("--concurrency", 3, "--licence", "test only")
        assert command(selfinstruct, *arguments(tmp_path / "b", server, 200, *more))[0] == 0
    assert same(tmp_path / "b") == same(made)
    with Server() as server:
        assert command(selfinstruct, *arguments(tmp_path / "c", server, 50, "--seed", 1))[0] == 0
    assert same(tmp_path / "c") != same(made)[:50]


def test_going_on_to_a_larger_number_is_the_same_as_asking_for_it_at_once(made, tmp_path, command):
    with Server() as server:
        for num in (7, 60, 60, 200):
            more = ("--licence", "test only")
            assert command(selfinstruct, *arguments(tmp_path / "b", server, num, *more))[0] == 0
            assert len(lines(tmp_path / "b", "records")) == num
        assert max(server.prompts.values()) == 1  # nothing was asked, or paid, twice
    assert same(tmp_path / "b") == same(made)


def test_no_more_is_asked_than_is_needed(made):
    brought = len(lines(made, "records")) / len(lines(made, "responses"))
    assert brought > 10


def test_export_is_alpaca_s_list(made, tmp_path, command):
    assert command(selfinstruct, "export", made, "--out", tmp_path / "a.json")[0] == 0
    exported = json.loads((tmp_path / "a.json").read_text())
    assert [list(record) for record in exported] == [["instruction", "input", "output"]] * 200
    assert exported[5]["instruction"] == lines(made, "records")[5]["instruction"]
    assert command(selfinstruct, "export", made, "--out", tmp_path / "b.json", "--full")[0] == 0
    assert json.loads((tmp_path / "b.json").read_text())[0]["provenance"]["teacher"] == "m"
    from alpaca.datagen.formats import load_records

    assert load_records(tmp_path / "a.json") == exported


def test_reparse_makes_the_records_anew_from_the_answers(made, tmp_path, command):
    shutil.copytree(made, tmp_path / "run")
    (tmp_path / "run/records.jsonl").write_text("")
    (tmp_path / "run/rejected.jsonl").unlink()
    code, out, err = command(selfinstruct, "reparse", tmp_path / "run")
    assert (code, err) == (0, "") and "where there were 0" in out
    assert lines(tmp_path / "run", "records")[:200] == lines(made, "records")
    assert not list((tmp_path / "run").glob("*.new"))


def test_reparse_goes_round_holes_and_finishes_after_a_kill(made, tmp_path, command):
    shutil.copytree(made, tmp_path / "run")
    answers = lines(made, "responses")
    with open(tmp_path / "run/responses.jsonl", "w") as file:
        for entry in answers[:1] + answers[2:]:
            file.write(json.dumps(entry) + "\n")
    assert command(selfinstruct, "reparse", tmp_path / "run")[0] == 0
    gone = answers[1]["id"] + "."
    left = [r["item"] for r in lines(made, "records") if not r["item"].startswith(gone)]
    assert set(left) <= {r["item"] for r in lines(tmp_path / "run", "records")}
    assert (tmp_path / "run/records.jsonl.before").read_text() == (
        made / "records.jsonl"
    ).read_text()
    # killed between its last two steps
    (tmp_path / "run/rejected.jsonl").rename(tmp_path / "run/rejected.jsonl.new")
    before = (tmp_path / "run/rejected.jsonl.new").read_text()
    assert command(selfinstruct, "reparse", tmp_path / "run")[0] == 0
    assert (tmp_path / "run/rejected.jsonl").read_text() == before


def test_report_sums_by_teacher(tmp_path, command):
    with Server() as one, Server() as two:
        teachers = ("--teacher", f"model=a,url={one.url},weight=3,licence=CC0")
        teachers += ("--teacher", f"model=b,url={two.url},kind=completions,price-in=9,price-out=9")
        assert command(selfinstruct, *arguments(tmp_path / "r", one, 400, *teachers))[0] == 0
        code, out, _ = command(selfinstruct, "report", tmp_path / "r")
        asked = {"a": one.seen["POST chat/completions"], "b": two.seen["POST completions"]}
        assert code == 0 and asked["a"] > asked["b"] > 0
        costs = {"a": (one.spent[0] + 2 * one.spent[1]) / 1e6, "b": 9 * sum(two.spent) / 1e6}
    kept = Counter(r["provenance"]["teacher"] for r in lines(tmp_path / "r", "records"))
    for name, kind in (("a", "chat, CC0"), ("b", "completions")):
        (part,) = re.findall(rf"{name} at http\S+ \({kind}\)\n((?:  .*\n)+)", out)
        assert f"{asked[name]} requests, 0 without" in part
        assert f"  {kept[name]} of " in part and f": ${costs[name]:.4f}" in part
    assert f"400 records for ${sum(costs.values()):.4f}" in out


# ---------------------------------------------------------------- filters


def numbered(*tasks: tuple[str, str, str]) -> str:
    return "###\n".join(
        f"{n}. Instruction: {i}\n{n}. Input:\n{x}\n{n}. Output:\n{o}\n"
        for n, (i, x, o) in enumerate(tasks, 4)
    )


def test_every_rejected_task_is_kept_with_its_reason(tmp_path, command):
    first = "Name seven rivers of the southern plain"
    text = numbered(
        (first, "<noinput>", "Seven"),
        ("Name seven rivers of the northern plain", "", "None"),  # 6 of 7 words
        ("Too short this", "", "x"),
        ("Draw a cat on a mat", "", "x"),
        ("Write a program that sings a song", "", "x"),
        ("(Optional) say something nice to her", "", "x"),
        ("Écris quelque chose de gentil", "", "x"),
        ("Say what is missing at the end", "", ""),
        ("Tell a story about the tiny violin of my aunt", "an aunt", "Once"),
    )
    with Server(answer=lambda prompt: text) as server:
        result = command(selfinstruct, *arguments(tmp_path / "r", server, 2))
        assert result[0] == 0, result
    why = [line["why"] for line in lines(tmp_path / "r", "rejected")]
    assert why[:7] == [
        "similar", "short", "asks for draw", "program", "punctuation", "not ASCII", "format"
    ]  # fmt: skip
    similar = lines(tmp_path / "r", "rejected")[0]
    assert similar["similar_to"] == first and similar["similarity"] == pytest.approx(6 / 7)
    kept = lines(tmp_path / "r", "records")
    assert [(r["instruction"][:12], r["input"], r["output"]) for r in kept] == [
        ("Name seven r", "", "Seven"), ("Tell a story", "an aunt", "Once")
    ]  # fmt: skip


@pytest.mark.parametrize("kept", [1, 0], ids=["the same again", "no tasks"])
def test_a_teacher_that_brings_nothing_new_does_not_cost_for_ever(tmp_path, command, kept):
    again = numbered(("Say the same thing again and again", "", "again"))
    text = again if kept else "I am sorry, I cannot do that."
    with Server(answer=lambda prompt: text) as server:
        result = command(selfinstruct, *arguments(tmp_path / "r", server, 10, "--concurrency", 4))
        assert result[0] == 2 and "brought nothing new" in result[2]
        assert server.seen["answers"] < 51 + 256
    assert len([*read_log(tmp_path / "r/records.jsonl")]) == kept
    with Server() as server:  # what came of it before does not stop the next run
        assert command(selfinstruct, *arguments(tmp_path / "r", server, 10))[0] == 0


def test_another_language_is_asked_for_compared_and_not_dropped(tmp_path, command):
    def chinese(prompt: str) -> str:
        rng = random.Random(prompt)
        some = "".join(chr(0x4E00 + rng.randrange(3000)) for _ in range(12))
        return numbered((f"请解释{some}", "", "好"), (f"请解释{some}吧", "", "好"))

    with Server(answer=chinese) as server:
        more = ("--language", "Chinese")
        assert command(selfinstruct, *arguments(tmp_path / "r", server, 5, *more))[0] == 0
        assert "Write in Chinese" in server.bodies[0]["messages"][0]["content"]
    assert {line["why"] for line in lines(tmp_path / "r", "rejected")} == {"similar"}
    assert len(lines(tmp_path / "r", "records")) == 5


# ---------------------------------------------------------------- nothing is lost


def killed(folder: Path, server: Server, num: int, after: float, *more, **how) -> None:
    """Some seconds after it has come so far as to store an answer of its own."""
    file, before = folder / "responses.jsonl", 0
    if file.exists():
        before = file.stat().st_size
    process = start(folder, server, num, *more, **how)
    while process.poll() is None and (not file.exists() or file.stat().st_size == before):
        time.sleep(0.005)
    time.sleep(after)
    process.kill()
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"it was over before: {said}"


def killed_and_finished(command, folder: Path, kills: int, num: int) -> None:
    rng = random.Random(kills)
    with Server({"500": 0.1}, latency=0.15, seed=kills) as server:
        for _ in range(kills):
            killed(folder / "r", server, num, rng.uniform(0, 0.4), "--concurrency", 6)
        assert command(selfinstruct, *arguments(folder / "r", server, num))[0] == 0
    check_whole(folder / "r", num)
    stored = {r["provenance"]["request_id"] for r in lines(folder / "r", "responses")}
    assert len(stored) == len(lines(folder / "r", "responses")) <= server.seen["answers"]
    with Server() as quiet:
        assert command(selfinstruct, *arguments(folder / "s", quiet, num))[0] == 0
    assert same(folder / "r") == same(folder / "s")


def test_killed_three_times_it_ends_as_if_it_had_never_been(tmp_path, command):
    killed_and_finished(command, tmp_path, kills=3, num=400)


@pytest.mark.slow
def test_killed_twenty_times_it_ends_as_if_it_had_never_been(tmp_path, command):
    killed_and_finished(command, tmp_path, kills=20, num=2500)


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_torn_last_line_is_made_anew(made, tmp_path, command, cut):
    for name in ("records", "rejected", "responses"):
        shutil.rmtree(tmp_path / "r", ignore_errors=True)
        shutil.copytree(made, tmp_path / "r")
        file = tmp_path / f"r/{name}.jsonl"
        file.write_bytes(file.read_bytes()[:-cut])
        with Server() as server:
            more = ("--licence", "test only")
            assert command(selfinstruct, *arguments(tmp_path / "r", server, 200, *more))[0] == 0
        assert same(tmp_path / "r") == same(made)


def test_ctrl_c_takes_what_is_under_way_and_stops(tmp_path):
    with Server(latency=0.3) as server:
        process = start(tmp_path / "r", server, 5000, "--concurrency", 8)
        while server.seen["answers"] < 20:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
        assert process.returncode == 130
        assert (
            "waiting for" in said and "answers under way" in said and said.endswith("interrupted\n")
        )
        assert "Traceback" not in said and "never retrieved" not in said
        assert len(lines(tmp_path / "r", "responses")) == server.seen["answers"]


def test_ctrl_c_begins_no_new_attempt(tmp_path):
    with Server({"500": 1.0}, latency=0.1) as server:
        more = ("--concurrency", 4, "--max-retries", 59, "--retry-wait", 0.3)
        process = start(tmp_path / "r", server, 5000, *more)
        until = time.monotonic() + 30
        while len(server.bodies) < 12 and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        began, asked = time.monotonic(), len(server.bodies)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in said
        assert time.monotonic() - began < 5 and len(server.bodies) <= asked + 4
    assert not (tmp_path / "r/responses.jsonl").exists()  # they will be asked anew


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, command):
    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    with Server() as server:
        seeds = tmp_path / "seeds.jsonl"
        seeds.write_text("".join(SEEDS.open().readlines()[:12]))
        few = ("--seeds", seeds)
        process = start(tmp_path / "r", server, 300, *few, preexec_fn=small_disk)
        _, said = process.communicate()
        assert process.returncode == 2
        assert said.count("error:") == 1 and "File too large" in said and "Traceback" not in said
        assert command(selfinstruct, *arguments(tmp_path / "r", server, 300, *few))[0] == 0
        assert command(selfinstruct, *arguments(tmp_path / "s", server, 300, *few))[0] == 0
    check_whole(tmp_path / "r", 300)
    assert same(tmp_path / "r") == same(tmp_path / "s")


# ---------------------------------------------------------------- servers that misbehave


def test_every_mix_of_faults_ends_complete_and_in_bounds(tmp_path, command):
    for seed in range(3):
        rng = random.Random(seed)
        some = rng.sample(EVERY_FAULT, 5) if seed else EVERY_FAULT
        faults = {name: 0.55 / len(some) for name in some}
        with Server(faults, seed=seed) as server:
            out = tmp_path / f"r{seed}"
            result = command(selfinstruct, *arguments(out, server, 120, "--timeout", 2))
            assert result[0] == 0, result
            asked = len(lines(out, "responses"))
            assert len(server.bodies) <= 8 * asked
            per_prompt = Counter(json.dumps(body) for body in server.bodies)
            assert max(per_prompt.values()) <= 8 and server.most <= 32
        assert len(lines(out, "records")) == 120


def test_stalls_cost_no_more_than_their_time_out(tmp_path, command):
    with Server({"stall": 0.3}) as server:
        began = time.monotonic()
        more = ("--timeout", 0.5)
        assert command(selfinstruct, *arguments(tmp_path / "r", server, 100, *more))[0] == 0
        assert time.monotonic() - began < 15


def test_a_prompt_that_is_always_refused_does_not_block_a_folder(tmp_path, command):
    with Server() as server:
        assert command(selfinstruct, *arguments(tmp_path / "r", server, 20))[0] == 0
        server.refuse = lambda body: len(str(body)) % 5 == 0
        assert command(selfinstruct, *arguments(tmp_path / "r", server, 400))[0] == 0
    failed = [entry for entry in lines(tmp_path / "r", "responses") if "failed" in entry]
    assert failed and all("400" in entry["failed"] for entry in failed)
    assert max(Counter(map(json.dumps, server.bodies)).values()) == 1, "it would be refused again"


def test_a_server_that_only_fails_ends_the_run_in_one_line(tmp_path, command):
    with Server({"500": 1.0}) as server:
        more = ("--max-retries", 1, "--concurrency", 4)
        result = command(selfinstruct, *arguments(tmp_path / "r", server, 100, *more))
        assert result[0] == 2 and "10 requests in a row without an answer" in result[2]
        assert "Traceback" not in result[2] and len(server.bodies) <= 2 * (10 + 4)
    assert len(lines(tmp_path / "r", "responses")) <= 10 + 4
    with Server() as server:  # and goes on when it is well again
        assert command(selfinstruct, *arguments(tmp_path / "r", server, 100))[0] == 0


def test_thirty_two_at_once_while_the_pool_holds_fifty_thousand(tmp_path):
    """Sixteen answers a second leave 1/16 s of a processor for each. A busy machine takes more for
    the same work: it has four times that."""
    rng = random.Random(0)
    words = (*THINGS.split(), *(f"word{i}" for i in range(800)))
    with open(tmp_path / "seeds.jsonl", "w") as file:
        for number in range(50_000):
            text = " ".join(rng.choices(words, k=rng.randint(5, 15)))
            case = {"input": "", "output": "x"}
            seed = {"id": f"s{number}", "instruction": text, "instances": [case]}
            file.write(json.dumps(seed) + "\n")
    with Server(latency=0.5) as server:
        process = start(tmp_path / "r", server, 10**6, "--seeds", tmp_path / "seeds.jsonl")
        began = come_to(process, tmp_path / "r/records.jsonl", 100)
        ended = come_to(process, tmp_path / "r/records.jsonl", 100 + 16 * 14)
        process.kill()
        process.communicate()
    assert server.most == 32
    assert (ended - began) / 16 < 4 / 16, "seconds of a processor for each answer"


def test_answers_are_judged_beside_the_loop_that_asks(tmp_path, command, monkeypatch):
    threads, usual = set(), selfinstruct.Folder.judge

    def watched(*given):
        threads.add(threading.current_thread())
        return usual(*given)

    monkeypatch.setattr(selfinstruct.Folder, "judge", watched)
    with Server(latency=0.01) as server:
        assert command(selfinstruct, *arguments(tmp_path / "r", server, 5))[0] == 0
    assert threads and threading.main_thread() not in threads


def come_to(process: subprocess.Popen, file: Path, count: int) -> float:
    """Wait for so many records; the seconds of a processor that have gone into them."""
    while not file.exists() or file.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------- money


def test_a_budget_is_never_exceeded_and_a_larger_one_goes_on(tmp_path, command):
    with Server(latency=0.01) as server:
        # 9 dollars a thousand tokens: an answer costs about 3.6, a request at most 30
        prices = ("--price-in", 1000, "--price-out", 9000, "--request", '{"max_tokens": 2000}')
        more = (*prices, "--budget", 60)
        code, out, _ = command(selfinstruct, *arguments(tmp_path / "r", server, 300, *more))
        spent = sum(entry["cost"] for entry in lines(tmp_path / "r", "responses"))
        assert code == 0 and "The budget of $60 has no room" in out and 30 < spent <= 60
        assert spent == pytest.approx((server.spent[0] * 1000 + server.spent[1] * 9000) / 1e6)
        before = len(lines(tmp_path / "r", "records"))
        more = (*prices, "--budget", 1000)
        code, out, _ = command(selfinstruct, *arguments(tmp_path / "r", server, 300, *more))
        assert code == 0 and 0 < before < 300 and "no room" not in out
        assert max(server.prompts.values()) == 1
    check_order = [record["item"] for record in lines(tmp_path / "r", "records")]
    assert len(check_order) == len(set(check_order)) == 300


def test_a_budget_needs_prices(tmp_path, command):
    with Server() as server:
        free = ("--price-in", 0, "--budget", 5)
        result = command(selfinstruct, *arguments(tmp_path / "r", server, 3, *free))
        assert_refused(result, "--budget needs the prices of m")
    assert not (tmp_path / "r").exists()


def test_answers_without_usage_count_as_the_most_they_can_cost(tmp_path, command):
    with Server({"not JSON": 0.4}, seed=5) as server:
        more = ("--price-in", 0.001, "--price-out", 1e3)
        assert command(selfinstruct, *arguments(tmp_path / "r", server, 200, *more))[0] == 0
    for entry in lines(tmp_path / "r", "responses"):
        least = entry["usage"]["completion"] / 1e3 + entry["usage"]["unmetered"] * 3.072
        assert entry["cost"] == pytest.approx(least, rel=1e-3)
    assert any(entry["usage"]["unmetered"] for entry in lines(tmp_path / "r", "responses"))


def test_a_budget_counts_every_attempt(tmp_path, command):
    with Server({"empty choices": 0.5, "half": 0.2}, seed=3) as server:
        more = ("--price-in", 1000, "--price-out", 9000, "--request", '{"max_tokens": 900}')
        more += ("--budget", 60)
        code, out, err = command(selfinstruct, *arguments(tmp_path / "r", server, 900, *more))
        assert code == 0 and "has no room" in out, err
        billed = (server.spent[0] * 1000 + server.spent[1] * 9000) / 1e6
    spent = sum(entry["cost"] for entry in lines(tmp_path / "r", "responses"))
    assert 0 < billed <= spent <= 60
    assert spent > 60 - 12, "a request can cost 12: there was room for one"


@pytest.mark.parametrize(
    "request_, budget",
    [
        ('{"max_tokens": null}', True),
        ('{"max_tokens": -5}', False),
        ('{"max_tokens": true}', False),
        ('{"max_completion_tokens": "3072"}', False),
        ('{"n": 5}', False),
        ('{"stream": true}', False),
        ('{"model": "x"}', False),
    ],
)
def test_a_request_that_would_upset_the_accounts_is_refused(tmp_path, command, request_, budget):
    with Server() as server:
        more = ("--request", request_, *(("--budget", 5) if budget else ()))
        result = command(selfinstruct, *arguments(tmp_path / "r", server, 5, *more))
        assert_refused(result, "--request")
        assert not server.bodies and not (tmp_path / "r").exists()


def test_a_full_disk_buys_nothing_more(tmp_path, monkeypatch, command):
    from alpaca.datagen import request_log

    def full(answers, entry):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(request_log.RequestLog, "store", full)
    with Server(latency=0.05) as server:
        result = command(selfinstruct, *arguments(tmp_path / "r", server, 999, "--concurrency", 4))
        assert result[0] == 2 and "No space left" in result[2]
        assert len(server.bodies) <= 8


@pytest.mark.parametrize("lost", [False, True], ids=["", "the answer to making it is lost"])
def test_batches_cost_half_and_make_the_same_records(made, tmp_path, command, lost):
    with Server() as server:
        if lost:
            order = ["lost"]
            server.fault = lambda: order.pop() if order else ""
        more = ("--batch", "--poll", 0.02, "--licence", "test only")
        code, _, err = command(selfinstruct, *arguments(tmp_path / "r", server, 200, *more))
        assert code == 0, err
        assert server.bodies == []  # not one single request
        assert max(server.prompts.values()) == 1  # none bought twice
    records = same(tmp_path / "r")
    assert {r["provenance"].pop("endpoint") for r in records} == {"chat in a batch"}
    responses = lines(tmp_path / "r", "responses")
    failed = [entry for entry in responses if "failed" in entry]
    assert failed and len(records) == 200  # the server fails the fourth of each batch
    whole = [entry for entry in responses if "failed" not in entry]
    for entry in whole:
        usage = entry["usage"]
        assert entry["cost"] == pytest.approx((usage["prompt"] + 2 * usage["completion"]) / 2e6)
    known = {r["item"]: r["instruction"] for r in same(made)}
    assert all(known.get(r["item"], r["instruction"]) == r["instruction"] for r in records)


def test_a_batch_outlives_the_run_that_sent_it(tmp_path, command):
    with Server() as server:
        server.batch_waits = 10**9
        process = start(tmp_path / "r", server, 100, "--batch", "--poll", 0.05)
        while server.seen["GET batches"] < 4:
            time.sleep(0.02)
        process.kill()
        process.communicate()
        for there in server.batches.values():
            there["waits"] = 0
        server.batch_waits = 0
        result = command(selfinstruct, *arguments(tmp_path / "r", server, 100))
        assert_refused(result, "under way", "--batch")
        more = ("--batch", "--poll", 0.02)
        other = ("--teacher", "other", *more)
        result = command(selfinstruct, *arguments(tmp_path / "r", server, 100, *other))
        assert_refused(result, "under way", "batch of m at")
        assert command(selfinstruct, *arguments(tmp_path / "r", server, 100, *more))[0] == 0
        assert max(server.prompts.values()) == 1
    assert len(lines(tmp_path / "r", "records")) == 100


def test_a_batch_never_asks_for_more_than_the_budget(tmp_path, command):
    with Server() as server:
        more = ("--batch", "--poll", 0.02, "--price-in", 1000, "--price-out", 9000)
        more += ("--budget", 20)
        code, out, err = command(selfinstruct, *arguments(tmp_path / "r", server, 300, *more))
        assert code == 0 and "has no room for another request" in out, err
    spent = sum(entry["cost"] for entry in lines(tmp_path / "r", "responses"))
    assert 0 < spent <= 20


def test_what_a_batch_leaves_out_is_asked_again_and_nothing_else(tmp_path, command, monkeypatch):
    from helpers import teacher_server

    real = teacher_server.finish

    def forgetful(server, there):
        real(server, there)
        file = there["output_file_id"]
        if len(server.batches) == 1:  # the first request is not answered
            whole = server.files[file].splitlines(True)
            server.files[file] = b"".join(x for x in whole if b'"custom_id": "0"' not in x)

    monkeypatch.setattr(teacher_server, "finish", forgetful)
    with Server() as server:
        more = ("--batch", "--poll", 0.02)
        code, _, err = command(selfinstruct, *arguments(tmp_path / "r", server, 100, *more))
        assert code == 0, err
        assert sorted(server.prompts.values())[-2:] == [1, 2]
    assert len(lines(tmp_path / "r", "records")) == 100


def test_a_batch_of_failures_and_odd_answers_is_one_line(tmp_path, command, monkeypatch):
    from helpers import teacher_server

    def nothing(server, there):
        done = [{"custom_id": r["custom_id"]} for r in teacher_server.requests_of(server, there)]
        content = "".join(json.dumps(line) + "\n" for line in done)
        server.files["none"] = content.encode()
        odd = {"request_counts": 3, "errors": {"data": 3}, "metadata": "x"}
        there.update(status="completed", error_file_id="none", **odd)

    monkeypatch.setattr(teacher_server, "finish", nothing)
    with Server() as server:
        server.batches["odd"] = {"id": "odd", "status": "failed", "metadata": "x"}
        more = ("--batch", "--poll", 0.02)
        code, _, err = command(selfinstruct, *arguments(tmp_path / "r", server, 50, *more))
        assert code == 2 and "a whole batch without an answer" in err and "Traceback" not in err
        assert len(server.batches) == 2


def test_a_failed_batch_is_one_line(tmp_path, command, monkeypatch):
    from helpers import teacher_server

    def fail(server, there):
        there.update(status="failed", errors={"data": [{"message": "line 3 is bad"}]})

    monkeypatch.setattr(teacher_server, "finish", fail)
    with Server() as server:
        more = ("--batch", "--poll", 0.02)
        result = command(selfinstruct, *arguments(tmp_path / "r", server, 50, *more))
        assert result[0] == 2 and "is failed: line 3 is bad" in result[2].splitlines()[-1]


# ---------------------------------------------------------------- the paper's four stages


STAGES = ("--pipeline", "self-instruct")
SOON = "selfinstruct.four_stage.SelfInstruct.lag = 8"


@pytest.fixture(autouse=True, scope="module")
def what_was_made_is_shown_soon():
    """Sixty requests before what was made is shown in a prompt would be a long test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SelfInstruct, "lag", 8)
        yield


@pytest.fixture(scope="module")
def four(tmp_path_factory, what_was_made_is_shown_soon) -> Path:
    out = tmp_path_factory.mktemp("four") / "run"
    with Server() as server:
        run(*arguments(out, server, 100, *STAGES))
    return out


def test_the_four_stages_make_instructions_with_instances(four):
    records = lines(four, "records")
    assert 100 <= len(records) < 107  # whole answers
    for record in records:
        classify = record["instruction"].startswith("Classify")
        assert record["is_classification"] == classify
        expected = [("it shines", "good"), ("it rains", "bad")]
        expected = expected if classify else [("three", "drei"), ("four", "vier")]
        assert [(i["input"], i["output"]) for i in record["instances"]] == expected
        assert "input" not in record and len(record["provenance"]["prompt_seeds"]) in (6, 8)
    assert {len(record["provenance"]["prompt_seeds"]) for record in records} == {6, 8}


def test_the_four_stages_ask_the_same_whatever_the_order_of_answers(four, tmp_path, command):
    rng = random.Random(0)

    def slowly(prompt: str) -> str:
        time.sleep(rng.uniform(0, 0.05))
        return answer(prompt)

    with Server(answer=slowly) as server:
        killed(tmp_path / "r", server, 100, 0.3, *STAGES, "--concurrency", 9, before=SOON)
        assert 0 < len(lines(tmp_path / "r", "responses")) < len(lines(four, "responses"))
        assert command(selfinstruct, *arguments(tmp_path / "r", server, 100, *STAGES))[0] == 0
    assert same(tmp_path / "r") == same(four)


def test_the_stages_show_examples_as_they_ask_for_them():
    cases = [{"input": "", "output": "x"}, {"input": "i", "output": "y"}]
    seeds = [{"id": f"{n}", "instruction": f"Do  {n}", "instances": cases} for n in range(8)]
    seeds = [seed | {"is_classification": seed["id"] == "0"} for seed in seeds]
    stages = SelfInstruct(seeds, "", "English", 0, {})
    assert "\n\nTask: Do 0\nClassification: Yes\n\n" in stages.kinds
    assert "\n\nTask: Do 7\nClassification: No\n\n" in stages.kinds
    labelled = "\n\nTask: Do 0\nClass label: x\nInput: <noinput>\nClass label: y\nInput: i\n\n"
    assert stages.first[True].endswith(labelled) and stages.first[True].count("Task:") == 1
    free = (
        "\n\nTask: Do 7\nExample 1\nInput: <noinput>\nOutput: x\nExample 2\nInput: i\nOutput: y\n"
    )
    assert free in stages.first[False] and stages.first[False].count("Task:") == 7


def test_examples_made_by_the_machine_are_those_of_long_before(four):
    stages = SelfInstruct(list(read_jsonl(SEEDS)), "", "English", 0, {})
    early, late = [(3, "early one"), (9, "early two")], [(10, "late one"), (400, "late two")]
    prompt, _, seeds = stages.request(9 + 8, early + late)
    assert "early one" in prompt and "early two" in prompt and "late" not in prompt
    assert len(seeds) == 6 and prompt.endswith("\n9.")
    assert stages.request(9 + 8, early + late)[0] == prompt != stages.request(10, [])[0]


def test_reparse_and_export_of_the_four_stages(four, tmp_path, command):
    shutil.copytree(four, tmp_path / "r")
    assert command(selfinstruct, "reparse", tmp_path / "r")[0] == 0
    assert lines(tmp_path / "r", "records") == lines(four, "records")
    assert command(selfinstruct, "export", four, "--out", tmp_path / "a.json")[0] == 0
    exported = json.loads((tmp_path / "a.json").read_text())
    assert len(exported) == 2 * len(lines(four, "records"))


def test_instances_that_fail_leave_the_data_the_same_whatever_their_delay(tmp_path, command):
    def choosy(prompt: str) -> str:
        bad = prompt.endswith(("Input:", "label:")) and len(prompt) % 3 == 0
        return " x\nOutput: x" if bad else answer(prompt)

    def choosy_and_slow(prompt: str) -> str:
        time.sleep((len(prompt) % 7) / 200)
        return choosy(prompt)

    for name, how in (("a", choosy), ("b", choosy_and_slow)):
        with Server(answer=how) as server:
            for num in (15, 45) if name == "b" else (45,):
                args = arguments(tmp_path / name, server, num, *STAGES)
                assert command(selfinstruct, *args)[0] == 0
    assert same(tmp_path / "a") == same(tmp_path / "b")
    why = Counter(line["why"] for line in lines(tmp_path / "a", "rejected"))
    assert why["instances: none usable"] > 5


@pytest.mark.parametrize(
    "text, label_first, expected",
    [
        (" a\nOutput: b\n\nExample 2\nInput: c\nOutput: d", False, [("a", "b"), ("c", "d")]),
        ("Example 1\nInput: a\nOutput: b", False, [("a", "b")]),
        (" <noinput>\nOutput: b\nmore b", False, [("", "b\nmore b")]),
        (" a\nOutput: a", False, []),  # repeats the input
        (" a\nOutput:", False, []),
        (
            " a\nOutput: b\nInput: a\nOutput: b\nInput: c\nOutput: d",
            False,
            [("a", "b"), ("c", "d")],
        ),
        (" a\nOutput: b\nInput: a\nOutput: c", False, []),  # two answers to one input
        (" yes\nInput: a\nClass label: no\nInput: b", True, [("a", "yes"), ("b", "no")]),
        (" yes\nInput:", True, [("", "yes")]),
        ("", False, []),
        ("", True, []),
    ],
)
def test_instances_are_read_and_filtered(text, label_first, expected):
    from alpaca.datagen import four_stage
    from alpaca.datagen.client import NONE, Reply

    reply = Reply(text, False, NONE, "", "")
    found = four_stage.filter_instances(four_stage.parse_instances(reply, label_first))
    assert [(one["input"], one["output"]) for one in found] == expected


# ---------------------------------------------------------------- mistakes


def test_no_key_is_in_any_file_or_line(tmp_path, monkeypatch, command):
    key = "sk-test-0123456789abcdef"
    wrong = key[:-1] + "0"
    with Server({"500": 0.1}, key=key, answer=lambda p: answer(p) + f"\nIt is {key}.") as server:
        monkeypatch.setenv("OPENAI_API_KEY", key)
        code, *said = command(selfinstruct, *arguments(tmp_path / "r", server, 60))
        assert code == 0, said
        monkeypatch.setenv("OPENAI_API_KEY", wrong)
        code, *refused = command(selfinstruct, *arguments(tmp_path / "w", server, 60))
        assert code == 2 and "Incorrect API key provided: Bearer ***" in refused[1]
    files = (file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    everything = "".join([*said, *refused, *files])
    assert key not in everything and wrong not in everything and "It is ***" in everything


@pytest.mark.parametrize(
    "seeds, words",
    [
        ("", ["0 seeds"]),
        ('{"instruction": "a", "instances": []}', ["line 1", "instances"]),
        ("{", ["line 1", "not JSON"]),
        ('{"instruction": 3}\n', ["line 1", "instruction"]),
        ('{"text": "prose"}', ["line 1", "no instruction"]),
        ('{"instruction": "Say it", "output": "it"}', ["1 seeds", "every prompt takes 3"]),
        ('{"id": "x", "instruction": "Say it", "output": "it"}\n' * 3, ["two seeds", "x"]),
    ],
)
def test_bad_seeds_are_one_line_and_nothing_is_written(tmp_path, command, seeds, words):
    (tmp_path / "s.jsonl").write_text(seeds)
    with Server() as server:
        more = ("--seeds", tmp_path / "s.jsonl")
        result = command(selfinstruct, *arguments(tmp_path / "r", server, 5, *more))
        assert_refused(result, "s.jsonl", *words)
        assert not server.bodies
    assert not (tmp_path / "r").exists()


def test_bad_servers_and_folders_are_one_line(tmp_path, command):
    with Server() as server:
        args = arguments(tmp_path / "r", server, 5)
        for url, word in [("nonsense", "is no server"), ("https://u:p@x/v1", "keep keys out")]:
            args[args.index("--base-url") + 1] = url
            assert_refused(command(selfinstruct, *args), word)
        assert not (tmp_path / "r").exists()
        args[args.index("--base-url") + 1] = "http://127.0.0.1:9/v1"
        code, _, err = command(selfinstruct, *args)
        assert code == 2 and "127.0.0.1:9/v1: no answer in 3 attempts" in err
        (tmp_path / "file").write_text("")
        for out in (tmp_path / "file", "/proc/nowhere"):
            result = command(selfinstruct, *arguments(out, server, 5))
            assert_refused(result, str(out))
        args = arguments(tmp_path / "n", server, 5, "--teacher", "nobody")
        code, _, err = command(selfinstruct, *args)
        assert code == 2 and "does not exist" in err and "Traceback" not in err
        args = arguments(tmp_path / "n", server, 5, "--request", "[1]")
        assert_refused(command(selfinstruct, *args), "--request")
        args = arguments(tmp_path / "n", server, 5, "--batch", "--pipeline", "self-instruct")
        assert_refused(command(selfinstruct, *args), "--batch")


def test_a_folder_is_one_run_s(made, tmp_path, command):
    with Server() as server:
        args = arguments(made, server, 300, "--seed", 4)
        assert_refused(command(selfinstruct, *args), "another run", "seed was 0, now it is 4")
        (tmp_path / "o").mkdir()
        (tmp_path / "o/thesis.txt").write_text("precious")
        assert_refused(command(selfinstruct, *arguments(tmp_path / "o", server, 3)), "thesis", "o")
        assert command(selfinstruct, *arguments(tmp_path / "r", server, 3))[0] == 0
        lock = lock_folder(tmp_path / "r", "")
        result = command(selfinstruct, *arguments(tmp_path / "r", server, 5))
        os.close(lock)
        assert_refused(result, "another process is generating in")
    (tmp_path / "o/settings.json").write_text('{"pipeline": "another", "language": "English"}')
    assert_refused(command(selfinstruct, "reparse", tmp_path / "o"), "settings.json no generate")
    for verb in ("report", "reparse", "export"):
        more = ("--out", tmp_path / "x.json") if verb == "export" else ()
        assert_refused(command(selfinstruct, verb, tmp_path / "nothing", *more), "nothing")


# ---------------------------------------------------------------- what ships


def test_the_seeds_are_175_different_tasks():
    seeds = list(read_jsonl(SEEDS))
    assert [seed["id"] for seed in seeds] == [f"seed_task_{n}" for n in range(175)]
    assert len({seed["name"] for seed in seeds}) == 175
    keys = ["id", "name", "instruction", "instances", "is_classification"]
    for seed in seeds:
        assert list(seed) == keys and isinstance(seed["is_classification"], bool)
        assert seed["instances"] and seed["instruction"].strip() == seed["instruction"]
        for case in seed["instances"]:
            assert list(case) == ["input", "output"] and case["output"].strip()
            assert all(isinstance(text, str) for text in case.values())
    share = sum(seed["is_classification"] for seed in seeds) / 175
    assert 0.28 <= share <= 0.38
    with_input = sum(bool(seed["instances"][0]["input"]) for seed in seeds) / 175
    assert 0.5 <= with_input <= 0.7
    openings = Counter(seed["instruction"].split()[0].lower() for seed in seeds)
    assert len(openings) >= 70 and max(openings.values()) <= 6
    assert sum(not seed["instruction"].isascii() for seed in seeds) >= 8
    texts = [seed["instruction"] for seed in seeds]
    for place, text in enumerate(texts):
        for other in texts[:place]:
            assert rouge_l(text, other, tokenize_unicode) < 0.7, (text, other)


def test_the_teacher_s_prompt_is_numbered_rightly_and_asks_for_what_alpaca_s_asked():
    text = (ROOT / "data/prompt.txt").read_text()
    numbers = [int(n) for n in re.findall(r"^(\d+)\.", text, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 8
    for word in ("20 diverse tasks", "{language}", "<noinput>", "###", "100 words"):
        assert word in text
    assert text.endswith("20 tasks:\n\n")


def test_a_batch_that_has_every_kind_of_line():
    good = {"choices": [{"message": {"content": "x"}}], "id": "a"}
    assert batch.reply_of({"response": {"status_code": 200, "body": good}}).text == "x"
    failed = {"response": {"status_code": 500, "body": good}}
    for line in ({}, {"response": []}, {"response": {"status_code": 200}}, failed):
        assert isinstance(batch.reply_of(line), batch.RequestFailedError)


@pytest.mark.parametrize("said", ["{", "[]", "{}", '{"id": 3, "status": 3, "data": 3}'])
def test_a_batch_server_s_odd_answers_are_asked_for_again(said):
    for read in (batch.named, batch.described, batch.page_of):
        with pytest.raises(batch.RetryableError):
            read(said)


@pytest.mark.parametrize("errors", [None, "x", {}, {"data": 3}, {"data": []}])
def test_trouble_that_nobody_tells(errors):
    assert batch.trouble({"errors": errors}) == "it has no results"


def test_a_batch_of_ours_is_found_on_any_page_and_a_circle_ends():
    first = {"data": [{"id": "a", "status": "x"}, 7], "has_more": True}
    ours = {"id": "b", "status": "x", "metadata": {"name": "ours"}}
    later = {"data": [ours, first["data"][0]], "has_more": True}
    asked = []

    class Client:
        async def call(self, endpoint, method, path, read):
            asked.append(path)
            return read(json.dumps(later if "after" in path else first))

    for name, found in (("ours", ours), ("nobody's", None)):
        assert asyncio.run(batch.find(Client(), None, name)) == found
    assert asked == ["batches?limit=100", "batches?limit=100&after=a"] * 2
