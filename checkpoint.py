"""Models, adapters and resume states on disk.

A model's folder holds config.json, safetensors (one file, or shards with an index), tokenizer.model
and small files for `transformers`. `layouts.py` knows how everything in it is called, `files.py`
how a file is written whole and mapped into memory. Here every weight is accounted for: one that is
missing, left over or of another shape is an error that names it. A model on the CPU in its stored
dtype costs no copy of its weights at all, any other target no second copy.

LoRA adapters have PEFT's format, so that `peft` loads ours over the public model and we load its.
An adapter is only right over the base it was trained on: ours carry that base's fingerprint, in the
file's metadata, and are refused elsewhere.
"""

import hashlib
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import layouts
from files import (
    WeightFile, convert_pickles, open_file, open_weights, read_json, whole_folder, write_atomic,
)
from model import Linear, LLaVA, LLaVAConfig, add_adapter, carriers
from vision import ImageSettings

SHARD_BYTES = 5 * 1000**3  # the size at which public checkpoints are split
VOCABULARY = ("decoder.embed_tokens.weight", "head.weight")

# ------------------------------------------------------------------------------------------ reading


def find_device(name: str | None) -> torch.device:
    """The device of a name; of None or "auto": a GPU if there is one."""
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):  # torch has no single kind of error for this
        raise ValueError(f"--device {name}: this installation of torch has no such device") from None


def load_llava(
    path: Path | str, device="cpu", dtype: torch.dtype | None = None,
    tower: Path | str | None = None,
):
    """A model from its folder, in any of the public layouts.

    Args:
        path: folder with config.json, safetensors and tokenizer.model.
        device, dtype: where the weights go, straight from the mapped file; dtype None keeps the
            stored one. On the CPU in the stored dtype the parameters *are* the mapped file, which
            stays untouched: writing to them copies the page.
        tower: folder of an original LLaVA model's CLIP: its shape, and its weights if the model's
            own do not include a tower.

    Returns:
        (LLaVA, data.Tokenizer, vision.ImageSettings)

    Raises:
        FileNotFoundError, ValueError: one sentence that names the file and what is wrong with it.
    """
    folder, tower = Path(path), tower and Path(tower)
    config, original = read_config(folder, tower)
    tokenizer = read_tokenizer(folder, config)
    settings = read_image_settings(folder, config, tower)
    weights = open_weights(folder)
    if tower and not any("vision_tower" in name for name in weights):
        in_tower = open_weights(tower).items()
        weights |= {name: w for name, w in in_tower if not layouts.CLIP_TEXT.search(name)}
    with torch.device("meta"):
        model = LLaVA(config)
    wanted = {name: tuple(w.shape) for name, w in base_weights(model).items()}
    if original:
        wanted |= dict.fromkeys(VOCABULARY, (config.image_token, config.text.hidden_size))
        if config.projector_hidden_act == "linear":
            del wanted["projector.linear_2.weight"], wanted["projector.linear_2.bias"]
    found = match(folder, wanted, weights)
    dtype = dtype or found["head.weight"].read().dtype
    with ThreadPoolExecutor(4) as pool:  # a dtype to convert to keeps more than one core busy
        read = pool.map(lambda entry: entry.read().to(device=device, dtype=dtype), found.values())
        state = dict(zip(found, read))
    if original:
        complete_original(state, config)
    model.load_state_dict(state, assign=True)
    return model, tokenizer, settings


def match(
    folder: Path, wanted: dict[str, tuple], weights: dict[str, WeightFile]
) -> dict[str, WeightFile]:
    """Stored entries under our names; every missing, unexpected and mis-shaped one is listed."""
    spelled = {public: name for name in wanted for public in layouts.public_names(name)}
    found, twice = {}, []
    for public, entry in weights.items():
        if public in spelled:
            twice += [public] if spelled[public] in found else []
            found[spelled[public]] = entry
    problems = {
        "stored twice": twice,
        "missing": [layouts.public_names(name)[0] for name in wanted if name not in found],
        "unexpected": [p for p in weights if p not in spelled and not layouts.IGNORED.search(p)],
        "mis-shaped": [
            f"{entry.name} {entry.shape}, not {tuple(wanted[name])}"
            for name, entry in found.items() if entry.shape != tuple(wanted[name])
        ],
        "of a dtype that is no float": [
            f"{entry.name} {entry.dtype}"
            for entry in found.values() if entry.dtype not in ("F64", "F32", "F16", "BF16")
        ],
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{len(names)} {kind} ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"
            for kind, names in problems.items() if names
        )
        raise ValueError(f"{folder}: the weights do not fit config.json: {listed}")
    return found


