"""results/: what its pages and the README say is what the files beside them give."""

import re

import numpy as np
import pandas as pd
import pytest
from conftest import REPO

from analysis.runs import read_run
from analysis.statistics import compare
from utils import CLASSES, mean_auc

LEAVES = REPO / "results" / "leaves"
ROUNDS = ("logs", "logs_submit_distill", "logs_by_row")
SEEDS = (2020, 1, 2)


def interval(run):
    """The mean AUC of one training with its 95 % interval: against a constant prediction, whose AUC is 0.5."""
    constant = np.full(run.probabilities.shape, 1 / len(CLASSES))
    of_mean = compare(run.labels, [[constant], [run.probabilities]], CLASSES, names=["mean AUC"])["mean AUC"]
    return np.array([of_mean.value, of_mean.low, of_mean.high]) + 0.5


def rows_of(page, seed):
    """The numbers of the table row of a seed, float (9,): of each round value, low and high."""
    row = re.search(rf"^\| {seed} \| (0\.8.*)$", page, re.M).group(1)
    return np.array([float(number) for number in re.findall(r"\d\.\d+", row)])


@pytest.mark.parametrize("seed", SEEDS)
def test_the_tables_of_real_leaves_are_those_of_the_kept_predictions(seed):
    runs = [read_run(LEAVES / f"seed={seed}" / name, CLASSES) for name in ROUNDS]
    for run in runs:
        assert len(run.image_ids) == 1821
        assert mean_auc(np.eye(4)[run.labels], run.probabilities) == pytest.approx(interval(run)[0], abs=1e-9)
    expected = np.concatenate([interval(run) for run in runs])
    for page in ("results/leaves/README.md", "README.md", "README.zh-CN.md"):
        np.testing.assert_allclose(rows_of((REPO / page).read_text(), seed), expected, atol=0.00051, err_msg=page)


def test_the_blends_of_real_leaves_are_the_means_of_both_rounds():
    for name, first in (("", "submission.csv"), ("by_row", "../submission.csv")):
        parts = [pd.read_csv(LEAVES / name / path) for path in (first, "submission_distill.csv", "submission_mix.csv")]
        one, two, mix = (part.set_index("image_id")[list(CLASSES)] for part in parts)
        assert len(mix) == 1179
        pd.testing.assert_frame_equal(mix, (one + two) / 2)
