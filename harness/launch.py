"""How train.py becomes several processes: one for each device (DDP), a fold on each device, or those of a cluster."""

import atexit
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from queue import SimpleQueue

import torch.distributed.run
from joblib import cpu_count
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning_fabric.strategies import DDPStrategy
from torch import distributed
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from harness.console import GO_ON, PREFIX, InputError, refusing, say, stop

JOIN_TIMEOUT = 30 * 60  # seconds for the other processes: each machine may first have to decode all photos


def find_processes():
    """How this process finds those that torchrun or srun has started with it, for Lightning; how many in all; how many here."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment(), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    step, n = os.environ.get("SLURM_STEP_ID", "none"), int(os.environ.get("SLURM_NTASKS", 1))
    if SLURMEnvironment.detect() and step.isdigit() and int(step) < 2**32 - 16:  # above: salloc's shell, a batch script
        with refusing("SLURM", RuntimeError, advice=" (docs/clusters.md)"):  # it asks for --ntasks-per-node
            # or folds of an array job would load each other's checkpoints
            return SLURMEnvironment(auto_requeue=False), n, n // int(os.environ["SLURM_NNODES"])
    return LightningEnvironment(), 1, 1


def join_processes(run):
    """Meet the processes that torchrun or srun has started beside this one; returns a function that waits for them.

    Raises InputError if the others do not come within JOIN_TIMEOUT, or have ended.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # it often waits in C, where no Python handler runs
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    rank, n, address = run.cluster.global_rank(), run.cluster.world_size(), run.cluster.main_address
    waiting = f"process {rank} of {n} waits for the others at {address}:{run.cluster.main_port}"
    if PREFIX is None:
        say(waiting)
    how = {"strategy": DDPStrategy(timeout=timedelta(seconds=JOIN_TIMEOUT)), "plugins": [run.cluster]}
    fabric = Fabric(accelerator=run.accelerator, devices=run.devices, num_nodes=run.num_nodes, **how)

    def meet(wait):
        try:
            wait()
        except RuntimeError as error:
            if PREFIX is not None and rank:
                raise SystemExit(1) from error  # the first one has said why it ended
            raise InputError(f"{waiting} in vain ({str(error).splitlines()[0]}): were all started?") from error

    meet(fabric.launch)
    return lambda: meet(fabric.barrier)


def refuse_differences(facts):
    """Raise InputError, in all processes, if the `facts` (dict of name to value) of one are not those of the first."""
    gathered = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, (socket.gethostname(), facts))
    host, first = gathered[0]
    for rank, (name, its_own) in enumerate(gathered):
        if differ := ", ".join(what for what in first | its_own if first.get(what) != its_own.get(what)):
            atexit.register(distributed.destroy_process_group)  # or gloo's threads may abort a Python that ends
            unlike = f"process {rank} ({name}) would not train the same as process 0 ({host}): {differ} differ"
            raise InputError(f"{unlike}. All machines must share the log directory, and have the same data and files")


def end_with_parent():
    """Let Linux kill this process when the one that started it dies: it would go on unseen, and hinder the next start."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def environment_of(n, prefix):
    """The environment of each of `n` processes on this machine, whose lines begin with `prefix`."""
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cpu_count() // n)))
    return {**os.environ, "PLANT_PATHOLOGY_PREFIX": prefix, "OMP_NUM_THREADS": threads}


def launch_processes(n):
    """Run this command again as n processes by torch's own launcher, which ends them all when one dies; ends as they do."""
    os.environ.update(environment_of(n, prefix=""))
    logging.disable(logging.ERROR)  # or it repeats their errors in twenty lines
    where = ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "--local_addr=localhost"]  # no name that is unknown
    try:
        torch.distributed.run.main([*where, f"--nproc_per_node={n}", *sys.argv])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            raise SystemExit(1) from error
        killed = f"process {rank} of {n} was killed ({signal.Signals(-failure.exitcode).name})"
        raise InputError(f"{killed}, the others are ended; {GO_ON}") from error
    except SignalException as error:
        stop(error.sigval)


def launch_folds(folds, kind, indices, num_workers):
    """Run this command once for each fold, as many at once as there are devices, one on each; returns the failed folds."""
    words = [sys.executable, *(word for word in sys.argv if word != "--parallel_folds")]
    free = SimpleQueue()
    for index in indices:
        free.put(index)

    def run(fold):
        index, environment = free.get(), environment_of(len(indices), prefix=f"fold {fold} | ")
        on = f"--gpus {index}" if kind == "cuda" else "--cpu_processes 1"
        more = f"{on} --num_workers {num_workers} --folds {fold}".split()
        code = subprocess.call([*words, *more], env=environment, preexec_fn=end_with_parent)
        if code < 0:
            say(f"the process of fold {fold} was killed ({signal.Signals(-code).name})")
        free.put(index)
        return code

    with ThreadPool(len(indices)) as pool:
        return [fold for fold, code in zip(folds, pool.map(run, folds, chunksize=1), strict=True) if code]
