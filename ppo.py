"""PPO with a KL penalty: the policy answers, is rewarded, and learns from its own completions.

One iteration (Schulman et al. 2017, arXiv 1707.06347; Ziegler et al. 2019, 1909.08593):

    rollout    k sampled completions of each of some prompts, as k branches of one trunk
               score s = reward model + rules, given at the last token of a completion
               r_t = -beta kl_t + s [t is last],    kl_t from log pi(y_t) - log ref(y_t)
               A_t = sum_l (gamma lambda)^l delta_{t+l},  delta_t = r_t + gamma V_{t+1} - V_t
    optimise   a few passes over them in minibatches, with ratio w_t = pi / pi_old:
               L = mean max(-w_t A_t, -clip(w_t, 1 - eps, 1 + eps) A_t)
                 + c/2 mean max((V_t - R_t)^2, (clip(V_t, V_old +- eps) - R_t)^2),  R_t = A_t + V_t

With `--lora` policy, reward model and critic are adapters over one base, which is also the
reference, so that memory holds it once; otherwise they are four models. The critic starts as the
reward model with a zero head.

The constants are those of the released code (llava-rlhf/LLaVA-RLHF) unless the options say so.
What this file does differently, and why:
1. Several completions per prompt: image and prompt are computed once for all of them. The release
   samples one; `--samples 1 --rollout_size 512 --batch_size 256` is its arrangement.
2. Losses are means over the tokens of a minibatch; padding counts nowhere, whitening included.
3. With LoRA the reference is the base without adapter, which is what an untrained adapter computes.
4. The logged entropy is the sampled tokens' mean -log p: unbiased, and no (R, V) tensor.
5. The release multiplies rewards by 10 where it does not whiten them. Advantages are always
   whitened here, which makes the policy's gradient independent of any such factor.
6. The length penalty is proportional to 896 tokens, the release's limit, whatever
   `--max_new_tokens` is: relative to a short limit it would over-penalise length.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor, nn

import parallel
from algorithm import Algorithm, Data, Start
from config import Training, option
from data import Batch, Epochs, shared_batches, split, trunk_tokens
from rollouts import (
    Roles, check_room, completion_batch, completion_table, make_roles, per_token, sample, summary,
    write_samples,
)

# -------------------------------------------------------------------------- the parts, as functions


def kl_estimate(logp: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Per-token estimates of KL(policy || reference) from sampled tokens (Schulman 2020).

    Args:
        logp, reference: log-probabilities of the tokens, of any shape.
        estimator: "k1": log pi - log ref, unbiased, of either sign; "k1_clamped": the same, at
            least 0, as the release has it: biased upwards; "k3": exp(d) - 1 - d with
            d = log ref - log pi, unbiased and never negative.
    """
    difference = logp - reference
    if estimator == "k1_clamped":
        return difference.clamp(min=0)
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    return difference


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """-coefficient * kl at every token, and the score at the last one of each completion.

    Args:
        scores: (N,).
        kl: (N, T), right-padded; mask: (N, T) bool, True = token, at least one per completion.

    Returns:
        (N, T), 0 where there is no token.
    """
    rewards = (-coefficient * kl).masked_fill(~mask, 0.0)
    last = mask.sum(1, keepdim=True) - 1  # (N, 1)
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438, Eq. 16).

    Args:
        rewards, values: (N, T), right-padded with anything.
        mask: (N, T) bool, True = token. The value after the last token is 0.
        gamma, lam: discount, and lambda; both in 0..1.

    Returns:
        advantages and returns (= advantages + values), each (N, T), 0 where there is no token.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(values)
    last_gae = torch.zeros_like(values[:, 0])  # A_{t+1}
    value = torch.zeros_like(last_gae)  # V_{t+1}
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * value - values[:, t]
        last_gae = (delta + gamma * lam * last_gae).masked_fill(~mask[:, t], 0.0)
        value = values[:, t]
        advantages[:, t] = last_gae
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x with mean 0 and variance 1 where the mask (of x's shape) is True; 0 elsewhere."""
    inside = x[mask]
    spread = inside.var(correction=0)  # a single token has variance 0, not NaN
    return ((x - inside.mean()) * torch.rsqrt(spread + 1e-8)).masked_fill(~mask, 0.0)


def policy_loss(
    logp: Tensor, old: Tensor, advantages: Tensor, clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped surrogate objective (PPO, Eq. 7), to be minimised.

    Args:
        logp, old: (R,) log-probabilities of the tokens, now and when they were sampled.
        advantages: (R,).
        clip: epsilon.

    Returns:
        losses (R,); clipped (R,) bool, where the clip decides; approximate KL(old || now) (R,), the
        half square of the difference (detached, like clipped).
    """
    difference = logp - old
    ratio = difference.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    kl = 0.5 * difference.detach().square()
    return torch.maximum(unclipped, clipped), clipped > unclipped, kl


def value_loss(
    values: Tensor, old: Tensor, returns: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Half squared error; moving a value further than `clip` from its old one gains nothing.

    Args:
        values, old: (R,) now and at the rollout; returns: (R,).

    Returns:
        losses (R,), clipped (R,) bool.
    """
    near = old + (values - old).clamp(-clip, clip)
    unclipped, clipped = (values - returns).square(), (near - returns).square()
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over (R,): 1 is perfect, 0 as good as a constant."""
    spread = returns.var(correction=0).item()
    return 1 - (returns - values).var(correction=0).item() / spread if spread > 0 else 0.0


def adaptive_kl_coef(
    coef: float, kl: float, target: float, completions: int, horizon: int
) -> float:
    """The KL coefficient after a rollout with a mean KL of `kl` nats (Ziegler et al. 2019, 2.2)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * completions / horizon)


# ------------------------------------------------------------------------------------ configuration


@dataclass
class PPOConfig(Training):
    learning_rate: float = option(1e-4, "peak learning rate (release, LoRA on 13B: 3e-5)")
    epochs: int = option(1, "passes over the prompts")
    rollout_size: int = option(64, "prompts per rollout", least=1)
    samples: int = option(4, "completions per prompt (release: 1, of 512 prompts)", least=1)
    batch_size: int = option(32, "prompts per optimizer step, with all their completions", least=1)
    num_ppo_epochs: int = option(2, "passes over a rollout (release)", least=1)
    generate_batch: int = option(64, "prompts decoded at a time", least=1)
    max_new_tokens: int = option(128, "completions are cut off here (release: 896)", least=1)
    temperature: float = option(1.0, "of sampling and of all log-probabilities (release)")
    kl_coef: float = option(0.1, "coefficient of the KL penalty (release)")
    kl_estimator: str = option("k1_clamped", "of the penalty (release: k1_clamped, or k3)",
                               choices=("k1_clamped", "k1", "k3"))
    target_kl: float = option(0.0, "nats per completion that an adaptive kl_coef aims at; 0: fixed")
    kl_horizon: int = option(10000, "completions over which the adaptive kl_coef settles")
    gamma: float = option(1.0, "discount (release)")
    lam: float = option(1.0, "GAE's lambda (release)")
    cliprange: float = option(0.2, "of the ratio (release)")
    cliprange_value: float = option(0.2, "of the values (release)")
    vf_coef: float = option(0.1, "of the value loss (release)")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm (release)")
    symbolic_bonus: float = option(2.0, "scales the reward of right options, yes and no (release)")
    length_penalty: float = option(10.0, "for a completion of --length_penalty_tokens (release)")
    length_penalty_tokens: int = option(896, "tokens that cost the whole length penalty (release)")
    missing_eos_penalty: float = option(
        -8.0, "for a completion without end-of-sequence (release)", least=-float("inf"))
    facts: bool = option(False, "give the reward model the image's captions")
    captions: str | None = option(None, "image_to_caption.json, for --facts with --data")
    reward_model: str | None = option(None, "folder of a run of --algo rm")
    prompts: int = option(2000, "prompts to make on the built-in world")


# ------------------------------------------------------------------------------------ the algorithm


@dataclass
class RolloutBatch(Batch):
    """A batch of completions; each (R,), as it was when they were sampled."""

    old_logp: Tensor | None = None
    old_values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None


@dataclass
class Rollout:
    """N = P k completions and all that optimising takes; right-padded where (N, T)."""

    rows: list[int]  # (P,) places of the prompts in the data
    tokens: list[list[list[int]]]  # k completions of each prompt
    mask: Tensor  # (N, T) bool, True = token
    logp: Tensor  # (N, T) of the policy that sampled
    values: Tensor  # (N, T)
    advantages: Tensor  # (N, T) whitened
    returns: Tensor  # (N, T)
    metrics: dict[str, float]


class PPO(Algorithm):
    """Train a policy on rewards by proximal policy optimisation (PPO)."""

    Config = PPOConfig
    reads = "prompts"
    first = ("base", "rm")

    def __init__(self, start: Start, config: PPOConfig, data: Data, roles: Roles | None = None):
        if config.rollout_size % config.batch_size:
            raise ValueError(f"--rollout_size {config.rollout_size} is no multiple of --batch_size "
                             f"{config.batch_size}")
        check_room(start, config, data)
        self.start, self.config, self.seed, self.data = start, config, start.run.seed, data
        self.roles = roles or make_roles(start, config)
        self.modules = nn.ModuleDict(
            {"policy": self.roles.policy.model, "critic": self.roles.critic})
        per_rollout = replace(config, batch_size=config.rollout_size, steps=0)
        places = list(range(len(data.train)))
        self.source = Epochs(places, per_rollout, self.seed, length=lambda place: 0)
        self.minibatches = config.rollout_size // config.batch_size
        self.per_rollout = config.num_ppo_epochs * self.minibatches  # optimizer steps
        self.steps = config.steps or self.source.steps * self.per_rollout
        self.kl_coef = config.kl_coef
        self.rollout: Rollout | None = None
        self.warned = False

    @staticmethod
    def tokens(row, tokenizer, patches: int, config: PPOConfig):
        return trunk_tokens(tokenizer, (), row.question, patches), []

    def batches(self, step: int) -> list[RolloutBatch]:
        """Minibatches of the current rollout, or of a new one if that is used up."""
        index, inner = divmod(step, self.per_rollout)
        if inner == 0:
            self.rollout = self.roll_out(index, step)
        epoch, part = divmod(inner, self.minibatches)
        order = list(range(self.config.rollout_size))
        Random(f"minibatches {self.seed} {index} {epoch}").shuffle(order)
        chosen = split(order, self.config.batch_size)[part]
        chosen.sort(key=lambda row: sum(map(len, self.rollout.tokens[row])))  # like length together
        return shared_batches(self.minibatch, chosen, self.config.micro_batch)

    def size(self, batch: Batch) -> int:
        return len(batch.target)

    def loss(self, batch: RolloutBatch) -> tuple[Tensor, dict[str, float]]:
        config = self.config
        logp = self.roles.policy.logp(batch, config.temperature)
        values = self.roles.critic(batch)
        losses, clipped, kl = policy_loss(logp, batch.old_logp, batch.advantages, config.cliprange)
        errors, value_clipped = value_loss(
            values, batch.old_values, batch.returns, config.cliprange_value)
        return losses.mean() + config.vf_coef * errors.mean(), {
            "policy/loss": losses.detach().mean().item(), "policy/approxkl": kl.mean().item(),
            "policy/clipfrac": clipped.float().mean().item(),
            "val/loss": errors.detach().mean().item(),
            "val/clipfrac": value_clipped.float().mean().item(),
            "padding": batch.padding, **self.rollout.metrics,
        }

    def state(self) -> dict:
        return {"kl_coef": self.kl_coef, "rollout": vars(self.rollout) if self.rollout else None}

    def load_state(self, state: dict) -> None:
        self.kl_coef = state["kl_coef"]
        self.rollout = Rollout(**state["rollout"]) if state["rollout"] else None

    def minibatch(self, rows: Sequence[int]) -> RolloutBatch:
        """The completions of the rollout's prompts number `rows`, as one batch."""
        rollout, k = self.rollout, self.config.samples
        batch = completion_batch(self.start.model, [
            (self.data.train[rollout.rows[row]], rollout.tokens[row]) for row in rows])
        places = torch.tensor([row * k + i for row in rows for i in range(k)])
        flat = lambda x: x[places][rollout.mask[places]]  # (R,)
        return RolloutBatch(
            **vars(batch), old_logp=flat(rollout.logp), old_values=flat(rollout.values),
            advantages=flat(rollout.advantages), returns=flat(rollout.returns))

    @torch.no_grad()
    def roll_out(self, index: int, step: int) -> Rollout:
        """Sample and score completions; compute the advantage of every token."""
        started, config, roles = time.perf_counter(), self.config, self.roles
        rows = self.source.examples(index)
        prompts = [self.data.train[row] for row in rows]
        tokens = sample(roles.policy, prompts, config, self.seed, index)
        sampled = time.perf_counter()
        mask, logp, reference, values = per_token(
            [lambda batch: roles.policy.logp(batch, config.temperature),
             lambda batch: roles.reference.logp(batch, config.temperature), roles.critic],
            self.start.model, prompts, tokens, config.micro_batch)
        parts = roles.reward(list(zip(prompts, tokens)), (self.seed, index))
        scores = torch.stack(list(parts.values())).sum(0)  # (N,)
        kl = kl_estimate(logp, reference, config.kl_estimator)
        rewards = shaped_rewards(scores, kl, mask, self.kl_coef)
        advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
        table = completion_table(self.start.tokenizer, prompts, tokens, parts,
                                 (logp - reference).sum(1), self.data.false_parts)
        parallel.once(lambda: write_samples(self.start.folder, step + 1, table))
        now = time.perf_counter()
        metrics = {
            **summary(table),
            **{f"score/{name}": part.mean().item() for name, part in parts.items()},
            "objective/kl_coefficient": self.kl_coef,
            "objective/rlhf_reward": rewards.sum(1).mean().item(),
            "objective/entropy": -logp[mask].mean().item(),
            "val/explained_variance": explained_variance(values[mask], returns[mask]),
            "seconds/rollout": now - started, "seconds/sampling": sampled - started,
            "tokens_per_second/rollout": mask.sum().item() / (now - started),
        }
        self.warn(1 - metrics["response/ended"])
        if config.target_kl:
            self.kl_coef = adaptive_kl_coef(self.kl_coef, metrics["objective/kl"],
                                            config.target_kl, len(table), config.kl_horizon)
        return Rollout(rows, tokens, mask, logp, values, whiten(advantages, mask), returns, metrics)

    def warn(self, truncated: float) -> None:
        """Warn once if most completions are truncated; EOS is then never learned."""
        if truncated > 0.5 and not self.warned:
            self.warned = True
            print(f"warning: {100 * truncated:.0f} % of the completions were cut off at "
                  f"--max_new_tokens {self.config.max_new_tokens}; raise it", file=sys.stderr)
