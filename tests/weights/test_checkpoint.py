"""Checkpoints: what we read, what we write, and everything that must be refused."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers.checkpoints import bits, edit_json, write_meta
from helpers.commands import ROOT, assert_refused
from helpers.models import hf_model, random_ids, small_config, small_model
from helpers.parity import apart
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from alpaca.weights.checkpoint import DTYPES, read_config, read_tensors, stored_tensors
from alpaca.weights.loading import load_model
from alpaca.weights.writer import TOKENIZER_FILES, save_model
from model import Llama, LlamaConfig

EMBEDDED = ROOT / "data" / "tokenizer.model"


def same(a, b) -> bool:
    """Equal in every bit, dtype and name."""
    a, b = dict(a), dict(b)
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(bits(a[name]), bits(b[name])) for name in a
    )


def digests(folder) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


@pytest.fixture
def folder(tmp_path):
    """A whole checkpoint in our own writing, in four shards, with its tokenizer."""
    model = small_model(vocab_size=1024)
    save_model(model, model.config, tmp_path / "m", tokenizer=EMBEDDED, shard_bytes=300_000)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 4
    return tmp_path / "m"


# ---------------------------------------------------------------- Hugging Face folders


@pytest.mark.parametrize("shard", ["10GB", "100KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_hugging_face_folder_loads_bit_for_bit(tmp_path, shard, tied):
    theirs = hf_model(small_config(tie_word_embeddings=tied), torch.bfloat16)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size=shard)
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == (shard == "100KB")
    ours = load_model(tmp_path / "hf")
    assert same(ours.named_parameters(), theirs.named_parameters())
    assert read_config(tmp_path / "hf") == ours.config
    assert same(read_tensors(tmp_path / "hf"), theirs.named_parameters())


def test_pickled_shards_load_bit_for_bit(folder):
    expected = {name: tensor.clone() for name, tensor in read_tensors(folder)}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    names, weight_map = sorted(expected), {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        title = f"pytorch_model-{number:05}-of-00002.bin"
        table = {name: expected[name] for name in part}
        if number == 2:
            table["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(
                8
            )  # as old files have
        torch.save(table, folder / title)
        weight_map |= dict.fromkeys(table, title)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same(load_model(folder).named_parameters(), expected)
    for file in folder.glob("*.bin"):  # as torch wrote before 1.6
        table = torch.load(file, weights_only=True)
        torch.save(table, file, _use_new_zipfile_serialization=False)
    assert same(load_model(folder).named_parameters(), expected)


def test_old_and_new_spellings_of_the_config_are_read(tmp_path):
    hf_model(small_config(rope_theta=1e6)).save_pretrained(tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    assert "rope_theta" not in new and new["rope_parameters"]["rope_theta"] == 1e6
    assert read_config(tmp_path) == small_config(rope_theta=1e6)
    edit_json(tmp_path / "config.json", rope_parameters="remove", rope_theta=1e6, rope_scaling=None)
    assert read_config(tmp_path) == small_config(rope_theta=1e6)
    harmless = {"rope_type": "default", "hidden_size": 32}
    edit_json(tmp_path / "config.json", rope_scaling=harmless)
    assert read_config(tmp_path) == small_config(rope_theta=1e6)
    edit_json(tmp_path / "config.json", rope_theta="remove", num_key_value_heads="remove")
    assert read_config(tmp_path) == small_config(num_key_value_heads=4)


def test_dtype_is_converted_on_loading(folder):
    model = load_model(folder, dtype=torch.bfloat16)
    expected = {name: tensor.bfloat16() for name, tensor in read_tensors(folder)}
    assert same(model.named_parameters(), expected)


def test_changing_a_loaded_model_does_not_change_its_files(folder):
    before = digests(folder)
    model = load_model(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert digests(folder) == before
    assert load_model(folder).lm_head.weight.any()


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("tied", [False, True])
def test_save_load_save_gives_the_same_bytes(tmp_path, dtype, tied):
    model = small_model(tie_word_embeddings=tied).to(dtype)
    with torch.no_grad():  # bit patterns that arithmetic would not keep
        model.model.norm.weight[:3] = torch.tensor([float("nan"), -0.0, float("inf")])
    save_model(model, model.config, tmp_path / "a", shard_bytes=50_000)
    loaded = load_model(tmp_path / "a")
    assert same(loaded.named_parameters(), model.named_parameters())
    save_model(loaded, read_config(tmp_path / "a"), tmp_path / "b", shard_bytes=50_000)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    largest = max(model.parameters(), key=lambda p: p.numel())
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert file.stat().st_size <= max(50_000, largest.numel() * dtype.itemsize) + 4096
        assert load_file(file)  # the safetensors library can read it
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0  # its data is aligned


@pytest.mark.parity
@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"rope_theta": 1e6, "head_dim": 24}], ids=str
)
@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
def test_transformers_opens_what_we_write(tmp_path, changes, shard_bytes):
    from transformers import AutoModelForCausalLM

    ours = small_model(**changes)
    save_model(ours, ours.config, tmp_path / "m", tokenizer=EMBEDDED, shard_bytes=shard_bytes)
    theirs, told = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(told.values()), told
    ids = random_ids(2, 24)
    distance = (ours(ids) - theirs(ids).logits).abs().max().item()
    apart("logits of a folder we wrote, opened by transformers", distance, 1e-5)
    assert theirs.generation_config.eos_token_id == 2
    generated = theirs.generate(ids, max_new_tokens=4, do_sample=False)
    assert generated.shape[0] == 2


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_transformers_sees_the_dtype_we_wrote(tmp_path, dtype):
    from transformers import AutoModelForCausalLM

    save_model(small_model().to(dtype), small_config(), tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert theirs.dtype == dtype and same(read_tensors(tmp_path / "m"), theirs.named_parameters())


def test_autotokenizer_keeps_bos_on_what_we_write(folder):
    from transformers import AutoTokenizer

    from tokenizer import Tokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    text = "Below is an instruction that describes a task."
    assert theirs(text).input_ids == ours.encode(text, bos=True)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)


def test_every_tokenizer_file_of_the_base_comes_along(tmp_path, folder):
    contents = {name: f"content of {name}" for name in TOKENIZER_FILES}
    for name, content in contents.items():
        (folder / name).write_text(content)
    save_model(small_model(), small_config(), tmp_path / "out", tokenizer=folder)
    for name, content in contents.items():
        assert (tmp_path / "out" / name).read_text() == content


def test_pairs_may_come_in_any_order_but_must_all_come(tmp_path):
    model = small_model()
    pairs = list(model.named_parameters())
    save_model(reversed(pairs), model.config, tmp_path / "out")
    assert same(read_tensors(tmp_path / "out"), pairs)
    for wrong, message in (
        (pairs[1:], "missing model.embed_tokens.weight"),
        ([*pairs, pairs[0]], "unexpected or repeated tensor model.embed_tokens.weight"),
        ([*pairs, ("bias", torch.ones(1))], "unexpected or repeated tensor bias"),
        ([("lm_head.weight", torch.ones(1))], "lm_head.weight is [1], not [128, 64]"),
    ):
        with pytest.raises(ValueError) as told:
            save_model(wrong, model.config, tmp_path / "bad")
        assert message in str(told.value)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def written(folder, dies_at: int | None = None) -> Llama:
    """A model saved in ten shards, by a process that dies before tensor number `dies_at`."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(256, 128, 352, 8, 4))

    def pairs():
        for number, pair in enumerate(model.named_parameters()):
            if number == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield pair

    save_model(pairs(), model.config, folder, tokenizer=EMBEDDED, shard_bytes=700_000)
    return model


