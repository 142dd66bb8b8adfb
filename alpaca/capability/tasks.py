"""Published benchmark files → questions: prompts, their answers, and which of these are right.

The files are read as their authors or the Hugging Face hub publish them, as JSON or JSONL, gzipped
or not. The fields of a record say which benchmark it belongs to:

    mmlu          What is 2 + 2?,3,4,5,6,B       anatomy_test.csv: the name says the subject
                  {"question", "subject", "choices": […], "answer": 1}
    arc           {"question": {"stem", "choices": [{"text", "label"}, …]}, "answerKey": "B"}
                  {"question", "choices": {"text": […], "label": […]}, "answerKey"}
    hellaswag     {"activity_label", "ctx_a", "ctx_b", "endings": […], "label": 3}
    truthfulqa    {"question", "mc1_targets": {"an answer": 1, …}, "mc2_targets": {…}}
                  the same with {"choices": […], "labels": [1, 0, …]}
    piqa          {"goal", "sol1", "sol2"}, valid-labels.lst beside valid.jsonl, or "label"
    winogrande    {"sentence": "… _ …", "option1", "option2", "answer": "1"}
    boolq         {"question", "passage", "answer": true}
    gsm8k         {"question", "answer": "… <<48/2=24>>24 … #### 72"}
    safety        {"instruction", "should_decline": true}, of data/safety_prompts.jsonl

Prompts are those of lm-eval 0.4.13. Its TruthfulQA begins with six questions and their answers, a
primer that `add_shots` takes as a text.
"""

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from alpaca.common.errors import UserError, check_unicode, errors_at, join_names
from alpaca.common.files import read_text
from alpaca.common.json_files import check_shape, json_records
from alpaca.datagen.checkers import stated_number

