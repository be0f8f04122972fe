"""What a step takes in bytes, FLOPs and kernels, counted on tensors without memory before anything is computed.

A copy of the network whose tensors are fake (shapes, dtypes and devices, but no numbers) runs one forward and backward pass
under the autocast, the gradient checkpointing and the adapters of the run. Storages are counted while they live, so the peak is
what an allocator without waste would need; FLOPs are torch's counts of matrix products, convolutions and attention, two per
multiply-add; kernels are the operators that launch one when nothing is compiled. What stays out: workspaces inside kernels, and
what the allocator loses by fragmentation.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from diffpref.core.types import Conditioning
from diffpref.models.attention import NATIVE
from diffpref.models.backbone import FAMILIES, Backbone, vae_factor
from diffpref.models.execution import Recompute, set_recompute
from diffpref.models.joint import TextAndUNet
from diffpref.models.user_attention import UserUNet

USER_TOKENS = 4
"""Tokens that a user branch is counted with; it is the smallest part of a step."""


@dataclass(frozen=True)
class StepCost:
    """Of one micro-batch, weights and gradients that were there before not counted."""

    activations: int  # bytes at the peak of forward and backward pass, less the gradients
    forward_flops: int
    flops: int  # forward and backward, with what checkpointing computes again
    kept: int  # bytes that the forward pass leaves for the backward pass
    forward_kernels: int  # operators that launch one: all but views and allocations
    kernels: int  # forward and backward


aten: Any = torch.ops.aten


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward_flops(gradient: Tensor, *inputs: Any, **kwargs: Any) -> int:
    return 2 * _attention_flops(*inputs[:3])  # four products; that kernels compute the scores again is not counted


_ATTENTION: dict[Any, Any] = {  # the operators of a CPU, which torch's table lacks
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
_FLOPS = {**flop_registry, **_ATTENTION}


class Counter(TorchDispatchMode):
    """Counts living bytes and FLOPs of the operators inside the block."""

    def __init__(self, known: nn.Module | None = None) -> None:
        super().__init__()
        self.live = self.peak = self.flops = self.kernels = 0
        self._sizes: dict[int, int] = {}
        for x in () if known is None else [*known.parameters(), *known.buffers()]:
            self._sizes |= {part.untyped_storage()._cdata: 0 for part in (x, x.grad) if part is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outputs = [x for x in (out if isinstance(out, tuple | list) else (out,)) if isinstance(x, Tensor)]
        writes = [self._add(x.untyped_storage()) for x in outputs]
        if (any(writes) or func._schema.is_mutable) and "empty" not in func.overloadpacket.__name__:
            self.kernels += 1
        count = _FLOPS.get(func.overloadpacket)
        if count:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out

    def _add(self, storage: torch.UntypedStorage) -> bool:
        """Whether the storage is new."""
        key = storage._cdata
        is_new = key not in self._sizes
        if is_new:
            self._sizes[key] = storage.nbytes()
            self.live += self._sizes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key)
        return is_new

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def step_cost(
    backbone: Backbone,
    module: nn.Module,
    groups: tuple[int, int],
    resolution: int,
    *,
    autocast: bool,
    recompute: Recompute,
    on_gpu: bool,
    accumulates: bool = False,
) -> StepCost:
    """Cost of a forward and backward pass of the trained module over (G, K) pictures of resolution x resolution pixels.

    autocast: to 16 bits; bf16 stands for fp16 too. on_gpu: count normalisation layers in float32, as autocast computes them on GPUs only.
    accumulates: gradients of earlier micro-batches are there during the forward pass, as they are in all but the first of an update.
    """
    null = backbone.null_prompt()
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = without_memory(module)
        unet: Any = network.unet if isinstance(network, TextAndUNet | UserUNet) else network
        set_recompute(unet, recompute)
        for processor in unet.attn_processors.values():
            if hasattr(processor, "_attention_backend"):  # other kernels save what torch's does, and some run on GPUs only
                processor._attention_backend = NATIVE
        if on_gpu and autocast:
            _normalise_in_float32(network)
        side = resolution // vae_factor(backbone.pipeline)
        x_t = torch.empty(*groups, unet.config.in_channels, side, side)
        cond = null.map(lambda x: torch.empty(groups[0], *x.shape[1:], dtype=torch.bfloat16 if x.dtype == torch.float16 else x.dtype))
        times = torch.empty(*groups, 6) if backbone.uses_time_ids else None
        trained = [p for p in network.parameters() if p.requires_grad]
        for p in trained if accumulates else ():
            p.grad = torch.empty_like(p)
        counter = Counter(network)
        with counter, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            cond = _encoded(network, cond, recompute != "off").map(lambda x: x.expand(-1, groups[1], *x.shape[2:]))
            predict = FAMILIES[backbone.family].predictor(unet)
            tokens = torch.empty(*groups, USER_TOKENS, unet.config.cross_attention_dim) if isinstance(network, UserUNet) else None
            told = replace(cond, time_ids=times, user_embeds=tokens)
            prediction = predict(x_t, torch.zeros(groups, dtype=torch.int64), told)
        forward_flops, forward_kernels, kept = counter.flops, counter.kernels, counter.live
        with counter:
            (prediction.float() - x_t).pow(2).mean().backward()
    gradients = 0 if accumulates else sum(p.numel() * p.element_size() for p in trained)
    return StepCost(max(0, counter.peak - gradients), forward_flops, counter.flops, kept, forward_kernels, counter.kernels)


def _encoded(network: nn.Module, cond: Conditioning, recompute: bool) -> Conditioning:
    """Conditioning (G, 1, ...): as it is, or encoded from token ids by a network that contains its text encoders."""
    if not isinstance(network, TextAndUNet) or cond.token_ids is None:
        return cond
    ids = cond.token_ids[:, 0]
    return checkpoint(network.encode, ids, use_reentrant=False) if recompute else network.encode(ids)


def vae_bytes(vae: AutoencoderKL, images: int, resolution: int, decode: bool = False) -> int:
    """Bytes at the peak of encoding (or decoding) `images` pictures at once, weights not counted."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        network = without_memory(vae)
        pixels = torch.empty(images, 3, resolution, resolution)
        with Counter(network) as counter:
            latent = network.encode(pixels).latent_dist.mean
            if decode:
                counter.peak = counter.live
                network.decode(latent)
    return counter.peak


