"""A run's starting point: the runs that come first, and the model; and how the model is measured.

The built-in world's models are made once, kept in runs/world and reused; their names contain the
seed.
"""

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import parallel
import sharding
import world
from algorithm import Algorithm, Start
from config import Run, Training
from evaluation import measure_world, read_results, with_intervals, write_results
from formats import fingerprint, load_llava, not_finite
from formats.opening import open_model, parameter_count
from formats.runs import ASIDE, settings_of, settings_of_run
from lora import add_adapter, lora_layers, select_trainable
from world import pretraining

LARGE = 1e9  # parameters from which on the papers' learning rates, for 7B and 13B, apply
WORLD = Path("runs/world")  # models and data that runs on the built-in world share
SHIPPED = {name: Path(world.__file__).parent / name for name in ("base", "rm_init")}

# --------------------------------------------------------------------------------- what comes first


def plan(
    run: Run, config: Training, algorithms: Mapping[str, type[Algorithm]]
) -> list[tuple[Run, Training]]:
    """Return the runs to carry out, in order: those that this one depends on, then itself.

    It looks only at settings and names of files, before anything is locked or loaded.
    """
    steps = []
    if parallel.world() > 1 and not algorithms[run.algo].reads:
        raise ValueError(f"--algo {run.algo} runs in one process: python train.py")
    if run.lora and not algorithms[run.algo].reads:
        raise ValueError(f"--algo {run.algo} trains all weights; leave out --lora")
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
        begun = settings_of_run(folder / ASIDE) or settings_of_run(folder)
        same = begun == settings_of(first, settings)  # else a killed run with others is in the way
        first = replace(first, resume=same, overwrite=begun is not None and not same)
        steps += [step for step in plan(first, settings, algorithms) if step not in steps]
    return [*steps, (run, with_rate(run, config))]


def with_rate(run: Run, config: Training) -> Training:
    """Fill in the learning rate where neither the user nor the algorithm sets one."""
    if config.learning_rate is not None:
        return config
    return replace(config, learning_rate=config.rates[method(run)])


def method(run: Run) -> str:
    """Return the key of `Training.rates`: a small or large model, with LoRA or without."""
    large = run.model and parameter_count(run.model, run.tower) >= LARGE
    return ("large" if large else "small") + " lora" * bool(run.lora)


def choice(run: Run, config: Training, given: Training) -> str:
    """Describe the settings that were chosen for the user, and why; "": none."""
    why = {"small lora": "LoRA's in a small model",
           "large lora": "LoRA's in a model of 1B and more parameters",
           "large": "that for all of a model of 1B and more parameters",
           "small": "that for all of a small model"}[method(run)]
    said = []
    if given.learning_rate is None:
        said.append(f"learning rate {config.learning_rate:g}, {why} (--learning_rate)")
    if run.lora and run.lora_alpha is None:
        said.append(f"alpha {run.alpha:g}, twice the rank (--lora_alpha)")
    return "; ".join(said)


def dependency(name: str, run: Run, config: Training) -> Path | None:
    """Return the folder of a built-in run that `run` depends on; None if it is not needed."""
    if name == "rm":
        return None if config.reward_model else reward_folder(run, config)
    if run.model or name in SHIPPED and not run.from_scratch:
        return None
    if name == "rm_init" and not starts_from_rm_init(run):
        return None
    return WORLD / (name if run.seed == 0 else f"{name}-seed{run.seed}")


def starts_from_rm_init(run: Run) -> bool:
    """Return whether a reward model starts from the built-in initialisation, not from the base.

    The built-in base is too small to compare an answer with captions. With LoRA the reward model
    shares the base with the policy, so it starts there.
    """
    return not run.model and run.on_world() and not run.lora


def reward_folder(run: Run, config: Training) -> Path:
    """Return the folder of the reward model's run."""
    if config.reward_model:
        return Path(config.reward_model)
    if not run.on_world():
        raise ValueError(f"--algo {run.algo} needs a reward model: --reward_model with the folder "
                         "of a run of python train.py --algo rm")
    kind = "facts" if config.facts else "plain"
    kind += "-scratch" * (run.from_scratch and not run.model)
    kind += f"-lora{run.lora}" if run.lora else ""
    kind += f"-alpha{run.lora_alpha:g}" if run.lora_alpha else ""
    kind += "-bf16" * (run.dtype == "bfloat16")
    if run.model:  # its name, and a hash that tells folders of one name apart
        path = Path(run.model).resolve()
        kind += f"-{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:6]}"
    return WORLD / f"rm-{kind}-{run.seed}"


# -------------------------------------------------------------------------------------------- model


def model_path(run: Run, name: str) -> Path:
    """Return the folder of a model to start from: the user's, the shipped one, or one made here."""
    if run.model and name != "rm_init":
        return Path(run.model)
    made = dependency(name, run, Training())
    return made / "model" if made else SHIPPED[name]


def load_start(
    run: Run, config: Training, algorithm: type[Algorithm], device: torch.device, folder: Path
) -> Start:
    """Load the model that a run starts from; with LoRA in bfloat16 if the run computes in it."""
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
    """Choose the weights to train: a new adapter, or decoder, projector and head."""
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


# ---------------------------------------------------------------------------------------- measuring


def measure(start: Start, algorithm: Algorithm, trained: bool) -> tuple[dict, list[dict]] | None:
    """Return (metrics, records) before or after training, or None."""
    run = start.run

    def on_world() -> tuple[dict, list[dict]] | None:
        if not run.test_scenes or not run.on_world():
            return None
        cast = "-autocast" * (parallel.world() > 1 and start.bfloat16)
        path = WORLD / f"before-{start.key}{cast}-{run.test_scenes}.json"  # shared by all runs
        if trained or not parallel.once(path.exists):
            # In every process: FSDP's backward prefetches in the order of the latest passes, which
            # therefore has to be the same in all.
            with sharding.gathered(start.model):
                found = measure_world(
                    start.model, start.tokenizer, start.images, run.test_scenes)
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
