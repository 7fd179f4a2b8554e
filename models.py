"""What learns: the network, its ImageNet weights, the Lightning module, and the one function that predicts."""

import hashlib
import os
import re
import socket
import time
from functools import cache
from importlib.metadata import version
from itertools import groupby
from math import prod
from pathlib import Path
from urllib.parse import urlparse
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import pretrainedmodels
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pretrainedmodels.models.senet import SENet
from pretrainedmodels.models.torchvision_models import update_state_dict as rename_densenet
from torch import distributed, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset import (
    LeafDataset,
    cache_images,
    normalise,
    train_augmentation,
)
from utils import CLASSES, TTA_DRAWS, InputError, atomic_write, derive_seed, make_folder, mean_auc, say, sha256

# The file's old home is in pretrainedmodels' settings; its certificate lapsed in 2022 and the host is often down.
MIRRORS = {
    "se_resnext50_32x4d": (
        "https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-weights/legacy_se_resnext50_32x4d-f3651bad.pth",
    )
}
DOWNLOAD_TIMEOUT = 30  # seconds without an answer until the next source is tried
# Pixels in one call of predict from which compiling (10 to 25 s on two cores) saves several times what it costs.
COMPILE_FROM = 200e6
KEEP_EVERY = 60  # seconds: how much of a prediction is lost with a machine

# ---------------------------------------------------------------------------------------------- the network


@cache
def count_feature_maps(backbone):
    """How many maps a backbone of pretrainedmodels ends in, found without computing (on torch's meta device).

    Raises InputError for a name that pretrainedmodels does not have, and for features that our head does not fit.
    """
    if backbone not in pretrainedmodels.model_names:
        raise InputError(
            f"--backbone {backbone}: pretrainedmodels has {', '.join(sorted(pretrainedmodels.model_names))}"
        )
    own_size = next(iter(pretrainedmodels.pretrained_settings[backbone].values()))["input_size"]
    with torch.device("meta"):
        network = pretrainedmodels.__dict__[backbone](num_classes=1000, pretrained=None)
        classifier = getattr(network, "last_linear", None)
        expected = getattr(classifier, "in_features", None) or getattr(classifier, "in_channels", None)
        try:
            shape = network.eval().features(torch.zeros(1, *own_size)).shape
        except (AttributeError, RuntimeError):  # no features(), or one that ends in layers of a fixed size
            shape = ()
    if len(shape) != 4 or shape[1] != expected:
        raise InputError(f"--backbone {backbone}: its features do not fit this head, which pools one map per channel")
    return expected


class LeafNet(nn.Module):
    """Backbone → global average pool → batch norm with a frozen bias → L2 normalisation → linear to four logits.

    Input: float (n, 3, height, width), normalised; output: float32 logits (n, 4). The head runs in float32 under
    autocast too: in bf16 many probabilities of a column coincide, and ties blur an AUC. Raises InputError for a
    backbone that pretrainedmodels does not have or whose features the head does not fit.
    """

    def __init__(self, backbone="se_resnext50_32x4d"):
        super().__init__()
        n_features = count_feature_maps(backbone)
        self.backbone = pretrainedmodels.__dict__[backbone](num_classes=1000, pretrained=None)
        self.backbone.aux_logits = False  # only Inception v3 has it: a second classifier, which we leave out
        for unused in ("last_linear", "avg_pool", "avgpool", "dropout", "AuxLogits"):
            if isinstance(getattr(self.backbone, unused, None), nn.Module):
                delattr(self.backbone, unused)
        self.maps = nn.Identity()  # what the last convolutional stage gives, a place for the heat maps to hook in
        self.bn = nn.BatchNorm1d(n_features)
        self.bn.bias.requires_grad_(False)
        self.fc = nn.Linear(n_features, len(CLASSES))

    def forward(self, images):
        maps = self.maps(self.backbone.features(images))
        with torch.autocast(images.device.type, enabled=False):
            pooled = self.bn(maps.float().mean((2, 3)))
            return self.fc(F.normalize(pooled, dim=1))


# ---------------------------------------------------------------------------------------------- ImageNet weights


def weight_sources(backbone):
    """URLs of a backbone's ImageNet weights, in the order in which they are tried."""
    settings = pretrainedmodels.pretrained_settings.get(backbone, {})
    if "imagenet" not in settings:
        raise InputError(
            f"--backbone {backbone} has no ImageNet weights; give a file with --weights FILE, or type --weights none"
        )
    return [settings["imagenet"]["url"], *MIRRORS.get(backbone, ())]


