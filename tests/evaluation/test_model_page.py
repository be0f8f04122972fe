"""The page of an evaluation: data and markdown agree with it, nothing is unescaped or fetched; a real browser filters and sorts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from diffpref.data.prompts import PromptSet
from diffpref.evaluation.generate import Drawing
from diffpref.evaluation.model_page import pick_prompts, render, trained_on_and_others, write_page
from diffpref.evaluation.model_report import BASE, ModelReport, report_of, strength_curves, write_data
from diffpref.evaluation.pictures import Measured, thumbnail

EVIL = 'a <script>alert(1)</script> </script> & "fox" <!-- --> \u2028 </SCRIPT>'
COUNT = 40


def picture(model: str, prompt: int) -> np.ndarray:
    """A picture of 160 x 160 pixels that differs by model and prompt."""
    rng = np.random.default_rng([prompt, sum(model.encode())])
    return np.kron(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), np.ones((20, 20, 1), np.uint8))


def measured(model: str, shift: float) -> Measured:
    """Scores around `shift`."""
    rng = np.random.default_rng(sum(model.encode()))
    small = np.stack([thumbnail(picture(model, i)) for i in range(COUNT)])[:, None]
    scores = {"pickscore": shift + rng.normal(size=(COUNT, 1)), "aesthetic": 5 + rng.normal(size=(COUNT, 1))}
    return Measured(scores, {"saturation": np.abs(rng.normal(size=(COUNT, 1)))}, small)


@pytest.fixture
def report() -> ModelReport:
    """A base and a LoRA at three strengths."""
    texts = [f"prompt number {i}" for i in range(COUNT - 1)] + [EVIL]
    groups = ["even" if i % 2 == 0 else "odd" for i in range(COUNT)]
    names = {BASE: None, "lora x0.5": 0.5, "lora x1": 1.0, "lora x1.5": 1.5}
    origins = {
        name: {"source": "a-model" if scale is None else "a-lora", "label": "lora", "lora_scale": scale} for name, scale in names.items()
    }
    found = {name: measured(name, 3.0 * (scale or 0.0)) for name, scale in names.items()}
    run = [{"step": i, "loss": 0.7 - 0.001 * i, "rewards/accuracies": 0.5} for i in range(50)]
    drawing = Drawing(texts, 1, 0, 20, 5.0, 8)
    return report_of(
        {"seed": 0}, PromptSet("own", texts, groups, []), drawing, origins, {"pickscore": object()}, found, "pickscore", {"lora x1": run}
    )


def embedded(page: str) -> dict[str, Any]:
    """The gallery's data."""
    found = re.search(r'<script type="application/json" id="gallery-data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found.group(1))  # type: ignore[no-any-return]


def test_data_page_and_markdown_hold_the_same_numbers(report: ModelReport, tmp_path: Path) -> None:
    write_data(report, tmp_path)
    stored = json.loads((tmp_path / "report.json").read_text())
    assert len(stored["comparisons"]) == 3 * 2
    first = stored["comparisons"][0]
    page = render(report, picture, 100)
    assert f"{100 * first['win_rate']:.1f}&nbsp;%" in page
    assert f"{100 * first['win_rate']:.1f} %" in (tmp_path / "report.md").read_text()
    assert stored["statistics"]["base"]["diversity"] is None  # one picture per prompt has none
    assert stored["statistics"]["base"]["drift"] == 0
    assert stored["statistics"]["lora x1"]["drift"] > 0.1
    assert "40 prompts are few" in page
    gallery = embedded(page)
    assert [row["prompt"] for row in gallery["rows"]] == report.prompts.texts
    assert gallery["rows"][3]["scores"]["lora x1"]["pickscore"] == report.measured["lora x1"].scores["pickscore"][3, 0]
    assert "(trained on)" in page
    assert len(stored["combined"]) == 3 * 4
    assert "All scorers together" in page
    own, other = (c for c in stored["comparisons"][:2])
    assert trained_on_and_others(report)["lora x0.5"] == (own["win_rate"], other["win_rate"])
    assert "<th>wins, other scorers</th>" in page
    assert "Training" in page


@pytest.mark.reliability("S13")
def test_hostile_prompts_stay_text(report: ModelReport) -> None:
    page = render(report, picture, 100)
    assert "<script>alert" not in page
    assert page.lower().count("</script>") == 2
    assert "<!--" not in page
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)
    assert "default-src 'none'" in page


