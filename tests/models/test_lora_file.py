"""LoRA files in every form load as diffusers loads them, or not at all."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_kohya, recurse_remove_peft_layers
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from diffpref.core.policy import adapters_off
from diffpref.models.backbone import load_pipeline
from diffpref.models.lora import LORA_FILE, save_lora, trainable_state
from diffpref.models.lora_file import load_adapter, merge_lora, read_lora
from diffpref.models.single_file import original_unet_layers

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "conv1", "conv_shortcut", "time_emb_proj", "conv_in"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]
Folder = Callable[[str], Path]


@cache
def loaded(folder: Path) -> DiffusionPipeline:
    """A pipeline that stays as it is."""
    return load_pipeline(str(folder))


def fresh(folder: Path) -> DiffusionPipeline:
    """A pipeline that nobody else holds."""
    return copy.deepcopy(loaded(folder))


def weights(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """Every weight by part and name."""
    parts = {n: m for n, m in pipeline.components.items() if isinstance(m, nn.Module)}
    return {f"{part}.{name}": x.detach() for part, module in parts.items() for name, x in module.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def adapted(folder: Path, text: bool, targets: list[str], **options: Any) -> DiffusionPipeline:
    """A pipeline with random adapters named "default" on the UNet and, with `text`, on its text encoders."""
    pipeline = fresh(folder)
    names = {"unet": targets}
    if text:
        names |= {n: TEXT for n in ("text_encoder", "text_encoder_2") if getattr(pipeline, n, None) is not None}
    maker = torch.Generator().manual_seed(4)
    for part, layers in names.items():
        module = getattr(pipeline, part)
        module.requires_grad_(False)
        module.add_adapter(LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": layers, **options}))
        for p in trainable_state(module).values():
            p.data.add_(0.2 * torch.randn(p.shape, generator=maker))
    return pipeline


def parts_of(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The components with an adapter."""
    found = {n: getattr(pipeline, n, None) for n in ("unet", "text_encoder", "text_encoder_2")}
    return {n: m for n, m in found.items() if getattr(m, "peft_config", None)}


def layers_of(name: str, module: nn.Module) -> dict[str, Tensor]:
    """An adapter's tensors under the names that files have had since before transformers 5."""
    state = get_peft_model_state_dict(module)
    is_flat = name != "unet" and not hasattr(module, "text_model")
    return {("text_model." if is_flat else "") + key: x.contiguous() for key, x in state.items()}


def save_diffusers(pipeline: DiffusionPipeline, folder: Path) -> Path:
    """Through diffusers' own writer, with metadata."""
    parts = parts_of(pipeline)
    layers = {f"{name}_lora_layers": layers_of(name, module) for name, module in parts.items()}
    metadata = _collate_lora_metadata(parts)
    type(pipeline).save_lora_weights(folder, **layers, **metadata)
    return folder


def save_kohya(pipeline: DiffusionPipeline, path: Path) -> Path:
    """Through diffusers' converter, with the alphas that it gets wrong put right."""
    state = {}
    for name, module in parts_of(pipeline).items():
        converted = convert_state_dict_to_kohya({f"{name}.{key}": x for key, x in layers_of(name, module).items()})
        alpha = float(module.peft_config["default"].lora_alpha)
        state |= {key: torch.tensor(alpha) if key.endswith(".alpha") else x.contiguous() for key, x in converted.items()}
    save_file(state, path)
    return path


def merged_by_diffusers(folder: Path, lora: Path, scale: float = 1.0) -> dict[str, Tensor]:
    """The weights after load, fuse and unload."""
    pipeline = fresh(folder)
    name = lora.name if lora.is_file() else LORA_FILE
    pipeline.load_lora_weights(str(lora.parent if lora.is_file() else lora), weight_name=name)
    pipeline.fuse_lora(components=list(parts_of(pipeline)), lora_scale=scale)
    pipeline.unload_lora_weights()
    return weights(pipeline)


def merged_by_us(folder: Path, lora: Path, scale: float = 1.0) -> dict[str, Tensor]:
    pipeline = fresh(folder)
    merge_lora(pipeline, str(lora), "start_lora", scale)
    assert not parts_of(pipeline)
    return weights(pipeline)


CASES: dict[str, tuple[str, bool, list[str], dict[str, Any]]] = {
    "plain": ("sd1", False, EVERYTHING, {}),
    "plain SDXL with text encoders": ("sdxl", True, ATTENTION, {}),
    "refiner": ("refiner", True, ATTENTION, {}),
    "rsLoRA": ("sd1", True, ATTENTION, {"use_rslora": True}),
    "DoRA": ("sdxl", False, ATTENTION, {"use_dora": True}),
    "ranks by layer": ("sd2", False, ATTENTION, {"rank_pattern": {"to_q": 2, "to_out.0": 3}, "alpha_pattern": {"to_v": 1}}),
}


