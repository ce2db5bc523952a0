"""The reward of a completion: the reward model's score, and the release's rules without a model.

    reward = score of the reward model
             + symbolic bonus (a right option, a rightly denied object)
             + length penalty + penalty for a missing end-of-sequence token

The rules and their constants are those of LLaVA-RLHF (arXiv 2309.14525) and its code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from algorithm import Start
from config import option
from data import Example, trunk_tokens
from formats.checkpoint import load_llava
from formats.files import open_file
from formats.rows import DataError, in_file, open_image
from formats.tokenizer import Tokenizer
from generation import image_features
from reward import FACTS_LABELS, HEAD, RewardModel, Row, load_head, rate, require_head, with_request
from vision import ImageSettings


@dataclass
class SamplingConfig:
    """Options of algorithms that sample completions and score them, beside those of `Training`."""

    prompts: int = option(2000, "prompts to make on the built-in world")
    samples: int = option(4, "completions per prompt", least=1)
    generate_batch: int = option(64, "prompts decoded at a time", least=1)
    max_new_tokens: int = option(128, "completions are cut off here (release: 896)", least=1)
    temperature: float = option(
        1.0, "of sampling and of all log-probabilities (release)", least=0.01)
    cut_at_question: bool = option(
        False, "cut completions behind their first '?', so that they do not end (release)")
    reward_model: str | None = option(None, "folder of a run of --algo rm, of any base")
    facts: bool = option(False, "give the reward model the image's captions")
    captions: str | None = option(None, "image_to_caption.json, for --facts with --data")
    symbolic_bonus: float = option(2.0, "scales the reward of right options, yes and no (release)")
    length_penalty: float = option(10.0, "for a completion of --length_penalty_tokens (release)")
    length_penalty_tokens: int = option(
        896, "tokens that cost the whole length penalty (release)", least=1)
    missing_eos_penalty: float = option(
        -8.0, "for a completion without end-of-sequence (release)", least=-float("inf"))


def symbolic_reward(text: str, truth: str | None) -> float:
    """Score an answer to a question with a known truth as the release does.

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


