"""Pictures from prompts and seeds."""

import sys

from diffpref.cli import script

if __name__ == "__main__":
    sys.exit(script("generate"))
