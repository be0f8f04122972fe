"""What a process does about the launcher that started it. Imports nothing heavy: the command line needs it first."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


def die_with_launcher() -> None:
    """Under a launcher, ask the kernel for SIGTERM when it dies: accelerate launch does not pass signals on."""
    if sys.platform == "linux" and ("ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Within the block SIGTERM, SIGUSR1 and SIGINT end the process in order, with 143 or 130: schedulers know these codes.

    The training loop has handlers of its own, which save first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # the caller handles signals
        return
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> NoReturn:
        code = 130 if number == signal.SIGINT else 143
        if os.getpid() != owner:  # a worker, which has nothing to tell
            os._exit(code)
        print(f"stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
        raise SystemExit(code)

    names = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]  # Windows has no SIGUSR1
    before = {name: signal.signal(getattr(signal, name), end) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def use_all_cores() -> None:
    """accelerate launch sets one thread for a single process on a CPU; give it the cores, unless another number was asked for."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) == 1
    if launched and os.environ.get("OMP_NUM_THREADS") == "1":
        import torch

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(cores or 1)


def leave_processes(code: int) -> None:
    """When a command is done, leave its process group, if it made one. One of several processes ends here, with this exit code.

    While an interpreter is taken apart, threads of the group and of data parallelism now and then abort the process, after all its work
    is done: its launcher then stops the others, which may still be writing, and reports a failure. So nothing is taken apart: handlers of
    the exit run, output is written out, and the process ends.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return
    if dist.get_world_size() == 1:
        dist.destroy_process_group()
        return
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
