"""Several processes: folds in pieces and in parallel, DDP over gloo, torchrun on two machines, SLURM, a rank killed."""

import os
import re
import signal
import socket
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import QUICK as ONE_EPOCH
from conftest import REPO, copy_recipe, is_gone, refusal, refused, run_script, shared_folder, start_script, wait_until
from filelock import FileLock
from test_resume import KILLER, outcome

from dataset import load_photo
from harness.console import parse_args
from harness.launch import find_processes
from harness.record import open_log_dir, read_record, record_path
from harness.run import Run
from models import load_network
from utils import CLASSES, make_training_parser, split_folds

QUICK = [*ONE_EPOCH, "--max_epochs", 2]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # on a CPU, results depend on the number of threads


def train(sample, folder, *options, check=True):
    options = ["--data_dir", sample, *QUICK, *options]
    return run_script("train.py", *options, cwd=folder, check=check, **ONE_THREAD)


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
    results, alone = (pd.read_csv(folder / "logs" / "results.csv") for folder in (two_processes, one_process))
    train_csv, folds = pd.read_csv(sample / "train.csv"), split_folds(41, 2020)
    assert results["fold"].tolist() == [0, 1] and np.sum(folds == 0) == 9
    for fold, row in results.iterrows():
        of_fold = train_csv[folds == fold]
        photos = [load_photo(sample / "images" / f"{name}.jpg", (32, 64)) for name in of_fold["image_id"]]
        with torch.no_grad():
            network = load_network(two_processes / "logs" / row["checkpoint"], QUICK[-3])
            softmax = network(torch.from_numpy(np.stack(photos))).softmax(1).numpy()
        loss = -np.log(softmax[of_fold[list(CLASSES)].to_numpy() == 1]).mean()
        assert loss == pytest.approx(row["val_loss"], abs=1e-4)
        # batch norm saw 4 photos a process, not 8: were it one process, the result would be the same
        assert abs(row["val_loss"] - alone["val_loss"][fold]) > 1e-6


def test_an_error_in_one_of_two_processes_ends_both_with_one_line(sample, tmp_path):
    (tmp_path / "logs" / "metrics" / "fold=0.csv").mkdir(parents=True)  # in the way of the metrics
    (tmp_path / "logs" / "metrics" / "fold=0.csv" / "x").touch()
    failed = train(sample, tmp_path, "--folds", 0, "--cpu_processes", 2, check=False)
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert failed.returncode == 1 and errors == ["error: cannot delete logs/metrics/fold=0.csv (Is a directory)"]
    assert "Traceback" not in failed.stderr and not (tmp_path / "logs" / "results.csv").exists()


def children(pid):
    """The processes that `pid` has started and that train, not its helpers."""
    found = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    return [int(child) for child in found if b"train.py" in open(f"/proc/{child}/cmdline", "rb").read()]


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds processes in Linux' /proc")


KILLED = "error: process 1 of 2 was killed (SIGKILL), the others are ended; the same command (without --fresh) goes on"


@needs_proc
@pytest.mark.parametrize(
    "ended, number, status, said",
    [
        ("a rank", signal.SIGKILL, 1, KILLED),
        ("the launcher", signal.SIGKILL, -signal.SIGKILL, ""),
        ("all", signal.SIGINT, -signal.SIGINT, "stopped: what is written is whole"),
    ],
)
def test_when_one_of_the_processes_of_a_training_ends_all_do_and_one_line_says_it(
    ended, number, status, said, sample, tmp_path
):
    options = ["--folds", 1, "--max_epochs", 5000, "--cpu_processes", 2]
    notice = {"COLD_CHILDREN": "1"} if ended == "the launcher" else {}  # they must notice it themselves
    script = start_script("train.py", "--data_dir", sample, *QUICK, *options, cwd=tmp_path, **ONE_THREAD, **notice)
    wait_until((tmp_path / "logs" / "metrics" / "fold=1.csv").exists, script)
    ranks = children(script.pid)
    assert len(ranks) == 2
    if ended == "all":
        script.kill_group(number)
    else:
        os.kill(ranks[1] if ended == "a rank" else script.pid, number)
    assert script.wait(60) == status
    printed = script.stdout + script.stderr
    assert printed.count(said) == 1 or not said
    assert "Traceback" not in printed or ended == "a rank"  # its partner may have noticed it before the launcher did
    assert all(map(is_gone, (-script.pid, *ranks)))


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


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def finish(scripts):
    ended = [script.wait() for script in scripts]
    assert ended == [0] * len(scripts), "\n".join(script.stdout + script.stderr for script in scripts)


def test_torchrun_on_two_machines_leaves_what_two_processes_of_one_leave(two_processes, sample, tmp_path):
    script = [REPO / "train.py", "--data_dir", sample, *QUICK, "--folds", 1]
    where = ["--nnodes", 2, "--nproc_per_node", 1, "--master_addr", "127.0.0.1", "--master_port", free_port()]
    torchrun = ["torch.distributed.run", *where, "--node_rank"]
    finish([start_script(*torchrun, rank, *script, cwd=tmp_path, **ONE_THREAD) for rank in (0, 1)])
    assert outcome_of_fold_1(tmp_path) == outcome_of_fold_1(two_processes)


