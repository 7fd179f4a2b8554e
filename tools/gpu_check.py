"""Is all well on this GPU, and how fast is it? One table.

  make gpu-check        # python -m tools.gpu_check

Reads   nothing: photos and weights are drawn.
Writes  gpu_check.json: the rows of the table, with machine and versions.
Expect  one row per check: ok, failed, left out, or a figure. Without a GPU the same checks run on the CPU, on small photos:
        that tells how fast the CPU is and that the checks work, and nothing about a GPU.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from joblib import cpu_count

from dataset import LeafDataset, make_loader, train_augmentation
from harness import console, devices
from harness.files import atomic_write
from models import LeafNet, fold_batch_norm
from tools.generate_sample_data import generate

REPO = Path(__file__).parent.parent
SIZE, SMALL_SIZE = (480, 768), (64, 96)
BACKBONE = "se_resnext50_32x4d"
TOLERANCE = 1e-3  # of float32 logits between two devices, in standard deviations over photos: bf16 would not pass
PHOTOS, EPOCHS, FOLDS, VIEWS = 1821, 70, 5, 8  # of the competition's training, and as many photos to predict


def row(check, value=None, unit="", holds=None, about=""):
    """A row of the table, dict. holds: whether all is well; None for a figure, or without a value for what is left out."""
    result = {True: "ok", False: "failed", None: "left out" if value is None else "figure"}[holds]
    return {"check": check, "result": result, "value": value, "unit": unit, "about": about}


def draw_batch(device, batch, size):
    """uint8 images (batch, height, width, 3) and labels (batch, 4) that sum to 1."""
    images = np.random.default_rng(0).integers(0, 256, (batch, *size, 3), dtype=np.uint8)
    return torch.from_numpy(images).to(device), torch.eye(4, device=device)[torch.arange(batch) % 4]


def draw_network(device):
    """LeafNet with the same weights each time, channels last as in train.py."""
    torch.manual_seed(0)
    return LeafNet(BACKBONE).to(device, memory_format=torch.channels_last)


def check_logits(m):
    images, _ = draw_batch("cpu", 16, SMALL_SIZE)
    on_cpu, here = (draw_network(device).eval()(images.to(device)).detach().cpu() for device in ("cpu", m.device))
    apart = float(((on_cpu - here).abs() / on_cpu.std(0)).max())
    about = f"in standard deviations over photos, less than {TOLERANCE}"
    yield row("float32 logits as on the CPU", apart, holds=apart < TOLERANCE, about=about)


# Runs train.py so that it keeps a resume point after every epoch, and kills it before the epoch of the first argument.
KILLED = """
import os, runpy, sys
epoch, *sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
from harness import run
class KeepAndDie(run.ResumePoint):
    def on_train_epoch_start(self, trainer, module):
        super().on_train_epoch_start(trainer, module)
        if trainer.current_epoch == int(epoch):
            os._exit(9)
run.RESUME_EVERY, run.ResumePoint = -1, KeepAndDie
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def train(m, log_dir, *options, killed_before=99):
    """train.py on rendered photos: metrics of fold 0, DataFrame, and what it printed. RuntimeError if it ends otherwise."""
    if not (m.folder / "sample").exists():
        generate(m.folder / "sample", n_train=41, n_test=8, photo_size=(96, 144), seed=0)
    words = f"--data_dir sample --log_dir {log_dir} --folds 0 --max_epochs 3 --train_batch_size 8 --weights none "
    words += f"--image_size {SMALL_SIZE[0]} {SMALL_SIZE[1]} --backbone "
    words += f"{BACKBONE} --gpus 0" if m.gpu else "squeezenet1_1"
    command = [sys.executable, "-c", KILLED, str(killed_before), str(REPO / "train.py"), *words.split(), *options]
    with tempfile.TemporaryDirectory() as cache:  # as on another machine, where nothing is compiled already
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(command, cwd=m.folder, env=environment, capture_output=True, text=True, timeout=1800)
    if done.returncode != (9 if killed_before < 99 else 0):
        raise RuntimeError(f"train.py ended with status {done.returncode}: {''.join(done.stderr.splitlines()[-1:])}")
    return pd.read_csv(m.folder / log_dir / "metrics" / "fold=0.csv").drop(columns="seconds"), done.stdout


