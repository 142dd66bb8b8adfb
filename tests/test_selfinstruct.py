"""From seeds to records against a scripted teacher: the loop, its filters, resuming, money."""

import itertools
import json
import os
import random
import re
import shutil
import threading
from collections import Counter
from pathlib import Path

import pytest
from helpers.commands import ROOT, assert_refused
from helpers.generation import SEEDS, arguments, check_whole, comparable, read
from helpers.teacher_server import Server, answer

import selfinstruct
from alpaca.common.files import lock_path
from alpaca.common.json_files import read_log
from rougel import rouge_l, tokenize_unicode

EXPENSIVE = ("--price-in", 1000, "--price-out", 9000)  # dollars per million tokens


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A run of 200 records, for the tests that only look."""
    out = tmp_path_factory.mktemp("made") / "run"
    with Server() as server, pytest.MonkeyPatch.context() as patch:
        argv = ["selfinstruct.py", *arguments(out, server, 200, "--licence", "test only")]
        patch.setattr("sys.argv", argv)
        selfinstruct.main()
    return out


def numbered(*tasks: tuple[str, str, str]) -> str:
    return "###\n".join(
        f"{n}. Instruction: {i}\n{n}. Input:\n{x}\n{n}. Output:\n{o}\n"
        for n, (i, x, o) in enumerate(tasks, 4)
    )


# ---------------------------------------------------------------- the loop


def test_records_have_alpaca_s_fields_and_provenance(run_folder):
    check_whole(run_folder, 200)
    seeds = {seed["id"]: seed for seed in read_log(SEEDS)}
    responses = {entry["id"]: entry for entry in read(run_folder, "responses")}
    for record in read(run_folder, "records"):
        source = record["provenance"]
        assert source["teacher"] == "m" and source["endpoint"] == "chat"
        assert source["licence"] == "test only" and re.match(r"20\d\d-\d\d-\d\dT", source["time"])
        body = json.loads(responses[source["request"]]["response"])
        assert source["request_id"] == body["id"] and len(set(source["prompt_seeds"])) == 3
        content = body["choices"][0]["message"]["content"]
        assert record["instruction"] in content and record["output"] in content
        assert set(source["prompt_seeds"]) <= seeds.keys()
        assert len(record["most_similar_instructions"]) == 10
    assert len(responses) < 200 / 10, "no more is asked than is needed"


def test_same_answers_make_the_same_records_in_any_order(run_folder, tmp_path, command):
    with Server({"500": 0.2, "half": 0.2}, latency=0.02) as server:
        more = ("--concurrency", 3, "--licence", "test only")
        assert command(selfinstruct, *arguments(tmp_path / "b", server, 200, *more))[0] == 0
    assert comparable(tmp_path / "b") == comparable(run_folder)
    with Server() as server:
        assert command(selfinstruct, *arguments(tmp_path / "c", server, 50, "--seed", 1))[0] == 0
    assert comparable(tmp_path / "c") != comparable(run_folder)[:50]


def test_resuming_to_a_larger_number_is_the_same_as_one_run(run_folder, tmp_path, command):
    more = ("--licence", "test only")
    with Server() as server:
        for num in (7, 60, 60, 200):
            assert command(selfinstruct, *arguments(tmp_path / "b", server, num, *more))[0] == 0
            assert len(read(tmp_path / "b", "records")) == num
        check_whole(tmp_path / "b", 200)
        assert comparable(tmp_path / "b") == comparable(run_folder)
        for name in ("records", "rejected", "responses"):  # torn as a kill may leave them
            file = tmp_path / f"b/{name}.jsonl"
            file.write_bytes(file.read_bytes()[:-40])
            if name == "responses":  # whose answers make the records again
                for derived in ("records", "rejected"):
                    (tmp_path / f"b/{derived}.jsonl").unlink()
            assert command(selfinstruct, *arguments(tmp_path / "b", server, 200, *more))[0] == 0
            assert comparable(tmp_path / "b") == comparable(run_folder)
    assert sorted(server.prompts.values())[-2:] == [1, 2], "only the torn answer is asked again"


def test_rejected_tasks_are_stored_with_their_reason(tmp_path, command):
    first = "Name seven rivers of the southern plain"
    text = numbered(
        (first, "<noinput>", "Seven"),
        ("Name seven rivers of the northern plain", "", "None"),  # 6 of 7 words
        ("Too short this", "", "x"),
        ("Draw a cat on a mat", "", "x"),
        ("Say what is missing at the end", "", ""),
        ("Tell a story about the tiny violin of my aunt", "an aunt", "Once"),
    )
    with Server(answer=lambda prompt: text) as server:
        result = command(selfinstruct, *arguments(tmp_path / "r", server, 2))
        assert result[0] == 0, result
    rejected = read(tmp_path / "r", "rejected")
    assert [line["why"] for line in rejected] == ["similar", "short", "asks for draw", "format"]
    similarity = rejected[0]["similar_to"], rejected[0]["similarity"]
    assert similarity == (first, pytest.approx(6 / 7))
    records = read(tmp_path / "r", "records")
    assert [(r["instruction"][:12], r["input"], r["output"]) for r in records] == [
        ("Name seven r", "", "Seven"), ("Tell a story", "an aunt", "Once")
    ]  # fmt: skip


@pytest.mark.parametrize("kept", [1, 0], ids=["the same again", "no tasks"])
def test_teacher_without_anything_new_ends_the_run(tmp_path, command, kept):
    again = numbered(("Say the same thing again and again", "", "again"))
    text = again if kept else "I am sorry, I cannot do that."
    with Server(answer=lambda prompt: text) as server:
        result = command(selfinstruct, *arguments(tmp_path / "r", server, 10, "--concurrency", 4))
        assert result[0] == 2 and "brought nothing new" in result[2]
        assert server.seen["answers"] < 51 + 256
    assert len([*read_log(tmp_path / "r/records.jsonl")]) == kept
    with Server() as server:  # the useless answers do not stop the next run
        assert command(selfinstruct, *arguments(tmp_path / "r", server, 10))[0] == 0


def test_another_language_allows_its_script(tmp_path, command):
    def chinese(prompt: str) -> str:
        rng = random.Random(prompt)
        some = "".join(chr(0x4E00 + rng.randrange(3000)) for _ in range(12))
        return numbered((f"请解释{some}", "", "好"), (f"请解释{some}吧", "", "好"))

    with Server(answer=chinese) as server:
        more = ("--language", "Chinese")
        assert command(selfinstruct, *arguments(tmp_path / "r", server, 5, *more))[0] == 0
        assert "Write in Chinese" in server.bodies[0]["messages"][0]["content"]
    assert {line["why"] for line in read(tmp_path / "r", "rejected")} == {"similar"}
    assert len(read(tmp_path / "r", "records")) == 5


def test_answers_are_judged_in_another_thread(tmp_path, command, monkeypatch):
    threads, judge_answer = set(), selfinstruct.judge_answer

    def watched(*given):
        threads.add(threading.current_thread())
        return judge_answer(*given)

    monkeypatch.setattr(selfinstruct, "judge_answer", watched)
    with Server() as server:
        assert command(selfinstruct, *arguments(tmp_path / "r", server, 5))[0] == 0
    assert threads and threading.main_thread() not in threads


# ---------------------------------------------------------------- export and report


@pytest.mark.parametrize("name", ["records.jsonl", "responses.jsonl", "link.json"])
def test_export_never_replaces_the_run(run_folder, tmp_path, command, name):
    copy = shutil.copytree(run_folder, tmp_path / "copy")
    (copy / "link.json").symlink_to(copy / "records.jsonl")
    before = (copy / name).read_bytes()
    result = command(selfinstruct, "export", copy, "--out", tmp_path / "copy/../copy" / name)
    assert_refused(result, name, "name another output")
    assert (copy / name).read_bytes() == before


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"item": "0.0", "instruction": 5, "input": "", "output": "x"}', "instruction is 5"),
        ('{"item": "0.0", "instruction": NaN, "input": "", "output": "x"}', "instruction is NaN"),
        ('{"item": "0.0", "instruction": "a"}', "it has no output"),
        ("[1]", "line 1 is [1], an object was expected"),
        ("[" * 100_000, "nested more than 64 deep"),
    ],
    ids=["number", "NaN", "no output", "list", "deep"],
)
def test_export_and_report_refuse_damaged_records(tmp_path, command, line, words):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/records.jsonl").write_text(line + "\n")
    result = command(selfinstruct, "export", tmp_path / "r", "--out", tmp_path / "x.json")
    assert_refused(result, "records.jsonl, line 1", words)
    assert_refused(command("curate", "report", tmp_path / "r"), "records.jsonl, line 1", words)


def test_export_writes_alpaca_s_list(run_folder, tmp_path, command):
    assert command(selfinstruct, "export", run_folder, "--out", tmp_path / "a.json")[0] == 0
    exported = json.loads((tmp_path / "a.json").read_text())
    assert [list(record) for record in exported] == [["instruction", "input", "output"]] * 200
    assert exported[5]["instruction"] == read(run_folder, "records")[5]["instruction"]


def test_curate_report_sums_by_teacher(tmp_path, command):
    with Server({"not JSON": 0.4}, seed=5) as one, Server() as two:
        teachers = [{"model": "a", "weight": 3, "licence": "CC0"}]
        teachers += [{"model": "b", "base_url": two.url, "kind": "completions"}]
        teachers[1] |= {"price_in": 9, "price_out": 9}
        (tmp_path / "t.json").write_text(json.dumps(teachers))
        more = ("--teachers", tmp_path / "t.json")
        assert command(selfinstruct, *arguments(tmp_path / "r", one, 400, *more))[0] == 0
        code, out, _ = command("curate", "report", tmp_path / "r")
        requests = {"a": len(one.prompts), "b": len(two.prompts)}
        assert code == 0 and requests["a"] > requests["b"] > 0
    responses, records = read(tmp_path / "r", "responses"), read(tmp_path / "r", "records")
    costs: Counter = Counter()
    for entry in responses:
        costs[entry["provenance"]["teacher"]] += entry["cost"]
    assert costs["b"] == pytest.approx(9 * sum(two.spent) / 1e6)
    # a response without usage counts as the most it can cost: 3,072 tokens and the prompt's bytes
    unmetered = sum(entry["usage"]["unmetered"] for entry in responses)
    least = (one.spent[0] + 2 * one.spent[1] + unmetered * 2 * 3072) / 1e6
    assert unmetered and least < costs["a"] < least + unmetered * 5000 / 1e6
    kept = Counter(record["provenance"]["teacher"] for record in records)
    for name, kind in (("a", "chat, CC0"), ("b", "completions")):
        (part,) = re.findall(rf"  {name} at http\S+ \({kind}\): (.*)\n", out)
        assert part.startswith(f"{requests[name]} requests, 0 failed, {kept[name]} of ")
        assert f": ${costs[name]:.4f}" in part
        assert ("answers without usage" in part) == (name == "a")
    assert f"Cost so far ${costs.total():.4f}" in out


# ---------------------------------------------------------------- failures and money


def test_prompt_that_is_always_refused_does_not_block_a_run(tmp_path, command):
    with Server() as server:
        assert command(selfinstruct, *arguments(tmp_path / "r", server, 20))[0] == 0
        server.refuse = lambda body: len(str(body)) % 5 == 0
        assert command(selfinstruct, *arguments(tmp_path / "r", server, 400))[0] == 0
    failed = [entry for entry in read(tmp_path / "r", "responses") if "failed" in entry]
    assert failed and all("400" in entry["failed"] for entry in failed)
    assert max(Counter(map(json.dumps, server.bodies)).values()) == 1, "it would be refused again"


def test_server_that_only_fails_ends_the_run(tmp_path, command):
    with Server({"500": 1.0}) as server:
        more = ("--max-retries", 1, "--concurrency", 4)
        result = command(selfinstruct, *arguments(tmp_path / "r", server, 100, *more))
        assert result[0] == 2 and "10 requests in a row without an answer" in result[2]
        assert "Traceback" not in result[2] and len(server.bodies) <= 2 * (10 + 4)
    assert len(read(tmp_path / "r", "responses")) <= 10 + 4
    with Server() as server:  # the run resumes when the server has recovered
        assert command(selfinstruct, *arguments(tmp_path / "r", server, 100))[0] == 0


def test_budget_is_never_exceeded_and_a_larger_one_resumes(tmp_path, command):
    with Server(latency=0.01) as server:
        # an answer costs about $3.6, a request at most $30
        prices = (*EXPENSIVE, "--request", '{"max_tokens": 2000}', "--budget")
        args = arguments(tmp_path / "r", server, 300, *prices, 60)
        code, out, _ = command(selfinstruct, *args)
        spent = sum(entry["cost"] for entry in read(tmp_path / "r", "responses"))
        assert code == 0 and "The budget of $60 does not allow" in out and 30 < spent <= 60
        assert spent == pytest.approx((server.spent[0] * 1000 + server.spent[1] * 9000) / 1e6)
        assert 0 < len(read(tmp_path / "r", "records")) < 300
        args = arguments(tmp_path / "r", server, 300, *prices, 1000)
        code, out, _ = command(selfinstruct, *args)
        assert code == 0 and "does not allow" not in out
        assert max(server.prompts.values()) == 1
    items = [record["item"] for record in read(tmp_path / "r", "records")]
    assert len(items) == len(set(items)) == 300


def test_budget_counts_every_attempt(tmp_path, command):
    with Server({"empty choices": 0.5, "half": 0.2}, seed=3) as server:
        more = (*EXPENSIVE, "--request", '{"max_tokens": 900}', "--budget", 60)
        code, out, err = command(selfinstruct, *arguments(tmp_path / "r", server, 900, *more))
        assert code == 0 and "does not allow another" in out, err
        billed = (server.spent[0] * 1000 + server.spent[1] * 9000) / 1e6
    spent = sum(entry["cost"] for entry in read(tmp_path / "r", "responses"))
    assert 0 < billed <= spent <= 60
    assert spent > 60 - 12, "a request can cost 12: there was room for one"


def test_key_is_in_no_file_and_no_line(tmp_path, monkeypatch, command):
    key = "sk-test-0123456789abcdef"
    wrong = key[:-1] + "0"
    with Server({"500": 0.1}, key=key, answer=lambda p: answer(p) + f"\nIt is {key}.") as server:
        monkeypatch.setenv("OPENAI_API_KEY", key)
        code, *printed = command(selfinstruct, *arguments(tmp_path / "r", server, 60))
        assert code == 0, printed
        monkeypatch.setenv("OPENAI_API_KEY", wrong)
        code, *refused = command(selfinstruct, *arguments(tmp_path / "w", server, 60))
        assert code == 2 and "Incorrect API key provided: Bearer ***" in refused[1]
    files = (file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    everything = "".join([*printed, *refused, *files])
    assert key not in everything and wrong not in everything and "It is ***" in everything


# ---------------------------------------------------------------- users' errors


@pytest.mark.parametrize(
    "seeds, words",
    [
        ("", ["0 seeds"]),
        ('{"instruction": "a", "instances": []}', ["1", "instances"]),
        ("{", ["1", "not JSON"]),
        ('{"instruction": 3}\n', ["1", "instruction"]),
        ('{"text": "prose"}', ["1", "no instruction"]),
        ('{"instruction": "Say it", "output": "it"}', ["1 seeds", "every prompt takes 3"]),
    ],
)
def test_bad_seeds_are_refused(tmp_path, command, seeds, words):
    (tmp_path / "s.jsonl").write_text(seeds)
    with Server() as server:
        more = ("--seeds", tmp_path / "s.jsonl")
        result = command(selfinstruct, *arguments(tmp_path / "r", server, 5, *more))
        assert_refused(result, "s.jsonl", *words)
        assert not server.bodies
    assert not (tmp_path / "r").exists()


def test_bad_servers_and_folders_are_refused(tmp_path, command):
    with Server() as server:

        def generate(out, *more):
            return command(selfinstruct, *arguments(out, server, 5, *more))

        assert_refused(generate(tmp_path / "r", "--base-url", "nonsense"), "--base-url")
        assert_refused(generate(tmp_path / "r", "--budget", 5, "--price-in", 0), "prices of m")
        (tmp_path / "latin.txt").write_bytes(b"\xe9")
        assert_refused(generate(tmp_path / "r", "--prompt", tmp_path / "latin.txt"), "UTF-8")
        assert_refused(generate(tmp_path / "r", "--teacher", "a", "--teachers", "b"), "not allowed")
        for teachers in (["--teacher", "a", "--teacher", "b"], ["--teacher", "model=a,weight=2"]):
            assert_refused(generate(tmp_path / "r", *teachers), "--teachers FILE describes several")
        assert not (tmp_path / "r").exists()
        code, _, err = generate(tmp_path / "r", "--base-url", "http://127.0.0.1:9/v1")
        assert code == 2 and "127.0.0.1:9/v1: no answer in 3 attempts" in err
        (tmp_path / "file").write_text("")
        for out in (tmp_path / "file", "/proc/nowhere"):
            assert_refused(generate(out), str(out))
        code, _, err = generate(tmp_path / "n", "--teacher", "nobody")
        assert code == 2 and "does not exist" in err and "Traceback" not in err


def test_missing_key_is_refused_before_anything_is_sent(tmp_path, command, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    openai = ("generate", "--out", tmp_path / "r", "--teacher", "m")
    assert_refused(command(selfinstruct, *openai), "$OPENAI_API_KEY is not set")
    with Server() as server:
        result = command(
            selfinstruct, *arguments(tmp_path / "r", server, 3, "--key-env", "gsk_aB1")
        )
        assert_refused(result, "--key-env takes the name of an environment variable")
        assert "gsk" not in result[2] and not server.bodies
    assert not (tmp_path / "r").exists()


def test_unusable_proxy_is_refused(tmp_path, command, monkeypatch):
    for proxy in ("socks5://me:secret@localhost:1", "odd://me:secret@localhost:1"):
        monkeypatch.setenv("ALL_PROXY", proxy)
        with Server() as server:
            result = command(selfinstruct, *arguments(tmp_path / "r", server, 3))
        assert_refused(result, "proxy of the environment")
        assert "secret@" not in result[2] and not (tmp_path / "r").exists()


def test_folder_of_another_run_is_refused(run_folder, tmp_path, command):
    with Server() as server:
        args = arguments(run_folder, server, 300, "--seed", 4)
        assert_refused(command(selfinstruct, *args), "another run", "seed was 0, now it is 4")
        (tmp_path / "o").mkdir()
        (tmp_path / "o/thesis.txt").write_text("precious")
        assert_refused(command(selfinstruct, *arguments(tmp_path / "o", server, 3)), "thesis", "o")
        assert command(selfinstruct, *arguments(tmp_path / "r", server, 3))[0] == 0
        lock = lock_path(tmp_path / "r", "")
        result = command(selfinstruct, *arguments(tmp_path / "r", server, 5))
        os.close(lock)
        assert_refused(result, "another process is generating in")
        (tmp_path / "r/responses.jsonl").write_text('{"id": "0"}\n')
        result = command(selfinstruct, *arguments(tmp_path / "r", server, 5))
        assert_refused(result, "responses.jsonl, line 1: provenance is missing")
    result = command(selfinstruct, "export", tmp_path / "nothing", "--out", tmp_path / "x.json")
    assert_refused(result, "nothing")


# ---------------------------------------------------------------- the files in data/


def test_seed_tasks_are_175_different_tasks():
    seeds = list(read_log(SEEDS))
    assert [seed["id"] for seed in seeds] == [f"seed_task_{n}" for n in range(175)]
    assert len({seed["name"] for seed in seeds}) == 175
    for seed in seeds:
        assert list(seed) == ["id", "name", "instruction", "instances", "is_classification"]
        assert isinstance(seed["is_classification"], bool) and seed["instances"]
        assert seed["instruction"].strip() == seed["instruction"]
        for case in seed["instances"]:
            assert list(case) == ["input", "output"] and case["output"].strip()
            assert all(isinstance(text, str) for text in case.values())
    assert 0.28 <= sum(seed["is_classification"] for seed in seeds) / 175 <= 0.38
    assert 0.5 <= sum(bool(seed["instances"][0]["input"]) for seed in seeds) / 175 <= 0.7
    texts = [seed["instruction"] for seed in seeds]
    openings = Counter(text.split()[0].lower() for text in texts)
    assert len(openings) >= 70 and max(openings.values()) <= 6
    assert sum(not text.isascii() for text in texts) >= 8
    for first, second in itertools.combinations(texts, 2):
        assert rouge_l(first, second, tokenize_unicode) < 0.7, (first, second)


def test_prompt_file_asks_for_what_alpaca_s_asked():
    text = (ROOT / "data/prompt.txt").read_text()
    numbers = [int(n) for n in re.findall(r"^(\d+)\.", text, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 8
    for word in ("20 diverse tasks", "{language}", "<noinput>", "###", "100 words"):
        assert word in text
    assert text.endswith("20 tasks:\n\n")
