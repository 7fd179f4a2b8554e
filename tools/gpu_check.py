"""Is all well on this GPU, and how long will a reproduction take? A table, in at most nine minutes on one GPU.

  make gpu-check        # python -m tools.gpu_check

Reads   nothing: photos are rendered, weights drawn.
Writes  gpu_check.json: every figure, with machine and versions.
Expect  a row a check: ok, failed, or a figure. On a machine without a GPU the same checks run on the CPU, on small
        photos, and say so: that shows that they work, and nothing about a GPU.
"""

import json
import os
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
from pytorch_lightning import Trainer
from torch.utils.data import DataLoader

from dataset import EpochSampler, LeafDataset, make_loader, train_augmentation
from harness.callbacks import UnscaleFirst
from harness.console import InputError, Parser, file_or_folder, not_negative, parse_args, quiet_libraries
from harness.devices import (
    autocast,
    check_shared_memory,
    choose_device,
    choose_precision,
    compute_exactly,
    describe_environment,
    out_of_memory,
)
from harness.files import atomic_write
from harness.prediction import fold_batch_norm
from models import LeafModule, LeafNet
from tools.benchmark import optimise

REPO = Path(__file__).parent.parent
SIZE, SMALL_SIZE = (480, 768), (64, 96)  # of the photos: on a GPU, on a CPU
BATCHES = (8, 16, 32)
BACKBONE = "se_resnext50_32x4d"  # of the training that is killed
TOLERANCE = 1e-3  # of float32 logits between two devices, in standard deviations over photos: bf16 would not pass
PHOTOS = {"train": 1821, "test": 1821, "epochs": 70, "folds": 5, "draws": 8}


class Table:
    """The checks as they come: printed as rows, and handed to `keep`, with all that came before.

    keep: a function of the list of rows, each a dict.
    """

    def __init__(self, keep=lambda rows: None):
        self.rows, self.keep = [], keep

    def add(self, check, result, value=None, unit="", about=""):
        """result: "ok", "failed", "figure" or "left out"; value: float or None; about: text."""
        self.rows.append({"check": check, "result": result, "value": value, "unit": unit, "about": about})
        shown = "" if value is None else f"{value:.4g} {unit}"
        print(f"{check:58} {result:9} {shown:>16}  {about}".rstrip(), flush=True)
        self.keep(self.rows)

    def expect(self, check, holds, value, unit="", about=""):
        self.add(check, "ok" if holds else "failed", float(value), unit, about)


def draw_batch(device, batch, size):
    """uint8 images (batch, height, width, 3) and labels (batch, 4) that sum to 1."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (batch, *size, 3), dtype=np.uint8)).to(device)
    return images, torch.eye(4, device=device)[torch.arange(batch, device=device) % 4]


def draw_network(device):
    """LeafNet with the same drawn weights each time."""
    torch.manual_seed(0)
    return LeafNet().to(device, memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------- is all well?


def check_agreement(table, device):
    """Float32 predictions of the CPU and of the device."""
    images, _ = draw_batch("cpu", 16, SMALL_SIZE)
    with torch.inference_mode():
        expected = draw_network("cpu").eval()(images)
        found = draw_network(device).eval()(images.to(device)).cpu()
    apart = ((expected - found).abs() / expected.std(0)).max().item()
    about = f"in standard deviations over photos, less than {TOLERANCE}"
    table.expect("float32 logits as on the CPU", apart < TOLERANCE, apart, about=about)


class Watched(LeafModule):
    """Keeps the losses; of the last step the gradients before clipping; under a loss scaler the norms that Adam sees."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.losses, self.norms, self.gradient = [], [], None

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach())
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.gradient = self._gradient()

    def configure_optimizers(self):
        configured = super().configure_optimizers()
        configured["optimizer"].register_step_pre_hook(lambda optimizer, *_: self._keep_norm(optimizer))
        return configured

    def _gradient(self):
        return torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None])

    def _keep_norm(self, optimizer):
        if self.gradient is not None:  # without a scaler the first gradients are computed within the step
            left = getattr(optimizer, "grad_scale", None)  # what a fused step still has to divide by
            self.norms.append(self._gradient().norm() / (1 if left is None else left))


