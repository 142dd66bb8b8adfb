"""The pictures of the book: `python -m docs.pictures` writes docs/pictures/*.svg."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from alpaca.common.charts import COLOURS, FAINT, INK, axis, dot, interval_chart, label, line, svg
from alpaca.common.json_files import read_log
from alpaca.datagen.formats import load_records
from alpaca.evaluation.win_rate import describe_difference, wilson
from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams
from alpaca.training.plot import plot_run
from alpaca.weights.checkpoint import stored_tensors
from alpaca.weights.loading import load_model
from alpaca.weights.quantized_linear import Int4Linear, Int8Linear
from dataset import Examples, encode_all, encode_record, make_row, pack_rows
from model import IGNORE
from rougel import lcs_rows
from tokenizer import SentencePieceTokenizer, load_tokenizer

BLUE, ORANGE, GREEN, PINK, GREY, VIOLET = COLOURS
FOLDER = Path(__file__).parent / "pictures"
DATA = FOLDER.parent.parent / "data"


def box(x: float, y: float, width: float, height: float, text: str, colour=GREY, stroke=1.5) -> str:
    """A frame with lines of text in its middle."""
    place = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="4"'
    rect = f'<rect class="paper" {place} fill="#fff" stroke="{colour}" stroke-width="{stroke}"/>'
    lines, middle = text.split("\n"), y + height / 2 + 4
    tops = (middle + 15 * (i - (len(lines) - 1) / 2) for i in range(len(lines)))
    return rect + "".join(label(t, x + width / 2, y) for t, y in zip(lines, tops, strict=True))


def arrow(*points: tuple[float, float], colour=GREY) -> str:
    """A line through points, with a head at the last one."""
    (x0, y0), (x, y) = points[-2:]
    length = ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5
    a, b = (x - x0) / length, (y - y0) / length
    back, side = (x - 8 * a, y - 8 * b), (4 * b, -4 * a)
    head = [(x, y), *((back[0] + s * side[0], back[1] + s * side[1]) for s in (1, -1))]
    path = " ".join(f"{x:g},{y:g}" for x, y in [*points[:-1], back])
    tip = " ".join(f"{x:.1f},{y:.1f}" for x, y in head)
    shaft = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
    return f'{shaft}<polygon points="{tip}" fill="{colour}"/>'


def plus(x: float, y: float) -> str:
    place = f'class="paper" cx="{x}" cy="{y}" r="11"'
    circle = f'<circle {place} fill="#fff" stroke="{BLUE}" stroke-width="2"/>'
    return circle + label("+", x, y + 6, colour=BLUE, size=18)


# ---------------------------------------------------------------- the front page


def road() -> str:
    """The steps with their files, above the losses of `make train` with --eval-every 75, whose
    metrics are in pictures/run.jsonl."""
    boxes = {
        (10, 40, 216): "175 seed tasks\ndata/seed_tasks.jsonl",
        (252, 40, 216): "a teacher writes, filters keep\nselfinstruct.py, rougel.py",
        (494, 40, 216): "52,000 records, packed into rows\ndataset.py, tokenizer.py",
        (10, 140, 216): "a base LLaMA\nalpaca/weights/",
        (252, 140, 216): "fine-tune\nfsdp_train.py, model.py",
        (494, 140, 216): "learn from preferences\nfsdp_train.py --objective dpo",
        (10, 240, 160): "publish\nweightdiff.py",
        (190, 240, 160): "answer and chat\nalpaca/inference/",
        (370, 240, 160): "serve\nalpaca/serving/",
        (550, 240, 160): "compare\nalpaca/evaluation/",
    }
    parts = [label("From seed tasks to a published model", 360, 22, size=15)]
    for (x, y, width), text in boxes.items():
        colour = ORANGE if text.startswith("fine-tune") else BLUE
        parts.append(box(x, y, width, 52, text, colour))
    parts += [arrow((226, y), (252, y)) for y in (66, 166)]
    parts += [arrow((468, y), (494, y)) for y in (66, 166)]
    parts += [arrow((602, 92), (602, 116), (360, 116), (360, 140))]
    for start, ends in ((360, (90, 270)), (602, (450, 630))):
        parts += [arrow((start, 192), (start, 216), (end, 216), (end, 240)) for end in ends]
    parts.append(line("M360 216H602", GREY, 1.5))
    parts.append(label("make train: 1.07M parameters", 360, 326, size=15))
    chart = plot_run([*read_log(FOLDER / "run.jsonl")], "loss")
    parts.append(chart.replace("<svg ", '<svg y="326" ', 1))
    return svg(720, 800, parts)


# ---------------------------------------------------------------- 1. the model


def block() -> str:
    """One block of data/tiny-llama: two branches that add to the residual stream."""
    parts = [label("One block of data/tiny-llama, for 8 tokens", 360, 22, size=15)]
    parts.append(label("from embed_tokens or the block before: x (1, 8, 128)", 20, 50, "start"))
    parts.append(arrow((60, 58), (60, 432), colour=BLUE))
    parts.append(label("to the next block, or to norm and lm_head", 76, 430, "start"))
    parts.append(label("residual stream", 20, 454, "start", BLUE))

    parts += [arrow((60, 90), (104, 90)), box(104, 74, 92, 32, "RMSNorm")]
    for i, name in enumerate("qkv"):
        y = 74 + 44 * i
        parts.append(arrow((196, 90), (210, 90), (210, y + 16), (228, y + 16)))
        parts.append(box(228, y, 76, 32, f"{name}_proj", ORANGE))
        parts.append(arrow((304, y + 16), (336 if i < 2 else 450, y + 16)))
    parts += [box(336, 74, 84, 76, "rotate by\nposition"), arrow((420, 112), (450, 112))]
    parts.append(label("(1, 8, 4, 32) each: 4 heads of 32 channels", 228, 212, "start"))
    parts.append(
        box(
            450,
            74,
            124,
            120,
            "4 heads, each:\nsoftmax(q kᵀ / √32) v\nover a token and\nthose before it",
        )
    )
    parts += [arrow((574, 112), (600, 112)), box(600, 96, 84, 32, "o_proj", ORANGE)]
    parts.append(arrow((642, 128), (642, 236), (71, 236)))
    parts.append(
        label("adds what each token gathers from earlier tokens: (1, 8, 128)", 640, 230, "end")
    )
    parts.append(plus(60, 236))

    parts += [arrow((60, 286), (104, 286)), box(104, 270, 92, 32, "RMSNorm")]
    for i, name in enumerate(("gate_proj", "up_proj")):
        y = 270 + 44 * i
        parts.append(arrow((196, 286), (210, 286), (210, y + 16), (228, y + 16)))
        parts.append(box(228, y, 84, 32, name, ORANGE))
    parts += [arrow((312, 286), (336, 286)), box(336, 270, 58, 32, "silu")]
    parts += [arrow((394, 286), (450, 286)), arrow((312, 330), (470, 330), (470, 303))]
    parts += [box(450, 270, 40, 32, "×"), arrow((490, 286), (560, 286))]
    parts.append(label("(1, 8, 352)", 525, 278))
    parts.append(box(560, 270, 92, 32, "down_proj", ORANGE))
    parts.append(arrow((606, 302), (606, 376), (71, 376)))
    parts.append(label("adds what each token computes by itself: (1, 8, 128)", 600, 370, "end"))
    parts.append(plus(60, 376))
    parts.append(
        label(
            "orange: matrices of weights; in 4 blocks, 75 % of all parameters",
            700,
            454,
            "end",
            ORANGE,
        )
    )
    return svg(720, 470, parts)


# ---------------------------------------------------------------- 2. tokens


def merges() -> str:
    """The merges of one word. In data/tokenizer.model a piece's id is its place in the order."""
    vocabulary, word = SentencePieceTokenizer(DATA / "tokenizer.model"), "▁description"
    id_of = vocabulary.sentencepiece.piece_to_id
    nodes = [(piece, 56.0 + 55 * i, 290.0) for i, piece in enumerate(word)]  # text, x, y
    parts, order = [label(f"The merges of {word}, with data/tokenizer.model", 360, 22, size=15)], []
    while True:
        joined = [(id_of(a[0] + b[0]), i) for i, (a, b) in enumerate(pairwise(nodes))]
        possible = [(token, i) for token, i in joined if token != vocabulary.unk_id]
        if not possible:
            break
        token, i = min(possible)
        a, b = nodes[i : i + 2]
        piece, x, y = a[0] + b[0], (a[1] + b[1]) / 2, min(a[2], b[2]) - 70
        parts += [line(f"M{x:g} {y:g}L{child[1]:g} {child[2]:g}", GREY, 1) for child in (a, b)]
        parts += [piece_box(*child, id_of(child[0])) for child in (a, b)]
        nodes[i : i + 2] = [(piece, x, y)]
        order.append(f"{piece} {token}")
    parts += [piece_box(*node, id_of(node[0]), BLUE, 3) for node in nodes]
    tokens = "thick frames: the tokens, which no merge joins; below each piece its id"
    parts += [label(tokens, 360, 334, colour=BLUE)]
    parts += [label(f"lower ids are merged first: {', '.join(order)}", 360, 354)]
    return svg(720, 370, parts)


