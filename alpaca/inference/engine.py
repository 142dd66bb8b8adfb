"""Continuous batching: many answers decoded together, each joining and leaving on its own.

    engine = Engine(model, tokenizer, max_batch_size=8)
    sequence = engine.add(tokenizer.encode("The capital of France is", bos=True), SamplingParams())
    while engine.busy:
        engine.step()         # the next token for every sequence; sequence.text grows
    engine.generate(prompts)  # the same for a list; or: for text in engine.stream(prompt): …

A decoding step reads every weight of the model, for one sequence or for sixteen: a batch costs
little more than one sequence. So sequences join and leave between any two steps (Orca, OSDI 2022):

    step      1            2        3        4
    slot 0    prefill A    A        A ends   B            B moved here from slot 1
    slot 1    prefill B    B        B        prefill C    C waited for a free slot

  - Active sequence i uses slot i of the key/value cache, so a step never computes an empty slot.
  - Prompts that join together are packed one behind the other and prefilled in one pass. One that
    repeats the prompt before it is not computed again: it gets a copy of the keys and values.
  - With `prefix_memory` the keys and values of earlier texts are kept, and of a prompt that begins
    like one of them only the rest is run (prefix_tree.py).
  - With `max_stall`, running answers wait about that long for a prompt: one that takes longer is
    run in parts, one a step, each of which finds the keys and values of those before it in the
    prefix tree. (One that the tree cannot hold is run whole, and a part has 32 tokens at least.)
  - On a CPU a sequence that is decoded alone gets several tokens in a step where it repeats earlier
    text (lookup.py).
  - In fp32 a sequence gets the same tokens alone and in any batch, with and without the prefix tree
    and guesses. With 16 bits and less, kernels round differently for other numbers of rows, which
    can show where two tokens are nearly tied.

An engine must be used by one thread only.
"""

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby

import torch
from torch import Tensor

from alpaca.common.errors import UserError
from alpaca.inference.cuda_graphs import CudaGraphs
from alpaca.inference.prefix import LENGTH_MULTIPLE, extend, fork, new_cache, padded_length, prefill
from alpaca.inference.prefix_tree import NODE_TOKENS, PrefixTree
from alpaca.inference.sampling import GREEDY, SamplingParams, penalize_repetition, sample
from alpaca.inference.sequence import Sequence
from model import KVCache, Llama
from tokenizer import Tokenizer, check_tokenizer, end_ids

PREFILL_TOKENS = 2048  # prompts are prefilled together up to about this many tokens
FIRST_LENGTH = 512  # positions of the cache at the start: it grows with the longest sequence
SHORTEST_REACH = 256  # positions of the cache that a step on a GPU reads at least


