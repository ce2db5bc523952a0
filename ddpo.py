"""DPO and DDPO: learning from corrected answers without a reward model.

A person has corrected the hallucinated segments of the model's own answer. The corrected answer is
`chosen`, the original one `rejected`. DPO (Rafailov et al. 2023, arXiv 2305.18290) raises the
likelihood of the one against the other, each measured against a frozen reference (Eq. 3 of RLHF-V,
arXiv 2312.00849):

    L = -log sigmoid( beta * [ (s_pi(y_w) - s_ref(y_w)) - (s_pi(y_l) - s_ref(y_l)) ] )

What differs between the two is the score s(y) of a response:

    DPO   (Eq. 4)   s(y) = sum over all tokens of log p
    DDPO  (Eq. 5)   s(y) = 1/N [ sum over unchanged tokens of log p
                                 + gamma * sum over corrected tokens of log p ],
                    N = |unchanged| + gamma |corrected|,  gamma > 1

so that the few tokens where a person changed something carry most of the gradient.

What this file does differently from the released code (RLHF-V/RLHF-V), and why:
1. The defaults are the paper's (beta 0.5, gamma 5, mean form); the released command used beta 0.1,
   gamma 1.1 and the sum: `--beta 0.1 --gamma 1.1 --no-normalize`.
2. A segment that was only inserted or deleted counts as corrected, as Eq. 5 says. The released code
   keeps replacements alone: `--replacements_only`.
3. The reference's scores are computed once, before the first step, and not at every step.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Training, option
from data import Batch, Epochs, Example, collate, row_length, split
from model import LLaVA


def response_scores(
    logp: Tensor, weight: Tensor, group: Tensor, groups: int, normalize: bool = True
) -> Tensor:
    """Segment-weighted log-probability of each response (RLHF-V, Eq. 5; Eq. 4 for weights of 1).

    Args:
        logp: (R,) log-probabilities of response tokens, all responses one after another.
        weight: (R,) gamma in corrected segments, 1 elsewhere.
        group: (R,) which response each token belongs to, 0..groups-1.
        groups: number of responses G.
        normalize: divide by the sum of the weights, the N of Eq. 5.

    Returns:
        (G,) scores, differentiable in `logp`.
    """
    zeros = logp.new_zeros(groups)
    score = zeros.index_add(0, group, logp * weight)
    return score / zeros.index_add(0, group, weight) if normalize else score


def preference_loss(
    policy_chosen: Tensor, policy_rejected: Tensor,
    ref_chosen: Tensor, ref_rejected: Tensor, beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The DPO loss (RLHF-V, Eq. 3) from the scores of P pairs.

    Args:
        policy_chosen, policy_rejected, ref_chosen, ref_rejected: (P,) scores.
        beta: strength of the tie to the reference.

    Returns:
        losses (P,); chosen_rewards and rejected_rewards (P,), the implicit rewards
        beta * (s_pi - s_ref), detached.
    """
    chosen_rewards = beta * (policy_chosen - ref_chosen)
    rejected_rewards = beta * (policy_rejected - ref_rejected)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def response_states(model: LLaVA, batch: Batch) -> Tensor:
    """Hidden states (R, D) that predict the responses' tokens; no others meet the vocabulary."""
    hidden = model(batch.images, batch.tokens, batch.position, batch.branch)  # (B, T, D)
    return hidden.flatten(0, 1)[batch.source]


def batch_scores(model: LLaVA, batch: Batch, normalize: bool) -> Tensor:
    """Scores (G,) of every response in the batch."""
    logp = model.head(response_states(model, batch), batch.target)
    return response_scores(logp, batch.weight, batch.group, batch.groups, normalize)


def pair_loss(
    model: LLaVA, batch: Batch, beta: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean loss, chosen and rejected rewards (P,), scores (2P,) of a batch of pairs.

    What `preference_loss` makes of `batch_scores`, fused: the (R, vocabulary) logits are never in
    memory (`kernels.ddpo_loss`).
    """
    return model.head(
        response_states(model, batch), batch.target, segment_weight=batch.weight,
        group=batch.group, reference=batch.reference, beta=beta, normalize=normalize,
    )


@dataclass
class DDPOConfig(Training):
    learning_rate: float = option(1e-5, "peak learning rate (paper, 7B and up: 5e-7)")
    beta: float = option(0.5, "strength of the tie to the reference (paper; release: 0.1)")
    gamma: float = option(5.0, "weight of corrected segments (paper; release: 1.1; 1: no segments)")
    normalize: bool = option(True, "scores are means (Eq. 5), not sums (Eq. 4, and the release)")
    min_match: int = option(3, "a common run of fewer tokens counts as corrected (release)")
    replacements_only: bool = option(False, "insertions and deletions keep weight 1 (release)")


@dataclass
class DPOConfig(DDPOConfig):
    beta: float = option(0.1, "strength of the tie to the reference (DPO's own code)")
    gamma: float = option(1.0, "weight of corrected segments; DPO has none")
    normalize: bool = option(False, "scores are sums (Eq. 4)")


class DDPO:
    """DPO and DDPO on preference pairs; the two differ by their configuration only."""

    def __init__(self, model: LLaVA, config: DDPOConfig, seed: int, examples: list[Example]):
        """`examples` carry two responses each, chosen first, and the reference's scores of both."""
        self.model, self.config = model, config
        self.modules = nn.ModuleDict({"model": model})
        self.source = Epochs(examples, config, seed)
        self.steps = self.source.steps

    def batches(self, step: int) -> list[Batch]:
        return make_batches(self.model, self.source.examples(step), self.config.micro_batch)

    def size(self, batch: Batch) -> int:
        return batch.groups // 2

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        loss, chosen_rewards, rejected_rewards, scores = pair_loss(
            self.model, batch, self.config.beta, self.config.normalize
        )
        margins = chosen_rewards - rejected_rewards
        metrics = {
            "rewards/chosen": chosen_rewards.mean(),
            "rewards/rejected": rejected_rewards.mean(),
            "rewards/margins": margins.mean(),
            "rewards/accuracies": (margins > 0).float().mean(),
            "logps/chosen": scores[0::2].mean(),
            "logps/rejected": scores[1::2].mean(),
        }
        values = torch.stack(list(metrics.values())).tolist()  # one wait for the device
        return loss, dict(zip(metrics, values)) | {"padding": batch.padding}


def make_batches(model: LLaVA, examples: list[Example], size: int) -> list[Batch]:
    """Micro-batches of `size` rows; rows of like length together, so that little is padding."""
    context = model.config.text.max_position_embeddings
    ordered = sorted(examples, key=row_length)
    return [collate(part, model.config.pad_token, context) for part in split(ordered, size)]


@torch.no_grad()
def reference_scores(
    model: LLaVA, examples: list[Example], config: DDPOConfig, device, progress=iter
) -> list[list[float]]:
    """The frozen model's score of both responses of every pair, [chosen, rejected] each.

    Computed once and kept: what the usual trainers do at every step costs a third of their time.
    """
    scores = {}
    for part in progress(split(sorted(examples, key=row_length), config.micro_batch)):
        for batch in make_batches(model, part, config.micro_batch):
            values = batch_scores(model, batch.to(device), config.normalize).view(-1, 2).tolist()
            scores.update(zip(batch.names, values))
    return [scores[example.name] for example in examples]
