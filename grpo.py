"""GRPO: the policy learns from comparing its own completions of a prompt.

Group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300) is PPO without a critic and
with the KL penalty in the loss. Of the k completions y_i of a prompt, with rewards r_i:

    A_i  = (r_i - mean r) / (std r + 1e-4)                       the same for all tokens of y_i
    L    = - 1 / sum_i |y_i|  sum_i sum_t { min[rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i]
                                            - beta (exp(x_it) - x_it - 1) }
    rho  = pi / pi_old,   x = log ref - log pi

Rollouts, rewards, facts and logs are shared with PPO (rollouts.py), and so are the clipped
objective and the estimate of the KL (ppo.py).

What this file does differently from the paper, and why:
1. The loss is a mean over all tokens of a batch, as in DAPO (arXiv 2503.14476). The paper averages
   each answer first, so that a token of a long answer counts for less: `--loss_mean answers`.
2. Rewards are one number per completion ("outcome supervision"); there is no process reward.

For fixed samples, the gradient of this estimate of the KL is that of KL(ref || pi): it resists
unlearning what the reference often says. DAPO leaves the term out: `--kl_coef 0`. Dr. GRPO (arXiv
2503.20783) does not divide by the spread, because that gives prompts whose completions are rewarded
nearly alike as much weight as others: `--no-divide_by_std`.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from config import option
from data import Batch
from ppo import kl_estimate, policy_loss
from rollouts import OnPolicy, RolloutConfig, Scored

EPSILON = 1e-4  # added to the spread, as in TRL and verl


@dataclass
class GRPOConfig(RolloutConfig):
    kl_coef: float = option(0.04, "beta, weight of the KL in the loss (paper)")
    loss_mean: str = option("tokens", "the loss is a mean over all tokens of a batch (DAPO), or "
                            "over answers, each the mean of its tokens (paper)",
                            choices=("tokens", "answers"))
    divide_by_std: bool = option(True, "divide by the spread of a prompt's rewards (paper)")

    def __post_init__(self):
        super().__post_init__()
        if self.samples < 2:
            raise ValueError("GRPO compares the completions of a prompt: --samples should be at "
                             "least 2")


def group_advantages(scores: Tensor, samples: int, divide_by_std: bool = True) -> Tensor:
    """Compare each completion's reward with those of its siblings (GRPO, section 4.1.2).

    Args:
        scores: (N,) rewards, the completions of a prompt side by side.
        samples: completions per prompt, at least 2.
        divide_by_std: in units of their spread (n - 1 in the denominator, as in TRL and verl).

    Returns:
        (N,), with mean 0 for every prompt; 0 where all its completions have one reward.
    """
    groups = scores.view(-1, samples)  # (P, k)
    advantages = groups - groups.mean(1, keepdim=True)
    if divide_by_std:
        advantages = advantages / (groups.std(1, keepdim=True) + EPSILON)
    return advantages.flatten()


def answer_mean(losses: Tensor, group: Tensor, groups: int) -> Tensor:
    """Average (R,) losses over the tokens of each answer, then over answers: a scalar.

    Args:
        group: (R,) which answer each token belongs to, 0..groups-1.
    """
    zeros = losses.new_zeros(groups)
    total = zeros.index_add(0, group, losses)
    return (total / zeros.index_add(0, group, torch.ones_like(losses))).mean()


@dataclass
class GRPOBatch(Batch):
    """A batch of completions; each (R,), as it was when they were sampled."""

    old_logp: Tensor | None = None
    reference: Tensor | None = None  # log-probabilities
    advantages: Tensor | None = None


class GRPO(OnPolicy):
    """Train a policy on rewards by group relative policy optimisation (GRPO)."""

    Config = GRPOConfig
    Minibatch = GRPOBatch

    def credit(self, found: Scored) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the advantage of every completion, at each of its tokens."""
        samples = self.config.samples
        advantages = group_advantages(found.scores, samples, self.config.divide_by_std)
        spread = found.scores.view(-1, samples).std(1)
        credited = {"old_logp": found.logp, "reference": found.reference,
                    "advantages": advantages[:, None].expand_as(found.logp)}
        return credited, {"objective/score_spread": spread.mean().item(),
                          "objective/prompts_without_spread": (spread == 0).float().mean().item()}

    def size(self, batch: Batch) -> int:
        """Return the number of tokens or of answers, whichever the loss is a mean of."""
        return batch.groups if self.config.loss_mean == "answers" else super().size(batch)

    def loss(self, batch: GRPOBatch) -> tuple[Tensor, dict[str, float]]:
        config = self.config
        logp = self.roles.policy.logp(batch, config.temperature)
        losses, clipped, moved = policy_loss(
            logp, batch.old_logp, batch.advantages, config.cliprange)
        kl = kl_estimate(logp, batch.reference, "k3")
        mean = Tensor.mean if config.loss_mean == "tokens" else partial(
            answer_mean, group=batch.group, groups=batch.groups)
        return mean(losses + config.kl_coef * kl), {
            "policy/approxkl": mean(moved).item(), "policy/clipfrac": mean(clipped.float()).item(),
            "policy/kl": mean(kl.detach()).item(),
            "padding": batch.padding, **self.rollout.metrics,
        }
