"""The prompt, the parser on the formats that teachers send, and Alpaca's filters."""

import random
import re

import pytest
from helpers.commands import ROOT

from alpaca.common.json_files import read_log
from alpaca.datagen.prompts import Task, alpaca_prompt, parse_tasks, reject_reason

BEYOND_TEXT = (
    "image|images|graph|graphs|picture|pictures|file|files|map|maps|draw|plot|video|audio|music"
    "|flowchart|diagram"
)
TWO = [
    Task("Name a primary colour.", "", "Red"),
    Task("Translate to French.", "Good day\nand good night", "Bonjour\net bonne nuit"),
]
FIELDS = "{n}. Instruction: {i}\n{n}. Input: {x}\n{n}. Output: {o}"
NEWLINES = FIELDS.replace("t: {", "t:\n{")
PLAIN = "Instruction: {i}\nInput: {x}\nOutput: {o}"
FORMATS = {  # layout of a task, text between two, what stands for no input, text before and after
    "completion": (NEWLINES, "\n###\n", "<noinput>", "", "\n###\n"),
    "one line": (FIELDS, "\n\n", "<noinput>", "", ""),
    "markdown": (
        "### Task {n}\n**Instruction:** {i}\n**Input:** {x}\n\n**Output:**\n{o}",
        "\n\n---\n\n", "`<noinput>`", "Sure! Here are the tasks you asked for:\n\n", "\n",
    ),
    "bold numbers": (
        "**{n}. Instruction:** {i}\n**{n}. Input**: {x}\n**{n}. Output**: {o}",
        "\n###\n", "N/A", "", "",
    ),
    "headings": (
        "#### Instruction {n}\n{i}\n#### Input {n}\n{x}\n#### Output {n}\n{o}",
        "\n\n", "(no input)", "", "",
    ),
    "only the instruction has a number": ("{n}) " + PLAIN, "\n", "none", "", ""),
    "a fence around everything": (
        NEWLINES, "\n###\n", "<noinput>", "Here you are:\n```text\n", "\n```\nI hope this helps!"
    ),
    "a fence around each": ("```\n" + PLAIN + "\n```", "\n\n", "<no input>", "", ""),
    "bullets": (
        "{n}. **Instruction:** {i}\n   * **Input:** {x}\n   * **Output:** {o}",
        "\n\n", "<noinput>", "", "",
    ),
    "round brackets": (FIELDS.replace("{n}.", "({n})"), "\n", "No input required.", "", ""),
    "titles and a closing remark": (
        FIELDS, "\n\n**Task 5: Greetings**\n", '""',
        "Each task has an\nInput: and an output.\n\n**4. Colours**\n",
        "\n###\nThese tasks cover many kinds of work.",
    ),
    "thoughts first": (
        FIELDS, "\n", "<noinput>",
        "<think>\n4. Instruction: something\n4. Input: perhaps\n</think>\n", "",
    ),
}  # fmt: skip


def in_format(name: str, number: int = 4) -> str:
    """The two tasks as a teacher sends them."""
    layout, between, no_input, before, after = FORMATS[name]
    tasks = [
        layout.format(n=number + k, i=task.instruction, x=task.input or no_input, o=task.output)
        for k, task in enumerate(TWO)
    ]
    return before + between.join(tasks) + after


SENT = {name: in_format(name) for name in FORMATS}
SENT["numbers from one"] = in_format("one line", 1)
SENT["numbers from zero"] = in_format("one line", 0)
SENT["completion"] = SENT["completion"].removeprefix("4. Instruction:")
unlabelled = SENT["only the instruction has a number"]
SENT["no label for no input"] = unlabelled.replace("Input: none\n", "<noinput>\n")
SENT["no input field"] = unlabelled.replace("Input: none\n", "")


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("form", SENT)
def test_parse_tasks_reads_every_format(form, newline):
    assert parse_tasks(SENT[form].replace("\n", newline)) == TWO


def test_parse_tasks_rejects_the_last_task_of_a_truncated_answer():
    complete = ("completion", "titles and a closing remark")  # ### follows the last
    for form, text in SENT.items():
        first, last = parse_tasks(text, truncated=True)
        assert first == TWO[0] and last.reason == ("" if form in complete else "cut")


def test_parse_tasks_reads_our_own_prompt():
    seeds = list(read_log(ROOT / "data/seed_tasks.jsonl"))
    for start in range(0, 175, 7):
        some = seeds[start : start + 7]
        text = alpaca_prompt("", some).removesuffix("###\n8. Instruction:")
        assert parse_tasks(text) == [
            Task(s["instruction"].rstrip(":"), case["input"].strip(), case["output"].strip())
            for s in some
            for case in s["instances"][:1]
        ]


