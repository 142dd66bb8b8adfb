"""Records → prompts → ids and labels → packed rows.

A record is {"instruction": …, "input": …, "output": …}, {"messages": [{"role": …, "content": …}]}
or {"text": …}; alpaca/datagen/formats.py reads the published file formats into these.

    examples = encode_all(records, origins, tokenizer, max_length=512)
    which = step_examples(len(examples), batch=128, epochs=3, seed=0, step=0)
    for row in pack_rows(examples.lengths[which], ranks=1, row_tokens=4096)[0]:
        loss = model(**make_row(examples, which[row])._asdict())

  - Only the answer and the token that ends it have labels; the prompt is masked (-100).
  - The prompt's ids are the same with and without an answer behind them. A tokenizer would
    sometimes merge the template's last colon with the answer's first characters (`:` and `)` into
    `:)`), but decoding always starts from `:`. Such an answer is tokenized separately.
  - A step takes the next examples of a seeded shuffle, however many ranks there are. They are
    packed, uncut, into rows of about equal length: no compute is spent on padding.
"""

import hashlib
import heapq
from array import array
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from alpaca.common.errors import UserError
from alpaca.common.jinja import to_jinja
from model import IGNORE
from templates import TEMPLATES, AnswerText, Special, Template
from tokenizer import Tokenizer, answer_end


def chat_prompt(messages: list[dict], tokenizer: Tokenizer) -> list[int]:
    """The ids before the assistant's answer, in training and in decoding."""
    return encode_conversation(messages, tokenizer)[0]


def encode_prompt(instruction: str, input: str, tokenizer: Tokenizer) -> list[int]:
    """`chat_prompt` for an instruction and its input."""
    return chat_prompt(template_of(tokenizer).question(instruction, input), tokenizer)


def question_ids(record: dict, tokenizer: Tokenizer) -> list[int]:
    """The ids before a record's answer, of a conversation its last."""
    return chat_prompt(as_messages(record, tokenizer)[:-1], tokenizer)


def template_of(tokenizer: Tokenizer) -> Template:
    if tokenizer.template is None:
        unknown = f"its chat template is none of {', '.join(TEMPLATES)}"
        raise UserError(f"{tokenizer.path}: {unknown}: choose one with --template")
    return tokenizer.template


def template_in_jinja(tokenizer: Tokenizer) -> str:
    """A tokenizer's template for other software."""
    return to_jinja(template_of(tokenizer), bos=tokenizer.encode("", bos=True) != [])


# ---------------------------------------------------------------- records → ids and labels


def encode_record(record: dict, tokenizer: Tokenizer) -> tuple[list[int], list[int], int]:
    """(ids, labels, number of answers that would have merged with their prompt).

    The end of {"instruction": "Name a fruit.", "input": "", "output": "a pear"}:

        token  ▁f    r     u     it    .     <0x0A> <0x0A> ###   ▁Response :     a    ▁pear </s>
        id     277   950   962   290   963   13     13     368   554       970   948  735   2
        label  -100  -100  -100  -100  -100  -100   -100   -100  -100      -100  948  735   2

    Ids and labels are aligned; the model's loss compares the logits after each token with the label
    of the next one. So ":" learns to predict "a", and "▁pear" that the answer ends."""
    if "text" in record:
        ids = tokenizer.encode(record["text"], bos=True, eos=True)
        return ids, [IGNORE, *ids[1:]], 0
    return encode_conversation(as_messages(record, tokenizer), tokenizer)


def as_messages(record: dict, tokenizer: Tokenizer) -> list[dict]:
    if "messages" in record:
        return record["messages"]
    question = template_of(tokenizer).question(record["instruction"], record["input"])
    return [*question, {"role": "assistant", "content": record["output"]}]


def record_texts(record: dict) -> list[str]:
    if "messages" in record:
        return [message["content"] for message in record["messages"]]
    return [record[name] for name in ("text", "instruction", "input", "output") if name in record]


