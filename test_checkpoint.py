"""Public layouts, adapters, tokens and pixels against the installed `transformers` and `peft`."""

import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

import checkpoint
import data
import files
import layouts
import model as models
from vision import ImageSettings, preprocess

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

PIECES, IMAGE, PAD, ROWS = 800, 800, 801, 832
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 14, "projection_dim": 32,
}
TEXT = {
    "vocab_size": ROWS, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD,
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
        text_config=transformers.LlamaConfig(**TEXT | dict(text)),
        vision_config=transformers.CLIPVisionConfig(**VISION | dict(vision)),
        image_token_index=IMAGE, pad_token_id=PAD, **top,
    )
    config.pad_token_id = PAD
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
def folder(public, tokenizer_model, tmp_path_factory) -> Path:
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
    tokens[:images, 2:6] = IMAGE
    mask = torch.ones_like(tokens)
    for i in range(images + 1):
        mask[i, length - 3 * i :] = 0
    return pixels, tokens.masked_fill(mask == 0, PAD), mask


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
    values = TEXT | {
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
    assert (tokenizer.image_token, tokenizer.pad_token, settings.mode) == (IMAGE, PAD, "pad")
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


def test_saving_and_loading_again_changes_nothing(folder, tmp_path):
    ours, tokenizer, settings = checkpoint.load_llava(folder)
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


def test_dtype_is_the_stored_one_or_the_one_asked_for(folder, tmp_path):
    ours, tokenizer, settings = checkpoint.load_llava(folder, dtype=torch.bfloat16)
    assert {w.dtype for w in ours.parameters()} == {torch.bfloat16}
    checkpoint.save_llava(ours, tokenizer, settings, tmp_path / "a")
    stored, *_ = checkpoint.load_llava(tmp_path / "a")
    assert {w.dtype for w in stored.parameters()} == {torch.bfloat16}
    kind = transformers.LlavaForConditionalGeneration
    theirs = kind.from_pretrained(tmp_path / "a", dtype="auto")
    assert theirs.dtype == torch.bfloat16


def test_a_mapped_model_can_be_trained_and_its_file_stays_as_it_is(folder):
    before = (folder / "model.safetensors").read_bytes()
    ours, *_ = checkpoint.load_llava(folder)
    with torch.no_grad():
        for weight in models.select_trainable(ours, tower=True):
            weight.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before


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


def test_greedy_answers_are_those_of_transformers(folder, public):
    ours, *_ = checkpoint.load_llava(folder)
    rng = random.Random(0)
    lengths = [rng.randrange(2, 12) for _ in range(20)]
    prompts = [[1] + [rng.randrange(3, PIECES) for _ in range(length)] for length in lengths]
    for prompt in prompts[::2]:  # every other one has an image
        prompt[1:1] = [IMAGE] * 4
    pixels = torch.randn(10, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    mine = models.generate(ours, pixels, [torch.tensor(p) for p in prompts], max_new_tokens=24)
    steps = set()
    for i, prompt in enumerate(prompts):
        image = {"pixel_values": pixels[i // 2 : i // 2 + 1]} if i % 2 == 0 else {}
        theirs = public.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **image,
            do_sample=False, max_new_tokens=24, suppress_tokens=[IMAGE, PAD],
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


def test_our_adapter_in_peft(folder, public, tmp_path):
    ours, tokenizer, settings = checkpoint.load_llava(folder)
    models.add_adapter(ours, "policy", rank=4, alpha=6, seed=1)
    models.add_adapter(ours, "critic", rank=2, alpha=2, targets=("q_proj", "v_proj"), seed=2)
    assert_equal_logits(ours, public)
    for name in ("policy", "critic"):
        with models.use_adapter(ours, name):
            assert_equal_logits(ours, public)  # B is zero as yet
        randomise(models.select_trainable(ours, name))
        checkpoint.save_adapter(ours, name, tmp_path / name, base=folder)
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
def test_their_adapter_here(folder, tmp_path, targets):
    # Bare names would match the tower's projections too, which carry no adapters here.
    pattern = rf".*language_model.*\.{targets}"
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=pattern)
    theirs = peft.get_peft_model(public_model(), config)
    randomise(w for w in theirs.parameters() if w.requires_grad)
    theirs.save_pretrained(tmp_path / "adapter")
    ours, *_ = checkpoint.load_llava(folder)
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


def test_adapters_are_drawn_from_their_seed_alone(folder):
    drawn = []
    for seed in (3, 3, 4):
        torch.rand(1)
        ours, *_ = checkpoint.load_llava(folder)
        models.add_adapter(ours, "a", rank=4, alpha=4, seed=seed)
        drawn.append(torch.cat([w.flatten() for w in models.select_trainable(ours, "a")]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_gradients_with_checkpointing_are_those_of_the_adapter_in_use(folder):
    """Backward runs after the `with` block and recomputes: it must still see the same adapter."""
    grads = []
    for checkpointing in (False, True):
        ours, *_ = checkpoint.load_llava(folder)
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
def saved(folder, tmp_path_factory):
    """(folder that we saved, our tokenizer, AutoTokenizer and AutoProcessor of that folder)."""
    path = tmp_path_factory.mktemp("saved") / "model"
    ours, tokenizer, settings = checkpoint.load_llava(folder)
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
        assert not {0, 1, 2, PAD} & set(ids) and saved.tokenizer.decode(ids) == text


def test_the_labels_are_the_answer_as_transformers_tokenizes_the_conversation(saved):
    """Prompt and answer tokenized apart must be the whole tokenized at once, or labels shift."""
    for answer in ("Two red cars.", "The bridge is old, and 日本 😀.", "No"):
        text = data.prompt_text("What is in this image?")
        whole = saved.theirs(f"{text} {answer}</s>").input_ids
        prompt = data.prompt_tokens(saved.tokenizer, text, patches=1)
        tokens = saved.tokenizer.encode(answer, eos=True)
        assert prompt + tokens == whole
        example = data.Example("row", None, prompt, [data.Response(tokens, [1.0] * len(tokens))])
        batch = data.collate([example], PAD, 1000)
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
def test_pixels_are_those_of_the_public_processors(folder, tmp_path, mode, size):
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
def test_a_bad_folder_is_one_sentence(folder, tmp_path, name):
    spoil, message = BAD_FOLDERS[name]
    shutil.copytree(folder, tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        checkpoint.load_llava(tmp_path / "model")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_index_that_names_a_missing_shard(folder, tmp_path):
    checkpoint.save_llava(*checkpoint.load_llava(folder), tmp_path / "m", shard_bytes=60_000)
    shard = sorted((tmp_path / "m").glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"names {shard.name}"):
        checkpoint.load_llava(tmp_path / "m")


def test_pickles_are_refused_with_the_command_that_converts_them(folder, public, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
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


def test_adapters_for_another_base_are_refused(folder, tmp_path, tokenizer_model):
    ours, tokenizer, settings = checkpoint.load_llava(folder)
    models.add_adapter(ours, "a", rank=2, alpha=2)
    checkpoint.save_adapter(ours, "a", tmp_path / "a", base="my-llava")
    half, *_ = checkpoint.load_llava(folder, dtype=torch.bfloat16)
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


def test_unknown_adapter_names_are_told_apart(folder):
    ours, *_ = checkpoint.load_llava(folder)
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


def test_a_folder_of_something_else_is_not_overwritten(folder, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        checkpoint.save_llava(*checkpoint.load_llava(folder), tmp_path)
    assert (tmp_path / "thesis.tex").exists()
