"""PPO with a KL penalty: the policy answers, is rewarded, and learns from its own answers.

One iteration (Schulman et al. 2017, arXiv 1707.06347; Ziegler et al. 2019, 1909.08593):

    rollout    k sampled answers to each of some prompts, as k branches of one trunk
               score s = reward model + rules, given at the last token of an answer
               r_t = -beta kl_t + s [t is last],    kl_t from log pi(y_t) - log ref(y_t)
               A_t = sum_l (gamma lambda)^l delta_{t+l},  delta_t = r_t + gamma V_{t+1} - V_t
    optimise   a few passes over these answers in minibatches, with ratio w_t = pi / pi_old:
               L = mean max(-w_t A_t, -clip(w_t, 1 - eps, 1 + eps) A_t)
                 + c/2 mean max((V_t - R_t)^2, (clip(V_t, V_old +- eps) - R_t)^2),  R_t = A_t + V_t

Policy, reference, reward model and critic are adapters over one base with `--lora` (one copy of it
in memory), and four models otherwise. The critic starts as the reward model with a zero head.

The constants are those of the released code (llava-rlhf/LLaVA-RLHF) unless the options say so.
What this file does differently, and why:
1. Several answers per prompt: the picture and the prompt are computed once for all of them. The
   release samples one; `--samples 1 --rollout_size 512 --batch_size 256` is its arrangement.
2. Losses are means over the tokens of a minibatch; padding counts nowhere, whitening included.
3. With LoRA the reference is the base without adapter, which is what an untrained adapter computes.
4. The entropy that is logged is the sampled answers' -mean log p: unbiased, and no (R, V) tensor.
5. The release multiplies rewards by 10 where it does not whiten them. Not here: advantages are
   always whitened, which makes the policy's gradient independent of any such factor.
6. The length penalty is in proportion to 896 tokens, the release's longest answer, whatever
   `--max_new_tokens` is: else short limits would make every sentence dear.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor, nn

from config import Training, option
from data import Batch, Epochs, Tokenizer, split
from preferences import Prompt
from rollouts import Answers, Role, Sampler, answer_batch

# ------------------------------------------------------------------------ the parts, as functions


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
    """-coefficient * kl at every token, and the score at the last one of each answer.

    Args:
        scores: (N,).
        kl: (N, T), right-padded; mask: (N, T) bool, True = token, at least one per answer.

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
        rewards, values: (N, T), right-padded; what is under the padding does not matter.
        mask: (N, T) bool, True = token. The value after the last token is 0.
        gamma, lam: discount, and lambda; both in 0..1.

    Returns:
        advantages and returns (= advantages + values), each (N, T), 0 where there is no token.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])  # A_{t+1}
    value = torch.zeros_like(following)  # V_{t+1}
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * value - values[:, t]
        following = (delta + gamma * lam * following).masked_fill(~mask[:, t], 0.0)
        value = values[:, t]
        advantages[:, t] = following
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over all that the mask (of x's shape) lets through; 0 elsewhere."""
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
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(free, held), held > free, 0.5 * difference.detach().square()


def value_loss(
    values: Tensor, old: Tensor, returns: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Half squared error; a value may not gain by leaving its old one by more than `clip`.

    Args:
        values, old: (R,) now and at the rollout; returns: (R,).

    Returns:
        losses (R,), clipped (R,) bool.
    """
    near = old + (values - old).clamp(-clip, clip)
    free, held = (values - returns).square(), (near - returns).square()
    return 0.5 * torch.maximum(free, held), held > free


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over (R,): 1 is perfect, 0 as good as a constant."""
    spread = returns.var(correction=0).item()
    return 1 - (returns - values).var(correction=0).item() / spread if spread > 0 else 0.0


def adapted(coefficient: float, kl: float, target: float, answers: int, horizon: int) -> float:
    """Ziegler et al.'s controller: the coefficient after a rollout with a mean KL of `kl` nats."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * answers / horizon)


# --------------------------------------------------------------------------------- configuration


@dataclass
class PPOConfig(Training):
    learning_rate: float = option(1e-4, "peak learning rate (release, LoRA on 13B: 3e-5)")
    epochs: int = option(1, "passes over the prompts")
    rollout_size: int = option(64, "prompts per rollout", least=1)
    samples: int = option(4, "answers per prompt (release: 1, of 512 prompts)", least=1)
    batch_size: int = option(32, "prompts per optimizer step, with all their answers", least=1)
    inner_epochs: int = option(2, "passes over a rollout (release)", least=1)
    generate_batch: int = option(64, "prompts answered at a time", least=1)
    max_new_tokens: int = option(128, "answers are cut off here (release: 896)", least=1)
    temperature: float = option(1.0, "of sampling and of all log-probabilities (release)")
    kl: float = option(0.1, "coefficient of the KL penalty (release)")
    kl_estimator: str = option("k1_clamped", "of the penalty (release: k1_clamped, or k3)",
                               choices=("k1_clamped", "k1", "k3"))
    target_kl: float = option(0.0, "nats per answer that an adaptive coefficient aims at; 0: fixed")
    kl_horizon: int = option(10000, "answers over which the adaptive coefficient settles")
    gamma: float = option(1.0, "discount (release)")
    lam: float = option(1.0, "GAE's lambda (release)")
    clip: float = option(0.2, "of the ratio (release)")
    value_clip: float = option(0.2, "of the values (release)")
    value_coefficient: float = option(0.1, "of the value loss (release)")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm (release)")
    symbolic_bonus: float = option(2.0, "scales the reward of right options, yes and no (release)")
    length_penalty: float = option(10.0, "for an answer of --longest tokens (release)")
    longest: int = option(896, "tokens that cost the whole length penalty (release)")
    missing_end: float = option(-8.0, "for an answer without end (release)", least=-float("inf"))
    facts: bool = option(False, "the reward model is shown the image's captions")
    captions: str | None = option(None, "image_to_caption.json, for --facts with --data")
    reward_model: str | None = option(None, "folder of a run of --algo rm")
    prompts: int = option(2000, "prompts to make on the built-in world")


# ------------------------------------------------------------------------------------ the algorithm


@dataclass
class RolloutBatch(Batch):
    """A batch of the policy's answers; each (R,), as they were when the answers were sampled."""

    old_logp: Tensor | None = None
    old_values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None


@dataclass
class Rollout:
    """N = P k sampled answers and all that optimising needs; right-padded where (N, T)."""

    rows: list[int]  # (P,) places of the prompts in the data
    tokens: list[list[list[int]]]  # k answers to each prompt
    mask: Tensor  # (N, T) bool, True = token
    logp: Tensor  # (N, T) of the policy that sampled
    values: Tensor  # (N, T)
    advantages: Tensor  # (N, T) whitened
    returns: Tensor  # (N, T)
    metrics: dict[str, float]


class PPO:
    """The algorithm for the loop. `batches` makes a new rollout when the last one is used up."""

    def __init__(
        self, policy: Role, reference: Role, critic: nn.Module,
        reward: Callable[[list, tuple], dict[str, Tensor]],
        tokenizer: Tokenizer, config: PPOConfig, seed: int, prompts: Sequence[Prompt],
        truth: Callable[[Prompt, str], list[str] | None] = lambda prompt, text: None,
        record: Callable[[list[dict]], None] = lambda rows: None,
    ):
        """
        Args:
            critic: gives (R,) values for a batch, as `reward.Judge` does.
            reward: parts of the reward {name: (N,)} of rows (prompt, answers' tokens), which may
                depend on the given seeds; see `reward.Scorer`.
            truth: the false parts of an answer, where they are known; shown, never learnt from.
            record: gets a table of the sampled answers after every rollout.
        """
        if config.rollout_size % config.batch_size:
            raise ValueError(f"--rollout_size {config.rollout_size} is no multiple of --batch_size "
                             f"{config.batch_size}")
        self.policy, self.critic, self.reward, self.tokenizer = policy, critic, reward, tokenizer
        self.sampler = Sampler(policy, reference, critic, config, seed)
        self.config, self.seed, self.truth, self.record = config, seed, truth, record
        self.modules = nn.ModuleDict({"policy": policy.model, "critic": critic})
        self.prompts = list(prompts)
        places = list(range(len(self.prompts)))
        per_rollout = replace(config, batch_size=config.rollout_size, steps=0)
        self.source = Epochs(places, per_rollout, seed, length=lambda place: 0)
        self.minibatches = config.rollout_size // config.batch_size
        self.per_rollout = config.inner_epochs * self.minibatches  # optimizer steps
        self.steps = config.steps or self.source.steps * self.per_rollout
        self.coefficient = config.kl
        self.rollout: Rollout | None = None
        self.tokens, self.clock, self.warned = 0, None, False  # of the last step; for tokens/s

    def batches(self, step: int) -> list[Batch]:
        optimising = time.perf_counter() - self.clock if self.clock else None
        index, inner = divmod(step, self.per_rollout)
        if inner == 0:
            self.rollout = self.roll_out(index, step)
        if optimising:
            self.rollout.metrics["tokens_per_second/optimisation"] = self.tokens / optimising
        epoch, part = divmod(inner, self.minibatches)
        order = list(range(self.config.rollout_size))
        Random(f"minibatches {self.seed} {index} {epoch}").shuffle(order)
        chosen = split(order, self.config.batch_size)[part]
        chosen.sort(key=lambda row: sum(map(len, self.rollout.tokens[row])))  # like length together
        batches = [self.minibatch(rows) for rows in split(chosen, self.config.micro_batch)]
        self.tokens, self.clock = sum(map(self.size, batches)), time.perf_counter()
        return batches

    def size(self, batch: Batch) -> int:
        return len(batch.target)

    def loss(self, batch: RolloutBatch) -> tuple[Tensor, dict[str, float]]:
        config = self.config
        logp = self.policy.logp(batch, config.temperature)
        values = self.critic(batch)
        losses, clipped, kl = policy_loss(logp, batch.old_logp, batch.advantages, config.clip)
        errors, held = value_loss(values, batch.old_values, batch.returns, config.value_clip)
        return losses.mean() + config.value_coefficient * errors.mean(), {
            "policy/loss": losses.detach().mean().item(), "policy/approxkl": kl.mean().item(),
            "policy/clipfrac": clipped.float().mean().item(),
            "val/loss": errors.detach().mean().item(),
            "val/clipfrac": held.float().mean().item(),
            "padding": batch.padding, **self.rollout.metrics,
        }

    def state(self) -> dict:
        """What resuming in the middle of a rollout needs beside the weights."""
        rollout = vars(self.rollout) if self.rollout else None
        return {"coefficient": self.coefficient, "rollout": rollout}

    def load_state(self, state: dict) -> None:
        self.coefficient = state["coefficient"]
        self.rollout = Rollout(**state["rollout"]) if state["rollout"] else None

    def minibatch(self, rows: Sequence[int]) -> RolloutBatch:
        """The answers to the rollout's prompts number `rows`, as one batch."""
        rollout, k = self.rollout, self.config.samples
        batch = answer_batch(self.policy.model, [
            (self.prompts[rollout.rows[row]], rollout.tokens[row]) for row in rows])
        places = torch.tensor([row * k + i for row in rows for i in range(k)])
        flat = lambda x: x[places][rollout.mask[places]]  # (R,)
        return RolloutBatch(
            **vars(batch), old_logp=flat(rollout.logp), old_values=flat(rollout.values),
            advantages=flat(rollout.advantages), returns=flat(rollout.returns))

    @torch.no_grad()
    def roll_out(self, index: int, step: int) -> Rollout:
        """Have answers sampled and rewarded, and work out what every token of them was worth."""
        started, config = time.perf_counter(), self.config
        rows = self.source.examples(index)
        prompts = [self.prompts[row] for row in rows]
        answers = self.sampler(prompts, index)
        parts = self.reward(list(zip(prompts, answers.tokens)), (self.seed, index))
        scores = torch.stack(list(parts.values())).sum(0)  # (N,)
        mask, values = answers.mask, answers.values
        kl = kl_estimate(answers.logp, answers.reference, config.kl_estimator)
        rewards = shaped_rewards(scores, kl, mask, self.coefficient)
        advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
        table = self.table(prompts, answers, parts, step)
        metrics = {
            **summary(table),
            "objective/kl_coefficient": self.coefficient,
            "objective/rlhf_reward": rewards.sum(1).mean().item(),
            "objective/entropy": -answers.logp[mask].mean().item(),
            "val/explained_variance": explained_variance(values[mask], returns[mask]),
            **{f"score/{name}": part.mean().item() for name, part in parts.items()},
        }
        self.record(table)
        self.warn(1 - metrics["response/ended"])
        if config.target_kl:
            self.coefficient = adapted(self.coefficient, metrics["objective/kl"], config.target_kl,
                                       len(table), config.kl_horizon)
        seconds = time.perf_counter() - started
        metrics |= {"seconds/rollout": seconds, "seconds/sampling": answers.seconds,
                    "tokens_per_second/rollout": mask.sum().item() / seconds}
        return Rollout(rows, answers.tokens, mask, answers.logp, values,
                       whiten(advantages, mask), returns, metrics)

    def table(self, prompts, answers: Answers, parts: dict[str, Tensor], step: int) -> list[dict]:
        """One row for each sampled answer: text, score with its parts, KL, what of it is false."""
        rows, divergence = [], (answers.logp - answers.reference).sum(1)  # padding is 0 in both
        said = [(p, answer) for p, group in zip(prompts, answers.tokens) for answer in group]
        for i, (prompt, answer) in enumerate(said):
            text = self.tokenizer.decode(answer).strip()
            score = {name: part[i].item() for name, part in parts.items()}
            rows.append({
                "step": step + 1, "prompt": prompt.name, "question": prompt.question,
                "answer": text, "score": sum(score.values()), **score, "kl": divergence[i].item(),
                "tokens": len(answer), "ended": answer[-1] == self.tokenizer.eos_token,
                "false": self.truth(prompt, text),
            })
        return rows

    def warn(self, cut: float) -> None:
        """Say it, once, if most answers are cut off: then their ends are never learnt."""
        if cut > 0.5 and not self.warned:
            self.warned = True
            print(f"warning: {100 * cut:.0f} % of the answers were cut off at --max_new_tokens "
                  f"{self.config.max_new_tokens}; a larger limit lets them end", file=sys.stderr)


def summary(table: list[dict]) -> dict[str, float]:
    """Means over a table of sampled answers, under the names that other trainers use."""
    mean = lambda values: sum(values) / len(values)
    metrics = {
        "objective/kl": mean([row["kl"] for row in table]),
        "objective/scores": mean([row["score"] for row in table]),
        "response/length": mean([row["tokens"] for row in table]),
        "response/ended": mean([row["ended"] for row in table]),
    }
    known = [bool(row["false"]) for row in table if row["false"] is not None]
    return metrics | ({"truth/hallucination": mean(known)} if known else {})
