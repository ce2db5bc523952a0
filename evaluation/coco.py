"""COCO's 80 kinds of objects, the words for them, and the files that list an image's objects.

CHAIR (Rohrbach et al. 2018, arXiv 1809.02156) compares the objects that a text mentions with those
in the image. A mention is the longest phrase of `WORDS` at word boundaries: a hot dog is not a dog,
a teddy bear is not a bear. Phrases in `NON_OBJECT_PHRASES` match in the same way but mention
nothing: a train station need not have a train.

The table is this repository's own; it lacks 148 of the 403 synonyms of the official file. Words
that often mean something outside the 80 kinds (glass, glove, computer, plant, seat, chicken,
baseball the game) are left out on purpose: a missed mention costs a little coverage, a wrong one
counts as a hallucination. As in the original, negation is ignored: "there is no dog" mentions a
dog.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

from formats.files import brief, read_json
from formats.rows import DataError


def listed(text: str) -> list[str]:
    """Split a comma-separated list of phrases that spans several lines."""
    return [" ".join(phrase.split()) for phrase in text.split(",") if phrase.strip()]


def word_table(text: str) -> dict[str, list[str]]:
    """Return {kind: other words for it} of "kind: word, word; kind; ..."."""
    entries = (entry.partition(":") for entry in " ".join(text.split()).split(";"))
    return {kind.strip(): listed(others) for kind, _, others in entries}


# Singular; each of COCO's twelve groups of kinds begins a line.
WORDS = word_table("""
    person: man, woman, boy, girl, child, kid, baby, toddler, infant, guy, lady, gentleman, adult,
    teenager, teen, youth, human, pedestrian, passenger, rider, driver, cyclist, bicyclist, biker,
    motorcyclist, skier, snowboarder, skateboarder, skater, surfer, swimmer, player, athlete,
    batter, catcher, umpire, referee, goalkeeper, worker, chef, waiter, waitress, farmer, soldier,
    officer, policeman, policewoman, fireman, firefighter, doctor, nurse, student, teacher, bride,
    groom, couple, crowd, family, audience, spectator, bystander, onlooker, tourist, shopper,
    customer, vendor, son, daughter, sister, brother, grandmother, grandfather, friend, cowboy,
    somebody, someone;
    bicycle: bike, mountain bike, road bike, pushbike; car: automobile, sedan, suv, hatchback,
    coupe, convertible, minivan, van, jeep, taxi, cab, taxicab, limousine, limo, police car, race
    car, sports car, station wagon; motorcycle: motorbike, motor bike, motor cycle, dirt bike,
    scooter, motor scooter, moped, vespa; airplane: plane, aeroplane, aircraft, jet, jetliner,
    airliner, biplane, seaplane, fighter jet, jumbo jet; bus: minibus, school bus, tour bus, double
    decker, double-decker, double decker bus, double-decker bus; train: locomotive, tram, subway
    train, freight train, passenger train, steam engine; truck: pickup, pickup truck, pick-up truck,
    lorry, fire truck, firetruck, fire engine, dump truck, tow truck, food truck, semi truck,
    semi-truck; boat: ship, sailboat, sailing boat, rowboat, motorboat, speedboat, canoe, kayak,
    ferry, yacht, gondola, dinghy, barge, raft, catamaran;
    traffic light: traffic signal, stoplight, stop light; fire hydrant: hydrant, fireplug; stop
    sign; parking meter; bench: park bench;
    bird: pigeon, dove, duck, duckling, goose, swan, seagull, gull, sparrow, crow, raven, parrot,
    parakeet, owl, eagle, hawk, falcon, penguin, ostrich, flamingo, pelican, heron, stork, peacock,
    hummingbird, finch, rooster, hen, cockatoo; cat: kitten, kitty, tabby, house cat; dog: puppy,
    pup, doggy, hound, poodle, terrier, bulldog, labrador, golden retriever, retriever, corgi,
    dachshund, beagle, dalmatian, husky, chihuahua, pug, collie, german shepherd, sheepdog; horse:
    pony, foal, mare, stallion, colt, horse-drawn; sheep: lamb, ewe; cow: cattle, bull, calf, ox,
    heifer; elephant; bear: grizzly, polar bear, grizzly bear, brown bear, black bear, bear cub,
    panda, panda bear; zebra; giraffe;
    backpack: rucksack, knapsack, back pack; umbrella: parasol; handbag: purse, hand bag,
    pocketbook; tie: necktie, bow tie, bowtie; suitcase: suit case, luggage, baggage;
    frisbee: flying disc, flying disk; skis: ski; snowboard; sports ball: ball, tennis ball, soccer
    ball, basket ball, beach ball, golf ball, rugby ball, volley ball, bowling ball, soccerball;
    kite; baseball bat: bat; baseball glove: baseball mitt, catcher's mitt, catchers mitt, mitt;
    skateboard: skate board; surfboard: surf board; tennis racket: racket, racquet, tennis racquet;
    bottle: water bottle, wine bottle, beer bottle; wine glass: wineglass, glass of wine, champagne
    glass, goblet; cup: mug, teacup, tea cup, coffee cup, coffee mug, paper cup; fork; knife: butter
    knife, steak knife; spoon: teaspoon, tablespoon; bowl;
    banana; apple; sandwich: burger, hamburger, cheeseburger; orange: orange slice, orange segment,
    slice of orange; broccoli; carrot; hot dog: hotdog, hot-dog; pizza: slice of pizza, pizza slice;
    donut: doughnut; cake: cupcake, cheesecake;
    chair: armchair, stool, recliner, rocking chair, office chair, folding chair, barstool; couch:
    sofa, loveseat, love seat, settee; potted plant: houseplant, house plant, pot plant, plant pot,
    flower pot, flowerpot; bed: bunk bed; dining table: table, desk, coffee table, kitchen table,
    picnic table, wooden table, side table; toilet: urinal, toilet seat, toilet bowl;
    tv: television, tv set, television set, tv screen, monitor, computer monitor, flat screen;
    laptop: laptop computer, notebook computer, macbook, netbook; mouse: computer mouse; remote:
    remote control, tv remote, wii remote, game controller, wiimote; keyboard: computer keyboard;
    cell phone: cellphone, phone, mobile phone, smartphone, smart phone, iphone, cellular phone;
    microwave: microwave oven; oven: stove, stovetop, stove top, toaster oven, pizza oven; toaster;
    sink: washbasin, wash basin, basin; refrigerator: fridge, freezer;
    book: textbook, cookbook, paperback; clock: alarm clock, wall clock, clock tower, grandfather
    clock; vase; scissors: pair of scissors, scissor; teddy bear: teddy, stuffed bear, toy bear,
    plush bear; hair drier: hair dryer, hairdryer, hairdrier, blow dryer; toothbrush: tooth brush,
    electric toothbrush""")
IRREGULAR = {
    "person": "people", "man": "men", "woman": "women", "child": "children", "goose": "geese",
    "gentleman": "gentlemen", "policeman": "policemen", "policewoman": "policewomen",
    "fireman": "firemen", "calf": "calves", "ox": "oxen", "knife": "knives", "mouse": "mice",
    "sheep": "sheep", "cattle": "cattle", "broccoli": "broccoli", "skis": "skis",
    "scissors": "scissors", "luggage": "luggage", "baggage": "baggage", "aircraft": "aircraft",
}
NON_OBJECT_PHRASES = listed("""train station, train track, train platform, train yard, train
    car, bus stop, bus station, bus lane, bus shelter, car park, cable car, bike lane, bike
    path, bike rack, bicycle lane, bicycle rack, boat dock, boat house, dog house, dog bed, dog
    food, dog bowl, corn dog, prairie dog, cat food, cat bed, sea horse, bird feeder, bird
    house, bird bath, bird cage, bear hug, gummy bear, toy dog, toy car, toy train, toy truck,
    toy horse, rubber duck, stuffed dog, ski slope, ski lift, ski resort, ski pole, ski jacket,
    ski suit, ski boot, jet ski, tie dye, tie-dye, ball game, ball field, super bowl, fruit bat,
    apple tree, apple logo, apple computer, apple store, banana tree, orange tree, orange juice,
    pizza box, pizza parlor, cake stand, cup holder, chair lift, table tennis, flower bed, bed
    of flowers, river bed, truck bed, bed of a truck, bed of the truck, bed sheet, toilet paper,
    tv stand, tv show, television show, mouse pad, mickey mouse, remote area, remote location,
    remote island, remote beach, remote village, mobile home, piano keyboard, phone booth, phone
    number, book shelf, book store, fork in the road, umbrella stand, bottle cap, bottle opener,
    knife block, bench press, bears a, bears the, bears some, bear in mind, couple of, oven
    mitt, passenger seat, passenger side, driver's seat, family room, child seat, baby carriage,
    baby stroller, cowboy hat, cowboy boot, record player, dvd player, cd player""")
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
AGES = ("baby", "adult", "mother", "father", "infant")  # before an animal: not a person
# "An orange on a plate" is a fruit, "an orange cat" and "the hat is orange" are not: the fruit
# follows an article, and no noun follows it.
FRUIT = re.compile(
    r"(?<![\w-])(?:an|the|one|another|half an)\s+orange(?=\s*(?:$|[.,;:!?)]|(?:on|in|at|is|was|"
    r"next|with|beside|near|by|from|that|which|sits|lies|lying|sitting|cut)\b|(?:and|or)\s+"
    r"(?:an?|the|one|two|three|some|several)\b))", re.I)


def plural(word: str) -> str:
    """Return the plural of a phrase: "teddy bears", "slices of pizza"."""
    if " of " in word:
        noun, of, rest = word.partition(" of ")
        return plural(noun) + of + rest
    before, _, last = word.rpartition(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{before} {last}".strip()


@lru_cache(maxsize=None)
def forms() -> dict[str, str | None]:
    """Return {form: kind} of every word and phrase in lower case; None: it mentions nothing."""
    found: dict[str, str | None] = {}
    for phrase in NON_OBJECT_PHRASES:
        found |= {phrase: None, plural(phrase): None}
    for kind, others in WORDS.items():
        for word in [kind, *others]:
            ages = [""] + [f"{age} " for age in AGES if kind in ANIMALS]
            found |= {age + form: kind for age in ages for form in (word, plural(word))}
    del found["orange"]  # only as FRUIT
    return found


@lru_cache(maxsize=None)
def pattern() -> re.Pattern:
    """Return a pattern of all forms, the longest first; a hyphen is part of a word (man-made)."""
    words = sorted(forms(), key=len, reverse=True)
    any_form = "|".join(re.escape(word).replace("\\ ", r"\s+") for word in words)
    return re.compile(rf"(?<![\w-])(?:{any_form})(?![\w-])", re.I)


def mentions(text: str) -> list[str]:
    """Return the kinds of COCO that a text mentions, in order, with repetitions."""
    text = text.replace("\u2019", "'")
    found = [(m.start(), forms()[" ".join(m[0].lower().split())]) for m in pattern().finditer(text)]
    found += [(m.start(), "orange") for m in FRUIT.finditer(text)]
    return [kind for _, kind in sorted(found, key=lambda each: each[0]) if kind]


# ---------------------------------------------------------------------------- objects of the images


def image_key(image: str | int) -> str:
    """Return the same key for all names of an image.

    COCO names an image by number (391895), by file (000000391895.jpg) and by an older file name
    (COCO_val2014_000000391895.jpg). Any other name is kept, without its folder.
    """
    name = Path(str(image)).name
    number = re.fullmatch(r"(?:COCO_\w+?_)?(\d+)(?:\.\w+)?", name)
    return (number[1].lstrip("0") or "0") if number else name


def kinds_of(text: str) -> list[str]:
    """Return the kinds that the name of an object, or a caption, mentions."""
    return [text] if text in WORDS else mentions(text)


def read_objects(
    paths: Iterable[Path | str], kinds_of: Callable[[str], Iterable[str]] = kinds_of
) -> tuple[dict[str, set[str]], dict[str, str], dict[str, str]]:
    """Read the objects of every image from annotation files.

    Args:
        paths: COCO instance annotations (instances_*.json); COCO captions (captions_*.json), whose
            mentions count as objects too, as in CHAIR; or plain files, {image: [objects]}, in any
            words of the table; other objects are ignored. Objects of several files add up.
        kinds_of: text -> kinds; default: by the words of this file.

    Returns:
        {image key: kinds}; {image key: file name} for opening the image; {image id: image key},
        which in COCO itself is the number in the file's name, but not in every copy of its format.

    Raises:
        FileNotFoundError, DataError: a file is missing, has another format, or names images that
            `image_key` cannot tell apart.
    """
    objects: dict[str, set[str]] = defaultdict(set)
    files: dict[str, str] = {}
    ids: dict[str, str] = {}
    for path in map(Path, paths):
        content = read_json(path)
        try:
            named, found = image_rows(content)
            if not all(isinstance(text, str) for _, text in (*named.items(), *found)):
                raise TypeError
        except (KeyError, TypeError, AttributeError):
            raise DataError(f"{path}: neither COCO annotations (instances or captions) nor "
                            '{"image.jpg": ["object", ...]}') from None
        keys: dict[str, str] = {}
        for image, name in named.items():
            ids[str(image)] = key = image_key(name)
            other, before = keys.setdefault(key, name), files.get(key, name)
            if other == name and elsewhere(name, before):
                other = before  # of another file, in another folder
            if other != name:
                raise DataError(f"{path}: images {brief(other)} and {brief(name)} cannot be told "
                                "apart by number or file name; rename one")
        files |= {k: name for k, name in keys.items() if k not in files or Path(name).name != name}
        objects |= {key: set() for key in keys if key not in objects}
        for image, text in found:
            objects[ids.get(str(image), image_key(image))] |= set(kinds_of(text))
    return objects, files, ids


def elsewhere(one: str, two: str) -> bool:
    """Return whether two names of one key are of different images, as their folders say.

    COCO's own numbers are unique, whatever the folder.
    """
    if re.search(r"\d{12}\.\w+$", one):
        return False
    shorter, longer = sorted((Path(one).parts, Path(two).parts), key=len)
    return len(shorter) > 1 and longer[-len(shorter) :] != shorter


def image_rows(content: dict) -> tuple[dict, list]:
    """Return {image: file name} and [(image, kind or text)] of a file's content."""
    if "annotations" in content:
        kinds = {each["id"]: each["name"] for each in content.get("categories", ())}
        return ({image["id"]: image["file_name"] for image in content.get("images", ())},
                [(each["image_id"], each.get("caption") or kinds[each["category_id"]])
                 for each in content["annotations"]])
    if not all(isinstance(names, list) for names in content.values()):
        raise TypeError("not a list of objects")
    return ({image: image for image in content},
            [(image, str(name)) for image, names in content.items() for name in names])
