"""Finished trainings as compare.py sees them: their predictions, and what each fold was trained on and with."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from harness.console import InputError
from harness.record import list_changes, read_own_csv, read_record, record_path
from utils import name_labels, parse_labels

NOTHING_DIFFERS = "nothing differs in options, inputs and source files"
FROM_NETWORKS = "from networks that have seen the photos it is judged by"


@dataclass
class TrainedRun:
    """What a log directory holds of its finished folds."""

    name: str  # the directory
    image_ids: pd.Index
    folds: np.ndarray  # int (n,)
    labels: np.ndarray  # bool (n, k)
    probabilities: np.ndarray  # float (n, k), by the network that has not seen the photo
    all_ids: set  # of folds.csv, also those of folds that are not finished
    records: dict  # fold to the record of what it was trained with; empty if one is missing

    def why_flattered(self):
        """Why its out-of-fold figures are better than on new photos, beyond the choice of the best epochs, or None."""
        inputs = {name for record in self.records.values() for name in record["fingerprints"]}
        if "pseudo labels" in inputs:
            return f"it was trained on pseudo-labels {FROM_NETWORKS}"
        return f"it was trained on soft labels {FROM_NETWORKS} (weakly)" if "soft labels" in inputs else None


def read_run(log_dir, classes):
    """The TrainedRun of a log directory. Raises InputError if it holds no finished fold, or other classes."""
    folder = Path(log_dir)
    path = folder / "out_of_fold.csv"
    if not path.is_file():
        raise InputError(f"{path} is missing: train.py writes it when a fold is finished")
    table, expected = read_own_csv(path, ("image_id", "fold")), ["image_id", "fold", "label", *classes]
    if list(table) != expected:
        found = f"has the columns {','.join(table)}, not {','.join(expected)}"
        raise InputError(f"{path} {found}: other classes, an edited table, or an older version")
    values, folds = table[list(classes)].to_numpy(), sorted(table["fold"].unique().tolist())
    labels = parse_labels(table["label"])
    known = name_labels(labels) == table["label"].tolist()
    if not known or table["image_id"].duplicated().any() or values.dtype != float or not np.isfinite(values).all():
        raise InputError(f"{path} is damaged: not what train.py writes")
    records = {fold: read_record(of) for fold in folds if (of := record_path(folder, fold)).is_file()}
    # a record without a result is of a fold that is being trained anew, while its predictions are of an earlier training
    complete = [fold for fold, record in records.items() if "result" in record] == folds
    return TrainedRun(
        name=str(log_dir),
        image_ids=pd.Index(table["image_id"]),
        folds=table["fold"].to_numpy(),
        labels=labels,
        probabilities=values,
        all_ids=set(read_own_csv(folder / "folds.csv", ("image_id",))["image_id"]),
        records=records if complete else {},
    )


def read_minutes(log_dir, fold):
    """Minutes of training of a fold, float, nan if its metrics were not kept."""
    path = Path(log_dir) / "metrics" / f"fold={fold}.csv"
    return read_own_csv(path, ["seconds"])["seconds"].sum() / 60 if path.is_file() else np.nan


def check_same_photos(runs):
    """The runs, each on the photos that all have, in one order; and their labels, bool (n, k).

    Raises InputError if they are about other photos, or if a label is not the same in all.
    """
    first, same = runs[0], []
    for run in runs[1:]:
        limited = any(record["options"].get("limit") for of in (first, run) for record in of.records.values())
        nested = run.all_ids <= first.all_ids or run.all_ids >= first.all_ids
        if run.all_ids != first.all_ids and not (nested and limited):
            a, b, both = map(len, (run.all_ids, first.all_ids, run.all_ids & first.all_ids))
            raise InputError(f"{run.name} is about other photos than {first.name}: of {a} and {b} they share {both}")
    common = first.image_ids[np.all([first.image_ids.isin(run.image_ids) for run in runs], axis=0)]
    if common.empty:
        folds = "; ".join(f"{run.name}: fold {' '.join(map(str, np.unique(run.folds)))}" for run in runs)
        raise InputError(f"no photo has been predicted by all of them ({folds}): train the same folds")
    for run in runs:
        rows = run.image_ids.get_indexer(common)
        parts = {"folds": run.folds[rows], "labels": run.labels[rows], "probabilities": run.probabilities[rows]}
        same.append(replace(run, image_ids=common, **parts))
        if other := common[(same[-1].labels != same[0].labels).any(1)].tolist():
            which = f"{other[0]} and {len(other) - 1} others"
            raise InputError(f"{run.name} has other labels than {first.name}, of {which}")
    return same, same[0].labels


def describe_changes(before, after, but_for=frozenset()):
    """What differs in options, inputs and source files in the folds that both runs have, as text; but_for: names that may."""
    if without := [run.name for run in (before, after) if not run.records]:
        return f"{without[0]}/metrics/ lacks the record of a finished fold: what differs in its training is unknown"
    found = {}
    for fold in sorted(before.records.keys() & after.records.keys()):
        was, now = before.records[fold], after.records[fold]
        changes = {name: text for name, text in list_changes(was, now).items() if name not in but_for}
        text = "; ".join(changes.values()) or NOTHING_DIFFERS
        if any(name.endswith(".py") for name in changes):
            text += f" (diff -r {before.name}/source/{was['source']} {after.name}/source/{now['source']})"
        found.setdefault(text, []).append(str(fold))
    texts = found if len(found) == 1 else [f"fold {' '.join(folds)}: {text}" for text, folds in found.items()]
    return "; ".join(texts) or "they have no fold in common"
