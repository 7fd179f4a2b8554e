"""Did it help? Trainings compared by their out-of-fold predictions, or one submission with another.

  python compare.py logs logs_triangular
  python compare.py logs_new_1 logs_new_2 logs_new_3 --against logs_1 logs_2 logs_3
  python compare.py submission_mix.csv --against other.csv

Reads   of each log directory out_of_fold.csv, folds.csv and metrics/: no photos, no checkpoints.
Writes  nothing; with --csv a table of all figures and differences.
Expect  a verdict; the figures of each training; how it was trained differently from the first one, or from those after
        --against; each difference with its 95 % confidence interval. Runs of one variant differ in --seed only. Several
        of them tell whether the variant is better; a single one tells only whether that run is.
"""

from harness.console import Parser, file_or_folder, parse_args
from utils import CLASSES, decide, name_labels


def make_comparison_parser():
    """What compare.py takes."""
    parser, paths = Parser(__doc__), {"type": file_or_folder, "nargs": "+", "metavar": "LOG_DIR|CSV"}
    parser.add_argument("paths", **paths, help="log directories, or one submission")
    parser.add_argument("--against", **paths, help="what to compare with, runs of one variant; default: the first path")
    parser.add_argument("--csv", type=file_or_folder, metavar="CSV", help="also write all figures to this file")
    return parser


if __name__ == "__main__":  # before the imports that take a second: a typo should not wait for them
    ARGS = parse_args(make_comparison_parser())

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.runs import NOTHING_DIFFERS, check_same_photos, describe_changes, read_minutes, read_run
from analysis.statistics import compare, measure
from harness.console import InputError
from harness.files import check_writable, read_table, write_csv
from harness.record import note_differences

SHOWN = 10  # photos that differ most


def show(value, name, sign=False):
    """A figure as text."""
    digits = 0 if "photos" in name else 1 if name.startswith("minutes") else 4
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return "unknown" if np.isinf(value) else "-" if np.isnan(value) else text


