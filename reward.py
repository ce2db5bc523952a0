"""The reward model: a model that scores an answer, trained on ranked pairs.

It is the supervised model with a scalar head (LLaVA-RLHF, arXiv 2309.14525). A request to rate is
appended to the answer; the reward is read at its last token, the last ":" of

    USER: <image>\\n{question} ASSISTANT: {answer} USER: Is this true? Facts: ...; ... . ASSISTANT:

*Factual augmentation* puts captions of the image into the request, in training and in use, so that
a reward model no better at seeing than the policy can still detect errors. Two answers to a prompt
are two branches of one trunk. With the score r of each, a ranked pair's loss is

    L = -log sigmoid(r_chosen - r_rejected) + c |mean(r_chosen + r_rejected)|

where the second term keeps the scores near 0: differences alone leave their level free.

What this file does differently from the released code (llava-rlhf/LLaVA-RLHF), and why:
1. The request is one short question instead of four criteria (accurate, helpful, natural, concise):
   the built-in reward model was initialised on exactly this one. `--request FILE` takes the
   release's (RLHF/prompts/fact_rlhf_reward_prompt.txt of a checkout), best with `--head zero`.
2. The head starts as the difference of the vocabulary's rows for "Yes" and "No", so that the first
   reward is the model's own verdict and training corrects it. In the released code the head's
   weights are random and its bias starts at 0 (`--head zero` starts both at 0).
3. The answer's end-of-sequence token is left out of the input, as in the initialisation (with
   `--request` it stays, as in the release). A rule penalises answers that do not end.
4. Captions are sorted, whatever their order in the file. The release shuffles them for every
   request; here their order alone was 21 % of the variance of the rewards.
5. The learning rate falls in a cosine; the release's is constant after 3 % of warm-up, and its
   published reward model is that of step 200. AdamW's betas are (0.9, 0.95), not (0.9, 0.999).
6. The mean of the centring term is taken over a forward pass of all processes; the release's, over
   that of one device. So where a step takes several passes, this term, and no other, depends on
   `--micro_batch` and the number of processes.
"""

import ast
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import parallel
import sharding
from algorithm import Algorithm, Data, Start
from config import Training, option
from data import (
    Batch, Epochs, Example, Response, collate_for, pair_tokens, reward_request, shared_batches,
)
from formats.adapters import load_adapter
from formats.checkpoint import load_llava
from formats.files import open_file, write_atomic, write_tensors
from formats.tokenizer import Tokenizer
from lora import use_adapter
from model import LLaVA

HEAD = "reward_head.safetensors"  # beside the folder of the reward model's weights
FACTS_LABELS = ("without facts", "with facts")
REQUEST = "request.txt"  # the same, if it is not the short one
FACTS = "{factual_prompt}"  # stands for the captions in a request's file
Row = tuple[Example, Sequence[Sequence[int]]]  # and the tokens of answers to it

# --------------------------------------------------------------------------------- the reward model


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, centring: float = 1e-3, level: float | None = None
) -> Tensor:
    """Bradley-Terry loss of P ranked pairs, with the release's centring term: a scalar.

    Args:
        chosen, rejected: (P,) rewards of the better and of the worse answers.
        centring: weight of |mean(chosen + rejected)|, which holds the rewards near 0.
        level: has the sign of that mean over a forward pass of all processes, of which these pairs
            may be a part; None: these are all.
    """
    mean = (chosen + rejected).mean()
    size = mean.abs() if level is None else mean * ((level > 0) - (level < 0))
    return -F.logsigmoid(chosen - rejected).mean() + centring * size


