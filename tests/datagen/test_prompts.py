"""What teachers send, and what is made of it."""

import random

import pytest
from helpers.commands import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca.common.files import read_jsonl
from alpaca.datagen.prompts import Task, alpaca_prompt, parse_tasks, reject_reason

BEYOND_TEXT = (
    "image|images|graph|graphs|picture|pictures|file|files|map|maps|draw|plot|video|audio|music"
    "|flowchart|diagram"
)
TWO = [
    Task("Name a primary colour.", "", "Red"),
    Task("Translate to French.", "Good day\nand good night", "Bonjour\net bonne nuit"),
]
# Two tasks as teachers send them: what the completion API returns comes first.
SENT = {
    "completion": """ Name a primary colour.
4. Input:
<noinput>
4. Output:
Red
###
5. Instruction: Translate to French.
5. Input:
Good day
and good night
5. Output:
Bonjour
et bonne nuit
###
""",
    "numbers from one": """1. Instruction: Name a primary colour.
1. Input: <noinput>
1. Output: Red

2. Instruction: Translate to French.
2. Input: Good day
and good night
2. Output: Bonjour
et bonne nuit""",
    "markdown": """Sure! Here are the tasks you asked for:

### Task 4
**Instruction:** Name a primary colour.
**Input:** `<noinput>`
**Output:** Red

---

### Task 5
**Instruction:** Translate to French.
**Input:**
Good day
and good night

**Output:**
Bonjour
et bonne nuit
""",
    "bold numbers": """**4. Instruction:** Name a primary colour.
**4. Input:** N/A
**4. Output:** Red
###
**5. Instruction**: Translate to French.
**5. Input**: Good day
and good night
**5. Output**: Bonjour
et bonne nuit""",
    "headings": """#### Instruction 4
Name a primary colour.
#### Input 4
(no input)
#### Output 4
Red

#### Instruction 5
Translate to French.
#### Input 5
Good day
and good night
#### Output 5
Bonjour
et bonne nuit""",
    "only the instruction has a number": """4) Instruction: Name a primary colour.
Output: Red
5) Instruction: Translate to French.
Input: Good day
and good night
Output: Bonjour
et bonne nuit""",
    "number on a line of its own": """4.
Instruction: Name a primary colour.
Input: none
Output: Red

5.
Instruction: Translate to French.
Input: Good day
and good night
Output: Bonjour
et bonne nuit""",
    "a fence around everything": """Here you are:
```text
4. Instruction: Name a primary colour.
4. Input:
<noinput>
4. Output:
Red
###
5. Instruction: Translate to French.
5. Input:
Good day
and good night
5. Output:
Bonjour
et bonne nuit
```
I hope this helps!""",
    "a fence around each": """```
Instruction: Name a primary colour.
Input: <no input>
Output: Red
```

```
Instruction: Translate to French.
Input: Good day
and good night
Output: Bonjour
et bonne nuit
```""",
    "bullets": """4. **Instruction:** Name a primary colour.
   * **Input:** <noinput>
   * **Output:** Red

5. **Instruction:** Translate to French.
   * **Input:** Good day
and good night
   * **Output:** Bonjour
et bonne nuit""",
    "brackets": """[Instruction]
Name a primary colour.
[Input]
(none)
[Output]
Red

[Instruction]
Translate to French.
[Input]
Good day
and good night
[Output]
Bonjour
et bonne nuit""",
    "round brackets": """(4) Instruction: Name a primary colour.
(4) Input: No input required.
(4) Output: Red
(5) Instruction: Translate to French.
(5) Input: Good day
and good night
(5) Output: Bonjour
et bonne nuit""",
    "titles and a closing remark": """Each task has an
Input: and an output.

**4. Colours**
4. Instruction: Name a primary colour.
4. Input: ""
4. Output: Red

**Task 5: Greetings**
5. Instruction: Translate to French.
5. Input: Good day
and good night
5. Output: Bonjour
et bonne nuit
###
These tasks cover many kinds of work.""",
    "thoughts first": """<think>
4. Instruction: something
4. Input: perhaps
</think>
4. Instruction: Name a primary colour.
<noinput>
4. Output: Red
5. Instruction: Translate to French.
5. Input: Good day
and good night
5. Output: Bonjour
et bonne nuit""",
    "JSON": """```json
[{"instruction": "Name a primary colour.", "input": "<noinput>", "output": "Red"},
 {"instruction": "Translate to French.", "input": "Good day\\nand good night",
  "output": "Bonjour\\net bonne nuit"}]
```""",
    "full-width colons": """4. Instruction：Name a primary colour.
4. Input：<noinput>
4. Output：Red
5. Instruction：Translate to French.
5. Input：Good day
and good night
5. Output：Bonjour
et bonne nuit""",
}


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("form", SENT)
def test_two_tasks_however_they_are_sent(form, newline):
    assert parse_tasks(SENT[form].replace("\n", newline)) == TWO


