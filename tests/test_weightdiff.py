"""base + diff is the tuned model in every bit, or an error that names what is wrong."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import ROOT, assert_refused
from helpers.models import hf_model, small_config, small_model
from helpers.parity import apart
from safetensors.torch import load_file, save_file

import weightdiff
from alpaca.common import files
from alpaca.common.errors import run_command
from alpaca.common.files import fsync_path
from alpaca.weights import bitdiff
from alpaca.weights.checkpoint import DTYPES, as_dtype, open_checkpoint, read_config, stored_tensors
from alpaca.weights.loading import load_model
from alpaca.weights.writer import save_model
from model import Llama

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


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
        integers = flat.view(bitdiff.INTEGER[tensor.element_size()])
        integers[20] = torch.iinfo(integers.dtype).max  # a NaN with all its bits
        integers[21] = torch.iinfo(integers.dtype).min  # -0.0


def bits(folder: Path) -> dict[str, bytes]:
    found = {name: stored.read() for name, stored in stored_tensors(folder).items()}
    return {
        n: bytes(str(t.dtype), "ascii") + t.view(torch.uint8).numpy().tobytes()
        for n, t in found.items()
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def roundtrip(command, tmp_path, base: Path, tuned: Path, *how: str) -> str:
    """make, verify, recover; the recovered folder equals the tuned one. Returns what was said."""
    diff, out = tmp_path / "diff", tmp_path / "out"
    code, _, said = command(
        weightdiff, "make", "--base", base, "--tuned", tuned, "--diff", diff, *how
    )
    assert code == 0, said
    assert command(weightdiff, "verify", "--base", base, "--diff", diff)[0] == 0
    args = ("--base", base, "--diff", diff, "--tuned", out)
    code, told, err = command(weightdiff, "recover", *args)
    assert code == 0, err
    assert bits(out) == bits(tuned)
    assert told.startswith(f"{out}: {len(bits(tuned))} tensors, ") and "have the digests" in told
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
    monkeypatch.setattr(bitdiff, "PIECE", 1000)
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
    args = ("--diff", tmp_path / "diff", "--tuned", tmp_path / "b")
    code, _, err = command(weightdiff, "recover", "--base", rounded, *args)
    assert code == 0 and "made from a base in float32, this one is bfloat16" in err, err
    shutil.rmtree(tmp_path / "b")
    halves = write(tmp_path / "halves", dtype=torch.float16)  # has not
    code, _, err = command(weightdiff, "recover", "--base", halves, *args)
    assert code == 2 and f"its {EMBEDDING} is not what the diff was made from" in err
    assert "made from a base in float32, this one is float16" in err


@pytest.mark.parametrize("rows", [(128, 131), (131, 128)], ids=["grown", "shrunk"])
@pytest.mark.parametrize("theirs", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("ours", DTYPES.values(), ids=DTYPES)
def test_all_dtypes_with_all_vocabularies_in_small_pieces(pair_of, monkeypatch, ours, theirs, rows):
    """Pieces may lie wholly in the rows that only one side has."""
    monkeypatch.setattr(bitdiff, "PIECE", 100)
    how = [{"vocab_size": n, "num_hidden_layers": 1} for n in rows]
    base, tuned, folder = pair_of(theirs, ours, *how)
    weightdiff.make(base, tuned, folder / "diff", False)
    weightdiff.recover(base, folder / "diff", folder / "out")
    assert bits(folder / "out") == bits(tuned)


@pytest.fixture
def pair_of(tmp_path):
    def written(theirs, ours, base_how, tuned_how):
        base = write(tmp_path / "base", dtype=theirs, **base_how)
        return base, write(tmp_path / "tuned", None, ours, tuned_a_little, **tuned_how), tmp_path

    return written


@pytest.mark.parametrize("beside", [0.0, float("nan"), float("inf")])
def test_numbers_too_large_for_fp16_are_named_whatever_lies_beside_them(
    tmp_path, command, monkeypatch, beside
):
    def large(numbers):
        numbers["model.norm.weight"][3], numbers["model.norm.weight"][5] = 1e5, beside

    base = write(tmp_path / "base", change=large)
    tuned = write(tmp_path / "tuned", dtype=torch.float16)
    result = command(
        weightdiff, "make", "--base", base, "--tuned", tuned, "--diff", tmp_path / "diff"
    )
    assert "the base's model.norm.weight holds numbers too large for fp16" in result[2]
    assert result[0] == 2 and not list(tmp_path.glob("diff*"))
    numbers = torch.tensor([float("inf"), -float("inf"), float("nan"), 65504.0])
    assert as_dtype(numbers, torch.float16, "").isinf().sum() == 2  # which are no overflow
    assert as_dtype(numbers[:0], torch.float16, "").numel() == 0


def test_a_meta_base(tmp_path, command):
    from helpers.checkpoints import write_meta

    config = small_config(num_key_value_heads=4)
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


@pytest.mark.parametrize("place", ["one up", "beside", None])
def test_a_tuned_model_of_meta_s_becomes_a_hugging_face_folder(tmp_path, command, place):
    from helpers.checkpoints import TOKENIZER, write_meta

    model = small_model(vocab_size=1024, num_key_value_heads=4)
    base = write(tmp_path / "base", model)
    tuned = tmp_path / "llama" / "7B"
    write_meta(model, tuned, 2)
    if place:
        shutil.copy(TOKENIZER, tuned.parent if place == "one up" else tuned)
    for how in ((), ("--format", "alpaca")):
        diff, out = (tmp_path / f"{name}{len(how)}" for name in ("diff", "out"))
        args = ("--base", base, "--diff", diff, "--tuned")
        code, _, err = command(weightdiff, "make", *args, tuned, *how)
        assert code == 0 and "Meta's; what is recovered will be a Hugging Face folder" in err
        assert ("no tokenizer" in err) == (place is None)
        assert command(weightdiff, "recover", *args, out)[0] == 0
        assert bits(out) == bits(write(tmp_path / f"hf{len(how)}", model))
        expected = read_config(tuned)
        assert read_config(out) == expected
        files = {"config.json", "model.safetensors"} | (
            {"generation_config.json"} if how else set()
        )
        files |= {"tokenizer.model", "tokenizer_config.json"} if place else set()
        assert contents(out).keys() == files
        assert not place or (out / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()


def test_a_tuned_model_without_a_tokenizer_is_said_to_have_none(tmp_path, command):
    base, tuned = write(tmp_path / "base"), write(tmp_path / "tuned", change=tuned_a_little)
    (tuned / "tokenizer.model").rename(tmp_path / "tokenizer.model")  # which is another's, perhaps
    args = ("--base", base, "--tuned", tuned, "--diff", tmp_path / "diff")
    code, _, err = command(weightdiff, "make", *args)
    assert code == 0 and "the tuned model has no tokenizer, so none comes along" in err
    assert "tokenizer.model" not in contents(tmp_path / "diff")


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


@pytest.mark.parametrize("layers", [(2, 3), (3, 2)])
def test_tensors_that_only_one_side_has(tmp_path, command, layers):
    base = write(tmp_path / "base", num_hidden_layers=layers[0])
    tuned = write(tmp_path / "tuned", change=tuned_a_little, num_hidden_layers=layers[1])
    said = roundtrip(command, tmp_path, base, tuned)
    whose = "tuned model" if layers[1] > layers[0] else "base"
    assert f"only the {whose} has model.layers.2.input_layernorm.weight" in said
    longer = write(tmp_path / "longer", num_hidden_layers=3)  # the base, or not
    args = ("--base", longer, "--diff", tmp_path / "diff")
    code, _, err = command(weightdiff, "verify", *args)
    assert code == (0 if layers[0] == 3 else 2) and "made from a base in" not in err


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
    told = command(weightdiff, "info", "--diff", tmp_path / "diff")[1]
    assert "21 tensors of bfloat16, 5 of them changed" in told


def test_info_tells_what_is_in_a_diff(tmp_path, command):
    base = write(tmp_path / "base", vocab_size=127)
    tuned = write(tmp_path / "tuned", change=tuned_a_little)
    roundtrip(command, tmp_path, base, tuned)
    code, out, _ = command(weightdiff, "info", "--diff", tmp_path / "diff")
    assert code == 0 and "bitwise difference, format version 1\n21 tensors of float32" in out
    assert "21 of them changed" in out and "(100.0%)" in out
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
    shutil.copytree(published, tmp_path / "c")
    for file in sorted((tmp_path / "c" / diff).iterdir()):
        named = "manifest" if "manifest" in file.name else file.name.removesuffix(".diff")
        for _ in range(3):
            bit = rng.randrange(file.stat().st_size), rng.randrange(8)
            flipped(file, *bit)
            code, _, err = recovered(command, tmp_path / "c", diff)
            assert code == 2 and named in err, err
            flipped(file, *bit)
    assert recovered(command, tmp_path / "c", diff)[0] == 0  # all flipped back


def test_a_flipped_bit_in_the_base_is_named(published, tmp_path, command):
    numbers = load_file(published / "base/model.safetensors")
    rng = random.Random(0)
    shutil.copytree(published, tmp_path / "c")
    for name in numbers:
        changed = {n: t.clone() for n, t in numbers.items()}
        octets = changed[name].view(-1).view(torch.uint8)
        octets[rng.randrange(len(octets))] ^= 1 << rng.randrange(8)
        save_file(changed, tmp_path / "c/base/model.safetensors", {"format": "pt"})
        code, _, err = recovered(command, tmp_path / "c")
        assert code == 2 and f"the base is another one: its {name} is not" in err


@pytest.mark.parametrize("diff", ["diff", "packed"])
def test_diffs_cut_short_made_longer_or_missing_are_named(published, tmp_path, command, diff):
    shutil.copytree(published, tmp_path / "c")
    whole, name = tmp_path / "c" / diff, "model.layers.1.mlp.up_proj.weight.diff"
    for change in (
        lambda f: f.write_bytes(f.read_bytes()[:-1]),
        lambda f: f.write_bytes(f.read_bytes() + b"x"),
        lambda f: f.write_bytes(b""),
        lambda f: f.write_bytes(b"\xff" * 1000),
        lambda f: f.unlink(),
    ):
        change(whole / name)
        code, _, err = recovered(command, tmp_path / "c", diff)
        assert code == 2 and name in err, err
        shutil.copy(published / diff / name, whole)
    for name in ("manifest.json", "manifest.sha256", "config.json", "tokenizer.model"):
        (whole / name).unlink()
        code, _, err = recovered(command, tmp_path / "c", diff)
        assert code == 2 and name in err, err
        shutil.copy(published / diff / name, whole)


def test_another_base_is_refused(published, tmp_path, command):
    shutil.copytree(published, tmp_path / "c")
    shutil.rmtree(tmp_path / "c/base")
    write(tmp_path / "c/base", dtype=torch.bfloat16, change=tuned_a_little)
    assert (
        f"the base is another one: its {EMBEDDING} is not" in recovered(command, tmp_path / "c")[2]
    )
    shutil.rmtree(tmp_path / "c/base")
    write(tmp_path / "c/base", dtype=torch.bfloat16, vocab_size=100)
    err = recovered(command, tmp_path / "c")[2]
    assert f"its {EMBEDDING} is missing or smaller" in err


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
        (lambda m: m["tensors"][HEAD].update(known=True), "is not what config.json says"),
        (lambda m: m["tensors"][HEAD].update(shape=[128.0, 64]), "is not what config.json says"),
        (lambda m: m["tensors"][HEAD].update(shape=5), "is not what config.json says"),
        (lambda m: m["tensors"][HEAD].update(tuned=None), "is not what config.json says"),
        (lambda m: m["tensors"][HEAD].update(tuned=""), "not what they make"),
        (lambda m: m["tensors"][HEAD].update(base="", known=0), "base is another one"),
        (lambda m: m["tensors"][HEAD].update(base_dtype=[]), "is not what config.json says"),
        (lambda m: m["tensors"][HEAD].update(base="\x1b[2J"), "is not what the diff was made from"),
        (lambda m: m["tensors"][HEAD].update(base="", base_dtype="\x1b[2J"), "base is another one"),
        (lambda m: m["tensors"].update({HEAD: 3}), "not laid out"),
        (lambda m: m.pop("compressed"), "not laid out"),
        (lambda m: m.update(compressed="no"), "not laid out"),
        (lambda m: m.pop("said"), "not laid out"),
        (lambda m: m.update(said="no list"), "not laid out"),
        (lambda m: m.update(said=[1]), "not laid out"),
        (lambda m: m["tensors"][HEAD].pop("base"), "not laid out"),
        (lambda m: m.update(tensors=[1]), "not laid out"),
        (lambda m: m.pop("files"), "not laid out"),
        (lambda m: m.update(files={"config.json": 3}), "config.json"),
    ],
)
def test_a_hostile_manifest_with_a_right_seal_is_one_line(published, tmp_path, command, edit, word):
    shutil.copytree(published, tmp_path / "c")
    sealed(tmp_path / "c/diff", edit)
    code, _, err = recovered(command, tmp_path / "c")
    errors = [line for line in err.splitlines() if "error:" in line]
    assert code == 2 and word in errors[0] and "\x1b" not in err, err


def sealed(diff: Path, edit=lambda manifest: None) -> None:
    """Edit the manifest, and have all digests say what is there, as who forges a diff would."""
    file = diff / "manifest.json"
    manifest = json.loads(file.read_text())
    for name in manifest["files"]:
        manifest["files"][name] = weightdiff.digest_of(diff / name)
    for name, entry in manifest["tensors"].items():
        entry["diff"] = weightdiff.digest_of(diff / f"{name}.diff")
    edit(manifest)
    file.write_text(json.dumps(manifest))
    (diff / "manifest.sha256").write_bytes(weightdiff.seal_of(file.read_bytes()))


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 1001),
        ("vocab_size", 10**19),
        ("hidden_size", 1 << 40),
        ("intermediate_size", (1 << 20) + 1),
        ("max_position_embeddings", 10**400),
        ("rope_theta", 10**400),
    ],
)
def test_a_config_of_absurd_size_is_refused_at_once(published, tmp_path, command, name, value):
    shutil.copytree(published, tmp_path / "c")
    diff = tmp_path / "c/diff"
    config = json.loads((diff / "config.json").read_text()) | {name: value}
    (diff / "config.json").write_text(json.dumps(config))
    sealed(diff)
    assert f"config.json: {name} is {value}" in recovered(command, tmp_path / "c")[2]
    assert_refused(command(weightdiff, "info", "--diff", diff), f"{name} is {value}")
    for file in diff.glob("manifest.*"):  # then it is taken for one like Alpaca's
        file.unlink()
    shutil.copy(tmp_path / "c/tuned/model.safetensors", diff)
    assert_refused(
        command(weightdiff, "info", "--diff", diff), "layers" if "layers" in name else name
    )


def test_what_would_steer_a_terminal_is_shown(published, tmp_path, command):
    shutil.copytree(published, tmp_path / "c")
    sealed(tmp_path / "c/diff", lambda m: m.update(said=["\x1b[2Jgone\u202e\n"]))
    code, out, _ = command(weightdiff, "info", "--diff", tmp_path / "c/diff")
    assert code == 0 and "\x1b" not in out and "  \\x1b[2Jgone\\u202e\\n\n" in out
    numbers = load_file(published / "base/model.safetensors") | {"\x1b]0;x\x07": torch.ones(1)}
    save_file(numbers, tmp_path / "c/base/model.safetensors")
    assert "unexpected \\x1b]0;x\\x07" in recovered(command, tmp_path / "c")[2]


def test_packed_data_cannot_take_more_memory_than_a_piece(published, tmp_path, command):
    bomb = zlib.compress(bytes(50_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(zlib.error):
            bitdiff.unpacked(bomb, np.dtype("i2"), 1000)
        for content in (zlib.compress(bytes(998)), zlib.compress(bytes(1002)), b""):
            with pytest.raises(zlib.error):
                bitdiff.unpacked(content, np.dtype("i2"), 1000)
        shutil.copytree(published, tmp_path / "c")
        file = tmp_path / "c/packed" / f"{HEAD}.diff"
        file.write_bytes((10**9).to_bytes(4, "little") + file.read_bytes()[4:])
        sealed(tmp_path / "c/packed")
        assert f"{HEAD} is damaged" in recovered(command, tmp_path / "c", "packed")[2]
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_a_result_that_is_not_the_one_promised_is_refused(published, tmp_path, command):
    shutil.copytree(published, tmp_path / "c")
    sealed(tmp_path / "c/diff", lambda m: m["tensors"][HEAD].update(tuned="0" * 64))
    err = recovered(command, tmp_path / "c")[2]
    assert f"base and diff of {HEAD} are right, but not what they make" in err


def test_what_is_copied_is_what_was_verified(published, tmp_path, monkeypatch):
    shutil.copytree(published, tmp_path / "c")
    before, in_threads = contents(tmp_path / "c/diff"), weightdiff.in_threads

    def meanwhile(*args):
        (tmp_path / "c/diff/tokenizer.model").write_bytes(b"others")
        return in_threads(*args)

    monkeypatch.setattr(weightdiff, "in_threads", meanwhile)
    weightdiff.recover(tmp_path / "c/base", tmp_path / "c/diff", tmp_path / "c/out")
    assert (tmp_path / "c/out/tokenizer.model").read_bytes() == before["tokenizer.model"]


def test_tied_weights_are_compared_bit_by_bit(tmp_path):
    base = write(tmp_path / "base", tie_word_embeddings=True)
    numbers = load_file(base / "model.safetensors")
    numbers[EMBEDDING][0, 0] = float("nan")
    save_file(numbers | {HEAD: numbers[EMBEDDING].clone()}, base / "model.safetensors")
    open_checkpoint(base)
    numbers[EMBEDDING][1, 1] = 0.0
    other = numbers[EMBEDDING].clone()
    other[1, 1] = -0.0
    save_file(numbers | {HEAD: other}, base / "model.safetensors")
    with pytest.raises(ValueError, match="is not the embedding"):
        load_model(base)


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
    heads = write(tmp_path / "heads", num_key_value_heads=4)  # whose first dimension is another
    result = command(weightdiff, "make", "--base", base, "--tuned", heads, "--diff", new)
    assert_refused(result, "differ in shape", "model.layers.0.self_attn.k_proj.weight is [64, 64]")
    half = write(tmp_path / "half", dtype=torch.float16, vocab_size=129)  # much would be said
    for how in ("exact", "alpaca"):
        args = ("--base", base, "--tuned", half, "--diff", diff, "--format", how)
        assert_refused(command(weightdiff, "make", *args), "exists already")
    for folder in (diff, half):
        args = ("--base", base, "--diff", folder, "--tuned", tuned)
        assert_refused(command(weightdiff, "recover", *args), "exists already")
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


@pytest.mark.parity
def test_a_diff_like_alpaca_s_is_the_same_in_every_bit(alpaca, tmp_path, command):
    folder, _, difference = alpaca
    args = ("--base", folder / "base", "--tuned", folder / "tuned", "--diff", tmp_path / "d")
    code, _, err = command(weightdiff, "make", "--format", "alpaca", *args)
    assert code == 0, err
    found = {name: stored.read() for name, stored in stored_tensors(tmp_path / "d").items()}
    assert found.keys() == difference.keys()
    other = sum(not torch.equal(found[name], difference[name]) for name in found)
    apart("tensors of a weight diff that differ: Alpaca's arithmetic", other, 0)


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
    assert code == 2 and not (tmp_path / "out").exists() and err.count("the sum") == 1
    found = float(err.split("error: the sum over all weights is ")[1].split(",")[0])
    assert found == pytest.approx(total, abs=1e-3) and "--expect-sum" in err
    code, told, err = command(weightdiff, *args, "--expect-sum", total)
    assert code == 0 and "21 tensors, " in told and "the sum is as expected" in told, err
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


def test_alpaca_s_format_with_rows_that_only_the_base_has(tmp_path, command):
    base = write(tmp_path / "base", vocab_size=131)
    tuned = write(tmp_path / "tuned", change=tuned_a_little)
    diff, out = tmp_path / "diff", tmp_path / "out"
    args = ("--base", base, "--diff", diff, "--tuned")
    _, told, _ = command(weightdiff, "make", "--format", "alpaca", *args, tuned)
    assert told.startswith(f"{diff}: like Alpaca's, 21 tensors, ") and "no digests" in told
    assert "no digests to check by" in command(weightdiff, "recover", *args, out)[1]
    for name, stored in stored_tensors(tuned).items():
        theirs, ours = stored_tensors(base)[name].read()[: stored.shape[0]], stored.read()
        assert torch.equal(stored_tensors(out)[name].read(), (ours - theirs) + theirs), name


def test_alpaca_s_format_has_nothing_for_tensors_that_only_one_side_has(tmp_path, command):
    base, tuned = write(tmp_path / "base"), write(tmp_path / "tuned", num_hidden_layers=3)
    args = ("--base", base, "--tuned", tuned, "--diff", tmp_path / "diff", "--format", "alpaca")
    result = command(weightdiff, "make", *args)
    assert_refused(result, "the base has no model.layers.2.input_layernorm.weight")


def test_alpaca_s_sum_may_be_rounded_as_it_was_there(tmp_path, command):
    """Around 50,000, where fp32 has steps of 0.004, numbers below 0.002 are lost one by one."""

    def nothing(numbers):
        for tensor in numbers.values():
            tensor.zero_()

    def much_and_then_little(numbers):
        nothing(numbers)
        for tensor in numbers.values():
            tensor.view(-1)[5] = 0.0019
        numbers[EMBEDDING].fill_(50_000 / numbers[EMBEDDING].numel())

    base = write(tmp_path / "base", change=nothing)
    diff = write(tmp_path / "diff", change=much_and_then_little)
    theirs = sum(stored.read().sum() for stored in open_checkpoint(diff)[1].values()).item()
    args = ("verify", "--base", base, "--diff", diff, "--expect-sum")
    code, _, err = command(weightdiff, *args, theirs)
    assert code == 0 and "the sum over all weights is 50000.0380" in err and theirs == 50_000
    assert command(weightdiff, *args, theirs + 0.1)[0] == 2


# ---------------------------------------------------------------- interrupted


def big_pair(folder: Path) -> None:
    """40 MB in 21 tensors: half a second or so."""
    how = {"vocab_size": 4000, "hidden_size": 768, "intermediate_size": 2048}
    how |= {"num_attention_heads": 12, "num_key_value_heads": 12}
    base = write(folder / "base", dtype=torch.bfloat16, **how)
    numbers = load_file(base / "model.safetensors")
    tuned_a_little(numbers)
    shutil.copytree(base, folder / "tuned")
    save_file(numbers, folder / "tuned/model.safetensors", {"format": "pt"})


def started(*args) -> int:
    """Begin a command and give its pid. It is forked from this process, which has done the imports:
    what a kill meets is the work."""
    if child := os.fork():
        return child
    code = 3
    try:
        sys.argv = ["weightdiff.py", *map(str, args)]
        run_command(weightdiff.main)
        code = 0
    finally:
        os._exit(code)


def killed_until_done(args: list, output: Path, last: str, kills: int, whole) -> None:
    """Killed once when `last`, the last file, is there, then at random moments of the work. A run
    that was quicker than its kill is looked at and begun anew."""
    partial = output.with_name(output.name + ".partial")
    begun = time.monotonic()
    assert os.waitpid(started(*args), 0)[1] == 0
    taken, rng, happened = time.monotonic() - begun, random.Random(1), 0
    while happened < kills:
        if output.exists():
            whole()
            shutil.rmtree(output)
        pid = started(*args)
        while not (happened or (partial / last).exists() or output.exists()):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, taken) if happened else 0)
        os.kill(pid, signal.SIGKILL)
        ended = os.waitpid(pid, 0)[1]
        assert ended in (0, signal.SIGKILL)
        happened += ended == signal.SIGKILL
    assert output.exists() or os.waitpid(started(*args), 0)[1] == 0
    whole()
    assert not partial.exists()


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on_and_ends_the_same(tmp_path, kills):
    big_pair(tmp_path)
    base, tuned = ["--base", tmp_path / "base"], ["--tuned", tmp_path / "tuned"]
    weightdiff.make(tmp_path / "base", tmp_path / "tuned", tmp_path / "quiet", compress=False)

    def whole_diff():
        assert contents(tmp_path / "diff") == contents(tmp_path / "quiet")

    def whole_model():
        assert bits(tmp_path / "out") == bits(tmp_path / "tuned")

    args = ["make", *base, *tuned, "--diff", tmp_path / "diff"]
    killed_until_done(args, tmp_path / "diff", "manifest.json", kills, whole_diff)
    args = ["recover", *base, "--diff", tmp_path / "quiet", "--tuned", tmp_path / "out"]
    killed_until_done(args, tmp_path / "out", "config.json", kills, whole_model)


class Interrupted:
    """Stands for make_tensor or recovered_pieces: notes the tensors, and can die at the tenth."""

    def __init__(self, monkeypatch, name: str):
        self.real, self.names, self.problem = getattr(weightdiff, name), [], None
        monkeypatch.setattr(weightdiff, "THREADS", 1)
        monkeypatch.setattr(weightdiff, name, self)

    def __call__(self, name, *args):
        if self.problem and len(self.names) == 9:
            raise self.problem
        self.names.append(name)
        return self.real(name, *args)

    def dies(self, work, *args, problem: Exception | None = None) -> list[str]:
        """What was done until then."""
        self.names, self.problem = [], problem or OSError(28, "No space left on device")
        with pytest.raises(type(self.problem)):
            work(*args)
        return self.names

    def goes_on(self, work, *args) -> list[str]:
        """What was left to do."""
        self.names, self.problem = [], None
        work(*args)
        return self.names


@pytest.fixture
def pair(tmp_path):
    return write(tmp_path / "base"), write(tmp_path / "tuned", change=tuned_a_little)


def test_what_is_made_is_not_made_again(pair, tmp_path, monkeypatch):
    run, diff = Interrupted(monkeypatch, "make_tensor"), tmp_path / "diff"
    every = run.goes_on(weightdiff.make, *pair, tmp_path / "quiet", False)
    begun = run.dies(weightdiff.make, *pair, diff, False)
    assert not diff.exists() and begun == every[:9]
    assert run.goes_on(weightdiff.make, *pair, diff, False) == every[9:]
    assert contents(diff) == contents(tmp_path / "quiet")


def test_a_run_that_ends_while_all_is_made_durable_has_nothing_to_do_again(
    pair, tmp_path, monkeypatch
):
    run, diff = Interrupted(monkeypatch, "make_tensor"), tmp_path / "diff"

    def full(path):
        if (tmp_path / "diff.partial/manifest.json").exists():
            raise OSError(5, "Input/output error")
        fsync_path(path)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="Input/output"):
        patched.setattr(files, "fsync_path", full)
        weightdiff.make(*pair, diff, False)
    assert run.goes_on(weightdiff.make, *pair, diff, False) == []
    assert "progress.jsonl" not in contents(diff)


@pytest.mark.parametrize("change", ["base", "tuned", "config", "compress", "format"])
def test_what_was_made_from_something_else_is_made_again(pair, tmp_path, monkeypatch, change):
    run, diff, compress = Interrupted(monkeypatch, "make_tensor"), tmp_path / "diff", False
    run.dies(weightdiff.make, *pair, diff, compress)
    if change == "compress":
        compress = True
    elif change == "format":
        monkeypatch.setattr(weightdiff, "FORMAT", "bitwise difference, 2")
    else:
        file = "config.json" if change == "config" else "model.safetensors"
        os.utime(tmp_path / ("base" if change == "base" else "tuned") / file, (1, 1))
    assert len(run.goes_on(weightdiff.make, *pair, diff, compress)) == 21
    weightdiff.make(*pair, tmp_path / "quiet", compress)
    assert contents(diff) == contents(tmp_path / "quiet")


def test_weights_by_another_name_are_watched_too(pair, tmp_path, monkeypatch):
    base, tuned = pair
    file, table = tuned / "weights.pt", load_file(tuned / "model.safetensors")
    (tuned / "model.safetensors").unlink()
    torch.save(table, file)
    index = {"weight_map": dict.fromkeys(table, file.name)}
    (tuned / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    run, diff = Interrupted(monkeypatch, "make_tensor"), tmp_path / "diff"
    run.dies(weightdiff.make, base, tuned, diff, False)
    torch.save({name: tensor + 1 for name, tensor in table.items()}, file)
    assert len(run.goes_on(weightdiff.make, base, tuned, diff, False)) == 21


def test_what_else_lies_beside_the_weights_does_not_begin_a_run_anew(pair, tmp_path, monkeypatch):
    base, tuned = pair
    run, diff = Interrupted(monkeypatch, "make_tensor"), tuned / "diff"
    (tuned / "dangling").symlink_to(tmp_path / "nowhere")
    run.dies(weightdiff.make, base, tuned, diff, False)
    (tuned / "notes.txt").write_text("x")
    (tuned / "tokenizer.model").write_bytes(b"other pieces")
    assert len(run.goes_on(weightdiff.make, base, tuned, diff, False)) == 12
    assert (diff / "tokenizer.model").read_bytes() == b"other pieces"
    assert weightdiff.read_manifest(diff)


def test_a_logged_file_that_is_not_what_was_logged_is_made_again(pair, tmp_path, monkeypatch):
    run, diff = Interrupted(monkeypatch, "make_tensor"), tmp_path / "diff"
    first, second, third, *_ = run.dies(weightdiff.make, *pair, diff, False)
    partial = tmp_path / "diff.partial"
    flipped(partial / f"{first}.diff", 7, 0)
    (partial / f"{second}.diff").unlink()
    (partial / f"{third}.diff").rename(partial / "elsewhere")
    (partial / f"{third}.diff").symlink_to("elsewhere")
    again = run.goes_on(weightdiff.make, *pair, diff, False)
    assert again[:3] == [first, second, third] and len(again) == 3 + 12
    weightdiff.make(*pair, tmp_path / "quiet", False)
    assert contents(diff) == contents(tmp_path / "quiet")


@pytest.mark.parametrize("shard", [10**9, 60_000], ids=["one file", "shards"])
def test_what_is_recovered_is_not_recovered_again(pair, tmp_path, monkeypatch, shard):
    monkeypatch.setattr(weightdiff, "SHARD_BYTES", shard)
    base, tuned = pair
    diff, out = tmp_path / "diff", tmp_path / "out"
    weightdiff.make(base, tuned, diff, False)
    run = Interrupted(monkeypatch, "recovered_pieces")
    begun = run.dies(weightdiff.recover, base, diff, out)
    left = run.goes_on(weightdiff.recover, base, diff, out)
    assert len(begun) == 9 and len(left) == 12 and not set(begun) & set(left)
    assert bits(out) == bits(tuned)
    files = len(list(out.glob("*.safetensors")))
    assert files == 1 if shard == 10**9 else files > 3


def test_what_lay_under_the_partial_name_is_not_published(pair, tmp_path, monkeypatch):
    """Leftovers of other runs, whose files may have the same names, and a user's own."""
    base, tuned = pair
    weightdiff.make(base, tuned, tmp_path / "quiet", False)
    weightdiff.recover(base, tmp_path / "quiet", tmp_path / "quiet_out")
    for name, work in (
        ("diff", lambda: weightdiff.make(base, tuned, tmp_path / "diff", False)),
        ("out", lambda: weightdiff.recover(base, tmp_path / "diff", tmp_path / "out")),
    ):
        partial = tmp_path / f"{name}.partial"
        (partial / "folder").mkdir(parents=True)
        for stray in (
            "secret.txt", "folder/x", "model.norm.bias.diff", f"{HEAD}.diff", "progress.jsonl",
            "tokenizer.json", "model.safetensors", "model-00001-of-00002.safetensors",
            "model.safetensors.index.json", "manifest.json",
        ):  # fmt: skip
            (partial / stray).write_text("{}\n")
        (partial / "link").symlink_to(tmp_path / "base")
        work()
        quiet = tmp_path / ("quiet" if name == "diff" else "quiet_out")
        assert contents(tmp_path / name) == contents(quiet)
    assert contents(base).keys() >= {"config.json", "model.safetensors"}
    (tmp_path / "again.partial").symlink_to(base)  # nor is what a link leads to cleared
    with pytest.raises(OSError):
        weightdiff.make(base, tuned, tmp_path / "again", False)
    assert contents(base).keys() >= {"config.json", "model.safetensors"}


def test_a_mistake_takes_away_only_what_the_same_run_has_begun(pair, tmp_path, monkeypatch):
    run, diff, mistake = Interrupted(monkeypatch, "make_tensor"), tmp_path / "diff", ValueError()
    run.dies(weightdiff.make, *pair, diff, False, problem=mistake)
    assert not (tmp_path / "diff.partial").exists()
    run.dies(weightdiff.make, *pair, diff, False)
    run.dies(weightdiff.make, *pair, diff, False, problem=mistake)
    assert len(run.goes_on(weightdiff.make, *pair, diff, False)) == 21 - 2 * 9


def test_of_several_errors_the_first_tensor_s_is_told():
    def fails(name):
        time.sleep(0.2 if name == "first" else 0)
        raise ValueError(name)

    for _ in range(3):
        with pytest.raises(ValueError, match="first"):
            weightdiff.in_threads(fails, ["first", "second", "third"])


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
weightdiff.notice = print
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
