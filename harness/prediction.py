"""Prediction: by the networks that were trained, fast, on any number of devices, resumable."""

import hashlib
import time
from importlib.metadata import version
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

from harness.backbones import load_checkpoint
from harness.console import InputError, quiet_libraries, say
from harness.devices import autocast, check_gpus, choose_device, choose_precision, compute_exactly, refuse_out_of_memory
from harness.files import atomic_write, sha256
from harness.record import adopt_run_options, digest_sources, note_differences, read_results, record_path, show_results

KEEP_EVERY = 60  # seconds: how much of a prediction is lost with an interruption
TOLERANCE = 1e-3  # of probabilities in float32, from machine to machine

# ---------------------------------------------------------------------------------------------- the networks


def prepare_prediction(args, n_folds):
    """What every prediction begins with: adopt the run's options, find and name the best checkpoint of each fold.

    Sets args.devices (list of torch.device), args.precision and args.fingerprint (a digest of the checkpoints and the
    source files); returns the checkpoints, DataFrame with fold and checkpoint. Raises InputError for a log directory
    that is not complete.
    """
    quiet_libraries()
    adopt_run_options(args)
    checkpoints = read_results(args.log_dir, args.folds)
    if (args.cpu_processes or 1) > 1:
        raise InputError("--cpu_processes is for training; prediction uses all cores anyway")
    kind, indices = choose_device(args.gpus, args.cpu_processes)
    if kind == "cuda":
        check_gpus(indices)
    args.precision = choose_precision(args.precision or "32", kind)  # as the original predicted
    compute_exactly(args.precision)
    args.devices = [torch.device(kind, index) for index in indices]
    files = [Path(args.log_dir) / name for name in checkpoints["checkpoint"]]
    args.fingerprint = [*map(sha256, files), *digest_sources("inference.py").values()]
    if len(checkpoints) < n_folds:
        say(f"note: by the networks of {len(checkpoints)} of {n_folds} folds only")
    note_differences(args.log_dir, args.folds)
    say(f"{args.backbone} on {len(indices)} x {kind}, precision {args.precision}; from {args.log_dir}:")
    show_results(checkpoints)
    return checkpoints


def load_network(path, network, compile=False):
    """Fill `network` from a checkpoint, for prediction: in evaluation mode, batch norm folded into the convolutions.

    compile: compile it with its weights frozen, when it sees its first batch.
    Raises InputError if the file cannot be read safely (weights_only) or holds another network.
    """
    state = load_checkpoint(path)["state_dict"]
    state = {name.removeprefix("network.").replace("_orig_mod.", ""): value for name, value in state.items()}
    try:
        network.load_state_dict(state)  # _orig_mod: of torch.compile(network)
    except RuntimeError as error:
        raise InputError(f"{path} holds another network than ours: {' '.join(str(error).split())[:300]}") from error
    network.eval()
    if isinstance(network.backbone, SENet):
        fold_batch_norm(network.backbone)
    if compile:
        network.compile(options={"freezing": True})
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


# ---------------------------------------------------------------------------------------------- edits since


def behave(network, fit, photos):
    """What a prediction depends on, by examples: dict of arrays, computed in float32 on the CPU.

    network: as of load_network; fit: the recipe's function that fits a photo to (height, width); photos: uint8 (n, h, w, 3).
    """
    waves = np.linspace(0, 20, 600)[:, None] * np.linspace(0, 20, 900)[None]  # of all lengths and directions
    drawn = (127 + 127 * np.sin(waves[..., None] + [0, 1, 2])).astype(np.uint8)
    fitted = [fit(np.ascontiguousarray(photo), photos.shape[1:3]) for photo in (drawn, drawn.transpose(1, 0, 2))]
    with torch.inference_mode():
        probabilities = network.probabilities(network(torch.from_numpy(photos)))
    return {"photos": photos, "probabilities": probabilities.numpy(), "fitted": np.stack(fitted)}


def keep_behaviour(log_dir, fold, network, fit, photos):
    """Keep beside a fold's result some photos as its network saw them, and what comes of them; arguments of `behave`."""
    with atomic_write(record_path(log_dir, fold).with_name("behaviour.npz")) as file:
        np.savez_compressed(file, **behave(network, fit, photos))


def find_edit(log_dir, fold, network, fit):
    """What predicts otherwise than when a fold was trained, as text, or None; arguments of `behave`."""
    path = record_path(log_dir, fold).with_name("behaviour.npz")
    try:
        with np.load(path, allow_pickle=False) as kept:
            now = behave(network, fit, kept["photos"])
            if (
                np.abs(now["fitted"].astype(int) - kept["fitted"]).mean() > 0.5
            ):  # of 255; versions of OpenCV differ less
                return f"fit_photo was edited since fold {fold} of {log_dir} was trained: photos look different"
            if np.abs(now["probabilities"] - kept["probabilities"]).max() > TOLERANCE:
                return f"LeafNet was edited since fold {fold} of {log_dir} was trained: it predicts something else"
    except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
        return f"{path} is missing or damaged ({error}), so that edits since the training cannot be told"
    return None


