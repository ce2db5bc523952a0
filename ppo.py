"""PPO with a KL penalty: the policy answers, is rewarded, and learns from its own answers.

One iteration (Schulman et al. 2017, arXiv 1707.06347; Ziegler et al. 2019, 1909.08593):

    rollout    k sampled answers to each of some prompts, as k branches of one trunk
               score s = reward model + rules, given at the last token of an answer
               r_t = -beta kl_t + s [t is last],    kl_t from log pi(y_t) - log ref(y_t)
               A_t = sum_l (gamma lambda)^l delta_{t+l},  delta_t = r_t + gamma V_{t+1} - V_t
    optimise   a few passes over these answers in minibatches, with ratio w_t = pi / pi_old:
               L = mean max(-w_t A_t, -clip(w_t, 1 - eps, 1 + eps) A_t)
                 + c 1/2 mean max((V_t - R_t)^2, (clip(V_t, V_old +- eps) - R_t)^2),  R_t = A_t + V_t

Policy, reference, reward model and critic are four adapters over one base with `--lora` (one copy of
the base in memory), and four models otherwise. The critic starts as the reward model with a zero head.

The constants are those of the released code (llava-rlhf/LLaVA-RLHF) unless the options say otherwise.
What this file does differently, and why:
1. Several answers per prompt: the picture and the prompt are computed once for all of them. The
   release samples one; `--samples 1 --rollout_size 512 --batch_size 256` is its arrangement.
2. Losses are means over the tokens of a minibatch; padding counts nowhere, whitening included.
3. With LoRA the reference is the base without adapter, which is what an untrained adapter computes.
4. The entropy that is logged is the sampled answers' -mean log p: unbiased, and no (R, V) tensor.
5. The release multiplies rewards by 10 where it does not whiten them. Not here: advantages are always
   whitened, which makes the policy's gradient independent of any such factor.
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
from data import Batch, Epochs, Example, Response, Tokenizer, collate, split
from model import LLaVA, generate, use_adapter
from preferences import Prompt

# ------------------------------------------------------------------------ the parts, as functions


def kl_estimate(logp: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Per-token estimates of KL(policy || reference) from sampled tokens (Schulman 2020, "kl-approx").

    Args:
        logp, reference: log-probabilities of the tokens, of any shape.
        estimator: "k1": log pi - log ref, unbiased, of either sign; "k1_clamped": the same, at least
            0, as the release has it: biased upwards; "k3": exp(d) - 1 - d with d = log ref - log pi,
            unbiased and never negative.
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
    """Ziegler et al.'s controller: the KL coefficient after a rollout whose mean KL was `kl` nats."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * answers / horizon)


# --------------------------------------------------------------------------------- configuration


@dataclass
class PPOConfig(Training):
    learning_rate: float = option(1e-4, "peak learning rate (release, LoRA on 13B: 3e-5)")
    epochs: int = option(1, "passes over the prompts")
    rollout_size: int = option(64, "prompts per rollout")
    samples: int = option(4, "answers per prompt (release: 1, of 512 prompts)")
    batch_size: int = option(32, "prompts per optimizer step, with all their answers")
    inner_epochs: int = option(2, "passes over a rollout (release)")
    generate_batch: int = option(64, "prompts answered at a time")
    max_new_tokens: int = option(128, "answers are cut off here (release: 896)")
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
    missing_end: float = option(-8.0, "for an answer without end (release)")
    facts: bool = option(False, "the reward model is shown the image's captions")
    captions: str | None = option(None, "image_to_caption.json, for --facts with --data")
    reward_model: str | None = option(None, "folder of a run of --algo rm")
    prompts: int = option(2000, "prompts to make on the built-in world")


# --------------------------------------------------------------------------------------- rollouts


