"""What quantizing the weights costs in quality, for the model that `make train` makes.

    python -m bench.quantize [--model-dir runs/tiny/model]

On the 240 held-out records: the perplexity of the expected answers; how often the likeliest next
token is the one of the bf16 weights, given the expected answer so far; how many greedy answers are
the expected ones, and how many are those of bf16. A model of 1.07M parameters is a hard case: large
ones lose less.
"""

import math
from pathlib import Path

import torch

from alpaca.datagen.formats import load_records
from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams
from alpaca.weights.loading import load_model, optimize_layout
from alpaca.weights.quantize import WeightSource
from alpaca.weights.writer import tensor_bytes
from bench.measure import ROOT, bench_parser, stamp, store
from dataset import encode_prompt, encode_record
from model import IGNORE
from tokenizer import load_tokenizer

BITS = {"bf16": 16, "int8, head int8": 8, "int4, head int8": 4}
HEAD = "| weights | MB | perplexity | next token as bf16's | answers as expected | as bf16's |"


@torch.no_grad()
def evaluate(model, examples: list[tuple[list[int], list[int]]]) -> tuple[float, list[int]]:
    """Perplexity of the labels, and the likeliest token for each of them."""
    loss, likeliest = 0.0, []
    for ids, labels in examples:
        logits = model(torch.tensor([ids]))[0, :-1].float()
        targets = torch.tensor(labels[1:])
        supervised = targets != IGNORE
        loss -= logits.log_softmax(-1)[supervised, targets[supervised]].sum().item()
        likeliest += logits[supervised].argmax(-1).tolist()
    return math.exp(loss / len(likeliest)), likeliest


def count_equal(a: list, b: list) -> int:
    return sum(x == y for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--model-dir", type=Path, default=ROOT / "runs/tiny/model")
    folder = parser.parse_args().model_dir
    if not folder.exists():
        raise SystemExit(f"no model at {folder}: `make train` makes it")
    records, tokenizer = load_records(ROOT / "data/sample_heldout.json"), load_tokenizer(folder)
    examples = [encode_record(record, tokenizer)[:2] for record in records]
    prompts = [encode_prompt(r["instruction"], r["input"], tokenizer) for r in records]
    expected = [record["output"].strip() for record in records]
    title = f"### Quantized weights, the model of `make train`, {len(records)} held-out records"
    lines = [title, "", HEAD, "|---|---|---|---|---|---|"]
    reference = None
    for name, bits in BITS.items():
        model = optimize_layout(load_model(folder, bits=bits, dtype=torch.bfloat16))
        size = sum(tensor_bytes(WeightSource(folder, bits).file_shapes()).values())
        perplexity, likeliest = evaluate(model, examples)
        answers = Engine(model, tokenizer, 16).generate(prompts, SamplingParams(max_new_tokens=40))
        texts = [answer.text.strip() for answer in answers]
        reference = reference or (likeliest, texts)
        same_token = count_equal(likeliest, reference[0]) / len(likeliest)
        lines.append(
            f"| {name} | {size / 1e6:.2f} | {perplexity:.4f} | {same_token:.2%} "
            f"| {count_equal(texts, expected)} | {count_equal(texts, reference[1])} |"
        )
    store("\n".join([*lines, "", stamp(["torch"]), ""]))


if __name__ == "__main__":
    main()
