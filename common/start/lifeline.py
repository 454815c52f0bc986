"""What all processes of a run learn when one of them ends: failed, killed or cut off.

Process 0 holds a connection to each of the others. The kernel closes it when a process dies, however it dies, and
keepalives notice within two minutes that a machine is gone. Collectives do not: who waits in one, or works outside of
any, would wait for hours. Over it a process says one line at most: what went wrong, or that it is done. Who goes wrong
before it is there, over a flag perhaps, connects first: the others are on their way, and would wait.
"""

import atexit
import contextlib
import datetime
import json
import multiprocessing
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch

MISTAKE, DISK_FULL, STOPPED = 2, 74, 75  # exit codes; 74 and 75 are EX_IOERR and EX_TEMPFAIL of sysexits.h
DONE = "done\n"
GO_ON = "; --resume_from_checkpoint latest goes on from the last checkpoint"
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}  # lost after 90 seconds without an answer


class Lifeline:
    """This process's end of the connections: of process 0 to all others, of the others to process 0."""

    def __init__(self, rank: int, peers: dict[int, socket.socket]):
        self.rank, self.peers = rank, peers
        self.said, self.details = "", ""  # what went wrong in this process, and its traceback
        self.ending = threading.Lock()
        for peer, connection in peers.items():
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEPALIVE.items():
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
            threading.Thread(target=self._listen, args=(peer, connection), daemon=True).start()

    def say(self, line: str) -> None:
        for connection in self.peers.values():
            with contextlib.suppress(OSError):
                connection.sendall(line.encode())

    def _listen(self, peer: int, connection: socket.socket) -> None:
        address = connection.getpeername()[0].removeprefix("::ffff:")
        line = ""
        with contextlib.suppress(OSError), connection.makefile() as file:
            line = file.readline()
        if line == DONE:
            return
        if not line:
            where = "" if address.startswith("127.") else f" at {address}"
            lost = f"process {peer}{where} was killed, for want of main memory perhaps, or is cut off"
            self.end([1, lost], speaks=self.rank < 2 or os.environ.get("LOCAL_RANK") == "0")
        elif self.rank:
            self.end(json.loads(line))
        else:
            time.sleep(1)  # a kill, of which the errors of others are a consequence, is heard in that time
            code, sentence = json.loads(line)
            self.end([code, sentence if line == self.said else f"{sentence} (process {peer})"])

    def end(self, cause: list, speaks: bool = False) -> NoReturn:
        """End this process, and as process 0 all of them. cause: exit code, sentence. Who comes second waits here for
        the end."""
        self.ending.acquire()
        if self.rank == 0:
            self.say(json.dumps(cause) + "\n")
        for child in multiprocessing.active_children():
            child.kill()
        code, sentence = cause
        if self.said and json.loads(self.said)[1] == sentence.removesuffix(f" (process {self.rank})"):
            sys.stderr.write(self.details)
        sentence += GO_ON if code == 1 else ""
        is_told = tell_run_sh(code, sentence)
        if not is_told and (self.rank == 0 or speaks):
            print(f"error: {sentence}", file=sys.stderr)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(0 if is_told else code)  # a launcher would add its traceback; run.sh knows


line: Lifeline | None = None  # one for a process


def join() -> None:
    """Start the group of the processes that a launcher has started, and connect them."""
    global line
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # hours, not 30 minutes: rank 0 may download a model or check a large data set while the others wait
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, timeout=datetime.timedelta(hours=12))
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if world_size == 1:
        return
    is_one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) == world_size
    listener = None
    if rank == 0:
        family = socket.AF_INET if is_one_machine or not socket.has_dualstack_ipv6() else socket.AF_INET6
        place = ("127.0.0.1" if is_one_machine else "", 0)
        listener = socket.create_server(
            place, family=family, backlog=world_size, dualstack_ipv6=family == socket.AF_INET6
        )
    shared = [listener.getsockname()[1], secrets.token_hex(16)] if listener else [None, None]
    torch.distributed.broadcast_object_list(shared, src=0)
    port, token = shared
    if listener:
        peers = _accept(listener, token, world_size - 1)
    else:
        address = "127.0.0.1" if is_one_machine else os.environ["MASTER_ADDR"]
        peers = {0: socket.create_connection((address, port), timeout=60)}
        peers[0].settimeout(None)
        peers[0].sendall(f"{token}{rank:8}".encode())
    line = Lifeline(rank, peers)
    os.register_at_fork(after_in_child=_forget)
    atexit.register(leave)
    sys.excepthook = _fail_with


def _accept(listener: socket.socket, token: str, count: int) -> dict[int, socket.socket]:
    peers: dict[int, socket.socket] = {}
    listener.settimeout(60)
    with listener:
        while len(peers) < count:
            connection, _ = listener.accept()
            connection.settimeout(10)
            hello = ""
            with contextlib.suppress(OSError, UnicodeDecodeError):
                hello = connection.recv(40, socket.MSG_WAITALL).decode()
            if not secrets.compare_digest(hello[:32].encode(), token.encode()):
                connection.close()
                continue
            connection.settimeout(None)
            peers[int(hello[32:])] = connection
    return peers


def leave() -> None:
    """This process is done, and may end."""
    global line
    if line:
        line.say(DONE)
    line = None


def fail(code: int, sentence: str, details: str = "") -> NoReturn:
    """End all processes with this exit code and the sentence, unless another process has named an earlier cause. Where
    run.sh is told, this one ends with 0: a launcher would add its traceback."""
    is_one_of_many = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if is_one_of_many and not torch.distributed.is_initialized():
        join()
    if line is None:
        is_told = tell_run_sh(code, sentence)
        if not is_told:
            print(f"error: {sentence}", file=sys.stderr, flush=True)
        sys.exit(0 if is_told else code)
    line.details, line.said = details, json.dumps([code, sentence]) + "\n"
    if line.rank == 0:
        time.sleep(1)
    else:
        line.say(line.said)
        time.sleep(10)  # process 0 ends this one
    line.end([code, sentence], speaks=True)


def _fail_with(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    first = next(iter(str(error).splitlines()), "")[:300]
    details = "".join(traceback.format_exception(kind, error, trace))
    fail(1, f"{kind.__name__}: {first}", details)


def _forget() -> None:
    """In a forked process: a worker of a loader must not keep the connections of a dead process open."""
    global line
    for connection in line.peers.values() if line else ():
        os.close(connection.detach())
    line = None


def tell_run_sh(code: int, sentence: str = "", rank: int | None = None) -> bool:
    """run.sh ends with this code, whatever a launcher makes of it, after the sentence. rank: who alone may say it.
    Whether there is a run.sh that was told."""
    file = os.environ.get("RUN_EXIT_CODE_FILE")
    if not file or (rank is not None and os.environ.get("RANK", "0") != str(rank)):
        return False
    partial = Path(f"{file}.{os.getpid()}")
    try:
        partial.write_text(f"{code}\n" + (f"error: {sentence}\n" if sentence else ""))
        os.replace(partial, file)
    except OSError:
        return False
    return True
