"""Who Floe is to one registry: asked for when a registry wants to know, kept, and asked for again when refused or old.

In this order: the variable DOCKER_AUTH_CONFIG, the credential helper that Docker's config names, the config's own entry,
and for a host of Amazon ECR what AWS gives.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping

from floe.ingest.oci import dockerconfig, ecr, helper
from floe.ingest.oci.credentials import Credentials
from floe.store.errors import FloeError


class CredentialSource:
    """The credentials for the registry at `host` (`HOST[:PORT]`). Thread-safe: one thread asks, the others wait."""

    def __init__(self, host: str, environ: Mapping[str, str] | None = None) -> None:
        self.host = host
        self.environ: Mapping[str, str] = os.environ if environ is None else environ
        self._lock = threading.Lock()  # guards what follows, also while a helper or AWS is asked
        self._asked = False
        self._known: Credentials | None = None

    def get(self) -> Credentials | None:
        """The credentials; None: there are none, so be anonymous.

        BadInputError: Docker's config cannot be read. AccessDeniedError, UnavailableError: a helper or AWS failed.
        """
        with self._lock:
            if not self._asked:
                self._known = self._ask()
                self._asked = True
            elif self._known is not None and self._known.renew_at is not None and time.time() >= self._known.renew_at:
                with contextlib.suppress(FloeError):  # these hold for a while yet; if not, the registry says so
                    self._known = self._ask() or self._known
            return self._known

    def renew(self, refused: Credentials | None) -> Credentials | None:
        """Other credentials than those that were `refused`; None when asking again gives the same, or none."""
        with self._lock:
            if self._known == refused:  # else another thread has asked already
                self._known = self._ask()
            return self._known if self._known != refused else None

    def replace(self, old: Credentials, new: Credentials) -> None:
        """A token server exchanged the identity token of `old`: `new` holds for this process."""
        with self._lock:
            if self._known == old:
                self._known = new

    def _ask(self) -> Credentials | None:
        config = dockerconfig.read_config(dockerconfig.config_path(self.environ))
        inline = dockerconfig.inline_config(self.environ)
        found = inline.find(self.host) if inline is not None else None
        program = config.helper(self.host)
        if found is None and program:
            found = helper.get(program, dockerconfig.server_name(self.host), self.environ)
        if found is None:
            found = config.find(self.host) or ecr.credentials(self.host)
        return found
