"""AMBER (Wang et al. 2023, arXiv 2311.07397): hallucination over many kinds, without a judge.

Its repository (junyangwang0410/AMBER) is read as it is. Ids 1 to 1004 ask for a description of an
image, all others are yes/no questions. The rules are those of its inference.py.

Generative. The nouns of a description count if they are in the vocabulary of relation.json. Those
of safe_words.txt are not checked. One that is an object of the image or its associate covers that
object. Any other is false, unless it is similar to an object of the image, which it then covers; it
hits an object that models often imagine if it is that object or similar to it.

    chair   false nouns among the nouns              cover  objects covered among the objects
    hal     descriptions with a false noun           cog    imagined objects hit among all listed

Discriminative. The positive class of precision and recall is "No"; a response that is not exactly
"Yes" or "No" is wrong. A model that always says "No" has an accuracy of 66.3 % and an F1 of 79.7 %
on all questions, more than most models, so every score stands beside that baseline.

What differs from inference.py:

1. `exact` mode needs nltk and spaCy with their data (tagger, WordNet, en_core_web_lg). Without them
   the mode is `lexical`: words of the vocabulary count whatever their part of speech, except
   NOT_NOUNS, and similarity is equality. All its measures are named lexical/..., because they are
   not comparable with published ones.
2. A model's answer that begins with "Yes" or "No" counts as that word (`yes_or_no`). Responses from
   a file count as they are.
3. A measure that divides by zero is left out; inference.py prints 0.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluation.answers import ImageQuestion
from evaluation.metrics import Terms, grouped
from evaluation.synonyms import singular
from formats.files import read_json
from formats.rows import DataError, image_path, skipping, whole_rows

SIMILAR = 0.8  # spaCy's similarity above which two words mean one thing
NOT_NOUNS = ("can", "drink", "hot", "leave", "watch")  # mostly other parts of speech
TYPES = {  # name of a group: the types of its questions; "discriminative" has all
    "existence": ("discriminative-hallucination",),
    "attribute": ("discriminative-attribute-state", "discriminative-attribute-number",
                  "discriminative-attribute-action"),
    "state": ("discriminative-attribute-state",), "number": ("discriminative-attribute-number",),
    "action": ("discriminative-attribute-action",),
    "relation": ("discriminative-relation", "relation"),
}


@dataclass(frozen=True)
class Amber:
    """The benchmark's files."""

    queries: list[dict]  # {"id", "image", "query"}
    annotations: dict[int, dict]  # by id: {"type", "truth", "hallu"}
    associates: dict[str, list[str]]
    safe: frozenset[str]

    @cached_property
    def vocabulary(self) -> set[str]:
        return set(self.associates) | {w for words in self.associates.values() for w in words}

    def is_generative(self, number: int) -> bool:
        return self.annotations[number]["type"] == "generative"


def read_amber(folder: Path) -> Amber:
    """Read the benchmark from a copy of its repository, or of the folder `data` there.

    Raises:
        FileNotFoundError, DataError: a file is missing or is not the benchmark's.
    """
    data = folder / "data" if (folder / "data").is_dir() else folder
    queries, annotations = data / "query" / "query_all.json", data / "annotations.json"
    associates, safe = read_json(data / "relation.json"), data / "safe_words.txt"
    asked = [row for _, row in whole_rows(queries)]
    truths = {}
    for name, row in whole_rows(annotations):
        try:
            label = row["type"] != "generative" and row["truth"] in ("yes", "no")
            if not label and not all(isinstance(w, str) for w in (*row["truth"], *row["hallu"])):
                raise TypeError
            truths[int(row["id"])] = row | {"type": str(row["type"])}
        except (KeyError, TypeError, ValueError, OverflowError):
            raise DataError(f"{name}: expected id, type and truth, as in AMBER's "
                            "annotations.json") from None
    for number, row in enumerate(asked, 1):
        texts = all(isinstance(row.get(field), str) for field in ("image", "query"))
        if not texts or type(row.get("id")) is not int or row["id"] not in truths:
            raise DataError(f"{queries} row {number}: expected id, image and query, and an "
                            f"annotation of that id in {annotations}")
    if not safe.is_file():
        raise FileNotFoundError(f"{safe}: no such file; copy AMBER's folder data whole")
    words = safe.read_text(encoding="utf-8").split("\n")
    return Amber(asked, truths, associates, frozenset(words) - {""})