def encode_conversation(messages: list[dict], tokenizer: Tokenizer) -> tuple[list, list, int]:
    """`encode_record` for a conversation: each answer and the token that ends it have labels."""
    template, ids, labels, unmerged = template_of(tokenizer), [], [], 0
    for kind, group in groupby(template.parts(messages), type):
        if kind is AnswerText:
            new, prevented = tokenizer.encode_after(template.before_answer, "".join(group))
            new.append(answer_end(tokenizer))
            unmerged += prevented
        elif kind is Special:
            new = [tokenizer.special_id(name) for name in group]
        else:
            text = "".join(group)
            new = tokenizer.encode_after("", text)[0] if ids else tokenizer.encode(text)
        ids += new
        labels += new if kind is AnswerText else [IGNORE] * len(new)
    bos = tokenizer.encode("", bos=True)
    if template.bos is not None:
        bos = [tokenizer.bos_id] if template.bos and tokenizer.bos_id is not None else []
    return bos + ids, [IGNORE] * len(bos) + labels, unmerged


@dataclass(frozen=True)
class Examples:
    """Tokenized records end to end: document i is tokens starts[i] … starts[i + 1]. An example is
    one document, or with preferences two: the chosen and the rejected answer of a pair."""

    ids: np.ndarray  # int32
    labels: np.ndarray  # int32
    starts: np.ndarray  # int64
    origins: list  # where each example comes from
    report: dict[str, int]  # how many were kept, truncated, dropped, tokenized separately
    p: np.ndarray | None = None  # of each pair: how likely the chosen answer is the better one

    def __len__(self) -> int:
        return (len(self.starts) - 1) // self.documents

    @property
    def documents(self) -> int:
        """In each example."""
        return 1 if self.p is None else 2

    def documents_of(self, which: np.ndarray) -> np.ndarray:
        """The numbers of these examples' documents."""
        return (which[:, None] * self.documents + np.arange(self.documents)).flatten()

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts[:: self.documents])

    @cached_property
    def supervised(self) -> np.ndarray:
        """The number of labels that are not masked, for each example."""
        before = np.concatenate([[0], np.cumsum(self.labels != IGNORE)])
        return np.diff(before[self.starts[:: self.documents]])

    def digest(self) -> str:
        """A hash of all ids and labels."""
        arrays = (self.ids, self.labels, self.starts, *([] if self.p is None else [self.p]))
        return hashlib.sha256(b"".join(each.tobytes() for each in arrays)).hexdigest()[:16]


