"""A prompt and its growing answer: the text so far, and where it ends.

    sequence = Sequence(prompt, SamplingParams(), tokenizer, max_tokens=512)
    sequence.append(token)                # sequence.text grows, until sequence.finish_reason is set

A token need not be whole characters, and a stop text may come in pieces: `text` holds only what no
later token can change. The engine (engine.py) decides which token comes next.
"""

import random
from collections.abc import Iterable

from torch import Tensor

from alpaca.common.errors import UserError
from alpaca.inference.lookup import PromptLookup
from alpaca.inference.sampling import SamplingParams
from tokenizer import Tokenizer


class Sequence:
    """A prompt and its growing answer. `text` never shrinks, so it can be shown as it grows."""

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        max_tokens: int,
        end_ids: Iterable[int] = (),  # tokens that end the answer, beside EOS
    ):
        self.prompt, self.params, self.tokenizer = prompt, params, tokenizer
        self.max_new_tokens = min(params.max_new_tokens, max_tokens)
        self.end_ids = {tokenizer.eos_id, *end_ids}
        # The space that Vicuna's template has before an answer is no part of the text.
        self.to_skip, self.skipped = "", 0
        template = tokenizer.template
        space = template.answer.removesuffix("{}") if template else ""
        if template and space and tokenizer.decode(prompt).endswith(template.before_answer):
            self.to_skip = space
        self.ids: list[int] = []
        self.text = ""
        self.pending = ""  # decoded, but maybe the beginning of a stop text
        self.finish_reason: str | None = None  # stop, length, cancelled or failed; set after text
        # with params.logprobs: the model's own, before temperature and filters
        self.logprobs: list[float] = []
        self.top_logprobs: list[list[tuple[int, float]]] = []
        self.random = random.Random(params.seed)
        self.decoder = tokenizer.stream(after=prompt)
        self.lookup = PromptLookup(prompt)

    def append(self, token: int) -> None:
        self.ids.append(token)
        if token in self.end_ids:
            return self.end("stop")
        self.add_text(self.decoder.push(token))
        if self.finish_reason is None and len(self.ids) == self.max_new_tokens:
            self.end("length")

    def end(self, reason: str) -> None:
        """Set the finish reason, unless there is one already."""
        self.add_text(self.decoder.flush())
        if self.finish_reason is None:
            self.text, self.pending, self.finish_reason = self.text + self.pending, "", reason

    def add_text(self, new: str) -> None:
        """Move text from pending to text, except an end that may turn into a stop text."""
        if new:
            self.skipped += len(self.to_skip) * new.startswith(self.to_skip)
            new, self.to_skip = new.removeprefix(self.to_skip), ""
        pending = self.pending + new
        found = [at for stop in self.params.stop if (at := pending.find(stop)) >= 0]
        if found:
            self.text += pending[: min(found)]
            self.pending, self.finish_reason = "", "stop"
            return
        held_back = max((overlap(pending, stop) for stop in self.params.stop), default=0)
        self.text += pending[: len(pending) - held_back]
        self.pending = pending[len(pending) - held_back :]

    def record_logprobs(self, token: int, logprobs: Tensor) -> None:
        self.logprobs.append(logprobs[token].item())
        top = logprobs.topk(min(self.params.logprobs or 0, len(logprobs)))
        self.top_logprobs.append(list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))

    def check(self) -> None:
        if self.finish_reason == "failed":
            raise UserError("a decoding step failed, or the model's logits are not numbers")


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`, but not all of it."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
