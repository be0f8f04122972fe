"""Where weights are looked for, what is refused, and what the user is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffpref.scorers import SCORERS, scorer_from
from diffpref.scorers.clip_towers import transformers_keys
from diffpref.scorers.weights import WeightSource, fill, read_state_dict
from tests.scorers.released import hf_state, open_clip_state

Released = Callable[[str], Path]


@pytest.fixture
def copied(released: Released, tmp_path: Path) -> Callable[[str], Path]:
    """copied(name) -> a copy of the scorer's folder that a test may change."""
    return lambda name: shutil.copytree(released(name), tmp_path / "copy")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("pickscore", "model.safetensors"),
        ("hpsv2.1", "HPS_v2.1_compressed.pt"),
        ("hpsv2", "HPS_v2_compressed.pt"),
        ("image_reward", "ImageReward.pt"),
        ("cycle_reward", "CycleReward-Combo.pth"),
        ("aesthetic", "sac+logos+ava1-l14-linearMSE.pth"),
        ("mps", "model.safetensors"),
        ("clip_vith_cos", "open_clip_pytorch_model.bin"),
    ],
)
def test_one_file_is_as_good_as_its_folder(name: str, file: str, released: Released, pictures: tuple[Image.Image, ...]) -> None:
    by_folder, by_file = (scorer_from(f"{name}={place}") for place in (released(name), released(name) / file))
    prompts = ["a red circle"] * len(pictures)
    assert torch.equal(by_folder(pictures, prompts), by_file(pictures, prompts))
    assert by_folder.record == by_file.record


def test_hub_id_is_read_from_the_cache(released: Released, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for repo, files in {"someone/hps": None, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": ("vocab.json", "merges.txt")}.items():
        cached = tmp_path / f"models--{repo.replace('/', '--')}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        shutil.copytree(released("hpsv2.1"), cached / "snapshots" / ("0" * 40))
        for path in (cached / "snapshots" / ("0" * 40)).iterdir():
            if (path.name in ("vocab.json", "merges.txt")) != (files is not None):
                path.unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert WeightSource("x", "someone/hps", None).weights(["other.pt", "HPS_v2.1_compressed.pt"]).is_file()
    assert scorer_from("hpsv2.1=someone/hps").record == scorer_from(f"hpsv2.1={released('hpsv2.1')}").record


@pytest.mark.parametrize("name", SCORERS)
def test_without_network_and_weights_the_error_says_which_file_to_put_where(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{name}: .*Put .* into a folder and pass {name}=FOLDER"):
        scorer_from(name)
    with pytest.raises(ValueError, match=rf"{name}: .* has no .*; it holds nothing. Put .* into a folder and pass {name}=FOLDER"):
        scorer_from(f"{name}={tmp_path}")
    with pytest.raises(ValueError, match=rf"{name}: weights is .*; accepted: a file or folder that exists, or a hub id"):
        scorer_from(f"{name}={tmp_path}/missing")


def test_missing_tokenizer_is_named(copied: Callable[[str], Path]) -> None:
    folder = copied("pickscore")
    (folder / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"pickscore: merges.txt of the hub repository laion/.* could not be downloaded"):
        scorer_from(f"pickscore={folder}")


def test_tokenizer_of_another_model_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("image_reward")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    with pytest.raises(ValueError, match="the tokenizer has 8 tokens and the text encoder 17"):
        scorer_from(f"image_reward={folder}")
    shutil.rmtree(folder)
    folder = copied("hpsv2.1")
    vocabulary = json.loads((folder / "vocab.json").read_text()) | {"another</w>": 616}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ValueError, match="the tokenizer has 617 tokens and the text tower 616"):
        scorer_from(f"hpsv2.1={folder}")


class Payload:
    """A module of somebody's package, as the released MPS checkpoint is one."""


def test_pickled_module_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("mps")
    (folder / "model.safetensors").unlink()
    torch.save(Payload(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot be read as plain tensors.*use a safetensors conversion"):
        scorer_from(f"mps={folder}")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04 half an archive"])
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_broken_file_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read as plain tensors"):
        read_state_dict(tmp_path / name)


def test_checkpoint_without_tensors_by_name_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="does not hold tensors by name"):
        read_state_dict(tmp_path / "list.pt")


def test_weights_of_another_scorer_are_refused(released: Released) -> None:
    with pytest.raises(ValueError, match=r"does not fit: .*missing"):
        scorer_from(f"image_reward={released('cycle_reward') / 'CycleReward-Combo.pth'}")
    with pytest.raises(ValueError, match=r"no pos_embed|does not fit"):
        scorer_from(f"image_reward={released('pickscore') / 'model.safetensors'}")
    with pytest.raises(ValueError, match=r"not MPS in its released layout|does not fit"):
        scorer_from(f"mps={released('pickscore')}")


def test_config_of_another_size_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("hpsv2.1")
    (folder / "config.json").unlink()  # so ViT-H/14 is assumed
    with pytest.raises(ValueError, match=r"missing, as .*of another shape, as .*\(616, 32\) instead of \(49408, 1024\)"):
        scorer_from(f"hpsv2.1={folder}")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not a JSON file"):
        scorer_from(f"hpsv2.1={folder}")


def test_fill_names_what_is_missing_left_over_and_misshapen() -> None:
    with torch.device("meta"):
        module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    state = {"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(4), "1.weight": torch.zeros(1, 3), "extra": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"1 missing, as 1.bias; 1 unexpected, as extra; 1 of another shape, as 0.bias"):
        fill(module, state, "x")


def test_layouts_of_open_clip_and_transformers_hold_the_same(tmp_path: Path) -> None:
    state = open_clip_state(50, 24)
    wanted = {name: value for name, value in hf_state(state).items() if not name.endswith("position_ids")}
    found = transformers_keys(state)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_first_file_name_wins_when_a_folder_has_several(released: Released, copied: Callable[[str], Path]) -> None:
    folder = copied("clip_vith_cos")
    state = load_file(released("pickscore") / "model.safetensors")
    save_file(state, folder / "model.safetensors")
    assert scorer_from(f"clip_vith_cos={folder}").checksum != scorer_from(f"clip_vith_cos={released('clip_vith_cos')}").checksum


def test_file_beside_is_looked_for_in_the_folder_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").touch()
    (tmp_path / "config.json").touch()
    assert WeightSource("x", str(tmp_path / "weights.pt"), None).beside(["vocab.txt", "config.json"]) == tmp_path / "config.json"
