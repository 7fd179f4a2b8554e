"""One start of train.py: its devices and processes, the record in its log directory, what a Trainer is given."""

import math
import signal
import time
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch.utils.tensorboard import SummaryWriter

from harness import devices, launch, record
from harness.backbones import load_checkpoint
from harness.console import GO_ON, PREFIX, InputError, is_first_process, is_interactive, quiet_libraries, say
from harness.files import atomic_write, digest, lock_file, remove, write_csv
from harness.prediction import behave, check_networks

RESUME_EVERY = 30  # seconds between two points to go on from: 306 MB each, about a second to write
SMALLER_PARTS = "type --accumulate_grad_batches 2 or more, the same photos in so many parts, or a smaller --image_size"


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all; Lightning's own is not atomic across file systems."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        checkpoint.pop("hyper_parameters", None)  # of save_hyperparameters(): a network would not be read safely
        with atomic_write(path) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path, *_, **__):
        return load_checkpoint(path)


class UnscaleFirst(pl.plugins.MixedPrecision):
    """fp16 whose loss scale is out of the gradients before they are clipped; with a fused optimizer Lightning leaves it in."""

    def optimizer_step(self, optimizer, model, closure, **options):
        def unscaled():
            loss = closure()
            skipped = loss is None and model.automatic_optimization  # by a training_step that returned nothing
            if getattr(optimizer, "_step_supports_amp_scaling", False) and not skipped:
                self.scaler.unscale_(optimizer)
            return loss

        return super().optimizer_step(optimizer, model, unscaled, **options)


class BestCheckpoints(pl.callbacks.ModelCheckpoint):
    """Keeps the best epochs, also if the log directory was moved, or a lost epoch has replaced a checkpoint."""

    def load_state_dict(self, state_dict):
        kept = {str(Path(self.dirpath, Path(path).name)): score for path, score in state_dict["best_k_models"].items()}
        self.best_k_models = kept = {path: score for path, score in kept.items() if Path(path).exists()}
        if kept:
            best, worst = (max, min) if self.mode == "max" else (min, max)
            self.best_model_path, self.kth_best_model_path = best(kept, key=kept.get), worst(kept, key=kept.get)
            self.best_model_score, self.kth_value = kept[self.best_model_path], kept[self.kth_best_model_path]


class EpochLog(pl.Callback):
    """One row per epoch, as CSV and for TensorBoard, in LOG_DIR/metrics. Raises InputError for a loss that is not finite."""

    def __init__(self, log_dir, fold):
        self.path, self.fold, self.rows, self.loss = Path(log_dir) / "metrics" / f"fold={fold}.csv", fold, [], 0.0

    def state_dict(self):
        return {"rows": self.rows}

    def load_state_dict(self, state_dict):
        self.rows = state_dict["rows"]

    def on_fit_start(self, trainer, module):
        if trainer.is_global_zero:
            self.board = SummaryWriter(self.path.with_suffix(""), purge_step=len(self.rows))

    def on_train_epoch_start(self, trainer, module):
        self.started, self.lr, self.loss = time.monotonic(), trainer.optimizers[0].param_groups[0]["lr"], 0.0
        trainer.callback_metrics.clear()  # Lightning keeps those of the epoch before where one is not logged again

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if outputs:
            self.loss = self.loss + outputs["loss"].detach()  # looked at once an epoch: each look makes a GPU wait

    def on_validation_start(self, trainer, module):
        if not math.isfinite(self.loss):
            anew = f"train it anew (--fresh --folds {self.fold}) with --precision 32 or a smaller --learning_rate"
            raise InputError(f"fold {self.fold} stopped: a loss of epoch {trainer.current_epoch} is not finite; {anew}")

    def on_train_epoch_end(self, trainer, module):
        row, names = {"epoch": trainer.current_epoch, "lr": self.lr}, trainer.callback_metrics.keys() - {"loss", "lr"}
        row |= {name: float(trainer.callback_metrics[name]) for name in sorted(names)}
        self.rows.append(row | {"seconds": round(time.monotonic() - self.started, 2)})
        if trainer.is_global_zero:
            write_csv(self.path, pd.DataFrame(self.rows))
            for name in ("lr", *names):
                self.board.add_scalar(name, self.rows[-1][name], trainer.current_epoch)
            self.board.flush()
        if not is_interactive():
            values = ", ".join(f"{name} {value:.4g}" for name, value in self.rows[-1].items())
            say(f"fold {self.fold}, {len(self.rows)} of {trainer.max_epochs} epochs: {values}")


