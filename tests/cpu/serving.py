"""A server in a process of its own, as a user starts it, for tests that talk HTTP to it."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx

READY = re.compile(r"ready: (\S+) on http://([\d.]+):(\d+)")


class ServerProcess:
    """Starts `evenflow serve ARGS` on a free port and waits until it is ready. `with` ends it, and checks how."""

    def __init__(self, *args: str, exit_code: int = 0) -> None:
        self._exit_code = exit_code
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "evenflow", "serve", "--port", "0", *args],
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if match := READY.search(line):
                self.model, self.host, self.port = match[1], match[2], int(match[3])
                break
        else:
            raise AssertionError(f"the server ended with {self.process.wait()}: {self.lines}")
        self._reader = threading.Thread(target=self._read_on)
        self._reader.start()
        self.url = f"http://{self.host}:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def _read_on(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.client.close()
        if self.process.poll() is None and self._exit_code == 0:
            self.process.send_signal(signal.SIGTERM)
        code = self.wait()
        if exc_info[0] is None:
            assert code == self._exit_code, self.lines

    def wait(self) -> int:
        """Its exit code, when it has ended and all it said has been read."""
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            self._reader.join()
            assert self.process.stderr is not None
            self.process.stderr.close()

    def engine_pid(self) -> int:
        """The process of the engine: the server's child that runs it."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (pid,) = [int(pid) for pid in children if b"engine" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return pid

    def live(self) -> dict:
        return self.client.get("/live").json()

    def wait_idle(self) -> dict:
        """Asks until nothing runs. Each question takes an answer of the engine's, so this does not spin."""
        for _ in range(2000):
            live = self.live()
            if live["num_running"] == live["num_waiting"] == live["kv"]["num_used"] == 0:
                return live
        raise AssertionError(f"the engine does not come to rest: {live}")


def is_alive(pid: int) -> bool:
    """A process that is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
