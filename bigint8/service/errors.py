"""What a client is told when something is wrong: a status, and the body that OpenAI's clients read."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..errors import BigInt8Error, WorkerError, in_one_line

KINDS = {401: "authentication_error", 429: "rate_limit_error"}
"""The error's `type` by its status; others are invalid_request_error below 500, server_error from there on."""

CODES = {404: "not_found", 405: "method_not_allowed"}

RETRY_SECONDS = 2
"""When a client may try again, where the service is full or not ready."""


class ApiError(Exception):
    """A request that is answered with an error. `param`: which parameter is wrong; `code`: for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kind = KINDS.get(self.status) or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """What the status asks for beside the body."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else {}

    def response(self) -> Response:
        """The whole answer."""
        return JsonResponse(self.body(), self.status, self.headers())


class JsonResponse(Response):
    """JSON in ASCII: whatever half characters a client sent may be said back."""

    media_type = "application/json"

    def __init__(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(json.dumps(content, separators=(",", ":"), allow_nan=False), status, headers)


def of_bigint8(error: BigInt8Error) -> ApiError:
    """A request that the engine refuses is the client's error, an engine that has ended is not."""
    if isinstance(error, WorkerError):
        return ApiError(503, str(error), code="engine_failed")
    return ApiError(400, str(error))


def of_validation(errors: Sequence[Any]) -> ApiError:
    """What pydantic found wrong with a body: of the first parameter that is wrong, all that it may be."""
    if errors[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {errors[0].get('ctx', {}).get('error', 'it cannot be parsed')}")
    where = [str(part) for part in errors[0]["loc"][1:]]
    if not where:
        return ApiError(400, "the body must be a JSON object, sent as application/json")
    if errors[0]["type"] == "extra_forbidden":
        return ApiError(400, f"{'.'.join(where)}: there is no such parameter", ".".join(where), "unknown_parameter")
    said = dict.fromkeys(in_one_line(Exception(error["msg"])) for error in errors if error["loc"][1:2] == (where[0],))
    return ApiError(400, f"{where[0]}: {', or '.join(said)}", where[0], "invalid_value")


def install(app: FastAPI) -> None:
    """Answer with these bodies whatever is wrong."""

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def misshapen(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return of_validation(error.errors()).response()

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        response = ApiError(error.status_code, message, code=CODES.get(error.status_code)).response()
        response.headers.update(error.headers or {})
        return response

    async def failed(_: Request, error: Exception) -> Response:
        if isinstance(error, BigInt8Error):
            return of_bigint8(error).response()
        return ApiError(500, "something went wrong in the service; its log says what").response()

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(RequestValidationError, misshapen)
    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(BigInt8Error, failed)
    app.add_exception_handler(Exception, failed)
