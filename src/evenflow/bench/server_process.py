"""`evenflow serve` in a process of its own, for benchmarks that need a server on this machine."""

import re
import subprocess
import sys
import threading
from collections import deque
from typing import Any

READY = re.compile(r"ready: (\S+) on http://([\d.]+):(\d+)")
END_TIMEOUT_S = 60


class ServerProcess:
    """Starts on a free port, returns when it is ready, ends it at the end of `with`. options: fields of EngineConfig.

    Raises ValueError with the server's last words when it does not come up.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        command = [sys.executable, "-m", "evenflow", "serve", "--port", "0", "--no-access-log", *arguments(options)]
        self._process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, text=True
        )
        self._lines: deque[str] = deque(maxlen=20)
        self._reader = threading.Thread(target=self._read_on, daemon=True)
        try:
            self.model, self.url = self._wait_until_ready()
        except BaseException:
            self._end()
            raise
        self._reader.start()

    def _wait_until_ready(self) -> tuple[str, str]:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append(line.rstrip())
            if match := READY.search(line):
                return match[1], f"http://{match[2]}:{match[3]}"
        code = self._process.wait()
        raise ValueError(f"the server ended with {code}: {self._lines[-1] if self._lines else 'no message'}")

    def _read_on(self) -> None:  # a full pipe would stop the server
        assert self._process.stderr is not None
        self._lines.extend(line.rstrip() for line in self._process.stderr)

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end()

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._reader.is_alive():
            self._reader.join(END_TIMEOUT_S)
        if self._process.stderr is not None:
            self._process.stderr.close()


def arguments(options: dict[str, Any]) -> list[str]:
    """Fields of EngineConfig -> options of `evenflow serve`; the model is its first argument."""
    found = [str(options.get("model", "demo"))]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if name == "model" or value is None:
            continue
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", str(value)]
    return found
