"""How fast ours is on this machine, against the plain way of doing the same in the same run.

  python -m tools.benchmark

Reads   nothing: it renders its own photos of 2048x1365, as large as the competition's.
Expect  a few minutes on a CPU; a table of medians with ratios, and an estimate of the five steps at 480x768, 70 epochs.
"""

import resource
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import pytorch_lightning as pl
import torch

from dataset import EpochSampler, LeafDataset, fit_photo, load_photo, make_loader, train_augmentation
from harness.console import Parser, positive, quiet_libraries
from harness.devices import autocast, choose_device, choose_precision
from harness.photos import cache_images
from harness.prediction import COMPILE_FROM, compile_network, fold_batch_norm
from models import IMAGENET_MEAN, IMAGENET_STD, LeafModule, LeafNet
from tools.generate_sample_data import render_leaf
from utils import CLASSES, N_FOLDS

SIZE = (480, 768)
TRAIN, TEST, EPOCHS, DRAWS = 1821, 1821, 70, 8  # the competition's photos, the original's epochs and TTA


def interleaved(tasks, device, repeats):
    """Median seconds of each of several functions, run in turns so that all see the same state of the machine."""
    seconds = {name: [] for name in tasks}
    for turn in range(repeats + 1):
        for name, task in tasks.items():
            started = time.perf_counter()
            task()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def row(name, rate, unit, plain=None):
    ratio = f"{rate / plain:8.2f} x {plain:.1f}" if plain else ""
    print(f"{name:58}{rate:10.1f} {unit:14}{ratio}", flush=True)


