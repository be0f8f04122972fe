"""What a process does about the launcher that started it. Imports nothing heavy: the command line needs it first."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def die_with_launcher() -> None:
    """Under a launcher, ask the kernel for SIGTERM when it dies: accelerate launch does not pass signals on."""
    if sys.platform == "linux" and ("ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def use_all_cores() -> None:
    """accelerate launch sets one thread for a single process on a CPU; give it the cores, unless another number was asked for."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) == 1
    if launched and os.environ.get("OMP_NUM_THREADS") == "1":
        import torch

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(cores or 1)


def leave_processes() -> None:
    """End this process's part in the process group, if a command made one, before the interpreter takes it apart.

    A process that exits with its group alive is aborted now and then by the group's own threads, after all work is done: its
    launcher would then report a failure.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