class Engine:
    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        max_batch_size: int = 1,  # sequences decoded together; further ones wait
        max_length: int | None = None,  # tokens of prompt and answer; None: the model's limit
        compile: bool = False,  # torch.compile the decoding step: minutes, then fewer kernels
        watermark=None,  # an object with bias(logits (B, V), ids (B, T)) -> logits: watermark.py
        prefix_memory: int = 0,  # bytes for keys and values of earlier prompts and answers
        max_stall: float = math.inf,  # seconds that running answers may wait for a prompt
    ):
        check_tokenizer(tokenizer, model.config)
        self.model, self.tokenizer, self.watermark = model.eval(), tokenizer, watermark
        self.max_batch_size = max_batch_size
        limit = model.config.max_position_embeddings
        self.max_length = limit if max_length is None else max_length
        if not 1 < self.max_length <= limit:
            raise UserError(f"max_length {self.max_length}: the model has {limit} positions")
        self.cache = new_cache(model, max_batch_size, min(FIRST_LENGTH, self.max_length))
        self.device, on_gpu = self.cache.k.device, self.cache.k.is_cuda
        self.cache.static = compile or on_gpu
        self.tree = PrefixTree(self.cache, prefix_memory)
        self.max_stall, self.prefill_rate = max_stall, 1.0  # s; tokens/s, of the last prompts
        self.step_time = 0.0  # s, of the last token that was decoded alone
        self.waiting: deque[Sequence] = deque()
        self.active: list[Sequence] = []  # sequence i is in slot i of the cache
        self.decode_step = decode_step
        if compile:  # once for each batch size and reach of each engine
            torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
            self.decode_step = torch.compile(decode_step, dynamic=False)
        self.graphs = CudaGraphs(self.decode_slots, self.cache.lengths) if on_gpu else None

    def reserve(self, tokens: int) -> None:
        """Let every slot of the cache hold `tokens`: its size doubles up to max_length."""
        old, length = self.cache, self.cache.k.shape[3]
        if tokens > length:
            longer = min(max(2 * length, tokens), self.max_length)
            self.cache = new_cache(self.model, self.max_batch_size, longer)
            self.cache.static = old.static
            for slot in range(len(self.active)):
                fork(old[slot : slot + 1], self.cache[slot : slot + 1])
            if self.graphs:  # they were recorded with the old tensors
                self.graphs = CudaGraphs(self.decode_slots, self.cache.lengths)

    # ------------------------------------------------------------ one step

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """A token for every sequence that has a slot, or several for one; returns the sequences."""
        joining: list[Sequence] = []
        try:
            self.remove_finished()
            if guess := self.guess():
                self.check_guess(guess)
                return list(self.active)
            joining = self.next_to_join()
            logits = [self.decode()] if self.active else []
            if joining:
                logits.append(self.prefill(joining))
                self.active += joining
            elif self.waiting and len(self.active) < self.max_batch_size:
                self.prefill_part(self.waiting[0].prompt)
            if logits:
                self.sample_and_append(torch.cat(logits) if len(logits) > 1 else logits[0])
        except BaseException as error:  # the cache may hold a token that the ids do not: empty it
            for sequence in (*self.active, *joining):
                sequence.end("failed" if isinstance(error, Exception) else "cancelled")
            self.active = []
            self.cache.lengths.zero_()
            raise
        return list(self.active)

    def remove_finished(self) -> None:
        """Free the slots of finished sequences; the last active one moves into each gap."""
        for slot in reversed(range(len(self.active))):
            ended, last = self.active[slot], len(self.active) - 1
            if ended.finish_reason is not None:
                if ended.finish_reason == "failed":
                    self.erase(slot)
                else:
                    self.tree.store(ended.prompt + ended.ids, self.cache[slot : slot + 1])
                if slot < last:
                    fork(self.cache[last : last + 1], self.cache[slot : slot + 1])
                self.cache.lengths[last] = 0
                self.active[slot] = self.active[last]
                self.active.pop()

    def erase(self, slot: int) -> None:
        """NaN would spread to the next sequence in the slot: no mask hides it."""
        self.cache.k[:, slot], self.cache.v[:, slot] = 0, 0

    def prefill_budget(self) -> int:
        """Tokens of prompts to run in this step: fewer, if running answers wait for them."""
        if not self.active:
            return PREFILL_TOKENS
        return max(NODE_TOKENS, int(min(PREFILL_TOKENS, self.prefill_rate * self.max_stall)))

    def next_to_join(self) -> list[Sequence]:
        """The first of those that wait; none, if the next prompt is to be run in parts.

        One that begins like one before it joins a step later, and finds its keys and values."""
        joining, budget, coming = [], self.prefill_budget(), set()
        while self.waiting and len(self.active) + len(joining) < self.max_batch_size:
            prompt = self.waiting[0].prompt
            if not joining or prompt != joining[-1].prompt:
                known, fits = self.tree.known(prompt), len(prompt) <= self.tree.max_tokens
                beginning = tuple(prompt[: known + NODE_TOKENS])
                budget -= len(prompt) - known
                if joining and fits and beginning in coming:
                    break
                if budget < 0 and (joining or (self.active and fits)):
                    break
                coming.add(beginning)
            joining.append(self.waiting.popleft())
        return sorted(joining, key=lambda s: self.rest_width(s.prompt))

    def rest_width(self, prompt: list[int]) -> int:
        """Tokens, with padding, behind a known beginning of a prompt; 0: nothing of it is known."""
        known = self.tree.known(prompt)
        return padded_length(len(prompt) - known, self.max_length - known) if known else 0

    def prefill(self, sequences: list[Sequence]) -> Tensor:
        """Run prompts through the model, into the slots behind the active ones.

        Returns the logits after each prompt, (B, V)."""
        repeats = [(prompt, len([*same])) for prompt, same in groupby(s.prompt for s in sequences)]
        logits = self.model.lm_head(self.run_prompts([prompt for prompt, _ in repeats]))
        slots = self.cache[len(self.active) :]
        source = [i for i, (_, count) in enumerate(repeats) for _ in range(count)]  # of each slot
        for target, i in reversed([*enumerate(source)]):  # none is written before it is copied
            if i != target:
                fork(slots[i : i + 1], slots[target : target + 1])
        return logits[source]

    def prefill_part(self, prompt: list[int]) -> None:
        """Let the tree know more of a prompt that is too long for one step."""
        end = (self.tree.known(prompt) + self.prefill_budget()) // NODE_TOKENS * NODE_TOKENS
        if not self.run_prompts([prompt[:end]]).isfinite().all():
            self.erase(len(self.active))
        self.cache.lengths[len(self.active)] = 0

    def run_prompts(self, prompts: list[list[int]]) -> Tensor:
        """Run what is not known of each prompt; hidden states at their ends, (B, C).

        Of prompts that begin with known tokens, those with as many others are run together."""
        self.reserve(min(max(map(len, prompts)) + LENGTH_MULTIPLE, self.max_length))
        first = len(self.active)
        slots = [self.cache[first + i : first + i + 1] for i in range(len(prompts))]
        rows = [p[self.tree.load(p, slot) :] for p, slot in zip(prompts, slots, strict=True)]
        hidden, done = [], 0
        for width, same in groupby(prompts, self.rest_width):
            start, count = time.perf_counter(), len([*same])
            group = slice(done, done := done + count)
            run = extend if width else prefill
            hidden.append(run(self.model, self.cache[first:][group], rows[group]))
            if (tokens := sum(map(len, rows[group]))) >= NODE_TOKENS:
                self.prefill_rate = tokens / (time.perf_counter() - start)
        for prompt, slot in zip(prompts, slots, strict=True):
            self.tree.store(prompt, slot)
        return torch.cat(hidden)

    def decode(self) -> Tensor:
        """Run each active sequence's last token through the model; logits (B, V)."""
        B = size = len(self.active)
        reach = max(len(s.prompt) + len(s.ids) for s in self.active)
        if self.cache.static:  # few sizes and reaches; the slots behind B are empty
            size = min(power_of_two(B), self.max_batch_size)
            reach = min(max(power_of_two(reach), SHORTEST_REACH), self.max_length)
        self.reserve(reach)
        last_ids = [s.ids[-1] for s in self.active] + [0] * (size - B)
        ids = torch.tensor(last_ids, device=self.device)
        step, start = self.graphs.replay if self.graphs else self.decode_slots, time.perf_counter()
        logits = step(ids, reach)[:B]
        self.step_time = time.perf_counter() - start if B == 1 else 0.0
        return logits

    def decode_slots(self, ids: Tensor, reach: int) -> Tensor:
        """Logits (B, V) for ids (B), from the first `reach` positions of the cache."""
        cache = self.cache[: len(ids)]
        cache.k, cache.v = cache.k[..., :reach, :], cache.v[..., :reach, :]
        return self.decode_step(self.model, ids, cache)

    def guess(self) -> list[int]:
        """What may follow the only sequence. Other kinds of batches are decoded as fast without."""
        if len(self.active) != 1 or self.waiting or self.cache.static:
            return []
        (sequence,) = self.active
        return sequence.lookup.guess(sequence.ids, sequence.max_new_tokens - len(sequence.ids) - 1)

    def check_guess(self, guess: list[int]) -> None:
        """Run the last token and the guessed ones, and sample until one is not as guessed."""
        (sequence,), length, start = self.active, int(self.cache.lengths[0]), time.perf_counter()
        self.reserve(length + 1 + len(guess))
        slot, ids = self.cache[:1], torch.tensor([[sequence.ids[-1], *guess]])
        logits = self.model.lm_head(self.model.model(ids, cache=slot)[0])  # (T, V)
        seconds = time.perf_counter() - start
        for right, token in enumerate([*guess, None]):
            self.sample_and_append(logits[right : right + 1])
            if sequence.finish_reason is not None or sequence.ids[-1] != token:
                break
        slot.lengths.fill_(length + 1 + right)
        saved = (right + 1) * self.step_time > seconds
        sequence.lookup.learn(sequence.ids, right == len(guess), saved)

    def sample_and_append(self, logits: Tensor) -> None:
        """Sample a token from logits (B, V) for every active sequence."""
        raw = logits[:, : self.tokenizer.vocab_size].float()  # the model may have more embeddings
        logits = raw
        if self.watermark:
            last = torch.tensor([(s.ids or s.prompt)[-1:] for s in self.active])  # (B, 1)
            logits = self.watermark.bias(raw, last)
        if any(s.params.repetition_penalty != 1 for s in self.active):
            logits = logits.clone()
            for row, s in enumerate(self.active):
                seen = torch.tensor(sorted({*s.prompt, *s.ids}), device=self.device)
                seen = seen[seen < logits.shape[1]]
                logits[row] = penalize_repetition(logits[row], s.params.repetition_penalty, seen)
        uniforms = [s.random.random() if s.params.temperature else 0.0 for s in self.active]
        sampled = sample(logits, [s.params for s in self.active], uniforms)
        finite = logits.amax(-1).isfinite()  # a sequence with NaN fails alone
        tokens = sampled.where(finite, -1).tolist()  # the only wait for a GPU in a greedy step
        for row, s in enumerate(self.active):
            if s.finish_reason is not None:  # cancelled since the step began
                continue
            if tokens[row] < 0:
                s.end("failed")
                continue
            if s.params.logprobs is not None:
                s.record_logprobs(tokens[row], raw[row].log_softmax(-1))
            s.append(tokens[row])

    # ------------------------------------------------------------ queue, and wait for answers

    @property
    def busy(self) -> bool:
        return any(s.finish_reason is None for s in (*self.active, *self.waiting))

    def add(self, prompt: list[int], params: SamplingParams = GREEDY) -> Sequence:
        """Queue a prompt. One that leaves no room for an answer is refused, never cut."""
        if not prompt:
            raise UserError("the prompt is empty: it must have at least BOS")
        if not 0 <= min(prompt) <= max(prompt) < self.model.config.vocab_size:
            raise UserError("the prompt has ids that the model has no embedding for")
        left = self.max_length - len(prompt)
        if left < 1:
            problem = f"the prompt has {len(prompt)} tokens, {1 - left} too many"
            raise UserError(f"{problem}: prompt and answer share {self.max_length}")
        ends = end_ids(self.tokenizer, self.model.config)
        self.waiting.append(Sequence(prompt, params, self.tokenizer, left, ends))
        return self.waiting[-1]

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence; its slot is freed before the next step."""
        if sequence.finish_reason is None:
            sequence.end("cancelled")
            with suppress(ValueError):
                self.waiting.remove(sequence)

    def finish(self, sequences: list[Sequence]) -> list[Sequence]:
        """Step until these sequences have ended."""
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
        """A sequence's text in pieces, as it grows. Closing the iterator cancels the sequence."""
        shown = 0
        try:
            while sequence.finish_reason is None or len(sequence.text) > shown:
                if len(sequence.text) == shown:
                    self.step()
                new = sequence.text[shown:]
                shown += len(new)
                if new:
                    yield new  # the caller may step the engine before it continues here
            sequence.check()
        finally:
            self.cancel(sequence)

    def generate(self, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[Sequence]:
        return self.finish([self.add(prompt, params) for prompt in prompts])

    def stream(self, prompt: list[int], params: SamplingParams = GREEDY) -> Iterator[str]:
        return self.stream_text(self.add(prompt, params))


def power_of_two(n: int) -> int:
    """The next one from n on."""
    return 1 << (n - 1).bit_length()


def decode_step(model: Llama, ids: Tensor, cache: KVCache) -> Tensor:
    """One token for each sequence: ids (B) to logits (B, V)."""
    return model.lm_head(model.model(ids[:, None], cache=cache)[:, 0])
