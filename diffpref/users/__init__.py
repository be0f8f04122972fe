"""User embeddings from a few decided pairs of a user (PPD)."""
