"""ROUGE-L against a pool: one candidate, several sizes, and the greedy dedupe of a whole data set.

    OMP_NUM_THREADS=1 python bench/dedupe.py [--texts records.json] [--size 52000] [--runs 5]

Ours is `rougel.Pool`, on one core. The peer is rouge_score's `_score_lcs` over token lists that are
ready made, on one core, and in a process pool made anew for every candidate, as Alpaca's script has
it. Without --texts the instructions are made up: the seeds of this project with words exchanged for
others of theirs, 11 tokens in the mean as in Alpaca's data.
"""

import argparse
import os
import random
import statistics
import sys
import time
from functools import partial
from multiprocessing import Pool as Processes
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from alpaca.common.console import read_jsonl  # noqa: E402
from rouge_score import rouge_scorer  # noqa: E402

from alpaca.datagen.formats import load_records  # noqa: E402
from bench.measure import PeakMemory, alternate, row, table  # noqa: E402
from rougel import Pool, tokenize  # noqa: E402

ALIKE = 0.7


def made_up(count: int) -> list[str]:
    """Instructions of Alpaca's length, most of them different enough to be kept."""
    rng = random.Random(0)
    seeds = [tokenize(seed["instruction"]) for seed in read_jsonl(ROOT / "data/seed_tasks.jsonl")]
    seeds = [tokens for tokens in seeds if 5 <= len(tokens) <= 20]
    words = [word for tokens in seeds for word in tokens]  # frequent ones are frequent
    texts = []
    while len(texts) < count:
        tokens = list(rng.choice(seeds))
        for place in range(len(tokens)):
            if rng.random() < 0.6:
                tokens[place] = rng.choice(words)
        texts.append(" ".join(tokens[: rng.randint(5, 24)]))
    return texts


def dedupe(texts: list[str]) -> int:
    pool = Pool()
    for text in texts:
        if not len(pool) or pool.scores(text).max() <= ALIKE:
            pool.add(text)
    return len(pool)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=Path, help="a data set whose instructions to take")
    parser.add_argument("--size", type=int, default=52_000, help="of the pool (default: 52000)")
    parser.add_argument("--runs", type=int, default=5, help="of each side (default: 5)")
    args = parser.parse_args()
    texts = made_up(args.size + 200)
    if args.texts:
        texts = [record["instruction"] for record in load_records(args.texts)]
    candidates, texts = texts[:200], texts[200:]
    with PeakMemory() as memory:  # first, while no freed memory is there to be used again
        whole = Pool(texts)
    del whole
    tokens = [tokenize(text) for text in texts]
    rows = []
    for size in sorted({1000, 5000, 20_000, len(texts)}):
        if size > len(texts):
            continue
        pool, some = Pool(texts[:size]), tokens[:size]

        def ours(pool: Pool = pool) -> dict:
            start = time.perf_counter()
            for text in candidates:
                pool.scores(text)
            return {"ms": 1e3 * (time.perf_counter() - start) / len(candidates)}

        def theirs(some: list = some, pool: Pool = pool) -> dict:
            new = tokenize(candidates[0])
            start = time.perf_counter()
            scores = [rouge_scorer._score_lcs(new, old).fmeasure for old in some]
            taken = time.perf_counter() - start
            assert scores == pool.scores(candidates[0]).tolist()  # every one, to the bit
            return {"ms": 1e3 * taken}

        def as_published(some: list = some) -> dict:
            new = tokenize(candidates[0])
            start = time.perf_counter()
            with Processes(os.cpu_count()) as processes:
                processes.map(partial(rouge_scorer._score_lcs, new), some)
            return {"ms": 1e3 * (time.perf_counter() - start)}

        sides = {"ours": ours, "theirs": theirs, "published": as_published}
        found = alternate(sides, args.runs)
        mine = found["ours"]["ms"]
        rows.append(row(f"candidate against {size:,}, ms", mine, found["theirs"]["ms"]))
        what = f"the same, {os.cpu_count()} processes for the peer, ms"
        rows.append(row(what, mine, found["published"]["ms"]))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        kept = dedupe(texts)
        seconds.append(time.perf_counter() - start)
    title = (
        f"ROUGE-L against a pool, one core, {statistics.mean(map(len, tokens)):.1f} tokens a text"
    )
    print(table(title, "rouge_score", rows, ["numpy", "rouge-score"]))
    print(
        f"Greedy dedupe of {len(texts):,} texts ({kept:,} kept): "
        f"{statistics.median(seconds):.1f} s. "
        f"A pool of {len(texts):,}: {memory.anonymous / 1e6:.0f} MB.\n"
    )


if __name__ == "__main__":
    main()
