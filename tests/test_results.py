"""results/: what its pages and the README say is what the files beside them give; and the pictures of the docs."""

import re

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import REPO

from analysis.runs import read_run
from analysis.statistics import compare
from tools import make_figures
from utils import CLASSES, mean_auc

LEAVES = REPO / "results" / "leaves"


@pytest.mark.parametrize("seed", (2020, 1, 2))
def test_the_tables_of_real_leaves_are_those_of_the_kept_predictions(seed):
    expected = []
    for name in ("logs", "logs_submit_distill", "logs_by_row"):
        run = read_run(LEAVES / f"seed={seed}" / name, CLASSES)
        constant = np.full(run.probabilities.shape, 1 / len(CLASSES))  # its AUC is 0.5
        auc = compare(run.labels, [[constant], [run.probabilities]], CLASSES, names=["mean AUC"])["mean AUC"]
        assert len(run.image_ids) == 1821
        assert mean_auc(run.labels, run.probabilities) == pytest.approx(auc.value + 0.5, abs=1e-9)
        expected += [auc.value + 0.5, auc.low + 0.5, auc.high + 0.5]
    for page in ("results/leaves/README.md", "README.md", "README.zh-CN.md"):
        row = re.search(rf"^\| {seed} \| (0\.8.*)$", (REPO / page).read_text(), re.M).group(1)
        found = np.array(re.findall(r"\d\.\d+", row), float)
        np.testing.assert_allclose(found, expected, atol=0.00051, err_msg=page)


def test_the_blends_of_real_leaves_are_the_means_of_both_rounds():
    for name, first in (("", "submission.csv"), ("by_row", "../submission.csv")):
        parts = [pd.read_csv(LEAVES / name / path) for path in (first, "submission_distill.csv", "submission_mix.csv")]
        one, two, mix = (part.set_index("image_id")[list(CLASSES)] for part in parts)
        assert len(mix) == 1179
        pd.testing.assert_frame_equal(mix, (one + two) / 2)


@pytest.mark.slow
def test_the_pictures_of_the_docs_can_be_drawn(trained, tmp_path, monkeypatch):
    (tmp_path / "sample").symlink_to(trained / "leaves")
    (tmp_path / "logs").symlink_to(trained / "logs")
    parse = make_figures.parse_args
    monkeypatch.setattr(make_figures, "parse_args", lambda parser, argv=(): parse(parser, argv))
    for name in ("FOLDER", "DOCS"):
        monkeypatch.setattr(make_figures, name, tmp_path)
    make_figures.main()
    for name in ("prediction.png", "augmentations.png", "tta.png"):
        assert cv2.imread(str(tmp_path / name)).std() > 10
    titles = [title for title, _ in make_figures.tta_pictures("Test_4", *make_figures.load_fold_0())]
    assert len(titles) == 9 and titles[0].startswith("mean of the views\nhealthy 0.")
