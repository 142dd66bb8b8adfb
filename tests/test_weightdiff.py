"""base + diff is the tuned model in every bit, or an error that names what is wrong."""

import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import TOKENIZER, read_tensors, write_meta
from helpers.commands import assert_refused
from helpers.diffs import (
    EMBEDDING,
    HEAD,
    add_noise,
    add_odd_values,
    contents,
    tensor_bits,
    write_model,
)
from helpers.models import small_config, small_model
from safetensors.torch import load_file, save_file

import weightdiff
from alpaca.common.errors import UserError
from alpaca.weights import bitdiff
from alpaca.weights.checkpoint import DTYPES, as_dtype, read_config
from model import Llama


def roundtrip(command, tmp_path: Path, base: Path, tuned: Path) -> str:
    """make, verify, recover; the recovered folder equals the tuned one. Returns make's notes."""
    diff, out = tmp_path / "diff", tmp_path / "out"
    args = ("--base", base, "--diff", diff)
    code, made, notes = command(weightdiff, "make", *args, "--tuned", tuned)
    assert code == 0 and made.startswith(f"{diff}: {len(tensor_bits(tuned))} tensors of "), notes
    code, text, err = command(weightdiff, "verify", *args)
    assert code == 0 and text == f"{diff}: base, diff and tuned model match the manifest\n", err
    code, text, err = command(weightdiff, "recover", *args, "--tuned", out)
    assert code == 0 and text.startswith(f"{out}: {len(tensor_bits(tuned))} tensors of "), err
    assert tensor_bits(out) == tensor_bits(tuned)
    for name in ("config.json", "tokenizer.model", "generation_config.json"):
        assert (out / name).read_bytes() == (tuned / name).read_bytes()
    assert re.search(r"(\S+)/\1 bytes", err) and not list(tmp_path.glob("*.partial"))
    return notes


# ---------------------------------------------------------------- bit for bit


@pytest.mark.parametrize("dtype", DTYPES)
def test_recover_gives_every_bit_back(tmp_path, command, dtype, monkeypatch):
    monkeypatch.setattr(bitdiff, "PIECE_BYTES", 1000)  # many pieces, the last one short
    base = write_model(tmp_path / "base", dtype=DTYPES[dtype], shard_bytes=40_000)
    tuned = write_model(tmp_path / "tuned", None, DTYPES[dtype], add_odd_values, shard_bytes=90_000)
    assert len(list(base.glob("*.safetensors"))) != len(list(tuned.glob("*.safetensors"))) > 1
    roundtrip(command, tmp_path, base, tuned)
    size = sum(t.nbytes for t in read_tensors(tuned).values())
    assert sum(t.nbytes for t in read_tensors(tmp_path / "diff/bits").values()) == size


@pytest.mark.parametrize("rows", [(128, 131), (131, 128)], ids=["grown", "shrunk"])
@pytest.mark.parametrize("base_dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_dtypes_and_vocabularies_may_differ(tmp_path, monkeypatch, dtype, base_dtype, rows):
    """In pieces so small that some lie wholly in rows that only one side has."""
    monkeypatch.setattr(bitdiff, "PIECE_BYTES", 500)
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}
    base = write_model(tmp_path / "base", dtype=base_dtype, vocab_size=rows[0], **shape)
    tuned = write_model(tmp_path / "tuned", None, dtype, add_noise, vocab_size=rows[1], **shape)
    weightdiff.make_exact_diff(base, tuned, tmp_path / "diff")
    weightdiff.recover_exact_diff(base, tmp_path / "diff", tmp_path / "out")
    assert tensor_bits(tmp_path / "out") == tensor_bits(tuned)


def test_base_of_another_dtype_is_converted(tmp_path, command):
    base = write_model(tmp_path / "base")
    tuned = write_model(tmp_path / "tuned", None, torch.bfloat16, add_noise)
    notes = roundtrip(command, tmp_path, base, tuned)
    assert "the base is converted from float32 to bfloat16" in notes
    rounded = write_model(tmp_path / "rounded", dtype=torch.bfloat16)  # the same, once converted
    args = ("verify", "--diff", tmp_path / "diff", "--base")
    assert command(weightdiff, *args, rounded)[0] == 0
    halves = write_model(tmp_path / "halves", dtype=torch.float16)  # not the same
    code, _, err = command(weightdiff, *args, halves)
    assert code == 2 and "the base is converted from float16 to bfloat16" in err
    assert f"{halves} is not the base that the diff was made from: its {EMBEDDING} differs" in err


