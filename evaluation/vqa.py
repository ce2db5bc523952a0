"""Questions with short answers, scored as VQAv2 does (Goyal et al. 2017, arXiv 1612.00837).

A row has image, question and `answers`, the ten people's short answers (texts, or objects with
"answer" as in the release), or `answer`, a single one. The rules are those of the public script
(GT-Vision-Lab/VQA, vqaEval.py): both sides are normalised (`normal_form`); an answer scores
min(matches / 3, 1), averaged over all subsets that leave one person out.

1. The script leaves unanimous people's answers as written. Here all answers are normalised.
2. A row with a single answer has no subsets: it scores 1 if the answers match, else 0.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from evaluation.answers import ImageQuestion, read_questions
from evaluation.metrics import Terms, grouped
from formats.rows import DataError, read_rows, skipping

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {"none": "0"} | {word: str(i) for i, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())}
ARTICLES = ("a", "an", "the")
CONTRACTED = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
    mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
    you're you've"""
CONTRACTIONS = {  # the word with one apostrophe missing: the word
    word[: m.start()] + word[m.end() :]: word
    for word in CONTRACTED.split() for m in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}  # the other way round in the script's table


def normal_form(answer: str) -> str:
    """Return an answer as the public script compares it.

    Punctuation is removed, or becomes a space if no space is beside it; periods outside numbers and
    articles are removed. Text becomes lower case, number words become digits, "dont" "don't".
    """
    text = whole = answer.replace("\n", " ").replace("\t", " ").strip()
    for mark in PUNCTUATION:
        apart = f"{mark} " in whole or f" {mark}" in whole or re.search(r"\d,\d", whole)
        text = text.replace(mark, "" if apart else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)  # the script passes re.UNICODE, 32, as the count
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_score(answer: str, people: Sequence[str]) -> float:
    """Return VQAv2's accuracy, 0..1, of one answer against those of people."""
    given, people = normal_form(answer), [normal_form(each) for each in people]
    if len(people) == 1:
        return float(given == people[0])
    matches = [given == each for each in people]
    return sum(min((sum(matches) - each) / 3, 1) for each in matches) / len(matches)


def people_answers(name: str, row: dict) -> list[str]:
    """Return the people's answers of a row.

    Raises:
        DataError: there are none.
    """
    found = row.get("answers") or [row.get("answer")]
    found = [each.get("answer") if isinstance(each, dict) else each
             for each in (found if isinstance(found, list) else [])]
    if not found or not all(isinstance(each, str | int | float) for each in found):
        raise DataError(f"{name}: expected answers, a list of texts, or answer, one text")
    return [str(each) for each in found]


def vqa_questions(
    path: Path, images: str | None, suffix: str, skip: list[str] | None
) -> list[ImageQuestion]:
    """Read the questions; their field "answers" holds the people's.

    Args:
        suffix: text that is asked after each question.
        images, skip: see `read_questions`.
    """
    rows, questions = dict(read_rows(path)), []
    for each in read_questions(path, images, skip=skip):
        with skipping(skip):
            fields = each.fields | {"question": each.question + suffix,
                                    "answers": people_answers(each.name, rows[each.name])}
            questions.append(replace(each, question=fields["question"], fields=fields))
    return questions


def vqa_terms(rows: Sequence[dict]) -> dict[str, Terms]:
    """Return the accuracy of rows with "answer", "answers" and "image", one item per image."""
    scores = np.array([vqa_score(row["answer"], row["answers"]) for row in rows], dtype=float)
    images = [row.get("image", i) for i, row in enumerate(rows)]
    return grouped({"accuracy": [(1, scores, np.ones(len(rows)))]}, images)
