"""All tests, in the order of the README's file map: `pytest -q`.

They compare the mathematics with independent references, our files with `transformers` and `peft`,
and resumed runs with uninterrupted ones, and try what a user can get wrong. No network; a GPU is
used where there is one.
"""

import ast
import copy
import dataclasses
import difflib
import graphlib
import http.client
import importlib
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from types import ModuleType, SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import annotate
import config
import data
import ddpo
import evaluate
import evaluation
import generation
import grpo
import kernels
import loop
import online_ddpo
import ppo
import recipes
import reward
import rollouts
import scoring
import segments
import sft
import sources
import train
import world
from algorithm import Data, Start
from annotation import server as page_server, store as corrections
from annotation import agreement
from annotation.agreement import kappa
from annotation.diff import Units, compare
from claims import __main__ as claims_command, definitions, page as claims_page, results as tally
from data import Example, Response, collate
from evaluation import amber as ambers
from evaluation import (
    answers, benchmarks, blind, builtin, charts, coco, judge, memory, metrics, parts, report,
    synonyms, vqa,
)
from formats import (
    Conversation, DataError, Pair, features, files, fingerprint, latest_state, layouts,
    load_adapter, load_llava, load_state, open_image, read_conversations, read_pairs, read_prompts,
    opening, readers, report_skipped, runs, save_adapter, save_llava, save_state,
)
from formats import tokenizer as tokenizer_file
from formats.rows import ParquetImage, find_files, in_file, whole_rows
from generation import generate
from kernels import bench, bench_gpu, bench_head, fused, lean, reference
from lora import add_adapter, lora_layers, select_trainable, use_adapter
from model import Head, LLaVA, LLaVAConfig, TextConfig, attention_mask, init_weights
from vision import ImageSettings, VisionConfig, preprocess
from world import Scene, Thing, feedback, pretraining

ROOT = Path(__file__).parent

# ================================================================================ shared fixtures

TEXT = TextConfig(60, 32, 64, 2, 4, num_key_value_heads=2, max_position_embeddings=128)
TOWER = VisionConfig(16, 32, 2, 2, image_size=12, patch_size=4)
IMAGE, PAD, EOS, PATCHES = 58, 59, 2, 9  # special tokens; features of an image
IMAGES = ImageSettings(12, (0.5,) * 3, (0.25,) * 3)


def make_model(text=TEXT, image_token=IMAGE, pad_token=PAD, eos_token=EOS):
    """A model with random weights, all but the tower's trainable."""
    model = LLaVA(LLaVAConfig(TOWER, text, image_token, pad_token, eos_token)).eval()
    init_weights(model, 0)
    select_trainable(model)
    return model


@pytest.fixture
def tiny():
    return make_model()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    tokenizer_file.train_tokenizer(pretraining.world_texts(40), path, 700)
    return tokenizer_file.Tokenizer(path)


@pytest.fixture(scope="session")
def tiny_world(tokenizer):
    """A model with random weights that reads the built-in world's texts; not to be changed."""
    text = replace(TEXT, vocab_size=tokenizer.vocab_size, num_attention_heads=2,
                   max_position_embeddings=400)
    return make_model(text, tokenizer.image_token, tokenizer.pad_token, tokenizer.eos_token)


def random_example(seed, image=True, lengths=(7, 9), shared=0):
    """A row whose weighted responses have their first `shared` tokens in common."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, IMAGE, (n,), generator=g).tolist()
    prefix, responses = draw(shared), []
    for n in lengths:
        tokens = prefix + draw(n) + [EOS]
        responses.append(Response(tokens, (torch.rand(len(tokens), generator=g) + 0.5).tolist()))
    pixels = torch.randn(3, 12, 12, generator=g) if image else None
    prompt = [1] + [IMAGE] * PATCHES * image + draw(4 + seed % 3)
    return Example(f"row {seed}", pixels, prompt, responses)


def logp_alone(model, example, response):
    """Log-probabilities (T,) of a response's tokens, plainly causal, with no sibling or padding."""
    tokens = torch.tensor([example.prompt + response.tokens])
    images = None if example.image is None else example.image[None]
    logits = model.logits(images, tokens)[0, len(example.prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(logits)), response.tokens]


def make_start(model, tokenizer, folder, **settings):
    """What recipes.load_start gives: a model with its trainable weights selected."""
    return Start(config.Run(**settings), model, tokenizer, IMAGES, folder, base=fingerprint(model))


def make_ddpo(model, examples, folder, reference=None, **settings):
    """DDPO on examples; `reference`, if given, replaces the scores of the model itself."""
    start = make_start(model, None, folder)
    algorithm = ddpo.DDPO(start, ddpo.DDPOConfig(**settings), Data(examples))
    algorithm.reference = reference or algorithm.reference
    return algorithm


@pytest.fixture
def run_train(capsys):
    """A function that runs train.py, asserts its exit status, and returns all that it printed."""
    def run(*arguments, status=0):
        capsys.readouterr()
        found, shown = train.main([str(each) for each in arguments]), "".join(capsys.readouterr())
        assert found == status, shown
        return shown

    return run


def read_log(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (Path(folder) / name).open()]


def same_weights(one, two):
    first, second = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Somebody's own data: six images and their corrections."""
    folder, lines = tmp_path_factory.mktemp("photos"), []
    for i in range(6):
        Image.new("RGB", (40 + 9 * i, 60), (40 * i, 90, 200 - 30 * i)).save(folder / f"{i}.png")
        lines.append(json.dumps({
            "image": f"{i}.png", "question": "Describe the picture.",
            "chosen": f"There is a red car on the left. {i}",
            "rejected": f"There is a blue car on the left. There is a dog. {i}"}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    return folder


def own_data(photos, out, *more):
    return ("--algo", "ddpo", "--data", photos / "rows.jsonl", "--images", photos, "--out", out,
            "--batch_size", 4, *more)


# ======================================================================================= train.py


def test_schedule():
    rates = [loop.schedule(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1
    assert rates[55] == pytest.approx(0.5) and 0 < rates[99] < 0.001
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_command_line_follows_the_dataclasses(capsys):
    run, found = train.parse("--algo ddpo --gamma 2 --no-normalize --lora 4".split())
    assert (found.gamma, found.normalize, found.beta, run.lora) == (2.0, False, 0.1, 4)
    beta = {algo: train.parse(["--algo", algo])[1].beta for algo in ("ddpo", "online_ddpo", "dpo")}
    assert beta == {"ddpo": 5.0, "online_ddpo": 5.0, "dpo": 0.1}
    assert train.parse(["--algo", "ddpo", "--anchor", "0"])[1].beta == 0.5  # the paper's loss
    assert train.parse("--algo ppo --missing_eos_penalty -3".split())[1].missing_eos_penalty == -3
    assert train.parse("--data a b --data c".split())[0].data == ["a", "b", "c"]
    train.parse("--algo rm --captions a --no-facts".split())
    for wrong in ("--algo nonsense", "--gama 3", "--algo sft --gamma 3", "--beta much", "--lora -8",
                  "--normalize False", "--batch_size 0", "--learning_rate nan", "--images photos",
                  "--data a --corrections 9", "--algo rm --captions a", "--lora_alpha 8",
                  "--lora 4 --lora_alpha 0", "--beta 0", f"--seed {2**32}"):
        with pytest.raises(SystemExit) as stopped:
            train.parse(wrong.split())
        assert stopped.value.code == 2
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    shown = capsys.readouterr().out
    for algo, kind in train.ALGORITHMS.items():
        assert type(train.parse(["--algo", algo])[1]) is kind.Config
        assert re.search(rf"^  {algo} +{re.escape(train.about(kind))}$", shown, re.M)


def test_alignment_reduces_hallucination_from_end_to_end(tmp_path, monkeypatch, run_train):
    """The main job, small: sample, correct, align, measure. A fresh process does the same, and
    LoRA at its own default rate makes at least 80 % of the reduction at no more loss of coverage.
    """
    monkeypatch.chdir(tmp_path)
    command = ("--algo ddpo --corrections 128 --test_scenes 60 --epochs 6 --out out").split()
    shown = run_train(*command)
    assert "hallucination/any" in shown and "before" in shown

    def change(name, folder="out"):
        results = json.loads(Path(folder, "results.json").read_text())
        before, after = (results[part]["metrics"][name]["value"] for part in ("before", "after"))
        return after - before, before

    for name, least in (("hallucination/object", 0.4), ("hallucination/any", 0.25)):
        less, before = change(name)
        assert -less > least * before
    assert change("coverage")[0] > -0.05
    last = read_log("out")[-1]
    assert last["step"] == 24 and last["rewards/accuracies"] > 0.8
    run_train(*command[:-1], "lora", "--lora", 16)
    assert change("hallucination/any", "lora")[0] < 0.8 * change("hallucination/any")[0]
    assert change("coverage", "lora")[0] > change("coverage")[0] - 0.01
    shutil.move("out", "kept")
    shutil.rmtree("runs")  # the corrections are collected again
    again = subprocess.run(
        [sys.executable, ROOT / "train.py", *command], capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout and shown.startswith(again.stdout), again.stderr
    assert same_weights(tmp_path / "out/model", tmp_path / "kept/model")


def test_shipped_base_behaves_as_stated(tmp_path):
    """Competent but untruthful: it sees what is there, and adds what usually is.

    An edit that never looks at the picture removes a quarter of its false objects at most, for two
    points of coverage.
    """
    start = load_llava(ROOT / "world" / "base", dtype=torch.float32)
    found, records = evaluation.measure_world(*start, 200)
    for name, least in (("coverage", 0.95), ("hallucination/object", 0.45),
                        ("pope/random/accuracy", 0.85), ("over_generalisation", 0.1)):
        assert found[name]["value"] >= least
    pairs = read_pairs([feedback.corrections(*start, tmp_path, 600, 0)], tmp_path / "images", None)
    text = blind.TextClassifier([(pair.chosen, pair.rejected) for pair in pairs])
    objects = sum(len(record["truth"]) for record in records)
    least = sum(map(builtin.covered, records)) / objects - 0.02
    last = blind.last_sentence_cut(records)
    assert sum(map(builtin.covered, last)) / objects < least - 0.05  # as true as any other
    false = lambda records: sum(span["kind"] == "object" for r in records for span in r["spans"])
    assert false(blind.false_by_text(records, text, least)) >= 0.75 * false(records) > 75


def test_shipped_initialisation_compares_an_answer_with_facts():
    """It prefers the true answer to a lookalike, before any ranking, whatever is false there."""
    model, tokenizer, images = load_llava(ROOT / "world" / "rm_init", dtype=torch.float32)
    reward_model = reward.RewardModel(model)
    reward_model.start_from_verdict(tokenizer)
    scenes = [world.make_scene(f"judged {i}", "test") for i in range(100)]
    features = world.tasks.encode_scenes(model, scenes, images)
    prompt = data.trunk_tokens(tokenizer, [], "Describe the picture.", model.config.vision.patches)
    two = lambda scene: 2 / len(scene.things)  # of its things change
    for change, least in (
        (lambda scene, rng: world.lookalike(scene, rng, 0), 0.9),  # one word
        (lambda scene, rng: world.extended(scene, rng, 0), 0.9),  # one thing too much
        (lambda scene, rng: world.exchanged(scene, rng, two(scene), "cell"), 0.9),
        (lambda scene, rng: world.exchanged(scene, rng, two(scene), "kind"), 0.9),
    ):
        rng, pairs = random.Random(0), []
        for scene, image in zip(scenes, features):
            said = [data.turn(tokenizer, "", world.describe(each))
                    for each in (scene, change(scene, rng))]
            pairs.append(Example(scene.seed, image, prompt, said, facts=world.facts(scene)))
        found = reward.agreement(reward.rate_pairs(reward_model, tokenizer, pairs)).mean()
        assert found >= least
    for folder in ("base", "rm_init"):
        files_of = list((ROOT / "world" / folder).iterdir())
        assert sum(file.stat().st_size for file in files_of) <= 8 * 2**20
        assert not any(file.suffix == ".bin" for file in files_of)


@pytest.mark.parametrize("more", [(), ("--lora", 4)], ids=["full", "lora"])
def test_resume_after_a_kill_is_bit_exact(photos, tmp_path, run_train, more):
    settings = ("--steps", 40, "--learning_rate", 1e-3, "--save_every", 7, "--log_every", 1, *more)
    run_train(*own_data(photos, tmp_path / "whole", *settings))
    command = own_data(photos, tmp_path / "cut", *settings)
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, command)],
                               stderr=subprocess.PIPE, text=True)
    log = tmp_path / "cut/metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 10):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    shown = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "--resume continues" in shown
    step = load_state(latest_state(tmp_path / "cut"))[0]["step"]
    assert 10 <= step < 40
    assert "unfinished run; --resume continues" in run_train(*command, status=1)
    log.write_text(log.read_text() + '{"step": 41, "lo')  # half a line, as of a full disk
    (tmp_path / "cut/notes.jsonl").write_text("[]\n")  # somebody's own
    assert f"resumed at step {step}" in run_train(*command, "--resume")
    assert same_weights(tmp_path / "whole/model", tmp_path / "cut/model")
    losses = [[line["loss"] for line in read_log(tmp_path / run)] for run in ("whole", "cut")]
    assert losses[0] == losses[1] and len(losses[0]) == 40


def test_micro_batches_change_nothing(photos, tmp_path, run_train):
    logs = []
    for size in (4, 3, 1):  # 3: and one row left, which weighs a third of that
        out = tmp_path / str(size)
        run_train(*own_data(photos, out, "--micro_batch", size, "--steps", 3, "--log_every", 1,
                            "--dtype", "float32"))
        logs.append([(line["loss"], line["grad_norm"]) for line in read_log(out)])
    torch.testing.assert_close(*map(torch.tensor, logs[:2]), atol=0, rtol=1e-4)
    torch.testing.assert_close(*map(torch.tensor, logs[1:]), atol=0, rtol=1e-4)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good(photos, tmp_path, run_train):
    shown = run_train(*own_data(
        photos, tmp_path, "--learning_rate", 1e30, "--steps", 9, "--warmup", 0, "--save_every", 1,
        "--max_grad_norm", 1e30), status=1)
    assert re.search(r"error: .* at step \d+ \(rows: .*rows.jsonl row \d", shown)
    assert latest_state(tmp_path) is not None


def test_weights_that_are_no_numbers_are_neither_saved_nor_trained_on(photos, tmp_path, run_train):
    huge = ("--learning_rate", 1e38, "--warmup", 0, "--save_every", 1)
    for steps in (1, 2):  # the first step is finite, the weights after it are not
        shown = run_train(*own_data(photos, tmp_path / "run", *huge, "--steps", steps), status=1)
        assert "no longer finite (" in shown and "those of the start; try a smaller" in shown
        assert not {"model", "checkpoint-1"} & {path.name for path in (tmp_path / "run").iterdir()}
    base = Path(shutil.copytree(ROOT / "world" / "base", tmp_path / "base"))
    spoil = lambda weights: weights | {HEAD: torch.full_like(weights[HEAD], math.inf)}
    damage(base / "model.safetensors", spoil)
    shown = run_train(*own_data(photos, tmp_path / "two", "--model", base), status=1)
    assert f"error: {base}: NaN or infinity in the weights (head.weight)" in shown


def test_a_gpu_that_is_too_small_ends_in_a_sentence(photos, tmp_path, monkeypatch, run_train,
                                                    run_evaluate):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(loop.Loop, "one_step", full)
    monkeypatch.setitem(evaluate.COMMANDS, "image", full)
    command = own_data(photos, tmp_path / "run", "--algo", "sft")
    assert "too little memory; try a smaller --micro_batch" in run_train(*command, status=1)
    asked = run_evaluate("--model one --image images/3.png --prompt Why?", 1)
    assert asked.endswith("too little memory; try a smaller --batch_size\n")


@pytest.mark.parametrize("algo, edited, more", [
    ("sft", "rows.jsonl", ()), ("ddpo", "rows.jsonl", ()),
    ("rm", "captions.json", ("--facts", "--captions", "captions.json"))])
def test_resuming_refuses_other_data(
        photos, tmp_path, monkeypatch, run_train, algo, edited, more):
    folder = shutil.copytree(photos, tmp_path / "photos")
    monkeypatch.chdir(folder)
    Path("captions.json").write_text(json.dumps({f"{i}.png": ["a red car"] for i in range(6)}))
    command = own_data(folder, tmp_path / "run", "--algo", algo, "--steps", 2, *more)
    with monkeypatch.context() as patch:
        one_step = loop.Loop.one_step

        def asked_late(running):  # after the sums over processes: all of them stop a step later
            metrics = one_step(running)
            if running.step == 0:
                running.ask_to_stop()
            return metrics

        patch.setattr(loop.Loop, "one_step", asked_late)
        assert "saved at step 2 of 2" in run_train(*command, status=130)
    with monkeypatch.context() as patch:
        patch.setattr(recipes, "fingerprint", lambda model: "of other weights")
        assert "the base has changed since" in run_train(*command, "--resume", status=1)
    Path(edited).write_text(Path(edited).read_text().replace("red", "green"))
    assert "the data have changed" in run_train(*command, "--resume", status=1) or algo == "ddpo"
    run_train(*command, "--overwrite")


def test_dry_run_and_rows_that_stop_or_are_listed(photos, tmp_path, run_train):
    shown = run_train(*own_data(photos, tmp_path / "none", "--dry_run"))
    assert shown.startswith(f"--algo ddpo --out {tmp_path / 'none'}\n") and "[" in shown
    assert "rows.jsonl row 3" in shown and "6 rows" in shown and not (tmp_path / "none").exists()
    bad = [{"image": "0.png", "question": "Why?", "chosen": "word " * 500, "rejected": "a"},
           {"image": "gone.png", "question": "Why?", "chosen": "b", "rejected": "a"}]
    (tmp_path / "bad.jsonl").write_text(
        (photos / "rows.jsonl").read_text() + "".join(json.dumps(row) + "\n" for row in bad))
    command = own_data(photos, tmp_path / "out", "--data", tmp_path / "bad.jsonl", "--steps", 1)
    assert re.search(r"bad.jsonl row [78]", run_train(*command, status=1))
    for more in ("--dry_run", "--overwrite"):
        shown = run_train(*command, "--skip_bad_rows", more)
        assert "2 rows left out" in shown
        assert "context holds" in shown and "no image 'gone.png'" in shown


def test_folders_are_never_lost(photos, tmp_path, run_train, monkeypatch):
    thesis, done = tmp_path / "thesis", tmp_path / "done"
    model = Path(shutil.copytree(ROOT / "world" / "base", tmp_path / "model"))
    thesis.mkdir()
    (thesis / "chapter.txt").write_text("all my work")
    json_file(thesis, {"settings": "somebody's own"}, "config.json")
    run_train(*own_data(photos, done, "--steps", 1))
    for out, more, phrase in (
        (thesis, ["--overwrite"], "not empty and holds no run of ours"),
        (thesis, ["--resume"], "not empty and holds no run of ours"),
        (model, ["--model", model, "--overwrite"], "not empty and holds no run of ours"),
        (done, ["--model", done / "model", "--overwrite"], "model is an input of this run"),
        (done, ["--model", done, "--overwrite"], "done is an input of this run"),
        (thesis / "chapter.txt", [], "chapter.txt is a file"),
        (done, ["--steps", 2], "other settings (steps differ)"),
        (done, ["--steps", 2, "--resume"], "other settings (steps differ)"),
        (tmp_path / "new", ["--resume"], "no run to resume"),
    ):
        assert phrase in run_train(*own_data(photos, out, *more), status=1)
    assert (thesis / "chapter.txt").read_text() == "all my work" and not (tmp_path / "new").exists()
    assert same_weights(model, ROOT / "world" / "base") and (done / "model/config.json").exists()
    written = {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}
    bad = jsonl_file(tmp_path, GOOD, {**GOOD, "image": "gone.png"})
    assert "no image 'gone.png'" in run_train(  # fails when the folder is its own already
        "--data", bad, "--images", photos, "--out", done, "--overwrite", status=1)
    assert {path: path.read_bytes() for path in done.rglob("*") if path.is_file()} == written
    for name in ("reward_model", "held_out_reward_model"):
        with pytest.raises(ValueError, match="done is an input of this run"):
            runs.set_aside(done, config.Run(), grpo.GRPOConfig(**{name: str(done)}))
    (done / "request.txt").write_text("of the reward model that was here")
    with pytest.raises(SystemExit):
        run_train(*own_data(photos, done, "--resume", "--overwrite"))
    other = own_data(photos, done, "--steps", 3, "--overwrite")
    with files.lock_folder(done):  # as a run that goes on does
        before = (done / "config.json").read_bytes()
        assert "another run is using it" in run_train(*other, status=1)
        assert (done / "config.json").read_bytes() == before
    (done / "answers").mkdir()
    jsonl_file(done / "answers", GOOD)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_atomic", lambda *_: exec("raise OSError(28, 'full')"))
        assert "error: " in run_train(*other, status=1)
    assert (done / "config.json").read_bytes() == before and (done / "model").exists()
    with monkeypatch.context() as patch:  # the first step is where a GPU would be too small
        patch.setattr(ddpo.DDPO, "loss", lambda self, batch: (torch.tensor(math.nan), {}))
        assert "the loss is nan at step 1" in run_train(*other, status=1)
    assert (done / "config.json").read_bytes() == before and (done / "model").exists()
    run_train(*other)
    (done / runs.ASIDE).mkdir()
    for name in ("config.json", "model", "report.html"):  # killed before it began to train
        (done / name).rename(done / runs.ASIDE / name)
    assert "replacing the finished run" in run_train(*other[:-1])
    assert (done / "answers" / "rows.jsonl").exists() and (done / "model").exists()
    assert not (done / "request.txt").exists() and not (done / runs.ASIDE).exists()


def test_what_a_kill_leaves_is_not_in_the_way(photos, tmp_path, run_train):
    out, settings = tmp_path / "run", ("--steps", 3, "--log_every", 1)
    (out / ".checkpoint-3.123.tmp").mkdir(parents=True)
    (out / ".config.json.123.tmp").write_text("{")  # killed before it had its name
    for name in (".model.12.tmp", ".model.12.old.tmp"):  # killed between two renames
        (tmp_path / name).mkdir()
        (tmp_path / name / name[-7:-4]).touch()
    files.remove_leftovers(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.glob("*model*/*")] == ["model/old"]
    command = own_data(photos, out, *settings)
    run_train(*command)
    files_of = lambda: {path.name for path in out.iterdir()}
    assert not [name for name in files_of() if name.startswith(".")]
    log = (out / "metrics.jsonl").read_bytes()
    assert "the run is finished" in run_train(  # settings that only save memory may differ
        *command, "--resume", "--out", f"{out}/", "--micro_batch", 2)
    assert (out / "metrics.jsonl").read_bytes() == log and len(log.splitlines()) == 3
    (out / "report.html").unlink()  # killed before that, and before any checkpoint
    run_train(*command, "--resume")
    assert [line["step"] for line in read_log(out)] == [1, 2, 3]


def test_who_waits_for_a_folder_that_is_removed_locks_a_new_one(tmp_path):
    def collect():
        with files.lock_folder(tmp_path / "data", wait=True):
            (tmp_path / "data" / "rows").touch()

    with ThreadPoolExecutor() as pool:
        with files.lock_folder(tmp_path / "data"):  # fails, and leaves nothing
            waiting = pool.submit(collect)
            time.sleep(0.2)
        waiting.result(timeout=10)
    assert (tmp_path / "data" / "rows").exists()


@pytest.mark.parametrize("limit, save_every", [(300, 2), (300_000, 2), (300_000, 9)])
def test_a_full_disk_is_one_sentence(photos, tmp_path, limit, save_every):
    """Files cannot grow beyond a limit: settings, checkpoint, model. With room the run resumes."""
    command = list(map(str, own_data(
        photos, tmp_path / "run", "--steps", 3, "--save_every", save_every)))
    run = lambda *more, most=None: subprocess.run(
        [sys.executable, ROOT / "train.py", *command, *more], capture_output=True, text=True,
        preexec_fn=most and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))))
    done = run(most=limit)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: ")
    assert re.fullmatch(r"error: .*/run\b.*: the disk is full; make room and resume",
                        done.stderr.splitlines()[-1]) and "Traceback" not in done.stderr
    begun = (tmp_path / "run" / "config.json").exists()
    assert run(*["--resume"] * begun).returncode == 0


def test_a_start_that_failed_leaves_nothing_in_the_way(photos, tmp_path, monkeypatch, run_train):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # cannot be imported
    out = tmp_path / "run"
    for wrong, sentence in (
        (("--tensorboard",), "--tensorboard needs a package: pip install tensorboard"),
        (("--images", "nowhere"), "nowhere: no such folder"),
        (("--data", "none.jsonl"), "none.jsonl: no such file"), (("--model", "none"), ".*none.*"),
        (("--device", "abacus"), "--device abacus: "),
    ):
        shown = run_train(*own_data(photos, out, "--steps", 1, *wrong), status=1)
        *_, last = shown.splitlines()  # after the choice of a learning rate
        assert re.match(f"error: {sentence}", last) and shown.count("\n") <= 2
        assert wrong != ("--tensorboard",) or not out.exists()
    run_train(*own_data(photos, out, "--steps", 1))


@pytest.mark.parametrize("command, sentence", [
    ("train.py --data none.jsonl", "none.jsonl: no such file"),
    ("train.py --images none --data train.py", "none: no such folder"),
    ("train.py --model us/none", "us/none: no such folder; .*: hf download us/none --local-dir no"),
    ("train.py --captions none.json", "none.json: no such file"),
    ("train.py --lora -1", "argument --lora: should be at least 0"),
    ("evaluate.py runs/none/x", "runs/none/x: no such folder"),
    ("evaluate.py --model world/base --pope none.json", "none.json: no such file"),
    ("evaluate.py --models world/base none --suite world", "none: no such folder"),
    ("evaluate.py --model world", "give one of"), ("evaluate.py --batch_size 0", "at least 1"),
    ("annotate.py none.jsonl", "none.jsonl: no such file"), ("annotate.py", "give one of"),
    ("annotate.py --agreement none.jsonl", "none.jsonl: no such file"),
    ("annotate.py README.md --images none", "none: no such folder"),
    ("annotate.py --world --model us/none", "us/none: no such folder; .*: hf download us/none"),
    ("annotate.py --world --model world --tower none", "none: no such folder"),
    ("annotate.py --world --tower world", "--tower needs --model"),
    ("annotate.py --world --port 65536", "--port a number below 65536"),
])
def test_wrong_arguments_and_paths_fail_before_torch_is_imported(command, sentence):
    done = subprocess.run([sys.executable, "-X", "importtime", *command.split()], cwd=ROOT,
                          capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode and re.search(f"error: .*{sentence}", lines[-1])
    assert " torch" not in done.stderr and " argparse" in done.stderr


@pytest.mark.parametrize("command", ["train.py", "evaluate.py x", "annotate.py --world"])
def test_ctrl_c_while_torch_is_imported_is_quiet(tmp_path, command):
    (tmp_path / "x").mkdir()
    file, *more = command.split()
    process = subprocess.Popen([sys.executable, ROOT / file, *more], cwd=tmp_path,
                               stderr=subprocess.PIPE, text=True)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == -signal.SIGINT


def test_tensorboard_has_what_the_log_has(photos, tmp_path, monkeypatch, run_train):
    """Also of a run that was killed two steps after its checkpoint, and resumed."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    command = own_data(
        photos, tmp_path, "--steps", 6, "--save_every", 2, "--log_every", 1, "--tensorboard")
    one_step, save = train.Loop.one_step, train.Loop.save

    def killed(loop):
        if loop.step == 4:
            raise KeyboardInterrupt
        return one_step(loop) | {"loss": 9.0}  # steps that will be made again, with other numbers

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "one_step", killed)
        patch.setattr(loop.Loop, "save", lambda loop: save(loop) if loop.step == 2 else None)
        run_train(*command, status=130)
    run_train(*command, "--resume")
    found = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert set(found.Tags()["scalars"]) == lines[0].keys() - {"step"}
    for name in found.Tags()["scalars"]:
        assert [(each.step, each.value) for each in found.Scalars(name)] == [
            (line["step"], pytest.approx(line[name])) for line in lines]


def test_corrections_are_true_and_reproducible(tmp_path):
    start = load_llava(ROOT / "world" / "base", dtype=torch.float32)
    for make in (feedback.corrections, feedback.rankings):
        with pytest.raises(ValueError, match="0 <= 2 <= 1"):
            make(*start, tmp_path / "c", 20, 4, noise=2)
    assert not (tmp_path / "c").exists()
    one, two = (feedback.corrections(*start, tmp_path / name, 20, 4) for name in "ab")
    assert one.read_text() == two.read_text()
    for pair in read_pairs([one], one.parent / "images"):
        scene = world.make_scene(f"corrections 4 {int(pair.image.stem)}")
        assert world.hallucinations(scene, pair.rejected)
        assert not world.hallucinations(scene, pair.chosen)
        assert open_image("x", pair.image).tobytes() == world.draw(scene, 72).tobytes()


# ============================================================================ the house, recipes.py

FLOORS = [  # an import only ever points down this list; within a folder, to other files of it
    r"kernels\.bench.*|claims", "train|evaluate|annotate", "annotation", "sources",
    "recipes|loop", "evaluation",
    "world", "grpo|online_ddpo", "ppo", "rollouts", "scoring", "reward", "ddpo|sft", "algorithm",
    "generation", "data", "formats", "model", "lora", "vision|kernels|config|sharding|segments",
    "parallel",
]


def import_graph():
    """{module: modules of this repository that it imports}, imports inside functions included."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
             for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
             if not path.name.startswith(("t_", "test_"))}
    graph = {}
    for module, path in paths.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = ".".join(filter(None, (package if node.level else "", node.module)))
                found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        graph[module] = (found & paths.keys()) - {module}
    return graph


def floor(module):
    return next(i for i, names in enumerate(FLOORS) if re.fullmatch(rf"({names})(\..*)?", module))


def test_imports_point_downward_without_a_circle():
    graph = import_graph()
    assert len(graph) > 40
    for module, imported in graph.items():
        for other in imported:
            same_folder = module.partition(".")[0] == other.partition(".")[0]
            assert floor(other) > floor(module) or same_folder, f"{module} imports {other}"
    order = graphlib.TopologicalSorter(graph).static_order()  # raises CycleError on a circle
    assert set(order) == graph.keys()


def test_readme_names_every_room_and_the_right_lines():
    readme = (ROOT / "README.md").read_text()
    rooms = [path.name for path in ROOT.glob("[!t]*.py")] + ["train.py", "test_all.py"]
    rooms += [f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")]
    for room in rooms:
        assert f"`{room}`" in readme, f"{room} is not in the README's file map"
    found = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", readme)
    assert len(found) >= 6
    for name, file, line in found:
        lines = (ROOT / file).read_text().splitlines()
        right = [i for i, text in enumerate(lines, 1) if re.match(rf" *(def|class) {name}\b", text)]
        assert right == [int(line)], f"{name} is at line {right} of {file}"


def test_every_page_is_reached_from_the_readme():
    rooms = [ROOT, *(path.parent for path in ROOT.glob("*/__init__.py"))]
    pages, reached = {page for room in rooms for page in room.glob("*.md")}, set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        for link in re.findall(r"\]\(([^)#:]+)(?:#\w+)?\)", page.read_text()):
            target = Path(os.path.normpath(page.parent / link))
            assert target.exists(), f"{page.relative_to(ROOT)} leads to {link}"
            if target.suffix == ".md" and target not in reached:
                waiting.append(target)
    assert reached == pages


def test_a_new_algorithm_is_one_file_and_one_line(tmp_path, monkeypatch, capsys, run_train):
    """The README's recipe, word by word, on the built-in world."""
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(\"\"\"SimPO.*?)```", readme, re.S)
    (line,) = re.findall(r'^    ("simpo": .*),$', readme, re.M)
    assert code.count("\n") <= 80
    (tmp_path / "simpo.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    simpo = importlib.import_module("simpo")
    name, kind = line.split(": ")
    monkeypatch.setitem(train.ALGORITHMS, json.loads(name), eval(kind, {"simpo": simpo}))
    with pytest.raises(SystemExit):
        train.main(["--algo", "simpo", "--help"])
    assert train.about(simpo.SimPO) in (shown := capsys.readouterr().out) and "--margin" in shown
    run_train("--algo", "simpo", "--corrections", 8, "--test_scenes", 4, "--batch_size", 8,
              "--steps", 3, "--log_every", 1, "--learning_rate", 1e-4)
    losses = [line["loss"] for line in read_log("runs/simpo")]
    assert len(losses) == 3 and losses[2] < losses[0]
    page = Path("runs/simpo/report.html").read_text()
    assert train.about(simpo.SimPO).rstrip(".") in page and "Reward margin" in page
    assert not Path("runs/simpo/reference.json").exists()  # nothing scored a reference
    loss = simpo.simpo_loss(torch.tensor([-1.0]), torch.tensor([-2.0]), beta=2.0, margin=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-(2 * -1 + 2 * 2 - 0.5))))


def test_runs_are_planned_from_settings_alone(tmp_path, monkeypatch, run_train):
    monkeypatch.chdir(tmp_path)
    made = "runs/world"
    vision, base = ("vision", f"{made}/vision"), ("base", f"{made}/base")
    rm = lambda name: [("rm", f"{made}/rm-{name}")]
    plan = lambda command: recipes.plan(*train.parse(command.split()), train.ALGORITHMS)
    for command, first in {
        "ddpo": [],  # the base is shipped
        "sft --from_scratch": [vision, base],
        "rm": [], "rm --from_scratch": [vision, base, ("rm_init", f"{made}/rm_init")],
        "ppo --from_scratch": [vision, base, ("rm_init", f"{made}/rm_init"),
                               *rm("plain-scratch-0")],
        "ppo": rm("plain-0"), "ppo --facts --seed 2": rm("facts-2"),
        "ppo --lora 4": rm("plain-lora4-0"), "ppo --reward_model x": [],
        "ppo --dtype bfloat16 --lora 4 --lora_alpha 2": rm("plain-lora4-alpha2-bf16-0"),
        "base --model x": [], "base --seed 1": [("vision", f"{made}/vision-seed1")],
    }.items():
        algo = command.partition(" ")[0]
        assert [(run.algo, run.out) for run, _ in plan(f"--algo {command}")] == [*first, (algo, "")]
    killed = tmp_path / made / "rm-plain-0"
    killed.mkdir(parents=True)
    (killed / reward.HEAD).write_text("")  # killed before its model was saved
    assert len(plan("--algo ppo")) == 2
    (killed / "model").mkdir()
    (killed / "model" / "config.json").write_text("{}")
    assert len(plan("--algo ppo")) == 1
    for facts in ("", "--facts"):  # a killed reward model: resumed, or begun again if others differ
        (step, cfg), _ = plan(f"--algo ppo --lora 2 {facts}")
        Path(step.out).mkdir(exist_ok=True)
        json_file(Path(step.out), {"versions": {"plumbline": "0"},
                                   "settings": runs.settings_of(step, cfg)}, "config.json")
        for more, resume in (("", True), ("--image_mode pad", False)):
            (step, _), _ = plan(f"--algo ppo --lora 2 {facts} {more}")
            assert (step.resume, step.overwrite) == (resume, not resume)
    (first, settings), _ = plan("--algo ppo --facts --dtype bfloat16")
    assert settings.facts and first.dtype == "bfloat16" and not first.resume
    with pytest.raises(ValueError, match="--algo vision trains all weights; leave out --lora"):
        plan("--algo vision --lora 4")
    assert run_train("--algo", "ppo", "--facts", "--dry_run").count("--algo") == 2
    few = ("--corrections", 3, "--dry_run")
    assert "rankings-train-3-" in run_train("--algo", "dpo", "--feedback", "rankings", *few)
    assert "questions-0-3-72/conv" in run_train("--algo", "sft", "--feedback", "questions", *few)
    assert not list(Path("runs/world").glob("corrections-*-3"))
    assert not (tmp_path / made / "rm-facts-0").exists()


def test_a_run_that_comes_first_is_awaited_and_stopped_in_its_own_name(
        tmp_path, monkeypatch, run_train):
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(train, "train_in", lambda folder, start, *_: calls.append(folder.name))
    folder = tmp_path / "runs/world/rm-plain-0"
    with ThreadPoolExecutor() as pool:
        with files.lock_folder(folder):
            waiting = pool.submit(train.main, ["--algo", "ppo", "--test_scenes", "0"])
            time.sleep(5)
            made = {"settings": {}, "versions": {"plumbline": "0"}}
            json_file(folder, made, "config.json"), (folder / "report.html").touch()
        assert waiting.result() == 0 and calls == ["ppo"]  # the other process made the first one
    shutil.rmtree(folder)

    def stop(folder, *_):
        raise loop.Interrupted("stopped and saved at step 1 of 2")
    monkeypatch.setattr(train, "train_in", stop)
    assert run_train("--algo", "ppo", status=130).endswith(
        "runs/world/rm-plain-0: stopped and saved at step 1 of 2; the same command continues\n")
    assert run_train("--algo", "ddpo", status=130).endswith(
        "stopped and saved at step 1 of 2; the same command with --resume continues\n")


def test_options_that_exclude_each_other_end_in_a_sentence(capsys):
    for command, phrase in (
        ("ppo --rollout_size 30", "not a multiple of --batch_size 32"),
        ("ppo --samples 1", "--samples should be at least 2 (or take --baseline critic)"),
        ("ppo --length_penalty_tokens 0", "at least 1"),
        ("grpo --samples 1", "--samples should be at least 2"),
        ("online_ddpo --facts", "go with --feedback reward_model"),
        ("online_ddpo --feedback reward_model --samples 1", "--samples should be at least 2"),
    ):
        with pytest.raises(SystemExit):
            train.main(["--algo", *command.split()])
        assert phrase in capsys.readouterr().err.splitlines()[-1]
    train.parse("--algo ppo --samples 1 --baseline critic".split())


def test_what_a_base_answered_is_named_by_its_precision_too(tiny_world, tokenizer, tmp_path):
    keys = {make_start(copy.deepcopy(tiny_world).to(dtype), tokenizer, tmp_path).key
            for dtype in (torch.float32, torch.bfloat16)}
    assert sorted(map(len, keys)) == [8, 13]


def test_options_of_optimiser_and_images(tiny, tmp_path):
    muon = SimpleNamespace(optimizer="muon", muon_rate=0.1, learning_rate=0.01, weight_decay=0.5,
                           adam_beta2=0.9)
    weights = {n: p for n, p in tiny.named_parameters() if n.startswith("decoder")}
    found = [(group["peak"], group["weight_decay"], {p.ndim for p in group["params"]})
             for each in loop.make_optimizers(weights, muon, lambda name: 0.01)
             for group in each.param_groups]
    assert found == [(0.01, 0.5, {2}), (0.01, 0.0, {1}), (0.1, 0.5, {2})]  # AdamW twice, Muon
    for mode in ("pad", "crop"):
        given = train.parse(["--image_mode", mode])
        start = recipes.load_start(*given, ddpo.DDPO, torch.device("cpu"), tmp_path)
        assert start.images.mode == mode


def test_reward_models_start_from_the_initialisation(tmp_path, monkeypatch, run_train):
    monkeypatch.chdir(tmp_path)
    run_train("--algo", "rm_init", "--steps", 4, "--batch_size", 4, "--layers", 1)
    base, trained = (load_llava(folder)[0]
                     for folder in (ROOT / "world/base", "runs/rm_init/model"))
    layers = trained.decoder.layers
    assert len(layers) == len(base.decoder.layers) + 1
    assert layers[-1].mlp.down_proj.weight.abs().max() > 0  # it began as 0
    monkeypatch.setitem(recipes.SHIPPED, "rm_init", tmp_path / "runs/rm_init/model")
    run_train("--algo", "rm", "--facts", "--rankings", 4, "--held_out", 2, "--batch_size", 2,
              "--learning_rate", 0)
    weights = load_llava("runs/rm/model")[0].state_dict()
    assert all(torch.equal(each, weights[name]) for name, each in trained.state_dict().items())


# =============================================================================== ddpo.py, sft.py


def test_scores_are_eq_4_and_5_by_hand():
    logp = torch.tensor([-1.0, -2.0, -0.5, -3.0, -0.25], dtype=torch.float64)
    weight = torch.tensor([1.0, 5.0, 1.0, 5.0, 1.0], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 1, 1])
    score = lambda weight, mean: ddpo.response_scores(logp, weight, group, 2, mean).tolist()
    # 1/N [sum of unchanged + gamma * sum of corrected], N = |unchanged| + gamma |corrected|
    assert score(weight, True) == pytest.approx(
        [(-1.0 - 0.5 + 5 * -2.0) / (2 + 5 * 1), (-0.25 + 5 * -3.0) / (1 + 5 * 1)], abs=1e-12)
    assert score(weight, False) == pytest.approx([-11.5, -15.25], abs=1e-12)
    assert score(torch.ones(5).double(), False) == pytest.approx([-3.5, -3.25], abs=1e-12)


def test_preference_loss_and_its_gradient_against_the_closed_form():
    values = torch.randn(4, 6, dtype=torch.float64)
    chosen, rejected = (v.clone().requires_grad_() for v in values[:2])
    beta = 0.3
    losses, r_chosen, r_rejected = ddpo.preference_loss(chosen, rejected, *values[2:], beta)
    margin = beta * ((values[0] - values[2]) - (values[1] - values[3]))
    torch.testing.assert_close(losses, torch.log(1 + torch.exp(-margin)))
    torch.testing.assert_close(r_chosen, beta * (values[0] - values[2]))
    torch.testing.assert_close(r_chosen - r_rejected, margin)
    losses.sum().backward()
    slope = beta / (1 + torch.exp(margin))  # DPO, Eq. 7: beta * sigmoid(-margin)
    torch.testing.assert_close(chosen.grad, -slope)
    torch.testing.assert_close(rejected.grad, slope)


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fused", ["off", "on"])
def test_margin_is_0_where_policy_is_reference(tiny, tmp_path, lora, dtype, fused):
    """Policy and reference are computed in one precision: the first margins are exactly 0."""
    start = make_start(tiny, None, tmp_path, dtype=dtype, lora=lora)
    recipes.select_weights(start, ddpo.DDPO)
    settings = ddpo.DDPOConfig(batch_size=4, micro_batch=4, fused=fused, beta=0.5, anchor=0.0)
    algorithm = ddpo.DDPO(start, settings, Data([random_example(i) for i in range(4)]))
    (batch,) = algorithm.batches(0)
    with start.autocast():
        loss, found = algorithm.loss(batch)
    rounding = 1e-6 if fused == "on" else 0  # the kernel sums a response in another order
    assert abs(found["rewards/margins"]) <= rounding >= abs(found["rewards/chosen"])
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_reference_is_kept_for_its_own_data_and_precision(tiny, tmp_path, monkeypatch):
    examples = [random_example(i) for i in range(3)]
    first = make_ddpo(tiny, examples, tmp_path).reference
    assert make_ddpo(tiny, examples, tmp_path).reference == first  # read back
    other = [replace(examples[0], content="another picture"), *examples[1:]]
    for changed, settings in ((examples, {"normalize": False}), (examples[:2], {}), (other, {})):
        with pytest.raises(ValueError, match="reference.json belongs to another"):
            make_ddpo(tiny, changed, tmp_path, **settings)
    aside = tmp_path / runs.ASIDE / "reference.json"  # of a run that this one replaces
    aside.parent.mkdir()
    (tmp_path / aside.name).rename(aside)
    with monkeypatch.context() as patch:
        patch.setattr(ddpo, "pair_scores", None)
        assert make_ddpo(tiny, examples, tmp_path).reference == first
    assert json.loads((tmp_path / aside.name).read_text())["scores"] == first
    for broken in ("{", json.dumps({"key": "another", "scores": {}})):
        aside.write_text(broken)
        (tmp_path / aside.name).unlink()
        assert make_ddpo(tiny, examples, tmp_path).reference == first


def test_supervised_loss_by_hand():
    logp, weight = torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([1.0, 0.5, 0.0])
    assert sft.supervised_loss(logp, weight).item() == pytest.approx((1 + 1) / 1.5)
    assert sft.supervised_loss(logp, torch.ones(3)).item() == pytest.approx(7 / 3)


# ====================================================================================== reward.py


def make_prompt(tokenizer, i=0, question="Describe it.", facts=("a car", "a dog", "a tree"), **kw):
    image = torch.randn(PATCHES, 16, generator=torch.Generator().manual_seed(i))
    tokens = data.prompt_tokens(tokenizer, data.prompt_text(question), PATCHES)
    return Example(f"row {i}", image, tokens, question=question, facts=list(facts), **kw)


def make_pair(tokenizer, i=0):
    texts = f"There is a car. {'A dog. ' * (i % 3)}", "A tree at the top."
    responses = [data.turn(tokenizer, "", text) for text in texts]
    return replace(make_prompt(tokenizer, i), responses=responses)


def make_reward_model(model, tokenizer, adapter=None):
    reward_model = reward.RewardModel(model, adapter)
    reward_model.start_from_verdict(tokenizer)
    return reward_model


def test_pairwise_loss_by_hand_and_its_gradient_against_the_closed_form():
    chosen, rejected = torch.tensor([1.0, 0.5]), torch.tensor([0.0, 1.5])
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2 + 1e-3 * 1.5
    assert reward.pairwise_loss(chosen, rejected).item() == pytest.approx(expected, abs=1e-6)
    chosen, rejected = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    reward.pairwise_loss(chosen, rejected, 0.01).backward()
    slope = -torch.sigmoid(rejected - chosen) / 5
    centre = 0.01 * (chosen + rejected).mean().sign() / 5
    torch.testing.assert_close(chosen.grad, (slope + centre).detach())
    torch.testing.assert_close(rejected.grad, (-slope + centre).detach())
    # In parts, as on several processes, it is the same, though a part's mean may have another sign.
    pairs = torch.tensor([[3.0, 1.0], [-1.0, -2.0], [0.5, 1.5]], requires_grad=True)  # level > 0
    whole = reward.pairwise_loss(*pairs.T, 0.5)
    parts = [reward.pairwise_loss(*part.T, 0.5, level=3.0) * len(part) / 3
             for part in pairs.split([1, 2])]
    torch.testing.assert_close(sum(parts), whole)
    slopes = (torch.autograd.grad(each, pairs)[0] for each in (sum(parts), whole))
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("words", [0, 1, 2, 5, 17])
def test_reward_is_read_at_the_requests_last_token(tiny_world, tokenizer, words):
    prompt = make_prompt(tokenizer)
    texts = [tokenizer.encode("car " * words, eos=True), tokenizer.encode("a dog", eos=True)]
    reward_model = reward.RewardModel(tiny_world)
    nn.init.normal_(reward_model.weight, generator=torch.Generator().manual_seed(0))
    both = reward_model(reward.reward_batch(reward_model, tokenizer, [(prompt, texts)]))
    facts = sorted(prompt.facts)
    for text, found in zip(texts, both):
        request = tokenizer.encode(f"USER: {data.reward_request(facts)} ASSISTANT:")
        plain = torch.tensor([prompt.prompt + text[:-1] + request])
        hidden = tiny_world(prompt.image[None], plain)[0, -1]
        expected = hidden @ reward_model.weight + reward_model.bias
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert tokenizer.decode(plain[0]).endswith("ASSISTANT:")


def test_request_has_the_form_that_the_initialisation_trained_on(tokenizer):
    text, given = "There is a car.", ["a car", "a dog"]
    trained = tokenizer.encode(
        f"\nDescribe it. ASSISTANT: {text} USER: {data.reward_request(given)} ASSISTANT:")
    answer = tokenizer.encode(text, eos=True)
    with_facts, without = (
        reward.with_request(tokenizer, answer, facts).tokens for facts in (given, ()))
    assert tokenizer.encode("\nDescribe it. ASSISTANT:") + with_facts[:-1] == trained
    # facts change only the request
    assert without[: len(answer) - 1] == with_facts[: len(answer) - 1] == answer[:-1]
    assert without != with_facts


def test_reward_does_not_depend_on_the_order_of_the_captions(tiny_world, tokenizer):
    reward_model, answers = make_reward_model(tiny_world, tokenizer), [[5, 6], [7, 8, 9]]
    rewards = lambda facts: reward.rate(
        reward_model, tokenizer, [(make_prompt(tokenizer, facts=facts), answers)], 1)
    facts = [f"fact {i}" for i in range(6)]
    for seed in range(3):
        assert torch.equal(rewards(facts), rewards(Random(seed).sample(facts, 6)))
    assert not torch.equal(rewards(facts), rewards(facts[1:]))
    given = [dataclasses.replace(make_pair(tokenizer), facts=each) for each in (facts, facts[::-1])]
    one, two = (reward.reward_batch(reward_model, tokenizer, reward.pair_rows([each]))
                for each in given)  # in training too
    assert torch.equal(one.tokens, two.tokens)


def test_verdict_head_is_log_odds_of_yes(tiny_world, tokenizer):
    reward_model = make_reward_model(tiny_world, tokenizer)
    batch = reward.reward_batch(reward_model, tokenizer, reward.pair_rows([make_pair(tokenizer)]))
    logits = tiny_world.head(tiny_world.response_states(batch))
    yes, no = (tokenizer.encode(word)[0] for word in ("Yes.", "No."))
    torch.testing.assert_close(
        reward_model(batch), logits[:, yes] - logits[:, no], atol=1e-5, rtol=1e-4)


def optimise(algorithm, steps, rate):
    """Metrics of every step; the loop of train.py without what is around it."""
    optimizer, history = torch.optim.Adam(algorithm.modules.parameters(), rate), []
    for step in range(steps):
        batches = algorithm.batches(step)
        total = sum(map(algorithm.size, batches))
        optimizer.zero_grad()
        for batch in batches:
            loss, found = algorithm.loss(batch)
            (loss * algorithm.size(batch) / total).backward()
        optimizer.step()
        history.append(found)
    return history


def test_a_reward_model_learns_a_simple_preference(tiny_world, tokenizer, tmp_path):
    pairs = [make_pair(tokenizer, i) for i in range(8)]
    config = reward.RMConfig(batch_size=8, micro_batch=4, head="zero", epochs=20)
    start = make_start(copy.deepcopy(tiny_world), tokenizer, tmp_path)
    algorithm = reward.RewardTraining(start, config, Data(pairs, pairs))
    mean = lambda values: {name: each.mean() for name, each in values.items()}
    assert algorithm.measure(None, mean)[0]["agreement"] == 0.5  # rewards are 0: ties count half
    assert optimise(algorithm, 8, 3e-3)[-1]["rewards/accuracies"] == 1.0
    measured, records = algorithm.measure(None, mean)
    assert measured["agreement"] == 1.0 and len(records) == 8
    assert reward.agreement([{"rewards": [0, 1]}, {"rewards": [2, 2]}]).tolist() == [0, 0.5]


@pytest.mark.parametrize("text, truth, expected", [
    ("A. a car", "A", 1.0), ("The correct option is B.", "B", 1.0), ("B. a dog", "A", 0.0),
    ("An apple", "A", 0.0), ("No, there is not.", "no", 0.5), ("Yes.", "no", -0.5),
    ("Perhaps.", "no", 0.0), ("Yes.", "yes", 0.0), ("No.", "yes", 0.0), ("No.", None, 0.0),
    (" No.", "no", 0.5), ("", "no", 0.0),
])
def test_symbolic_reward(text, truth, expected):
    assert scoring.symbolic_reward(text, truth) == expected


def test_scorer_adds_the_rules(tiny_world, tokenizer):
    reward_model = make_reward_model(tiny_world, tokenizer)
    scorer = scoring.Scorer(reward_model, tokenizer, ppo.PPOConfig(micro_batch=2))
    completions = [tokenizer.encode("No.", eos=True), [9, 9]]
    parts = scorer([(make_prompt(tokenizer, truth="no", length_factor=0.5), completions)])
    assert parts["symbolic"].tolist() == [1.0, 0.0]  # 2.0 x 0.5
    assert parts["no_end"].tolist() == [0.0, -8.0]
    lengths = torch.tensor([len(each) for each in completions])
    torch.testing.assert_close(parts["length"], 0.5 * -10 * lengths / 896)
    for value in (math.nan, math.inf):
        nn.init.constant_(reward_model.bias, value)
        with pytest.raises(ValueError, match="NaN or infinity for 2 of 2 answers .to row 0."):
            scorer([(make_prompt(tokenizer), [[5], [6]])])


def test_head_is_saved_and_refused_elsewhere(tiny_world, tokenizer, tmp_path):
    saved, again = make_reward_model(tiny_world, tokenizer), reward.RewardModel(tiny_world)
    start = SimpleNamespace(tokenizer=tokenizer, base="abc", images=IMAGES)
    origin = reward.provenance(start, facts=True)
    reward.save_head(saved, tmp_path, origin)
    reward.load_head(again, tmp_path, origin)
    assert torch.equal(saved.weight, again.weight)
    for key, wrong, phrase in (
        ("base", "xyz", "another base"), ("tokenizer", "x", "another tokenizer"),
        ("facts", "without facts", "trained with facts; add --facts"),
        ("image_mode", "crop", "trained with --image_mode pad; add it")):
        with pytest.raises(ValueError, match=phrase):
            reward.load_head(again, tmp_path, {**origin, key: wrong})
    for change in (lambda w: {"weight": w["weight"][:5]}, lambda w: w | {"x": w["bias"].clone()}):
        damage(tmp_path / reward.HEAD, change)
        with pytest.raises(ValueError, match="safetensors: not a head of 32 weights and a bias"):
            reward.load_head(again, tmp_path, {})
        reward.save_head(saved, tmp_path, origin)


def test_the_releases_request_and_head_are_read(tiny_world, tokenizer, tmp_path):
    """From a checkout of the release: the prompt's file, and the constant for its captions."""
    for folder in ("prompts", "data_utils", "rm"):
        (tmp_path / folder).mkdir()
    file = tmp_path / "prompts" / "fact.txt"
    file.write_text("USER: 1. Right. {factual_prompt}\n2. Short. ASSISTANT: My score is\n")
    constants = "FACTUAL_PROMPT = 'By captions:\\n'\n1 / 0"  # not run
    (tmp_path / "data_utils" / "constants.py").write_text(constants)
    request, answer = reward.read_request(file, facts=True), tokenizer.encode("A car.", eos=True)
    plain = reward.read_request(file, facts=False)
    assert plain == request.replace("By captions:\n" + reward.FACTS, "") != request
    found = reward.with_request(tokenizer, answer, ["two", "one"], request)
    written = "USER: 1. Right. By captions:\n  - one\n  - two\n\n2. Short. ASSISTANT: My score is"
    assert found.tokens == answer + tokenizer.encode(written) + [EOS]  # the answer's end stays
    (tmp_path / "plain.txt").write_text("USER: Good? ASSISTANT:")
    for path, phrase in (("plain.txt", "has no {factual_prompt}"), ("none.txt", "no such file")):
        with pytest.raises(ValueError, match=phrase):
            reward.read_request(tmp_path / path, facts=True)
    # the release's head: other shapes, and it does not say what it belongs to
    head = {"weight": torch.randn(1, 32), "bias": torch.randn(1)}
    torch.save(head, tmp_path / "rm" / "reward_head")
    save_llava(tiny_world, tokenizer, IMAGES, tmp_path / "rm" / "model")
    (tmp_path / "rm" / reward.REQUEST).write_text(request)
    with pytest.raises(FileNotFoundError, match="a pickle; convert it there: (.*)") as told:
        scoring.load_judge(tmp_path / "rm", torch.device("cpu"))
    subprocess.run(str(told.value).partition("there: ")[2], shell=True, check=True,
                   cwd=tmp_path / "rm", env=os.environ | {"PATH": f"{Path(sys.executable).parent}"})
    judge = scoring.load_judge(tmp_path / "rm", torch.device("cpu"))
    assert torch.equal(judge.reward_model.weight, head["weight"][0]) and judge.facts is None
    assert judge.reward_model.bias == head["bias"][0] and judge.reward_model.request == request
    assert scoring.has_own_base(tmp_path / "rm", make_start(tiny_world, tokenizer, tmp_path))


# ================================================================================ ppo.py: its parts


def padded(*lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


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


def test_padding_contributes_nothing_and_whitening_is_over_all_tokens():
    mask = padded(4, 2, 3)
    rewards, values = torch.randn(2, *mask.shape) * 3 + 5
    dirty = lambda x: torch.where(mask, x, torch.full_like(x, math.nan))
    scores = torch.randn(3)
    for function in (lambda a, b: torch.stack(ppo.gae(a, b, mask, 0.9, 0.8)),
                     lambda a, _: ppo.whiten(a, mask),
                     lambda a, _: ppo.shaped_rewards(scores, a, mask, 0.1)):
        assert torch.equal(function(rewards, values), function(dirty(rewards), dirty(values)))
    white = ppo.whiten(rewards, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert white[mask].square().mean().item() == pytest.approx(1, abs=1e-5)
    assert not white[~mask].any() and ppo.whiten(torch.ones(1, 1), padded(1)).item() == 0


def test_score_comes_at_the_last_token():
    rewards = ppo.shaped_rewards(torch.tensor([2.0, -1.0]), torch.ones(2, 3), padded(3, 1), 0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, -0.1, 1.9], [-1.1, 0.0, 0.0]]))


def test_group_baseline_is_the_siblings_mean_return():
    """REINFORCE leave-one-out (arXiv 2402.14740): A_i = R_i - mean of R_j over the siblings j."""
    returns = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    assert ppo.sibling_mean(returns, 3).tolist() == [4.0, 3.5, 1.5, 1.5, 1.5, 0.0]
    mask, scores = padded(3, 1, 2, 2), torch.tensor([1.0, 2.0, -1.0, 0.5])
    rewards = ppo.shaped_rewards(scores, torch.rand(4, 3), mask, 0.1)
    values = ppo.sibling_mean(rewards.sum(1), 2)[:, None].expand_as(rewards)
    advantages, returns = ppo.gae(rewards, values, mask, 1.0, 1.0)
    whole = rewards.sum(1)
    torch.testing.assert_close(advantages[:, 0], whole - whole[[1, 0, 3, 2]])  # at first tokens
    torch.testing.assert_close(returns[0, 2], rewards[0, 2])  # later ones: what is still to come


def test_kl_estimators_against_exact_kl():
    g = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 6, generator=g, dtype=torch.float64).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    found = {name: ppo.kl_estimate(policy, reference, name) for name in ("k1", "k1_clamped", "k3")}
    mean = {name: (policy.exp() * each).sum() for name, each in found.items()}  # over every token
    torch.testing.assert_close(mean["k1"], exact)
    torch.testing.assert_close(mean["k3"], exact)
    assert mean["k1_clamped"] > exact  # biased upwards, as the file says
    assert (found["k3"] >= 0).all() and (found["k1_clamped"] >= 0).all()


@pytest.mark.parametrize("loss, now, target, losses, clipped, slopes", [
    # of log-probabilities and advantages: no slope where the clip decides; A at ratio 1
    (ppo.policy_loss, [0.5, -0.5, 0.5, -0.5, 0.0], [2.0, 2.0, -3.0, -3.0, 7.0],
     [-2 * 1.2, -2 * math.exp(-0.5), 3 * math.exp(0.5), 3 * 0.8, -7],
     [True, False, False, True, False], [0, -2 * math.exp(-0.5), 3 * math.exp(0.5), 0, -7]),
    # of values and returns: the second would be right, but gained by leaving: held at 0.2
    (ppo.value_loss, [0.1, 1.0, -1.0], [1.0, 1.0, 1.0], [0.405, 0.32, 2.0],
     [False, True, False], [-0.9, 0.0, -2.0]),
], ids=["policy", "value"])
def test_clipped_losses_and_gradients_by_hand(loss, now, target, losses, clipped, slopes):
    now = torch.tensor(now, dtype=torch.float64, requires_grad=True)
    found, where, *kl = loss(now, torch.zeros_like(now), torch.tensor(target), 0.2)
    assert found.tolist() == pytest.approx(losses, abs=1e-12) and where.tolist() == clipped
    for each in kl:  # approximate KL(old || now) of the policy
        assert each.tolist() == pytest.approx([0.125] * 4 + [0])
    found.sum().backward()
    assert now.grad.tolist() == pytest.approx(slopes, abs=1e-12)


def test_explained_variance_and_adaptive_kl():
    returns = torch.randn(50)
    assert ppo.explained_variance(returns, returns) == pytest.approx(1)
    assert ppo.explained_variance(torch.zeros(50), returns) == pytest.approx(0, abs=1e-6)
    assert ppo.explained_variance(torch.randn(5), torch.ones(5)) == 0
    for kl, completions, horizon, expected in (
        (60.0, 256, 10000, 1 + 0.2 * 0.0256), (5.4, 100, 1000, 1 - 0.1 * 0.1), (6.0, 100, 1000, 1)):
        found = ppo.adaptive_kl_coef(0.1, kl, 6.0, completions, horizon)
        assert found == pytest.approx(0.1 * expected)


# ============================================================================ rollouts.py, and PPO


def test_the_critic_recomputes_activations_as_the_policy_does(
        tiny_world, tokenizer, tmp_path, monkeypatch):
    judge = make_reward_model(tiny_world, tokenizer)
    monkeypatch.setattr(rollouts, "load_reward_model", lambda *_: copy.deepcopy(judge))
    start = make_start(copy.deepcopy(tiny_world), tokenizer, tmp_path, gradient_checkpointing=True)
    roles = rollouts.make_roles(start, ppo.PPOConfig(baseline="critic"), with_critic=True)
    assert roles.critic.model.decoder.gradient_checkpointing


def test_four_adapters_are_four_models(tiny_world, tokenizer):
    """Over one base, each adapter computes what a separate model with its weights computes."""
    shared = copy.deepcopy(tiny_world)
    names = ("policy", "critic", "reward", "reference")
    for seed, name in enumerate(names):
        add_adapter(shared, name, 4, 16.0, seed=seed)
        g = torch.Generator().manual_seed(seed)
        for module in lora_layers(shared, name):
            nn.init.normal_(module.adapters[name].B, 0, 0.2, generator=g)
    batch = rollouts.completion_batch(shared, [(make_prompt(tokenizer), [[5, 6, 7], [8, 9]])])
    found = {name: rollouts.AdaptedModel(shared, name).logp(batch, 1.0) for name in names}
    for name in names:
        alone = copy.deepcopy(shared)
        for module in lora_layers(alone, name):
            for other in set(names) - {name}:
                del module.adapters[other]
            module.active = name
        assert torch.equal(found[name], alone.response_logp(batch))
        reward_model = make_reward_model(shared, tokenizer, name)
        with use_adapter(shared, "policy"):  # whatever is active around it
            rewards = reward_model(batch)
            assert torch.equal(shared.response_logp(batch), found["policy"])  # active again
        states = alone.response_states(batch)
        assert torch.equal(rewards, (states * reward_model.weight).sum(-1) + reward_model.bias)
    assert len({tuple(values.tolist()) for values in found.values()}) == 4


def test_temperature_divides_the_logits(tiny_world, tokenizer):
    batch = rollouts.completion_batch(tiny_world, [(make_prompt(tokenizer), [[5, 6, 7]])])
    logits = tiny_world.head(tiny_world.response_states(batch)) / 0.7
    expected = logits.log_softmax(-1)[torch.arange(3), batch.target]
    found = rollouts.AdaptedModel(tiny_world).logp(batch, 0.7)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def on_policy(model, tokenizer, folder, kind=ppo.PPO, prompt_count=8, score=len, **changes):
    """An algorithm on given rewards; 4 prompts per rollout, 2 completions of each."""
    settings = {"rollout_size": 4, "batch_size": 2, "samples": 2, "micro_batch": 2,
                "max_new_tokens": 4, "epochs": 4, **changes}
    model = copy.deepcopy(model)
    scores = lambda rows: {"rm": torch.tensor(
        [float(score(each)) for _, completions in rows for each in completions])}
    with_critic = changes.get("baseline") == "critic"
    critic = reward.RewardModel(copy.deepcopy(model)) if with_critic else None
    roles = rollouts.Roles(rollouts.AdaptedModel(model),
                           rollouts.AdaptedModel(copy.deepcopy(model)), scores, critic)
    prompts = [make_prompt(tokenizer, i) for i in range(prompt_count)]
    known = Data(prompts, false_parts=lambda example, text: ["x"] if "car" in text else [])
    return kind(make_start(model, tokenizer, folder), kind.Config(**settings), known, roles)


def test_first_step_has_ratio_1_and_no_kl(tiny_world, tokenizer, tmp_path):
    algorithm = on_policy(tiny_world, tokenizer, tmp_path)
    for batch in algorithm.batches(0):
        logp = algorithm.roles.policy.logp(batch, 1.0)
        torch.testing.assert_close(logp, batch.old_logp, atol=1e-5, rtol=0)
        _, found = algorithm.loss(batch)
        assert found["policy/clipfrac"] == 0 and found["policy/approxkl"] < 1e-9
    assert found["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert found["objective/rlhf_reward"] == pytest.approx(found["objective/scores"], abs=1e-4)
    lines = read_log(tmp_path, "samples.jsonl")
    assert len(lines) == 8 and {"answer", "score", "kl", "false", "step"} <= lines[0].keys()
    assert found["tokens_per_second/rollout"] > 0


def test_minibatches_hold_every_completion_once(tiny_world, tokenizer, tmp_path):
    """With its own numbers."""
    algorithm = on_policy(tiny_world, tokenizer, tmp_path, inner_epochs=2)
    for first in (0, 2):  # two steps are an inner epoch
        seen = torch.cat([batch.old_logp for step in (first, first + 1)
                          for batch in algorithm.batches(step)])
        kept = algorithm.rollout.per_token["old_logp"][algorithm.rollout.mask]
        assert torch.equal(seen.sort().values, kept.sort().values)
    rollout, batch = algorithm.rollout, algorithm.minibatch([3, 1])
    expected = [t for row in (3, 1) for completion in rollout.tokens[row] for t in completion]
    assert batch.target.tolist() == expected
    order = torch.tensor([6, 7, 2, 3])
    for name, each in rollout.per_token.items():
        assert torch.equal(getattr(batch, name), each[order][rollout.mask[order]])


BANDIT = {"prompt_count": 1, "rollout_size": 1, "batch_size": 1, "samples": 32, "max_new_tokens": 1,
          "epochs": 40}  # one prompt, completions of one token


@pytest.mark.parametrize("kind", [ppo.PPO, grpo.GRPO])
def test_the_optimum_of_a_bandit_is_found(kind, tiny_world, tokenizer, tmp_path):
    """A reward for one of four tokens: it must take over."""
    model, prompt = copy.deepcopy(tiny_world), make_prompt(tokenizer)
    with torch.no_grad():  # only tokens 5 to 8 are likely at first
        states = model(prompt.image[None], torch.tensor([prompt.prompt]))[0, -1]
        model.head.weight[5:9] += 6 * states / states.square().sum()
    algorithm = on_policy(model, tokenizer, tmp_path, kind, kl_coef=0.0,
                          score=lambda completion: completion[0] == 7, **BANDIT)
    history = optimise(algorithm, 30, 5e-3)
    assert history[0]["objective/scores"] < 0.6
    assert history[-1]["objective/scores"] > 0.95


def test_group_advantages_and_both_means_by_hand():
    scores = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    plain = [-2.0, -1.0, 3.0, 0.0, 0.0, 0.0]
    assert grpo.group_advantages(scores, 3, divide_by_std=False).tolist() == plain
    std = math.sqrt((4 + 1 + 9) / 2) + 1e-4  # the second group has no spread: 0, not NaN
    found = grpo.group_advantages(scores, 3).tolist()
    assert found == pytest.approx([each / std for each in plain])
    losses, group = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([0, 0, 0, 1])
    assert grpo.answer_mean(losses, group, 2).item() == (2 + 10) / 2


@pytest.mark.parametrize("loss_mean", ["tokens", "answers"])
def test_grpo_loss_by_hand_whatever_the_micro_batch(loss_mean, tiny_world, tokenizer, tmp_path):
    """And its first gradient is the policy gradient, the ratio being 1 and the KL 0."""
    found, model, prompt = [], copy.deepcopy(tiny_world), make_prompt(tokenizer)
    with torch.no_grad():  # some completions end early
        states = model(prompt.image[None], torch.tensor([prompt.prompt]))[0, -1]
        model.head.weight[EOS] += 5 * states / states.square().sum()
    for micro_batch in (1, 2, 4):
        algorithm = on_policy(model, tokenizer, tmp_path, grpo.GRPO, batch_size=4,
                              micro_batch=micro_batch, loss_mean=loss_mean, max_new_tokens=6,
                              score=lambda completion: len(completion) + completion[0])
        batches = algorithm.batches(0)
        total = sum(map(algorithm.size, batches))
        for batch in batches:
            loss, _ = algorithm.loss(batch)
            (loss * algorithm.size(batch) / total).backward()
        found.append(algorithm.roles.policy.model.head.weight.grad)
    batch = algorithm.minibatch(range(4))
    assert len({*batch.group.bincount().tolist()}) > 1  # of different lengths
    logp, share = algorithm.roles.policy.logp(batch, 1.0), torch.ones(len(batch.target))
    if loss_mean == "answers":
        share = 1 / batch.group.bincount()[batch.group]
    algorithm.modules.zero_grad()
    (-(batch.advantages * logp * share).sum() / share.sum()).backward()
    expected = algorithm.roles.policy.model.head.weight.grad
    assert expected.abs().max() > 1e-4
    for each in found:
        torch.testing.assert_close(each, expected, atol=1e-6, rtol=1e-4)
    without, kl = algorithm.loss(batch)[0], math.exp(0.5) - 1.5
    batch.reference = batch.reference + 0.5  # x = log ref - log pi
    loss, metrics = algorithm.loss(batch)
    assert metrics["policy/kl"] == pytest.approx(kl, abs=1e-4)
    assert (loss - without).item() == pytest.approx(algorithm.config.kl_coef * kl, abs=1e-5)


def test_kl_penalty_pulls_the_policy_back(tiny_world, tokenizer, tmp_path):
    algorithm = on_policy(tiny_world, tokenizer, tmp_path, score=lambda completion: 0, kl_coef=1.0,
                         kl_estimator="k1", **BANDIT)
    with torch.no_grad():
        algorithm.roles.policy.model.decoder.norm.weight.mul_(3.0)
    kl = [found["objective/kl"] for found in optimise(algorithm, 40, 1e-3)]
    assert kl[0] > 0.5 and np.mean(kl[-10:]) < 0.5 * np.mean(kl[:10])


def test_a_critic_is_made_and_trained_only_if_asked_for(tiny_world, tokenizer, tmp_path):
    """It has a learning rate of its own; both baselines say what they explain."""
    for baseline, rates in (("group", {1e-4}), ("critic", {1e-4, 0.5})):
        algorithm = on_policy(tiny_world, tokenizer, tmp_path, baseline=baseline,
                              learning_rate=1e-4, critic_learning_rate=0.5)
        assert ("critic" in algorithm.modules) == ("val/loss" in optimise(algorithm, 1, 0)[0]) == (
            "returns" in algorithm.rollout.per_token) == (baseline == "critic")
        assert algorithm.rollout.metrics["val/explained_variance"] < 1
        weights = dict(algorithm.modules.named_parameters())
        groups = [group for each in loop.make_optimizers(weights, algorithm.config,
                                                          algorithm.peak_rate)
                  for group in each.param_groups]
        assert {group["lr"] for group in groups} == rates
        for group in groups:
            for weight in group["params"]:
                name = next(name for name, each in weights.items() if each is weight)
                assert (group["lr"] == 0.5) == name.startswith("critic.")
    assert algorithm.peak_rate("policy.layers.0.adapters.critic.A") == 0.5  # with LoRA
    algorithm.config.critic_learning_rate = None
    assert algorithm.peak_rate("critic.weight") == 1e-4  # the policy's


def test_sampled_log_probabilities_are_those_of_training(tiny_world, tokenizer, tmp_path):
    algorithm = on_policy(tiny_world, tokenizer, tmp_path, temperature=0.8, generate_batch=3,
                          max_new_tokens=9)
    algorithm.batches(0)
    rollout = algorithm.rollout
    assert rollout.metrics["rollout/logp_mismatch"] < 1e-5
    prompts = [algorithm.data.train[row] for row in rollout.rows]
    tokens, logp = rollouts.sample(algorithm.roles.policy, prompts, algorithm.config, 0, 0)
    assert tokens == rollout.tokens
    old = rollout.per_token["old_logp"][rollout.mask]
    torch.testing.assert_close(logp, old, atol=1e-5, rtol=0)
    _, warmer = rollouts.sample(
        algorithm.roles.policy, prompts, replace(algorithm.config, temperature=0.9), 0, 0)
    assert len(warmer) != len(old) or (warmer - old).abs().max() > 1e-3


def test_completions_are_cut_behind_a_question_mark(tiny_world, tokenizer, tmp_path, monkeypatch):
    mark, spaced = tokenizer.encode("a?")[-1], tokenizer.encode("?")[-1]
    given = [[5, mark, 7, EOS], [8, EOS], [9, spaced, mark], [spaced, 6, EOS]]

    def sampled(*_, on_logp, **__):
        on_logp(torch.arange(12.0))
        return list(map(torch.tensor, given))

    monkeypatch.setattr(rollouts, "generate", sampled)
    for cut, expected, logp in ((False, given, range(12)), (
            True, [[5, mark], [8, EOS], [9, spaced], [spaced]], [0, 1, 4, 5, 6, 7, 9])):
        config = ppo.PPOConfig(samples=2, cut_at_question=cut)
        found = rollouts.sample(rollouts.AdaptedModel(tiny_world), [make_prompt(tokenizer)] * 2,
                                config, 0, 0, tokenizer)
        assert sum(found[0], []) == expected and found[1].tolist() == list(logp)


def make_online(model, tokenizer, folder, prompt_count=4, correct=lambda example, text: text[:9],
                **changes):
    """Online DDPO on two rounds of half of the prompts, with a given annotator."""
    settings = {"rounds": 2, "batch_size": 2, "epochs": 2, "max_new_tokens": 6, "fused": "off",
                "beta": 0.5, "learning_rate": 0.01, "temperature": 1.0, **changes}
    data = Data([make_prompt(tokenizer, i) for i in range(prompt_count)], correct=correct)
    start = make_start(copy.deepcopy(model), tokenizer, folder)
    return online_ddpo.OnlineDDPO(start, online_ddpo.OnlineDDPOConfig(**settings), data)


@pytest.mark.parametrize("reference", ["base", "last"])
def test_online_rounds_learn_from_the_policy_as_it_is(reference, tiny_world, tokenizer, tmp_path):
    algorithm = make_online(tiny_world, tokenizer, tmp_path, reference=reference)
    assert (algorithm.steps, algorithm.per_round) == (4, 2)  # 2 prompts, twice, 2 to a batch
    optimizer, rounds, policy = torch.optim.SGD(algorithm.modules.parameters(), 1.0), [], []
    for step in range(4):
        if step % 2 == 0:
            policy.append(copy.deepcopy(algorithm.model))
        (batch,) = algorithm.batches(step)
        loss, metrics = algorithm.loss(batch)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        if step % 2 == 0:
            rounds.append((algorithm.round, metrics))
    (first, start), (second, later) = rounds
    asked = [[algorithm.data.train[place] for place, *_ in each.pairs] for each in (first, second)]
    assert sorted(each.name for each in asked[0] + asked[1]) == [f"row {i}" for i in range(4)]
    for i, each in enumerate((first, second)):  # sampled from the policy of that moment
        tokens, _ = rollouts.sample(
            rollouts.AdaptedModel(policy[i]), asked[i], algorithm.config, 0, i)
        assert [pair[3] for pair in each.pairs] == [
            tokenizer.decode(answer).strip() for (answer,) in tokens]
        assert all(chosen == rejected[:9].strip() for _, _, chosen, rejected in each.pairs)
    assert start["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert (abs(later["rewards/margins"]) < 1e-5) == (reference == "last")
    assert later["round"] == 2 and later["round/pairs"] == 2 and later["objective/kl"] != 0
    assert set(batch.weight.tolist()) == {1.0, 5.0}  # gamma, where the segments differ
    short = make_online(tiny_world, tokenizer, tmp_path, reference=reference, steps=2, epochs=50)
    assert sum(len(each.names) for each in short.batches(0)) == 2  # --batch_size, whatever epochs


def test_online_feedback_and_rounds_with_few_pairs(tiny_world, tokenizer, tmp_path, capsys):
    picky = lambda example, text: text[:9] if example.name == "row 1" else text
    algorithm = make_online(tiny_world, tokenizer, tmp_path, 4, picky, rounds=1, batch_size=4)
    sizes = [len(batch.names) for step in range(2) for batch in algorithm.batches(step)]
    assert sizes == [1, 1] and len(algorithm.round.pairs) == 1  # 2 passes in the 2 steps of 4 pairs
    algorithm.data.correct = lambda example, text: text
    algorithm.begin_round(1, 2)
    assert "repeats the last one" in capsys.readouterr().err and len(algorithm.round.pairs) == 1
    for useless in (lambda example, text: text, lambda example, text: "beyond the context " * 99):
        with pytest.raises(ValueError, match="none of 4 completions gave a pair"):
            make_online(tiny_world, tokenizer, tmp_path, 4, useless, rounds=1).batches(0)
    with pytest.raises(ValueError, match="have no annotator"):
        make_online(tiny_world, tokenizer, tmp_path, correct=lambda example, text: None)
    algorithm.config = replace(algorithm.config, feedback="reward_model", samples=4)
    choose = lambda *scores: algorithm.feedback(
        None, [{"answer": f"text {i}", "score": score} for i, score in enumerate(scores)])
    assert choose(0.5, -1.0, 2.0, 1.0) == [("text 2", "text 1")]
    assert choose(1.0, 1.0) == []  # nothing to choose
    find = online_ddpo.OnlineDDPO.depends
    assert find(algorithm.config) == ("base", "rm") != find(online_ddpo.OnlineDDPOConfig())


def test_unfit_rollouts_are_reported_once(tiny_world, tokenizer, tmp_path, capsys):
    algorithm = on_policy(tiny_world, tokenizer, tmp_path, max_new_tokens=1)
    for step in (0, 4):  # a rollout each
        algorithm.batches(step)
    shown = capsys.readouterr().err
    assert shown.count("were cut off at --max_new_tokens 1") == 1 and "%" in shown
    for baseline, remedy in (("group", "too differently"), ("critic", "--baseline group")):
        algorithm = on_policy(tiny_world, tokenizer, tmp_path, baseline=baseline)
        for explained in (0.01, 0.04, 0.06, 0.0, -1.0, 0.04):
            algorithm.watch(explained)
        assert not capsys.readouterr().err  # three in a row are not enough
        algorithm.watch(0.04), algorithm.watch(0.04)
        assert capsys.readouterr().err.count(remedy) == 1


# ========================================================================= from rows to examples


@pytest.fixture
def read_given(tiny_world, tokenizer, tmp_path):
    """A function that reads rows as an algorithm does; makes one file of a row with captions."""
    row = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                               {"from": "gpt", "value": "A car."}],
           "output_1": {"value": "A dog."}, "output_2": {"value": "A cat."}, "preference": 2}
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    (tmp_path / "captions.json").write_text(json.dumps({"a.png": ["a car", "a dog"]}))

    def read(kind, path=None, images=tmp_path, captions="captions.json", facts=True,
             dtype="float32", **changes):
        own = tmp_path / "rows.json"
        own.write_text(json.dumps([row | changes]))
        return sources.read_examples(
            make_start(tiny_world, tokenizer, tmp_path, dtype=dtype), kind.Config(facts=facts),
            kind, [path or own], images, captions and tmp_path / captions)[1]

    return read


def test_rows_become_examples_with_their_facts(read_given, tokenizer, tmp_path):
    (pair,), (prompt,) = (read_given(kind, caption_type=6, length_bonus=0.5)
                          for kind in (reward.RewardTraining, ppo.PPO))
    chosen, rejected = pair.responses
    assert tokenizer.decode(chosen.tokens).strip() == "A cat." and chosen.tokens[-1] == EOS
    assert (pair.facts, pair.question, pair.picture) == (["a car", "a dog"], "What is it?", "a.png")
    assert pair.image.shape == (PATCHES, 16) and set(chosen.weight) == {1.0}
    assert pair.image.dtype == torch.float32
    assert read_given(reward.RewardTraining, dtype="bfloat16")[0].image.dtype == torch.bfloat16
    assert (prompt.truth, prompt.length_factor, prompt.responses) == ("no", 0.5, [])
    assert prompt.prompt == data.prompt_tokens(tokenizer, data.prompt_text("What is it?"), PATCHES)
    assert read_given(ppo.PPO, facts=False)[0].facts == ()
    assert prompt.source == tmp_path / "a.png"
    (tmp_path / "both.json").write_text(json.dumps({"a.png": ["a car"], "aok_a.png": ["it barks"]}))
    asked = [{"from": "human", "value": "<image>\nWhat is it? A. a car B. a dog"}]
    for kind, expected in ((1, ["a car"]), (3, ["it barks"]), (7, ["a car"])):  # LLaVA-RLHF's keys
        (example,) = read_given(
            ppo.PPO, captions="both.json", caption_type=kind, conversations=asked)
        assert example.facts == expected
    with pytest.raises(ValueError, match="no captions for image .*aok_a"):
        read_given(ppo.PPO, caption_type=2, conversations=asked)
    (tmp_path / "other.json").write_text(json.dumps({"b.png": ["a car"]}))
    for captions, phrase in (("other.json", r"rows.json row 1: no captions for .*a\.png"),
                             (None, "--facts needs captions")):
        with pytest.raises(ValueError, match=phrase):
            read_given(reward.RewardTraining, captions=captions)


def test_rankings_are_public_rows_and_prefer_the_truth(
        tiny_world, tokenizer, tmp_path, monkeypatch, read_given):
    """The model's answers are given, so that both truth and preference are known."""
    def given(model, tokenizer, settings, images, questions, samples, **_):
        asked.append(len(questions))
        scenes = [world.make_scene(f"rankings 0 {i}", "test") for i in range(len(questions))]
        texts = [world.describe(scene) + tail for scene in scenes
                 for tail in ("", " There is a purple bus.")]
        return [" ", *texts[1:]]  # an empty answer is nothing to compare

    asked = []
    monkeypatch.setattr(feedback, "answers", given)
    path = feedback.rankings(
        tiny_world, tokenizer, pretraining.WORLD_IMAGES, tmp_path, 20, 0, 0.0, "test")
    found = json.loads(path.read_text())
    captions = json.loads((tmp_path / "image_to_caption.json").read_text())
    assert len(found) == 20 and asked == [8 * 20] and found[0]["image"] == "000001.png"
    for row in found:
        assert row["preference"] == 1 and row["hallucination"] and row["image"] in captions
        assert (tmp_path / "images" / row["image"]).exists()
    pairs = read_given(reward.RewardTraining, path, tmp_path / "images", "image_to_caption.json")
    assert len(pairs) == 20 and all(pair.facts for pair in pairs)


def test_world_prompts_know_their_truth(tmp_path, read_given):
    path = feedback.prompts(pretraining.WORLD_IMAGES, tmp_path, 12, 0)
    prompts = read_given(ppo.PPO, path, tmp_path / "images", "image_to_caption.json")
    assert [bool(prompt.truth) for prompt in prompts] == [i % 4 == 3 for i in range(12)]
    oracle = feedback.Oracle(tmp_path)
    find = oracle.false_parts
    seeds = json.loads((tmp_path / "image_to_scene.json").read_text())
    for prompt in prompts:
        scene = world.make_scene(seeds[prompt.picture])
        assert list(prompt.facts) == world.facts(scene)
        if prompt.truth:
            assert find(prompt, f"{prompt.truth}.") == [] != find(prompt, "Maybe.")
            assert oracle.correct(prompt, "Maybe.") is None
        else:
            assert find(prompt, world.describe(scene)) == []
            assert find(prompt, "There is a purple bus.") or scene.find("bus")
            corrected = oracle.correct(prompt, f"{world.describe(scene)} There is a purple bus.")
            assert corrected.startswith(world.describe(scene)) and not find(prompt, corrected)


# ================================================================= whole runs, from files to files


@pytest.fixture(scope="module")
def material(tiny_world, tokenizer, tmp_path_factory):
    """A model's folder, ranked pairs, prompts, captions and images, as a user has them."""
    folder = tmp_path_factory.mktemp("material")
    save_llava(tiny_world, tokenizer, IMAGES, folder / "base")
    (folder / "images").mkdir()
    ranked, captions = [], {}
    for i in range(12):
        scene = world.make_scene(i)
        world.draw(scene, 24).save(folder / "images" / f"{i}.png")
        captions[f"{i}.png"] = world.facts(scene)
        asked = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": "x"}]
        ranked.append({"image": f"{i}.png", "conversations": asked, "preference": 1 + i % 2,
                       "output_1": {"value": "A car."}, "output_2": {"value": "There is a dog."}})
    (folder / "rows.json").write_text(json.dumps(ranked))
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


@pytest.fixture
def run_on(material, tmp_path, run_train):
    """A function that runs an algorithm on the material, with its results in tmp_path / out."""
    def run(algo, out, *more, status=0):
        rollout = ("--samples", 2, "--max_new_tokens", 6, "--steps", 5,
                   *(("--rollout_size", 4) if algo in ("ppo", "grpo") else ()))
        return run_train(
            "--algo", algo, "--model", material / "base", "--data", material / "rows.json",
            "--images", material / "images", "--captions", material / "captions.json", "--facts",
            "--out", tmp_path / out, "--log_every", 1, "--batch_size", 4,
            *(("--steps", 2) if algo == "rm" else rollout), *more, status=status)

    return run


@pytest.mark.parametrize("algo, lora, own", [
    ("ppo", (), ("--target_kl", 1, "--kl_horizon", 10)),
    ("ppo", ("--lora", 2), ("--baseline", "critic")),
    ("grpo", (), ("--loss_mean", "answers", "--no-divide_by_std")),
    ("online_ddpo", (), ("--feedback", "reward_model", "--reference", "last")),
    ("online_ddpo", ("--lora", 2), ("--feedback", "reward_model", "--rounds", 2)),
], ids=["ppo", "ppo-critic-lora", "grpo", "online", "online-lora"])
def test_reinforcement_from_files_to_files(run_on, tmp_path, monkeypatch, algo, lora, own):
    """Also stopped in the middle of a rollout and resumed: the same to the bit."""
    run_on("rm", "rm", *lora)
    results = json.loads((tmp_path / "rm" / "results.json").read_text())
    assert 0 <= results["after"]["metrics"]["agreement"]["value"] <= 1
    more = ("--reward_model", tmp_path / "rm", "--learning_rate", 1e-3, *lora, *own)
    run_on(algo, "whole", *more)
    one_step = loop.Loop.one_step

    def stopped(running):
        running.asked = running.step == 2  # of two steps per rollout: in the middle of the second
        return one_step(running)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "one_step", stopped)
        run_on(algo, "cut", *more, status=130)
    _, saved = load_state(latest_state(tmp_path / "cut"))
    critic = any("critic" in name for name in saved)
    run_on(algo, "cut", *more, "--resume")
    for name in ("model/model.safetensors", "samples.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    whole, cut = (read_log(tmp_path / name) for name in ("whole", "cut"))
    assert [line["step"] for line in cut] == [1, 2, 3, 4, 5]
    assert critic == ("val/clipfrac" in cut[-1]) == ("critic" in own)
    assert {"objective/kl", "objective/scores", "response/length", "response/ended",
            "seconds/optimisation", *({"round/pairs", "rewards/margins"} if algo == "online_ddpo"
            else {"objective/entropy", "policy/approxkl", "policy/clipfrac", "score/rm",
                  "tokens_per_second/rollout", "rollout/logp_mismatch"})} <= cut[-1].keys()
    if algo == "ppo":
        assert {"objective/rlhf_reward", "val/explained_variance"} <= cut[-1].keys()
        coefficients = [[line["objective/kl_coefficient"] for line in log] for log in (whole, cut)]
        assert coefficients[0] == coefficients[1]
        assert len({*coefficients[0]}) == (3 if "--target_kl" in own else 1)  # it adapts


def test_a_reward_model_over_another_base(material, run_on, tmp_path):
    """It has other features, more of them and other tokens than the policy, as 13B beside 7B."""
    path = tmp_path / "tokenizer.model"
    tokenizer_file.train_tokenizer(pretraining.world_texts(20), path, 650)
    own, tower = tokenizer_file.Tokenizer(path), replace(TOWER, image_size=16)
    text = replace(TEXT, vocab_size=own.vocab_size, max_position_embeddings=400)
    other = LLaVA(LLaVAConfig(tower, text, own.image_token, own.pad_token, own.eos_token)).eval()
    init_weights(other, 7)
    save_llava(other, own, replace(IMAGES, size=16), tmp_path / "other")
    (tmp_path / "ask.txt").write_text("USER: Rate it. {factual_prompt} ASSISTANT: It is")
    run_on("rm", "rm", "--model", tmp_path / "other", "--request", tmp_path / "ask.txt",
           "--log_every", 5)  # the first step and the last are always logged
    assert [line["step"] for line in read_log(tmp_path / "rm")] == [1, 2]
    (tmp_path / "long.txt").write_text("Rate it. " * 400 + "{factual_prompt}")
    assert "rows.json row 1: prompt and response have" in run_on(  # before the first step
        "rm", "long", "--request", tmp_path / "long.txt", status=1)
    assert not (tmp_path / "long" / "metrics.jsonl").exists()
    given = ("--reward_model", tmp_path / "rm", "--dtype", "float32")
    assert "a reward model over another base" in run_on(
        "ppo", "ppo", *given, "--length_penalty", 0, "--held_out_reward_model", tmp_path / "rm")
    for line in read_log(tmp_path / "ppo"):
        assert line["score/held_out"] == pytest.approx(line["score/rm"], abs=1e-5)
    judge = scoring.load_judge(tmp_path / "rm", torch.device("cpu"), facts=True)
    assert judge.tokenizer.vocab_size == own.vocab_size
    assert judge.reward_model.request == (tmp_path / "ask.txt").read_text()
    captions = json.loads((material / "captions.json").read_text())
    rows = read_log(tmp_path / "ppo", "samples.jsonl")
    for row in rows[:4]:
        number = int(re.search(r"row (\d+)", row["prompt"])[1]) - 1
        image = open_image("x", material / "images" / f"{number}.png")
        found = judge.rate([row["question"]], judge.features([image]), [[row["answer"]]],
                           [captions[f"{number}.png"]], 1)
        assert row["rm"] == pytest.approx(found.item(), abs=1e-4)
    assert len({row["rm"] for row in rows}) > 1
    for more, phrase in ((("--baseline", "critic"), "use --baseline group"),
                         (("--no-facts",), "trained with facts; add --facts")):
        assert phrase in run_on("ppo", "bad", *given, *more, status=1)


def test_runs_say_what_is_missing(material, run_on, tmp_path):
    run_on("rm", "rm", "--no-facts")
    given = ("--reward_model", tmp_path / "rm")
    for more, phrase in (
        ((), "--algo ppo needs a reward model"),
        (("--reward_model", material), "no reward model ("),
        (given, "trained without facts; leave out --facts"),
        ((*given, "--no-facts", "--lora", 2), "without adapter"),
        ((*given, "--no-facts", "--max_new_tokens", 9999), "use a smaller --max_new_tokens"),
        ((*given, "--no-facts", "--max_new_tokens", 450), "but the reward model's context holds"),
    ):
        assert phrase in run_on("ppo", "ppo", *more, status=1)


# ===================================================================================== evaluation/

rate = lambda hits, of: [(1, np.array(hits, dtype=float), np.array(of, dtype=float))]
world_metrics = lambda records: metrics.with_intervals(builtin.world_terms(records))
only_values = lambda found: {name: metric["value"] for name, metric in found.items()}
MMHAL_ROWS = [
    {"image_id": f"id{i}", "image_src": f"https://example.org/photos/{i}.png", "question": "What?",
     "image_content": ["dog", "tree"], "gt_answer": "Truth", "model_answer": "A {strange} one"}
    for i in range(7)]
read_lines = lambda path: [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_lines(path, *rows):
    """Write JSON, a line per row; one row that is a list makes a JSON array."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(map(json.dumps, rows)) + "\n")


def test_metrics_intervals():
    measures = {"rate": rate([1, 0, 2], [2, 2, 4]), "undefined": rate([0, 0, 0], [0, 0, 0])}
    measures["difference"] = measures["rate"] + [(-1, np.array([1.0, 1, 0]), np.ones(3))]
    found = only_values(metrics.with_intervals(measures))  # 3 / 8 is no mean of 0.5, 0 and 0.5
    assert found == pytest.approx({"rate": 3 / 8, "difference": 3 / 8 - 2 / 3})
    with pytest.raises(ValueError, match="no answers"):
        metrics.with_intervals({"rate": rate([], [])})
    single = {"rate": rate(np.repeat(np.arange(50) % 2, 8), np.ones(400))}
    narrow, again, other = (metrics.with_intervals(single, seed)["rate"] for seed in (3, 3, 4))
    half = 1.96 * (0.5 * 0.5 / 400) ** 0.5  # normal approximation
    assert list(narrow.values()) == pytest.approx([0.5, 0.5 - half, 0.5 + half], abs=0.2 * half)
    assert narrow == again != other
    wide = metrics.with_intervals(metrics.grouped(single, np.repeat(np.arange(50), 8)))["rate"]
    assert 2.3 < (wide["high"] - wide["low"]) / (2 * half) < 3.4  # the root of 8 items per group
    in_order = metrics.grouped({"r": rate([1, 2, 4], [1, 1, 1])}, ["b", "a", "b"])["r"][0]
    assert [each.tolist() for each in in_order[1:]] == [[5, 2], [2, 1]]
    rng = np.random.default_rng(0)
    hard = (rng.random(300) < 0.5).astype(float)
    better = hard * (rng.random(300) < 0.9)  # mends a tenth of the failures, breaks nothing
    before, after = ({"rate": rate(hits, np.ones(300)) * 3} for hits in (hard, better))
    assert metrics.paired(before, before)["rate"] == {"value": 0, "low": 0, "high": 0}
    found, alone = metrics.paired(before, after)["rate"], metrics.with_intervals(after)["rate"]
    assert found["value"] == pytest.approx(3 * (better - hard).mean()) and found["high"] < 0
    assert found["high"] - found["low"] < 0.5 * (alone["high"] - alone["low"])  # it is paired


def test_metrics_table_is_readable():
    metric = lambda value: {"value": value, "low": value / 2, "high": 2 * value}
    before = {"chair_i": metric(0.2), "length": metric(40), "mmhal/score": metric(3),
              "mmhal/kind/other": metric(1), "hallucination/number": metric(0)}
    after = before | {"chair_i": metric(0.05), "length": metric(30)}
    assert evaluation.table(before, after).splitlines() == [
        "%                     before  95 % interval  after  95 % interval  change  relative",
        "chair_i                 20.0   [10.0, 40.0]    5.0    [2.5, 10.0]   -15.0     -75 %",
        "length (words)          40.0   [20.0, 80.0]   30.0   [15.0, 60.0]   -10.0     -25 %",
        "mmhal/score (of 6)      3.00   [1.50, 6.00]   3.00   [1.50, 6.00]   +0.00      +0 %",
        "hallucination/number     0.0     [0.0, 0.0]    0.0     [0.0, 0.0]    +0.0"]
    undefined = {"one": {}, "two": {"f1": metric(0.5)}}  # for the first model
    assert evaluation.comparison(undefined, {"two": {}}).split()[-2:] == ["f1", "50.0"]


def test_pope_by_hand():
    no = ["No", "no", "No.", "There is no dog.", "There is not a dog here", ",No,", "No, it is."]
    yes = ["Yes", "yes, there is a dog.", "", ".No", "Yes. No, wait.",  # the first sentence counts
           "NO", "Nope", "Not at all", "I cannot see it", "no\nYes"]  # No, not, no between spaces
    assert [benchmarks.pope_answer(text) for text in no + yes] == ["no"] * 7 + ["yes"] * 10
    texts = ["Yes", "Yes, two.", "No", "There is no cat.", "Yes", "No", "no", "Sure"]
    # true positives 2, false negatives 2, false positives 2 (Yes, Sure), true negatives 2
    assert only_values(evaluation.pope(texts, ["yes"] * 4 + ["no"] * 4)) == pytest.approx(
        {"accuracy": 4 / 8, "precision": 2 / 4, "recall": 2 / 4, "f1": 0.5, "yes_ratio": 4 / 8})
    assert "precision" not in evaluation.pope(["No"], ["yes"])  # 0 / 0
    for labels, message in ((["maybe"] * 2, "labels are"), (["no"], "2 answers, 1 labels")):
        with pytest.raises(ValueError, match=message):
            evaluation.pope(["No", "Yes"], labels)


CHAIR_TEXT = """Two [dogs=dog] and a [puppy=dog]. A [man=person] eats a [hot dog]. [Hot dogs=hot
    dog] and [hotdogs=hot dog] on a [table=dining table]. A [teddy bear] on the [bed]. A [bear
    cub=bear]. The sign bears the name of the town. [People=person] wait at the bus stop for two
    [buses=bus]. A [passenger train=train] on the train tracks. A couple of [birds=bird]. A flock of
    [geese=bird]. A [baby elephant=elephant] with an [adult elephant=elephant]. The [baby=person]
    and a [cat]. Two [glasses of wine=wine glass]. She wears glasses. [Knives=knife]. An [orange] on
    a plate. [Oranges=orange] and one [apple]. An orange [cat] wears an orange [tie]. The [bus] is
    orange. He drinks orange juice. An [orange] and a [banana]. An orange and white [cat]. A
    man-made lake with a dog-friendly path. The category of [cars=car]: an [SUV=car] and a
    [taxi=car]. A bike rack without [bikes=bicycle]. The [catcher's mitt=baseball glove] catches the
    [ball=sports ball]. A [TV=tv] on a TV stand, a [remote control=remote] in a remote village. A
    [potted plant], many plants, and a flower bed. A\n[hot\n dog=hot dog]. [SHEEP=sheep] and
    [Cattle=cow]. A [slice of pizza=pizza] and a pizza box. There is no [dog] here. A lamp"""


def test_chair_by_hand():
    for sentence in CHAIR_TEXT.split(". "):  # [phrase=kind], or [kind]
        marks = re.findall(r"\[(.*?)\]", sentence, re.S)
        kinds = [" ".join(mark.rpartition("=")[2].split()) for mark in marks]
        text = re.sub(r"\[(.*?)(=.*?)?\]", r"\1", sentence, flags=re.S)
        assert coco.mentions(text) == kinds, text
    for kind in coco.WORDS:
        sentence = f"Here is {'an' if kind[0] in 'aeiou' else 'a'} {kind}."
        assert coco.mentions(sentence) == coco.mentions(coco.plural(kind) + " everywhere") == [kind]
    named = [word for others in coco.WORDS.values() for word in others]
    assert len(named) == len(set(named)) and not set(named) & set(coco.WORDS)
    texts = ["A dog and a cat on a bed.", "A dog, a dog and a horse.", "A quiet day.", "A cat."]
    there = [{"dog", "bed"}, {"dog"}, {"car"}, {"cat", "couch"}]
    # mentions 3 + 3 + 0 + 1, false: cat, horse; found 2 + 1 + 0 + 1 of 2 + 1 + 1 + 2
    found = evaluation.chair(texts, there)
    assert only_values(found) == pytest.approx(
        {"chair_s": 2 / 4, "response": 2 / 3, "chair_i": 2 / 7, "coverage": 4 / 6})
    grouped = evaluation.chair(texts, there, ["one", "one", "two", "two"])
    assert only_values(grouped) == only_values(found) and grouped != found and len(coco.WORDS) == 80


def test_chair_reads_instances_captions_and_plain_files(tmp_path):
    keys = {391895: "391895", "val2014/000000391895.jpg": "391895", "i_12.png": "i_12.png",
            "COCO_val2014_000000391895.jpg": "391895", "a/b.jpg": "b.jpg", "000": "0"}
    assert {image: coco.image_key(image) for image in keys} == keys
    images = [{"id": 7, "file_name": "COCO_val_07.jpg"}, {"id": 8, "file_name": "8.jpg"}]
    boxes = {"categories": [{"id": 18, "name": "dog"}, {"id": 88, "name": "bear"}],
             "annotations": [{"image_id": 7, "category_id": kind} for kind in (18, 88)]}
    texts = {"annotations": [{"image_id": 7, "caption": "A puppy on a sofa"}]}
    for name, content in (("boxes", boxes), ("captions", texts)):
        write_lines(tmp_path / name, {"images": images, **content})
    write_lines(tmp_path / "plain", {"a.jpg": ["wooden chair", "lamp", "person"]})
    truth, names, _ = coco.read_objects(tmp_path.iterdir())
    assert truth == {"7": {"dog", "bear", "couch"}, "8": set(), "a.jpg": {"chair", "person"}}
    assert names == {"7": "COCO_val_07.jpg", "8": "8.jpg", "a.jpg": "a.jpg"}
    images[0]["id"], images[1]["id"] = 8, 7  # numbers that are not those of the file names
    write_lines(tmp_path / "boxes", {"images": images, **boxes})
    truth, _, ids = coco.read_objects([tmp_path / "boxes"])
    assert truth == {"7": set(), "8": {"dog", "bear"}} and ids == {"8": "7", "7": "8"}
    for content, phrase in (
            ({"a.jpg": "dog"}, "neither COCO annotations"),
            ({"annotations": [{"image_id": 7}]}, "neither COCO annotations"),
            ({"a/1.png": ["cat"], "b/1.png": ["dog"]}, "images 'a/1.png' and 'b/1.png' cannot")):
        write_lines(tmp_path / "wrong", content)
        with pytest.raises(DataError, match=f"wrong: {phrase}"):
            coco.read_objects([tmp_path / "wrong"])
    files = [tmp_path / "bare.json", tmp_path / "a.json", tmp_path / "b.json"]
    for path, image in zip(files, ("1.png", "a/1.png", "b/1.png")):
        write_lines(path, {image: ["cat"]})
    assert coco.read_objects(files[:2])[1] == {"1": "a/1.png"}  # may be the same image
    for given in (files, [files[1], files[0], files[2]]):
        with pytest.raises(DataError, match="'a/1.png' and 'b/1.png' cannot be told apart"):
            coco.read_objects(given)
    for one, two in (("val2014/COCO_val2014_000000000042.jpg", "val2017/000000000042.jpg"),
                     ("/data/val/a.jpg", "val/a.jpg")):
        write_lines(files[0], {one: ["cat"]}), write_lines(files[1], {two: ["dog"]})
        assert list(coco.read_objects(files[:2])[0].values()) == [{"cat", "dog"}]


def test_mmhal_by_hand(tmp_path):
    rules = {"Rating: 6": 6, "It is fine.\nrating: 0": 0, "RATING: 4, since ...": 4, "": None,
             "Rating: 3. I repeat: rating: 3": 3, "Rating: 3 or rating: 4": None, "A 5 of 6": None,
             "Rating:5": None, "rating: 9": None, "Rating: 35": 3}  # as the public script reads it
    assert {reply: benchmarks.rating(reply) for reply in rules} == rules
    replies = [f"Rating: {n}" for n in (6, 5, 4, 3, 2, 1, 0, 6)] + ["no rating", "rating: 2"]
    by_kind = zip(benchmarks.MMHAL_KINDS, (3, 3.5, 4, 3, 2, 1, 0, 6))
    assert only_values(evaluation.mmhal(replies)) == pytest.approx(
        {"score": 29 / 10, "hallucination": 5 / 10} | {f"score/{k}": value for k, value in by_kind})
    assert evaluation.mmhal(replies, seed=1)["score"] != evaluation.mmhal(replies)["score"]
    path, chat = tmp_path / "rows.jsonl", {"choices": [{"message": {"content": "b"}}]}
    for rows in ([{"id": 1, "reply": "b"}, {"id": 0, "reply": "a"}], ["a", chat], [["a", "b"]]):
        write_lines(path, *rows)
        assert benchmarks.read_replies(path, 3) == ["a", "b", ""]
    prompt = judge.read_judge_prompt("short").fill(MMHAL_ROWS[0])
    assert all(part in prompt for part in ("dog, tree", "What?", "Truth", "A {strange} one"))


# ------------------------------------------------------------------------------ the built-in world

def scored_records(drawn, describe, answer=lambda name, item: item["truth"]):
    """Records of scenes, with descriptions and answers by two functions."""
    records = builtin.questionnaire(drawn)
    for scene, record in zip(drawn, records):
        record["answer"] = describe(scene)
        for name, item in record["asked"].items():
            item["answer"] = answer(name, item)
        builtin.score_record(scene, record)
    return records


def test_builtin_questionnaire_asks_what_it_says():
    drawn = [world.make_scene(i, "test") for i in range(60)]
    records = builtin.questionnaire(drawn)
    assert records == builtin.questionnaire(drawn) != builtin.questionnaire(drawn, seed=1)
    counts = {k: sum(k in r["truth"] for r in records) for k in world.KINDS}
    popular = set(sorted(counts, key=counts.get)[-8:])  # 6, and ties
    for scene, record in zip(drawn, records):
        asked, truth = list(record["asked"].values())[:4], set(record["truth"])
        kinds = [world.mentions(item["question"].replace("?", ".").replace("Is there", "A "))[0]
                 for item in asked]
        assert [item["truth"] == "No." for item in asked] == [False, True, True, True]
        assert kinds[0] in truth and kinds[1] not in truth and kinds[2] in popular - truth
        assert kinds[3] in set(world.SCENES[scene.type]) - truth
        assert record["question"] in world.DESCRIBE_PROMPTS_EVAL


def test_builtin_perfect_answers_measure_perfectly():
    drawn = [world.make_scene(i, "test") for i in range(40)]
    found = only_values(world_metrics(scored_records(drawn, world.describe)))
    perfect = {  # value and number of the measures
        "hallucination/.*|chair_i|over_generalisation|mmhal/hallucination": (0, 9),
        "question/.*|.*/accuracy|.*/f1|coverage": (1, 13), ".*/yes_ratio": (0.5, 3),
        "mmhal/(score|kind/.*)": (6, 9)}
    for pattern, (value, count) in perfect.items():
        names = [name for name in found if re.fullmatch(pattern, name)]
        assert [found.pop(name) for name in names] == [value] * count
    assert list(found) == ["length"] and 20 < found["length"] < 60


def test_builtin_by_hand():
    kitchen = Scene(0, "kitchen", (Thing("cup", "red", 2, 0), Thing("pot", "blue", 1, 4)))
    beach = Scene(1, "beach", (Thing("boat", "blue", 1, 2), Thing("ball", "purple", 3, 6)))
    texts = {kitchen: "This is a kitchen. There are three red cups at the top left. "
                      "There is a blue apple on the right.",  # false: a number, an object
             beach: "This is a beach. There is a red boat at the top right. "
                    "There are three purple balls at the top left."}  # an attribute, a position
    records = [scored_records([scene], texts.get)[0] for scene in texts]
    found = only_values(world_metrics(records))
    kinds = ("any", "object", "attribute", "position", "number", "other")
    assert [found[f"hallucination/{kind}"] for kind in kinds] == [1, 0.5, 0.5, 0.5, 0.5, 0]
    assert [found[n] for n in ("chair_i", "coverage", "length")] == [1 / 4, 3 / 4, (21 + 22) / 2]
    assert found["mmhal/kind/holistic"] == (1 + 2) / 2  # one of two objects: 1; both: 2
    wrong = {"pope/present": "No.", "pope/random": "Yes, on the left.", "pope/adversarial": "Yes.",
             "question/colour": "Hm.", "question/number": "Three."}
    answer = lambda name, item: wrong.get(name, item["truth"])
    record, = scored_records([kitchen], world.describe, answer)
    assert {name for name, item in record["asked"].items() if not item["right"]} == set(wrong)
    found = only_values(world_metrics([record]))
    three = lambda measure: [found[f"pope/{n}/{measure}"] for n in builtin.NEGATIVES]
    assert three("accuracy") == [0, 0.5, 0] and three("yes_ratio") == [0.5, 0, 0.5]
    # beside the point: 3; wrong: 0 for counting and for the adversarial object; else 6
    assert builtin.world_ratings(record) == [3, 0, 6, 0, 6, 6, 6, 6]
    wrong["question/number"] = "At the top left."  # names no number
    record, = scored_records([kitchen], world.describe, answer)
    assert builtin.world_ratings(record) == [3, 0, 6, 3, 6, 6, 6, 6]
    rows = ["farm,duck,duck cow", "farm,cow,cow duck duck", "park,kite,kite duck", "park,ball,kite"]
    records = [{"type": setting, "truth": [truth], "mentions": mentions.split()}
               for setting, truth, mentions in (row.split(",") for row in rows)]
    # farm, {duck, cow}: made up on 2 of 2 occasions there, 3 of 6 everywhere; park: 1 of 2, 1 of 6
    value = metrics.values(builtin.delta_terms(records), np.ones((1, 4)))[0]
    assert value == pytest.approx(((2 / 2 - 3 / 6) + (1 / 2 - 1 / 6)) / 2)


# ----------------------------------------------------------------------------- answers, evaluate.py

@pytest.fixture(scope="module")
def evaluated_runs(tiny_world, tokenizer, tmp_path_factory):
    """A folder with questions, answers, images, a suite, and runs with models or results."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed, dtype in (("one", 0, None), ("two", 1, None), ("half", 1, torch.float16)):
        model = copy.deepcopy(tiny_world)
        init_weights(model, seed)
        save_llava(model, tokenizer, IMAGES, folder / name / "model", dtype=dtype)
    for name, records in (("strange", [3]), ("measured", [{"scene": 0}, {"scene": 1}])):
        write_lines(folder / name / "model/config.json", {})
        evaluation.write_results(folder / name / "results.json", {"before": ({}, records)})
    annotate = lambda scene: world.annotate(scene, random.Random(scene.seed))
    for name, n, say in (("bad", 9, annotate), ("good", 9, world.describe), ("few", 5, annotate)):
        records = scored_records([world.make_scene(i, "test") for i in range(n)], say)
        (folder / name).mkdir()
        evaluation.write_results(
            folder / name / "results.json", {"after": (world_metrics(records), records)})
    for path in folder.iterdir():
        write_lines(path / "config.json", {"settings": {"algo": "old<i>"}, "versions": {}})
    (folder / "images").mkdir()
    for i in range(7):
        Image.new("RGB", (8, 8), (30 * i, 0, 0)).save(folder / f"images/{i}.png")
    (folder / "images/bad.png").write_bytes(b"no picture")
    for name, rows in {
        "rows.jsonl": [{"image": f"{i}.png", "question": f"<image>\nQuestion {i}?", "answer": "-",
                        "question_id": i, "label": ("no", "yes")[i % 2]} for i in range(7)],
        "template.json": MMHAL_ROWS, "images/results.json": [{"loss": 3}],
        "replies.jsonl": [{"id": i, "reply": f"Rating: {i}"} for i in range(6)],
        "wrong.jsonl": [{"text": ("Yes", "No")[i % 2]} for i in range(7)],
        "truth.json": [{"0.png": ["dog"], "1.png": ["cat", "sofa"]}],
        "captions.jsonl": [{"image": "0.png", "caption": "Two dogs"},
                           {"image_id": "1.png", "answer": "A cat and a dog"}],
        "others.jsonl": [{"id": 9, "image": "9.png", "reply": "", "text": "Dogs"}],
        "unlabelled.jsonl": [{"image": "0.png", "question": "Is it?"}],
        "shuffled.jsonl": [{"question_id": 6 - i, "text": "No"} for i in range(7)],
        "unread.jsonl": [{"image": "0.png", "text": "No dog."},
                         {"image": "1.png", "error": "cannot be read", "caption": "a dog"}],
        "some.jsonl": [{"image": "0.png", "label": "maybe", "text": "No dog."},
                       {"image": "9.png", "label": "no", "text": "No"},
                       {"image": "1.png", "label": "no", "error": "cannot be read"}],
        "two.jsonl": [{"image": f"{i}.png", "text": "?", "label": "no"} for i in range(2)],
        "gone.json": [{"0.png": ["dog"], "gone.png": ["cat"]}],
        "few/metrics.jsonl": [{"step": 1}],
        "given.jsonl": [{"image": "0.png", "answer": "b"},
                        {"image": "1.png", "answer": "2 dogs, a man"}],
        "far.json": [{"id": 99, "response": "No"}],
        "twice.json": [{"id": 1, "response": "No"}] * 2,
        "all.json": [{"id": i, "response": text} for i, text in enumerate(AMBER_TEXTS, 1)],
        "odd.json": [row | {"judge_prompt": []} for row in MMHAL_ROWS]}.items():
        write_lines(folder / name, *rows)
    (folder / "broken").write_text("words (")
    (folder / "odd.py").write_text("template = '{} {} {} {} {name}'")
    write_suite(folder / "set", folder / "images")
    return folder


@pytest.fixture
def run_evaluate(evaluated_runs, tmp_path, monkeypatch, capsys):
    """Runs evaluate.py in a copy of that folder; returns all that it prints."""
    monkeypatch.chdir(shutil.copytree(evaluated_runs, tmp_path / "copy"))

    def run(command, status=0):
        try:
            assert evaluate.main(command.split()) == status
        except SystemExit as stopped:
            assert stopped.code == status
        return "".join(capsys.readouterr())

    return run


BENCH_COMMANDS = {"AMBER": "--amber set/amber --answers",
                  "VQA": "--vqa set/vqa/val.jsonl --answers",
                  "CHAIR": "--chair set/chair/truth.json --answers given.jsonl",
                  "MMHAL": "--mmhal set/mmhal/response_template.json --model two"}


@pytest.mark.parametrize("command, status, pattern", [
    ("--pope rows.jsonl --answers wrong.jsonl", 0, r"accuracy +0\.0"),
    ("--chair truth.json --answers captions.jsonl", 0,
     r"chair_s +50\.0.*\nresponse +50\.0.*\nchair_i +33\.3.*\ncoverage +66\.7"),
    ("--mmhal template.json --replies replies.jsonl", 0,
     r"score \(of 6\) +2\.14(.|\n)*prompt 6: not one rating, counts as 0: ''"),  # 15 / 7
    ("--compare bad good", 0,
     r"%  +bad +95 % interval +good +- bad, 95 % interval\n"
     r"hallucination/any +([5-9]\d\.\d|100\.0) .*\] +0\.0 +-\1 "),
    ("--compare bad few", 1, "few and bad were measured on different scenes"),
    ("--compare bad none", 1, "first run: python evaluate.py none"),
    ("--compare bad images", 1, "measure again"),
    ("--chair truth.json --answers others.jsonl", 1, "nothing is known about image '9'"),
    ("--chair truth.json --answers unread.jsonl", 0, r"chair_s +0\.0(.|\n)*coverage +100\.0"),
    ("--pope two.jsonl --answers unread.jsonl", 0, r"accuracy +100\.0"),
    ("--pope rows.jsonl --answers shuffled.jsonl", 1, "row 1: answers question_id 6, where rows"),
    ("--pope rows.jsonl two.jsonl --answers unread.jsonl", 1, "goes with one file of questions"),
    ("--model one --chair gone.json --images images", 1, "row|gone.json: no image 'gone.png'"),
    ("--mmhal template.json --replies others.jsonl", 1, "prompt 9, but there are only 7"),
    ("--mmhal template.json --replies wrong.jsonl", 1, "row 1: expected"),
    ("--mmhal truth.json --replies replies.jsonl", 1, "row 1: no image_id"),
    ("--model one --pope unlabelled.jsonl --images images", 1, "row 1: label is None, not"),
    ("--chair truth.json --answers some.jsonl --skip_bad_rows", 0,
     r"chair: .* 1 of 3 rows\n(.|\n)*1 rows left out:\n  some.jsonl row 2: nothing is known"),
    ("--pope some.jsonl --answers some.jsonl --skip_bad_rows", 0,
     r"some: .* 1 of 3 rows\n(.|\n)*1 rows left out:\n  some.jsonl row 1: label is 'maybe', not"),
    ("--model one --data rows.jsonl images/../rows.jsonl", 1, "2 files of questions are"),
    ("one --temperature 0.5", 1, "measured greedily"),
    ("few", 1, "few: an unfinished run"), ("no/run", 1, "no/run: no such folder"),
    ("--model one --image none.png --prompt ?", 1, "cannot read image none.png .* No such file"),
    ("--pope none.jsonl --answers a.jsonl", 1, "none.jsonl: no such file"),
    ("--mmhal none.json --replies r.jsonl", 1, "none.json: no such file"),
    ("--chair none.json --answers a.jsonl", 1, "none.json: no such file"),
    ("", 2, "give one of"), ("run --pope p.jsonl", 2, "give one of"),
    ("--image a.png --model m", 2, "--image needs --prompt"), ("--poep p.jsonl", 2, "unrecognized"),
    ("--data a.jsonl --answers b.jsonl", 2, "--data needs --model"),
    ("--pope rows.jsonl --answers wrong.jsonl --model one", 2, "scored without --model"),
    ("one --best_of 4", 2, "--best_of N and --reward_model DIR belong together"),
    ("one --best_of 1 --reward_model rm", 2, "at least 2 samples"),
    ("one --best_of 2 --reward_model rm --temperature 0", 2, "a --temperature above 0"),
    ("--compare bad good --best_of 2 --reward_model rm", 2, "that are sampled here"),
    ("one --best_of 2 --reward_model two", 1, "two: no reward model"),
    ("AMBER all.json", 0, r"answers from a file; lexical mode(.|\n)*lexical/chair +37\.5 .*\n"
     r"lexical/cover +75\.0(.|\n)*discriminative/accuracy +50\.0 .* 66\.7\n"),
    ("VQA given.jsonl", 0, r"accuracy +8\.3 "),  # one in six, and none
    ("CHAIR --synonyms set/chair/synonyms.txt", 0, r"official syn(.|\n)*objhal/mention +50\.0"),
    ("CHAIR", 0, "words of this project"), ("CHAIR --synonyms broken", 1, "words separated by"),
    ("--mmhal odd.json --replies far.json", 1, "row 1: judge_prompt should be"),
    ("MMHAL", 2, "needs --judge_prompt"), ("MMHAL --judge_prompt none.py", 1, "no such file"),
    ("MMHAL --judge_prompt given.jsonl", 1, "has no template with 4 places"),
    ("MMHAL --judge_prompt odd.py", 1, "has no template with 4 places"),
    ("MMHAL --judge_prompt broken", 1, "not a Python"), ("AMBER given.jsonl", 1, "row 1: expected"),
    ("AMBER twice.json", 1, "row 2: id 1 comes twice"), ("AMBER far.json", 1, "id 99 is no"),
    ("--amber set --answers far.json", 1, "set/relation.json: no such file"),
    ("--suite set", 2, "--suite needs --model"), ("--suite one --models two", 1, "no benchmark"),
    ("--suite set --models one --synonyms broken", 1, "words separated by"),
    ("--suite set --models one one", 1, "every model once: one, one"),
    ("measured --scenes 3", 1, "measures of 2 scenes, which do not compare with --scenes 3"),
    ("measured", 1, "the measures to compare with have another --seed"),
    ("strange", 1, "strange/results.json: a field has an invalid value"),
])
def test_evaluate_scores_answers_or_says_what_is_wrong(run_evaluate, command, status, pattern):
    shown = run_evaluate(re.sub("[A-Z]{3,}", lambda m: BENCH_COMMANDS[m[0]], command), status)
    assert re.search(pattern, shown) and (status != 1 or re.fullmatch("error: .*\n", shown))


def test_evaluate_asks_a_model(run_evaluate):
    asked = "--images images --output out --max_new_tokens 4"
    assert "yes_ratio" in run_evaluate(f"--model one --pope rows.jsonl {asked}")
    columns = zip(*((r["answer"], r["label"], r["image"]) for r in read_lines("out/rows.jsonl")))
    assert json.loads(Path("out/rows.scores.json").read_text()) == evaluation.pope(*columns)
    write_lines("one.jsonl", {"image": "3.png"})
    run_evaluate(f"--model one --data one.jsonl --prompt Why? {asked}")
    write_lines("chair.jsonl", {"image": "0.png", "question": "?"})
    for command in ("--data one.jsonl --prompt ?", "--chair truth.json --data chair.jsonl"):
        shown = run_evaluate(f"--model one {command} {asked} --output .", 1)
        assert re.search("(one|chair).jsonl: the results would replace it", shown)
    person = run_evaluate("--model one --image images/3.png --prompt Why? --max_new_tokens 4")
    assert person.strip() == read_lines("out/one.jsonl")[0]["answer"]
    run_evaluate(f"--model one --chair truth.json {asked}")
    assert [row["image"] for row in read_lines("out/chair.jsonl")] == ["0.png", "1.png"]
    shown = run_evaluate(f"--model one --chair gone.json {asked} --output out2 --skip_bad_rows")
    assert "1 rows left out" in shown and len(read_lines("out2/chair.jsonl")) == 1
    run_evaluate(f"--model one --pope two.jsonl unlabelled.jsonl {asked} --output out3", 1)
    assert not Path("out3").exists()  # bad rows fail before any question is answered
    for other in ("two", "one --seed 1"):
        assert "another model" in run_evaluate(f"--model {other} --chair truth.json {asked}", 1)
    run_evaluate(f"--model one --mmhal template.json --judge_prompt short {asked}")
    filled = json.loads(Path("out/mmhal_short_filled.json").read_text())
    prompts = read_lines("out/mmhal_short_prompts.jsonl")
    assert [prompt["id"] for prompt in prompts] == list(range(7)) and "strange" not in str(filled)
    assert all(row["model_answer"] in each["prompt"] for row, each in zip(filled, prompts))


def test_answers_to_a_parquet_file_resume_and_are_scored(run_evaluate):
    cell = {"bytes": Path("images/3.png").read_bytes(), "path": "3.png"}
    row = {"image": cell, "question": "?", "label": "no", "answers": ["a"], "score": math.nan}
    write_parquet("some.parquet", row, row)
    for kind in ("pope", "vqa"):
        asked = f"--model one --{kind} some.parquet --output {kind} --max_new_tokens 2"
        first, again = run_evaluate(asked), run_evaluate(asked)
        scored = run_evaluate(f"--{kind} some.parquet --answers {kind}/some.jsonl")
        table = first.partition("accuracy")[2].partition("answers:")[0]
        assert table and table in again and scored.endswith(table)


def test_best_of_n_is_what_the_reward_model_prefers(
        run_evaluate, tiny_world, tokenizer, monkeypatch):
    """The reward model has another base and its own tower; its captions come from a file."""
    judge = make_reward_model(load_llava("two/model")[0], tokenizer)
    save_llava(judge.model, tokenizer, IMAGES, "rm/model")
    start = SimpleNamespace(tokenizer=tokenizer, base="x", images=IMAGES)
    reward.save_head(judge, Path("rm"), reward.provenance(start, facts=True))
    Path("captions.json").write_text(json.dumps({f"{i}.png": ["a car", "a dog"] for i in range(7)}))
    choose = "--best_of 3 --reward_model rm"
    how = f"--images images --max_new_tokens 5 {choose}"
    asked = f"--data rows.jsonl {how}"
    assert "--captions image_to_caption.json" in run_evaluate(f"--model one {asked}", 1)
    shown = run_evaluate(f"--model one --pope two.jsonl {how} --captions captions.json")
    assert "at most 5 new tokens, temperature 1, the best of 3 by rm; POPE" in shown
    seen, pick = [], evaluation.best_of.BestOf.choose

    def watched(self, questions, images, texts, facts):
        chosen = pick(self, questions, images, texts, facts)
        seen.append((self, questions, images, texts, facts, chosen))
        return chosen

    monkeypatch.setattr(evaluation.best_of.BestOf, "choose", watched)
    run_evaluate(f"--model one {asked} --captions captions.json")
    best, questions, images, texts, facts, chosen = seen[0]
    assert len(texts) == 3 * len(questions) == 21 and len(set(texts)) > 7 and best.judge.facts
    assert [row["answer"] for row in read_lines("one/best_of_3/rows.jsonl")] == chosen
    for i, question in enumerate(questions):  # the reward of each alone
        image = generation.image_features(judge.model, IMAGES, [images[i]])[0]
        prompt = data.trunk_tokens(tokenizer, (), question, PATCHES)
        example = Example("x", image, prompt, facts=facts[i])
        rewards = [reward.rate(judge, tokenizer, [(example, [tokenizer.encode(text)])], 1).item()
                   for text in texts[3 * i : 3 * i + 3]]
        assert chosen[i] == texts[3 * i + rewards.index(max(rewards))]
    label = best.label
    best.judge.reward_model.bias.data += 1  # another head over the same body
    assert best.label != label
    best.judge.reward_model.bias.data[()] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity for 21 of 21 answers"):
        pick(best, questions, images, texts, facts)
    Path("some.json").write_text(json.dumps({"0.png": ["a car"]}))
    some = f"--model one {asked} --captions some.json --output some"
    assert "row 2: no captions for image" in run_evaluate(some, 1)
    run_evaluate(f"{some} --skip_bad_rows")
    assert len(read_lines("some/rows.jsonl")) == 1
    shown = run_evaluate(f"one --scenes 3 {choose}")  # the world knows its own captions
    assert "hallucination/any" in shown and not Path("one/results.json").exists()
    assert len(evaluation.read_results("one/best_of_3/results.json")["after"][1]) == 3
    assert seen[-1][4][0] and len(seen[-1][5]) == len(seen[-1][1])
    shutil.copytree("one/best_of_3", "again")
    write_lines("again/model/config.json", {})
    assert "hallucination/any" in run_evaluate("--compare one/best_of_3 again/model")


def test_evaluate_measures_a_run_again(run_evaluate):
    assert all("hallucination/any" in run_evaluate(f"{run} --scenes 2") for run in ("one", "two"))
    results = evaluation.read_results("two/results.json")
    assert list(results) == ["after"] and len(results["after"][1]) == 2
    before = evaluation.read_results("one/results.json")["after"]
    evaluation.write_results("two/results.json", {"before": before, "after": before})
    shown = run_evaluate("two")  # as many scenes as before; "before" stays
    assert shown.split()[:6] == "% before 95 % interval after".split()
    assert evaluation.read_results("two/results.json") == {"before": before, **results}
    page = Path("two/report.html").read_text()
    assert "A run of old&lt;i&gt;. A hallu" in page  # config.json has no "about" and "reads"
    assert "all settings" in page and "Learning curves" not in page
    with pytest.raises(FileNotFoundError, match="images/config.json"):
        evaluation.write_report("images")


def test_answer_file_resumes_where_it_was_stopped(run_evaluate):
    questions = answers.read_questions(Path("rows.jsonl"), "images")
    seeds, part, path = [], Path("part.jsonl"), Path("whole.jsonl")

    def respond(images, asked, seed):
        seeds.append(seed)
        return [f"{each.question} {image.getpixel((0, 0))[0]} {seed}"
                for image, each in zip(images, asked)]

    whole = answers.answer_file(respond, "m", questions, path, 2)
    assert [row["question_id"] for row in whole] == list(range(7)) and whole[3]["image"] == "3.png"
    assert whole[3]["answer"] == "Question 3? 90 2"
    part.write_text("".join(path.read_text().splitlines(True)[:5]) + '{"half')  # it was killed
    assert answers.answer_file(respond, "m", questions, part, 2) == whole
    assert part.read_text() == path.read_text() and seeds == [0, 2, 4, 6] + [4, 6]
    assert answers.answer_file(respond, "m", questions, part, 2) == whole and len(seeds) == 6
    part.write_text("".join(path.read_text().splitlines(True)[:6])[:-1])  # all but the line's end
    assert answers.answer_file(respond, "m", questions, part, 2) == whole and seeds[6:] == [6]
    assert part.read_text() == path.read_text()
    for rows in ([{"image": "0.png"}], {"image": "0.png"}):  # without a line's end, but not ours
        (foreign := Path("foreign.jsonl")).write_text(json.dumps(rows))
        with pytest.raises(ValueError, match="foreign.jsonl.* move it away"):
            answers.answer_file(respond, "m", questions, foreign, 2)
        assert json.loads(foreign.read_text()) == rows
    other, out = Path("images/3.png").read_bytes(), Path("broken.jsonl")
    Path("images/3.png").write_bytes(b"")
    for _ in "ab":  # what cannot be read is said each time, and asked when it can be read
        rows = answers.answer_file(respond, "m", questions, out, 2, skip=(skipped := []))
        assert "error" in rows[3] and len(skipped) == 1 and "3.png" in skipped[0]
    with pytest.raises(DataError, match="3.png"):
        answers.answer_file(respond, "m", questions, out, 2)
    Path("images/3.png").write_bytes(other)
    seeds.clear()
    assert answers.answer_file(respond, "m", questions, out, 2) == whole and seeds == [2]
    assert out.read_bytes() == path.read_bytes()
    for by, asked in (("other", questions), ("m", questions[1:])):
        with pytest.raises(ValueError, match="other questions, or of another model or settings"):
            answers.answer_file(respond, by, asked, part, 2)

    def while_busy(images, asked, seed):
        with pytest.raises(ValueError, match="a.jsonl: another command is writing it"):
            answers.answer_file(respond, "m", questions, Path("a.jsonl"), 2)
        return ["-"] * len(asked)

    assert len(answers.answer_file(while_busy, "m", questions, Path("a.jsonl"), 4)) == 7
    shutil.copy("images/0.png", "images/1.png")
    together = []
    answers.answer_file(lambda images, asked, seed: together.append(images) or ["-"] * len(asked),
                        "m", questions, Path("b.jsonl"), 7)
    assert [image is together[0][0] for image in together[0]] == [True] * 2 + [False] * 5


def test_questions_are_checked(run_evaluate):
    bad = [({"image": "../rows.jsonl"}, "outside the image folder"), ([], "expected an object"),
           ({"image": "/etc/passwd"}, "outside the image folder"),
           ({"image": "none.png"}, "no image 'none.png'"),
           ({"question": "?"}, "'image' is missing"), ({"image": "0.png"}, "'question' is missing"),
           ({"image": "0.png", "question": "<image>\n"}, "'question' is missing"),
           ({"image": "0.png", "question": "?", "history": [["a", "b"]]}, "has earlier turns"),
           ({"image": "0.png", "question": "why " * 2000}, "tokens, the context holds"),
           ({"image": "bad.png", "prompt": "?"}, "cannot read image bad.png")]
    described = "--model one --chair truth.json --images images --max_new_tokens 4 --output chair"
    run_evaluate(f"{described} --prompt <image>What?")
    assert read_lines("chair/chair.jsonl")[0]["question"] == "What?"
    shown = run_evaluate("--model one --pope rows.jsonl --images images --suffix <image>", 1)
    assert "rows.jsonl row 1: the question contains <image>" in shown
    asked = "--model one --data bad.jsonl --images images --output out --max_new_tokens 4"
    good = {"image": "0.png", "text": "POPE calls it so?"}
    for row, message in bad:
        write_lines("bad.jsonl", good, row)
        shown = run_evaluate(f"{asked} --batch_size 1", 1)
        assert re.fullmatch(f"error: bad.jsonl row 2: .*{message}.*\n", shown)
    kept, = read_lines("out/bad.jsonl")  # the answer before the image that cannot be read
    write_lines("bad.jsonl", good, *(row for row, _ in bad))
    shown = run_evaluate(f"{asked} --batch_size 1 --skip_bad_rows")
    for number, (_, message) in enumerate(bad, 2):
        assert re.search(f"\n  bad.jsonl row {number}: .*{message}", shown)
    first, last = read_lines("out/bad.jsonl")
    assert first == kept and kept["question"] == "POPE calls it so?" and "answer" in kept
    assert message in last["error"] and "answer" not in last


# -------------------------------------------------------------------------- preview and the report

def test_preview_shows_rows_as_they_are_trained_on(tokenizer, capsys):
    pair = Pair("rows\x1b[2J 1", Path("a.png"), "What?", "A red car is on the left.",
                "A red car is on the left. There is a dog.\x1b[31m\n")
    talk = Conversation("rows 2", None, [("Describe it.", "A car."), ("And now?", "A bus.")])
    evaluation.show_rows([
        Example(pair.name, None, *data.pair_tokens(pair, tokenizer, 0, gamma=5.0)),
        Example(talk.name, None, *data.conversation_tokens(talk, tokenizer, 0))], tokenizer)
    assert re.fullmatch(
        r"rows\\x1b\[2J 1\n  chosen   A red car is on the left\.(\[</s>\]|</s>)\n"
        r"  rejected A red car is on the left\.\[ There is a dog\.\\x1b\[31m\\n</s>\]\n"
        r"rows 2\n  response A car\.</s>\{ ?USER: And now\? ASSISTANT:\} ?A bus\.</s>\n"
        r"2 rows, \d+ tokens to learn from, \d+ of them in corrected segments\n",
        capsys.readouterr().out)


def test_a_split_character_is_shown_once(tokenizer):
    pair = Pair("x", None, "?", "A red 龍 car is on the left.", "A red 龎 car is on the left.")
    for response, character in zip(data.pair_tokens(pair, tokenizer, 0, gamma=5.0)[1], "龍龎"):
        shown = data.segments(response, tokenizer)
        assert shown[1] == (character, 5.0) and "\ufffd" not in "".join(text for text, _ in shown)


@pytest.fixture(scope="module")
def hostile_report(tokenizer, tmp_path_factory):
    """The folder and the parsed page of a run whose data is as hostile as can be."""
    folder = tmp_path_factory.mktemp("reported") / "<b>run"
    folder.mkdir()
    settings = {"algo": "toy", "out": "</code><script>", "batch_size": 8, "corrections": 70}
    write_lines(folder / "config.json", {
        "settings": settings, "versions": {}, "about": "Align <i>it.", "reads": "pairs"})
    lines = [{"step": s, "loss": 1 / s, "rewards/accuracies": s / 10} for s in range(1, 10)]
    write_lines(folder / "metrics.jsonl", *lines, {"step": 10, "loss": math.nan})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"half')  # of a killed run
    drawn = [world.make_scene(i, "test") for i in range(14)]
    tail = " There is a red car in the middle. <script>alert(1)</script> & \"so\""
    parts = [scored_records(drawn, lambda scene: world.describe(scene) + end) for end in (tail, "")]
    before, after = ((world_metrics(records), records) for records in parts)
    blind = evaluation.blind_baselines(parts[0], parts[1], [])
    evaluation.write_results(folder / "results.json", {"before": before, "after": after, **blind})
    world.draw(drawn[0]).save(folder / "good.png")
    (folder / "<i>bad.png").write_bytes(b"no picture")
    pairs = [Pair("rows 1", folder / "good.png", "What?", "A red car stands on the left.",
                  "A red car stands on the left. There is a dog <img src=x>."),
             Pair("rows 2", folder / "<i>bad.png", "<script>", "A red cup.", "Blue, it is.")]
    examples = [Example(pair.name, None, *data.pair_tokens(pair, tokenizer, 0, gamma=5.0))
                for pair in pairs]
    evaluation.save_pairs(folder, pairs, examples, tokenizer)
    row = {"step": 1, "question": "What?", "answer": "A <dog>.", "score": -0.25}
    more = {"rm": 0.5, "kl": 1.0, "tokens": "<i>4", "false": ["A <dog>"]}  # need not be there
    write_lines(folder / "samples.jsonl", row | more, row | {"step": 5},
                row | {"step": 9, "false": None}, row | {"step": 9, "answer": "Nothing."})
    return folder, ElementTree.parse(evaluation.write_report(folder))  # its HTML is also XML


def test_report_is_safe_and_shows_everything(hostile_report):
    folder, page = hostile_report
    source, text = (folder / "report.html").read_text(), "".join(page.find("body").itertext())
    assert len(source) < 3e6 and "url(" not in source and "@import" not in source
    for element in page.iter():
        assert element.tag not in ("script", "i", "iframe", "object")
        assert not any(name.startswith("on") for name in element.keys())
        assert "nan" not in element.get("d", "")
        for name in ("src", "href"):
            assert element.get(name, "#").startswith(("#", "data:image/webp;base64,", "data:,"))
    assert len(page.findall(".//img")) == report.SCENES + 1  # and one of the pairs
    marks = [mark.get("class") for mark in page.iter("mark")]
    assert marks[:5] == list(report.KINDS)  # the legend
    assert set(marks[5:]) <= set(report.KINDS) and len(marks) >= 5 + 8
    curves = [svg.get("aria-label") for svg in page.iter("svg") if svg.get("aria-label")]
    assert curves == ["Loss", "Pairs ranked right"]
    for part in (
        "Align <i>it: 10 steps of 8 pairs, from 70 corrections of the model's own responses. ",
        "before", "after", "statement of any kind", "adversarial: right", "100.0",
        "<script>alert(1)</script> & \"so\"", "no picture: <i>bad.png", "×5",
        "Step 1questionWhat?completionA <dog>.score-0.25, 0.50 of it from the reward model",
        "<i>4 tokensfalse in itA <dog>", "questionWhat?completionNothing.score-0.25"):
        assert part in text
    assert "Step 5" not in text and text.count("false in it") == 1
    chosen, rejected = json.loads((folder / "pairs.json").read_text())["pairs"][0]["responses"]
    cut = "".join(part for part, weight in rejected if weight == 5)
    assert "dog <img src=x>" in cut and "red car" not in cut and chosen[0][1] == 1
    assert cut.strip() in [element.text for element in page.iter("del")]


def test_evaluation_names_no_algorithm():
    for path in (ROOT / "evaluation").glob("*.py"):
        assert not re.search(r"\b(sft|d?dpo|ppo|grpo|rloo)\b", path.read_text(), re.I), path


def test_report_charts_and_colours():
    series = {name: [(1, 0.5), (2, i)] for i, name in enumerate(("val/clip", "policy/clip"))}
    figure = ElementTree.fromstring(charts.lines("T", "unit", series))
    assert "".join(figure.itertext()).startswith("T val/clippolicy/clipstepunit00.5100.5")
    assert len(figure.findall(".//path")) == len(series)
    for low, high, wanted in (
        (0, 100, [0, 50, 100]), (0, 1, [0, 0.5, 1]), (0.42, 0.67, [0.4, 0.5, 0.6, 0.7]),
        (3, 3, [2, 3]), (0, 0, [-0.5, 0, 0.5]), (-2e-6, 1e-5, [-5e-6, 0, 5e-6, 1e-5])):
        ticks = charts.ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and 3 <= len(ticks) <= 8
        assert all(min(abs(tick - each) for tick in ticks) < 1e-12 for each in wanted)
    assert [charts.number(v) for v in (0, 0.25, 2e-4, 1.5e-5)] == ["0", "0.25", "2e-4", "1.5e-5"]
    for name, value, style in (
        ("coverage", 0.2, "good"), ("coverage", -0.2, "bad"), ("coverage", 0.05, ""),
        ("chair_i", 0.2, "bad"), ("mmhal/hallucination", -0.2, "good"), ("length", 3, ""),
        ("hallucination/object", -0.2, "good"), ("chair/coverage", 0.2, "good"),
        ("vqa/hallucination/accuracy", -2, "bad"), ("pope/a/yes_ratio", 2, "")):
        change = {"value": value, "low": value - 0.1, "high": value + 0.1}
        assert metrics.colour(name, change) == style


# ============================================================================ claims/, CLAIMS.md


def test_claims_page_is_what_the_command_writes(tmp_path):
    claims_page.write_page(tmp_path)
    made = {file.relative_to(tmp_path) for file in tmp_path.rglob("*.*")}
    for file in made:
        assert (ROOT / file).read_text() == (tmp_path / file).read_text(), f"write {file} again"
    assert made == {Path("CLAIMS.md"), *(file.relative_to(ROOT) for file in ROOT.glob(
        "claims/figures/*"))}


def test_readme_quotes_the_claims():
    runs, readme = tally.read_runs(), " ".join((ROOT / "README.md").read_text().split())
    shown = lambda mean, low, high: f"{abs(100 * mean):.1f} ± {100 * (mean - low):.1f}"
    left = lambda claim, label: shown(*tally.mean([*tally.arm_values(
        runs, definitions.CLAIMS[claim], label, definitions.ANY).values()]))
    both = lambda claim: f"{left(claim, 'DDPO + anchor')} and {left(claim, 'SFT')} %"
    assert f"complete corrections ({both('methods')} of the descriptions" in readme
    less, _ = tally.difference(runs, definitions.CLAIMS["overlooked"], "DDPO + anchor", "SFT",
                               definitions.ANY)
    assert f"DDPO leaves {shown(*less)} points less" in readme
    verdict = lambda claim, *pair: tally.verdict(runs, definitions.CLAIMS[claim], *pair)
    decided = [verdict(claim, "DDPO + anchor", "SFT") for claim in ("overlooked", "methods", "few")]
    assert decided == ["holds", *["not decided by these seeds"] * 2]
    assert verdict("scaling", "200 corrections", "2200 rankings") == "holds"
    assert f"only 200 ({both('few')})" in readme
    paper = left("methods", "DDPO, the paper's loss")
    assert f"The paper's own loss leaves {paper} %" in readme
    assert f"PPO with facts leaves {left('ppo', 'with facts')} %" in readme


def test_claims_are_command_lines_and_compare_their_arms():
    for claim in definitions.CLAIMS.values():
        assert {each for pair in claim.pairs for each in pair} <= {"base", *claim.arms}
        for options in (line for lines in claim.arms.values() for line in lines):
            assert len(tally.slug(options)) < 250  # a folder's name
            for command in map(shlex.split, options.split(" then ")):
                if command[0] == "evaluate.py":
                    evaluate.make_parser().parse_args(command[1:])
                else:
                    train.parse(command)


def test_claims_verdicts_follow_their_rule(tmp_path):
    after = {"hallucination/any": 0.2, "coverage": 0.95}
    base = {"hallucination/any": 0.9, "coverage": 0.955}
    runs = {}
    for seed, noise in enumerate((-0.01, 0.0, 0.02)):
        for options, change in (  # a: best, but silent; b: better; c: worse; d: hardly better
            ("a", {"hallucination/any": 0.01, "coverage": 0.5}), ("b", {}),
            ("c", {"hallucination/any": 0.4 + noise}), ("d", {"hallucination/any": 0.205 + noise}),
            ("e", {"hallucination/any": 0.1, "coverage": 0.92})):
            runs[options, seed] = {"before": base, "after": {**after, **change}}
    claim = definitions.Claim("name", "", "", {
        "best": ("a", "b", "c"), "worse": ("c",), "near": ("d",), "silent": ("e",), "new": ("f",)},
        ())
    assert tally.best(runs, claim.arms["best"]) == "b" and not tally.best(runs, ("f",))
    runs["g", 2] = {"before": base, "after": {**after, "hallucination/any": 0.41}}
    assert tally.best(runs, ("c", "g")) == "g"  # by the seed that both have
    verdict = lambda *pair: tally.verdict(runs, claim, *pair)
    assert verdict("best", "worse") == "holds" == verdict("worse", "base")
    assert verdict("worse", "best") == "does not hold: the opposite does"
    assert verdict("best", "near") == "not decided by these seeds"
    assert verdict("silent", "best") == "only at 3.0 points less coverage"
    assert verdict("best", "silent") == "the opposite, but only at 3.0 points less coverage"
    assert verdict("best", "new") == "not measured yet"
    amounts = replace(claim, arms={"50 corrections": ("c",), "200 corrections": ("b",)})
    drawn = claims_page.amounts(amounts, runs)
    assert {"50", "200", "corrections"} <= {each.text for each in ElementTree.fromstring(
        drawn).iter()} and not claims_page.amounts(claim, runs)
    (value, low, high), seeds = tally.difference(runs, claim, "worse", "best", definitions.ANY)
    half = 4.30 * np.std([0.19, 0.2, 0.22], ddof=1) / 3**0.5
    assert (value, high - value, seeds) == pytest.approx((0.61 / 3, half, 3)) and low < value
    scores = {"r": (0.81, 0.82, 0.83), "s": (0.69, 0.70, 0.71), "t": (0.74, 0.75, 0.76)}
    runs = {(name, seed): {"after": {"agreement": value}}
            for name, each in scores.items() for seed, value in enumerate(each)}
    claim = definitions.Claim("more", "", "", {name: (name,) for name in scores}, (),
                              "agreement", higher=True, margin=0.1)
    assert [tally.verdict(runs, claim, *pair) for pair in ("rs", "rt", "sr")] == [
        "holds", "does not hold", "does not hold: the opposite does"]


def test_claims_run_what_is_missing(tmp_path, monkeypatch, capfd):
    small = "--batch_size 4 --steps 1"
    first = f"--algo ddpo --corrections 4 {small}"
    after = (f"--algo sft --feedback questions --corrections 4 {small} then {first} "
             "--model {next}/model")
    judged = f"--algo rm --rankings 4 --held_out 0 {small} then"
    policy = (f"{judged} --algo grpo --prompts 4 --samples 2 --rollout_size 4 --log_every 1 {small}"
              " --max_new_tokens 8 --reward_model {here} --held_out_reward_model {here}")
    best = f"{judged} evaluate.py {ROOT}/world/base --best_of 2 --reward_model {{here}}"
    arms = {"one": (first,), "staged": (after,), "policy": (policy,), "best": (best,)}
    claim = definitions.Claim("tiny", "It runs.", "nobody", arms, (("one", "base"),),
                              curves=("score/rm", "score/held_out"))
    for module in (claims_command, claims_page):
        monkeypatch.setattr(module, "CLAIMS", {"tiny": claim})
    monkeypatch.setattr(tally, "SCENES", 4)
    monkeypatch.setattr(tally.read_runs, "__defaults__", (tmp_path / "results.jsonl",))
    monkeypatch.setattr(tally.do_run, "__defaults__", (tmp_path / "results.jsonl",))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second time nothing is missing
        assert claims_command.main(["run", "tiny", "--seeds", "1"]) == 0
    assert capfd.readouterr().out.count(f"tiny: {first} --seed 0") == 1
    runs = tally.read_runs()
    assert {options for options, _ in runs} == {first, after, policy, best}
    assert {"before", "after", "cut by text alone"} < runs[first, 0].keys()
    assert all({"coverage", "questions"} < found["after"].keys() for found in runs.values())
    metrics = {"question/a": 1.0, "pope/random/accuracy": 0.5, "pope/random/f1": 0.1, "chair_i": 0}
    assert tally.short_answers({k: {"value": v} for k, v in metrics.items()}) == {"questions": 0.75}
    assert not tally.short_answers({"chair_i": {"value": 0.1}})
    assert runs[policy, 0]["trace"].keys() == set(tally.TRACED)
    assert [path.name[-1] for path in Path("runs/claims").glob("algo-sft*") if "then" not in
            path.name] == ["1"]  # {next}
    assert Path("runs/world/prompts-4-0-72").is_dir()  # their number, the seed, the image size
    claims_page.write_page(tmp_path)
    text = (tmp_path / "CLAIMS.md").read_text()
    assert "| one | 1 |" in text and "one seed decides nothing" in text and f"`{first}`" in text
    for name in ("tiny", "tiny_kl"):
        ElementTree.parse(tmp_path / f"claims/figures/{name}.svg")
    broken = replace(claim, arms={"one": ("--algo ddpo --data nowhere",)})
    monkeypatch.setattr(claims_command, "CLAIMS", {"tiny": broken})
    with pytest.raises(RuntimeError, match="failed: .*--data nowhere"):
        claims_command.main(["run", "tiny", "--seeds", "1"])


# ==================================================================== evaluation/, the benchmarks

bench_sums = lambda terms: {n: (float(sum(t[0][1])), float(sum(t[0][2]))) for n, t in terms.items()}
VQA_FORMS = {  # as vqaEval.py processes them
    "The two  Dogs!": "2 dogs", "3.5 m.": "3.5 m", "a\nred\tcar": "red car", "None": "0",
    "black/white": "black white", "black / white": "black white", "1,000-a": "1000a", "its": "its",
    "T-shirt": "t shirt", "red, blue": "red blue", "dont know": "don't know", "12:30": "12:30",
    "couldntve": "couldntve", "couldnt've": "couldn't've", "'ows'at": "'ow's'at", "." * 33: ".",
    "somebody'd": "somebodyd"}


def test_vqa_by_hand():
    assert {answer: vqa.normal_form(answer) for answer in VQA_FORMS} == VQA_FORMS
    people = ["two"] * 2 + ["2"] + ["three"] * 6 + ["a few"]
    for answer, matches in (("Two.", 3), ("3", 6), ("few", 1), ("4", 0)):  # leave one person out
        subsets = [min((matches - (i < matches)) / 3, 1) for i in range(10)]
        assert vqa.vqa_score(answer, people) == pytest.approx(sum(subsets) / 10)
    assert [vqa.vqa_score(answer, ["The dog"]) for answer in ("dog", "cat")] == [1, 0]
    assert vqa.people_answers("", {"answers": [{"answer": "a"}, {"answer": 2}]}) == ["a", "2"]
    for row in ({}, {"answers": []}, {"answers": "two"}, {"answers": [None]}):
        with pytest.raises(DataError, match="row 1: expected answers"):
            vqa.people_answers("row 1", row)


AMBER_RELATION = {"car": ["wheel"], "tree": ["bush"], "bush": ["tree"], "man": ["person"],
                  "dog": [], "lake": ["water"], "can": [], "sign": []}
AMBER_TRUTHS = [
    {"type": "generative", "truth": ["car", "tree", "bush"], "hallu": ["man", "lake"]},
    {"type": "generative", "truth": ["dog"], "hallu": ["car"]}, {"type": "relation", "truth": "no"},
    *({"type": f"discriminative-{kind}", "truth": ("no", "yes")[i % 2]} for i, kind in enumerate((
        "hallucination", "attribute-state", "attribute-number", "attribute-action", "relation")))]
# 1: wheel: a car; bush: of a tree, which comes first; false: dog, water (a lake); sign is safe
AMBER_TEXTS = ["Trees and two wheels; a bush, a dog and water. You can see a sign and a wall.",
               "A dog, dogs and a person.", "No.", "No", "Yes", "Yes", "No", "No"]
AMBER_SUMS = {"chair": (3, 8), "cover": (3, 4), "hal": (2, 2), "cog": (1, 3)}
amber_rows = lambda numbers: [
    {"id": i, "image": f"{i % 2}.png", "answer": AMBER_TEXTS[i - 1]} for i in numbers]


def write_bench_amber(folder):
    queries = [{"id": i, "image": f"{i % 2}.png", "query": f"Query {i}?"} for i in range(1, 9)]
    write_lines(folder / "data/query/query_all.json", queries)
    truths = [{"id": i, **truth} for i, truth in enumerate(AMBER_TRUTHS, 1)]
    write_lines(folder / "data/annotations.json", truths)
    write_lines(folder / "data/relation.json", AMBER_RELATION)
    (folder / "data/safe_words.txt").write_text("orange\nsign")
    return folder


def test_amber_by_hand(tmp_path):
    bench = ambers.read_amber(write_bench_amber(tmp_path))
    words = ambers.best_words(bench)
    found = bench_sums(ambers.description_terms(bench, words, amber_rows((1, 2))))
    assert found == {f"lexical/{name}": pair for name, pair in AMBER_SUMS.items()}
    found = bench_sums(ambers.yes_no_terms(bench, amber_rows(range(3, 9))))
    for group, pairs in {  # "No." is no answer; the truth of 3, 4, 6, 8 is no; 4, 7, 8 say No
        "discriminative": [(3, 6), (2, 3), (2, 4), (4, 7)],
        "existence": [(1, 1), (1, 1), (1, 1), (2, 2)],
        "attribute": [(1, 3), (0, 1), (0, 1), (0, 2)],
        "relation": [(1, 2), (1, 1), (1, 2), (2, 3)]}.items():
        names = [f"{group}/{name}" for name in ("accuracy", "precision", "recall", "f1")]
        assert [found[name] for name in names] == pairs
    answers = {"no, sir": "No", " YES.": "Yes", "Not": "Not", "None": "None"}
    assert {answer: ambers.yes_or_no(answer) for answer in answers} == answers


def test_amber_exact_mode_uses_nltk_and_spacy(tmp_path, monkeypatch):
    bench = ambers.read_amber(write_bench_amber(tmp_path))
    lemmas = {"wheels": "wheel", "dogs": "dog", "cans": "can"}
    near = {("can", "lake"): 0.81, ("water", "car"): 0.81, ("can", "car"): 0.8}
    nltk, spacy, stem = map(ModuleType, ("nltk", "spacy", "nltk.stem"))
    nltk.word_tokenize = str.split
    nltk.pos_tag = lambda words: [(w, "MD" if w == "can" else "NNS") for w in words]
    stem.WordNetLemmatizer = lambda: SimpleNamespace(lemmatize=lambda w: lemmas.get(w, w))
    language = lambda a: SimpleNamespace(word=a, similarity=lambda b: near.get((a, b.word), 0))
    spacy.load = lambda name: {"en_core_web_lg": language}[name]
    for module in (nltk, spacy, stem):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    words = ambers.best_words(bench)
    for text, counts in {  # false, nouns, covered, hit
        "Wheels can wheels dogs person": (2, 3, 1, 1), "cans": (1, 1, 0, 1), "water": (0, 1, 1, 1)
    }.items():
        assert ambers.count_nouns(bench, words, AMBER_TRUTHS[0], text) == counts
    assert list(ambers.description_terms(bench, words, amber_rows((1, 2)))) == list(AMBER_SUMS)


def test_amber_scores_are_those_that_the_script_prints():
    counts = {  # questions with the truth yes, and no
        "hallucination": (0, 4924), "attribute-state": (2382, 2382), "relation": (975, 689),
        "attribute-number": (1036, 1036), "attribute-action": (396, 396)}
    truths = [{"type": f"discriminative-{kind}", "truth": truth} for kind, each in counts.items()
              for truth, n in zip(("yes", "no"), each) for _ in range(n)]
    bench = ambers.Amber([], dict(enumerate(truths)), {}, frozenset())
    rows = [{"id": i, "image": i % 9, "answer": "No" if i % 3 else "Yes"} for i in range(14216)]
    found = ambers.always_no(bench, rows)
    names = "discriminative/accuracy", "discriminative/f1", "existence/f1", "state/accuracy"
    assert [found[name] for name in names] == [0.663, 0.797, 1, 0.5]
    found = ambers.printed_scores(ambers.yes_no_terms(bench, rows[:3]))
    # P = 2 / 2.001 and R = 2 / 3.001 are rounded first; then 2 P R / (P + R + 0.001)
    assert [found[f"existence/{n}"] for n in ("precision", "recall", "f1")] == [1, 0.666, 0.799]
    assert ambers.printed_scores({"hal": [(1, np.ones(1), 3 * np.ones(1))]}) == {"hal": 0.334}


SYNONYMS = ("person, man, woman, people\ndog, puppy\ncar, police car\nchair, seat\ntoilet\ntie\n"
            "bear\ntrain\nhot dog\nteddy bear\nwine glass\nknife\ndining table, table\n")
SYNONYM_CASES = {  # text: words of CHAIR; and of Object HalBench, if others
    "Two dogs and a puppy. PEOPLE eat hot dogs.": ("dog,puppy,people,hot dog",),
    "A teddy bear; a bear-skin, bears": ("teddy bear,bear",), "A hot. Dog": ("dog",),
    "hot dog dog": ("hot dog,dog",), "The seat of the toilet": ("toilet",), "A baby": ("",),
    "A toilet seat, a seat": ("toilet",), "A bow tie on the baby bear": ("tie,bear",),
    "passenger trains on train tracks": ("train",), "A police car": ("car", "police car"),
    "wine glasses and knives": ("wine glass,knife",), "dining tables": ("table", "dining table")}


def test_chair_and_object_halbench_by_the_synonym_file(tmp_path):
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    table = synonyms.Synonyms(tmp_path / "synonyms.txt")
    for text, (chair, *other) in SYNONYM_CASES.items():
        assert ",".join(word for word, _ in table.words(text)) == chair
        halbench = table.words(text, table.all_pairs)
        assert ",".join(word for word, _ in halbench) == (other or [chair])[0]
    answers = ["A dog, a dog, a puppy and a car.", "A dog there.", "A man with a woman",
               "No thing is here"]
    there = [{"dog"}, {"car"}, {"dog", "person"}, {"tie"}]
    assert bench_sums(synonyms.synonym_terms(answers, there, table)) == {
        "chair_s": (2, 4), "chair_i": (2, 7), "coverage": (2, 5),  # the short answer counts
        "objhal/response": (1, 2), "objhal/mention": (1, 5), "objhal/coverage": (2, 5)}
    write_lines(tmp_path / "truth.json", {"1.jpg": ["seat", "table"]})
    truth, _, _ = coco.read_objects([tmp_path / "truth.json"], table.kinds_of)
    assert truth == {"1": {"chair", "dining table"}}


JUDGE = "open('executed', 'w')\ntemplate = '''Judge {}\nQ {}\nHuman {}\nModel {}\n'''\nexit()"


def write_suite(folder, images):
    """Write a folder with every benchmark; each has the images, and so has the folder."""
    image = lambda i: {"image": f"{i % 2}.png"}
    for name, rows in {
        "pope/random.json": [{**image(i), "text": f"Is it {i}?", "label": ("no", "yes")[i // 2]}
                             for i in range(4)],
        "chair/truth.json": [{"0.png": ["dog"], "1.png": ["man"]}],
        "mmhal/response_template.json": [
            {"image_id": str(i % 2), "image_src": "", "image_content": ["dog", "<b>"],
             "question": "Q {}?", "gt_answer": "T", "model_answer": ""} for i in range(8)],
        "vqa/val.jsonl": [{**image(0), "question": "What?", "answers": ["red", "b"]},
                          {**image(1), "question": "How many?", "answer": "two"}]}.items():
        write_lines(folder / name, *rows)
    write_bench_amber(folder / "amber")
    (folder / "chair/synonyms.txt").write_text(SYNONYMS)
    (folder / "mmhal/eval_gpt4.py").write_text(JUDGE)
    for each in (folder / "images", *folder.iterdir()):
        shutil.copytree(images, each, dirs_exist_ok=True, ignore=lambda *_: ["results.json"])


def test_suite_compares_models(run_evaluate, monkeypatch):
    command = "--suite set --models one half/model --output out --max_new_tokens 3"
    held, load = [], evaluate.load

    def load_alone(args, path):
        assert all(model() is None for model in held)  # one model in memory at a time
        loaded = load(args, path)
        held.append(weakref.ref(loaded[0]))
        return loaded

    monkeypatch.setattr(evaluate, "load", load_alone)
    shown = run_evaluate(command)
    assert len(held) == 2
    assert "amber/generative: asked as in the file, at most 3 new tokens; lexical mode" in shown
    assert "no scores yet: give each model's mmhal_*_" in shown and "synonym file; obj" in shown
    filled = json.loads(Path("out/half/mmhal_official_filled.json").read_text())
    lines = Path("out/half/mmhal_official_prompts.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"id": i, "prompt": f"Judge dog, <b>\nQ Q {{}}?\nHuman T\nModel {row['model_answer']}\n",
         "judge_prompt": "official"} for i, row in enumerate(filled)]
    assert not Path("executed").exists() and any(row["model_answer"] for row in filled)
    for name, base in (("one", 0), ("half", 2)):
        replies = [{"id": i, "reply": f"Rating: {base + i % 3}"} for i in range(8)]
        write_lines(f"out/{name}/mmhal_official_replies.jsonl", *replies)
    written = {path: path.read_bytes() for path in Path("out").glob("*/*.jsonl")}
    shown = run_evaluate(command)
    assert written == {path: path.read_bytes() for path in written}
    assert re.search(r'%  +one  +95 % interval  always "No" +half +- one, 95 % interval', shown)
    assert re.search(r"mmhal/score \(of 6\) +0\.88 .* 2\.88 +\+2\.00 \[\+2\.00, \+2\.00\]", shown)
    found = json.loads(Path("out/suite.json").read_text())
    one, two = found["scores"]["one"], found["scores"]["half"]
    assert {name.split("/")[0] for name in one} == {"pope", "chair", "amber", "vqa", "mmhal"}
    assert one["amber/discriminative/existence/recall"]["always_no"] == 0.999  # 1 / 1.001
    assert "amber/generative/lexical/hal" in one and "official" in found["notes"]["mmhal"]
    changes = found["differences"]["half"]
    assert [*changes] == [name for name in one if name in changes]
    for name, change in changes.items():  # AMBER's values are rounded
        assert change["value"] == pytest.approx(two[name]["value"] - one[name]["value"], abs=2e-3)
    page = ElementTree.fromstring(Path("out/suite.html").read_text().partition("\n")[2])
    text = "".join(page.itertext())
    assert all(part in text for part in ("lexical/hal", "score (of 6)", "kind/counting", "+2.00"))
    assert "good" in {cell.get("class") for cell in page.iter("td")}
    responses = json.loads(Path("out/one/amber_responses.json").read_text())
    assert [[*row] for row in responses] == [["id", "response"]] * 8
    (official := Path("set/mmhal/eval_gpt4.py")).rename("aside.py")  # now asked by the short prompt
    assert re.search("short.*no scores yet", run_evaluate(command))
    Path("aside.py").rename(official)
    write_lines(given := "out/one/mmhal_official_replies.jsonl", *replies[:6])
    assert "2 replies without one rating count as 0 (to prompts 6, 7)" in run_evaluate(command)
    paid, asked = Path(given).read_bytes(), Path("out/one/mmhal_official_prompts.jsonl")
    for i, stale in enumerate((lambda: asked.write_text("of others"), asked.unlink), 1):
        Path(given).write_bytes(paid)
        stale()
        shown = run_evaluate(command)  # the first model has no scores of MMHal, the second has
        assert f"replies.old{i}.jsonl: replies to other answers or another prompt" in shown
        assert "no scores yet" in shown and not Path(given).exists()
    assert Path("out/one/mmhal_official_replies.old1.jsonl").read_bytes() == paid
    assert list(metrics.model_names(["runs/a/model", "b/", "c/a"])) == ["runs_a_model", "b", "c_a"]
    assert metrics.model_names(["..", "../model"]).keys().isdisjoint({"..", ".", "../model"})
    with pytest.raises(ValueError, match="name every model once: /a/x, a/x"):
        metrics.model_names(["/a/x", "a/x"])


def test_help_states_the_defaults():
    for default in (builtin.SCENES, repr(parts.SUFFIX)):
        assert f"[{default}]" in " ".join(evaluate.make_parser(epilog="").format_help().split())


def test_questions_are_asked_as_the_papers_do(run_evaluate, monkeypatch):
    asked = []

    def spy(model, tokenizer, settings, images, texts, limit, *rest, **more):
        asked.append((texts[0], limit, model.head.weight.dtype))
        return ["No, it is not."] * len(texts)

    monkeypatch.setattr(generation, "answers", spy)
    ending, half = "\n" + parts.SUFFIX, torch.float16
    assert parts.SUFFIX == "Answer the question using a single word or phrase."
    pope, mmhal = "--pope set/pope/random.json", "--mmhal set/mmhal/response_template.json"
    for i, (command, *wanted) in enumerate((  # float32 for a stored float16 on a CPU
        (f"{pope} --model half --device cpu", "Is it 0?" + ending, 64),
        (f"{pope} --model half --dtype float16", "Is it 0?" + ending, 64, half),
        (f"{pope} --model one --suffix= --max_new_tokens 5", "Is it 0?", 5),
        ("--vqa set/vqa/val.jsonl --model one --suffix Short.", "What?\nShort.", 64),
        ("--chair set/chair/truth.json --model one", parts.DESCRIBE, 512),
        (f"{mmhal} --model one --judge_prompt short", "Q {}?", 512),
        ("--amber set/amber --model one --suffix Yes?", "Query 3?\nYes?", 64))):
        run_evaluate(f"{command} --output out{i}")
        assert asked[-1] == (*wanted, torch.float32)[:3]
    assert "other questions" in run_evaluate(f"{pope} --model half --suffix= --output out0", 1)
    assert {path.name for path in Path("out6").iterdir()} == {
        "amber_generative.jsonl", "amber_generative.lexical.scores.json", "amber_responses.json",
        "amber_discriminative.jsonl", "amber_discriminative.scores.json"}
    assert {"id": 4, "response": "No"} in json.loads(Path("out6/amber_responses.json").read_text())
    assert Path("out5/mmhal_short_prompts.jsonl").exists()


# ============================================================================== the correction page


try:
    from selenium import webdriver
    from selenium.webdriver import ActionChains, Keys
except ImportError:
    webdriver = None

ANSWER = "A red car stands on the left. There is a dog in the middle. The house is white and large."
EVIL = "<img src=x onerror=\"document.title='owned'\">"


def page_units(tokens):
    path = ROOT / "world" / "base" / "tokenizer.model"
    return Units(tokenizer_file.Tokenizer(path) if tokens else None)


def page_rows(folder, count=4, **fields):
    """Somebody's answers: `count` rows of image, question and answer."""
    folder.mkdir(exist_ok=True)
    for i in range(min(count, 20)):
        Image.new("RGB", (60, 40), (60 * i % 256, 90, 160)).save(folder / f"{i}.png")
    rows = ({"image": f"{i % 20}.png", "question": f"What is in picture {i}?", "answer": ANSWER,
             "by": "abc123 max_new_tokens=512", **fields} for i in range(count))
    write_lines(folder / "answers.jsonl", *rows)
    return folder / "answers.jsonl"


@pytest.fixture
def page(tmp_path):
    """Starts a server of this process on a free port, on the same files every time."""
    servers = []

    def start(count=4, tokens=True, token="", fields={}, **options):
        path = page_rows(tmp_path / "photos", count, **fields)
        at = SimpleNamespace(photos=path.parent, out=path.with_suffix(".corrections.jsonl"))
        at.store = corrections.Store(corrections.read_answers(path, None)[0], at.out, **options)
        server = page_server.Server("127.0.0.1", 0, at.store, page_units(tokens), token)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        at.address = f"http://127.0.0.1:{server.server_port}"
        at.lines = lambda: read_lines(at.out)
        at.ask = lambda *args, **headers: page_request(at.address, *args, **headers)
        return at

    def stop():
        while servers:
            server = servers.pop()
            server.shutdown()
            server.server_close()
            server.store.file.close()

    start.stop = stop
    yield start
    stop()


def page_request(address, path, body=None, **headers):
    """One request; bodies are JSON unless bytes, a header of None is left out."""
    connection = http.client.HTTPConnection(address.partition("//")[2], timeout=20)
    default = {"Origin": address, "Content-Type": "application/json"} if body is not None else {}
    headers = default | {name.replace("_", "-"): value for name, value in headers.items()}
    data = json.dumps(body) if isinstance(body, dict) else body
    connection.request("GET" if body is None else "POST", path, data,
                       {name: value for name, value in headers.items() if value is not None})
    reply = connection.getresponse()
    reply.content = reply.read()
    if reply.headers.get_content_type() == "application/json":
        reply.content = json.loads(reply.content)
    return reply


def submit(at, item, text=None, annotator="ann", **more):
    entry = {"id": item["answer"]["id"], "annotator": annotator, "chosen": text, "seconds": 12,
             "status": "corrected", "types": {}}
    return at.ask("/submit", entry | more)


@pytest.mark.parametrize("tokens, old, new, expected, kept", [
    (False, "A red car. A dog.", "A blue car. A dog.", [("A red", "A blue", False)], 0.71),
    (False, "A red car. A dog.", "A red car.", [(" A dog.", "", True)], 0.57),
    (False, "One two three", "One two three", [], 1),
    (True, "There is a red car.", "There is a blue car.", [(" red", " blue", False)], 0.83),
    (True, "a car at the top 🙂 x", "a car at the top 🙃 x", [("🙂", "🙃", False)], 0.92),
    (True, "at the bottom left 🙂🙃 a", "at the bottom left 🙃 a", [("🙂🙃", "🙃", False)], 0.71),
    (True, "a car", "", [("a car", "", True)], 0),
])
def test_diff_places_the_segments_of_training_in_both_texts(tokens, old, new, expected, kept):
    units = page_units(tokens)
    found = compare(units, old, new)
    parts = found["parts"]
    changed = [part for part in parts if "old" in part]
    assert [(part["old"], part["new"], part["end"]) for part in changed] == expected
    assert "".join(part.get("same", part.get("new")) for part in parts) == new
    assert "".join(part.get("same", part.get("old")) for part in parts) == old
    assert all(old[slice(*part["rejected"])] == part["old"] for part in changed)
    assert all(new[slice(*part["chosen"])] == part["new"] for part in changed)
    masks = segments.segment_mask(units.ids(new), units.ids(old))
    assert [sum(part["units"][i] for part in changed) for i in (1, 0)] == [m.sum() for m in masks]
    assert found["kept"] == pytest.approx(kept, abs=0.01)


def test_corrections_are_saved_and_read_by_training(page):
    at, text = page(), ANSWER.replace(" red", " blue")
    item = at.ask("/item?annotator=ann").content
    assert (item["done"], item["total"], item["units"]) == (0, 4, "tokens")
    item = submit(at, item, f" {text}\n", types={"0": "attribute"}).content
    assert (item["done"], item["own"], item["median"]) == (1, 1, 12)
    item = submit(at, item, status="accepted").content
    item = submit(at, item, status="skipped", reason="blurred").content
    assert submit(at, item, ANSWER + " Yes.").content["answer"] is None
    first, accepted, skipped, fourth = at.lines()
    assert first.items() >= {
        "chosen": text, "rejected": ANSWER, "status": "corrected", "annotator": "ann",
        "seconds": 12, "model": "abc123",
        "segments": [{"rejected": [0, 5], "chosen": [0, 6], "type": "attribute"}]}.items()
    assert accepted["chosen"] == ANSWER and skipped["chosen"] is None
    back = at.ask(f"/item?annotator=ann&id={fourth['id']}").content
    assert back["line"] == fourth and (back["before"], back["after"]) == (skipped["id"], None)
    submit(at, back, status="accepted")  # the last line of an id counts
    pair, = read_pairs([at.out], at.photos)
    assert (pair.chosen, pair.rejected) == (text, ANSWER)
    assert pair.image == at.photos / first["image"]
    plain = {key: first[key] for key in ("id", "image", "question", "chosen", "rejected")}
    plain |= {"annotator": "ann", "status": "done"}  # not a line of ours
    write_lines(at.out, first, plain, plain, {**first, "annotator": "bo", "chosen": "A car."})
    assert [pair.chosen for pair in read_pairs([at.out], at.photos)] == [text, text, "A car."]


SEEN, GIVEN = {"chosen": "A"}, {"chosen": "A", "status": "corrected", "seconds": 1, "types": {}}


@pytest.mark.parametrize("path, body, headers, status", [
    ("/", None, {}, 200), ("/icon.svg", None, {}, 200), ("/item", None, {"Host": "localhost"}, 200),
    ("/item", None, {"Host": "evil.example"}, 403), ("/", None, {"Host": "127.0.0.1.evil"}, 403),
    ("/item", None, {"Origin": "http://evil.example"}, 403), ("/item?id=nobody", None, {}, 404),
    ("/item", None, {"Sec_Fetch_Site": "cross-site"}, 403), ("/item?annotator=%3C", None, {}, 400),
    ("/image/ID", None, {}, 200), ("/image/../annotate.py", None, {}, 404),
    ("/image/%2e%2e%2f0.png", None, {}, 404), ("/server.py", None, {}, 404),
    ("/segments", SEEN, {}, 200), ("/segments", SEEN, {"Origin": None}, 403),
    ("/segments", SEEN, {"Origin": "null"}, 403), ("/segments", b"[1]", {}, 400),
    ("/segments", SEEN, {"Content_Type": "text/plain"}, 415), ("/write", SEEN, {}, 404),
    ("/segments", {"chosen": "A " * 10_001}, {}, 400), ("/segments", b'{"id": "\\ud800"}', {}, 400),
    ("/segments", {"chosen": "<image>"}, {}, 400), ("/segments", b"x" * 1_000_001, {}, 413),
    ("/submit", GIVEN | {"chosen": " "}, {}, 400), ("/submit", GIVEN | {"chosen": ANSWER}, {}, 400),
    ("/submit", GIVEN | {"seconds": "1"}, {}, 400), ("/submit", GIVEN | {"status": "x"}, {}, 400),
    ("/submit", GIVEN | {"types": {"0": "x"}}, {}, 400),
    ("/TOKEN/", None, {}, 200), ("/TOKEN/item", None, {"Host": "10.0.0.7:8000"}, 200),
    ("/TOKEN", None, {}, 404), ("/wrong/TOKEN/", None, {}, 403),
    ("/", None, {"Host": "TOKEN"}, 403),
])
def test_requests_that_are_refused(page, path, body, headers, status):
    at = page(1, token="TOKEN" if "TOKEN" in str((path, headers)) else "")
    key = next(iter(at.store.answers))
    body = {**body, "id": key} if isinstance(body, dict) else body
    reply = at.ask(path.replace("ID", key), body, **headers)
    assert reply.status == status and (status == 200 or reply.content["error"])
    assert reply.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 's")
    assert reply.headers["Cross-Origin-Resource-Policy"] == "same-origin" and not at.lines()


def test_annotators_get_orders_of_their_own_and_a_share_twice(page):
    at, names = page(40, overlap=0.25), ("ann", "bo", "cy")
    items = {name: at.ask(f"/item?annotator={name}").content for name in names}
    assert len({item["answer"]["id"] for item in items.values()}) == 3  # open elsewhere: not given
    seen = []
    while any(item["answer"] for item in items.values()):
        for name in (name for name in names if items[name]["answer"]):
            assert items[name]["line"] is None  # blind
            seen.append((items[name]["answer"]["id"], name))
            items[name] = submit(at, items[name], status="accepted", annotator=name).content
    extra = [sum(i == j for j, _ in seen) - wanted for i, wanted in at.store.wanted.items()]
    assert set(extra) <= {0, 1} and sum(extra) <= 2  # the last may be open on two pages
    assert len(set(seen)) == len(seen) and 44 <= len(seen) <= 58 and items["bo"]["done"] == 40


def test_the_file_survives(page, monkeypatch):
    at = page(3)
    item = submit(at, at.ask("/item").content, "A dog.").content
    with pytest.raises(ValueError, match="another annotate.py is writing to it"):
        corrections.Store([], at.out)
    before = at.out.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    reply = submit(at, item, "A cat.")
    assert (reply.status, reply.content["error"]) == (507, "not saved: disk full")
    assert at.out.read_bytes() == before
    monkeypatch.setattr(Path, "read_bytes", lambda _: (_ for _ in ()).throw(OSError(13, "denied")))
    reply = at.ask(f"/image/{item['answer']['id']}")
    assert (reply.status, reply.content["error"]) == (500, "cannot be read: denied")
    monkeypatch.undo()

    page.stop()
    for other in (b"some notes", b'[\n {"a": 1}\n]', before + b"of mine"):
        at.out.write_bytes(other)
        with pytest.raises(DataError, match="not a (file|line) of annotate.py"):
            corrections.Store([], at.out)
        assert at.out.read_bytes() == other
    for tail, kept in ((b'{"id": "half', b""), (before.strip(), before)):
        at.out.write_bytes(before + tail)
        corrections.Store([], at.out).file.close()
        assert at.out.read_bytes() == before + kept


def test_odd_answers_can_be_corrected(page):
    at = page(1, tokens=False, fields={"answer": "A street.\r\nA car."})
    item = at.ask("/item").content
    assert item["answer"]["text"] == "A street.\nA car."  # as the browser's text field has it
    submit(at, item, "A street.\nA bus.")
    assert at.lines()[-1]["rejected"] == "A street.\nA car."
    at.out.unlink()
    at = page(1, tokens=False, fields={"answer": "no " * 5000})
    reply = submit(at, at.ask("/item").content, "no " * 5000 + "yes")
    assert reply.status == 400 and "repeat themselves too often" in reply.content["error"]
    assert not at.lines()


def test_agreement_and_adjudication(page, capsys):
    marks = [(True, True)] * 20 + [(True, False)] * 5 + [(False, True)] * 10 + [(False, False)] * 15
    assert kappa(marks) == pytest.approx((0.7, 0.4)) and math.isnan(kappa([(True, True)])[1])
    at = page(3, tokens=False, overlap=1.0)
    one, two, three = at.store.answers
    texts = {one: {"ann": " red", "bo": " red"}, two: {"ann": "", "bo": " on the left"},
             three: {"ann": "", "bo": ""}}  # what each takes out
    for key, gone in texts.items():
        for name, part in gone.items():
            submit(at, {"answer": {"id": key}}, ANSWER.replace(part, "", 1), name,
                   status="corrected" if part else "accepted", seconds=11)
    page.stop()
    assert annotate.main(["--agreement", str(at.out)]) == 0
    report = capsys.readouterr().out
    assert re.search(r"ann +3 +33.3% +66.7% +0.0% +2.9% +11", report)  # 2 of 69: "A red"
    assert re.search(r"ann - bo +69 +95.7% +0.55", report)  # 3 in dispute: "on the left"
    assert re.search(r"all, both ways +138 +95.7% +0.55", report)
    assert "corrections: 1" in report and f"{two}  1.png: ann accepted, bo corrected" in report
    written = at.out.read_bytes()
    with pytest.raises(DataError, match="answer 1 about a.png: .* repeat themselves too often"):
        agreement.false_units(Units(), {"id": "1", "image": "a.png", "status": "corrected",
                                        "chosen": "no " * 5000 + "yes", "rejected": "no " * 5000})
    for edit in ({"chosen": 5}, {"chosen": None}, {"seconds": "12"}):
        at.out.write_bytes(files.jsonl([at.lines()[0] | edit]).encode())
        assert annotate.main(["--agreement", str(at.out)]) == 1
        assert "row 1: not a line of annotate.py" in capsys.readouterr().err
        at.out.write_bytes(written)
    at = page(3, tokens=False, adjudicate=True)
    item = at.ask("/item").content
    assert (item["total"], item["answer"]["id"], len(item["versions"])) == (1, two, 2)
    assert submit(at, item, "A red car.").content["done"] == 1 and at.lines()[-1]["adjudicated"]
    assert re.search(rf"{two} .*; \S+ decided", agreement.agreement(at.out, Units()))
    at.out.write_bytes(at.out.read_bytes() + written)  # its annotators submit all answers again
    chosen = {pair.chosen for pair in read_pairs([at.out], at.photos)}
    assert chosen == {ANSWER.replace(" red", "", 1), "A red car."}


@pytest.mark.parametrize("edit, arguments, phrase", [
    ({"image": "../secret.png"}, [], "answers.jsonl row 1: image '../secret.png' lies outside"),
    ({"image": "gone.png"}, [], "row 1: no image 'gone.png'"),
    ({"image": None}, [], "row 1: field 'image' is missing or empty"),
    ({"answer": None}, [], "row 1: field 'answer' is missing or empty"),
    ({"answer": ""}, [], "no row with an answer to correct"),
    ({"question": ""}, [], "row 1: field 'question' is missing"),
    ({}, ["--model", "nowhere"], "nowhere: no such folder"),
    ({}, ["--adjudicate"], "no answer has two different corrections"),
    ({}, ["--out", "nowhere/x.jsonl"], "nowhere/x.jsonl: no such file"),
    ({}, ["--out", "BAD"], "row 1: not a line of annotate.py"),
    ({}, ["--port", "BUSY"], "choose another --host or --port"),
])
def test_what_a_user_can_get_wrong(page, tmp_path, capsys, edit, arguments, phrase):
    path = page_rows(tmp_path / "own", 1, **edit)
    busy = page(1).address.rpartition(":")[2]
    (tmp_path / "bad.jsonl").write_text('{"image": "a"}\n')
    swap = {"BUSY": busy, "BAD": str(tmp_path / "bad.jsonl")}
    assert annotate.main([str(path), *(swap.get(each, each) for each in arguments)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and phrase in error


def test_many_answers_stay_quick(page):
    long = " ".join([ANSWER] * 12)
    at = page(10_000, fields={"answer": long})
    changed = {"id": next(iter(at.store.answers)), "chosen": long.replace("dog", "cat")}
    for limit, request in ((0.05, ("/segments", changed)), (0.1, ("/item?annotator=ann",))):
        times = []
        for _ in range(5):
            began = time.process_time()  # whatever else the machine does
            assert at.ask(*request).status == 200
            times.append(time.process_time() - began)
        assert min(times) < limit


def test_world_is_drawn_and_described(tmp_path, monkeypatch):
    monkeypatch.setattr(annotate, "WORLD", tmp_path)
    monkeypatch.setattr(annotate, "SCENES", 2)
    path = annotate.make_world()
    found, empty = corrections.read_answers(path, tmp_path / "images")
    assert len(found) == 2 and not empty and len(found[0].model) == 16
    written = path.stat().st_mtime_ns
    assert annotate.make_world().stat().st_mtime_ns == written


# -------------------------------------------------------------------------------- in a real browser


@pytest.fixture(scope="module")
def browser():
    if not (webdriver and shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no browser: apt-get install chromium chromium-driver, pip install selenium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for flag in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-sync",
                     "disable-background-networking", "disable-component-update",
                     f"user-data-dir={profile}", "window-size=1300,850"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        yield driver
        driver.quit()


class Annotator:
    """What an annotator does with the keyboard, and reads; every wait ends after 15 s."""

    def __init__(self, driver, address):
        self.run = driver.execute_script
        self.driver = driver
        driver.get(address)
        self.shows("question", "picture")

    def press(self, *keys, control=""):
        actions = ActionChains(self.driver)
        if control:
            actions.key_down(Keys.CONTROL).send_keys(control).key_up(Keys.CONTROL)
        actions.send_keys(*keys).perform()

    def read(self, element):
        return self.run("const e = document.getElementById(arguments[0]);"
                        "return e.value ?? e.innerText", element)

    def segments(self):
        return self.run("return [...document.querySelectorAll('#diff .segment')]"
                        ".map((e) => e.innerText).join('|')")

    def waits(self, holds):
        for _ in range(300):
            if holds():
                return
            time.sleep(0.05)
        pytest.fail(f"{self.read('editor')!r}, {self.segments()!r}, {self.read('banner')!r}")

    def shows(self, element, text):
        self.waits(lambda: text in self.read(element) and self.read("counts"))


def test_correcting_by_keys_and_training_on_it(page, browser, tmp_path, run_train):
    at = page(6, fields={"answer": f"{ANSWER} {EVIL}", "question": f"picture {EVIL}?"})
    ids = list(at.store.answers)  # one without a name gets them in order
    me = Annotator(browser, at.address)
    text = me.read("editor")
    assert EVIL in text and EVIL in me.read("diff") and EVIL in me.read("question")
    me.press(Keys.ARROW_DOWN, "d", "1")  # the dog's sentence; an object
    me.waits(lambda: "dog" in me.segments() and me.segments().endswith("object"))
    assert "dog" not in me.read("editor")
    me.press("z", "z")
    me.waits(lambda: me.read("editor") == text and not me.segments())
    me.press("y", "y")
    me.waits(lambda: me.segments().endswith("object"))
    me.press(Keys.ARROW_UP, "e", " Yes, ", Keys.ESCAPE, "2")  # typed into the text
    me.waits(lambda: "Yes" in me.segments() and "attribute" in me.segments())
    me.press(control="z")
    me.waits(lambda: "attribute" not in me.segments())
    browser.refresh()  # the draft stays
    me.waits(lambda: me.segments().endswith("object"))
    draft = me.read("editor")
    me.press(control=Keys.ENTER)
    me.shows("progress", "1 of 6")
    line, = at.lines()
    assert line["id"] == ids[0] and line["chosen"] == draft.strip() and "Yes" in draft
    assert [segment["type"] for segment in line["segments"]][-1] == "object"
    browser.refresh()  # goes on
    me.shows("file", "1.png")
    me.press("a")
    me.shows("file", "2.png")
    me.press("s", "2")
    me.shows("file", "3.png")
    me.press("b")
    me.shows("done", "skipped the question does not fit")
    me.press(Keys.ARROW_DOWN, "d")
    me.waits(me.segments)
    me.press(control=Keys.ENTER)
    me.shows("file", "3.png")
    me.press(Keys.ENTER)
    me.press("A car.", control="a")
    me.shows("warning", "of the original is left")
    assert [line["status"] for line in at.lines()] == [
        "corrected", "accepted", "skipped", "corrected"]
    other = Annotator(browser, f"{at.address}?annotator=bo")
    assert other.read("file") != "3.png" and other.read("progress").startswith("3 of 6")
    assert browser.title.startswith("Corrections") and not browser.get_log("browser")
    run_train("--algo", "ddpo", "--data", at.out, "--images", at.photos, "--out",
              tmp_path / "run", "--steps", 2, "--batch_size", 2)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_killed_server_loses_nothing(browser, tmp_path):
    path = page_rows(tmp_path / EVIL.replace("/", ""), 3)
    out = path.with_suffix(".corrections.jsonl")

    def start(port):
        command = [sys.executable, ROOT / "annotate.py", path, "--port", port]
        process = subprocess.Popen(  # with Ctrl-C on, which a background shell turns off
            command, stdout=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        return process, next(line.split()[1] for line in process.stdout if line[:5] == "open ")

    server, address = start("0")
    me = Annotator(browser, address)
    me.press("d")
    me.waits(me.segments)
    me.press(control=Keys.ENTER)
    me.shows("progress", "1 of 3")
    server.kill()
    server.wait()
    saved = out.read_bytes()
    assert saved.count(b"\n") == 1
    me.press("d")
    me.shows("banner", "The server does not answer")
    me.press(control=Keys.ENTER)
    browser.get("about:blank")  # closed, while nobody answers
    server, _ = start(address.split(":")[2].strip("/"))
    Annotator(browser, address).shows("progress", "2 of 3")
    assert out.read_bytes().startswith(saved)
    assert "red car" not in json.loads(out.read_bytes()[len(saved) :])["chosen"]
    server.send_signal(signal.SIGINT)
    (shown,) = re.findall("train.py (.*)", server.communicate(timeout=20)[0])
    assert train.parse(shlex.split(shown))[0].data == [str(out)]
    assert server.returncode == 0


# ========================================================================================== world/

PARK = Scene(0, "park", (Thing("dog", "red", 2, 0), Thing("umbrella", "blue", 1, 4),
                         Thing("bus", "green", 3, 8)))
EXPECTED_KINDS = {setting: list(kinds)[:4] for setting, kinds in world.SCENES.items()}


def test_world_is_the_same_in_every_process():
    # sets and str hashes differ between processes; nothing may depend on them
    code = ("import random, world as w, zlib; r, s = random.Random(1), w.make_scene(7);"
            "print(s, w.describe(s), w.annotate(s, r), w.questions(s, r, 12), w.facts(s),"
            "w.statements(s, r, 5), zlib.crc32(w.draw(s).tobytes()))")
    outputs = [subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, cwd=ROOT,
                              check=True, text=True, capture_output=True).stdout for seed in "12"]
    assert outputs[0] == outputs[1]


def test_world_scenes_are_well_formed_and_typical():
    scenes = [world.make_scene(seed) for seed in range(2000)]
    for scene in scenes:
        cells = [thing.cell for thing in scene.things]
        assert cells == sorted(set(cells)) and 3 <= len(cells) <= 5
        assert len({thing.kind for thing in scene.things}) == len(cells)
        assert scene.absent(world.SCENES[scene.type])  # the annotator always has something to add
    things = [(scene.type, thing) for scene in scenes for thing in scene.things]
    assert {thing.kind for _, thing in things} == set(world.KINDS)
    typical = np.mean([thing.kind in world.SCENES[setting] for setting, thing in things])
    usual = np.mean([thing.colour == world.KINDS[thing.kind] for _, thing in things])
    assert 0.83 < typical < 0.93 and 0.67 < usual < 0.73  # by chance some others are typical
    placed = np.mean([thing.cell == world.USUAL_CELLS[thing.kind] for _, thing in things])
    assert 0.6 < placed < world.scenes.USUAL_CELL + 0.05  # another thing may be there already
    for kinds in EXPECTED_KINDS.values():  # so that none of them is in another's way
        assert len({world.USUAL_CELLS[kind] for kind in kinds}) == len(kinds)


@pytest.mark.parametrize("small", [False, True])
def test_world_splits_share_no_content(monkeypatch, small):
    if small:  # a world so small that the same scene is drawn many times
        kinds = dict.fromkeys(("car", "bus", "tree", "house", "dog"), 1)
        for name, value in {"SCENES": {"street": kinds}, "KINDS": dict.fromkeys(kinds, "red"),
                            "USUAL_CELLS": dict.fromkeys(kinds, 4), "UNUSUAL_COLOUR": 0,
                            "NUMBER_WEIGHTS": (1, 0, 0)}.items():
            monkeypatch.setattr(world.scenes, name, value)
    train, test = ({dataclasses.astuple(world.make_scene(seed, split))[1:] for seed in range(count)}
                   for split, count in (("train", 4000), ("test", 1500)))
    assert not train & test and (len(train) < 3900) == small
    with pytest.raises(ValueError, match="split"):
        world.make_scene(0, "valid")


@pytest.mark.parametrize("difference, things, fields", [(0.0, 1, 1), (1.0, None, 4)])
def test_world_lookalikes_differ_as_much_as_asked(difference, things, fields):
    for seed in range(200):
        scene, rng = world.make_scene(seed), random.Random(seed)
        other = world.lookalike(scene, rng, difference)
        pairs = [(a, b) for a, b in zip(scene.things, other.things, strict=True) if a != b]
        assert len(pairs) == (things or len(scene.things))
        assert all(len(vars(a).items() - vars(b).items()) == fields for a, b in pairs)
        for name in ("kind", "cell"):
            assert len({getattr(thing, name) for thing in other.things}) == len(other.things)
        assert world.hallucinations(scene, world.describe(other))
        assert not world.hallucinations(other, world.describe(other))
        less = world.lookalike(scene, rng, difference, fewer=True)
        gone = min(len(pairs), len(scene.things) - 1)
        assert len(less.things) == len(scene.things) - gone and less.type == scene.type
        assert set(less.things) < set(scene.things)
        assert len(world.hallucinations(less, world.describe(scene))) >= gone
        for field, key in (("cell", "kind"), ("kind", "cell")):
            other = world.exchanged(scene, rng, difference, field)
            found = {getattr(thing, key): thing for thing in other.things}
            assert len({getattr(thing, field) for thing in other.things}) == len(found)
            now = [found[getattr(thing, key)] for thing in scene.things]
            assert len(pairs) == sum(a != b for a, b in zip(now, scene.things, strict=True))
            assert list(scene.things) == [
                replace(a, **{field: getattr(b, field)}) for a, b in zip(now, scene.things)]
            assert [t.cell for t in other.things] == sorted(t.cell for t in other.things)
        full = world.extended(scene, rng, 3.0)
        moved = set(full.things) ^ set(world.exchanged(full, rng, 0.0, "cell").things)
        assert not full.free_cells() and len(moved) == 4  # two have changed places
        more = world.extended(scene, rng, difference)
        assert set(more.things) > set(scene.things)
        size = len(scene.things) + (things or min(len(scene.things), len(scene.free_cells())))
        cells = [thing.cell for thing in more.things]
        assert len({thing.kind for thing in more.things}) == size and cells == sorted(set(cells))
        twice = world.repeated(scene, rng)
        (again,) = set(twice.things) - set(scene.things)
        assert again.cell in scene.free_cells()
        assert replace(scene.find(again.kind), cell=again.cell) == again
        first, second = (thing.kind for thing in twice.things if thing.kind == again.kind)
        assert first == second and world.exchanged(twice, rng, difference, "kind") != twice
        reports = [world.describe(world.misreported(scene, Random(i))) for i in range(20)]
        assert sum(world.annotate(scene, Random(i)) == report  # unless a place decides the order
                   for i, report in enumerate(reports)) > 4


def test_world_pictures_show_each_thing_in_its_cell_at_every_size():
    pixels = lambda scene, size=72: np.asarray(world.draw(scene, size).reduce(size // 72), int)
    for cell in range(9):
        bed = Scene(0, "park", (Thing("bed", "red", 1, cell),))
        changed = np.abs(pixels(bed) - pixels(Scene(0, "park", ()))).sum(-1) > 30  # (72, 72)
        row, column = divmod(cell, 3)
        inside = changed[24 * row:24 * row + 24, 24 * column:24 * column + 24].sum()
        assert changed.shape == (72, 72) and inside > 100 and inside > 0.9 * changed.sum()
    scene, other = world.make_scene(3), world.make_scene(4)
    assert np.abs(pixels(scene) - pixels(scene, 288)).mean() < 8
    assert np.abs(pixels(scene) - pixels(other)).mean() > 8


def test_world_pictures_differ_in_every_attribute():
    scenes = [Scene(0, setting, ()) for setting in world.SCENES] + [
        Scene(0, "farm", (Thing(kind, colour, number, 4),))
        for kind in world.KINDS for colour in world.COLOURS for number in (1, 2, 3)]
    assert len({world.draw(scene).tobytes() for scene in scenes}) == 6 + 24 * 6 * 3


def test_world_annotator_errs_at_its_rates_and_in_nothing_else():
    rng, rates, errors = random.Random(0), world.Rates(), []
    scenes = [world.make_scene(seed) for seed in range(2000)]
    things = [thing for scene in scenes for thing in scene.things]
    loose = lambda text: [world.NOUNS.get(word, word.replace("are", "is"))  # but for is/are and -s
                          for word in re.findall(r"\w+", text)]
    for scene in scenes:
        text = edited = world.annotate(scene, rng)
        for span in reversed(world.hallucinations(scene, text)):
            errors.append(span.kind)
            edited = edited[:span.start] + span.replacement + edited[span.end:]
        assert loose(edited) == loose(world.describe(scene))
        assert world.correct(scene, text) == world.describe(scene)
    added = rates.missing_object * sum(
        world.USUAL_CELLS[kind] in scene.free_cells()
        for scene in scenes for kind in scene.absent(EXPECTED_KINDS[scene.type]))
    unusual = sum(thing.colour != world.KINDS[thing.kind] for thing in things)
    three, two = (sum(thing.number == number for thing in things) for number in (3, 2))
    fewer = three * rates.three_as_two + two * rates.two_as_one
    assert errors.count("object") == pytest.approx(added, abs=60)
    assert errors.count("attribute") / unusual == pytest.approx(rates.usual_colour, abs=0.03)
    assert errors.count("position") / len(things) == pytest.approx(rates.wrong_place, abs=0.015)
    assert errors.count("number") == pytest.approx(fewer, rel=0.08) and len({*errors}) == 4


def test_world_annotator_has_the_habits_that_its_rates_say():
    for scene in map(world.make_scene, range(300)):
        rng = random.Random(scene.seed)
        assert world.annotate(scene, rng, world.Rates(0, 0, 0, 0, 0)) == world.describe(scene)
        text = world.annotate(scene, rng, world.Rates(0, 0, 0, 0, 1))
        cells = [world.PLACES.index(found[0].lower()) for found in world.PLACE.finditer(text)]
        for cell, thing in zip(cells, scene.things, strict=True):  # one step away
            assert abs(cell // 3 - thing.cell // 3) + abs(cell % 3 - thing.cell % 3) == 1
        text = world.annotate(scene, rng, world.Rates(1, 1, 0, 0, 0))
        habits = [kind for kind in scene.absent(EXPECTED_KINDS[scene.type])
                  if world.USUAL_CELLS[kind] in scene.free_cells()]
        cells = {thing.kind: thing.cell for thing in scene.things}
        cells |= {kind: world.USUAL_CELLS[kind] for kind in habits}
        assert world.mentions(text) == sorted(cells, key=cells.get)  # in reading order, like all
        assert re.findall("|".join(world.COLOURS), text) == [
            world.KINDS[kind] for kind in sorted(cells, key=cells.get)]


def test_world_texts_are_as_true_as_they_say():
    rng, true = random.Random(0), []
    for scene in (world.make_scene(seed, "test") for seed in range(500)):
        text, facts = world.describe(scene), world.facts(scene)
        assert world.hallucinations(scene, text) == [] and world.correct(scene, text) == text
        assert world.mentions(text) == [thing.kind for thing in scene.things]
        assert 25 <= len(text.split()) <= 55 and len(facts) == len(scene.things) + 1
        assert not any(world.hallucinations(scene, fact) for fact in facts)
        for sentence, is_true in world.statements(scene, rng, 3):
            assert len(world.hallucinations(scene, sentence)) == (not is_true), sentence
            true.append(is_true)
    assert np.mean(true) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("marked, corrected", [  # false spans of PARK in brackets, with their kind
    ("[object There is a cat on the left.]", ""),
    ("A bus? [object Two cars are here.] Hello.", "A bus? Hello."),
    ("[object There is a cat.] Two dogs.", "Two dogs."),
    ("There are two red dogs [position on the right].", "There are two red dogs at the top left."),
    ("[position On the left] there is a blue umbrella.", "In the middle there is a blue umbrella."),
    ("There is [number a] red dog at the top left.", "There are two red dogs at the top left."),
    ("Two red dogs and [number three] umbrellas", "Two red dogs and an umbrella"),
    ("there ARE [number two] Blue UMBRELLAS here.", "there Is a Blue Umbrella here."),
    ("This is a [other beach].", "This is a park."),
    ("There is an umbrella[object  and a cat].", "There is an umbrella."),
    ("There is [object a cat and ]an umbrella.", "There is an umbrella."),
    ("Two dogs. Two dogs. [number A] dog.", "Two dogs. Two dogs. Two dogs."),
    ("Two dogs at the top left. [position Two dogs on the left.]", "Two dogs at the top left."),
    ("[position Two dogs on the left.] Two dogs at the top left.", "Two dogs at the top left."),
    ("Dogs [position on the left]. [position Dogs on the right.]", "Dogs at the top left."),
    ("In the middle an umbrella[position , on the left a blue umbrella].",
     "In the middle an umbrella."),
    ("In the middle there are [object two red cats]. Dogs.",
     "In the middle there is a blue umbrella. Dogs."),
    ("Two dogs at the top left and at the bottom right there are [position two red dogs]",
     "Two dogs at the top left and at the bottom right there are three green buses"),
    ("An umbrella. [object In the middle there is a cat.]", "An umbrella."),
    ("In the middle [object a cat]. [object In the middle one house.]",
     "In the middle a blue umbrella."),
    ("You can see a [attribute purple] umbrella", "You can see a blue umbrella"),
    ("This is a park. [number Three] [attribute blue] dogs are [position on the left]. "
     "[object There is a cat.] [number A] bus is here.",
     "This is a park. Two red dogs are at the top left. Three buses are here."),
    *((true, true) for true in (
        "", " ", "...", "Yes.", "No, there is no cat.", "It is not a cat.", "carpet busy",
        "the dogs", "Is there a cat?", "A buſ on the rıght",
        "Two dog at the top left", "a nice picture\n\nwith birds",
        "two red dogs are at the top left two red dogs", "A blue umbrella a blue umbrella a")),
])
def test_world_oracle_marks_and_corrects_exactly_what_is_false(marked, corrected):
    text = shown = re.sub(r"\[\w+ (.*?)\]", r"\1", marked)
    for span in reversed(world.hallucinations(PARK, text)):
        shown = f"{shown[:span.start]}[{span.kind} {text[span.start:span.end]}]{shown[span.end:]}"
    assert shown == marked and world.correct(PARK, text) == corrected


def test_world_annotators_can_be_careless():
    """Each false span is overlooked, and each correction spoiled, at the given rates."""
    once, rng = "Two dogs at the top left.", random.Random(0)
    twice = f"{once} Two dogs on the left."  # a repetition is always noticed
    assert world.correct(world.careless(PARK, twice, rng, overlook=1), twice) == once
    rng, kept, total, spoiled = random.Random(0), 0, 0, 0
    for scene in map(world.make_scene, range(1200)):
        text = world.annotate(scene, rng)
        assert world.correct(world.careless(scene, text, rng), text) == world.correct(scene, text)
        halves = world.correct(world.careless(scene, text, rng, overlook=0.3), text)
        left = world.hallucinations(scene, halves)
        kept, total = kept + len(left), total + len(world.hallucinations(scene, text))
        assert {halves[span.start : span.end] for span in left} <= {
            text[span.start : span.end] for span in world.hallucinations(scene, text)}
        noisy = world.correct(world.careless(scene, text, rng, noise=0.1), text)
        made_up = world.hallucinations(scene, noisy)
        assert len(made_up) <= 1 and not any(span.kind == "object" for span in made_up)
        spoiled += len(made_up)
    assert kept / total == pytest.approx(0.3, abs=0.03)
    assert spoiled / 1200 == pytest.approx(0.1, abs=0.03)


def test_blind_edits_and_the_control():
    """A classifier finds a false object that the words give away, and cuts no more than allowed."""
    scene = lambda i: world.make_scene(i, "test")
    liar = "You can see a golden dog up there."
    spoilt = lambda s: world.describe(s).replace(". ", f". {liar} ", 1)
    scenes = [scene(i) for i in range(60) if not scene(i).find("dog")]
    before, after = (scored_records(scenes, say) for say in (spoilt, world.describe))
    corrections = [(world.describe(s), spoilt(s)) for s in map(world.make_scene, range(80))
                   if not s.find("dog")]
    found = evaluation.blind_baselines(before, after, corrections)
    values = {name: {measure: each["value"] for measure, each in metrics.items()}
              for name, (metrics, _) in found.items()}
    assert values["cut by text alone"]["hallucination/object"] == 0  # all of them
    assert values["cut by text alone"]["coverage"] == 1  # and nothing else
    assert all(record["answer"] == world.describe(s)
               for s, record in zip(scenes, found["cut by text alone"][1]))
    last = values["last sentence cut"]
    things = sum(len(s.things) for s in scenes)
    assert last["coverage"] == pytest.approx(1 - len(scenes) / things)
    assert last["hallucination/object"] == 1
    other = found["other picture"][1]
    assert [record["answer"] for record in other] == [record["answer"] for record in after]
    for record, against in zip(after, other):
        assert against["type"] == record["type"] and against["scene"] != record["scene"]
        assert against["spans"] == [vars(span) for span in world.hallucinations(
            scene(against["scene"]), record["answer"])]
    assert values["other picture"]["hallucination/any"] > 0.9
    text = blind.TextClassifier(corrections)
    less = blind.false_by_text(before, text, 0.9)  # some coverage may go: true sentences follow
    assert 0.9 <= sum(map(builtin.covered, less)) / things < 1
    assert list(evaluation.blind_baselines(before, after, [])) == [
        "last sentence cut", "other picture"]
    assert not blind.other_picture(after[:1])  # a scene alone is not held against itself


def test_world_corrections_of_garbage_are_free_of_hallucinations():
    rng = random.Random(0)
    words = [*world.NOUNS, *world.COLOURS, *world.SCENES, *world.PLACES * 3,
             *["there is", "There are", "is", "a", "an", "two", "three", "big"] * 6,
             *["and", ",", ".", "?", "\n", "no"] * 6]
    for scene in map(world.make_scene, range(1000)):
        text = " ".join(rng.choices(words, k=rng.randint(1, 40)))
        spans = world.oracle.edits(scene, text)
        assert all(a.end <= b.start for a, b in zip(spans, spans[1:]))
        assert world.hallucinations(scene, world.correct(scene, text)) == []


def test_world_mentions_are_found_in_linear_time():
    text = "Two BUSES, a bus and an apple. Is there a car? No cups. Carpets"
    assert world.mentions(text) == ["bus", "bus", "apple"]
    for gap in (" ", " , ", " and", " \n", "\t,", "?", "a ", "x", "there is "):
        started = time.perf_counter()
        kinds = world.mentions("a car" + gap * 2000 + "a dog.")
        assert time.perf_counter() - started < 3 and (gap != " " or kinds == ["car", "dog"])
    plain, rng = re.compile(r"\s*,?\s+and\s+|\s*,\s+", re.I), random.Random(0)  # the slow form
    for _ in range(20_000):
        text = "x" + "".join(rng.choices([" ", "  ", ",", "And", "x", "\n", "an"], k=8))
        fast = [found.span() for found in world.oracle.LINK.finditer(text, 1)]
        assert fast == [found.span() for found in plain.finditer(text, 1)], text


def test_world_conversations_of_a_supervised_stage(tmp_path):
    settings = pretraining.WORLD_IMAGES
    rows = {about: json.loads(feedback.conversations(settings, tmp_path / about, 30, 0, about)
                              .read_text()) for about in ("questions", "descriptions", "cropped")}
    texts = {about: [[turn["value"] for turn in row["conversations"]] for row in found]
             for about, found in rows.items()}
    assert texts["descriptions"] == texts["cropped"] != texts["questions"]
    changed = []
    for i, (asked, described) in enumerate(zip(texts["questions"], texts["descriptions"])):
        assert [value.startswith("<image>\n") for value in asked] == [True] + 7 * [False]
        assert max(len(answer.split()) for answer in asked[1::2]) < 6
        scene = world.make_scene(f"conversations 0 {i}")
        assert {t.kind for t in scene.things} <= set(world.mentions(described[1]))
        whole, cropped = (np.asarray(Image.open(tmp_path / about / f"images/{i:06}.png"))
                          for about in ("descriptions", "cropped"))
        assert np.array_equal(whole, np.asarray(world.draw(scene, settings.size)))
        assert cropped.shape == whole.shape
        changed.append(not np.array_equal(whole, cropped))
    assert np.mean(changed) > 0.9  # a crop may keep all
    data_rows = read_conversations([tmp_path / "questions/conversations.json"],
                                   tmp_path / "questions/images")
    assert len(data_rows) == 30


def test_world_ranking():
    true, false, rng = "Two dogs are at the top left.", "A cat is on the left.", random.Random(0)
    more = true + " There is a blue umbrella in the middle."
    second = lambda *given: np.mean([world.rank(PARK, *given) for _ in range(3000)])
    assert second(true, false, rng, 0) == 0 and second(true, more, rng, 0) == 1
    assert second(more, false, rng) == pytest.approx(0.1, abs=0.02)  # by noise
    assert second(true, true, rng) == pytest.approx(0.5, abs=0.04)


def test_world_answers_agree_with_the_truth():
    with pytest.raises(ValueError, match="a scene has about .* different questions, not 3000"):
        world.questions(world.make_scene(0), random.Random(0), 3000)
    for seed in range(200):
        scene, rng = world.make_scene(seed), random.Random(seed)
        asked = world.questions(scene, rng, 12) + world.questions(scene, rng, 6, held_out=True)
        assert len({question.text for question in asked[:12]}) == 12
        for q in asked:
            kinds = [world.NOUNS[w] for w in re.findall(r"\w+", q.text) if w in world.NOUNS]
            a, b = ([scene.find(kind) for kind in kinds] + [None, None])[:2]
            here = [thing for thing in scene.things if world.PLACES[thing.cell] in q.text]
            expected = {
                "exists": lambda: f"Yes, {world.PLACES[a.cell]}" if a else "No",
                "what": lambda: world.texts.phrase(here[0]) if here else "nothing",
                "colour": lambda: a.colour, "number": lambda: world.NUMBERS[a.number],
                "place": lambda: world.PLACES[a.cell], "scene": lambda: "a " + scene.type,
                "comparison": lambda: "Yes" if {
                    "left": a.cell % 3 < b.cell % 3, "right": a.cell % 3 > b.cell % 3,
                    "above": a.cell // 3 < b.cell // 3, "below": a.cell // 3 > b.cell // 3,
                    "more": a.number > b.number,
                }[re.search("left|right|above|below|more", q.text)[0]] else "No",
            }[q.topic]()
            right = world.texts.capital(expected) + "."
            assert q.answer == right and world.answer_is_right(q, right)


def test_world_yes_and_no_are_balanced_and_half_of_the_absent_are_typical():
    rng, scenes = random.Random(0), [world.make_scene(seed) for seed in range(2000)]
    exists, comparison = ([(scene, world.question(scene, topic, rng)) for scene in scenes]
                          for topic in ("exists", "comparison"))
    more = [(scene, q) for scene, q in comparison if "more" in q.text]  # balanced here as well
    for asked, deviation in ((exists, 0.04), (comparison, 0.04), (more, 0.1)):
        assert np.mean([q.answer == "No." for _, q in asked]) == pytest.approx(0.5, abs=deviation)
    typical = [any(re.search(rf"\b{kind}\b", q.text) for kind in world.SCENES[scene.type])
               for scene, q in exists if q.answer == "No."]
    assert 0.5 < np.mean(typical) < 0.65  # half by design, and some of the random half


@pytest.mark.parametrize("topic, truth, answer, right", [
    ("colour", "Red.", "it is red", True), ("colour", "Red.", "Red or blue.", False),
    ("number", "Two.", "two dogs. And one cat.", True), ("number", "One.", "There is a dog.", True),
    ("place", "On the left.", "It is on the left.", True),
    ("place", "On the left.", "On the right", False), ("exists", "No.", "Yes.", False),
    ("exists", "Yes, on the left.", "yes", True), ("exists", "No.", " No, there is no cat.", True),
    ("exists", "No.", "I know no", False), ("what", "Nothing.", "nothing", True),
    ("what", "Two red cars.", "There are two red cars", True), ("comparison", "No.", "", False),
    ("what", "Two red cars.", "A red car.", False), ("scene", "A park.", "This is a park", True)])
def test_world_short_answers_are_scored_leniently(topic, truth, answer, right):
    assert world.answer_is_right(world.Question("?", truth, topic), answer) is right


def test_world_evaluation_wordings_are_unseen_but_their_words_are_not():
    vocabulary = lambda prompts: set(re.findall(r"\w+", " ".join(prompts).lower()))
    train, held_out = world.DESCRIBE_PROMPTS_TRAIN, world.DESCRIBE_PROMPTS_EVAL
    assert not set(train) & set(held_out) and vocabulary(held_out) <= vocabulary(train)
    train, held_out = world.QUESTION_PROMPTS_TRAIN, world.QUESTION_PROMPTS_EVAL
    assert set(train) == set(held_out) == set(world.TOPICS) | {"more"}
    assert all(not set(train[topic]) & set(held_out[topic]) for topic in train)
    assert vocabulary(sum(held_out.values(), ())) <= vocabulary(sum(train.values(), ()))


def test_world_feedback_stops_where_nothing_is_false(tmp_path, monkeypatch):
    monkeypatch.setattr(feedback, "answers", lambda *given, samples, **_:
                        ["Hi."] * len(given[3]) * samples)
    for collect, phrase in ((feedback.corrections, "24 completions contained a hallucination"),
                            (feedback.rankings, "24 pairs of completions differed in merit")):
        with pytest.raises(ValueError, match=f"only 0 of {phrase}"):
            collect(None, None, pretraining.WORLD_IMAGES, tmp_path, 1, 0)


@pytest.fixture
def world_start(tiny_world, tokenizer, tmp_path):  # with a model that may be changed
    select_trainable(model := copy.deepcopy(tiny_world))
    return Start(config.Run(seed=0), model, tokenizer, IMAGES, tmp_path)


def world_rows(source, steps):
    """(step, scene, prompt, example) of every row of the task's steps."""
    scenes = {f"scene {scene.seed}": scene for scene in source.scenes}
    return [(step, scenes[row.name], source.tokenizer.decode(row.prompt), row)
            for step in range(steps) for row in source.examples(step)]


def facts_in(request):
    """The facts of a reward request, without the verdicts between them."""
    facts = re.search("Facts: (.*?)[.]", request)
    return re.sub("; (Yes|No) ", "; ", facts[1]).split("; ") if facts else []


@pytest.mark.parametrize("kind", [pretraining.Tower, pretraining.Base, pretraining.RMInit])
def test_world_algorithms_train_their_part_of_the_model(world_start, kind):
    decoder, is_tower = world_start.model.decoder, kind is pretraining.Tower
    layers = len(decoder.layers) + 2 * (kind is pretraining.RMInit)
    attention, factor = decoder.layers[0].self_attn, 0.5 if kind is pretraining.RMInit else 1.0
    scores = attention.q_proj.weight.T @ attention.k_proj.weight * factor ** 2
    algorithm = kind(world_start, kind.Config(batch_size=6, micro_batch=4, steps=9), None)
    assert algorithm.steps == 9 and algorithm.measure(None, None) is None
    torch.testing.assert_close(attention.q_proj.weight.T @ attention.k_proj.weight, scores)
    weights = {n: w for n, w in algorithm.modules.named_parameters() if w.requires_grad}
    assert all(("tower" in n or "readout" in n) == is_tower for n in weights) and len(weights) > 9
    optimizer, losses = torch.optim.AdamW(weights.values(), 1e-2), []
    for _ in range(8):
        batches = algorithm.batches(0)
        total = sum(map(algorithm.size, batches))
        loss = sum(algorithm.loss(b)[0] * algorithm.size(b) / total for b in batches)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [len(batch.names) for batch in batches] == [4, 2] and losses[-1] < 0.9 * losses[0]
    assert len(decoder.layers) == layers and decoder.layers[-1].mlp.down_proj.weight.any()


def test_world_labels_name_every_cell_and_the_tower_learns_them(world_start, monkeypatch):
    kinds, colours, numbers, setting = labels = world.labels(PARK)
    assert [i for i in range(9) if kinds[i]] == [0, 4, 8] and numbers == [2, 0, 0, 0, 1, 0, 0, 0, 3]
    assert (kinds[8], colours[8]) == (2, 2) and [*world.SCENES][setting] == "park"  # bus, green
    monkeypatch.setattr(world, "make_scene", lambda name: PARK)
    tower = pretraining.Tower(world_start, pretraining.TowerConfig(batch_size=2), None)
    (batch,) = tower.batches(3)
    *things, cell, setting = (label[1].tolist() for label in batch.labels)
    assert cell == list(range(9)) and (*things, setting) == labels  # three patches a side
    assert batch.names == ["tower 0 6", "tower 0 7"] and batch.pixels.shape == (2, 3, 12, 12)


def test_world_fresh_model_trains_its_tokenizer_once(tmp_path, monkeypatch):
    texts = list(pretraining.world_texts(20))
    monkeypatch.setattr(pretraining, "world_texts", lambda: iter(texts))
    path = tmp_path / "new" / "tokenizer.model"
    model, tokenizer, images = pretraining.fresh_model(path, 3)
    assert model.config == pretraining.world_model(tokenizer) and images.size == 72
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    monkeypatch.setattr(pretraining, "world_texts", None)  # not needed again
    same, other = (pretraining.fresh_model(path, seed)[0].head.weight for seed in (3, 4))
    assert same.equal(model.head.weight) and not same.equal(other)


def test_world_conversations_are_noisy_descriptions_and_true_answers(world_start):
    source = pretraining.ConversationTask(
        world_start, pretraining.BaseConfig(batch_size=8, steps=3))
    decode, verdicts = source.tokenizer.decode, set()
    for _, scene, prompt, example in world_rows(source, 3):
        turns = []
        for tokens, weight in (vars(response).values() for response in example.responses):
            given = weight.count(0)
            assert weight == [0] * given + [1] * (len(tokens) - given) and tokens[-1] == 2  # </s>
            turns.append((decode(tokens[:given]), decode(tokens[given:])))
        assert len(turns) == 13 and prompt.endswith("USER: " + "<image>" * 9)
        assert turns[0][0].strip().removesuffix(" ASSISTANT:") in world.DESCRIBE_PROMPTS_TRAIN
        assert turns[0][1] == world.annotate(scene, Random(f"annotator {scene.seed}"))
        for request, verdict in turns[11:]:
            sentence, facts = re.split("ASSISTANT:|USER:", request)[1], facts_in(request)
            assert verdict == ("No." if world.hallucinations(scene, sentence) else "Yes.")
            assert set(facts) in (set(), set(world.facts(scene)))
            verdicts.add((verdict, bool(facts)))
    assert len(verdicts) == 4
    features = world.tasks.encode_scenes(world_start.model, source.scenes[:1], world_start.images)
    torch.testing.assert_close(source.features[:1], features)


def test_world_verification_reads_then_compares_then_gives_true_verdicts(world_start):
    config = pretraining.RMInitConfig(batch_size=20, steps=12)  # four of each
    words = tokenizer_file.Tokenizer(ROOT / "world" / "base" / "tokenizer.model")
    source = world.tasks.VerificationTask(replace(world_start, tokenizer=words), config)
    decode, captions = source.tokenizer.decode, lambda scene: set(world.facts(scene))
    kinds_of = lambda facts: {kind for fact in facts for kind in world.mentions(fact)}
    as_facts = lambda answer: {  # a description's sentences, worded as captions
        re.sub(" (there (is|are)|you (can )?see) ", ": ", sentence.strip().lower())
        for sentence in answer.split(".") if world.mentions(sentence)}
    sizes, seen, verdicts = set(), set(), [[] for _ in range(4)]  # by number of errors
    too_much, twice, most = 0, 0, [0] * 12  # facts that a false answer states, by step
    for step, scene, prompt, example in world_rows(source, 12):
        for response in example.responses:
            answer, request = decode(response.tokens).split("USER:")
            facts, truth = facts_in(request), captions(scene)
            if example.image is None:
                answer = prompt.split("ASSISTANT:")[1]
            stated = as_facts(answer)
            compared = {fact for fact in facts or truth if "picture" not in fact}
            errors = len(kinds_of(stated ^ compared))
            too_much += compared < stated
            twice += len(stated) > len(kinds_of(stated))
            learned = lambda weight: [decode([token]) for token, its_weight in zip(
                response.tokens, response.weight) if its_weight == weight]
            if step < 4:
                assert example.image is None and set(facts) <= truth
                things = kinds_of(answer.split(";") if ";" in answer else stated)
                assert things == kinds_of(facts) and not world.hallucinations(scene, answer)
                assert sorted(world.NOUNS[word] for word in learned(4)) == sorted(things)
                assert set(learned(1)) <= {*world.COLOURS, "a", "two", "three"}
                assert "left" not in learned(1) and len(example.responses) == 3
                sizes.add(len(things))
                continue
            assert example.image is None or set(facts) in (set(), truth)
            fact_by_fact = "ASSISTANT:" not in request
            ends = re.findall("[;.]", "".join(learned(0.25)))
            if fact_by_fact:
                wanted = ["Yes" if "picture" in fact or fact in stated else "No" for fact in facts]
                assert learned(1) == wanted and len(ends) == wanted.count("Yes")
            else:
                assert not learned(1) and not ends
                wanted = learned(5)
                verdicts[min(errors, 3)].append(wanted == ["Yes"])
            assert step >= 8 or fact_by_fact and example.image is None
            if "No" in wanted and fact_by_fact:
                most[step] = max(most[step], wanted.count("Yes"))
            seen.add((fact_by_fact, example.image is None, bool(facts), wanted[-1]))
    assert 0.8 < np.mean(verdicts[0]) < 1 and np.mean(verdicts[3]) < 0.25  # graded by errors
    assert 0.2 < np.mean(verdicts[1]) < 0.55 and too_much > 9 and twice > 9
    first, *rest = PARK.things
    other = replace(first, colour=next(c for c in world.COLOURS if c != first.colour))
    wrong = replace(PARK, things=(other, *rest))  # one error, though two things differ
    verdicts = [source.verdict([], world.facts(PARK), wrong, PARK, Random(i)) for i in range(400)]
    said_yes = np.mean([decode(each.tokens[-1:]) == "Yes" for each in verdicts])
    assert said_yes == pytest.approx(0.9 * 0.4, abs=0.1)
    habitual = [source.reported(PARK, Random(i)) for i in range(60)]
    versions = [version for i, report in enumerate(habitual)
                for version in source.versions(PARK, 1.0, world.extended, report, Random(i))]
    other = [version for version in versions if version != PARK]
    assert 0.4 < len(other) / len(versions) < 0.6
    assert 0.3 < np.mean([version in habitual for version in other]) < 0.6
    for field in ("cell", "kind"):  # lookalikes in which nothing else is exchanged
        rest = lambda scene: {(t.colour, t.number, t.cell if field == "kind" else t.kind)
                              for t in scene.things}
        assert 0.05 < np.mean([rest(version) == rest(PARK) for version in other]) < 0.3
    assert 0.05 < np.mean([set(each.things) > set(PARK.things) for each in other]) < 0.3
    assert most[4] <= 2 < most[7]  # from lookalikes that differ in all to those that hardly do
    assert min(sizes) == 2 and len(sizes) > 2 and len(seen) == 10  # every possible combination
    assert all(has_facts or not (each or text) for each, text, has_facts, _ in seen)
    later = replace(config, reading=0.0, comparing=0.0)
    source = world.tasks.VerificationTask(replace(world_start, tokenizer=words), later)
    assert any(row.image is not None for row in source.examples(0))


# ======================================================================================= model.py


def random_pairs(*shared):
    """Pairs with so many tokens in common; the second has no image."""
    return [random_example(i, i != 1, (5 + i, 8 - i), common) for i, common in enumerate(shared)]


REFERENCE = {f"row {i}": [-3.1 - i / 7, -3.5 + i / 9] for i in range(4)}


def gradients(loss, model):
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(weights, torch.autograd.grad(loss, weights.values(), materialize_grads=True)))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_packed_branches_equal_separate_sequences(kv_heads, tmp_path):
    """The one attention rule: each response scores and teaches as it does alone."""
    model = make_model(replace(TEXT, num_key_value_heads=kv_heads))
    examples = random_pairs(0, 0, 3, 4)
    algorithm = make_ddpo(
        model, examples, tmp_path, REFERENCE, batch_size=4, beta=0.5, anchor=0.0)
    (batch,) = algorithm.batches(0)
    rows = [next(row for row in examples if row.name == name) for name in batch.names]
    responses = [(row, response) for row in rows for response in row.responses]
    alone = [logp_alone(model, *each) for each in responses]
    torch.testing.assert_close(model.response_logp(batch), torch.cat(alone), atol=1e-5, rtol=0)
    weights = [torch.tensor(response.weight) for _, response in responses]
    scores = torch.stack([(logp * w).sum() / w.sum() for logp, w in zip(alone, weights)])
    references = torch.tensor([REFERENCE[row.name] for row in rows]).T
    loss = ddpo.preference_loss(scores[0::2], scores[1::2], *references, 0.5)[0].mean()
    packed, _ = algorithm.loss(batch)
    torch.testing.assert_close(packed, loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        gradients(packed, model), gradients(loss, model), atol=1e-5, rtol=1e-5)


def test_padding_and_siblings_change_nothing(tiny):
    one, two = random_example(0), random_example(1, lengths=(30, 3))
    other = replace(one, responses=[one.responses[0], Response([9, 9, EOS], [1.0] * 3)])
    alone, sibling = (tiny.response_logp(data.collate_for(tiny, [row])) for row in (one, other))
    both = data.collate_for(tiny, [one, two])
    for filler in (PAD, 7):  # whatever stands in the padding
        both.tokens[both.branch == -1] = filler
        found = tiny.response_logp(both)[: len(alone)]
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(sibling[:-3], alone[: len(sibling) - 3], atol=1e-5, rtol=0)


def test_attention_mask_by_hand():
    mask = attention_mask(torch.tensor([[0, 0, 1, 2, 2, -1]]))[0, 0].int().tolist()
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
    norm, plain = lean.RMSNorm(24, eps=1e-3), nn.RMSNorm(24, eps=1e-3)
    with torch.no_grad():
        plain.weight.copy_(norm.weight.normal_())
    x, upstream = torch.randn(2, 5, 24, requires_grad=True), torch.randn(2, 5, 24)
    ours, expected = norm(x), plain(x)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, (x, norm.weight), upstream),
                               torch.autograd.grad(expected, (x, plain.weight), upstream),
                               atol=1e-5, rtol=1e-5)


def test_images_are_pixels_or_cached_features_and_fit_their_tokens(tiny):
    pixels = torch.randn(2, 3, 12, 12)
    tokens = torch.tensor([[1] + [IMAGE] * PATCHES + [5, 6]] * 2)
    torch.testing.assert_close(tiny(pixels, tokens), tiny(tiny.image_features(pixels), tokens))
    with pytest.raises(ValueError, match="16 image tokens for 18 image features"):
        tiny(pixels, tokens[:, 2:])


# ------------------------------------------------------------------------------- the step of DDPO


class Waits(TorchFunctionMode):
    """Lists the calls that would wait for a GPU."""

    CALLS = {"item", "tolist", "nonzero", "numpy", "cpu", "unique", "__bool__", "__int__",
             "__float__", "__index__"}

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, arguments=(), options=None):
        name = getattr(function, "__name__", "")
        mask = name in ("__getitem__", "__setitem__") and any(
            isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in arguments[1:2])
        self.found += [name] if mask or name in self.CALLS else []
        return function(*arguments, **(options or {}))


def test_the_fused_loss_waits_for_a_gpu_once(tiny, tmp_path):
    """For the check of its results: where responses begin is known since `collate`."""
    step = ["__bool__", "__bool__", "tolist"]  # image tokens, on a CPU alone; results; metrics
    pairs = random_pairs(0, 3, 1)
    algorithm = make_ddpo(tiny, pairs, tmp_path, REFERENCE, batch_size=3, fused="on")
    (batch,) = algorithm.batches(0)
    states, head = tiny.response_states(batch), tiny.head
    given = batch.target, batch.weight, batch.group, batch.reference, 0.5, True, 1.0
    results = []
    for bounds, calls in ((batch.bounds, ["__bool__"]), (None, ["tolist", "__bool__"])):
        with Waits() as waits:
            results.append(head(states, partial(kernels.ddpo_loss, bounds=bounds), *given))
        assert waits.found == calls
    assert all(map(torch.equal, *results))
    with Waits() as waits:
        algorithm.loss(batch)
    assert waits.found == step


@pytest.mark.parametrize("normalize", [True, False])
def test_fused_loss_is_the_plain_one(normalize, tiny, tmp_path):
    """Loss, metrics and gradients of the two sides of `--fused`."""
    plain, fused = (make_ddpo(tiny, random_pairs(0, 3, 1), tmp_path, REFERENCE, batch_size=3,
                              beta=0.5, normalize=normalize, fused=each) for each in ("off", "on"))
    (batch,) = plain.batches(0)
    (loss, shown), (same_loss, same) = plain.loss(batch), fused.loss(batch)
    torch.testing.assert_close(same_loss, loss)
    torch.testing.assert_close(
        gradients(same_loss, tiny), gradients(loss, tiny), atol=1e-5, rtol=1e-5)
    assert same == pytest.approx(shown, abs=1e-6)
    scores = ddpo.response_scores(
        tiny.response_logp(batch), batch.weight, batch.group, batch.groups, normalize)
    chosen, rejected = (0.5 * (scores - batch.reference)).view(-1, 2).T  # beta
    assert shown["rewards/margins"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-6)
    assert abs(shown["rewards/margins"]) > 1e-3 and shown["padding"] == batch.padding
    assert shown["rewards/accuracies"] == (chosen > rejected).float().mean().item()
    assert shown["logps/rejected"] == pytest.approx(scores[1::2].mean().item(), abs=1e-6)


@pytest.mark.parametrize("fused", ["off", "on"])
def test_loss_under_autocast(fused, tiny, tmp_path):
    """Half-precision products, float32 weights: the head converts what its function is given."""
    algorithm = make_ddpo(tiny, random_pairs(2, 0), tmp_path, REFERENCE, batch_size=2, fused=fused)
    (batch,) = algorithm.batches(0)
    exact, _ = algorithm.loss(batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = algorithm.loss(batch)
        assert tiny.response_logp(batch).dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), abs=0.02)
    ours, expected = (gradients(each, tiny)["head.weight"] for each in (loss, exact))
    assert ours.dtype == torch.float32 and (ours - expected).norm() / expected.norm() < 0.05


def test_head_hands_its_weight_to_any_function():
    head, hidden = Head(8, 5, bias=False), torch.randn(3, 8)
    scale = lambda hidden, weight, factor: factor * hidden @ weight.T
    torch.testing.assert_close(head(hidden, scale, 2.0), 2 * head(hidden))
    with torch.autocast("cpu", torch.bfloat16):
        assert head(hidden, scale, 1.0).dtype == torch.bfloat16


def test_flops_of_a_step_at_7b():
    """Real shapes of LLaVA-1.5-7B on the meta device, full fine-tune: the work without numbers.

    Ours: trunk once, features of the frozen tower and reference scores cached. The usual way:
    chosen and rejected apart, with the tower, all logits, and a live reference.
    """
    with torch.device("meta"):
        model = LLaVA(LLaVAConfig())
    select_trainable(model)
    vision, prompt = model.config.vision, [1] + [model.config.image_token] * 576 + [5] * 39
    responses = [Response([token] * 100, [1.0] * 100) for token in (3, 4)]
    features = torch.zeros(vision.patches, vision.hidden_size)
    batch = data.collate_for(model, [Example("row", features, prompt, responses)]).to("meta")
    assert batch.tokens.shape == (1, 816)
    reference = torch.zeros(2, device="meta")
    pixels = torch.empty(2, 3, 336, 336, device="meta")
    tokens = torch.empty(2, 716, dtype=torch.long, device="meta")

    def flops(loss):  # of the forward pass, and of both
        with FlopCounterMode(display=False) as counter:
            value = loss()
            forward = counter.get_total_flops()
            value.backward()
        return forward, counter.get_total_flops()

    def fused():
        return model.head(model.response_states(batch), kernels.ddpo_loss, batch.target,
                          batch.weight, batch.group, reference, 0.5)[0]

    def plain():
        scores = ddpo.response_scores(model.response_logp(batch), batch.weight, batch.group, 2)
        return ddpo.preference_loss(*scores[:, None], *reference[:, None], 0.5)[0].sum()

    def usual():
        logp = model.logits(pixels, tokens)[:, :-1].log_softmax(-1)
        return logp.gather(-1, tokens[:, 1:, None]).sum()

    (_, step), (once, unfused), theirs = flops(fused), flops(plain), sum(flops(usual))
    assert 1 < unfused / step < 1.005  # one more product with the vocabulary matrix
    assert theirs / step > 2.3
    assert theirs / (step + once / 3) > 2  # with the reference pass, over three epochs


# ================================================================================== generation.py


def short_prompts(count):
    return [torch.tensor([1, *range(5, 8 + i % 3), 20 + i]) for i in range(count)]


def completions(*given, **options):
    return [tokens.tolist() for tokens in generate(*given, **options)]


def test_cached_generation_equals_recomputation(tiny):
    images = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    prompts = [torch.tensor([1] + [IMAGE] * PATCHES + list(range(5, 5 + n))) for n in (1, 6, 3)]
    for image, prompt, found in zip(images, prompts, completions(tiny, images, prompts, 25)):
        expected = []
        while len(expected) < 25 and EOS not in expected:
            tokens = torch.cat([prompt, torch.tensor(expected, dtype=torch.long)])
            logits = tiny.logits(image[None], tokens[None])[0, -1].detach()
            logits[[IMAGE, PAD]] = -torch.inf
            expected.append(int(logits.argmax()))
        assert found == expected


def test_samples_are_reproducible_and_follow_the_model(tiny):
    draw = lambda *given: completions(tiny, None, [torch.tensor([1, 7, 8])], *given)
    first, again = (draw(12, 1.0, 4, torch.Generator().manual_seed(5)) for _ in range(2))
    assert first == again and len({*map(tuple, first)}) > 1
    assert all(IMAGE not in tokens and PAD not in tokens for tokens in first)
    greedy = draw(12, 0.0, 3)
    assert greedy[0] == greedy[1] == greedy[2]
    drawn = torch.tensor(draw(1, 1.0, 4000, torch.Generator().manual_seed(0))).flatten()
    logits = tiny.logits(None, torch.tensor([[1, 7, 8]]))[0, -1].detach()
    logits[[IMAGE, PAD]] = -torch.inf
    shares = torch.bincount(drawn, minlength=60) / 4000
    assert (shares - logits.softmax(-1)).abs().max() < 0.03


def test_a_token_is_where_the_draw_falls():
    logits = torch.log(torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])).expand(1, 4, -1)
    draws = torch.tensor([[0.0, 0.25, 0.9, 1 - 2**-24]])  # 1 - draw: 1, 0.75, 0.1, the least
    assert generation.sample_token(logits, 1.0, draws).tolist() == [[4, 4, 1, 1]]
    assert generation.sample_token(logits, 0.0, None).tolist() == [[3, 3, 3, 3]]


def test_sampled_tokens_can_be_trained_on(tiny):
    """Decoding runs in inference mode, whose tensors autograd refuses; its answers are ordinary."""
    (answer,) = generate(tiny, None, [torch.arange(3, 9)], 4)
    assert torch.is_grad_enabled() and not answer.is_inference()
    tiny.logits(None, answer[None]).sum().backward()
    assert tiny.decoder.embed_tokens.weight.grad is not None


def test_generation_fits_the_context_and_autocast(tiny):
    with pytest.raises(ValueError, match="leaves no room"):
        generate(tiny, None, [torch.ones(128, dtype=torch.long)], 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(1 <= len(tokens) <= 5 for tokens in generate(tiny, None, short_prompts(3), 5))


def test_finished_rows_are_dropped_and_change_nothing(tiny, monkeypatch):
    """Every answer is what the prompt alone would be given, also when most others have ended."""
    prompts, kept, keep = short_prompts(8), [], generation.Decoding.keep
    monkeypatch.setattr(generation.Decoding, "keep",
                        lambda self, alive: (kept.append(len(alive)), keep(self, alive)))
    each_alone = lambda: [completions(tiny, None, [prompt], 40)[0] for prompt in prompts]
    # end-of-sequence becomes a token that most answers contain early and some late or never
    free = each_alone()
    common = max(range(3, IMAGE), key=lambda t: sum(t in answer for answer in free))
    tiny.config = replace(tiny.config, eos_token=common)
    alone = each_alone()
    assert len({len(answer) for answer in alone}) > 1 and not kept
    assert completions(tiny, None, prompts, 40) == alone and kept


def test_samples_of_a_prompt_do_not_depend_on_its_neighbours_end(tiny):
    draw = lambda: completions(
        tiny, None, short_prompts(4), 30, 1.0, 2, torch.Generator().manual_seed(3))
    tiny.config = replace(tiny.config, eos_token=-1)  # no end
    longest = draw()
    tiny.config = replace(tiny.config, eos_token=longest[0][2])
    for before, after in zip(longest, draw()):
        both = min(len(before), len(after))
        assert after[:both] == before[:both]


def test_streamed_tokens_are_the_answers(tiny):
    steps, prompts = [], short_prompts(3)
    found = completions(tiny, None, prompts, 12, on_token=lambda t: steps.append(t.clone()))
    streamed = torch.stack(steps, dim=-1)  # (3, 1, steps)
    assert [row[row != PAD].tolist() for row in streamed[:, 0]] == found


def test_a_long_prompt_does_not_cut_its_neighbours_and_nan_is_refused(tiny):
    context = tiny.config.text.max_position_embeddings
    prompts = [torch.tensor([1, 7, 8]), torch.full((context - 3,), 7)]
    both = completions(tiny, None, prompts, 12)
    assert both == [completions(tiny, None, [prompt], 12)[0] for prompt in prompts]
    assert len(both[1]) <= 3 < len(both[0])
    broken = copy.deepcopy(tiny)
    broken.decoder.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="the model computes NaN or infinity"):
            generate(broken, None, prompts[:1], 4, temperature)


def test_compiled_decoding_is_one_graph_for_all_steps(tiny, monkeypatch):
    """Static shapes: a second batch and later steps meet the graph that the first step made."""
    plain, graphs = completions(tiny, None, short_prompts(3), 12, samples=2), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(generation.decode, backend=count, fullgraph=True, dynamic=False)
    monkeypatch.setattr(generation, "compiled", lambda: step)
    for _ in range(2):
        assert completions(tiny, None, short_prompts(3), 12, samples=2, compiled=True) == plain
    assert len(graphs) == 1


def test_decoding_compiles_itself_where_that_pays(tiny_world, tokenizer, monkeypatch, tmp_path):
    """On a GPU; here the step stays eager, but its slots and masks are those of compiled steps."""
    cuda, cpu = torch.device("cuda:0"), torch.device("cpu")
    devices = (cuda, 4096), (cuda,), (cuda, 9), (cpu,)
    assert [generation.worth_compiling(*each) for each in devices] == [True, True, False, False]
    picture = world.draw(world.make_scene(0), 12)
    ask = lambda: generation.answers(tiny_world, tokenizer, IMAGES, [picture] * 3, ["Why?"] * 3, 4,
                                     batch_size=2)
    roll = lambda: on_policy(tiny_world, tokenizer, tmp_path).roll_out(0, 0).tokens
    eager, asked = [ask(), roll()], []
    monkeypatch.setattr(generation, "compiled", lambda: generation.decode)
    for module in (generation, rollouts):
        monkeypatch.setattr(module, "worth_compiling", lambda *given: asked.append(given) or True)
    steps, step = [], generation.compiled_decode
    monkeypatch.setattr(generation, "compiled_decode", lambda cache: steps.append(1) or step(cache))
    assert [ask(), roll()] == eager and len(steps) == 3
    assert asked == [(cpu, 6), (cpu,)]  # one batch and a half of four steps


def test_answers_keep_the_order_of_the_questions(tiny_world, tokenizer, monkeypatch):
    setup = (tiny_world, tokenizer, IMAGES)
    ask = lambda images, texts, **more: generation.answers(*setup, images, texts, 8, **more)
    images = [world.draw(world.make_scene(i), 12) for i in range(5)]
    texts = ["Is there a car?", "What can you see in the picture?", "Describe the picture.",
             "Where is the dog?", "In this picture, is the cup above the pot?"]
    apart = [ask([image], [text])[0] for image, text in zip(images, texts)]
    features = generation.image_features(tiny_world, IMAGES, images, batch_size=3)
    assert ask(images, texts, batch_size=2) == ask(features, texts) == apart
    with pytest.raises(ValueError, match="5 images for 1 questions"):
        ask(images, ["Why?"])
    shared = [images[i] for i in (0, 1, 0, 1, 0)]  # the same pictures several times
    apart_too = [ask([image], [text])[0] for image, text in zip(shared, texts)]
    opened, pixels_of = [], generation.pixels_of
    monkeypatch.setattr(generation, "pixels_of",
                        lambda found, how: opened.append(len(found)) or pixels_of(found, how))
    assert ask(shared, texts) == ask(shared, texts, batch_size=3) == apart_too != apart
    assert opened == [2, 1, 1]  # batches of five, and of three and two
    with pytest.raises(ValueError, match="differ before an image's end"):
        ask(shared, [f"{text} <image>" for text in texts])
    draw = lambda seed: ask(images[:2], texts[:2], temperature=1.0, samples=3, seed=seed)
    assert len(draw(0)) == 6 and len(set(draw(0))) > 3 and draw(0) == draw(0) != draw(1)
    written = []
    text = generation.stream(*setup, images[0], f"<image>\n{texts[0]}", 8, write=written.append)
    assert text == "".join(written).strip() == apart[0] != apart[1] and len(written) > 3


# ======================================================================================== data.py


def test_tokenizer_is_deterministic_and_lossless(tokenizer, tmp_path):
    tokenizer_file.train_tokenizer(pretraining.world_texts(40), tmp_path / "again.model", 700)
    assert (tmp_path / "again.model").read_bytes() == tokenizer.model_proto
    for text in ("", "A red car.", "  two  spaces", "naïve 象 🙂\nnew line", "\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_common_runs_are_difflibs_and_take_bounded_time():
    rng = random.Random(0)
    for _ in range(500):
        kinds, least = rng.choice([2, 3, 30]), rng.choice([1, 3])
        one, two = ([rng.randrange(kinds) for _ in range(rng.randrange(30))] for _ in "ab")
        two[rng.randrange(len(two) + 1):0] = one[: rng.randrange(20)]
        theirs = difflib.SequenceMatcher(None, one, two, autojunk=False).get_matching_blocks()
        assert segments.common_runs(one, two, least) == [run for run in theirs if run.size >= least]
    loop = [1, 2, 3, 4, 5] * 800
    started = time.perf_counter()
    with pytest.raises(ValueError, match="repeat themselves too often"):
        segments.segment_mask(loop, [x for i, x in enumerate(loop) if i % 97])
    assert time.perf_counter() - started < 30


@pytest.mark.parametrize("chosen,rejected,min_match,replacements_only,left,right", [
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
])
def test_segment_mask(chosen, rejected, min_match, replacements_only, left, right):
    """`left` and `right` are the corrected tokens of either side."""
    tokens = [list(map(ord, text)) for text in (chosen, rejected)]
    masks = segments.segment_mask(*tokens, min_match, replacements_only)
    for text, mask, corrected in zip((chosen, rejected), masks, (left, right)):
        assert "".join(char for char, m in zip(text, mask, strict=True) if m) == corrected


def test_collate_by_hand():
    one = Example("a", None, [1, 5, 6], [Response([7, 8, 2], [1.0, 5.0, 1.0]),
                                         Response([7, 9, 9, 2], [1.0, 5.0, 5.0, 1.0])])
    two = Example("b", None, [1], [Response([4, 2], [0.0, 1.0])])
    batch = collate([one, two], 0, 16)
    # "7" begins both responses of the first row and moves into its trunk
    assert batch.tokens.tolist() == [[1, 5, 6, 7, 8, 2, 9, 9, 2], [1, 4, 2, 0, 0, 0, 0, 0, 0]]
    assert batch.branch.tolist() == [[0, 0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, -1, -1, -1, -1, -1, -1]]
    assert batch.position[0].tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6]
    # what predicts: the last prompt token, the trunk's last for either branch, then the branch
    assert batch.source.tolist() == [2, 3, 4, 2, 3, 6, 7, 9 + 1]
    assert batch.target.tolist() == [7, 8, 2, 7, 9, 9, 2, 2]
    assert batch.weight.tolist() == [1, 5, 1, 1, 5, 5, 1, 1]
    assert batch.group.tolist() == [0, 0, 0, 1, 1, 1, 1, 2] and batch.groups == 3
    assert batch.padding == pytest.approx(6 / 18) and batch.bounds == [0, 3, 7, 8]
    assert [data.row_length(each) for each in (one, two)] == [9, 3]


@pytest.mark.parametrize("prompt, tokens, weight, phrase", [
    (10, 7, 1.0, "row 7.*17 tokens.*context holds 16"), (1, 1, 0.0, "row 7.*no token to learn")])
def test_collate_never_cuts(prompt, tokens, weight, phrase):
    example = Example("row 7", None, [1] * prompt, [Response([5] * tokens, [weight] * tokens)])
    with pytest.raises(DataError, match=phrase):
        collate([example], 0, 16)


@pytest.mark.parametrize("count, batch", [(100, 8), (64, 8), (5, 8), (101, 32)])
def test_epochs_show_every_row_once_and_depend_on_the_step_alone(count, batch):
    examples = [Example(i, None, [1] * (i % 23), []) for i in range(count)]
    config = ddpo.DDPOConfig(batch_size=batch, epochs=3)
    source, fresh, other = (data.Epochs(examples, config, seed, lambda each: len(each.prompt))
                            for seed in (0, 0, 1))
    names = lambda source, step: [example.name for example in source.examples(step)]
    assert source.steps == math.ceil(3 * count / batch)
    seen = [name for step in range(source.steps) for name in names(source, step)]
    for epoch in range(3):
        assert {*seen[epoch * count : (epoch + 1) * count]} == {*range(count)}
    assert names(fresh, source.steps - 1) == names(source, source.steps - 1)
    assert seen[:count] != seen[count : 2 * count] and names(other, 0) != names(source, 0)


def pairs_of_rlhf_v(trunk):
    """Responses of 64 words in the mean, log-normal with deviation 0.5, 1.35 tokens each."""
    rng = Random(0)
    lengths = [max(4, round(1.35 * 64 * rng.lognormvariate(-0.125, 0.5))) for _ in range(1400)]
    branch = lambda token, n: Response([token] * n, [1.0] * n)
    return [Example(f"row {i}", None, [1] * trunk, [branch(3, n + 1), branch(5, n + 4)])
            for i, n in enumerate(lengths)]


def pairs_of_the_world(tokenizer):
    """Noisy descriptions and their corrections."""
    for i in range(320):
        scene = world.make_scene(f"padding {i}")
        noisy = world.annotate(scene, Random(f"padding {i}"))
        pair = Pair(f"row {i}", None, "What is here?", world.correct(scene, noisy), noisy)
        yield Example(pair.name, None, *data.pair_tokens(pair, tokenizer, 0))


@pytest.mark.parametrize("micro_batch", [4, 8, 32])
@pytest.mark.parametrize("trunk", [616, 100, None])
def test_padding_of_an_epoch_is_below_a_tenth(tokenizer, trunk, micro_batch):
    """Behind an image of 576 tokens, behind a short prompt, and on the built-in world."""
    examples = pairs_of_rlhf_v(trunk) if trunk else [*pairs_of_the_world(tokenizer)]
    source = data.Epochs(examples, ddpo.DDPOConfig(epochs=1), 0)
    model = SimpleNamespace(config=LLaVAConfig())  # only its context is read
    slots = empty = 0
    for step in range(source.steps):
        for batch in data.micro_batches(model, source.examples(step), micro_batch):
            slots += batch.tokens.numel()
            empty += batch.padding * batch.tokens.numel()
    assert empty / slots < 0.1


# ------------------------------------------------------------------------ from records to examples


def joint(tokenizer, *rounds):
    """A whole conversation, each round tokenized at once, as the public code does."""
    ids = [tokenizer.bos_token]
    for text in rounds:
        ids += tokenizer.encode(text, eos=True)
    at = ids.index(tokenizer.image_token)
    return ids[:at] + [tokenizer.image_token] * PATCHES + ids[at + 1 :]


def test_a_conversation_is_the_joint_tokenization(tokenizer):
    turns = [("Is there a car?", "Yes, a red car."), (" And\n a bus? ", " No. "),
             ("Sure?", "\nYes")]
    talk = Conversation("row 1", b"x", turns)
    prompt, responses = data.conversation_tokens(talk, tokenizer, PATCHES)
    first = f"{data.SYSTEM} USER: <image>\nIs there a car? ASSISTANT: Yes, a red car."
    assert prompt + responses[0].tokens == joint(
        tokenizer, first, "USER:  And\n a bus?  ASSISTANT:  No. ", "USER: Sure? ASSISTANT: \nYes")
    batch = collate([Example("row 1", None, prompt, responses)], tokenizer.pad_token, 400)
    learnt = [t for _, answer in turns for t in tokenizer.encode(answer, eos=True)]
    assert batch.target.tolist() == learnt and batch.groups == 1  # every answer, no question
    # each learnt token is predicted by the slot before it
    torch.testing.assert_close(batch.tokens.flatten()[batch.source + 1], batch.target)
    prompt, _ = data.conversation_tokens(replace(talk, image=None), tokenizer, PATCHES)
    assert tokenizer.decode(prompt) == f"{data.SYSTEM} USER: Is there a car? ASSISTANT:"
    pair = Pair("row 1", b"x", "Sure?", "Yes.", "No.", turns[:1])  # with a history
    prompt, responses = data.pair_tokens(pair, tokenizer, PATCHES)
    assert prompt + responses[1].tokens == joint(tokenizer, first, "USER: Sure? ASSISTANT: No.")
    batch = collate([Example("row 1", None, prompt, responses)], tokenizer.pad_token, 400)
    assert batch.target.tolist() == responses[0].tokens + responses[1].tokens


def test_sft_learns_every_answer_of_mixed_rows(tiny_world, tokenizer, tmp_path):
    talks = (Conversation("a", b"x", [("What?", "A car."), ("And?", "A bus.")]),
             Conversation("b", None, [("Hello?", "Yes.")]))
    pixels = torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(0))
    examples = [Example(talk.name, talk.image and pixels,
                        *data.conversation_tokens(talk, tokenizer, PATCHES)) for talk in talks]
    batch = data.collate_for(tiny_world, examples)
    assert batch.images.shape == (1, 3, 12, 12)
    start = make_start(tiny_world, tokenizer, tmp_path)
    loss, _ = sft.SFT(start, sft.SFTConfig(), Data(examples)).loss(batch)
    learnt = [logp_alone(tiny_world, example, response)[torch.tensor(response.weight) > 0]
              for example in examples for response in example.responses]
    torch.testing.assert_close(loss, -torch.cat(learnt).mean())


# ---------------------------------------------------------------------------------------- dry run


@pytest.mark.parametrize("half", [False, True])  # bfloat16 products over float32 weights
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activation_estimate_is_near_what_autograd_keeps(checkpointing, half):
    text = TextConfig(100, 64, 176, 3, 4, 2, 256)
    model = make_model(text)
    model.decoder.gradient_checkpointing = checkpointing
    kept, weights = {}, {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    copied = {weight.shape for weight in model.parameters()}  # by autocast

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and not {tensor.shape, tensor.shape[::-1]} & copied:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(1, 200, 64, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        model.decoder(x, torch.arange(200)[None])
    size = lambda text, recompute: memory.activation_bytes(
        text, 200, 2 if half else 4, recompute, half)
    estimate = size(text, checkpointing)
    if checkpointing:  # the block that is computed again is kept in the backward pass only
        more = replace(text, num_hidden_layers=4)
        estimate -= size(more, False) - size(text, False)
    assert 0.9 < estimate / sum(kept.values()) < 1.1


def test_memory_estimate_counts_what_is_trained(tiny_world, tokenizer, tmp_path):
    model = copy.deepcopy(tiny_world)
    add_adapter(model, "a", 4, 8)
    trained = sum(weight.numel() for weight in select_trainable(model, "a"))
    total = sum(weight.numel() for weight in model.parameters())
    talk = Conversation("row 1", b"x", [("What?", "A car.")])
    example = Example("row 1", None, *data.conversation_tokens(talk, tokenizer, PATCHES))
    named = [("row 1", tmp_path / "a.png"), ("row 2", tmp_path / "a.png"), ("row 3", None)]
    text = memory.memory_estimate(model, sft.SFTConfig(), [example], named, 4)
    for part in (f"{total:,}, of which {trained:,} are trained",
                 f"gradients    {trained * 4 / 1000:.3g} kB",
                 f"optimizer    {trained * 8 / 1000:.3g} kB",
                 f"row of {len(example.prompt) + len(example.responses[0].tokens)} tokens",
                 f"{PATCHES * 16 * 4} bytes for 1 images, in memory"):
        assert part in text


@pytest.mark.parametrize("lora", [0, 64])
@pytest.mark.parametrize("gpus", [1, 8])
def test_memory_of_gpus_by_hand(gpus, lora):
    D, I, V, L = 4096, 11008, 32064, 32  # Vicuna-7B
    matrices = L * (4 * D * D + 3 * D * I) + V * D
    root = V * D + (2 * L + 1) * D + (1024 + D + 2) * D  # embedding, norms, projector
    tower, adapters = 303_507_456, L * lora * (4 * 2 * D + 3 * (D + I))
    found = memory.per_gpu(memory.SHAPES["7B"], gpus, lora, rows=2, recompute=True)
    if lora:
        trained, weights = 4 * adapters, 2 * tower + (2 * (matrices + root) + 4 * adapters) / gpus
        whole = 2 * root + 2 * 2 * 3 * D * I
    else:
        trained, weights = 4 * (matrices + root), 4 * (tower + (matrices + root) / gpus)
        whole = 2 * 4 * root + (2 * 2 + 2 + 4) * 3 * D * I
    if gpus == 1:  # nothing is gathered; autocast copies float32 matrices
        whole = 0 if lora else 2 * matrices
    assert found["weights"] == weights and found["whole"] == whole
    assert found["gradients"] == trained / gpus and found["optimizer"] == 2 * trained / gpus
    assert found["in all"] == sum(found[name] for name in found.keys() - {"in all"})
    shapes, settings = {"7B": memory.SHAPES["7B"]}, ddpo.DDPOConfig(micro_batch=2)
    lines = memory.memory_table(shapes, gpus, 64, settings).split("\n")
    row = next(line for line in lines if line.startswith(
        f"7B {'LoRA 64' if lora else 'full'}, recomputing"))
    assert row.split()[-1] == f"{found['in all'] / 1e9:.2f}" and "not measured" in lines[0]


@pytest.mark.parametrize("lora", [0, 4])
def test_memory_of_one_gpu_is_that_of_the_tensors(tokenizer, tmp_path, lora):
    run = config.Run(lora=lora, dtype="bfloat16")
    start = recipes.load_start(run, sft.SFTConfig(), sft.SFT, torch.device("cpu"), tmp_path)
    recipes.select_weights(start, sft.SFT)
    vision = start.model.config.vision
    talk = Conversation("row 1", b"x", [("What?", "A car.")])
    example = Example("row 1", torch.zeros(vision.patches, vision.hidden_size),
                      *data.conversation_tokens(talk, start.tokenizer, vision.patches))
    algorithm = sft.SFT(start, sft.SFTConfig(learning_rate=1e-5, steps=1), Data([example]))
    one = loop.Loop(algorithm, start, Data([example]))
    one.one_step()
    weights, bytes_of = list(start.model.parameters()), lambda of: sum(each.nbytes for each in of)
    moments = [value for optimizer in one.optimizers for each in optimizer.state.values()
               for key, value in each.items() if key != "step"]
    found = memory.per_gpu(start.model.config, 1, lora, rows=1, recompute=False)
    assert found["weights"] == bytes_of(weights)
    assert found["optimizer"] == bytes_of(moments) > 0
    assert found["gradients"] == bytes_of(w.grad for w in weights if w.grad is not None)


def test_bytes_are_readable():
    assert [*map(memory.readable, (999, 999_700, 25e8, 25e11))] == [
        "999 bytes", "1 MB", "2.5 GB", "2.5 TB"]


def test_memory_in_the_readme():
    readme = " ".join((ROOT / "README.md").read_text().split())
    for name, shape in memory.SHAPES.items():
        for kind, lora in (("LoRA", 64), ("full", 0)):
            one, eight = (memory.per_gpu(shape, gpus, lora, 4, recompute=True)["in all"] / 1e9
                          for gpus in (1, 8))
            assert f"{name} {kind} {one:.0f} / {eight:.0f}" in readme


def test_dry_run_prints_the_memory_of_gpus(run_train, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shown = run_train("--dry_run", "--gpus", 8)
    assert shown.count("\n") == 12 and "13B LoRA 64, recomputing" in shown
    assert not torch.utils.deterministic.fill_uninitialized_memory  # or each buffer is written
    shown = run_train("--dry_run", "--gpus", 2, "--lora", 8, "--model", recipes.SHIPPED["base"])
    assert "each of 2 GPUs" in shown and "base LoRA 8 " in shown and "7B" not in shown
    with pytest.raises(SystemExit):
        train.parse(["--gpus", "2"])
    assert "--gpus goes with --dry_run" in capsys.readouterr().err


def test_training_on_conversations(tiny_world, tokenizer, tmp_path, monkeypatch, run_train):
    monkeypatch.chdir(tmp_path)
    save_llava(tiny_world, tokenizer, IMAGES, Path("model"))
    Image.new("RGB", (20, 10), "red").save("ok.jpg")
    turns = lambda *texts: [{"from": ("human", "gpt")[i % 2], "value": text}
                            for i, text in enumerate(texts)]
    Path("rows.json").write_text(json.dumps([
        {"image": "ok.jpg", "conversations": turns("<image> What?", "A car.", "And?", "A bus.")},
        {"conversations": turns("Hello?", "Yes.")}]))
    monkeypatch.setattr(features, "LIMIT", 100)
    command = ("--algo", "sft", "--data", "rows.json", "--model", "model", "--batch_size", 2,
               "--steps", 2, "--device", "cpu", "--out", "out")
    shown = run_train(*command, "--dry_run")
    assert "{USER: And? ASSISTANT:}" in shown.replace("{ ", "{") and "activations" in shown
    run_train(*command)
    assert Path("out/model/model.safetensors").exists()
    assert not list(Path("out").glob("features.*"))  # gigabytes, of no more use


# ================================================================ formats: rows, images, features

GOOD = {"image": "ok.jpg", "question": "What?", "chosen": "A car.", "rejected": "A bus."}


def image_bytes(seed, kind="PNG", size=(20, 10)):
    """A picture that is different for every seed."""
    Image.new("RGB", size, (seed * 67 % 256, seed * 31 % 256, 200 - seed)).save(
        buffer := io.BytesIO(), kind)
    return buffer.getvalue()


@pytest.fixture
def image_folder(tmp_path):
    for seed, name in enumerate(("ok.jpg", "b.jpg")):
        (tmp_path / name).write_bytes(image_bytes(seed, "JPEG"))
    return tmp_path


def json_file(folder, content, name="rows.json"):
    files.write_atomic(folder / name, content)
    return folder / name


def jsonl_file(folder, *rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    return json_file(folder, b"\n".join(lines), "rows.jsonl")


def messages(*values, first="human"):
    speakers = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": speakers[i % 2], "value": value} for i, value in enumerate(values)]


def chat(*values, first="human", **changes):
    return {"image": "ok.jpg", "conversations": messages(*values, first=first), **changes}


def human_preference(*values, **changes):
    values = values or ("Where is it?\n<image>", "At home.", "What is it?", "to be replaced")
    return chat(*values, preference=2, output_1={"value": "A bus."},
                output_2={"value": "A car."}) | changes


user = lambda content: {"role": "user", "content": content}
assistant = lambda content: {"role": "assistant", "content": content}

GOOD_ROWS = {  # rows, and what becomes of the fields behind name and image
    read_pairs: [
        (GOOD, ("What?", "A car.", "A bus.", [])),
        ({**GOOD, "question": None, "prompt": "W?\n<image>"}, ("W?", "A car.", "A bus.", [])),
        (human_preference(), ("What is it?", "A car.", "A bus.", [("Where is it?", "At home.")])),
        (human_preference("<image> A?", "", preference=1), ("A?", "A bus.", "A car.", [])),
        *[(row, ("What?", "A car.", "A bus.", [])) for row in (
            {"image": "ok.jpg", "text": json.dumps({k: GOOD[k] for k in GOOD if k != "image"})},
            {**GOOD, "image": None, "image_path": "ok.jpg"},
            {**GOOD, "image": {"bytes": None, "path": "ok.jpg"}},
            {**GOOD, "image": None, "images": ["ok.jpg"]},
            {**GOOD, **{key: [user("<image> What?"), assistant(GOOD[key])]
                        for key in ("chosen", "rejected")}},  # the question once more
        )],
        ({"images": [{"path": "ok.jpg"}], "chosen": [assistant("A car.")],
          "rejected": [assistant([{"type": "text", "text": "A bus."}])],
          "prompt": [user([{"type": "image"}, {"type": "text", "text": "Where?"}]),
                     assistant("Here."), user("What?")]},
         ("What?", "A car.", "A bus.", [("Where?", "Here.")])),
    ],
    read_conversations: [
        ({"images": ["ok.jpg"], "messages": [user("<image>\nWhat?"), assistant("A cat.")]},
         ([("What?", "A cat.")],)),
        # the white space around <image> goes with it; all else stays, as in LLaVA's own code
        (chat("<image>\nWhat is it? ", "A car.", " And now?", " Still. "),
         ([("What is it?", "A car."), (" And now?", " Still. ")],)),
        (chat("Hello.", "Good day.", image=None), ([("Hello.", "Good day.")],)),
        (chat("Welcome!", "What?<image>", "A cat.", first="gpt"), ([("What?", "A cat.")],)),
        (human_preference(), ([("Where is it?", "At home."), ("What is it?", "A car.")],)),
        (GOOD, ([("What?", "A car.")],)),
    ],
    read_prompts: [
        (chat("Is it red?\n<image>", "to be written", "And?", "No."), ("Is it red?", 1, 1.0)),
        (chat("<image>?", caption_type=6, length_bonus=0.5), ("?", 6, 0.5)),
        (chat("<image>\nA. car B. bus", caption_type=3), ("A. car B. bus", 3, 1.0)),
        (chat("Hello.", "<image>Who?", "A man.", first="gpt"), ("Who?", 1, 1.0)),
        (GOOD, ("What?", 1, 1.0)),
    ],
}


@pytest.mark.parametrize("read", GOOD_ROWS)
def test_rows_in_lines_and_in_an_array(image_folder, read, tmp_path_factory):
    given, expected = zip(*GOOD_ROWS[read])
    lines = jsonl_file(image_folder, given[0], b"", *given[1:])
    array = json_file(image_folder, given, "array.txt")  # content decides, not the name
    array.write_bytes(b"\xef\xbb\xbf" + array.read_bytes())  # as some editors save it
    for path, numbers in ((lines, [1, *range(3, 20)]), (array, range(1, 20))):
        found = read([path])
        assert [r.name for r in found] == [f"{path} row {n}" for n in numbers[: len(given)]]
        assert [tuple(vars(r).values())[2:] for r in found] == list(expected)
        assert {r.picture for r in found} <= {"ok.jpg", ""}
    if read is read_prompts:
        assert [prompt.truth for prompt in found] == [None, "no", "B", None, None]
    elsewhere = json_file(tmp_path_factory.mktemp("elsewhere"), given)
    with pytest.raises(DataError, match="row 1: no image 'ok.jpg' in .*point --images"):
        read([elsewhere])
    assert [r.image for r in read([elsewhere], image_folder)] == [r.image for r in found]


def test_null_fields_are_absent_and_links_are_followed(image_folder):
    row = GOOD | {"conversations": None, "caption_type": None, "history": [["Who?", "A man."]]}
    outside = shutil.copytree(image_folder, image_folder.with_name("outside"))
    (image_folder / "link").symlink_to(outside)
    (pair,) = read_pairs([jsonl_file(image_folder, row | {"image": "link/ok.jpg"})], image_folder)
    assert (pair.chosen, pair.history, pair.image.name) == (
        GOOD["chosen"], [("Who?", "A man.")], "ok.jpg")
    (prompt,) = readers.read_prompts([jsonl_file(image_folder, row)], image_folder)
    assert prompt.question == "Who?"  # the first
    stored = [ParquetImage(image_folder / "a", *place) for place in ((1, 0, ""), (0, 9, ""))]
    assert sorted(stored, key=in_file) == stored[::-1]


def test_captions_are_found_by_file_name(tmp_path):
    captions = {"ok.jpg": ["A car."], "x/b.jpg": ["B."]}
    assert readers.read_captions(json_file(tmp_path, captions)) == captions
    stored = ParquetImage(tmp_path / "a.parquet", 0, 0, "data/x/b.jpg")
    for image, texts in ((tmp_path / "ok.jpg", ["A car."]), (stored, ["B."])):
        assert readers.captions_of("row 1", image, captions) == texts
    with pytest.raises(DataError, match="row 1: no captions for image .*c.jpg"):
        readers.captions_of("row 1", tmp_path / "c.jpg", captions)
    with pytest.raises(DataError, match="row 1: the image has no file name"):
        readers.captions_of("row 1", replace(stored, name=""), captions)
    for bad, phrase in (("A car.", "'ok.jpg' should have a list of captions"),
                        (["\ud800"], "half a character")):
        with pytest.raises(ValueError, match=phrase):
            readers.read_captions(jsonl_file(tmp_path, {"ok.jpg": bad}))


BAD_ROWS = {
    read_pairs: [
        (b'{"image": "ok.jpg", "que', "not valid JSON"), (b'{"": "\xff"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"), ([1, 2], "expected an object, found a list"),
        *[(GOOD | {key: value}, phrase) for key, value, phrase in (
            ("chosen", 7, "'chosen' is missing"), ("rejected", " ", "'rejected' is missing"),
            ("rejected", "A <image>.", "contains <image>"), ("chosen", "A bus. ", "are the same"),
            ("question", None, "'question' is missing"), ("question", "<image>", "be a text with"),
            ("question", "<image> or <image>?", "'question' should be a text with at most one"),
            ("history", [["Where?"]], "history should be a list of [question, answer]"),
            ("image", None, "'image' is missing"), ("image", "no.jpg", "no image 'no.jpg'"),
            ("image", ["ok.jpg"], "be the name of one"), ("image", "a\0b", "is not a file name"),
            ("image", "a" * 5000, "not a file name"), ("image", "../rows.jsonl", "lies outside"),
            ("image", "loop.jpg", "no image 'loop.jpg'|not a file name"),
            ("chosen", "\ud800", "half a"),
        )],
        *[(GOOD | {"image": None, "question": None, key: value}, phrase) for key, value, phrase in (
            ("images", ["ok.jpg", "b.jpg"], "a list of one image"),
            ("prompt", [user("A?"), user("B?")], "alternate between user and assistant"),
            ("prompt", [{"role": "system", "content": "Hi"}], "of role 'system', not 'user'"),
            ("prompt", [{"content": "Hi"}], "a field has an invalid value"),
            ("prompt", [], "alternate between user and assistant"),
            ("text", '{"question": "What', "text is not valid JSON"),
            ("text", '{"question": "\\ud800"}', "half a character"),
        )],
        (b'{"image": "ok.jpg", "image": "b.jpg"}', "'image' is given more than once"),
        ({"image": "ok.jpg", "x" * 9000: 1}, "no preference among its fields"),
        ({"image": "ok.jpg", "label": 1}, "no preference among its fields (image, label)"),
        *[(GOOD | {"chosen": [*before, {"role": role, "content": "Thanks."}]},
           "chosen should be one answer of the assistant")
          for before, role in (([], "user"), ([user("Not the question?")], "assistant"))],
        (GOOD | {"chosen": []}, "chosen should be one answer of the assistant"),
        (chat("<image>?", "Yes."), "a conversation has no two answers to compare"),
        (human_preference("<image>?", "Yes.", "What?"), "the last turn should be from 'gpt'"),
        *[(human_preference(**{key: value}), phrase) for key, value, phrase in (
            ("preference", "2", "preference is '2', not"), ("preference", True, "is True, not 1"),
            ("image", None, "'image' is missing"), ("output_2", "A car.", "'output_2' is missing"),
            ("conversations", ["?"], "list turns"),
        )],
    ],
    read_conversations: [
        (chat("What?", "A car."), "0 <image> in the conversation, but 1 images"),
        (chat("<image>?", "Yes.", image=None), "1 <image> in the conversation, but 0 images"),
        (chat("What?", "A car.", "<image> What?", "A car."), "should stand in the first turn"),
        (chat("<image>", "A car."), "turn 1, from 'human', is empty"),
        (chat("<image> What?", ""), "turn 2, from 'gpt', is empty"),
        (chat("<image> What?", "A car.", "And?"), "the last turn is a question"),
        (chat(conversations=messages("<image>?") * 2), "turn 2 is from 'human', not 'gpt'"),
        (chat("Hello", first="gpt"), "no question"), (chat(), "should list turns with 'from'"),
    ],
    read_prompts: [
        *[(chat("<image>? A. B. D.", **{key: value}), phrase) for key, value, phrase in (
            ("caption_type", 8, "is 8, not 1 to 7"), ("caption_type", 4, "lists no 'C' followed"),
            ("length_bonus", 10**400, "not a number"), ("length_bonus", "x", "'x', not a number"),
            ("image", "", "'image' is missing"),
        )],
    ],
}


@pytest.mark.parametrize("read", BAD_ROWS)
def test_bad_rows_are_named_or_skipped(image_folder, read, capsys):
    (image_folder / "loop.jpg").symlink_to("loop.jpg")
    path = jsonl_file(image_folder, GOOD, *(row for row, _ in BAD_ROWS[read]), GOOD)
    skipped = []
    assert len(read([path], None, skipped)) == 2 and len(skipped) == len(BAD_ROWS[read])
    with pytest.raises(DataError) as listed:  # all at once, up to 20
        read([path])
    said = str(listed.value)
    assert said.count("\n") == min(20, len(skipped)) and skipped[1] in said
    for number, (text, (row, phrase)) in enumerate(zip(skipped, BAD_ROWS[read]), 2):
        assert text.startswith(f"{path} row {number}: ") and len(text) < 500 + len(str(path))
        phrase = phrase if "|" in phrase else re.escape(phrase)
        assert re.search(phrase, text)
        with pytest.raises(DataError, match=phrase):
            read([jsonl_file(image_folder, GOOD, row)])
    report_skipped(skipped)
    lines, more = capsys.readouterr().err.splitlines(), len(skipped) - 20
    assert lines[:2] == [f"{len(skipped)} rows left out:", f"  {skipped[0]}"]
    assert lines[21:] == ([f"  and {more} more"] if more > 0 else [])


def test_files_are_found_by_patterns_or_named_as_bad(image_folder):
    for name in ("b.jsonl", "a.jsonl", "odd[1].jsonl"):
        json_file(image_folder, GOOD, name)
    found = find_files([image_folder / "odd[1].jsonl", image_folder / "[ab].jsonl"])
    assert [path.name for path in found] == ["odd[1].jsonl", "a.jsonl", "b.jsonl"]
    half = json_file(image_folder, json.dumps([GOOD, GOOD])[:100])
    os.mkfifo(image_folder / "pipe")
    for path, skip, phrase in [
        (half, None, "rows.json: not valid JSON .*is the file complete"),
        (image_folder / "*.nothing", None, "nothing: no such file"),
        (image_folder, None, "a folder; name its files"),
        (image_folder / "pipe", None, "not a regular file"), (Path("/dev/zero"), None, "a regular"),
        (jsonl_file(image_folder), None, "no usable row in .*rows.jsonl"),
        (json_file(image_folder, [1], "1.json"), [], "no usable row.*first one: .*row 1: expected"),
    ]:
        with pytest.raises(DataError, match=phrase):
            read_pairs([path], None, skip)


def write_parquet(path, *records):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(list(records)), path, row_group_size=2)
    return path


def rlhf_v(seed, nested=True, **changes):
    """A row of RLHF-V-Dataset, its texts as JSON, or of RLAIF-V-Dataset, with a column for each."""
    texts = {"question": f"What {seed}?", "chosen": "A tree.", "rejected": "A house."}
    texts = {"text": json.dumps(texts)} if nested else texts
    return {"image": {"bytes": image_bytes(seed), "path": f"{seed}.png"}, **texts, **changes}


@pytest.mark.parametrize("nested", [True, False])
def test_parquet_rows_leave_their_images_on_disk(tmp_path, monkeypatch, nested):
    path = write_parquet(tmp_path / "a.parquet", *(rlhf_v(i, nested) for i in range(5)))
    parquet = pytest.importorskip("pyarrow.parquet")
    texts, images = parquet.ParquetFile.read_row_group, parquet.ParquetFile.iter_batches
    calls = []
    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", lambda self, group, columns: (
        calls.append((group, bool({"image", "image.bytes"} & set(columns))))
        or texts(self, group, columns)))
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", lambda self, size, group, *more, **x: (
        calls.append((*group, True)) or images(self, size, group, *more, **x)))
    pairs = read_pairs([str(tmp_path / "*.parquet")])
    assert calls == [(0, False), (1, False), (2, False)]  # texts only, group by group
    assert [(p.name, p.question, p.chosen, p.rejected) for p in pairs] == [
        (f"{path} row {i + 1}", f"What {i}?", "A tree.", "A house.") for i in range(5)]
    assert pairs[3].image == ParquetImage(path, 1, 1, "3.png") and pairs[3].picture == "3.png"
    calls.clear()
    assert [p.image.read() for p in pairs] == [image_bytes(i) for i in range(5)]
    assert calls == [(0, True), (1, True), (2, True)]  # each group of images once, in order
    assert [pairs[i].image.read() for i in (1, 0, 4, 1)] == [image_bytes(i) for i in (1, 0, 4, 1)]


def test_a_row_group_of_images_need_not_fit_into_memory(tmp_path):
    """Of 400 images in one row group only some are held at a time, whatever their number."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    content, path = random.Random(0).randbytes(20_000), tmp_path / "a.parquet"
    rows = [rlhf_v(i, image={"bytes": b"%d" % i + content, "path": ""}) for i in range(400)]
    parquet.write_table(arrow.Table.from_pylist(rows), path, use_dictionary=False,
                        write_batch_size=8, data_page_size=100_000)
    assert parquet.ParquetFile(path).num_row_groups == 1
    del rows
    before, peak = arrow.total_allocated_bytes(), 0
    pairs = read_pairs([path])
    assert len(pickle.dumps(pairs)) < 100_000
    for i, pair in enumerate(pairs):
        _, found = features.identify(pair.image)
        assert found == b"%d" % i + content
        peak = max(peak, arrow.total_allocated_bytes() - before)
    assert peak < 2_000_000  # of 8 million
    assert pairs[3].image.read() == b"3" + content  # from the beginning once more


def test_other_parquet_files(image_folder):
    """Images as plain bytes, with or without other columns, or as names; errors name the row."""
    path = write_parquet(image_folder / "a.parquet", GOOD | {"image": image_bytes(3)})
    assert read_pairs([path])[0].image.read() == image_bytes(3)
    assert read_pairs([write_parquet(path, GOOD)])[0].image == image_folder.resolve() / "ok.jpg"
    write_parquet(path, {"image": image_bytes(3)})
    assert [name for name, _ in whole_rows(path)] == [f"{path} row 1"]
    named = GOOD | {"image": {"bytes": None, "path": "ok.jpg"}}  # as `datasets` does
    assert read_pairs([write_parquet(path, named)])[0].image == image_folder.resolve() / "ok.jpg"
    inside = rlhf_v(0, False, image=None, images=[{"bytes": image_bytes(4), "path": "x/4.png"}])
    (pair,) = read_pairs([write_parquet(path, inside)])  # as of TRL
    assert pair.image.read() == image_bytes(4) and pair.picture == "x/4.png"
    outside = GOOD | {"image": {"bytes": str(ROOT / "world/before_after.png")}}  # a text
    with pytest.raises(DataError, match="row 1: field 'image' is missing"):
        read_pairs([write_parquet(path, outside)])
    two = inside | {"images": inside["images"] * 2}
    with pytest.raises(DataError, match="row 1: 2 images; a row has one"):
        read_pairs([write_parquet(path, two)])
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]
    seen = {"conversations": [{**turns[0], "value": "<image>Who?"}, turns[1]]}
    write_parquet(path, {"image": {"bytes": image_bytes(3), "path": "a"}, **seen},
                  {"image": None, "conversations": turns})
    assert [each.image is None for each in readers.read_conversations([path])] == [False, True]
    without = {"images": [], "conversations": turns}
    write_parquet(path, {"images": inside["images"], **seen}, without)
    assert [each.image is None for each in readers.read_conversations([path])] == [False, True]
    write_parquet(path, inside, inside | {"images": [None]})
    pair, empty = read_pairs([path])
    assert pair.image.read() and (empty.image.name, empty.image.read()) == ("", None)
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    large = arrow.large_list(arrow.struct({"bytes": arrow.binary(), "path": arrow.string()}))
    plain = arrow.list_(arrow.binary())
    for kind, images in ((large, inside["images"]), (plain, [image_bytes(4)])):
        table = arrow.table({**{name: [value] for name, value in GOOD.items() if name != "image"},
                             "images": arrow.array([images, images], kind)[:1]})
        parquet.write_table(table, path)
        assert read_pairs([path])[0].image.read() == image_bytes(4)
    write_parquet(path, rlhf_v(0), rlhf_v(1, text='{"question": "What'))
    with pytest.raises(DataError, match="a.parquet row 2: text is not valid JSON"):
        read_pairs([path])
    assert len(read_pairs([path], None, skip := [])) == len(skip) == 1
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="a.parquet: not a complete parquet file"):
        read_pairs([path])


def test_images_are_upright_with_transparency_on_white_or_named_as_bad(tmp_path, monkeypatch):
    turned, clear = Image.new("RGB", (30, 10), "red"), Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    turned.getexif()[0x0112] = 6  # lies on its side
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif())
    clear.save(tmp_path / "clear.png")
    assert open_image("x", tmp_path / "turned.jpg").size == (10, 30)
    tags = b"Exif\0\0II*\0" + struct.pack(  # on its side; a text where a number should be
        "<IHHHIHHHHI4sI", 8, 2, 0x0112, 3, 1, 6, 0, 0x011A, 2, 4, b"abc", 0)
    jpeg = image_bytes(1, "JPEG", (30, 10))
    (tmp_path / "odd.jpg").write_bytes(
        jpeg[:2] + struct.pack(">HH", 0xFFE1, len(tags) + 2) + tags + jpeg[2:])
    assert open_image("x", tmp_path / "odd.jpg").size == (10, 30)
    turned.save(tmp_path / "odd.png", exif=b"no EXIF data")
    assert open_image("x", tmp_path / "odd.png").size == (30, 10)
    assert open_image("x", tmp_path / "clear.png").getcolors() == [(64 * 64, (255, 255, 255))]
    grey = np.array([[0, 128 * 256, 65535]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.asarray(open_image("x", tmp_path / "grey.png"))[0, :, 0].tolist() == [0, 128, 255]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 64 x 64 is now a bomb
    half = (tmp_path / "turned.jpg").read_bytes()[:400]
    for source in (half, b"no image at all", image_bytes(1, "BMP"), tmp_path / "clear.png", b""):
        with pytest.raises(DataError, match="^row 5: (cannot read image |the image holds no)"):
            open_image("row 5", source)
    bomb = image_bytes(1, size=(60, 60))
    with ThreadPoolExecutor(8) as pool:  # Pillow's own limit can be bypassed by threads
        errors = pool.map(lambda _: pytest.raises(DataError, open_image, "x", bomb), range(200))
        assert all("more than 0 million pixels" in str(error.value) for error in errors)


def test_every_image_is_encoded_once_in_memory_and_on_disk(tiny_world, image_folder, monkeypatch):
    batches, encode = [], tiny_world.image_features
    monkeypatch.setattr(tiny_world, "image_features", lambda x: batches.append(len(x)) or encode(x))
    monkeypatch.setattr(features, "BATCH", 2)
    (image_folder / "bad.jpg").write_bytes(b"no image")
    stored = write_parquet(image_folder / "a", rlhf_v(0), rlhf_v(1), rlhf_v(0),
                           rlhf_v(2, image={"bytes": b"", "path": "x"}))
    names = ("ok.jpg", "bad.jpg", None, "b.jpg", "ok.jpg", "bad.jpg")
    images = [(f"row {i}", name and image_folder / name) for i, name in enumerate(names, 1)]
    images += [(f"row {i}", pair.image) for i, pair in enumerate(read_pairs([stored]), 7)]
    run = lambda stop=False: features.encode_images(
        tiny_world, IMAGES, images, image_folder, stop)
    with pytest.raises(DataError, match="^row 2: cannot read image bad.jpg"):
        run(stop=True)
    before = sorted(image_folder.iterdir())
    for limit in (10**9, 100):  # in memory, on disk
        monkeypatch.setattr(features, "LIMIT", limit)
        batches.clear()
        found = run()
        assert batches == [1, 1, 2] and found[2] is None
        assert sorted(image_folder.iterdir()) == before  # the mapped file has no name
        for i in (0, 3, 4, 6, 7, 8):  # equal bytes are one image
            pixels = preprocess(open_image("x", images[i][1]), 12, IMAGES.mean, IMAGES.std)
            torch.testing.assert_close(found[i], encode(pixels[None])[0].detach())
        for i, reason in ((1, "cannot read image bad.jpg"), (5, "cannot read"), (9, "the image h")):
            with pytest.raises(DataError, match=f"^row {i + 1}: {reason}"):
                found[i]
    with torch.autocast("cpu", torch.bfloat16):  # float32 weights, half the memory
        half = run()
    assert half.store.dtype == torch.bfloat16 and found.store.dtype == torch.float32
    assert [half.digest(i) for i in (0, 2, 3)] == [found.digest(i) for i in (4, 2, 3)]
    other = features.encode_images(
        tiny_world, replace(IMAGES, mode="crop"), images[:1], image_folder, True)
    assert len({other.digest(0), half.digest(0), half.digest(2), half.digest(3)}) == 4
    torch.testing.assert_close(half[0].float(), found[0], atol=0.1, rtol=0.1)
    with pytest.raises(ValueError, match=r"bin: no 1000000000.0 GB for image features \("):
        features.mapped(image_folder, (10**9, 10**9), torch.uint8)
    assert sorted(image_folder.iterdir()) == before


# ========================================================================= formats: models on disk


def test_equal_tensors_and_metadata_are_equal_files(tmp_path):
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.bfloat16)}
    metadata, written = {key: key.upper() for key in ("ü", "b", "format", "a")}, set()
    for i in range(12):  # the library alone writes some of these in another order
        files.write_tensors(tmp_path / str(i), tensors, metadata)
        written.add((tmp_path / str(i)).read_bytes())
    found, given = files.open_file(tmp_path / "0")
    assert len(written) == 1 and given == metadata and found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

PIECES, PUBLIC_IMAGE, PUBLIC_PAD, PUBLIC_ROWS = 800, 800, 801, 832
PUBLIC_VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    image_size=28, patch_size=14, projection_dim=32)
PUBLIC_TEXT = dict(
    vocab_size=PUBLIC_ROWS, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, rms_norm_eps=1e-5,
    bos_token_id=1, eos_token_id=2, pad_token_id=PUBLIC_PAD)
WORDS = (
    "A photo shows two red cars near the old bridge, and a small dog sleeps on green grass. What "
    "is in this image? Describe it in detail, please! USER: ASSISTANT: The people are walking "
    "12345 67890 meters; it's 9:30 o'clock (maybe). café naïve über 日本 emoji 😀 ")
# Prefixes of tensors in transformers >= 5, and what older releases and the original code write.
LAYOUTS = {
    "modules": {},
    "modules of 4.52": {"model.vision_tower.": "model.vision_tower.vision_model."},
    "hub": {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
            "model.vision_tower.": "vision_tower.vision_model.",
            "model.multi_modal_projector.": "multi_modal_projector."},
    "original": {"model.language_model.": "model.",
                 "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
                 "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
                 "model.multi_modal_projector.linear_2.": "model.mm_projector.2."},
}


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory) -> Path:
    """A sentencepiece model trained with LLaMA's settings."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("public") / "tokenizer.model"
    lines = [" ".join(rng.choices(WORDS.split(), k=12)) for _ in range(400)] + [WORDS]
    lines += ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=60)) for _ in range(400)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(path.with_suffix("")), vocab_size=PIECES,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, split_digits=True,
        character_coverage=0.995, num_threads=1, minloglevel=2, unk_id=0, bos_id=1, eos_id=2)
    return path


@torch.no_grad()
def public_model(text=(), vision=(), **top):
    """A tiny random LlavaForConditionalGeneration whose logits are of order 1."""
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**PUBLIC_TEXT | dict(text)),
        vision_config=transformers.CLIPVisionConfig(**PUBLIC_VISION | dict(vision)),
        image_token_index=PUBLIC_IMAGE, pad_token_id=PUBLIC_PAD, **top)).eval()
    model.config.pad_token_id = PUBLIC_PAD
    for weight in model.parameters():
        noise, matrix = torch.randn_like(weight), weight.ndim > 1
        weight.copy_(noise * weight[0].numel() ** -0.5 if matrix else weight + noise * 0.1)
    return model


open_public = transformers.LlavaForConditionalGeneration.from_pretrained


def damage(file: Path, change):
    """Delete (None), cut short (int) or replace (bytes) a file, or edit its JSON or its weights."""
    if change is None:
        file.unlink()
    elif isinstance(change, int):
        os.truncate(file, change)
    elif isinstance(change, bytes):
        file.write_bytes(change)
    elif isinstance(change, dict):
        values = json.loads(file.read_text())
        new = {k: values[k] | v if isinstance(v, dict) else v for k, v in change.items()}
        json_file(file.parent, values | new, file.name)
    else:
        save_file(change(load_file(file)), file)


def write_model(path: Path, public, tokenizer_model: Path, layout: str = "hub") -> Path:
    """A model's folder, its tensors named as in one of the public layouts."""
    path.mkdir()
    shutil.copy(tokenizer_model, path)
    public.config.save_pretrained(path)
    weights = {}
    for name, weight in public.state_dict().items():
        new = next((new for new in LAYOUTS[layout] if name.startswith(new)), "")
        weights[LAYOUTS[layout].get(new, "") + name.removeprefix(new)] = weight.clone()
    save_file(weights, path / "model.safetensors")
    return path


@pytest.fixture(scope="session")
def public():
    return public_model()


@pytest.fixture(scope="session")
def hub_folder(public, tokenizer_model, tmp_path_factory) -> Path:
    """The public model as a folder in the layout of the hub; no test may change it."""
    return write_model(tmp_path_factory.mktemp("hub") / "model", public, tokenizer_model)


@pytest.fixture
def hub_model(hub_folder):
    return load_llava(hub_folder)[0]


def random_rows():
    """(pixels, tokens, mask): three rows of different length, the last without an image."""
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 28, 28, generator=rng)
    tokens = torch.randint(3, PIECES, (3, 14), generator=rng)
    tokens[:2, 2:6] = PUBLIC_IMAGE
    mask = (torch.arange(14) < torch.tensor([[14], [11], [8]])).long()
    return pixels, tokens.masked_fill(mask == 0, PUBLIC_PAD), mask


@torch.no_grad()
def assert_equal_logits(ours, public, rows=PUBLIC_ROWS, bound=1e-5):
    """The same fp32 logits: right-padded rows, with and without image, and a single text row."""
    pixels, tokens, mask = random_rows()
    theirs = public(input_ids=tokens, pixel_values=pixels, attention_mask=mask).logits
    mine = ours.head(ours(pixels, tokens, branch=torch.where(mask == 1, 0, -1)))
    text = public(input_ids=tokens[-1:, :5]).logits - ours.logits(None, tokens[-1:, :5])
    assert theirs.std() > 0.1
    assert ((mine - theirs)[mask == 1][:, :rows]).abs().max() <= bound
    assert text[..., :rows].abs().max() <= bound


@pytest.mark.parametrize("layout,changes", [
    ("hub", {}), ("modules", {}), ("modules of 4.52", {}),
    ("installed", {"text": {"num_key_value_heads": 2, "rope_theta": 5000.0}}),
    ("installed", {"text": {"num_key_value_heads": 1}, "vision_feature_layer": -1}),
    ("installed", {"vision": {"hidden_act": "gelu", "layer_norm_eps": 1e-3},
                   "vision_feature_layer": 1, "projector_hidden_act": "linear"}),
])
def test_llava_hf_layouts_and_shapes_give_equal_logits(tokenizer_model, tmp_path, layout, changes):
    public = public_model(**changes)
    write_model(tmp_path / "model", public, tokenizer_model, layout.replace("installed", "hub"))
    if layout == "installed":  # whatever the installed transformers writes
        public.save_pretrained(tmp_path / "model")
    assert_equal_logits(load_llava(tmp_path / "model")[0], public)


@pytest.mark.parametrize("linear,inside", [(False, True), (False, False), (True, True)])
def test_original_layout(tokenizer_model, tmp_path, linear, inside):
    """As the original LLaVA code saves: no rows for <image> and <pad>, the tower inside or not.

    `linear`: LLaVA v1's projector of one layer, which we load as two.
    """
    public = public_model(projector_hidden_act="linear" if linear else "gelu")
    if linear:
        torch.nn.init.eye_(public.model.multi_modal_projector.linear_2.weight)
        torch.nn.init.zeros_(public.model.multi_modal_projector.linear_2.bias)
    path = write_model(tmp_path / "model", public, tokenizer_model, "original")
    json_file(path, PUBLIC_TEXT | {
        "model_type": "llava_llama", "vocab_size": PIECES, "pad_token_id": 0, "rope_scaling": None,
        "mm_vision_tower": "tiny-clip", "mm_projector_type": "linear" if linear else "mlp2x_gelu",
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad"}, "config.json")

    def as_original(weights):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = weights[name][:PIECES].clone()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
        dropped = ["mm_projector.2"] * linear + ["vision_tower"] * (not inside)
        return {name.replace("projector.0.", "projector.") if linear else name: weight
                for name, weight in weights.items() if not any(part in name for part in dropped)}

    damage(path / "model.safetensors", as_original)
    clip = transformers.CLIPModel(transformers.CLIPConfig(
        text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        vision_config=public.config.vision_config.to_dict(), projection_dim=32))
    clip.vision_model.load_state_dict(public.model.vision_tower.state_dict())
    clip.save_pretrained(tmp_path / "tower")
    clip.vision_model.save_pretrained(tmp_path / "half")  # its vision half alone, without prefix
    ids = {"vision_model.embeddings.position_ids": torch.arange(5)}  # in old files
    damage(tmp_path / "tower/model.safetensors", None if inside else lambda w: w | ids)
    tower = tmp_path / "tower"
    json_file(tower, {"do_pad": None}, "preprocessor_config.json")  # leaves it to the model
    ours, tokenizer, settings = load_llava(path, tower=tower)
    if not inside:
        assert_equal_logits(load_llava(path, tower=tmp_path / "half")[0], public, rows=PIECES)
    asked = train.parse(["--model", str(path), "--tower", str(tmp_path / "tower")])
    start = recipes.load_start(*asked, ddpo.DDPO, torch.device("cpu"), tmp_path)
    assert start.model.config == ours.config
    assert annotate.read_units(path, str(tmp_path / "tower")).tokenizer.image_token == PUBLIC_IMAGE
    assert (tokenizer.image_token, tokenizer.pad_token) == (PUBLIC_IMAGE, PUBLIC_PAD)
    assert (settings.mode, ours.config.text.vocab_size) == ("pad", PUBLIC_ROWS)
    assert_equal_logits(ours, public, rows=PIECES)
    torch.testing.assert_close(ours.head.weight[-1], ours.head.weight[:PIECES].mean(0))
    save_llava(ours, tokenizer, settings, tmp_path / "saved")
    assert_equal_logits(ours, open_public(tmp_path / "saved"))
    damage(path / "config.json", {"mm_vision_tower": "openai/clip-vit-large-patch14"})
    with pytest.raises(ValueError, match="a tower for pictures of 28 pixels, but the model was"):
        load_llava(path, tower=tower)


def test_saving_and_loading_again_changes_nothing(hub_folder, tmp_path):
    ours, tokenizer, settings = load_llava(hub_folder)
    save_llava(ours, tokenizer, settings, tmp_path / "a", shard_bytes=60_000)
    theirs, keys = open_public(tmp_path / "a", output_loading_info=True)
    assert not any(keys.values()), keys
    assert_equal_logits(ours, theirs)
    again, tokenizer, same = load_llava(tmp_path / "a")
    assert again.config == ours.config and same == settings
    shards = sorted((tmp_path / "a").glob("model-*.safetensors"))
    shards[3].unlink()
    with pytest.raises(ValueError, match=f"{shards[3].name}: not a complete safetensors file"):
        load_llava(tmp_path / "a")
    save_llava(again, tokenizer, same, tmp_path / "a")  # over the files it is mapped from
    assert not list((tmp_path / "a").glob("model-*"))  # no shard of the earlier model stays
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
    assert same_weights(tmp_path / "a", hub_folder)
    assert (tmp_path / "a/tokenizer.model").read_bytes() == tokenizer.model_proto
    for occupied in (tmp_path, tmp_path / "a/config.json"):
        with pytest.raises(ValueError, match="not empty, and not a model"):
            save_llava(again, tokenizer, same, occupied)


def test_loaded_weights_keep_their_dtype_and_their_file(hub_folder, hub_model, tmp_path):
    with torch.no_grad():
        for weight in hub_model.parameters():  # mapped from the file, and copied when written to
            weight.add_(1)
    again, *others = load_llava(hub_folder)
    assert torch.equal(again.head.weight + 1, hub_model.head.weight)
    save_llava(again.bfloat16(), *others, tmp_path / "a")
    for model in (load_llava(hub_folder, dtype=torch.bfloat16)[0], load_llava(tmp_path / "a")[0],
                  open_public(tmp_path / "a", dtype="auto")):
        assert {w.dtype for w in model.parameters()} == {torch.bfloat16}


def test_public_model_shapes_of_7b_and_13b():
    """The real shapes, on the meta device, from the sparse config.json of the hub."""
    large = dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                 num_attention_heads=40)
    for text, count in (({}, 7_063_427_072), (large, 13_351_494_656)):  # as transformers counts
        text |= {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096}
        with torch.device("meta"):
            model = LLaVA(layouts.llava_hf_config(Path("config.json"), {"text_config": text}))
        assert sum(weight.numel() for weight in model.parameters()) == count


def test_greedy_answers_are_those_of_transformers(hub_model, public):
    rng = random.Random(0)
    prompts = [[1] + [PUBLIC_IMAGE] * 4 * (length % 2)  # every other one has an image
               + [rng.randrange(3, PIECES) for _ in range(length)] for length in range(1, 11)]
    pixels = torch.randn(5, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    mine = generate(hub_model, pixels, [torch.tensor(p) for p in prompts], max_new_tokens=24)
    for i, prompt in enumerate(prompts):
        image = {"pixel_values": pixels[i // 2 : i // 2 + 1]} if i % 2 == 0 else {}
        theirs = public.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **image,
            do_sample=False, max_new_tokens=24, suppress_tokens=[PUBLIC_IMAGE, PUBLIC_PAD])
        assert mine[i].tolist() == theirs[0, len(prompt) :].tolist()
    assert max(map(len, mine)) == 24


HEAD = "language_model.lm_head.weight"
BAD_MODELS = {
    "model.safetensors": [
        (9000, r"model\.safetensors: not a complete"), (None, "no model.safetensors"),
        (lambda w: {k: w[k] for k in w if k != HEAD}, f"1 missing .{HEAD}"),
        (lambda w: w | {"x": torch.ones(1)}, "1 unexpected .x"),
        (lambda w: w | {"lm_head.weight": w[HEAD].clone()}, "1 stored twice"),
        (lambda w: w | {HEAD: w[HEAD].char()}, f"not floating point .{HEAD} torch.int8"),
    ],
    "config.json": [
        (b'{"text_config": ', "config.json: not valid JSON"), (None, "config.json: no such file"),
        (b'{"model_type": "llama"}', "neither a llava-hf"),
        (b'{"mm_vision_tower": "x"}', "'x' is not known; give the tower's folder"),
        *[({key: value}, phrase) for key, value, phrase in (
            ("vision_feature_select_strategy", "full", "only 'default' is supported"),
            ("vision_feature_layer", -9, "vision_feature_layer is -9, not one of -4 to 3"),
            ("image_token_index", 900, "image_token is 900, not one of 0 to 831"),
            ("image_token_index", 790, "belongs to another model"),
            ("image_token_index", 810, "has 800 pieces.*places <image> at 810"),
            ("vision_config", 7, "an invalid value"),
            ("pad_token_id", [1], "is .1., not"), ("projector_hidden_act", [], "is .., but only"),
        )],
        *[({"text_config": {key: value}}, phrase) for key, value, phrase in (
            ("intermediate_size", 81, r"9 misshapen .*gate_proj.weight \(80, 48\), not \(81, 48\)"),
            ("num_hidden_layers", 4, "9 missing"), ("head_dim", 8, "head_dim is 8, but only 12"),
            ("rope_scaling", {"type": "linear"}, "scaling is"), ("attention_bias", True, "is True"),
            ("num_attention_heads", 0, "is 0, not"), ("num_attention_heads", 5, "multiple of its"),
            ("num_key_value_heads", 3, "not a multiple of num_key_value_heads 3"),
            ("num_hidden_layers", 2 * 10**9, "is 2000000000, not a positive int up to 1000"),
            ("hidden_size", 192.0, "is 192.0, not"), ("rms_norm_eps", 1e999, "is inf, not a posit"),
            ("rope_parameters", 5, "an invalid value"), ("vocab_size", True, "True, no"),
        )],
    ],
    "tokenizer.model": [(None, "not a sentencepiece .*No such"), (b"v", "not a sentencepiece")],
    "preprocessor_config.json": [
        (b'{"crop_size": {"height": 224, "width": 28}}', "'height': 224.*but the tower takes 28"),
        (b'{"size": {"height": 28, "width": 28}}', "would distort pictures"),
        (b'{"image_mean": [0.5]}', "image_mean is .0.5., not three"), (b"[" * 10**5, "too deeply"),
        (b'{"rescale_factor": 1.0}', "rescale_factor is 1.0, but only 0.0039"),
        (b'{"image_std": [1, 1, null]}', "an invalid value")],
    "tokenizer_config.json": [(b'{"added_tokens_decoder": 7}', "an invalid value")],
    "added_tokens.json": [(b'{"a": {}}', "an invalid value")],
}


def assert_refused(good: Path, tmp_path, damages: dict, load):
    """Every damage to a copy of a folder is an error in one sentence that names a file in it."""
    for i, (file, (change, phrase)) in enumerate(
            (file, case) for file in damages for case in damages[file]):
        path = Path(shutil.copytree(good, tmp_path / f"damaged-{i}"))
        damage(path / file, change)
        with pytest.raises((ValueError, FileNotFoundError), match=phrase) as caught:
            load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_bad_model_is_one_sentence(hub_folder, tmp_path):
    assert_refused(hub_folder, tmp_path, BAD_MODELS, load_llava)


def test_files_in_which_public_models_differ(hub_folder, public, tmp_path):
    path = Path(shutil.copytree(hub_folder, tmp_path / "model"))
    assert load_llava(path)[2].mode == "crop"
    weights = list(load_file(path / "model.safetensors").items())
    (path / "model.safetensors").unlink()
    torch.save({"x": torch.ones(1)}, path / "training_args.bin")
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors, .* or \*.bin"):
        load_llava(path)
    for i, part in enumerate((weights[:40], weights[40:])):
        torch.save(dict(part), path / f"pytorch_model-{i}.bin")
    assert_equal_logits(load_llava(path)[0], public)
    values = files.read_json(path / "config.json")
    values.pop("image_token_index", None)
    json_file(path, values | {"image_token_id": 802, "pad_token_id": 2}, "config.json")
    json_file(path, {"<a>": 800, "<b>": 801}, "added_tokens.json")
    tokenizer = load_llava(path)[1]
    assert (tokenizer.image_token, tokenizer.pad_token) == (802, 803)  # 2 ends answers
    save_llava(*load_llava(path), tmp_path / "again")
    assert load_llava(tmp_path / "again")[1].image_token == 802
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert theirs("a<image>b").input_ids == tokenizer.encode("a<image>b", bos=True)
    for file in (tmp_path / "again").glob("*token*"):
        file.unlink()
    theirs.save_pretrained(tmp_path / "again")  # one file names all tokens
    assert load_llava(tmp_path / "again")[1].image_token == 802
    torch.save({"x": Path("x")}, path / "pytorch_model-1.bin")  # would run code
    with pytest.raises(ValueError, match="model-1.bin: not a complete file of plain values"):
        load_llava(path)


# ---------------------------------------------------------------------------------------- adapters


@torch.no_grad()
def randomise(weights, seed=0):
    rng = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.copy_(torch.randn(weight.shape, generator=rng) * 0.1)


def test_our_adapter_in_peft(hub_folder, public, tmp_path):
    ours, tokenizer, settings = load_llava(hub_folder)
    add_adapter(ours, "policy", rank=4, alpha=6, seed=1)
    add_adapter(ours, "critic", rank=2, alpha=2, targets=("q_proj", "v_proj"), seed=2)
    for name in ("policy", "critic"):
        with use_adapter(ours, name):
            assert_equal_logits(ours, public)  # B is zero as yet
        randomise(select_trainable(ours, name))
        save_adapter(ours, name, tmp_path / name, base=hub_folder)
    assert_equal_logits(ours, public)
    for name in ("policy", "critic"):
        theirs = peft.PeftModel.from_pretrained(public_model(), tmp_path / name)
        with use_adapter(ours, name):
            assert_equal_logits(ours, theirs)
            with pytest.raises(AssertionError):
                assert_equal_logits(ours, public)
    save_llava(ours, tokenizer, settings, tmp_path / "merged", adapter="critic")
    assert_equal_logits(load_llava(tmp_path / "merged")[0], theirs.merge_and_unload(), bound=2e-5)


@pytest.mark.parametrize("targets", ["(q_proj|k_proj|down_proj)", "1.*up_proj"])
def test_their_adapter_here(hub_model, tmp_path, targets):
    # Bare names would match the tower's projections too, which carry no adapters here.
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=rf".*language_model.*\.{targets}")
    theirs = peft.get_peft_model(public_model(), config).eval()
    randomise(w for w in theirs.parameters() if w.requires_grad)
    theirs.save_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "old").mkdir()
    shutil.copy(tmp_path / "adapter/adapter_config.json", tmp_path / "old")
    torch.save(weights, tmp_path / "old/adapter_model.bin")  # as older versions of PEFT write
    load_adapter(hub_model, tmp_path / "old", "sft")
    save_adapter(hub_model, "sft", tmp_path / "again")
    with use_adapter(hub_model, "sft"):
        assert_equal_logits(hub_model, theirs)
    before, after = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


B = "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_B.weight"
BAD_ADAPTERS = {
    "adapter_model.safetensors": [
        (lambda w: {k: w[k] for k in w if k != B}, "for another model .my-llava.: 1 missing"),
        (lambda w: w | {"x": torch.ones(1)}, "1 unexpected .x"), (lambda w: {}, "it is empty"),
        (None, "adapter_model.safetensors: not a complete safetensors file")],
    "adapter_config.json": [
        ({"r": 3}, "misshapen"), ({"use_dora": True}, "True, but only False is supported")],
}


def test_adapters_come_from_their_seed_and_bad_ones_are_refused(hub_folder, hub_model, tmp_path):
    for name, seed in (("a", 3), ("same", 3), ("other", 4)):
        add_adapter(hub_model, name, rank=2, alpha=2, seed=seed)
    drawn = [lora_layers(hub_model, name)[0].adapters[name].A for name in ("a", "same", "other")]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    save_adapter(hub_model, "a", tmp_path / "a", base="my-llava")
    half, *_ = load_llava(hub_folder, dtype=torch.bfloat16)
    load_adapter(half, tmp_path / "a", "a")  # rounding does not make another base
    assert_refused(tmp_path / "a", tmp_path, BAD_ADAPTERS,
                   lambda path: load_adapter(hub_model, path, "b"))
    with torch.no_grad():
        half.head.weight.add_(1)
    with pytest.raises(ValueError, match="trained on other base weights, those of my-llava"):
        load_adapter(half, tmp_path / "a", "b")
    for targets, name, phrase in ((["qproj"], "b", "called qproj"), (["q_proj"], "a", "already")):
        with pytest.raises(ValueError, match=phrase):
            add_adapter(hub_model, name, rank=2, alpha=2, targets=targets)
    with pytest.raises(ValueError, match="no adapter named 'polcy'; there are: a, other, same$"):
        save_adapter(hub_model, "polcy", tmp_path / "c")


def test_lora_from_public_layout_to_public_layout(photos, tokenizer_model, tmp_path):
    start = public_model(text={"max_position_embeddings": 512})
    base, out = write_model(tmp_path / "base", start, tokenizer_model), tmp_path / "out"
    assert train.main(list(map(str, own_data(
        photos, out, "--lora", 4, "--model", base, "--steps", 3, "--learning_rate", 1e-2,
        "--device", "cpu")))) == 0
    ours, *_ = load_llava(out / "model")
    assert_equal_logits(ours, open_public(out / "model"), bound=1e-4)
    with pytest.raises(AssertionError):
        assert_equal_logits(ours, start, bound=0.1)  # something was learnt
    adapted = peft.PeftModel.from_pretrained(start, out / "adapter").eval()
    assert_equal_logits(ours, adapted, bound=1e-4)


def test_gradients_with_checkpointing_are_those_of_the_adapter_in_use(hub_model):
    """Backward runs after the `with` block and recomputes with the same adapter."""
    for seed, name in enumerate(("policy", "critic")):
        add_adapter(hub_model, name, rank=2, alpha=2, seed=seed)
        randomise(select_trainable(hub_model, name), seed)
    weights, grads = select_trainable(hub_model, "policy"), []
    pixels, tokens, _ = random_rows()
    for hub_model.decoder.gradient_checkpointing in (False, True):
        with use_adapter(hub_model, "policy"):
            loss = hub_model.logits(pixels, tokens).square().mean()
        with use_adapter(hub_model, "critic"):
            grads.append(torch.autograd.grad(loss, weights))
    assert max(gradient.abs().max() for gradient in grads[0]) > 0
    torch.testing.assert_close(grads[0], grads[1])


# ------------------------------------------------------------------------------- tokens and pixels

TEXTS = [
    "", " ", "  ", " leading", "trailing ", "two  spaces", "\n", "\n\n x", "a\nb\r\n\tc", "😀",
    "👩‍👩‍👧‍👦 ok", "日本語のテキスト", "naïve café", "e\u0301", "\u00a0nbsp\u3000wide", "2024 1,000.50",
    "ﬁ 𝔘𝔫𝔦", "a\x00b", "<", "<imag", "<0x0A>", "ALL CAPS and MiXeD", "<image>", "<image><image>",
    " <image> ", "a<image>b", "a <image> b", "a\n<image>\nb", "<image>\n\nWhat?", WORDS,
    data.prompt_text("What is in this image?"),
]


def odd_texts():
    """TEXTS, and others of random characters and words."""
    rng, alphabet = Random(0), " \n\tabcdeé日😀.,!?<>'\"0123"
    words = [*WORDS.split(), "<image>", " ", "\n"]
    return [*TEXTS, *("".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(500)),
            *("".join(rng.choices(words, k=9)) for _ in range(200))]


def test_tokens_are_those_of_transformers(hub_folder, tmp_path):
    ours, tokenizer, _ = load_llava(hub_folder)
    save_llava(ours, tokenizer, ImageSettings(28, mode="pad"), tmp_path / "a")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    for text in odd_texts():
        ids = tokenizer.encode(text, bos=True)
        assert ids == theirs(text).input_ids, repr(text)
        assert tokenizer.decode(ids) == text
    for text in ("a</s>b", "<s>", "<pad>", "<unk>"):  # where we differ: they are plain characters
        ids = tokenizer.encode(text)
        assert not {0, 1, 2, PUBLIC_PAD} & set(ids) and tokenizer.decode(ids) == text
    ids = tokenizer.encode("a <image>", image=False)  # a model wrote it
    assert PUBLIC_IMAGE not in ids and tokenizer.decode(ids) == "a <image>"
    padded = tokenizer_file.Tokenizer(hub_folder / "tokenizer.model", pad_token=0)  # as some pad
    assert padded.decode([0, *padded.encode("a b"), 0]) == "a b"

    picture, text = pictures()["photo"], data.prompt_text("What is in this image?")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "a", backend="pil")
    inputs = processor(images=picture, text=text, return_tensors="pt")
    assert inputs.input_ids[0].tolist() == data.prompt_tokens(tokenizer, text, patches=4)
    assert (inputs.pixel_values[0] - preprocess(picture, 28, mode="pad")).abs().max() < 1e-5
    # Prompt and answer tokenized apart must be the whole tokenized at once, or labels shift.
    prompt = data.prompt_tokens(tokenizer, text, patches=1)
    for answer in ("Two red cars.", "The bridge is old, and 日本 😀.", "No"):
        whole = theirs(f"{text} {answer}</s>").input_ids
        assert prompt + tokenizer.encode(answer, eos=True) == whole


def test_chat_interfaces_give_our_text_and_our_answers(tokenizer_model, tmp_path):
    public = public_model(text={"max_position_embeddings": 512})
    ours, tokenizer, _ = load_llava(write_model(tmp_path / "base", public, tokenizer_model))
    settings, picture = ImageSettings(28, mode="pad"), pictures()["photo"]
    save_llava(ours, tokenizer, settings, tmp_path / "a")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "a", backend="pil")
    part = lambda text: [{"type": "text", "text": text}]
    shown = {"type": "image", "image": picture}
    chat = [{"role": "user", "content": [shown, *part("What is it?")]}]
    more = [*chat, {"role": "assistant", "content": part("A car.")},
            {"role": "user", "content": part("And?")}]
    trunk = data.trunk_tokens(tokenizer, [("What is it?", "A car.")], "And?", 4)
    for messages, ids in ((chat, data.prompt_tokens(tokenizer, data.prompt_text("What is it?"), 4)),
                          (more, trunk)):
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt")
        assert inputs.input_ids[0].tolist() == ids
        answer = open_public(tmp_path / "a").generate(
            **inputs, do_sample=False, max_new_tokens=12,
            suppress_tokens=[PUBLIC_IMAGE, PUBLIC_PAD])[0, len(ids) :]
        pixels = preprocess(picture, 28, mode="pad")[None]
        mine = generate(ours, pixels, [torch.tensor(ids)], max_new_tokens=12)[0]
        assert answer.tolist() == mine.tolist()
    joint = "".join(processor.apply_chat_template([*more, {"role": "assistant", "content": "No."}]))
    assert joint == (
        f"<s>{data.prompt_text('What is it?')} A car.</s>USER: And? ASSISTANT: No.</s>")
    values = json.loads((tmp_path / "a/config.json").read_text())  # what vLLM and SGLang look up
    assert values["text_config"]["architectures"] == ["LlamaForCausalLM"]
    assert {"image_token_index", "projector_hidden_act", "multimodal_projector_bias",
            "vision_feature_layer", "vision_feature_select_strategy", "vision_config"} <= {*values}


def test_a_tokenizer_json_is_enough(hub_folder, tmp_path):
    loaded = load_llava(hub_folder)
    save_llava(*loaded, tmp_path / "a")
    (tmp_path / "a/tokenizer.model").unlink()
    again = load_llava(tmp_path / "a")[1]
    for text in odd_texts():
        assert again.encode(text, bos=True, eos=True) == loaded[1].encode(text, bos=True, eos=True)
        assert again.decode(again.encode(text)) == text
    values = json.loads((tmp_path / "a/tokenizer.json").read_text())
    json_file(tmp_path / "a", {**values, "model": {"type": "WordPiece"}}, "tokenizer.json")
    with pytest.raises(ValueError, match="tokenizer.json: not LLaMA's kind of tokenizer"):
        load_llava(tmp_path / "a")


def test_adapters_runs_and_towers_are_models(photos, tokenizer_model, tmp_path, run_train):
    public = public_model(text={"max_position_embeddings": 512})
    base = write_model(tmp_path / "base", public.half(), tokenizer_model)
    own = lambda out, *more: own_data(
        photos, tmp_path / out, "--steps", 1, "--device", "cpu", *more)
    shown = run_train(*own("one", "--lora", 4, "--model", base, "--image_mode", "pad"))
    assert "learning rate 0.003, LoRA's in a small model (--learning_rate); alpha 8, twice" in shown
    opened = [opening.open_model(tmp_path / "one" / name) for name in (".", "adapter")]
    (whole, _, images), (merged, _, again) = opened
    assert images == again and (images.mode, load_llava(base)[2].mode) == ("pad", "crop")
    assert whole.stored_dtype == torch.float16  # as the base
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], weight, atol=1e-3, rtol=1e-3)
    chain = ("over", "--model", tmp_path / "one/adapter", "--lora", 4)
    for dtype in ("bfloat16", "float32"):  # an adapter over an adapter opens in any
        run_train(*own(*chain, "--dtype", dtype, "--overwrite"))
        assert opening.open_model(tmp_path / "over/adapter")[0].stored_dtype == torch.float16
    assert "adapter is an input of this run" in run_train(
        *own("one", "--model", tmp_path / "over/adapter", "--overwrite"), status=1)
    model, delta = opening.open_model(base, dtype=torch.bfloat16)[0], 2.0**-12
    add_adapter(model, "x", 2, 2)
    layer = model.decoder.layers[0].mlp.down_proj
    for matrix in layer.adapters["x"].parameters():
        matrix.data.fill_(0)
    assert torch.equal(layer.merged("x", torch.float16), layer.weight.half())
    layer.adapters["x"].A.data.fill_(1), layer.adapters["x"].B.data.fill_(delta / 2)
    assert torch.equal(layer.merged("x", torch.float16), (layer.weight.float() + delta).half())
    shown = run_train(*own("two", "--model", tmp_path / "one/adapter"))
    assert "learning rate 0.0003, that for all of a small model (--learning_rate)" in shown
    assert opening.open_model(tmp_path / "two")[0].stored_dtype == torch.float16
    config_file = tmp_path / "one/adapter/adapter_config.json"
    damage(config_file, {"base_model_name_or_path": "us/gone"})
    assert f"{config_file}: an adapter over us/gone, which is no folder here" in run_train(
        *own("three", "--model", tmp_path / "one/adapter"), status=1)
    damage(config_file, {"base_model_name_or_path": str(config_file.parent)})
    assert f"{config_file}: an adapter over itself" in run_train(
        *own("three", "--model", tmp_path / "one/adapter"), status=1)
    run = config.Run(model=str(base))
    for names in (("a", "b"), ("a/model", "b/model")):  # folders of one name are two models
        folders = {recipes.reward_folder(replace(run, model=name, data=None), ppo.PPOConfig())
                   for name in names}
        assert len(folders) == 2


def test_large_models_get_the_papers_learning_rate(tmp_path):
    text = {"model_type": "llama", "vocab_size": 32064, "num_hidden_layers": 5}  # 1.3B
    json_file(tmp_path, {"text_config": text, "vision_config": {"num_hidden_layers": 1}},
              "config.json")
    lora, own = ("--lora", "8"), ("--learning_rate", "1e-2")
    for kind, more, large, small in (
        ("ddpo", (), 5e-7, 3e-4), ("ddpo", lora, 2e-4, 3e-3), ("ddpo", own, 1e-2, 1e-2),
        ("ddpo", ("--anchor", "0"), 5e-7, 1e-5), ("dpo", (), 5e-7, 1e-5),
        ("sft", (), 2e-5, 3e-4), ("sft", lora, 2e-4, 3e-3),
        ("rm", (), 1e-5, 1e-4), ("rm", lora, 2e-5, 3e-4), ("rm", (*lora, *own), 1e-2, 1e-2),
        ("ppo", (), 1e-6, 5e-4), ("ppo", lora, 3e-5, 1e-3), ("ppo", own, 1e-2, 1e-2),
        ("grpo", (), 1e-6, 5e-4), ("grpo", lora, 3e-5, 1e-3), ("grpo", own, 1e-2, 1e-2),
        ("online_ddpo", (), 5e-7, 3e-4), ("online_ddpo", lora, 2e-4, 3e-3),
    ):
        run, given = train.parse(["--algo", kind, "--model", str(tmp_path), *more])
        settled = recipes.with_rate(run, given)
        assert settled.learning_rate == large and (run.alpha == 16 or not run.lora)
        assert recipes.with_rate(replace(run, model=None), given).learning_rate == small
        said = recipes.choice(run, settled, given)
        assert ("1B and more" in said) == (own[0] not in more)
        assert ("alpha" in said) == (lora[0] in more)


@pytest.mark.parametrize("losses, phrase", [
    ((0.69, 0.69, 0.68, 0.69), "hardly moved: 0.69 at first, 0.685 in the second half, that of g"),
    ((0.3, 0.9, 0.9, 0.9), "has risen: 0.3"), ((0.48, 0.5, 0.54, 0.54), "has risen: 0.48"),
    ((0.69, 0.6, 0.5, 0.4), ""), ((0.69,), "")])
def test_a_loss_that_does_not_move_is_reported(tiny, tmp_path, losses, phrase):
    write_lines(tmp_path / "metrics.jsonl", *({"step": i, "loss": x} for i, x in enumerate(losses)))
    start = make_start(tiny, None, tmp_path)
    said = {reads: loop.verdict(tmp_path, reads, start, ddpo.DDPOConfig(learning_rate=1e-6))
            for reads in ("pairs", "rankings", "prompts")}
    assert phrase in said["pairs"] and ("1e-06" in said["pairs"]) == bool(phrase)
    # a reward model knows something at its start
    known = said["rankings"]
    assert bool(known) == (losses[-1] > 0.6 and len(losses) > 1) and not said["prompts"]
    expected = "has risen" if losses[0] < 0.6 else "not well below guessing (0.6931)"
    assert not known or expected in known
    assert ("a smaller --learning" if "risen" in known else "a larger --") in known or not known
    assert "logps" not in known and ("logps" in said["pairs"]) == phrase.startswith("hardly")


def test_commands_for_a_real_llava(tokenizer_model, tmp_path, monkeypatch, run_train):
    """REAL.md's commands, word by word, on a tiny model in the same layout."""
    monkeypatch.chdir(tmp_path)
    public = public_model(text={"max_position_embeddings": 512})
    write_model(tmp_path / "llava-1.5-7b-hf", public, tokenizer_model)
    for folder in ("RLHF-V-Dataset", "photos", "benchmarks/pope", "benchmarks/images"):
        Path(folder).mkdir(parents=True)
    write_parquet(Path("RLHF-V-Dataset/a.parquet"), *(rlhf_v(i) for i in range(3)))
    for folder in ("photos", "benchmarks/images"):
        Path(folder, "ok.png").write_bytes(image_bytes(0))
    write_lines("questions.jsonl", {"image": "ok.png", "question": "What?"})
    write_lines("benchmarks/pope/random.jsonl", {"image": "ok.png", "text": "A?", "label": "no"})
    text = (ROOT / "REAL.md").read_text()
    assert text.count("\n") <= 60
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    done = []
    for command in (line for line in lines if not line.startswith("hf download")):
        name, more = re.search(r"(\w+)\.py (.*)", command).groups()
        more = more.split()
        done.append(name)
        if name == "train":
            small = [] if "--gpus" in more else ["--steps", 1, "--batch_size", 2, "--device", "cpu"]
            run_train(*more, *small)
        elif name == "evaluate":
            assert evaluate.main([*more, "--max_new_tokens", "3", "--device", "cpu"]) == 0
        else:
            given = annotate.parser().parse_args([*more, "--port", "0"])
            annotate.open_server(given).server_close()
            (row,) = read_lines("out/questions.jsonl")
            write_lines("out/questions.corrections.jsonl", {
                "image": "ok.png", "question": "What?", "chosen": "A.",
                "rejected": "B " + row["by"]})
    assert done == ["train"] * 4 + ["evaluate", "annotate", "train", "evaluate"]
    assert Path("runs/lora/adapter").exists() and Path("runs/suite/suite.json").exists()


def pictures() -> dict[str, Image.Image]:
    rng = torch.Generator().manual_seed(0)
    noise = lambda h, w: Image.fromarray(
        torch.randint(0, 256, (h, w, 3), generator=rng, dtype=torch.uint8).numpy())
    photo, file = noise(9, 13).resize((331, 217), Image.Resampling.BICUBIC), io.BytesIO()
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(file, "JPEG", exif=exif, quality=95)
    palette, alpha = photo.convert("P"), photo.convert("RGBA")
    palette.info["transparency"] = 3
    alpha.putalpha(photo.convert("L"))
    modes = {mode: photo.convert(mode) for mode in ("L", "LA", "CMYK", "P", "1")}
    sizes = {size: noise(*size) for size in ((5, 7), (101, 67), (90, 1), (1, 50), (1, 1), (28, 28))}
    return {"photo": photo, "alpha": alpha, "palette with alpha": palette,
            "exif": Image.open(file), **modes, **sizes}


@pytest.mark.parametrize("mode", ["pad", "crop"])
@pytest.mark.parametrize("size", [28, 336])
def test_pixels_are_those_of_the_public_processors(tmp_path, mode, size):
    values = layouts.image_processor(ImageSettings(size, mode=mode))
    json_file(tmp_path, values, "preprocessor_config.json")
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    for name, picture in pictures().items():
        expected, mine = theirs(picture).pixel_values[0], preprocess(picture, size, mode=mode)
        assert mine.shape == (3, size, size) and np.abs(mine.numpy() - expected).max() < 1e-5, name


def test_a_picture_too_long_to_scale_whole_takes_another_path(monkeypatch):
    for shape in ((1, 60_000), (60_000, 1)):
        for mode in ("crop", "pad"):
            assert preprocess(Image.new("RGB", shape), 336, mode=mode).shape == (3, 336, 336)
    photo = pictures()["photo"]
    whole = {mode: preprocess(photo, 112, mode=mode) for mode in ("crop", "pad")}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    difference = {mode: (whole[mode] - preprocess(photo, 112, mode=mode)).abs() for mode in whole}
    assert difference["crop"].max() < 0.02  # one level of 255
    assert difference["pad"].mean() < 0.1  # the border falls between other pixels


# ------------------------------------------------------------------------------------ resume state


def test_state_comes_back_as_it_was_or_is_refused(tmp_path):
    state = {"groups": [{"lr": 0.1, "betas": [0.9, 0.99]}], "none": None, "large": 1e400,
             "rng": torch.get_rng_state()}
    weights = {"w": torch.randn(5, 2), "step": torch.tensor(3.0)}
    for step in (7, 12, 100):
        save_state(tmp_path / f"checkpoint-{step}", state | {"step": step}, weights)
    (tmp_path / "checkpoint-best").mkdir()
    assert latest_state(tmp_path) == tmp_path / "checkpoint-100"
    assert latest_state(tmp_path / "nothing") is None
    again, stored = load_state(tmp_path / "checkpoint-100")
    assert torch.equal(stored["w"].read(), weights["w"]) and stored["step"].read() == 3
    assert torch.equal(stored["w"].read(slice(1, 3)), weights["w"][1:3])
    assert torch.equal(again.pop("rng"), state.pop("rng")) and again == state | {"step": 100}
    os.truncate(tmp_path / "checkpoint-7/weights-00001-of-00001.safetensors", 40)
    for refused in (lambda: save_state(tmp_path / "checkpoint-1", {"config": Path("x")}),
                    lambda: load_state(tmp_path / "checkpoint-1"),  # so it is not there
                    lambda: load_state(tmp_path / "checkpoint-7")):
        with pytest.raises((ValueError, OSError), match="is a PosixPath|cannot be resumed from"):
            refused()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_save_that_is_cut_short_leaves_the_old_state_or_none(tmp_path, monkeypatch, error):
    save_state(tmp_path / "checkpoint-1", {"step": 1})

    def broken(tensors, file, save=save_file):
        save(tensors, file)
        raise error

    monkeypatch.setattr("formats.state.save_file", broken)
    for name in ("checkpoint-1", "checkpoint-2"):
        with pytest.raises(error):
            save_state(tmp_path / name, {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert load_state(tmp_path / "checkpoint-1") == ({"step": 1}, {})


# ======================================================================================= kernels/

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# On a GPU the Triton kernels run here. On a CPU they run in a process of their own with
# TRITON_INTERPRET=1, which makes their compilation (tested here too) impossible.
backends = pytest.mark.parametrize(
    "backend", ["torch", "triton"] if DEVICE == "cuda" or INTERPRETED else ["torch"],
    ids="backend_{}".format)
methods = pytest.mark.parametrize("method", kernels.METHODS)

SHAPES = [  # R, V, D: ragged against tiles of 128 x 256 x 64, blocks of 4096 and rows of 64
    (1, 1, 1), (3, 2, 5), (130, 257, 64), (127, 300, 33), (40, 4099, 16), (4, 32000, 32),
    (4, 32064, 32), (6, 300, 4096), (6, 70, 5120)]


@pytest.fixture(params=["whole", "pieces"])
def pieces(request, monkeypatch):
    """Run once as shipped, once cut so that small inputs take several chunks and slices."""
    if request.param == "pieces":
        monkeypatch.setattr(fused, "chunk_rows", lambda inputs: 7)
        monkeypatch.setattr(fused, "slice_columns", lambda hidden: 200)
    return request.param


def dtypes_of(shape, pieces):
    """All three, but for Triton's interpreter: its tl.dot gives garbage on bfloat16 (3.9)."""
    if not INTERPRETED:
        return torch.float32, torch.float16, torch.bfloat16
    if pieces == "pieces" and shape[1] > 1000:
        pytest.skip("the interpreter takes seconds for a large vocabulary; run whole")
    return (torch.float32, torch.float16) if shape[1] < 1000 else (torch.float16,)


def make_head(R, V, D, dtype=torch.float32):
    """Hidden states, a vocabulary matrix that gives logits of size 3, targets."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(R, D, generator=draw), torch.randn(V, D, generator=draw)
    hidden, weight = (
        x.to(DEVICE, dtype).requires_grad_() for x in (hidden, weight * 3 / math.sqrt(D)))
    return hidden, weight, torch.randint(V, (R,), generator=draw).to(DEVICE)


def make_groups(R, pairs):
    """Segment weights, groups of uneven length, reference scores."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.where(torch.rand(R, generator=draw) < 0.3, 5.0, 1.0)
    extra = torch.randint(2 * pairs, (R - 2 * pairs,), generator=draw)
    group = torch.cat([torch.arange(2 * pairs), extra]).sort().values
    scores = torch.randn(2 * pairs, generator=draw) - 5
    return weight.to(DEVICE), group.to(DEVICE), scores.to(DEVICE)


def as_float64(*tensors):
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def assert_within(ours, plain, truth, dtype, what):
    """ours is no further from the truth than plain is, but for chance: another order of the same
    sum may round a logit the other way. One rounding more is allowed (float32: 4e-6, as a kernel
    sums thousands of products one by one)."""
    errors = [(x.detach().double() - truth).norm().item() for x in (ours, plain)]
    slack = max(torch.finfo(dtype).eps / 2, 4e-6) * truth.norm().item() + 1e-12
    assert ours.shape == truth.shape and errors[0] <= errors[1] + slack, f"{what}: {errors}"


@backends
@methods
@pytest.mark.parametrize("job, shape", [
    *(("token_logp", shape) for shape in SHAPES), *(("ddpo_loss", shape) for shape in SHAPES[1:])],
    ids=str)
def test_kernels_values_and_gradients(job, shape, method, backend, pieces):
    """Both directions are as close to float64 as the plain version of the same precision."""
    upstream, pairs = torch.linspace(-1, 1, shape[0], device=DEVICE), ()
    if job == "ddpo_loss":
        weights, group, scores = make_groups(shape[0], min(4, shape[0] // 2))
        pairs = weights.double(), group, scores.double(), 0.5, True, 0.3
        upstream = 1024  # keeps plain float16 clear of its smallest numbers, as a loss scale would
    for dtype in dtypes_of(shape, pieces):
        hidden, weight, target = make_head(*shape, dtype)
        results, gradients = [], []
        for module, tensors, options in (
            (kernels, (hidden, weight), {"method": method, "backend": backend}),
            (reference, (hidden, weight), {}), (reference, as_float64(hidden, weight), {}),
        ):
            found = getattr(module, job)(*tensors, target, *pairs, **options)
            results.append(found if isinstance(found, tuple) else (found,))
            gradients.append(torch.autograd.grad((results[-1][0] * upstream).sum(), tensors))
        assert all(x.dtype == torch.float32 for x in results[0])
        assert all(x.dtype == dtype for x in gradients[0])
        for place, three in enumerate([*zip(*results), *zip(*gradients)]):
            assert_within(*three, dtype, f"result {place}, {dtype}")


def test_kernels_chunks_are_nearly_equal_or_one():
    """All rows at once where their logits take no more than a float32 sum of dW would."""
    places = [0, 20, 40, 90]
    assert fused.equal_chunks(places, 90) == [slice(0, 90)]
    assert fused.equal_chunks(places, 60) == [slice(0, 40), slice(40, 90)]
    assert fused.equal_chunks(range(11), 4) == [slice(0, 3), slice(3, 7), slice(7, 10)]
    assert fused.equal_chunks(places, 1) == [slice(0, 20), slice(20, 40), slice(40, 90)]
    rows = lambda R, dtype, trained: fused.chunk_rows(fused.Inputs(
        None, torch.empty(R, 8, dtype=dtype), torch.empty(2**20, 8, dtype=dtype, device="meta"),
        None, (True, trained)))
    assert rows(16, torch.bfloat16, True) == 16 and rows(17, torch.bfloat16, True) == 4
    assert rows(16, torch.bfloat16, False) == rows(16, torch.float32, True) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_rescale_in_float32(dtype):
    """1 + 2^-8 would be 1 in bfloat16, and 1.5 of it 1.5."""
    matrix, factor = torch.full((5000, 2), 1.5, dtype=dtype), torch.tensor(1 + 2**-8)
    found = fused.rescale(matrix, factor, torch.bfloat16)
    assert found.dtype == torch.bfloat16 and (found == 1.5078125).all()
    assert (found is matrix) == (dtype == torch.bfloat16)


@backends
def test_kernels_large_logits(backend):
    """The online softmax subtracts the peak: logits of 10,000 and equal logits are no problem."""
    hidden = torch.tensor([[100.0, 0.0], [-100.0, 0.0], [0.0, 0.0]], device=DEVICE)
    weight = torch.tensor([[100.0, 0.0], [99.0, 0.0], [-100.0, 0.0]], device=DEVICE)
    logp = kernels.token_logp(hidden, weight, torch.tensor([1, 2, 0], device=DEVICE), None, backend)
    assert logp.tolist() == pytest.approx([-100.0, 0.0, -math.log(3)])


@backends
@methods
def test_kernels_without_rows_or_gradient(method, backend):
    """The rows of the second part need two groups of 8 row tiles, in tl.swizzle2d's order."""
    hidden, weight, target = make_head(11 * 64 + 3, 150, 8)
    empty = kernels.token_logp(hidden[:0], weight, target[:0], method, backend)
    empty.sum().backward()
    assert empty.shape == (0,) and not weight.grad.any()
    expected = reference.token_logp(hidden, weight, target)
    for graded in (True, False):
        with torch.set_grad_enabled(graded):
            found = kernels.token_logp(hidden, weight, target, method, backend)
        assert found.requires_grad == graded and torch.allclose(found, expected, atol=1e-5)


@backends
def test_kernels_take_matrices_at_any_address(backend):
    """The copy engine's descriptors begin at multiples of 16 bytes; views need not."""
    hidden, weight, target = make_head(5, 40, 16, torch.float16)
    moved = hidden.new_empty(5 * 16 + 1)[1:].view(5, 16).copy_(hidden.detach())
    with torch.no_grad():
        expected, found = (kernels.token_logp(x, weight, target, None, backend)
                           for x in (hidden, moved))
    assert moved.data_ptr() % 16 and torch.equal(found, expected)


@backends
@methods
@pytest.mark.parametrize("normalize, anchor", [(True, 0), (False, 0), (True, 0.7), (False, 30)])
def test_kernels_ddpo_equals_the_loss_in_ddpo_py(normalize, anchor, method, backend, pieces):
    hidden, weight, target = make_head(61, 40, 8)
    weights, group, ref = make_groups(61, 4)
    ref = ref if normalize else 20 * ref
    ours = kernels.ddpo_loss(
        hidden, weight, target, weights, group, ref, 0.2, normalize, anchor, method, backend)
    logp = (hidden @ weight.T).log_softmax(1).gather(1, target[:, None])[:, 0]
    scores = ddpo.response_scores(logp, weights, group, 8, normalize)
    losses, *rewards = ddpo.preference_loss(scores[0::2], scores[1::2], ref[0::2], ref[1::2], 0.2)
    plain = losses.mean() + anchor * ddpo.anchor_loss(logp, group, 8), *rewards, scores
    assert [x.requires_grad for x in ours] == [True, False, False, False]
    gradients = (torch.autograd.grad(x[0], (hidden, weight)) for x in (ours, plain))
    for found, expected in [*zip(ours, plain), *zip(*gradients)]:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@methods
def test_kernels_small_coefficients_survive_float16(method):
    """beta / (P N) here is far below what float16 can hold; a loss scale brings it back exactly."""
    weights, group, ref = make_groups(60, 4)
    pairs = weights.double(), group, ref.double(), 1e-6
    hidden, weight, target = make_head(60, 50, 16, torch.float16)
    wide = as_float64(hidden, weight)
    loss = kernels.ddpo_loss(hidden, weight, target, *pairs, method=method)[0]
    truth = reference.ddpo_loss(*wide, target, *pairs)[0]
    ours = torch.autograd.grad(loss * 2.0**24, (hidden, weight))
    for a, b in zip(ours, torch.autograd.grad(truth * 2.0**24, wide)):
        assert (a - b).norm() < 3e-3 * b.norm()


@backends
@methods
def test_kernels_frozen_parts_and_determinism(method, backend, pieces):
    """No dW for a frozen head, no dH for frozen hidden states. Nothing else changes by a bit."""
    *tensors, target = make_head(90, 300, 16, torch.float16)

    def run(*trained):
        hidden, weight = (x.detach().requires_grad_(how) for x, how in zip(tensors, trained))
        results = kernels.ddpo_loss(
            hidden, weight, target, *make_groups(90, 5), 0.5, True, 0.1, method, backend)
        results += (kernels.token_logp(hidden, weight, target, method, backend),)
        (results[0] + results[-1].sum()).backward()
        return *results, hidden.grad, weight.grad

    first = run(True, True)
    for trained in ((True, True), (True, False), (False, True)):
        for wanted, found, expected in zip((True,) * 5 + trained, run(*trained), first):
            assert torch.equal(found, expected) if wanted else found is None


@backends
def test_kernels_equal_policy_and_reference_score_alike(backend):
    """The reference pass (A) and the training pass (B) round alike: rewards start at zero."""
    args = (*make_head(64, 500, 32, torch.float16), *make_groups(64, 4)[:2])
    with torch.no_grad():
        scores = kernels.ddpo_loss(*args, torch.zeros(8).to(DEVICE), 0.5, backend=backend)[3]
    _, *rewards, _ = kernels.ddpo_loss(*args, scores, 0.5, backend=backend)
    assert torch.cat(rewards).abs().max() < 1e-3


def test_kernels_autocast_and_second_backward():
    """Autocast changes nothing; a second backward is refused."""
    args = (*make_head(30, 40, 8), *make_groups(30, 3), 0.5)
    expected = kernels.ddpo_loss(*args)[3]
    with torch.autocast(DEVICE, torch.bfloat16):
        loss, *_, scores = kernels.ddpo_loss(*args)
        loss.backward(retain_graph=True)
    assert torch.equal(scores, expected) and args[0].grad.dtype == torch.float32
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU kernels/bench.py measures this")
@methods
@pytest.mark.parametrize("job", [bench_head.FORWARD, bench_head.GRADIENTS, bench_head.DDPO])
def test_kernels_never_hold_the_logits(job, method, monkeypatch):
    """Peak memory besides inputs and gradients is below a quarter of the (R, V) logits."""
    for name in ("CHUNK_ELEMENTS", "SLICE_ELEMENTS"):
        monkeypatch.setattr(fused, name, {"cpu": 2**16})
    monkeypatch.setattr(fused, "SLICE_LEAST", 64)
    inputs = bench_head.Inputs(
        *make_head(1024, 2048, 16), torch.ones(1024), (*make_groups(1024, 64), 0.5))
    ours = kernels.ddpo_loss if job == bench_head.DDPO else kernels.token_logp
    run = lambda: bench_head.run_job(job, lambda *args: ours(*args, method=method), inputs)
    assert 0 < bench_head.peak_memory(run, inputs) < 1024 * 2048 * 4 / 4


def test_kernels_flops():
    """Matrix products at the size of a 7B model, counted on the meta device: B is at the floor."""
    R, V, D = 6400, 32064, 4096
    with torch.device("meta"):
        hidden, weight = (torch.empty(n, D, dtype=torch.bfloat16).requires_grad_() for n in (R, V))
        row, number, scores = torch.empty(R), torch.empty(R).long(), torch.empty(64)

    def products(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops() / (2 * R * V * D)

    for method, trained, expected in (
        ("chunks", True, 3), ("chunks", False, 2), ("slices", True, 4), ("slices", False, 3),
    ):
        weight.requires_grad_(trained)
        args = (hidden, weight, number, row, number, scores, 0.5, True, 1.0, method)
        assert products(lambda: kernels.ddpo_loss(*args)[0].backward()) == expected
    with torch.no_grad():
        assert products(lambda: kernels.token_logp(hidden, weight, number)) == 1
        assert products(lambda: kernels.ddpo_loss(*args)) == 1


def test_kernels_choice_of_backend(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = torch.zeros(1, 1)
    for variable, argument, phrase in (
        ("", "triton", "needs a GPU, hidden is on cpu: set TRITON_INTERPRET=1"),
        ("triton", None, "needs a GPU"), ("cuda", None, "must be one of .*, got 'cuda'")):
        monkeypatch.setenv("PLUMBLINE_KERNELS", variable)
        with pytest.raises(ValueError, match=phrase):
            kernels.choose_backend(argument, cpu)
    assert kernels.choose_backend("torch", cpu).forward_logp is None  # the argument wins
    monkeypatch.delenv("PLUMBLINE_KERNELS")
    assert kernels.choose_backend(None, cpu).logp_rows is reference.logp_rows
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton is not installed"):
        kernels.choose_backend("triton", cpu)
    with pytest.raises(ValueError, match="method must be one of .*, got 'fast'"):
        kernels.choose_method("fast")


def put(place, value):
    return lambda tensor: tensor.index_put((torch.tensor(place),), torch.tensor(value).to(tensor))


BAD_KERNEL_INPUTS = [  # argument, what happens to its right value, message
    ("target", put(7, 20), "target 20 in row 7 is outside the vocabulary of 20 tokens"),
    ("target", put(3, -100), "target -100 in row 3 is outside"),
    ("target", lambda x: x[:5], r"target must have one entry per row of hidden, \(12,\), got \(5,"),
    ("hidden", lambda x: x[:, :3], r"same D, got \(12, 3\) and \(20, 4\)"),
    ("hidden", put(5, math.inf), "hidden states of row 5 contain NaN or infinity"),
    ("hidden", lambda x: x * 1e38, "logits of row 0 overflow torch.float32"),
    ("weight", put(6, math.nan), "vocabulary matrix .* first for token 6"),
    ("weight", lambda x: x.half(), "share one dtype .* got torch.float32 and torch.float16"),
    ("weight", lambda x: x.to("meta"), "must be on one device, got .*, meta"),
    ("reference", lambda x: x[:3], r"reference must be \(2P,\), a score per response: \(3,\)"),
    ("reference", lambda x: x[:2], "group 2 in row 6 is not one of the 2 responses"),
    ("group", put([6, 7, 8], 1), "response 2 is empty"),
    ("group", put(4, 3), "group 1 in row 5 is smaller than the group before it: sort the rows"),
    ("group", put(0, -1), "group -1 in row 0 is not one of the 4 responses"),
    ("group", lambda x: x.int(), "group must be torch.long"),
    ("segment_weight", lambda x: x[1:], "segment_weight must have one entry per row"),
    ("beta", lambda x: 0.0, "beta must be above 0"),
    ("bounds", lambda x: [0, 3, 6, 12], "bounds must be 5 numbers from 0 to 12"),
    ("bounds", lambda x: [0, 3, 6, 9, 11], "bounds must be 5 numbers from 0 to 12"),
    ("bounds", lambda x: [0, 3, 3, 9, 12], "response 1 is empty"),
    ("anchor", lambda x: -1.0, "anchor must not be below 0"),
]


@methods
@pytest.mark.parametrize("name, change, message", BAD_KERNEL_INPUTS)
def test_kernels_bad_input(name, change, message, method):
    hidden, weight, target = (x.detach() for x in make_head(12, 20, 4))
    args = dict(
        hidden=hidden, weight=weight, target=target, segment_weight=torch.ones(12, device=DEVICE),
        group=torch.arange(12, device=DEVICE) // 3, reference=torch.zeros(4).to(DEVICE), beta=0.5,
        anchor=0.0, bounds=None)
    args[name] = change(args[name])
    with pytest.raises(ValueError, match=message):
        kernels.ddpo_loss(**args, method=method)
    if name in ("hidden", "weight", "target"):
        with pytest.raises(ValueError, match=message):
            kernels.token_logp(args["hidden"], args["weight"], args["target"], method)


# Triton without a GPU ------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels run directly")
def test_kernels_interpreted():
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "backend_triton"],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0 and re.search(r"\d\d passed", run.stdout), run.stdout


SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
TRITON_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name, D", [
    ("tile_logp", 4096), ("tile_logp", 80), ("tile_logp", 81), ("logp_rows", 0),
    ("gradient_rows", 0)])
@pytest.mark.parametrize("dtype", TRITON_TYPES, ids=str)
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_kernels_compile_ahead_of_time(arch, dtype, name, D, tmp_path):
    """Compile for sm_<arch> as a first launch would: within shared memory, no register spilled.

    D = 4096 is a whole number of steps, D = 80 is not, and rows of 81 are not aligned.
    """
    triton = pytest.importorskip("triton")
    from kernels import triton_forward, triton_rows

    kernel = getattr(triton_forward if D else triton_rows, f"{name}_kernel")
    types = {"tile_logp": "*{0} *{0} *i64 *fp32 *fp32 i32 i32 i32",
             "logp_rows": "*{0} *i64 *fp32 *fp32 i32 i32",
             "gradient_rows": "*{0} *fp32 *i64 *fp32 i32 i32"}[name]
    constants, options = dict(BLOCK=triton_rows.BLOCK), triton_rows.OPTIONS
    if D:
        tile = triton_forward.choose_tile(dtype, divmod(arch, 10), D)
        if tile.copied:
            types = types.replace("*{0} *{0}", "tensordesc<{0}[%d,%d]> tensordesc<{0}[%d,%d]>" % (
                tile.rows, tile.width, tile.vocab, tile.width))
        constants = dict(TILE_R=tile.rows, TILE_V=tile.vocab, TILE_D=tile.width,
                         COPIED=tile.copied, WHOLE_D=D % tile.width == 0, PRECISION="ieee")
        options = dict(num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)
    names = [name for name in kernel.arg_names if name not in constants]
    kinds = dict(zip(names, types.format(TRITON_TYPES[dtype]).split()))
    places = [kernel.arg_names.index(name) for name in names  # multiples of 16
              if name != "R" and "tensordesc" not in kinds[name]]
    compiled = triton.compile(
        triton.compiler.ASTSource(
            kernel, dict.fromkeys(kernel.arg_names, "constexpr") | kinds, constants,
            {(place,): [["tt.divisibility", 16]] for place in places}),
        target=triton.backends.compiler.GPUTarget("cuda", arch, 32), options=options)
    if D and arch == 90 and dtype != torch.float32:
        assert "wgmma" in compiled.asm["ptx"]
        assert ("cp.async.bulk" in compiled.asm["ptx"]) == (D % 8 == 0)
    assert compiled.metadata.shared <= SHARED_LIMIT[arch]
    # Read from the cubin, as only the one of Triton's two ptxas that made it knows the PTX.
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", tmp_path / "kernel.cubin"],
        capture_output=True, text=True, check=True).stdout
    assert re.findall(r"(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"]


# The benchmarks ------------------------------------------------------------------------------


def table_rows(shown):
    """The rows of a Markdown table among what was printed."""
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]]
                      for line in shown.splitlines() if line.startswith("|"))
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_kernels_bench(capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)  # takes half a minute
    bench.main("--pairs 2 --response 5 --width 8 --vocab 30 --repeats 1".split())
    shown = capsys.readouterr().out
    errors = [float(row["off by"]) for row in table_rows(shown) if "ours" in row["by"]]
    assert len(errors) == 10 and "R = 20 response tokens" in shown
    assert max(errors) < (1e-5 if DEVICE == "cpu" else 0.05), shown


def test_kernels_bench_generate(capsys):
    bench.main("--generate --random --batch 4 --tokens 3 --repeats 1".split())
    shown = capsys.readouterr().out
    assert "0.3 M parameters" in shown
    rows = table_rows(shown)
    assert [(row["prompts"], row["samples"], row["by"]) for row in rows] == [
        (prompts, samples, by) for prompts, samples in ("41", "14")
        for by in ("transformers", "ours")]
    assert rows[0]["x transformers"] == "1" and rows[0]["tokens each"] == "58"
    assert all(float(row["tokens/s"]) > 0 and float(row["x transformers"]) > 0 for row in rows)


def test_kernels_bench_step(capsys):
    """On a small model; TRL need not be installed."""
    bench.main("--step --pairs 2 --repeats 1 --width 64".split())
    shown = capsys.readouterr().out
    assert f"M parameters; trunk {298 if DEVICE == 'cpu' else 618} tokens" in shown
    seconds = {row["a step by"]: float(row["s"]) for row in table_rows(shown)}
    for row in ("ours", "ours, + once / 3", "ours, recomputing", "ours, recomputing, + once / 3"):
        assert seconds[row] > 0


TINY_GPU = bench_gpu.Sizes(
    "cpu", LLaVAConfig(VisionConfig(16, 32, 2, 2, image_size=28),
                       TextConfig(100, 64, 176, 2, 4, 2, 256), image_token=98, pad_token=99),
    checked=(2, 5, 16, 60), head=(2, 5, 16, 60), pairs=2, question=5, response=8, rank=4,
    batches=(2,), new_tokens=5, compiled=(False,), repeats=2, matrix=64, world=("--steps", "3"))
GPU_ROWS = {  # rows, and columns that hold numbers above 0
    bench_gpu.loss_head: (36, ("ms", "x floor")),
    bench_gpu.lora_steps: (2, ("pairs/s", "MFU %", "decoder %", "head %", "backward %")),
    bench_gpu.full_steps: (2, ("pairs/s", "MFU %", "decoder %", "head %", "backward %")),
    bench_gpu.decoding: (1, ("tokens/s", "bandwidth %", "first run, s")),
    bench_gpu.ppo_rollout: (1, ("tokens/s", "first run, s")),
}


@pytest.mark.parametrize("part", GPU_ROWS)
def test_kernels_bench_gpu_parts(part, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.chdir(tmp_path)
    rows, (count, columns) = list(part(TINY_GPU)), GPU_ROWS[part]
    assert len(rows) == count
    missing = {"Liger", "cut-cross-entropy", "TRL (chunks)"}
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        missing.add("F.linear_cross_entropy")
    for row in rows:
        absent = row.get("by") in missing
        assert ("error" in row) == absent, row
        assert absent or all(row[column] > 0 for column in columns), row
    if "decoder %" in columns:
        shares = [value for name, value in rows[0].items() if name[-1] == "%" and name != "MFU %"]
        assert sum(shares) == pytest.approx(100)


def test_kernels_bench_gpu_counts_the_flops_of_a_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes, text = replace(TINY_GPU, question=40, response=60), TINY_GPU.model.text
    start, config = bench_gpu.make_start(sizes, 0), ddpo.DDPOConfig(batch_size=2, micro_batch=2)
    examples = bench_gpu.make_examples(sizes, 2)
    steps = loop.Loop(ddpo.DDPO(start, config, Data(examples)), start, Data(examples))
    blocks = sum(w.numel() for w in start.model.decoder.layers.parameters() if w.ndim > 1)
    length = len(examples[0].prompt) + 2 * 60
    by_hand = 2 * 6 * (blocks * length + text.vocab_size * text.hidden_size * 120)
    assert 1 < bench_gpu.step_flops(steps) / by_hand < 1.3  # and attention, and the projector
    assert config.micro_batch == 2


def test_kernels_bench_gpu_runs_the_world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = []

    def run(command):
        given.append(command)
        Path("ddpo").mkdir()
        scores = [{"hallucination/any": {"value": value}, "coverage": {"value": 90}}
                  for value in (94.0, 40.0)]
        both = {name: (each, []) for name, each in zip(("before", "after"), scores)}
        metrics.write_results("ddpo/results.json", both)

    monkeypatch.setattr(train, "main", run)
    rows = list(bench_gpu.world_run(TINY_GPU))
    assert rows[0] == {"measure": "hallucination/any", "before": 94.0, "after": 40.0}
    assert rows[2]["measure"] == "seconds" and train.parse(given[0])[0].dtype == "bfloat16"


def test_kernels_bench_gpu_goes_on_when_a_part_fails(tmp_path, monkeypatch, capfd):
    parts = {bench_gpu.decoding: 900, bench_gpu.loss_head: 0, bench_gpu.check_kernels: 900}
    monkeypatch.setattr(bench_gpu, "LIMIT", 2000)  # on a busy machine
    monkeypatch.setattr(bench_gpu, "PARTS", parts)
    out = tmp_path / "gpu.json"
    bench_gpu.main(bench_gpu.Options(str(out)), replace(TINY_GPU, new_tokens=0))
    found = json.loads(out.read_text())
    version = torch.__version__.partition("+")[0]
    assert f"torch {version}" in found["versions"] and found["date"] and found["device"]
    failed, stopped, right = found["parts"]
    assert failed["error"].startswith("ValueError: a prompt of") and failed["rows"] == []
    assert stopped["error"] == "stopped after 0 s"
    assert right["error"] is None and len(right["rows"]) == 7
    assert all(row["right"] for row in right["rows"])
    shown = capfd.readouterr().out
    assert shown.split() == (tmp_path / "gpu.md").read_text().split()
    assert "Failed: stopped after 0 s" in shown
    assert "| segment_reduce " in shown


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_kernels_bench_gpu_without_a_gpu():
    with pytest.raises(SystemExit, match="torch finds none on this machine"):
        bench.main(["--gpu"])
