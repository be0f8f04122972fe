"""Nothing that is read is run, and nothing is written where it does not belong: rules over the whole code, and hostile files."""

from __future__ import annotations

import ast
import json
import re
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from diffpref.cli import main
from diffpref.models.files import read_shapes
from diffpref.training import checkpoint
from diffpref.training.run_folder import check_links
from diffpref.training.settings import read_yaml
from tests.hostile_files import HOSTILE_SAFETENSORS, HOSTILE_YAML, Canary, hostile_safetensors
from tests.test_architecture import Checker, is_true, problems_in, python_files, text_files

CODE_FROM_TEXT = {"eval", "exec", "compile", "os.system", "os.popen", "builtins.eval", "builtins.exec"}
SAFE_YAML = {"yaml.SafeLoader", "_PlainLoader"}


def check_no_code_from_text(source: str, path: str) -> list[str]:
    """Nothing of what is read is run: no eval or exec, no shell, no YAML with objects, no attribute by a name that was read."""
    if not path.startswith(("diffpref/", "scripts/", "pipelines/")):
        return []
    problems = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        if name in CODE_FROM_TEXT:
            problems.append(f"{node.lineno}: {name}")
        if is_true(keywords.get("shell")):
            problems.append(f"{node.lineno}: shell=True")
        loader = keywords.get("Loader") or (node.args[1] if len(node.args) > 1 else None)
        if name in {"yaml.load", "yaml.load_all"} and (loader is None or ast.unparse(loader) not in SAFE_YAML):
            problems.append(f"{node.lineno}: {name} without a safe loader")
        if name in {"yaml.unsafe_load", "yaml.full_load"}:
            problems.append(f"{node.lineno}: {name}")
    return problems


def check_archives_are_not_unpacked(source: str, path: str) -> list[str]:
    """Archives are read in place; a name inside one leads nowhere."""
    if not path.startswith(("diffpref/", "scripts/", "pipelines/")):
        return []
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = [(node.lineno, node.func.attr) for node in calls if isinstance(node.func, ast.Attribute)]
    return [f"{line}: {name}" for line, name in names if name in {"extractall", "unpack_archive"}]


def check_servers_stay_at_home(source: str, path: str) -> list[str]:
    """No address of all interfaces: what listens does so on the loopback."""
    if not path.startswith(("diffpref/", "scripts/", "pipelines/")):
        return []
    texts = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant) and node.value in ("0.0.0.0", "::")]
    return [f"{node.lineno}: {node.value!r}" for node in texts]


SECRETS = re.compile(r"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9]{30,}|ghp_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16})\b|-----BEGIN [A-Z ]*PRIVATE KEY")


def check_secrets(source: str, path: str) -> list[str]:
    """No token or key of a service in any file."""
    return [f"{source.count(chr(10), 0, m.end()) + 1}: {m.group()[:6]}..." for m in SECRETS.finditer(source)]


RULES: list[Checker] = [check_no_code_from_text, check_archives_are_not_unpacked, check_servers_stay_at_home]


@pytest.mark.reliability("S1", "S4", "S6", "S7", "S10")
@pytest.mark.parametrize("check", RULES, ids=lambda check: check.__name__)
def test_rules(check: Checker) -> None:
    problems = problems_in(check, python_files())
    assert not problems, "\n".join(problems)


@pytest.mark.reliability("S9")
def test_no_secrets() -> None:
    problems = problems_in(check_secrets, text_files())
    assert not problems, "\n".join(problems)


MODEL = "diffpref/models/x.py"
BAD: list[tuple[Checker, str, str]] = [
    (check_no_code_from_text, MODEL, "eval('1')"),
    (check_no_code_from_text, MODEL, "subprocess.run(command, shell=True)"),
    (check_no_code_from_text, MODEL, "os.system('ls')"),
    (check_no_code_from_text, MODEL, "yaml.load(text)"),
    (check_no_code_from_text, MODEL, "yaml.load(text, Loader=yaml.Loader)"),
    (check_no_code_from_text, MODEL, "yaml.unsafe_load(text)"),
    (check_archives_are_not_unpacked, MODEL, "archive.extractall(folder)"),
    (check_servers_stay_at_home, MODEL, "serve(host='0.0.0.0')"),
    (check_secrets, "README.md", "token: " + "hf_" + 34 * "a"),
]
GOOD: list[tuple[Checker, str, str]] = [
    (check_no_code_from_text, MODEL, "model.eval()\nyaml.safe_load(text)\nre.compile(text)\nyaml.load(text, Loader=yaml.SafeLoader)"),
]


