"""experiments/: each diff applies, is small and clean, says how to run it, and has the effect that effects.py asserts."""

import re
import shlex
import shutil
import subprocess
import sys
from hashlib import sha256

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import QUICK, REPO, copy_recipe, run_script, shared_folder

from utils import CLASSES

DIFFS = {path.stem: path.read_text() for path in sorted((REPO / "experiments").glob("*.diff"))}
NAMES = """flip_tta gem_pooling grouped_folds label_smoothing mixup no_restarts plant_pathology_2021 pseudo_labels rank_blend
rare_class_weight soft_labels_by_row stratified_folds weights_average""".split()
TRAININGS = [name for name in NAMES if name not in ("flip_tta", "rank_blend", "plant_pathology_2021")]


def commands(name):
    """What the header of a diff tells to type: list of lists of words."""
    header = DIFFS[name].split("\ndiff --git ")[0]
    return [shlex.split(line) for line in header.splitlines() if line.startswith("  ")]


def count_lines(name):
    """The files that a diff edits: dict of name to the numbers of lines added and removed."""
    counts = run_git("--numstat", "-", input=DIFFS[name], cwd=REPO)
    return {file: (int(added), int(removed)) for added, removed, file in map(str.split, counts.splitlines())}


def run_git(*words, **options):
    """What `git apply WORDS` prints; it must succeed."""
    done = subprocess.run(["git", "apply", *words], text=True, capture_output=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def copy(tmp_path_factory):
    """A function of an experiment's name: a copy of the recipe and its rooms with that diff applied, made once."""

    def fill(folder, name):
        copy_recipe(folder / "repo")
        shutil.copy(REPO / "pyproject.toml", folder / "repo")
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True)  # where `git apply` would do nothing
        patch = ["patch", "-p1", "-F0", "-i", REPO / "experiments" / f"{name}.diff"]
        subprocess.run(patch, cwd=folder / "repo", check=True)
        assert not list((folder / "repo").rglob("*.orig"))  # what patch leaves where a line number is not today's

    return lambda name: shared_folder(tmp_path_factory, f"with_{name}", lambda folder: fill(folder, name)) / "repo"


