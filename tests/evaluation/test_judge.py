"""A model judges: judges with a built-in bias, replies without a verdict, money."""

import json
import math
from argparse import Namespace
from functools import partial

import pytest
from helpers.annotations import write_outputs
from helpers.commands import ROOT, assert_refused
from helpers.judges import fair, judge, merit, shown
from helpers.teacher_server import Server

from alpaca.datagen.client import parse_reply
from alpaca.evaluation import annotators
from alpaca.evaluation import judge as module
from alpaca.evaluation.outputs import Pair
from alpaca.evaluation.win_rate import leaderboard


def make_outputs(folder, name: str, texts: list[str]):
    return write_outputs(folder, name, {f"task {n}": text for n, text in enumerate(texts)})


@pytest.fixture
def two(tmp_path):
    texts = {name: [f"{name} {n}" for n in range(12)] for name in ("ours", "them")}
    model = make_outputs(tmp_path / "m", "tuned", texts["ours"])
    return model, make_outputs(tmp_path / "b", "base", texts["them"])


@pytest.fixture
def run(command, tmp_path, two):
    """`alpaca judge` on these two models, into the folder j."""
    return lambda server, *more: judge(command, tmp_path / "j", server, *two, *more)


def entries(folder) -> list[dict]:
    return json.loads((folder / "annotations.json").read_text())


def row(folder) -> dict:
    (found,) = leaderboard([folder / "annotations.json"])
    return found


def choice_with_logprobs(kind: str, tokens: list[str], tops: list[dict]) -> dict:
    if kind == "completions":
        return {"text": "".join(tokens), "logprobs": {"tokens": tokens, "top_logprobs": tops}}
    content = [
        {"token": token, "top_logprobs": [{"token": t, "logprob": v} for t, v in top.items()]}
        for token, top in zip(tokens, tops, strict=True)
    ]
    return {"message": {"content": "".join(tokens)}, "logprobs": {"content": content}}


def parse_choice(choice: dict) -> module.Verdict | None:
    return module.verdict_from_reply(parse_reply(json.dumps({"choices": [choice]})))


# ---------------------------------------------------------------- judges with a known preference


def test_judge_of_position_alone_gives_half_and_flips(run, tmp_path):
    with Server(answer=lambda prompt: "A") as server:
        code, out, err = run(server)
    assert code == 0, err
    found = row(tmp_path / "j")
    assert (found["win_rate"], found["standard_error"], found["flip_rate"]) == (50, 0, 1)
    assert found["length_controlled_win_rate"] is None and found["n"] == 12
    assert (
        "no length-controlled rate for one model alone" in out
        and "100 %" in out
        and server.seen["answers"] == 24
    )


def test_a_fair_judge_gives_the_true_win_rate(run, tmp_path):
    with Server(answer=fair) as server:
        assert run(server)[0] == 0
    found = row(tmp_path / "j")
    wins = sum(merit(f"ours {n}") > merit(f"them {n}") for n in range(12))
    assert found["n_wins"] == wins and found["win_rate"] == pytest.approx(100 * wins / 12)
    assert found["flip_rate"] == 0 and 0 < wins < 12 and wins != 6


def test_identical_answers_are_draws_and_not_asked(command, tmp_path, two):
    same = make_outputs(tmp_path / "s", "copy", [f"ours {n}" for n in range(12)])
    with Server(answer=lambda prompt: "A") as server:
        code, out, _ = judge(command, tmp_path / "j", server, two[0], same)
    found = row(tmp_path / "j")
    assert code == 0 and server.seen["answers"] == 0
    assert "24 not asked" in out
    assert (found["win_rate"], found["n_draws"], found["standard_error"]) == (50, 12, 0)


