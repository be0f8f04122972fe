"""Align a model with each of its users (PPD)."""

import sys

from diffpref.cli import script

if __name__ == "__main__":
    sys.exit(script("train", "--method", "ppd"))
