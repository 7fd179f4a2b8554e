"""The log directory: what a run was started with, and what its folds have left."""

import hashlib
import os
from pathlib import Path

import pandas as pd
import yaml

from harness.console import InputError, say
from harness.files import atomic_write, lock_file, remove, remove_leftovers, write_csv
from harness.sources import digest, read_source, show_changes, training_sources, whole_diff

# Options that change no result by themselves: what they name is compared by its content, or not at all.
FREE_OPTIONS = {"folds", "num_workers", "cache_dir", "val_batch_size", "data_dir", "log_dir", "gpus", "cpu_processes"}
FREE_OPTIONS |= {"weights", "soft_labels_filename", "num_nodes", "parallel_folds", "fold_seed"}
# What the folds of one log directory must share: without it their predictions cannot be put together.
COMMON = {"image_size", "backbone", "seed", "limit", "train.csv", "the photos", "the folds"}
FORMAT = 3  # of the log directory; raise it when an older one cannot be continued
FREE_IN_PREDICTION = FREE_OPTIONS - {"weights", "soft_labels_filename"} | {"precision", "devices"}
FOLDERS = ("data_dir", "cache_dir")


def open_log_dir(args, n_folds, image_ids, folds, fingerprints, definitions, sources, devices, environment):
    """Write hparams.yaml, folds.csv and source/ of a new run, or compare with the run that is there already.

    image_ids, folds: the rows of train.csv and their folds; fingerprints: dict of input name to SHA-256; definitions:
    the same of what the networks need to predict as they were trained; sources: dict of file name to text; devices: text;
    environment: dict of what results depend on to the byte, but which may change.
    args.fresh deletes what the folds of args have left, once nothing speaks against the start; args.accept_changes goes
    on in spite of other options, inputs or source files, and records them.
    Returns locks on the folds of args, to be held while they are trained. Raises InputError if another process trains
    one of them, or if the log directory holds folds of other options, inputs or source files, finished or in work.
    """
    log_dir = Path(args.log_dir)
    options = recorded_options(args)
    options |= {name: os.path.abspath(options[name]) for name in FOLDERS}  # the later steps may run in another folder
    options["devices"] = devices
    path, all_folds = log_dir / "hparams.yaml", " ".join(map(str, range(n_folds)))
    with lock_file(log_dir / ".hparams.lock"):
        locks, others_in_work = lock_folds(log_dir, args.folds, n_folds)
        removed = args.folds if args.fresh else []
        stays = [fold for fold in range(n_folds) if any(log_dir.glob(f"fold={fold}-*.ckpt")) and fold not in removed]
        folds_text = "".join(f"{image_id},{fold}\n" for image_id, fold in zip(image_ids, folds, strict=True))
        fingerprints = fingerprints | definitions | {"the folds": hashlib.sha256(folds_text.encode()).hexdigest()}
        fingerprints |= {name: digest(text) for name, text in sources.items()}
        record = {"format": FORMAT, "options": options, "environment": environment, "fingerprints": fingerprints}
        common, changes = COMMON | set(definitions), []
        if stays and not path.exists():
            raise InputError(
                f"{path} is missing, so nobody knows how fold {' '.join(map(str, stays))} was trained: "
                f"use another --log_dir, or train all anew with --fresh --folds {all_folds}"
            )
        if path.exists() and (stays or others_in_work):
            before = read_hparams(log_dir)
            if before.get("format") != FORMAT:
                raise InputError(
                    f"{log_dir} was begun by another version of this repository, so what was edited since cannot be "
                    f"told: use another --log_dir, or train all anew with --fresh --folds {all_folds}"
                )
            changes = list_changes(before, options, fingerprints)
            note_environment(log_dir, before.get("environment", {}), environment)
            record["accepted_changes"] = before.get("accepted_changes", []) + list(changes.values())
        if changes and (not args.accept_changes or common & set(changes)):
            raise InputError(
                f"{log_dir} holds folds that were trained differently: {'; '.join(changes.values())}. "
                f"Use another --log_dir, train all anew with --fresh --folds {all_folds}"
                + ("" if common & set(changes) else ", or keep what is there with --accept_changes")
                + show_changes(read_kept_sources(log_dir), sources, changes)
            )
        for fold in args.folds:
            remove_leftovers(log_dir, f"fold={fold}-*.ckpt")
            remove_leftovers(log_dir / "metrics", f"fold={fold}.csv")
            remove_leftovers(result_path(log_dir, fold).parent, "result.csv")
        for fold in removed:  # before the new record is there, or a kill in between would pass old results off as new
            remove_fold(log_dir, fold)
        if changes or not path.exists() or not (stays or others_in_work):
            keep_sources(log_dir, sources, changes if stays or others_in_work else None)
            with atomic_write(path, "w") as file:
                yaml.safe_dump(record, file, sort_keys=False)
        write_csv(log_dir / "folds.csv", pd.DataFrame({"image_id": image_ids, "fold": folds}))
        if changes:
            say(f"note: going on in {log_dir} in spite of: {'; '.join(changes.values())}")
    return locks