def test_a_write_killed_at_any_moment_leaves_no_folder_that_looks_whole(tmp_path):
    for tensors_written in (1, 30, 74):
        if not (child := os.fork()):
            try:
                written(tmp_path / "out", tensors_written)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    model = written(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert same(load_model(tmp_path / "out").named_parameters(), model.named_parameters())


# ---------------------------------------------------------------- Meta folders


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("kv_heads", [8, 4])
def test_metas_folder_is_the_same_model(tmp_path, command, shards, kv_heads):
    model = small_model(vocab_size=1024, num_attention_heads=8, num_key_value_heads=kv_heads)
    model.config.max_position_embeddings = 2048  # params.json does not say: LLaMA's is assumed
    model.config.initializer_range = 0.02
    write_meta(model, tmp_path / "llama" / "7B", shards)
    shutil.copy(EMBEDDED, tmp_path / "llama")  # where Meta's download has it
    assert read_config(tmp_path / "llama" / "7B") == model.config
    loaded = load_model(tmp_path / "llama" / "7B")
    assert same(loaded.named_parameters(), model.named_parameters())
    out = tmp_path / "hf"
    code, _, err = command("convert", tmp_path / "llama" / "7B", out, "--dtype", "fp32")
    assert code == 0 and err.count("\n") == 1 and "2048 positions" in err
    converted = load_model(out)
    assert same(converted.named_parameters(), model.named_parameters())
    ids = random_ids(2, 24)
    assert torch.equal(converted(ids), model(ids))
    assert (out / "tokenizer.model").read_bytes() == EMBEDDED.read_bytes()


def test_the_positions_meta_does_not_tell_are_those_of_the_release():
    from alpaca.weights.meta_format import context_length

    releases = {
        "LLaMA 7B": ({"dim": 4096, "norm_eps": 1e-6}, 2048),
        "LLaMA 65B": ({"dim": 8192, "norm_eps": 1e-5}, 2048),
        "Llama 2 7B": ({"dim": 4096, "norm_eps": 1e-5}, 4096),
        "Llama 2 70B": ({"dim": 8192, "norm_eps": 1e-5, "n_kv_heads": 8}, 4096),
        "CodeLlama": ({"dim": 4096, "norm_eps": 1e-5, "rope_theta": 1e6}, 16384),
    }
    for name, (params, expected) in releases.items():
        assert context_length(params) == expected, name


# ---------------------------------------------------------------- refused, in one line, unwritten


def refuse_convert(command, source, *words, args=()):
    target = source.parent / "target"
    assert_refused(command("convert", source, target, *args), *words)
    assert not list(source.parent.glob("target*")), "something was written"


def test_folders_without_config_or_weights_are_refused(tmp_path, command, folder):
    refuse_convert(command, tmp_path / "absent", "absent: no such folder")
    (tmp_path / "empty").mkdir()
    refuse_convert(
        command, tmp_path / "empty", "no config.json (Hugging Face) or params.json (Meta)"
    )
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    refuse_convert(command, folder, "no model.safetensors, pytorch_model.bin")


def test_damaged_config_is_refused(command, folder):
    config = folder / "config.json"
    whole = config.read_text()
    for content, words in (
        (whole[:50], "not JSON"),
        ("[]", "a JSON object was expected"),
        ("[" * 200_000, "not JSON"),
        ("\xff", "not JSON"),
    ):
        config.write_bytes(content.encode("latin-1"))
        refuse_convert(command, folder, "config.json", words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral' is not supported, only 'llama' is"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope scaling 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling 'yarn'"),
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                "rope_scaling": {"type": "dynamic", "factor": 4.0},
            },
            "rope scaling 'dynamic'",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', where an object was expected"),
        ({"rope_interleaved": True}, "rope_interleaved True"),
        ({"rope_theta": float("inf")}, "rope_theta is inf, above the limit"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"sliding_window": 4096}, "sliding_window 4096"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu' is"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": "remove"}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64', where int was expected"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True, where float was expected"),
        ({"num_key_value_heads": 3}, "4 heads are not divisible by num_key_value_heads"),
    ],
    ids=str,
)
def test_configs_we_do_not_compute_are_refused_by_name(command, folder, changes, words):
    edit_json(folder / "config.json", **changes)
    refuse_convert(command, folder, "config.json", words)


