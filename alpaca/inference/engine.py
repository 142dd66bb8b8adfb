"""Many answers at once: sequences that join, get a token each per step, and leave when they end.

    engine = Engine(model, tokenizer, max_batch_size=8)
    answer = engine.add(tokenizer.encode("The capital of France is", bos=True), Sampling())
    while engine.busy:
        engine.step()          # a token for every sequence; answer.text grows
    engine.generate(prompts)   # or all at once; or: for text in engine.stream(prompt): …

A forward pass reads every weight, whether for one row or for sixteen: rows that are decoded
together cost little more than one ("continuous batching", Orca, OSDI 2022).

  - Sequence i has row i of the key/value cache, always the first rows: when one leaves, the last
    moves into its place. No pass computes rows that are empty.
  - Prompts that join are packed one behind the other and started in one pass.
  - What a row holds does not depend on the others: a batch answers as one at a time does, a seed
    gives the same text alone and in company. (In fp32. With 16 bits and less, kernels round
    differently for other numbers of rows, and where two tokens are nearly equal it can show.)
  - An engine belongs to one thread.
  - On a GPU a step is a CUDA graph, one for every power of two of rows, recorded while the cache
    is still empty: launching its hundreds of small kernels singly would take longer than they do.

Shown by tests/test_engine.py: test_whoever_joins_and_leaves_at_random.
"""

import random
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import accumulate

import torch
from torch import Tensor

from alpaca.common.errors import UserError
from alpaca.inference.sampling import GREEDY, SamplingParams, penalize_repetition, sample
from model import KVCache, Llama
from tokenizer import Tokenizer

PREFILL_TOKENS = 2048  # prompts that start in one pass have about so many tokens together
LENGTH_MULTIPLE = 16  # prompts are padded to it: on a CPU, oneDNN keeps kernels for every length


class Sequence:
    """One answer while it is made. `text` is what may be shown: it never takes anything back."""

    def __init__(self, prompt: list[int], params: SamplingParams, tokenizer: Tokenizer, room: int):
        self.prompt, self.params, self.tokenizer = prompt, params, tokenizer
        self.max_new_tokens = min(params.max_new_tokens, room)
        self.ids: list[int] = []
        # if asked for: of the chosen tokens, before temperature and filters, and of the likeliest
        self.logprobs: list[float] = []
        self.top_logprobs: list[list[tuple[int, float]]] = []
        self.text = self.pending = ""  # held back: what may be the beginning of a stop text
        self.finish_reason: str | None = None  # stop, length, cancelled or failed
        self.random, self.eos = random.Random(params.seed), tokenizer.eos_id
        self.stream = tokenizer.stream(after=prompt)

    def record_logprobs(self, token: int, logprobs: Tensor) -> None:
        """How likely the chosen token was, and which were likeliest: logprobs (V)."""
        self.logprobs.append(logprobs[token].item())
        top = logprobs.topk(min(self.params.logprobs, len(logprobs)))
        self.top_logprobs.append(list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))

    def append(self, token: int) -> None:
        """One more token; the answer may end with it."""
        self.ids.append(token)
        if token == self.eos:
            return self.end("stop")
        self.emit(self.stream.push(token))
        if self.finish_reason is None and len(self.ids) == self.max_new_tokens:
            self.end("length")

    def check(self) -> None:
        """An error if the model could not answer."""
        if self.finish_reason == "failed":
            raise UserError("the model's logits are not numbers: its weights or dtype are broken")

    def end(self, reason: str) -> None:
        self.emit(self.stream.flush())
        if self.finish_reason is None:
            self.text, self.pending, self.finish_reason = self.text + self.pending, "", reason

    def emit(self, new: str) -> None:
        pending = self.pending + new
        found = [at for stop in self.params.stop if (at := pending.find(stop)) >= 0]
        if found:
            self.text += pending[: min(found)]
            self.pending, self.finish_reason = "", "stop"
            return
        keep = max((overlap(pending, stop) for stop in self.params.stop), default=0)
        self.text += pending[: len(pending) - keep]
        self.pending = pending[len(pending) - keep :]


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of the stop text."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


