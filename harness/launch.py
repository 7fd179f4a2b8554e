"""How train.py becomes several processes: one a device for each fold (DDP), a fold a device, or those of a cluster."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from harness.console import InputError, Stopped, how_to_go_on

LAUNCHED = "PLANT_PATHOLOGY_LAUNCHED"  # the process id of the train.py that has started this one
IS_LAUNCHED = LAUNCHED in os.environ


def cluster_environment():
    """How this process finds those that train together with it, for Lightning; alone unless torchrun or srun started it.

    In an allocation without srun (`#SBATCH -n 8` to get cores, a notebook) SLURM's variables are there, the others not.
    Lightning's own requeueing is off: folds of an array job would load each other's checkpoints.
    """
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if SLURMEnvironment.detect() and "SLURM_STEP_ID" in os.environ:
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()


def is_one_of_several_processes():
    """Whether this process is one of several that train together: started by us, by torchrun, or by SLURM's srun."""
    environment = cluster_environment()
    return isinstance(environment, TorchElasticEnvironment) or environment.world_size() > 1


def join_processes(device, indices, num_nodes):
    """Meet the processes that torchrun or srun has started beside this one; returns a function that waits for them.

    Raises InputError if there are not as many as `indices` (the devices of each machine) and `num_nodes` promise.
    """
    try:
        fabric = Fabric(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=indices if device == "cuda" else len(indices),
            num_nodes=num_nodes,
            strategy="ddp",
            plugins=[cluster_environment()],
        )
        fabric.launch()
    except ValueError as error:  # Lightning's, about numbers that do not fit
        raise InputError(f"{' '.join(str(error).split())} (see --gpus, --cpu_processes and --num_nodes)") from error
    return fabric.barrier


def end_with_launcher():
    """End this process when the one that launched it has been killed: it would go on unseen, and hinder the next start."""
    launcher = int(os.environ[LAUNCHED])

    def watch():
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)  # it may wait for processes that are gone too
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def share_cores(n):
    """The environment of each of `n` processes on this machine."""
    return {
        **os.environ,
        LAUNCHED: str(os.getpid()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, os.cpu_count() // n))),
    }


def launch_processes(n):
    """Run this command again as one process a device, by torch's own launcher, which ends them all when one dies."""
    os.environ.update(share_cores(n))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)(*sys.argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # otherwise the process has said why
            name = signal.Signals(-failure.exitcode).name
            raise InputError(
                f"process {rank} of {n} was killed ({name}), the others are ended; {how_to_go_on()}"
            ) from error
        raise SystemExit(1) from error
    except SignalException as error:
        raise Stopped(128 + error.sigval) from error


def launch_folds(folds, device, indices):
    """Run this command once a fold, each on one device, as many at once as there are devices; returns failed folds.

    Their lines appear behind the number of their fold.
    """
    words = [word for word in sys.argv if word != "--parallel_folds"]
    environment, free, running = share_cores(len(indices)), SimpleQueue(), set()
    for index in indices:
        free.put(index)

    def run(fold):
        index = free.get()
        on = ["--gpus", str(index)] if device == "cuda" else ["--cpu_processes", "1"]
        command = [sys.executable, *words, "--folds", str(fold), *on]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, env=environment, text=True, errors="replace", **pipe) as process:
            running.add(process)
            for line in process.stdout:
                print(f"fold {fold} | {line}", end="", flush=True)
        running.remove(process)
        free.put(index)
        return process.returncode

    pool = ThreadPoolExecutor(len(indices))
    try:
        codes = list(pool.map(run, folds))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()
        pool.shutdown()
    return [fold for fold, code in zip(folds, codes, strict=True) if code]
