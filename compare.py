"""Did it help? Trainings compared by their out-of-fold predictions, or submissions with each other.

  python compare.py logs logs_triangular
  python compare.py logs_new_1 logs_new_2 logs_new_3 --against logs_1 logs_2 logs_3
  python compare.py submission_mix.csv --against other.csv

Reads   of each log directory out_of_fold.csv, folds.csv, hparams.yaml, source/ and metrics/: no photo, no checkpoint.
Writes  nothing; with --csv all figures and differences as a table.
Expect  the figures of each training; what differs from the first, or from those behind --against; each difference with
        the interval that holds the true one in 95 of 100 such comparisons; a verdict. Runs of one variant differ in
        --seed alone: several of them tell whether the variant is better, one tells it of that run.
"""

import argparse

from harness.command_line import HelpFormatter, file_or_folder, parse_args

from utils import CLASSES


def make_comparison_parser():
    """What compare.py takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("paths", type=file_or_folder, nargs="+", metavar="LOG_DIR|CSV", help="what is compared")
    group = parser.add_argument_group("with what")
    group.add_argument(
        "--against",
        type=file_or_folder,
        nargs="+",
        metavar="LOG_DIR|CSV",
        help="with these, as runs of one variant; without it the first one is what the others are compared with",
    )
    group.add_argument("--csv", type=file_or_folder, metavar="CSV", help="where the figures go, as a table")
    return parser


if __name__ == "__main__":  # before the imports that take a second: a typo should not wait for them
    ARGS = parse_args(make_comparison_parser())

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.runs import NOTHING_DIFFERS, check_same_photos, describe_changes, read_run
from analysis.statistics import compare, measure
from harness.console import InputError
from harness.files import check_writable, write_csv
from harness.tables import read_scores

SHOWN = 10  # photos that moved most

# ---------------------------------------------------------------------------------------------- trainings


def tabulate(runs, labels):
    """The figures of each run: DataFrame, a row a figure, a column a run."""
    columns = {}
    for run in runs:
        figures = measure(labels, run.probabilities, CLASSES)
        minutes = sum(run.minutes.get(fold, np.nan) for fold in np.unique(run.folds))
        columns[run.name] = {name: value[0] for name, value in figures.items()} | {"minutes of training": minutes}
    return pd.DataFrame(columns)


def show(value, name, sign=False):
    """A figure as text."""
    digits = 0 if name == "wrong photos" else 1 if name.startswith("minutes") else 4
    if np.isinf(value):
        return "unknown"
    return "-" if np.isnan(value) else f"{value:{'+' if sign else ''}.{digits}f}"


def print_table(rows):
    """Rows of texts in columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def name_of(runs):
    """What a variant is called: its log directories."""
    return ", ".join(run.name for run in runs)


def mean_of(runs):
    """The mean probabilities of runs of the same photos, float (n, k)."""
    return np.mean([run.probabilities for run in runs], axis=0)


def print_by_fold(labels, variants):
    """The difference of the mean AUC in each fold, if all runs have the same folds."""
    folds = variants[0][0].folds
    if any((run.folds != folds).any() for runs in variants for run in runs):
        n = max(int((run.folds != folds).sum()) for runs in variants for run in runs)
        print(f"the folds are not the same ({n} photos are in another one): the comparison is photo by photo")
        return
    texts = []
    for fold in np.unique(folds):
        chosen = folds == fold
        first, second = (
            np.mean([measure(labels[chosen], run.probabilities[chosen], CLASSES)["mean AUC"][0] for run in runs])
            for runs in variants
        )
        texts.append(f"{fold}: {show(second - first, 'mean AUC', sign=True)}")
    print(f"mean AUC by fold: {', '.join(texts)}")


