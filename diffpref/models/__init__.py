"""Model families: load, encode, predict, decode. One family, one file."""
