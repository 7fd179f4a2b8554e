"""What a script runs on: GPUs or the CPU, the precision, memory, and what several processes have in common."""

import atexit
import math
import platform
import re
import shutil
import socket
import sys
from importlib.metadata import version
from pathlib import Path

import cv2
import torch
from torch import distributed

from harness.console import InputError, say

SHARED_MEMORY = Path("/dev/shm")  # where the loader's workers put their batches, on Linux


def choose_device(gpus, cpu_processes=None):
    """The torch device type and indices to use: ("cuda", [0, 1]) or ("cpu", [0]).

    Without `gpus` all that can be used. Raises InputError for GPUs that are not there or that torch cannot use.
    """
    if cpu_processes is not None:
        if gpus is not None:
            raise InputError("--gpus and --cpu_processes exclude each other: leave one out")
        return "cpu", list(range(cpu_processes))
    available = torch.cuda.device_count()
    if gpus is None and not available:
        return "cpu", [0]
    problems = {gpu: why_unusable(gpu) for gpu in range(available)}
    usable = [gpu for gpu in problems if problems[gpu] is None]
    instead = f"type --gpus {' '.join(map(str, usable))}" if usable else "type --cpu_processes 1 to run on the CPU"
    if not available:
        instead = "leave --gpus out to run on the CPU"
    missing = [gpu for gpu in gpus or () if gpu >= available]
    if missing:
        typed = " ".join(map(str, gpus))
        raise InputError(f"--gpus {typed}: torch sees {available} GPUs on this machine; {instead}")
    wanted = sorted(set(range(available) if gpus is None else gpus))
    reasons = "; ".join(f"GPU {gpu} {problems[gpu]}" for gpu in wanted if problems[gpu])
    if reasons and (gpus is not None or not usable):
        raise InputError(f"{reasons}. Install another build of torch or a newer driver, or {instead}")
    if reasons:
        say(f"note: {reasons}; going on without")
    return "cuda", [gpu for gpu in wanted if gpu in usable]


def why_unusable(gpu):
    """Why torch cannot compute on a GPU that it counts, as text, or None: its driver, or a wheel without code for it."""
    try:
        major, minor = torch.cuda.get_device_capability(gpu)
        name = torch.cuda.get_device_name(gpu)
    except (RuntimeError, AssertionError) as error:
        return f"cannot be used: {str(error).splitlines()[0]}"
    built = torch.cuda.get_arch_list()  # for example ["sm_75", "sm_80", "compute_120"]; on AMD's cards "gfx…"
    for kind, of_major, of_minor in re.findall(r"\b(sm|compute)_(\d+)(\d)[af]?\b", " ".join(built)):
        # machine code runs on the same major version from its minor one on, PTX ("compute") on all that is newer
        if kind == "sm" and int(of_major) == major and int(of_minor) <= minor:
            return None
        if kind == "compute" and (int(of_major), int(of_minor)) <= (major, minor):
            return None
    if any(arch.startswith("sm_") for arch in built):
        return f"({name}, sm_{major}{minor}) cannot be used: this torch holds code for {' '.join(built)} only"
    return None


def fit_batch(gpus, batch_size, parts):
    """As many of `gpus` as split a batch into equal shares, of `parts` parts of at least 2 photos each: list, or []."""
    fitting = [n for n in range(len(gpus), 0, -1) if batch_size % (n * parts) == 0 and batch_size > n * parts]
    return gpus[: fitting[0]] if fitting else []


def choose_precision(precision, device):
    """The precision asked for, or the fast one of this device: "16", "32" or "bf16". Raises InputError for 16 on a CPU."""
    if precision == "16" and device == "cpu":
        raise InputError("--precision 16 needs a GPU; on the CPU type --precision bf16 or --precision 32")
    if precision is not None:
        return precision
    if device == "cuda":
        return "16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "32"


def compute_exactly(precision):
    """Let cuDNN choose the same algorithm every time, as the original did, and for "32" no TF32: it has 10 bits, not 23."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    if precision == "32":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def describe_environment():
    """What results depend on to the byte beside options and inputs: dict of name to int or text."""
    libraries = ("torch", "pytorch-lightning", "numpy", "albumentations", "pretrainedmodels")
    return {
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
        "opencv": cv2.__version__,  # of whichever of its builds is installed
    }


def autocast(device, precision):
    """The autocast context of a precision, "16", "bf16" or "32" (which is none), on a device type."""
    dtype = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32}[precision]
    return torch.autocast(device, dtype, enabled=precision != "32")


def gather(parts):
    """Join what the batches of all processes gave: list of tuples of tensors, row numbers first → arrays sorted by row."""
    gathered = [[tuple(value.cpu() for value in part) for part in parts]]
    if distributed.is_available() and distributed.is_initialized():
        (mine,), gathered = gathered, [None] * distributed.get_world_size()
        distributed.all_gather_object(gathered, mine)
    columns = zip(*(part for of_process in gathered for part in of_process), strict=True)
    columns = [torch.cat(column).numpy() for column in columns]
    order = columns[0].argsort()
    return [column[order] for column in columns]


def refuse_differences(facts):
    """Raise InputError, in all processes, if the `facts` (dict of name to value) of one are not those of the first."""
    gathered = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, (socket.gethostname(), facts))
    (host, first), problems = gathered[0], []
    for rank, (name, others) in enumerate(gathered):
        for what in sorted(first.keys() | others.keys()):
            here, there = (str(of.get(what, "missing")) for of in (others, first))
            if here != there:
                values = f" is {here}, there {there}" if len(here + there) < 80 else " differs"
                problems.append(f"process {rank} ({name}): {what}{values}")
    if problems:
        atexit.register(leave_processes)
        raise InputError(
            f"not all processes would train the same as process 0 ({host}): {'; '.join(problems)}. All machines must "
            "share the log directory, and have the same data and the same files of this repository"
        )


def leave_processes():
    """Take leave of the other processes, which still live: gloo's threads may abort a Python that ends without it."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def check_shared_memory(image_size, batch_size, n_batches, num_workers, n_processes=1):
    """Raise InputError if /dev/shm is too small for what the loader's workers hold ready: two batches each.

    image_size: (height, width); batch_size: photos; n_batches: in an epoch; n_processes: with workers of their own.
    """
    if not sys.platform.startswith("linux") or not SHARED_MEMORY.is_dir():
        return
    needed = n_processes * min(2 * num_workers, n_batches) * batch_size * math.prod(image_size) * 3
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise InputError(
            f"{SHARED_MEMORY} has {free / 1e6:.3g} MB free, the {num_workers} workers that load photos need "
            f"{needed / 1e6:.3g} MB: type --num_workers 0, or start the container with more (docker run --shm-size "
            f"{math.ceil(needed / 1e9) + 1}g)"
        )


def out_of_memory(error):
    """Which memory an error says was too small, as text, or None if it says something else.

    What torch, oneDNN and Python make of it on a CPU are errors of several kinds.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory"
    words = "DefaultCPUAllocator|could not create a (primitive|memory)|bad_alloc|Cannot allocate memory"
    of_cpu = isinstance(error, MemoryError) or isinstance(error, RuntimeError) and re.search(words, str(error))
    return "the memory" if of_cpu else None