MMLU_LETTERS = ["A", "B", "C", "D"]
TEXT_AND_LABEL = {"text": str, "label": str}
WIKIHOW = {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": [str]}
MMLU_INTRODUCTION = "The following are multiple choice questions (with answers) about {}.\n\n"


class ExamQuestion(NamedTuple):
    """Options are pairs (prompt, answer). The prompts are equal, except WinoGrande's: its choices
    fill a gap in the prompt, and the answer is the rest of the sentence."""

    task: str
    options: list[tuple[str, str]]
    right: list[int]  # indices of options
    subject: str = ""  # of MMLU and safety
    before: str = ""  # the text in front of each prompt
    place: str = ""  # file and record

    @property
    def solved(self) -> str:
        """The question with its right answer, to stand before other questions."""
        prompt, answer = self.options[self.right[0]]
        return f"{prompt} {answer}\n\n"


# ---------------------------------------------------------------- a record of each form


def choose_among(prompt: str, answers: list[str]) -> list[tuple[str, str]]:
    return [(prompt, answer) for answer in answers]


def label_index(labels: Iterable[Any], label: Any, field: str) -> int:
    """Where a label is among those that there are."""
    labels = list(labels)
    if label not in labels:
        expected = join_names(map(str, labels), limit=9)
        raise UserError(f"{field} is {label!r}, one of {expected} was expected")
    return labels.index(label)


def mmlu(record: dict, file_name: str) -> Iterator[ExamQuestion]:
    if len(record["choices"]) != len(MMLU_LETTERS):
        raise UserError(f"{len(record['choices'])} choices, {len(MMLU_LETTERS)} were expected")
    right = label_index(range(len(MMLU_LETTERS)), record["answer"], "answer")
    subject = str(record.get("subject") or re.sub("_(test|val|dev)$", "", file_name))
    choices = map("{}. {}".format, MMLU_LETTERS, record["choices"])
    prompt = "\n".join([record["question"].strip(), *choices, "Answer:"])
    before = MMLU_INTRODUCTION.format(subject.replace("_", " "))
    yield ExamQuestion("mmlu", choose_among(prompt, MMLU_LETTERS), [right], subject, before)


def arc(record: dict, file_name: str) -> Iterator[ExamQuestion]:
    """The hub's form."""
    texts, labels = record["choices"]["text"], record["choices"]["label"]
    if len(texts) != len(labels):
        raise UserError(f"{len(labels)} labels for {len(texts)} choices")
    right = label_index(labels, record["answerKey"], "answerKey")
    parts = [part for part in ("easy", "challenge") if part in file_name.lower()]
    prompt = f"Question: {record['question']}\nAnswer:"
    yield ExamQuestion("_".join(["arc", *parts]), choose_among(prompt, texts), [right])


def arc_original(record: dict, file_name: str) -> Iterator[ExamQuestion]:
    choices = record["question"]["choices"]
    columns = {name: [choice[name] for choice in choices] for name in ("text", "label")}
    return arc({**record, "question": record["question"]["stem"], "choices": columns}, file_name)


def hellaswag(record: dict, file_name: str) -> Iterator[ExamQuestion]:
    right = label_index(map(str, range(len(record["endings"]))), str(record["label"]), "label")
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    endings = [without_marks(ending) for ending in record["endings"]]
    yield ExamQuestion("hellaswag", choose_among(without_marks(context), endings), [right])


def without_marks(text: str) -> str:
    """Half of HellaSwag is from WikiHow, and has marks such as [title] and [step]."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def truthfulqa(record: dict, file_name: str) -> Iterator[ExamQuestion]:
    """mc1 has one true answer, mc2 several."""
    for name in ("mc1", "mc2"):
        targets = record[f"{name}_targets"]
        if isinstance(targets.get("choices"), list):  # the hub's form
            shape = {"choices": [str], "labels": [int]}
            check_shape(targets, shape, f"{name}_targets")
            answers, labels = targets["choices"], targets["labels"]
        else:
            answers, labels = list(targets), list(targets.values())
        if len(answers) != len(labels) or 1 not in labels or not all(x in (0, 1) for x in labels):
            raise UserError(f"{name}_targets: 1 for each true answer and 0 for others was expected")
        right = [i for i, label in enumerate(labels) if label]
        options = choose_among(f"Q: {record['question']}\nA:", answers)
        yield ExamQuestion(f"truthfulqa_{name}", options, right)


def piqa(record: dict, file_name: str) -> Iterator[ExamQuestion]:
    if record.get("label") is None:
        raise UserError(f"no label, and no file {file_name}-labels.lst with one: it was expected")
    right = label_index("01", str(record["label"]), "label")
    prompt = f"Question: {record['goal']}\nAnswer:"
    yield ExamQuestion("piqa", choose_among(prompt, [record["sol1"], record["sol2"]]), [right])


def winogrande(record: dict, file_name: str) -> Iterator[ExamQuestion]:
    right = label_index("12", record["answer"], "answer")
    beginning, gap, rest = record["sentence"].partition("_")
    if not gap:
        raise UserError("sentence has no gap: a _ was expected")
    prompts = [beginning + record[name] for name in ("option1", "option2")]
    yield ExamQuestion("winogrande", [(prompt, rest.strip()) for prompt in prompts], [right])


def boolq(record: dict, file_name: str) -> Iterator[ExamQuestion]:
    """SuperGLUE calls the answer `label`."""
    right = label_index([False, True], record.get("answer", record.get("label")), "answer")
    prompt = f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"
    yield ExamQuestion("boolq", choose_among(prompt, ["no", "yes"]), [right])


def gsm8k(record: dict, file_name: str) -> Iterator[ExamQuestion]:
    if stated_number(record["answer"]) is None:
        raise UserError("answer has no number: #### and a number were expected at its end")
    options = choose_among(f"Question: {record['question']}\nAnswer:", [record["answer"]])
    yield ExamQuestion("gsm8k", options, [0])


def safety(record: dict, file_name: str) -> Iterator[ExamQuestion]:
    kind, answer = ("harmful", "decline") if record["should_decline"] else ("harmless", "comply")
    yield ExamQuestion("safety", choose_among(record["instruction"], [answer]), [0], kind)


FORMS = [  # what reads a record, and the fields that it must have; the first that fits is taken
    (truthfulqa, {"question": str, "mc1_targets": dict, "mc2_targets": dict}),
    (arc, {"question": str, "choices": {"text": [str], "label": [str]}, "answerKey": str}),
    (arc_original, {"question": {"stem": str, "choices": [TEXT_AND_LABEL]}, "answerKey": str}),
    (mmlu, {"question": str, "choices": [str], "answer": int}),
    (hellaswag, WIKIHOW | {"label": int | str}),
    (piqa, {"goal": str, "sol1": str, "sol2": str}),
    (winogrande, {"sentence": str, "option1": str, "option2": str, "answer": str}),
    (boolq, {"question": str, "passage": str}),
    (gsm8k, {"question": str, "answer": str}),
    (safety, {"instruction": str, "should_decline": bool}),
]
KNOWN_TASKS = "MMLU, ARC, HellaSwag, TruthfulQA, PIQA, WinoGrande, BoolQ or GSM8K"


def find_form(record: Any, place: str) -> Callable[[dict, str], Iterator[ExamQuestion]]:
    """What reads this record."""
    fields = record.keys() if isinstance(record, dict) else set()
    for read, shape in FORMS:
        if shape.keys() <= fields:
            check_shape(record, shape, place)
            return read
    found = join_names(map(repr, fields), limit=9) or "none"
    raise UserError(f"{place}: its fields ({found}) are not those of {KNOWN_TASKS}")


# ---------------------------------------------------------------- files


def csv_records(path: Path) -> Iterator[tuple[str, dict]]:
    """MMLU's files: a question, four choices, and the letter of the right one."""
    try:
        rows = list(csv.reader(io.StringIO(read_text(path)), strict=True))
    except csv.Error as error:
        raise UserError(f"{path}: not CSV ({error})") from None
    for number, row in enumerate(rows, 1):
        place = f"{path}, record {number}"
        if len(row) != 6 or row[5] not in MMLU_LETTERS:
            expected = "a question, four choices and a letter were expected, as in MMLU"
            raise UserError(f"{place}: {expected}")
        answer = MMLU_LETTERS.index(row[5])
        yield place, {"question": row[0], "choices": row[1:5], "answer": answer}


def read_tasks(paths: Iterable[Path]) -> list[ExamQuestion]:
    questions = []
    for path in paths:
        name = path.name.split(".")[0]
        records = list(csv_records(path) if ".csv" in path.suffixes else json_records(path))
        file = path.with_name(f"{name}-labels.lst")  # PIQA's
        labels = read_text(file).split() if file.exists() else [""] * len(records)
        if len(labels) != len(records):
            raise UserError(f"{file}: {len(labels)} labels, {len(records)} were expected")
        for (place, record), label in zip(records, labels, strict=True):
            read = find_form(record, place)
            record |= {"label": label} if label else {}
            with errors_at(place):
                check_unicode(json.dumps(record, ensure_ascii=False))
                questions += [question._replace(place=place) for question in read(record, name)]
        if not records:
            raise UserError(f"{path}: no records in it, such as those of {KNOWN_TASKS}")
    return questions


# ---------------------------------------------------------------- what stands before a question


def by_subject(questions: Iterable[ExamQuestion]) -> dict[tuple[str, str], list[ExamQuestion]]:
    groups = defaultdict(list)
    for question in questions:
        groups[question.task, question.subject].append(question)
    return groups


def add_shots(
    questions: list[ExamQuestion],
    pool: list[ExamQuestion],
    count: int,
    primer: str = "",
    limit: int | None = None,
) -> list[ExamQuestion]:
    """Questions behind a primer and `count` solved ones, the first of their task and subject in
    `pool`, which are not asked themselves. Of each task and subject, at most `limit` are asked."""
    pools, result = by_subject(pool), []
    primer = f"{primer.rstrip()}\n\n" if primer.strip() else ""
    for (task, subject), group in by_subject(questions).items():
        shots = pools[task, subject][:count]
        kind = f"{task} ({subject})" if subject else task
        if len(shots) < count:
            raise UserError(f"--shots {count}: there are only {len(shots)} records of {kind}")
        shown = [shot.options for shot in shots]
        before = "".join([primer, group[0].before, *(shot.solved for shot in shots)])
        asked = [question for question in group if question.options not in shown]
        if not asked:
            raise UserError(f"--shots {count}: no record of {kind} is left to ask about")
        result += [question._replace(before=before) for question in asked[:limit]]
    return result
