"""Prompt lookup: what an answer repeats is guessed, and several tokens are checked in one pass.

    lookup = PromptLookup(prompt)
    guess = lookup.guess(ids, limit)   # tokens that may follow the answer's ids; often none
    lookup.learn(ids, all_right, saved)   # were all of them right, and did the pass save time?

An answer that corrects, rewrites or extracts repeats its prompt, and code repeats itself. Where the
last two tokens occurred before, those that followed them there are a good guess:

    text     … the quick brown fox jumps over the lazy dog … Answer: The quick brown fox
    guess                            └─ jumps over the ─┘                               └─ jumps …

One pass over the guess gives the logits after each of its tokens. Decoding reads every weight, for
one token or for four, so that the pass takes hardly longer than a step where reading is the limit.
A guessed token is right if it is the one that is sampled from the logits before it; with the first
that is wrong, the rest is dropped. So the answer is what it would be without guesses: in fp32 token
for token, sampled ones too.

After a guess that was right to its end the next is twice as long. After one that took longer than
decoding its right tokens one by one, a number of tokens is decoded without, twice as many each
time. Papers: arXiv:2211.17192 (speculative decoding), 2304.04487 (copying from a reference).
"""

NGRAM = 2  # tokens that must have occurred before
SHORTEST, LONGEST = 3, 15  # guessed tokens; with the last known one, 4 to 16 are run
LONGEST_PAUSE = 32  # tokens


class PromptLookup:
    def __init__(self, prompt: list[int]):
        self.prompt = prompt
        self.follows: dict[tuple[int, ...], int] = {}  # n-gram → where its latest follower is
        self.indexed = NGRAM
        self.length, self.pause, self.resume = SHORTEST, 1, 0

    def guess(self, ids: list[int], limit: int) -> list[int]:
        if len(ids) < self.resume:
            return []
        text = self.prompt + ids
        known = len(text)
        for end in range(self.indexed, known):
            self.follows[tuple(text[end - NGRAM : end])] = end
        self.indexed = max(self.indexed, known)
        start = self.follows.get(tuple(text[-NGRAM:]))
        if start is None:
            return []
        for i in range(min(self.length, limit)):
            text.append(text[start + i])  # maybe one of those just appended
        return text[known:]

    def learn(self, ids: list[int], all_right: bool, saved: bool) -> None:
        """ids is the answer with what was sampled in the last guess's pass."""
        self.length = min(2 * self.length + 1, LONGEST) if all_right else SHORTEST
        if saved:
            self.pause = 1
        else:
            self.resume = len(ids) + self.pause
            self.pause = min(2 * self.pause, LONGEST_PAUSE)