@cache
def read_request(path: str, facts: bool) -> str:
    """Read the release's request from a file; FACTS stands where the captions go, if it has any.

    The sentence that introduces them is FACTUAL_PROMPT in data_utils/constants.py of the same
    checkout, which is parsed and never run; a file elsewhere can contain it before FACTS.

    Raises:
        ValueError: the file does not exist, or has no place for the captions.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--request {path}: no such file")
    text, constants = file.read_text(encoding="utf-8").strip(), ""
    if facts and FACTS not in text:
        raise ValueError(f"--request {path}: has no {FACTS} where the captions should go")
    beside = file.parent.parent / "data_utils" / "constants.py"
    for node in ast.parse(beside.read_text(encoding="utf-8")).body if beside.exists() else ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FACTUAL_PROMPT":
            constants = ast.literal_eval(node.value)
    return text.replace(FACTS, constants + FACTS if facts else "")


def with_request(
    tokenizer: Tokenizer, answer: list[int], facts: Sequence[str], request: str = ""
) -> Response:
    """Make a branch of an answer and the request to rate it; its entry is the reward's place.

    Args:
        answer: its tokens; end-of-sequence is left out before the short request.
        facts: captions of the image, in any order.
        request: as `read_request` returns it; "": the short one.
    """
    if request:
        listed = "".join(f"  - {fact}\n" for fact in sorted(facts))
        tokens = list(answer) + tokenizer.encode(request.replace(FACTS, listed), image=False)
    else:
        tokens = [token for token in answer if token != tokenizer.eos_token]
        request = f"USER: {reward_request(sorted(facts))} ASSISTANT:"
        tokens += tokenizer.encode(request, image=False)
    # The request's last token predicts the closing one, which the model never reads.
    return Response(tokens + [tokenizer.eos_token], [0.0] * len(tokens) + [1.0])


class RewardModel(nn.Module):
    """LLaVA with a scalar head instead of the vocabulary's; also PPO's critic."""

    def __init__(self, model: LLaVA, adapter: str | None = None, request: str = ""):
        """`adapter`: of this model over a base that others share; `request`: see `with_request`."""
        super().__init__()
        self.model, self.adapter, self.request = model, adapter, request
        weight = model.head.weight
        self.weight = nn.Parameter(torch.zeros(weight.shape[1], device=weight.device))  # (D,)
        self.bias = nn.Parameter(torch.zeros((), device=weight.device))

    def forward(self, batch: Batch) -> Tensor:
        """Return (R,) float32: a scalar per entry of the batch, read at the token before it."""
        with use_adapter(self.model, self.adapter):
            states = self.model.response_states(batch).float()  # (R, D)
        return (states * self.weight).sum(-1) + self.bias  # no matrix product: stays float32

    def start_from_verdict(self, tokenizer: Tokenizer) -> None:
        """Set the head to the model's own verdict: log p(Yes) - log p(No)."""
        yes, no = (tokenizer.encode(word)[0] for word in ("Yes.", "No."))
        rows = sharding.whole(self.model.head.weight.detach()).float()
        with torch.no_grad():
            self.weight.copy_(rows[yes] - rows[no])


def reward_batch(reward_model: RewardModel, tokenizer: Tokenizer, rows: Sequence[Row]) -> Batch:
    """Collate examples with answers to each, every answer followed by the request."""
    examples = []
    for example, answers in rows:
        responses = [with_request(tokenizer, answer, example.facts, reward_model.request)
                     for answer in answers]
        examples.append(Example(example.name, example.image, example.prompt, responses))
    return collate_for(reward_model.model, examples)


@dataclass
class RMConfig(Training):
    learning_rate: float | None = option(
        None, "peak learning rate [1e-4, with --lora 3e-4; from 1B 1e-5 (Llama 2), 2e-5 (release)]")
    rates = {"small": 1e-4, "large": 1e-5, "small lora": 3e-4, "large lora": 2e-5}
    epochs: int = option(1, "passes over the pairs; one, since more overfit (release)")
    facts: bool = option(False, "factual augmentation: put the image's captions into the request")
    captions: str | None = option(None, "image_to_caption.json, for --facts with --data")
    request: str | None = option(None, "file of the request to rate (release: prompts/*.txt)")
    centring: float = option(1e-3, "weight of |mean reward| in the loss (release)")
    head: str = option("verdict", "the scalar head starts from the rows of Yes and No, or from "
                       "zero (release: random)", choices=("verdict", "zero"))
    rankings: int = option(4000, "ranked pairs to collect on the built-in world (release: 10k)")
    noise: float = option(0.1, "share of pairs that the built-in world's annotator ranks wrongly")
    held_out: int = option(500, "pairs to measure agreement on; at most a tenth of your own data")


