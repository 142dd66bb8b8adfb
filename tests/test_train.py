"""The trainer as people run it: against a plain loop, cut into ranks, killed, resumed, misused."""

import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.commands import ROOT, assert_refused
from helpers.models import small_config
from helpers.parity import apart
from helpers.training import (
    environment,
    figures,
    finish,
    flags,
    launch,
    metrics,
    write_records,
)

import fsdp_train
from alpaca.datagen.formats import load_records
from alpaca.training import parallel
from alpaca.training.run_dir import RunFolder
from alpaca.training.snapshots import Snapshots
from alpaca.weights.checkpoint import read_tensors
from alpaca.weights.loading import load_model
from alpaca.weights.lora import LoraConfig
from alpaca.weights.writer import save_model
from dataset import IGNORE, encode_example, format_prompt, step_examples
from fsdp_train import learning_rate
from model import Llama
from tokenizer import Tokenizer

TOKENIZER = ROOT / "data/tokenizer.model"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small random model with a tokenizer, and 40 records."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = Llama(small_config(vocab_size=1024, max_position_embeddings=256, num_hidden_layers=3))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    save_model(model, model.config, folder / "model", tokenizer=TOKENIZER)
    write_records(folder / "records.json", 40)
    return folder


def succeeded(result: tuple[int, str, str]) -> tuple[int, str, str]:
    assert result[0] == 0, result[2]
    return result


def trained(words: list[str], ranks: int = 1) -> tuple[int, str, str]:
    return succeeded(finish(launch(words, ranks)))


def assert_same_run(out, other, loss=1e-6, norm=1e-6, weight=1e-5) -> None:
    ours, theirs = figures(out), figures(other)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=loss), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=norm), a["step"]
    assert_same_weights(out / "model", other / "model", weight)


def assert_same_weights(folder, other, relative: float) -> None:
    theirs = dict(read_tensors(other))
    for name, ours in read_tensors(folder):
        distance = (ours - theirs[name]).norm() / theirs[name].norm()
        assert distance <= relative, (name, distance.item())