def test_alpaca_prompt_has_alpaca_s_layout():
    seeds = [
        {"instruction": "Say  it\nagain: ", "instances": [{"input": "", "output": "it"}]},
        {"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}, {}]},
    ]
    assert alpaca_prompt("Do.\n\n", seeds) == (
        "Do.\n\n###\n1. Instruction: Say it again\n1. Input:\n<noinput>\n1. Output:\nit\n"
        "###\n2. Instruction: Add.\n2. Input:\n1 2\n2. Output:\n3\n###\n3. Instruction:"
    )


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", []),
        ("I cannot help with that.", []),
        # inside numbered tasks, labels without a number are text
        (
            "4. Instruction: Explain.\n4. Input:\nInput: 5\nOutput: 6\n4. Output:\nOutput: it adds",
            [Task("Explain.", "Input: 5\nOutput: 6", "Output: it adds")],
        ),
        # so is the number of an earlier task
        (
            "4. Instruction: List.\n4. Output:\n1. Instruction: sit\n2. Output: stay",
            [Task("List.", "", "1. Instruction: sit\n2. Output: stay")],
        ),
        # an output that lost its label, and the next task all the same
        (
            "4. Instruction: Lost.\n4. Input:\nx\n5. Instruction: Kept.\n5. Output: y",
            [Task("Lost.", "x", "", "format"), Task("Kept.", "", "y")],
        ),
        # an instruction that is missing does not end up in the task before
        (
            "4. Instruction: Kept.\n4. Output: y\n###\n5. Input:\nx\n5. Output: z",
            [Task("Kept.", "", "y")],
        ),
        # two tasks of one number
        (
            "4. Instruction: A\n4. Output: b\n4. Instruction: C\n4. Output: d",
            [Task("", "", "", "format")],
        ),
        ("4. Instruction: Empty.\n4. Input: x\n4. Output:\n", [Task("Empty.", "x", "", "format")]),
        # code at the end of an output keeps its fence
        (
            "4. Instruction: Code.\n4. Output:\n```python\nprint(1)\n```\n###\n"
            "5. Instruction: More.\n5. Output:\n```\n2\n```",
            [
                Task("Code.", "", "```python\nprint(1)\n```"),
                Task("More.", "", "```\n2\n```"),
            ],
        ),
        # a number as an answer stays
        (
            "4. Instruction: Six by seven?\n4. Output:\n42\n###\n5. Instruction: B\n5. Output: 7",
            [Task("Six by seven?", "", "42"), Task("B", "", "7")],
        ),
        ("Instruction: A\nOutput: 42\nInstruction: B\nOutput: 7", [
            Task("A", "", "42"), Task("B", "", "7")
        ]),
        # so does a year before a word, a long heading at the end, an input that resembles none
        (
            "4. Instruction: A\n4. Output:\n2020 output: 30 tons\n#### done\n5. Instruction: B\n"
            "5. Input: Na\n5. Output: Sodium",
            [Task("A", "", "2020 output: 30 tons\n#### done"), Task("B", "Na", "Sodium")],
        ),
        # a task without labels is not part of the output before it
        (
            "4. Instruction: A\n4. Output:\nApple\n\n### Tell me a joke.\nWhy not?\n###\n"
            "6. Instruction: B\n6. Output: b\n### Output\nc",
            [Task("A", "", "Apple"), Task("B", "", "b")],
        ),
        # ### may mark a task's own labels
        (
            "4. Instruction: A\n### Input:\nx\n### Output:\ny\n"
            "### 5. Instruction: B\n### Output: z",
            [Task("A", "x", "y"), Task("B", "", "z")],
        ),
        # tasks without a label for the instruction: not one long output
        (
            "4. Name it.\nInput: x\nOutput: y\n\n5. Sort it.\nInput: b a\nOutput: a b",
            [Task("", "", "", "format")],
        ),
        # "in 1920." was stopped at "20."
        (
            "4. Instruction: When?\n4. Output: It was all over in 19",
            [Task("When?", "", "It was all over in 19", "cut")],
        ),
        # a markdown heading within an answer stays
        (
            "4. Instruction: Plan.\n4. Output:\n# Plan\n## Day 1\nRest.\n###\n5. Instruction: B",
            [Task("Plan.", "", "# Plan\n## Day 1\nRest."), Task("B", "", "", "format")],
        ),
    ],
)  # fmt: skip
def test_parse_tasks_finds_the_starts_of_tasks(text, expected):
    assert parse_tasks(text) == expected


