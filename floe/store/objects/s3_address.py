"""The address of an S3 store: `s3://bucket/prefix?endpoint=URL&region=R&path_style=true`. Pure but for the environment."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit

from floe.store.errors import BadInputError
from floe.store.objects.keys import check_prefix

_EXAMPLE = "use s3://bucket/prefix?endpoint=URL&region=R&path_style=true"
_KNOWN = ("endpoint", "region", "path_style")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_BOOL = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class S3Address:
    """Where a bucket is. `endpoint` None: AWS. `prefix` has no slash at either end."""

    bucket: str
    prefix: str
    endpoint: str | None
    region: str | None
    path_style: bool

    @classmethod
    def parse(cls, url: str) -> S3Address:
        """Parse and check; BadInputError names the part that is wrong. An endpoint implies path_style unless it says no.

        Without `endpoint`, AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL gives it, as for other AWS tools.
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
        options: dict[str, str] = {}
        for name, value in parse_qsl(parts.query, keep_blank_values=True):
            if name not in _KNOWN:
                raise BadInputError(f"store address has an unknown option {name!r}", hint=_EXAMPLE)
            if name in options:
                raise BadInputError(f"store address has the option {name!r} twice", hint=_EXAMPLE)
            options[name] = value
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
            _check_endpoint(endpoint) if endpoint else None,
            options.get("region") or None,
            _BOOL[style],
        )

    @property
    def request_endpoint(self) -> str | None:
        """The endpoint as obstore wants it: with the bucket in the host's name unless the style is by path."""
        if self.endpoint is None or self.path_style:
            return self.endpoint
        scheme, _, host = self.endpoint.partition("://")
        return f"{scheme}://{self.bucket}.{host}"


def _check_endpoint(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    if parts.username is not None or parts.password is not None:
        raise BadInputError("the store's endpoint must not hold credentials")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise BadInputError(f"endpoint {endpoint!r} is not http://HOST[:PORT] or https://HOST[:PORT]", hint=_EXAMPLE)
    return endpoint.rstrip("/")
