"""Records → prompts → ids and labels → packed rows.

    {"instruction": "Name a colour.", "input": "", "output": "Red"}          Alpaca's form
    {"instruction": …, "instances": [{"input": …, "output": …}]}             self-instruct's seeds
    {"conversations": [{"from": "human", "value": …}, {"from": "gpt", …}]}   ShareGPT's, Vicuna's
    {"text": "Once upon a time"}                                             plain text

in a JSON list or a JSONL file. Worth knowing:

  - Alpaca's two prompt templates stand here and nowhere else. The answer follows `### Response:`
    without a space or a newline, as in Alpaca's training, so it must in decoding too.
  - The model learns from the answer and the EOS after it; labels of the prompt are IGNORE.
  - The prompt's ids are a true prefix of the example's. SentencePiece would sometimes merge the
    template's colon with the answer's first characters (`:` and `)` make `:)`), a prompt that
    decoding never sees; then the answer is tokenised as if it followed a newline.
  - The examples of a step are the next ones of a seeded shuffle, however many ranks there are. They
    are packed, whole, into rows of about equal length: no token is spent on padding.

Self-Instruct arXiv:2212.10560; Alpaca: crfm.stanford.edu/2023/03/13/alpaca.html.

Shown by tests/test_dataset.py: test_packing_changes_no_loss.
"""

import hashlib
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from alpaca.common.errors import UserError
from model import IGNORE
from tokenizer import Tokenizer

PREAMBLE = {  # does an input come with the instruction?
    True: "Below is an instruction that describes a task, paired with an input that provides "
    "further context. Write a response that appropriately completes the request.",
    False: "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.",
}
RESPONSE = "### Response:"


def format_prompt(instruction: str, input: str = "") -> str:
    """Alpaca's prompt, character for character."""
    given = f"\n\n### Input:\n{input}" if input else ""
    return f"{PREAMBLE[bool(input)]}\n\n### Instruction:\n{instruction}{given}\n\n{RESPONSE}"


# ---------------------------------------------------------------- records → ids and labels


def encode_example(record: dict, tokenizer: Tokenizer, max_length: int) -> tuple[list, list]:
    """(ids, labels), cut to max_length: BOS, prompt, answer, EOS; labels of the prompt IGNORE."""
    ids, labels, _ = encode_record(record, tokenizer)
    return ids[:max_length], labels[:max_length]


def encode_chat(messages: list[dict], tokenizer: Tokenizer, max_length: int) -> tuple[list, list]:
    """The same of a conversation, every turn of which the assistant learns with its EOS."""
    return encode_example({"messages": messages}, tokenizer, max_length)


def encode_record(record: dict, tokenizer: Tokenizer) -> tuple[list[int], list[int], int]:
    """(ids, labels) in full, and how many answers had to be kept from merging with their prompt."""
    if "text" in record:
        ids = tokenizer.encode(record["text"], bos=True, eos=True)
        return ids, [IGNORE, *ids[1:]], 0
    if "messages" in record:
        return encode_conversation(record["messages"], tokenizer)
    asked = tokenizer.encode(format_prompt(record["instruction"], record["input"]), bos=True)
    answer, unmerged = encode_answer(record["output"], tokenizer)
    return asked + answer, [IGNORE] * len(asked) + answer, unmerged


def encode_answer(output: str, tokenizer: Tokenizer) -> tuple[list[int], bool]:
    """The ids of an answer after `### Response:`, EOS last, and whether a merge was undone.

    No piece reaches across a newline, so the template's last line alone tells how it goes on."""
    marker = encode_after_newline(RESPONSE, tokenizer)
    ids = encode_after_newline(RESPONSE + output, tokenizer)
    if ids[: len(marker)] == marker:
        return [*ids[len(marker) :], tokenizer.eos_id], False
    return [*encode_after_newline(output, tokenizer), tokenizer.eos_id], True


