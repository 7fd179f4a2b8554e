"""The log directory: what each fold was trained with, from which source files, and its result.

LOG_DIR/hparams.yaml is of the last start; metrics/fold=K/hparams.yaml of the start that has begun fold K, and when the
fold is finished it holds its result, too. LOG_DIR/source/KEY/ are the source files of the starts whose record says KEY.
"""

import ast
import importlib.util
import os
import tokenize
from functools import cache
from pathlib import Path

import pandas as pd
import yaml

from harness.console import InputError, refusing, say
from harness.files import atomic_write, digest, lock_file, remove, write_csv

ROOT = Path(__file__).parent.parent
FORMAT = 4  # of the log directory; raise it when an older one cannot be continued
# Options that are not recorded: what to do with what is there already, and what changes no result at all.
NOT_RECORDED = {"typed", "fresh", "accept_changes", "folds", "num_workers", "gpus", "cpu_processes", "parallel_folds"}
# Options that change no result by themselves: what they name is compared by its content, or not at all.
FREE_OPTIONS = {"cache_dir", "data_dir", "log_dir", "val_batch_size", "weights", "soft_labels_filename", "fold_seed"}
FOLDERS = {"data_dir", "cache_dir"}
FREE_IN_PREDICTION = FREE_OPTIONS - FOLDERS - {"weights", "soft_labels_filename"} | {"precision", "devices", "compile"}
# What the folds of one log directory must share: without it their predictions cannot be put together.
COMMON = {"image_size", "backbone", "seed", "limit", "train.csv", "the photos", "the folds"}

# ---------------------------------------------------------------------------------------------- source files


