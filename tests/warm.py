"""Processes that find the imports of a run done: a server makes them once, and forks a process whenever one is asked
for.

Every process of a launched run would spend seven seconds of a core on importing torch, diffusers and their like. The
launcher, its launch file, the environment and the number of processes are those of a run that is started by hand, and
so is the repository's own code, which each process imports itself. Runs that start cold, through run.sh and other
launch lines, are tested beside them (`*_tiny`, test_stops, test_drift).

    python warm.py serve ADDRESS train.py    serves until its standard input ends
    python warm.py ask ADDRESS [-u] [-m] SCRIPT ...    as `python [-u] [-m] SCRIPT ...`, in a process of the server's
"""

import json
import os
import select
import signal
import socket
import sys

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


def read(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        if not (more := connection.recv(size - len(received))):
            raise EOFError("the server ended")
        received += more
    return received


def ask(address: str, argv: list[str]) -> int:
    """The exit status of a process of the server's, which has this one's arguments, environment, folder and files."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        request = json.dumps({"argv": argv, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
        socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(request)
        pid = int.from_bytes(read(server, 8), "big")
        for number in FORWARDED:
            signal.signal(number, lambda number, _: os.kill(pid, number))
        return int.from_bytes(read(server, 8), "big")


def serve(address: str, script: str) -> dict:
    """Comes back in forked processes only, with what was asked for."""
    import_what_it_imports(script)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                os._exit(0)
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                return keep(connection)
            connection.close()
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                pass


def import_what_it_imports(script: str) -> None:
    """Not what lies in the repository: a process may only save the time of others' packages."""
    import runpy

    import accelerate.commands.launch  # noqa: F401
    import torch.distributed.run  # noqa: F401

    path, root = list(sys.path), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    runpy.run_path(script, run_name="imports")
    sys.path[:] = path
    del sys.modules["accelerate.commands.launch"]  # or runpy warns when it is run
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), "")
        if name != "__main__" and file.startswith(root) and "site-packages" not in file:
            del sys.modules[name]


def keep(connection: socket.socket) -> dict:
    """Forks the process that is asked for, in which this comes back; ends it when the one who asked is gone."""
    size, files, _, _ = socket.recv_fds(connection, 8, 3)
    request = json.loads(read(connection, int.from_bytes(size, "big")))
    pid = os.fork()
    if pid == 0:
        connection.close()
        os.setsid()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        return request
    for file in (0, 1, 2, *files):
        os.close(file)
    connection.sendall(pid.to_bytes(8, "big"))
    process = os.pidfd_open(pid)
    ready, _, _ = select.select([process, connection], [], [])
    if process not in ready:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if process in ready:
        connection.sendall((status if status >= 0 else 128 - status).to_bytes(8, "big"))
    os._exit(0)


def run(argv: list[str], environment: dict[str, str], folder: str) -> None:
    """What `python *argv` does."""
    import runpy

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.stdin = open(0, closefd=False)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    argv = [word for place, word in enumerate(argv) if place or word != "-u"]
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path[0] = os.path.dirname(argv[0])
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    _, what, address, *arguments = sys.argv
    if what == "ask":
        sys.exit(ask(address, arguments))
    run(**serve(address, *arguments))
