"""What a registry is told of who asks."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Credentials:
    """A user name and password, or an identity (refresh) token. Never shown: repr leaves the secrets out.

    `origin` says where they are from, to people. From `renew_at` on (seconds since the epoch) they should be replaced.
    """

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    origin: str = field(default="", compare=False)
    renew_at: float | None = field(default=None, compare=False)

    def basic(self) -> str:
        """The value of an Authorization header."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode("ascii")
