"""The report that `diffpref label` leaves beside the pairs that it scored, as far as training reads it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

REPORT_FILE = "label_report.json"


def stored_range(folder: Path, names: Sequence[str]) -> tuple[float, float] | None:
    """(smallest, largest) score of the whole data set in `folder`, under the first of `names` that the report has; None without one.

    Raises ValueError for a report that cannot be read.
    """
    path = folder / REPORT_FILE
    if not path.is_file():
        return None
    try:
        ranges = json.loads(path.read_text()).get("score_range", {})
        found = next((ranges[name] for name in names if name in ranges), None)
        return None if found is None else (float(found[0]), float(found[1]))
    except (ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); score the pairs again with diffpref label, or delete it") from error
