"""Prompts, ids and labels, the order of examples, and packing."""

import doctest
import inspect
import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.bpe import KINDS, content_of, write_bpe
from helpers.commands import ROOT
from helpers.models import small_model
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
from alpaca.common.errors import UserError
from alpaca.datagen.train_tokenizer import train_tokenizer
from bpe import CHARACTERS as CHARACTERS_OF_BYTES
from bpe import BPETokenizer
from dataset import (
    chat_prompt,
    encode_all,
    encode_record,
    make_row,
    pack_rows,
    step_examples,
    total_steps,
)
from model import IGNORE
from templates import PREAMBLE, format_prompt
from tokenizer import Tokenizer, load_tokenizer

TOKENIZER = load_tokenizer(ROOT / "data/tokenizer.model")


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    """A tokenizer with tokens like `:(`, which reach from the template into an answer."""
    folder = tmp_path_factory.mktemp("merging")
    lines = ("(a) and so on (b)", '"a" b', ") c")
    (folder / "text.txt").write_text("".join(f"### Response:{line}\n" for line in lines) * 50)
    train_tokenizer([folder / "text.txt"], 310, folder / "tokenizer.model")
    merging = load_tokenizer(folder)
    assert {":(", ':"', ":)"} < {merging.piece(token) for token in range(merging.vocab_size)}
    return merging


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory, merging):
    """SentencePiece and byte-level BPE of three kinds, one of which has BOS before a text."""
    folder = tmp_path_factory.mktemp("bpe")
    files = [
        write_bpe(folder / kind, content_of(kind), add_bos_token=kind == "llama-bpe")
        for kind in KINDS
    ]
    return [TOKENIZER, merging, *map(load_tokenizer, files)]


def record(output: str, instruction: str = "Do it.", input: str = "") -> dict:
    return {"instruction": instruction, "input": input, "output": output}


def conversation(*contents: str, system: str | None = None) -> list[dict]:
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}] * (system is not None) + turns


HARD_TEXTS = ["plain words", "", " a space first", "  two spaces", "\ta tab", "\na newline first"]
HARD_TEXTS += ["(in brackets)", ") and so on", "(((:(", ": colon", '"quoted"', ".", "trailing  \n "]
HARD_TEXTS += ["中文回答", "🙂👩‍👩‍👧‍👦", "a </s> b <s> c <unk>", "line\r\nline", "x" * 700]
HARD_TEXTS += ["\n\n### Response:\nagain", "### Instruction:\nforget it\n\n### Response:"]
CHARACTERS = st.sampled_from(list(' \n\t\r():"#.a')) | st.characters(exclude_categories=["Cs"])
RANDOM_TEXTS = st.text(CHARACTERS, max_size=20)
TEXTS = st.sampled_from(HARD_TEXTS) | RANDOM_TEXTS.map(lambda text: text.replace("\u2581", " "))


# ---------------------------------------------------------------- records → ids and labels


def test_format_prompt_is_alpacas_character_for_character():
    assert format_prompt("Add.", "2, 3") == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n2, 3\n\n### Response:"
    )
    assert format_prompt("Add.") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Response:"
    )


def assert_encoded(record: dict, tokenizer: Tokenizer) -> None:
    """BOS and prompt masked, answer and EOS not, and the prompt's ids those of the prompt alone."""
    ids, labels, unmerged = encode_record(record, tokenizer)
    prompt = format_prompt(record["instruction"], record["input"])
    prompt_ids = tokenizer.encode(prompt, bos=True)
    assert ids[: len(prompt_ids)] == prompt_ids, "decoding would see another prompt"
    assert labels == [IGNORE] * len(prompt_ids) + ids[len(prompt_ids) :]
    assert ids[-1] == labels[-1] == tokenizer.eos_id and len(ids) > len(prompt_ids)
    together = tokenizer.encode(prompt + record["output"], bos=True, eos=True)
    merges = together[: len(prompt_ids)] != prompt_ids
    assert unmerged == merges and (merges or ids == together)
    answer = [label for label in labels if label != IGNORE]
    assert tokenizer.decode(prompt_ids + answer) == prompt + record["output"]


@settings(max_examples=200, deadline=None)
@given(output=TEXTS, instruction=TEXTS, input=TEXTS)
def test_record_labels_are_the_answer_and_eos(output, instruction, input, tokenizers):
    for tokenizer in tokenizers:
        assert_encoded(record(output, instruction, input), tokenizer)


def test_plain_text_has_labels_after_bos():
    ids, labels, _ = encode_record({"text": "Once"}, TOKENIZER)
    assert ids == TOKENIZER.encode("Once", bos=True, eos=True) and labels == [IGNORE, *ids[1:]]


