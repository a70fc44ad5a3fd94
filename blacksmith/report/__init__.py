"""Shows one or several runs as a single HTML page with plots: `python -m blacksmith.report RUN [RUN ...]`.

The page contains plotly.js, its data and its images and makes no requests, so it can be opened from disk,
attached to a message or archived.
"""

from blacksmith.report.pages import write, write_comparison, write_parity

__all__ = ["write", "write_comparison", "write_parity"]
