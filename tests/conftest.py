"""Tiny models of real classes and a handful of pairs, made once per session. One thread, so that sums have one order."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub client is imported; no test needs the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffpref.testbed.tokenizer import write_tokenizer
from diffpref.training.run_folder import versions

_STARTED = time.monotonic()

LATENT_SIDE, VAE_FACTOR, TEXT_WIDTH = 8, 4, 16
NUM_PAIRS = 24


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def new_unet(text_width: int, **options: object) -> UNet2DConditionModel:
    """Two levels, one of them with attention."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=text_width,
        **options,
    )


def new_vae() -> AutoencoderKL:
    """Three levels: a factor of 4."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=LATENT_SIDE * VAE_FACTOR,
        scaling_factor=0.7,
    )


def new_text_config(tokenizer: CLIPTokenizer, layers: int) -> CLIPTextConfig:
    """A CLIP text encoder of a few thousand parameters."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_scheduler(prediction_type: str) -> DDPMScheduler:
    """The noise schedule of SD and SDXL."""
    return DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """The two tokenizers of SDXL; they differ in how they pad."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return write_tokenizer(folder / "one", "<|endoftext|>"), write_tokenizer(folder / "two", "!")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]) -> Path:
    """A saved SDXL pipeline: two text encoders, a UNet conditioned on sizes, epsilon."""
    torch.manual_seed(0)
    first, second = tokenizers
    times = 4
    unet = new_unet(
        2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=times,
        projection_class_embeddings_input_dim=6 * times + TEXT_WIDTH,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=new_vae(),
        text_encoder=CLIPTextModel(new_text_config(first, 2)),
        text_encoder_2=CLIPTextModelWithProjection(new_text_config(second, 3)),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet,
        scheduler=new_scheduler("epsilon"),
    )
    folder = tmp_path_factory.mktemp("models") / "sdxl"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_sd_folder(tmp_path_factory: pytest.TempPathFactory, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]) -> Callable[[str], Path]:
    """make_sd_folder(prediction type) -> a saved SD1.5 pipeline."""

    def make(prediction_type: str) -> Path:
        torch.manual_seed(1)
        pipeline = StableDiffusionPipeline(
            vae=new_vae(),
            text_encoder=CLIPTextModel(new_text_config(tokenizers[0], 2)),
            tokenizer=tokenizers[0],
            unet=new_unet(TEXT_WIDTH),
            scheduler=new_scheduler(prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        folder = tmp_path_factory.mktemp("models") / f"sd-{prediction_type}"
        pipeline.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def sd_folder(make_sd_folder: Callable[[str], Path]) -> Path:
    """SD1.5 that predicts the noise."""
    return make_sd_folder("epsilon")


@pytest.fixture(scope="session")
def sd_v_folder(make_sd_folder: Callable[[str], Path]) -> Path:
    """SD that predicts v."""
    return make_sd_folder("v_prediction")


@pytest.fixture
def sd_unet() -> UNet2DConditionModel:
    """An SD UNet that nobody else holds."""
    torch.manual_seed(2)
    return new_unet(TEXT_WIDTH).requires_grad_(False)


def picture(seed: int, side: int = 32) -> bytes:
    """A PNG: a colour gradient, different for every seed."""
    corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(corners).resize((side, side), Image.Resampling.BILINEAR).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def pair_columns() -> dict[str, list[object]]:
    """Columns in the schema of Pick-a-Pic v2: every second pair prefers image 0, prompts repeat."""
    rows = range(NUM_PAIRS)
    return {
        "caption": [f"a red circle, number {row // 2}" for row in rows],
        "jpg_0": [picture(2 * row) for row in rows],
        "jpg_1": [picture(2 * row + 1) for row in rows],
        "label_0": [float(row % 2) for row in rows],
        "label_1": [1.0 - row % 2 for row in rows],
        "image_0_uid": [f"left-{row}" for row in rows],
        "image_1_uid": [f"right-{row}" for row in rows],
    }


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory, pair_columns: dict[str, list[object]]) -> Path:
    """24 pairs of 32 x 32 pictures as one parquet file."""
    path = tmp_path_factory.mktemp("pairs") / "train-0.parquet"
    pq.write_table(pa.table(pair_columns), path)
    return path


@pytest.fixture(scope="session")
def table_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where parquet files are converted to."""
    return tmp_path_factory.mktemp("table-cache")


_CASES = pytest.StashKey[dict[str, list[tuple[int, bool]]]]()
"""Case of the fault matrix (docs/reliability.md) -> (steps lost, passed) per try."""


@pytest.fixture
def tried(request: pytest.FixtureRequest) -> Callable[[str, int], None]:
    """tried(case, steps lost): one more line of the table, where one test is several tries or measures what is lost."""
    return lambda case, lost: request.node.user_properties.append(("tried", (case, lost)))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Note the cases of a test, which stand in its `reliability` mark."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.when != "call" or report.skipped:
        return
    seen = item.config.stash.setdefault(_CASES, {})
    told = [value for name, value in item.user_properties if name == "tried"]
    marked = [case for mark in item.iter_markers() if mark.name in ("reliability", "reliability_full") for case in mark.args]
    for case, lost in [*told, *((case, 0) for case in dict.fromkeys(marked) if case not in dict(told))]:
        seen.setdefault(case, []).append((lost, report.passed))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the table of the fault matrix goes beside the terminal."""
    parser.addoption("--fault-results", type=Path, help="write the table of the fault matrix to this JSON file")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table of the fault matrix, when that is what was asked for."""
    seen = config.stash.get(_CASES, {})
    if not seen or "reliability" not in str(config.option.markexpr).replace("not reliability", ""):
        return
    terminalreporter.section("fault matrix")
    terminalreporter.write_line(f"{'case':<8}{'tried':>7}{'steps lost':>12}  pass")
    rows = []
    for case in sorted(seen, key=lambda case: (case.rstrip("0123456789"), int("".join(filter(str.isdigit, case)) or 0))):
        tries = seen[case]
        rows.append({"case": case, "tried": len(tries), "lost": max(lost for lost, _ in tries), "passed": all(ok for _, ok in tries)})
        verdict = "yes" if rows[-1]["passed"] else "NO"
        terminalreporter.write_line(f"{case:<8}{rows[-1]['tried']:>7}{rows[-1]['lost']:>12}  {verdict}")
    if path := config.getoption("--fault-results"):
        about = {"date": time.strftime("%Y-%m-%d"), "mark": config.option.markexpr, "machine": f"{os.cpu_count()} CPU cores, Linux"}
        seconds = round(time.monotonic() - _STARTED)
        path.write_text(json.dumps(about | {"seconds": seconds, "versions": versions(), "rows": rows}, indent=1) + "\n")
