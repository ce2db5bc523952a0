"""Rows as users have them, checked and brought to three records; no tokens here.

    RLHF-V-Dataset (parquet)     image, text = JSON of question, chosen, rejected  -> Pair
    RLAIF-V-Dataset (parquet)    image, question, chosen, rejected                 -> Pair
    plain JSONL or JSON          image, question (or prompt), chosen, rejected     -> Pair
    LLaVA-Human-Preference-10K   image, conversations, output_1, output_2,
                                 preference: 1 or 2, the better one                -> Pair
    LLaVA instruct (JSON)        image (may be absent), conversations              -> Conversation
    prompts for PPO (JSON)       image, conversations, caption_type, length_bonus  -> Prompt
    image_to_caption.json        {file name: [captions]}                           -> read_captions

Which of them a row belongs to, its fields tell. A preference serves wherever a conversation is
wanted (with its better answer), and anything serves where only a prompt is. What cannot be used is
an error that names file and row: nothing is cut, guessed or dropped silently.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from files import read_json
from rows import DataError, ParquetImage, Source, find_files, image_path, read_rows, skipping

IMAGE = "<image>"

Turn = tuple[str, str]  # a question and its answer


@dataclass
class Pair:
    """One preference: a question about an image, the better and the worse answer."""

    name: str  # for error messages: file and row
    image: Source
    question: str
    chosen: str
    rejected: str
    history: list[Turn] = field(default_factory=list)  # what was said before the question


@dataclass
class Conversation:
    """Questions and answers, the first question about the image if there is one."""

    name: str
    image: Source | None
    turns: list[Turn]  # at least one


@dataclass
class Prompt:
    """A question about an image, and what LLaVA-RLHF's rewards want to know about it."""

    name: str
    image: Source
    question: str
    caption_type: int = 1  # 1 open question; the right answer is 2-5: A-D, 6: No, 7: Yes
    length_bonus: float = 1.0  # factor of the length penalty


def read_pairs(
    patterns: Sequence[str | Path], images: str | Path | None = None, skip: list[str] | None = None
) -> list[Pair]:
    """Preference pairs.

    Args:
        patterns: files or glob patterns.
        images: folder that image names are relative to; None: the folder of the file with the row.
        skip: if given, messages about bad rows are collected here and the rows left out; otherwise
            the first bad row raises.

    Raises:
        DataError: a file or row is wrong, or nothing was found.
    """
    return read_records(make_pair, patterns, images, skip)


def read_conversations(
    patterns: Sequence[str | Path], images: str | Path | None = None, skip: list[str] | None = None
) -> list[Conversation]:
    """Conversations to learn; of a preference the better answer. Arguments as `read_pairs`."""
    return read_records(make_conversation, patterns, images, skip)


def read_prompts(
    patterns: Sequence[str | Path], images: str | Path | None = None, skip: list[str] | None = None
) -> list[Prompt]:
    """Questions to answer: the first of every row. Arguments as `read_pairs`."""
    return read_records(make_prompt, patterns, images, skip)


def read_records(make: Callable, patterns, images, skip: list[str] | None) -> list:
    """`make(name, row, folder of images)` of every row of every file."""
    records = []
    for path in find_files(patterns):
        for name, row in read_rows(path):
            with skipping(skip):
                if isinstance(row, DataError):
                    raise row
                if not isinstance(row, dict):
                    raise DataError(f"{name}: expected an object, found a {type(row).__name__}")
                records.append(make(name, row, images or path.parent))
    if not records:
        why = f"; the first one: {skip[0]}" if skip else ""
        raise DataError(f"no usable row in {', '.join(map(str, patterns))}{why}")
    return records


def read_captions(path: str | Path) -> dict[str, list[str]]:
    """{image name: captions} of an image_to_caption.json."""
    captions = read_json(Path(path))
    for image, texts in captions.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise DataError(f"{path}: {image!r} should have a list of captions")
    return captions


def captions_of(name: str, image: Source, captions: dict[str, list[str]]) -> list[str]:
    """The captions of a record's image, found by its file name or by any longer end of its path."""
    path = image.name if isinstance(image, ParquetImage) else image
    parts = Path(path).parts
    for i in range(len(parts)):
        if "/".join(parts[i:]) in captions:
            return captions["/".join(parts[i:])]
    raise DataError(f"{name}: no captions for image '{path}'")


# ------------------------------------------------------------------------------- from row to record


def make_pair(name: str, row: dict, images: str | Path) -> Pair:
    """A checked Pair from a row of any of the preference formats."""
    known = {"chosen", "rejected", "output_1", "output_2"}
    if not known & row.keys():
        if "conversations" in row:
            raise DataError(f"{name}: a conversation without two answers to compare (SFT takes it)")
        raise DataError(
            f"{name}: no preference among its fields ({', '.join(map(str, row)) or 'none'}); "
            "expected image, question, chosen and rejected; or text, which holds them as JSON; or "
            "conversations, output_1, output_2 and preference"
        )
    image = image_of(name, row, images)
    if "output_1" in row or "output_2" in row:
        messages = messages_of(name, row)
        *history, question = turns_of(name, messages[:-1], image is not None)
        if messages[-1].get("from") != "gpt" or question[1]:
            raise DataError(f"{name}: the last turn should be from 'gpt', after one from 'human'")
        texts = [text_of(name, row.get(key), "value", key) for key in ("output_1", "output_2")]
        if row.get("preference") not in (1, 2):
            raise DataError(f"{name}: preference is {row.get('preference')!r}, not 1 or 2")
        chosen, rejected = texts if row["preference"] == 1 else texts[::-1]
        question = question[0]
    else:
        question, history = question_of(name, row), history_of(name, row)
        chosen, rejected = text_of(name, row, "chosen"), text_of(name, row, "rejected")
    if chosen == rejected:
        raise DataError(f"{name}: chosen and rejected are the same; nothing was corrected")
    return Pair(name, need_image(name, image), question, chosen, rejected, history)


