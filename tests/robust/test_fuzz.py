"""Every file that a command reads, damaged in a thousand ways: one line, or a finite result.

A reader is one line of READERS: the file to damage, and the command that reads it. If the file is
refused, nothing may have been written; nothing may hang, and no traceback may appear. The damage
comes from a seed: `FUZZ_SEED=7 FUZZ_COUNT=500 pytest -m robust tests/robust/test_fuzz.py`.
"""

import gzip
import io
import json
import os
import random
import re
import shutil
import signal
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers.annotations import entry, write, write_outputs
from helpers.bpe import write_bpe_model
from helpers.checkpoints import TOKENIZER, shards_of, write_meta
from helpers.diffs import add_noise
from helpers.diffs import write_model as write_numbers
from helpers.generation import SEEDS
from helpers.judges import fair
from helpers.lora import write_adapter, write_lora_base
from helpers.models import small_model
from helpers.mutations import mutate
from helpers.teacher_server import Server, answer
from helpers.training import flags, train
from safetensors.torch import load_file

import alpaca.__main__
import fsdp_train
import selfinstruct
import weightdiff
from alpaca.common.errors import run_command
from alpaca.common.files import INPUTS
from alpaca.weights.checkpoint import is_finite
from alpaca.weights.writer import save_model

SEED, COUNT = int(os.environ.get("FUZZ_SEED", 0)), int(os.environ.get("FUZZ_COUNT", 22))
SECONDS, LONGEST = 20, 500  # for one command; of its message
ROOT_COMMANDS = {"fsdp_train": fsdp_train, "selfinstruct": selfinstruct, "weightdiff": weightdiff}
ANSWER = "generate --device cpu --max-new-tokens 2 Hello --model-dir"
ANSWERS = "answers --device cpu --max-new-tokens 2 --model-dir base/model --set q.jsonl"
SAMPLES = "samples --device cpu --max-new-tokens 2 --model-dir base/model --data q.jsonl --n 1"
JUDGE = "judge a b --base-url URL --judge m --retry-wait 0.01 --max-replies 1"
TEACHER = "selfinstruct generate --num 5 --base-url URL --retry-wait 0.01"
READERS = {  # a file, and the command that reads it
    "base/model/config.json": f"{ANSWER} base/model",
    "base/model/tokenizer.model": f"{ANSWER} base/model",
    "base/model/model.safetensors": f"{ANSWER} base/model",
    "bpe/tokenizer.json": f"{ANSWER} bpe",
    "bpe/tokenizer_config.json": f"{ANSWER} bpe",
    "base/records.json": "TRAIN x --plan",
    "preferences.jsonl": "TRAIN x --plan --objective dpo --data preferences.jsonl",
    "shards/model.safetensors.index.json": "convert shards new",
    "bin/pytorch_model.bin": "convert bin new",
    "meta/params.json": "convert meta new --tokenizer base/model",
    "meta/consolidated.00.pth": "convert meta new --tokenizer base/model",
    "f32.gguf": "convert f32.gguf new",
    "q4_0.gguf": f"{ANSWER} q4_0.gguf",
    "bpe.gguf": f"{ANSWER} bpe.gguf",
    "int8/config.json": f"{ANSWER} int8",
    "int8/model.safetensors": f"{ANSWER} int8",
    "int4/model.safetensors": f"{ANSWER} int4",
    "adapter/adapter_config.json": "merge --base base/model --adapter adapter --out new",
    "adapter/adapter_model.safetensors": "merge --base base/model --adapter adapter --out new",
    "tuned/model.safetensors": "quantize --model-dir tuned --bits 8 --out new",
    "diff/manifest.json": "weightdiff recover --base plain --diff diff --tuned new",
    "diff/manifest.sha256": "weightdiff verify --base plain --diff diff",
    "diff/bits/model.safetensors": "weightdiff recover --base plain --diff diff --tuned new",
    "float/model.safetensors": "weightdiff recover --base plain --diff float --tuned new",
    "data.jsonl.gz": "curate report data.jsonl.gz --out new.html",
    "data.jsonl": "curate lint data.jsonl --fix new.json --dropped dropped.json",
    "sharegpt.json": "curate sources sharegpt.json --tokenizer base/model",
    "seeds.jsonl": f"{TEACHER} --teacher m --out new --seeds seeds.jsonl",
    "run/settings.json": f"{TEACHER} --teacher m --out run",
    "run/responses.jsonl": "curate report run",
    "run/records.jsonl": "selfinstruct export run --out new.json",
    "run/rejected.jsonl": f"{TEACHER} --teacher m --out run",
    "run/seeds.json": "curate report run",
    "teachers.json": f"{TEACHER} --teachers teachers.json --out new",
    "corpus.txt": "train-tokenizer corpus.txt --vocab-size 300 --out new.model",
    "marked.txt": "watermark --tokenizer base/model marked.txt",
    "q.jsonl": f"{ANSWERS} --out new",
    "drawn.jsonl": f"{SAMPLES} --out drawn.jsonl",
    "a/model_outputs.json": "blind start a b --out new",
    "annotations.json": "score annotations.json --plot new.svg",
    "blind/ann/items.jsonl": "blind rate blind/ann",
    "blind/ann/settings.json": "blind unblind blind a b --early",
    "blind/ann/ratings.jsonl": "blind unblind blind a b --early",
    "judged/settings.json": f"{JUDGE} --out judged",
    "judged/responses.jsonl": f"{JUDGE} --out judged",
    "pool.json": f"{JUDGE} --annotators pool.json --flip 0.5 --out new",
    "answered/answers.jsonl": f"{ANSWERS} --out answered",
    "samples.jsonl": "best-of samples.jsonl --check exact --out new.json --pairs newer.json",
    "trained/settings.json": "TRAIN trained",
    "trained/metrics.jsonl": "TRAIN trained",
    "stopped/checkpoints/step-000002/index.json": "TRAIN stopped",
    "stopped/checkpoints/step-000002/rank-00000.safetensors": "TRAIN stopped",
}


