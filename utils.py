"""What every script shares: the classes, the command line, seeds, folds, the log directory, whole files, the metric."""

import argparse
import hashlib
import logging
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from filelock import FileLock, Timeout
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold

CLASSES = ("healthy", "multiple_diseases", "rust", "scab")
N_FOLDS = 5
TTA_DRAWS = 8
SOURCES = ("train.py", "launch.py", "models.py", "dataset.py", "utils.py")  # what a training's result depends on
# Options that change no result by themselves: what they name is compared by its content, or not at all.
FREE_OPTIONS = {"folds", "num_workers", "cache_dir", "val_batch_size", "data_dir", "log_dir", "gpus", "cpu_processes"}
FREE_OPTIONS |= {"weights", "soft_labels_filename", "num_nodes", "parallel_folds"}
# What the folds of one log directory must share: without it their predictions cannot be put together.
COMMON = {"image_size", "backbone", "seed", "train.csv", "the photos"}
FREE_IN_PREDICTION = FREE_OPTIONS - {"weights", "soft_labels_filename"} | {"precision", "devices"}
FOLDERS = ("data_dir", "cache_dir")


class InputError(SystemExit):
    """Something the user can put right: one clear line on stderr and exit status 1, no traceback."""

    def __init__(self, message):
        super().__init__(f"error: {message}")


def go_on():
    """What to type after an interruption, as text."""
    return "the same command" + (", without --fresh," if "--fresh" in sys.argv else "") + " goes on from there"


class Stopped(SystemExit):
    """Ctrl-C or SIGTERM, as an exception that ends the process with status 130 or 143."""


@contextmanager
def stop_cleanly(kept):
    """Within the block Ctrl-C and SIGTERM raise Stopped, and it is said what is not lost: the text of `kept()`.

    Loader workers forked meanwhile ignore both signals: the process that started them ends them.
    """
    received = []
    owner, before = os.getpid(), {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number, frame):
        if os.getpid() == owner:
            for each in before:  # a second one would cut the tidying short
                signal.signal(each, signal.SIG_IGN)
            if hasattr(
                signal, "SIGCHLD"
            ):  # torch's handler raises an error for a worker that the same signal has ended
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            received.append(number)
            raise Stopped(128 + number)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    except BaseException as error:  # torch.save, interrupted, makes a RuntimeError of it
        if not received and not isinstance(error, Stopped):
            raise
        if text := kept():
            say(f"stopped: {text}")
        raise Stopped(128 + received[0] if received else error.code) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------- command line


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a script's docstring and adds the defaults."""


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def not_negative(text):
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 4294967295")
    return value