def test_truncated_or_missing_shards_are_refused(command, folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(b"")
    refuse_convert(command, folder, shard.name, "empty")
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refuse_convert(command, folder, shard.name, "a Git LFS pointer")
    for keep in (4, 100, len(whole) - 1):
        shard.write_bytes(whole[:keep])
        refuse_convert(command, folder, shard.name, "damaged or cut short")
    shard.unlink()
    refuse_convert(command, folder, "files it names are missing", shard.name)


def test_an_index_that_does_not_fit_its_shards_is_refused(command, folder):
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())["weight_map"]
    title = whole.pop("model.norm.weight")
    index.write_text(json.dumps({"weight_map": whole}))
    refuse_convert(command, folder, title, "other tensors than its index says: model.norm.weight")
    tables = {"model.layers.0.self_attn.rotary_emb.inv_freq": title}
    index.write_text(json.dumps({"weight_map": whole | {"model.norm.weight": title} | tables}))
    load_model(folder)  # an obsolete table that only the index has harms nobody
    index.write_text(json.dumps({"weight_map": whole | {"model.norm.weight": "../outside"}}))
    refuse_convert(command, folder, "'../outside' is not the name of a file beside it")
    for damaged in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        index.write_text(damaged)
        refuse_convert(command, folder, "model.safetensors.index.json")


