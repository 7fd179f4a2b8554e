"""What several tests share: a small rendered data set, and a way to run a script as a user does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
SMALL = "--weights none --image_size 32 64 --max_epochs 1 --train_batch_size 8 --num_workers 0".split()


def run_script(script, *arguments, cwd, check=True, **environment):
    """Run a script of the repository in the folder `cwd`: CompletedProcess with stdout and stderr as text."""
    command = [sys.executable, *([str(REPO / script)] if script.endswith(".py") else ["-m", script])]
    paths = {"PYTHONPATH": str(REPO)} if not script.endswith(".py") else {}
    done = subprocess.run(
        command + [str(argument) for argument in arguments],
        cwd=cwd,
        env={**os.environ, **paths, **environment},
        text=True,
        capture_output=True,
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """A rendered data set of 41 labelled and 12 unlabelled photos in the competition's layout."""
    folder = tmp_path_factory.mktemp("data") / "sample"
    size = ["--n_train", 41, "--n_test", 12, "--photo_size", 96, 144]
    run_script("tools.generate_sample_data", "--out", folder, *size, cwd=folder.parent)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a rendered data set, leaves/, and in logs/ the first fold trained on it, well enough to mean something.

    160 labelled and 80 unlabelled photos, a validation AUC of about 0.89 after 40 seconds.
    """
    folder = tmp_path_factory.mktemp("trained")
    size = ["--n_train", 160, "--n_test", 80, "--photo_size", 128, 192]
    run_script("tools.generate_sample_data", "--out", "leaves", *size, cwd=folder)
    options = "--weights none --image_size 64 96 --max_epochs 4 --train_batch_size 8 --num_workers 0 --folds 0"
    run_script("train.py", "--data_dir", "leaves", *options.split(), cwd=folder)
    return folder
