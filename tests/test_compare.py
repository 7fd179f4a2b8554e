"""compare.py: its figures, its intervals on simulated experiments, what it says of trainings and submissions."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import QUICK, run_script

from analysis.statistics import compare, measure, resample
from utils import CLASSES, column_aucs, mean_auc

SHARES = np.array([516, 91, 622, 592]) / 1821  # of the competition's classes

# ---------------------------------------------------------------------------------------------- simulated trainings


def draw_photos(rng, n):
    """Labels, int, with the competition's shares, and how each photo misleads whoever looks at it, float (n, 4)."""
    labels = np.repeat(np.arange(4), np.maximum(2, np.round(SHARES * n).astype(int)))
    return labels, rng.standard_normal((len(labels), 4))


def simulate(rng, labels, misleading, skill):
    """Probabilities of a network: evidence for the label, what misleads all networks, what misleads this one."""
    logits = skill * np.eye(4)[labels] + 0.7 * misleading + 0.7 * rng.standard_normal(misleading.shape)
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def true_auc(skill, spread):
    """The mean AUC of a variant on endless photos, over seeds whose skill spreads by a normal distribution."""
    nodes, shares = np.polynomial.hermite_e.hermegauss(7 if spread else 1)
    labels, misleading = draw_photos(np.random.default_rng(1), 40_000)
    aucs = [
        measure(labels, simulate(np.random.default_rng(2), labels, misleading, skill + spread * node), CLASSES)[
            "mean AUC"
        ]
        for node in nodes
    ]
    return np.average(aucs, axis=0, weights=shares)[0]


EXPERIMENTS = {  # runs of each variant, how far seeds spread, how much better the second variant is
    "one run each, no difference": (1, 0, 0),
    "one run each, a difference": (1, 0, 0.3),
    "three seeds that spread as much as photos do, no difference": (3, 0.2, 0),
    "three seeds that spread as much as photos do, a difference": (3, 0.2, 0.3),
}


@pytest.mark.parametrize("case", EXPERIMENTS)
def test_of_2000_simulated_experiments_95_in_100_intervals_hold_the_true_difference(case):
    n_runs, spread, gain = EXPERIMENTS[case]
    skills, truth = (2.0, 2.0 + gain), true_auc(2.0 + gain, spread) - true_auc(2.0, spread)
    assert (truth > 0.01) == (gain > 0)
    held, said = 0, 0
    for number in range(2000):
        rng = np.random.default_rng(number)
        labels, misleading = draw_photos(rng, 120)
        variants = [
            [simulate(rng, labels, misleading, skill + spread * rng.standard_normal()) for _ in range(n_runs)]
            for skill in skills
        ]
        found = compare(labels, variants, CLASSES, n_resamples=200, names=["mean AUC"])["mean AUC"]
        held += found.low <= truth <= found.high
        said += bool(found)
    assert 0.93 <= held / 2000 <= 0.97
    assert gain or said / 2000 <= 0.06  # "better" or "worse", though there is no difference
    assert not gain or said / 2000 > 0.1  # and a difference is not always overlooked


def test_an_interval_over_photos_alone_would_be_wrong_where_seeds_spread():
    """The reason for several seeds: of two equal variants, single runs are often told apart."""
    said = 0
    for number in range(500):
        rng = np.random.default_rng(number)
        labels, misleading = draw_photos(rng, 120)
        pair = [[simulate(rng, labels, misleading, 2 + 0.4 * rng.standard_normal())] for _ in range(2)]
        said += bool(compare(labels, pair, CLASSES, n_resamples=200, names=["mean AUC"])["mean AUC"])
    assert said / 500 > 0.15


# ---------------------------------------------------------------------------------------------- figures


