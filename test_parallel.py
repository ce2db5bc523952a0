import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import parallel
import recipes
import train
from evaluation import memory
from formats import latest_state, load_llava, load_state
from test_all import ROOT, photos  # noqa: F401

# ==================================================================================== parallel.py

# Runs train.py for each list of arguments. The last process fails in a given way at a given step of
# runs in a folder "cut ...".
PROCESS = f'''
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import ddpo, parallel, torch, train
from formats import checkpoint, state
from formats.rows import DataError
from world import feedback

how, at, runs = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
one_step, save_file, loss = train.Loop.one_step, state.save_file, ddpo.DDPO.loss

def broken_step(self):
    now = how if self.step == at and self.folder.name.startswith("cut") else ""
    if now == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if now == "stopped":
        os.kill(os.getpid(), signal.SIGTERM)
    if now == "a bad row":
        raise DataError("rows.jsonl row 3: no such image")
    if now == "NaN":
        ddpo.DDPO.loss = lambda self, batch: (loss(self, batch)[0] * float("nan"), {{}})
    return one_step(self)

def broken_save(tensors, path, *rest):
    save_file(tensors, path, *rest)
    if how == "killed while saving" and f"checkpoint-{{at}}" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)

if int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
    train.Loop.one_step, state.save_file = broken_step, broken_save

class Counted(torch.Tensor):  # of the mapped file, which is read when a value is converted
    read = []

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if function is not torch.Tensor.to:
            return super().__torch_function__(function, types, arguments, options or {{}})
        rows = arguments[0].as_subclass(torch.Tensor)
        cls.read.append(rows.nbytes)
        return rows.to(**options)

def counted_weights(folder):
    return {{name: weight.as_subclass(Counted) for name, weight in open_weights(folder).items()}}

open_weights, checkpoint.open_weights = checkpoint.open_weights, counted_weights
parallel.join("cpu", lambda kind: False)
checkpoint.load_llava(train.recipes.SHIPPED["base"], dtype=torch.float32)
checkpoint.open_weights = open_weights
Path(f"read by {{parallel.rank()}}").write_text(str(sum(Counted.read)))

feedback.CHUNK = 16  # scenes at a time are enough
leave, parallel.leave = parallel.leave, lambda: None  # once for all runs
codes = [train.main(arguments) for arguments in runs]
leave()
sys.exit(max(codes))
'''