def check_resume(m, *options):
    """Whether a training that is killed before its third epoch and goes on ends as one that is not killed."""
    log_dirs = [f"{kind}{''.join(options)}" for kind in ("whole", "killed")]
    whole, _ = train(m, log_dirs[0], *options)
    train(m, log_dirs[1], *options, killed_before=2)
    killed, printed = train(m, log_dirs[1], *options)
    if "going on after epoch 1" not in printed:
        raise RuntimeError("it did not go on from where it was killed")
    apart = float(np.abs(whole - killed).to_numpy().max())
    holds = len(killed) == 3 and (apart == 0 or m.gpu and apart < 1e-2)  # a GPU's sums may have no fixed order
    about = "to the bit" if apart == 0 else "not to the bit"
    yield row(" ".join(["training", *options, "killed and continued: same metrics"]), apart, holds=holds, about=about)


def time_calls(m, function):
    """Seconds of a call, the mean of several."""
    for repeats in (2, 50 if m.gpu else 5):  # the first two warm up
        started = time.perf_counter()
        for _ in range(repeats):
            function()
        m.synchronise()
    return (time.perf_counter() - started) / repeats


def make_step(m, batch, compiled=False):
    """A function that takes one training step as train.py does."""
    network = draw_network(m.device).train()
    if compiled:
        network.compile()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=True)
    scaler = torch.amp.GradScaler(m.device.type, init_scale=1024.0, enabled=m.precision == "16")
    drawn = draw_batch(m.device, batch, m.size)

    def step(images=drawn[0], labels=drawn[1]):
        optimizer.zero_grad()
        with devices.autocast(m.device.type, m.precision):
            loss = torch.nn.functional.cross_entropy(network(images), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    return step


def measure_training(m):
    """Peak memory and rate of a step for several batches. What comes after it is about the largest that fits."""
    for batch in m.batches if m.gpu else m.batches[:1]:
        step = None  # or the one before would count
        if m.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step = make_step(m, batch)
        m.step = time_calls(m, step)
        m.batch = batch
        if m.gpu:
            yield row(f"GPU memory, batch {batch}", torch.cuda.max_memory_reserved() / 2**30, "GiB")
        yield row(f"training step, precision {m.precision}, batch {batch}", batch / m.step, "photos/s")


def measure_loader(m):
    """Steps on batches from the loader, against the same on data that is on the device already."""
    n_steps, first = (40 if m.gpu else 4), 2 * m.num_workers + 4  # what is ready at the start is not the loader's rate
    images, labels = draw_batch("cpu", 1, m.size)
    dataset = LeafDataset(images.numpy(), ["Train_0"], labels.numpy(), train_augmentation())
    keys = [(0, draw, 0) for draw in range((n_steps + first) * m.batch)]
    loader = make_loader(dataset, keys, m.batch, m.num_workers, pin_memory=m.gpu)
    step = make_step(m, m.batch)
    for number, batch in enumerate(loader):
        if number == first:
            m.synchronise()
            started = time.perf_counter()
        step(*(batch[name].to(m.device, non_blocking=True) for name in ("image", "label")))
    m.synchronise()
    m.fed = (time.perf_counter() - started) / n_steps
    yield row("  fed by the loader, against data on the device", m.step / m.fed, "x", about="goal: at least 0.9")


def measure_prediction(m):
    """As steps 2 and 4 predict, and in the precision in which train.py validates."""
    images, _ = draw_batch(m.device, m.batch, m.size)
    network = draw_network(m.device).eval()
    fold_batch_norm(network.backbone)
    network.to(memory_format=torch.channels_last)

    def predict(precision):
        with torch.inference_mode(), devices.autocast(m.device.type, precision):
            network.probabilities(network(images)).cpu()

    m.predict, m.validate = (time_calls(m, partial(predict, precision)) for precision in ("32", m.precision))
    yield row(f"prediction in float32, batch {m.batch}", m.batch / m.predict, "photos/s")
    if m.precision != "32":
        yield row(f"  --precision {m.precision}, against float32", m.predict / m.validate, "x")


def estimate_hours(m):
    """Hours of all five steps on one device, from the seconds per photo."""
    per_photo = SIZE[0] * SIZE[1] / (m.size[0] * m.size[1] * m.batch)
    training = 2 * EPOCHS * PHOTOS * ((FOLDS - 1) * m.fed + m.validate)
    hours = per_photo * (training + (1 + 2 * VIEWS * FOLDS) * PHOTOS * m.predict) / 3600
    yield row("all five steps at 480x768, computed", hours, "hours")


def measure_compiling(m):
    """What --compile does to the time of a training step, and to a training that is killed and continued."""
    started, step = time.perf_counter(), make_step(m, m.batch, compiled=True)
    step()
    about = f"the first step takes {time.perf_counter() - started:.0f} s; TORCHINDUCTOR_DETERMINISTIC="
    about += os.environ.get("TORCHINDUCTOR_DETERMINISTIC", "0")  # of newer torch: no kernels chosen by timing
    yield row("training step, --compile, against not", m.step / time_calls(m, step), "x", about=about)
    yield from check_resume(m, "--compile")


QUICK = [check_logits, measure_training, measure_loader, measure_prediction, estimate_hours]


def main(m):
    """Print and keep the table. m: the command line, to which is added what the checks need and find out."""
    devices.compute_exactly("32")
    kind, _ = devices.choose_device(None)
    m.device, m.gpu, m.precision = torch.device(kind, 0), kind == "cuda", devices.choose_precision(None, kind)
    m.synchronise = torch.cuda.synchronize if m.gpu else lambda: None
    m.size, m.batch = m.image_size or (SIZE if m.gpu else SMALL_SIZE), m.batches[0]
    name, software = torch.cuda.get_device_name() if m.gpu else "CPU: there is no GPU", devices.describe_environment()
    if m.gpu:
        driver = subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
        software |= {"cuda": torch.version.cuda, "driver": driver}
    record = {"device": name, "size": m.size, "num_workers": m.num_workers, "environment": software, "checks": []}
    print(f"{name}; torch {torch.__version__}, photos of {m.size[0]}x{m.size[1]}", flush=True)

    def add(found):
        shown = "" if found["value"] is None else f"{found['value']:.4g} {found['unit']}"
        print(f"{found['check']:56} {found['result']:8} {shown:>16}  {found['about']}".rstrip(), flush=True)
        record["checks"].append(found)
        with atomic_write(m.out, "w") as file:
            json.dump(record, file, indent=1)

    with tempfile.TemporaryDirectory() as folder:
        m.folder = Path(folder)
        for check in QUICK + [check_resume, measure_compiling] * (not m.quick):
            try:
                for found in check(m):
                    add(found)
            except (Exception, console.InputError) as error:  # one check's error loses no other
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
                too_large = re.search(devices.OUT_OF_MEMORY, reason, re.I)  # no fault of the GPU
                add(row(check.__name__, holds=None if too_large else False, about=reason))
    if failed := [found["check"].strip() for found in record["checks"] if found["result"] == "failed"]:
        raise console.InputError(f"{'; '.join(failed)}: see the table, and {m.out}")


if __name__ == "__main__":
    parser, size = console.Parser(__doc__), {"type": console.pixels, "nargs": 2, "metavar": ("H", "W")}
    add, count = parser.add_argument, {"type": console.positive, "nargs": "+", "metavar": "N"}
    add("--image_size", **size, help="height and width of the photos; by default 480 768, on a CPU 64 96")
    add("--batches", **count, default=[8, 16, 32], help="batch sizes to try, on a CPU the first")
    add("--num_workers", type=console.not_negative, default=min(8, cpu_count()), help="processes that load photos")
    add("--quick", action="store_true", help="leave out what takes minutes: trainings, --compile")
    add("--out", type=console.file_or_folder, default="gpu_check.json", help="file for the table")
    main(console.parse_args(parser))
