"""Known defects of instruction data, each a pattern or a small function.

    flags_of(cases, earlier)     the rules a record breaks: {"link": "the text to show", …}
    RULES                        name → (what it flags, function); a new rule is a new entry

They would rather miss a defect than flag a good record. What was found wrong in Alpaca's own 52,000
(links, tasks about pictures, instructions inside outputs, refusals, cut answers) is where they
come from. `alpaca curate lint` is the command.

Shown by tests/test_curate.py: test_a_defect_is_flagged.
"""

import re
import unicodedata
from typing import NamedTuple

from rougel import rouge_l, tokenize_unicode


class Case(NamedTuple):
    instruction: str
    input: str
    output: str
    again: bool  # an earlier record asks the same


def any_case(*alternatives: str) -> re.Pattern:
    return re.compile("|".join(alternatives), re.IGNORECASE | re.MULTILINE)


def around(pattern: re.Pattern, *texts: str) -> str:
    """What matches, with a little of what is around it, or ""."""
    for text in texts:
        if match := pattern.search(text.replace("’", "'")):
            return text[max(0, match.start() - 20) : max(match.end(), match.start() + 1) + 50]
    return ""


LINK = any_case(r"\b(?:https?|ftp)://\S", r"\bwww\.[a-z0-9-]+\.[a-z]")
SEEN = r"(?:pictures?|photos?|photographs?|images?|videos?|screenshots?|audio(?: clip| file)?)"
SEEN += r"(?=\s*(?:[.,:;?!]|$|(?:and|as|by|for|from|in|of|showing|that|to|using|with)\b))"
POINTED = r"\b(?:this|these|(?:the )?(?:following|given|provided|above))(?: [\w-]+){0,4}? "
SHOW_ME = any_case(POINTED + SEEN, POINTED + r"web ?(?:site|page)\b")
NEWS = r"(?:current|today's|tomorrow's|latest) (?:weather|news|headlines|stock price)"
BEYOND = any_case(  # what the whole instruction asks for, not what it mentions
    r"^(?:create|draw|find|generate|make|produce|show)(?: me)? (?:an? |the |some )?"
    r"(?:(?!mental|vivid|clear|word)[\w-]+ )?" + SEEN,
    r"^(?:analyze|describe|edit|identify|read|review|see|summarize|translate|use|using)\b"
    r"[^.?!\n]{0,40}\battached\b",
    r"^(?:click|open|follow|visit|go to)(?: on)? (?:this|the)(?: [\w-]+)? (?:link|url|web ?\w+)\b",
    rf"^(?:what|tell me|give me|find|look up|check|get|report|write)\b[^.?!\n]{{0,40}}\b(?:{NEWS}"
    r"|(?:weather|news|forecast)\b[^.?!\n]{0,30}\b(?:today|tomorrow|right now|this week))",
    r"^what(?: time is it|(?:'s| is) (?:the (?:current )?time|today's date))(?: now| in \w+)? ?\?",
    r"^(?:send|forward)\b.{0,30}\b(?:e-?mail|text message|sms)\b",
    r"^set (?:me )?(?:an?|the|my) (?:alarm|reminder|timer)\b",
)
LEAKED = any_case(  # a recipe has "Instructions:" of its own, and a program's run "Output:"
    r"^[ \t]*(?:\d{1,4}[.)][ \t]*)?[*]{0,2}instruction[*]{0,2}:",
    r"^[ \t]*\d{1,4}[.)][ \t]*(?:input|output):[ \t]*(?:<?no(?:in|out)put>?)?[ \t]*$",
    r"^[ \t]*###[ \t]*(?:(?:instruction|input|output|response)[ \t]*:|$)",
)
LABEL = any_case(r"^[ \t]*(?:(\d{1,4}[.)]|#{1,4})[ \t]*)?(input|output)[ \t]*:")
AN_AI = r"an? (?:(?:ai|artificial intelligence)(?: language)?(?: model| assistant)?"
AN_AI += r"|(?:large )?language model)(?:[,.]| and\b| so\b| i\b)"
REFUSAL = any_case(
    rf"\b(?:as|i'?m|i am) {AN_AI}[^\n]{{0,120}}?(?:\bcannot|n't|\bnot|\bunable)\b",
    r"\bi (?:cannot|can't|am unable|do not|don't)\b[^.\n]{0,80}\bas an? (?:ai|language model)\b",
    r"\A(?:unfortunately|(?:(?:i'm|i am) )?(?:very |so )?sorry),? (?:but )?(?:i (?:don't|do not) "
    r"have (?:access|enough|the ability)|i(?:'m| am)? (?:cannot|can't|unable to|not able to) (?:"
    r"access|answer|assist|determine|display|draw|estimate|fulfil|generate|open|predict|provide"
    r"|read|retrieve|see|view)|you (?:didn't|did not|have not|haven't) (?:given?|include|provide)"
    r"|the (?:data|input|information|text)\b[^.\n]{0,40}(?:n't|not) )",
)
NOTHING = ("na", "none", "noinput", "nooutput", "notapplicable", "someinput", "sometext")
PLACEHOLDER = any_case(
    r"\A(?:\w+: )?[\[<({]+ ?(?:add|enter|insert|input|paste|put|your)\b[\w ,']{0,50}[\])}>]+\.?\Z",
    r"\A(?:add|enter|insert|paste|put) (?:\w+ ){1,4}here\.?\Z",
)
BREAKS_OFF = any_case(r"\b(?:an?|and|because|into|its|of|or|than|the|their|which|whose|your)\Z")


