"""Real processes killed at exact moments: the same command finishes the work, with the same bytes."""

import os
import re
import shutil
import signal
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import QUICK, SMALL, is_gone, refused, run_script, shared_folder, start_script, wait_until

# Runs a script that keeps what it has at every opportunity, and kills itself (SIGKILL) when a moment is reached.
KILLER = """
import importlib, os, signal, sys
import torch
import inference
import train
from harness import devices, launch, run
from models import LeafModule, LeafNet
from harness.console import parse_args
from utils import make_prediction_parser, make_training_parser

script, moment, *sys.argv[1:] = sys.argv[1:]
run.RESUME_EVERY = inference.KEEP_EVERY = -1
launch.JOIN_TIMEOUT = int(os.environ.get("JOIN_TIMEOUT", 60))
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
kind, _, rest = moment.partition(":")
if "LOSS_SCALER" in os.environ:  # as on a GPU: --precision 16 is refused on a CPU
    scaler, unscale = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3), run.UnscaleFirst
    devices.choose_precision = lambda precision, device: "16"
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
QUICKER = [*QUICK[len(SMALL) :], "--seed", 3]  # its AUC rises for three epochs
REAL = ["--max_epochs", 3, "--folds", 0, "--keep_checkpoints", 2]
LONG = ["--max_epochs", 5, "--folds", 0, "--keep_checkpoints", 3, *QUICKER]
ONE = ["--max_epochs", 5, "--folds", 0, "--keep_checkpoints", 1, *QUICKER]
WORKERS = [*LONG, "--num_workers", 2]
TRIANGULAR = ["--max_epochs", 3, "--folds", 0, *QUICKER, "--lr_schedule", "triangular"]
SHORT = ["--max_epochs", 2, "--folds", 0, 1, *QUICKER]


def run_and_die(script, moment, folder, *options, **environment):
    """Run a script until it kills itself at `moment`, or to its end for the moment "never"; returns what it printed."""
    done = run_script("-c", KILLER, script, moment, *options, cwd=folder, check=False, **environment)
    assert done.returncode == (0 if moment == "never" else -signal.SIGKILL), done.stdout + done.stderr
    return done.stdout


def train_and_die(moment, sample, folder, options):
    return run_and_die("train", moment, folder, "--data_dir", sample, *SMALL, *options)


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


@pytest.fixture(scope="session")
def uninterrupted(sample, tmp_path_factory):
    """A function: the outcome of a training with these options that nothing has interrupted."""

    def find(options):
        name = "whole" + "".join(map(str, options))
        return outcome(shared_folder(tmp_path_factory, name, partial(train_and_die, "never", sample, options=options)))

    return find


@pytest.mark.parametrize(
    "moment, options, goes_on_after",
    [
        # in the last epoch: some of the checkpoints written before are replaced already
        pytest.param("epoch:2", REAL, 1, marks=pytest.mark.long),
        ("half:train-32x64", SHORT, None),  # the image cache half written
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
    assert len(checkpoints) == int(options[5] if "--keep_checkpoints" in options else options[1])
    leftovers = [path.name for path in tmp_path.rglob(".*") if path.is_file() and not path.name.endswith(".lock")]
    assert not leftovers


def test_a_moved_log_directory_still_knows_its_best_checkpoints(uninterrupted, sample, tmp_path):
    (tmp_path / "here").mkdir()
    train_and_die("epoch:4", sample, tmp_path / "here", LONG)
    (tmp_path / "here").rename(tmp_path / "there")
    train_and_die("never", sample, tmp_path / "there", LONG)
    assert outcome(tmp_path / "there") == uninterrupted(LONG)


# ---------------------------------------------------------------------------------------------- predictions

PREDICT = ["--folds", 0, 1, "--val_batch_size", 8, "--num_workers", 0]
SOFT, SUBMISSION = "soft_labels-folds=0,1.csv", "submission-folds=0,1.csv"


def test_a_killed_prediction_goes_on_to_the_same_bytes_and_a_finished_one_is_not_repeated(two_folds, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        shutil.copytree(two_folds, folder)
    run_and_die("generate_soft_labels", "never", whole, *PREDICT)
    n_checks = 2  # batches that are predicted to see that the networks are as they were
    run_and_die("generate_soft_labels", f"batch:{n_checks + 1}", killed, *PREDICT)  # of 4 for the 17 photos out of fold
    run_and_die("generate_soft_labels", f"batch:{n_checks + 20}", killed, *PREDICT)  # of 24 for the test photos
    kept = np.load(next((killed / "logs" / "predictions").glob("test-*.npy")))
    assert 0 < np.isfinite(kept).sum() < kept.size == 12 * 8 * 2 * 4
    run_and_die("generate_soft_labels", "half:submission", killed, *PREDICT)
    printed = run_and_die("generate_soft_labels", "never", killed, *PREDICT)
    assert "out-of-fold: predicted already" in printed and "12 photos x 8 x 2: predicted already" in printed
    for name in (SOFT, SUBMISSION):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name

    for change in (["--val_batch_size", 4], ["--precision", "bf16"]):  # other options, then other checkpoints
        assert "predicted already" not in run_script("generate_soft_labels.py", *PREDICT, *change, cwd=killed).stdout
    assert "predicted already" not in run_script("generate_soft_labels.py", *PREDICT, cwd=killed).stdout
    assert len(list((killed / "logs" / "predictions").glob("*.npy"))) == 2  # no others are left
    checkpoint = next((killed / "logs").glob("fold=0-*.ckpt"))
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["network.fc.bias"] += 1e-4
    torch.save(content, checkpoint)
    assert "predicted already" not in run_script("generate_soft_labels.py", *PREDICT, cwd=killed).stdout


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
    assert is_gone(-script.pid)


def test_the_state_of_the_loss_scaler_is_kept(sample, tmp_path):
    """fp16 with a scaler that changes its factor every third step, on a CPU in place of a GPU."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    options = ["--data_dir", sample, *QUICK, "--max_epochs", 3, "--folds", 0, "--limit", 24]
    run_and_die("train", "never", whole, *options, LOSS_SCALER="1")
    run_and_die("train", "epoch:2", killed, *options, LOSS_SCALER="1")
    assert "going on after epoch 1" in run_and_die("train", "never", killed, *options, LOSS_SCALER="1")
    assert outcome(killed) == outcome(whole)


