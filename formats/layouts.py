"""The public files of a LLaVA model: names of tensors, config.json, processor and tokenizer files.

`checkpoint.py` moves the weights; this file has the names in public files, and the small files from
which `transformers` builds tokenizer and image processor.

The tensors of a model have three public spellings. All are read, the first is written:

    llava-hf                language_model.model.layers.0...    files on the hub
    transformers >= 4.52    model.language_model.layers.0...    its module tree
    original LLaVA          model.layers.0..., model.mm_projector.0...; with or without the tower
"""

import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from formats.files import brief, read_json
from formats.tokenizer import SYSTEM, Tokenizer, added_tokens, fast_tokenizer
from model import LLaVA, LLaVAConfig, TextConfig
from vision import ACTIVATIONS, CLIP_MEAN, CLIP_STD, ImageSettings, VisionConfig

# --------------------------------------------------------------------------------- names of tensors

# Our prefix, then every public spelling; the first is written. Whole names are looked up, never
# parsed, so one prefix may begin with another.
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
        "vision_model.", "",  # a separate CLIP; its vision half alone
    ),
}
# Inside the tower public names nest more deeply; inside the decoder they equal ours.
TOWER = {
    "pre_norm": "pre_layrnorm", "post_norm": "post_layernorm", "layers": "encoder.layers",  # sic
    "norm1": "layer_norm1", "norm2": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
    **{f"{of}_embedding": f"embeddings.{of}_embedding" for of in ("class", "patch", "position")},
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
}
# Buffers in old files, and the text half of a CLIP.
IGNORED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")
CLIP_TEXT = re.compile(r"^(text_model|text_projection|visual_projection|logit_scale)\b")


def public_names(name: str) -> list[str]:
    """Return every public spelling of one of our names; the first is the one to write."""
    part = next(part for part in PARTS if name.startswith(part))
    rest = name.removeprefix(part)
    if part == "vision_tower.":
        rest = ".".join(TOWER.get(word, word) for word in rest.split("."))
    return [spelling + rest for spelling in PARTS[part]]


# ------------------------------------------------------------------------------ reading config.json

# The defaults of `transformers` for fields that a config.json leaves out.
LLAMA = {"vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
CLIP = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 224, "patch_size": 32,
}
OPENAI_TOWERS = {"clip-vit-large-patch14-336": 336, "clip-vit-large-patch14": 224}  # pixels
LIMITS, LAYERS = {int: 2**24, float: 1e12}, 1000  # the largest sensible numbers
# The only values that model.py supports; the first stands for an absent field.
MODEL_VALUES = {  # of config.json and its text_config
    "model_type": ("llama", "llava", "llava_llama"), "hidden_act": ("silu",),
    "attention_bias": (False,), "mlp_bias": (False,), "tie_word_embeddings": (False,),
    "rope_scaling": (None,), "rope_type": ("default",), "quantization_config": (None,),
    "projector_hidden_act": ("gelu", "linear"), "multimodal_projector_bias": (True,),
    "vision_feature_select_strategy": ("default",), "mm_vision_select_feature": ("patch",),
    "mm_projector_type": ("linear", "mlp2x_gelu"), "mm_use_im_start_end": (False,),
    "image_aspect_ratio": ("square", "pad", None), "mm_patch_merge_type": ("flat",),
}
VISION_VALUES = {"model_type": ("clip_vision_model",), "hidden_act": ("quick_gelu", *ACTIVATIONS)}
IMAGE_VALUES = dict.fromkeys(("do_rescale", "do_normalize", "do_resize"), (True,)) | {
    "resample": (3,), "rescale_factor": (1 / 255,)}


def require_supported(file: Path, values: dict, allowed: dict[str, tuple]) -> None:
    """Raise ValueError for a value that the model would silently ignore."""
    for key, choices in allowed.items():
        value = values.get(key, choices[0])
        if value not in choices:
            known = " or ".join(dict.fromkeys(map(repr, choices)))
            raise ValueError(f"{file}: {key} is {brief(value)}, but only {known} is supported")


def shape(file: Path, kind: type, values: dict, defaults: dict):
    """Return a VisionConfig or TextConfig from public fields, which have the same names."""
    merged = defaults | {key: value for key, value in values.items() if value is not None}
    config = kind(**{f.name: merged[f.name] for f in fields(kind) if f.name in merged})
    for f in fields(kind):
        if f.type not in LIMITS:
            continue
        most = LAYERS if f.name == "num_hidden_layers" else LIMITS[f.type]
        if type(value := getattr(config, f.name)) not in (int, f.type) or not 0 < value <= most:
            raise ValueError(f"{file}: {f.name} is {brief(value)}, not a positive "
                             f"{f.type.__name__} up to {most:g}")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(f"{file}: hidden_size {config.hidden_size} is not a multiple of its "
                         f"{config.num_attention_heads} attention heads")
    return config


