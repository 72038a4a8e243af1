"""Secrets of users and devices: 256 random bits, shown once, stored as a SHA-256 digest.

A secret reads `sct_<prefix>_<secret>` (a user's key) or `scd_<prefix>_<secret>` (a device's token); the prefix finds
its row. A fast hash suffices: nobody can guess 256 bits, however fast they try.
"""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from typing import Literal, NamedTuple

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from latency_profiler.errors import InvalidInput, NotFound
from service.store.models import ApiKey, Device, now

Kind = Literal["user", "device"]
TAGS: dict[Kind, str] = {"user": "sct", "device": "scd"}
IMPLIED: dict[str, frozenset[str]] = {
    "read": frozenset({"read"}),
    "submit": frozenset({"read", "submit"}),
    "admin": frozenset({"read", "submit", "admin"}),
}
"""What a key of each scope may do."""
LONGEST_NAME = 100


class Issued(NamedTuple):
    """A fresh secret, with what is stored of it."""

    text: str
    prefix: str
    digest: str


def issue_secret(kind: Kind) -> Issued:
    """A new secret."""
    prefix = secrets.token_hex(6)
    secret = f"{TAGS[kind]}_{prefix}_{secrets.token_hex(32)}"
    return Issued(secret, prefix, _digest(secret))


def matches(secret: str, digest: str) -> bool:
    """Whether a digest is this secret's, in a time that does not tell where they differ."""
    return hmac.compare_digest(_digest(secret), digest)


def create_key(session: Session, name: str, scopes: Sequence[str]) -> tuple[ApiKey, str]:
    """A new user key and its secret, which cannot be read again.

    Raises:
        InvalidInput: an unknown scope, or a name that is too long.
    """
    if len(name) > LONGEST_NAME:
        raise InvalidInput(f"a key's name may have {LONGEST_NAME} characters; this one has {len(name)}")
    if unknown := sorted(set(scopes) - set(IMPLIED)):
        raise InvalidInput(f"unknown scope {unknown[0]!r}; scopes are: {', '.join(IMPLIED)}")
    issued = issue_secret("user")
    key = ApiKey(name=name, prefix=issued.prefix, digest=issued.digest, scopes=sorted(set(scopes)))
    session.add(key)
    session.flush()
    return key, issued.text


def revoke_key(session: Session, prefix: str) -> None:
    """Make a key worthless at once; repeating it changes nothing.

    Raises:
        NotFound: no key has this prefix.
    """
    key = session.scalar(select(ApiKey).where(ApiKey.prefix == prefix))
    if key is None:
        raise NotFound("key", prefix)
    session.execute(update(ApiKey).where(ApiKey.id == key.id, ApiKey.revoked_at.is_(None)).values(revoked_at=now()))


def find_user(session: Session, secret: str) -> ApiKey | None:
    """The key that this secret opens, unless it is revoked."""
    prefix = _prefix(secret, "user")
    key = session.scalar(select(ApiKey).where(ApiKey.prefix == prefix)) if prefix else None
    if key is None or key.revoked_at is not None or not matches(secret, key.digest):
        return None
    return key


def find_device(session: Session, secret: str) -> Device | None:
    """The device whose token this is."""
    prefix = _prefix(secret, "device")
    device = session.scalar(select(Device).where(Device.token_prefix == prefix)) if prefix else None
    return device if device is not None and matches(secret, device.token_digest) else None


def allowed(scopes: Sequence[str]) -> frozenset[str]:
    """All that a key with these scopes may do."""
    return frozenset().union(*(IMPLIED.get(scope, frozenset()) for scope in scopes))


def _prefix(secret: str, kind: Kind) -> str | None:
    tag, _, rest = secret.partition("_")
    prefix = rest.partition("_")[0]
    return prefix if tag == TAGS[kind] and len(prefix) == 12 and prefix.isascii() and prefix.isalnum() else None


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
