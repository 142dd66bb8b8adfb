"""GGUF files: written, read in place of a folder, and refused where they lie."""

import json
import random
import struct
import weakref

import pytest
import torch
from helpers.bpe import KINDS, content_of, tables, write_bpe, write_bpe_model
from helpers.checkpoints import TOKENIZER, read_tensors, refuse_convert, same_tensors
from helpers.commands import assert_refused
from helpers.lora import write_adapter, write_lora_base
from helpers.models import random_ids, small_model
from jinja2 import Template

from alpaca.common.errors import UserError
from alpaca.common.gguf_bpe import metadata_from_bpe
from alpaca.common.gguf_file import pack_header, read_gguf
from alpaca.common.sentencepiece_file import metadata_from_model, model_from_metadata
from alpaca.weights import gguf
from alpaca.weights.checkpoint import open_checkpoint, read_config
from alpaca.weights.gguf_writer import model_metadata, quantize, save_gguf
from alpaca.weights.loading import load_model
from alpaca.weights.writer import save_model
from templates import PREAMBLE, format_prompt
from tokenizer import load_tokenizer

NORM, Q_PROJ = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
TEMPLATE = "{{ bos_token }}{{ messages[0]['content'] }}"


def tiny(**changes):
    """A model whose rows are whole blocks, with more embeddings than tokens."""
    changes = {"vocab_size": 1030, "intermediate_size": 96, "num_hidden_layers": 1, **changes}
    return small_model(**changes)


@pytest.fixture
def base(tmp_path):
    model = tiny()
    save_model(model, model.config, tmp_path / "base", tokenizer=TOKENIZER)
    return tmp_path / "base"


def convert(command, source, target, *flags):
    code, _, err = command("convert", source, target, *flags)
    assert code == 0, err
    return target


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize(
    ("kind", "dtype"), [("f32", torch.float32), ("bf16", torch.bfloat16), ("f16", torch.float16)]
)
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_round_trip_is_bit_equal(command, tmp_path, kind, dtype, tied):
    model = tiny(tie_word_embeddings=tied, rope_theta=1e6, head_dim=24).to(dtype)
    save_model(model, model.config, tmp_path / "base", tokenizer=TOKENIZER)
    file = convert(command, tmp_path / "base", tmp_path / "m.gguf", "--type", kind)
    assert ("output.weight" in read_gguf(file).tensors) != tied
    convert(command, file, tmp_path / "back")
    assert same_tensors(read_tensors(tmp_path / "back"), model.named_parameters())
    model.config.initializer_range = 0.02  # not in the file
    assert read_config(file) == read_config(tmp_path / "back") == model.config


def test_gguf_tokenizer_gives_the_same_ids(command, base, tmp_path):
    file = convert(command, base, tmp_path / "m.gguf")
    convert(command, file, tmp_path / "back")
    rng = random.Random(0)
    texts = [
        "",
        " two  spaces",
        "</s> é中文\n\t",
        "".join(map(chr, rng.choices(range(1, 999), k=99))),
    ]
    for source in (file, tmp_path / "back", tmp_path / "back/tokenizer.model"):
        ours, theirs = load_tokenizer(source), load_tokenizer(TOKENIZER)
        assert [ours.encode(t, bos=True) for t in texts] == [
            theirs.encode(t, bos=True) for t in texts
        ]
        pieces = [
            (t.piece(i), t.sentencepiece.get_score(i)) for t in (ours, theirs) for i in range(1024)
        ]
        assert pieces[:1024] == pieces[1024:]
        assert (ours.vocab_size, ours.unk_id, ours.bos_id, ours.eos_id) == (1024, 0, 1, 2)
    assert len(read_gguf(file).metadata["tokenizer.ggml.tokens"]) == 1030  # llama.cpp counts them


