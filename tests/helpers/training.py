"""fsdp_train.py in this process or in others, and what it leaves in its folder."""

import io
import json
import math
import os
import random
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from unittest import mock

import pytest
import torch
from torch.distributed.tensor import distribute_tensor

import fsdp_train
from alpaca.common.errors import run_command
from alpaca.common.files import INPUTS
from alpaca.datagen.preferences import load_preferences
from alpaca.training import parallel
from alpaca.training.objectives import AnswerLoss, PackedRow
from alpaca.weights.reward import RewardModel
from alpaca.weights.writer import save_model
from dataset import Examples, encode_all, make_row
from helpers.checkpoints import read_tensors
from helpers.commands import ROOT
from helpers.models import small_config
from model import Llama, LlamaConfig
from tokenizer import load_tokenizer

TOKENIZER = ROOT / "data/tokenizer.model"
LINE = "the red fox and a small dog went home over the old bridge in the evening rain"
EXACT = ("step", "loss", "lr", "grad_norm", "tokens")
LONG = {"epochs": 12, "save_every": 3}  # 30 steps


def write_records(path, count: int, seed: int = 0):
    """Ragged examples: from a word to a few dozen."""
    rng = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(rng.choices(LINE.split(), k=rng.randint(1, most)))

    records = [
        {"instruction": words(8), "input": rng.choice(["", words(20)]), "output": words(40)}
        for _ in range(count)
    ]
    path.write_text(json.dumps(records))
    return path


