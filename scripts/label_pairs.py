"""Preference pairs from scorers: new ones from a model, or scores and labels for existing ones."""

import sys

from diffpref.cli import script

if __name__ == "__main__":
    sys.exit(script("label"))