def test_figures_are_those_of_scikit_learn_also_where_scores_are_equal():
    rng = np.random.default_rng(0)
    labels, misleading = draw_photos(rng, 300)
    for probabilities in (simulate(rng, labels, misleading, 1.5), simulate(rng, labels, misleading, 1.5).round(1)):
        figures = measure(labels, probabilities, CLASSES)
        one_hot = np.eye(4)[labels]
        assert figures["mean AUC"][0] == pytest.approx(mean_auc(one_hot, probabilities), abs=1e-12)
        np.testing.assert_allclose([figures[name][0] for name in CLASSES], column_aucs(one_hot, probabilities))
        assert figures["wrong photos"][0] == (probabilities.argmax(1) != labels).sum()
        of_label = np.maximum(probabilities[np.arange(len(labels)), labels], np.finfo(np.float32).tiny)
        assert figures["log loss"][0] == pytest.approx(-np.log(of_label).mean())


def test_a_resample_counts_photos_as_if_they_were_there_so_often():
    rng = np.random.default_rng(0)
    labels, misleading = draw_photos(rng, 200)
    probabilities, weights = simulate(rng, labels, misleading, 1.5), resample(labels, 20)
    figures = measure(labels, probabilities, CLASSES, weights)
    for row, counts in enumerate(weights.astype(int)):
        drawn = np.repeat(np.arange(len(labels)), counts)
        alone = measure(labels[drawn], probabilities[drawn], CLASSES)
        assert figures["mean AUC"][row] == pytest.approx(alone["mean AUC"][0], abs=1e-5)
        assert figures["wrong photos"][row] / len(labels) == pytest.approx(alone["wrong photos"][0] / len(drawn))
    for number in range(4):  # of each class one photo less than there are, in each resample; none is drawn always
        of_class = weights[:, labels == number]
        assert (of_class.sum(1) == max(1, (labels == number).sum() - 1)).all() and of_class.std(0).min() > 0


# ---------------------------------------------------------------------------------------------- log directories


def write_run(folder, seed, skill=2.2, n=400, folds=range(5), fold_seed=0, **options):
    """A log directory as train.py leaves it, of a simulated network; what compare.py does not read is left out."""
    labels, misleading = draw_photos(np.random.default_rng(0), n)
    order = np.random.default_rng(1).permutation(len(labels))
    labels, misleading = labels[order], misleading[order]
    probabilities = simulate(np.random.default_rng(seed), labels, misleading, skill)
    table = pd.DataFrame(probabilities, columns=list(CLASSES))
    table.insert(0, "image_id", [f"Train_{i}" for i in range(len(labels))])
    table.insert(1, "fold", np.random.default_rng(fold_seed).permutation(len(labels)) % 5)
    table.insert(2, "label", np.array(CLASSES)[labels])
    (folder / "metrics").mkdir(parents=True)
    table[["image_id", "fold"]].to_csv(folder / "folds.csv", index=False)
    table[table["fold"].isin(folds)].to_csv(folder / "out_of_fold.csv", index=False)
    for fold in folds:
        pd.DataFrame({"epoch": [0, 1], "seconds": [90, 60]}).to_csv(
            folder / "metrics" / f"fold={fold}.csv", index=False
        )
    record = {
        "format": 3,
        "options": {"seed": seed, "limit": None, **options},
        "fingerprints": {"models.py": str(skill)},
    }
    (folder / "hparams.yaml").write_text(yaml.safe_dump(record))
    (folder / "source").mkdir()
    (folder / "source" / "models.py").write_text(f"SKILL = {skill}\n")
    return folder


def compare_them(cwd, *arguments, check=True, **options):
    return run_script("compare.py", *arguments, cwd=cwd, check=check, **options)


def refused(cwd, *arguments):
    """What is said when compare.py refuses: one line."""
    done = compare_them(cwd, *arguments, check=False)
    assert done.returncode == 1 and not done.stdout
    (said,) = done.stderr.splitlines()
    assert said.startswith("error: ")
    return said


