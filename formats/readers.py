"""Rows of the public data sets and of users, checked and turned into three kinds of record.

    RLHF-V-Dataset (parquet)     image, text = JSON of question, chosen, rejected  -> Pair
    RLAIF-V-Dataset (parquet)    image, question, chosen, rejected                 -> Pair
    plain JSONL or JSON          image, question (or prompt), chosen, rejected     -> Pair
    LLaVA-Human-Preference-10K   image, conversations, output_1, output_2,
                                 preference: 1 or 2, the better one                -> Pair
    LLaVA instruct (JSON)        image (may be absent), conversations              -> Conversation
    prompts for PPO, GRPO (JSON) image, conversations, caption_type, length_bonus  -> Prompt
    image_to_caption.json        {file name: [captions]}                           -> read_captions

`dialects.py` converts other tools' rows. The fields of a row decide its form. A preference also
serves as a conversation (with its better response), and any row as a prompt. A row that cannot be
used is an error that names file and row: nothing is cut, guessed or dropped silently. Tokens come
later, in data.py.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from formats.dialects import plain, wrong_types
from formats.files import brief, read_json
from formats.rows import (
    LISTED, DataError, ParquetImage, Source, find_files, image_path, read_rows, refuse, skipping,
)
from formats.tokenizer import IMAGE

Patterns = Sequence[str | Path]  # files or glob patterns
Folder = str | Path | None  # of images; None: the folder of the file with the row
Skip = list[str] | None  # collects errors of bad rows, which are left out; None raises them
Turn = tuple[str, str]  # a question and its answer
RATIONALE = "aok_"  # in LLaVA-RLHF, "aok_x.jpg" has captions that say why an option is right
TRUTHS = {1: None, 2: "A", 3: "B", 4: "C", 5: "D", 6: "no", 7: "yes"}  # by caption_type


@dataclass(frozen=True)
class Record:
    """A checked row."""

    name: str  # for error messages: file and row
    image: Source | None

    # A Prompt has its own:
    truth = None
    length_bonus = 1.0
    facts_prefix = ""

    @property
    def picture(self) -> str:
        """File name of the image; "" if there is none."""
        return self.image.name if self.image else ""


@dataclass(frozen=True)
class Pair(Record):
    """One preference: a question about an image, the better and the worse response."""

    question: str
    chosen: str
    rejected: str
    history: list[Turn] = field(default_factory=list)  # the turns before the question


@dataclass(frozen=True)
class Conversation(Record):
    """Questions and answers, the first question about the image if there is one."""

    turns: list[Turn]  # at least one

    @property
    def question(self) -> str:
        return self.turns[0][0]


@dataclass(frozen=True)
class Prompt(Record):
    """A question about an image, and fields for LLaVA-RLHF's rewards (arXiv 2309.14525)."""

    question: str
    caption_type: int = 1  # the kind of question, a key of TRUTHS
    length_bonus: float = 1.0  # factor of the length penalty

    @property
    def truth(self) -> str | None:
        """The right answer: an option A-D, "yes" or "no"; None: an open question."""
        return TRUTHS[self.caption_type]

    @property
    def facts_prefix(self) -> str:
        """Prefix of the image's name in `captions_of`: RATIONALE for questions with options."""
        return RATIONALE if self.truth in ("A", "B", "C", "D") else ""


def read_pairs(patterns: Patterns, images: Folder = None, skip: Skip = None) -> list[Pair]:
    """Read preference pairs. For arguments and errors of these three see `read_records`."""
    return read_records(make_pair, patterns, images, skip)


def read_conversations(
    patterns: Patterns, images: Folder = None, skip: Skip = None
) -> list[Conversation]:
    """Read conversations to learn; a preference gives its better response."""
    return read_records(make_conversation, patterns, images, skip)


def read_prompts(patterns: Patterns, images: Folder = None, skip: Skip = None) -> list[Prompt]:
    """Read the first question of every row."""
    return read_records(make_prompt, patterns, images, skip)