@pytest.fixture
def signals_restored():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def here(command, signals_restored):
    """Train in this process, as one rank: here(words) -> (code, out, err)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as `environment` has it
    yield lambda words: command(fsdp_train, *words)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def reference(base, tmp_path_factory):
    """The plain run that others are compared with."""
    out = tmp_path_factory.mktemp("reference") / "run"
    trained(flags(base, out))
    return out


# ---------------------------------------------------------------- the arithmetic


@pytest.mark.parity
def test_the_run_equals_a_plain_loop_over_hugging_faces_model(base, here, tmp_path):
    from transformers import AutoModelForCausalLM

    words = flags(base, tmp_path / "run", epochs=4)
    succeeded(here(words))
    model = AutoModelForCausalLM.from_pretrained(base / "model", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    tokenizer, records = Tokenizer(TOKENIZER), load_records(base / "records.json")
    examples = [encode_example(record, tokenizer, 128) for record in records]
    for step, logged in enumerate(metrics(tmp_path / "run")):
        chosen = [examples[i] for i in step_examples(40, 16, 4, 42, step)]
        learned = sum(label != IGNORE for _, labels in chosen for label in labels)
        total = 0.0
        for ids, labels in chosen:  # one at a time: nothing to pad, nothing to leak
            logits = model(torch.tensor([ids])).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits, torch.tensor(labels[1:]), ignore_index=IGNORE, reduction="sum"
            )
            (loss / learned).backward()
            total += loss.item() / learned
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = logged["lr"]
        optimizer.step()
        optimizer.zero_grad()
        apart("loss of a step, relative: transformers", abs(logged["loss"] / total - 1), 1e-5)
        assert logged["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert step == 9
    theirs = dict(model.named_parameters())
    for name, ours in read_tensors(tmp_path / "run" / "model"):
        distance = (ours - theirs[name]).norm() / theirs[name].norm()
        apart("weights after ten steps, relative: transformers", distance.item(), 1e-5)


VARIANTS = {
    "two rows": {"row_tokens": 700},
    "four rows": {"row_tokens": 400},
    "full checkpointing": {"checkpointing": "full"},
    "selective checkpointing": {"checkpointing": "selective"},
    "offload": {"offload": True},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_how_a_step_is_cut_changes_nothing(base, reference, here, tmp_path, changes):
    succeeded(here(flags(base, tmp_path / "run", **changes)))
    assert_same_run(tmp_path / "run", reference)


def test_two_ranks_equal_one(base, reference, tmp_path):
    trained(flags(base, tmp_path / "run"), ranks=2)
    assert_same_run(tmp_path / "run", reference)


def test_two_replicas_equal_one_model(base, reference, tmp_path):
    trained(flags(base, tmp_path / "run", replicas=2, checkpointing="full"), ranks=2)
    assert_same_run(tmp_path / "run", reference)


def test_tied_weights_do_not_depend_on_the_ranks(base, here, tmp_path):
    torch.manual_seed(1)
    tied = Llama(
        small_config(vocab_size=1024, max_position_embeddings=256, tie_word_embeddings=True)
    )
    save_model(tied, tied.config, tmp_path / "tied", tokenizer=TOKENIZER)
    succeeded(here(flags(base, tmp_path / "tied1", model_dir=tmp_path / "tied")))
    trained(flags(base, tmp_path / "tied2", model_dir=tmp_path / "tied"), ranks=2)
    # Norms of tensors this large are summed in fp32, in another order when they are divided.
    assert_same_run(tmp_path / "tied2", tmp_path / "tied1", norm=5e-6)
    assert "lm_head.weight" not in dict(read_tensors(tmp_path / "tied2" / "model"))


def test_random_weights_and_a_rank_without_examples_change_nothing(base, here, tmp_path):
    """A batch of one example on two ranks: one of them has nothing to compute."""
    fresh = {"model_dir": None, "preset": "tiny", "tokenizer": TOKENIZER}
    fresh |= {"batch_size": 1, "max_steps": 3}
    succeeded(here(flags(base, tmp_path / "one", **fresh)))
    trained(flags(base, tmp_path / "two", **fresh), ranks=2)
    assert_same_run(tmp_path / "two", tmp_path / "one", norm=5e-6)


@pytest.mark.slow
def test_compiled_blocks_equal_plain_ones(base, reference, here, tmp_path):
    succeeded(here(flags(base, tmp_path / "run", compile=True)))
    assert_same_run(tmp_path / "run", reference, loss=1e-5, norm=1e-4, weight=1e-4)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_the_compiler_looks_into_checkpointed_blocks(mode):
    """It once compiled nothing of them, and said nothing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Llama(small_config())
    parallel.apply_activation_checkpointing(model, mode)
    for block in model.model.layers:
        block.compile(backend="eager")
    ids = torch.arange(24)[None]
    model(ids, labels=ids).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "for all blocks"
    torch._dynamo.reset()


def test_weights_stay_fp32_while_blocks_compute_in_bf16(base, here, tmp_path, monkeypatch):
    seen = {}
    step = fsdp_train.train_step

    def watched(model, optimizer, *rest):
        block = model.model.layers[0]
        norm = block.input_layernorm.weight.full_tensor().clone()
        hook = block.mlp.down_proj.register_forward_hook(
            lambda module, inputs, out: seen.update(compute=out.dtype, gathered=module.weight.dtype)
        )
        result = step(model, optimizer, *rest)
        hook.remove()
        seen["weights"] = {parameter.dtype for parameter in model.parameters()}
        seen["moments"] = {s["exp_avg"].dtype for s in optimizer.state.values()}
        seen["moved"] = not torch.equal(block.input_layernorm.weight.full_tensor(), norm)
        return result

    def policy(**chosen):
        seen["policy"] = chosen
        return usual(**chosen)

    usual = parallel.MixedPrecisionPolicy
    monkeypatch.setattr(parallel, "MixedPrecisionPolicy", policy)
    monkeypatch.setattr(fsdp_train, "train_step", watched)
    succeeded(here(flags(base, tmp_path / "run", dtype="bf16", max_steps=1)))
    assert seen["compute"] == seen["gathered"] == torch.bfloat16
    assert seen["weights"] == seen["moments"] == {torch.float32}
    assert seen["moved"]
    assert seen["policy"]["reduce_dtype"] == torch.float32, "ranks would add gradients in bf16"


