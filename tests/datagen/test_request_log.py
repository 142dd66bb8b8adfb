"""Which teacher gets a question. What is asked, stored and paid is seen in test_selfinstruct.py."""

import argparse
import json
from collections import Counter

import pytest

from alpaca.common.errors import UserError
from alpaca.datagen.endpoints import Endpoint, add_server_arguments
from alpaca.datagen.request_log import RequestLog, Teachers


def test_teachers_share_the_requests_by_weight(tmp_path):
    parser = argparse.ArgumentParser()
    add_server_arguments(parser)
    parser.set_defaults(seed=0)
    endpoints = [Endpoint("a", "http://x/v1", weight=3), Endpoint("b", "http://x/v1")]
    teachers = Teachers(RequestLog(tmp_path / "r.jsonl"), endpoints, parser.parse_args([]))
    counts = Counter(teachers.endpoint_of(str(n)).model for n in range(4000))
    assert 2900 < counts["a"] < 3100
    for n in range(50):  # an instruction and its instances come from the same teacher
        assert teachers.endpoint_of(f"{n}") is teachers.endpoint_of(f"{n}.0af3.kind")


@pytest.mark.parametrize("response", ["{", "[" * 99_999, "7", '{"choices": [{"text": 5}]}'])
def test_damaged_response_in_the_log_is_named(tmp_path, response):
    source = dict.fromkeys(("teacher", "url", "endpoint", "licence"), "x")
    entry = {"id": "0", "provenance": source, "cost": 0, "response": response}
    entry["usage"] = {"prompt": 1, "completion": 1, "unmetered": 0}
    (tmp_path / "r.jsonl").write_text(json.dumps(entry) + "\n")
    with pytest.raises(UserError, match="r.jsonl, line 1: response is not a server's"):
        RequestLog(tmp_path / "r.jsonl")
