"""Long lists page by page: a cursor says after which row the next page begins."""

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Query
from pydantic import BaseModel

from latency_profiler.errors import InvalidInput

T = TypeVar("T")
Row = TypeVar("Row")
Limit = Annotated[int, Query(ge=1, le=200, description="items per page")]
Cursor = Annotated[str | None, Query(max_length=500, description="`next` of the page before")]


class Page(BaseModel, Generic[T]):
    """One page; `next` is the cursor of the following one, null on the last."""

    items: list[T]
    next: str | None = None


def encode_cursor(position: Sequence[Any]) -> str:
    """A position in a list as an opaque word."""
    return base64.urlsafe_b64encode(json.dumps(list(position)).encode()).decode().rstrip("=")


def decode_cursor(cursor: str | None, *kinds: type | str) -> tuple[Any, ...] | None:
    """Inverse of `encode_cursor`; None for no cursor.

    Args:
        cursor: what `encode_cursor` gave, or anything that a client sent.
        kinds: the types that the position must have, `float`, `int` or `str`, or a word that must stand there.

    Raises:
        InvalidInput: not a cursor of this list.
    """
    if cursor is None:
        return None
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        position = json.loads(base64.b64decode(padded, b"-_", validate=True), parse_constant=_refuse)
    except (UnicodeError, binascii.Error, ValueError, RecursionError) as error:
        raise _invalid() from error
    if not isinstance(position, list) or len(position) != len(kinds):
        raise _invalid()
    if not all(_is(value, kind) for value, kind in zip(position, kinds, strict=True)):
        raise _invalid()
    return tuple(position)


def page(
    rows: Sequence[Row], limit: int, show: Callable[[Row], T], position: Callable[[Row], Sequence[Any]]
) -> Page[T]:
    """A page of rows, of which one more than `limit` was read to know whether another page follows."""
    shown = rows[:limit]
    more = len(rows) > limit
    return Page(items=[show(row) for row in shown], next=encode_cursor(position(shown[-1])) if more else None)


def _is(value: Any, kind: type | str) -> bool:
    if isinstance(kind, str):
        return bool(value == kind)
    if kind is str:
        return isinstance(value, str) and len(value) <= 100 and value.isascii() and value.isprintable()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) >= 2**63:
        return False
    return kind is float or isinstance(value, int)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _invalid() -> InvalidInput:
    return InvalidInput("this cursor is not from this list; take `next` of a page as it is, or leave it out")
