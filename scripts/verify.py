"""A published checkpoint against its base, our figures beside the paper's."""

import sys

from diffpref.cli import script

if __name__ == "__main__":
    sys.exit(script("verify"))
