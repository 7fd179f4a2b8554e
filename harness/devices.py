"""What a script runs on: GPUs or the CPU, the precision, memory, and what several processes have in common."""

import platform
import re
from contextlib import contextmanager
from importlib.metadata import version

import cv2
import torch
from torch import distributed

from harness.console import InputError, refusing

OUT_OF_MEMORY = r"out.of.memory|CPUAllocator|could not create a|bad_alloc|Cannot allocate|ALLOC\w*_FAILED|failure 2\b"
LOST_WORKER = r"DataLoader worker \(pid|unable to .*(shared memory|file </torch_)"


def choose_device(gpus, cpu_processes=None):
    """The torch device type and indices, ("cuda", [0, 1]) or ("cpu", [0]). Raises InputError for GPUs that are not there."""
    if cpu_processes is not None:
        return "cpu", list(range(cpu_processes))
    there = list(range(torch.cuda.device_count()))
    if gpus is not None and set(gpus) - set(there):
        instead = f"type --gpus {' '.join(map(str, there))}" if there else "leave --gpus out to run on the CPU"
        raise InputError(f"--gpus {' '.join(map(str, gpus))}: torch sees {len(there)} GPUs on this machine; {instead}")
    wanted = sorted(set(there if gpus is None else gpus))
    return ("cuda", wanted) if wanted else ("cpu", [0])


def check_gpus(indices):
    """Raise InputError if torch, which counts these GPUs, cannot compute on one: its driver, or a build without its code."""
    anew = "install another build of torch or a newer driver (docs/installing.md), or type --cpu_processes 1"
    advice = f": if its memory is full, wait for the other process (nvidia-smi); else {anew}"
    for index in indices:
        with refusing(f"GPU {index} cannot be used", RuntimeError, AssertionError, advice=advice):
            torch.ones(1, device=torch.device("cuda", index)).add_(1).item()


def choose_precision(precision, device):
    """The precision asked for, or the fast one of this device: "16", "32" or "bf16". Raises InputError for 16 on a CPU."""
    if precision == "16" and device == "cpu":
        raise InputError("--precision 16 needs a GPU; on the CPU type --precision bf16 or --precision 32")
    fast_on_cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return precision or ("16" if device == "cuda" else "bf16" if fast_on_cpu else "32")


def compute_exactly(precision):
    """Let cuDNN choose the same algorithm every time, as the original did, and for "32" no TF32: it has 10 bits, not 23."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    if precision == "32":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def autocast(device, precision):
    """The autocast context of a precision, "16", "bf16" or "32" (which is none), on a device type."""
    dtype = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32}[precision]
    return torch.autocast(device, dtype, enabled=precision != "32")


def describe_environment():
    """What results depend on to the byte beside options and inputs: dict of name to int or text."""
    found = {"threads": torch.get_num_threads(), "processor": torch.backends.cpu.get_cpu_capability()}
    found |= {"python": platform.python_version(), "opencv": cv2.__version__}  # of whichever of its builds is installed
    return found | {name: version(name) for name in ("torch", "pytorch-lightning", "numpy", "albumentations")}


@contextmanager
def enough_memory(advice):
    """Within the block, make an InputError of an error that says that memory was too small, or of a loader's lost worker."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        reason = (str(error) or "MemoryError").splitlines()[0]
        if re.search(LOST_WORKER, str(error)):
            advice = "type a smaller --num_workers, and give a container more (docker run --shm-size 8g)"
        elif not isinstance(error, MemoryError) and not re.search(OUT_OF_MEMORY, str(error), re.I):
            raise
        raise InputError(f"too little memory ({reason}): {advice}") from error


def gather(parts):
    """Join what the batches of all processes gave: list of tuples of tensors, row numbers first → arrays sorted by row."""
    gathered = [[tuple(value.cpu() for value in part) for part in parts]]
    if distributed.is_available() and distributed.is_initialized():
        (mine,), gathered = gathered, [None] * distributed.get_world_size()
        distributed.all_gather_object(gathered, mine)
    columns = [torch.cat(column).numpy() for column in zip(*sum(gathered, []), strict=True)]
    return [column[columns[0].argsort()] for column in columns]
