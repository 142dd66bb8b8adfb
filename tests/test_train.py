"""The trainer as people run it: divided into rows and ranks, resumed, misused."""

import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.checkpoints import copied_tensors, replace_weights
from helpers.commands import assert_refused
from helpers.models import small_config, small_model
from helpers.training import (
    LONG,
    TOKENIZER,
    assert_clipping_is_exact,
    assert_identical,
    assert_same_run,
    figures,
    finish,
    flags,
    launch,
    metrics,
    stop_in_step,
    succeeded,
    train,
    write_base,
    write_records,
)
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import fsdp_train
import model as model_module
from alpaca.common import system
from alpaca.common.errors import UserError
from alpaca.datagen.formats import load_mixture
from alpaca.training import objectives, parallel, result, throughput
from alpaca.training.config import TrainConfig
from alpaca.training.objectives import AnswerLoss, packed_rows, to_device
from alpaca.training.run_dir import RunDir
from alpaca.weights.loading import load_model
from dataset import Examples, encode_record
from fsdp_train import (
    build_optimizer,
    learning_rate,
    train_step,
)
from model import IGNORE, Llama
from tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def reference(base, tmp_path_factory):
    """The plain run that others are compared with."""
    out = tmp_path_factory.mktemp("reference") / "run"
    succeeded(train(flags(base, out)))
    return out


@pytest.fixture(scope="module")
def measured(base, tmp_path_factory):
    """The plain run, measured every two steps on held-out records of three sources in two files,
    and these files."""
    folder = tmp_path_factory.mktemp("measured")
    records = json.loads((base / "records.json").read_text())[:9]
    koala = [{**record, "source": "koala"} for record in records[3:5]]
    (folder / "mixed.json").write_text(json.dumps([*records[:3], *koala, *records[5:]]))
    files = [folder / "mixed.json", base / "records.json"]
    words = flags(base, folder / "run", eval_data=files, eval_every=2, sample_answers=0)
    succeeded(train(words))
    return folder / "run", files


@pytest.fixture
def watch(monkeypatch):
    """watch(before, after): call these with a step's arguments, and its result for `after`."""
    step = fsdp_train.train_step

    def patch(before, after=lambda *_: None):
        def watched(*args):
            before(*args)
            result = step(*args)
            after(*args, result)
            return result

        monkeypatch.setattr(fsdp_train, "train_step", watched)

    return patch


# ---------------------------------------------------------------- one step

