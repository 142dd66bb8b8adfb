"""Tokenizing a training set: records a second, against Hugging Face's tokenizer.

    python -m bench.encode [--tokenizer tokenizer.model] [--data records.json] [--runs 5]

Ours is `encode_all`: prompt and answer of every record, labels, truncation, and the check that no
token spans the border between prompt and answer. The peer does what Alpaca's train.py does: every
prompt and every whole text goes through the (fast, Rust) tokenizer, one by one. Both use one
thread; reading the file does not count.
"""

import os
import tempfile
import time
from pathlib import Path

from alpaca.datagen.formats import load_records
from alpaca.weights.writer import copy_tokenizer
from bench.measure import ROOT, bench_parser, report, run_in_turns
from dataset import encode_all
from templates import format_prompt
from tokenizer import load_tokenizer

MAX_LENGTH = 512


def main() -> None:
    parser = bench_parser(__doc__, runs=True)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "data/tokenizer.model")
    parser.add_argument("--data", type=Path, default=ROOT / "data/sample_train.json")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    records, ours = load_records(args.data), load_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        copy_tokenizer(args.tokenizer, Path(folder))
        peer = AutoTokenizer.from_pretrained(folder)

    def encode_ours() -> None:
        encode_all(records, [""] * len(records), ours, MAX_LENGTH)

    def encode_peer() -> None:
        for record in records:
            prompt = format_prompt(record["instruction"], record["input"])
            length = len(peer(prompt, truncation=True, max_length=MAX_LENGTH).input_ids)
            text = prompt + record["output"] + "</s>"
            ids = peer(text, truncation=True, max_length=MAX_LENGTH).input_ids
            _ = [-100] * length + ids[length:]

    def timed(encode) -> dict:
        start = time.perf_counter()
        encode()
        return {"rate": len(records) / (time.perf_counter() - start)}

    sides = {"ours": lambda: timed(encode_ours), "peer": lambda: timed(encode_peer)}
    a, b = run_in_turns(sides, args.runs).values()
    title = f"Tokenize {len(records):,} records, vocabulary of {ours.vocab_size:,}"
    lines = [("records/s", a["rate"], b["rate"], True)]
    report(title, "transformers", lines, ["sentencepiece", "transformers", "tokenizers"])


if __name__ == "__main__":
    main()
