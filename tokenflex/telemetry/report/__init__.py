"""`tokenflex report`: what a run did as one HTML page, or two runs side by side."""

from .page import render_page, write_page
from .reading import RunRecord, read_run

__all__ = ["RunRecord", "read_run", "render_page", "write_page"]