def print_moves(labels, variants):
    """How many photos are decided differently, and those whose probabilities moved most."""
    before, after = map(mean_of, variants)
    was, now = before.argmax(1), after.argmax(1)
    better, worse = ((now != was) & (of == labels) for of in (now, was))
    print(
        f"decided differently: {(now != was).sum()} photos, {better.sum()} of them now right, {worse.sum()} now wrong"
    )
    moved = np.abs(after - before).sum(1) / 2
    rows = [["moved most", "label", "its probability", "prediction"]]
    for row in np.argsort(-moved, kind="stable")[:SHOWN]:
        label, decided = labels[row], CLASSES[was[row]] + (f" → {CLASSES[now[row]]}" if was[row] != now[row] else "")
        share = f"{before[row, label]:.3f} → {after[row, label]:.3f}"
        rows.append([variants[0][0].image_ids[row], CLASSES[label], share, decided])
    print_table(rows)


def verdict(variants, found):
    """What to conclude about the mean AUC, as text. found: its Difference."""
    first, second = map(name_of, variants)
    several = max(map(len, variants)) > 1
    if np.isinf(found.high):
        return f"{second} cannot be told apart from {first}: of a class there is only one photo that all have"
    if all(np.array_equal(variants[0][0].probabilities, run.probabilities) for runs in variants for run in runs):
        return f"{second} and {first} hold the same predictions"
    interval = f"{found.value:+.4f}, from {found.low:+.4f} to {found.high:+.4f}"
    if found:
        is_or_are = "are" if len(variants[1]) > 1 else "is"
        what = f"{second} {is_or_are} {'better' if found.value > 0 else 'worse'} than {first}"
    else:
        what = f"{second} cannot be told apart from {first}"
    about = "the photos and the seeds" if several else "the photos alone"
    text = f"{what} in mean AUC ({interval}, 95 %; chance in {about})."
    if not several:
        text += " This is about these two runs: another --seed can turn it round. Compare several, with --against."
    elif min(map(len, variants)) == 1:
        text += " One side is a single run; it is taken to vary as the other does. Give it more seeds."
    return text


def compare_variants(labels, variants):
    """Print how the second of two variants, lists of TrainedRun, differs from the first; returns the rows of --csv."""
    first, second = map(name_of, variants)
    print(f"\n{second} against {first}")
    print(describe_changes(variants[0][0], variants[1][0]))
    differences = compare(labels, [[run.probabilities for run in runs] for runs in variants], CLASSES)
    rows = [["", "difference", "from", "to"]]
    for name, found in differences.items():
        rows.append([name, *(show(value, name, sign=True) for value in (found.value, found.low, found.high))])
    print_table(rows)
    print_by_fold(labels, variants)
    print_moves(labels, variants)
    for run in [run for runs in variants for run in runs]:
        if why := run.why_flattered():
            print(f"note: the figures of {run.name} are too good: {why}")
    says = verdict(variants, differences["mean AUC"])
    print(f"verdict: {says}")
    return [
        {"runs": second, "against": first, "photos": len(labels), "figure": name, "difference": found.value}
        | {"low": found.low, "high": found.high, "verdict": says if name == "mean AUC" else ""}
        for name, found in differences.items()
    ]


def compare_trainings(paths, against):
    """Compare log directories; returns the rows of --csv, DataFrame."""
    names = [*(against or []), *paths]
    twice = {name for name in names if sum(Path(name).resolve() == Path(other).resolve() for other in names) > 1}
    if twice:
        raise InputError(f"{' '.join(sorted(twice))}: named twice")
    if len(names) < 2:
        raise InputError("name two log directories or more")
    runs = [read_run(name, CLASSES) for name in names]
    runs, labels = check_same_photos(runs)
    if len(set(labels)) < 2:
        raise InputError(f"the {len(labels)} photos that all have are of one class: there is nothing to rank")
    groups = [runs[: len(against)], runs[len(against) :]] if against else [[run] for run in runs]
    for group in groups:
        for one, other in combinations(group, 2):
            if np.array_equal(one.probabilities, other.probabilities):
                raise InputError(
                    f"{one.name} and {other.name} hold the same predictions: runs of one variant differ in --seed"
                )
        for other in group[1:]:
            changes = describe_changes(group[0], other, but_for={"seed", "the folds"})
            if changes != NOTHING_DIFFERS:
                print(f"note: {other.name} differs from {group[0].name}, though a run of the same variant: {changes}")

    n_all = max(run.n_photos for run in runs)
    print(f"{len(labels):,} photos that all have, of {n_all:,}; out-of-fold, in the best epochs, which is optimistic")
    table = tabulate(runs, labels)
    rows = [["", *table.columns]] + [[name, *(show(of, name) for of in row)] for name, row in table.iterrows()]
    print_table(rows)
    written = [
        {"runs": name, "photos": len(labels), "figure": figure, "value": value}
        for name, column in table.items()
        for figure, value in column.items()
    ]
    for group in groups[1:]:
        written += compare_variants(labels, [groups[0], group])
    return pd.DataFrame(written)


