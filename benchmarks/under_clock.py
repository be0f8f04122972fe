"""Run a training script, unmodified, and time its optimizer steps: ours, a peer's, or one written for comparison.

    python benchmarks/under_clock.py [--stand_in NAME ...] [--trace FILE] [--profile FILE] [--limit STEPS] SCRIPT [its flags]

A step lasts from the end of one optimizer step to the end of the next, so that nothing the script does is left out: reading, encoding,
logging. Under a contest (contest.py) the script pauses after its first step and then takes as many as it is told to. Stand-ins replace
what a script needs to start on a machine without the packages or the GPU that it names; none of them does work that is timed.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import json
import os
import re
import resource
import runpy
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

LINK = "DIFFPREF_CONTEST"
"""Environment variable with the two file descriptors that lead to a contest, as `read,write`."""


class StepClock:
    """Seconds of every optimizer step; pauses between blocks of steps."""

    def __init__(self, link: str | None, limit: int | None) -> None:
        self.limit, self.count = limit, 0
        self.read, self.write = (os.fdopen(int(fd), mode) for fd, mode in zip(link.split(","), "rw", strict=True)) if link else (None, None)
        self.steps: list[tuple[float, float]] = []
        self.left = 1  # the first step includes all of the start
        self.last = self.now()

    @staticmethod
    def now() -> tuple[float, float]:
        """(seconds of this process's CPU time, seconds of the wall clock)."""
        return time.process_time(), time.perf_counter()

    def after_step(self, *_: Any) -> None:
        """Note the step; at the end of a block report it and wait for the next one."""
        self.count += 1
        if self.write is None:
            now = self.now()
            self.steps.append((now[0] - self.last[0], now[1] - self.last[1]))
            self.last = now
            if self.limit is not None and self.count >= self.limit:
                print(json.dumps(self.report()))
                leave(0)
            return
        self.left -= 1
        if self.left == 0 and torch.cuda.is_available():
            torch.cuda.synchronize()
        now = self.now()
        self.steps.append((now[0] - self.last[0], now[1] - self.last[1]))
        if self.left == 0:
            print(json.dumps(self.report()), file=self.write, flush=True)
            self.left = int(self.read.readline() or 0)
            if self.left == 0:
                leave(0)
            self.steps = []
            now = self.now()
        self.last = now

    def report(self) -> dict[str, Any]:
        """What a contest is told of a block."""
        on_gpu = torch.cuda.is_available()
        peak = torch.cuda.max_memory_allocated() if on_gpu else peak_of_process()
        return {
            "cpu": [cpu for cpu, _ in self.steps],
            "wall": [wall for _, wall in self.steps],
            "peak_bytes": peak,
        }


def peak_of_process() -> int:
    """Largest resident memory in bytes since the program began; that of `getrusage` begins with the process that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Profile:
    """The kernels of three steps after three others, as a table in a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        kinds = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        self.profiler = torch.profiler.profile(activities=kinds)

    def after_step(self, *_: Any) -> None:
        """Begin after the third step, write after the sixth."""
        self.count += 1
        if self.count == 3:
            self.profiler.start()
        elif self.count == 6:
            self.profiler.stop()
            order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            self.path.write_text(self.profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))


