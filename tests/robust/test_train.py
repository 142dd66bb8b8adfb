"""The trainer in processes of its own: several ranks, kills, signals, a full disk."""

import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.checkpoints import read_tensors
from helpers.commands import ROOT, assert_refused
from helpers.flash import flash_on_cpu
from helpers.models import small_model
from helpers.training import (
    LONG,
    TOKENIZER,
    assert_identical,
    assert_same_run,
    finish,
    flags,
    launch,
    succeeded,
    train,
    write_base,
    write_model,
    write_records,
)

from alpaca.training import parallel
from alpaca.training.config import TrainConfig
from alpaca.training.objectives import AnswerLoss, packed_rows
from alpaca.weights.lora import LoraConfig, add_lora
from dataset import Examples
from fsdp_train import train_step
from model import Block


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def reference(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "run"
    succeeded(train(flags(base, out)))
    return out


@pytest.fixture(scope="module")
def long_reference(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("long") / "run"
    succeeded(train(flags(base, out, **LONG)))
    return out


def snapshots(out) -> list:
    return list(out.glob("checkpoints/step-??????"))


# ---------------------------------------------------------------- several ranks


@pytest.mark.parametrize(
    ("ranks", "replicas"),
    [
        (2, 2),
        pytest.param(3, 1, marks=pytest.mark.slow, id="uneven shards"),
        pytest.param(8, 1, marks=pytest.mark.slow),
        pytest.param(4, 2, marks=pytest.mark.slow),
    ],
)
def test_more_ranks_equal_one(base, reference, tmp_path, ranks, replicas):
    words = flags(base, tmp_path / "run", replicas=replicas, checkpointing="full")
    succeeded(finish(launch(words, ranks)))
    assert_same_run(tmp_path / "run", reference)


FRESH = {"model_dir": None, "preset": "tiny", "tokenizer": TOKENIZER}


@pytest.mark.parametrize("tied", [True, False])
def test_special_models_do_not_depend_on_the_ranks(base, tmp_path, tied):
    """Tied weights; random weights, and a batch of one example: a rank has nothing to compute."""
    changes = {"model_dir": tmp_path / "tied"} if tied else {**FRESH, "batch_size": 1}
    write_model(tmp_path / "tied", tie_word_embeddings=True)
    succeeded(train(flags(base, tmp_path / "one", max_steps=5, **changes)))
    succeeded(finish(launch(flags(base, tmp_path / "two", max_steps=5, **changes), ranks=2)))
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert ("lm_head.weight" in read_tensors(tmp_path / "two/model")) != tied


def test_clipping_of_divided_gradients_is_exact():
    code = "from alpaca.training.process import run_rank\n"  # gloo's threads may abort a plain exit
    code += "from helpers.training import assert_clipping_is_exact\n"
    code += "run_rank(assert_clipping_is_exact)"
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*run, "--no-python", sys.executable, "-c", code], env=environment)
    assert done.returncode == 0


SLOW = pytest.mark.slow
GRAPHS = [
    ("none", 1),
    pytest.param("selective", 0, marks=SLOW),
    pytest.param("full", 0, marks=SLOW),
]


@pytest.mark.parametrize(("mode", "lora"), GRAPHS)
def test_compiled_blocks_are_few_graphs_without_a_break(monkeypatch, mode, lora):
    """As on a GPU, under FSDP and checkpointing. A row with more documents and the short last step
    make no graph of their own. LoRA's first block, whose input needs no gradient, has its own."""
    calls, compile, counts = flash_on_cpu(monkeypatch), Block.compile, torch._dynamo.utils.counters
    monkeypatch.setattr(Block, "compile", lambda block: compile(block, backend="eager"))
    torch._dynamo.reset()
    counts.clear()
    ids, ends = np.arange(320, dtype=np.int32) % 99, np.arange(0, 321, 4)  # documents of 4 tokens
    config, graphs = TrainConfig(max_length=16, row_tokens=512, compile=True), []
    with parallel.process_group("cpu", 1) as (mesh, device):
        model = small_model(head_dim=20)
        if lora:
            add_lora(model.bfloat16(), LoraConfig())
        parallel.apply_activation_checkpointing(model, mode)
        parallel.apply_compile(model)
        parallel.apply_fsdp(model, mesh, torch.bfloat16, False)
        for count in (20, 10, 50, 1):
            examples = Examples(ids, ids, ends[: count + 1], [], {})
            objective = AnswerLoss(examples)
            rows = packed_rows(objective, np.arange(count), config, device)
            train_step(model, mock.Mock(), objective, rows, 1, device, mock.Mock(number=0))
            graphs.append(counts["stats"]["unique_graphs"])
    assert graphs == [1 + lora] + [2 + 2 * lora] * 3 and not counts["graph_break"]
    assert {bounds for bounds, _ in calls} == {32, 64} and {longest for _, longest in calls} == {16}
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_blocks_equal_plain_ones(base, reference, tmp_path):
    succeeded(train(flags(base, tmp_path / "run", compile=True)))
    assert_same_run(tmp_path / "run", reference, loss=1e-5, norm=1e-4, weight=1e-4)


