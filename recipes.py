"""What a run starts from: the runs that come first, a model, and data.

The built-in world's models and feedback are made once, kept in runs/world and reused; their names
say which model and seed they belong to. A user's own model and data take the same path.
"""

import contextlib
import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch

import parallel
import sharding
import world
from algorithm import Algorithm, Data, Start
from config import Run, Training
from data import Example, check_lengths
from evaluation import (
    blind_baselines, measure_world, memory_estimate, read_results, save_pairs, show_rows,
    with_intervals, write_results,
)
from formats import (
    DataError, Prompt, captions_of, encode_images, find_device, fingerprint,
    load_llava, not_finite, open_image, read_captions, read_conversations, read_pairs, read_prompts,
    report_skipped,
)
from formats.files import lock_folder
from formats.opening import open_model, parameter_count
from formats.rows import LISTED, refuse, skipping
from formats.runs import settings_of, settings_of_run
from lora import add_adapter, lora_layers, select_trainable
from model import LLaVA
from world import feedback, pretraining

LARGE = 1e9  # parameters, from which the papers' learning rates for 7B and 13B apply
WORLD = Path("runs/world")  # what the built-in world's runs make and reuse
SHIPPED = {name: Path(world.__file__).parent / name for name in ("base", "rm_init")}
READERS = {"pairs": read_pairs, "conversations": read_conversations, "rankings": read_pairs,
           "prompts": read_prompts}

# --------------------------------------------------------------------------------- what comes first


def plan(
    run: Run, config: Training, algorithms: Mapping[str, type[Algorithm]]
) -> list[tuple[Run, Training]]:
    """The runs that have to be done, in order: those that this one depends on, then itself.

    Made from settings and the names of files, before anything is locked or loaded.
    """
    steps = []
    if parallel.world() > 1 and not algorithms[run.algo].reads:
        raise ValueError(f"--algo {run.algo} runs in one process: python train.py")
    for name in algorithms[run.algo].depends(config):
        folder = dependency(name, run, config)
        if folder is None or (folder / "model" / "config.json").exists():
            continue
        first = Run(algo=name, seed=run.seed, device=run.device, dtype=run.dtype,
                    from_scratch=run.from_scratch, test_scenes=0)
        if name == "rm":
            first = replace(run, algo=name, dry_run=False)
        settings = algorithms[name].Config(**({"facts": config.facts} if name == "rm" else {}))
        settings = with_rate(first, settings)
        first = replace(first, out=str(folder), resume=False, overwrite=False)
        begun = settings_of_run(folder)
        same = begun == settings_of(first, settings)  # else that of a killed run is in the way
        first = replace(first, resume=same, overwrite=begun is not None and not same)
        steps += [step for step in plan(first, settings, algorithms) if step not in steps]
    return [*steps, (run, with_rate(run, config))]


def with_rate(run: Run, config: Training) -> Training:
    """The settings with a learning rate, where neither the user nor the algorithm has one."""
    if config.learning_rate is not None:
        return config
    return replace(config, learning_rate=config.rates[method(run)])


def method(run: Run) -> str:
    """What is trained, as far as learning rates depend on it: a key of `Training.rates`."""
    if run.lora:
        return "lora"
    large = run.model and parameter_count(run.model, run.tower) >= LARGE
    return "large" if large else "small"


def choice(run: Run, config: Training, given: Training) -> str:
    """Say which settings were chosen and not given, and why; "": none."""
    why = {"lora": "LoRA's", "large": "that for all of a model of 1B and more parameters",
           "small": "that for all of a small model"}[method(run)]
    said = []
    if given.learning_rate is None:
        said.append(f"learning rate {config.learning_rate:g}, {why} (--learning_rate)")
    if run.lora and run.lora_alpha is None:
        said.append(f"alpha {run.alpha:g}, twice the rank (--lora_alpha)")
    return "; ".join(said)


def dependency(name: str, run: Run, config: Training) -> Path | None:
    """The folder of a built-in run that `run` depends on; None if what it makes is given."""
    if name == "rm":
        return None if config.reward_model else reward_folder(run, config)
    if run.model or name in SHIPPED and not run.from_scratch:
        return None
    if name == "rm_init" and not starts_from_rm_init(run):
        return None
    return WORLD / (name if run.seed == 0 else f"{name}-seed{run.seed}")


def starts_from_rm_init(run: Run) -> bool:
    """Whether a reward model starts from the built-in initialisation and not from the base.

    So small a base as the built-in one cannot compare an answer with captions. With LoRA the reward
    model has to lie over the base itself, as the policy does.
    """
    return not run.model and run.on_world() and not run.lora


