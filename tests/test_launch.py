"""Several processes: folds in pieces and in parallel, DDP over gloo, torchrun on two machines, SLURM, a rank killed."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import QUICK as ONE_EPOCH
from conftest import REPO, copy_recipe, run_script, shared_folder, start_script, wait_until

from dataset import load_photo
from harness.console import InputError
from harness.launch import find_processes
from harness.record import read_record, record_path
from models import LeafNet, load_network
from utils import CLASSES, split_folds

QUICK = [*ONE_EPOCH, "--max_epochs", 2]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # on a CPU, results depend on the number of threads


def train(sample, folder, *options, check=True):
    options = ["--data_dir", sample, *QUICK, *options]
    return run_script("train.py", *options, cwd=folder, check=check, **ONE_THREAD)


def outcome(folder):
    """The bytes that the later steps read, and the weights of all checkpoints."""
    logs = folder / "logs"
    found = {name: (logs / name).read_bytes() for name in ("folds.csv", "results.csv")}
    for path in logs.glob("*.ckpt"):
        state = torch.load(path, weights_only=True)["state_dict"]
        found[path.name] = {name: sha256(value.numpy().tobytes()).hexdigest() for name, value in state.items()}
    return found


def outcome_of_fold_1(folder):
    """The weights of this fold's checkpoints, and its result."""
    found = {name: value for name, value in outcome(folder).items() if name.startswith("fold=1-")}
    assert len(found) == 2
    return found | {"result": read_record(record_path(folder / "logs", 1))["result"]}


@pytest.fixture(scope="session")
def one_process(sample, tmp_path_factory):
    """Folds 0, 1 and 2, one after the other in one process."""
    return shared_folder(tmp_path_factory, "one_process", lambda folder: train(sample, folder, "--folds", 0, 1, 2))


@pytest.fixture(scope="session")
def two_processes(sample, tmp_path_factory):
    """Folds 0 and 1 by two processes of one machine, started by train.py itself."""
    options = ["--folds", 0, 1, "--cpu_processes", 2]
    return shared_folder(tmp_path_factory, "two_processes", lambda folder: train(sample, folder, *options))


def test_folds_in_parallel_leave_what_one_process_leaves_and_none_is_trained_by_edited_files(
    one_process, sample, repo, tmp_path
):
    """Of three folds on two devices the last one starts late, and here by other code than the record says."""
    options = ["--folds", 0, 1, 2, "--cpu_processes", 2, "--parallel_folds"]
    script = start_script(str(repo / "train.py"), "--data_dir", sample, *QUICK, *options, cwd=tmp_path, **ONE_THREAD)
    for fold in (0, 1):
        wait_until((tmp_path / "logs" / "metrics" / f"fold={fold}.csv").exists, script)
    with open(repo / "models.py", "a") as file:
        file.write("ANOTHER_RATE = 1e-2\n")
    assert script.wait() == 1
    assert "fold 2 | error: logs holds folds that were trained differently: models.py: changed" in script.stderr
    assert script.stderr.splitlines()[-1].startswith("error: fold 2 failed, see above; the same command")
    assert pd.read_csv(tmp_path / "logs" / "results.csv")["fold"].tolist() == [0, 1]
    assert not list((tmp_path / "logs").glob("fold=2-*.ckpt"))
    for fold in (0, 1):  # each line carries its fold; there is one an epoch, and no progress bar
        lines = [line for line in script.stdout.splitlines() if line.startswith(f"fold {fold} | ")]
        assert sum(f"fold {fold}, {n} of 2 epochs" in line for line in lines for n in (1, 2)) == 2
    again = train(sample, tmp_path, "--folds", 0, 1, 2, "--cpu_processes", 1)  # one after the other is the same run
    assert again.stdout.count("is finished already") == 2 and outcome(tmp_path) == outcome(one_process)


def test_two_processes_train_as_gpus_0_1_would(one_process, two_processes, sample):
    """DDP over gloo: two folds in one command, 9 validation photos between two, each once."""
    results = pd.read_csv(two_processes / "logs" / "results.csv")
    assert results["fold"].tolist() == [0, 1]
    train_csv = pd.read_csv(sample / "train.csv")
    folds, labels = split_folds(41, 2020), train_csv[list(CLASSES)].to_numpy()
    alone = pd.read_csv(one_process / "logs" / "results.csv")
    for _, row in results.iterrows():
        rows = np.flatnonzero(folds == row["fold"])
        photos = [load_photo(sample / "images" / f"{train_csv['image_id'][i]}.jpg", (32, 64)) for i in rows]
        with torch.no_grad():
            network = load_network(two_processes / "logs" / row["checkpoint"], QUICK[-3])
            softmax = network(torch.from_numpy(np.stack(photos))).softmax(1).numpy()
        assert -np.log(softmax[labels[rows] == 1]).mean() == pytest.approx(row["val_loss"], abs=1e-4)
        # batch norm saw 4 photos a process, not 8: were it one process, the result would be the same
        assert abs(row["val_loss"] - alone["val_loss"][row["fold"]]) > 1e-6
    assert np.sum(folds == 0) == 9