def recorded_options(args):
    """The options that hparams.yaml records, dict: all but those that say what to do with what is there already."""
    return {name: value for name, value in vars(args).items() if name not in ("typed", "fresh", "accept_changes")}


def read_kept_sources(log_dir):
    """The recipe as it was when the log directory was begun, LOG_DIR/source/: dict of file name to text."""
    folder = Path(log_dir) / "source"
    return {path.relative_to(folder).as_posix(): read_source(path) for path in folder.rglob("*.py")}


def keep_sources(log_dir, sources, changes):
    """Write LOG_DIR/source/ of a new run (changes: None), or beside it what was accepted later, as a numbered diff."""
    folder = Path(log_dir) / "source"
    if changes is None:
        for path in [*folder.rglob("*.py"), *folder.glob("accepted-*.diff")]:
            remove(path)
        for name, text in sources.items():
            with atomic_write(folder / name, "w") as file:
                file.write(text)
    elif set(changes) & set(sources):
        number = len(list(folder.glob("accepted-*.diff"))) + 1
        with atomic_write(folder / f"accepted-{number}.diff", "w") as file:
            file.write(whole_diff(read_kept_sources(log_dir), sources))


def lock_folds(log_dir, folds, n_folds):
    """Locks on `folds`, and whether other processes train other folds. Raises InputError if one trains one of `folds`.

    To be called while .hparams.lock is held: nobody else can then take the moment's look at a lock for a training.
    """
    locks, others_in_work = [], False
    for fold in range(n_folds):
        lock = lock_file(log_dir / f".fold={fold}.lock", wait=False)
        if lock is None and fold in folds:
            raise InputError(
                f"another process is training fold {fold} in {log_dir}: wait for it, or use another --log_dir"
            )
        if lock is None:
            others_in_work = True
        elif fold in folds:
            locks.append(lock)
        else:
            lock.release()
    return locks, others_in_work


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


def note_environment(log_dir, before, now):
    """Say what of the environment, dicts of name to value, is another than at the start of a run."""
    others = [f"{name} was {before[name]}, is {now.get(name)}" for name in before if before[name] != now.get(name)]
    if others:
        say(
            f"note: {log_dir} was begun in another environment ({'; '.join(others)}): results may differ in their last "
            "digits from those of an uninterrupted run"
        )


def remove_fold(log_dir, fold):
    """Delete what a fold has left in a log directory: checkpoints, metrics and result."""
    metrics = Path(log_dir) / "metrics"
    for path in [
        *metrics.glob(f"fold={fold}/*"),
        metrics / f"fold={fold}.csv",
        *Path(log_dir).glob(f"fold={fold}-*.ckpt"),
    ]:
        remove(path)


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


def out_of_fold_path(log_dir, fold):
    """Where a finished fold leaves its part of out_of_fold.csv."""
    return result_path(log_dir, fold).with_name("out_of_fold.csv")


def check_sources(log_dir, sources):
    """Raise InputError if `sources`, dict of name to text, are not those that log_dir's record names: edited meanwhile."""
    recorded = read_hparams(log_dir)["fingerprints"]
    changed = [name for name, text in sources.items() if recorded.get(name) != digest(text)]
    if changed:
        raise InputError(f"{', '.join(changed)}: changed since this training was started")


def resume_path(log_dir, fold):
    """Where a fold in work leaves all that it needs to go on after an interruption; gone when it is finished."""
    return Path(log_dir) / f"fold={fold}-last.ckpt"