def text_config(file: Path, values: dict) -> TextConfig:
    values = (values.get("rope_parameters") or {}) | values  # rope_theta in transformers 5
    require_supported(file, values, MODEL_VALUES)
    heads = {"num_key_value_heads": values.get("num_attention_heads", 32)}
    text = shape(file, TextConfig, values, LLAMA | heads)
    require_supported(file, values, {"head_dim": (text.head_dim, None)})
    if text.num_attention_heads % text.num_key_value_heads:
        raise ValueError(f"{file}: {text.num_attention_heads} attention heads are not a multiple "
                         f"of num_key_value_heads {text.num_key_value_heads}")
    return text


def vision_config(file: Path, values: dict) -> VisionConfig:
    values = values.get("vision_config", values)  # of a whole CLIP, or of its vision half
    require_supported(file, values, VISION_VALUES)
    return shape(file, VisionConfig, values, CLIP)


def in_range(file: Path, config: LLaVAConfig) -> LLaVAConfig:
    """Return the config; ValueError for a token or layer that the model does not have."""
    depth, last = config.vision.num_hidden_layers, config.text.vocab_size - 1
    ranges = dict.fromkeys(("image_token", "pad_token", "eos_token"), (0, last))
    ranges["vision_feature_layer"] = (-depth - 1, depth)
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{file}: {name} is {brief(value)}, not one of {least} to {most}")
    return config


def llava_hf_config(file: Path, values: dict) -> LLaVAConfig:
    """Return the shapes in a llava-hf config.json, whose sections may be sparse."""
    require_supported(file, values, MODEL_VALUES)
    text, shapes = text_config(file, values["text_config"]), values.get("vision_config")
    vision = VisionConfig() if shapes is None else vision_config(file, shapes)
    image = values.get("image_token_index", values.get("image_token_id", 32000))
    eos = values["text_config"].get("eos_token_id", 2)
    pad = values.get("pad_token_id", values["text_config"].get("pad_token_id"))
    if pad in (None, eos):  # if padding were also end-of-sequence, answers could not end
        pad = image + 1 if image + 1 < text.vocab_size else 0
    layer, act = values.get("vision_feature_layer", -2), values.get("projector_hidden_act", "gelu")
    return in_range(file, LLaVAConfig(vision, text, image, pad, eos, layer, act))


