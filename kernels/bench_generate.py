"""Compare `generation.generate` with transformers' `generate`: tokens per second, same weights.

Both write completions of a fixed length (end-of-sequence is switched off) to questions about drawn
scenes: first one completion per prompt, then four samples per prompt, as rollouts and rankings draw
them. The two take turns; the table shows medians of time and of the turns' ratios, and the seconds
of the very first run, in which `--compiled` compiles.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import world
from config import option
from data import prompt_text, prompt_tokens
from formats import checkpoint
from formats.tokenizer import Tokenizer
from generation import generate, pixels_of
from kernels.bench_tools import (
    GPU, Row, machine, ratio, save_random_llava, seconds, table, take_turns,
)
from model import LLaVA
from vision import ImageSettings, VisionConfig

BASE = Path(__file__).resolve().parent.parent / "world" / "base"


@dataclasses.dataclass
class Options:
    model: str = option(str(BASE), "a folder in llava-hf's layout")
    random: bool = option(False, "use a tiny random model instead")
    batch: int = option(16, "completions, a multiple of 4", least=4)
    tokens: int = option(64, "new tokens per completion", least=1)
    compiled: bool = option(False, "also measure our compiled decoding")
    device: str = option("cuda" if GPU else "cpu", "where to run", choices=("cuda", "cpu"))
    repeats: int = option(7, "measured turns", least=1)


def theirs(
    folder: str, pixels: Tensor, prompts: list[Tensor], tokens: int, samples: int
) -> Callable[[], Tensor]:
    """Return transformers' side; raise ImportError where it is not installed."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=pixels.dtype)
    model = model.to(pixels.device).eval()
    model.generation_config.eos_token_id = None
    ids, sampling = torch.stack(prompts), {"do_sample": False}
    if samples > 1:
        sampling = {"do_sample": True, "top_k": 0, "num_return_sequences": samples}
    return partial(
        model.generate, input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels,
        max_new_tokens=tokens, **sampling)


def compare(
    options: Options, model: LLaVA, tokenizer: Tokenizer, settings: ImageSettings, samples: int
) -> Iterator[Row]:
    """Yield the table's rows for `samples` completions of each prompt."""
    tokens, count, like = options.tokens, options.batch // samples, model.head.weight
    pictures = [world.draw(world.make_scene(f"bench {i}"), settings.size) for i in range(count)]
    pixels = pixels_of(pictures, settings).to(like)
    text = prompt_text(world.DESCRIBE_PROMPTS_TRAIN[0])
    prompt = prompt_tokens(tokenizer, text, model.config.vision.patches)
    prompts = [torch.tensor(prompt, device=like.device)] * count
    temperature = 1.0 if samples > 1 else 0.0
    ours = partial(generate, model, pixels, prompts, tokens, temperature, samples)
    runs = {"ours, compiled": partial(ours, compiled=True)} if options.compiled else {}
    runs["ours"] = ours
    try:
        runs["transformers"] = theirs(options.model, pixels, prompts, tokens, samples)
    except ImportError as error:  # an absent peer must not end the table
        print(f"transformers: not run: {error}")
    first = {name: seconds(run, options.device) for name, run in runs.items()}
    times = take_turns(runs, options.repeats, options.device)
    for name in sorted(runs, reverse=True):
        yield {"prompts": count, "tokens each": len(prompt), "samples": samples, "by": name,
               "tokens/s": count * samples * tokens / median(times[name]),
               "x transformers": ratio(times.get("transformers"), times[name]),
               "first s": first[name]}


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if options.random:
            tower = VisionConfig(64, 256, 2, 1, image_size=56)
            options.model = str(save_random_llava(Path(folder), 640, 64, 2, tower))
        dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        model, tokenizer, settings = checkpoint.load_llava(options.model, options.device, dtype)
        model.config = dataclasses.replace(model.config, eos_token=-1)
        weights = sum(weight.numel() for weight in model.parameters())
        print(machine(options.device, "torch", "transformers"))
        print(f"{weights / 1e6:.1f} M parameters, {dtype}, {options.tokens} new tokens of each "
              f"completion, median of {options.repeats}\n")
        print(table([row for samples in (1, 4)
                     for row in compare(options, model, tokenizer, settings, samples)]))
