"""The paper's four stages: prompts, parsers, and records that do not depend on timing."""

import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers.generation import FOUR_STAGES, SEEDS, arguments, comparable, read
from helpers.teacher_server import Server, answer

import selfinstruct
from alpaca.common.errors import UserError
from alpaca.common.json_files import read_log
from alpaca.datagen.client import FREE, Reply
from alpaca.datagen.four_stage import SelfInstruct, filter_instances, parse_instances


@pytest.fixture(autouse=True, scope="module")
def small_window():
    """Generated examples appear in prompts soon, not after sixty requests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SelfInstruct, "window", 8)
        yield


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, small_window) -> Path:
    out = tmp_path_factory.mktemp("four") / "run"
    with Server() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["selfinstruct.py", *arguments(out, server, 100, *FOUR_STAGES)])
        selfinstruct.main()
    return out


def test_records_have_instances(run_folder, tmp_path, command):
    records = read(run_folder, "records")
    assert 100 <= len(records) < 107  # whole answers
    for record in records:
        classify = record["instruction"].startswith("Classify")
        assert record["is_classification"] == classify
        expected = [("it shines", "good"), ("it rains", "bad")]
        expected = expected if classify else [("three", "drei"), ("four", "vier")]
        assert [(i["input"], i["output"]) for i in record["instances"]] == expected
        assert "input" not in record
    assert {len(record["provenance"]["prompt_seeds"]) for record in records} == {6, 8}
    assert command(selfinstruct, "export", run_folder, "--out", tmp_path / "a.json")[0] == 0
    assert len(json.loads((tmp_path / "a.json").read_text())) == 2 * len(records)


def test_records_do_not_depend_on_the_order_of_answers(run_folder, tmp_path, command):
    rng = random.Random(0)

    def slowly(prompt: str) -> str:
        time.sleep(rng.uniform(0, 0.03))
        return answer(prompt)

    with Server(answer=slowly) as server:
        args = arguments(tmp_path / "r", server, 100, *FOUR_STAGES, "--concurrency", 9)
        assert command(selfinstruct, *args)[0] == 0
    assert comparable(tmp_path / "r") == comparable(run_folder)


def test_failed_instances_leave_the_same_records_after_resuming(tmp_path, command):
    def choosy(prompt: str) -> str:
        time.sleep((len(prompt) % 7) / 1000)
        if prompt.endswith(("Input:", "label:")) and len(prompt) % 3 == 0:
            return " x\nOutput: x"
        return answer(prompt) + "\n16. Draw it for me now" * prompt.endswith("9.")

    for name, numbers in (("a", [45]), ("b", [15, 45])):
        with Server(answer=choosy) as server:
            server.refuse = lambda body: len(str(body)) % 19 == 0
            for num in numbers:
                args = arguments(tmp_path / name, server, num, *FOUR_STAGES)
                assert command(selfinstruct, *args)[0] == 0
    assert comparable(tmp_path / "a") == comparable(tmp_path / "b")
    reasons = Counter(line["why"] for line in read(tmp_path / "a", "rejected"))
    assert reasons["instances: none usable"] > 5 and reasons["instances: no answer"] > 0
    assert reasons["asks for draw"] > 5


def test_budget_leaves_out_what_is_incomplete(run_folder, tmp_path, command):
    more = ("--price-in", 1000, "--price-out", 9000)
    with Server() as server:
        args = [*arguments(tmp_path / "r", server, 100, *FOUR_STAGES, *more), "--budget"]
        code, out, err = command(selfinstruct, *args, "100")
        assert code == 0 and "The budget of $100 does not allow" in out, err
        code, _, err = command(selfinstruct, *args, "4000")
        assert code == 0 and max(server.prompts.values()) == 1, err
    assert comparable(tmp_path / "r") == comparable(run_folder)


def test_prompts_show_seeds_in_the_order_of_the_stage():
    cases = [{"input": "", "output": "x"}, {"input": "i", "output": "y"}]
    seeds = [{"id": f"{n}", "instruction": f"Do  {n}", "instances": cases} for n in range(8)]
    with pytest.raises(UserError, match="needs 8 seeds, of classification"):
        SelfInstruct([seed | {"is_classification": False} for seed in seeds], "", "English", 0, {})
    seeds = [seed | {"is_classification": seed["id"] == "0"} for seed in seeds]
    stages = SelfInstruct(seeds, "", "English", 0, {})
    assert "\n\nTask: Do 0\nClassification: Yes\n\n" in stages.kind_prompt
    assert "\n\nTask: Do 7\nClassification: No\n\n" in stages.kind_prompt
    label_first, input_first = (stages.instance_prompts[first] for first in (True, False))
    labelled = "\n\nTask: Do 0\nClass label: x\nInput: <noinput>\nClass label: y\nInput: i\n\n"
    assert label_first.endswith(labelled) and label_first.count("Task:") == 1
    free = "\n\nTask: Do 7\nExample 1\nInput: <noinput>\nOutput: x\nExample 2\nInput: i\n"
    assert free in input_first and input_first.count("Task:") == 7


def test_prompt_shows_generated_instructions_of_long_before():
    stages = SelfInstruct(list(read_log(SEEDS)), "", "English", 0, {})
    early, late = [(3, "early one"), (9, "early two")], [(10, "late one"), (400, "late two")]
    prompt, _, seeds = stages.prompt(9 + 8, early + late)
    assert "early one" in prompt and "early two" in prompt and "late" not in prompt
    assert len(seeds) == 6 and prompt.endswith("\n9.")
    assert stages.prompt(9 + 8, early + late)[0] == prompt != stages.prompt(10, [])[0]


def reply(text: str, truncated: bool = False) -> Reply:
    return Reply(text, truncated, FREE, "", "")


def test_parse_reads_a_numbered_list():
    parse = SelfInstruct(list(read_log(SEEDS)), "", "English", 0, {}).parse
    for text in (
        " Do a.\n10. Do b.",
        "9. Do a.\r\n10) **Do b.**",
        "Here are more:\n9. Do a.\n10. Do b.",
    ):
        assert [task.instruction for task in parse(reply(text))] == ["Do a.", "Do b."]
    assert [task.reason for task in parse(reply(" Do a.\n10. Do", True))] == ["", "cut"]


@pytest.mark.parametrize(
    "text, label_first, expected",
    [
        (" a\nOutput: b\n\nExample 2\nInput: c\nOutput: d", False, [("a", "b"), ("c", "d")]),
        ("Example 1\nInput: a\nOutput: b", False, [("a", "b")]),
        (" <noinput>\nOutput: b\nmore b", False, [("", "b\nmore b")]),
        (" a\nOutput: a", False, []),  # repeats the input
        (" a\nOutput:", False, []),
        (
            " a\nOutput: b\nInput: a\nOutput: b\nInput: c\nOutput: d",
            False,
            [("a", "b"), ("c", "d")],
        ),
        (" a\nOutput: b\nInput: a\nOutput: c", False, []),  # two outputs of one input
        (" yes\nInput: a\nClass label: no\nInput: b", True, [("a", "yes"), ("b", "no")]),
        (" yes\nInput:", True, [("", "yes")]),
        ("", False, []),
        ("", True, []),
    ],
)
def test_instances_are_parsed_and_filtered(text, label_first, expected):
    instances = filter_instances(parse_instances(reply(text), label_first))
    assert [(one["input"], one["output"]) for one in instances] == expected


def test_last_instance_of_a_truncated_answer_is_dropped():
    text = " a\nOutput: b\nInput: c\nOutput: d"
    assert [i["input"] for i in parse_instances(reply(text, True), False)] == ["a"]