class RewardTraining(Algorithm):
    """Train a reward model on ranked answers."""

    Config = RMConfig
    reads = "rankings"
    first = ("base", "rm_init")

    def __init__(self, start: Start, config: RMConfig, data: Data):
        self.tokenizer, self.config, self.seed = start.tokenizer, config, start.run.seed
        self.held_out = data.held_out
        self.provenance = provenance(start, config.facts)
        request = read_request(config.request, config.facts) if config.request else ""
        self.reward_model = RewardModel(
            start.model, "default" if start.run.lora else None, request)
        if config.head == "verdict":
            self.reward_model.start_from_verdict(start.tokenizer)
        self.modules = nn.ModuleDict({"reward_model": self.reward_model})
        self.source = Epochs(data.train, config, self.seed, pair_length)
        self.steps = self.source.steps

    @staticmethod
    def tokens(row, tokenizer: Tokenizer, patches: int, config: RMConfig):
        return pair_tokens(row, tokenizer, patches)

    @staticmethod
    def read_as(responses, facts, tokenizer: Tokenizer, config: RMConfig) -> list[Response]:
        request = read_request(config.request, config.facts) if config.request else ""
        return [with_request(tokenizer, each.tokens, facts, request) for each in responses]

    def batches(self, step: int) -> list[Batch]:
        make = partial(reward_batch, self.reward_model, self.tokenizer)
        pairs = sorted(self.source.examples(step), key=pair_length)
        return shared_batches(make, pair_rows(pairs), self.config.micro_batch)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        chosen, rejected = self.reward_model(batch).view(-1, 2).unbind(1)  # (P,) each
        margins = (chosen - rejected).detach()
        (level,) = parallel.total([(chosen + rejected).sum().item() * batch.counts])
        return pairwise_loss(chosen, rejected, self.config.centring, level), {
            "rewards/chosen": chosen.detach().mean().item(),
            "rewards/rejected": rejected.detach().mean().item(),
            "rewards/margins": margins.mean().item(),
            "rewards/accuracies": (margins > 0).float().mean().item(),
            "padding": batch.padding,
        }

    def measure(self, world: Callable, means: Callable) -> tuple[dict, list[dict]] | None:
        if not self.held_out:
            return None
        records = rate_pairs(
            self.reward_model, self.tokenizer, self.held_out, self.config.micro_batch)
        return means({"agreement": agreement(records)}), records

    def save(self, folder: Path) -> None:
        save_head(self.reward_model, folder, self.provenance)
        if request := self.reward_model.request:
            parallel.once(lambda: write_atomic(folder / REQUEST, request))


def pair_length(example: Example) -> int:
    return sum(len(response.tokens) for response in example.responses)


def pair_rows(examples: Sequence[Example]) -> list[Row]:
    return [(each, [response.tokens for response in each.responses]) for each in examples]


@torch.no_grad()
def rate(
    reward_model: RewardModel, tokenizer: Tokenizer, rows: Sequence[Row], size: int
) -> Tensor:
    """Return (N,) float32 rewards of the rows' answers, in order; `size` rows at a time."""
    def part(rows: Sequence[Row]) -> Tensor:
        batch = reward_batch(reward_model, tokenizer, rows)
        return reward_model(batch.to(reward_model.weight.device)).cpu()

    return parallel.by_length(part, rows, size, slots, entries=lambda row: len(row[1]))


def slots(row: Row) -> int:
    """Count the tokens of an example's prompt and of the answers to it."""
    return len(row[0].prompt) + sum(map(len, row[1]))


def rate_pairs(
    reward_model: RewardModel, tokenizer: Tokenizer, examples: Sequence[Example],
    batch_size: int = 64,
) -> list[dict]:
    """Return a record per ranked pair: question, both answers, their rewards [chosen, rejected]."""
    records = []
    rewards = rate(reward_model, tokenizer, pair_rows(examples), batch_size).view(-1, 2)
    for example, pair in zip(examples, rewards.tolist()):
        chosen, rejected = (tokenizer.decode(r.tokens) for r in example.responses)
        records.append({"name": example.name, "question": example.question,
                        "chosen": chosen, "rejected": rejected, "rewards": pair})
    return records


