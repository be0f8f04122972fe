"""The conditioning port of a run: a user branch on the UNet, and what it reads for every pair.

A port takes part in a run at four places: it chooses the pairs, attaches the branch to the loaded model, adds `user_embeds` to every
batch, and writes the weights at the end.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffpref.core.random import moved, permutation, uniform
from diffpref.core.types import PreferenceBatch
from diffpref.data.pairs import PairDataset
from diffpref.inference.users import as_example, new_encoder, save_user_weights
from diffpref.models.backbone import FAMILIES, Backbone
from diffpref.models.user_attention import UserUNet, add_user_attention
from diffpref.models.user_lora import add_user_lora
from diffpref.training.conditioning import AxesConditioning, Conditioning, UserConditioning
from diffpref.training.config import TrainConfig
from diffpref.users.examples import Contexts, Example, Pair, UserEncoder, decided_by
from diffpref.users.features import FeatureEncoder
from diffpref.users.fit import fit_encoder
from diffpref.users.projectors import ExampleEncoder, new_projector
from diffpref.users.stored import load_embeds, save_embeds


class Port(Protocol):
    """What a run is conditioned on besides prompts."""

    pairs: PairDataset  # the pairs to train on

    def attach(self, config: TrainConfig, backbone: Backbone) -> tuple[Backbone, nn.Module]:
        """The backbone whose predictor fits the trained module, and that module; adapters are on the UNet already."""

    def conditioned(self, batches: Iterable[PreferenceBatch], is_training: bool = True) -> Iterator[PreferenceBatch]:
        """The same batches with user_embeds; without dropout unless they are trained on."""

    def save(self, folder: Path, unet: nn.Module) -> list[str]:
        """Write what was trained; names of the files."""


def new_port(settings: Conditioning, config: TrainConfig, pairs: PairDataset, held_out: PairDataset | None, say: bool) -> Port:
    """The port of these settings. Raises ValueError for data that it cannot use, and for settings of the run that do not go with it."""
    if config.tune == "full":
        raise ValueError("tune is full, which leaves no reference beside a user branch in one network; use tune lora with user_tune")
    if config.train_text_encoder:
        raise ValueError("train_text_encoder is true, which a user branch does not go with; leave it out")
    for name in ("merge_lora", "rank", "lora_alpha", "lora_targets", "use_dora", "use_rslora"):
        if settings.user_tune == "user" and (value := getattr(config, name)) != getattr(TrainConfig, name):
            raise ValueError(f"{name} is {value}, but user_tune is user, which trains no LoRA; leave {name} out or use user_tune user_lora")
    if isinstance(settings, AxesConditioning):
        return AxesPort(settings, config.seed, pairs)
    port = UserPort.choose(settings, config.seed, pairs, say)
    if held_out is not None:
        port.user_of |= {i: str(user) for i, user in zip(held_out.pair_ids, held_out.user_ids, strict=True) if user in port.users}
    return port


def attach_branch(backbone: Backbone, kind: str, sizes: Mapping[str, Any], rank: int, seed: int) -> tuple[Backbone, UserUNet]:
    """Put user branches, and updates of a rank above 0, on the UNet, the projector beside it. Raises ValueError for other families."""
    if backbone.family not in ("sd", "sdxl"):
        raise ValueError(f"the model is of the {backbone.family} family, which has no user branch; use an SD or SDXL model")
    unet, width = backbone.denoiser, int(backbone.denoiser.config.cross_attention_dim)
    device = next(unet.parameters()).device
    add_user_attention(unet, width, seed)
    if rank:
        add_user_lora(unet, width, rank, seed)
    projector = new_projector(kind, **sizes).to(device)
    module = UserUNet(unet, projector, FAMILIES[backbone.family].predictor)
    return dataclasses.replace(backbone, predictor=lambda wrapped: wrapped), module


def with_embeds(batch: PreferenceBatch, embeds: Tensor) -> PreferenceBatch:
    """A batch with (G, L, D) for all K pictures of a group."""
    images = batch.relevance.shape[1]
    expanded = moved(embeds, batch.latents.device)[:, None].expand(-1, images, -1, -1)
    return dataclasses.replace(batch, cond=dataclasses.replace(batch.cond, user_embeds=expanded))


class UserPort:
    """Users known by examples, or by number."""

    def __init__(
        self, settings: UserConditioning, seed: int, pairs: PairDataset, users: dict[str, list[Pair]], facts: dict[str, Any]
    ) -> None:
        self.settings, self.seed, self.pairs, self.users, self.facts = settings, seed, pairs, users, facts
        self.user_of = {pair.pair_id: user for user, own in users.items() for pair in own}
        self.contexts: dict[str, Contexts] = {}
        self.embeds: dict[str, Tensor] = {}  # user -> (M, L, D), an embedding for each of its contexts

    @classmethod
    def choose(cls, settings: UserConditioning, seed: int, pairs: PairDataset, say: bool) -> UserPort:
        """Pairs of users that are trained on; users with too few decided pairs are left out and counted."""
        if any(user is None for user in pairs.user_ids):
            raise ValueError("the pairs name no user; give the column of the annotators as user_column, or use method diffusion_dpo")
        known = [
            Pair(i, p, str(u))
            for i, p, u, label in zip(pairs.pair_ids, pairs.prompts, pairs.user_ids, pairs.p0, strict=True)
            if label != 0.5
        ]
        needed = 1 if settings.user_encoder == "table" else settings.num_examples
        kept, dropped = decided_by(known, needed)
        order = [sorted(kept)[i] for i in permutation(len(kept), seed, "held_out_users").tolist()]
        held_out, seen = order[: settings.held_out_users], sorted(order[settings.held_out_users :])
        if not seen:
            raise ValueError(
                f"no user is left to train on: {len(kept)} users have {needed} decided pairs of other prompts beside each pair, "
                f"held_out_users is {settings.held_out_users}; lower num_examples ({settings.num_examples}) or held_out_users"
            )
        if say:
            lost = f", {len(dropped)} left out with too few decided pairs ({sum(dropped.values())} pairs)" if dropped else ""
            print(f"{len(seen)} users to train on{lost}, {len(held_out)} held out", file=sys.stderr)
        ours = set(seen)
        chosen = pairs.select(i for i, user in enumerate(pairs.user_ids) if user in ours)
        facts = {"seen": seen, "held_out": sorted(held_out), "left_out": dropped}
        return cls(settings, seed, chosen, {user: kept[user] for user in seen}, facts)

    def attach(self, config: TrainConfig, backbone: Backbone) -> tuple[Backbone, nn.Module]:
        """Encode the users' contexts, build the branch, fit the light encoder."""
        settings, width = self.settings, int(backbone.denoiser.config.cross_attention_dim)
        encoder = new_encoder(dataclasses.asdict(settings), backbone.pipeline, backbone.pipeline.device)
        self._encode(encoder)
        sizes: dict[str, Any] = {"width": width, "seed": self.seed}
        if encoder is None:
            kind, sizes = "table", sizes | {"num_users": len(self.users), "num_tokens": settings.user_tokens}
        elif isinstance(encoder, FeatureEncoder):
            (example,) = encoder.encode([self._example(next(iter(self.users.values()))[0])])
            prompt = encoder.prompts(["a picture"]).shape[-1]
            kind = "examples"
            sizes |= {"picture": (len(example) - prompt) // 2, "prompt": prompt, "num_tokens": settings.user_tokens}
        else:
            kind, sizes = "tokens", sizes | {"d": next(iter(self.embeds.values())).shape[-1]}
        backbone, module = attach_branch(backbone, kind, sizes, settings.user_rank, self.seed)
        self.projector = module.projector
        reading = {name: value for name, value in dataclasses.asdict(settings).items() if name != "user_cache"}
        self.config: dict[str, Any] = {
            "projector": kind,
            "sizes": sizes,
            "width": width,
            "user_rank": settings.user_rank,
            "encoder": reading,
        }
        if isinstance(self.projector, ExampleEncoder):
            self._fit(self.projector)
        return backbone, module

    def _encode(self, encoder: UserEncoder | None) -> None:
        """Fill contexts and embeddings, from the cache where it has them."""
        settings = self.settings
        if encoder is None:
            self.embeds = {user: torch.full((1, 1, 1), i + 1.0) for i, user in enumerate(self.users)}
            return
        count, examples = settings.contexts_per_user, settings.num_examples
        self.contexts = {user: Contexts.draw(own, examples, count, self.seed) for user, own in self.users.items()}
        facts = dict(encoder.facts) | {
            "num_examples": examples,
            "contexts_per_user": count,
            "seed": self.seed,
            "pairs": self.pairs.fingerprint,
        }
        cache = Path(settings.user_cache) if settings.user_cache else None
        stored = load_embeds(cache, facts) if cache else None
        if stored is None:
            stored = {
                user: torch.stack([encoder.encode([self._example(pair) for pair in context]) for context in contexts.members])
                for user, contexts in self.contexts.items()
            }
            if cache:
                save_embeds(cache, stored, facts)
        self.embeds = stored

    def _example(self, pair: Pair) -> Example:
        """A training pair as an example, its pictures decoded now."""
        if not hasattr(self, "_rows"):
            self._rows = {pair_id: i for i, pair_id in enumerate(self.pairs.pair_ids)}
        return as_example(self.pairs.row(self._rows[pair.pair_id]))

    def _fit(self, encoder: ExampleEncoder) -> None:
        """Fit the light encoder to the pairs that are in contexts, whose features are known."""
        if self.settings.encoder_fit_steps:
            features, users = {}, {}
            for user, contexts in self.contexts.items():
                for m, context in enumerate(contexts.members):
                    features.update({pair.pair_id: self.embeds[user][m, i] for i, pair in enumerate(context)})
                users[user] = list({pair.pair_id: pair for context in contexts.members for pair in context}.values())
            device = encoder.mean.device
            with torch.enable_grad():
                right = fit_encoder(encoder.cpu(), users, features, self.settings.num_examples, self.settings.encoder_fit_steps, self.seed)
            encoder.to(device)
            self.facts["encoder_accuracy"] = right
            print(f"user encoder: predicts {100 * right:.1f} % of the choices about other prompts", file=sys.stderr)
        for part in (encoder.evidence, encoder.attend):
            part.requires_grad_(self.settings.train_user_encoder)

    def conditioned(self, batches: Iterable[PreferenceBatch], is_training: bool = True) -> Iterator[PreferenceBatch]:
        """Each pair with a context of its user that has neither the pair nor its prompt; zeros for dropped and unknown users."""
        for batch in batches:
            keys = zip(batch.pair_ids, batch.visits, strict=True)
            yield with_embeds(batch, torch.stack([self.embeds_of(*key, is_training) for key in keys]))

    def embeds_of(self, pair_id: str, visit: int, is_training: bool = True) -> Tensor:
        """(L, D) that a pair is trained with at a visit."""
        user = self.user_of.get(pair_id)
        if user is None or (is_training and uniform(self.seed, "user_dropout", pair_id, visit) < self.settings.user_dropout):
            return torch.zeros_like(next(iter(self.embeds.values()))[0])
        if user not in self.contexts:
            return self.embeds[user][0]
        return self.embeds[user][self.contexts[user].of_visit(pair_id, visit, self.seed)]

    def save(self, folder: Path, unet: nn.Module) -> list[str]:
        """User weights with the first embedding of every user, and who was trained on."""
        config = self.config | {"users": self.facts}
        save_user_weights(folder, unet, self.projector, config, {user: x[0] for user, x in self.embeds.items()})
        (folder / "users.json").write_text(json.dumps(self.facts, indent=1))
        return [*USER_FILES, "users.json"]


USER_FILES = ("user_config.json", "user_weights.safetensors", "user_embeds.safetensors")


class AxesPort:
    """Signs of score differences in place of a user."""

    def __init__(self, settings: AxesConditioning, seed: int, pairs: PairDataset) -> None:
        missing = [name for name in settings.axes if name not in pairs.scores]
        if missing or not settings.axes:
            has = ", ".join(pairs.scores) or "none"
            raise ValueError(
                f"axes is {list(settings.axes)}; the data has scores: {has}. Name some of them, or add columns NAME_0 and NAME_1 "
                "with diffpref label"
            )
        self.settings, self.seed, self.pairs = settings, seed, pairs

    def attach(self, config: TrainConfig, backbone: Backbone) -> tuple[Backbone, nn.Module]:
        """One learned token per axis."""
        width = int(backbone.denoiser.config.cross_attention_dim)
        sizes = {"num_axes": len(self.settings.axes), "width": width, "seed": self.seed}
        rank = self.settings.user_rank
        self.config = {"projector": "axes", "sizes": sizes, "width": width, "user_rank": rank, "axes": list(self.settings.axes)}
        backbone, module = attach_branch(backbone, "axes", sizes, self.settings.user_rank, self.seed)
        self.projector = module.projector
        return backbone, module

    def conditioned(self, batches: Iterable[PreferenceBatch], is_training: bool = True) -> Iterator[PreferenceBatch]:
        """Each pair with its gamma; in training after dropout and with its pictures in either order."""
        for batch in batches:
            scores = torch.stack([batch.scores[name] for name in self.settings.axes], -1)  # (G, K, A)
            gamma = torch.sign(scores[:, 0] - scores[:, 1])
            if not is_training:
                yield with_embeds(batch, gamma[:, None])
                continue
            keys = zip(batch.pair_ids, batch.visits, strict=True)
            gamma = gamma * torch.tensor([self.kept(*key) for key in keys], device=gamma.device, dtype=gamma.dtype)
            keys = zip(batch.pair_ids, batch.visits, strict=True)
            turned = [uniform(self.seed, "axes_exchange", *key) < self.settings.exchange_prob for key in keys]
            turn = torch.tensor(turned, device=gamma.device) & gamma.ne(0).any(-1)
            gamma = torch.where(turn[:, None], -gamma, gamma)
            yield with_embeds(exchanged(batch, turn), gamma[:, None])

    def kept(self, pair_id: str, visit: int) -> list[float]:
        """1 for an axis that is used, 0 for one that is dropped."""
        if uniform(self.seed, "all_axes_dropout", pair_id, visit) < self.settings.all_axes_dropout:
            return [0.0] * len(self.settings.axes)
        drop = self.settings.axis_dropout
        return [float(uniform(self.seed, "axis_dropout", pair_id, visit, a) >= drop) for a in range(len(self.settings.axes))]

    def save(self, folder: Path, unet: nn.Module) -> list[str]:
        """The weights, and for each axis the two vectors that ask for more and for less of it."""
        axes = torch.eye(len(self.settings.axes))[:, None]
        embeds = {f"{sign}{name}": s * axes[a] for a, name in enumerate(self.settings.axes) for sign, s in (("+", 1.0), ("-", -1.0))}
        save_user_weights(folder, unet, self.projector, self.config, embeds)
        return list(USER_FILES)


def exchanged(batch: PreferenceBatch, turn: Tensor) -> PreferenceBatch:
    """The batch with the two pictures of some groups exchanged, turn (G,): what was rejected is then the chosen one."""

    def order(x: Tensor) -> Tensor:
        return torch.where(moved(turn, x.device).view(-1, *[1] * (x.ndim - 1)), x.flip(1), x)

    cond = batch.cond.map(order)
    return dataclasses.replace(batch, latents=order(batch.latents), cond=cond, scores={name: order(x) for name, x in batch.scores.items()})