@pytest.mark.parametrize("case", CASES)
def test_diffusers_files_merge_as_diffusers_merges_them(case: str, folder_of: Folder, tmp_path: Path) -> None:
    kind, text, targets, options = CASES[case]
    lora = save_diffusers(adapted(folder_of(kind), text, targets, **options), tmp_path / "lora")
    scale = 0.5 if case == "plain" else 1.0
    ours = merged_by_us(folder_of(kind), lora, scale)
    assert_same(ours, merged_by_diffusers(folder_of(kind), lora, scale))
    changed = {name.split(".")[0] for name, x in weights(fresh(folder_of(kind))).items() if not torch.equal(x, ours[name])}
    encoders = {"sd1": {"text_encoder"}, "sdxl": {"text_encoder", "text_encoder_2"}, "refiner": {"text_encoder_2"}}
    assert changed == {"unet"} | (encoders[kind] if text else set())


@pytest.mark.parametrize(("kind", "text"), [("sd1", True), ("sd2", False), ("sdxl", True)])
def test_kohya_files_merge_as_diffusers_merges_them(kind: str, text: bool, folder_of: Folder, tmp_path: Path) -> None:
    targets = [*ATTENTION, "proj_in", "ff.net.0.proj"]
    lora = save_kohya(adapted(folder_of(kind), text, targets), tmp_path / "kohya.safetensors")
    assert load_file(lora)["lora_unet_mid_block_attentions_0_proj_in.alpha"] == 6
    assert_same(merged_by_us(folder_of(kind), lora), merged_by_diffusers(folder_of(kind), lora))