def positive_number(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def build_parser(doc, log_dir="logs"):
    """The one command line of the pipeline; `doc` is the script's docstring, `log_dir` its default log directory."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)
    size = {"type": positive, "nargs": 2, "metavar": ("H", "W")}
    folds = {"type": int, "nargs": "+", "choices": range(N_FOLDS)}
    gpus = {"type": not_negative, "nargs": "+", "metavar": "GPU"}
    workers = min(8, os.cpu_count())

    add = parser.add_argument_group("files").add_argument
    add("--data_dir", default="data", help="train.csv, test.csv, sample_submission.csv and images/")
    add("--log_dir", default=log_dir, help="checkpoints, metrics and options of one training of all folds")
    add("--cache_dir", default="image_cache", help="for the photos, decoded and resized once")

    add = parser.add_argument_group("what is trained").add_argument
    add("-backbone", "--backbone", default="se_resnext50_32x4d", help="a classifier of pretrainedmodels")
    add("--weights", default="imagenet", help="where the backbone starts: imagenet, none (from scratch) or a file")
    add("--image_size", **size, default=[480, 768], help="height and width, in pixels")
    add("--soft_labels_filename", metavar="CSV", help="train on 0.7 x hard + 0.3 x these labels")
    add("--folds", **folds, default=list(range(N_FOLDS)), help="the folds to train, or to predict with")
    add("--seed", type=not_negative, default=2020, help="of folds, head, order and augmentation")

    add = parser.add_argument_group("how it is trained").add_argument
    add("--max_epochs", type=positive, default=70, help="epochs a fold")
    add("-tbs", "--train_batch_size", type=positive, default=32, help="photos a step, over all devices together")
    add("--accumulate_grad_batches", type=positive, default=1, metavar="N", help="split each batch into N parts")
    add("--lr_schedule", choices=("cosine", "triangular"), default="cosine", help="restarts, or the write-up's cycle")
    add("--gradient_clip_val", type=positive_number, default=1.0, help="the longest gradient")

    add = parser.add_argument_group("what it runs on").add_argument
    add("--gpus", **gpus, help="for example 0 1; without it all GPUs there are, else the CPU")
    add("--cpu_processes", type=positive, metavar="N", help="what --gpus does, on N processes of the CPU")
    add("--precision", choices=("16", "32", "bf16"), help="without it what is fast: 16 on GPUs, bf16 or 32 on CPUs")
    add("-vbs", "--val_batch_size", type=positive, default=16, help="photos a batch in validation and prediction")
    add("--num_workers", type=not_negative, default=workers, help="processes that load photos")
    return parser


def parse_args(parser, argv=None):
    """Parse `argv`; `args.typed` is the set of option names that were given, not left at their defaults."""
    argv = sys.argv[1:] if argv is None else argv
    for word in argv:  # argparse's allow_abbrev=False leaves -t for -tbs alone
        if re.match("-[A-Za-z]", word) and word.split("=")[0] not in parser._option_string_actions:
            parser.error(f"unrecognized option {word}")
    unset = object()
    blank = argparse.Namespace(**{action.dest: unset for action in parser._actions if action.dest != "help"})
    args = parser.parse_args(argv, namespace=blank)
    args.typed = {name for name, value in vars(args).items() if value is not unset}
    for name, value in vars(args).items():
        if value is unset:
            setattr(args, name, parser.get_default(name))
    if hasattr(args, "folds"):
        args.folds = sorted(set(args.folds))
    return args


def choose_device(gpus, cpu_processes=None):
    """The torch device type and indices to use: ("cuda", [0, 1]) or ("cpu", [0]).

    Raises InputError for GPUs that are not there.
    """
    available = torch.cuda.device_count()
    if cpu_processes is not None:
        if gpus is not None:
            raise InputError("--gpus and --cpu_processes exclude each other: leave one out")
        return "cpu", list(range(cpu_processes))
    if gpus is None:
        return ("cuda", list(range(available))) if available else ("cpu", [0])
    missing = [gpu for gpu in gpus if gpu >= available]
    if missing:
        instead = (
            f"type --gpus {' '.join(map(str, range(available)))}" if available else "leave --gpus out to run on the CPU"
        )
        raise InputError(f"--gpus {' '.join(map(str, gpus))}: torch sees {available} GPUs on this machine; {instead}")
    return "cuda", sorted(set(gpus))


def choose_precision(precision, device):
    """The precision asked for, or the fast one of this device: "16", "32" or "bf16". Raises InputError for 16 on a CPU."""
    if precision == "16" and device == "cpu":
        raise InputError("--precision 16 needs a GPU; on the CPU type --precision bf16 or --precision 32")
    if precision is not None:
        return precision
    if device == "cuda":
        return "16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "32"


def is_first_process():
    """Whether this is the process that writes: the first of those that torchrun (RANK) or srun has started, if any."""
    return os.environ.get("RANK" if "TORCHELASTIC_RUN_ID" in os.environ else "SLURM_PROCID", "0") == "0"


def quiet_libraries():
    """Silence what Lightning says about settings that we made on purpose."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")  # it holds folds
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # Lightning's own affair with torch
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # what we log is the same on all devices
    warnings.filterwarnings("ignore", message=".*`lr_scheduler.step.. before `optimizer.step.*")


# ---------------------------------------------------------------------------------------------- seeds and folds


