"""Steps 1 and 3: train SE-ResNeXt50 on five folds.

  python train.py --train_batch_size 32 --gpus 0 1
  python train.py --train_batch_size 32 --gpus 0 1 --soft_labels_filename soft_labels.csv --log_dir logs_submit_distill

Reads   DATA_DIR/train.csv and images/; in step 3 also the soft labels that step 2 wrote.
Writes  LOG_DIR: hparams.yaml, folds.csv, the six best checkpoints of each fold, metrics/, results.csv.
Expect  a progress bar an epoch; 70 epochs a fold. A fold that is finished is not trained again.
"""

import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils.tensorboard import SummaryWriter

from dataset import (
    CachedImages,
    EpochSampler,
    LeafDataset,
    cache_images,
    make_loader,
    mix_labels,
    read_probabilities,
    read_train_csv,
    train_augmentation,
)
from models import LeafModule, LeafNet, find_weights, load_backbone_weights
from utils import (
    CLASSES,
    SOURCES,
    InputError,
    atomic_write,
    build_parser,
    choose_device,
    choose_precision,
    collect_results,
    column_aucs,
    derive_seed,
    finish_fold,
    is_finished,
    is_first_process,
    is_one_of_several_processes,
    parse_args,
    quiet_libraries,
    remove_fold,
    say,
    sha256,
    split_folds,
    start_run,
    write_csv,
)

LAUNCHED = "PLANT_PATHOLOGY_LAUNCHED"  # set for the processes that train.py itself has started


@dataclass
class TrainingData:
    """The labelled photos, in the row order of train.csv."""

    image_ids: pd.Series
    folds: np.ndarray  # int (n,)
    hard_labels: np.ndarray  # float32 (n, 4), one-hot: what validation compares with
    labels: np.ndarray  # float32 (n, 4): what is trained on, hard or mixed with soft labels
    images: CachedImages


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all; Lightning's own is not atomic across file systems."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        with atomic_write(path) as file:
            torch.save(checkpoint, file)


class EpochLog(pl.Callback):
    """One row an epoch, as CSV (LOG_DIR/metrics/fold=K.csv) and for TensorBoard (LOG_DIR/metrics/fold=K/)."""

    def __init__(self, log_dir, fold):
        self.path = Path(log_dir) / "metrics" / f"fold={fold}.csv"
        self.rows = []

    def on_fit_start(self, trainer, module):
        self.board = SummaryWriter(self.path.with_suffix("")) if trainer.is_global_zero else None

    def on_fit_end(self, trainer, module):
        if trainer.is_global_zero:
            self.board.close()

    def on_train_epoch_start(self, trainer, module):
        self.started = time.perf_counter()
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_epoch_end(self, trainer, module):
        metrics = {name: float(trainer.callback_metrics[name]) for name in ("train_loss", "val_loss", "val_roc_auc")}
        self.rows.append(
            {
                "epoch": trainer.current_epoch,
                "lr": self.lr,
                **metrics,
                "seconds": round(time.perf_counter() - self.started, 2),
            }
        )
        if trainer.is_global_zero:
            write_csv(self.path, pd.DataFrame(self.rows))
            for name in ("lr", *metrics):
                self.board.add_scalar(name, self.rows[-1][name], trainer.current_epoch)
            self.board.flush()


def train_fold(args, fold, data, weights, device, indices):
    """Train one fold and record its best epoch in the log directory. `device`, `indices`: as of choose_device."""
    torch.manual_seed(derive_seed(args.seed, fold))  # the head; order and augmentation have seeds of their own
    network = LeafNet(args.backbone)
    if weights is not None:
        load_backbone_weights(network, weights)
    module = LeafModule(network, args.lr_schedule)

    log = EpochLog(args.log_dir, fold)
    checkpoints = ModelCheckpoint(
        args.log_dir,
        f"fold={fold}-" + "epoch={epoch}-val_loss={val_loss:.4f}-val_roc_auc={val_roc_auc:.4f}",
        monitor="val_roc_auc",
        mode="max",
        save_top_k=6,
        save_weights_only=True,
        save_on_train_epoch_end=True,
        auto_insert_metric_name=False,
        enable_version_counter=False,
    )
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=indices if device == "cuda" else len(indices),
        strategy="ddp" if len(indices) > 1 else "auto",
        precision={"16": "16-mixed", "32": "32-true", "bf16": "bf16-mixed"}[args.precision],
        max_epochs=args.max_epochs,
        gradient_clip_val=args.gradient_clip_val,
        accumulate_grad_batches=args.accumulate_grad_batches,
        callbacks=[log, checkpoints, TQDMProgressBar(refresh_rate=10, leave=True)],
        plugins=[WholeCheckpoints()],
        logger=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )

    rank, world_size, pin = trainer.global_rank, trainer.world_size, device == "cuda"
    train_rows, val_rows = np.flatnonzero(data.folds != fold), np.flatnonzero(data.folds == fold)
    train_set = LeafDataset(data.images, data.image_ids, data.labels, train_augmentation(), args.seed)
    val_set = LeafDataset(data.images, data.image_ids, data.hard_labels)
    sampler = EpochSampler(train_rows, args.train_batch_size, args.seed, fold, rank, world_size)
    val_keys = [(fold, 0, int(row)) for row in val_rows[rank::world_size]]
    per_step = args.train_batch_size // world_size // args.accumulate_grad_batches
    say(f"fold {fold}: {len(train_rows)} photos to train on, {len(val_rows)} to validate")
    trainer.fit(
        module,
        make_loader(train_set, sampler, per_step, args.num_workers, pin),
        make_loader(val_set, val_keys, args.val_batch_size, args.num_workers, pin),
    )
    if trainer.is_global_zero:
        best = Path(checkpoints.best_model_path).name
        row = log.rows[int(re.search(r"epoch=(\d+)", best).group(1))]
        finish_fold(args.log_dir, fold, row["epoch"], row["val_loss"], row["val_roc_auc"], best)


