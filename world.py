"""A small drawn world with exact truth, in which small models hallucinate as large ones do.

A *scene* is a setting (street, kitchen, ...) and three to five *things*, each a kind, a colour, a
number and one cell of a 3x3 grid. From a scene this file makes the picture, a true description, and
the description that a *noisy annotator* would write. The annotator works from habit: having said
what is there, they like to add one more thing that such a setting usually has; an unusual colour
is reported as the usual one; three are counted as two. Habit needs a world with regularities, so
settings have typical kinds and kinds have usual colours, while both have exceptions.

A model trained on the annotator's texts learns to see, and it learns the habits too: which object
to expect in a kitchen is far easier to learn than whether it is there. That is how LLaVA came to
hallucinate (co-occurrence priors copied from the text that it learnt from), and it is what the
over-generalisation measure of RLHF-V (arXiv 2312.00849, Table 2) looks for in large models.

Since the truth is known, the people of the papers can be played exactly: `hallucinations` marks
what is false in a free-form answer, `correct` edits it as RLHF-V's annotators did, `rank` prefers
one of two answers as LLaVA-RLHF's did. Everything is a function of its arguments: random choices
come from the scene's seed or from the `random.Random` that is passed in.
"""

import re
import zlib
from dataclasses import dataclass, replace
from random import Random

from drawing import COLOURS, draw  # noqa: F401  (the world's own picture of itself)

# ------------------------------------------------------------------ what there is, and the habits

KINDS = {  # kind: its usual colour (each colour is usual for four kinds, so that none stands out)
    "car": "red", "bus": "yellow", "bicycle": "blue", "house": "red", "tree": "green",
    "dog": "white", "cat": "white", "duck": "yellow", "boat": "blue", "umbrella": "red",
    "ball": "purple", "kite": "purple", "cup": "blue", "pot": "blue", "apple": "red",
    "bottle": "green", "chair": "green", "clock": "white", "lamp": "yellow", "bed": "white",
    "book": "purple", "hat": "yellow", "flower": "purple", "tractor": "green",
}
SCENES = {  # setting: its typical kinds, each with a popularity weight
    "street": {"car": 6, "house": 5, "bus": 4, "tree": 4, "bicycle": 4, "lamp": 3, "dog": 2},
    "kitchen": {"cup": 6, "pot": 5, "bottle": 4, "apple": 4, "chair": 4, "clock": 3, "cat": 2},
    "beach": {"umbrella": 6, "boat": 5, "ball": 4, "hat": 4, "kite": 4, "bottle": 3, "dog": 2},
    "farm": {"tractor": 6, "house": 5, "duck": 4, "tree": 4, "apple": 4, "cat": 3, "dog": 2},
    "park": {"tree": 6, "flower": 5, "kite": 4, "duck": 4, "ball": 4, "bicycle": 3, "dog": 2},
    "bedroom": {"bed": 6, "lamp": 5, "book": 4, "clock": 4, "chair": 4, "hat": 3, "cat": 2},
}
PLACES = (  # the 3x3 grid, row by row; no phrase is the beginning of another
    "at the top left", "at the top centre", "at the top right",
    "on the left", "in the middle", "on the right",
    "at the bottom left", "at the bottom centre", "at the bottom right",
)
NUMBERS = {1: "one", 2: "two", 3: "three"}
TYPICAL = 0.8  # chance that a thing is drawn from the setting's typical kinds, not from all kinds
UNUSUAL_COLOUR = 0.3  # chance that a thing has another colour than its usual one
NUMBER_WEIGHTS = (65, 20, 15)  # of one, two, three
EXPECTED = 2  # so many of a setting's most popular kinds everybody expects to find there
TEST_SHARE = 5  # one scene content in five belongs to the test split


@dataclass(frozen=True)
class Thing:
    kind: str
    colour: str
    number: int  # 1, 2 or 3
    cell: int  # 0..8, index into PLACES


@dataclass(frozen=True)
class Scene:
    seed: int
    type: str  # the setting, a key of SCENES
    things: tuple[Thing, ...]  # in reading order; each kind and each cell at most once

    def find(self, kind):
        """The thing of this kind, or None."""
        return next((thing for thing in self.things if thing.kind == kind), None)

    def absent(self, kinds=KINDS):
        """Those of `kinds` that are not in the scene."""
        return [kind for kind in kinds if self.find(kind) is None]


