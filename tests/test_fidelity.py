"""The figures of the original, run in its own environment (tests/reference/), against ours."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from models import LeafModule, LeafNet, fold_batch_norm
from utils import split_folds

REFERENCE = Path(__file__).parent / "reference"
MODEL = json.loads((REFERENCE / "model.json").read_text())


@pytest.fixture(scope="module")
def network():
    """The full-size network with the weights that the original was measured with, drawn one tensor after the other."""
    network = LeafNet()
    for j, (name, tensor) in enumerate(network.state_dict().items()):
        z = np.random.RandomState(2020 + j).standard_normal(tuple(tensor.shape))
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_var"):
            value = 1 + 0.1 * np.abs(z)
        elif tensor.ndim == 1 and name.endswith("weight"):
            value = 1 + 0.05 * z
        elif tensor.ndim >= 2:
            value = z * np.sqrt(2 / np.prod(tensor.shape[1:]))
        else:
            value = 0.05 * z
        tensor.copy_(torch.from_numpy(value))
    return network


@pytest.fixture
def images():
    return torch.from_numpy(np.random.RandomState(7).standard_normal((2, 3, 96, 160)).astype(np.float32))


def test_the_network_has_the_originals_parameters_in_the_originals_order(network):
    ours = [list(tensor.shape) for tensor in network.state_dict().values()]
    assert ours == [shape for _, shape in MODEL["parameter_order"]]
    assert sum(p.numel() for p in network.parameters()) == MODEL["n_parameters"] == 25_523_188
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["bn.bias"]


def test_logits_loss_and_gradient_norm_are_the_originals(network, images):
    network = copy.deepcopy(network).eval()
    with torch.no_grad():
        torch.testing.assert_close(network.logits(images), torch.tensor(MODEL["eval_logits"]), atol=5e-6, rtol=0)
    network.train()
    logits = network.logits(images)
    torch.testing.assert_close(logits, torch.tensor(MODEL["train_logits"]), atol=2e-5, rtol=0)
    loss = F.cross_entropy(logits, torch.tensor(MODEL["labels"]))
    assert loss.item() == pytest.approx(MODEL["loss"], abs=5e-6)
    # gradients in float64: in float32 rounding alone moves the norm by 3.6e-4, by the processor and its threads
    network.backbone.double()
    network.zero_grad()
    F.cross_entropy(network.logits(images.double()), torch.tensor(MODEL["labels"])).backward()
    norm = torch.stack([p.grad.double().norm() for p in network.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(MODEL["grad_norm"], rel=2e-4)


def test_the_training_step_computes_the_originals_loss():
    fixed = MODEL["loss_fixed"]

    class Given(torch.nn.Module):
        def forward(self, images):
            return torch.tensor(fixed["logits"])

    module = LeafModule(Given(), "cosine", 1e-3, 0)
    module.log = lambda *_, **__: None
    module.optimizers = lambda: torch.optim.SGD([torch.zeros(1)], lr=0)
    labels = torch.tensor(fixed["labels"])
    loss = module.training_step({"image": torch.zeros(len(labels), 2, 2, 3, dtype=torch.uint8), "label": labels}, 0)
    assert loss.item() == pytest.approx(fixed["value"], abs=1e-6)


def test_folding_batch_norm_leaves_the_logits(network, images):
    folded = LeafNet()
    folded.load_state_dict(network.state_dict())
    fold_batch_norm(folded.eval().backbone)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        torch.testing.assert_close(folded.logits(images), torch.tensor(MODEL["eval_logits"]), atol=5e-6, rtol=0)


def test_the_head_stays_in_float32_under_autocast(network, images):
    given = []
    watch = network.maps.register_forward_hook(lambda module, inputs, maps: given.append(maps))
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            logits = network.eval().logits(images[:, :, :32, :32])
        watch.remove()
        (maps,) = given
        assert maps.dtype == torch.bfloat16 and logits.dtype == torch.float32
        expected = network.fc(F.normalize(network.bn(maps.float().mean((2, 3))), dim=1))
        torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)  # bf16 has no more than three digits


def learning_rates(lr_schedule, max_epochs):
    """The learning rate that the optimizer really has at the first step of each epoch of a Lightning fit."""
    seen = []

    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 4)

        def forward(self, images):
            return self.layer(images.float().mean((1, 2)))

    class Watched(LeafModule):
        def training_step(self, batch, batch_idx):
            if batch_idx == 0:
                seen.append(self.optimizers().param_groups[0]["lr"])
                assert self.optimizers().param_groups[0]["betas"] == (0.9, 0.999)
            return super().training_step(batch, batch_idx)

    batch = {"image": torch.zeros(2, 2, 2, 3, dtype=torch.uint8), "label": torch.eye(4)[:2], "row": torch.arange(2)}
    loader = DataLoader([batch] * 3, batch_size=None)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Watched(Tiny(), lr_schedule, 1e-3, 0), loader)
    return seen


def test_the_learning_rate_of_all_70_epochs_is_the_originals():
    expected = json.loads((REFERENCE / "lr_schedule.json").read_text())["learning_rate_by_epoch"]
    assert learning_rates("cosine", 70) == pytest.approx(expected, abs=5e-9)


def test_the_triangular_schedule_rises_five_epochs_and_falls_five():
    up = [1e-5, 2.08e-4, 4.06e-4, 6.04e-4, 8.02e-4, 1e-3]
    assert learning_rates("triangular", 21) == pytest.approx((up + up[-2:0:-1]) * 2 + [1e-5], abs=1e-9)


def test_all_five_folds_are_the_originals():
    expected = json.loads((REFERENCE / "folds.json").read_text())
    folds = split_folds(1821, seed=2020)
    for fold in range(5):
        assert np.flatnonzero(folds == fold).tolist() == expected[str(fold)]
