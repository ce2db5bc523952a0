"""LLaVA models on disk: load every public layout, save llava-hf.

A model's folder holds config.json, safetensors (one file, or shards with an index), tokenizer.model
and small files for `transformers`. `layouts.py` has the public names, `files.py` reads and writes
files. This file accounts for every weight: one that is missing, left over or of another shape is an
error that names it. Loading to the CPU in the stored dtype copies no weights, loading to any other
target copies them once.
"""

import contextlib
import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import formats.layouts as layouts
import parallel
import sharding
from config import path_fault
from formats.files import atomic_folder, open_weights, read_json, understood, write_atomic
from formats.tokenizer import Tokenizer, sentencepiece_model
from lora import LoRALinear
from model import LLaVA, LLaVAConfig
from vision import ImageSettings

SHARD_BYTES = 5 * 1000**3  # the size at which public checkpoints are split
VOCABULARY = ("decoder.embed_tokens.weight", "head.weight")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def find_device(name: str | None) -> torch.device:
    """Return the named device (None, "auto": a GPU if there is one); ValueError if it is absent."""
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):  # torch raises either
        device = torch.device("meta")
    if device.type == "meta":
        raise ValueError(f"--device {name}: this torch installation has no such device")
    return device


# ------------------------------------------------------------------------------------------ loading


def load_llava(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
    tower: Path | str | None = None, sharded: bool = True,
) -> tuple[LLaVA, Tokenizer, ImageSettings]:
    """Load a model, its tokenizer and its image settings from a folder in any public layout.

    Args:
        path: folder with config.json, safetensors and tokenizer.model.
        device, dtype: where the weights go, straight from the mapped file; dtype None keeps the
            stored one. On the CPU in the stored dtype the parameters *are* the mapped file, which
            never changes: writing to a parameter copies its page.
        tower: folder of an original LLaVA model's CLIP. It gives the tower's shape, and its weights
            if the model's own files do not include them.
        sharded: with several processes, each reads and keeps its rows of the weights.

    Raises:
        FileNotFoundError, ValueError: one sentence that names the file and the fault.
    """
    folder, tower = Path(path), Path(tower) if tower else None
    config, values = read_config(folder, tower)
    with understood(folder):
        tokenizer = read_tokenizer(folder, config)
        pad = values.get("image_aspect_ratio") == "pad"
        settings = read_image_settings(folder, tower, config.vision.image_size, pad)
    with torch.device("meta"):
        model = LLaVA(config)
    found = find_weights(model, folder, tower, is_original(values))
    model.stored_dtype = found["head.weight"].dtype
    if sharded and parallel.world() > 1:
        sharding.shard(model)
    fill(model, found, device, dtype or model.stored_dtype, is_original(values))
    return model, tokenizer, settings


def find_weights(
    model: LLaVA, folder: Path, tower: Path | None, original: bool
) -> dict[str, Tensor]:
    """Return the mapped weights of a model's folder, and of its CLIP's, under our names."""
    weights = open_weights(folder)
    if tower and not any("vision_tower" in name for name in weights):
        clip = open_weights(tower).items()
        weights |= {name: w for name, w in clip if not layouts.CLIP_TEXT.search(name)}
    config, shapes = model.config, {name: w.shape for name, w in base_weights(model).items()}
    if original:
        shapes |= dict.fromkeys(VOCABULARY, (config.image_token, config.text.hidden_size))
        if config.projector_hidden_act == "linear":
            del shapes["projector.linear_2.weight"], shapes["projector.linear_2.bias"]
    return match(f"{folder}: the weights do not fit config.json", shapes, weights)


def fill(
    model: LLaVA, found: dict[str, Tensor], device: torch.device | str, dtype: torch.dtype,
    original: bool,
) -> None:
    """Load weights into a model on the meta device; of sharded ones, only this process's rows."""
    parts = {name for name, weight in model.state_dict().items() if sharding.is_sharded(weight)}
    early = parts.difference(VOCABULARY if original else ())  # cut before they are read

    def read(name: str) -> Tensor:
        weight = found[name]
        rows = parallel.rows_of(len(weight)) if name in early else slice(None)
        return (weight[rows] if weight.ndim else weight).to(device=device, dtype=dtype)

    with ThreadPoolExecutor(4) as pool:  # converting a dtype keeps more than one core busy
        state = dict(zip(found, pool.map(read, found)))
    if original:
        complete_original(state, model.config)
    for name in parts:
        weight = model.get_parameter(name)
        whole = name not in early or name not in found
        rows = parallel.rows_of(len(weight)) if whole else slice(None)
        state[name] = sharding.place(state[name][rows], weight)
    model.load_state_dict(state, assign=True)


