"""Compare a whole DDPO step with TRL's DPOTrainer: the same LLaVA weights and pairs.

The pairs are descriptions of drawn scenes and their corrections. A trunk is many times as long as a
response, as with photos, and the vocabulary is small, so that the head does not dominate. Both
train decoder, head and projector with AdamW and freeze the vision tower; weights are float32, and
on a GPU, where the tower is CLIP's large one, products are bfloat16.

The two sides run in their own processes and take turns. A step begins with the rows and ends with
the new weights. Memory is what CUDA's allocator gave out at the most, or on a CPU the process's
highest resident size, less its size after the imports. The work that ours does once (features of
the images, the reference's scores) is timed separately; the table adds a third of it to each step,
for three epochs. TRL has no equivalent: it refuses precomputed reference scores for images.
"""

import json
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from statistics import mean, median

import torch
import torch._dynamo  # noqa: F401  (an optimizer's first step imports it: 100 MB of libraries)
from PIL import Image

import data
import ddpo
import recipes
import sources
import train
import world
from algorithm import Data
from config import Run, option
from kernels.bench_tools import (
    GPU, Row, machine, now, ratio, save_random_llava, start_process, table, take_turns, version,
)
from vision import VisionConfig

EPOCHS = 3
RATE, BETA = 1e-6, 0.5


@dataclass
class Options:
    pairs: int = option(8 if GPU else 4, "per step", least=1)
    width: int = option(2048 if GPU else 512, "of the decoder, a multiple of 64", least=64)
    layers: int = option(16 if GPU else 8, "of the decoder", least=1)
    device: str = option("cuda" if GPU else "cpu", "where to run", choices=("cuda", "cpu"))
    vocab: int = option(640, "size of the vocabulary")
    repeats: int = option(5, "measured turns", least=1)

    @property
    def dtype(self) -> str:
        """The dtype of matrix products."""
        return "bfloat16" if self.device == "cuda" else "float32"


def make_pairs(folder: Path, count: int) -> None:
    """Draw scenes; write a noisy annotator's descriptions and their corrections."""
    rows, number = [], 0
    while len(rows) < count:
        scene = world.make_scene(f"bench {number}")
        rejected = world.annotate(scene, Random(f"bench {number}"))
        chosen = world.correct(scene, rejected)
        number += 1
        if chosen.strip() and chosen != rejected:
            image = f"{len(rows)}.png"
            world.draw(scene, 336).save(folder / image)
            rows.append({"image": image, "question": world.DESCRIBE_PROMPTS_TRAIN[0],
                         "chosen": chosen, "rejected": rejected})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def peak_memory(device: str, before: int) -> int:
    """Return the most bytes that this process held, on a CPU beyond those it held `before`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM") - before


def resident(kind: str) -> int:
    """Return this process's size in bytes: VmRSS now, VmHWM at its highest."""
    return 1024 * int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


# `ours` and `trl` run in the two processes. Each sends a dict of facts when it is ready, makes a
# step and sends True for every True that it receives, and after False sends its peak memory.


def ours(link: Connection, folder: Path, options: Options, checkpointing: bool) -> None:
    before, pairs, device = resident("VmRSS"), options.pairs, options.device
    run = Run(model=str(folder / "model"), data=[str(folder / "pairs.jsonl")], images=str(folder),
              dtype=options.dtype, gradient_checkpointing=checkpointing)
    config = ddpo.DDPOConfig(
        learning_rate=RATE, beta=BETA, batch_size=pairs, micro_batch=pairs, steps=10**6)
    start = recipes.load_start(run, config, ddpo.DDPO, torch.device(device), folder)
    recipes.select_weights(start, ddpo.DDPO)
    for _ in range(2):  # the first time loads libraries and kernels
        start.folder = Path(tempfile.mkdtemp(dir=folder))  # keeps the reference's scores
        started = time.perf_counter()
        _, examples = sources.read_examples(start, config, ddpo.DDPO, run.data, run.images, None)
        rows = Data(examples)
        algorithm = ddpo.DDPO(start, config, rows)
        once = now(device) - started
    loop = train.Loop(algorithm, start, rows)
    link.send({
        "once": once,
        "tokens": sorted(e.prompt + r.tokens for e in examples for r in e.responses),
        "trunk": mean(len(e.prompt) for e in examples),
        "response": mean(len(r.tokens) for e in examples for r in e.responses),
        "parameters": sum(weight.numel() for weight in start.model.parameters()) / 1e6,
    })
    while link.recv():
        loop.one_step()
        loop.step += 1
        now(device)
        link.send(True)
    link.send(peak_memory(device, before))


