"""What a bucket's server answered, or why it did not, and which of Floe's errors that is. Pure.

obstore, boto3 and plain HTTP tell it each in their own way; `Answer` is what they have in common.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from floe.store.errors import (
    AccessDeniedError,
    ConflictError,
    CredentialsExpiredError,
    FloeError,
    NotFoundError,
    StoreMissingError,
    ThrottledError,
    UnavailableError,
    UnsupportedError,
)

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
# Credentials that were good once: expired, or replaced by others and withdrawn.
EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"})
REPLACED = frozenset({"InvalidAccessKeyId", "InvalidToken", "InvalidClientTokenId", "UnrecognizedClientException"})
# No right is missing where the server does not know the caller.
STRANGER = REPLACED | {"SignatureDoesNotMatch", "AuthenticationRequired"}
# The clocks of client and server are minutes apart, as after a machine was suspended: it passes once the clock was set.
_SKEWED = frozenset({"RequestTimeTooSkewed", "RequestInTheFuture"})
_DENIED = {"AccessDenied", "SignatureDoesNotMatch", "AuthorizationHeaderMalformed", "AllAccessDisabled"}
_THROTTLED = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"}
_REASONS = (
    ("kind: Timeout", "no answer in time"),
    ("dns error", "the host's name cannot be resolved"),
    ("Connection refused", "connection refused"),
    ("UnknownIssuer", "its certificate is of an authority that is not trusted here"),
    ("invalid peer certificate", "its certificate is not valid"),
    ("kind: Connect", "cannot connect"),
    ("kind: Interrupted", "the connection broke"),
    ("kind: Request", "the request failed"),
    ("kind: Decode", "the answer broke off"),
)


@dataclass(frozen=True)
class Answer:
    """`status`: HTTP's, None without an answer; `code`: the server's word for it, may be empty; `reason`: one line."""

    status: int | None
    code: str
    reason: str

    @property
    def about_credentials(self) -> bool:
        """Whether other credentials may change it. An answer to HEAD has no body, hence no code."""
        named = self.code in EXPIRED or self.code in REPLACED
        return named or self.status == 401 or (not self.code and self.status in (400, 403))


@dataclass(frozen=True)
class Place:
    """Where requests go, for messages: the store's `url`, its `bucket`, and `server`, an endpoint or a service's name."""

    url: str
    bucket: str
    server: str


def from_text(text: str) -> Answer:
    """What an error text of obstore says: it holds the status, a reason in XML and a dump of Rust values."""
    match = _STATUS.search(text)
    return _answer(int(match[1]) if match else None, text)


def from_http(status: int, body: str) -> Answer:
    """The same of an answer to a plain HTTP request."""
    return _answer(status, body)


def _answer(status: int | None, text: str) -> Answer:
    if (code := _CODE.search(text)) is not None:
        message = _MESSAGE.search(text)
        return Answer(status, code[1], f"{code[1]}: {message[1].rstrip('.')}" if message else code[1])
    if status is not None:
        return Answer(status, "", f"HTTP status {status}")
    return Answer(None, "", next((reason for sign, reason in _REASONS if sign in text), text.partition("\n")[0][:200]))


def error_of(answer: Answer, key: str, place: Place, *, writing: bool, proven: bool = False) -> FloeError:
    """The error for an answer about `key`. `proven`: these credentials were accepted before."""
    verb = "write" if writing else "read"
    where = f"{key} in {place.url}"
    code, status = answer.code, answer.status
    if code == "NoSuchBucket":
        return StoreMissingError(
            f"no bucket {place.bucket} at {place.server}",
            hint=f"create the bucket {place.bucket} (floe store init does), or check the store's address",
        )
    if code in EXPIRED or (proven and code in REPLACED):
        return CredentialsExpiredError(
            f"the credentials for {place.url} are no longer accepted: {answer.reason}",
            hint="renew them (aws sso login, or where they come from); nothing needs a restart to use the new ones",
        )
    if status in (409, 412):
        return ConflictError(f"{where} was changed by somebody else")
    if code in _SKEWED:
        return UnavailableError(
            f"{place.server} refuses requests of this machine, whose clock differs from its own: {answer.reason}",
            hint="synchronise this machine's clock (timedatectl, chronyc makestep)",
        )
    if status in (401, 403) or code in _DENIED or code in REPLACED:
        return AccessDeniedError(
            f"{place.server} does not let us {verb} {where}: {answer.reason}",
            hint="check the access key, its secret and its rights on the bucket; floe store check names what is missing"
            # An answer to HEAD has no body to say so.
            + ("" if code else "; check this machine's clock, too"),
        )
    if status == 404:
        return NotFoundError(f"no object {where}")
    if status == 501 or code == "NotImplemented":
        return UnsupportedError(f"{place.server} cannot do what is needed for {where}: {answer.reason}")
    if status in (429, 503) or code in _THROTTLED:
        return ThrottledError(f"{place.server} asks to be used less: {answer.reason}", hint="try again later")
    return UnavailableError(
        f"cannot {verb} {where}: {answer.reason}", hint=f"check that {place.server} can be reached from here"
    )