def merged_at_home(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """The weights of a pipeline with its own adapters merged: the truth that a file of them has to give."""
    for module in parts_of(pipeline).values():
        for layer in module.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.merge()
        recurse_remove_peft_layers(module)
    return weights(pipeline)


def test_kohya_layers_of_different_alpha_and_few_text_layers(folder_of: Folder, tmp_path: Path) -> None:
    """diffusers gives every attention layer one alpha, and drops text layers without out_proj."""
    trained = adapted(folder_of("sd1"), False, ATTENTION, alpha_pattern={"to_q": 1, "to_out.0": 3}, rank_pattern={"to_k": 2})
    trained.text_encoder.requires_grad_(False)
    trained.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    state = load_file(save_kohya(trained, tmp_path / "kohya.safetensors"))
    for name in state:
        if name.endswith("to_q.alpha") or name.endswith("to_out_0.alpha"):
            state[name] = torch.tensor(1.0 if name.endswith("to_q.alpha") else 3.0)
    save_file(state, tmp_path / "kohya.safetensors")
    assert_same(merged_by_us(folder_of("sd1"), tmp_path / "kohya.safetensors"), merged_at_home(trained))


def test_kohya_names_of_sdxl_in_the_original_layout(folder_of: Folder, tmp_path: Path) -> None:
    trained = adapted(folder_of("sdxl"), True, EVERYTHING)
    state = load_file(save_kohya(trained, tmp_path / "kohya.safetensors"))
    original, moved = original_unet_layers(trained.unet), {}
    layers = [n.removesuffix(".base_layer") for n, _ in trained.unet.named_modules() if n.endswith(".base_layer")]
    names = {"lora_unet_" + layer.replace(".", "_"): original(layer).replace(".", "_") for layer in layers}
    for name, x in state.items():
        layer, _, rest = name.partition(".")
        moved[f"lora_unet_{names[layer]}.{rest}" if layer in names else name] = x
    assert "lora_unet_input_blocks_3_1_proj_in.alpha" in moved
    assert "lora_unet_input_blocks_0_0.lora_up.weight" in moved
    assert moved.keys() != state.keys()
    save_file(moved, tmp_path / "original.safetensors")
    assert_same(merged_by_us(folder_of("sdxl"), tmp_path / "original.safetensors"), merged_at_home(trained))


def test_older_names_of_diffusers(folder_of: Folder, tmp_path: Path) -> None:
    trained = adapted(folder_of("sd1"), True, ATTENTION, lora_alpha=4)  # without metadata the scale is 1
    state = load_file(save_diffusers(trained, tmp_path) / LORA_FILE)
    old = {}
    for name, x in state.items():
        name = name.replace("lora_A", "lora.down").replace("lora_B", "lora.up")
        if name.startswith("unet."):
            name = re.sub(r"(attn\d)\.to_(q|k|v|out)(?:\.0)?\.lora\.", r"\1.processor.to_\2_lora.", name)
        else:
            name = re.sub(r"\.(q|k|v|out)_proj\.lora\.", r".to_\1_lora.", name).replace("fc1.lora.", "fc1.lora_linear_layer.")
        old[name] = x
    assert any(".processor.to_out_lora.up.weight" in name for name in old)
    assert any("self_attn.to_out_lora.up.weight" in name for name in old)
    save_file(old, tmp_path / "old.safetensors")
    assert_same(
        merged_by_us(folder_of("sd1"), tmp_path / "old.safetensors"), merged_by_diffusers(folder_of("sd1"), tmp_path / "old.safetensors")
    )


def test_a_folder_of_peft(folder_of: Folder, tmp_path: Path) -> None:
    trained = adapted(folder_of("sd1"), False, ATTENTION, use_rslora=True)
    state = {f"base_model.model.{name}": x.contiguous() for name, x in get_peft_model_state_dict(trained.unet).items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    trained.unet.peft_config["default"].save_pretrained(tmp_path)
    assert_same(merged_by_us(folder_of("sd1"), tmp_path), merged_at_home(trained))


@torch.no_grad()
def prediction(unet: nn.Module) -> Tensor:
    """What an SD UNet answers to fixed inputs."""
    maker = torch.Generator().manual_seed(0)
    x_t, embeds = torch.randn(2, 4, 8, 8, generator=maker), torch.randn(2, 5, unet.config.cross_attention_dim, generator=maker)
    return unet(x_t, torch.tensor([100, 900]), embeds).sample


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"rank_pattern": {"to_q": 2}, "use_rslora": True}], ids=str)
def test_an_adapter_continues_where_the_file_ends(options: dict[str, Any], folder_of: Folder, tmp_path: Path) -> None:
    trained = adapted(folder_of("sd1"), False, ATTENTION, **options)
    save_lora(trained, tmp_path / "first")
    pipeline = fresh(folder_of("sd1"))
    before = prediction(pipeline.unet)
    state = torch.get_rng_state()
    load_adapter(pipeline, str(tmp_path / "first"), "start_lora")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(prediction(pipeline.unet), prediction(trained.unet))
    with adapters_off(pipeline.unet):
        assert torch.equal(prediction(pipeline.unet), before)
    names = {name for name, p in pipeline.unet.named_parameters() if p.requires_grad}
    assert names == {name for name, _ in pipeline.unet.named_parameters() if "lora_" in name}
    assert names == trainable_state(trained.unet).keys()
    save_lora(pipeline, tmp_path / "second")
    assert_same(merged_by_diffusers(folder_of("sd1"), tmp_path / "second"), merged_by_diffusers(folder_of("sd1"), tmp_path / "first"))


def test_half_precision_files_are_trained_in_float32(folder_of: Folder, tmp_path: Path) -> None:
    lora = save_diffusers(adapted(folder_of("sd1"), True, ATTENTION), tmp_path)
    half = {name: x.half() for name, x in load_file(lora / LORA_FILE).items()}
    save_file(half, tmp_path / "half.safetensors")
    pipeline = fresh(folder_of("sd1"))
    load_adapter(pipeline, str(tmp_path / "half.safetensors"), "start_lora")
    for module in (pipeline.unet, pipeline.text_encoder):
        trained = trainable_state(module)
        assert {p.dtype for p in trained.values()} == {torch.float32}
        assert trained
    assert float(next(iter(trainable_state(pipeline.unet).values())).detach().abs().sum()) > 0


def sdxl_lora(state: dict[str, Tensor], folder: Path, other: Path) -> Path:
    """A LoRA of another family."""
    return save_diffusers(adapted(other, False, ATTENTION), folder / "other") / LORA_FILE


def kohya_of_sdxl(state: dict[str, Tensor], folder: Path, other: Path) -> Path:
    """The same in kohya's form."""
    return save_kohya(adapted(other, False, ATTENTION), folder / "other.safetensors")


def edited(edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[dict[str, Tensor], Path, Path], Path]:
    """The LoRA with other tensors."""

    def write(state: dict[str, Tensor], folder: Path, other: Path) -> Path:
        save_file(edit(dict(state)), folder / "edited.safetensors")
        return folder / "edited.safetensors"

    return write