def test_gguf_keeps_that_no_bos_comes_first_and_its_name(command, tmp_path):
    from sentencepiece import SentencePieceTrainer

    names = {"bos_piece": "<|start|>", "eos_piece": "<|stop|>", "unk_piece": "<?>"}
    fixed = {"model_type": "bpe", "vocab_size": 300, "byte_fallback": True, "minloglevel": 2}
    fixed |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    prefix, lines = str(tmp_path / "tokenizer"), iter(["The quick brown fox jumps."] * 9)
    SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=prefix, **fixed, **names)
    model, config = small_model(vocab_size=300), tmp_path / "tokenizer_config.json"
    config.write_text('{"add_bos_token": false}')
    save_model(model, model.config, tmp_path / "base", tokenizer=tmp_path / "tokenizer.model")
    written = json.loads((tmp_path / "base/tokenizer_config.json").read_text())
    assert written["bos_token"] == "<|start|>" and written["unk_token"] == "<?>"
    convert(command, tmp_path / "base", tmp_path / "m.gguf")
    convert(command, tmp_path / "m.gguf", tmp_path / "back")
    for source in (tmp_path, tmp_path / "base", tmp_path / "m.gguf", tmp_path / "back"):
        tokenizer = load_tokenizer(source)
        assert tokenizer.encode("fox", bos=True) == tokenizer.encode("fox")
    config.unlink()
    assert load_tokenizer(tmp_path).encode("", bos=True) == [1]


