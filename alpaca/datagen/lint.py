"""Known defects of instruction data, each found by a pattern or a small function.

    find_defects(instances, earlier)   the rules that a record breaks: {"link": "the text found", …}
    RULES                              name → (description, function); add a rule by adding an entry

The rules come from defects in Alpaca's own 52,000 records: links, tasks about pictures,
instructions inside outputs, refusals, cut answers. They would rather miss a defect than flag a good
record. `alpaca curate lint` is the command.
"""

import re
import unicodedata
from typing import NamedTuple

from rougel import rouge_l, tokenize_unicode


class Instance(NamedTuple):
    instruction: str
    input: str
    output: str
    duplicate: bool  # an earlier record has the same instruction and input


def any_of(*patterns: str) -> re.Pattern:
    return re.compile("|".join(patterns), re.IGNORECASE | re.MULTILINE)


def excerpt(pattern: re.Pattern, *texts: str) -> str:
    """The first match with a little of its context, or ""."""
    for text in texts:
        if match := pattern.search(text.replace("’", "'")):
            return text[max(0, match.start() - 20) : max(match.end(), match.start() + 1) + 50]
    return ""


LINK = any_of(r"\b(?:https?|ftp)://\S", r"\bwww\.[a-z0-9-]+\.[a-z]")
MEDIA = r"(?:pictures?|photos?|photographs?|images?|videos?|screenshots?|audio(?: clip| file)?)"
MEDIA += r"(?=\s*(?:[.,:;?!]|$|(?:and|as|by|for|from|in|of|showing|that|to|using|with)\b))"
THIS = r"\b(?:this|these|(?:the )?(?:following|given|provided|above))(?: [\w-]+){0,4}? "
THIS_MEDIA = any_of(THIS + MEDIA, THIS + r"web ?(?:site|page)\b")
NEWS = r"(?:current|today's|tomorrow's|latest) (?:weather|news|headlines|stock price)"
IMPOSSIBLE = any_of(  # anchored: what the whole instruction asks for, not what it mentions
    r"^(?:create|draw|find|generate|make|produce|show)(?: me)? (?:an? |the |some )?"
    r"(?:(?!mental|vivid|clear|word)[\w-]+ )?" + MEDIA,
    r"^(?:analyze|describe|edit|identify|read|review|see|summarize|translate|use|using)\b"
    r"[^.?!\n]{0,40}\battached\b",
    r"^(?:click|open|follow|visit|go to)(?: on)? (?:this|the)(?: [\w-]+)? (?:link|url|web ?\w+)\b",
    rf"^(?:what|tell me|give me|find|look up|check|get|report|write)\b[^.?!\n]{{0,40}}\b(?:{NEWS}"
    r"|(?:weather|news|forecast)\b[^.?!\n]{0,30}\b(?:today|tomorrow|right now|this week))",
    r"^what(?: time is it|(?:'s| is) (?:the (?:current )?time|today's date))(?: now| in \w+)? ?\?",
    r"^(?:send|forward)\b.{0,30}\b(?:e-?mail|text message|sms)\b",
    r"^set (?:me )?(?:an?|the|my) (?:alarm|reminder|timer)\b",
)
NEXT_TASK = any_of(  # not a recipe's own "Instructions:", nor a program's "Output:"
    r"^[ \t]*(?:\d{1,4}[.)][ \t]*)?[*]{0,2}instruction[*]{0,2}:",
    r"^[ \t]*\d{1,4}[.)][ \t]*(?:input|output):[ \t]*(?:<?no(?:in|out)put>?)?[ \t]*$",
    r"^[ \t]*###[ \t]*(?:(?:instruction|input|output|response)[ \t]*:|$)",
)
LABEL = any_of(r"^[ \t]*(?:(\d{1,4}[.)]|#{1,4})[ \t]*)?(input|output)[ \t]*:")
AN_AI = r"an? (?:(?:ai|artificial intelligence)(?: language)?(?: model| assistant)?"
AN_AI += r"|(?:large )?language model)(?:[,.]| and\b| so\b| i\b)"
REFUSAL = any_of(
    rf"\b(?:as|i'?m|i am) {AN_AI}[^\n]{{0,120}}?(?:\bcannot|n't|\bnot|\bunable)\b",
    r"\bi (?:cannot|can't|am unable|do not|don't)\b[^.\n]{0,80}\bas an? (?:ai|language model)\b",
    r"\A(?:unfortunately|(?:(?:i'm|i am) )?(?:very |so )?sorry),? (?:but )?(?:i (?:don't|do not) "
    r"have (?:access|enough|the ability)|i(?:'m| am)? (?:cannot|can't|unable to|not able to) (?:"
    r"access|answer|assist|determine|display|draw|estimate|fulfil|generate|open|predict|provide"
    r"|read|retrieve|see|view)|you (?:didn't|did not|have not|haven't) (?:given?|include|provide)"
    r"|the (?:data|input|information|text)\b[^.\n]{0,40}(?:n't|not) )",
)
NOTHING = ("na", "none", "noinput", "nooutput", "notapplicable", "someinput", "sometext")
PLACEHOLDER = any_of(
    r"\A(?:\w+: )?[\[<({]+ ?(?:add|enter|insert|input|paste|put|your)\b[\w ,']{0,50}[\])}>]+\.?\Z",
    r"\A(?:add|enter|insert|paste|put) (?:\w+ ){1,4}here\.?\Z",
)
MID_SENTENCE = any_of(r"\b(?:an?|and|because|into|its|of|or|than|the|their|which|whose|your)\Z")


