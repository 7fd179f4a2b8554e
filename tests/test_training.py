"""One fold's training, step by step: the optimizer, clipping, batches, epochs, and which checkpoints are kept."""

import re

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from conftest import refusal

import harness.devices
import models
import train
from dataset import EpochSampler, LeafDataset
from harness.console import parse_args
from harness.run import Run, UnscaleFirst
from utils import CLASSES, make_training_parser, split_folds

AUCS = [0.50, 0.80, 0.70, 0.95, 0.60, 0.90, 0.85, 0.75]  # scripted: the best of these eight epochs is the fourth


def noise(args):
    """TrainingData of twenty noise photos."""
    photos = np.random.default_rng(0).integers(0, 256, (20, 32, 64, 3), dtype=np.uint8)
    labels = np.eye(4, dtype=np.float32)[np.arange(20) % 4]
    ids = pd.Series([f"Train_{i}" for i in range(20)])
    return train.TrainingData(ids, split_folds(20, args.seed), labels, labels, photos)


def train_on(args, data):
    """Train the folds of args as train.main does, but on given data."""
    run = Run(args, 5, CLASSES)
    run.inputs = {}
    module = train.make_module(args, args.folds[0], None)
    with run.begin(data, None, module, lambda path: train.load_network(path, args.backbone), train.fit_photo):
        for fold in run.folds_left():
            train.train_fold(args, fold, data, None, run)
    return run.summarise()


@pytest.fixture
def watched(monkeypatch, tmp_path):
    """Train fold 1 of 20 noise photos for eight epochs with scripted AUCs; returns what was seen on the way."""
    seen = {"keys": [], "batches": [], "norms": []}
    item, step = LeafDataset.__getitem__, torch.optim.Adam.step

    def watch_item(self, key):
        seen["keys"].append(key)
        return item(self, key)

    def watch_step(self, closure):
        closure()  # Lightning computes loss and gradients here, and clips them
        seen["norms"].append(torch.stack([p.grad.norm() for p in self.param_groups[0]["params"]]).norm().item())
        seen["defaults"] = self.defaults
        return step(self)

    training_step = models.LeafModule.training_step

    def watch_batch(self, batch, batch_idx):
        seen["batches"].append(len(batch["row"]))
        return training_step(self, batch, batch_idx)

    def run(*options):
        aucs = iter(AUCS)
        monkeypatch.setattr(models, "mean_auc", lambda labels, probabilities: next(aucs))
        monkeypatch.setattr(LeafDataset, "__getitem__", watch_item)
        monkeypatch.setattr(torch.optim.Adam, "step", watch_step)
        monkeypatch.setattr(models.LeafModule, "training_step", watch_batch)
        arguments = f"--log_dir {tmp_path} --folds 1 --max_epochs 8 --train_batch_size 8 --num_workers 0 --precision 32"
        arguments += " --backbone squeezenet1_1"
        args = parse_args(make_training_parser(train.__doc__), [*arguments.split(), *options])
        data = noise(args)
        train_on(args, data)
        return data, seen

    return run


def test_the_best_six_checkpoints_are_kept_and_the_best_is_used(watched, tmp_path):
    data, seen = watched()
    kept = sorted(path.name for path in tmp_path.glob("*.ckpt"))
    expected = [epoch for epoch, auc in enumerate(AUCS) if auc in sorted(AUCS)[2:]]
    assert [int(name.split("-")[1].removeprefix("epoch=")) for name in kept] == expected
    result = pd.read_csv(tmp_path / "results.csv")
    assert result["checkpoint"].tolist() == [name for name in kept if "val_roc_auc=0.9500" in name]
    assert (result["epoch"][0], result["val_roc_auc"][0]) == (3, pytest.approx(0.95))

    # 16 photos to train on: two batches of 8 an epoch, in every epoch all of them, in another order
    train_rows = np.flatnonzero(data.folds != 1).tolist()
    orders = [[row for fold, draw, row in seen["keys"] if row in train_rows and draw == epoch] for epoch in range(8)]
    assert len(train_rows) == 16 and all(sorted(order) == train_rows for order in orders)
    assert len({tuple(order) for order in orders}) == 8
    assert seen["batches"] == [8] * 16

    # Adam as the original's, and no gradient longer than 1, though they would be
    assert [seen["defaults"][name] for name in ("lr", "betas", "weight_decay")] == [1e-3, (0.9, 0.999), 0]
    assert max(seen["norms"]) == pytest.approx(1, abs=1e-4)

    state = torch.load(tmp_path / result["checkpoint"][0], weights_only=True)["state_dict"]
    assert (state["network.bn.bias"] == 0).all()  # frozen, unlike the weight beside it
    assert (state["network.bn.weight"] != 1).any()

    metrics = pd.read_csv(tmp_path / "metrics" / "fold=1.csv")
    assert metrics["epoch"].tolist() == list(range(8)) and metrics["val_roc_auc"].tolist() == pytest.approx(AUCS)


