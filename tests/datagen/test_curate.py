"""`alpaca curate`: counts are exact, lint loses no record, hostile data stays data."""

import json
import os
import re
import time
from xml.etree import ElementTree

import pytest
from helpers.commands import ROOT, assert_refused

from alpaca.common.json_files import read_log
from alpaca.datagen.curate import printable
from alpaca.datagen.formats import load_mixture
from alpaca.datagen.lint import RULES, find_defects
from alpaca.datagen.openings import opening, openings
from dataset import encode_all
from tokenizer import load_tokenizer

HOSTILE = "<script>alert(1)</script>"
SVG = "{http://www.w3.org/2000/svg}"


def record(instruction: str, input: str = "", output: str = "It is so.", **more) -> dict:
    return {"instruction": instruction, "input": input, "output": output, **more}


def write(path, records):
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def jsonl(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path):
    """Four records of ten tasks, three of four requests answered, for 0.5 + 0.25 + 0.25 dollars."""
    folder = tmp_path / "run"
    folder.mkdir()
    records = [
        record("Name three kinds of cheese", "", "Brie"),
        record("Write a short story about rain", "seven words", "one two three four five six"),
        record("Write two stories about snow", "", "one two"),
        record("What is it?", "a b c d e f", "one two three"),
    ]
    reasons = ["similar", "similar", "short", "asks for image", "asks for image", "asks for draw"]
    costs = [0.5, 0.25, 0.0, 0.25]
    source = {"teacher": "m", "url": "here", "endpoint": "chat", "licence": ""}
    entry = {"provenance": source, "usage": {"prompt": 9, "completion": 1000, "unmetered": 0}}
    log = [entry | {"id": str(i), "cost": c, "response": "{}"} for i, c in enumerate(costs)]
    log[2]["failed"] = log[2].pop("response")
    jsonl(folder / "records.jsonl", [r | {"item": f"0.{i}"} for i, r in enumerate(records)])
    jsonl(folder / "rejected.jsonl", [record("x") | {"why": reason} for reason in reasons])
    jsonl(folder / "responses.jsonl", log)
    instances = {"instances": [{"input": "", "output": "x"}]}
    seeds = ("Name three kinds of cheese", "Write a poem")
    write(folder / "seeds.json", [{"instruction": seed} | instances for seed in seeds])
    write(folder / "settings.json", {"language": "English"})
    return folder


# ---------------------------------------------------------------- verbs and their objects


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("Write a short story about a dragon.", "write story"),
        ("Please write two stories about dragons", "write story"),
        ("Can you list five healthy breakfast ideas?", "list idea"),
        ("Your task is to name the capital of Peru.", "name capital"),
        ("Briefly describe your family.", "describe family"),
        ("Apply the rule to this sentence", "apply rule"),
        ("Create an effective 140 character twitter post", "create post"),
        ("Write a 5-sentence description of a beach", "write description"),
        ("Think of a new way to use a bottle", "think way"),
        ("Give me two examples of boxes", "give example"),
        ("Compare and contrast the two classes", "compare class"),
        ("Re-write the following sentence: It rains.", "re-write sentence"),
        ("Explain how machine learning is used", "explain learning"),
        ("Summarize the world's history.", "summarize history"),
        ("Calculate: 2 + 3", "calculate "),
        ("Écris un poème", "écris poème"),
        ("What is the capital of Peru?", "(question) what"),
        ("How to cook rice", "(question) how"),
        ("In what year did it end?", "(question) in"),
        ("You are given a list. Sort it.", "(no verb) "),
        ("Given a text, find its title.", "(no verb) "),
        ("Using the words below, write a poem.", "(no verb) "),
        ("42", "(no verb) "),
        ("...", "(no verb) "),
        ("Please", "(no verb) "),
        (HOSTILE, "(no verb) "),
    ],
)
def test_opening_finds_verb_and_object(instruction, expected):
    assert " ".join(opening(instruction)) == expected


def test_openings_have_the_four_most_frequent_objects():
    asked = [f"Name a {noun}" for noun in ("hen", "cat", "cat", "dog", "cow", "pig")]
    objects = [("cat", 2), ("hen", 1), ("dog", 1), ("cow", 1)]
    assert openings([*asked, *["Sing"] * 9]) == [("sing", 9, []), ("name", 6, objects)]


