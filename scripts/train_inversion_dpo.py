"""Align a model with Inversion-DPO; without arguments on the embedded testbed."""

import sys

from diffpref.cli import script

if __name__ == "__main__":
    sys.exit(script("train", "--method", "inversion_dpo"))