def test_all_that_is_wrong_with_the_tensors_stands_in_one_line(command, folder):
    weights = {name: tensor.clone() for name, tensor in read_tensors(folder)}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    weights["lm_head.weight"] = torch.ones(1025, 64)
    weights["model.embed_tokens.weight"] = torch.ones(1024, 64, dtype=torch.int8)
    save_file(weights, folder / "model.safetensors")
    refuse_convert(
        command,
        folder,
        "missing model.layers.1.mlp.up_proj.weight, model.norm.weight",
        "unexpected model.layers.0.self_attn.q_proj.bias",
        "lm_head.weight is [1025, 64] where the config says [1024, 64]",
        "model.embed_tokens.weight is torch.int8, not one of fp32, bf16, fp16",
    )


def test_names_with_a_prefix_are_shown(command, folder):
    weights = {f"base_model.{name}": tensor.clone() for name, tensor in read_tensors(folder)}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(weights, folder / "model.safetensors")
    refuse_convert(command, folder, "unexpected base_model.lm_head.weight", "and 13 more")


def test_a_wrong_vocabulary_is_refused(command, folder):
    edit_json(folder / "config.json", vocab_size=1025)
    refuse_convert(command, folder, "lm_head.weight is [1024, 64] where the config says [1025, 64]")


def test_a_wrong_number_of_layers_is_refused_at_once(command, folder):
    edit_json(folder / "config.json", num_hidden_layers=3)
    refuse_convert(command, folder, "missing model.layers.2.input_layernorm.weight", "and 1 more")
    edit_json(folder / "config.json", num_hidden_layers=100_000_000)
    words = "num_hidden_layers is 100000000, above the limit of 1000"
    refuse_convert(command, folder, f"config.json: {words}")


def test_a_tokenizer_of_another_model_is_refused(command, folder, tmp_path):
    small = small_model()
    save_model(small, small.config, tmp_path / "small", tokenizer=EMBEDDED)
    refuse_convert(command, tmp_path / "small", "1024 tokens, the model only 128 embeddings")
    (tmp_path / "tokenizer.json").write_text("{}")
    arguments = ["--tokenizer", tmp_path / "tokenizer.json"]
    refuse_convert(command, folder, "tokenizer.json: not a SentencePiece model", args=arguments)


def test_convert_takes_the_special_ids_from_the_tokenizer(command, folder, tmp_path):
    """Early conversions of LLaMA had bos 0 and eos 1 in config.json, beside the right tokenizer."""
    edit_json(folder / "config.json", bos_token_id=0, eos_token_id=[1, 7])
    code, _, err = command("convert", folder, tmp_path / "out")
    assert code == 0 and "the tokenizer's bos 1 and eos 2 are used" in err
    config = read_config(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)


