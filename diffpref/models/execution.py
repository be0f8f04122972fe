"""How a UNet computes what it computes: which activations it keeps, in which layout, and whether its blocks are compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["off", "selective", "full"]
"""What is computed again in the backward pass in place of being kept: nothing; what costs little; every block."""
REGIONS = ("BasicTransformerBlock", "ResnetBlock2D")
"""Blocks that are compiled, one graph per kind and shape: a UNet repeats them, so that compiling takes little of the time of the whole."""

aten: Any = torch.ops.aten
_INNER = {aten.mm.default: 0, aten.addmm.default: 1, aten.bmm.default: 0}  # place of the argument whose last axis is summed over
_KEPT = {aten.convolution.default}
for _name in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"):
    _KEPT.add(getattr(aten, f"_scaled_dot_product_{_name}").default)
NARROW = 128
"""A matrix product over fewer numbers than this, such as the second one of a LoRA, is cheap for what it writes."""


def set_recompute(unet: UNet2DConditionModel, how: Recompute) -> None:
    """Keep all activations for the backward pass, those of costly operators, or those between blocks.

    selective: the results of matrix products, convolutions and attention are kept; normalisation, activation functions, casts and the
    products of narrow adapters are computed again from them. full: as diffusers does it, each residual and transformer block again.
    """
    if how == "off":
        unet.disable_gradient_checkpointing()
    else:
        unet.enable_gradient_checkpointing(_selective if how == "selective" else None)


def _selective(block: Any, *args: Any) -> Any:
    return checkpoint(block, *args, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _policy))


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether an operator's result is kept."""
    keep = args[_INNER[operator]].shape[-1] >= NARROW if operator in _INNER else operator in _KEPT
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def compile_regions(network: nn.Module, backend: str) -> None:
    """Compile every transformer and residual block in place; weights keep their names, and copies of the network are not compiled."""
    dynamo: Any = torch._dynamo
    blocks = [module for module in network.modules() if type(module).__name__ in REGIONS]
    for block in blocks:
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    # All blocks share one entry of the compiler's cache: as many graphs as there are kinds, shapes and modes have to fit
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, 8 * len(blocks))
    dynamo.config.accumulated_recompile_limit = max(dynamo.config.accumulated_recompile_limit, 32 * len(blocks))


@contextmanager
def eager(network: nn.Module) -> Iterator[None]:
    """Within the block compiled regions run uncompiled: for pictures now and then, whose shapes would be compiled too."""
    compiled = [(module, module._compiled_call_impl) for module in network.modules() if module._compiled_call_impl is not None]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call
