"""The committed description is the service's, and says how every route may fail."""

from pathlib import Path

from service.app import create_app, openapi_text

COMMITTED = Path(__file__).parents[2] / "service" / "openapi.json"


def test_the_committed_document_is_the_generated_one() -> None:
    assert COMMITTED.read_text() == openapi_text(), "run: python -m service.app > service/openapi.json"


def test_every_error_is_a_declared_problem() -> None:
    document = create_app().openapi()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            errors = {status: answer for status, answer in operation["responses"].items() if status >= "400"}
            if path.startswith("/v1/"):
                assert {"401", "403", "422", "500", "503"} <= set(errors), (method, path)
                assert operation["security"], (method, path)
                assert ("404" in errors) or "{" not in path, (method, path)
                assert ("413" in errors and "415" in errors) or "requestBody" not in operation, (method, path)
            for answer in errors.values():
                [(media_type, content)] = answer["content"].items()
                assert media_type == "application/problem+json"
                assert content["schema"] == {"$ref": "#/components/schemas/Problem"}
    assert {"type", "title", "status", "detail"} <= set(document["components"]["schemas"]["Problem"]["required"])
    assert "HTTPValidationError" not in document["components"]["schemas"]
