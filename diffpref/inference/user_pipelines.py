"""Stable Diffusion and SDXL pipelines that draw for a user (PPD), between users, or along preference axes (MCDPO).

    pipeline = UserStableDiffusionXLPipeline.from_pretrained("MODEL")
    pipeline.load_user_weights("outputs/ppd")
    pipeline("a lighthouse", users="anna").images[0]                                   # a user of the training
    pipeline("a lighthouse", users={"anna": 0.3, "ben": 0.7}).images[0]                # between two of them
    pipeline("a lighthouse", user_examples="my_choices").images[0]                     # a new user, from a folder of pairs

Keys and values of the user branch are computed in the first step of a call and kept for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

from diffpref.data.pairs import load_pairs
from diffpref.inference.users import as_example, attach_user_weights, new_encoder
from diffpref.models.user_attention import UserStates, project
from diffpref.models.user_lora import user_shown
from diffpref.users.examples import Example, UserEncoder

Users = str | Mapping[str, float]
Examples = str | Path | Sequence[Example]


@dataclass(frozen=True)
class User:
    """For whom is drawn, and how strongly."""

    tokens: Tensor  # (M, n, d)
    weights: Tensor | None = None  # (M,)
    scale: float = 1.0
    passes: Literal["both", "conditional"] = "both"

    def states(self, guided: bool) -> UserStates:
        """What the layers read; with nothing kept yet."""
        tokens = self.tokens[None]
        if guided and self.passes == "conditional":
            tokens = torch.cat([torch.zeros_like(tokens), tokens])
        return UserStates(tokens, self.weights, self.scale, {})


class UserPipeline:
    """What both pipelines add to diffusers' own."""

    unet: Any
    _user_projector: nn.Module | None = None
    _user_config: dict[str, Any]
    _user_embeds: dict[str, Tensor]
    _user_encoder: UserEncoder | None = None
    _user: User | None = None

    def load_user_weights(self, folder: str | Path) -> None:
        """Load what a PPD or MCDPO run left in its output_dir. A LoRA that was trained with it is loaded apart, with load_lora_weights.

        Raises ValueError for a folder without user weights, and for weights of another model.
        """
        self._user_projector, self._user_config, self._user_embeds = attach_user_weights(self, Path(folder))  # type: ignore[arg-type]
        self._user_encoder = self._user = None

    @property
    def known_users(self) -> list[str]:
        """Names that `users` takes."""
        return sorted(self._embeds())

    def encode_user(self, examples: Examples) -> Tensor:
        """The embedding (L, D) of a user from decided pairs: Examples, or a folder or file in one of the forms of docs/data.md.

        Raises ValueError for fewer examples than a context had in training, and for weights that know no new users.
        """
        self._embeds()
        settings = self._user_config.get("encoder", {"user_encoder": "table"})
        found = read_examples(examples) if isinstance(examples, str | Path) else list(examples)
        if settings["user_encoder"] == "table":
            raise ValueError("these user weights know the users of their training only; use `users`, or train with user_encoder clip")
        if len(found) < settings["num_examples"]:
            raise ValueError(
                f"user_examples has {len(found)} decided pairs, but the model was trained with {settings['num_examples']}; give more"
            )
        if self._user_encoder is None:
            self._user_encoder = new_encoder(settings, self, self.unet.device)  # type: ignore[arg-type]
        assert self._user_encoder is not None
        return self._user_encoder.encode(found)

    def set_user(
        self,
        users: Users | None = None,
        user_embeds: Tensor | None = None,
        user_examples: Examples | None = None,
        *,
        user_scale: float = 1.0,
        user_mixing: Literal["embeddings", "branches"] = "embeddings",
        user_passes: Literal["both", "conditional"] = "both",
    ) -> None:
        """Draw for this user from now on; for nobody when all three are None.

        users: a name, or weights by name. user_embeds: one embedding (L, D). user_mixing: whether weights mix the users' tokens, or the
        outputs of their branches; the same for one token. user_passes: whether the unconditional pass of guidance knows the user.
        Raises ValueError for unknown names and other values, and without user weights.
        """
        given = [x is not None for x in (users, user_embeds, user_examples)]
        if sum(given) > 1:
            raise ValueError("users, user_embeds and user_examples name a user twice; give one of them")
        if user_mixing not in ("embeddings", "branches") or user_passes not in ("both", "conditional"):
            raise ValueError(
                f"user_mixing is {user_mixing!r}, user_passes {user_passes!r}; accepted: embeddings or branches, both or conditional"
            )
        if not any(given):
            self._user = None
            return
        weights = torch.ones(1)
        if users is not None:
            named = {users: 1.0} if isinstance(users, str) else dict(users)
            embeds, weights = torch.stack([self._named(name) for name in named]), torch.tensor(list(named.values()))
        elif user_embeds is not None:
            embeds = user_embeds[None] if user_embeds.ndim == 2 else user_embeds
        else:
            embeds = self.encode_user(user_examples)[None]  # type: ignore[arg-type]
        tokens = self._tokens(embeds)
        weights = weights.to(tokens)
        if user_mixing == "embeddings":
            self._user = User((weights[:, None, None] * tokens).sum(0, keepdim=True), None, user_scale, user_passes)
        else:
            self._user = User(tokens, weights, user_scale, user_passes)

    def _embeds(self) -> dict[str, Tensor]:
        if self._user_projector is None:
            raise ValueError("this pipeline has no user weights; call load_user_weights with the output_dir of a PPD run first")
        return self._user_embeds

    def _named(self, name: str) -> Tensor:
        if name not in self._embeds():
            some = ", ".join(self.known_users[:20]) + (", ..." if len(self.known_users) > 20 else "")
            raise ValueError(f"user {name!r} is unknown; known: {some}. Give a new user by user_examples")
        return self._user_embeds[name]

    def _tokens(self, embeds: Tensor) -> Tensor:
        """Tokens (M, n, d) of embeddings (M, L, D)."""
        example = next(iter(self._embeds().values()))
        if embeds.ndim != 3 or embeds.shape[-1] != example.shape[-1]:
            raise ValueError(
                f"user_embeds has shape {tuple(embeds.shape[1:])}, but the user weights take (number, {example.shape[-1]}): they belong to "
                "another encoder"
            )
        projector = self._user_projector
        assert projector is not None
        with torch.no_grad():
            return project(projector.float(), embeds.float().to(self.unet.device)).to(self.unet.dtype)

    @contextmanager
    def _drawing(self, user: User | None, axes: Mapping[str, float], guided: bool) -> Iterator[dict[str, Any]]:
        """cross_attention_kwargs for a call; under axis guidance the UNet answers with the guided prediction meanwhile."""
        if not axes:
            yield {"user": user.states(guided)} if user else {}
            return
        asked = [(scale, User(self._tokens(self._named(name)[None])).states(guided)) for name, scale in axes.items()]
        forward: Callable[..., Any] = self.unet.forward

        def guided_forward(*args: Any, **kwargs: Any) -> Any:
            options = dict(kwargs.pop("cross_attention_kwargs", None) or {}), kwargs.pop("return_dict", True)
            plain = forward(*args, cross_attention_kwargs=options[0], return_dict=False, **kwargs)[0]
            out = plain
            for scale, states in asked:
                with user_shown(self.unet, states):
                    toward = forward(*args, cross_attention_kwargs=options[0] | {"user": states}, return_dict=False, **kwargs)[0]
                out = out + scale * (toward - plain)
            return (out,)

        self.unet.forward = guided_forward
        try:
            yield {}
        finally:
            del self.unet.forward  # the class' own again

    @torch.no_grad()
    def __call__(
        self,
        *args: Any,
        users: Users | None = None,
        user_embeds: Tensor | None = None,
        user_examples: Examples | None = None,
        user_scale: float = 1.0,
        user_mixing: Literal["embeddings", "branches"] = "embeddings",
        user_passes: Literal["both", "conditional"] = "both",
        axis_guidance: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> Any:
        """diffusers' pipeline, drawing for a user: see `set_user`, whose user stays when none is given here.

        axis_guidance: strength by name ("+left", "-left"), for MCDPO: eps(0) + sum_i s_i (eps(axis i) - eps(0)), one more forward each.
        """
        before = self._user
        if any(x is not None for x in (users, user_embeds, user_examples)):
            how: Any = {"user_scale": user_scale, "user_mixing": user_mixing, "user_passes": user_passes}
            self.set_user(users, user_embeds, user_examples, **how)
        chosen, self._user = self._user, before
        if chosen and axis_guidance:
            raise ValueError("axis_guidance is given together with a user; give one of them")
        guided = self._is_guided(kwargs.get("guidance_scale"))
        extra = kwargs.pop("cross_attention_kwargs", None) or {}
        with self._drawing(chosen, axis_guidance or {}, guided) as own:
            together = {**extra, **own}
            return super().__call__(*args, cross_attention_kwargs=together or None, **kwargs)  # type: ignore[misc]

    def _is_guided(self, scale: float | None) -> bool:
        """Whether a call makes an unconditional pass; diffusers' default scales are above 1."""
        return (scale is None or scale > 1) and self.unet.config.time_cond_proj_dim is None


class UserStableDiffusionPipeline(UserPipeline, StableDiffusionPipeline):
    """Stable Diffusion that draws for a user."""


class UserStableDiffusionXLPipeline(UserPipeline, StableDiffusionXLPipeline):
    """SDXL that draws for a user."""


def as_user_pipeline(pipeline: Any, folder: str | Path) -> UserStableDiffusionPipeline | UserStableDiffusionXLPipeline:
    """A loaded pipeline as one that draws for users, sharing its parts. Raises ValueError for another kind of pipeline."""
    options = dict(pipeline.components)
    made: UserStableDiffusionPipeline | UserStableDiffusionXLPipeline
    if isinstance(pipeline, StableDiffusionXLPipeline):
        made = UserStableDiffusionXLPipeline(**options, force_zeros_for_empty_prompt=pipeline.config.force_zeros_for_empty_prompt)
    elif isinstance(pipeline, StableDiffusionPipeline):
        made = UserStableDiffusionPipeline(**options, requires_safety_checker=pipeline.config.requires_safety_checker)
    else:
        raise ValueError(f"user_weights are given for a {type(pipeline).__name__}; they work with SD and SDXL")
    made.load_user_weights(folder)
    return made


def read_examples(source: str | Path) -> list[Example]:
    """The decided pairs of a folder or file as examples. Raises ValueError for data that cannot be read."""
    pairs = load_pairs(str(source))
    rows = (pairs.row(i) for i in range(len(pairs)))
    return [as_example(row) for row in rows if row.p0 != 0.5]
