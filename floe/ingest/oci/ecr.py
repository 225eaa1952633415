"""Amazon ECR: a password for its Basic authentication, from AWS credentials. For registries without a credential helper.

Source: Amazon ECR API, GetAuthorizationToken: base64 of `AWS:<password>`, valid for 12 hours, for every registry that the
caller may use. boto3 supplies the AWS credentials by its whole chain.
"""

from __future__ import annotations

import base64
import binascii
import re
import time

from floe.ingest.oci.credentials import Credentials
from floe.store.errors import AccessDeniedError, FloeError, UnavailableError

_HOST = re.compile(
    r"[0-9]{12}\.dkr[.-]ecr(-fips)?\.([a-z0-9-]+)\."
    r"(?:amazonaws\.(?:com|com\.cn|eu)|on\.(?:aws|amazonwebservices\.com\.cn))(?::443)?"
)
_MARGIN = 3600.0  # seconds before its end at which a password is replaced; a quarter of its time if that is less
_DENIED = ("AccessDenied", "UnrecognizedClient", "InvalidSignature", "ExpiredToken", "InvalidClientTokenId")


def region_of(host: str) -> str | None:
    """The AWS region of a private ECR registry's host name; None for any other host."""
    found = _HOST.fullmatch(host)
    return found.group(2) if found else None


def credentials(host: str) -> Credentials | None:
    """A password for `host`; None when it is no ECR registry, or no AWS credentials are found.

    AccessDeniedError: AWS refuses. UnavailableError: it cannot be reached.
    """
    found = _HOST.fullmatch(host)
    if found is None:
        return None
    # Imported here: boto3 takes longer to load than most commands take.
    import boto3  # noqa: PLC0415
    import botocore.config  # noqa: PLC0415
    import botocore.exceptions as failures  # noqa: PLC0415

    region = found.group(2)
    config = botocore.config.Config(
        connect_timeout=5, read_timeout=30, retries={"max_attempts": 3}, use_fips_endpoint=bool(found.group(1))
    )
    try:
        client = boto3.session.Session().client("ecr", region_name=region, config=config)
        answer = client.get_authorization_token()
    except failures.NoCredentialsError:
        return None
    except (failures.BotoCoreError, failures.ClientError) as error:
        raise _error(error, host, region) from error
    try:
        data = answer["authorizationData"][0]
        username, _, password = base64.b64decode(data["authorizationToken"], validate=True).decode().partition(":")
        expires = data["expiresAt"].timestamp()
    except (KeyError, IndexError, AttributeError, binascii.Error, UnicodeDecodeError):
        raise AccessDeniedError(f"Amazon ECR of region {region} answered without a password for {host}") from None
    now = time.time()
    renew_at = expires - min(_MARGIN, max(0.0, expires - now) / 4)
    return Credentials(username, password, origin="the AWS credentials in use", renew_at=renew_at)


def _error(error: Exception, host: str, region: str) -> FloeError:
    what = f"cannot get a password for {host} from Amazon ECR of region {region}"
    code = str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))
    name = type(error).__name__
    if code.startswith(_DENIED) or "Credential" in name or "Token" in name or "Profile" in name:
        return AccessDeniedError(
            f"{what}: {error}", hint="check the AWS credentials; they need ecr:GetAuthorizationToken"
        )
    return UnavailableError(f"{what}: {error}", hint="check the network, or configure a credential helper")
