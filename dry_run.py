"""What `--dry_run` prints: the rows as they would be trained on, and what the run will need."""

from collections.abc import Iterable

from torch import Tensor

import features
from config import Training
from data import Example, Tokenizer, marked, row_length
from model import LLaVA, TextConfig


def show_rows(examples: list[Example], tokenizer: Tokenizer) -> None:
    """Print every response, corrected segments in [brackets], what is only given in {braces}."""
    for example in examples:
        print(example.name)
        labels = ("chosen", "rejected") if len(example.responses) == 2 else ("answer",)
        for label, response in zip(labels, example.responses):
            print(f"  {label:9}{marked(response, tokenizer)}")
    weights = [w for example in examples for r in example.responses for w in r.weight]
    print(f"{len(examples)} rows, {sum(w > 0 for w in weights)} tokens to learn from, "
          f"{sum(w > 1 for w in weights)} of them in corrected segments")


def activation_bytes(config: TextConfig, tokens: int, itemsize: int, checkpointing: bool) -> int:
    """What the decoder keeps of one row for the backward pass: an estimate by counting.

    Per token and block: input and output of both norms (4 D); queries, keys and values
    (D + 2 KV); attention's output (D); gate, up, and what comes of them (3 I). With
    gradient checkpointing the block's input (D) stays, and one block at a time is computed again.
    Once: the last norm's input (D), and the rotary cosines and sines.
    """
    width, inner = config.hidden_size, config.intermediate_size
    block = 6 * width + 2 * config.num_key_value_heads * config.head_dim + 3 * inner
    blocks = config.num_hidden_layers * (width if checkpointing else block)
    once = width + 2 * config.head_dim + (block if checkpointing else 0)
    return tokens * itemsize * (blocks + once)


def needs(
    model: LLaVA, config: Training, examples: list[Example], named: features.Named, itemsize: int
) -> str:
    """What a run will need, one thing a line.

    Args:
        model: with the parameters selected that will be trained.
        named: names and images of the rows, for the features.
        itemsize: bytes of a number in computation.
    """
    weights = list(model.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    longest = max(map(row_length, examples))
    checkpointing = model.decoder.gradient_checkpointing
    row = activation_bytes(model.config.text, longest, itemsize, checkpointing)
    rows = min(config.micro_batch, config.batch_size)
    images, patches, width = features.size(model, named)
    seen = images * patches * width * model.head.weight.element_size()
    lines = {
        "parameters": f"{numbers(weights):,}, of which {numbers(trained):,} are trained",
        "weights": readable(count(weights)),
        "gradients": readable(count(trained)),
        "optimizer": f"{readable(2 * count(trained))} (AdamW: two averages of every gradient)",
        "activations": f"{readable(row)} for the longest row of {longest} tokens, "
                       f"{readable(row * rows)} for a micro-batch of {rows} such (estimated: "
                       f"what the decoder keeps{', checkpointed' if checkpointing else ''})",
        "features": f"{readable(seen)} for {images} images, "
                    + ("in memory" if seen <= features.LIMIT else "in a file in the run's folder"),
    }
    return "\n".join(f"{name:12} {value}" for name, value in lines.items())


def numbers(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


def count(weights: Iterable[Tensor]) -> int:
    return sum(weight.nbytes for weight in weights)


def readable(number: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.3g} {unit}" if unit != "bytes" else f"{number} bytes"
        number /= 1000