def reward_folder(run: Run, config: Training) -> Path:
    """The folder of the reward model's run."""
    if config.reward_model:
        return Path(config.reward_model)
    if not run.on_world():
        raise ValueError(f"--algo {run.algo} needs a reward model: --reward_model with the folder "
                         "of a run of python train.py --algo rm")
    kind = "facts" if config.facts else "plain"
    kind += f"-lora{run.lora}" if run.lora else ""
    if run.model:  # its name for people, and what tells folders of one name apart
        path = Path(run.model).resolve()
        kind += f"-{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:6]}"
    return WORLD / f"rm-{kind}-{run.seed}"


# -------------------------------------------------------------------------------------------- model


def model_path(run: Run, name: str) -> Path:
    """The folder of a model to start from: the user's, the shipped one, or one made here."""
    if run.model and name != "rm_init":
        return Path(run.model)
    made = dependency(name, run, Training())
    return made / "model" if made else SHIPPED[name]


def load_start(
    run: Run, config: Training, algorithm: type[Algorithm], device: torch.device, folder: Path
) -> Start:
    """The model that a run starts from. A base that LoRA leaves frozen is kept in bfloat16."""
    if not algorithm.first:
        model, tokenizer, images = pretraining.fresh_model(WORLD / "tokenizer.model", run.seed)
        return Start(run, model.to(device), tokenizer, images, folder)
    half = run.lora and run.use_bfloat16(device.type)
    dtype = torch.bfloat16 if half else torch.float32
    path = model_path(run, algorithm.first[0])
    model, tokenizer, images = open_model(path, device, dtype, run.tower)
    if bad := not_finite(model.named_parameters()):
        raise ValueError(f"{path}: NaN or infinity in the weights ({', '.join(bad[:4])}); "
                         "download or train them again")
    model.decoder.gradient_checkpointing = run.gradient_checkpointing
    if run.image_mode != "auto":
        images = replace(images, mode=run.image_mode)
    reward_model = reward_folder(run, config) if "rm" in algorithm.depends(config) else None
    return Start(run, model, tokenizer, images, folder, fingerprint(model), reward_model)


def select_weights(start: Start, algorithm: type[Algorithm]) -> None:
    """Choose what is trained: a new adapter, or decoder, projector and head themselves."""
    run = start.run
    if "rm_init" in algorithm.first and starts_from_rm_init(run):
        start.model, _, _ = load_llava(model_path(run, "rm_init"), start.device, torch.float32)
        start.model.decoder.gradient_checkpointing = run.gradient_checkpointing
    adapter = "default" if run.lora else None
    if adapter:
        add_adapter(start.model, adapter, run.lora, run.alpha, seed=run.seed)
        for module in lora_layers(start.model, adapter):
            module.active = adapter
        sharding.shard_adapter(start.model, adapter)
    select_trainable(start.model, adapter)


# --------------------------------------------------------------------------------------------- data


def read_data(start: Start, config: Training, algorithm: type[Algorithm]) -> Data:
    """What an algorithm learns from: the user's rows, or the built-in world's feedback."""
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
    """The built-in world's feedback, collected if it is not there yet."""
    def read(folder: Path, file: str):
        return read_examples(start, config, algorithm, [folder / file], folder / "images",
                             folder / "image_to_caption.json")

    if algorithm.reads == "prompts":
        folder = WORLD / f"prompts-{config.prompts}-{start.run.seed}"
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
    if config.feedback == "rankings":
        folder = parallel.once(
            lambda: world_rankings(start, "train", config.corrections, config.noise))
        rows, examples = read(folder, "preferences.json")
    else:
        folder = parallel.once(lambda: world_corrections(start, config))
        rows, examples = read(folder, "corrections.jsonl")
    if algorithm.reads == "pairs":
        parallel.once(lambda: save_pairs(start.folder, rows, examples, start.tokenizer))
    return Data(examples)


def unsharded(start: Start) -> LLaVA:
    """The whole model for one process that works while the others wait."""
    if parallel.world() == 1:
        return start.model
    path = model_path(start.run, "base")
    return load_llava(path, start.device, start.model.head.weight.dtype, start.run.tower,
                      sharded=False)[0]


def world_corrections(start: Start, config: Training) -> Path:
    """The folder of corrections of this base's own answers."""
    count, seed = config.corrections, start.run.seed
    folder = WORLD / f"corrections-{start.base[:8]}-{seed}-{count}"
    if config.overlook or config.noise:
        folder = folder.with_name(f"{folder.name}-{config.overlook:g}-{config.noise:g}")
    return collect(folder, "corrections.jsonl", f"{count} corrections of the base's answers",
                   lambda: feedback.corrections(unsharded(start), start.tokenizer, start.images,
                                                folder, count, seed, config.overlook,
                                                config.noise))