def print_table(rows):
    """Rows of texts in columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def mean_auc(labels, scores):
    """The mean column-wise AUC, nan if it is undefined: labels bool (n, k), scores float (n, k)."""
    return measure(labels, scores, CLASSES)["mean AUC"][0]


# ---------------------------------------------------------------------------------------------- trainings


def name_of(runs):
    """What a variant is called: its log directories."""
    return ", ".join(run.name for run in runs)


def give_verdict(labels, variants, found):
    """What to conclude about the mean AUC of the second variant, as text. found: its Difference."""
    first, second = map(name_of, variants)
    runs = [run for variant in variants for run in variant]
    if all(np.array_equal(runs[0].probabilities, run.probabilities) for run in runs):
        return f"{second} and {first} hold the same predictions"
    what = f"{second} cannot be told apart from {first}"
    if np.isinf(found.high):
        alone = 1 in labels.sum(0)
        why = "of a class there is only one photo that all have" if alone else "there are too few photos or seeds"
        return f"{what}: {why}"
    if found:
        is_or_are = "are" if len(variants[1]) > 1 else "is"
        what = f"{second} {is_or_are} {'better' if found.value > 0 else 'worse'} than {first}"
    about = "the photos and the seeds" if len(runs) > 2 else "the photos alone"
    interval = f"{found.value:+.4f}, from {found.low:+.4f} to {found.high:+.4f}"
    text = f"{what} in mean AUC ({interval}, 95 %; chance in {about})."
    if len(runs) == 2:
        text += " This is about these two runs: another --seed can turn it round. Compare several, with --against."
    elif min(map(len, variants)) == 1:
        text += " One side is a single run; it is taken to vary as the other does. Give it more seeds."
    return text


def print_notes(groups):
    """Print what to know before the figures are believed."""
    for run in (run for group in groups for run in group):
        if run.records:
            note_differences(run.name, list(run.records))
        if why := run.why_flattered():
            print(f"note: the figures of {run.name} are too good: {why}")
    for first, other in ((first, other) for first, *others in groups for other in others):
        changes = describe_changes(first, other, but_for={"seed", "the folds"})
        if changes != NOTHING_DIFFERS:
            print(f"note: {other.name} differs from {first.name}, though a run of the same variant: {changes}")


def print_by_fold(labels, variants):
    """Print the difference of the mean AUC in each fold, if all runs have the same folds."""
    folds = variants[0][0].folds
    if n := max(int((run.folds != folds).sum()) for runs in variants for run in runs):
        print(f"the folds are not the same ({n} photos are in another one): the comparison is photo by photo")
        return
    texts = []
    for fold in np.unique(folds):
        of = folds == fold
        first, second = (np.mean([mean_auc(labels[of], run.probabilities[of]) for run in runs]) for runs in variants)
        texts.append(f"{fold}: {show(second - first, 'mean AUC', sign=True)}")
    print(f"mean AUC by fold: {', '.join(texts)}")


def print_moves(labels, variants):
    """Print how many photos are decided differently, and those whose probabilities differ most."""
    before, after = (np.mean([run.probabilities for run in runs], axis=0) for runs in variants)
    was, now = decide(before), decide(after)
    was_right, now_right, names = (was == labels).all(1), (now == labels).all(1), map(name_labels, (labels, was, now))
    n, better, worse = (was != now).any(1).sum(), (now_right & ~was_right).sum(), (was_right & ~now_right).sum()
    print(f"decided differently: {n} photos, {better} of them now right, {worse} now wrong")
    rows = [["moved most", "label", "its probability", "prediction"]]
    table = list(zip(variants[0][0].image_ids, *names, strict=True))
    for row in np.argsort(-np.abs(after - before).sum(1), kind="stable")[:SHOWN]:
        image_id, label, first, second = table[row]
        share = ", ".join(f"{before[row, k]:.3f} → {after[row, k]:.3f}" for k in np.flatnonzero(labels[row]))
        rows.append([image_id, label, share, first + (f" → {second}" if first != second else "")])
    print_table(rows)


def compare_trainings(paths, against):
    """Compare log directories, with those of `against` or else with the first one; returns the rows of --csv."""
    names = [*against, *paths]
    if len({Path(name).resolve() for name in names}) < len(names):
        raise InputError(f"{' '.join(names)}: one of these is named twice")
    if len(names) < 2:
        raise InputError("name two log directories or more")
    runs, labels = check_same_photos([read_run(name, CLASSES) for name in names])
    if (labels == labels[0]).all():
        raise InputError(f"the {len(labels)} photos that all have are of one class: there is nothing to rank")
    groups = [runs[: len(against)], runs[len(against) :]] if against else [[run] for run in runs]
    for one, other in (pair for group in groups for pair in combinations(group, 2)):
        if np.array_equal(one.probabilities, other.probabilities):
            both = f"{one.name} and {other.name}"
            raise InputError(f"{both} hold the same predictions: runs of one variant differ in --seed")

    written, pairs = [], [[groups[0], group] for group in groups[1:]]
    differences = [compare(labels, [[run.probabilities for run in of] for of in pair], CLASSES) for pair in pairs]
    for pair, found in zip(pairs, differences, strict=True):
        verdict = give_verdict(labels, pair, found["mean AUC"])
        print(f"verdict: {verdict}")
        names = {"runs": name_of(pair[1]), "against": name_of(pair[0]), "photos": len(labels)}
        table = pd.DataFrame(map(vars, found.values())).rename(columns={"value": "difference"})
        written.append(table.assign(**names, figure=list(found), verdict=[verdict] + [""] * (len(found) - 1)))
    print_notes(groups)
    n_all = max(len(run.all_ids) for run in runs)
    print(f"{len(labels):,} photos that all have, of {n_all:,}; out-of-fold, in the best epochs, which is optimistic")
    measured = {run.name: measure(labels, run.probabilities, CLASSES) for run in runs}
    table = pd.DataFrame({name: {figure: of[0] for figure, of in all.items()} for name, all in measured.items()})
    table.loc["minutes of training"] = [sum(read_minutes(run.name, k) for k in np.unique(run.folds)) for run in runs]
    print_table([["", *table]] + [[name, *(show(value, name) for value in row)] for name, row in table.iterrows()])
    for pair, found in zip(pairs, differences, strict=True):
        print(f"\n{name_of(pair[1])} against {name_of(pair[0])}\n{describe_changes(pair[0][0], pair[1][0])}")
        rows = [[name, *(show(value, name, sign=True) for value in vars(of).values())] for name, of in found.items()]
        print_table([["", "difference", "from", "to"], *rows])
        print_by_fold(labels, pair)
        print_moves(labels, pair)
    table = table.rename_axis("figure").reset_index().melt("figure", var_name="runs").assign(photos=len(labels))
    return pd.concat([table[["runs", "photos", "figure", "value"]], *written])


# ---------------------------------------------------------------------------------------------- submissions


def compare_submissions(path, against):
    """Print how near two submissions are to each other; returns the rows of --csv, DataFrame."""
    ours = read_table(path, ("image_id", *CLASSES))
    theirs = read_table(against, ("image_id", *CLASSES), wanted=ours["image_id"])
    a, b = (table[list(CLASSES)].to_numpy() for table in (ours, theirs))
    ranks = {name: [table[name].rank() for table in (ours, theirs)] for name in CLASSES}
    with np.errstate(invalid="ignore"):  # of equal values: nan
        figures = {f"rank correlation, {name}": np.corrcoef(both)[0, 1] for name, both in ranks.items()}
    figures["photos with the same class first"] = (a.argmax(1) == b.argmax(1)).sum()
    figures["AUC of the first, if the second decides right"] = mean_auc(decide(b), a)
    figures["AUC of the second, if the first decides right"] = mean_auc(decide(a), b)
    for name, scores in (("first", a), ("second", b)):
        figures[f"largest value of the {name}"] = scores.max()
        figures[f"mean of each photo's largest, of the {name}"] = scores.max(1).mean()
    print(f"first: {path}; second: {against}; {len(ours):,} photos")
    print_table([[name, show(value, name)] for name, value in figures.items()])
    rows = [["most different", *CLASSES, *(f"second: {name}" for name in CLASSES)]]
    for row in np.argsort(-np.abs(a - b).sum(1), kind="stable")[:SHOWN]:
        rows.append([ours["image_id"][row], *(f"{value:.3f}" for value in (*a[row], *b[row]))])
    print_table(rows)
    return pd.DataFrame({"figure": figures.keys(), "value": figures.values()})


def main(args):
    against = args.against or []
    names = [*args.paths, *against]
    if missing := [path for path in names if not Path(path).exists()]:
        raise InputError(f"{missing[0]} does not exist")
    files = [path for path in names if not Path(path).is_dir()]
    if files and len(files) < len(names):
        raise InputError(f"{files[0]} is a file, others are not: compare log directories, or one CSV --against another")
    if files and (len(args.paths), len(against)) != (1, 1):
        raise InputError("submissions are compared in pairs: compare.py ONE.csv --against OTHER.csv")
    if args.csv is not None:
        check_writable(args.csv)
        if any(Path(args.csv).resolve().is_relative_to(Path(path).resolve()) for path in names):
            raise InputError(f"--csv {args.csv} is, or is in, what is compared: name another file")
    table = compare_submissions(*names) if files else compare_trainings(args.paths, against)
    if args.csv is not None:
        write_csv(args.csv, table)
        print(f"wrote {args.csv}: {len(table)} rows")


if __name__ == "__main__":
    main(ARGS)
