"""Shared by algorithms that learn from a model's own completions: models, sampling, rollouts."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

import parallel
import sharding
from algorithm import Algorithm, Data, Start
from config import Training, option
from data import Batch, Epochs, Example, Response, collate_for, shared_batches, split, trunk_tokens
from formats.files import jsonl
from formats.rows import DataError
from formats.tokenizer import Tokenizer
from generation import generate, worth_compiling
from lora import lora_layers, select_trainable, use_adapter
from model import LLaVA
from reward import RewardModel, load_reward_model, slots
from scoring import SamplingConfig, Scorer, completion_table, has_own_base, load_judge, summary

SHOWN = 8  # completions of every rollout that samples.jsonl keeps


@dataclass
class RolloutConfig(SamplingConfig, Training):
    """Options of algorithms that learn from rollouts, a few passes over each."""

    learning_rate: float | None = option(
        None, "peak learning rate [5e-4, with --lora 1e-3; from 1B 1e-6 (Llama 2, GRPO), with "
        "--lora 3e-5 (release)]")
    rates = {"small": 5e-4, "large": 1e-6, "small lora": 1e-3, "large lora": 3e-5}
    epochs: int = option(2, "passes over the prompts (release: 4)")
    rollout_size: int = option(64, "prompts per rollout", least=1)
    batch_size: int = option(32, "prompts per optimizer step, with all their completions", least=1)
    micro_batch: int = option(8, "prompts per forward pass, with all their completions", least=1)
    inner_epochs: int = option(2, "passes over a rollout (PPO's release; GRPO's paper: 1)", least=1)
    cliprange: float = option(0.2, "of the ratio (release)")
    held_out_reward_model: str | None = option(
        None, "folder of another reward model; its score is only logged, and shows hacking")

    def __post_init__(self):
        if self.rollout_size % self.batch_size:
            raise ValueError(f"--rollout_size {self.rollout_size} is not a multiple of "
                             f"--batch_size {self.batch_size}")


# --------------------------------------------------------------------------- models and completions


@dataclass
class AdaptedModel:
    """A model, with an adapter over a base that others share or without one (None)."""

    model: LLaVA
    adapter: str | None = None

    def logp(self, batch: Batch, temperature: float) -> Tensor:
        """Return (R,) log-probabilities of the batch's response tokens at a temperature."""
        with use_adapter(self.model, self.adapter):
            return self.model.response_logp(batch, temperature)


@dataclass
class Roles:
    """The models of reinforcement learning, and the reward."""

    policy: AdaptedModel
    reference: AdaptedModel
    reward: Callable[[Sequence], dict[str, Tensor]]  # of rows (example, completions), see Scorer
    critic: nn.Module | None = None  # batch -> (R,) values


def policy_and_reference(start: Start) -> tuple[AdaptedModel, AdaptedModel]:
    """Return the model to train, and the untrained one: with LoRA the base, else a copy."""
    model = start.model
    if start.run.lora:
        return AdaptedModel(model, "default"), AdaptedModel(model)
    return AdaptedModel(model), AdaptedModel(sharding.duplicate(model).requires_grad_(False))


def make_roles(start: Start, config: SamplingConfig, with_critic: bool = False) -> Roles:
    """Copy the start as the reference, load the reward model, and make a critic if wanted.

    With LoRA all are adapters over one base. The critic is a copy of the reward model whose head
    starts at zero. A reward model over another base than the policy's reads texts and pictures,
    with its own tokenizer and tower.
    """
    if config.reward_model and has_own_base(start.reward_model, start):
        if with_critic:
            raise ValueError(f"{start.reward_model}: the critic cannot start from a reward model "
                             "over another base; use --baseline group")
        judge = load_judge(start.reward_model, start.device, config.facts)
        print(f"{start.reward_model}: a reward model over another base", file=sys.stderr)
        return Roles(*policy_and_reference(start), Scorer(judge, start.tokenizer, config))
    (policy, reference), critic = policy_and_reference(start), None
    load = partial(load_reward_model, start, start.reward_model, config.facts)
    if start.run.lora:
        reward_model, critic = load("reward"), load("critic") if with_critic else None
        select_trainable(start.model, "default")
        for module in lora_layers(start.model, "critic") if critic else ():
            module.adapters["critic"].requires_grad_(True)
    else:
        reward_model = load()
        if with_critic:
            critic = RewardModel(sharding.duplicate(reward_model.model))
            select_trainable(critic.model)
            critic.model.head.requires_grad_(False)  # the critic does not use the vocabulary
            critic.model.decoder.gradient_checkpointing = start.run.gradient_checkpointing
        reward_model.requires_grad_(False)
    if critic:
        with torch.no_grad():  # values start at 0
            critic.weight.zero_(), critic.bias.zero_()
    return Roles(policy, reference, Scorer(reward_model, start.tokenizer, config), critic)


