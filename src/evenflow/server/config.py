"""What `evenflow serve` is asked for beside the engine's options. Every field is a command-line option."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from evenflow.config import option


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """Raises ValueError that names the option."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 is everybody's")
    port: int = option(8000, "port to listen on; 0 takes a free one")
    served_model_name: str | None = option(None, "what clients call the model (default: its directory or hub name)")
    api_key: str | None = option(
        None, "clients must send this key; better in a file, since others see the command line"
    )
    api_key_file: str | None = option(
        None, "file with one key per line; one of them is needed on every path but /health and /ready"
    )
    allowed_hosts: str | None = option(None, "further Host names that a server on a loopback address answers to, a,b,c")
    max_queue: int = option(2048, "most requests that wait; beyond, clients get 429 and Retry-After")
    max_body_mb: int = option(32, "largest request body in MB")
    receive_timeout: float = option(60.0, "seconds in which a request must have arrived")
    engine_timeout: float = option(60.0, "seconds after which an engine that says nothing counts as hung")
    drain_timeout: float = option(30.0, "seconds that running requests get after SIGTERM")
    tool_format: str = option("auto", "how the model writes tool calls", ("auto", "hermes", "llama3_json", "mistral"))
    log_format: str = option("text", "access log and messages", ("text", "json"))
    access_log: bool = option(True, "one line per request on standard error")
    otlp_endpoint: str | None = option(None, "OpenTelemetry collector, for example http://127.0.0.1:4318")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            choices, value = field.metadata["choices"], getattr(self, field.name)
            if choices and value not in choices:
                raise ValueError(f"{field.name}={value!r} must be one of {', '.join(choices)}")
        self._check_range("port", 0, 65535)
        self._check_range("max_queue", 0, 2**20)
        self._check_range("max_body_mb", 1, 1024)
        for name in ("receive_timeout", "engine_timeout"):
            self._check_range(name, 0.05, 86400)
        self._check_range("drain_timeout", 0, 86400)
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("api_key is empty; give a key, or leave the option out")

    def _check_range(self, name: str, low: float, high: float) -> None:
        value: Any = getattr(self, name)
        if not low <= value <= high:
            raise ValueError(f"{name}={value!r} must be from {low} to {high}")

    @property
    def is_loopback(self) -> bool:
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    def api_keys(self) -> list[str]:
        """All keys that open the server; none: it is open."""
        keys = [] if self.api_key is None else [self.api_key]
        if self.api_key_file is not None:
            try:
                with open(self.api_key_file, encoding="utf-8") as lines:
                    found = [line.strip() for line in lines if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                reason = (error.strerror if isinstance(error, OSError) else None) or "not UTF-8"
                raise ValueError(
                    f"api_key_file={self.api_key_file!r} cannot be read ({reason}); name a text file, one key per line"
                ) from None
            if not found:
                raise ValueError(f"api_key_file={self.api_key_file!r} holds no key; write one per line")
            keys += found
        return keys
