"""Tests of reward.py, ppo.py, rollouts.py, preferences.py, rlhf.py and of collect.rankings."""

import copy
import json
import math
import random

import pytest
import torch
from torch import nn

import collect
import data
import ppo
import reward
import rollouts
import sft
import train
import world
from checkpoint import save_llava
from model import LLaVA, LLaVAConfig, TextConfig, add_adapter, carriers, init_weights, use_adapter
from preferences import Prompt, Ranked, Reader
from rows import DataError
from vision import ImageSettings, VisionConfig

# ================================================================================ fixtures


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    data.train_tokenizer(sft.world_texts(40), path, 700)
    return data.Tokenizer(path)


@pytest.fixture(scope="module")
def tiny(tokenizer):
    text = TextConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256)
    model = LLaVA(LLaVAConfig(
        vision=VisionConfig(16, 32, 2, 2, image_size=12, patch_size=4), text=text,
        image_token=tokenizer.image_token, pad_token=tokenizer.pad_token,
        eos_token=tokenizer.eos_token)).eval()
    init_weights(model, 0)
    return model


def make_prompt(tokenizer, i=0, question="Describe it.", facts=("a car", "a dog", "a tree"), **kw):
    features = torch.randn(9, 16, generator=torch.Generator().manual_seed(i))
    tokens = data.prompt_tokens(tokenizer, data.prompt_text(question), 9)
    return Prompt(f"row {i}", features, tokens, question, list(facts), **kw)


