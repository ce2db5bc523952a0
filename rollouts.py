"""Sampling from the policy, and what the other models say about every token that was sampled."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data import Batch, Example, Response, collate, split
from model import LLaVA, generate, use_adapter
from preferences import Prompt


@dataclass
class Role:
    """One of PPO's models: with an adapter over a base that others share, or on its own (None)."""

    model: LLaVA
    adapter: str | None = None

    def logp(self, batch: Batch, temperature: float) -> Tensor:
        """(R,) log-probabilities of the batch's tokens at a temperature."""
        with use_adapter(self.model, self.adapter):
            hidden = self.model(batch.images, batch.tokens, batch.position, batch.branch)
            states = hidden.flatten(0, 1)[batch.source]
            return self.model.head(states / temperature, batch.target)  # W (h / t) = (W h) / t


@dataclass
class Answers:
    """P prompts' answers, k each, N in all; right-padded with 0 where (N, T)."""

    tokens: list[list[list[int]]]  # k answers to each prompt
    mask: Tensor  # (N, T) bool, True = token
    logp: Tensor  # (N, T) log-probabilities of the policy
    reference: Tensor  # (N, T) of the reference
    values: Tensor  # (N, T) of the critic
    seconds: float  # that sampling took


def answer_batch(model: LLaVA, rows: Sequence[tuple[Prompt, Sequence[list[int]]]]) -> Batch:
    """Prompts with their answers as branches; every token of an answer is an entry."""
    examples = [
        Example(prompt.name, prompt.image, prompt.tokens,
                [Response(answer, [1.0] * len(answer)) for answer in answers])
        for prompt, answers in rows
    ]
    return collate(examples, model.config.pad_token, model.config.text.max_position_embeddings)


class Sampler:
    """Samples answers; the same seed and rollout give the same ones."""

    def __init__(self, policy: Role, reference: Role, critic: nn.Module, config, seed: int):
        """`config` has samples, temperature, max_new_tokens, generate_batch and micro_batch."""
        self.policy, self.reference, self.critic = policy, reference, critic
        self.config, self.seed = config, seed

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], rollout: int) -> Answers:
        started = time.perf_counter()
        tokens = self.sample(prompts, rollout)
        seconds = time.perf_counter() - started
        return Answers(tokens, *self.measure(prompts, tokens), seconds)

    def sample(self, prompts: Sequence[Prompt], rollout: int) -> list[list[list[int]]]:
        """Tokens of `samples` answers to each prompt."""
        config, model = self.config, self.policy.model
        like = model.head.weight
        generator = torch.Generator(like.device).manual_seed(self.seed * 1_000_003 + rollout)
        answers = []
        with use_adapter(model, self.policy.adapter):
            for part in split(prompts, config.generate_batch):
                images = torch.stack([prompt.image for prompt in part]).to(like)
                asked = [torch.tensor(prompt.tokens) for prompt in part]
                found = generate(model, images, asked, config.max_new_tokens, config.temperature,
                                 config.samples, generator)
                answers += [answer.tolist() for answer in found]
        return split(answers, config.samples)

    def measure(self, prompts, tokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """mask; and log-probability of the policy, of the reference, and value of every token."""
        lengths = torch.tensor([len(answer) for group in tokens for answer in group])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (N, T)
        found, device = [], self.policy.model.head.weight.device
        for part in split(list(zip(prompts, tokens)), self.config.micro_batch):
            batch = answer_batch(self.policy.model, part).to(device)
            roles = [role.logp(batch, self.config.temperature)
                     for role in (self.policy, self.reference)]
            found.append(torch.stack([*roles, self.critic(batch)]).float().cpu())  # (3, R)
        # entries come answer by answer, token by token, and so do the places of a mask
        flat = torch.cat(found, dim=1)
        return mask, *(torch.zeros(mask.shape).masked_scatter(mask, each) for each in flat)
