"""Asking a model: questions in batches, a file of them that can be resumed, one as a stream."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data import prompt_text, prompt_tokens
from files import write_atomic
from model import LLaVA, generate
from rows import DataError, ParquetImage, Source, image_path, open_image, read_rows
from vision import ImageSettings, preprocess

# ------------------------------------------------------------------------------------- in batches


def pixels_of(images: Sequence[Image.Image], settings: ImageSettings) -> Tensor:
    """(N, 3, size, size) as the model's tower wants them."""
    return torch.stack([
        preprocess(image, settings.size, settings.mean, settings.std, settings.mode)
        for image in images
    ])


@torch.no_grad()
def image_features(
    model: LLaVA, settings: ImageSettings, images: Sequence[Image.Image], batch_size: int = 64
) -> Tensor:
    """Features (N, patches, D_vision) of the tower, for several questions about the same images."""
    like = model.head.weight
    return torch.cat([
        model.image_features(pixels_of(images[i : i + batch_size], settings).to(like))
        for i in range(0, len(images), batch_size)
    ])


def progress_bar(total: int, label: str | None):
    """A bar on a terminal, none elsewhere, and none without a label."""
    return tqdm(total=total, desc=label, disable=True if label is None else None, leave=False)


def answers(
    model: LLaVA, tokenizer, settings: ImageSettings, images: Sequence[Image.Image] | Tensor,
    questions: Sequence[str], max_new_tokens: int = 128, temperature: float = 0.0,
    samples: int = 1, seed: int = 0, batch_size: int = 64, progress: str | None = None,
) -> list[str]:
    """The model's answers, one image and one question each.

    Args:
        images: one per question: Pillow images, or features (N, patches, D_vision) of the tower.
        questions: without `<image>` and template; both are added.
        max_new_tokens: answers end here at the latest.
        temperature: 0 is greedy; above 0 draws from a generator seeded by (seed, batch index).
        samples: answers per question.
        batch_size: questions per batch; prompts of about one length go together.
        progress: label of a progress bar; None shows none.

    Returns:
        len(questions) * samples texts in the order of the questions, samples of one side by side.
    """
    if len(images) != len(questions):
        raise ValueError(f"{len(images)} images for {len(questions)} questions")
    patches, like = model.config.vision.patches, model.head.weight
    prompts = [
        torch.tensor(prompt_tokens(tokenizer, prompt_text(question), patches))
        for question in questions
    ]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * (len(prompts) * samples)
    with progress_bar(len(prompts), progress) as bar:
        for index, start in enumerate(range(0, len(order), batch_size)):
            rows = order[start : start + batch_size]
            if isinstance(images, Tensor):
                batch = images[rows]
            else:
                batch = pixels_of([images[i] for i in rows], settings)
            generator = torch.Generator(like.device).manual_seed(seed * 1_000_003 + index)
            out = generate(
                model, batch.to(like), [prompts[i] for i in rows], max_new_tokens, temperature,
                samples, generator,
            )
            for k, tokens in enumerate(out):
                row = rows[k // samples] * samples + k % samples
                texts[row] = tokenizer.decode(tokens).strip()
            bar.update(len(rows))
    return texts


# ------------------------------------------------------------------------------ files of questions


@dataclass(frozen=True)
class Ask:
    """One question about one image, from a row of a file."""

    name: str  # for error messages: file and row
    image: Source
    question: str
    fields: dict  # what the answers file repeats of the row


def read_asks(
    path: Path, images: str | None, prompt: str | None = None, skip: list[str] | None = None
) -> list[Ask]:
    """The questions of a file: rows with image and question (or prompt, or POPE's text).

    Args:
        images: folder that the image names are relative to; none reaches outside it.
        prompt: the question of rows that have none.
        skip: if given, messages about unusable rows are collected here instead of raised.
    """
    asks = []
    for name, row in read_rows(path):
        try:
            asks.append(make_ask(name, row, images, prompt))
        except DataError as error:
            if skip is None:
                raise
            skip.append(str(error))
    return asks


def make_ask(name: str, row, images: str | None, prompt: str | None) -> Ask:
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(f"{name}: expected an object with image and question")
    question = row.get("question") or row.get("prompt") or row.get("text") or prompt
    image = row.get("image")
    if not question or not image:
        missing = "image" if question else "question"
        raise DataError(f"{name}: field {missing!r} is missing or empty")
    fields = {k: v for k, v in row.items() if isinstance(v, str | int | float) and k != "text"}
    fields["question"] = question = str(question).replace("<image>", "").strip()
    if isinstance(image, ParquetImage):
        fields["image"] = image.name or name
        return Ask(name, image, question, fields)
    return Ask(name, image_path(name, str(image), images), question, fields)


def answer_file(
    ask: Callable, by: str, asks: Sequence[Ask], path: Path, batch_size: int = 16, seed: int = 0,
    skip: list[str] | None = None,
) -> list[dict]:
    """Answer all questions into a JSONL file; a file that was begun is gone on with.

    Args:
        ask: (images, questions, seed) -> texts.
        by: who answers and how; rows of one file must agree in it.
        path: gets one row per question, in order: its fields, "by" and "answer"; or "error"
            instead of an answer, where the image cannot be read and `skip` is given.
        batch_size: questions per call of `ask`, after each of which the file is complete on disk.
        seed: of the first batch. A file in two goes has the same rows as in one.
        skip: if given, messages about unreadable images are collected here instead of raised.

    Raises:
        ValueError: the file answers other questions, or is by another model.
    """
    rows = answered_already(path, by, asks)
    del rows[len(rows) // batch_size * batch_size if len(rows) < len(asks) else len(asks) :]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    with progress_bar(len(asks), path.stem) as bar, path.open("a", encoding="utf-8") as file:
        bar.update(len(rows))
        for start in range(len(rows), len(asks), batch_size):
            part = asks[start : start + batch_size]
            new = [{**each.fields, "by": by} for each in part]
            images = {}
            for i, each in enumerate(part):
                try:
                    images[i] = open_image(each.name, each.image)
                except DataError as error:
                    if skip is None:
                        raise
                    skip.append(str(error))
                    new[i]["error"] = str(error)
            if images:
                texts = ask(list(images.values()), [part[i].question for i in images], seed + start)
                for i, text in zip(images, texts, strict=True):
                    new[i]["answer"] = text
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new)
            file.flush()
            rows += new
            bar.update(len(part))
    return rows


def answered_already(path: Path, by: str, asks: Sequence[Ask]) -> list[dict]:
    """The whole rows of an answers file that was begun; half a line at its end does not count."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        rows = [json.loads(line) for line in lines]
        fits = len(rows) <= len(asks) and all(
            row["by"] == by and {k: row[k] for k in each.fields} == each.fields
            for row, each in zip(rows, asks)
        )
    except (ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        raise ValueError(
            f"{path} holds answers to other questions, or of another model or settings; "
            "delete it or choose another --output"
        )
    return rows


# -------------------------------------------------------------------------------------- as a stream


def stream(
    model: LLaVA, tokenizer, settings: ImageSettings, image: Image.Image, question: str,
    max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0,
    write: Callable[[str], object] = partial(print, end="", flush=True),
) -> str:
    """One answer, written piece by piece as it is made; also returned whole."""
    like, tokens, text = model.head.weight, [], ""

    def on_token(step: Tensor) -> None:
        nonlocal text
        tokens.append(int(step[0, 0]))
        whole = tokenizer.decode(tokens)
        if not whole.endswith("\ufffd"):  # the rest of this character is still to come
            write(whole[len(text) :])
            text = whole

    prompt = torch.tensor(
        prompt_tokens(tokenizer, prompt_text(question), model.config.vision.patches))
    out = generate(
        model, pixels_of([image], settings).to(like), [prompt], max_new_tokens, temperature, 1,
        torch.Generator(like.device).manual_seed(seed), on_token,
    )
    whole = tokenizer.decode(out[0])
    write(whole[len(text) :] + "\n")
    return whole.strip()