def amber_questions(
    amber: Amber, generative: bool, images: str | Path, suffix: str, skip: list[str] | None
) -> list[ImageQuestion]:
    """Return the requests for descriptions, or the yes/no questions with a suffix."""
    questions = []
    for row in amber.queries:
        if amber.is_generative(row["id"]) == generative:
            name, text = f"AMBER {row['id']}", row["query"] + ("" if generative else suffix)
            fields = {"id": row["id"], "image": row["image"], "question": text}
            with skipping(skip):
                image = image_path(name, row["image"], images)
                questions.append(ImageQuestion(name, image, text, fields))
    return questions


def yes_or_no(text: str) -> str:
    """Return "Yes" or "No" if an answer begins with it, in any case; else the answer unchanged."""
    word = re.match(r"\W*(yes|no)\b", text, re.I)
    return word[1].capitalize() if word else text


def read_responses(amber: Amber, path: Path) -> list[dict]:
    """Read responses in AMBER's format as rows with id, image and answer.

    Raises:
        DataError: a row has another format, or its id is unknown or repeated.
    """
    images, rows = {row["id"]: row["image"] for row in amber.queries}, {}
    for name, row in whole_rows(path):
        if not isinstance(row.get("response"), str):
            raise DataError(f'{name}: expected {{"id": 1, "response": "..."}}')
        number = row.get("id")
        if number not in images or number in rows:
            fault = "comes twice" if number in rows else "is no question of AMBER"
            raise DataError(f"{name}: id {number!r} {fault}")
        rows[number] = {"id": number, "image": images[number], "answer": row["response"]}
    return list(rows.values())


# ------------------------------------------------------------------------------------- descriptions


class Words(NamedTuple):
    """How nouns are found and compared."""

    mode: str  # "exact" or "lexical"
    nouns: Callable[[str], list[str]]
    similar: Callable[[str, str], bool]


def lexical_words(vocabulary: Collection[str]) -> Words:
    """Return the mode without packages; as in inference.py, "Trees" is not "tree", "trees" is."""
    def nouns(text: str) -> list[str]:
        words = [singular(word, vocabulary) for word in re.findall(r"[\w-]+", text)]
        return [word for word in words if word not in NOT_NOUNS]

    return Words("lexical", nouns, lambda one, other: one == other)


def exact_words() -> Words:
    """Return inference.py's own mode, by nltk's tagger and spaCy's vectors.

    Raises:
        ImportError, LookupError, OSError: a package or its data is not installed.
    """
    import nltk
    import spacy
    from nltk.stem import WordNetLemmatizer

    language, lemmatizer = spacy.load("en_core_web_lg"), WordNetLemmatizer()
    parse = lru_cache(maxsize=None)(language)

    def nouns(text: str) -> list[str]:
        tagged = nltk.pos_tag(nltk.word_tokenize(text))
        return [lemmatizer.lemmatize(word) for word, tag in tagged if tag.startswith("NN")]

    nouns("A dog sits.")  # raises now if the data is missing
    similar = lru_cache(maxsize=None)(lambda a, b: parse(a).similarity(parse(b)) > SIMILAR)
    return Words("exact", nouns, similar)


def best_words(amber: Amber) -> Words:
    """Return the exact mode if its packages and their data are installed, else the lexical one."""
    try:
        return exact_words()
    except (ImportError, LookupError, OSError):
        return lexical_words(amber.vocabulary)


