"""A run's data: the user's rows, or the built-in world's feedback.

The built-in world's feedback is collected once, kept in runs/world and reused; the folder's name
contains base and seed. A user's own rows take the same path.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import parallel
from algorithm import Algorithm, Data, Start
from config import Run, Training
from data import Example, check_lengths
from evaluation import blind_baselines, memory_estimate, save_pairs, show_rows
from formats import (
    DataError, captions_of, encode_images, find_device, open_image, read_captions,
    read_conversations, read_pairs, read_prompts, report_skipped,
)
from formats.files import lock_folder
from formats.opening import open_model
from formats.rows import LISTED, refuse, skipping
from model import LLaVA
from recipes import WORLD, load_start, model_path, select_weights
from world import feedback

READERS = {"pairs": read_pairs, "conversations": read_conversations, "rankings": read_pairs,
           "prompts": read_prompts}


def read_data(start: Start, config: Training, algorithm: type[Algorithm]) -> Data:
    """Read an algorithm's data: the user's rows, or the built-in world's feedback."""
    run, kind = start.run, algorithm.reads
    if not kind:
        return Data([])
    if run.on_world():
        return world_data(start, config, algorithm)
    rows, examples = read_examples(start, config, algorithm, run.data, run.images, config.captions)
    if kind == "pairs":
        parallel.once(lambda: save_pairs(start.folder, rows, examples, start.tokenizer))
    if kind != "rankings":
        return Data(examples)
    Random(f"held out {run.seed}").shuffle(examples)
    held_out = min(config.held_out, len(examples) // 10)
    return Data(examples[held_out:], examples[:held_out])


def world_data(start: Start, config: Training, algorithm: type[Algorithm]) -> Data:
    """Read the built-in world's feedback; collect it first if it is not there yet."""
    def read(folder: Path, file: str):
        return read_examples(start, config, algorithm, [folder / file], folder / "images",
                             folder / "image_to_caption.json")

    if algorithm.reads == "prompts":
        folder = WORLD / f"prompts-{config.prompts}-{start.run.seed}-{start.images.size}"
        parallel.once(lambda: collect(
            folder, "prompts.json", f"{config.prompts} prompts", lambda: feedback.prompts(
                start.images, folder, config.prompts, start.run.seed)))
        oracle, examples = feedback.Oracle(folder), read(folder, "prompts.json")[1]
        return Data(examples, false_parts=oracle.false_parts, correct=oracle.correct)
    if algorithm.reads == "rankings":
        train, test = parallel.once(lambda: (
            world_rankings(start, "train", config.rankings, config.noise),
            world_rankings(start, "test", config.held_out, 0.0)))
        return Data(*(read(folder, "preferences.json")[1] if folder else []
                      for folder in (train, test)))
    path = parallel.once(lambda: world_file(start, config))
    rows, examples = read(path.parent, path.name)
    if algorithm.reads == "pairs":
        parallel.once(lambda: save_pairs(start.folder, rows, examples, start.tokenizer))
    return Data(examples)


def world_file(start: Start, config: Training) -> Path:
    """Return the file of the feedback that --feedback names; collect it if it is not there yet."""
    if config.feedback == "corrections":
        return world_corrections(start, config) / "corrections.jsonl"
    if config.feedback == "rankings":
        return (world_rankings(start, "train", config.corrections, config.noise)
                / "preferences.json")
    folder = WORLD / f"{config.feedback}-{start.run.seed}-{config.corrections}-{start.images.size}"
    return collect(
        folder, "conversations.json", f"{config.corrections} conversations",
        lambda: feedback.conversations(start.images, folder, config.corrections, start.run.seed,
                                       config.feedback)) / "conversations.json"


def unsharded(start: Start) -> LLaVA:
    """Return the whole model, for one process that works while the others wait."""
    if parallel.world() == 1:
        return start.model
    path = model_path(start.run, "base")
    return open_model(path, start.device, start.model.head.weight.dtype, start.run.tower,
                      sharded=False)[0]


def world_corrections(start: Start, config: Training) -> Path:
    """Return the folder of corrections of this base's own answers."""
    count, seed = config.corrections, start.run.seed
    folder = WORLD / f"corrections-{start.key}-{seed}-{count}"
    if config.overlook or config.noise:
        folder = folder.with_name(f"{folder.name}-{config.overlook:g}-{config.noise:g}")
    return collect(folder, "corrections.jsonl", f"{count} corrections of the base's answers",
                   lambda: feedback.corrections(unsharded(start), start.tokenizer, start.images,
                                                folder, count, seed, config.overlook,
                                                config.noise))


def collect(folder: Path, last: str, what: str, make: Callable[[], Path]) -> Path:
    """Make data in a folder, unless its last file is there; wait if another process makes it."""
    with lock_folder(folder, wait=True):
        if not (folder / last).exists():
            print(f"collecting {what} in {folder}", file=sys.stderr)
            make()
    return folder


def world_rankings(start: Start, split: str, count: int, noise: float) -> Path | None:
    """Return the folder of ranked pairs of this base's own answers; None for no pairs."""
    if not count:
        return None
    folder = WORLD / f"rankings-{split}-{count}-{noise}-{start.key}-{start.run.seed}"
    return collect(folder, "preferences.json", f"{count} ranked pairs of the base's answers",
                   lambda: feedback.rankings(unsharded(start), start.tokenizer, start.images,
                                             folder, count, start.run.seed, noise, split))


def read_examples(
    start: Start, config: Training, algorithm: type[Algorithm], paths: list, images,
    captions: str | Path | None, encode: bool = True,
) -> tuple[list, list[Example]]:
    """Return every usable row of the data, and the example made of it.

    Args:
        images: folder that the rows' image names are relative to.
        captions: image_to_caption.json, read where the config asks for facts.
        encode: False, for a dry run, only tries to open the images.

    Raises:
        DataError: lists bad rows (with --skip_bad_rows they are left out), or no row is usable.
    """
    if config.facts and not captions:
        raise ValueError("--facts needs captions of the images: --captions image_to_caption.json")
    known = read_captions(captions) if config.facts else None
    keep, skipped = start.run.skip_bad_rows, []
    model, patches = start.model, start.model.config.vision.patches
    rows, made, features, failed = [], [], None, None
    for row in READERS[algorithm.reads](paths, images, skipped if keep else None):
        with skipping(skipped):
            prompt, responses = algorithm.tokens(row, start.tokenizer, patches, config)
            facts = () if known is None else captions_of(
                row.name, row.image, known, row.facts_prefix)
            for each in (responses, algorithm.read_as(responses, facts, start.tokenizer, config)):
                check_lengths(row.name, prompt, each, model.config.text.max_position_embeddings)
            rows.append(row)
            made.append((prompt, responses, row.question, facts))
    if not keep:
        refuse(skipped)
    if encode:
        named = [(row.name, row.image) for row in rows]
        try:
            with start.autocast():
                features = encode_images(model, start.images, named, start.folder, not keep)
        except DataError as error:  # the first image that cannot be read; are there others?
            encode, failed = False, error
    usable, examples = [], []
    for i, row in enumerate(rows):
        with skipping(skipped):
            if not encode and row.image is not None:
                open_image(row.name, row.image)
            image, content = (features[i], features.digest(i)) if encode else (None, "")
            examples.append(Example(row.name, image, *made[i], row.truth, row.length_bonus,
                                    row.picture, row.image, content))
            usable.append(row)
        if not keep:
            refuse(skipped, LISTED + 1)
    if not keep:
        refuse(skipped)
    if failed:
        raise failed
    report_skipped(skipped)
    if not examples:
        raise DataError("no usable row is left")
    return usable, examples


def preview(run: Run, config: Training, algorithm: type[Algorithm]) -> None:
    """Print the rows that a run would train on, and the memory that it would need."""
    world = run.on_world()
    shown = {"pairs", "conversations"} if world else {"pairs", "conversations", "rankings"}
    if algorithm.reads not in shown:
        return
    start = load_start(run, config, algorithm, find_device(run.device), Path(run.out))
    paths, images = run.data, run.images
    if world:
        path = world_file(start, config)
        paths, images = [path], path.parent / "images"
    rows, examples = read_examples(
        start, config, algorithm, paths, images, config.captions, encode=False)
    show_rows(examples, start.tokenizer)
    select_weights(start, algorithm)
    named = [(row.name, row.image) for row in rows]
    print(memory_estimate(start.model, config, examples, named, 2 if start.bfloat16 else 4))


def blind(
    start: Start, config: Training, algorithm: type[Algorithm], before: tuple, after: tuple
) -> dict[str, tuple[dict, list[dict]]]:
    """Measure the blind baselines of a run on the built-in world: {name: (metrics, records)}."""
    if not start.run.on_world() or algorithm.reads == "rankings":
        return {}
    corrections = []
    if algorithm.reads != "prompts" and config.feedback == "corrections":
        folder = world_corrections(start, config)
        rows = read_pairs([folder / "corrections.jsonl"], folder / "images", None)
        corrections = [(row.chosen, row.rejected) for row in rows]
    return blind_baselines(before[1], after[1], corrections)
