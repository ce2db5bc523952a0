"""What `--dry_run` prints: rows as they would be trained on, and an estimate of the memory."""

from collections.abc import Sequence

from config import Training
from data import Example, Response, row_length, segments
from formats import features
from formats.tokenizer import Tokenizer
from model import LLaVA, TextConfig


def show_rows(examples: Sequence[Example], tokenizer: Tokenizer) -> None:
    """Print every response, corrected segments in [brackets] and given text in {braces}."""
    for example in examples:
        print(printable(example.name))
        labels = ("chosen", "rejected") if len(example.responses) == 2 else ("response",)
        for label, response in zip(labels, example.responses):
            print(f"  {label:9}{printable(marked(response, tokenizer))}")
    weights = [w for example in examples for r in example.responses for w in r.weight]
    print(f"{len(examples)} rows, {sum(w > 0 for w in weights)} tokens to learn from, "
          f"{sum(w > 1 for w in weights)} of them in corrected segments")


def marked(response: Response, tokenizer: Tokenizer) -> str:
    """Return the response's text with its segments in the brackets of their weight."""
    return "".join(
        f"[{text}]" if weight > 1 else text if weight > 0 else f"{{{text}}}"
        for text, weight in segments(response, tokenizer))


def printable(text: str) -> str:
    """Escape control characters, which could steer the terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def memory_estimate(
    model: LLaVA, config: Training, examples: Sequence[Example], named: features.Named,
    itemsize: int,
) -> str:
    """Return the memory that a run takes, one item per line.

    Args:
        model: with the parameters selected that will be trained.
        named: names and images of the rows, for the features.
        itemsize: bytes of a number in computation.
    """
    weights = list(model.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    count = lambda of: sum(weight.numel() for weight in of)
    size = lambda of: sum(weight.nbytes for weight in of)
    longest, rows = max(map(row_length, examples)), min(config.micro_batch, config.batch_size)
    checkpointing = model.decoder.gradient_checkpointing
    float32 = itemsize < model.head.weight.element_size()
    row = activation_bytes(model.config.text, longest, itemsize, checkpointing, float32)
    images, patches, width = features.size(model, named)
    stored = images * patches * width * model.head.weight.element_size()
    where = "in memory" if stored <= features.LIMIT else "in a file in the run's folder"
    return f"""\
parameters   {count(weights):,}, of which {count(trained):,} are trained
weights      {readable(size(weights))}
gradients    {readable(size(trained))}
optimizer    {readable(2 * size(trained))} (AdamW: two averages of every gradient)
activations  {readable(row)} for the longest row of {longest} tokens, {readable(row * rows)} for a \
micro-batch of {rows} such (estimated: what the decoder keeps{", checkpointed" * checkpointing})
features     {readable(stored)} for {images} images, {where}"""


def activation_bytes(
    config: TextConfig, tokens: int, itemsize: int, checkpointing: bool, float32_norms: bool = False
) -> int:
    """Estimate the bytes that the decoder keeps of one row for the backward pass, by counting.

    Per token and block: input and output of both norms (4 D); queries, keys and values (D + 2 KV);
    the attention's output (D); gate, up, and their product (3 I). Gradient checkpointing keeps the
    block's input (D) and recomputes one block at a time. Once per token: the last norm's input (D),
    and the rotary cosines and sines.

    Args:
        float32_norms: half-precision products over float32 weights (autocast): the norms' inputs
            are float32, and each of the five products of their outputs keeps a copy for itself.
    """
    width, inner = config.hidden_size, config.intermediate_size
    state = width * (4 if float32_norms else itemsize)  # bytes of a block's input
    products = (7 if float32_norms else 4) * width + 3 * inner
    products += 2 * config.num_key_value_heads * config.head_dim
    block = 2 * state + itemsize * products
    blocks = config.num_hidden_layers * (state if checkpointing else block)
    once = state + itemsize * 2 * config.head_dim + (block if checkpointing else 0)
    return tokens * (blocks + once)


def readable(number: float) -> str:
    """Format a number of bytes."""
    if number < 1000:
        return f"{number} bytes"
    for unit in ("kB", "MB", "GB"):
        number /= 1000
        if number < 1000:
            break
    return f"{number:.3g} {unit}"
