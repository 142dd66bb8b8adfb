"""base + diff is the tuned model in every bit, or an error that names what is wrong."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_refused, hf_model, small_config, small_model
from safetensors.torch import load_file, save_file

import weightdiff
from checkpoint import DTYPES, read_config, save_model, stored_tensors

HEAD = "lm_head.weight"


def write(folder: Path, model=None, dtype=torch.float32, change=None, shard=10**9, **how) -> Path:
    """A checkpoint of the small model; `change` edits its tensors."""
    model = model or small_model(**how)
    numbers = {n: p.detach().to(dtype).clone() for n, p in model.named_parameters()}
    if change:
        change(numbers)
    save_model(numbers.items(), model.config, folder, dtype, shard_bytes=shard)
    (folder / "tokenizer.model").write_bytes(b"pieces")
    return folder


def tuned_a_little(numbers: dict) -> None:
    torch.manual_seed(1)
    for tensor in numbers.values():
        tensor += (0.01 * torch.randn(tensor.shape)).to(tensor.dtype)


def odd_values(numbers: dict) -> None:
    """NaN of several kinds, infinities, zeros of both signs, the smallest and largest numbers."""
    tuned_a_little(numbers)
    for number, tensor in enumerate(numbers.values()):
        info, flat = torch.finfo(tensor.dtype), tensor.view(-1)
        odd = [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, info.max, info.min, info.tiny]
        flat[number % 7 : number % 7 + 8] = torch.tensor(odd, dtype=torch.float64).to(tensor.dtype)
        integers = flat.view(weightdiff.INTEGER[tensor.element_size()])
        integers[20] = torch.iinfo(integers.dtype).max  # a NaN with all its bits
        integers[21] = torch.iinfo(integers.dtype).min  # -0.0


def bits(folder: Path) -> dict[str, bytes]:
    found = {name: stored.read() for name, stored in stored_tensors(folder).items()}
    return {
        n: bytes(str(t.dtype), "ascii") + t.view(torch.uint8).numpy().tobytes()
        for n, t in found.items()
    }


def roundtrip(command, tmp_path, base: Path, tuned: Path, *how: str) -> str:
    """make, verify, recover; the recovered folder equals the tuned one. Returns what was said."""
    diff, out = tmp_path / "diff", tmp_path / "out"
    code, _, said = command(
        weightdiff, "make", "--base", base, "--tuned", tuned, "--diff", diff, *how
    )
    assert code == 0, said
    assert command(weightdiff, "verify", "--base", base, "--diff", diff)[0] == 0
    code, _, err = command(weightdiff, "recover", "--base", base, "--diff", diff, "--tuned", out)
    assert code == 0, err
    assert bits(out) == bits(tuned)
    for name in ("config.json", "tokenizer.model", "generation_config.json"):
        assert (out / name).read_bytes() == (tuned / name).read_bytes()
    assert not list(tmp_path.glob("*.partial"))
    return said


# ---------------------------------------------------------------- bit for bit


@pytest.mark.parametrize("how", [(), ("--compress",)], ids=["plain", "compressed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_comes_back(tmp_path, command, dtype, how):
    base = write(tmp_path / "base", dtype=DTYPES[dtype])
    tuned = write(tmp_path / "tuned", dtype=DTYPES[dtype], change=odd_values)
    roundtrip(command, tmp_path, base, tuned, *how)
    size = sum(file.stat().st_size for file in (tmp_path / "diff").glob("*.diff"))
    whole = sum(t.read().nbytes for t in stored_tensors(tuned).values())
    assert size < 0.97 * whole if how else size == whole


@pytest.mark.parametrize("how", [(), ("--compress",)], ids=["plain", "compressed"])
def test_pieces_fit_together(tmp_path, command, monkeypatch, how):
    """Tensors of many pieces, the last one short."""
    monkeypatch.setattr(weightdiff, "PIECE", 1000)
    base = write(tmp_path / "base", dtype=torch.bfloat16)
    tuned = write(tmp_path / "tuned", dtype=torch.bfloat16, change=odd_values)
    roundtrip(command, tmp_path, base, tuned, *how)


def test_shards_may_lie_otherwise(tmp_path, command):
    base = write(tmp_path / "base", shard=40_000)
    tuned = write(tmp_path / "tuned", change=tuned_a_little, shard=90_000)
    assert len(list(base.glob("*.safetensors"))) != len(list(tuned.glob("*.safetensors"))) > 1
    roundtrip(command, tmp_path, base, tuned)


def test_a_base_of_another_dtype_is_converted_and_that_is_said(tmp_path, command):
    base = write(tmp_path / "base", dtype=torch.float32)
    tuned = write(tmp_path / "tuned", dtype=torch.bfloat16, change=tuned_a_little)
    said = roundtrip(command, tmp_path, base, tuned)
    assert "the base is float32 and is converted to bfloat16" in said
    rounded = write(tmp_path / "rounded", dtype=torch.bfloat16)  # has the same bits once converted
    code, _, err = command(
        weightdiff,
        "recover",
        "--base",
        rounded,
        "--diff",
        tmp_path / "diff",
        "--tuned",
        tmp_path / "b",
    )
    assert code == 0, err


def test_a_meta_base(tmp_path, command):
    from test_checkpoint import write_meta

    config = small_config(num_key_value_heads=4)
    from model import Llama

    torch.manual_seed(0)
    model = Llama(config)
    base = tmp_path / "meta"
    write_meta(model, base, 2)
    hf = write(tmp_path / "hf", model)
    tuned = write(tmp_path / "tuned", model, change=tuned_a_little)
    roundtrip(command, tmp_path, base, tuned)
    code, _, err = command(
        weightdiff, "recover", "--base", hf, "--diff", tmp_path / "diff", "--tuned", tmp_path / "b"
    )
    assert code == 0, err


@pytest.mark.parametrize("rows", [(128, 131), (131, 128)], ids=["grown", "shrunk"])
def test_a_vocabulary_may_grow_or_shrink(tmp_path, command, rows):
    base = write(tmp_path / "base", vocab_size=rows[0])
    tuned = write(tmp_path / "tuned", change=tuned_a_little, vocab_size=rows[1])
    said = roundtrip(command, tmp_path, base, tuned)
    whose = "tuned model" if rows[1] > rows[0] else "base"
    assert f"{HEAD}: rows from 128 on are the {whose}'s alone" in said


@pytest.mark.parametrize("base_tied", [False, True])
@pytest.mark.parametrize("tuned_tied", [False, True])
def test_tied_heads(tmp_path, command, base_tied, tuned_tied):
    base = write(tmp_path / "base", tie_word_embeddings=base_tied)
    tuned = write(tmp_path / "tuned", change=tuned_a_little, tie_word_embeddings=tuned_tied)
    said = roundtrip(command, tmp_path, base, tuned)
    assert ("head is tied" in said) == (base_tied and not tuned_tied)
    assert (f"only the base has {HEAD}" in said) == (tuned_tied and not base_tied)
    assert (HEAD in stored_tensors(tmp_path / "out")) != tuned_tied


def test_what_fine_tuning_left_alone_costs_next_to_nothing(tmp_path, command):
    def only_norms(numbers):
        for name in numbers:
            if "norm" in name:
                numbers[name] += 0.5

    base = write(tmp_path / "base", dtype=torch.bfloat16)
    tuned = write(tmp_path / "tuned", dtype=torch.bfloat16, change=only_norms)
    roundtrip(command, tmp_path, base, tuned, "--compress")
    size = sum(file.stat().st_size for file in (tmp_path / "diff").glob("*.diff"))
    assert size < 0.03 * sum(t.read().nbytes for t in stored_tensors(tuned).values())


def test_info_tells_what_is_in_a_diff(tmp_path, command):
    base = write(tmp_path / "base", vocab_size=127)
    tuned = write(tmp_path / "tuned", change=tuned_a_little)
    roundtrip(command, tmp_path, base, tuned)
    code, out, _ = command(weightdiff, "info", "--diff", tmp_path / "diff")
    assert code == 0 and "21 tensors of float32" in out and "(100.0%)" in out
    assert "rows from 127 on" in out and "tokenizer.model" in out


# ---------------------------------------------------------------- what is wrong is named


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(base, diff, tuned), made once; tests work on copies."""
    folder = tmp_path_factory.mktemp("published")
    base = write(folder / "base", dtype=torch.bfloat16)
    tuned = write(folder / "tuned", dtype=torch.bfloat16, change=tuned_a_little)
    weightdiff.make(base, tuned, folder / "diff", compress=False)
    weightdiff.make(base, tuned, folder / "packed", compress=True)
    return folder


