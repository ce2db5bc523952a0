"""Each benchmark as one `Part`: its questions, its measures, and notes on how they are made."""

from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import evaluation.amber as amber_
import evaluation.coco as coco
import evaluation.vqa as vqa
from evaluation.answers import ImageQuestion, read_answers, read_questions
from evaluation.benchmarks import (
    chair_terms, mmhal_questions, mmhal_terms, pope_terms, rating, read_mmhal,
)
from evaluation.judge import judge_note
from evaluation.metrics import Terms, with_intervals
from evaluation.synonyms import Synonyms, synonym_terms
from formats.files import brief, understood
from formats.rows import DataError, ParquetImage, find_files, image_path, skipping, whole_rows
from formats.tokenizer import IMAGE

DESCRIBE = "Please describe this image in detail."  # if a benchmark has no questions
SUFFIX = "Answer the question using a single word or phrase."  # LLaVA-RLHF's, on a separate line
SHORT_TOKENS = 64  # limit of a short answer, as in LLaVA-RLHF's evaluation of POPE
LONG_TOKENS = 512  # limit of an answer to an open question
Rows = list[dict]


@dataclass(frozen=True)
class Part:
    """A file of questions, or several that are scored together."""

    name: str  # such as "pope/coco_pope_random": begins the names of measures in a suite
    file: str  # stem of the answers file of a single benchmark
    ask: Callable[[], list[ImageQuestion]]  # opens the images, so only if a model answers
    given: Callable[[Path], Rows]  # from a file of answers made elsewhere; see `read_answers`
    terms: Callable[[Rows], dict[str, Terms]]  # measures of rows with "answer"; an item per image
    tokens: int  # limit of an answer
    asked: str  # how a model is asked; all scores of its answers say so
    scored: str  # how answers are scored; all scores say so
    clean: Callable[[dict], dict] = lambda row: row  # of a row that a model answered
    printed: Callable[[dict[str, Terms]], dict[str, float]] = lambda measures: {}
    baseline: Callable[[Rows], dict[str, float]] = lambda rows: {}
    mode: str = ""  # part of the names of the files with scores, if there are several modes

    def note(self, args: Namespace, scored: int, total: int) -> str:
        """Return how answers were made, by evaluate.py's options, and how many rows were scored."""
        how = "answers from a file"
        if not args.answers:
            how = f"{self.asked}, at most {args.max_new_tokens or self.tokens} new tokens"
            how += f", temperature {args.temperature:g}" if args.temperature else ""
            how += f", the best of {args.best_of} by {args.reward_model}" if args.best_of else ""
        count = f"; {scored} of {total} rows" if scored < total else ""
        return f"{how}; {self.scored}{count}"

    def measure(self, rows: Rows, seed: int) -> tuple[dict[str, dict], dict[str, Terms]]:
        """Return {measure: {"value", "low", "high"}} and the terms of the same measures.

        If the public script rounds on the way, values are those that it prints. A measure with a
        trivial baseline has that as "always_no".
        """
        measures, trivial = self.terms(rows), self.baseline(rows)
        found = with_intervals(measures, seed)
        for name, value in self.printed(measures).items():
            if name in found:
                found[name]["value"] = value
        for name in found.keys() & trivial.keys():
            found[name]["always_no"] = trivial[name]
        return found, measures


def on_new_line(suffix: str | None, default: str = SUFFIX) -> str:
    """Return what follows a question: the user's suffix, even an empty one, or the default."""
    text = default if suffix is None else suffix
    return f"\n{text}" if text else ""


def counted(rows_of: Callable[[], list], skip: list | None) -> tuple[list, int]:
    """Return rows, and how many there would be without those that are skipped on the way."""
    before = len(skip or ())
    rows = rows_of()
    return rows, len(rows) + len(skip or ()) - before


def how_asked(suffix: str) -> str:
    return f"asked with {suffix.strip()!r}" if suffix else "asked as in the file"


