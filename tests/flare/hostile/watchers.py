"""What looks on while the attack goes on: an address that nobody is to call, and how large processes get."""

from __future__ import annotations

import socket
import threading

import psutil

from histoflare.flare import processes

ROLES = ("server_train", "client_train", "runner_process", "worker_process")
"""Kinds of processes of a federation, as their command lines call them."""


class Listener:
    """An address that nobody is to call."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.settimeout(0.2)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.calls = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while not self._ended.is_set():
            try:
                self._socket.accept()[0].close()
            except OSError:
                continue
            self.calls += 1

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        self._socket.close()


class Memory:
    """The most that a process of each kind had resident, in bytes, since the last question."""

    def __init__(self, federation: str) -> None:
        self._federation = federation
        self._most: dict[str, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        found: list[psutil.Process] = []
        looks = 0
        while not self._ended.wait(0.2):
            if looks % 5 == 0:  # to look through all processes of the machine takes a while
                found = processes.find(self._federation)
            looks += 1
            for process in found:
                try:
                    command, size = " ".join(process.cmdline()), process.memory_info().rss
                except psutil.Error:
                    continue
                for role in ROLES:
                    if f".{role}" in command:
                        self._most[role] = max(self._most.get(role, 0), size)

    def most(self) -> dict[str, int]:
        found, self._most = self._most, {}
        return found

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
