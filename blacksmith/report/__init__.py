"""A run, or several, as one HTML page with plots that needs nothing but a browser.

The page carries plotly.js, its data and its images inside itself and forbids itself every request, so it can
be opened from disk, attached to a message or archived. By hand: `python -m blacksmith.report RUN [RUN ...]`.
"""

from blacksmith.report.pages import write, write_comparison, write_parity

__all__ = ["write", "write_comparison", "write_parity"]