def reply(prompt: str) -> str:
    return fair(prompt) if "=====" in prompt else answer(prompt)


@pytest.fixture(scope="module")
def server():
    with Server(answer=reply) as running:
        yield running


@pytest.fixture(scope="module")
def invoke(server):
    """invoke(words) -> (exit code, stdout, stderr), in the current folder."""

    def run(text: str) -> tuple[int, str, str]:
        name, *words = text.replace("URL", server.url).split()
        if name == "TRAIN":
            out, *more = words
            return train([*flags(Path("base"), Path(out), epochs=0.5, save_every=1), *more])
        main = ROOT_COMMANDS[name].main if name in ROOT_COMMANDS else alpaca.__main__.main
        words = words if name in ROOT_COMMANDS else [name, *words]
        code, out, err = 0, io.StringIO(), io.StringIO()
        INPUTS.clear()
        with (
            mock.patch.object(sys, "argv", ["alpaca", *words]),
            mock.patch.object(sys, "stdin", io.StringIO("a\nq\n")),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            try:
                run_command(main)
            except SystemExit as exit_:
                code = exit_.code
        return code, out.getvalue(), err.getvalue()

    return run


@pytest.fixture(scope="module")
def world(tmp_path_factory, invoke):
    """A folder with a small file of every kind, and the current folder."""
    folder = tmp_path_factory.mktemp("world")
    before = os.getcwd()
    os.chdir(folder)
    write_lora_base(Path("base"))
    write_adapter(Path("base"), Path("adapter"))
    write_bpe_model(Path("bpe"), "llama-bpe")
    model = small_model(vocab_size=1024)
    with shards_of(300_000):
        save_model(model, model.config, Path("shards"), tokenizer=TOKENIZER)
    shutil.copytree("base/model", "bin")
    torch.save(load_file("bin/model.safetensors"), "bin/pytorch_model.bin")
    Path("bin/model.safetensors").unlink()
    write_meta(model, Path("meta"), shards=1)
    write_numbers(Path("plain"))
    write_numbers(Path("tuned"), change=add_noise)
    records = [{"instruction": f"Say {n}.", "input": "", "output": f"{n} it is"} for n in range(6)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    Path("data.jsonl").write_text(lines)
    Path("data.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    Path("q.jsonl").write_text(lines)
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    samples = [record | {"outputs": [record["output"], "no"]} for record in records]
    samples.append({"conversations": turns, "outputs": ["Hello", "Bye"]})
    Path("samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    said = {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}
    judged = [{"instruction": "Hi", "output_1": "a", "output_2": "b", "preference": 1.7}]
    judged += [judged[0] | {"swapped": swapped} for swapped in (False, True)]
    dialogue = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: c"}
    lines_of_pairs = [
        said,
        said | {"prompt": [{"role": "user", "content": "x"}]},
        *judged,
        dialogue,
    ]
    Path("preferences.jsonl").write_text("\n".join(map(json.dumps, lines_of_pairs)))
    write(Path("sharegpt.json"), [{"conversations": turns}, *records])
    write(Path("teachers.json"), [{"model": "m", "weight": 1}, {"model": "n", "price_in": 2}])
    pool = [{"name": "x", "weight": 1}, {"name": "y", "question": "Which?", "temperature": 1}]
    write(Path("pool.json"), pool)
    shutil.copy(SEEDS, "seeds.jsonl")
    Path("corpus.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    Path("marked.txt").write_text("The quick brown fox jumps over the lazy dog. " * 9)
    entries = [entry(n, 1 + n % 2) for n in range(8)]
    write(Path("annotations.json"), entries)
    for name in ("a", "b"):
        texts = {record["instruction"]: f"{name} {n}" for n, record in enumerate(records)}
        write_outputs(Path(name), f"model {name}", texts)
    for text in (
        "convert base/model f32.gguf --type f32",
        "convert bpe bpe.gguf",
        "convert base/model q4_0.gguf --type q4_0",
        "quantize --model-dir base/model --bits 8 --out int8",
        "quantize --model-dir base/model --bits 4 --out int4",
        "weightdiff make --base plain --tuned tuned --diff diff",
        "weightdiff make --base plain --tuned tuned --diff float --format alpaca",
        READERS["run/settings.json"],
        "blind start a b --out blind --raters ann",
        READERS["blind/ann/items.jsonl"],
        READERS["judged/settings.json"],
        READERS["answered/answers.jsonl"],
        READERS["drawn.jsonl"],
        READERS["trained/settings.json"],
    ):
        code, _, err = invoke(text)
        assert code == 0, (text, err)
    with mock.patch.object(fsdp_train, "save_result", side_effect=OSError("no space")):
        assert invoke("TRAIN stopped")[0] == 2
    yield folder
    os.chdir(before)


def contents_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def limited(seconds: int):
    def stop(*_):
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def complaint(world: Path, invoke, file: Path, text: str) -> str:
    """What is wrong with how a damaged file was met; empty if nothing is."""
    before = contents_of(world)
    try:
        with limited(SECONDS):
            code, out, err = invoke(text)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    after = contents_of(world)
    line = err.strip().split("\n")[-1]
    if code == 0:
        if re.search(r"\b(nan|inf)\b", out):
            return f"not finite: {out[:300]}"
        damaged = load_file(file) if file.suffix == ".safetensors" and file in after else {}
        new = (load_file(p) for p in after.keys() - before.keys() if p.suffix == ".safetensors")
        written = [tensor for tensors in new for tensor in tensors.values()]
        if all(map(is_finite, damaged.values())) and not all(map(is_finite, written)):
            return "wrote tensors that are not finite"
    elif code != 2:
        return f"exit code {code}: {err[-300:]}"
    elif "error: " not in line or len(line) > LONGEST or "Traceback" in err:
        return f"not one line of at most {LONGEST} characters: {err[-1000:]!r}"
    elif after != before:
        paths = sorted(path for path in before | after if before.get(path) != after.get(path))
        return f"refused, but changed {[str(path.relative_to(world)) for path in paths]}"
    return ""


def restore(world: Path, contents: dict[Path, bytes]) -> None:
    """Put back what a command has changed, remove what it has made."""
    now = contents_of(world)
    for path in now.keys() - contents.keys():
        path.unlink()
    for path in sorted(world.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    for path, content in contents.items():
        if now.get(path) != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


@pytest.mark.parametrize("name", READERS)
def test_damaged_file_is_one_line_or_a_finite_result(world, invoke, name):
    contents, complaints = contents_of(world), []
    for number in range(COUNT):
        damaged = mutate(random.Random(f"{SEED} {name} {number}"), name, contents[world / name])
        (world / name).write_bytes(damaged)
        if found := complaint(world, invoke, world / name, READERS[name]):
            complaints.append(f"{number}: {found}")
        restore(world, contents)
    assert not complaints, "\n".join(complaints)
