"""Train: the command line, the registry of algorithms, and the one loop.

    python train.py --algo ddpo                       the built-in world, nothing to download
    python train.py --algo ddpo --model llava-1.5-7b-hf --data rows.jsonl --images DIR --lora 64

What a run depends on and does not find (a base, a reward model) is made first and kept under
runs/world; `--dry_run` lists these runs. A run is a function of its settings: the same seed on the
same machine gives the same result, and on a CPU a resumed run equals an uninterrupted one to the
bit.
"""

import argparse
import json
import math
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import ddpo
import ppo
import recipes
import reward
import sft
from algorithm import Algorithm, Start
from config import Run, Training, add_options, from_options
from data import Batch
from evaluation import table, write_report, write_results
from evaluation.answers import whole_lines
from formats import (
    find_device, latest_state, load_state, save_adapter, save_llava, save_state,
)
from formats.files import error_message, jsonl, lock_folder, write_atomic
from world import pretraining

ALGORITHMS: dict[str, type[Algorithm]] = {
    "sft": sft.SFT,
    "dpo": ddpo.DPO,
    "ddpo": ddpo.DDPO,
    "rm": reward.RewardTraining,
    "ppo": ppo.PPO,
    "vision": pretraining.Tower,
    "base": pretraining.Base,
    "rm_init": pretraining.RMInit,
}


class Interrupted(Exception):
    """A signal asked for an end; the run was saved."""


class TrainingError(Exception):
    """Training cannot continue; the message names the step and the rows."""


# ------------------------------------------------------------------------------------- the one loop


