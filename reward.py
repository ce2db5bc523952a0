"""What an answer is worth: a reward model learnt from ranked pairs, and rules that need no model.

The reward model is the supervised model with a scalar head (LLaVA-RLHF, arXiv 2309.14525). A
request to judge is appended to the answer; the reward is read at its last token, the last ":" of

    USER: <image>\\n{question} ASSISTANT: {answer} USER: Is this true? Facts: ...; ... . ASSISTANT:

*Factual augmentation* puts captions of the image into the request, shuffled, in training and in
use: the judge need not see better than the policy, only read. Two answers to a prompt are two
branches of one trunk, as everywhere here. With the score r of each, a ranked pair's loss is

    L = -log sigmoid(r_chosen - r_rejected) + c |mean(r_chosen + r_rejected)|

where the second term holds the scores near 0, since differences alone leave their level free.

What this file does differently from the released code (llava-rlhf/LLaVA-RLHF), and why:
1. The request is one short question instead of four criteria (accurate, helpful, natural, concise):
   the built-in judge has learnt to answer exactly this one.
2. The head starts as the difference of the vocabulary's rows for "Yes" and "No", so that the first
   reward is the model's own verdict and training corrects it; the released head starts from 0
   (`--head zero`).
3. The answer's end-of-sequence token is left out of what is judged, as it was in the judge's
   lessons; that an answer has no end is the business of a rule.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import metrics
from config import Training, option
from data import Batch, Epochs, Example, Response, Tokenizer, collate, judging_request, split
from files import open_file
from model import LLaVA, use_adapter
from preferences import Prompt, Ranked

HEAD = "reward_head.safetensors"  # beside the folder of the reward model's weights

# --------------------------------------------------------------------------------- the reward model


def pairwise_loss(chosen: Tensor, rejected: Tensor, centring: float = 1e-3) -> Tensor:
    """Bradley-Terry loss of P ranked pairs, with the release's centring term.

    Args:
        chosen, rejected: (P,) rewards of the better and of the worse answers.
        centring: weight of |mean(chosen + rejected)|, which holds the rewards near 0.

    Returns:
        Scalar, at least 0; log 2 where the rewards are all 0.
    """
    return -F.logsigmoid(chosen - rejected).mean() + centring * (chosen + rejected).mean().abs()


def judged(tokenizer: Tokenizer, answer: Sequence[int], facts: Sequence[str] = ()) -> Response:
    """An answer and the request to judge it, as a branch with one entry: where the verdict begins.

    Args:
        answer: its tokens; end-of-sequence is left out.
        facts: captions of the image, in the order in which the judge shall read them.
    """
    tokens = [token for token in answer if token != tokenizer.eos_token]
    tokens += tokenizer.encode(f"USER: {judging_request(facts)} ASSISTANT:")
    # The closing token is never read. It is there to be predicted: by the request's last token.
    return Response(tokens + [tokenizer.eos_token], [0.0] * len(tokens) + [1.0])


def shuffled(facts: Sequence[str], *seeds) -> list[str]:
    """The facts in an order that the seeds decide."""
    return Random(f"facts {seeds}").sample(facts, len(facts))


class Judge(nn.Module):
    """A LLaVA with a scalar head instead of the vocabulary: a reward model, or PPO's critic."""

    def __init__(self, model: LLaVA, adapter: str | None = None):
        """`adapter`: the one to compute with, over a base that others share; None: no adapter."""
        super().__init__()
        self.model, self.adapter = model, adapter
        weight = model.head.weight
        self.weight = nn.Parameter(torch.zeros(weight.shape[1], device=weight.device))  # (D,)
        self.bias = nn.Parameter(torch.zeros((), device=weight.device))

    def forward(self, batch: Batch) -> Tensor:
        """(R,) float32, one number for each of the batch's entries, read where it is predicted."""
        with use_adapter(self.model, self.adapter):
            hidden = self.model(batch.images, batch.tokens, batch.position, batch.branch)
        states = hidden.flatten(0, 1)[batch.source].float()  # (R, D)
        return (states * self.weight).sum(-1) + self.bias  # no matrix product: stays float32

    def start_from_verdict(self, tokenizer: Tokenizer) -> None:
        """The head becomes what the model itself has to say: log p(Yes) - log p(No)."""
        yes, no = (tokenizer.encode(word)[0] for word in ("Yes.", "No."))
        rows = self.model.head.weight.detach().float()
        with torch.no_grad():
            self.weight.copy_(rows[yes] - rows[no])


def judge_batch(
    model: LLaVA, tokenizer: Tokenizer,
    rows: Sequence[tuple[Prompt, Sequence[Sequence[int]]]], seeds: tuple,
) -> Batch:
    """Prompts with the tokens of their answers, each followed by the request, as one batch.

    All answers to a prompt are shown the facts in the same order, which `seeds` decide.
    """
    examples = []
    for prompt, answers in rows:
        facts = shuffled(prompt.facts, *seeds, prompt.name)
        responses = [judged(tokenizer, answer, facts) for answer in answers]
        examples.append(Example(prompt.name, prompt.image, prompt.tokens, responses))
    context = model.config.text.max_position_embeddings
    return collate(examples, model.config.pad_token, context)


