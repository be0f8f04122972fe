"""`diffpref inspect`: what preference data holds, before a model is loaded. Text on the terminal, JSON and a page in a folder."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffpref.data.inspection import pair_facts
from diffpref.data.pairs import read_pairs
from diffpref.data.reading import request_of
from diffpref.evaluation.pair_page import as_page, as_text
from diffpref.evaluation.work import write_text


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Settings of `diffpref inspect`; those about the data mean what they mean for a training run."""

    train_data_dir: str | None = None
    """Local preference data: a file or folder in one of the forms of docs/data.md."""
    dataset_name: str | None = None
    """Preference pairs by hub id; give this or train_data_dir."""
    dataset_config_name: str | None = None
    """Configuration of a hub data set that has several."""
    data_format: str = "auto"
    """Form of a row or of the files; auto looks."""
    split: str = "train"
    """Split to look at."""
    caption_column: str | None = None
    """Column of the prompts, if it is not found under a known name."""
    image_0_column: str | None = None
    """Column of the first image, of the better one for chosen_rejected, or of the list of images."""
    image_1_column: str | None = None
    """Column of the second image, or of the worse one."""
    label_column: str | None = None
    """Column with the probability that the first image is better, or with the ranks of a list."""
    user_column: str | None = None
    """Column of the annotator."""
    ranked_pairs: Literal["all", "best_worst"] = "all"
    """Which pairs a ranked list of images gives."""
    choice_model: str | None = None
    """Scorer whose columns decide in place of the label."""
    max_train_samples: int | None = None
    """Look at the first pairs only."""
    resolution: int = 512
    """Side of the training pictures in pixels: smaller ones are enlarged."""
    cache_dir: str | None = None
    """Where copies of parquet files and the results of the image check are kept."""
    output_dir: str | None = None
    """Folder for pairs.json and pairs.html; only text on the terminal when not given."""

    def __post_init__(self) -> None:
        if (self.train_data_dir is None) == (self.dataset_name is None):
            raise ValueError(
                f"train_data_dir is {self.train_data_dir!r} and dataset_name {self.dataset_name!r}; give one of them, the data to look at"
            )
        if self.resolution < 1:
            raise ValueError(f"resolution is {self.resolution}; it must be at least 1")


def inspect(config: InspectConfig) -> int:
    """Print what the data holds; returns 0, or 3 when so many rows are bad that a run would stop. Raises ValueError like a run."""
    source = str(config.train_data_dir or config.dataset_name)
    request = request_of(config, tie_policy="keep")
    stops: list[str] = []
    pairs = read_pairs(source, request, lambda text: print(text, file=sys.stderr), stops.append)
    facts = pair_facts(pairs, source, config.resolution)
    print(as_text(facts))
    for reason in stops:
        print(f"a run would stop: {reason.splitlines()[0]}")
    if config.output_dir is not None:
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        found = dataclasses.asdict(facts) | {"warnings": facts.warnings(), "stops": stops}
        write_text(folder / "pairs.json", json.dumps(found, indent=1))
        write_text(folder / "pairs.html", as_page(facts))
        print(f"page: {folder / 'pairs.html'}")
    return 3 if stops else 0
