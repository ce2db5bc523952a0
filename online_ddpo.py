"""Online DDPO: rounds of sampling from the current policy, feedback, and DDPO steps.

As the policy moves, corrections of the base's answers cover its own mistakes less and less. The
iterative form of online preference learning (Guo et al. 2024, arXiv 2402.04792) collects new ones:

    for each of a few rounds
        sample     k completions of each of the round's prompts, by the policy as it is
        feedback   annotator      every completion with something false is corrected: the correction
                                  is `chosen`, the completion `rejected` (RLHF-V; built-in world)
                   reward_model   the best and the worst of the k completions are the pair, by
                                  PPO's reward (scoring.py), with facts if `--facts`
        learn      a few passes over the round's pairs with the loss of ddpo.py

Corrected segments are found as in ddpo.py, also between two samples of one prompt. The reference is
the base in all rounds, or with `--reference last` the policy at the beginning of the round.

The number of a round's steps assumes that every prompt gives a pair. Where fewer do, batches are
smaller, so that a pair is seen about `--epochs` times (more often if there are fewer pairs than
steps). A round without a new pair repeats those of the one before.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import parallel
from algorithm import Data, Start
from config import option
from data import Epochs, Example
from ddpo import DDPO, LossConfig, PreferenceBatch, pair_scores
from formats.readers import Pair
from lora import use_adapter
from rollouts import (
    check_room, completion_table, make_roles, per_token, policy_and_reference, prompt_only, sample,
    summary, warn_truncated, write_samples,
)
from scoring import SamplingConfig


@dataclass
class OnlineDDPOConfig(SamplingConfig, LossConfig):
    epochs: int = option(3, "passes over the pairs of a round")
    rounds: int = option(4, "number of rounds that share the prompts", least=1)
    feedback: str = option("annotator", "the built-in world's annotator corrects completions; or a "
                           "reward model picks the best and the worst of a prompt's",
                           choices=("annotator", "reward_model"))
    reference: str = option("base", "of the loss: the base, or the policy at the round's beginning",
                            choices=("base", "last"))
    samples: int = option(0, "completions per prompt; 0: 1 to be corrected, or 4 to choose from")
    temperature: float = option(0.5, "of sampling (as for offline corrections)", least=0.01)

    def __post_init__(self):
        super().__post_init__()
        if self.feedback == "annotator" and (self.reward_model or self.facts):
            raise ValueError("--reward_model and --facts go with --feedback reward_model")
        self.samples = self.samples or (1 if self.feedback == "annotator" else 4)
        if self.feedback == "reward_model" and self.samples < 2:
            raise ValueError("--feedback reward_model picks the best and the worst completion of a "
                             "prompt: --samples should be at least 2")


@dataclass
class Round:
    """The pairs of a round."""

    pairs: list[tuple[int, int, str, str]]  # prompt's place, completion's number, chosen, rejected
    scores: dict[str, list[float]]  # of the reference, by name (see ddpo.pair_scores)
    metrics: dict[str, float]


class OnlineDDPO(DDPO):
    """Align by DDPO with feedback on the current policy's own answers, in rounds (online DDPO)."""

    Config = OnlineDDPOConfig
    reads = "prompts"
    tokens = staticmethod(prompt_only)

    def __init__(self, start: Start, config: OnlineDDPOConfig, data: Data):
        if config.feedback == "annotator":  # knows descriptions only
            known = [each for each in data.train if data.correct(each, "") is not None]
            data = replace(data, train=known)
            if not known:
                raise ValueError("your own prompts have no annotator; use --feedback reward_model")
            (self.policy, self.base), self.reward = policy_and_reference(start), None
        else:
            roles = make_roles(start, config)
            self.policy, self.base, self.reward = roles.policy, roles.reference, roles.reward
        super().__init__(start, config, Data([]), reference={})
        check_room(start, config, data, self.reward)
        self.start, self.data, self.seed = start, data, start.run.seed
        size = math.ceil(len(data.train) / config.rounds)  # prompts of a round
        places = list(range(len(data.train)))
        self.prompts = Epochs(places, replace(config, batch_size=size), self.seed, lambda place: 0)
        pairs = size * (config.samples if config.feedback == "annotator" else 1)  # at most
        self.steps = config.steps or config.rounds * math.ceil(
            config.epochs * pairs / config.batch_size)
        self.per_round = math.ceil(self.steps / config.rounds)
        self.round = Round([], {}, {})

    @classmethod
    def depends(cls, config: OnlineDDPOConfig) -> tuple[str, ...]:
        return ("base", "rm") if config.feedback == "reward_model" else ("base",)

    def batches(self, step: int) -> list[PreferenceBatch]:
        """Return batches of the current round, or of a new one once that is used up."""
        index, inner = divmod(step, self.per_round)
        if inner == 0:
            self.begin_round(index, step)
        return super().batches(inner)

    def loss(self, batch: PreferenceBatch) -> tuple[Tensor, dict[str, float]]:
        loss, metrics = super().loss(batch)
        return loss, metrics | self.round.metrics

    def state(self) -> dict:
        return vars(self.round)

    def load_state(self, state: dict) -> None:
        self.round = Round(**state)
        self.learn_from_round()

    @torch.no_grad()
    def begin_round(self, index: int, step: int) -> None:
        """Sample completions of the round's prompts, and make pairs by the feedback on them."""
        started, config, data = time.perf_counter(), self.config, self.data
        places = self.prompts.examples(index)
        prompts = [data.train[place] for place in places]
        tokens, _ = sample(
            self.policy, prompts, config, self.seed, index, self.start.tokenizer)
        mask, logp, reference = per_token(
            [lambda batch: self.policy.logp(batch, config.temperature),
             lambda batch: self.base.logp(batch, config.temperature)],
            self.model, prompts, tokens, config.micro_batch)
        parts = self.reward(list(zip(prompts, tokens))) if self.reward else {}
        table = completion_table(self.start.tokenizer, prompts, tokens, parts,
                                 (logp - reference).sum(1), data.false_parts)
        parallel.once(lambda: write_samples(self.start.folder, step + 1, table))
        k = config.samples
        pairs = [(place, i * k + j, *texts) for i, place in enumerate(places)
                 for j, texts in enumerate(self.feedback(data.train[place], table[i * k :][:k]))]
        kept = pairs if self.examples(pairs) else self.round.pairs
        if not kept:
            raise ValueError(f"none of {len(table)} completions gave a pair: there is nothing to "
                             "correct, or the completions of a prompt never differ")
        if kept is not pairs:
            print(f"warning: round {index + 1} has no new pair and repeats the last one",
                  file=sys.stderr)
        warn_truncated(summary(table), config)
        metrics = {**summary(table), "round": index + 1, "round/pairs": len(pairs),
                   "round/pairs_per_completion": len(pairs) / len(table),
                   "seconds/round": time.perf_counter() - started}
        reference = self.base if config.reference == "base" else self.policy
        with use_adapter(reference.model, reference.adapter):
            scores = pair_scores(
                reference.model, self.examples(kept), self.start, config, f"round {index + 1}")
        self.round = Round(kept, scores, metrics)
        self.learn_from_round()

    def feedback(self, prompt: Example, rows: Sequence[dict]) -> list[tuple[str, str]]:
        """Return pairs (chosen, rejected) of a prompt's completions, rows of `completion_table`."""
        if self.config.feedback == "annotator":
            texts = [row["answer"] for row in rows]
            found = [(self.data.correct(prompt, text).strip(), text) for text in texts]
        else:
            ranked = sorted(rows, key=lambda row: row["score"])
            best, worst = ranked[-1], ranked[0]
            found = [(best["answer"], worst["answer"])] * (best["score"] > worst["score"])
        return [(good, bad) for good, bad in found if good and bad and good != bad]

    def examples(self, pairs: Sequence) -> list[Example]:
        """Encode pairs (see `Round`); leave out those that do not fit the context."""
        examples, config = [], self.model.config
        for place, number, chosen, rejected in pairs:
            prompt = self.data.train[place]
            name = f"{prompt.name}, completion {number}"
            pair = Pair(name, None, prompt.question, chosen, rejected)
            _, responses = DDPO.tokens(
                pair, self.start.tokenizer, config.vision.patches, self.config)
            longest = len(prompt.prompt) + max(len(response.tokens) for response in responses)
            if longest <= config.text.max_position_embeddings:
                examples.append(replace(prompt, name=name, responses=responses))
        return examples

    def learn_from_round(self) -> None:
        """Set the fields that `DDPO.batches` reads: the round's pairs and their scores."""
        examples, self.reference = self.examples(self.round.pairs), self.round.scores
        size = max(1, math.ceil(self.config.epochs * len(examples) / self.per_round))
        size = self.config.batch_size if self.config.steps else size
        self.source = Epochs(examples, replace(self.config, batch_size=size), self.seed)
