"""The figures of the original, run in its own environment (tests/reference/), against ours."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from effects import make_module
from torch.utils.data import DataLoader

from models import LeafModule, LeafNet, fold_batch_norm
from utils import split_folds

REFERENCE = Path(__file__).parent / "reference"
MODEL = json.loads((REFERENCE / "model.json").read_text())
IMAGES = torch.from_numpy(np.random.RandomState(7).standard_normal((2, 3, 96, 160)).astype(np.float32))


@pytest.fixture(scope="module")
def network():
    """The full-size network with the weights that the original was measured with, drawn one tensor after the other."""
    network = LeafNet()
    for j, (name, tensor) in enumerate(network.state_dict().items()):
        z = np.random.RandomState(2020 + j).standard_normal(tuple(tensor.shape))
        if tensor.ndim >= 2:
            value = z * np.sqrt(2 / np.prod(tensor.shape[1:]))
        elif name.endswith("running_var"):
            value = 1 + 0.1 * np.abs(z)
        else:
            value = 0.05 * z + name.endswith("weight")
        if not name.endswith("num_batches_tracked"):
            tensor.copy_(torch.from_numpy(value))
    return network


def test_the_network_has_the_originals_parameters_in_the_originals_order(network):
    ours = [list(tensor.shape) for tensor in network.state_dict().values()]
    assert ours == [shape for _, shape in MODEL["parameter_order"]]
    assert sum(p.numel() for p in network.parameters()) == MODEL["n_parameters"] == 25_523_188
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["bn.bias"]


def test_logits_also_with_folded_batch_norm_loss_and_gradient_norm_are_the_originals(network):
    network, folded = copy.deepcopy(network).eval(), copy.deepcopy(network).eval()
    fold_batch_norm(folded.backbone)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        for one in (network, folded):
            torch.testing.assert_close(one.logits(IMAGES), torch.tensor(MODEL["eval_logits"]), atol=5e-6, rtol=0)
    network.train()
    logits, labels = network.logits(IMAGES), torch.tensor(MODEL["labels"])
    torch.testing.assert_close(logits, torch.tensor(MODEL["train_logits"]), atol=2e-5, rtol=0)
    assert F.cross_entropy(logits, labels).item() == pytest.approx(MODEL["loss"], abs=5e-6)
    # gradients in float64: in float32 rounding alone moves the norm by 3.6e-4, by the processor and its threads
    network.backbone.double()
    F.cross_entropy(network.logits(IMAGES.double()), labels).backward()
    norm = torch.stack([p.grad.double().norm() for p in network.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(MODEL["grad_norm"], rel=2e-4)


def test_the_training_step_computes_the_originals_loss():
    fixed = MODEL["loss_fixed"]
    module, batch, _ = make_module(len(fixed["labels"]))
    module.network.answer.data, batch["label"] = torch.tensor(fixed["logits"]), torch.tensor(fixed["labels"])
    assert module.training_step(batch, 0).item() == pytest.approx(fixed["value"], abs=1e-6)


def test_the_head_stays_in_float32_under_autocast(network):
    given = []
    watch = network.maps.register_forward_hook(lambda module, inputs, maps: given.append(maps))
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            logits = network.eval().logits(IMAGES[:, :, :32, :32])
        watch.remove()
        (maps,) = given
        assert maps.dtype == torch.bfloat16 and logits.dtype == torch.float32
        expected = network.fc(F.normalize(network.bn(maps.float().mean((2, 3))), dim=1))
        torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)  # bf16 has no more than three digits


UP = [1e-5, 2.08e-4, 4.06e-4, 6.04e-4, 8.02e-4, 1e-3]
RATES = {  # of each epoch, and the tolerance
    "cosine": (json.loads((REFERENCE / "lr_schedule.json").read_text())["learning_rate_by_epoch"], 5e-9),
    "triangular": ((UP + UP[-2:0:-1]) * 2 + UP[:1], 1e-9),  # five epochs up and five down
}


@pytest.mark.parametrize("schedule, n_epochs", [("cosine", 70), ("triangular", 21)])
def test_the_learning_rate_of_every_step_is_the_originals(schedule, n_epochs):
    """That which the optimizer of a Lightning fit has; three steps in each epoch."""
    steps, (expected, tolerance) = [], RATES[schedule]
    watch = pl.callbacks.LambdaCallback(on_before_optimizer_step=lambda *of: steps.append(dict(of[2].param_groups[0])))
    loader = DataLoader([{"image": torch.zeros(2, 3), "label": torch.eye(4)[:2]}] * 3, batch_size=None)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=n_epochs, callbacks=[watch], **quiet)
    trainer.fit(LeafModule(torch.nn.Linear(3, 4), schedule, 1e-3, 0), loader)
    assert [step["lr"] for step in steps] == pytest.approx(np.repeat(expected, 3), abs=tolerance)
    assert {step["betas"] for step in steps} == {(0.9, 0.999)} and len(expected) == n_epochs


def test_all_five_folds_are_the_originals():
    expected = json.loads((REFERENCE / "folds.json").read_text())
    folds = split_folds(1821, seed=2020)
    for fold in range(5):
        assert np.flatnonzero(folds == fold).tolist() == expected[str(fold)]
