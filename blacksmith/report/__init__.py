"""Shows a run, or several, as one HTML page with plots that needs only a browser.

The page contains plotly.js, its data and its images and makes no request, so it can be opened from disk,
attached to a message or archived. By hand: `python -m blacksmith.report RUN [RUN ...]`.
"""

from blacksmith.report.pages import write, write_comparison, write_parity

__all__ = ["write", "write_comparison", "write_parity"]
