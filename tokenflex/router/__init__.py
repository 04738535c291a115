"""The count chosen by itself: a router trained on a model's own losses, and its comparison with other ways to choose."""

from .evaluate import ask, ask_teacher_forced
from .fit import FitSettings, Fitted, fit_router
from .measure import Measured, measure
from .policies import Asked, rows_of
from .report import plot_policies, policy_table
from .train import evaluate_router, give_router, train_router

__all__ = [
    "Asked",
    "FitSettings",
    "Fitted",
    "Measured",
    "ask",
    "ask_teacher_forced",
    "evaluate_router",
    "fit_router",
    "give_router",
    "measure",
    "plot_policies",
    "policy_table",
    "rows_of",
    "train_router",
]
