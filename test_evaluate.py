"""Tests of metrics.py, coco.py, benchmarks.py, ask.py, evaluate.py, charts.py and report.py."""

import json
import random
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import ask
import benchmarks
import charts
import checkpoint
import coco
import data
import evaluate
import metrics
import report
import world
from model import LLaVA, LLaVAConfig, TextConfig, init_weights
from readers import Pair
from rows import DataError
from vision import ImageSettings, VisionConfig
from world import Scene, Thing

SETTINGS = ImageSettings(16, (0.5,) * 3, (0.25,) * 3, "pad")


def rate(hits, of):
    """A measure with one term."""
    return [(1, np.array(hits, dtype=float), np.array(of, dtype=float))]


def only_values(found):
    return {name: metric["value"] for name, metric in found.items()}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    said = [world.describe(world.make_scene(i)) for i in range(200)]
    asked = [q.text for i in range(200)
             for q in world.questions(world.make_scene(i), random.Random(i), 5)]
    data.train_tokenizer(iter(said + asked + [data.SYSTEM + " USER: ASSISTANT:"]), path, 400)
    return data.Tokenizer(path)


def tiny_model(tokenizer, seed=0):
    config = LLaVAConfig(
        vision=VisionConfig(16, 32, 1, 2, image_size=16, patch_size=8),
        text=TextConfig(tokenizer.vocab_size, 16, 32, 1, 2, 2, 512),
        image_token=tokenizer.image_token, pad_token=tokenizer.pad_token,
        eos_token=tokenizer.eos_token, vision_feature_layer=-1,
    )
    model = LLaVA(config)
    init_weights(model, seed)
    return model