@pytest.mark.parametrize(("check", "path", "source"), BAD)
def test_rule_can_fail(check: Checker, path: str, source: str) -> None:
    assert check(source, path)


@pytest.mark.parametrize(("check", "path", "source"), GOOD)
def test_rule_lets_good_code_pass(check: Checker, path: str, source: str) -> None:
    assert not check(source, path)


def flags(**settings: Any) -> list[str]:
    """As command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def start(capsys: pytest.CaptureFixture[str], **settings: Any) -> tuple[int, str]:
    """(exit code, stderr) of a training command that is to be refused."""
    code = main(["train", *flags(max_train_steps=1, resolution=32, **settings)])
    return code, capsys.readouterr().err


@pytest.fixture
def common(pairs_file: Path, table_cache: Path, tmp_path: Path) -> dict[str, Any]:
    """Data and a run folder."""
    return {"train_data_dir": pairs_file, "cache_dir": table_cache, "output_dir": tmp_path / "run"}


SETTINGS = ["unet_init", "start_lora", "pretrained_vae_model_name_or_path", "pretrained_model_name_or_path"]


@pytest.mark.reliability("S1")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("suffix", ["pth", "ckpt", "pt", "bin", "pkl", "npy"])
def test_a_pickle_is_never_run(
    suffix: str, setting: str, zipped: bool, common: dict[str, Any], sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, canary = tmp_path / f"weights.{suffix}", tmp_path / "canary"
    if suffix == "npy":
        with path.open("wb") as file:
            np.save(file, np.array([Canary(canary)], dtype=object))
    else:
        torch.save({"conv_in.weight": torch.zeros(1), "x": Canary(canary)}, path, _use_new_zipfile_serialization=zipped)
    code, errors = start(capsys, **({"pretrained_model_name_or_path": sd_folder} | common | {setting: path}))
    assert code == 2
    assert str(path) in errors
    assert not canary.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.reliability("S1")
def test_pickled_weights_in_a_model_folder_are_never_run(
    common: dict[str, Any], sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(sd_folder, tmp_path / "model"))
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (model / part / f"{name}.safetensors").unlink()
        torch.save({"x": Canary(tmp_path / "canary")}, model / part / f"{'pytorch_model' if name == 'model' else name}.bin")
    code, errors = start(capsys, pretrained_model_name_or_path=model, **common)
    assert code == 2, errors
    assert not (tmp_path / "canary").exists()


@pytest.mark.reliability("S1")
def test_a_checkpoint_of_another_program_is_never_loaded(
    common: dict[str, Any], sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the pickled optimizer and schedule that accelerate writes."""
    folder = tmp_path / "theirs" / "checkpoint-1"
    folder.mkdir(parents=True)
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        torch.save({"x": Canary(tmp_path / "canary")}, folder / name)
    code, errors = start(capsys, pretrained_model_name_or_path=sd_folder, resume_from_checkpoint=folder, **common)
    assert code == 2, errors
    assert "no complete checkpoint" in errors
    assert not (tmp_path / "canary").exists()


@pytest.mark.reliability("S3")
@pytest.mark.parametrize("where", ["model_index", "config"])
def test_code_beside_a_model_is_never_run(
    where: str, common: dict[str, Any], sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(sd_folder, tmp_path / "model"))
    code_file = f"import os\nos.mkdir({str(tmp_path / 'canary')!r})\nclass Own:\n    pass\n"
    for folder in (model, model / "unet", model / "text_encoder"):
        (folder / "own.py").write_text(code_file)
    path = model / "model_index.json" if where == "model_index" else model / "text_encoder" / "config.json"
    content = json.loads(path.read_text())
    content |= {"unet": ["own", "Own"]} if where == "model_index" else {"auto_map": {"AutoModel": "own.Own"}}
    path.write_text(json.dumps(content))
    code, errors = start(capsys, pretrained_model_name_or_path=model, **common)
    assert code == (2 if where == "model_index" else 0), errors
    assert not (tmp_path / "canary").exists()


