"""results/: what its pages and the READMEs say is what the files beside them give; and the pictures of the docs."""

import re
from itertools import combinations

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import REPO

from analysis.statistics import compare
from tools import make_figures
from utils import CLASSES, log_losses, mean_auc, parse_labels

LEAVES = REPO / "results" / "leaves"
SCRATCH = LEAVES / "from_scratch"
SEEDS = (2020, 1, 2)


def out_of_fold(name, seed, folder=LEAVES):
    """The out-of-fold probabilities of each photo: DataFrame with image_id as index and a column per class.

    name: a log directory or a CSV file of that seed; "blend", the mean of both rounds; or "ranks", that of their ranks.
    """
    if name in ("blend", "ranks"):
        rounds = [out_of_fold(logs, seed, folder) for logs in ("logs", "logs_submit_distill")]
        return sum(table.rank(pct=True) if name == "ranks" else table for table in rounds) / 2
    path = folder / f"seed={seed}" / name
    table = pd.read_csv(path if name.endswith(".csv") else path / "out_of_fold.csv", index_col="image_id")
    return table.loc[true_labels(seed, folder).index, list(CLASSES)]


def true_labels(seed, folder=LEAVES):
    """The labels of each photo, Series of text by image_id, in the order in which compare.py reads them."""
    return pd.read_csv(folder / f"seed={seed}" / "logs" / "out_of_fold.csv", index_col="image_id")["label"]


def assert_says(text, *values):
    """That the numbers of a text are these values, each rounded to the digits that it is given with."""
    said = re.findall(r"[-+]?\d+\.\d+", text.replace("−", "-"))
    for number, value in zip(said, values, strict=True):
        assert abs(float(number) - value) <= 0.501 * 10 ** -len(number.split(".")[1]), f"{value} is said to be {number}"


def row_of(page, beginning):
    """The cells of the row of a page that begins so."""
    (row,) = re.findall(rf"^\| {re.escape(beginning)} \|(.*)\|$", page, re.M)
    return row.split("|")


def readme_rows():
    """The rows on real leaves of the English and of the Chinese page, below the head: two lists of text."""
    for name in ("README.md", "README.zh-CN.md"):
        (section,) = (part for part in (REPO / name).read_text().split("\n## ") if "results/leaves/README.md" in part)
        yield re.findall(r"^\|.*", section, re.M)[2:]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_table_of_real_leaves_is_that_of_the_kept_predictions(seed):
    labels = parse_labels(true_labels(seed))
    constant = np.full((1821, len(CLASSES)), 1 / len(CLASSES))  # its AUC is 0.5
    cells = row_of((LEAVES / "README.md").read_text(), str(seed))
    for name, cell in zip(("logs", "logs_submit_distill", "blend", "logs_by_row"), cells, strict=True):
        probabilities = out_of_fold(name, seed).to_numpy()
        auc = compare(labels, [[constant], [probabilities]], CLASSES, names=["mean AUC"])["mean AUC"]
        assert mean_auc(labels, probabilities) == pytest.approx(auc.value + 0.5, abs=1e-9)
        assert_says(cell, auc.value + 0.5, auc.low + 0.5, auc.high + 0.5)


def test_what_the_pages_say_of_step_1_and_of_means_is_so():
    labels, page = parse_labels(true_labels(2020)), (LEAVES / "README.md").read_text()  # the same of all seeds
    step_1 = [out_of_fold("logs", seed).to_numpy() for seed in SEEDS]
    for rows in readme_rows():
        assert_says(rows[0], *(mean_auc(labels, probabilities) for probabilities in step_1))
    losses = [log_losses(labels, probabilities).mean() for probabilities in step_1]
    assert_says(*re.findall(r"log loss of step 1 is (.*?)\. ", page), *losses)
    of_two = sorted(mean_auc(labels, (one + two) / 2) for one, two in combinations(step_1, 2))
    assert_says(*re.findall(r"any two seeds of step 1, which takes\s+no soft labels: (.*?)\. ", page), *of_two)
    labels, scratch = parse_labels(true_labels(2020, SCRATCH)), []
    for name in ("logs", "logs_submit_distill", "logs_by_row"):
        scratch.append(np.mean([mean_auc(labels, out_of_fold(name, seed, SCRATCH)) for seed in SEEDS]))
    assert_says(*re.findall(r"Mean\s+of three seeds: step 1 (.*?)\.\n", page), *scratch)