def without_memory(network: Any) -> Any:
    """A copy of a network that shares nothing with it and holds fake tensors; for use inside FakeTensorMode."""
    memo: dict[int, Any] = {}
    for x in [*network.parameters(), *network.buffers()]:
        fake = torch.empty(x.shape, dtype=torch.bfloat16 if x.dtype == torch.float16 else x.dtype)  # not all CPU kernels know fp16
        memo[id(x)] = nn.Parameter(fake, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else fake
    return copy.deepcopy(network, memo)


def _normalise_in_float32(denoiser: nn.Module) -> None:
    """Make normalisation layers take and give float32, as autocast makes them on GPUs."""
    for layer in denoiser.modules():
        if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            for name, p in list(layer.named_parameters(recurse=False)):  # layer.float() cannot change the type of a fake tensor
                setattr(layer, name, nn.Parameter(torch.empty_like(p, dtype=torch.float32), requires_grad=p.requires_grad))
            layer.register_forward_pre_hook(lambda _, given: (given[0].float(), *given[1:]))


def upper_bound(backbone: Backbone, module: nn.Module, images: int, resolution: int) -> int:
    """More bytes than training on `images` pictures at once can take, from the shapes alone: for small models, which need no count.

    Every layer as if it worked on the largest map: four float32 copies of its output channels in the trained module, and of the two
    widest layers in the autoencoder, which keeps nothing for a backward pass.
    """
    channels = sum(p.shape[0] for p in module.parameters() if p.ndim)
    places = max((resolution // vae_factor(backbone.pipeline)) ** 2, 77)  # of a latent, or tokens of a prompt
    pixels = resolution**2 * 2 * max(backbone.pipeline.vae.config.block_out_channels)
    return images * 4 * 4 * max(places * channels, pixels)
