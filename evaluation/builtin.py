"""Measures on the built-in world: exact counts of what people or GPT-4 judge in the papers.

`questionnaire` makes one record per held-out scene with a request to describe it and ten short
questions, `score_record` adds the model's answers and what is false in them, and `world_terms`
turns the records into measures with POPE's, CHAIR's and MMHal's definitions.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import generation
import world
from evaluation.benchmarks import MMHAL_KINDS, mmhal_terms, pope_answer, pope_terms
from evaluation.best_of import BestOf
from evaluation.metrics import (
    PER_KIND, Terms, comparison, model_names, paired, read_results, with_intervals,
)
from formats.files import understood
from formats.tokenizer import Tokenizer
from model import LLaVA
from vision import ImageSettings

ERRORS = ("object", "attribute", "position", "number", "other")  # kinds of false spans
NEGATIVES = ("random", "popular", "adversarial")  # how POPE chooses the absent objects
TOPICS = ("colour", "number", "place", "what", "comparison", "scene")
MMHAL_QUESTIONS = {  # the question of a record for each of MMHal's kinds but "holistic"
    "attribute": "question/colour", "adversarial object": "pope/adversarial",
    "comparison": "question/comparison", "counting": "question/number",
    "spatial relation": "question/place", "environment": "question/scene", "other": "question/what",
}
FREQUENT = 5  # objects of a setting that Delta counts; the paper takes 10 of COCO's 80

SCENES = 300
DESCRIPTION_TOKENS = 128  # twice the longest true description
YES_OR_NO_TOKENS = 6  # enough to tell which
SHORT_TOKENS = 16  # enough for every true answer to a short question


def measure_world(
    model: LLaVA, tokenizer: Tokenizer, settings: ImageSettings, scenes: int = SCENES,
    seed: int = 0, best: BestOf | None = None,
) -> tuple[dict, list[dict]]:
    """Measure a model on held-out scenes, greedily and with wordings that training never uses.

    Args:
        scenes: how many; see `held_out`.
        seed: of the choice of questions, of sampling and of the bootstrap.
        best: chooses among several sampled answers to everything; None: decode greedily.

    Returns:
        metrics, {name: {"value", "low", "high"}} (see `world_terms`); and a record per scene with
        its truth, the description with its false spans, all questions and answers.
    """
    drawn = held_out(scenes)
    records = questionnaire(drawn, seed)
    pictures = [world.draw(scene, settings.size) for scene in drawn]
    features = list(generation.image_features(model, settings, pictures))
    if best:
        sampling = {"samples": best.samples, "temperature": best.temperature, "seed": seed}
        facts = [world.facts(scene) for scene in drawn]
        seen = best.judge.features(pictures)

    def ask(items: list[tuple[int, dict]], tokens: int, label: str) -> None:
        """Add the model's answers to items (scene, {"question": text})."""
        places, questions = [i for i, _ in items], [item["question"] for _, item in items]
        texts = generation.answers(
            model, tokenizer, settings, [features[i] for i in places], questions, tokens,
            progress=label, **(sampling if best else {}))
        if best:
            texts = best.choose(questions, seen[places], texts, [facts[i] for i in places])
        for (_, item), text in zip(items, texts):
            item["answer"] = text

    ask([*enumerate(records)], DESCRIPTION_TOKENS, "describing")
    short = [(i, item) for i, record in enumerate(records) for item in record["asked"].values()]
    yes_or_no = lambda item: item["topic"] in ("exists", "comparison")
    ask([(i, item) for i, item in short if yes_or_no(item)], YES_OR_NO_TOKENS, "asking")
    ask([(i, item) for i, item in short if not yes_or_no(item)], SHORT_TOKENS, "asking")
    for scene, record in zip(drawn, records):
        score_record(scene, record)
    return with_intervals(world_terms(records), seed), records


