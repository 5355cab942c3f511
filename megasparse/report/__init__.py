"""report.html: a run in one page."""
