"""The command line and the one training loop.

    python train.py --algo ddpo                       the built-in world, nothing to download
    python train.py --algo ddpo --model llava-1.5-7b-hf --data rows.jsonl --images DIR --lora 64

Whatever a step needs and does not find (a tower, a base, corrections of that base's answers) is made
first and kept under runs/world. A run is a function of its settings: same seed, same machine, same
result; interrupted and resumed, the same to the bit (on a CPU).
"""

import argparse
import json
import math
import platform
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import checkpoint
import config as options
import data
import ddpo
import dry_run
import evaluate
import files
import lessons
import ppo
import prepare
import report
import reward
import rlhf
import sft
from config import Run
from model import add_adapter, carriers, deepen, select_trainable

VERSION = "0.1"

ALGORITHMS = {"vision": sft.TowerConfig, "base": lessons.BaseConfig, "judge": lessons.JudgeConfig,
              "sft": sft.SFTConfig, "dpo": ddpo.DPOConfig, "ddpo": ddpo.DDPOConfig,
              "rm": reward.RMConfig, "ppo": ppo.PPOConfig}
BUILT_IN = ("vision", "base", "judge")  # steps of the built-in world that take no data


TRANSIENT = {  # do not change a result
    "resume", "overwrite", "dry_run", "save_every", "log_every", "tensorboard"}


class Interrupted(Exception):
    """A signal asked for an end; the run was saved."""


class TrainingError(Exception):
    """Training cannot go on; the message says at which step and with which rows."""


# ------------------------------------------------------------------------------------ the one loop


class Loop:
    """Optimises `algorithm.modules` on its batches, with logging, checkpoints and a clean end.

    An algorithm has `modules` (an nn.ModuleDict), `config` (a `config.Training`), `steps`,
    `batches(step)` (the micro-batches of a step), `size(batch)` (its weight in the step's mean) and
    `loss(batch) -> (loss, metrics)`. One whose batches depend on more than the step and the weights
    also has `state()` and `load_state(state)`.
    """

    def __init__(self, algorithm, folder: Path, run: Run, device: torch.device):
        self.algorithm, self.folder, self.run, self.device = algorithm, folder, run, device
        self.weights = {n: p for n, p in algorithm.modules.named_parameters() if p.requires_grad}
        self.optimizers = make_optimizers(self.weights, algorithm.config)
        self.step = 0
        self.stop = False

    def train(self) -> None:
        previous = {s: signal.signal(s, self.ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        board = None
        if self.run.tensorboard:  # steps that were logged after the checkpoint are taken back
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
                        "the same command with --resume goes on")
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
        with compute_dtype(self.run, self.device):
            batches = self.algorithm.batches(self.step)
        total = sum(self.algorithm.size(batch) for batch in batches)
        metrics: dict[str, float] = {}
        for batch in batches:
            share = self.algorithm.size(batch) / total
            try:
                with compute_dtype(self.run, self.device):
                    loss, values = self.algorithm.loss(to_device(batch, self.device))
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
        seconds = time.perf_counter() - started
        return metrics | {
            "learning_rate": self.optimizers[0].param_groups[0]["lr"], "grad_norm": norm,
            "rows_per_second": self.algorithm.config.batch_size / seconds,
        }

    def fail(self, what: str, batch) -> None:
        rows = ", ".join(list(dict.fromkeys(getattr(batch, "names", [])))[:8])
        kept = checkpoint.latest_state(self.folder)
        raise TrainingError(
            f"{what} at step {self.step + 1} (rows: {rows}); the weights before it are "
            f"{f'kept in {kept}' if kept else 'those the run began with'}; "
            "try a smaller --learning_rate"
        )

    def save(self) -> None:
        """What resuming needs; older checkpoints of the run are removed afterwards."""
        folder = self.folder / f"checkpoint-{self.step}"
        checkpoint.save_state(folder, {
            "step": self.step,
            "weights": {name: weight.detach() for name, weight in self.weights.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": torch.get_rng_state(),
            "algorithm": self.algorithm.state() if hasattr(self.algorithm, "state") else None,
        })
        for old in self.folder.glob("checkpoint-*"):
            if old != folder:
                shutil.rmtree(old)

    def load(self, folder: Path) -> None:
        state = checkpoint.load_state(folder)
        if state["weights"].keys() != self.weights.keys():
            raise ValueError(f"{folder}: belongs to a run that trains other weights")
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
        if state["algorithm"] is not None:
            self.algorithm.load_state(state["algorithm"])
        self.step = state["step"]
        for log in self.folder.glob("*.jsonl"):  # lines after the checkpoint will be written again
            lines = log.read_text().splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] <= self.step]
            files.write_atomic(log, "".join(kept))


