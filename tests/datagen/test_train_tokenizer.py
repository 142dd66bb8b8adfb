"""Training a tokenizer: the same bytes every time, and errors in one line."""

import shutil

from helpers.commands import ROOT, assert_refused


def test_train_tokenizer_reproduces_the_embedded_model_bytewise(tmp_path, command):
    corpus, out = ROOT / "data/corpus.txt", tmp_path / "again.model"
    code, printed, _ = command("train-tokenizer", corpus, "--vocab-size", 1024, "--out", out)
    assert code == 0 and printed == f"{out}: 1024 tokens\n"
    assert out.read_bytes() == (ROOT / "data/tokenizer.model").read_bytes()


def test_train_tokenizer_refuses_in_one_line_and_writes_nothing(tmp_path, command):
    corpus, out = tmp_path / "corpus.txt", tmp_path / "out.model"
    shutil.copy(ROOT / "data/corpus.txt", corpus)

    def refuse(file, out, *words, size=1024):
        assert_refused(command("train-tokenizer", file, "--vocab-size", size, "--out", out), *words)

    refuse(corpus, out, "Vocabulary size too high", size=100000)
    too_small = "Vocabulary size is smaller than the characters used. 300 vs"
    refuse(corpus, out, too_small, size=300)
    refuse(corpus, out, "--vocab-size 259: 259 entries are fixed", size=259)
    refuse(tmp_path / "absent.txt", out, "absent.txt: No such file")
    for target in (tmp_path, tmp_path / "absent" / "t.model"):
        refuse(corpus, target, "a file name in an existing folder was expected")
    refuse(corpus, corpus, "is an input of this command")
    corpus.write_bytes(b" \n\n")
    refuse(corpus, out, "no text in")
    corpus.write_bytes(b"caf\xe9\n")
    refuse(corpus, out, "corpus.txt, line 1: not UTF-8")
    assert [entry.name for entry in tmp_path.iterdir()] == ["corpus.txt"]
