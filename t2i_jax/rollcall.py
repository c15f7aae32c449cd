"""A roll call: processes meet at one of them, and hear who is missing and who differs.

It comes before JAX's own start, which on a time-out ends a process from within C++, with a stack
trace that names nobody. Process 0 listens where its coordination service will listen afterwards, so
one open port is enough. Every other process connects and sends one line of JSON, its card

    {"process": 1, "of": 4, "host": "worker-1", "left": 290.5, "same": {"train.steps": 1000, ...}}

where `left` are the seconds that it still waits; and then reads lines until the last one:
{"hosts": {"0": "worker-0", ...}} when somebody has come or gone, and at the end {"go": true,
"hosts": ...} or {"problem": "...", "config": false}. All give up together, when the first would. It
needs no secret: what listens on that port afterwards, JAX's service, knows none either.
"""

from collections.abc import Mapping
import contextlib
import errno
import json
import math
import resource
import selectors
import socket
import time
from typing import Any

from t2i_jax.errors import ConfigError, UserError

_LONGEST = 4_000_000  # bytes of a line
_PATIENCE = 5.0  # seconds that one caller may take for its card, or to read an answer
_GRACE = 10.0  # seconds that process 0 has to tell those who wait for it that time is up
_RETRY = 0.5  # seconds between calls of a process 0 that does not listen yet
_NEWS = 0.01  # seconds between lines with all hosts, times their number: they are as long
_FILES = 200  # that process 0 may need beside a connection to each of the others
_SHOWN = 10  # differences that a message names

Hosts = dict[int, str]


class StartError(UserError):
    """Not all processes of a run have started."""


def meet(
    address: str, process: int, count: int, same: Mapping[str, Any], timeout: float, bind: str = ""
) -> Hosts:
    """Waits until all `count` processes are there; their host names, by number.

    Args:
      address: HOST:PORT at which the others find process 0.
      process: the number of this one.
      same: what must be equal everywhere; values that JSON can say.
      timeout: seconds.
      bind: HOST:PORT at which process 0 listens; default: the port, on all its addresses.

    Raises StartError that names the processes that did not come, and ConfigError that names those
    that differ and in what; on every process that is there.
    """
    deadline = time.monotonic() + timeout
    card = {"process": process, "of": count, "host": socket.gethostname(), "same": dict(same)}
    card = json.loads(json.dumps(card))  # tuples are lists there: as the others will see it
    if process == 0:
        return _Leader(card, timeout, deadline).wait(bind or f"[::]:{split(address)[1]}")
    return _follow(address, card, timeout, deadline)


def split(address: str) -> tuple[str, int]:
    """HOST:PORT -> (host, port); raises ConfigError for anything else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"the coordinator's address is HOST:PORT, not {address!r}.")
    return host.strip("[]"), int(port)


class _Leader:
    """Process 0: who has called, and what they are told."""

    def __init__(self, card: dict[str, Any], timeout: float, deadline: float):
        self._cards = {0: card}
        self._calls: dict[int, socket.socket] = {}
        self._refused: list[str] = []
        self._selector = selectors.DefaultSelector()
        self._news, self._told = False, -math.inf  # whether somebody came or went since, and when
        self._count, self._timeout, self._deadline = card["of"], timeout, deadline

    def wait(self, bind: str) -> Hosts:
        try:
            with _listen(bind) as server:
                self._listen_to(server)
                while len(self._cards) < self._count and (left := self._left()) > 0:
                    pause = self._told + _NEWS * len(self._cards) - time.monotonic()
                    wait = min(left, max(pause, 0)) if self._news else left
                    ready = [key.fileobj for key, _ in self._selector.select(wait)]
                    self._news |= bool(ready)
                    self._forget(ready)
                    if server in ready:
                        self._admit(server)
                    if self._news and pause <= 0:
                        self._tell({"hosts": self._hosts()})
                        self._news, self._told = False, time.monotonic()
            # The port is free again before anybody looks for JAX's service on it.
            error = self._problem()
            if error is None:
                self._tell({"go": True, "hosts": self._hosts()})
                return self._hosts()
            raise error
        except UserError as error:
            self._tell({"problem": str(error), "config": isinstance(error, ConfigError)})
            raise
        finally:
            self._selector.close()
            for call in self._calls.values():
                call.close()

    def _listen_to(self, server: socket.socket) -> None:
        """One open file for every process is more than a shell allows by default."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = self._count + _FILES
        if soft != resource.RLIM_INFINITY and soft < wanted:
            most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
        self._selector.register(server, selectors.EVENT_READ)

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _hosts(self) -> Hosts:
        return {number: self._cards[number]["host"] for number in sorted(self._cards)}

    def _forget(self, ready: list[socket.socket]) -> None:
        """Those who say something after their card: that they have gone."""
        gone = set(ready)
        for number in [n for n, call in self._calls.items() if call in gone]:
            call = self._calls.pop(number)
            self._selector.unregister(call)
            call.close()
            del self._cards[number]

    def _admit(self, server: socket.socket) -> None:
        try:
            call, _ = server.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise StartError(
                    f"Process 0 ({self._cards[0]['host']}) cannot hear more than "
                    f"{len(self._cards)} of {self._count} processes: {error}. Raise the number of "
                    f"files that it may open: ulimit -n {self._count + _FILES}."
                ) from error
            return  # whoever called has gone again
        call.settimeout(max(0.1, min(_PATIENCE, self._left())))
        try:
            with call.makefile("rb") as lines:
                card = json.loads(lines.readline(_LONGEST))
            number, host = int(card["process"]), str(card["host"])
            wrong = self._wrong(number, host, card["of"])
            if not isinstance(card["same"], dict):
                raise ValueError("not a card")
            if not wrong:
                self._deadline = min(self._deadline, time.monotonic() + float(card["left"]))
                self._calls[number], self._cards[number] = call, card
                self._selector.register(call, selectors.EVENT_READ)
                return
            self._refused.append(wrong)
            _send(call, {"problem": wrong, "config": True})
        except (OSError, ValueError, KeyError, TypeError):
            pass  # somebody else's connection: nobody of this run
        call.close()

    def _wrong(self, number: int, host: str, count: Any) -> str:
        """Why a caller cannot be one of this run; "" where it can."""
        here = self._cards[0]["host"]
        if count != self._count:
            return (
                f"Process {number} ({host}) is one of {count}, process 0 ({here}) one of "
                f"{self._count}: give all the same --num_processes."
            )
        if not 0 <= number < self._count:
            return f"Process {number} ({host}) of {self._count}: they are numbered from 0."
        if number in self._cards:
            return (
                f"Process {number} came twice, from {self._cards[number]['host']} and from {host}: "
                "give every process its own --process_id."
            )
        return ""

    def _tell(self, message: dict[str, Any]) -> None:
        for call in self._calls.values():
            with contextlib.suppress(OSError):  # it has gone, and is found missing next
                _send(call, message)

    def _problem(self) -> UserError | None:
        if len(self._cards) < self._count:
            text = absent(self._hosts(), self._count, self._timeout)
            return StartError("\n".join([text, *self._refused]))
        return differing(self._cards)


