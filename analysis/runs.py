"""Finished trainings as compare.py sees them: their predictions, and what they were trained on and with."""

import tokenize
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from harness.console import InputError
from harness.log_dir import list_changes, read_hparams, read_kept_sources, read_own_csv
from harness.sources import show_changes, strip_comments

NOTHING_DIFFERS = "nothing differs in options, inputs and source files"


@dataclass
class TrainedRun:
    """What a log directory holds of its finished folds."""

    name: str  # the directory
    image_ids: list
    folds: np.ndarray  # int (n,)
    labels: np.ndarray  # int (n,), class numbers
    probabilities: np.ndarray  # float (n, k), by the network that has not seen the photo
    all_ids: set  # of folds.csv, also those of folds that are not finished; without folds.csv of the finished ones
    all_known: bool  # whether folds.csv is there
    minutes: dict  # fold to minutes of training, where metrics/ tells
    record: dict | None  # hparams.yaml
    sources: dict  # source file name to text

    @property
    def n_photos(self):
        return len(self.all_ids)

    def why_flattered(self):
        """Why its out-of-fold figures are better than on new photos, beyond the choice of the best epochs, or None."""
        inputs = self.record["fingerprints"] if self.record else {}
        if "pseudo labels" in inputs:
            return "it was trained on pseudo-labels from networks that have seen the photos it is judged by"
        if "soft labels" in inputs:
            return "it was trained on soft labels from networks that have seen the photos it is judged by (weakly)"
        return None


def read_run(log_dir, classes):
    """The TrainedRun of a log directory. Raises InputError if it holds no finished fold, or other classes."""
    folder = Path(log_dir)
    path = folder / "out_of_fold.csv"
    if not folder.is_dir():
        raise InputError(f"{log_dir} is neither a log directory nor a CSV file")
    if not path.is_file():
        raise InputError(f"{path} is missing: train.py writes it when the first fold is finished")
    table = read_own_csv(path, ("image_id", "fold"))
    expected = ["image_id", "fold", "label", *classes]
    if list(table) != expected:
        raise InputError(
            f"{path} has the columns {','.join(table)}, not {','.join(expected)}: other classes, an edited table, or an older version"
        )
    values = table[list(classes)].to_numpy()
    unknown = set(table["label"]) - set(classes)
    if unknown or table["image_id"].duplicated().any() or values.dtype != float or not np.isfinite(values).all():
        raise InputError(f"{path} is damaged: not what train.py writes")
    others = folder / "folds.csv"
    return TrainedRun(
        name=str(log_dir),
        image_ids=table["image_id"].tolist(),
        folds=table["fold"].to_numpy(),
        labels=table["label"].map({name: number for number, name in enumerate(classes)}).to_numpy(),
        probabilities=values,
        all_ids=set(read_own_csv(others, ("image_id",))["image_id"] if others.is_file() else table["image_id"]),
        all_known=others.is_file(),
        minutes={fold: minutes for fold in table["fold"].unique() if (minutes := read_minutes(folder, fold))},
        record=read_hparams(folder) if (folder / "hparams.yaml").is_file() else None,
        sources=read_sources(folder),
    )


def read_sources(folder):
    """The source files that a log directory keeps, dict of name to text. Raises InputError if they are no Python."""
    try:
        sources = read_kept_sources(folder)
        for text in sources.values():
            strip_comments(text)
    except (UnicodeDecodeError, tokenize.TokenError, SyntaxError) as error:
        raise InputError(f"{folder / 'source'} is damaged ({error}): not what train.py writes") from error
    return sources


def read_minutes(folder, fold):
    """Minutes of training of a fold, float, or None if its metrics do not tell."""
    try:
        return float(pd.read_csv(folder / "metrics" / f"fold={fold}.csv")["seconds"].sum() / 60)
    except (OSError, ValueError, KeyError, TypeError):  # a figure on the side: no reason to refuse the comparison
        return None


def check_same_photos(runs):
    """The runs, each on the photos that all have, in one order; and their labels, int (n,).

    Raises InputError if they are about other photos, or if a label is not the same in all.
    """
    first = runs[0]
    for run in runs[1:]:
        limited = any(of.record and of.record["options"].get("limit") for of in (first, run))
        within = run.all_ids <= first.all_ids or run.all_ids >= first.all_ids
        known = first.all_known and run.all_known
        if run.all_ids != first.all_ids and not (within and (limited or not known)):
            raise InputError(
                f"{run.name} is about other photos than {first.name}: of {run.n_photos} and {first.n_photos} they share "
                f"{len(run.all_ids & first.all_ids)}"
            )
    tables = [pd.DataFrame({"row": range(len(run.image_ids)), "label": run.labels}, run.image_ids) for run in runs]
    common = [image_id for image_id in first.image_ids if all(image_id in table.index for table in tables)]
    if not common:
        folds = "; ".join(f"{run.name}: fold {' '.join(map(str, np.unique(run.folds)))}" for run in runs)
        raise InputError(f"no photo has been predicted by all of them ({folds}): train the same folds")
    same = []
    for run, table in zip(runs, tables, strict=True):
        rows = table["row"].loc[common].to_numpy()
        other = np.flatnonzero(run.labels[rows] != tables[0]["label"].loc[common])
        if len(other):
            raise InputError(
                f"{run.name} has other labels than {first.name}, of {common[other[0]]} and {len(other) - 1} others"
            )
        parts = {"folds": run.folds[rows], "labels": run.labels[rows], "probabilities": run.probabilities[rows]}
        same.append(replace(run, image_ids=common, **parts))
    return same, same[0].labels


def describe_changes(before, after, but_for=frozenset()):
    """What differs in options, inputs and source files between two runs, as text; but_for: names that may."""
    if before.record is None or after.record is None:
        missing = next(run.name for run in (before, after) if run.record is None)
        return f"{missing}/hparams.yaml is missing: what differs in options and source files is unknown"
    options = dict.fromkeys(before.record["options"]) | after.record["options"]
    changes = list_changes(before.record, options, after.record["fingerprints"])
    changes = {name: text for name, text in changes.items() if name not in but_for}
    if not changes:
        return NOTHING_DIFFERS
    return "; ".join(changes.values()) + show_changes(before.sources, after.sources, changes)