def encode_after_newline(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of text that goes on after a newline, without the space SentencePiece puts before all."""
    ids = tokenizer.encode("\n" + text)
    if ids[: len(tokenizer.newline_ids)] != tokenizer.newline_ids:
        raise UserError(
            f"{tokenizer.path} has pieces that reach across a newline: the prompt's ids would "
            "depend on the answer. LLaMA's tokenizer has none"
        )
    return ids[len(tokenizer.newline_ids) :]


def encode_conversation(
    messages: list[dict], tokenizer: Tokenizer
) -> tuple[list[int], list[int], int]:
    """A conversation; every turn of the assistant is learned, with its EOS."""
    ids, labels, unmerged = [], [], 0
    preamble = PREAMBLE[False]
    if messages[0]["role"] == "system":
        preamble, messages = messages[0]["content"], messages[1:]
    for message in messages:
        if message["role"] == "assistant":
            new, undone = encode_answer(message["content"], tokenizer)
            labels += new
            unmerged += undone
        else:
            asked = f"\n\n### Instruction:\n{message['content']}\n\n{RESPONSE}"
            if ids:
                new = tokenizer.newline_ids[-1:] + encode_after_newline(asked[1:], tokenizer)
            else:
                new = tokenizer.encode(preamble + asked, bos=True)
            labels += [IGNORE] * len(new)
        ids += new
    return ids, labels, unmerged


def chat_prompt(messages: list[dict], tokenizer: Tokenizer) -> list[int]:
    """The ids after which the assistant speaks. A single user message gives `prompt()`'s."""
    return encode_conversation(messages, tokenizer)[0]


class Examples(NamedTuple):
    """Tokenised records end to end in two arrays; example i is tokens starts[i] … starts[i + 1]."""

    ids: np.ndarray  # int32
    labels: np.ndarray  # int32
    starts: np.ndarray  # int64
    origins: list[str]  # where each comes from, for a person
    report: dict[str, int]  # how many were kept, truncated, dropped, kept from merging

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    @property
    def supervised(self) -> np.ndarray:
        """Labels learned from, example by example."""
        learned = np.concatenate([[0], np.cumsum(self.labels != IGNORE)])
        return np.diff(learned[self.starts])

    def digest(self) -> str:
        """Tells one training set from another."""
        parts = (self.ids.tobytes(), self.labels.tobytes(), self.starts.tobytes())
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def encode_all(
    records: list[dict], origins: list[str], tokenizer: Tokenizer, max_length: int
) -> Examples:
    """Tokenise everything; what truncation leaves without anything to learn is dropped."""
    ids, labels, starts, kept = [], [], [0], []
    report = {"kept": 0, "truncated": 0, "dropped": 0, "merges undone": 0}
    for record, origin in zip(records, origins, strict=True):
        some_ids, some_labels, unmerged = encode_record(record, tokenizer)
        report["truncated"] += len(some_ids) > max_length
        if all(label == IGNORE for label in some_labels[:max_length]):
            report["dropped"] += 1
            continue
        report["merges undone"] += unmerged
        ids += some_ids[:max_length]
        labels += some_labels[:max_length]
        starts.append(len(ids))
        kept.append(origin)
    report["kept"] = len(kept)
    if not kept:
        raise UserError(
            f"after truncation to {max_length} tokens no answer is left in any of the "
            f"{len(records)} records: raise --max-length"
        )
    return Examples(
        np.array(ids, np.int32), np.array(labels, np.int32), np.array(starts), kept, report
    )


# ---------------------------------------------------------------- examples → packed rows


def total_steps(examples: int, batch: int, epochs: float) -> int:
    return -(-round(examples * epochs) // batch)


@lru_cache(maxsize=2)
def shuffle_epoch(examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(examples)


def step_examples(examples: int, batch: int, epochs: float, seed: int, step: int) -> np.ndarray:
    """The examples of a step, counted from 0: the next `batch` of one shuffle after another."""
    stop = min((step + 1) * batch, round(examples * epochs))
    wanted = np.arange(step * batch, stop)
    epochs_of = wanted // examples
    parts = [
        shuffle_epoch(examples, seed, int(epoch))[wanted[epochs_of == epoch] % examples]
        for epoch in np.unique(epochs_of)
    ]
    return np.concatenate(parts)


def pack_rows(lengths: np.ndarray, ranks: int, row_tokens: int) -> list[list[list[int]]]:
    """Divide documents among ranks and rows: rank → rows → documents (indices into `lengths`).

    Every rank gets as many rows as the others, for they reduce gradients together. Longest first,
    each document goes to the row that is shortest so far, which levels them to about a document's
    length; if one comes out above row_tokens, everybody gets a row more."""
    assert lengths.max(initial=0) <= row_tokens, "no row can hold the longest document"
    longest_first = np.argsort(-lengths, kind="stable")
    per_rank = max(1, -(-int(lengths.sum()) // (ranks * row_tokens)))
    while True:
        rows, filled = [[] for _ in range(ranks * per_rank)], np.zeros(ranks * per_rank, int)
        for document in longest_first:
            shortest = int(filled.argmin())
            rows[shortest].append(int(document))
            filled[shortest] += lengths[document]
        if filled.max() <= row_tokens:
            return [rows[rank::ranks] for rank in range(ranks)]
        per_rank += 1


class Row(NamedTuple):
    ids: Tensor  # (1, T) int64
    labels: Tensor  # (1, T) int64
    cu_seqlens: Tensor  # int32, 0 … T


def make_row(examples: Examples, which: np.ndarray, multiple: int, bounds: int) -> Row:
    """The examples `which` as one packed row. For kernels that are compiled for a shape it is
    filled up to a multiple of `multiple` tokens, with a document nothing is learned from, and
    cu_seqlens to `bounds` entries (0: as many as there are documents)."""
    spans = [slice(examples.starts[i], examples.starts[i + 1]) for i in which]
    lengths = [span.stop - span.start for span in spans]
    # A rank left without documents still takes part in the collectives: one token at least.
    fill = -max(sum(lengths), 1) % multiple + (not spans)
    lengths += [fill] if fill else []
    padding = np.full(fill, IGNORE, np.int32)
    ids = np.concatenate([*(examples.ids[span] for span in spans), np.zeros_like(padding)])
    labels = np.concatenate([*(examples.labels[span] for span in spans), padding])
    ends = np.concatenate([[0], np.cumsum(lengths)])
    ends = np.pad(ends, (0, max(0, bounds - len(ends))), mode="edge")
    return Row(
        torch.from_numpy(ids.astype(np.int64))[None],
        torch.from_numpy(labels.astype(np.int64))[None],
        torch.from_numpy(ends.astype(np.int32)),
    )
