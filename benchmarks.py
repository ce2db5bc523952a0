"""Benchmarks as pure functions from answers to metrics: the built-in world, POPE, CHAIR, MMHal.

The files are those that people have; the rules are those of the public scripts, so that numbers can
be compared with published ones. Nothing here asks a model: `evaluate.py` does. All metrics come as
{name: {"value", "low", "high"}} with 95 % bootstrap intervals (see `metrics.py`); shares in 0..1.
"""

import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import coco
import world
from metrics import PER_KIND, Terms, grouped, with_intervals
from rows import DataError, whole_rows

# ---------------------------------------------------------------------------------------- POPE


def pope_answer(text: str) -> str:
    """"yes" or "no" by POPE's own rule: "no" if the first sentence has a word No, not or no."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope_terms(said: np.ndarray, truth: np.ndarray) -> dict[str, Terms]:
    """POPE's measures from two bool arrays (N,), True = yes."""
    one = np.ones(len(said))
    both = 1.0 * (said & truth)
    return {
        "accuracy": [(1, 1.0 * (said == truth), one)],
        "precision": [(1, both, 1.0 * said)],
        "recall": [(1, both, 1.0 * truth)],
        "f1": [(1, 2 * both, 1.0 * said + truth)],
        "yes_ratio": [(1, 1.0 * said, one)],
    }


def pope(
    answers: Sequence[str], labels: Sequence[str], images: Sequence[str] | None = None
) -> dict:
    """POPE (Li et al. 2023, arXiv 2305.10355) from free-form answers to yes/no questions.

    Args:
        answers: as the model gave them; see `pope_answer`.
        labels: "yes" or "no".
        images: one per question: resampled together, since their errors are not independent.

    Returns:
        accuracy, precision, recall, f1 (of "yes") and yes_ratio.

    Raises:
        ValueError: not one label per answer, or another label.
    """
    if len(answers) != len(labels) or set(labels) - {"yes", "no"}:
        raise ValueError(f"{len(answers)} answers, {len(labels)} labels; labels are 'yes' or 'no'")
    said = np.array([pope_answer(answer) == "yes" for answer in answers], dtype=bool)
    truth = np.array([label == "yes" for label in labels], dtype=bool)
    return with_intervals(grouped(pope_terms(said, truth), images))


# ---------------------------------------------------------------------------------------- CHAIR


def chair(
    answers: Sequence[str], objects: Sequence[set[str]], images: Sequence[str] | None = None
) -> dict:
    """CHAIR (Rohrbach et al. 2018, arXiv 1809.02156), and Object HalBench's measures (RLHF-V).

    Args:
        answers: descriptions.
        objects: the kinds of COCO that are in each answer's image (see `coco.read_objects`).
        images: one per answer: answers to one image are resampled together.

    Returns:
        chair_s, answers with a false object among all; response, among those that mention any
        object (Object HalBench); chair_i, false mentions among all mentions; coverage, objects
        mentioned among objects there.
    """
    mentions = [coco.mentions(answer) for answer in answers]
    per = lambda count: np.array([count(m, o) for m, o in zip(mentions, objects)], dtype=float)
    false = per(lambda said, there: sum(kind not in there for kind in said))
    total = per(lambda said, there: len(said))
    found = per(lambda said, there: len(set(said) & there))
    measures = {
        "chair_s": [(1, 1.0 * (false > 0), np.ones(len(false)))],
        "response": [(1, 1.0 * (false > 0), 1.0 * (total > 0))],
        "chair_i": [(1, false, total)],
        "coverage": [(1, found, per(lambda said, there: len(there)))],
    }
    return with_intervals(grouped(measures, images))


# ---------------------------------------------------------------------------------------- MMHal

MMHAL_KINDS = ("attribute", "adversarial object", "comparison", "counting", "spatial relation",
               "environment", "holistic", "other")  # question i is of kind i mod 8
MMHAL_FIELDS = ("image_id", "image_src", "image_content", "question", "gt_answer")
JUDGE = """You are an impartial judge. An assistant was shown an image and answered a question \
about it. You do not see the image; what is known about it is listed below. Judge how informative \
the answer is and whether it hallucinates, that is, whether it says anything about the image that \
is false or that the facts and the reference answer do not support. Analysis and general knowledge \
are welcome as long as they do not contradict the image.

Objects in the image: {objects}
Question: {question}
Reference answer: {reference}
Answer to judge: {answer}

Explain your judgement briefly. Then end with one line "Rating: n", where n is
6  no hallucination, very informative, with good analysis
5  no hallucination, very informative
4  no hallucination, somewhat informative
3  no hallucination, not informative
2  hallucination, but very informative
1  hallucination, somewhat informative
0  hallucination, not informative
"""


def judge_prompt(row: dict) -> str:
    """What a judge is asked about one row of MMHal's filled template."""
    return JUDGE.format(objects=", ".join(row["image_content"]), question=row["question"],
                        reference=row["gt_answer"], answer=row["model_answer"])