def read_records(make: Callable, patterns: Patterns, images: Folder, skip: Skip) -> list:
    """Return `make(name, row, folder of images)` for every row of every file.

    Raises DataError for a bad file, for bad rows that are not skipped, or if no row is usable.
    """
    if images and not Path(images).is_dir():
        raise DataError(f"{images}: no such folder")
    records, bad = [], [] if skip is None else skip
    for path in find_files(patterns):
        for name, row in latest_corrections(read_rows(path)):
            with skipping(bad):
                if isinstance(row, DataError):
                    raise row
                if not isinstance(row, dict):
                    raise DataError(f"{name}: expected an object, found a {type(row).__name__}")
                with wrong_types(name):
                    records.append(make(name, plain(name, row), images or path.parent))
            if skip is None:
                refuse(bad, LISTED + 1)
    if skip is None:
        refuse(bad)
    if not records:
        why = f"; the first one: {bad[0]}" if bad else ""
        raise DataError(f"no usable row in {', '.join(map(str, patterns))}{why}")
    return records


def latest_corrections(rows: Iterable[tuple[str, object]]) -> Iterator[tuple[str, object]]:
    """Yield rows; of annotate.py's, only the line of each id that counts, if that is a correction.

    That is the last adjudication, or else the last line.
    """
    last = {}
    for name, row in rows:
        if isinstance(row, dict) and {"id", "annotator", "status", "segments"} <= row.keys():
            _, before = last.get(str(row["id"]), ("", {}))
            if "adjudicated" in row or "adjudicated" not in before:
                last[str(row["id"])] = name, row
        else:
            yield name, row
    yield from (each for each in last.values() if each[1]["status"] == "corrected")


def read_captions(path: str | Path) -> dict[str, list[str]]:
    """Read {image name: captions} from an image_to_caption.json."""
    captions = read_json(Path(path))
    for image, texts in captions.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise DataError(f"{path}: {brief(image)} should have a list of captions")
    return captions


def captions_of(
    name: str, image: Source, captions: dict[str, list[str]], prefix: str = ""
) -> list[str]:
    """Find an image's captions by its file name or by any longer end of its path.

    Args:
        prefix: before the file's name in `captions`: RATIONALE, or "".
    """
    path = Path(image.name if isinstance(image, ParquetImage) else image)
    if not path.name:
        raise DataError(f"{name}: the image has no file name to find its captions by")
    path = path.with_name(prefix + path.name)
    for i in range(len(path.parts)):
        if (end := "/".join(path.parts[i:])) in captions:
            return captions[end]
    raise DataError(f"{name}: no captions for image {brief(str(path))}")


# ------------------------------------------------------------------------------- from row to record


def make_pair(name: str, row: dict, images: str | Path) -> Pair:
    """Return a Pair from a row of any preference format."""
    if not {"chosen", "rejected", "output_1", "output_2"} & row.keys():
        fields = [str(key) for key, value in row.items() if value is not None]
        if row.get("conversations"):
            raise DataError(f"{name}: a conversation has no two answers to compare; "
                            "SFT takes those that end with an answer")
        raise DataError(
            f"{name}: no preference among its fields ({brief(', '.join(fields) or 'none')[1:-1]}); "
            "expected image, question, chosen and rejected; or text, which holds them as JSON; or "
            "conversations, output_1, output_2 and preference"
        )
    image = image_of(name, row, images)
    if "output_1" in row or "output_2" in row:
        *messages, last = messages_of(name, row)
        *history, (question, answer) = turns_of(name, messages, True)
        if last.get("from") != "gpt" or answer:
            raise DataError(f"{name}: the last turn should be from 'gpt', after one from 'human'")
        outputs = {key: value.get("value") for key, value in row.items() if isinstance(value, dict)}
        texts = [text_of(name, outputs, key) for key in ("output_1", "output_2")]
        if row.get("preference") not in (1, 2) or row["preference"] is True:
            raise DataError(f"{name}: preference is {brief(row.get('preference'))}, not 1 or 2")
        chosen, rejected = texts if row["preference"] == 1 else texts[::-1]
    else:
        question, history = question_of(name, row), history_of(name, row)
        chosen, rejected = text_of(name, row, "chosen"), text_of(name, row, "rejected")
    if chosen == rejected:
        raise DataError(f"{name}: chosen and rejected are the same; nothing was corrected")
    return Pair(name, image, question, chosen, rejected, history)


def make_conversation(name: str, row: dict, images: str | Path) -> Conversation:
    """Return a Conversation from a row of any format that has answers."""
    if "conversations" not in row or "output_1" in row:
        pair = make_pair(name, row, images)
        return Conversation(name, pair.image, [*pair.history, (pair.question, pair.chosen)])
    image = image_of(name, row, images, needed=False)
    turns = turns_of(name, messages_of(name, row), image is not None)
    if not turns[-1][1]:
        raise DataError(f"{name}: the last turn is a question; an answer from 'gpt' should follow")
    return Conversation(name, image, turns)


