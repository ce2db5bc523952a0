"""Train: the command line, the registry of algorithms, and what a run does (the loop: loop.py).

    python train.py --algo ddpo                       the built-in world, nothing to download
    python train.py --algo ddpo --model llava-1.5-7b-hf --data rows.jsonl --images DIR --lora 64

A missing base or reward model is trained first and kept under runs/world; `--dry_run` lists these
runs. A run is a function of its settings: the same seed on the same machine gives the same result,
and on a CPU a resumed run equals an uninterrupted one to the bit.
"""

import argparse
import contextlib
import signal
import sys
import time
import traceback
from pathlib import Path

from config import OF_WORLD, Run, Training, add_options, check_early, from_options

if __name__ == "__main__":
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_options(known, Run)
    for option in ("--captions", "--reward_model"):
        known.add_argument(option)
    check_early(known, data="files", images="folder", model="model", tower="model",
                captions="files", reward_model="model")

import torch

import ddpo
import grpo
import online_ddpo
import parallel
import ppo
import recipes
import reward
import sft
import sources
from algorithm import Algorithm, Start
from evaluation import SHAPES, columns, memory_table, table, write_report, write_results
from formats import find_device, latest_state, save_adapter, save_llava
from formats.files import error_message, lock_folder
from formats.opening import model_folder, open_model
from formats.runs import discard_replaced, is_finished, open_folder, replacing
from loop import Interrupted, Loop, TrainingError, event_writer, remove_checkpoints, verdict
from world import pretraining

ALGORITHMS: dict[str, type[Algorithm]] = {
    "sft": sft.SFT,
    "dpo": ddpo.DPO,
    "ddpo": ddpo.DDPO,
    "online_ddpo": online_ddpo.OnlineDDPO,
    "rm": reward.RewardTraining,
    "ppo": ppo.PPO,
    "grpo": grpo.GRPO,
    "vision": pretraining.Tower,
    "base": pretraining.Base,
    "rm_init": pretraining.RMInit,
}


# -------------------------------------------------------------------------------------------- a run


def execute(run: Run, config: Training, first: bool = False) -> None:
    """Carry out one run, from its settings to its files.

    Args:
        first: another run needs its model; if another process is making that, wait for it.
    """
    started = time.perf_counter()
    if run.tensorboard:
        event_writer()  # fails before anything is written
    folder = Path(run.out or f"runs/{run.algo}")
    algorithm, device = ALGORITHMS[run.algo], find_device(run.device)
    start = recipes.load_start(run, config, algorithm, device, folder)
    with contextlib.ExitStack() as stack:
        parallel.once(lambda: stack.enter_context(lock_folder(folder, wait=first)))
        if first and parallel.once(lambda: is_finished(folder)):
            return
        train_in(folder, start, config, algorithm)
    print(f"{folder}: {time.perf_counter() - started:.0f} s in all; the model is in "
          f"{folder / 'model'}, the report in {folder / 'report.html'}", file=sys.stderr)


def train_in(folder: Path, start: Start, config: Training, kind: type[Algorithm]) -> None:
    """Train a loaded model and write all outputs."""
    resume = parallel.once(
        lambda: open_folder(folder, start.run, config, about(kind), kind.reads))
    if resume is None:
        print(f"{folder}: the run is finished; there is nothing to resume", file=sys.stderr)
        return
    with replacing(folder):
        data = sources.read_data(start, config, kind)
        recipes.select_weights(start, kind)
        algorithm = kind(start, config, data)
        before = recipes.measure(start, algorithm, trained=False)
        loop = Loop(algorithm, start, data)
        state = parallel.once(lambda: latest_state(folder) if resume else None)
        if state:
            loop.load(state)
            print(f"resumed at step {loop.step} of {algorithm.steps}", file=sys.stderr)
        loop.train()
    discard_replaced(folder)  # where there was no step
    if not parallel.rank() and (said := verdict(folder, kind.reads, start, config)):
        print(said, file=sys.stderr)
    save_result(start, algorithm, folder)
    after = recipes.measure(start, algorithm, trained=True) if before else None
    if parallel.rank():
        return
    if before:
        blind = sources.blind(start, config, kind, before, after)
        results = {"before": before, "after": after, **blind}
        print(table(before[0], after[0]))
        if blind:
            print(f"\n{columns({name: metrics for name, (metrics, _) in results.items()})}")
        write_results(folder / "results.json", results)
    write_report(folder)
    remove_checkpoints(folder)


def about(kind: type[Algorithm]) -> str:
    """Describe an algorithm in one line."""
    return kind.__doc__.strip().partition("\n")[0]