@cache
def source_files(script):
    """The script and every file of this repository that it imports, directly or not: dict of name to path.

    Found in the text, without running anything; script: its path relative to the root.
    """
    found, todo = {}, [ROOT / script]
    while todo:
        path = todo.pop()
        name = path.relative_to(ROOT).as_posix()
        if name in found or not path.is_file():
            continue
        found[name] = path
        for node in ast.walk(ast.parse(path.read_bytes(), name)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                package = ".".join(path.relative_to(ROOT).parent.parts)
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                modules = [base, *(f"{base}.{alias.name}" for alias in node.names)]
            for parts in (module.split(".") for module in modules):
                places = [ROOT.joinpath(*parts[:end]) for end in range(1, len(parts) + 1)]
                todo += [file for place in places for file in (place / "__init__.py", place.with_suffix(".py"))]
    return dict(sorted(found.items()))


def digest_sources(script):
    """SHA-256 of the files that `script` imports, but for comments and blank lines: dict of name to hexadecimal digits."""
    digests = {}
    for name, path in source_files(script).items():
        with tokenize.open(path) as file:  # decodes as Python does
            lines = file.read().splitlines()
        for token in tokenize.generate_tokens(iter([f"{line}\n" for line in lines]).__next__):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                lines[row - 1] = lines[row - 1][:column]
        digests[name] = digest("\n".join(line.rstrip() for line in lines if line.strip()))
    return digests


# ---------------------------------------------------------------------------------------------- one fold


def record_path(log_dir, fold):
    return Path(log_dir) / "metrics" / f"fold={fold}" / "hparams.yaml"


def resume_path(log_dir, fold):
    """Where a fold in training leaves all that it needs to go on after an interruption; gone when it is finished."""
    return Path(log_dir) / f"fold={fold}-last.ckpt"


def read_record(path):
    """A record that train.py wrote: dict. Raises InputError if it is missing, damaged or of another version."""
    if not path.exists():
        raise InputError(f"{path} is missing: name the --log_dir of a training, or train anew with --fresh")
    with refusing(f"{path} is damaged", yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError):
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
        if record["format"] == FORMAT:
            return record
    raise InputError(f"{path} is of another version of this repository: use another --log_dir")


def write_record(path, record):
    with atomic_write(path, "w") as file:
        yaml.safe_dump(record, file, sort_keys=False)


def read_result(log_dir, fold):
    """The result of a fold, dict, or None unless it is finished and its checkpoint is there."""
    path = record_path(log_dir, fold)
    result = read_record(path).get("result") if path.exists() else None
    return result if result and (Path(log_dir) / result["checkpoint"]).exists() else None


def read_results(log_dir, folds):
    """The results of folds: DataFrame with fold, epoch, val_loss, val_roc_auc, checkpoint and more, a row for each.

    Raises InputError, naming what is missing, unless every one of `folds` is finished.
    """
    results = {fold: read_result(log_dir, fold) for fold in folds}
    if missing := " ".join(str(fold) for fold in folds if results[fold] is None):
        raise InputError(
            f"{log_dir}: fold {missing} has no result and checkpoint; run train.py --folds {missing} first"
        )
    return pd.DataFrame(results.values())


def show_results(results):
    """Results as a table for the terminal: the best epochs only."""
    last = [name for name in results if name.startswith("last_")]
    print(results.drop(columns=last).to_string(index=False), flush=True)


def finish_fold(log_dir, fold, result):
    """Record the result of a fold that is trained, dict of plain types with its checkpoint."""
    write_record(record_path(log_dir, fold), read_record(record_path(log_dir, fold)) | {"result": result})
    remove(resume_path(log_dir, fold))


def remove_fold(log_dir, fold):
    """Delete what a fold has left in a log directory, its record last: a kill in between leaves nothing without one."""
    of_fold = record_path(log_dir, fold)
    others = set(of_fold.parent.glob("*")) - {of_fold} | {of_fold.parent.with_name(f"fold={fold}.csv")}
    for path in [*Path(log_dir).glob(f"fold={fold}-*.ckpt"), *others, of_fold]:
        remove(path)


# ---------------------------------------------------------------------------------------------- a start


def describe_run(args, devices, environment, fingerprints):
    """What a start trains with: a dict of plain types.

    devices: text; environment: dict of what results depend on to the byte, but which may change; fingerprints: dict of
    input name to SHA-256.
    """
    options = {name: value for name, value in vars(args).items() if name not in NOT_RECORDED} | {"devices": devices}
    options |= {name: os.path.abspath(options[name]) for name in FOLDERS}  # the later steps may run in another folder
    sources = digest_sources("train.py")
    record = {"format": FORMAT, "source": digest(repr(sources))[:8], "environment": environment}
    return record | {"options": options, "fingerprints": fingerprints | sources}


def list_changes(before, after):
    """What differs between two records: dict of name to text; what changes no result is left out."""
    was, now = before["options"], after["options"]
    names = [name for name in was | now if name not in FREE_OPTIONS and was.get(name) != now.get(name)]
    changes = {name: f"{name} was {was.get(name)}, is {now.get(name)}" for name in names}
    was, now = before["fingerprints"], after["fingerprints"]
    return changes | {name: f"{name}: changed" for name in was | now if was.get(name) != now.get(name)}


def note_differences(log_dir, folds):
    """Say which of these folds, which are about to be put together, were trained differently from the first of them."""
    records = {fold: read_record(record_path(log_dir, fold)) for fold in folds}
    for fold, record in records.items():
        if changes := "; ".join(list_changes(records[folds[0]], record).values()):
            say(f"note: in {log_dir} fold {fold} was trained differently from fold {folds[0]}: {changes}")


def open_log_dir(args, n_folds, record, folds, check_networks):
    """Compare a start with what the log directory holds, and record it. Returns locks, to be held during the training.

    record: of describe_run; folds: DataFrame of folds.csv; check_networks: function of finished folds that raises
    InputError if their networks no longer predict what they did. Raises InputError if another process trains one of
    these folds, or as compare_folds does; then nothing was deleted.
    """
    log_dir = Path(args.log_dir)
    with lock_file(log_dir / ".hparams.lock"):
        locks = {fold: lock_file(log_dir / f".fold={fold}.lock", wait=False) for fold in range(n_folds)}
        busy = [fold for fold, lock in locks.items() if lock is None]
        for fold in set(locks) - set(args.folds) - set(busy):  # that was a look only
            locks.pop(fold).release()
        if mine := " ".join(str(fold) for fold in args.folds if fold in busy):
            raise InputError(f"another process is training fold {mine} in {log_dir}: wait, or use another --log_dir")
        compare_folds(args, n_folds, record, busy, check_networks)
        for leftover in log_dir.rglob(".*.part") if not busy else ():  # of processes that were killed
            remove(leftover)
        for fold in args.folds:
            if args.fresh or not (read_result(log_dir, fold) or resume_path(log_dir, fold).exists()):
                remove_fold(log_dir, fold)
                write_record(record_path(log_dir, fold), record)
        for name, path in source_files("train.py").items():
            if not (copy := log_dir / "source" / record["source"] / name).exists():
                with atomic_write(copy) as file:
                    file.write(path.read_bytes())
        write_csv(log_dir / "folds.csv", folds)
        write_record(log_dir / "hparams.yaml", record)
    return [lock for lock in locks.values() if lock]


def compare_folds(args, n_folds, record, busy=(), check_networks=None):
    """Raise InputError if folds that stay in the log directory were trained differently; arguments as of open_log_dir.

    busy: folds that other processes are training. args.accept_changes keeps finished folds in spite of changes; those of
    a fold in training are never accepted: what it goes on from holds the optimiser's and the schedule's own options.
    """
    log_dir, changes, in_training, finished = Path(args.log_dir), {}, [], []
    for fold in set(range(n_folds)) - set(args.folds if args.fresh else ()):
        done = read_result(log_dir, fold) is not None
        if done or fold in busy or resume_path(log_dir, fold).exists():
            before = read_record(record_path(log_dir, fold))
            changes |= (of_fold := list_changes(before, record))
            finished += [fold] * done
            in_training += [str(fold)] * (bool(of_fold) and not done)
            was, now = before["environment"], record["environment"]
            if others := "; ".join(f"{name} was {was[name]}" for name in was if was[name] != now.get(name)):
                say(f"note: fold {fold} was begun in another environment ({others}): last digits may differ")
    if not changes:
        return
    what, may_stay = "; ".join(changes.values()), not in_training and not COMMON & changes.keys()
    if args.accept_changes and may_stay:
        if check_networks:
            check_networks(finished)
        return say(f"note: keeping the finished folds of {log_dir} in spite of: {what}")
    if any(name.endswith(".py") for name in changes):
        what += f" (diff -r {log_dir / 'source' / before['source']} {ROOT})"
    if in_training:
        what += f"; and fold {' '.join(in_training)}, which is in training, goes on only as it was begun"
    anew = f"Use another --log_dir, or train all anew with --fresh --folds {' '.join(map(str, range(n_folds)))}"
    keep = "; or keep the finished folds with --accept_changes" if may_stay else ""
    raise InputError(f"{log_dir} holds folds that were trained differently: {what}. {anew}{keep}")


# ---------------------------------------------------------------------------------------------- for the later steps


def adopt_run_options(args):
    """Take from the record of log_dir what was not typed: image size, backbone, data, …

    Raises InputError if a typed option contradicts what was trained. Options that change no result are free.
    """
    for name, value in read_record(Path(args.log_dir) / "hparams.yaml")["options"].items():
        if name in FREE_IN_PREDICTION or name in FOLDERS & args.typed:
            continue
        if name in args.typed and getattr(args, name) != value:
            was = " ".join(map(str, value)) if isinstance(value, list) else value
            raise InputError(f"{args.log_dir} was trained with --{name} {was}: leave the option out")
        setattr(args, name, value)


def read_own_csv(path, columns):
    """Read a CSV file that train.py wrote. Raises InputError if it is missing, damaged, or lacks one of `columns`."""
    # NA may be an id; an undefined metric is empty; and pandas before 3 reads to the last digit only if told to
    exactly = {"float_precision": "round_trip"} if pd.__version__ < "3" else {}
    with refusing(f"{path} is damaged", ValueError, LookupError), refusing(f"cannot read {path}", OSError):
        table = pd.read_csv(path, dtype={"image_id": str}, keep_default_na=False, na_values=[""], **exactly)
        table[list(columns)].iloc[0]
    return table


def read_folds(log_dir, image_ids):
    """The fold of each of `image_ids` as train.py wrote it, int array (n,). Raises InputError if the ids differ."""
    folds = read_own_csv(Path(log_dir) / "folds.csv", ("image_id", "fold")).set_index("image_id")["fold"]
    if set(folds.index) != set(image_ids) or folds.index.has_duplicates:
        raise InputError(
            f"{log_dir}/folds.csv is about other photos than train.csv: name the --data_dir of the training"
        )
    return folds.loc[list(image_ids)].to_numpy()
