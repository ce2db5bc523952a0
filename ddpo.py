"""DPO and DDPO: learning from corrected answers without a reward model.

A person has corrected the hallucinated segments of the model's own answer. The corrected answer is
`chosen`, the original one `rejected`. DPO (Rafailov et al. 2023, arXiv 2305.18290) raises the
likelihood of chosen against rejected, each measured against a frozen reference (Eq. 3 of RLHF-V,
arXiv 2312.00849):

    L = -log sigmoid( beta * [ (s_pi(y_w) - s_ref(y_w)) - (s_pi(y_l) - s_ref(y_l)) ] )

DPO and DDPO differ in the score s(y) of a response:

    DPO   (Eq. 4)   s(y) = sum over all tokens of log p
    DDPO  (Eq. 5)   s(y) = 1/N [ sum over unchanged tokens of log p
                                 + gamma * sum over corrected tokens of log p ],
                    N = |unchanged| + gamma |corrected|,  gamma > 1

so that the few tokens that a person changed carry most of the gradient.

Both losses also fall when both responses become less likely, as long as their distance grows.
`--anchor` alpha adds a likelihood term on the chosen response, as the supervised loss of the
released code (its `SFT_weight`) and RPO (arXiv 2404.19733) do:

    L + alpha * mean over the chosen response's tokens of -log p

`--anchor 0` is the paper's loss to the letter, with its beta of 0.5. The defaults were chosen on
the built-in world (CLAIMS.md). Means of log-probabilities differ by little, so with beta 0.5 the
sigmoid hardly saturates there: `rewards/margins` ends near 0.25, and every pair pushes at nearly
full strength until the last step. With beta 5 a pair counts less once it is told apart.

What this file does differently from the released code (RLHF-V/RLHF-V), and why:
1. Gamma 5 and the mean are the paper's, whose beta is 0.5; the released command used beta 0.1,
   gamma 1.1 and the sum: `--anchor 0 --beta 0.1 --gamma 1.1 --no-normalize`.
2. Inserted and deleted segments count as corrected, as Eq. 5 says. The released code counts only
   replacements: `--replacements_only`.
3. The diff covers only the answers; the released code diffs prompt and answer together. So where
   both answers begin with the same one or two tokens, as in "The image", these count as corrected
   here. difflib's "autojunk", which the release leaves on, is off: it skips frequent tokens.
4. AdamW's betas are (0.9, 0.95), the release's (0.9, 0.999): `--adam_beta2 0.999`. There are 3
   passes over the data, in the paper 7: `--epochs 7` (CLAIMS.md compares them).
5. With `--lora` the learning rate of a model of 1B and more is 2e-4 and alpha twice the rank, as in
   LLaVA-1.5's own LoRA recipe; the papers train DDPO without LoRA.
Like the released code, it computes the reference's scores once, before the first step.

The loss is `DDPO.loss`, in plain PyTorch. `--fused on` (the default on a GPU) computes the same
numbers in `kernels.ddpo_loss`, which never holds the (R, vocabulary) logits; a test compares both.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
import parallel
from algorithm import Algorithm, Data, Start
from config import Corrected, Training, option
from data import Batch, Epochs, Example, collate_for, micro_batches, pair_tokens, row_length
from formats.checkpoint import fingerprint
from formats.files import read_json, write_atomic
from formats.runs import read_replaced
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


def anchor_loss(logp: Tensor, group: Tensor, groups: int) -> Tensor:
    """Negative log-likelihood per token of the chosen responses, mean over pairs (RPO, Eq. 1 of
    arXiv 2404.19733).

    Args:
        logp, group, groups: as in `response_scores`, chosen responses at even places.
    """
    return -response_scores(logp, torch.ones_like(logp), group, groups)[0::2].mean()


@dataclass
class LossConfig(Training):
    """Options of the loss."""

    learning_rate: float | None = option(
        None, "peak learning rate [3e-4, with --lora 3e-3; without an anchor 1e-5, 1e-3; of a "
        "model of 1B and more 5e-7 (paper), with --lora 2e-4]")
    beta: float | None = option(None, "strength of the tie to the reference [5; without an anchor "
                                "0.5 (paper), of sums 0.1 (release)]")
    gamma: float = option(5.0, "weight of corrected segments (paper; release: 1.1; 1: no segments)")
    normalize: bool = option(True, "scores are means (Eq. 5), not sums (Eq. 4, and the release)")
    anchor: float = option(16.0, "weight of the likelihood term on the chosen response (RPO, "
                           "arXiv 2404.19733); the paper has none")
    min_match: int = option(3, "a common run of fewer tokens counts as corrected (release)")
    replacements_only: bool = option(False, "insertions and deletions keep weight 1 (release)")
    fused: str = option("auto", "compute the loss in the fused kernel, the same numbers without "
                        "the logits in memory; auto: on a GPU", choices=("auto", "on", "off"))

    def __post_init__(self):
        if self.beta is None:
            self.beta = 0.1 if not self.normalize else 5.0 if self.anchor else 0.5
        if self.beta == 0:
            raise ValueError("--beta should be above 0")

    @property
    def rates(self) -> dict[str, float]:
        # Without an anchor larger rates cost coverage (CLAIMS.md, methods).
        return Training.rates | ({"small": 3e-4, "small lora": 3e-3} if self.anchor else {})


@dataclass
class DDPOConfig(LossConfig, Corrected):
    """Options of the loss and of the corrections."""


@dataclass
class DPOConfig(DDPOConfig):
    anchor: float = option(0.0, "weight of the likelihood term on the chosen response")
    gamma: float = option(1.0, "weight of corrected segments; DPO has none")
    normalize: bool = option(False, "scores are sums (Eq. 4)")


@dataclass
class PreferenceBatch(Batch):
    """Pairs, chosen at even groups and rejected at odd ones."""

    reference: Tensor | None = None  # (G,) the frozen reference's scores


class DDPO(Algorithm):
    """Align with corrected segments by dense direct preference optimisation (DDPO)."""

    Config = DDPOConfig

    def __init__(self, start: Start, config: DDPOConfig, data: Data, reference: dict | None = None):
        """`reference` holds scores as `reference_scores` gives them; None: to be computed here."""
        self.model, self.config = start.model, config
        self.modules = nn.ModuleDict({"model": self.model})
        self.source = Epochs(data.train, config, start.run.seed)
        self.steps = self.source.steps
        self.fused = config.fused == "on" or config.fused == "auto" and start.device.type == "cuda"
        self.reference = reference_scores(start, config, data) if reference is None else reference

    @staticmethod
    def tokens(row, tokenizer, patches: int, config: DDPOConfig):
        return pair_tokens(
            row, tokenizer, patches, config.gamma, config.min_match, config.replacements_only)

    def batches(self, step: int) -> list[PreferenceBatch]:
        batches = micro_batches(self.model, self.source.examples(step), self.config.micro_batch)
        return [
            PreferenceBatch(**vars(batch), reference=torch.tensor(
                [score for name in batch.names for score in self.reference[name]]))
            for batch in batches
        ]

    def loss(self, batch: PreferenceBatch) -> tuple[Tensor, dict[str, float]]:
        beta, normalize, anchor = self.config.beta, self.config.normalize, self.config.anchor
        if self.fused:
            loss, chosen_rewards, rejected_rewards, scores = self.model.head(
                self.model.response_states(batch),
                partial(kernels.ddpo_loss, bounds=batch.bounds), batch.target, batch.weight,
                batch.group, batch.reference, beta, normalize, anchor)
        else:
            logp = self.model.response_logp(batch)  # (R,)
            scores = response_scores(logp, batch.weight, batch.group, batch.groups, normalize)
            losses, chosen_rewards, rejected_rewards = preference_loss(
                scores[0::2], scores[1::2], batch.reference[0::2], batch.reference[1::2], beta)
            loss = losses.mean() + anchor * anchor_loss(logp, batch.group, batch.groups)
        margins = chosen_rewards - rejected_rewards
        metrics = {
            "rewards/chosen": chosen_rewards.mean(),
            "rewards/rejected": rejected_rewards.mean(),
            "rewards/margins": margins.mean(),
            "rewards/accuracies": (margins > 0).float().mean(),
            "logps/chosen": scores[0::2].detach().mean(),
            "logps/rejected": scores[1::2].detach().mean(),
        }
        values = torch.stack(list(metrics.values())).tolist()  # waits for the device once
        return loss, dict(zip(metrics, values)) | {"padding": batch.padding}


class DPO(DDPO):
    """Align with ranked or corrected answers by direct preference optimisation (DPO)."""

    Config = DPOConfig


def reference_scores(start: Start, config: DDPOConfig, data: Data) -> dict[str, list[float]]:
    """The frozen reference's scores [chosen, rejected] of every pair, by the pair's name.

    The reference is the model before its first step. Its scores are computed once, under the
    autocast of training, and kept in the run's folder: computed at every step, as usual trainers
    do, they would take a third of the time. A run that replaces one with the same pairs takes its
    scores. Several processes compute a share each.

    Raises:
        ValueError: the folder holds scores of another model, other data or settings; or a score
            is not finite.
    """
    key = (f"{fingerprint(start.model)} {data.digest()} normalize={config.normalize} "
           f"bfloat16={start.bfloat16} {start.model.head.weight.dtype}")
    path = start.folder / "reference.json"
    saved = parallel.once(lambda: read_json(path) if path.exists() else None)
    if saved and saved.get("key") != key:
        raise ValueError(f"{path} belongs to another model, other data or settings; delete it")
    saved = saved or parallel.once(lambda: read_replaced(path))
    if saved.get("key") == key:
        scores = saved["scores"]
    else:
        scores = pair_scores(start.model, data.train, start, config, "reference")
    parallel.once(lambda: write_atomic(path, {"key": key, "scores": scores}))
    return scores


@torch.no_grad()
def pair_scores(
    model: LLaVA, pairs: list[Example], start: Start, config: DDPOConfig, progress: str = ""
) -> dict[str, list[float]]:
    """Scores [chosen, rejected] of pairs by their names, under the autocast of training."""
    def score(part: list[Example]) -> list[tuple[str, list[float]]]:
        batch = collate_for(model, part).to(start.device)
        with start.autocast():
            logp = model.response_logp(batch)
        values = response_scores(logp, batch.weight, batch.group, batch.groups, config.normalize)
        return list(zip(batch.names, values.view(-1, 2).tolist()))

    rows = sorted(pairs, key=row_length)
    found = parallel.in_parts(score, rows, config.micro_batch, progress)
    scores = dict(chain.from_iterable(found))
    if bad := [name for name, pair in scores.items() if not all(map(math.isfinite, pair))]:
        raise ValueError(f"the model's log-probabilities are not finite for {len(bad)} rows "
                         f"({', '.join(bad[:8])}); leave these out, or use --dtype float32")
    return scores
