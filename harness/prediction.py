"""What a prediction begins with: the networks as they were trained, and room for what is predicted so far."""

from importlib.metadata import version
from pathlib import Path
from zipfile import BadZipFile

import cv2
import numpy as np
import torch

from harness import devices
from harness.console import InputError, quiet_libraries, say
from harness.files import atomic_write, digest
from harness.record import adopt_run_options, digest_sources, note_differences, read_results, record_path, show_results

TOLERANCE = 1e-3  # of probabilities in float32, from machine to machine


def prepare_prediction(args, n_folds):
    """Adopt the run's options, find and name the best checkpoint of each fold: DataFrame with fold and checkpoint.

    Sets args.devices (list of torch.device), args.precision and args.fingerprint (digests of the checkpoints and the
    source files). Raises InputError for a log directory that is not complete.
    """
    quiet_libraries()
    adopt_run_options(args)
    checkpoints = read_results(args.log_dir, args.folds)
    kind, indices = devices.choose_device(args.gpus, args.cpu_processes)
    if kind == "cuda":
        devices.check_gpus(indices)
    elif len(indices) > 1:
        raise InputError("--cpu_processes is for training; prediction uses all cores anyway")
    args.precision = devices.choose_precision(args.precision or "32", kind)  # as the original predicted
    devices.compute_exactly(args.precision)
    args.devices = [torch.device(kind, index) for index in indices]
    files = [Path(args.log_dir) / name for name in checkpoints["checkpoint"]]
    args.fingerprint = [*map(digest, files), *digest_sources("inference.py").values()]
    if len(checkpoints) < n_folds:
        say(f"note: by the networks of {len(checkpoints)} of {n_folds} folds only")
    note_differences(args.log_dir, args.folds)
    say(f"{args.backbone} on {len(indices)} x {kind}, precision {args.precision}; from {args.log_dir}:")
    show_results(checkpoints)
    return checkpoints


def behave(network, fit, photos):
    """What a prediction depends on, by examples: dict of arrays, computed in float32 on the CPU.

    network: LeafNet in evaluation mode; fit: the recipe's function that fits a photo to (height, width); photos: uint8
    (n, height, width, 3), as the network sees them.
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


def check_networks(args, networks, fit):
    """Raise InputError if networks, dict of fold to network, predict otherwise than trained, or args.accept_changes."""
    for edit in filter(None, (find_edit(args.log_dir, fold, network, fit) for fold, network in networks.items())):
        if not args.accept_changes:
            raise InputError(f"{edit}. Undo the edit, train anew, or predict all the same with --accept_changes")
        say(f"note: predicting in spite of this: {edit}")


def keep_predictions(args, name, images, keys, n_classes):
    """Room for a prediction that is kept while it is computed: float32 (n, k) on disk, nan where it is not yet computed.

    It belongs to these checkpoints, photos, source files and options: LOG_DIR/predictions/NAME-KEY.npy. None, with a
    note, if it cannot be written.
    """
    options = (args.fingerprint, args.image_size, args.seed, args.precision, args.val_batch_size, n_classes)
    machine = (len(args.devices), args.devices[0].type, torch.get_num_threads(), cv2.__version__)
    versions = [version(package) for package in ("torch", "albumentations", "numpy")]
    key = digest(repr((options, machine, versions, images.path.name, keys)))[:16]
    path = Path(args.log_dir) / "predictions" / f"{name}-{key}.npy"
    try:
        if not path.exists():
            with atomic_write(path) as file:
                np.save(file, np.full((len(keys), n_classes), np.nan, np.float32))
            for other in set(path.parent.glob(f"{name}-*.npy")) - {path}:
                other.unlink()
        return np.lib.format.open_memmap(path, "r+")
    except (InputError, OSError, ValueError) as error:  # a log directory that cannot be written is enough to predict
        say(f"note: {getattr(error, 'message', error)}; an interruption will lose what is predicted so far")
