"""Files of questions about images, and answers files that an interrupted command can resume."""

import fcntl
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from data import prompt_text, prompt_tokens
from formats.files import jsonl, parse_json, write_atomic
from formats.readers import image_of, read_records
from formats.rows import DataError, Source, open_image, skipping, whole_rows
from formats.tokenizer import IMAGE, Tokenizer
from generation import progress_bar
from model import LLaVA

OWN = ("text", "by", "answer", "error")  # fields of a row that do not go into the answers file


@dataclass(frozen=True)
class ImageQuestion:
    """A question about an image, from a row of a file."""

    name: str  # for error messages: file and row
    image: Source
    question: str
    fields: dict  # fields of the row that the answers file repeats


# From images, the same object where questions are about the same pixels; questions; and a seed.
Respond = Callable[[list[Image.Image], list[ImageQuestion], int], list[str]]


def read_questions(
    path: Path, images: str | None, prompt: str | None = None, skip: list[str] | None = None
) -> list[ImageQuestion]:
    """Read rows with an image and a question (also called prompt or, in POPE's files, text).

    Args:
        images: folder that the image names are relative to; None: that of the file. A name must not
            lead outside it.
        prompt: the question of rows that have none.
        skip: collects messages about unusable rows; None: the first one is raised as a DataError.
    """
    make = partial(make_question, prompt=prompt)
    return read_records(make, [escape(str(path))], images, skip)


def make_question(name: str, row: dict, images: str, prompt: str | None) -> ImageQuestion:
    image = image_of(name, row, images)
    text = row.get("question") or row.get("prompt") or row.get("text") or prompt
    question = text.replace(IMAGE, "").strip() if isinstance(text, str) else ""
    if not question:
        raise DataError(f"{name}: field 'question' is missing or empty")
    if row.get("history"):
        raise DataError(f"{name}: has earlier turns; a question is asked without any")
    fields = {key: value for key, value in row.items() if key not in OWN
              and isinstance(value, str | int | float) and value == value}  # NaN is not JSON
    fields["question"] = question
    fields.setdefault("image", image.name or name)  # of an image inside a parquet file
    return ImageQuestion(name, image, question, fields)


def that_fit(
    model: LLaVA, tokenizer: Tokenizer, questions: Sequence[ImageQuestion], skip: list[str] | None
) -> Iterator[ImageQuestion]:
    """Yield the questions without `<image>` that leave room for an answer; `skip`: as above."""
    context, patches = model.config.text.max_position_embeddings, model.config.vision.patches
    for each in questions:
        with skipping(skip):
            if IMAGE in each.question:
                raise DataError(f"{each.name}: the question contains {IMAGE}; leave it out, the "
                                "image comes first anyway")
            length = len(prompt_tokens(tokenizer, prompt_text(each.question), patches))
            if length >= context:
                raise DataError(f"{each.name}: image and question have {length} tokens, the "
                                f"context holds {context}")
            yield each


def read_answers(path: Path) -> list[dict]:
    """Read answers that were made elsewhere: rows with "answer", and "name" for error messages.

    The answer may also be called caption or text; a row without any is a DataError. It is None for
    an image that evaluate.py could not read.
    """
    rows = []
    for name, row in whole_rows(path):
        if "error" in row and "answer" not in row:
            rows.append({**row, "answer": None, "name": name})
            continue
        texts = [row[k] for k in ("answer", "caption", "text") if isinstance(row.get(k), str)]
        if not texts:
            raise DataError(f"{name}: no answer, caption or text")
        rows.append({**row, "answer": texts[0], "name": name})
    return rows


# ------------------------------------------------------------------------------------ answers files


def whole_lines(path: Path) -> list[dict]:
    """Return the rows of a JSONL file, if it exists, without a killed process's unfinished line."""
    *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    with suppress(ValueError):
        parse_json(last)
        lines.append(last)  # it lacks nothing but its end
    try:
        return [dict(parse_json(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not rows in JSON lines ({error}); move it away") from None


def answer_file(
    respond: Respond, by: str, questions: Sequence[ImageQuestion], path: Path,
    batch_size: int = 16, seed: int = 0, skip: list[str] | None = None,
) -> list[dict]:
    """Answer questions into a JSONL file, or resume a partial one.

    Args:
        respond: (images, questions, seed) -> texts.
        by: the model and its settings; all rows of a file must agree in it.
        path: gets one row per question, in order: its fields, "by" and "answer", or "error" in
            place of an answer if the image cannot be read and `skip` is given.
        batch_size: questions per call of `respond`; their rows are written after each call.
        seed: of the first batch. A resumed file has the same rows as an uninterrupted one.
        skip: collects messages about unreadable images; None: the first one is raised.

    Returns all rows. ValueError if the file answers other questions or is another model's.
    """
    wanted = [{**each.fields, "by": by} for each in questions]
    with ExitStack() as opened:
        file = opened.enter_context(open_locked(path))
        bar = opened.enter_context(progress_bar(len(wanted), path.stem))
        rows = whole_lines(path)
        fits = (want.items() <= row.items() for row, want in zip(rows, wanted))
        if len(rows) > len(wanted) or not all(fits):
            raise ValueError(f"{path} holds answers to other questions, or of another model or "
                             "settings; move it away or choose another --output")
        if len(rows) < len(wanted):
            del rows[len(rows) // batch_size * batch_size :]  # a part of a batch: answered again
        mended = sorted({i // batch_size * batch_size for i in readable(questions, rows, skip)})
        for start in mended:
            batch = slice(start, start + batch_size)
            answer_batch(respond, questions[batch], wanted[batch], seed + start, skip)
            rows[batch] = wanted[batch]
        if path.read_bytes() != (whole := jsonl(rows).encode()):
            write_atomic(path, whole)
            file = opened.enter_context(open_locked(path))  # another file now
        bar.update(len(rows))
        for start in range(len(rows), len(wanted), batch_size):
            batch = slice(start, start + batch_size)
            answer_batch(respond, questions[batch], wanted[batch], seed + start, skip)
            file.write(jsonl(wanted[batch]).encode())
            file.flush()
            rows += wanted[batch]
            bar.update(len(wanted[batch]))
    return rows


def open_locked(path: Path) -> BinaryIO:
    """Open a file to append to, for this command alone."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{path}: another command is writing it; choose another --output"
                         ) from None
    return file


def readable(
    questions: Sequence[ImageQuestion], rows: Sequence[dict], skip: list[str] | None
) -> Iterator[int]:
    """Yield the places of rows without an answer whose images can be read now."""
    for i, (question, row) in enumerate(zip(questions, rows)):
        if "error" in row:
            with skipping(skip):
                open_image(question.name, question.image)
                yield i


def answer_batch(
    respond: Respond, questions: Sequence[ImageQuestion], rows: Sequence[dict], seed: int,
    skip: list[str] | None,
) -> None:
    """Add "answer" or "error" to the row of every question."""
    distinct, images, asked = {}, [], []
    for question, row in zip(questions, rows):
        with skipping(skip):
            image = open_image(question.name, question.image)
            pixels = hashlib.sha256(image.tobytes()).digest()
            images.append(distinct.setdefault((image.size, pixels), image))
            asked.append((question, row))
            continue
        row["error"] = skip[-1]
    if images:
        texts = respond(images, [question for question, _ in asked], seed)
        for (_, row), text in zip(asked, texts, strict=True):
            row["answer"] = text