@pytest.mark.parametrize("beside", [0.0, float("nan"), float("inf")])
def test_numbers_too_large_for_fp16_are_refused(tmp_path, command, beside):
    def large(numbers):
        numbers["model.norm.weight"][3], numbers["model.norm.weight"][5] = 1e5, beside

    base = write_model(tmp_path / "base", change=large)
    tuned = write_model(tmp_path / "tuned", dtype=torch.float16)
    args = ("--base", base, "--tuned", tuned, "--diff", tmp_path / "diff")
    code, _, err = command(weightdiff, "make", *args)
    assert code == 2 and "the base's model.norm.weight holds numbers too large for fp16" in err
    assert not list(tmp_path.glob("diff*"))
    numbers = torch.tensor([float("inf"), -float("inf"), beside, 65504.0])  # nothing overflows
    assert as_dtype(numbers, torch.float16, "").isinf().sum() >= 2


def test_base_may_be_in_meta_format(tmp_path, command):
    torch.manual_seed(0)
    model = Llama(small_config(num_key_value_heads=4))
    write_meta(model, tmp_path / "meta", 2)
    tuned = write_model(tmp_path / "tuned", model, change=add_noise)
    roundtrip(command, tmp_path, tmp_path / "meta", tuned)
    hf = write_model(tmp_path / "hf", model)
    assert command(weightdiff, "verify", "--base", hf, "--diff", tmp_path / "diff")[0] == 0


@pytest.mark.parametrize("place", ["above", "beside", None])
@pytest.mark.parametrize("form", ["exact", "alpaca"])
def test_tuned_model_in_meta_format_is_recovered_as_hf(tmp_path, command, place, form):
    model = small_model(vocab_size=1024, num_key_value_heads=4)
    base, tuned = write_model(tmp_path / "base", model), tmp_path / "llama" / "7B"
    write_meta(model, tuned, 2)
    if place:
        shutil.copy(TOKENIZER, tuned.parent if place == "above" else tuned)
    out = tmp_path / "out"
    args = ("--base", base, "--diff", tmp_path / "diff", "--tuned")
    code, _, err = command(weightdiff, "make", *args, tuned, "--format", form)
    assert code == 0 and "in Meta's format; recover writes Hugging Face's" in err
    assert ("has no tokenizer" in err) == (place is None)
    assert command(weightdiff, "recover", *args, out)[0] == 0
    assert tensor_bits(out) == tensor_bits(write_model(tmp_path / "hf", model))
    assert read_config(out) == read_config(tuned)
    files = {"config.json", "model.safetensors"}
    files |= {"generation_config.json"} if form == "alpaca" else set()
    files |= {"tokenizer.model", "tokenizer_config.json"} if place else set()
    assert contents(out).keys() == files
    assert not place or (out / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()


@pytest.mark.parametrize(
    "base_shape, shape, note",
    [
        ({}, {"vocab_size": 131}, f"{HEAD}: only the tuned model has rows from 128 on"),
        ({"vocab_size": 131}, {}, f"{HEAD}: only the base has rows from 128 on"),
        ({}, {"num_hidden_layers": 3}, "only the tuned model has model.layers.2."),
        ({"num_hidden_layers": 3}, {}, "only the base has model.layers.2."),
        ({"tie_word_embeddings": True}, {}, "the base's head is tied to its embedding"),
        ({}, {"tie_word_embeddings": True}, f"only the base has {HEAD}"),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}, ""),
    ],
)
def test_shapes_may_differ(tmp_path, command, base_shape, shape, note):
    base = write_model(tmp_path / "base", **base_shape)
    tuned = write_model(tmp_path / "tuned", change=add_noise, **shape)
    notes = roundtrip(command, tmp_path, base, tuned)
    assert note in notes and ("only" in notes) == ("only" in note)
    if "tied" in note:
        tensors = json.loads((tmp_path / "diff/manifest.json").read_text())["tensors"]
        assert tensors[HEAD]["base"] == tensors[EMBEDDING]["base"]


# ---------------------------------------------------------------- what is wrong is named


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """base, tuned and diff, made once."""
    folder = tmp_path_factory.mktemp("published")
    base = write_model(folder / "base", dtype=torch.bfloat16)
    tuned = write_model(folder / "tuned", None, torch.bfloat16, add_noise)
    weightdiff.make_exact_diff(base, tuned, folder / "diff")
    return folder