def test_two_seeds_of_one_variant_are_not_told_apart_and_a_real_difference_is(tmp_path):
    write_run(tmp_path / "logs", 1)
    write_run(tmp_path / "again", 2)
    write_run(tmp_path / "better", 3, skill=3.2, learning_rate=3e-4)
    done = compare_them(tmp_path, "logs", "again", "better", "--csv", "out.csv", cold=True)
    first, second = done.stdout.split("\nagain against logs\n")[1].split("\nbetter against logs\n")
    assert "verdict: again cannot be told apart from logs in mean AUC (" in first
    assert "verdict: better is better than logs in mean AUC (+" in second
    for text in (first, second):
        assert "about these two runs: another --seed can turn it round" in text
    assert "seed was 1, is 2\n" in first and "SKILL" not in first
    assert "learning_rate was None, is 0.0003" in second and "-SKILL = 2.2" in second and "+SKILL = 3.2" in second
    assert "400 photos that all have, of 400" in done.stdout
    assert re.search(r"^minutes of training +12.5 +12.5 +12.5$", done.stdout, re.M)
    table = pd.read_csv(tmp_path / "out.csv")
    of_logs = pd.read_csv(tmp_path / "logs" / "out_of_fold.csv")
    one_hot = np.eye(4)[of_logs["label"].map(CLASSES.index)]
    auc = table[(table["runs"] == "logs") & (table["figure"] == "mean AUC")]["value"].item()
    assert auc == pytest.approx(mean_auc(one_hot, of_logs[list(CLASSES)])) and f"{auc:.4f}" in done.stdout
    row = table[(table["runs"] == "better") & (table["figure"] == "mean AUC") & table["against"].notna()].iloc[0]
    assert 0 < row["low"] < row["difference"] < row["high"] and row["verdict"].startswith("better is better than logs")
    # the ten that moved most, and how many are decided differently
    other = pd.read_csv(tmp_path / "again" / "out_of_fold.csv")
    before, after = of_logs[list(CLASSES)].to_numpy(), other[list(CLASSES)].to_numpy()
    order = np.argsort(-np.abs(before - after).sum(1), kind="stable")[:10]
    assert re.findall(r"^(Train_\d+) ", first, re.M) == of_logs["image_id"][order].tolist()
    n = (before.argmax(1) != after.argmax(1)).sum()
    assert f"decided differently: {n} photos, " in first
    folds = re.search("mean AUC by fold: (.*)", first).group(1).split(", ")
    assert [text[:2] for text in folds] == ["0:", "1:", "2:", "3:", "4:"] and len(set(folds)) == 5


def test_several_seeds_are_a_verdict_on_the_variant(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path / f"a{seed}", seed)
        write_run(tmp_path / f"b{seed}", 10 + seed, skill=2.8)
    done = compare_them(tmp_path, "b1", "b2", "b3", "--against", "a1", "a2", "a3")
    assert "b1, b2, b3 against a1, a2, a3" in done.stdout
    assert "verdict: b1, b2, b3 are better than a1, a2, a3 in mean AUC (+" in done.stdout
    assert "chance in the photos and the seeds)" in done.stdout and "two runs" not in done.stdout
    assert "note: " not in done.stdout
    shutil.rmtree(tmp_path / "b2")
    write_run(tmp_path / "b2", 12, skill=2.8, max_epochs=3)
    done = compare_them(tmp_path, "b1", "b2", "b3", "--against", "a1")
    assert "One side is a single run; it is taken to vary as the other does." in done.stdout
    assert "note: b2 differs from b1, though a run of the same variant: max_epochs was None, is 3" in done.stdout
    shutil.copytree(tmp_path / "a1", tmp_path / "copy")
    assert "a1 and copy hold the same predictions" in refused(tmp_path, "b1", "b2", "--against", "a1", "copy")


def test_only_the_photos_that_all_have_are_compared_and_other_folds_are_said(tmp_path):
    write_run(tmp_path / "logs", 1)
    write_run(tmp_path / "quick", 2, folds=[0])
    done = compare_them(tmp_path, "logs", "quick")
    assert "80 photos that all have, of 400" in done.stdout and "mean AUC by fold: 0: " in done.stdout
    write_run(tmp_path / "stratified", 3, fold_seed=9)
    done = compare_them(tmp_path, "logs", "stratified")
    assert re.search(r"the folds are not the same \(\d+ photos are in another one\)", done.stdout)
    assert "by fold:" not in done.stdout
    write_run(tmp_path / "late", 4, folds=[3])
    assert "no photo has been predicted by all of them (quick: fold 0; late: fold 3)" in refused(
        tmp_path, "quick", "late"
    )


