"""Prediction: fast, in any number of folds and devices, and resumable."""

import hashlib
import time
from importlib.metadata import version
from itertools import groupby
from math import prod
from pathlib import Path
from zipfile import BadZipFile

import cv2
import numpy as np
import torch
from pretrainedmodels.models.senet import SENet
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader
from tqdm import tqdm

from harness.console import InputError, how_to_go_on, quiet_libraries, say, stop_cleanly
from harness.devices import (
    autocast,
    check_shared_memory,
    choose_device,
    choose_precision,
    compute_exactly,
    out_of_memory,
)
from harness.files import atomic_write, sha256, why_not_writable
from harness.log_dir import adopt_run_options, check_definitions, read_results, show_results
from harness.sources import digest, digest_definitions, prediction_sources
from harness.weights import load_checkpoint

# Pixels in one call of predict from which compiling (10 to 25 s on two cores) saves several times what it costs.
COMPILE_FROM = 200e6
KEEP_EVERY = 60  # seconds: how much of a prediction is lost with a machine


def prepare_prediction(args, n_folds, predicts_with):
    """What every prediction begins with: adopt the run's options, find and name the best checkpoint of each fold.

    Sets args.devices (list of torch.device), args.precision and args.fingerprint (a digest of the checkpoints and the
    source files); returns the checkpoints, DataFrame with fold and checkpoint. Raises InputError for a log directory
    that is not complete, or if one of the functions and classes `predicts_with` was edited since the training.
    """
    quiet_libraries()
    adopt_run_options(args)
    check_definitions(args, digest_definitions(predicts_with))
    checkpoints = read_results(args.log_dir, args.folds)
    if (args.cpu_processes or 1) > 1:
        raise InputError("--cpu_processes is for training; prediction uses all cores anyway")
    kind, indices = choose_device(args.gpus, args.cpu_processes)
    args.precision = choose_precision(args.precision or "32", kind)  # as the original predicted
    compute_exactly(args.precision)
    args.devices = [torch.device(kind, index) for index in indices]
    files = [Path(args.log_dir) / name for name in checkpoints["checkpoint"]]
    sources = map(digest, prediction_sources().values())
    args.fingerprint = " ".join([*map(sha256, files), *sources])
    if len(checkpoints) < n_folds:
        say(f"note: by the networks of {len(checkpoints)} of {n_folds} folds only")
    say(f"{args.backbone} on {len(indices)} x {kind}, precision {args.precision}; from {args.log_dir}:")
    show_results(checkpoints)
    return checkpoints


def stopping_cleanly(args):
    """Within the block Ctrl-C and SIGTERM end the process with a line that says what is kept."""

    def kept():
        if vars(args).get("predictions_are_kept", True):
            return f"what is predicted is kept in {args.log_dir}; {how_to_go_on()}"
        return f"nothing is kept, as nothing can be written in {args.log_dir}"

    return stop_cleanly(kept)


def load_network(path, network):
    """Fill `network` from a checkpoint, for prediction: in evaluation mode, batch norm folded into the convolutions.

    Raises InputError if the file cannot be read safely (weights_only) or holds another network.
    """
    state = load_checkpoint(path)["state_dict"]
    try:
        network.load_state_dict({name.removeprefix("network."): value for name, value in state.items()})
    except RuntimeError as error:
        raise InputError(f"{path} holds another network than ours: {' '.join(str(error).split())[:300]}") from error
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


def compile_network(network, example):
    """The network compiled with its weights frozen, for batches of the shape of `example`; itself if that fails.

    Only the first network of an architecture costs time. What fails is said: mostly there is no C++ compiler.
    """
    compiled = torch.compile(network, dynamic=False, options={"freezing": True})
    try:
        compiled(example)
    except torch._dynamo.exc.TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = next((line for line in lines if line and not line.endswith("raised:")), type(error).__name__)
        say(f"note: predicting without torch.compile, more slowly, as it fails here: {reason}")
        return network
    return compiled


class KeptPredictions:
    """What a prediction has computed so far, in LOG_DIR/predictions/: an interrupted one goes on from there.

    It belongs to these checkpoints, photos, source files and options; what others have left is not used. Where nothing
    can be written, nothing is kept: args.predictions_are_kept says so.
    """

    def __init__(self, args, name, images, keys):
        folds = "".join(map(str, sorted({fold for fold, _, _ in keys})))
        self.path = Path(args.log_dir) / "predictions" / f"{name}-folds={folds}.npz"
        options = (args.fingerprint, args.image_size, args.seed, args.precision, args.val_batch_size)
        devices = (len(args.devices), args.devices[0].type, torch.get_num_threads())
        versions = [cv2.__version__, *(version(name) for name in ("torch", "albumentations", "numpy"))]
        facts = repr((options, devices, versions, images.path.name, keys))
        self.facts, self.identity = facts, np.array(hashlib.sha256(facts.encode()).hexdigest())
        self.args = args
        self._say_if_lost(why_not_writable(self.path.parent))

    def read(self):
        """The softmax of the first keys, float32 (m, k), m whole batches, or None if nothing was kept."""
        try:
            with np.load(self.path, allow_pickle=False) as kept:
                if kept["identity"] == self.identity:
                    return kept["probabilities"]
        except FileNotFoundError:
            pass
        except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
            say(f"note: {self.path} is damaged ({error}); it is made anew")
        return None

    def write(self, probabilities):
        if not self.args.predictions_are_kept:
            return
        try:
            with atomic_write(self.path) as file:
                np.savez(file, identity=self.identity, facts=self.facts, probabilities=probabilities)
        except InputError as error:  # what is predicted is not lost with it: the step goes on and writes its own file
            self._say_if_lost(str(error).removeprefix("error: "))

    def _say_if_lost(self, problem):
        self.args.predictions_are_kept = problem is None
        if problem:
            say(f"note: {problem}; an interruption will lose what is predicted so far")


