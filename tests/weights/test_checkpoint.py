"""Checkpoints: what is read and written bit for bit, and what is refused in one line."""

import json
import os
import pickle
import shutil

import pytest
import torch
from helpers.checkpoints import (
    TOKENIZER,
    Hostile,
    copied_tensors,
    digests,
    edit_json,
    read_tensors,
    refuse_convert,
    replace_weights,
    same_tensors,
)
from helpers.models import LLAMA3, random_ids, small_config
from safetensors import safe_open
from safetensors.torch import save_file

from alpaca.weights.checkpoint import read_config
from alpaca.weights.loading import load_model
from alpaca.weights.meta_format import context_length

NORM = "model.norm.weight"


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
    expected = small_config(
        vocab_size=1024, rope_theta=1e6, num_key_value_heads=4, eos_token_id=[2, 7]
    )
    assert read_config(folder) == expected


def test_several_end_tokens_are_read_of_either_file(folder, command):
    generation = folder / "generation_config.json"
    for ends, expected in ([[2, 7], [2, 7]], [7, 2], [[2, 9, 11], [2, 9, 11]]):
        edit_json(generation, eos_token_id=ends)  # a single wrong one is common
        assert read_config(folder).eos_token_id == expected
    for ends, words in (([2, "x"], "int was expected"), ([2, 1 << 21], "not from"), ([], "[]")):
        edit_json(generation, eos_token_id=ends)
        code, _, err = command("convert", folder, folder.with_name("out"))
        assert code == 2 and words in err and "eos_token_id" in err


def test_llama_3_and_mistral_configs_are_read(folder):
    file, scaling = folder / "config.json", LLAMA3["rope_scaling"]
    edit_json(file, model_type="mistral", sliding_window=None)
    assert read_config(folder) == small_config(vocab_size=1024)
    expected = small_config(vocab_size=1024, rope_theta=5e5, rope_scaling=scaling)
    edit_json(file, model_type="llama", rope_scaling=scaling, rope_theta=500000)  # transformers 4
    assert read_config(folder) == expected
    edit_json(file, rope_scaling="remove", rope_theta="remove")
    edit_json(file, rope_parameters=scaling | {"rope_theta": 5e5})  # transformers 5
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


def test_missing_config_or_weights_are_refused(tmp_path, command, folder):
    refuse_convert(command, tmp_path / "absent", "absent: no such folder")
    (tmp_path / "empty").mkdir()
    refuse_convert(command, tmp_path / "empty", "no config.json (Hugging Face) or params.json")
    (tmp_path / "empty/model").mkdir()
    refuse_convert(command, tmp_path / "empty", f"in it: give {tmp_path / 'empty/model'}")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    refuse_convert(command, folder, "no model.safetensors, pytorch_model.bin")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_pipes_and_devices_are_not_read(command, folder, name):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refuse_convert(command, folder, f"{name} is not a regular file")
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    refuse_convert(command, folder, f"{name} is not a regular file")


def test_damaged_config_is_refused(command, folder):
    config = folder / "config.json"
    start = config.read_text()[:50]
    for content, words in ((start, "not JSON"), ("[" * 200_000, "deep"), ("\xff", "not UTF-8")):
        config.write_bytes(content.encode("latin-1"))
        refuse_convert(command, folder, "config.json", words)


STRETCH = LLAMA3["rope_scaling"]
DEFAULT, DYNAMIC = {"rope_type": "default", "rope_theta": 1e4}, {"type": "dynamic", "factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "falcon"}, "model_type 'falcon' is not supported, only 'llama' is"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window 4096"),
        ({"rope_scaling": STRETCH | {"factor": "8"}}, 'factor is "8", an integer or'),
        ({"rope_scaling": STRETCH | {"low_freq_factor": 4.0}}, "low_freq_factor must be below"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling 'yarn'"),
        ({"rope_parameters": DEFAULT, "rope_scaling": DYNAMIC}, "rope scaling 'dynamic'"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', where an object was expected"),
        ({"rope_theta": float("inf")}, "rope_theta is inf, not from 1 to 1e+30"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"sliding_window": 4096}, "sliding_window 4096"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu' is"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"quantization_config": {"bits": 4}}, "only models without it are read"),
        ({"hidden_size": "remove"}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64', where int was expected"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True, where float was expected"),
        ({"num_key_value_heads": 3}, "4 heads are not divisible by num_key_value_heads"),
        ({"vocab_size": 10**19}, "vocab_size is 10000000000000000000, not from 1 to 1048576"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, not from 1 to 1048576"),
        ({"max_position_embeddings": 1}, "max_position_embeddings is 1, not from 2 to 16777216"),
        ({"max_position_embeddings": 2**40}, "is 1099511627776, not from 2 to 16777216"),
        ({"rope_theta": 1e-300}, "rope_theta is 1e-300, not from 1 to 1e+30"),
        ({"rms_norm_eps": 1e-300}, "rms_norm_eps is 1e-300, not from 1e-30 to 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, not from 1e-30 to 1"),
        ({"hidden_act": "gelu" * 10**5}, "config.json: hidden_act 'gelu"),
        ({"num_hidden_layers": 10**8}, "num_hidden_layers is 100000000, not from 1 to 1000"),
    ],
    ids=lambda value: str(value)[:60],
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
    for outside in ("../outside.bin", "/etc/passwd", "..", ".", "", "a\0.safetensors"):
        write(whole | {NORM: outside})
        refuse_convert(command, folder, f"{outside!r} is not the name of a file beside it")
    for damaged in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[]", "[" * 10**5):
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
        ({"n_layers": 10**9}, "num_hidden_layers is 1000000000, not from 1 to 1000"),
        ({"dim": 65}, "dim is 65, not a multiple of attention.wq's 64 rows"),
        ({"norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', where float was expected"),
    ],
    ids=str,
)
def test_unsupported_meta_params_are_refused(command, meta, changes, words):
    source, _ = meta(1)
    edit_json(source / "params.json", **changes)
    refuse_convert(command, source, f"params.json: {words}")


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
    refuse_convert(command, folder, "pytorch_model.bin: 'model' is not a plain tensor")


PLAIN = torch.ones(64)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ([PLAIN], "not a table of tensors"),
        ({7: PLAIN}, "7 is not"),
        ({("a", 7): PLAIN}, "('a', 7) is not"),
        ({NORM: PLAIN.to_sparse()}, NORM),
        ({NORM: PLAIN.to("meta")}, NORM),
        ({NORM: torch.ones(1).expand(64)}, NORM),
        ({NORM: torch.quantize_per_tensor(PLAIN, 1.0, 0, torch.qint8)}, NORM),
        ({NORM: torch.nested.nested_tensor([PLAIN])}, NORM),
        ({NORM: torch.ones(64, dtype=torch.complex64).conj()}, NORM),
        ({NORM: torch.ones(64, dtype=torch.complex64)}, "torch.complex64, not one of"),
    ],
    ids=[
        "list",
        "int",
        "tuple",
        "sparse",
        "meta",
        "expanded",
        "quantized",
        "nested",
        "conj",
        "complex",
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_pickle_of_tensors_that_are_not_plain_is_refused(command, folder, table, words):
    if isinstance(table, dict):
        table = {**copied_tensors(folder), **table}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save(table, folder / "pytorch_model.bin")
    refuse_convert(command, folder, words)


def test_pickled_parameters_are_converted(command, folder, tmp_path):
    weights = copied_tensors(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in weights.items()}
    torch.save(parameters, folder / "pytorch_model.bin")
    assert command("convert", folder, tmp_path / "out")[0] == 0
    assert same_tensors(read_tensors(tmp_path / "out"), weights)
