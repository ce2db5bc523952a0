"""How truthful a model is: hallucination measures with intervals, on the built-in world and elsewhere.

The built-in world knows the truth about its pictures, so everything that RLHF-V (arXiv 2312.00849)
and LLaVA-RLHF (2309.14525) had people or GPT-4 judge is counted exactly here, on held-out scenes and
with wordings that training never used:

    hallucination/*  share of descriptions with a false object, attribute, position, number, any
    chair_i          false mentions of objects / all mentions (Rohrbach et al. 2018, 1809.02156)
    coverage         objects mentioned / objects there: saying little is no way to be truthful
    pope/*           yes/no questions about objects (Li et al. 2023, 2305.10355): the absent ones at
                     random, popular (frequent everywhere) or adversarial (typical of the setting)
    question/*       share of right answers by topic
    over_generalisation   RLHF-V's Table 2: how much more often a setting's most frequent objects
                     are hallucinated in that setting than anywhere (Delta = H_s - H_a)

Every measure is a ratio of two sums over scenes, or a sum of such ratios, so one bootstrap over the
scenes gives all intervals, and the same resamples for two models give paired differences.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import world
from checkpoint import read_json, write_atomic
from data import prompt_text, prompt_tokens
from model import LLaVA, generate
from vision import ImageSettings, preprocess

# -------------------------------------------------------------------------------- asking the model


def pixels_of(images: Sequence[Image.Image], settings: ImageSettings) -> Tensor:
    """(N, 3, size, size) as the model's tower wants them."""
    return torch.stack([
        preprocess(image, settings.size, settings.mean, settings.std, settings.mode)
        for image in images
    ])


@torch.no_grad()
def image_features(
    model: LLaVA, settings: ImageSettings, images: Sequence[Image.Image], batch_size: int = 64
) -> Tensor:
    """Features (N, patches, D_vision) of the tower, for several questions about the same images."""
    like = model.head.weight
    return torch.cat([
        model.image_features(pixels_of(images[i : i + batch_size], settings).to(like))
        for i in range(0, len(images), batch_size)
    ])