def processes(count, folder, *runs, how="", at=0):
    """Start train.py with each of the arguments in `count` processes, and wait for their end."""
    script = folder / "process.py"
    script.write_text(PROCESS)
    torchrun = ("torch.distributed.run", "--standalone", f"--nproc_per_node={count}", script)
    command = [sys.executable, "-m", *torchrun] if count > 1 else [sys.executable, script]
    runs = json.dumps([[str(each) for each in run] for run in runs])
    return subprocess.run(
        [*map(str, command), how, str(at), runs], cwd=folder, text=True, timeout=600,
        capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


PROMPTS = ("--prompts", 14, "--rollout_size", 6, "--batch_size", 3, "--samples", 2,
           "--test_scenes", 2, "--generate_batch", 4, "--max_new_tokens", 12,
           "--learning_rate", 1e-4)
RANKINGS = ("--rankings", 10, "--held_out", 5, "--batch_size", 5, "--learning_rate", 5e-6,
            "--centring", 0.5)
OWN = ("--data", "rows.jsonl", "--images", "photos", "--batch_size", 5)
PARALLEL_RUNS = {  # sizes that neither 2 nor 3 divides
    "ddpo": ("--algo", "ddpo", *OWN, "--learning_rate", 1e-4, "--micro_batch", 2),
    "ddpo_lora": ("--algo", "ddpo", *OWN, "--learning_rate", 1e-3, "--lora", 4,
                  "--gradient_checkpointing"),
    "ddpo_on_adapter": ("--algo", "ddpo", *OWN, "--learning_rate", 1e-4, "--model",
                        "../2/ddpo_lora/adapter"),
    "sft": ("--algo", "sft", "--data", "talk.json", "--images", "photos", "--batch_size", 4,
            "--micro_batch", 1, "--learning_rate", 2e-5),
    "sft_world": ("--algo", "sft", "--corrections", 7, "--batch_size", 4, "--learning_rate", 2e-5,
                  "--test_scenes", 3),  # measures first what no other run has measured
    "rm": ("--algo", "rm", *RANKINGS),
    "rm_lora": ("--algo", "rm", *RANKINGS, "--lora", 4),
    "ppo": ("--algo", "ppo", "--reward_model", "../2/rm", *PROMPTS),
    "ppo_lora": ("--algo", "ppo", "--reward_model", "../2/rm_lora", *PROMPTS, "--lora", 4,
                 "--baseline", "critic"),
    "online_ddpo": ("--algo", "online_ddpo", "--prompts", 7, "--rounds", 2, "--batch_size", 3,
                    "--feedback", "reward_model", "--reward_model", "../2/rm", "--samples", 3,
                    "--test_scenes", 2, "--generate_batch", 2, "--max_new_tokens", 12,
                    "--learning_rate", 1e-4),
    "grpo": ("--algo", "grpo", "--reward_model", "../2/rm", *PROMPTS, "--loss_mean", "answers"),
}
COMPARED = [(name, count) for count in (2, 3) for name in PARALLEL_RUNS
            if count == 2 or name not in ("rm_lora", "ppo_lora", "ddpo_on_adapter")]


def parallel_run(name, out, *more):
    return (*PARALLEL_RUNS[name], "--out", out, "--steps", 5, "--log_every", 1, "--save_every", 3,
            *more)


@pytest.fixture(scope="session")
def parallel_runs(photos, tmp_path_factory):
    """Folders 1, 2, 3 with the runs of so many processes.

    In each, `cut by 2` is a DDPO run that 2 processes began; 1 and 3 processes finish it.
    """
    folder, talk = tmp_path_factory.mktemp("parallel"), []
    for i in range(7):  # two rows with an image, so that some processes get none
        asked = "<image>\nDescribe." if i < 2 else "Describe."
        talk.append({"id": str(i), "conversations": [
            {"from": "human", "value": asked}, {"from": "gpt", "value": "A car." + " Yes." * i}]})
        talk[-1] |= {"image": f"{i}.png"} if i < 2 else {}
    for count in (2, 1, 3):
        here = folder / str(count)
        shutil.copytree(photos, here / "photos")
        shutil.copy(photos / "rows.jsonl", here)
        (here / "talk.json").write_text(json.dumps(talk))
        runs = [parallel_run(name, name) for name in PARALLEL_RUNS
                if count == 1 or (name, count) in COMPARED]
        for other in {2: (), 1: (2,), 3: (1, 2)}[count]:
            shutil.copytree(folder / f"{other}/cut by {other}", here / f"cut by {other}")
            runs.append(parallel_run("ddpo", f"cut by {other}", "--resume"))
        if count == 3:  # the others have made the world's feedback for themselves
            shutil.copytree(folder / "2/runs", here / "runs")
        else:  # the last process alone is asked to stop; all stop at one step
            runs.append(parallel_run("ddpo", f"cut by {count}"))
        done = processes(count, here, *runs, how="stopped", at=3)
        assert (done.returncode == 0) == (count == 3), done.stderr
        ends = [done.stderr.count(said)
                for said in ("the model is in", "stopped and saved at step 4")]
        assert ends == ([len(runs), 0] if count == 3 else [len(runs) - 1, 1])  # one process prints
        assert done.stderr.count("resumed at step 4 of 5") == {2: 0, 1: 1, 3: 2}[count]
    return folder


def largest_difference(one, two, rounding=0.0):
    first, second = (load_file(folder / "model/model.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    return max(((first[name] - second[name]).abs() - rounding * first[name].abs()).max().item()
               for name in first)


@pytest.mark.parametrize("name, count", COMPARED)
def test_several_processes_get_the_result_of_one(parallel_runs, name, count):
    one, several = parallel_runs / "1" / name, parallel_runs / str(count) / name
    half = torch.finfo(torch.float16).eps if "--model" in PARALLEL_RUNS[name] else 0  # as the base
    assert -1e-9 <= largest_difference(one, several, half) <= 1e-5
    logs = [[json.loads(line) for line in (folder / "metrics.jsonl").open()]
            for folder in (one, several)]
    assert len(logs[0]) == len(logs[1]) == 5
    for mine, theirs in zip(*logs):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() - {"padding"}:  # padding depends on the micro-batches
            if "second" not in key:
                assert theirs[key] == pytest.approx(mine[key], rel=1e-3, abs=1e-5), key
    for file in ("samples.jsonl", "results.json", "reference.json", "adapter/adapter_config.json"):
        assert (one / file).exists() == (several / file).exists()
    if (one / "samples.jsonl").exists():  # the same completions, each written once
        answers = [[json.loads(line)["answer"] for line in (folder / "samples.jsonl").open()]
                   for folder in (one, several)]
        assert answers[0] == answers[1]


def test_a_process_reads_its_rows_of_the_weights_alone(parallel_runs):
    file = recipes.SHIPPED["base"] / "model.safetensors"
    parts = [(len(w), w[0].nbytes, "vision_tower" in name) for name, w in load_file(file).items()]
    for count in (1, 2, 3):
        whole = [height * row for height, row, tower in parts if tower or count == 1]
        for rank in range(count):  # cut as Tensor.chunk cuts; the tower is replicated
            rows = [len((torch.arange(height).chunk(count)[rank:] or [()])[0]) * row
                    for height, row, tower in parts if not tower and count > 1]
            read = int((parallel_runs / f"{count}/read by {rank}").read_text())
            assert read == sum(whole + rows)


def test_any_number_of_processes_resumes(parallel_runs):
    whole = parallel_runs / "1/ddpo"
    for cut in (parallel_runs / "2/cut by 2", parallel_runs / "1/cut by 1"):
        assert [path.name for path in cut.glob("*checkpoint*")] == ["checkpoint-4"]
        assert not list(cut.rglob("*.pt"))  # nothing is pickled
    stored = load_file(parallel_runs / "2/cut by 2/checkpoint-4/weights-00001-of-00002.safetensors")
    model = load_llava(recipes.SHIPPED["base"])[0]
    said = memory.per_gpu(model.config, 2, lora=0, rows=1, recompute=False)
    said = said["gradients"] + said["optimizer"]  # as large as the trained weights and the moments
    assert said <= sum(rows.nbytes for rows in stored.values()) < 1.01 * said
    for before, after in ((2, 1), (1, 3), (2, 3)):
        resumed = parallel_runs / f"{after}/cut by {before}"
        assert not list(resumed.glob("checkpoint-*"))
        assert largest_difference(whole, resumed) <= 1e-5
    here = parallel_runs / "2"
    done = processes(2, here, parallel_run("ddpo", "cut by 2", "--resume"))
    assert done.returncode == 0 and "resumed at step 4 of 5" in done.stderr, done.stderr
    assert largest_difference(here / "ddpo", here / "cut by 2") == 0


@pytest.mark.parametrize("how, said", [
    ("killed", "error: another process of this run ended"),
    ("killed while saving", "error: another process of this run ended"),
    ("a bad row", "error: rows.jsonl row 3: no such image"),
    ("NaN", r"error: the loss is nan at step 5 \(rows: .*checkpoint-4"),
])
def test_one_failing_process_ends_all(parallel_runs, how, said):
    run = parallel_runs / "2" / f"cut by {how}"
    started = time.time()
    failed = processes(2, run.parent, parallel_run("ddpo", run.name, "--save_every", 2),
                       how=how, at=4)
    last_line = (run / "metrics.jsonl").stat().st_mtime
    assert time.time() - last_line < 60 and time.time() - started < 180
    assert failed.returncode != 0 and len(re.findall("^error: ", failed.stderr, re.M)) == 1
    assert re.search(said, failed.stderr)
    assert "train.py" not in failed.stderr.partition("Root Cause")[0]  # no traceback of ours
    last = latest_state(run)
    assert last.name == ("checkpoint-2" if "saving" in how else "checkpoint-4")
    assert load_state(last)[0]["step"] == int(last.name[-1])


def test_shares_are_as_many_on_every_process(monkeypatch):
    assert parallel.shares("abcde", 2) == [("ab", True), ("cd", True), ("e", True)]
    for rows, size, count in ((7, 2, 3), (1, 4, 3), (32, 32, 8), (5, 1, 2), (0, 3, 2), (9, 9, 2)):
        found, parts = [], []
        for rank in range(count):
            monkeypatch.setattr(parallel, "world", lambda: count)
            monkeypatch.setattr(parallel, "rank", lambda: rank)
            mine = parallel.shares(list(range(rows)), size)
            parts.append(len(mine))
            assert all(0 < len(part) <= size for part, _ in mine)
            found += [row for part, counts in mine for row in part if counts]
            chunk = torch.arange(rows).chunk(count)[rank:][:1]  # as DTensor cuts a dimension
            expected = chunk[0].tolist() if chunk else []
            assert list(range(rows))[parallel.rows_of(rows)] == expected
        assert sorted(found) == list(range(rows)) and len(set(parts)) == 1


def test_rows_of_like_length_are_computed_together_and_returned_as_given():
    rows, parts = ["ccc", "a", "dddd", "bb", "e"], []

    def codes(part):  # (2, E), an entry per letter
        parts.append(part)
        return torch.tensor([[ord(letter) for row in part for letter in row]]).repeat(2, 1)

    found = parallel.by_length(codes, rows, 2, length=len, entries=len)
    assert parts == [["a", "e"], ["bb", "ccc"], ["dddd"]]
    assert torch.equal(found, codes(rows))


def test_each_process_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="4 processes for 2 GPUs: use --nproc_per_node 2"):
        parallel.join("auto", lambda kind: True)


def test_a_pretraining_run_refuses_several_processes(monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: 2)
    with pytest.raises(ValueError, match="--algo vision runs in one process: python train.py"):
        recipes.plan(*train.parse(["--algo", "vision"]), train.ALGORITHMS)
