"""What Lightning does beside the training: whole checkpoints, the log, the points from which a fold goes on."""

import signal
import time
from pathlib import Path

import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch.utils.tensorboard import SummaryWriter

from harness.console import say
from harness.devices import refuse_differences
from harness.files import atomic_write, remove, write_csv
from harness.log_dir import resume_path
from harness.weights import load_checkpoint

ONLY_IN_THE_BAR = {"loss", "lr"}  # of the last step; all other metrics are of the epoch
LOOK_EVERY = 50  # steps
RESUME_EVERY = 30  # seconds: the optimizer's state is 306 MB, about a second to write


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all; Lightning's own is not atomic across file systems."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        with atomic_write(path) as file:
            torch.save(checkpoint, file)

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


class EpochLog(pl.Callback):
    """One row an epoch, as CSV (LOG_DIR/metrics/fold=K.csv) and for TensorBoard (LOG_DIR/metrics/fold=K/)."""

    def __init__(self, log_dir, fold, n_folds_left=1):
        self.path, self.fold = Path(log_dir) / "metrics" / f"fold={fold}.csv", fold
        self.rows, self.seconds, self.n_folds_left = [], [], n_folds_left

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
        logged = trainer.callback_metrics
        metrics = {name: float(logged[name]) for name in sorted(logged) if name not in ONLY_IN_THE_BAR}
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
            values = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            say(f"fold {self.fold}, epoch {trainer.current_epoch} of {trainer.max_epochs}: {values}, lr {self.lr:.2g}")
        self.foresee_end(trainer)

    def foresee_end(self, trainer):
        """After two epochs, say when the fold and all that follow it will be done."""
        self.seconds.append(self.rows[-1]["seconds"])
        if len(self.seconds) == 2 and trainer.max_epochs > len(self.rows):
            epoch = self.seconds[-1]  # the first one warms up
            left = (trainer.max_epochs - len(self.rows)) * epoch
            text = f"fold {self.fold}: {epoch:.0f} s an epoch, done in about {duration(left)}"
            more = (self.n_folds_left - 1) * trainer.max_epochs * epoch
            say(text + (f", all {self.n_folds_left} folds in about {duration(left + more)}" if more else ""))


def duration(seconds):
    """Seconds as people say it."""
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min"
        if minutes
        else f"{seconds:.0f} s"
    )


class LossNotFinite(Exception):
    """The loss of a batch is nan or infinite; `rows`: int (n,), the batch's rows of the data set."""

    def __init__(self, loss, rows):
        super().__init__(f"the loss is {loss}")
        self.rows = rows


class StopIfNotFinite(pl.Callback):
    """Raises LossNotFinite, with the rows of the first batch whose loss is nan or infinite, before the next validation.

    The losses are looked at together, after every LOOK_EVERY steps: each look makes a GPU wait.
    """

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append((outputs["loss"].detach(), batch["row"]))
        if len(self.seen) == LOOK_EVERY or self.seen[0][0].device.type == "cpu":
            self.look()

    def on_validation_start(self, trainer, module):
        self.look()

    def look(self):
        if self.seen:
            losses = torch.stack([loss for loss, _ in self.seen]).cpu()
            bad = (~losses.isfinite()).nonzero()
            if len(bad):
                raise LossNotFinite(losses[bad[0]].item(), self.seen[bad[0].item()][1].cpu().numpy())
            self.seen = []


class SameInAllProcesses(pl.Callback):
    """Raises InputError before the first step if one of several processes would train something else than the first.

    facts: dict of name to value, of what is trained; epoch_log: EpochLog of the fold, which knows where it goes on.
    """

    def __init__(self, facts, epoch_log):
        self.facts, self.epoch_log = facts, epoch_log

    def setup(self, trainer, module, stage):
        if trainer.world_size > 1:
            refuse_differences(
                {"fold": self.epoch_log.fold, "the epoch to begin with": len(self.epoch_log.rows)} | self.facts
            )


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
        if "fused" in optimizer.defaults:
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
                remove(path)

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