class Loop:
    """Optimise an algorithm's modules on its batches, with logging, checkpoints and a clean end."""

    def __init__(self, algorithm: Algorithm, start: Start):
        self.algorithm, self.start = algorithm, start
        self.run, self.folder = start.run, start.folder
        self.weights = {n: p for n, p in algorithm.modules.named_parameters() if p.requires_grad}
        self.optimizers = make_optimizers(self.weights, algorithm.config)
        self.step = 0
        self.stop = False

    def train(self) -> None:
        previous = {s: signal.signal(s, self.ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        board = None
        if self.run.tensorboard:  # purges steps that were logged after the checkpoint
            board = event_writer()(self.folder / "tensorboard", purge_step=self.step + 1)
        bar = tqdm(total=self.algorithm.steps, initial=self.step, desc=self.folder.name,
                   disable=None, leave=False)
        try:
            while self.step < self.algorithm.steps:
                metrics = self.one_step()
                self.step += 1
                bar.update()
                bar.set_postfix(loss=f"{metrics['loss']:.4f}")
                last = self.step == self.algorithm.steps
                if self.step % self.run.log_every == 0 or last:
                    with (self.folder / "metrics.jsonl").open("a") as file:
                        file.write(json.dumps({"step": self.step, **metrics}) + "\n")
                    for name, value in metrics.items() if board else ():
                        board.add_scalar(name, value, self.step)
                if self.stop or self.step % self.run.save_every == 0 and not last:
                    self.save()
                if self.stop:
                    raise Interrupted(
                        f"stopped and saved at step {self.step} of {self.algorithm.steps}; "
                        "the same command with --resume continues")
        finally:
            bar.close()
            if board:
                board.close()
            for which, handler in previous.items():
                signal.signal(which, handler)

    def ask_to_stop(self, *_) -> None:
        if self.stop:  # asked twice: at once
            raise KeyboardInterrupt
        self.stop = True

    def one_step(self) -> dict[str, float]:
        started = time.perf_counter()
        rate = schedule(self.step, self.algorithm.steps, self.algorithm.config.warmup)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.zero_grad()
        with self.start.autocast():
            batches = self.algorithm.batches(self.step)
        prepared = time.perf_counter()
        total = sum(self.algorithm.size(batch) for batch in batches)
        metrics: dict[str, float] = {}
        for batch in batches:
            share = self.algorithm.size(batch) / total
            try:
                with self.start.autocast():
                    loss, values = self.algorithm.loss(batch.to(self.start.device))
            except ValueError as error:  # the kernels refuse hidden states that are not finite
                self.fail(str(error), batch)
            if not math.isfinite(loss.item()):
                self.fail(f"the loss is {loss.item()}", batch)
            (loss * share).backward()
            for name, value in {"loss": loss.item(), **values}.items():
                metrics[name] = metrics.get(name, 0.0) + value * share
        norm = nn.utils.clip_grad_norm_(
            self.weights.values(), self.algorithm.config.max_grad_norm).item()
        if not math.isfinite(norm):
            self.fail(f"the gradient's norm is {norm}", batches[0])
        for optimizer in self.optimizers:
            optimizer.step()
        now = time.perf_counter()
        return metrics | {
            "learning_rate": self.optimizers[0].param_groups[0]["lr"], "grad_norm": norm,
            "rows_per_second": self.algorithm.config.batch_size / (now - started),
            "seconds/batches": prepared - started, "seconds/optimisation": now - prepared,
        }

    def fail(self, what: str, batch: Batch) -> None:
        rows = ", ".join(list(dict.fromkeys(batch.names))[:8])
        kept = latest_state(self.folder)
        raise TrainingError(
            f"{what} at step {self.step + 1} (rows: {rows}); the weights before it are "
            f"{f'in {kept}' if kept else 'those of the start'}; "
            "try a smaller --learning_rate"
        )

    def save(self) -> None:
        """Write what resuming needs, then remove older checkpoints."""
        folder = self.folder / f"checkpoint-{self.step}"
        save_state(folder, {
            "step": self.step,
            "weights": {name: weight.detach() for name, weight in self.weights.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": torch.get_rng_state(),
            "algorithm": self.algorithm.state(),
        })
        for old in self.folder.glob("checkpoint-*"):
            if old != folder:
                shutil.rmtree(old)

    def load(self, folder: Path) -> None:
        state = load_state(folder)
        if state["weights"].keys() != self.weights.keys():
            raise ValueError(f"{folder}: belongs to a run that trains other weights")
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
        self.algorithm.load_state(state["algorithm"])
        self.step = state["step"]
        for log in (self.folder / "metrics.jsonl", self.folder / "samples.jsonl"):
            kept = [row for row in whole_lines(log) if row["step"] <= self.step]
            if log.exists():  # later steps, and half a line of a killed process, are logged again
                write_atomic(log, jsonl(kept))


def event_writer() -> type:
    """TensorBoard's SummaryWriter, from an optional package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def make_optimizers(
    weights: dict[str, nn.Parameter], config: Training
) -> list[torch.optim.Optimizer]:
    """AdamW; where the config asks for it, Muon (orthogonalised momentum) for the blocks' matrices.

    Weight decay spares vectors (norms, biases). `peak` is the rate that `schedule` scales.
    """
    muon = {
        name: weight for name, weight in weights.items()
        if config.optimizer == "muon" and ".layers." in name and weight.ndim == 2
    }
    rest = [weight for name, weight in weights.items() if name not in muon]
    groups = [
        {"params": [w for w in rest if w.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [w for w in rest if w.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(  # fused: one pass over the weights, and no temporaries of their size
            [g for g in groups if g["params"]], config.learning_rate, betas=(0.9, 0.95), fused=True)
    ]
    if muon:
        optimizers.append(torch.optim.Muon(
            list(muon.values()), lr=config.muon_rate, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


# -------------------------------------------------------------------------------------------- a run


def execute(run: Run, config: Training) -> None:
    """Do one run, from its settings to its files."""
    started = time.perf_counter()
    if run.tensorboard:
        event_writer()  # complains before anything is begun
    folder = Path(run.out or f"runs/{run.algo}")
    algorithm, device = ALGORITHMS[run.algo], find_device(run.device)
    start = recipes.load_start(run, config, algorithm, device, folder)
    with lock_folder(folder):
        train_in(folder, start, config, algorithm)
    print(f"{folder}: {time.perf_counter() - started:.0f} s in all; the model is in "
          f"{folder / 'model'}, the report in {folder / 'report.html'}", file=sys.stderr)


def train_in(folder: Path, start: Start, config: Training, kind: type[Algorithm]) -> None:
    """Train a loaded model and write all outputs."""
    resume = recipes.open_folder(folder, start.run, config, about(kind), kind.reads)
    data = recipes.read_data(start, config, kind)
    recipes.select_weights(start, kind)
    algorithm = kind(start, config, data)
    before = recipes.measure(start, algorithm, trained=False)
    loop = Loop(algorithm, start)
    state = latest_state(folder) if resume else None
    if state:
        loop.load(state)
        print(f"resumed at step {loop.step} of {algorithm.steps}", file=sys.stderr)
    loop.train()
    save_result(start, algorithm, folder)
    if before:
        after = recipes.measure(start, algorithm, trained=True)
        print(table(before[0], after[0]))
        write_results(folder / "results.json", before, after)
    write_report(folder)
    for old in folder.glob("checkpoint-*"):
        shutil.rmtree(old)


def about(kind: type[Algorithm]) -> str:
    """What a run of this algorithm does, in a line."""
    return kind.__doc__.strip().partition("\n")[0]


def save_result(start: Start, algorithm: Algorithm, folder: Path) -> None:
    """Write the trained model in the public layout; with LoRA, the adapter beside it too."""
    algorithm.save(folder)
    adapter = "default" if start.run.lora else None
    if adapter:
        base = recipes.model_path(start.run, algorithm.first[0])
        save_adapter(start.model, adapter, folder / "adapter", base=str(base))
    save_llava(start.model, start.tokenizer, start.images, folder / "model", adapter=adapter)


# --------------------------------------------------------------------------------- the command line


def parse(arguments: list[str] | None) -> tuple[Run, Training]:
    """Parse in two passes: the algorithm decides which other options there are."""
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
    if run.images and run.on_world():
        parser.error("--images is the folder of the images that --data names; give --data too")
    return run, from_options(config, found)


def run_all(run: Run, config: Training) -> None:
    """Do the planned runs in order, or list them."""
    *first, last = recipes.plan(run, config, ALGORITHMS)
    if run.dry_run:
        for step, _ in (*first, last):
            print(f"--algo {step.algo} --out {step.out or f'runs/{step.algo}'}")
        if not first:
            recipes.preview(*last, ALGORITHMS[run.algo])
        return
    for step, settings in first:
        print(f"{step.algo}: not found in {step.out}, making it first", file=sys.stderr)
        execute(step, settings)
    execute(*last)


def main(arguments: list[str] | None = None) -> int:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        run_all(*parse(arguments))
    except Interrupted as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\nstopped before training began; the same command starts again", file=sys.stderr)
        return 130
    except (ValueError, OSError, TrainingError) as error:
        print(f"error: {error_message(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
