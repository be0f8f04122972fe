"""A run's result in the form of another program, read back before it appears."""

import sys

from diffpref.cli import script

if __name__ == "__main__":
    sys.exit(script("export"))