def fit(network, batches, device, **options):
    """Train on these batches, dicts of tensors, as train.py does; returns the Watched. options: of pl.Trainer."""
    module = Watched(network, "cosine", 1e-3, 0)
    trainer = Trainer(
        max_epochs=1,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index] if device.type == "cuda" else 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return module


def check_accumulation(table, device):
    """--accumulate_grad_batches 2 gives the gradient of the whole batch; batch norm in evaluation mode, float32."""
    images, labels = draw_batch("cpu", 8, SMALL_SIZE)
    gradients = []
    for parts in (1, 2):
        some = zip(images.chunk(parts), labels.chunk(parts), strict=True)
        batches = [{"image": image, "label": label} for image, label in some]
        network = draw_network("cpu").eval()  # which Lightning leaves as it is
        gradients.append(fit(network, batches, device, accumulate_grad_batches=parts).gradient)
    apart = ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()
    table.expect("the gradient of two parts is that of the whole", apart < 1e-3, apart, about="relative")


def check_fp16(table, device, size, steps):
    """Training in fp16 with the loss scaler: the loss falls, and the longest gradient has a length of 1 in Adam's eyes.

    At first it is longer, so that it is clipped; clipped before unscaling, it would be a thousandth of that or less.
    """
    images, labels = draw_batch("cpu", 8, size)
    on_cpu = device.type == "cpu"
    # on a CPU torch's own first scale, 65,536, would leave out more steps than there are here
    plugin = UnscaleFirst("16-mixed", device.type, torch.amp.GradScaler("cpu", init_scale=2.0**10) if on_cpu else None)
    batches = [{"image": images, "label": labels}] * steps
    module = fit(draw_network("cpu"), batches, device, plugins=[plugin], gradient_clip_val=1.0)
    losses, norms = (torch.stack(values).float().cpu() for values in (module.losses, module.norms))
    table.expect("fp16 with the loss scaler: the loss falls", losses[-1] < losses[0], losses[-1] / losses[0], "x")
    # a step whose gradients have overflowed is left out by the scaler, after this hook
    longest = norms[norms.isfinite()].max()
    table.expect("fp16: clipped at 1, after unscaling", 0.9 < longest < 1.001, longest)


KILLED = """
import os, runpy, sys
from harness import callbacks
epoch, *command = sys.argv[1:]
callbacks.RESUME_EVERY = 0
keep = callbacks.ResumePoint.on_train_epoch_start
def keep_and_die(self, trainer, module):
    keep(self, trainer, module)
    if trainer.current_epoch == int(epoch):
        os._exit(9)
callbacks.ResumePoint.on_train_epoch_start = keep_and_die
sys.argv = command
runpy.run_path(command[0], run_name="__main__")
"""


