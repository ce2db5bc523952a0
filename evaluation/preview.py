"""The rows that `--dry_run` prints, as training would use them."""

from collections.abc import Sequence

from data import Example, Response, segments
from formats.tokenizer import Tokenizer


def show_rows(examples: Sequence[Example], tokenizer: Tokenizer) -> None:
    """Print every response, corrected segments in [brackets] and untrained text in {braces}."""
    for example in examples:
        print(printable(example.name))
        labels = ("chosen", "rejected") if len(example.responses) == 2 else ("response",)
        for label, response in zip(labels, example.responses):
            print(f"  {label:9}{printable(marked(response, tokenizer))}")
    weights = [w for example in examples for r in example.responses for w in r.weight]
    print(f"{len(examples)} rows, {sum(w > 0 for w in weights)} tokens to learn from, "
          f"{sum(w > 1 for w in weights)} of them in corrected segments")


def marked(response: Response, tokenizer: Tokenizer) -> str:
    """Return the response's text with brackets or braces around segments, by their weight."""
    return "".join(
        f"[{text}]" if weight > 1 else text if weight > 0 else f"{{{text}}}"
        for text, weight in segments(response, tokenizer))


def printable(text: str) -> str:
    """Escape control characters, which could steer the terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