@pytest.mark.parametrize("labels, word", [("pseudo labels", "pseudo-labels"), ("soft labels", "weakly")])
def test_flattered_figures_are_called_so(tmp_path, labels, word):
    write_run(tmp_path / "logs", 1)
    write_run(tmp_path / "distilled", 2)
    path = tmp_path / "distilled" / "hparams.yaml"
    record = yaml.safe_load(path.read_text())
    record["fingerprints"][labels] = "0123"
    path.write_text(yaml.safe_dump(record))
    said = compare_them(tmp_path, "logs", "distilled").stdout
    assert re.search(f"note: the figures of distilled are too good: .*{word}", said) and f"{labels}: changed" in said
    assert "figures of logs are too good" not in said


REFUSED = {  # what is compared with logs: how it is made, what is said
    "a folder that is not there": (lambda folder: None, "other does not exist"),
    "a source that is no Python": (
        lambda folder: write_run(folder, 2).joinpath("source", "models.py").write_text('"""'),
        "other/source is damaged",
    ),
    "a training without a finished fold": (lambda folder: folder.mkdir(), "other/out_of_fold.csv is missing: train.py"),
    "other photos": (
        lambda folder: write_run(folder, 2, n=300),
        "other is about other photos than logs: of 300 and 400",
    ),
    "other labels": (
        lambda folder: relabel(write_run(folder, 2)),
        "other has other labels than logs, of Train_0 and 0 others",
    ),
    "other classes": (
        lambda folder: rename(write_run(folder, 2), "scab", "mildew"),
        "has the columns image_id,fold,label,.*: other classes",
    ),
    "no labels": (lambda folder: rename(write_run(folder, 2), "label", "x"), "has the columns image_id,fold,x,healthy"),
    "a word for a number": (
        lambda folder: rename(write_run(folder, 2), "Train_7", "Train_8"),
        "is damaged: not what train",
    ),
    "an empty file": (
        lambda folder: write_run(folder, 2).joinpath("out_of_fold.csv").write_text(""),
        "other/out_of_fold.csv is damaged",
    ),
    "the same folder": (lambda folder: folder.symlink_to("logs"), "named twice"),
}


def relabel(folder):
    path = folder / "out_of_fold.csv"
    table = pd.read_csv(path)
    table.loc[0, "label"] = "scab" if table["label"][0] != "scab" else "rust"
    table.to_csv(path, index=False)


def rename(folder, old, new):
    path = folder / "out_of_fold.csv"
    path.write_text(path.read_text().replace(f"{old},", f"{new},").replace(f"{old}\n", f"{new}\n"))


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_compared_is_refused(tmp_path, fault):
    write_run(tmp_path / "logs", 1)
    make, said = REFUSED[fault]
    make(tmp_path / "other")
    assert re.search(said, refused(tmp_path, "logs", "other"))


def test_one_log_directory_or_a_mixture_is_refused(tmp_path):
    write_run(tmp_path / "logs", 1)
    (tmp_path / "a.csv").write_text("image_id,healthy,multiple_diseases,rust,scab\nTest_0,1,0,0,0\n")
    assert "name two log directories or more" in refused(tmp_path, "logs")
    assert "a.csv is a file, others are not" in refused(tmp_path, "logs", "--against", "a.csv")
    assert "submissions are compared in pairs" in refused(tmp_path, "a.csv", "a.csv")