def test_gguf_keeps_the_rope_scaling_of_llama_3(command, tmp_path):
    scaling = {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = tiny(rope_theta=500000.0, rope_scaling=scaling, initializer_range=0.02)
    save_model(model, model.config, tmp_path / "base", tokenizer=TOKENIZER)
    file = convert(command, tmp_path / "base", tmp_path / "m.gguf")
    assert read_config(file) == model.config == read_config(tmp_path / "base")
    assert same_tensors(load_model(file).named_parameters(), model.named_parameters())
    info = read_gguf(file).tensors["rope_freqs.weight"]
    factors = gguf.read_tensor(read_gguf(file), info.shape, "F32", info.start, 32, None)
    assert factors[0] == 1 and factors[-1] == 32 and 1 < factors[4] < 32


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_byte_level_bpe_round_trip(command, tmp_path, kind):
    content, base = content_of(kind), tmp_path / "base"
    content["added_tokens"].append({"id": 600, "content": "<tool>", "special": False})
    given = write_bpe(tmp_path / "t", content, add_bos_token=kind == "smollm")
    model = small_model(vocab_size=605)
    save_model(model, model.config, base, tokenizer=given.parent)
    file = convert(command, base, tmp_path / "m.gguf")
    assert len(read_gguf(file).metadata["tokenizer.ggml.tokens"]) == 605
    convert(command, file, tmp_path / "back")
    expected = load_tokenizer(given)
    assert expected.added and expected.add_bos == (kind == "smollm")
    for source in (file, tmp_path / "back", tmp_path / "back/tokenizer.json"):
        tokenizer, text = load_tokenizer(source), "Hi <tool>it's 123 中文\n\n<|end|>"
        assert tables(tokenizer) == tables(expected)
        assert tokenizer.encode(text, bos=True) == expected.encode(text, bos=True)
    ask = "generate", "Hello", "--max-new-tokens", 3, "--device", "cpu", "--model-dir"
    assert command(*ask, file)[:2] == command(*ask, tmp_path / "back")[:2]


def test_gguf_bpe_without_bos_or_merges(command, tmp_path):
    content = content_of("gpt-2")
    content["model"]["merges"] = []
    given = write_bpe(tmp_path / "t", content, bos_token=None)
    model = small_model(vocab_size=600, bos_token_id=-1)
    save_model(model, model.config, tmp_path / "base", tokenizer=given.parent)
    file = convert(command, tmp_path / "base", tmp_path / "m.gguf")
    assert tables(load_tokenizer(file)) == tables(load_tokenizer(given))
    assert load_tokenizer(file).bos_id is None


def test_commands_take_a_gguf_file_for_a_folder(command, base, tmp_path):
    file, ids = convert(command, base, tmp_path / "m.gguf"), random_ids(2, 24)
    assert torch.equal(load_model(file)(ids), load_model(base)(ids))
    ask = "generate", "Hello", "--max-new-tokens", 3, "--device", "cpu", "--model-dir"
    assert command(*ask, file) == command(*ask, base)
    assert command(*ask, file, "--bits", 4)[:2] == command(*ask, base, "--bits", 4)[:2]
    diff = "--base", base, "--tuned", file, "--diff", tmp_path / "diff"
    import weightdiff

    code, _, err = command(weightdiff, "make", *diff)
    assert code == 0 and "llama.cpp's format" in err
    recovered = "--base", file, "--diff", tmp_path / "diff", "--tuned", tmp_path / "tuned"
    assert command(weightdiff, "recover", *recovered)[0] == 0
    assert same_tensors(read_tensors(tmp_path / "tuned"), read_tensors(base))
    quantized = "--model-dir", file, "--bits", 8, "--out", tmp_path / "int8"
    assert command("quantize", *quantized)[0] == 0
    assert command(*ask, tmp_path / "int8")[0] == 0
    detect = "watermark", "--tokenizer", file, base / "config.json"
    assert command(*detect)[1] == command("watermark", "--tokenizer", base, base / "config.json")[1]


def test_convert_to_gguf_merges_an_adapter(command, tmp_path):
    base = write_lora_base(tmp_path)
    adapter, words = write_adapter(base, tmp_path / "adapter"), ("--base", base / "model")
    assert command("merge", *words, "--adapter", adapter, "--out", tmp_path / "merged")[0] == 0
    one = convert(command, tmp_path / "merged", tmp_path / "merged.gguf", "--type", "q8_0")
    flags = "--type", "q8_0", "--adapter", adapter
    other = convert(command, base / "model", tmp_path / "other.gguf", *flags)
    assert same_tensors(read_tensors(one), read_tensors(other))
    assert not same_tensors(read_tensors(one), read_tensors(base / "model"))


# ---------------------------------------------------------------- blocks


def test_q4_0_keeps_the_number_of_the_largest_size():
    numbers = torch.linspace(-1, 1.5, 32)
    (block,) = quantize(numbers[None], "Q4_0", "w")
    assert block.tolist()[:2] == list(struct.pack("<e", -1.5 / 8))
    assert block[-1] & 15 == 7 and block[-1] >> 4 == 0  # number 15, 0.21, and number 31, 1.5
    (again,) = gguf.dequantize(block[None], "Q4_0")
    assert again[31] == 1.5 and (again - numbers).abs().max() <= 1.5 / 8 + 1e-6


@pytest.mark.parametrize(("kind", "error"), [("q8_0", 0.006), ("q4_0", 0.1)])
def test_quantized_weights_are_close(command, base, tmp_path, kind, error):
    file = convert(command, base, tmp_path / "m.gguf", "--type", kind)
    stored, weights = read_tensors(file), read_tensors(base)
    for name, weight in weights.items():
        distance = (stored[name] - weight).norm() / weight.norm()
        assert distance <= (0.006 if name == "lm_head.weight" else error), name
        assert (distance == 0) == (weight.dim() == 1), name
    assert stored["lm_head.weight"].dtype == torch.float32


def test_dequantize_of_one_number_in_6_bits():
    """In the second half, number 72 = 64 + 8: byte 8's high 4 bits, and bits 4 and 5 above them."""
    block = torch.zeros(1, 210, dtype=torch.uint8)
    block[0, 64 + 8], block[0, 128 + 32 + 8] = 0xA0, 0b10 << 4
    block[0, 192 + 200 // 16] = 256 - 3  # its scale is -3
    block[0, 208:] = torch.tensor([0.5], dtype=torch.float16).view(torch.uint8)
    (numbers,) = gguf.dequantize(block, "Q6_K")
    assert numbers[200] == 0.5 * -3 * (0b10_1010 - 32)
    assert numbers.nonzero().flatten().tolist() == list(range(192, 208))  # the others' scale is 0
    assert gguf.tensor_size([3, 512], "Q6_K") == 6 * 210
    assert gguf.tensor_size([3, 128], "Q6_K") == 0


def test_zeros_stay_zeros():
    for kind in ("Q8_0", "Q4_0"):
        assert not gguf.dequantize(quantize(torch.zeros(1, 32), kind, "w"), kind).any()


def test_gguf_writer_has_one_tensor_in_memory(tmp_path):
    model, alive, most = tiny(), [], 0

    def pairs():
        nonlocal most
        for name, parameter in model.named_parameters():
            copy = parameter.detach().clone()
            alive.append(weakref.ref(copy))
            yield name, copy
            del copy
            most = max(most, sum(ref() is not None for ref in alive))

    save_gguf(pairs(), model.config, tmp_path / "m.gguf", "q4_0", {})
    assert most <= 1 and len(alive) == 12


# ---------------------------------------------------------------- chat templates


def test_chat_template_is_alpacas(command, base, tmp_path):
    file = convert(command, base, tmp_path / "m.gguf")
    template = Template(read_gguf(file).metadata["tokenizer.chat_template"])

    def render(*turns: str, **names) -> str:
        roles = ["user", "assistant"] * 2
        messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
        names = {"add_generation_prompt": True, **names}
        return template.render(messages=messages, bos_token="<s>", eos_token="</s>", **names)

    assert render("Name a fruit.") == "<s>" + format_prompt("Name a fruit.")
    second = "\n\n### Instruction:\nWhy?\n\n### Response:"
    assert render("Hi", "Ho", "Why?") == f"<s>{format_prompt('Hi')}Ho</s>{second}"
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = format_prompt("Hi").replace(PREAMBLE, "Be brief.")
    assert template.render(messages=system, add_generation_prompt=True) == expected


def test_gguf_file_has_the_chat_template_of_its_source(command, base, tmp_path):
    (base / "chat_template.jinja").write_text(TEMPLATE)
    file = convert(command, base, tmp_path / "m.gguf")
    assert read_gguf(file).metadata["tokenizer.chat_template"] == TEMPLATE
    again = convert(command, file, tmp_path / "again.gguf", "--type", "q8_0")
    convert(command, again, tmp_path / "back")
    assert (tmp_path / "back/chat_template.jinja").read_text() == TEMPLATE


# ---------------------------------------------------------------- not written


def test_gguf_writer_refuses_in_one_line(command, base, tmp_path):
    target, small = tmp_path / "m.gguf", small_model(vocab_size=1024)

    def refused(*words, args=(), source=base):
        assert_refused(command("convert", source, target, *args), *words)
        assert not list(tmp_path.glob("m.gguf*"))

    refused("--dtype is for a folder", args=["--dtype", "fp16"])
    save_model(small, small.config, tmp_path / "small", tokenizer=TOKENIZER)
    refused(
        "rows of 176 are not whole blocks of 32", args=["--type", "q8_0"], source=tmp_path / "small"
    )
    model = tiny()
    for number, kind, word in (
        (1e5, "f16", "too large for fp16"),
        (1e7, "q8_0", "too large for fp16"),
        (-1e6, "q4_0", "too large for fp16"),
        (float("nan"), "q4_0", "NaN or infinity"),
        (float("inf"), "f32", "NaN or infinity"),
    ):
        with torch.no_grad():
            model.get_parameter(Q_PROJ)[3, 5] = number
        with pytest.raises(UserError, match=f"{Q_PROJ} .*{word}"):
            save_gguf(model.named_parameters(), model.config, target, kind, {})
        assert not list(tmp_path.glob("m.gguf*"))
    target.write_text("mine")
    assert_refused(command("convert", base, target), "exists already")
    assert target.read_text() == "mine"


def test_gguf_flags_are_refused_for_a_folder(command, base):
    words = "--type and --adapter are for a target NAME.gguf"
    refuse_convert(command, base, words, args=["--type", "f16"])
    refuse_convert(command, base, words, args=["--adapter", base])


def test_merges_that_llama_cpp_would_not_ignore_are_refused(command, tmp_path):
    base, content = write_bpe_model(tmp_path / "base", "smollm"), content_of("smollm")
    content["model"]["ignore_merges"] = True
    write_bpe(base, content)
    words = "llama.cpp ignores merges only for Llama 3's tokenizer"
    assert_refused(command("convert", base, tmp_path / "m.gguf"), words)


def test_tokenizers_that_llama_cpp_lacks_are_refused(tmp_path):
    from sentencepiece import SentencePieceTrainer

    lines = ["The quick brown fox jumps over the lazy dog."] * 9
    for options in ({"model_type": "unigram"}, {"normalization_rule_name": "nfkc"}):
        prefix, fixed = (
            str(tmp_path / "t"),
            {"vocab_size": 60, "minloglevel": 2, "hard_vocab_limit": False},
        )
        options = {"model_type": "bpe", "normalization_rule_name": "identity", **options}
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_prefix=prefix, **fixed, **options
        )
        with pytest.raises(UserError, match="not BPE without normalization"):
            metadata_from_model((tmp_path / "t.model").read_bytes(), "t.model")


# ---------------------------------------------------------------- files that lie


def write_lying(path, metadata=(), tensors=(), **sizes):
    """A file of a tiny model, with some metadata or tensor entries replaced."""
    model = tiny()
    found = model_metadata(model.config, "m", "f32") | dict(metadata)
    entries = {"token_embd.weight": ([1030, 64], 0, 1030 * 64 * 4), **dict(tensors)}
    start, _, size = pack_header({k: v for k, v in found.items() if v is not None}, entries)
    path.write_bytes(start + bytes(sizes.get("size", size) - len(start)))
    return path


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"general.architecture": "qwen2"}, "architecture 'qwen2' is not supported"),
        ({"split.count": 3}, "join its parts with `llama-gguf-split --merge`"),
        ({"llama.expert_count": 8}, "llama.expert_count 8 is not supported"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type 'yarn'"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count 8"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": 2**31}, "num_hidden_layers is 2147483648, not from 1 to 1000"),
        ({"llama.attention.head_count": [4, 4]}, "num_attention_heads is"),
        ({"llama.attention.head_count_kv": 3}, "not divisible"),
        ({"llama.attention.layer_norm_rms_epsilon": "x"}, "rms_norm_eps is 'x'"),
        ({"llama.embedding_length": True}, "hidden_size is True"),
        ({"general.alignment": 12}, "general.alignment is 12"),
        ({"general.alignment": 2**31}, "a is not at a multiple of 2147483648"),
    ],
    ids=str,
)
def test_unsupported_gguf_metadata_is_refused(tmp_path, metadata, words):
    file = write_lying(tmp_path / "m.gguf", metadata, {"a": ([8], 0, 32)})
    with pytest.raises(UserError, match=words.replace("[", r"\[")):
        open_checkpoint(file)


