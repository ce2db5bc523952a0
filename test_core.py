# ================================================================================ fixtures

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


# ==================================================================================== ddpo


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


# ==================================================================================== data


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


# =================================================================================== model


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
    mask = model_module.attention_mask(torch.tensor([[0, 0, 1, 2, 2, -1]]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


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