def encode_all(
    records: list[dict], origins: list, tokenizer: Tokenizer, max_length: int, p: list | None = None
) -> Examples:
    """Tokenize and truncate all records; one that truncation leaves without a label is dropped.

    With `p`, records 2i and 2i + 1 are the chosen and the rejected answer of pair i; only their
    last answers have labels."""
    all_ids, all_labels = array("i"), array("i")  # lists take six times as much
    starts, kept = [0], []
    report = {"kept": 0, "truncated": 0, "dropped": 0, "answers tokenized separately": 0}
    missing, documents = 0, 1 if p is None else 2
    for i in range(len(records) // documents):
        group = records[i * documents : (i + 1) * documents]
        missing += sum(tokenizer.count_missing(t) for r in group for t in record_texts(r))
        encoded = [encode_record(record, tokenizer) for record in group]
        report["truncated"] += sum(len(ids) > max_length for ids, _, _ in encoded)
        if p is not None:
            encoded = [(ids, mask_earlier_answers(labels), count) for ids, labels, count in encoded]
        if any(set(labels[:max_length]) <= {IGNORE} for _, labels, _ in encoded):
            report["dropped"] += 1
            continue
        kept.append(i)
        for ids, labels, unmerged in encoded:
            report["answers tokenized separately"] += unmerged
            all_ids.extend(ids[:max_length])
            all_labels.extend(labels[:max_length])
            starts.append(len(all_ids))
    if not kept:
        none = f"no answer is left in any of the {len(records)} records"
        raise UserError(f"after truncation to {max_length} tokens {none}: raise --max-length")
    report["kept"] = len(kept)
    report |= {"bytes without a token": missing} if missing else {}
    ids, labels = np.array(all_ids, np.int32), np.array(all_labels, np.int32)
    chances = None if p is None else np.array(p)[kept]
    kept_origins = [origins[i * documents] for i in kept]
    return Examples(ids, labels, np.array(starts), kept_origins, report, chances)


def mask_earlier_answers(labels: list[int]) -> list[int]:
    """Mask the labels of all answers in a conversation but the last."""
    end = max((i for i, label in enumerate(labels, 1) if label != IGNORE), default=0)
    start = next((i for i in range(end, 0, -1) if labels[i - 1] == IGNORE), 0)
    return [IGNORE] * start + labels[start:]


# ---------------------------------------------------------------- examples → packed rows


def total_steps(examples: int, batch: int, epochs: float) -> int:
    return -(-round(examples * epochs) // batch)


@lru_cache(maxsize=2)
def shuffle_epoch(examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(examples)


def step_examples(examples: int, batch: int, epochs: float, seed: int, step: int) -> np.ndarray:
    """The examples of a step, counted from 0: the next `batch` of one shuffle after another."""
    stop = min((step + 1) * batch, round(examples * epochs))
    epoch, position = np.divmod(np.arange(step * batch, stop), examples)
    parts = [shuffle_epoch(examples, seed, int(e))[position[epoch == e]] for e in np.unique(epoch)]
    return np.concatenate(parts)


def pack_rows(lengths: np.ndarray, ranks: int, row_tokens: int) -> list[list[list[int]]]:
    """Divide documents among ranks and rows: rank → rows → documents (indices into `lengths`).

    Longest first, each document goes to the row that is shortest so far. Row lengths then differ by
    at most about one document. Every rank gets as many rows as the others, because they reduce
    gradients together; if a row exceeds row_tokens, every rank gets more.

    >>> pack_rows(np.array([5, 3, 2, 4]), ranks=1, row_tokens=8)
    [[[0, 2], [3, 1]]]
    """
    assert lengths.max(initial=0) <= row_tokens, "no row can hold the longest document"
    longest_first = np.argsort(-lengths, kind="stable").tolist()
    sizes = lengths.tolist()
    per_rank = max(1, -(-sum(sizes) // (ranks * row_tokens)))
    while True:
        rows = [[] for _ in range(ranks * per_rank)]
        filled = [(0, row) for row in range(len(rows))]  # a heap: the shortest row comes first
        for document in longest_first:
            tokens, shortest = filled[0]
            rows[shortest].append(document)
            heapq.heapreplace(filled, (tokens + sizes[document], shortest))
        if max(filled)[0] <= row_tokens:
            return [rows[rank::ranks] for rank in range(ranks)]
        per_rank += 1 + per_rank // 64


class Row(NamedTuple):
    """The arguments of `Llama.forward`: document i is tokens cu_seqlens[i] … cu_seqlens[i + 1]."""

    ids: Tensor  # (1, T) int64
    labels: Tensor  # (1, T) int64
    cu_seqlens: Tensor  # int32, from 0 to T
    supervised: Tensor  # (N) int64: where labels are not masked


def make_row(examples: Examples, which: np.ndarray, multiple: int = 1, bounds: int = 1) -> Row:
    """The examples `which` packed into one row. So that compiled kernels see few shapes, a masked
    document pads the row to a multiple of `multiple` tokens, and empty documents pad cu_seqlens to
    a multiple of `bounds` entries.

    A row of the documents above, of 5, 3, 2 and 4 tokens. Each document's first label is masked:
    the model would predict it from the last token of the document before.

    >>> tokens = np.array([10, 11, 12, 13, 14, 20, 21, 22, 30, 31, 40, 41, 42, 43])
    >>> examples = Examples(tokens, tokens, np.array([0, 5, 8, 10, 14]), [], {})
    >>> row = make_row(examples, np.array([0, 2]))
    >>> row.ids.tolist(), row.cu_seqlens.tolist()
    ([[10, 11, 12, 13, 14, 30, 31]], [0, 5, 7])
    >>> row.labels.tolist(), row.supervised.tolist()
    ([[-100, 11, 12, 13, 14, -100, 31]], [1, 2, 3, 4, 6])
    """
    spans = [slice(*examples.starts[i : i + 2]) for i in examples.documents_of(which)]
    lengths = [span.stop - span.start for span in spans]
    # A rank left without documents still takes part in the collectives: at least one token.
    filler = -max(sum(lengths), 1) % multiple + (not spans)
    lengths += [filler] if filler else []
    padding = np.zeros(filler, np.int32)
    ids = np.concatenate([*(examples.ids[span] for span in spans), padding])
    labels = np.concatenate([*(examples.labels[span] for span in spans), padding + IGNORE])
    ends = np.concatenate([[0], np.cumsum(lengths)])
    labels[ends[:-1]] = IGNORE
    ends = np.pad(ends, (0, -len(ends) % bounds), mode="edge")
    return Row(
        torch.from_numpy(ids.astype(np.int64))[None],
        torch.from_numpy(labels.astype(np.int64))[None],
        torch.from_numpy(ends.astype(np.int32)),
        torch.from_numpy(np.flatnonzero(labels != IGNORE)),
    )