def prompt_only(row, tokenizer: Tokenizer, patches: int, config) -> tuple[list[int], list]:
    """Encode a row's prompt, without a response; see `Algorithm.tokens`."""
    return trunk_tokens(tokenizer, (), row.question, patches), []


def check_room(start: Start, config: SamplingConfig, data: Data, reward=None) -> None:
    """Raise DataError if a prompt leaves no room for a completion, and the request to rate it."""
    if isinstance(reward, Scorer):
        reward.check_room(data.train)
    longest = max(len(example.prompt) for example in data.train)
    context = start.model.config.text.max_position_embeddings
    if longest + config.max_new_tokens > context:
        raise DataError(f"the longest prompt has {longest} tokens and completions may have "
                        f"{config.max_new_tokens}, but the context holds {context}; "
                        "use a smaller --max_new_tokens")


def sample(
    policy: AdaptedModel, examples: Sequence[Example], config: SamplingConfig, seed: int,
    rollout: int, tokenizer: Tokenizer | None = None,
) -> tuple[list[list[list[int]]], Tensor]:
    """Sample completions; on a GPU decoding is compiled.

    Args:
        seed, rollout: determine the draws.
        tokenizer: encodes the "?" of `config.cut_at_question`.

    Returns:
        tokens of `config.samples` completions of each example; (R,) their log-probabilities, one
        completion after another, as decoding computed them.
    """
    like = policy.model.head.weight
    generator = torch.Generator(like.device).manual_seed(seed * 1_000_003 + rollout)
    completions, logp, compiled = [], [], worth_compiling(like.device)
    with use_adapter(policy.model, policy.adapter), sharding.gathered(policy.model):
        for part in split(examples, config.generate_batch):
            rows = parallel.rows_of(len(part))  # of this process
            draws, mine, found, own = parallel.Draws(generator, len(part), rows), part[rows], [], []
            if mine:
                images = torch.stack([example.image for example in mine]).to(like)
                prompts = [torch.tensor(example.prompt) for example in mine]
                found = generate(
                    policy.model, images, prompts, config.max_new_tokens, config.temperature,
                    config.samples, draws, compiled=compiled, on_logp=own.append)
            own, found = [each.cpu() for each in own], [each.tolist() for each in found]
            steps, found, own = zip(*parallel.gather([(draws.steps, found, own)]))
            for _ in range(max(steps) - draws.steps):  # all processes draw equally often
                draws(config.samples)
            completions += chain.from_iterable(found)
            logp += chain.from_iterable(own)
    if config.cut_at_question:
        ends = {tokenizer.encode(text)[-1] for text in ("?", "a?")}  # with and without a space
        kept = [next((i for i, token in enumerate(each, 1) if token in ends), len(each))
                for each in completions]
        pieces = torch.cat(logp).split([len(each) for each in completions])
        logp = [piece[:length] for piece, length in zip(pieces, kept)]
        completions = [each[:length] for each, length in zip(completions, kept)]
    return split(completions, config.samples), torch.cat(logp)


def completion_batch(model: LLaVA, rows: Sequence[tuple[Example, Sequence[list[int]]]]) -> Batch:
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

    # A row's entries come completion by completion, token by token, as True does in the mask.
    flat = parallel.by_length(  # (functions, R)
        evaluate, list(zip(examples, tokens)), micro_batch, slots,
        entries=lambda row: sum(map(len, row[1])))
    return mask, *(torch.zeros(mask.shape).masked_scatter(mask, values) for values in flat)


