"""What the public files of a LLaVA model are called and what stands in them.

`checkpoint.py` moves weights; this file knows the spellings: names of tensors, fields of
config.json, and the small files from which `transformers` builds tokenizer and image processor.

The tensors of one model have been named in three ways. All are read, the first is written:

    llava-hf                language_model.model.layers.0...    what the hub holds
    transformers >= 4.52    model.language_model.layers.0...    what its module tree looks like
    original LLaVA          model.layers.0..., model.mm_projector.0...; the tower inside or apart
"""

import re
from dataclasses import asdict, fields, replace
from pathlib import Path

from model import LLaVA, LLaVAConfig, TextConfig
from vision import ACTIVATIONS, CLIP_MEAN, CLIP_STD, ImageSettings, VisionConfig

# --------------------------------------------------------------------------------- names of tensors

# Ours, then every public spelling; the first is written. A whole name is looked up, never parsed,
# so that one prefix may begin with another.
PARTS = {
    "decoder.": ("language_model.model.", "model.language_model.", "model."),
    "head.": ("language_model.lm_head.", "lm_head."),
    "projector.linear_1.": (
        "multi_modal_projector.linear_1.", "model.multi_modal_projector.linear_1.",
        "model.mm_projector.0.", "model.mm_projector.",  # the last: LLaVA v1's only layer
    ),
    "projector.linear_2.": (
        "multi_modal_projector.linear_2.", "model.multi_modal_projector.linear_2.",
        "model.mm_projector.2.",
    ),
    "vision_tower.": (
        "vision_tower.vision_model.", "model.vision_tower.vision_model.",
        "vision_tower.", "model.vision_tower.",  # as saved by transformers 5
        "model.vision_tower.vision_tower.vision_model.",
        "vision_model.",  # a CLIP of its own
    ),
}
# Inside the tower the public files nest more deeply; inside the decoder the names are the same.
TOWER = {
    "class_embedding": "embeddings.class_embedding",
    "patch_embedding": "embeddings.patch_embedding",
    "position_embedding": "embeddings.position_embedding",
    "pre_norm": "pre_layrnorm",  # sic
    "post_norm": "post_layernorm",
    "layers": "encoder.layers",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
}
# Buffers that old files carry along, and the half of a CLIP that reads text.
IGNORED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")
CLIP_TEXT = re.compile(r"^(text_model|text_projection|visual_projection|logit_scale)\b")


def public_names(name: str) -> list[str]:
    """Every public spelling of one of our names, the one that is written first."""
    ours = next(part for part in PARTS if name.startswith(part))
    rest = name.removeprefix(ours)
    if ours == "vision_tower.":
        rest = ".".join(TOWER.get(word, word) for word in rest.split("."))
    return [spelling + rest for spelling in PARTS[ours]]


# ------------------------------------------------------------------------------ reading config.json

# What `transformers` assumes for fields that a config.json leaves out.
LLAMA = {"vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
CLIP = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 224, "patch_size": 32,
}
# The only values that model.py computes; the first is what an absent field means.
LLAVA_ONLY = {
    "model_type": ("llava",), "vision_feature_select_strategy": ("default",),
    "multimodal_projector_bias": (True,), "projector_hidden_act": ("gelu", "linear"),
    "quantization_config": (None,), "tie_word_embeddings": (False,),
}
TEXT_ONLY = {
    "model_type": ("llama", "llava", "llava_llama"), "hidden_act": ("silu",),
    "attention_bias": (False,), "mlp_bias": (False,), "rope_scaling": (None,),
    "rope_type": ("default",), "tie_word_embeddings": (False,), "quantization_config": (None,),
}
VISION_ONLY = {"model_type": ("clip_vision_model",), "hidden_act": ("quick_gelu", *ACTIVATIONS)}
ORIGINAL_ONLY = {
    "mm_projector_type": ("linear", "mlp2x_gelu"), "mm_vision_select_feature": ("patch",),
    "mm_use_im_start_end": (False,),
}
IMAGES_ONLY = {
    "resample": (3,), "do_rescale": (True,), "do_normalize": (True,), "do_resize": (True,),
}


def only(file: Path, values: dict, allowed: dict) -> None:
    """Refuse a field whose value would otherwise be ignored and every number be wrong."""
    for key, choices in allowed.items():
        value = values.get(key, choices[0])
        if value not in choices:
            known = " or ".join(repr(choice) for choice in dict.fromkeys(choices))
            raise ValueError(f"{file}: {key} is {value!r}, but only {known} is supported")


