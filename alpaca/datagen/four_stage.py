"""The four stages of the Self-Instruct paper (arXiv:2212.10560), of which Alpaca made one.

    1  instructions    six seeds and two that were made before → up to eight new ones
    2  kind            is it classification, with answers from a small set of labels?
    3  instances       of a classification task output first, lest all get the same label; else the
                       input first
    4  filters         for instructions Alpaca's and ROUGE-L (selfinstruct.py); for instances below

A record holds an instruction with all its instances, as the seeds do; the examples in the prompts
are seeds. What a request brought is used in prompts only LAG requests later: by then it is known
whatever the order in which answers came, and so the same seed asks the same questions.

Shown by tests/test_selfinstruct.py:
test_the_four_stages_ask_the_same_whatever_the_order_of_answers.
"""

import asyncio
import hashlib
import random
import re

from alpaca.common.errors import UserError
from alpaca.datagen.client import Reply, parse_reply
from alpaca.datagen.prompts import NO_INPUT, NO_INPUT_TEXT, Task
from alpaca.datagen.request_log import BudgetExceeded

LAG = 64
HUMAN, MACHINE, LAST = 6, 2, 16  # examples in a prompt, and the last number of its list
SHOWN = (12, 19)  # examples of classification, and of other tasks, for the second stage
LATER = "instances"  # how the reason begins why an instruction is left out though it was new
STAGES = {  # what each asks of the server; --request comes on top
    "instructions": {
        "max_tokens": 1024,
        "temperature": 0.7,
        "top_p": 0.5,
        "presence_penalty": 2,
        "stop": ["\n\n", f"\n{LAST}", f"{LAST}."],
    },
    "kind": {"max_tokens": 5, "temperature": 0, "stop": ["\n\n"]},
    "instances": {"max_tokens": 1024, "temperature": 0, "stop": ["\nTask:"]},
}
LIST = (
    "Below is a list of {last} different tasks that a language model is asked to do, in "
    "{language}, one on each line. Continue it up to number {last}.\n\n"
)
KIND = (
    "Some tasks have a small set of possible answers, fixed beforehand, from which one is chosen: "
    "those are classification. Say Yes if the last task is one, otherwise No.\n\n"
)
INPUT_FIRST = (
    "For each task, give examples: first an input, then the output that is right for it. A task "
    f"that needs no input has one example, with the input {NO_INPUT}.\n\n"
)
OUTPUT_FIRST = (
    "For each classification task, give an example of every possible label: first the label, then "
    "an input for which it is right.\n\n"
)
INPUT_OUTPUT = "Example {n}\nInput: {input}\nOutput: {output}\n"
LABEL_INPUT = "Class label: {output}\nInput: {input}\n"
ITEM = re.compile(r"^[ \t>*#-]*(?:task[ \t]*)?\d{1,3}[ \t]*[.:)][ \t*]*(.*)$", re.I | re.M)
EXAMPLE = re.compile(r"^[ \t*#]*(?:example|instance)[ \t]*\d{0,3}[ \t]*[.:)]?[ \t*]*$", re.I | re.M)
FIELD = re.compile(r"^[ \t*#]*((?:class )?label|input|output)[ \t*]*:[ \t*]*", re.I | re.M)


