"""Kills, Ctrl-C, full disks, storms of faults: no answer is lost once it has arrived, and at most
the requests in flight are asked again."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers.commands import ROOT
from helpers.generation import FOUR_STAGES, SEEDS, arguments, check_whole, comparable, read
from helpers.teacher_server import ODD, THINGS, Server, answer

import selfinstruct
from alpaca.common.json_files import read_log
from alpaca.datagen.four_stage import SelfInstruct

EVERY_FAULT = ["429", "500", "503", "reset", "half", "stall", *ODD]


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


def start_and_kill(out: Path, server: Server, num: int, after: float, *more, **how) -> None:
    """Kill a run `after` seconds after it has stored an answer of its own."""
    file, before = out / "responses.jsonl", 0
    if file.exists():
        before = file.stat().st_size
    process = start(out, server, num, *more, **how)
    while process.poll() is None and (not file.exists() or file.stat().st_size == before):
        time.sleep(0.005)
    time.sleep(after)
    process.kill()
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"it ended before: {err}"


@pytest.mark.parametrize("kills, num", [(3, 400), pytest.param(20, 2500, marks=pytest.mark.slow)])
def test_killed_run_resumes_to_the_same_records(tmp_path, command, kills, num):
    rng = random.Random(kills)
    with Server({"500": 0.1}, latency=0.15, seed=kills) as server:
        for _ in range(kills):
            start_and_kill(tmp_path / "r", server, num, rng.uniform(0, 0.4), "--concurrency", 6)
        assert command(selfinstruct, *arguments(tmp_path / "r", server, num))[0] == 0
    check_whole(tmp_path / "r", num)
    responses = read(tmp_path / "r", "responses")
    ids = {entry["provenance"]["request_id"] for entry in responses}
    assert len(ids) == len(responses)
    again = server.prompts.total() - len(server.prompts)
    assert again <= kills * 6, "at most the requests in flight are asked again"
    with Server() as server:
        assert command(selfinstruct, *arguments(tmp_path / "s", server, num))[0] == 0
    assert comparable(tmp_path / "r") == comparable(tmp_path / "s")


def test_killed_four_stages_resume_to_the_same_records(tmp_path, command, monkeypatch):
    monkeypatch.setattr(SelfInstruct, "window", 8)
    rng = random.Random(0)

    def slowly(prompt: str) -> str:
        time.sleep(rng.uniform(0, 0.05))
        return answer(prompt)

    with Server() as server:
        args = arguments(tmp_path / "s", server, 100, *FOUR_STAGES)
        assert command(selfinstruct, *args)[0] == 0
    with Server(answer=slowly) as server:
        before = "selfinstruct.SelfInstruct.window = 8"
        more = (*FOUR_STAGES, "--concurrency", 9)
        start_and_kill(tmp_path / "r", server, 100, 0.3, *more, before=before)
        stored = len(read(tmp_path / "r", "responses"))
        assert 0 < stored < len(read(tmp_path / "s", "responses"))
        args = arguments(tmp_path / "r", server, 100, *FOUR_STAGES)
        assert command(selfinstruct, *args)[0] == 0
    assert comparable(tmp_path / "r") == comparable(tmp_path / "s")


SLOW_DISK = """
import os, time
fsync = os.fsync
def slow_fsync(handle):
    if "responses.jsonl" in os.readlink(f"/proc/self/fd/{handle}"):
        time.sleep(3)
    fsync(handle)
