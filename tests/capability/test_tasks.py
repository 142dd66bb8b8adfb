"""Published benchmark files: the questions that are read from each form, and what is refused."""

import gzip
import json
from pathlib import Path

import pytest
from helpers.benchmarks import hub_records, write_jsonl

from alpaca.capability.tasks import ExamQuestion, add_shots, read_tasks
from alpaca.common.errors import UserError

TASKS = ["mmlu", "arc", "hellaswag", "truthfulqa", "piqa", "winogrande", "boolq", "gsm8k"]
ARC = {"question": "Which is red?", "choices": {"text": ["sky", "rust"], "label": ["1", "2"]}}
ARC["answerKey"] = "2"
ARC_ORIGINAL = {"id": "x", "question": {"stem": "Which is red?"}, "answerKey": "2"}
ARC_ORIGINAL["question"]["choices"] = [
    {"text": "sky", "label": "1"},
    {"text": "rust", "label": "2"},
]
HELLASWAG = {
    "ind": 1,
    "activity_label": "Baking",
    "ctx_a": "How to bake [title] Mix it. [step] Stir.",
    "ctx_b": "then The cook",
    "ctx": "",
    "split": "val",
    "label": 3,
    "endings": ["sits [substeps] down.", " rests.", "eats.", "bakes  it."],
}
TRUTHFULQA = {"question": "Is it?", "mc1_targets": {"no": 0, "yes": 1}}
TRUTHFULQA["mc2_targets"] = {"yes": 1, "no": 0, "sure": 1}
PIQA = {"goal": "Cut bread.", "sol1": "Use a knife.", "sol2": "Use a fork."}
WINOGRANDE = {"qID": "q", "sentence": "Ann saw Bea as _ is tall.", "option1": "Ann"}
WINOGRANDE |= {"option2": "Bea", "answer": "2"}
BOOLQ = {"question": "is it wet", "title": "Rain", "answer": True, "passage": "Rain is wet."}
GSM8K = {"question": "How many?", "answer": "48/2=<<48/2=24>>24\n#### 24"}


def write(path: Path, *records: dict) -> Path:
    return write_jsonl(path, list(records))


def options_of(path: Path) -> list[tuple[str, str]]:
    (question,) = read_tasks([path])
    return question.options


# ---------------------------------------------------------------- what is read


def test_mmlu_is_read_from_csv_and_from_the_hub(tmp_path):
    file = tmp_path / "high_school_physics_test.csv"
    file.write_text('What is 2 + 2?,3,4,5,6,B\n" Two\nlines, ""quoted""?",a,b,c,d,D\n')
    first, second = read_tasks([file])
    prompt = "What is 2 + 2?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:"
    about = "The following are multiple choice questions (with answers) about high school physics."
    assert first == ExamQuestion(
        "mmlu",
        [(prompt, letter) for letter in "ABCD"],
        [1],
        "high_school_physics",
        f"{about}\n\n",
        f"{file}, record 1",
    )
    assert second.options[0][0] == 'Two\nlines, "quoted"?\nA. a\nB. b\nC. c\nD. d\nAnswer:'
    record = {"question": "What is 2 + 2?", "choices": ["3", "4", "5", "6"], "answer": 1}
    hub = write(tmp_path / "x.jsonl", record | {"subject": "high_school_physics"})
    assert read_tasks([hub])[0] == first._replace(place=f"{hub}, line 1")


def test_arc_is_read_in_both_forms(tmp_path):
    files = write(tmp_path / "ARC-Easy-Test.jsonl", ARC_ORIGINAL), tmp_path / "Challenge.json"
    files[1].write_text(json.dumps([ARC]))
    easy, challenge = read_tasks(files)
    assert easy.options == [("Question: Which is red?\nAnswer:", text) for text in ("sky", "rust")]
    assert easy.right == [1] and easy.task == "arc_easy"
    assert challenge == easy._replace(task="arc_challenge", place=f"{files[1]}, record 1")


def test_hellaswag_loses_its_marks(tmp_path):
    for label in (3, "3"):
        (question,) = read_tasks([write(tmp_path / "h.jsonl", HELLASWAG | {"label": label})])
        prompt = "Baking: How to bake. Mix it. Stir. Then the cook"
        endings = ["sits down.", "rests.", "eats.", "bakes it."]
        assert question.options == [(prompt, ending) for ending in endings]
        assert question.right == [3]


