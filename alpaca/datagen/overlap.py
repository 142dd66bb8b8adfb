"""Which training records overlap an evaluation set? Who has read the questions scores too high.

    find_twins(records, ["Why is the sky blue?"])     [Twin(record=17, item=0, "equal", 1.0), ...]

A record and an item of the set are twins if one of these holds, the first of them being reported:

    equal       their questions have the same words
    contained   the record has 70 % of the item's 8-grams, and at least 8
    similar     the ROUGE-L of their questions is above 0.7, the item having at least 8 words

Wording that more than ten different questions of the data share is a template and no overlap:
8-grams of it do not count (as in GPT-3, arXiv:2005.14165), and without its runs of three words the
ROUGE-L must still be above 0.7. So "Name the capital of Peru" is no twin of "Name the capital of
Chad" where capitals are asked for often. 70 % is PaLM's share (2204.02311). Words are compared
without case and punctuation, in any script; signs such as + are punctuation here. Of a
conversation, all that the user says is the question, and so is each message. What these rules
cannot find: translations, paraphrases, and a question of fewer than 15 words in a long text.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from rougel import Pool, tokenize_unicode

GRAM, RUN = 8, 3  # words
MAX_SHARED = 10  # wording that more questions share is a template
LEAST, SHARE = 8, 0.7  # of an item's 8-grams
SIMILAR = 0.7  # ROUGE-L, as where Self-Instruct drops an instruction


class Twin(NamedTuple):
    record: int  # index
    item: int
    kind: str  # equal, contained or similar
    score: float  # the share of 8-grams, or ROUGE-L


def questions_of(record: dict) -> list[str]:
    """What a normalized record asks; of a conversation first the whole, then each message."""
    if "messages" in record:
        asked = [turn["content"] for turn in record["messages"] if turn["role"] == "user"]
        return asked if len(asked) == 1 else ["\n\n".join(asked), *asked]
    if "text" in record:
        return [record["text"]]
    return ["\n\n".join(filter(None, (record["instruction"], record["input"])))]


def grams(words: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(n)), strict=False)


def find_twins(records: Sequence[dict], items: Sequence[str], rouge: bool = True) -> list[Twin]:
    """The twins among normalized records and the items' questions, by record and item. Without
    `rouge`, those that are equal or contained: that costs less than encoding the records."""
    wanted = [tokenize_unicode(item) for item in items]
    asked, holders = index_records(records, {gram for w in wanted for gram in grams(w, GRAM)})
    twins: dict[tuple[int, int], Twin] = {}

    def add(record: int, *found) -> None:
        twins.setdefault((record, found[0]), Twin(record, *found))

    for j, words in enumerate(wanted):
        for i in asked.get(" ".join(words), ()) if words else ():
            add(i, j, "equal", 1.0)
        own = [gram for gram in set(grams(words, GRAM)) if gram not in holders or holders[gram]]
        hits = Counter(i for gram in own for i in holders.get(gram, ()))
        for i, count in hits.items():
            if count >= max(LEAST, SHARE * len(own)):
                add(i, j, "contained", count / len(own))
    for question, j, score in similar_questions(list(asked), wanted) if rouge else ():
        for i in asked[question]:
            add(i, j, "similar", score)
    return [twins[pair] for pair in sorted(twins)]


def index_records(
    records: Sequence[dict], wanted: set[tuple[str, ...]]
) -> tuple[dict[str, list[int]], dict[tuple[str, ...], list[int]]]:
    """The words of each question → the records that ask it; each 8-gram that is wanted → the
    records with it, or none if it belongs to a template."""
    asked, holders = defaultdict(list), defaultdict(list)
    first = []  # record → the first record with its question
    for i, record in enumerate(records):
        questions = [tokenize_unicode(text) for text in questions_of(record)]
        for words in questions:
            asked[" ".join(words)].append(i)
        first.append(asked[" ".join(questions[0])][0])
        turns = (turn["content"] for turn in record.get("messages", ()) if turn["role"] != "user")
        answers = tokenize_unicode("\n\n".join(turns) or record.get("output", ""))
        for gram in wanted.intersection(grams(questions[0] + answers, GRAM)):
            holders[gram].append(i)
    for which in holders.values():
        if len({first[i] for i in which}) > MAX_SHARED:
            which.clear()
    return asked, holders


def similar_questions(
    questions: list[str], items: list[list[str]]
) -> Iterator[tuple[str, int, float]]:
    """(question, index of an item, ROUGE-L) where that is above SIMILAR, without templates too."""
    wanted = {run for words in items for run in grams(words, RUN)}
    found = (wanted.intersection(grams(question.split(), RUN)) for question in questions)
    templates = {run for run, n in Counter(chain.from_iterable(found)).items() if n > MAX_SHARED}

    def without_templates(words: list[str]) -> str:
        starts = [i for i, run in enumerate(grams(words, RUN)) if run in templates]
        shared = {i + k for i in starts for k in range(RUN)}
        return " ".join(word for i, word in enumerate(words) if i not in shared)

    whole = Pool(questions, str.split)
    own = Pool((without_templates(q.split()) for q in questions), str.split)
    for j, words in enumerate(items):
        if len(words) < GRAM:
            continue
        scores = whole.scores(" ".join(words))
        alike = np.minimum(scores, own.scores(without_templates(words))) > SIMILAR
        yield from ((questions[k], j, float(scores[k])) for k in np.flatnonzero(alike))
