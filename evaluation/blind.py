"""Blind baselines: what the base's answers gain from edits that never look at the picture.

Alignment shows that a model learned to look only if it beats what text alone can do. Two edits of
the base's descriptions measure that:

    last sentence   cuts the last sentence of every description
    text alone      cuts the sentences that a logistic regression, trained on the corrections, calls
                    false from their words, these with the setting, and their place in the text, as
                    many as the aligned model's coverage allows

A control scores the aligned model's descriptions against another picture of the same setting. A
model that described the setting and not the picture would do just as well there.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

import world
from evaluation.builtin import covered, description_terms
from evaluation.metrics import with_intervals

RARE = 3  # a feature of fewer training sentences is left out
STEPS, RATE, PENALTY = 300, 0.05, 1.0  # of the regression: Adam, with an L2 penalty
Corrections = Sequence[tuple[str, str]]  # (chosen, rejected): the corrected text and the original


def sentences(text: str) -> list[str]:
    return re.findall(r"\s*[^.!?]+[.!?]*", text)


def features(text: str) -> list[set[str]]:
    """Return the classifier's features of each sentence of a text."""
    parts = sentences(text)
    setting = " ".join(re.findall(r"[a-z]+", parts[0].lower())[-1:]) if parts else ""
    found = []
    for i, part in enumerate(parts):
        words = re.findall(r"[a-z]+", part.lower())
        places = world.PLACE.findall(part.lower())
        kinds = world.mentions(part)
        found.append(
            {f"word {word}" for word in words} | {f"pair {a} {b}" for a, b in zip(words, words[1:])}
            | {f"in {setting} {word}" for word in words}
            | {f"place {kind} {place}" for kind in kinds for place in places}
            | {f"from start {i}", f"from end {len(parts) - i}", f"of {len(parts)}"})
    return found


class TextClassifier:
    """A logistic regression on the features of a sentence: does it mention an absent object?

    A training sentence of an original text is false if it mentions a kind that the corrected text
    does not mention.
    """

    def __init__(self, corrections: Corrections):
        rows, false = [], []
        for chosen, rejected in corrections:
            there = set(world.mentions(chosen))
            rows += features(rejected)
            false += [not there.issuperset(world.mentions(part)) for part in sentences(rejected)]
        counts = Counter(name for row in rows for name in row)
        known = [name for name, count in counts.items() if count >= RARE]
        self.column = {name: i for i, name in enumerate(known)}
        self.weights = regression(self.matrix(rows), np.array(false, np.float32))

    def matrix(self, rows: Sequence[set[str]]) -> np.ndarray:
        """Return (rows, features + 1) of 0 and 1, the last column all 1."""
        matrix = np.zeros((len(rows), len(self.column) + 1), np.float32)
        matrix[:, -1] = 1
        for i, row in enumerate(rows):
            matrix[i, [self.column[name] for name in row if name in self.column]] = 1
        return matrix

    def scores(self, text: str) -> np.ndarray:
        """Return each sentence's score; the higher, the more probably it is false."""
        return self.matrix(features(text)) @ self.weights


def regression(matrix: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Fit a logistic regression; return its weights, one per column."""
    weights, mean, square = np.zeros((3, matrix.shape[1]), np.float32)
    for step in range(1, STEPS + 1):
        predicted = 1 / (1 + np.exp(-(matrix @ weights).clip(-30, 30)))
        gradient = (matrix.T @ (predicted - truth) + PENALTY * weights) / len(truth)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.99 * square + 0.01 * gradient**2
        weights = weights - RATE * mean / (1 - 0.9**step) / (
            np.sqrt(square / (1 - 0.99**step)) + 1e-8)
    return weights


def scored(record: dict, scene: world.Scene, answer: str) -> dict:
    """Return a record of this answer, scored against this scene."""
    return {"scene": scene.seed, "type": scene.type, "truth": [t.kind for t in scene.things],
            "question": record["question"], "answer": answer, "mentions": world.mentions(answer),
            "spans": [vars(span) for span in world.hallucinations(scene, answer)]}


def last_sentence_cut(records: Sequence[dict]) -> list[dict]:
    """Return records of the same descriptions without their last sentences."""
    return [scored(record, scene_of(record), "".join(sentences(record["answer"])[:-1]))
            for record in records]


def false_by_text(
    records: Sequence[dict], classifier: TextClassifier, coverage: float
) -> list[dict]:
    """Return records of the same descriptions without what the classifier calls false.

    Args:
        coverage: 0..1. Sentences are cut, the highest score first, as long as the rest covers at
            least this share of the pictures' objects.
    """
    parts = [sentences(record["answer"]) for record in records]
    order = sorted((-score, i, j) for i, record in enumerate(records)
                   for j, score in enumerate(classifier.scores(record["answer"]))
                   if world.mentions(parts[i][j]))
    left = [Counter(kind for kind in record["mentions"] if kind in record["truth"])
            for record in records]
    objects, found = sum(len(r["truth"]) for r in records), sum(map(covered, records))
    for _, i, j in order:
        kinds = [kind for kind in world.mentions(parts[i][j]) if kind in left[i]]
        lost = sum(count >= left[i][kind] for kind, count in Counter(kinds).items())
        if (found - lost) / objects < coverage:
            break
        found -= lost
        left[i] -= Counter(kinds)
        parts[i][j] = ""
    return [scored(record, scene_of(record), "".join(part)) for record, part in zip(records, parts)]


def other_picture(records: Sequence[dict]) -> list[dict]:
    """Return records of the same descriptions, each scored against the next scene of its setting.

    A description whose setting no other scene has is left out.
    """
    shown = []
    for i, record in enumerate(records):
        following = [*records[i + 1 :], *records[:i]]
        other = next((each for each in following if each["type"] == record["type"]), None)
        if other:
            shown.append(scored(record, scene_of(other), record["answer"]))
    return shown


def scene_of(record: dict) -> world.Scene:
    return world.make_scene(record["scene"], "test")


def blind_baselines(
    before: Sequence[dict], after: Sequence[dict], corrections: Corrections
) -> dict[str, tuple[dict, list[dict]]]:
    """Return {name: (metrics, records)} of the baselines and of the control.

    Args:
        before, after: records of the base and of the aligned model, the same scenes.
        corrections: those that the aligned model learned from; without any, no text classifier.
    """
    found = {"last sentence cut": last_sentence_cut(before)}
    if corrections:
        coverage = sum(map(covered, after)) / sum(len(record["truth"]) for record in after)
        found["cut by text alone"] = false_by_text(before, TextClassifier(corrections), coverage)
    if others := other_picture(after):
        found["other picture"] = others
    return {name: (with_intervals(description_terms(records)), records)
            for name, records in found.items()}
