"""LoRA adapters in PEFT's format: `peft` loads ours over the public model, and we load its own.

An adapter fits only the base that it was trained on. Ours carry the base's fingerprint in the
file's metadata and are refused over any other.
"""

from pathlib import Path

import torch

import formats.layouts as layouts
import parallel
import sharding
from formats.checkpoint import fingerprint, match
from formats.files import (
    atomic_folder, brief, open_file, open_pickle, read_json, write_atomic, write_tensors,
)
from lora import LoRALinear, add_adapter, lora_layers
from model import LLaVA
from vision import ImageSettings

WRAPPER = "base_model.model."  # PEFT's prefix of module paths
# The only supported settings; the first stands for an absent field.
SUPPORTED = {
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "use_rslora": (False,),
    "fan_in_fan_out": (False,), "lora_bias": (False,), "modules_to_save": (None, []),
    "rank_pattern": (None, {}), "alpha_pattern": (None, {}),
    # PiSSA, OLoRA and similar methods also change the base's weights.
    "init_lora_weights": (True, False, None, "gaussian"),
    "alora_invocation_tokens": (None,),
}


def save_adapter(
    model: LLaVA, name: str, path: Path | str, base: str | Path = "",
    images: ImageSettings | None = None,
) -> None:
    """Write one adapter as a folder, which appears only when it is complete.

    Args:
        base: folder or hub name of the base model, for `peft` and for the record.
        images: how training made pixels of images, if not as the base's folder says.
    """
    lora = lora_layers(model, name)[0].adapters[name]  # ValueError if there is none
    tensors, targets = {}, {}
    for key, weight in model.state_dict().items():
        layer, found, side = key.partition(f".adapters.{name}.")
        if found:
            # The second spelling names the modules of transformers >= 4.52.
            targets[layer] = layouts.public_names(layer)[1]
            weight = sharding.whole(weight).cpu().contiguous()
            tensors[f"{WRAPPER}{targets[layer]}.lora_{side}.weight"] = weight
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
        "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "bias": "none",
        # Whole paths: bare names would also match the vision tower's projections.
        "target_modules": list(targets.values()),
        "inference_mode": True, "fan_in_fan_out": False, "init_lora_weights": True,
    }
    metadata = {"format": "pt", "base": fingerprint(model)}
    if parallel.rank():
        return
    with atomic_folder(Path(path)) as out:
        write_tensors(out / "adapter_model.safetensors", tensors, metadata)
        write_atomic(out / "adapter_config.json", config)
        if images:
            write_atomic(out / "preprocessor_config.json", layouts.image_processor(images))


def load_adapter(model: LLaVA, path: Path | str, name: str, sharded: bool = True) -> None:
    """Add an adapter from a folder to a model, under the given name.

    Args:
        sharded: with several processes, each keeps its rows; False: each keeps all.

    Raises:
        FileNotFoundError, ValueError: a file is missing or broken, the adapter was trained on
            another base, or it uses an unsupported setting.
    """
    file, settings = Path(path) / "adapter_model.safetensors", Path(path) / "adapter_config.json"
    config = read_json(settings)
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not 0 < alpha < 1e6:
        raise ValueError(f"{settings}: r is {brief(rank)} and lora_alpha {brief(alpha)}; both "
                         "should be numbers above 0")
    layouts.require_supported(settings, config, SUPPORTED)
    if (old := file.with_suffix(".bin")).exists() and not file.exists():
        file, weights, metadata = old, open_pickle(old), {}
    else:
        weights, metadata = open_file(file)
    base = config.get("base_model_name_or_path") or "unknown"
    layers, shapes = {}, {}
    for layer, module in model.named_modules():
        if isinstance(module, LoRALinear):
            names = layouts.public_names(f"{layer}.lora_A.weight")
            if any(WRAPPER + public in weights for public in names):
                layers[layer] = module
                shapes[f"{layer}.lora_A.weight"] = (rank, module.in_features)
                shapes[f"{layer}.lora_B.weight"] = (module.out_features, rank)
    found = match(f"{file}: an adapter for another model ({base})", shapes, weights, WRAPPER)
    if metadata.get("base") not in (None, fingerprint(model)):
        raise ValueError(f"{file}: trained on other base weights, those of {base}")
    add_adapter(model, name, rank, alpha, sorted(layers))
    with torch.no_grad():
        for layer, module in layers.items():
            module.adapters[name].A.copy_(found[f"{layer}.lora_A.weight"])
            module.adapters[name].B.copy_(found[f"{layer}.lora_B.weight"])
    if sharded:
        sharding.shard_adapter(model, name)