def _follow(address: str, card: dict[str, Any], timeout: float, deadline: float) -> Hosts:
    """Any other process: calls until process 0 answers, and hears it out."""
    hosts: Hosts = {}
    why: Any = "it was not reached"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(split(address), min(left, _PATIENCE)) as call:
                _send(call, {**card, "left": left})
                with call.makefile("rb") as lines:
                    while True:
                        call.settimeout(max(0, deadline - time.monotonic()) + _GRACE)
                        said = json.loads(lines.readline(_LONGEST) or "{}")
                        if "problem" in said:
                            raise (ConfigError if said["config"] else StartError)(said["problem"])
                        if "hosts" not in said:
                            raise ConnectionError("it hung up")
                        hosts = {int(number): host for number, host in said["hosts"].items()}
                        if said.get("go"):
                            return hosts
        except (OSError, json.JSONDecodeError) as error:
            why = error
            if not isinstance(error, TimeoutError):
                hosts = {}  # what it had said does not hold any more
            time.sleep(max(0, min(_RETRY, deadline - time.monotonic())))
    if hosts:
        raise StartError(absent(hosts, card["of"], timeout))
    raise StartError(
        f"Process 0, which all others meet at {address}, did not answer within {timeout:g} s "
        f"({why}); here is process {card['process']} of {card['of']} ({card['host']}). Look into "
        "the log of process 0; the address must be one at which it is reached from all hosts."
    )


def absent(hosts: Hosts, count: int, timeout: float) -> str:
    """The message that names the processes that are missing."""
    missing = [str(number) for number in range(count) if number not in hosts]
    here = ", ".join(f"{number} ({host})" for number, host in hosts.items())
    return (
        f"{len(missing)} of {count} processes did not start within {timeout:g} s: "
        f"{', '.join(missing)}. There are: {here}. Look into the logs of those that are missing; "
        "--start_timeout=SECONDS gives them more time."
    )


def differing(cards: Mapping[int, Mapping[str, Any]]) -> ConfigError | None:
    """The error that names the processes whose cards are not process 0's."""
    wanted, lines = cards[0]["same"], []
    for number in sorted(cards):
        was = cards[number]["same"]
        keys = [k for k in sorted({*wanted, *was}) if was.get(k) != wanted.get(k)]
        if keys:
            what = [f"{k} = {was.get(k)!r}, not {wanted.get(k)!r}" for k in keys[:_SHOWN]]
            what += ["..."] * (len(keys) > _SHOWN)
            lines.append(f"process {number} ({cards[number]['host']}): {'; '.join(what)}")
    if not lines:
        return None
    return ConfigError(
        "The processes of a run must all be started alike. Unlike process 0 "
        f"({cards[0]['host']}) are\n  " + "\n  ".join(lines)
    )


def _listen(bind: str) -> socket.socket:
    host, port = split(bind)
    try:
        if host == "::" and socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
        family = socket.AF_INET6 if ":" in host and host != "::" else socket.AF_INET
        return socket.create_server(
            ("" if host == "::" else host, port), family=family, backlog=1024
        )
    except OSError as error:
        raise StartError(
            f"Process 0 ({socket.gethostname()}) cannot listen on port {port}: {error}. Give "
            "another in --coordinator=HOST:PORT; the run before may not have ended yet."
        ) from error


def _send(call: socket.socket, message: Mapping[str, Any]) -> None:
    call.sendall(json.dumps(message).encode() + b"\n")