def event_writer() -> type:
    """The class that writes TensorBoard's events, an optional package's."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to nothing."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def make_optimizers(weights: dict[str, nn.Parameter], config) -> list[torch.optim.Optimizer]:
    """AdamW; where asked for, Muon (orthogonalised momentum) for the matrices of the blocks.

    Weight decay spares vectors (norms, biases). `peak` is the rate that `schedule` scales.
    """
    muon = {
        name: weight for name, weight in weights.items()
        if getattr(config, "optimizer", "adamw") == "muon" and ".layers." in name and weight.ndim == 2
    }
    rest = [weight for name, weight in weights.items() if name not in muon]
    groups = [
        {"params": [w for w in rest if w.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [w for w in rest if w.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], config.learning_rate, betas=(0.9, 0.95),
                          fused=True)  # one pass over the weights, and no temporaries of their size
    ]
    if muon:
        optimizers.append(torch.optim.Muon(
            list(muon.values()), lr=config.muon_rate, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def compute_dtype(run: Run, device: torch.device):
    """Matrix products in bfloat16, trained weights and sums in float32, where the run says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=prepare.half(run, device))


def to_device(batch, device: torch.device):
    return batch.to(device) if isinstance(batch, data.Batch) else batch


# ------------------------------------------------------------------- what a run is given and makes


def start_folder(folder: Path, settings: dict, run: Run) -> bool:
    """Make the output folder ours; True if an interrupted run in it is to be gone on with."""
    file = folder / "config.json"
    if run.overwrite and file.exists():
        files.clear(folder)
    if file.exists():
        old = files.read_json(file)["settings"]
        changed = sorted(k for k in old.keys() | settings.keys() if old.get(k) != settings.get(k))
        began = checkpoint.latest_state(folder) or (folder / "metrics.jsonl").exists()
        if changed and (began or run.resume):
            raise ValueError(
                f"{folder} holds a run with other settings ({', '.join(changed)} differ); "
                "choose another --out, or --overwrite it"
            )
        if not run.resume and checkpoint.latest_state(folder):
            raise ValueError(f"{folder} holds an unfinished run; --resume goes on, --overwrite restarts")
    elif run.resume:
        raise ValueError(f"{folder} holds no run to resume")
    elif any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run of ours; choose another --out")
    if not run.resume:
        files.clear(folder)  # a finished run with the same settings: made again, with one result
    versions = {"plumbline": VERSION, "torch": torch.__version__, "python": platform.python_version()}
    files.write_atomic(file, {"settings": settings, "versions": versions})
    return run.resume


def make_algorithm(run: Run, config, model, tokenizer, settings, folder: Path, device):
    """What the loop will optimise: the algorithm with its data."""
    if run.algo == "vision":
        return sft.Tower(model, config, run.seed, settings)
    if run.algo in ("base", "judge"):
        of_world = lessons.WorldConversations if run.algo == "base" else lessons.WorldVerdicts
        deepen(model, getattr(config, "layers", 0), run.seed)
        source = of_world(model, tokenizer, settings, config, run.seed)
        select_trainable(model)
        return sft.SFT(model, config, source)
    if run.algo == "rm":
        if first := rlhf.missing_judge(run):
            execute(*first)
        return rlhf.make_reward_model(run, config, model, tokenizer, settings, folder)
    if run.algo == "ppo":
        if first := rlhf.missing_reward(run, config, model):
            execute(*first)
        return rlhf.make_ppo(run, config, model, tokenizer, settings, folder)
    rows, examples = prepare.read_examples(run, config, model, tokenizer, settings, folder)
    if run.algo != "sft":
        report.save_pairs(folder, rows, examples, tokenizer)
        prepare.cached_reference(run, config, model, examples, folder / "reference.json", device)
    make_trainable(run, model)
    if run.algo == "sft":
        return sft.SFT(model, config, data.Epochs(examples, config, run.seed))
    return ddpo.DDPO(model, config, run.seed, examples)


def make_trainable(run: Run, model) -> None:
    """Choose what is trained: a new adapter, or decoder, head and projector themselves."""
    adapter = "default" if run.lora else None
    if adapter:
        add_adapter(model, adapter, run.lora, run.lora_alpha, seed=run.seed)
        for module in carriers(model, adapter):
            module.active = adapter
    select_trainable(model, adapter)