def leave(code: int) -> None:
    """End at once: what a script does after its last step is not measured."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Trace:
    """Inputs of every policy forward, losses, and the trained weights before the first and after the last step."""

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self.wanted = path, steps
        self.found: dict[str, Any] = {"steps": [], "losses": [], "before": {}, "gradients": {}, "after": {}}
        self.noise: Tensor | None = None
        self.unet: Any = None

    def install(self) -> None:
        """Listen to diffusers' UNet, to torch.randn_like and to accelerate's backward."""
        from accelerate import Accelerator
        from diffusers import UNet2DConditionModel

        forward, randn_like, backward = UNet2DConditionModel.forward, torch.randn_like, Accelerator.backward

        def heard_forward(unet: Any, x_t: Tensor, t: Tensor, embeds: Tensor, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled() and len(self.found["steps"]) < self.wanted:
                self.hear(unet, x_t, t, embeds, kwargs["added_cond_kwargs"])
            return forward(unet, x_t, t, embeds, *args, **kwargs)

        def heard_noise(*args: Any, **kwargs: Any) -> Tensor:
            self.noise = randn_like(*args, **kwargs)
            return self.noise

        def heard_backward(accelerator: Any, loss: Tensor, **kwargs: Any) -> None:
            self.found["losses"].append(float(loss.detach()))
            backward(accelerator, loss, **kwargs)

        UNet2DConditionModel.forward, torch.randn_like, Accelerator.backward = heard_forward, heard_noise, heard_backward
        register_optimizer_step_pre_hook(self.before_update)
        register_optimizer_step_post_hook(self.after_update)

    def trained(self) -> dict[str, Tensor]:
        """The trained parameters by name."""
        return {name: p for name, p in self.unet.named_parameters() if p.requires_grad}

    def hear(self, unet: Any, x_t: Tensor, t: Tensor, embeds: Tensor, added: dict[str, Tensor]) -> None:
        """Keep the inputs of one forward pass."""
        if self.unet is None:
            self.unet = unet
            self.found["before"] = {name: p.detach().clone() for name, p in self.trained().items()}
        assert self.noise is not None
        target = self.noise.chunk(2)[0].repeat(2, 1, 1, 1)  # one draw for both pictures
        step = {"x_t": x_t, "t": t, "embeds": embeds, "target": target, "pooled": added["text_embeds"], "time_ids": added["time_ids"]}
        self.found["steps"].append({name: x.detach().clone() for name, x in step.items()})

    def before_update(self, *_: Any) -> None:
        """Keep the first gradients."""
        if not self.found["gradients"]:
            self.found["gradients"] = {name: p.grad.clone() for name, p in self.trained().items() if p.grad is not None}

    def after_update(self, *_: Any) -> None:
        """Write everything at the last step."""
        if len(self.found["losses"]) == self.wanted:
            self.found["after"] = {name: p.detach().clone() for name, p in self.trained().items()}
            torch.save(self.found, self.path)


def module(name: str, **content: Any) -> None:
    """A module of this name that can be imported from now on."""
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__dict__.update(content)
    sys.modules[name] = made


def without_wandb() -> None:
    """A script imports wandb whether it is used or not."""
    module("wandb", __version__="0.0")


def without_xformers() -> None:
    """A script insists on xformers; torch's own attention stays in use."""
    from diffusers import UNet2DConditionModel
    from diffusers.utils import import_utils

    module("xformers", __version__="0.0.30")
    import_utils.is_xformers_available = lambda: True
    UNet2DConditionModel.enable_xformers_memory_efficient_attention = lambda self, *args, **kwargs: None


def without_cuda() -> None:
    """A script has "cuda" written into it; on a machine without a GPU its tensors stay where they are."""
    to = Tensor.to
    if not torch.cuda.is_available():
        Tensor.to = lambda self, *args, **kwargs: self if args == ("cuda",) else to(self, *args, **kwargs)  # type: ignore[method-assign]


def narrow_kohya() -> None:
    """kohya's trainer has SDXL's widths written into it; take the narrow network and the tokenizers of DIFFPREF_FIXTURE.

    It also imports a class under a name that newer transformers no longer have, and does not use it here.
    """
    from library import model_util, sdxl_original_unet
    from transformers import CLIPImageProcessor, CLIPTokenizer

    sys.modules["transformers"].CLIPFeatureExtractor = CLIPImageProcessor  # type: ignore[attr-defined]

    model = Path(os.environ["DIFFPREF_FIXTURE"]) / "model"
    config = json.loads((model / "unet" / "config.json").read_text())
    sdxl_original_unet.MODEL_CHANNELS = config["block_out_channels"][0]
    sdxl_original_unet.TIME_EMBED_DIM = 4 * config["block_out_channels"][0]
    sdxl_original_unet.ADM_IN_CHANNELS = config["projection_class_embeddings_input_dim"]
    model_util.UNET_PARAMS_NUM_HEADS = config["attention_head_dim"]
    read = CLIPTokenizer.from_pretrained

    def local(name: str, *args: Any, **kwargs: Any) -> Any:
        return read(model / ("tokenizer" if "openai" in str(name) else "tokenizer_2"))

    CLIPTokenizer.from_pretrained = local


STAND_INS: dict[str, Callable[[], None]] = {
    "wandb": without_wandb,
    "xformers": without_xformers,
    "cuda": without_cuda,
    "kohya": narrow_kohya,
}


def main() -> None:
    """Set up and run the script as the main program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stand_in", action="append", choices=sorted(STAND_INS), default=[])
    parser.add_argument("--trace", type=Path, help="keep inputs, losses and weights of --limit steps for parity.py")
    parser.add_argument("--profile", type=Path, help="write the kernels of steps 4 to 6")
    parser.add_argument("--limit", type=int, help="end after this many optimizer steps")
    parser.add_argument("script", type=Path)
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    clock = StepClock(os.environ.get(LINK), args.limit)
    sys.path[0] = str(args.script.parent)
    for name in args.stand_in:
        STAND_INS[name]()
    if args.trace:
        Trace(args.trace, args.limit or 1).install()
    if args.profile:
        register_optimizer_step_post_hook(Profile(args.profile).after_step)
    register_optimizer_step_post_hook(clock.after_step)
    sys.argv = [str(args.script), *args.flags]
    runpy.run_path(str(args.script), run_name="__main__")


if __name__ == "__main__":
    main()