# ---------------------------------------------------------------- report


def test_report_of_a_run_is_exact(command, folder):
    code, out, err = command("curate", "report", folder)
    assert (code, err) == (0, "")
    assert out.splitlines()[:9] == [
        f"{folder}: 4 records, 2 with input",
        "4 requests: 3 answers, 1 failed",
        "  m at here (chat): 4 requests, 1 failed, 4 of 4 tasks kept, 36 tokens in, 4,000 out: "
        "$1.0000",
        "4 of 10 tasks kept (40.0%)",
        "        2  20.0%  similar",
        "        2  20.0%  asks for image",
        "        1  10.0%  short",
        "        1  10.0%  asks for draw",
        "Cost so far $1.0000: $250.0000 a thousand records",
    ]
    text = " ".join(out.split())  # words: 5 6 5 3; 2 6; 1 6 2 3
    assert "Words of instructions (mean 4.8, median 5) 1-4 1 ####" in text
    assert "Words of inputs (mean 4.0, median 4) 1-4 1 ####" in text
    assert "Words of outputs (mean 3.0, median 2.5) 1-4 3 ####" in text
    # Name … cheese 1; Write a … 2·2/(6+3); Write … 2·1/(5+3); What is it? 0: the mean of these
    assert "one of 2 seeds (mean 0.424) 0.0-0.1 1 ####" in text
    assert "0.2-0.3 1 #### 0.3-0.4 0 0.4-0.5 1" in re.sub("#+", "####", text)
    assert text.endswith("2 write story 2 1 name kind 1 1 (question) what 1")


@pytest.mark.parametrize(("language", "mean"), [("English", "0.000"), ("Chinese", "1.000")])
def test_seed_similarity_counts_words_as_the_run_did(command, folder, language, mean):
    jsonl(folder / "records.jsonl", [record("写 一 首 诗")])
    write(folder / "seeds.json", [record("写 一 首 诗")])
    write(folder / "settings.json", {"language": language})
    assert f"one of 1 seeds (mean {mean})" in command("curate", "report", folder)[1]


@pytest.mark.parametrize("missing", ["records", "rejected", "responses", "all but one", "logs"])
def test_logs_may_be_missing_or_empty(command, folder, missing):
    for name in ("records", "rejected", "responses"):
        if missing in (name, "all but one") and (missing, name) != ("all but one", "rejected"):
            (folder / f"{name}.jsonl").unlink()
        elif missing == "logs":
            (folder / f"{name}.jsonl").write_text("")
    out = folder.parent / "report.html"
    code, text, err = command("curate", "report", folder, "--out", out)
    assert (code, err) == (0, "") and out.exists()
    if missing == "records":
        assert "0 records" in text and "0 of 6 tasks kept (0.0%)" in text
        assert "Cost so far $1.0000\n" in text  # and no price of a thousand
    if missing == "logs":
        assert "0 of 0 tasks kept\n" in text and "Cost so far $0.0000\n" in text


def test_torn_last_line_is_ignored(command, folder):
    before = command("curate", "report", folder)
    for name in ("records", "rejected", "responses"):
        with open(folder / f"{name}.jsonl", "a") as file:
            file.write('{"instruction": "Write a so')
    assert command("curate", "report", folder) == before
    assert command("curate", "lint", folder)[0] == 0


def test_report_counts_instances_conversations_and_texts(command, tmp_path):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    instances = [{"input": "a", "output": "b"}, {"input": "c d", "output": "e"}]
    mixed = [{"conversations": turns}, {"text": "Once"}, {"text": "Twice"}]
    mixed.append({"instruction": "Add it up", "instances": instances})
    code, out, _ = command("curate", "report", write(tmp_path / "mixed.json", mixed))
    assert code == 0 and "mixed.json: 2 records with 3 instances, 2 with input\n" in out
    assert "2 plain texts left out\n" in out
    assert "\nNo similarity to seed tasks" in out
    assert "instructions (mean 2.0" in out and "inputs (mean 1.5" in out and "Cost" not in out