# ---------------------------------------------------------------------------------------------- submissions


def auc_of_decisions(scores, others):
    """Mean column-wise AUC of `scores` where the truth is what `others` decide; both float (n, k)."""
    return measure(others.argmax(1), scores, CLASSES)["mean AUC"][0]


def compare_submissions(path, against):
    """Print how near two submissions are to each other; returns the rows of --csv, DataFrame."""
    ours = read_scores(path, CLASSES)
    theirs = read_scores(against, CLASSES, ours["image_id"])
    a, b = (table[list(CLASSES)].to_numpy() for table in (ours, theirs))
    ranks_a, ranks_b = (table[list(CLASSES)].rank().to_numpy() for table in (ours, theirs))
    ranks_a, ranks_b = (np.where(ranks.std(0) > 0, ranks, np.nan) for ranks in (ranks_a, ranks_b))  # nan: no order
    figures = {
        f"rank correlation, {name}": np.corrcoef(ranks_a[:, k], ranks_b[:, k])[0, 1] for k, name in enumerate(CLASSES)
    }
    same = a.argmax(1) == b.argmax(1)
    figures |= {
        "photos with the same class first": same.sum(),
        "AUC of the first, if the second decides right": auc_of_decisions(a, b),
        "AUC of the second, if the first decides right": auc_of_decisions(b, a),
    }
    for name, scores in (("first", a), ("second", b)):
        figures[f"largest value of the {name}"] = scores.max()
        figures[f"mean of each photo's largest, of the {name}"] = scores.max(1).mean()
    print(f"first: {path}; second: {against}; {len(ours):,} photos")
    print_table([[name, f"{value:.0f}" if "photos" in name else show(value, name)] for name, value in figures.items()])
    moved = np.abs(a - b).sum(1) / 2
    rows = [["most different", *CLASSES, "instead of", *([""] * 3)]]
    for row in np.argsort(-moved, kind="stable")[:SHOWN]:
        rows.append([ours["image_id"][row], *(f"{value:.3f}" for value in (*a[row], *b[row]))])
    print_table(rows)
    return pd.DataFrame({"figure": figures.keys(), "value": figures.values()})


def main(args):
    names = [*args.paths, *(args.against or [])]
    for path in names:
        if not Path(path).exists():
            raise InputError(f"{path} does not exist")
    if args.csv is not None:
        check_writable(args.csv)
        output = Path(args.csv).resolve()
        for path in map(Path, names):
            if output.is_relative_to(path.resolve()):
                raise InputError(f"--csv {args.csv} is, or is in, what is compared: name another file")
    files = [path for path in names if Path(path).is_file()]
    if files and len(files) < len(names):
        raise InputError(f"{files[0]} is a file, others are not: compare log directories, or one CSV --against another")
    if files and (len(args.paths), len(args.against or [])) != (1, 1):
        raise InputError("submissions are compared in pairs: compare.py ONE.csv --against OTHER.csv")
    if files:
        table = compare_submissions(args.paths[0], args.against[0])
    else:
        table = compare_trainings(args.paths, args.against)
    if args.csv is not None:
        write_csv(args.csv, table)
        print(f"wrote {args.csv}: {len(table)} rows")


if __name__ == "__main__":
    main(ARGS)
