"""What breaks in the wild: mutated files, and processes killed at any moment.

    MUTATIONS=10000 KILLS=100 pytest -q test_robustness.py       the long campaign

The default is 200 mutations and 10 kills. Each follows from a seed, which a failure names.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import data
import evaluate
from annotation import store
from evaluation import answers, parts, write_report
from formats import (
    captions_of, load_adapter, load_llava, load_state, open_image, read_captions,
    read_conversations, read_pairs, read_prompts, save_adapter, save_llava, save_state,
)
from formats.files import error_message
from lora import add_adapter
from test_all import (  # noqa: F401
    GOOD, IMAGES, ROOT, chat, evaluated_runs, human_preference, image_bytes, make_model, material,
    read_log, rlhf_v, tiny_world, tokenizer, write_bench_amber, write_lines, write_parquet,
)

MUTATIONS, KILLS = (int(os.environ.get(*each)) for each in (("MUTATIONS", 200), ("KILLS", 10)))

# ================================================================================== mutated files

NASTY = [
    None, True, -1, 0, 7, 0.5, 2**63, 10**400, 1e308, float("inf"), float("nan"), "", " ",
    "<image>", "x" * 30_000, "\ud800", "../../etc/passwd", "a\0b", "\x1b[31m", [], {}, [[]],
    {"a": {}}, [None], "[" * 50_000]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Change one value of JSON, of a line of JSON or of a safetensors header, or some bytes."""
    if rng.random() < 0.7:
        if content[8:9] == b"{" and len(content) > 8:  # safetensors
            size = int.from_bytes(content[:8], "little")
            header = changed(content[8 : 8 + size], rng)
            return len(header).to_bytes(8, "little") + header + content[8 + size :]
        lines = content.splitlines(keepends=True)
        for i in (*range(len(lines) > 1), rng.randrange(len(lines) or 1)):
            try:
                if i == 0:
                    return changed(content, rng)
                return b"".join([*lines[:i], changed(lines[i], rng) + b"\n", *lines[i + 1 :]])
            except ValueError:
                pass
    place, length = rng.randrange(len(content) + 1), rng.randrange(1, 40)
    noise = bytes(rng.randrange(256) for _ in range(length))
    before, after = content[:place], content[place + length :]
    return rng.choice([before, before + after, before + noise + content[place:],
                       before + noise + after, before + content[: place or 1] * 2, b"", noise])


def changed(text: bytes, rng: random.Random) -> bytes:
    """JSON with one value replaced, removed or repeated; ValueError if it is none."""
    value = json.loads(text)
    places, todo = [], [value]
    while todo:
        node = todo.pop()
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            todo += [node[key]] if isinstance(node[key], dict | list) else []
    how = rng.randrange(8)
    if not places or how == 0:
        return json.dumps(rng.choice(NASTY)).encode()
    node, key = rng.choice(places)
    if how == 1:
        del node[key]
    elif how == 2 and isinstance(node, list):
        node *= 2
    elif how == 2:
        return json.dumps(value).replace("{", '{"twice": 1, "twice": 2, ', 1).encode()
    else:
        node[key] = rng.choice(NASTY)
    return json.dumps(value).encode()


class Hang(BaseException):
    """A reader took too long."""