def trl(link: Connection, folder: Path, options: Options, checkpointing: bool) -> None:
    from datasets import Dataset
    from transformers import AutoProcessor, LlavaForConditionalGeneration, TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    before, cuda = resident("VmRSS"), options.device == "cuda"
    model = LlavaForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
    model.model.vision_tower.requires_grad_(False)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    dataset = Dataset.from_list([{
        "images": [Image.open(folder / row["image"])],
        "prompt": "<s>" + data.prompt_text(row["question"]),
        "chosen": row["chosen"] + "</s>", "rejected": row["rejected"] + "</s>",
    } for row in rows])

    class InTurn(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            control.should_training_stop = not link.recv()

        def on_step_end(self, args, state, control, **_):
            now(options.device)
            link.send(True)
            self.on_train_begin(args, state, control)

    trainer = DPOTrainer(
        model, processing_class=AutoProcessor.from_pretrained(folder / "model"),
        train_dataset=dataset, callbacks=[InTurn()],
        args=DPOConfig(
            str(folder / "trl"), per_device_train_batch_size=options.pairs, max_steps=10**6,
            beta=BETA, learning_rate=RATE, gradient_checkpointing=checkpointing, bf16=cuda,
            use_cpu=not cuda, dataloader_pin_memory=cuda,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        ),
    )
    trainer.remove_callback(PrinterCallback)  # leave standard output to the table
    batch = trainer.data_collator([dataset[i] for i in range(len(dataset))])
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    link.send({"tokens": sorted(row[kept].tolist() for row, kept in zip(ids, mask))})
    trainer.train()
    link.send(peak_memory(options.device, before))


def ask(link: Connection, step: bool) -> bool | int:
    link.send(step)
    return link.recv()


def compare(folder: Path, options: Options, checkpointing: bool) -> Iterator[Row]:
    """Run both sides in turns, with or without recomputed activations, and yield their rows."""
    peer, own = (f"{name}, recomputing" if checkpointing else name for name in ("TRL", "ours"))
    sides = {peer: trl, own: ours} if version("trl") != "absent" else {own: ours}
    links, facts = {}, {}
    for name, side in sides.items():  # one after the other, as ours times its preparation
        _, links[name] = start_process(side, folder, options, checkpointing)
        facts[name] = links[name].recv()
    if any(fact["tokens"] != facts[own]["tokens"] for fact in facts.values()):
        raise RuntimeError("the two sides train on different tokens")
    if not checkpointing:
        print("{parameters:.1f} M parameters; trunk {trunk:.0f} tokens, responses {response:.0f}"
              .format_map(facts[own]), end="\n\n")
    steps = {name: partial(ask, link, True) for name, link in links.items()}
    times = take_turns(steps, options.repeats, options.device)
    peaks = {name: [ask(link, False) / 1e6] for name, link in links.items()}
    once, with_once = facts[own]["once"], f"{own}, + once / {EPOCHS}"
    times[with_once] = [time + once / EPOCHS for time in times[own]]
    peaks[with_once] = peaks[own]
    for name in times:
        yield {"a step by": name, "s": median(times[name]),
               "x TRL": ratio(times[name], times.get(peer)), "MB": peaks[name][0],
               "MB, x TRL": ratio(peaks[name], peaks.get(peer)),
               "once s": once if name == with_once else None}


def main(options: Options) -> None:
    print(machine(options.device, "torch", "transformers", "trl"))
    print(f"{options.pairs} pairs a step, {options.dtype}, median of {options.repeats}")
    with tempfile.TemporaryDirectory() as name:
        folder, width = Path(name), options.width * 3 // 8  # of the tower
        small = VisionConfig(width, 4 * width, 6, max(1, width // 64), image_size=224)
        tower = VisionConfig() if options.device == "cuda" else small
        save_random_llava(folder, options.vocab, options.width, options.layers, tower)
        make_pairs(folder, options.pairs)
        print(table([row for checkpointing in (False, True)
                     for row in compare(folder, options, checkpointing)]))
