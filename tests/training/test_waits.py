"""What a step sends to its device is sent without waiting for it. The device `meta` stands for a GPU: nothing is computed there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffpref.core.process import DdpmProcess
from diffpref.core.types import Conditioning, PreferenceBatch
from diffpref.paths.forward import ForwardNoising
from diffpref.paths.inversion import DdimInversion
from diffpref.sources.dataset import Encoded, Encoder, assemble

GPU = torch.device("meta")
COPIES = ("_to_copy", "copy_", "index", "index_put_", "index_put")


class Waits(TorchDispatchMode):
    """Lists the operators that bring something from the CPU to the device, or back, and wait until it is there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in COPIES and not kwargs.get("non_blocking") and not (name == "copy_" and args[2:] == (True,)):
            devices = {x.device for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim}
            if len(devices | ({kwargs["device"]} if kwargs.get("device") else set())) > 1:
                self.seen.append(name)
        return func(*args, **kwargs)


def batch() -> PreferenceBatch:
    cond = Conditioning(torch.zeros(3, 2, 5, 4, device=GPU))
    relevance = torch.tensor([[1.0, 0.0]]).expand(3, 2).to(GPU)
    return PreferenceBatch(torch.zeros(3, 2, 4, 8, 8, device=GPU), cond, relevance, ("a", "b", "c"), (0, 0, 1))


@pytest.mark.parametrize(
    "path",
    [
        ForwardNoising(),
        ForwardNoising(shared_noise=False, noise_offset=0.1, input_perturbation=0.1),
        DdimInversion(num_steps=5),
        DdimInversion(num_steps=5, eta=0.3, renoise_iterations=2),
    ],
    ids=["forward", "offset", "inversion", "renoise"],
)
def test_a_path_does_not_wait_for_the_device(path: Any) -> None:
    process = DdpmProcess.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    pairs = batch()
    draws = pairs.random(0)

    def network(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return x

    path(pairs, process, draws, policy=network, reference=network)  # brings the noise table to the device, once
    with Waits() as waits:
        (step,) = path(pairs, process, draws, policy=network, reference=network)
    assert step.x_t.device.type == step.timesteps.device.type == "meta"
    assert not waits.seen


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_a_batch_is_put_together_ahead_of_the_device(where: str) -> None:
    """Latents come from a cache, or right from the autoencoder on the device."""
    known = {name: Conditioning(torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 4)) for name in ("one", "two")}
    encoder = Encoder(lambda x: x, lambda texts: known[texts[0]], known["one"], True, GPU, 0, prompt_cache=dict(known))
    encoded = Encoded(
        torch.zeros(2, 2, 2, 4, 8, 8, device=where),
        torch.zeros(2, 2, 6),
        torch.tensor([[1.0, 0.0]]).expand(2, 2),
        ["a", "b"],
        [("one", "one"), ("two", "two")],
        [0, 0],
        scores={"pickscore": torch.zeros(2, 2)},
        weight=torch.ones(2),
    )
    with Waits() as waits:
        made = assemble(encoded, encoder)
    assert made.latents.device.type == made.scores["pickscore"].device.type == "meta"
    assert not waits.seen


def test_the_counter_counts() -> None:
    there = torch.zeros(3, device=GPU)
    with Waits() as waits:
        torch.zeros(3).to(GPU)
        torch.zeros(3).to(GPU, non_blocking=True)
        there[torch.tensor([0, 1])]
        there[torch.tensor([0, 1])] = 1.0
    assert waits.seen == ["_to_copy", "index", "index_put_"]
