"""All tests, in the order of the README's file map: `pytest -q`.

Mathematics against independent references, our files against `transformers` and `peft`, resumed runs
against uninterrupted ones, and whatever a user can get wrong. No network; a GPU is used where one is.
"""

import copy
import dataclasses
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ask
import benchmarks
import charts
import checkpoint
import coco
import collect
import config
import convert
import data
import ddpo
import dry_run
import evaluate
import features
import files
import generation
import kernels
import lessons
import layouts
import metrics
import model as models
import ppo
import readers
import report
import reward
import rlhf
import rollouts
import rows
import sft
import train
import world
from checkpoint import save_llava
from data import Example, Response, collate
from kernels import bench, bench_step, fused, reference
from model import (
    LLaVA, LLaVAConfig, TextConfig, add_adapter, carriers, generate, init_weights,
    select_trainable, use_adapter,
)
from preferences import Prompt, Ranked, Reader
from readers import Conversation, Pair, read_conversations, read_pairs, read_prompts
from rows import DataError, ParquetImage, open_image
from vision import ImageSettings, VisionConfig, preprocess
from world import Scene, Span, Thing

ROOT = Path(__file__).parent

# ================================================================================ shared fixtures

TEXT = TextConfig(
    vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
)
TINY = LLaVAConfig(
    vision=VisionConfig(16, 32, 2, 2, image_size=12, patch_size=4), text=TEXT,
    image_token=58, pad_token=59, eos_token=2,
)
PATCHES = 9


@pytest.fixture(scope="module")
def tiny():
    model = LLaVA(TINY).eval()
    init_weights(model, 0)
    return model


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    data.train_tokenizer(sft.world_texts(40), path, 700)
    return data.Tokenizer(path)


def random_example(seed, image=True, lengths=(7, 9), shared=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, 58, (n,), generator=g).tolist()
    prefix = draw(shared)
    responses = []
    for n in lengths:
        tokens = prefix + draw(n) + [2]
        responses.append(Response(tokens, (torch.rand(len(tokens), generator=g) + 0.5).tolist()))
    picture = torch.randn(3, 12, 12, generator=g) if image else None
    prompt = [1] + [58] * PATCHES * image + draw(4 + seed % 3)
    return Example(f"row {seed}", picture, prompt, responses, [0.1 * seed, -0.2])


def entry_logp(model, batch):
    hidden = model(batch.images, batch.tokens, batch.position, batch.branch)
    return model.head(hidden.flatten(0, 1)[batch.source], batch.target)


# ======================================================================================= train.py


