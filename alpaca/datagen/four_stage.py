"""The four stages of the Self-Instruct paper (arXiv:2212.10560); Alpaca merged them into one.

    1  instructions    six seeds and two generated instructions → up to eight new ones
    2  kind            is it a classification task, with a small set of possible labels?
    3  instances       for classification the label first, so that not all get the same label;
                       for other tasks the input first
    4  filters         Alpaca's and ROUGE-L for instructions (selfinstruct.py), the paper's for
                       instances (below)

A record is an instruction with all its instances, as the seeds are. The examples in the prompts of
stages 2 and 3 are seeds. Instructions from answer i appear in prompts from request i + WINDOW on.
By then the answer is judged, in whatever order answers arrive: equal seeds make equal prompts.
"""

import asyncio
import hashlib
import random
import re
from collections.abc import Callable

from alpaca.common.errors import UserError
from alpaca.datagen.client import Reply
from alpaca.datagen.prompts import NO_INPUT, NO_INPUT_TEXT, Task
from alpaca.datagen.request_log import BudgetExceeded, reply_of

WINDOW = 64
HUMAN, MACHINE, LAST = 6, 2, 16  # examples in a prompt, and the last number of its list
SHOWN = (12, 19)  # examples of classification, and of other tasks, in stage 2
DROPPED_LATER = "instances"  # start of the reason for dropping an instruction after stage 1
STAGES = {  # request options; those of --request are added
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
    "Some tasks have a small set of possible answers, fixed in advance, from which one is chosen: "
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


def single_line(text: str) -> str:
    return " ".join(text.split())


def task_line(task: dict) -> str:
    return f"Task: {single_line(task['instruction'])}\n"


def with_examples(seed: dict, layout: str) -> str:
    examples = (
        layout.format(n=n, input=case["input"] or NO_INPUT, output=case["output"])
        for n, case in enumerate(seed["instances"], 1)
    )
    return task_line(seed) + "".join(examples) + "\n"


def parse_instances(reply: Reply, label_first: bool) -> list[dict]:
    """The examples in an answer, which continues the prompt after the first field's label."""
    text = EXAMPLE.sub("", reply.text.replace("\r\n", "\n")).lstrip()
    if not FIELD.match(text):
        text = ("Class label: " if label_first else "Input: ") + text
    starts = list(FIELD.finditer(text))
    ends = [*(label.start() for label in starts[1:]), len(text)]
    examples: list[dict] = []
    for label, end in zip(starts, ends, strict=True):
        field = "input" if label[1].lower() == "input" else "output"
        first = "output" if label_first else "input"
        if not examples or field in examples[-1] or field == first:
            examples.append({})
        examples[-1][field] = text[label.end() : end].strip()
    return examples[:-1] if reply.truncated else examples


def filter_instances(examples: list[dict]) -> list[dict]:
    """The paper's filters: no empty output, none that repeats its input, no example twice, and
    none of those that give the same input different outputs."""
    outputs: dict[str, str | None] = {}
    for example in examples:
        given, output = example.get("input", ""), example.get("output", "")
        given = "" if NO_INPUT_TEXT.fullmatch(given) else given
        if output and output != given:
            outputs[given] = output if outputs.get(given, output) == output else None
    return [{"input": i, "output": o} for i, o in outputs.items() if o is not None]


class SelfInstruct:
    window, expected_tasks = WINDOW, 7
    whole_answers = True  # some instructions are dropped later, when they get no instances

    def __init__(self, seeds: list[dict], header: str, language: str, seed: int, request: dict):
        self.seeds, self.seed = seeds, seed
        self.options = {stage: options | request for stage, options in STAGES.items()}
        self.header = LIST.format(last=LAST, language=language)  # `header` is Alpaca's
        labelled = [seed for seed in seeds if seed["is_classification"]]
        others = [seed for seed in seeds if not seed["is_classification"]]
        if len(seeds) < HUMAN + MACHINE or not labelled or not others:
            raise UserError(
                f"self-instruct needs {HUMAN + MACHINE} seeds, of classification and of other tasks"
            )
        rng = random.Random(f"{seed} examples")
        labelled = rng.sample(labelled, min(SHOWN[0], len(labelled)))
        others = rng.sample(others, min(SHOWN[1], len(others)))
        self.kind_prompt = KIND
        for example in rng.sample(labelled + others, len(labelled + others)):
            answer = "Yes" if example["is_classification"] else "No"
            self.kind_prompt += f"{task_line(example)}Classification: {answer}\n\n"
        self.instance_prompts = {
            True: OUTPUT_FIRST + "".join(with_examples(s, LABEL_INPUT) for s in labelled[:8]),
            False: INPUT_FIRST + "".join(with_examples(s, INPUT_OUTPUT) for s in others[:8]),
        }

    def prompt(self, number: int, accepted: list[tuple[int, str]]) -> tuple[str, dict, list[str]]:
        """Stage 1: the prompt, the request's options, and the ids of the seeds in the prompt."""
        rng = random.Random(f"{self.seed} {number}")
        machine = [text for request, text in accepted if request <= number - self.window]
        machine = rng.sample(machine, min(MACHINE, len(machine)))
        human = rng.sample(self.seeds, HUMAN + MACHINE - len(machine))
        shown = [single_line(text) for text in [*(s["instruction"] for s in human), *machine]]
        rng.shuffle(shown)
        listed = "".join(f"{n}. {text}\n" for n, text in enumerate(shown, 1))
        prompt = f"{self.header}{listed}{len(shown) + 1}."
        return prompt, self.options["instructions"], [seed["id"] for seed in human]

    def parse(self, reply: Reply) -> list[Task]:
        """The instructions in an answer, which continues the list at the end of the prompt."""
        text = reply.text.replace("\r\n", "\n").lstrip()
        first, _, rest = text.partition("\n")
        text = rest if first.rstrip(" *").endswith(":") and not ITEM.match(first) else text
        if not ITEM.match(text.lstrip()):
            text = f"{HUMAN + MACHINE + 1}. {text.lstrip()}"
        instructions = [item[1].strip(" *") for item in ITEM.finditer(text)]
        tasks = [Task(instruction, "", "") for instruction in instructions if instruction]
        if tasks and reply.truncated:
            tasks[-1] = tasks[-1]._replace(reason="cut")
        return tasks

    async def complete(self, lines: list[dict], ask: Callable) -> list[dict | None]:
        """Stages 2 and 3 for every instruction that was kept; None where the budget ended."""
        results = await asyncio.gather(
            *(self.add_instances(line, ask) for line in lines), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, BudgetExceeded):
                raise result
        return [result if isinstance(result, dict) else None for result in results]

    async def add_instances(self, line: dict, ask: Callable) -> dict:
        line = {name: value for name, value in line.items() if name not in ("input", "output")}
        if "why" in line:
            return line
        source, task = line.pop("provenance"), task_line(line)
        digest = hashlib.sha256(line["instruction"].encode()).hexdigest()[:12]

        async def ask_stage(stage: str, prompt: str) -> Reply | None:
            id = f"{source['request']}.{digest}.{stage}"
            return reply_of(await ask(id, prompt, self.options[stage], source["prompt_seeds"]))

        kind = await ask_stage("kind", f"{self.kind_prompt}{task}Classification:")
        label_first = kind is not None and kind.text.strip(" *\n").lower().startswith("yes")
        ending = "Class label:" if label_first else "Example 1\nInput:"
        prompt = self.instance_prompts[label_first] + task + ending
        reply = kind and await ask_stage("instances", prompt)
        if not reply:
            return line | {"why": f"{DROPPED_LATER}: no answer"}
        instances = filter_instances(parse_instances(reply, label_first))
        if not instances:
            return line | {"why": f"{DROPPED_LATER}: none usable"}
        result = {"instances": instances, "is_classification": label_first}
        return line | result | {"provenance": source}
