"""Tokens per second of `model.generate` against transformers' `generate`, on the same weights.

    python kernels/bench.py --generate                        the shipped base of the built-in world
    python kernels/bench.py --generate --random               a random model of 0.3 M parameters
    python kernels/bench.py --generate --model DIR --device cuda --compiled

A batch of answers of exactly so many new tokens (end-of-sequence is switched off), to questions
about drawn scenes: each answer to a prompt of its own, or four samples of each prompt, as rollouts
and rankings draw them. The two take turns; medians of time, and of the turns' ratios. `--compiled`
adds our compiled decoding, after the steps that compile it.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import checkpoint  # noqa: E402
import drawing  # noqa: E402
import world  # noqa: E402
from data import prompt_text, prompt_tokens  # noqa: E402
from kernels import bench, bench_step  # noqa: E402
from model import generate  # noqa: E402
from vision import preprocess  # noqa: E402


def make_inputs(model, tokenizer, settings, count: int):
    """(count, 3, size, size) pixels and as many prompts of one length."""
    scenes = [world.make_scene(f"bench {i}") for i in range(count)]
    pixels = torch.stack([
        preprocess(drawing.draw(scene, settings.size), **dataclasses.asdict(settings))
        for scene in scenes
    ])
    text = prompt_text(world.DESCRIBE_PROMPTS_TRAIN[0])
    prompt = prompt_tokens(tokenizer, text, model.config.vision.patches)
    like = model.head.weight
    return pixels.to(like), [torch.tensor(prompt, device=like.device)] * count


def theirs(folder, like, pixels, prompts, tokens: int, samples: int) -> Callable:
    """transformers' side of it; ImportError where it is not installed."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=like.dtype)
    model = model.to(like.device).eval()
    model.generation_config.eos_token_id = None
    ids = torch.stack(prompts)
    drawn = {"do_sample": True, "top_k": 0, "num_return_sequences": samples}
    chosen = drawn if samples > 1 else {"do_sample": False}

    def run():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels,
            max_new_tokens=tokens, **chosen,
        )
        assert out.shape == (len(ids) * samples, ids.shape[1] + tokens)

    return run


def seconds(run: Callable, device: str) -> float:
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(args, model, tokenizer, settings, samples: int, show: Callable) -> None:
    pixels, prompts = make_inputs(model, tokenizer, settings, args.batch // samples)
    temperature = 1.0 if samples > 1 else 0.0

    def ours(compiled: bool) -> Callable:
        def run():
            answers = generate(
                model, pixels, prompts, args.tokens, temperature, samples, compiled=compiled
            )
            assert sum(map(len, answers)) == args.batch * args.tokens

        return run

    runs = {"ours": ours(False)} | ({"ours, compiled": ours(True)} if args.compiled else {})
    try:
        runs["transformers"] = theirs(
            args.model, model.head.weight, pixels, prompts, args.tokens, samples
        )
    except ImportError as error:  # a peer that is absent must not end the table
        show(f"transformers: not run: {error}")
    turns = [{name: seconds(run, args.device) for name, run in runs.items()}
             for _ in range(args.repeats + 2)]
    first, turns = turns[0], turns[2:]
    show(f"\n{len(prompts)} prompts of {len(prompts[0])} tokens x {samples}, {args.tokens} new each")
    show(f"{'by':<16} {'tokens/s':>9} {'x transformers':>15} {'first s':>8}")
    for name in sorted(runs, reverse=True):
        rate = args.batch * args.tokens / statistics.median(turn[name] for turn in turns)
        ratio = ""
        if "transformers" in runs:
            faster = statistics.median(turn["transformers"] / turn[name] for turn in turns)
            ratio = f"{faster:.2f}"
        show(f"{name:<16} {rate:9.0f} {ratio:>15} {first[name]:8.2f}")


def table(args, show: Callable[[str], None] = print) -> None:
    model, tokenizer, settings = checkpoint.load_llava(args.model, args.device, args.dtype)
    model.config = dataclasses.replace(model.config, eos_token=-1)
    versions = ", ".join(f"{p} {bench.version(p)}" for p in ("torch", "transformers"))
    weights = sum(weight.numel() for weight in model.parameters())
    show(f"{time.strftime('%Y-%m-%d')} | {bench.device_name(args.device)} | {versions}")
    show(f"{weights / 1e6:.1f} M parameters, {args.dtype}, median of {args.repeats}")
    for samples in (1, 4):
        compare(args, model, tokenizer, settings, samples, show)


def main(argv: list[str] | None) -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "base"), help="a folder in llava-hf's layout")
    parser.add_argument("--random", action="store_true", help="a tiny random model instead")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), metavar="DTYPE",
                        default=torch.bfloat16 if gpu else torch.float32)
    parser.add_argument("--batch", type=int, default=16, help="answers, a multiple of 4")
    parser.add_argument("--tokens", type=int, default=64, help="new ones of each answer")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compiled", action="store_true")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.random:
            shape = "--width 64 --layers 2 --tower_width 64 --tower_layers 2 --image 56"
            bench_step.make_model(Path(folder), bench_step.parse(shape.split()))
            args.model = f"{folder}/model"
        table(args)


if __name__ == "__main__":
    main(None)