@pytest.mark.parametrize(
    ("name", "entry", "words"),
    [
        ("output_norm.weight", ([64], 12, 256), "output_norm.weight is of kind Q4_K, only F32"),
        ("output_norm.weight", ([64], 4000, 256), "of kind 4000"),
        ("output_norm.weight", ([2**62, 2**62], 0, 256), "cut short"),
        ("output_norm.weight", ([2**40], 0, 256), "cut short"),
        ("output_norm.weight", ([0, 2**62], 0, 256), "is empty or overlaps another tensor"),
        ("output_norm.weight", ([40], 8, 256), "is empty or overlaps another tensor"),
        ("output_norm.weight", ([], 8, 256), "is empty or overlaps another tensor"),
        ("a.weight", ([64], 0, 256), "unexpected a.weight"),
        ("output", ([1030, 64], 0, 256), "unexpected output"),
        ("model.norm.weight", ([64], 0, 256), "unexpected model.norm.weight"),
        ("rope_freqs.weight", ([8], 0, 32), "rope_freqs.weight is not Llama 3's"),
        ("rope_freqs.weight", ([8], 8, 34), "rope_freqs.weight is not Llama 3's"),
        ("x" * 5000, ([1] * 5, 0, 4), "has 5 axes"),
        ("token_embd.weight", ([0], 0, 4), "vocab_size is 0"),
    ],
    ids=str,
)
def test_gguf_false_tensor_entries_are_refused(command, tmp_path, name, entry, words):
    file = write_lying(tmp_path / "m.gguf", (), {name: entry})
    refuse_convert(command, file, words)


