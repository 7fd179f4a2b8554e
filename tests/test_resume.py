"""Real processes killed at exact moments: the same command finishes the work, with the same bytes."""

import os
import re
import shutil
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import QUICK, REPO, SMALL, copy_recipe, edit, run_script, start_script, wait_until

# Runs a script that keeps what it has at every opportunity, and kills itself (SIGKILL) when a moment is reached.
KILLER = """
import importlib, os, signal, sys
import torch
import train
from harness import callbacks, prediction, run
from models import LeafModule, LeafNet
from harness.console import parse_args
from utils import make_prediction_parser, make_training_parser

script, moment, *sys.argv[1:] = sys.argv[1:]
callbacks.RESUME_EVERY = prediction.KEEP_EVERY = -1
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
kind, _, rest = moment.partition(":")
if "LOSS_SCALER" in os.environ:  # as on a GPU: --precision 16 is refused on a CPU
    scaler, unscale = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3), run.UnscaleFirst
    run.choose_precision = lambda precision, device: "16"
    run.UnscaleFirst = lambda precision, device: unscale(precision, "cpu", scaler)
if kind == "epoch":  # in the second batch of this epoch
    step = LeafModule.training_step
    def training_step(self, batch, batch_idx):
        if self.current_epoch == int(rest) and batch_idx == 1:
            die()
        return step(self, batch, batch_idx)
    LeafModule.training_step = training_step
elif kind == "batch":  # before this batch of a prediction
    seen, normalise = iter(range(1000)), LeafNet.normalise
    LeafNet.normalise = lambda self, images: die() if next(seen) == int(rest) else normalise(self, images)
elif kind in ("half", "before", "after"):  # while, before or after a file with this in its name is put in its place
    replace = os.replace
    def replace_or_die(source, target):
        if rest not in str(target) or "hparams" in rest and "result:" not in open(source).read():
            return replace(source, target)
        if kind == "half":
            os.truncate(source, os.path.getsize(source) // 2)
        if kind == "after":
            replace(source, target)
        die()
    os.replace = replace_or_die
module = importlib.import_module(script)
module.main(parse_args((make_training_parser if script == "train" else make_prediction_parser)("")))
"""
# More epochs than checkpoints are kept: once with the real network, else with one that is quicker.
REAL = ["--max_epochs", 4, "--folds", 0, "--keep_checkpoints", 3]
LONG = ["--max_epochs", 5, "--folds", 0, "--keep_checkpoints", 3, "--backbone", "resnet18"]
ONE = ["--max_epochs", 5, "--folds", 0, "--keep_checkpoints", 1, "--backbone", "resnet18"]
WORKERS = [*LONG[:-2], "--num_workers", 2, *LONG[-2:]]
TRIANGULAR = ["--max_epochs", 3, "--folds", 0, "--backbone", "resnet18", "--lr_schedule", "triangular"]
SHORT = ["--max_epochs", 2, "--folds", 0, 1, "--backbone", "resnet18"]


def run_and_die(script, moment, folder, *options, cold=False, **environment):
    """Run a script until it kills itself at `moment`, or to its end for the moment "never"; returns what it printed."""
    done = run_script("-c", KILLER, script, moment, *options, cwd=folder, check=False, cold=cold, **environment)
    assert done.returncode == (0 if moment == "never" else -signal.SIGKILL), done.stdout + done.stderr
    return done.stdout


def train_and_die(moment, sample, folder, options, cold=False):
    return run_and_die("train", moment, folder, "--data_dir", sample, *SMALL, *options, cold=cold)


def outcome(folder):
    """All that a training leaves for others: names and content of the CSV files, names and weights of the checkpoints."""
    logs = folder / "logs"
    content = {name: (logs / name).read_bytes() for name in ("folds.csv", "results.csv")}
    for path in (logs / "metrics").glob("*.csv"):
        content[path.name] = pd.read_csv(path).drop(columns="seconds").to_csv()
    for path in logs.glob("*.ckpt"):
        state = torch.load(path, weights_only=True)["state_dict"]
        content[path.name] = {name: sha256(value.numpy().tobytes()).hexdigest() for name, value in state.items()}
    return content


@pytest.fixture(scope="module")
def uninterrupted(sample, tmp_path_factory):
    """A function: the outcome of a training with these options that nothing has interrupted."""
    known = {}

    def find(options):
        if tuple(options) not in known:
            folder = tmp_path_factory.mktemp("whole")
            train_and_die("never", sample, folder, options, cold=True)
            known[tuple(options)] = outcome(folder)
        return known[tuple(options)]

    return find


