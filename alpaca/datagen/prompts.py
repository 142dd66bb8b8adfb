"""Tasks as text: the prompt a teacher gets, what it sends back, and which of it Alpaca would keep.

    alpaca_prompt(header, seeds)    Alpaca's request: three seeds, then "###" and "4. Instruction:"
    parse(text, cut)                what came back → tasks, each whole or with the reason it is not
    unfit(instruction)              why Alpaca's filters drop an instruction, or ""

A completion goes on where the prompt stopped, in the middle of task 4. Chat models begin anew, and
each in its own way: markdown, other numbers, no numbers, no ###, code fences. `parse` goes by the
labels (Instruction, Input, Output) at the start of a line. Where labels carry numbers, a label
without one, or with an earlier task's, does not begin a task: it is part of one.

Shown by tests/test_tasks.py: test_two_tasks_however_they_are_sent.
"""

import json
import re
import string
from typing import NamedTuple

from alpaca.common.errors import replace_surrogates
from rougel import tokenize_unicode

NO_INPUT = "<noinput>"
BEYOND_TEXT = re.compile(  # asks for what a model that reads and writes text alone cannot do
    r"\b(images?|graphs?|pictures?|files?|maps?|draw|plot|go to|video|audio|music|flowchart"
    r"|diagram)\b",
    re.IGNORECASE,
)
TASK_LABEL = (
    re.compile(  # `4. Instruction:`, `* **Input:**`, `### Output 4`, `Task 4: Instruction:` …
        r"""^(?=.{0,40}\n?.{0,20}(?:instruction|input|output))
    (?:[ \t>•+-]|\*[ \t])*+(?P<mark>[\[#*_]+)?[ \t]*+
    (?:(?:task|example|item|no\.?)?[ \t]*+\#?\(?(?P<number>\d{1,2})
       (?:[ \t]*+[.):–-]*[ \t*_]*+|[.):][*_]*[ \t]*+\n[ \t*_]*+))?
    (?P<field>instruction|input|output)s?(?:[ \t]++(?P<after>\d{1,2}))?[\]*_`]*
    (?:[ \t]*+[:：][*_`]*|(?(mark)[ \t]*+$|(?!)))[ \t]*+""",
        re.IGNORECASE | re.MULTILINE | re.VERBOSE,
    )
)
FENCE = re.compile(r"^[ \t]*```.*$", re.MULTILINE)
BETWEEN = re.compile(  # a line between two tasks that belongs to neither
    r"```\w*|#{2,}|[-*_=]{3,}|#{2,}[ \t]*(task|example|item)?[ \t]*#?\d+\b.*"
    r"|\*\*[ \t]*(task|example|item)?[ \t]*#?\d+\b.*\*\*:?|(task|example|item)[ \t]*#?\d+\b.{0,60}",
    re.IGNORECASE,
)
LAST_LINE = re.compile(r"^[ \t]*###[ \t]*$", re.MULTILINE)
NO_INPUT_TEXT = re.compile(  # instead of an input
    r"""[\s`*"'(\[<_\\]*(?:no[\s_-]*input(?:[ ](?:is[ ])?(?:needed|required))?|none|n/a|n\.a
    |not[ ]applicable|-)?[\s`*"')\]>._\\]*""",
    re.IGNORECASE | re.VERBOSE,
)
AT_20 = re.compile(r"(?:\S+\s+){3,}\d{1,2}")  # "… in 19": Alpaca's stop at `20.` met 1920.


class Task(NamedTuple):
    instruction: str
    input: str
    output: str
    why: str = ""  # it cannot be used: "format" or "cut"


def alpaca_prompt(header: str, seeds: list[dict]) -> str:
    """The request, as Alpaca's script lays it out."""
    parts = [header]
    for number, seed in enumerate(seeds, 1):
        instruction = " ".join(seed["instruction"].split()).rstrip(":")
        case = seed["instances"][0]
        parts.append(f"###\n{number}. Instruction: {instruction}\n")
        parts.append(f"{number}. Input:\n{case['input'] or NO_INPUT}\n")
        parts.append(f"{number}. Output:\n{case['output']}\n")
    return "".join([*parts, f"###\n{len(seeds) + 1}. Instruction:"])


class Label(NamedTuple):
    number: int | None
    field: str
    start: int
    end: int


def parse_tasks(text: str, cut: bool = False) -> list[Task]:
    """The tasks of a response, in order. `cut` says that the answer ran into its limit, so the last
    task is not all there."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").rpartition("</think>")[2]
    text = unfenced(text)
    tasks = parse_json(text) or labelled(whole_first(text))
    if tasks and (cut or AT_20.fullmatch(tasks[-1].output)):
        tasks[-1] = tasks[-1]._replace(why="cut")
    return tasks


def labelled(text: str) -> list[Task]:
    """The tasks between the labels; after the last ### there may be a closing remark."""
    grouped = by_task(text)
    if not grouped:
        return []
    ends = [*(before_heading(text, labels[0].start) for labels in grouped[1:]), len(text)]
    closing = [line.start() for line in LAST_LINE.finditer(text, grouped[-1][-1].end)]
    ends[-1] = before_heading(text, closing[-1] if closing else len(text))
    return [task_of(text[:end], labels) for labels, end in zip(grouped, ends, strict=True)]


