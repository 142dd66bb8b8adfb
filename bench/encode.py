"""Tokenising a training set: records a second, against Hugging Face's tokenizer.

    python bench/encode.py [--tokenizer tokenizer.model] [--data records.json] [--runs 5]

Ours is `encode_all`: prompt and answer of every record, labels, truncation, the prompt checked to
be a prefix. Theirs is what Alpaca's train.py does: every prompt and every whole text through the
(fast, Rust) tokenizer, one by one. One thread each; reading the file does not count.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from alpaca.datagen.formats import load_records  # noqa: E402
from alpaca.weights.writer import copy_tokenizer  # noqa: E402
from bench.measure import alternate, row, table  # noqa: E402
from dataset import encode_all, format_prompt  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "data/tokenizer.model")
    parser.add_argument("--data", type=Path, default=ROOT / "data/sample_train.json")
    parser.add_argument("--runs", type=int, default=5, help="of each side (default: 5)")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    records, ours = load_records(args.data), Tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        copy_tokenizer(args.tokenizer, Path(folder))
        theirs = AutoTokenizer.from_pretrained(folder)

    def timed(work) -> dict:
        start = time.perf_counter()
        work()
        return {"rate": len(records) / (time.perf_counter() - start)}

    def alpaca() -> None:
        for record in records:
            asked = format_prompt(record["instruction"], record["input"])
            length = len(theirs(asked, truncation=True, max_length=512).input_ids)
            ids = theirs(asked + record["output"] + "</s>", truncation=True, max_length=512)
            _ = [-100] * length + ids.input_ids[length:]

    sides = {
        "ours": lambda: timed(lambda: encode_all(records, [""] * len(records), ours, 512)),
        "theirs": lambda: timed(alpaca),
    }
    found = alternate(sides, args.runs)
    rates = row("records/s", found["ours"]["rate"], found["theirs"]["rate"], more_is_better=True)
    title = f"Tokenise {len(records)} records, {ours.vocab_size} pieces"
    print(table(title, "transformers", [rates], ["sentencepiece", "transformers", "tokenizers"]))


if __name__ == "__main__":
    main()
