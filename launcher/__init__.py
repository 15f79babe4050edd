"""dsft's command line: one JSON config becomes a plan, jobs and a report. Never imports torch."""

__version__ = "0.1.0"
