"""A 7B model in int4 on a machine with 8 GB: does it load, and how fast does it answer?

    python -m bench.laptop [--model-dir FOLDER]

Writes a random LLaMA-7B in bf16 (13.5 GB), loads it rounded to 4 bits and decodes 32 tokens after a
prompt of 64. The figure to compare with 8 GB is the process's own (anonymous) memory; the system
can drop pages of the mapped files at any time.
"""

import statistics
import tempfile
import time
from pathlib import Path

from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams
from alpaca.weights.loading import load_model, optimize_layout
from bench.decode import NoTokenizer, random_prompts
from bench.measure import PeakMemory, bench_parser, memory, stamp
from bench.models import write_random

NEW = 32


def main() -> None:
    parser = bench_parser(__doc__)
    help = "where the model is, or is written (default: a temporary folder)"
    parser.add_argument("--model-dir", type=Path, help=help)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model_dir or Path(scratch) / "7B"
        if not folder.exists():
            write_random(folder, "7B")
        with PeakMemory() as peak:
            start = time.perf_counter()
            model = optimize_layout(load_model(folder, bits=4))
            loaded = time.perf_counter() - start
            engine = Engine(model, NoTokenizer(), 1, 512)
            engine.guess = lambda: []  # as in bench/decode.py
            (prompt,) = random_prompts(1)
            sequence, seconds = engine.add(prompt, SamplingParams(max_new_tokens=NEW)), []
            while sequence.finish_reason is None:
                start = time.perf_counter()
                engine.step()
                seconds.append(time.perf_counter() - start)
    resident = sum(memory().values()) / 1e9
    print("### LLaMA-7B in int4 on a CPU (head in int8, embedding in bf16)\n")
    print("| measured | |\n|---|---|")
    print(f"| reading and rounding, s | {loaded:.0f} |")
    print(f"| peak anonymous memory, GB | {peak.anonymous / 1e9:.2f} |")
    print(f"| memory and mapped pages while it answers, GB | {resident:.2f} |")
    print(f"| prompt of {len(prompt)} tokens, s | {seconds[0]:.2f} |")
    print(f"| decoding, tokens/s | {1 / statistics.median(seconds[1:]):.1f} |")
    print(f"\n{stamp(['torch'])}\n")


if __name__ == "__main__":
    main()