def test_pictures_are_well_formed_and_have_no_script(command, folder):
    hostile = [f"{HOSTILE} & more\x1b", f"Write {HOSTILE}", f"Sing&{HOSTILE}"]
    with open(folder / "records.jsonl", "a") as file:
        file.write("".join(json.dumps(record(text)) + "\n" for text in hostile))
    jsonl(folder / "rejected.jsonl", [{"why": f"asks for {HOSTILE}\x1b[2J"}, {"why": "<b>&"}])
    html, svg = folder.parent / "a.html", folder.parent / "a.svg"
    for file in (html, svg):
        code, out, _ = command("curate", "report", folder, "--out", file)
        assert code == 0 and "\x1b" not in out
    page = html.read_text()
    assert "<script" not in page + svg.read_text() and "\x1b" not in page
    assert "asks for &lt;script&gt;alert(1)&lt;/script&gt;\\x1b[2J" in page
    assert "http" not in re.sub('xmlns="[^"]*"|http-equiv', "", page)
    ElementTree.fromstring(page.replace("<!DOCTYPE html>", ""))
    titles = [title.text for title in ElementTree.parse(svg).iter(f"{SVG}title")]
    assert {"write: 3", "write story: 2", "name: 1", "name kind: 1", "sing: 1"} == set(titles)


