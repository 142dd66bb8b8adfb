"""The tokenizer against SentencePiece and Hugging Face, and streams against whole decodes.

Set LLAMA_TOKENIZER to LLaMA's own tokenizer.model and everything here runs on that file too.
"""

import os
import random
import shutil
from functools import lru_cache

import pytest
from helpers.commands import ROOT, assert_refused
from helpers.parity import apart
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from model import LlamaConfig
from tokenizer import SPACE, Tokenizer

MODELS = [
    str(ROOT / "data" / "tokenizer.model"),
    *filter(None, [os.environ.get("LLAMA_TOKENIZER")]),
]
NASTY = [
    *("", " ", "  two  spaces ", "\n", "\t\r\n", "\x00", "a\x00b", "</s>", "<s>[INST]<unk>"),
    *(
        "<0x0A>",
        "héllo",
        "中文字符",
        "日本語テキスト",
        "🦙🏽‍♀️",
        "עברית",
        "e\u0301",
        "\ufffd",
        "\U0010ffff",
    ),
    *("### Response:", "1234567890", "\u00a0", "x" * 500),
]
settings.register_profile("project", deadline=None, derandomize=True, max_examples=300)
settings.load_profile("project")


@pytest.fixture(params=MODELS, ids=["embedded", "llama"][: len(MODELS)], scope="module")
def tokenizer(request):
    return Tokenizer(request.param)


oracle = lru_cache(SentencePieceProcessor)  # loading takes longer than a text


def streamed(tokenizer, ids, after=()) -> str:
    stream = tokenizer.stream(after)
    return "".join([stream.push(token) for token in ids]) + stream.flush()


def plain(text: str) -> str:
    return text.replace(SPACE, " ")


def test_the_embedded_model_fits_the_tiny_preset(capsys):
    tokenizer, tiny = Tokenizer(ROOT / "data"), LlamaConfig.preset("tiny")
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    tokenizer.check(tiny)
    assert tokenizer.vocab_size == tiny.vocab_size and capsys.readouterr().err == ""


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_nasty_texts_come_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text == streamed(tokenizer, ids)


@given(st.text())
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert ids == [1, *oracle(str(tokenizer.path)).encode(text), 2]
    assert tokenizer.decode(ids) == plain(text)
    assert streamed(tokenizer, ids) == plain(text)


@given(st.data())
def test_a_stream_of_any_ids_is_their_decode(tokenizer, data):
    """Broken UTF-8, lone bytes, control and unknown pieces included."""
    special = st.sampled_from([0, 1, 2])
    token = st.integers(0, tokenizer.vocab_size - 1) | st.integers(3, 258) | special
    ids = data.draw(st.lists(token, max_size=20))
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)
    cut = data.draw(st.integers(0, len(ids)))
    before, after = ids[:cut], ids[cut:]
    if not before or not tokenizer.sentencepiece.is_byte(before[-1]):  # no character is cut in two
        whole, start = tokenizer.decode(ids), tokenizer.decode(before)
        assert whole == start + streamed(tokenizer, after, after=before)


@pytest.mark.parametrize(
    "options",
    [{"remove_extra_whitespaces": True}, {"add_dummy_prefix": False}, {"byte_fallback": False}],
    ids=str,
)
def test_streams_follow_models_that_treat_spaces_otherwise(options, tmp_path):
    from sentencepiece import SentencePieceTrainer

    usual = {"byte_fallback": True, "remove_extra_whitespaces": False}
    with open(tmp_path / "t.model", "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter((ROOT / "data" / "corpus.txt").read_text().splitlines()),
            model_writer=file, vocab_size=600, model_type="bpe", minloglevel=2,
            allow_whitespace_only_pieces=True, **usual | options,
        )  # fmt: skip
    tokenizer, rng = Tokenizer(tmp_path / "t.model"), random.Random(0)
    spaces = [i for i in range(600) if SPACE in tokenizer.sentencepiece.id_to_piece(i)]
    for _ in range(3000):
        pools = [range(600), spaces, range(20)]
        ids = [rng.choice(rng.choice(pools)) for _ in range(rng.randrange(8))]
        assert streamed(tokenizer, ids) == tokenizer.decode(ids), ids


def test_a_character_is_held_back_until_it_is_whole(tokenizer):
    first = 3  # <0x00>
    stream = tokenizer.stream()
    llama = [first + byte for byte in "🦙".encode()]
    assert [stream.push(token) for token in llama] == ["", "", "", "🦙"]
    assert stream.push(first + 0xE4) == "" and stream.push(first + 0x41) == "\ufffdA"
    assert stream.push(first + 0xE4) == "" and stream.flush() == "\ufffd"


