"""What preference data holds, before training: rows, ties, duplicates, broken images, sizes, labels, scores, annotators."""

import sys

from diffpref.cli import script

if __name__ == "__main__":
    sys.exit(script("inspect"))