def test_user_errors_are_one_line_and_write_nothing(command, folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    broken, bare = tmp_path / "broken.json", tmp_path / "bare.jsonl"
    broken.write_text('[{"instruction": "a", "output": "b"},\n {"instruction": }]')
    bare.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n')
    for verb in ("report", "lint"):
        assert_refused(command("curate", verb, tmp_path / "none.json"), "none.json")
        assert_refused(command("curate", verb, empty), "empty", "--out of selfinstruct.py")
        assert_refused(command("curate", verb, broken), "broken.json", "not JSON")
        assert_refused(command("curate", verb, bare), "bare.jsonl, line 2", "output")
        assert_refused(command("curate", verb, write(tmp_path / "list.json", [])), "no records")
    words = "--tokenizer", ROOT / "data"
    assert_refused(command("curate", "sources", bare, *words), "bare.jsonl, line 2", "output")
    assert_refused(command("curate", "sources", empty, *words), "empty is not a regular file")
    for out in ("report.png", "none/report.html"):
        assert_refused(command("curate", "report", folder, "--out", tmp_path / out), "report")
    files = {"bare.jsonl", "broken.json", "empty", "list.json", "run"}
    assert {file.name for file in tmp_path.iterdir()} == files


# ---------------------------------------------------------------- sources


def sources_of(command, *words) -> dict[str, list[str]]:
    """Source → the rest of its line."""
    code, out, err = command("curate", "sources", *words, "--tokenizer", ROOT / "data")
    assert code == 0, err
    rows = [re.split(r"  +", line, maxsplit=6) for line in out.splitlines()[2:]]
    return {name: figures for name, *figures in rows}


def test_sources_counts_a_mixture_as_training_does(command, tmp_path):
    own = [record("Name a fruit.", "", "Fig " * n, source="koala\x1b[2J") for n in (1, 900)]
    chat = {"conversations": [{"from": "user", "value": "你好"}, {"from": "gpt", "value": "好"}]}
    tree = {"prompt": {"text": "Hm?", "role": "prompter", "lang": "de", "replies": []}}
    tree["prompt"]["replies"] = [{"text": "Ja.", "role": "assistant"}]
    a = write(tmp_path / "a.json", [*own, record("Да?", "", "нет")])
    b = write(tmp_path / "b.json", [chat, tree, {"text": "12 + 3"}])
    shown = sources_of(command, a, f"{b}:2", "--max-length", 60)
    records, origins = load_mixture([a, f"{b}:2"], 0)
    examples = encode_all(records, origins, load_tokenizer(ROOT / "data"), 60)
    languages = {"b.json": "de 2", "koala\\x1b[2J": "", "a.json": ""}
    assert list(shown) == [*languages, "all"]
    assert shown["all"][:3] == ["9", f"{examples.lengths.sum()}", "100.0%"]
    for name, shares in languages.items():
        which = [i for i, o in enumerate(examples.origins) if printable(o.source) == name]
        tokens, answers = (x[which].sum() for x in (examples.lengths, examples.supervised))
        mean, share = f"{tokens / len(which):.1f}", f"{tokens / examples.lengths.sum():.1%}"
        figures = f"{len(which)}", f"{tokens}", share, mean, f"{answers / tokens:.1%}"
        assert shown[name] == [*figures, shares]
    assert list(sources_of(command, write(tmp_path / "c.json", own[:1]))) == ["koala\\x1b[2J"]


# ---------------------------------------------------------------- lint

FLAGGED = {  # rule → records: instructions, or (instruction, input, output)
    "link": ["Sum up https://example.com/a", ("Sum this up", "www.example.com"),
             ("Name a site", "", "Try http://example.com")],
    "impossible": [
        "Describe the following image.", ("Describe this black and white photo", "photo.jpg"),
        "Please create a picture of a cat", "Can you generate a short video for children?",
        "Summarize the attached document.", "Improve the design of this website.",
        "Open the following link and read it", "What is the current weather in Paris?",
        "What’s the weather like today?", "Tell me the latest news", "What time is it?",
        "Send an email to my boss", "Set an alarm for six"],
    "instruction in output": [("Add", "", f"4\n{text}") for text in (
        "Instruction: Subtract", "5. Instruction: Subtract", "### Instruction:\nSubtract",
        "4. Input:\n2", "4. Output: <nooutput>", "###")],
    "empty output": [
        ("Add", "", text) for text in ("", " \n", "...", "N/A", "<nooutput>", "None.")],
    "refusal": [("Tell", "", text) for text in (
        "As an AI language model, I cannot do this.", "As an AI, I don’t have feelings.",
        "I'm sorry, but I cannot provide that.", "Sorry, but you didn't provide a text.",
        "I cannot say this as an AI.", "Unfortunately, I am unable to see it.")],
    "repeated input": [
        ("Name a colour.", " name a  COLOUR"), ("写 一 首 诗", "写一首诗"),
        ("Name a colour of the old flag of the town of Bath in the south west",
         "Name one colour of the old flag of the town of Bath in the south-west")],
    "merged fields": [
        "Add these.\nInput: 2 and 2", "Add these.\n4. Output:\n4",
        ("Translate", "Guten Tag\n4. Output: Good day"),
        ("Translate", "Guten Tag\nOutput: Good day")],
    "placeholder input": [("Add", text) for text in (
        "N/A", "None", "<noinput>", "No input.", "`< noinput >`", "some text",
        "[insert text here]", "Text: [Your text]", "Paste your text here")],
    "cut output": [("Tell", "", text) for text in (
        "It was a sunny day in the", "We bought apples, pears and plums,",
        "Here it is:\n```python\nprint(1)")],
}  # fmt: skip
GOOD = [
    ("Describe the following image.", "A cat sits on the red chair by the window."),
    "Brainstorm titles for a photo album", "Describe a mental image of summer",
    "Create a mental image of success", "Write a video script", "Explain how to make a video.",
    "Explain how weather forecasts work", "What is the time complexity of bubble sort?",
    "Write an email about the attached file", "Design a website for a bakery",
    "Write a call to action: click on this link", "Write a program that sets an alarm",
    ("Give a recipe", "", "Ingredients:\n- eggs\nInstructions:\n1. Boil"),
    ("Sort", "", "#### Steps\n```\nsort\n```\nOutput: [1, 2]"),
    ("Describe a computer", "", "1. Input: from keys\n2. Output: on a screen"),
    ("Which operator compares?", "", "=="), ("Answer with an emoji", "", "😀"),
    ("Is it so?", "", "No"), ("Classify", "", "None of these"),
    ("Excuse me", "", "I'm sorry, but I'm unable to come to work today."),
    ("Explain AI", "", "As an AI-powered tool it cannot fail."),
    ("Explain AI", "", "An essay. As an AI researcher, she did not agree."),
    ("Paraphrase the sentence.", "Paraphrase this: he ran."),
    ("Translate the 詩 of ABC", "ABC"), ("Sort", "[dogs, cats]"),
    ("Why is the output wrong?", "print(4 + 3)\nOutput: 6"), "Output 1 for true",
    ("Continue the row", "Input: 1\nOutput: 2\nInput: 3"),
    ("Reply", "Dear [insert name], thank you for your letter."),
    ("Which article fits?", "", "the"), ("Code", "", "```python\nprint(1)\n```"),
    ("Write a letter", "", "It was good to see you.\n\nBest regards,"),
    ("Tell", "", "There is nothing to be afraid of."),
    ("Write a poem", "", "Roses are red,\nviolets are blue"),
]  # fmt: skip


def defects(fields: str | tuple) -> list[str]:
    fields = (fields,) if isinstance(fields, str) else fields
    return list(find_defects([record(*fields)], set()))


@pytest.mark.parametrize(("rule", "fields"), [(rule, f) for rule in FLAGGED for f in FLAGGED[rule]])
def test_lint_flags_a_defect(rule, fields):
    assert defects(fields) == [rule]


@pytest.mark.parametrize("fields", GOOD)
def test_lint_does_not_flag_a_good_record(fields):
    assert defects(fields) == []


def test_every_rule_is_tried():
    assert {*FLAGGED, "duplicate"} == set(RULES)


def test_duplicate_asks_what_an_earlier_record_asked():
    earlier: set[tuple] = set()
    first, other = record("Add", "2 2", "4"), record("Add", "2 3", "5")
    for instances, flags in (
        ([first], []),
        ([other], []),
        ([record("Add ", "2  2", "four")], ["duplicate"]),
        ([record("Multiply", "2 2", "4")] * 2, []),  # instances of one record
        ([record("Divide", "4 2", "2"), other], ["duplicate"]),
    ):
        assert list(find_defects(instances, earlier)) == flags


def test_lint_flags_a_record_for_any_of_its_instances(command, tmp_path):
    nothing = {"input": "N/A", "output": "N/A"}
    instances = [{"input": "2", "output": "4"}, nothing, {"input": "3", "output": "6"}]
    data = [record("Sing"), {"instruction": "Add", "instances": instances}, {"text": "www.a.com"}]
    code, out, _ = command("curate", "lint", write(tmp_path / "data.json", data))
    assert code == 0 and "data.json: 1 of 3 records flagged (33.3%)" in out
    counts = {name: int(n) for n, name in re.findall(r"^ {0,8}(\d+)  ([\w ]+):", out, re.MULTILINE)}
    broken = {"empty output", "placeholder input"}
    assert counts == {name: int(name in broken) for name in RULES}
    assert "record 2: N/A\n" in out


def test_lint_inspects_each_answer_of_a_conversation(command, tmp_path):
    def conversation(*texts: str) -> dict:
        return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]}

    roles = ("user", "assistant", "user", "assistant")
    data = [
        conversation("Hi.", "Hello.", "Sing!", "La."),
        conversation("Hi.", "Hello.", "Go on", "N/A"),
    ]
    data += [conversation("Count.", "1", "Sing!", "La, la.")]  # asked after something else
    code, out, _ = command("curate", "lint", write(tmp_path / "chats.json", data))
    assert code == 0 and "1 of 3 records flagged" in out
    assert "record 2: 'N/A': Hi. Go on\n" in out and "0  duplicate" in out


