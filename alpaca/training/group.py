"""Policy gradient with verifiable rewards: the model answers, a checker scores, the model learns.

    torchrun fsdp_train.py --objective group --check exact --samples 8 \\
        --model-dir runs/alpaca/model --data records.json --out runs/group

A step draws n answers to each of --batch-size instructions from the model π itself. A checker
(alpaca/datagen/checkers.py) compares them with the record's `output`: the rewards r. The advantage
A = r - mean of the n rewards says how much better than usual an answer is. The gradient of

    loss = -Σ A · log π(answer) / number of sampled tokens        (REINFORCE, Williams 1992)

raises the expected reward. Rewards 1 0 0 0 make advantages ¾ -¼ -¼ -¼. Where all n are equal there
is nothing to learn: these answers take part in no pass, and a step of no others changes no weight.
With temperature T, π is softmax(logits / T), in sampling and in the gradient.

  - PPO (arXiv:1707.06347) has a second model, the critic, for the baseline. PPO and GRPO
    (2402.03300) take several steps on the same answers and clip the ratio π / π_old; in the first
    of them, the only one here, it is 1. GRPO also divides A by the deviation of r, and a loss by
    its answer's length, which biases them (2503.20783). Its penalty on the KL divergence, which
    needs a pass of the reference over all answers, is left out.
  - To draw, each rank has the whole model in --dtype, renewed in every step: for 7B 13.5 GB, and
    8.6 GB of keys and values (32 answers of 512 tokens). With --lora it is base and adapter; only
    with --lora-dropout 0 is π in the gradient exactly the π that was drawn from.
  - An answer's seed is made of --seed, step, instruction and its number: any number of ranks, and
    a run that resumes, draw the same. An answer that reaches --max-length ends there.
"""

from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from alpaca.common.errors import errors_at
from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams, derive_seed
from alpaca.training.job import Job
from alpaca.training.memory_plan import SLOTS
from alpaca.training.objectives import GroupLoss
from alpaca.training.parallel import full_tensor, open_model, run_on_all_ranks, trained_parameters
from alpaca.weights.checkpoint import DTYPES
from dataset import Examples, question_ids
from model import IGNORE, Llama


def advantages(rewards: np.ndarray) -> np.ndarray:
    """r - mean r in each group of rewards (P, n); exactly 0 where all are equal."""
    differ = rewards.max(1, keepdims=True) > rewards.min(1, keepdims=True)
    return (rewards - rewards.mean(1, keepdims=True)) * differ


class Group(NamedTuple):
    """The answers to one instruction."""

    prompt: list[int]
    answers: list[list[int]]  # with the tokens that end them
    rewards: list[float]
    origin: Any


class Sampler:
    """Draws and scores answers of the model that is trained, each rank its share of them."""

    def __init__(self, job: Job, device: torch.device):
        self.job, self.config = job, job.config
        copy, read = open_model(job.config, job.model_config, device)
        self.copy = copy if self.config.lora else copy.to(DTYPES[self.config.dtype])
        self.copy.to_empty(device=device).requires_grad_(False)
        for name, tensor in (*copy.named_parameters(), *copy.named_buffers()):
            tensor.copy_(read(name, tensor.shape))
        self.engine = Engine(copy, job.tokenizer, SLOTS, self.config.max_length)

    def answer(self, model: Llama, asked: list[tuple[dict, Any, list[SamplingParams]]]) -> list:
        """The Group of each (record, its origin, one SamplingParams an answer)."""
        copied = dict(self.copy.named_parameters())
        for name, parameter in trained_parameters(model).items():
            copied[name].copy_(full_tensor(parameter.detach()))
        rank, ranks = dist.get_rank(), dist.get_world_size()
        mine = run_on_all_ranks(lambda: self.answer_share(asked[rank::ranks]))
        parts: list = [None] * ranks
        dist.all_gather_object(parts, mine)
        return [parts[i % ranks][i // ranks] for i in range(len(asked))]

    def answer_share(self, asked: list[tuple[dict, Any, list[SamplingParams]]]) -> list[Group]:
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)  # CUDA has no such cumsum of probabilities
        prompts = [question_ids(record, self.job.tokenizer) for record, *_ in asked]
        pairs = zip(prompts, asked, strict=True)
        drawn = [[self.engine.add(prompt, each) for each in own] for prompt, (*_, own) in pairs]
        self.engine.finish([sequence for sequences in drawn for sequence in sequences])
        torch.use_deterministic_algorithms(deterministic)
        groups, check = [], self.job.checker
        assert check
        for prompt, (record, origin, _), sequences in zip(prompts, asked, drawn, strict=True):
            with errors_at(origin.place):
                rewards = [check(record, each.text) for each in sequences]
            groups.append(Group(prompt, [each.ids for each in sequences], rewards, origin))
        return groups

    def draw(self, model: Llama, step: int, batch: np.ndarray) -> tuple:
        """A step's GroupLoss with all answers, those to learn from, and figures to log."""
        config, asked = self.config, []
        params = SamplingParams(config.temperature, max_new_tokens=config.max_length)
        for i, example in enumerate(batch):
            seeds = [derive_seed(config.seed, step, i, j) for j in range(config.samples)]
            own = [replace(params, seed=seed) for seed in seeds]
            asked.append((self.job.records[example], self.job.train.origins[example], own))
        groups = self.answer(model, asked)
        rewards, examples = np.array([group.rewards for group in groups]), as_examples(groups)
        A = advantages(rewards)  # (P, n)
        figures = {"reward": float(rewards.mean())}
        figures["mixed_groups"] = float(A.any(1).mean())  # the share with different rewards
        figures["answer_tokens"] = float(examples.supervised.mean())
        loss = GroupLoss(examples, A.flatten(), config.temperature)
        return loss, np.flatnonzero(A), figures

    def greedy_reward(self, model: Llama) -> float:
        """The mean reward of the likeliest answers to the held-out instructions."""
        records, held_out = self.job.held_out_records, self.job.held_out
        assert held_out
        params = [SamplingParams(max_new_tokens=self.config.max_length)]
        asked = [(*each, params) for each in zip(records, held_out.origins, strict=True)]
        return float(np.mean([group.rewards for group in self.answer(model, asked)]))


def as_examples(groups: list[Group]) -> Examples:
    """The answers with their prompts; labels are the sampled tokens."""
    pairs = [(group.prompt, answer) for group in groups for answer in group.answers]
    ids = [token for prompt, answer in pairs for token in prompt + answer]
    labels = [label for prompt, answer in pairs for label in [IGNORE] * len(prompt) + answer]
    starts = [0, *accumulate(len(prompt) + len(answer) for prompt, answer in pairs)]
    origins = [group.origin for group in groups for _ in group.answers]
    return Examples(
        np.array(ids, np.int32), np.array(labels, np.int32), np.array(starts), origins, {}
    )