VARIANTS = {
    "two rows": {"row_tokens": 700},
    "four rows": {"row_tokens": 400},
    "full checkpointing": {"checkpointing": "full"},
    "selective checkpointing": {"checkpointing": "selective"},
    "offload": {"offload": True},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_step_does_not_depend_on_how_it_is_divided(base, reference, tmp_path, changes):
    succeeded(train(flags(base, tmp_path / "run", **changes)))
    assert_same_run(tmp_path / "run", reference)


@pytest.mark.robust  # starts two processes, as long as ten others take
def test_two_ranks_equal_one(base, measured, tmp_path):
    out, files = measured
    words = flags(base, tmp_path / "run", eval_data=files, eval_every=2, sample_answers=0)
    succeeded(finish(launch(words, ranks=2)))
    assert_same_run(tmp_path / "run", out)


def test_clipping_is_exact_for_large_gradients():
    assert_clipping_is_exact()


def test_host_waits_for_a_gpu_once_in_a_step(monkeypatch):
    """Fake tensors refuse what depends on their numbers, as waiting for a GPU always does."""
    waits, counts, ends = [], np.arange(40, dtype=np.int32), np.array([0, 10, 25, 40])
    monkeypatch.setattr(model_module, "FLASH", "cpu")
    monkeypatch.setattr(FakeTensor, "tolist", lambda x: waits.append(len(x)) or [1.0] * len(x))
    mode, device = FakeTensorMode(), torch.device("cpu")
    monkeypatch.setattr(objectives, "to_device", lambda tensor, _: mode.from_tensor(tensor))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
    objective = AnswerLoss(Examples(counts, counts, ends, [], {}))
    rows = [*packed_rows(objective, np.arange(3), TrainConfig(row_tokens=64), device)] * 2
    with mode:
        with torch.device("meta"):
            model = Llama(small_config())
        parallel.apply_activation_checkpointing(model, "selective")
        parallel.apply_fsdp(model, mesh, torch.bfloat16, offload=False)
        optimizer = build_optimizer(model.to_empty(device="cpu"))
        train_step(model, optimizer, objective, rows, 9, device, mock.Mock(number=0))
    assert waits == [4]
    tensor, device = mock.Mock(), torch.device("cuda")
    assert to_device(tensor, device) is tensor.pin_memory().to.return_value
    tensor.pin_memory().to.assert_called_with(device, non_blocking=True)


def test_weights_are_fp32_while_blocks_compute_in_bf16(base, tmp_path, monkeypatch, watch):
    seen, policy = {}, parallel.MixedPrecisionPolicy

    def before(model, *_):
        seen["norm"] = model.model.layers[0].input_layernorm.weight.full_tensor().clone()
        model.model.layers[0].mlp.down_proj.register_forward_hook(
            lambda module, inputs, out: seen.update(compute=out.dtype, gathered=module.weight.dtype)
        )

    def after(model, optimizer, *_):
        moved = model.model.layers[0].input_layernorm.weight.full_tensor() != seen["norm"]
        seen["moved"] = moved.any()
        seen["weights"] = {parameter.dtype for parameter in model.parameters()}
        seen["moments"] = {s["exp_avg"].dtype for s in optimizer.state.values()}

    def watched_policy(**options):
        seen["policy"] = options
        return policy(**options)

    monkeypatch.setattr(parallel, "MixedPrecisionPolicy", watched_policy)
    watch(before, after)
    succeeded(train(flags(base, tmp_path / "run", dtype="bf16", save_dtype=None, max_steps=1)))
    assert seen["compute"] == seen["gathered"] == torch.bfloat16
    assert seen["weights"] == seen["moments"] == {torch.float32} and seen["moved"]
    assert seen["policy"]["reduce_dtype"] == torch.float32, "ranks would add gradients in bf16"
    saved = load_model(tmp_path / "run" / "model")
    assert {p.dtype for p in saved.parameters()} == {torch.bfloat16}, "the default"


def test_learning_rate_rises_from_above_0_and_falls_to_0():
    rates = [learning_rate(step, 100, 2e-5, 0.03) for step in range(100)]
    assert 0 < rates[0] < rates[1] < rates[2] < rates[3] == 2e-5 == max(rates)
    assert rates[3:] == sorted(rates[3:], reverse=True) and 0 < rates[-1] < 1e-7
    assert learning_rate(0, 1, 1.0, 0.03) > 0 and learning_rate(0, 10, 1.0, 0.0) == 1.0


def test_loss_that_is_not_finite_changes_no_weights(base, tmp_path, watch):
    weights = []

    def before(model, *_):
        weights[:] = [parameter.to_local().clone() for parameter in model.parameters()]

    def after(model, *rest):
        means, norm, *_ = rest[-1]
        if not math.isfinite(means["loss"] + norm):
            for parameter, old in zip(model.parameters(), weights, strict=True):
                assert torch.equal(parameter.to_local(), old)

    watch(before, after)
    out = tmp_path / "run"
    code, _, err = train(flags(base, out, learning_rate=1e25, save_every=1, warmup_ratio=0))
    assert code == 2 and err.count("error") == 1 and "records.json, record" in err
    step = int(re.search(r"step (\d+): the loss is (nan|inf)", err)[1])
    assert [r["step"] for r in metrics(out)] == list(range(1, step))
    saved = [int(p.name[5:]) for p in (out / "checkpoints").glob("step-??????")]
    assert saved and max(saved) < step and not (out / "model").exists()


def test_base_that_is_not_finite_is_refused_at_once(base, tmp_path):
    """An unused row harms no step, but the result would not be written hours later."""
    weights = copied_tensors(base / "model")
    weights["model.embed_tokens.weight"][700] = float("nan")
    shutil.copytree(base / "model", tmp_path / "model")
    replace_weights(tmp_path / "model", weights)
    words = flags(base, tmp_path / "run", model_dir=tmp_path / "model")
    code, _, err = train(words)
    assert code == 2 and "the base's model.embed_tokens.weight holds NaN or infinity" in err
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- the run


def test_rank_0_decides_how_long_rows_are(base, tmp_path, monkeypatch):
    """By the memory of its GPU; ranks that pack differently would wait for each other forever."""
    seen, pack = set(), fsdp_train.packed_rows

    def packed(examples, batch, config, device):
        seen.add((config.row_tokens, config.reshard))
        return pack(examples, batch, config, device)

    def broadcast(objects, **options):
        objects[:] = objects if options else [300, False]

    monkeypatch.setattr(fsdp_train, "packed_rows", packed)
    monkeypatch.setattr(fsdp_train.dist, "broadcast_object_list", broadcast)
    succeeded(train(flags(base, tmp_path / "run", row_tokens=None, max_steps=1)))
    assert seen == {(300, False)}


def test_overdue_snapshot_is_saved_between_others(base, tmp_path, monkeypatch):
    overdue, saved = iter([False, True, False, False, False]), []
    monkeypatch.setattr(fsdp_train.Snapshots, "overdue", lambda _: next(overdue))
    monkeypatch.setattr(fsdp_train.Snapshots, "save", lambda _, step: saved.append(step))
    succeeded(train(flags(base, tmp_path / "run", save_every=3)))
    assert saved == [2, 3, 5]


def test_no_memory_of_snapshots_is_left_after_training(base, tmp_path, monkeypatch):
    """Pinned memory that were only freed would still be copied from, at the same address."""
    closed, close = [], fsdp_train.Snapshots.close
    monkeypatch.setattr(fsdp_train.Snapshots, "close", lambda s: close(s) or closed.append(s))
    succeeded(train(flags(base, tmp_path / "run", save_every=1, max_steps=2)))
    assert [snapshots.staging for snapshots in closed] == [None]


def test_held_out_loss_of_each_source_is_the_mean_over_its_tokens(base, measured):
    out, files = measured
    first, *_, last = (record for record in metrics(out) if "held_out_loss" in record)
    names = [*["mixed.json"] * 3, *["koala"] * 2, *["mixed.json"] * 4, *["records.json"] * 40]
    model, tokenizer, sums = load_model(base / "model"), load_tokenizer(TOKENIZER), Counter()
    for name, record in zip(names, load_mixture(files, 0)[0], strict=True):
        ids, labels = (torch.tensor([part[:128]]) for part in encode_record(record, tokenizer)[:2])
        loss, tokens = model(ids, labels=labels).item(), int((labels != IGNORE).sum())
        for figure in ("held_out_loss", f"held_out_loss/{name}"):
            sums[figure] += loss
            sums[figure, "tokens"] += tokens
    shown = {"held_out_loss": "; held out", "held_out_loss/records.json": ", records.json"}
    shown |= {"held_out_loss/mixed.json": ", mixed.json", "held_out_loss/koala": ", koala"}
    assert list(first) == ["step", *shown]
    for figure in shown:
        assert first[figure] == pytest.approx(sums[figure] / sums[figure, "tokens"], rel=1e-5)
        shown[figure] += f" {first[figure]:.3f} → {last[figure]:.3f}"
    assert "".join(shown.values()) + "." in (out / "model/README.md").read_text()


def test_held_out_loss_during_training_changes_no_weight(reference, measured):
    out, _ = measured
    steps = [record["step"] for record in metrics(out) if "held_out_loss" in record]
    losses = {record["held_out_loss"] for record in metrics(out) if "held_out_loss" in record}
    assert steps == [0, 2, 4, 5] and len(losses) == 4
    assert [r for r in figures(out) if "loss" in r] == figures(reference)
    ours, theirs = ((run / "model/model.safetensors").read_bytes() for run in (out, reference))
    assert ours == theirs


def test_log_has_the_epochs_that_each_step_completes(reference):
    epochs = [record["epoch"] for record in metrics(reference)]
    assert epochs == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])  # 16 of 40 examples a step


