"""Feedback on a model's own completions in the built-in world, written as a user's files would be.

The oracle plays the annotators of the papers. Their work is written in the plain formats that
`formats/readers.py` reads: a JSON or JSONL file and a folder of images beside it. So built-in data
takes the same path as real data, and any tool can show and edit it.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from random import Random

from PIL import Image

import world
from data import Example
from formats.files import jsonl, read_json, write_atomic
from formats.tokenizer import IMAGE, Tokenizer
from generation import answers
from model import LLaVA
from vision import ImageSettings

TEMPERATURE = 0.5  # of the completions to correct: typical of the model, with some variety
CHUNK = 200  # scenes per round, at most; only some of their completions are usable
CROP = 0.5  # least share of a picture's area that a crop keeps (RandomResizedCrop(scale=(0.5, 1)))
OPEN, NO, YES = 1, 6, 7  # LLaVA-RLHF's caption_type: the kind of question and its right answer


def sample(
    model: LLaVA, tokenizer: Tokenizer, settings: ImageSettings, scenes: list[world.Scene],
    rng: Random, temperature: float, samples: int,
) -> Iterator[tuple[world.Scene, Image.Image, str, list[str]]]:
    """Have the model describe scenes; yield (scene, picture, question, completions)."""
    questions = [rng.choice(world.DESCRIBE_PROMPTS_TRAIN) for _ in scenes]
    pictures = [world.draw(scene, settings.size) for scene in scenes]
    texts = answers(
        model, tokenizer, settings, pictures, questions, temperature=temperature, samples=samples,
        seed=rng.randrange(2**31),
    )
    for i, (scene, picture, question) in enumerate(zip(scenes, pictures, questions)):
        yield scene, picture, question, texts[i * samples : (i + 1) * samples]


def corrections(
    model: LLaVA, tokenizer: Tokenizer, settings: ImageSettings, folder: Path,
    count: int, seed: int, overlook: float = 0.0, noise: float = 0.0,
) -> Path:
    """Sample descriptions, correct the false ones and write both (RLHF-V, section 3.1).

    Args:
        folder: gets `corrections.jsonl` and `images/`.
        count: corrections wanted; completions in which the annotator finds nothing to correct are
            skipped.
        seed: decides scenes, wordings and sampling.
        overlook, noise: rates of the annotator's mistakes (`world.careless`); 0: none.

    Returns:
        The path of the JSONL file. Its rows are those of the RLHF-V data: image, question, chosen
        (the corrected completion) and rejected (the original).

    Raises:
        ValueError: a rate is out of range, or the model hardly hallucinates.
    """
    if not 0 <= overlook < 1 or not 0 <= noise <= 1:
        raise ValueError(
            f"--overlook and --noise are shares: 0 <= {overlook} < 1, 0 <= {noise} <= 1")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng, annotator = Random(f"corrections {seed}"), Random(f"annotator {seed}")
    rows, asked, chunk = [], 0, min(CHUNK, 8 * count)
    while len(rows) < count:
        if asked >= 20 * count:
            raise ValueError(f"only {len(rows)} of {asked} completions contained a hallucination")
        scenes = [world.make_scene(f"corrections {seed} {asked + i}") for i in range(chunk)]
        sampled = sample(model, tokenizer, settings, scenes, rng, TEMPERATURE, 1)
        for i, (scene, picture, question, (completion,)) in enumerate(sampled, asked):
            if not world.hallucinations(scene, completion):
                continue
            taken = world.careless(scene, completion, annotator, overlook, noise)
            corrected = world.correct(taken, completion)
            if corrected.strip() and corrected != completion and len(rows) < count:
                picture.save(folder / "images" / f"{i:06}.png")
                rows.append({"image": f"{i:06}.png", "question": question,
                             "chosen": corrected, "rejected": completion})
        asked += chunk
    path = folder / "corrections.jsonl"
    write_atomic(path, jsonl(rows))
    return path


def rankings(
    model: LLaVA, tokenizer: Tokenizer, settings: ImageSettings, folder: Path,
    count: int, seed: int, noise: float = 0.1, split: str = "train",
) -> Path:
    """Sample two descriptions per scene, rank them and write them (LLaVA-RLHF, section 2.2).

    Args:
        folder: gets `preferences.json` in LLaVA-Human-Preference-10K's format,
            `image_to_caption.json` and `images/`.
        count: ranked pairs wanted; pairs of equal merit, between which people could not decide
            either, and pairs with an empty completion are skipped.
        seed: decides scenes, wordings and sampling.
        noise: how often the worse completion is preferred; 0: never.
        split: of the scenes, "train" or "test".

    Returns:
        The path of `preferences.json`.

    Raises:
        ValueError: the rate is out of range, or the model's completions of one prompt hardly ever
            differ in merit.
    """
    if not 0 <= noise <= 1:
        raise ValueError(f"--noise is a share: 0 <= {noise} <= 1")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = Random(f"rankings {split} {seed}")
    rows, captions, asked, chunk = [], {}, 0, min(CHUNK, 8 * count)
    while len(rows) < count:
        if asked >= 20 * count:
            raise ValueError(f"only {len(rows)} of {asked} pairs of completions differed in merit")
        scenes = [world.make_scene(f"rankings {seed} {asked + i}", split) for i in range(chunk)]
        sampled = sample(model, tokenizer, settings, scenes, rng, 1.0, 2)
        for i, (scene, picture, question, pair) in enumerate(sampled, asked):
            if len(rows) == count or not all(text.strip() for text in pair):
                continue
            if world.merit(scene, pair[0]) == world.merit(scene, pair[1]):
                continue
            image = f"{i:06}.png"
            picture.save(folder / "images" / image)
            captions[image] = world.facts(scene)
            rows.append({
                "id": f"{split} {i}", "image": image,
                "conversations": conversation(question, pair[0]),
                "output_1": {"from": "gpt", "value": pair[0]},
                "output_2": {"from": "gpt", "value": pair[1]},
                "preference": 1 + world.rank(scene, *pair, rng, noise),
                "hallucination": any(world.hallucinations(scene, text) for text in pair),
            })
        asked += chunk
    write_atomic(folder / "image_to_caption.json", captions)
    write_atomic(folder / "preferences.json", rows)
    return folder / "preferences.json"


def conversation(
    question: str, answer: str | None = None, image: bool = True
) -> list[dict[str, str]]:
    """Return a question (with its image), and its answer if given, as LLaVA's files have them."""
    turns = [{"from": "human", "value": f"{IMAGE}\n" * image + question}]
    return turns + [{"from": "gpt", "value": answer}] * (answer is not None)