def read_training_data(args, n_devices):
    """Read and check all input of a training before its first epoch. Raises InputError for what cannot work."""
    train = read_train_csv(args.data_dir)
    hard_labels = labels = train[list(CLASSES)].to_numpy(np.float32)
    if args.soft_labels_filename is not None:
        soft = read_probabilities(args.soft_labels_filename, train["image_id"])
        labels = mix_labels(hard_labels, soft[list(CLASSES)].to_numpy())
    folds = split_folds(len(train), args.seed)

    if min(args.image_size) < 32:
        raise InputError(f"--image_size {args.image_size[0]} {args.image_size[1]}: the network needs 32 pixels or more")
    batch, parts = args.train_batch_size, n_devices * args.accumulate_grad_batches
    smallest = len(folds) - np.bincount(folds).max()
    if smallest < batch:
        raise InputError(f"a fold trains on {smallest} photos only: type --train_batch_size {smallest} or less")
    if batch % parts or batch == parts:
        raise InputError(
            f"--train_batch_size {batch} cannot be split into {parts} equal parts of at least 2 photos "
            "(devices x --accumulate_grad_batches)"
        )
    for fold in args.folds:
        undefined = np.isnan(column_aucs(hard_labels[folds == fold], hard_labels[folds == fold]))
        if undefined.all():
            raise InputError(f"fold {fold} holds photos of one class only: no AUC to choose a checkpoint by")
        for name in np.array(CLASSES)[undefined]:
            say(f"note: fold {fold} has no photo of {name}; its AUC is the mean of the other classes")
    images = cache_images("train", train["image_id"], args.data_dir, args.image_size, args.cache_dir)
    return TrainingData(train["image_id"], folds, hard_labels, labels, images)


def fingerprint_inputs(args, data, weights):
    """SHA-256 of everything that the result depends on beside the options: dict of name to digest."""
    inputs = {name: Path(__file__).parent / name for name in SOURCES}
    inputs |= {"train.csv": Path(args.data_dir) / "train.csv", "the photos": data.images.path, "weights": weights}
    inputs["soft labels"] = args.soft_labels_filename
    return {name: sha256(path) for name, path in inputs.items() if path is not None}


def launch_processes(n):
    """Run this command again as one process a device, by torch's own launcher, which ends them all when one dies."""
    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // n)))
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
    except ChildFailedError as error:  # the process has said why; its siblings are ended
        raise SystemExit(1) from error
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from error


def smaller_parts(args, n_devices):
    """The next larger --accumulate_grad_batches that splits the batch into equal parts of 2 or more, or None."""
    of_device = args.train_batch_size // n_devices
    larger = range(args.accumulate_grad_batches + 1, of_device // 2 + 1)
    return next((parts for parts in larger if of_device % parts == 0), None)


def train_folds(args, data, weights, device, indices):
    """Train the folds of args one after the other, but for those that are finished; then show all results."""
    for fold in args.folds:
        if is_finished(args.log_dir, fold):
            say(f"fold {fold} is finished already")
            continue
        if is_first_process():
            remove_fold(args.log_dir, fold)
        try:
            train_fold(args, fold, data, weights, device, indices)
        except SIGTERMException as error:  # Lightning's, which would end the process with status 0
            raise SystemExit(128 + signal.SIGTERM) from error
        except torch.OutOfMemoryError as error:
            parts = smaller_parts(args, len(indices))
            advice = (
                f"--accumulate_grad_batches {parts}: the same {args.train_batch_size} photos a step, in {parts} parts"
            )
            raise InputError(
                f"the GPU's memory is too small ({str(error).splitlines()[0]}). Type "
                + (advice if parts else "a smaller --image_size: the batch cannot be split further")
            ) from error
    if is_first_process():
        print(collect_results(args.log_dir).to_string(index=False))


def main(args):
    quiet_libraries()
    device, indices = choose_device(args.gpus, args.cpu_processes)
    args.precision = choose_precision(args.precision, device)
    data = read_training_data(args, len(indices))
    weights = find_weights(args.weights, args.backbone)

    locks = []
    if LAUNCHED not in os.environ and is_first_process():
        devices = f"{len(indices)} x {device}"
        fingerprints = fingerprint_inputs(args, data, weights)
        locks = start_run(args, data.image_ids, data.folds, fingerprints, devices, args.fresh)
        say(f"{args.backbone} from {weights or 'scratch'}, {devices}, precision {args.precision}")
    try:
        if len(indices) > 1 and not is_one_of_several_processes():
            launch_processes(len(indices))
        else:
            train_folds(args, data, weights, device, indices)
    finally:
        for lock in locks:
            lock.release()


if __name__ == "__main__":
    parser = build_parser(__doc__)
    parser.add_argument("--fresh", action="store_true", help="start over: delete what the named folds left in LOG_DIR")
    main(parse_args(parser))
