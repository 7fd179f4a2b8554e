"""What a prediction begins with: the networks as they were trained, and room for what is predicted so far."""

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from harness import devices
from harness.console import InputError, quiet_libraries, say
from harness.files import atomic_write, digest
from harness.record import adopt_run_options, digest_sources, note_differences, read_own_csv, read_results, record_path

TOLERANCE = 1e-3  # of probabilities in float32, from machine to machine
PIXEL_TOLERANCE = 0.5  # of 255, on average: versions of OpenCV differ less


def prepare_prediction(args, n_folds, classes):
    """Adopt the run's options, find and name the best checkpoint of each fold: DataFrame with fold and checkpoint.

    Sets devices (list of torch.device), precision, fingerprint, notes of args. Raises InputError if a fold is missing.
    """
    quiet_libraries()
    adopt_run_options(args)
    classes_then = getattr(args, "classes", list(classes))  # runs of before have not recorded them
    n_folds_then = read_own_csv(Path(args.log_dir) / "folds.csv", ("fold",))["fold"].max() + 1
    if (classes_then, n_folds_then) != (list(classes), n_folds):
        then = f"CLASSES = {tuple(classes_then)} and N_FOLDS = {n_folds_then}"
        raise InputError(f"{args.log_dir} was trained with {then}, utils.py has other ones")
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
    args.notes = note_differences(args.log_dir, args.folds)
    say(f"{args.backbone} on {len(indices)} x {kind}, precision {args.precision}; from {args.log_dir}:")
    print(checkpoints.filter(regex="^(?!last_)").to_string(index=False), flush=True)
    return checkpoints


def behave(network, fit, photos):
    """What a prediction depends on, by examples, which are kept with a fold's result: dict of arrays, float32 on the CPU.

    network: in evaluation mode; fit: the recipe's fit_photo; photos: uint8 (n, height, width, 3), as the network sees them.
    """
    waves = np.linspace(0, 20, 600)[:, None] * np.linspace(0, 20, 900)[None]  # of all lengths and directions
    drawn = (127 + 127 * np.sin(waves[..., None] + [0, 1, 2])).astype(np.uint8)
    fitted = [fit(np.ascontiguousarray(photo), photos.shape[1:3]) for photo in (drawn, drawn.transpose(1, 0, 2))]
    with torch.inference_mode():
        probabilities = network.probabilities(network(torch.from_numpy(photos)))
    return {"photos": photos, "probabilities": probabilities.numpy(), "fitted": np.stack(fitted)}


def check_networks(log_dir, networks, fit, accept=False):
    """Raise InputError if networks, dict of fold to network, predict otherwise than when trained; a note if accepted."""
    for fold, network in networks.items():
        path, edited = record_path(log_dir, fold).with_name("behaviour.npz"), None
        try:
            with np.load(path, allow_pickle=False) as kept:
                now = behave(network, fit, kept["photos"])
                if np.abs(now["fitted"].astype(int) - kept["fitted"]).mean() > PIXEL_TOLERANCE:
                    edited = "fit_photo was edited, photos look different"
                elif np.abs(now["probabilities"] - kept["probabilities"]).max() > TOLERANCE:
                    edited = "LeafNet was edited, it predicts something else"
        except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
            edited = f"edits cannot be told, {path} is missing or damaged ({error})"
        what = f"since fold {fold} of {log_dir} was trained, {edited}"
        if edited and not accept:
            raise InputError(f"{what}. Undo the edit or train anew elsewhere (or predict with --accept_changes)")
        if edited:
            say(f"note: predicting in spite of this: {what}")


def keep_predictions(args, name, images, keys, n_classes):
    """Room on disk for a prediction while it is computed: float32 (n, k), nan where it is not; None if there is no room."""
    options = (args.fingerprint, args.image_size, args.seed, args.precision, args.compile, args.val_batch_size)
    where = (len(args.devices), args.devices[0].type, devices.describe_environment())
    key = digest(repr((options, where, images.path.name, keys)))[:16]
    path = Path(args.log_dir) / "predictions" / f"{name}-{key}.npy"  # of what the same options, photos and files gave
    try:
        if not path.exists():
            with atomic_write(path) as file:
                np.save(file, np.full((len(keys), n_classes), np.nan, np.float32))
            for other in set(path.parent.glob(f"{name}-*.npy")) - {path}:
                other.unlink()
        return np.lib.format.open_memmap(path, "r+")
    except (InputError, OSError, ValueError) as error:  # a log directory that cannot be written is enough to predict
        say(f"note: {getattr(error, 'message', error)}; an interruption will lose what is predicted so far")
