"""One start of train.py: its devices and processes, the locks on its folds, the record in its log directory, advice."""

import os
import re
import signal
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar

from harness import launch
from harness.callbacks import (
    EpochLog,
    LossNotFinite,
    OwnSignals,
    ResumePoint,
    SameInAllProcesses,
    StopIfNotFinite,
    UnscaleFirst,
    WholeCheckpoints,
)
from harness.console import InputError, how_to_go_on, is_first_process, quiet_libraries, say, stop_cleanly
from harness.devices import (
    check_shared_memory,
    choose_device,
    choose_precision,
    compute_exactly,
    describe_environment,
    fit_batch,
    out_of_memory,
    refuse_differences,
)
from harness.files import remove, sha256
from harness.log_dir import (
    FREE_OPTIONS,
    check_sources,
    collect_results,
    finish_fold,
    is_finished,
    open_log_dir,
    read_own_csv,
    recorded_options,
    remove_fold,
    result_path,
    resume_path,
    show_results,
)
from harness.photos import digest_photos
from harness.sources import digest, digest_definitions, training_sources
from harness.weights import load_checkpoint

TRAINER = {  # what pl.Trainer would do by itself, and what we do in its place or not at all
    "logger": False,
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}


class Run:
    """One start of train.py, as one of several processes or alone. Raises InputError for devices that do not fit.

    args: the command line, whose precision is filled in; n_folds: how many there are in all; classes: their names.
    """

    def __init__(self, args, n_folds, classes):
        quiet_libraries()
        self.args, self.n_folds, self.classes = args, n_folds, list(classes)
        self.data, self.folds_left, self.facts = None, [], {}
        # recorded by their content; what an edit of the recipe reads besides is to be added here, before `begin`
        self.inputs = {"train.csv": Path(args.data_dir) / "train.csv", "soft labels": args.soft_labels_filename}
        self.device, self.indices = choose_device(args.gpus, args.cpu_processes)
        args.precision = choose_precision(args.precision, self.device)
        compute_exactly(args.precision)
        self.one_of_several = launch.is_one_of_several_processes()
        if args.parallel_folds and self.one_of_several or args.num_nodes > 1 and not self.one_of_several:
            raise InputError(
                "--num_nodes is for processes that torchrun or srun has started, --parallel_folds for one that was "
                "started alone; docs/clusters.md has the whole commands"
            )
        if not self.one_of_several and not launch.IS_LAUNCHED and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
            say(
                "note: SLURM has given this job several tasks, but one process was started: srun python … starts them all"
            )
        if args.gpus is None and not (args.parallel_folds or self.one_of_several):
            self._use_as_many_as_divide_the_batch()
        self.n_devices = 1 if args.parallel_folds else len(self.indices) * args.num_nodes
        if "num_workers" not in args.typed:  # the default is for one process alone on this machine
            args.num_workers = max(1, args.num_workers // len(self.indices))
        self.is_writer = not launch.IS_LAUNCHED and is_first_process()  # of the record and of results.csv

    def _use_as_many_as_divide_the_batch(self):
        args = self.args
        fitting = fit_batch(self.indices, args.train_batch_size, args.accumulate_grad_batches)
        if 0 < len(fitting) < len(self.indices):
            unused = " ".join(map(str, self.indices[len(fitting) :]))
            say(f"note: a batch of {args.train_batch_size} cannot be shared by all GPUs: {unused} not used")
            self.indices = fitting

    def check(self, folds, labels):
        """Raise InputError if the batch cannot be made, or a fold's AUC is undefined. folds: int (n,); labels: (n, k)."""
        batch, parts = self.args.train_batch_size, self.n_devices * self.args.accumulate_grad_batches
        smallest_train = len(folds) - np.bincount(folds).max()
        if smallest_train < batch:
            raise InputError(
                f"a fold trains on {smallest_train} photos only: type --train_batch_size {smallest_train} or less"
            )
        if batch % parts or batch == parts:
            fitting = fit_batch(self.indices, batch, self.args.accumulate_grad_batches)
            instead = f"; type --gpus {' '.join(map(str, fitting))}" if self.device == "cuda" and fitting else ""
            raise InputError(
                f"--train_batch_size {batch} cannot be split into {parts} equal parts of at least 2 photos "
                f"(devices x --accumulate_grad_batches){instead}"
            )
        smallest_val = np.bincount(folds, minlength=self.n_folds).min()
        if smallest_val < self.n_devices:
            raise InputError(f"a fold has {smallest_val} photos to validate on, too few for {self.n_devices} devices")
        for size, n_photos in ((batch // parts, smallest_train), (self.args.val_batch_size, smallest_val)):
            n_batches = n_photos // size // self.n_devices
            check_shared_memory(self.args.image_size, size, n_batches, self.args.num_workers, len(self.indices))
        for fold in self.args.folds:
            positives = labels[folds == fold].sum(0)
            if (positives == (folds == fold).sum()).any():
                raise InputError(f"fold {fold} holds photos of one class only: no AUC to choose a checkpoint by")
            for name in np.array(self.classes)[positives == 0]:
                say(f"note: fold {fold} has no photo of {name}; its AUC is the mean of the other classes")

    @contextmanager
    def begin(self, data, weights, predicts_with):
        """Meet the other processes, lock the folds, compare with what the log directory holds, and record this start.

        data: has image_ids, folds and images, a row a photo; a photo of fold -1 belongs to none and is not in folds.csv;
        weights: the file that the backbone starts from, or None; predicts_with: the functions and classes that a
        prediction depends on, which must stay as they are.
        Raises InputError if another process trains one of the folds, or if the log directory holds other folds.
        """
        args, locks, wait_for_all, self.data = self.args, [], None, data
        # First join: processes that do not fit together end here, before anything is written.
        if launch.IS_LAUNCHED:
            launch.end_with_launcher()
            check_sources(args.log_dir, training_sources())
        elif self.one_of_several:
            wait_for_all = launch.join_processes(self.device, self.indices, args.num_nodes)
        # The children of --parallel_folds neither record nor compare: gigabytes of photos that they need not read.
        fingerprints = self._fingerprint_inputs(weights) if self.is_writer or self.n_devices > 1 else {}
        sources = training_sources()
        # Then lock, compare and record, in this order: what is compared must not change before it is recorded. One
        # process does it for all; those that a process has launched are covered by its locks.
        if self.is_writer:
            devices, in_folds = f"{self.n_devices} x {self.device}", data.folds >= 0
            rows = data.image_ids[in_folds], data.folds[in_folds]
            what = fingerprints, digest_definitions(predicts_with), sources, devices, describe_environment()
            locks = open_log_dir(args, self.n_folds, *rows, *what)
            say(f"{args.backbone} from {weights or 'scratch'}, {devices}, precision {args.precision}")
        # The others wait, or they would read the log directory of before; then all must be about to do the same.
        self.facts = fingerprints | {name: digest(text) for name, text in sources.items()}
        self.facts |= {f"--{name}": getattr(args, name) for name in recorded_options(args) if name not in FREE_OPTIONS}
        if wait_for_all:
            wait_for_all()
            here = (Path(args.log_dir) / "hparams.yaml").exists()
            finished = [fold for fold in args.folds if is_finished(args.log_dir, fold)]
            refuse_differences({f"{args.log_dir} holds this run": here, "finished folds": finished} | self.facts)
        try:
            yield
        finally:
            for lock in locks:
                lock.release()

    def _fingerprint_inputs(self, weights):
        """SHA-256 of what is trained on and from: dict of name to hexadecimal digits."""
        files, data = self.inputs | {"weights": weights}, self.data
        parts = {"the photos": data.folds >= 0, "the photos of no fold": data.folds < 0}
        return {name: sha256(path) for name, path in files.items() if path is not None} | {
            name: digest_photos(data.images, np.flatnonzero(part)) for name, part in parts.items() if part.any()
        }

    def describe(self, module, folds):
        """Say what will be trained: parameters, photos, epochs, and how a batch is made. folds: int (n,)."""
        args, n_photos, n_others = self.args, int((folds >= 0).sum()), int((folds < 0).sum())
        parts = [f"{self.n_devices} devices"] * (self.n_devices > 1)
        parts += [f"{args.accumulate_grad_batches} parts"] * (args.accumulate_grad_batches > 1)
        per_part = args.train_batch_size // self.n_devices // args.accumulate_grad_batches
        batch = f"batches of {args.train_batch_size}" + (f" ({' x '.join([*parts, str(per_part)])})" if parts else "")
        n_parameters = sum(parameter.numel() for parameter in module.network.parameters())
        say(
            f"{n_parameters:,} parameters; {n_photos} photos, a fold validates on {n_photos // self.n_folds} of them; "
            + (f"every fold trains on {n_others} more; " if n_others else "")
            + f"{args.max_epochs} epochs a fold, {batch}"
        )

    def train_folds(self, train_fold):
        """Train the folds of the command line, here by `train_fold(fold)` or in other processes, and collect results."""
        args = self.args
        if args.parallel_folds:
            failed = launch.launch_folds(args.folds, self.device, self.indices, args.num_workers)
            if failed:
                raise InputError(f"fold {' '.join(map(str, failed))} failed, see above; {how_to_go_on()}")
        elif len(self.indices) > 1 and not self.one_of_several:
            launch.launch_processes(len(self.indices))
        else:
            self.folds_left = [fold for fold in args.folds if not is_finished(args.log_dir, fold)]
            for fold in args.folds:
                self._train_unless_finished(fold, train_fold)
        if self.is_writer:
            results = collect_results(args.log_dir, self.n_folds)
            show_results(results)
            self._summarise(results)

    def _summarise(self, results):
        """Say the mean of the folds' best epochs and that of their last ones."""
        for name in [name for name in results if f"last_{name}" in results]:
            best, last = (f"{results[of].mean():.4f} ± {results[of].std(ddof=0):.4f}" for of in (name, f"last_{name}"))
            say(
                f"{name} over {len(results)} folds: {best} in the best epochs, which is optimistic; {last} in the last ones"
            )

    def collect_out_of_fold(self):
        """What the networks of the finished folds made of the photos that they have not seen, in their best epochs.

        Returns row numbers of the data, int (m,), and softmax, float (m, k); they stand in LOG_DIR/out_of_fold.csv too.
        """
        frame = read_own_csv(Path(self.args.log_dir) / "out_of_fold.csv", ("image_id", *self.classes))
        rows = {image_id: row for row, image_id in enumerate(self.data.image_ids)}
        return np.array([rows[image_id] for image_id in frame["image_id"]]), frame[self.classes].to_numpy()

    def _train_unless_finished(self, fold, train_fold):
        args, resume = self.args, resume_path(self.args.log_dir, fold)
        if is_finished(args.log_dir, fold):
            say(f"fold {fold} is finished already")
            if is_first_process():  # a process killed between the result and its own tidying has left it
                remove(resume)
            return
        if is_first_process() and not resume.exists():
            remove_fold(args.log_dir, fold)
        try:
            train_fold(fold)
        except LossNotFinite as error:
            raise InputError(
                f"fold {fold} stopped: {error} for the batch of {', '.join(self.data.image_ids.iloc[error.rows])}. Look at these "
                "photos and their labels; or go on with --accept_changes and --precision 32 or a smaller --gradient_clip_val"
            ) from error
        except (RuntimeError, MemoryError) as error:
            which = out_of_memory(error)
            if which is None:
                raise
            self._advise_smaller_parts(which, error)

    def _advise_smaller_parts(self, which, error):
        args, photos = self.args, self.args.train_batch_size // self.n_devices
        larger = range(args.accumulate_grad_batches + 1, photos // 2 + 1)
        parts = next((parts for parts in larger if photos % parts == 0), None)
        begun = any(Path(args.log_dir).glob("fold=*-*.ckpt"))
        accept = " --accept_changes" if begun else ""  # or the record of what is kept would forbid it
        advice = f"--accumulate_grad_batches {parts}{accept}: the same {args.train_batch_size} photos a step, in {parts} parts"
        reason = str(error).splitlines()[0] if str(error) else "MemoryError"
        raise InputError(
            f"{which} is too small ({reason}). Type "
            + (advice if parts else "a smaller --image_size: the batch cannot be split further")
        ) from error

    def trainer_options(self, fold, best):
        """What pl.Trainer takes beside the recipe's settings. best: the ModelCheckpoint of this fold."""
        args, log = (
            self.args,
            EpochLog(self.args.log_dir, fold, len([left for left in self.folds_left if left >= fold])),
        )
        resume = ResumePoint(args.log_dir, fold, log, best)
        callbacks = [SameInAllProcesses(self.facts, log), OwnSignals(), StopIfNotFinite(), log, best, resume]
        bar = sys.stdout.isatty()  # elsewhere a line an epoch is easier to read
        if bar:
            callbacks.append(TQDMProgressBar(refresh_rate=10, leave=True))
        return {
            **TRAINER,
            "accelerator": "gpu" if self.device == "cuda" else "cpu",
            "devices": self.indices if self.device == "cuda" else len(self.indices),
            "num_nodes": args.num_nodes,
            "strategy": "ddp" if self.one_of_several else "auto",
            "precision": {"16": None, "32": "32-true", "bf16": "bf16-mixed"}[args.precision],
            "callbacks": callbacks,
            "enable_progress_bar": bar,
            "plugins": [WholeCheckpoints(), launch.cluster_environment()]
            + ([UnscaleFirst("16-mixed", self.device)] if args.precision == "16" else []),
            "default_root_dir": result_path(args.log_dir, fold).parent,  # where Lightning would look for its own files
        }

    def finish_fold(self, fold, trainer):
        """Record the best epoch of a fold that is trained: its metrics that begin with val_, and its checkpoint."""
        if trainer.is_global_zero:
            (log,) = (callback for callback in trainer.callbacks if isinstance(callback, EpochLog))
            (best,) = (callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint))
            name = Path(best.best_model_path).name
            row = log.rows[int(re.search(r"epoch=(\d+)", name).group(1))]
            validation = load_checkpoint(best.best_model_path)["validation"]
            out_of_fold = pd.DataFrame(validation["probabilities"].numpy(), columns=self.classes)
            rows = validation["row"].numpy()
            out_of_fold.insert(0, "image_id", self.data.image_ids.iloc[rows].to_numpy())
            out_of_fold.insert(1, "label", np.array(self.classes)[self.data.hard_labels[rows].argmax(1)])
            finish_fold(self.args.log_dir, self.n_folds, fold, row, log.rows[-1], name, out_of_fold)

    @staticmethod
    def stopping_cleanly(args):
        """Within the block Ctrl-C and SIGTERM end the process with a line that says what is kept."""
        if launch.IS_LAUNCHED:
            # The process that launched this one will say it. This one often waits for others in C, where no Python
            # handler runs, so the signals' own handlers stay: it ends at once.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            return nullcontext()
        return stop_cleanly(lambda: describe_kept(args))


def describe_kept(args):
    """What an interrupted training has kept, as text: the folds that are finished, and the epoch of the one in work."""
    finished = [fold for fold in args.folds if is_finished(args.log_dir, fold)]
    texts = [f"fold {' '.join(map(str, finished))} finished"] if finished else []
    for fold in args.folds:
        path = resume_path(args.log_dir, fold)
        if path.exists():
            texts.append(f"fold {fold} kept up to epoch {len(load_checkpoint(path)['rows']) - 1}")
    return f"{', '.join(texts)}; {how_to_go_on()}" if texts else "no epoch was kept yet"
