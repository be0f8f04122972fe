"""Align a model with InPO; without arguments on the embedded testbed."""

import sys

from diffpref.cli import script

if __name__ == "__main__":
    sys.exit(script("train", "--method", "inpo"))