class ResumePoint(pl.Callback):
    """Keeps what an interrupted fold goes on from, LOG_DIR/fold=K-last.ckpt, for Lightning's `ckpt_path`."""

    def __init__(self, log_dir, fold):
        self.log_dir, self.fold = Path(log_dir).resolve(), fold

    def on_fit_start(self, trainer, module):
        known = set(trainer.checkpoint_callback.best_k_models)
        for path in map(str, self.log_dir.glob(f"fold={self.fold}-epoch=*.ckpt")):
            if trainer.is_global_zero and path not in known:  # of epochs that were lost, and will be trained again
                remove(path)

    def on_train_start(self, trainer, module):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Lightning's handler waits for processes that may be gone
        self.first_epoch, self.written = trainer.current_epoch, time.monotonic()

    def on_train_epoch_start(self, trainer, module):  # and not earlier, as only now ReduceLROnPlateau has been stepped
        due = trainer.current_epoch > self.first_epoch and time.monotonic() > self.written + RESUME_EVERY
        if trainer.strategy.broadcast(due):
            progress = trainer.fit_loop.epoch_progress
            progress.total.reset_on_restart()
            progress.current.reset_on_restart()
            trainer.save_checkpoint(record.resume_path(self.log_dir, self.fold))  # there this epoch is not yet begun
            progress.increment_ready()
            self.written = time.monotonic()