os.fsync = slow_fsync
"""


def test_kill_loses_no_answer_that_has_arrived(tmp_path, command):
    """Answers are in the file before the disk has confirmed any of them, and before any is used."""
    with Server() as server:
        process = start(tmp_path / "r", server, 400, "--concurrency", 8, before=SLOW_DISK)
        while server.seen["answers"] < 8:
            time.sleep(0.01)
        time.sleep(1)
        process.kill()
        process.communicate()
        assert server.seen["answers"] == 8 and not (tmp_path / "r/records.jsonl").exists()
        assert command(selfinstruct, *arguments(tmp_path / "r", server, 400))[0] == 0
        assert max(server.prompts.values()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stores_the_answers_in_flight(tmp_path, number):
    with Server(latency=0.3) as server:
        process = start(tmp_path / "r", server, 5000, "--concurrency", 8)
        while server.seen["answers"] < 20:
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 130, err
        assert "waiting for" in err and "answers in flight" in err and err.endswith("interrupted\n")
        assert "Traceback" not in err and "never retrieved" not in err
        assert len(read(tmp_path / "r", "responses")) == server.seen["answers"]


def test_ctrl_c_starts_no_further_attempt(tmp_path):
    with Server({"500": 1.0}, latency=0.1) as server:
        more = ("--concurrency", 4, "--max-retries", 59, "--retry-wait", 0.3)
        process = start(tmp_path / "r", server, 5000, *more)
        until = time.monotonic() + 30
        while len(server.bodies) < 12 and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        began, attempts = time.monotonic(), len(server.bodies)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in err
        assert time.monotonic() - began < 5 and len(server.bodies) <= attempts + 4
    assert not (tmp_path / "r/responses.jsonl").exists()  # the next run asks them again


def test_full_disk_is_one_line_and_loses_nothing(tmp_path, command):
    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    with Server() as server:
        seeds = tmp_path / "seeds.jsonl"
        seeds.write_text("".join(SEEDS.open().readlines()[:12]))
        few = ("--seeds", seeds)
        process = start(tmp_path / "r", server, 300, *few, preexec_fn=small_disk)
        _, err = process.communicate()
        assert process.returncode == 2
        assert err.count("error:") == 1 and "File too large" in err and "Traceback" not in err
        assert len(server.bodies) <= len([*read_log(tmp_path / "r/responses.jsonl")]) + 32
        assert command(selfinstruct, *arguments(tmp_path / "r", server, 300, *few))[0] == 0
        assert command(selfinstruct, *arguments(tmp_path / "s", server, 300, *few))[0] == 0
    check_whole(tmp_path / "r", 300)
    assert comparable(tmp_path / "r") == comparable(tmp_path / "s")


@pytest.mark.parametrize("seed", range(3))
def test_storm_of_faults_ends_complete_and_bounded(tmp_path, command, seed):
    faults = random.Random(seed).sample(EVERY_FAULT, 5) if seed else EVERY_FAULT
    with Server({name: 0.55 / len(faults) for name in faults}, seed=seed) as server:
        began = time.monotonic()
        args = arguments(tmp_path / "r", server, 120, "--timeout", 0.7)
        result = command(selfinstruct, *args)
        assert result[0] == 0 and time.monotonic() - began < 25, result
        assert len(server.bodies) <= 8 * len(read(tmp_path / "r", "responses"))
        per_prompt = Counter(json.dumps(body) for body in server.bodies)
        assert max(per_prompt.values()) <= 8 and server.most <= 32
    assert len(read(tmp_path / "r", "records")) == 120


def test_pool_of_fifty_thousand_keeps_up_with_32_requests(tmp_path):
    """Sixteen answers a second leave 1/16 s of a processor for each. The limit is four times that,
    since a busy machine takes more for the same work."""

    def processor_seconds(records: int) -> float:
        while not file.exists() or file.read_bytes().count(b"\n") < records:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    rng = random.Random(0)
    words = (*THINGS.split(), *(f"word{i}" for i in range(800)))
    with open(tmp_path / "seeds.jsonl", "w") as seeds:
        for number in range(50_000):
            text = " ".join(rng.choices(words, k=rng.randint(5, 15)))
            case = {"input": "", "output": "x"}
            seed = {"id": f"s{number}", "instruction": text, "instances": [case]}
            seeds.write(json.dumps(seed) + "\n")
    file = tmp_path / "r/records.jsonl"
    with Server(latency=0.5) as server:
        process = start(tmp_path / "r", server, 10**6, "--seeds", tmp_path / "seeds.jsonl")
        began = processor_seconds(100)
        ended = processor_seconds(100 + 16 * 14)
        process.kill()
        process.communicate()
    assert server.most == 32
    assert (ended - began) / 16 < 4 / 16, "seconds of a processor for each answer"
