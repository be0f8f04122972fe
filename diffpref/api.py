"""The names that a Python user needs; docs/extend.md uses them. Everything else may move between versions.

align       train and export: `align(config, method) -> Aligned`; an Objective adds a path and guards to the method
TrainConfig settings of a run; recipe_config() gives those of the testbed
METHODS     name -> class of the methods that come with the library
Evaluation, LossOutput, PreferenceBatch   what a method of one's own is given and returns
policy_error, reference_error, logistic, margin_metrics, error_metrics   the mathematics that pair methods share
report_run  compare a finished testbed run with the base model and write its page
"""

from diffpref.core.links import logistic
from diffpref.core.rewards import error_metrics, margin_metrics, policy_error, reference_error
from diffpref.core.types import Evaluation, LossOutput, PreferenceBatch
from diffpref.methods import METHODS, Method
from diffpref.testbed.demo import report_run
from diffpref.testbed.recipe import recipe_config
from diffpref.training.align import Aligned, align
from diffpref.training.config import TrainConfig
from diffpref.training.objective import Objective

__all__ = [
    "METHODS",
    "Aligned",
    "Evaluation",
    "LossOutput",
    "Method",
    "Objective",
    "PreferenceBatch",
    "TrainConfig",
    "align",
    "error_metrics",
    "logistic",
    "margin_metrics",
    "policy_error",
    "recipe_config",
    "reference_error",
    "report_run",
]
