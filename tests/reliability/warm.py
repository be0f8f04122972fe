"""Imported by the server that children are forked from, so that each of them starts in a moment: what a training run needs."""

import torch

import diffpref.cli
import diffpref.training.align
import tests.reliability.faults
from diffpref.testbed import recipe

torch.set_num_threads(1)
loaded = (diffpref.cli, diffpref.training.align, tests.reliability.faults, recipe)
