"""Answers to correct, and the file of their corrections.

Every submission is one line, forced onto the disk before the page says "saved":

    {"id", "image", "question", "chosen", "rejected", "status", "segments", "annotator", "seconds",
     "time", "model"}

status is "corrected", "accepted" (chosen and rejected are equal), or "skipped" (chosen is null, and
"reason" says why). The last adjudication of an id counts, a line with "adjudicated", or else its
last line; `formats.readers` reads the file as it is. The id is a hash of image, question and
answer, so rows of the answers may be moved or added.
"""

import errno
import fcntl
import hashlib
import json
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from formats.dialects import plain, wrong_types
from formats.files import parse_json, sync
from formats.readers import image_of, question_of, text_of
from formats.rows import DataError, whole_rows

FIELDS = {"id", "image", "chosen", "rejected", "status", "segments", "annotator", "seconds"}
TEXTS = ("id", "image", "rejected", "status", "annotator")
BEGIN = b'{"id": "'  # of every line
ANONYMOUS = "anonymous"  # the only annotator who gets the answers in the file's order


@dataclass(frozen=True)
class Answer:
    id: str
    image: str  # as the row names it
    path: Path
    question: str
    text: str
    model: str  # fingerprint of the model that answered, if known


def digest(*words: str) -> str:
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:12]


def read_answers(path: Path, images: str | Path | None) -> tuple[list[Answer], int]:
    """Read rows of image, question and answer, without duplicates; a DataError names a bad row.

    Returns:
        the answers, and the number of rows without one (a model's empty answer, or an image that
        evaluate.py could not open).
    """
    found, empty = {}, 0
    for name, row in whole_rows(path):
        with wrong_types(name):
            row = plain(name, row)
        if row.get("answer") == "" or "answer" not in row and "error" in row:
            empty += 1
            continue
        file = image_of(name, row, images or path.parent)
        if not isinstance(file, Path):
            raise DataError(f"{name}: field 'image' should name an image file")
        question, text = question_of(name, row), text_of(name, row, "answer")
        key, model = digest(row["image"], question, text), str(row.get("by", "")).partition(" ")[0]
        text = text.replace("\r\n", "\n").replace("\r", "\n")  # as a browser's text field does
        found.setdefault(key, Answer(key, row["image"], file, question, text, model))
    if not found:
        raise DataError(f"{path}: no row with an answer to correct")
    return list(found.values()), empty


def read_lines(path: Path, content: bytes) -> list[dict]:
    """Parse a file of corrections."""
    lines = []
    for number, text in enumerate(content.splitlines(), 1):
        try:
            line = parse_json(text)
            texts = TEXTS if line.get("status") == "skipped" else (*TEXTS, "chosen")
            if FIELDS - line.keys() or type(line["seconds"]) not in (int, float) or not all(
                    isinstance(line[name], str) for name in texts):
                raise ValueError
            lines.append(line)
        except (ValueError, AttributeError):
            raise DataError(f"{path} row {number}: not a line of annotate.py; repair it, or move "
                            "the file away") from None
    return lines


def by_answer(lines: Iterable[dict]) -> dict[str, dict[str, dict]]:
    """Return {id: {annotator: their last line}}, without adjudications."""
    found = defaultdict(dict)
    for line in lines:
        if "adjudicated" not in line:
            found[line["id"]][line["annotator"]] = line
    return found


def differ(versions: dict[str, dict]) -> bool:
    """Return whether the annotators of an answer disagree about its text."""
    return len({line["chosen"] for line in versions.values()}) > 1


class Store:
    """The answers, who gets which next, and the file of corrections; thread-safe.

    Args:
        path: the file of corrections, created if missing. The system's lock on it, which ends with
            the process, keeps a second server out.
        overlap: share of the answers that two annotators correct, independently.
        adjudicate: serve the answers with different corrections, and save the decisions on them.

    Raises:
        ValueError, OSError: another process writes the file, or it cannot be used.
    """

    def __init__(self, answers: Iterable[Answer], path: Path, overlap: float = 0.0,
                 adjudicate: bool = False):
        self.path, self.lock = path, threading.Lock()
        self.file = open(path, "a+b", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another annotate.py is writing to it; stop it first, or "
                             "choose another --out") from None
        sync(path.parent)
        lines = self.mended()
        self.mark = {"adjudicated": True} if adjudicate else {}
        self.versions = by_answer(lines) if adjudicate else {}  # the corrections to decide between
        self.answers = {answer.id: answer for answer in answers
                        if not adjudicate or differ(self.versions[answer.id])}
        self.lines = {(line["id"], line["annotator"]): line for line in lines
                      if line["id"] in self.answers and ("adjudicated" in line) == adjudicate}
        shared = lambda i: not adjudicate and int(digest("overlap", i), 16) < overlap * 16**12
        self.wanted = {i: 2 if shared(i) else 1 for i in self.answers}  # number of annotators
        self.open: dict[str, str] = {}  # the id that each annotator has on the page
        self.order = lru_cache(maxsize=64)(self._order)

    def mended(self) -> list[dict]:
        """Read the file; remove half a line at its end, which a killed process left.

        A file that is not ours stays as it is.
        """
        self.file.seek(0)
        content = self.file.read()
        size = content.rfind(b"\n") + 1
        end, half = content[size:], False
        try:
            json.loads(end or "half a line")
        except ValueError:
            half = True
        lines = read_lines(self.path, content[:size] if half else content)
        if half and end[: len(BEGIN)] != BEGIN[: len(end)]:
            raise DataError(f"{self.path}: not a file of annotate.py; choose another --out")
        if half:
            self.file.truncate(size)
        else:
            self.file.write(b"\n")  # an editor omitted it
        return lines

    def _order(self, annotator: str) -> list[str]:
        if annotator == ANONYMOUS:
            return list(self.answers)
        return sorted(self.answers, key=lambda i: digest(annotator, i))

    def own(self, annotator: str) -> dict[str, dict]:
        """Return {id: line} of an annotator, in the order of submission."""
        with self.lock:
            return {i: line for (i, name), line in self.lines.items() if name == annotator}

    def upcoming(self, annotator: str) -> tuple[int, list[str]]:
        """Return how many answers are finished, and up to two ids that the annotator does next.

        The first is marked as open. An answer that another annotator has open comes last.
        """
        with self.lock:
            done = Counter(i for i, _ in self.lines)
            taken = done + Counter(i for name, i in self.open.items() if name != annotator)
            left = [i for i in self.order(annotator)
                    if done[i] < self.wanted[i] and (i, annotator) not in self.lines]
            found = ([i for i in left if taken[i] < self.wanted[i]] or left)[:2]
            self.open |= {annotator: i for i in found[:1]}
            return sum(done[i] >= self.wanted[i] for i in done), found

    def save(self, answer: Answer, given: dict) -> None:
        """Append a line and return once it is on the disk; after an OSError the file is as before.

        Args:
            given: annotator, chosen, status, segments, seconds; reason if skipped.
        """
        line = {"id": answer.id, "image": answer.image, "question": answer.question,
                "rejected": answer.text, **given, "model": answer.model,
                "time": datetime.now(UTC).isoformat(timespec="seconds"), **self.mark}
        data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        with self.lock:
            size = os.fstat(self.file.fileno()).st_size
            try:
                if self.file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, "no space left on the disk")
                os.fsync(self.file.fileno())
            except OSError:
                self.file.truncate(size)
                raise
            self.lines[answer.id, given["annotator"]] = line
            self.open.pop(given["annotator"], None)