@dataclass
class Judge:
    """A reward model with its own tokenizer and image settings.

    It reads texts and pictures, so the model that wrote the texts may have another base.
    """

    reward_model: RewardModel
    tokenizer: Tokenizer
    images: ImageSettings
    facts: bool | None  # whether it was trained with captions; None: unknown

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return (N, patches, D_vision) of its own tower."""
        return image_features(self.reward_model.model, self.images, pictures)

    def rate(
        self, questions: Sequence[str], features: Tensor, answers: Sequence[Sequence[str]],
        facts: Sequence[Sequence[str]], batch_size: int,
    ) -> Tensor:
        """Return rewards (N,) of answers to each question about an image, one after another.

        Args:
            features: (Q, patches, D_vision) as `features` computes them.
            facts: captions of each image; left out if it was trained without.
        """
        patches, rows = self.reward_model.model.config.vision.patches, []
        for i, question in enumerate(questions):
            prompt = trunk_tokens(self.tokenizer, (), question, patches)
            example = Example(f"question {i + 1}", features[i].cpu(), prompt, question=question,
                              facts=facts[i] if self.facts else ())
            rows.append((example, [self.tokenizer.encode(text, eos=True, image=False)
                                   for text in answers[i]]))
        return rate(self.reward_model, self.tokenizer, rows, batch_size)

    def rate_completions(
        self, rows: Sequence[Row], tokenizer: Tokenizer, batch_size: int
    ) -> Tensor:
        """Rate the completions of a policy with a tokenizer of its own."""
        examples = [example for example, _ in rows]
        pictures = {}
        for i in sorted(range(len(examples)), key=lambda i: in_file(examples[i].source)):
            pictures[i] = open_image(examples[i].name, examples[i].source)
        features = self.features([pictures[i] for i in range(len(examples))])
        texts = [[tokenizer.decode(tokens).strip() for tokens in answers] for _, answers in rows]
        return self.rate([each.question for each in examples], features, texts,
                         [each.facts for each in examples], batch_size)


def load_judge(folder: Path, device: torch.device, facts: bool | None = None) -> Judge:
    """Load the reward model of a finished run, or a published one, independent of a policy.

    Args:
        folder: has the merged weights in `model`, the head, and the request unless it is ours.
        facts: whether it is given captions; None: as it was trained.

    Raises:
        ValueError: it was trained the other way.
    """
    require_head(folder)
    dtype = torch.float32 if device.type == "cpu" else None
    model, tokenizer, images = load_llava(folder / "model", device, dtype)
    reward_model = RewardModel(model.requires_grad_(False))
    wanted = {} if facts is None else {"facts": FACTS_LABELS[facts]}
    trained = load_head(reward_model, folder, wanted).get("facts")
    return Judge(reward_model, tokenizer, images,
                 facts if trained is None else trained == FACTS_LABELS[True])


def has_own_base(folder: Path, start: Start) -> bool:
    """Return whether a reward model has another base than the policy, or an unknown one."""
    require_head(folder)
    return open_file(folder / HEAD)[1].get("base") != start.base


class Scorer:
    """The reward of completions: the reward model's score and the rules."""

    def __init__(
        self, reward_model: RewardModel | Judge, tokenizer: Tokenizer, config: SamplingConfig
    ):
        self.reward_model, self.tokenizer, self.config = reward_model, tokenizer, config

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return the parts of the reward, each (N,), of the examples' completions in order.

        Raises:
            ValueError: the reward model returned NaN or infinity.
        """
        size = self.config.micro_batch
        if isinstance(self.reward_model, Judge):
            scores = self.reward_model.rate_completions(rows, self.tokenizer, size)
        else:
            scores = rate(self.reward_model, self.tokenizer, rows, size)
        names = [example.name for example, completions in rows for _ in completions]
        bad = [name for name, finite in zip(names, scores.isfinite().tolist()) if not finite]
        if bad:
            raise ValueError(
                f"the reward model gave NaN or infinity for {len(bad)} of {len(names)} answers (to "
                f"{', '.join(dict.fromkeys(bad[:8]))}); train it with a smaller --learning_rate")
        rules = [self.rules(example, each) for example, completions in rows for each in completions]
        symbolic, length, no_end = torch.tensor(rules).T
        return {"rm": scores, "symbolic": symbolic, "length": length, "no_end": no_end}

    def check_room(self, examples: Sequence[Example]) -> None:
        """Raise DataError if a prompt, a completion and the request to rate it do not fit."""
        model, tokenizer = self.reward_model, self.tokenizer
        prompts = [each.prompt for each in examples]
        if isinstance(model, Judge):
            model, tokenizer = model.reward_model, model.tokenizer
            patches = model.model.config.vision.patches
            prompts = [trunk_tokens(tokenizer, (), each.question, patches) for each in examples]
        longest = max(
            len(prompt) + len(with_request(tokenizer, [], each.facts, model.request).tokens)
            for prompt, each in zip(prompts, examples))
        context = model.model.config.text.max_position_embeddings
        wanted = self.config.max_new_tokens
        if longest + wanted > context:
            raise DataError(f"the longest prompt and the request to rate an answer have {longest} "
                            f"tokens and completions may have {wanted}, but the reward model's "
                            f"context holds {context}; use a smaller --max_new_tokens")

    def rules(self, example: Example, completion: Sequence[int]) -> tuple[float, float, float]:
        """Return the symbolic bonus, the length penalty and that for a missing end-of-sequence."""
        config, text = self.config, self.tokenizer.decode(completion)
        bonus = config.symbolic_bonus * symbolic_reward(text, example.truth)
        length = len(completion) / config.length_penalty_tokens * example.length_factor
        ended = self.tokenizer.eos_token in completion
        return (bonus, -config.length_penalty * length,
                0.0 if ended else config.missing_eos_penalty)


def completion_table(
    tokenizer: Tokenizer, examples: Sequence[Example], tokens: Sequence[Sequence[list[int]]],
    parts: dict[str, Tensor], kl: Tensor, false_parts: Callable[[Example, str], list[str] | None],
) -> list[dict]:
    """Return a row per completion: text, score and its parts, KL in nats, what is false."""
    rows = []
    both = [(example, each) for example, group in zip(examples, tokens) for each in group]
    for i, (example, completion) in enumerate(both):
        text = tokenizer.decode(completion).strip()
        score = {name: part[i].item() for name, part in parts.items()}
        score = {"score": sum(score.values()), **score} if score else {}
        rows.append({
            "prompt": example.name, "question": example.question, "answer": text, **score,
            "kl": kl[i].item(), "tokens": len(completion), "false": false_parts(example, text),
            "ended": completion[-1] == tokenizer.eos_token,
        })
    return rows


def summary(table: list[dict]) -> dict[str, float]:
    """Return means over a table of completions, named as in other trainers."""
    names = {"objective/kl": "kl", "objective/scores": "score", "response/length": "tokens",
             "response/ended": "ended"}
    metrics = {shown: sum(row[name] for row in table) / len(table)
               for shown, name in names.items() if name in table[0]}
    known = [bool(row["false"]) for row in table if row["false"] is not None]
    return metrics | ({"truth/hallucination": sum(known) / len(known)} if known else {})
