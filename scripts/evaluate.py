"""Compare an aligned testbed model with its base."""

import sys

from diffpref.cli import script

if __name__ == "__main__":
    sys.exit(script("evaluate"))
