"""Who makes preference batches: files (dataset.py), or the policy itself."""

from __future__ import annotations

from diffpref.sources.stepwise import StepwiseSampling

SOURCES: dict[str, type[StepwiseSampling]] = {"stepwise": StepwiseSampling}
"""The on-policy sources and their settings; a run without one of them reads pairs from files."""