def test_lint_examples_cannot_control_the_terminal(command, tmp_path):
    hostile = "http://a.b\x1b]0;owned\x07\u202e\x9b2J\nx"
    data = write(tmp_path / "data.json", [record(hostile + str(n)) for n in range(5)])
    for examples in (1, 4):
        out = command("curate", "lint", data, "--examples", examples)[1]
        assert out.count("    record ") == examples
    assert not any(c for c in out if not c.isprintable() and c != "\n")
    assert r"record 1: http://a.b\x1b]0;owned\x07\u202e\x9b2J x0" in out
    assert printable("a" * 10**6) == "a" * 99 + "…"


MIXED = [
    record("Sing a song", "", "La", id="seed-7", score=[1, {"a": None}]),
    record("Add", "", "N/A", id=8, note="Grüße 😀 \ud83d"),
    {"text": "Once", "source": "book"},
    {"instruction": "Count", "instances": [{"input": "", "output": "1"}], "id": None},
    {"output": "one", "id": 2.5, "instruction": "Count up", "input": None},
    record("Sing a song", "", "Lalala"),
]


def test_fix_splits_the_records_and_changes_nothing_else(command, folder, tmp_path):
    source, kept, dropped = (tmp_path / name for name in ("data.json", "kept.json", "dropped.json"))
    source.write_text(json.dumps(MIXED))
    code, _, _ = command("curate", "lint", source, "--fix", kept, "--dropped", dropped)
    assert code == 0 and source.read_text() == json.dumps(MIXED)
    good, bad = (json.loads(file.read_bytes()) for file in (kept, dropped))
    assert good == [MIXED[i] for i in (0, 2, 3, 4)]
    assert [list(item) for item in good] == [list(MIXED[i]) for i in (0, 2, 3, 4)]  # keys in order
    assert bad == [
        MIXED[1] | {"flags": ["empty output"], "record": 2},
        MIXED[5] | {"flags": ["duplicate"], "record": 6},
    ]
    assert '    {\n        "instruction": "Sing a song"' in kept.read_text()
    assert "Grüße 😀 \\ud83d" in dropped.read_text(encoding="utf-8")

    before = kept.read_bytes(), dropped.read_bytes()
    again = command("curate", "lint", source, "--fix", kept, "--dropped", dropped)
    assert_refused(again, "kept.json exists already")
    assert (kept.read_bytes(), dropped.read_bytes()) == before
    kept.unlink(), dropped.unlink()
    command("curate", "lint", folder, "--fix", kept, "--dropped", dropped)  # a run's records
    assert json.loads(kept.read_text()) == list(read_log(folder / "records.jsonl"))
    assert json.loads(dropped.read_text()) == []


