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
from helpers.parity import apart

from alpaca.inference import watermark as watermark_module
from alpaca.inference.watermark import KEY, Watermark
from alpaca.weights.loading import load_model
from model import KVCache
from tokenizer import Tokenizer

NAN, INF = float("nan"), float("inf")
PIECES = ROOT / "data" / "tokenizer.model"


# ---------------------------------------------------------------- the authors' arithmetic, restated


def greens(previous: int, V: int, gamma: float, key: int = KEY) -> list[int]:
    """simple_1: a CPU generator seeded with key times previous id; a permutation's head."""
    generator = torch.Generator(device="cpu")
    generator.manual_seed(key * previous)
    return torch.randperm(V, generator=generator)[: int(V * gamma)].tolist()


def scores(ids: list[int], V: int, gamma: float, key: int = KEY) -> tuple[int, int, float]:
    """Their detector, repeated bigrams ignored: green, scored, z."""
    table = {(a, b): b in greens(a, V, gamma, key) for a, b in pairwise(ids)}
    T, green = len(table), sum(table.values())
    return green, T, (green - gamma * T) / (T * gamma * (1 - gamma)) ** 0.5


@pytest.mark.parametrize("V", [10, 1000, 1024, 32000, 32001])
@pytest.mark.parametrize("gamma", [0.25, 0.5, 0.1, 0.33])
def test_green_lists_are_the_authors(V, gamma):
    for key in (KEY, 7, 2**32 - 1):
        mark = Watermark(V, gamma, key=key)
        for previous in {0, 1, 2, V // 2, V - 1}:
            ours = {token for token in range(V) if mark.is_green(previous, token)}
            assert ours == set(greens(previous, V, gamma, key)) and len(ours) == int(V * gamma)


def test_green_lists_do_not_change_with_torch():
    """Made with torch 2.13. If a release dealt otherwise, text marked before were lost."""
    mark = Watermark(32000)
    found = [[token for token in range(40) if mark.is_green(i, token)] for i in (1, 31999)]
    assert found == [[1, 10, 13, 17, 21, 25, 29, 39], [3, 14, 16, 17, 30, 33]]


@pytest.mark.parametrize("gamma, V", [(0.25, 1024), (0.5, 333), (0.1, 32000)])
def test_green_count_and_z_are_those_of_the_authors_detector(gamma, V):
    chance = random.Random(0)
    few = [chance.randrange(V) for _ in range(12)]  # their pairs return often
    for ids in ([chance.randrange(V) for _ in range(80)], [chance.choice(few) for _ in range(200)]):
        found, (green, scored, z) = Watermark(V, gamma).detect(ids), scores(ids, V, gamma)
        assert (found["green"], found["scored"], found["fraction"]) == (
            green,
            scored,
            green / scored,
        )
        assert found["z"] == pytest.approx(z, abs=1e-12)
        assert found["p"] == pytest.approx(NormalDist().cdf(-z), rel=1e-9)


@pytest.mark.parity
@pytest.mark.parametrize("gamma, V", [(0.25, 1024), (0.5, 333)])
def test_transformers_marks_the_same_and_detects_the_same(gamma, V):
    """Its WatermarkLogitsProcessor, "lefthash", is simple_1 in other hands."""
    from transformers import LlamaConfig, WatermarkDetector, WatermarkingConfig

    theirs, ours = WatermarkingConfig(greenlist_ratio=gamma, bias=1.5), Watermark(V, gamma, 1.5)
    ids, logits = torch.randint(3, V, (4, 60)), torch.randn(4, V)
    marked = theirs.construct_processor(V, "cpu")(ids, logits)
    distance = (ours.bias(logits, ids) - marked).abs().max().item()
    apart("watermarked logits: transformers' processor", distance, 0)
    detector = WatermarkDetector(LlamaConfig(vocab_size=V), "cpu", theirs, True)
    found = detector(ids, return_dict=True)
    for row in range(4):
        mine = ours.detect(ids[row])
        assert mine["green"] == found.num_green_tokens[row]
        distance = abs(mine["z"] - found.z_score[row])
        apart("watermark's z: transformers' detector", distance, 1e-12)
        assert mine["p"] == pytest.approx(found.p_value[row], rel=1e-6)


def test_a_repeated_pair_counts_once():
    mark = Watermark(1024)
    assert mark.detect([5, 9] * 50)["scored"] == 2
    assert mark.detect([5] * 50) == mark.detect([5, 5])
    assert mark.detect([5, 9, 7])["scored"] == 2  # the first is not scored


def test_marks_are_of_each_token_after_the_first():
    mark, ids = Watermark(64), [3, 9, 3, 9, 60, 0]
    assert mark.green_mask(ids) == [b in greens(a, 64, 0.25) for a, b in pairwise(ids)]
    assert mark.green_mask(torch.tensor(ids)) == mark.green_mask(ids) and mark.green_mask([3]) == []
    assert mark.detect(torch.tensor(ids)) == mark.detect(ids)


# ---------------------------------------------------------------- the logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("V", [1000, 1021])
def test_bias_adds_delta_to_what_is_green_after_each_row_s_last_id(dtype, V):
    mark, ids = Watermark(V, delta=1.7), torch.randint(V, (6, 5))
    ids[3, -1] = ids[1, -1]  # two rows alike, the others different
    logits = torch.randn(6, V).to(dtype)
    logits[2, ::3] = -INF
    expected = logits.clone()
    for row in range(6):
        green = greens(int(ids[row, -1]), V, 0.25)
        expected[row, green] = logits[row, green] + 1.7
    before = logits.clone()
    for last in (ids, ids[:, -1:], ids[:, -1:].int()):
        assert torch.equal(mark.bias(logits, last), expected)
        assert mark.bias(logits, last).dtype == dtype
    assert torch.equal(logits, before)  # they are not changed in place


def test_logits_of_rows_without_a_piece_may_be_cut_off_but_not_added():
    mark, ids = Watermark(1001), torch.tensor([[3], [4]])
    logits = torch.randn(2, 1001)
    assert torch.equal(mark.bias(logits[:, :999], ids), mark.bias(logits, ids)[:, :999])
    with pytest.raises(ValueError, match="1002 logits"):
        mark.bias(torch.randn(2, 1002), ids)


def test_settings_at_and_beyond_their_limits():
    for gamma in (0.0, 1.0, -0.5, 2.0, NAN, 0.001, 0.999, 1 - 1e-16):
        with pytest.raises(ValueError, match="but not all"):
            Watermark(100, gamma)
    for delta in (0.0, -1.0, NAN, INF):
        with pytest.raises(ValueError, match="delta"):
            Watermark(100, delta=delta)
    for key in (0, -7, 2**32):
        with pytest.raises(ValueError, match="key must be"):
            Watermark(100, key=key)
    with pytest.raises(ValueError, match="factors of 2"):
        Watermark(32000, key=2**18)  # ids 0 and 16384 would have one list
    mark = Watermark(32000, key=2**17)
    assert len({mark.green_list(i) for i in (0, 1, 16384, 31999)}) == 4
    for gamma in (0.01, 0.99):
        mark, logits = Watermark(100, gamma, 1e4), torch.zeros(1, 100)
        assert (mark.bias(logits, torch.tensor([[5]])) > 0).sum() == int(100 * gamma)
        assert mark.expected_z(100) > 0  # e^10000 is no float


@pytest.mark.parametrize("ids", [[], [5]])
def test_nothing_to_score_is_an_error(ids):
    with pytest.raises(ValueError, match="two"):
        Watermark(1024).detect(ids)


@pytest.mark.parametrize("ids", [[3, 1024], [-1, 3]])
def test_ids_beyond_the_vocabulary_are_refused(ids):
    for score in (Watermark(1024).detect, Watermark(1024).green_mask):
        with pytest.raises(ValueError, match="1024 tokens"):
            score(ids)


# ---------------------------------------------------------------- memory and threads


def test_green_lists_kept_are_bounded(monkeypatch):
    for V in (1024, 32000, 128256):
        kept = Watermark(V).green_list
        assert kept.cache_info().maxsize * len(kept(5)) <= watermark_module.CACHE_BYTES == 2**27
    assert Watermark(32000).green_list.cache_info().maxsize >= 32000
    monkeypatch.setattr(watermark_module, "CACHE_BYTES", 3 * 128)
    chance, mark = random.Random(0), Watermark(1024)
    ids = [chance.randrange(40) for _ in range(400)]
    found = mark.detect(ids)
    assert mark.green_list.cache_info().currsize == 3
    assert mark.green_list.cache_info().misses == len(set(ids[:-1]))  # none was dealt twice
    monkeypatch.undo()
    assert found == Watermark(1024).detect(ids)


def test_threads_do_not_spoil_each_other_s_lists():
    mark, usual = Watermark(32000), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            lists = list(pool.map(mark.make_green_list, range(200)))
    finally:
        sys.setswitchinterval(usual)
    assert lists == [mark.make_green_list(i) for i in range(200)]


# ---------------------------------------------------------------- statistics


def test_unmarked_text_has_z_of_mean_0_and_deviation_1():
    """4,000 random texts. Tails are held to the binomial distribution itself, which z is made of:
    99 tokens are too few for the normal one (0.22 % are above z = 3 instead of 0.13 %)."""
    N, T, gamma, mark = 4000, 99, 0.25, Watermark(1024)
    texts = torch.randint(1024, (N, T + 1)).tolist()
    z = [mark.detect(ids)["z"] for ids in texts]
    assert abs(fmean(z)) < 4 / N**0.5
    assert abs(stdev(z) - 1) < 4 / (2 * N) ** 0.5
    for limit in (1, 2, 3):
        least = gamma * T + limit * (T * gamma * (1 - gamma)) ** 0.5
        rate = sum(
            math.comb(T, g) * gamma**g * (1 - gamma) ** (T - g)
            for g in range(math.floor(least) + 1, T + 1)
        )
        assert rate == pytest.approx(NormalDist().cdf(-limit), rel=0.8)
        above = sum(number > limit for number in z)
        assert abs(above - N * rate) < 4 * (N * rate * (1 - rate)) ** 0.5, (limit, above, N * rate)


def marked_texts(mark: Watermark, rows: int, length: int) -> list[list[int]]:
    """Sampled from logits that are all alike, but for the mark."""
    ids = torch.randint(mark.vocab_size, (rows, 1))
    for _ in range(length):
        p = mark.bias(torch.zeros(rows, mark.vocab_size), ids).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1)], dim=1)
    return ids.tolist()


