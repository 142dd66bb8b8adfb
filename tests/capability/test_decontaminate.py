"""`alpaca decontaminate` finds training on the evaluation set, and nothing in clean data."""

import json
import random
import re

import pytest
from helpers.benchmarks import write_jsonl
from helpers.commands import ROOT, assert_refused
from helpers.training import flags, train, write_base

from alpaca.datagen.formats import load_records
from alpaca.datagen.overlap import questions_of
from alpaca.training import job

SET = ROOT / "data/eval_instructions.jsonl"
ANSWER = {"role": "assistant", "content": "x"}
CLEAN = [ROOT / "data/seed_tasks.jsonl", ROOT / "data/general_instructions.jsonl"]


def write(path, records: list):
    path.write_text(json.dumps(records))
    return path


def swap_a_word(text: str, rng: random.Random) -> str:
    parts = re.split(r"(\w+)", text)  # words are at odd indices
    parts[rng.randrange(1, len(parts), 2)] = "another"
    return "".join(parts)


CHANGES = {
    "copied": lambda text, rng: text,
    "in capitals": lambda text, rng: text.upper(),
    "without punctuation": lambda text, rng: re.sub(r"[^\w\s]", " ", text),
    "with spaces": lambda text, rng: re.sub(r"\s+", "\n  ", f" {text} "),
    "a word swapped": swap_a_word,
}


@pytest.mark.parametrize("change", CHANGES)
def test_data_made_of_the_evaluation_set_is_found(command, tmp_path, change):
    asked = [questions_of(item)[0] for item in load_records(SET)][::3]
    if change == "a word swapped":  # fewer than eight words must be equal
        asked = [text for text in asked if len(re.findall(r"\w+", text)) >= 8]
    rng = random.Random(0)
    trained = [{"instruction": CHANGES[change](text, rng), "output": "x"} for text in asked]
    clean = load_records(CLEAN[1])
    mixed, out = clean + trained, tmp_path / "clean.json"
    rng.shuffle(mixed)
    data = write(tmp_path / "mixed.json", mixed)
    code, text, err = command("decontaminate", data, "--against", SET, "--out", out)
    assert (code, err) == (0, "") and len(asked) >= 40
    counts = f"{len(trained)} of {len(mixed)} records overlap {len(asked)} of 150 items; "
    assert counts in text
    assert json.loads(out.read_text()) == [record for record in mixed if record in clean]


def test_clean_data_has_no_twin(command):
    text = command("decontaminate", *CLEAN, "--against", SET, ROOT / "data/general_held_out.jsonl")
    assert text == (0, "0 of 431 records overlap 0 of 193 items\n", "")


def test_twins_are_listed_with_places_scores_and_texts(command, tmp_path):
    city = "Which\x1b[2J city is the largest of all {} in the world?"
    items = [
        {"instruction": "Why is the sky blue?"},
        {"prompt": "Count from one to nine and back."},
        {"question": city.format("cities"), "answer": "x"},
    ]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    records = [
        {"instruction": "Sing.", "output": "La"},
        {"prompt": "why is the SKY blue", "completion": "Air"},
        {"messages": [{"role": "user", "content": city.format("towns")}, ANSWER]},
    ]
    data, sets = write(tmp_path / "data.json", records), tmp_path / "set.jsonl"
    code, text, err = command("decontaminate", f"{data}:0.5", "--against", sets)
    assert (code, err) == (0, "") and "\x1b" not in text
    assert text.splitlines() == [
        f"{data}, record 2 and {sets}, line 1: equal",
        "    why is the SKY blue",
        "    Why is the sky blue?",
        f"{data}, record 3 and {sets}, line 3: ROUGE-L 0.92",
        r"    Which\x1b[2J city is the largest of all towns in the world?",
        r"    Which\x1b[2J city is the largest of all cities in the world?",
        "2 of 3 records overlap 2 of 3 items; twins: 1 equal, 1 similar",
    ]


def test_out_has_the_other_records_as_they_were(command, tmp_path):
    instances = [{"input": word, "output": "x"} for word in ("red", "blue")]
    first = [
        {"instruction": "Name a thing that is", "instances": instances, "id": 7},
        {"question": "How much is 2 + 2?", "answer": "4", "extra": [None, "\ud83d"]},
    ]
    second = [
        {"text": "Once upon a time"},
        {"instruction": "Name a fruit", "output": "Fig", "x": 1},
    ]
    sets = write(tmp_path / "set.json", [{"instruction": "Name a thing that is", "input": "Blue!"}])
    files = [write(tmp_path / f"{i}.json", part) for i, part in enumerate((first, second))]
    out = tmp_path / "out.json"
    code, text, _ = command("decontaminate", *files, "--against", sets, "--out", out)
    assert code == 0 and text.endswith(f"wrote {out}: 3 records\n")
    assert json.loads(out.read_text()) == [first[1], *second]
    before = out.read_bytes()
    assert_refused(
        command("decontaminate", *files, "--against", sets, "--out", out), "exists already"
    )
    assert out.read_bytes() == before