def save_result(start: Start, algorithm: Algorithm, folder: Path) -> None:
    """Write the trained model in the public layout, and with LoRA the adapter beside it."""
    algorithm.save(folder)
    adapter = "default" if start.run.lora else None
    if adapter:
        base = recipes.model_path(start.run, algorithm.first[0])
        save_adapter(start.model, adapter, folder / "adapter", str(model_folder(base)),
                     start.images)
    # In the precision of the user's model; built-in models, which later runs start from, in full.
    dtype = start.model.stored_dtype if start.run.model else None
    save_llava(start.model, start.tokenizer, start.images, folder / "model", adapter=adapter,
               dtype=dtype)


# --------------------------------------------------------------------------------- the command line


def parse(arguments: list[str] | None) -> tuple[Run, Training]:
    """Parse in two passes, because the algorithm decides which other options exist."""
    names = tuple(ALGORITHMS)
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--algo", choices=names, default=Run.algo)
    given = sys.argv[1:] if arguments is None else arguments
    algo = first.parse_known_args([a for a in given if a not in ("-h", "--help")])[0].algo
    config = ALGORITHMS[algo].Config
    width = max(map(len, names))
    listed = "\n".join(f"  {name:{width}}  {about(kind)}" for name, kind in ALGORITHMS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"algorithms:\n{listed}\n\nEach has options of its own: "
        "python train.py --algo NAME --help", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser.add_argument_group("the run"), Run, algo=names)
    add_options(parser.add_argument_group(f"hyperparameters of {algo}"), config)
    found = parser.parse_args(arguments)
    run = from_options(Run, found)
    if fault := misuse(run, vars(found)):
        parser.error(fault)
    try:
        return run, from_options(config, found)
    except ValueError as error:  # of options that exclude each other
        parser.error(str(error))


def misuse(run: Run, given: dict) -> str:
    """Return which of the given options do not go together, or ""."""
    if run.resume and run.overwrite:
        return "--resume continues the run in --out, --overwrite deletes it; give one"
    if run.images and run.on_world():
        return "--images is the folder of the images that --data names; give --data too"
    if run.tower and not run.model:
        return "--tower goes with --model"
    if not run.on_world() and (idle := sorted(OF_WORLD & given.keys())):
        return f"--{idle[0]} is about the built-in feedback and does nothing with --data"
    if "captions" in given and "facts" not in given:
        return "--captions goes with --facts"
    if run.lora_alpha is not None and not (run.lora and run.lora_alpha):
        return "--lora_alpha goes with --lora, and is above 0"
    if run.seed >= 2**32:
        return "--seed should be below 2**32"
    if run.gpus and not run.dry_run:
        return "--gpus goes with --dry_run; torchrun --nproc_per_node N uses N of them"
    return ""


def run_all(run: Run, config: Training) -> None:
    """Carry out the planned runs in order, or list them."""
    *first, last = parallel.once(lambda: recipes.plan(run, config, ALGORITHMS))
    if run.gpus:  # a dry run
        own = run.model and {Path(run.model).resolve().name:
                             open_model(run.model, tower=run.tower)[0].config}
        print(memory_table(own or SHAPES, run.gpus, run.lora or 64, config))
        return
    if run.dry_run:
        for step, _ in (*first, last):
            print(f"--algo {step.algo} --out {step.out or f'runs/{step.algo}'}")
        if not first:
            sources.preview(*last, ALGORITHMS[run.algo])
        return
    if said := recipes.choice(*last, config):
        print(said, file=sys.stderr)
    for step, settings in first:
        print(f"{step.algo}: not found in {step.out}, making it first", file=sys.stderr)
        try:
            execute(step, settings, first=True)
        except Interrupted as stopped:
            raise Interrupted(f"{step.out}: {stopped}; the same command continues") from None
    try:
        execute(*last)
    except Interrupted as stopped:
        raise Interrupted(f"{stopped}; the same command with --resume continues") from None


def main(arguments: list[str] | None = None) -> int:
    parallel.mute()
    run, config = parse(arguments)
    folder = Path(run.out or f"runs/{run.algo}")
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it would write NaN everywhere
        parallel.join(run.device, run.use_bfloat16)
        run_all(run, config)
        parallel.leave()
    except Interrupted as stopped:
        return parallel.fail(f"\n{stopped}", 130)
    except KeyboardInterrupt:
        saved = latest_state(folder)
        return parallel.fail(f"\nstopped; --resume continues from {saved}" if saved else
                             "\nstopped; the same command starts again", 130)
    except (ValueError, OSError, TrainingError) as error:
        return parallel.fail(f"error: {error_message(error, folder)}", 1)
    except torch.OutOfMemoryError:
        return parallel.fail("error: the GPU has too little memory; try a smaller --micro_batch, "
                             "--gradient_checkpointing or --lora", 1)
    except Exception as error:
        if parallel.world() == 1:
            raise
        return parallel.fail(
            "error: another process of this run ended (killed, or out of memory?); the last "
            "checkpoint is complete, --resume continues" if parallel.lost(error)
            else traceback.format_exc(), 1)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