@pytest.mark.parametrize("gamma, delta", [(0.25, 2.0), (0.5, 1.5)])
def test_z_of_marked_text_grows_with_its_length_as_the_formula_says(gamma, delta):
    rows, mark = 200, Watermark(1024, gamma, delta)
    texts = marked_texts(mark, rows, 200)
    share = gamma * math.exp(delta) / (1 - gamma + gamma * math.exp(delta))
    spread = (share * (1 - share) / (gamma * (1 - gamma))) ** 0.5
    for T in (10, 50, 200):
        found = [mark.detect(ids[: T + 1]) for ids in texts]
        scored = fmean(f["scored"] for f in found)
        assert 0.98 * T < scored <= T  # a few pairs return
        expected = (share - gamma) * scored / (scored * gamma * (1 - gamma)) ** 0.5
        assert mark.expected_z(scored) == pytest.approx(expected)
        assert abs(fmean(f["z"] for f in found) - expected) < 4 * spread / rows**0.5
    assert min(f["z"] for f in found) > 4  # of 200 tokens every text is found


def test_the_paper_s_theorem_bounds_the_green_share_of_surer_models():
    """Spike entropy S(p) = Σ p / (1 + m p), m = (1 - gamma)(α - 1) / (1 + (α - 1) gamma)."""
    mark = Watermark(1024)
    last, alpha = torch.arange(1024)[:, None], math.exp(mark.delta)
    m = 0.75 * (alpha - 1) / (1 + (alpha - 1) * 0.25)
    green = mark.bias(torch.zeros(1024, 1024), last) > 0
    for heat in (0.0, 2.0, 4.0, 8.0, 100.0):
        logits = heat * torch.randn(1024)
        p = logits.softmax(-1)
        S = (p / (1 + m * p)).sum().item()
        q = mark.bias(logits.expand(1024, -1), last).softmax(-1)
        share = (q * green).sum(-1).mean().item()  # over all the lists
        z = (share - 0.25) * (100 / (0.25 * 0.75)) ** 0.5
        # 1,024 lists know the share of one single token to 0.014, which is z = 0.3
        assert z > mark.expected_z(100, S) - (0.01 if heat < 3 else 1.0), heat
        if heat == 0:
            assert z == pytest.approx(mark.expected_z(100), rel=1e-3) and S > 0.99
        if heat == 100:
            assert mark.expected_z(100, S) < 1e-3 and abs(z) < 1


