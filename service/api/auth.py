"""Who asks: a user with an API key, or a device with its token. Without either, nothing under /v1 answers."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Literal

from fastapi import Depends, HTTPException, Path
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from service.fields import Name
from service.store import keys
from service.store.session import DATABASE_AWAY, snapshot

Scope = Literal["read", "submit", "admin"]
AUTHENTICATE = {"WWW-Authenticate": 'Bearer realm="secateurs"'}
bearer = HTTPBearer(auto_error=False, description="an API key `sct_…`, or a device's token `scd_…`")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request; a device has no scopes, and no user is a device."""

    id: str
    name: str
    kind: keys.Kind
    scopes: frozenset[str]


def authenticate(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> Caller:
    """The caller, or 401."""
    if credentials is None:
        raise _unauthorized("send your API key in the header `Authorization: Bearer …`")
    if caller := _caller(credentials.credentials):
        return caller
    raise _unauthorized("this key is unknown or revoked")


class Trust(IntEnum):
    """Whose bodies are read: a stranger's small ones, those of who may only read, and large ones of all others."""

    STRANGER = 0
    READER = 1
    WRITER = 2


def trust(header: str) -> Trust:
    """Of an `Authorization` header; the most where the database is away: whoever needs it says so."""
    try:
        caller = _caller(header.partition(" ")[2].strip())
    except DATABASE_AWAY:
        return Trust.WRITER
    if caller is None:
        return Trust.STRANGER
    return Trust.WRITER if caller.kind == "device" or "submit" in caller.scopes else Trust.READER


def _caller(secret: str) -> Caller | None:
    with snapshot() as session:
        if user := keys.find_user(session, secret):
            return Caller(user.id, user.name, "user", keys.allowed(user.scopes))
        if device := keys.find_device(session, secret):
            return Caller(device.id, device.name, "device", frozenset())
    return None


Authenticated = Annotated[Caller, Depends(authenticate)]


def require(scope: Scope) -> Callable[[Caller], Caller]:
    """A dependency that lets only users whose key has a scope pass."""

    def check(caller: Authenticated) -> Caller:
        if scope not in caller.scopes:
            raise HTTPException(403, f"this needs an API key with scope {scope!r}")
        return caller

    return check


def current_device(device: Annotated[Name, Path()], caller: Authenticated) -> Caller:
    """The agent of the device in the path, and nobody else."""
    if caller.kind != "device" or caller.name != device:
        raise HTTPException(403, f"this is for the agent of {device!r} only, with its device token")
    return caller


Reader = Annotated[Caller, Depends(require("read"))]
Submitter = Annotated[Caller, Depends(require("submit"))]
Admin = Annotated[Caller, Depends(require("admin"))]
Agent = Annotated[Caller, Depends(current_device)]


def _unauthorized(detail: str) -> HTTPException:
    return HTTPException(401, detail, AUTHENTICATE)
