"""Weight files, read safely: safetensors, or pickles of nothing but tensors. Every error says which setting to mend, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

PICKLED = (".pth", ".pt", ".bin")
"""Names that state dicts written by torch.save end in."""

MAX_HEADER_BYTES = 16_000_000
"""Of a safetensors file. SDXL's 2,500 tensors take 0.4 MB; reading a header of millions of names would take gigabytes."""

Shapes = dict[str, tuple[int, ...]]


def read_shapes(path: Path, setting: str) -> Shapes:
    """Shapes by name from the header of a safetensors file, without its tensors.

    Raises ValueError naming `setting` when the file is damaged or something else.
    """
    try:
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
        if MAX_HEADER_BYTES < length < path.stat().st_size:  # a longer one than the file is damage, which is told below
            raise ValueError(
                f"{setting} {str(path)!r} has a header of {length / 1e6:.0f} MB, accepted: {MAX_HEADER_BYTES / 1e6:.0f} MB; that of a "
                "model is smaller than 1 MB, so this is no file of weights"
            )
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, no mapping
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            start = file.read(7)
        if start == b"version":
            raise ValueError(f"{setting} {str(path)!r} is a Git LFS pointer and not the weights: run git lfs pull in its folder") from error
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise ValueError(
            f"{setting} {str(path)!r} is no complete safetensors file ({reason}): it is damaged or its download broke off; fetch it again"
        ) from error


def read_metadata(path: Path) -> dict[str, str]:
    """The text that a safetensors file carries beside its tensors."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def read_state(path: Path, setting: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a .pth, .pt or .bin state dict, on the CPU.

    A state dict that lies under the key "state_dict" is taken out. Raises ValueError naming `setting` for a file of another kind,
    a damaged one, and a pickle that holds more than tensors, which is not executed.
    """
    if path.suffix == ".safetensors":
        read_shapes(path, setting)
        return load_file(path)
    if path.suffix not in PICKLED:
        raise ValueError(f"{setting} {str(path)!r} is neither a .safetensors file nor a state dict ({', '.join(PICKLED)})")
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(
            f"{setting} {str(path)!r} cannot be read as tensors only: it is damaged, or it holds other Python objects, which could run "
            "code; load it where you trust it and write its state dict as .safetensors"
        ) from error
    while isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(x, Tensor) for x in loaded.values()):
        raise ValueError(f"{setting} {str(path)!r} holds no state dict; save model.state_dict()")
    return {str(name): x for name, x in loaded.items()}


def check_folder_files(folder: Path, variant: str | None, setting: str) -> None:
    """Read the headers of the safetensors files of a pipeline's parts. Raises ValueError for a damaged one; other variants may be."""
    for path in sorted(folder.glob("*/*.safetensors")):
        if path.stem.partition(".")[2].partition("-")[0] == (variant or ""):  # model.fp16-00001-of-00002 is of the variant fp16
            read_shapes(path, setting)


def without_prefix(state: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """A state dict without prefixes that all its names share, such as `module.` of a data-parallel wrapper."""
    for prefix in prefixes:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): x for name, x in state.items()}
    return state


def check_fits(found: Shapes, wanted: Shapes, setting: str, source: str, remedy: str) -> None:
    """Names and shapes have to be exactly those of the model. Raises ValueError with the first difference and their numbers."""
    unexpected, missing = sorted(found.keys() - wanted.keys()), sorted(wanted.keys() - found.keys())
    reshaped = [name for name in wanted if name in found and found[name] != wanted[name]]
    if not (unexpected or missing or reshaped):
        return
    if reshaped:
        first = f"{reshaped[0]} has shape {found[reshaped[0]]}, the model's is {wanted[reshaped[0]]}"
    else:
        first = f"{unexpected[0]} is no weight of the model" if unexpected else f"{missing[0]} is missing"
    raise ValueError(
        f"{setting} {source!r} does not fit the model: {first} ({len(missing)} missing, {len(unexpected)} unexpected, "
        f"{len(reshaped)} of another shape); {remedy}"
    )