def piece_box(piece: str, x: float, y: float, token: int, colour=GREY, stroke=1.5) -> str:
    return box(x - 23, y - 19, 46, 38, f"{piece}\n{token}", colour, stroke)


# ---------------------------------------------------------------- 3. records


def packing() -> str:
    """A record with its labels masked; eight records padded to one length, and packed."""
    tokenizer = load_tokenizer(DATA / "tiny-llama")
    record = {"instruction": "Name a fruit.", "input": "", "output": "a pear"}
    ids, labels, _ = encode_record(record, tokenizer)
    parts = [label("The end of a record: its ids, and its labels", 360, 22, size=15)]
    parts += [label(text, 64, y, "end") for text, y in (("ids", 64), ("labels", 128))]
    for i, (token, target) in enumerate(zip(ids[-9:], labels[-9:], strict=True)):
        x, masked = 72 + 70 * i, target == IGNORE
        parts.append(box(x, 42, 68, 36, f"{tokenizer.piece(token)}\n{token}"))
        parts.append(box(x, 112, 68, 24, str(target), *((GREY, 1.5) if masked else (BLUE, 3))))
        if not masked:  # the logits after the token before predict it
            parts.append(arrow((x - 38, 78), (x + 28, 110), colour=BLUE))
    hint = "arrows: the logits after a token are compared with the next token's label"
    parts.append(label(hint, 360, 162, colour=BLUE))

    records = load_records(DATA / "sample_train.json")[:8]
    examples = encode_all(records, list(records), tokenizer, max_length=512)
    longest, rows = examples.lengths.max(), pack_rows(examples.lengths, 1, 256)[0]
    for i in range(len(examples)):
        y = 228 + 20 * i
        parts.append(strip(20, y, longest, 0, "none") + example_strip(examples, i, 20, y))
    size = len(examples) * longest
    parts.append(label(f"padded: 8 × {longest} = {size} tokens,", 20, 204, "start"))
    parts.append(label(f"{size - examples.lengths.sum()} of them padding", 20, 220, "start"))
    packed = " + ".join(str(examples.lengths[row].sum()) for row in rows)
    parts.append(label(f"packed: {packed} = {examples.lengths.sum()} tokens", 270, 204, "start"))
    for n, row in enumerate(rows):
        x, y = 270, 228 + 84 * n
        for i in row:
            parts.append(example_strip(examples, i, x, y))
            x += 2 * int(examples.lengths[i])
        for bound in make_row(examples, np.array(row)).cu_seqlens.tolist():
            parts.append(label(str(bound), 270 + 2 * bound, y + 32))
        parts.append(label("cu_seqlens, where documents begin and end", 270, y + 48, "start"))
    parts.append(label("grey: prompt, masked; blue: answer; empty: padding", 700, 384, "end"))
    return svg(720, 400, parts)