def count_nouns(amber: Amber, words: Words, truth: dict, text: str) -> tuple[int, int, int, int]:
    """Return (false nouns, nouns, objects covered, imagined objects hit) of a description."""
    def targets(objects: list[str]) -> list[tuple[str, int]]:  # (word, object), associates first
        near = [(w, i) for i, name in enumerate(objects) for w in amber.associates.get(name, [])]
        return near + [(name, i) for i, name in enumerate(objects)]

    def first(noun: str, among: list[tuple[str, int]], same: Callable) -> set[int]:
        return {next((i for word, i in among if same(noun, word)), -1)} - {-1}

    equal = lambda one, other: one == other
    there, imagined = targets(truth["truth"]), targets(truth["hallu"])
    nouns = [noun for noun in words.nouns(text) if noun in amber.vocabulary]
    false, covered, hit = 0, set(), set()
    for noun in nouns:
        if noun in amber.safe:
            continue
        if found := first(noun, there, equal):
            covered |= found
            continue
        hit |= first(noun, imagined, equal) | first(noun, imagined, words.similar)
        found = first(noun, there, words.similar)
        covered |= found
        false += not found
    return false, len(nouns), len(covered), len(hit)


def description_terms(amber: Amber, words: Words, rows: list[dict]) -> dict[str, Terms]:
    """Return the generative measures of rows with id, image and answer, one item per image."""
    truths = [amber.annotations[row["id"]] for row in rows]
    counts = [count_nouns(amber, words, truth, row["answer"]) for truth, row in zip(truths, rows)]
    false, nouns, covered, hit = np.array(counts, dtype=float).reshape(-1, 4).T
    number = lambda key: np.array([len(truth[key]) for truth in truths], dtype=float)
    label = "" if words.mode == "exact" else f"{words.mode}/"
    measures = {"chair": (false, nouns), "cover": (covered, number("truth")),
                "hal": (1.0 * (false > 0), np.ones(len(rows))), "cog": (hit, number("hallu"))}
    return grouped({label + name: [(1, *pair)] for name, pair in measures.items()},
                   [row["image"] for row in rows])


# --------------------------------------------------------------------------------- yes/no questions


def yes_no_terms(amber: Amber, rows: list[dict]) -> dict[str, Terms]:
    """Return accuracy, precision, recall and F1 of "No", over all and by type of question.

    Args:
        rows: with id, image and answer; one that is not exactly "Yes" or "No" is wrong.
    """
    types = [amber.annotations[row["id"]]["type"] for row in rows]
    no = np.array([amber.annotations[row["id"]]["truth"] == "no" for row in rows], dtype=float)
    said_no = np.array([row["answer"] == "No" for row in rows], dtype=float)
    said_yes = np.array([row["answer"] == "Yes" for row in rows], dtype=float)
    measures = {}
    for group, names in {"discriminative": tuple(set(types)), **TYPES}.items():
        here = np.array([each in names for each in types], dtype=float)
        both = here * no * said_no
        measures |= {
            f"{group}/accuracy": [(1, both + here * (1 - no) * said_yes, here)],
            f"{group}/precision": [(1, both, here * said_no)],
            f"{group}/recall": [(1, both, here * no)],
            f"{group}/f1": [(1, 2 * both, here * said_no + here * no)],
        }
    return grouped(measures, [row["image"] for row in rows])


def always_no(amber: Amber, rows: list[dict]) -> dict[str, float]:
    """Return the printed scores of a model that answers "No" to the same questions."""
    return printed_scores(yes_no_terms(amber, [{**row, "answer": "No"} for row in rows]))


def printed_scores(measures: Mapping[str, Terms]) -> dict[str, float]:
    """Return the values as inference.py prints them, to a tenth of a per cent; here in 0..1.

    Its denominators start at 0.001, and F1 is 2 P R / (P + R + 0.0001) of the rounded P and R, with
    0.001 for existence.
    """
    percent = lambda number: round(round(float(number), 1) / 100, 3)
    found = {}
    for name, [(_, above, below)] in measures.items():
        group, _, measure = name.rpartition("/")
        above, below = sum(above), sum(below)
        if measure == "hal":
            found[name] = percent(100 - 100 * (below - above) / (below + 0.001))
        elif measure == "f1":
            p, r = found[f"{group}/precision"], found[f"{group}/recall"]
            small = 0.001 if group == "existence" else 0.0001
            found[name] = percent(200 * p * r / (p + r + small))
        else:
            found[name] = percent(100 * above / (below + 0.001))
    return found