def test_a_csv_never_takes_the_place_of_what_is_compared(tmp_path):
    write_run(tmp_path / "logs", 1)
    write_run(tmp_path / "other", 2)
    before = (tmp_path / "logs" / "out_of_fold.csv").read_bytes()
    assert "name another file" in refused(tmp_path, "logs", "other", "--csv", "logs/out_of_fold.csv")
    assert "name another file" in refused(tmp_path, "logs", "other", "--csv", "other/new.csv")
    assert "cannot write logs: it is a folder" in refused(tmp_path, "logs", "other", "--csv", "logs")
    assert (tmp_path / "logs" / "out_of_fold.csv").read_bytes() == before
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("image_id,healthy,multiple_diseases,rust,scab\nTest_0,1,0,0,0\n")
    assert "name another file" in refused(tmp_path, "a.csv", "--against", "b.csv", "--csv", "b.csv")
    assert "typo.csv does not exist" in refused(tmp_path, "a.csv", "--against", "typo.csv")


def test_a_difference_is_not_claimed_where_nothing_can_be_known(tmp_path):
    """A class of which all have one photo only; the very same predictions."""
    for number, name in enumerate(("logs", "other")):
        write_run(tmp_path / name, number + 1, skill=1 + 3 * number)
        path = tmp_path / name / "out_of_fold.csv"
        table = pd.read_csv(path)
        rare = table[table["label"] == "multiple_diseases"].index[1:]
        table.drop(index=rare).to_csv(path, index=False)
    said = compare_them(tmp_path, "logs", "other").stdout
    assert "other cannot be told apart from logs: of a class there is only one photo that all have" in said
    assert re.search(r"^mean AUC +\+0\.\d+ +unknown +unknown$", said, re.M)
    write_run(tmp_path / "full", 3)
    shutil.copytree(tmp_path / "full", tmp_path / "twin")
    assert "verdict: twin and full hold the same predictions" in compare_them(tmp_path, "full", "twin").stdout


def test_what_differs_is_told_in_either_order(tmp_path):
    write_run(tmp_path / "logs", 1)
    write_run(tmp_path / "other", 2, mixup=0.4)
    assert "mixup was None, is 0.4" in compare_them(tmp_path, "logs", "other").stdout
    assert "mixup was 0.4, is None" in compare_them(tmp_path, "other", "logs").stdout


def test_minutes_are_those_of_the_folds_that_are_compared(tmp_path):
    write_run(tmp_path / "logs", 1)
    write_run(tmp_path / "quick", 2, folds=[0])
    (tmp_path / "quick" / "folds.csv").unlink()
    assert re.search(r"^minutes of training +2.5 +2.5$", compare_them(tmp_path, "logs", "quick").stdout, re.M)
    (tmp_path / "logs" / "metrics" / "fold=0.csv").write_text("epoch,seconds\n0,abc\n")
    assert re.search(r"^minutes of training +- +2.5$", compare_them(tmp_path, "logs", "quick").stdout, re.M)


@pytest.mark.parametrize("sizes, spreads", [((2, 5), (0.6, 0.05)), ((1, 3), (0.2, 0.2))])
def test_other_numbers_of_seeds_are_no_licence(sizes, spreads):
    """Welch's degrees of freedom; a side of one run is given few. 500 experiments without a difference."""
    said = 0
    for number in range(500):
        rng = np.random.default_rng(number)
        labels, misleading = draw_photos(rng, 120)
        variants = [
            [simulate(rng, labels, misleading, 2 + spread * rng.standard_normal()) for _ in range(size)]
            for size, spread in zip(sizes, spreads, strict=True)
        ]
        said += bool(compare(labels, variants, CLASSES, n_resamples=100, names=["mean AUC"])["mean AUC"])
    assert said / 500 <= 0.08  # 0.06, and what chance leaves in 500


def test_a_log_directory_of_which_only_the_tables_were_kept_can_be_compared(tmp_path):
    write_run(tmp_path / "logs", 1)
    write_run(tmp_path / "kept", 2)
    for name in ("hparams.yaml", "folds.csv", "source/models.py", *(f"metrics/fold={k}.csv" for k in range(5))):
        (tmp_path / "kept" / name).unlink()
    done = compare_them(tmp_path, "logs", "kept")
    assert "kept/hparams.yaml is missing: what differs in options and source files is unknown" in done.stdout
    assert re.search(r"^minutes of training +12.5 +-$", done.stdout, re.M)