def shape(file: Path, kind: type, values: dict, defaults: dict):
    """A VisionConfig or TextConfig from public fields, which have the same names."""
    given = {key: value for key, value in values.items() if value is not None}
    merged = defaults | given
    config = kind(**{f.name: merged[f.name] for f in fields(kind) if f.name in merged})
    for f in fields(kind):
        value = getattr(config, f.name)
        if f.type in (int, float) and not (isinstance(value, int | float) and value > 0):
            raise ValueError(f"{file}: {f.name} is {value!r}, not a positive number")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"{file}: hidden_size {config.hidden_size} is no multiple of its "
            f"{config.num_attention_heads} attention heads"
        )
    return config


def text_config(file: Path, values: dict) -> TextConfig:
    values = (values.get("rope_parameters") or {}) | values  # transformers 5 keeps theta there
    only(file, values, TEXT_ONLY)
    heads = {"num_key_value_heads": values.get("num_attention_heads", 32)}
    text = shape(file, TextConfig, values, LLAMA | heads)
    if values.get("head_dim") not in (None, text.head_dim):
        raise ValueError(
            f"{file}: head_dim is {values['head_dim']}, but only hidden_size / "
            f"num_attention_heads = {text.head_dim} is supported"
        )
    return text


def vision_config(file: Path, values: dict) -> VisionConfig:
    values = values.get("vision_config", values)  # of a whole CLIP, or of its half that sees
    only(file, values, VISION_ONLY)
    return shape(file, VisionConfig, values, CLIP)


def feature_layer(file: Path, layer, vision: VisionConfig) -> int:
    depth = vision.num_hidden_layers
    if not isinstance(layer, int) or not -depth - 1 <= layer <= depth:
        raise ValueError(
            f"{file}: the vision feature layer is {layer!r}, not one of the tower's {depth} layers"
        )
    return layer


def llava_hf_config(file: Path, values: dict) -> LLaVAConfig:
    """Shapes from a llava-hf config.json, whose sections may be sparse."""
    only(file, values, LLAVA_ONLY)
    text = text_config(file, values["text_config"])
    tower = values.get("vision_config")
    vision = VisionConfig() if tower is None else vision_config(file, tower)
    image = values.get("image_token_index", values.get("image_token_id", 32000))
    eos = values["text_config"].get("eos_token_id", 2)
    pad = values.get("pad_token_id", values["text_config"].get("pad_token_id"))
    if pad in (None, eos):  # were padding also the end mark, answers could not end
        pad = image + 1 if image + 1 < text.vocab_size else 0
    for name, token in (("image token", image), ("padding", pad), ("end mark", eos)):
        if not isinstance(token, int) or not 0 <= token < text.vocab_size:
            raise ValueError(
                f"{file}: the {name} {token} is no row of the vocabulary of {text.vocab_size}"
            )
    layer = feature_layer(file, values.get("vision_feature_layer", -2), vision)
    act = values.get("projector_hidden_act", "gelu")
    return LLaVAConfig(vision, text, image, pad, eos, layer, act)


def original_config(file: Path, values: dict, tower: tuple[Path, dict] | None) -> LLaVAConfig:
    """Shapes from an original LLaVA's config.json; `tower` is its CLIP's file and content.

    That code marks images by a negative id outside the vocabulary. Here, as in llava-hf, `<image>`
    and padding get the next two rows, and the vocabulary is rounded up to a multiple of 64.
    """
    only(file, values, ORIGINAL_ONLY)
    text = text_config(file, values)
    stored = text.vocab_size
    name = str(values["mm_vision_tower"]).rstrip("/")
    known = {"clip-vit-large-patch14-336": 336, "clip-vit-large-patch14": 224}
    if tower is not None:
        vision = vision_config(*tower)
    elif name.rpartition("/")[2] in known:
        vision = VisionConfig(image_size=known[name.rpartition("/")[2]])
    else:
        raise ValueError(f"{file}: mm_vision_tower {name!r} is not known; give the tower's folder")
    layer = feature_layer(file, values.get("mm_vision_select_layer", -2), vision)
    one_layer = (values.get("mm_projector_type") or "linear") == "linear"
    return LLaVAConfig(
        vision, replace(text, vocab_size=-(-(stored + 2) // 64) * 64), stored, stored + 1,
        values.get("eos_token_id", 2), layer, "linear" if one_layer else "gelu",
    )


def image_settings(file: Path, values: dict, size: int, pad: bool) -> ImageSettings:
    """How pictures become pixels, from a processor's file.

    Args:
        values: the file's content; {} stands for CLIP's habits.
        size: pixels, what the tower takes; a file that says otherwise is an error.
        pad: whether to pad to a square if the file does not say.
    """
    values = values.get("image_processor", values)
    pad = bool(values.get("do_pad", pad))
    only(file, values, IMAGES_ONLY if pad else IMAGES_ONLY | {"do_center_crop": (True,)})
    for key in ("size", "crop_size"):
        sides = values.get(key) or size
        if set(sides.values() if isinstance(sides, dict) else [sides]) - {size, None}:
            raise ValueError(f"{file}: {key} is {sides}, but the tower takes {size} pixels")
    mean, std = values.get("image_mean", CLIP_MEAN), values.get("image_std", CLIP_STD)
    return ImageSettings(size, tuple(mean), tuple(std), "pad" if pad else "crop")


# ---------------------------------------------------------------------- writing the llava-hf layout


def public_config(model: LLaVA) -> dict:
    """config.json of the llava-hf layout, with every shape spelled out."""
    config = model.config
    dtype = {"torch_dtype": str(model.head.weight.dtype).removeprefix("torch.")}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava", **dtype,
        "image_token_index": config.image_token,
        "image_seq_length": config.vision.patches,
        "pad_token_id": config.pad_token,
        "projector_hidden_act": config.projector_hidden_act,
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": False,
            "eos_token_id": config.eos_token, "pad_token_id": config.pad_token,
            **dtype, **asdict(config.text),
        },
        "vision_config": {
            "model_type": "clip_vision_model", "projection_dim": config.vision.hidden_size,
            **dtype, **asdict(config.vision),
        },
    }


