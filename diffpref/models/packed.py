"""Frozen layers on a CPU, with weights laid out for its kernels once in place of at every call.

oneDNN's convolutions and MKL's matrix products rearrange the weights that they are given. For a frozen layer the result is always the
same, so that it is kept: once for the forward pass and once for the gradient of the input, which are a convolution with mirrored kernels
and a product with the transposed matrix. Numbers differ by rounding from those of plain layers, for policy and reference alike.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.grad
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ops: Any = torch.ops
LEAST = 512 * 512
"""Numbers of a matrix that is packed. MKL reserves 8 MB for smaller ones, too, and they gain less than the way to its kernel costs."""


class Layouts(dict[Any, Any]):
    """The kept layouts of one layer's weight; a copy of the layer starts without any, because its weight may be changed."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Layouts:
        return Layouts()


class PackedConv2d(nn.Conv2d):
    """A frozen convolution. The layout is made for the shape of the first call and used for all: none changes the numbers."""

    layouts: Layouts

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in, h, w), contiguous or not."""
        if x.ndim != 4 or not _is_packable(x):
            return super().forward(x)
        return _Convolution.apply(x.contiguous(), self)  # type: ignore[no-any-return]

    def convolved(self, x: Tensor, is_backward: bool) -> Tensor:
        """The convolution of x, or that which turns gradients of outputs into those of inputs (stride 1)."""
        if is_backward not in self.layouts:
            assert not isinstance(self.padding, str)
            weight, bias, padding = self.weight.detach(), self.bias, self.padding
            if is_backward:
                weight, bias = weight.flip(2, 3).transpose(0, 1).contiguous(), None
                padding = tuple(k - 1 - p for k, p in zip(self.kernel_size, padding, strict=True))
            bias = bias.detach() if bias is not None else None
            settings = (self.stride, padding, self.dilation, self.groups, list(x.shape), "none")
            self.layouts[is_backward] = ops.mkldnn_prepacked.conv2d_prepack(weight, bias, *settings)
        return ops.mkldnn_prepacked.conv2d_run(x, self.layouts[is_backward])  # type: ignore[no-any-return]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedConv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.convolved(x, False)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        layer: PackedConv2d = ctx.layer
        if layer.stride == (1, 1):
            return layer.convolved(grad.contiguous(), True), None
        return torch.nn.grad.conv2d_input(ctx.shape, layer.weight, grad, layer.stride, layer.padding), None


class PackedLinear(nn.Linear):
    """A frozen matrix. Layouts belong to a number of rows; they are made for those of a full batch, and others are computed as ever.

    What a call computes must not depend on which came before it: a resumed run would else be another one.
    """

    layouts: Layouts
    images: int

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, ..., in)."""
        if x.ndim < 2 or len(x) != self.images or not _is_packable(x):
            return super().forward(x)
        return _Product.apply(x, self)  # type: ignore[no-any-return]

    def product(self, x: Tensor, is_backward: bool) -> Tensor:
        """x times the transposed matrix plus bias, or, for gradients, x times the matrix."""
        rows = x.numel() // x.shape[-1]
        weight, bias = (self.weight.t(), None) if is_backward else (self.weight, self.bias)
        if (rows, is_backward) not in self.layouts:
            self.layouts[rows, is_backward] = ops.mkl._mkl_reorder_linear_weight(weight.detach(), rows)
        return ops.mkl._mkl_linear(x, self.layouts[rows, is_backward], weight, bias, rows)  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x, False)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.product(grad, True), None


def pack(network: nn.Module, images: int) -> None:
    """Let the frozen layers of a network in float32 on a CPU keep layouts of their weights.

    images: pictures of a forward pass, for which matrices are laid out. Names, weights and files stay as they are. The weights must not
    change from the first call on. Raises ValueError where torch was built without the kernels.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(ops.mkldnn_prepacked, "conv2d_prepack") and torch.backends.mkl.is_available()):
        raise ValueError("pack_weights is true, but this build of torch has no oneDNN or MKL kernels; leave it out")
    for layer in network.modules():
        kind = _packed_kind(layer)
        if kind is not None:
            layer.__class__, layer.layouts, layer.images = kind, Layouts(), images  # type: ignore[assignment]


def packable_bytes(network: nn.Module) -> int:
    """Bytes of the weights that `pack` would keep in two further layouts, or does."""
    return sum(layer.weight.nbytes for layer in network.modules() if _packed_kind(layer) is not None)  # type: ignore[misc]


def _is_packable(x: Tensor) -> bool:
    """Whether there are numbers of the right type: the preflight counts steps with tensors that have none."""
    return type(x) is Tensor and x.device.type == "cpu" and x.dtype == torch.float32


def _packed_kind(layer: nn.Module) -> type[nn.Module] | None:
    """What a layer becomes; None for those that are trained, of another kind, or gain nothing."""
    if not isinstance(layer, nn.Conv2d | nn.Linear) or layer.weight.requires_grad or layer.weight.dtype != torch.float32:
        return None
    if isinstance(layer, nn.Linear):
        return PackedLinear if type(layer) in (nn.Linear, PackedLinear) and layer.weight.numel() >= LEAST else None
    if type(layer) not in (nn.Conv2d, PackedConv2d) or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return None
    mirrors = all(p < k for p, k in zip(layer.padding, layer.kernel_size, strict=True))
    wide = max(layer.kernel_size) > 1  # torch computes a kernel of one pixel without rearranging
    return PackedConv2d if mirrors and wide and layer.groups == 1 and layer.dilation == (1, 1) else None
