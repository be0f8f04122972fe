"""Parts of a model that a run does not need: with their configs and shapes, and without weights until somebody asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

PARTS = ("vae", "text_encoder", "text_encoder_2")
_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}


def outlines(folder: Path, index: Mapping[str, Any], variant: str | None, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Autoencoder and text encoders of a model's folder on the device "meta"; parts whose files have other names are left out.

    index: what model_index.json says. dtype: of the text encoders when they are loaded.
    """
    found: dict[str, nn.Module] = {}
    for name in PARTS:
        library, cls_name = index.get(name) or (None, None)
        cls: Any = getattr(_LIBRARIES.get(str(library)), str(cls_name), None)
        if cls is None:
            continue
        with torch.device("meta"):
            if library == "diffusers":
                part = cls.from_config(cls.load_config(folder / name))
            else:
                part = cls(cls.config_class.from_pretrained(folder / name))
        part = part.to(torch.float32 if name == "vae" else dtype).requires_grad_(False).eval()
        part.weight_files = weight_files(folder / name, variant)
        names = set(_names(part.weight_files))
        if all(_stored_name(weight, names) for weight in part.state_dict()):
            found[name] = part
    return found


def is_outline(part: object) -> bool:
    """Whether a part has no weights."""
    return isinstance(part, nn.Module) and any(p.is_meta for p in part.parameters())


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files of a part, of its variant where there is one."""
    files = sorted(folder.glob("*.safetensors"))
    of_variant = [path for path in files if variant is not None and f".{variant}" in path.name]
    plain = [path for path in files if path.name.count(".") == 1]
    return of_variant or plain


def stored_weight(part: nn.Module, name: str) -> Tensor:
    """A weight of an outline, from its file, in the dtype that it would be loaded in; its pages are read when they are touched."""
    files: Any = part.weight_files
    for path in files:
        with safe_open(path, "pt") as file:
            stored = _stored_name(name, set(file.keys()))
            if stored is not None:
                return file.get_tensor(stored).to(part.state_dict()[name].dtype)  # type: ignore[no-any-return]
    raise KeyError(name)


def _names(files: list[Path]) -> list[str]:
    with ExitStack() as stack:
        return [name for path in files for name in stack.enter_context(safe_open(path, "pt")).keys()]  # noqa: SIM118


def _stored_name(name: str, names: set[str]) -> str | None:
    """What a file calls a weight: text encoders lost a level of names in transformers 5."""
    return next((given for given in (name, f"text_model.{name}") if given in names), None)
