"""Steps 1 and 3: train SE-ResNeXt50 on five folds.

  python train.py --train_batch_size 32 --gpus 0 1
  python train.py --train_batch_size 32 --gpus 0 1 --soft_labels_filename soft_labels.csv --log_dir logs_submit_distill

Reads   DATA_DIR/train.csv and images/; in step 3 also the soft labels that step 2 wrote.
Writes  LOG_DIR: hparams.yaml, folds.csv, the six best checkpoints of each fold, metrics/, results.csv.
Expect  a progress bar an epoch; 70 epochs a fold. Interrupted by whatever, the same command goes on: finished folds are
        not trained again, the fold in work goes on from its last epoch that was kept.
"""

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
from launch import (
    IS_LAUNCHED,
    end_with_launcher,
    is_one_of_several_processes,
    join_processes,
    launch_folds,
    launch_processes,
)
from models import LeafModule, LeafNet, LossNotFinite, find_weights, load_backbone_weights, load_checkpoint
from utils import (
    CLASSES,
    SOURCES,
    InputError,
    atomic_write,
    build_parser,
    check_sources,
    choose_device,
    choose_precision,
    collect_results,
    column_aucs,
    derive_seed,
    finish_fold,
    go_on,
    is_finished,
    is_first_process,
    parse_args,
    positive,
    quiet_libraries,
    remove_fold,
    resume_path,
    say,
    sha256,
    split_folds,
    start_run,
    stop_cleanly,
    write_csv,
)

RESUME_EVERY = 30  # seconds: the optimizer's state is 306 MB, about a second to write


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

    def remove_checkpoint(self, path):
        Path(path).unlink(missing_ok=True)


class EpochLog(pl.Callback):
    """One row an epoch, as CSV (LOG_DIR/metrics/fold=K.csv) and for TensorBoard (LOG_DIR/metrics/fold=K/)."""

    def __init__(self, log_dir, fold):
        self.path, self.fold = Path(log_dir) / "metrics" / f"fold={fold}.csv", fold
        self.rows = []

    def on_fit_start(self, trainer, module):
        if trainer.is_global_zero:
            self.board = SummaryWriter(self.path.with_suffix(""), purge_step=len(self.rows))

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
        if trainer.progress_bar_callback is None:
            of = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            say(f"fold {self.fold}, epoch {trainer.current_epoch} of {trainer.max_epochs}: {of}, lr {self.lr:.2g}")


class OwnSignals(pl.Callback):
    """Leaves SIGTERM to stop_cleanly: Lightning's handler waits for the other processes, which may be gone."""

    def setup(self, trainer, module, stage):
        self.handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer, module):
        signal.signal(signal.SIGTERM, self.handler)


class ResumePoint(pl.Callback):
    """Keeps what an interrupted fold needs to go on, LOG_DIR/fold=K-last.ckpt, and goes on from it if it is there.

    Holds the weights, the states of optimizer, schedule and loss scaler, the log and the best checkpoints so far. It is
    written between two epochs, where nothing is half done, at most every RESUME_EVERY seconds. All else that an epoch
    depends on follows from its number. Not Lightning's own resuming: that leaves out the schedule's step after the epoch
    at whose end it saved, and forgets the best checkpoints if the log directory was moved.
    """

    def __init__(self, log_dir, fold, log, best):
        self.path, self.fold, self.epoch_log, self.best = resume_path(log_dir, fold), fold, log, best
        self.state = load_checkpoint(self.path) if self.path.exists() else None
        if self.state:
            log.rows = self.state["rows"]
            say(f"fold {fold}: going on after epoch {len(log.rows) - 1}")

    def on_fit_start(self, trainer, module):
        self.written = time.monotonic()
        if self.state is None:
            return
        module.load_state_dict(self.state["state_dict"])
        optimizer = trainer.optimizers[0]
        optimizer.load_state_dict(self.state["optimizer"])
        for group in optimizer.param_groups:
            group["fused"] = optimizer.defaults["fused"]  # what this device wants, not the one before
        trainer.lr_scheduler_configs[0].scheduler.load_state_dict(self.state["schedule"])
        if self.state["scaler"]:
            trainer.precision_plugin.load_state_dict(self.state["scaler"])
        progress = trainer.fit_loop.epoch_progress.current
        progress.ready = progress.started = progress.processed = progress.completed = len(self.epoch_log.rows)
        folder = Path(self.best.dirpath)
        best = {**self.state["best"], "dirpath": self.best.dirpath}
        best["best_k_models"] = {str(folder / name): score for name, score in best["best_k_models"].items()}
        for name in ("best_model_path", "kth_best_model_path"):
            best[name] = str(folder / best[name]) if best[name] else ""
        self.best.load_state_dict(best)
        self.state = None
        if trainer.is_global_zero:  # checkpoints of epochs after this one, which will be trained again
            for path in set(folder.glob(f"fold={self.fold}-epoch=*.ckpt")) - set(map(Path, best["best_k_models"])):
                path.unlink()

    def on_train_epoch_start(self, trainer, module):
        if not trainer.is_global_zero or not self.epoch_log.rows or time.monotonic() < self.written + RESUME_EVERY:
            return
        best = {**self.best.state_dict(), "dirpath": None}
        best["best_k_models"] = {Path(path).name: score for path, score in best["best_k_models"].items()}
        for name in ("best_model_path", "kth_best_model_path"):
            best[name] = Path(best[name]).name
        state = {
            "state_dict": module.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "scaler": trainer.precision_plugin.state_dict(),
            "best": best,
            "rows": self.epoch_log.rows,
        }
        trainer.strategy.checkpoint_io.save_checkpoint(state, self.path)
        self.written = time.monotonic()


