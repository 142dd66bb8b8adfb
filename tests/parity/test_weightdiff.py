"""Diffs in Alpaca's format against its arithmetic on Hugging Face's models."""

import json
import shutil

import pytest
import torch
from helpers.diffs import HEAD
from helpers.models import hf_model, small_config
from helpers.parity import apart

import weightdiff
from alpaca.weights.checkpoint import read_config, stored_tensors


def add_all(other: dict, base: dict, sign: int) -> dict:
    """Alpaca's arithmetic on state dicts in fp32: tuned += -base, or diff += base."""
    return {name: tensor.clone().add_(sign * base[name]) for name, tensor in other.items()}


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory):
    """A base of 128 rows and a tuned model of 129 as transformers makes them, and its diff."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("alpaca")
    hf_model(small_config()).save_pretrained(folder / "base")
    grown = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    grown.resize_token_embeddings(129, mean_resizing=False)
    for layer in (grown.get_input_embeddings(), grown.get_output_embeddings()):
        rows = layer.weight.data
        rows[-1:] = rows[:-1].mean(dim=0, keepdim=True)
    base = {name: tensor.clone() for name, tensor in grown.state_dict().items()}
    torch.manual_seed(3)
    for parameter in grown.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    grown.save_pretrained(folder / "tuned", max_shard_size="100KB")
    difference = add_all(grown.state_dict(), base, -1)
    grown.load_state_dict(difference)
    grown.save_pretrained(folder / "diff", max_shard_size="90KB")
    return folder, base, difference


def test_make_equals_alpacas_arithmetic_in_every_bit(alpaca, tmp_path, command):
    folder, _, difference = alpaca
    args = ("--base", folder / "base", "--tuned", folder / "tuned", "--diff", tmp_path / "d")
    code, _, err = command(weightdiff, "make", "--format", "alpaca", *args)
    assert code == 0, err
    found = {name: stored.read() for name, stored in stored_tensors(tmp_path / "d").items()}
    assert found.keys() == difference.keys()
    other = sum(not torch.equal(found[name], difference[name]) for name in found)
    apart("tensors of a weight diff that differ: Alpaca's arithmetic", other, 0)


def as_published(diff, folder, difference: dict) -> float:
    """Write Alpaca's diff as its authors did: pickled shards that hold the rotary tables of that
    time. Returns the sum of the tables as the model computes them."""
    shutil.copytree(diff, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    table = 1.0 / 10000 ** (torch.arange(0, 16, 2).float() / 16)
    rotary = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    shards = [{rotary.format(n): torch.zeros_like(table) for n in (0, 1)}, {}]
    for number, (name, tensor) in enumerate(difference.items()):
        shards[number // 9 > 0][name] = tensor
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return 2 * float(table.sum())


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_recover_equals_alpacas_script(alpaca, tmp_path, command, kind):
    from transformers import LlamaForCausalLM

    folder, base, difference = alpaca
    diff, out, tables = folder / "diff", tmp_path / "out", 0.0
    if kind == "bin":
        diff = tmp_path / "d"
        tables = as_published(folder / "diff", diff, difference)
    expected = add_all(difference, base, 1)
    total = float(sum(tensor.sum() for tensor in expected.values())) + tables
    args = ("--base", folder / "base", "--diff", diff, "--expect-sum")
    code, _, err = command(weightdiff, "recover", "--tuned", out, *args, total + 0.1)
    assert code == 2 and not out.exists() and err.count("the sum") == 1
    found = float(err.split("error: the sum of all weights is ")[1].split(",")[0])
    assert found == pytest.approx(total, abs=1e-3)
    code, text, err = command(weightdiff, "recover", "--tuned", out, *args, total)
    assert code == 0 and "21 tensors " in text and "the sum is as expected" in text, err
    weights = LlamaForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert command(weightdiff, "verify", *args, total)[0] == 0
    assert command(weightdiff, "verify", *args, total + 0.1)[0] == 2


def test_recover_in_half_precision_rounds_alpacas_result(alpaca, tmp_path, command):
    folder, base, difference = alpaca
    args = ("--base", folder / "base", "--diff", folder / "diff", "--tuned", tmp_path / "out")
    assert command(weightdiff, "recover", *args, "--dtype", "bf16")[0] == 0
    found = stored_tensors(tmp_path / "out")[HEAD].read()
    assert torch.equal(found, (difference[HEAD] + base[HEAD]).bfloat16())
    assert read_config(tmp_path / "out").vocab_size == 129
