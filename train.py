"""Steps 1 and 3: train SE-ResNeXt50 on five folds.

  python train.py --train_batch_size 32 --gpus 0 1
  python train.py --train_batch_size 32 --gpus 0 1 --soft_labels_filename soft_labels.csv --log_dir logs_submit_distill

Reads   DATA_DIR/train.csv and images/; in step 3 also the soft labels that step 2 wrote.
Writes  LOG_DIR: hparams.yaml, source/, folds.csv, the six best checkpoints of each fold, metrics/, results.csv,
        out_of_fold.csv; and the image cache.
Expect  70 epochs per fold, a line each (in a terminal a progress bar). After an interruption the same command continues.
"""

from harness.console import parse_args
from utils import CLASSES, N_FOLDS, derive_seed, describe_aucs, make_training_parser, parse_labels, split_folds

if __name__ == "__main__":  # before the imports that take seconds: a typo should not wait for them
    ARGS = parse_args(make_training_parser(__doc__))

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch

from dataset import (
    EpochSampler,
    LeafDataset,
    cached_photos,
    fit_photo,
    make_loader,
    mix_labels,
    read_soft_labels,
    read_train,
    train_augmentation,
)
from harness.backbones import find_weights, load_backbone_weights, sketch
from harness.console import is_interactive, say
from harness.photos import CachedImages
from harness.run import BestCheckpoints, Run
from models import LeafModule, LeafNet, load_network


@dataclass
class TrainingData:
    """The labelled photos, in the row order of train.csv."""

    image_ids: pd.Series
    folds: np.ndarray  # int (n,); -1: in no fold, so that all of them train on it
    hard_labels: np.ndarray  # float32 (n, k), one-hot: what validation compares with
    labels: np.ndarray  # float32 (n, k): what is trained on, hard or mixed with soft labels
    images: CachedImages


def read_training_data(args, run):
    """Labels, hard or mixed with soft ones, folds and photos. Raises InputError with all that is wrong with them."""
    train = read_train(args)
    hard_labels = labels = train[list(CLASSES)].to_numpy(np.float32)
    if args.soft_labels_filename is not None:
        soft = read_soft_labels(args, args.soft_labels_filename, train["image_id"])
        labels = mix_labels(hard_labels, soft, args.soft_share)
    seed = args.seed if args.fold_seed is None else args.fold_seed
    folds = split_folds(len(train), seed, hard_labels.argmax(1))
    run.check(folds, hard_labels)
    images = cached_photos(args, "train", train["image_id"])
    return TrainingData(train["image_id"], folds, hard_labels, labels, images)


def make_module(args, fold, weights):
    """The network of a fold, from ImageNet weights (a file) or None, as a Lightning module. Its seed draws the head."""
    seed = derive_seed(args.seed, fold)
    torch.manual_seed(seed)
    network = LeafNet(args.backbone)
    if weights is not None:
        load_backbone_weights(network.backbone, weights)
    if args.compile:
        network.compile()
    return LeafModule(network, args.lr_schedule, args.learning_rate, seed)


def make_loaders(args, fold, data, trainer, first_epoch=0):
    """Training batches of the other folds, augmented, and validation batches of this fold, for one of the processes."""
    rank, world_size, on_gpu = trainer.global_rank, trainer.world_size, trainer.strategy.root_device.type == "cuda"
    train_rows, val_rows = np.flatnonzero(data.folds != fold), np.flatnonzero(data.folds == fold)
    train_set = LeafDataset(data.images, data.image_ids, data.labels, train_augmentation(), args.seed)
    val_set = LeafDataset(data.images, data.image_ids, data.hard_labels)
    order = EpochSampler(train_rows, args.train_batch_size, args.seed, fold, rank, world_size)
    order.set_epoch(first_epoch)  # Lightning does so too late for the first epoch after an interruption
    val_keys = [(fold, 0, int(row)) for row in val_rows[rank::world_size]]
    batch_size = args.train_batch_size // world_size // args.accumulate_grad_batches
    return (
        make_loader(train_set, order, batch_size, args.num_workers, on_gpu),
        make_loader(val_set, val_keys, args.val_batch_size, args.num_workers, on_gpu),
    )


def train_fold(args, fold, data, weights, run):
    """Train one fold and record its best epoch in the log directory."""
    module = make_module(args, fold, weights)
    best = BestCheckpoints(
        args.log_dir,
        f"fold={fold}-" + "epoch={epoch}-val_loss={val_loss:.4f}-val_roc_auc={val_roc_auc:.4f}",
        monitor="val_roc_auc",
        mode="max",
        save_top_k=args.keep_checkpoints,
        save_weights_only=True,
        auto_insert_metric_name=False,
        enable_version_counter=False,
    )
    trainer = pl.Trainer(
        max_epochs=args.max_epochs,
        gradient_clip_val=args.gradient_clip_val,
        accumulate_grad_batches=args.accumulate_grad_batches,
        callbacks=[best, *run.callbacks(fold)],
        logger=False,  # metrics/ in the log directory is written by run.callbacks
        default_root_dir=args.log_dir,
        accelerator=run.accelerator,
        devices=run.devices,
        num_nodes=run.num_nodes,
        strategy=run.strategy,
        precision=run.precision,
        plugins=run.plugins,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=is_interactive(),
    )
    resume_point, first_epoch = run.resume_from(fold)
    trainer.fit(module, *make_loaders(args, fold, data, trainer, first_epoch), ckpt_path=resume_point)
    run.finish_fold(fold, trainer)


def main(args):
    run = Run(args, N_FOLDS, CLASSES)
    sketch(args.backbone, tuple(args.image_size))  # or it cannot take photos of this size
    make_module(args, args.folds[0], weights=None)  # what does not fit together is told before photos are decoded
    data = read_training_data(args, run)
    weights = find_weights(args.weights, args.backbone)
    module = make_module(args, args.folds[0], weights)  # and another network's weights before anything is written
    with run.begin(data, weights, module, load=lambda path: load_network(path, args.backbone), fit=fit_photo):
        for fold in run.folds_left():
            train_fold(args, fold, data, weights, run)
    out_of_fold = run.summarise()
    if out_of_fold is not None:
        aucs = describe_aucs(parse_labels(out_of_fold["label"]), out_of_fold[list(CLASSES)])
        say(f"out-of-fold AUC of {len(out_of_fold)} photos: {aucs}; written as {args.log_dir}/out_of_fold.csv")


if __name__ == "__main__":
    main(ARGS)
