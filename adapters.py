"""LoRA adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors.

`model.py` knows how an adapter computes; here it is written so that `peft` loads it over the
public model, and read if `peft` wrote it. An adapter is only right over the base it was trained on:
ours carry that base's fingerprint (in the metadata, which peft ignores) and are refused elsewhere.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from checkpoint import fingerprint, open_file, read_json, whole_folder, write_atomic
from layouts import only, public_names
from model import Linear, LLaVA, add_adapter, carriers

WRAPPER = "base_model.model."  # what PEFT puts before the path of a module
# The only settings that model.LoRA computes; the first is what an absent field means.
SUPPORTED = {
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "use_rslora": (False,),
    "fan_in_fan_out": (False,), "lora_bias": (False,), "modules_to_save": (None, []),
    "rank_pattern": (None, {}), "alpha_pattern": (None, {}),
    # PiSSA, OLoRA and their like also change the base's weights.
    "init_lora_weights": (True, False, None, "gaussian"),
}


def save_adapter(model: LLaVA, name: str, path: Path | str, base: str | Path = "") -> None:
    """Write one adapter.

    Args:
        path: the folder; it appears when it is complete.
        base: folder or hub name of the base model, for `peft` and for the record.

    Raises:
        ValueError: the model has no such adapter.
    """
    lora = carriers(model, name)[0].adapters[name]
    tensors, targets = {}, []
    for module_path, module in model.named_modules():
        if isinstance(module, Linear) and name in module.adapters:
            # The second spelling is that of the modules of transformers >= 4.52.
            public = public_names(module_path)[1]
            targets.append(public)
            for side in ("A", "B"):
                weight = getattr(module.adapters[name], side).detach().cpu().contiguous()
                tensors[f"{WRAPPER}{public}.lora_{side}.weight"] = weight
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
        "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "bias": "none",
        # Whole paths and not bare names, which would also match the vision tower's projections.
        "target_modules": targets,
        "inference_mode": True, "fan_in_fan_out": False, "init_lora_weights": True,
    }
    with whole_folder(Path(path)) as out:
        metadata = {"format": "pt", "base": fingerprint(model)}
        save_file(tensors, out / "adapter_model.safetensors", metadata)
        write_atomic(out / "adapter_config.json", config)


def load_adapter(model: LLaVA, path: Path | str, name: str) -> None:
    """Add an adapter to a model under a name of its own.

    Raises:
        FileNotFoundError, ValueError: a file is missing or broken, the adapter was trained over
            another base, or it does what model.LoRA cannot.
    """
    folder = Path(path)
    file = folder / "adapter_model.safetensors"
    config = read_json(folder / "adapter_config.json")
    only(folder / "adapter_config.json", config, SUPPORTED)
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; it belongs beside adapter_config.json")
    weights = open_file(file)
    base = config.get("base_model_name_or_path") or "unknown"
    linears = {path: m for path, m in model.named_modules() if isinstance(m, Linear)}
    spelled = {
        f"{WRAPPER}{public}.lora_{side}.weight": (path, side)
        for path in linears for public in public_names(path) for side in "AB"
    }
    found = {spelled[key]: entry for key, entry in weights.items() if key in spelled}
    paths, rank = sorted({path for path, _ in found}), config.get("r", 8)
    shapes = {
        (path, side): (rank, linears[path].in_features) if side == "A"
        else (linears[path].out_features, rank)
        for path in paths for side in "AB"
    }
    wrong = [key for key in weights if key not in spelled]
    wrong += [f"no lora_{side} of {path}" for path, side in shapes.keys() - found.keys()]
    wrong += [
        f"{entry.name} {entry.shape}, not {shapes[key]}"
        for key, entry in found.items() if entry.shape != shapes[key]
    ]
    if wrong or not found:
        listed = ", ".join(sorted(wrong)[:8]) or "it is empty"
        raise ValueError(f"{file}: an adapter for another model ({base}): {listed}")
    trained_over = next(iter(found.values())).handle.metadata().get("base")
    if trained_over not in (None, fingerprint(model)):
        raise ValueError(f"{file}: trained over other base weights than these, those of {base}")
    add_adapter(model, name, rank, config.get("lora_alpha", 8), paths)
    with torch.no_grad():
        for (path, side), entry in found.items():
            getattr(linears[path].adapters[name], side).copy_(entry.read())
