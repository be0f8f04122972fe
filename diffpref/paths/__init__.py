"""How x_t and its regression target are reached from a batch."""

from diffpref.paths.forward import ForwardNoising

PATHS = {"forward": ForwardNoising}