def bench_samples(folder, repeats):
    """Photos a second and core: decode, cached read, augment; the whole sample from the photo and from the cache."""
    (folder / "images").mkdir()
    ids = [f"Train_{i}" for i in range(6)]
    for i, image_id in enumerate(ids):
        photo, _ = render_leaf(CLASSES[i % len(CLASSES)], 1365, 2048, np.random.default_rng(i))
        cv2.imwrite(str(folder / "images" / f"{image_id}.jpg"), cv2.cvtColor(photo, cv2.COLOR_RGB2BGR))
    paths = [folder / "images" / f"{image_id}.jpg" for image_id in ids]
    images = cache_images("train", ids, ids, folder, SIZE, folder / "cache", fit_photo)
    augmentation = train_augmentation()
    dataset = LeafDataset(images, ids, augmentation=augmentation, seed=1)
    draw = iter(range(10**9))

    def plain_sample():
        for path in paths:
            image = augmentation(image=load_photo(path, SIZE))["image"]
            ((image.astype(np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD).astype(np.float32)

    tasks = {
        "decode 2048x1365": lambda: [cv2.imread(str(path)) for path in paths],
        "decode and resize": lambda: [load_photo(path, SIZE) for path in paths],
        "cached read": lambda: [np.array(images[i]) for i in range(len(ids))],
        "cached read and augment": lambda: [dataset[0, next(draw), i] for i in range(len(ids))],
        "plain": plain_sample,
    }
    seconds = interleaved(tasks, torch.device("cpu"), repeats)
    rates = {name: len(ids) / value for name, value in seconds.items()}
    for name in list(tasks)[:3]:
        row(f"{name}, 480x768", rates[name], "photos/s/core")
    row("a training sample from the cache, 480x768", rates["cached read and augment"], "photos/s/core", rates["plain"])
    print(
        f"  = {1000 / rates['cached read and augment']:.2f} ms, against {1000 / rates['plain']:.1f} ms from the photo"
    )
    return dataset, ids


def bench_loader(dataset, n, workers, batch_size=32):
    """Photos a second that the whole training loader delivers with `workers` processes."""
    sampler = EpochSampler(np.arange(n * 100) % n, batch_size, seed=1, fold=0)
    loader = make_loader(dataset, sampler, batch_size, workers)
    batches = iter(loader)
    for _ in range(2):
        next(batches)
    started, seen = time.perf_counter(), 0
    for batch in batches:
        seen += len(batch["image"])
    return seen / (time.perf_counter() - started)


def optimise(loss, network, optimizer, scaler):
    """What Lightning does with the loss of a step in train.py: gradients, unscaled, clipped at 1, and Adam."""
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()


def make_step(network, size, batch, device, precision, plain):
    """A function that takes one training step as train.py does, or as plain float32 code would."""
    module = LeafModule(network.train(), "cosine", 1e-3, 0).to(device)
    quiet_libraries()
    # the schedule asks it for the number of epochs
    module.trainer = pl.Trainer(max_epochs=1, logger=False, enable_checkpointing=False)
    network = network.to(memory_format=torch.contiguous_format if plain else torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3) if plain else module.configure_optimizers()["optimizer"]
    images = torch.randint(0, 256, (batch, *size, 3), dtype=torch.uint8, device=device)
    labels = torch.full((batch, 4), 0.25, device=device)
    scaler = torch.amp.GradScaler(enabled=precision == "16" and not plain)

    def step():
        inputs = network.normalise(images)
        with autocast(device.type, "32" if plain else precision):
            loss = module.loss(network.logits(inputs.contiguous() if plain else inputs), labels)
        optimise(loss, network, optimizer, scaler)

    return step


def make_inference(network, size, batch, device, precision, plain, compiled=False):
    """A function that predicts one batch as harness.prediction does, or as plain float32 code would."""
    network = network.eval()
    if not plain:
        fold_batch_norm(network.backbone)
    network = network.to(device, memory_format=torch.contiguous_format if plain else torch.channels_last)
    images = torch.randint(0, 256, (batch, *size, 3), dtype=torch.uint8, device=device)

    def infer():
        with torch.inference_mode(), autocast(device.type, "32" if plain else precision):
            logits = predicts.logits(predicts.normalise(images).contiguous()) if plain else predicts(images)
            logits.softmax(1).cpu()

    predicts = network
    if compiled:
        started = time.perf_counter()
        with torch.inference_mode(), autocast(device.type, precision):
            predicts = compile_network(network, images)
        print(f"  compiled in {time.perf_counter() - started:.0f} s, as jobs of {COMPILE_FROM / 1e6:.0f} Mpixel are")
    return infer


def bench_network(size, batch, device, precision, repeats, training=True):
    """Images a second of a training step and of inference, ours and plain; returns ours."""

    def make(kind, plain, **how):
        return kind(LeafNet(), size, batch, device, precision, plain, **how)

    groups = [{"train step": make(make_step, False), "plain": make(make_step, True)}] if training else []
    groups.append({"inference": make(make_inference, False), "plain": make(make_inference, True)})
    if device.type == "cpu":
        groups[-1]["inference, compiled"] = make(make_inference, False, compiled=True)
    ours = {}
    for tasks in groups:
        rates = {name: batch / seconds for name, seconds in interleaved(tasks, device, repeats).items()}
        plain = rates.pop("plain")
        ours |= rates
        for name, rate in rates.items():
            row(f"{name}, {size[0]}x{size[1]}, batch {batch}, precision {precision}", rate, "images/s", plain)
    return ours


def main(args):
    device, indices = choose_device(None)
    precision = choose_precision(None, device)
    device = torch.device(device, indices[0])
    print(
        f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    print(f"{'':58}{'ours':>10} {'':14}   ratio x plain float32 eager of this run")
    with tempfile.TemporaryDirectory() as folder:
        dataset, ids = bench_samples(Path(folder), args.repeats)
        loader = bench_loader(dataset, len(ids), args.num_workers)
        row(f"whole loader, 480x768, {args.num_workers} workers", loader, "photos/s")
    if device.type == "cuda":
        full = bench_network(SIZE, 32, device, precision, args.repeats)
        row("loader, against what the GPU's training step takes", loader, "photos/s", full["train step"])
        train_rate, test_rate = min(loader, full["train step"]), min(loader, full["inference"])
    else:
        bench_network((128, 128), 32, device, precision, args.repeats)
        rates = bench_network((160, 256), 8, device, precision, args.repeats)
        train_rate = rates["train step"] * 160 * 256 / (SIZE[0] * SIZE[1])
        test_rate = bench_network(SIZE, 4, device, precision, args.repeats, training=False)["inference, compiled"]
    folds = N_FOLDS * EPOCHS
    seconds = 2 * folds * (TRAIN * 0.8 / train_rate + TRAIN * 0.2 / test_rate)
    seconds += (TRAIN + 2 * TEST * DRAWS * N_FOLDS) / test_rate
    print(f"five steps at 480x768, 70 epochs, on this machine: about {seconds / 3600:.1f} hours")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the GPU" if device.type == "cuda" else ""
    print(f"peak memory {peak:.1f} GiB{memory}")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--repeats", type=positive, default=5, help="measurements of each, after one to warm up")
    parser.add_argument("--num_workers", type=positive, default=torch.get_num_threads(), help="of the whole loader")
    main(parser.parse_args())
