"""Who asks: a user with an API key, or a device with its token. Without either, nothing under /v1 answers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import Depends, HTTPException, Path
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from service.fields import Name
from service.store import keys
from service.store.session import snapshot

Scope = Literal["read", "submit", "admin"]
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
    with snapshot() as session:
        if user := keys.find_user(session, credentials.credentials):
            return Caller(user.id, user.name, "user", keys.allowed(user.scopes))
        if device := keys.find_device(session, credentials.credentials):
            return Caller(device.id, device.name, "device", frozenset())
    raise _unauthorized("this key is unknown or revoked")


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
    return HTTPException(401, detail, {"WWW-Authenticate": 'Bearer realm="secateurs"'})