def test_numbers_too_large_for_fp16_are_refused(command, tmp_path):
    model = small_model(vocab_size=1024).bfloat16()
    with torch.no_grad():
        model.model.norm.weight[3] = 1e5
    save_model(model, model.config, tmp_path / "m", tokenizer=EMBEDDED)
    words = "model.norm.weight holds numbers too large for fp16"
    refuse_convert(command, tmp_path / "m", words, args=["--dtype", "fp16"])
    with pytest.raises(ValueError, match=words):
        load_model(tmp_path / "m", dtype=torch.float16)


def test_a_head_that_contradicts_tied_weights_is_refused(folder, command):
    edit_json(folder / "config.json", tie_word_embeddings=True)
    refuse_convert(command, folder, "lm_head.weight is not the embedding")


def test_a_missing_tokenizer_is_refused_with_the_way_out(command, folder):
    (folder / "tokenizer.model").unlink()
    refuse_convert(command, folder, "give one with --tokenizer FILE")
    refuse_convert(
        command, folder, "absent: no tokenizer.model", args=["--tokenizer", folder / "absent"]
    )


def test_an_existing_target_is_not_touched(command, folder, tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").write_text("precious")
    assert_refused(command("convert", folder, tmp_path / "target"), "target exists already")
    assert digests(tmp_path / "target").keys() == {"mine"}


@pytest.mark.parametrize("break_it", ["gap", "end", "truncated", "params", "tensor"])
def test_incomplete_meta_folders_are_refused(tmp_path, command, break_it):
    source = tmp_path / "7B"
    write_meta(small_model(num_attention_heads=8, num_key_value_heads=8), source, shards=4)
    shutil.copy(EMBEDDED, source)
    words = {
        "gap": ["consolidated.01.pth", "missing"],
        "end": ["3 of 4 consolidated.*.pth files are there"],
        "truncated": ["consolidated.02.pth", "not a readable file of plain tensors"],
        "params": ["params.json", "dim is None, where a number was expected"],
        "tensor": ["consolidated.03.pth", "not the tensors of consolidated.00.pth", "norm.weight"],
    }[break_it]
    if break_it == "gap":
        (source / "consolidated.01.pth").unlink()
    elif break_it == "end":
        (source / "consolidated.03.pth").unlink()
    elif break_it == "truncated":
        file = source / "consolidated.02.pth"
        file.write_bytes(file.read_bytes()[:-500])
    elif break_it == "params":
        edit_json(source / "params.json", dim="remove")
    else:
        table = torch.load(source / "consolidated.03.pth", weights_only=True)
        del table["norm.weight"]
        torch.save(table, source / "consolidated.03.pth")
    refuse_convert(command, source, *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_scaled_rope": True}, "use_scaled_rope is not supported"),
        ({"rope_theta": 500000.0}, "rope_theta 500000.0 is neither LLaMA's nor CodeLlama's"),
        ({"n_heads": "8"}, "n_heads is '8', where a number was expected"),
        ({"dim": 65}, "dim is 65, which attention.wq, 64 wide, cannot fill"),
        ({"n_layers": 2.0}, "n_layers is 2.0, where a number was expected"),
        ({"norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', where float was expected"),
        ({"vocab_size": 999}, "vocab_size is 999, the embedding has 128"),
    ],
    ids=str,
)
def test_unsupported_meta_params_are_refused(tmp_path, command, changes, words):
    write_meta(small_model(num_attention_heads=8, num_key_value_heads=8), tmp_path / "7B", 1)
    edit_json(tmp_path / "7B" / "params.json", **changes)
    refuse_convert(command, tmp_path / "7B", f"params.json: {words}")


def test_code_llamas_rotary_base_is_kept(tmp_path):
    write_meta(small_model(num_attention_heads=8, num_key_value_heads=8), tmp_path / "7B", 2)
    edit_json(tmp_path / "7B" / "params.json", rope_theta=1000000)
    config = load_model(tmp_path / "7B").config
    assert (config.rope_theta, config.max_position_embeddings) == (1e6, 16384)


def test_positions_can_be_given(tmp_path, command):
    model = small_model(vocab_size=1024, num_attention_heads=8, num_key_value_heads=8)
    write_meta(model, tmp_path / "7B", 1)
    target = tmp_path / "out"
    given = ["--positions", 4096, "--tokenizer", EMBEDDED]
    code, _, err = command("convert", tmp_path / "7B", target, *given)
    assert code == 0 and "4096 positions" in err
    assert read_config(target).max_position_embeddings == 4096 and "see --positions" not in err
    zero = ["--positions", 0, "--tokenizer", EMBEDDED]
    assert_refused(
        command("convert", tmp_path / "7B", tmp_path / "no", *zero),
        "--positions: invalid",
    )


@pytest.mark.parametrize("name", ["norm.weight", "layers.0.attention.wq.weight"])
def test_files_of_two_models_are_refused(tmp_path, command, name):
    write_meta(small_model(num_attention_heads=8, num_key_value_heads=8), tmp_path / "7B", 2)
    file = tmp_path / "7B" / "consolidated.01.pth"
    table = torch.load(file, weights_only=True)
    table[name] = table[name] * 7 if "norm" in name else table[name].half()
    torch.save(table, file)
    refuse_convert(command, tmp_path / "7B", f"{name}: the consolidated.*.pth files are not of one")


class Hostile:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path, command, name, legacy, folder):
    source, marker = tmp_path / "evil", tmp_path / "it ran"
    source.mkdir()
    (source / "params.json").write_text('{"dim": 64, "n_layers": 2, "n_heads": 4}')
    if name.endswith(".bin"):
        (source / "params.json").unlink()
        shutil.copy(folder / "config.json", source)
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


