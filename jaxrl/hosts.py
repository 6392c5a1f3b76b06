"""The processes of a run on several hosts: the first leads, the others follow its orders.

The first process runs the loop. What computes on the mesh all must run at the same time, so it
announces that first, and each of the others does the same with its own shards. One TCP connection
to each carries the orders there and troubles back. A process that dies, however it dies, closes its
connection, and a host that vanishes is given up after `hosts.silence_s`: that ends every other
process, with a message that says which one was lost. Collectives alone would wait for ever.

What crosses is JSON and raw arrays, never a pickle.
"""

import contextlib
import dataclasses
import json
import os
import platform
import queue
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxrl.config import RunConfig
from jaxrl.types import RunError, UserError

_RETRY_S = 0.2
_LOSS_SHOWS_S = 2.0
_CLEANUP_S = 30.0
_LET_GO_S = 5.0
_RESUME = "\nto go on from the newest checkpoint, start all processes with --resume"
_MOST_BYTES = 1 << 26  # of the JSON of one message; more is no message of ours
T = TypeVar("T")
_HEAD = struct.Struct("!I")


class HostsError(UserError):
    """The processes of the run could not come together. Says which, where, and the way out."""


@dataclasses.dataclass(frozen=True)
class Message:
    name: str
    args: list[Any]
    arrays: list[np.ndarray]


class Line:
    """One connection. Any thread may send; one thread receives."""

    def __init__(self, connection: socket.socket, silence_s: float) -> None:
        """A host that answers nothing, not even its kernel, for `silence_s` counts as gone."""
        self._connection = connection
        self._sending = threading.Lock()
        probe_s = max(1, int(silence_s / 4))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            (socket.TCP_NODELAY, 1),
            (socket.TCP_KEEPIDLE, probe_s),
            (socket.TCP_KEEPINTVL, probe_s),
            (socket.TCP_KEEPCNT, 3),
            (socket.TCP_USER_TIMEOUT, int(1000 * silence_s)),
        ):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def deadline(self, seconds: float | None) -> None:
        """Of what is received from now on; None: as long as the other end lives."""
        self._connection.settimeout(seconds)

    def send(self, name: str, args: Sequence[Any] = (), arrays: Sequence[np.ndarray] = ()) -> None:
        """Raises OSError if the other end is gone."""
        kinds = [[str(array.dtype), array.shape] for array in arrays]
        head = json.dumps([name, list(args), kinds]).encode()
        with self._sending:
            self._connection.sendall(_HEAD.pack(len(head)) + head)
            for array in arrays:
                self._connection.sendall(np.ascontiguousarray(array).data.cast("B"))

    def receive(self) -> Message:
        """The next message. Raises OSError if there will be none, or what came is none."""
        (length,) = _HEAD.unpack(self._read(_HEAD.size))
        if length > _MOST_BYTES:
            raise ConnectionError("what came is not a message")
        try:
            name, args, kinds = json.loads(self._read(length))
            arrays = [np.empty(shape, dtype) for dtype, shape in kinds]
        except (ValueError, TypeError) as error:
            raise ConnectionError(f"what came is not a message: {error}") from None
        for array in arrays:
            self._fill(array.data.cast("B"))
        return Message(name, args, arrays)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _read(self, count: int) -> bytearray:
        data = bytearray(count)
        self._fill(memoryview(data))
        return data

    def _fill(self, view: memoryview) -> None:
        while view:
            count = self._connection.recv_into(view)
            if not count:
                raise ConnectionError("the connection was closed")
            view = view[count:]


