"""How the command speaks: lines or a bar on stderr for people, JSON lines for machines."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from typing import Any, Literal

from curate import progress

Format = Literal["text", "json"]
_FIELDS = ("event", "step", "done", "total", "unit", "rate", "seconds_left", "counts")


class JsonLines(logging.Formatter):
    """One JSON object per record."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        entry: dict[str, Any] = {
            "time": stamp,
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        entry |= {name: getattr(record, name) for name in _FIELDS if hasattr(record, name)}
        return json.dumps(entry, ensure_ascii=False)


class Plain(logging.Formatter):
    """A message; its level only where it is a warning or worse."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line."""
        text = record.getMessage()
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def set_up(log_format: Format) -> None:
    """Send the toolkit's messages to stderr, and show progress."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if log_format == "json" else Plain())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for package in ("curate", "coreset", "distill", "pipelines"):
        logging.getLogger(package).setLevel(logging.INFO)
    logging.captureWarnings(True)
    # Third parties warn about their own code; it is nothing that a user of the command can mend.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    progress.show("bar" if log_format == "text" and sys.stderr.isatty() else "log")


def write_error(message: str, log_format: Format) -> None:
    """Write an error as one line; what a file or an argument held must not steer a terminal."""
    words = " ".join(message.split())
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)
    if log_format == "json":
        record = logging.LogRecord("pipelines", logging.ERROR, "", 0, line, None, None)
        sys.stderr.write(JsonLines().format(record) + "\n")
    else:
        sys.stderr.write(f"error: {line}\n")
