"""The Batch API: half the price, nothing bought twice, and servers that misbehave."""

import asyncio
import json

import pytest
from helpers import teacher_server
from helpers.generation import arguments, read
from helpers.teacher_server import Server

import selfinstruct
from alpaca.common.errors import UserError
from alpaca.common.json_files import append_jsonl, read_log
from alpaca.datagen import batch
from alpaca.datagen.client import MAX_RESPONSE, RequestFailedError

BATCH = ("--batch", "--poll", 0.02)


@pytest.mark.parametrize("lost", [False, True], ids=["", "the response to creating it is lost"])
def test_batches_cost_half_and_make_the_same_records(tmp_path, command, lost):
    with Server() as server:
        assert command(selfinstruct, *arguments(tmp_path / "s", server, 200))[0] == 0
    with Server() as server:
        faults = ["lost"] if lost else []
        server.fault = lambda: faults.pop() if faults else ""
        code, _, err = command(selfinstruct, *arguments(tmp_path / "r", server, 200, *BATCH))
        assert code == 0, err
        assert server.bodies == [], "not a single request outside of batches"
        assert max(server.prompts.values()) == 1, "none is bought twice"
    records, responses = read(tmp_path / "r", "records"), read(tmp_path / "r", "responses")
    assert {record["provenance"]["endpoint"] for record in records} == {"chat in a batch"}
    failed = [entry for entry in responses if "failed" in entry]
    assert failed and len(records) == 200  # the server fails the fourth of each batch
    for entry in responses:
        if "failed" not in entry:
            usage = entry["usage"]
            dollars = (usage["prompt"] + 2 * usage["completion"]) / 2e6
            assert entry["cost"] == pytest.approx(dollars)
    single = {record["item"]: record["instruction"] for record in read(tmp_path / "s", "records")}
    assert all(single.get(r["item"], r["instruction"]) == r["instruction"] for r in records)


def test_several_teachers_share_one_budget(tmp_path, command):
    def count(server) -> int:
        return sum(state["status"] == "in_progress" for state in server.batches.values())

    def finish(server, state):
        unfinished.append(count(one) + count(two))
        teacher_server.finish(server, state)

    unfinished: list[int] = []
    with Server() as one, Server() as two:
        one.finish = two.finish = finish
        teachers = [{"model": "a"}, {"model": "b", "base_url": two.url}]
        (tmp_path / "t.json").write_text(json.dumps(teachers))
        more = ("--teachers", tmp_path / "t.json", "--price-in", 1000, "--price-out", 9000)
        args = arguments(tmp_path / "r", one, 300, *BATCH, *more, "--budget", 20)
        code, out, err = command(selfinstruct, *args)
        assert code == 0 and "does not allow another request" in out, err
        assert one.batches and two.batches
    assert set(unfinished) == {1}, "a request can cost $13.8: two are more than $20"
    assert 0 < sum(entry["cost"] for entry in read(tmp_path / "r", "responses")) <= 20


def test_requests_missing_from_the_results_are_asked_again(tmp_path, command):
    def forgetful(server, state):
        teacher_server.finish(server, state)
        file = state["output_file_id"]
        if len(server.batches) == 1:  # the first request is not answered
            lines = server.files[file].splitlines(True)
            server.files[file] = b"".join(x for x in lines if b'"custom_id": "0"' not in x)

    with Server() as server:
        server.finish = forgetful
        code, _, err = command(selfinstruct, *arguments(tmp_path / "r", server, 100, *BATCH))
        assert code == 0, err
        assert sorted(server.prompts.values())[-2:] == [1, 2]
    assert len(read(tmp_path / "r", "records")) == 100


def test_batch_without_any_answer_ends_the_run(tmp_path, command):
    def nothing(server, state):
        lines = [{"custom_id": r["custom_id"]} for r in teacher_server.requests_of(server, state)]
        server.files["none"] = "".join(json.dumps(line) + "\n" for line in lines).encode()
        state.update(status="completed", error_file_id="none", request_counts=None, metadata=None)

    def fail(server, state):
        state.update(status="failed", errors={"data": [{"message": "line 3 is bad"}]})

    for name, finish, message in [("a", nothing, "is completed"), ("b", fail, "line 3 is bad")]:
        with Server() as server:
            server.batches["other"] = {"id": "other", "status": "failed", "metadata": None}
            server.finish = finish
            args = arguments(tmp_path / name, server, 50, *BATCH)
            code, _, err = command(selfinstruct, *args)
            assert code == 2 and "Traceback" not in err
            assert "without any answer" in err.splitlines()[-1] and message in err.splitlines()[-1]
            assert len(server.batches) == 2
            server.finish = teacher_server.finish
            assert command(selfinstruct, *args)[0] == 0, "the next run buys another batch"


def test_find_batch_reads_every_page_once():
    first = {"data": [{"id": "a", "status": "x", "metadata": None}], "has_more": True}
    ours = {"id": "b", "status": "x", "metadata": {"name": "ours"}}
    later = {"data": [ours, first["data"][0]], "has_more": True}
    paths = []

    class Client:
        async def call(self, endpoint, method, path, parse):
            paths.append(path)
            return parse(json.dumps(later if "after" in path else first))

    for name, found in (("ours", ours), ("another's", None)):
        assert asyncio.run(batch.find_batch(Client(), None, name)) == found
    assert paths == ["batches?limit=100", "batches?limit=100&after=a"] * 2


def test_parse_results_has_an_error_for_every_bad_line():
    good = {"choices": [{"message": {"content": "x"}}], "id": "a"}
    lines = [
        {"response": {"status_code": 200, "body": good}},
        {"response": {"status_code": 500, "body": good}},
        {"response": {"status_code": 200, "body": {"choices": []}}},
        {"response": None, "error": "expired"},
        {"response": {"status_code": 200, "body": good | {"x": "x" * MAX_RESPONSE}}},
    ]
    text = "\n".join(json.dumps(line | {"custom_id": str(n)}) for n, line in enumerate(lines))
    replies = batch.parse_results(text + "\n")
    assert replies["0"].text == "x" and list(replies) == ["0", "1", "2", "3", "4"]
    assert all(isinstance(replies[id], RequestFailedError) for id in ("1", "2", "3", "4"))


def test_largest_response_fits_into_a_line_of_the_log(tmp_path):
    append_jsonl(tmp_path / "log.jsonl", entry := {"response": "\\" * MAX_RESPONSE})
    assert list(read_log(tmp_path / "log.jsonl")) == [entry]


def test_damaged_batches_file_names_the_batch_and_the_field(tmp_path):
    lines = '{"name": "a"}\n{"name": "a", "over": "completed"}\n{"name": "b", "model": "m"}\n'
    (tmp_path / "batches.jsonl").write_text(lines)
    with pytest.raises(UserError, match="batches.jsonl, batch b: url is missing"):
        batch.pending_batches(tmp_path / "batches.jsonl")
