"""What a client is told when it cannot have what it asked for, in OpenAI's shape."""

from collections.abc import Mapping
from typing import Any

from mm_gpt.errors import ContextOverflowError, ImageError, MMGPTError

BAD_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
NO_RETRY = {"x-should-retry": "false"}
"""Clients ask again after some errors; where the same request would fail in the same way, they need not."""


class RequestError(Exception):
    """An answer other than 200. `param` is the path of the field that is wrong, such as `messages[0].content`."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        type: str = BAD_REQUEST,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.param, self.code, self.status, self.type = message, param, code, status, type
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class ClientGoneError(Exception):
    """The client left before its answer was complete."""


def invalid(message: str, param: str, code: str = "invalid_value") -> RequestError:
    return RequestError(message, param=param, code=code)


def busy(message: str) -> RequestError:
    return RequestError(
        message, status=429, type="rate_limit_error", code="queue_full", headers={"Retry-After": str(RETRY_AFTER_S)}
    )


RETRY_AFTER_S = 1


def unavailable(message: str) -> RequestError:
    return RequestError(message, status=503, type="unavailable_error", code="unavailable")


def internal_error() -> RequestError:
    return RequestError("The server failed; its log says more.", status=500, type=SERVER_ERROR, code="internal_error")


def from_model(error: MMGPTError, param: str) -> RequestError:
    """What the model refuses, as the client's mistake in `param`."""
    if isinstance(error, ContextOverflowError):
        return RequestError(str(error), param=param, code="context_length_exceeded")
    return RequestError(str(error), param=param, code="invalid_image" if isinstance(error, ImageError) else None)