def test_the_last_task_of_a_cut_answer_is_not_used():
    for text in SENT.values():
        first, last = parse_tasks(text, cut=True)
        assert first == TWO[0] and last.why == "cut"


def test_our_own_prompt_is_read_back():
    seeds = list(read_jsonl(ROOT / "data/seed_tasks.jsonl"))
    for start in range(0, 175, 7):
        some = seeds[start : start + 7]
        text = alpaca_prompt("", some).removesuffix("###\n8. Instruction:")
        assert parse_tasks(text) == [
            Task(s["instruction"].rstrip(":"), case["input"].strip(), case["output"].strip())
            for s in some
            for case in s["instances"][:1]
        ]


def test_the_request_is_laid_out_as_alpaca_s():
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
        # labels without a number, inside numbered tasks, are text of theirs
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
            [Task("Kept.", "", "y"), Task("", "x", "z", "format")],
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
        # so do a year before a word, a heading at the end and an input that only looks like none
        (
            "4. Instruction: A\n4. Output:\n2020 output: 30 tons\n### done\n5. Instruction: B\n"
            "5. Input: Na\n5. Output: Sodium",
            [Task("A", "", "2020 output: 30 tons\n### done"), Task("B", "Na", "Sodium")],
        ),
        # tasks without a label for the instruction: not one long output
        (
            "4. Name it.\nInput: x\nOutput: y\n\n5. Sort it.\nInput: b a\nOutput: a b",
            [Task("", "", "", "format")],
        ),
        # "in 1920." met the stop at "20."
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
def test_what_is_text_and_what_begins_a_task(text, expected):
    assert parse_tasks(text) == expected


@pytest.mark.parametrize(
    "instruction, why",
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
def test_alpaca_s_filters(instruction, why):
    assert reject_reason(instruction) == why


def test_another_language_may_begin_with_its_own_letters():
    assert reject_reason("Écris une phrase en français", any_script=True) == ""
    assert reject_reason("翻译它", any_script=True) == "short"
    assert reject_reason("翻译这句话并且解释一下", any_script=True) == ""


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_no_mangling_crashes_the_parser(seed):
    rng = random.Random(seed)
    text = rng.choice(list(SENT.values()))
    junk = ["###", "\n", "4. ", "Instruction:", "Output", "```", "\x00", "**", "é", " " * 500, "😀"]
    for _ in range(rng.randint(1, 25)):
        a, b = sorted(rng.choices(range(len(text) + 1), k=2))
        choice = rng.random()
        if choice < 0.3:
            text = text[:a] + text[min(b, a + 9) :]
        elif choice < 0.7:
            text = text[:a] + rng.choice(junk) + text[a:]
        elif choice < 0.9:
            text = text[:b] + text[a:b] + text[b:]
        else:
            text = text[:a] + text[a:b].swapcase() + text[b:]
    for task in parse_tasks(text, cut=rng.random() < 0.5):
        assert all(isinstance(field, str) for field in task)
        assert task.why in ("", "cut", "format")
        assert task.why or (task.instruction and task.output)
        reject_reason(task.instruction)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300))
def test_no_text_crashes_the_parser(text):
    parse_tasks(text)
    reject_reason(text)


@pytest.mark.parametrize(
    "text",
    [" " * 200_000, "\n" * 200_000, "#" * 200_000, "4. Instruction: a\n4. Output:\n" * 20_000,
     "```\n" * 50_000, ("* " * 50_000 + "Input: x\n") * 2, "1" * 200_000, "**" + "_" * 200_000,
     (" " * 38 + "input\n") * 20_000],
    ids=range(9),
)  # fmt: skip
def test_a_hostile_text_takes_no_more_than_a_moment(text):
    import time

    start = time.process_time()
    parse_tasks(text)
    parse_tasks("4. Instruction: x\n4. Output:\n" + text)
    assert time.process_time() - start < 2
