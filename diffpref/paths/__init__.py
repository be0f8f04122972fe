"""How x_t and its regression target are reached from a batch."""