def test_many_prompts_show_extremes_and_some_between(report: ModelReport) -> None:
    chosen = pick_prompts(report, 12)
    assert len(chosen) == len(set(chosen)) == 12
    first = report.comparisons[0]
    change = report.measured[first.model].scores[first.scorer][:, 0] - report.measured[BASE].scores[first.scorer][:, 0]
    assert {int(change.argmax()), int(change.argmin())} <= set(chosen)
    assert "12 of 40 prompts are shown" in render(report, picture, 12)


def test_strengths_make_a_curve(report: ModelReport, tmp_path: Path) -> None:
    (lines,) = strength_curves(report).values()
    assert [x for x, _ in lines["pickscore"]] == [0.0, 0.5, 1.0, 1.5]
    values = [y for _, y in lines["pickscore"]]
    assert values == sorted(values)
    write_page(report, tmp_path, picture, 4)
    assert "Score against LoRA strength" in (tmp_path / "report.html").read_text()
    drawing = ElementTree.parse(tmp_path / "strength-lora-pickscore.svg").getroot()
    (line,) = (e for e in drawing.iter() if e.tag.endswith("polyline"))
    assert len(str(line.get("points")).split()) == 4
    assert sorted(p.name for p in tmp_path.glob("*.svg")) == ["strength-lora-aesthetic.svg", "strength-lora-pickscore.svg"]


@pytest.fixture
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = shutil.which("chromedriver")
    if not driver:
        pytest.skip("chromedriver is not installed")
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--window-size=1300,1600"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(service=webdriver.ChromeService(driver), options=options)
    yield found
    found.quit()


@pytest.mark.browser
def test_the_page_works_in_a_browser(report: ModelReport, browser: Any, tmp_path: Path) -> None:
    ui = pytest.importorskip("selenium.webdriver.support.ui")
    write_page(report, tmp_path, picture, 100)
    browser.get((tmp_path / "report.html").as_uri())
    assert browser.get_log("browser") == []
    cards = browser.find_elements("css selector", "#cards figure")
    assert len(cards) == 24
    changes = [float(card.get_attribute("data-difference")) for card in cards]
    assert changes == sorted(changes, reverse=True)
    assert browser.find_element("id", "count").text == "24 of 40 prompts"

    def choose(name: str, value: str) -> None:
        ui.Select(browser.find_element("id", name)).select_by_value(value)

    choose("sort", "worst")
    changes = [float(c.get_attribute("data-difference")) for c in browser.find_elements("css selector", "#cards figure")]
    assert changes == sorted(changes)
    browser.find_element("id", "more").click()
    assert len(browser.find_elements("css selector", "#cards figure")) == COUNT
    choose("group", "odd")
    assert browser.find_element("id", "count").text == "20 of 20 prompts"
    choose("group", "")
    browser.find_element("id", "text").send_keys("NUMBER 7")
    (card,) = browser.find_elements("css selector", "#cards figure")
    assert "prompt number 7" in card.text
    before = float(card.get_attribute("data-difference"))
    choose("model", "lora x1.5")
    after = float(browser.find_element("css selector", "#cards figure").get_attribute("data-difference"))
    assert after != before
    slider = browser.find_element("css selector", "#cards input[type=range]")
    browser.execute_script("arguments[0].value = 80; arguments[0].dispatchEvent(new Event('input'))", slider)
    clip = browser.execute_script("return document.querySelector('#cards .over').style.clipPath")
    assert "20%" in clip
    natural = browser.execute_script("return [...document.querySelectorAll('#cards img')].map((i) => i.naturalWidth)")
    assert natural == [160, 160]
    assert browser.get_log("browser") == []
    browser.save_screenshot(str(tmp_path / "page.png"))
    assert (tmp_path / "page.png").stat().st_size > 10_000
