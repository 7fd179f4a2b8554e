"""results/: what its pages and the READMEs say is what the files beside them give; and the pictures of the docs."""

import re

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import REPO

from analysis.runs import read_run
from analysis.statistics import compare, measure
from tools import make_figures
from utils import CLASSES, mean_auc

LEAVES = REPO / "results" / "leaves"
SCRATCH = LEAVES / "from_scratch"
SEEDS = (2020, 1, 2)


def runs(name, seeds, folder=LEAVES):
    """The out-of-fold predictions of a log directory of each seed: list of Run."""
    return [read_run(folder / f"seed={seed}" / name, CLASSES) for seed in seeds]


def figures(text):
    """The numbers of a text, whose minus signs are typographic."""
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", text.replace("−", "-"))]


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
    cells = row_of((LEAVES / "README.md").read_text(), str(seed))
    for name, cell in zip(("logs", "logs_submit_distill", "logs_by_row"), cells, strict=True):
        if cell.strip() == "not run":
            assert not (LEAVES / f"seed={seed}" / name).exists()
            continue
        (run,) = runs(name, [seed])
        constant = np.full(run.probabilities.shape, 1 / len(CLASSES))  # its AUC is 0.5
        auc = compare(run.labels, [[constant], [run.probabilities]], CLASSES, names=["mean AUC"])["mean AUC"]
        assert len(run.image_ids) == 1821
        assert mean_auc(run.labels, run.probabilities) == pytest.approx(auc.value + 0.5, abs=1e-9)
        np.testing.assert_allclose(figures(cell), np.array([auc.value, auc.low, auc.high]) + 0.5, atol=0.00051)
    (run,) = runs("logs", [seed])
    measured = measure(run.labels, run.probabilities, CLASSES)
    step_1 = [measured[name][0] for name in ("mean AUC", "log loss")]
    for rows in readme_rows():
        aucs, losses = map(figures, rows[0].strip("|").split("|")[1:])
        at = SEEDS.index(seed)
        np.testing.assert_allclose([aucs[at], losses[at]], step_1, atol=0.00051)


DIFFERENCES = [  # what the row begins with; the log directory and the seeds of the one, of the other
    ("step 3 less step 1", ("logs_submit_distill", SEEDS), ("logs", SEEDS), LEAVES),
    *((f"seed {seed} less seed 2020, step 1", ("logs", [seed]), ("logs", [2020]), LEAVES) for seed in SEEDS[1:]),
    ("by row number less step 3, seed 2020", ("logs_by_row", [2020]), ("logs_submit_distill", [2020]), LEAVES),
    ("by row number less step 1, seed 2020", ("logs_by_row", [2020]), ("logs", [2020]), LEAVES),
    ("step 3 less step 1", ("logs_submit_distill", (2020, 1, 2)), ("logs", (2020, 1, 2)), SCRATCH),
    ("by row number less step 3", ("logs_by_row", (2020, 1, 2)), ("logs_submit_distill", (2020, 1, 2)), SCRATCH),
]


@pytest.mark.parametrize("beginning, one, other, folder", DIFFERENCES)
def test_the_differences_on_real_leaves_and_their_verdicts_are_those_of_the_kept_predictions(
    beginning, one, other, folder
):
    before, after = runs(*other, folder), runs(*one, folder)
    probabilities = [[run.probabilities for run in side] for side in (before, after)]
    found = compare(before[0].labels, probabilities, CLASSES, names=["mean AUC", "log loss"])
    parts = (LEAVES / "README.md").read_text().split("\n## From scratch\n")
    for cell, difference in zip(row_of(parts[folder == SCRATCH], beginning), found.values(), strict=True):
        np.testing.assert_allclose(figures(cell), [difference.value, difference.low, difference.high], atol=0.00051)
        better = (difference.value > 0) == (difference is found["mean AUC"])
        known = "**better**" if better else "**worse**"
        assert cell.strip().endswith("not told apart" if difference.low <= 0 <= difference.high else known)


def test_the_readmes_say_what_the_page_of_the_results_says():
    page = (LEAVES / "README.md").read_text().split("\n## From scratch\n")[0]
    beginnings = ("step 3 less step 1", "seed 1 less seed 2020, step 1", "by row number less step 3, seed 2020")
    for rows in readme_rows():
        for row, beginning in zip(rows[1:], beginnings, strict=True):
            cells = row_of(page, beginning)
            np.testing.assert_allclose(figures(row), figures("".join(cells)), atol=0.00056)  # rounded twice
            assert len(re.findall("not told apart|无法区分", row)) == sum("not told apart" in cell for cell in cells)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_blends_of_real_leaves_are_the_means_of_both_rounds(seed):
    for name, first in (("", "submission.csv"), ("by_row", "../submission.csv")):
        folder = LEAVES / f"seed={seed}" / name
        if name and not folder.exists():
            continue
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
