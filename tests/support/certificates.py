"""A certificate authority of the tests' own, made with openssl: CA, server and client certificates."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

_CONFIG = "[req]\ndistinguished_name = name\n[name]\n"


class Authority:
    """A CA whose certificate is the file `ca`; what it issues lies beside it in `folder`."""

    def __init__(self, folder: Path, name: str = "floe tests") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        (folder / "openssl.cnf").write_text(_CONFIG)
        extensions = ("basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign", "subjectKeyIdentifier=hash")
        self.ca, self._key = self._make("ca", name, extensions)

    def issue(self, name: str, *hosts: str, peer: bool = False) -> tuple[Path, Path]:
        """Certificate and key for a server known by `hosts` (names and addresses), or without hosts for a client.

        `peer`: for a server that is also a client of others of its kind.
        """
        names = ",".join(f"IP:{host}" if host.replace(".", "").isdigit() else f"DNS:{host}" for host in hosts)
        usage = "serverAuth,clientAuth" if peer else "serverAuth" if hosts else "clientAuth"
        extensions = ("basicConstraints=CA:FALSE", "authorityKeyIdentifier=keyid", f"extendedKeyUsage={usage}")
        alternatives = (f"subjectAltName={names}",) if hosts else ()
        return self._make(name, name, (*extensions, *alternatives), "-CA", str(self.ca), "-CAkey", str(self._key))

    def server(self, *hosts: str, clients: Authority | None = None) -> ssl.SSLContext:
        """What a server known by `hosts` speaks TLS with; it wants a certificate of `clients`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.issue(f"server-{hosts[0]}", *hosts))
        if clients is not None:
            context.load_verify_locations(clients.ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _make(self, name: str, subject: str, extensions: tuple[str, ...], *more: str) -> tuple[Path, Path]:
        certificate, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        command = ["openssl", "req", "-x509", "-config", str(self._folder / "openssl.cnf"), "-days", "2", "-nodes"]
        command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", f"/CN={subject}"]
        command += ["-keyout", str(key), "-out", str(certificate), *more]
        for extension in extensions:
            command += ["-addext", extension]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        return certificate, key
