"""Where the files that come with the library are: in a checkout beside the package, in an installed wheel inside it."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def asset(*parts: str) -> Path:
    """The path of a file or folder under `assets/`, for example `asset("testbed", "scorer")`.

    Raises ValueError, naming the places looked at, if it is not there.
    """
    return _find("assets", parts)


def config_file(*parts: str) -> Path:
    """The path of a file or folder under `configs/`, for example `config_file("testbed", "diffusion_dpo.yaml")`.

    Raises ValueError, naming the places looked at, if it is not there.
    """
    return _find("configs", parts)


def _find(folder: str, parts: tuple[str, ...]) -> Path:
    """`folder/parts` in the wheel's copy, else in the checkout's; a wheel never falls back to what lies beside it."""
    packed = _PACKAGE / f"_{folder}"
    roots = [packed] if packed.is_dir() else [packed, _PACKAGE.parent / folder]
    for root in roots:
        if (path := root.joinpath(*parts)).exists():
            return path
    wanted = Path(folder, *parts).as_posix()
    looked = " and ".join(str(root) for root in roots)
    raise ValueError(f"{wanted} does not come with this installation of diffpref; looked in {looked}")
