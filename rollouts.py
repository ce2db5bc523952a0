"""Shared by RL algorithms: models, sampled completions, their rewards and log-probabilities."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

import parallel
import sharding
from algorithm import Data, Start
from data import Batch, Example, Response, collate_for, split
from formats.files import jsonl
from formats.rows import DataError
from formats.tokenizer import Tokenizer
from generation import Draws, generate
from lora import lora_layers, select_trainable, use_adapter
from model import LLaVA
from reward import (
    RewardModel, Row, length_penalty, load_reward_model, missing_eos_penalty, rate, symbolic_reward,
)

SHOWN = 8  # completions of every rollout that go into samples.jsonl


@dataclass
class AdaptedModel:
    """A model with an adapter over a base that others share, or without one (None)."""

    model: LLaVA
    adapter: str | None = None

    def logp(self, batch: Batch, temperature: float) -> Tensor:
        """(R,) log-probabilities of the batch's response tokens at a temperature."""
        with use_adapter(self.model, self.adapter):
            return self.model.response_logp(batch, temperature)


@dataclass
class Roles:
    """The models of reinforcement learning, and the reward of rows (example, completions)."""

    policy: AdaptedModel
    reference: AdaptedModel
    critic: nn.Module  # batch -> (R,) values
    reward: Callable[[Sequence, tuple], dict[str, Tensor]]  # parts of the reward, see Scorer


def make_roles(start: Start, config) -> Roles:
    """Load the reward model, copy it as the critic, and copy the start as the reference.

    With LoRA they are adapters over the one base. The critic's head starts at zero.

    Args:
        config: has facts and the rules' settings (see Scorer).
    """
    model, folder = start.model, start.reward_model
    if start.run.lora:
        policy, reference = AdaptedModel(model, "default"), AdaptedModel(model, None)
        reward_model = load_reward_model(start, folder, config.facts, "reward")
        critic = load_reward_model(start, folder, config.facts, "critic")
        select_trainable(model, "default")
        for module in lora_layers(model, "critic"):
            module.adapters["critic"].requires_grad_(True)
    else:
        policy = AdaptedModel(model)
        reference = AdaptedModel(sharding.duplicate(model).requires_grad_(False))
        reward_model = load_reward_model(start, folder, config.facts)
        critic = RewardModel(sharding.duplicate(reward_model.model))
        select_trainable(critic.model)
        critic.model.head.requires_grad_(False)  # the critic has no use for a vocabulary
        reward_model.requires_grad_(False)
    with torch.no_grad():  # values start at 0, whatever the level of the rewards
        critic.weight.zero_(), critic.bias.zero_()
    return Roles(policy, reference, critic,
                 Scorer(reward_model, start.tokenizer, config))


class Scorer:
    """The reward of completions: the reward model's score and the rules."""

    def __init__(self, reward_model: RewardModel, tokenizer: Tokenizer, config):
        """`config` has the rules' settings (see ppo.PPOConfig)."""
        self.reward_model, self.tokenizer, self.config = reward_model, tokenizer, config

    def __call__(self, rows: Sequence[Row], seeds: tuple) -> dict[str, Tensor]:
        """Parts of the reward, each (N,), the completions of all examples one after another.

        Raises:
            ValueError: the reward model returned NaN or infinity.
        """
        scores = rate(self.reward_model, self.tokenizer, rows, self.config.micro_batch, seeds)
        names = [example.name for example, completions in rows for _ in completions]
        bad = [name for name, finite in zip(names, scores.isfinite().tolist()) if not finite]
        if bad:
            raise ValueError(
                f"the reward model gave NaN or infinity for {len(bad)} of {len(names)} answers (to "
                f"{', '.join(dict.fromkeys(bad[:8]))}); train it with a smaller --learning_rate")
        rules = [self.rules(example, each) for example, completions in rows for each in completions]
        symbolic, length, no_end = torch.tensor(rules).T
        return {"rm": scores, "symbolic": symbolic, "length": length, "no_end": no_end}

    def rules(self, example: Example, completion: Sequence[int]) -> tuple[float, float, float]:
        config, text = self.config, self.tokenizer.decode(completion)
        ended = self.tokenizer.eos_token in completion
        return (
            config.symbolic_bonus * symbolic_reward(text, example.truth),
            length_penalty(len(completion), config.length_penalty_tokens, example.length_factor,
                           config.length_penalty),
            missing_eos_penalty(ended, config.missing_eos_penalty),
        )


