"""ROUGE-L against a pool: one candidate with pools of several sizes, and greedy deduplication.

    OMP_NUM_THREADS=1 python -m bench.dedupe [--texts records.json] [--size 52000] [--runs 5]

Ours is `rougel.Pool`, on one core. The peer is rouge_score's `_score_lcs` on texts that are
tokenized already: on one core, and in a process pool that is started for every candidate, as in
Alpaca's script. Its candidate has the median length of ours. The instructions of --texts are
repeated up to --size: no side gains from that. Without --texts they are random words, as frequent
as in 999 records of Alpaca's data (numbers in parentheses) and about as in the seed tasks: the
first word is 9 % of all words (9 %), the first ten are 34 % (31 %), and a word of a candidate is in
14 % of the texts (14 %), which have 10 words on average (10).
"""

import os
import random
import statistics
import time
from functools import partial
from itertools import accumulate, cycle, islice
from multiprocessing import Pool as Processes
from pathlib import Path

from rouge_score import rouge_scorer

from alpaca.datagen.formats import load_records
from bench.measure import PeakMemory, bench_parser, report, run_in_turns
from rougel import Pool, tokenize

CANDIDATES, THRESHOLD = 200, 0.7


def synthetic_instructions(count: int) -> list[str]:
    """Words with frequencies after Zipf and Mandelbrot, 1 / (rank + 1)^1.12, log-normal lengths."""
    rng, ranks = random.Random(0), range(1, 8001)
    words, sums = [f"w{rank}" for rank in ranks], [*accumulate((r + 1) ** -1.12 for r in ranks)]
    lengths = (max(4, round(rng.lognormvariate(2.27, 0.33))) for _ in range(count))
    return [" ".join(rng.choices(words, cum_weights=sums, k=length)) for length in lengths]


def dedupe(texts: list[str]) -> int:
    pool = Pool()
    for text in texts:
        if not len(pool) or pool.scores(text).max() <= THRESHOLD:
            pool.add(text)
    return len(pool)


def compare(candidates: list[str], texts: list[str], tokens: list[list[str]], runs: int) -> list:
    """The table's lines for one pool."""
    pool = Pool(texts)
    candidate = sorted(candidates, key=lambda text: len(tokenize(text)))[len(candidates) // 2]
    new = tokenize(candidate)

    def ours() -> dict:
        start = time.perf_counter()
        for text in candidates:
            pool.scores(text)
        return {"ms": 1e3 * (time.perf_counter() - start) / len(candidates)}

    def one_core() -> dict:
        start = time.perf_counter()
        scores = [rouge_scorer._score_lcs(new, old).fmeasure for old in tokens]
        seconds = time.perf_counter() - start
        assert scores == pool.scores(candidate).tolist()  # equal in every bit
        return {"ms": 1e3 * seconds}

    def all_cores() -> dict:
        start = time.perf_counter()
        with Processes(os.cpu_count()) as processes:
            processes.map(partial(rouge_scorer._score_lcs, new), tokens)
        return {"ms": 1e3 * (time.perf_counter() - start)}

    us, *peers = run_in_turns({"ours": ours, "one": one_core, "all": all_cores}, runs).values()
    label = f"a candidate against {len(texts):,}, ms"
    labels = label, f"{label}; {os.cpu_count()} processes for the peer"
    return [(name, us["ms"], peer["ms"]) for name, peer in zip(labels, peers, strict=True)]


def main() -> None:
    parser = bench_parser(__doc__, runs=True)
    parser.add_argument("--texts", type=Path, help="records whose instructions to compare")
    parser.add_argument("--size", type=int, default=52_000, help="of the pool (default: 52000)")
    args = parser.parse_args()
    if args.texts:
        texts = [record["instruction"] for record in load_records(args.texts)]
        texts = [*islice(cycle(texts), args.size + CANDIDATES)]
    else:
        texts = synthetic_instructions(args.size + CANDIDATES)
    candidates, texts = texts[:CANDIDATES], texts[CANDIDATES:]
    with PeakMemory() as memory:  # first, before freed memory can be reused
        pool = Pool(texts)
    del pool
    tokens = [tokenize(text) for text in texts]
    lines = []
    for size in sorted({1000, 5000, 20_000, len(texts)}):
        if size <= len(texts):
            lines += compare(candidates, texts[:size], tokens[:size], args.runs)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        distinct = dedupe(texts)
        seconds.append(time.perf_counter() - start)
    mean = statistics.mean(map(len, tokens))
    what = args.texts.name if args.texts else "words as frequent as in real instructions"
    note = (
        f"Texts have {mean:.1f} tokens on average. "
        f"Greedy dedupe of {len(texts):,} texts, which keeps {distinct:,}: "
        f"{statistics.median(seconds):.1f} s. "
        f"A pool of {len(texts):,} takes {memory.anonymous / 1e6:.0f} MB."
    )
    title = f"ROUGE-L against a pool, one core, {what}"
    report(title, "rouge_score", lines, ["numpy", "rouge-score"], note)


if __name__ == "__main__":
    main()
