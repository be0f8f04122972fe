"""Personalised runs: what is trained, what the first step must be, resume, the conditioning port of several axes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from diffpref import cli
from diffpref.core.policy import evaluate
from diffpref.core.types import Conditioning, PreferenceBatch
from diffpref.data.pairs import load_pairs
from diffpref.inference.user_pipelines import as_user_pipeline
from diffpref.models.backbone import load_pipeline
from diffpref.models.user_attention import user_layers
from diffpref.models.user_lora import user_updates
from diffpref.training.conditioning import AxesConditioning, UserConditioning
from diffpref.training.objective import build_objective
from diffpref.training.port import AxesPort, UserPort, exchanged
from diffpref.training.run import Run
from diffpref.training.step_cost import step_cost
from tests.scorers.released import write_released
from tests.scorers.test_vlm_judge import folder as vlm_folder  # noqa: F401  # a saved LLaVA of a few thousand parameters
from tests.training.test_loop import assert_same

Start = Callable[..., Run]
Go = Callable[..., Path]
SMALL = {"num_examples": 2, "contexts_per_user": 4, "user_tokens": 2, "encoder_fit_steps": 3, "user_encoder": "unet"}


@pytest.fixture(scope="module")
def user_pairs(tmp_path_factory: pytest.TempPathFactory, pair_columns: dict[str, list[object]]) -> str:
    """The 24 pairs as those of three users, a fourth with one pair, and two scores."""
    users = ["anna", "ben", "carl"] * 7 + ["anna", "ben", "dora"]
    scores = {f"{name}_{k}": [float((row * 7 + k * 5 + len(name)) % 3) for row in range(24)] for name in ("size", "hue") for k in (0, 1)}
    path = tmp_path_factory.mktemp("users") / "train-0.parquet"
    pq.write_table(pa.table(pair_columns | {"user_id": users} | scores), path)
    return str(path)


def objective(recipe: str = "ppd", **settings: Any) -> Any:
    """PPD at the sizes of the tests, or MCDPO."""
    return build_objective(recipe, {"beta": 200.0} | (SMALL if recipe == "ppd" else {}) | settings)


@pytest.fixture
def base_settings(base_settings: dict[str, Any]) -> dict[str, Any]:
    """Without the rank of a LoRA, which a user branch alone does not train."""
    return {name: value for name, value in base_settings.items() if name != "rank"}


@pytest.mark.parametrize(("family", "user_tune", "user_rank"), [("sd", "user", 0), ("sdxl", "user_lora", 2)])
def test_first_step_and_what_is_trained(
    family: str,
    user_tune: str,
    user_rank: int,
    request: pytest.FixtureRequest,
    user_pairs: str,
    run_training: Go,
    read_metrics: Any,
    read_state: Any,
) -> None:
    model = str(request.getfixturevalue(f"{family}_folder"))
    folder = run_training(
        "run", objective(user_tune=user_tune, user_rank=user_rank), pretrained_model_name_or_path=model, train_data_dir=user_pairs,
        max_train_steps=3,
        gradient_checkpointing=family == "sd", held_out_pairs=3, validation_steps=3, num_validation_images=1,
    )  # fmt: skip
    first, *_, last = [line for line in read_metrics(folder) if "loss" in line]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["grad_norm"] > 0
    assert last["rewards/margins"] != 0
    trained = {name for name in read_state(folder, 3) if name.startswith("weights/")}
    assert any("user_v" in name for name in trained)
    assert any("projector.tokens" in name for name in trained)
    assert any("lora_A" in name for name in trained) is (user_tune == "user_lora")
    assert any("user_lora.gate" in name for name in trained) is (user_rank > 0)
    assert all(any(part in name for part in ("user_", "projector", "lora_")) for name in trained)
    users = json.loads((folder / "users.json").read_text())
    assert users["left_out"] == {"dora": 1}
    assert users["seen"] == ["anna", "ben", "carl"]
    pipeline = as_user_pipeline(load_pipeline(model), folder)
    assert pipeline.known_users == ["anna", "ben", "carl"]
    assert len(user_updates(pipeline.unet)) == (len({n.split("user_lora")[0] for n in trained if "user_lora" in n}) if user_rank else 0)


def test_resume_is_exact(user_pairs: str, run_training: Go, read_state: Any) -> None:
    whole = run_training("whole", objective(user_rank=2), train_data_dir=user_pairs, max_train_steps=4)
    run_training("parts", objective(user_rank=2), train_data_dir=user_pairs, max_train_steps=2)
    parts = run_training("parts", objective(user_rank=2), train_data_dir=user_pairs, max_train_steps=4, resume_from_checkpoint="latest")
    assert_same(read_state(parts, 4), read_state(whole, 4))


def test_embeddings_of_pairs(user_pairs: str, tmp_path: Path, prepare: Start) -> None:
    run = prepare("run", objective(user_dropout=0.5, user_cache=str(tmp_path / "cache")), train_data_dir=user_pairs)
    port = run.port
    assert isinstance(port, UserPort)
    assert {str(user) for user in port.pairs.user_ids} == {"anna", "ben", "carl"}
    dropped = 0
    for pair_id, prompt in zip(port.pairs.pair_ids, port.pairs.prompts, strict=True):
        for visit in range(4):
            embeds = port.embeds_of(pair_id, visit)
            assert torch.equal(embeds, port.embeds_of(pair_id, visit))
            if not embeds.any():
                dropped += 1
                continue
            user = port.user_of[pair_id]
            number = port.contexts[user].of_visit(pair_id, visit, port.seed)
            assert torch.equal(embeds, port.embeds[user][number])
            assert all(other.prompt != prompt for other in port.contexts[user].members[number])
    assert 0.25 < dropped / (4 * len(port.pairs)) < 0.75
    batch = next(run.source)
    told = batch.cond.user_embeds
    assert told is not None
    assert told.shape[:2] == batch.relevance.shape
    cost = step_cost(run.backbone, run.wrapped, (2, 2), 32, autocast=False, recompute="off", on_gpu=True)
    assert cost.flops > 1.5 * cost.forward_flops > 0  # the branch alone is trained, and counted
    stored = prepare("again", objective(user_dropout=0.5, user_cache=str(tmp_path / "cache")), train_data_dir=user_pairs).port
    assert isinstance(stored, UserPort)
    assert all(torch.equal(stored.embeds[user], x) for user, x in port.embeds.items())
    with pytest.raises(ValueError, match="seed: 0 -> 1"):
        prepare("other", objective(user_cache=str(tmp_path / "cache")), train_data_dir=user_pairs, seed=1)


@pytest.mark.parametrize("kind", ["clip", "vlm", "table"])
def test_every_encoder(kind: str, user_pairs: str, prepare: Start, vlm_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    weights = {"clip": str(write_released("pickscore", tmp_path / "clip")), "vlm": str(vlm_folder), "table": None}[kind]
    run = prepare("run", objective(user_encoder=kind, user_encoder_weights=weights, user_dropout=0.0), train_data_dir=user_pairs)
    batch = next(run.source)
    assert batch.cond.user_embeds is not None
    assert batch.cond.user_embeds.any()
    for layer in user_layers(run.backbone.denoiser).values():
        torch.nn.init.normal_(layer.user_v.weight)
    steps = run.objective.path(batch, run.process, batch.random(0), run.policy, run.reference, run.null)
    (found,) = evaluate(steps, batch.cond, run.policy, run.reference)
    assert found.reference is not None
    assert (found.policy - found.reference).abs().max() > 1e-3
    found.policy.sum().backward()
    assert all(p.grad is not None for p in run.trainable.values())


def test_two_ranks_are_one_rank_with_twice_the_accumulation(
    base_settings: dict[str, Any], user_pairs: str, run_training: Go, read_state: Any, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = SMALL | {"beta": 200.0, "train_user_encoder": True}
    given = base_settings | own | {"train_data_dir": user_pairs, "max_train_steps": 2, "output_dir": tmp_path / "two"}
    words = [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in given.items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    script = Path(__file__).parents[2] / "scripts" / "train_ppd.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, str(script), *words], capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    one = run_training("one", objective(**own), train_data_dir=user_pairs, max_train_steps=2, gradient_accumulation_steps=2)
    assert_same(read_state(tmp_path / "two", 2), read_state(one, 2))
    assert (tmp_path / "two" / "user_weights.safetensors").is_file()


def test_table_and_held_out_users(user_pairs: str) -> None:
    pairs = load_pairs(user_pairs)
    table = UserPort.choose(UserConditioning(user_encoder="table"), 0, pairs, say=False)
    assert sorted(table.users) == ["anna", "ben", "carl"]  # dora's only pair leaves nothing to know her by
    some = UserPort.choose(UserConditioning(num_examples=2, held_out_users=1), 0, pairs, say=False)
    assert len(some.users) == 2
    (hidden,) = some.facts["held_out"]
    assert hidden not in some.users
    assert hidden not in some.pairs.user_ids


def test_axes() -> None:
    scores = {"pick": torch.tensor([[21.5, 20.9]]), "looks": torch.tensor([[5.2, 5.6]]), "words": torch.tensor([[0.31, 0.31]])}
    pairs = dataclasses.make_dataclass("Pairs", ["scores"])(scores)
    plain = AxesConditioning(axes=("pick", "looks", "words"), axis_dropout=0.0, all_axes_dropout=0.0, exchange_prob=0.0)
    latents = torch.arange(2.0).view(1, 2, 1, 1, 1)
    batch = PreferenceBatch(latents, Conditioning(torch.zeros(1, 2, 3, 4)), torch.tensor([[1.0, 0.0]]), ("a",), (0,), scores)

    def told(settings: AxesConditioning, visit: int = 0) -> tuple[Tensor, Tensor]:
        (out,) = AxesPort(settings, 0, pairs).conditioned([dataclasses.replace(batch, visits=(visit,))])
        assert out.cond.user_embeds is not None
        assert torch.equal(out.cond.user_embeds[:, 0], out.cond.user_embeds[:, 1])  # both pictures read the same
        return out.cond.user_embeds[0, 0, 0], out.latents.flatten()

    gamma, order = told(plain)
    assert gamma.tolist() == [1, -1, 0]
    gains = torch.tensor([21.5 - 20.9, 5.2 - 5.6, 0.0])
    assert float(torch.sigmoid((gamma * gains).sum())) == pytest.approx(0.731059, abs=1e-6)
    assert order.tolist() == [0, 1]
    turned, order = told(dataclasses.replace(plain, exchange_prob=1.0))
    assert (turned.tolist(), order.tolist()) == ([-1, 1, 0], [1, 0])
    nothing, order = told(dataclasses.replace(plain, all_axes_dropout=1.0, exchange_prob=1.0))
    assert (nothing.tolist(), order.tolist()) == ([0, 0, 0], [0, 1])  # then it is plain DPO
    kept = [told(dataclasses.replace(plain, axis_dropout=0.3), visit)[0].abs() for visit in range(200)]
    assert torch.stack(kept).mean(0).tolist() == pytest.approx([0.7, 0.7, 0], abs=0.1)
    assert exchanged(batch, torch.tensor([False])).latents.flatten().tolist() == [0, 1]


def test_mcdpo_trains(user_pairs: str, run_training: Go, read_metrics: Any, sd_folder: Path) -> None:
    folder = run_training("run", objective("mcdpo", axes=("size", "hue")), train_data_dir=user_pairs, max_train_steps=2)
    assert read_metrics(folder)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert as_user_pipeline(load_pipeline(str(sd_folder)), folder).known_users == ["+hue", "+size", "-hue", "-size"]


@pytest.mark.parametrize(
    ("recipe", "own", "run", "message"),
    [
        ("ppd", {}, {"tune": "full"}, "tune is full"),
        ("ppd", {}, {"train_text_encoder": True}, "train_text_encoder"),
        ("ppd", {}, {"merge_lora": True}, "merge_lora"),
        ("ppd", {}, {"rank": 4}, "rank is 4, but user_tune is user"),
        ("ppd", {"user_rank": 2}, {"compile": True}, "compile is true, but method ppd has a user branch"),
        ("ppd", {"num_examples": 9}, {}, "lower num_examples"),
        ("ppd", {"held_out_users": 3}, {}, "no user is left"),
        ("mcdpo", {"axes": ("depth",)}, {}, "the data has scores: "),
        ("mcdpo", {}, {}, "axes is"),
    ],
)
def test_refusals(recipe: str, own: dict[str, Any], run: dict[str, Any], message: str, user_pairs: str, prepare: Start) -> None:
    with pytest.raises(ValueError, match=message):
        prepare("run", objective(recipe, **own), train_data_dir=user_pairs, **run)


def test_the_command_names_the_testbed_of_users(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--method", "ppd"]) == 2
    assert "diffpref testbed users" in capsys.readouterr().err
    assert cli.main(["train", "--help"]) == 0
    assert "--user_encoder" in capsys.readouterr().out


def test_pairs_without_users_are_refused(prepare: Start) -> None:
    with pytest.raises(ValueError, match="user_column"):
        prepare("run", objective())


def test_wrong_values_are_named() -> None:
    with pytest.raises(ValueError, match="user_dropout is 2"):
        UserConditioning(user_dropout=2.0)
    for settings in (UserConditioning, AxesConditioning):
        with pytest.raises(ValueError, match="user_rank is -1"):
            settings(user_rank=-1)
    with pytest.raises(ValueError, match="knows no new users"):
        UserConditioning(user_encoder="table", held_out_users=1)
