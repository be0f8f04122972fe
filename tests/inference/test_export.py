"""`diffpref export`: what it writes loads in plain diffusers without a difference, or does not appear at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffpref import cli
from diffpref.inference import export as module
from diffpref.locations import asset
from diffpref.models.kohya import kohya_state
from diffpref.models.lora import LORA_FILE, save_lora

Kind = tuple[str, str]  # family, adapter
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"lora_alpha": 10},
    "rslora": {"lora_alpha": 3, "use_rslora": True},
    "dora": {"lora_alpha": 6, "use_dora": True},
}


def plain(folder: Path) -> DiffusionPipeline:
    """The pipeline as diffusers loads it; parts of the testbed are stored in half precision."""
    return DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)


@torch.no_grad()
def predict(pipeline: DiffusionPipeline) -> Tensor:
    """The UNet's output; weights are copied first, because torch rounds differently where one lies unaligned in a mapped file."""
    for p in pipeline.unet.parameters():
        p.data = p.data.clone()
    encoded = pipeline.encode_prompt("a red circle", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    added = None
    if pipeline.unet.config.addition_embed_type:
        added = {"text_embeds": encoded[2], "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]])}
    x_t = torch.randn(1, pipeline.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipeline.unet(x_t, torch.tensor([500]), encoded[0], added_cond_kwargs=added).sample


def add_trained(pipeline: DiffusionPipeline, **options: Any) -> None:
    """An adapter on linear layers and convolutions, with weights as if it had been trained."""
    pipeline.unet.add_adapter(LoraConfig(**({"r": 4, "target_modules": ["to_q", "to_out.0", "proj_in", "conv1"]} | options)))
    maker = torch.Generator().manual_seed(5)
    for name, p in pipeline.unet.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            p.data = 0.2 * torch.randn(p.shape, generator=maker)


@pytest.fixture(scope="module")
def bases(sd_folder: Path) -> dict[str, Path]:
    """Base pipelines by family; the testbed's text encoders have two widths, as SDXL's."""
    return {"sd": sd_folder, "sdxl": asset("testbed", "pipeline")}


@pytest.fixture(scope="module")
def trained(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Tensor]]:
    """trained(family, adapter) -> the folder of a LoRA, and what the UNet answers with it. Made once."""
    made: dict[Kind, tuple[Path, Tensor]] = {}

    def make(family: str, adapter: str) -> tuple[Path, Tensor]:
        if (family, adapter) not in made:
            pipeline = plain(bases[family])
            add_trained(pipeline, **ADAPTERS[adapter])
            folder = tmp_path_factory.mktemp("adapters") / f"{family}-{adapter}"
            save_lora(pipeline, folder)
            made[family, adapter] = folder, predict(pipeline)
        return made[family, adapter]

    return make


def run(**settings: Any) -> int:
    """The command with these settings."""
    words = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in settings.items()]
    return cli.main(["export", *(word for pair in words for word in pair)])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The line that the user sees last."""
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("form", "family", "adapter"),
    [
        ("kohya", "sd", "lora"),
        ("kohya", "sdxl", "lora"),
        ("kohya", "sdxl", "rslora"),
        ("diffusers", "sd", "rslora"),
        ("diffusers", "sdxl", "lora"),
    ],
)
def test_lora_files_load_without_a_difference(
    family: str, adapter: str, form: str, bases: dict[str, Path], trained: Callable[..., Any], tmp_path: Path, capsys: Any
) -> None:
    lora, expected = trained(family, adapter)
    output = tmp_path / "new" / "aligned.safetensors"
    assert run(lora=lora, pretrained_model_name_or_path=bases[family], format=form, output=output) == 0
    pipeline = plain(bases[family])
    pipeline.load_lora_weights(output.parent, weight_name=output.name)
    assert torch.equal(predict(pipeline), expected)
    said = capsys.readouterr().out
    assert "largest difference of the UNet's output 0 " in said
    assert str(output) in said
    assert [p.name for p in output.parent.iterdir()] == [output.name]


def test_kohya_goes_back_to_diffusers(bases: dict[str, Path], trained: Callable[..., Any], tmp_path: Path) -> None:
    lora, expected = trained("sdxl", "lora")
    base = {"pretrained_model_name_or_path": bases["sdxl"]}
    assert run(lora=lora, format="kohya", output=tmp_path / "k.safetensors", **base) == 0
    assert run(lora=tmp_path / "k.safetensors", format="diffusers", output=tmp_path / "folder", **base) == 0
    pipeline = plain(bases["sdxl"])
    pipeline.load_lora_weights(tmp_path / "folder", weight_name=LORA_FILE)
    assert torch.equal(predict(pipeline), expected)


@pytest.mark.parametrize(
    ("form", "family", "adapter"),
    [("pipeline", "sd", "dora"), ("pipeline", "sdxl", "lora"), ("single_file", "sd", "lora"), ("single_file", "sdxl", "dora")],
)
def test_merged_models_load_in_diffusers(
    family: str, adapter: str, form: str, bases: dict[str, Path], trained: Callable[..., Any], tmp_path: Path, capsys: Any
) -> None:
    lora, expected = trained(family, adapter)
    output = tmp_path / ("merged" if form == "pipeline" else "merged.safetensors")
    assert run(lora=lora, pretrained_model_name_or_path=bases[family], format=form, output=output) == 0
    if form == "pipeline":
        merged = plain(output)
    else:
        cls = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
        merged = cls.from_single_file(str(output), config=str(bases[family]), torch_dtype=torch.float32)
    torch.testing.assert_close(predict(merged), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, predict(plain(bases[family])), atol=1e-2)
    assert "all equal" in capsys.readouterr().out


def test_a_complete_model_becomes_a_single_file(bases: dict[str, Path], sdxl_folder: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "aligned.safetensors"
    assert run(aligned=sdxl_folder, format="single_file", output=output) == 2
    assert "both text encoders are 16 wide" in error_of(capsys)
    assert run(aligned=bases["sdxl"], format="single_file", output=output) == 0
    pipeline = StableDiffusionXLPipeline.from_single_file(str(output), config=str(bases["sdxl"]), torch_dtype=torch.float32)
    assert torch.equal(predict(pipeline), predict(plain(bases["sdxl"])))
    with safe_open(output, "pt") as file:
        assert file.metadata()["modelspec.title"] == "aligned"


def test_the_strength_is_written_into_the_file(bases: dict[str, Path], trained: Callable[..., Any], tmp_path: Path) -> None:
    lora, _ = trained("sd", "lora")
    output = tmp_path / "half.safetensors"
    settings = {"lora": lora, "pretrained_model_name_or_path": bases["sd"], "format": "kohya"}
    assert run(**settings, output=output, lora_scale=0.5) == 0
    whole, half = (plain(bases["sd"]) for _ in range(2))
    whole.load_lora_weights(lora, weight_name=LORA_FILE, adapter_name="a")
    whole.set_adapters(["a"], [0.5])
    half.load_lora_weights(tmp_path, weight_name=output.name)
    torch.testing.assert_close(predict(half), predict(whole), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("form", "dtype", "expected"), [("kohya", "fp16", torch.float16), ("single_file", "bf16", torch.bfloat16)])
def test_dtypes(form: str, dtype: str, expected: torch.dtype, bases: dict[str, Path], trained: Callable[..., Any], tmp_path: Path) -> None:
    output = tmp_path / "small.safetensors"
    base = bases["sdxl"]
    assert run(lora=trained("sdxl", "lora")[0], pretrained_model_name_or_path=base, format=form, output=output, dtype=dtype) == 0
    assert {x.dtype for name, x in load_file(output).items() if not name.endswith(".alpha")} == {expected}


def test_the_base_of_a_run_is_found(bases: dict[str, Path], trained: Callable[..., Any], tmp_path: Path, capsys: Any) -> None:
    lora, _ = trained("sd", "lora")
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / LORA_FILE).write_bytes((lora / LORA_FILE).read_bytes())
    assert run(lora=run_folder, format="kohya", output=tmp_path / "k.safetensors") == 2
    assert "--pretrained_model_name_or_path" in error_of(capsys)
    (run_folder / "diffpref_config.yaml").write_text(f"pretrained_model_name_or_path: {bases['sd']}\n")
    assert run(lora=run_folder, format="kohya", output=tmp_path / "k.safetensors") == 0
    assert (tmp_path / "k.safetensors").is_file()


def test_the_base_of_a_run_has_what_it_started_from(
    bases: dict[str, Path], trained: Callable[..., Any], sd_v_folder: Path, tmp_path: Path
) -> None:
    first, _ = trained("sd", "dora")
    second, _ = trained("sd", "lora")
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / LORA_FILE).write_bytes((second / LORA_FILE).read_bytes())
    lines = [f"pretrained_model_name_or_path: {sd_v_folder}", f"unet_init: {bases['sd']}", f"start_lora: {first}", "start_lora_as: base"]
    (run_folder / "diffpref_config.yaml").write_text("\n".join(lines))
    assert run(lora=run_folder, format="pipeline", output=tmp_path / "merged") == 0
    expected = plain(bases["sd"])
    for folder in (first, second):
        expected.load_lora_weights(folder, weight_name=LORA_FILE)
        expected.fuse_lora(components=["unet"])
        expected.unload_lora_weights()
    found = plain(tmp_path / "merged")
    torch.testing.assert_close(predict(found), predict(expected), rtol=1e-4, atol=1e-5)
    assert found.scheduler.config.prediction_type == "v_prediction"
    (run_folder / "diffpref_config.yaml").write_text("\n".join(lines).replace("start_lora_as: base", "start_lora_as: adapter"))
    assert run(lora=run_folder, format="pipeline", output=tmp_path / "other") == 0
    assert not torch.allclose(predict(plain(tmp_path / "other")), predict(expected), atol=1e-3)


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_a_kohya_file_with_an_alpha_per_layer(form: str, bases: dict[str, Path], tmp_path: Path) -> None:
    pipeline = plain(bases["sdxl"])
    add_trained(pipeline, lora_alpha=2)
    expected = predict(pipeline)
    state = kohya_state(pipeline)
    for number, name in enumerate(sorted(name for name in state if name.endswith(".alpha"))):
        factor = (1.0, 2.0, 0.5)[number % 3]
        state[name] = state[name] * factor
        state[name.replace(".alpha", ".lora_up.weight")] /= factor
    save_file(state, tmp_path / "foreign.safetensors")
    settings = {"lora": tmp_path / "foreign.safetensors", "pretrained_model_name_or_path": bases["sdxl"], "format": form}
    assert run(**settings, output=tmp_path / "out.safetensors") == 0
    fresh = plain(bases["sdxl"])
    fresh.load_lora_weights(tmp_path, weight_name="out.safetensors")
    torch.testing.assert_close(predict(fresh), expected, rtol=1e-5, atol=1e-6)


def test_a_single_file_goes_in_and_comes_out(bases: dict[str, Path], trained: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    assert run(aligned=bases["sdxl"], format="single_file", output=file) == 0
    assert run(aligned=file, single_file_config=bases["sdxl"], format="pipeline", output=tmp_path / "folder") == 0
    assert torch.equal(predict(plain(tmp_path / "folder")), predict(plain(bases["sdxl"])))
    again = tmp_path / "again.safetensors"
    assert run(aligned=tmp_path / "folder", format="single_file", output=again) == 0
    before, after = load_file(file), load_file(again)
    assert before.keys() == after.keys()
    assert [name for name, x in before.items() if not torch.equal(x, after[name])] == []


@contextmanager
def nothing_new(folder: Path) -> Iterator[None]:
    """What lies in the folder stays as it was."""
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    yield
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def wrong_alpha(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the stock converter writes it: alpha is the rank."""
    return {name: torch.tensor(4.0) if name.endswith(".alpha") else x for name, x in state.items()}


def one_layer_less(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the tensors of the first layer."""
    first = next(iter(state)).split(".")[0]
    return {name: x for name, x in state.items() if not name.startswith(first + ".")}


@pytest.mark.parametrize("damage", [wrong_alpha, one_layer_less])
def test_a_file_that_reads_back_differently_does_not_appear(
    damage: Callable[..., Any], bases: dict[str, Path], trained: Callable[..., Any], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    right = module.kohya_state
    monkeypatch.setattr(module, "kohya_state", lambda pipeline: damage(right(pipeline)))
    lora, _ = trained("sd", "lora")
    with nothing_new(tmp_path):
        assert run(lora=lora, pretrained_model_name_or_path=bases["sd"], format="kohya", output=tmp_path / "k.safetensors") == 2
    assert "checked by reading it back, and layer unet." in error_of(capsys)


@pytest.mark.parametrize(("form", "name"), [("single_file", "to_original_layout"), ("pipeline", "save_pipeline")])
def test_a_model_that_reads_back_differently_does_not_appear(
    form: str, name: str, sd_folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    right = getattr(module, name)

    def damaged(pipeline: DiffusionPipeline, *place: Path) -> Any:
        kept = pipeline.unet.conv_in.weight.data.clone()
        pipeline.unet.conv_in.weight.data[0, 0, 0, 0] += 1
        found = right(pipeline, *place)
        found = {key: x.clone() for key, x in found.items()} if found else None
        pipeline.unet.conv_in.weight.data = kept
        return found

    monkeypatch.setattr(module, name, damaged)
    output = tmp_path / ("x.safetensors" if form == "single_file" else "x")
    with nothing_new(tmp_path):
        assert run(aligned=sd_folder, format=form, output=output) == 2
    assert "weights differ, first unet.conv_in.weight" in error_of(capsys)
    assert not list(tmp_path.iterdir())


def test_files_are_replaced_only_when_asked(bases: dict[str, Path], trained: Callable[..., Any], tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "k.safetensors"
    output.write_text("old")
    settings = {"lora": trained("sd", "lora")[0], "pretrained_model_name_or_path": bases["sd"], "format": "kohya", "output": output}
    assert run(**settings) == 2
    assert "--overwrite" in error_of(capsys)
    assert output.read_text() == "old"
    assert run(**settings, overwrite=True) == 0
    assert load_file(output)


def test_adapters_that_do_not_fit(bases: dict[str, Path], trained: Callable[..., Any], tmp_path: Path, capsys: Any) -> None:
    settings = {"format": "kohya", "output": tmp_path / "k.safetensors"}
    assert run(lora=trained("sd", "lora")[0], pretrained_model_name_or_path=bases["sdxl"], **settings) == 2
    assert "lora" in error_of(capsys)
    assert run(lora=tmp_path, pretrained_model_name_or_path=bases["sd"], **settings) == 2
    assert LORA_FILE in error_of(capsys)
    lora, _ = trained("sd", "lora")
    more = load_file(lora / LORA_FILE) | {"unet.nowhere.lora_A.weight": torch.ones(4, 8), "unet.nowhere.lora_B.weight": torch.ones(8, 4)}
    (tmp_path / "more").mkdir()
    save_file(more, tmp_path / "more" / LORA_FILE)
    assert run(lora=tmp_path / "more", pretrained_model_name_or_path=bases["sd"], **settings) == 2
    assert "unet.nowhere" in error_of(capsys)
    assert run(aligned=lora, format="pipeline", output=tmp_path / "model") == 2
    assert "holds a LoRA and no pipeline; use --lora" in error_of(capsys)


def test_weights_leave_the_mapped_file(bases: dict[str, Path], trained: Callable[..., Any], tmp_path: Path) -> None:
    stored = load_file(trained("sd", "lora")[0] / LORA_FILE)
    save_file(stored, tmp_path / "odd.safetensors", metadata={"pad": "x" * 13})
    pipeline = plain(bases["sd"])
    module.read_back(pipeline, tmp_path / "odd.safetensors")
    places = [p.data_ptr() for name, p in pipeline.unet.named_parameters() if "lora_" in name]
    assert len(places) == len(stored)
    assert not [place for place in places if place % 64]


def test_dora_is_refused_where_it_cannot_travel(bases: dict[str, Path], trained: Callable[..., Any], tmp_path: Path, capsys: Any) -> None:
    lora, expected = trained("sd", "dora")
    settings = {"lora": lora, "pretrained_model_name_or_path": bases["sd"]}
    assert run(**settings, format="kohya", output=tmp_path / "k.safetensors") == 2
    assert "--format single_file" in error_of(capsys)
    assert run(**settings, format="pipeline", output=tmp_path / "k", lora_scale=0.5) == 2
    assert "lora_scale is 0.5, but the adapter is a DoRA" in error_of(capsys)
    assert run(**settings, format="diffusers", output=tmp_path / "d") == 0
    pipeline = plain(bases["sd"])
    pipeline.load_lora_weights(tmp_path / "d", weight_name=LORA_FILE)
    assert torch.equal(predict(pipeline), expected)
    foreign = {"lora_unet_mid_block_resnets_0_conv1.dora_scale": torch.ones(1)}
    save_file(foreign, tmp_path / "foreign.safetensors")
    assert run(**settings | {"lora": tmp_path / "foreign.safetensors"}, format="pipeline", output=tmp_path / "k") == 2
    assert "DoRA in kohya's form" in error_of(capsys)
