"""Chat templates as Jinja programs, the form in which a model's folder holds its own.

    jinja = to_jinja(TEMPLATES["chatml"])      # for transformers, llama.cpp and others
    template = find_template(Path("smollm2"))

A program that somebody else wrote is never executed: `recognize` looks at its string literals.
"""

import json
import re
from pathlib import Path

from alpaca.common.files import read_text
from alpaca.common.gguf_file import MAX_TEXT, is_gguf, read_gguf
from alpaca.common.json_files import read_json
from templates import ALPACA, CHATML, LLAMA3_CHAT, VICUNA, Template

JINJA_FILE, TEMPLATE_KEY = "chat_template.jinja", "tokenizer.chat_template"

# ---------------------------------------------------------------- a template → Jinja


def jinja_text(text: str) -> str:
    """JSON's quotation marks and escapes are Jinja's too."""
    return json.dumps(text, ensure_ascii=False)


def write_jinja(pattern: str, content: str = "") -> str:
    """A Jinja expression for a pattern; `content` is the expression for {}."""
    texts = [jinja_text(text) if text else "" for text in pattern.split("{}")]
    terms = [t for text in texts for t in (content, text)][1:]
    return "{{ " + " + ".join(filter(None, terms)) + " }}" if any(terms) else ""


def to_jinja(template: Template, bos: bool = False) -> str:
    """For transformers, llama.cpp and others; `bos` replaces a template.bos of None."""
    content = "(message['content'] | trim)" if template.trim else "message['content']"
    end = jinja_text(template.end) if template.end else "eos_token"
    first = write_jinja(template.first, content.replace("message[", "messages[0]["))
    answer = write_jinja(template.reply + template.answer, content), write_jinja(template.after)
    default = ""
    if template.system is not None:
        default = "{{ " + jinja_text(template.first.replace("{}", template.system)) + " }}"
    parts = [
        "{{ bos_token }}" * (bos if template.bos is None else template.bos),
        "{% if messages[0]['role'] == 'system' %}" + first,
        "{% else %}" * bool(default) + default + "{% endif %}",
        "{% for message in messages %}{% if message['role'] == 'user' %}",
        write_jinja(template.user, content),
        "{% elif message['role'] == 'assistant' %}",
        answer[0] + "{{ " + end + " }}" + answer[1],
        "{% endif %}{% endfor %}",
        "{% if add_generation_prompt %}" + write_jinja(template.reply) + "{% endif %}",
    ]
    return "".join(parts)


# ---------------------------------------------------------------- Jinja → a template


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
        if jinja.strip().removeprefix("{{ bos_token }}") == to_jinja(template):
            return template
    return None
