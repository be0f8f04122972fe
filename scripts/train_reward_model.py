"""Fit a scorer to preference pairs, saved in PickScore's layout."""

import sys

from diffpref.cli import script

if __name__ == "__main__":
    sys.exit(script("train-reward-model"))