def test_a_log_directory_that_cannot_be_written_is_predicted_from_but_not_trained_in(run, sample, tmp_path, mount):
    """As a Kaggle input; the cache folder of its record is not used, nor is its data folder."""
    mount(run, "--bind", run)
    mount(run, "-o", "remount,ro,bind")
    options = f"--log_dir {run / 'logs'} --data_dir {sample} --cache_dir cache --folds 0 --num_workers 0".split()
    done = run_script("generate_soft_labels.py", *options, cwd=tmp_path)
    assert "Read-only file system; an interruption will lose what is predicted so far" in done.stdout
    assert len(pd.read_csv(tmp_path / "soft_labels-folds=0.csv")) == 9
    assert len(pd.read_csv(tmp_path / "submission-folds=0.csv")) == 12
    done = run_script("train.py", *QUICK, *options, cwd=tmp_path, check=False)
    refused(done, f"error: cannot lock {run / 'logs' / '.hparams.lock'} (Read-only")


# ---------------------------------------------------------------------------------------------- what is refused


def train(sample, cwd, *options, check=False):
    return run_script("train.py", "--data_dir", sample, *QUICK, *options, cwd=cwd, check=check)


def test_another_environment_is_noted_and_never_refused(run, sample):
    path = run / "logs" / "metrics" / "fold=0" / "hparams.yaml"
    record = yaml.safe_load(path.read_text())
    assert record["environment"]["torch"] == torch.__version__.split("+")[0]
    record["environment"]["torch"] = "1.4.0"
    path.write_text(yaml.safe_dump(record))
    said = train(sample, run, "--folds", 2, check=True).stdout
    assert re.search(r"note: fold 0 was begun in another environment \(torch was 1.4.0\): last digits may differ", said)
    assert "fold 1 was begun" not in said
    assert pd.read_csv(run / "logs" / "results.csv")["fold"].tolist() == [0, 1, 2]