def test_what_train_py_leaves_is_compared(sample, tmp_path):
    """Two real trainings: other seeds, the same folds; the figure is the one that train.py has said."""
    for seed in (1, 2):
        options = ["--folds", 0, 1, "--seed", seed, "--fold_seed", 7, "--log_dir", f"logs_{seed}"]
        done = run_script("train.py", "--data_dir", sample, *QUICK, *options, cwd=tmp_path)
        auc = re.search(r"out-of-fold AUC of 17 photos: (0\.\d+)", done.stdout).group(1)
    said = compare_them(tmp_path, "logs_1", "logs_2").stdout
    assert "17 photos that all have, of 41" in said and "seed was 1, is 2\n" in said and "cannot be told apart" in said
    found = re.search(r"^mean AUC +(0\.\d+) +(0\.\d+)$", said, re.M).groups()
    assert float(found[1]) == pytest.approx(float(auc), abs=5e-5) and "mean AUC by fold: 0: " in said


# ---------------------------------------------------------------------------------------------- submissions


def test_submissions_are_compared_by_ranks_and_decisions(tmp_path):
    rng = np.random.default_rng(0)
    labels, misleading = draw_photos(rng, 300)
    ids = [f"Test_{i}" for i in range(len(labels))]
    tables = {}
    for name in ("ours.csv", "theirs.csv"):
        tables[name] = pd.DataFrame(simulate(rng, labels, misleading, 2), ids, list(CLASSES)).rename_axis("image_id")
        tables[name].to_csv(tmp_path / name)
    tables["theirs.csv"].sample(frac=1, random_state=0).to_csv(tmp_path / "theirs.csv")  # in another order
    done = compare_them(tmp_path, "ours.csv", "--against", "theirs.csv", "--csv", "out.csv")
    ours, theirs = tables["ours.csv"], tables["theirs.csv"]
    values = pd.read_csv(tmp_path / "out.csv").set_index("figure")["value"]
    for name in CLASSES:
        assert values[f"rank correlation, {name}"] == pytest.approx(ours[name].corr(theirs[name], method="spearman"))
    assert values["photos with the same class first"] == (ours.idxmax(axis=1) == theirs.idxmax(axis=1)).sum()
    decided = np.eye(4)[theirs.to_numpy().argmax(1)]
    assert values["AUC of the first, if the second decides right"] == pytest.approx(mean_auc(decided, ours.to_numpy()))
    decided = np.eye(4)[ours.to_numpy().argmax(1)]
    assert values["AUC of the second, if the first decides right"] == pytest.approx(
        mean_auc(decided, theirs.to_numpy())
    )
    assert values["largest value of the first"] == pytest.approx(ours.max().max())
    assert values["mean of each photo's largest, of the second"] == pytest.approx(theirs.max(axis=1).mean())
    most = (ours - theirs).abs().sum(axis=1).sort_values(ascending=False, kind="stable").index[:10].tolist()
    assert re.findall(r"^(Test_\d+) ", done.stdout, re.M) == most
    ours.drop("Test_3").to_csv(tmp_path / "short.csv")
    assert "has no row for Test_3" in refused(tmp_path, "ours.csv", "--against", "short.csv")


def test_ranks_are_a_submission_too(tmp_path):
    rng = np.random.default_rng(0)
    labels, misleading = draw_photos(rng, 100)
    table = pd.DataFrame(simulate(rng, labels, misleading, 2), columns=list(CLASSES))
    table.insert(0, "image_id", [f"Test_{i}" for i in range(len(labels))])
    table.to_csv(tmp_path / "mix.csv", index=False)
    table[list(CLASSES)] = table[list(CLASSES)].rank(pct=True)
    table.to_csv(tmp_path / "ranks.csv", index=False)
    said = compare_them(tmp_path, "ranks.csv", "--against", "mix.csv").stdout
    assert said.count("1.0000") >= 4
