"""What a run starts from: a model, data, and whatever the built-in world has to make first.

The built-in world's models, corrections and measures are kept in runs/world and reused; their names
say which model and seed they belong to. A user's own model and data take the same path from there.
"""

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import collect
import data
import ddpo
import evaluate
import features
import readers
import sft
from checkpoint import fingerprint, load_llava
from config import Run
from files import read_json, write_atomic
from model import LLaVA, init_weights
from rows import DataError, open_image, skipping
from vision import ImageSettings

BASE = Path(__file__).parent / "base"  # the built-in world's base model, shipped
WORLD = Path("runs/world")  # what the built-in world's steps make and reuse


def fresh_model(run: Run) -> tuple[LLaVA, data.Tokenizer, ImageSettings]:
    """The built-in world's model with random weights, and its tokenizer, trained at first use."""
    path = WORLD / "tokenizer.model"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        data.train_tokenizer(sft.world_texts(), path)
    tokenizer = data.Tokenizer(path)
    model = LLaVA(sft.world_model(tokenizer))
    init_weights(model, run.seed)
    return model, tokenizer, sft.WORLD_IMAGES


def missing(run: Run) -> Run | None:
    """The built-in step that this run starts from, if it has not been made yet."""
    algo = {"vision": None, "base": "vision"}.get(run.algo, "base")
    if algo is None or (algo == "base" and start(run) in (BASE, Path(run.model or ""))):
        return None
    if (start(run) / "config.json").exists():
        return None
    out = start(run).parent
    print(f"{algo}: not found in {out}, making it first", file=sys.stderr)
    return Run(algo=algo, out=str(out), seed=run.seed, test_scenes=0, device=run.device,
               dtype=run.dtype, resume=(out / "config.json").exists())


def start(run: Run) -> Path:
    """The folder of the model that a run starts from: the user's, the shipped one, or one made here."""
    if run.model:
        return Path(run.model)
    if run.algo != "base" and BASE.exists() and not run.from_scratch:
        return BASE
    name = "vision" if run.algo == "base" else "base"
    return WORLD / (name if run.seed == 0 else f"{name}-seed{run.seed}") / "model"


def half(run: Run, device: torch.device) -> bool:
    """Whether the run computes in bfloat16; on a CPU only if asked, since few are fast at it."""
    return run.dtype == "bfloat16" or run.dtype == "auto" and device.type == "cuda"


def load_start(run: Run, device) -> tuple[LLaVA, data.Tokenizer, ImageSettings]:
    """The model that the run starts from. A base that LoRA leaves frozen is kept in bfloat16."""
    if run.algo == "vision":
        return fresh_model(run)
    dtype = torch.bfloat16 if run.lora and half(run, device) else torch.float32
    model, tokenizer, images = load_llava(start(run), device, dtype)
    model.decoder.gradient_checkpointing = run.gradient_checkpointing
    if run.image_mode != "auto":
        images = replace(images, mode=run.image_mode)
    return model, tokenizer, images


def on_world(run: Run) -> bool:
    """Whether a run learns from the built-in world's feedback."""
    return run.data in (None, ["world"])


def world_corrections(run: Run, model, tokenizer, settings) -> Path:
    """The folder of corrections of this base's own answers, collected if it is not there yet."""
    name = f"corrections-{fingerprint(model)[:8]}-{run.seed}-{run.corrections}"
    folder = WORLD / name
    if not (folder / "corrections.jsonl").exists():
        print(f"collecting {run.corrections} corrections of the base's answers in {folder}",
              file=sys.stderr)
        collect.corrections(model, tokenizer, settings, folder, run.corrections, run.seed)
    return folder


def read_examples(
    run: Run, config, model, tokenizer, settings, folder: Path | None
) -> tuple[list[readers.Pair | readers.Conversation], list[data.Example]]:
    """Every row of the data, and as an Example: checked, and its image seen by the frozen tower.

    Args:
        folder: of the run, for features of more images than memory should hold; None, for a dry
            run, sees nothing and only tries to open the images.
    """
    patterns, images = run.data, run.images
    if on_world(run):
        made = world_corrections(run, model, tokenizer, settings)
        patterns, images = [made / "corrections.jsonl"], made / "images"
    skipped: list[str] | None = [] if run.skip_bad_rows else None
    weights = {name: getattr(config, name) for name in ("gamma", "min_match", "replacements_only")
               if hasattr(config, name)}
    read, make = readers.read_pairs, data.pair_example
    if run.algo == "sft":
        read, make = readers.read_conversations, data.conversation_example
    sound, examples = [], []
    for row in read(patterns, images, skipped):
        with skipping(skipped):
            example = make(row, None, tokenizer, model.config.vision.patches, **weights)
            data.check_lengths(example, model.config.text.max_position_embeddings)
            sound.append(row)
            examples.append(example)
    named = [(row.name, row.image) for row in sound]
    seen = features.look(model, settings, named, folder, skipped is None) if folder else None
    usable = []
    for i, (name, source) in enumerate(named):
        with skipping(skipped):
            if seen:
                examples[i].image = seen[i]
            elif source is not None:
                open_image(name, source)
            usable.append(i)
    if skipped:
        shown = skipped[:20] + [f"and {len(skipped) - 20} more"] * (len(skipped) > 20)
        print(f"{len(skipped)} rows left out:", *shown, sep="\n  ", file=sys.stderr)
    if not usable:
        raise DataError("no usable row is left")
    return [sound[i] for i in usable], [examples[i] for i in usable]


def cached_reference(run: Run, config, model, examples, path: Path, device) -> None:
    """Give every example the reference's scores, from the run's folder where they belong to it."""
    digest = hashlib.sha256(fingerprint(model).encode())
    for example in examples:
        for response in example.responses:
            digest.update(repr((example.prompt, response, config.normalize)).encode())
    key = digest.hexdigest()
    saved = read_json(path) if path.exists() else None
    if saved and saved["key"] != key:
        raise ValueError(f"{path} belongs to another model, other data or settings; delete it")
    if not saved:
        bar = lambda parts: tqdm(parts, desc="reference", disable=None, leave=False)
        saved = {"key": key, "scores": ddpo.reference_scores(model, examples, config, device, bar)}
        write_atomic(path, saved)
    for example, scores in zip(examples, saved["scores"]):
        example.reference = scores


def measure(run: Run, model, tokenizer, images) -> tuple[dict, list[dict]]:
    """The starting model's measures, kept beside the corrections: every run compares with them."""
    path = WORLD / f"before-{fingerprint(model)[:8]}-{run.test_scenes}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        evaluate.write_results(path, None, measure_now(run, model, tokenizer, images))
    return evaluate.read_results(path)["after"]


def measure_now(run: Run, model, tokenizer, images) -> tuple[dict, list[dict]]:
    """The model's measures, as it is."""
    return evaluate.measure_world(model, tokenizer, images, run.test_scenes)