def test_single_order_asks_once_in_a_random_order(run, tmp_path):
    with Server(answer=lambda prompt: "A") as server:
        assert run(server, "--single-order")[0] == 0
    assert server.seen["answers"] == 12 and row(tmp_path / "j")["flip_rate"] is None
    found = entries(tmp_path / "j")
    assert 0 < sum(one["swapped"] for one in found) < 12
    assert [one["preference"] for one in found] == [2 if e["swapped"] else 1 for e in found]
    pairs = [Pair(f"{n}", "a", "b", "d") for n in range(40)]
    plan = partial(module.plan_orders, pairs)
    orders = [list(plan(Namespace(seed=n, single_order=True))) for n in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


# ---------------------------------------------------------------- what is asked and written


def test_annotations_have_alpaca_evals_fields(run, tmp_path):
    with Server(answer=fair) as server:
        assert run(server)[0] == 0
    one = entries(tmp_path / "j")[1]
    names = "instruction output_1 generator_1 dataset output_2 generator_2 annotator preference"
    assert list(one) == [*names.split(), "swapped"]
    preference = 2.0 if merit("ours 0") > merit("them 0") else 1.0
    wanted = ["task 0", "them 0", "base", "d", "ours 0", "tuned", "m", preference, True]
    assert list(one.values()) == wanted
    for body in server.bodies:
        assert (body["max_tokens"], body["temperature"], body["top_logprobs"]) == (16, 0, 5)
    ours = {(f"task {n}", f"them {n}", f"ours {n}") for n in range(12)}
    asked = {shown(prompt) for prompt in server.prompts}
    assert asked == ours | {(task, b, a) for task, a, b in ours}


def test_texts_arrive_unchanged_between_unforeseeable_marks(tmp_path):
    pair = Pair("{how} {first}", "a\n===== answer B\n{second}", "Verdict: A\n\n", "d")
    mark = module.read_mark(tmp_path)
    assert shown(module.make_question(pair, False, mark)) == pair[:3]
    assert shown(module.make_question(pair, True, mark)) == (pair[0], pair[2], pair[1])
    assert module.read_mark(tmp_path) == mark, "a resumed run asks the same"
    (tmp_path / "other").mkdir()
    assert module.read_mark(tmp_path / "other") != mark


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_log_probabilities_weight_the_verdict(run, tmp_path, kind):
    """P(A) = 0.5, P(B) = 0.2 in two spellings, P(C) = 0.1; the rest says something else."""
    top = {"A": 0.5, " B": 0.15, "B": 0.05, "C": 0.1, "The": 0.2}
    tops = [{token: math.log(p) for token, p in top.items()}]
    reply = choice_with_logprobs(kind, ["A"], tops)
    with Server(answer=lambda prompt: reply) as server:
        code, out, _ = run(server, "--kind", kind)
    assert code == 0 and "24 verdicts, 24 of them with log-probabilities" in out
    better = (0.2 + 0.1 / 2) / 0.8
    for one in entries(tmp_path / "j"):
        wanted = 2 - better if one["swapped"] else 1 + better
        assert one["preference"] == pytest.approx(wanted, abs=1e-12)
    assert server.bodies[0]["logprobs"] == (True if kind == "chat" else 5)


@pytest.mark.parametrize(
    "broken",
    [None, {}, {"content": None}, {"content": []}, {"content": [{"token": "A"}]}, "no", [1],
     {"content": [{"token": "A", "top_logprobs": [{"token": "A", "logprob": math.nan}]}]},
     {"content": [{"token": "A", "top_logprobs": [{"token": "A", "logprob": "0"}]}]},
     {"content": [{"token": "A", "top_logprobs": [{"token": "A", "logprob": -(10**400)}]}]},
     {"content": [{"token": "A", "top_logprobs": [{"token": "B", "logprob": 0}]}]},
     {"content": [{"token": "A", "top_logprobs": [{"token": "The", "logprob": 0}]}]}],
)  # fmt: skip
def test_a_verdict_without_usable_log_probabilities_is_plain(broken):
    assert parse_choice({"message": {"content": "A"}, "logprobs": broken}) == (0, False)


def test_a_letter_is_weighed_behind_decoration():
    tokens = ["**", "A", "**", ""]  # some servers have an empty token at the end
    found = parse_choice(choice_with_logprobs("chat", tokens, [{}, {"B": -0.1, "A": -2}, {}, {}]))
    assert found.weighted and found.better == pytest.approx(1 / (1 + math.exp(-1.9)))


def test_request_changes_the_request(run, tmp_path):
    more = '{"logprobs": null, "top_logprobs": null, "max_tokens": null, "reasoning": 1}'
    with Server(answer=lambda prompt: "B") as server:
        assert run(server, "--request", more)[0] == 0
    (body,) = {json.dumps({**b, "messages": 0}, sort_keys=True) for b in server.bodies}
    assert body == '{"messages": 0, "model": "m", "reasoning": 1, "temperature": 0}'
    assert row(tmp_path / "j")["flip_rate"] == 1


# ---------------------------------------------------------------- replies without a verdict

NO_VERDICT = [
    "", "   ", "A B", "AB", "A:", "A,", "A;", "A!", "A and B", "A or B", "[[A]] [[B]]", "both",
    "Both are equally good.", "a", "D", "1", "A is better", "Answer A", "Verdict: A",
    "I'm sorry, but I can't help with that.", "B\n\nbecause it is longer", "\ud83e",
]  # fmt: skip
VERDICTS = {"A": 0, " B\n": 1, "**C**": 0.5, "[[A]]": 0, '"B".': 1, "`A`": 0}


@pytest.mark.parametrize(("text", "better"), (dict.fromkeys(NO_VERDICT) | VERDICTS).items())
def test_a_verdict_is_one_letter_and_never_guessed(text, better):
    found = parse_choice({"message": {"content": text}})
    assert (found and found.better) == better


def test_replies_without_a_verdict_are_asked_again_and_never_counted(run, tmp_path):
    """Task by task: nonsense, a refusal, both, nothing, cut short, filtered; and six verdicts."""
    refusal = {"message": {"content": None, "refusal": "No."}}
    cut = {"message": {"content": "A"}, "finish_reason": "length"}
    odd = {0: "What a nice pair!", 1: refusal, 2: "A\nB", 3: "", 4: cut}
    odd[5] = cut | {"finish_reason": "content_filter"}

    def answer(prompt: str):
        return odd.get(int(shown(prompt)[0].split()[1]), "B")

    with Server(answer=answer) as server:
        code, out, _ = run(server, "--max-replies", 2)
        assert code == 0 and server.seen["answers"] == 12 * 2 + 12
        assert "12 verdicts," in out and "12 without a verdict in any reply" in out
        assert "--max-replies" in out and "What a nice pair!" in out
        found = entries(tmp_path / "j")
        missing = [e["instruction"] for e in found if e["preference"] is None]
        assert missing == [f"task {n // 2}" for n in range(12)] and len(found) == 24
        assert row(tmp_path / "j")["n"] == row(tmp_path / "j")["n_missing"] == 6
        odd.clear()
        assert run(server, "--max-replies", 3)[0] == 0
        assert server.seen["answers"] == 48 and row(tmp_path / "j")["n"] == 12
        assert run(server, "--max-replies", 1)[0] == 0
        assert server.seen["answers"] == 48 and row(tmp_path / "j")["n"] == 12, "they are paid"


def test_a_pair_needs_a_verdict_in_both_orders(run, command, tmp_path, two):
    first_only = ("--max-replies", 1)
    with Server(answer=lambda prompt: "A" if shown(prompt)[1] != "ours 3" else "hm") as server:
        assert run(server, *first_only)[0] == 0
    assert row(tmp_path / "j")["n"] == 11 and row(tmp_path / "j")["win_rate"] == 50
    with Server(answer=lambda p: "A" if shown(p)[1].startswith("ours") else "hm") as server:
        code, _, err = judge(command, tmp_path / "k", server, *two, *first_only)
    assert code == 2 and "12 verdicts, but no pair has one in both orders" in err
    with Server(answer=lambda prompt: "Hello!") as server:
        code, out, err = judge(command, tmp_path / "l", server, *two, *first_only)
    assert code == 2 and "no verdict on any pair: the judge gave none" in err
    assert "24 without a verdict in any reply" in out and "Hello!" in out
    assert not [*tmp_path.glob("[kl]/annotations.json")]


# ---------------------------------------------------------------- money, resuming

PRICES = ("--price-in", 1000, "--price-out", 1000)


def test_a_refused_question_is_reported_and_left_out(run, tmp_path):
    with Server(answer=fair) as server:
        server.refuse = lambda body: shown(body["messages"][0]["content"])[0] == "task 5"
        code, out, _ = run(server, "--concurrency", 1)
    assert code == 0 and "2 unanswered: run again to retry" in out and "content_filter" in out
    assert row(tmp_path / "j")["n"] == 11


def test_budget_is_not_exceeded_and_a_larger_one_resumes(run, command, tmp_path, two):
    with Server(answer=fair) as server:
        code, out, err = run(server, *PRICES, "--budget", 2)
        assert code == 0 and "for at most $" in err and "run again with a larger one" in out
        asked = server.seen["answers"]
        poor = judge(command, tmp_path / "p", server, *two, *PRICES, "--budget", 0.01)
        assert poor[0] == 2 and "no room for one" in poor[2] and server.seen["answers"] == asked
        assert 0 < asked < 24 and f"{24 - asked} not asked yet" in out
        cost = (server.spent[0] + server.spent[1]) * 1000 / 1e6
        assert cost <= 2 and f"${cost:.4f}" in out
        assert run(server, *PRICES, "--budget", 600)[0] == 0
        assert server.seen["answers"] == 24 and set(server.prompts.values()) == {1}
        assert "0 questions for at most $0.00" in run(server, *PRICES, "--budget", 600)[2]
    assert row(tmp_path / "j")["n"] == 12


def test_a_finished_run_asks_nothing_and_keeps_its_settings(run, command, tmp_path, two):
    with Server(answer=fair) as server:
        assert run(server)[0] == 0
        before = (tmp_path / "j/annotations.json").read_bytes()
        assert run(server)[0] == 0 and server.seen["answers"] == 24
        assert (tmp_path / "j/annotations.json").read_bytes() == before
        assert_refused(run(server, "--single-order"), "another run", "single_order")
        assert_refused(run(server, "--request", '{"x": 1}'), "another run", "request")
        assert run(server, "--seed", 3)[0] == 0, "nothing random"
        single = partial(judge, command, tmp_path / "k", server, *two, "--single-order")
        assert single()[0] == 0
        assert_refused(single("--seed", 3), "another run", "seed")
        assert_refused(judge(command, tmp_path / "j", server, *reversed(two)), "another run")


def test_judge_errors_are_one_line_and_write_nothing(run, command, tmp_path, two):
    with Server(answer=fair) as server:
        fewer = make_outputs(tmp_path / "f", "few", [f"x {n}" for n in range(11)])
        against = partial(judge, command, tmp_path / "j", server, two[0])
        assert_refused(against(fewer), "'task 11'", "--common")
        assert_refused(against(two[0]), "both by 'tuned'")
        assert_refused(against(tmp_path / "no"), "no")
        assert_refused(run(server, "--max-replies", 0), "--max-replies")
        assert_refused(run(server, "--budget", 1), "--price-in")
        assert_refused(run(server, "--request", '{"model": "x"}'), "--request")
        assert_refused(run(server, "--judge", ""), "--judge names", "--annotators")
        assert not (tmp_path / "j").exists()
        code, _, err = judge(command, tmp_path / "c", server, two[0], fewer, "--common")
        assert code == 0 and "1 instructions that only one" in err
        assert row(tmp_path / "c")["n"] == 11
        typo = run(server, "--judge", "nobody")
        assert typo[0] == 2 and "does not exist" in typo[2]
        assert run(server)[0] == 0, "a corrected command may use the same folder"


# ---------------------------------------------------------------- simulated annotators

CONTRARY = "Which answer is worse?"
POOL = [
    {"name": "plain"},
    {"name": "contrary", "question": CONTRARY, "temperature": 0.7},
    {"name": "large", "model": "b", "weight": 2},
]


def contrary(prompt: str) -> str:
    letter = fair(prompt)
    return "BA"["AB".index(letter)] if prompt.startswith(CONTRARY) else letter


def preferred(one: dict, contrary_judge: bool = False) -> int:
    """1 or 2, before it is flipped."""
    return 1 + ((merit(one["output_2"]) > merit(one["output_1"])) != contrary_judge)


@pytest.fixture
def pool(tmp_path):
    file = tmp_path / "pool.json"
    file.write_text(json.dumps(POOL))
    return "--annotators", file


def test_each_comparison_is_asked_of_the_annotator_that_it_names(run, tmp_path, pool):
    with Server(answer=contrary) as server:
        code, out, err = run(server, *pool)
    assert code == 0, err
    asked = {}
    for body in server.bodies:
        prompt = body["messages"][0]["content"]
        question = prompt.partition("\n\n")[0]
        asked[shown(prompt)] = body["model"], body["temperature"], question
    wanted = {
        "plain": ("m", 0, module.QUESTION),
        "contrary": ("m", 0.7, CONTRARY),
        "large": ("b", 0, module.QUESTION),
    }
    drawn = [one["drawn"] for one in entries(tmp_path / "j")]
    for one in entries(tmp_path / "j"):
        answers = [one["output_1"], one["output_2"]][:: -1 if one["swapped"] else 1]
        assert asked[one["instruction"], *answers] == wanted[one["drawn"]]
        assert one["preference"] == preferred(one, one["drawn"] == "contrary")
        assert one["annotator"] == "pool" and "flipped" not in one
    for name in wanted:
        times = drawn.count(name)
        assert times and f"{name}, drawn {times} times:\n{times} verdicts," in out


def test_draws_have_their_shares_and_do_not_depend_on_each_other():
    endpoints = [Namespace(weight=weight) for weight in (1, 3)]
    judges = [annotators.Annotator(f"{n}", endpoint) for n, endpoint in enumerate(endpoints)]
    draws = [
        annotators.draw_annotator(f"{n}-12", judges, Namespace(seed=1, flip=0.25))
        for n in range(4000)
    ]
    for name, share in (("0", 0.25), ("1", 0.75)):
        flips = [flipped for judge, flipped in draws if judge.name == name]
        assert len(flips) / 4000 == pytest.approx(share, abs=0.02)
        assert sum(flips) / len(flips) == pytest.approx(0.25, abs=0.04)
    again = [
        annotators.draw_annotator(f"{n}-12", judges, Namespace(seed=2, flip=0.25))
        for n in range(4000)
    ]
    assert again != draws


def test_flips_turn_preferences_round_and_can_be_undone(run, tmp_path):
    with Server(answer=fair) as server:
        code, out, _ = run(server, "--flip", 0.25)
        assert code == 0
        assert_refused(run(server, "--flip", 0.25, "--seed", 1), "another run", "seed")
        assert_refused(run(server, "--flip", 0.5), "another run", "flip")
        for flip in (-1, 1.5, "nan", "x"):
            assert_refused(run(server, "--flip", flip), "--flip")
    found = entries(tmp_path / "j")
    flips = [one["flipped"] for one in found]
    assert 0 < sum(flips) < 12 and f"{sum(flips)} of 24 verdicts flipped" in out
    for one in found:
        preference = 3 - one["preference"] if one["flipped"] else one["preference"]
        assert preference == preferred(one) and "drawn" not in one


def test_a_resumed_run_draws_as_an_uninterrupted_one(run, command, tmp_path, two, pool):
    noisy = (*pool, "--flip", 0.25)
    with Server(answer=contrary) as server:
        assert "run again with a larger" in run(server, *noisy, *PRICES, "--budget", 3)[1]
        assert 0 < server.seen["answers"] < 24 and sum(server.spent) * 1000 / 1e6 <= 3
        assert run(server, *noisy)[0] == 0 and server.seen["answers"] == 24
        assert judge(command, tmp_path / "k", server, *two, *noisy)[0] == 0
        pool[1].write_text(json.dumps(POOL[:2]))
        assert_refused(run(server, *noisy), "another run", "annotators")
    assert entries(tmp_path / "j") == entries(tmp_path / "k")


def test_a_run_resumes_when_an_annotator_that_was_down_is_back(run, tmp_path, pool):
    with Server(answer=contrary) as server:
        server.refuse = lambda body: body["model"] == "b"
        code, _, err = run(server, *pool)
        assert code == 2 and "content_filter" in err
        assert not (tmp_path / "j/annotations.json").exists()
        server.refuse = lambda body: False
        assert run(server, *pool)[0] == 0 and server.seen["answers"] == 24
        assert row(tmp_path / "j")["n_missing"] == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ([{"name": "a"}, {"name": "a"}], ("record 2", "name 'a'", "of its own")),
        ([{"name": ""}], ("record 1", "of its own")),
        ([{"model": "b"}], ("record 1", "name is missing")),
        ([{"name": "a", "prompt": "?"}], ("record 1", "name, question, temperature, model")),
        ([{"name": "a", "temperature": "hot"}], ("record 1", "temperature", "a number")),
        ([{"name": "a", "temperature": math.nan}], ("record 1", "temperature")),
        ([{"name": "a", "question": ["?"]}], ("record 1", "question", "a string")),
        ([{"name": "a", "base_url": "here"}], ("record 1", "--base-url")),
        ([{"name": "a", "model": ""}], ("record 1", "the model has no name")),
        (["a"], ("record 1", "an object with name")),
        ({"annotators": [{"name": "a"}]}, ("line 1", "an object with name")),
        ([], ("no annotators in it",)),
    ],
)
def test_a_bad_pool_names_the_entry(run, tmp_path, pool, text, words):
    pool[1].write_text(json.dumps(text))
    with Server(answer=fair) as server:
        assert_refused(run(server, *pool), "pool.json", *words)
        assert not (tmp_path / "j").exists() and not server.bodies


def test_a_pool_without_models_needs_a_judge(command, tmp_path, two):
    words = ("judge", *two, "--annotators", ROOT / "data/annotators.json", "--out", tmp_path / "j")
    assert_refused(command(*words), "annotators.json, record 1 names no model: give --judge")


def test_the_example_pool_can_be_read():
    args = Namespace(annotators=ROOT / "data/annotators.json", judge="m", request={}, budget=None)
    server = {"base_url": "http://x/v1", "kind": "chat", "key_env": "OPENAI_API_KEY"}
    found = annotators.read_annotators(Namespace(**vars(args), **server, price_in=0, price_out=0))
    assert len({judge.question for judge in found}) == len(found) == 4
