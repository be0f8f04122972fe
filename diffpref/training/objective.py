"""What a run trains: a method, the path its x_t are reached by, and the guards it wears; from a recipe or put together by hand."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffpref.core.scores import score_range
from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch
from diffpref.data.forms import score_names
from diffpref.data.groups import Grouping
from diffpref.data.label_report import REPORT_FILE, stored_range
from diffpref.data.pairs import PairDataset
from diffpref.guards import GUARDS, Guard, guarded
from diffpref.methods import METHODS, Method
from diffpref.methods.recipes import RECIPES
from diffpref.paths import PATHS
from diffpref.paths import Path as LatentPath
from diffpref.paths.forward import ForwardNoising
from diffpref.sources import SOURCES
from diffpref.sources.stepwise import StepwiseSampling
from diffpref.training.conditioning import CONDITIONINGS, Conditioning
from diffpref.training.settings import Settings, build, names_of


@dataclass(frozen=True)
class Objective:
    """A method with everything it is trained with."""

    method: Method
    path: LatentPath = dataclasses.field(default_factory=ForwardNoising)
    guards: tuple[Guard, ...] = ()
    recipe: str | None = None  # its name in RECIPES, if it has one
    conditioning: Conditioning | None = None  # what the policy reads besides its prompt
    source: StepwiseSampling | None = None  # how it samples its own pairs; None for stored ones

    @property
    def name(self) -> str:
        """The recipe's name, the method's in METHODS, or its class name in snake case for a method from elsewhere."""
        known = [name for name, cls in METHODS.items() if type(self.method) is cls]
        own = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self.method).__name__).lower()
        return self.recipe or (known[0] if known else own)

    @property
    def parts(self) -> tuple[Any, ...]:
        """The dataclasses whose fields are the objective's settings."""
        return (
            self.method,
            self.path,
            *([self.source] if self.source else []),
            *self.guards,
            *([self.conditioning] if self.conditioning else []),
        )

    @property
    def guidance_scale(self) -> float:
        """Of policy and reference in the loss."""
        return float(getattr(self.source or self.path, "guidance_scale", 1.0))

    @property
    def steps_at_once(self) -> int:
        """Steps of a path that go through the networks together."""
        return int(getattr(self.path, "steps_at_once", 1))

    @property
    def kept_latents(self) -> int:
        """Latents per picture that a path of many steps keeps in memory; 0 for a single step."""
        return int(getattr(self.path, "kept_latents", 0))

    @property
    def needs_reference(self) -> bool:
        """Whether a reference has to be there."""
        return self.method.needs_reference

    @property
    def groups(self) -> Grouping:
        """What a batch is made of: pairs unless a recipe says otherwise."""
        return RECIPES[self.name].groups if self.name in RECIPES else "pairs"

    @property
    def has_adapter(self) -> bool:
        """Whether a LoRA run attaches one; a user branch may be trained alone."""
        return self.conditioning is None or self.conditioning.user_tune == "user_lora"

    @property
    def images_per_group(self) -> int | None:
        """Images of a group that it looks at; None for all of them."""
        return self.method.images_per_group

    def groups_at_once(self, groups: int) -> int:
        """Groups that go through the networks together for a micro-batch of `groups`; with guidance each is there twice."""
        return groups * (1 + (self.guidance_scale != 1)) * self.steps_at_once

    def check_images(self, count: int) -> None:
        """Raises ValueError when a forward pass of `count` images, all processes together, is too small for the method."""
        least = getattr(self.method, "least_images", 1)
        if count < least:
            raise ValueError(
                f"method {self.name} compares an image with the mean of its batch, which holds {count} image over all processes; "
                f"raise train_batch_size until there are {least} or more"
            )

    def loss(self, batch: PreferenceBatch, evals: Sequence[Evaluation]) -> LossOutput:
        """The method's loss wearing the guards, in their order."""
        return guarded(self.method.loss, self.guards)(batch, evals)


def as_objective(method: Method | Objective) -> Objective:
    """A method alone is trained by forward noising and wears no guard."""
    return method if isinstance(method, Objective) else Objective(method)


def all_names() -> list[str]:
    """Every setting of any method, path or guard."""
    parts = (*METHODS.values(), *PATHS.values(), *SOURCES.values(), *GUARDS.values(), *CONDITIONINGS.values())
    return list(dict.fromkeys(names_of(*parts)))


