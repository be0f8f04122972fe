"""Policy and reference as plain functions (x_t, t, cond) -> prediction over (G, K, ...)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffpref.core.random import moved
from diffpref.core.types import Conditioning, Evaluation, LossOutput, PathStep, Predict


@contextmanager
def adapters_off(denoiser: nn.Module) -> Iterator[None]:
    """Switch LoRA layers off inside the block.

    The switch of the layers themselves is used, because enabling adapters through the model would also make frozen
    adapter weights trainable. It is restored before the backward pass, or recomputed activations would miss the adapter.
    """
    layers = [m for m in denoiser.modules() if hasattr(m, "_disable_adapters")]
    before = [m._disable_adapters for m in layers]
    for layer in layers:
        layer._disable_adapters = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state


def adapter_off(denoiser: nn.Module, policy: Predict) -> Predict:
    """LoRA: the reference is the policy with its adapters switched off; no second copy in memory."""

    @torch.no_grad()
    def predict(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        with adapters_off(denoiser):
            return policy(x_t, timesteps, cond)

    return predict


def frozen(predictor: Callable[[nn.Module], Predict], copy: nn.Module) -> Predict:
    """Full fine-tuning: the reference is `copy`, taken before the first step, in evaluation mode and without gradients."""
    return torch.no_grad()(predictor(copy.eval().requires_grad_(False)))


def without_user(predict: Predict) -> Predict:
    """The same function without user input: what a reference is that shares its network with a personalised policy.

    Switching adapters off does not switch off the user branch of a UNet.
    """

    def plain(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        return predict(x_t, timesteps, replace(cond, user_embeds=None))

    return plain


def stored(policy: Predict, trainable: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Predict:
    """The policy with other values of its trainable tensors: an earlier checkpoint or a moving average as the reference.

    trainable: the policy's own parameters by name; weights: the values to use, same names and shapes, on the same devices. They
    are exchanged for the length of a call, so that nothing is copied. Not for sharded models.
    """
    assert trainable.keys() == weights.keys(), "stored weights must name exactly the trainable tensors"

    def exchange() -> None:
        for name, parameter in trainable.items():
            parameter.data, weights[name].data = weights[name].data, parameter.data
        torch.clear_autocast_cache()  # it holds casts of the values that are no longer in place

    @torch.no_grad()
    def predict(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        exchange()
        try:
            return policy(x_t, timesteps, cond)
        finally:
            exchange()

    return predict


def one_graph(predict: Predict, no_sync: Callable[[], AbstractContextManager[object]] = nullcontext) -> Predict:
    """The same function, recorded for a backward pass also where none follows.

    A compiler makes another graph without that record, with other roundings: recorded, policy and reference are one graph. The record is
    dropped when the call returns. no_sync: a context in which data parallel processes do not wait for its backward pass.
    """

    def recorded(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        if torch.is_grad_enabled():
            return predict(x_t, timesteps, cond)
        with torch.enable_grad(), no_sync():
            return predict(x_t, timesteps, cond).detach()

    return recorded


@torch.no_grad()
def blend(weights: Mapping[str, Tensor], trainable: Mapping[str, Tensor], decay: float) -> None:
    """Move stored weights towards the policy's in place: w <- decay w + (1 - decay) policy.

    decay 0 is a hard copy (a periodically refreshed reference), 1 leaves a frozen reference. Raises ValueError outside [0, 1].
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay is {decay}; it lies in [0, 1]: 0 copies the policy, 1 keeps the reference")
    for name, value in weights.items():
        value.lerp_(trainable[name].to(value.dtype), 1 - decay)


def guided(predict: Predict, null: Conditioning | None, scale: float) -> Predict:
    """Classifier-free guidance u + scale (c - u) with both halves in one forward; the function itself for a scale of 1.

    null: conditioning of the empty prompt (1, 1, ...), whatever it lacks (time_ids) is taken from the conditional half.
    Raises ValueError when it is missing.
    """
    if scale == 1:
        return predict
    if null is None:
        raise ValueError(f"guidance_scale is {scale}, but there is no null conditioning; give the model's empty prompt, or use 1")

    def guided_predict(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        both = _with_null(null, cond)
        unconditional, conditional = predict(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), both).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return guided_predict


def _with_null(null: Conditioning, cond: Conditioning) -> Conditioning:
    """(2G, K, ...): the null conditioning for every image, then `cond`."""
    joined = {}
    for f in fields(cond):
        given, empty = getattr(cond, f.name), getattr(null, f.name)
        if given is not None:
            joined[f.name] = torch.cat([given if empty is None else empty.to(given).expand_as(given), given])
    return replace(cond, **joined)


