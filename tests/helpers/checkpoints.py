"""Checkpoint folders: compared, edited, and written as Meta wrote them."""

import hashlib
import json
import os
from unittest import mock

import torch
from safetensors.torch import save_file

from alpaca.weights import writer
from alpaca.weights.checkpoint import stored_tensors
from helpers.commands import ROOT, assert_refused
from model import Llama

TOKENIZER = ROOT / "data/tokenizer.model"


def read_tensors(folder) -> dict[str, torch.Tensor]:
    return {name: stored.read() for name, stored in stored_tensors(folder).items()}


def shards_of(size: int):
    """While it is open, checkpoints are written in files of at most `size` bytes."""
    return mock.patch.object(writer, "SHARD_BYTES", size)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def same_tensors(a, b) -> bool:
    """Whether two sets of (name, tensor) are equal in names, dtypes and every bit."""
    a, b = dict(a), dict(b)
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(bits(a[name]), bits(b[name])) for name in a
    )


def digests(folder) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def replace_weights(folder, tensors: dict) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")


def copied_tensors(folder) -> dict:
    return {name: tensor.clone() for name, tensor in read_tensors(folder).items()}


def refuse_convert(command, source, *words, args=()):
    target = source.parent / "target"
    assert_refused(command("convert", source, target, *args), *words)
    assert not list(source.parent.glob("target*")), "something was written"


def edit_json(path, **changes) -> None:
    """Change fields of a JSON file; the value "remove" removes one."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({n: value for n, value in fields.items() if value != "remove"}))


class Hostile:
    """Its pickle makes a folder when it is read."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row by row, by the definition: Meta's 2i is our i, its 2i + 1 our i + D/2."""
    rows = torch.empty_like(weight)
    width = len(weight) // heads
    for head in range(heads):
        for i in range(width // 2):
            rows[head * width + 2 * i] = weight[head * width + i]
            rows[head * width + 2 * i + 1] = weight[head * width + i + width // 2]
    return rows


def write_meta(model: Llama, folder, shards: int) -> None:
    """The model as Meta would have released it, by a table independent of meta_format.py's."""
    config = model.config
    folder.mkdir(parents=True)
    params = {"dim": 64, "n_layers": 2, "multiple_of": 16, "vocab_size": -1, "norm_eps": 1e-6}
    params["n_heads"] = config.num_attention_heads
    if config.num_key_value_heads != config.num_attention_heads:
        params["n_kv_heads"] = config.num_key_value_heads
    (folder / "params.json").write_text(json.dumps(params))
    ours = {name: tensor.detach() for name, tensor in model.named_parameters()}
    rows, columns, whole = 0, 1, None
    meta = {
        "tok_embeddings.weight": (ours["model.embed_tokens.weight"], columns),
        "output.weight": (ours["lm_head.weight"], rows),
        "norm.weight": (ours["model.norm.weight"], whole),
        "rope.freqs": (torch.ones(8), whole),
    }
    for i in range(config.num_hidden_layers):
        o, m = f"model.layers.{i}.", f"layers.{i}."
        q, k = ours[o + "self_attn.q_proj.weight"], ours[o + "self_attn.k_proj.weight"]
        meta |= {
            m + "attention.wq.weight": (interleaved(q, config.num_attention_heads), rows),
            m + "attention.wk.weight": (interleaved(k, config.num_key_value_heads), rows),
            m + "attention.wv.weight": (ours[o + "self_attn.v_proj.weight"], rows),
            m + "attention.wo.weight": (ours[o + "self_attn.o_proj.weight"], columns),
            m + "feed_forward.w1.weight": (ours[o + "mlp.gate_proj.weight"], rows),
            m + "feed_forward.w2.weight": (ours[o + "mlp.down_proj.weight"], columns),
            m + "feed_forward.w3.weight": (ours[o + "mlp.up_proj.weight"], rows),
            m + "attention_norm.weight": (ours[o + "input_layernorm.weight"], whole),
            m + "ffn_norm.weight": (ours[o + "post_attention_layernorm.weight"], whole),
        }
    for shard in range(shards):
        table = {
            name: (t if axis is None else t.chunk(shards, axis)[shard]).clone()
            for name, (t, axis) in meta.items()
        }
        torch.save(table, folder / f"consolidated.{shard:02}.pth")
