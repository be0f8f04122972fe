"""Faults that come from outside: a training process is started with a list of them, and its code knows nothing of it.

Most hang on Python's audit events, which the interpreter raises for files and folders: `Fault("SIGKILL", "os.rename", "tmp-")`
kills the process at the moment in which it renames the first path that the pattern is found in. Four events are ours: "fsync";
"backward", the backward pass of any loss; "update", a step of AdamW; and "denoise", an evaluation of any UNet.

    python tests/reliability/faults.py FAULTS train.py --setting value ...

runs any training script with faults and limits, which `as_text` puts into one word.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import multiprocessing
import os
import re
import resource
import runpy
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Fault:
    """What happens at the `count`-th event in whose paths the pattern `match` is found; at every one from there on if `lasting`."""

    what: str
    """A signal, an errno such as ENOSPC that the operation fails with, or one of nan, oom, exit, hang.

    nan spoils the loss of a backward pass and a weight after an update; the fault of denoise is 1 % in its result."""
    event: str
    match: str = ""
    count: int = 1
    lasting: bool = False
    rank: int | None = None
    """Only in the process of this rank."""


def as_text(faults: Sequence[Fault], limits: Limits | None = None) -> str:
    """Faults and limits as one word of a command."""
    return json.dumps({"faults": [asdict(fault) for fault in faults], "limits": asdict(limits or Limits())})


def install(faults: Sequence[Fault]) -> None:
    """Let the faults happen in this process. They cannot be taken back."""
    rank = int(os.environ.get("RANK", "0"))
    mine = [fault for fault in faults if fault.rank in (None, rank)]
    seen = dict.fromkeys(range(len(mine)), 0)

    def due(event: str, paths: str) -> list[Fault]:
        found = []
        for place, fault in enumerate(mine):
            if fault.event == event and re.search(fault.match, paths):
                seen[place] += 1
                if seen[place] == fault.count or (fault.lasting and seen[place] > fault.count):
                    found.append(fault)
        return found

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event in watched:
            for fault in due(event, " ".join(os.fsdecode(a) for a in args if isinstance(a, str | bytes | os.PathLike))):
                act(fault)

    events = {fault.event for fault in mine}
    watched = events - {"fsync", "backward", "update", "denoise"}
    if watched:
        sys.addaudithook(hook)
    if "fsync" in events:
        os.fsync = _before(os.fsync, due, "fsync")
    if "backward" in events:
        import torch

        torch.Tensor.backward = _before(torch.Tensor.backward, due, "backward")  # type: ignore[method-assign]
    if "update" in events:
        from torch.optim import AdamW

        AdamW.step = _after(AdamW.step, due, "update", _spoil_a_weight)  # type: ignore[method-assign]
    if "denoise" in events:
        from diffusers import UNet2DConditionModel

        UNet2DConditionModel.forward = _after(UNet2DConditionModel.forward, due, "denoise", _spoil_a_result)  # type: ignore[method-assign]


def _before(call: Callable[..., Any], due: Callable[[str, str], list[Fault]], event: str) -> Callable[..., Any]:
    def wrapped(*args: Any, **options: Any) -> Any:
        for fault in due(event, ""):
            if fault.what == "nan":
                args = (args[0] * float("nan"), *args[1:])
            else:
                act(fault)
        return call(*args, **options)

    return wrapped


def _after(call: Callable[..., Any], due: Callable[[str, str], list[Fault]], event: str, spoil: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(call)
    def wrapped(self: Any, *args: Any, **options: Any) -> Any:
        result = call(self, *args, **options)
        if due(event, ""):
            spoil(self, result)
        return result

    return wrapped


def _spoil_a_weight(optimizer: Any, result: Any) -> None:
    optimizer.param_groups[0]["params"][0].data.view(-1)[0] = float("nan")


def _spoil_a_result(unet: Any, result: Any) -> None:
    (result[0] if isinstance(result, tuple) else result.sample).mul_(1.01)


def act(fault: Fault) -> None:
    """Let a fault happen now."""
    if fault.what.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, fault.what))
    elif fault.what == "exit":
        os._exit(0)
    elif fault.what == "hang":
        time.sleep(3600)
    elif fault.what == "oom":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    else:
        code = getattr(errno, fault.what)
        raise OSError(code, os.strerror(code))


@dataclass(frozen=True)
class Limits:
    """What a process may not do."""

    file_bytes: int | None = None
    """Size of the largest file that it can write."""
    worker_bytes: int | None = None
    """Address space that its workers can take beyond what it has when it begins them."""
    is_root: bool = True
    """False: a read-only folder is read-only for it, also when it belongs to root."""

    def set(self) -> None:
        """Set them for this process. They cannot be taken back."""
        if self.file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_bytes, resource.RLIM_INFINITY))
        if self.worker_bytes is not None:
            os.register_at_fork(after_in_child=self._limit_memory)
        if not self.is_root:
            give_up_override()

    def _limit_memory(self) -> None:
        assert self.worker_bytes is not None
        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + self.worker_bytes,) * 2)


def give_up_override() -> None:
    """Give up root's right to write where the mode of a folder forbids it (capabilities CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, twice
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    for place in range(3):
        sets[place] &= ~0b110
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def run_ours(words: Sequence[str], faults: Sequence[Fault], log: str, environment: Mapping[str, str], limits: Limits) -> None:
    """Target of a child process: `diffpref` with these words, stderr and stdout in files that begin with `log`."""
    for number, name in ((1, "out"), (2, "err")):
        handle = os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # what starts workers in a process of its own, and not the way this one came
    limits.set()
    install(faults)
    from diffpref.cli import main
    from diffpref.data import loader
    from diffpref.training import saving

    saving.PAUSE = 0.1  # a disk that is full in a test stays full
    loader.WORKER_TIMEOUT = 5.0  # and who hangs, hangs
    try:
        sys.exit(main(list(words)))
    finally:
        with open(f"{log}.peak", "w") as file:
            file.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    Limits(**given["limits"]).set()
    install([Fault(**fault) for fault in given["faults"]])
    sys.argv = sys.argv[2:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")