def predict(networks, dataset, keys, args, title, kept=None):
    """Softmax of each key (fold, draw, row) by the network of its fold: float32 (n, k). The one place that predicts.

    networks: dict of fold to a network of uint8 images (n, height, width, 3), in evaluation mode; kept: KeptPredictions,
    for what takes long. All folds read through one loader: a batch is of one fold, and neighbouring keys of one photo
    read it while it is in memory. The folds are spread over args.devices; nothing waits for a device before the end, so
    that several of them compute at once. On a CPU, jobs of COMPILE_FROM pixels and more run compiled, but for batches
    that are not full, which would be compiled once more.
    """
    batches = []
    for _, run in groupby(keys, key=lambda key: key[0]):
        run = list(run)
        batches += [run[start : start + args.val_batch_size] for start in range(0, len(run), args.val_batch_size)]
    full, before = max(map(len, batches)), kept.read() if kept else None
    device_of = {fold: args.devices[i % len(args.devices)] for i, fold in enumerate(networks)}
    networks = {fold: network.to(device_of[fold]) for fold, network in networks.items()}
    n_kept = 0 if before is None else len(before)
    n_done = np.searchsorted(np.cumsum([len(batch) for batch in batches]), n_kept, side="right")
    if n_done == len(batches):
        say(f"{title}: taken from {kept.path}")
        return refuse_nan(before, keys)
    check_shared_memory(args.image_size, args.val_batch_size, len(batches) - n_done, args.num_workers)
    pin = args.devices[0].type == "cuda"
    loader = DataLoader(dataset, batch_sampler=batches[n_done:], num_workers=args.num_workers, pin_memory=pin)
    compiling = args.devices[0].type == "cpu" and len(keys) * prod(args.image_size) >= COMPILE_FROM
    if compiling:
        say(f"{len(keys)} images to predict: by torch.compile")
    compiled, parts, written = {}, [], time.monotonic()

    def so_far():
        return np.concatenate([*([] if before is None else [before]), *(part.cpu().numpy() for part in parts)])

    bar = tqdm(loader, desc=title, unit="batch", mininterval=1, initial=n_done, total=len(batches))
    try:
        with torch.inference_mode(), autocast(args.devices[0].type, args.precision):
            for batch in bar:
                fold = int(batch["fold"][0])
                images = batch["image"].to(device_of[fold], non_blocking=True)
                if compiling and len(images) == full and fold not in compiled:
                    compiled[fold] = compile_network(networks[fold], images)
                    compiling = compiled[fold] is not networks[fold]
                network = compiled.get(fold, networks[fold]) if len(images) == full else networks[fold]
                parts.append(network(images).float().softmax(1))
                if kept and time.monotonic() > written + KEEP_EVERY:
                    kept.write(so_far())
                    written = time.monotonic()
        probabilities = so_far()
    except (RuntimeError, MemoryError) as error:
        which = out_of_memory(error)
        if which is None:
            raise
        smaller = f"type a smaller --val_batch_size than {args.val_batch_size}"
        what_else = (
            smaller if args.val_batch_size > 1 else "nothing but more memory, or a training on smaller photos, helps"
        )
        reason = str(error).splitlines()[0] if str(error) else "MemoryError"
        raise InputError(f"{which} is too small ({reason}); {what_else}") from error
    finally:  # also if it is interrupted
        if kept and parts:
            kept.write(so_far())
    return refuse_nan(probabilities, keys)


def refuse_nan(probabilities, keys):
    """The probabilities, (n, k), of the keys. Raises InputError, naming the folds, if some are not finite."""
    bad = ~np.isfinite(probabilities).all(axis=1)
    if bad.any():
        folds = sorted({fold for (fold, _, _), is_bad in zip(keys, bad, strict=True) if is_bad})
        raise InputError(
            f"the network of fold {' '.join(map(str, folds))} predicts nan, so nothing is written: its training has "
            "diverged; train it anew with --fresh, perhaps with a smaller --learning_rate"
        )
    return probabilities