@dataclass
class RMConfig(Training):
    learning_rate: float = option(3e-4, "peak learning rate (release, LoRA on 13B: 2e-5)")
    epochs: int = option(1, "passes over the pairs; one, since more overfit (release)")
    facts: bool = option(False, "factual augmentation: the judge is shown the image's captions")
    captions: str | None = option(None, "image_to_caption.json, for --facts with --data")
    centring: float = option(1e-3, "weight of |mean reward| in the loss (release)")
    head: str = option("verdict", "the scalar head starts from the rows of Yes and No, or from "
                       "zero (release)", choices=("verdict", "zero"))
    rankings: int = option(4000, "ranked pairs to collect on the built-in world (release: 10k)")
    noise: float = option(0.1, "how often the built-in world's annotator ranks wrongly")
    held_out: int = option(500, "pairs to measure agreement on; of own data a tenth at most")


class RewardModel:
    """Training on ranked pairs."""

    def __init__(
        self, judge: Judge, tokenizer: Tokenizer, config: RMConfig, seed: int, pairs: list[Ranked],
        held_out: list[Ranked], origin: dict[str, str],
    ):
        """`held_out` is what `measure` measures on; `origin` goes into the file (see `lineage`)."""
        self.judge, self.tokenizer, self.config, self.seed = judge, tokenizer, config, seed
        self.held_out, self.origin = held_out, origin
        if config.head == "verdict":
            judge.start_from_verdict(tokenizer)
        self.modules = nn.ModuleDict({"judge": judge})
        self.source = Epochs(pairs, config, seed, pair_length)
        self.steps = self.source.steps

    def batches(self, step: int) -> list[Batch]:
        pairs = sorted(self.source.examples(step), key=pair_length)
        return [
            pair_batch(self.judge.model, self.tokenizer, part, (self.seed, step))
            for part in split(pairs, self.config.micro_batch)
        ]

    def size(self, batch: Batch) -> int:
        return batch.groups // 2

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        rewards = self.judge(batch)  # (2 P,)
        chosen, rejected = rewards[0::2], rewards[1::2]
        margins = (chosen - rejected).detach()
        return pairwise_loss(chosen, rejected, self.config.centring), {
            "rewards/chosen": chosen.detach().mean().item(),
            "rewards/rejected": rejected.detach().mean().item(),
            "rewards/margins": margins.mean().item(),
            "rewards/accuracies": (margins > 0).float().mean().item(),
            "padding": batch.padding,
        }

    def measure(self) -> tuple[dict, list[dict]] | None:
        """Agreement with the held-out pairs; None if there are none."""
        if not self.held_out:
            return None
        return agreement(self.judge, self.tokenizer, self.held_out, self.config.micro_batch)

    def save(self, folder: Path) -> None:
        save_head(self.judge, folder, self.origin)


def pair_length(pair: Ranked) -> int:
    return len(pair.chosen) + len(pair.rejected)


