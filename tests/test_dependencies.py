"""An audit of the declared dependencies that needs no network: installed, permissively licensed, and above versions with known holes."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]
NEEDED = [Requirement(text) for text in PROJECT["dependencies"]]
PERMISSIVE = re.compile(r"Apache|MIT|BSD|MPL|HPND|PSF|Unlicense|ISC|CMU|Historical Permission", re.IGNORECASE)
REPAIRED = {  # package -> (first version without the hole, what it was); from the packages' own advisories
    "torch": ("2.6", "CVE-2025-32434: torch.load with weights_only=True ran code"),
    "transformers": ("4.48", "CVE-2024-11394: code from a checkpoint was run"),
    "Pillow": ("10.3", "CVE-2024-28219: buffer overflow in colour management"),
    "pyarrow": ("14.0.1", "CVE-2023-47248: code from a file was run"),
    "PyYAML": ("5.4", "CVE-2020-14343: code from a file was run by full_load"),
    "tqdm": ("4.66.3", "CVE-2024-34062: code from the command line was run"),
}


def floor(requirement: Requirement) -> Version:
    """The lowest version that is allowed."""
    (text,) = (part.version for part in requirement.specifier if part.operator == ">=")
    return Version(text)


@pytest.mark.parametrize("requirement", NEEDED, ids=lambda r: r.name)
def test_what_is_installed_is_new_enough(requirement: Requirement) -> None:
    found = Version(importlib.metadata.version(requirement.name))
    assert found >= floor(requirement)
    assert requirement.url is None, "from an index, by name"


@pytest.mark.parametrize("requirement", NEEDED, ids=lambda r: r.name)
def test_licences_are_permissive(requirement: Requirement) -> None:
    about = importlib.metadata.metadata(requirement.name)
    said = [about.get("License-Expression") or "", (about.get("License") or "")[:200]]
    said += [line for line in about.get_all("Classifier") or [] if line.startswith("License")]
    assert PERMISSIVE.search(" ".join(said)), said
    assert not re.search(r"\bA?GPL", " ".join(said)), said


def test_floors_are_above_known_holes() -> None:
    floors = {requirement.name: floor(requirement) for requirement in NEEDED}
    open_holes = {name: why for name, (version, why) in REPAIRED.items() if floors[name] < Version(version)}
    assert not open_holes
