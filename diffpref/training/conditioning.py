"""What a policy is conditioned on besides its prompt: settings of the port, one dataclass per kind. The work is in training/port.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

UserTune = Literal["user", "user_lora"]


@dataclass(frozen=True, kw_only=True)
class UserConditioning:
    """PPD: the annotator of a pair, known by a few other decisions."""

    user_encoder: Literal["clip", "unet", "vlm", "table"] = "clip"
    """How examples become an embedding: light encoders over features of CLIP or of the model's own UNet, a VLM, a table of known users."""
    user_encoder_weights: str | None = None
    """Folder or hub id of the CLIP (PickScore's layout) or of the VLM; PickScore or LLaVA-OneVision when not given."""
    num_examples: int = 4
    """Decided pairs in a user's context."""
    contexts_per_user: int = 16
    """Contexts drawn for each user; a pair is trained with one of them at each visit, never with one that has its prompt."""
    user_tokens: int = 4
    """Tokens of the user branch."""
    user_dropout: float = 0.1
    """Share of pairs whose user is replaced by zeros, drawn once per pair and visit."""
    user_tune: UserTune = "user"
    """What is trained: the user branch alone (the paper), or also a LoRA."""
    user_rank: int = 0
    """Rank of low-rank updates on the UNet's layers whose strength follows the user, beside the branch; 0 for none (the paper)."""
    encoder_fit_steps: int = 500
    """Steps of fitting the light encoder to predict choices, before training; 0 leaves it random."""
    train_user_encoder: bool = False
    """Train the light encoder further with the user branch."""
    held_out_users: int = 0
    """Users of whom nothing is trained, drawn by the seed, for measuring new users; listed in users.json."""
    vlm_layer: int | None = None
    """Hidden state of the VLM that is taken; three quarters up when not given."""
    vlm_pooling: Literal["last", "mean"] = "last"
    """The VLM's last user_tokens states, or means over user_tokens parts of the sequence."""
    user_cache: str | None = None
    """Folder where embeddings are kept between runs."""

    def __post_init__(self) -> None:
        for name in ("num_examples", "contexts_per_user", "user_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        _check_share("user_dropout", self.user_dropout)
        for name in ("user_rank", "encoder_fit_steps", "held_out_users"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.user_encoder == "table" and self.held_out_users:
            raise ValueError(f"held_out_users is {self.held_out_users}, but user_encoder table knows no new users; use clip, unet or vlm")


@dataclass(frozen=True, kw_only=True)
class AxesConditioning:
    """MCDPO: which of several scores prefer the chosen picture, and which the other one (arXiv:2512.10237; a provisional port)."""

    axes: tuple[str, ...] = ()
    """Names of the scores, stored with the pairs as <name>_0 and <name>_1."""
    axis_dropout: float = 0.3
    """Probability that an axis is set to 0, "no information", drawn per axis, pair and visit."""
    all_axes_dropout: float = 0.1
    """Probability that all axes are, so that the pair is trained as in Diffusion-DPO."""
    exchange_prob: float = 0.5
    """Probability that the two pictures change places and the axes their signs, which is an equally valid pair; not if all are 0."""
    user_tune: UserTune = "user"
    """What is trained: the branch alone, or also a LoRA."""
    user_rank: int = 0
    """Rank of low-rank updates on the UNet's layers whose strength follows the user, beside the branch; 0 for none (the paper)."""

    def __post_init__(self) -> None:
        for name in ("axis_dropout", "all_axes_dropout", "exchange_prob"):
            _check_share(name, getattr(self, name))
        if self.user_rank < 0:
            raise ValueError(f"user_rank is {self.user_rank}; it must be at least 0")


Conditioning = UserConditioning | AxesConditioning
CONDITIONINGS: Mapping[str, type[Any]] = {"users": UserConditioning, "axes": AxesConditioning}


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must lie in [0, 1]")