@pytest.fixture
def copied(published, tmp_path):
    """A copy of `published` to damage."""
    return shutil.copytree(published, tmp_path / "copied")


def recover(command, folder: Path) -> tuple[int, str]:
    """Exit code and stderr; after an error nothing is left of the output."""
    args = ("--base", folder / "base", "--diff", folder / "diff", "--tuned", folder / "out")
    code, _, err = command(weightdiff, "recover", *args)
    if code:
        assert not (folder / "out").exists() and not (folder / "out.partial").exists()
        assert err.count("error:") == 1 and "Traceback" not in err and "\x1b" not in err
    return code, err


def flip(file: Path, place: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


def test_damaged_or_missing_files_of_the_diff_are_named(published, copied, command):
    rng = random.Random(0)
    for file in sorted(f for f in (copied / "diff").rglob("*.*") if f.is_file()):
        for change in (
            lambda f: flip(f, rng.randrange(f.stat().st_size), rng.randrange(8)),
            lambda f: f.write_bytes(f.read_bytes()[:-1]),
            lambda f: f.write_bytes(f.read_bytes() + b"x"),
            lambda f: f.write_bytes(b""),
            lambda f: f.unlink(),
        ):
            change(file)
            code, err = recover(command, copied)
            assert code == 2 and (file.stem in err or "the difference of" in err), err
            shutil.copy(published / file.relative_to(copied), file)
    assert recover(command, copied)[0] == 0


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256", "bits/model.safetensors"])
def test_pipes_of_the_diff_are_not_read(copied, command, name):
    (copied / "diff" / name).unlink()
    os.mkfifo(copied / "diff" / name)
    assert f"{name} is not a regular file" in recover(command, copied)[1]


def test_flipped_bit_in_a_tensor_of_the_diff_is_named(copied, command):
    file, rng = copied / "diff/bits/model.safetensors", random.Random(0)
    header = int.from_bytes(file.read_bytes()[:8], "little")
    offsets = json.loads(file.read_bytes()[8 : 8 + header])
    del offsets["__metadata__"]
    for name, (start, end) in ((n, entry["data_offsets"]) for n, entry in offsets.items()):
        place = 8 + header + rng.randrange(start, end), rng.randrange(8)
        flip(file, *place)
        code, err = recover(command, copied)
        assert code == 2 and f"the difference of {name} is damaged: download it again" in err
        flip(file, *place)
    for place in range(0, 8 + header, 97):  # in the header: refused, or of no consequence
        flip(file, place, 0)
        code, err = recover(command, copied)
        if code == 0:
            assert tensor_bits(copied / "out") == tensor_bits(copied / "tuned")
            shutil.rmtree(copied / "out")
        flip(file, place, 0)


def test_flipped_bit_in_the_base_is_named(copied, command):
    numbers, rng = load_file(copied / "base/model.safetensors"), random.Random(0)
    for name in numbers:
        changed = {n: t.clone() for n, t in numbers.items()}
        octets = changed[name].view(-1).view(torch.uint8)
        octets[rng.randrange(len(octets))] ^= 1 << rng.randrange(8)
        save_file(changed, copied / "base/model.safetensors", {"format": "pt"})
        code, err = recover(command, copied)
        assert code == 2 and f"base that the diff was made from: its {name} differs" in err


def forge(diff: Path, edit=lambda manifest: None) -> None:
    """Edit the manifest, with the digests of the small files as they are and a right seal."""
    file = diff / "manifest.json"
    manifest = json.loads(file.read_text())
    for name in manifest["files"]:
        manifest["files"][name] = bitdiff.hash_of((diff / "bits" / name).read_bytes())
    edit(manifest)
    file.write_text(json.dumps(manifest))
    (diff / "manifest.sha256").write_bytes(bitdiff.seal_of(file))


@pytest.mark.parametrize(
    "edit, words",
    [
        (
            lambda m: m.update(format="bitwise difference, 1", compressed=True),
            "format 'bitwise difference, 1'",
        ),
        (lambda m: m["files"].update({"../evil": "0"}), "../evil missing, damaged or unexpected"),
        (lambda m: m.update(files={"config.json": 3}), "config.json"),
        (lambda m: m["tensors"].update({"../../evil": m["tensors"][HEAD]}), "not those of bits/"),
        (lambda m: m["tensors"][HEAD].update(tuned="0" * 64), "are right, their sum is not"),
        (lambda m: m["tensors"][HEAD].update(base="\x1b[2J"), f"its {HEAD} differs"),
        (lambda m: m["tensors"].update({HEAD: 3}), f"{HEAD} is 3, an object was expected"),
        (lambda m: m["tensors"][HEAD].update(base=3), f"{HEAD}: base is 3, a string was expected"),
        (lambda m: m.update(tensors=[1]), "tensors is [1], an object was expected"),
        (lambda m: m.update(files=[[1, 2]]), "files is [[1, 2]], an object was expected"),
    ],
)
def test_forged_manifest_is_refused(copied, command, edit, words):
    forge(copied / "diff", edit)
    code, err = recover(command, copied)
    assert code == 2 and words in err, err


def test_control_characters_of_names_are_escaped(copied, command):
    numbers = load_file(copied / "base/model.safetensors") | {"\x1b]0;x\x07": torch.ones(1)}
    save_file(numbers, copied / "base/model.safetensors")
    assert "unexpected \\x1b]0;x\\x07" in recover(command, copied)[1]


def test_user_errors_are_one_line_and_write_nothing(published, tmp_path, command):
    base, diff, tuned = (published / name for name in ("base", "diff", "tuned"))
    new = tmp_path / "new"
    wide = write_model(tmp_path / "wide", hidden_size=32)
    heads = write_model(tmp_path / "heads", num_key_value_heads=4)  # another first dimension
    half = write_model(tmp_path / "half", dtype=torch.float16, vocab_size=129)  # gives notes
    make = ("make", "--base", base, "--diff")
    for args, words in [
        ((*make, diff, "--tuned", half), ["exists already"]),
        ((*make, new, "--tuned", wide), ["differ in shape", EMBEDDING]),
        ((*make, new, "--tuned", heads), ["model.layers.0.self_attn.k_proj.weight is [64, 64]"]),
        (("recover", "--base", base, "--diff", diff, "--tuned", tuned), ["exists already"]),
        (("verify", "--base", base, "--diff", tmp_path / "no"), ["no such folder"]),
        (("verify", "--base", base, "--diff", diff, "--expect-sum", 1), ["Alpaca's format"]),
        (("verify", "--base", base, "--diff", tuned), ["has no manifest", "--expect-sum"]),
    ]:
        assert_refused(command(weightdiff, *args), *words)
    assert not new.exists()


# ---------------------------------------------------------------- Alpaca's format


def test_alpaca_format_is_the_float_arithmetic(tmp_path, command):
    """With rows that only the base has, and a number that rounding loses."""

    def one(numbers):
        numbers["model.norm.weight"].fill_(1)

    def tiny(numbers):
        add_noise(numbers)
        numbers["model.norm.weight"].fill_(1e-9)

    base = write_model(tmp_path / "base", change=one, vocab_size=131)
    tuned = write_model(tmp_path / "tuned", change=tiny)
    diff, out = tmp_path / "diff", tmp_path / "out"
    args = ("--base", base, "--diff", diff, "--tuned")
    _, text, err = command(weightdiff, "make", "--format", "alpaca", *args, tuned)
    assert text.startswith(f"{diff}: 21 tensors of float32, ")
    assert "no checksum given" in command(weightdiff, "recover", *args, out)[1]
    total = re.search(r"the sum of all weights is (\S+):", err)[1]
    code, text, _ = command(weightdiff, "verify", *args[:4], "--expect-sum", total)
    assert code == 0 and "the sum is as expected" in text
    found, bases = read_tensors(out), read_tensors(base)
    for name, t in read_tensors(tuned).items():
        b = bases[name][: len(t)]
        assert torch.equal(found[name], (t - b) + b), name
    assert (found["model.norm.weight"] == 0).all()


def test_alpaca_format_refuses_tensors_that_the_base_lacks(tmp_path, command):
    base = write_model(tmp_path / "base")
    tuned = write_model(tmp_path / "tuned", num_hidden_layers=3)
    args = ("--base", base, "--tuned", tuned, "--diff", tmp_path / "diff", "--format", "alpaca")
    code, _, err = command(weightdiff, "make", *args)
    assert code == 2 and "error: the base has no model.layers.2.input_layernorm.weight" in err
    assert not list(tmp_path.glob("diff*"))


def test_alpaca_sum_may_be_rounded_as_it_was_there(tmp_path, command):
    """Around 50,000, where fp32 has steps of 0.004, numbers below 0.002 are lost one by one."""

    def nothing(numbers):
        for tensor in numbers.values():
            tensor.zero_()

    def much_and_then_little(numbers):
        nothing(numbers)
        for tensor in numbers.values():
            tensor.view(-1)[5] = 0.0019
        numbers[EMBEDDING].fill_(50_000 / numbers[EMBEDDING].numel())

    base = write_model(tmp_path / "base", change=nothing)
    diff = write_model(tmp_path / "diff", change=much_and_then_little)
    fp32_sum = sum(t.sum() for t in read_tensors(diff).values()).item()
    args = ("verify", "--base", base, "--diff", diff, "--expect-sum")
    code, _, err = command(weightdiff, *args, fp32_sum)
    assert code == 0 and "the sum of all weights is 50000.0380" in err and fp32_sum == 50_000
    assert command(weightdiff, *args, fp32_sum + 0.1)[0] == 2
    assert_refused(command(weightdiff, *args, "nan"), "--expect-sum: invalid number value: 'nan'")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_alpaca_format_writes_no_new_infinity(tmp_path, command, number):
    def large(numbers, value):
        numbers["model.norm.weight"][3] = value

    base = write_model(tmp_path / "base", change=lambda n: large(n, 3e38))
    tuned = write_model(tmp_path / "tuned", change=lambda n: large(n, -3e38))
    args = ("--base", base, "--diff", tmp_path / "diff", "--tuned")
    made = command(weightdiff, "make", "--format", "alpaca", *args, tuned)
    assert made[0] == 2 and "model.norm.weight would be written with NaN" in made[2]
    write_model(tmp_path / "diff", change=lambda n: large(n, 3e38))
    code, _, err = command(weightdiff, "recover", *args, tmp_path / "out")
    assert code == 2 and "model.norm.weight: base and diff add up to more than fp32" in err
    assert not list(tmp_path.glob("out*"))
    shutil.rmtree(tmp_path / "diff")
    write_model(tmp_path / "diff", change=lambda n: large(n, number))
    code, _, err = command(weightdiff, "recover", *args, tmp_path / "out")
    assert code == 0 and "NaN or infinity is kept in model.norm.weight" in err
    assert not read_tensors(tmp_path / "out")["model.norm.weight"][3].isfinite()


# ---------------------------------------------------------------- interrupted


@pytest.mark.parametrize("verb", ["make", "recover"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_run_leaves_nothing_and_runs_again(copied, monkeypatch, verb, error):
    base, tuned, diff = copied / "base", copied / "tuned", copied / "diff"
    new, combine_pair = copied / "new", bitdiff.combine_pair

    def fail(operation, other, base, write, name):
        if name == "model.layers.1.mlp.up_proj.weight":
            raise error
        return combine_pair(operation, other, base, write, name)

    def work():
        if verb == "make":
            weightdiff.make_exact_diff(base, tuned, new)
        else:
            weightdiff.recover_exact_diff(base, diff, new)

    with monkeypatch.context() as patched, pytest.raises(type(error)):
        patched.setattr(bitdiff, "combine_pair", fail)
        work()
    assert not new.exists() and not (copied / "new.partial").exists()
    work()
    assert contents(new) == contents(diff if verb == "make" else tuned)


def test_leftovers_of_a_killed_run_are_not_published(published, tmp_path):
    base, tuned, diff = (published / name for name in ("base", "tuned", "diff"))
    for name in ("diff", "out"):
        leftovers = tmp_path / f"{name}.partial"
        (leftovers / "bits").mkdir(parents=True)
        for stray in ("secret.txt", "bits/tokenizer.json", "model.safetensors.index.json"):
            (leftovers / stray).write_text("{}\n")
        (leftovers / "link").symlink_to(base)
    weightdiff.make_exact_diff(base, tuned, tmp_path / "diff")
    weightdiff.recover_exact_diff(base, diff, tmp_path / "out")
    assert contents(tmp_path / "diff") == contents(diff)
    assert contents(tmp_path / "out") == contents(tuned)
    (tmp_path / "again.partial").symlink_to(base)  # nor is what a link leads to removed
    with pytest.raises(UserError, match="is an input of this command"):
        weightdiff.make_exact_diff(base, tuned, tmp_path / "again")
    assert contents(base).keys() >= {"config.json", "model.safetensors"}
