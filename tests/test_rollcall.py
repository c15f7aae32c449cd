"""The roll call, between threads: who is missing, who differs, who is none of the run."""

from concurrent import futures
import contextlib
import errno
import json
import resource
import socket
import time

import pytest

from t2i_jax import rollcall
from t2i_jax.errors import ConfigError
from t2i_jax.rollcall import StartError

HOST = socket.gethostname()
LONG = 120  # seconds that nothing here takes


@pytest.fixture
def address():
    with socket.create_server(("localhost", 0)) as server:
        return f"localhost:{server.getsockname()[1]}"


def call_all(address, processes, count, timeout=LONG, same=None):
    """{process: the hosts that it heard of, or its error}."""
    same = same or {}
    with futures.ThreadPoolExecutor(len(processes)) as pool:
        waiting = {
            p: pool.submit(rollcall.meet, address, p, count, same.get(p, {}), timeout)
            for p in processes
        }
        return {p: w.exception() or w.result() for p, w in waiting.items()}


def test_all_come_and_know_of_each_other(address):
    """Whoever comes first; values are compared as JSON has them, tuples as lists."""
    same = {p: {"steps": 10, "prompts": ("a", "b")} for p in range(4)}
    assert call_all(address, (3, 1, 2, 0), 4, same=same) == {
        p: dict.fromkeys(range(4), HOST) for p in range(4)
    }
    # The port is free again, for the service that comes after.
    rollcall._listen(address).close()


def test_those_who_are_missing_are_named_by_all_who_are_there(address):
    began = time.monotonic()
    errors = call_all(address, (0, 2), 4, timeout=3)
    assert time.monotonic() - began < 3 + rollcall._GRACE
    assert len({str(e) for e in errors.values()}) == 1
    for error in errors.values():
        assert isinstance(error, StartError)
        assert "2 of 4 processes did not start within 3 s: 1, 3." in str(error)
        assert f"There are: 0 ({HOST}), 2 ({HOST})." in str(error)


def test_all_give_up_when_the_first_would(address):
    began = time.monotonic()
    with futures.ThreadPoolExecutor() as pool:
        patient = pool.submit(rollcall.meet, address, 0, 3, {}, LONG)
        hasty = pool.submit(rollcall.meet, address, 2, 3, {}, 2)
        assert str(patient.exception()) == str(hasty.exception())
    assert time.monotonic() - began < LONG / 2


def test_process_0_is_missing(address):
    error = call_all(address, (1,), 2, timeout=1)[1]
    assert isinstance(error, StartError)
    assert f"Process 0, which all others meet at {address}, did not answer within 1 s" in str(error)


@pytest.mark.parametrize("there", [(0, 1, 2), (2, 0, 1)])
def test_those_who_differ_are_named_with_what(address, there):
    same = {0: {"steps": 10, "a": 1}, 1: {"steps": 10, "a": 1}, 2: {"steps": 11, "b": 2}}
    for error in call_all(address, there, 3, same=same).values():
        assert isinstance(error, ConfigError)
        assert f"process 2 ({HOST}): a = None, not 1; b = 2, not None; steps = 11, not 10" in str(
            error
        )
        assert "process 1" not in str(error)


def test_a_caller_of_another_run_is_sent_away(address):
    """Told why at once; the run itself starts, or names it when it does not."""
    with futures.ThreadPoolExecutor() as pool:
        leader = pool.submit(rollcall.meet, address, 0, 2, {}, LONG)
        other = pool.submit(rollcall.meet, address, 2, 3, {}, LONG)
        assert isinstance(other.exception(), ConfigError)
        assert f"Process 2 ({HOST}) is one of 3, process 0 ({HOST}) one of 2" in str(
            other.exception()
        )
        twice = pool.submit(rollcall.meet, address, 0, 2, {}, LONG).exception()
        assert "cannot listen on port" in str(twice)
        assert rollcall.meet(address, 1, 2, {}, LONG) == {0: HOST, 1: HOST} == leader.result()