def test_another_key_finds_nothing():
    mark, other = Watermark(1024), Watermark(1024, key=KEY + 2)
    z = [(mark.detect(ids)["z"], other.detect(ids)["z"]) for ids in marked_texts(mark, 20, 100)]
    assert min(a for a, _ in z) > 5 and max(b for _, b in z) < 4
    assert abs(fmean(b for _, b in z)) < 4 / 20**0.5


# ---------------------------------------------------------------- text


@pytest.fixture(scope="module")
def answer() -> tuple[Watermark, Tokenizer, list[int]]:
    """250 tokens of data/tiny-llama, marked, and hot: it is sure of nearly every word."""
    model, tokenizer = load_model(ROOT / "data" / "tiny-llama").eval(), Tokenizer(PIECES)
    mark = Watermark(model.config.vocab_size, delta=4.0)
    torch.manual_seed(0)
    ids = torch.tensor([tokenizer.encode("Tell me about the sea.", bos=True)])
    prompt, cache = ids.shape[1], KVCache(model.config, 1, 300, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(ids, torch.tensor([0, prompt], dtype=torch.int32), cache)
        while ids.shape[1] < prompt + 250:
            logits = mark.bias(logits[:, -1].float() / 1.5, ids)
            logits[:, :3] = -INF  # no end
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)
            logits = model(ids[:, -1:], cache=cache)
    return mark, tokenizer, ids[0, prompt:].tolist()


