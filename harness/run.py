"""One start of train.py: its devices and processes, the record in its log directory, and what a Trainer is given."""

import re
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from pytorch_lightning.callbacks import TQDMProgressBar

from harness import devices, launch, record
from harness.backbones import load_checkpoint
from harness.callbacks import EpochLog, ResumePoint, UnscaleFirst, WholeCheckpoints
from harness.console import GO_ON, PREFIX, InputError, is_first_process, is_interactive, quiet_libraries, say
from harness.files import digest, lock_file, remove, write_csv
from harness.photos import digest_photos
from harness.prediction import find_edit, keep_behaviour

SMALLER_PARTS = (
    "type --accumulate_grad_batches 2, or more: the same photos a step, in as many parts (with --accept_changes where folds "
    "are finished, with --fresh --folds and its number where one has begun); or a smaller --image_size"
)


class Run:
    """One start of train.py, as one of several processes or alone. Raises InputError for devices that do not fit.

    args: the command line, whose precision is filled in; n_folds: how many there are in all; classes: their names.
    """

    def __init__(self, args, n_folds, classes):
        quiet_libraries()
        self.args, self.n_folds, self.classes = args, n_folds, list(classes)
        # recorded by their content; what an edit of the recipe reads besides is to be added here, before `begin`
        self.inputs = {"train.csv": Path(args.data_dir) / "train.csv", "soft labels": args.soft_labels_filename}
        self.kind, self.indices = devices.choose_device(args.gpus, args.cpu_processes)
        self.cluster, n_processes, n_here = launch.find_processes()
        self.joins = n_processes > 1  # others, that torchrun or srun has started
        if self.joins and (args.parallel_folds or len(self.indices) != n_here):
            raise InputError(
                f"{n_here} processes were started on this machine, for {len(self.indices)} devices: torchrun or srun must "
                "start as many as --gpus or --cpu_processes name, and none for --parallel_folds (docs/clusters.md)"
            )
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
            raise InputError(f"a fold trains on {fewest} photos only: type a smaller --train_batch_size")
        if batch % parts or batch == parts:
            raise InputError(
                f"--train_batch_size {batch} cannot be split into {parts} equal parts of at least 2 photos (devices x "
                "--accumulate_grad_batches): type another one, or another number of --gpus"
            )
        if sizes.min() < self.n_devices:
            raise InputError(f"a fold has {sizes.min()} photos to validate on, too few for {self.n_devices} devices")
        for fold in self.args.folds:
            positives = labels[folds == fold].sum(0)
            if (positives == sizes[fold]).any():
                raise InputError(f"fold {fold} holds photos of one class only: no AUC to choose a checkpoint by")
            for name in np.array(self.classes)[positives == 0] if PREFIX is None else ():
                say(f"note: fold {fold} has no photo of {name}; its AUC is the mean of the other classes")

    @contextmanager
    def begin(self, data, weights, module, load, fit):
        """Meet the other processes, lock the folds, compare with what the log directory holds, and record this start.

        data: TrainingData; a photo of fold -1 belongs to none and is not in folds.csv; weights: the file that the backbone
        starts from, or None; module: what is trained; load, fit: what predictions will be made with. Raises
        InputError if another process trains one of the folds, if the log directory holds other folds, or if there is too
        little memory for what is done within.
        """
        args, self.data, self.load, self.fit = self.args, data, load, fit
        wait_for_all = self.joins and launch.join_processes(self)
        in_folds, on = data.folds >= 0, f"{self.n_devices} x {self.kind}"
        folds = pd.DataFrame({"image_id": data.image_ids, "fold": data.folds})[in_folds]
        files = {name: path for name, path in [*self.inputs.items(), ("weights", weights)] if path is not None}
        fingerprints = {name: digest(Path(path)) for name, path in files.items()} | {
            "the folds": digest(folds.to_csv())
        }
        for name, rows in (("the photos", in_folds), ("the photos of no fold", ~in_folds)):
            if rows.any():
                fingerprints[name] = digest_photos(data.images, np.flatnonzero(rows))
        mine = record.describe_run(args, on, devices.describe_environment(), fingerprints)
        with ExitStack() as locks:
            if self.launches:  # those that are started record, and lock their folds
                record.compare_folds(args, self.n_folds, mine)
            elif is_first_process():
                for lock in record.open_log_dir(args, self.n_folds, mine, folds, self.check_networks):
                    locks.enter_context(lock)
            if wait_for_all:
                wait_for_all()  # or the others would read the log directory of before
                seen = sorted(str(path) for path in Path(args.log_dir).rglob("*") if path.suffix in (".yaml", ".ckpt"))
                options = {f"--{name}": of for name, of in mine["options"].items() if name not in record.FREE_OPTIONS}
                launch.refuse_differences({"the files of the log directory": seen, **mine["fingerprints"], **options})
            if PREFIX is None:
                n_parameters = sum(parameter.numel() for parameter in module.parameters())
                say(
                    f"{args.backbone}, {n_parameters:,} parameters, from {weights or 'scratch'}, on {on}, {args.precision}"
                )
                more = f", all of them on {(~in_folds).sum()} more" * (not in_folds.all())
                say(f"{len(folds)} photos in {self.n_folds} folds{more}; {args.max_epochs} epochs per fold")
            with devices.enough_memory(SMALLER_PARTS):
                yield

    def check_networks(self, folds):
        """Raise InputError if the networks of finished folds no longer predict what they did: they are never mixed."""
        for _, result in record.read_results(self.args.log_dir, folds).iterrows():
            network = self.load(Path(self.args.log_dir) / result["checkpoint"])
            if edit := find_edit(self.args.log_dir, result["fold"], network, self.fit):
                raise InputError(f"{edit}: use another --log_dir, or train all anew with --fresh")

    def folds_left(self):
        """The folds of the command line that are to be trained here, one after the other; or they are trained by others."""
        args = self.args
        if self.launches and args.parallel_folds:
            if failed := launch.launch_folds(args.folds, self.kind, self.indices, args.num_workers):
                raise InputError(f"fold {' '.join(map(str, failed))} failed, see above; {GO_ON}")
        elif self.launches:
            launch.launch_processes(len(self.indices))
        else:
            for position, fold in enumerate(args.folds, 1):
                self.n_left = len(args.folds) - position
                if record.read_result(args.log_dir, fold) is None:
                    yield fold
                    continue
                say(f"fold {fold} is finished already")
                if is_first_process():  # a process killed between the result and its own tidying has left it
                    remove(record.resume_path(args.log_dir, fold))

    def resume_from(self, fold):
        """Where a fold goes on: its checkpoint for Lightning, a path or None, and the epoch to begin with."""
        path = record.resume_path(self.args.log_dir, fold)
        if not path.exists():
            return None, 0
        epoch = load_checkpoint(path)["epoch"]
        say(f"fold {fold}: going on after epoch {epoch - 1}")
        return path, epoch

    def callbacks(self, fold):
        """What keeps the log and the points from which a fold goes on, for pl.Trainer, after the ModelCheckpoint."""
        log_dir, bar = self.args.log_dir, [TQDMProgressBar(refresh_rate=10, leave=True)] * is_interactive()
        return [EpochLog(log_dir, fold, self.n_left), ResumePoint(log_dir, fold), *bar]

    def finish_fold(self, fold, trainer):
        """Record the best epoch of a fold that is trained: its metrics that begin with val_, and its checkpoint."""
        if trainer.is_global_zero:
            (log,) = (callback for callback in trainer.callbacks if isinstance(callback, EpochLog))
            path = Path(trainer.checkpoint_callback.best_model_path)
            best, last = log.rows[int(re.search(r"epoch=(\d+)", path.name).group(1))], log.rows[-1]
            result = {"fold": fold, "epoch": best["epoch"]}
            result |= {name: value for name, value in best.items() if name.startswith("val_")}
            result |= {f"last_{name}": value for name, value in last.items() if name.startswith("val_")}
            photos = np.stack([self.data.images[int(row)] for row in load_checkpoint(path)["validation"]["row"][:2]])
            keep_behaviour(self.args.log_dir, fold, self.load(path), self.fit, photos)
            record.finish_fold(self.args.log_dir, fold, result | {"checkpoint": path.name})
            self.collect()

    def collect(self):
        """Put results.csv and out_of_fold.csv together from all finished folds; returns both, DataFrames.

        The second holds each photo by the network that has not seen it: image_id, fold, label and its probabilities.
        """
        log_dir, labels = Path(self.args.log_dir), np.array(self.classes)[self.data.hard_labels.argmax(1)]
        with lock_file(log_dir / ".hparams.lock"):
            done = [fold for fold in range(self.n_folds) if record.read_result(log_dir, fold)]
            results, parts = record.read_results(log_dir, done), []
            for fold, name in zip(results["fold"], results["checkpoint"], strict=True):
                validation = {
                    key: value.numpy() for key, value in load_checkpoint(log_dir / name)["validation"].items()
                }
                rows = validation["row"]
                part = {"image_id": self.data.image_ids.iloc[rows].to_numpy(), "fold": fold, "label": labels[rows]}
                parts.append(pd.DataFrame(part | dict(zip(self.classes, validation["probabilities"].T, strict=True))))
            out_of_fold = pd.concat(parts, ignore_index=True)
            write_csv(log_dir / "results.csv", results)
            write_csv(log_dir / "out_of_fold.csv", out_of_fold)
        return results, out_of_fold

    def summarise(self):
        """Say the results of all finished folds; returns their out-of-fold predictions, or None if another process does."""
        if PREFIX is not None or not is_first_process():
            return None
        results, out_of_fold = self.collect()
        record.show_results(results)
        record.note_differences(self.args.log_dir, results["fold"].tolist())
        for name in [name for name in results if f"last_{name}" in results and len(results) > 1]:
            best, last = (f"{results[of].mean():.4f} ± {results[of].std(ddof=0):.4f}" for of in (name, f"last_{name}"))
            say(
                f"{name} of {len(results)} folds: {best} in the best epochs, which is optimistic; {last} in the last ones"
            )
        return out_of_fold
