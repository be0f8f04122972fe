"""The processes of one launch that share long work."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import PartialState


def sharing_processes() -> PartialState:
    """This process among those of the launch, on a GPU if there is one.

    They may wait for each other for days: after an interruption one's share can be finished while another's is not begun.
    """
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
