"""Measure every method on the testbed under one protocol; results that are there are not measured again."""

import sys

from diffpref.cli import script

if __name__ == "__main__":
    sys.exit(script("testbed", "leaderboard", "--results", "benchmarks/results/leaderboard"))
