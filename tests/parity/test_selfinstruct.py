"""The similarities in the records are rouge_score's, with the seeds and all records before."""

import pytest
from helpers.generation import SEEDS, arguments, read
from helpers.teacher_server import Server

import selfinstruct
from alpaca.common.json_files import read_log
from rougel import tokenize

reason = "the package rouge_score is not installed"
rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason=reason)


def test_similarities_are_rouge_score_s(tmp_path, command):
    with Server() as server:
        assert command(selfinstruct, *arguments(tmp_path / "r", server, 200))[0] == 0
    records = read(tmp_path / "r", "records")
    texts = [line["instruction"] for line in (*read_log(SEEDS), *records)]
    for place, record in [*enumerate(records, 175)][::6]:
        pool = texts[:place]
        scores = [
            rouge_scorer._score_lcs(tokenize(record["instruction"]), tokenize(text)).fmeasure
            for text in pool
        ]
        assert max(scores) <= 0.7
        assert record["avg_similarity_score"] == pytest.approx(sum(scores) / len(scores), abs=1e-12)
        nearest = record["most_similar_instructions"]
        assert sorted(nearest.values()) == sorted(scores)[-10:]
        assert all(scores[pool.index(text)] == score for text, score in nearest.items())