def make_prompt(name: str, row: dict, images: str | Path) -> Prompt:
    """Return a Prompt from a row of any format."""
    image = image_of(name, row, images)
    if "conversations" in row:
        messages = messages_of(name, row)
        question = turns_of(name, messages[: 1 + greets(messages)], True)[0][0]
    else:
        question = [*history_of(name, row), (question_of(name, row), "")][0][0]
    kind, bonus = row.get("caption_type", 1), row.get("length_bonus", 1.0)
    if kind not in range(1, 8) or kind is True:
        raise DataError(f"{name}: caption_type is {brief(kind)}, not 1 to 7")
    if not isinstance(bonus, int | float) or not abs(bonus) < 1e9:
        raise DataError(f"{name}: length_bonus is {brief(bonus)}, not a number")
    prompt = Prompt(name, image, question, kind, float(bonus))
    if prompt.truth in ("A", "B", "C", "D") and f"{prompt.truth}." not in question:
        raise DataError(f"{name}: the right option is {prompt.truth}, but the question lists no "
                        f"{prompt.truth!r} followed by a full stop")
    return prompt


def text_of(name: str, row: dict, key: str) -> str:
    """Return a text field without surrounding white space."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{name}: field {key!r} is missing or empty")
    if IMAGE in value and key not in ("question", "prompt"):
        raise DataError(f"{name}: field {key!r} contains {IMAGE}")
    return value.strip()


def question_of(name: str, row: dict) -> str:
    """Return the question of a plain row, without `<image>` if it has one."""
    key = "prompt" if row.get("prompt") and not row.get("question") else "question"
    text = text_of(name, row, key)
    question = text.replace(IMAGE, "").strip()
    if not question or text.count(IMAGE) > 1:
        raise DataError(f"{name}: {key!r} should be a text with at most one {IMAGE}")
    return question


def history_of(name: str, row: dict) -> list[Turn]:
    """Return the earlier turns of a plain row: `history`, a list of [question, answer]."""
    history = row.get("history") or []
    for turn in history if isinstance(history, list) else [None]:
        texts = turn if isinstance(turn, list) and len(turn) == 2 else [None]
        if not all(isinstance(text, str) and text.strip() and IMAGE not in text for text in texts):
            raise DataError(f"{name}: history should be a list of [question, answer]")
    return [tuple(turn) for turn in history]


def messages_of(name: str, row: dict) -> list[dict]:
    """Return `conversations`: {"from": "human" or "gpt", "value": text} of each turn."""
    turns = row.get("conversations")
    if not turns or not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
        raise DataError(f"{name}: 'conversations' should list turns with 'from' and 'value'")
    return turns


def greets(messages: list[dict]) -> bool:
    """Return whether `gpt` begins the conversation."""
    return bool(messages) and messages[0].get("from") == "gpt"


def turns_of(name: str, messages: list[dict], image: bool) -> list[Turn]:
    """Return questions and their answers ("" if the last has none), without `<image>`.

    As in LLaVA's own code (preprocess_v1, preprocess_multimodal), a conversation that `gpt` begins
    loses that turn, and the image goes before the first question, wherever in it `<image>` stands.
    That code silently drops an image without `<image>`; here it is an error.
    """
    greeting, values = greets(messages), []
    for number, message in enumerate(messages[greeting:], 1 + greeting):
        expected = ("human", "gpt")[len(values) % 2]
        speaker, value = message.get("from"), message.get("value")
        if speaker != expected:
            raise DataError(f"{name}: turn {number} is from {brief(speaker)}, not {expected!r}")
        if not isinstance(value, str) or not value.replace(IMAGE, "").strip():
            raise DataError(f"{name}: turn {number}, from {brief(speaker)}, is empty")
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


def image_of(name: str, row: dict, images: str | Path, needed: bool = True) -> Source | None:
    """Return where a row's image is; None for a row that has none and needs none."""
    image = row.get("image")
    if needed and not image:
        raise DataError(f"{name}: field 'image' is missing or empty")
    if not image or isinstance(image, ParquetImage):
        return image or None
    if not isinstance(image, str):
        raise DataError(f"{name}: image should be the name of one file")
    return image_path(name, image, images)
