"""GGUF files against the package `gguf` and against transformers."""

import numpy as np
import pytest
import torch
from helpers.checkpoints import TOKENIZER
from helpers.models import random_ids, small_model
from helpers.parity import apart

from alpaca.common.gguf_file import read_gguf
from alpaca.weights import gguf as ours
from alpaca.weights.convert import FILE_TYPES
from alpaca.weights.gguf_writer import quantize, save_gguf, tokenizer_metadata
from alpaca.weights.loading import load_model

theirs = pytest.importorskip("gguf", reason="the package gguf is not installed")
SHAPE = {"vocab_size": 1024, "intermediate_size": 192, "initializer_range": 0.2}


def blocks_of_numbers() -> torch.Tensor:
    """Ordinary weights, tiny and large ones, zeros, equal extremes of both signs, halves."""
    numbers = torch.randn(4000, 32) * 10.0 ** torch.randint(-6, 4, (4000, 1))
    numbers[:9] = 0
    numbers[9:40, ::2] = 3.5
    numbers[9:40, 1::2] = -3.5
    numbers[40:80] = torch.randint(-127, 128, (40, 32)) / 2
    numbers[40:80, 7] = 127  # so that the scale of Q8_0 is 1, and others end in .5
    return numbers


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_are_the_gguf_packages_bit_for_bit(kind):
    numbers, number = blocks_of_numbers(), theirs.GGMLQuantizationType[kind]
    blocks = theirs.quants.quantize(numbers.numpy(), number)
    if kind != "Q4_1":  # read only
        assert np.array_equal(quantize(numbers, kind, "w").numpy(), blocks)
    expected = theirs.quants.dequantize(blocks, number)
    read = ours.dequantize(torch.from_numpy(blocks), kind).numpy()
    assert np.array_equal(read.view(np.int32), expected.view(np.int32))


def test_blocks_of_6_bits_are_read_as_by_the_gguf_package():
    """The package cannot write them: any bytes are such a block, if the scale is a number."""
    blocks = torch.randint(256, (999, 210), dtype=torch.uint8)
    blocks[:, 208:] = torch.randn(999, 1).to(torch.float16).view(torch.uint8)
    expected = theirs.quants.dequantize(blocks.numpy(), theirs.GGMLQuantizationType.Q6_K)
    read = ours.dequantize(blocks, "Q6_K").numpy()
    assert np.array_equal(read.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_gguf_package_reads_our_file(tmp_path, kind):
    model = small_model(**SHAPE)
    metadata = tokenizer_metadata(TOKENIZER, model.config)
    save_gguf(model.named_parameters(), model.config, tmp_path / "m.gguf", kind, metadata)
    reader, file = theirs.GGUFReader(tmp_path / "m.gguf"), read_gguf(tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert {n: v for n, v in fields.items() if not n.startswith("GGUF.")} == file.metadata
    entries = ours.gguf_tensors(file, model.config).values()
    for tensor, (_, dtype, _), info in zip(
        reader.tensors, entries, file.tensors.values(), strict=True
    ):
        kind = tensor.tensor_type.name
        size = ours.tensor_size(info.shape, kind)
        read = ours.read_tensor(file, info.shape, kind, info.start, size, None)
        expected = theirs.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(read.float().numpy(), expected.reshape(info.shape)), tensor.name
        assert read.dtype == dtype
        assert info.start % 32 == 0 and tensor.data_offset == info.start


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("f32", {}),
        ("f32", {"tie_word_embeddings": True, "rope_theta": 1e6}),
        ("q4_0", {"head_dim": 24, "num_key_value_heads": 1}),
    ],
    ids=str,
)
def test_transformers_reads_our_file_with_the_same_logits(tmp_path, kind, changes):
    from transformers import AutoModelForCausalLM

    model = small_model(**SHAPE, **changes)
    metadata = tokenizer_metadata(TOKENIZER, model.config)
    save_gguf(model.named_parameters(), model.config, tmp_path / "m.gguf", kind, metadata)
    options = {"gguf_file": "m.gguf", "dtype": torch.float32}
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval()
    ids = random_ids(2, 24, vocab_size=1024)
    logits, expected = load_model(tmp_path / "m.gguf")(ids), hf(ids).logits
    apart(
        f"logits of our {kind} GGUF, opened by transformers",
        (logits - expected).abs().max().item(),
        1e-4,
    )
    if kind == "f32":
        assert torch.equal(logits, model(ids))
    else:
        assert (logits - model(ids)).abs().max() > 0.1