@pytest.mark.parametrize(
    "moment, options, goes_on_after",
    [
        ("epoch:3", REAL, 2),  # in the last epoch: some of the checkpoints written before are replaced already
        ("epoch:3", WORKERS, 2),  # Lightning asks them for the order of an epoch before it has told the sampler which
        ("epoch:0", LONG, None),  # before the first epoch is kept
        ("half:epoch=3", LONG, 2),  # a checkpoint half written
        ("after:epoch=3", LONG, 2),  # a checkpoint written, the resume point not yet
        ("after:epoch=2", ONE, 1),  # the only checkpoint, which the resume point names, was replaced by a lost epoch's
        ("half:last.ckpt", SHORT, None),  # the first resume point half written
        ("half:fold=0.csv", SHORT, None),  # the metrics half written
        ("before:fold=0/hparams.yaml", SHORT, 0),  # the fold trained, its result not written
        ("after:fold=0/hparams.yaml", SHORT, "finished"),  # the result written, nothing tidied
        ("half:results.csv", SHORT, "finished"),  # between two folds
        ("epoch:2", TRIANGULAR, 1),
    ],
)
def test_a_killed_training_goes_on_with_the_same_command_to_the_same_bytes(
    moment, options, goes_on_after, uninterrupted, sample, tmp_path
):
    train_and_die(moment, sample, tmp_path, options)
    printed = train_and_die("never", sample, tmp_path, options)
    if goes_on_after == "finished":
        assert "fold 0 is finished already" in printed
    else:
        expected = [] if goes_on_after is None else [str(goes_on_after)]
        assert re.findall(r"fold 0: going on after epoch (\d+)", printed) == expected
    found = outcome(tmp_path)
    assert found == uninterrupted(options)
    checkpoints = [name for name in found if name.startswith("fold=0-") and name.endswith(".ckpt")]
    assert len(checkpoints) == min(options[1], 3)
    leftovers = [path.name for path in tmp_path.rglob(".*") if path.is_file() and not path.name.endswith(".lock")]
    assert not leftovers


@pytest.fixture(scope="module")
def trained(sample, tmp_path_factory):
    """Two folds of a quick network, one epoch each."""
    folder = tmp_path_factory.mktemp("trained")
    train_and_die("never", sample, folder, ["--folds", 0, 1, "--backbone", "resnet18"])
    return folder