def test_dropped_is_on_disk_before_kept(command, tmp_path, monkeypatch):
    source, kept, dropped = (tmp_path / name for name in ("data.json", "kept.json", "dropped.json"))
    write(source, [record("Add", "", ""), record("Sing")])
    renamed, rename = [], os.replace

    def replace(partial, path):
        renamed.append((path.name, len(json.loads(path.with_name(partial.name).read_text()))))
        if len(renamed) == 2:
            raise OSError(28, "No space left on device")
        rename(partial, path)

    monkeypatch.setattr(os, "replace", replace)
    failed = command("curate", "lint", source, "--fix", kept, "--dropped", dropped)
    assert_refused(failed, "No space left")
    assert renamed == [("dropped.json", 1), ("kept.json", 1)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data.json", "dropped.json"]


def test_fix_refuses_to_lose_records(command, tmp_path):
    source = write(tmp_path / "data.json", [record("Add", "", ""), record("Sing")])
    own = write(tmp_path / "own.json", [record("Add", "", "", flags=["mine"])])
    new, other, dangling = (tmp_path / name for name in ("new.json", "other.json", "link.json"))
    dangling.symlink_to(tmp_path / "nowhere.json")
    before = sorted(tmp_path.iterdir())
    for arguments, words in (
        ((source, "--fix", new), "--dropped"),
        ((source, "--dropped", new), "--fix"),
        ((source, "--fix", new, "--dropped", new), "two files"),
        ((source, "--fix", source, "--dropped", new), "data.json exists already"),
        ((source, "--fix", new, "--dropped", source), "data.json exists already"),
        ((source, "--fix", dangling, "--dropped", new), "link.json exists already"),
        ((own, "--fix", new, "--dropped", other), "record 1 has a field 'flags' already"),
        ((source, "--fix", new, "--dropped", tmp_path / "no" / "other.json"), "no/other.json"),
        ((source, "--fix", tmp_path / "no" / "new.json", "--dropped", other), "no/new.json"),
    ):
        assert_refused(command("curate", "lint", *arguments), words)
        assert sorted(tmp_path.iterdir()) == before


def test_long_texts_are_fast():
    """Patterns that try every way to split a run of spaces or dashes would take hours here."""
    start = time.process_time()
    runs = (" ", "\n", "-", "#", "a", "a ", "this ", "```", "[", "写", "image ", "1. ")
    for run in (*runs, "as an ai, "):
        text = run * (30_000 // len(run)) + "x!"
        find_defects([record(text, text + "?", text), record("Add", text, text)], set())
        opening(text)
    assert time.process_time() - start < 10
