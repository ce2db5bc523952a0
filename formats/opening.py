"""Open what a user may call a model: its own folder, a run's, or an adapter over its base."""

from pathlib import Path

import torch

from config import path_fault
from formats.adapters import load_adapter
from formats.checkpoint import load_llava, read_config, read_image_settings
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


def with_bases(path: Path | str) -> list[Path]:
    """Return a model's folder and, if it holds an adapter, those that it is over; a base is last.

    Raises:
        FileNotFoundError, ValueError: a base is no folder here, or the adapter is over itself.
    """
    folders = [model_folder(path)]
    while not (folders[-1] / "config.json").exists():
        file = folders[-1] / "adapter_config.json"
        if not file.exists():
            break
        base = str(read_json(file).get("base_model_name_or_path"))
        if path_fault(base, "model"):
            raise FileNotFoundError(f"{file}: an adapter over {base}, which is no folder here; "
                                    "write the base's folder into base_model_name_or_path")
        folders.append(model_folder(base))
        if any(folders[-1].samefile(each) for each in folders[:-1]):
            raise ValueError(f"{file}: an adapter over itself")
    return folders


def open_model(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
    tower: Path | str | None = None, sharded: bool = True,
) -> Loaded:
    """Load a model, its tokenizer and image settings. For arguments and errors see `load_llava`."""
    *adapters, base = with_bases(path)
    # Adapters are added in the stored dtype: one sum, whatever the wanted one.
    model, tokenizer, images = load_llava(base, device, None if adapters else dtype, tower, sharded)
    for folder in reversed(adapters):
        load_adapter(model, folder, "given", sharded=False)
        merge_adapter(model, "given")
        if (folder / "preprocessor_config.json").exists():
            images = read_image_settings(folder, None, images.size, images.mode == "pad")
    return model.to(dtype or model.stored_dtype), tokenizer, images


def parameter_count(path: Path | str, tower: Path | str | None = None) -> int:
    """Count a model's parameters from its config.json alone."""
    base = with_bases(path)[-1]
    with torch.device("meta"):
        model = LLaVA(read_config(base, Path(tower) if tower else None)[0])
    return sum(weight.numel() for weight in model.parameters())