def answers(
    model: LLaVA, tokenizer, settings: ImageSettings, images: Sequence[Image.Image] | Tensor,
    questions: Sequence[str], max_new_tokens: int = 128, temperature: float = 0.0,
    samples: int = 1, seed: int = 0, batch_size: int = 64, progress: str | None = None,
) -> list[str]:
    """The model's answers, one image and one question each.

    Args:
        images: one per question: Pillow images, or features (N, patches, D_vision) of the tower.
        questions: without `<image>` and template; both are added.
        max_new_tokens: answers end here at the latest.
        temperature: 0 is greedy; above 0 draws from a generator seeded by (seed, batch index).
        samples: answers per question.
        batch_size: questions per batch; prompts of about one length go together.
        progress: label of a progress bar; None shows none.

    Returns:
        len(questions) * samples texts in the order of the questions, samples of one side by side.
    """
    if len(images) != len(questions):
        raise ValueError(f"{len(images)} images for {len(questions)} questions")
    patches, like = model.config.vision.patches, model.head.weight
    prompts = [
        torch.tensor(prompt_tokens(tokenizer, prompt_text(question), patches))
        for question in questions
    ]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * (len(prompts) * samples)
    bar = tqdm(total=len(prompts), desc=progress, disable=progress is None, leave=False)
    for index, start in enumerate(range(0, len(order), batch_size)):
        rows = order[start : start + batch_size]
        if isinstance(images, Tensor):
            batch = images[rows]
        else:
            batch = pixels_of([images[i] for i in rows], settings)
        generator = torch.Generator(like.device).manual_seed(seed * 1_000_003 + index)
        out = generate(
            model, batch.to(like), [prompts[i] for i in rows], max_new_tokens, temperature,
            samples, generator,
        )
        for k, tokens in enumerate(out):
            texts[rows[k // samples] * samples + k % samples] = tokenizer.decode(tokens).strip()
        bar.update(len(rows))
    bar.close()
    return texts


# ------------------------------------------------------------------------------ the built-in world

ERRORS = ("object", "attribute", "position", "number", "other")  # kinds of false spans
NEGATIVES = ("random", "popular", "adversarial")  # how POPE chooses the absent objects
TOPICS = ("colour", "number", "place", "what", "comparison", "scene")
FREQUENT = 5  # objects of a setting that Delta looks at; the paper takes 10 of COCO's 80
SHORT = 16  # tokens; enough for every true answer to a question
LONG = 128  # tokens; twice the longest true description


def measure_world(
    model: LLaVA, tokenizer, settings: ImageSettings, scenes: int = 500, seed: int = 0,
    progress: bool = True,
) -> tuple[dict, list[dict]]:
    """Measure a model on held-out scenes, greedily and with wordings that training never uses.

    Args:
        scenes: how many; scene i is `world.make_scene(i, "test")`.
        seed: of the choice of questions, and of the bootstrap.
        progress: show progress bars.

    Returns:
        metrics, {name: {"value", "low", "high"}} (see `world_metrics`), and one record per scene:
        its truth, the description with its false spans, and all questions with their answers.
    """
    truth = [world.make_scene(i, "test") for i in range(scenes)]
    records = questionnaire(truth, seed)
    features = image_features(model, settings, [world.draw(s, settings.size) for s in truth])
    label = lambda text: text if progress else None
    texts = answers(
        model, tokenizer, settings, features, [record["question"] for record in records], LONG,
        batch_size=125, progress=label("describing"),
    )
    asked = [(i, item) for i, record in enumerate(records) for item in record["asked"]]
    replies = answers(
        model, tokenizer, settings, features[[i for i, _ in asked]],
        [item["question"] for _, item in asked], SHORT, batch_size=125, progress=label("asking"),
    )
    for (_, item), reply in zip(asked, replies):
        item["answer"] = reply
    for scene, record, text in zip(truth, records, texts):
        judge(scene, record, text)
    return world_metrics(records, seed), records


def questionnaire(scenes: Sequence[world.Scene], seed: int = 0) -> list[dict]:
    """A record per scene: its truth, a request to describe it, and short questions about it.

    Each scene is asked about one object that is there and about one absent object of each of POPE's
    three kinds: any; one of the quarter of kinds most frequent in all scenes; and one of the three
    most typical of the setting. Then one question per topic.
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
        asked = {
            name: world.exists_question(scene, kind, rng, held_out=True)
            for name, kind in kinds.items()
        } | {f"question/{topic}": world.question(scene, topic, rng, True) for topic in TOPICS}
        records.append({
            "scene": scene.seed, "type": scene.type, "truth": [t.kind for t in scene.things],
            "question": rng.choice(world.DESCRIBE_PROMPTS_EVAL),
            "asked": [
                {"name": name, "question": q.text, "truth": q.answer, "topic": q.topic}
                for name, q in asked.items()
            ],
        })
    return records


def judge(scene: world.Scene, record: dict, answer: str) -> None:
    """Complete a record with a description, its mentions and false spans, and right or wrong."""
    record["answer"] = answer
    record["mentions"] = world.mentions(answer)
    record["spans"] = [vars(span) for span in world.hallucinations(scene, answer)]
    for item in record["asked"]:
        if item["name"].startswith("pope/"):
            item["right"] = pope_answer(item["answer"]) == item["truth"][:3].strip(",.").lower()
        else:
            question = world.Question(item["question"], item["truth"], item["topic"])
            item["right"] = world.answer_is_right(question, item["answer"])


def pope_answer(text: str) -> str:
    """"yes" or "no" by POPE's own rule: no if the first sentence has a word No, not or no."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


# ------------------------------------------------------------------------- measures and intervals
# A measure is a list of terms (coefficient, numerators (N,), denominators (N,)), one number per
# scene each; its value is the sum of coefficient * sum(numerators) / sum(denominators).


def world_terms(records: Sequence[dict]) -> dict[str, list[tuple]]:
    """Every measure of the built-in world as terms, from judged records."""
    per = lambda count: np.array([count(record) for record in records], dtype=float)
    one = np.ones(len(records))
    wrong = lambda record: {span["kind"] for span in record["spans"]}
    terms = {"hallucination/any": [(1, per(lambda r: bool(wrong(r))), one)]}
    for kind in ERRORS:
        terms[f"hallucination/{kind}"] = [(1, per(lambda r: kind in wrong(r)), one)]
    false = per(lambda r: sum(kind not in r["truth"] for kind in r["mentions"]))
    terms["chair_i"] = [(1, false, per(lambda r: len(r["mentions"])))]
    found = per(lambda r: len(set(r["mentions"]) & set(r["truth"])))
    terms["coverage"] = [(1, found, per(lambda r: len(r["truth"])))]
    terms["length"] = [(1, per(lambda r: len(r["answer"].split())), one)]
    for name in NEGATIVES:
        terms |= pope_terms(records, name)
    for topic in TOPICS:
        items = lambda r: [item for item in r["asked"] if item["name"] == f"question/{topic}"]
        right = per(lambda r: sum(item["right"] for item in items(r)))
        terms[f"question/{topic}"] = [(1, right, per(lambda r: len(items(r))))]
    return terms | {"over_generalisation": delta_terms(records)}


def pope_terms(records: Sequence[dict], negatives: str) -> dict[str, list[tuple]]:
    """Accuracy, F1 of "yes", and share of "yes"; a positive counts as asked in all three splits."""
    names = ("pope/present", f"pope/{negatives}")
    cells = np.array([  # (N, 4): true yes, false yes, true no, false no
        np.sum([
            np.eye(4)[2 * (pope_answer(item["answer"]) == "no") + (not item["right"])]
            for item in record["asked"] if item["name"] in names
        ], axis=0)
        for record in records
    ])
    tp, fp, tn, fn = cells.T
    return {
        f"pope/{negatives}/accuracy": [(1, tp + tn, cells.sum(1))],
        f"pope/{negatives}/f1": [(1, 2 * tp, 2 * tp + fp + fn)],
        f"pope/{negatives}/yes_ratio": [(1, tp + fp, cells.sum(1))],
    }


def delta_terms(records: Sequence[dict]) -> list[tuple]:
    """RLHF-V's Table 2: H_s - H_a, averaged over the settings.

    For the most frequent objects of a setting, H_a is the share of false ones among their mentions
    in all images, H_s the same in images of that setting.
    """
    types = sorted({record["type"] for record in records})
    terms = []
    for setting in types:
        here = np.array([record["type"] == setting for record in records])
        counts = Counter(k for r in records if r["type"] == setting for k in r["truth"])
        frequent = {kind for kind, _ in counts.most_common(FREQUENT)}
        said = [[kind for kind in r["mentions"] if kind in frequent] for r in records]
        false = [sum(kind not in r["truth"] for kind in s) for s, r in zip(said, records)]
        false, said = np.array(false, dtype=float), np.array([len(s) for s in said], dtype=float)
        terms += [(1 / len(types), false * here, said * here), (-1 / len(types), false, said)]
    return terms


def resamples(count: int, seed: int, times: int = 1000) -> np.ndarray:
    """(times, count): how often each item is in each bootstrap resample."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), times)


def evaluate_terms(terms: list[tuple], weights: np.ndarray) -> np.ndarray:
    """A measure's value under each row of weights (W, N): (W,); nan where a denominator is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sum(c * (weights @ above) / (weights @ below) for c, above, below in terms)


def summary(value: float, resampled: np.ndarray) -> dict:
    """A value with its 95 % percentile interval."""
    low, high = np.nanpercentile(resampled, (2.5, 97.5))
    return {"value": float(value), "low": float(low), "high": float(high)}


def with_intervals(terms: dict[str, list[tuple]], seed: int = 0) -> dict:
    """{name: {"value", "low", "high"}} for all measures that are defined on these items."""
    count = len(next(iter(terms.values()))[0][1])
    weights, metrics = resamples(count, seed), {}
    for name, measure in terms.items():
        value = evaluate_terms(measure, np.ones((1, count)))[0]
        if np.isfinite(value):
            metrics[name] = summary(value, evaluate_terms(measure, weights))
    return metrics


def world_metrics(records: Sequence[dict], seed: int = 0) -> dict:
    """All measures of the built-in world, with 95 % bootstrap intervals over the scenes.

    Shares are in 0..1, `length` is in words, `over_generalisation` a difference of shares.
    """
    return with_intervals(world_terms(records), seed)


# ------------------------------------------------------------------------------------ what is shown


def shown(name: str, value: float, sign: str = "") -> str:
    """A value as a person reads it: per cent, or words."""
    return f"{value:{sign}.1f}" if name == "length" else f"{100 * value:{sign}.1f}"


def table(before: dict, after: dict) -> str:
    """Metrics before and after training, one line each, with 95 % intervals; per cent, or words.

    Args:
        before, after: metrics as `measure_world` returns them.
    """
    rows = [("", "before", "95 % interval", "after", "95 % interval", "change", "relative")]
    for name in (name for name in before if name in after):
        row = [name + (" (words)" if name == "length" else "")]
        for metric in (before[name], after[name]):
            interval = f"[{shown(name, metric['low'])}, {shown(name, metric['high'])}]"
            row += [shown(name, metric["value"]), interval]
        old, new = before[name]["value"], after[name]["value"]
        row.append(shown(name, new - old, "+"))
        row.append(f"{100 * (new - old) / old:+.0f} %" if old > 0 else "")
        rows.append(row)
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def write_results(path: Path | str, before: tuple | None, after: tuple) -> None:
    """Write results.json: {"before": {"metrics", "records"}, "after": {...}}, atomically.

    Args:
        before, after: what `measure_world` returned; before is None where nothing was measured.
    """
    parts = []
    for name, pair in (("before", before), ("after", after)):
        if pair is not None:
            metrics = json.dumps(pair[0], indent=1, ensure_ascii=False)
            records = ",\n".join(json.dumps(record, ensure_ascii=False) for record in pair[1])
            parts.append(f'"{name}": {{"metrics": {metrics},\n"records": [\n{records}\n]}}')
    write_atomic(path, "{" + ",\n".join(parts) + "}\n")


def read_results(path: Path | str) -> dict[str, tuple[dict, list[dict]]]:
    """What `write_results` wrote: {"before": (metrics, records), "after": ...}."""
    values = read_json(Path(path))
    try:
        return {name: (part["metrics"], part["records"]) for name, part in values.items()}
    except (KeyError, TypeError):
        raise ValueError(f"{path}: not a results.json of this program; measure the run again") from None