class Hosts:
    """This process among those of its run. A run of one process has no lines, and sends nothing."""

    def __init__(self, index: int = 0, lines: dict[int, Line] | None = None) -> None:
        """`lines`: of the first process, to every other one; of each other one, to the first."""
        self.index, self._lines = index, lines or {}
        self.at_loss: list[Callable[[], object]] = []  # before this process is ended from outside
        self.on_interrupt: Callable[[int], object] = lambda signal: None
        self._orders: queue.Queue[Message] = queue.Queue()
        self._hearing: list[threading.Thread] = []
        self._lost = threading.Event()
        self._over = False

    @property
    def first(self) -> bool:
        return self.index == 0

    def listen(self, names: dict[int, str]) -> None:
        """Starts to hear of the others, whom messages call by these names."""
        for index, line in self._lines.items():
            line.deadline(None)
            thread = threading.Thread(target=self._hear, args=(line, names[index]), daemon=True)
            self._hearing.append(thread)
            thread.start()

    @property
    def count(self) -> int:
        """Processes of the run; the first process asks."""
        return len(self._lines) + 1

    @property
    def alone(self) -> bool:
        return not self._lines

    def announce(self, name: str, *args: Any, arrays: Sequence[Sequence[np.ndarray]] = ()) -> None:
        """The first process: has the others do this; it does the same right after.

        Args:
          args: JSON-able.
          arrays: those of process i at i.
        """
        self._send(name, args, arrays)

    def together(self, name: str, function: Callable[..., T]) -> Callable[..., T]:
        """`function`, announced with its arguments but the first, which each process has itself."""

        def call(own: Any, *args: Any) -> T:
            self.announce(name, *args)
            return function(own, *args)

        return call

    def _send(
        self, name: str, args: Sequence[Any], arrays: Sequence[Sequence[np.ndarray]] = ()
    ) -> None:
        for index, line in self._lines.items():
            with contextlib.suppress(OSError):  # whoever hears on this line ends the process
                line.send(name, args, arrays[index] if arrays else ())

    def orders(self) -> Iterator[Message]:
        """What the first process announces, until the run has ended; the last is "end"."""
        while True:
            order = self._orders.get()
            yield order
            if order.name == "end":
                return

    def answer(self, *args: Any) -> None:
        """Tells the first process what came of the last order. JSON-able."""
        self._send("answer", [self.index, *args])

    def answers(self, deadline_s: float) -> list[list[Any]]:
        """The first process: what each other one answered, in their order.

        Raises:
          RunError: one did not within `deadline_s`.
        """
        found: dict[int, list[Any]] = {}
        end = time.monotonic() + deadline_s
        while len(found) < len(self._lines):
            try:
                index, *args = self._orders.get(timeout=max(0.0, end - time.monotonic())).args
            except queue.Empty:
                late = sorted(self._lines.keys() - found.keys())
                raise RunError(
                    f"processes {late} did not answer within {deadline_s:g} s; they may wait for a "
                    "device or a disk"
                ) from None
            found[index] = args
        return [found[index] for index in sorted(found)]

    def interrupt(self, signal: int) -> None:
        """Tells the first process that this one was asked to end."""
        self._send("interrupt", [signal])

    def end(self, code: int) -> None:
        """The run is over, and well: all processes return `code`."""
        import jax

        if self.first:
            self.announce("end", code)
        self._over = True
        if self._lines:
            jax.distributed.shutdown()  # together
        for line in self._lines.values():
            line.close()

    def fail(self, said: str) -> None:
        """Tells the others that this process ends, and why."""
        if self._lost.is_set():  # that is why, and another thread is ending this process
            time.sleep(_CLEANUP_S + _LET_GO_S)
        self._over = True
        self._send("failed", [said])
        self._let_go()

    def wait_for_loss(self) -> None:
        """Before an error of jax is believed: it may be how a lost process shows first."""
        self._lost.wait(_LOSS_SHOWS_S)

    def _hear(self, line: Line, name: str) -> None:
        while not self._over:
            try:
                message = line.receive()
            except OSError as error:
                return self._lose(f"{name} is gone ({error}){_RESUME}")
            if message.name == "failed":
                return self._lose(f"{name} ended: {message.args[0]}")
            if message.name == "interrupt":
                self.on_interrupt(message.args[0])
            else:
                self._orders.put(message)
            if message.name == "end":
                return None

    def _lose(self, said: str) -> None:
        """Ends this process, which may be inside of a collective that nothing else ends."""
        if self._over or self._lost.is_set():
            return
        self._lost.set()
        os.write(sys.stderr.fileno(), f"error: {said}\n".encode())
        self._send("failed", [said])
        cleanup = threading.Thread(target=lambda: [do() for do in self.at_loss], daemon=True)
        cleanup.start()
        cleanup.join(_CLEANUP_S)
        self._let_go()
        os._exit(1)

    def _let_go(self) -> None:
        """Lets the others end first: with the first process jax's service goes, and they abort."""
        deadline = time.monotonic() + _LET_GO_S
        for thread in self._hearing:
            if self.first and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))