def objective_names(recipe: str, path: str | None = None, guards: Sequence[str] = ()) -> list[str]:
    """The settings that a recipe has with this path and these further guards. Raises ValueError for unknown names."""
    return list(dict.fromkeys(name for cls, _ in _classes(recipe, path, guards) for name in names_of(cls)))


def build_objective(recipe: str, settings: Settings, path: str | None = None, guards: Sequence[str] = ()) -> Objective:
    """The objective of a recipe; `settings` win over the recipe's, `path` replaces its path, `guards` are worn beside its own.

    Raises ValueError for unknown names and for values that cannot be.
    """
    made = [
        build(cls, {**own, **{name: value for name, value in settings.items() if name in names_of(cls)}})
        for cls, own in _classes(recipe, path, guards)
    ]
    port = made.pop() if RECIPES[recipe].conditioning else None
    source = next((part for part in made if isinstance(part, StepwiseSampling)), None)
    guarding = tuple(part for part in made[2:] if part is not source)
    return Objective(made[0], made[1], guarding, recipe, port, source)


def _classes(recipe: str, path: str | None, guards: Sequence[str]) -> Iterator[tuple[type[Any], dict[str, Any]]]:
    """Method, path, source if there is one, guards and conditioning, with the settings that the recipe gives them."""
    if recipe not in RECIPES:
        raise ValueError(f"method is {recipe!r}; accepted: {', '.join(RECIPES)}")
    line = RECIPES[recipe]
    yield METHODS[line.method], dict(line.settings)
    if path is not None and path not in PATHS:
        raise ValueError(f"path is {path!r}; accepted: {', '.join(PATHS)}")
    if path is not None and (path == "recorded") != (line.source is not None):
        kind = "samples its own pairs and needs path recorded" if line.source else "reads stored pairs, which recorded nothing"
        raise ValueError(f"path is {path!r}, but method {recipe} {kind}; leave path out")
    yield PATHS[path or line.path], dict(line.path_settings) if path in (None, line.path) else {}
    if line.source is not None:
        yield SOURCES[line.source], dict(line.source_settings)
    for name in dict.fromkeys([*line.guards, *guards]):
        if name not in GUARDS:
            raise ValueError(f"guards has {name!r}; accepted: {', '.join(GUARDS)}")
        yield GUARDS[name], dict(line.guards.get(name, {}))
    if line.conditioning:
        yield CONDITIONINGS[line.conditioning], {}


def fitted(objective: Objective, pairs: PairDataset, folder: str | None = None) -> tuple[Objective, PairDataset]:
    """The objective with the facts it needs of the data, the range of a score that was not given; and the data with that score by name.

    folder: of the data; the range of the whole data set is stored there if `diffpref label` made it. Else it is that of `pairs`.

    Raises ValueError when the data lacks the score, misses values of it, has a constant one, or values outside of the stored range.
    """
    method: Any = objective.method
    name = getattr(method, "score", None)
    if name is None:
        return objective, pairs
    found = next((other for other in score_names(name) if other in pairs.scores), name)
    if found != name and found in pairs.scores:
        pairs = dataclasses.replace(pairs, scores={**pairs.scores, name: pairs.scores[found]})
    if name not in pairs.scores:
        has = ", ".join(pairs.scores) or "no score columns"
        raise ValueError(
            f"score is {name!r}, but the data has {has}; add columns {name}_0 and {name}_1, for example with "
            f"diffpref label --scorers {name} --train_data_dir DATA, or choose another score"
        )
    low, high = score_range(torch.from_numpy(pairs.scores[name]), name)
    if not (hasattr(method, "score_min") and method.score_min is None and method.score_max is None):
        return objective, pairs
    if folder and (whole := stored_range(Path(folder), score_names(name))):
        if low < whole[0] or high > whole[1]:
            raise ValueError(
                f"the scores {name!r} of the data go from {low} to {high}, but {REPORT_FILE} says {whole[0]} to {whole[1]}; "
                "score the pairs again with diffpref label, or give score_min and score_max"
            )
        low, high = whole
    return dataclasses.replace(objective, method=dataclasses.replace(method, score_min=low, score_max=high)), pairs