def train_fold(args, fold, data, weights, device, indices):
    """Train one fold and record its best epoch in the log directory. `device`, `indices`: as of choose_device."""
    seed = derive_seed(args.seed, fold)
    torch.manual_seed(seed)  # the head; order and augmentation have seeds of their own
    network = LeafNet(args.backbone)
    if weights is not None:
        load_backbone_weights(network, weights)
    module = LeafModule(network, args.lr_schedule, seed)

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
    resume = ResumePoint(args.log_dir, fold, log, checkpoints)
    bar = sys.stdout.isatty()  # elsewhere a line an epoch is easier to read
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=indices if device == "cuda" else len(indices),
        num_nodes=args.num_nodes,
        strategy="ddp" if is_one_of_several_processes() else "auto",
        precision={"16": "16-mixed", "32": "32-true", "bf16": "bf16-mixed"}[args.precision],
        max_epochs=args.max_epochs,
        gradient_clip_val=args.gradient_clip_val,
        accumulate_grad_batches=args.accumulate_grad_batches,
        callbacks=[OwnSignals(), log, checkpoints, resume, *[TQDMProgressBar(refresh_rate=10, leave=True)] * bar],
        enable_progress_bar=bar,
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


def describe_kept(args):
    """What an interrupted training has kept, as text: the folds that are finished, and the epoch of the one in work."""
    if IS_LAUNCHED:
        return ""  # the process that launched this one will say it
    finished = [fold for fold in args.folds if is_finished(args.log_dir, fold)]
    texts = [f"fold {' '.join(map(str, finished))} finished"] if finished else []
    for fold in args.folds:
        path = resume_path(args.log_dir, fold)
        if path.exists():
            texts.append(f"fold {fold} kept up to epoch {len(load_checkpoint(path)['rows']) - 1}")
    return f"{', '.join(texts)}; {go_on()}" if texts else "no epoch was kept yet"


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
            if is_first_process():  # killed just then, it has left this
                resume_path(args.log_dir, fold).unlink(missing_ok=True)
            continue
        if is_first_process() and not resume_path(args.log_dir, fold).exists():
            remove_fold(args.log_dir, fold)
        try:
            train_fold(args, fold, data, weights, device, indices)
        except LossNotFinite as error:
            raise InputError(
                f"fold {fold} stopped: {error} for the batch of {', '.join(data.image_ids[error.rows])}. Look at these "
                "photos and their labels; or go on with --accept_changes and --precision 32 or a smaller --gradient_clip_val"
            ) from error
        except torch.OutOfMemoryError as error:
            parts = smaller_parts(args, len(indices))
            advice = (
                f"--accumulate_grad_batches {parts}: the same {args.train_batch_size} photos a step, in {parts} parts"
            )
            raise InputError(
                f"the GPU's memory is too small ({str(error).splitlines()[0]}). Type "
                + (advice if parts else "a smaller --image_size: the batch cannot be split further")
            ) from error


def main(args):
    quiet_libraries()
    device, indices = choose_device(args.gpus, args.cpu_processes)
    args.precision = choose_precision(args.precision, device)
    one_of_several = is_one_of_several_processes()
    if args.parallel_folds and one_of_several or args.num_nodes > 1 and not one_of_several:
        raise InputError(
            "--num_nodes is for processes that torchrun or srun has started, --parallel_folds for one that nobody has; "
            "see the README for the whole commands"
        )
    n_devices = 1 if args.parallel_folds else len(indices) * args.num_nodes
    data = read_training_data(args, n_devices)
    weights = find_weights(args.weights, args.backbone)

    wait, locks = (lambda: None), []
    if IS_LAUNCHED:
        end_with_launcher()
        check_sources(args.log_dir)
    elif one_of_several:
        wait = join_processes(device, indices, args.num_nodes)
    if not IS_LAUNCHED and is_first_process():
        devices = f"{n_devices} x {device}"
        fingerprints = fingerprint_inputs(args, data, weights)
        locks = start_run(args, data.image_ids, data.folds, fingerprints, devices)
        say(f"{args.backbone} from {weights or 'scratch'}, {devices}, precision {args.precision}")
    wait()
    if not (Path(args.log_dir) / "hparams.yaml").exists():
        raise InputError(f"{args.log_dir} is not shared by all machines: the first one has begun it, here it is not")
    try:
        if args.parallel_folds:
            failed = launch_folds(args.folds, device, indices)
            if failed:
                raise InputError(f"fold {' '.join(map(str, failed))} failed, see above; {go_on()}")
        elif len(indices) > 1 and not one_of_several:
            launch_processes(len(indices))
        else:
            train_folds(args, data, weights, device, indices)
        if not IS_LAUNCHED and is_first_process():
            print(collect_results(args.log_dir).to_string(index=False))
    finally:
        for lock in locks:
            lock.release()


def parser():
    parser = build_parser(__doc__)
    add = parser.add_argument_group("several devices").add_argument
    add("--num_nodes", type=positive, default=1, metavar="N", help="machines that torchrun or srun has started this on")
    add("--parallel_folds", action="store_true", help="a fold a device, several at once, not one after the other")
    add = parser.add_argument_group("what is there already").add_argument
    add("--fresh", action="store_true", help="start over: delete what the named folds left in LOG_DIR")
    add("--accept_changes", action="store_true", help="go on in LOG_DIR though options or source files have changed")
    return parser


if __name__ == "__main__":
    args = parse_args(parser())
    with stop_cleanly(lambda: describe_kept(args)):
        main(args)