def image_processor(settings: ImageSettings) -> dict:
    # Only LLaVA's own processor can pad to a square; without padding it does what CLIP's does.
    kind = "LlavaImageProcessor" if settings.mode == "pad" else "CLIPImageProcessor"
    pad = {"do_pad": True} if settings.mode == "pad" else {}
    size = settings.size
    return {
        "image_processor_type": kind, "processor_class": "LlavaProcessor", **pad,
        "do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": size}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": size, "width": size},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(settings.mean), "image_std": list(settings.std),
    }


MARKS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def added_tokens(tokenizer) -> list[dict]:
    """The tokens that are looked for in a text before it is cut into pieces."""
    sp = tokenizer.sp
    ids = {i: sp.id_to_piece(i) for i in (sp.unk_id(), sp.bos_id(), sp.eos_id())}
    ids |= {tokenizer.image_token: "<image>", tokenizer.pad_token: "<pad>"}
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return [{"id": i, "content": ids[i], "special": True, **flags} for i in sorted(ids)]


def processor_files(config: LLaVAConfig, tokenizer, settings: ImageSettings) -> dict[str, dict]:
    """The files from which `transformers` builds tokenizer, image processor and generation."""
    added = added_tokens(tokenizer)
    decoder = {str(t["id"]): {k: t[k] for k in t if k != "id"} for t in added}
    return {
        "preprocessor_config.json": image_processor(settings),
        "processor_config.json": {
            "processor_class": "LlavaProcessor", "image_token": "<image>",
            "patch_size": config.vision.patch_size,
            "num_additional_image_tokens": 1,  # the class token, which "default" takes off again
            "vision_feature_select_strategy": "default",
        },
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer", "processor_class": "LlavaProcessor",
            "legacy": True, "add_bos_token": True, "add_eos_token": False,
            "clean_up_tokenization_spaces": False, "padding_side": "left",
            "model_max_length": config.text.max_position_embeddings, **MARKS,
            "extra_special_tokens": {"image_token": "<image>"}, "added_tokens_decoder": decoder,
        },
        "special_tokens_map.json": MARKS,
        "tokenizer.json": fast_tokenizer(tokenizer.sp, added),
        "generation_config.json": {
            "bos_token_id": tokenizer.bos_token, "eos_token_id": tokenizer.eos_token,
            "pad_token_id": tokenizer.pad_token,
        },
    }


def fast_tokenizer(sp, added: list[dict]) -> dict:
    """A sentencepiece BPE model as tokenizer.json, which opens without sentencepiece.

    BPE in sentencepiece joins the pair whose piece has the best score; in tokenizer.json it joins
    the pair that comes first in a list. So: every way to cut a piece in two, in order of scores.
    """
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    score = [sp.get_score(i) for i in range(sp.vocab_size())]
    special = lambda i: sp.is_control(i) or sp.is_byte(i) or sp.is_unknown(i)
    normal = [piece for piece, i in vocab.items() if not special(i)]
    merges = [
        (-score[vocab[piece]], vocab[piece[:cut]], vocab[piece[cut:]], piece[:cut], piece[cut:])
        for piece in normal for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    bos = sp.id_to_piece(sp.bos_id())
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        # Legacy: every stretch of text between added tokens begins with a space of its own.
        "normalizer": {
            "type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing", "single": [first, text[0]],
            "pair": [first, text[0], first | {"SpecialToken": {"id": bos, "type_id": 1}}, text[1]],
            "special_tokens": {bos: {"id": bos, "ids": [sp.bos_id()], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": sp.id_to_piece(sp.unk_id()),
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
            "byte_fallback": True, "vocab": vocab,
            "merges": [f"{left} {right}" for *_, left, right in sorted(merges)],
        },
    }