def write_model(folder, **changes):
    """A small random model with a tokenizer."""
    torch.manual_seed(0)
    model = Llama(small_config(vocab_size=1024, max_position_embeddings=256, **changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    save_model(model, model.config, folder, tokenizer=TOKENIZER)


def write_preferences(path, count: int, seed: int = 0):
    """Pairs of ragged answers."""
    first, second = (json.loads(write_records(path, count, seed + i).read_text()) for i in (0, 1))
    pairs = [
        {"instruction": one["instruction"], "input": one["input"]}
        | {"output_1": one["output"], "output_2": two["output"], "preference": 1 + i % 2}
        for i, (one, two) in enumerate(zip(first, second, strict=True))
    ]
    path.write_text(json.dumps(pairs))
    return path


def preference_examples(path, max_length=128) -> Examples:
    found = load_preferences([path])
    tokenizer = load_tokenizer(TOKENIZER)
    return encode_all(found.records, found.origins, tokenizer, max_length, found.p)


def write_planted_preferences(path, count: int, seed: int = 0):
    """Pairs of ragged answers, of which the better one says "fox"."""
    rng, pairs = random.Random(seed), []
    words = [word for word in LINE.split() if word != "fox"]
    for _ in range(count):
        first, second, third = (rng.choices(words, k=rng.randint(2, 9)) for _ in range(3))
        first.insert(rng.randint(0, len(first)), "fox")
        answers = {"chosen": " ".join(first), "rejected": " ".join(second)}
        pairs.append({"instruction": " ".join(third), **answers})
    path.write_text(json.dumps(pairs))
    return path


def reward_model(config: LlamaConfig, decoder=None, std: float = 0.0) -> RewardModel:
    """A model of rewards with a random decoder, or with this one, and a random score."""
    torch.manual_seed(0)
    model = RewardModel(config)
    if decoder is not None:
        model.model.load_state_dict(decoder.state_dict())
    torch.nn.init.normal_(model.score.weight, std=std)
    return model


def preference_row(objective, which) -> PackedRow:
    columns = {name: torch.from_numpy(x) for name, x in objective.columns(which).items()}
    return PackedRow(make_row(objective.examples, which)._asdict(), columns)


def write_base(folder):
    """A model, 40 records and 40 preferences, for `flags`."""
    write_model(folder / "model", num_hidden_layers=3)
    write_records(folder / "records.json", 40)
    write_preferences(folder / "preferences.json", 40)
    return folder


def flags(base, out, **changes) -> list[str]:
    """A run of 5 steps of 16 in fp32; `flag=None` leaves a flag out, True sets it bare, a list
    gives it several values."""
    values = {"model_dir": base / "model", "data": base / "records.json", "out": out}
    values |= {"device": "cpu", "dtype": "fp32", "save_dtype": "fp32", "checkpointing": "none"}
    values |= {"epochs": 2, "batch_size": 16, "learning_rate": 1e-3, "save_every": 0}
    values |= {"max_length": 128, "row_tokens": 4096, **changes}
    words = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        values_of = map(str, value if isinstance(value, list) else [value])
        words += [] if value is None else [flag] if value is True else [flag, *values_of]
    return words


def train(words: list[str]) -> tuple[int, str, str]:
    """The command in this process, as one rank: (exit code, stdout, stderr)."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    INPUTS.clear()
    torch.set_num_threads(1)  # as `launch` has it
    try:
        with (
            mock.patch.object(sys, "argv", ["fsdp_train.py", *map(str, words)]),
            mock.patch.object(fsdp_train, "keep_freed_memory"),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            run_command(fsdp_train.main)
    except SystemExit as exit_:
        code = exit_.code
    finally:  # what the end of the process would do
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return code, out.getvalue(), err.getvalue()


def stop_in_step(monkeypatch, number: int) -> None:
    """The next run in this process gets SIGTERM in its step `number`."""
    step, count = fsdp_train.train_step, []

    def interrupted(*args):
        count.append(1)
        if len(count) == number:
            args[6].number = signal.SIGTERM
        return step(*args)

    monkeypatch.setattr(fsdp_train, "train_step", interrupted)


def launch(words: list[str], ranks: int = 1, torchrun=("--standalone",), **options):
    """The command in processes of its own; more than one rank goes through torchrun."""
    start = [sys.executable, ROOT / "fsdp_train.py"]
    if ranks > 1 or "--nnodes" in torchrun:
        run = [sys.executable, "-m", "torch.distributed.run", *torchrun]
        start = [*run, "--nproc-per-node", str(ranks), ROOT / "fsdp_train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment}
    return subprocess.Popen(
        [*start, *words], cwd=ROOT, text=True, start_new_session=True, **options
    )


def finish(process: subprocess.Popen, timeout: float = 120) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def succeeded(result: tuple[int, str, str]) -> tuple[int, str, str]:
    assert result[0] == 0, result[2]
    return result


def metrics(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def figures(out) -> list[dict]:
    """What does not depend on how fast the machine was."""
    return [{k: r[k] for k in r if k in EXACT or k.startswith("held_out")} for r in metrics(out)]


def assert_clipping_is_exact() -> None:
    """Clip random gradients of a wide vocabulary, divided among the ranks; compare with fp64."""
    with parallel.process_group("cpu", 1) as (mesh, device):
        model = Llama(LlamaConfig(32000, 128, 64, 1, 4))
        parallel.apply_fsdp(model, mesh, torch.float32, False)
        random = torch.Generator().manual_seed(0)
        whole = [torch.randn(p.shape, generator=random) for p in model.parameters()]
        for parameter, gradient in zip(model.parameters(), whole, strict=True):
            where = parameter.device_mesh, parameter.placements
            parameter.grad = distribute_tensor(gradient, *where)
        optimizer = mock.Mock()
        arguments = AnswerLoss(None), [], 1, device, mock.Mock(number=0)
        step = partial(fsdp_train.train_step, model, optimizer, *arguments)
        _, norm, *_ = step()
        exact = math.sqrt(sum((g.numpy().astype(float) ** 2).sum() for g in whole))
        assert norm == pytest.approx(exact, rel=1e-6)
        for parameter, gradient in zip(model.parameters(), whole, strict=True):
            torch.testing.assert_close(
                parameter.grad.full_tensor(), gradient / exact, rtol=1e-6, atol=0
            )
        optimizer.step.assert_called_once()
        for value in (math.inf, math.nan):
            parameter.grad.to_local()[-1] = value  # of every rank's rows
            assert not math.isfinite(step()[1])
        optimizer.step.assert_called_once()


def assert_same_run(out, other, loss=1e-6, norm=1e-6, weight=1e-5) -> None:
    """Equal but for rounding."""
    for a, b in zip(figures(out), figures(other), strict=True):
        assert a["step"] == b["step"] and a.keys() == b.keys()
        for name in a.keys() - {"step", "lr", "tokens"}:
            tolerance = norm if name == "grad_norm" else loss
            assert a[name] == pytest.approx(b[name], rel=tolerance), (a["step"], name)
    theirs = read_tensors(other / "model")
    for name, ours in read_tensors(out / "model").items():
        assert (ours - theirs[name]).norm() <= weight * theirs[name].norm(), name


def assert_identical(out, other) -> None:
    assert figures(out) == figures(other)
    ours, theirs = ((run / "model/model.safetensors").read_bytes() for run in (out, other))
    assert ours == theirs