def read_config(folder: Path, tower: Path | None) -> tuple[LLaVAConfig, bool]:
    """Shapes, and whether the folder has the original LLaVA's layout."""
    file = folder / "config.json"
    values = read_json(file)
    if isinstance(values.get("text_config"), dict):
        return layouts.llava_hf_config(file, values), False
    if "mm_vision_tower" not in values:
        raise ValueError(
            f"{file}: neither a llava-hf model (no text_config) nor an original LLaVA model "
            "(no mm_vision_tower)"
        )
    clip = tower and (tower / "config.json", read_json(tower / "config.json"))
    return layouts.original_config(file, values, clip), True


def read_tokenizer(folder: Path, config: LLaVAConfig):
    """The folder's data.Tokenizer, checked against the model's vocabulary."""
    from data import Tokenizer  # here, so that weights can be handled without sentencepiece

    file = folder / "tokenizer.model"
    if not file.exists():
        raise FileNotFoundError(
            f"{file}: no such file; copy the sentencepiece model that the weights were trained with"
        )
    try:
        tokenizer = Tokenizer(file, config.image_token, config.pad_token)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{file}: not a sentencepiece model ({error})") from None
    pieces, added = tokenizer.sp.vocab_size(), set()
    if (folder / "added_tokens.json").exists():
        added |= set(read_json(folder / "added_tokens.json").values())
    if (folder / "tokenizer_config.json").exists():
        table = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
        added |= {int(key) for key in table}
    if pieces > config.image_token or set(range(pieces, config.image_token)) - added:
        raise ValueError(
            f"{file}: has {pieces} pieces, but config.json places <image> at {config.image_token}; "
            "this tokenizer belongs to another model"
        )
    return tokenizer


def read_image_settings(folder: Path, config: LLaVAConfig, tower: Path | None) -> ImageSettings:
    """From the processor's file of the model, or else of its tower, or else CLIP's habits."""
    names = (folder / "preprocessor_config.json", folder / "processor_config.json")
    names += (tower / "preprocessor_config.json",) if tower else ()
    file = next((name for name in names if name.exists()), None)
    pad = read_json(folder / "config.json").get("image_aspect_ratio") == "pad"
    values = read_json(file) if file else {}
    return layouts.image_settings(file, values, config.vision.image_size, pad)


def complete_original(state: dict[str, Tensor], config: LLaVAConfig) -> None:
    """Add what the original LLaVA has no weights for.

    New vocabulary rows are the mean of the old ones, so that they are never likely. The one-layer
    projector of LLaVA v1 becomes the first of two layers with nothing between them, the second
    the identity: the one form of it that the llava-hf layout can express.
    """
    for name in VOCABULARY:
        rows = state[name]
        mean = rows.mean(0, dtype=torch.float32).to(rows.dtype)
        state[name] = torch.cat([rows, mean.expand(config.text.vocab_size - len(rows), -1)])
    if config.projector_hidden_act == "linear":
        bias = state["projector.linear_1.bias"]
        state["projector.linear_2.weight"] = torch.eye(len(bias)).to(bias)
        state["projector.linear_2.bias"] = torch.zeros_like(bias)


# ------------------------------------------------------------------------------------------- saving


def shards(weights: dict[str, Tensor], limit: int) -> list[list[str]]:
    """Names in order, cut into groups of at most `limit` bytes each (or of one large weight)."""
    groups, size = [[]], 0
    for name, weight in weights.items():
        if groups[-1] and size + weight.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += weight.nbytes
    return groups


def base_weights(model: LLaVA) -> dict[str, Tensor]:
    """The model's weights without its adapters."""
    return {name: w for name, w in model.state_dict().items() if ".adapters." not in name}