def test_truthfulqa_is_two_tasks_in_both_forms(tmp_path):
    mc1, mc2 = read_tasks([write(tmp_path / "mc_task.jsonl", TRUTHFULQA)])
    assert (mc1.task, mc2.task) == ("truthfulqa_mc1", "truthfulqa_mc2")
    assert mc1.options == [("Q: Is it?\nA:", "no"), ("Q: Is it?\nA:", "yes")]
    assert mc1.right == [1] and mc2.right == [0, 2]
    hub = {
        name: {"choices": list(targets), "labels": list(targets.values())}
        for name, targets in TRUTHFULQA.items()
        if name != "question"
    }
    assert read_tasks([write(tmp_path / "mc_task.jsonl", TRUTHFULQA | hub)]) == [mc1, mc2]


def test_piqa_labels_are_in_the_record_or_beside_the_file(tmp_path):
    (tmp_path / "valid-labels.lst").write_text("1\n0\n")
    beside = read_tasks([write(tmp_path / "valid.jsonl", PIQA, PIQA)])
    assert [question.right for question in beside] == [[1], [0]]
    prompt = "Question: Cut bread.\nAnswer:"
    assert beside[0].options == [(prompt, "Use a knife."), (prompt, "Use a fork.")]
    (hub,) = read_tasks([write(tmp_path / "hub.jsonl", PIQA | {"label": 1})])
    assert hub.options == beside[0].options and hub.right == [1]


def test_winogrande_choices_are_in_the_prompts(tmp_path):
    (question,) = read_tasks([write(tmp_path / "w.jsonl", WINOGRANDE)])
    assert question.options == [
        ("Ann saw Bea as Ann", "is tall."),
        ("Ann saw Bea as Bea", "is tall."),
    ]
    assert question.right == [1]
    assert question.solved == "Ann saw Bea as Bea is tall.\n\n"


def test_boolq_and_gsm8k_are_read(tmp_path):
    superglue = {"question": "is it wet", "passage": "Rain is wet.", "idx": 0, "label": 1}
    for record in (BOOLQ, superglue):
        (question,) = read_tasks([write(tmp_path / "b.jsonl", record)])
        prompt = "Rain is wet.\nQuestion: is it wet?\nAnswer:"
        assert question.options == [(prompt, "no"), (prompt, "yes")] and question.right == [1]
    (question,) = read_tasks([write(tmp_path / "g.jsonl", GSM8K)])
    assert question.options == [("Question: How many?\nAnswer:", GSM8K["answer"])]