def flipped(file: Path, place: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


def recovered(command, folder: Path, diff: str = "diff"):
    args = ("--base", folder / "base", "--diff", folder / diff, "--tuned", folder / "out")
    result = command(weightdiff, "recover", *args)
    if result[0]:
        assert not (folder / "out").exists() and not (folder / "out.partial").exists()
        assert result[2].count("error:") == 1 and "Traceback" not in result[2]
    return result


@pytest.mark.parametrize("diff", ["diff", "packed"])
def test_a_flipped_bit_anywhere_in_the_diff_is_named(published, tmp_path, command, diff):
    rng = random.Random(0)
    for file in sorted((published / diff).iterdir()):
        for _ in range(3):
            shutil.rmtree(tmp_path / "c", ignore_errors=True)
            shutil.copytree(published, tmp_path / "c")
            flipped(
                tmp_path / "c" / diff / file.name,
                rng.randrange(file.stat().st_size),
                rng.randrange(8),
            )
            code, _, err = recovered(command, tmp_path / "c", diff)
            named = file.name.removesuffix(".diff")
            assert code == 2 and (named in err or ("manifest" in named and "manifest" in err)), err


def test_a_flipped_bit_in_the_base_is_named(published, tmp_path, command):
    numbers = load_file(published / "base/model.safetensors")
    rng = random.Random(0)
    for name in numbers:
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        shutil.copytree(published, tmp_path / "c")
        changed = {n: t.clone() for n, t in numbers.items()}
        integers = changed[name].view(-1).view(torch.int16)
        integers[rng.randrange(len(integers))] ^= 1 << rng.randrange(15)
        save_file(changed, tmp_path / "c/base/model.safetensors", {"format": "pt"})
        code, _, err = recovered(command, tmp_path / "c")
        assert code == 2 and f"the base is another one: its {name} is not" in err


@pytest.mark.parametrize("diff", ["diff", "packed"])
def test_diffs_cut_short_made_longer_or_missing_are_named(published, tmp_path, command, diff):
    name = "model.layers.1.mlp.up_proj.weight.diff"
    for change in (
        lambda f: f.write_bytes(f.read_bytes()[:-1]),
        lambda f: f.write_bytes(f.read_bytes() + b"x"),
        lambda f: f.write_bytes(b""),
        lambda f: f.write_bytes(b"\xff" * 1000),
        lambda f: f.unlink(),
    ):
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        shutil.copytree(published, tmp_path / "c")
        change(tmp_path / "c" / diff / name)
        code, _, err = recovered(command, tmp_path / "c", diff)
        assert code == 2 and name in err, err
    for name in ("manifest.json", "manifest.sha256", "config.json", "tokenizer.model"):
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        shutil.copytree(published, tmp_path / "c")
        (tmp_path / "c" / diff / name).unlink()
        code, _, err = recovered(command, tmp_path / "c", diff)
        assert code == 2 and name in err, err


def test_another_base_is_refused(published, tmp_path, command):
    shutil.copytree(published, tmp_path / "c")
    shutil.rmtree(tmp_path / "c/base")
    write(tmp_path / "c/base", dtype=torch.bfloat16, change=tuned_a_little)
    assert "the base is another one" in recovered(command, tmp_path / "c")[2]
    shutil.rmtree(tmp_path / "c/base")
    write(tmp_path / "c/base", dtype=torch.bfloat16, vocab_size=100)
    assert "missing or smaller" in recovered(command, tmp_path / "c")[2]


@pytest.mark.parametrize(
    "edit, word",
    [
        (lambda m: m.update(format="bitwise difference, 2"), "this version reads"),
        (lambda m: m["files"].update({"../evil": "0"}), "have no place in a diff"),
        (
            lambda m: m["tensors"].update({"../../evil": m["tensors"][HEAD]}),
            "not those of config",
        ),
        (lambda m: m["tensors"].pop(HEAD), "not those of config"),
        (lambda m: m["tensors"][HEAD].update(dtype="load"), "is not what config.json says"),
        (lambda m: m["tensors"][HEAD].update(shape=[1, 2]), "is not what config.json says"),
        (lambda m: m["tensors"][HEAD].update(known=-1), "is not what config.json says"),
        (lambda m: m["tensors"][HEAD].update(known="x"), "is not what config.json says"),
        (lambda m: m["tensors"][HEAD].pop("base"), "not laid out"),
        (lambda m: m.update(tensors=[1]), "not laid out"),
        (lambda m: m.pop("files"), "not laid out"),
        (lambda m: m.update(files={"config.json": 3}), "config.json"),
    ],
)
def test_a_hostile_manifest_with_a_right_seal_is_one_line(published, tmp_path, command, edit, word):
    shutil.copytree(published, tmp_path / "c")
    file = tmp_path / "c/diff/manifest.json"
    manifest = json.loads(file.read_text())
    edit(manifest)
    file.write_text(json.dumps(manifest))
    (tmp_path / "c/diff/manifest.sha256").write_bytes(weightdiff.seal_of(file.read_bytes()))
    code, _, err = recovered(command, tmp_path / "c")
    assert code == 2 and word in err and err.count("\n") == 1, err


def test_mistakes_are_one_line_and_nothing_is_written(published, tmp_path, command):
    base, diff, tuned = (published / name for name in ("base", "diff", "tuned"))
    new = tmp_path / "new"
    make = ("make", "--base", base, "--tuned", tuned, "--diff")
    assert_refused(command(weightdiff, *make, diff), "exists already")
    assert_refused(
        command(weightdiff, *make, new, "--format", "alpaca", "--compress"), "--compress"
    )
    wide = write(tmp_path / "wide", hidden_size=32)
    result = command(weightdiff, "make", "--base", base, "--tuned", wide, "--diff", new)
    assert_refused(result, "differ in shape", "model.embed_tokens.weight")
    nothing = tmp_path / "nothing"
    for verb in ("recover", "verify", "info"):
        args = [] if verb == "info" else ["--base", base]
        args += ["--tuned", new] if verb == "recover" else []
        assert_refused(command(weightdiff, verb, *args, "--diff", nothing), "no such folder")
    result = command(weightdiff, "verify", "--base", base, "--diff", diff, "--expect-sum", 1)
    assert_refused(result, "--expect-sum")
    assert_refused(command(weightdiff, "verify", "--base", base, "--diff", tuned), "--expect-sum")
    assert not new.exists()


# ---------------------------------------------------------------- diffs like Alpaca's


def as_alpaca_did(raw: dict, other: dict, sign: int) -> dict:
    """Its arithmetic, on state dicts in fp32: tuned += -raw, or diff += raw."""
    for name, tensor in other.items():
        tensor.add_(sign * raw[name])
    return other


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory):
    """A base of 128 rows and a tuned model of 129 as transformers makes them, and its diff."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("alpaca")
    config = small_config()
    hf_model(config).save_pretrained(folder / "base")
    grown = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    grown.resize_token_embeddings(129, mean_resizing=False)
    for layer in (grown.get_input_embeddings(), grown.get_output_embeddings()):
        rows = layer.weight.data
        rows[-1:] = rows[:-1].mean(dim=0, keepdim=True)
    raw = {name: tensor.clone() for name, tensor in grown.state_dict().items()}
    torch.manual_seed(3)
    for parameter in grown.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    grown.save_pretrained(folder / "tuned", max_shard_size="100KB")
    tuned = {name: tensor.clone() for name, tensor in grown.state_dict().items()}
    difference = as_alpaca_did(raw, {n: t.clone() for n, t in tuned.items()}, -1)
    grown.load_state_dict(difference)
    grown.save_pretrained(folder / "diff", max_shard_size="90KB")
    return folder, raw, difference


def test_a_diff_like_alpaca_s_is_the_same_in_every_bit(alpaca, tmp_path, command):
    folder, _, difference = alpaca
    args = ("--base", folder / "base", "--tuned", folder / "tuned", "--diff", tmp_path / "d")
    code, _, err = command(weightdiff, "make", "--format", "alpaca", *args)
    assert code == 0, err
    found = {name: stored.read() for name, stored in stored_tensors(tmp_path / "d").items()}
    assert found.keys() == difference.keys()
    assert all(torch.equal(found[name], difference[name]) for name in found)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_alpaca_s_diff_is_recovered_as_its_script_does(alpaca, tmp_path, command, kind):
    from transformers import LlamaForCausalLM

    folder, raw, difference = alpaca
    diff = folder / "diff"
    if kind == "bin":  # as published: pickled shards, with the rotary tables of that time
        shutil.copytree(diff, tmp_path / "d", ignore=shutil.ignore_patterns("*.safetensors*"))
        table = 1.0 / 10000 ** (torch.arange(0, 16, 2).float() / 16)
        tables = {
            f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.zeros_like(table)
            for n in (0, 1)
        }
        names = list(difference)
        shards = [
            {name: difference[name] for name in names[:9]} | tables,
            {name: difference[name] for name in names[9:]},
        ]
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            title = f"pytorch_model-{number:05}-of-00002.bin"
            torch.save(shard, tmp_path / "d" / title)
            weight_map |= dict.fromkeys(shard, title)
        index = {"metadata": {}, "weight_map": weight_map}
        (tmp_path / "d/pytorch_model.bin.index.json").write_text(json.dumps(index))
        diff = tmp_path / "d"
    whole = as_alpaca_did(raw, {name: tensor.clone() for name, tensor in difference.items()}, 1)
    total = float(sum(whole[name].sum() for name in whole))
    total += 2 * float(table.sum()) if kind == "bin" else 0
    args = ("recover", "--base", folder / "base", "--diff", diff, "--tuned", tmp_path / "out")
    code, _, err = command(weightdiff, *args, "--expect-sum", total + 0.1)
    assert code == 2 and "--expect-sum" in err and not (tmp_path / "out").exists()
    code, _, err = command(weightdiff, *args, "--expect-sum", total)
    assert code == 0, err
    found = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    code, _, err = command(weightdiff, "verify", *args[1:5], "--expect-sum", total)
    assert code == 0, err


def test_alpaca_s_diff_may_be_recovered_in_half_precision(alpaca, tmp_path, command):
    folder, raw, difference = alpaca
    args = ("--base", folder / "base", "--diff", folder / "diff", "--tuned", tmp_path / "out")
    assert command(weightdiff, "recover", *args, "--dtype", "bf16")[0] == 0
    found = stored_tensors(tmp_path / "out")[HEAD].read()
    assert torch.equal(found, (difference[HEAD] + raw[HEAD]).bfloat16())
    assert read_config(tmp_path / "out").vocab_size == 129


# ---------------------------------------------------------------- interrupted


def big_pair(folder: Path) -> None:
    """130 MB in 50 tensors: a second or so."""
    how = {"vocab_size": 4000, "hidden_size": 768, "intermediate_size": 2048}
    how |= {"num_hidden_layers": 5, "num_attention_heads": 12, "num_key_value_heads": 12}
    base = write(folder / "base", dtype=torch.bfloat16, **how)
    numbers = load_file(base / "model.safetensors")
    tuned_a_little(numbers)
    shutil.copytree(base, folder / "tuned")
    save_file(numbers, folder / "tuned/model.safetensors", {"format": "pt"})


def killed_until_done(args: list, output: Path, kills: int, seed: int) -> None:
    """Killed once it has written something, and a little later."""
    rng, happened = random.Random(seed), 0
    command = [sys.executable, str(ROOT / "weightdiff.py"), *map(str, args)]
    partial = output.with_name(output.name + ".partial")
    while not output.exists():
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        if happened < kills:
            while process.poll() is None and not (partial.exists() and any(partial.iterdir())):
                time.sleep(0.001)
            before = len(list(partial.iterdir())) if partial.exists() else 0
            more, until = rng.randrange(20), time.monotonic() + rng.uniform(0, 0.15)
            while process.poll() is None and partial.exists() and time.monotonic() < until:
                if len(list(partial.iterdir())) > before + more:
                    break
            process.kill()
        _, said = process.communicate()
        happened += process.returncode == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL), said
        assert (process.returncode == 0) == output.exists()
        assert happened == kills or not output.exists(), "it was done before it could be killed"


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on_and_ends_the_same(tmp_path, kills):
    big_pair(tmp_path)
    pair = ["--base", tmp_path / "base", "--tuned", tmp_path / "tuned"]
    weightdiff.make(tmp_path / "base", tmp_path / "tuned", tmp_path / "quiet", compress=False)
    killed_until_done(["make", *pair, "--diff", tmp_path / "diff"], tmp_path / "diff", kills, 1)
    for file in (tmp_path / "quiet").iterdir():
        assert file.read_bytes() == (tmp_path / "diff" / file.name).read_bytes(), file.name
    assert len(list((tmp_path / "diff").iterdir())) == len(list((tmp_path / "quiet").iterdir()))
    args = ["recover", "--base", tmp_path / "base", "--diff", tmp_path / "diff"]
    killed_until_done([*args, "--tuned", tmp_path / "out"], tmp_path / "out", kills, 2)
    assert bits(tmp_path / "out") == bits(tmp_path / "tuned")


def test_what_is_done_is_not_done_again_unless_its_inputs_changed(tmp_path, monkeypatch):
    base, tuned = write(tmp_path / "base"), write(tmp_path / "tuned", change=tuned_a_little)
    made, real = [], weightdiff.make_tensor

    def dies_at_the_tenth(*args):
        if len(made) == 9:
            raise OSError(28, "No space left on device")
        made.append(args[2].name)
        return real(*args)

    monkeypatch.setattr(weightdiff, "THREADS", 1)
    monkeypatch.setattr(weightdiff, "make_tensor", dies_at_the_tenth)
    with pytest.raises(OSError, match="No space"):
        weightdiff.make(base, tuned, tmp_path / "diff", False)
    assert not (tmp_path / "diff").exists()
    again = []
    monkeypatch.setattr(weightdiff, "make_tensor", lambda *a: again.append(a[2].name) or real(*a))
    weightdiff.make(base, tuned, tmp_path / "diff", False)
    assert len(again) == 21 - 9 and not set(again) & set(made)
    # the same, but the tuned model is another one when the run goes on
    made.clear(), again.clear()
    monkeypatch.setattr(weightdiff, "make_tensor", dies_at_the_tenth)
    with pytest.raises(OSError, match="No space"):
        weightdiff.make(base, tuned, tmp_path / "diff2", False)
    os.utime(tuned / "model.safetensors", (1, 1))
    monkeypatch.setattr(weightdiff, "make_tensor", lambda *a: again.append(a[2].name) or real(*a))
    weightdiff.make(base, tuned, tmp_path / "diff2", False)
    assert len(again) == 21


@pytest.mark.slow
def test_memory_and_time_at_1_1_billion(tmp_path):
    """In a process of its own: anonymous memory beyond torch's, and time against plain copying."""
    script = f"""
import sys, time, hashlib, os
sys.path[:0] = [{str(ROOT)!r}]
from pathlib import Path
import torch, weightdiff
from bench.measure import PeakMemory
from bench.weightdiff import write_pair
folder = Path({str(tmp_path)!r})
weightdiff.console.notice = print
def copied():
    start = time.perf_counter()
    for name in ("base", "tuned"):
        with open(folder / name / "model.safetensors", "rb") as f:
            digest = hashlib.sha256()
            while part := f.read(1 << 23):
                digest.update(part)
    data = bytes(1 << 23)
    digest = hashlib.sha256()
    with open(folder / "copy", "wb") as f:
        for _ in range(os.path.getsize(folder / "tuned/model.safetensors") >> 23):
            digest.update(data)
            f.write(data)
        f.flush()
        os.fsync(f.fileno())
    return time.perf_counter() - start
for verb in ("make", "recover"):
    with PeakMemory() as memory:
        start = time.perf_counter()
        if verb == "make":
            weightdiff.make(folder / "base", folder / "tuned", folder / "diff", False)
        else:
            weightdiff.recover(folder / "base", folder / "diff", folder / "out")
        taken = time.perf_counter() - start
    print(verb, memory.anonymous, taken, copied())
"""
    sys.path.insert(0, str(ROOT))
    from bench.weightdiff import write_pair

    write_pair(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    for line in done.stdout.splitlines():
        if line.startswith(("make", "recover")):
            _verb, memory, taken, copied = line.split()
            assert int(memory) < 600e6, line
            assert float(taken) < 2 * float(copied), line
