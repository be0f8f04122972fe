"""SDXL for users: name this file as `custom_pipeline`. See docs/methods/ppd.md."""

from diffpref.inference.user_pipelines import UserStableDiffusionXLPipeline

__all__ = ["UserStableDiffusionXLPipeline"]
