"""Align a model with any method (--method)."""

import sys

from diffpref.cli import script

if __name__ == "__main__":
    sys.exit(script("train"))