def test_files_may_be_lists_and_gzipped(tmp_path):
    (zipped := tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps([BOOLQ]).encode()))
    assert options_of(zipped) == options_of(write(tmp_path / "b.jsonl", BOOLQ))
    row = b"What is 2 + 2?,3,4,5,6,B\n"
    (zipped := tmp_path / "anatomy_val.csv.gz").write_bytes(gzip.compress(row))
    assert read_tasks([zipped])[0].subject == "anatomy"


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "a"}, "its fields ('prompt') are not those of MMLU, ARC"),
        ("text", "its fields (none)"),
        (BOOLQ | {"passage": "\ud800"}, "half a surrogate pair"),
        (ARC | {"answerKey": "C"}, "answerKey is 'C', one of 1, 2 was expected"),
        (ARC | {"choices": {"text": ["a"], "label": ["A", "B"]}}, "2 labels for 1 choices"),
        (HELLASWAG | {"label": ""}, "label is '', one of 0, 1, 2, 3 was expected"),
        ({"question": "a", "choices": list("abcd")}, "its fields ('question', 'choices') are not"),
        (HELLASWAG | {"endings": "a"}, 'endings is "a", a list was expected'),
        (TRUTHFULQA | {"mc2_targets": {"a": 0}}, "mc2_targets: 1 for each true answer"),
        (TRUTHFULQA | {"mc1_targets": {"a": []}}, "mc1_targets: 1 for each true answer"),
        (PIQA, "no label, and no file x-labels.lst"),
        (WINOGRANDE | {"answer": ""}, "answer is '', one of 1, 2 was expected"),
        (WINOGRANDE | {"sentence": "Ann."}, "sentence has no gap"),
        (BOOLQ | {"answer": "yes"}, "answer is 'yes', one of False, True was expected"),
        (GSM8K | {"answer": "four"}, "answer has no number"),
        ({"question": "a", "choices": ["b"], "answer": 0}, "1 choices, 4 were expected"),
        ({"question": "a", "choices": list("abcd"), "answer": 4}, "answer is 4, one of 0, 1, 2, 3"),
        ({"question": "a", "choices": list("abcd"), "answer": "B"}, "an integer was expected"),
    ],
)
def test_damaged_records_are_named(record, words, tmp_path):
    with pytest.raises(UserError) as error:
        read_tasks([write(tmp_path / "x.jsonl", record)])
    assert f"{tmp_path}/x.jsonl, line 1: " in str(error.value) and words in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a_test.csv", "q,1,2,3,4,A\nq,1,2,3,4,AB\n", "record 2: a question, four choices and a"),
        ("a_test.csv", "q,1,2,3,A\n", "record 1: a question, four choices"),
        ("a_test.csv", 'q,1,2,3,4,A\n"q"x,1,2,3,4,A\n', ": not CSV"),
        ("a_test.csv", "", "no records in it"),
        ("a.json", "[]", "no records in it"),
        ("a.jsonl", '{"question"', "line 1: not JSON"),
    ],
)
def test_damaged_files_are_named(name, text, words, tmp_path):
    (file := tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        read_tasks([file])
    assert str(error.value).startswith(str(file)) and words in str(error.value)


def test_piqa_needs_a_label_for_each_record(tmp_path):
    (tmp_path / "valid-labels.lst").write_text("1\n0\n")
    with pytest.raises(UserError, match=r"valid-labels.lst: 2 labels, 1 were expected"):
        read_tasks([write(tmp_path / "valid.jsonl", PIQA)])


@pytest.mark.parametrize("task", TASKS)
def test_a_changed_field_is_read_or_refused(task, tmp_path):
    """Any value in any field: never another error than ours."""
    (record,) = hub_records(task, 1)
    for field in record:
        for value in (
            None,
            True,
            -1,
            7.5,
            "",
            "x",
            [],
            [[]],
            {},
            [{}],
            {"choices": [], "labels": 1},
        ):
            file = write(tmp_path / "x.jsonl", record | {field: value})
            try:
                assert read_tasks([file])
            except UserError as error:
                assert str(file) in str(error)


# ---------------------------------------------------------------- what stands before a question


def test_shots_are_the_first_of_their_task_and_subject(tmp_path):
    for subject in ("law", "art"):
        rows = [f"{subject} {number}?,1,2,3,4,C\n" for number in range(3)]
        (tmp_path / f"{subject}_dev.csv").write_text("".join(rows))
        (tmp_path / f"{subject}_test.csv").write_text(f"New {subject}?,1,2,3,4,A\n")
    pool = read_tasks([tmp_path / f"{subject}_dev.csv" for subject in ("law", "art")])
    questions = read_tasks([tmp_path / f"{subject}_test.csv" for subject in ("art", "law")])
    art, law = add_shots(questions, pool, 2)
    shown = [f"law {number}?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: C\n\n" for number in range(2)]
    assert law.before == law.before.partition("law")[0] + "law.\n\n" + "".join(shown)
    assert "art 1?" in art.before and "law" not in art.before
    assert law.options == questions[1].options


def test_shots_from_the_file_itself_are_not_asked(tmp_path):
    questions = read_tasks([write_jsonl(tmp_path / "x.jsonl", hub_records("boolq", 5))])
    asked = add_shots(questions, questions, 2, primer="Read.\n")
    assert [question.options for question in asked] == [q.options for q in questions[2:]]
    assert asked[0].before == f"Read.\n\n{questions[0].solved}{questions[1].solved}"
    with pytest.raises(UserError, match="--shots 6: there are only 5 records of boolq"):
        add_shots(questions, questions, 6)