def test_speed_of_a_step_leaves_out_the_held_out_records(base, tmp_path, monkeypatch):
    clock, step = [0], fsdp_train.train_step

    def wait(seconds: int) -> None:
        clock[0] += seconds

    monkeypatch.setattr(throughput, "time", mock.Mock(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(fsdp_train, "log_held_out", lambda *_, **step: wait(60))
    monkeypatch.setattr(fsdp_train, "train_step", lambda *args: (wait(2), step(*args))[1])
    changes = {"eval_data": base / "records.json", "eval_every": 1, "sample_answers": 0}
    succeeded(train(flags(base, tmp_path / "run", max_steps=1, **changes)))
    (record,) = metrics(tmp_path / "run")
    assert record["tokens_per_s"] == round(record["tokens"] / 2)


def test_resume_is_bit_identical(base, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "run"
    changes = {**LONG, "epochs": 4, "eval_data": base / "records.json", "sample_answers": 1}
    changes["eval_every"] = 7
    _, shown, _ = succeeded(train(flags(base, whole, **changes)))
    assert "expected: 0 of 1 held-out" in shown
    logged = [record["step"] for record in metrics(whole)]
    assert logged == [*range(8), *range(7, 11), 10], "the held-out loss before, after step 7, after"

    stop_in_step(monkeypatch, 7)
    out.mkdir()
    (out / "settings.json.77.partial").write_text('{"epochs"')  # left by a kill
    code, _, err = train(flags(base, out, **{**changes, "eval_every": 8}))  # may change
    assert code == 128 + signal.SIGTERM and "stopped after step 7: the same command" in err
    assert sorted(p.name for p in out.glob("checkpoints/*")) == ["step-000006", "step-000007"]
    assert not list(out.glob("*.partial"))
    (out / "checkpoints/step-000009.partial").mkdir()  # left by a kill
    shutil.copytree(out, tmp_path / "damaged")
    with mock.patch.object(fsdp_train, "save_result", side_effect=OSError("no space")):
        code, _, err = train(flags(base, out, **changes))
    assert code == 2 and "resuming after step 7" in err and "no space" in err
    _, _, err = succeeded(train(flags(base, out, **changes)))
    assert "resuming after step 10" in err
    assert_identical(out, whole)
    assert not (out / "checkpoints").exists(), "a finished run does not resume"
    assert (out / "loss.svg").read_text().startswith("<svg")

    os.truncate(tmp_path / "damaged/checkpoints/step-000007/rank-00000.safetensors", 1000)
    code, _, err = train(flags(base, tmp_path / "damaged", **changes))
    assert code == 2 and "step-000007/rank-00000.safetensors: damaged" in err
    assert "remove step-000007 to resume from an older snapshot" in err
    assert not list((tmp_path / "damaged").glob("checkpoints/*.partial"))


def test_plan_counts_the_run_and_does_not_start_it(base, reference, tmp_path):
    _, shown, _ = succeeded(train(flags(base, tmp_path / "run", plan=True)))
    tokens = sum(record["tokens"] for record in metrics(reference))
    assert f"5 steps of {tokens / 5:,.0f} tokens" in shown and "It fits." in shown
    assert not (tmp_path / "run").exists()


def test_plan_under_torchrun_is_for_its_ranks_and_printed_once(base, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    _, shown, _ = succeeded(train(flags(base, tmp_path / "run", plan=True)))
    assert "4 x this machine" in shown
    monkeypatch.setenv("RANK", "1")
    assert succeeded(train(flags(base, tmp_path / "run", plan=True)))[1] == ""


def test_compiling_without_a_compiler_is_refused(base, command, tmp_path, monkeypatch):
    monkeypatch.setattr(system.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    done = train(flags(base, tmp_path / "run", compile=True))
    assert_refused(done, "torch.compile needs ", "++: install it, or give --no-compile")
    assert not (tmp_path / "run").exists()
    words = ("generate", "--model-dir", base / "model", "--compile", "Hi.")
    assert_refused(command(*words), "++: install it, or leave out --compile")
    monkeypatch.setenv("CXX", "g++-14")
    system.check_compiler("cpu", "")
    with pytest.raises(UserError, match="needs gcc or clang"):
        system.check_compiler("cuda", "")


def test_compiling_on_a_cpu_prints_a_notice(base, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "g++")
    monkeypatch.setattr(parallel, "apply_compile", lambda model: None)
    _, _, err = succeeded(train(flags(base, tmp_path / "run", compile=True, max_steps=1)))
    assert "--compile is meant for a GPU" in err


def test_finished_run_is_not_trained_again(base, reference):
    before = {path: path.stat().st_mtime_ns for path in reference.glob("model/*")}
    _, out, err = succeeded(train(flags(base, reference)))
    assert "is finished" in err and "5 steps" in out
    assert before == {path: path.stat().st_mtime_ns for path in reference.glob("model/*")}
    names = ("loss", "lr", "grad_norm", "tokens_per_s", "supervised_per_s", "memory_GiB")
    assert len(metrics(reference)) == 5 and not (reference / "checkpoints").exists()
    for number, record in enumerate(metrics(reference), 1):
        assert record["step"] == number and all(record[name] > 0 for name in names)
        assert record["lr"] == learning_rate(number - 1, 5, 1e-3, 0.03)


def test_progress_line_shows_recent_means_and_the_log_every_step(tmp_path, monkeypatch):
    shown = []
    with RunDir(tmp_path / "run", {}, quiet=False) as run:
        run.start_log(0, 30)
        assert "lost" in run.summary()
        monkeypatch.setattr(run.progress, "step", lambda extra: shown.append(extra))
        run.log({"step": 0, "held_out_loss": 2.5})
        rates = [90_000] * 10 + [1000, 3000] * 10  # the last twenty steps count
        for step, rate in enumerate(rates, 1):
            record = {"step": step, "loss": 2 / step, "lr": 1e-3, "grad_norm": 1.0, "memory_GiB": 2}
            run.log_step({**record, "tokens": 9000, "tokens_per_s": rate, "mfu": rate / 1e4})
    assert "90,000 tok/s" in shown[0]
    assert "1,500 tok/s  MFU 15.0%" in shown[-1], "weighted by time"
    assert shown[-1].endswith("held out 2.500  peak memory 2.0 GiB"), "the latest"
    assert [record["tokens_per_s"] for record in metrics(tmp_path / "run")[1:]] == rates
    steps = "30 steps, 270,000 tokens in 2:01; training loss 2.000 → 0.067"
    assert run.summary() == f"{steps}; held out 2.500 → 2.500"


def test_slow_export_keeps_no_gather_waiting(monkeypatch):
    """Two ranks as threads. A disk needs a minute a tensor by the simulated clock, of which NCCL
    lets a gather that some ranks have started wait for ten."""
    model, clock, started, waited = small_model(), [0], [], []
    meeting = threading.Barrier(2, timeout=10)
    monkeypatch.setattr(result.dist, "new_group", lambda backend: backend)
    monkeypatch.setattr(result.dist, "barrier", lambda group: meeting.wait())

    def gather(tensor):
        if threading.current_thread() is threading.main_thread():
            waited.append(clock[0] - started[len(waited)] if len(waited) < len(started) else 0)
        else:
            started.append(clock[0])
        return tensor

    monkeypatch.setattr(result, "full_tensor", gather)
    other = threading.Thread(target=list, args=[result.gathered_tensors(model, torch.float32)])
    other.start()
    for _ in result.gathered_tensors(model, torch.float32):
        time.sleep(0.002)  # the other rank runs ahead if it can
        clock[0] += 1
    other.join()
    assert len(started) == len(waited) == 21 and max(waited) <= 1


# ---------------------------------------------------------------- errors of users

ERRORS = {
    "no such model": ({"model_dir": "nowhere"}, "nowhere", "no such folder"),
    "no such data": ({"data": "nowhere.json"}, "nowhere.json"),
    "no data": ({"data": None}, "--data"),
    "unknown preset": ({"model_dir": None, "preset": "8B", "tokenizer": TOKENIZER}, "8B"),
    "preset without tokenizer": ({"model_dir": None, "preset": "tiny"}, "--tokenizer"),
    "two bases": ({"preset": "tiny"}, "give one"),
    "too long": ({"max_length": 5000, "row_tokens": 5000}, "5000", "256 positions"),
    "small rows": ({"row_tokens": 100}, "--row-tokens 100: below --max-length"),
    "no step": ({"epochs": 0.001}, "--epochs"),
    "negative rate": ({"learning_rate": -1}, "--learning-rate", "above 0"),
    "not a number": ({"batch_size": "many"}, "--batch-size", "many"),
    "warm-up": ({"warmup_ratio": 3}, "--warmup-ratio must be"),
    "negative seed": ({"seed": -1}, "--seed", "int from 0"),
    "negative interval": ({"save_every": -5}, "--save-every", "-5"),
    "replicas": ({"replicas": 2}, "1 ranks are not a multiple of --replicas 2"),
    "a plan's replicas": ({"replicas": 2, "plan": True}, "not a multiple of --replicas 2"),
    "too many epochs": ({"epochs": 1e300}, "--epochs", "more than 10,000"),
    "a chip without a plan": ({"chip": "H100"}, "--chip goes with --plan"),
    "ranks without a plan": ({"gpus": 8}, "--gpus goes with --plan", "torchrun"),
    "a plan's ranks": ({"gpus": 10**9, "plan": True}, "--gpus", "more than 1,048,576"),
    "large batch": ({"batch_size": 10**30}, "--batch-size", "more than 32,768"),
    "large rows": ({"row_tokens": 10**9}, "--row-tokens", "more than 1,048,576"),
    "large seed": ({"seed": 2**63}, "--seed", "from 0 to 9,223,372,036,854,775,807"),
    "unknown flag": ({"learning": 1}, "did you mean --learning-rate"),
    "nothing to measure": ({"eval_every": 2}, "--eval-every goes with --eval-data"),
    "no held-out data": ({"eval_data": "nowhere.json"}, "nowhere.json"),
}


@pytest.mark.parametrize("changes_and_words", ERRORS.values(), ids=ERRORS.keys())
def test_user_error_is_one_line_and_writes_nothing(base, tmp_path, changes_and_words):
    changes, *words = changes_and_words
    assert_refused(train(flags(base, tmp_path / "run", **changes)), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("needed", "what"), [((1e18, 0), "disk"), ((0, 5e17), "host memory")])
def test_run_without_space_for_snapshots_is_refused(base, tmp_path, monkeypatch, needed, what):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two ranks share a machine's memory
    monkeypatch.setattr(fsdp_train, "stored_bytes", lambda *_: needed)
    refused = train(flags(base, tmp_path / "run"))
    assert_refused(refused, f"931,322,574.615 GiB of {what}", "--save-every 0 writes no snapshots")
    assert not (tmp_path / "run").exists()


def test_run_does_not_resume_with_other_settings(base, reference, tmp_path):
    refused = train(flags(base, reference, learning_rate=2e-3))
    assert_refused(refused, "another run", "learning_rate was 0.001")
    more = write_records(tmp_path / "records.json", 41)  # the same name
    refused = train(flags(base, reference, data=more))
    assert_refused(refused, "data was records.json, as ids ", "now it is records.json, as ids ")
    assert_refused(train(flags(base, reference, max_steps=3)), "max_steps was None, now it is 3")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    assert_refused(train(flags(base, tmp_path / "mine")), "something else")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