HUGE = struct.pack("<Q", 2**60)


def key(name: bytes, kind: int) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind)


@pytest.mark.parametrize(
    ("head", "rest", "words"),
    [
        ((1, 0, 0), b"", "GGUF version 1 is not supported"),
        ((3 << 24, 0, 0), b"", "version 50331648"),  # big-endian
        ((3, 2**60, 0), b"", "a count of 1,152,921,504,606,846,976"),
        ((3, 0, 2**60), b"", "a count of 1,152"),
        ((3, 0, 2**20), b"", "cut short"),
        ((3, 2**20, 0), b"", "cut short"),
        ((3, 0, 1), HUGE, "a count of 1,152"),
        ((3, 0, 1), key(b"\xff", 4) + bytes(4), "not UTF-8"),
        ((3, 0, 1), key(b"a", 8) + HUGE, "a count of 1,152"),
        ((3, 0, 1), key(b"a", 9) + struct.pack("<I", 4) + HUGE, "a count of 1,152"),
        ((3, 0, 1), key(b"a", 9) + struct.pack("<IQ", 12, 2**20), "8,388,608 bytes are missing"),
        ((3, 0, 1), key(b"a", 9) + struct.pack("<IQ", 9, 1), "type 9 is not supported"),
        ((3, 0, 1), key(b"a", 77), "type 77 is not supported"),
        ((3, 0, 2), (key(b"a", 7) + b"\1") * 2, "a appears twice"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_gguf_false_counts_are_refused(command, tmp_path, head, rest, words):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", *head) + rest)
    refuse_convert(command, tmp_path / "m.gguf", words)


def test_gguf_file_cut_anywhere_is_refused(command, base, tmp_path):
    content = convert(command, base, tmp_path / "m.gguf").read_bytes()
    file, rng = tmp_path / "cut.gguf", random.Random(0)
    for end in (*range(0, 400, 9), *rng.choices(range(len(content)), k=60), len(content) - 1):
        file.write_bytes(content[:end])
        with pytest.raises(UserError) as error:
            open_checkpoint(file)
        assert str(file) in str(error.value)


def test_gguf_tensors_on_the_same_bytes_are_refused(command, base, tmp_path):
    content = bytearray(convert(command, base, tmp_path / "m.gguf").read_bytes())
    at = content.index(b"blk.0.attn_q.weight") + 19 + 4 + 16 + 4
    content[at : at + 8] = struct.pack("<Q", struct.unpack_from("<Q", content, at)[0] - 32)
    (tmp_path / "m.gguf").write_bytes(content)
    refuse_convert(command, tmp_path / "m.gguf", "is empty or overlaps another tensor")


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer.ggml.model": "gpt3"},
        {"tokenizer.ggml.tokens": None},
        {"tokenizer.ggml.tokens": [1] * 1024},
        {"tokenizer.ggml.scores": [0.0]},
        {"tokenizer.ggml.scores": [float("nan")] * 1024},
        {"tokenizer.ggml.token_type": [7] * 1024},
        {"tokenizer.ggml.token_type": [1] * 1024},
        {"tokenizer.ggml.bos_token_id": 1024},
        {"tokenizer.ggml.eos_token_id": "x"},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_gguf_inconsistent_tokenizer_is_refused(tmp_path, changes):
    model = load_tokenizer(TOKENIZER).sentencepiece.serialized_model_proto()
    metadata = metadata_from_model(model, "t")
    assert model_from_metadata(dict(metadata), "m.gguf")
    file = write_lying(tmp_path / "m.gguf", metadata | changes)
    with pytest.raises(UserError, match="m.gguf"):
        load_tokenizer(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer.ggml.pre": None},
        {"tokenizer.ggml.pre": "qwen2"},
        {"tokenizer.ggml.merges": None},
        {"tokenizer.ggml.merges": ["a"]},
        {"tokenizer.ggml.merges": ["a b c"]},
        {"tokenizer.ggml.merges": ["中 文"]},
        {"tokenizer.ggml.tokens": ["a"] * 600},
        {"tokenizer.ggml.tokens": ["a", "b"]},
        {"tokenizer.ggml.token_type": [1]},
        {"tokenizer.ggml.token_type": ["x"] * 600},
        {"tokenizer.ggml.eos_token_id": None},
        {"tokenizer.ggml.eos_token_id": 600},
        {"tokenizer.ggml.add_bos_token": 7},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_gguf_inconsistent_bpe_is_refused(tmp_path, changes):
    metadata = metadata_from_bpe(load_tokenizer(write_bpe(tmp_path / "t")))
    assert load_tokenizer(write_lying(tmp_path / "good.gguf", metadata)).pre == "gpt-2"
    file = write_lying(tmp_path / "m.gguf", metadata | changes)
    with pytest.raises(UserError, match="m.gguf"):
        load_tokenizer(file)
