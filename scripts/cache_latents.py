"""Encode the pictures and prompts of a run once; runs with --latent_cache read them."""

import sys

from diffpref.cli import script

if __name__ == "__main__":
    sys.exit(script("cache"))
