"""A real S3 server for tests: SeaweedFS (`weed server -s3`) in a private folder on loopback, stopped afterwards.

`running()` shares one server among all tests of a pytest session; it is stopped when the session's process ends.
`Seaweed(folder)` is one of your own, for tests that stop it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from urllib.parse import quote

import boto3
from botocore.config import Config
from prometheus_client.parser import text_string_to_metric_families
from support import ports, sweep

ACCESS_KEY, SECRET_KEY = "floe-test-access", "floe-test-secret"
READER_KEY, READER_SECRET = "floe-test-reader", "floe-test-reader-secret"
_SERVICES = ("master", "volume", "filer", "s3")
_PORTS = (*_SERVICES, "metrics")
_START_SECONDS = 60


class Seaweed:
    """A running server. `endpoint`: its URL; `url(bucket, prefix)`: a store address; buckets are made by `bucket()`."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._process = None
        self._ports = {}
        for attempt in range(5):  # another program may take a port between our choice and weed's bind
            try:
                self._start()
            except RuntimeError:
                self.stop()
                if attempt == 4:
                    raise
            else:
                return

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self._ports['s3']}"

    @property
    def pid(self):
        return self._process.pid

    def url(self, bucket, prefix="", *, endpoint=None):
        """A store address; `endpoint`: of a proxy before this server."""
        path = f"{bucket}/{prefix}" if prefix else bucket
        return f"s3://{path}?endpoint={quote(endpoint or self.endpoint, safe='')}&region=us-east-1&path_style=true"

    def client(self):
        """boto3's view of the server, as its administrator."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 3}),
        )

    def bucket(self, name=None):
        """A new, empty bucket; returns its name."""
        name = name or f"floe-{uuid.uuid4().hex[:12]}"
        with contextlib.closing(self.client()) as client:
            client.create_bucket(Bucket=name)
        return name

    def downloads(self, bucket):
        """What the server itself counts for a bucket: GET requests answered with 206, and bytes of objects sent."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._ports['metrics']}/metrics", timeout=10) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        samples = [sample for family in families for sample in family.samples if sample.labels.get("bucket") == bucket]
        requests = sum(
            sample.value
            for sample in samples
            if sample.name == "SeaweedFS_s3_request_total"
            and (sample.labels["type"], sample.labels["code"]) == ("GET", "206")
        )
        sent = sum(sample.value for sample in samples if sample.name == "SeaweedFS_s3_bucket_traffic_sent_bytes_total")
        return int(requests), int(sent)

    def environment(self):
        """The environment variables that give a process the right credentials."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def stop(self):
        """End the server that was started here, and only that."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()  # its own way of stopping takes ten seconds, and nothing in it is to be kept
        process.wait(30)
        for name, port in self._ports.items():
            Path(f"/tmp/seaweedfs-{name}-grpc-{port + ports.GRPC}.sock").unlink(missing_ok=True)

    def _start(self):
        self._ports = _free_ports()
        identities = [
            _identity("admin", ACCESS_KEY, SECRET_KEY, ["Admin", "Read", "Write", "List", "Tagging"]),
            _identity("reader", READER_KEY, READER_SECRET, ["Read", "List"]),
        ]
        config = self.folder / "s3.json"
        config.write_text(json.dumps({"identities": identities}))
        data = self.folder / f"data-{self._ports['s3']}"
        data.mkdir()
        arguments = [f"-{name}.port={self._ports[name]}" for name in _SERVICES]
        arguments += [f"-{name}.port.grpc={self._ports[name] + ports.GRPC}" for name in _SERVICES]
        arguments.append(f"-metricsPort={self._ports['metrics']}")
        with (self.folder / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    "setpriv", "--pdeathsig", "KILL",  # it ends with us even when we are killed
                    str(Path(sys.executable).with_name("weed")), "server", "-s3", "-filer", f"-dir={data}",
                    "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={config}", "-master.telemetry=false",
                    "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false", "-s3.autoCreateBucket=false", "-debug=false",
                    "-volume.max=10000", "-master.volumeSizeLimitMB=64", "-master.volumePreallocate=false", *arguments,
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder,
                # A bucket takes its first volumes together, seven unless told otherwise, and never gives them back.
                env={
                    **os.environ,
                    "HOME": str(self.folder),
                    "GOMAXPROCS": "2",
                    "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1",
                },
            )  # fmt: skip
        self._wait()

    def _wait(self):
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end:
            if self._process.poll() is not None:
                break
            if self._writable():
                return
            time.sleep(0.05)
        log = (self.folder / "weed.log").read_text(errors="replace")
        raise RuntimeError(f"weed did not start (exit {self._process.poll()}):\n{log[-2000:]}")

    def _writable(self):
        """Whether a file can be written through the filer: master, volume and filer are all up, and S3 answers."""
        try:
            probe = f"http://127.0.0.1:{self._ports['filer']}/probe"
            request = urllib.request.Request(probe, data=b"x", method="PUT", headers={"Content-Type": "text/plain"})
            with urllib.request.urlopen(request, timeout=2):
                pass
            try:
                with urllib.request.urlopen(self.endpoint, timeout=2):
                    return True
            except urllib.error.HTTPError as error:
                error.close()
                return error.code == 403  # S3 answers: no credentials were given
        except urllib.error.HTTPError as error:
            error.close()
            return False
        except OSError:
            return False


def _identity(name, access, secret, actions):
    return {"name": name, "credentials": [{"accessKey": access, "secretKey": secret}], "actions": actions}


def _free_ports():
    chosen = {}
    while len(chosen) < len(_PORTS):
        port = ports.low_port()
        if port not in chosen.values():
            chosen[_PORTS[len(chosen)]] = port
    return chosen


@functools.cache
def running():
    """The server that all tests of this process share; started by the first call."""
    folder = sweep.folder("seaweed", Path("/var/tmp"))
    try:
        server = Seaweed(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    sweep.at_end(functools.partial(_stop, server, os.getpid()))
    return server


@functools.cache
def shared_bucket():
    """A bucket of the shared server, for tests that each use a prefix of their own."""
    return running().bucket()


def _stop(server, owner):
    if os.getpid() == owner:  # not in a forked child
        server.stop()
        shutil.rmtree(server.folder, ignore_errors=True)