def impossible(case: Instance) -> str:
    """A longer input may describe the picture that the instruction is about."""
    request = re.sub("^(?:please|can you|could you),? ", "", case.instruction, flags=re.IGNORECASE)
    short_input = len(case.input.split()) < 8
    return excerpt(IMPOSSIBLE, request) or (excerpt(THIS_MEDIA, request) if short_input else "")


def letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text).lower()


def empty_output(case: Instance) -> str:
    symbol = any(unicodedata.category(c)[0] == "S" for c in case.output)  # "==" may be an answer
    empty = not (letters(case.output) or symbol) or letters(case.output) in NOTHING
    return f"{case.output!r}: {case.instruction}" if empty else ""


def repeated_input(case: Instance) -> str:
    a, b = case.instruction, case.input
    similar_length = len(a) < 2 * len(b) < 4 * len(a)
    return b if similar_length and rouge_l(a, b, tokenize_unicode) > 0.9 else ""


def merged_fields(case: Instance) -> str:
    """A label in the wrong field; but "Output:" is fine in an input with other labels, or if the
    instruction mentions it."""
    labels = LABEL.findall(case.input.lower())
    unexpected = labels == [("", "output")] and "output" not in case.instruction.lower()
    unexpected = unexpected or any(mark and field == "output" for mark, field in labels)
    return excerpt(LABEL, case.instruction) or (excerpt(LABEL, case.input) if unexpected else "")


def placeholder_input(case: Instance) -> str:
    text = case.input.strip()
    return text if letters(text) in NOTHING else excerpt(PLACEHOLDER, text)


def cut_output(case: Instance) -> str:
    output = case.output.rstrip()
    last = output[output.rfind("\n") + 1 :]
    long = len(last.split()) > 4  # "the" may be the answer, and "Best regards," an ending
    cut = long and (last.endswith(",") or MID_SENTENCE.search(last))
    return "…" + output[-60:] if cut or output.count("```") % 2 else ""


RULES = {  # name → (what it flags, a function that gives the text to show, or "")
    "link": ("a URL in a field", lambda case: excerpt(LINK, *case[:3])),
    "impossible": ("asks for what a text model cannot do", impossible),
    "instruction in output": ("the next task's labels", lambda c: excerpt(NEXT_TASK, c.output)),
    "empty output": ("nothing, or punctuation, or N/A", empty_output),
    "refusal": ("the answer is a refusal", lambda case: excerpt(REFUSAL, case.output[:400])),
    "repeated input": ("the input repeats the instruction", repeated_input),
    "merged fields": ("a field's label inside another field", merged_fields),
    "placeholder input": ("an input that says there is none", placeholder_input),
    "cut output": ("ends within a sentence or a code fence", cut_output),
    "duplicate": (
        "an earlier record asks the same",
        lambda c: c.instruction if c.duplicate else "",
    ),
}


def find_defects(instances: list[dict], earlier: set[tuple]) -> dict[str, str]:
    """The rules that a record breaks in any of its instances, each with the text to show.
    `earlier` collects what the records so far ask."""
    found: dict[str, str] = {}
    keys = [tuple(" ".join(i[f].split()) for f in ("instruction", "input")) for i in instances]
    for instance, key in zip(instances, keys, strict=True):
        case = Instance(**instance, duplicate=key in earlier)
        found = {name: text for name, (_, rule) in RULES.items() if (text := rule(case))} | found
    earlier.update(keys)
    return found
