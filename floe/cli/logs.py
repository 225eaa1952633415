"""Logging: one line an event on stderr, as text (for the journal too) or as JSON; commands only speak up to warn."""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import sys

# sd-daemon(3): a line may start with its syslog priority, which journald takes off.
_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def set_up(level: str, log_format: str, *, daemon: bool) -> None:
    """Log at `level` ("info" ...) and above to stderr in `log_format`, "text" or "json".

    A command that is no daemon leaves "info" out: its result is on stdout, and what it did is no news.
    """
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(TextFormatter(journal=_is_journal()) if daemon else RemarkFormatter())
    wanted = "warning" if level == "info" and not daemon else level
    logging.basicConfig(level=wanted.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    for noisy in ("botocore", "boto3", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _is_journal() -> bool:
    """Whether stderr is the journal's stream: systemd.exec(5), JOURNAL_STREAM holds its device and inode."""
    stream = os.environ.get("JOURNAL_STREAM", "")
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return stream == f"{status.st_dev}:{status.st_ino}"


class TextFormatter(logging.Formatter):
    """`time LEVEL name: message key=value`, never more than a line; the journal adds the time itself."""

    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        message = _message(self, record)
        # What the message says already is there for JSON alone.
        extra = "".join(f" {key}={value}" for key, value in _extra(record).items() if str(value) not in message)
        text = f"{record.name}: {message}{extra}"
        start = f"<{_PRIORITY.get(record.levelno, 6)}>" if self._journal else f"{_time(record)} {record.levelname} "
        return start + text.replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")


class RemarkFormatter(logging.Formatter):
    """`floe: warning: message`, for people at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        text = f"floe: {record.levelname.lower()}: {_message(self, record)}"
        return text.replace("\r", "\\r").replace("\n", "\\n")


class JsonFormatter(logging.Formatter):
    """An object a line: time (RFC 3339, UTC), level, logger, message and the record's extra values."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        value = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(self, record),
            **_extra(record),
        }
        return json.dumps(value, default=str, ensure_ascii=False)


def _message(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    text = record.getMessage()
    return f"{text}\n{formatter.formatException(record.exc_info)}" if record.exc_info else text


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


def _time(record: logging.LogRecord) -> str:
    moment = dt.datetime.fromtimestamp(record.created, dt.timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
