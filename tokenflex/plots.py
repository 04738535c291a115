"""A figure that is drawn without a display, for the plots of every room."""

from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of `width` x `height` inches at 120 dots each, which lays itself out and needs no window.

    Raises:
        UserError: matplotlib, which whoever draws nothing need not have, is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a plot needs the package matplotlib; run: pip install 'tokenflex[quickstart]'") from None
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
