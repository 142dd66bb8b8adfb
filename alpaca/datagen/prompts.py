"""Tasks as text: the prompt for a teacher, the parser of its answer, and Alpaca's filters.

    alpaca_prompt(header, seeds)      three seed tasks, then "###" and "4. Instruction:"
    parse_tasks(text, truncated)      the tasks of an answer, each complete or with a reason why not
    reject_reason(instruction)        why Alpaca's filters drop an instruction, or ""

A completion model continues where the prompt stopped, in the middle of task 4. Chat models start
over, each in its own format: markdown, other numbers, no numbers, no ###, code fences. The parser
relies on the labels (Instruction, Input, Output) at the start of a line. If labels are numbered, a
label without a number, or with the number of an earlier task, is part of a task's text. A line that
begins with ### ends a task, as in Alpaca's script, so that a task without labels is not taken for
the output of the one before; longer headings (####) are text.
"""

import itertools
import re
import string
from typing import NamedTuple

from rougel import tokenize_unicode

NO_INPUT = "<noinput>"
LABEL_ORDER = ("instruction", "input", "output")
BEYOND_TEXT = re.compile(  # asks for what a text model cannot do
    r"\b(images?|graphs?|pictures?|files?|maps?|draw|plot|go to|video|audio|music|flowchart"
    r"|diagram)\b",
    re.IGNORECASE,
)
# `4. Instruction:`, `* **Input:**`, `### Output 4`, `Task 4: Instruction:`
TASK_LABEL = re.compile(
    r"""^(?=.{0,60}(?:instruction|input|output))              # other lines fail at once
    (?:[ \t>•+-]|\*[ \t])*+(?P<mark>[#*_]+)?[ \t]*+          # a bullet, then ### or **
    (?:(?:task|example|item|no\.?)?[ \t]*+\#?\(?(?P<number>\d{1,2})
       [ \t]*+[.):–-]*[ \t*_]*+)?                            # "Task 4:", "(4)" or "4."
    (?P<field>instruction|input|output)s?
    (?:[ \t]++(?P<after>\d{1,2}))?[*_`]*                     # "Output 4"
    (?:[ \t]*+:[*_`]*|(?(mark)[ \t]*+$|(?!)))[ \t]*+         # a colon, or a marked line's end
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
FENCE = re.compile(r"^[ \t]*```.*$", re.MULTILINE)
SEPARATOR = re.compile(r"```\w*|#{2,}|[-*_=]{3,}")  # a line between two tasks, part of neither
HEADING = re.compile(  # a line before a task
    r"#{2,}[ \t]*(task|example|item)?[ \t]*#?\d+\b.*"
    r"|\*\*[ \t]*(task|example|item)?[ \t]*#?\d+\b.*\*\*:?|(task|example|item)[ \t]*#?\d+\b.{0,60}",
    re.IGNORECASE,
)
END_MARK = re.compile(r"^[ \t]*###(?=\s|\Z)", re.MULTILINE)
NO_INPUT_TEXT = re.compile(  # what teachers write instead of an input
    r"""[\s`*"'(\[<_\\]*(?:no[\s_-]*input(?:[ ](?:is[ ])?(?:needed|required))?|none|n/a|n\.a
    |not[ ]applicable|-)?[\s`*"')\]>._\\]*""",
    re.IGNORECASE | re.VERBOSE,
)
CUT_AT_20 = re.compile(r"(?:\S+\s+){3,}\d{1,2}")  # "… in 19": Alpaca's stop "20." also ends "1920."


class Task(NamedTuple):
    instruction: str
    input: str
    output: str
    reason: str = ""  # why it cannot be used: "format" or "cut"


class Label(NamedTuple):
    number: int  # -1 if it has none
    field: str
    start: int
    end: int


def alpaca_prompt(header: str, seeds: list[dict]) -> str:
    """The request in the layout of Alpaca's script."""
    parts = [header]
    for number, seed in enumerate(seeds, 1):
        instruction = " ".join(seed["instruction"].split()).rstrip(":")
        case = seed["instances"][0]
        parts.append(f"###\n{number}. Instruction: {instruction}\n")
        parts.append(f"{number}. Input:\n{case['input'] or NO_INPUT}\n")
        parts.append(f"{number}. Output:\n{case['output']}\n")
    return "".join([*parts, f"###\n{len(seeds) + 1}. Instruction:"])


# ---------------------------------------------------------------- the parser


def make_task(instruction: str, given: str, output: str) -> Task:
    if NO_INPUT in instruction[-20:].lower():  # <noinput> in a line of its own, without a label
        instruction = instruction[: instruction.lower().rindex(NO_INPUT)].strip()
    given = "" if NO_INPUT_TEXT.fullmatch(given) else given
    return Task(instruction, given, output, "" if instruction and output else "format")


def remove_outer_fence(text: str) -> str:
    """The inside of a code fence around all tasks."""
    fences, labels = ([m.start() for m in p.finditer(text)] for p in (FENCE, TASK_LABEL))
    if len(fences) % 2 or not fences or not labels:
        return text
    outer = fences[0] < labels[0] < fences[1] and labels[-1] < fences[-1]
    return text[text.find("\n", fences[0]) : fences[-1]] if outer else text


def restore_first_label(text: str) -> str:
    """Put the prompt's last words before an answer that continues from them."""
    labels = list(TASK_LABEL.finditer(text))
    numbered = [label for label in labels if label["number"]]  # others may be part of a text
    first = next(iter(numbered or labels), None)
    if not first or first["field"].lower() == "instruction":
        return text
    number = first["number"] or first["after"]
    return f"{number}. Instruction: {text}" if number else f"Instruction: {text}"


def group_labels(text: str) -> list[list[Label]]:
    """The labels of each task."""
    labels = [
        Label(int(m["number"] or m["after"] or -1), m["field"].lower(), *m.span())
        for m in TASK_LABEL.finditer(text)
    ]
    numbered = any(x.number >= 0 for x in labels if x.field == "instruction")
    tasks: list[list[Label]] = []
    current = -1
    for label in labels:
        if numbered:
            begins = current < label.number <= current + 20  # the next tasks of a list of 20
        else:
            begins = label.field == "instruction"
        if begins:
            current = label.number if numbered else -1
            tasks.append([label])
        elif tasks and label.number in (-1, current):
            tasks[-1].append(label)
    return tasks


def before_heading(text: str, start: int) -> int:
    """Where the lines before a task start that belong to no task: ###, headings, fences, blanks.
    At the end of the text there is no task, and so no heading."""
    at_end = start == len(text)
    while start > 0:
        line_start = text.rfind("\n", 0, start - 1) + 1
        line = text[line_start:start].strip()
        if line and not SEPARATOR.fullmatch(line) and (at_end or not HEADING.fullmatch(line)):
            break
        start = line_start
    return start


def task_from_labels(text: str, labels: list[Label]) -> Task:
    """The task between these labels: an instruction, perhaps an input, and an output. A label with
    the task's number takes precedence over one without, which may be part of a text."""
    chosen = labels[:1]
    for field in ("input", "output"):
        later = [x for x in labels if x.field == field and x.start > chosen[-1].start]
        numbered = [x for x in later if x.number >= 0]
        chosen += (numbered or later)[:1]
        if len(numbered or later) > 1 and (numbered or field == "output"):
            return Task("", "", "", "format")  # two tasks in one
    ends = [*(label.start for label in chosen[1:]), len(text)]
    fields = {x.field: text[x.end : end].strip() for x, end in zip(chosen, ends, strict=True)}
    instruction, output = (fields.get(name, "") for name in ("instruction", "output"))
    if len(FENCE.findall(output)) % 2:  # its closing fence was taken for a separator
        output += "\n```"
    return make_task(instruction, fields.get("input", ""), output)


def split_sections(text: str) -> list[str]:
    """Split at the lines with ###, except where such a line is the next label of the same task:
    ### Output after ### Input."""
    starts = [0]
    for mark in END_MARK.finditer(text):
        labels = TASK_LABEL.finditer(text, starts[-1], mark.start())
        seen = [LABEL_ORDER.index(label["field"].lower()) for label in labels]
        label = TASK_LABEL.match(text, mark.start())
        if not label or not seen or LABEL_ORDER.index(label["field"].lower()) <= max(seen):
            starts.append(mark.start())
    return [text[start:end] for start, end in itertools.pairwise([*starts, len(text)])]


def parse_section(text: str) -> list[Task]:
    """The tasks between the labels."""
    groups = group_labels(text)
    next_starts = [*(labels[0].start for labels in groups), len(text)][1:]
    ends = (before_heading(text, start) for start in next_starts)
    return [task_from_labels(text[:end], labels) for end, labels in zip(ends, groups, strict=True)]


def parse_tasks(text: str, truncated: bool = False) -> list[Task]:
    """The tasks of an answer, in order. If it was truncated, its last task is incomplete."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").rpartition("</think>")[2]
    text = remove_outer_fence(text)
    sections = [parse_section(part) for part in split_sections(restore_first_label(text))]
    last = sections[-1]
    if last and (truncated or CUT_AT_20.fullmatch(last[-1].output)):
        last[-1] = last[-1]._replace(reason="cut")
    return [task for tasks in sections for task in tasks]


# ---------------------------------------------------------------- the filters


def reject_reason(instruction: str, any_script: bool = False) -> str:
    """Why Alpaca's filters drop an instruction, or "". (ROUGE-L comes after them.) `any_script`
    allows other scripts: an instruction may start with 写, and words are counted accordingly."""
    words = len(tokenize_unicode(instruction) if any_script else instruction.split())
    if words <= 3:
        return "short"
    if words > 150:
        return "long"
    if match := BEYOND_TEXT.search(instruction):
        return f"asks for {match[0].lower()}"
    if instruction.startswith("Write a program"):
        return "program"
    if instruction[0] in string.punctuation:
        return "punctuation"
    if not any_script and not instruction[0].isascii():
        return "not ASCII"
    return ""