def write_samples(folder: Path, step: int, table: list[dict]) -> None:
    """Append some completions of a rollout to the run's samples.jsonl."""
    with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write(jsonl({"step": step, **row} for row in table[:: max(1, len(table) // SHOWN)]))


def warn_truncated(metrics: dict[str, float], config: SamplingConfig) -> bool:
    """Warn if most completions are truncated: end-of-sequence is then hardly learned."""
    truncated = 1 - metrics["response/ended"]
    if truncated > 0.5:
        print(f"warning: {100 * truncated:.0f} % of the completions were cut off at "
              f"--max_new_tokens {config.max_new_tokens}; raise it", file=sys.stderr)
    return truncated > 0.5


# ------------------------------------------------------------------------ learning from completions


@dataclass
class Rollout:
    """N = P k completions and what the optimisation needs; (N, T) is right-padded."""

    rows: list[int]  # (P,) places of the prompts in the data
    tokens: list[list[list[int]]]  # k completions of each prompt
    mask: Tensor  # (N, T) bool, True = token
    per_token: dict[str, Tensor]  # (N, T) each: the fields that `OnPolicy.Minibatch` adds
    metrics: dict[str, float]


@dataclass
class Scored:
    """N = P k sampled completions, k per prompt side by side; (N, T) is right-padded with 0."""

    mask: Tensor  # (N, T) bool, True = token
    logp: Tensor  # (N, T) of the policy that sampled
    reference: Tensor  # (N, T) log-probabilities of the reference
    values: Tensor | None  # (N, T) of the critic, if there is one
    scores: Tensor  # (N,)


class OnPolicy(Algorithm):
    """Learn from rewarded completions of the policy itself."""

    Minibatch: type[Batch]  # adds a (R,) field for each tensor that `credit` returns
    config: RolloutConfig
    reads = "prompts"
    first = ("base", "rm")
    tokens = staticmethod(prompt_only)

    def __init__(self, start: Start, config: RolloutConfig, data: Data, roles: Roles | None = None):
        self.start, self.config, self.seed, self.data = start, config, start.run.seed, data
        self.roles = roles or make_roles(start, config)
        check_room(start, config, data, self.roles.reward)
        self.modules = nn.ModuleDict({"policy": self.roles.policy.model})
        per_rollout = replace(config, batch_size=config.rollout_size, steps=0)
        places = list(range(len(data.train)))
        self.source = Epochs(places, per_rollout, self.seed, length=lambda place: 0)
        self.minibatches = config.rollout_size // config.batch_size
        self.per_rollout = config.inner_epochs * self.minibatches  # optimizer steps
        self.steps = config.steps or self.source.steps * self.per_rollout
        self.rollout: Rollout | None = None
        self.warned = False
        other = config.held_out_reward_model
        self.judge = other and load_judge(Path(other), start.device, config.facts)

    def credit(self, found: Scored) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return (N, T) tensors, the fields that `Minibatch` adds, and metrics of the rollout."""

    def batches(self, step: int) -> list[Batch]:
        """Return micro-batches of the current rollout, or of a new one once that is used up."""
        index, inner = divmod(step, self.per_rollout)
        if inner == 0:
            self.rollout = self.roll_out(index, step)
        epoch, part = divmod(inner, self.minibatches)
        order = list(range(self.config.rollout_size))
        Random(f"minibatches {self.seed} {index} {epoch}").shuffle(order)
        chosen = split(order, self.config.batch_size)[part]
        chosen.sort(key=lambda row: sum(map(len, self.rollout.tokens[row])))  # less padding
        return shared_batches(self.minibatch, chosen, self.config.micro_batch)

    def size(self, batch: Batch) -> int:
        return len(batch.target)

    def state(self) -> dict:
        return {"rollout": vars(self.rollout) if self.rollout else None}

    def load_state(self, state: dict) -> None:
        self.rollout = Rollout(**state["rollout"]) if state["rollout"] else None

    def minibatch(self, rows: Sequence[int]) -> Batch:
        """Collate the completions of the rollout's prompts number `rows`."""
        rollout, k = self.rollout, self.config.samples
        batch = completion_batch(self.start.model, [
            (self.data.train[rollout.rows[row]], rollout.tokens[row]) for row in rows])
        places = torch.tensor([row * k + i for row in rows for i in range(k)])
        inside = rollout.mask[places]
        added = {name: x[places][inside] for name, x in rollout.per_token.items()}  # (R,) each
        return self.Minibatch(**vars(batch), **added)

    @torch.no_grad()
    def roll_out(self, index: int, step: int) -> Rollout:
        """Sample and score completions, and assign credit to every token."""
        started, config, roles = time.perf_counter(), self.config, self.roles
        rows = self.source.examples(index)
        prompts = [self.data.train[row] for row in rows]
        tokens, sampled_logp = sample(
            roles.policy, prompts, config, self.seed, index, self.start.tokenizer)
        sampled = time.perf_counter()
        functions = [lambda batch: roles.policy.logp(batch, config.temperature),
                     lambda batch: roles.reference.logp(batch, config.temperature)]
        mask, logp, reference, *values = per_token(
            functions + [roles.critic] * (roles.critic is not None), self.start.model, prompts,
            tokens, config.micro_batch)
        answered = list(zip(prompts, tokens))
        parts = roles.reward(answered)
        scores = torch.stack(list(parts.values())).sum(0)  # (N,)
        table = completion_table(self.start.tokenizer, prompts, tokens, parts,
                                 (logp - reference).sum(1), self.data.false_parts)
        parallel.once(lambda: write_samples(self.start.folder, step + 1, table))
        credited, metrics = self.credit(
            Scored(mask, logp, reference, values[0] if values else None, scores))
        if self.judge:
            metrics["score/held_out"] = self.judge.rate_completions(
                answered, self.start.tokenizer, config.micro_batch).mean().item()
        now = time.perf_counter()
        metrics = {
            **summary(table), **metrics,
            **{f"score/{name}": part.mean().item() for name, part in parts.items()},
            "objective/entropy": -logp[mask].mean().item(),
            "rollout/logp_mismatch": (sampled_logp - logp[mask]).abs().mean().item(),
            "seconds/rollout": now - started, "seconds/sampling": sampled - started,
            "tokens_per_second/rollout": mask.sum().item() / (now - started),
        }
        self.warned = self.warned or warn_truncated(metrics, config)
        return Rollout(rows, tokens, mask, credited, metrics)
