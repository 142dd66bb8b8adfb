"""The general instructions in data/: no known defect, and no task twice in this folder."""

from itertools import chain

from helpers.commands import ROOT

from alpaca.datagen.formats import load_records
from alpaca.datagen.lint import find_defects
from rougel import Pool, tokenize_unicode

NAMES = "general_instructions", "general_held_out"
RECORDS = {name: load_records(ROOT / f"data/{name}.jsonl") for name in NAMES}
WRITTEN = list(chain(*RECORDS.values()))


def test_general_instructions_have_no_defects():
    earlier: set = set()
    for record in WRITTEN:
        assert not find_defects([record], earlier), record
        assert 1 <= len(record["output"].split()) <= 120, record
    assert sum(record["input"] != "" for record in WRITTEN) > len(WRITTEN) / 4


def test_general_instructions_are_unlike_all_others():
    others = [load_records(ROOT / f"data/{n}.jsonl") for n in ("seed_tasks", "eval_instructions")]
    texts = [record["instruction"] for record in chain(WRITTEN, *others)]
    pool = Pool(texts, tokenize_unicode)
    for i, record in enumerate(WRITTEN):
        scores = pool.scores(record["instruction"])
        scores[i] = 0
        assert scores.max() <= 0.7, (record["instruction"], texts[scores.argmax()])