@pytest.fixture(scope="module")
def run_folder(tokenizer, tmp_path_factory):
    """Two finished runs, of models that never learnt anything."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("sft", 0), ("ddpo", 1)):
        (folder / name).mkdir()
        config = {"settings": {"algo": name, "seed": 0, "beta": 0.5}, "versions": {"torch": "2"}}
        (folder / name / "config.json").write_text(json.dumps(config))
        lines = [{"step": s, "loss": 1 / s, "rewards/accuracies": s / 10} for s in range(1, 10)]
        (folder / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        checkpoint.save_llava(tiny_model(tokenizer, seed), tokenizer, SETTINGS,
                              folder / name / "model")
    return folder


# ---------------------------------------------------------------------------- metrics and intervals

def test_metrics_are_ratios_of_sums():
    found = metrics.with_intervals({
        "rate": rate([1, 0, 2], [2, 2, 4]),  # 3 / 8, and not the mean of 0.5, 0 and 0.5
        "difference": rate([1, 0, 2], [2, 2, 4]) + [(-1, np.array([1.0, 1, 0]), np.ones(3))],
        "undefined": rate([0, 0, 0], [0, 0, 0]),
    })
    assert only_values(found) == pytest.approx({"rate": 3 / 8, "difference": 3 / 8 - 2 / 3})
    with pytest.raises(ValueError, match="no answers"):
        metrics.with_intervals({"rate": rate([], [])})


def test_metrics_intervals_match_the_binomial_and_are_reproducible():
    hits = np.arange(400) % 10 < 3
    found = metrics.with_intervals({"rate": rate(hits, np.ones(400))}, seed=3)["rate"]
    half = 1.96 * (0.3 * 0.7 / 400) ** 0.5  # normal approximation
    assert found["value"] == pytest.approx(0.3)
    assert found["low"] == pytest.approx(0.3 - half, abs=0.2 * half)
    assert found["high"] == pytest.approx(0.3 + half, abs=0.2 * half)
    again = metrics.with_intervals({"rate": rate(hits, np.ones(400))}, seed=3)["rate"]
    other = metrics.with_intervals({"rate": rate(hits, np.ones(400))}, seed=4)["rate"]
    assert again == found and other != found


def test_metrics_grouped_items_are_resampled_together():
    hits, images = np.repeat(np.arange(50) % 2, 8), np.repeat(np.arange(50), 8)
    single = {"rate": rate(hits, np.ones(400))}
    together = metrics.grouped(single, images)
    assert [len(a) for _, a, _ in together["rate"]] == [50] and together["rate"][0][1][1] == 8
    narrow, wide = (metrics.with_intervals(m)["rate"] for m in (single, together))
    assert narrow["value"] == wide["value"] == 0.5
    ratio = (wide["high"] - wide["low"]) / (narrow["high"] - narrow["low"])
    assert 2.3 < ratio < 3.4  # the square root of 8 answers per image
    assert metrics.grouped({"r": rate([1, 2, 4], [1, 1, 1])}, ["b", "a", "b"])["r"][0][1].tolist() \
        == [5, 2]


def test_metrics_paired_differences_cancel_what_is_shared():
    rng = np.random.default_rng(0)
    hard = (rng.random(300) < 0.5).astype(float)
    better = hard * (rng.random(300) < 0.9)  # mends a tenth of the failures, breaks nothing
    before, after = ({"rate": rate(hits, np.ones(300))} for hits in (hard, better))
    assert metrics.paired(before, before)["rate"] == {"value": 0, "low": 0, "high": 0}
    found = metrics.paired(before, after)["rate"]
    assert found["value"] == pytest.approx((better - hard).mean()) and found["high"] < 0
    alone = metrics.with_intervals(after)["rate"]
    assert found["high"] - found["low"] < 0.5 * (alone["high"] - alone["low"])


def test_metrics_table_is_readable():
    metric = lambda value: {"value": value, "low": value / 2, "high": 2 * value}
    before = {"chair_i": metric(0.2), "length": metric(40), "mmhal/score": metric(3),
              "mmhal/kind/other": metric(1), "hallucination/number": metric(0)}
    after = before | {"chair_i": metric(0.05), "length": metric(30)}
    assert metrics.table(before, after).splitlines() == [
        "%                     before  95 % interval  after  95 % interval  change  relative",
        "chair_i                 20.0   [10.0, 40.0]    5.0    [2.5, 10.0]   -15.0     -75 %",
        "length (words)          40.0   [20.0, 80.0]   30.0   [15.0, 60.0]   -10.0     -25 %",
        "mmhal/score (of 6)      3.00   [1.50, 6.00]   3.00   [1.50, 6.00]   +0.00      +0 %",
        "hallucination/number     0.0     [0.0, 0.0]    0.0     [0.0, 0.0]    +0.0",
    ]


def test_metrics_results_survive_the_file(tmp_path):
    path = tmp_path / "results.json"
    before, after = ({"a": {"value": 1.0}}, [{"answer": "é"}]), ({}, [{"scene": 1}, {"scene": 2}])
    metrics.write_results(path, before, after)
    assert metrics.read_results(path) == {"before": before, "after": after}
    metrics.write_results(path, None, after)
    assert metrics.read_results(path) == {"after": after}
    path.write_text('{"loss": 3}')
    with pytest.raises(ValueError, match="measure again"):
        metrics.read_results(path)


# ---------------------------------------------------------------------------- POPE

@pytest.mark.parametrize("text, said", [
    ("Yes", "yes"), ("yes, there is a dog.", "yes"), ("No", "no"), ("no", "no"),
    ("No, there is no dog.", "no"), ("There is not a dog in the image", "no"),
    ("There is no dog.", "no"),
    ("Yes. No, wait.", "yes"),  # only what stands before the first full stop
    ("No.", "no"), (",No,", "no"),  # commas are dropped
    ("NO", "yes"), ("Nope", "yes"), ("Not at all", "yes"),  # exactly No, not, no
    ("I cannot see it", "yes"), ("no\nYes", "yes"),  # split on spaces, not on lines
    ("", "yes"), (".No", "yes"),
])
def test_pope_answer_rule(text, said):
    assert benchmarks.pope_answer(text) == said


def test_pope_figures_by_hand():
    answers = ["Yes", "Yes, two.", "No", "There is no cat.", "Yes", "No", "no", "Sure"]
    labels = ["yes", "yes", "yes", "yes", "no", "no", "no", "no"]
    # true positives 2, false negatives 2, false positives 2 (Yes, Sure), true negatives 2
    assert only_values(evaluate.pope(answers, labels)) == pytest.approx(
        {"accuracy": 4 / 8, "precision": 2 / 4, "recall": 2 / 4, "f1": 0.5, "yes_ratio": 4 / 8})
    found = only_values(evaluate.pope(["Yes", "Yes", "No"], ["yes", "no", "no"]))
    assert found == pytest.approx(
        {"accuracy": 2 / 3, "precision": 1 / 2, "recall": 1, "f1": 2 / 3, "yes_ratio": 2 / 3})
    assert "precision" not in evaluate.pope(["No"], ["yes"])  # 0 / 0
    with pytest.raises(ValueError, match="labels"):
        evaluate.pope(["No"], ["maybe"])
    with pytest.raises(ValueError, match="2 answers, 1 labels"):
        evaluate.pope(["No", "Yes"], ["no"])


# ---------------------------------------------------------------------------- CHAIR

CASES = [
    ("A dog runs on the grass.", "dog"),
    ("Two dogs and a puppy.", "dog dog"),
    ("A man eats a hot dog.", "person, hot dog"),
    ("Hot dogs and hotdogs on a table", "hot dog, hot dog, dining table"),
    ("A teddy bear lies on the bed.", "teddy bear, bed"),
    ("Teddy bears and a grizzly bear", "teddy bear, bear"),
    ("A bear cub in the water", "bear"),
    ("The sign bears the name of the town", ""),
    ("People wait at the bus stop for two buses.", "person, bus"),
    ("A train leaves the train station.", "train"),
    ("A passenger train on the train tracks", "train"),
    ("A woman with a purse and an umbrella", "person, handbag, umbrella"),
    ("Three women, two men and some children", "person, person, person"),
    ("A couple of birds on a wire", "bird"),
    ("A flock of geese; one goose is white", "bird, bird"),
    ("A baby elephant with an adult elephant", "elephant, elephant"),
    ("The baby sleeps next to a cat.", "person, cat"),
    ("A wine glass and two glasses of wine", "wine glass, wine glass"),
    ("She wears glasses.", ""),
    ("Knives, forks and a spoon beside the bowls", "knife, fork, spoon, bowl"),
    ("An orange on a plate", "orange"),
    ("Oranges, bananas and one apple", "orange, banana, apple"),
    ("An orange cat wears an orange tie.", "cat, tie"),
    ("The bus is orange.", "bus"),
    ("He drinks orange juice.", ""),
    ("An orange and a banana", "orange, banana"),
    ("An orange and white cat", "cat"),
    ("A man-made lake with a dog-friendly path", ""),
    ("The category of cars: sports cars, an SUV and a taxi", "car, car, car, car"),
    ("A cable car above the car park", ""),
    ("A motorbike, a scooter and a bike", "motorcycle, motorcycle, bicycle"),
    ("A bike rack without bikes", "bicycle"),
    ("A fire truck beside a fire hydrant", "truck, fire hydrant"),
    ("A stop sign and a stoplight", "stop sign, traffic light"),
    ("A plane, an aircraft and two jets", "airplane, airplane, airplane"),
    ("A jet ski passes a sailboat.", "boat"),
    ("A skier on skis at the ski resort", "person, skis"),
    ("He holds a tennis racquet and a tennis ball.", "tennis racket, sports ball"),
    ("A baseball player swings a bat.", "person, baseball bat"),
    ("The catcher's mitt catches the ball.", "baseball glove, sports ball"),
    ("A toilet with toilet paper beside a sink", "toilet, sink"),
    ("The toilet seat is up.", "toilet"),
    ("A TV on a TV stand, a remote control on the sofa", "tv, remote, couch"),
    ("A remote village", ""),
    ("A laptop computer with a computer mouse on a mouse pad", "laptop, mouse"),
    ("Her cell phone and his smartphone", "cell phone, cell phone"),
    ("A phone booth", ""),
    ("A potted plant, many plants, and a flower bed", "potted plant"),
    ("Stuffed bears on a bed of flowers", "teddy bear"),
    ("A\nhot\n dog", "hot dog"),
    ("SHEEP and Cattle", "sheep, cow"),
    ("A horse-drawn cart with ponies", "horse, horse"),
    ("A slice of pizza and a pizza box", "pizza"),
    ("A pair of scissors, two vases, a hair dryer", "scissors, vase, hair drier"),
    ("There is no dog here.", "dog"),  # CHAIR has no negation
    ("A lamp, a window and a fence.", ""),
]


@pytest.mark.parametrize("text, kinds", CASES)
def test_chair_finds_the_objects_that_a_text_mentions(text, kinds):
    wanted = kinds.split(", ") if "," in kinds or kinds in coco.WORDS else kinds.split()
    assert coco.mentions(text) == wanted


def test_chair_table_is_coco():
    assert len(CASES) >= 40 and len(coco.WORDS) == 80
    for kind in coco.WORDS:  # every kind is found by its own name and by its plural
        sentence = f"Here is {'an' if kind[0] in 'aeiou' else 'a'} {kind}."
        assert coco.mentions(sentence) == [kind]
        assert coco.mentions(coco.plural(kind) + " everywhere") == [kind]
    named = [word for others in coco.WORDS.values() for word in coco.listed(others)]
    assert len(named) == len(set(named)) and not set(named) & set(coco.WORDS)


def test_chair_figures_by_hand():
    answers = ["A dog and a cat on a bed.", "A dog, a dog and a horse.", "A quiet day.", "A cat."]
    there = [{"dog", "bed"}, {"dog"}, {"car"}, {"cat", "couch"}]
    # mentions 3 + 3 + 0 + 1, false: cat, horse; found 2 + 1 + 0 + 1 of 2 + 1 + 1 + 2
    assert only_values(evaluate.chair(answers, there)) == pytest.approx(
        {"chair_s": 2 / 4, "response": 2 / 3, "chair_i": 2 / 7, "coverage": 4 / 6})
    grouped = evaluate.chair(answers, there, ["one", "one", "two", "two"])
    assert only_values(grouped) == only_values(evaluate.chair(answers, there))


@pytest.mark.parametrize("image, key", [
    (391895, "391895"), ("391895", "391895"), ("000000391895.jpg", "391895"),
    ("COCO_val2014_000000391895.jpg", "391895"), ("val2014/000000391895.jpg", "391895"),
    ("kitchen.jpg", "kitchen.jpg"), ("img_12.png", "img_12.png"),
])
def test_chair_knows_an_image_by_all_its_names(image, key):
    assert coco.image_key(image) == key


def test_chair_reads_instances_captions_and_plain_files(tmp_path):
    images = [{"id": 7, "file_name": "COCO_val2014_000000000007.jpg"},
              {"id": 8, "file_name": "000000000008.jpg"}]
    (tmp_path / "instances.json").write_text(json.dumps({
        "images": images,
        "categories": [{"id": 18, "name": "dog"}, {"id": 88, "name": "teddy bear"}],
        "annotations": [{"image_id": 7, "category_id": 18}, {"image_id": 7, "category_id": 88}]}))
    (tmp_path / "captions.json").write_text(json.dumps({
        "images": images, "annotations": [{"image_id": 7, "caption": "A puppy on a sofa"}]}))
    (tmp_path / "plain.json").write_text(json.dumps({"a.jpg": ["wooden chair", "lamp", "person"]}))
    truth, files = coco.read_objects(sorted(tmp_path.iterdir()))
    assert truth == {"7": {"dog", "teddy bear", "couch"}, "8": set(), "a.jpg": {"chair", "person"}}
    assert files == {"7": images[0]["file_name"], "8": images[1]["file_name"], "a.jpg": "a.jpg"}
    (tmp_path / "wrong.json").write_text('{"a.jpg": "dog"}')
    (tmp_path / "worse.json").write_text('{"annotations": [{"image_id": 7}]}')
    for name in ("wrong.json", "worse.json"):
        with pytest.raises(DataError, match=f"{name}: neither COCO annotations"):
            coco.read_objects([tmp_path / name])


# ---------------------------------------------------------------------------- MMHal

@pytest.mark.parametrize("reply, found", [
    ("Rating: 6", 6), ("It is fine.\nrating: 0", 0), ("RATING: 4, since ...", 4),
    ("Rating: 3. I repeat: rating: 3", 3),  # the same one twice
    ("Rating: 3 or rating: 4", None), ("A 5 of 6", None), ("", None), ("Rating:5", None),
    ("rating: 9", None), ("Rating: 35", 3),  # as the public script reads it
])
def test_mmhal_rating_rule(reply, found):
    assert benchmarks.rating(reply) == found


def test_mmhal_figures_by_hand():
    replies = [f"Rating: {n}" for n in (6, 5, 4, 3, 2, 1, 0, 6)] + ["no rating", "rating: 2"]
    found = only_values(evaluate.mmhal(replies))
    assert found["score"] == pytest.approx(29 / 10)  # 27 for the first eight, then 0 and 2
    assert found["hallucination"] == pytest.approx(5 / 10)  # 2, 1, 0, none, 2
    by_kind = {kind: found[f"score/{kind}"] for kind in benchmarks.MMHAL_KINDS}
    assert by_kind == pytest.approx({
        "attribute": 3, "adversarial object": 3.5, "comparison": 4, "counting": 3,
        "spatial relation": 2, "environment": 1, "holistic": 0, "other": 6})


def mmhal_row(i):
    return {"question_type": "attribute", "question_topic": "food", "image_id": f"id{i}",
            "image_src": f"https://example.org/photos/{i}.png", "image_content": ["dog", "tree"],
            "question": f"Question {i}?", "gt_answer": "Truth", "model_answer": ""}


def test_mmhal_reads_replies_in_any_common_form(tmp_path):
    path = tmp_path / "replies.jsonl"
    write = lambda rows: path.write_text("\n".join(map(json.dumps, rows)))
    write([{"id": 1, "reply": "b"}, {"id": 0, "reply": "a"}])
    assert benchmarks.read_replies(path, 3) == ["a", "b", ""]
    write(["a", {"choices": [{"message": {"content": "b"}}]}])
    assert benchmarks.read_replies(path, 2) == ["a", "b"]
    path.write_text(json.dumps(["a", "b"], indent=1))  # a list instead of lines
    assert benchmarks.read_replies(path, 2) == ["a", "b"]
    write([{"id": 0, "text": "a"}])
    with pytest.raises(DataError, match="row 1: expected"):
        benchmarks.read_replies(path, 1)
    write([{"id": 5, "reply": "a"}])
    with pytest.raises(DataError, match="prompt 5, but there are only 2"):
        benchmarks.read_replies(path, 2)


def test_mmhal_template_is_checked_and_judged_by_its_facts(tmp_path):
    path = tmp_path / "template.json"
    path.write_text(json.dumps([mmhal_row(0)]))
    row = benchmarks.read_mmhal(path)[0] | {"model_answer": "A {strange} answer"}
    prompt = benchmarks.judge_prompt(row)
    for part in ("dog, tree", "Question 0?", "Truth", "A {strange} answer", "Rating: n"):
        assert part in prompt
    path.write_text(json.dumps([mmhal_row(0), {"question": "?"}]))
    with pytest.raises(DataError, match="row 2: no image_id"):
        benchmarks.read_mmhal(path)


# ---------------------------------------------------------------------------- the built-in world

KITCHEN = Scene(0, "kitchen", (Thing("cup", "red", 2, 0), Thing("pot", "blue", 1, 4)))
BEACH = Scene(1, "beach", (Thing("boat", "blue", 1, 2), Thing("ball", "purple", 3, 6)))


def judged(scene, description, replies=None):
    record = benchmarks.questionnaire([scene])[0]
    truths = [item["truth"] for item in record["asked"].values()]
    benchmarks.judge(scene, record, description, replies or truths)
    return record


def test_world_questionnaire_asks_what_it_says():
    scenes = [world.make_scene(i, "test") for i in range(60)]
    records = benchmarks.questionnaire(scenes)
    assert records == benchmarks.questionnaire(scenes) != benchmarks.questionnaire(scenes, seed=1)
    counts = {k: sum(k in r["truth"] for r in records) for k in world.KINDS}
    popular = set(sorted(counts, key=counts.get, reverse=True)[:8])  # 6, and ties
    for scene, record in zip(scenes, records):
        assert record["question"] in world.DESCRIBE_PROMPTS_EVAL
        kind = {name: world.mentions(item["question"].replace("?", ".").replace("Is there", "A "))
                for name, item in record["asked"].items() if name.startswith("pope/")}
        assert [item["truth"] == "No." for item in record["asked"].values()][:4] == [0, 1, 1, 1]
        assert kind["pope/present"][0] in record["truth"]
        assert kind["pope/random"][0] not in record["truth"]
        assert kind["pope/popular"][0] in popular - set(record["truth"])
        assert kind["pope/adversarial"][0] in set(world.SCENES[scene.type]) - set(record["truth"])


def test_world_perfect_answers_measure_perfectly():
    scenes = [world.make_scene(i, "test") for i in range(40)]
    records = benchmarks.questionnaire(scenes)
    for scene, record in zip(scenes, records):
        truths = [item["truth"] for item in record["asked"].values()]
        benchmarks.judge(scene, record, world.describe(scene), truths)
    found = only_values(benchmarks.world_metrics(records))
    zero = [name for name in found if name.startswith("hallucination/")]
    zero += ["chair_i", "over_generalisation", "mmhal/hallucination"]
    one = [n for n in found if n.startswith("question/") or n.endswith(("/accuracy", "/f1"))]
    half = [name for name in found if name.endswith("/yes_ratio")]
    six = [name for name in found if name == "mmhal/score" or name.startswith("mmhal/kind/")]
    assert len(zero) == 9 and len(one) == 12 and len(half) == 3 and len(six) == 9
    assert found["coverage"] == 1 and 20 < found["length"] < 60
    assert all(found[n] == 0 for n in zero) and all(found[n] == 1 for n in one)
    assert all(found[n] == 0.5 for n in half) and all(found[n] == 6 for n in six)


def test_world_figures_by_hand():
    records = [
        judged(KITCHEN, "This is a kitchen. There are three red cups at the top left. "  # number
                        "There is a blue apple on the right."),  # object
        judged(BEACH, "This is a beach. There is a red boat at the top right. "  # attribute
                      "There are three purple balls at the top left."),  # position
    ]
    found = only_values(benchmarks.world_metrics(records))
    assert found["hallucination/any"] == 1
    for kind in ("object", "attribute", "position", "number"):
        assert found[f"hallucination/{kind}"] == 0.5
    assert found["hallucination/other"] == 0
    assert found["chair_i"] == 1 / 4 and found["coverage"] == 3 / 4
    assert found["length"] == (21 + 22) / 2
    assert found["mmhal/kind/holistic"] == (1 + 2) / 2  # one of two objects: 1; both: 2


def test_world_wrong_answers_are_wrong():
    record = judged(KITCHEN, world.describe(KITCHEN))
    wrong = {"pope/present": "No.", "pope/random": "Yes, on the left.", "pope/adversarial": "Yes.",
             "question/colour": "Hm.", "question/number": "Three."}
    replies = [wrong.get(name, item["truth"]) for name, item in record["asked"].items()]
    record = judged(KITCHEN, world.describe(KITCHEN), replies)
    assert {name for name, item in record["asked"].items() if not item["right"]} == set(wrong)
    found = only_values(benchmarks.world_metrics([record]))
    three = lambda measure: [found[f"pope/{n}/{measure}"] for n in benchmarks.NEGATIVES]
    assert three("accuracy") == [0, 0.5, 0] and three("yes_ratio") == [0.5, 0, 0.5]
    # off the point: 3; wrong: 0 for counting and for the object that habit expects; else 6
    assert benchmarks.world_ratings(record) == [3, 0, 6, 0, 6, 6, 6, 6]


def test_world_over_generalisation_by_hand():
    make = lambda setting, truth, said: {"type": setting, "truth": truth.split(),
                                         "mentions": said.split()}
    records = [
        make("farm", "duck", "duck cow"), make("farm", "cow", "cow duck duck"),
        make("park", "kite", "kite duck"), make("park", "ball", "kite"),
    ]
    # farm, {duck, cow}: made up on 2 of 2 occasions there, 3 of 6 everywhere; park: 1 of 2, 1 of 6
    value = metrics.values(benchmarks.delta_terms(records), np.ones((1, 4)))[0]
    assert value == pytest.approx(((2 / 2 - 3 / 6) + (1 / 2 - 1 / 6)) / 2)


# ---------------------------------------------------------------------------- asking

def test_answers_keep_the_order_of_the_questions(tokenizer):
    model = tiny_model(tokenizer)
    scenes = [world.make_scene(i) for i in range(5)]
    images = [world.draw(scene, 16) for scene in scenes]
    questions = ["Is there a car?", "What can you see in the picture?", "Describe the picture.",
                 "Where is the dog?", "In this picture, is the cup above the pot?"]
    apart = [ask.answers(model, tokenizer, SETTINGS, [image], [question], 8)[0]
             for image, question in zip(images, questions)]
    together = ask.answers(model, tokenizer, SETTINGS, images, questions, 8, batch_size=2)
    features = ask.image_features(model, SETTINGS, images, batch_size=3)
    assert together == apart and len(set(apart)) > 1
    assert ask.answers(model, tokenizer, SETTINGS, features, questions, 8) == apart
    with pytest.raises(ValueError, match="5 images for 1 questions"):
        ask.answers(model, tokenizer, SETTINGS, images, ["Why?"])


def test_answers_are_sampled_reproducibly(tokenizer):
    model, images = tiny_model(tokenizer), [world.draw(world.make_scene(0), 16)] * 2
    questions = ["What?", "Where is it?"]
    draw = lambda seed: ask.answers(model, tokenizer, SETTINGS, images, questions, 8,
                                    temperature=1.0, samples=3, seed=seed)
    assert len(draw(0)) == 6 and len(set(draw(0))) > 3
    assert draw(0) == draw(0) != draw(1)


def test_stream_writes_the_whole_answer(tokenizer):
    model, image = tiny_model(tokenizer), world.draw(world.make_scene(3), 16)
    written = []
    question = "Is there a car?"
    text = ask.stream(model, tokenizer, SETTINGS, image, question, 12, write=written.append)
    assert text == "".join(written).strip() and len(written) > 3
    assert text == ask.answers(model, tokenizer, SETTINGS, [image], [question], 12)[0]


@pytest.fixture
def questions_file(tmp_path):
    """Seven images and a JSONL file of questions about them."""
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(7):
        Image.new("RGB", (8, 8), (30 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": f"<image>\nQuestion {i}?", "question_id": i,
                     "label": "yes" if i % 2 else "no"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


def test_answer_file_goes_on_where_it_was_stopped(questions_file):
    asks = ask.read_asks(questions_file / "rows.jsonl", questions_file / "images")
    assert [each.question for each in asks] == [f"Question {i}?" for i in range(7)]
    calls = []

    def reply(images, questions, seed, stop_at=None):
        calls.append(seed)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return [f"{question} {image.getpixel((0, 0))[0]} {seed}"
                for image, question in zip(images, questions)]

    whole = ask.answer_file(reply, "m", asks, questions_file / "whole.jsonl", 2)
    assert calls == [0, 2, 4, 6] and [row["question_id"] for row in whole] == list(range(7))
    assert whole[3]["answer"] == "Question 3? 90 2" and whole[3]["image"] == "3.png"
    calls.clear()
    path = questions_file / "parts.jsonl"
    with pytest.raises(KeyboardInterrupt):
        ask.answer_file(lambda *a: reply(*a, stop_at=3), "m", asks, path, 2)
    assert len(path.read_text().splitlines()) == 4
    path.write_text(path.read_text() + whole[4]["question"] + '{"half')  # killed while writing
    calls.clear()
    assert ask.answer_file(reply, "m", asks, path, 2) == whole and calls == [4, 6]
    assert path.read_text() == (questions_file / "whole.jsonl").read_text()
    calls.clear()
    assert ask.answer_file(reply, "m", asks, path, 2) == whole and not calls
    with pytest.raises(ValueError, match="another model or settings"):
        ask.answer_file(reply, "other", asks, path, 2)
    with pytest.raises(ValueError, match="other questions"):
        ask.answer_file(reply, "m", asks[1:], path, 2)


def test_answer_file_reports_images_that_cannot_be_read(questions_file):
    (questions_file / "images" / "2.png").write_bytes(b"no picture")
    asks = ask.read_asks(questions_file / "rows.jsonl", questions_file / "images")
    reply = lambda images, questions, seed: list(questions)
    path = questions_file / "out.jsonl"
    with pytest.raises(DataError, match="row 3: cannot read image 2.png"):
        ask.answer_file(reply, "m", asks, path, 2)
    assert len(path.read_text().splitlines()) == 2  # what was answered is kept
    skipped = []
    rows = ask.answer_file(reply, "m", asks, path, 2, skip=skipped)
    assert len(rows) == 7 and len(skipped) == 1 and "2.png" in skipped[0]
    assert ["answer" in row for row in rows] == [True, True, False, True, True, True, True]


@pytest.mark.parametrize("row, message", [
    ({"image": "../secret.png", "question": "?"}, "outside the image folder"),
    ({"image": "/etc/passwd", "question": "?"}, "outside the image folder"),
    ({"image": "none.png", "question": "?"}, "no image 'none.png'"),
    ({"image": "0.png"}, "'question' is missing"), ({"question": "?"}, "'image' is missing"),
    (["0.png", "?"], "expected an object"),
])
def test_asks_are_checked(questions_file, row, message):
    (questions_file / "secret.png").write_bytes((questions_file / "images" / "0.png").read_bytes())
    path = questions_file / "bad.jsonl"
    path.write_text(json.dumps({"image": "0.png", "text": "POPE's name for it?"}) + "\n"
                    + json.dumps(row))
    with pytest.raises(DataError, match=f"row 2: .*{message}"):
        ask.read_asks(path, questions_file / "images")
    skipped = []
    assert len(ask.read_asks(path, questions_file / "images", skip=skipped)) == len(skipped) == 1


# ---------------------------------------------------------------------------- the command line

def run(*arguments):
    return evaluate.main([str(argument) for argument in arguments])


def test_evaluate_measures_a_run_again(run_folder, capsys):
    for name in ("sft", "ddpo"):
        assert run(run_folder / name, "--scenes", 4) == 0
    assert "hallucination/any" in capsys.readouterr().out
    results = metrics.read_results(run_folder / "ddpo" / "results.json")
    assert list(results) == ["after"] and len(results["after"][1]) == 4
    before = metrics.read_results(run_folder / "sft" / "results.json")["after"]
    metrics.write_results(run_folder / "ddpo" / "results.json", before, before)
    assert run(run_folder / "ddpo") == 0  # as many scenes as before, and "before" stays
    assert capsys.readouterr().out.splitlines()[0].split() == \
        "% before 95 % interval after 95 % interval change relative".split()
    again = metrics.read_results(run_folder / "ddpo" / "results.json")
    assert again == {"before": before, "after": results["after"]}
    assert (run_folder / "ddpo" / "report.html").exists()


def test_evaluate_compares_runs_on_the_same_scenes(run_folder, tmp_path, capsys):
    scenes = [world.make_scene(i, "test") for i in range(20)]
    for name, said in (("sft", lambda s: world.annotate(s, random.Random(s.seed))),
                       ("ddpo", world.describe)):
        records = benchmarks.questionnaire(scenes)
        for scene, record in zip(scenes, records):
            benchmarks.judge(scene, record, said(scene), [""] * 10)
        (tmp_path / name).mkdir()
        metrics.write_results(tmp_path / name / "results.json", None,
                              (benchmarks.world_metrics(records), records))
    assert run("--compare", tmp_path / "sft", tmp_path / "ddpo") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "% sft ddpo - sft, 95 % interval".split()
    words = next(line for line in lines if line.startswith("hallucination/any")).split()
    assert float(words[2]) == 0 and float(words[3]) == -float(words[1]) < -50
    assert run("--compare", tmp_path / "sft", tmp_path / "none") == 1
    assert "first run: python evaluate.py" in capsys.readouterr().err
    result = benchmarks.world_metrics(records[:5]), records[:5]
    metrics.write_results(tmp_path / "ddpo" / "results.json", None, result)
    assert run("--compare", tmp_path / "sft", tmp_path / "ddpo") == 1
    assert "different scenes" in capsys.readouterr().err


def test_evaluate_answers_a_file_and_a_person(run_folder, questions_file, capsys):
    model, images = run_folder / "sft", questions_file / "images"
    common = ["--model", model, "--output", questions_file / "out", "--max_new_tokens", 4]
    assert run(*common, "--data", questions_file / "rows.jsonl", "--images", images) == 0
    rows = [json.loads(line) for line in (questions_file / "out/rows.jsonl").open()]
    assert [row["question_id"] for row in rows] == list(range(7))
    assert all("answer" in row for row in rows)
    capsys.readouterr()
    question = ["--prompt", "Question 3?", "--max_new_tokens", 4]
    assert run("--model", model, "--image", images / "3.png", *question) == 0
    assert capsys.readouterr().out.strip() == rows[3]["answer"]
    other = ["--model", run_folder / "ddpo", *common[2:]]  # another model into the same file
    assert run(*other, "--data", questions_file / "rows.jsonl", "--images", images) == 1
    assert "of another model or settings" in capsys.readouterr().err


def test_evaluate_pope_and_chair_from_files(run_folder, questions_file, capsys):
    images, out = questions_file / "images", questions_file / "out"
    assert run("--model", run_folder / "sft", "--pope", questions_file / "rows.jsonl",
               "--images", images, "--output", out, "--max_new_tokens", 4) == 0
    assert "accuracy" in capsys.readouterr().out
    said = [json.loads(line) for line in (out / "rows.jsonl").open()]
    scores = json.loads((out / "rows.scores.json").read_text())
    assert scores == evaluate.pope([row["answer"] for row in said],
                                   [row["label"] for row in said], [row["image"] for row in said])
    answers = questions_file / "answers.jsonl"
    answers.write_text("\n".join(json.dumps({"text": "No" if i % 2 else "Yes"}) for i in range(7)))
    assert run("--pope", questions_file / "rows.jsonl", "--answers", answers) == 0
    assert "accuracy     0.0" in capsys.readouterr().out
    truth = questions_file / "truth.json"
    truth.write_text(json.dumps({"0.png": ["dog"], "1.png": ["cat", "sofa"]}))
    answers.write_text('{"image": "0.png", "caption": "Two dogs"}\n'
                       '{"image_id": "1.png", "answer": "A cat and a dog"}\n')
    assert run("--chair", truth, "--answers", answers, "--output", out) == 0
    assert only_values(json.loads((out / "chair.scores.json").read_text())) == pytest.approx(
        {"chair_s": 1 / 2, "response": 1 / 2, "chair_i": 1 / 3, "coverage": 2 / 3})
    answers.write_text('{"image": "9.png", "caption": "Two dogs"}\n')
    assert run("--chair", truth, "--answers", answers) == 1
    assert "nothing is known about image '9'" in capsys.readouterr().err
    assert run("--chair", truth, "--model", run_folder / "sft", "--images", images,
               "--output", questions_file / "chair", "--max_new_tokens", 4) == 0
    assert len((questions_file / "chair" / "chair.jsonl").read_text().splitlines()) == 2


def test_evaluate_mmhal_from_template_to_score(run_folder, questions_file, capsys):
    template, out = questions_file / "template.json", questions_file / "out"
    template.write_text(json.dumps([mmhal_row(i) for i in range(7)]))
    assert run("--model", run_folder / "sft", "--mmhal", template, "--output", out,
               "--images", questions_file / "images", "--max_new_tokens", 4) == 0
    filled = json.loads((out / "mmhal_filled.json").read_text())
    prompts = [json.loads(line) for line in (out / "mmhal_prompts.jsonl").open()]
    assert [p["id"] for p in prompts] == list(range(7)) and filled[2]["model_answer"]
    assert filled[2]["model_answer"] in prompts[2]["prompt"]
    replies = questions_file / "replies.jsonl"
    replies.write_text("\n".join(json.dumps({"id": i, "reply": f"Rating: {i}"}) for i in range(6)))
    capsys.readouterr()
    assert run("--mmhal", out / "mmhal_filled.json", "--replies", replies) == 0
    shown = capsys.readouterr()
    assert "prompt 6: no reply, counts as 0" in shown.err
    assert "score (of 6)" in shown.out and f"{15 / 7:.2f}" in shown.out


@pytest.mark.parametrize("arguments, message", [
    (["no/such/run"], "no/such/run: no such folder"),
    (["--model", "no/such/run", "--image", "none.png", "--prompt", "?"], "cannot read image"),
    (["--pope", "none.jsonl", "--answers", "a.jsonl"], "none.jsonl: no such file"),
    (["--mmhal", "none.json", "--replies", "r.jsonl"], "none.json: no such file"),
    (["--chair", "none.json", "--answers", "a.jsonl"], "none.json: no such file"),
    (["--compare", "no/such/run"], "results.json: no such file"),
])
def test_evaluate_ends_in_one_clear_sentence(arguments, message, capsys):
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("arguments, message", [
    ([], "give one of"), (["--image", "a.png", "--model", "m"], "--image needs --prompt"),
    (["--data", "a.jsonl"], "--data needs --model"), (["run", "--pope", "p.jsonl"], "give one of"),
    (["--poep", "p.jsonl"], "unrecognized"),
])
def test_evaluate_refuses_unclear_commands(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


# ---------------------------------------------------------------------------- the report

class Page(HTMLParser):
    """Tags and text of a page; fails on tags that do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text