def whole_first(text: str) -> str:
    """The text, before it the words that the prompt ended with if the answer goes on from there."""
    labels = list(TASK_LABEL.finditer(text))
    if not labels or labels[0]["field"].lower() == "instruction":
        return text
    if number := labels[0]["number"] or labels[0]["after"]:
        return f"{number}. Instruction: {text}"
    numbered = any(x["number"] and x["field"].lower() == "instruction" for x in labels)
    return text if numbered else f"Instruction: {text}"


def parse_json(text: str) -> list[Task]:
    """The tasks of a JSON list, if that is what it is."""
    text, tasks = FENCE.sub("", text).strip(), []
    try:
        found = json.loads(text) if text.startswith("[{") else []
    except (ValueError, RecursionError):
        found = []
    for one in found:
        fields = one if isinstance(one, dict) else {}
        told = (str(fields.get(name) or "").strip() for name in ("instruction", "input", "output"))
        tasks.append(make_task(*map(replace_surrogates, told)))
    return tasks


def unfenced(text: str) -> str:
    """The inside of a code fence that is around all tasks."""
    fences, label = list(FENCE.finditer(text)), TASK_LABEL.search(text)
    if label and fences and fences[0].start() < label.start() and len(fences) % 2 == 0:
        return text[fences[0].end() : fences[-1].start()]
    return text


def by_task(text: str) -> list[list[Label]]:
    """The labels of each task."""
    labels = [
        Label(int(n) if (n := m["number"] or m["after"]) else None, m["field"].lower(), *m.span())
        for m in TASK_LABEL.finditer(text)
    ]
    numbered = any(x.number is not None for x in labels if x.field == "instruction")
    tasks: list[list[Label]] = []
    current = -1
    for label in labels:
        if numbered:
            begins = label.number is not None and current < label.number <= current + 20
        else:
            begins = label.field == "instruction"
        if begins:
            current = label.number if numbered else current
            tasks.append([label])
        elif tasks and label.number in (None, current):
            tasks[-1].append(label)
    return tasks


def before_heading(text: str, start: int) -> int:
    """Where the lines begin that announce a task: ###, a heading, a fence, nothing."""
    while start > 0:
        line_start = text.rfind("\n", 0, start - 1) + 1
        line = text[line_start:start].strip()
        if line and not BETWEEN.fullmatch(line):
            break
        start = line_start
    return start


def task_of(text: str, labels: list[Label]) -> Task:
    """A task from its labels: an instruction, an input perhaps, and an output, in this order. A
    label with the task's number goes before one without, which may be part of a text."""
    chosen = labels[:1]
    for field in ("input", "output"):
        later = [x for x in labels if x.field == field and x.start > chosen[-1].start]
        numbered = [x for x in later if x.number is not None]
        chosen += (numbered or later)[:1]
        if len(numbered or later) > 1 and (numbered or field == "output"):
            return Task("", "", "", "format")  # two tasks in one
    ends = [*(label.start for label in chosen[1:]), len(text)]
    fields = {x.field: text[x.end : end].strip() for x, end in zip(chosen, ends, strict=True)}
    instruction, output = (fields.get(name, "") for name in ("instruction", "output"))
    if len(FENCE.findall(output)) % 2:  # its end was taken for the line between two tasks
        output += "\n```"
    return make_task(instruction, fields.get("input", ""), output)


def make_task(instruction: str, given: str, output: str) -> Task:
    if NO_INPUT in instruction[-20:].lower():  # a line of its own, without a label
        instruction = instruction[: instruction.lower().rindex(NO_INPUT)].strip()
    given = "" if NO_INPUT_TEXT.fullmatch(given) else given
    return Task(instruction, given, output, "" if instruction and output else "format")


def reject_reason(instruction: str, any_script: bool = False) -> str:
    """Why Alpaca's filters drop an instruction, or "". The ROUGE-L filter is the pool's. With
    `any_script` it may be Chinese: words are counted as that is written, and may begin with 写."""
    words = len(tokenize_unicode(instruction) if any_script else instruction.split())
    if words <= 3:
        return "short"
    if words > 150:
        return "long"
    if found := BEYOND_TEXT.search(instruction):
        return f"asks for {found[0].lower()}"
    if instruction.startswith("Write a program"):
        return "program"
    if instruction[0] in string.punctuation:
        return "punctuation"
    if not any_script and not instruction[0].isascii():
        return "not ASCII"
    return ""