def is_original(values: dict) -> bool:
    """Return whether a config.json is that of an original LLaVA."""
    return not isinstance(values.get("text_config"), dict)


def read_config(folder: Path, tower: Path | None = None) -> tuple[LLaVAConfig, dict]:
    """Return a model's shape and the content of its config.json, in any public layout."""
    for each in filter(None, (folder, tower)):
        if fault := path_fault(each, "model"):
            raise FileNotFoundError(fault)
    file = folder / "config.json"
    values = read_json(file)
    with understood(file):
        if is_original(values):
            return layouts.original_config(file, values, tower), values
        return layouts.llava_hf_config(file, values), values


def match(
    fault: str, shapes: dict[str, tuple], weights: dict[str, Tensor], prefix: str = ""
) -> dict[str, Tensor]:
    """Return stored weights under our names.

    Args:
        fault: the beginning of the error message.
        shapes: of every weight that should be stored, by our name.
        weights: the stored ones, by `prefix` and public name.

    Raises:
        ValueError: lists every missing, unexpected and misshapen weight.
    """
    ours = {prefix + public: name for name in shapes for public in layouts.public_names(name)}
    known = {public: weight for public, weight in weights.items() if public in ours}
    found = {ours[public]: weight for public, weight in known.items()}
    problems = {
        "stored twice": [p for p, weight in known.items() if found[ours[p]] is not weight],
        "missing": [layouts.public_names(name)[0] for name in shapes if name not in found],
        "unexpected": [p for p in weights if p not in ours and not layouts.IGNORED.search(p)],
        "misshapen": [f"{p} {tuple(weight.shape)}, not {tuple(shapes[ours[p]])}"
                      for p, weight in known.items() if weight.shape != shapes[ours[p]]],
        "not floating point": [f"{p} {w.dtype}" for p, w in known.items() if w.dtype not in FLOATS],
    }
    listed = "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"
        for kind, names in problems.items() if names
    )
    if listed or not found:
        raise ValueError(f"{fault}: {listed or 'it is empty'}")
    return found


def read_tokenizer(folder: Path, config: LLaVAConfig) -> Tokenizer:
    """Read a folder's tokenizer and check it against the model's vocabulary."""
    file = source = folder / "tokenizer.model"
    fast = folder / "tokenizer.json"  # all that transformers 5 writes
    try:
        if fast.exists() and not file.exists():
            file, source = fast, sentencepiece_model(fast, read_json(fast))
        tokenizer = Tokenizer(source, config.image_token, config.pad_token)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{file}: not a sentencepiece model ({error}); copy the one that the "
                         "weights were trained with") from None
    added = set(read_json(folder / "added_tokens.json", optional=True).values())
    added |= {token["id"] for token in read_json(fast, optional=True).get("added_tokens", ())}
    fields = read_json(folder / "tokenizer_config.json", optional=True)
    added |= {int(key) for key in fields.get("added_tokens_decoder", {}) if key.isdecimal()}
    pieces = tokenizer.sp.vocab_size()
    if pieces > config.image_token or set(range(pieces, config.image_token)) - added:
        raise ValueError(f"{file}: has {pieces} pieces, but config.json places <image> at "
                         f"{config.image_token}; this tokenizer belongs to another model")
    return tokenizer


def read_image_settings(folder: Path, tower: Path | None, size: int, pad: bool) -> ImageSettings:
    """Read the processor's file of the model, or else of its tower; without any, take CLIP's."""
    files = [folder / "preprocessor_config.json", folder / "processor_config.json"]
    files += [tower / "preprocessor_config.json"] if tower else []
    file = next((file for file in files if file.exists()), files[0])
    return layouts.image_settings(file, read_json(file, optional=True), size, pad)