def cut(state: dict[str, Tensor], folder: Path, other: Path) -> Path:
    """A download that broke off."""
    (folder / "cut.safetensors").write_bytes(safetensors_bytes(state)[:-7])
    return folder / "cut.safetensors"


def garbage(state: dict[str, Tensor], folder: Path, other: Path) -> Path:
    """Something else under this name."""
    (folder / "garbage.safetensors").write_bytes(b"<!DOCTYPE html><html>not found</html>" * 9)
    return folder / "garbage.safetensors"


def pointer(state: dict[str, Tensor], folder: Path, other: Path) -> Path:
    """A clone without Git LFS."""
    (folder / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    return folder / "pointer.safetensors"


def pickled(state: dict[str, Tensor], folder: Path, other: Path) -> Path:
    """torch.save's own form."""
    torch.save(state, folder / "lora.bin")
    return folder / "lora.bin"


def empty_folder(state: dict[str, Tensor], folder: Path, other: Path) -> Path:
    """A folder with nothing of a LoRA."""
    (folder / "nothing").mkdir()
    return folder / "nothing"


def first_of(state: dict[str, Tensor], part: str) -> str:
    """A name that contains `part`."""
    return next(name for name in sorted(state) if part in name)


UNFIT: dict[str, tuple[Callable[[dict[str, Tensor], Path, Path], Path], list[str]]] = {
    "another family": (sdxl_lora, ["does not fit the model", "another family"]),
    "another family, kohya": (kohya_of_sdxl, ["does not fit the model", "lora_unet_", "another family"]),
    "an unknown layer": (
        edited(lambda s: s | {"unet.nowhere.to_q.lora_A.weight": torch.zeros(4, 8)}),
        ["unet.nowhere.to_q", "no such layer"],
    ),
    "an unknown part": (edited(lambda s: s | {"transformer.x.lora_A.weight": torch.zeros(4, 8)}), ["transformer.x", "no such layer"]),
    "another shape": (edited(lambda s: s | {first_of(s, "lora_B"): torch.zeros(999, 4)}), ["lora_B", "(999, 4)"]),
    "half of a layer": (edited(lambda s: {n: x for n, x in s.items() if n != first_of(s, "lora_B")}), ["is incomplete", "lora_B.weight"]),
    "another adapter": (edited(lambda s: {"lora_unet_conv_in.hada_w1_a": torch.zeros(1)}), ["another kind of adapter", "hada_w1_a"]),
    "kohya DoRA": (edited(lambda s: {"lora_unet_conv_in.dora_scale": torch.zeros(1)}), ["DoRA in kohya's form"]),
    "no LoRA": (edited(lambda s: {"unet.conv_in.weight": torch.zeros(1)}), ["no LoRA weight", "unet.conv_in.weight"]),
    "nothing": (edited(lambda s: {}), ["is empty"]),
    "cut": (cut, ["no complete safetensors file", "fetch it again"]),
    "garbage": (garbage, ["no complete safetensors file", "fetch it again"]),
    "Git LFS pointer": (pointer, ["git lfs pull"]),
    "pickle": (pickled, ["pickle", ".safetensors"]),
    "empty folder": (empty_folder, ["0 .safetensors files", LORA_FILE]),
    "nowhere": (lambda s, folder, other: folder / "nowhere", ["does not exist"]),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_refused_and_changes_nothing(case: str, folder_of: Folder, tmp_path: Path) -> None:
    make, expected = UNFIT[case]
    state = load_file(save_diffusers(adapted(folder_of("sd1"), False, ATTENTION), tmp_path / "lora") / LORA_FILE)
    path = make(state, tmp_path, folder_of("sdxl"))
    pipeline = fresh(folder_of("sd1"))
    before = {name: x.clone() for name, x in weights(pipeline).items()}
    with pytest.raises(ValueError, match="start_lora") as caught:
        merge_lora(pipeline, str(path), "start_lora")
    for text in (*expected, repr(str(path))):
        assert text in str(caught.value)
    assert_same(weights(pipeline), before)


def test_reading_leaves_the_pipeline_alone(folder_of: Folder, tmp_path: Path) -> None:
    lora = save_diffusers(adapted(folder_of("sd1"), True, ATTENTION), tmp_path)
    pipeline = fresh(folder_of("sd1"))
    before = {name: x.clone() for name, x in weights(pipeline).items()}
    found = read_lora(pipeline, str(lora), "start_lora")
    assert found.tensors.keys() == found.configs.keys() == {"unet", "text_encoder"}
    assert (found.configs["unet"].r, found.configs["unet"].lora_alpha) == (4, 6)
    assert_same(weights(pipeline), before)