def derive_seed(*numbers):
    """A 64-bit seed that depends on every one of `numbers` (non-negative ints) and on nothing else."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def split_folds(n, seed):
    """Fold number of each of `n` rows of train.csv, int array (n,): KFold(5, shuffle=True, random_state=seed).

    Raises InputError if there are fewer rows than folds.
    """
    if n < N_FOLDS:
        raise InputError(f"train.csv has {n} rows, too few for {N_FOLDS} folds")
    folds = np.empty(n, dtype=np.int64)
    for fold, (_, validation) in enumerate(KFold(N_FOLDS, shuffle=True, random_state=seed).split(np.zeros(n))):
        folds[validation] = fold
    return folds


# ---------------------------------------------------------------------------------------------- the metric


def column_aucs(labels, probabilities):
    """ROC AUC of each class, float array (4,), nan where a class has only positives or only negatives.

    labels: (n, 4) one-hot; probabilities: (n, 4).
    """
    labels = np.asarray(labels) > 0.5
    return np.array(
        [
            roc_auc_score(truth, score) if 0 < truth.sum() < len(truth) else np.nan
            for truth, score in zip(labels.T, np.asarray(probabilities).T, strict=True)
        ]
    )


def mean_auc(labels, probabilities):
    """Mean column-wise ROC AUC, the competition's metric, over the classes for which it is defined.

    Raises InputError if it is defined for none (one class only, there is nothing to rank), or if there is a nan.
    """
    if not np.isfinite(np.asarray(probabilities)).all():
        raise InputError("the network predicts nan: its training has diverged; a smaller --gradient_clip_val may help")
    aucs = column_aucs(labels, probabilities)
    if np.isnan(aucs).all():
        raise InputError("the ROC AUC is undefined: all photos are of one class")
    return float(np.nanmean(aucs))


# ---------------------------------------------------------------------------------------------- whole files


@contextmanager
def atomic_write(path, mode="wb"):
    """Open a temporary file beside `path` that takes its name only when the block succeeded: whole or not at all.

    Raises InputError, naming the file, if it cannot be written; an older version is then still there.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        options = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
        with os.fdopen(descriptor, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    except RuntimeError as error:  # what torch.save makes of an OSError of the file that it writes to
        if not isinstance(error.__context__, OSError):
            raise
        raise InputError(f"cannot write {path}: {error.__context__.strerror}") from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def remove_leftovers(folder, names):
    """Delete what killed processes left of files that atomic_write was writing; names: pattern of the files' names.

    Only for files whose writers hold a lock that is held now.
    """
    for leftover in Path(folder).glob(f".{names}.????????"):  # as tempfile names them
        leftover.unlink(missing_ok=True)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_csv(path, frame):
    """Write a DataFrame as CSV, whole or not at all, without its index."""
    with atomic_write(path, "w") as file:
        frame.to_csv(file, index=False, lineterminator="\n")


def sha256(path):
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------- the log directory


def start_run(args, image_ids, folds, fingerprints, devices):
    """Write hparams.yaml and folds.csv of a new run, or compare with the run that is there already.

    image_ids, folds: the rows of train.csv and their folds; fingerprints: dict of input name to SHA-256; devices: text.
    args.fresh deletes what the folds of args have left, once nothing speaks against the start; args.accept_changes goes
    on in spite of other options, inputs or source files, and records them.
    Returns locks on the folds of args, to be held while they are trained. Raises InputError if another process trains
    one of them, or if the log directory holds folds of other options, inputs or source files, finished or in work.
    """
    log_dir = Path(args.log_dir)
    options = {name: value for name, value in vars(args).items() if name not in ("typed", "fresh", "accept_changes")}
    options |= {name: os.path.abspath(options[name]) for name in FOLDERS}  # the later steps may run in another folder
    options["devices"] = devices
    path = log_dir / "hparams.yaml"
    with lock_file(log_dir / ".hparams.lock"):
        locks = {fold: lock_file(log_dir / f".fold={fold}.lock", wait=False) for fold in range(N_FOLDS)}
        busy = [fold for fold, lock in locks.items() if lock is None]
        for fold in set(busy) & set(args.folds):
            raise InputError(
                f"another process is training fold {fold} in {log_dir}: wait for it, or use another --log_dir"
            )
        removed = args.folds if args.fresh else []
        stays = [fold for fold in range(N_FOLDS) if any(log_dir.glob(f"fold={fold}-*.ckpt")) and fold not in removed]
        record = {"options": options, "fingerprints": fingerprints}
        changes = []
        if stays and not path.exists():
            raise InputError(
                f"{path} is missing, so nobody knows how fold {' '.join(map(str, stays))} was trained: "
                f"use another --log_dir, or train all anew with --fresh --folds {' '.join(map(str, range(N_FOLDS)))}"
            )
        if path.exists() and (stays or busy):
            before = read_hparams(log_dir)
            changes = list_changes(before, options, fingerprints)
            record["accepted_changes"] = before.get("accepted_changes", []) + list(changes.values())
        if changes and (not args.accept_changes or COMMON & set(changes)):
            raise InputError(
                f"{log_dir} holds folds that were trained differently: {'; '.join(changes.values())}. "
                f"Use another --log_dir, train all anew with --fresh --folds {' '.join(map(str, range(N_FOLDS)))}"
                + ("" if COMMON & set(changes) else ", or keep what is there with --accept_changes")
            )
        for fold in args.folds:
            remove_leftovers(log_dir, f"fold={fold}-*.ckpt")
            remove_leftovers(log_dir / "metrics", f"fold={fold}.csv")
            remove_leftovers(result_path(log_dir, fold).parent, "result.csv")
        for fold in removed:  # before the new record is there, or a kill in between would pass old results off as new
            remove_fold(log_dir, fold)
        if changes or not path.exists() or not (stays or busy):
            with atomic_write(path, "w") as file:
                yaml.safe_dump(record, file, sort_keys=False)
        write_csv(log_dir / "folds.csv", pd.DataFrame({"image_id": image_ids, "fold": folds}))
        if changes:
            say(f"note: going on in {log_dir} in spite of: {'; '.join(changes.values())}")
    for fold in set(locks) - set(busy) - set(args.folds):
        locks[fold].release()
    return [locks[fold] for fold in args.folds]


def lock_file(path, wait=True):
    """Hold a lock, for a `with` or until it is released or the process ends; None if it is taken and `wait` is False.

    Raises InputError if the lock's file cannot be made.
    """
    make_folder(Path(path).parent)
    try:
        lock = FileLock(path)
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        return None
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    return lock


def list_changes(before, options, fingerprints):
    """What differs between the record of a run and a new start: dict of name to text; free options are left out."""
    changes = {
        name: f"{name} was {before['options'].get(name)}, is {value}"
        for name, value in options.items()
        if name not in FREE_OPTIONS and before["options"].get(name) != value
    }
    names = sorted(fingerprints.keys() | before["fingerprints"].keys())
    return changes | {
        name: f"{name}: changed" for name in names if before["fingerprints"].get(name) != fingerprints.get(name)
    }


def make_folder(path):
    """Make a folder and those above it. Raises InputError if that is not possible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path}: {error.strerror}") from error


def remove_fold(log_dir, fold):
    """Delete what a fold has left in a log directory: checkpoints, metrics and result."""
    metrics = Path(log_dir) / "metrics"
    for path in [
        *metrics.glob(f"fold={fold}/*"),
        metrics / f"fold={fold}.csv",
        *Path(log_dir).glob(f"fold={fold}-*.ckpt"),
    ]:
        path.unlink(missing_ok=True)


def read_hparams(log_dir):
    """The record that train.py wrote: {"options": …, "fingerprints": …}."""
    path = Path(log_dir) / "hparams.yaml"
    if not path.exists():
        raise InputError(f"{path} is missing: train first, or name the log directory with --log_dir")
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        record = None
    parts = [record.get(name) for name in ("options", "fingerprints")] if isinstance(record, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise InputError(f"{path} is damaged: not what train.py writes")
    return record


def result_path(log_dir, fold):
    """Where a finished fold leaves its result; results.csv is put together from these."""
    return Path(log_dir) / "metrics" / f"fold={fold}" / "result.csv"


def check_sources(log_dir):
    """Raise InputError if the source files are not those that log_dir's record names: they were edited meanwhile."""
    recorded = read_hparams(log_dir)["fingerprints"]
    changed = [name for name in SOURCES if recorded.get(name) != sha256(Path(__file__).parent / name)]
    if changed:
        raise InputError(f"{', '.join(changed)}: changed since this training was started")


def resume_path(log_dir, fold):
    """Where a fold in work leaves all that it needs to go on after an interruption; gone when it is finished."""
    return Path(log_dir) / f"fold={fold}-last.ckpt"


def finish_fold(log_dir, fold, epoch, val_loss, val_roc_auc, checkpoint):
    """Record the result of a finished fold, then put results.csv together from all; checkpoint: its best one's name."""
    result = {"fold": fold, "epoch": epoch, "val_loss": val_loss, "val_roc_auc": val_roc_auc, "checkpoint": checkpoint}
    write_csv(result_path(log_dir, fold), pd.DataFrame([result]))
    resume_path(log_dir, fold).unlink(missing_ok=True)
    collect_results(log_dir)


def read_own_csv(path, columns=()):
    """Read a CSV file that train.py wrote. Raises InputError if it is damaged, lacks one of `columns` or is unreadable."""
    try:
        frame = pd.read_csv(path, dtype={"image_id": str}, keep_default_na=False)  # NA may be an id
        missing = [name for name in columns if name not in frame]
        if missing or frame.empty:
            raise ValueError(f"it lacks the column {missing[0]}" if missing else "it has no rows")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): train its fold anew with --fresh") from error
    return frame


