"""Errors as OpenAI's clients read them. What a body says is written by us: never a traceback, a path or an address."""

import msgspec
from starlette.responses import Response

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """What a client is told. `param`: the field at fault. `code`: OpenAI's machine-readable word, where it has one."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")


class ClientDisconnected(Exception):
    """The client left before its answer was complete. Nobody is left to be told."""


def error_body(error: ApiError) -> bytes:
    fields = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return msgspec.json.encode({"error": fields})


def error_response(error: ApiError) -> Response:
    return Response(error_body(error), status_code=error.status, headers=error.headers, media_type="application/json")


def internal_error(request_id: str) -> ApiError:
    """For what we did not foresee: the log has the rest, under this id."""
    return ApiError(500, f"the server failed to answer this request; its log has the cause under {request_id}")
