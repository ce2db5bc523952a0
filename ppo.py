"""PPO with a KL penalty: the policy learns from rewards of its own completions.

One iteration (Schulman et al. 2017, arXiv 1707.06347; Ziegler et al. 2019, 1909.08593):

    rollout    k sampled completions of each of some prompts, as k branches of one trunk
               score s = reward model + rules, given at the last token of a completion
               r_t = -beta kl_t + s [t is last],    kl_t from log pi(y_t) - log ref(y_t)
               A_t = sum_l (gamma lambda)^l delta_{t+l},  delta_t = r_t + gamma V_{t+1} - V_t
    optimise   a few passes over them in minibatches, with ratio w_t = pi / pi_old:
               L = mean max(-w_t A_t, -clip(w_t, 1 - eps, 1 + eps) A_t)

The return is compared with a baseline V:

    group      the mean return of the other completions of the prompt (RLOO, arXiv 2402.14740): the
               same for all tokens of a completion. It needs neither training nor memory.
    critic     a value for every token, as in the release; it learns R_t = A_t + V_t by
               L_V = c/2 mean max((V_t - R_t)^2, (clip(V_t, V_old +- eps) - R_t)^2)
               and starts as the reward model with a zero head.

With `--lora` policy, reward model and critic are adapters over one base, which is also the
reference and is held in memory once; otherwise they are separate models.

The constants are those of the released code (llava-rlhf/LLaVA-RLHF) unless the options say so.
What this file does differently, and why:
1. Several completions per prompt: image and prompt are computed once for all of them, and they are
   each other's baseline. The release samples one and trains a critic:
   `--baseline critic --samples 1 --rollout_size 512 --batch_size 256`.
2. Losses are means over the tokens of a minibatch; padding never counts, not in whitening either.
3. With LoRA the reference is the base without adapter, which an untrained adapter equals.
4. The logged entropy is the sampled tokens' mean -log p: unbiased, and no (R, V) tensor.
5. The release multiplies rewards by 10 where it does not whiten them. Advantages are always
   whitened here, which makes the policy's gradient independent of any such factor.
6. The length penalty is proportional to 896 tokens, the release's limit, whatever
   `--max_new_tokens` is: relative to a short limit it would over-penalise length.
7. A completion ends with end-of-sequence alone. The release also cuts it behind "?", after which it
   counts as one without an end: `--cut_at_question`.
8. The KL weighs 0.02, in the release 0.1: `--kl_coef 0.1`. There are 2 passes over the prompts, in
   the release 4: `--epochs 4`. CLAIMS.md (ppo, hacking) compares both.
9. The release first fine-tunes the policy: one epoch at 1e-4 on 10k LLaVA and 5k A-OKVQA
   conversations. Here: `--algo sft --epochs 1 --learning_rate 1e-4`, whose result is `--model` of
   the reward model and of PPO.
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithm import Data, Start
from config import option
from data import Batch
from rollouts import OnPolicy, RolloutConfig, Roles, Scored, make_roles

EXPLAINED, PATIENCE = 0.05, 4  # warn of a baseline that explains less, for so many rollouts

# -------------------------------------------------------------------------- the parts, as functions


def kl_estimate(logp: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Estimate KL(policy || reference) at each sampled token (Schulman 2020).

    Args:
        logp, reference: log-probabilities of the tokens, of any shape.
        estimator: "k1": log pi - log ref, unbiased, of either sign; "k1_clamped": the same clamped
            at 0 (release), biased upwards; "k3": exp(d) - 1 - d with d = log ref - log pi,
            unbiased and never negative.
    """
    difference = logp - reference
    if estimator == "k1_clamped":
        return difference.clamp(min=0)
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    return difference


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """Return -coefficient * kl at every token, plus the score at each completion's last one.

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
    """Estimate advantages by GAE (Schulman et al. 2015, arXiv 1506.02438, Eq. 16).

    Args:
        rewards, values: (N, T); padding, on the right, may have any value.
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


