"""The address of an S3 store: `s3://bucket/prefix?endpoint=URL&region=R&path_style=true&ca=FILE&kms_key=KEY`.

Pure but for the environment.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from floe.store.errors import BadInputError
from floe.store.objects.address import check_endpoint, check_file, parse_options
from floe.store.objects.keys import check_prefix

_EXAMPLE = "use s3://bucket/prefix?endpoint=URL&region=R&path_style=true&ca=FILE&kms_key=KEY"
_KNOWN = ("endpoint", "region", "path_style", "ca", "kms_key")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_BOOL = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class S3Address:
    """Where a bucket is. `endpoint` None: AWS. `prefix` has no slash at either end.

    `ca`: a file of PEM certificates trusted besides the system's. `kms_key`: what the server encrypts new objects with:
    a KMS key's id, alias or ARN; None leaves that to the bucket.
    """

    bucket: str
    prefix: str
    endpoint: str | None
    region: str | None
    path_style: bool
    ca: Path | None = None
    kms_key: str | None = None

    @classmethod
    def parse(cls, url: str) -> S3Address:
        """Parse and check; BadInputError names the part that is wrong. An endpoint implies path_style unless it says no.

        Without `endpoint`, AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL gives it, without `ca` AWS_CA_BUNDLE does, as for
        other AWS tools.
        """
        parts = urlsplit(url)
        if parts.username is not None or parts.password is not None:
            # Not quoted back: it holds a secret.
            raise BadInputError(
                "an s3:// store address must not hold credentials",
                hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead",
            )
        if _BUCKET.fullmatch(parts.netloc) is None or parts.fragment:
            raise BadInputError(f"store address {url!r} has no valid bucket name", hint=_EXAMPLE)
        options = parse_options(parts.query, _KNOWN, _EXAMPLE)
        endpoint = (
            options.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        )
        style = options.get("path_style", "true" if endpoint else "false")
        if style not in _BOOL:
            raise BadInputError(
                f"store address has path_style={style!r}", hint="use path_style=true or path_style=false"
            )
        return cls(
            parts.netloc,
            check_prefix(parts.path.strip("/")),
            check_endpoint(endpoint, _EXAMPLE) if endpoint else None,
            options.get("region") or None,
            _BOOL[style],
            check_file("ca", options.get("ca") or os.environ.get("AWS_CA_BUNDLE")),
            options.get("kms_key") or None,
        )

    @property
    def request_endpoint(self) -> str | None:
        """The endpoint as obstore wants it: with the bucket in the host's name unless the style is by path."""
        if self.endpoint is None or self.path_style:
            return self.endpoint
        scheme, _, host = self.endpoint.partition("://")
        return f"{scheme}://{self.bucket}.{host}"
