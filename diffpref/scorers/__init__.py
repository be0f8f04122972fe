"""Reward models: (images, prompts) -> scores (N,)."""