def compare_runs(runs: Sequence[str], seed: int = 0) -> str:
    """Format the runs' measures in results.json, and their paired differences to the first run."""
    found, terms, questions = {}, {}, {}
    for name, run in model_names(runs).items():
        path = Path(run) / "results.json"
        if Path(run).name == "model" and not path.exists():
            path = Path(run).parent / "results.json"
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file; first run: python evaluate.py "
                                    f"{run} (of a plain model: --output {run})")
        found[name], records = read_scenes(path)["after"]
        questions[name] = asked(records)
        terms[name] = world_terms(records)
    first, *others = found
    for name in others:
        if questions[name] != questions[first]:
            raise ValueError(f"{name} and {first} were measured on different scenes; "
                             "measure both again with the same --scenes and --seed")
    return comparison(found, {name: paired(terms[first], terms[name], seed) for name in others})


def read_scenes(path: Path) -> dict[str, tuple[dict, list[dict]]]:
    """Read a run's results.json; ValueError if it is not about scenes."""
    results = read_results(path)
    with understood(path):
        if not all("scene" in record for _, records in results.values() for record in records):
            raise ValueError(f"{path}: the results of a reward model, not of answers about scenes")
    return results


def held_out(scenes: int) -> list[world.Scene]:
    return [world.make_scene(i, "test") for i in range(scenes)]


def asked(records: Sequence[dict]) -> list[tuple]:
    """Return what must agree for two measurements to be paired."""
    return [(record["scene"], record.get("question")) for record in records]