def pair_batch(model: LLaVA, tokenizer: Tokenizer, pairs: Sequence[Ranked], seeds) -> Batch:
    rows = [(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs]
    return judge_batch(model, tokenizer, rows, seeds)


@torch.no_grad()
def agreement(
    judge: Judge, tokenizer: Tokenizer, pairs: Sequence[Ranked], batch_size: int = 64, seed: int = 0
) -> tuple[dict, list[dict]]:
    """How often the judge prefers the answer that was chosen; a tie counts half.

    Returns:
        {"agreement": {"value", "low", "high"}} with a 95 % bootstrap interval over the pairs, and
        one record per pair with both answers and rewards.
    """
    records, device = [], judge.weight.device
    for part in split(list(pairs), batch_size):
        batch = pair_batch(judge.model, tokenizer, part, (seed, "agreement")).to(device)
        rewards = judge(batch).view(-1, 2).tolist()
        for pair, (chosen, rejected) in zip(part, rewards):
            records.append({
                "name": pair.prompt.name, "question": pair.prompt.question,
                "chosen": tokenizer.decode(pair.chosen),
                "rejected": tokenizer.decode(pair.rejected), "rewards": [chosen, rejected]})
    both = torch.tensor([record["rewards"] for record in records], dtype=torch.float64)
    right = (both[:, 0] > both[:, 1]).double() + 0.5 * (both[:, 0] == both[:, 1])
    terms = {"agreement": [(1, right.numpy(), torch.ones(len(right)).double().numpy())]}
    return metrics.with_intervals(terms, seed), records


# --------------------------------------------------------------------------- rules, without a model


def symbolic_reward(text: str, truth: str | None) -> float:
    """Whether an answer to a question with a known truth is right, as the release scores it.

    Args:
        text: the answer.
        truth: "A".."D", the right option: 1 if the answer starts with "A." or contains "correct
            option is A.", else 0. "no": +0.5 for an answer that starts with "No", -0.5 for "Yes",
            else 0: saying yes to everything is the fault to be cured. "yes" and None: 0.
    """
    text = text.strip()
    if truth == "no":
        return 0.5 * text.startswith("No") - 0.5 * text.startswith("Yes")
    if truth in ("A", "B", "C", "D"):
        return float(text.startswith(f"{truth}.") or f"correct option is {truth}." in text)
    return 0.0


def length_penalty(length: int, longest: int, factor: float = 1.0, weight: float = 10.0) -> float:
    """-`weight` for an answer of the longest length, in proportion for shorter ones (release).

    Args:
        length: tokens of the answer.
        longest: tokens that cost the whole penalty.
        factor: the prompt's own scale (`length_bonus` in the files); 0: length is free.
        weight: the release's 10.
    """
    return -weight * factor * length / longest


def missing_end_penalty(ended: bool, penalty: float = -8.0) -> float:
    """The penalty for an answer without end-of-sequence, cut off at the length limit (release)."""
    return 0.0 if ended else penalty


class Scorer:
    """The reward of sampled answers: the reward model's score and the rules."""

    def __init__(self, judge: Judge, tokenizer: Tokenizer, config):
        """`config` is PPO's: facts, symbolic_bonus, length_penalty, longest, missing_end."""
        self.judge, self.tokenizer, self.config = judge, tokenizer, config

    @torch.no_grad()
    def __call__(
        self, rows: Sequence[tuple[Prompt, Sequence[Sequence[int]]]], seeds
    ) -> dict[str, Tensor]:
        """Parts of the reward, each (N,), all answers of all prompts one after another.

        Raises:
            ValueError: the reward model gave something that is no finite number.
        """
        config, parts = self.config, []
        for part in split(list(rows), config.micro_batch):
            batch = judge_batch(self.judge.model, self.tokenizer, part, seeds)
            parts.append(self.judge(batch.to(self.judge.weight.device)).cpu())
        model = torch.cat(parts)
        named = [prompt.name for prompt, answers in rows for _ in answers]
        bad = [name for name, ok in zip(named, model.isfinite().tolist()) if not ok]
        if bad:
            raise ValueError(
                f"the reward model gave NaN or infinity for {len(bad)} of {len(named)} answers (to "
                f"{', '.join(dict.fromkeys(bad[:8]))}); train it with a smaller --learning_rate")
        rules = [self.rules(prompt, answer) for prompt, answers in rows for answer in answers]
        symbolic, length, no_end = torch.tensor(rules).T
        return {"rm": model, "symbolic": symbolic, "length": length, "no_end": no_end}

    def rules(self, prompt: Prompt, answer: Sequence[int]) -> tuple[float, float, float]:
        config, ended = self.config, self.tokenizer.eos_token in answer
        text = self.tokenizer.decode(answer)
        return (
            config.symbolic_bonus * symbolic_reward(text, prompt.truth),
            length_penalty(
                len(answer), config.longest, prompt.length_factor, config.length_penalty),
            missing_end_penalty(ended, config.missing_end),
        )


# ----------------------------------------------------------------------------------- on the disk


def lineage(tokenizer: Tokenizer, base: str, facts: bool) -> dict[str, str]:
    """What a reward model must have in common with whatever uses it."""
    return {"tokenizer": hashlib.sha256(tokenizer.model_proto).hexdigest()[:16], "base": base,
            "facts": "with facts" if facts else "without facts"}


def save_head(judge: Judge, folder: Path, origin: dict[str, str]) -> None:
    """Write the scalar head; `origin` as `lineage` gives it. The model is saved as any model."""
    tensors = {name: getattr(judge, name).detach().cpu() for name in ("weight", "bias")}
    save_file(tensors, folder / HEAD, {"format": "pt", **origin})


def load_head(judge: Judge, folder: Path, origin: dict[str, str]) -> None:
    """Read the scalar head of the reward model in `folder`.

    Raises:
        FileNotFoundError, ValueError: there is none, or it was trained with another tokenizer, over
            another base, or the other way about facts.
    """
    if not (folder / HEAD).exists():
        raise FileNotFoundError(f"{folder}: no reward model ({HEAD} is missing); make one with "
                                "python train.py --algo rm")
    entries = open_file(folder / HEAD)
    found = entries["weight"].handle.metadata()
    for key, value in origin.items():
        if found.get(key) != value:
            raise ValueError(f"{folder}: a reward model for another {key} ({found.get(key)}, not "
                             f"{value}); train one with python train.py --algo rm")
    with torch.no_grad():
        for name, entry in entries.items():
            getattr(judge, name).copy_(entry.read())
