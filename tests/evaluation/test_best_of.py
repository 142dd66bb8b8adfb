"""The best of n answers: what to expect of it, the picks, and preference pairs with noise."""

import json
import math
from itertools import combinations

import numpy as np
import pytest
from helpers.commands import ROOT, assert_refused
from helpers.models import small_config
from helpers.training import TOKENIZER, reward_model

from alpaca.common.json_files import json_records
from alpaca.datagen.formats import load_records, normalize_record
from alpaca.datagen.preferences import load_preferences
from alpaca.evaluation.best_of import expected_best, with_answer
from alpaca.weights.reward import RewardModel, reward_fields, rewards
from alpaca.weights.writer import save_model
from tokenizer import load_tokenizer

CHAT = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "pear"}]
LINES = [
    {"instruction": "a", "input": "x", "output": "7", "outputs": ["1", "7", "2", "7."]},
    {"instruction": "b", "input": "", "output": "7", "outputs": ["1", "2", "3", "4"]},
    {"instruction": "c", "input": "", "output": "7", "outputs": []},
    {"instruction": "d", "input": "", "output": "7", "outputs": ["7", "7", "7", "x"]},
]


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def samples(tmp_path):
    return write_lines(tmp_path / "samples.jsonl", LINES)


def test_expected_best_is_the_mean_over_all_sets_of_answers():
    rewards = np.random.default_rng(0).normal(size=(3, 6)).round(1)
    for N in range(1, 7):
        sets = [[max(chosen) for chosen in combinations(row, N)] for row in rewards]
        np.testing.assert_allclose(expected_best(rewards, N), np.mean(sets, axis=1), atol=1e-12)


def test_expected_best_is_unbiased_and_rises_as_order_statistics_say():
    """The best of N uniform numbers is N / (N + 1) on average, of N coins 1 - 2^-N."""
    rng = np.random.default_rng(0)
    uniform, coins = rng.random((20_000, 16)), rng.integers(2, size=(20_000, 16))
    for N in (1, 2, 4, 8, 16):
        assert expected_best(uniform, N).mean() == pytest.approx(N / (N + 1), abs=0.006)
        assert expected_best(coins, N).mean() == pytest.approx(1 - 2.0**-N, abs=0.006)


def test_best_of_prints_the_expected_rewards(command, samples):
    code, out, err = command("best-of", samples, "--check", "exact")
    assert code == 0 and "3 records with 4 answers" in out, err
    table = [line.split() for line in out.splitlines()[2:]]
    expected = [(1, (1 + 0 + 3) / 12), (2, (1 / 2 + 0 + 1) / 3), (4, 2 / 3)]
    assert [(int(line[0]), float(line[1])) for line in table] == [
        (N, pytest.approx(mean, abs=5e-4)) for N, mean in expected
    ]
    half = 1.96 * np.std([0.25, 0, 0.75], ddof=1) / 3**0.5
    interval = [float(end.strip("[,]")) for end in table[0][2:4]]
    assert interval == pytest.approx([1 / 3 - half, 1 / 3 + half], abs=1e-3)
    assert float(table[2][-1]) == pytest.approx(math.log(4) - 3 / 4, abs=5e-3)


def test_best_of_one_record_has_no_interval(command, samples):
    write_lines(samples, LINES[:1])
    code, out, _ = command("best-of", samples, "--check", "exact")
    assert code == 0 and out.splitlines()[2].split() == ["1", "0.250", "unknown", "0.00"]


def test_best_of_writes_the_first_best_of_the_first_n(command, samples, tmp_path):
    out = tmp_path / "best.json"

    def picks(*more):
        code, _, err = command("best-of", samples, "--check", "number", "--out", out, *more)
        assert code == 0, err
        return [(one["instruction"], one["output"]) for one in load_records(out)]

    assert picks() == [("a", "7"), ("b", "1"), ("d", "7")]
    assert picks("--min-reward", 1) == [("a", "7"), ("d", "7")]
    assert picks("--min-reward", 1, "--n", 1) == [("d", "7")]
    write_lines(samples, [{"messages": CHAT, "outputs": ["fig", "pear", "plum"]}])
    assert command("best-of", samples, "--check", "exact", "--out", out)[0] == 0
    assert load_records(out) == [{"messages": CHAT}]


