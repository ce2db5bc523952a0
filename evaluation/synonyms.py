"""CHAIR and Object HalBench with the official file of synonyms.

The file (LisaAnne/Hallucination, data/synonyms.txt) has a line for each of COCO's 80 kinds: its
name and the words for it, separated by ", ". CHAIR (Rohrbach et al. 2018) counts every mention, by
utils/chair.py's rules: words in the singular; pairs of words in a fixed list are one word; "baby"
or "adult" before an animal and "passenger" before a vehicle are not persons; "seat" is no chair if
there is a toilet. Object HalBench (RLHF-V, eval_gpt_obj_halbench.py) uses all pairs in the file,
counts each word once per answer and finds no objects in answers of at most three words.

What differs from the public scripts (scores are near theirs but not the same):

1. The scripts split words and find the singular with NLTK and pattern.en; here, a regular
   expression and `singular` do.
2. Object HalBench's published scores come from objects that ChatGPT extracts from the answers.
   Here they are the words of the answer, as in the script's mode without ChatGPT.
3. Captions that define the objects in an image are read by CHAIR's list of pairs in both modes.
"""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from evaluation.benchmarks import chair_terms
from evaluation.coco import ANIMALS, IRREGULAR, listed
from evaluation.metrics import Terms
from formats.rows import DataError

PAIRS = listed("""motor bike, motor cycle, air plane, traffic light, street light, traffic signal,
    stop light, fire hydrant, stop sign, parking meter, suit case, sports ball, baseball bat,
    baseball glove, tennis racket, wine glass, hot dog, cell phone, mobile phone, teddy bear,
    hair drier, potted plant, bow tie, laptop computer, stove top oven, home plate, train track""")
YOUNG_OR_OLD = (*ANIMALS, "animal", "cub")  # after baby and adult
SHORT = 3  # words; Object HalBench finds no objects in an answer that has no more
SINGULAR = {plural: word for word, plural in IRREGULAR.items()}


def singular(word: str, known: Collection[str]) -> str:
    """Return a word, or its singular if that is among the `known` words and the word is not."""
    forms = [word, SINGULAR.get(word, ""), word.removesuffix("s"), word.removesuffix("es")]
    if word.endswith("ies"):
        forms.append(word[:-3] + "y")
    if word.endswith("ves"):
        forms += [word[:-3] + "f", word[:-3] + "fe"]
    return next((form for form in forms if form in known), word)


class Synonyms:
    """The kinds of objects and the words for them, from the official file.

    Raises:
        DataError: no line of the file has two words.
    """

    def __init__(self, path: Path):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise DataError(f"{path}: no such text file; give data/synonyms.txt of "
                            "LisaAnne/Hallucination") from None
        rows = [[word.strip() for word in line.split(", ")] for line in lines if line.strip()]
        if not any(len(row) > 1 for row in rows):
            raise DataError(f"{path}: expected lines of words separated by ', ', as in "
                            "data/synonyms.txt of LisaAnne/Hallucination")
        self.kinds = {word: row[0] for row in rows for word in row if word}
        qualified = {f"{age} {animal}": animal for animal in YOUNG_OR_OLD
                     for age in ("baby", "adult")}
        qualified |= {f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")}
        qualified |= {"bow tie": "tie", "toilet seat": "toilet"}
        in_file = {word for word in self.kinds if " " in word} | {"home plate", "train track"}
        self.pairs = {pair: pair for pair in PAIRS} | qualified
        self.all_pairs = {pair: pair for pair in in_file} | qualified
        self.known = {part for word in (*self.kinds, *self.pairs) for part in word.split()}

    def words(self, text: str, pairs: dict[str, str] | None = None) -> list[tuple[str, str]]:
        """Return (word, kind) of every mention in a text, in order.

        Args:
            pairs: {two words: the word that they count as}; default: CHAIR's list.
        """
        pairs = self.pairs if pairs is None else pairs
        tokens = re.findall(r"[\w-]+|[^\w\s]", text.lower())
        tokens = [singular(word, self.known) for word in tokens]
        words = []
        while tokens:
            both = " ".join(tokens[:2])
            words.append(pairs.get(both, tokens[0]))
            del tokens[: 2 if both in pairs else 1]
        if "toilet" in words:
            words = [word for word in words if word != "seat"]
        return [(word, self.kinds[word]) for word in words if word in self.kinds]

    def kinds_of(self, text: str) -> list[str]:
        """Return the kinds that the name of an object, or a caption, mentions."""
        if text in self.kinds:
            return [self.kinds[text]]
        return [kind for _, kind in self.words(text)]


def synonym_terms(
    answers: Sequence[str], objects: Sequence[set[str]], synonyms: Synonyms,
    images: Sequence | None = None,
) -> dict[str, Terms]:
    """Return CHAIR's and Object HalBench's measures of descriptions, one item per image.

    Args:
        objects: the kinds in each answer's image, by the same synonyms.
        images: one per answer.

    Returns:
        chair_s, chair_i and coverage of CHAIR; and of Object HalBench: objhal/response, answers
        with a false object among those with any; objhal/mention, false among all words, each once
        per answer; objhal/coverage, objects found among the objects in the images.
    """
    every = [[kind for _, kind in synonyms.words(answer)] for answer in answers]
    once = [
        [kind for _, kind in dict.fromkeys(synonyms.words(answer, synonyms.all_pairs))]
        if len(answer.split()) > SHORT else [] for answer in answers
    ]
    chair, halbench = (chair_terms(each, objects, images) for each in (every, once))
    return {name: chair[name] for name in ("chair_s", "chair_i", "coverage")} | {
        "objhal/response": halbench["response"], "objhal/mention": halbench["chair_i"],
        "objhal/coverage": halbench["coverage"]}