@dataclass(frozen=True)
class Rates:
    """How often the annotator writes from habit; every field is a probability."""
    missing_object: float = 0.8  # per description without one of the setting's EXPECTED most
    # popular kinds: that kind, as the last sentence ("There is also a ...")
    extra_object: float = 0.2  # per other description: some typical but absent kind, likewise
    usual_colour: float = 0.4  # per thing in an unusual colour: the usual colour instead
    three_as_two: float = 0.4  # per thing of number three: "two"
    two_as_one: float = 0.15  # per thing of number two: "a"
    wrong_place: float = 0.1  # per thing: the place above, below, left or right of the true one


def _weighted(rng, weights):
    return rng.choices(list(weights), list(weights.values()))[0]


def make_scene(seed, split="train"):
    """The scene with this seed. No scene's content is in both splits, whatever the seeds.

    The split is read off a hash of the content (not of the seed: two seeds may draw the same
    content), and scenes are redrawn until one belongs to the wanted split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    rng = Random(f"{split} scene {seed}")  # a str seed is hashed by sha512: the same everywhere
    while True:
        setting = rng.choice(list(SCENES))
        kinds = {}  # a dict, since its order is stable
        for _ in range(rng.randint(3, 5)):
            pool = SCENES[setting] if rng.random() < TYPICAL else dict.fromkeys(KINDS, 1)
            kinds[_weighted(rng, {k: w for k, w in pool.items() if k not in kinds})] = None
        things = []
        for kind, cell in zip(kinds, rng.sample(range(9), len(kinds))):
            colour = KINDS[kind]
            if rng.random() < UNUSUAL_COLOUR:
                colour = rng.choice([other for other in COLOURS if other != colour])
            things.append(Thing(kind, colour, rng.choices((1, 2, 3), NUMBER_WEIGHTS)[0], cell))
        things = tuple(sorted(things, key=lambda thing: thing.cell))
        is_test = zlib.crc32(repr((setting, things)).encode()) % TEST_SHARE == 0
        if is_test == (split == "test"):
            return Scene(seed, setting, things)


def labels(scene):
    """Per-cell truth for pretraining the vision tower: (kinds, colours, numbers, setting).

    Three lists of nine: index into KINDS plus 1, into COLOURS plus 1, and the number; 0 where the
    cell is empty. The last is the setting's index into SCENES.
    """
    kinds, colours, numbers = [0] * 9, [0] * 9, [0] * 9
    for thing in scene.things:
        kinds[thing.cell] = 1 + list(KINDS).index(thing.kind)
        colours[thing.cell] = 1 + list(COLOURS).index(thing.colour)
        numbers[thing.cell] = thing.number
    return kinds, colours, numbers, list(SCENES).index(scene.type)


# --------------------------------------------------------------------------------- what is said

OPENINGS = ("The picture shows a {}.", "This is a picture of a {}.", "This is a {}.")
SENTENCES = ("there {be} {thing} {place}.", "{thing} {be} {place}.", "{place} there {be} {thing}.",
             "you can see {thing} {place}.")
DESCRIBE_PROMPTS_TRAIN = (
    "Describe the picture.", "What can you see in the picture?", "Tell me what you see.",
    "What is in this picture? Tell me everything.", "Look at the picture and describe it.",
    "Give a long description of this picture.", "Describe everything that you see.",
    "Please tell me about this picture.", "Describe what is in this picture.",
    "Look at this. What do you see?", "Can you describe this picture?",
    "Please give a description of what you see.", "Tell me about everything that is in it.",
    "Please look at the picture and tell me everything.",
)
DESCRIBE_PROMPTS_EVAL = (  # other wordings, but no word that the training prompts lack
    "Please describe this picture.", "Tell me everything about the picture.",
    "Please tell me everything that you see.", "Look at this picture and give a description of it.",
    "Give a description of everything you see.", "Describe what you see in the picture.",
    "Please look at this picture. What is in it?", "Tell me about everything in this picture.",
)
QUESTION_PROMPTS_TRAIN = {
    "exists": ("Is there {a_kind}?", "Can you see {a_kind}?", "Is there {a_kind} in this picture?",
               "Tell me, is there {a_kind}?", "Look at the picture. Is there {a_kind} in it?"),
    "colour": ("What colour {be} the {noun}?", "Tell me the colour of the {noun}.",
               "What colour {be} the {noun} in this picture?", "What is the {noun}'s colour?",
               "Can you tell me what colour the {noun} {be}?"),
    "number": ("How many {kinds} are there?", "How many {kinds} can you see?",
               "How many {kinds} are there in this picture?", "Tell me how many {kinds} you see.",
               "Can you tell me how many {kinds} there are?"),
    "place": ("Where {be} the {noun}?", "Where can you see the {noun}?",
              "Where {be} the {noun} in this picture?", "Where in this picture can you see the {noun}?",
              "Can you tell me where the {noun} {be}?"),
    "scene": ("What place is this?", "What place can you see in the picture?",
              "Tell me what place you see.", "What place is this a picture of?",
              "Can you tell me what place this is?"),
    "comparison": ("{Be} the {noun} {relation} the {other}?",
                   "In this picture, {be} the {noun} {relation} the {other}?",
                   "Tell me, {be} the {noun} {relation} the {other}?"),
    "more": ("Are there more {kinds} than {others}?", "Tell me, are there more {kinds} than {others}?",
             "Can you see if there are more {kinds} than {others}?"),
    "what": ("What is {place}?", "What can you see {place}?", "Tell me what you see {place}.",
             "What is there in this picture {place}?", "Can you tell me what is {place}?"),
}
QUESTION_PROMPTS_EVAL = {
    "exists": ("Can you see {a_kind} in the picture?", "Is there {a_kind} in the picture?"),
    "colour": ("What is the colour of the {noun}?", "Tell me what colour the {noun} {be}."),
    "number": ("How many {kinds} are in the picture?", "Tell me how many {kinds} there are."),
    "place": ("Where in the picture {be} the {noun}?", "Tell me where the {noun} {be}."),
    "scene": ("What place is in the picture?", "Tell me what place this is."),
    "comparison": ("In the picture, {be} the {noun} {relation} the {other}?",),
    "more": ("Can you see more {kinds} than {others}?",),
    "what": ("What is there {place}?", "Tell me what is {place}."),
}
TOPICS = {  # topic: how often `questions` asks about it
    "exists": 8, "colour": 3, "number": 3, "place": 3, "scene": 1, "comparison": 3, "what": 3,
}
RELATIONS = {  # between two things
    "to the left of": lambda a, b: a.cell % 3 < b.cell % 3,
    "to the right of": lambda a, b: a.cell % 3 > b.cell % 3,
    "above": lambda a, b: a.cell // 3 < b.cell // 3,
    "below": lambda a, b: a.cell // 3 > b.cell // 3,
    "more": lambda a, b: a.number > b.number,
}


def plural(kind):
    return kind + ("es" if kind.endswith("s") else "s")


def with_article(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _noun(thing):
    return thing.kind if thing.number == 1 else plural(thing.kind)


def _be(thing):
    return "is" if thing.number == 1 else "are"


def _phrase(thing):
    """'a red car', 'two red cars'."""
    number = "a" if thing.number == 1 else NUMBERS[thing.number]
    return f"{number} {thing.colour} {_noun(thing)}"


def _capital(text):
    return text[0].upper() + text[1:]


def _sentence(thing, rng):
    template = rng.choice(SENTENCES)
    return _capital(template.format(be=_be(thing), thing=_phrase(thing), place=PLACES[thing.cell]))


def _describe(scene, things):
    """One text for `things`; the wording is the scene's own, so only what is said can differ."""
    rng = Random(f"words {scene.seed}")
    sentences = [rng.choice(OPENINGS).format(scene.type)]
    return " ".join(sentences + [_sentence(thing, rng) for thing in things])


