"""The watermark: the authors' green lists, and a z that means what statistics say it means."""

import io
import json
import math
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from statistics import NormalDist, fmean, stdev

import pytest
import torch
from helpers.commands import ROOT, assert_refused

from alpaca.common.errors import UserError
from alpaca.inference import watermark as module
from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams
from alpaca.inference.watermark import KEY, Watermark
from alpaca.weights.loading import load_model
from tokenizer import Tokenizer, load_tokenizer

TOKENIZER = ROOT / "data/tokenizer.model"
NAN, INF = math.nan, math.inf


# ---------------------------------------------------------------- the authors' code, restated


def green_tokens(previous: int, V: int, gamma: float, key: int = KEY) -> list[int]:
    """simple_1: the head of a permutation, by a CPU generator seeded with key · previous id."""
    generator = torch.Generator(device="cpu")
    generator.manual_seed(key * previous)
    return torch.randperm(V, generator=generator)[: int(V * gamma)].tolist()


@pytest.mark.parametrize("V", [10, 1024, 32000, 32001])
@pytest.mark.parametrize("gamma", [0.25, 0.5, 0.1, 0.33])
def test_green_lists_are_the_authors(V, gamma):
    for key in (KEY, 7, 2**32 - 1):
        mark = Watermark(V, gamma, key=key)
        for previous in {0, 1, 2, V // 2, V - 1}:
            green = mark.bias(torch.zeros(1, V), torch.tensor([[previous]]))[0] > 0
            theirs = green_tokens(previous, V, gamma, key)
            assert green.nonzero()[:, 0].tolist() == sorted(theirs)
            assert len(theirs) == int(V * gamma)


def test_green_lists_do_not_change_with_torch():
    """Made with torch 2.13. If a release permuted otherwise, older text would not be detected."""
    mark = Watermark(32000)
    found = [[token for token in range(40) if mark.is_green(i, token)] for i in (1, 31999)]
    assert found == [[1, 10, 13, 17, 21, 25, 29, 39], [3, 14, 16, 17, 30, 33]]


def test_detect_counts_green_pairs_and_a_repeated_pair_once():
    mark, ids = Watermark(1024), [3, 9, 3, 9, 60, 0]
    result, green = mark.detect(ids), sum(mark.green_mask(ids[1:]))
    assert (result["green"], result["scored"], result["fraction"]) == (green, 4, green / 4)
    assert result["z"] == pytest.approx((green - 0.25 * 4) / (4 * 0.25 * 0.75) ** 0.5, abs=1e-12)
    assert result["p"] == pytest.approx(NormalDist().cdf(-result["z"]), rel=1e-9)
    assert mark.detect([5, 9] * 50)["scored"] == 2
    assert mark.detect([5] * 50) == mark.detect([5, 5])
    assert mark.detect([5, 9, 7])["scored"] == 2  # the first token is not scored
    assert mark.green_mask(ids) == [b in green_tokens(a, 1024, 0.25) for a, b in pairwise(ids)]
    assert mark.green_mask(torch.tensor(ids)) == mark.green_mask(ids) and mark.green_mask([3]) == []
    assert mark.detect(torch.tensor(ids)) == mark.detect(ids)


# ---------------------------------------------------------------- the logits


@pytest.mark.parametrize(("dtype", "V"), [(torch.float32, 1000), (torch.bfloat16, 1021)])
def test_bias_adds_delta_to_green_logits(dtype, V):
    mark, ids = Watermark(V, delta=1.7), torch.randint(V, (6, 5))
    ids[3, -1] = ids[1, -1]  # two sequences with the same list
    logits = torch.randn(6, V).to(dtype)
    logits[2, ::3] = -INF
    expected, before = logits.clone(), logits.clone()
    for row in range(6):
        green = green_tokens(int(ids[row, -1]), V, 0.25)
        expected[row, green] = logits[row, green] + 1.7
    for last in (ids, ids[:, -1:]):
        assert torch.equal(mark.bias(logits, last), expected)
    assert torch.equal(logits, before)  # not changed in place
    assert torch.equal(mark.bias(logits[:, :999], ids), expected[:, :999])
    with pytest.raises(UserError, match=f"{V + 1} logits"):
        mark.bias(torch.randn(6, V + 1), ids)


def test_settings_at_and_beyond_their_limits():
    for wrong, message in (
        *(({"gamma": g}, "but not all") for g in (0.0, 1.0, -0.5, 2.0, NAN, 0.001, 1 - 1e-16)),
        *(({"delta": delta}, "delta") for delta in (0.0, -1.0, NAN, INF)),
        *(({"key": key}, "key must be") for key in (0, -7, 2**32)),
    ):
        with pytest.raises(UserError, match=message):
            Watermark(100, **wrong)
    with pytest.raises(UserError, match="factors of 2"):
        Watermark(32000, key=2**18)  # ids 0 and 16384 would have one list
    mark = Watermark(32000, key=2**17)
    assert len({mark.green_list(i) for i in (0, 1, 16384, 31999)}) == 4
    for gamma in (0.01, 0.99):
        mark, logits = Watermark(100, gamma, 1e4), torch.zeros(1, 100)
        assert (mark.bias(logits, torch.tensor([[5]])) > 0).sum() == int(100 * gamma)
        assert mark.expected_z(100) > 0  # e^10000 would overflow


def test_ids_that_cannot_be_scored_are_refused():
    mark = Watermark(1024)
    for ids in ([], [5]):
        with pytest.raises(UserError, match="two are needed"):
            mark.detect(ids)
    for score in (mark.detect, mark.green_mask):
        for ids in ([3, 1024], [-1, 3]):
            with pytest.raises(UserError, match="1024 tokens"):
                score(ids)


# ---------------------------------------------------------------- memory and threads


def test_cache_of_green_lists_is_bounded(monkeypatch):
    assert Watermark(32000).green_list.cache_info().maxsize >= 32000
    monkeypatch.setattr(module, "CACHE_BYTES", 3 * 128)
    rng, mark = random.Random(0), Watermark(1024)
    ids = [rng.randrange(40) for _ in range(400)]
    result = mark.detect(ids)
    assert mark.green_list.cache_info().currsize == 3
    assert mark.green_list.cache_info().misses == len(set(ids[:-1])), "a list was made twice"
    monkeypatch.undo()
    assert result == Watermark(1024).detect(ids)


def test_green_lists_may_be_made_in_several_threads():
    mark, interval = Watermark(32000), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            lists = list(pool.map(mark.make_green_list, range(100)))
    finally:
        sys.setswitchinterval(interval)
    assert lists == [mark.make_green_list(i) for i in range(100)]


# ---------------------------------------------------------------- statistics


def test_unmarked_text_has_z_of_mean_0_and_deviation_1():
    N, mark = 2000, Watermark(1024)
    z = [mark.detect(ids)["z"] for ids in torch.randint(1024, (N, 100)).tolist()]
    assert abs(fmean(z)) < 4 / N**0.5
    assert abs(stdev(z) - 1) < 4 / (2 * N) ** 0.5


def marked_texts(mark: Watermark, count: int, length: int) -> list[list[int]]:
    """Sampled from uniform logits, but for the watermark."""
    ids = torch.randint(mark.vocab_size, (count, 1))
    for _ in range(length):
        p = mark.bias(torch.zeros(count, mark.vocab_size), ids).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1)], dim=1)
    return ids.tolist()