def make_pair(tokenizer, i=0, **kw):
    texts = f"There is a car. {'A dog. ' * (i % 3)}", "A tree at the top."
    return Ranked(make_prompt(tokenizer, i, **kw), *(tokenizer.encode(t, eos=True) for t in texts))


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
def test_reward_is_read_at_the_requests_last_token(tiny, tokenizer, words):
    prompt = make_prompt(tokenizer)
    answers = [tokenizer.encode("car " * words, eos=True), tokenizer.encode("a dog", eos=True)]
    judge = reward.Judge(tiny)
    nn.init.normal_(judge.weight, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        both = judge(reward.judge_batch(tiny, tokenizer, [(prompt, answers)], (0,)))
        facts = reward.shuffled(prompt.facts, 0, prompt.name)
        for answer, found in zip(answers, both):
            text = tokenizer.encode(f"USER: {data.judging_request(facts)} ASSISTANT:")
            plain = torch.tensor([prompt.tokens + answer[:-1] + text])
            hidden = tiny(prompt.image[None], plain)[0, -1]
            torch.testing.assert_close(found, hidden @ judge.weight + judge.bias, atol=1e-5, rtol=0)
    assert tokenizer.decode(plain[0]).endswith("ASSISTANT:")


def test_request_has_the_form_of_the_bases_lessons(tokenizer):
    answer, facts = "There is a car.", ["a car", "a dog"]
    lesson = tokenizer.encode(
        f"\nDescribe it. ASSISTANT: {answer} USER: {data.judging_request(facts)} ASSISTANT:")
    ours = (tokenizer.encode("\nDescribe it. ASSISTANT:")
            + reward.judged(tokenizer, tokenizer.encode(answer, eos=True), facts).tokens[:-1])
    assert ours == lesson


def test_facts_change_only_the_request(tiny, tokenizer):
    answer = tokenizer.encode("There is a car.", eos=True)
    without, given = (reward.judged(tokenizer, answer, facts).tokens for facts in ((), ["a dog"]))
    assert without[: len(answer) - 1] == given[: len(answer) - 1] == answer[:-1]
    assert without != given
    rows = [(make_prompt(tokenizer, facts=()), [answer, answer[:3]])]
    batches = [reward.judge_batch(tiny, tokenizer, rows, (seed,)) for seed in (0, 1)]
    assert torch.equal(batches[0].tokens, batches[1].tokens)


def test_facts_are_shuffled_by_seed_alike_for_both_answers(tiny, tokenizer):
    facts = [f"fact {i}" for i in range(6)]
    assert reward.shuffled(facts, 1, "a") == reward.shuffled(facts, 1, "a")
    assert sorted(reward.shuffled(facts, 1, "a")) == facts
    assert len({tuple(reward.shuffled(facts, seed, "a")) for seed in range(20)}) > 10
    prompt = make_prompt(tokenizer, facts=facts)
    batch = reward.judge_batch(tiny, tokenizer, [(prompt, [[5, 6], [7, 8, 9]])], (3,))
    ends = [tokenizer.decode(batch.tokens[0][batch.branch[0] == k].tolist()) for k in (1, 2)]
    assert ends[0].partition("Facts")[2] == ends[1].partition("Facts")[2] != ""


def test_verdict_head_is_log_odds_of_yes(tiny, tokenizer):
    judge = reward.Judge(tiny)
    judge.start_from_verdict(tokenizer)
    pair = make_pair(tokenizer)
    batch = reward.pair_batch(tiny, tokenizer, [pair], (0,))
    hidden = tiny(batch.images, batch.tokens, batch.position, batch.branch).flatten(0, 1)
    logits = tiny.head(hidden[batch.source])
    yes, no = (tokenizer.encode(word)[0] for word in ("Yes.", "No."))
    torch.testing.assert_close(judge(batch), logits[:, yes] - logits[:, no], atol=1e-5, rtol=1e-4)


def test_a_reward_model_learns_a_simple_preference(tiny, tokenizer):
    pairs = [make_pair(tokenizer, i) for i in range(8)]
    config = reward.RMConfig(batch_size=8, micro_batch=4, head="zero", epochs=20)
    judge = reward.Judge(copy.deepcopy(tiny))
    algorithm = reward.RewardModel(judge, tokenizer, config, 0, pairs, pairs, {})
    assert algorithm.measure()[0]["agreement"]["value"] == 0.5  # all rewards are 0: ties count half
    optimizer = torch.optim.Adam(algorithm.modules.parameters(), 3e-3)
    for step in range(10):
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


def make_scorer(tiny, tokenizer, **changes):
    judge = reward.Judge(tiny)
    judge.start_from_verdict(tokenizer)
    return reward.Scorer(judge, tokenizer, ppo.PPOConfig(micro_batch=2, **changes))


def test_scorer_adds_the_rules(tiny, tokenizer):
    rows = [(make_prompt(tokenizer, 0, truth="no"), [tokenizer.encode("No.", eos=True), [9, 9]])]
    parts = make_scorer(tiny, tokenizer)(rows, (0, 0))
    assert parts["symbolic"].tolist() == [1.0, 0.0]  # 2.0 x 0.5
    assert parts["no_end"].tolist() == [0.0, -8.0]
    lengths = torch.tensor([len(answer) for answer in rows[0][1]])
    torch.testing.assert_close(parts["length"], -10 * lengths / 896)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rewards_that_are_no_numbers_are_an_error_that_names_prompts(tiny, tokenizer, value):
    scorer = make_scorer(tiny, tokenizer)
    with torch.no_grad():
        scorer.judge.bias.fill_(value)
    with pytest.raises(ValueError, match="NaN or infinity for 2 of 2 answers .to row 0."):
        scorer([(make_prompt(tokenizer), [[5], [6]])], (0,))


# ============================================================================ reward: on the disk


def test_head_is_saved_and_refused_elsewhere(tiny, tokenizer, tmp_path):
    judge, again = reward.Judge(tiny), reward.Judge(tiny)
    judge.start_from_verdict(tokenizer)
    origin = reward.lineage(tokenizer, "abc", facts=True)
    reward.save_head(judge, tmp_path, origin)
    reward.load_head(again, tmp_path, origin)
    assert torch.equal(judge.weight, again.weight)
    with pytest.raises(ValueError, match="another base"):
        reward.load_head(again, tmp_path, {**origin, "base": "xyz"})
    with pytest.raises(ValueError, match="another tokenizer"):
        reward.load_head(again, tmp_path, {**origin, "tokenizer": "xyz"})
    with pytest.raises(ValueError, match="with facts, not without facts"):
        reward.load_head(again, tmp_path, reward.lineage(tokenizer, "abc", facts=False))
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


def test_four_adapters_are_four_models(tiny, tokenizer):
    """Over one base, each adapter computes what a separate model with its weights computes."""
    shared = copy.deepcopy(tiny)
    names = ("policy", "critic", "reward", "reference")
    for seed, name in enumerate(names):
        add_adapter(shared, name, 4, 16.0, seed=seed)
        for module in carriers(shared, name):
            nn.init.normal_(module.adapters[name].B, 0, 0.2,
                            generator=torch.Generator().manual_seed(seed))
    batch = rollouts.answer_batch(shared, [(make_prompt(tokenizer), [[5, 6, 7], [8, 9]])])
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
        judge.start_from_verdict(tokenizer)
        with use_adapter(shared, "policy"):  # whatever is in use around it
            states = hidden.flatten(0, 1)[batch.source]
            assert torch.equal(judge(batch), (states * judge.weight).sum(-1) + judge.bias)
    assert len({tuple(values.tolist()) for values in found.values()}) == 4


def test_temperature_divides_the_logits(tiny, tokenizer):
    batch = rollouts.answer_batch(tiny, [(make_prompt(tokenizer), [[5, 6, 7]])])
    hidden = tiny(batch.images, batch.tokens, batch.position, batch.branch).flatten(0, 1)
    logits = tiny.head(hidden[batch.source]) / 0.7
    expected = logits.log_softmax(-1)[torch.arange(3), batch.target]
    torch.testing.assert_close(rollouts.Role(tiny).logp(batch, 0.7), expected, atol=1e-5, rtol=1e-5)


# ================================================================================= ppo: training


def make_ppo(model, tokenizer, prompt_count=8, reward_function=None, **changes):
    settings = {"rollout_size": 4, "batch_size": 2, "samples": 2, "micro_batch": 2,
                "max_new_tokens": 4, "epochs": 4, "learning_rate": 1e-3, **changes}
    config = ppo.PPOConfig(**settings)
    model, reference = copy.deepcopy(model), copy.deepcopy(model)
    critic = reward.Judge(copy.deepcopy(model))
    count = lambda rows: torch.tensor([float(len(a)) for _, answers in rows for a in answers])
    reward_function = reward_function or (lambda rows, seeds: {"rm": count(rows)})
    rows = []
    prompts = [make_prompt(tokenizer, i) for i in range(prompt_count)]
    algorithm = ppo.PPO(
        rollouts.Role(model), rollouts.Role(reference), critic, reward_function, tokenizer, config,
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


def test_first_step_has_ratio_1_and_no_kl(tiny, tokenizer):
    algorithm, rows = make_ppo(tiny, tokenizer)
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


def test_every_answer_of_a_rollout_is_seen_once_per_inner_epoch(tiny, tokenizer):
    algorithm, _ = make_ppo(tiny, tokenizer, inner_epochs=2)
    for first in (0, 2):
        seen = torch.cat([batch.old_logp for step in (first, first + 1)
                          for batch in algorithm.batches(step)])
        kept = algorithm.rollout.logp[algorithm.rollout.mask]
        assert torch.equal(seen.sort().values, kept.sort().values)


def test_batch_carries_each_answers_own_numbers(tiny, tokenizer):
    algorithm, _ = make_ppo(tiny, tokenizer)
    algorithm.batches(0)
    rollout = algorithm.rollout
    batch = algorithm.minibatch([3, 1])
    expected = [t for row in (3, 1) for answer in rollout.tokens[row] for t in answer]
    assert batch.target.tolist() == expected
    order = torch.tensor([6, 7, 2, 3])
    assert torch.equal(batch.advantages, rollout.advantages[order][rollout.mask[order]])


def test_ppo_finds_the_optimum_of_a_bandit(tiny, tokenizer):
    """One prompt, answers of one token, a reward for one of four tokens: it must take over."""
    favourite = 7
    good = lambda rows, seeds: {"rm": torch.tensor(
        [float(a[0] == favourite) for _, answers in rows for a in answers])}
    model = copy.deepcopy(tiny)
    with torch.no_grad():  # only tokens 5 to 8 are likely at first
        states = model(make_prompt(tokenizer).image[None],
                       torch.tensor([make_prompt(tokenizer).tokens]))[0, -1]
        model.head.weight[5:9] += 6 * states / states.square().sum()
    algorithm, _ = make_ppo(model, tokenizer, 1, good, rollout_size=1, batch_size=1, samples=32,
                            max_new_tokens=1, kl=0.0, learning_rate=3e-3, epochs=40)
    history, _ = optimise(algorithm, 50)
    assert history[0]["objective/scores"] < 0.6
    assert history[-1]["objective/scores"] > 0.95


def test_kl_penalty_pulls_the_policy_back(tiny, tokenizer):
    nothing = lambda rows, seeds: {"rm": torch.zeros(sum(len(answers) for _, answers in rows))}
    algorithm, _ = make_ppo(tiny, tokenizer, 1, nothing, rollout_size=1, batch_size=1, samples=32,
                            max_new_tokens=1, kl=1.0, kl_estimator="k1", epochs=40)
    with torch.no_grad():
        algorithm.policy.model.decoder.norm.weight.mul_(2.0)
    history, _ = optimise(algorithm, 40)
    assert history[0]["objective/kl"] > 0.5
    assert history[-1]["objective/kl"] < 0.6 * history[0]["objective/kl"]


def test_resuming_within_a_rollout_is_bit_exact(tiny, tokenizer):
    whole, _ = make_ppo(tiny, tokenizer, target_kl=1.0)
    expected, _ = optimise(whole, 8)
    first, _ = make_ppo(tiny, tokenizer, target_kl=1.0)
    _, optimizer = optimise(first, 6)  # 4 steps per rollout: 6 is in the middle of the second
    state = copy.deepcopy(first.state())
    second, _ = make_ppo(tiny, tokenizer, target_kl=1.0)
    second.modules.load_state_dict(first.modules.state_dict())
    again = torch.optim.Adam(second.modules.parameters(), second.config.learning_rate)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    second.load_state(state)
    optimise(second, 2, first=6, optimizer=again)
    for a, b in zip(whole.modules.parameters(), second.modules.parameters()):
        assert torch.equal(a, b)
    assert second.coefficient == whole.coefficient != whole.config.kl


def test_cut_answers_are_reported_once(tiny, tokenizer, capsys):
    algorithm, _ = make_ppo(tiny, tokenizer, max_new_tokens=1)
    optimise(algorithm, 5)
    said = capsys.readouterr().err
    assert said.count("were cut off at --max_new_tokens 1") == 1 and "%" in said


def test_rollouts_must_divide_into_minibatches(tiny, tokenizer):
    with pytest.raises(ValueError, match="no multiple of --batch_size 3"):
        make_ppo(tiny, tokenizer, batch_size=3)


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


def make_reader(folder, tokenizer, facts=True):
    looked = []
    see = lambda name, source: looked.append(source) or torch.zeros(9, 16)
    reader = Reader(see, tokenizer, 9, folder / "captions.json" if facts else None)
    return reader, looked


def test_ranked_pairs_are_read_with_their_facts(folder, tokenizer):
    reader, looked = make_reader(folder, tokenizer)
    (pair,) = reader.rankings(write_rows(folder), folder)
    assert tokenizer.decode(pair.chosen).strip() == "A cat." and pair.chosen[-1] == 2
    assert pair.prompt.facts == ["a car", "a dog"]
    assert make_reader(folder, tokenizer, facts=False)[0].rankings(
        write_rows(folder), folder)[0].prompt.facts == []
    reader.rankings(write_rows(folder), folder)
    assert len(looked) == 1  # an image is looked at once


def test_prompt_is_the_templates(folder, tokenizer):
    reader, _ = make_reader(folder, tokenizer)
    (prompt,) = reader.prompts(write_rows(folder, caption_type=6, length_bonus=0.5), folder)
    assert (prompt.truth, prompt.length_factor, prompt.picture) == ("no", 0.5, "a.png")
    assert prompt.tokens == data.prompt_tokens(tokenizer, data.prompt_text("What is it?"), 9)


def test_missing_captions_and_option_letters_are_named(folder, tokenizer):
    reader, _ = make_reader(folder, tokenizer)
    (folder / "captions.json").write_text(json.dumps({"b.png": ["a car"]}))
    with pytest.raises(DataError, match=r"rows.json row 1: no captions for .*a\.png"):
        make_reader(folder, tokenizer)[0].rankings(write_rows(folder), folder)
    with pytest.raises(DataError, match="row 1: the right option is C, but the question lists no"):
        reader.prompts(write_rows(folder, caption_type=4), folder)


def test_rankings_are_public_rows_and_prefer_the_truth(tiny, tokenizer, tmp_path, monkeypatch):
    """The model's answers are given, so that both truth and preference are known."""
    def said(model, tokenizer, settings, images, questions, samples, **_):
        asked.append(len(questions))
        texts = []
        for i in range(len(questions)):
            scene = world.make_scene(f"rankings 0 {i}", "test")
            texts += [world.describe(scene), world.describe(scene) + " There is a purple bus."]
        return texts

    asked = []
    monkeypatch.setattr(collect, "answers", said)
    path = collect.rankings(tiny, tokenizer, sft.WORLD_IMAGES, tmp_path, 20, 0, 0.0, "test")
    rows = json.loads(path.read_text())
    captions = json.loads((tmp_path / "image_to_caption.json").read_text())
    assert len(rows) == 20 and asked == [collect.CHUNK]
    assert all(row["preference"] == 1 and row["hallucination"] for row in rows)
    assert all(row["image"] in captions and (tmp_path / "images" / row["image"]).exists()
               for row in rows)
    reader = Reader(lambda *_: torch.zeros(9, 16), tokenizer, 9, tmp_path / "image_to_caption.json")
    pairs = reader.rankings([path], tmp_path / "images")
    assert len(pairs) == 20 and all(pair.prompt.facts for pair in pairs)


def test_world_prompts_know_their_truth(tokenizer, tmp_path):
    path = collect.prompts(sft.WORLD_IMAGES, tmp_path, 12, 0)
    reader = Reader(lambda *_: torch.zeros(9, 16), tokenizer, 9, tmp_path / "image_to_caption.json")
    prompts = reader.prompts([path], tmp_path / "images")
    assert [bool(prompt.truth) for prompt in prompts] == [i % 4 == 3 for i in range(12)]
    seeds = json.loads((tmp_path / "image_to_scene.json").read_text())
    for prompt in prompts:
        scene = world.make_scene(seeds[prompt.picture])
        assert sorted(prompt.facts) == sorted(world.facts(scene, random.Random(0)))


# ==================================================================== whole runs, through the files


@pytest.fixture(scope="module")
def material(tiny, tokenizer, tmp_path_factory):
    """A model's folder, ranked pairs, prompts, captions and images, as a user has them."""
    folder = tmp_path_factory.mktemp("material")
    half = (0.5, 0.5, 0.5)
    save_llava(tiny, tokenizer, ImageSettings(12, half, half, "pad"), folder / "base")
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