def test_a_killed_prediction_goes_on_to_the_same_bytes_and_a_finished_one_is_not_repeated(trained, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        shutil.copytree(trained, folder)
    options = ["--folds", 0, 1, "--val_batch_size", 8, "--num_workers", 0]
    run_and_die("generate_soft_labels", "never", whole, *options, cold=True)
    run_and_die("generate_soft_labels", "batch:1", killed, *options)  # of 4 for the 17 photos out of fold
    run_and_die("generate_soft_labels", "batch:20", killed, *options)  # of 24 for the test photos
    kept = np.load(next((killed / "logs" / "predictions").glob("test-*.npz")))["probabilities"]
    assert 0 < len(kept) < 12 * 8 * 2
    run_and_die("generate_soft_labels", "half:submission.csv", killed, *options)
    printed = run_and_die("generate_soft_labels", "never", killed, *options)
    assert "out-of-fold: taken from" in printed and "test photos x 8 x 2: taken from" in printed
    for name in ("soft_labels.csv", "submission.csv"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def test_kept_predictions_of_other_checkpoints_or_options_are_not_taken(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    predict = ["generate_soft_labels.py", "--folds", 0, 1, "--num_workers", 0]
    assert "taken from" not in run_script(*predict, cwd=tmp_path / "run").stdout
    again = run_script(*predict, cwd=tmp_path / "run").stdout
    assert "out-of-fold: taken from" in again and "test photos x 8 x 2: taken from" in again
    next((tmp_path / "run" / "logs" / "predictions").glob("out-of-fold-*.npz")).write_bytes(b"")
    again = run_script(*predict, cwd=tmp_path / "run").stdout
    assert "is damaged" in again and again.count("taken from") == 1
    assert "taken from" not in run_script(*predict, "--val_batch_size", 4, cwd=tmp_path / "run").stdout
    checkpoint = next((tmp_path / "run" / "logs").glob("fold=0-*.ckpt"))
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["network.fc.bias"] += 1
    torch.save(content, checkpoint)
    assert "taken from" not in run_script(*predict, "--val_batch_size", 4, cwd=tmp_path / "run").stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_with_one_line_and_sigterm_at_once_and_no_process_is_left(number, sample, tmp_path):
    options = ["--folds", 2, "--max_epochs", 5000, "--num_workers", 2]
    script = start_script("train.py", "--data_dir", sample, *QUICK, *options, cwd=tmp_path)
    wait_until((tmp_path / "logs" / "metrics" / "fold=2.csv").exists, script)
    script.kill_group(number)  # as the terminal does, to the loader's workers too
    assert script.wait(60) == -number, script.stdout + script.stderr  # as a shell sees it: 130 and 143
    assert "Traceback" not in script.stderr
    if number == signal.SIGINT:
        assert "stopped: what is written is whole; the same command" in script.stdout.splitlines()[-1]
    assert script.group_is_gone()


def test_the_state_of_the_loss_scaler_is_kept(sample, tmp_path):
    """fp16 with a scaler that changes its factor every third step, on a CPU in place of a GPU."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    options = ["--data_dir", sample, *QUICK, "--max_epochs", 3, "--folds", 0]
    run_and_die("train", "never", whole, *options, LOSS_SCALER="1")
    run_and_die("train", "epoch:2", killed, *options, LOSS_SCALER="1")
    assert "going on after epoch 1" in run_and_die("train", "never", killed, *options, LOSS_SCALER="1")
    assert outcome(killed) == outcome(whole)


def test_an_interrupted_prediction_keeps_what_it_has(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    options = ["--folds", 0, 1, "--val_batch_size", 1]
    script = start_script("generate_soft_labels.py", *options, cwd=tmp_path / "run")
    wait_until((tmp_path / "run" / "soft_labels.csv").exists, script)
    os.kill(script.pid, signal.SIGINT)
    assert script.wait(60) == 130 and not (tmp_path / "run" / "submission.csv").exists()
    said = script.stdout.splitlines()[-1]
    assert "stopped: what is predicted is kept in logs; the same command goes on from there" in said
    again = run_script("generate_soft_labels.py", *options, cwd=tmp_path / "run").stdout
    assert "out-of-fold: taken from" in again and (tmp_path / "run" / "submission.csv").exists()


@pytest.fixture
def read_only(tmp_path):
    """A function that makes a folder read-only, as a Kaggle input is; only root can, by a mount."""
    mounted = []

    def make(folder):
        for command in (["mount", "--bind", folder, folder], ["mount", "-o", "remount,ro,bind", folder]):
            if sys.platform != "linux" or os.geteuid() or subprocess.run(command, capture_output=True).returncode:
                pytest.skip("nothing can be mounted here")
            mounted[:] = [folder]

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_log_directory_that_cannot_be_written_is_predicted_from_all_the_same(trained, sample, tmp_path, read_only):
    shutil.copytree(trained, tmp_path / "input")
    read_only(tmp_path / "input")
    options = ["--log_dir", tmp_path / "input" / "logs", "--folds", 0, "--num_workers", 0, "--cache_dir", "cache"]
    options += ["--data_dir", sample]
    done = run_script("generate_soft_labels.py", *options, cwd=tmp_path)
    assert "predictions: Read-only file system; an interruption will lose what is predicted so far" in done.stdout
    assert len(pd.read_csv(tmp_path / "soft_labels.csv")) == 9 and (tmp_path / "submission.csv").exists()
    script = start_script("generate_soft_labels.py", *options, "--val_batch_size", 1, cwd=tmp_path)
    wait_until(lambda: "test photos" in script.stderr, script)
    os.kill(script.pid, signal.SIGINT)
    assert script.wait(60) == 130 and "stopped: nothing is kept, as nothing can be written in" in script.stdout


def test_a_disk_that_fills_up_costs_what_was_kept_not_the_prediction(trained, tmp_path):
    """A limit that lets the CSV files pass, but not what is kept of a prediction."""
    shutil.copytree(trained, tmp_path / "run")
    options = ["--folds", 0, "--num_workers", 0, "--cache_dir", tmp_path / "cache"]
    run_script("generate_soft_labels.py", *options, cwd=tmp_path / "run")
    csv, limit = (tmp_path / "run" / "submission.csv").read_bytes(), 5000  # what it prints must find room, too
    kept = [path.stat().st_size for path in (tmp_path / "run" / "logs" / "predictions").glob("*.npz")]
    assert len(kept) == 2 and min(kept) > limit > 2 * len(csv)
    shutil.rmtree(tmp_path / "run" / "logs" / "predictions")
    done = run_script("generate_soft_labels.py", *options, cwd=tmp_path / "run", file_size=limit)
    assert "File too large; an interruption will lose what is predicted so far" in done.stdout
    assert (tmp_path / "run" / "submission.csv").read_bytes() == csv


def test_a_cache_folder_of_another_machine_is_named_with_what_to_type(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / "logs" / "hparams.yaml"
    record = yaml.safe_load(path.read_text())
    (tmp_path / "kaggle").write_text("no folder")
    record["options"]["cache_dir"] = str(tmp_path / "kaggle" / "working" / "image_cache")
    path.write_text(yaml.safe_dump(record))
    step = ["generate_distilled_submission.py", "--log_dir", "logs", "--folds", 0, "--num_workers", 0]
    done = run_script(*step, cwd=tmp_path / "run", check=False)
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.match("error: cannot make the folder .*image_cache: .*; name another folder with --cache_dir$", said)
    run_script(*step, "--cache_dir", "cache", cwd=tmp_path / "run")


def test_another_environment_is_noted_and_never_refused(trained, sample, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    train = ["train.py", "--data_dir", sample, *QUICK, "--folds"]
    run_script(*train, 0, cwd=tmp_path, OMP_NUM_THREADS="1")
    path = tmp_path / "logs" / "hparams.yaml"
    record = yaml.safe_load(path.read_text())
    assert record["environment"]["torch"] == torch.__version__.split("+")[0] and record["environment"]["threads"] == 1
    assert "another environment" not in run_script(*train, 1, cwd=tmp_path, OMP_NUM_THREADS="1").stdout
    record["environment"]["torch"] = "1.4.0"
    path.write_text(yaml.safe_dump(record))
    said = run_script(*train, 2, cwd=tmp_path, OMP_NUM_THREADS="2").stdout
    now = torch.__version__.split("+")[0]
    assert re.search(
        rf"note: logs was begun in another environment \(.*torch was 1.4.0, is {now}.*\): results may", said
    )
    assert "threads was 1, is 2" in said and pd.read_csv(tmp_path / "logs" / "results.csv")["fold"].tolist() == [
        0,
        1,
        2,
    ]


@pytest.mark.parametrize("option", ["--log_dir", "--data_dir", "--cache_dir", "--soft_labels_filename"])
def test_a_name_that_cannot_be_written_down_is_refused(option, tmp_path):
    """Bytes from an old zip: no record and no TensorBoard could hold them."""
    done = run_script("train.py", option, os.fsdecode(b"logs-\xe4"), cwd=tmp_path, check=False, cold=True)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and f"argument {option}: 'logs-\\udce4' is not a name in UTF-8" in said
    assert not list(tmp_path.iterdir())


def test_a_moved_log_directory_still_knows_its_best_checkpoints(uninterrupted, sample, tmp_path):
    (tmp_path / "here").mkdir()
    train_and_die("epoch:4", sample, tmp_path / "here", LONG)
    (tmp_path / "here").rename(tmp_path / "there")
    train_and_die("never", sample, tmp_path / "there", LONG)
    assert outcome(tmp_path / "there") == uninterrupted(LONG)


def test_changed_options_are_accepted_only_on_demand_and_recorded(trained, sample, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    train = ["train.py", "--data_dir", sample, *QUICK, "--folds", 0, 1]
    refused = run_script(*train, "--max_epochs", 2, cwd=tmp_path / "run", check=False)
    assert refused.returncode == 1 and "max_epochs was 1, is 2" in refused.stderr
    assert "keep what is there with --accept_changes" in refused.stderr
    accepted = run_script(*train, "--max_epochs", 2, "--accept_changes", cwd=tmp_path / "run").stdout
    assert "in spite of: max_epochs was 1, is 2" in accepted and accepted.count("is finished already") == 2
    record = yaml.safe_load((tmp_path / "run" / "logs" / "hparams.yaml").read_text())
    assert record["accepted_changes"] == ["max_epochs was 1, is 2"] and record["options"]["max_epochs"] == 2
    assert "accept_changes" not in record["options"]
    for common, said in (
        (["--image_size", 64, 64], "image_size was [32, 64], is [64, 64]"),
        (["--seed", 1], "seed was 2020, is 1"),
    ):  # the folds could not be put together any more
        refused = run_script(*train, *common, "--accept_changes", cwd=tmp_path / "run", check=False)
        last = refused.stderr.splitlines()[-1]
        assert refused.returncode == 1 and last.startswith("error: logs holds folds that were trained differently: ")
        assert said in last and "--fresh" in last and "keep what is there" not in last


def test_a_lost_record_is_no_licence_and_lost_folds_come_back(trained, sample, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    logs = tmp_path / "run" / "logs"
    train = ["train.py", "--data_dir", sample, *QUICK, "--folds", 0, 1]
    folds = (logs / "folds.csv").read_bytes()
    (logs / "folds.csv").unlink()
    run_script(*train, cwd=tmp_path / "run")
    assert (logs / "folds.csv").read_bytes() == folds
    (logs / "hparams.yaml").unlink()
    refused = run_script(*train, "--seed", 7, cwd=tmp_path / "run", check=False)  # would make another split
    assert refused.returncode == 1 and "hparams.yaml is missing" in refused.stderr
    assert (logs / "folds.csv").read_bytes() == folds and not (logs / "hparams.yaml").exists()


def test_a_fresh_start_killed_in_its_middle_does_not_pass_old_results_off_as_new(trained, sample, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    options = ["--data_dir", sample, *QUICK, "--folds", 0, 1, "--gradient_clip_val", 5]
    run_and_die("train", "half:hparams.yaml", tmp_path / "run", *options, "--fresh")
    assert not list((tmp_path / "run" / "logs").glob("fold=*.ckpt"))
    assert "finished already" not in run_and_die("train", "never", tmp_path / "run", *options)


def test_an_edited_source_file_is_noticed(trained, sample, tmp_path):
    sources = tmp_path / "sources"
    sources.mkdir()
    for path in REPO.glob("*.py"):
        shutil.copy(path, sources)
    shutil.copytree(REPO / "harness", sources / "harness")
    shutil.copytree(trained, tmp_path / "run")
    train = [str(sources / "train.py"), "--data_dir", sample, *QUICK, "--folds", 0]
    assert "fold 0 is finished already" in run_script(*train, cwd=tmp_path / "run").stdout
    with open(sources / "dataset.py", "a") as file:
        file.write("ANOTHER_AUGMENTATION = True\n")
    refused = run_script(*train, cwd=tmp_path / "run", check=False)
    assert refused.returncode == 1 and "dataset.py: changed" in refused.stderr and "finished" not in refused.stdout


# ---- files that cannot be written, and files that cannot be trusted


def test_a_full_disk_is_said_by_file_name_and_a_rerun_finishes(sample, tmp_path):
    """A limit on the size of files does what a full disk does, and works for every user."""
    train = ["train.py", "--data_dir", sample, *QUICK, "--folds", 0]
    failed = run_script(*train, cwd=tmp_path, check=False, file_size=20_000_000)
    assert failed.returncode == 1
    assert "error: cannot write" in failed.stderr and "fold=0-epoch=0-" in failed.stderr.splitlines()[-1]
    assert "Traceback" not in failed.stderr
    assert not [path for path in (tmp_path / "logs").iterdir() if "ckpt" in path.name]
    run_script(*train, cwd=tmp_path)
    assert (tmp_path / "logs" / "results.csv").exists()


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_that_would_run_code_is_refused(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    checkpoint = next((tmp_path / "run" / "logs").glob("fold=0-*.ckpt"))
    torch.save({"state_dict": Harmful(tmp_path / "ran")}, checkpoint)
    torch.load(checkpoint, weights_only=False)
    assert (tmp_path / "ran").exists()  # it is harmful
    (tmp_path / "ran").unlink()
    refused = run_script("generate_soft_labels.py", "--folds", 0, 1, cwd=tmp_path / "run", check=False)
    assert refused.returncode == 1 and not (tmp_path / "ran").exists()
    assert f"{checkpoint.name} cannot be loaded as a checkpoint" in refused.stderr and "Traceback" not in refused.stderr


def test_damaged_checkpoints_are_refused_by_name(trained, sample, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    logs = tmp_path / "run" / "logs"
    checkpoint = next(logs.glob("fold=1-*.ckpt"))
    os.truncate(checkpoint, 1_000_000)
    refused = run_script("generate_soft_labels.py", "--folds", 0, 1, cwd=tmp_path / "run", check=False)
    assert refused.returncode == 1 and f"{checkpoint.name} cannot be loaded" in refused.stderr
    checkpoint.rename(logs / "fold=1-last.ckpt")  # a resume point
    train = ["train.py", "--data_dir", sample, *QUICK, "--folds", 1]
    refused = run_script(*train, cwd=tmp_path / "run", check=False)
    assert refused.returncode == 1 and "fold=1-last.ckpt cannot be loaded" in refused.stderr
    assert "--fresh" in refused.stderr and "Traceback" not in refused.stderr