def run_train(folder, log_dir, *options, die_before=99):
    """train.py on the rendered sample, by the device's default precision; returns its seconds and its output.

    die_before: an epoch that it does not live to see. Raises RuntimeError if it ends in another way than expected.
    """
    words = ["--data_dir", "sample", "--weights", "none", "--image_size", *SMALL_SIZE, "--train_batch_size", 8]
    words += ["--backbone", BACKBONE, "--max_epochs", 3, "--folds", 0, "--log_dir", log_dir, *options]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(die_before), str(REPO / "train.py"), *map(str, words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode != (9 if die_before < 99 else 0):
        raise RuntimeError(f"status {done.returncode}: {''.join(done.stderr.strip().splitlines()[-1:])}")
    return time.perf_counter() - started, done.stdout


def check_resume(table, folder, device):
    """A training that was killed before its third epoch goes on to the numbers of one that was not."""
    made = ["-m", "tools.generate_sample_data", "--out", folder / "sample", "--n_train", "41", "--n_test", "8"]
    made = [sys.executable, *made, "--photo_size", "96", "144"]
    done = subprocess.run(made, cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the rendered photos: {''.join(done.stderr.strip().splitlines()[-1:])}")
    where = ["--gpus", device.index] if device.type == "cuda" else ["--cpu_processes", 1]
    run_train(folder, "whole", *where)
    run_train(folder, "killed", *where, die_before=2)
    _, said = run_train(folder, "killed", *where)
    if "going on after epoch 1" not in said:
        raise RuntimeError("it did not go on from where it was killed")
    whole, killed = (read_metrics(folder / name) for name in ("whole", "killed"))
    apart = np.abs(whole - killed).to_numpy().max()
    about = "to the bit" if apart == 0 else "not to the bit"
    holds = apart == 0 or device.type == "cuda" and apart < 1e-2  # not every sum of a GPU has a fixed order
    table.expect("killed and continued: the same metrics", len(killed) == 3 and holds, apart, about=about)


def read_metrics(log_dir):
    return pd.read_csv(log_dir / "metrics" / "fold=0.csv").drop(columns="seconds")


def check_several(table, folder, gpus):
    """A fold on two GPUs runs; two folds on one each give what one GPU gives. After check_resume, in the same folder."""
    if len(gpus) < 2:
        table.add("a fold on two GPUs (DDP); a fold each", "left out", about="there are not two GPUs")
        return
    seconds, _ = run_train(folder, "ddp", "--gpus", *gpus[:2])
    learned = read_metrics(folder / "ddp")["train_loss"]
    table.expect("a fold on two GPUs (DDP): the loss falls", learned.iloc[-1] < learned.iloc[0], seconds, "s")
    run_train(folder, "parallel", "--gpus", *gpus[:2], "--folds", 0, 1, "--parallel_folds")
    apart = np.abs(read_metrics(folder / "whole") - read_metrics(folder / "parallel")).to_numpy().max()
    table.expect("two folds, one on each GPU: the metrics of one GPU", apart < 1e-2, apart)


# ---------------------------------------------------------------------------------------------- how fast?


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_step(device, size, batch, precision, channels_last=True, compiled=False, fused=True):
    """A function of images and labels, by default always the same, that takes one training step as train.py does."""
    module = LeafModule(draw_network(device), "cosine", 1e-3, 0)
    network = module.network.train()
    if not channels_last:
        network = network.to(memory_format=torch.contiguous_format)
    run = torch.compile(network) if compiled else network
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=precision == "16")
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=fused)
    of_default = draw_batch(device, batch, size)

    def step(images=of_default[0], labels=of_default[1]):
        with autocast(device.type, precision):
            # the photos come in channels last, and one of both is enough for a convolution to compute that way
            logits = run(images) if channels_last else network.logits(network.normalise(images).contiguous())
            loss = module.loss(logits, labels)
        optimise(loss, network, optimizer, scaler)

    return step


def time_steps(step, device):
    """Seconds of a step, on average of as many as fit into a few seconds, after some to warm up."""
    seconds = 4 if device.type == "cuda" else 0.5
    for _ in range(3 if device.type == "cuda" else 1):
        step()
    synchronise(device)
    n, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        step()
        n += 1
        if n % 5 == 0:
            synchronise(device)
    synchronise(device)
    return (time.perf_counter() - started) / n


def measure_memory(table, device, size, precision):
    """Peak memory of a step for several batches; returns the largest that fits. Raises RuntimeError if none does."""
    fitting = BATCHES[0] if device.type == "cpu" else None
    for batch in BATCHES:
        check = f"memory at {size[0]}x{size[1]}, batch {batch}"
        if device.type == "cpu":
            table.add(check, "left out", about="there is no GPU")
            continue
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            step = make_step(device, size, batch, precision)
            for _ in range(2):  # Adam's state is made at the end of the first
                step()
            synchronise(device)
        except RuntimeError as error:
            if out_of_memory(error) is None:
                raise
            table.add(check, "figure", about="more than there is: --accumulate_grad_batches")
            break
        fitting = batch
        table.add(check, "figure", torch.cuda.max_memory_reserved(device) / 2**30, "GiB")
        del step
    if fitting is None:
        raise RuntimeError(f"not even a batch of {BATCHES[0]} fits: how fast it is cannot be told")
    return fitting


def measure_step(table, device, size, batch, precision):
    """Seconds of a step as train.py takes it."""
    usual = time_steps(make_step(device, size, batch, precision), device)
    table.add(f"training step, {size[0]}x{size[1]}, batch {batch}", "figure", batch / usual, "photos/s")
    return usual