def run_train(*arguments, **kwargs):
    """train.py as a user starts it; returns the finished process."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **kwargs)


def same_weights(one, two):
    first, second = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Somebody's own data: six images and their corrections."""
    folder = tmp_path_factory.mktemp("photos")
    rows = []
    for i in range(6):
        Image.new("RGB", (40 + 9 * i, 60), (40 * i, 90, 200 - 30 * i)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "Describe the picture.",
                     "chosen": f"There is a red car on the left. {i}",
                     "rejected": f"There is a blue car on the left. There is a dog. {i}"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def own_data(photos, out, *more):
    return ("--algo", "ddpo", "--data", photos / "rows.jsonl", "--images", photos, "--out", out,
            "--batch_size", 4, *more)


def test_schedule():
    rates = [train.schedule(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1
    assert rates[55] == pytest.approx(0.5) and 0 < rates[99] < 0.001
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_command_line_follows_the_dataclasses():
    run, config = train.parse(["--algo", "ddpo", "--gamma", "2", "--no-normalize", "--lora", "4"])
    assert (config.gamma, config.normalize, config.beta, run.lora) == (2.0, False, 0.5, 4)
    assert type(train.parse(["--algo", "dpo"])[1]) is ddpo.DPOConfig
    assert train.parse(["--algo", "ppo", "--missing_end", "-3"])[1].missing_end == -3
    for wrong in (["--algo", "nonsense"], ["--gama", "3"], ["--algo", "sft", "--gamma", "3"],
                  ["--beta", "much"], ["--normalize", "False"], ["--batch_size", "0"],
                  ["--learning_rate", "nan"], ["--lora", "-8"], ["--images", "photos"]):
        with pytest.raises(SystemExit) as stopped:
            train.parse(wrong)
        assert stopped.value.code == 2


def test_alignment_reduces_hallucination_from_end_to_end(tmp_path):
    """The main job, small: sample, correct, align, measure. Same seed, same result."""
    arguments = ("--algo", "ddpo", "--corrections", 128, "--test_scenes", 60, "--epochs", 6,
                 "--learning_rate", 1e-4, "--out", "out")
    first = run_train(*arguments, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "hallucination/any" in first.stdout and "before" in first.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    before, after = (results[when]["metrics"] for when in ("before", "after"))
    value = lambda metrics, name: metrics[name]["value"]
    assert value(after, "hallucination/object") < 0.6 * value(before, "hallucination/object")
    assert value(after, "hallucination/any") < value(before, "hallucination/any")
    assert value(after, "coverage") > value(before, "coverage") - 0.05
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 24 and lines[-1]["rewards/accuracies"] > 0.8
    shutil.move(tmp_path / "out", tmp_path / "kept")
    second = run_train(*arguments, cwd=tmp_path)
    assert second.stdout == first.stdout
    assert same_weights(tmp_path / "out/model", tmp_path / "kept/model")


def test_shipped_base_behaves_as_stated():
    """Competent but untruthful: it sees what is there, and adds what usually is."""
    size = sum(file.stat().st_size for file in (ROOT / "base").iterdir())
    assert size <= 8 * 2**20 and not list((ROOT / "base").glob("*.bin"))
    model, tokenizer, settings = checkpoint.load_llava(ROOT / "base", dtype=torch.float32)
    metrics, _ = evaluate.measure_world(model, tokenizer, settings, 100, progress=False)
    value = lambda name: metrics[name]["value"]
    assert value("coverage") >= 0.95
    assert value("hallucination/object") >= 0.45
    assert value("pope/random/accuracy") >= 0.85
    assert value("over_generalisation") >= 0.1


def test_shipped_judge_compares_an_answer_with_facts():
    """One wrong word in a description is noticed more often than not, before any ranked pair."""
    folder = ROOT / "judge"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8 * 2**20
    model, tokenizer, settings = checkpoint.load_llava(folder, dtype=torch.float32)
    judge = reward.Judge(model)
    judge.start_from_verdict(tokenizer)
    scenes = [world.make_scene(f"judged {i}", "test") for i in range(100)]
    features, rng, pairs = sft.see(model, scenes, settings), random.Random(0), []
    for scene, image in zip(scenes, features):
        tokens = data.trunk_tokens(tokenizer, [], "Describe the picture.", model.config.vision.patches)
        prompt = Prompt(scene.seed, image, tokens, "", world.facts(scene, rng))
        false = world.lookalike(scene, rng, 0)
        pairs.append(Ranked(prompt, *(tokenizer.encode(world.describe(s)) for s in (scene, false))))
    assert reward.agreement(judge, tokenizer, pairs)[0]["agreement"]["value"] >= 0.6


@pytest.mark.parametrize("more", [(), ("--lora", 4)], ids=["full", "lora"])
def test_resume_after_a_kill_is_bit_exact(photos, tmp_path, more):
    settings = ("--steps", 40, "--learning_rate", 1e-3, "--save_every", 7, "--log_every", 1, *more)
    whole = run_train(*own_data(photos, tmp_path / "whole", *settings))
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, str(ROOT / "train.py"),
               *map(str, own_data(photos, tmp_path / "cut", *settings))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "cut/metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 10):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "--resume goes on" in said
    step = checkpoint.load_state(checkpoint.latest_state(tmp_path / "cut"))["step"]
    assert 10 <= step < 40
    again = run_train(*own_data(photos, tmp_path / "cut", *settings))
    assert again.returncode == 1 and "unfinished run; --resume goes on" in again.stderr
    resumed = run_train(*own_data(photos, tmp_path / "cut", *settings, "--resume"))
    assert resumed.returncode == 0 and f"resumed at step {step}" in resumed.stderr
    assert same_weights(tmp_path / "whole/model", tmp_path / "cut/model")
    losses = [[json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").open()]
              for run in ("whole", "cut")]
    assert losses[0] == losses[1] and len(losses[0]) == 40


def test_micro_batches_change_nothing(photos, tmp_path):
    for size in (4, 1):
        done = run_train(*own_data(photos, tmp_path / str(size), "--micro_batch", size, "--steps", 3))
        assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / str(size) / "model/model.safetensors") for size in (4, 1))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=1e-3)


def test_dry_run_shows_segments_and_writes_nothing(photos, tmp_path):
    shown = run_train(*own_data(photos, tmp_path / "none", "--dry_run"))
    assert shown.returncode == 0 and not (tmp_path / "none").exists()
    assert "rows.jsonl row 3" in shown.stdout and "[" in shown.stdout and "6 rows" in shown.stdout


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_weights(photos, tmp_path):
    broken = run_train(*own_data(photos, tmp_path / "run", "--learning_rate", 1e30, "--steps", 9,
                                 "--warmup", 0, "--save_every", 1, "--max_grad_norm", 1e30))
    assert broken.returncode == 1 and "Traceback" not in broken.stderr
    assert re.search(r"error: .* at step \d+ \(rows: .*rows.jsonl row \d", broken.stderr)
    assert checkpoint.latest_state(tmp_path / "run") is not None


def test_bad_rows_stop_or_are_listed(photos, tmp_path):
    rows = (photos / "rows.jsonl").read_text()
    long = json.dumps({"image": "0.png", "question": "Why?", "chosen": "word " * 500, "rejected": "a"})
    lost = json.dumps({"image": "gone.png", "question": "Why?", "chosen": "b", "rejected": "a"})
    (tmp_path / "bad.jsonl").write_text(rows + long + "\n" + lost + "\n")
    arguments = ("--data", tmp_path / "bad.jsonl", "--images", photos, "--out", tmp_path / "out",
                 "--steps", 1)
    stopped = run_train(*arguments)
    assert stopped.returncode == 1 and "Traceback" not in stopped.stderr
    assert re.search(r"bad.jsonl row [78]", stopped.stderr)
    went_on = run_train(*arguments, "--skip_bad_rows", "--overwrite")
    assert went_on.returncode == 0 and "2 rows left out" in went_on.stderr
    assert "context holds" in went_on.stderr and "no image 'gone.png'" in went_on.stderr


def test_folders_are_never_lost(photos, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("all my work")
    refused = run_train(*own_data(photos, tmp_path / "thesis", "--overwrite"))
    assert refused.returncode == 1 and "not empty" in refused.stderr
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "all my work"
    assert run_train(*own_data(photos, tmp_path / "run", "--steps", 1)).returncode == 0
    other = run_train(*own_data(photos, tmp_path / "run", "--steps", 2))
    assert other.returncode == 1 and "other settings (steps differ)" in other.stderr
    file = run_train(*own_data(photos, tmp_path / "thesis" / "chapter.txt"))
    assert file.returncode == 1 and "chapter.txt is a file" in file.stderr
    nothing = run_train(*own_data(photos, tmp_path / "new", "--resume"))
    assert nothing.returncode == 1 and "no run to resume" in nothing.stderr
    assert not (tmp_path / "new").exists()
    with files.claimed(tmp_path / "run"):  # as a run that goes on does
        before = (tmp_path / "run" / "config.json").read_bytes()
        second = run_train(*own_data(photos, tmp_path / "run", "--steps", 3, "--overwrite"))
        assert second.returncode == 1 and "another run is at work in it" in second.stderr
        assert (tmp_path / "run" / "config.json").read_bytes() == before
    again = run_train(*own_data(photos, tmp_path / "run", "--steps", 3, "--overwrite"))
    assert again.returncode == 0, again.stderr
    missing = run_train("--model", tmp_path / "nowhere", "--out", tmp_path / "m")
    assert missing.returncode == 1 and "nowhere" in missing.stderr and "Traceback" not in missing.stderr


def test_a_start_that_failed_leaves_nothing_in_the_way(photos, tmp_path, capsys):
    settings = [str(each) for each in own_data(photos, tmp_path / "run", "--steps", 1)]
    for wrong, sentence in ((("--images", "nowhere"), "no image '0.png' in "),
                            (("--data", "none.jsonl"), "none.jsonl: no such file"),
                            (("--device", "abacus"), "--device abacus: ")):
        assert train.main([*settings, *wrong]) == 1
        assert f"error: {sentence}" in re.sub("error: .*row 1: ", "error: ", capsys.readouterr().err)
    assert train.main(settings) == 0


def test_tensorboard_says_that_it_is_missing(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # cannot be imported
    given = [str(each) for each in own_data(photos, tmp_path / "run", "--tensorboard")]
    assert train.main(given) == 1
    assert "error: --tensorboard needs a package: pip install tensorboard" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_what_the_log_has(photos, tmp_path, monkeypatch):
    """Also of a run that was killed two steps after its checkpoint, and resumed."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    given = [str(each) for each in own_data(
        photos, tmp_path, "--steps", 6, "--save_every", 2, "--log_every", 1, "--tensorboard")]
    one_step = train.Loop.one_step

    def killed(loop):
        if loop.step == 4:
            raise KeyboardInterrupt
        return one_step(loop) | {"loss": 9.0}  # steps that will be made again, with other numbers

    save = train.Loop.save
    monkeypatch.setattr(train.Loop, "one_step", killed)
    monkeypatch.setattr(train.Loop, "save", lambda loop: save(loop) if loop.step == 2 else None)
    assert train.main(given) == 130
    monkeypatch.undo()
    assert train.main([*given, "--resume"]) == 0
    found = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert set(found.Tags()["scalars"]) == lines[0].keys() - {"step"}
    for name in found.Tags()["scalars"]:
        assert [(each.step, each.value) for each in found.Scalars(name)] == [
            (line["step"], pytest.approx(line[name])) for line in lines]


def test_corrections_are_true_and_reproducible(tmp_path):
    model, tokenizer, settings = checkpoint.load_llava(ROOT / "base", dtype=torch.float32)
    paths = [collect.corrections(model, tokenizer, settings, tmp_path / n, 20, 4) for n in "ab"]
    assert paths[0].read_text() == paths[1].read_text()
    for pair in readers.read_pairs([paths[0]], tmp_path / "a/images"):
        number = int(pair.image.stem)
        scene = world.make_scene(f"corrections 4 {number}")
        assert world.hallucinations(scene, pair.rejected) and not world.hallucinations(scene, pair.chosen)
        assert rows.open_image("x", pair.image).tobytes() == world.draw(scene, 72).tobytes()


PHOTOS = ROOT.parent / "shared" / "photos"


@pytest.mark.skipif(not PHOTOS.exists(), reason="no real photos beside the repository")
@pytest.mark.parametrize("name", ["corrections.jsonl", "corrections.parquet"])
def test_real_photos(tmp_path, name):
    pytest.importorskip("pyarrow")
    done = run_train("--data", PHOTOS / name, "--images", PHOTOS, "--out", tmp_path / "o", "--steps", 2)
    assert done.returncode == 0, done.stderr


def test_readme_names_every_file_and_the_right_lines():
    readme = (ROOT / "README.md").read_text()
    for file in ROOT.glob("[!t]*.py"):
        assert f"`{file.name}`" in readme, f"{file.name} is not in the README's file map"
    found = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", readme)
    assert len(found) >= 6
    for name, file, line in found:
        lines = (ROOT / file).read_text().splitlines()
        right = [i for i, text in enumerate(lines, 1) if re.match(rf"(def|class) {name}\b", text)]
        assert right == [int(line)], f"{name} is at line {right} of {file}"


def test_every_algorithm_has_its_options():
    assert set(config.ALGORITHMS) == set(train.ALGORITHMS)
    for algo in config.ALGORITHMS:
        assert issubclass(type(train.parse(["--algo", algo])[1]), config.Training)


# ======================================================================================== ddpo.py


def test_scores_are_eq_5_by_hand():
    logp = torch.tensor([-1.0, -2.0, -0.5, -3.0, -0.25], dtype=torch.float64)
    weight = torch.tensor([1.0, 5.0, 1.0, 5.0, 1.0], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 1, 1])
    scores = ddpo.response_scores(logp, weight, group, 2)
    # 1/N [sum of unchanged + gamma * sum of corrected], N = |unchanged| + gamma |corrected|
    assert scores[0].item() == pytest.approx((-1.0 - 0.5 + 5 * -2.0) / (2 + 5 * 1), abs=1e-12)
    assert scores[1].item() == pytest.approx((-0.25 + 5 * -3.0) / (1 + 5 * 1), abs=1e-12)
    sums = ddpo.response_scores(logp, weight, group, 2, normalize=False)
    assert sums.tolist() == pytest.approx([-11.5, -15.25], abs=1e-12)


def test_scores_with_weight_one_are_eq_4():
    logp = torch.randn(10, dtype=torch.float64)
    group = torch.tensor([0] * 4 + [1] * 6)
    scores = ddpo.response_scores(logp, torch.ones(10).double(), group, 2, normalize=False)
    torch.testing.assert_close(scores, torch.stack([logp[:4].sum(), logp[4:].sum()]))


def test_preference_loss_and_its_gradient_against_the_closed_form():
    values = torch.randn(4, 6, dtype=torch.float64)
    chosen, rejected = (v.clone().requires_grad_() for v in values[:2])
    beta = 0.3
    losses, r_chosen, r_rejected = ddpo.preference_loss(chosen, rejected, values[2], values[3], beta)
    margin = beta * ((values[0] - values[2]) - (values[1] - values[3]))
    torch.testing.assert_close(losses, torch.log(1 + torch.exp(-margin)))
    torch.testing.assert_close(r_chosen, beta * (values[0] - values[2]))
    torch.testing.assert_close(r_chosen - r_rejected, margin)
    losses.sum().backward()
    slope = beta / (1 + torch.exp(margin))  # DPO, Eq. 7: beta * sigmoid(-margin)
    torch.testing.assert_close(chosen.grad, -slope)
    torch.testing.assert_close(rejected.grad, slope)


def test_loss_is_log_2_where_policy_is_reference(tiny):
    examples = [random_example(i) for i in range(4)]
    config = ddpo.DDPOConfig(micro_batch=2)
    scores = ddpo.reference_scores(tiny, examples, config, torch.device("cpu"))
    for example, pair in zip(examples, scores):
        example.reference = pair
    algorithm = ddpo.DDPO(tiny, config, 0, examples)
    loss, metrics = algorithm.loss(algorithm.batches(0)[0])
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-6)


# ============================================================================== reward.py, ppo.py

# ================================================================================ fixtures


@pytest.fixture(scope="module")
def tokenizer_rlhf(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    data.train_tokenizer(sft.world_texts(40), path, 700)
    return data.Tokenizer(path)


@pytest.fixture(scope="module")
def tiny_rlhf(tokenizer_rlhf):
    text = TextConfig(
        vocab_size=tokenizer_rlhf.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256)
    model = LLaVA(LLaVAConfig(
        vision=VisionConfig(16, 32, 2, 2, image_size=12, patch_size=4), text=text,
        image_token=tokenizer_rlhf.image_token, pad_token=tokenizer_rlhf.pad_token,
        eos_token=tokenizer_rlhf.eos_token)).eval()
    init_weights(model, 0)
    return model


def make_prompt(tokenizer_rlhf, i=0, question="Describe it.", facts=("a car", "a dog", "a tree"), **kw):
    features = torch.randn(9, 16, generator=torch.Generator().manual_seed(i))
    tokens = data.prompt_tokens(tokenizer_rlhf, data.prompt_text(question), 9)
    return Prompt(f"row {i}", features, tokens, question, list(facts), **kw)


def make_pair(tokenizer_rlhf, i=0, **kw):
    texts = f"There is a car. {'A dog. ' * (i % 3)}", "A tree at the top."
    return Ranked(make_prompt(tokenizer_rlhf, i, **kw), *(tokenizer_rlhf.encode(t, eos=True) for t in texts))


# ==================================================================== reward: the pairwise loss


def test_pairwise_loss_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.5]), torch.tensor([0.0, 1.5])
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2 + 1e-3 * 1.5
    assert reward.pairwise_loss(chosen, rejected).item() == pytest.approx(expected, abs=1e-6)
    bce = nn.functional.binary_cross_entropy_with_logits(chosen - rejected, torch.ones(2))
    torch.testing.assert_close(reward.pairwise_loss(chosen, rejected, centring=0.0), bce)


def test_pairwise_loss_has_the_gradient_of_the_closed_form():
    chosen, rejected = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    reward.pairwise_loss(chosen, rejected, 0.01).backward()
    slope = -torch.sigmoid(rejected - chosen) / 5
    centre = 0.01 * (chosen + rejected).mean().sign() / 5
    torch.testing.assert_close(chosen.grad, (slope + centre).detach())
    torch.testing.assert_close(rejected.grad, (-slope + centre).detach())


# ========================================================== reward: where it is read, and of what


@pytest.mark.parametrize("words", [0, 1, 2, 5, 17])
def test_reward_is_read_at_the_requests_last_token(tiny_rlhf, tokenizer_rlhf, words):
    prompt = make_prompt(tokenizer_rlhf)
    answers = [tokenizer_rlhf.encode("car " * words, eos=True), tokenizer_rlhf.encode("a dog", eos=True)]
    judge = reward.Judge(tiny_rlhf)
    nn.init.normal_(judge.weight, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        both = judge(reward.judge_batch(tiny_rlhf, tokenizer_rlhf, [(prompt, answers)], (0,)))
        facts = reward.shuffled(prompt.facts, 0, prompt.name)
        for answer, found in zip(answers, both):
            text = tokenizer_rlhf.encode(f"USER: {data.judging_request(facts)} ASSISTANT:")
            plain = torch.tensor([prompt.tokens + answer[:-1] + text])
            hidden = tiny_rlhf(prompt.image[None], plain)[0, -1]
            torch.testing.assert_close(found, hidden @ judge.weight + judge.bias, atol=1e-5, rtol=0)
    assert tokenizer_rlhf.decode(plain[0]).endswith("ASSISTANT:")


def test_request_has_the_form_of_the_bases_lessons(tokenizer_rlhf):
    answer, facts = "There is a car.", ["a car", "a dog"]
    lesson = tokenizer_rlhf.encode(
        f"\nDescribe it. ASSISTANT: {answer} USER: {data.judging_request(facts)} ASSISTANT:")
    ours = (tokenizer_rlhf.encode("\nDescribe it. ASSISTANT:")
            + reward.judged(tokenizer_rlhf, tokenizer_rlhf.encode(answer, eos=True), facts).tokens[:-1])
    assert ours == lesson


def test_facts_change_only_the_request(tiny_rlhf, tokenizer_rlhf):
    answer = tokenizer_rlhf.encode("There is a car.", eos=True)
    without, given = (reward.judged(tokenizer_rlhf, answer, facts).tokens for facts in ((), ["a dog"]))
    assert without[: len(answer) - 1] == given[: len(answer) - 1] == answer[:-1]
    assert without != given
    rows = [(make_prompt(tokenizer_rlhf, facts=()), [answer, answer[:3]])]
    batches = [reward.judge_batch(tiny_rlhf, tokenizer_rlhf, rows, (seed,)) for seed in (0, 1)]
    assert torch.equal(batches[0].tokens, batches[1].tokens)


def test_facts_are_shuffled_by_seed_alike_for_both_answers(tiny_rlhf, tokenizer_rlhf):
    facts = [f"fact {i}" for i in range(6)]
    assert reward.shuffled(facts, 1, "a") == reward.shuffled(facts, 1, "a")
    assert sorted(reward.shuffled(facts, 1, "a")) == facts
    assert len({tuple(reward.shuffled(facts, seed, "a")) for seed in range(20)}) > 10
    prompt = make_prompt(tokenizer_rlhf, facts=facts)
    batch = reward.judge_batch(tiny_rlhf, tokenizer_rlhf, [(prompt, [[5, 6], [7, 8, 9]])], (3,))
    ends = [tokenizer_rlhf.decode(batch.tokens[0][batch.branch[0] == k].tolist()) for k in (1, 2)]
    assert ends[0].partition("Facts")[2] == ends[1].partition("Facts")[2] != ""


def test_verdict_head_is_log_odds_of_yes(tiny_rlhf, tokenizer_rlhf):
    judge = reward.Judge(tiny_rlhf)
    judge.start_from_verdict(tokenizer_rlhf)
    pair = make_pair(tokenizer_rlhf)
    batch = reward.pair_batch(tiny_rlhf, tokenizer_rlhf, [pair], (0,))
    hidden = tiny_rlhf(batch.images, batch.tokens, batch.position, batch.branch).flatten(0, 1)
    logits = tiny_rlhf.head(hidden[batch.source])
    yes, no = (tokenizer_rlhf.encode(word)[0] for word in ("Yes.", "No."))
    torch.testing.assert_close(judge(batch), logits[:, yes] - logits[:, no], atol=1e-5, rtol=1e-4)


def test_a_reward_model_learns_a_simple_preference(tiny_rlhf, tokenizer_rlhf):
    pairs = [make_pair(tokenizer_rlhf, i) for i in range(8)]
    config = reward.RMConfig(batch_size=8, micro_batch=4, head="zero", epochs=20)
    judge = reward.Judge(copy.deepcopy(tiny_rlhf))
    algorithm = reward.RewardModel(judge, tokenizer_rlhf, config, 0, pairs, pairs, {})
    assert algorithm.measure()[0]["agreement"]["value"] == 0.5  # all rewards are 0: ties count half
    optimizer = torch.optim.Adam(algorithm.modules.parameters(), 3e-3)
    for step in range(8):
        for batch in algorithm.batches(step):
            loss, metrics = algorithm.loss(batch)
            optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert metrics["rewards/accuracies"] == 1.0
    measured, records = algorithm.measure()
    assert measured["agreement"]["value"] == 1.0 and len(records) == 8


# ================================================================================== reward: rules


@pytest.mark.parametrize("text, truth, expected", [
    ("A. a car", "A", 1.0), ("The correct option is B.", "B", 1.0), ("B. a dog", "A", 0.0),
    ("An apple", "A", 0.0), ("No, there is not.", "no", 0.5), ("Yes.", "no", -0.5),
    ("Perhaps.", "no", 0.0), ("Yes.", "yes", 0.0), ("No.", "yes", 0.0), ("No.", None, 0.0),
    (" No.", "no", 0.5), ("", "no", 0.0),
])
def test_symbolic_reward(text, truth, expected):
    assert reward.symbolic_reward(text, truth) == expected


def test_length_and_end_penalties():
    assert reward.length_penalty(896, 896) == -10
    assert reward.length_penalty(448, 896, factor=0.5) == -2.5
    assert reward.length_penalty(100, 100, weight=0.0) == 0
    assert reward.missing_end_penalty(True) == 0 and reward.missing_end_penalty(False) == -8


def make_scorer(tiny_rlhf, tokenizer_rlhf, **changes):
    judge = reward.Judge(tiny_rlhf)
    judge.start_from_verdict(tokenizer_rlhf)
    return reward.Scorer(judge, tokenizer_rlhf, ppo.PPOConfig(micro_batch=2, **changes))


def test_scorer_adds_the_rules(tiny_rlhf, tokenizer_rlhf):
    rows = [(make_prompt(tokenizer_rlhf, 0, truth="no"), [tokenizer_rlhf.encode("No.", eos=True), [9, 9]])]
    parts = make_scorer(tiny_rlhf, tokenizer_rlhf)(rows, (0, 0))
    assert parts["symbolic"].tolist() == [1.0, 0.0]  # 2.0 x 0.5
    assert parts["no_end"].tolist() == [0.0, -8.0]
    lengths = torch.tensor([len(answer) for answer in rows[0][1]])
    torch.testing.assert_close(parts["length"], -10 * lengths / 896)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rewards_that_are_no_numbers_are_an_error_that_names_prompts(tiny_rlhf, tokenizer_rlhf, value):
    scorer = make_scorer(tiny_rlhf, tokenizer_rlhf)
    with torch.no_grad():
        scorer.judge.bias.fill_(value)
    with pytest.raises(ValueError, match="NaN or infinity for 2 of 2 answers .to row 0."):
        scorer([(make_prompt(tokenizer_rlhf), [[5], [6]])], (0,))


# ============================================================================ reward: on the disk


def test_head_is_saved_and_refused_elsewhere(tiny_rlhf, tokenizer_rlhf, tmp_path):
    judge, again = reward.Judge(tiny_rlhf), reward.Judge(tiny_rlhf)
    judge.start_from_verdict(tokenizer_rlhf)
    origin = reward.lineage(tokenizer_rlhf, "abc", facts=True)
    reward.save_head(judge, tmp_path, origin)
    reward.load_head(again, tmp_path, origin)
    assert torch.equal(judge.weight, again.weight)
    with pytest.raises(ValueError, match="another base"):
        reward.load_head(again, tmp_path, {**origin, "base": "xyz"})
    with pytest.raises(ValueError, match="another tokenizer"):
        reward.load_head(again, tmp_path, {**origin, "tokenizer": "xyz"})
    with pytest.raises(ValueError, match="with facts, not without facts"):
        reward.load_head(again, tmp_path, reward.lineage(tokenizer_rlhf, "abc", facts=False))
    with pytest.raises(FileNotFoundError, match="--algo rm"):
        reward.load_head(again, tmp_path / "none", origin)


# ================================================================================== ppo: functions


def padded(*lengths):
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.bool)
    for row, length in zip(mask, lengths):
        row[:length] = True
    return mask


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.7), (0.99, 0.0), (0.5, 1.0)])
def test_gae_is_its_definition(gamma, lam):
    mask = padded(5, 3, 1, 7)
    rewards, values = torch.randn(2, *mask.shape, dtype=torch.float64)
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for i, length in enumerate(mask.sum(1).tolist()):
        value = values[i, :length].tolist() + [0.0]
        delta = [rewards[i, t].item() + gamma * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, length))
            assert advantages[i, t].item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(returns[mask], (advantages + values)[mask])
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_gae_with_lambda_1_is_return_minus_value():
    mask = padded(6)
    rewards, values = torch.randn(2, 1, 6, dtype=torch.float64)
    advantages, returns = ppo.gae(rewards, values, mask, 1.0, 1.0)
    togo = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, togo)
    torch.testing.assert_close(advantages, togo - values)


def test_padding_contributes_nothing():
    mask = padded(4, 2, 3)
    rewards, values, other = torch.randn(3, *mask.shape)
    other[0, 0] = math.nan
    dirty = lambda x: torch.where(mask, x, torch.full_like(x, math.nan))
    clean = ppo.gae(rewards, values, mask, 0.9, 0.8)
    for a, b in zip(clean, ppo.gae(dirty(rewards), dirty(values), mask, 0.9, 0.8)):
        assert torch.equal(a, b)
    assert torch.equal(ppo.whiten(rewards, mask), ppo.whiten(dirty(rewards), mask))
    scores = torch.randn(3)
    shaped = [ppo.shaped_rewards(scores, kl, mask, 0.1) for kl in (rewards, dirty(rewards))]
    assert torch.equal(*shaped)


def test_whitening_is_over_all_tokens():
    mask = padded(4, 2, 3)
    white = ppo.whiten(torch.randn(mask.shape) * 3 + 5, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert white[mask].square().mean().item() == pytest.approx(1, abs=1e-5)
    assert not white[~mask].any()
    assert ppo.whiten(torch.ones(1, 1), padded(1)).item() == 0


def test_score_comes_at_the_last_token():
    mask, kl = padded(3, 1), torch.ones(2, 3)
    rewards = ppo.shaped_rewards(torch.tensor([2.0, -1.0]), kl, mask, 0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, -0.1, 1.9], [-1.1, 0.0, 0.0]]))


def test_kl_estimators_against_exact_kl():
    g = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 6, generator=g, dtype=torch.float64).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    mean = {name: (policy.exp() * ppo.kl_estimate(policy, reference, name)).sum()
            for name in ("k1", "k1_clamped", "k3")}  # expectation over every token
    torch.testing.assert_close(mean["k1"], exact)
    torch.testing.assert_close(mean["k3"], exact)
    assert mean["k1_clamped"] > exact  # biased upwards, as the file says
    assert (ppo.kl_estimate(policy, reference, "k3") >= 0).all()
    assert (ppo.kl_estimate(policy, reference, "k1_clamped") >= 0).all()


def test_policy_loss_and_gradient_by_hand():
    old = torch.zeros(4, dtype=torch.float64)
    logp = torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([2.0, 2.0, -3.0, -3.0], dtype=torch.float64)
    losses, clipped, kl = ppo.policy_loss(logp, old, advantages, 0.2)
    expected = [-2 * 1.2, -2 * math.exp(-0.5), 3 * math.exp(0.5), 3 * 0.8]
    assert losses.tolist() == pytest.approx(expected, abs=1e-12)
    assert clipped.tolist() == [True, False, False, True]
    assert kl.tolist() == pytest.approx([0.125] * 4)
    losses.sum().backward()
    slopes = [0, -2 * math.exp(-0.5), 3 * math.exp(0.5), 0]  # none where the clip decides
    assert logp.grad.tolist() == pytest.approx(slopes, abs=1e-12)


def test_first_inner_step_is_the_policy_gradient():
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    action, advantages = torch.randint(7, (5,)), torch.randn(5, dtype=torch.float64)
    logp = logits.log_softmax(-1)[torch.arange(5), action]
    losses, clipped, _ = ppo.policy_loss(logp, logp.detach(), advantages, 0.2)
    (found,) = torch.autograd.grad(losses.mean(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(-(advantages * logp).mean(), logits)
    torch.testing.assert_close(found, expected)
    assert not clipped.any()


def test_value_loss_and_gradient_by_hand():
    values = torch.tensor([0.1, 1.0, -1.0], dtype=torch.float64, requires_grad=True)
    old, returns = torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, 1.0, 1.0]).double()
    losses, clipped = ppo.value_loss(values, old, returns, 0.2)
    # the second would be right, but gained by leaving: held at 0.2
    assert losses.tolist() == pytest.approx([0.405, 0.32, 2.0])
    assert clipped.tolist() == [False, True, False]
    losses.sum().backward()
    assert values.grad.tolist() == pytest.approx([-0.9, 0.0, -2.0])


def test_explained_variance_and_adaptive_kl():
    returns = torch.randn(50)
    assert ppo.explained_variance(returns, returns) == pytest.approx(1)
    assert ppo.explained_variance(torch.zeros(50), returns) == pytest.approx(0, abs=1e-6)
    assert ppo.explained_variance(torch.randn(5), torch.ones(5)) == 0
    assert ppo.adapted(0.1, 60.0, 6.0, 256, 10000) == pytest.approx(0.1 * (1 + 0.2 * 0.0256))
    assert ppo.adapted(0.1, 5.4, 6.0, 100, 1000) == pytest.approx(0.1 * (1 - 0.1 * 0.1))
    assert ppo.adapted(0.1, 6.0, 6.0, 100, 1000) == pytest.approx(0.1)


# ================================================================================ ppo: adapters


def test_four_adapters_are_four_models(tiny_rlhf, tokenizer_rlhf):
    """Over one base, each adapter computes what a separate model with its weights computes."""
    shared = copy.deepcopy(tiny_rlhf)
    names = ("policy", "critic", "reward", "reference")
    for seed, name in enumerate(names):
        add_adapter(shared, name, 4, 16.0, seed=seed)
        for module in carriers(shared, name):
            nn.init.normal_(module.adapters[name].B, 0, 0.2,
                            generator=torch.Generator().manual_seed(seed))
    batch = rollouts.answer_batch(shared, [(make_prompt(tokenizer_rlhf), [[5, 6, 7], [8, 9]])])
    found = {name: rollouts.Role(shared, name).logp(batch, 1.0) for name in names}
    for name in names:
        alone = copy.deepcopy(shared)
        for module in carriers(alone, name):
            for other in set(names) - {name}:
                del module.adapters[other]
            module.active = name
        hidden = alone(batch.images, batch.tokens, batch.position, batch.branch)
        expected = alone.head(hidden.flatten(0, 1)[batch.source], batch.target)
        assert torch.equal(found[name], expected)
        judge = reward.Judge(shared, name)
        judge.start_from_verdict(tokenizer_rlhf)
        with use_adapter(shared, "policy"):  # whatever is in use around it
            states = hidden.flatten(0, 1)[batch.source]
            assert torch.equal(judge(batch), (states * judge.weight).sum(-1) + judge.bias)
    assert len({tuple(values.tolist()) for values in found.values()}) == 4


def test_temperature_divides_the_logits(tiny_rlhf, tokenizer_rlhf):
    batch = rollouts.answer_batch(tiny_rlhf, [(make_prompt(tokenizer_rlhf), [[5, 6, 7]])])
    hidden = tiny_rlhf(batch.images, batch.tokens, batch.position, batch.branch).flatten(0, 1)
    logits = tiny_rlhf.head(hidden[batch.source]) / 0.7
    expected = logits.log_softmax(-1)[torch.arange(3), batch.target]
    torch.testing.assert_close(rollouts.Role(tiny_rlhf).logp(batch, 0.7), expected, atol=1e-5, rtol=1e-5)


# ================================================================================= ppo: training


def make_ppo(model, tokenizer_rlhf, prompt_count=8, reward_function=None, **changes):
    settings = {"rollout_size": 4, "batch_size": 2, "samples": 2, "micro_batch": 2,
                "max_new_tokens": 4, "epochs": 4, "learning_rate": 1e-3, **changes}
    config = ppo.PPOConfig(**settings)
    model, reference = copy.deepcopy(model), copy.deepcopy(model)
    critic = reward.Judge(copy.deepcopy(model))
    count = lambda rows: torch.tensor([float(len(a)) for _, answers in rows for a in answers])
    reward_function = reward_function or (lambda rows, seeds: {"rm": count(rows)})
    rows = []
    prompts = [make_prompt(tokenizer_rlhf, i) for i in range(prompt_count)]
    algorithm = ppo.PPO(
        rollouts.Role(model), rollouts.Role(reference), critic, reward_function, tokenizer_rlhf, config,
        0, prompts, lambda prompt, text: ["x"] if "car" in text else [], rows.extend)
    return algorithm, rows


def optimise(algorithm, steps, first=0, optimizer=None):
    rate = algorithm.config.learning_rate
    optimizer = optimizer or torch.optim.Adam(algorithm.modules.parameters(), rate)
    history = []
    for step in range(first, first + steps):
        batches = algorithm.batches(step)
        total = sum(map(algorithm.size, batches))
        optimizer.zero_grad()
        for batch in batches:
            loss, metrics = algorithm.loss(batch)
            (loss * algorithm.size(batch) / total).backward()
        optimizer.step()
        history.append(metrics)
    return history, optimizer


def test_first_step_has_ratio_1_and_no_kl(tiny_rlhf, tokenizer_rlhf):
    algorithm, rows = make_ppo(tiny_rlhf, tokenizer_rlhf)
    batches = algorithm.batches(0)
    for batch in batches:
        logp = algorithm.policy.logp(batch, 1.0)
        torch.testing.assert_close(logp, batch.old_logp, atol=1e-5, rtol=0)
        _, metrics = algorithm.loss(batch)
        assert metrics["policy/clipfrac"] == 0 and metrics["policy/approxkl"] < 1e-9
    assert metrics["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert metrics["objective/rlhf_reward"] == pytest.approx(metrics["objective/scores"], abs=1e-4)
    assert len(rows) == 8 and {"answer", "score", "kl", "false"} <= rows[0].keys()
    assert metrics["tokens_per_second/rollout"] > 0


def test_every_answer_of_a_rollout_is_seen_once_per_inner_epoch(tiny_rlhf, tokenizer_rlhf):
    algorithm, _ = make_ppo(tiny_rlhf, tokenizer_rlhf, inner_epochs=2)
    for first in (0, 2):
        seen = torch.cat([batch.old_logp for step in (first, first + 1)
                          for batch in algorithm.batches(step)])
        kept = algorithm.rollout.logp[algorithm.rollout.mask]
        assert torch.equal(seen.sort().values, kept.sort().values)


def test_batch_carries_each_answers_own_numbers(tiny_rlhf, tokenizer_rlhf):
    algorithm, _ = make_ppo(tiny_rlhf, tokenizer_rlhf)
    algorithm.batches(0)
    rollout = algorithm.rollout
    batch = algorithm.minibatch([3, 1])
    expected = [t for row in (3, 1) for answer in rollout.tokens[row] for t in answer]
    assert batch.target.tolist() == expected
    order = torch.tensor([6, 7, 2, 3])
    assert torch.equal(batch.advantages, rollout.advantages[order][rollout.mask[order]])


def test_ppo_finds_the_optimum_of_a_bandit(tiny_rlhf, tokenizer_rlhf):
    """One prompt, answers of one token, a reward for one of four tokens: it must take over."""
    favourite = 7
    good = lambda rows, seeds: {"rm": torch.tensor(
        [float(a[0] == favourite) for _, answers in rows for a in answers])}
    model = copy.deepcopy(tiny_rlhf)
    with torch.no_grad():  # only tokens 5 to 8 are likely at first
        states = model(make_prompt(tokenizer_rlhf).image[None],
                       torch.tensor([make_prompt(tokenizer_rlhf).tokens]))[0, -1]
        model.head.weight[5:9] += 6 * states / states.square().sum()
    algorithm, _ = make_ppo(model, tokenizer_rlhf, 1, good, rollout_size=1, batch_size=1, samples=32,
                            max_new_tokens=1, kl=0.0, learning_rate=5e-3, epochs=40)
    history, _ = optimise(algorithm, 30)
    assert history[0]["objective/scores"] < 0.6
    assert history[-1]["objective/scores"] > 0.95


def test_kl_penalty_pulls_the_policy_back(tiny_rlhf, tokenizer_rlhf):
    nothing = lambda rows, seeds: {"rm": torch.zeros(sum(len(answers) for _, answers in rows))}
    algorithm, _ = make_ppo(tiny_rlhf, tokenizer_rlhf, 1, nothing, rollout_size=1, batch_size=1, samples=32,
                            max_new_tokens=1, kl=1.0, kl_estimator="k1", epochs=40)
    with torch.no_grad():
        algorithm.policy.model.decoder.norm.weight.mul_(2.0)
    history, _ = optimise(algorithm, 40)
    assert history[0]["objective/kl"] > 0.5
    assert history[-1]["objective/kl"] < 0.6 * history[0]["objective/kl"]


def test_resuming_within_a_rollout_is_bit_exact(tiny_rlhf, tokenizer_rlhf):
    whole, _ = make_ppo(tiny_rlhf, tokenizer_rlhf, target_kl=1.0)
    expected, _ = optimise(whole, 8)
    first, _ = make_ppo(tiny_rlhf, tokenizer_rlhf, target_kl=1.0)
    _, optimizer = optimise(first, 6)  # 4 steps per rollout: 6 is in the middle of the second
    state = copy.deepcopy(first.state())
    second, _ = make_ppo(tiny_rlhf, tokenizer_rlhf, target_kl=1.0)
    second.modules.load_state_dict(first.modules.state_dict())
    again = torch.optim.Adam(second.modules.parameters(), second.config.learning_rate)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    second.load_state(state)
    optimise(second, 2, first=6, optimizer=again)
    for a, b in zip(whole.modules.parameters(), second.modules.parameters()):
        assert torch.equal(a, b)
    assert second.coefficient == whole.coefficient != whole.config.kl


def test_cut_answers_are_reported_once(tiny_rlhf, tokenizer_rlhf, capsys):
    algorithm, _ = make_ppo(tiny_rlhf, tokenizer_rlhf, max_new_tokens=1)
    optimise(algorithm, 5)
    said = capsys.readouterr().err
    assert said.count("were cut off at --max_new_tokens 1") == 1 and "%" in said


def test_rollouts_must_divide_into_minibatches(tiny_rlhf, tokenizer_rlhf):
    with pytest.raises(ValueError, match="no multiple of --batch_size 3"):
        make_ppo(tiny_rlhf, tokenizer_rlhf, batch_size=3)


# ============================================================================== data and its errors


@pytest.fixture
def folder(tmp_path):
    scene = world.make_scene("p")
    world.draw(scene, 72).save(tmp_path / "a.png")
    (tmp_path / "captions.json").write_text(json.dumps({"a.png": ["a car", "a dog"]}))
    return tmp_path


def write_rows(folder, **changes):
    row = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                               {"from": "gpt", "value": "A car."}],
           "output_1": {"value": "A dog."}, "output_2": {"value": "A cat."}, "preference": 2}
    (folder / "rows.json").write_text(json.dumps([row | changes]))
    return [folder / "rows.json"]


def make_reader(folder, tokenizer_rlhf, facts=True):
    looked = []
    look = lambda named: looked.extend(named) or torch.zeros(len(named), 9, 16)
    reader = Reader(look, tokenizer_rlhf, 9, folder / "captions.json" if facts else None)
    return reader, looked


def test_ranked_pairs_are_read_with_their_facts(folder, tokenizer_rlhf):
    reader, looked = make_reader(folder, tokenizer_rlhf)
    (pair,) = reader.rankings(write_rows(folder), folder)
    assert tokenizer_rlhf.decode(pair.chosen).strip() == "A cat." and pair.chosen[-1] == 2
    assert pair.prompt.facts == ["a car", "a dog"]
    assert make_reader(folder, tokenizer_rlhf, facts=False)[0].rankings(
        write_rows(folder), folder)[0].prompt.facts == []
    assert looked == [(pair.prompt.name, folder / "a.png")]


def test_prompt_is_the_templates(folder, tokenizer_rlhf):
    reader, _ = make_reader(folder, tokenizer_rlhf)
    (prompt,) = reader.prompts(write_rows(folder, caption_type=6, length_bonus=0.5), folder)
    assert (prompt.truth, prompt.length_factor, prompt.picture) == ("no", 0.5, "a.png")
    assert prompt.tokens == data.prompt_tokens(tokenizer_rlhf, data.prompt_text("What is it?"), 9)


def test_missing_captions_and_option_letters_are_named(folder, tokenizer_rlhf):
    reader, _ = make_reader(folder, tokenizer_rlhf)
    (folder / "captions.json").write_text(json.dumps({"b.png": ["a car"]}))
    with pytest.raises(DataError, match=r"rows.json row 1: no captions for .*a\.png"):
        make_reader(folder, tokenizer_rlhf)[0].rankings(write_rows(folder), folder)
    with pytest.raises(DataError, match="row 1: the right option is C, but the question lists no"):
        reader.prompts(write_rows(folder, caption_type=4), folder)


def test_rankings_are_public_rows_and_prefer_the_truth(tiny_rlhf, tokenizer_rlhf, tmp_path, monkeypatch):
    """The model's answers are given, so that both truth and preference are known."""
    def said(model, tokenizer_rlhf, settings, images, questions, samples, **_):
        asked.append(len(questions))
        texts = []
        for i in range(len(questions)):
            scene = world.make_scene(f"rankings 0 {i}", "test")
            texts += [world.describe(scene), world.describe(scene) + " There is a purple bus."]
        return [" ", *texts[1:]]  # an empty answer is nothing to compare

    asked = []
    monkeypatch.setattr(collect, "answers", said)
    path = collect.rankings(tiny_rlhf, tokenizer_rlhf, sft.WORLD_IMAGES, tmp_path, 20, 0, 0.0, "test")
    rows = json.loads(path.read_text())
    captions = json.loads((tmp_path / "image_to_caption.json").read_text())
    assert len(rows) == 20 and asked == [collect.CHUNK] and rows[0]["image"] == "000001.png"
    assert all(row["preference"] == 1 and row["hallucination"] for row in rows)
    assert all(row["image"] in captions and (tmp_path / "images" / row["image"]).exists()
               for row in rows)
    reader = Reader(lambda named: torch.zeros(len(named), 9, 16), tokenizer_rlhf, 9, tmp_path / "image_to_caption.json")
    pairs = reader.rankings([path], tmp_path / "images")
    assert len(pairs) == 20 and all(pair.prompt.facts for pair in pairs)


def test_world_prompts_know_their_truth(tokenizer_rlhf, tmp_path):
    path = collect.prompts(sft.WORLD_IMAGES, tmp_path, 12, 0)
    reader = Reader(lambda named: torch.zeros(len(named), 9, 16), tokenizer_rlhf, 9, tmp_path / "image_to_caption.json")
    prompts = reader.prompts([path], tmp_path / "images")
    assert [bool(prompt.truth) for prompt in prompts] == [i % 4 == 3 for i in range(12)]
    seeds = json.loads((tmp_path / "image_to_scene.json").read_text())
    for prompt in prompts:
        scene = world.make_scene(seeds[prompt.picture])
        assert sorted(prompt.facts) == sorted(world.facts(scene, random.Random(0)))


# ==================================================================== whole runs, through the files


@pytest.fixture(scope="module")
def material(tiny_rlhf, tokenizer_rlhf, tmp_path_factory):
    """A model's folder, ranked pairs, prompts, captions and images, as a user has them."""
    folder = tmp_path_factory.mktemp("material")
    half = (0.5, 0.5, 0.5)
    save_llava(tiny_rlhf, tokenizer_rlhf, ImageSettings(12, half, half, "pad"), folder / "base")
    (folder / "images").mkdir()
    rows, captions = [], {}
    for i in range(12):
        scene = world.make_scene(i)
        world.draw(scene, 24).save(folder / "images" / f"{i}.png")
        captions[f"{i}.png"] = world.facts(scene, random.Random(i))
        asked = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": "x"}]
        rows.append({"image": f"{i}.png", "conversations": asked, "preference": 1 + i % 2,
                     "output_1": {"value": "A car."}, "output_2": {"value": "There is a dog."}})
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


def run_on(material, algo, out, *more):
    return train.main([
        "--algo", algo, "--model", str(material / "base"), "--data", str(material / "rows.json"),
        "--images", str(material / "images"), "--captions", str(material / "captions.json"),
        "--facts", "--out", str(out), "--log_every", "1", "--batch_size", "4", *more])


PPO = ("--rollout_size", "4", "--samples", "2", "--max_new_tokens", "6", "--steps", "5")


@pytest.mark.parametrize("lora", [(), ("--lora", "2")])
def test_reward_model_and_ppo_from_files_to_files(material, tmp_path, monkeypatch, capsys, lora):
    assert run_on(material, "rm", tmp_path / "rm", "--steps", "2", *lora) == 0
    results = json.loads((tmp_path / "rm" / "results.json").read_text())
    assert 0 <= results["after"]["metrics"]["agreement"]["value"] <= 1
    more = (*PPO, *lora, "--reward_model", str(tmp_path / "rm"))
    assert run_on(material, "ppo", tmp_path / "whole", *more) == 0

    one_step = train.Loop.one_step

    def stopped(loop):
        loop.stop = loop.step == 2  # of two steps per rollout: in the middle of the second
        return one_step(loop)

    monkeypatch.setattr(train.Loop, "one_step", stopped)
    assert run_on(material, "ppo", tmp_path / "cut", *more) == 130
    monkeypatch.setattr(train.Loop, "one_step", one_step)
    assert run_on(material, "ppo", tmp_path / "cut", *more, "--resume") == 0
    for name in ("model/model.safetensors", "samples.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]
    wanted = {"objective/kl", "objective/scores", "objective/rlhf_reward", "objective/entropy",
              "policy/approxkl", "policy/clipfrac", "val/clipfrac", "val/explained_variance",
              "response/length", "response/ended", "tokens_per_second/rollout",
              "tokens_per_second/optimisation"}
    assert wanted <= json.loads(lines[-1]).keys()


def test_runs_say_what_is_missing(material, tmp_path, capsys):
    assert run_on(material, "ppo", tmp_path / "a", *PPO) == 1
    assert "PPO needs a reward model" in capsys.readouterr().err
    assert run_on(material, "ppo", tmp_path / "b", *PPO, "--reward_model", str(material)) == 1
    assert "no reward model in it" in capsys.readouterr().err
    assert run_on(material, "rm", tmp_path / "rm", "--steps", "1", "--no-facts") == 0
    capsys.readouterr()
    more = (*PPO, "--reward_model", str(tmp_path / "rm"))
    assert run_on(material, "ppo", tmp_path / "c", *more) == 1
    assert "without facts, not with facts" in capsys.readouterr().err
    assert run_on(material, "ppo", tmp_path / "d", *more, "--no-facts", "--lora", "2") == 1
    assert "without adapter" in capsys.readouterr().err


# ==================================================================================== evaluate.py

SETTINGS = ImageSettings(16, (0.5,) * 3, (0.25,) * 3, "pad")


def rate(hits, of):
    """A measure with one term."""
    return [(1, np.array(hits, dtype=float), np.array(of, dtype=float))]


def only_values(found):
    return {name: metric["value"] for name, metric in found.items()}


@pytest.fixture(scope="module")
def tokenizer_evaluate(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    said = [world.describe(world.make_scene(i)) for i in range(200)]
    asked = [q.text for i in range(200)
             for q in world.questions(world.make_scene(i), random.Random(i), 5)]
    data.train_tokenizer(iter(said + asked + [data.SYSTEM + " USER: ASSISTANT:"]), path, 400)
    return data.Tokenizer(path)


def tiny_model(tokenizer_evaluate, seed=0):
    config = LLaVAConfig(
        vision=VisionConfig(16, 32, 1, 2, image_size=16, patch_size=8),
        text=TextConfig(tokenizer_evaluate.vocab_size, 16, 32, 1, 2, 2, 512),
        image_token=tokenizer_evaluate.image_token, pad_token=tokenizer_evaluate.pad_token,
        eos_token=tokenizer_evaluate.eos_token, vision_feature_layer=-1,
    )
    model = LLaVA(config)
    init_weights(model, seed)
    return model


@pytest.fixture(scope="module")
def run_folder(tokenizer_evaluate, tmp_path_factory):
    """Two finished runs, of models that never learnt anything."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("sft", 0), ("ddpo", 1)):
        (folder / name).mkdir()
        config = {"settings": {"algo": name, "seed": 0, "beta": 0.5}, "versions": {"torch": "2"}}
        (folder / name / "config.json").write_text(json.dumps(config))
        lines = [{"step": s, "loss": 1 / s, "rewards/accuracies": s / 10} for s in range(1, 10)]
        (folder / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        checkpoint.save_llava(tiny_model(tokenizer_evaluate, seed), tokenizer_evaluate, SETTINGS,
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

def test_answers_keep_the_order_of_the_questions(tokenizer_evaluate):
    model = tiny_model(tokenizer_evaluate)
    scenes = [world.make_scene(i) for i in range(5)]
    images = [world.draw(scene, 16) for scene in scenes]
    questions = ["Is there a car?", "What can you see in the picture?", "Describe the picture.",
                 "Where is the dog?", "In this picture, is the cup above the pot?"]
    apart = [ask.answers(model, tokenizer_evaluate, SETTINGS, [image], [question], 8)[0]
             for image, question in zip(images, questions)]
    together = ask.answers(model, tokenizer_evaluate, SETTINGS, images, questions, 8, batch_size=2)
    features = ask.image_features(model, SETTINGS, images, batch_size=3)
    assert together == apart and len(set(apart)) > 1
    assert ask.answers(model, tokenizer_evaluate, SETTINGS, features, questions, 8) == apart
    with pytest.raises(ValueError, match="5 images for 1 questions"):
        ask.answers(model, tokenizer_evaluate, SETTINGS, images, ["Why?"])


def test_answers_are_sampled_reproducibly(tokenizer_evaluate):
    model, images = tiny_model(tokenizer_evaluate), [world.draw(world.make_scene(0), 16)] * 2
    questions = ["What?", "Where is it?"]
    draw = lambda seed: ask.answers(model, tokenizer_evaluate, SETTINGS, images, questions, 8,
                                    temperature=1.0, samples=3, seed=seed)
    assert len(draw(0)) == 6 and len(set(draw(0))) > 3
    assert draw(0) == draw(0) != draw(1)


def test_stream_writes_the_whole_answer(tokenizer_evaluate):
    model, image = tiny_model(tokenizer_evaluate), world.draw(world.make_scene(3), 16)
    written = []
    question = "Is there a car?"
    text = ask.stream(model, tokenizer_evaluate, SETTINGS, image, question, 12, write=written.append)
    assert text == "".join(written).strip() and len(written) > 3
    assert text == ask.answers(model, tokenizer_evaluate, SETTINGS, [image], [question], 12)[0]


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
    (["--model", "no/such/run", "--image", "none.png", "--prompt", "?"], "--image none.png: no such file"),
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
def reported(run_folder, tokenizer_evaluate, tmp_path_factory):
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
    examples = [data.pair_example(pair, None, tokenizer_evaluate, 0, gamma=5.0) for pair in pairs]
    report.save_pairs(folder, pairs, examples, tokenizer_evaluate)
    row = {"step": 1, "question": "What?", "answer": "A <dog>.", "score": -0.25, "rm": 0.5, "kl": 1.0,
           "tokens": 4, "false": ["A <dog>"]}
    rows = [row, row | {"step": 5}, row | {"step": 9, "answer": "Nothing.", "false": None}]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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


def test_report_shows_the_first_and_the_last_sampled_answers(reported):
    text = reported[1].text
    assert "Step 1questionWhat?answerA <dog>.score-0.25, of it 0.50 from the reward model" in text
    assert "4 tokensfalse in itA <dog>" in text and "Step 5" not in text
    assert text.count("false in it") == 1 and "Step 9questionWhat?answerNothing." in text


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


# ========================================================================================= sft.py


def test_lessons_in_judging_are_true_where_they_say_yes(tiny_rlhf, tokenizer_rlhf):
    config = lessons.JudgeConfig(scenes=40, batch_size=20, steps=12, pictures=0.5, reading=0.0,
                                 comparing=0.25, marked=0.5, easy=0.0)
    small = ImageSettings(12, (0.5,) * 3, (0.25,) * 3, "pad")
    source = lessons.WorldVerdicts(tiny_rlhf, tokenizer_rlhf, small, config, 0)
    names = {f"scene {scene.seed}": scene for scene in source.scenes}
    decode, seen = tokenizer_rlhf.decode, {True: set(), False: set()}
    captions = lambda scene: world.facts(scene, random.Random(0))
    for step in range(12):
        for example in source.examples(step):
            scene = names[example.name]
            for response in example.responses:
                said, request = decode(response.tokens).split("USER:")
                learnt = [decode([token]) for token, weight in zip(response.tokens, response.weight)
                          if weight == 1.0]
                facts = re.search("Facts: (.*?)[.]", request)
                facts = re.sub("; (Yes|No) ", "; ", facts[1]).split("; ") if facts else []
                truth = set(captions(scene))
                if example.image is None:
                    said = decode(example.prompt).split("ASSISTANT:")[1]
                    told = [scene.find(kind) for kind in world.mentions(said)]
                    truth = set(captions(dataclasses.replace(scene, things=tuple(told))))
                    assert not world.hallucinations(scene, said) and len(told) >= 2
                    right = set(facts) == truth
                else:
                    assert set(facts) in (set(), truth)
                    right = not world.hallucinations(scene, said)
                compares = "ASSISTANT:" not in request
                if compares:  # a fact is said if the answer names its thing, and truly
                    false = {kind for sentence in re.split("(?<=[.]) ", said)
                             for kind in world.mentions(sentence)
                             if world.hallucinations(scene, sentence)}
                    said_so = set(world.mentions(said)) - false
                    wanted = ["Yes" if fact in truth and (fact.startswith("a picture of") or any(
                        world.NOUNS.get(word) in said_so for word in fact.split())) else "No"
                        for fact in facts]
                    told = [decode([token]) for token, weight in zip(response.tokens, response.weight)
                            if 0 < weight < 1]
                    assert sum(word in (";", ".") for word in told) == wanted.count("Yes")
                else:
                    wanted = ["Yes" if right else "No"]
                    assert set(response.weight) == {0.0, 1.0}
                assert learnt == wanted and (step >= 3 or compares and example.image is None)
                seen[compares].add((example.image is None, wanted[0], bool(facts)))
    assert seen[True] == {(text, says, True) for text in (True, False) for says in ("Yes", "No")}
    assert seen[False] == {(True, "Yes", True), (True, "No", True), *(
        (False, says, facts) for says in ("Yes", "No") for facts in (True, False))}


def test_a_judge_is_taught_and_reward_models_start_from_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--steps", "4", "--scenes", "8", "--batch_size", "4", "--layers", "1"]
    assert train.main(["--algo", "judge", *given, "--reading", "0.25", "--comparing", "0.34"]) == 0
    base, taught = (checkpoint.load_llava(folder)[0] for folder in (ROOT / "base", "runs/judge/model"))
    layers = taught.decoder.layers
    assert len(layers) == len(base.decoder.layers) + 1
    assert layers[-1].mlp.down_proj.weight.abs().max() > 0  # they began as 0
    monkeypatch.setattr(rlhf, "JUDGE", tmp_path / "runs/judge/model")
    given = ["--rankings", "4", "--held_out", "2", "--batch_size", "2", "--learning_rate", "0"]
    assert train.main(["--algo", "rm", "--facts", *given]) == 0
    judge = checkpoint.load_llava("runs/rm/model")[0].state_dict()
    assert all(torch.equal(weight, judge[name]) for name, weight in taught.state_dict().items())


def test_layers_put_on_top_change_nothing_at_first(tiny):
    model, prompt = copy.deepcopy(tiny), torch.arange(3, 9)
    before, layers = model.logits(None, prompt[None]), len(model.decoder.layers)
    models.deepen(model, 2)
    assert len(model.decoder.layers) == model.config.text.num_hidden_layers == layers + 2
    assert torch.equal(model.logits(None, prompt[None]), before)
    assert len(generate(model, None, [prompt], 4)[0]) > 0
    model.logits(None, prompt[None]).square().mean().backward()
    assert model.decoder.layers[-1].mlp.down_proj.weight.grad.abs().max() > 0


def test_lessons_in_judging_begin_with_reading(tiny_rlhf, tokenizer_rlhf):
    config = lessons.JudgeConfig(scenes=40, batch_size=20, steps=12, reading=0.25)
    small = ImageSettings(12, (0.5,) * 3, (0.25,) * 3, "pad")
    source = lessons.WorldVerdicts(tiny_rlhf, tokenizer_rlhf, small, config, 0)
    decode = tokenizer_rlhf.decode
    sizes = set()
    for example in [e for step in range(3) for e in source.examples(step)]:
        said = decode(example.prompt).split("ASSISTANT:")[1]
        told = [re.search("Facts: (.*)[.] ASSISTANT:", decode(r.tokens))[1] for r in example.responses]
        assert len({frozenset(facts.split("; ")) for facts in told}) == 1 and len(told) == 3
        for kind in world.mentions(said):
            assert all(kind in facts for facts in told)
        assert all(set(response.weight) == {1.0} for response in example.responses)
        sizes.add(len(told[0].split("; ")) - 1)
    assert example.image is None and min(sizes) == 2 and len(sizes) > 2


def test_supervised_loss_by_hand():
    logp, weight = torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([1.0, 0.5, 0.0])
    assert sft.supervised_loss(logp, weight).item() == pytest.approx((1 + 1) / 1.5)
    assert sft.supervised_loss(logp, torch.ones(3)).item() == pytest.approx(7 / 3)


# ======================================================================================== data.py


def test_tokenizer_training_is_deterministic(tokenizer, tmp_path):
    data.train_tokenizer(sft.world_texts(40), tmp_path / "again.model", 700)
    assert (tmp_path / "again.model").read_bytes() == tokenizer.model_proto


@pytest.mark.parametrize("text", ["", "A red car.", "  two  spaces", "naïve 象 🙂\nnew line", "\n"])
def test_tokenizer_is_lossless(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_prompt_has_one_token_per_feature(tokenizer):
    ids = data.prompt_tokens(tokenizer, data.prompt_text("Is there a car?"), 36)
    assert ids.count(tokenizer.image_token) == 36 and ids[0] == tokenizer.bos_token
    start = ids.index(tokenizer.image_token)
    assert ids[start : start + 36] == [tokenizer.image_token] * 36


def test_a_response_never_has_every_label_masked(tokenizer):
    pair = data.Pair("row 1", b"", "Is it?", "Yes, it is.", "No, it is not.")
    example = data.pair_example(pair, torch.zeros(36, 8), tokenizer, 36, 5.0)
    batch = data.collate([example], tokenizer.pad_token, 512)
    for group, text in enumerate(("Yes, it is.", "No, it is not.")):
        learned = batch.target[batch.group == group].tolist()
        assert learned[-1] == tokenizer.eos_token and tokenizer.decode(learned) == text


MASKS = [  # chosen, rejected, min_match, replacements_only -> corrected tokens of either side
    ("abcdef", "abcdef", 3, False, "", ""),
    ("abcXdef", "abcYdef", 3, False, "X", "Y"),
    ("abcdefXYZ", "abcdef", 3, False, "XYZ", ""),  # inserted by the correction
    ("abcdef", "abcQRdef", 3, False, "", "QR"),  # deleted by it
    ("abcdef", "abcQRdef", 3, True, "", ""),  # the release forgets deletions
    ("abcdefXYZ", "abcdef", 3, True, "", ""),
    ("abcXdef", "abcYdef", 3, True, "X", "Y"),
    ("abcXdeYfgh", "abcPdeQfgh", 3, False, "XdeY", "PdeQ"),  # "de" is too short a match
    ("abcXdeYfgh", "abcPdeQfgh", 2, False, "XY", "PQ"),
    ("abc.", "abcQRS.", 3, False, ".", "QRS."),  # the end alone is no match either
    ("xyz", "abc", 3, False, "xyz", "abc"),
    ("abc", "abc" * 100, 3, False, "", "abc" * 99),  # long and repetitive: no difflib "junk"
]


@pytest.mark.parametrize("chosen,rejected,min_match,replacements,left,right", MASKS)
def test_segment_mask(chosen, rejected, min_match, replacements, left, right):
    masks = data.segment_mask(
        list(map(ord, chosen)), list(map(ord, rejected)), min_match, replacements)
    picked = ["".join(c for c, m in zip(t, mask) if m) for t, mask in zip((chosen, rejected), masks)]
    assert [len(mask) for mask in masks] == [len(chosen), len(rejected)]
    assert picked == [left, right]


def test_collate_by_hand():
    one = Example("a", None, [1, 5, 6], [Response([7, 8, 2], [1.0, 5.0, 1.0]),
                                         Response([7, 9, 9, 2], [1.0, 5.0, 5.0, 1.0])])
    two = Example("b", None, [1], [Response([4, 2], [0.0, 1.0])])
    batch = data.collate([one, two], 0, 16)
    # "7" begins both responses of the first row and moves into its trunk
    assert batch.tokens.tolist() == [[1, 5, 6, 7, 8, 2, 9, 9, 2], [1, 4, 2, 0, 0, 0, 0, 0, 0]]
    assert batch.branch.tolist() == [[0, 0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, -1, -1, -1, -1, -1, -1]]
    assert batch.position[0].tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6]
    # what predicts: the last prompt token, the trunk's last for either branch, then the branch
    assert batch.source.tolist() == [2, 3, 4, 2, 3, 6, 7, 9 + 1]
    assert batch.target.tolist() == [7, 8, 2, 7, 9, 9, 2, 2]
    assert batch.weight.tolist() == [1, 5, 1, 1, 5, 5, 1, 1]
    assert batch.group.tolist() == [0, 0, 0, 1, 1, 1, 1, 2] and batch.groups == 3
    assert batch.padding == pytest.approx(6 / 18)


def test_collate_never_cuts():
    example = Example("file row 7", None, [1] * 10, [Response([5] * 7, [1.0] * 7)])
    with pytest.raises(data.DataError, match="file row 7.*17 tokens.*context holds 16"):
        data.collate([example], 0, 16)
    silent = Example("file row 8", None, [1], [Response([5], [0.0])])
    with pytest.raises(data.DataError, match="file row 8.*no token to learn"):
        data.collate([silent], 0, 16)


def test_epochs_see_every_row_once_and_depend_on_the_step_alone():
    rows = [Example(str(i), None, [], []) for i in range(10)]
    config = ddpo.DDPOConfig(batch_size=4, epochs=2)
    source = data.Epochs(rows, config, 3)
    assert source.steps == 5
    seen = [e.name for step in range(5) for e in source.examples(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(str(i) for i in range(10))
    assert seen[:10] != seen[10:]
    again = data.Epochs(rows, config, 3)
    assert [e.name for e in again.examples(3)] == seen[12:16]


def test_marked_shows_segments(tokenizer):
    pair = data.Pair("r", b"", "What?", "The car on the left is red.", "The car on the left is blue.")
    example = data.pair_example(pair, torch.zeros(1), tokenizer, 36, 5.0)
    texts = [data.marked(response, tokenizer) for response in example.responses]
    assert texts[0].startswith("The car on the left is[") and "red" in texts[0].split("[")[1]
    assert texts[1].replace("[", "").replace("]", "") == "The car on the left is blue.</s>"


# ===================================================================================== readers.py

READERS_SETTINGS = ImageSettings(size=12, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
READERS_PATCHES = 9


@pytest.fixture(scope="module")
def tokenizer_readers(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    data.train_tokenizer(sft.world_texts(30), path, 600)
    return data.Tokenizer(path)


@pytest.fixture(scope="module")
def tiny_readers(tokenizer_readers):
    text = TextConfig(
        vocab_size=tokenizer_readers.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=400,
    )
    model = LLaVA(LLaVAConfig(
        vision=VisionConfig(16, 32, 2, 2, image_size=12, patch_size=4), text=text,
        image_token=tokenizer_readers.image_token, pad_token=tokenizer_readers.pad_token,
    ))
    init_weights(model, 0)
    return model


def picture(seed, kind="PNG", size=(20, 10)):
    """Bytes of a picture that is different for every seed."""
    buffer = io.BytesIO()
    colour = (seed * 67 % 256, seed * 31 % 256, 200 - seed)
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder_readers(tmp_path):
    for seed, name in enumerate(("ok.jpg", "b.jpg", "c.jpg")):
        (tmp_path / name).write_bytes(picture(seed, "JPEG"))
    return tmp_path


def write_lines(folder_readers, *lines):
    path = folder_readers / "rows.jsonl"
    lines = (r if isinstance(r, bytes) else json.dumps(r).encode() for r in lines)
    path.write_bytes(b"\n".join(lines))
    return path


def write_json(folder_readers, content, name="rows.json"):
    path = folder_readers / name
    path.write_text(json.dumps(content, indent=1))
    return path


def said(*values, first="human"):
    speakers = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": speakers[i % 2], "value": value} for i, value in enumerate(values)]


# ==================================================================================== rows, plain

GOOD = {"image": "ok.jpg", "question": "What?", "chosen": "A car.", "rejected": "A bus."}


def test_plain_rows_in_lines_and_in_an_array(folder_readers):
    prompt = {**GOOD, "prompt": "What?\n<image>"}
    del prompt["question"]
    from_lines = read_pairs([write_lines(folder_readers, GOOD, b"", prompt)])
    assert [p.question for p in from_lines] == ["What?", "What?"]
    assert from_lines[1].name.endswith("rows.jsonl row 3")  # as an editor counts lines
    assert open_image("x", from_lines[0].image).size == (20, 10)
    array = write_json(folder_readers, [GOOD, prompt], "array.txt")  # the content decides, not the name
    array.write_bytes(b"\xef\xbb\xbf" + array.read_bytes())  # as some editors save it
    for one, other in zip(from_lines, read_pairs([array])):
        assert (one.image, one.question, one.chosen) == (other.image, other.question, other.chosen)
    assert read_pairs([array])[1].name.endswith("array.txt row 2")


def test_images_are_looked_for_beside_the_file_or_where_told(folder_readers, tmp_path_factory):
    path = write_lines(folder_readers, GOOD)
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "rows.jsonl"
    elsewhere.write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="row 1: no image 'ok.jpg' in .*point --images"):
        read_pairs([elsewhere])
    assert read_pairs([elsewhere], folder_readers)[0].image == read_pairs([path])[0].image


@pytest.mark.parametrize("row,message", [
    (b'{"image": "ok.jpg", "que', "row 2: not valid JSON"),
    (b'{"image": "ok.jpg\xff"}', "row 2: not valid JSON"),
    (b"[" * 100_000, "row 2: not valid JSON"),
    ([1, 2], "row 2: expected an object, found a list"),
    (GOOD | {"chosen": ""}, "row 2: field 'chosen' is missing or empty"),
    (GOOD | {"chosen": 7}, "row 2: field 'chosen' is missing or empty"),
    (GOOD | {"rejected": " "}, "row 2: field 'rejected' is missing or empty"),
    ({k: GOOD[k] for k in ("image", "chosen", "rejected")}, "row 2: field 'question' is missing"),
    ({k: GOOD[k] for k in ("question", "chosen", "rejected")}, "row 2: field 'image' is missing"),
    ({"image": "ok.jpg", "label": 1}, "row 2: no preference among its fields (image, label)"),
    (GOOD | {"chosen": "A bus. "}, "row 2: chosen and rejected are the same"),
    (GOOD | {"question": "<image> or <image>?"}, "row 2: 2 <image> in the question, but one image"),
    (GOOD | {"question": "<image>\n"}, "row 2: there is nothing but <image> in the question"),
    (GOOD | {"rejected": "A <image>."}, "row 2: field 'rejected' contains <image>"),
    (GOOD | {"history": [["Where?"]]}, "row 2: history should be a list of [question, answer]"),
    (GOOD | {"image": "no.jpg"}, "row 2: no image 'no.jpg'"),
    (GOOD | {"image": ["ok.jpg", "b.jpg"]}, "row 2: image should be the name of one file"),
    (GOOD | {"image": "a\0b"}, "row 2: image 'a\\x00b' is no file name"),
    (GOOD | {"image": "a" * 5000}, "row 2: image"),
    (GOOD | {"image": "../rows.jsonl"}, "row 2: image '../rows.jsonl' lies outside"),
    (GOOD | {"image": "/etc/passwd"}, "row 2: image '/etc/passwd' lies outside"),
    ({"image": "ok.jpg", "conversations": said("<image>?", "Yes.")},
     "row 2: a conversation without two answers to compare"),
])
def test_bad_rows_are_named_or_skipped(folder_readers, row, message):
    path = write_lines(folder_readers, GOOD, row, GOOD)
    with pytest.raises(DataError, match=re.escape(message)):
        read_pairs([path])
    skipped = []
    assert len(read_pairs([path], None, skipped)) == 2
    assert len(skipped) == 1 and message in skipped[0] and str(path) in skipped[0]


def test_bad_files_are_named(folder_readers):
    half = write_json(folder_readers, [GOOD, GOOD])
    half.write_text(half.read_text()[:100])
    for paths, message in [
        ([half], "rows.json: not valid JSON .*is the file whole"),
        ([folder_readers / "none.jsonl"], "none.jsonl: no such file"),
        ([folder_readers / "*.nothing"], "nothing: no such file"),
        ([folder_readers], "a folder; name its files"),
        ([write_lines(folder_readers)], "no usable row in .*rows.jsonl"),
    ]:
        with pytest.raises(DataError, match=message):
            read_pairs(paths)
    with pytest.raises(DataError, match="no usable row in .*the first one: .*row 1: not valid"):
        read_pairs([write_lines(folder_readers, b"{")], None, [])


def test_patterns(folder_readers):
    for name in ("b.jsonl", "a.jsonl", "odd[1].jsonl"):
        (folder_readers / name).write_text(json.dumps(GOOD))
    found = rows.find_files([str(folder_readers / "odd[1].jsonl"), str(folder_readers / "[ab].jsonl")])
    assert [path.name for path in found] == ["odd[1].jsonl", "a.jsonl", "b.jsonl"]


# ================================================================================== rows, parquet


def write_parquet(path, rows, group=2):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def rlhf_v(seed, **changes):
    texts = {"question": f"What {seed}?", "chosen": "A tree.", "rejected": "A house."}
    return {"ds_name": "RLHF-V", "image": {"bytes": picture(seed), "path": f"{seed}.png"},
            "text": json.dumps(texts), "origin_dataset": "x", "origin_split": "{}", "idx": seed,
            "image_path": f"{seed}.png", **changes}


def rlaif_v(seed, **changes):
    return {"ds_name": "RLAIF-V", "image": {"bytes": picture(seed), "path": f"{seed}.png"},
            "question": f"What {seed}?", "chosen": "A tree.", "rejected": "A house.",
            "origin_dataset": "x", "origin_split": "{}", "idx": str(seed), "image_path": "",
            **changes}


@pytest.mark.parametrize("make", [rlhf_v, rlaif_v])
def test_both_parquet_schemas(tmp_path, make):
    write_parquet(tmp_path / "a.parquet", [make(i) for i in range(5)])
    pairs = read_pairs([str(tmp_path / "*.parquet")])
    assert [p.name[-5:] for p in pairs] == ["row 1", "row 2", "row 3", "row 4", "row 5"]
    assert [p.question for p in pairs] == [f"What {i}?" for i in range(5)]
    assert {(p.chosen, p.rejected) for p in pairs} == {("A tree.", "A house.")}
    assert pairs[3].image == ParquetImage(tmp_path / "a.parquet", 1, 1, "3.png")
    assert [p.image.read() for p in pairs] == [picture(i) for i in range(5)]


def test_parquet_images_stay_on_disk_until_asked_for(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", [rlhf_v(i) for i in range(6)])
    parquet = pytest.importorskip("pyarrow.parquet")
    read, asked = parquet.ParquetFile.read_row_group, []

    def spy(self, group, columns):
        asked.append((group, "image.bytes" in columns or "image" in columns))
        return read(self, group, columns)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", spy)
    pairs = read_pairs([path])
    assert asked == [(0, False), (1, False), (2, False)]  # texts only, group by group
    asked.clear()
    for pair in pairs:
        open_image(pair.name, pair.image)
    assert asked == [(0, True), (1, True), (2, True)]  # each group of images once, in order


def test_images_may_be_plain_bytes_or_names(folder_readers):
    pair = {"question": "What?", "chosen": "A tree.", "rejected": "A house."}
    path = write_parquet(folder_readers / "bytes.parquet", [{"image": picture(3), **pair}])
    assert read_pairs([path])[0].image.read() == picture(3)
    path = write_parquet(folder_readers / "names.parquet", [{"image": "ok.jpg", **pair}])
    assert read_pairs([path])[0].image == folder_readers.resolve() / "ok.jpg"


def test_bad_parquet_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [rlhf_v(0), rlhf_v(1, text='{"question": "Wh')])
    with pytest.raises(DataError, match="a.parquet row 2: text is not valid JSON"):
        read_pairs([path])
    skipped = []
    assert len(read_pairs([path], None, skipped)) == 1 and len(skipped) == 1
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="a.parquet: not a whole parquet file"):
        read_pairs([path])
    other = write_parquet(tmp_path / "b.parquet", [{"id": 1, "caption": "A tree."}])
    with pytest.raises(DataError, match=r"b.parquet row 1: no preference .*\(id, caption\)"):
        read_pairs([other])
    empty = write_parquet(tmp_path / "c.parquet", [rlaif_v(0, image={"bytes": None, "path": "x"})])
    with pytest.raises(DataError, match="c.parquet row 1: the image holds no bytes"):
        open_image("c.parquet row 1", read_pairs([empty])[0].image)


# ========================================================================= rows with conversations


def preference(**changes):
    turns = said("Where is it?\n<image>", "At home.", "What is it?", "to be replaced")
    return {"id": "1", "image": "ok.jpg", "conversations": turns, "preference": 2,
            "output_1": {"from": "llava", "value": "A bus."},
            "output_2": {"from": "llava", "value": "A car."}, "hallucination": True, **changes}


def test_human_preferences(folder_readers):
    path = write_json(folder_readers, [preference(), preference(preference=1)])
    second, first = read_pairs([path])
    assert (second.chosen, second.rejected) == ("A car.", "A bus.")
    assert (first.chosen, first.rejected) == ("A bus.", "A car.")
    assert second.history == [("Where is it?", "At home.")] and second.question == "What is it?"


@pytest.mark.parametrize("changes,message", [
    ({"preference": 0}, "preference is 0, not 1 or 2"),
    ({"preference": "2"}, "preference is '2', not 1 or 2"),
    ({"output_1": {"value": ""}}, "field 'output_1' is missing or empty"),
    ({"output_2": "A car."}, "field 'output_2' is missing or empty"),
    ({"output_2": {"value": "A bus."}}, "chosen and rejected are the same"),
    ({"conversations": said("<image>?", "Yes.", "What?")}, "the last turn should be from 'gpt'"),
    ({"conversations": said("What?", "Yes.")}, "0 <image> in the conversation, but 1 images"),
    ({"conversations": []}, "field 'conversations' is missing or empty"),
    ({"conversations": ["<image>?"]}, "turn 1 should have 'from' and 'value'"),
    ({"image": None}, "1 <image> in the conversation, but 0 images"),
])
def test_bad_preferences_are_named(folder_readers, changes, message):
    path = write_json(folder_readers, [preference(), preference(**changes), preference()])
    with pytest.raises(DataError, match=re.escape(f"row 2: {message}")):
        read_pairs([path])
    assert len(read_pairs([path], None, [])) == 2


def test_conversations(folder_readers):
    path = write_json(folder_readers, [
        {"id": 0, "image": "ok.jpg", "conversations": said("<image>\nWhat is it? ", "A car.",
                                                           " And now?", " Still. ")},
        {"id": 1, "conversations": said("Hello.", "Good day.")},
        {"id": 2, "image": "b.jpg", "conversations": said("Welcome!", "What?<image>", "A cat.",
                                                          first="gpt")},
        preference(), GOOD,
    ])
    image, text, greeted, ranked, plain = read_conversations([path])
    # what surrounds <image> goes with it; all else is left as it is, as in LLaVA's own code
    assert image.turns == [("What is it?", "A car."), (" And now?", " Still. ")]
    assert text.image is None and text.turns == [("Hello.", "Good day.")]
    assert greeted.turns == [("What?", "A cat.")]
    assert ranked.turns == [("Where is it?", "At home."), ("What is it?", "A car.")]
    assert plain.turns == [("What?", "A car.")] and plain.image.name == "ok.jpg"


@pytest.mark.parametrize("turns,message", [
    (said("What?", "A car."), "0 <image> in the conversation, but 1 images"),
    (said("<image> <image> What?", "A car."), "2 <image> in the conversation, but 1 images"),
    (said("<image> What?", "A <image>."), "2 <image> in the conversation, but 1 images"),
    (said("What?", "A car.", "<image> What?", "A car."), "should stand in the first turn"),
    (said("<image>", "A car."), "turn 1, from 'human', is empty"),
    (said("<image> What?", ""), "turn 2, from 'gpt', is empty"),
    (said("<image> What?", "A car.", "And?"), "the last turn is a question"),
    (said("<image> What?") * 2, "turn 2 is from 'human', not 'gpt'"),
    ([{"from": "human"}], "turn 1, from 'human', is empty"),
    (said("Hello", first="gpt"), "no question"),
    ("What?", "field 'conversations' is missing or empty"),
])
def test_bad_conversations_are_named(folder_readers, turns, message):
    good = {"image": "ok.jpg", "conversations": said("<image> What?", "A car.")}
    path = write_json(folder_readers, [good, {"image": "ok.jpg", "conversations": turns}, good])
    with pytest.raises(DataError, match=re.escape("row 2: ") + ".*" + re.escape(message)):
        read_conversations([path])
    assert len(read_conversations([path], None, [])) == 2


def test_prompts_and_captions(folder_readers):
    turns = said("Is it red?\n<image>", "to be written", "And?", "No.")
    path = write_json(folder_readers, [
        {"image": "ok.jpg", "conversations": turns},
        {"image": "ok.jpg", "conversations": turns[:1], "caption_type": 6, "length_bonus": 0.5},
        GOOD,
    ])
    plain, yes_no, pair = read_prompts([path])
    assert (plain.question, plain.caption_type, plain.length_bonus) == ("Is it red?", 1, 1.0)
    assert (yes_no.caption_type, yes_no.length_bonus) == (6, 0.5)
    assert pair.question == "What?"
    for changes, message in [({"caption_type": 8}, "caption_type is 8, not 1 to 7"),
                             ({"length_bonus": "x"}, "length_bonus is 'x', not a number"),
                             ({"image": ""}, "field 'image' is missing or empty")]:
        with pytest.raises(DataError, match=f"row 1: {message}"):
            row = {"image": "ok.jpg", "conversations": turns, **changes}
            read_prompts([write_json(folder_readers, [row])])
    captions = readers.read_captions(write_json(folder_readers, {"ok.jpg": ["A car."], "x/b.jpg": ["B."]}))
    assert readers.captions_of("row 1", plain.image, captions) == ["A car."]
    stored = ParquetImage(folder_readers / "a.parquet", 0, 0, "data/x/b.jpg")
    assert readers.captions_of("row 1", stored, captions) == ["B."]
    with pytest.raises(DataError, match="row 1: no captions for image .*c.jpg"):
        readers.captions_of("row 1", folder_readers / "c.jpg", captions)
    with pytest.raises(DataError, match="'ok.jpg' should have a list of captions"):
        readers.read_captions(write_json(folder_readers, {"ok.jpg": "A car."}))


# ========================================================================================= images


def test_bad_images_are_named(tmp_path, monkeypatch):
    Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.bmp")
    for content in (whole[: len(whole) // 2], b"no image at all",
                    (tmp_path / "picture.bmp").read_bytes()):
        with pytest.raises(DataError, match="rows.jsonl row 5: cannot read image"):
            open_image("rows.jsonl row 5", content)
    with pytest.raises(DataError, match="rows.jsonl row 5: the image holds no bytes"):
        open_image("rows.jsonl row 5", b"")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 64 x 64 is now a bomb
    with pytest.raises(DataError, match="row 6: cannot read image"):
        open_image("row 6", whole)


def test_images_are_upright_and_transparency_is_white(tmp_path):
    turned = Image.new("RGB", (30, 10), "red")
    turned.getexif()[0x0112] = 6  # lies on its side
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif())
    assert open_image("x", tmp_path / "turned.jpg").size == (10, 30)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    image = open_image("x", tmp_path / "clear.png")
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)


# ======================================================================= from records to examples


def joint(tokenizer_readers, *rounds):
    """A whole conversation, each round tokenized at once, as the public code does."""
    ids = [tokenizer_readers.bos_token]
    for text in rounds:
        ids += tokenizer_readers.encode(text, eos=True)
    return ids


def test_a_conversation_is_the_joint_tokenization(tokenizer_readers):
    turns = [("Is there a car?", "Yes, a red car."), (" And\n a bus? ", " No. "),
             ("Sure?", "\nYes")]
    conversation = Conversation("row 1", b"x", turns)
    example = data.conversation_example(conversation, None, tokenizer_readers, READERS_PATCHES)
    expected = joint(
        tokenizer_readers, f"{data.SYSTEM} USER: <image>\nIs there a car? ASSISTANT: Yes, a red car.",
        "USER:  And\n a bus?  ASSISTANT:  No. ", "USER: Sure? ASSISTANT: \nYes")
    at = expected.index(tokenizer_readers.image_token)
    expected[at : at + 1] = [tokenizer_readers.image_token] * READERS_PATCHES
    assert example.prompt + example.responses[0].tokens == expected
    batch = data.collate([example], tokenizer_readers.pad_token, 400)
    learnt = [t for _, answer in turns for t in tokenizer_readers.encode(answer, eos=True)]
    assert batch.target.tolist() == learnt and batch.groups == 1  # every answer, no question
    # each learnt token is predicted by the slot before it
    tokens = batch.tokens.flatten()
    torch.testing.assert_close(tokens[batch.source + 1], batch.target)


def test_text_alone_has_no_image(tokenizer_readers):
    conversation = Conversation("row 1", None, [("Hello?", "Yes.")])
    example = data.conversation_example(conversation, None, tokenizer_readers, READERS_PATCHES)
    assert tokenizer_readers.image_token not in example.prompt
    assert tokenizer_readers.decode(example.prompt) == f"{data.SYSTEM} USER: Hello? ASSISTANT:"


def test_a_pair_keeps_what_was_said_before(tokenizer_readers):
    pair = Pair("row 1", b"x", "Sure?", "Yes.", "No.", [("Is there a car?", "A red car.")])
    example = data.pair_example(pair, None, tokenizer_readers, 1)
    assert example.prompt + example.responses[1].tokens == joint(
        tokenizer_readers, f"{data.SYSTEM} USER: <image>\nIs there a car? ASSISTANT: A red car.",
        "USER: Sure? ASSISTANT: No.")


def test_given_text_is_marked(tokenizer_readers):
    conversation = Conversation("row 1", None, [("Hello?", "Yes."), ("And?", "No.")])
    example = data.conversation_example(conversation, None, tokenizer_readers, 0)
    shown = data.marked(example.responses[0], tokenizer_readers)
    assert re.fullmatch(r"Yes\.</s>\{ ?USER: And\? ASSISTANT:\} ?No\.</s>", shown)


def test_sft_learns_every_answer_of_mixed_rows(tiny_readers, tokenizer_readers):
    with_image = Conversation("a", b"x", [("What?", "A car."), ("And?", "A bus.")])
    text = Conversation("b", None, [("Hello?", "Yes.")])
    examples = [data.conversation_example(c, None, tokenizer_readers, READERS_PATCHES) for c in (with_image, text)]
    examples[0].image = torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(0))
    batch = data.collate(examples, tokenizer_readers.pad_token, 400)
    assert batch.images.shape == (1, 3, 12, 12)
    config = sft.SFTConfig()
    algorithm = sft.SFT(tiny_readers, config, data.Epochs(examples, config, 0))
    loss, _ = algorithm.loss(batch)
    logps = []
    for example in examples:
        tokens = torch.tensor([example.prompt + example.responses[0].tokens])
        image = None if example.image is None else example.image[None]
        logp = tiny_readers.logits(image, tokens).log_softmax(-1)[0]
        for i, weight in enumerate(example.responses[0].weight):
            if weight:
                at = len(example.prompt) + i
                logps.append(logp[at - 1, tokens[0, at]])
    torch.testing.assert_close(loss, -torch.stack(logps).mean())


# ======================================================================================= features


def named(folder_readers, *names):
    return [(f"row {i}", name and folder_readers / name) for i, name in enumerate(names, 1)]


def test_every_image_is_seen_once_in_batches(tiny_readers, folder_readers, monkeypatch):
    batches, see = [], tiny_readers.image_features
    monkeypatch.setattr(tiny_readers, "image_features", lambda p: batches.append(len(p)) or see(p))
    images = named(folder_readers, "ok.jpg", "b.jpg", None, "ok.jpg", "c.jpg", "b.jpg")
    seen = features.look(tiny_readers, READERS_SETTINGS, images)
    assert batches == [3] and seen.store.shape == (3, READERS_PATCHES, 16)
    for i, (_, path) in enumerate(images):
        if path is None:
            assert seen[i] is None
            continue
        pixels = preprocess(Image.open(path), READERS_SETTINGS.size, READERS_SETTINGS.mean, READERS_SETTINGS.std)
        torch.testing.assert_close(seen[i], see(pixels[None])[0].detach())
    assert seen[0] is not None and not torch.equal(seen[0], seen[1])
    batches.clear()
    monkeypatch.setattr(features, "BATCH", 2)
    again = features.look(tiny_readers, READERS_SETTINGS, images)
    assert batches == [2, 1]
    torch.testing.assert_close(again.store, seen.store)


def test_the_same_bytes_in_parquet_are_seen_once(tiny_readers, tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", [rlaif_v(0), rlaif_v(1), rlaif_v(0)])
    batches, see = [], tiny_readers.image_features
    monkeypatch.setattr(tiny_readers, "image_features", lambda p: batches.append(len(p)) or see(p))
    seen = features.look(tiny_readers, READERS_SETTINGS, [(p.name, p.image) for p in read_pairs([path])])
    assert batches == [2] and seen.places == [0, 1, 0]


def test_unreadable_images_stop_or_are_told_when_asked_for(tiny_readers, folder_readers):
    (folder_readers / "c.jpg").write_bytes(b"no image")
    images = named(folder_readers, "ok.jpg", "c.jpg", "b.jpg", "c.jpg")
    with pytest.raises(DataError, match="row 2: cannot read image c.jpg"):
        features.look(tiny_readers, READERS_SETTINGS, images)
    seen = features.look(tiny_readers, READERS_SETTINGS, images, stop=False)
    assert not torch.equal(seen[0], seen[2])
    for i in (1, 3):
        with pytest.raises(DataError, match=f"row {i + 1}: cannot read image c.jpg"):
            seen[i]


def test_features_on_disk_are_reused_and_refused(tiny_readers, folder_readers, monkeypatch):
    (folder_readers / "c.jpg").write_bytes(b"no image")
    images = named(folder_readers, "ok.jpg", "c.jpg", None, "b.jpg", "ok.jpg")
    memory = features.look(tiny_readers, READERS_SETTINGS, images, folder_readers, stop=False)
    assert not (folder_readers / "features.bin").exists()
    monkeypatch.setattr(features, "LIMIT", 100)
    written = features.look(tiny_readers, READERS_SETTINGS, images, folder_readers, stop=False)
    with monkeypatch.context() as patch:
        patch.setattr(features, "fill", None)  # must not be called again
        found = features.look(tiny_readers, READERS_SETTINGS, images, folder_readers, stop=False)
        for i in (0, 3, 4):
            assert torch.equal(found[i], memory[i]) and torch.equal(written[i], memory[i])
        assert found[2] is None
        with pytest.raises(DataError, match="row 2: cannot read image"):
            found[1]
        other = ImageSettings(12, READERS_SETTINGS.mean, READERS_SETTINGS.std, mode="crop")
        for settings, rows_ in ((other, images), (READERS_SETTINGS, images[::-1])):
            with pytest.raises(ValueError, match="features.bin belongs to another model"):
                features.look(tiny_readers, settings, rows_, folder_readers)
        (folder_readers / "b.jpg").write_bytes(picture(9, "JPEG", (30, 30)))
        with pytest.raises(ValueError, match="features.bin belongs to another model"):
            features.look(tiny_readers, READERS_SETTINGS, images, folder_readers)


def test_a_full_disk_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"features.bin: no 1000000000.0 GB for image features \("):
        features.reserve(tmp_path / "features.bin", 10**18)
    assert not list(tmp_path.iterdir())


# ======================================================================================== convert


def test_parquet_to_lines_and_back(tmp_path):
    rows_ = [rlhf_v(0), rlhf_v(1), rlhf_v(1)]
    rows_.append(rlhf_v(2, image={"bytes": picture(2), "path": "1.png"}))
    rows_.append(rlhf_v(3, image={"bytes": picture(3, "JPEG"), "path": "../../e vil/.x y.png"}))
    source = write_parquet(tmp_path / "a.parquet", rows_)
    lines = tmp_path / "rows.jsonl"
    assert convert.convert([source], lines) == 5
    images = sorted(path.name for path in (tmp_path / "rows_images").iterdir())
    assert images == ["0.png", "1-2.png", "1.png", "x_y.jpg"]  # safe, once each, endings true
    assert convert.convert([lines], tmp_path / "b.parquet") == 5
    before, middle, after = (
        read_pairs([path]) for path in (source, lines, tmp_path / "b.parquet"))
    for one, two, three in zip(before, middle, after):
        for field in ("question", "chosen", "rejected", "history"):
            assert getattr(one, field) == getattr(two, field) == getattr(three, field)
        assert one.image.read() == two.image.read_bytes() == three.image.read()
    table = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "b.parquet")
    first = table.to_pylist()[0]
    assert first.keys() == rows_[0].keys() and first["text"] == rows_[0]["text"]


def test_preferences_to_lines_keep_images_and_history(folder_readers):
    (folder_readers / "sub").mkdir()
    (folder_readers / "ok.jpg").rename(folder_readers / "sub" / "ok.jpg")
    source = write_json(folder_readers, [preference(image="sub/ok.jpg")])
    convert.convert([source], folder_readers / "out.jsonl", folder_readers)
    row = json.loads((folder_readers / "out.jsonl").read_text())
    assert row == {"image": "sub/ok.jpg", "question": "What is it?", "chosen": "A car.",
                   "rejected": "A bus.", "history": [["Where is it?", "At home."]]}
    assert read_pairs([folder_readers / "out.jsonl"], folder_readers)[0].history == [("Where is it?", "At home.")]
    assert not (folder_readers / "out_images").exists()
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match="row 1: has earlier turns"):
        convert.convert([source], folder_readers / "out.parquet", folder_readers)
    assert not list(folder_readers.glob("*out.parquet*"))


def test_nothing_is_overwritten_or_left_half(tmp_path, capsys):
    source = write_parquet(tmp_path / "a.parquet", [rlhf_v(0), rlhf_v(1, image={"bytes": b"x"})])
    out = tmp_path / "rows.jsonl"
    assert convert.main(["convert", str(source), str(out)]) == 1
    assert "a.parquet row 2: the image is no JPEG, PNG or WebP" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]
    assert convert.main(["convert", str(source), str(out), "--skip_bad_rows"]) == 0
    assert "1 rows left out" in capsys.readouterr().err
    kept = out.read_bytes()
    assert convert.main(["convert", str(source), str(out)]) == 1
    assert "rows.jsonl exists" in capsys.readouterr().err and out.read_bytes() == kept
    assert convert.main(["convert", str(source), str(tmp_path / "rows.csv")]) == 1
    assert "should end in .jsonl or .parquet" in capsys.readouterr().err


# ======================================================================================== dry run


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activation_estimate_is_near_what_autograd_keeps(checkpointing):
    config = TextConfig(100, 64, 176, 3, 4, 2, 256)
    model = LLaVA(LLaVAConfig(VisionConfig(16, 32, 1, 2, 12, 4), config))
    init_weights(model, 0)
    model.decoder.gradient_checkpointing = checkpointing
    kept, weights = {}, {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(1, 200, 64, requires_grad=True)
    position = torch.arange(200)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.decoder(x, position)
    estimate = dry_run.activation_bytes(config, 200, 4, checkpointing)
    if checkpointing:  # the block that is computed again is kept in the backward pass only
        estimate -= 200 * 4 * (6 * 64 + 2 * 32 + 3 * 176)
    assert 0.9 < estimate / sum(kept.values()) < 1.1


def test_needs_count_what_is_trained(tiny_readers, tokenizer_readers, folder_readers):
    model = LLaVA(tiny_readers.config)
    init_weights(model, 0)
    add_adapter(model, "a", 4, 8)
    trained = sum(weight.numel() for weight in select_trainable(model, "a"))
    conversation = Conversation("row 1", b"x", [("What?", "A car.")])
    example = data.conversation_example(conversation, None, tokenizer_readers, READERS_PATCHES)
    text = dry_run.needs(
        model, sft.SFTConfig(), [example], named(folder_readers, "ok.jpg", "ok.jpg", None), 4)
    total = sum(weight.numel() for weight in model.parameters())
    assert f"{total:,}, of which {trained:,} are trained" in text
    assert f"gradients    {trained * 4 / 1000:.3g} kB" in text
    assert f"optimizer    {trained * 8 / 1000:.3g} kB" in text
    assert f"row of {len(example.prompt) + len(example.responses[0].tokens)} tokens" in text
    assert f"{PATCHES * 16 * 4} bytes for 1 images, in memory" in text


# ================================================================================== the whole way


def test_training_on_conversations_and_parquet(tiny_readers, tokenizer_readers, folder_readers, monkeypatch, capsys):
    monkeypatch.chdir(folder_readers)
    checkpoint.save_llava(tiny_readers, tokenizer_readers, READERS_SETTINGS, folder_readers / "model")
    write_json(folder_readers, [
        {"image": "ok.jpg", "conversations": said("<image> What?", "A car.", "And?", "A bus.")},
        {"conversations": said("Hello?", "Yes.")}, {"image": "ok.jpg"},
    ])
    common = ["--model", "model", "--test_scenes", "0", "--log_every", "1", "--batch_size", "2",
              "--device", "cpu"]
    given = ["--algo", "sft", "--data", "rows.json", "--steps", "2", "--out", "sft", *common]
    assert train.main(given) == 1
    assert "rows.json row 3: " in capsys.readouterr().err
    assert train.main([*given, "--skip_bad_rows", "--dry_run"]) == 0
    out, err = capsys.readouterr()
    assert "{USER: And? ASSISTANT:}" in out.replace("{ ", "{") and "activations" in out
    assert "1 rows left out" in err and "row 3" in err
    assert train.main([*given, "--skip_bad_rows", "--overwrite"]) == 0
    assert (folder_readers / "sft" / "model" / "model.safetensors").exists()
    path = write_parquet(folder_readers / "a.parquet", [rlhf_v(i) for i in range(3)])
    monkeypatch.setattr(features, "LIMIT", 100)
    given = ["--algo", "ddpo", "--data", str(path), "--steps", "2", "--out", "ddpo", *common]
    assert train.main(given) == 0
    assert not list((folder_readers / "ddpo").glob("features.*"))  # gigabytes, of no more use


# ======================================================================================= world.py

PARK = Scene(0, "park", (Thing("dog", "red", 2, 0), Thing("umbrella", "blue", 1, 4),
                         Thing("bus", "green", 3, 8)))


EXPECTED = {"street": ["car", "house"], "kitchen": ["cup", "pot"], "beach": ["umbrella", "boat"],
            "farm": ["tractor", "house"], "park": ["tree", "flower"], "bedroom": ["bed", "lamp"]}


def annotated(count, seed=0):
    """Pairs of a scene and what the noisy annotator says about it."""
    rng = random.Random(seed)
    scenes = [world.make_scene(i) for i in range(count)]
    return [(scene, world.annotate(scene, rng)) for scene in scenes]


def content(scene):
    return scene.type, scene.things


# ---------------------------------------------------------------------------------- scenes

def test_world_is_the_same_in_every_process():
    # sets and str hashes differ between processes unless PYTHONHASHSEED is set; nothing may depend
    # on them, nor on the global random state
    code = ("import random, world, zlib; rng = random.Random(1); scene = world.make_scene(7);"
            "print(scene, world.describe(scene), world.annotate(scene, rng),"
            "world.questions(scene, rng, 12), world.facts(scene, rng),"
            "world.statements(scene, rng, 5), zlib.crc32(world.draw(scene).tobytes()))")
    outputs = {subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed},
                              cwd=Path(world.__file__).parent, check=True, text=True,
                              capture_output=True).stdout for seed in ("1", "2")}
    assert len(outputs) == 1


def test_world_scenes_are_well_formed_and_typical():
    scenes = [world.make_scene(seed) for seed in range(2000)]
    for scene in scenes:
        cells = [thing.cell for thing in scene.things]
        assert cells == sorted(set(cells)) and 3 <= len(cells) <= 5
        assert len({thing.kind for thing in scene.things}) == len(cells)
        assert scene.absent(world.SCENES[scene.type])  # the annotator always has something to add
    things = [(scene.type, thing) for scene in scenes for thing in scene.things]
    typical = np.mean([thing.kind in world.SCENES[setting] for setting, thing in things])
    usual = np.mean([thing.colour == world.KINDS[thing.kind] for _, thing in things])
    assert 0.78 < typical < 0.9 and 0.67 < usual < 0.73  # by chance some of the others are typical
    assert {thing.kind for _, thing in things} == set(world.KINDS)


def test_world_splits_share_no_content():
    train = {content(world.make_scene(seed, "train")) for seed in range(5000)}
    test = {content(world.make_scene(seed, "test")) for seed in range(2000)}
    assert not train & test and len(train) > 4900
    with pytest.raises(ValueError, match="split"):
        world.make_scene(0, "valid")


def test_world_splits_share_no_content_even_where_scenes_recur(monkeypatch):
    kinds = dict.fromkeys(("car", "bus", "tree", "house", "dog"), 1)  # a world so small that
    monkeypatch.setattr(world, "SCENES", {"street": kinds})  # the same scene is drawn many times
    monkeypatch.setattr(world, "KINDS", dict.fromkeys(kinds, "red"))
    monkeypatch.setattr(world, "UNUSUAL_COLOUR", 0)
    monkeypatch.setattr(world, "NUMBER_WEIGHTS", (1, 0, 0))
    train = [content(world.make_scene(seed, "train")) for seed in range(4000)]
    test = {content(world.make_scene(seed, "test")) for seed in range(1000)}
    assert len(set(train)) < 3900 and not set(train) & test


def test_world_labels_name_every_cell():
    kinds, colours, numbers, setting = world.labels(PARK)
    assert [i for i in range(9) if kinds[i]] == [0, 4, 8] and numbers == [2, 0, 0, 0, 1, 0, 0, 0, 3]
    assert list(world.KINDS)[kinds[8] - 1] == "bus"
    assert list(world.COLOURS)[colours[8] - 1] == "green"
    assert list(world.SCENES)[setting] == "park"


# ---------------------------------------------------------------------------------- drawings

def test_world_pictures_show_each_thing_in_its_cell():
    empty = np.asarray(world.draw(Scene(0, "park", ())), dtype=int)
    for cell in range(9):
        scene = Scene(0, "park", (Thing("bed", "red", 1, cell),))
        picture = np.asarray(world.draw(scene), dtype=int)
        changed = np.abs(picture - empty).sum(-1) > 30  # (72, 72)
        row, column = divmod(cell, 3)
        inside = changed[24 * row:24 * row + 24, 24 * column:24 * column + 24].sum()
        assert picture.shape == (72, 72, 3) and inside > 100 and inside > 0.9 * changed.sum()


def test_world_pictures_differ_in_every_attribute():
    def picture(*thing):
        return world.draw(Scene(0, "farm", (Thing(*thing),))).tobytes()
    looks = {picture(kind, colour, number, 4)
             for kind in world.KINDS for colour in world.COLOURS for number in (1, 2, 3)}
    assert len(looks) == 24 * 6 * 3
    assert len({world.draw(Scene(0, setting, ())).tobytes() for setting in world.SCENES}) == 6


def test_world_picture_is_the_same_when_enlarged():
    scene = world.make_scene(3)
    small = np.asarray(world.draw(scene), dtype=float)
    large = np.asarray(world.draw(scene, 288).reduce(4), dtype=float)
    other = np.asarray(world.draw(world.make_scene(4)), dtype=float)
    assert np.abs(small - large).mean() < 8 < np.abs(small - other).mean()


# ---------------------------------------------------------------------------------- the annotator

def test_world_annotator_errs_at_its_rates():
    errors = dict.fromkeys(("object", "attribute", "number", "position", "other"), 0)
    three = two = unusual = things = 0
    for scene, text in annotated(2000):
        spans = world.hallucinations(scene, text)
        for span in spans:
            errors[span.kind] += 1
        objects = [span for span in spans if span.kind == "object"]
        assert len(objects) <= 1 and all(span.end == len(text) for span in objects)  # said last
        three += sum(thing.number == 3 for thing in scene.things)
        two += sum(thing.number == 2 for thing in scene.things)
        unusual += sum(thing.colour != world.KINDS[thing.kind] for thing in scene.things)
        things += len(scene.things)
    rates = world.Rates()
    missing = sum(bool(scene.absent(EXPECTED[scene.type])) for scene, _ in annotated(2000))
    added = missing * rates.missing_object + (2000 - missing) * rates.extra_object
    assert errors["object"] == pytest.approx(added, abs=60)
    assert errors["attribute"] / unusual == pytest.approx(rates.usual_colour, abs=0.03)
    assert errors["position"] / things == pytest.approx(rates.wrong_place, abs=0.015)
    expected = three * rates.three_as_two + two * rates.two_as_one
    assert errors["number"] == pytest.approx(expected, rel=0.08)
    assert errors["other"] == 0


def test_world_annotator_adds_what_is_typical():
    rates = world.Rates(1, 1, 1, 0, 0, 0)
    for seed in range(300):
        scene = world.make_scene(seed)
        text = world.annotate(scene, random.Random(seed), rates)
        *said, extra = world.mentions(text)
        assert said == [thing.kind for thing in scene.things]
        assert extra in world.SCENES[scene.type] and scene.find(extra) is None
        expected = scene.absent(EXPECTED[scene.type])
        assert not expected or extra == expected[0]
        assert re.findall("|".join(world.COLOURS), text) == [world.KINDS[k] for k in said + [extra]]


def test_world_annotator_misplaces_by_one_step():
    for seed in range(200):
        scene = world.make_scene(seed)
        text = world.annotate(scene, random.Random(seed), world.Rates(0, 0, 0, 0, 0, 1))
        said = [world.PLACES.index(found[0].lower()) for found in world.PLACE.finditer(text)]
        for cell, thing in zip(said, scene.things, strict=True):
            assert abs(cell // 3 - thing.cell // 3) + abs(cell % 3 - thing.cell % 3) == 1


def test_world_annotator_without_habits_tells_the_truth():
    for seed in range(200):
        scene = world.make_scene(seed)
        assert world.annotate(scene, random.Random(0), world.Rates(0, 0, 0, 0, 0, 0)) == \
            world.describe(scene)


# ---------------------------------------------------------------------------------- the oracles

def test_world_descriptions_are_true_complete_and_of_the_stated_length():
    for seed in range(500):
        scene = world.make_scene(seed, "test")
        text = world.describe(scene)
        assert world.hallucinations(scene, text) == [] and world.correct(scene, text) == text
        assert world.mentions(text) == [thing.kind for thing in scene.things]
        assert 25 <= len(text.split()) <= 55


@pytest.mark.parametrize("answer, false, kind, corrected", [
    ("There is a cat on the left.", "There is a cat on the left.", "object", ""),
    ("A bus? Two cars are here. Hello.", "Two cars are here.", "object", "A bus? Hello."),
    ("There is a cat. Two dogs.", "There is a cat.", "object", "Two dogs."),
    ("Three blue dogs are at the top left.", "blue", "attribute", None),
    ("There are two red dogs on the right.", "on the right", "position",
     "There are two red dogs at the top left."),
    ("On the left there is a blue umbrella.", "On the left", "position",
     "In the middle there is a blue umbrella."),
    ("There is a red dog at the top left.", "a", "number",
     "There are two red dogs at the top left."),
    ("Two red dogs and three umbrellas", "three", "number", "Two red dogs and an umbrella"),
    ("there ARE two Blue UMBRELLAS in the Middle.", "two", "number",
     "there Is a Blue Umbrella in the Middle."),
    ("This is a beach.", "beach", "other", "This is a park."),
    ("There is an umbrella and a cat.", " and a cat", "object", "There is an umbrella."),
    ("There is a cat and an umbrella.", "a cat and ", "object", "There is an umbrella."),
    ("Two dogs. Two dogs. A dog.", "A", "number", "Two dogs. Two dogs. Two dogs."),
    ("You can see a purple umbrella", "purple", "attribute", "You can see a blue umbrella"),
])
def test_world_oracle_marks_exactly_what_is_false(answer, false, kind, corrected):
    spans = world.hallucinations(PARK, answer)
    found = [span for span in spans if span.kind == kind]
    assert [answer[span.start:span.end] for span in found] == [false]
    if corrected is not None:
        assert spans == found and world.correct(PARK, answer) == corrected


def test_world_oracle_gives_offsets_and_replacements():
    answer = "This is a park. Three blue dogs are on the left. There is a cat. A bus is here."
    assert world.hallucinations(PARK, answer) == [
        Span(16, 21, "number", "Two"), Span(22, 26, "attribute", "red"),
        Span(36, 47, "position", "at the top left"), Span(49, 64, "object", ""),
        Span(65, 66, "number", "Three")]
    assert world.correct(PARK, answer) == \
        "This is a park. Two red dogs are at the top left. Three buses are here."


@pytest.mark.parametrize("answer", [
    "", " ", "...", "Yes.", "No, there is no cat.", "It is not a cat.", "carpet busy",
    "Is there a cat?", "Two dog at the top left", "the dogs", "a nice picture\n\nwith birds",
    "two red dogs are at the top left two red dogs", "A blue umbrella a blue umbrella a",
])
def test_world_oracle_leaves_alone_what_is_not_false(answer):
    assert world.hallucinations(PARK, answer) == [] and world.correct(PARK, answer) == answer


def test_world_corrections_are_true_and_touch_only_what_is_false():
    for scene, text in annotated(600, seed=5):
        corrected = world.correct(scene, text)
        assert world.hallucinations(scene, corrected) == []
        assert corrected == world.describe(scene)  # the annotator errs in nothing but the habits
        # Everything between the false spans is still there, except is/are and -s beside a number.
        rest, pieces, at = corrected, [], 0
        for span in world.hallucinations(scene, text):
            pieces.append(text[at:span.start])
            at = span.end
        for piece in pieces + [text[at:]]:
            loose = re.sub(r"\b(?:is|are)\b", "(?:is|are)", re.escape(piece.strip()))
            for kind in sorted(set(world.mentions(piece))):
                loose = re.sub(rf"\b{kind}(?:e?s)?\b", f"{kind}(?:e?s)?", loose)
            found = re.search(loose, rest)
            assert found, (text, corrected, piece)
            rest = rest[found.end():]


def test_world_corrections_of_garbage_are_free_of_hallucinations():
    rng = random.Random(0)
    words = [*world.NOUNS, *world.COLOURS, *world.SCENES, *world.PLACES * 3,
             *["there is", "There are", "is", "a", "an", "two", "three", "big"] * 6,
             *["and", ",", ".", "?", "\n", "no"] * 6]
    for seed in range(1000):
        scene = world.make_scene(seed)
        text = " ".join(rng.choices(words, k=rng.randint(1, 40)))
        spans = world._edits(scene, text)
        assert all(a.end <= b.start for a, b in zip(spans, spans[1:]))
        assert world.hallucinations(scene, world.correct(scene, text)) == []


def test_world_mentions():
    assert world.mentions("Two BUSES, a bus and an apple. Is there a car? No cups. Carpets") == \
        ["bus", "bus", "apple"]


def test_world_ranking():
    true, false = "Two dogs are at the top left.", "A cat is on the left."
    more = true + " There is a blue umbrella in the middle."
    rng = random.Random(0)
    assert all(world.rank(PARK, true, false, rng, 0) == 0 for _ in range(20))
    assert all(world.rank(PARK, true, more, rng, 0) == 1 for _ in range(20))
    flips = np.mean([world.rank(PARK, false, more, rng, 0.1) == 0 for _ in range(3000)])
    assert flips == pytest.approx(0.1, abs=0.02)
    ties = np.mean([world.rank(PARK, true, true, rng) for _ in range(3000)])
    assert ties == pytest.approx(0.5, abs=0.04)


# ---------------------------------------------------------------------------------- questions

def test_world_answers_agree_with_the_truth():
    for seed in range(200):
        scene, rng = world.make_scene(seed), random.Random(seed)
        asked = world.questions(scene, rng, 12) + world.questions(scene, rng, 6, held_out=True)
        assert len({question.text for question in asked[:12]}) == 12
        for q in asked:
            kinds = [world.NOUNS[w] for w in re.findall(r"\w+", q.text) if w in world.NOUNS]
            thing = scene.find(kinds[0]) if kinds else None
            place = world.PLACE.search(q.text)
            if place:
                here = [thing for thing in scene.things if world.PLACES[thing.cell] == place[0]]
                expected = world._capital(world._phrase(here[0])) if here else "Nothing"
            elif q.topic == "exists":
                expected = f"Yes, {world.PLACES[thing.cell]}" if thing else "No"
            elif q.topic == "comparison":
                other = scene.find(kinds[1])
                (x, y), (u, v) = divmod(thing.cell, 3), divmod(other.cell, 3)
                holds = {"left": y < v, "right": y > v, "above": x < u, "below": x > u,
                         "more": thing.number > other.number}
                expected = "Yes" if holds[re.search("|".join(holds), q.text)[0]] else "No"
            else:
                expected = world._capital({
                    "colour": lambda: thing.colour, "number": lambda: world.NUMBERS[thing.number],
                    "place": lambda: world.PLACES[thing.cell],
                    "scene": lambda: "a " + scene.type}[q.topic]())
            assert q.answer == expected + "."
            assert world.answer_is_right(q, q.answer)


def test_world_yes_and_no_are_balanced_and_half_of_the_absent_are_typical():
    rng, typical, no = random.Random(0), 0, 0
    for topic in ("exists", "comparison"):
        asked = [(scene, world.question(scene, topic, rng))
                 for scene in map(world.make_scene, range(2000))]
        assert np.mean([q.answer == "No." for _, q in asked]) == pytest.approx(0.5, abs=0.04)
        more = [q.answer == "No." for _, q in asked if "more" in q.text]
        assert not more or np.mean(more) == pytest.approx(0.5, abs=0.1)  # balanced here as well
        for scene, q in asked if topic == "exists" else ():
            if q.answer == "No.":
                no += 1
                typical += any(re.search(rf"\b{kind}\b", q.text)
                               for kind in world.SCENES[scene.type])
    assert 0.5 < typical / no < 0.65  # half by design, and some of the random half


@pytest.mark.parametrize("difference, things, fields", [(0.0, 1, 1), (1.0, None, 4)])
def test_world_lookalikes_differ_as_much_as_asked(difference, things, fields):
    for seed in range(200):
        scene, rng = world.make_scene(seed), random.Random(seed)
        other = world.lookalike(scene, rng, difference)
        pairs = [(a, b) for a, b in zip(scene.things, other.things, strict=True) if a != b]
        assert len(pairs) == (things or len(scene.things))
        for a, b in pairs:
            assert sum(vars(a)[name] != vars(b)[name] for name in vars(a)) == fields
        for name in ("kind", "cell"):
            assert len({getattr(thing, name) for thing in other.things}) == len(other.things)
        assert world.hallucinations(scene, world.describe(other))
        assert not world.hallucinations(other, world.describe(other))
        less = world.lookalike(scene, rng, difference, fewer=True)
        assert len(less.things) == max(1, len(scene.things) - len(pairs))
        assert set(less.things) < set(scene.things) and less.type == scene.type
        assert len(world.hallucinations(less, world.describe(scene))) >= len(scene.things) - len(less.things)


@pytest.mark.parametrize("topic, truth, answer, right", [
    ("colour", "Red.", "it is red", True), ("colour", "Red.", "Red or blue.", False),
    ("number", "Two.", "two dogs. And one cat.", True), ("number", "One.", "There is a dog.", True),
    ("place", "On the left.", "It is on the left.", True),
    ("place", "On the left.", "On the right", False),
    ("exists", "Yes, on the left.", "yes", True), ("exists", "No.", "Yes.", False),
    ("exists", "No.", " No, there is no cat.", True), ("exists", "No.", "I know no", False),
    ("what", "Two red cars.", "There are two red cars", True),
    ("what", "Nothing.", "nothing", True),
    ("what", "Two red cars.", "A red car.", False), ("scene", "A park.", "This is a park", True),
    ("comparison", "No.", "", False),
])
def test_world_short_answers_are_scored_leniently(topic, truth, answer, right):
    assert world.answer_is_right(world.Question("?", truth, topic), answer) is right


def test_world_statements_and_facts_are_as_true_as_they_say():
    rng, true = random.Random(0), []
    for seed in range(300):
        scene = world.make_scene(seed)
        for sentence, is_true in world.statements(scene, rng, 4):
            false = world.hallucinations(scene, sentence)
            assert len(false) == (not is_true), sentence
            true.append(is_true)
        facts = world.facts(scene, rng)
        assert len(facts) == len(scene.things) + 1
        assert not any(world.hallucinations(scene, fact) for fact in facts)
    assert np.mean(true) == pytest.approx(0.5, abs=0.05)


def test_world_evaluation_wordings_are_unseen_but_their_words_are_not():
    def vocabulary(prompts):
        return set(re.findall(r"\w+", " ".join(prompts).lower()))
    train, held_out = world.DESCRIBE_PROMPTS_TRAIN, world.DESCRIBE_PROMPTS_EVAL
    assert not set(train) & set(held_out) and vocabulary(held_out) <= vocabulary(train)
    train, held_out = world.QUESTION_PROMPTS_TRAIN, world.QUESTION_PROMPTS_EVAL
    assert set(train) == set(held_out) == set(world.TOPICS) | {"more"}
    assert all(not set(train[topic]) & set(held_out[topic]) for topic in train)
    assert vocabulary(sum(held_out.values(), ())) <= vocabulary(sum(train.values(), ()))


# ======================================================================================= model.py


def test_packed_branches_equal_separate_sequences(tiny):
    """The one attention rule: a branch computes what it would compute alone."""
    examples = [random_example(i, image=i != 1, shared=i) for i in range(4)]
    batch = data.collate(examples, 59, 128)
    packed = entry_logp(tiny, batch)
    group = 0
    for example in examples:
        for response in example.responses:
            tokens = torch.tensor([example.prompt + response.tokens])
            image = None if example.image is None else example.image[None]
            logp = tiny.logits(image, tokens).log_softmax(-1)[0]
            at = range(len(example.prompt) - 1, tokens.shape[1] - 1)
            alone = torch.stack([logp[i, tokens[0, i + 1]] for i in at])
            torch.testing.assert_close(packed[batch.group == group], alone, atol=1e-5, rtol=0)
            group += 1


def test_padding_and_siblings_change_nothing(tiny):
    one, two = random_example(0), random_example(1, lengths=(30, 3))
    alone = entry_logp(tiny, data.collate([one], 59, 128))
    both = data.collate([one, two], 59, 128)
    torch.testing.assert_close(entry_logp(tiny, both)[: len(alone)], alone, atol=1e-5, rtol=0)
    both.tokens[both.branch == -1] = 7  # whatever stands in the padding
    torch.testing.assert_close(entry_logp(tiny, both)[: len(alone)], alone, atol=1e-5, rtol=0)
    one.responses[1] = Response([9, 9, 2], [1.0] * 3)  # another sibling
    other = data.collate([one], 59, 128)
    first = other.group == 0
    torch.testing.assert_close(entry_logp(tiny, other)[first], alone[: first.sum()], atol=1e-5, rtol=0)


def test_attention_mask_by_hand():
    mask = models.attention_mask(torch.tensor([[0, 0, 1, 2, 2, -1]]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


def test_norm_is_torchs_with_its_gradients():
    """On a CPU in float32, where the norm is our own."""
    norm, plain = models.RMSNorm(24, eps=1e-3), torch.nn.RMSNorm(24, eps=1e-3)
    with torch.no_grad():
        plain.weight.copy_(norm.weight.normal_())
    x = torch.randn(2, 5, 24, requires_grad=True)
    upstream = torch.randn(2, 5, 24)
    ours, expected = norm(x), plain(x)
    torch.testing.assert_close(ours, expected)
    mine = torch.autograd.grad(ours, (x, norm.weight), upstream)
    theirs = torch.autograd.grad(expected, (x, plain.weight), upstream)
    for gradient, wanted in zip(mine, theirs):
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-5)


def greedy_without_cache(model, image, prompt, steps):
    tokens = prompt.clone()
    for _ in range(steps):
        logits = model.logits(image, tokens[None])[0, -1]
        logits[[58, 59]] = -torch.inf
        tokens = torch.cat([tokens, logits.argmax()[None]])
        if tokens[-1] == 2:
            break
    return tokens[len(prompt) :]


def test_cached_generation_equals_recomputation(tiny):
    images = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    prompts = [torch.tensor([1] + [58] * PATCHES + list(range(5, 5 + n))) for n in (1, 6, 3)]
    answers = generate(tiny, images, prompts, 25)
    for i, answer in enumerate(answers):
        expected = greedy_without_cache(tiny, images[i : i + 1], prompts[i], 25)
        assert answer.tolist() == expected.tolist()


def test_samples_are_reproducible_and_see_only_themselves(tiny):
    prompt = [torch.tensor([1, 7, 8, 9])]
    draw = lambda: generate(tiny, None, prompt, 12, 1.0, 4, torch.Generator().manual_seed(5))
    first = draw()
    assert [a.tolist() for a in first] == [a.tolist() for a in draw()]
    assert len({tuple(a.tolist()) for a in first}) > 1
    # the likelihood of a sample, scored alone, is what its sampling distribution said
    greedy = generate(tiny, None, prompt, 12, 0.0, 3)
    assert greedy[0].tolist() == greedy[1].tolist() == greedy[2].tolist()
    assert all(58 not in a and 59 not in a for a in first)


def test_sampling_frequencies_follow_the_model(tiny):
    prompt = torch.tensor([1, 7, 8])
    draws = generate(tiny, None, [prompt], 1, 1.0, 4000, torch.Generator().manual_seed(0))
    counts = torch.bincount(torch.stack(draws).flatten(), minlength=60) / 4000
    logits = tiny.logits(None, prompt[None])[0, -1].detach()
    logits[[58, 59]] = -torch.inf
    assert (counts - logits.softmax(-1)).abs().max() < 0.03


def test_sampled_tokens_can_be_trained_on(tiny):
    """Decoding runs in inference mode, whose tensors autograd refuses; its answers are ordinary."""
    answer, = generate(tiny, None, [torch.arange(3, 9)], 4)
    assert torch.is_grad_enabled() and not answer.is_inference()
    tiny.logits(None, answer[None]).sum().backward()
    assert tiny.decoder.embed_tokens.weight.grad is not None
    tiny.zero_grad()


def test_generation_needs_room(tiny):
    with pytest.raises(ValueError, match="leaves no room"):
        generate(tiny, None, [torch.ones(128, dtype=torch.long)], 5)


def test_image_token_count_must_match(tiny):
    with pytest.raises(ValueError, match="9 image features|image features"):
        tiny(torch.zeros(1, 3, 12, 12), torch.tensor([[1] + [58] * 8 + [3]]))


def test_cached_features_stand_in_for_pixels(tiny):
    pixels = torch.randn(2, 3, 12, 12)
    tokens = torch.tensor([[1] + [58] * PATCHES + [5, 6]] * 2)
    torch.testing.assert_close(tiny(pixels, tokens), tiny(tiny.image_features(pixels), tokens))


# =========================================================================== the step, generation

IMAGE, PAD, EOS, STEP_PATCHES = 58, 59, 2, 9


def tiny_model_step(kv_heads: int = 2) -> LLaVA:
    text = TextConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=kv_heads, max_position_embeddings=128,
    )
    tower = VisionConfig(16, 32, 2, 2, image_size=12, patch_size=4)
    model = LLaVA(LLaVAConfig(tower, text, image_token=IMAGE, pad_token=PAD, eos_token=EOS))
    models.init_weights(model, 0)
    models.select_trainable(model)
    return model


def tiny_pairs(images: list[bool], shared: list[int]) -> list[Example]:
    """Corrected answers that begin alike, with weights and reference scores, for some an image."""
    rng, examples = Random(0), []
    for i, (image, prefix) in enumerate(zip(images, shared)):
        draw = lambda n: [rng.randrange(3, 58) for _ in range(n)]
        begin, prompt = draw(prefix), [1] + [IMAGE] * STEP_PATCHES * image + draw(3 + i)
        answers = [begin + draw(n) + [EOS] for n in (5 + i, 8 - i)]
        responses = [Response(a, [rng.choice((1.0, 5.0)) for _ in a]) for a in answers]
        pixels = torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(i))
        scores = [-rng.random() - 3, -rng.random() - 3]
        examples.append(Example(f"row {i}", pixels if image else None, prompt, responses, scores))
    return examples


def gradients(loss, model) -> dict[str, torch.Tensor]:
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(weights, torch.autograd.grad(loss, weights.values(), materialize_grads=True)))


def assert_close_gradients(ours, expected, tolerance=1e-5):
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], atol=tolerance, rtol=tolerance, msg=name)


# The loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_fused_loss_is_the_definition(normalize):
    model = tiny_model_step()
    batch = collate(tiny_pairs([True, False, True], [0, 3, 1]), PAD, 128)
    scores = ddpo.batch_scores(model, batch, normalize)
    ref = batch.reference
    losses, *rewards = ddpo.preference_loss(scores[0::2], scores[1::2], ref[0::2], ref[1::2], 0.5)
    loss, chosen, rejected, fused = ddpo.pair_loss(model, batch, 0.5, normalize)
    torch.testing.assert_close(loss, losses.mean())
    for mine, plain in zip((chosen, rejected, fused), (*rewards, scores.detach())):
        torch.testing.assert_close(mine, plain)
    assert_close_gradients(gradients(loss, model), gradients(losses.mean(), model))


def test_loss_and_its_metrics():
    model, examples = tiny_model_step(), tiny_pairs([True, False], [2, 0])
    algorithm = ddpo.DDPO(model, ddpo.DDPOConfig(batch_size=2, micro_batch=2), 0, examples)
    (batch,) = algorithm.batches(0)
    loss, metrics = algorithm.loss(batch)
    _, chosen, rejected, scores = ddpo.pair_loss(model, batch, 0.5, True)
    assert metrics["rewards/margins"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-6)
    assert metrics["rewards/accuracies"] == (chosen > rejected).float().mean().item()
    assert metrics["logps/rejected"] == pytest.approx(scores[1::2].mean().item(), abs=1e-6)
    assert metrics["padding"] == batch.padding and loss.requires_grad


def test_loss_under_autocast():
    """Half-precision products, float32 weights: the head converts what the kernels are given."""
    model = tiny_model_step()
    batch = collate(tiny_pairs([True, False], [2, 0]), PAD, 128)
    exact = ddpo.pair_loss(model, batch, 0.5, True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ddpo.pair_loss(model, batch, 0.5, True)[0]
        with torch.no_grad():
            assert ddpo.batch_scores(model, batch, True).dtype == torch.float32
    assert loss.item() == pytest.approx(exact[0].item(), abs=0.02)
    ours, expected = gradients(loss, model), gradients(exact[0], model)
    assert ours["head.weight"].dtype == torch.float32
    error = (ours["head.weight"] - expected["head.weight"]).norm() / expected["head.weight"].norm()
    assert error < 0.05


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_shared_trunk_equals_separate_sequences(kv_heads):
    """Loss and gradients of packed rows are those of every response run alone, plainly causal."""
    model = tiny_model_step(kv_heads)
    examples = tiny_pairs([True, False, True, False], [0, 0, 3, 4])
    packed = ddpo.pair_loss(model, collate(examples, PAD, 128), 0.5, True)[0]
    scores, places = [], []
    for example in examples:
        for response in example.responses:
            tokens = torch.tensor([example.prompt + response.tokens])
            pixels = None if example.image is None else example.image[None]
            logits = model.logits(pixels, tokens)[0, len(example.prompt) - 1 : -1]
            logp = logits.log_softmax(-1)[range(len(logits)), response.tokens]
            weight = torch.tensor(response.weight)
            scores.append((logp * weight).sum() / weight.sum())
            places += example.reference[len(scores) % 2 - 1 : len(scores) % 2 or None]
    scores, ref = torch.stack(scores), torch.tensor(places)
    losses, _, _ = ddpo.preference_loss(scores[0::2], scores[1::2], ref[0::2], ref[1::2], 0.5)
    torch.testing.assert_close(packed, losses.mean(), atol=1e-5, rtol=0)
    assert_close_gradients(gradients(packed, model), gradients(losses.mean(), model))


def test_shared_beginning_is_computed_once():
    apart, alike = tiny_pairs([True], [0]), tiny_pairs([True], [6])
    batch = collate(alike, PAD, 128)
    tokens = sum(len(r.tokens) for r in alike[0].responses)
    assert batch.tokens.shape[1] == len(alike[0].prompt) + tokens - 6 == data.row_length(alike[0])
    assert len(batch.target) == tokens  # a shared token counts in both responses
    assert data.row_length(apart[0]) == collate(apart, PAD, 128).tokens.shape[1]


# Padding ---------------------------------------------------------------------------------------


def blank_pairs(lengths: list[int], trunk: int) -> list[Example]:
    """Pairs of responses of about the given lengths, the rejected one a little longer."""
    pair = lambda n: [Response([3] + [4] * n, [1.0] * (n + 1)), Response([5] * (n + 4), [1.0] * (n + 4))]
    return [Example(f"row {i}", None, [1] * trunk, pair(n)) for i, n in enumerate(lengths)]


def rlhfv_lengths(count: int) -> list[int]:
    """Tokens of answers of 64 words in the mean, log-normal with deviation 0.5, 1.35 tokens each."""
    rng = Random(0)
    return [max(4, round(1.35 * 64 * rng.lognormvariate(-0.125, 0.5))) for _ in range(count)]


@pytest.mark.parametrize("micro_batch", [4, 8, 32])
@pytest.mark.parametrize("trunk", [616, 100])
def test_padding_is_below_a_tenth(trunk, micro_batch):
    examples = blank_pairs(rlhfv_lengths(1400), trunk)
    source = data.Epochs(examples, ddpo.DDPOConfig(batch_size=32), 0)
    slots = padding = 0
    for step in range(44):  # an epoch
        ordered = sorted(source.examples(step), key=data.row_length)
        for part in data.split(ordered, micro_batch):
            widths = [data.row_length(example) for example in part]
            slots += len(part) * max(widths)
            padding += len(part) * max(widths) - sum(widths)
    assert padding / slots < 0.1, padding / slots


@pytest.mark.parametrize("micro_batch", [4, 8, 32])
def test_padding_of_the_world_is_below_a_tenth(tokenizer, tiny, micro_batch):
    """Counted in the batches that the algorithm itself makes of noisy answers and corrections."""
    examples = []
    for i in range(320):
        scene = world.make_scene(f"padding {i}")
        said = world.annotate(scene, Random(f"padding {i}"))
        pair = data.Pair(f"row {i}", None, "What is here?", world.correct(scene, said), said)
        examples.append(data.pair_example(pair, None, tokenizer, 0))
    config = ddpo.DDPOConfig(batch_size=32, micro_batch=micro_batch)
    algorithm = ddpo.DDPO(tiny, config, 0, examples)
    batches = [batch for step in range(10) for batch in algorithm.batches(step)]
    slots = sum(batch.tokens.numel() for batch in batches)
    assert sum((batch.branch == -1).sum() for batch in batches) / slots < 0.1


def test_logged_padding_is_what_row_lengths_say():
    examples = tiny_pairs([True, False, True], [0, 3, 1])
    widths = [data.row_length(example) for example in examples]
    expected = 1 - sum(widths) / (len(widths) * max(widths))
    assert collate(examples, PAD, 128).padding == pytest.approx(expected)


@pytest.mark.parametrize("count, batch", [(100, 8), (64, 8), (5, 8), (101, 32)])
def test_epochs_show_every_row_once_and_depend_on_the_step_alone(count, batch):
    examples = blank_pairs([4 + i % 23 for i in range(count)], 10)
    config = ddpo.DDPOConfig(batch_size=batch, epochs=3)
    names = lambda source, step: [example.name for example in source.examples(step)]
    source = data.Epochs(examples, config, 0)
    seen = [name for step in range(source.steps) for name in names(source, step)]
    for epoch in range(3):
        assert len(set(seen[epoch * count : (epoch + 1) * count])) == count
    fresh, other = data.Epochs(examples, config, 0), data.Epochs(examples, config, 1)
    assert names(fresh, source.steps - 1) == names(source, source.steps - 1)
    assert seen[:count] != seen[count : 2 * count] and names(other, 0) != names(source, 0)


# Work ------------------------------------------------------------------------------------------


def count_flops(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_flops_of_a_step_at_7b():
    """Real shapes of LLaVA-1.5-7B on the meta device, full fine-tune: the work, without the numbers.

    Ours: trunk once, features of the frozen tower and reference scores cached. The usual way:
    chosen and rejected apart, with the tower, all logits, and a live reference.
    """
    with torch.device("meta"):
        model = LLaVA(LLaVAConfig())
    models.select_trainable(model)
    config, answers = model.config, [[3] * 100, [4] * 100]
    prompt = [1] + [config.image_token] * config.vision.patches + [5] * 39
    features = torch.zeros(config.vision.patches, config.vision.hidden_size)
    responses = [Response(answer, [1.0] * 100) for answer in answers]
    example = Example("row", features, prompt, responses, [0.0, 0.0])
    batch = collate([example], config.pad_token, 4096).to("meta")
    assert batch.tokens.shape == (1, 816)

    def ours():
        ddpo.pair_loss(model, batch, 0.5, True)[0].backward()

    pixels = torch.empty(2, 3, 336, 336, device="meta")
    tokens = torch.empty(2, 716, dtype=torch.long, device="meta")

    def usual_logp():
        logp = model.logits(pixels, tokens)[:, :-1].log_softmax(-1)
        return logp.gather(-1, tokens[:, 1:, None]).sum()

    def usual():
        with torch.no_grad():
            usual_logp()
        usual_logp().backward()

    def reference_pass():
        with torch.no_grad():
            ddpo.batch_scores(model, batch, True)

    step, theirs = count_flops(ours), count_flops(usual)
    once = count_flops(reference_pass)
    print(f"7B step: ours {step / 1e12:.1f} TFLOP, usual {theirs / 1e12:.1f}, reference once {once / 1e12:.1f}")
    assert theirs / step > 2.3
    assert theirs / (step + once / 3) > 2  # with the reference pass, over three epochs


# Generation ------------------------------------------------------------------------------------


def tiny_prompts(count: int) -> list[torch.Tensor]:
    return [torch.tensor([1, *range(5, 8 + i % 3), 20 + i]) for i in range(count)]


def test_finished_rows_are_dropped_and_change_nothing(monkeypatch):
    """Every answer is what the prompt alone would be given, also when most others have ended."""
    model, prompts = tiny_model_step(), tiny_prompts(8)
    kept = []
    keep = generation.Decoding.keep
    monkeypatch.setattr(
        generation.Decoding, "keep", lambda self, alive: (kept.append(len(alive)), keep(self, alive))
    )
    free = [generate(model, None, [p], 40)[0].tolist() for p in prompts]
    # end-of-sequence becomes a token that most answers contain early and some late or never
    common = max(range(3, 58), key=lambda t: sum(t in answer for answer in free))
    model.config = dataclasses.replace(model.config, eos_token=common)
    alone = [generate(model, None, [p], 40)[0].tolist() for p in prompts]
    assert len({len(answer) for answer in alone}) > 1 and not kept
    assert [a.tolist() for a in generate(model, None, prompts, 40)] == alone
    assert kept


def test_streamed_tokens_are_the_answers():
    model, steps = tiny_model_step(), []
    answers = generate(model, None, tiny_prompts(3), 12, on_token=lambda t: steps.append(t.clone()))
    streamed = torch.stack(steps, dim=-1)  # (3, 1, steps)
    assert [row[row != PAD].tolist() for row in streamed[:, 0]] == [a.tolist() for a in answers]


def test_choose_follows_the_distribution():
    logits = torch.log(torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])).expand(1, 4, -1)
    draws = torch.tensor([[0.0, 0.25, 0.9, 1 - 2**-24]])  # 1 - draw: 1, 0.75, 0.1, the least
    assert generation.choose(logits, 1.0, draws).tolist() == [[4, 4, 1, 1]]
    assert generation.choose(logits, 0.0, None).tolist() == [[3, 3, 3, 3]]
    uniform = torch.rand(1, 20000, generator=torch.Generator().manual_seed(0))
    drawn = generation.choose(logits[:, :1].expand(1, 20000, -1), 1.0, uniform)
    share = torch.bincount(drawn[0], minlength=6) / 20000
    assert (share - logits[0, 0].exp()).abs().max() < 0.02 and share[[0, 2, 5]].sum() == 0


def test_samples_of_a_prompt_do_not_depend_on_its_neighbours_end():
    model, prompts = tiny_model_step(), tiny_prompts(4)
    draw = lambda: generate(model, None, prompts, 30, 1.0, 2, torch.Generator().manual_seed(3))
    model.config = dataclasses.replace(model.config, eos_token=-1)  # no end
    longest = [a.tolist() for a in draw()]
    model.config = dataclasses.replace(model.config, eos_token=longest[0][2])
    for before, after in zip(longest, draw()):
        both = min(len(before), len(after))
        assert after.tolist()[:both] == before[:both]


def test_generation_under_autocast():
    model = tiny_model_step()
    with torch.autocast("cpu", torch.bfloat16):
        answers = generate(model, None, tiny_prompts(3), 5)
    assert all(1 <= len(answer) <= 5 for answer in answers)


def test_compiled_decoding_is_one_graph_for_all_steps(monkeypatch):
    """Static shapes: a second batch and later steps meet the graph that the first step made."""
    model, prompts = tiny_model_step(), tiny_prompts(3)
    plain = [a.tolist() for a in generate(model, None, prompts, 12, samples=2)]
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(generation.decode, backend=count, fullgraph=True, dynamic=False)
    monkeypatch.setattr(generation, "compiled", lambda: step)
    for _ in range(2):
        answers = generate(model, None, prompts, 12, samples=2, compiled=True)
        assert [a.tolist() for a in answers] == plain
    assert len(graphs) == 1


# The benchmarks --------------------------------------------------------------------------------


def test_step_benchmark():
    """On a tiny model; TRL need not be installed."""
    lines = []
    sizes = "--pairs 2 --repeats 1 --width 64 --layers 1 --tower_width 64 --tower_layers 2 --image 56"
    bench_step.table(bench_step.parse(sizes.split()), lines.append)
    text = "\n".join(lines)
    assert "M parameters; trunk" in text and "ours, recomputing" in text, text


# ======================================================================= checkpoint.py, vision.py

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

PIECES, CHECKPOINT_IMAGE, CHECKPOINT_PAD, ROWS = 800, 800, 801, 832
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 14, "projection_dim": 32,
}
CHECKPOINT_TEXT = {
    "vocab_size": ROWS, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": CHECKPOINT_PAD,
}
WORDS = (
    "A photo shows two red cars near the old bridge, and a small dog sleeps on green grass. "
    "What is in this image? Describe it in detail, please! USER: ASSISTANT: The people are "
    "walking 12345 67890 meters; it's 9:30 o'clock (maybe). café naïve über 日本 emoji 😀 "
)


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory) -> Path:
    """A sentencepiece model trained with LLaMA's settings."""
    rng, out = random.Random(0), io.BytesIO()
    words = WORDS.split()
    lines = [" ".join(rng.choices(words, k=12)) for _ in range(400)] + [WORDS]
    lines += ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=60)) for _ in range(400)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=PIECES, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, split_digits=True, num_threads=1, minloglevel=2,
        character_coverage=0.995, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(out.getvalue())
    return path


def public_model(seed=0, text=(), vision=(), **top):
    """A tiny random LlavaForConditionalGeneration whose logits are of order 1."""
    torch.manual_seed(seed)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**CHECKPOINT_TEXT | dict(text)),
        vision_config=transformers.CLIPVisionConfig(**VISION | dict(vision)),
        image_token_index=CHECKPOINT_IMAGE, pad_token_id=CHECKPOINT_PAD, **top,
    )
    config.pad_token_id = CHECKPOINT_PAD
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight[0].numel() ** -0.5)
            else:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model


@pytest.fixture(scope="module")
def public():
    return public_model()


@pytest.fixture(scope="module")
def folder_checkpoint(public, tokenizer_model, tmp_path_factory) -> Path:
    """The public model as a folder in the layout of the hub; not to be changed by a test."""
    return write_folder(tmp_path_factory.mktemp("hub") / "model", public, tokenizer_model, "hub")


def write_folder(path: Path, public, tokenizer_model: Path, layout: str) -> Path:
    """A model's folder, its tensors named as in one of the public layouts."""
    path.mkdir()
    shutil.copy(tokenizer_model, path)
    public.config.save_pretrained(path)
    weights = {rename(name, layout): w.clone() for name, w in public.state_dict().items()}
    save_file(weights, path / "model.safetensors")
    return path


def rename(name: str, layout: str) -> str:
    """A tensor's name in transformers >= 5 as an older release, or the original code, has it."""
    if layout == "modules":
        return name
    name = name.replace("model.vision_tower.", "model.vision_tower.vision_model.")
    if layout == "modules of 4.52":
        return name
    for new, old in RENAMES[layout]:
        if name.startswith(new):
            return old + name.removeprefix(new)
    raise AssertionError(name)


RENAMES = {
    "hub": [
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ],
    "original": [
        ("model.language_model.", "model."), ("lm_head.", "lm_head."),
        ("model.vision_tower.", "model.vision_tower.vision_tower."),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ],
}


def rows_of(seed=0, images=2, length=14):
    """(pixels, tokens, mask): rows of different length, the last without an image."""
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randn(images, 3, 28, 28, generator=rng)
    tokens = torch.randint(3, PIECES, (images + 1, length), generator=rng)
    tokens[:images, 2:6] = CHECKPOINT_IMAGE
    mask = torch.ones_like(tokens)
    for i in range(images + 1):
        mask[i, length - 3 * i :] = 0
    return pixels, tokens.masked_fill(mask == 0, CHECKPOINT_PAD), mask


def assert_equal_logits(ours, public, rows=ROWS, bound=1e-5):
    """The same fp32 logits: right-padded rows, with and without image, and a single text row."""
    pixels, tokens, mask = rows_of()
    with torch.no_grad():
        theirs = public(input_ids=tokens, pixel_values=pixels, attention_mask=mask).logits
        mine = ours.head(ours(pixels, tokens, branch=torch.where(mask == 1, 0, -1)))
        text = public(input_ids=tokens[-1:, :5]).logits - ours.logits(None, tokens[-1:, :5])
    assert theirs.std() > 0.1
    assert ((mine - theirs)[mask == 1][:, :rows]).abs().max() <= bound
    assert text[..., :rows].abs().max() <= bound


# ------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("layout", ["hub", "modules", "modules of 4.52"])
def test_llava_hf_layouts_give_equal_logits(public, tokenizer_model, tmp_path, layout):
    ours, *_ = checkpoint.load_llava(
        write_folder(tmp_path / "model", public, tokenizer_model, layout)
    )
    assert_equal_logits(ours, public)


@pytest.mark.parametrize(
    "changes",
    [
        {"text": {"num_key_value_heads": 2, "rope_theta": 5000.0}},
        {"text": {"num_key_value_heads": 1}, "vision_feature_layer": -1},
        {"vision": {"hidden_act": "gelu", "layer_norm_eps": 1e-3}, "vision_feature_layer": 1},
        {"projector_hidden_act": "linear"},
    ],
    ids=["grouped-query", "multi-query", "another tower", "linear projector"],
)
def test_shapes_are_configuration(tokenizer_model, tmp_path, changes):
    public = public_model(**changes)
    public.save_pretrained(tmp_path / "model")  # whatever layout this release of theirs writes
    shutil.copy(tokenizer_model, tmp_path / "model")
    assert_equal_logits(checkpoint.load_llava(tmp_path / "model")[0], public)


def write_original(path: Path, public, tokenizer_model: Path, projector="mlp2x_gelu") -> Path:
    """The public model as the original LLaVA code would have saved it, tower inside."""
    write_folder(path, public, tokenizer_model, "original")
    values = CHECKPOINT_TEXT | {
        "model_type": "llava_llama", "vocab_size": PIECES, "mm_vision_tower": "tiny-clip",
        "mm_projector_type": projector, "image_aspect_ratio": "pad", "rope_scaling": None,
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "pad_token_id": 0,
    }
    (path / "config.json").write_text(json.dumps(values))
    weights = load_file(path / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:PIECES].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    if projector == "linear":
        weights = {name: w for name, w in weights.items() if "mm_projector.2" not in name}
        for leaf in ("weight", "bias"):
            weights[f"model.mm_projector.{leaf}"] = weights.pop(f"model.mm_projector.0.{leaf}")
    save_file(weights, path / "model.safetensors")
    return path


def write_tower(path: Path, public) -> Path:
    """The vision tower as a whole CLIP in a folder of its own."""
    config = transformers.CLIPConfig(
        text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        vision_config=public.config.vision_config.to_dict(), projection_dim=32,
    )
    clip = transformers.CLIPModel(config)
    clip.save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    assert any(name.startswith("text_model.") for name in weights)
    for name, weight in public.model.vision_tower.state_dict().items():
        assert f"vision_model.{name}" in weights
        weights[f"vision_model.{name}"] = weight.clone()
    weights["vision_model.embeddings.position_ids"] = torch.arange(5)
    save_file(weights, path / "model.safetensors")
    return path


@pytest.mark.parametrize("included", [True, False])
def test_original_layout(public, tokenizer_model, tmp_path, included):
    path = write_original(tmp_path / "model", public, tokenizer_model)
    tower = write_tower(tmp_path / "tower", public)
    if included:
        (tower / "model.safetensors").unlink()
    else:
        weights = load_file(path / "model.safetensors")
        weights = {name: w for name, w in weights.items() if "vision_tower" not in name}
        save_file(weights, path / "model.safetensors")
    ours, tokenizer, settings = checkpoint.load_llava(path, tower=tower)
    assert (tokenizer.image_token, tokenizer.pad_token, settings.mode) == (CHECKPOINT_IMAGE, CHECKPOINT_PAD, "pad")
    assert ours.config.text.vocab_size == ROWS
    assert_equal_logits(ours, public, rows=PIECES)
    assert_saved_equal(ours, tokenizer, settings, tmp_path / "saved")


def test_original_layout_with_one_linear_projector(tokenizer_model, tmp_path):
    public = public_model(projector_hidden_act="linear")
    second = public.model.multi_modal_projector.linear_2
    with torch.no_grad():
        second.weight.copy_(torch.eye(len(second.weight)))
        second.bias.zero_()
    path = write_original(tmp_path / "model", public, tokenizer_model, "linear")
    loaded = checkpoint.load_llava(path, tower=write_tower(tmp_path / "tower", public))
    assert_equal_logits(loaded[0], public, rows=PIECES)
    assert_saved_equal(*loaded, tmp_path / "saved")


# ------------------------------------------------------------------------------------------- saving


def assert_saved_equal(ours, tokenizer, settings, path: Path, **options):
    """What we save opens in transformers without a word about keys, and says the same."""
    checkpoint.save_llava(ours, tokenizer, settings, path, **options)
    theirs, keys = transformers.LlavaForConditionalGeneration.from_pretrained(
        path, output_loading_info=True
    )
    assert not any(keys.values()), keys
    assert_equal_logits(ours, theirs.eval())


def test_saving_and_loading_again_changes_nothing(folder_checkpoint, tmp_path):
    ours, tokenizer, settings = checkpoint.load_llava(folder_checkpoint)
    assert_saved_equal(ours, tokenizer, settings, tmp_path / "a", shard_bytes=60_000)
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 3
    again, tokenizer, same = checkpoint.load_llava(tmp_path / "a")
    assert again.config == ours.config and same == settings
    checkpoint.save_llava(again, tokenizer, same, tmp_path / "a")  # over the file it is mapped from
    assert not list((tmp_path / "a").glob("model-*"))  # no shard of the earlier model stays
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
    third, *_ = checkpoint.load_llava(tmp_path / "a")
    for name, weight in checkpoint.base_weights(ours).items():
        assert torch.equal(weight, third.state_dict()[name]), name
    assert (tmp_path / "a/tokenizer.model").read_bytes() == tokenizer.model_proto


def test_dtype_is_the_stored_one_or_the_one_asked_for(folder_checkpoint, tmp_path):
    ours, tokenizer, settings = checkpoint.load_llava(folder_checkpoint, dtype=torch.bfloat16)
    assert {w.dtype for w in ours.parameters()} == {torch.bfloat16}
    checkpoint.save_llava(ours, tokenizer, settings, tmp_path / "a")
    stored, *_ = checkpoint.load_llava(tmp_path / "a")
    assert {w.dtype for w in stored.parameters()} == {torch.bfloat16}
    kind = transformers.LlavaForConditionalGeneration
    theirs = kind.from_pretrained(tmp_path / "a", dtype="auto")
    assert theirs.dtype == torch.bfloat16


def test_a_mapped_model_can_be_trained_and_its_file_stays_as_it_is(folder_checkpoint):
    before = (folder_checkpoint / "model.safetensors").read_bytes()
    ours, *_ = checkpoint.load_llava(folder_checkpoint)
    with torch.no_grad():
        for weight in models.select_trainable(ours, tower=True):
            weight.add_(1)
    assert (folder_checkpoint / "model.safetensors").read_bytes() == before


def test_public_model_shapes_of_7b_and_13b():
    """The real shapes, on the meta device, from the sparse config.json of the hub."""
    for text, count in (
        ({}, 7_063_427_072),
        ({"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
          "num_attention_heads": 40}, 13_351_494_656),
    ):  # fmt: skip
        text = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5} | text  # fmt: skip
        values = {"model_type": "llava", "pad_token_id": 32001, "text_config": text}
        with torch.device("meta"):
            ours = models.LLaVA(layouts.llava_hf_config(Path("config.json"), values))
            theirs = transformers.LlavaForConditionalGeneration(
                transformers.LlavaConfig(text_config=transformers.LlamaConfig(**text))
            )
        assert sum(w.numel() for w in ours.parameters()) == count
        assert sum(w.numel() for w in theirs.parameters()) == count


