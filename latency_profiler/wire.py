"""Requests that are retried, and answers turned into dicts or errors.

A request that may be repeated safely is sent again when the connection fails or a gateway answers for the service.
"""

import time
from collections.abc import Callable
from typing import Any, NoReturn

import httpx2

from latency_profiler.errors import InvalidInput, ServiceError, ServiceUnreachable

Json = dict[str, Any]
Sleep = Callable[[float], object]
ATTEMPTS = 4
GATEWAY = frozenset({502, 503, 504})
"""Statuses of something in front of the service, or of a service that is about to stop."""
TEMPORARY = frozenset({408, 425, 429})
"""Statuses below 500 that ask to try again later."""
LONGEST_PAUSE = 10.0


class Wire:
    """Requests with retries, and answers turned into dicts or errors.

    Raises:
        InvalidInput: `url` is no HTTP address.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout: float = 30.0,
        transport: httpx2.BaseTransport | None = None,
        sleep: Sleep = time.sleep,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise InvalidInput(f"{url!r} is no server address; it must begin with http:// or https://")
        self.url, self.sleep = url.rstrip("/"), sleep
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            self.http = httpx2.Client(base_url=self.url, headers=headers, timeout=timeout, transport=transport)
        except (httpx2.InvalidURL, UnicodeEncodeError) as error:
            raise InvalidInput(f"{url!r} or its token cannot be sent: {error}") from error

    def send(
        self, method: str, path: str, *, attempts: int = ATTEMPTS, repeatable: bool = True, **request: Any
    ) -> httpx2.Response:
        """One answered request.

        A request that is not `repeatable` is sent again only where it has certainly not arrived.

        Raises:
            ServiceUnreachable: no attempt was answered.
            ServiceError: the service refused it.
        """
        for attempt in range(1, attempts + 1):
            try:
                response = self.http.request(method, path, **request)
            except httpx2.TransportError as error:
                arrived = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
                if attempt == attempts or (arrived and not repeatable):
                    raise ServiceUnreachable(self.url, describe(error)) from error
                self.sleep(pause(attempt))
                continue
            if response.status_code in GATEWAY and repeatable and attempt < attempts:
                self.sleep(pause(attempt))
                continue
            return response if response.is_success else refuse(response)
        raise InvalidInput(f"attempts is {attempts}; it must be at least 1")

    def json(self, method: str, path: str, **request: Any) -> Json:
        """One request that is answered by a JSON object (an empty one where the answer has no body).

        Raises:
            ServiceError: also where the answer is something else, as from a wrong address.
        """
        response = self.send(method, path, **request)
        if not response.content:
            return {}
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            kind = response.headers.get("content-type", "no content type")
            raise ServiceError(
                502, {"title": "not the service", "detail": f"{self.url} answered with {kind}, not JSON"}
            )
        return answer


def pause(attempt: int) -> float:
    """Seconds before attempt n + 1: 0.25, 0.5, 1, … 10."""
    return float(min(LONGEST_PAUSE, 0.25 * 2 ** min(attempt - 1, 16)))


def describe(error: Exception) -> str:
    """An error's message, or its name where it has none."""
    return str(error) or type(error).__name__


def temporary(error: ServiceError) -> bool:
    """Whether the same request may be answered later."""
    return error.status >= 500 or error.status in TEMPORARY


def refuse(response: httpx2.Response) -> NoReturn:
    """Raise the `ServiceError` of an answer that is no success."""
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        problem = {
            "title": response.reason_phrase,
            "detail": f"HTTP {response.status_code} {response.text[:200]}".strip(),
        }
    raise ServiceError(response.status_code, problem)