@contextmanager
def time_limit(seconds: int):
    def stop(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def good_files(tiny_world, tokenizer, evaluated_runs, tmp_path_factory):  # noqa: F811
    """A folder with one good file of every kind that is read."""
    at = tmp_path_factory.mktemp("fuzz") / "good"
    shutil.copytree(evaluated_runs, at)
    for i, (name, kind) in enumerate((("ok.jpg", "JPEG"), ("ok.png", "PNG"), ("ok.webp", "WEBP"))):
        (at / "images" / name).write_bytes(image_bytes(i, kind))
    write_lines(at / "pairs.jsonl", GOOD, human_preference(),
                {"image": "ok.jpg", "text": json.dumps({**GOOD, "history": [["A?", "B."]]})},
                {"images": ["ok.png"], "prompt": [{"role": "user", "content": "A?"}],
                 "chosen": "B", "rejected": [{"role": "assistant", "content": "C"}]})
    (at / "chats.json").write_text(json.dumps([
        chat("<image>\nA?", "B."), chat("A?", "B.", image=None)]))
    write_lines(at / "prompts.jsonl", chat("<image> A. B.", "B.", caption_type=3, length_bonus=0.5))
    write_lines(at / "captions.json", {"ok.jpg": ["A car."], "ok.png": ["A dog.", "A cat."]})
    write_parquet(at / "rows.parquet", rlhf_v(0), rlhf_v(1), rlhf_v(2))
    model = make_model(tiny_world.config.text, tokenizer.image_token, tokenizer.pad_token)
    save_llava(model, tokenizer, IMAGES, at / "model")
    add_adapter(model, "a", 2, 4.0)
    save_adapter(model, "a", at / "adapter")
    state = {"step": 1, "rng": torch.get_rng_state(), "algorithm": {"a": [1.0]}}
    save_state(at / "checkpoint-1", state, {"w": torch.ones(3, 2), "step of w": torch.ones(())})
    write_bench_amber(at / "amber")
    write_lines(at / "amber.json", *({"id": i, "response": "Yes"} for i in range(1, 9)))
    write_lines(at / "vqa.jsonl", *(
        {"image": f"{i}.png", "question": "?", "answers": ["a", "b", "b"]} for i in range(7)))
    write_lines(at / "coco.json", {
        "images": [{"id": 1, "file_name": "0.png"}], "categories": [{"id": 1, "name": "dog"}],
        "annotations": [{"image_id": 1, "category_id": 1}]})
    write_lines(at / "coco_captions.json", {
        "images": [{"id": 1, "file_name": "0.png"}],
        "annotations": [{"image_id": 1, "caption": "A cat."}]})
    write_lines(at / "corrections.jsonl", {
        "id": "1", "image": "ok.jpg", "question": "?", "chosen": "A", "rejected": "B",
        "status": "corrected", "segments": [], "annotator": "a", "seconds": 1})
    (at / "synonyms.txt").write_text("dog, puppy\nperson, man\n")
    (at / "eval_gpt4.py").write_text("template = '{} {} {} {}'\n")
    write_lines(at / "bad" / "samples.jsonl", {
        "step": 1, "question": "?", "answer": "A", "score": 1.0, "kl": 0.1, "tokens": 3,
        "ended": True, "false": ["A"]})
    write_lines(at / "bad" / "metrics.jsonl", {"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4})
    return at


def read_rows_of(read, file):
    """Read rows, open their images, and make tokens of pairs."""
    def check(at, tokenizer):  # noqa: F811
        for row in read([at / file], at / "images"):
            if row.image is not None:
                open_image(row.name, row.image)
                if "caption" in file:
                    captions_of(row.name, row.image, read_captions(at / "captions.json"))
            if read is read_pairs:
                prompt, both = data.pair_tokens(row, tokenizer, 9, 5.0)
                assert row.chosen.strip() and row.rejected.strip() and len(both) == 2
            if read is read_conversations:
                assert all(question and answer for question, answer in row.turns)
    return check


def use_model(at, tokenizer):  # noqa: F811
    model, _, _ = load_llava(at / "model")
    load_adapter(model, at / "adapter", "a")
    assert model.logits(None, torch.tensor([[1, 5, 6]])).shape[:2] == (1, 3)


def run(command: str):
    """Run evaluate.py; a failure has to be one error message, no traceback."""
    def check(at, tokenizer):  # noqa: F811
        status = evaluate.main(command.split())
        assert status in (0, 1)
    return check


READERS = {  # name: (the files to mutate, what reads them)
    "pairs": ("pairs.jsonl", read_rows_of(read_pairs, "pairs.jsonl")),
    "chats": ("chats.json", read_rows_of(read_conversations, "chats.json")),
    "prompts": ("prompts.jsonl", read_rows_of(read_prompts, "prompts.jsonl")),
    "parquet": ("rows.parquet", read_rows_of(read_pairs, "rows.parquet")),
    "captions": ("captions.json", lambda at, _: read_captions(at / "captions.json")),
    "images": ("images/ok.*", lambda at, _: [open_image("row 1", file) for file in
                                             sorted((at / "images").glob("ok.*"))]),
    "model": ("model/*", use_model), "adapter": ("adapter/*", use_model),
    "state": ("checkpoint-1/*", lambda at, _: load_state(at / "checkpoint-1")),
    "questions": ("rows.jsonl", lambda at, _: answers.read_questions(
        at / "rows.jsonl", at / "images")),
    "vqa questions": ("vqa.jsonl", lambda at, _: parts.vqa_part(
        at / "vqa.jsonl", str(at / "images"), None, None).ask()),
    "pope questions": ("rows.jsonl", lambda at, _: parts.pope_part(
        at / "rows.jsonl", str(at / "images"), None, None).ask()),
    "amber questions": ("amber/*", lambda at, _: [part.ask() for part in parts.amber_parts(
        at / "amber", str(at / "images"), None, None)]),
    "annotation": ("corrections.jsonl", lambda at, _: store.Store(
        [], at / "corrections.jsonl").file.close()),
    "answers to correct": ("rows.jsonl", lambda at, _: store.read_answers(
        at / "rows.jsonl", at / "images")),
    "report": ("bad/*", lambda at, _: write_report(at / "bad")),
    "pope": ("rows.jsonl wrong.jsonl", run("--pope rows.jsonl --answers wrong.jsonl")),
    "chair": ("truth.json captions.jsonl synonyms.txt",
              run("--chair truth.json --answers captions.jsonl --synonyms synonyms.txt")),
    "coco": ("coco*.json captions.jsonl",
             run("--chair coco.json coco_captions.json --answers captions.jsonl")),
    "vqa": ("vqa.jsonl wrong.jsonl", run("--vqa vqa.jsonl --answers wrong.jsonl")),
    "amber": ("amber/* amber.json", run("--amber amber --answers amber.json")),
    "mmhal": ("template.json replies.jsonl", run("--mmhal template.json --replies replies.jsonl")),
    "mmhal prompts": ("template.json eval_gpt4.py", run(
        "--mmhal template.json --judge_prompt eval_gpt4.py --model model --images images")),
    "compare": ("bad/results.json", run("--compare bad good")),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_mutated_file_is_read_or_named_in_a_sentence(
    reader, good_files, tokenizer, tmp_path, monkeypatch, capsys,  # noqa: F811
):
    patterns, read = READERS[reader]
    at = tmp_path / "here"
    names = [path.relative_to(good_files) for pattern in patterns.split()
             for found in sorted(good_files.glob(pattern))
             for path in ([found] if found.is_file() else sorted(found.rglob("*.*")))]
    shutil.copytree(good_files, at)
    monkeypatch.chdir(at)
    read(at, tokenizer)
    for i in range(-(-MUTATIONS // len(READERS))):
        rng = random.Random(f"{reader} {i}")
        name = rng.choice(names)
        good = (at / name).read_bytes()
        (at / name).write_bytes(mutated(good, rng))
        capsys.readouterr()
        try:
            with time_limit(20):
                read(at, tokenizer)
            lines = capsys.readouterr().err.splitlines()
            said = "".join(line for line in lines if "error:" in line)
        except (ValueError, OSError) as error:
            said = error_message(error)
        except BaseException as error:
            shutil.copy(at / name, Path(os.environ.get("KEEP", tmp_path)) / f"{i}-{name.name}")
            raise AssertionError(
                f"mutation {i} of {name}: {type(error).__name__} {str(error)[:200]}") from error
        longest = max(map(len, said.split("\n")))
        assert longest < 800, f"mutation {i} of {name}: {said[:300]} ... {said[-300:]}"
        shutil.rmtree("runs", ignore_errors=True)
        (at / name).write_bytes(good)


# ============================================================================== killed processes

# Imports train.py once, then runs it in a child for each line of arguments, and kills that after so
# many seconds. Prints the child's status: negative if it was killed.
SERVER = f'''
import json, os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train

for line in sys.stdin:
    arguments, log, seconds = json.loads(line)
    if not (child := os.fork()):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 1)
        os.dup2(1, 2)
        os._exit(train.main(arguments))
    stop = time.monotonic() + seconds
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > stop:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.001)
    print(os.waitstatus_to_exitcode(done[1]), flush=True)
'''


@pytest.fixture(scope="module")
def run_killed(tmp_path_factory):
    """A function that runs train.py, killed after some seconds; returns status and what it said."""
    folder = tmp_path_factory.mktemp("killed")
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True, cwd=folder,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})

    def run(arguments, seconds=600.0):
        log = folder / "said.txt"
        server.stdin.write(json.dumps([list(map(str, arguments)), str(log), seconds]) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline()), log.read_text()

    yield run
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="module")
def whole_runs(run_killed, material, tmp_path_factory):  # noqa: F811
    """Of each kind of run: its arguments but --out, the folder of an uninterrupted one, seconds."""
    own = ("--data", material / "rows.json", "--images", material / "images", "--model",
           material / "base", "--captions", material / "captions.json", "--log_every", 1,
           "--save_every", 2, "--batch_size", 4, "--learning_rate", 1e-3)
    folder, found = tmp_path_factory.mktemp("whole"), {}
    pairs = (*own[:6], *own[8:], "--steps", 9)
    for name, arguments in {
        "ddpo": ("--algo", "ddpo", *pairs), "lora": ("--algo", "ddpo", *pairs, "--lora", 2),
        "rm": ("--algo", "rm", "--facts", *own, "--steps", 6),
        "ppo": ("--algo", "ppo", "--facts", *own, "--reward_model", folder / "rm", "--steps", 5,
                "--rollout_size", 4, "--samples", 2, "--max_new_tokens", 6),
    }.items():
        started = time.monotonic()
        status, said = run_killed((*arguments, "--out", folder / name))
        assert status == 0, said
        found[name] = arguments, folder / name, time.monotonic() - started
    return found


@pytest.mark.parametrize("i", range(KILLS))
def test_killed_at_any_moment_and_resumed_is_the_same_run(i, whole_runs, run_killed, tmp_path):
    rng = random.Random(f"kill {i}")
    name = list(whole_runs)[i % len(whole_runs)]
    arguments, whole, seconds = whole_runs[name]
    out, moments = tmp_path / "run", []
    for _ in range(20):
        again = ("--resume",) if (out / "config.json").exists() else ()
        moments.append(rng.uniform(0, seconds) if len(moments) < rng.choice([1, 1, 2, 3]) else 600)
        status, said = run_killed((*arguments, "--out", out, *again), moments[-1])
        if status >= 0:
            break
    assert status == 0, f"{name} killed after {moments} s: {said}"
    files = ["model/model.safetensors", "samples.jsonl", "results.json"]
    if name == "lora":
        files.append("adapter/adapter_model.safetensors")
    for file in files:
        if (whole / file).exists():
            assert (out / file).read_bytes() == (whole / file).read_bytes(), (file, moments)
    logs = [[(line["step"], line["loss"]) for line in read_log(run)] for run in (out, whole)]
    assert logs[0] == logs[1], moments
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
