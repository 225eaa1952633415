"""Which checksum a part carries: a CRC-32 alone only where the server has answered that it checks one."""

import base64
import hashlib
import zlib

import pytest

from floe.store.errors import UnavailableError
from floe.store.objects import s3_uploads
from floe.store.objects.multipart import Body

DATA = b"part" * 1000
MD5 = base64.b64encode(hashlib.md5(DATA, usedforsecurity=False).digest()).decode()
CRC32 = base64.b64encode(zlib.crc32(DATA).to_bytes(4, "big")).decode()


class Uploads(s3_uploads.S3Uploads):
    """Against a server that `answers` what the class says."""

    def __init__(self, answers):
        self._sha256, self._crc32 = False, None
        self.answers, self.sent = answers, []

    def _full(self, key):
        return key

    def _call(self, _what, _operation, **arguments):
        self.sent.append({name: arguments[name] for name in ("ContentMD5", "ChecksumCRC32") if name in arguments})
        return {"ETag": '"etag"', **self.answers(arguments)}

    def put_two(self):
        for number in (1, 2):
            assert self.put("key", "upload", number, Body(DATA)).etag == "etag"
        return self.sent


def test_a_server_that_checks_a_crc32_is_sent_no_md5_after_the_first_part():
    uploads = Uploads(lambda sent: {"ChecksumCRC32": sent["ChecksumCRC32"]})
    assert uploads.put_two() == [{"ContentMD5": MD5, "ChecksumCRC32": CRC32}, {"ChecksumCRC32": CRC32}]


def test_a_server_that_does_not_say_so_is_sent_md5s():
    assert Uploads(lambda _: {}).put_two() == [{"ContentMD5": MD5, "ChecksumCRC32": CRC32}, {"ContentMD5": MD5}]


def test_a_server_that_refuses_it_is_sent_md5s():
    def answer(sent):
        if "ChecksumCRC32" in sent:
            raise UnavailableError("NotImplemented")
        return {}

    assert Uploads(answer).put_two()[1:] == [{"ContentMD5": MD5}] * 2


def test_a_server_that_stops_saying_so_gets_the_part_again_with_an_md5():
    answers = iter([{"ChecksumCRC32": CRC32}, {}, {}])
    uploads = Uploads(lambda _: next(answers))
    assert uploads.put_two()[1:] == [{"ChecksumCRC32": CRC32}, {"ContentMD5": MD5}]


def test_a_refusal_of_the_part_itself_is_raised():
    def answer(_sent):
        raise UnavailableError("BadDigest")

    with pytest.raises(UnavailableError):
        Uploads(answer).put("key", "upload", 1, Body(DATA))