def test_changed_options_are_accepted_only_on_demand(run, sample):
    changed = ["--folds", 0, 1, "--max_epochs", 2]
    said = refused(train(sample, run, *changed), "max_epochs was 1, is 2", "--fresh --folds 0 1")
    assert said.endswith("; or keep the finished folds with --accept_changes")
    accepted = train(sample, run, *changed, "--accept_changes", check=True).stdout
    assert "in spite of: max_epochs was 1, is 2" in accepted and accepted.count("is finished already") == 2
    for common, what in (
        (["--image_size", 64, 64], "image_size was [32, 64], is [64, 64]"),
        (["--seed", 1], "seed was 2020, is 1"),
    ):  # the folds could not be put together any more
        said = refused(train(sample, run, *changed[:3], *common, "--accept_changes"), what, "--fresh")
        assert "keep the finished" not in said


def test_a_change_never_reaches_a_fold_in_training(sample, tmp_path):
    """The state that it goes on from brings the learning rate, the schedule and the optimiser's options of its start."""
    options = ["--max_epochs", 3, "--folds", 0]
    run_and_die("train", "epoch:2", tmp_path, "--data_dir", sample, *QUICK, *options)
    assert (tmp_path / "logs" / "fold=0-last.ckpt").exists()
    change = ["--learning_rate", "1e-5", "--lr_schedule", "triangular", "--max_epochs", 4]
    changes = ["learning_rate was 0.001, is 1e-05", "lr_schedule was cosine, is triangular", "max_epochs was 3, is 4"]
    for accept in ([], ["--accept_changes"]):
        done = train(sample, tmp_path, *options, *change, *accept)
        refused(done, *changes, "fold 0, which is in training, goes on only as it was begun")
    done = train(sample, tmp_path, *options, "--learning_rate", "1e-5", "--fresh", check=True)
    assert pd.read_csv(tmp_path / "logs" / "metrics" / "fold=0.csv")["lr"][0] == 1e-5 and "going on" not in done.stdout


def test_a_lost_record_is_no_licence_and_lost_folds_come_back(run, sample):
    logs = run / "logs"
    folds = (logs / "folds.csv").read_bytes()
    (logs / "folds.csv").unlink()
    (logs / "hparams.yaml").unlink()
    train(sample, run, "--folds", 0, 1, check=True)
    assert (logs / "folds.csv").read_bytes() == folds and (logs / "hparams.yaml").exists()
    (logs / "metrics" / "fold=1" / "hparams.yaml").write_text("format: [")
    refused(train(sample, run, "--folds", 0, 1, "--seed", 7), "metrics/fold=1/hparams.yaml is damaged")
    assert (logs / "folds.csv").read_bytes() == folds


def test_a_fresh_start_killed_in_its_middle_does_not_pass_old_results_off_as_new(run, sample):
    options = ["--data_dir", sample, *QUICK, "--folds", 0, 1, "--gradient_clip_val", 5]
    run_and_die("train", "half:folds.csv", run, *options, "--fresh")
    assert not list((run / "logs").glob("fold=*.ckpt"))
    assert "finished already" not in run_and_die("train", "never", run, *options)


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_checkpoints_that_are_damaged_or_would_run_code_are_refused_by_name(run, sample):
    checkpoint = next((run / "logs").glob("fold=0-*.ckpt"))
    harmless = checkpoint.read_bytes()
    torch.save({"state_dict": Harmful()}, checkpoint)
    done = run_script("generate_soft_labels.py", "--folds", 0, 1, cwd=run, check=False)
    refused(done, f"{checkpoint.name} cannot be loaded as a checkpoint")
    assert not (run / "ran").exists()
    run_script("-c", f"import torch; torch.load('logs/{checkpoint.name}', weights_only=False)", cwd=run)
    assert (run / "ran").exists()  # it is harmful
    checkpoint.write_bytes(harmless)
    checkpoint = next((run / "logs").glob("fold=1-*.ckpt"))
    os.truncate(checkpoint, 1_000_000)
    checkpoint.rename(run / "logs" / "fold=1-last.ckpt")  # a resume point
    refused(train(sample, run, "--folds", 1), "fold=1-last.ckpt cannot be loaded", "--fresh")