@pytest.mark.slow
def test_two_machines_equal_one(base, reference, tmp_path):
    """Two torchrun agents that meet over the network, here the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = ("--master-addr", "127.0.0.1", "--master-port", str(free.getsockname()[1]))
    words = flags(base, tmp_path / "run")
    nodes = [("--nnodes", "2", "--node-rank", str(node), *where) for node in range(2)]
    for agent in [launch(words, torchrun=node) for node in nodes]:
        succeeded(finish(agent))
    assert_same_run(tmp_path / "run", reference)


FAILING_RANK = """
import os, sys
from alpaca.common.errors import UserError
from alpaca.training.parallel import process_group, run_on_all_ranks
from alpaca.training.process import run_rank

def work():
    if os.environ["RANK"] in sys.argv[2]:
        raise eval(sys.argv[1])

def main():
    with process_group("cpu", 1):
        run_on_all_ranks(work)

run_rank(main)
"""


def test_error_of_one_rank_is_raised_by_all(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING_RANK)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def stderr_of(error: str, ranks: str) -> str:
        words = [*run, tmp_path / "failing.py", error, ranks]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=90)
        return done.stderr

    for ranks in ("1", "01"):  # one has it, or both
        err = stderr_of("UserError('wrong data')", ranks)
        assert err.count("failing.py: error: wrong data") == 1, "printed once"
        assert "exitcode  : 2" in err  # torchrun may stop the second rank before it exits
    err = stderr_of("ZeroDivisionError('a bug')", "1")
    assert "in work" in err and "ZeroDivisionError: a bug" in err, "its traceback"
    assert "RuntimeError: rank 1 failed: a bug" in err, "rank 0 does not wait"


# ---------------------------------------------------------------- killed, stopped, resumed


def wait_for(condition, process, seconds: float = 60) -> bool:
    """True when the condition holds, False when the process ended before it did."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    raise AssertionError("the condition does not hold and the process has not ended")


def logged_steps(out) -> int:
    file = out / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def started(base, out, until, ranks: int = 1, **changes):
    """A long run, in processes of its own, that has come so far."""
    process = launch(flags(base, out, **{**LONG, **changes}), ranks)
    assert wait_for(lambda: until(out), process)
    return process


def kill(process) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def killed_until_done(base, out, rng: random.Random, kills: int) -> int:
    """Start again and again, killed at a random moment each time; then let it finish."""
    killed = 0
    for number in range(kills):
        before = set(out.glob("checkpoints/*"))
        target = logged_steps(out) % 30 + rng.randint(1, 8) if number else 2  # before any snapshot
        in_snapshot = number and rng.random() < 0.5

        def hit(before=before, target=target, in_snapshot=in_snapshot):
            if in_snapshot:
                return any(p.suffix for p in set(out.glob("checkpoints/*")) - before)
            return logged_steps(out) >= target

        process = launch(flags(base, out, **LONG))
        if wait_for(hit, process):
            time.sleep(rng.random() * 0.02)
            kill(process)
            killed += 1
        else:
            process.communicate()
    succeeded(train(flags(base, out, **LONG)))
    return killed


@pytest.mark.parametrize("attempts", [1, pytest.param(7, marks=pytest.mark.slow)])
def test_resume_after_kill_is_bit_identical(base, long_reference, tmp_path, attempts):
    kills = 0
    for attempt in range(attempts):
        out = tmp_path / f"run{attempt}"
        kills += killed_until_done(base, out, random.Random(attempt), kills=4)
        assert_identical(out, long_reference)
    assert kills >= 3 * attempts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_same_command_resumes(base, long_reference, tmp_path, number):
    out, changes = tmp_path / "run", {**LONG, "save_every": 1000}
    process = started(base, out, lambda out: logged_steps(out) >= 4, save_every=1000)
    process.send_signal(number)
    assert "stopping" in process.stderr.readline() + process.stderr.readline()
    if number == signal.SIGTERM:  # it may come twice
        process.send_signal(number)
    code, _, err = finish(process)
    stopped = re.search(r"stopped after step (\d+): the same command resumes", err)
    assert stopped and code == 128 + number and "stopping" not in err, err
    assert not (out / "model").exists() and not list(out.glob("checkpoints/*.partial"))
    _, _, err = succeeded(train(flags(base, out, **changes)))
    assert f"resuming after step {stopped[1]}" in err
    assert_identical(out, long_reference)


