"""Look at data before training on it: one HTML page with samples, their masks and costs, and the statistics of a set."""

from .page import render_page, write_page
from .survey import Survey, survey_shards

__all__ = ["Survey", "render_page", "survey_shards", "write_page"]
