"""Fit the step-aware preference model of SPO to preference pairs."""

import sys

from diffpref.cli import script

if __name__ == "__main__":
    sys.exit(script("train-step-aware-scorer"))
