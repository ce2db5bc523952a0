"""LLaVA-RLHF's data: ranked pairs of answers, prompts for PPO, and captions as facts about images.

Files as users have them (arXiv 2309.14525, LLaVA-Human-Preference-10K):

    ranked pairs           [{image, conversations, output_1: {value}, output_2: {value},
                             preference: 1 or 2}]; the two outputs stand in the last turn's place
    prompts                [{image, conversations, caption_type, length_bonus}]; caption_type 1 is a
                           general question, 2-5 one whose right option is A-D, 6 and 7 a yes/no
                           question whose truth is no and yes
    image_to_caption.json  {file name: [captions]}

Rows of the built-in world also name their scene, so that answers can be compared with the truth.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from data import IMAGE, DataError, Tokenizer, find_files, image_path, prompt_text, prompt_tokens

TRUTHS = {1: None, 2: "A", 3: "B", 4: "C", 5: "D", 6: "no", 7: "yes"}  # by caption_type


@dataclass
class Prompt:
    """A conversation about an image, up to where the assistant is to speak."""

    name: str  # for error messages: file and row
    image: Path | Tensor  # the file; once seen by the tower, its features (patches, D)
    turns: list[str]  # what the user and the assistant said in turn; the last is the user's
    captions: list[str]  # facts about the image; empty where none are wanted
    truth: str | None = None  # the right answer: an option A-D, "yes", "no"; None: a free answer
    length_factor: float = 1.0  # scales the length penalty of this prompt
    scene: str | None = None  # the built-in world's scene

    def tokens(self, tokenizer: Tokenizer, patches: int) -> list[int]:
        """The conversation in LLaVA's template, `<image>` widened to one token per patch."""
        ids = prompt_tokens(tokenizer, prompt_text(self.turns[0]), patches)
        for answer, question in zip(self.turns[1::2], self.turns[2::2]):
            ids += tokenizer.encode(answer, eos=True)
            ids += tokenizer.encode(f"USER: {question} ASSISTANT:")
        return ids


@dataclass
class Ranked:
    """A prompt and two answers to it."""

    prompt: Prompt
    chosen: str
    rejected: str


def read_captions(path: Path | str) -> dict[str, list[str]]:
    """image_to_caption.json: {file name: captions}; a DataError if it is anything else."""
    values = read_list_or_dict(Path(path))
    good = isinstance(values, dict) and all(
        isinstance(captions, list) and captions and all(isinstance(c, str) for c in captions)
        for captions in values.values())
    if not good:
        raise DataError(f"{path}: expected {{file name: [captions]}} with a caption for each image")
    return values


def read_list_or_dict(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"{path}: no such file") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None


def read_rows(
    patterns: Sequence[str], images: str | None, captions: dict | None, make, skip: list[str] | None
) -> list:
    """`make(name, row, images, captions)` of every row of JSON files; bad rows raise or go to skip."""
    made = []
    for path in find_files(patterns):
        rows = read_list_or_dict(path)
        if not isinstance(rows, list):
            raise DataError(f"{path}: expected a JSON list of rows")
        for number, row in enumerate(rows, 1):
            try:
                made.append(make(f"{path} row {number}", row, images, captions))
            except DataError as error:
                if skip is None:
                    raise
                skip.append(str(error))
    if not made:
        raise DataError(f"no usable row in {', '.join(map(str, patterns))}")
    return made


def read_rankings(patterns, images=None, captions=None, skip=None) -> list[Ranked]:
    """Ranked pairs from files in LLaVA-Human-Preference-10K's format.

    Args:
        patterns: files or glob patterns.
        images: folder that image names are relative to.
        captions: {file name: captions} for factual augmentation; None leaves facts out.
        skip: if given, messages of bad rows are collected here; otherwise the first one raises.

    Raises:
        DataError: a file or row is wrong, an image has no captions, or nothing was found.
    """
    return read_rows(patterns, images, captions, make_ranked, skip)


def read_prompts(patterns, images=None, captions=None, skip=None) -> list[Prompt]:
    """Prompts for PPO; arguments and errors as for `read_rankings`."""
    return read_rows(patterns, images, captions, make_prompt, skip)


def make_ranked(name: str, row: dict, images: str | None, captions: dict | None) -> Ranked:
    """A checked Ranked from a row."""
    prompt = make_prompt(name, row, images, captions)
    preference = row.get("preference")
    if preference not in (1, 2):
        raise DataError(f"{name}: preference is {preference!r}, not 1 or 2")
    outputs = [row.get(key) for key in ("output_1", "output_2")]
    texts = [output.get("value") if isinstance(output, dict) else None for output in outputs]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"{name}: output_1 or output_2 has no value")
    chosen, rejected = texts if preference == 1 else texts[::-1]
    return Ranked(prompt, chosen.strip(), rejected.strip())


def make_prompt(name: str, row: dict, images: str | None, captions: dict | None) -> Prompt:
    """A checked Prompt from a row; a last turn of the assistant's is left out."""
    if not isinstance(row, dict) or not row.get("image"):
        raise DataError(f"{name}: field 'image' is missing or empty")
    turns = row.get("conversations")
    good = isinstance(turns, list) and turns and all(
        isinstance(turn, dict) and isinstance(turn.get("value"), str)
        and turn.get("from") == ("human", "gpt")[i % 2] for i, turn in enumerate(turns))
    if not good:
        raise DataError(f"{name}: conversations must be turns of human and gpt, human first")
    said = [turn["value"].replace(IMAGE, "").strip() for turn in turns]
    said = said[: len(said) - (len(said) + 1) % 2]  # up to the user's last turn
    file, kind = str(row["image"]), row.get("caption_type", 1)
    if kind not in TRUTHS:
        raise DataError(f"{name}: caption_type is {kind!r}, not 1 to 7")
    truth = TRUTHS[kind]
    if truth in ("A", "B", "C", "D") and f"{truth}." not in said[-1]:
        raise DataError(f"{name}: the right option is {truth}, but the question lists no '{truth}.'")
    if captions is not None and file not in captions:
        raise DataError(f"{name}: no captions for image {file!r}; add them, or train without --facts")
    return Prompt(
        name, image_path(name, file, images), said, (captions or {}).get(file, []), truth,
        float(row.get("length_bonus", 1.0)), row.get("scene"))