def show(run: Run, config, model, tokenizer, settings, device) -> None:
    """Print what the run would be trained on, and what it would need."""
    if run.algo not in ("sft", "dpo", "ddpo"):
        raise ValueError(f"--dry_run shows the rows of sft, dpo and ddpo, not of {run.algo}")
    rows, examples = prepare.read_examples(run, config, model, tokenizer, settings, None)
    dry_run.show_rows(examples, tokenizer)
    make_trainable(run, model)
    named = [(row.name, row.image) for row in rows]
    itemsize = 2 if prepare.half(run, device) else 4
    print(dry_run.needs(model, config, examples, named, itemsize))


def execute(run: Run, config) -> None:
    """One run from its settings to its files."""
    started = time.perf_counter()
    if run.tensorboard:
        event_writer()  # missing is said before anything is begun
    if first := prepare.missing(run):
        execute(first, ALGORITHMS[first.algo]())
    device = checkpoint.find_device(run.device)
    model, tokenizer, images = prepare.load_start(run, device)
    if run.dry_run:
        return show(run, config, model, tokenizer, images, device)
    folder = Path(run.out or f"runs/{run.algo}")
    with files.claimed(folder):
        train_in(folder, run, config, device, model, tokenizer, images)
    print(f"{folder}: {time.perf_counter() - started:.0f} s in all; the model is in "
          f"{folder / 'model'}, the report in {folder / 'report.html'}", file=sys.stderr)


def train_in(folder: Path, run: Run, config, device, model, tokenizer, images) -> None:
    """From a model that is loaded to what a run leaves in its folder."""
    settings = {k: v for k, v in {**asdict(run), **asdict(config)}.items() if k not in TRANSIENT}
    resume = start_folder(folder, settings, run)
    algorithm = make_algorithm(run, config, model, tokenizer, images, folder, device)
    before = measure(prepare.measure, run, algorithm, model, tokenizer, images)
    loop = Loop(algorithm, folder, run, device)
    state = checkpoint.latest_state(folder) if resume else None
    if state:
        loop.load(state)
        print(f"resumed at step {loop.step} of {algorithm.steps}", file=sys.stderr)
    loop.train()
    save_result(run, algorithm, model, tokenizer, images, folder)
    if before:
        after = measure(prepare.measure_now, run, algorithm, model, tokenizer, images)
        print(evaluate.table(before[0], after[0]))
        evaluate.write_results(folder / "results.json", before, after)
    report.write_report(folder)
    for old in folder.glob("checkpoint-*"):
        shutil.rmtree(old)
    for old in folder.glob("features.*"):
        old.unlink()


def measure(how, run: Run, algorithm, model, tokenizer, images) -> tuple[dict, list[dict]] | None:
    """How the model describes held-out scenes of the built-in world; None where there are none."""
    if hasattr(algorithm, "measure"):  # of a reward model its agreement counts, not what it says
        return algorithm.measure()
    if not run.test_scenes or run.algo in BUILT_IN or not prepare.on_world(run):
        return None
    return how(run, model, tokenizer, images)


def save_result(run: Run, algorithm, model, tokenizer, images, folder: Path) -> None:
    """The trained model in the public layout; with LoRA, the adapter beside it too."""
    if hasattr(algorithm, "save"):
        algorithm.save(folder)
    adapter = "default" if run.lora else None
    checkpoint.save_llava(model, tokenizer, images, folder / "model", adapter=adapter)
    if adapter:
        checkpoint.save_adapter(model, adapter, folder / "adapter", base=str(prepare.start(run)))


# --------------------------------------------------------------------------------- the command line


def parse(arguments: list[str] | None) -> tuple[Run, options.Training]:
    """Two passes: the algorithm first, for its hyperparameters decide what else may be given."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--algo", choices=tuple(ALGORITHMS), default="ddpo")
    algo = first.parse_known_args([a for a in arguments or sys.argv[1:] if a not in ("-h", "--help")])
    config = ALGORITHMS[algo[0].algo]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    options.add_options(parser.add_argument_group("the run"), Run)
    options.add_options(parser.add_argument_group(f"hyperparameters of {algo[0].algo}"), config)
    given = parser.parse_args(arguments)
    run = options.from_options(Run, given)
    if run.images and prepare.on_world(run):
        parser.error("--images is the folder of the images that --data names; give --data too")
    return run, options.from_options(config, given)


def main(arguments: list[str] | None = None) -> int:
    run, config = parse(arguments)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        execute(run, config)
    except Interrupted as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\nstopped before training began; the same command starts again", file=sys.stderr)
        return 130
    except (ValueError, OSError, TrainingError) as error:
        print(f"error: {files.sentence(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
