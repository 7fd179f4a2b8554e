"""How train.py becomes several processes: one a device for each fold (DDP), a fold a device, or those of a cluster."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from queue import SimpleQueue

from joblib import cpu_count
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning_fabric.strategies import DDPStrategy
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from harness.console import InputError, Stopped, default_signals, how_to_go_on

LAUNCHED = "PLANT_PATHOLOGY_LAUNCHED"  # the process id of the train.py that has started this one
IS_LAUNCHED = LAUNCHED in os.environ
WAIT = 30 * 60  # seconds for the other processes: each machine may first have to decode all photos


def cluster_environment():
    """How this process finds those that train together with it, for Lightning; alone unless torchrun or srun started it.

    In an allocation without srun (`#SBATCH -n 8` to get cores, a notebook) SLURM's variables are there, the others not.
    Lightning's own requeueing is off: folds of an array job would load each other's checkpoints.
    """
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    step = os.environ.get("SLURM_STEP_ID", "none")
    if SLURMEnvironment.detect() and step.isdigit() and int(step) < 2**32 - 16:  # above: salloc's shell, a batch script
        try:
            return SLURMEnvironment(auto_requeue=False)
        except RuntimeError as error:  # Lightning wants to know how many there are on each machine
            raise InputError("SLURM: give --ntasks-per-node in place of --ntasks (docs/clusters.md)") from error
    return LightningEnvironment()


def is_one_of_several_processes():
    """Whether this process is one of several that train together: started by us, by torchrun, or by SLURM's srun."""
    environment = cluster_environment()
    return isinstance(environment, TorchElasticEnvironment) or environment.world_size() > 1


def join_processes(device, indices, num_nodes):
    """Meet the processes that torchrun or srun has started beside this one; returns a function that waits for them.

    Raises InputError if there are not as many as `indices` (the devices of each machine) and `num_nodes` promise, or if
    they do not come within WAIT seconds.
    """
    environment = cluster_environment()
    try:
        fabric = Fabric(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=indices if device == "cuda" else len(indices),
            num_nodes=num_nodes,
            strategy=DDPStrategy(timeout=timedelta(seconds=WAIT)),
            plugins=[environment],
        )
        with waiting_for_others(environment):
            fabric.launch()
    except ValueError as error:  # Lightning's, about numbers that do not fit
        raise InputError(f"{' '.join(str(error).split())} (see --gpus, --cpu_processes and --num_nodes)") from error

    def wait_for_all():
        with waiting_for_others(environment):
            fabric.barrier()

    return wait_for_all


@contextmanager
def waiting_for_others(environment):
    """Within the block, which waits in C for the other processes: say so after 10 seconds, and let signals end it.

    Raises InputError if they do not come within WAIT seconds, or have ended.
    """
    rank, n = environment.global_rank(), environment.world_size()
    what = f"process {rank} of {n} waits for the others at {environment.main_address}:{environment.main_port}"
    text = f"{what}, for {timedelta(seconds=WAIT)} at most; Ctrl-C ends it"
    timer = threading.Timer(10, print, (f"[{time.strftime('%H:%M:%S')}] {text}",), {"flush": True})
    timer.start()
    try:
        with default_signals():
            yield
    except (DistError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{what} in vain ({reason}): see what they say, whether all {n} were started, and whether this address and "
            "port can be reached from each machine"
        ) from error
    finally:
        timer.cancel()


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
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cpu_count() // n))),
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


def launch_folds(folds, device, indices, num_workers):
    """Run this command once a fold, each on one device, as many at once as there are devices; returns failed folds.

    num_workers: of each. Their lines appear behind the number of their fold.
    """
    words = [word for word in sys.argv if word != "--parallel_folds"]
    environment, free, running = share_cores(len(indices)), SimpleQueue(), set()
    for index in indices:
        free.put(index)

    def run(fold):
        index = free.get()
        on = ["--gpus", str(index)] if device == "cuda" else ["--cpu_processes", "1"]
        command = [sys.executable, *words, "--folds", str(fold), "--num_workers", str(num_workers), *on]
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