def agreement(records: Sequence[dict]) -> np.ndarray:
    """Return (N,): 1 where the chosen answer has the higher reward, 1/2 for a tie, else 0."""
    rewards = np.array([record["rewards"] for record in records])
    return (np.sign(rewards[:, 0] - rewards[:, 1]) + 1) / 2


# ----------------------------------------------------------------------------------- on the disk


def provenance(start: Start, facts: bool) -> dict[str, str]:
    """Return what a reward model and a policy that uses it must have in common."""
    return {"tokenizer": hashlib.sha256(start.tokenizer.model_proto).hexdigest()[:16],
            "base": start.base, "facts": FACTS_LABELS[facts], "image_mode": start.images.mode}


def save_head(reward_model: RewardModel, folder: Path, provenance: dict[str, str]) -> None:
    """Write the scalar head; `provenance` as the function returns it."""
    tensors = {name: getattr(reward_model, name).detach().cpu() for name in ("weight", "bias")}
    metadata = {"format": "pt", **provenance}
    parallel.once(lambda: write_tensors(folder / HEAD, tensors, metadata))


def require_head(folder: Path) -> None:
    """Raise FileNotFoundError if the folder holds no reward model that can be read."""
    if (folder / "reward_head").exists() and not (folder / HEAD).exists():
        raise FileNotFoundError(
            f"{folder}: the release's reward_head is a pickle; convert it there: python -c 'import "
            "torch, safetensors.torch as s; s.save_file(torch.load(\"reward_head\", "
            f"weights_only=True), \"{HEAD}\")'")
    if not (folder / HEAD).exists():
        raise FileNotFoundError(f"{folder}: no reward model ({HEAD} is missing); make one with "
                                "python train.py --algo rm")


def load_head(
    reward_model: RewardModel, folder: Path, provenance: dict[str, str]
) -> dict[str, str]:
    """Read the scalar head and the request in `folder`; check and return the provenance.

    A published head has none.

    Raises:
        ValueError: it belongs to another tokenizer or base, or was trained with other use of facts
            or on pictures cut otherwise.
    """
    tensors, found = open_file(folder / HEAD)
    for key, value in provenance.items() if "base" in found else ():
        if (was := found.get(key, value)) == value:  # older files have no image_mode
            continue
        advice = {"facts": f"{was}; {'leave out' if value == 'with facts' else 'add'} --facts",
                  "image_mode": f"with --image_mode {was}; add it"}.get(key)
        if advice:
            raise ValueError(f"{folder}: a reward model trained {advice}, or train one with "
                             "python train.py --algo rm")
        raise ValueError(f"{folder}: a reward model for another {key} ({was}, not {value}); train "
                         "one with python train.py --algo rm, for --reward_model, or delete the "
                         "folder if it was made before the base")
    sizes = {name: getattr(reward_model, name).numel() for name in ("weight", "bias")}
    if {name: tensor.numel() for name, tensor in tensors.items()} != sizes:
        raise ValueError(f"{folder / HEAD}: not a head of {sizes['weight']} weights and a bias")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own = getattr(reward_model, name)
            own.copy_(tensor.view_as(own))  # the release's are (1, D) and (1,)
    request = folder / REQUEST
    reward_model.request = request.read_text(encoding="utf-8") if request.exists() else ""
    return found


def load_reward_model(
    start: Start, folder: Path, facts: bool, adapter: str | None = None
) -> RewardModel:
    """Load the reward model of a finished run.

    Args:
        facts: whether it is given facts; it must have been trained the same way.
        adapter: load it as an adapter of this name over `start.model`; None: as its own model.
    """
    require_head(folder)
    if adapter and not (folder / "adapter").exists():
        raise ValueError(f"{folder}: a reward model without adapter; with --lora train it with "
                         "--lora too")
    if adapter:
        load_adapter(start.model, folder / "adapter", adapter)
        reward_model = RewardModel(start.model, adapter)
    else:
        reward_model = RewardModel(load_llava(folder / "model", start.device, torch.float32)[0])
    load_head(reward_model, folder, provenance(start, facts))
    return reward_model