def check_hash(path):
    """Raise InputError if the file's name carries the start of its SHA-256 (name-0123abcd.pth) and that is another."""
    claimed = re.search(r"-([0-9a-f]{8,})\.pth$", Path(path).name)
    if claimed and not sha256(path).startswith(claimed.group(1)):
        raise InputError(
            f"{path} is damaged: its SHA-256 does not begin with {claimed.group(1)}; delete it and try again"
        )


def find_weights(weights, backbone):
    """The file that a training starts from: a Path, or None for `weights` "none" (from scratch, only when asked).

    In this order: a file given by hand; torch hub's cache; the sources of `weight_sources`, downloaded into that cache
    and checked against the hash in their name. Raises InputError if there is none.
    """
    if weights == "none":
        return None
    if weights != "imagenet":
        if not Path(weights).is_file():
            raise InputError(f"--weights {weights}: no such file (or type imagenet, or none to train from scratch)")
        check_hash(weights)
        return Path(weights)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    urls = weight_sources(backbone)
    paths = [folder / Path(urlparse(url).path).name for url in urls]
    for path in paths:
        if path.is_file():
            check_hash(path)
            return path
    make_folder(folder)
    failures = []
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        for url, path in zip(urls, paths, strict=True):
            say(f"download {url}")
            try:
                torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[1], progress=True)
                return path
            except (OSError, RuntimeError) as error:  # unreachable, or RuntimeError: not the promised hash
                failures.append(f"{url}: {error}")
                say(f"  failed: {error}")
    finally:
        socket.setdefaulttimeout(timeout)
    raise InputError(
        f"no ImageNet weights for {backbone} ({'; '.join(failures)}). Put one of {', '.join(p.name for p in paths)} into {folder}, "
        "or name it with --weights FILE; --weights none trains from scratch, far less accurately"
    )


def load_backbone_weights(network, path):
    """Load a state dict of the backbone as pretrainedmodels names it; its classifier, if any, is left out.

    Raises InputError if the file cannot be read safely or does not hold this backbone.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path} cannot be loaded as weights: {str(error).splitlines()[0]}") from error
    try:
        state = rename_densenet(dict(state))  # its file has names of an older torchvision
        classifiers = ("last_linear.", "fc.", "classifier.", "AuxLogits.")
        state = {name: value for name, value in state.items() if not name.startswith(classifiers)}
        network.backbone.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} does not hold this backbone: {' '.join(str(error).split())[:300]}") from error


# ---------------------------------------------------------------------------------------------- learning


def make_schedule(optimizer, name):
    """The learning rate, stepped once an epoch: restarts every 10 epochs (SGDR, arXiv 1608.03983) or triangles (1506.01186)."""
    if name == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=10, eta_min=1e-5)
    return torch.optim.lr_scheduler.CyclicLR(
        optimizer, base_lr=1e-5, max_lr=1e-3, step_size_up=5, step_size_down=5, cycle_momentum=False
    )


class LossNotFinite(Exception):
    """The loss of a batch is nan or infinite; `rows`: int (n,), the batch's rows of the data set."""

    def __init__(self, loss, rows):
        super().__init__(f"the loss is {loss}")
        self.rows = rows


class LeafModule(pl.LightningModule):
    """One fold's training. Batches hold uint8 images (n, h, w, 3), labels (n, 4) that sum to 1, rows (n,).

    Raises LossNotFinite, at the step after the one whose loss is nan or infinite: a GPU need not wait for the answer.
    """

    def __init__(self, network, lr_schedule="cosine", seed=0):
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        self.lr_schedule, self.seed = lr_schedule, seed
        self.validated, self.last_loss = [], None

    def configure_optimizers(self):
        # Fused is faster on the CPU; on GPUs it would bar gradient clipping under fp16's loss scaling.
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=self.device.type == "cpu")
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": make_schedule(optimizer, self.lr_schedule), "interval": "epoch"},
        }

    # Lightning's own clipping refuses a fused optimizer under bf16, for the sake of a loss scaler that is not there.
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        if gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def on_train_epoch_start(self):
        # for dropout, where a backbone has it: the same whether or not the fold was interrupted before
        torch.manual_seed(derive_seed(self.seed, self.current_epoch, self.global_rank))

    def check_last_loss(self):
        if self.last_loss is not None and not torch.isfinite(self.last_loss[0]):
            raise LossNotFinite(self.last_loss[0].item(), self.last_loss[1]["row"].cpu().numpy())

    def on_validation_epoch_start(self):
        self.check_last_loss()
        self.last_loss = None

    def training_step(self, batch, batch_idx):
        self.check_last_loss()
        loss = F.cross_entropy(self.network(normalise(batch["image"])), batch["label"])
        self.last_loss = loss.detach(), batch
        self.log("loss", loss, prog_bar=True)
        self.log("lr", self.optimizers().param_groups[0]["lr"], prog_bar=True)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch["label"]), sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        logits = self.network(normalise(batch["image"]))
        losses = F.cross_entropy(logits, batch["label"], reduction="none")
        self.validated.append((batch["row"].cpu(), logits.softmax(1).cpu(), losses.cpu(), batch["label"].cpu()))

    def on_validation_epoch_end(self):
        gathered = [self.validated]
        if self.trainer.world_size > 1:
            gathered = [None] * self.trainer.world_size
            distributed.all_gather_object(gathered, self.validated)
        parts = [batch for of_rank in gathered for batch in of_rank]
        rows, probabilities, losses, labels = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
        order = rows.argsort()  # or the sums would depend on the number of devices
        probabilities, losses, labels = probabilities[order], losses[order], labels[order]
        self.validated = []
        self.log("val_loss", float(losses.mean(dtype=np.float64)), prog_bar=True)
        self.log("val_roc_auc", mean_auc(labels, probabilities), prog_bar=True)