def rating(reply: str) -> int | None:
    """The rating in a judge's reply, or None unless it names exactly one of 0..6.

    As in the public script: "rating: n" anywhere, in any case; the same one twice counts.
    """
    found = [n for n in range(7) if f"rating: {n}" in reply.lower()]
    return found[0] if len(found) == 1 else None


def mmhal_terms(ratings: np.ndarray, kinds: np.ndarray) -> dict[str, Terms]:
    """MMHal's measures from arrays (N,): ratings 0..6 and indices into MMHAL_KINDS."""
    one, ratings = np.ones(len(ratings)), np.asarray(ratings, dtype=float)
    measures = {"score": [(1, ratings, one)], "hallucination": [(1, 1.0 * (ratings < 3), one)]}
    for k, kind in enumerate(MMHAL_KINDS):
        of_kind = 1.0 * (kinds == k)
        measures[f"score/{kind}"] = [(1, ratings * of_kind, of_kind)]
    return measures


def mmhal(replies: Sequence[str]) -> dict:
    """MMHal-Bench (LLaVA-RLHF, arXiv 2309.14525) from a judge's replies in the benchmark's order.

    Returns:
        score, the mean rating 0..6; hallucination, the share rated below 3; score/<kind>. A reply
        without exactly one rating counts as 0, as in the public script.
    """
    ratings = np.array([rating(reply) or 0 for reply in replies])
    return with_intervals(mmhal_terms(ratings, np.arange(len(ratings)) % len(MMHAL_KINDS)))


def read_mmhal(path: Path) -> list[dict]:
    """MMHal's response_template.json, checked."""
    rows = [row for _, row in whole_rows(path)]
    for number, row in enumerate(rows, 1):
        missing = [name for name in MMHAL_FIELDS if not isinstance(row, dict) or name not in row]
        if missing:
            raise DataError(f"{path} row {number}: no {missing[0]}; is it MMHal's template?")
    return rows


def read_replies(path: Path, count: int) -> list[str]:
    """A judge's replies in order of the prompts; "" where there is none.

    Rows are {"id": number of the prompt, "reply": text}, or, one for each prompt, texts or
    OpenAI's chat completions.
    """
    replies = {}
    for number, (name, row) in enumerate(whole_rows(path)):
        try:
            if isinstance(row, str):
                row = {"reply": row}
            elif "choices" in row:
                row = {"reply": row["choices"][0]["message"]["content"]}
            replies[int(row.get("id", number))] = str(row["reply"])
        except (KeyError, IndexError, TypeError, ValueError):
            raise DataError(f'{name}: expected {{"id": 0, "reply": "..."}}') from None
    if strange := sorted(set(replies) - set(range(count))):
        raise DataError(f"{path}: a reply to prompt {strange[0]}, but there are only {count}")
    return [replies.get(i, "") for i in range(count)]


# ------------------------------------------------------------------------------ the built-in world

ERRORS = ("object", "attribute", "position", "number", "other")  # kinds of false spans
NEGATIVES = ("random", "popular", "adversarial")  # how POPE chooses the absent objects
TOPICS = ("colour", "number", "place", "what", "comparison", "scene")
ASKED_AS = {  # MMHal's kinds among the questions of a record; the description is the holistic one
    "attribute": "question/colour", "adversarial object": "pope/adversarial",
    "comparison": "question/comparison", "counting": "question/number",
    "spatial relation": "question/place", "environment": "question/scene", "other": "question/what",
}
FREQUENT = 5  # objects of a setting that Delta looks at; the paper takes 10 of COCO's 80