def impossible(case: Case) -> str:
    """A picture that is only pointed to may be told in words, in an input of some length."""
    asked = re.sub("^(?:please|can you|could you),? ", "", case.instruction, flags=re.IGNORECASE)
    return around(BEYOND, asked) or (around(SHOW_ME, asked) if len(case.input.split()) < 8 else "")


def letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text).lower()


def empty_output(case: Case) -> str:
    told = letters(case.output) or any(unicodedata.category(c)[0] == "S" for c in case.output)
    return "" if told and told not in NOTHING else f"{case.output!r}: {case.instruction}"


def repeated_input(case: Case) -> str:
    a, b = case[:2]
    near = len(a) < 2 * len(b) < 4 * len(a) and rouge_l(a, b, tokenize_unicode) > 0.9
    return b if near else ""


def merged_fields(case: Case) -> str:
    """In an input "Output:" alone may belong there, where the instruction speaks of an output or
    examples are given."""
    labels = LABEL.findall(case.input.lower())
    alone = labels == [("", "output")] and "output" not in case.instruction.lower()
    leaked = alone or any(mark and field == "output" for mark, field in labels)
    return around(LABEL, case.instruction) or (around(LABEL, case.input) if leaked else "")


def placeholder_input(case: Case) -> str:
    given = case.input.strip()
    return given if letters(given) in NOTHING else around(PLACEHOLDER, given)


def cut_output(case: Case) -> str:
    output = case.output.rstrip()
    last = output[output.rfind("\n") + 1 :]
    long = len(last.split()) > 4  # a word alone may be the answer, and "Best regards," an ending
    broken = long and (last.endswith(",") or BREAKS_OFF.search(last))
    return "…" + output[-60:] if broken or output.count("```") % 2 else ""


RULES = {  # name: what it flags, and how: the text to show as an example, or ""
    "link": ("a URL in a field", lambda case: around(LINK, *case[:3])),
    "impossible": ("asks for what a text model cannot do", impossible),
    "instruction in output": ("the next task's labels", lambda case: around(LEAKED, case.output)),
    "empty output": ("nothing, or punctuation, or N/A", empty_output),
    "refusal": ("the answer is that there is none", lambda c: around(REFUSAL, c.output[:400])),
    "repeated input": ("the input says the instruction again", repeated_input),
    "merged fields": ("a field's label inside another field", merged_fields),
    "placeholder input": ("an input that says there is none", placeholder_input),
    "cut output": ("ends within a sentence or a code fence", cut_output),
    "duplicate": ("an earlier record asks the same", lambda c: c.instruction if c.again else ""),
}


def flags_of(known: list[dict], earlier: set[tuple]) -> dict[str, str]:
    """The rules that a record breaks, each with the text to show."""
    flags: dict[str, str] = {}
    asked = [tuple(" ".join(c[name].split()) for name in ("instruction", "input")) for c in known]
    for case, key in zip(known, asked, strict=True):
        given = Case(**case, again=key in earlier)
        flags = {name: text for name, (_, rule) in RULES.items() if (text := rule(given))} | flags
    earlier.update(asked)
    return flags
