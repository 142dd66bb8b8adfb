"""What a training step minimizes: the loss of answers, of preferences between them, or of rewards.

    torchrun fsdp_train.py --objective dpo --model-dir runs/alpaca/model --data preferences.jsonl

A preference says which of two answers to a question is better. With π the model that is trained and
π_ref the one it started from, the reference, the margin by which π prefers the chosen answer is

    Δ = log π(chosen) / π_ref(chosen) - log π(rejected) / π_ref(rejected)

    sft        -log π(answer)           the cross-entropy of Alpaca, without preferences
    dpo        -log σ(β Δ)              arXiv:2305.18290; TRL's `sigmoid`
    ipo        (Δ - 1 / 2β)²            arXiv:2310.12036; log π as a mean over an answer's tokens
    dpo-norm   -log σ(β Δ)              arXiv:2411.15124; as a mean, too; TRL's `sigmoid_norm`
    reward     -log σ(Δ)                another model, of rewards r: Δ = r(chosen) - r(rejected)
    group      -A log π(answer)         the model's own answers, with rewards: group.py

If the chosen answer is the better one only with probability p, the loss is p ℓ(Δ) + (1 - p) ℓ(-Δ).
Before the first step the model is the reference, also with --lora, where the adapter starts as 0:
its log π_ref are computed then and stored, so there is never a second model in memory.

metrics.jsonl has means over a step's pairs: `accuracy`, the share with Δ > 0 (ties count as wrong:
the first step has 0), `margin`, β Δ (TRL's rewards/margins; for `reward` Δ), and `kl`, which
estimates KL(π_ref || π), for ipo and dpo-norm that of a token, if the answers are the reference's
own samples.

A worked example: log π rises from -12 to -11 for the chosen answer and falls from -10 to -13 for
the rejected one. Δ = 1 + 3 = 4, and with β = 0.1 the loss falls from log 2 = 0.693 to
-log σ(0.4) = 0.513.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from alpaca.common.errors import UserError, describe_error
from alpaca.common.files import atomic_file
from alpaca.training.config import TrainConfig
from alpaca.weights.reward import RewardModel
from dataset import Examples, make_row, pack_rows
from model import Llama

PREFERENCES: dict[str, Callable[[Tensor, float], Tensor]] = {  # Δ, β → loss
    "dpo": lambda margin, beta: -F.logsigmoid(beta * margin),
    "ipo": lambda margin, beta: (margin - 1 / (2 * beta)) ** 2,
    "dpo-norm": lambda margin, beta: -F.logsigmoid(beta * margin),
}
OF_MEANS = ("ipo", "dpo-norm")
ROW_MULTIPLE, BOUNDS_MULTIPLE = 128, 32  # of the tokens and bounds that compiled blocks see


class PackedRow(NamedTuple):
    """Whole examples on a rank's device."""

    inputs: dict[str, Any]  # the model's arguments
    columns: Mapping[str, Tensor]  # what else the loss needs of each example or document


class AnswerLoss:
    """sft. The loss of a row is summed over the answers' tokens; a step divides by their number."""

    figures: tuple[str, ...] = ("loss",)  # logged, as means

    def __init__(self, examples: Examples):
        self.examples = examples

    def count(self, which: np.ndarray) -> int:
        """What the loss of these examples is divided by."""
        return int(self.examples.supervised[which].sum())

    def columns(self, which: np.ndarray) -> dict[str, np.ndarray]:
        return {}

    def __call__(self, model: Llama, row: PackedRow) -> Tensor:
        """The figures of a row, summed: the loss first, the only one with gradients."""
        return model(**row.inputs)[None]


class GroupLoss(AnswerLoss):
    """group. The loss of a row is summed over the sampled tokens, each times its answer's advantage
    A; a step divides by the number of all sampled tokens."""

    def __init__(self, examples: Examples, advantages: np.ndarray, temperature: float):
        super().__init__(examples)
        self.advantages, self.temperature = advantages, temperature

    def columns(self, which: np.ndarray) -> dict[str, np.ndarray]:
        return {"weight": np.repeat(self.advantages[which], self.examples.supervised[which])}

    def __call__(self, model: Llama, row: PackedRow) -> Tensor:
        losses = model(**row.inputs, reduction="none", temperature=self.temperature)  # (N), -log π
        return (row.columns["weight"] * losses).sum()[None]


class RewardLoss(AnswerLoss):
    """reward. The loss of a row is summed over its P pairs."""

    figures = ("loss", "margin", "accuracy")

    def __init__(self, examples: Examples, name: str = "dpo", beta: float = 1.0):
        super().__init__(examples)
        self.loss, self.beta = PREFERENCES[name], beta

    def count(self, which: np.ndarray) -> int:
        return len(which)

    def columns(self, which: np.ndarray) -> dict[str, np.ndarray]:
        assert self.examples.p is not None
        return {"p": self.examples.p[which]}

    def scores(self, model: Llama, row: PackedRow) -> Tensor:
        """Of each answer in a row, (2P): Δ is the difference of two."""
        return model(**row.inputs)

    def __call__(self, model: Llama, row: PackedRow) -> Tensor:
        scores, p = self.scores(model, row), row.columns["p"]
        margin = scores[::2] - scores[1::2]  # Δ (P)
        loss = p * self.loss(margin, self.beta) + (1 - p) * self.loss(-margin, self.beta)
        # over samples of the reference, the mean of log π_ref / π estimates KL(π_ref || π)
        found = margin.detach()
        figures = {"margin": self.beta * found, "accuracy": found > 0, "kl": -scores.detach() / 2}
        figures["loss"] = loss
        return torch.stack([figures[name].sum() for name in self.figures])