@pytest.mark.parametrize("with_choices", [False, True])
def test_questions_of_benchmarks_are_found(command, tmp_path, with_choices):
    """Training records are made of published files, question alone and with choices."""
    asked = {
        "mmlu": "In which organ of a plant does most of the photosynthesis take place?",
        "arc": "What does a plant need besides light and water in order to make sugar?",
        "hellaswag": "A man is standing in front of a wall with a brush. He",
        "truthfulqa": "What happens to you if you swallow the seeds of an apple?",
        "piqa": "To keep a wooden door from squeaking when it is opened,",
        "winogrande": "The vase does not fit into the box because the vase is too wide.",
        "boolq": "Glass is made by melting sand. It is then cooled.\nis glass made of sand",
        "gsm8k": "Ann has 48 apples and gives half of them to Ben. How many are left?",
    }
    choices = ["the root", "the leaf", "the stem", "the flower"]
    end = " " + " ".join(f"{letter}) {text}" for letter, text in zip("ABCD", choices, strict=True))
    has_choices = {"mmlu", "arc", "hellaswag"} if with_choices else ()
    records = [
        {"instruction": text.upper() + (end if task in has_choices else ""), "output": "x"}
        for task, text in asked.items()
    ]
    records.append(
        {"instruction": "In which organ of a dog is food digested? Say why.", "output": "x"}
    )
    data = write(tmp_path / "data.json", records)
    labelled = [{"text": text, "label": label} for label, text in zip("1234", choices, strict=True)]
    targets = {"No": 1, "It grows": 0}
    published = {
        "arc": {"question": {"stem": asked["arc"], "choices": labelled}, "answerKey": "2"},
        "hellaswag": {"activity_label": "Painting", "ctx_a": asked["hellaswag"][:-3]}
        | {"ctx_b": "he", "endings": choices, "label": 1},
        "truthfulqa": {"question": asked["truthfulqa"]}
        | {"mc1_targets": targets, "mc2_targets": targets},
        "piqa": {"goal": asked["piqa"], "sol1": "oil", "sol2": "sand", "label": 0},
        "winogrande": {"sentence": asked["winogrande"].replace("the vase is", "_ is")}
        | {"option1": "the vase", "option2": "the box", "answer": "1"},
        "boolq": {"question": "is glass made of sand", "answer": True}
        | {"passage": asked["boolq"].partition("\n")[0]},
        "gsm8k": {"question": asked["gsm8k"], "answer": "#### 24"},
    }
    sets = [write_jsonl(tmp_path / f"{task}.jsonl", [one]) for task, one in published.items()]
    (tmp_path / "mmlu.csv").write_text(f"{asked['mmlu']},{','.join(choices)},B\n")
    text = command("decontaminate", data, "--against", *sets, tmp_path / "mmlu.csv")[1]
    assert "8 of 9 records overlap 8 of 8 items; " in text, text


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("", "no questions in it"),
        ('{"instruction": "a"}\n{"instruction": 3}', "set.jsonl, line 2: instruction is 3"),
        ('["a"]', "set.jsonl, record 1: an object with"),
        ('{"instruction": "a"}\n{"inst', "set.jsonl, line 2: not JSON"),
    ],
)
def test_damaged_set_is_refused(command, tmp_path, lines, expected):
    (tmp_path / "set.jsonl").write_text(lines)
    result = command("decontaminate", CLEAN[0], "--against", tmp_path / "set.jsonl")
    assert_refused(result, expected)


def test_trainer_warns_of_held_out_questions_in_the_data(tmp_path, monkeypatch):
    base = write_base(tmp_path)
    records = json.loads((base / "records.json").read_text())
    held_out = [{**records[3], "output": "another"}, {"instruction": "Sing a song", "output": "La"}]
    file = write(tmp_path / "held_out.json", held_out)
    words = [*flags(base, tmp_path / "run"), "--plan", "--eval-data", file]
    warning = "1 of 2 questions of --eval-data are in --data, such as "
    code, _, err = train(words)
    assert code == 0 and warning + repr(questions_of(records[3])[0][:60]) in err
    write(file, held_out[1:])
    code, _, err = train(words)
    assert (code, err) == (0, "")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(job, "find_twins", None)
    job.warn_of_overlap(records, records)  # other ranks do not look


def test_trainer_does_not_warn_of_the_sample_data(capsys):
    """Its held-out records ask in other words for facts that are trained on."""
    job.warn_of_overlap(
        *(load_records(ROOT / f"data/sample_{n}.json") for n in ("train", "heldout"))
    )
    assert capsys.readouterr().err == ""
