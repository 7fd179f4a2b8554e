"""What a script runs on: GPUs or the CPU, and the precision."""

import torch
from torch import distributed

from harness.console import InputError


def choose_device(gpus, cpu_processes=None):
    """The torch device type and indices to use: ("cuda", [0, 1]) or ("cpu", [0]).

    Raises InputError for GPUs that are not there.
    """
    available = torch.cuda.device_count()
    if cpu_processes is not None:
        if gpus is not None:
            raise InputError("--gpus and --cpu_processes exclude each other: leave one out")
        return "cpu", list(range(cpu_processes))
    if gpus is None:
        return ("cuda", list(range(available))) if available else ("cpu", [0])
    missing = [gpu for gpu in gpus if gpu >= available]
    if missing:
        instead = (
            f"type --gpus {' '.join(map(str, range(available)))}" if available else "leave --gpus out to run on the CPU"
        )
        raise InputError(f"--gpus {' '.join(map(str, gpus))}: torch sees {available} GPUs on this machine; {instead}")
    return "cuda", sorted(set(gpus))


def choose_precision(precision, device):
    """The precision asked for, or the fast one of this device: "16", "32" or "bf16". Raises InputError for 16 on a CPU."""
    if precision == "16" and device == "cpu":
        raise InputError("--precision 16 needs a GPU; on the CPU type --precision bf16 or --precision 32")
    if precision is not None:
        return precision
    if device == "cuda":
        return "16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "32"


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