def is_finished(log_dir, fold):
    """Whether a fold has a result and the checkpoint that it names."""
    path = result_path(log_dir, fold)
    return (
        path.exists()
        and (Path(log_dir) / read_own_csv(path, ("fold", "epoch", "checkpoint"))["checkpoint"][0]).exists()
    )


def collect_results(log_dir):
    """The results of all finished folds, DataFrame, a row a fold; also written as results.csv, for people."""
    with lock_file(Path(log_dir) / ".hparams.lock"):
        remove_leftovers(log_dir, "results.csv")
        paths = [result_path(log_dir, fold) for fold in range(N_FOLDS)]
        results = pd.concat([read_own_csv(path) for path in paths if path.exists()], ignore_index=True)
        write_csv(Path(log_dir) / "results.csv", results)
    return results


def read_results(log_dir, folds):
    """The best checkpoint of each fold: DataFrame (fold, epoch, val_loss, val_roc_auc, checkpoint), a row a fold.

    Raises InputError, naming what is missing, unless every one of `folds` is finished and its checkpoint is there.
    """
    missing = [fold for fold in folds if not is_finished(log_dir, fold)]
    if missing:
        folds = " ".join(map(str, missing))
        raise InputError(f"{log_dir}: fold {folds} has no result and checkpoint; run train.py --folds {folds} first")
    return pd.concat([read_own_csv(result_path(log_dir, fold)) for fold in folds], ignore_index=True)


