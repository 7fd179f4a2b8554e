"""The five steps as Kaggle would run them: packed, cut short, and continued from a read-only output."""

import json
import os
import shutil

import pandas as pd
import pytest
import yaml
from conftest import QUICK, REPO, edit, refusal, run_script

from tools import kaggle

OPTIONS = " ".join([*QUICK, "--keep_checkpoints", "1"])


# The packed script. "cut": its time is over when a fold is finished.
RUN = """
import importlib.util, sys, time
from types import SimpleNamespace
spec = importlib.util.spec_from_file_location("run", sys.argv[1])
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)
if sys.argv[2] == "cut":
    late = lambda: time.monotonic() + 1e6 * (run.WORKING / "logs" / "results.csv").exists()
    run.time = SimpleNamespace(sleep=time.sleep, monotonic=late)
run.run_steps()
"""


def run_session(script, root, how="whole"):
    environment = {"KAGGLE_ROOT": str(root), "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    return run_script("-c", RUN, script, how, cwd=root, **environment).stdout


@pytest.mark.slow
def test_an_edited_recipe_is_packed_cut_short_and_continued_from_its_read_only_output(
    repo,
    sample,
    tmp_path,
    mount,
):
    """The edit imports a file from a folder, and reads a CSV of an earlier run, which step 2 will write anew, and one beside it."""
    shutil.copytree(REPO / "tools", repo / "tools")
    shutil.copy(REPO / "requirements.txt", repo)
    (repo / "losses").mkdir()
    (repo / "losses" / "focal.py").write_text(
        "from pathlib import Path\nfrom torch.nn.functional import cross_entropy\n"
        "assert (Path(__file__).parent / 'focal.json').read_text() == '{}'\n"
    )
    (repo / "losses" / "focal.json").write_text("{}")
    edit(repo / "models.py", "from torch import nn\n", "from torch import nn\nfrom losses import focal\n")
    edit(repo / "models.py", "F.cross_entropy(", "focal.cross_entropy(")
    edit(repo / "train.py", "    run.check(", "    run.inputs['pseudo labels'] = 'submission.csv'\n    run.check(")
    shutil.copy(sample / "sample_submission.csv", repo / "submission.csv")
    beside = "losses/focal.json"
    for number, files in ((1, ["--files", "submission.csv", beside]), (2, ["--files", beside])):
        words = ["somebody", "--session", number, "--out", f"push{number}", f"--options={OPTIONS}", *files]
        run_script("tools.kaggle", *words, cwd=repo, PYTHONPATH=str(repo))
    described = [json.loads((repo / f"push{n}" / "kernel-metadata.json").read_text()) for n in (1, 2)]
    assert described[0]["competition_sources"] == ["plant-pathology-2020-fgvc7"]
    assert described[0]["machine_shape"] == "NvidiaTeslaT4" and described[0]["enable_gpu"]
    assert described[0]["code_file"] == "run.py" and described[0]["id"] == "somebody/plant-pathology-1"
    assert [kernel["kernel_sources"] for kernel in described] == [[], ["somebody/plant-pathology-1"]]

    first, second = tmp_path / "a", tmp_path / "b"
    for root in (first, second):
        shutil.copytree(sample, root / "input" / "plant-pathology-2020-fgvc7")
        (root / "working").mkdir()
    printed = run_session(repo / "push1" / "run.py", first, "cut")
    assert "python -m tools.kaggle NAME --session 2" in printed.splitlines()[-1]
    left = {path.name for path in (first / "working").iterdir() if not path.name.startswith(".")}
    assert left == {"logs", "submission.csv", "losses"}  # no image cache
    packed = {path.relative_to(first / "temp" / "repository").parts[0] for path in first.glob("temp/repository/**/*")}
    assert "losses" in packed and not {"analysis", "tools", "tests", "compare.py", "predict.py"} & packed

    shutil.copytree(first / "working", second / "input" / "plant-pathology-1")
    mount(second / "input", "--bind", second / "input")
    mount(second / "input", "-o", "remount,ro,bind")
    printed, working = run_session(repo / "push2" / "run.py", second), second / "working"
    assert f"going on from {second}/input/plant-pathology-1" in printed
    assert "fold 0 is finished already" in printed and "fold 4 is finished already" not in printed
    assert len(pd.read_csv(working / "submission_mix.csv")) == 12
    assert (working / "submission.csv").read_text() != (repo / "submission.csv").read_text()
    for logs in ("logs", "logs_submit_distill"):
        recorded = yaml.safe_load((working / logs / "hparams.yaml").read_text())
        assert {"losses/focal.py", "pseudo labels"} <= set(recorded["fingerprints"])
    assert printed.splitlines()[-1].startswith("done after ") and printed.count("$ ") == 5
    assert run_session(repo / "push2" / "run.py", second).count("$ ") == 0  # nothing is left to do


def test_files_that_cannot_be_packed_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "large.csv").write_bytes(os.urandom(1_000_000))
    assert "Kaggle takes 1 MB: pack fewer --files" in refusal(kaggle.write_script, tmp_path / "run.py", ["large.csv"])
    for name in ("missing.csv", str(tmp_path / "large.csv"), f"../{tmp_path.name}/large.csv"):
        assert "is not a file in the working directory" in refusal(kaggle.write_script, tmp_path / "run.py", [name])


