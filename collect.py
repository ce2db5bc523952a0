"""Feedback on a model's own answers, gathered on the built-in world and kept as a user's files.

The people of the papers are played by the world's oracles. What they say is written as the plain
formats that `data.py` reads from anybody: a JSONL file and a folder of images beside it. So the
built-in data takes the same path as real data, and can be looked at and edited with any tool.
"""

import json
from pathlib import Path
from random import Random

import world
from ask import answers
from data import IMAGE, Tokenizer
from files import write_atomic
from model import LLaVA
from vision import ImageSettings

TEMPERATURE = 0.5  # answers as the model usually gives them, with some variety
CHUNK = 200  # scenes answered before it is known how many of the answers were false
OPEN, NO, YES = 1, 6, 7  # LLaVA-RLHF's caption_type: what is asked, and the right answer


def corrections(
    model: LLaVA, tokenizer: Tokenizer, settings: ImageSettings, folder: Path,
    count: int, seed: int,
) -> Path:
    """Sample descriptions, have the false ones corrected, write them down (RLHF-V, section 3.1).

    Args:
        folder: gets `corrections.jsonl` and `images/`.
        count: corrections wanted; answers without a hallucination need none and are passed over.
        seed: decides scenes, wordings and sampling.

    Returns:
        The path of the JSONL file, rows as the RLHF-V data has them: image, question, chosen (the
        corrected answer), rejected (the model's own).

    Raises:
        ValueError: the model hardly hallucinates; there is nothing to correct.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = Random(f"corrections {seed}")
    rows, asked = [], 0
    while len(rows) < count:
        if asked >= 20 * count:
            raise ValueError(f"only {len(rows)} of {asked} answers contained a hallucination")
        scenes = [world.make_scene(f"corrections {seed} {asked + i}") for i in range(CHUNK)]
        questions = [rng.choice(world.DESCRIBE_PROMPTS_TRAIN) for _ in scenes]
        said = answers(
            model, tokenizer, settings, [world.draw(scene, settings.size) for scene in scenes],
            questions, temperature=TEMPERATURE, seed=rng.randrange(2**31),
        )
        for i, (scene, question, answer) in enumerate(zip(scenes, questions, said)):
            corrected = world.correct(scene, answer)
            if corrected.strip() and corrected != answer and len(rows) < count:
                image = f"{asked + i:06}.png"
                world.draw(scene, settings.size).save(folder / "images" / image)
                rows.append({"image": image, "question": question,
                             "chosen": corrected, "rejected": answer})
        asked += CHUNK
    path = folder / "corrections.jsonl"
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def rankings(
    model: LLaVA, tokenizer: Tokenizer, settings: ImageSettings, folder: Path,
    count: int, seed: int, noise: float = 0.1, split: str = "train",
) -> Path:
    """Sample two descriptions each, have them ranked, write them down (LLaVA-RLHF, section 2.2).

    Args:
        folder: gets `preferences.json` in LLaVA-Human-Preference-10K's format,
            `image_to_caption.json` and `images/`.
        count: ranked pairs wanted; pairs that are equally good are passed over, as people could not
            tell either, and so are empty answers.
        seed: decides scenes, wordings and sampling.
        noise: how often the worse answer is taken for the better; 0 for an exact measure.
        split: of the scenes, "train" or "test".

    Returns:
        The path of `preferences.json`.

    Raises:
        ValueError: the model's answers to one question hardly ever differ in merit.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = Random(f"rankings {split} {seed}")
    rows, captions, asked = [], {}, 0
    while len(rows) < count:
        if asked >= 20 * count + CHUNK:
            raise ValueError(f"only {len(rows)} of {asked} pairs of answers differed in merit")
        scenes = [world.make_scene(f"rankings {seed} {asked + i}", split) for i in range(CHUNK)]
        questions = [rng.choice(world.DESCRIBE_PROMPTS_TRAIN) for _ in scenes]
        said = answers(
            model, tokenizer, settings, [world.draw(scene, settings.size) for scene in scenes],
            questions, temperature=1.0, samples=2, seed=rng.randrange(2**31),
        )
        for i, (scene, question) in enumerate(zip(scenes, questions)):
            pair = said[2 * i : 2 * i + 2]
            if len(rows) == count or not all(answer.strip() for answer in pair):
                continue
            if world.merit(scene, pair[0]) == world.merit(scene, pair[1]):
                continue
            image = f"{asked + i:06}.png"
            world.draw(scene, settings.size).save(folder / "images" / image)
            captions[image] = world.facts(scene, rng)
            false = [bool(world.hallucinations(scene, answer)) for answer in pair]
            rows.append({
                "id": f"{split} {asked + i}", "image": image,
                "conversations": conversation(question, pair[0]),
                "output_1": {"from": "gpt", "value": pair[0]},
                "output_2": {"from": "gpt", "value": pair[1]},
                "preference": 1 + world.rank(scene, *pair, rng, noise), "hallucination": any(false),
            })
        asked += CHUNK
    write_atomic(folder / "image_to_caption.json", captions)
    write_atomic(folder / "preferences.json", rows)
    return folder / "preferences.json"


def conversation(question: str, answer: str | None = None) -> list[dict]:
    """One question about an image, and its answer, as LLaVA's files have them."""
    turns = [{"from": "human", "value": f"{IMAGE}\n{question}"}]
    return turns + [{"from": "gpt", "value": answer}] * (answer is not None)


def prompts(settings: ImageSettings, folder: Path, count: int, seed: int) -> Path:
    """What PPO's policy shall answer: three descriptions to one yes/no question.

    Args:
        folder: gets `prompts.json` in LLaVA-RLHF's format, `image_to_caption.json`, `images/`, and
            `image_to_scene.json`, the seeds of the scenes: answers can be compared with the truth.

    Returns:
        The path of `prompts.json`.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = Random(f"prompts {seed}")
    rows, captions, scenes = [], {}, {}
    for i in range(count):
        image, scenes[f"{i:06}.png"] = f"{i:06}.png", f"prompts {seed} {i}"
        scene = world.make_scene(scenes[image])
        world.draw(scene, settings.size).save(folder / "images" / image)
        captions[image] = world.facts(scene, rng)
        question, kind = rng.choice(world.DESCRIBE_PROMPTS_TRAIN), OPEN
        if i % 4 == 3:
            asked = world.question(scene, "exists", rng)
            question, kind = asked.text, YES if asked.answer.startswith("Yes") else NO
        rows.append({"id": str(i), "image": image, "conversations": conversation(question),
                     "caption_type": kind, "length_bonus": 1.0})
    write_atomic(folder / "image_to_scene.json", scenes)
    write_atomic(folder / "image_to_caption.json", captions)
    write_atomic(folder / "prompts.json", rows)
    return folder / "prompts.json"