DIFFERENCES = [  # what the row begins with; what is compared and of which seeds; with what, and of which
    ("step 3 less step 1", "logs_submit_distill", SEEDS, "logs", SEEDS, LEAVES),
    ("blend less step 1", "blend", SEEDS, "logs", SEEDS, LEAVES),
    *((f"seed {seed} less seed 2020, step 1", "logs", [seed], "logs", [2020], LEAVES) for seed in SEEDS[1:]),
    ("by row number less step 3", "logs_by_row", SEEDS, "logs_submit_distill", SEEDS, LEAVES),
    ("by row number less step 1", "logs_by_row", SEEDS, "logs", SEEDS, LEAVES),
    ("label smoothing less step 1", "logs_smoothing", [2020], "logs", [2020], LEAVES),
    ("stratified folds less step 1", "logs_stratified", [2020], "logs", [2020], LEAVES),
    ("pseudo-labels less step 3", "logs_pseudo", [2020], "logs_submit_distill", [2020], LEAVES),
    ("TTA less none", "tta/tta_out_of_fold.csv", [2020], "tta/soft_labels.csv", [2020], LEAVES),
    ("TTA by flips less TTA", "tta/flips/tta_out_of_fold.csv", [2020], "tta/tta_out_of_fold.csv", [2020], LEAVES),
    ("averaged ranks less averaged probabilities", "ranks", SEEDS, "blend", SEEDS, LEAVES),
    ("step 3 less step 1", "logs_submit_distill", SEEDS, "logs", SEEDS, SCRATCH),
    ("by row number less step 3", "logs_by_row", SEEDS, "logs_submit_distill", SEEDS, SCRATCH),
]
PAGE_ONLY = ("seed 2 less seed 2020, step 1", "by row number less step 1")  # not in the READMEs
IN_READMES = [row[0] for row in DIFFERENCES if row[-1] == LEAVES and row[0] not in PAGE_ONLY]


@pytest.mark.parametrize("beginning, one, seeds_of_one, other, seeds_of_other, folder", DIFFERENCES)
def test_the_differences_on_real_leaves_and_their_verdicts_are_those_of_the_kept_predictions(
    beginning, one, seeds_of_one, other, seeds_of_other, folder
):
    sides = ((other, seeds_of_other), (one, seeds_of_one))
    probabilities = [[out_of_fold(name, seed, folder).to_numpy() for seed in seeds] for name, seeds in sides]
    names = ["mean AUC", "log loss"][: 1 if one == "ranks" else 2]  # ranks are no probabilities
    found = compare(parse_labels(true_labels(seeds_of_one[0], folder)), probabilities, CLASSES, names=names)
    part = (LEAVES / "README.md").read_text().split("\n## From scratch\n")[folder == SCRATCH]
    in_readme = []
    for cell, (name, difference) in zip(row_of(part, beginning), found.items(), strict=False):
        interval = difference.value, difference.low, difference.high
        assert_says(cell, *interval)
        verdict = "**better**" if (difference.value > 0) == (name == "mean AUC") else "**worse**"
        assert cell.strip().endswith(verdict if difference else "not told apart")
        in_readme += interval if name == "mean AUC" or difference and len(seeds_of_one) > 1 else ()
    for rows in readme_rows() if folder == LEAVES and beginning in IN_READMES else ():
        assert len(rows) == 1 + len(IN_READMES)
        row = rows[1 + IN_READMES.index(beginning)]
        assert_says(row, *in_readme)
        assert ("**" in row) == (len(in_readme) > 3 or bool(found["mean AUC"]))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_blends_of_real_leaves_are_the_means_of_both_rounds(seed):
    for name, first in (("", "submission.csv"), ("by_row", "../submission.csv")):
        folder = LEAVES / f"seed={seed}" / name
        parts = [pd.read_csv(folder / path) for path in (first, "submission_distill.csv", "submission_mix.csv")]
        one, two, mix = (part.set_index("image_id")[list(CLASSES)] for part in parts)
        assert len(mix) == 1179
        pd.testing.assert_frame_equal(mix, (one + two) / 2)


@pytest.mark.slow
def test_the_pictures_of_the_docs_can_be_drawn(trained, tmp_path, monkeypatch):
    (tmp_path / "sample").symlink_to(trained / "leaves")
    for name in ("logs", "logs_submit_distill"):
        (tmp_path / name).symlink_to(trained / "logs")
    parse = make_figures.parse_args
    monkeypatch.setattr(make_figures, "parse_args", lambda parser, argv=(): parse(parser, argv))
    for name in ("FOLDER", "DOCS"):
        monkeypatch.setattr(make_figures, name, tmp_path)
    make_figures.main()
    for name in ("prediction.png", "augmentations.png", "tta.png"):
        assert cv2.imread(str(tmp_path / name)).std() > 10
    titles = [title for title, _ in make_figures.tta_pictures("Test_4", *make_figures.load_fold_0())]
    assert len(titles) == 9 and titles[0].startswith("mean of the views\nhealthy 0.")
