"""Every recipe end to end on a toy network: it resolves, costs what it should, and treats a batch as its pairs one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffpref.core.policy import evaluate
from diffpref.core.process import DdpmProcess
from diffpref.core.types import Conditioning, Predict, PreferenceBatch
from diffpref.guards import GUARDS, guarded
from diffpref.methods import METHODS, DiffusionDPO, DiffusionKTO
from diffpref.methods.recipes import RECIPES, Recipe
from diffpref.paths import PATHS
from diffpref.paths.recorded import transition_step
from diffpref.sources import SOURCES

PROCESS = DdpmProcess.from_betas(torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2)
NULL = Conditioning(torch.zeros(1, 1, 2, 3, dtype=torch.float64))
GENTLE = {"beta": 4.0}  # the recipes' betas belong to real models and saturate the toy
NODES = {"num_steps": 6}

pytestmark = pytest.mark.filterwarnings("ignore:method dro")
each_recipe = pytest.mark.parametrize("name", list(RECIPES))


def toy(weights: Tensor) -> Predict:
    """A denoiser of four numbers."""

    def predict(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        a, b, k, c = weights
        words = cond.prompt_embeds.flatten(2).mean(-1)
        return a * x_t + b * x_t.tanh() + (k * timesteps.to(x_t.dtype) / 1000 + c * words)[..., None, None, None]

    return predict


@dataclass
class Counted:
    """A network that notes how many images it saw, with and without a graph."""

    network: Predict
    seen: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})

    def __call__(self, x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        self.seen[torch.is_grad_enabled()] += timesteps.numel()
        return self.network(x_t, timesteps, cond)


def groups_of(images: int, groups: int, recorded: bool = False) -> PreferenceBatch:
    """Groups with scores of every name that a recipe asks for; recorded: with one caption each, as a source that samples has."""
    maker = torch.Generator().manual_seed(1)
    latents = torch.randn(groups, images, 2, 3, 3, generator=maker, dtype=torch.float64)
    words = torch.randn(groups, images, 2, 3, generator=maker, dtype=torch.float64)
    relevance = torch.linspace(1, 0, max(images, 2), dtype=torch.float64)[:images].expand(groups, images)
    scores = {name: 0.2 + 0.02 * torch.randn(groups, images, generator=maker, dtype=torch.float64) for name in ("score", "pickscore")}
    ids = tuple(f"pair-{i}" for i in range(groups))
    weight = torch.linspace(0.5, 2, groups)
    t, p = torch.full((groups, images), 601), torch.full((groups, images), 551)
    cond = Conditioning(words[:, :1].expand_as(words)) if images == 2 else Conditioning(words)
    x_t = latents[:, :1].expand_as(latents)
    x_p = x_t + torch.randn(latents.shape, generator=maker, dtype=torch.float64)
    steps = tuple(transition_step(PROCESS, x_t, x_p + k, t - k, p - k, guidance_scale=2.0, shared_input=(True,) * groups) for k in range(2))
    return PreferenceBatch(latents, cond if recorded else Conditioning(words), relevance, ids, (0,) * groups, scores, weight, steps=steps)


STEP_TENSORS = ("x_t", "timesteps", "target", "weight", "log_snr")


def rows(batch: PreferenceBatch, index: Sequence[int]) -> PreferenceBatch:
    """Some groups of a batch."""
    chosen = list(index)
    assert batch.weight is not None
    return replace(
        batch,
        latents=batch.latents[chosen],
        cond=batch.cond.map(lambda x: x[chosen]),
        relevance=batch.relevance[chosen],
        pair_ids=tuple(batch.pair_ids[i] for i in chosen),
        visits=tuple(batch.visits[i] for i in chosen),
        scores={name: x[chosen] for name, x in batch.scores.items()},
        weight=batch.weight[chosen],
        steps=tuple(
            replace(step, **{n: getattr(step, n)[chosen] for n in STEP_TENSORS}, shared_input=tuple(step.shared_input[i] for i in chosen))
            for step in batch.steps
        ),
    )


def images_of(recipe: Recipe) -> int:
    """Images per group: 3 for rankings, 2 for everything else that takes any number."""
    return METHODS[recipe.method].images_per_group or (3 if recipe.method in ("lipo", "rank_dpo") else 2)


def run(recipe: Recipe, batch: PreferenceBatch, policy: Predict, reference: Predict | None) -> Tensor:
    """Loss per group of a recipe, as the training loop would compute it."""
    settings: dict[str, Any] = dict(recipe.settings)
    if recipe.method == "dense_reward":
        settings["log_ratio_range"] = 5.0
    gentle = {key: value for key, value in GENTLE.items() if hasattr(METHODS[recipe.method], key) and recipe.method != "mapo"}
    if recipe.method == "smpo" and "score_min" not in settings:
        settings["score_min"], settings["score_max"] = 0.1, 0.3  # the run takes them from the data
    method: Any = METHODS[recipe.method](**(settings | gentle))
    path = PATHS[recipe.path](**(dict(recipe.path_settings) | (NODES if recipe.path == "trajectory" else {})))
    guards = [GUARDS[name](**dict(own)) for name, own in recipe.guards.items()]
    known = reference if method.needs_reference else None
    steps = path(batch, PROCESS, batch.random(0), policy, known, NULL)
    return guarded(method.loss, guards)(batch, evaluate(steps, batch.cond, policy, known, NULL)).per_group


def networks() -> tuple[Counted, Counted, Tensor]:
    """Policy, reference, and the policy's weights."""
    weights = torch.tensor([0.30, 0.10, -0.20, 0.05], dtype=torch.float64, requires_grad=True)
    frozen = torch.no_grad()(toy(torch.tensor([0.28, 0.12, -0.20, 0.05], dtype=torch.float64)))
    return Counted(toy(weights)), Counted(frozen), weights