# ---------------------------------------------------------------------------------------------- prediction


def load_checkpoint(path):
    """A checkpoint that train.py wrote, dict. Raises InputError if it is damaged or would run code (weights_only)."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["state_dict"]
    except Exception as error:
        raise InputError(
            f"{path} cannot be loaded as a checkpoint ({str(error).splitlines()[0]}): train its fold anew with --fresh"
        ) from error
    return checkpoint


def load_network(path, backbone):
    """The network of a checkpoint, for prediction: in evaluation mode, batch norm folded into the convolutions.

    Raises InputError if the file cannot be read safely (weights_only) or holds another network.
    """
    state = load_checkpoint(path)["state_dict"]
    network = LeafNet(backbone)
    try:
        network.load_state_dict({name.removeprefix("network."): value for name, value in state.items()})
    except RuntimeError as error:
        raise InputError(f"{path} holds no {backbone} with our head: {' '.join(str(error).split())[:300]}") from error
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


def load_networks(args, checkpoints):
    """The networks of a log directory, dict of fold to LeafNet. checkpoints: DataFrame with fold and checkpoint."""
    pairs = zip(checkpoints["fold"], checkpoints["checkpoint"], strict=True)
    return {fold: load_network(Path(args.log_dir) / name, args.backbone) for fold, name in pairs}


def autocast(device, precision):
    """The autocast context of a precision, "16", "bf16" or "32" (which is none), on a device type."""
    dtype = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32}[precision]
    return torch.autocast(device, dtype, enabled=precision != "32")


def compile_network(network, example):
    """The network compiled with its weights frozen, for batches of the shape of `example`; itself if that fails.

    Only the first network of an architecture costs time. What fails is said: mostly there is no C++ compiler.
    """
    compiled = torch.compile(network, dynamic=False, options={"freezing": True})
    try:
        compiled(example)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = next(line for line in str(error).splitlines() if line.strip())
        say(f"note: predicting without torch.compile, more slowly, as it fails here: {reason}")
        return network
    return compiled


class KeptPredictions:
    """What a prediction has computed so far, in LOG_DIR/predictions/: an interrupted one goes on from there.

    Belongs to the very checkpoints, photos, source files and options; of others nothing is taken over.
    """

    def __init__(self, args, name, images, keys):
        folds = "".join(map(str, sorted({fold for fold, _, _ in keys})))
        self.path = Path(args.log_dir) / "predictions" / f"{name}-folds={folds}.npz"
        options = (args.fingerprint, args.image_size, args.seed, args.precision, args.val_batch_size)
        devices = (len(args.devices), args.devices[0].type, torch.get_num_threads())
        versions = [version(name) for name in ("torch", "albumentations", "opencv-python-headless", "numpy")]
        facts = repr((options, devices, versions, images.path.name, keys))
        self.identity = np.array(hashlib.sha256(facts.encode()).hexdigest())

    def read(self):
        """The softmax of the first keys, float32 (m, 4), m whole batches; m is 0 if nothing was kept."""
        try:
            with np.load(self.path, allow_pickle=False) as kept:
                if kept["identity"] == self.identity:
                    return kept["probabilities"]
        except FileNotFoundError:
            pass
        except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
            say(f"note: {self.path} is damaged ({error}); it is made anew")
        return np.empty((0, len(CLASSES)), np.float32)

    def write(self, probabilities):
        with atomic_write(self.path) as file:
            np.savez(file, identity=self.identity, probabilities=probabilities)


def predict(networks, dataset, keys, args, title, kept=None):
    """Softmax of each key (fold, draw, row) by the network of its fold: float32 (n, 4). The one place that predicts.

    networks: dict of fold to LeafNet; kept: KeptPredictions, for what is long. All folds read through one loader: a
    batch is of one fold, and neighbouring keys of one photo read it while it is in memory. The folds are spread over
    args.devices; nothing waits for a device before the end, so that several of them compute at once. On a CPU, jobs of
    COMPILE_FROM pixels and more run compiled, but for batches that are not full, which would be compiled once more.
    """
    batches = []
    for _, run in groupby(keys, key=lambda key: key[0]):
        run = list(run)
        batches += [run[start : start + args.val_batch_size] for start in range(0, len(run), args.val_batch_size)]
    full, before = max(map(len, batches)), kept.read() if kept else np.empty((0, len(CLASSES)), np.float32)
    device_of = {fold: args.devices[i % len(args.devices)] for i, fold in enumerate(networks)}
    networks = {fold: network.to(device_of[fold]) for fold, network in networks.items()}
    n_done = np.searchsorted(np.cumsum([len(batch) for batch in batches]), len(before), side="right")
    if n_done == len(batches):
        say(f"{title}: taken from {kept.path}")
        return before
    pin = args.devices[0].type == "cuda"
    loader = DataLoader(dataset, batch_sampler=batches[n_done:], num_workers=args.num_workers, pin_memory=pin)
    compiling = args.devices[0].type == "cpu" and len(keys) * prod(args.image_size) >= COMPILE_FROM
    if compiling:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(args.cache_dir).absolute() / "torch.compile"))
        say(f"{len(keys)} images to predict: by torch.compile")
    compiled, parts, written = {}, [], time.monotonic()

    def so_far():
        return np.concatenate([before, *(part.cpu().numpy() for part in parts)])

    bar = tqdm(loader, desc=title, unit="batch", mininterval=1, initial=n_done, total=len(batches))
    try:
        with torch.inference_mode(), autocast(args.devices[0].type, args.precision):
            for batch in bar:
                fold = int(batch["fold"][0])
                images = normalise(batch["image"].to(device_of[fold], non_blocking=True))
                if compiling and len(images) == full and fold not in compiled:
                    compiled[fold] = compile_network(networks[fold], images)
                    compiling = compiled[fold] is not networks[fold]
                network = compiled.get(fold, networks[fold]) if len(images) == full else networks[fold]
                parts.append(network(images).float().softmax(1))
                if kept and time.monotonic() > written + KEEP_EVERY:
                    kept.write(so_far())
                    written = time.monotonic()
    finally:  # also if it is interrupted
        if kept and parts:
            kept.write(so_far())
    return so_far()


def predict_test(args, networks, image_ids, images):
    """Test predictions with TTA: each fold's network sees every test photo 8 times under the training augmentation.

    networks: dict of fold to LeafNet; image_ids, images: as of read_test. Returns a DataFrame with image_id and the
    mean softmax of all draws and folds, in the row order of sample_submission.csv.
    """
    dataset = LeafDataset(images, image_ids, augmentation=train_augmentation(), seed=args.seed)
    # as many photos as fill a batch; all networks see them before the next ones are read
    at_once = max(1, args.val_batch_size // TTA_DRAWS)
    keys = [
        (fold, draw, row)
        for start in range(0, len(image_ids), at_once)
        for fold in networks
        for row in range(start, min(start + at_once, len(image_ids)))
        for draw in range(TTA_DRAWS)
    ]
    kept = KeptPredictions(args, "test", images, keys)
    probabilities = predict(networks, dataset, keys, args, f"test photos x {TTA_DRAWS} x {len(networks)}", kept)
    mean = np.zeros((len(image_ids), len(CLASSES)))
    np.add.at(mean, [row for _, _, row in keys], probabilities)
    mean /= len(networks) * TTA_DRAWS
    return pd.DataFrame(mean, columns=list(CLASSES)).assign(image_id=image_ids)[["image_id", *CLASSES]]


def predict_out_of_fold(args, train, folds, networks):
    """Softmax of every training photo by the network that has not seen it, without augmentation.

    train: DataFrame of train.csv; folds: int (n,), the fold of each row; networks: dict of fold to LeafNet.
    Returns a DataFrame with image_id and four columns, the rows of those folds in the order of train.csv.
    """
    images = cache_images("train", train["image_id"], args.data_dir, args.image_size, args.cache_dir)
    keys = [(fold, 0, int(row)) for fold in networks for row in np.flatnonzero(folds == fold)]
    dataset = LeafDataset(images, train["image_id"])
    kept = KeptPredictions(args, "out-of-fold", images, keys)
    probabilities = predict(networks, dataset, keys, args, "out-of-fold", kept)
    soft_labels = pd.DataFrame(
        probabilities.astype(np.float64), columns=list(CLASSES), index=[row for _, _, row in keys]
    )
    return soft_labels.sort_index().join(train["image_id"])[["image_id", *CLASSES]]
