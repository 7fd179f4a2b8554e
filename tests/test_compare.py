"""compare.py: its figures, its intervals on simulated experiments, what it says of trainings and submissions."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import QUICK, refusal, run_script

from analysis.statistics import compare, measure, resample
from compare import main, make_comparison_parser
from harness.console import parse_args
from harness.record import FORMAT
from utils import CLASSES, column_aucs, mean_auc

SHARES = np.array([516, 91, 622, 592]) / 1821  # of the competition's classes
ONE_HOT = np.eye(4, dtype=bool)


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
    runs = [simulate(np.random.default_rng(2), labels, misleading, skill + spread * node) for node in nodes]
    return np.average([measure(ONE_HOT[labels], run, CLASSES)["mean AUC"][0] for run in runs], weights=shares)


def experiment(number, sizes, skills, spreads):
    """The Difference in mean AUC that is found between two variants of so many seeds each, on 120 photos."""
    rng = np.random.default_rng(number)
    labels, misleading = draw_photos(rng, 120)
    variants = [
        [simulate(rng, labels, misleading, skill + spread * rng.standard_normal()) for _ in range(size)]
        for size, skill, spread in zip(sizes, skills, spreads, strict=True)
    ]
    return compare(ONE_HOT[labels], variants, CLASSES, n_resamples=200, names=["mean AUC"])["mean AUC"]


EXPERIMENTS = [((n, n), (spread, spread), gain) for n, spread in ((1, 0), (3, 0.2)) for gain in (0, 0.3)]


@pytest.mark.parametrize("sizes, spreads, gain", [*EXPERIMENTS, ((2, 5), (0.6, 0.05), 0), ((1, 3), (0.2, 0.2), 0)])
def test_of_simulated_experiments_95_in_100_intervals_hold_the_true_difference(sizes, spreads, gain):
    """One run each; three seeds that spread as much as photos do; other numbers of seeds, where they may hold it too often."""
    skills, equal = (2.0, 2.0 + gain), sizes[0] == sizes[1]
    truth = true_auc(skills[1], spreads[1]) - true_auc(skills[0], spreads[0])
    found = [experiment(number, sizes, skills, spreads) for number in range(600)]
    missed, said = np.mean([[not of.low <= truth <= of.high, bool(of)] for of in found], axis=0)
    assert 0.03 * equal <= missed <= (0.07 if equal else 0.08)
    assert said > 0.1 if gain else said <= (0.06 if equal else 0.08)  # a difference is overlooked, or claimed wrongly


def test_figures_are_those_of_scikit_learn_also_of_equal_scores_and_of_photos_drawn_several_times():
    rng = np.random.default_rng(0)
    labels, misleading = draw_photos(rng, 200)
    one_hot, probabilities = ONE_HOT[labels], simulate(rng, labels, misleading, 1.5)
    for scores in (probabilities, probabilities.round(1)):
        figures = measure(one_hot, scores, CLASSES)
        expected = [mean_auc(one_hot, scores), *column_aucs(one_hot, scores)]
        np.testing.assert_allclose([figures[name][0] for name in ("mean AUC", *CLASSES)], expected, atol=1e-12)
        assert figures["wrong photos"][0] == (scores.argmax(1) != labels).sum()
        of_label = np.maximum(scores[one_hot], np.finfo(np.float32).tiny)
        assert figures["log loss"][0] == pytest.approx(-np.log(of_label).mean())
    weights = resample(one_hot, 20)
    figures = measure(one_hot, probabilities, CLASSES, weights)
    for row, counts in enumerate(weights.astype(int)):
        drawn = np.repeat(np.arange(len(labels)), counts)
        alone = measure(one_hot[drawn], probabilities[drawn], CLASSES)
        assert figures["mean AUC"][row] == pytest.approx(alone["mean AUC"][0], abs=1e-5)
        assert figures["wrong photos"][row] / len(labels) == pytest.approx(alone["wrong photos"][0] / len(drawn))
    for of_class in (weights[:, labels == number] for number in range(4)):
        assert (of_class.sum(1) == of_class.shape[1] - 1).all()  # of each class one photo less than there are
        assert of_class.std(0).min() > 0  # none is drawn always


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """A function that compares what it is given, in a folder with a training, logs/, and returns what is printed."""
    monkeypatch.chdir(tmp_path)
    write_run("logs", 1)

    def compare_them(*words):
        main(parse_args(make_comparison_parser(), list(words)))
        return capsys.readouterr().out

    return compare_them


def write_run(name, seed, skill=2.2, folds=range(5), fold_seed=0, **options):
    """A log directory as train.py leaves it, of a simulated network; what compare.py does not read is left out."""
    labels, misleading = draw_photos(np.random.default_rng(0), 400)
    probabilities = simulate(np.random.default_rng(seed), labels, misleading, skill)
    fold = np.random.default_rng(fold_seed).permutation(len(labels)) % 5
    table = pd.DataFrame({"image_id": [f"Train_{i}" for i in range(len(labels))], "fold": fold})
    folder = Path(name)
    folder.mkdir()
    table.to_csv(folder / "folds.csv", index=False)
    table[["label", *CLASSES]] = np.column_stack([np.array(CLASSES, object)[labels], probabilities])
    table[table["fold"].isin(folds)].to_csv(folder / "out_of_fold.csv", index=False)
    record = {"format": FORMAT, "source": f"of {skill}", "result": {}, "options": {"seed": seed, **options}}
    record |= {"fingerprints": {"models.py": str(skill), "train.csv": "0123"}}
    for number in folds:
        (folder / "metrics" / f"fold={number}").mkdir(parents=True)
        (folder / "metrics" / f"fold={number}.csv").write_text("epoch,seconds\n0,90\n1,60\n")
        change_record(folder, number, **record)
    return folder


def change_record(folder, fold, **parts):
    """Write or change some parts of the record of a fold; those that are None are left out."""
    path = folder / "metrics" / f"fold={fold}" / "hparams.yaml"
    parts = (yaml.safe_load(path.read_text()) if path.exists() else {}) | parts
    path.write_text(yaml.safe_dump({name: part for name, part in parts.items() if part is not None}))


def test_two_seeds_of_one_variant_are_not_told_apart_and_a_real_difference_is(said):
    write_run("again", 2)
    write_run("better", 3, skill=3.2, learning_rate=3e-4)
    text = said("logs", "again", "better", "--csv", "out.csv")
    verdicts = text.splitlines()[:2]  # before anything else
    assert verdicts[0].startswith("verdict: again cannot be told apart from logs in mean AUC (")
    assert verdicts[1].startswith("verdict: better is better than logs in mean AUC (+")
    assert all("about these two runs: another --seed can turn it round" in verdict for verdict in verdicts)
    first, second = text.split("\nagain against logs\n")[1].split("\nbetter against logs\n")
    changes = "learning_rate was None, is 0.0003; seed was 1, is 3; models.py: changed"
    assert first.startswith("seed was 1, is 2\n")
    assert second.startswith(f"{changes} (diff -r logs/source/of 2.2 better/source/of 3.2)\n")
    assert "400 photos that all have, of 400" in text and "note: " not in text
    assert re.search(r"^minutes of training +12.5 +12.5 +12.5$", text, re.M)
    logs, again = (pd.read_csv(f"{name}/out_of_fold.csv") for name in ("logs", "again"))
    before, after = (of[list(CLASSES)].to_numpy() for of in (logs, again))
    table = pd.read_csv("out.csv").query("figure == 'mean AUC'").set_index(["runs", "against"])
    auc, row = table.loc["logs"]["value"].item(), table.loc["better", "logs"]
    assert auc == pytest.approx(mean_auc(pd.get_dummies(logs["label"]), before)) and f"{auc:.4f}" in text
    assert 0 < row["low"] < row["difference"] < row["high"] and row["verdict"].startswith("better is better than logs")
    # the ten that moved most, and how many are decided differently
    order = np.argsort(-np.abs(before - after).sum(1), kind="stable")[:10]
    assert re.findall(r"^(Train_\d+) ", first, re.M) == logs["image_id"][order].tolist()
    assert f"decided differently: {(before.argmax(1) != after.argmax(1)).sum()} photos, " in first
    folds = re.search("mean AUC by fold: (.*)", first).group(1).split(", ")
    assert [text[:2] for text in folds] == ["0:", "1:", "2:", "3:", "4:"] and len(set(folds)) == 5


def test_several_seeds_are_a_verdict_on_the_variant(said):
    for seed in (1, 2, 3):
        write_run(f"a{seed}", seed)
        write_run(f"b{seed}", 10 + seed, skill=2.8)
    text = said("b1", "b2", "b3", "--against", "a1", "a2", "a3")
    assert text.startswith("verdict: b1, b2, b3 are better than a1, a2, a3 in mean AUC (+")
    assert "chance in the photos and the seeds)" in text and "two runs" not in text and "note: " not in text
    write_run("b4", 14, skill=2.8, max_epochs=3)
    text = said("b1", "b4", "--against", "a1")
    assert "One side is a single run; it is taken to vary as the other does." in text
    assert "note: b4 differs from b1, though a run of the same variant: max_epochs was None, is 3" in text
    assert "a1 and logs hold the same predictions" in refusal(said, "b1", "b2", "--against", "a1", "logs")


def test_what_differs_is_read_of_each_fold_in_either_order(said):
    """A fold that was kept in spite of a change was not trained with what the last start has recorded."""
    mixed = write_run("mixed", 1)
    shutil.copy(mixed / "metrics" / "fold=0" / "hparams.yaml", mixed)
    for fold in (3, 4):
        change_record(mixed, fold, options={"seed": 1, "mixup": 0.4})
    text = said("logs", "mixed")
    nothing = "fold 0 1 2: nothing differs in options, inputs and source files; "
    assert f"mixed against logs\n{nothing}fold 3 4: mixup was None, is 0.4\n" in text
    for fold in (3, 4):
        assert f"note: in mixed fold {fold} was trained differently from fold 0: mixup was None, is 0.4\n" in text
    assert "note: in logs" not in text
    assert f"logs against mixed\n{nothing}fold 3 4: mixup was 0.4, is None\n" in said("mixed", "logs")
    write_run("part", 2, folds=[3], mixup=0.4)  # of the folds that both have nothing else differs
    assert "part against mixed\nseed was 1, is 2\n" in said("mixed", "part")
    # while a fold is trained anew, its record is no longer of the predictions that are there
    change_record(mixed, 4, result=None)
    unknown = "mixed/metrics/ lacks the record of a finished fold: what differs in its training is unknown"
    assert unknown in said("logs", "mixed")
    shutil.rmtree(mixed / "metrics")  # only the tables were kept
    text = said("logs", "mixed")
    assert unknown in text and re.search(r"^minutes of training +12.5 +-$", text, re.M)


def test_only_the_photos_that_all_have_are_compared_and_other_folds_are_said(said):
    write_run("quick", 1, folds=[0])
    write_run("late", 2, folds=[3])
    text = said("logs", "quick")
    assert "80 photos that all have, of 400" in text and "mean AUC by fold: 0: " in text
    assert re.search(r"^minutes of training +2.5 +2.5$", text, re.M)  # of the folds that are compared
    assert "no photo has been predicted by all of them (quick: fold 0; late: fold 3)" in refusal(said, "quick", "late")
    write_run("stratified", 3, fold_seed=9)
    text = said("logs", "stratified")
    assert re.search(r"the folds are not the same \(\d+ photos are in another one\)", text) and "by fold:" not in text
    for name in ("folds.csv", "out_of_fold.csv"):
        pd.read_csv(f"stratified/{name}").head(300).to_csv(f"stratified/{name}", index=False)
    expected = "stratified is about other photos than logs: of 300 and 400 they share 300"
    assert expected in refusal(said, "logs", "stratified")
    change_record(Path("stratified"), 0, options={"limit": 300})
    assert "300 photos that all have, of 400" in said("logs", "stratified")


def test_flattered_figures_are_called_so(said):
    distilled = write_run("distilled", 2)
    for labels, word in (("pseudo labels", "pseudo-labels"), ("soft labels", "weakly")):
        change_record(distilled, 0, fingerprints={"models.py": "2.2", labels: "4567"})
        text = said("logs", "distilled")
        assert re.search(f"note: the figures of distilled are too good: .*{word}", text)
        assert f"{labels}: changed" in text and "figures of logs are too good" not in text


def test_what_cannot_be_compared_is_refused_and_a_csv_never_takes_the_place_of_what_is_compared(said):
    other = write_run("other", 1)
    text = (other / "out_of_fold.csv").read_text()
    for expected, content in {
        "has the columns image_id,fold,label,.*: other classes": text.replace("scab", "mildew"),
        "has the columns image_id,fold,x,healthy": text.replace("label", "x", 1),
        "other/out_of_fold.csv is damaged: not what train": text.replace("Train_7,", "Train_8,"),
        "other/out_of_fold.csv is damaged": "",
        "other has other labels than logs, of Train_270 and 0 others": text.replace(",scab,", ",rust,", 1),
    }.items():
        (other / "out_of_fold.csv").write_text(content)
        assert re.search(expected, refusal(said, "logs", "other"))
    change_record(other, 1, format=0)
    assert "fold=1/hparams.yaml is of another version" in refusal(said, "logs", "other")
    (other / "out_of_fold.csv").unlink()
    assert "other/out_of_fold.csv is missing: train.py" in refusal(said, "logs", "other")
    for name in ("a.csv", "b.csv"):
        Path(name).write_text("image_id,healthy,multiple_diseases,rust,scab\nTest_0,1,0,0,0\n")
    Path("link").symlink_to("logs")
    before = Path("logs/out_of_fold.csv").read_bytes()
    for words, expected in {
        "logs": "name two log directories or more",
        "logs link": "named twice",
        "logs gone": "gone does not exist",
        "logs --against a.csv": "a.csv is a file, others are not",
        "a.csv b.csv": "submissions are compared in pairs",
        "logs other --csv link/out_of_fold.csv": "name another file",
        "logs other --csv other/new.csv": "name another file",
        "a.csv --against b.csv --csv b.csv": "name another file",
    }.items():
        assert expected in refusal(said, *words.split())
    assert Path("logs/out_of_fold.csv").read_bytes() == before


def test_a_difference_is_not_claimed_where_nothing_can_be_known(said):
    """One photo of a class; a few photos; the very same predictions; one seed against two."""
    for seed in (1, 2, 3):
        path = write_run(f"few{seed}", seed, skill=seed) / "out_of_fold.csv"
        table = pd.read_csv(path)
        table.groupby("label").head(3).to_csv(path, index=False)
        one = shutil.copytree(f"few{seed}", f"one{seed}") + "/out_of_fold.csv"
        table[(table["label"] != "scab") | ~table["label"].duplicated()].to_csv(one, index=False)
    shutil.copytree("one1", "copy")
    text = said("one1", "one2")
    assert text.startswith("verdict: one2 cannot be told apart from one1: of a class there is only one photo that all")
    for figure in ("mean AUC", *CLASSES, "log loss", "wrong photos"):
        assert re.search(rf"^{figure} +[+-]?[\d.]+ +unknown +unknown$", text, re.M)
    assert said("one1", "copy").startswith("verdict: copy and one1 hold the same predictions\n")
    expected = "verdict: few3 cannot be told apart from few1, few2: there are too few photos or seeds\n"
    assert said("few3", "--against", "few1", "few2").startswith(expected)
    for words in ("few1 few2", "few3 --against few1 few2", "few1 few2 --against few3"):
        said(*words.split(), "--csv", "out.csv")
        table = pd.read_csv("out.csv").dropna(subset="against").set_index("figure")[["low", "high"]].abs()
        for figure, limit in {"mean AUC": 1, **dict.fromkeys(CLASSES, 1), "wrong photos": 12}.items():
            assert (table.loc[figure] <= limit).all() or np.isinf(table.loc[figure]).all()


def test_seeds_that_happen_to_agree_are_no_proof():
    """As many wrong photos with both seeds, though others: an interval without a width would claim the exact truth."""
    labels = ONE_HOT[np.arange(80) % 4]
    wrong = range(8), [*range(4), *range(20, 29)], [*range(4, 8), *range(30, 39)]
    runs = [0.9 * np.where(np.isin(np.arange(80), of)[:, None], labels[:, ::-1], labels) + 0.025 for of in wrong]
    found = compare(labels, [runs[:1], runs[1:]], CLASSES)["wrong photos"]
    assert found.value == 5 and (found.low, found.high) == (-np.inf, np.inf) and not found


def test_what_train_py_leaves_is_compared(two_folds, sample, tmp_path):
    """Two real trainings: other seeds, the same folds; the figure is the one that train.py has said."""
    options = ["--data_dir", sample, *QUICK, "--folds", 0, 1, "--seed", 1, "--fold_seed", 2020]
    done = run_script("train.py", *options, cwd=tmp_path)
    auc = re.search(r"out-of-fold AUC of 17 photos: (0\.\d+)", done.stdout).group(1)
    text = run_script("compare.py", two_folds / "logs", "logs", cwd=tmp_path).stdout
    assert "17 photos that all have, of 41" in text and "seed was 2020, is 1\n" in text and "note: " not in text
    assert float(re.search(r"^mean AUC .* (0\.\d+)$", text, re.M).group(1)) == pytest.approx(float(auc), abs=5e-5)


def test_submissions_are_compared_by_ranks_and_decisions(said):
    rng = np.random.default_rng(0)
    labels, misleading = draw_photos(rng, 300)
    ids = pd.Index([f"Test_{i}" for i in range(len(labels))], name="image_id")
    ours, theirs = (pd.DataFrame(simulate(rng, labels, misleading, 2), ids, list(CLASSES)) for _ in range(2))
    ours.to_csv("ours.csv")
    theirs.sample(frac=1, random_state=0).to_csv("theirs.csv")  # in another order
    text = said("ours.csv", "--against", "theirs.csv", "--csv", "out.csv")
    values = pd.read_csv("out.csv").set_index("figure")["value"]
    for name in CLASSES:
        assert values[f"rank correlation, {name}"] == pytest.approx(ours[name].corr(theirs[name], method="spearman"))
    assert values["photos with the same class first"] == (ours.idxmax(axis=1) == theirs.idxmax(axis=1)).sum()
    for one, a, other, b in (("first", ours, "second", theirs), ("second", theirs, "first", ours)):
        expected = mean_auc(np.eye(4)[b.to_numpy().argmax(1)], a.to_numpy())
        assert values[f"AUC of the {one}, if the {other} decides right"] == pytest.approx(expected)
        assert values[f"largest value of the {one}"] == pytest.approx(a.max().max())
        assert values[f"mean of each photo's largest, of the {one}"] == pytest.approx(a.max(axis=1).mean())
    most = (ours - theirs).abs().sum(axis=1).sort_values(ascending=False, kind="stable").index[:10].tolist()
    assert re.findall(r"^(Test_\d+) ", text, re.M) == most
    ours.drop("Test_3").to_csv("short.csv")
    assert "has no row for Test_3" in refusal(said, "ours.csv", "--against", "short.csv")
    ours.rank(pct=True).assign(rust=1).to_csv("ranks.csv")  # ranks are a submission too
    text = said("ranks.csv", "--against", "ours.csv")
    assert text.count("1.0000") >= 3 and re.search("^rank correlation, rust +-$", text, re.M)