def evaluate(
    steps: Sequence[PathStep],
    cond: Conditioning,
    policy: Predict,
    reference: Predict | None,
    null: Conditioning | None = None,
    reference_error: Tensor | None = None,
) -> list[Evaluation]:
    """Ask reference and policy for a prediction at every step; the reference first, while no graph is alive.

    null: conditioning of the empty prompt (1, 1, ...), for steps with guidance. reference_error: (G, K) of a single step,
    computed beforehand; the reference is then not asked.
    """
    assert reference_error is None or len(steps) == 1, "precomputed errors belong to one step"
    evals = []
    for step in steps:
        expected = step.reference
        if reference is not None and expected is None and reference_error is None:
            expected = predicted(step, cond, reference, null)
        evals.append(Evaluation(step, predicted(step, cond, policy, null), expected, reference_error))
    return evals


def predicted(step: PathStep, cond: Conditioning, predict: Predict, null: Conditioning | None = None) -> Tensor:
    """What a network predicts at a step under its guidance, (G, K, C, h, w); asked once for a group whose images share their input."""
    ask = guided(predict, null, step.guidance_scale)
    groups, images = step.x_t.shape[:2]
    assert len(step.shared_input) in (0, groups), "shared_input is said of every group, or of none"
    if not any(step.shared_input):
        return ask(step.x_t, step.timesteps, cond)
    sources = [group * images + (0 if shared else k) for group, shared in enumerate(step.shared_input) for k in range(images)]
    asked = list(dict.fromkeys(sources))  # images that are not the same as an earlier one of their group
    rows, places = (moved(torch.tensor(x), step.x_t.device) for x in (asked, [asked.index(i) for i in sources]))
    x_t, t = (x.flatten(0, 1)[rows][:, None] for x in (step.x_t, step.timesteps))  # (N, 1, ...)
    found = ask(x_t, t, cond.map(lambda x: x.flatten(0, 1)[rows][:, None]))[:, 0]
    return found[places].reshape(*step.timesteps.shape, *found.shape[1:])


def two_pass_backward(
    steps: Sequence[PathStep],
    cond: Conditioning,
    policy: Predict,
    reference: Predict | None,
    loss: Callable[[list[Evaluation]], LossOutput],
    *,
    null: Conditioning | None = None,
    backward: Callable[[Tensor], object] = Tensor.backward,
    no_sync: Callable[[], AbstractContextManager[object]] = nullcontext,
    at_once: int = 1,
) -> LossOutput:
    """Gradient of the mean loss over many steps with the activations of few in memory; exact, for one more forward per step.

    First all predictions without a graph, then the loss on them as leaves, then the steps again, where the sum of prediction
    times the leaf's gradient has the gradient of the whole loss.

    loss: method and guards, from evaluations to their output. backward: called once per part with a scalar (scale it there for
    accumulation). no_sync: a context around every part but the last, where data parallel processes must not yet average.
    at_once: steps of a part, which go through the networks together. Returns the loss without gradient.
    """
    parts = [steps[start : start + at_once] for start in range(0, len(steps), at_once)]
    leaves, evals = [], []
    for part in parts:
        with torch.no_grad():
            (seen,) = evaluate([joined(part)], repeated(cond, len(part)), policy, reference, null)
        expected = [None] * len(part) if seen.reference is None else seen.reference.chunk(len(part))
        for step, prediction, of_reference in zip(part, seen.policy.chunk(len(part)), expected, strict=True):
            leaf = prediction.to(torch.promote_types(prediction.dtype, torch.float32)).detach().requires_grad_()
            leaves.append(leaf)
            evals.append(Evaluation(step, leaf, of_reference))
    torch.clear_autocast_cache()  # casts of the weights made without a graph would cut the gradient of the second pass
    out = loss(evals)
    gradients = torch.autograd.grad(out.per_group.mean(), leaves, materialize_grads=True)
    for i, part in enumerate(parts):
        with nullcontext() if i == len(parts) - 1 else no_sync():
            prediction = predicted(joined(part), repeated(cond, len(part)), policy, null)
            backward((prediction * torch.cat(gradients[i * at_once : (i + 1) * at_once])).sum())
    return replace(out, per_group=out.per_group.detach())


def joined(steps: Sequence[PathStep]) -> PathStep:
    """Steps of one path, which share their guidance, as one step of (S G) groups: all groups of the first, then of the second, ..."""
    if len(steps) == 1:
        return steps[0]
    names = [f.name for f in fields(PathStep) if isinstance(getattr(steps[0], f.name), Tensor)]
    tensors: dict[str, Any] = {name: torch.cat([getattr(step, name) for step in steps]) for name in names}
    return replace(steps[0], **tensors, shared_input=sum((step.shared_input for step in steps), ()))


def repeated(cond: Conditioning, times: int) -> Conditioning:
    """(G, K, ...) as (times G, K, ...), as `joined` steps need it."""
    return cond if times == 1 else cond.map(lambda x: torch.cat([x] * times))