def check_room(start: Start, config, data: Data) -> None:
    """Raise DataError if a prompt leaves no room for a completion in the model's context."""
    longest = max(len(example.prompt) for example in data.train)
    context = start.model.config.text.max_position_embeddings
    if longest + config.max_new_tokens > context:
        raise DataError(f"the longest prompt has {longest} tokens and completions may have "
                        f"{config.max_new_tokens}, but the context holds {context}; "
                        "use a smaller --max_new_tokens")


def sample(
    policy: AdaptedModel, examples: Sequence[Example], config, seed: int, rollout: int
) -> list[list[list[int]]]:
    """Tokens of `config.samples` completions of each example; seed and rollout decide the draws.

    Args:
        config: has samples, temperature, max_new_tokens and generate_batch.
    """
    like = policy.model.head.weight
    generator = torch.Generator(like.device).manual_seed(seed * 1_000_003 + rollout)
    completions = []
    with use_adapter(policy.model, policy.adapter), sharding.gathered(policy.model):
        for part in split(examples, config.generate_batch):
            rows = parallel.rows_of(len(part))  # of this process
            draws, mine, found = Draws(generator, len(part), rows), part[rows], []
            if mine:
                images = torch.stack([example.image for example in mine]).to(like)
                prompts = [torch.tensor(example.prompt) for example in mine]
                found = generate(policy.model, images, prompts, config.max_new_tokens,
                                 config.temperature, config.samples, draws)
            steps, found = zip(*parallel.gather([(draws.steps, [each.tolist() for each in found])]))
            for _ in range(max(steps) - draws.steps):  # all draw as often
                draws(config.samples)
            completions += chain.from_iterable(found)
    return split(completions, config.samples)


def completion_batch(
    model: LLaVA, rows: Sequence[tuple[Example, Sequence[list[int]]]]
) -> Batch:
    """Collate examples with their completions as branches; every token is an entry."""
    examples = [
        Example(example.name, example.image, example.prompt,
                [Response(tokens, [1.0] * len(tokens)) for tokens in completions])
        for example, completions in rows
    ]
    return collate_for(model, examples)


def per_token(
    functions: Sequence[Callable[[Batch], Tensor]], model: LLaVA, examples: Sequence[Example],
    tokens: Sequence[Sequence[list[int]]], micro_batch: int,
) -> tuple[Tensor, ...]:
    """Evaluate functions of every token of N completions.

    Args:
        functions: batch -> (R,), such as log-probabilities and values.
        tokens: the completions of each example.

    Returns:
        mask (N, T) bool, True = token; and (N, T) float32 per function, right-padded with 0.
    """
    lengths = torch.tensor([len(each) for group in tokens for each in group])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (N, T)

    def evaluate(part: list) -> Tensor:  # (functions, R)
        batch = completion_batch(model, part).to(model.head.weight.device)
        return torch.stack([function(batch) for function in functions]).float().cpu()

    found = parallel.in_parts(evaluate, list(zip(examples, tokens)), micro_batch)
    # A batch's entries come completion by completion, token by token, as True does in the mask.
    flat = torch.cat(found, dim=1)  # (functions, R)
    return mask, *(torch.zeros(mask.shape).masked_scatter(mask, values) for values in flat)


def completion_table(
    tokenizer: Tokenizer, examples: Sequence[Example], tokens: Sequence[Sequence[list[int]]],
    parts: dict[str, Tensor], kl: Tensor, false_parts: Callable[[Example, str], list[str] | None],
) -> list[dict]:
    """A row per completion: text, score with its parts, KL in nats, what of it is false."""
    rows = []
    both = [(example, each) for example, group in zip(examples, tokens) for each in group]
    for i, (example, completion) in enumerate(both):
        text = tokenizer.decode(completion).strip()
        score = {name: part[i].item() for name, part in parts.items()}
        rows.append({
            "prompt": example.name, "question": example.question, "answer": text,
            "score": sum(score.values()), **score, "kl": kl[i].item(), "tokens": len(completion),
            "ended": completion[-1] == tokenizer.eos_token, "false": false_parts(example, text),
        })
    return rows


def summary(table: list[dict]) -> dict[str, float]:
    """Means over a table of completions, named as in other trainers."""
    mean = lambda name: sum(row[name] for row in table) / len(table)
    metrics = {
        "objective/kl": mean("kl"), "objective/scores": mean("score"),
        "response/length": mean("tokens"), "response/ended": mean("ended"),
    }
    known = [bool(row["false"]) for row in table if row["false"] is not None]
    return metrics | ({"truth/hallucination": sum(known) / len(known)} if known else {})


def write_samples(folder: Path, step: int, table: list[dict]) -> None:
    """Append some completions of a rollout to the run's samples.jsonl."""
    with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write(jsonl({"step": step, **row} for row in table[:: max(1, len(table) // SHOWN)]))
