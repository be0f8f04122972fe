"""What has to be installed before a program for GPUs begins: imported first, so that one line says everything that is missing."""

from __future__ import annotations

import importlib.util
import sys

NEEDED = {"torch": "torch", "diffusers": "diffusers", "transformers": "transformers", "accelerate": "accelerate", "peft": "peft"}
NEEDED |= {"datasets": "datasets", "huggingface_hub": "huggingface_hub", "safetensors": "safetensors", "pyarrow": "pyarrow"}
NEEDED |= {"numpy": "numpy", "PIL": "Pillow", "psutil": "psutil", "yaml": "PyYAML", "filelock": "filelock", "tqdm": "tqdm"}
NEEDED |= {"diffpref": "diffpref"}
"""Module -> package."""


def lacking() -> list[str]:
    """Packages that are not there."""
    return [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]


if lacking():
    sys.exit(f"not installed: {', '.join(lacking())}; in a checkout of this library: pip install -e .")