@pytest.mark.parametrize("gamma, delta", [(0.25, 2.0), (0.5, 1.5)])
def test_z_of_marked_text_grows_with_its_length_by_the_formula(gamma, delta):
    count, mark, other = 100, Watermark(1024, gamma, delta), Watermark(1024, gamma, key=KEY + 2)
    texts = marked_texts(mark, count, 200)
    share = gamma * math.exp(delta) / (1 - gamma + gamma * math.exp(delta))
    spread = (share * (1 - share) / (gamma * (1 - gamma))) ** 0.5
    for T in (10, 50, 200):
        results = [mark.detect(ids[: T + 1]) for ids in texts]
        scored = fmean(result["scored"] for result in results)
        assert 0.98 * T < scored <= T  # a few pairs are repeated
        expected = (share - gamma) * scored / (scored * gamma * (1 - gamma)) ** 0.5
        assert mark.expected_z(scored) == pytest.approx(expected)
        assert abs(fmean(r["z"] for r in results) - expected) < 4 * spread / count**0.5
    assert min(result["z"] for result in results) > 4  # with 200 tokens every text is detected
    z = [other.detect(ids)["z"] for ids in texts]  # and none with another key
    assert max(z) < 4.5 and abs(fmean(z)) < 4 / count**0.5


def test_theorem_4_2_bounds_the_green_share_of_surer_models():
    """Spike entropy S(p) = Σ p / (1 + m p), m = (1 - gamma)(α - 1) / (1 + (α - 1) gamma)."""
    mark = Watermark(1024)
    last, alpha = torch.arange(1024)[:, None], math.exp(mark.delta)
    m = 0.75 * (alpha - 1) / (1 + (alpha - 1) * 0.25)
    green = mark.bias(torch.zeros(1024, 1024), last) > 0
    for scale in (0.0, 2.0, 4.0, 8.0, 100.0):
        logits = scale * torch.randn(1024)
        p = logits.softmax(-1)
        S = (p / (1 + m * p)).sum().item()
        q = mark.bias(logits.expand(1024, -1), last).softmax(-1)
        share = (q * green).sum(-1).mean().item()  # over all the lists
        z = (share - 0.25) * (100 / (0.25 * 0.75)) ** 0.5
        # 1,024 lists give the share of one single token to 0.014, which is z = 0.3
        assert z > mark.expected_z(100, S) - (0.01 if scale < 3 else 1.0), scale
        if scale == 0:
            assert z == pytest.approx(mark.expected_z(100), rel=1e-3) and S > 0.99
        if scale == 100:
            assert mark.expected_z(100, S) < 1e-3 and abs(z) < 1


# ---------------------------------------------------------------- text


