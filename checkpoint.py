"""Weights on disk: models in the public layouts, and what resuming a run needs.

A model's folder holds config.json, safetensors (one file, or shards with an index), tokenizer.model
and small files for `transformers`; `layouts.py` knows how everything in it is called. Every weight
is accounted for: one that is missing, left over or of another shape is an error that names it.
Weights are memory-mapped, so that a model on the CPU in its stored dtype costs no copy at all, and
any other target one tensor's. Nothing here unpickles objects: pickled weights are refused with the
command that converts them. Whatever is written is complete or absent, never half.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import layouts
from model import LLaVA, LLaVAConfig, Linear
from vision import ImageSettings

SHARD_BYTES = 5 * 1000**3  # the size at which public checkpoints are split

# --------------------------------------------------------------------------------- small file tools


def read_json(path: Path) -> dict:
    """A JSON object from a file, or one sentence about what is wrong with the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such file; is its folder the right one?") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no JSON object; copy the file again")
    return values


def sync(path: Path) -> None:
    """Force a file's content, or a folder's list of names, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path | str, content: str | bytes | dict | list) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, nothing between.

    Args:
        content: text, bytes, or anything JSON can hold.
    """
    path = Path(path)
    if not isinstance(content, str | bytes):
        content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling to fill, which takes the name `path` only once it is complete on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # of a killed run
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            file.chmod(temporary.stat().st_mode & 0o666)  # safetensors lets only the owner read
            sync(file)
        sync(temporary)
        if path.exists():
            old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ------------------------------------------------------------------------------------------ reading


class WeightFile:
    """An entry of a safetensors file: shape and dtype from the header, values on demand."""

    def __init__(self, file: Path, name: str, handle):
        self.file, self.name, self.handle = file, name, handle
        header = handle.get_slice(name)
        self.shape, self.dtype = tuple(header.get_shape()), header.get_dtype()

    def read(self) -> Tensor:
        """The stored values, memory-mapped: nothing is read before it is touched."""
        return self.handle.get_tensor(self.name)


def open_file(file: Path) -> dict[str, WeightFile]:
    try:
        handle = safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file}: not a whole safetensors file ({error}); download or copy it again"
        ) from None
    return {name: WeightFile(file, name, handle) for name in handle.keys()}


def open_weights(folder: Path) -> dict[str, WeightFile]:
    """Everything stored in a folder, under the names of its files.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is not there.
        ValueError: weights that are only there as pickles, or a broken file.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return open_file(folder / "model.safetensors")
    if index.exists():
        weights = {}
        for shard in sorted(set(read_json(index).get("weight_map", {}).values())):
            if not (folder / shard).exists():
                raise FileNotFoundError(f"{index}: names {shard}, which is not in the folder")
            weights |= open_file(folder / shard)
        return weights
    if pickles := sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pth")):
        raise ValueError(
            f"{pickles[0]}: pickled weights can run code and are not opened; "
            f"convert them once with: python checkpoint.py {folder}"
        )
    raise FileNotFoundError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


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
    state = {name: entry.read().to(device=device, dtype=dtype) for name, entry in found.items()}
    if original:
        complete_original(state, config)
    model.load_state_dict(state, assign=True)
    return model, tokenizer, settings


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


VOCABULARY = ("decoder.embed_tokens.weight", "head.weight")


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


# ------------------------------------------------------------------------------------- conversion


def convert_pickles(folder: Path) -> None:
    """Write safetensors and an index beside pickled weights; only plain tensors are unpickled."""
    pickles = sorted(folder.glob("pytorch_model*.bin")) or sorted(
        path for path in (*folder.glob("*.bin"), *folder.glob("*.pth"))
        if path.name != "training_args.bin"
    )
    if not pickles:
        raise FileNotFoundError(f"{folder}: no *.bin or *.pth file to convert")
    weight_map = {}
    for i, pickle in enumerate(pickles, 1):
        try:
            tensors = torch.load(pickle, map_location="cpu", weights_only=True, mmap=True)
            # Copies, because safetensors cannot hold two names for one storage.
            tensors = {key: value.clone().contiguous() for key, value in tensors.items()}
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{pickle}: not a plain file of weights ({reason})") from None
        name = f"model-{i:05}-of-{len(pickles):05}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        print(f"{pickle} -> {name}: {len(tensors)} tensors")
    write_atomic(folder / "model.safetensors.index.json", {"weight_map": weight_map})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python checkpoint.py FOLDER    convert its pickled weights to safetensors")
    try:
        convert_pickles(Path(sys.argv[1]))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