def test_an_error_in_one_of_two_processes_ends_both_with_one_line(sample, tmp_path):
    (tmp_path / "logs" / "metrics" / "fold=0.csv").mkdir(parents=True)  # in the way of the metrics
    (tmp_path / "logs" / "metrics" / "fold=0.csv" / "x").touch()
    failed = train(sample, tmp_path, "--folds", 0, "--cpu_processes", 2, check=False)
    assert failed.returncode == 1 and not (tmp_path / "logs" / "results.csv").exists()
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: cannot delete logs/metrics/fold=0.csv (Is a directory)"]
    assert "Traceback" not in failed.stderr


def children(pid):
    """The processes that `pid` has started and that train, not its helpers."""
    found = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    return [int(child) for child in found if b"train.py" in open(f"/proc/{child}/cmdline", "rb").read()]


def start_two_processes(sample, folder, **environment):
    """A long training by two processes; returns it and its two processes, once the first epoch is over."""
    options = ["--folds", 1, "--max_epochs", 5000, "--cpu_processes", 2]
    environment |= ONE_THREAD
    script = start_script("train.py", "--data_dir", sample, *QUICK, *options, cwd=folder, **environment)
    wait_until((folder / "logs" / "metrics" / "fold=1.csv").exists, script)
    return script, children(script.pid)


def are_gone(ranks, seconds=30):
    """Whether these processes end within some seconds. torch's launcher gives each a group of its own."""
    for _ in range(seconds * 20):
        if not any(os.path.exists(f"/proc/{rank}") for rank in ranks):
            return True
        time.sleep(0.05)
    return False


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds processes in Linux' /proc")


@needs_proc
def test_when_one_of_two_processes_is_killed_the_other_ends_with_a_message(sample, tmp_path):
    script, ranks = start_two_processes(sample, tmp_path)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert script.wait(60) == 1
    said = (
        "error: process 1 of 2 was killed (SIGKILL), the others are ended; the same command (without --fresh) goes on"
    )
    assert script.stderr.splitlines()[-1].startswith(said)
    assert script.group_is_gone() and are_gone(ranks)


@needs_proc
def test_when_the_process_of_a_fold_is_killed_it_is_said(sample, tmp_path):
    options = ["--folds", 0, 1, "--max_epochs", 5000, "--cpu_processes", 1, "--parallel_folds"]
    script = start_script("train.py", "--data_dir", sample, *QUICK, *options, cwd=tmp_path, **ONE_THREAD)
    for fold in (0, 1):
        wait_until((tmp_path / "logs" / "metrics" / f"fold={fold}.csv").exists, script)
        os.kill(children(script.pid)[0], signal.SIGKILL)
    assert script.wait(60) == 1
    assert [f"the process of fold {fold} was killed (SIGKILL)" in script.stdout for fold in (0, 1)] == [True, True]
    assert script.stderr.splitlines()[-1].startswith("error: fold 0 1 failed, see above; the same command")


MEET = """
import os
if "RANK" in os.environ:
    from torch import distributed
    distributed.init_process_group("gloo")
    distributed.barrier()
    print("met", flush=True)
    os._exit(0)
from harness.launch import launch_processes
launch_processes(2)
"""


