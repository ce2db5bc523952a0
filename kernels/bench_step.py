"""A whole DDPO step against TRL's DPOTrainer: the same LLaVA weights, the same pairs, one machine.

    python kernels/bench.py --step                  on a CPU, a random LLaVA of 29 M parameters
    python kernels/bench.py --step --pairs 8 --repeats 9

The pairs are descriptions of drawn scenes and their corrections, a trunk about six times a response
as with real photos; the vocabulary is small against the width, so that the head alone does not
decide. Both train decoder, head and projector in float32 with AdamW; the tower is frozen in both.

Each side is a process of its own, and the two take turns, so that a machine that is busy for a
while slows both. A step begins with the rows and ends with the new weights. Memory is the process's
highest resident size, less what it held after its imports. What ours computes once before the first
step (features of the images, the reference's scores) is timed apart, and added a third at a time:
over three epochs. TRL has no such part: it refuses precomputed reference scores for images.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  (an optimizer's first step imports it: 100 MB of libraries)

MARK = "bench: "  # begins the lines by which a worker talks to the table
EPOCHS = 3
RATE, BETA = 1e-6, 0.5


# What is compared ----------------------------------------------------------------------------


def make_model(folder: Path, args) -> None:
    """A random LLaVA in the llava-hf layout, which both sides read."""
    import checkpoint
    import data
    import sft
    from model import LLaVA, LLaVAConfig, TextConfig, init_weights
    from vision import ImageSettings, VisionConfig

    path = folder / "tokenizer.model"
    data.train_tokenizer(sft.world_texts(100), path, args.vocab - 2)
    tokenizer = data.Tokenizer(path, args.vocab - 2, args.vocab - 1)
    heads, tower_heads = args.width // 64, max(1, args.tower_width // 64)
    model = LLaVA(LLaVAConfig(
        VisionConfig(args.tower_width, 4 * args.tower_width, args.tower_layers, tower_heads,
                     args.image, patch_size=14),
        TextConfig(args.vocab, args.width, args.width * 43 // 16, args.layers, heads, heads, 1024),
        tokenizer.image_token, tokenizer.pad_token, tokenizer.eos_token,
    ))
    init_weights(model, 0)
    checkpoint.save_llava(model, tokenizer, ImageSettings(size=args.image), folder / "model")


def make_pairs(folder: Path, count: int) -> None:
    """Drawn scenes, what a noisy annotator says of them, and the corrections."""
    import drawing
    import world

    rows, number = [], 0
    while len(rows) < count:
        scene = world.make_scene(f"bench {number}")
        said = world.annotate(scene, Random(f"bench {number}"))
        corrected = world.correct(scene, said)
        number += 1
        if corrected.strip() and corrected != said:
            image = f"{len(rows)}.png"
            drawing.draw(scene, 336).save(folder / image)
            rows.append({"image": image, "question": world.DESCRIBE_PROMPTS_TRAIN[0],
                         "chosen": corrected, "rejected": said})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def digest(sequences) -> str:
    """Of prompts with their responses as token ids: both sides must say the same."""
    return hashlib.sha256(repr(sorted(map(tuple, sequences))).encode()).hexdigest()


# The workers ---------------------------------------------------------------------------------


def resident(kind: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the most (a process's own, unlike ru_maxrss)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {kind}")


def say(**message) -> None:
    print(MARK + json.dumps(message), flush=True)


class Turns:
    """A worker's side of taking turns: one step for every line on its standard input."""

    def __init__(self):
        self.started = None

    def next(self) -> bool:
        """Tell how long the step took that has just ended; wait for the word to begin another."""
        if self.started is not None:
            say(seconds=time.perf_counter() - self.started)
        go = bool(sys.stdin.readline().strip())
        self.started = time.perf_counter()
        return go


def ours(folder: Path, pairs: int, checkpointing: bool) -> None:
    import checkpoint
    import config
    import data
    import ddpo
    import features
    import readers
    import train
    from model import select_trainable

    before = resident("VmRSS")
    model, tokenizer, settings = checkpoint.load_llava(folder / "model")
    model.decoder.gradient_checkpointing = checkpointing
    settings_of_ddpo = ddpo.DDPOConfig(
        learning_rate=RATE, beta=BETA, batch_size=pairs, micro_batch=pairs, steps=10**6
    )
    started = time.perf_counter()
    rows = readers.read_pairs([str(folder / "pairs.jsonl")], str(folder))
    seen = features.look(model, settings, [(row.name, row.image) for row in rows])
    patches = model.config.vision.patches
    examples = [
        data.pair_example(row, seen[i], tokenizer, patches, gamma=5) for i, row in enumerate(rows)
    ]
    scores = ddpo.reference_scores(model, examples, settings_of_ddpo, "cpu")
    for example, score in zip(examples, scores):
        example.reference = score
    once = time.perf_counter() - started
    select_trainable(model)
    algorithm = ddpo.DDPO(model, settings_of_ddpo, 0, examples)
    loop = train.Loop(algorithm, folder, config.Run(dtype="float32"), torch.device("cpu"))
    whole = [e.prompt + r.tokens for e in examples for r in e.responses]
    say(digest=digest(whole), once=once, trunk=statistics.mean(len(e.prompt) for e in examples),
        response=statistics.mean(len(r.tokens) for e in examples for r in e.responses),
        shared=statistics.mean(data.common_prefix(e.responses) for e in examples),
        parameters=sum(weight.numel() for weight in model.parameters()))
    turns = Turns()
    while turns.next():
        loop.one_step()
        loop.step += 1
    say(peak=resident("VmHWM") - before)


