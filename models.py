"""What learns: the network, the learning-rate schedules, and the Lightning module with the loss."""

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pretrainedmodels.models.senet import SENet
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, CyclicLR

from harness.backbones import compute_maps, load_checkpoint, make_backbone, own_config, sketch
from harness.console import InputError, refusing
from harness.devices import gather
from utils import CLASSES, derive_seed, mean_auc

# ---------------------------------------------------------------------------------------------- the network


class LeafNet(nn.Module):
    """Backbone → global average pool → batch norm with a frozen bias → L2 normalisation → linear to a logit for each class.

    Input: uint8 (n, height, width, 3), RGB; output: float32 logits (n, k). The head runs in float32 under autocast too:
    in bf16 many probabilities of a column coincide, and ties blur an AUC. backbone: a name of pretrainedmodels, or
    timm/NAME. Raises InputError for one that there is not, or whose features the head does not fit.
    """

    def __init__(self, backbone="se_resnext50_32x4d"):
        super().__init__()
        n_features = sketch(backbone)[1].shape[1]
        self.backbone = make_backbone(backbone)
        self.maps = nn.Identity()  # what the last convolutional stage gives, a place for the heat maps to hook in
        self.bn = nn.BatchNorm1d(n_features)
        self.bn.bias.requires_grad_(False)
        self.fc = nn.Linear(n_features, len(CLASSES))
        # not in the state dict: no weights, and checkpoints of before have no such entries
        config = own_config(self.backbone, backbone)
        self.register_buffer("mean", torch.tensor(config["mean"]) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]) * 255, persistent=False)

    def forward(self, images):
        return self.logits(self.normalise(images))

    def normalise(self, images):
        """As the pretrained weights expect it: uint8 (n, h, w, 3) → float32 (n, 3, h, w), channels last in memory."""
        return ((images.float() - self.mean) / self.std).permute(0, 3, 1, 2)

    def logits(self, normalised):
        """float (n, 3, height, width) → float32 (n, k)."""
        maps = self.maps(compute_maps(self.backbone, normalised))
        with torch.autocast(maps.device.type, enabled=False):
            pooled = self.bn(maps.float().mean((2, 3)))
            return self.fc(F.normalize(pooled, dim=1))

    def probabilities(self, logits):
        """What validation and prediction make of logits: float32 (n, k) → float32 (n, k)."""
        return logits.softmax(1)


def load_network(path, backbone):
    """The LeafNet of a checkpoint, for prediction: in evaluation mode, batch norm folded into the convolutions.

    Raises InputError if the file cannot be read safely (weights_only) or holds another network.
    """
    network, state = LeafNet(backbone), load_checkpoint(path)["state_dict"]
    # network: of LeafModule; _orig_mod: of torch.compile(network)
    names = {name: name.removeprefix("network.").replace("_orig_mod.", "") for name in state}
    with refusing(f"{path} holds another network than ours", RuntimeError):
        network.load_state_dict({names[name]: value for name, value in state.items()})
    network.eval()
    if isinstance(network.backbone, SENet):
        fold_batch_norm(network.backbone)
    return network.to(memory_format=torch.channels_last)


def fold_batch_norm(module):
    """Fold batch norm into the convolution before it, in place, in a network of the SENet family in evaluation mode.

    There every batch norm directly follows a convolution: bn1 after conv1, or the next module of a Sequential.
    """
    children = list(module.named_children())
    for (name, child), (next_name, following) in zip(children, children[1:], strict=False):
        if isinstance(child, nn.Conv2d) and isinstance(following, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(child, following))
            setattr(module, next_name, nn.Identity())
    for _, child in children:
        fold_batch_norm(child)


# ---------------------------------------------------------------------------------------------- learning

SCHEDULES = {  # the learning rate, stepped once in each of n epochs, from a highest to a hundredth of it, by its name
    # restarts every 10 epochs (SGDR, arXiv 1608.03983), as the original's code had it
    "cosine": lambda optimizer, highest, n: CosineAnnealingWarmRestarts(optimizer, T_0=10, eta_min=highest / 100),
    # five epochs up and five down (arXiv 1506.01186), as its write-up draws it
    "triangular": lambda optimizer, highest, n: CyclicLR(
        optimizer, highest / 100, highest, step_size_up=5, step_size_down=5, cycle_momentum=False
    ),
}


class LeafModule(pl.LightningModule):
    """One fold's training. Batches hold uint8 images (n, h, w, 3), labels (n, k), rows (n,).

    Every metric that it logs, but "loss" and "lr", which are for the progress bar, is kept for each epoch in metrics/;
    those of the best epoch that begin with "val_" are in results.csv too. Raises InputError for an unknown schedule.
    """

    def __init__(self, network, lr_schedule, learning_rate, seed):
        super().__init__()
        if lr_schedule not in SCHEDULES:
            raise InputError(f"--lr_schedule {lr_schedule}: models.py has {', '.join(SCHEDULES)}")
        self.network = network.to(memory_format=torch.channels_last)
        self.lr_schedule, self.learning_rate, self.seed = lr_schedule, learning_rate, seed
        self.validated, self.last_validation = [], None

    def loss(self, logits, labels, reduction="mean"):
        """Cross entropy against a probability vector: logits and labels (n, k) → a number, or (n,) for "none"."""
        return F.cross_entropy(logits, labels, reduction=reduction)

    def configure_optimizers(self):
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate, fused=True)
        schedule = SCHEDULES[self.lr_schedule](optimizer, self.learning_rate, self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    # Lightning's own clipping refuses a fused optimizer, for a loss scaler's sake; harness/run.py takes care of that.
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        by_value = gradient_clip_algorithm == "value"
        clip = torch.nn.utils.clip_grad_value_ if by_value else torch.nn.utils.clip_grad_norm_
        if gradient_clip_val:
            clip(self.parameters(), gradient_clip_val)

    def on_train_epoch_start(self):
        # for dropout, where a backbone has it: the same whether or not the fold was interrupted before
        torch.manual_seed(derive_seed(self.seed, self.current_epoch, self.global_rank))

    def training_step(self, batch, batch_idx):
        loss = self.loss(self.network(batch["image"]), batch["label"])
        self.log("loss", loss, prog_bar=True)
        self.log("lr", self.optimizers().param_groups[0]["lr"], prog_bar=True)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch["label"]), sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        logits = self.network(batch["image"])
        losses = self.loss(logits, batch["label"], reduction="none")
        self.validated.append((batch["row"], self.network.probabilities(logits), losses, batch["label"]))

    def on_validation_epoch_end(self):
        # all images of all devices, in the order of their rows, or the sums would depend on the number of devices
        rows, probabilities, losses, labels = gather(self.validated)
        self.validated, self.last_validation = [], (rows, probabilities)
        self.log("val_loss", float(losses.mean(dtype=np.float64)), prog_bar=True)
        self.log("val_roc_auc", mean_auc(labels, probabilities), prog_bar=True)

    def on_save_checkpoint(self, checkpoint):
        if self.last_validation is not None:  # out_of_fold.csv is made of these when the fold is finished
            rows, probabilities = map(torch.from_numpy, self.last_validation)
            checkpoint["validation"] = {"row": rows, "probabilities": probabilities}