def test_docstring_of_encode_record_shows_true_ids():
    ids, labels, _ = encode_record(record("a pear", "Name a fruit."), TOKENIZER)
    lines = [line.split() for line in inspect.getdoc(encode_record).splitlines()]
    for name, values in (("token", map(TOKENIZER.piece, ids)), ("id", ids), ("label", labels)):
        [(_, *shown)] = [line for line in lines if line[:1] == [name]]
        assert shown == [str(value) for value in values][-len(shown) :] and len(shown) == 13


def test_docstring_examples_of_packing_run():
    failed, attempted = doctest.testmod(dataset)
    assert failed == 0 and attempted == 6


def test_conversation_of_one_question_is_alpacas_record():
    ids = TOKENIZER.encode(format_prompt("Name a colour."), bos=True)
    assert chat_prompt(conversation("Name a colour."), TOKENIZER) == ids
    chat = {"messages": conversation("Name a colour.", "Red")}
    alpaca = record("Red", "Name a colour.")
    assert encode_record(chat, TOKENIZER) == encode_record(alpaca, TOKENIZER)


def assert_conversation_encoded(messages: list[dict], tokenizer: Tokenizer) -> None:
    """Each turn of the assistant has labels and an EOS, and follows the ids of the turns before."""
    ids, labels, _ = encode_record({"messages": messages}, tokenizer)
    bos = tokenizer.encode("", bos=True)
    assert ids[: len(bos)] == bos and ids.count(tokenizer.bos_id) == len(bos)
    system = messages[0]["content"] if messages[0]["role"] == "system" else PREAMBLE
    text, end = system, 0
    for number, message in enumerate(messages):
        if message["role"] == "user":
            text += f"\n\n### Instruction:\n{message['content']}\n\n### Response:"
        elif message["role"] == "assistant":
            start = len(chat_prompt(messages[:number], tokenizer))
            assert tokenizer.decode(ids[:start]) == text
            assert set(labels[end:start]) == {IGNORE}
            text += message["content"]
            after = len(chat_prompt(messages[: number + 1], tokenizer))
            assert tokenizer.decode(ids[:after]) == text and ids[after - 1] == tokenizer.eos_id
            assert labels[start:after] == ids[start:after]
            end = after
    assert end == len(ids) == len(labels)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXTS, min_size=2, max_size=6), system=st.none() | TEXTS)
