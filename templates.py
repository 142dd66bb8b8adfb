"""Chat templates: a conversation as one text, with special tokens between its messages.

    parts = TEMPLATES["chatml"].parts([{"role": "user", "content": "Name a fruit."}])

A system message, a question and the start of the answer in each template (⏎ is a newline):

    alpaca  {system}⏎⏎### Instruction:⏎{user}⏎⏎### Response:
    vicuna  {system} USER: {user} ASSISTANT:
    chatml  <|im_start|>system⏎{system}<|im_end|>⏎
            <|im_start|>user⏎{user}<|im_end|>⏎<|im_start|>assistant⏎
    llama3  <|start_header_id|>system<|end_header_id|>⏎⏎{system}<|eot_id|>
            <|start_header_id|>user<|end_header_id|>⏎⏎{user}<|eot_id|>
            <|start_header_id|>assistant<|end_header_id|>⏎⏎

A model answers best in the template it was tuned with; alpaca/common/jinja.py finds out which.
dataset.py encodes each part by itself, so <|im_end|> typed by a user becomes a few ordinary tokens.

Alpaca: crfm.stanford.edu/2023/03/13/alpaca.html; Vicuna: lmsys.org/blog/2023-03-30-vicuna.
"""

import re
from typing import NamedTuple

REQUEST = "Write a response that appropriately completes the request."
PREAMBLE = f"Below is an instruction that describes a task. {REQUEST}"
PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    f"context. {REQUEST}"
)
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
LLAMA3_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
SPECIAL_NAME = re.compile(r"(<\|\w+\|>)")


class Special(str):
    """A special token, by its name."""


class AnswerText(str):
    """An answer; dataset.py adds the token that ends it."""


def fill(pattern: str, content: str) -> list[str]:
    parts = SPECIAL_NAME.split(pattern)  # every other part is the name of a special token
    return [Special(p) if i % 2 else p.replace("{}", content) for i, p in enumerate(parts)]


class Template(NamedTuple):
    """{} stands for a message. A <|special token|> must be in the tokenizer's vocabulary."""

    name: str
    system: str | None  # the default system message
    first: str  # for the system message, if there is one
    user: str
    reply: str  # before an answer
    answer: str = "{}"
    end: str = ""  # the token that ends an answer; "": the tokenizer's EOS
    after: str = ""  # after that token
    trim: bool = False  # whether messages lose spaces and newlines at both ends
    bos: bool | None = None  # whether BOS comes first; None: if the tokenizer puts it before texts

    def question(self, instruction: str, input: str = "") -> list[dict[str, str]]:
        """An instruction with its input, as messages."""
        if input and self.name == "alpaca":
            content = f"{instruction}\n\n### Input:\n{input}"
            system = {"role": "system", "content": PREAMBLE_WITH_INPUT}
            return [system, {"role": "user", "content": content}]
        content = f"{instruction}\n\n{input}" if input else instruction
        return [{"role": "user", "content": content}]

    def parts(self, messages: list[dict[str, str]]) -> list[str]:
        """Special tokens, answers and texts, in order; after a user's message comes `reply`."""
        system = self.system
        if messages[0]["role"] == "system":
            system, messages = self.trimmed(messages[0]["content"]), messages[1:]
        parts = [] if system is None else fill(self.first, system)
        for message in messages:
            content = self.trimmed(message["content"])
            if message["role"] == "assistant":
                parts += [AnswerText(self.answer.replace("{}", content)), *fill(self.after, "")]
            else:
                parts += fill(self.user + self.reply, content)
        return parts

    def trimmed(self, text: str) -> str:
        return text.strip() if self.trim else text

    @property
    def specials(self) -> list[str]:
        return SPECIAL_NAME.findall(self.first + self.user + self.reply + self.end)

    @property
    def before_answer(self) -> str:
        """The text from the last special token to an answer."""
        return SPECIAL_NAME.split(self.reply)[-1]


# ---------------------------------------------------------------- the registry

ALPACA = Template(
    "alpaca", PREAMBLE, "{}", "\n\n### Instruction:\n{}", reply="\n\n### Response:"
)  # the answer follows without a space or a newline
VICUNA = Template(
    "vicuna", VICUNA_SYSTEM, "{} ", "USER: {} ", "ASSISTANT:", answer=" {}", trim=True
)  # v1.1
CHATML = Template(
    "chatml",
    None,
    "<|im_start|>system\n{}<|im_end|>\n",
    "<|im_start|>user\n{}<|im_end|>\n",
    "<|im_start|>assistant\n",
    end="<|im_end|>",
    after="\n",
    bos=False,
)
LLAMA3_CHAT = Template(
    "llama3",
    None,
    LLAMA3_HEADER.format("system") + "{}<|eot_id|>",
    LLAMA3_HEADER.format("user") + "{}<|eot_id|>",
    LLAMA3_HEADER.format("assistant"),
    end="<|eot_id|>",
    trim=True,
    bos=True,
)
TEMPLATES = {template.name: template for template in (ALPACA, CHATML, LLAMA3_CHAT, VICUNA)}


def format_prompt(instruction: str, input: str = "") -> str:
    """Alpaca's prompt, character for character."""
    return "".join(ALPACA.parts(ALPACA.question(instruction, input)))
