"""Starts scripts in a fraction of a second: each is forked from one process that has imported the third-party packages.

A script started here is a process of its own, with its own id, group, signals, locks and exit status, that imports our
modules itself; only the seconds of `import torch` are saved. The server never computes: a fork would lack the threads.
What it cannot imitate, a cold start does (`cold=True` in conftest.py): environment variables that libraries read when
they are imported. The number of threads, OMP_NUM_THREADS, is set by torch instead. The Python that such a script starts
itself, for a second process say, is `imitate_python`, unless COLD_CHILDREN is set: it asks the server, too.

Run by conftest.py:  python forkserver.py DESCRIPTOR   (of a listening Unix socket; closing standard input ends it)
"""

import atexit
import gc
import importlib
import os
import pickle
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

PACKAGES = """
albumentations cv2 filelock jinja2 matplotlib.pyplot numpy pandas PIL.Image pretrainedmodels pytorch_lightning scipy.ndimage
simplejpeg sklearn.calibration sklearn.metrics sklearn.model_selection torch torch.distributed.elastic.multiprocessing.api
torch.distributed.launcher.api torch.utils.tensorboard torchvision tqdm yaml cleanlab.filter imagehash
""".split()


def ask(address, arguments, cwd, environment, descriptors):
    """Ask the server for a process; returns its id, and the connection that will say how it ended: closed, it is killed."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    request = {"arguments": arguments, "cwd": str(cwd), "environment": environment}
    socket.send_fds(connection, [pickle.dumps(request)], descriptors)
    return int.from_bytes(connection.recv(4), "little"), connection


def imitate_python(words):
    """Be `python WORDS`, as seen by the process that has started this one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    words = words[words[0] == "-u" :]
    _, connection = ask(os.environ["FORK_SERVER"], words, os.getcwd(), dict(os.environ), [0, 1, 2])
    status = int.from_bytes(connection.recv(4), "little", signed=True)
    if status < 0:
        os.kill(os.getpid(), -status)
    raise SystemExit(status)


def serve(listener):
    """Fork for each request until standard input is closed; returns, in the forked process, what it shall become."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the keepers
    while True:
        if sys.stdin.buffer in select.select([listener, sys.stdin.buffer], [], [])[0]:
            raise SystemExit
        connection, _ = listener.accept()
        content, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return keep(connection, pickle.loads(content), descriptors)
        connection.close()
        for descriptor in descriptors:
            os.close(descriptor)


def keep(connection, request, descriptors):
    """Fork once more and tell the client the new process's id and how it ended; returns the request in that process."""
    parent, child = os.pipe()
    pid = os.fork()
    if pid == 0:
        connection.close()
        os.close(child)
        os.read(parent, 1)  # its first step comes after the client knows its id
        os.close(parent)
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target)
            os.close(descriptor)
        return request
    for descriptor in descriptors:
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection.sendall(pid.to_bytes(4, "little"))
    os.write(child, b".")
    ended = os.pidfd_open(pid)
    if ended not in select.select([ended, connection], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with suppress(BrokenPipeError):
        connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "little", signed=True))
    os._exit(0)


def become(arguments, cwd, environment):
    """Turn this process into `python ARGUMENTS`: a script, `-m MODULE` or `-c CODE`, and what follows."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    if "COLD_CHILDREN" not in environment:
        sys.executable = str(Path(environment["FORK_SERVER"]).with_name("python"))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=environment.get("PYTHONIOENCODING"))
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    kind = arguments[0]
    here = os.path.dirname(os.path.realpath(kind)) if kind not in ("-m", "-c") else cwd if kind == "-m" else ""
    sys.path[:1] = [here, *paths]
    if kind == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")


def leave(code):
    """End as Python does, but without taking apart all that was imported, which takes 0.4 seconds."""
    threading._shutdown()
    atexit._run_exitfuncs()
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name in PACKAGES:
        importlib.import_module(name)
    import torch

    gc.freeze()  # or the first collection of a fork would copy every page
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    try:
        become(**request)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if not torch.distributed.is_initialized():  # its threads may disturb the end of a Python: that is left to be seen
        leave(code)
    raise SystemExit(code)
