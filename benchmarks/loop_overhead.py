"""How much of a run's time lies outside forward, backward and optimizer step: read from its own metrics.jsonl.

    python benchmarks/loop_overhead.py outputs/<run>

Every step records the seconds inside (time/compute) and the speed of the whole step, both from the same clock in the same
run. Steps that save or validate are shown apart, because their share depends on the intervals.
"""

import json
import statistics
import sys
from pathlib import Path


def overhead(folder: Path) -> dict[str, float]:
    """Seconds and shares of the run in `folder`. Raises ValueError when it has too few steps."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    per_update = json.loads((folder / "run_manifest.json").read_text())["pairs_per_update"]
    steps = [(per_update / r["time/pairs_per_second"], r["time/compute"]) for r in rows if "time/compute" in r][1:]
    if len(steps) < 10:
        raise ValueError(f"{folder} has {len(steps)} steps after the first; 10 are needed")
    outside = [(whole - inside) / inside for whole, inside in steps]
    whole, inside = (sum(column) for column in zip(*steps, strict=True))
    return {
        "steps": len(steps),
        "seconds_whole": whole,
        "seconds_inside": inside,
        "median_overhead": statistics.median(outside),
        "overhead_with_saving_and_validation": (whole - inside) / inside,
        "median_pairs_per_second": per_update / statistics.median(w for w, _ in steps),
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/loop_overhead.py RUN_FOLDER")
    print(json.dumps(overhead(Path(sys.argv[1])), indent=1))