def adopt_run_options(args):
    """Take from the record of log_dir what was not typed: image size, backbone, data, …

    Raises InputError if a typed option contradicts what was trained. Options that change no result are free.
    """
    for name, value in read_hparams(args.log_dir)["options"].items():
        if name in FOLDERS:
            setattr(args, name, getattr(args, name) if name in args.typed else value)
        elif name in FREE_IN_PREDICTION:
            continue
        elif name in args.typed and getattr(args, name) != value:
            was = " ".join(map(str, value)) if isinstance(value, list) else value
            raise InputError(f"{args.log_dir} was trained with --{name} {was}: leave the option out")
        else:
            setattr(args, name, value)


def read_folds(log_dir, image_ids):
    """The fold of each of `image_ids` as train.py wrote it, int array (n,). Raises InputError if the ids differ."""
    path = Path(log_dir) / "folds.csv"
    if not path.exists():
        raise InputError(f"{path} is missing: train first, or name the log directory with --log_dir")
    folds = read_own_csv(path, ("image_id", "fold")).set_index("image_id")["fold"]
    if set(folds.index) != set(image_ids) or folds.index.has_duplicates:
        raise InputError(
            f"{path} is about other photos than train.csv: name the --data_dir that {log_dir} was trained on"
        )
    return folds.loc[list(image_ids)].to_numpy()


def prepare_prediction(args):
    """What steps 2 and 4 begin with: adopt the run's options, find and name the best checkpoint of each fold.

    Sets args.devices (list of torch.device), args.precision and args.fingerprint (a digest of the checkpoints and the
    source files); returns the checkpoints, DataFrame with fold and checkpoint. Raises InputError for a log directory
    that is not complete.
    """
    quiet_libraries()
    adopt_run_options(args)
    checkpoints = read_results(args.log_dir, args.folds)
    if (args.cpu_processes or 1) > 1:
        raise InputError("--cpu_processes is for training; prediction uses all cores anyway")
    kind, indices = choose_device(args.gpus, args.cpu_processes)
    args.precision = choose_precision(args.precision or "32", kind)  # as the original predicted
    args.devices = [torch.device(kind, index) for index in indices]
    files = [Path(args.log_dir) / name for name in checkpoints["checkpoint"]]
    files += [Path(__file__).parent / name for name in SOURCES]
    args.fingerprint = " ".join(map(sha256, files))
    if len(checkpoints) < N_FOLDS:
        say(f"note: by the networks of {len(checkpoints)} of {N_FOLDS} folds only")
    say(f"{args.backbone} on {len(indices)} x {kind}, precision {args.precision}; from {args.log_dir}:")
    print(checkpoints.to_string(index=False), flush=True)
    return checkpoints


def say(message):
    """Print at once, with the time of day: what a log of hours is read by. Only the first process speaks."""
    if is_first_process():
        print(f"[{time.strftime('%H:%M:%S')}] {message}", flush=True)