@pytest.fixture(scope="module")
def answer() -> tuple[Watermark, Tokenizer, list[int]]:
    """250 watermarked tokens of data/tiny-llama, hot: it is sure of nearly every word."""
    mark, tokenizer = Watermark(1024, delta=6.0), load_tokenizer(TOKENIZER)
    engine = Engine(load_model(ROOT / "data/tiny-llama"), tokenizer, watermark=mark)
    tokenizer.eos_id = -1  # so that no token ends the answer
    prompt = tokenizer.encode("Tell me about the sea.", bos=True)
    (sequence,) = engine.generate([prompt], SamplingParams(1.5, max_new_tokens=250, seed=1))
    return mark, tokenizer, sequence.ids


def test_watermark_survives_bos_retokenizing_and_cutting(answer):
    mark, tokenizer, ids = answer
    z = mark.detect(ids)["z"]
    assert z > 12
    assert abs(mark.detect([tokenizer.bos_id, *ids])["z"] - z) < 0.2
    again = tokenizer.encode(tokenizer.decode(ids))
    assert again != ids and mark.detect(again)["z"] > 0.7 * z
    for part in (ids[:125], ids[125:], ids[60:185]):
        assert mark.detect(part)["z"] > 0.5 * z  # sqrt(1/2) of it on average
    rng = random.Random(0)
    other = [rng.randrange(3, 1024) for _ in range(125)]
    assert mark.detect([*other, *ids, *other])["z"] > 4


def detect(command, *args):
    return command("watermark", "--tokenizer", TOKENIZER, *args)


def test_detect_command_finds_the_watermark(command, tmp_path, answer, monkeypatch):
    mark, tokenizer, ids = answer
    text, file = tokenizer.decode(ids), tmp_path / "answer.txt"
    file.write_text(text)
    result = mark.detect(tokenizer.encode(text))
    code, out, err = detect(command, file)
    assert (code, err) == (0, "")
    z, p, green, scored, verdict = out.splitlines()
    assert z.split() == ["z", f"{result['z']:.2f}"]
    assert p.split() == ["p-value", f"{result['p']:.2g}"]
    assert f"{result['fraction']:.1%}" in green and "25.0% by chance" in green
    assert f" {result['scored']} tokens" in scored and verdict.startswith("watermarked")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert detect(command, "-") == (0, out, "")
    code, out, _ = detect(command, file, "--json")
    assert code == 0 and json.loads(out) == {**result, "verdict": verdict}
    assert "\nwatermarked" not in detect(command, file, "--key", 7)[1]


def test_verdict_on_a_short_text_is_too_short(command, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A short one.")
    assert "too short to tell" in detect(command, text)[1]
    text.write_text((ROOT / "data/corpus.txt").read_text()[:3000])
    assert "no watermark found" in detect(command, text)[1]
    mark, result = Watermark(1024), {"z": 4.1, "p": 2e-5, "scored": 15}
    assert mark.verdict(result).startswith("watermarked")  # 1.065 sqrt(14) < 4 < 1.065 sqrt(15)
    assert mark.verdict({**result, "scored": 14}).startswith("too short")
    assert mark.verdict({**result, "z": 4.0}).startswith("no watermark")


def test_detect_command_takes_the_width_of_the_models_logits(command, tmp_path):
    """A model of 1,088 embeddings: its config.json says so, its tokenizer does not."""
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    text.write_text("The sea is wide, and the sea is deep, and nobody knows how old it is.")
    ids = load_tokenizer(TOKENIZER).encode(text.read_text())

    def z(path) -> float:
        code, out, err = command("watermark", "--tokenizer", path, text, "--json")
        assert code == 0, err
        return json.loads(out)["z"]

    expected = {V: Watermark(V).detect(ids)["z"] for V in (1024, 1088)}
    assert len(set(expected.values())) == 2, "or the test could not fail"
    assert z(folder) == z(folder / "tokenizer.model") == expected[1024]
    config = json.loads((ROOT / "data/tiny-llama/config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 1088}))
    assert z(folder) == expected[1088] and z(folder / "tokenizer.model") == expected[1024]


def test_user_errors_are_one_line(command, tmp_path):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("Some text that is fine.")
    bad.write_bytes(b"abc \xff")
    assert_refused(detect(command, bad), "bad.txt", "line 1: not UTF-8")
    bad.write_text(" \n")
    assert_refused(detect(command, bad), "no text")
    assert_refused(detect(command, tmp_path / "none.txt"), "none.txt", "No such file")
    assert_refused(detect(command, tmp_path), "not a regular file")
    for flag, word in (("--key=0", "key must be above 0"), ("--key=x", "--key")):
        assert_refused(detect(command, good, flag), word)
    assert_refused(command("watermark", good, "--tokenizer", good), "not a SentencePiece")
    assert_refused(command("watermark", good), "--tokenizer")


def test_expected_z_grows_as_the_root_of_the_length():
    assert Watermark(32000).expected_z(200) == pytest.approx(1.065 * math.sqrt(200), rel=1e-3)
    assert Watermark(32000, gamma=0.9).expected_z(100, 0.6) == 0  # the bound is below chance
