"""Real processes killed at exact moments: the same command finishes the work, with the same bytes."""

import os
import signal
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import REPO, SMALL

# Runs train.py with a resume point after every epoch, and kills itself (SIGKILL) when MOMENT is reached.
KILLER = """
import os, signal, sys
import train
from models import LeafModule
from utils import parse_args

moment, *sys.argv[1:] = sys.argv[1:]
train.RESUME_EVERY = 0
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
kind, _, rest = moment.partition(":")
if kind == "epoch":  # in the second batch of this epoch
    step = LeafModule.training_step
    def training_step(self, batch, batch_idx):
        if self.current_epoch == int(rest) and batch_idx == 1:
            die()
        return step(self, batch, batch_idx)
    LeafModule.training_step = training_step
elif kind in ("half", "before", "after"):  # while, before or after a file with this in its name is put in its place
    replace = os.replace
    def replace_or_die(source, target):
        if rest not in str(target):
            return replace(source, target)
        if kind == "half":
            os.truncate(source, os.path.getsize(source) // 2)
        if kind == "after":
            replace(source, target)
        die()
    os.replace = replace_or_die
train.main(parse_args(train.parser()))
"""
# More epochs than the six whose checkpoints are kept. One moment with the real network, the others with one whose
# checkpoints are quicker to write.
REAL = ["--max_epochs", 8, "--folds", 0]
QUICK = ["--max_epochs", 8, "--folds", 0, 1, "--backbone", "resnet18"]


def train_and_die(moment, sample, folder, options):
    """Run train.py until it kills itself at `moment`, or to its end for the moment "never"."""
    command = [sys.executable, "-c", KILLER, moment, "--data_dir", sample, *SMALL, *options]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=environment, text=True, capture_output=True)
    assert done.returncode == (0 if moment == "never" else -signal.SIGKILL), done.stdout + done.stderr
    return done.stdout


def outcome(folder):
    """All that a training leaves for others: names and content of the CSV files, names and weights of the checkpoints."""
    logs = folder / "logs"
    content = {name: (logs / name).read_bytes() for name in ("folds.csv", "results.csv")}
    for path in (logs / "metrics").glob("*.csv"):
        content[path.name] = pd.read_csv(path).drop(columns="seconds").to_csv()
    for path in logs.glob("*.ckpt"):
        state = torch.load(path, weights_only=True)["state_dict"]
        content[path.name] = [float(value.double().sum()) for value in state.values()]
    return content


@pytest.fixture(scope="module")
def uninterrupted(sample, tmp_path_factory):
    """A function: the outcome of a training with these options that nothing has interrupted."""
    known = {}

    def find(options):
        if tuple(options) not in known:
            folder = tmp_path_factory.mktemp("whole")
            train_and_die("never", sample, folder, options)
            known[tuple(options)] = outcome(folder)
        return known[tuple(options)]

    return find


@pytest.mark.parametrize(
    "moment, goes_on_after",
    [
        ("epoch:0", None),  # before the first epoch is kept
        ("epoch:7", 6),  # in the last epoch: some of the checkpoints written before are replaced already
        ("half:epoch=4", 3),  # a checkpoint half written
        ("after:epoch=4", 3),  # a checkpoint written, the resume point not yet
        ("half:last.ckpt", None),  # the first resume point half written
        ("half:fold=0.csv", None),  # the metrics half written
        ("before:result.csv", 6),  # the fold trained, its result not written
        ("after:result.csv", "finished"),  # the result written, nothing tidied
        ("half:results.csv", "finished"),  # between two folds
    ],
)
def test_a_killed_training_goes_on_with_the_same_command_to_the_same_bytes(
    moment, goes_on_after, uninterrupted, sample, tmp_path
):
    options = REAL if moment == "epoch:7" else QUICK
    train_and_die(moment, sample, tmp_path, options)
    printed = train_and_die("never", sample, tmp_path, options)
    if goes_on_after == "finished":
        assert "fold 0 is finished already" in printed
    else:
        assert (f"fold 0: going on after epoch {goes_on_after}" in printed) == (goes_on_after is not None)
    found = outcome(tmp_path)
    assert found == uninterrupted(options)
    assert len([name for name in found if name.startswith("fold=0-") and name.endswith(".ckpt")]) == 6
    leftovers = [path.name for path in tmp_path.rglob(".*") if path.is_file() and not path.name.endswith(".lock")]
    assert not leftovers