def fingerprint(model: LLaVA) -> str:
    """Which base weights these are: a hash of names, shapes and 64 values of every tensor.

    Values are rounded to bfloat16 first, so a model loaded in bfloat16 and in float32 from the same
    files has one fingerprint. Adapters do not count.
    """
    digest = hashlib.sha256()
    for name, weight in base_weights(model).items():
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // 64)][:64].cpu().bfloat16().view(torch.int16)
        digest.update(f"{name}{tuple(weight.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def save_llava(
    model: LLaVA, tokenizer, settings: ImageSettings, path: Path | str,
    adapter: str | None = None, shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model in the llava-hf layout, with all that `transformers` needs to open it.

    Args:
        tokenizer: data.Tokenizer; its sentencepiece model is written back byte for byte.
        path: the folder; it appears when it is complete, and replaces an earlier model there.
        adapter: name of the LoRA adapter to merge into what is written (one layer at a time; the
            model keeps it apart); None writes the base alone.
        shard_bytes: weights beyond this size are split over several files.
    """
    folder = Path(path)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise ValueError(f"{folder}: not empty, and not a model that could be replaced")
    weights = base_weights(model)
    groups = shards(weights, shard_bytes)
    files = layouts.processor_files(model.config, tokenizer, settings)
    files["config.json"] = layouts.public_config(model)
    with whole_folder(folder) as out:
        weight_map = {}
        for i, group in enumerate(groups, 1):
            whole = f"-{i:05}-of-{len(groups):05}" if len(groups) > 1 else ""
            tensors = {
                layouts.public_names(name)[0]: merged(model, name, weights[name], adapter)
                for name in group
            }
            save_file(tensors, out / f"model{whole}.safetensors", {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, f"model{whole}.safetensors")
        if len(groups) > 1:
            total = {"total_size": sum(weight.nbytes for weight in weights.values())}
            files["model.safetensors.index.json"] = {"metadata": total, "weight_map": weight_map}
        for name, content in files.items():
            write_atomic(out / name, content)
        write_atomic(out / "tokenizer.model", tokenizer.model_proto)


def merged(model: LLaVA, name: str, weight: Tensor, adapter: str | None) -> Tensor:
    """A weight as it is written: on the CPU, with the adapter's update if it has one."""
    module = model.get_submodule(name.rpartition(".")[0])
    if adapter and isinstance(module, Linear) and adapter in module.adapters:
        weight = module.merged(adapter)
    return weight.detach().cpu().contiguous()


# ------------------------------------------------------------------------------------ resume state


def save_state(folder: Path | str, state: dict) -> None:
    """Write what resuming needs as one folder, complete or absent.

    Args:
        folder: `checkpoint-<step>` inside the run's folder.
        state: nested dicts, lists and tuples of tensors, numbers, strings, None; nothing that only
            unpickling could restore.
    """
    require_plain(state, "state")
    with whole_folder(Path(folder)) as out:
        torch.save(state, out / "state.pt")


def require_plain(value, where: str) -> None:
    """Raise TypeError for what `load_state` would refuse: better now than when resuming."""
    if isinstance(value, dict):
        for key, item in value.items():
            require_plain(key, f"a key of {where}")
            require_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            require_plain(item, f"{where}[{i}]")
    elif not (value is None or isinstance(value, Tensor | bool | int | float | str | bytes)):
        raise TypeError(f"{where} is a {type(value).__name__}; only tensors and plain values")


def load_state(folder: Path | str) -> dict:
    """What `save_state` wrote, on the CPU; tensors are memory-mapped."""
    file = Path(folder) / "state.pt"
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; is {folder} a checkpoint-<step> folder?")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of zip, pickle or torch: not a file of ours, or a broken one
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file}: cannot be resumed from ({reason}); use an earlier one") from None


def latest_state(run: Path | str) -> Path | None:
    """The complete checkpoint with the highest step in a run's folder, or None."""
    found = [p for p in Path(run).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return max(found, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


# ---------------------------------------------------------------------------------------- adapters

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
            public = layouts.public_names(module_path)[1]
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
    layouts.only(folder / "adapter_config.json", config, SUPPORTED)
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; it belongs beside adapter_config.json")
    weights = open_file(file)
    base = config.get("base_model_name_or_path") or "unknown"
    linears = {path: m for path, m in model.named_modules() if isinstance(m, Linear)}
    spelled = {
        f"{WRAPPER}{public}.lora_{side}.weight": (path, side)
        for path in linears for public in layouts.public_names(path) for side in "AB"
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


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python checkpoint.py FOLDER    convert its pickled weights to safetensors")
    try:
        convert_pickles(Path(sys.argv[1]))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