def complete_original(state: dict[str, Tensor], config: LLaVAConfig) -> None:
    """Add the weights that the original LLaVA lacks and the llava-hf layout needs.

    New vocabulary rows are the mean of the old ones, so they are never likely. The one-layer
    projector of LLaVA v1 becomes the first of two layers without an activation, the second the
    identity: the llava-hf layout cannot express it otherwise.
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


def base_weights(model: LLaVA) -> dict[str, Tensor]:
    """Return the model's weights without its adapters."""
    return {name: w for name, w in model.state_dict().items() if ".adapters." not in name}


def fingerprint(model: LLaVA) -> str:
    """Identify base weights: hash names, shapes and 64 values of every tensor.

    Values are rounded to bfloat16 first, so a model loaded in bfloat16 and in float32 from the same
    files has one fingerprint. Adapters do not count.
    """
    digest = hashlib.sha256()
    for name, weight in base_weights(model).items():
        flat = sharding.whole(weight.detach()).flatten()
        some = flat[:: max(1, len(flat) // 64)][:64].cpu().bfloat16().view(torch.int16)
        digest.update(f"{name}{tuple(weight.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def not_finite(weights: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of weights with NaN or infinity (if sharded: in this process's rows)."""
    mine = ((name, sharding.local(weight.detach())) for name, weight in weights)
    return [name for name, weight in mine
            if weight.numel() and not all(end.isfinite() for end in weight.aminmax())]


def save_llava(
    model: LLaVA, tokenizer: Tokenizer, settings: ImageSettings, path: Path | str,
    adapter: str | None = None, shard_bytes: int = SHARD_BYTES, dtype: torch.dtype | None = None,
) -> None:
    """Write a model in the llava-hf layout, with every file that `transformers` needs to open it.

    Args:
        tokenizer: its sentencepiece model is written back byte for byte.
        path: the folder; it appears when it is complete, and replaces an earlier model there.
            One that holds anything else is a ValueError.
        adapter: name of the LoRA adapter to merge into the written weights, one layer at a time;
            the model itself does not change. None writes the base alone.
        shard_bytes: weights beyond this size are split over several files.
        dtype: of the written weights; None: of the model's.
    """
    folder, dtype = Path(path), dtype or model.head.weight.dtype
    occupied = folder.is_file() or folder.is_dir() and any(folder.iterdir())
    if occupied and not (folder / "config.json").exists():
        raise ValueError(f"{folder}: not empty, and not a model that could be replaced")
    weights = base_weights(model)
    groups = shards(weights, shard_bytes)
    contents = layouts.public_files(model, tokenizer, settings, dtype)
    with contextlib.ExitStack() as stack:
        out = parallel.once(lambda: stack.enter_context(atomic_folder(folder)))
        weight_map = {}
        for i, group in enumerate(groups, 1):
            part = f"-{i:05}-of-{len(groups):05}" if len(groups) > 1 else ""
            tensors = {
                layouts.public_names(name)[0]: merged(model, name, weights[name], adapter, dtype)
                for name in group}
            if parallel.rank():
                continue  # this process only helps to gather the weights
            save_file(tensors, out / f"model{part}.safetensors", {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, f"model{part}.safetensors")
        if parallel.rank():
            return
        if len(groups) > 1:
            size = sum(weight.numel() for weight in weights.values()) * dtype.itemsize
            contents["model.safetensors.index.json"] = {
                "metadata": {"total_size": size}, "weight_map": weight_map}
        for name, content in contents.items():
            write_atomic(out / name, content)
        write_atomic(out / "tokenizer.model", tokenizer.model_proto)


def shards(weights: dict[str, Tensor], limit: int) -> list[list[str]]:
    """Cut names, in order, into groups of at most `limit` bytes each (or of one large weight)."""
    groups, size = [[]], 0
    for name, weight in weights.items():
        if groups[-1] and size + weight.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += weight.nbytes
    return groups


def merged(
    model: LLaVA, name: str, weight: Tensor, adapter: str | None, dtype: torch.dtype
) -> Tensor:
    """Return a weight on the CPU, with the adapter's update added if its layer has one."""
    module = model.get_submodule(name.rpartition(".")[0])
    if adapter and isinstance(module, LoRALinear) and adapter in module.adapters:
        weight = module.merged(adapter, dtype)
    return sharding.whole(weight.detach()).cpu().to(dtype).contiguous()
