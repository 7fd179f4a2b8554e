"""The five steps as Kaggle would run them: packed, on read-only inputs and a small disk, cut short and continued."""

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from conftest import REPO, SMALL, run_script, start_script

from tools.kaggle import __main__ as kaggle
from tools.kaggle import session

# A tiny network of timm
OPTIONS = [*SMALL, "--backbone", "timm/test_resnet", "--max_epochs", 2, "--keep_checkpoints", 1]


@pytest.fixture
def mount():
    """A function that mounts, if that is possible here; all is unmounted in the end."""
    mounted = []

    def call(folder, *commands):
        for command in commands:
            if sys.platform != "linux" or os.geteuid() or subprocess.run(command, capture_output=True).returncode:
                pytest.skip("nothing can be mounted here")
            mounted[:] = [*dict.fromkeys([*mounted, folder])]

    yield call
    for folder in reversed(mounted):
        subprocess.run(["umount", "--lazy", folder], check=True)


def make_root(folder, sample, mount, output_of=None):
    """The folders of a Kaggle machine: inputs that are read-only, and 64 MB for the output."""
    (folder / "input").mkdir(parents=True)
    shutil.copytree(sample, folder / "input" / "plant-pathology-2020-fgvc7")
    if output_of is not None:
        shutil.copytree(output_of / "working", folder / "input" / "plant-pathology-1")
    (folder / "working").mkdir()
    mount(folder / "working", ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder / "working"])
    where = folder / "input"
    mount(where, ["mount", "--bind", where, where], ["mount", "-o", "remount,ro,bind", where])
    return folder


def pack(folder, number):
    words = ["somebody", "--session", number, "--out", folder]
    words += ["--options", " ".join(map(str, OPTIONS))]
    run_script("tools.kaggle", *words, cwd=folder.parent)


def start(folder, root, how):
    return start_script("-c", RUN, folder / "run.py", how, cwd=root, KAGGLE_ROOT=str(root), OMP_NUM_THREADS="1")


# The packed script; with "cut" the session's time is over as soon as a fold is finished.
RUN = """
import importlib.util, json, sys, time
spec = importlib.util.spec_from_file_location("run", sys.argv[1])
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)
run.PACKED = json.loads(run.PACKED)
class Clock:
    sleep = time.sleep
    def monotonic():
        return time.monotonic() + 1e6 * (run.WORKING / "logs" / "results.csv").exists()
if sys.argv[2] == "cut":
    run.time = Clock
run.main()
"""


@pytest.mark.slow
def test_a_session_that_is_cut_short_is_continued_from_its_read_only_output(sample, tmp_path, mount):
    pack(tmp_path / "cut", 1)
    first = make_root(tmp_path / "a", sample, mount)
    done = start(tmp_path / "cut", first, "cut")
    assert done.wait() == 0, done.stdout + done.stderr
    assert "python -m tools.kaggle NAME --session 2" in done.stdout.splitlines()[-1]
    assert not (first / "working" / "soft_labels.csv").exists() and not (first / "working" / "image_cache").exists()

    pack(tmp_path / "next", 2)
    second = make_root(tmp_path / "b", sample, mount, output_of=first)
    done = start(tmp_path / "next", second, "whole")
    assert done.wait() == 0, done.stdout + done.stderr
    assert f"going on from {second}/input/plant-pathology-1/logs" in done.stdout
    assert "fold 0 is finished already" in done.stdout and "fold 4 is finished already" not in done.stdout
    assert len(pd.read_csv(second / "working" / "submission_mix.csv")) == 12
    assert done.stdout.splitlines()[-1].startswith("done after ")


def test_what_is_pushed_asks_for_the_data_and_a_gpu_that_can_be_used(tmp_path):
    pack(tmp_path / "push", 1)
    described = json.loads((tmp_path / "push" / "kernel-metadata.json").read_text())
    assert described["competition_sources"] == ["plant-pathology-2020-fgvc7"] and described["kernel_sources"] == []
    assert described["machine_shape"] == "NvidiaTeslaT4" and described["enable_gpu"] and described["enable_internet"]
    assert described["code_file"] == "run.py" and described["id"] == "somebody/plant-pathology-1"
    pack(tmp_path / "push", 2)
    described = json.loads((tmp_path / "push" / "kernel-metadata.json").read_text())
    assert described["kernel_sources"] == ["somebody/plant-pathology-1"]
    assert (tmp_path / "push" / "run.py").stat().st_size < 1_000_000  # Kaggle's limit for a script


def test_what_is_packed_is_what_the_steps_run(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "PACKED", {"repository": kaggle.pack_repository()})
    monkeypatch.setattr(session, "REPO", tmp_path)
    session.unpack()
    for path in [*REPO.glob("*.py"), *(REPO / "harness").glob("*.py")]:
        assert (tmp_path / path.relative_to(REPO)).read_bytes() == path.read_bytes()
    assert not {path.name for path in tmp_path.iterdir()} - {path.name for path in REPO.iterdir()}


def test_only_packages_that_are_missing_or_of_a_wrong_version_are_installed(tmp_path, monkeypatch):
    installed = {
        "torch": "2.10.0+cu126",
        "numpy": "2.0.2",
        "opencv-python-headless": "5.0.0.1",
        "tqdm": "4.67",
        "six": "1.16",
    }

    def version(name):
        if name not in installed:
            raise session.PackageNotFoundError(name)
        return installed[name]

    commands = []
    monkeypatch.setattr(session, "version", version)
    monkeypatch.setattr(session, "REPO", tmp_path)
    monkeypatch.setattr(session, "INPUT", tmp_path / "input")
    monkeypatch.setattr(session, "run", commands.append)
    wanted = ["matplotlib>=3.9", "cleanlab", "torch>=2.6   # a comment", "numpy>=2.0,<3", "six == 1.16.0", "tqdm"]
    wanted = "\n".join([*wanted, "opencv-python-headless>=4.11,<5", "pretrainedmodels==0.7.4"])
    (tmp_path / "requirements.txt").write_text(wanted)
    session.install()
    assert commands[0][-2:] == ["opencv-python-headless>=4.11,<5", "pretrainedmodels==0.7.4"]
    assert "--no-index" not in commands[0]
    (tmp_path / "input" / "wheels").mkdir(parents=True)
    (tmp_path / "input" / "wheels" / "pretrainedmodels-0.7.4-py3-none-any.whl").touch()  # where there is no internet
    session.install()
    assert commands[1][5:8] == ["--no-index", "--find-links", str(tmp_path / "input" / "wheels")]
    installed["opencv-python"] = "4.12.0.88"
    del installed["opencv-python-headless"]  # another build of OpenCV beside the one that is there would break both
    (tmp_path / "requirements.txt").write_text("torch>=2.6\nnumpy>=2.0\nopencv-python-headless>=4.11,<5\n")
    session.install()
    assert len(commands) == 2


def test_attached_weights_are_used_and_missing_data_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "INPUT", tmp_path)
    assert session.find_weights() == []
    with pytest.raises(SystemExit, match="attach the competition's data"):
        session.find_data()
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "legacy_se_resnext50_32x4d-f3651bad.pth").touch()
    assert session.find_weights() == ["--weights", str(tmp_path / "weights" / "legacy_se_resnext50_32x4d-f3651bad.pth")]