def test_a_process_that_comes_twice(address):
    with futures.ThreadPoolExecutor() as pool:
        leader = pool.submit(rollcall.meet, address, 0, 3, {}, 3)
        pair = [pool.submit(rollcall.meet, address, 1, 3, {}, LONG) for _ in range(2)]
        errors = sorted((type(p.exception()).__name__, str(p.exception())) for p in pair)
        assert [name for name, _ in errors] == ["ConfigError", "StartError"]
        assert f"Process 1 came twice, from {HOST} and from {HOST}" in errors[0][1]
        assert "1 of 3 processes did not start within 3 s: 2." in errors[1][1]
        assert errors[0][1] in str(leader.exception())


def called(address, line):
    """A connection that has sent `line`, when there is somebody to send it to."""
    deadline = time.monotonic() + LONG
    while True:
        try:
            call = socket.create_connection(rollcall.split(address))
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    call.sendall(line)
    return call


def test_who_leaves_again_is_missing_and_strangers_are_nobody(address):
    card = {"process": 1, "of": 3, "host": "worker-1", "left": LONG, "same": {}}
    with futures.ThreadPoolExecutor() as pool:
        leader = pool.submit(rollcall.meet, address, 0, 3, {}, 6)
        for line in (b"GET / HTTP/1.1\r\n", b"[1]\n", b'{"process": "x"}\n', b""):
            called(address, line).close()
        with called(address, json.dumps(card).encode() + b"\n") as call:
            heard = json.loads(call.makefile("rb").readline())
            assert heard == {"hosts": {"0": HOST, "1": "worker-1"}}
        assert f"within 6 s: 1, 2. There are: 0 ({HOST})." in str(leader.exception())


@pytest.mark.parametrize("address", ["localhost", ":80", "localhost:port", "localhost:70000"])
def test_no_address(address):
    with pytest.raises(ConfigError, match=r"HOST:PORT, not"):
        rollcall.split(address)


def test_more_processes_than_a_shell_has_files_for(address):
    """1,100 machines call; numbers of open files go beyond what select() can watch."""
    count = 1101
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] != resource.RLIM_INFINITY and limits[1] < 2 * count + 400:
        pytest.skip("this machine allows too few open files for both ends of so many connections")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * count + 400, limits[1]))
    try:
        with futures.ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
            leader = pool.submit(rollcall.meet, address, 0, count, {}, LONG)
            host, port = rollcall.split(address)
            calls = []
            while len(calls) < count - 1:
                try:
                    call = stack.enter_context(socket.create_connection((host, port), LONG))
                except ConnectionRefusedError:
                    time.sleep(0.05)  # it does not listen yet
                    continue
                number = len(calls) + 1
                card = {"process": number, "of": count, "host": f"w{number}", "left": LONG}
                rollcall._send(call, {**card, "same": {}})
                calls.append(call)
            heard = [json.loads(list(c.makefile("rb"))[-1]) for c in calls[:3] + calls[-3:]]
            hosts = leader.result()
        assert len(hosts) == count and hosts[1100] == "w1100"
        assert all(said["go"] and len(said["hosts"]) == count for said in heard)
        assert calls[-1].fileno() == -1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_too_few_open_files_are_told_to_all(address, monkeypatch):
    """An error of accept() is no traceback, and those who have called hear of it."""

    def none_left(self):
        raise OSError(errno.EMFILE, "Too many open files")

    accept, calls = socket.socket.accept, []

    def second_fails(self):
        calls.append(self)
        return accept(self) if len(calls) < 2 else none_left(self)

    monkeypatch.setattr(socket.socket, "accept", second_fails)
    errors = call_all(address, (0, 1, 2), 3, timeout=4)
    assert all(isinstance(error, StartError) for error in errors.values())
    assert "cannot hear more than 2 of 3 processes" in str(errors[0])
    assert "ulimit -n 203" in str(errors[0])
    assert sum("ulimit" in str(errors[p]) for p in (1, 2)) == 1