# --------------------------------------------------------------------------------------- generation


def test_greedy_answers_are_those_of_transformers(folder_checkpoint, public):
    ours, *_ = checkpoint.load_llava(folder_checkpoint)
    rng = random.Random(0)
    lengths = [rng.randrange(2, 12) for _ in range(20)]
    prompts = [[1] + [rng.randrange(3, PIECES) for _ in range(length)] for length in lengths]
    for prompt in prompts[::2]:  # every other one has an image
        prompt[1:1] = [CHECKPOINT_IMAGE] * 4
    pixels = torch.randn(10, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    mine = models.generate(ours, pixels, [torch.tensor(p) for p in prompts], max_new_tokens=24)
    steps = set()
    for i, prompt in enumerate(prompts):
        image = {"pixel_values": pixels[i // 2 : i // 2 + 1]} if i % 2 == 0 else {}
        theirs = public.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **image,
            do_sample=False, max_new_tokens=24, suppress_tokens=[CHECKPOINT_IMAGE, CHECKPOINT_PAD],
        )[0, len(prompt) :]
        assert mine[i].tolist() == theirs.tolist()
        steps.add(len(theirs))
    assert 24 in steps


# ----------------------------------------------------------------------------------------- adapters


def randomise(weights, seed=0):
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in weights:
            weight.copy_(torch.randn(weight.shape, generator=rng) * 0.1)


def test_our_adapter_in_peft(folder_checkpoint, public, tmp_path):
    ours, tokenizer, settings = checkpoint.load_llava(folder_checkpoint)
    models.add_adapter(ours, "policy", rank=4, alpha=6, seed=1)
    models.add_adapter(ours, "critic", rank=2, alpha=2, targets=("q_proj", "v_proj"), seed=2)
    assert_equal_logits(ours, public)
    for name in ("policy", "critic"):
        with models.use_adapter(ours, name):
            assert_equal_logits(ours, public)  # B is zero as yet
        randomise(models.select_trainable(ours, name))
        checkpoint.save_adapter(ours, name, tmp_path / name, base=folder_checkpoint)
    assert_equal_logits(ours, public)
    for name in ("policy", "critic"):
        theirs = peft.PeftModel.from_pretrained(public_model(), tmp_path / name)
        with models.use_adapter(ours, name):
            assert_equal_logits(ours, theirs)
            with pytest.raises(AssertionError):
                assert_equal_logits(ours, public)
    checkpoint.save_llava(ours, tokenizer, settings, tmp_path / "merged", adapter="critic")
    merged, *_ = checkpoint.load_llava(tmp_path / "merged")
    assert_equal_logits(merged, theirs.merge_and_unload(), bound=2e-5)
    models.merge_adapter(ours, "critic")
    assert_equal_logits(ours, theirs, bound=2e-5)
    assert models.carriers(ours, "policy")
    with pytest.raises(ValueError, match="there are: policy$"):
        models.carriers(ours, "critic")


@pytest.mark.parametrize("targets", ["(q_proj|k_proj|down_proj)", "1.*up_proj"])
def test_their_adapter_here(folder_checkpoint, tmp_path, targets):
    # Bare names would match the tower's projections too, which carry no adapters here.
    pattern = rf".*language_model.*\.{targets}"
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=pattern)
    theirs = peft.get_peft_model(public_model(), config)
    randomise(w for w in theirs.parameters() if w.requires_grad)
    theirs.save_pretrained(tmp_path / "adapter")
    ours, *_ = checkpoint.load_llava(folder_checkpoint)
    checkpoint.load_adapter(ours, tmp_path / "adapter", "sft")
    with models.use_adapter(ours, "sft"):
        assert_equal_logits(ours, theirs.eval())
    checkpoint.save_adapter(ours, "sft", tmp_path / "again")
    again = peft.PeftModel.from_pretrained(public_model(), tmp_path / "again")
    with models.use_adapter(ours, "sft"):
        assert_equal_logits(ours, again.eval())
    before = load_file(tmp_path / "adapter/adapter_model.safetensors")
    after = load_file(tmp_path / "again/adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_lora_from_public_layout_to_public_layout(photos, tokenizer_model, tmp_path, capsys):
    """`--algo ddpo --lora`, as somebody with llava-hf weights and corrections would start it."""
    long = {"text": {"max_position_embeddings": 512}}
    base = write_folder(tmp_path / "base", public_model(**long), tokenizer_model, "hub")
    parquet = tmp_path / "rows-0.parquet"
    assert convert.main(["convert", str(photos / "rows.jsonl"), str(parquet)]) == 0
    for out, rows_ in (("lines", photos / "*.jsonl"), ("parquet", tmp_path / "rows-*.parquet")):
        assert train.main(["--algo", "ddpo", "--lora", "4", "--model", str(base), "--steps", "3",
                           "--data", str(rows_), "--images", str(photos), "--learning_rate", "1e-2",
                           "--device", "cpu", "--out", str(tmp_path / out)]) == 0
    run = tmp_path / "lines"
    assert same_weights(run / "model", tmp_path / "parquet" / "model")

    theirs, told = transformers.LlavaForConditionalGeneration.from_pretrained(
        run / "model", output_loading_info=True)
    assert not any(told.values())
    processor = transformers.AutoProcessor.from_pretrained(run / "model")
    start = transformers.LlavaForConditionalGeneration.from_pretrained(base)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(start), run / "adapter")
    ours, tokenizer, settings = checkpoint.load_llava(run / "model")
    pair = read_pairs([photos / "rows.jsonl"])[1]
    picture, text = open_image("row", pair.image), data.prompt_text(pair.question)
    inputs = processor(images=picture, text=text, return_tensors="pt")
    prompt = data.prompt_tokens(tokenizer, text, ours.config.vision.patches)
    assert inputs["input_ids"][0].tolist() == prompt
    with torch.no_grad():
        mine = ours.logits(ask.pixels_of([picture], settings), torch.tensor([prompt]))
        merged, apart, before = (each.eval()(**inputs).logits for each in (theirs, adapted, start))
    assert (mine - merged)[..., :ROWS].abs().max() <= 1e-4
    assert (mine - apart)[..., :ROWS].abs().max() <= 1e-4
    assert (mine - before)[..., :ROWS].abs().max() > 0.1  # something was learnt


def test_adapters_are_drawn_from_their_seed_alone(folder_checkpoint):
    drawn = []
    for seed in (3, 3, 4):
        torch.rand(1)
        ours, *_ = checkpoint.load_llava(folder_checkpoint)
        models.add_adapter(ours, "a", rank=4, alpha=4, seed=seed)
        drawn.append(torch.cat([w.flatten() for w in models.select_trainable(ours, "a")]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_gradients_with_checkpointing_are_those_of_the_adapter_in_use(folder_checkpoint):
    """Backward runs after the `with` block and recomputes: it must still see the same adapter."""
    grads = []
    for checkpointing in (False, True):
        ours, *_ = checkpoint.load_llava(folder_checkpoint)
        ours.decoder.gradient_checkpointing = checkpointing
        for seed, name in enumerate(("policy", "critic")):
            models.add_adapter(ours, name, rank=2, alpha=2, seed=seed)
            randomise(models.select_trainable(ours, name), seed)
        weights = models.select_trainable(ours, "policy")
        pixels, tokens, _ = rows_of()
        with models.use_adapter(ours, "policy"):
            loss = ours.logits(pixels, tokens).square().mean()
        with models.use_adapter(ours, "critic"):
            loss.backward()
        grads.append(torch.cat([w.grad.flatten() for w in weights]))
        assert all(w.grad is None for n, w in ours.named_parameters() if ".policy." not in n)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[0], grads[1])


# -------------------------------------------------------------------------------- tokens and pixels


@pytest.fixture(scope="module")
def saved(folder_checkpoint, tmp_path_factory):
    """(folder that we saved, our tokenizer, AutoTokenizer and AutoProcessor of that folder)."""
    path = tmp_path_factory.mktemp("saved") / "model"
    ours, tokenizer, settings = checkpoint.load_llava(folder_checkpoint)
    checkpoint.save_llava(ours, tokenizer, ImageSettings(28, mode="pad"), path)
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    processor = transformers.AutoProcessor.from_pretrained(path, backend="pil")
    return SimpleNamespace(path=path, tokenizer=tokenizer, theirs=theirs, processor=processor)


TEXTS = [
    "", " ", "  ", " leading", "trailing ", "two  spaces", "\n", "\n\n x", "a\nb\r\n\tc", "😀",
    "👩‍👩‍👧‍👦 ok", "日本語のテキスト", "naïve café", "e\u0301", "\u00a0nbsp\u3000wide", "2024 1,000.50",
    "ﬁ 𝔘𝔫𝔦", "a\x00b", "<", "<imag", "<0x0A>", "ALL CAPS and MiXeD", "<image>", "<image><image>",
    " <image> ", "a<image>b", "a <image> b", "a\n<image>\nb", "<image>\n\nWhat?", WORDS,
    data.prompt_text("What is in this image?"),
]


def test_token_ids_are_those_of_transformers(saved):
    rng = random.Random(0)
    alphabet = " \n\tabcdeé日😀.,!?<>'\"0123"
    drawn = ["".join(rng.choices(alphabet, k=rng.randrange(30))) for _ in range(500)]
    pieces = [rng.choices([*WORDS.split(), "<image>", " ", "\n"], k=8) for _ in range(200)]
    for text in TEXTS + drawn + ["".join(words) for words in pieces]:
        ids = saved.tokenizer.encode(text, bos=True)
        assert ids == saved.theirs(text).input_ids, repr(text)
        assert saved.tokenizer.decode(ids) == text


def test_marks_written_in_a_text_are_ordinary_characters(saved):
    """Where we differ from transformers: a text cannot end an answer or pass for padding."""
    for text in ("a</s>b", "<s>", "<pad>", "<unk>"):
        ids = saved.tokenizer.encode(text)
        assert not {0, 1, 2, CHECKPOINT_PAD} & set(ids) and saved.tokenizer.decode(ids) == text


def test_the_labels_are_the_answer_as_transformers_tokenizes_the_conversation(saved):
    """Prompt and answer tokenized apart must be the whole tokenized at once, or labels shift."""
    for answer in ("Two red cars.", "The bridge is old, and 日本 😀.", "No"):
        text = data.prompt_text("What is in this image?")
        whole = saved.theirs(f"{text} {answer}</s>").input_ids
        prompt = data.prompt_tokens(saved.tokenizer, text, patches=1)
        tokens = saved.tokenizer.encode(answer, eos=True)
        assert prompt + tokens == whole
        example = data.Example("row", None, prompt, [data.Response(tokens, [1.0] * len(tokens))])
        batch = data.collate([example], CHECKPOINT_PAD, 1000)
        assert batch.target.tolist() == whole[-len(tokens) :] and batch.target[-1] == 2


def pictures() -> dict[str, Image.Image]:
    rng = torch.Generator().manual_seed(0)
    noise = lambda h, w: torch.randint(0, 256, (h, w, 3), generator=rng, dtype=torch.uint8).numpy()
    photo = Image.fromarray(noise(9, 13)).resize((331, 217), Image.Resampling.BICUBIC)
    turned = photo.copy()
    turned.getexif()[0x0112] = 6
    file = io.BytesIO()
    turned.save(file, "JPEG", exif=turned.getexif(), quality=95)
    jpeg = Image.open(file)
    palette = photo.convert("P")
    palette.info["transparency"] = 3
    alpha = photo.convert("RGBA")
    alpha.putalpha(photo.convert("L"))
    return {
        "landscape": photo, "portrait": photo.transpose(Image.Transpose.ROTATE_90),
        "square": photo.resize((97, 97)), "small": Image.fromarray(noise(5, 7)),
        "noise": Image.fromarray(noise(101, 67)), "grey": photo.convert("L"),
        "grey with alpha": photo.convert("LA"), "alpha": alpha, "cmyk": photo.convert("CMYK"),
        "palette": photo.convert("P"), "palette with alpha": palette, "one bit": photo.convert("1"),
        "exif, as stored": jpeg, "exif, upright": ImageOps.exif_transpose(jpeg),
        "one wide": Image.fromarray(noise(90, 1)), "one high": Image.fromarray(noise(1, 50)),
        "one pixel": Image.fromarray(noise(1, 1)), "exact": Image.fromarray(noise(28, 28)),
    }


@pytest.mark.parametrize("mode", ["pad", "crop"])
@pytest.mark.parametrize("size", [28, 336])
def test_pixels_are_those_of_the_public_processors(folder_checkpoint, tmp_path, mode, size):
    values = layouts.image_processor(ImageSettings(size, mode=mode))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    for name, picture in pictures().items():
        wanted = theirs(picture, return_tensors="pt").pixel_values[0]
        mine = preprocess(picture, size, mode=mode)
        assert mine.shape == (3, size, size)
        assert (mine - wanted).abs().max() < 1e-5, name


def test_a_picture_too_long_to_scale_whole_is_scaled_by_its_middle(monkeypatch):
    for picture in (Image.new("RGB", (1, 30_000), "red"), Image.new("RGB", (30_000, 1), "red")):
        assert preprocess(picture, 336, mode="crop").shape == (3, 336, 336)
    photo = pictures()["landscape"]
    whole = preprocess(photo, 112, mode="crop")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    assert (whole - preprocess(photo, 112, mode="crop")).abs().max() < 0.02  # one level of 255


def test_the_processor_makes_the_inputs_that_we_make(saved):
    picture = pictures()["landscape"]
    text = data.prompt_text("What is in this image?")
    theirs = saved.processor(images=picture, text=text, return_tensors="pt")
    assert theirs.input_ids[0].tolist() == data.prompt_tokens(saved.tokenizer, text, patches=4)
    assert (theirs.pixel_values[0] - preprocess(picture, 28, mode="pad")).abs().max() < 1e-5


# ---------------------------------------------------------------------------------------- bad input


def edit_json(path: Path, **changes):
    values = json.loads(path.read_text())
    for key, value in changes.items():
        *sections, last = key.split("__")
        inner = values
        for section in sections:
            inner = inner[section]
        inner[last] = value
    path.write_text(json.dumps(values))


def edit_weights(path: Path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


LM = "language_model.lm_head.weight"
BAD_FOLDERS = {
    "truncated": (
        lambda f: os.truncate(f / "model.safetensors", 9000),
        r"model\.safetensors: not a whole safetensors file",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "missing": (
        lambda f: edit_weights(f / "model.safetensors", lambda w: w.pop(LM)), f"1 missing .{LM}"
    ),
    "unexpected": (
        lambda f: edit_weights(f / "model.safetensors", lambda w: w.update(x=torch.ones(1))),
        r"1 unexpected .x",
    ),
    "two layouts": (
        lambda f: edit_weights(
            f / "model.safetensors", lambda w: w.update({"lm_head.weight": w[LM].clone()})
        ),
        "1 stored twice",
    ),
    "integers": (
        lambda f: edit_weights(f / "model.safetensors", lambda w: w.update({LM: w[LM].char()})),
        f"no float .{LM} I8",
    ),
    "config of another model": (
        lambda f: edit_json(f / "config.json", text_config__intermediate_size=81),
        r"9 mis-shaped .*gate_proj.weight \(80, 48\), not \(81, 48\)",
    ),
    "more layers": (
        lambda f: edit_json(f / "config.json", text_config__num_hidden_layers=4), "9 missing"
    ),
    "half a config": (
        lambda f: (f / "config.json").write_text('{"text_config": '), "config.json: not valid JSON"
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "not a LLaVA": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "neither a llava-hf"
    ),
    "scaled rope": (
        lambda f: edit_json(f / "config.json", text_config__rope_scaling={"type": "linear"}),
        "config.json: rope_scaling is",
    ),
    "biases": (
        lambda f: edit_json(f / "config.json", text_config__attention_bias=True),
        "config.json: attention_bias is True",
    ),
    "whole-sequence features": (
        lambda f: edit_json(f / "config.json", vision_feature_select_strategy="full"), "'full'"
    ),
    "no such layer": (
        lambda f: edit_json(f / "config.json", vision_feature_layer=-9), "3 layers"
    ),
    "no heads": (
        lambda f: edit_json(f / "config.json", text_config__num_attention_heads=0),
        "num_attention_heads is 0",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model: no such file"),
    "broken tokenizer": (
        lambda f: (f / "tokenizer.model").write_bytes(b"version https://git-lfs"),
        "tokenizer.model: not a sentencepiece model",
    ),
    "another tokenizer": (
        lambda f: edit_json(f / "config.json", image_token_index=790), "belongs to another model"
    ),
    "image size": (
        lambda f: (f / "preprocessor_config.json").write_text('{"crop_size": 224}'),
        "crop_size is 224, but the tower takes 28",
    ),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_bad_folder_is_one_sentence(folder_checkpoint, tmp_path, name):
    spoil, message = BAD_FOLDERS[name]
    shutil.copytree(folder_checkpoint, tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        checkpoint.load_llava(tmp_path / "model")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_index_that_names_a_missing_shard(folder_checkpoint, tmp_path):
    checkpoint.save_llava(*checkpoint.load_llava(folder_checkpoint), tmp_path / "m", shard_bytes=60_000)
    shard = sorted((tmp_path / "m").glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"names {shard.name}"):
        checkpoint.load_llava(tmp_path / "m")


def test_pickles_are_refused_with_the_command_that_converts_them(folder_checkpoint, public, tmp_path):
    shutil.copytree(folder_checkpoint, tmp_path / "m")
    weights = load_file(tmp_path / "m/model.safetensors")
    (tmp_path / "m/model.safetensors").unlink()
    names = sorted(weights)
    for i, part in enumerate((names[:40], names[40:]), 1):
        tensors = {name: weights[name] for name in part}
        torch.save(tensors, tmp_path / f"m/pytorch_model-0000{i}-of-00002.bin")
    with pytest.raises(ValueError, match="python checkpoint.py") as caught:
        checkpoint.load_llava(tmp_path / "m")
    command = str(caught.value).partition("python ")[2].split()
    where = Path(checkpoint.__file__).parent
    subprocess.run([sys.executable, *command], check=True, cwd=where, capture_output=True)
    assert_equal_logits(checkpoint.load_llava(tmp_path / "m")[0], public)


def test_converting_runs_no_code_from_a_pickle(tmp_path):
    torch.save({"weight": Path("x")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a plain file of weights"):
        files.convert_pickles(tmp_path)


def test_adapters_for_another_base_are_refused(folder_checkpoint, tmp_path, tokenizer_model):
    ours, tokenizer, settings = checkpoint.load_llava(folder_checkpoint)
    models.add_adapter(ours, "a", rank=2, alpha=2)
    checkpoint.save_adapter(ours, "a", tmp_path / "a", base="my-llava")
    half, *_ = checkpoint.load_llava(folder_checkpoint, dtype=torch.bfloat16)
    checkpoint.load_adapter(half, tmp_path / "a", "a")  # rounding does not make another base
    with torch.no_grad():
        ours.head.weight.add_(1)
    with pytest.raises(ValueError, match="other base weights than these, those of my-llava"):
        checkpoint.load_adapter(ours, tmp_path / "a", "b")
    for changes in ({"intermediate_size": 64}, {"num_hidden_layers": 4}):
        config = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.up_proj")
        peft.get_peft_model(public_model(text=changes), config).save_pretrained(tmp_path / "b")
        with pytest.raises(ValueError, match="an adapter for another model"):
            checkpoint.load_adapter(ours, tmp_path / "b", "b")
    edit_json(tmp_path / "a/adapter_config.json", use_dora=True)
    with pytest.raises(ValueError, match="use_dora is True"):
        checkpoint.load_adapter(ours, tmp_path / "a", "b")


def test_unknown_adapter_names_are_told_apart(folder_checkpoint):
    ours, *_ = checkpoint.load_llava(folder_checkpoint)
    models.add_adapter(ours, "policy", rank=2, alpha=2)
    with pytest.raises(ValueError, match="no adapter named 'polcy'; there are: policy"):
        with models.use_adapter(ours, "polcy"):
            pass
    with pytest.raises(ValueError, match="already"):
        models.add_adapter(ours, "policy", rank=2, alpha=2)
    with pytest.raises(ValueError, match="called qproj"):
        models.add_adapter(ours, "b", rank=2, alpha=2, targets=["qproj"])


# ------------------------------------------------------------------------------------- resume state


def test_state_comes_back_as_it_was(tmp_path):
    weight = torch.nn.Parameter(torch.randn(5))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    state = {
        "step": 7, "weights": {"w": weight.detach()}, "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(), "python": random.getstate(), "none": None,
    }
    for step in (7, 12, 100):
        checkpoint.save_state(tmp_path / f"checkpoint-{step}", state | {"step": step})
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoint.latest_state(tmp_path) == tmp_path / "checkpoint-100"
    again = checkpoint.load_state(checkpoint.latest_state(tmp_path))
    assert again["step"] == 100 and again["python"] == random.getstate()
    assert torch.equal(again["weights"]["w"], weight) and torch.equal(again["rng"], state["rng"])
    optimizer.load_state_dict(again["optimizer"])
    assert checkpoint.latest_state(tmp_path / "nothing") is None


def test_a_save_that_is_cut_short_leaves_the_old_state_or_none(tmp_path, monkeypatch):
    target = tmp_path / "checkpoint-1"
    checkpoint.save_state(target, {"step": 1})
    save = torch.save
    for error in (OSError, KeyboardInterrupt):

        def broken(state, file):
            save(state, file)
            raise error

        monkeypatch.setattr(torch, "save", broken)
        for name in ("checkpoint-1", "checkpoint-2"):
            with pytest.raises(error):
                checkpoint.save_state(tmp_path / name, {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert checkpoint.load_state(target) == {"step": 1}


def test_a_state_that_cannot_be_read_back(tmp_path):
    with pytest.raises(TypeError, match=r"state\['config'\] is a PosixPath"):
        checkpoint.save_state(tmp_path / "checkpoint-1", {"config": Path("x")})
    with pytest.raises(FileNotFoundError, match="no such file"):
        checkpoint.load_state(tmp_path / "checkpoint-1")
    checkpoint.save_state(tmp_path / "checkpoint-1", {"w": torch.ones(1000)})
    file = tmp_path / "checkpoint-1/state.pt"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be resumed from"):
        checkpoint.load_state(tmp_path / "checkpoint-1")


def test_a_folder_of_something_else_is_not_overwritten(folder_checkpoint, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        checkpoint.save_llava(*checkpoint.load_llava(folder_checkpoint), tmp_path)
    assert (tmp_path / "thesis.tex").exists()


# ======================================================================================= kernels/

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# On a GPU the Triton kernels run here. On a CPU they run in a process of their own with
# TRITON_INTERPRET=1, which makes their compilation (tested here too) impossible.
backends = pytest.mark.parametrize(
    "backend",
    [
        pytest.param("torch", id="backend_torch"),
        pytest.param(
            "triton",
            id="backend_triton",
            marks=pytest.mark.skipif(
                DEVICE == "cpu" and not INTERPRETED, reason="run by test_kernels_interpreted"
            ),
        ),
    ],
)
methods = pytest.mark.parametrize("method", kernels.METHODS)

SHAPES = [  # R, V, D: ragged against tiles of 128 x 256 x 64, blocks of 4096 and rows of 64
    (1, 1, 1),
    (3, 2, 5),
    (130, 257, 64),
    (127, 300, 33),
    (40, 4099, 16),
    (4, 32000, 32),
    (4, 32064, 32),
    (6, 300, 4096),
    (6, 70, 5120),
]


@pytest.fixture(params=["whole", "pieces"])
def pieces(request, monkeypatch):
    """Once as shipped, once cut so that small inputs take several chunks and slices."""
    if request.param == "pieces":
        monkeypatch.setattr(fused, "chunk_rows", lambda weight: 7)
        monkeypatch.setattr(fused, "slice_columns", lambda hidden: 200)
    return request.param


def dtypes_of(backend, shape, pieces):
    """All three, but for Triton's interpreter: tl.dot gives garbage on bfloat16 there (3.9), and
    a large vocabulary takes it seconds."""
    if backend == "torch" or not INTERPRETED:
        return (torch.float32, torch.float16, torch.bfloat16)
    if shape[1] < 1000:
        return (torch.float32, torch.float16)
    return (torch.float16,) if pieces == "whole" else ()


def make_head(R, V, D, dtype, seed=0):
    """Hidden states, a vocabulary matrix that gives logits of size 3, targets."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(R, D, generator=generator)
    weight = torch.randn(V, D, generator=generator) * 3 / math.sqrt(D)
    target = torch.randint(V, (R,), generator=generator)
    hidden, weight = (x.to(DEVICE, dtype).requires_grad_() for x in (hidden, weight))
    return hidden, weight, target.to(DEVICE)


def make_pairs(R, pairs, seed=0):
    """Segment weights, groups of uneven length, reference scores."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.where(torch.rand(R, generator=generator) < 0.3, 5.0, 1.0)
    extra = torch.randint(2 * pairs, (R - 2 * pairs,), generator=generator)
    group = torch.cat([torch.arange(2 * pairs), extra]).sort().values
    scores = torch.randn(2 * pairs, generator=generator) - 5
    return weight.to(DEVICE), group.to(DEVICE), scores.to(DEVICE)


def exact(*tensors):
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def assert_within(ours, plain, truth, dtype, what):
    """ours is no further from the truth than plain is, but for chance: another order of the same
    sum may round a logit the other way. One rounding (float32: 1e-6) more is allowed."""

    def error(x):
        return (x.detach().double() - truth).norm().item()

    slack = max(torch.finfo(dtype).eps / 2, 1e-6) * truth.norm().item() + 1e-12
    assert error(ours) <= error(plain) + slack, f"{what}, {dtype}: {error(ours)} > {error(plain)}"


# token_logp ----------------------------------------------------------------------------------


@backends
@methods
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_token_logp_ragged(shape, method, backend, pieces):
    for dtype in dtypes_of(backend, shape, pieces):
        hidden, weight, target = make_head(*shape, dtype)
        upstream = torch.linspace(-1, 1, shape[0], device=DEVICE)
        wide = exact(hidden, weight)

        ours = kernels.token_logp(hidden, weight, target, method, backend)
        plain, truth = (reference.token_logp(*x, target) for x in ((hidden, weight), wide))
        assert ours.dtype == torch.float32 and ours.shape == target.shape
        assert_within(ours, plain, truth, dtype, "log p")
        gradients = [
            torch.autograd.grad((logp * upstream).sum(), inputs)
            for logp, inputs in ((ours, (hidden, weight)), (plain, (hidden, weight)), (truth, wide))
        ]
        for name, *three in zip(("dH", "dW"), *gradients):
            assert three[0].dtype == dtype
            assert_within(*three, dtype, name)


@backends
def test_kernels_token_logp_large_logits(backend):
    """The online softmax subtracts the peak: logits of 10,000 are no matter, nor are equal ones."""
    hidden = torch.tensor([[100.0, 0.0], [-100.0, 0.0], [0.0, 0.0]], device=DEVICE)
    weight = torch.tensor([[100.0, 0.0], [99.0, 0.0], [-100.0, 0.0]], device=DEVICE)
    logp = kernels.token_logp(hidden, weight, torch.tensor([1, 2, 0], device=DEVICE), None, backend)
    assert logp.tolist() == pytest.approx([-100.0, 0.0, -math.log(3)])


@backends
def test_kernels_many_tiles(backend):
    """More than one group of 8 row tiles, in the order that tl.swizzle2d gives them."""
    hidden, weight, target = make_head(11 * 64 + 3, 150, 8, torch.float32)
    with torch.no_grad():
        ours = kernels.token_logp(hidden, weight, target, None, backend)
    assert torch.allclose(ours, reference.token_logp(hidden, weight, target), atol=1e-5)


@backends
@methods
def test_kernels_without_rows_or_gradient(method, backend):
    hidden, weight, target = make_head(20, 30, 8, torch.float32)
    empty = kernels.token_logp(hidden[:0], weight, target[:0], method, backend)
    assert empty.shape == (0,)
    empty.sum().backward()
    assert not weight.grad.any()
    with torch.no_grad():
        silent = kernels.token_logp(hidden, weight, target, method, backend)
    assert not silent.requires_grad
    graded = kernels.token_logp(hidden, weight, target, method, backend)
    assert graded.requires_grad and torch.allclose(silent, graded, rtol=1e-5, atol=1e-5)


# ddpo_loss -----------------------------------------------------------------------------------


def by_hand(logp, weights, group, scores_ref, beta, normalize):
    """Eq. 5 and Eq. 3 of RLHF-V, token by token in Python floats."""
    sums, totals = [0.0] * len(scores_ref), [0.0] * len(scores_ref)
    for value, weight, k in zip(logp.tolist(), weights.tolist(), group.tolist()):
        sums[k] += weight * value
        totals[k] += weight
    scores = [s / n if normalize else s for s, n in zip(sums, totals)]
    rewards = [beta * (s - r) for s, r in zip(scores, scores_ref.tolist())]
    chosen, rejected = rewards[0::2], rewards[1::2]
    losses = [math.log1p(math.exp(r - c)) for c, r in zip(chosen, rejected)]
    return sum(losses) / len(losses), chosen, rejected, scores


@backends
@methods
@pytest.mark.parametrize("normalize", [True, False])
def test_kernels_ddpo_by_hand(normalize, method, backend, pieces):
    hidden, weight, target = make_head(61, 40, 8, torch.float32)
    weights, group, scores_ref = make_pairs(61, 4)
    scores_ref = scores_ref if normalize else 20 * scores_ref
    wide_hidden, wide_weight = exact(hidden.detach(), weight.detach())
    logits = wide_hidden @ wide_weight.T
    logp = [row[t] - row.exp().sum().log() for row, t in zip(logits, target)]

    expected = by_hand(torch.stack(logp), weights, group, scores_ref, 0.2, normalize)
    result = kernels.ddpo_loss(
        hidden, weight, target, weights, group, scores_ref, 0.2, normalize, method, backend
    )
    for ours, truth in zip(result, expected):
        assert ours.dtype == torch.float32
        assert ours.tolist() == pytest.approx(truth, rel=1e-5, abs=1e-5)
    assert [x.requires_grad for x in result] == [True, False, False, False]


@backends
@methods
@pytest.mark.parametrize("shape", SHAPES[3:], ids=str)
def test_kernels_ddpo_gradients(shape, method, backend, pieces):
    weights, group, scores_ref = make_pairs(shape[0], min(4, shape[0] // 2))
    for dtype in dtypes_of(backend, shape, pieces):
        hidden, weight, target = make_head(*shape, dtype)
        wide = exact(hidden, weight)
        results, gradients = [], []
        for function, inputs, more in (
            (kernels.ddpo_loss, (hidden, weight), dict(method=method, backend=backend)),
            (reference.ddpo_loss, (hidden, weight), {}),
            (reference.ddpo_loss, wide, {}),
        ):
            numbers = (weights, scores_ref) if inputs is not wide else exact(weights, scores_ref)
            results.append(function(*inputs, target, numbers[0], group, numbers[1], 0.5, **more))
            # 1024 keeps plain float16 clear of its smallest numbers, as a loss scale would.
            gradients.append(torch.autograd.grad(1024 * results[-1][0], inputs))
        for name, *three in zip(("loss", "chosen", "rejected", "scores"), *results):
            assert_within(*three, dtype, name)
        for name, *three in zip(("dH", "dW"), *gradients):
            assert three[0].dtype == dtype
            assert_within(*three, dtype, name)


@methods
def test_kernels_ddpo_small_coefficients_survive_float16(method):
    """beta / (P N) here is far below what float16 can hold; a loss scale brings it back exactly."""
    weights, group, scores_ref = make_pairs(60, 4)
    hidden, weight, target = make_head(60, 50, 16, torch.float16)
    wide = exact(hidden, weight)
    pairs = (weights, group, scores_ref, 1e-6)
    loss = kernels.ddpo_loss(hidden, weight, target, *pairs, method=method)
    truth = reference.ddpo_loss(*wide, target, *exact(weights), group, *exact(scores_ref), 1e-6)
    scale = 2.0**24
    ours = torch.autograd.grad(loss[0] * scale, (hidden, weight))
    expected = torch.autograd.grad(truth[0] * scale, wide)
    for a, b in zip(ours, expected):
        assert float((a - b).norm() / b.norm()) < 3e-3


@backends
@methods
def test_kernels_frozen_parts(method, backend, pieces):
    """No dW for a frozen head, no dH for frozen hidden states; the other one does not change."""
    weights, group, scores_ref = make_pairs(50, 3)
    args = (weights, group, scores_ref, 0.5, True, method, backend)
    hidden, weight, target = make_head(50, 200, 8, torch.float32)

    def gradients(*trained):
        for tensor in (hidden, weight):
            tensor.grad = None
            tensor.requires_grad_(any(tensor is t for t in trained))
        kernels.ddpo_loss(hidden, weight, target, *args)[0].backward()
        kernels.token_logp(hidden, weight, target, method, backend).sum().backward()
        return hidden.grad, weight.grad

    d_hidden, d_weight = gradients(hidden, weight)
    head_frozen, rest_frozen = gradients(hidden), gradients(weight)
    assert head_frozen[1] is None and torch.equal(head_frozen[0], d_hidden)
    assert rest_frozen[0] is None and torch.equal(rest_frozen[1], d_weight)


@backends
@methods
def test_kernels_deterministic(method, backend, pieces):
    weights, group, scores_ref = make_pairs(90, 5)
    runs = []
    for _ in range(2):
        hidden, weight, target = make_head(90, 300, 16, torch.float16)
        result = kernels.ddpo_loss(
            hidden, weight, target, weights, group, scores_ref, 0.5, True, method, backend
        )
        result[0].backward()
        logp = kernels.token_logp(hidden, weight, target, method, backend)
        logp.sum().backward()
        runs.append([*result, logp, hidden.grad, weight.grad])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@backends
def test_kernels_equal_policy_and_reference_score_alike(backend):
    """The reference pass (A) and the training pass (B) round alike: rewards start at zero."""
    hidden, weight, target = make_head(64, 500, 32, torch.float16)
    weights, group, zeros = make_pairs(64, 4)
    args = (hidden, weight, target, weights, group)
    with torch.no_grad():
        scores = kernels.ddpo_loss(*args, 0 * zeros, 0.5, backend=backend)[3]
    loss, chosen, rejected, _ = kernels.ddpo_loss(*args, scores, 0.5, backend=backend)
    assert torch.cat([chosen, rejected]).abs().max() < 1e-3
    assert loss.item() == pytest.approx(math.log(2), abs=1e-3)


def test_kernels_backward_once():
    hidden, weight, target = make_head(10, 20, 4, torch.float32)
    loss = kernels.ddpo_loss(hidden, weight, target, *make_pairs(10, 2), 0.5)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU kernels/bench.py measures this")
@methods
@pytest.mark.parametrize("job", ["log p", "log p, gradients", "ddpo"])
def test_kernels_never_hold_the_logits(job, method, monkeypatch):
    """Peak memory beside inputs and gradients is below a quarter of the (R, V) logits."""
    monkeypatch.setattr(fused, "CHUNK_ELEMENTS", {"cpu": 2**16})
    monkeypatch.setattr(fused, "SLICE_ELEMENTS", {"cpu": 2**16})
    monkeypatch.setattr(fused, "SLICE_LEAST", 64)
    hidden, weight, target = make_head(1024, 2048, 16, torch.float32)
    pairs = make_pairs(1024, 64)

    def run():
        if job == "ddpo":
            kernels.ddpo_loss(hidden, weight, target, *pairs, 0.5, method=method)[0].backward()
        elif job == "log p":
            with torch.no_grad():
                kernels.token_logp(hidden, weight, target, method)
        else:
            kernels.token_logp(hidden, weight, target, method).sum().backward()

    assert bench.peak_cpu_memory(run) < 1024 * 2048 * 4 / 4


def test_kernels_flops():
    """Matrix products at the size of a 7B model, counted on the meta device: B is at the floor."""
    R, V, D, pairs = 6400, 32064, 4096, 32
    hidden = torch.empty(R, D, device="meta", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(V, D, device="meta", dtype=torch.bfloat16, requires_grad=True)
    row, number = (torch.empty(R, device="meta", dtype=x) for x in (torch.float32, torch.long))
    scores = torch.empty(2 * pairs, device="meta")

    def products(method, frozen=False):
        weight.requires_grad_(not frozen)
        with FlopCounterMode(display=False) as counter:
            args = (hidden, weight, number, row, number, scores, 0.5)
            kernels.ddpo_loss(*args, method=method)[0].backward()
        return counter.get_total_flops() / (2 * R * V * D)

    assert products("chunks") == 3
    assert products("chunks", frozen=True) == 2
    assert products("slices") == 4
    assert products("slices", frozen=True) == 3
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        kernels.token_logp(hidden, weight, number)
    assert counter.get_total_flops() == 2 * R * V * D


# Which path runs -----------------------------------------------------------------------------


def test_kernels_choice_of_backend(monkeypatch):
    cpu = torch.zeros(1, 1)
    monkeypatch.delenv("PLUMBLINE_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert kernels.choose_backend(None, cpu).logp_rows is reference.logp_rows
    with pytest.raises(ValueError, match="needs a GPU, hidden is on cpu: set TRITON_INTERPRET=1"):
        kernels.choose_backend("triton", cpu)
    monkeypatch.setenv("PLUMBLINE_KERNELS", "triton")
    with pytest.raises(ValueError, match="needs a GPU"):
        kernels.choose_backend(None, cpu)
    assert kernels.choose_backend("torch", cpu).forward_logp is None  # the argument wins
    monkeypatch.setenv("PLUMBLINE_KERNELS", "cuda")
    with pytest.raises(ValueError, match="must be one of .*, got 'cuda'"):
        kernels.choose_backend(None, cpu)
    monkeypatch.delenv("PLUMBLINE_KERNELS")
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton is not installed"):
        kernels.choose_backend("triton", cpu)
    with pytest.raises(ValueError, match="method must be one of .*, got 'fast'"):
        kernels.choose_method("fast")


# Bad input -----------------------------------------------------------------------------------


def spoil(**changes):
    """Arguments of ddpo_loss that are right but for `changes`: functions of the right value."""
    hidden, weight, target = (x.detach() for x in make_head(12, 20, 4, torch.float32))
    good = dict(
        hidden=hidden,
        weight=weight,
        target=target,
        segment_weight=torch.ones(12, device=DEVICE),
        group=torch.arange(12, device=DEVICE) // 3,
        reference=torch.zeros(4, device=DEVICE),
        beta=0.5,
    )
    return good | {name: change(good[name]) for name, change in changes.items()}


def put(place, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[place] = value
        return tensor

    return change


BAD = [
    (dict(target=put(7, 20)), "target 20 in row 7 is outside the vocabulary of 20 tokens"),
    (dict(target=put(3, -100)), "target -100 in row 3 is outside"),
    (dict(target=lambda x: x.float()), "token ids as torch.long, got torch.float32"),
    (dict(target=lambda x: x[:5]), r"target must have one entry per row of hidden, \(12,\)"),
    (dict(hidden=lambda x: x[None]), "hidden must be"),
    (dict(hidden=lambda x: x[:, :3]), r"same D, got \(12, 3\) and \(20, 4\)"),
    (dict(hidden=put((2, 1), math.nan)), "hidden states of row 2 contain NaN or infinity"),
    (dict(hidden=put((5, 0), math.inf)), "hidden states of row 5 contain NaN or infinity"),
    (dict(weight=put((6, 3), math.nan)), "vocabulary matrix .* row of token 6"),
    (dict(weight=lambda x: x.half()), "share one dtype .* got torch.float32 and torch.float16"),
    (dict(weight=lambda x: x.to("meta")), "one device, got hidden on .*, weight on meta"),
    (dict(weight=lambda x: x[:0]), "V and D at least 1"),
    (
        dict(hidden=lambda x: x.half() * 3e4, weight=lambda x: x.half() * 100),
        "logits of row 0 overflow torch.float16",
    ),
    (dict(group=put(slice(6, 9), 1)), "response 2 is empty"),
    (dict(group=put(4, 3)), "group falls from 3 to 1 after row 4"),
    (dict(group=put(11, 4)), "group 4 in row 11 is not one of the 4 responses"),
    (dict(group=lambda x: x.int()), "group must hold response numbers as torch.long"),
    (dict(segment_weight=put(slice(3, 6), 0.0)), "segment weights of response 1 sum to zero"),
    (dict(segment_weight=put(8, -1.0)), "segment weight -1.0 in row 8"),
    (dict(segment_weight=put(8, math.nan)), "segment weight nan in row 8"),
    (dict(segment_weight=lambda x: x[1:]), "segment_weight must have one entry per row"),
    (dict(segment_weight=lambda x: x.long()), "must be floating point"),
    (dict(reference=lambda x: x[:3]), r"G is even and at least 2; got shape \(3,\)"),
    (dict(reference=lambda x: x[:0]), "G is even and at least 2"),
    (dict(reference=lambda x: x[:2]), "group 2 in row 6 is not one of the 2 responses"),
    (dict(reference=put(1, math.inf)), "reference score inf of response 1 is not finite"),
    (dict(beta=lambda x: 0.0), "beta must be a finite number above 0"),
]


@methods
@pytest.mark.parametrize("changes, message", BAD, ids=[message for _, message in BAD])
def test_kernels_bad_input(changes, message, method):
    args = spoil(**changes)
    with pytest.raises(ValueError, match=message):
        kernels.ddpo_loss(**args, method=method)
    if changes.keys() <= {"hidden", "weight", "target"}:
        with pytest.raises(ValueError, match=message):
            kernels.token_logp(args["hidden"], args["weight"], args["target"], method)


def test_kernels_ignore_autocast():
    hidden, weight, target = make_head(30, 40, 8, torch.float32)
    pairs = make_pairs(30, 3)
    expected = kernels.ddpo_loss(hidden, weight, target, *pairs, 0.5)[3]
    with torch.autocast(DEVICE, torch.bfloat16):
        loss, *_, scores = kernels.ddpo_loss(hidden, weight, target, *pairs, 0.5)
        loss.backward()
    assert torch.equal(scores, expected) and hidden.grad.dtype == torch.float32


# Triton without a GPU ------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels run directly")
def test_kernels_interpreted():
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "backend_triton"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert re.search(r"\d\d passed", run.stdout), run.stdout


def compile_kernel(kernel, types, constants, arch, warps, stages):
    """A kernel as its first launch would compile it for sm_<arch>, on any machine.

    types: Triton's names of the arguments' types; all but R are known to be multiples of 16.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = [name for name in kernel.arg_names if name not in constants]
    signature = dict.fromkeys(kernel.arg_names, "constexpr") | dict(zip(names, types.split()))
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names if name != "R"
    }
    return compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", arch, 32),
        options=dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True),
    )


def stack_and_local_bytes(compiled):
    """What the binary keeps outside registers: zero unless registers are spilled.

    Read from the cubin itself: Triton ships two ptxas (one of them for sm_90 and newer), and only
    the one it used knows the PTX.
    """
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [int(number) for number in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)]


SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
without_interpreter = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")


@without_interpreter
@pytest.mark.parametrize("D", [4096, 80])  # a whole number of steps, and not
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_kernels_compile_ahead_of_time_a(arch, dtype, D):
    pytest.importorskip("triton")
    from kernels import triton_forward

    tile = triton_forward.choose_tile(dtype, divmod(arch, 10), D)
    shape = dict(TILE_R=tile.rows, TILE_V=tile.vocab, TILE_D=tile.width)
    kind = TYPES[dtype]
    compiled = compile_kernel(
        triton_forward.tile_logp_kernel,
        f"*{kind} *{kind} *i64 *fp32 *fp32 i32 i32 i32",
        shape | dict(WHOLE_D=D % tile.width == 0, PRECISION="ieee"),
        arch,
        tile.warps,
        tile.stages,
    )
    assert stack_and_local_bytes(compiled) == [0, 0]
    assert compiled.metadata.shared <= SHARED_LIMIT[arch]
    if arch == 90 and dtype != torch.float32:
        assert "wgmma" in compiled.asm["ptx"]


@without_interpreter
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_kernels_compile_ahead_of_time_rows(arch, dtype):
    pytest.importorskip("triton")
    from kernels import triton_rows

    for kernel, types in (
        (triton_rows.logp_rows_kernel, "*i64 *fp32 *fp32 i32 i32"),
        (triton_rows.gradient_rows_kernel, "*fp32 *i64 *fp32 i32 i32"),
    ):
        types = f"*{TYPES[dtype]} {types}"
        compiled = compile_kernel(kernel, types, dict(BLOCK=triton_rows.BLOCK), arch, 8, 3)
        assert stack_and_local_bytes(compiled) == [0, 0]
        assert compiled.metadata.shared <= SHARED_LIMIT[arch]


# The benchmark -------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--frozen"]], ids=str)
def test_kernels_bench(flags, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)  # half a minute for nothing
    sizes = "--pairs 2 --response 5 --width 8 --vocab 30 --repeats 1".split()
    bench.table(bench.parse([*sizes, *flags]))
    lines = capsys.readouterr().out.splitlines()
    ours = [line.split() for line in lines if "ours" in line]
    assert len(ours) == 5 and "R = 20 response tokens" in lines[1]
    limit = 1e-5 if "float32" in lines[1] else 0.05
    assert all(float(row[-1]) < limit for row in ours), lines


def test_generation_is_compared_with_transformers(capsys):
    bench.main("--generate --random --batch 4 --tokens 3 --repeats 1".split())
    shown = capsys.readouterr().out
    assert "0.3 M parameters" in shown
    for counts in ("4 prompts of 58 tokens x 1, 3 new each", "1 prompts of 58 tokens x 4, 3 new each"):
        rows = shown.split(counts)[1].splitlines()[2:4]
        (peer, _, one, _), (name, rate, ratio, _) = (row.split() for row in rows)
        assert (peer, one, name) == ("transformers", "1.00", "ours")
        assert float(rate) > 0 and float(ratio) > 0
