"""Open what a user may call a model: its own folder, a run's, or an adapter over its base."""

from pathlib import Path

import torch

from config import path_fault
from formats.adapters import load_adapter
from formats.checkpoint import load_llava, read_config
from formats.files import read_json
from formats.runs import settings_of_run
from formats.tokenizer import Tokenizer
from lora import merge_adapter
from model import LLaVA
from vision import ImageSettings

Loaded = tuple[LLaVA, Tokenizer, ImageSettings]


def model_folder(path: Path | str) -> Path:
    """Return the folder of a run's model, or the folder itself."""
    folder = Path(path)
    if (folder / "model" / "config.json").exists():
        return folder / "model"
    if settings_of_run(folder) is not None or (folder / "metrics.jsonl").exists():
        raise FileNotFoundError(f"{folder}: an unfinished run; it has no model yet")
    return folder


def base_of(folder: Path) -> Path | None:
    """Return the base of an adapter's folder; None if the folder holds a whole model."""
    file = folder / "adapter_config.json"
    if not file.exists() or (folder / "config.json").exists():
        return None
    base = str(read_json(file).get("base_model_name_or_path"))
    if fault := path_fault(base, "model"):
        raise FileNotFoundError(f"{file}: an adapter over {fault}")
    if (found := model_folder(base)).samefile(folder):
        raise ValueError(f"{file}: an adapter over itself")
    return found


def open_model(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
    tower: Path | str | None = None, sharded: bool = True,
) -> Loaded:
    """Load a model, its tokenizer and image settings. For arguments and errors see `load_llava`."""
    folder = model_folder(path)
    base = base_of(folder)
    if base is None:
        return load_llava(folder, device, dtype, tower, sharded)
    loaded = open_model(base, device, None, tower, sharded)  # one sum, whatever the dtype
    load_adapter(loaded[0], folder, "given", sharded=False)
    merge_adapter(loaded[0], "given")
    if dtype:
        loaded[0].to(dtype)
    return loaded


def parameter_count(path: Path | str, tower: Path | str | None = None) -> int:
    """Count a model's parameters from its config.json alone."""
    folder = model_folder(path)
    if base := base_of(folder):
        return parameter_count(base, tower)
    with torch.device("meta"):
        model = LLaVA(read_config(folder, Path(tower) if tower else None)[0])
    return sum(weight.numel() for weight in model.parameters())