def strip(x: float, y: float, tokens: int, first: int, fill: str) -> str:
    place = f'x="{x + 2 * first}" y="{y}" width="{2 * (tokens - first)}" height="16"'
    return f'<rect {place} fill="{fill}" stroke="{INK}" stroke-width="0.7"/>'


def example_strip(examples: Examples, i: int, x: float, y: float) -> str:
    """Two pixels a token: the prompt, then the answer."""
    length, prompt = examples.lengths[i], examples.lengths[i] - examples.supervised[i]
    return strip(x, y, prompt, 0, "#8888") + strip(x, y, length, prompt, BLUE)


# ---------------------------------------------------------------- 4. training


def sharding() -> str:
    """What two ranks hold of the parameters during a step."""
    moments = ["between\nsteps", "forward\nblock 0", "forward\nblock 1", "head\nand loss"]
    moments += ["backward\nblock 1", "backward\nblock 0", "AdamW"]
    gathered = {"embedding, head": range(1, 6), "block 0": (1, 5), "block 1": (2, 4)}
    done = {"embedding, head": 6, "block 0": 6, "block 1": 5}  # gradients are reduced
    parts = [label("What two ranks hold during a step of a model of two blocks", 360, 22, size=15)]
    left, width = 150, 79
    for i, moment in enumerate(moments):
        for n, text in enumerate(moment.split("\n")):
            parts.append(label(text, left + width * (i + 0.5), 48 + 15 * n))
    for rank in (0, 1):
        for n, name in enumerate(gathered):
            y = 80 + 150 * rank + 44 * n
            parts.append(label(f"rank {rank}: {name}", left - 8, y + 20, "end"))
            for i in range(len(moments)):
                x = left + width * i + 4
                for half, colour in enumerate((BLUE, ORANGE)):
                    if half == rank or i in gathered[name]:
                        place = f'x="{x}" y="{y + 16 * half}" width="56" height="15"'
                        fill = colour if half == rank else "none"
                        parts.append(f'<rect {place} fill="{fill}" stroke="{colour}"/>')
                if i >= done[name]:
                    place = f'cx="{x + 64}" cy="{y + 8 + 16 * rank}" r="5" fill="none"'
                    parts.append(f'<circle {place} stroke="{INK}" stroke-width="2"/>')
    legend = "filled: the rank's own half; empty: a copy of the other half, gathered"
    parts.append(label(f"{legend}; ring: the own half of the gradient", 360, 392))
    return svg(720, 410, parts)