class Engine:
    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        max_batch_size: int = 1,  # sequences decoded together; more wait
        max_length: int | None = None,  # tokens of prompt and answer; None: all the model knows
        compile: bool = False,  # torch.compile the step: minutes, then fewer kernels
        watermark=None,  # has bias(logits (B, V), ids (B, T)) -> logits; see watermark.py
    ):
        tokenizer.check(model.config)
        self.model, self.tokenizer, self.watermark = model.eval(), tokenizer, watermark
        known = model.config.max_position_embeddings
        self.max_length = known if max_length is None else max_length
        assert max_batch_size > 0 and self.max_length > 1
        weight = model.model.norm.weight
        dtype = weight.dtype if weight.is_cuda else torch.float32
        self.cache = KVCache(model.config, max_batch_size, self.max_length, weight.device, dtype)
        self.cache.static = compile or weight.is_cuda
        self.max_batch_size, self.device = max_batch_size, weight.device
        self.waiting: deque[Sequence] = deque()
        self.active: list[Sequence] = []  # sequence i has row i of the cache
        self.sizes = [1]  # of a step with static shapes: powers of two, and all rows
        while self.sizes[-1] < max_batch_size:
            self.sizes.append(min(2 * self.sizes[-1], max_batch_size))
        self.decode_step = decode_step
        if compile:  # for each size of each engine
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            self.decode_step = torch.compile(decode_step, dynamic=False)
        self.graphs = self.recorded() if weight.is_cuda else {}

    # ------------------------------------------------------------ what callers use

    def add(self, prompt: list[int], params: SamplingParams = GREEDY) -> Sequence:
        """Queue a prompt. It is refused, never cut, if it leaves no room for an answer."""
        if not prompt:
            raise UserError("an empty prompt: it has at least BOS")
        if not 0 <= min(prompt) <= max(prompt) < self.model.config.vocab_size:
            raise UserError("the prompt has ids that the model has no embedding for")
        room = self.max_length - len(prompt)
        if room < 1:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, {1 - room} too many: prompt and answer "
                f"share {self.max_length}"
            )
        self.waiting.append(Sequence(prompt, params, self.tokenizer, room))
        return self.waiting[-1]

    def cancel(self, sequence: Sequence) -> None:
        if sequence.finish_reason is None:
            sequence.end("cancelled")  # its row is freed before the next token
            with suppress(ValueError):
                self.waiting.remove(sequence)

    @property
    def busy(self) -> bool:
        return any(s.finish_reason is None for queue in (self.active, self.waiting) for s in queue)

    def finish(self, sequences: list[Sequence]) -> list[Sequence]:
        """Step until these have ended."""
        try:
            for sequence in sequences:
                while sequence.finish_reason is None:
                    self.step()
                sequence.check()
        finally:
            for sequence in sequences:
                self.cancel(sequence)
        return sequences

    def stream_text(self, sequence: Sequence) -> Iterator[str]:
        """A sequence's text as it comes; closing the iterator cancels it."""
        shown = 0
        try:
            while sequence.finish_reason is None or len(sequence.text) > shown:
                if len(sequence.text) == shown:
                    self.step()
                new = sequence.text[shown:]
                shown += len(new)
                if new:
                    yield new  # others may step the engine before this goes on
            sequence.check()
        finally:
            self.cancel(sequence)

    def generate(self, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[Sequence]:
        return self.finish([self.add(prompt, params) for prompt in prompts])

    def stream(self, prompt: list[int], params: SamplingParams = GREEDY) -> Iterator[str]:
        return self.stream_text(self.add(prompt, params))

    # ------------------------------------------------------------ one step

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """One more token for every sequence there is a row for; those sequences."""
        self.remove_finished()
        joining = self.next_to_join()
        try:
            logits = [self.decode()] if self.active else []
            if joining:
                logits.append(self.prefill(joining))
                self.active += joining
            if logits:
                self.sample_and_append(torch.cat(logits) if len(logits) > 1 else logits[0])
        except BaseException as problem:  # the cache may be ahead of the ids: begin anew
            for sequence in (*self.active, *joining):
                sequence.end("failed" if isinstance(problem, Exception) else "cancelled")
            self.active = []
            self.cache.lengths.zero_()
            raise
        return list(self.active)

    def remove_finished(self) -> None:
        """Rows of those that ended are filled with the last ones'."""
        for row in reversed(range(len(self.active))):
            if self.active[row].finish_reason is not None:
                last = len(self.active) - 1
                if row < last:
                    self.cache.move(last, row)
                self.cache.lengths[last] = 0
                self.active[row] = self.active[last]
                self.active.pop()

    def next_to_join(self) -> list[Sequence]:
        chosen, tokens = [], 0
        while self.waiting and len(self.active) + len(chosen) < self.max_batch_size:
            tokens += len(self.waiting[0].prompt)
            if chosen and tokens > PREFILL_TOKENS:
                break
            chosen.append(self.waiting.popleft())
        return chosen

    def prefill(self, sequences: list[Sequence]) -> Tensor:
        """Fill the rows behind the active ones with prompts; the logits after each, (B, V)."""
        prompts = [s.prompt + [0] * self.padding(len(s.prompt)) for s in sequences]
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)
        bounds = torch.tensor([0, *accumulate(map(len, prompts))], device=self.device)
        lengths = torch.tensor([len(s.prompt) for s in sequences], device=self.device)
        rows = self.cache[len(self.active) : len(self.active) + len(sequences)]
        hidden = self.model.hidden(ids[None], bounds.int(), rows)[0, bounds[:-1] + lengths - 1]
        rows.lengths.copy_(lengths)  # what was stored behind them is written over
        return self.model.lm_head(hidden)

    def padding(self, length: int) -> int:
        return min(-length % LENGTH_MULTIPLE, self.max_length - length)

    def decode(self) -> Tensor:
        """One pass over the active rows, (B, V)."""
        B = size = len(self.active)
        if self.cache.static:  # rows beyond B are free
            size = min(n for n in self.sizes if n >= B)
        last = [s.ids[-1] for s in self.active] + [0] * (size - B)
        ids = torch.tensor(last, device=self.device)
        if not self.graphs:
            return self.decode_step(self.model, ids, self.cache[:size])[:B]
        graph, static_ids, logits = self.graphs[size]
        static_ids.copy_(ids)
        graph.replay()
        return logits[:B]

    def recorded(self) -> dict:
        """CUDA graphs of the step over 1, 2, 4 … rows. Recording runs it, which changes nothing:
        the rows are free, so they stay free."""
        graphs = {}
        with torch.inference_mode():
            for size in reversed(self.sizes):  # the largest first: the others fit into its memory
                ids = torch.zeros(size, dtype=torch.int64, device=self.device)
                rows = self.cache[:size]
                beside = torch.cuda.Stream()
                beside.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(beside):
                    for _ in range(3):  # compiles, chooses kernels
                        self.decode_step(self.model, ids, rows)
                torch.cuda.current_stream().wait_stream(beside)
                graph = torch.cuda.CUDAGraph()
                pool = next(iter(graphs.values()))[0].pool() if graphs else None
                with torch.cuda.graph(graph, pool=pool):
                    logits = self.decode_step(self.model, ids, rows)
                graphs[size] = graph, ids, logits
        return graphs

    def sample_and_append(self, logits: Tensor) -> None:
        """Choose a token for every active sequence and hand it over."""
        plain = logits[:, : self.tokenizer.vocab_size].float()  # rows beyond have no piece
        logits = plain
        if self.watermark:
            last = torch.tensor([(s.ids or s.prompt)[-1:] for s in self.active])  # (B, 1)
            logits = self.watermark.bias(plain, last)
        if any(s.params.repetition_penalty != 1 for s in self.active):
            logits = logits.clone()
            for row, s in enumerate(self.active):
                seen = torch.tensor(sorted({*s.prompt, *s.ids}), device=self.device)
                seen = seen[seen < logits.shape[1]]
                logits[row] = penalize_repetition(logits[row], s.params.repetition_penalty, seen)
        sound = logits.amax(-1).isfinite().tolist()  # a broken row ends alone
        if not all(sound):
            logits = torch.where(torch.tensor(sound, device=self.device)[:, None], logits, 0)
        numbers = [s.random.random() if s.params.temperature else 0.0 for s in self.active]
        chosen = sample(logits, [s.params for s in self.active], numbers)
        for row, (s, token, fine) in enumerate(
            zip(self.active, chosen.tolist(), sound, strict=True)
        ):
            if s.finish_reason is not None:  # cancelled meanwhile
                continue
            if not fine:
                s.end("failed")
                continue
            if s.params.logprobs is not None:
                s.record_logprobs(token, plain[row].log_softmax(-1))
            s.append(token)


def decode_step(model: Llama, ids: Tensor, cache: KVCache) -> Tensor:
    """The logits (B, V) after one more token, ids (B), for each row."""
    return model.lm_head(model.hidden(ids[:, None], cache=cache)[:, 0])
