"""Token ids against Hugging Face's."""

import pytest
from helpers.commands import ROOT
from helpers.models import TOKENIZERS
from helpers.parity import apart

from alpaca.weights.writer import copy_tokenizer
from tokenizer import load_tokenizer


@pytest.mark.parametrize("path", TOKENIZERS)
def test_ids_equal_hugging_face_where_it_equals_sentencepiece(tmp_path, path):
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    copy_tokenizer(tokenizer.path, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    corpus = (ROOT / "data" / "corpus.txt").read_text().splitlines()
    for line in [*corpus, "中文 🦙 é 12 34", "x=1;\ty=2", "tab\tand\nnewline"]:
        differ = theirs(line).input_ids != tokenizer.encode(line, bos=True)
        apart("lines whose ids differ: transformers' tokenizer", differ, 0)
        assert theirs.decode(theirs(line).input_ids, skip_special_tokens=True) == line