def in_order(path: Path, answers: Path) -> list[tuple[str, dict, str | None]]:
    """Return (name, row, answer) of each question of a file and the answer at the same place."""
    rows, given = list(whole_rows(path)), read_answers(answers)
    for name, row in rows:
        if isinstance(row.get("image"), ParquetImage):
            row["image"] = row["image"].name or name  # as in the answers file
    if len(rows) != len(given):
        raise DataError(f"{answers}: {len(given)} answers to {len(rows)} questions")
    for (name, row), each in zip(rows, given):
        for key in {"question_id", "image"} & row.keys() & each.keys():
            if Path(str(row[key])).name != Path(str(each[key])).name:
                raise DataError(f"{each['name']}: answers {key} {brief(each[key])}, where {name} "
                                f"has {brief(row[key])}; answers have the order of the questions")
    return [(name, {**row, "image": str(row.get("image", i))}, each["answer"])
            for i, ((name, row), each) in enumerate(zip(rows, given))]


# --------------------------------------------------------------------------- POPE and short answers


def pope_part(path: Path, images: str | None, suffix: str | None, skip: list | None) -> Part:
    """Return POPE on a file of rows with image, text and label."""
    ending = on_new_line(suffix)

    def ask() -> list[ImageQuestion]:
        found = []
        for each in read_questions(path, images, skip=skip):
            with skipping(skip):
                check(each.name, each.fields)
                text = each.question + ending
                found.append(replace(each, question=text, fields=each.fields | {"question": text}))
        return found

    def given(answers: Path) -> Rows:
        rows = []
        for name, row, text in in_order(path, answers):
            with skipping(skip):
                check(name, row)
                rows.append({**row, "answer": text})
        return rows

    def check(name: str, row: dict) -> None:
        if row.get("label") not in ("yes", "no"):
            raise DataError(f"{name}: label is {brief(row.get('label'))}, not 'yes' or 'no'")

    def terms(rows: Rows) -> dict[str, Terms]:
        return pope_terms([row["answer"] for row in rows], [row["label"] for row in rows],
                          [row.get("image", i) for i, row in enumerate(rows)])

    return Part(f"pope/{path.stem}", path.stem, ask, given, terms, SHORT_TOKENS,
                how_asked(ending), "POPE's parser of answers")


def vqa_part(path: Path, images: str | None, suffix: str | None, skip: list | None) -> Part:
    """Return VQA on a file of rows with image, question and answers."""
    ending = on_new_line(suffix)

    def given(answers: Path) -> Rows:
        return [{**row, "answers": vqa.people_answers(name, row), "answer": text}
                for name, row, text in in_order(path, answers)]

    ask = partial(vqa.vqa_questions, path, images, ending, skip)
    return Part(f"vqa/{path.stem}", path.stem, ask, given, vqa.vqa_terms, SHORT_TOKENS,
                how_asked(ending), "VQAv2's accuracy")


# ------------------------------------------------------------------------------------- descriptions


def chair_part(
    paths: Sequence[Path], images: str | None, questions: Sequence[Path], prompt: str | None,
    synonyms: str | None, skip: list | None,
) -> Part:
    """Return CHAIR: requests to describe the images of annotation files, or questions about them.

    Args:
        paths: files of `coco.read_objects`.
        questions: ask these rows; none: ask `prompt`, or DESCRIBE, about every image.
        synonyms: the official file; None: the words of `coco.py`.
    """
    table = Synonyms(Path(synonyms)) if synonyms else None
    truth, files, ids = coco.read_objects(paths, table.kinds_of if table else coco.kinds_of)

    def ask() -> list[ImageQuestion]:
        found = []
        for each in (q for path in questions for q in read_questions(path, images, prompt, skip)):
            with skipping(skip):
                key_of(each.name, each.fields)
                found.append(each)
        text = (prompt or "").replace(IMAGE, "").strip() or DESCRIBE
        for name in [] if questions else files.values():
            with skipping(skip):
                image = image_path(str(paths[0]), name, images or paths[0].parent)
                found.append(ImageQuestion(
                    f"{paths[0]} image {name}", image, text, {"image": name, "question": text}))
        return found

    def given(answers: Path) -> Rows:
        rows = []
        for row in read_answers(answers):
            with skipping(skip):
                key_of(row["name"], row)
                rows.append(row)
        return rows

    def key_of(name: str, row: dict) -> str:
        """Return the key of a row's image; DataError if the truth about it is unknown."""
        key = (coco.image_key(row["image"]) if "image" in row else
               ids.get(str(row.get("image_id")), coco.image_key(row.get("image_id", ""))))
        if key not in truth:
            raise DataError(f"{name}: nothing is known about image {key!r}; give annotations that "
                            "include it")
        return key

    def terms(rows: Rows) -> dict[str, Terms]:
        keys = [key_of("--chair", row) for row in rows]
        answers, objects = [row["answer"] for row in rows], [truth[key] for key in keys]
        if table:
            return synonym_terms(answers, objects, table, keys)
        return chair_terms(list(map(coco.mentions, answers)), objects, keys)

    scored = ("words of the official synonym file; objhal/ finds objects in answers by them, "
              "published scores by ChatGPT" if table else
              "words of this project, not of the official synonym file (--synonyms)")
    asked = how_asked("") if questions else f"asked {prompt or DESCRIBE!r}"
    return Part("chair", "chair", ask, given, terms, LONG_TOKENS, asked, scored,
                mode="synonyms" if table else "")