def test_slurm_on_two_machines_leaves_what_two_processes_of_one_leave(two_processes, sample, tmp_path):
    """srun's environment, as SLURM's manual lists it; no SLURM is needed to read it."""
    script = ["train.py", "--data_dir", sample, *QUICK, "--folds", 1]
    job = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "leaves", "SLURM_LOCALID": "0"}
    job |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2"}
    job |= {"SLURM_JOB_NODELIST": "localhost", "SLURM_NODELIST": "localhost"}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | ONE_THREAD
    tasks = [{"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)} for rank in (0, 1)]
    finish([start_script(*script, cwd=tmp_path, **job, **task) for task in tasks])
    assert outcome_of_fold_1(tmp_path) == outcome_of_fold_1(two_processes)


def start_ranks(sample, folders, moment="never", ranks=(0, 1), repos=(REPO, REPO), folds=(1, 1), **environment):
    """Start processes of a training of two, each in its own folder, as torchrun would: list of Script.

    moment: as of KILLER, when they die; JOIN_TIMEOUT: seconds for which they wait for each other.
    """
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    where |= {"TORCHELASTIC_RUN_ID": "1", "LOCAL_RANK": "0", "GROUP_RANK": "0"} | ONE_THREAD | environment
    words = ["-c", KILLER, "train", moment, "--data_dir", sample, *QUICK, "--folds"]
    own = [{"RANK": str(rank), "PYTHONPATH": str(repos[rank])} for rank in (0, 1)]
    return [start_script(*words, folds[rank], cwd=folders[rank], **where, **own[rank]) for rank in ranks]


def test_ranks_that_would_train_differently_are_named_and_a_killed_training_goes_on(two_processes, sample, tmp_path):
    """A log directory that is not shared; then other source files, then another fold."""
    copy = copy_recipe(tmp_path / "copy")
    with open(copy / "models.py", "a") as file:
        file.write("ANOTHER_RATE = 1e-2\n")
    shared, other = tmp_path / "shared", tmp_path / "other"
    shared.mkdir()
    other.mkdir()
    for how, differ in (
        ({"folders": [shared, other]}, "the log files differ. All machines must share the log"),
        ({"folders": [shared] * 2, "repos": [REPO, copy]}, "models.py differ"),
        ({"folders": [shared] * 2, "folds": (1, 0)}, "--folds differ"),
    ):
        for script in start_ranks(sample, **how):
            script.wait(60)
            refused(script, "process 1 (", differ)
            assert script.stderr.count("error: ") == 1

    assert -signal.SIGKILL in {script.wait(60) for script in start_ranks(sample, [shared] * 2, "epoch:1")}
    assert (shared / "logs" / "fold=1-last.ckpt").exists()
    finish(start_ranks(sample, [shared] * 2))
    assert outcome_of_fold_1(shared) == outcome_of_fold_1(two_processes)


def test_waiting_for_processes_that_nobody_starts_has_an_end_and_can_be_interrupted(sample, tmp_path):
    (alone,) = start_ranks(sample, [tmp_path], ranks=[0], JOIN_TIMEOUT="2")
    alone.wait(60)
    refused(alone, "process 0 of 2 waits for the others at 127.0.0.1:", "in vain", "were all started?")
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
    run_script("train.py", *options, cwd=tmp_path, SLURM_JOB_NAME="leaves", **job, **ONE_THREAD)
    assert outcome_of_fold_1(tmp_path) == outcome_of_fold_1(one_process)


def test_the_shell_of_an_allocation_is_no_step_of_srun_and_other_numbers_are_refused(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    job = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "foo"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    for step in ("4294967290", "4294967291"):  # SLURM's numbers for salloc's shell, and a batch script
        monkeypatch.setenv("SLURM_STEP_ID", step)
        assert find_processes()[1:] == (1, 1)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert re.search(r"SLURM \(.*ntasks-per-node.*docs/clusters.md", refusal(find_processes))
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    assert find_processes()[1:] == (4, 2)
    args = parse_args(make_training_parser(""), ["--cpu_processes", "4"])
    assert "2 processes were started here, for 4 devices" in refusal(Run, args, 5, CLASSES)


def test_jobs_that_start_together_never_take_each_others_folds(tmp_path, monkeypatch):
    """Five jobs of an array on a file system where letting go of a lock takes a while; ten starts of each."""
    record = {"format": 4, "source": "0", "environment": {}, "options": {}, "fingerprints": {}}
    release = FileLock.release
    monkeypatch.setattr(FileLock, "release", lambda self, force=False: (time.sleep(0.003), release(self, force)))
    folds = pd.DataFrame({"image_id": ["a"], "fold": [0]})

    def job(fold):
        args = Namespace(log_dir=tmp_path / "logs", folds=[fold], fresh=False, accept_changes=False)
        for _ in range(10):
            locks = open_log_dir(args, 5, record, folds, list)
            time.sleep(0.003)
            for lock in locks:
                lock.lock.release()

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(job, range(5)))