def conversations(
    settings: ImageSettings, folder: Path, count: int, seed: int, about: str
) -> Path:
    """Write conversations of a supervised stage, in LLaVA's format.

    Args:
        folder: gets `conversations.json` and `images/`.
        count: conversations, one per picture.
        about: "questions": four, with true short answers; "descriptions": what the noisy annotator
            writes; "cropped": the same text beside a random crop of the picture, at least CROP of
            its area, enlarged to the full size.

    Returns:
        The path of `conversations.json`.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng, rows = Random(f"conversations {seed}"), []
    for i in range(count):
        scene = world.make_scene(f"conversations {seed} {i}")
        picture = world.draw(scene, settings.size)
        if about == "questions":
            turns = [(asked.text, asked.answer) for asked in world.questions(scene, rng, 4)]
        else:
            turns = [(rng.choice(world.DESCRIBE_PROMPTS_TRAIN), world.annotate(scene, rng))]
        if about == "cropped":
            cut = Random(f"crop {seed} {i}")
            side = round(settings.size * cut.uniform(CROP, 1) ** 0.5)
            left, top = (cut.randint(0, settings.size - side) for _ in range(2))
            part = picture.crop((left, top, left + side, top + side))
            picture = part.resize(picture.size, Image.Resampling.BICUBIC)
        picture.save(folder / "images" / f"{i:06}.png")
        said = [turn for j, (asked, answer) in enumerate(turns)
                for turn in conversation(asked, answer, image=j == 0)]
        rows.append({"id": str(i), "image": f"{i:06}.png", "conversations": said})
    write_atomic(folder / "conversations.json", rows)
    return folder / "conversations.json"


def prompts(settings: ImageSettings, folder: Path, count: int, seed: int) -> Path:
    """Write the prompts of PPO's rollouts: three ask for a description, one a yes/no question.

    Args:
        folder: gets `prompts.json` in LLaVA-RLHF's format, `image_to_caption.json`, `images/`, and
            `image_to_scene.json`: the scenes' seeds, to compare completions with the truth.

    Returns:
        The path of `prompts.json`.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = Random(f"prompts {seed}")
    rows, captions, seeds = [], {}, {}
    for i in range(count):
        image = f"{i:06}.png"
        seeds[image] = f"prompts {seed} {i}"
        scene = world.make_scene(seeds[image])
        world.draw(scene, settings.size).save(folder / "images" / image)
        captions[image] = world.facts(scene)
        question, kind = rng.choice(world.DESCRIBE_PROMPTS_TRAIN), OPEN
        if i % 4 == 3:
            asked = world.question(scene, "exists", rng)
            question, kind = asked.text, YES if asked.answer.startswith("Yes") else NO
        rows.append({"id": str(i), "image": image, "conversations": conversation(question),
                     "caption_type": kind, "length_bonus": 1.0})
    write_atomic(folder / "image_to_scene.json", seeds)
    write_atomic(folder / "image_to_caption.json", captions)
    write_atomic(folder / "prompts.json", rows)
    return folder / "prompts.json"


class Oracle:
    """Find and correct what is false in completions of the built-in world's prompts."""

    def __init__(self, folder: Path):
        """Read the scenes' seeds from a folder that `prompts` wrote."""
        self.seeds = read_json(folder / "image_to_scene.json")
        self.scene = lru_cache(maxsize=None)(lambda picture: world.make_scene(self.seeds[picture]))

    def false_parts(self, example: Example, text: str) -> list[str]:
        if example.truth:
            return [] if text.lower().startswith(example.truth.lower()) else [text]
        spans = world.hallucinations(self.scene(example.picture), text)
        return [text[span.start : span.end] for span in spans]

    def correct(self, example: Example, text: str) -> str | None:
        """Return the text made true; None for short questions, which annotators do not correct."""
        return None if example.truth else world.correct(self.scene(example.picture), text)