def test_names() -> None:
    assert METHODS.keys() <= RECIPES.keys()
    assert all(RECIPES[name].method == name for name in METHODS)
    assert len(RECIPES) == 27
    assert {recipe.path for recipe in RECIPES.values()} == set(PATHS)


@each_recipe
def test_every_recipe_resolves_with_its_published_settings(name: str) -> None:
    recipe = RECIPES[name]
    METHODS[recipe.method](**dict(recipe.settings))
    PATHS[recipe.path](**dict(recipe.path_settings))
    assert (recipe.source is not None) == (recipe.path == "recorded")
    if recipe.source is not None:
        SOURCES[recipe.source](**dict(recipe.source_settings))
    for guard, own in recipe.guards.items():
        GUARDS[guard](**dict(own))


@each_recipe
def test_a_batch_is_its_pairs_one_by_one(name: str) -> None:
    recipe, (policy, reference, _) = RECIPES[name], networks()
    batch = groups_of(images_of(recipe), 5, recipe.source is not None)
    whole = run(recipe, batch, policy, reference)
    assert whole.shape == (5,)
    assert float(whole.detach().std()) > 0
    if recipe.method != "diffusion_kto":  # whose reference point is the mean of the batch
        singles = torch.cat([run(recipe, rows(batch, [g]), policy, reference) for g in range(5)])
        torch.testing.assert_close(whole, singles, rtol=1e-11, atol=1e-12)
    order = [3, 0, 4, 2, 1]
    torch.testing.assert_close(run(recipe, rows(batch, order), policy, reference), whole[order], rtol=1e-11, atol=1e-12)


@each_recipe
def test_every_recipe_trains_the_policy_and_nothing_else(name: str) -> None:
    recipe, (policy, reference, weights) = RECIPES[name], networks()
    run(recipe, groups_of(images_of(recipe), 3), policy, reference).mean().backward()
    assert weights.grad is not None
    assert weights.grad.isfinite().all()
    assert float(weights.grad.abs().max()) > 1e-9


def moves(recipe: str) -> float:
    """Moves of an inversion, averaged over the pairs of `groups_of`."""
    path: Any = PATHS["inversion"](**dict(RECIPES[recipe].path_settings))
    batch = groups_of(2, 5)
    levels = batch.random(0).integers("timestep", 1000).tolist()
    return sum(len(path.moves(t, 1000)) for t in levels) / 5


# Images through the policy with a graph, and through both networks without one, per group.
COSTS: dict[str, tuple[float, Callable[[], float]]] = {
    "sft": (1, lambda: 0),
    "diffusion_dpo": (2, lambda: 2),
    "mapo": (2, lambda: 0),
    "dro": (2, lambda: 0),
    "diffusion_sdpo": (2, lambda: 2),
    "tdpo": (2, lambda: 2),
    "diffusion_kto": (2, lambda: 2),  # two images per group here
    "rank_dpo": (3, lambda: 3),
    "inpo": (2, lambda: 2 + 2 * moves("inpo")),
    "smpo": (2, lambda: 2 + 2 * 2 * moves("smpo")),
    "spo": (2 * 2, lambda: 2 * 2),  # two recorded steps here, guided; both samples of a step share its input
    "inversion_dpo": (4 * 6, lambda: 2 * 4 * 6),  # guidance doubles; inversion and comparison by the reference
}