def test_best_of_pairs_are_preferences_of_the_best_over_the_worst(command, samples, tmp_path):
    pairs = tmp_path / "pairs.json"
    write_lines(samples, [*LINES, {"messages": CHAT, "outputs": ["fig", "pear", "plum", "fig"]}])
    code, out, err = command("best-of", samples, "--check", "exact", "--pairs", pairs)
    assert code == 0 and "3 pairs, 0 of them flipped; 1 records have no" in out, err
    found = load_preferences([pairs])
    question = {"instruction": "a", "input": "x"}
    assert found.records[:2] == [question | {"output": "7"}, question | {"output": "1"}]
    assert [record["output"] for record in found.records[2:4]] == ["7", "x"]
    wrong = {"role": "assistant", "content": "fig"}
    assert found.records[4:] == [{"messages": CHAT}, {"messages": [CHAT[0], wrong]}]


def test_best_of_flips_pairs_at_their_rate_by_the_seed(command, samples, tmp_path):
    n, pairs = 2000, tmp_path / "pairs.json"
    write_lines(samples, [LINES[0] | {"instruction": f"Task {i}."} for i in range(n)])

    def flipped(*more):
        flags = ("--check", "exact", "--pairs", pairs)
        code, out, err = command("best-of", samples, *flags, *more)
        found = [one["chosen"] != "7" for one in json.loads(pairs.read_text())]
        assert code == 0 and f"{n} pairs, {sum(found)} of them flipped" in out, err
        return found

    quarter = flipped("--flip", 0.25)
    assert abs(sum(quarter) - n / 4) < 4 * (n * 3 / 16) ** 0.5
    assert quarter == flipped("--flip", 0.25) != flipped("--flip", 0.25, "--seed", 1)
    assert sum(flipped("--flip", 1)) == n and not any(flipped("--flip", 0))


def test_best_of_picks_by_a_reward_model(command, samples, tmp_path):
    folder, out, tokenizer = tmp_path / "reward", tmp_path / "best.json", load_tokenizer(TOKENIZER)
    config = small_config(vocab_size=1024, max_position_embeddings=256)
    model = reward_model(config, std=0.2)
    options = {"kind": RewardModel, "fields": reward_fields(tokenizer, config)}
    save_model(model, config, folder, tokenizer=TOKENIZER, **options)
    both = command("best-of", samples, "--check", "exact", "--reward-model", folder)
    assert_refused(both, "--reward-model", "not allowed with", "--check")
    once = command("best-of", samples, "--check", "exact", "--out", out, "--pairs", out)
    assert_refused(once, "--out and --pairs are both")
    assert not out.exists()
    assert_refused(command("best-of", samples, "--reward-model", tmp_path), "no config.json")
    written = command("best-of", samples, "--reward-model", ROOT / "data/tiny-llama")
    assert_refused(written, "tiny-llama: not a reward model", "--objective reward")
    assert_refused(command("generate", "--model-dir", folder, "Hi."), "a reward model", "best-of")
    write_lines(samples, [*LINES, {"messages": CHAT, "outputs": ["fig", "pear", "plum", "kiwi"]}])
    code, printed, err = command("best-of", samples, "--reward-model", folder, "--out", out)
    assert code == 0, err
    expected, best = [], []
    for line in json_records(samples):
        (record,) = normalize_record(line[1])
        answered = [with_answer(record, text) for text in line[1]["outputs"]]
        if answered:  # one by one
            found = [rewards(model, tokenizer, [each])[0] for each in answered]
            expected.append(answered[np.argmax(found)])
            best.append(max(found))
    assert load_records(out) == expected
    assert float(printed.splitlines()[-2].split()[1]) == pytest.approx(np.mean(best), abs=1e-3)
    long = [{**LINES[0], "output": "fox " * count} for count in (300, 400)]
    first, second = rewards(model, tokenizer, long)  # cut to the model's positions
    assert first == second


def test_best_of_errors_name_the_place(command, samples, tmp_path):
    def refuse(lines, *words, check="number", more=()):
        write_lines(samples, lines)
        assert_refused(command("best-of", samples, "--check", check, *more), *words)

    refuse(LINES, "checker 'excat'", check="excat")
    refuse(LINES, "--n 5", "has 4 answers", more=("--n", 5))
    refuse(LINES, "--flip: invalid number from 0 to 1", more=("--flip", 2))
    refuse(LINES, "--flip goes with --pairs", more=("--flip", 0.5))
    refuse(LINES, "--min-reward goes with --out", more=("--min-reward", 1))
    refuse(LINES, "samples.jsonl is an input", more=("--out", samples))
    refuse([LINES[2]], "no answers in it", "alpaca samples")
    refuse([LINES[0], LINES[0] | {"outputs": ["1"]}], "line 2: 1 answers", "have 4")
    refuse([LINES[0] | {"output": "seven"}], "line 1: no number in the reference")
    refuse([{"instruction": "a", "output": "7"}], "line 1: outputs is missing", "alpaca samples")
    refuse([{"outputs": ["a"]}], "line 1: its fields")