@pytest.mark.parametrize("name", NAMES)
def test_a_diff_is_small_applies_and_leaves_clean_code(name, copy):
    counts = count_lines(name)
    assert 1 <= len(counts) <= 2
    assert sum(added for added, _ in counts.values()) <= (30 if name == "plant_pathology_2021" else 15)
    for file in counts:
        assert (copy(name) / file).read_text() != (REPO / file).read_text()
    for check in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *check, "."]
        done = subprocess.run(ruff, cwd=copy(name), text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert max(map(len, DIFFS[name].split("\ndiff --git ")[0].splitlines())) <= 120


def test_the_commands_of_the_headers_can_be_typed_and_the_table_of_the_page_agrees_with_the_diffs(tmp_path):
    assert list(DIFFS) == NAMES
    options, log_dirs = {}, []
    for name in NAMES:
        typed = commands(name)
        assert ["patch", "-p1", "-i", f"experiments/{name}.diff"] in typed
        assert any(words[:2] == ["python", "compare.py"] for words in typed)
        for words in typed:
            script = words[1]
            if words[0] == "python" and (REPO / script).exists():
                if script not in options:
                    options[script] = set(re.findall(r"--\w+", run_script(script, "--help", cwd=tmp_path).stdout))
                assert {word for word in words if word.startswith("--")} <= options[script], words
            else:
                assert words[0] in ("patch", "cp") or script == "compare.py", words
            if script == "train.py":
                log_dirs.append(words[words.index("--log_dir") + 1])
    assert {"train.py", "blend.py", "generate_soft_labels.py"} <= set(options)
    assert len(set(log_dirs)) == len(log_dirs) == len(TRAININGS) + 1  # and that of 2021
    assert not {"logs", "logs_submit_distill"} & set(log_dirs)

    page = (REPO / "docs" / "experiments.md").read_text()
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| [")]
    found = {re.search(r"\(\.\./experiments/(\w+)\.diff\)", cells[0])[1]: cells for cells in rows}
    assert len(rows) == len(found) and set(found) == set(NAMES)
    for name, cells in found.items():
        counts = count_lines(name)
        assert cells[1].split() == [f"`{file}`" for file in counts], name
        added, removed = map(sum, zip(*counts.values(), strict=True))
        assert cells[2].strip() == f"+{added} −{removed}", name


@pytest.mark.parametrize("name", NAMES)
def test_the_effect_is_there_with_the_diff_and_only_with_it(name, copy, tmp_path):
    run_script("tests/effects.py", name, cwd=tmp_path, PYTHONPATH=str(copy(name)))
    plain = run_script("tests/effects.py", name, cwd=tmp_path, PYTHONPATH=str(REPO), check=False)
    assert plain.returncode == 1 and "AssertionError" in plain.stderr, plain.stderr


@pytest.fixture(scope="session")
def plain(sample, tmp_path_factory):
    """A folder with what the experiments read, and one fold trained by the recipe as it stands, on hard and soft labels."""

    def fill(folder):
        rng = np.random.default_rng(0)
        for name, output in (("train", "soft_labels.csv"), ("sample_submission", "submission.csv")):
            frame = pd.read_csv(sample / f"{name}.csv")
            frame[list(CLASSES)] = rng.dirichlet(np.ones(4), len(frame))
            frame.to_csv(folder / output, index=False)
        near = pd.read_csv(sample / "train.csv")[["image_id"]].assign(near_duplicates="")
        near.loc[:1, "near_duplicates"] = near["image_id"][[1, 0]].to_numpy()
        near.to_csv(folder / "error_analysis.csv", index=False)
        train(REPO, sample, folder, [])
        train(REPO, sample, folder, ["--soft_labels_filename", "soft_labels.csv", "--log_dir", "logs_submit_distill"])

    return shared_folder(tmp_path_factory, "plain", fill)


def train(repo, sample, cwd, options, epochs=2, **settings):
    quick = ["--data_dir", sample, *QUICK, "--max_epochs", epochs, "--folds", 0]
    return run_script(str(repo / "train.py"), *quick, *options, cwd=cwd, **settings)


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_with_the_diff_is_another_one(name, copy, plain, sample, tmp_path):
    work = shutil.copytree(plain, tmp_path / "work")
    (words,) = [words for words in commands(name) if words[1] == "train.py"]
    options = words[words.index("1") + 1 :]  # without the batch and the GPUs
    epochs = 2 if name == "no_restarts" else 1
    said = train(copy(name), sample, work, options, epochs).stdout
    logs, before = work / options[-1], work / ("logs_submit_distill" if "--soft_labels_filename" in options else "logs")

    def read(folder, file):
        return pd.read_csv(folder / file)

    losses = [read(of, "metrics/fold=0.csv")[["train_loss", "val_loss"]][:epochs] for of in (before, logs)]
    assert not np.isclose(*losses, atol=1e-6).all()
    folds = read(logs, "folds.csv")
    assert folds["image_id"].tolist() == read(sample, "train.csv")["image_id"].tolist()
    assert folds.equals(read(before, "folds.csv")) == (name not in ("stratified_folds", "grouped_folds"))
    assert set(read(logs, "out_of_fold.csv")["image_id"]) == set(folds["image_id"][folds["fold"] == 0])
    recorded, usual = (yaml.safe_load((of / "hparams.yaml").read_text())["fingerprints"] for of in (logs, before))
    (edited,) = count_lines(name)
    assert recorded[edited] != usual[edited]
    assert (recorded["the photos"] == usual["the photos"]) == (name != "pseudo_labels")
    weights = [torch.load(next(of.glob("fold=0-epoch*.ckpt")))["state_dict"] for of in (before, logs)]
    assert set(weights[1]) - set(weights[0]) == ({"network.p"} if name == "gem_pooling" else set())
    if name == "no_restarts":
        assert read(logs, "metrics/fold=0.csv")["lr"].tolist() == pytest.approx([1e-3, 5.05e-4])
    if name == "grouped_folds":
        assert folds["fold"][0] == folds["fold"][1]
    if name in ("weights_average", "pseudo_labels"):  # step 2 reads the folds, and makes the same of the checkpoint
        step_2 = [str(copy(name) / "generate_soft_labels.py"), "--log_dir", logs]
        run_script(*step_2, "--folds", 0, "--num_workers", 0, cwd=work)
        soft = read(work, "soft_labels-folds=0.csv")
        seen = read(logs, "out_of_fold.csv").set_index("image_id").loc[soft["image_id"], list(CLASSES)]
        np.testing.assert_allclose(seen, soft[list(CLASSES)], atol=1e-5)
    if name == "pseudo_labels":
        assert "53 photos, 41 in 5 folds" in said
        assert recorded["pseudo labels"] == sha256((plain / "submission.csv").read_bytes()).hexdigest()
        assert set(recorded) - set(usual) == {"pseudo labels"}
        (work / "submission-folds=0.csv").rename(work / "submission.csv")  # what step 2 has made of the new networks
        refused = train(copy(name), sample, work, options, epochs, check=False)
        assert refused.returncode == 1 and "pseudo labels: changed" in refused.stderr


@pytest.mark.slow
def test_photos_with_several_labels_go_through_all_steps_in_the_format_of_2021(copy, sample, tmp_path):
    """Rendered leaves with both diseases have two labels; every seventh leaf has one more."""
    repo, data, classes = copy("plant_pathology_2021"), tmp_path / "2021", ["complex", "healthy", "rust", "scab"]
    rendered = pd.read_csv(sample / "train.csv")
    names = rendered[list(CLASSES)].idxmax(axis=1).replace({"multiple_diseases": "rust scab"})
    names[::7] = "complex " + names[::7]
    truth = names.str.get_dummies(" ")
    test = pd.read_csv(sample / "test.csv")["image_id"]
    data.mkdir()
    (data / "images").symlink_to(sample / "images")
    pd.DataFrame({"image": rendered["image_id"] + ".jpg", "labels": names}).to_csv(data / "train.csv", index=False)
    given = {"image": test + ".jpg", "labels": "healthy"}
    pd.DataFrame(given).to_csv(data / "sample_submission.csv", index=False)

    def run(script, *options):
        return run_script(str(repo / script), *options, cwd=tmp_path).stdout

    quick = ["--data_dir", data, *QUICK, "--max_epochs", 2]
    assert "val_f1 of 5 folds: 0." in run("train.py", *quick)
    run("generate_soft_labels.py", "--num_workers", 0)
    run("train.py", *quick, "--soft_labels_filename", "soft_labels.csv", "--log_dir", "logs_submit_distill")
    run("generate_distilled_submission.py", "--num_workers", 0)
    run("blend.py")

    one, two, mix, soft = (
        pd.read_csv(tmp_path / f"{name}.csv", index_col="image_id")
        for name in ("submission", "submission_distill", "submission_mix", "soft_labels")
    )
    pd.testing.assert_frame_equal(mix, (one + two) / 2)
    assert not np.isclose(soft.sum(axis=1), 1, atol=0.1).any() and soft.index.tolist() == rendered["image_id"].tolist()
    kept = pd.read_csv(tmp_path / "logs" / "out_of_fold.csv").set_index("image_id").loc[soft.index]
    assert kept["label"].str.get_dummies()[classes].to_numpy().tolist() == truth[classes].to_numpy().tolist()
    np.testing.assert_allclose(kept[list(soft)], soft, atol=0.02)  # the training validates in bf16 where it can
    submitted = pd.read_csv(tmp_path / "submission_mix_labels.csv")
    assert submitted["image"].tolist() == (test + ".jpg").tolist() and list(submitted) == ["image", "labels"]
    decided = submitted["labels"].str.get_dummies(" ").reindex(columns=mix.columns, fill_value=0).to_numpy()
    most_probable = np.arange(mix.shape[1]) == mix.to_numpy().argmax(1)[:, None]
    assert (decided == (mix.to_numpy() >= 0.5) | most_probable & (mix.to_numpy() < 0.5).all(1)[:, None]).all()

    figures = run("compare.py", "logs", "logs_submit_distill", "--csv", "figures.csv")
    assert "complex|rust" in figures and "41 photos that all have" in figures
    losses = np.where(
        truth.reindex(columns=mix.columns, fill_value=0).to_numpy() == 1, kept[list(mix)], 1 - kept[list(mix)]
    )
    table = pd.read_csv(tmp_path / "figures.csv").query("runs == 'logs' and figure == 'log loss'")
    assert table["value"].item() == pytest.approx(-np.log(losses).sum(1).mean(), abs=1e-4)
    run("error_analysis.py", "--num_workers", 0, "--worst", 4)
    page = (tmp_path / "error_analysis.html").read_text()
    assert "what speaks for <b>scab</b>, its label" in page and "rust|scab" in page
    run("predict.py", sample / "images" / "Test_1.jpg", "--num_workers", 0)

    images = rendered["image_id"] + ".jpg"
    for column, value, said in (
        ("labels", "rust mildew", "has the labels mildew: add them to CLASSES"),
        ("labels", "", "line 5 ('Train_3.jpg') has no labels"),
        ("image", "Train_0.jpg", "line 5 ('Train_0.jpg') repeats an image"),
        ("other", "", "has a column 'other' that does not belong there"),
    ):
        table = pd.DataFrame({"image": images, "labels": names})
        table.loc[3, column] = value
        table.to_csv(data / "train.csv", index=False)
        refused = run_script(str(repo / "train.py"), *quick, "--log_dir", "other", cwd=tmp_path, check=False)
        assert refused.returncode == 1 and said in refused.stderr and "Traceback" not in refused.stderr, refused.stderr
