"""POPE, CHAIR and MMHal-Bench as pure functions from answers to metrics.

POPE's parser of yes/no answers (`pope_answer`) and MMHal's parser of ratings (`rating`) are those
of the public scripts, to the letter. How the questions are asked and who judges is up to the
caller; a score is comparable with published ones only if these agree, too:

1. POPE: evaluate.py asks as LLaVA-RLHF does (--suffix, 64 new tokens) unless told otherwise.
2. CHAIR: the words for objects are those of `coco.py`, which lack 148 of the 403 official synonyms;
   `synonyms.py` reads the official file and has Object HalBench's way of counting.
3. MMHal: `judge.py` reads the official prompt from the release; its own is short.

All metrics come as {name: {"value", "low", "high"}} with 95 % bootstrap intervals (see
`metrics.py`); shares are in 0..1.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import evaluation.coco as coco
from evaluation.answers import ImageQuestion
from evaluation.metrics import Terms, grouped, with_intervals
from formats.rows import DataError, image_path, whole_rows

# --------------------------------------------------------------------------------------------- POPE


def pope_answer(text: str) -> str:
    """Return "no" if the first sentence has a word No, not or no, else "yes" (POPE's own rule)."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope_terms(
    answers: Sequence[str], labels: Sequence[str], images: Sequence | None = None
) -> dict[str, Terms]:
    """Return the measures of `pope`, one item per image."""
    if len(answers) != len(labels) or set(labels) - {"yes", "no"}:
        raise ValueError(f"{len(answers)} answers, {len(labels)} labels; labels are 'yes' or 'no'")
    predicted = np.array([pope_answer(answer) == "yes" for answer in answers], dtype=bool)
    truth, one = np.array([label == "yes" for label in labels], dtype=bool), np.ones(len(labels))
    both = 1.0 * (predicted & truth)
    return grouped({
        "accuracy": [(1, 1.0 * (predicted == truth), one)],
        "precision": [(1, both, 1.0 * predicted)],
        "recall": [(1, both, 1.0 * truth)],
        "f1": [(1, 2 * both, 1.0 * predicted + truth)],
        "yes_ratio": [(1, 1.0 * predicted, one)],
    }, images)


def pope(answers: Sequence[str], labels: Sequence[str], images: Sequence | None = None) -> dict:
    """Score free-form answers to yes/no questions as POPE (Li et al. 2023, arXiv 2305.10355).

    Args:
        labels: "yes" or "no", one per answer; else a ValueError.
        images: one per answer; answers about one image are resampled together, since their errors
            are not independent.

    Returns:
        accuracy, precision, recall, f1 (of "yes") and yes_ratio.
    """
    return with_intervals(pope_terms(answers, labels, images))


# -------------------------------------------------------------------------------------------- CHAIR


def chair_terms(
    named: Sequence[Sequence[str]], objects: Sequence[set[str]], images: Sequence | None = None
) -> dict[str, Terms]:
    """Return the measures of `chair`, one item per image, of the kinds that each answer names."""
    counts = []
    for kinds, there in zip(named, objects, strict=True):
        wrong = sum(kind not in there for kind in kinds)
        counts.append((wrong, len(kinds), len(there & set(kinds)), len(there)))
    false, total, found, present = np.array(counts, dtype=float).reshape(-1, 4).T
    return grouped({
        "chair_s": [(1, 1.0 * (false > 0), np.ones(len(false)))],
        "response": [(1, 1.0 * (false > 0), 1.0 * (total > 0))],
        "chair_i": [(1, false, total)],
        "coverage": [(1, found, present)],
    }, images)


def chair(
    answers: Sequence[str], objects: Sequence[set[str]], images: Sequence | None = None
) -> dict:
    """Score descriptions as CHAIR (Rohrbach et al. 2018, arXiv 1809.02156), by `coco.py`'s words.

    Args:
        objects: the kinds of COCO in each answer's image (see `coco.read_objects`).
        images: one per answer; answers about one image are resampled together.

    Returns:
        chair_s, answers with a false object among all; response, the same among those that mention
        any object (as in Object HalBench, RLHF-V); chair_i, false mentions among all mentions;
        coverage, objects mentioned among the objects in the images.
    """
    return with_intervals(chair_terms(list(map(coco.mentions, answers)), objects, images))