def check_networks(args, networks, fit):
    """Raise InputError if networks, dict of fold to network, predict otherwise than trained, or args.accept_changes."""
    for edit in filter(None, (find_edit(args.log_dir, fold, network, fit) for fold, network in networks.items())):
        if not args.accept_changes:
            raise InputError(f"{edit}. Undo the edit, train anew, or predict all the same with --accept_changes")
        say(f"note: predicting in spite of this: {edit}")


# ---------------------------------------------------------------------------------------------- predictions


def keep_predictions(args, name, images, keys, n_classes):
    """Room for a prediction that is kept while it is computed: float32 (n, k) on disk, nan where it is not yet computed.

    It belongs to these checkpoints, photos, source files and options: LOG_DIR/predictions/NAME-KEY.npy.
    """
    options = (args.fingerprint, args.image_size, args.seed, args.precision, args.val_batch_size, n_classes)
    devices = (len(args.devices), args.devices[0].type, torch.get_num_threads())
    versions = [cv2.__version__, *(version(package) for package in ("torch", "albumentations", "numpy"))]
    facts = repr((options, devices, versions, images.path.name, keys))
    path = Path(args.log_dir) / "predictions" / f"{name}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.npy"
    try:
        if not path.exists():
            with atomic_write(path) as file:
                np.save(file, np.full((len(keys), n_classes), np.nan, np.float32))
            for other in set(path.parent.glob(f"{name}-*.npy")) - {path}:
                other.unlink()
        return np.lib.format.open_memmap(path, "r+")
    except (InputError, OSError, ValueError) as error:  # a log directory that cannot be written is enough to predict
        say(f"note: {getattr(error, 'message', error)}; an interruption will lose what is predicted so far")
        return None


def predict(networks, dataset, keys, args, title, kept=None):
    """Softmax of each key (fold, draw, row) by the network of its fold: float32 (n, k). The one place that predicts.

    networks: dict of fold to a network of uint8 images (n, height, width, 3), in evaluation mode; kept: as of
    keep_predictions, for what takes long. A batch is of one fold; the folds take turns, so that a photo is read by all
    while it is in memory, and are spread over args.devices: nothing waits for a device before the end, so that several
    compute at once.
    """
    of_fold = [[i for i, key in enumerate(keys) if key[0] == fold] for fold in networks]
    starts = range(0, max(map(len, of_fold)), args.val_batch_size)
    batches = [rows[start : start + args.val_batch_size] for start in starts for rows in of_fold if rows[start:]]
    todo = [rows for rows in batches if kept is None or np.isnan(kept[rows]).any()]
    if not todo:
        say(f"{title}: predicted already")
    device_of = {fold: args.devices[i % len(args.devices)] for i, fold in enumerate(networks)}
    networks = {fold: network.to(device_of[fold]) for fold, network in networks.items()}
    sampler, pin = [[keys[i] for i in rows] for rows in todo], args.devices[0].type == "cuda"
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=args.num_workers, pin_memory=pin)
    bar = tqdm(loader, desc=title, unit="batch", mininterval=1, initial=len(batches) - len(todo), total=len(batches))
    values, parts, written = kept, [], time.monotonic()
    try:
        with torch.inference_mode(), autocast(args.devices[0].type, args.precision):
            for rows, batch in zip(todo, bar, strict=True):
                fold = keys[rows[0]][0]
                images = batch["image"].to(device_of[fold], non_blocking=True)
                parts.append((rows, networks[fold].probabilities(networks[fold](images))))
                if values is None:
                    values = np.full((len(keys), parts[0][1].shape[1]), np.nan, np.float32)
                if rows is todo[-1] or kept is not None and time.monotonic() > written + KEEP_EVERY:
                    for of_part, part in parts:
                        values[of_part] = part.cpu().numpy()
                    parts, written = [], time.monotonic()
    except (RuntimeError, MemoryError) as error:
        refuse_out_of_memory(error, f"type a smaller --val_batch_size than {args.val_batch_size}")
        raise
    if bad := sorted({keys[i][0] for i in np.flatnonzero(~np.isfinite(values).all(1))}):
        raise InputError(
            f"the network of fold {' '.join(map(str, bad))} predicts nan, so nothing is written: its training has "
            "diverged; train it anew with --fresh, perhaps with a smaller --learning_rate"
        )
    return np.array(values)