def sibling_mean(returns: Tensor, samples: int) -> Tensor:
    """Return the mean return of a prompt's other completions (RLOO, arXiv 2402.14740).

    Args:
        returns: (N,), the completions of a prompt side by side.
        samples: completions per prompt, at least 2.

    Returns:
        (N,), each entry independent of the completion's own return.
    """
    groups = returns.view(-1, samples)  # (P, k)
    return ((groups.sum(1, keepdim=True) - groups) / (samples - 1)).flatten()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Scale x to mean 0 and variance 1 where the mask (of x's shape) is True; 0 elsewhere."""
    inside = x[mask]
    spread = inside.var(correction=0)  # a single token has variance 0, not NaN
    return ((x - inside.mean()) * torch.rsqrt(spread + 1e-8)).masked_fill(~mask, 0.0)


def policy_loss(
    logp: Tensor, old: Tensor, advantages: Tensor, clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped surrogate objective (PPO, Eq. 7), negated: a loss.

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
    """Half the squared error; moving a value further than `clip` from its old one gains nothing.

    Args:
        values, old: (R,) now and at the rollout; returns: (R,).

    Returns:
        losses (R,), clipped (R,) bool.
    """
    near = old + (values - old).clamp(-clip, clip)
    unclipped, clipped = (values - returns).square(), (near - returns).square()
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over (R,); 1: perfect, 0: as good as a constant."""
    spread = returns.var(correction=0).item()
    return 1 - (returns - values).var(correction=0).item() / spread if spread > 0 else 0.0


def adaptive_kl_coef(
    coef: float, kl: float, target: float, completions: int, horizon: int
) -> float:
    """Adapt the KL coefficient to a rollout's mean KL, in nats (Ziegler et al. 2019, 2.2)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * completions / horizon)


# ------------------------------------------------------------------------------------ configuration


@dataclass
class PPOConfig(RolloutConfig):
    baseline: str = option("group", "what a return is compared with: the mean return of the other "
                           "completions of its prompt, or a critic's value (release)",
                           choices=("group", "critic"))
    critic_learning_rate: float | None = option(
        None, "peak learning rate of --baseline critic; default: the policy's (release)")
    kl_coef: float = option(0.02, "coefficient of the KL penalty (release: 0.1)")
    kl_estimator: str = option("k1_clamped", "of the penalty (release: k1_clamped, or k3)",
                               choices=("k1_clamped", "k1", "k3"))
    target_kl: float = option(0.0, "nats per completion that an adaptive kl_coef aims at; 0: fixed")
    kl_horizon: int = option(10000, "completions over which the adaptive kl_coef settles",
                             least=1)
    gamma: float = option(1.0, "discount (release)")
    lam: float = option(1.0, "GAE's lambda (release)")
    cliprange_value: float = option(0.2, "of the critic's values (release)")
    vf_coef: float = option(0.1, "of the critic's loss (release)")

    def __post_init__(self):
        super().__post_init__()
        if self.baseline == "group" and self.samples < 2:
            raise ValueError("--baseline group compares the completions of a prompt: --samples "
                             "should be at least 2 (or take --baseline critic)")


# ------------------------------------------------------------------------------------ the algorithm


@dataclass
class PPOBatch(Batch):
    """A batch of completions; each (R,), as it was when they were sampled."""

    old_logp: Tensor | None = None
    advantages: Tensor | None = None  # whitened
    old_values: Tensor | None = None  # only with a critic, like the returns
    returns: Tensor | None = None


class PPO(OnPolicy):
    """Train a policy on rewards by proximal policy optimisation (PPO)."""

    Config = PPOConfig
    Minibatch = PPOBatch

    def __init__(self, start: Start, config: PPOConfig, data: Data, roles: Roles | None = None):
        with_critic = config.baseline == "critic"
        super().__init__(start, config, data, roles or make_roles(start, config, with_critic))
        if with_critic:
            self.modules["critic"] = self.roles.critic
        self.kl_coef = config.kl_coef
        self.unexplained = 0  # consecutive rollouts whose baseline explained next to nothing

    def peak_rate(self, name: str) -> float:
        """Return the critic's own rate for its weights (with LoRA, an adapter in the policy)."""
        critic = name.startswith("critic.") or ".adapters.critic." in name
        own = self.config.critic_learning_rate if critic else None
        return self.config.learning_rate if own is None else own

    def loss(self, batch: PPOBatch) -> tuple[Tensor, dict[str, float]]:
        config = self.config
        logp = self.roles.policy.logp(batch, config.temperature)
        losses, clipped, kl = policy_loss(logp, batch.old_logp, batch.advantages, config.cliprange)
        loss = losses.mean()
        metrics = {
            "policy/loss": loss.item(), "policy/approxkl": kl.mean().item(),
            "policy/clipfrac": clipped.float().mean().item(),
            "padding": batch.padding, **self.rollout.metrics,
        }
        if self.roles.critic is not None:
            errors, clipped = value_loss(
                self.roles.critic(batch), batch.old_values, batch.returns, config.cliprange_value)
            loss = loss + config.vf_coef * errors.mean()
            metrics |= {"val/loss": errors.detach().mean().item(),
                        "val/clipfrac": clipped.float().mean().item()}
        return loss, metrics

    def credit(self, found: Scored) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the whitened advantage of every token, and the critic's targets."""
        config, mask, values = self.config, found.mask, found.values
        kl = kl_estimate(found.logp, found.reference, config.kl_estimator)
        rewards = shaped_rewards(found.scores, kl, mask, self.kl_coef)
        if values is None:
            values = sibling_mean(rewards.sum(1), config.samples)[:, None].expand_as(rewards)
        advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
        explained = explained_variance(values[mask], returns[mask])
        self.watch(explained)
        metrics = {"objective/kl_coefficient": self.kl_coef, "val/explained_variance": explained,
                   "objective/rlhf_reward": rewards.sum(1).mean().item()}
        if config.target_kl:
            mean = (found.logp - found.reference).sum(1).mean().item()
            self.kl_coef = adaptive_kl_coef(
                self.kl_coef, mean, config.target_kl, len(mask), config.kl_horizon)
        credited = {"old_logp": found.logp, "advantages": whiten(advantages, mask)}
        if self.roles.critic is not None:
            credited |= {"old_values": values, "returns": returns}
        return credited, metrics

    def watch(self, explained: float) -> None:
        """Warn of a baseline that has explained next to nothing for PATIENCE rollouts."""
        self.unexplained = self.unexplained + 1 if explained < EXPLAINED else 0
        if self.unexplained == PATIENCE:
            remedy = {"critic": "--baseline group needs no learning; or raise "
                                "--critic_learning_rate",
                      "group": "completions of one prompt are rewarded too differently for so few "
                               "to predict each other; raise --samples"}
            print(f"warning: val/explained_variance of --baseline {self.config.baseline} has been "
                  f"below {EXPLAINED} for {PATIENCE} rollouts; {remedy[self.config.baseline]}",
                  file=sys.stderr)

    def state(self) -> dict:
        return {"kl_coef": self.kl_coef, **super().state()}

    def load_state(self, state: dict) -> None:
        super().load_state(state)
        self.kl_coef = state["kl_coef"]
