"""Byte-level BPE in Python against Hugging Face's library in Rust, on one thread.

    python -m bench.bpe [--tokenizer FOLDER] [--records 50000] [--runs 5]

One side encodes with bpe.py, the other with `tokenizers`, text by text, and the ids must be equal.
"distinct records" is one pass over texts made of 100,000 words with the frequencies of Zipf's law,
beginning with an empty cache; "seen before" is the first of them once more. Without --tokenizer, a
small one of Llama 3's kind is trained on the corpus in data/.
"""

import os
import random
import tempfile
import time
from itertools import accumulate
from pathlib import Path

from bench.measure import ROOT, bench_parser, report, run_in_turns

WORDS, AGAIN = 100_000, 2000


def made_up_texts(count: int) -> list[str]:
    """Texts of about 60 words, as long as an instruction of Alpaca's with its answer."""
    rng = random.Random(0)
    parts = [a + b for a in [*"bcdfgklmnprst", "st", "tr", "ch"] for b in "aeiou"]
    words = list(dict.fromkeys((ROOT / "data/corpus.txt").read_text().split()))
    while len(words) < WORDS:
        word = "".join(rng.choices(parts, k=rng.randint(2, 4))) + rng.choice(["", "n", "s", "r"])
        words.append(word.capitalize() if rng.random() < 0.1 else word)
    total = list(accumulate(1 / (rank + 3) for rank in range(WORDS)))
    ends = [".", ",", "?", ":", "\n", " –", "’s", " 12", "\n\n"]

    def sentence() -> str:
        return " ".join(rng.choices(words, cum_weights=total, k=12)) + rng.choice(ends)

    return [" ".join(sentence() for _ in range(rng.randint(2, 8))) for _ in range(count)]


def train(folder: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    from bpe import LLAMA3_WORDS

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(ROOT / "data/corpus.txt")], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')


def main() -> None:
    parser = bench_parser(__doc__, runs=True)
    parser.add_argument("--tokenizer", type=Path, help="a folder with a tokenizer.json")
    parser.add_argument("--records", type=int, default=50_000)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    from alpaca.common.tokenizer_json import read_tokenizer_json

    with tempfile.TemporaryDirectory() as trained:
        folder = args.tokenizer or Path(trained)
        if not args.tokenizer:
            train(folder)
        texts, file = made_up_texts(args.records), folder / "tokenizer.json"
        ours, peer = read_tokenizer_json(file), Tokenizer.from_file(str(file))
        peer.encode_special_tokens = True

        def encode_ours(text: str) -> list[int]:
            return ours.encode(text)

        def encode_peer(text: str) -> list[int]:
            return peer.encode(text, add_special_tokens=False).ids

        def timed(encode, forget) -> dict:
            forget()
            seconds = {}
            for name, part in (("distinct records", texts), ("seen before", texts[:AGAIN])):
                start = time.perf_counter()
                tokens = sum(len(encode(text)) for text in part)
                seconds[name] = tokens / (time.perf_counter() - start)
            return seconds

        assert all(encode_ours(text) == encode_peer(text) for text in texts[:AGAIN])
        forget_peer = getattr(peer.model, "_clear_cache", lambda: None)
        sides = {
            "ours": lambda: timed(encode_ours, ours.words.clear),
            "peer": lambda: timed(encode_peer, forget_peer),
        }
        figures = run_in_turns(sides, args.runs, warm_up=0)
    title = f"Byte-level BPE, vocabulary of {ours.vocab_size:,}: {args.records:,} records, tokens/s"
    lines = [
        (name, figures["ours"][name], figures["peer"][name], True)
        for name in ("distinct records", "seen before")
    ]
    report(title, "`tokenizers`", lines, ["tokenizers"])


if __name__ == "__main__":
    main()