class SelfInstruct:
    lag, brings = LAG, 7
    exact = False  # whether an instruction gets instances is known later

    def __init__(self, seeds: list[dict], header: str, language: str, seed: int, options: dict):
        self.seeds, self.seed, self.given = seeds, seed, options
        self.header = LIST.format(last=LAST, language=language)  # `header` is Alpaca's
        kinds = [[s for s in seeds if s["is_classification"] is kind] for kind in (True, False)]
        if len(seeds) < HUMAN + MACHINE or not all(kinds):
            raise UserError(
                f"self-instruct needs {HUMAN + MACHINE} seeds, of classification and of other tasks"
            )
        rng = random.Random(f"{seed} examples")
        labelled, free = (
            rng.sample(some, min(most, len(some))) for some, most in zip(kinds, SHOWN, strict=True)
        )
        mixed = rng.sample(labelled + free, len(labelled + free))
        self.kinds = KIND
        for seed_task in mixed:
            told = "Yes" if seed_task["is_classification"] else "No"
            self.kinds += f"{asked(seed_task)}Classification: {told}\n\n"
        self.first = {
            True: OUTPUT_FIRST + "".join(with_examples(s, LABEL_INPUT) for s in labelled[:8]),
            False: INPUT_FIRST + "".join(with_examples(s, INPUT_OUTPUT) for s in free[:8]),
        }

    def request(self, number: int, kept: list[tuple[int, str]]) -> tuple[str, dict, list[str]]:
        """Stage 1: prompt, options, and the ids of the seeds in it."""
        rng = random.Random(f"{self.seed} {number}")
        made = [instruction for of, instruction in kept if of <= number - self.lag]
        made = rng.sample(made, min(MACHINE, len(made)))
        human = rng.sample(self.seeds, HUMAN + MACHINE - len(made))
        shown = [one_line(seed["instruction"]) for seed in human] + list(map(one_line, made))
        rng.shuffle(shown)
        listed = "".join(f"{place}. {text}\n" for place, text in enumerate(shown, 1))
        prompt = f"{self.header}{listed}{len(shown) + 1}."
        return prompt, self.options("instructions"), [seed["id"] for seed in human]

    def options(self, stage: str) -> dict:
        return STAGES[stage] | self.given

    def tasks(self, reply: Reply) -> list[Task]:
        """The instructions of a list that goes on where the prompt stopped."""
        text = reply.text.replace("\r\n", "\n").lstrip()
        first, _, rest = text.partition("\n")
        text = rest if first.rstrip(" *").endswith(":") and not ITEM.match(first) else text
        if not ITEM.match(text.lstrip()):
            text = f"{HUMAN + MACHINE + 1}. {text.lstrip()}"
        found = [item[1].strip(" *") for item in ITEM.finditer(text)]
        tasks = [Task(one, "", "") for one in found if one]
        if tasks and reply.cut:
            tasks[-1] = tasks[-1]._replace(why="cut")
        return tasks

    async def complete(self, judged: list[dict], ask) -> list[dict | None]:
        """Stages 2 and 3 for every instruction that was kept; None where the money ended before."""
        found = await asyncio.gather(
            *(self.instances(line, ask) for line in judged), return_exceptions=True
        )
        for one in found:
            if isinstance(one, BaseException) and not isinstance(one, BudgetExceeded):
                raise one
        return [None if isinstance(one, BudgetExceeded) else one for one in found]

    async def instances(self, line: dict, ask) -> dict:
        line = {name: value for name, value in line.items() if name not in ("input", "output")}
        if "why" in line:
            return line
        source, prompt = line.pop("provenance"), asked(line)
        seeds = source["prompt_seeds"]
        key = hashlib.sha256(line["instruction"].encode()).hexdigest()[:12]
        id = f"{source['request']}.{key}."  # not its place, which another parser may change
        kind = await ask(
            id + "kind", f"{self.kinds}{prompt}Classification:", self.options("kind"), seeds
        )
        if "failed" in kind:
            return line | {"why": f"{LATER}: no answer"}
        yes = parse_reply(kind["response"]).text.strip(" *\n").lower().startswith("yes")
        prompt = self.first[yes] + prompt + ("Class label:" if yes else "Example 1\nInput:")
        entry = await ask(id + "instances", prompt, self.options("instances"), seeds)
        if "failed" in entry:
            return line | {"why": f"{LATER}: no answer"}
        found = filter_instances(parse_instances(parse_reply(entry["response"]), label_first=yes))
        if not found:
            return line | {"why": f"{LATER}: none usable"}
        return line | {"instances": found, "is_classification": yes, "provenance": source}


def parse_instances(reply: Reply, label_first: bool) -> list[dict]:
    """The examples of an answer that goes on where the prompt stopped, at the first field."""
    text = EXAMPLE.sub("", reply.text.replace("\r\n", "\n")).lstrip()
    if not FIELD.match(text):
        text = ("Class label: " if label_first else "Input: ") + text
    starts = list(FIELD.finditer(text))
    ends = [*(label.start() for label in starts[1:]), len(text)]
    found: list[dict] = []
    for label, end in zip(starts, ends, strict=True):
        field = "input" if label[1].lower() == "input" else "output"
        if not found or field in found[-1] or field == ("output" if label_first else "input"):
            found.append({})
        found[-1][field] = text[label.end() : end].strip()
    return found[:-1] if reply.cut else found


def filter_instances(found: list[dict]) -> list[dict]:
    """The paper's filters: no empty output, none that repeats the input, no example twice, and
    none of those that give the same input different outputs."""
    outputs: dict[str, str | None] = {}
    for example in found:
        given, output = example.get("input", ""), example.get("output", "")
        given = "" if NO_INPUT_TEXT.fullmatch(given) else given
        if output and output != given:
            outputs[given] = output if outputs.get(given, output) == output else None
    return [{"input": i, "output": o} for i, o in outputs.items() if o is not None]


def one_line(text: str) -> str:
    return " ".join(text.split())


def asked(task: dict) -> str:
    return f"Task: {one_line(task['instruction'])}\n"


def with_examples(seed: dict, layout: str) -> str:
    filled = (
        layout.format(n=n, input=case["input"] or NO_INPUT, output=case["output"])
        for n, case in enumerate(seed["instances"], 1)
    )
    return asked(seed) + "".join(filled) + "\n"
