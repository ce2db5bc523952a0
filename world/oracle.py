"""The oracle: what is false in a free-form text about a scene, its correction, and its rank.

It plays the papers' annotators without error. `hallucinations` marks false spans, `correct` edits
them as RLHF-V's annotators did (arXiv 2312.00849, section 3.1), and `rank` prefers one of two texts
as LLaVA-RLHF's annotators did (arXiv 2309.14525, section 2.2). Text outside the world's language
asserts nothing, so it is never false.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from random import Random

from world.scenes import COLOURS, KINDS, NUMBERS, PLACES, SCENES, Scene, Thing
from world.texts import be, capital, noun, phrase, plural, with_article


def any_of(words: Iterable[str]) -> str:
    """Return a regular expression for any of the words, the longest first.

    Only ASCII letters match: with re.I alone, an "s" is also a long s, which `lower` keeps.
    """
    return f"(?a:{'|'.join(sorted(words, key=len, reverse=True))})"


NOUNS = {form: kind for kind in KINDS for form in (kind, plural(kind))}
VALUES = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}
SENTENCE = re.compile(r"(?P<said>[^\s.!?;](?:[^.!?;\n]*[^\s.!?;])?)[.!?;]*")
MENTION = re.compile(  # the noun, the number before it and the verb beside it
    r"(?:\bthere\s+(?P<there>is|are)\s+(?:also\s+)?)?"
    rf"(?:\b(?P<number>{any_of(VALUES)})\s+(?:\w+\s+){{0,2}}?)?"
    rf"\b(?P<noun>{any_of(NOUNS)})\b(?:\s+(?P<verb>is|are)\b)?", re.I)
COLOUR = re.compile(rf"\b(?:{any_of(COLOURS)})\b", re.I)
PLACE = re.compile(rf"\b(?:{any_of(PLACES)})\b", re.I)
SETTING = re.compile(rf"\b(?:{any_of(SCENES)})\b", re.I)
DENIAL = re.compile(r"\b(?:not|without|no\s+\w)|\?\s*$", re.I)  # asserts that nothing is there
# `\s*,?\s+and\s+|\s*,\s+`, but matching enters a run of white space only at its beginning: trying
# each of its characters, and each way to split it between \s* and \s+, takes cubic time.
LINK = re.compile(r"(?<!\s)\s+and\s+|(?:(?<!\s)\s+)?,\s+(?:and\s+)?", re.I)


@dataclass(frozen=True)
class Span:
    """A false part of a text, `text[start:end]`, and its minimal correction."""

    start: int
    end: int
    kind: str  # object | attribute | position | number | other (setting) | agreement (grammar)
    replacement: str  # "" if the span is deleted


Clause = tuple[int, int, re.Match]  # start, end, and the mention of a kind in it


def clauses_of(text: str) -> Iterator[tuple[int, list[Clause]]]:
    """Yield (end, clauses) of every sentence that asserts something.

    A clause is the part of a sentence about one mention. Most sentences are one clause; one that
    mentions several kinds is divided at the last comma or "and" between two of them, or else before
    the second. The full stop belongs to the sentence and to no clause.
    """
    for found in SENTENCE.finditer(text):
        if DENIAL.search(found[0]):
            continue
        nouns = list(MENTION.finditer(text, *found.span()))
        cuts = [found.start()]
        for before, after in zip(nouns, nouns[1:]):
            links = list(LINK.finditer(text, before.end(), after.start()))
            cuts.append(links[-1].start() if links else after.start())
        cuts.append(found.end("said"))
        yield found.end(), list(zip(cuts, cuts[1:], nouns))


def match_case(old: str, new: str) -> str:
    return capital(new) if old[0].isupper() else new


def clause_edits(
    thing: Thing, text: str, start: int, end: int, mention: re.Match
) -> Iterator[Span]:
    """Yield the edits to a clause about a thing that is there; grammar follows a changed number."""
    for pattern, kind, truth in ((COLOUR, "attribute", thing.colour),
                                 (PLACE, "position", PLACES[thing.cell])):
        for found in pattern.finditer(text, start, end):
            if found[0].lower() != truth:
                yield Span(*found.span(), kind, match_case(found[0], truth))
    number = mention["number"]
    if number and VALUES[number.lower()] != thing.number:
        adjective = text[mention.end("number"):mention.start("noun")].split()
        article = with_article((adjective + [thing.kind])[0]).split()[0]
        truth = article if thing.number == 1 else NUMBERS[thing.number]
        yield Span(*mention.span("number"), "number", match_case(number, truth))
        yield from agreement(mention, there=be(thing), noun=noun(thing), verb=be(thing))


def agreement(mention: re.Match, **words: str) -> Iterator[Span]:
    """Yield the changes that give the groups of a mention these words."""
    for group, word in words.items():
        if mention[group] and mention[group].lower() != word:
            yield Span(*mention.span(group), "agreement", match_case(mention[group], word))


def deletion(
    i: int, clauses: list[Clause], things: list[Thing | None], end: int
) -> tuple[int, int]:
    """Return the span to delete for clause `i`; the rest stays a sentence.

    Args:
        things: the thing that each clause mentions, None where the clause is deleted.
        end: of the sentence.
    """
    left, right, mention = clauses[i]
    if not any(things):  # delete the whole sentence, in as many parts as it has clauses
        return left, end if i == len(clauses) - 1 else right
    if any(things[:i]):
        return left, right
    following = clauses[i + 1][2]  # the sentence's beginning stays for the next kind
    keeps_verb = mention["number"] and not following["there"]
    return mention.start("number" if keeps_verb else 0), following.start()


def said_twice(scene: Scene, text: str, clauses: list[Clause]) -> set[int]:
    """Return the starts of the clauses that put a thing in a second, wrong place.

    Corrected, they would say the same thing twice. Of the clauses that name a thing's place, the
    first right one stays, or else the first.
    """
    placed = []
    for start, end, mention in clauses:
        thing, place = scene.find(NOUNS[mention["noun"].lower()]), PLACE.search(text, start, end)
        if thing and place:
            placed.append((thing.kind, place[0].lower() != PLACES[thing.cell], start))
    stays = {kind: start for kind, _, start in sorted(placed, reverse=True)}
    return {start for kind, wrong, start in placed if wrong and start != stays[kind]}


def seen_instead(
    scene: Scene, text: str, clause: Clause, mentioned: Iterable[str]
) -> Thing | None:
    """Return the thing in the place that a false clause names, if the text mentions it nowhere."""
    place, number = PLACE.search(text, *clause[:2]), clause[2]["number"]
    return next((thing for thing in scene.things if place and number
                 and PLACES[thing.cell] == place[0].lower() and thing.kind not in mentioned), None)


def edits(scene: Scene, text: str) -> list[Span]:
    """Return the false spans, and the changes of grammar (kind "agreement") that go with them."""
    words, phrases, sentences, mentioned = [], [], list(clauses_of(text)), set(mentions(text))
    repeated = said_twice(scene, text, [clause for _, clauses in sentences for clause in clauses])
    for end, clauses in sentences:
        things = [scene.find(NOUNS[mention["noun"].lower()]) for _, _, mention in clauses]
        kept = [None if clause[0] in repeated else thing for thing, clause in zip(things, clauses)]
        kinds = ["position" if thing else "object" for thing in things]
        for i, clause in enumerate(clauses):
            if kept[i]:
                words += clause_edits(kept[i], text, *clause)
            elif other := seen_instead(scene, text, clause, mentioned):
                kept[i], mention = other, clause[2]
                mentioned.add(other.kind)
                phrases.append(Span(mention.start("number"), mention.end("noun"), kinds[i],
                                    match_case(mention["number"], phrase(other))))
                words += agreement(mention, there=be(other), verb=be(other))
        phrases += [Span(*deletion(i, clauses, kept, end), kinds[i], "")
                    for i in range(len(clauses)) if not kept[i]]
    words += [Span(*word.span(), "other", match_case(word[0], scene.type))
              for word in SETTING.finditer(text) if word[0].lower() != scene.type]
    words = [edit for edit in words
             if not any(span.start <= edit.start < span.end for span in phrases)]
    return sorted(words + phrases, key=lambda edit: edit.start)


def hallucinations(scene: Scene, text: str) -> list[Span]:
    """Return every false span of a free-form text, in order; spans never overlap.

    For an absent kind ("object"), and for a thing put in a second place ("position"), the span is
    the noun phrase if something stands there that the text mentions nowhere, and else the whole
    sentence (or clause, where the sentence mentions other kinds as well); otherwise it is the false
    colour, number, place or setting alone. Questions and denials are never false.
    """
    return [edit for edit in edits(scene, text) if edit.kind != "agreement"]


def correct(scene: Scene, text: str) -> str:
    """Make the text true by minimal edits; the rest stays byte for byte.

    Wrong words are replaced, and is/are and the noun follow a changed number. The mention of an
    absent kind, or of a thing in a second place, becomes that of what stands there, if the text has
    none; else the sentence goes, with the white space before it (after, for the first).
    """
    while found := edits(scene, text):  # a second round only if a clause lost its neighbour
        for edit in reversed(found):
            before, after = text[:edit.start], text[edit.end:]
            if not edit.replacement:
                before = before if after[:1].strip() else before.rstrip()
                after = after if before else after.lstrip()
            text = before + edit.replacement + after
    return text


def careless(
    scene: Scene, text: str, rng: Random, overlook: float = 0.0, noise: float = 0.0
) -> Scene:
    """Return the scene that an annotator who makes mistakes on a text believes to be true.

    `correct` with this scene in place of the true one gives their correction.

    Args:
        overlook: probability that each false object, colour, number or place is taken for true (of
            a thing mentioned twice, those of the first mention).
        noise: probability that one true colour, number or place in the text is taken for false.
    """
    things, true, said_before = {thing.kind: thing for thing in scene.things}, [], set()
    for kind, said in statements_of(text):
        if kind not in things:
            if rng.random() < overlook:
                things[kind] = replace(Thing(kind, KINDS[kind], 1, 0), **said)
            continue
        for field, value in said.items():
            if value == getattr(scene.find(kind) or things[kind], field):
                true.append((kind, field, value))
            elif kind not in said_before and rng.random() < overlook:
                things[kind] = replace(things[kind], **{field: value})
        said_before.add(kind)
    if true and rng.random() < noise:
        kind, field, value = rng.choice(true)
        values = {"colour": COLOURS, "number": NUMBERS, "cell": range(9)}[field]
        wrong = rng.choice([other for other in values if other != value])
        things[kind] = replace(things[kind], **{field: wrong})
    return replace(scene, things=tuple(things.values()))


def statements_of(text: str) -> Iterator[tuple[str, dict[str, str | int]]]:
    """Yield (kind, {its colour, number and cell, those that are stated}) for every clause."""
    for _, clauses in clauses_of(text):
        for start, end, mention in clauses:
            said = {}
            if found := COLOUR.search(text, start, end):
                said["colour"] = found[0].lower()
            if mention["number"]:
                said["number"] = VALUES[mention["number"].lower()]
            if found := PLACE.search(text, start, end):
                said["cell"] = PLACES.index(found[0].lower())
            yield NOUNS[mention["noun"].lower()], said


def mentions(text: str) -> list[str]:
    """Return the kinds that a text asserts to be there, in order, with repetitions."""
    return [NOUNS[mention["noun"].lower()]
            for _, clauses in clauses_of(text) for _, _, mention in clauses]


def merit(scene: Scene, text: str) -> tuple[int, int]:
    """Return the key of `rank`, greater is better: (-false spans, kinds rightly mentioned)."""
    return (-len(hallucinations(scene, text)),
            len({kind for kind in mentions(text) if scene.find(kind)}))


def rank(scene: Scene, first: str, second: str, rng: Random, noise: float = 0.1) -> int:
    """Return 0 if the first text is better, 1 if the second; wrong with probability `noise`.

    Fewer false spans are better, then more kinds rightly mentioned; ties are broken at random.
    """
    scores = [merit(scene, text) for text in (first, second)]
    better = rng.randrange(2) if scores[0] == scores[1] else int(scores[1] > scores[0])
    return 1 - better if rng.random() < noise else better