# -------------------------------------------------------------------------------------------- MMHal

MMHAL_KINDS = ("attribute", "adversarial object", "comparison", "counting", "spatial relation",
               "environment", "holistic", "other")  # question i is of kind i mod 8
MMHAL_FIELDS = ("image_id", "image_src", "image_content", "question", "gt_answer")


def rating(reply: str) -> int | None:
    """Return the rating in a judge's reply, or None unless it names exactly one of 0..6.

    As in the public script: "rating: n" anywhere, in any case; the same one may come twice.
    """
    found = [n for n in range(7) if f"rating: {n}" in reply.lower()]
    return found[0] if len(found) == 1 else None


def mmhal_terms(ratings: Sequence[int], images: Sequence | None = None) -> dict[str, Terms]:
    """Return the measures of `mmhal`, one item per image, of ratings in its questions' order."""
    one, ratings = np.ones(len(ratings)), np.array(ratings, dtype=float)
    kinds = np.arange(len(ratings)) % len(MMHAL_KINDS)
    measures = {"score": [(1, ratings, one)], "hallucination": [(1, 1.0 * (ratings < 3), one)]}
    for k, kind in enumerate(MMHAL_KINDS):
        measures[f"score/{kind}"] = [(1, ratings * (kinds == k), 1.0 * (kinds == k))]
    return grouped(measures, images)


def mmhal(replies: Sequence[str], seed: int = 0) -> dict:
    """Score a judge's replies, in the benchmark's order, as MMHal-Bench (arXiv 2309.14525).

    Args:
        seed: of the intervals.

    Returns:
        score, the mean rating 0..6; hallucination, the share rated below 3; score/<kind>. A reply
        without exactly one rating counts as 0, as in the public script.
    """
    return with_intervals(mmhal_terms([rating(reply) or 0 for reply in replies]), seed)


def read_mmhal(path: Path) -> list[dict]:
    """Read MMHal's response_template.json, empty or filled; DataError if a row lacks a field."""
    rows = list(whole_rows(path))
    for name, row in rows:
        for field in MMHAL_FIELDS:
            wanted = list if field == "image_content" else str
            if not isinstance(row.get(field), wanted):
                raise DataError(f"{name}: no {field}; is it MMHal's template?")
        if not all(isinstance(each, str) for each in row["image_content"]):
            raise DataError(f"{name}: image_content should be a list of texts")
        if not isinstance(row.get("judge_prompt", ""), str):
            raise DataError(f"{name}: judge_prompt should be the name of a prompt")
    return [row for _, row in rows]


def mmhal_questions(path: Path, rows: Sequence[dict], images: str | Path) -> list[ImageQuestion]:
    """Return the rows' questions; image files are named as in their address or by their id."""
    questions = []
    for number, row in enumerate(rows, 1):
        names = [str(row["image_src"]).rpartition("/")[2]]
        names += [f"{row['image_id']}.{kind}" for kind in ("jpg", "jpeg", "png")]
        there = [each for each in names if each and (Path(images) / each).is_file()]
        name = f"{path} row {number}"
        image = image_path(name, (there or names)[0], images)
        fields = {"image": row["image_id"], "question": row["question"]}
        questions.append(ImageQuestion(name, image, row["question"], fields))
    return questions


def read_replies(path: Path, count: int) -> list[str]:
    """Read a judge's replies to `count` prompts, in their order; "" stands for a missing one.

    Rows are {"id": number of the prompt, "reply": text}; or, one for each prompt, plain texts or
    OpenAI's chat completions. DataError if one is none of these, or its prompt does not exist.
    """
    replies = {}
    for number, (name, row) in enumerate(whole_rows(path, (dict, str))):
        try:
            if isinstance(row, str):
                row = {"reply": row}
            elif "choices" in row:
                row = {"reply": row["choices"][0]["message"]["content"]}
            replies[int(row.get("id", number))] = str(row["reply"])
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
            raise DataError(f'{name}: expected {{"id": 0, "reply": "..."}}') from None
    if strange := sorted(set(replies) - set(range(count))):
        raise DataError(f"{path}: a reply to prompt {strange[0]}, but there are only {count}")
    return [replies.get(i, "") for i in range(count)]
