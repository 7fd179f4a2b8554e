"""What Lightning does beside the training: whole checkpoints, the log, the points from which a fold goes on."""

import math
import signal
import time
from datetime import timedelta
from pathlib import Path

import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch.utils.tensorboard import SummaryWriter

from harness.backbones import load_checkpoint
from harness.console import InputError, is_interactive, say
from harness.files import atomic_write, remove, write_csv
from harness.record import resume_path

RESUME_EVERY = 30  # seconds: the optimizer's state is 306 MB, about a second to write


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all; Lightning's own is not atomic across file systems."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        with atomic_write(path) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path, *_, **__):
        return load_checkpoint(path)

    def remove_checkpoint(self, path):
        remove(path)


class UnscaleFirst(MixedPrecision):
    """fp16 with a loss scaler whose factor is out of the gradients before anything looks at them, clipping included.

    Lightning leaves it in for a fused optimizer, which takes it out in its step. torch's scaler does not do it twice.
    """

    def optimizer_step(self, optimizer, model, closure, **options):
        def unscaled():
            loss = closure()
            skipped = loss is None and model.automatic_optimization  # by a training_step that returned nothing
            if getattr(optimizer, "_step_supports_amp_scaling", False) and not skipped:
                self.scaler.unscale_(optimizer)
            return loss

        return super().optimizer_step(optimizer, model, unscaled, **options)


class BestCheckpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which keeps the best epochs, also in a fold that goes on after an interruption.

    Then the log directory may have been moved, and a checkpoint may be gone that a lost epoch had replaced.
    """

    def load_state_dict(self, state_dict):
        scores = {
            str(Path(self.dirpath) / Path(path).name): score for path, score in state_dict["best_k_models"].items()
        }
        self.best_k_models = {path: score for path, score in scores.items() if Path(path).exists()}
        if self.best_k_models:
            ranked = sorted(self.best_k_models, key=self.best_k_models.get, reverse=self.mode == "max")
            self.best_model_path, self.kth_best_model_path = ranked[0], ranked[-1]
            self.best_model_score, self.kth_value = scores[ranked[0]], scores[ranked[-1]]


class EpochLog(pl.Callback):
    """One row per epoch, as CSV (LOG_DIR/metrics/fold=K.csv) and for TensorBoard (LOG_DIR/metrics/fold=K/).

    Raises InputError before an epoch with a loss that is nan or infinite is validated or kept.
    """

    def __init__(self, log_dir, fold, n_folds_left=1):
        self.path, self.fold, self.n_folds_left = Path(log_dir) / "metrics" / f"fold={fold}.csv", fold, n_folds_left
        self.rows, self.seconds = [], []

    def state_dict(self):
        return {"rows": self.rows}

    def load_state_dict(self, state_dict):
        self.rows = state_dict["rows"]

    def on_fit_start(self, trainer, module):
        if trainer.is_global_zero:
            self.board = SummaryWriter(self.path.with_suffix(""), purge_step=len(self.rows))

    def on_train_epoch_start(self, trainer, module):
        self.started, self.lr, self.loss = time.perf_counter(), trainer.optimizers[0].param_groups[0]["lr"], 0.0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if outputs:
            self.loss = self.loss + outputs["loss"].detach()  # looked at once an epoch: each look makes a GPU wait

    def on_validation_start(self, trainer, module):
        if not math.isfinite(self.loss):
            raise InputError(
                f"fold {self.fold} stopped: a loss of epoch {trainer.current_epoch} is not finite. Look at the labels; or "
                f"train it anew with --fresh --folds {self.fold} and --precision 32, a smaller --gradient_clip_val or "
                "--learning_rate (and --accept_changes, to keep the folds that are finished)"
            )

    def on_train_epoch_end(self, trainer, module):
        names = sorted(trainer.callback_metrics.keys() - {"loss", "lr"})  # these are of the last step
        metrics = {name: float(trainer.callback_metrics[name]) for name in names}
        self.seconds.append(round(time.perf_counter() - self.started, 2))
        self.rows.append({"epoch": trainer.current_epoch, "lr": self.lr, **metrics, "seconds": self.seconds[-1]})
        if trainer.is_global_zero:
            write_csv(self.path, pd.DataFrame(self.rows))
            for name in ("lr", *metrics):
                self.board.add_scalar(name, self.rows[-1][name], trainer.current_epoch)
            self.board.flush()
        if not is_interactive():
            values = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            of_all = f"{len(self.rows)} of {trainer.max_epochs}"
            say(f"fold {self.fold}, epoch {trainer.current_epoch} ({of_all}): {values}, lr {self.lr:.2g}")
        n_left = trainer.max_epochs - len(self.rows)
        if len(self.seconds) == 2 and n_left > 0:  # the first epoch warms up
            epochs = [n_left, n_left + self.n_folds_left * trainer.max_epochs]
            fold, all_folds = (timedelta(seconds=round(n * self.seconds[1])) for n in epochs)
            more = f", with the {self.n_folds_left} folds after it in {all_folds}" * (self.n_folds_left > 0)
            say(f"fold {self.fold}: {self.seconds[1]:.0f} s an epoch, done in about {fold} (h:mm:ss){more}")


class ResumePoint(pl.Callback):
    """Keeps what an interrupted fold needs to go on, LOG_DIR/fold=K-last.ckpt: a checkpoint for Lightning's `ckpt_path`.

    It is written between two epochs, at most every RESUME_EVERY seconds: when the next epoch is about to start, as only
    then ReduceLROnPlateau has been stepped, and not at all after the last one.
    """

    def __init__(self, log_dir, fold):
        self.log_dir, self.fold = Path(log_dir).resolve(), fold

    def on_fit_start(self, trainer, module):
        known = set(trainer.checkpoint_callback.best_k_models)
        for path in map(str, self.log_dir.glob(f"fold={self.fold}-epoch=*.ckpt")):
            if trainer.is_global_zero and path not in known:  # of epochs that were lost, and will be trained again
                remove(path)

    def on_train_start(self, trainer, module):
        signal.signal(
            signal.SIGTERM, signal.SIG_DFL
        )  # Lightning's handler waits for other processes, which may be gone
        self.first_epoch, self.written = trainer.current_epoch, time.monotonic()

    def on_train_epoch_start(self, trainer, module):
        due = trainer.current_epoch > self.first_epoch and time.monotonic() > self.written + RESUME_EVERY
        if trainer.strategy.broadcast(due):
            progress = trainer.fit_loop.epoch_progress
            for count in (progress.total, progress.current):
                count.ready -= 1  # in what is kept, this epoch is not yet begun
            trainer.save_checkpoint(resume_path(self.log_dir, self.fold))
            for count in (progress.total, progress.current):
                count.ready += 1
            self.written = time.monotonic()