@pytest.mark.reliability("S2")
@pytest.mark.parametrize("case", HOSTILE_SAFETENSORS)
def test_hostile_safetensors_end_with_one_line(
    case: str, common: dict[str, Any], sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(hostile_safetensors(case))
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if case != "names of paths":  # which are names like others
        with pytest.raises(ValueError, match=str(path)):
            read_shapes(path, "start_lora")
    assert time.process_time() - begun < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    code, errors = start(capsys, pretrained_model_name_or_path=sd_folder, start_lora=path, **common)
    assert code == 2, errors
    assert errors.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path.parent / "canary").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.reliability("S6")
@pytest.mark.parametrize("text", HOSTILE_YAML.values(), ids=HOSTILE_YAML)
def test_hostile_yaml_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"run\.yaml"):
        read_yaml(tmp_path / "run.yaml", ["seed"])
    assert not (tmp_path / "canary").exists()


@pytest.mark.reliability("S8")
def test_a_link_out_of_a_run_folder_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "precious").write_text("mine")
    (folder / "inside").write_text("x")
    (folder / "link").symlink_to(folder / "inside")
    check_links(folder)
    (folder / "metrics.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is a link to .*outside of it"):
        check_links(folder)


@pytest.mark.reliability("S8")
def test_a_checkpoint_is_private_until_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    write = checkpoint.save_file

    def look(named: dict[str, torch.Tensor], path: Path) -> None:
        seen.append(path.parent.stat().st_mode & 0o777)
        write(named, path)

    monkeypatch.setattr(checkpoint, "save_file", look)
    tmp_path.chmod(0o750)
    final = checkpoint.save_checkpoint(tmp_path, 1, {"weights": {"a": torch.ones(1)}}, {}, None)
    assert (seen, final.stat().st_mode & 0o777) == ([0o700], 0o750)


@pytest.mark.reliability("S8")
def test_a_way_around_leads_to_the_same_folder(common: dict[str, Any], sd_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Written with .. or through a link, a folder with files of somebody else is refused."""
    home = common["output_dir"].parent
    (home / "precious").mkdir()
    (home / "precious" / "mine").write_text("mine")
    (home / "link").symlink_to(home / "precious")
    for way in (home / "link", home / "link" / ".." / "precious"):
        code, errors = start(capsys, pretrained_model_name_or_path=sd_folder, **common | {"output_dir": way})
        assert code == 2, errors
        assert "is not empty and no run of diffpref" in errors
    assert [path.name for path in (home / "precious").iterdir()] == ["mine"]


@pytest.mark.reliability("S7")
def test_words_for_a_shell_are_only_words(
    common: dict[str, Any], sd_folder: Path, pair_columns: dict[str, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As caption, as name of a folder, and as name of the data."""
    monkeypatch.chdir(tmp_path)
    words = "x; touch canary; $(touch canary) `touch canary` | touch canary && touch canary"
    (tmp_path / words).mkdir()
    data = tmp_path / words / "train.parquet"
    pq.write_table(pa.table(pair_columns | {"caption": [words] * len(pair_columns["caption"])}), data)
    given = common | {"train_data_dir": data, "output_dir": tmp_path / words / "run"}
    assert main(["train", *flags(pretrained_model_name_or_path=sd_folder, max_train_steps=1, resolution=32, **given)]) == 0
    assert not list(tmp_path.rglob("canary"))


@pytest.mark.reliability("N3")
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_not_finite_are_refused(
    part: str, common: dict[str, Any], sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(sd_folder, safety_checker=None, requires_safety_checker=False)
    weights: nn.Parameter = next(getattr(pipeline, part).parameters())
    weights.data.view(-1)[0] = float("nan")
    pipeline.save_pretrained(tmp_path / "model")
    code, errors = start(capsys, pretrained_model_name_or_path=tmp_path / "model", **common)
    assert code == 2, errors
    assert "finite" in errors


@pytest.mark.reliability("H3")
def test_a_run_with_everything_local_opens_no_connection(common: dict[str, Any], sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError(f"a connection to {args[1:]} was attempted")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert main(["train", *flags(pretrained_model_name_or_path=sd_folder, max_train_steps=1, resolution=32, **common)]) == 0