# ---------------------------------------------------------------- memory

MEASURED = """
import json, os, sys, torch
from bench.measure import PeakMemory
from alpaca.weights.checkpoint import read_config, read_tensors
from alpaca.weights.writer import save_model
from alpaca.weights.loading import load_model
from model import Llama, LlamaConfig
with torch.device("meta"):
    Llama(LlamaConfig.preset("tiny"))  # what torch loads on first use is not the checkpoint's
for work, *folders, dtype in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        code = 1
        try:
            with PeakMemory() as peak:
                if work == "load":
                    model = load_model(*folders, dtype=getattr(torch, dtype))
                else:
                    source, target = folders
                    config = read_config(source)
                    save_model(read_tensors(source), config, target, getattr(torch, dtype))
            print(peak.anonymous, flush=True)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
"""


def peak_memory(*works) -> list[int]:
    command = [sys.executable, "-c", MEASURED, json.dumps(works, default=str)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.parametrize("size", ["small", pytest.param("1.1B", marks=pytest.mark.slow)])
def test_loading_and_writing_stay_within_their_memory(tmp_path, size):
    shape = (4096, 512, 1536, 12, 8) if size == "small" else (32000, 2048, 5632, 22, 32, 4)
    torch.set_default_dtype(torch.bfloat16)
    model = Llama(LlamaConfig(*shape))
    in_bf16 = sum(p.numel() * 2 for p in model.parameters())
    largest = max(p.numel() * 2 for p in model.parameters())
    save_model(model, model.config, tmp_path / "m")
    (tmp_path / "pickled").mkdir()
    shutil.copy(tmp_path / "m" / "config.json", tmp_path / "pickled")
    table = {name: tensor.detach() for name, tensor in model.named_parameters()}
    torch.save(table, tmp_path / "pickled" / "pytorch_model.bin")
    del model, table
    slack = 24 << 20  # allocator and thread pools
    mapped, *converted, writing = peak_memory(
        ("load", tmp_path / "m", "bfloat16"),
        ("load", tmp_path / "m", "float16"),
        ("load", tmp_path / "pickled", "float16"),
        ("write", tmp_path / "m", tmp_path / "out", "float16"),
    )
    assert mapped <= slack  # used where it lies
    for peak in converted:
        assert 0.9 * in_bf16 <= peak <= 1.15 * in_bf16 + slack
    assert writing <= 2 * largest + slack


def test_shapes_and_dtypes_are_known_without_reading(folder):
    found = stored_tensors(folder)
    with safe_open(folder / "model-00001-of-00004.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            assert found[name].shape == file.get_tensor(name).shape
            assert found[name].dtype == torch.float32