def test_text_is_found_after_bos_tokenizing_anew_and_cutting(answer):
    mark, tokenizer, ids = answer
    z = mark.detect(ids)["z"]
    assert z > 12
    assert abs(mark.detect([tokenizer.bos_id, *ids])["z"] - z) < 0.2  # one token that says nothing
    again = tokenizer.encode(tokenizer.decode(ids))
    assert again != ids and mark.detect(again)["z"] > 0.7 * z
    for part in (ids[:125], ids[125:], ids[60:185]):
        assert mark.detect(part)["z"] > 0.5 * z  # sqrt(1/2) of it on average
    chance = random.Random(0)
    around = [chance.randrange(3, 1024) for _ in range(125)]
    assert mark.detect([*around, *ids, *around])["z"] > 4


def detect(command, *args):
    return command("watermark", "detect", "--tokenizer", PIECES, *args)


def test_the_command_finds_the_mark(command, tmp_path, answer, monkeypatch):
    mark, tokenizer, ids = answer
    text = tokenizer.decode(ids)
    (tmp_path / "answer.txt").write_text(text)
    found = mark.detect(tokenizer.encode(text))
    code, out, err = detect(command, tmp_path / "answer.txt")
    assert (code, err) == (0, "")
    z, p, green, scored, verdict = out.splitlines()
    assert z.split() == ["z", f"{found['z']:.2f}"] and p.split() == ["p-value", f"{found['p']:.2g}"]
    assert f"{found['fraction']:.1%}" in green and "25.0% by chance" in green
    assert f" {found['scored']} tokens" in scored and verdict.startswith("watermarked")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert detect(command, "-") == (0, out, "")
    code, out, _ = detect(command, tmp_path / "answer.txt", "--json")
    assert code == 0 and json.loads(out) == {**found, "verdict": verdict}
    for other in (("--key", 7), ("--vocab-size", 1025), ("--threshold", 50, "--delta", 99)):
        assert "\nwatermarked" not in detect(command, tmp_path / "answer.txt", *other)[1]


