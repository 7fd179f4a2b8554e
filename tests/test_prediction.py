"""Prediction: by each fold's own network, on all devices; and what is said where it cannot be."""

import argparse
import copy

import numpy as np
import pytest
import torch

from dataset import LeafDataset
from harness.console import InputError
from inference import predict
from models import LeafNet


@pytest.fixture(scope="module")
def job():
    """Two networks whose predictions differ, eleven photos for each, and the options that predict reads."""
    networks = {}
    for fold in (0, 3):
        torch.manual_seed(fold)
        networks[fold] = LeafNet("resnet18").eval()
        networks[fold].fc.weight.data.mul_(40)
    photos = np.random.default_rng(0).integers(0, 256, (11, 32, 64, 3), dtype=np.uint8)
    keys = [(fold, 0, row) for fold in networks for row in range(11)]
    cpu = [torch.device("cpu")]
    args = argparse.Namespace(devices=cpu, precision="32", val_batch_size=4, num_workers=0, image_size=[32, 64])
    return networks, LeafDataset(photos, [f"Test_{i}" for i in range(11)]), keys, args


def test_a_prediction_that_finds_no_memory_says_what_to_type_and_that_works(job):
    networks, dataset, keys, args = job

    class SmallGpu(torch.nn.Module):
        probabilities = LeafNet.probabilities

        def forward(self, images):
            if len(images) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
            return networks[0](images)

    with pytest.raises(InputError, match="too little memory .* type a smaller --val_batch_size than 4$"):
        predict({0: SmallGpu(), 3: networks[3]}, dataset, keys, args, "short")
    args = argparse.Namespace(**vars(args) | {"val_batch_size": 2})
    np.testing.assert_allclose(predict({0: SmallGpu()}, dataset, keys[:11], args, "short").sum(1), 1, atol=1e-5)


def test_a_prediction_that_is_nan_is_refused_with_its_fold(job):
    networks, dataset, keys, args = job
    broken = copy.deepcopy(networks[3])
    broken.fc.bias.data[1] = float("nan")
    with pytest.raises(InputError, match="the network of fold 3 predicts nan, so nothing is written"):
        predict({0: networks[0], 3: broken}, dataset, keys, args, "short")


def test_folds_take_turns_on_all_devices_and_each_key_gets_the_answer_of_its_own_fold(job):
    """Two devices are simulated: networks that note when they are used; 11 photos each in batches of 4."""
    networks, dataset, keys, args = job
    alone = {
        fold: predict({fold: network}, dataset, [key for key in keys if key[0] == fold], args, "alone")
        for fold, network in networks.items()
    }
    used = []
    watched = {fold: copy.copy(network) for fold, network in networks.items()}
    for fold, network in watched.items():
        network.register_forward_pre_hook(lambda module, inputs, fold=fold: used.append((fold, len(inputs[0]))))
    shuffled = [keys[i] for i in np.random.default_rng(0).permutation(len(keys))]
    found = predict(watched, dataset, shuffled, args, "shuffled")
    assert used == [(0, 4), (3, 4), (0, 4), (3, 4), (0, 3), (3, 3)]
    for key, values in zip(shuffled, found, strict=True):
        np.testing.assert_allclose(values, alone[key[0]][key[2]], atol=1e-5)
    # another network's answer, or another photo's, would be noticed
    assert np.abs(alone[0] - alone[3]).max() > 0.05 and np.abs(np.diff(alone[0], axis=0)).max(1).min() > 1e-4
