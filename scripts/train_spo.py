"""Align a model with SPO on pairs that it samples itself; prompts and a judge of half-denoised pictures are all it needs."""

import sys

from diffpref.cli import script

if __name__ == "__main__":
    sys.exit(script("train", "--method", "spo"))
