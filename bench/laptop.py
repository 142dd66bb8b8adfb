"""A 7B model in int4 on a machine with 8 GB: does it load, how fast does it answer?

    python bench/laptop.py [--keep FOLDER]

Writes a random LLaMA-7B in bf16 (13.5 GB, to a temporary folder, a tensor at a time), loads it with
`--bits 4` and decodes 32 tokens after a prompt of 64. Memory is this process's own (anonymous); the
pages of the mapped files are the system's to drop.
"""

import argparse
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from alpaca.inference.engine import Engine  # noqa: E402
from alpaca.inference.sampling import SamplingParams  # noqa: E402
from alpaca.weights.checkpoint import parameter_shapes  # noqa: E402
from alpaca.weights.loading import load_model, optimize_layout  # noqa: E402
from alpaca.weights.writer import save_model  # noqa: E402
from bench.decode import NoTokenizer, random_prompts  # noqa: E402
from bench.measure import PeakMemory, memory  # noqa: E402
from model import LlamaConfig  # noqa: E402

NEW = 32


def write(folder: Path) -> None:
    config = LlamaConfig.preset("7B")
    noise = 0.02 * torch.randn(1 << 24, dtype=torch.bfloat16)

    def tensors():
        for name, shape in parameter_shapes(config).items():
            if len(shape) == 1:
                yield name, torch.ones(shape, dtype=torch.bfloat16)
            else:
                copies = -(-shape.numel() // len(noise))
                yield name, noise.repeat(copies)[: shape.numel()].view(shape)

    save_model(tensors(), config, folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=Path, help="write the model there, or find it there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch) / "7B"
        if not folder.exists():
            write(folder)
        with PeakMemory() as peak:
            start = time.perf_counter()
            model = optimize_layout(load_model(folder, bits=4))
            loaded = time.perf_counter() - start
            engine = Engine(model, NoTokenizer(), 1, 512)
            (prompt,) = random_prompts(1)
            sequence, times = engine.add(prompt, SamplingParams(max_new_tokens=NEW)), []
            while sequence.finish_reason is None:
                start = time.perf_counter()
                engine.step()
                times.append(time.perf_counter() - start)
    held = (memory()["RssAnon"] + memory()["RssFile"]) / 1e9
    print("### LLaMA-7B in int4 on a CPU (head int8, embeddings bf16)\n")
    print("| what | |\n|---|---|")
    print(f"| read and rounded, s | {loaded:.0f} |")
    print(f"| peak anonymous memory, GB | {peak.anonymous / 1e9:.2f} |")
    print(f"| in memory while it answers, mapped pages too, GB | {held:.2f} |")
    print(f"| a prompt of {len(prompt)} tokens, s | {times[0]:.2f} |")
    print(f"| decoding, tokens/s | {1 / statistics.median(times[1:]):.1f} |")
    print(f"\n{time.strftime('%Y-%m-%d')}; torch {version('torch')}\n")


if __name__ == "__main__":
    main()
