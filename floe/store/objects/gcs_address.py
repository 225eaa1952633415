"""The address of a Google Cloud Storage store: `gs://bucket/prefix?service_account=FILE&endpoint=URL&ca=FILE`. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from floe.store.errors import BadInputError
from floe.store.objects.address import check_endpoint, check_file, parse_options
from floe.store.objects.keys import check_prefix

_EXAMPLE = "use gs://bucket/prefix?service_account=FILE&endpoint=URL&ca=FILE"
_KNOWN = ("service_account", "endpoint", "ca")
# Google's rule: parts of at most 63 characters between dots, 222 in all.
_BUCKET = re.compile(r"(?=.{3,222}$)[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?)*")
GOOGLE = "https://storage.googleapis.com"


@dataclass(frozen=True)
class GCSAddress:
    """Where a bucket is. `endpoint` None: Google's. `prefix` has no slash at either end.

    `service_account`: a key file to use instead of application default credentials. `ca`: a file of PEM certificates
    trusted besides the system's.
    """

    bucket: str
    prefix: str
    endpoint: str | None = None
    service_account: Path | None = None
    ca: Path | None = None

    @classmethod
    def parse(cls, url: str) -> GCSAddress:
        """Parse and check; BadInputError names the part that is wrong."""
        parts = urlsplit(url)
        if parts.username is not None or parts.password is not None:
            # Not quoted back: it holds a secret.
            raise BadInputError(
                "a gs:// store address must not hold credentials", hint="name a key file with service_account=FILE"
            )
        if _BUCKET.fullmatch(parts.netloc) is None or parts.fragment:
            raise BadInputError(f"store address {url!r} has no valid bucket name", hint=_EXAMPLE)
        options = parse_options(parts.query, _KNOWN, _EXAMPLE)
        endpoint = options.get("endpoint")
        return cls(
            parts.netloc,
            check_prefix(parts.path.strip("/")),
            check_endpoint(endpoint, _EXAMPLE) if endpoint else None,
            check_file("service_account", options.get("service_account")),
            check_file("ca", options.get("ca")),
        )

    @property
    def base(self) -> str:
        """What URLs begin with."""
        return self.endpoint or GOOGLE

    @property
    def is_emulator(self) -> bool:
        """Whether it gets no credentials: without TLS they could be read, and without a key file none were meant for it."""
        return self.base.startswith("http://") and self.service_account is None