# -------------------------------------------------------------------------------------------- AMBER


def amber_parts(
    folder: Path, images: str | None, suffix: str | None, skip: list | None
) -> list[Part]:
    """Return AMBER's descriptions and yes/no questions, as far as query_all.json has them."""
    with understood(folder):
        bench = amber_.read_amber(folder)
        words, ending = amber_.best_words(bench), on_new_line(suffix, "")
    where = images or (folder / "images" if (folder / "images").is_dir() else folder)

    def given(generative: bool, answers: Path) -> Rows:
        return [row for row in amber_.read_responses(bench, answers)
                if bench.is_generative(row["id"]) == generative]

    clean = lambda row: {**row, "answer": amber_.yes_or_no(row["answer"])}
    ask = lambda generative: partial(
        amber_.amber_questions, bench, generative, where, ending, skip)
    lexical = ("lexical mode, because nltk, spaCy or their data are not installed: not comparable "
               "with published scores")
    parts = [
        Part("amber/generative", "amber_generative", ask(True), partial(given, True),
             partial(amber_.description_terms, bench, words), LONG_TOKENS, how_asked(""),
             "exact mode, by nltk and spaCy" if words.mode == "exact" else lexical,
             printed=amber_.printed_scores, mode="" if words.mode == "exact" else words.mode),
        Part("amber/discriminative", "amber_discriminative", ask(False), partial(given, False),
             partial(amber_.yes_no_terms, bench), SHORT_TOKENS, how_asked(ending),
             "the positive class is No", clean, amber_.printed_scores,
             partial(amber_.always_no, bench))]
    there = {bench.is_generative(row["id"]) for row in bench.queries}
    return [part for part, generative in zip(parts, (True, False)) if generative in there]


def amber_responses(rows: Iterable[dict]) -> Rows:
    """Return the rows of both parts in AMBER's own format."""
    return [{"id": row["id"], "response": row["answer"]} for row in rows]


# -------------------------------------------------------------------------------------------- MMHal


def mmhal_part(path: Path, images: str | None, label: str | None) -> Part:
    """Return MMHal; its rows are scored by a judge's "reply", not by "answer".

    Args:
        path: response_template.json.
        label: of the judge's prompt; None: unknown.
    """
    def terms(rows: Rows) -> dict[str, Terms]:
        measures = mmhal_terms([rating(row["reply"]) or 0 for row in rows])
        return {name.replace("score/", "kind/"): each for name, each in measures.items()}

    ask = lambda: mmhal_questions(path, read_mmhal(path), images or path.parent)
    return Part("mmhal", "mmhal", ask, read_answers, terms, LONG_TOKENS, how_asked(""),
                judge_note(label), mode=label or "")


# --------------------------------------------------------------------------------- the command line


def chosen_parts(args: Namespace) -> list[Part]:
    """Return the parts of the benchmark that the command line names."""
    if args.amber:
        return amber_parts(Path(args.amber), args.images, args.suffix, args.skipped)
    if args.chair:
        return [chair_part(find_files(args.chair), args.images, find_files(args.data or []),
                           args.prompt, args.synonyms, args.skipped)]
    paths = find_files(args.pope or args.vqa)
    if args.answers and len(paths) > 1:
        raise ValueError("--answers goes with one file of questions")
    make = pope_part if args.pope else vqa_part
    return [make(path, args.images, args.suffix, args.skipped) for path in paths]
