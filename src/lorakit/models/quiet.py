"""Keep transformers' own noise off the screen and hand its reports to the caller instead."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers.utils import logging as hf_logging

# The loggers that print the table of missing and unexpected tensors.
_REPORTING = ("transformers.modeling_utils", "transformers.utils.loading_report")

# bitsandbytes recommends an optional kernel each time anything imports it, accelerate included.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class _ReportFilter(logging.Filter):
    """Take the load reports out of the log and keep their text."""

    def __init__(self) -> None:
        super().__init__()
        self.reports: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "LOAD REPORT" not in text:
            return True
        self.reports.append(text)
        return False


@contextmanager
def quiet_transformers() -> Iterator[list[str]]:
    """No progress bars and no load reports from transformers in this block; other warnings stay.

    Yields:
        the texts of the load reports that were held back: the caller must pass on what they say.
    """
    bars = hf_logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    held = _ReportFilter()
    loggers = [logging.getLogger(name) for name in _REPORTING]
    for logger in loggers:
        logger.addFilter(held)
    hf_logging.disable_progress_bar()
    try:
        yield held.reports
    finally:
        for logger in loggers:
            logger.removeFilter(held)
        if bars:
            hf_logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()
