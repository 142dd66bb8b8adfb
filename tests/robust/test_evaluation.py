"""Answers, judging and rating killed at any point: what has arrived is not lost or asked again."""

import signal
import subprocess
import sys
import time

from helpers.annotations import read_outputs, write, write_outputs
from helpers.benchmarks import hub_records, write_jsonl
from helpers.commands import ROOT, begin
from helpers.judges import fair, judge
from helpers.teacher_server import Server

from alpaca.common.json_files import read_log


def kill_when(process, condition) -> None:
    while process.is_alive() and not condition():
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def count(log) -> int:
    return sum(1 for _ in read_log(log))


def test_answers_killed_and_resumed_end_in_the_same_file(command, tmp_path):
    tasks = [{"instruction": f"Say {'word ' * (n % 7)}{n}."} for n in range(16)]
    flags = ["--set", write(tmp_path / "s.json", tasks), "--model-dir", ROOT / "data/tiny-llama"]
    flags += ["--max-new-tokens", 12, "--max-batch-size", 2, "--temperature", 1]
    assert command("answers", "--out", tmp_path / "quiet", *flags)[0] == 0
    log = tmp_path / "o/answers.jsonl"
    for more in (1, 5):
        before = count(log)
        process = begin("answers", "--out", tmp_path / "o", *flags)
        kill_when(process, lambda enough=before + more: count(log) >= enough)
        assert not (tmp_path / "o/model_outputs.json").exists()
    stored = log.read_bytes()
    with log.open("ab") as torn:  # and once more, in the middle of a line
        torn.write(b'{"id": "15", "outp')
    assert command("answers", "--out", tmp_path / "o", *flags)[0] == 0
    assert log.read_bytes().startswith(stored[: stored.rindex(b"\n") + 1])
    ids = [one["id"] for one in read_log(log)]
    assert sorted(ids, key=int) == [str(n) for n in range(16)]
    assert read_outputs(tmp_path / "o") == read_outputs(tmp_path / "quiet")


def test_a_benchmark_killed_and_resumed_ends_in_the_same_results(command, tmp_path):
    flags = ["--model-dir", ROOT / "data/tiny-llama", "--dtype", "fp32", "--max-new-tokens", 48]
    tasks = [write_jsonl(tmp_path / f"{t}.jsonl", hub_records(t, 32)) for t in ("boolq", "gsm8k")]
    flags += ["--max-batch-size", 2, "--tasks", *tasks]
    assert command("benchmark", "--out", tmp_path / "quiet", *flags)[0] == 0
    log = tmp_path / "o/scores.jsonl"
    for more in (1, 32):  # in the middle of either task
        before = count(log)
        process = begin("benchmark", "--out", tmp_path / "o", *flags)
        kill_when(process, lambda enough=before + more: count(log) >= enough)
        assert not (tmp_path / "o/results.json").exists()
    assert command("benchmark", "--out", tmp_path / "o", *flags)[0] == 0
    assert sorted(line["question"] for line in read_log(log)) == list(range(64))
    results = [(tmp_path / name / "results.json").read_text() for name in ("quiet", "o")]
    assert results[0] == results[1]


def test_samples_killed_and_resumed_end_in_the_same_file(command, tmp_path):
    tasks = [{"instruction": f"Say {'word ' * (n % 7)}{n}.", "output": "x"} for n in range(12)]
    flags = ["--data", write(tmp_path / "s.json", tasks), "--model-dir", ROOT / "data/tiny-llama"]
    flags += ["--max-new-tokens", 12, "--max-batch-size", 3, "--temperature", 1, "--dtype", "fp32"]
    quiet, out = tmp_path / "quiet.jsonl", tmp_path / "o.jsonl"
    assert command("samples", "--out", quiet, *flags)[0] == 0
    for more in (1, 4):
        before = count(out)
        process = begin("samples", "--out", out, *flags)
        kill_when(process, lambda enough=before + more: count(out) >= enough)
    assert 5 <= count(out) < 12
    assert command("samples", "--out", out, *flags)[0] == 0
    assert out.read_text() == quiet.read_text()


def make_two(tmp_path, size: int):
    texts = {name: {f"task {n}": f"{name} {n}" for n in range(size)} for name in ("m", "b")}
    return [write_outputs(tmp_path / name, name, texts[name]) for name in texts]


def test_judge_killed_and_resumed_loses_and_repeats_nothing(command, tmp_path):
    two = make_two(tmp_path, 40)
    with Server(answer=fair) as server:
        assert judge(command, tmp_path / "quiet", server, *two)[0] == 0
    log = tmp_path / "j/responses.jsonl"
    with Server(answer=fair, latency=0.05) as server:
        for more in (3, 17):
            before, flags = server.seen["answers"], ("--judge", "m", "--concurrency", 4)
            process = begin("judge", *two, "--out", log.parent, "--base-url", server.url, *flags)
            kill_when(process, lambda enough=before + more: server.seen["answers"] >= enough)
        assert 0 < count(log) < 60
        assert judge(command, tmp_path / "j", server, *two)[0] == 0
    ids = [one["id"] for one in read_log(log)]
    assert len(ids) == len(set(ids)) == 80
    # Only what was on its way when a kill came is asked again: 4 requests at most, twice.
    assert 80 <= server.seen["answers"] <= 80 + 2 * 4
    ours, theirs = (tmp_path / name / "annotations.json" for name in ("j", "quiet"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_rating_killed_has_stored_every_choice(command, tmp_path):
    command("blind", "start", *make_two(tmp_path, 12), "--out", tmp_path / "blind")
    log = tmp_path / "blind/rater/ratings.jsonl"
    words = [sys.executable, "-m", "alpaca", "blind", "rate", log.parent]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=ROOT, **pipes) as process:
        process.stdin.write("a\nb\nu\nt\n")
        process.stdin.flush()
        give_up = time.monotonic() + 60
        while count(log) < 4 and time.monotonic() < give_up:
            time.sleep(0.005)
        process.kill()
        screen = process.stdout.read()
    assert "===== 3 of 12" not in screen[: screen.index("===== 2 of 12")]
    assert [line["choice"] for line in read_log(log)] == ["a", "b", None, "tie"]
    done = subprocess.run(words, cwd=ROOT, input="s\n", capture_output=True, text=True, check=True)
    assert "===== 3 of 12" in done.stdout and "9 left" in done.stdout
    assert [line["place"] for line in read_log(log)] == [0, 1, 1, 1, 2]