def test_special_pieces_are_never_parsed_out_of_text(tokenizer):
    ids = tokenizer.encode("</s> <s> <unk> </s>")
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.encode("hi", bos=True, eos=True) == [1, *tokenizer.encode("hi"), 2]


@pytest.mark.parity
def test_ids_equal_hugging_faces_where_it_agrees_with_sentencepiece(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    from alpaca.weights.writer import copy_tokenizer

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    copy_tokenizer(tokenizer.path, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    corpus = (ROOT / "data" / "corpus.txt").read_text().splitlines()
    for line in [*corpus, "中文 🦙 é 12 34", "x=1;\ty=2", "tab\tand\nnewline"]:
        differ = theirs(line).input_ids != tokenizer.encode(line, bos=True)
        apart("lines whose ids differ: transformers' tokenizer", differ, 0)
        assert theirs.decode(theirs(line).input_ids, skip_special_tokens=True) == line


def test_a_lone_surrogate_is_refused_by_name(tokenizer):
    with pytest.raises(ValueError, match=r"half a surrogate pair is not text: .* at character 2"):
        tokenizer.encode("ab\ud83e")


def test_the_vocabulary_must_fit_the_model(capsys):
    tokenizer = Tokenizer(ROOT / "data")
    with pytest.raises(ValueError, match="has 1024 pieces, the model only 1023 embedding rows"):
        tokenizer.check(LlamaConfig(vocab_size=1023))
    tokenizer.check(LlamaConfig(vocab_size=1025))
    assert "rows 1024 to 1024 have no piece and are never sampled" in capsys.readouterr().err
    tokenizer.check(LlamaConfig(vocab_size=1024, bos_token_id=0, eos_token_id=1))
    assert "the tokenizer's bos 1 and eos 2 are used" in capsys.readouterr().err


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        Tokenizer(tmp_path / "absent.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not read"):
        Tokenizer(tmp_path)
    for content in (b"", b"\x00\xff not a model", b"{}"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.model: not a SentencePiece model"):
            Tokenizer(tmp_path)


def test_a_model_without_bos_is_refused(tmp_path):
    from sentencepiece import SentencePieceTrainer

    with open(tmp_path / "t.model", "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c"]),
            model_writer=file,
            vocab_size=6,
            bos_id=-1,
            eos_id=1,
            minloglevel=2,
        )
    with pytest.raises(ValueError, match="it has no bos piece"):
        Tokenizer(tmp_path / "t.model")


def test_train_makes_the_embedded_model_again_byte_for_byte(tmp_path, command):
    out = tmp_path / "again.model"
    code, said, _ = command(
        "train-tokenizer", ROOT / "data/corpus.txt", "--vocab-size", 1024, "--out", out
    )
    assert code == 0 and said == f"{out}: 1024 pieces\n"
    assert out.read_bytes() == (ROOT / "data" / "tokenizer.model").read_bytes()


def test_train_refuses_in_one_line_and_writes_nothing(tmp_path, command):
    corpus, out = tmp_path / "corpus.txt", tmp_path / "out.model"
    shutil.copy(ROOT / "data" / "corpus.txt", corpus)
    for files, size, words in (
        ([corpus], 100000, ["Vocabulary size too high"]),
        ([corpus], 300, ["Vocabulary size is smaller than the characters used. 300 vs"]),
        ([corpus], 10, ["--vocab-size 10: 3 special pieces and 256 bytes come first"]),
        ([tmp_path / "absent.txt"], 1024, ["absent.txt: No such file"]),
    ):
        assert_refused(
            command("train-tokenizer", *files, "--vocab-size", size, "--out", out), *words
        )
    for target in (tmp_path, tmp_path / "absent" / "t.model"):
        refused = command("train-tokenizer", corpus, "--out", target)
        assert_refused(refused, "a file name in a folder that exists was expected")
    assert_refused(command("train-tokenizer", corpus, "--out", corpus), "is one of the texts")
    corpus.write_bytes(b" \n\n")
    assert_refused(command("train-tokenizer", corpus, "--out", out), "no text in")
    corpus.write_bytes(b"caf\xe9\n")
    assert_refused(
        command("train-tokenizer", corpus, "--out", out),
        "not UTF-8 at byte 3",
        "corpus.txt",
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["corpus.txt"]
