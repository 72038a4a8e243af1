"""The HTTP service: every router, behind one door."""

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Depends, FastAPI

from service import admin
from service.api import (
    datasets,
    devices,
    health,
    jobs,
    lookup_tables,
    measurements,
    problems,
    pruning_nets,
    spaces,
    structures,
)  # fmt: skip
from service.api.auth import authenticate
from service.api.traffic import MAX_BODY, Traffic

ROUTERS = (
    spaces.router, datasets.router, devices.router, lookup_tables.router, measurements.router, jobs.router,
    pruning_nets.router, structures.router,
)  # fmt: skip


class Service(FastAPI):
    """FastAPI whose OpenAPI document knows the one error schema."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        if self.openapi_schema is None:
            problems.describe(super().openapi())
        assert self.openapi_schema is not None
        return self.openapi_schema


def create_app() -> FastAPI:
    """The service as an ASGI application; it starts only on a database with this version's schema."""
    app = Service(
        title="Secateurs", version=version("secateurs"), lifespan=_lifespan, docs_url=None, redoc_url=None,
        description="Finds the best channel numbers of a convolutional network for your device and your data.",
    )  # fmt: skip
    app.add_middleware(Traffic)
    problems.install(app)
    app.include_router(health.router)
    v1 = APIRouter(
        prefix="/v1", dependencies=[Depends(authenticate), Depends(problems.json_body)],
        responses=problems.responses(), max_body_size=MAX_BODY,
    )  # fmt: skip
    for router in ROUTERS:
        v1.include_router(router)
    app.include_router(v1)
    return app


@asynccontextmanager
async def _lifespan(_app: FastAPI) -> AsyncIterator[None]:
    admin.check_schema()
    datasets.ensure_built_in()
    yield


def openapi_text() -> str:
    """The OpenAPI document as it is committed."""
    return json.dumps(create_app().openapi(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(openapi_text())