def questionnaire(scenes: Sequence[world.Scene], seed: int = 0) -> list[dict]:
    """Return a record per scene: its truth, a request to describe it, and ten short questions.

    Each scene gets one question about a present object, one about an absent object of each of
    POPE's three kinds (any; one of the quarter of kinds most frequent in all scenes; one of the
    three most typical of the setting) and one per topic, all in held-out wordings.
    """
    counts = Counter(thing.kind for scene in scenes for thing in scene.things)
    popular = [kind for kind, _ in counts.most_common(len(world.KINDS) // 4)]
    records = []
    for scene in scenes:
        rng = random.Random(f"evaluate {seed} {scene.seed}")
        typical = sorted(world.SCENES[scene.type], key=world.SCENES[scene.type].get, reverse=True)
        kinds = {
            "pope/present": rng.choice(scene.things).kind,
            "pope/random": rng.choice(scene.absent()),
            "pope/popular": rng.choice(scene.absent(popular) or scene.absent()),
            "pope/adversarial": rng.choice(scene.absent(typical)[:3]),
        }
        asked = {n: world.exists_question(scene, kind, rng, True) for n, kind in kinds.items()}
        asked |= {f"question/{topic}": world.question(scene, topic, rng, True) for topic in TOPICS}
        records.append({
            "scene": scene.seed, "type": scene.type, "truth": [t.kind for t in scene.things],
            "question": rng.choice(world.DESCRIBE_PROMPTS_EVAL),
            "asked": {name: {"question": each.text, "truth": each.answer, "topic": each.topic}
                      for name, each in asked.items()},
        })
    return records


def score_record(scene: world.Scene, record: dict) -> None:
    """Add to an answered record what it mentions, what is false, and which answers are right."""
    record["mentions"] = world.mentions(record["answer"])
    record["spans"] = [vars(span) for span in world.hallucinations(scene, record["answer"])]
    for name, item in record["asked"].items():
        if name.startswith("pope/"):
            item["right"] = (pope_answer(item["answer"]) == "yes") == (item["truth"] != "No.")
        else:
            question = world.Question(item["question"], item["truth"], item["topic"])
            item["right"] = world.answer_is_right(question, item["answer"])


# ----------------------------------------------------------------------------------------- measures


def world_terms(records: Sequence[dict]) -> dict[str, Terms]:
    """Return every measure of scored records as terms (see `metrics.py`), one item per scene.

    `length` is in words, `mmhal/score` and `mmhal/kind/*` in points of 6, the rest are shares.
    """
    return (description_terms(records) | question_terms(records)
            | {"over_generalisation": delta_terms(records)} | mmhal_world_terms(records))


def ratio(records: Sequence[dict], above: Callable, below: Callable = lambda record: 1) -> Terms:
    """Return the sum of `above` over the sum of `below`, two functions of a record."""
    count = lambda function: np.array([function(record) for record in records], dtype=float)
    return [(1, count(above), count(below))]


def description_terms(records: Sequence[dict]) -> dict[str, Terms]:
    """Return hallucination/*, CHAIR's chair_i and coverage, and the length of the descriptions."""
    measures = {"hallucination/any": ratio(records, lambda r: len(r["spans"]) > 0)}
    for kind in ERRORS:
        has_kind = lambda r: any(span["kind"] == kind for span in r["spans"])
        measures[f"hallucination/{kind}"] = ratio(records, has_kind)
    false = lambda r: sum(kind not in r["truth"] for kind in r["mentions"])
    measures["chair_i"] = ratio(records, false, lambda r: len(r["mentions"]))
    measures["coverage"] = ratio(records, covered, lambda r: len(r["truth"]))
    measures["length"] = ratio(records, lambda r: len(r["answer"].split()))
    return measures


def covered(record: dict) -> int:
    """Count the objects of the scene that the description mentions."""
    return len(set(record["mentions"]) & set(record["truth"]))


def question_terms(records: Sequence[dict]) -> dict[str, Terms]:
    """Return pope/* and question/*, the measures of the short questions."""
    measures = {}
    for name in NEGATIVES:  # the present object counts in all three
        items = [r["asked"][key] for r in records for key in ("pope/present", f"pope/{name}")]
        labels = ["no" if item["truth"] == "No." else "yes" for item in items]
        scenes = np.repeat(np.arange(len(records)), 2)
        terms = pope_terms([item["answer"] for item in items], labels, scenes)
        measures |= {f"pope/{name}/{m}": terms[m] for m in ("accuracy", "f1", "yes_ratio")}
    for topic in TOPICS:
        name = f"question/{topic}"
        measures[name] = ratio(records, lambda r: r["asked"][name]["right"])
    return measures


def delta_terms(records: Sequence[dict]) -> Terms:
    """Return over-generalisation as in RLHF-V's Table 2: Delta = H_s - H_a, mean over settings.

    For the most frequent objects of a setting, H_a is the rate at which one is mentioned where it
    is absent, in all images; H_s is the same in images of that setting. The rate is over occasions
    and not over mentions, so that it does not depend on how often an object is present.
    """
    types = sorted({record["type"] for record in records})
    terms = []
    for setting in types:
        here = np.array([record["type"] == setting for record in records])
        counts = Counter(k for r in records if r["type"] == setting for k in r["truth"])
        frequent = {kind for kind, _ in counts.most_common(FREQUENT)}
        absent = lambda r: frequent - set(r["truth"])
        made_up = lambda r: len(absent(r) & set(r["mentions"]))
        [(_, above, below)] = ratio(records, made_up, lambda r: len(absent(r)))
        terms += [(1 / len(types), above * here, below * here), (-1 / len(types), above, below)]
    return terms


def mmhal_world_terms(records: Sequence[dict]) -> dict[str, Terms]:
    """Return mmhal/*: MMHal's measures of `world_ratings`."""
    ratings = [rating for record in records for rating in world_ratings(record)]
    scenes = np.repeat(np.arange(len(records)), len(MMHAL_KINDS))
    return {f"mmhal/{name}".replace("mmhal/score/", PER_KIND): terms
            for name, terms in mmhal_terms(ratings, scenes).items()}


def world_ratings(record: dict) -> list[int]:
    """Return a rating of 0..6 for each of MMHal's eight kinds of question, computed from the truth.

    A right answer to a short question gets 6, a wrong one 0, or 3 if it names nothing of its topic.
    A description gets 3 to 6 without a false span and 0 to 2 with one, by its share of the objects.
    """
    ratings = []
    for kind in MMHAL_KINDS:
        if kind == "holistic":
            share = covered(record) / len(record["truth"])
            ratings.append(round(2 * share) if record["spans"] else 3 + round(3 * share))
            continue
        item = record["asked"][MMHAL_QUESTIONS[kind]]
        content = rf"\b(?:{world.CONTENT[item['topic']]})\b"
        to_the_point = re.search(content, item["answer"], re.I)
        ratings.append(6 if item["right"] else 0 if to_the_point else 3)
    return ratings
