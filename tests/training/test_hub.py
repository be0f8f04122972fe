"""Pushing to the hub: refused early, uploaded in one commit, and the token is nowhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from diffpref import cli
from diffpref.training import hub
from diffpref.training.config import TrainConfig
from diffpref.training.settings import to_flat

TOKEN = "hf_canary_1234567890"
Settings = dict[str, Any]


class FakeHub:
    """What the client was asked for."""

    def __init__(self) -> None:
        self.tokens: list[str | None] = []
        self.created: list[str] = []
        self.commits: list[tuple[str, dict[str, bytes], str]] = []
        self.failing: str | None = None

    def client(self, token: str | None = None) -> FakeHub:
        self.tokens.append(token)
        return self

    def create_repo(self, repo_id: str, exist_ok: bool = False) -> SimpleNamespace:
        assert exist_ok
        if self.failing == "create":
            raise ConnectionError(f"403 Forbidden\nfor url, with {TOKEN}")
        self.created.append(repo_id)
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"someone/{repo_id}")

    def create_commit(self, repo_id: str, operations: list[Any], commit_message: str) -> None:
        if self.failing == "commit":
            raise RuntimeError(f"the connection broke, {TOKEN}")
        files = {}
        for op in operations:
            content = op.path_or_fileobj
            files[op.path_in_repo] = content if isinstance(content, bytes) else Path(content).read_bytes()
        self.commits.append((repo_id, files, commit_message))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A hub that nobody is logged in to."""
    found = FakeHub()
    monkeypatch.setattr(hub, "HfApi", found.client)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    return found


@pytest.fixture
def train(base_settings: Settings, tmp_path: Path) -> Callable[..., int]:
    """train(**settings) -> the exit code of a run of one step in tmp_path/run."""

    def go(**settings: Any) -> int:
        given = base_settings | {"max_train_steps": 1, "output_dir": tmp_path / "run"} | settings
        words = [
            [f"--{name}"] if value is True else [f"--{name}", str(value).lower() if value is False else str(value)]
            for name, value in given.items()
        ]
        return cli.main(["train", *(word for pair in words for word in pair)])

    return go


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The line that the user sees last."""
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.reliability("S9")
def test_a_run_is_uploaded_and_its_token_is_nowhere(
    fake: FakeHub, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["diffpref", "train", "--hub_token", TOKEN, f"--hub_token={TOKEN}"])
    assert train(push_to_hub=True, hub_model_id="mine", hub_token=TOKEN, checkpointing_steps=1) == 0
    assert fake.created == ["mine"]
    assert set(fake.tokens) == {TOKEN}
    ((repository, files, _),) = fake.commits
    assert repository == "someone/mine"
    assert sorted(files) == ["README.md", "diffpref_config.yaml", "pytorch_lora_weights.safetensors"]
    run = tmp_path / "run"
    assert files["pytorch_lora_weights.safetensors"] == (run / "pytorch_lora_weights.safetensors").read_bytes()
    assert 'load_lora_weights("someone/mine"' in files["README.md"].decode()
    uploaded = yaml.safe_load(files["diffpref_config.yaml"])
    assert uploaded["train_data_dir"] == "train-0.parquet"
    assert str(tmp_path.parent).encode() not in b"".join(files.values())
    written = [p for p in run.rglob("*") if p.is_file()]
    assert len(written) >= 8
    assert not [p for p in written if TOKEN.encode() in p.read_bytes()]
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err
    assert "'***'" in str(yaml.safe_load((run / "run_manifest.json").read_text())["command"])


def test_the_login_is_enough_and_folders_are_uploaded(fake: FakeHub, train: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: "from the login")
    assert train(push_to_hub=True, merge_lora=True) == 0
    assert fake.created == ["run"]
    assert set(fake.tokens) == {None}
    files = fake.commits[0][1]
    assert {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json"} <= files.keys()
    assert not [name for name in files if name.startswith("checkpoint")]


def test_without_a_token_nothing_starts(
    fake: FakeHub, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(push_to_hub=True) == 2
    line = error_of(capsys)
    assert "push_to_hub is true, but there is no token" in line
    assert "--hub_token" in line
    assert not (tmp_path / "run").exists()


def test_a_repository_that_cannot_be_created_stops_the_run_early(
    fake: FakeHub, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.failing = "create"
    assert train(push_to_hub=True, hub_token=TOKEN, hub_model_id="theirs/x") == 2
    line = error_of(capsys)
    assert "hub_model_id 'theirs/x' cannot be created or written (403 Forbidden for url, with ***)" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.reliability("H2")
def test_a_failed_upload_keeps_the_model_and_says_how_to_repeat_it(
    fake: FakeHub, train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.failing = "commit"
    assert train(push_to_hub=True, hub_token=TOKEN) == 0
    line = error_of(capsys)
    assert '"not uploaded"' in (tmp_path / "run" / "events.jsonl").read_text()
    assert TOKEN not in line
    assert f"hf upload someone/run {tmp_path / 'run'} . --exclude 'checkpoint-*'" in line
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "run" / "README.md").is_file()


def test_a_run_without_push_asks_for_nothing(fake: FakeHub, train: Callable[..., int]) -> None:
    assert train() == 0
    assert not fake.tokens


@pytest.mark.parametrize("trackers", ["wandb", "tensorboard,wandb", "all", "comet_ml"])
@pytest.mark.reliability("S9")
def test_trackers_that_store_the_command_get_no_token(trackers: str) -> None:
    with pytest.raises(ValueError, match=f"report_to '{trackers}'.*HF_TOKEN") as caught:
        TrainConfig(push_to_hub=True, hub_token=TOKEN, report_to=trackers)
    assert TOKEN not in str(caught.value)
    assert TrainConfig(push_to_hub=True, report_to=trackers).hub_token is None
    assert TrainConfig(push_to_hub=True, hub_token=TOKEN, report_to="tensorboard").push_to_hub


@pytest.mark.parametrize("name", ["hub_model_id", "hub_token"])
def test_settings_that_would_be_ignored(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is given, but push_to_hub is false"):
        TrainConfig(**{name: TOKEN})


def test_the_token_is_no_part_of_the_settings() -> None:
    config = TrainConfig(push_to_hub=True, hub_token=TOKEN)
    assert TOKEN not in repr(config) + str(to_flat(config))
    assert "hub_token" not in to_flat(config)
    assert config.hub_token == TOKEN


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/deep/place/model", "model"),
        ("pickscore=/deep/place/weights.safetensors", "pickscore=weights.safetensors"),
        ("someone/model", "someone/model"),
        ("./relative/x", "./relative/x"),
        ("https://example.org/x", "https://example.org/x"),
        (["/a/b", 3], ["b", 3]),
        (0.5, 0.5),
        (None, None),
    ],
)
def test_places_of_this_machine_are_reduced(value: object, expected: object) -> None:
    assert hub.without_places(value) == expected