def test_only_packages_that_are_missing_or_of_a_wrong_version_are_installed(tmp_path, monkeypatch):
    installed = {"torch": "2.10.0+cu126", "numpy": "2.0.2", "opencv-python-headless": "5.0.0.1", "six": "1.16"}

    def version(name):
        if name not in installed:
            raise kaggle.PackageNotFoundError(name)
        return installed[name]

    commands = []
    for name, value in (("version", version), ("run", commands.append), ("REPO", tmp_path), ("INPUT", tmp_path)):
        monkeypatch.setattr(kaggle, name, value)
    lines = ["matplotlib>=3.9", "cleanlab", "torch>=2.6   # a comment", "numpy>=2.0,<3", "six == 1.16.0", "pandas"]
    (tmp_path / "requirements.txt").write_text("\n".join([*lines, "opencv-python-headless<5,>=4.11"]))
    kaggle.install()
    assert commands[0][4:] == ["--quiet", "pandas", "opencv-python-headless<5,>=4.11"]
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "pandas-3-py3-none-any.whl").touch()  # where there is no internet
    del installed["opencv-python-headless"]
    installed["opencv-python"] = "4.12.0.88"  # a second build of OpenCV beside it would break both
    kaggle.install()
    wheels = ["--no-index", f"--find-links={tmp_path / 'wheels'}"]
    assert commands[1][4:] == ["--quiet", *wheels, "pandas"]


def test_attached_weights_are_used_and_missing_data_is_said(tmp_path, monkeypatch):
    commands = []
    paths = {name: tmp_path / name for name in ("INPUT", "WORKING", "TEMP", "STEPS_DONE")}
    functions = {"run": commands.append, "install": lambda: None}
    packed = {"PACKED": {"repository": {}, "files": {}, "options": "--max_epochs 3"}}
    for name, value in (paths | functions | packed).items():
        monkeypatch.setattr(kaggle, name, value)
    with pytest.raises(SystemExit, match="attach the competition's data"):
        kaggle.run_steps()
    (tmp_path / "INPUT" / "data" / "images").mkdir(parents=True)
    for name in ("data/train.csv", "legacy_se_resnext50_32x4d-f3651bad.pth"):
        (tmp_path / "INPUT" / name).touch()
    kaggle.run_steps()
    for command in (commands[0], commands[2]):
        words = " ".join(command)
        assert f"--data_dir {tmp_path}/INPUT/data " in words and words.count(f"--weights={tmp_path}/INPUT/legacy") == 1
