"""Checkpoints: what is read and written bit for bit, and what is refused in one line."""

import json
import os
import pickle
import shutil

import pytest
import torch
from helpers.checkpoints import (
    TOKENIZER,
    digests,
    edit_json,
    read_tensors,
    same_tensors,
    write_meta,
)
from helpers.commands import assert_refused
from helpers.models import random_ids, small_config, small_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from alpaca.common.errors import UserError
from alpaca.weights.checkpoint import DTYPES, is_finite, read_config
from alpaca.weights.loading import load_model
from alpaca.weights.meta_format import context_length
from alpaca.weights.writer import TOKENIZER_FILES, save_model

NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint in four shards, with its tokenizer."""
    model = small_model(vocab_size=1024)
    save_model(model, model.config, tmp_path / "m", tokenizer=TOKENIZER, shard_bytes=300_000)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 4
    return tmp_path / "m"


@pytest.fixture
def meta(tmp_path):
    """meta(shards, ...) writes a small model as Meta would: (its folder, the model)."""

    def write(shards: int, **changes):
        model = small_model(vocab_size=1024, num_attention_heads=8, **changes)
        write_meta(model, tmp_path / "llama/7B", shards)
        shutil.copy(TOKENIZER, tmp_path / "llama")  # where Meta's download has it
        return tmp_path / "llama/7B", model

    return write


def replace_weights(folder, tensors: dict) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")


def copied_tensors(folder) -> dict:
    return {name: tensor.clone() for name, tensor in read_tensors(folder).items()}


# ---------------------------------------------------------------- Hugging Face folders


def test_pickled_shards_load_bit_for_bit(folder):
    expected = copied_tensors(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    names, weight_map = sorted(expected), {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        title = f"pytorch_model-{number:05}-of-00002.bin"
        table = {name: expected[name] for name in part}
        if number == 2:  # a table that old files contain
            table["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        torch.save(table, folder / title)
        weight_map |= dict.fromkeys(table, title)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same_tensors(load_model(folder).named_parameters(), expected)
    for file in folder.glob("*.bin"):  # as torch wrote before 1.6
        table = torch.load(file, weights_only=True)
        torch.save(table, file, _use_new_zipfile_serialization=False)
    assert same_tensors(load_model(folder).named_parameters(), expected)


def test_config_is_read_in_old_and_new_spellings(folder):
    file, expected = folder / "config.json", small_config(vocab_size=1024, rope_theta=1e6)
    new = {"rope_theta": "remove", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    edit_json(file, **new)
    assert read_config(folder) == expected
    harmless = {"rope_type": "default", "hidden_size": 32}
    edit_json(file, rope_parameters="remove", rope_theta=1e6, rope_scaling=harmless)
    assert read_config(folder) == expected
    edit_json(file, rope_scaling=None, num_key_value_heads="remove", eos_token_id=[2, 7])
    expected = small_config(vocab_size=1024, rope_theta=1e6, num_key_value_heads=4)
    assert read_config(folder) == expected


def test_changing_a_loaded_model_does_not_change_its_files(folder):
    before, model = digests(folder), load_model(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert digests(folder) == before and load_model(folder).lm_head.weight.any()


# ---------------------------------------------------------------- Meta folders


@pytest.mark.parametrize(("shards", "kv_heads"), [(1, 8), (2, 4), (4, 4), (8, 8)])
def test_meta_folder_is_the_same_model(tmp_path, command, meta, shards, kv_heads):
    source, model = meta(shards, num_key_value_heads=kv_heads)
    model.config.max_position_embeddings = 2048  # not in params.json: LLaMA's is assumed
    model.config.initializer_range = 0.02
    assert read_config(source) == model.config
    assert same_tensors(load_model(source).named_parameters(), model.named_parameters())
    if shards == 2:  # CodeLlama's base of the rotary embedding is read too
        edit_json(source / "params.json", rope_theta=1000000)
        assert read_config(source).rope_theta == 1e6
        edit_json(source / "params.json", rope_theta="remove")
    code, _, err = command("convert", source, tmp_path / "hf", "--dtype", "fp32")
    assert code == 0 and err.count("\n") == 1 and "2048 positions (params.json" in err
    converted, ids = load_model(tmp_path / "hf"), random_ids(2, 24)
    assert same_tensors(converted.named_parameters(), model.named_parameters())
    assert torch.equal(converted(ids), model(ids))
    assert (tmp_path / "hf/tokenizer.model").read_bytes() == TOKENIZER.read_bytes()


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        pytest.param({"dim": 4096, "norm_eps": 1e-6}, 2048, id="LLaMA 7B"),
        pytest.param({"dim": 8192, "norm_eps": 1e-5}, 2048, id="LLaMA 65B"),
        pytest.param({"dim": 4096, "norm_eps": 1e-5}, 4096, id="Llama 2 7B"),
        pytest.param({"dim": 8192, "norm_eps": 1e-5, "n_kv_heads": 8}, 4096, id="Llama 2 70B"),
        pytest.param({"dim": 4096, "norm_eps": 1e-5, "rope_theta": 1e6}, 16384, id="CodeLlama"),
    ],
)
def test_context_length_follows_from_the_release(params, expected):
    assert context_length(params) == expected


# ---------------------------------------------------------------- refused in one line


def refuse_convert(command, source, *words, args=()):
    target = source.parent / "target"
    assert_refused(command("convert", source, target, *args), *words)
    assert not list(source.parent.glob("target*")), "something was written"


def test_missing_config_or_weights_are_refused(tmp_path, command, folder):
    refuse_convert(command, tmp_path / "absent", "absent: no such folder")
    (tmp_path / "empty").mkdir()
    refuse_convert(command, tmp_path / "empty", "no config.json (Hugging Face) or params.json")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    refuse_convert(command, folder, "no model.safetensors, pytorch_model.bin")


def test_damaged_config_is_refused(command, folder):
    config = folder / "config.json"
    start = config.read_text()[:50]
    for content, words in ((start, "not JSON"), ("[" * 200_000, "deep"), ("\xff", "not UTF-8")):
        config.write_bytes(content.encode("latin-1"))
        refuse_convert(command, folder, "config.json", words)


DEFAULT, DYNAMIC = {"rope_type": "default", "rope_theta": 1e4}, {"type": "dynamic", "factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral' is not supported, only 'llama' is"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling 'yarn'"),
        ({"rope_parameters": DEFAULT, "rope_scaling": DYNAMIC}, "rope scaling 'dynamic'"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', where an object was expected"),
        ({"rope_theta": float("inf")}, "rope_theta is inf, above the limit of 1e+30"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"sliding_window": 4096}, "sliding_window 4096"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu' is"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": "remove"}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64', where int was expected"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True, where float was expected"),
        ({"num_key_value_heads": 3}, "4 heads are not divisible by num_key_value_heads"),
        ({"vocab_size": 10**19}, "vocab_size is 10000000000000000000, above the limit of 1048576"),
        ({"num_hidden_layers": 10**8}, "num_hidden_layers is 100000000, above the limit of 1000"),
    ],
    ids=str,
)
def test_unsupported_config_is_refused_by_field(command, folder, changes, words):
    edit_json(folder / "config.json", **changes)
    refuse_convert(command, folder, "config.json", words)


def test_truncated_or_missing_shards_are_refused(command, folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for content, words in (
        (b"", "empty"),
        (pointer, "a Git LFS pointer"),
        (whole[:4], "damaged or cut short"),
        (whole[:100], "damaged or cut short"),
        (whole[:-1], "damaged or cut short"),
    ):
        shard.write_bytes(content)
        refuse_convert(command, folder, shard.name, words)
    shard.unlink()
    refuse_convert(command, folder, "files it names are missing", shard.name)


def test_index_decides_which_tensors_are_read(command, folder):
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())["weight_map"]

    def write(weight_map) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))

    write({name: file for name, file in whole.items() if name != NORM})
    refuse_convert(command, folder, f"missing {NORM}")
    write(whole | {"model.layers.0.self_attn.rotary_emb.inv_freq": whole[NORM]})
    load_model(folder)  # an obsolete table that is in the index alone
    stale = folder / whole["model.embed_tokens.weight"]
    extra = {NORM: torch.full((64,), 7.0), "model.norm.bias": torch.ones(64)}
    with safe_open(stale, "pt") as file:
        save_file({n: file.get_tensor(n) for n in file.keys()} | extra, stale)  # noqa: SIM118
    assert (load_model(folder).model.norm.weight == 1).all()
    write(whole | {NORM: "../outside"})
    refuse_convert(command, folder, "'../outside' is not the name of a file beside it")
    for damaged in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        index.write_text(damaged)
        refuse_convert(command, folder, "model.safetensors.index.json")


def test_all_wrong_tensors_are_named_in_one_line(command, folder):
    weights = copied_tensors(folder)
    del weights["model.layers.1.mlp.up_proj.weight"], weights[NORM]
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    weights["lm_head.weight"] = torch.ones(1025, 64)
    weights["model.embed_tokens.weight"] = torch.ones(1024, 64, dtype=torch.int8)
    replace_weights(folder, weights)
    refuse_convert(
        command,
        folder,
        f"missing model.layers.1.mlp.up_proj.weight, {NORM}",
        "unexpected model.layers.0.self_attn.q_proj.bias",
        "lm_head.weight is [1025, 64] where the config says [1024, 64]",
        "model.embed_tokens.weight is torch.int8, not one of fp32, bf16, fp16",
    )
    replace_weights(folder, {f"base_model.{name}": t for name, t in weights.items()})
    refuse_convert(command, folder, "unexpected base_model.lm_head.weight", "and 17 more")


def test_head_that_is_not_the_tied_embedding_is_refused(command, folder):
    edit_json(folder / "config.json", tie_word_embeddings=True)
    refuse_convert(command, folder, "lm_head.weight is not the embedding")


WQ = "layers.0.attention.wq.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("norm.weight"), ["pth: not the tensors of consolidated.00.pth", "norm"]),
        (lambda t: t["norm.weight"].mul_(7), ["norm.weight: the consolidated.*.pth files are not"]),
        (lambda t: t.update({WQ: t[WQ].half()}), [f"{WQ}: the consolidated.*.pth files are not"]),
    ],
    ids=["tensor", "values", "dtype"],
)
def test_meta_files_of_different_models_are_refused(command, meta, change, words):
    source, _ = meta(2)
    table = torch.load(source / "consolidated.01.pth", weights_only=True)
    change(table)
    torch.save(table, source / "consolidated.01.pth")
    refuse_convert(command, source, *words)


def test_incomplete_meta_folder_is_refused(command, meta):
    source, _ = meta(4)
    files = [source / f"consolidated.{i:02}.pth" for i in range(4)]
    whole = files[2].read_bytes()
    files[2].write_bytes(whole[:-500])
    refuse_convert(command, source, files[2].name, "not a readable file of plain tensors")
    files[2].unlink()
    refuse_convert(command, source, files[2].name, "missing")
    files[3].unlink()
    refuse_convert(command, source, "2 of 4 consolidated.*.pth files are there")
    for file in files[:2]:
        torch.save({"tok_embeddings.weight": torch.ones(5)}, file)
    refuse_convert(command, source, "consolidated.00.pth: no matrix tok_embeddings.weight in it")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_scaled_rope": True}, "use_scaled_rope is not supported"),
        ({"rope_theta": 500000.0}, "rope_theta 500000.0 is neither LLaMA's nor CodeLlama's"),
        ({"n_heads": "8"}, "n_heads is '8', where a number was expected"),
        ({"dim": 65}, "dim is 65, not a multiple of attention.wq's 64 rows"),
        ({"norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', where float was expected"),
        ({"vocab_size": 999}, "vocab_size is 999, the embedding has 1024"),
    ],
    ids=str,
)
def test_unsupported_meta_params_are_refused(command, meta, changes, words):
    source, _ = meta(1)
    edit_json(source / "params.json", **changes)
    refuse_convert(command, source, f"params.json: {words}")


class Hostile:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_that_would_run_code_is_refused(tmp_path, command, name, legacy, folder):
    source, marker = tmp_path / "evil", tmp_path / "it ran"
    source.mkdir()
    if name.endswith(".bin"):
        shutil.copy(folder / "config.json", source)
    else:
        (source / "params.json").write_text('{"dim": 64, "n_layers": 2, "n_heads": 4}')
    with open(source / name, "wb") as file:
        if legacy:
            pickle.dump({"lm_head.weight": Hostile(marker)}, file, protocol=2)
        else:
            torch.save({"lm_head.weight": Hostile(marker)}, file)
    refuse_convert(command, source, name, "it could run code, so it is not read")
    assert not marker.exists()
    if not legacy:  # the trap itself works
        torch.load(source / name, weights_only=False)
        assert marker.exists()


def test_pickle_of_something_else_is_refused(command, folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({"model": {"lm_head.weight": torch.ones(3)}}, folder / "pytorch_model.bin")
    refuse_convert(command, folder, "pytorch_model.bin: not a flat table of tensors")


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("tied", [False, True])
def test_save_load_save_gives_the_same_bytes(tmp_path, dtype, tied):
    model = small_model(tie_word_embeddings=tied).to(dtype)
    with torch.no_grad():  # bit patterns that arithmetic would not keep
        model.model.norm.weight[:3] = torch.tensor([float("nan"), -0.0, float("inf")])
    options = {"shard_bytes": 50_000, "keep_nonfinite": True}
    save_model(model, model.config, tmp_path / "a", **options)
    loaded = load_model(tmp_path / "a")
    assert same_tensors(loaded.named_parameters(), model.named_parameters())
    save_model(loaded, read_config(tmp_path / "a"), tmp_path / "b", **options)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    largest = max(model.parameters(), key=lambda p: p.numel())
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert file.stat().st_size <= max(50_000, largest.numel() * dtype.itemsize) + 4096
        assert load_file(file)  # the safetensors library can read it
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0  # its data is aligned


def test_every_tokenizer_file_of_the_base_is_copied(tmp_path):
    contents = {name: f"content of {name}" for name in TOKENIZER_FILES}
    (tmp_path / "base").mkdir()
    for name, content in contents.items():
        (tmp_path / "base" / name).write_text(content)
    save_model(small_model(), small_config(), tmp_path / "out", tokenizer=tmp_path / "base")
    for name, content in contents.items():
        assert (tmp_path / "out" / name).read_text() == content


def test_tensors_may_come_in_any_order_but_must_be_complete(tmp_path):
    model = small_model()
    pairs = list(model.named_parameters())
    save_model(reversed(pairs), model.config, tmp_path / "out", tokenizer=TOKENIZER)
    assert same_tensors(read_tensors(tmp_path / "out"), pairs)
    for wrong, message in (
        (pairs[1:], "missing model.embed_tokens.weight"),
        ([*pairs, pairs[0]], "unexpected or repeated tensor model.embed_tokens.weight"),
        ([*pairs, ("bias", torch.ones(1))], "unexpected or repeated tensor bias"),
        ([("lm_head.weight", torch.ones(1))], r"lm_head.weight is \[1\], not \[128, 64\]"),
        ([("lm_head.weight", torch.ones(1).double())], "fp16, not as torch.float64"),
    ):
        with pytest.raises(UserError, match=message):
            save_model(wrong, model.config, tmp_path / "bad")
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ---------------------------------------------------------------- alpaca convert


def test_convert_takes_special_ids_from_the_tokenizer(command, folder, tmp_path):
    """Early conversions of LLaMA had bos 0 and eos 1 in config.json, beside the right tokenizer."""
    edit_json(folder / "config.json", bos_token_id=0, eos_token_id=[1, 7])
    code, _, err = command("convert", folder, tmp_path / "out")
    assert code == 0 and "the tokenizer's bos 1 and eos 2 are used" in err
    config = read_config(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)


def test_convert_takes_positions(tmp_path, command, meta):
    source, _ = meta(1)
    code, _, err = command("convert", source, tmp_path / "out", "--positions", 4096)
    assert code == 0 and "4096 positions" in err and "see --positions" not in err
    assert read_config(tmp_path / "out").max_position_embeddings == 4096
    refuse_convert(command, source, "--positions: invalid", args=["--positions", 0])


def test_convert_refuses_another_or_no_tokenizer(command, folder, tmp_path):
    small, given = small_model(), ["--tokenizer", tmp_path / "tokenizer.json"]
    save_model(small, small.config, tmp_path / "small", tokenizer=TOKENIZER)
    refuse_convert(command, tmp_path / "small", "1024 tokens, the model only 128 embeddings")
    given[1].write_text("{}")
    refuse_convert(command, folder, "tokenizer.json: not a SentencePiece model", args=given)
    (folder / "tokenizer.model").unlink()
    refuse_convert(command, folder, "give one with --tokenizer FILE")
    given[1] = folder / "absent"
    refuse_convert(command, folder, "absent: no tokenizer.model", args=given)


@pytest.mark.parametrize(
    ("stored", "number", "dtype"),
    [(torch.bfloat16, 1e5, "fp16"), (torch.float32, 1e5, "fp16"), (torch.float32, 3.4e38, "bf16")],
)
def test_convert_refuses_numbers_too_large_for_the_dtype(command, tmp_path, stored, number, dtype):
    model = small_model(vocab_size=1024).to(stored)
    with torch.no_grad():
        model.model.norm.weight[3] = number
    save_model(model, model.config, tmp_path / "m", tokenizer=TOKENIZER)
    words = f"{NORM} holds numbers too large for {dtype}"
    refuse_convert(command, tmp_path / "m", words, args=["--dtype", dtype])
    with pytest.raises(UserError, match=words):
        load_model(tmp_path / "m", dtype=DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_convert_keeps_nan_and_infinity_and_says_so(command, folder, tmp_path, dtype):
    weights = copied_tensors(folder)
    weights[NORM][:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    replace_weights(folder, weights)
    code, _, err = command("convert", folder, tmp_path / "out", "--dtype", dtype)
    assert code == 0 and f"NaN or infinity is kept in {NORM}\n" in err
    assert same_tensors(
        read_tensors(tmp_path / "out"), {n: t.to(DTYPES[dtype]) for n, t in weights.items()}
    )


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_one_number_that_is_not_finite_is_found(dtype, number):
    numbers = torch.full((1000, 33), 0.9 * torch.finfo(dtype).max, dtype=dtype)  # the sum overflows
    assert is_finite(numbers) and is_finite(-numbers) and is_finite(numbers[:0])
    numbers[517, 11] = number
    assert not is_finite(numbers) and not is_finite(numbers.T) and is_finite(numbers[518:])


def test_tensors_that_are_not_finite_are_not_written(tmp_path):
    model = small_model()
    with torch.no_grad():
        model.model.norm.weight[3] = float("inf")
    with pytest.raises(UserError, match=f"{NORM} would be written with NaN or infinity in it"):
        save_model(model, model.config, tmp_path / "out")
    assert not list(tmp_path.iterdir())
