"""LLaVA-RLHF's two runs, put together: data, models and files of the reward model and of PPO.

    python train.py --algo rm --facts       ranked pairs of the base's own answers -> a reward model
    python train.py --algo ppo --facts      the reward model (made first, if need be) -> a policy

With `--lora` policy, critic and reward model are three adapters over the one base and the reference
is the base itself; without it they are four models, which only small ones allow.
"""

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from random import Random

import torch

import checkpoint
import collect
import features
import lessons
import ppo
import reward
import rollouts
import world
from config import Run
from files import read_json
from model import add_adapter, carriers, deepen, select_trainable
from preferences import Prompt, Ranked, Reader
from prepare import BASE, WORLD, on_world
from rows import DataError

JUDGE = BASE.parent / "judge"  # shipped: the base after lessons in judging
SHOWN = 8  # answers of every rollout that go into samples.jsonl


# ------------------------------------------------------------------------------------------- data


def world_folder(run: Run, model, name: str) -> Path:
    """Where the built-in world's data for this base and seed is kept."""
    return WORLD / f"{name}-{checkpoint.fingerprint(model)[:8]}-{run.seed}"


def make_reader(
    run: Run, config, model, tokenizer, settings, world_data: Path | None, folder: Path
) -> Reader:
    """A reader of rows; captions lie in the built-in world's data, or where the user says.

    `folder` is the run's own: it takes features of more images than memory should hold.
    """
    captions = config.captions
    if config.facts and world_data:
        captions = world_data / "image_to_caption.json"
    if config.facts and not captions:
        raise ValueError("--facts needs captions of the images: --captions image_to_caption.json")
    skip = [] if run.skip_bad_rows else None
    kept = None if world_data else folder
    look = lambda named: features.look(model, settings, named, kept, stop=skip is None)
    return Reader(
        look, tokenizer, model.config.vision.patches, captions if config.facts else None, skip)


def report_skipped(reader: Reader) -> None:
    if reader.skip:
        print(f"{len(reader.skip)} rows left out:", *reader.skip, sep="\n  ", file=sys.stderr)