@pytest.mark.skipif(os.name != "posix" or os.geteuid(), reason="only root can name a machine anew")
def test_processes_of_a_machine_whose_name_is_unknown_find_each_other(tmp_path):
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("no name space can be made here")
    (tmp_path / "meet.py").write_text(MEET)
    inside = ["unshare", "--uts", "sh", "-c", 'hostname no.such.host && exec "$0" meet.py', sys.executable]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(inside, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0 and done.stdout.count("met") == 2, done.stderr


@needs_proc
def test_processes_end_when_their_launcher_is_killed(sample, tmp_path):
    script, ranks = start_two_processes(sample, tmp_path, COLD_CHILDREN="1")  # they must notice it themselves
    os.kill(script.pid, signal.SIGKILL)
    script.wait()
    assert len(ranks) == 2 and script.group_is_gone() and are_gone(ranks)


@needs_proc
def test_ctrl_c_ends_all_processes_with_one_line(sample, tmp_path):
    script, ranks = start_two_processes(sample, tmp_path)
    script.kill_group(signal.SIGINT)
    assert script.wait(60) == -signal.SIGINT
    assert (script.stdout + script.stderr).count("stopped: what is written is whole") == 1
    assert "Traceback" not in script.stderr
    assert len(ranks) == 2 and script.group_is_gone() and are_gone(ranks)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def finish(scripts):
    ended = [script.wait() for script in scripts]
    assert ended == [0] * len(scripts), "\n".join(script.stdout + script.stderr for script in scripts)


def test_torchrun_on_two_machines_leaves_what_two_processes_of_one_leave(two_processes, sample, tmp_path):
    port = free_port()
    script = [REPO / "train.py", "--data_dir", sample, *QUICK, "--folds", 1]
    where = ["--nnodes", 2, "--nproc_per_node", 1, "--master_addr", "127.0.0.1", "--master_port", port]
    torchrun = ["torch.distributed.run", *where, "--node_rank"]
    finish([start_script(*torchrun, rank, *script, cwd=tmp_path, **ONE_THREAD) for rank in (0, 1)])
    assert outcome_of_fold_1(tmp_path) == outcome_of_fold_1(two_processes)


def test_slurm_on_two_machines_leaves_what_two_processes_of_one_leave(two_processes, sample, tmp_path):
    """srun's environment, as SLURM's manual lists it; no SLURM is needed to read it."""
    script = ["train.py", "--data_dir", sample, *QUICK, "--folds", 1]
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "leaves", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}
    job |= {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "localhost", "SLURM_NODELIST": "localhost", "SLURM_LOCALID": "0"}
    job |= {"SLURM_STEP_ID": "0"}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | ONE_THREAD
    tasks = [{"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)} for rank in (0, 1)]
    finish([start_script(*script, cwd=tmp_path, **job, **task) for task in tasks])
    assert outcome_of_fold_1(tmp_path) == outcome_of_fold_1(two_processes)


# train.py with its limits shortened; with a number it dies before that epoch, which is kept.
HURRIED = """
import os, runpy, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
from harness import launch, run
script, die_before, launch.JOIN_TIMEOUT = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
run.RESUME_EVERY = -1
keep = run.ResumePoint.on_train_epoch_start
def keep_and_die(self, trainer, module):
    keep(self, trainer, module)
    if trainer.current_epoch == die_before:
        os._exit(9)
run.ResumePoint.on_train_epoch_start = keep_and_die
sys.argv = [script, *sys.argv[4:]]
runpy.run_path(script, run_name="__main__")
"""


def start_ranks(sample, folders, *options, scripts=(REPO / "train.py",) * 2, die_before=99, wait=60, ranks=(0, 1)):
    """Start processes of a training of two, each in its own folder, as torchrun would: list of Script."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    where |= {"TORCHELASTIC_RUN_ID": "1", "LOCAL_RANK": "0", "GROUP_RANK": "0"} | ONE_THREAD
    words = ["--data_dir", sample, *QUICK, "--folds", 1, *options]
    return [
        start_script("-c", HURRIED, scripts[rank], die_before, wait, *words, cwd=folders[rank], RANK=str(rank), **where)
        for rank in ranks
    ]


def refused(scripts, *words):
    """Whether all processes ended with status 1 and one line each that holds the words."""
    for script in scripts:
        assert script.wait(60) == 1 and "Traceback" not in script.stderr, script.stdout + script.stderr
        (said,) = [line for line in script.stderr.splitlines() if line.startswith("error: ")]
        assert all(word in said for word in words), said


def test_processes_that_see_other_things_than_the_first_are_named_before_the_first_step(sample, tmp_path):
    """A log directory that is not shared; then one where a process lacks the point to go on from; then another source."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    refused(start_ranks(sample, folders), "process 1 (", "the files of the log directory differ", "must share the log")

    shared = [folders[0]] * 2
    shutil.rmtree(folders[0] / "logs")
    assert 9 in {script.wait(60) for script in start_ranks(sample, shared, die_before=1)}
    assert (folders[0] / "logs" / "fold=1-last.ckpt").exists()
    shutil.copytree(folders[0] / "logs", folders[1] / "logs")
    (folders[1] / "logs" / "fold=1-last.ckpt").unlink()
    refused(start_ranks(sample, folders), "process 1 (", "the files of the log directory differ")

    copy = copy_recipe(tmp_path / "copy")
    with open(copy / "models.py", "a") as file:
        file.write("ANOTHER_RATE = 1e-2\n")
    refused(
        start_ranks(sample, shared, scripts=(REPO / "train.py", copy / "train.py")), "process 1 (", "models.py differ"
    )
    finish(start_ranks(sample, shared))
    assert pd.read_csv(folders[0] / "logs" / "results.csv")["fold"].tolist() == [1]


def test_waiting_for_processes_that_nobody_starts_has_an_end_and_can_be_interrupted(sample, tmp_path):
    (alone,) = start_ranks(sample, [tmp_path], wait=2, ranks=[0])
    refused([alone], "process 0 of 2 waits for the others at 127.0.0.1:", "in vain", "were all started?")
    for number in (signal.SIGINT, signal.SIGTERM):
        (alone,) = start_ranks(sample, [tmp_path], ranks=[0])
        wait_until(lambda alone=alone: "waits for the others at 127.0.0.1:" in alone.stdout, alone)
        os.kill(alone.pid, number)
        assert alone.wait(5) == -number
    assert not (tmp_path / "logs").exists()


def test_in_an_allocation_without_srun_it_trains_as_the_one_process_that_it_is(one_process, sample, tmp_path):
    """`#SBATCH -n 8`, and python without srun: SLURM's variables promise processes that nobody has started."""
    job = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NNODES": "1"}
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"of another job, by Lightning's own requeueing")
    options = ["--data_dir", sample, *QUICK, "--folds", 1]
    done = run_script("train.py", *options, cwd=tmp_path, SLURM_JOB_NAME="leaves", **job, **ONE_THREAD)
    assert "note: SLURM has given this job several tasks" in done.stdout and "srun" in done.stdout
    assert outcome_of_fold_1(tmp_path) == outcome_of_fold_1(one_process)


def test_the_shell_of_an_allocation_is_no_step_of_srun(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    job = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "foo"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    for step in ("4294967290", "4294967291"):  # SLURM's numbers for salloc's shell, and a batch script
        monkeypatch.setenv("SLURM_STEP_ID", step)
        assert find_processes()[1:] == (1, 1)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    with pytest.raises(InputError, match=r"SLURM \(.*ntasks-per-node.*docs/clusters.md"):
        find_processes()
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    assert find_processes()[1:] == (4, 2)


def test_jobs_that_start_together_never_take_each_others_folds(tmp_path):
    """Five jobs of an array on a file system where letting go of a lock takes a while; ten starts of each."""
    scripts = [start_script("-c", STARTER, fold, cwd=tmp_path) for fold in range(5)]
    assert [script.wait() for script in scripts] == [0] * 5, "".join(script.stderr for script in scripts)


def test_a_number_of_processes_that_does_not_fit_is_refused(sample, tmp_path):
    scripts = start_ranks(sample, [tmp_path] * 2, "--cpu_processes", 4)
    for script in scripts:
        assert script.wait() == 1 and "error: 1 processes were started here, for 4 devices" in script.stderr
    assert not (tmp_path / "logs").exists()


STARTER = """
import sys, time
from argparse import Namespace
import pandas as pd
from filelock import FileLock
from harness.record import open_log_dir

release = FileLock.release
FileLock.release = lambda self, force=False: (time.sleep(0.003), release(self, force))
args = Namespace(log_dir="logs", folds=[int(sys.argv[1])], fresh=False, accept_changes=False)
record = {"format": 4, "source": "0", "environment": {}, "options": {}, "fingerprints": {}}
for start in range(10):
    locks = open_log_dir(args, 5, record, pd.DataFrame({"image_id": ["a"], "fold": [0]}), list)
    time.sleep(0.003)
    for lock in locks:
        lock.lock.release()
"""


# One rank of DDP: the gradients of its share of a batch, averaged over ranks, batch norm in evaluation mode.
RANK = """
import sys
import torch
import torch.nn.functional as F
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from models import LeafNet, load_network

rank = int(sys.argv[1])
distributed.init_process_group("gloo", rank=rank, world_size=2)
torch.manual_seed(1)
network = DistributedDataParallel(LeafNet().eval())
batch = torch.load("batch.pt")
share = slice(4 * rank, 4 * rank + 4)
F.cross_entropy(network(batch["images"][share]), batch["labels"][share]).backward()
if rank == 0:
    torch.save({name: p.grad for name, p in network.module.named_parameters() if p.grad is not None}, "gradients.pt")
distributed.destroy_process_group()
"""


def test_gradients_of_a_global_batch_are_those_of_its_halves_averaged(tmp_path):
    images, labels = torch.randint(0, 256, (8, 32, 64, 3), dtype=torch.uint8), torch.softmax(torch.randn(8, 4), 1)
    torch.save({"images": images, "labels": labels}, tmp_path / "batch.pt")
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | ONE_THREAD
    finish([start_script("-c", RANK, rank, cwd=tmp_path, **where) for rank in (0, 1)])
    torch.manual_seed(1)
    network = LeafNet().eval()
    F.cross_entropy(network(images), labels).backward()
    averaged = torch.load(tmp_path / "gradients.pt")
    assert averaged.keys() == {name for name, p in network.named_parameters() if p.grad is not None}
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(averaged[name], parameter.grad, rtol=1e-3, atol=1e-5)