@dataclass
class Role:
    """One of the models: with an adapter over a base that others share, or on its own (None)."""

    model: LLaVA
    adapter: str | None = None

    def logp(self, batch: Batch, temperature: float) -> Tensor:
        """(R,) log-probabilities of the batch's tokens at a temperature."""
        with use_adapter(self.model, self.adapter):
            hidden = self.model(batch.images, batch.tokens, batch.position, batch.branch)
            states = hidden.flatten(0, 1)[batch.source]
            return self.model.head(states / temperature, batch.target)  # W (h / t) = (W h) / t


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
    tokens: Tensor  # (N, T) long
    mask: Tensor  # (N, T) bool, True = token
    logp: Tensor  # (N, T) of the policy that sampled
    values: Tensor  # (N, T)
    advantages: Tensor  # (N, T) whitened
    returns: Tensor  # (N, T)
    metrics: dict[str, float]

    def answers(self, samples: int) -> list[list[list[int]]]:
        """Token ids, `samples` answers for each prompt."""
        flat = [row[keep].tolist() for row, keep in zip(self.tokens, self.mask)]
        return split(flat, samples)


class PPO:
    """The algorithm for the loop. `batches` makes a new rollout whenever the last one is used up."""

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
            reward: parts of the reward {name: (N,)} of rows (prompt, answers' tokens), which it may
                shuffle something for by the given seeds; see `reward.Scorer`.
            prompts: with features for images.
            truth: the false parts of an answer, where they are known; only shown, never learnt from.
            record: gets a table of sampled answers after every rollout.
        """
        if config.rollout_size % config.batch_size:
            raise ValueError(f"--rollout_size {config.rollout_size} is no multiple of --batch_size "
                             f"{config.batch_size}")
        self.policy, self.reference, self.critic, self.reward = policy, reference, critic, reward
        self.tokenizer, self.config, self.seed = tokenizer, config, seed
        self.truth, self.record = truth, record
        self.modules = nn.ModuleDict({"policy": policy.model, "critic": critic})
        self.prompts = list(prompts)
        places = list(range(len(self.prompts)))
        self.source = Epochs(places, replace(config, batch_size=config.rollout_size, steps=0), seed)
        self.minibatches = config.rollout_size // config.batch_size
        self.per_rollout = config.inner_epochs * self.minibatches  # optimizer steps
        self.steps = config.steps or self.source.steps * self.per_rollout
        self.coefficient = config.kl
        self.rollout: Rollout | None = None
        self.tokens, self.clock, self.warned = 0, None, False  # of the last step; for tokens/s

    # ---------------------------------------------------------------- what the loop asks for

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
        chosen.sort(key=lambda row: self.rollout.mask.view(len(order), -1)[row].sum().item())
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

    # -------------------------------------------------------------------------- rollouts

    def minibatch(self, rows: Sequence[int]) -> RolloutBatch:
        """The answers to the rollout's prompts number `rows`, as one batch."""
        rollout, k = self.rollout, self.config.samples
        answers = rollout.answers(k)
        batch = self.collate([(self.prompts[rollout.rows[row]], answers[row]) for row in rows])
        places = torch.tensor([row * k + i for row in rows for i in range(k)])
        flat = lambda x: x[places][rollout.mask[places]]  # (R,)
        return RolloutBatch(
            **vars(batch), old_logp=flat(rollout.logp), old_values=flat(rollout.values),
            advantages=flat(rollout.advantages), returns=flat(rollout.returns))

    def collate(self, rows: Sequence[tuple[Prompt, Sequence[list[int]]]]) -> Batch:
        model = self.policy.model
        examples = [
            Example(prompt.name, prompt.image, prompt.tokens,
                    [Response(answer, [1.0] * len(answer)) for answer in answers])
            for prompt, answers in rows
        ]
        context = model.config.text.max_position_embeddings
        return collate(examples, model.config.pad_token, context)

    @torch.no_grad()
    def roll_out(self, index: int, step: int) -> Rollout:
        """Sample answers, reward them, and work out what every token of them was worth."""
        started, config = time.perf_counter(), self.config
        rows = self.source.examples(index)
        prompts = [self.prompts[row] for row in rows]
        answers = self.sample(prompts, index)  # (P, k) lists of tokens
        sampling = time.perf_counter() - started
        mask, (logp, reference, values) = self.measure(prompts, answers)
        parts = self.reward(list(zip(prompts, answers)), (self.seed, index))
        scores = torch.stack(list(parts.values())).sum(0)  # (N,)
        kl = kl_estimate(logp, reference, config.kl_estimator)
        rewards = shaped_rewards(scores, kl, mask, self.coefficient)
        advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
        flat = [torch.tensor(answer) for group in answers for answer in group]
        tokens = nn.utils.rnn.pad_sequence(flat, batch_first=True)
        divergence = (logp - reference).sum(1)  # (N,) padding is 0 in both
        ended = torch.tensor([answer[-1] == self.tokenizer.eos_token for answer in flat])
        self.warn(ended)
        seconds = time.perf_counter() - started
        metrics = {
            "objective/kl": divergence.mean().item(),
            "objective/kl_coefficient": self.coefficient,
            "objective/scores": scores.mean().item(),
            "objective/rlhf_reward": rewards.sum(1).mean().item(),
            "objective/entropy": -logp[mask].mean().item(),
            "val/explained_variance": explained_variance(values[mask], returns[mask]),
            "response/length": mask.sum(1).float().mean().item(),
            "response/ended": ended.float().mean().item(),
            "seconds/sampling": sampling, "seconds/rollout": seconds,
            "tokens_per_second/rollout": mask.sum().item() / seconds,
            **{f"score/{name}": part.mean().item() for name, part in parts.items()},
        }
        self.show(prompts, answers, parts, divergence, metrics, step)
        if config.target_kl:
            self.coefficient = adapted(self.coefficient, metrics["objective/kl"], config.target_kl,
                                       len(flat), config.kl_horizon)
        return Rollout(rows, tokens, mask, logp, values, whiten(advantages, mask), returns, metrics)

    def sample(self, prompts: Sequence[Prompt], index: int) -> list[list[list[int]]]:
        """`samples` answers of the policy to each prompt, as lists of tokens."""
        config, model = self.config, self.policy.model
        device = model.head.weight.device
        generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + index)
        answers = []
        with use_adapter(model, self.policy.adapter):
            for part in split(prompts, config.generate_batch):
                images = torch.stack([prompt.image for prompt in part]).to(model.head.weight)
                asked = [torch.tensor(prompt.tokens) for prompt in part]
                found = generate(model, images, asked, config.max_new_tokens, config.temperature,
                                 config.samples, generator)
                answers += [answer.tolist() for answer in found]
        return split(answers, config.samples)

    def measure(self, prompts, answers) -> tuple[Tensor, list[Tensor]]:
        """mask (N, T), and per token: policy's and reference's log-probability, value, each (N, T)."""
        lengths = torch.tensor([len(answer) for group in answers for answer in group])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (N, T)
        found, device = [[], [], []], self.policy.model.head.weight.device
        for part in split(list(zip(prompts, answers)), self.config.micro_batch):
            batch = self.collate(part).to(device)
            found[0].append(self.policy.logp(batch, self.config.temperature).float().cpu())
            found[1].append(self.reference.logp(batch, self.config.temperature).float().cpu())
            found[2].append(self.critic(batch).cpu())
        # entries come answer by answer, as the mask's rows do
        return mask, [torch.zeros(mask.shape).masked_scatter(mask, torch.cat(x)) for x in found]

    def warn(self, ended: Tensor) -> None:
        """Say it, once, if most answers are cut off: then their ends are never learnt."""
        cut = 1 - ended.float().mean().item()
        if cut > 0.5 and not self.warned:
            self.warned = True
            print(f"warning: {100 * cut:.0f} % of the answers were cut off at --max_new_tokens "
                  f"{self.config.max_new_tokens}; a larger limit lets them end", file=sys.stderr)

    def show(self, prompts, answers, parts, divergence, metrics: dict, step: int) -> None:
        """Hand the answers to `record`, and put the share that is known to be false into metrics."""
        rows = []
        flat = [(prompt, answer) for prompt, group in zip(prompts, answers) for answer in group]
        for i, (prompt, answer) in enumerate(flat):
            text = self.tokenizer.decode(answer).strip()
            rows.append({
                "step": step + 1, "prompt": prompt.name, "question": prompt.question, "answer": text,
                "score": sum(part[i].item() for part in parts.values()),
                **{name: part[i].item() for name, part in parts.items()},
                "kl": divergence[i].item(), "false": self.truth(prompt, text),
            })
        judged = [row["false"] for row in rows if row["false"] is not None]
        if judged:
            metrics["truth/hallucination"] = sum(map(bool, judged)) / len(judged)
        self.record(rows)