def ranked_pairs(
    run: Run, config, model, tokenizer, settings, folder: Path
) -> tuple[list[Ranked], list[Ranked]]:
    """Pairs to learn from and pairs held out.

    On the built-in world the held-out pairs are ranked without noise, on scenes of the test split;
    of a user's pairs a tenth is held out, at most `held_out`.
    """
    if not on_world(run):
        reader = make_reader(run, config, model, tokenizer, settings, None, folder)
        pairs = reader.rankings(run.data, run.images)
        report_skipped(reader)
        Random(f"held out {run.seed}").shuffle(pairs)
        kept = min(config.held_out, len(pairs) // 10)
        return pairs[kept:], pairs[:kept]
    both = []
    for split, count, noise in (("train", config.rankings, config.noise),
                                ("test", config.held_out, 0.0)):
        if not count:
            both.append([])
            continue
        made = world_folder(run, model, f"rankings-{split}-{count}-{noise}")
        path = made / "preferences.json"
        if not path.exists():
            print(f"collecting {count} ranked pairs of the base's answers in {made}",
                  file=sys.stderr)
            collect.rankings(model, tokenizer, settings, made, count, run.seed, noise, split)
        reader = make_reader(run, config, model, tokenizer, settings, made, folder)
        both.append(reader.rankings([path], made / "images"))
    return tuple(both)


def make_truth(folder: Path | None) -> Callable[[Prompt, str], list[str] | None]:
    """The false parts of an answer on the built-in world; None elsewhere."""
    if folder is None:
        return lambda prompt, text: None
    seeds = read_json(folder / "image_to_scene.json")
    scene_of = lru_cache(maxsize=None)(lambda picture: world.make_scene(seeds[picture]))

    def false_parts(prompt: Prompt, text: str) -> list[str]:
        if prompt.truth:
            return [] if text.lower().startswith(prompt.truth.lower()) else [text]
        found = world.hallucinations(scene_of(prompt.picture), text)
        return [text[span.start : span.end] for span in found]

    return false_parts


# ------------------------------------------------------------------------------------------ models


def judge_start(run: Run) -> Path | None:
    """The folder of what a reward model starts from in place of the base; None: from the base.

    A reward model has to compare answers with captions, and so small a base as the built-in one
    cannot. (An adapter has to lie over the base itself, as the policy's does: not with --lora.)
    """
    if run.model or not on_world(run) or run.lora:
        return None
    if JUDGE.exists() and not run.from_scratch:
        return JUDGE
    return WORLD / ("judge" if run.seed == 0 else f"judge-seed{run.seed}") / "model"


def missing_judge(run: Run) -> tuple[Run, lessons.JudgeConfig] | None:
    """The run that teaches the built-in world's base to judge, if a reward model needs it."""
    model = judge_start(run)
    if model is None or (model / "config.json").exists():
        return None
    out = model.parent
    print(f"judge: not found in {out}, making it first", file=sys.stderr)
    first = Run(algo="judge", out=str(out), seed=run.seed, device=run.device, dtype=run.dtype,
                from_scratch=run.from_scratch, resume=(out / "config.json").exists())
    return first, lessons.JudgeConfig()


def make_reward_model(
    run: Run, config, model, tokenizer, settings, folder: Path
) -> reward.RewardModel:
    """The algorithm that trains a reward model on top of `model`.

    The pairs of the built-in world are answers of `model`, which then takes the judge's weights.
    """
    pairs, held_out = ranked_pairs(run, config, model, tokenizer, settings, folder)
    origin = reward.lineage(tokenizer, checkpoint.fingerprint(model), config.facts)
    if start := judge_start(run):
        taught, _, _ = checkpoint.load_llava(start, model.head.weight.device, torch.float32)
        deepen(model, len(taught.decoder.layers) - len(model.decoder.layers))
        model.load_state_dict(taught.state_dict())
    adapter = "default" if run.lora else None
    if adapter:
        add_adapter(model, adapter, run.lora, run.lora_alpha, seed=run.seed)
    select_trainable(model, adapter)
    judge = reward.Judge(model, adapter)
    return reward.RewardModel(judge, tokenizer, config, run.seed, pairs, held_out, origin)


def reward_folder(run: Run, config, model) -> Path:
    """The run of the reward model that PPO uses."""
    if config.reward_model:
        return Path(config.reward_model)
    if not on_world(run):
        raise ValueError("PPO needs a reward model: --reward_model with the folder of a run of "
                         "python train.py --algo rm")
    kind = ("facts" if config.facts else "plain") + (f"-lora{run.lora}" if run.lora else "")
    return world_folder(run, model, f"rm-{kind}")


def missing_reward(run: Run, config, model) -> tuple[Run, reward.RMConfig] | None:
    """The run that makes the built-in world's reward model, if there is none yet."""
    folder = reward_folder(run, config, model)
    if config.reward_model or (folder / reward.HEAD).exists():
        return None
    print(f"reward model: not found in {folder}, making it first", file=sys.stderr)
    first = replace(run, algo="rm", out=str(folder), overwrite=False,
                    resume=(folder / "config.json").exists())
    return first, reward.RMConfig(facts=config.facts)


def load_judge(model, tokenizer, folder: Path, adapter: str | None, origin: dict) -> reward.Judge:
    """The reward model of a run: a named adapter over `model`, or (None) a model of its own."""
    if not (folder / reward.HEAD).exists():
        raise FileNotFoundError(f"{folder}: no reward model in it ({reward.HEAD} is missing); make "
                                "one with python train.py --algo rm")
    if adapter:
        if not (folder / "adapter").exists():
            raise ValueError(f"{folder}: a reward model without adapter; with --lora PPO needs one "
                             "that was trained with --lora too")
        checkpoint.load_adapter(model, folder / "adapter", adapter)
        judge = reward.Judge(model, adapter)
    else:
        device = model.head.weight.device
        judge = reward.Judge(checkpoint.load_llava(folder / "model", device, torch.float32)[0])
    reward.load_head(judge, folder, origin)
    return judge


def make_roles(
    run: Run, config, model, tokenizer
) -> tuple[rollouts.Role, rollouts.Role, reward.Judge, reward.Judge]:
    """Policy, reference, critic and reward model; the first and the third are to be trained."""
    folder = reward_folder(run, config, model)
    origin = reward.lineage(tokenizer, checkpoint.fingerprint(model), config.facts)
    if run.lora:
        add_adapter(model, "default", run.lora, run.lora_alpha, seed=run.seed)
        policy, reference = rollouts.Role(model, "default"), rollouts.Role(model, None)
        judge = load_judge(model, tokenizer, folder, "reward", origin)
        critic = load_judge(model, tokenizer, folder, "critic", origin)
        select_trainable(model, "default")
        for module in carriers(model, "critic"):
            module.adapters["critic"].requires_grad_(True)
        for module in carriers(model, "default"):  # what the result is measured with
            module.active = "default"
    else:
        policy = rollouts.Role(model)
        reference = rollouts.Role(copy.deepcopy(model).requires_grad_(False))
        judge = load_judge(model, tokenizer, folder, None, origin)
        critic = reward.Judge(copy.deepcopy(judge.model))
        for trained in (model, critic.model):
            select_trainable(trained)
        critic.model.head.requires_grad_(False)  # the critic has no use for a vocabulary
        judge.requires_grad_(False)
    with torch.no_grad():  # values start at 0, whatever the reward model's level is
        critic.weight.zero_(), critic.bias.zero_()
    return policy, reference, critic, judge


def make_ppo(run: Run, config, model, tokenizer, settings, folder: Path) -> ppo.PPO:
    """The algorithm that trains `model` as a policy; sampled answers go to folder/samples.jsonl."""
    data, patterns, images = None, run.data, run.images
    if on_world(run):
        data = WORLD / f"prompts-{config.prompts}-{run.seed}"
        if not (data / "prompts.json").exists():
            collect.prompts(settings, data, config.prompts, run.seed)
        patterns, images = [data / "prompts.json"], data / "images"
    reader = make_reader(run, config, model, tokenizer, settings, data, folder)
    prompts = reader.prompts(patterns, images)
    report_skipped(reader)
    longest = max(len(prompt.tokens) for prompt in prompts)
    context = model.config.text.max_position_embeddings
    if longest + config.max_new_tokens > context:
        raise DataError(f"the longest prompt has {longest} tokens and answers may have "
                        f"{config.max_new_tokens}, but the context holds {context}; "
                        "use a smaller --max_new_tokens")
    policy, reference, critic, judge = make_roles(run, config, model, tokenizer)

    def record(rows: list[dict]) -> None:
        with (folder / "samples.jsonl").open("a") as file:
            for row in rows[:: max(1, len(rows) // SHOWN)]:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    return ppo.PPO(policy, reference, critic, reward.Scorer(judge, tokenizer, config), tokenizer,
                   config, run.seed, prompts, make_truth(data), record)
