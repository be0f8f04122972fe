"""The attention of a UNet by any of the kernels that diffusers' dispatcher knows, each tried before a run relies on it.

A plain UNet of diffusers calls torch's own kernel and cannot be told otherwise: its `set_attention_backend` finds no layer that listens.
The processor below does the same steps in the same order and asks the dispatcher, so that every kernel is a name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from torch import Tensor

NATIVE = AttentionBackendName.NATIVE
KERNELS: Mapping[str, AttentionBackendName] = {
    "sdpa": NATIVE,
    **{name.value.lstrip("_"): name for name in AttentionBackendName if "hub" not in name.value},
}
"""What attention can be: torch's own choice, diffusers' name of a kernel without its underscore. Those of the hub are code that is
downloaded and run, which we never do; the same kernels come as packages."""
TEXT_TOKENS = 77

Shape = tuple[int, int, int, int]
"""Query tokens, key tokens, heads and their width."""
Size = tuple[int, int]
"""Height and width, of latents or of pictures."""


def check_attention(name: str, is_training: bool) -> None:
    """Raises ValueError for an unknown kernel, listing the known ones, and for one that cannot train."""
    if name not in KERNELS:
        why = "is code from the hub, which is never downloaded and run; install the kernel's package" if "hub" in name else "is unknown"
        raise ValueError(f"attention {name!r} {why}; accepted: {', '.join(KERNELS)}")
    if is_training and name.startswith("sage"):
        raise ValueError(f"attention is {name}, which rounds to 8 bits and has no backward pass: it draws pictures only; train with sdpa")


class DispatchedAttention:
    """Processor of an attention layer of SD's and SDXL's UNets: diffusers' AttnProcessor2_0 with a kernel of one's choice."""

    def __init__(self, backend: AttentionBackendName = NATIVE) -> None:
        self._attention_backend: AttentionBackendName | None = backend  # where diffusers' set_attention_backend looks

    def __call__(  # diffusers looks at its signature for the arguments that a processor takes
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        user: Any = None,
    ) -> Tensor:
        """Attention of hidden_states (B, S, C) to itself or to text (B, L, D). user: of user branches, which this layer lacks."""
        return attended(attn, hidden_states, encoder_hidden_states, attention_mask, self._attention_backend)


def attended(
    attn: Any,
    hidden_states: Tensor,
    text: Tensor | None,
    mask: Tensor | None,
    backend: AttentionBackendName | None,
    branch: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """What a layer gives for hidden_states (B, S, C); the steps of diffusers' own processor in its order.

    branch: queries (B, S, H, C/H) to what is added to the attention's output, of the same shape.
    """
    source = hidden_states if text is None else text
    if text is not None and attn.norm_cross:
        source = attn.norm_encoder_hidden_states(text)
    if mask is not None:
        mask = attn.prepare_attention_mask(mask, source.shape[1], len(source))
        mask = mask.view(len(source), attn.heads, -1, mask.shape[-1])
    query, key, value = (heads(x, attn.heads) for x in (attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)))
    out = kernel(query, key, value, mask, backend)
    if branch is not None:
        out = out + branch(query)
    out = attn.to_out[1](attn.to_out[0](out.flatten(2).to(query.dtype)))
    if attn.residual_connection:
        out = out + hidden_states
    return out / attn.rescale_output_factor


def kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, backend: AttentionBackendName | None) -> Tensor:
    """Attention (B, S, H, D) of query (B, S, H, D) to key and value (B, L, H, D), computed by `backend`."""
    out: Tensor = dispatch_attention_fn(query, key.to(query.dtype), value.to(query.dtype), attn_mask=mask, backend=backend)
    return out


def heads(x: Tensor, number: int) -> Tensor:
    """(B, S, C) to (B, S, H, C/H)."""
    return x.unflatten(-1, (number, -1))


def check_layer(name: str, layer: Any) -> None:
    """Raises ValueError for an attention layer with parts that SD's and SDXL's do not have."""
    parts = (layer.spatial_norm, layer.group_norm, layer.norm_q, layer.added_kv_proj_dim)
    if any(part is not None for part in parts):
        raise ValueError(f"attention layer {name} is of another kind than SD's and SDXL's")


def use_attention(
    unet: UNet2DConditionModel, name: str, sizes: Iterable[Size], batch: int, dtype: torch.dtype, is_training: bool
) -> str | None:
    """Let every attention layer of a UNet compute by the kernel `name`, if it works here; else by torch's own, with a line to say why.

    It is tried at every shape that latents of these `sizes` and `batch` pictures give, in the dtype of the products, with a backward pass
    for training, and compared with torch's own. Raises ValueError as `check_attention` does.
    """
    check_attention(name, is_training)
    if KERNELS[name] is NATIVE:
        return None
    device = next(unet.parameters()).device
    reason = problem(name, attention_shapes(unet, sizes), batch, dtype, device, is_training)
    if reason is not None:
        return f"attention {name} cannot be used here ({reason}); torch's own is used in its place, which computes the same"
    processors = dict(unet.attn_processors)
    for layer, processor in processors.items():
        if hasattr(processor, "_attention_backend"):  # a user branch
            processor._attention_backend = KERNELS[name]
        else:
            check_layer(layer, unet.get_submodule(layer.removesuffix(".processor")))
            processors[layer] = DispatchedAttention(KERNELS[name])
    unet.set_attn_processor(processors)
    return None


def attention_shapes(unet: UNet2DConditionModel, sizes: Iterable[Size]) -> list[Shape]:
    """The different shapes of attention in a UNet on latents of these sizes, largest first."""
    deepest = len(unet.config.down_block_types) - 1
    found = set()
    for name in unet.attn_processors:
        layer, (block, number, *_) = unet.get_submodule(name.removesuffix(".processor")), name.split(".")
        level = int(number) if block == "down_blocks" else deepest - int(number) if block == "up_blocks" else deepest
        for height, width in sizes:
            tokens = -(-height >> level) * -(-width >> level)  # sides are rounded up
            found.add((tokens, tokens if ".attn1." in name else TEXT_TOKENS, layer.heads, layer.to_q.out_features // layer.heads))
    return sorted(found, reverse=True)


def problem(name: str, shapes: Iterable[Shape], batch: int, dtype: torch.dtype, device: torch.device, is_training: bool) -> str | None:
    """Why a kernel cannot be used: what it needs is not there, it fails at one of the shapes, or it computes something else."""
    try:
        with attention_backend(KERNELS[name].value):  # which looks for the packages that it needs
            for shape in shapes:
                if (far := _difference(name, shape, batch, dtype, device, is_training)) is not None:
                    return far
    except Exception as error:  # a kernel of anybody's may raise anything, and the answer is the same
        return " ".join(str(error).split())[:300] or type(error).__name__
    return None


def _difference(name: str, shape: Shape, batch: int, dtype: torch.dtype, device: torch.device, is_training: bool) -> str | None:
    """How far output and gradients at one shape are from those of torch's own kernel, if it is more than rounding."""
    queries, keys, number, width = shape
    draw = torch.Generator(device).manual_seed(0)
    made = [torch.randn(batch, n, number, width, generator=draw, device=device, dtype=dtype) for n in (queries, keys, keys)]
    found = []
    for backend in (NATIVE, KERNELS[name]):
        inputs = [x.clone().requires_grad_(is_training) for x in made]
        out = kernel(inputs[0], inputs[1], inputs[2], None, backend)
        found.append([out.detach(), *(torch.autograd.grad(out.float().pow(2).sum(), inputs) if is_training else [])])
    limit = 0.1 if name.startswith("sage") else 1e-3 if dtype == torch.float32 else 0.05
    for part, ours, theirs in zip(("output", "gradient", "gradient", "gradient"), *found, strict=False):
        far = float((theirs.float() - ours.float()).norm() / ours.float().norm())
        if not far <= limit:  # also if it is nan
            return f"its {part} is {far:.2g} away from torch's for {queries} x {keys} tokens of {number} heads"
    return None
