"""The log directory: what each fold was trained with, from which source files, and its result.

LOG_DIR/hparams.yaml is of the last start, metrics/fold=K/hparams.yaml of the one that has begun fold K, with its result
when it is finished; source/KEY/ are the source files of the starts whose record says KEY.
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
COMMON = {"classes", "image_size", "backbone", "seed", "limit", "train.csv", "the photos", "the folds"}


@cache
def source_files(script):
    """The script (a path relative to the root) and all files of this repository that it imports: dict of name to path."""
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
                package = ".".join(path.relative_to(ROOT).parent.parts) or "_"  # from . import: in no package
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
            tokens = [token for token in tokenize.generate_tokens(file.readline) if token.type != tokenize.COMMENT]
        lines = tokenize.untokenize(tokens).splitlines()
        digests[name] = digest("\n".join(line.rstrip() for line in lines if line.strip()))
    return digests


def record_path(log_dir, fold):
    return Path(log_dir) / "metrics" / f"fold={fold}" / "hparams.yaml"


def resume_path(log_dir, fold):
    """Where a fold in training leaves all that it needs to go on after an interruption; gone when it is finished."""
    return Path(log_dir) / f"fold={fold}-last.ckpt"


def read_record(path):
    """A record that train.py wrote: dict. Raises InputError if it is missing, damaged or of another version."""
    if not path.exists():
        raise InputError(f"{path} is missing: name the --log_dir of a training, or run train.py (anew: --fresh)")
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
    """The results of folds: DataFrame with fold, epoch, the metrics and checkpoint. Raises InputError if one is missing."""
    results = {fold: read_result(log_dir, fold) for fold in folds}
    if missing := " ".join(str(fold) for fold in folds if results[fold] is None):
        raise InputError(f"{log_dir}: fold {missing} has no result or checkpoint; train it, or name others: --folds")
    return pd.DataFrame(results.values())


def describe_run(args, devices, fingerprints):
    """What a start trains with, dict of plain types. devices: text; fingerprints: name of an input to its SHA-256."""
    options = {name: value for name, value in vars(args).items() if name not in NOT_RECORDED} | {"devices": devices}
    options = yaml.safe_load(yaml.safe_dump(options, sort_keys=False))  # as they will be read, a tuple as a list
    options |= {name: os.path.abspath(options[name]) for name in FOLDERS}  # the later steps may run in another folder
    sources = digest_sources("train.py")
    record = {"format": FORMAT, "source": digest(repr(sources))[:8]}
    return record | {"options": options, "fingerprints": fingerprints | sources}


def comparable(record):
    """What changes a result in a record: dict of name to value."""
    options = {name: value for name, value in record["options"].items() if name not in FREE_OPTIONS}
    return options | record["fingerprints"]


def list_changes(before, after):
    """What differs between two records: dict of name to text; what changes no result is left out."""
    was, now, changes = comparable(before), comparable(after), {}
    for name in now | was:
        if was.get(name) != now.get(name):
            content = name in before["fingerprints"] | after["fingerprints"]
            changes[name] = f"{name}: changed" if content else f"{name} was {was.get(name)}, is {now.get(name)}"
    return changes


def note_differences(log_dir, folds):
    """Say, and return as texts, which of these folds, to be put together, were trained differently from the first of them."""
    notes, records = [], {fold: read_record(record_path(log_dir, fold)) for fold in folds}
    for fold, record in records.items():
        if changes := "; ".join(list_changes(records[folds[0]], record).values()):
            notes.append(f"in {log_dir} fold {fold} was trained differently from fold {folds[0]}: {changes}")
            say(f"note: {notes[-1]}")
    return notes


def open_log_dir(args, n_folds, record, folds, check_networks):
    """Compare a start with what the log directory holds, and record it. Returns locks, to be held during the training.

    check_networks: refuses finished folds whose network was edited, wherever. Raises InputError before it deletes anything.
    """
    log_dir = Path(args.log_dir)
    with lock_file(log_dir / ".hparams.lock"):
        locks = {fold: lock_file(log_dir / f".fold={fold}.lock", wait=False) for fold in range(n_folds)}
        busy = [fold for fold, lock in locks.items() if lock is None]
        for fold in set(locks) - set(args.folds) - set(busy):  # that was a look only
            locks.pop(fold).lock.release()
        if mine := " ".join(str(fold) for fold in args.folds if fold in busy):
            raise InputError(f"another process is training fold {mine} in {log_dir}: wait, or use another --log_dir")
        check_networks(compare_folds(args, n_folds, record, busy))
        for leftover in log_dir.rglob(".*.part") if not busy else ():  # of processes that were killed
            remove(leftover)
        for fold in args.folds:
            if args.fresh or not (read_result(log_dir, fold) or resume_path(log_dir, fold).exists()):
                of_fold = record_path(log_dir, fold)
                left = {*log_dir.glob(f"fold={fold}-*.ckpt"), *log_dir.glob(f"metrics/fold={fold}/*")} - {of_fold}
                for path in [*left, of_fold.parent.with_suffix(".csv"), of_fold]:  # its record last: a kill may come
                    remove(path)
                write_record(of_fold, record)
        for name, path in source_files("train.py").items():
            with atomic_write(log_dir / "source" / record["source"] / name) as file:
                file.write(path.read_bytes())
        write_csv(log_dir / "folds.csv", folds)
        write_record(log_dir / "hparams.yaml", record)
    return [lock for lock in locks.values() if lock]


def compare_folds(args, n_folds, record, busy=()):
    """The finished folds that stay in the log directory; InputError if one, or one in training, was trained differently.

    --accept_changes keeps finished folds only: what one in training goes on from holds the optimiser's own options.
    """
    log_dir, changes, in_training, finished = Path(args.log_dir), {}, [], []
    for fold in set(range(n_folds)) - set(args.folds if args.fresh else ()):
        done = read_result(log_dir, fold) is not None
        if done or fold in busy or resume_path(log_dir, fold).exists():
            before = read_record(record_path(log_dir, fold))
            changes |= (of_fold := list_changes(before, record))
            finished += [fold] * done
            in_training += [str(fold)] * (bool(of_fold) and not done)
            now, was = record["environment"], before["environment"].items()
            if others := "; ".join(f"{name} was {value}" for name, value in was if value != now.get(name)):
                say(f"note: fold {fold} was begun in another environment ({others}): last digits may differ")
    if not changes:
        return finished
    what, may_stay = "; ".join(changes.values()), not in_training and not COMMON & changes.keys()
    if args.accept_changes and may_stay:
        say(f"note: keeping the finished folds of {log_dir} in spite of: {what}")
        return finished
    if any(name.endswith(".py") for name in changes):
        what += f" (diff -r {log_dir / 'source' / before['source']} {ROOT} | grep -v ^Only)"
    if in_training:
        what += f"; and fold {' '.join(in_training)}, which is in training, goes on only as it was begun"
    anew = f"Use another --log_dir, or train all anew with --fresh --folds {' '.join(map(str, range(n_folds)))}"
    keep = "; or keep the finished folds with --accept_changes" if may_stay else ""
    raise InputError(f"{log_dir} holds folds that were trained differently: {what}. {anew}{keep}")


def adopt_run_options(args):
    """Take from the record of log_dir what was not typed. Raises InputError if what was typed contradicts the training."""
    for name, value in read_record(Path(args.log_dir) / "hparams.yaml")["options"].items():
        if name in FREE_IN_PREDICTION or name in FOLDERS & args.typed:
            continue
        if name in args.typed and getattr(args, name) != value:
            was = " ".join(map(str, value)) if isinstance(value, list) else value
            raise InputError(f"{args.log_dir} was trained with --{name} {was}: leave the option out")
        setattr(args, name, value)


def read_own_csv(path, columns):
    """Read a CSV file that train.py wrote. Raises InputError if it is missing, damaged, or lacks one of `columns`."""
    how = {"dtype": {"image_id": str}, "keep_default_na": False, "na_values": [""]}  # NA may be an id
    with refusing(f"{path} is damaged", ValueError, LookupError), refusing(f"cannot read {path}", OSError):
        table = pd.read_csv(path, **how)
        table[list(columns)].iloc[0]
    return table


def read_folds(log_dir, image_ids):
    """The fold of each of `image_ids` as train.py wrote it, int array (n,). Raises InputError if the ids differ."""
    folds = read_own_csv(Path(log_dir) / "folds.csv", ("image_id", "fold")).set_index("image_id")["fold"]
    if set(folds.index) != set(image_ids) or folds.index.has_duplicates:
        raise InputError(f"{log_dir}/folds.csv is about other photos than train.csv: type the training's --data_dir")
    return folds.loc[list(image_ids)].to_numpy()
