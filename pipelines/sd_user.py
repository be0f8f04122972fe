"""Stable Diffusion for users: name this file as `custom_pipeline`. See docs/methods/ppd.md."""

from diffpref.inference.user_pipelines import UserStableDiffusionPipeline

__all__ = ["UserStableDiffusionPipeline"]