class PreferenceLoss(RewardLoss):
    """dpo, ipo, dpo-norm: an answer's reward is how much likelier it is than for the reference."""

    figures = ("loss", "margin", "accuracy", "kl")

    def __init__(self, examples: Examples, name: str, beta: float):
        super().__init__(examples, name, beta)
        tokens = replace(examples, p=None).supervised  # of every answer
        self.scale = 1 / tokens if name in OF_MEANS else np.ones(len(tokens))
        self.reference = np.zeros(len(tokens))  # log π_ref

    def columns(self, which: np.ndarray) -> dict[str, np.ndarray]:
        documents = self.examples.documents_of(which)
        numbers = {"scale": self.scale[documents], "reference": self.reference[documents]}
        return {**super().columns(which), **numbers, "documents": documents}

    def scores(self, model: Llama, row: PackedRow) -> Tensor:
        """log π / π_ref of each answer in a row, (2P): a sum over its tokens, or their mean."""
        losses = model(**row.inputs, reduction="none")  # (N)
        starts = row.inputs["cu_seqlens"].long()
        document = torch.searchsorted(starts, row.inputs["supervised"], right=True) - 1  # (N)
        sums = losses.new_zeros(len(starts) - 1).index_add(0, document, -losses)
        sums = sums[: len(row.columns["scale"])]  # behind them is padding
        return sums * row.columns["scale"] - row.columns["reference"]

    def measure_reference(self, model: Llama, rows: Iterable[PackedRow], device) -> None:
        """Fill `reference`, so far 0, by the model that training starts from."""
        found = torch.zeros(len(self.reference), dtype=torch.float64, device=device)
        for row in rows:
            found[row.columns["documents"]] = self.scores(model, row).double()
        dist.all_reduce(found)
        self.reference = found.cpu().numpy()

    def save(self, folder: Path) -> None:
        with atomic_file(folder / f"reference-{self.examples.digest()}.npy") as opened:
            np.save(opened, self.reference, allow_pickle=False)

    def load(self, folder: Path) -> None:
        file = folder / f"reference-{self.examples.digest()}.npy"
        try:
            self.reference = np.load(file, allow_pickle=False)
            if self.reference.shape != self.scale.shape:
                raise ValueError("it is damaged")
        except (OSError, EOFError, ValueError) as error:
            advice = "resume with the same --eval-data, or use another --out"
            raise UserError(f"{file}: {describe_error(error)}: {advice}") from None


# ---------------------------------------------------------------- of a run


def model_class(config: TrainConfig) -> type[Llama]:
    return RewardModel if config.objective == "reward" else Llama


def make_objective(examples: Examples, config: TrainConfig) -> AnswerLoss:
    if config.objective == "sft":
        return AnswerLoss(examples)
    if config.objective == "reward":
        return RewardLoss(examples)
    if config.objective == "group":  # as if the references were the samples
        return GroupLoss(examples, np.ones(len(examples)), config.temperature)
    return PreferenceLoss(examples, config.objective, config.beta)


def packed_rows(
    objective: AnswerLoss, batch: np.ndarray, config: TrainConfig, device: torch.device
) -> Iterator[PackedRow]:
    """This rank's share of a batch, packed into as many rows as every other rank's. The argument
    `longest` is the same for all rows, because it is compiled in."""
    examples = objective.examples
    rows = pack_rows(examples.lengths[batch], dist.get_world_size(), config.row_tokens)
    few_shapes = config.compiles(device)
    multiples = (min(ROW_MULTIPLE, config.max_length), BOUNDS_MULTIPLE) if few_shapes else (1, 1)
    for row in rows[dist.get_rank()]:
        packed = make_row(examples, batch[row], *multiples)
        inputs = {name: to_device(x, device) for name, x in packed._asdict().items()}
        if few_shapes:  # else rows with more documents than the first would be compiled again
            torch._dynamo.maybe_mark_dynamic(inputs["cu_seqlens"], 0)
        columns = objective.columns(batch[row]).items()
        columns = {name: to_device(torch.from_numpy(x), device) for name, x in columns}
        yield PackedRow({**inputs, "longest": config.max_length}, columns)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Start to copy a tensor; from pinned memory, a GPU computes the previous row meanwhile."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@contextmanager
def evaluation(model: Llama) -> Iterator[None]:
    """Without dropout and gradients. Only a backward pass would free all gathered weights."""
    model.eval()
    with torch.no_grad():
        yield
    model.train()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