def original_config(file: Path, values: dict, tower: Path | None) -> LLaVAConfig:
    """Return the shapes in an original LLaVA's config.json.

    The original code marks images by a negative id. Here, as in llava-hf, `<image>` and padding get
    the two rows after the vocabulary, which is rounded up to a multiple of 64.

    Args:
        tower: folder of the model's CLIP.
    """
    if "mm_vision_tower" not in values:
        raise ValueError(f"{file}: neither a llava-hf model (no text_config) nor an original "
                         "LLaVA model (no mm_vision_tower)")
    text = text_config(file, values)
    stored, name = text.vocab_size, Path(str(values["mm_vision_tower"])).name
    if tower is not None:
        vision = vision_config(tower / "config.json", read_json(tower / "config.json"))
    elif name in OPENAI_TOWERS:
        vision = VisionConfig(image_size=OPENAI_TOWERS[name])
    else:
        raise ValueError(f"{file}: mm_vision_tower {brief(name)} is not known; give the tower's "
                         "folder (--tower)")
    if vision.image_size != OPENAI_TOWERS.get(name, vision.image_size):
        raise ValueError(f"{tower}: a tower for pictures of {vision.image_size} pixels, but the "
                         f"model was trained with {name}")
    text = replace(text, vocab_size=-(-(stored + 2) // 64) * 64)
    eos, layer = values.get("eos_token_id", 2), values.get("mm_vision_select_layer", -2)
    act = "linear" if values.get("mm_projector_type", "linear") == "linear" else "gelu"
    return in_range(file, LLaVAConfig(vision, text, stored, stored + 1, eos, layer, act))


def image_settings(file: Path, values: dict, size: int, pad: bool) -> ImageSettings:
    """Return the image settings in a processor's file.

    Args:
        values: the file's content; {} stands for CLIP's settings.
        size: the tower's input size in pixels; a file with another one is an error.
        pad: whether to pad to a square if the file does not say.
    """
    values = values.get("image_processor", values)
    if values.get("do_pad") is not None:
        pad = bool(values["do_pad"])
    require_supported(file, values, IMAGE_VALUES | ({} if pad else {"do_center_crop": (True,)}))
    sides = values.get("size")
    if not pad and isinstance(sides, dict) and {k for k in sides if sides[k]} != {"shortest_edge"}:
        raise ValueError(f"{file}: size is {brief(sides)}, which would distort pictures; only "
                         "shortest_edge is supported")
    for key in ("size", "crop_size"):
        sides = values.get(key) or size
        if set(sides.values() if isinstance(sides, dict) else [sides]) - {size, None}:
            raise ValueError(
                f"{file}: {key} is {brief(sides)}, but the tower takes {size} pixels")
    mean, std = values.get("image_mean", CLIP_MEAN), values.get("image_std", CLIP_STD)
    for name, three, least in (("image_mean", mean, -10), ("image_std", std, 1e-6)):
        if len(three) != 3 or not all(least <= each < 10 for each in three):
            raise ValueError(f"{file}: {name} is {brief(three)}, not three numbers")
    return ImageSettings(size, tuple(mean), tuple(std), "pad" if pad else "crop")


# ---------------------------------------------------------------------- writing the llava-hf layout


def public_config(model: LLaVA, dtype: torch.dtype) -> dict:
    """Return config.json of the llava-hf layout, with every shape spelled out."""
    config, dtype = model.config, {"torch_dtype": str(dtype)[len("torch."):]}
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", **dtype,
        "image_token_index": config.image_token, "image_seq_length": config.vision.patches,
        "pad_token_id": config.pad_token, "projector_hidden_act": config.projector_hidden_act,
        "multimodal_projector_bias": True, "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": "default", "tie_word_embeddings": False,
        "text_config": {
            "architectures": ["LlamaForCausalLM"],  # by which servers find the language model
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
    """Return preprocessor_config.json."""
    # Only LLaVA's own processor can pad to a square; without padding it does what CLIP's does.
    size, pad = settings.size, settings.mode == "pad"
    return {
        "image_processor_type": "LlavaImageProcessor" if pad else "CLIPImageProcessor",
        "processor_class": "LlavaProcessor", **({"do_pad": True} if pad else {}),
        "do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": size}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": size, "width": size},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(settings.mean), "image_std": list(settings.std),
    }


MARKS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


# data.py's conversation, for the chat interfaces of `transformers` and of servers.
CHAT_TEMPLATE = (
    "{%- macro text(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for part in content if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}"
    "{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{%- endif -%}{%- endmacro -%}{{ '<s>' }}"
    "{%- if messages[0]['role'] == 'system' -%}{{ text(messages[0]['content']) }}"
    "{%- else -%}{{ '@SYSTEM@' }}{%- endif -%}"
    "{%- for message in messages if message['role'] != 'system' -%}"
    "{%- if message['role'] == 'user' -%}{{ (' ' if loop.first else '') + 'USER: ' }}"
    "{{ text(message['content']) }}"
    "{%- else -%}{{ ' ASSISTANT: ' + text(message['content']) + '</s>' }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}")


def public_files(
    model: LLaVA, tokenizer: Tokenizer, settings: ImageSettings, dtype: torch.dtype,
) -> dict[str, dict | str]:
    """Return the files from which `transformers` builds model, tokenizer and processor.

    Args:
        dtype: of the weights that are written.
    """
    added = added_tokens(tokenizer)
    decoder = {str(t["id"]): {k: t[k] for k in t if k != "id"} for t in added}
    return {
        "config.json": public_config(model, dtype),
        "chat_template.jinja": CHAT_TEMPLATE.replace("@SYSTEM@", SYSTEM.replace("'", "\\'")),
        "preprocessor_config.json": image_processor(settings),
        "processor_config.json": {
            "processor_class": "LlavaProcessor", "image_token": "<image>",
            "patch_size": model.config.vision.patch_size,
            "num_additional_image_tokens": 1,  # the class token, which "default" drops again
            "vision_feature_select_strategy": "default",
        },
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer", "processor_class": "LlavaProcessor",
            "legacy": True, "add_bos_token": True, "add_eos_token": False,
            "clean_up_tokenization_spaces": False, "padding_side": "left",
            "model_max_length": model.config.text.max_position_embeddings, **MARKS,
            "extra_special_tokens": {"image_token": "<image>"}, "added_tokens_decoder": decoder,
        },
        "special_tokens_map.json": MARKS,
        "tokenizer.json": fast_tokenizer(tokenizer.sp, added),
        "generation_config.json": {
            "bos_token_id": tokenizer.bos_token, "eos_token_id": tokenizer.eos_token,
            "pad_token_id": tokenizer.pad_token,
        },
    }
