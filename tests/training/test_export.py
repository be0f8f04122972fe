"""What a run leaves: files that plain diffusers loads without a difference, complete or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor

from diffpref.models import saving
from diffpref.models.lora import LORA_FILE
from diffpref.testbed.tokenizer import write_tokenizer
from diffpref.training import export as module
from diffpref.training.export import export, merged

TARGETS = ["to_q", "to_out.0", "proj_in", "conv1", "ff.net.2"]
TEXT = ["q_proj", "out_proj"]


@torch.no_grad()
def predict(pipeline: DiffusionPipeline) -> Tensor:
    """The UNet's output for an encoded prompt; copied weights, because torch rounds differently where one lies unaligned."""
    for part in (pipeline.unet, pipeline.text_encoder):
        for p in part.parameters():
            p.data = p.data.clone()
    encoded = pipeline.encode_prompt("a red circle", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    added = None
    if pipeline.unet.config.addition_embed_type:
        added = {"text_embeds": encoded[2], "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]])}
    x_t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipeline.unet(x_t, torch.tensor([500]), encoded[0], added_cond_kwargs=added).sample


def trained(folder: Path, text: bool = False, **options: Any) -> DiffusionPipeline:
    """A pipeline with adapters as if they had been trained."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    parts = {"unet": TARGETS} | ({"text_encoder": TEXT, "text_encoder_2": TEXT} if text else {})
    maker = torch.Generator().manual_seed(5)
    for name, targets in parts.items():
        part = getattr(pipeline, name, None)
        if part is not None:
            part.add_adapter(LoraConfig(r=4, target_modules=targets, **options))
            for weight, p in part.named_parameters():
                if "lora_A" in weight or "lora_B" in weight:
                    p.data = 0.2 * torch.randn(p.shape, generator=maker)
    return pipeline


CASES: dict[str, dict[str, Any]] = {
    "lora": {"lora_alpha": 10},
    "rslora": {"lora_alpha": 3, "use_rslora": True},
    "dora": {"lora_alpha": 6, "use_dora": True},
}


@pytest.mark.parametrize(("family", "case"), [("sd", "lora"), ("sd", "rslora"), ("sd", "dora"), ("sdxl", "lora"), ("sdxl", "dora")])
def test_lora_runs(family: str, case: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    base = request.getfixturevalue(f"{family}_folder")
    pipeline = trained(base, **CASES[case])
    expected = predict(pipeline)
    before = {name: p.clone() for name, p in pipeline.unet.state_dict().items()}
    names = export(pipeline, tmp_path, "lora", merge_lora=True)
    assert (names[-1], LORA_FILE in names) == ("model_index.json", True)
    assert sorted(names) == sorted(p.name for p in tmp_path.iterdir())
    plain = DiffusionPipeline.from_pretrained(base)
    plain.load_lora_weights(tmp_path, weight_name=LORA_FILE)
    assert torch.equal(predict(plain), expected)
    torch.testing.assert_close(predict(DiffusionPipeline.from_pretrained(tmp_path)), expected, rtol=1e-5, atol=1e-5)
    after = pipeline.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in after.items())


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_adapters_of_text_encoders_are_merged_too(tune: str, sdxl_folder: Path, tmp_path: Path) -> None:
    pipeline = trained(sdxl_folder, text=True, lora_alpha=10)
    expected = predict(pipeline)
    assert (LORA_FILE in export(pipeline, tmp_path, tune, merge_lora=tune == "lora")) == (tune == "lora")
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(predict(loaded), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(predict(pipeline), expected)
    base = DiffusionPipeline.from_pretrained(sdxl_folder)
    weight = next(name for name in base.text_encoder.state_dict() if name.endswith("q_proj.weight"))
    assert not torch.equal(loaded.text_encoder.state_dict()[weight], base.text_encoder.state_dict()[weight])
    assert torch.equal(loaded.vae.decoder.conv_in.weight, base.vae.decoder.conv_in.weight)


def test_a_lora_run_leaves_one_file(sd_folder: Path, tmp_path: Path) -> None:
    assert export(trained(sd_folder, lora_alpha=4), tmp_path, "lora", merge_lora=False) == [LORA_FILE]
    assert [p.name for p in tmp_path.iterdir()] == [LORA_FILE]


def test_a_full_run_leaves_the_pipeline(sdxl_folder: Path, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(sdxl_folder)
    for p in pipeline.unet.parameters():
        p.data += 0.01
    assert merged(pipeline) is pipeline
    export(pipeline, tmp_path, "full", merge_lora=False)
    assert torch.equal(predict(DiffusionPipeline.from_pretrained(tmp_path)), predict(pipeline))
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) == 1


def test_older_libraries_find_their_files(sdxl_folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    pipeline = DiffusionPipeline.from_pretrained(sdxl_folder)
    export(pipeline, tmp_path, "full", merge_lora=False)
    origin = tmp_path_factory.mktemp("origin")
    write_tokenizer(origin, "!")  # writes vocab.json and merges.txt by itself
    for name in ("tokenizer", "tokenizer_2"):
        written, original = (json.loads((place / "vocab.json").read_text()) for place in (tmp_path / name, origin))
        assert written == original == getattr(pipeline, name).get_vocab()
        written, original = ((place / "merges.txt").read_text().splitlines()[1:] for place in (tmp_path / name, origin))
        assert written == original
    for name in ("text_encoder", "text_encoder_2"):
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            keys = set(file.keys())
        assert {key for key in keys if not key.startswith("text_model.")} <= {"text_projection.weight"}
        wanted = {p.data_ptr() for p in getattr(pipeline, name).state_dict().values()}
        assert len(keys) == len(wanted)


def test_nothing_says_where_the_model_came_from(sdxl_folder: Path, tmp_path: Path) -> None:
    export(DiffusionPipeline.from_pretrained(sdxl_folder), tmp_path, "full", merge_lora=False)
    configs = [p for p in tmp_path.rglob("*.json") if p.name not in ("vocab.json", "tokenizer.json")]
    assert len(configs) >= 6
    assert not [p for p in configs if str(sdxl_folder.parent) in p.read_text()]


def test_hub_ids_stay_in_the_configs(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"_name_or_path": "someone/model", "other": "/absolute"}')
    saving._forget_places(path)
    assert json.loads(path.read_text()) == {"_name_or_path": "someone/model", "other": "/absolute"}


def test_a_second_export_replaces_the_first(sd_folder: Path, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(sd_folder)
    (tmp_path / "metrics.jsonl").write_text("kept")
    export(pipeline, tmp_path, "full", merge_lora=False)
    (tmp_path / "unet" / "stray.txt").write_text("")
    for p in pipeline.unet.parameters():
        p.data += 0.01
    export(pipeline, tmp_path, "full", merge_lora=False)
    assert torch.equal(predict(DiffusionPipeline.from_pretrained(tmp_path)), predict(pipeline))
    assert not (tmp_path / "unet" / "stray.txt").exists()
    assert (tmp_path / "metrics.jsonl").read_text() == "kept"


def test_a_failed_export_leaves_nothing(sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(pipeline: DiffusionPipeline, folder: Path) -> None:
        saving.save_pipeline(pipeline, folder)
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "save_pipeline", fail)
    with pytest.raises(OSError, match="no space"):
        export(DiffusionPipeline.from_pretrained(sd_folder), tmp_path, "full", merge_lora=False)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_replacement_is_no_pipeline(sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = DiffusionPipeline.from_pretrained(sd_folder)
    export(pipeline, tmp_path, "full", merge_lora=False)

    def killed(path: Path, *_: object, **__: object) -> None:
        if path.parent == tmp_path and not path.name.startswith("."):
            raise KeyboardInterrupt

    monkeypatch.setattr(module.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        export(pipeline, tmp_path, "full", merge_lora=False)
    assert not (tmp_path / "model_index.json").exists()