def test_accumulation_splits_the_same_batch_into_parts(watched):
    data, seen = watched("--accumulate_grad_batches", "2", "--max_epochs", "2")
    assert seen["batches"] == [4] * 8 and len(seen["norms"]) == 4
    sampler, whole = EpochSampler(np.flatnonzero(data.folds != 1), 8, 2020, 1), []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        whole += list(sampler)
    assert [key for key in seen["keys"] if data.folds[key[2]] != 1] == whole


def test_gradients_are_clipped_at_the_norm_asked_for_or_as_the_trainer_is_told(watched):
    _, seen = watched("--gradient_clip_val", "0.25", "--max_epochs", "1")
    assert seen["norms"] == pytest.approx([0.25] * 2, abs=1e-4)
    module = models.LeafModule(torch.nn.Linear(2, 1, bias=False), "cosine", 1e-3, seed=0)
    (weight,) = module.parameters()
    for algorithm, clipped in (("norm", [[0.15, -0.2]]), ("value", [[0.25, -0.25]])):
        weight.grad = torch.tensor([[3.0, -4.0]])
        module.configure_gradient_clipping(None, 0.25, algorithm)
        torch.testing.assert_close(weight.grad, torch.tensor(clipped))


def test_a_loss_that_is_not_finite_stops_the_fold_and_what_is_kept_is_good(monkeypatch, tmp_path):
    options = f"--log_dir {tmp_path} --folds 1 --max_epochs 3 --train_batch_size 8 --num_workers 0 --precision 32"
    args = parse_args(make_training_parser(train.__doc__), options.split())
    step = models.LeafModule.training_step

    def poisoned(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 0:
            batch["label"][3] = np.inf
        return step(self, batch, batch_idx)

    monkeypatch.setattr(models.LeafModule, "training_step", poisoned)
    said = refusal(train_on, args, noise(args))
    assert re.search(r"fold 1 stopped: a loss of epoch 1 is not finite.*--fresh --folds 1\) with --prec", said)
    kept = [path.name.split("-val")[0] for path in tmp_path.glob("*.ckpt")]
    assert kept == ["fold=1-epoch=0"]  # the last good one
    assert len(pd.read_csv(tmp_path / "metrics" / "fold=1.csv")) == 1


@pytest.mark.parametrize("precision, expected", [("16", "16-mixed"), ("bf16", "bf16-mixed"), ("32", "32-true")])
def test_a_precision_reaches_the_trainer_and_16_bits_come_with_our_loss_scaler(
    precision, expected, monkeypatch, tmp_path
):
    """As on a GPU: on a CPU --precision 16 is refused."""
    monkeypatch.setattr(harness.devices, "choose_precision", lambda asked, device: precision)
    run = Run(parse_args(make_training_parser(train.__doc__), ["--log_dir", str(tmp_path)]), 5, CLASSES)
    trainer = pl.Trainer(precision=run.precision, plugins=run.plugins, accelerator=run.accelerator, logger=False)
    assert trainer.precision == expected
    assert isinstance(trainer.precision_plugin, UnscaleFirst) == (precision == "16")


class Slope(pl.LightningModule):
    """One number, whose gradient is the batch; a batch of 0 is skipped, as Lightning allows."""

    def __init__(self, fused):
        super().__init__()
        self.number, self.fused, self.seen = torch.nn.Parameter(torch.zeros(1)), fused, []

    def training_step(self, batch, batch_idx):
        return (self.number * batch).sum() if batch else None

    def on_before_optimizer_step(self, optimizer):
        self.seen.append(None if self.number.grad is None else self.number.grad.item())

    def configure_optimizers(self):
        return torch.optim.Adam([self.number], 0.1, fused=self.fused)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)


@pytest.mark.parametrize("fused", (True, False))
@pytest.mark.parametrize("parts", (1, 2))
def test_under_a_loss_scaler_hooks_see_gradients_as_they_are_and_a_batch_may_be_skipped(fused, parts):
    batches, numbers = [0.0, 0.0, 3.0, 1.0, 0.0, 0.0, 2.0, 4.0], []
    for plugins in ([UnscaleFirst("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))], []):
        module = Slope(fused)
        how = {"accelerator": "cpu", "max_epochs": 1, "gradient_clip_val": 1.0, "accumulate_grad_batches": parts}
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(plugins=plugins, **how, **quiet)
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
        numbers.append(module.number.item())
        gradients = batches if parts == 1 else [0, 2, 0, 3]  # the mean of two
        assert module.seen == [gradient or None for gradient in gradients]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5) and numbers[1] < 0