def questionnaire(scenes: Sequence[world.Scene], seed: int = 0) -> list[dict]:
    """A record per scene: its truth, a request to describe it, and short questions about it.

    Each scene is asked about one object that is there and one absent object of each of POPE's three
    kinds: any; one of the quarter of kinds most frequent in all scenes; one of the three most
    typical of the setting. Then comes one question per topic. All wordings are the held-out ones.
    """
    counts = Counter(thing.kind for scene in scenes for thing in scene.things)
    popular = [kind for kind, _ in counts.most_common(len(world.KINDS) // 4)]
    records = []
    for scene in scenes:
        rng = random.Random(f"evaluate {seed} {scene.seed}")
        typical = sorted(world.SCENES[scene.type], key=world.SCENES[scene.type].get, reverse=True)
        asked = {
            "pope/present": rng.choice(scene.things).kind,
            "pope/random": rng.choice(scene.absent()),
            "pope/popular": rng.choice(scene.absent(popular) or scene.absent()),
            "pope/adversarial": rng.choice(scene.absent(typical)[:3]),
        }
        asked = {n: world.exists_question(scene, kind, rng, True) for n, kind in asked.items()}
        asked |= {f"question/{topic}": world.question(scene, topic, rng, True) for topic in TOPICS}
        records.append({
            "scene": scene.seed, "type": scene.type, "truth": [t.kind for t in scene.things],
            "question": rng.choice(world.DESCRIBE_PROMPTS_EVAL),
            "asked": {
                name: {"question": q.text, "truth": q.answer, "topic": q.topic}
                for name, q in asked.items()
            },
        })
    return records


def judge(scene: world.Scene, record: dict, answer: str, replies: Sequence[str]) -> None:
    """Complete a record: the description and its false spans, the replies and whether right.

    Args:
        answer: to the request to describe.
        replies: to the record's questions, in order.
    """
    record["answer"] = answer
    record["mentions"] = world.mentions(answer)
    record["spans"] = [vars(span) for span in world.hallucinations(scene, answer)]
    for (name, item), reply in zip(record["asked"].items(), replies, strict=True):
        item["answer"] = reply
        if name.startswith("pope/"):
            item["right"] = (pope_answer(reply) == "yes") == item["truth"].startswith("Yes")
        else:
            question = world.Question(item["question"], item["truth"], item["topic"])
            item["right"] = world.answer_is_right(question, reply)


def world_metrics(records: Sequence[dict], seed: int = 0) -> dict:
    """All measures of the built-in world; the intervals are over the scenes.

    `length` is in words, `mmhal/score` and `mmhal/kind/*` in points of 6, the rest are shares.
    """
    return with_intervals(world_terms(records), seed)


def world_terms(records: Sequence[dict]) -> dict[str, Terms]:
    """Every measure of the built-in world as terms (see `metrics.py`), from judged records."""
    per = lambda count: np.array([count(record) for record in records], dtype=float)
    one = np.ones(len(records))
    wrong = lambda record: {span["kind"] for span in record["spans"]}
    measures = {"hallucination/any": [(1, per(lambda r: bool(wrong(r))), one)]}
    for kind in ERRORS:
        measures[f"hallucination/{kind}"] = [(1, per(lambda r: kind in wrong(r)), one)]
    false = per(lambda r: sum(kind not in r["truth"] for kind in r["mentions"]))
    measures["chair_i"] = [(1, false, per(lambda r: len(r["mentions"])))]
    found = per(lambda r: len(set(r["mentions"]) & set(r["truth"])))
    measures["coverage"] = [(1, found, per(lambda r: len(r["truth"])))]
    measures["length"] = [(1, per(lambda r: len(r["answer"].split())), one)]
    scene = np.arange(len(records))
    for name in NEGATIVES:  # the object that is there counts in all three
        items = [r["asked"][key] for r in records for key in ("pope/present", f"pope/{name}")]
        said = np.array([pope_answer(item["answer"]) == "yes" for item in items])
        truth = np.array([item["truth"].startswith("Yes") for item in items])
        split = grouped(pope_terms(said, truth), np.repeat(scene, 2))
        measures |= {f"pope/{name}/{m}": split[m] for m in ("accuracy", "f1", "yes_ratio")}
    for topic in TOPICS:
        right = per(lambda r: r["asked"][f"question/{topic}"]["right"])
        measures[f"question/{topic}"] = [(1, right, one)]
    measures["over_generalisation"] = delta_terms(records)
    ratings = np.array([world_ratings(record) for record in records])  # (N, 8)
    kinds = np.tile(np.arange(len(MMHAL_KINDS)), len(records))
    judged = grouped(mmhal_terms(ratings.flatten(), kinds), np.repeat(scene, len(MMHAL_KINDS)))
    rename = lambda name: f"mmhal/{name}" if "/" not in name else PER_KIND + name.split("/")[1]
    return measures | {rename(name): terms for name, terms in judged.items()}


def delta_terms(records: Sequence[dict]) -> Terms:
    """Over-generalisation as in RLHF-V's Table 2: Delta = H_s - H_a, averaged over the settings.

    For the most frequent objects of a setting, H_a is how often one is mentioned where it is
    absent, in all images; H_s the same in images of that setting. Counting the occasions, and not
    the mentions, keeps apart how often an object is there and how often it is made up.
    """
    types = sorted({record["type"] for record in records})
    terms = []
    for setting in types:
        here = np.array([record["type"] == setting for record in records], dtype=float)
        counts = Counter(k for r in records if r["type"] == setting for k in r["truth"])
        frequent = {kind for kind, _ in counts.most_common(FREQUENT)}
        absent = [frequent - set(r["truth"]) for r in records]
        made_up = np.array([len(a & set(r["mentions"])) for a, r in zip(absent, records)], float)
        occasions = np.array([len(a) for a in absent], float)
        share = 1 / len(types)
        terms += [(share, made_up * here, occasions * here), (-share, made_up, occasions)]
    return terms


def world_ratings(record: dict) -> list[int]:
    """MMHal's 0..6 for the eight kinds of question, by the benchmark's scale but judged exactly.

    A right answer to a short question is 6, a wrong one 0, one that says nothing to the point 3. A
    description is 3 to 6 without a false span and 0 to 2 with one, by the objects it mentions.
    """
    ratings = []
    for kind in MMHAL_KINDS:
        if kind == "holistic":
            covered = len(set(record["mentions"]) & set(record["truth"])) / len(record["truth"])
            ratings.append(round(2 * covered) if record["spans"] else 3 + round(3 * covered))
            continue
        item = record["asked"][ASKED_AS[kind]]
        to_the_point = re.search(world.CONTENT[item["topic"]], item["answer"], re.I)
        ratings.append(6 if item["right"] else 0 if to_the_point else 3)
    return ratings
