"""Chat templates: a conversation as one text, with special tokens between its messages.

    parts = TEMPLATES["chatml"].parts([{"role": "user", "content": "Name a fruit."}])
    jinja = TEMPLATES["chatml"].jinja()      # the same for other software
    template = find_template(Path("smollm2"))

A system message, a question and the start of the answer in each template (⏎ is a newline):

    alpaca  {system}⏎⏎### Instruction:⏎{user}⏎⏎### Response:
    vicuna  {system} USER: {user} ASSISTANT:
    chatml  <|im_start|>system⏎{system}<|im_end|>⏎
            <|im_start|>user⏎{user}<|im_end|>⏎<|im_start|>assistant⏎
    llama3  <|start_header_id|>system<|end_header_id|>⏎⏎{system}<|eot_id|>
            <|start_header_id|>user<|end_header_id|>⏎⏎{user}<|eot_id|>
            <|start_header_id|>assistant<|end_header_id|>⏎⏎

A model answers best in the template it was tuned with. Its folder holds that template as a Jinja
program, which is never executed: `recognize` looks at its string literals. dataset.py encodes each
part by itself, so <|im_end|> typed by a user becomes a few ordinary tokens.

Alpaca: crfm.stanford.edu/2023/03/13/alpaca.html; Vicuna: lmsys.org/blog/2023-03-30-vicuna.
"""

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from alpaca.common.files import read_text
from alpaca.common.gguf_file import MAX_TEXT, is_gguf, read_gguf
from alpaca.common.json_files import read_json

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
JINJA_FILE, TEMPLATE_KEY = "chat_template.jinja", "tokenizer.chat_template"


class Special(str):
    """A special token, by its name."""


class AnswerText(str):
    """An answer; dataset.py adds the token that ends it."""


@lru_cache
def split_specials(pattern: str) -> list[str]:
    return [Special(p) if SPECIAL_NAME.fullmatch(p) else p for p in SPECIAL_NAME.split(pattern)]


def fill(pattern: str, content: str) -> list[str]:
    parts = split_specials(pattern)
    return [p if type(p) is Special else p.replace("{}", content) for p in parts]


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

    def jinja(self, bos: bool = False) -> str:
        """For transformers, llama.cpp and others; `bos` replaces a self.bos of None."""
        content = "(message['content'] | trim)" if self.trim else "message['content']"
        end = jinja_text(self.end) if self.end else "eos_token"
        first = write_jinja(self.first, content.replace("message[", "messages[0]["))
        answer = write_jinja(self.reply + self.answer, content), write_jinja(self.after)
        default = ""
        if self.system is not None:
            default = "{{ " + jinja_text(self.first.replace("{}", self.system)) + " }}"
        return "".join(
            [
                "{{ bos_token }}" * (bos if self.bos is None else self.bos),
                "{% if messages[0]['role'] == 'system' %}" + first,
                "{% else %}" * bool(default) + default + "{% endif %}",
                "{% for message in messages %}{% if message['role'] == 'user' %}",
                write_jinja(self.user, content),
                "{% elif message['role'] == 'assistant' %}",
                answer[0] + "{{ " + end + " }}" + answer[1],
                "{% endif %}{% endfor %}",
                "{% if add_generation_prompt %}" + write_jinja(self.reply) + "{% endif %}",
            ]
        )


def jinja_text(text: str) -> str:
    """JSON's quotation marks and escapes are Jinja's too."""
    return json.dumps(text, ensure_ascii=False)


def write_jinja(pattern: str, content: str = "") -> str:
    """A Jinja expression for a pattern; `content` is the expression for {}."""
    texts = [jinja_text(text) if text else "" for text in pattern.split("{}")]
    terms = [t for text in texts for t in (content, text)][1:]
    return "{{ " + " + ".join(filter(None, terms)) + " }}" if any(terms) else ""


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


# ---------------------------------------------------------------- a model's own template


def find_template(*places: Path) -> Template | None:
    """The template of the first folder or GGUF file that has one, Alpaca's if none has; None if
    that template is not in the registry."""
    jinja = read_jinja(*places)
    return recognize(jinja) if jinja else ALPACA


def read_jinja(*places: Path) -> str:
    """The Jinja program of the first folder or GGUF file that has one, or beside a file of another
    kind; "" if there is none."""
    for place in places:
        text, folder = None, place.parent if place.is_file() else place
        if is_gguf(place):
            text = read_gguf(place).metadata.get(TEMPLATE_KEY)
        elif (file := folder / JINJA_FILE).is_file():
            text = read_text(file, MAX_TEXT)
        elif (file := folder / "tokenizer_config.json").is_file():
            text = read_json(file).get("chat_template")
            if isinstance(text, list):  # several, by name
                named = [each for each in text if isinstance(each, dict)]
                text = next((t.get("template") for t in named if t.get("name") == "default"), None)
        if isinstance(text, str) and text:
            return text
    return ""


def literals(jinja: str) -> list[str]:
    """The string literals within {{ }} and {% %}, in order, without those in {# comments #}."""
    jinja = "".join(re.split(r"\{#|#\}", jinja)[::2])
    blocks = " ".join(re.split(r"\{[{%]|[%}]\}", jinja)[1::2])
    found = re.findall(r"(?s)\"((?:\\.|[^\"\\])*)\"|'((?:\\.|[^'\\])*)'", blocks)
    escaped = [(one or other).encode("ascii", "backslashreplace") for one, other in found]
    return [text.decode("unicode-escape", "replace") for text in escaped]


def find_system(template: Template, texts: list[str]) -> str | None:
    """The system message that one of a Jinja program's texts has where `template` puts it."""
    pattern = re.compile("(.+)".join(map(re.escape, template.first.split("{}"))), re.DOTALL)
    return next((found[1] for text in texts if (found := pattern.fullmatch(text))), None)


def recognize(jinja: str) -> Template | None:
    """The template that a Jinja program writes, judged by its string literals; None if unknown.

    The program decides the default system message, the date, and whether BOS comes first."""
    texts = literals(jinja)
    joined = "".join(texts)
    bos = "bos_token" in jinja or "<|begin_of_text|>" in joined
    trim = re.search(r"\|\s*trim|\.strip\(\)", jinja) is not None
    if "<|im_start|>" in joined and "<|im_end|>\n" in joined:
        return CHATML._replace(system=find_system(CHATML, texts), bos=bos, trim=trim)
    if "<|start_header_id|>" in joined and "<|eot_id|>" in joined:
        system = find_system(LLAMA3_CHAT, texts)
        template = LLAMA3_CHAT._replace(system=system, bos=bos, trim=trim)
        if cutoff := re.search(r"Cutting Knowledge Date: .*\n", joined):  # Llama 3.1 and later
            today = re.search(r"\d\d? [A-Z][a-z]{2} \d{4}", joined)
            dates = f"{cutoff[0]}Today Date: {today[0]}\n\n" if today else cutoff[0]
            first = LLAMA3_CHAT.first.replace("{}", dates + "{}")
            return template._replace(system="", first=first)
        return template
    for template in (ALPACA, VICUNA):
        if jinja.strip().removeprefix("{{ bos_token }}") == template.jinja():
            return template
    return None
