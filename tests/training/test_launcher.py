"""How processes that work together end: handlers of the exit run, output is written out, and the exit code is the command's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ENDING = """
import atexit, sys, threading
from pathlib import Path
import torch.distributed as dist
from diffpref.training.launcher import leave_processes

rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
atexit.register(lambda: (folder / f"handled-{rank}").touch())
threading.Thread(target=threading.Event().wait, daemon=True).start()
dist.barrier()
sys.stdout.write("all is done")
leave_processes(3)
sys.stdout.write(", alone")
"""


@pytest.mark.parametrize(("size", "code", "said"), [(1, 0, "all is done, alone"), (2, 3, "all is done")])
def test_processes_end_with_their_code_after_their_exit_handlers(size: int, code: int, said: str, tmp_path: Path) -> None:
    words = [sys.executable, "-c", ENDING]
    started = [
        subprocess.Popen([*words, str(rank), str(size), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    for rank, process in enumerate(started):
        out, errors = process.communicate(timeout=120)
        assert (process.returncode, out) == (code, said), errors
        assert (tmp_path / f"handled-{rank}").exists()