@pytest.mark.parametrize(
    "instruction, reason",
    [
        ("Name it now", "short"),
        ("Name it right now", ""),
        ("word " * 150, ""),
        ("word " * 151, "long"),
        *(
            (f"Tell me what the {word.upper()} says", f"asks for {word}")
            for word in BEYOND_TEXT.split("|")
        ),
        ("Tell me when to Go to bed", "asks for go to"),
        ("Describe the plotter and the filename", ""),
        ("Tell me about diagrams and videos", ""),  # Alpaca's list has the singular alone
        ("Explain the file-system of today", "asks for file"),
        ("Write a program that adds", "program"),
        ("write a program that adds", ""),
        ("Rewrite a program that adds", ""),
        ("'Tis the season: explain why", "punctuation"),
        ("- Name a colour of it", "punctuation"),
        ("Écris une phrase en français", "not ASCII"),
        ("3 colours are what exactly?", ""),
    ],
)
def test_reject_reason_follows_alpaca_s_filters(instruction, reason):
    assert reject_reason(instruction) == reason


def test_reject_reason_allows_any_script():
    assert reject_reason("Écris une phrase en français", any_script=True) == ""
    assert reject_reason("翻译它", any_script=True) == "short"
    assert reject_reason("翻译这句话并且解释一下", any_script=True) == ""


# ---------------------------------------------------------------- against the published script


def published(text: str, truncated: bool) -> list[tuple[str, str, str]]:
    """What Alpaca's script makes of an answer: it cuts at every ###, and of a part it takes what
    has the three labels, each with the number that belongs to the part's place."""
    parts = f"4. Instruction:{text}".split("###")
    found = []
    for number, part in enumerate(parts[:-1] if truncated else parts, 4):
        fields = re.split(rf"{number}\.\s+(?:Instruction|Input|Output):", part)
        if len(fields) == 4:
            instruction, given, output = (field.strip() for field in fields[1:])
            found.append((instruction, "" if given.lower() == "<noinput>" else given, output))
    return found


ODD = [  # parts of a text that resemble labels, headings and separators
    "```\nx = 1\n```", "**1. First**", "Input: five\nOutput: six", "> Output: x",
    "The sum is:\n**42**", "Task 1: buy milk\nTask 2: cook it", "Item 3 of the list",
    "1. Instruction: sit\n2. Output: stay",
]  # fmt: skip


def made_up_answer(rng: random.Random) -> tuple[str, set[str]]:
    """An answer with defects, and the instructions of those tasks that our parser may keep and the
    script drops: with another number than their place's, or without the label of the input."""
    parts, tolerated, place, number = [], set(), 4, 4
    for _ in range(rng.randint(2, 9)):
        text = f"Tell me number {rng.random()}"
        given = rng.choice(["<noinput>", f"{rng.random()}\n\n{rng.random()}"])
        output = "\n".join(f"line {n} of {rng.random()}" for n in range(rng.randint(1, 3)))
        labels = [f"{number}. {field}:" for field in ("Instruction", "Input", "Output")]
        missing = rng.choice([[0], [1], [2], [0, 1, 2]]) if rng.random() < 0.2 else []
        if not missing and rng.random() < 0.3:
            text, output = f"{text}\n{rng.choice(ODD[:4])}", f"{output}\n{rng.choice(ODD)}"
        unnumbered = bool(parts) and rng.random() < 0.5
        for field in missing:
            labels[field] = labels[field].partition(" ")[2] if unnumbered else ""
        if number != place or missing == [1] or (missing and unnumbered):
            tolerated.add(text.split("\n")[0])
        heading = rng.choice(["###", "### Part", "### Input", "# Part", "#### Part", *[""] * 9])
        output += f"\n{heading}\nmore {rng.random()}" if heading else ""
        parts.append(f" {labels[0]} {text}\n{labels[1]}\n{given}\n{labels[2]}\n{output}\n")
        place += 2 if re.match("###(?!#)", heading) else 1
        number = rng.choice([place, place, place, place, number + 1, number, 1])
    parts[0] = parts[0].removeprefix(" 4. Instruction:")
    between, end = rng.choice(["###", "###\n"]), rng.choice(["", "###", "###\n", "###\nBye"])
    return between.join(parts) + end, tolerated


@pytest.mark.parametrize("defect", ["none", "Windows", "cut"])
def test_parse_tasks_keeps_what_alpaca_s_script_keeps(defect):
    rng, total = random.Random(defect), 0
    for _ in range(120):
        text, tolerated = made_up_answer(rng)
        if defect == "cut":
            text = text[: rng.randrange(len(text))]
        theirs = published(text.replace("####", "(four)"), defect == "cut")
        sent = text.replace("\n", "\r\n") if defect == "Windows" else text
        ours = [
            (task.instruction, task.input, task.output.replace("####", "(four)"))
            for task in parse_tasks(sent, defect == "cut")
            if not task.reason
        ]
        assert [task for task in ours if task in theirs] == theirs, text
        more = {task[0].split("\n")[0] for task in ours if task not in theirs}
        assert more <= tolerated, text
        total += len(theirs)
    assert total > 120