def trl(folder: Path, pairs: int, checkpointing: bool) -> None:
    from data import IMAGE, prompt_text
    from datasets import Dataset
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    before = resident("VmRSS")
    model = LlavaForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
    model.model.vision_tower.requires_grad_(False)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    dataset = Dataset.from_list([{
        "images": [Image.open(folder / row["image"])],
        "prompt": "<s>" + prompt_text(row["question"]),
        "chosen": row["chosen"] + "</s>", "rejected": row["rejected"] + "</s>",
    } for row in rows])
    turns = Turns()

    class InTurn(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            control.should_training_stop = not turns.next()

        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = not turns.next()

    trainer = DPOTrainer(
        model, processing_class=AutoProcessor.from_pretrained(folder / "model"),
        train_dataset=dataset, callbacks=[InTurn()],
        args=DPOConfig(
            str(folder / "trl"), per_device_train_batch_size=pairs, max_steps=10**6, beta=BETA,
            learning_rate=RATE, gradient_checkpointing=checkpointing, bf16=False, use_cpu=True,
            dataloader_pin_memory=False, report_to="none", save_strategy="no",
            logging_strategy="no", disable_tqdm=True,
        ),
    )
    batch = trainer.data_collator([dataset[i] for i in range(len(dataset))])
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    say(digest=digest(row[here].tolist() for row, here in zip(ids, mask)))
    assert IMAGE in dataset[0]["prompt"]
    trainer.train()
    say(peak=resident("VmHWM") - before)


WORKERS = {"ours": ours, "TRL": trl}


# The table -----------------------------------------------------------------------------------


class Worker:
    """The table's end of a worker."""

    def __init__(self, name: str, folder: Path, args, checkpointing: bool):
        command = [sys.executable, __file__, "--worker", name, "--folder", str(folder),
                   "--pairs", str(args.pairs), *["--checkpointing"] * checkpointing]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=(folder / f"{name}.log").open("w"),
        )
        self.name, self.log = name, folder / f"{name}.log"
        self.facts = self.hear()

    def hear(self) -> dict:
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        lines = self.log.read_text().strip().splitlines() or ["no message"]
        raise RuntimeError(f"{self.name} ended: {lines[-1]}")

    def step(self) -> float:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.hear()["seconds"]

    def end(self) -> int:
        """Its highest memory in bytes."""
        self.process.stdin.close()
        peak = self.hear()["peak"]
        self.process.stdout.read()
        self.process.wait()
        return peak


def compare(folder: Path, args, checkpointing: bool, show: Callable[[str], None]) -> None:
    """Both sides in turns, with or without recomputed activations."""
    workers = {}
    for name in ("TRL", "ours"):
        try:
            workers[name] = Worker(name, folder, args, checkpointing)
        except RuntimeError as error:  # a peer that is absent must not end the table
            if name == "ours":
                raise
            show(f"{name:<26}  not run: {error}")
    facts = workers["ours"].facts
    if not checkpointing:
        show(f"{facts['parameters'] / 1e6:.1f} M parameters; trunk {facts['trunk']:.0f} tokens, "
             f"responses {facts['response']:.0f}, the first {facts['shared']:.0f} of them shared")
        show(f"\n{'a step by':<26} {'s':>7} {'x TRL':>7} {'MB':>7} {'x TRL':>7}")
    if len({worker.facts["digest"] for worker in workers.values()}) > 1:
        raise RuntimeError("the two sides were given different tokens")
    steps = [{name: worker.step() for name, worker in workers.items()}
             for _ in range(args.repeats + 2)][2:]  # the first two warm up
    peaks = {name: worker.end() for name, worker in workers.items()}
    suffix = ", recomputing" if checkpointing else ""
    for name in workers:
        row(show, name + suffix, steps, lambda turn: turn[name], peaks[name], peaks)
    share = facts["once"] / EPOCHS
    row(show, f"ours{suffix}, + once / {EPOCHS}", steps, lambda turn: turn["ours"] + share,
        peaks["ours"], peaks)
    show(f"{'  once: ' + format(facts['once'], '.2f') + ' s':<26}")


def row(show, name: str, steps: list[dict], seconds: Callable, peak: int, peaks: dict) -> None:
    """Median time, median of the turns' ratios, peak memory and its ratio."""
    faster = smaller = ""
    if "TRL" in peaks:
        faster = f"{statistics.median(seconds(turn) / turn['TRL'] for turn in steps):.2f}"
        smaller = f"{peak / peaks['TRL']:.2f}"
    show(f"{name:<26} {statistics.median(map(seconds, steps)):7.2f} {faster:>7} "
         f"{peak / 1e6:7.0f} {smaller:>7}")


def table(args, show: Callable[[str], None] = print) -> None:
    from kernels import bench

    versions = ", ".join(f"{p} {bench.version(p)}" for p in ("torch", "transformers", "trl"))
    show(f"{time.strftime('%Y-%m-%d')} | {bench.device_name('cpu')} | {versions}")
    show(f"{args.pairs} pairs a step, float32, median of {args.repeats}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder, args)
        make_pairs(folder, args.pairs)
        for checkpointing in (False, True):
            compare(folder, args, checkpointing, show)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=4, help="per step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--width", type=int, default=512, help="of the decoder, a multiple of 64")
    parser.add_argument("--layers", type=int, default=8, help="of the decoder")
    parser.add_argument("--tower_width", type=int, default=192, help="a multiple of 64")
    parser.add_argument("--tower_layers", type=int, default=6)
    parser.add_argument("--image", type=int, default=224, help="pixels, a multiple of 14")
    parser.add_argument("--vocab", type=int, default=640)
    parser.add_argument("--worker", choices=tuple(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None) -> None:
    args = parse(argv)
    if args.worker:
        WORKERS[args.worker](args.folder, args.pairs, args.checkpointing)
    else:
        table(args)


if __name__ == "__main__":
    main(None)