class Run:
    """One start of train.py, as one of several processes or alone. Raises InputError for devices that do not fit."""

    def __init__(self, args, n_folds, classes):
        quiet_libraries()
        self.args, self.n_folds, self.classes, args.classes = args, n_folds, np.array(classes), list(classes)
        # recorded by their content; what an edit of the recipe reads besides is to be added here, before `begin`
        self.inputs = {"train.csv": Path(args.data_dir) / "train.csv", "soft labels": args.soft_labels_filename}
        self.kind, self.indices = devices.choose_device(args.gpus, args.cpu_processes)
        self.cluster, n_processes, n_here = launch.find_processes()
        self.joins = n_processes > 1  # others, that torchrun or srun has started
        if self.joins and (args.parallel_folds or len(self.indices) != n_here):
            started = f"{n_here} processes were started here, for {len(self.indices)} devices"
            raise InputError(f"{started}: torchrun and srun start one for each of --gpus, never for --parallel_folds")
        self.launches = not self.joins and (args.parallel_folds or len(self.indices) > 1)
        self.n_devices = 1 if args.parallel_folds else len(self.indices) * n_processes // n_here
        args.precision = devices.choose_precision(args.precision, self.kind)
        devices.compute_exactly(args.precision)
        if "num_workers" not in args.typed:  # the default is for one process alone on this machine
            args.num_workers = max(1, args.num_workers // len(self.indices))
        if self.kind == "cuda" and not self.launches:
            devices.check_gpus([self.indices[self.cluster.local_rank()]])
        # for pl.Trainer
        self.accelerator = "gpu" if self.kind == "cuda" else "cpu"
        self.devices = self.indices if self.kind == "cuda" else len(self.indices)
        self.num_nodes, self.strategy = n_processes // n_here, "ddp" if self.joins else "auto"
        self.precision = {"16": None, "32": "32-true", "bf16": "bf16-mixed"}[args.precision]
        unscale = [UnscaleFirst("16-mixed", self.kind)] if args.precision == "16" else []
        self.plugins = [WholeCheckpoints(), self.cluster, *unscale]

    def check(self, folds, labels):
        """Raise InputError if the batch cannot be made, or a fold's AUC is undefined. folds: int (n,); labels: (n, k)."""
        batch, parts = self.args.train_batch_size, self.n_devices * self.args.accumulate_grad_batches
        sizes = np.bincount(folds, minlength=self.n_folds)
        if batch > (fewest := len(folds) - sizes.max()):
            raise InputError(f"a fold trains on {fewest} photos only: type --train_batch_size {fewest} or less")
        if batch % parts or batch == parts:
            what = f"{parts} equal parts (devices x --accumulate_grad_batches) of 2 photos or more: type another one"
            raise InputError(f"--train_batch_size {batch} cannot be split into {what}")
        if sizes.min() < self.n_devices:
            raise InputError(f"a fold has {sizes.min()} photos to validate on, too few for {self.n_devices} devices")
        for fold in self.args.folds:
            positives = labels[folds == fold].sum(0)
            if np.isin(positives, (0, sizes[fold])).all():
                raise InputError(f"fold {fold} holds photos of one class only, so no AUC: type another --fold_seed")
            for name in self.classes[positives == 0] if PREFIX is None else ():
                say(f"note: fold {fold} has no photo of {name}; its AUC is the mean of the other classes")

    @contextmanager
    def begin(self, data, weights, module, load, fit):
        """Meet the other processes, lock the folds, compare with what the log directory holds, and record this start.

        module: what is trained; load, fit: what predicts. Raises InputError for other folds, busy ones, too little memory.
        """
        args, self.data, self.load, self.fit = self.args, data, load, fit
        wait_for_all = self.joins and launch.join_processes(self)
        folds, on = pd.DataFrame({"image_id": data.image_ids, "fold": data.folds}), f"{self.n_devices} x {self.kind}"
        files = (self.inputs | {"weights": weights}).items()
        fingerprints, pixels = {name: digest(Path(path)) for name, path in files if path is not None}, sha256()
        for row in range(len(data.folds)):
            pixels.update(data.images[row])
        fingerprints |= {"the folds": digest(folds.to_csv()), "the photos": pixels.hexdigest()}
        mine = record.describe_run(args, on, fingerprints) | {"environment": devices.describe_environment()}
        with ExitStack() as locks:
            if self.launches:  # those that are started record, and lock their folds
                record.compare_folds(args, self.n_folds, mine)
            elif is_first_process():
                folds = folds[folds["fold"] >= 0]
                for lock in record.open_log_dir(args, self.n_folds, mine, folds, self.check_networks):
                    locks.enter_context(lock)
            if wait_for_all:
                wait_for_all()  # or the others would read the log directory of before
                files = sorted(str(path) for path in Path(args.log_dir).rglob("*") if path.suffix in (".yaml", ".ckpt"))
                launch.refuse_differences({"the log files": files, "--folds": args.folds} | record.comparable(mine))
            if PREFIX is None:
                network = f"{args.backbone}, {sum(part.numel() for part in module.parameters()):,} parameters"
                say(f"{network}, from {weights or 'scratch'}, on {on}, {args.precision}")
                n, n_folds = len(data.folds), self.n_folds
                say(f"{n} photos, {sum(data.folds >= 0)} in {n_folds} folds; {args.max_epochs} epochs per fold")
            with devices.enough_memory(SMALLER_PARTS):
                yield

    def check_networks(self, folds):
        """Raise InputError if the networks of finished folds no longer predict what they did: they are never mixed."""
        results = record.read_results(self.args.log_dir, folds)
        networks = {fold: self.load(Path(self.args.log_dir) / results["checkpoint"][i]) for i, fold in enumerate(folds)}
        check_networks(self.args.log_dir, networks, self.fit)

    def folds_left(self):
        """The folds of the command line that are to be trained here, one after the other; or they are trained by others."""
        args = self.args
        if self.launches and args.parallel_folds:
            if failed := launch.launch_folds(args.folds, self.kind, self.indices, args.num_workers):
                raise InputError(f"fold {' '.join(map(str, failed))} failed, see above; {GO_ON}")
        elif self.launches:
            launch.launch_processes(len(self.indices))
        else:
            for fold in args.folds:
                if record.read_result(args.log_dir, fold):
                    say(f"fold {fold} is finished already")
                else:
                    yield fold

    def resume_from(self, fold):
        """Where a fold goes on: its checkpoint for Lightning, a path or None, and the epoch to begin with."""
        path = record.resume_path(self.args.log_dir, fold)
        if epoch := load_checkpoint(path)["epoch"] if path.exists() else 0:
            say(f"fold {fold}: going on after epoch {epoch - 1}")
        return path if epoch else None, epoch

    def callbacks(self, fold):
        """What keeps the log and the points from which a fold goes on, for pl.Trainer, after the ModelCheckpoint."""
        self.log, bar = EpochLog(self.args.log_dir, fold), pl.callbacks.TQDMProgressBar(refresh_rate=10, leave=True)
        return [self.log, ResumePoint(self.args.log_dir, fold), *[bar] * is_interactive()]

    def finish_fold(self, fold, trainer):
        """Record the best epoch of a fold that is trained: its metrics that begin with val_, and its checkpoint."""
        if not trainer.is_global_zero:
            return
        path = Path(trainer.checkpoint_callback.best_model_path)
        best = load_checkpoint(path)
        result, last, rows = {"fold": fold, "epoch": best["epoch"]}, {}, self.log.rows
        names = {name for row in rows for name in row if name.startswith("val_")}  # some epochs may lack one
        for name in sorted(names):
            result[name], last[f"last_{name}"] = (rows[epoch].get(name, math.nan) for epoch in (best["epoch"], -1))
        photos = np.stack([self.data.images[int(row)] for row in best["validation"]["row"][:2]])
        of_fold = record.record_path(self.args.log_dir, fold)
        with atomic_write(of_fold.with_name("behaviour.npz")) as file:
            np.savez_compressed(file, **behave(self.load(path), self.fit, photos))
        result |= last | {"checkpoint": path.name}
        record.write_record(of_fold, record.read_record(of_fold) | {"result": result})
        self.collect()

    def collect(self):
        """Put results.csv and out_of_fold.csv together from all finished folds; returns both, DataFrames."""
        log_dir, names = Path(self.args.log_dir), [self.classes[row > 0] for row in self.data.hard_labels]
        labels = np.array(["|".join(several) or "none" for several in names])
        with lock_file(log_dir / ".hparams.lock"):
            done = [fold for fold in range(self.n_folds) if record.read_result(log_dir, fold)]
            results, parts = record.read_results(log_dir, done), []
            for fold, name in zip(results["fold"], results["checkpoint"], strict=True):
                remove(record.resume_path(log_dir, fold))
                validation = load_checkpoint(log_dir / name)["validation"]
                rows, probabilities = validation["row"].numpy(), validation["probabilities"].numpy()
                known = {"image_id": self.data.image_ids.iloc[rows].to_numpy(), "fold": fold, "label": labels[rows]}
                parts.append(pd.DataFrame(known | dict(zip(self.classes, probabilities.T, strict=True))))
            out_of_fold = pd.concat(parts, ignore_index=True)
            write_csv(log_dir / "results.csv", results)
            write_csv(log_dir / "out_of_fold.csv", out_of_fold)
        return results, out_of_fold

    def summarise(self):
        """Say the results of all finished folds; returns their out-of-fold predictions, or None if another process does."""
        if PREFIX is not None or not is_first_process():
            return None
        results, out_of_fold = self.collect()
        print(results.filter(regex="^(?!last_)").to_string(index=False), flush=True)  # of the best epochs
        record.note_differences(self.args.log_dir, results["fold"].tolist())
        for name in [name for name in results if f"last_{name}" in results and len(results) > 1]:
            best, last = (f"{results[of].mean():.4f} ± {results[of].std(ddof=0):.4f}" for of in (name, f"last_{name}"))
            n = results[name].count()
            say(f"{name} of {n} folds: {best} in the best epochs (optimistic), {last} in the last ones")
        return out_of_fold