@pytest.mark.parametrize("name", list(COSTS))
def test_network_evaluations_per_group(name: str) -> None:
    recipe, (policy, reference, _) = RECIPES[name], networks()
    run(recipe, groups_of(images_of(recipe), 5, recipe.source is not None), policy, reference)
    with_graph, without = COSTS[name]
    assert policy.seen[True] == 5 * with_graph
    assert policy.seen[False] + sum(reference.seen.values()) == pytest.approx(5 * without())


def one_image_two_captions(groups: int, same_captions: bool) -> PreferenceBatch:
    """Groups of the same latent under two captions."""
    batch = groups_of(2, groups)
    latents = batch.latents[:, :1].expand(-1, 2, -1, -1, -1)
    cond = batch.cond.map(lambda x: x[:, :1].expand(-1, 2, -1, -1)) if same_captions else batch.cond
    return replace(batch, latents=latents, cond=cond)


def test_each_image_is_seen_with_its_own_caption() -> None:
    words: list[Tensor] = []

    def network(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        words.append(cond.prompt_embeds)
        return x_t

    batch = groups_of(2, 3)
    for path in ("forward", "inversion"):
        words.clear()
        steps = PATHS[path]()(batch, PROCESS, batch.random(0), network)
        evaluate(steps, batch.cond, network, network)
        assert all(torch.equal(w, batch.cond.prompt_embeds) for w in words[-2:])
        given = batch.cond.prompt_embeds.flatten(0, 1)
        assert all(any(torch.equal(row, known) for known in given) for w in words for row in w.flatten(0, 1))


def test_swapping_images_with_their_captions_turns_the_logit() -> None:
    policy, reference, _ = networks()
    batch = groups_of(2, 3)
    turned = replace(batch, latents=batch.latents.flip(1), cond=batch.cond.map(lambda x: x.flip(1)))
    method = DiffusionDPO(beta=4)

    def margin(b: PreferenceBatch) -> Tensor:
        steps = PATHS["forward"]()(b, PROCESS, b.random(0))
        return method.loss(b, evaluate(steps, b.cond, policy, reference)).metrics["rewards/margins"]

    torch.testing.assert_close(margin(turned), -margin(batch), rtol=1e-11, atol=0)


def test_two_captions_of_one_image() -> None:
    policy, reference, weights = networks()
    batch = one_image_two_captions(3, same_captions=False)
    (step,) = PATHS["forward"]()(batch, PROCESS, batch.random(0))
    assert torch.equal(step.x_t[:, 0], step.x_t[:, 1])
    assert torch.equal(step.target[:, 0], step.target[:, 1])
    run(RECIPES["tkto"], batch, policy, reference).mean().backward()
    assert weights.grad is not None
    assert float(weights.grad.abs().max()) > 0
    weights.grad = None
    same = one_image_two_captions(3, same_captions=True)
    loss = (
        DiffusionDPO(beta=4).loss(same, evaluate(PATHS["forward"]()(same, PROCESS, same.random(0)), same.cond, policy, reference)).per_group
    )
    torch.testing.assert_close(loss, torch.full((3,), 2.0, dtype=torch.float64).log(), rtol=1e-14, atol=0)
    loss.sum().backward()
    assert weights.grad is not None
    assert float(weights.grad.abs().max()) < 1e-13


def test_kto_on_pairs_needs_nothing_but_their_labels() -> None:
    policy, reference, _ = networks()
    batch = groups_of(2, 3)
    evals = evaluate(PATHS["forward"]()(batch, PROCESS, batch.random(0)), batch.cond, policy, reference)
    assert DiffusionKTO().loss(batch, evals).per_group.shape == (3,)


def test_every_recipe_has_a_page() -> None:
    pages = {path.stem: path.read_text() for path in (Path(__file__).parents[2] / "docs" / "methods").glob("*.md")}
    assert METHODS.keys() <= pages.keys()
    for name in RECIPES:
        assert name in pages or any(f"`{name}`" in text for text in pages.values()), name