def finish_fold(log_dir, n_folds, fold, best, last, checkpoint, out_of_fold):
    """Record the result of a finished fold, then put results.csv and out_of_fold.csv together from all.

    best, last: the log's rows of its best and of its last epoch, dict; checkpoint: the name of the best epoch's;
    out_of_fold: what that epoch's network made of the fold's own photos, DataFrame with image_id, label and a column a
    class.
    """
    metrics = {name: value for name, value in best.items() if name.startswith("val_")}
    of_last = {f"last_{name}": value for name, value in last.items() if name.startswith("val_")}
    result = {"fold": fold, "epoch": best["epoch"], **metrics, **of_last, "checkpoint": checkpoint}
    write_csv(out_of_fold_path(log_dir, fold), out_of_fold)
    write_csv(result_path(log_dir, fold), pd.DataFrame([result]))
    remove(resume_path(log_dir, fold))
    collect_results(log_dir, n_folds)


def read_own_csv(path, columns=()):
    """Read a CSV file that train.py wrote. Raises InputError if it is damaged, lacks one of `columns` or is unreadable."""
    try:  # NA may be an id; and pandas before 3 reads numbers to the last digit only if told to
        frame = pd.read_csv(path, dtype={"image_id": str}, keep_default_na=False, float_precision="round_trip")
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


def collect_results(log_dir, n_folds):
    """The results of all finished folds, DataFrame, a row a fold; also written, for people, as results.csv.

    The same of their out-of-fold predictions, image_id, fold, label and a column a class, as out_of_fold.csv.
    """
    with lock_file(Path(log_dir) / ".hparams.lock"):
        for name in ("results.csv", "out_of_fold.csv"):
            remove_leftovers(log_dir, name)
        folds = [fold for fold in range(n_folds) if result_path(log_dir, fold).exists()]
        results = pd.concat([read_own_csv(result_path(log_dir, fold)) for fold in folds], ignore_index=True)
        write_csv(Path(log_dir) / "results.csv", results)
        parts = {fold: read_own_csv(out_of_fold_path(log_dir, fold), ("image_id",)) for fold in folds}
        out_of_fold = pd.concat(parts, names=["fold", None]).reset_index("fold")
        out_of_fold.insert(0, "image_id", out_of_fold.pop("image_id"))
        write_csv(Path(log_dir) / "out_of_fold.csv", out_of_fold)
    return results


def show_results(results):
    """Results, or some of their folds, as a table for the terminal: the best epochs only."""
    print(
        results.drop(columns=[name for name in results if name.startswith("last_")]).to_string(index=False), flush=True
    )


def read_results(log_dir, folds):
    """The best checkpoint of each fold: DataFrame (fold, epoch, val_loss, val_roc_auc, checkpoint), a row a fold.

    Raises InputError, naming what is missing, unless every one of `folds` is finished and its checkpoint is there.
    """
    missing = [fold for fold in folds if not is_finished(log_dir, fold)]
    if missing:
        folds = " ".join(map(str, missing))
        raise InputError(f"{log_dir}: fold {folds} has no result and checkpoint; run train.py --folds {folds} first")
    return pd.concat([read_own_csv(result_path(log_dir, fold)) for fold in folds], ignore_index=True)


def check_definitions(args, definitions):
    """Raise InputError unless the networks still predict as they were trained, or args.accept_changes.

    definitions: dict of name to digest of what a prediction depends on, as given to open_log_dir.
    """
    record = read_hparams(args.log_dir)
    changed = [name for name, value in definitions.items() if record["fingerprints"].get(name) != value]
    if record.get("format") != FORMAT:
        say(f"note: {args.log_dir} is of another version of this repository; edits since then cannot be told")
    elif changed and args.accept_changes:
        say(f"note: predicting in spite of edits since the training: {', '.join(changed)}")
    elif changed:
        sources = training_sources()
        raise InputError(
            f"{', '.join(changed)}: edited since the networks of {args.log_dir} were trained, which would predict "
            "something else now. Undo the edit, train anew, or predict all the same with --accept_changes"
            + show_changes(read_kept_sources(args.log_dir), sources, sources)
        )


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
