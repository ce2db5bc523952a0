"""The one training loop: steps, schedule, logging, checkpoints, and an orderly stop.

algorithm.py has what it asks of an algorithm. With several processes, each computes the losses of
its own micro-batches, weighted by their share of the step; gradients, metrics and the wish to stop
are summed over processes (parallel.py, sharding.py).
"""

import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import torch
from torch import nn
from tqdm import tqdm

import parallel
import sharding
from algorithm import Algorithm, Data, Start
from config import Training
from data import Batch
from evaluation.answers import whole_lines
from formats import latest_state, load_state, not_finite, save_state
from formats.files import jsonl, remove, write_atomic
from formats.runs import discard_replaced


class Interrupted(Exception):
    """A signal stopped the run, which was saved first; the message says where."""


class TrainingError(Exception):
    """Training cannot continue; the message names the step and the rows."""


class Loop:
    """Optimise an algorithm's modules on its batches."""

    def __init__(self, algorithm: Algorithm, start: Start, data: Data):
        self.algorithm, self.start, self.data = algorithm, start, data.digest()
        self.run, self.folder = start.run, start.folder
        self.weights = {n: p for n, p in algorithm.modules.named_parameters() if p.requires_grad}
        self.optimizers = make_optimizers(self.weights, algorithm.config, algorithm.peak_rate)
        self.step = 0
        self.asked = False  # to stop, by a signal to this process
        self.stop = False  # the same, agreed on by all processes at the end of a step

    def train(self) -> None:
        previous = {s: signal.signal(s, self.ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        board = None
        if self.run.tensorboard and parallel.rank() == 0:
            # purges steps that were logged after the checkpoint
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
                if last or self.stop or self.step % self.run.save_every == 0:
                    self.check_weights()
                logs = self.step == 1 or self.step % self.run.log_every == 0 or last
                if logs and parallel.rank() == 0:
                    with (self.folder / "metrics.jsonl").open("a") as file:
                        file.write(json.dumps({"step": self.step, **metrics}) + "\n")
                    for name, value in metrics.items() if board else ():
                        board.add_scalar(name, value, self.step)
                if self.stop or self.step % self.run.save_every == 0 and not last:
                    self.save()
                discard_replaced(self.folder)
                if self.stop:
                    raise Interrupted(
                        f"stopped and saved at step {self.step} of {self.algorithm.steps}")
        finally:
            bar.close()
            if board:
                board.close()
            for which, handler in previous.items():
                signal.signal(which, handler)

    def ask_to_stop(self, *_) -> None:
        if self.asked and parallel.world() == 1:  # second Ctrl-C: at once (torchrun repeats it)
            raise KeyboardInterrupt
        self.asked = True

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
        sizes = [self.algorithm.size(batch) if batch.counts else 0 for batch in batches]
        rows = sum(len(batch.names) for batch in batches if batch.counts)
        total, rows = parallel.total([sum(sizes), rows])
        metrics: dict[str, float] = {}
        for batch, size in zip(batches, sizes):
            share = size / total
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
        norm = sharding.clip_gradients(
            list(self.weights.values()), self.algorithm.config.max_grad_norm)
        if not math.isfinite(norm):
            self.fail(f"the gradient's norm is {norm}", batches[0])
        for optimizer in self.optimizers:
            optimizer.step()
        *values, stop = parallel.total([*metrics.values(), self.asked])
        metrics, self.stop = dict(zip(metrics, values)), bool(stop)
        now = time.perf_counter()
        return metrics | {
            "learning_rate": self.optimizers[0].param_groups[0]["lr"], "grad_norm": norm,
            "rows_per_second": rows / (now - started),
            "seconds/batches": prepared - started, "seconds/optimisation": now - prepared,
        }

    def check_weights(self) -> None:
        """Stop rather than save weights that are not finite, even if loss and gradient were."""
        bad = not_finite(self.weights.items())
        if parallel.total([len(bad)])[0]:
            self.fail(f"weights are no longer finite ({', '.join(bad[:4])}) by step {self.step}")

    def fail(self, what: str, batch: Batch | None = None) -> None:
        if batch:
            rows = ", ".join(list(dict.fromkeys(batch.names))[:8])
            what = f"{what} at step {self.step + 1} (rows: {rows})"
        kept = latest_state(self.folder)
        where = f"in {kept}" if kept else "those of the start"
        raise TrainingError(
            f"{what}; the weights before it are {where}; try a smaller --learning_rate")

    def save(self) -> None:
        """Write a checkpoint, then remove older ones."""
        folder = self.folder / f"checkpoint-{self.step}"
        state = {"step": self.step, "data": self.data, "base": self.start.base,
                 "rng": torch.get_rng_state(), "algorithm": self.algorithm.state()}
        weights = dict(self.weights)
        for name, weight in self.weights.items():
            for optimizer in self.optimizers:
                moments = optimizer.state.get(weight, {})
                weights |= {f"{kind} of {name}": value for kind, value in moments.items()}
        save_state(folder, state, weights)
        if parallel.rank() == 0:
            remove_checkpoints(self.folder, but=folder)

    def load(self, folder: Path) -> None:
        state, stored = load_state(folder)
        if state["data"] != self.data:
            raise ValueError(f"{folder}: the data have changed since; --overwrite starts again")
        if state["base"] != self.start.base:
            raise ValueError(f"{folder}: the base has changed since; --overwrite starts again")
        if {name for name in stored if " of " not in name} != self.weights.keys():
            raise ValueError(f"{folder}: belongs to a run that trains other weights")
        of_weight = {each: optimizer.state for optimizer in self.optimizers
                     for group in optimizer.param_groups for each in group["params"]}
        with torch.no_grad():
            for name, rows in stored.items():
                kind, _, owner = name.rpartition(" of ")
                weight = self.weights[owner]
                sharded = rows.shape and sharding.is_sharded(weight)
                value = rows.read(parallel.rows_of(len(weight)) if sharded else slice(None))
                value = value.to(weight.device)
                if kind:
                    value = sharding.place(value, weight) if sharded else value
                    of_weight[weight][weight][kind] = value
                else:
                    sharding.local(weight).copy_(value)
        torch.set_rng_state(state["rng"])
        self.algorithm.load_state(state["algorithm"])
        self.step = state["step"]
        if parallel.rank():
            return
        for log in (self.folder / "metrics.jsonl", self.folder / "samples.jsonl"):
            kept = [row for row in whole_lines(log) if row["step"] <= self.step]
            if log.exists():  # later steps, and half a line of a killed process, are logged again
                write_atomic(log, jsonl(kept))


def verdict(folder: Path, reads: str, start: Start, config: Training) -> str:
    """Describe a loss that has not fallen by 5 % after half of the steps; "" if it has.

    Args:
        reads: kind of rows; PPO's loss, on prompts, says nothing about learning.
    """
    guess = {"pairs": math.log(2), "rankings": math.log(2),
             "conversations": math.log(start.model.config.text.vocab_size)}.get(reads)
    losses = [row["loss"] for row in whole_lines(folder / "metrics.jsonl")]
    if guess is None or len(losses) < 2:
        return ""
    first, late = losses[0], mean(losses[len(losses) // 2 :])
    # The scalar head starts as the model's own verdict, so rankings may begin below guessing.
    if late < 0.95 * (guess if reads == "rankings" else first):
        return ""
    how = "has hardly moved" if reads != "rankings" else f"is not well below guessing ({guess:.4g})"
    risen = late > 1.05 * first
    guessing = abs(late - guess) < 0.05 * guess and reads != "rankings"
    fallen = reads == "pairs" and not risen  # perhaps both answers have become unlikely
    return (f"the loss {'has risen' if risen else how}: {first:.4g} at first, {late:.4g} in the "
            f"second half{', that of guessing' * guessing}; try a "
            f"{'smaller' if risen else 'larger'} --learning_rate than {config.learning_rate:g}"
            + ", or a smaller one if logps/chosen has fallen far" * fallen)


def remove_checkpoints(folder: Path, but: Path | None = None) -> None:
    """Remove a run's checkpoints, and the remains of one that was not completed."""
    for old in (*folder.glob("checkpoint-*"), *folder.glob(".checkpoint-*")):
        if old != but:
            remove(old)


def event_writer() -> type:
    """Import TensorBoard's SummaryWriter, from an optional package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter


def schedule(step: int, steps: int, warmup: float) -> float:
    """Return the share of the peak learning rate: linear warm-up, then a cosine to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def make_optimizers(
    weights: dict[str, nn.Parameter], config: Training, peak_rate: Callable[[str], float]
) -> list[torch.optim.Optimizer]:
    """AdamW; where the config asks for it, Muon (orthogonalised momentum) for the blocks' matrices.

    Weight decay spares vectors (norms, biases). `peak` is the rate that `schedule` scales.
    """
    muon = {
        name: weight for name, weight in weights.items()
        if config.optimizer == "muon" and ".layers." in name and weight.ndim == 2
    }
    groups: dict[tuple, dict] = {}  # matrices first
    for name, weight in sorted(weights.items(), key=lambda item: item[1].ndim <= 1):
        if name not in muon:  # an optimizer cannot update sharded and replicated weights at once
            key = weight.ndim > 1, peak_rate(name), sharding.is_sharded(weight)
            group = groups.setdefault(key, {"params": [], "lr": key[1]})
            group["params"].append(weight)
            group["weight_decay"] = config.weight_decay if weight.ndim > 1 else 0.0
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(  # fused: one pass over the weights, and no temporaries of their size
            list(groups.values()), betas=(0.9, config.adam_beta2), fused=True)
    ]
    if muon:
        optimizers.append(torch.optim.Muon(
            list(muon.values()), lr=config.muon_rate, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers
