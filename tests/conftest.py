"""What several tests share: rendered data sets, a trained fold, and ways to run a script as a user does.

All tests run on the CPU, also where there are GPUs. Under `pytest -n 3` each process computes with one thread.
"""

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from filelock import FileLock
from forkserver import ask

from harness.console import InputError

REPO = Path(__file__).parent.parent
SMALL = "--weights none --image_size 32 64 --max_epochs 1 --train_batch_size 8 --num_workers 0 --precision 32".split()
QUICK = [*SMALL, "--backbone", "squeezenet1_1"]  # where it does not matter that the network is the real one
RUNNING = set()  # processes that a failed test may have left


@atexit.register
def end_what_is_left():
    for process in list(RUNNING):
        if process.poll() is None:
            process.kill_group()


def fork_server():
    """Start forkserver.py, once for all test processes; returns where it takes requests until the first of them ends."""
    if "FORK_SERVER" not in os.environ:
        address = os.environ["FORK_SERVER"] = str(Path(tempfile.mkdtemp()) / "forkserver")
        code = f"import sys\nsys.path.append({str(REPO / 'tests')!r})\nimport forkserver\nforkserver.imitate_python(sys.argv[1:])"
        python = Path(address).with_name("python")
        python.write_text(f"#!{sys.executable} -IS\n{code}\n")
        python.chmod(0o755)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(64)
            command = [sys.executable, str(REPO / "tests" / "forkserver.py"), str(listener.fileno())]
            shared = {"pass_fds": [listener.fileno()], "start_new_session": True}
            server = subprocess.Popen(command, stdin=subprocess.PIPE, **shared)
        atexit.register(shutil.rmtree, Path(address).parent)
        atexit.register(server.communicate)
    return os.environ["FORK_SERVER"]


def pytest_configure(config):
    if getattr(config.option, "numprocesses", None):  # the first of the processes; the others inherit the address
        fork_server()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("long") is None)  # or one would be left at the end, alone


class Script:
    """A running `python ARGUMENTS`, the first process of its own group; what it prints goes to files."""

    def __init__(self, arguments, cwd, environment, cold):
        self.folder = tempfile.TemporaryDirectory()
        self.returncode = None
        RUNNING.add(self)
        stdout, stderr = (open(Path(self.folder.name) / name, "w") for name in ("stdout", "stderr"))
        with open(os.devnull) as nothing, stdout, stderr:
            streams = [nothing, stdout, stderr]
            if cold or sys.platform != "linux":  # elsewhere a fork of so large a process is not safe
                how = dict(zip(("stdin", "stdout", "stderr"), streams, strict=True), start_new_session=True)
                self.process = subprocess.Popen([sys.executable, *arguments], cwd=cwd, env=environment, **how)
                self.pid, self.status = self.process.pid, None
            else:
                environment = environment | {"FORK_SERVER": fork_server()}
                descriptors = [stream.fileno() for stream in streams]
                self.pid, self.status = ask(fork_server(), arguments, cwd, environment, descriptors)

    @property
    def stdout(self):
        return (Path(self.folder.name) / "stdout").read_text(errors="replace")

    @property
    def stderr(self):
        return (Path(self.folder.name) / "stderr").read_text(errors="replace")

    def poll(self):
        """Its exit status, negative for a signal, or None while it runs."""
        if self.returncode is None and self.status is None:
            self.returncode = self.process.poll()
        elif self.returncode is None:
            self.status.setblocking(False)
            try:
                self.returncode = int.from_bytes(self.status.recv(4), "little", signed=True)
                RUNNING.discard(self)
            except BlockingIOError:
                pass
        return self.returncode

    def wait(self, seconds=300):
        """Wait for its end; returns the exit status."""
        wait_until(lambda: self.poll() is not None, self, seconds)
        return self.returncode

    def kill_group(self, number=signal.SIGKILL):
        os.killpg(self.pid, number)


def is_gone(pid, seconds=30):
    """Whether a process, or with its negative number a group of processes, ends within some seconds."""
    for _ in range(seconds * 20):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def wait_until(condition, script, seconds=120):
    """Wait for something that a running script brings about; its group is killed when that takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        ended = script.poll() is not None
        if ended and condition():
            return
        if ended or time.monotonic() > end:
            if not ended:
                script.kill_group()
            raise AssertionError("waited in vain:\n" + script.stdout + script.stderr)
        time.sleep(0.02)


def start_script(script, *arguments, cwd, cold=False, **environment):
    """Start a script of the repository, a module or, after "-c", code, in the folder `cwd`: a Script.

    cold: by a new interpreter, not forked from forkserver.py.
    """
    first = [str(REPO / script)] if script.endswith(".py") else ["-c"] if script == "-c" else ["-m", script]
    words = [*first, *map(str, arguments)]
    paths = {} if script.endswith(".py") else {"PYTHONPATH": str(REPO)}
    return Script(words, cwd, {**os.environ, **paths, **environment}, cold)


def run_script(script, *arguments, check=True, **options):
    """Run a script to its end, options as of start_script; with `check` it must succeed. Returns the Script."""
    done = start_script(script, *arguments, **options)
    status = done.wait()
    if check:
        assert status == 0, done.stdout + done.stderr
    return done


def refusal(call, *arguments, **options):
    """What is said when `call` refuses its input: one line."""
    with pytest.raises(InputError) as stop:
        call(*arguments, **options)
    said = str(stop.value)
    assert said.startswith("error: ") and said.isprintable(), said
    return said


def refused(done, *words):
    """What a script said when it refused its input: one line, the last, which holds these words."""
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert said.startswith("error: ") and all(word in said for word in words), said
    return said


@contextmanager
def file_size_limit(size):
    """Let no file grow beyond `size` bytes, as a full disk would not."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def copy_recipe(folder):
    """Copy the recipe and its rooms into a new folder, to be edited; returns it."""
    folder.mkdir(parents=True)
    for path in REPO.glob("*.py"):
        shutil.copy(path, folder)
    for room in ("harness", "analysis"):
        shutil.copytree(REPO / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def edit(path, old, new):
    """Replace a text that stands in a file exactly once."""
    text = path.read_text()
    assert text.count(old) == 1, f"{path}: {old}"
    path.write_text(text.replace(old, new))


@pytest.fixture
def mount():
    """A function that mounts something at a folder until the test is over; only root can."""
    mounted = []

    def mount(folder, *options):
        command = ["mount", *options, folder]
        if sys.platform != "linux" or os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("nothing can be mounted here")
        mounted.append(folder)

    yield mount
    for folder in dict.fromkeys(reversed(mounted)):
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def small_disk(mount, tmp_path):
    """The folder of a real disk of 256 KiB."""
    (tmp_path / "disk").mkdir()
    mount(tmp_path / "disk", "-t", "tmpfs", "-o", "size=256k", "tmpfs")
    return tmp_path / "disk"


def shared_folder(tmp_path_factory, name, fill):
    """A folder that the first of all test processes that asks for it fills by `fill(folder)`; for reading only."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, complete = root / "shared" / name, root / "shared" / f"{name}.complete"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            fill(folder)
            complete.touch()
    return folder


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """A rendered data set of 41 labelled and 12 unlabelled photos in the competition's layout."""

    def render(folder):
        size = ["--n_train", 41, "--n_test", 12, "--photo_size", 96, 144]
        run_script("tools.generate_sample_data", "--out", folder / "sample", *size, cwd=folder)

    return shared_folder(tmp_path_factory, "sample", render) / "sample"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a rendered data set, leaves/, and in logs/ the first fold trained on it, well enough to mean something.

    160 labelled and 80 unlabelled photos, a validation AUC of about 0.88.
    """

    def train(folder):
        size = ["--n_train", 160, "--n_test", 80, "--photo_size", 128, 192]
        run_script("tools.generate_sample_data", "--out", "leaves", *size, cwd=folder)
        options = "--image_size 64 96 --max_epochs 3 --folds 0".split()
        run_script("train.py", "--data_dir", "leaves", *SMALL, *options, cwd=folder)

    return shared_folder(tmp_path_factory, "trained", train)


@pytest.fixture(scope="session")
def two_folds(sample, tmp_path_factory):
    """A folder in which folds 0 and 1 of a quick network were trained for an epoch, by the recipe as it stands."""

    def train(folder):
        run_script("train.py", "--data_dir", sample, *QUICK, "--folds", 0, 1, cwd=folder)

    return shared_folder(tmp_path_factory, "two_folds", train)


@pytest.fixture
def run(two_folds, tmp_path):
    """A copy of that folder, for writing."""
    shutil.copytree(two_folds, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def repo(tmp_path):
    """A copy of the recipe and its rooms, to be edited."""
    return copy_recipe(tmp_path / "repo")
