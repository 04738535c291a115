"""Accuracy of a model per task and visual-token count, as a table and a plot."""

from .accuracy import Answers, evaluate_model, evaluate_run, exact_match, hits
from .report import accuracy_table, plot_accuracy

__all__ = ["Answers", "accuracy_table", "evaluate_model", "evaluate_run", "exact_match", "hits", "plot_accuracy"]