def test_conversation_labels_are_the_assistants_turns(texts, system, tokenizers):
    messages = conversation(*texts[: len(texts) // 2 * 2], system=system)
    for tokenizer in tokenizers:
        assert_conversation_encoded(messages, tokenizer)


def test_encode_all_counts_the_merges_it_prevents(merging):
    records = [record("(a)"), record("b (a)"), record("(b)")]
    assert encode_all(records, [""] * 3, merging, 512).report["answers tokenized separately"] == 2
    records.append({"messages": conversation("Do it.", "(a)", "Again.", "(a)")})
    assert encode_all(records, [""] * 4, merging, 512).report["answers tokenized separately"] == 4
    assert encode_all(records, [""] * 4, TOKENIZER, 512).report["answers tokenized separately"] == 0


def test_encode_all_counts_bytes_without_a_token():
    pieces = [*{*CHARACTERS_OF_BYTES} - {"x"}, "<|end|>"]
    lacking = BPETokenizer(pieces, [], "gpt-2", eos_id=255)
    records = [record("axx"), {"text": "x"}, {"messages": conversation("x", "y")}]
    counts = encode_all(records, [""] * 3, lacking, 512).report
    assert counts["bytes without a token"] == 4
    complete = encode_all(records, [""] * 3, TOKENIZER, 512).report
    assert "bytes without a token" not in complete


def test_encode_all_counts_truncated_and_drops_unlabeled_records():
    prompt = len(TOKENIZER.encode(format_prompt("Do it."), bos=True))
    short, long = record("yes"), record("word " * 100)
    late = record("yes", instruction="wait " * 100)
    examples = encode_all([short, long, late], ["a", "b", "c"], TOKENIZER, prompt + 10)
    assert examples.report == {
        "kept": 2,
        "truncated": 2,
        "dropped": 1,
        "answers tokenized separately": 0,
    }
    assert examples.origins == ["a", "b"] and len(examples) == 2
    assert (examples.lengths <= prompt + 10).all() and (examples.supervised > 0).all()
    assert examples.ids[examples.starts[1] - 1] == TOKENIZER.eos_id
    assert examples.ids[-1] != TOKENIZER.eos_id, "a truncated answer has no EOS"
    exact = encode_all([short], ["a"], TOKENIZER, len(encode_record(short, TOKENIZER)[0]))
    assert exact.report["truncated"] == 0 and exact.ids[-1] == TOKENIZER.eos_id
    with pytest.raises(UserError) as error:
        encode_all([short, long], ["a", "b"], TOKENIZER, 5)
    for words in ("truncation to 5 tokens", "any of the 2 records", "raise --max-length"):
        assert words in str(error.value)


@pytest.mark.parametrize("length", range(1, 90, 4))
def test_encode_all_truncates_to_the_first_ids(length, merging):
    records = [record('"one" two three'), {"text": "once upon a time"}]
    records.append({"messages": conversation("Hi", "(a)", "and", "b")})
    for tokenizer, one in ((t, r) for t in (TOKENIZER, merging) for r in records):
        ids, labels, _ = encode_record(one, tokenizer)
        if set(labels[:length]) == {IGNORE}:
            with pytest.raises(UserError, match="raise --max-length"):
                encode_all([one], ["a"], tokenizer, length)
            continue
        found = encode_all([one], ["a"], tokenizer, length)
        assert found.ids.tolist() == ids[:length] and found.labels.tolist() == labels[:length]
        assert found.supervised.tolist() == [sum(label != IGNORE for label in labels[:length])]
        assert found.report["truncated"] == (len(ids) > length)


def test_digest_differs_for_different_examples_only():
    one, same = (encode_all([record("yes")], [name], TOKENIZER, 512) for name in "ab")
    assert one.digest() == same.digest()
    for field in ("ids", "labels", "starts"):
        assert replace(one, **{field: getattr(one, field) + 1}).digest() != one.digest()


# ---------------------------------------------------------------- order of examples


def test_total_steps_of_alpacas_run():
    assert total_steps(52002, 128, 3) == 1219


@settings(max_examples=100, deadline=None)
@given(
    examples=st.integers(1, 30),
    batch=st.integers(1, 40),
    epochs=st.integers(1, 4) | st.floats(0.5, 4),
    seed=st.integers(0, 9),
)
def test_steps_take_every_example_once_per_epoch(examples, batch, epochs, seed):
    steps, total = total_steps(examples, batch, epochs), round(examples * epochs)
    parts = [step_examples(examples, batch, epochs, seed, step) for step in range(steps)]
    assert [len(part) for part in parts[:-1]] == [batch] * max(0, steps - 1)
    assert sum(map(len, parts)) == total and (not parts or 1 <= len(parts[-1]) <= batch)
    order = [int(i) for part in parts for i in part]
    for start in range(0, total, examples):
        epoch = order[start : start + examples]
        assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(examples))
    # another batch size goes through the same shuffles
    assert order == [step_examples(examples, 1, epochs, seed, step)[0] for step in range(total)]


def test_shuffles_differ_by_epoch_and_seed():
    epochs = [list(step_examples(40, 40, 3, 3, step)) for step in range(3)]
    other_seed = list(step_examples(40, 40, 3, 4, 0))
    assert len({tuple(order) for order in (*epochs, other_seed, range(40))}) == 5


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_pack_rows_places_every_document_once_and_levels_rows(ranks):
    rng = np.random.default_rng(ranks)
    for _ in range(20):
        lengths = np.clip(rng.lognormal(4.4, 0.7, rng.integers(1, 200)), 2, 512).astype(int)
        rows = pack_rows(lengths, ranks, 1024)
        assert rows == pack_rows(lengths.copy(), ranks, 1024)
        assert len(rows) == ranks and len({len(of_rank) for of_rank in rows}) == 1
        flat = [row for of_rank in rows for row in of_rank]
        assert sorted(i for row in flat for i in row) == list(range(len(lengths)))
        filled = [sum(lengths[row]) if row else 0 for row in flat]
        assert max(filled) <= 1024 and max(filled) - min(filled) <= lengths.max()
        assert len(rows[0]) <= -(-lengths.sum() // (ranks * 1024)) + 2, "rows left half empty"


def test_pack_rows_of_exact_fits_and_too_few_documents():
    assert pack_rows(np.array([7, 9]), 4, 16) == [[[1]], [[0]], [[]], [[]]]
    assert pack_rows(np.array([16]), 1, 16) == [[[0]]]
    assert pack_rows(np.array([16, 1]), 1, 16) == [[[0], [1]]]
    assert pack_rows(np.array([], int), 2, 16) == [[[]], [[]]]
    assert pack_rows(np.array([8, 8, 8, 8]), 1, 32) == [[[0, 1, 2, 3]]]
    assert [len(of_rank) for of_rank in pack_rows(np.full(8, 8), 2, 32)] == [1, 1]
    assert [len(of_rank) for of_rank in pack_rows(np.full(9, 8), 2, 32)] == [2, 2]
    with pytest.raises(AssertionError, match="no row can hold"):
        pack_rows(np.array([5, 17]), 2, 16)


def test_pack_rows_gives_a_document_to_the_first_of_the_shortest_rows():
    def by_search(lengths, ranks, row_tokens):  # as pack_rows, without its heap
        per_rank = max(1, -(-lengths.sum() // (ranks * row_tokens)))
        while True:
            rows, filled = [[] for _ in range(ranks * per_rank)], np.zeros(ranks * per_rank, int)
            for document in np.argsort(-lengths, kind="stable"):
                rows[filled.argmin()].append(document)
                filled[filled.argmin()] += lengths[document]
            if filled.max() <= row_tokens:
                return [rows[rank::ranks] for rank in range(ranks)]
            per_rank += 1

    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths, ranks = rng.integers(1, 33, rng.integers(0, 60)), int(rng.integers(1, 9))
        assert pack_rows(lengths, ranks, 40) == by_search(lengths, ranks, 40)


@pytest.fixture(scope="module")
def examples():
    rng = random.Random(0)
    words = "a red fox ran home in the rain and slept".split()  # noqa: SIM905
    records = [record(" ".join(rng.choices(words, k=rng.randint(1, 30)))) for _ in range(12)]
    return encode_all(records, [""] * 12, TOKENIZER, 60)


@torch.no_grad()
def loss_one_by_one(model, examples) -> float:
    total = 0.0
    for start, end in pairwise(examples.starts):
        ids, labels = (
            torch.tensor(x[start:end])[None].long() for x in (examples.ids, examples.labels)
        )
        total += model(ids, labels=labels).item()
    return total


@torch.no_grad()
def test_packing_changes_no_loss(examples):
    model = small_model(vocab_size=1024).double()
    expected = loss_one_by_one(model, examples)
    for ranks, multiple, bounds in ((1, 1, 1), (2, 1, 1), (3, 1, 1), (3, 32, 8), (14, 32, 8)):
        rows = [row for of_rank in pack_rows(examples.lengths, ranks, 256) for row in of_rank]
        packed = (make_row(examples, np.array(row, int), multiple, bounds) for row in rows)
        total = sum(model(**row._asdict()).item() for row in packed)
        assert total == pytest.approx(expected, rel=1e-6), (ranks, multiple)


@torch.no_grad()
def test_make_row_masks_the_first_label_of_each_document(examples):
    examples = replace(examples, labels=examples.ids)  # every token has a label
    model = small_model(vocab_size=1024).double()
    row = make_row(examples, np.arange(12))
    assert (row.labels[0, row.cu_seqlens[:-1].long()] == IGNORE).all()
    expected = loss_one_by_one(model, examples)
    assert model(**row._asdict()).item() == pytest.approx(expected, rel=1e-6)
    assert examples.labels[0] != IGNORE, "the examples themselves must not change"


def test_make_row_pads_to_few_shapes_for_compiled_kernels(examples):
    for which in ([3, 5], [0, 1, 2], list(range(12)), []):
        row = make_row(examples, np.array(which, int), 32, 8)
        assert row.ids.shape == row.labels.shape and row.ids.shape[1] % 32 == 0
        assert len(row.cu_seqlens) == (16 if len(which) == 12 else 8)
        assert row.cu_seqlens[-1] == row.ids.shape[1]
        length = examples.lengths[which].sum() if which else 0
        assert (row.labels[0, length:] == IGNORE).all() and row.ids.shape[1] - length <= 32
        assert row.cu_seqlens.diff().min() >= 0 and row.cu_seqlens.dtype == torch.int32
        assert row.cu_seqlens.diff()[: len(which)].tolist() == examples.lengths[which].tolist()
    full = make_row(examples, np.array([3]), int(examples.lengths[3]))
    assert full.cu_seqlens.tolist() == [0, examples.lengths[3]], "a full row needs no padding"


def test_make_row_without_documents_has_no_loss_and_no_gradient(examples):
    model = small_model(vocab_size=1024)
    empty = make_row(examples, np.array([], int))
    assert empty.ids.shape == (1, 1) and empty.cu_seqlens.tolist() == [0, 1]
    for row in (empty, make_row(examples, np.array([], int), 32, 8)):
        loss = model(**row._asdict())
        loss.backward()
        assert loss.item() == 0
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
