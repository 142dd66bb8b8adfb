"""An engine as the command line describes it, and its answers to many prompts, in their order.

for sequences in answer_in_order(engine, [(ids, [params, …]), …]): …   # several of each prompt
"""

import argparse
from collections import deque
from collections.abc import Iterable, Iterator

from alpaca.inference.engine import Engine
from alpaca.inference.prefix_tree import PREFIX_MEMORY
from alpaca.inference.sampling import SamplingParams
from alpaca.inference.sequence import Sequence
from alpaca.weights.loading import load_from_args


def engine_from_args(args: argparse.Namespace, max_batch_size: int) -> Engine:
    model, tokenizer = load_from_args(args)
    return Engine(
        model, tokenizer, max_batch_size, compile=args.compile, prefix_memory=PREFIX_MEMORY
    )


def answer_in_order(
    engine: Engine, requests: Iterable[tuple[list[int], list[SamplingParams]]]
) -> Iterator[list[Sequence]]:
    """For each (prompt, params of its answers) the finished answers. Few requests wait at once."""
    pending, requests = deque[list[Sequence]](), iter(requests)
    while True:
        while len(engine.waiting) < engine.max_batch_size and (new := next(requests, None)):
            pending.append([engine.add(new[0], params) for params in new[1]])
        if not pending:
            return
        if any(sequence.finish_reason is None for sequence in pending[0]):
            engine.step()
        else:
            yield engine.finish(pending.popleft())  # finished: only checks them