@contextlib.contextmanager
def join(c: RunConfig, report: Callable[[BaseException], int]) -> Iterator[Hosts]:
    """Brings the processes of the run together, jax included, and apart again.

    Args:
      report: says what went wrong and returns the exit code. With several processes an error ends
        this process here, because jax would wait for the others on the way out.

    Raises:
      HostsError: they did not come together.
    """
    if c.hosts.coordinator is None:
        yield Hosts()
        return
    hosts = _auto(c) if c.hosts.coordinator == "auto" else _explicit(c)
    try:
        yield hosts
    except BaseException as error:
        ours = isinstance(error, RunError | KeyboardInterrupt)
        if not ours:
            hosts.wait_for_loss()
        hosts.fail(str(error).partition("\n")[0] or type(error).__name__)
        code = report(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _explicit(c: RunConfig) -> Hosts:
    """Comes together at `hosts.coordinator`, of which the next port is jax's own."""
    import jax

    index, count = c.hosts.process_id, c.hosts.processes
    assert index is not None and count is not None and c.hosts.coordinator
    host, _, port = c.hosts.coordinator.rpartition(":")
    if index == 0:
        lines, names = _gather(c, count, int(port))
    else:
        lines, names = _come(c, index, count, host, int(port))
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM
    jax.distributed.initialize(
        f"{host}:{int(port) + 1}",
        count,
        index,
        initialization_timeout=int(c.hosts.timeout_s),
        shutdown_timeout_seconds=int(c.hosts.timeout_s),
    )
    hosts = Hosts(index, lines)
    hosts.listen(names)
    return hosts


def _auto(c: RunConfig) -> Hosts:
    """Comes together as the cluster says it: a TPU pod, SLURM, Open MPI, Kubernetes."""
    import jax
    from jax.experimental.multihost_utils import broadcast_one_to_all

    jax.config.update("jax_enable_preemption_service", False)
    timeout = int(c.hosts.timeout_s)
    try:
        jax.distributed.initialize(initialization_timeout=timeout, shutdown_timeout_seconds=timeout)
    except ValueError as error:
        raise HostsError(
            f"hosts.coordinator = auto: jax finds no cluster here ({error}); give "
            "hosts.coordinator = HOST:PORT, hosts.processes and hosts.process_id"
        ) from None
    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        return Hosts()
    with socket.create_server(("", 0)) if index == 0 else contextlib.nullcontext() as server:
        address = np.zeros(64, np.uint8)
        if server is not None:
            here = f"{_own_address()}:{server.getsockname()[1]}".encode()
            address[: len(here)] = np.frombuffer(here, np.uint8)
        told = bytes(np.asarray(broadcast_one_to_all(address)).astype(np.uint8)).rstrip(b"\0")
        host, _, port = told.decode().rpartition(":")
        if server is not None:
            lines, names = _gather(c, count, int(port), server)
        else:
            lines, names = _come(c, index, count, host, int(port))
    hosts = Hosts(index, lines)
    hosts.listen(names)
    return hosts


Lines = tuple[dict[int, Line], dict[int, str]]  # and the names of who is at the other end


def _gather(c: RunConfig, count: int, port: int, server: socket.socket | None = None) -> Lines:
    """The first process: waits until every other one has come with the same configuration."""
    lines: dict[int, Line] = {}
    names: dict[int, str] = {}
    try:
        with server or _listening(port) as server:
            deadline = time.monotonic() + c.hosts.timeout_s
            while len(lines) < count - 1:
                _admit(c, count, server, deadline, lines, names)
    except HostsError as error:
        for line in lines.values():
            with contextlib.suppress(OSError):
                line.send("failed", [str(error)])
        raise
    for line in lines.values():
        line.send("welcome")
    return lines, names


def _listening(port: int) -> socket.socket:
    try:
        socket.create_server(("", port + 1)).close()  # jax's; its own message is a stack trace
        return socket.create_server(("", port))
    except OSError as error:
        raise HostsError(
            f"hosts.coordinator: ports {port} and {port + 1} cannot both be listened on here: "
            f"{error}; name another port"
        ) from None


def _admit(
    c: RunConfig,
    count: int,
    server: socket.socket,
    deadline: float,
    lines: dict[int, Line],
    names: dict[int, str],
) -> None:
    """Takes in one more process; what is not one of ours is turned away."""
    server.settimeout(max(0.01, deadline - time.monotonic()))
    try:
        connection, (address, *_) = server.accept()
    except TimeoutError:
        missing = [str(i) for i in range(1, count) if i not in lines]
        raise HostsError(
            f"hosts: {len(missing)} of {count} processes did not come to "
            f"{platform.node()}:{server.getsockname()[1]} within {c.hosts.timeout_s:g} s "
            f"(hosts.timeout_s): process {', '.join(missing)}; start the same command there, each "
            "with its own hosts.process_id, or lower hosts.processes"
        ) from None
    line = Line(connection, c.hosts.silence_s)
    line.deadline(max(0.01, min(10.0, deadline - time.monotonic())))
    try:
        hello = line.receive()
        index, processes, where, knobs = hello.args
    except (OSError, ValueError):
        return line.close()
    problem = _misfit(c, index, processes, knobs, count, names)
    if problem:
        said = f"process {index} on {where}: {problem}"
        with contextlib.suppress(OSError):
            line.send("failed", [said])
        raise HostsError(f"hosts: {said}")
    lines[index], names[index] = line, f"process {index} on {where} ({address})"


def _misfit(
    c: RunConfig,
    index: int,
    processes: int,
    knobs: dict[str, Any],
    count: int,
    names: dict[int, str],
) -> str | None:
    if processes != count:
        return f"was started with hosts.processes = {processes}, the first with {count}"
    if index in names:
        return f"hosts.process_id = {index} is that of {names[index]} already"
    ours = _knobs(c)
    differing = [key for key in ours | knobs if ours.get(key) != knobs.get(key)]
    if differing:
        lines = [f"{key} = {knobs.get(key)!r}, at the first {ours.get(key)!r}" for key in differing]
        return f"has another configuration: {'; '.join(lines)}"
    return None


def _come(c: RunConfig, index: int, count: int, host: str, port: int) -> Lines:
    """Every other process: finds the first one, and waits until all have come."""
    deadline = time.monotonic() + c.hosts.timeout_s
    first = f"process 0 at {host}:{port}"
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=10.0)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise HostsError(
                    f"hosts: {first} did not answer within {c.hosts.timeout_s:g} s "
                    f"(hosts.timeout_s): {error}; start the process with hosts.process_id = 0 "
                    "there, or put hosts.coordinator right"
                ) from None
            time.sleep(_RETRY_S)
    line = Line(connection, c.hosts.silence_s)
    patience_s = 2 * c.hosts.timeout_s  # that of the first process passes before
    line.deadline(patience_s)
    try:
        line.send("hello", [index, count, platform.node(), _knobs(c)])
        answer = line.receive()
    except TimeoutError:
        raise HostsError(
            f"hosts: {first} took the connection and said nothing for {patience_s:g} s (twice "
            "hosts.timeout_s): it hangs, or something else listens there; look at the process with "
            "hosts.process_id = 0, or name another port in hosts.coordinator"
        ) from None
    except OSError as error:
        raise HostsError(f"hosts: {first} turned this process away: {error}") from None
    if answer.name != "welcome":
        raise HostsError(f"hosts: {first} ended: {answer.args[0]}")
    return {0: line}, {0: first}


def _knobs(c: RunConfig) -> dict[str, Any]:
    """What all processes must agree on, and the jax that computes it."""
    import jax

    sections = c.model_dump(mode="json", exclude={"hosts"})
    knobs = {f"{name}.{key}": x for name, keys in sections.items() for key, x in keys.items()}
    return {**knobs, "jax": jax.__version__}


def _own_address() -> str:
    """The address that other hosts reach this one by: that of its default route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # documentation's own network: nothing is sent
            return probe.getsockname()[0]
        except OSError:
            return platform.node()
