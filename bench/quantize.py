"""What rounding weights costs in quality, on the model that `make train` has made.

    python bench/quantize.py [--model-dir runs/tiny/model]

The 240 held-out records: perplexity of the expected answers; how often the likeliest next token is
the one that bf16 weights choose, given the expected answer so far; how many answers, decoded
greedily, are as expected, and how many are bf16's. A model of 1.07M parameters is a hard case:
large ones lose less.
"""

import argparse
import math
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from alpaca.datagen.formats import load_records  # noqa: E402
from alpaca.inference.engine import Engine  # noqa: E402
from alpaca.inference.sampling import SamplingParams  # noqa: E402
from alpaca.weights.loading import load_model, optimize_layout  # noqa: E402
from alpaca.weights.quantize import WeightSource  # noqa: E402
from alpaca.weights.writer import tensor_bytes  # noqa: E402
from dataset import encode_record, format_prompt  # noqa: E402
from model import IGNORE  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

BITS = {"bf16": 16, "int8, head int8": 8, "int4, head int8": 4}


@torch.no_grad()
def judged(model, examples: list[tuple[list[int], list[int]]]) -> tuple[float, list[int]]:
    """Perplexity of the labels, and the likeliest token at each of them."""
    loss, likeliest = 0.0, []
    for ids, labels in examples:
        logits = model(torch.tensor([ids]))[0, :-1].float()
        targets = torch.tensor(labels[1:])
        learned = targets != IGNORE
        loss -= logits.log_softmax(-1)[learned, targets[learned]].sum().item()
        likeliest += logits[learned].argmax(-1).tolist()
    return math.exp(loss / len(likeliest)), likeliest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-dir", type=Path, default=ROOT / "runs/tiny/model")
    folder = parser.parse_args().model_dir
    if not folder.exists():
        raise SystemExit(f"no model at {folder}: `make train` makes it")
    records, tokenizer = load_records(ROOT / "data/sample_heldout.json"), Tokenizer(folder)
    examples = [encode_record(record, tokenizer)[:2] for record in records]
    prompts = [
        tokenizer.encode(format_prompt(record["instruction"], record["input"]), bos=True)
        for record in records
    ]
    print("### Rounded weights, the model of `make train`, 240 held-out records\n")
    print("| weights | MB | perplexity | next token as bf16's | answers as expected | as bf16's |")
    print("|---|---|---|---|---|---|")
    first = None
    for name, bits in BITS.items():
        model = optimize_layout(load_model(folder, bits=bits, dtype=torch.bfloat16))
        size = sum(tensor_bytes(WeightSource(folder, bits).file_shapes()).values())
        perplexity, likeliest = judged(model, examples)
        answers = Engine(model, tokenizer, 16).generate(prompts, SamplingParams(max_new_tokens=40))
        texts = [answer.text.strip() for answer in answers]
        first = first or (likeliest, texts)
        same = sum(a == b for a, b in zip(likeliest, first[0], strict=True)) / len(likeliest)
        right = sum(t == r["output"].strip() for t, r in zip(texts, records, strict=True))
        alike = sum(a == b for a, b in zip(texts, first[1], strict=True))
        print(f"| {name} | {size / 1e6:.2f} | {perplexity:.4f} | {same:.2%} | {right} | {alike} |")
    print(f"\n{time.strftime('%Y-%m-%d')}; torch {version('torch')}\n")


if __name__ == "__main__":
    main()