def describe(scene):
    """A true and complete description, 25 to 55 words."""
    return _describe(scene, scene.things)


def annotate(scene, rng, rates=Rates()):
    """What the noisy annotator writes: the true description, with the habits that `Rates` lists."""
    said = []
    for thing in scene.things:
        if thing.colour != KINDS[thing.kind] and rng.random() < rates.usual_colour:
            thing = replace(thing, colour=KINDS[thing.kind])
        if rng.random() < {1: 0, 2: rates.two_as_one, 3: rates.three_as_two}[thing.number]:
            thing = replace(thing, number=thing.number - 1)
        if rng.random() < rates.wrong_place:
            row, column = divmod(thing.cell, 3)
            near = [c for c in range(9) if abs(c // 3 - row) + abs(c % 3 - column) == 1]
            thing = replace(thing, cell=rng.choice(near))
        said.append(thing)
    popular = SCENES[scene.type]
    expected = scene.absent(sorted(popular, key=popular.get, reverse=True)[:EXPECTED])
    if rng.random() < (rates.missing_object if expected else rates.extra_object):
        absent = {kind: popular[kind] for kind in scene.absent(popular)}
        kind = expected[0] if expected else _weighted(rng, absent)
        place = rng.choice(sorted(set(range(9)) - {thing.cell for thing in scene.things}))
        extra = f" There is also a {KINDS[kind]} {kind} {PLACES[place]}."
        return _describe(scene, said) + extra
    return _describe(scene, said)


def facts(scene, rng):
    """Short true captions in random order: one for each thing, one for the setting."""
    captions = [f"{_phrase(thing)} {PLACES[thing.cell]}" for thing in scene.things]
    captions.append(f"a picture of a {scene.type}")
    return rng.sample(captions, len(captions))


def statements(scene, rng, count):
    """`count` pairs (sentence of a description, is it true?), half of them true on average.

    A false sentence differs from a true one in one respect: kind, colour, number, place or setting.
    """
    pairs = []
    for _ in range(count):
        is_true = rng.random() < 0.5
        field = rng.choice(("kind", "kind", "colour", "number", "cell", "type"))
        if field == "type":
            others = [setting for setting in SCENES if setting != scene.type]
            setting = scene.type if is_true else rng.choice(others)
            pairs.append((rng.choice(OPENINGS).format(setting), is_true))
            continue
        thing = rng.choice(scene.things)
        if not is_true:
            others = {"kind": scene.absent(), "colour": COLOURS, "number": NUMBERS,
                      "cell": range(9)}[field]
            others = [value for value in others if value != getattr(thing, field)]
            thing = replace(thing, **{field: rng.choice(others)})
        pairs.append((_sentence(thing, rng), is_true))
    return pairs


def lookalike(scene, rng, difference, fewer=False):
    """The scene with some things changed in kind, colour, number or cell, or (`fewer`) without them.

    `difference` (0..1) is the share of the things that change, and of what changes about each: at
    least one in one. The seed stays, so a lookalike is described in the scene's own words.
    """
    chosen = rng.sample(range(len(scene.things)), max(1, round(difference * len(scene.things))))
    if fewer:
        gone = chosen[: len(scene.things) - 1]
        return replace(scene, things=tuple(t for i, t in enumerate(scene.things) if i not in gone))
    things = list(scene.things)
    for i in chosen:
        others = {"kind": [kind for kind in KINDS if all(kind != t.kind for t in things)],
                  "cell": sorted(set(range(9)) - {t.cell for t in things}),
                  "colour": list(COLOURS), "number": list(NUMBERS)}
        for field in rng.sample(list(others), max(1, round(difference * 4))):
            now = getattr(things[i], field)
            value = rng.choice([other for other in others[field] if other != now])
            things[i] = replace(things[i], **{field: value})
    return replace(scene, things=tuple(things))


# ------------------------------------------------------------------------- questions and answers

@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    topic: str  # a key of TOPICS


def exists_question(scene, kind, rng, held_out=False):
    """Is there a `kind`? The question of the POPE benchmark, with its true answer."""
    prompts = QUESTION_PROMPTS_EVAL if held_out else QUESTION_PROMPTS_TRAIN
    text = rng.choice(prompts["exists"]).format(a_kind=with_article(kind))
    thing = scene.find(kind)
    return Question(text, f"Yes, {PLACES[thing.cell]}." if thing else "No.", "exists")


def question(scene, topic, rng, held_out=False):
    """One question about `topic`; `held_out` takes the wordings that training never uses.

    Yes and no are equally likely to be right. Absent objects are asked about in equal parts at
    random and from the setting's typical kinds, where habit says yes.
    """
    prompts = QUESTION_PROMPTS_EVAL if held_out else QUESTION_PROMPTS_TRAIN
    thing = rng.choice(scene.things)
    if topic == "exists":
        kind = thing.kind
        if rng.random() < 0.5:
            kind = rng.choice(scene.absent(KINDS if rng.random() < 0.5 else SCENES[scene.type]))
        return exists_question(scene, kind, rng, held_out)
    if topic == "comparison":
        return _comparison(scene, rng, prompts)
    cell = thing.cell
    if topic == "what" and rng.random() < 0.3:
        cell = rng.choice(sorted(set(range(9)) - {each.cell for each in scene.things}))
    answer = {
        "colour": thing.colour, "number": NUMBERS[thing.number], "place": PLACES[cell],
        "scene": with_article(scene.type),
        "what": _phrase(thing) if cell == thing.cell else "nothing",
    }[topic]
    text = rng.choice(prompts[topic]).format(be=_be(thing), noun=_noun(thing), place=PLACES[cell],
                                             kinds=plural(thing.kind))
    return Question(text, _capital(answer) + ".", topic)


def _comparison(scene, rng, prompts):
    """Which of two things is where, or more; for each relation yes is right as often as no."""
    pairs = [(a, b) for a in scene.things for b in scene.things if a != b]
    relation = rng.choice([name for name, holds in RELATIONS.items()
                           if any(holds(a, b) for a, b in pairs)])  # then (b, a) is a no
    wanted = rng.random() < 0.5
    a, b = rng.choice([pair for pair in pairs if RELATIONS[relation](*pair) == wanted])
    text = rng.choice(prompts[relation if relation == "more" else "comparison"]).format(
        Be=_capital(_be(a)), be=_be(a), noun=_noun(a), other=_noun(b), relation=relation,
        kinds=plural(a.kind), others=plural(b.kind))
    return Question(text, "Yes." if wanted else "No.", "comparison")


def questions(scene, rng, count, held_out=False):
    """`count` different questions, topics mixed as TOPICS says. At most about 30 are sensible."""
    asked = {}
    while len(asked) < count:
        new = question(scene, _weighted(rng, TOPICS), rng, held_out)
        asked.setdefault(new.text, new)
    return list(asked.values())


# ----------------------------------------------------------------------------------- the oracles

def _any(words):
    return "|".join(sorted(words, key=len, reverse=True))


NOUNS = {form: kind for kind in KINDS for form in (kind, plural(kind))}
VALUES = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}
SENTENCE = re.compile(r"(?P<said>[^\s.!?;](?:[^.!?;\n]*[^\s.!?;])?)[.!?;]*")
MENTION = re.compile(  # the noun, the number before it and the verb beside it
    rf"(?:\bthere\s+(?P<there>is|are)\s+(?:also\s+)?)?(?:\b(?P<number>{_any(VALUES)})\s+(?:\w+\s+){{0,2}}?)?"
    rf"\b(?P<noun>{_any(NOUNS)})\b(?:\s+(?P<verb>is|are)\b)?", re.I)
COLOUR = re.compile(rf"\b(?:{_any(COLOURS)})\b", re.I)
PLACE = re.compile(rf"\b(?:{_any(PLACES)})\b", re.I)
SETTING = re.compile(rf"\b(?:{_any(SCENES)})\b", re.I)
DENIAL = re.compile(r"\b(?:not|without|no\s+\w)|\?\s*$", re.I)  # nothing is said to be there
LINK = re.compile(r"\s*,?\s+and\s+|\s*,\s+", re.I)


@dataclass(frozen=True)
class Span:
    """A false part of an answer, `answer[start:end]`, and what a minimal correction puts there."""
    start: int
    end: int
    kind: str  # object | attribute | position | number | other (wrong setting)
    replacement: str  # "" where the span is to be deleted


def _clauses(answer):
    """Yields for each asserting sentence its (end, [(clause start, clause end, mention)]).

    A clause is what is said about one mention. Most sentences are one clause; one that mentions
    several kinds is divided at the last comma or "and" between two of them, or else before the
    second. The full stop belongs to the sentence and to no clause.
    """
    for sentence in SENTENCE.finditer(answer):
        if DENIAL.search(sentence[0]):
            continue
        found = list(MENTION.finditer(answer, *sentence.span()))
        cuts = [sentence.start()]
        for before, after in zip(found, found[1:]):
            links = list(LINK.finditer(answer, before.end(), after.start()))
            cuts.append(links[-1].start() if links else after.start())
        cuts.append(sentence.end("said"))
        yield sentence.end(), list(zip(cuts, cuts[1:], found))


def _like(old, new):
    return _capital(new) if old[0].isupper() else new


def _clause_edits(thing, answer, start, end, mention):
    """Edits to one clause about a thing that is there; grammar follows a changed number."""
    for pattern, kind, truth in ((COLOUR, "attribute", thing.colour),
                                 (PLACE, "position", PLACES[thing.cell])):
        for found in pattern.finditer(answer, start, end):
            if found[0].lower() != truth:
                yield Span(*found.span(), kind, _like(found[0], truth))
    number = mention["number"]
    if number and VALUES[number.lower()] != thing.number:
        adjective = answer[mention.end("number"):mention.start("noun")].split()
        article = with_article((adjective + [thing.kind])[0]).split()[0]
        truth = article if thing.number == 1 else NUMBERS[thing.number]
        yield Span(*mention.span("number"), "number", _like(number, truth))
        for group, word in (("there", _be(thing)), ("noun", _noun(thing)), ("verb", _be(thing))):
            if mention[group] and mention[group].lower() != word:
                yield Span(*mention.span(group), "agreement", _like(mention[group], word))


def _deletion(i, clauses, is_there, end):
    """What to delete for the false object of clause i, so that the sentence still reads."""
    left, right, mention = clauses[i]
    if not any(is_there):  # the whole sentence goes; in as many parts as it has false objects
        return left, end if i == len(clauses) - 1 else right
    if any(is_there[:i]):
        return left, right
    following = clauses[i + 1][2]  # the sentence's beginning stays for the object that follows
    keeps_verb = mention["number"] and not following["there"]
    return mention.start("number" if keeps_verb else 0), following.start()


def _edits(scene, answer):
    """The false spans, and the changes of grammar (kind "agreement") that correcting them needs."""
    edits, deleted = [], []
    for end, clauses in _clauses(answer):
        things = [scene.find(NOUNS[mention["noun"].lower()]) for _, _, mention in clauses]
        for i, thing in enumerate(things):
            if thing:
                edits += _clause_edits(thing, answer, *clauses[i])
            else:
                deleted.append(Span(*_deletion(i, clauses, things, end), "object", ""))
    edits += [Span(*found.span(), "other", _like(found[0], scene.type))
              for found in SETTING.finditer(answer) if found[0].lower() != scene.type]
    edits = [edit for edit in edits
             if not any(span.start <= edit.start < span.end for span in deleted)]
    return sorted(edits + deleted, key=lambda edit: edit.start)


def hallucinations(scene, answer):
    """Every false span of a free-form answer, in order; spans never overlap.

    For an absent kind the span is its whole sentence (or its clause, where the sentence mentions
    other kinds as well); otherwise the false colour, number, place or setting alone. Text outside
    the world's language says nothing and is never false, nor are questions and denials.
    """
    return [edit for edit in _edits(scene, answer) if edit.kind != "agreement"]


def correct(scene, answer):
    """The answer with minimal edits that make it true; all else stays as it is, byte for byte.

    Sentences about absent objects go, with the white space before them (after, for the first);
    wrong words are replaced, and is/are and the noun follow a changed number.
    """
    while edits := _edits(scene, answer):  # a second round only where a clause lost its neighbour
        for edit in reversed(edits):
            before, after = answer[:edit.start], answer[edit.end:]
            if not edit.replacement:
                before = before if after[:1].strip() else before.rstrip()
                after = after if before else after.lstrip()
            answer = before + edit.replacement + after
    return answer


def mentions(answer):
    """The kinds that an answer says are there, in order, repeated where it repeats them."""
    return [NOUNS[mention["noun"].lower()]
            for _, clauses in _clauses(answer) for _, _, mention in clauses]


def rank(scene, first, second, rng, noise=0.1):
    """0 if the first answer is better, 1 if the second; wrong with probability `noise`.

    Better is: fewer false spans, then more of the objects mentioned, then either.
    """
    scores = [merit(scene, answer) for answer in (first, second)]
    better = rng.randrange(2) if scores[0] == scores[1] else int(scores[1] > scores[0])
    return 1 - better if rng.random() < noise else better


def merit(scene, answer):
    """What `rank` goes by, greater is better: (minus the false spans, objects rightly mentioned)."""
    return (-len(hallucinations(scene, answer)),
            len({kind for kind in mentions(answer) if scene.find(kind)}))


CONTENT = {  # topic: what an answer to it must say, and say alone
    "exists": "^yes|^no", "comparison": "^yes|^no", "colour": _any(COLOURS), "number": _any(VALUES),
    "place": _any(PLACES), "scene": _any(SCENES),
    "what": "|".join((_any(VALUES), _any(COLOURS), _any(NOUNS), "nothing")),
}


def answer_is_right(question, answer):
    """Whether the first sentence of an answer says what the true answer says.

    Only the words that matter to the topic count, so "It is red" is right where "Red." is.
    """
    content = re.compile(rf"\b(?:{CONTENT[question.topic]})\b", re.I)

    def said(text):
        words = map(str.lower, content.findall(re.split(r"[.!?\n]", text.strip())[0]))
        return [NOUNS.get(word, VALUES.get(word, word)) for word in words]
    return said(answer) == said(question.answer)