def test_the_verdict_knows_what_it_cannot_know(command, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A short one.")
    assert "too short to tell" in detect(command, text)[1]
    text.write_text((ROOT / "data" / "corpus.txt").read_text()[:3000])
    assert "no watermark found" in detect(command, text)[1]
    mark = Watermark(1024)
    fifteen = {"z": 4.1, "p": 2e-5, "scored": 15}  # 1.065 sqrt(14) < 4 < 1.065 sqrt(15)
    assert mark.verdict(fifteen).startswith("watermarked")
    assert mark.verdict({**fifteen, "scored": 14}).startswith("too short")
    assert mark.verdict({**fifteen, "z": 4.0}).startswith("no watermark")
    assert mark.verdict(fifteen, threshold=5).startswith("too short")


def test_the_vocabulary_is_the_model_s(command, tmp_path):
    """A model of 1,088 rows: its config.json says so, its tokenizer could not."""
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(PIECES.read_bytes())
    said = json.loads((ROOT / "data" / "tiny-llama" / "config.json").read_text())
    text.write_text("The sea is wide, and the sea is deep, and nobody knows how old it is.")
    ids = Tokenizer(PIECES).encode(text.read_text())

    def found(path, *args) -> dict:
        args = ("--tokenizer", path, text, "--json", *args)
        code, out, err = command("watermark", "detect", *args)
        assert code == 0, err
        return json.loads(out)["green"], json.loads(out)["z"]

    of = {V: tuple(Watermark(V).detect(ids)[k] for k in ("green", "z")) for V in (1024, 1088, 1100)}
    assert len(set(of.values())) == 3  # or nothing here could fail
    assert found(folder) == found(folder / "tokenizer.model") == of[1024]
    (folder / "config.json").write_text(json.dumps({**said, "vocab_size": 1088}))
    assert found(folder) == of[1088] and found(folder / "tokenizer.model") == of[1024]
    assert found(folder, "--vocab-size", 1100) == of[1100]


def test_bad_input_is_one_line(command, tmp_path):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("Some text that is fine.")
    bad.write_bytes(b"abc \xff")
    assert_refused(detect(command, bad), "bad.txt", "not UTF-8 at byte 4")
    bad.write_text(" \n")
    assert_refused(detect(command, bad), "no text")
    assert_refused(detect(command, tmp_path / "none.txt"), "none.txt", "No such file")
    assert_refused(detect(command, tmp_path), "Is a directory")
    for flag, value, word in (
        ("--gamma", "1.5", "gamma"),
        ("--gamma", "nan", "gamma"),
        ("--delta", "-1", "delta"),
        ("--key", "0", "key"),
        ("--key", "-3", "key"),
        ("--key", "x", "--key"),
        ("--threshold", "0", "--threshold"),
        ("--vocab-size", "0", "--vocab-size"),
        ("--vocab-size", "1023", "1024 tokens"),
    ):
        assert_refused(detect(command, good, f"{flag}={value}"), word)
    assert_refused(command("watermark", "detect", good, "--tokenizer", good), "not a SentencePiece")
    assert_refused(command("watermark", "detect", good), "--tokenizer")


def test_the_figure_of_z_against_length(command, tmp_path):
    out = tmp_path / "power.svg"
    assert command("watermark", "power", "--out", out) == (0, "", "")
    svg = out.read_text()
    assert svg == (ROOT / "data/watermark_power.svg").read_text() and svg.count("<polyline") == 4
    assert ">S = 0.8<" in svg and ">15.06<" in svg  # 1.065 sqrt(200)
    assert Watermark(32000, gamma=0.9).expected_z(100, 0.6) == 0  # a bound below chance says less
    assert_refused(command("watermark", "power", "--out", out, "--gamma", 0), "gamma")
    assert out.read_text() == svg