def make_conversation(name: str, row: dict, images: str | Path) -> Conversation:
    """A checked Conversation from a row of any format that has answers."""
    if "conversations" not in row or "output_1" in row:
        pair = make_pair(name, row, images)
        return Conversation(name, pair.image, [*pair.history, (pair.question, pair.chosen)])
    image = image_of(name, row, images)
    turns = turns_of(name, messages_of(name, row), image is not None)
    if not turns[-1][1]:
        raise DataError(f"{name}: the last turn is a question; an answer from 'gpt' should follow")
    return Conversation(name, image, turns)


def make_prompt(name: str, row: dict, images: str | Path) -> Prompt:
    """A checked Prompt from a row of any format."""
    image = need_image(name, image_of(name, row, images))
    if "conversations" in row:
        question = turns_of(name, messages_of(name, row)[:1], True)[0][0]
    else:
        question = question_of(name, row)
    kind, bonus = row.get("caption_type", 1), row.get("length_bonus", 1.0)
    if kind not in range(1, 8):
        raise DataError(f"{name}: caption_type is {kind!r}, not 1 to 7")
    if not isinstance(bonus, int | float) or not math.isfinite(bonus):
        raise DataError(f"{name}: length_bonus is {bonus!r}, not a number")
    return Prompt(name, image, question, kind, float(bonus))


def text_of(name: str, row, key: str, shown: str = "") -> str:
    """A text field, without the white space around it."""
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{name}: field {shown or key!r} is missing or empty")
    if IMAGE in value and key not in ("question", "prompt"):
        raise DataError(f"{name}: field {shown or key!r} contains {IMAGE}")
    return value.strip()


def question_of(name: str, row: dict) -> str:
    """The question of a plain row; it may contain `<image>` once, and need not."""
    question = text_of(name, row, "question" if row.get("question") or not row.get("prompt")
                       else "prompt")
    if question.count(IMAGE) > 1:
        raise DataError(f"{name}: {question.count(IMAGE)} {IMAGE} in the question, but one image")
    question = question.replace(IMAGE, "").strip()
    if not question:
        raise DataError(f"{name}: there is nothing but {IMAGE} in the question")
    return question


def history_of(name: str, row: dict) -> list[Turn]:
    """Earlier turns of a plain row: `history`, a list of [question, answer]; usually absent."""
    history = row.get("history") or []
    for turn in history if isinstance(history, list) else [None]:
        texts = turn if isinstance(turn, list) and len(turn) == 2 else [None]
        if not all(isinstance(text, str) and text.strip() and IMAGE not in text for text in texts):
            raise DataError(f"{name}: history should be a list of [question, answer]")
    return [tuple(turn) for turn in history]


def messages_of(name: str, row: dict) -> list[dict]:
    messages = row.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{name}: field 'conversations' is missing or empty")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise DataError(f"{name}: turn {number} should have 'from' and 'value'")
    return messages


def turns_of(name: str, messages: list[dict], image: bool) -> list[Turn]:
    """Questions with their answers, "" if the last has none; `<image>` is taken out of the first.

    As in LLaVA's own code (preprocess_v1, preprocess_multimodal), a conversation that `gpt` begins
    loses that turn, and the image goes before the first question, wherever in it `<image>` stands.
    That code drops an image without `<image>` silently; here it is an error.
    """
    greeting = bool(messages) and messages[0].get("from") == "gpt"
    values = []
    for number, message in enumerate(messages[greeting:], 1 + greeting):
        speaker, value = ("human", "gpt")[len(values) % 2], message.get("value")
        if message.get("from") != speaker:
            found = message.get("from")
            raise DataError(f"{name}: turn {number} is from {found!r}, not {speaker!r}")
        if not isinstance(value, str) or not value.replace(IMAGE, "").strip():
            raise DataError(f"{name}: turn {number}, from {speaker!r}, is empty")
        values.append(value)
    if not values:
        raise DataError(f"{name}: no question; the first turn should be from 'human'")
    count = sum(value.count(IMAGE) for value in values)
    if count != image:
        raise DataError(f"{name}: {count} {IMAGE} in the conversation, but {int(image)} images")
    if image:
        if IMAGE not in values[0]:
            raise DataError(f"{name}: {IMAGE} should stand in the first turn of 'human'")
        values[0] = values[0].replace(IMAGE, "").strip()
    return list(zip(values[0::2], [*values[1::2], ""]))


def image_of(name: str, row: dict, images: str | Path | None) -> Source | None:
    """Where a row's image is; None if it has none."""
    image = row.get("image")
    if not image or isinstance(image, ParquetImage):
        return image or None
    if not isinstance(image, str):
        raise DataError(f"{name}: image should be the name of one file")
    return image_path(name, image, images)


def need_image(name: str, image: Source | None) -> Source:
    if image is None:
        raise DataError(f"{name}: field 'image' is missing or empty")
    return image
