"""The Trainer is the user's: what users add, an edit of train.py or models.py alone, through a killed and resumed fold."""

import re

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from conftest import QUICK, edit, run_script
from test_resume import KILLER, outcome

ADAM = re.compile(
    r"        optimizer = torch\.optim\.Adam.*?return \{[^\n]*\n", re.S
)  # to the end of configure_optimizers
PLATEAU = """        optimizer = torch.optim.SGD(parameters, lr=0.1)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1.0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}
"""
LOGGER, CALLBACKS = "logger=False,", "*run.callbacks(fold)]"
EDITS = {  # what is added: the file, the old text or the pattern, the new text; options
    "CSVLogger and LearningRateMonitor": (
        "train.py",
        [
            (LOGGER, "logger=pl.loggers.CSVLogger('elsewhere'),"),
            (CALLBACKS, "*run.callbacks(fold), pl.callbacks.LearningRateMonitor()], profiler='simple'"),
        ],
        [],
    ),
    "TensorBoardLogger and a strategy": (
        "train.py",
        [
            (LOGGER, "logger=pl.loggers.TensorBoardLogger('elsewhere'),"),
            ("strategy=run.strategy", "strategy=pl.strategies.SingleDeviceStrategy('cpu')"),
        ],
        [],
    ),
    "EarlyStopping": (
        "train.py",
        [(CALLBACKS, "*run.callbacks(fold), pl.callbacks.EarlyStopping('val_loss', min_delta=9.0, patience=3)]")],
        ["--max_epochs", 20],
    ),
    "WeightAveraging": (
        "train.py",
        [
            (CALLBACKS, "*run.callbacks(fold), pl.callbacks.EMAWeightAveraging(decay=0.5)]"),
            ("save_weights_only=True", "save_weights_only=False"),
        ],
        [],
    ),
    "validation of every second epoch": ("train.py", [(LOGGER, "logger=False, check_val_every_n_epoch=2,")], []),
    "SGD without a schedule, and save_hyperparameters": (
        "models.py",
        [
            (ADAM, "        return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)\n"),
            (
                "super().__init__()\n        if lr_schedule",
                "super().__init__()\n        self.save_hyperparameters()\n        if lr_schedule",
            ),
        ],
        [],
    ),
    "ReduceLROnPlateau": ("models.py", [(ADAM, PLATEAU)], []),
    # another of its backends is --compile's
    "torch.compile": (
        "train.py",
        [("return LeafModule(network,", "return LeafModule(torch.compile(network, backend='aot_eager'),")],
        [],
    ),
    "--compile": ("train.py", [], ["--compile"]),
}
if not hasattr(pl.callbacks, "EMAWeightAveraging"):
    del EDITS["WeightAveraging"]  # Lightning has it since 2.6


@pytest.mark.long
@pytest.mark.parametrize("addition", EDITS)
def test_what_users_add_goes_through_a_killed_and_resumed_fold(addition, repo, sample, tmp_path):
    file, edits, options = EDITS[addition]
    for old, new in edits:
        (old,) = old.findall((repo / file).read_text()) if isinstance(old, re.Pattern) else [old]
        edit(repo / file, old, new)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = ["--data_dir", sample, *QUICK, "--max_epochs", 5, "--folds", 0, *options]

    def train(folder, moment, status):
        folder.mkdir(exist_ok=True)
        done = run_script("-c", KILLER, "train", moment, *words, cwd=folder, check=False, PYTHONPATH=str(repo))
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    said = train(whole, "never", 0)
    train(killed, "epoch:3", -9)
    assert "fold 0: going on after epoch 2" in train(killed, "never", 0)
    assert outcome(killed) == outcome(whole)
    rates = pd.read_csv(whole / "logs" / "metrics" / "fold=0.csv")["lr"]
    if addition == "EarlyStopping":
        assert len(rates) == 4 and "fold 0, 4 of 20 epochs: epoch 3" in said  # it ends early, and is finished
    elif addition == "ReduceLROnPlateau":
        assert rates.tolist() == [0.1, 0.05, 0.025, 0.0125, 0.00625]
    elif addition.startswith("SGD"):
        assert rates.tolist() == [1e-3] * 5
    elif addition == "validation of every second epoch":
        metrics = pd.read_csv(whole / "logs" / "metrics" / "fold=0.csv")
        assert metrics["val_loss"].isna().tolist() == [True, False, True, False, True]
    if "Logger" in addition:
        versions = sorted(path.name for path in (killed / "elsewhere" / "lightning_logs").iterdir())
        assert versions == ["version_0", "version_1"]  # one for each start
    if "LearningRateMonitor" in addition:
        logged = pd.read_csv(killed / "elsewhere" / "lightning_logs" / "version_1" / "metrics.csv")
        assert logged["lr-Adam"].dropna().tolist() == rates.tolist()[3:]
    step_2 = [str(repo / "generate_soft_labels.py"), "--folds", 0, "--tta_draws", 1, "--num_workers", 0]
    run_script(*step_2, cwd=killed)
    submission = pd.read_csv(killed / "submission-folds=0.csv", index_col=0)
    assert len(submission) == 12
    soft, validated = (
        pd.read_csv(killed / name, index_col=0) for name in ("soft_labels-folds=0.csv", "logs/out_of_fold.csv")
    )
    np.testing.assert_allclose(
        soft, validated.loc[soft.index, list(soft)], atol=1e-5
    )  # what was validated is what predicts
    if addition == "--compile":
        run_script(*step_2, "--compile", cwd=whole)
        compiled = pd.read_csv(whole / "submission-folds=0.csv", index_col=0)
        pd.testing.assert_frame_equal(compiled, submission, atol=1e-4)
        assert not compiled.equals(submission)


def test_a_compiled_network_keeps_its_names(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    names = list(network.state_dict())
    network.compile()
    assert list(network.state_dict()) == names