def test_the_schedule_rises_from_above_0_to_its_peak_and_falls_towards_0():
    rates = [learning_rate(step, 100, 2e-5, 0.03) for step in range(100)]
    assert 0 < rates[0] < rates[1] < rates[2] < rates[3] == 2e-5 == max(rates)
    assert rates[3:] == sorted(rates[3:], reverse=True) and 0 < rates[-1] < 1e-7
    assert learning_rate(0, 1, 1.0, 0.03) > 0 and learning_rate(0, 10, 1.0, 0.0) == 1.0


@pytest.mark.parity
def test_the_schedule_is_hugging_faces_after_the_warm_up():
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-5)
    schedule = get_cosine_schedule_with_warmup(optimizer, 37, 1219)
    for step in range(1219):
        if step >= 37:
            ours = learning_rate(step, 1219, 2e-5, 0.03)
            distance = abs(ours - optimizer.param_groups[0]["lr"]) / 2e-5
            apart("learning rate, of its peak: transformers", distance, 1e-9)
        optimizer.step()
        schedule.step()


# ---------------------------------------------------------------- killed, stopped, resumed

LONG = {"epochs": 12, "save_every": 3}  # 30 steps


@pytest.fixture(scope="module")
def long_reference(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("long") / "run"
    trained(flags(base, out, **LONG))
    return out


def wait_for(condition, process, seconds: float = 60) -> bool:
    """True when the condition holds, False when the process ended before it did."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    raise AssertionError("it neither happened nor ended")


def kill(process) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def logged_steps(out) -> int:
    file = out / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def killed_until_done(base, here, out, draw: random.Random, kills: int) -> int:
    """Start again and again, each time killed a random while after it got going; then let be."""
    done = 0
    for _ in range(kills):
        process = launch(flags(base, out, **LONG))
        if draw.random() < 0.5:  # in the middle of a snapshot
            before = set(out.glob("checkpoints/*"))

            def hit(before=before):
                return any(p.suffix for p in set(out.glob("checkpoints/*")) - before)
        else:
            target = logged_steps(out) % 30 + draw.randint(1, 8)

            def hit(target=target):
                return logged_steps(out) >= target

        if wait_for(hit, process):
            time.sleep(draw.random() * 0.02)
            kill(process)
            done += 1
        else:
            process.communicate()
    succeeded(here(flags(base, out, **LONG)))
    return done


def assert_identical(out, reference) -> None:
    assert figures(out) == figures(reference)
    ours, theirs = ((run / "model/model.safetensors").read_bytes() for run in (out, reference))
    assert ours == theirs


def test_a_killed_run_goes_on_to_the_same_bits(base, here, long_reference, tmp_path):
    assert killed_until_done(base, here, tmp_path / "run", random.Random(1), kills=3) >= 2
    assert_identical(tmp_path / "run", long_reference)


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_in_the_same_bits(base, here, long_reference, tmp_path):
    kills = 0
    for attempt in range(7):
        out = tmp_path / f"run{attempt}"
        kills += killed_until_done(base, here, out, random.Random(attempt), kills=4)
        assert_identical(out, long_reference)
    assert kills >= 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_and_the_same_command_goes_on(
    base, here, long_reference, tmp_path, number
):
    out = tmp_path / "run"
    process = launch(flags(base, out, **{**LONG, "save_every": 1000}))
    assert wait_for(lambda: logged_steps(out) >= 4, process)
    process.send_signal(number)
    code, _, err = finish(process)
    stopped = re.search(r"stopped after step (\d+): the same command goes on", err)
    assert stopped and code == 128 + number, err
    assert not (out / "model").exists()
    _, _, err = succeeded(here(flags(base, out, resume=True, **{**LONG, "save_every": 1000})))
    assert f"going on after step {stopped[1]}" in err
    assert_identical(out, long_reference)


def test_a_run_killed_before_its_first_snapshot_starts_over(base, here, tmp_path):
    out, changes = tmp_path / "run", {**LONG, "eval_data": base / "records.json", "answers": 1}
    process = launch(flags(base, out, **{**changes, "save_every": 1000}))
    assert wait_for(lambda: logged_steps(out) >= 3, process)
    kill(process)
    _, told, _ = succeeded(here(flags(base, out, **{**changes, "save_every": 1000})))
    assert "expected: 0 of 1 held-out" in told, "as many as asked for"
    steps = [r["step"] for r in metrics(out)]
    assert steps == [*range(31), 30], "the held-out loss at both ends, each step once"


def test_a_kill_while_the_folder_was_made_is_no_obstacle(base, reference, here, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "settings.json.77.partial").write_text('{"lr"')
    succeeded(here(flags(base, out)))
    assert not list(out.glob("*.partial"))
    assert_same_run(out, reference)


def test_sigterm_may_come_twice(base, long_reference, tmp_path):
    """As from a scheduler that tells all processes while torchrun passes it on."""
    out = tmp_path / "run"
    process = launch(flags(base, out, **LONG))
    assert wait_for(lambda: logged_steps(out) >= 4, process)
    process.send_signal(signal.SIGTERM)
    assert "stopping" in process.stderr.readline() + process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 128 + signal.SIGTERM and "stopped after step" in err
    assert "stopping" not in err, "said once"
    assert list(out.glob("checkpoints/step-??????")) and not list(out.glob("checkpoints/*.partial"))


def test_two_ranks_stop_together_and_one_goes_on(base, here, long_reference, tmp_path):
    out = tmp_path / "run"
    process = launch(flags(base, out, **LONG), ranks=2)
    assert wait_for(lambda: logged_steps(out) >= 5, process)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    _, _, err = finish(process)
    assert "stopped after step" in err and (out / "checkpoints").exists(), err
    succeeded(here(flags(base, out, **LONG)))
    assert_same_run(out, long_reference, norm=1e-5, weight=1e-4)


def test_a_rank_that_dies_takes_the_others_along_and_nothing_is_lost(
    base, long_reference, tmp_path
):
    out = tmp_path / "run"
    process = launch(flags(base, out, **LONG), ranks=2)
    assert wait_for(lambda: list(out.glob("checkpoints/step-??????")), process)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    start = time.monotonic()
    code, _, err = finish(process)
    assert code != 0 and time.monotonic() - start < 30, err
    assert not (out / "model").exists()
    _, _, err = trained(flags(base, out, **LONG), ranks=2)
    assert "going on after step" in err
    assert_same_run(out, long_reference, norm=1e-5, weight=1e-4)


def test_a_finished_run_is_shown_and_not_trained_again(base, here, reference):
    before = {path: path.stat().st_mtime_ns for path in reference.glob("model/*")}
    _, out, err = succeeded(here(flags(base, reference)))
    assert "is finished" in err and "5 steps" in out
    assert before == {path: path.stat().st_mtime_ns for path in reference.glob("model/*")}
    assert len(metrics(reference)) == 5 and not (reference / "checkpoints").exists()


def test_a_loss_that_is_not_finite_stops_before_the_weights(base, here, tmp_path, monkeypatch):
    step = fsdp_train.train_step

    def watched(model, *rest):
        before = [parameter.to_local().clone() for parameter in model.parameters()]
        loss, norm, stopping = step(model, *rest)
        if not math.isfinite(loss + norm):
            for parameter, kept in zip(model.parameters(), before, strict=True):
                assert torch.equal(parameter.to_local(), kept)
        return loss, norm, stopping

    monkeypatch.setattr(fsdp_train, "train_step", watched)
    words = flags(base, tmp_path / "run", lr=1e25, save_every=1, warmup=0)
    code, _, err = here(words)
    assert code == 2 and err.count("error") == 1
    step = int(re.search(r"step (\d+): the loss is (nan|inf)", err)[1])
    assert "records.json record" in err
    assert [r["step"] for r in metrics(tmp_path / "run")] == list(range(1, step))
    assert not (tmp_path / "run" / "model").exists()
    kept = [int(p.name[5:]) for p in (tmp_path / "run" / "checkpoints").glob("step-??????")]
    assert kept and max(kept) < step


def test_a_full_disk_leaves_the_snapshot_before(base, here, long_reference, tmp_path):
    """The limit on a file's size stands for the disk: the log grows past it, or a snapshot."""
    import resource

    out = tmp_path / "run"
    process = launch(flags(base, out, **LONG))
    assert wait_for(lambda: list(out.glob("checkpoints/step-??????")), process)
    kill(process)
    limit = 20_000  # bytes: a snapshot is over a megabyte, the log a few thousand

    def shrink():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code, _, err = finish(launch(flags(base, out, **LONG), preexec_fn=shrink))
    assert code == 2 and "could not be written" in err and "Traceback" not in err, err
    assert list(out.glob("checkpoints/step-??????"))
    succeeded(here(flags(base, out, **LONG)))
    assert_identical(out, long_reference)


def test_what_a_kill_left_of_a_snapshot_is_cleared(tmp_path):
    (tmp_path / "step-000003.partial").mkdir()
    with parallel.process_group("cpu", replicas=1):
        assert Snapshots(tmp_path, keep=2).load({}) == 0
    assert not list(tmp_path.iterdir())


def test_a_damaged_snapshot_is_named(base, here, tmp_path):
    out = tmp_path / "run"
    words = flags(base, out, **LONG)
    process = launch(words)
    assert wait_for(lambda: list(out.glob("checkpoints/step-??????")), process)
    kill(process)
    newest = max(out.glob("checkpoints/step-??????"))
    shards = next(newest.glob("*.distcp"))
    shards.write_bytes(shards.read_bytes()[:1000])
    code, _, err = here(words)
    assert code == 2 and newest.name in err and "remove it" in err


# ---------------------------------------------------------------- the folder that comes out


def test_train_interrupt_resume_and_answer_in_transformers(base, here, tmp_path):
    """The whole story: what is learned by heart here is answered there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = {"instruction": "Name the fox's colour.", "output": "the old red fox"}
    (tmp_path / "one.jsonl").write_text(json.dumps(record) + "\n")
    out = tmp_path / "run"
    changes = {"data": tmp_path / "one.jsonl", "eval_data": tmp_path / "one.jsonl"}
    changes |= {"batch_size": 4, "epochs": 120, "lr": 3e-3, "save_every": 10, "answers": 5}
    process = launch(flags(base, out, **changes))
    assert wait_for(lambda: logged_steps(out) >= 8, process)
    process.send_signal(signal.SIGINT)
    finish(process)
    _, shown, _ = succeeded(here(flags(base, out, **changes)))
    assert "as expected: 1 of 1" in shown and "→ the old red fox" in shown
    losses = [r["held_out_loss"] for r in metrics(out) if "held_out_loss" in r]
    assert len(losses) == 2 and losses[1] < 0.1 < losses[0]
    assert [r["step"] for r in metrics(out) if "loss" in r] == list(range(1, 31))
    assert not (out / "checkpoints").exists(), "a finished run has nothing to go on from"
    assert (out / "loss.svg").read_text().startswith("<svg")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    ids = tokenizer(format_prompt(record["instruction"]), return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == "the old red fox"


def test_model_is_saved_in_bf16_unless_asked_otherwise(base, here, tmp_path):
    succeeded(here(flags(base, tmp_path / "run", save_dtype=None, max_steps=1)))
    model = load_model(tmp_path / "run" / "model")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_every_step_is_logged_with_its_figures(reference):
    for number, record in enumerate(metrics(reference), 1):
        assert record["step"] == number
        for name in ("loss", "lr", "grad_norm", "tokens_per_s", "supervised_per_s", "memory_GB"):
            assert record[name] > 0, name


def test_the_line_shows_a_running_mean_and_the_log_every_step(tmp_path, monkeypatch):
    run, shown = RunFolder(tmp_path / "run", {}, resume=False, quiet=False), []
    run.begin(0, 30)
    assert run.summary() == "its log was lost"
    monkeypatch.setattr(run.progress, "step", lambda more: shown.append(more))
    rates = [90_000] * 10 + [1000, 3000] * 10  # the last twenty steps count
    for step, rate in enumerate(rates, 1):
        known = {"loss": 2 / step, "lr": 1e-3, "grad_norm": 1.0, "memory_GB": 2 * 2**30 / 1e9}
        run.step({"step": step, "tokens": 9000, "tokens_per_s": rate, "mfu": rate / 1e4, **known})
    run.close()
    assert "90,000 tokens/s" in shown[0]
    assert shown[-1].endswith("1,500 tokens/s  MFU 15.0%  2.0 GiB"), "as long as it took"
    assert [record["tokens_per_s"] for record in metrics(tmp_path / "run")] == rates
    assert run.summary() == "30 steps of 270,000 tokens in 2:01; training loss 2.000 → 0.067"


# ---------------------------------------------------------------- users' mistakes


def test_flags_left_out_mean_alpacas_recipe_or_that_of_the_embedded_model(monkeypatch):
    def meant(*words: str):
        monkeypatch.setattr(sys, "argv", ["fsdp_train.py", *words])
        return fsdp_train.parse_args()

    named = ("--model-dir", "llama", "--data", "a.json")
    alpaca, tiny = meant(*named), meant()
    assert (alpaca.epochs, alpaca.batch_size, alpaca.lr, alpaca.warmup) == (3, 128, 2e-5, 0.03)
    assert (alpaca.max_length, alpaca.dtype, alpaca.checkpointing) == (512, "bf16", "selective")
    assert alpaca.out == Path("runs/alpaca") and alpaca.eval_data is None and not alpaca.lora
    assert tiny.model_dir == Path("data/tiny-llama") and tiny.data == ["data/sample_train.json"]
    assert (tiny.epochs, tiny.batch_size, tiny.lr, tiny.dtype) == (2, 16, 3e-4, "fp32")
    preset = meant("--preset", "7B", "--tokenizer", "t", "--data", "a.json")
    assert vars(preset) | {"preset": None, "model_dir": Path("llama"), "tokenizer": None} == vars(
        alpaca
    )
    adapter = meant(*named, "--lora")
    assert (adapter.lr, adapter.checkpointing, adapter.batch_size) == (3e-4, "full", 128)
    assert (
        adapter.out == Path("runs/alpaca-lora")
        and adapter.lora == LoraConfig()
        and adapter.bits == 16
    )
    assert meant("--lora").out == Path("runs/tiny-lora") and meant("--lora").dtype == "fp32"
    said = meant("--lora", "--out", "here", "--lr", "1", "--lora-rank", "2", "--epochs", "9")
    assert (said.out, said.lr, said.lora.rank, said.epochs) == (Path("here"), 1, 2, 9)


MISTAKES = {
    "no such model": ({"model_dir": "nowhere"}, "nowhere", "no such folder"),
    "no such data": ({"data": "nowhere.json"}, "nowhere.json"),
    "no data": ({"data": None}, "--data"),
    "unknown preset": ({"model_dir": None, "preset": "8B", "tokenizer": TOKENIZER}, "8B"),
    "preset without tokenizer": ({"model_dir": None, "preset": "tiny"}, "--tokenizer"),
    "two bases": ({"preset": "tiny"}, "choose one"),
    "too long": ({"max_length": 5000}, "5000", "256 positions"),
    "small rows": ({"row_tokens": 100}, "--row-tokens 100"),
    "nothing to do": ({"epochs": 0.001}, "--epochs"),
    "negative rate": ({"lr": -1}, "--lr", "above 0"),
    "not a number": ({"batch_size": "many"}, "--batch-size", "many"),
    "no warm-up like that": ({"warmup": 3}, "--warmup"),
    "negative seed": ({"seed": -1}, "--seed"),
    "negative interval": ({"save_every": -5}, "--save-every -5"),
    "replicas": ({"replicas": 2}, "--replicas 2", "1 rank"),
    "unknown flag": ({"learning_rate": 1}, "--learning-rate"),
    "a plan's replicas": ({"replicas": 2, "plan": True}, "--replicas 2", "the 1 --gpus"),
    "nothing to resume": ({"resume": True}, "--resume", "no run"),
    "no held-out data": ({"eval_data": "nowhere.json"}, "nowhere.json"),
}


@pytest.mark.parametrize("changes_and_words", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_and_leaves_no_folder(base, here, tmp_path, changes_and_words):
    changes, *words = changes_and_words
    assert_refused(here(flags(base, tmp_path / "run", **changes)), *words)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_mixed_with_another(base, reference, here, tmp_path):
    assert_refused(here(flags(base, reference, lr=2e-3)), "another run", "lr was 0.001")
    more = write_records(tmp_path / "records.json", 41)
    assert_refused(here(flags(base, reference, data=more)), "another run", "data was")
    assert_refused(here(flags(base, reference, max_steps=3)), "max_steps was None, now it is 3")
    same = (reference / "settings.json").read_text()  # but for what is in the file
    (tmp_path / "copy").mkdir()
    moved = same.replace(str(base / "records.json"), str(more))
    (tmp_path / "copy" / "settings.json").write_text(moved)
    refused = here(flags(base, tmp_path / "copy", data=more))
    assert_refused(refused, f"another run (data was {more}, as ids ", f"now it is {more}, as ids ")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    assert_refused(here(flags(base, tmp_path / "mine")), "something else")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_two_processes_do_not_train_in_one_folder(base, here, tmp_path):
    out = tmp_path / "run"
    process = launch(flags(base, out, **LONG))
    assert wait_for(lambda: logged_steps(out) >= 1, process)
    os.killpg(process.pid, signal.SIGSTOP)  # it holds the folder for as long as we look
    try:
        assert_refused(here(flags(base, out, **LONG)), "another process")
    finally:
        os.killpg(process.pid, signal.SIGCONT)
        kill(process)


def test_under_torchrun_a_mistake_is_said_once_by_all_ranks_leaving(base, tmp_path):
    (tmp_path / "bad.json").write_text('[{"instruction": "Do", "output": 5}]')
    words = flags(base, tmp_path / "run", data=tmp_path / "bad.json")
    code, _, err = finish(launch(words, ranks=2), timeout=60)
    assert code == 1 and err.count("fsdp_train.py: error") == 1, err
    assert "bad.json, line 1: output is 5" in err
    assert err.count("exitcode  : 2") == 2
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- the shapes people run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "replicas"), [(3, 1), (8, 1), (4, 2)], ids=["3, uneven shards", "8", "2 x 2"]
)
def test_more_ranks_equal_one(base, reference, tmp_path, ranks, replicas):
    trained(flags(base, tmp_path / "run", replicas=replicas), ranks)
    assert_same_run(tmp_path / "run", reference)


@pytest.mark.slow
def test_two_machines_equal_one(base, reference, tmp_path):
    """Two torchrun agents that meet over the network, here the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = []
    for node in range(2):
        run = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank"]
        run += [str(node), "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
        run += ["--master-port", str(port), ROOT / "fsdp_train.py"]
        agents.append(
            subprocess.Popen(
                [*run, *flags(base, tmp_path / "run")],
                cwd=ROOT,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
    for agent in agents:
        code, _, err = finish(agent)
        assert code == 0, err
    assert_same_run(tmp_path / "run", reference)