def collect(folder: Path, last: str, what: str, make: Callable[[], Path]) -> Path:
    """Make data in a folder, unless its last file is there. Waits while another process makes it."""
    with lock_folder(folder, wait=True):
        if not (folder / last).exists():
            print(f"collecting {what} in {folder}", file=sys.stderr)
            make()
    return folder


def world_rankings(start: Start, split: str, count: int, noise: float) -> Path | None:
    """The folder of ranked pairs of this base's own answers; None for no pairs."""
    if not count:
        return None
    folder = WORLD / f"rankings-{split}-{count}-{noise}-{start.base[:8]}-{start.run.seed}"
    return collect(folder, "preferences.json", f"{count} ranked pairs of the base's answers",
                   lambda: feedback.rankings(unsharded(start), start.tokenizer, start.images,
                                             folder, count, start.run.seed, noise, split))


def read_examples(
    start: Start, config: Training, algorithm: type[Algorithm], paths: list, images,
    captions: str | Path | None, encode: bool = True,
) -> tuple[list, list[Example]]:
    """Every usable row of the data, and the example made of it.

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
            check_lengths(row.name, prompt, responses, model.config.text.max_position_embeddings)
            facts = () if known is None else captions_of(
                row.name, row.image, known, row.facts_prefix)
            rows.append(row)
            made.append((prompt, responses, row.question, facts))
    if not keep:
        refuse(skipped)
    if encode:
        named = [(row.name, row.image) for row in rows]
        try:
            features = encode_images(model, start.images, named, start.folder, stop=not keep)
        except DataError as error:  # the first image that cannot be read; are there others?
            encode, failed = False, error
    usable, examples = [], []
    for i, row in enumerate(rows):
        with skipping(skipped):
            if not encode and row.image is not None:
                open_image(row.name, row.image)
            if not keep:
                refuse(skipped, LISTED)
            image = features[i] if encode else None
            rules = (row.truth, row.length_bonus) if isinstance(row, Prompt) else (None, 1.0)
            examples.append(Example(row.name, image, *made[i], *rules, row.picture, row.image))
            usable.append(row)
    if not keep:
        refuse(skipped)
    if failed:
        raise failed
    report_skipped(skipped)
    if not examples:
        raise DataError("no usable row is left")
    return usable, examples


def preview(run: Run, config: Training, algorithm: type[Algorithm]) -> None:
    """Print the rows that a run would train on, and the memory that it would take."""
    if algorithm.reads not in ("pairs", "conversations"):
        return
    start = load_start(run, config, algorithm, find_device(run.device), Path(run.out))
    paths, images = run.data, run.images
    if run.on_world():
        folder = world_corrections(start, config)
        paths, images = [folder / "corrections.jsonl"], folder / "images"
    rows, examples = read_examples(start, config, algorithm, paths, images, None, encode=False)
    show_rows(examples, start.tokenizer)
    select_weights(start, algorithm)
    named = [(row.name, row.image) for row in rows]
    print(memory_estimate(start.model, config, examples, named, 2 if start.bfloat16 else 4))


# ---------------------------------------------------------------------------------------- measuring


def measure(start: Start, algorithm: Algorithm, trained: bool) -> tuple[dict, list[dict]] | None:
    """(metrics, records) before or after training; None where there is nothing to measure."""
    run = start.run

    def on_world() -> tuple[dict, list[dict]] | None:
        if not run.test_scenes or not run.on_world():
            return None
        path = WORLD / f"before-{start.base[:8]}-{run.test_scenes}.json"  # shared by all runs
        if trained or not parallel.once(path.exists):
            with sharding.gathered(start.model):
                found = parallel.once(lambda: measure_world(
                    start.model, start.tokenizer, start.images, run.test_scenes))
            if trained:
                return found
            path.parent.mkdir(parents=True, exist_ok=True)
            parallel.once(lambda: write_results(path, {"after": found}))
        return read_results(path)["after"]

    def means(values: dict[str, np.ndarray]) -> dict:
        return with_intervals(
            {name: [(1, each, np.ones(len(each)))] for name, each in values.items()})

    # Gathered weights are in the dtype of products, as autocast expects them.
    with start.autocast() if parallel.world() > 1 else contextlib.nullcontext():
        return algorithm.measure(on_world, means)


def blind(
    start: Start, config: Training, algorithm: type[Algorithm], before: tuple, after: tuple
) -> dict[str, tuple[dict, list[dict]]]:
    """The blind baselines of a run on the built-in world, as {name: (metrics, records)}."""
    if not start.run.on_world() or algorithm.reads == "rankings":
        return {}
    corrections = []
    if algorithm.reads != "prompts" and config.feedback == "corrections":
        folder = world_corrections(start, config)
        rows = read_pairs([folder / "corrections.jsonl"], folder / "images", None)
        corrections = [(row.chosen, row.rejected) for row in rows]
    return blind_baselines(before[1], after[1], corrections)
