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
from data import Tokenizer
from files import write_atomic
from model import LLaVA
from vision import ImageSettings

TEMPERATURE = 0.5  # answers as the model usually gives them, with some variety
CHUNK = 200  # scenes answered before it is known how many of the answers were false


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