def measure_busy(table, device, size, batch, precision):
    """The share of the time in which kernels run, while steps follow each other on data that is on the GPU."""
    if device.type == "cpu":
        table.add("share of the time in which the GPU computes", "left out", about="there is no GPU")
        return
    step, n = make_step(device, size, batch, precision), 5
    for _ in range(3):
        step()
    synchronise(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        started = time.perf_counter()
        for _ in range(n):
            step()
        synchronise(device)
        seconds = time.perf_counter() - started
    computing = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6
    table.add("share of the time in which the GPU computes", "figure", computing / seconds, "x")


def measure_ratio(table, what, about, device, size, batch, precision, usual, **other):
    """How much faster a step is with a setting than without; other: what make_step is to do otherwise than train.py."""
    seconds = time_steps(make_step(device, size, batch, precision, **other), device)
    table.add(f"  {what}, against not", "figure", seconds / usual, "x", about)


def measure_free_cudnn(table, device, size, batch, precision, usual):
    """What cuDNN would gain if it might choose any algorithm, by trying them out; not on a CPU, which has none."""
    what = "  cudnn.benchmark, not deterministic, against off"
    if device.type == "cpu":
        table.add(what, "left out", about="there is no GPU")
        return
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
    try:
        free = time_steps(make_step(device, size, batch, precision), device)
    finally:
        compute_exactly("16")
    table.add(what, "figure", usual / free, "x", "off in train.py")


def measure_compiling(table, device, size, batch, precision, usual):
    """What torch.compile of the network does to the time of a step, and how long it takes; the last: it takes minutes."""
    what = "  torch.compile of the network, against not"
    if device.type == "cpu":
        table.add(what, "left out", about="there is no GPU")
        return
    started = time.perf_counter()
    step = make_step(device, size, batch, precision, compiled=True)
    try:
        step()
    except Exception as error:  # whatever a compiler says: train.py does without it
        table.add(what, "left out", about=" ".join(str(error).split())[:80])
        return
    synchronise(device)
    about = f"off in train.py; the first step takes {time.perf_counter() - started:.0f} s"
    table.add(what, "figure", usual / time_steps(step, device), "x", about)


class Noise:
    """Indexable as the image cache is: row → uint8 (height, width, 3)."""

    def __init__(self, size):
        self.images = np.random.default_rng(0).integers(0, 256, (64, *size, 3), dtype=np.uint8)

    def __getitem__(self, row):
        return self.images[row % len(self.images)]


def measure_loader(table, device, size, batch, precision, usual, workers):
    """Steps on batches from the loader, against the same on data that is on the device already."""
    n_steps = 40 if device.type == "cuda" else 4
    check_shared_memory(size, batch, n_steps, workers)
    first = 2 * workers + 4
    n = (n_steps + first) * batch
    dataset = LeafDataset(
        Noise(size), [f"Train_{i}" for i in range(n)], np.eye(4)[np.arange(n) % 4], train_augmentation()
    )
    loader = make_loader(dataset, EpochSampler(np.arange(n), batch, 0, 0), batch, workers, device.type == "cuda")
    step = make_step(device, size, batch, precision)
    for number, data in enumerate(loader):
        if number == first:  # what the loader had ready while the first step warmed up is not its rate
            synchronise(device)
            started = time.perf_counter()
        step(*(data[name].to(device, non_blocking=True) for name in ("image", "label")))
    synchronise(device)
    seconds = (time.perf_counter() - started) / n_steps
    about = f"{workers} workers; goal: at least 0.9"
    table.add("steps fed by the loader, against data on the device", "figure", usual / seconds, "x", about)
    return seconds


def measure_prediction(table, device, size, batch, low_precision):
    """Seconds a photo in float32, as steps 2 and 4 predict, and in the precision in which train.py validates."""
    network, (images, _) = draw_network(device).eval(), draw_batch(device, batch, size)
    fold_batch_norm(network.backbone)

    def predict(precision):
        with torch.inference_mode(), autocast(device.type, precision):
            network(images).softmax(1)

    full = time_steps(partial(predict, "32"), device) / batch
    table.add("prediction in float32", "figure", 1 / full, "photos/s")
    if low_precision == "32":
        return full, full
    lower = time_steps(partial(predict, low_precision), device) / batch
    table.add(f"  --precision {low_precision}, against it", "figure", full / lower, "x", "off in steps 2 and 4")
    return full, lower


def estimate_hours(train, validate, predict, size):
    """Hours of all five steps at 480x768 on one device, from the seconds a photo at `size`, by the number of pixels."""
    scale = SIZE[0] * SIZE[1] / (size[0] * size[1])
    n, folds = PHOTOS["train"], PHOTOS["folds"]
    round_of = PHOTOS["epochs"] * n * ((folds - 1) * train + validate)
    tests = PHOTOS["test"] * PHOTOS["draws"] * folds * predict
    return scale * (2 * round_of + n * predict + 2 * tests) / 3600


def describe_gpu(device):
    """What of a GPU's software figures depend on, dict of name to text."""
    if device.type == "cpu":
        return {}
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    return {"driver": driver, "cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}


def main(args):
    quiet_libraries()
    kind, indices = choose_device(None)
    device = torch.device(kind, indices[0])
    on_gpu = kind == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    compute_exactly("32")
    size, precision = SIZE if on_gpu else SMALL_SIZE, choose_precision(None, kind)
    name = (
        torch.cuda.get_device_name(device)
        if on_gpu
        else "CPU: there is no GPU, so this shows only that the checks work"
    )
    record = {"device": name, "environment": describe_environment() | describe_gpu(device), "size": size}

    def keep(rows):
        with atomic_write(args.out, "w") as file:
            json.dump(record | {"checks": rows}, file, indent=1)

    table, started = Table(keep), time.perf_counter()
    print(f"{name}; torch {torch.__version__}, {args.num_workers} workers", flush=True)

    def attempt(title, check, *arguments, **options):
        """The result of a check, or None, with a row that says so, if it ends in an error, any one: the others still count."""
        try:
            return check(table, *arguments, **options)
        except (Exception, InputError) as error:
            table.add(title, "failed", about=f"{type(error).__name__}: {' '.join(str(error).split())}"[:200])

    attempt("float32 logits as on the CPU", check_agreement, device)
    attempt("the gradient of two parts is that of the whole", check_accumulation, device)
    attempt("fp16 with the loss scaler", check_fp16, device, SMALL_SIZE, 12 if on_gpu else 3)
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            table.add("killed and continued", "left out", about="--quick")
        else:
            attempt("killed and continued: the same metrics", check_resume, Path(folder), device)
            attempt("several GPUs", check_several, Path(folder), indices if on_gpu else [])
    batch = attempt("memory", measure_memory, device, size, precision) or BATCHES[0]
    usual = attempt("training step", measure_step, device, size, batch, precision)
    of_step = device, size, batch, precision
    if usual:
        for what, about, other in (
            ("channels last", "on in train.py", {"channels_last": False}),
            ("fused Adam", "on in train.py", {"fused": False}),
        ):
            attempt(f"  {what}, against not", measure_ratio, what, about, *of_step, usual, **other)
        attempt("  cudnn.benchmark, not deterministic, against off", measure_free_cudnn, *of_step, usual)
    attempt("share of the time in which the GPU computes", measure_busy, *of_step)
    fed = usual and attempt("loader", measure_loader, *of_step, usual, args.num_workers)
    predicted = attempt("prediction", measure_prediction, *of_step)
    if fed and predicted:
        hours = estimate_hours(fed / batch, predicted[1], predicted[0], size)
        table.add("all five steps at 480x768 on this device, computed", "figure", hours, "hours")
    if usual:
        attempt("  torch.compile of the network, against not", measure_compiling, *of_step, usual)
    failed = [row["check"] for row in table.rows if row["result"] == "failed"]
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes; {len(failed)} checks failed")
    if failed:
        raise InputError(f"{'; '.join(failed)}: see the table, and {args.out}")


if __name__ == "__main__":
    parser = Parser(__doc__)
    group = parser.add_argument_group("how")
    group.add_argument(
        "--num_workers", type=not_negative, default=min(8, cpu_count()), help="processes that load photos"
    )
    group.add_argument("--quick", action="store_true", help="without the check that trains in processes of its own")
    group.add_argument(
        "--out", type=file_or_folder, default="gpu_check.json", metavar="JSON", help="where the figures go"
    )
    main(parse_args(parser))