@pytest.fixture(scope="module")
def reported(run_folder, tokenizer, tmp_path_factory):
    """The page of a run whose data is as hostile as can be."""
    folder = tmp_path_factory.mktemp("reported") / "<b>run"
    folder.mkdir()
    config = {"settings": {"algo": "ddpo", "out": "</code><script>"}, "versions": {"torch": "2"}}
    (folder / "config.json").write_text(json.dumps(config))
    log = (run_folder / "ddpo" / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(log + '{"step": 10, "loss": NaN}\n{"half')
    scenes = [world.make_scene(i, "test") for i in range(14)]
    parts = []
    for tail in (" There is a red car in the middle. <script>alert(1)</script> & \"so\"", ""):
        records = benchmarks.questionnaire(scenes)
        for scene, record in zip(scenes, records):
            replies = [item["truth"] for item in record["asked"].values()]
            benchmarks.judge(scene, record, world.describe(scene) + tail, replies)
        parts.append((benchmarks.world_metrics(records), records))
    metrics.write_results(folder / "results.json", *parts)
    good, bad = folder / "good.png", folder / "<i>bad.png"
    world.draw(scenes[0]).save(good)
    bad.write_bytes(b"no picture")
    pairs = [Pair("rows 1", good, "What?", "A red car stands on the left.",
                  "A red car stands on the left. There is a dog <img src=x>."),
             Pair("rows 2", bad, "<script>", "A red cup is in the middle.", "Blue, it is.")]
    examples = [data.pair_example(pair, None, tokenizer, 0, gamma=5.0) for pair in pairs]
    report.save_pairs(folder, pairs, examples, tokenizer)
    path = report.write_report(folder)
    return path, Page(path.read_text())


def test_report_is_one_safe_file(reported):
    path, page = reported
    tags = {tag for tag, _ in page.tags}
    assert path.stat().st_size < 3e6 and not tags & {"script", "b>run", "i", "iframe", "object"}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/webp;base64,", "data:,"))
    assert "url(" not in path.read_text() and "@import" not in path.read_text()
    assert "<script>alert(1)</script> & \"so\"" in page.text  # shown as what it is


def test_report_shows_pictures_answers_and_spans(reported):
    _, page = reported
    pictures = [a for tag, a in page.tags if tag == "img"]
    assert len([a for a in pictures if a.get("width") == "288"]) == report.SCENES
    marks = [attributes["class"] for tag, attributes in page.tags if tag == "mark"]
    assert marks[:5] == list(report.KINDS)  # the legend
    assert set(marks[5:]) <= set(report.KINDS) and len(marks) >= 5 + 8
    for text in ("before", "after", "statement of any kind", "adversarial: right", "100.0"):
        assert text in page.text
    assert "no picture: <i>bad.png" in page.text


def test_report_draws_the_curves_that_were_logged(reported):
    _, page = reported
    labels = [a["aria-label"] for tag, a in page.tags if tag == "svg" and "aria-label" in a]
    assert labels == ["Loss", "Pairs ranked right"]
    for tag, attributes in page.tags:
        assert "nan" not in attributes.get("d", "").lower()


def test_report_marks_corrected_segments_with_their_weight(reported):
    path, page = reported
    saved = json.loads((path.parent / "pairs.json").read_text())["pairs"]
    chosen, rejected = saved[0]["responses"]
    assert "".join(text for text, _ in rejected).startswith("A red car stands on the left. There")
    assert [weight for _, weight in chosen][0] == 1 and rejected[-1][1] in (1, 5)
    cut = "".join(text for text, weight in rejected if weight == 5)
    assert "dog <img src=x>" in cut and "red car" not in cut
    assert "×5" in page.text and [tag for tag, _ in page.tags].count("del") >= 2


@pytest.mark.parametrize("names, keys", [
    (("rewards/chosen", "rewards/rejected"), ["chosen", "rejected"]),
    (("policy/clipfrac", "val/clipfrac"), ["policy", "val"]), (("loss",), []),
])
def test_report_tells_two_lines_apart(names, keys):
    figure = charts.lines("T", "unit", {name: [(1, 0.5), (2, i)] for i, name in enumerate(names)})
    page = Page(figure)
    assert page.text.startswith("T " + "".join(keys))
    assert "unit" in page.text and "step" in page.text
    assert [tag for tag, _ in page.tags].count("path") == len(names)


def test_report_of_a_bare_run(tmp_path):
    (tmp_path / "config.json").write_text('{"settings": {}, "versions": {}}')
    page = Page(report.write_report(tmp_path).read_text())
    assert "Settings" in page.text and "Learning curves" not in page.text
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        report.write_report(tmp_path)


@pytest.mark.parametrize("low, high, wanted", [
    (0, 100, [0, 50, 100]), (0, 1, [0, 0.5, 1]), (0.42, 0.67, [0.4, 0.5, 0.6, 0.7]), (3, 3, [2, 3]),
    (0, 0, [-0.5, 0, 0.5]), (-2e-6, 1e-5, [-5e-6, 0, 5e-6, 1e-5]),
])
def test_report_axes_have_round_numbers(low, high, wanted):
    found = charts.ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 3 <= len(found) <= 8
    assert all(min(abs(tick - each) for tick in found) < 1e-12 for each in wanted)