def test_two_ranks_stop_together_and_one_resumes(base, long_reference, tmp_path):
    out = tmp_path / "run"
    process = started(base, out, lambda out: logged_steps(out) >= 5, ranks=2)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    _, _, err = finish(process)
    assert "stopped after step" in err and snapshots(out), err
    succeeded(train(flags(base, out, **LONG)))
    assert_same_run(out, long_reference, norm=1e-5, weight=1e-4)


RESHARDING = """
import os, socket, sys
from pathlib import Path
import torch
import torch._dynamo  # fully_shard needs it: once, before the ranks are forked
from alpaca.training.parallel import apply_fsdp, full_tensor, process_group
from alpaca.training.process import run_rank
from alpaca.training.snapshots import Snapshots
from fsdp_train import build_optimizer
from helpers.models import small_config
from model import Llama

def check_and_save(folder, replicas, step):
    with process_group("cpu", replicas) as (mesh, _):
        model = Llama(small_config(vocab_size=5, hidden_size=8, intermediate_size=7))
        apply_fsdp(model, mesh, torch.float32, offload=False)
        snapshots = Snapshots(folder, 1, model, build_optimizer(model))
        assert snapshots.load() == step
        torch.manual_seed(0)
        for name, tensor in snapshots._tensors().items():
            whole = torch.randn(tensor.shape)
            assert not step or torch.equal(full_tensor(tensor), whole), name
            rows = [*whole.chunk(mesh["shard"].size()), *[whole[:0]] * mesh.size()]
            tensor.to_local().copy_(rows[mesh["shard"].get_local_rank()])
        snapshots.save(step + 1)
        snapshots.finish()

folder = Path(sys.argv[1])
for step, (ranks, replicas) in enumerate([(2, 1), (1, 1), (4, 1), (4, 2), (3, 1)]):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for rank in range(ranks):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
        if not (child := os.fork()):
            run_rank(lambda: check_and_save(folder, replicas, step))
        children.append(child)
    assert not any(os.waitpid(child, 0)[1] for child in children)
    (state,) = folder.glob("step-*")
    assert len(list(state.glob("rank-*"))) == ranks
"""


def test_snapshot_is_read_by_any_number_of_ranks(tmp_path):
    """Of 4, 5, 7 or 8 rows some ranks have fewer than others; of 5 rows one of 4 ranks has none."""
    (tmp_path / "resharding.py").write_text(RESHARDING)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1"}
    run = [sys.executable, tmp_path / "resharding.py", tmp_path]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_rank_that_dies_ends_the_others_and_loses_nothing(base, long_reference, tmp_path):
    out = tmp_path / "run"
    process = started(base, out, snapshots, ranks=2)
    children = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    os.kill(int(children[-1]), signal.SIGKILL)
    start = time.monotonic()
    code, _, err = finish(process)
    assert code != 0 and time.monotonic() - start < 30, err
    assert not (out / "model").exists()
    _, _, err = succeeded(finish(launch(flags(base, out, **LONG), ranks=2)))
    assert "resuming after step" in err
    assert_same_run(out, long_reference, norm=1e-5, weight=1e-4)


def test_full_disk_keeps_the_snapshot_before(base, long_reference, tmp_path):
    """A limit on file sizes stands for the disk: the log stays below it, a snapshot does not."""
    out = tmp_path / "run"
    kill(started(base, out, snapshots))

    def limit_file_size():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = launch(flags(base, out, **LONG), preexec_fn=limit_file_size)
    code, _, err = finish(process)
    assert code == 2 and "could not be written" in err and "Traceback" not in err, err
    assert snapshots(out)
    succeeded(train(flags(base, out, **LONG)))
    assert_identical(out, long_reference)


def test_two_processes_do_not_train_in_one_folder(base, tmp_path):
    out = tmp_path / "run"
    process = started(base, out, logged_steps)
    os.killpg(process.pid, signal.SIGSTOP)  # it holds the folder while we look
    try:
        assert_refused(train(flags(base, out, **LONG)), "another process")
    finally:
        os.killpg(process.pid, signal.SIGCONT)
        kill(process)


def test_plan_needs_no_weights_and_no_gpu(tmp_path):
    records = write_records(tmp_path / "records.json", 40)
    how = ["--tokenizer", TOKENIZER, "--data", records, "--preset", "tiny", "--lora", "--bits", 4]
    how += ["--plan", "--gpus", 64, "--replicas", 8, "--chip", "H100"]
    assert "64 x H100 in 8 replicas" in succeeded(train(how))[1]
    assert_refused(train([*how, "--replicas", 7]), "--gpus 64 is not a multiple of --replicas 7")
    assert_refused(train([*how, "--offload"]), "--offload cannot move quantized weights")