# ---------------------------------------------------------------- 5. adapters and small bits


def rounding() -> str:
    """Error against size of the weights of one matrix, in int8 and int4, for groups of 8 to 128."""
    weight = (
        stored_tensors(DATA / "tiny-llama")["model.layers.0.mlp.gate_proj.weight"].read().float()
    )
    x, y = axis((4, 10), 64, 704)[0], axis((0, 12), 300, 50)[0]
    title = "Relative error of a rounded matrix, for groups of 8 to 128 weights"
    parts = [
        label(title, 360, 22, size=15),
        label(
            "bits a weight, scales included (gate_proj of data/tiny-llama, rows of 128)", 384, 344
        ),
    ]
    parts += [
        line(f"M64 {y(n)}H704") + label(f"{n} %", 58, y(n) + 4, "end") for n in range(0, 13, 3)
    ]
    parts += [label(str(n), x(n), 320) for n in range(4, 11)]
    int4 = (Int4Linear, (8, 16, 32, 64, 128), ORANGE, "int4: 4 bits, and 32 for each group")
    int8 = (Int8Linear, (8, 32, 128), BLUE, "int8: 8 bits, and 16 for each group")
    for kind, groups, colour, name in (int4, int8):
        points = []
        for group in groups:
            grouped = weight.view(-1, group) if kind is Int8Linear else weight
            buffers = kind.quantize(grouped, group)
            error = (kind(**buffers).dequantize() - grouped).norm() / weight.norm()
            bits = 8 * sum(b.numel() * b.element_size() for b in buffers.values()) / weight.numel()
            points.append((x(bits), y(100 * float(error))))
            parts.append(label(str(group), points[-1][0] + 2, points[-1][1] - 10, "start"))
        path = " ".join(f"{a},{b}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [dot(a, b, colour) for a, b in points]
        parts.append(label(name, points[0][0] - 14, points[0][1] - 58, "end", colour))
    return svg(720, 360, parts)


# ---------------------------------------------------------------- 6. decoding

ANSWERS = {"A": 12, "B": 3, "C": 5, "D": 8, "E": 4, "F": 9, "G": 2, "H": 6}  # tokens of each


def wait_for_longest() -> list[dict[int, str]]:
    """The answer in each slot, step by step, if four answers start and end together."""
    names, steps = [*ANSWERS], []
    for batch in (names[:4], names[4:]):
        for n in range(max(ANSWERS[name] for name in batch)):
            steps.append({i: name for i, name in enumerate(batch) if n < ANSWERS[name]})
    return steps


def decode_continuously() -> list[dict[int, str]]:
    """The same, as the engine decodes them."""
    folder = DATA / "tiny-llama"
    engine = Engine(load_model(folder), load_tokenizer(folder), max_batch_size=4)
    prompt, steps = engine.tokenizer.encode("A list:", bos=True), []
    limits = {name: SamplingParams(max_new_tokens=count) for name, count in ANSWERS.items()}
    names = {engine.add(prompt, params): name for name, params in limits.items()}
    while engine.busy:
        steps.append({i: names[sequence] for i, sequence in enumerate(engine.step())})
    return steps


def slots() -> str:
    kinds = {"Batches that wait for their longest answer": wait_for_longest()}
    kinds["Continuous batching"] = decode_continuously()
    parts = []
    for top, (title, steps) in zip((26, 208), kinds.items(), strict=True):
        used, seen = sum(map(len, steps)), set()
        title += f": {len(steps)} steps, {used} of {4 * len(steps)} slots used"
        parts.append(label(title, 66, top, "start", size=15))
        parts += [label(f"slot {i}", 58, top + 33 + 32 * i, "end") for i in range(4)]
        for n, sequences in enumerate(steps):
            for i in range(4):
                name = sequences.get(i, "")
                colour = COLOURS["ABCDEFGH".index(name) % 6] if name else GREY
                parts.append(cell(66 + 30 * n, top + 14 + 32 * i, name, colour, name not in seen))
            seen |= {*sequences.values(), ""}
    parts.append(label("filled: prefill; framed: decoding step", 66, 376, "start"))
    return svg(720, 390, parts)


def cell(x: float, y: float, text: str, colour=GREY, filled=False, width=28) -> str:
    """A box with a short text; without text only a pale frame."""
    fill = f'fill="{colour}70"' if filled else 'class="paper" fill="#fff"'
    place = f'x="{x}" y="{y}" width="{width}" height="28" rx="3"'
    frame = f'<rect {place} {fill} stroke="{colour if text else FAINT}" stroke-width="1.5"/>'
    return frame + label(text, x + width / 2, y + 19, size=14)


# ---------------------------------------------------------------- 7. self-instruct


def lcs() -> str:
    """The table of the longest common subsequence, as numbers and as bits."""
    a, b = ["the", "cat", "sat", "down"], ["sat", "the", "cat", "down"]
    table = [[0] * 5]
    for word in b:
        above, row = table[-1], [0]
        for j, other in enumerate(a):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        table.append(row)
    parts = [label("the LCS of the beginnings of both texts", 236, 24, size=15)]
    parts.append(label("a row in bits: 0 where it rises", 570, 24, size=15))
    for j, word in enumerate(["", *a]):
        parts.append(label(word, 150 + 50 * j, 56))
        parts.append(label(word if j else "", 440 + 50 * j, 56))
    for i, (word, row, bits) in enumerate(zip(["", *b], table, lcs_rows(a, b), strict=True)):
        y = 68 + 36 * i
        parts.append(label(word, 116, y + 18, "end"))
        for j, number in enumerate(row):
            rises = j > 0 and number > row[j - 1]
            parts.append(cell(136 + 50 * j, y, f"{number}", ORANGE if rises else GREY, rises))
            if j:
                bit = bits >> (j - 1) & 1
                parts.append(cell(426 + 50 * j, y, f"{bit}", GREY if bit else ORANGE, not bit))
        parts.append(arrow((380, y + 14), (450, y + 14)))
    return svg(720, 256, parts)


# ---------------------------------------------------------------- 8. judging


def intervals() -> str:
    """What some results prove."""
    rows = {}
    for wins, n in ((6, 6), (90, 179), (88, 150), (200, 400), (431, 805)):
        name = f"{wins} of {n}: {describe_difference(wins, n - wins)}"
        low, high = wilson(wins, n)
        rows[name] = {"won, in per cent": (100 * low, 100 * wins / n, 100 * high)}
    return interval_chart("Comparisons won, with 95 % intervals", rows, 40, 100)


# ---------------------------------------------------------------- 9. publishing


def diff() -> str:
    """The bits of two bf16 weights, before and after tuning, and their difference."""
    parts = [label("sign", 196, 24, colour=ORANGE), label("exponent", 310, 24, colour=BLUE)]
    parts.append(label("mantissa", 506, 24, colour=GREEN))
    for top, weights in ((34, (0.03125, 0.031494140625)), (178, (-0.0019989, 0.00099945))):
        pair = torch.tensor(weights, dtype=torch.bfloat16)
        base, tuned = pair.view(torch.int16).tolist()
        rows = {f"base {pair[0]:.6f}": base, f"tuned {pair[1]:.6f}": tuned}
        rows["difference"] = tuned - base
        for i, (name, number) in enumerate(rows.items()):
            y = top + 36 * i + 8 * (i == 2)
            parts.append(label(name, 172, y + 19, "end"))
            for k, bit in enumerate(f"{number % 2**16:016b}"):
                colour = GREY if i == 2 else ORANGE if k == 0 else BLUE if k < 9 else GREEN
                parts.append(cell(182 + 26 * k, y, bit, colour, bit == "1", width=24))
            parts.append(label(f"= {number % 2**16:,}", 606, y + 19, "start"))
        parts.append(line(f"M182 {top + 72}H596", GREY))
    return svg(720, 312, parts)


PICTURES: dict[str, Callable[[], str]] = {
    "road": road,
    "block": block,
    "merges": merges,
    "packing": packing,
    "sharding": sharding,
    "rounding": rounding,
    "slots": slots,
    "lcs": lcs,
    "intervals": intervals,
    "diff": diff,
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")
