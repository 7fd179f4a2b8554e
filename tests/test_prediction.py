"""Prediction: compiled where it pays, with the same result; and what is said where it cannot be."""

import argparse
import copy

import numpy as np
import pytest
import torch

from dataset import LeafDataset
from harness import prediction
from harness.console import InputError
from harness.prediction import fold_batch_norm, predict
from models import LeafNet


@pytest.fixture(scope="module")
def job():
    """Two networks whose predictions differ, eleven photos for each, and the options that predict reads."""
    networks = {}
    for fold in (0, 3):
        torch.manual_seed(fold)
        networks[fold] = LeafNet()
        with torch.no_grad():
            networks[fold].fc.weight.mul_(40)
            for _ in range(3):  # running statistics of real activations
                networks[fold].train().logits(torch.randn(8, 3, 32, 64))
        fold_batch_norm(networks[fold].eval().backbone)
        networks[fold].to(memory_format=torch.channels_last)
    photos = np.random.default_rng(0).integers(0, 256, (11, 32, 64, 3), dtype=np.uint8)
    keys = [(fold, 0, row) for fold in networks for row in range(11)]
    cpu = [torch.device("cpu")]
    args = argparse.Namespace(devices=cpu, precision="32", val_batch_size=4, num_workers=0, image_size=[32, 64])
    return networks, LeafDataset(photos, [f"Test_{i}" for i in range(11)]), keys, args


@pytest.mark.slow
def test_long_predictions_are_compiled_and_stay_the_same(job, monkeypatch, capsys):
    expected = predict(*job, "short")
    assert "torch.compile" not in capsys.readouterr().out
    assert np.abs(expected[:11] - expected[11:]).max() > 0.05  # another network's weights would be noticed
    used, compiling = [], prediction.compile_network

    def watch(network, example):
        compiled = compiling(network, example)
        assert isinstance(compiled, torch._dynamo.OptimizedModule)
        return lambda images: used.append((network, len(images))) or compiled(images)

    monkeypatch.setattr(prediction, "COMPILE_FROM", 22 * 32 * 64)
    monkeypatch.setattr(prediction, "compile_network", watch)
    np.testing.assert_allclose(predict(*job, "long"), expected, atol=1e-5)
    assert "22 images to predict: by torch.compile" in capsys.readouterr().out
    # of 4 + 4 + 3 images a network, the last batch is not worth compiling once more
    assert used == [(network, 4) for network in job[0].values() for _ in range(2)]


def test_without_a_compiler_it_is_said_and_the_prediction_goes_on(job, monkeypatch, capsys):
    expected = predict(*job, "short")
    torch._dynamo.reset()
    monkeypatch.setattr(prediction, "COMPILE_FROM", 0)
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/there/is/none",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    np.testing.assert_array_equal(predict(*job, "long"), expected)
    said = capsys.readouterr().out
    assert said.count("note: predicting without torch.compile") == 1 and "No working C++ compiler" in said


def test_a_prediction_that_finds_no_memory_says_what_to_type_and_that_works(job):
    networks, dataset, keys, args = job

    class SmallGpu(torch.nn.Module):
        def forward(self, images):
            if len(images) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
            return networks[0](images)

    with pytest.raises(InputError, match="the GPU's memory is too small .* type a smaller --val_batch_size than 4$"):
        predict({0: SmallGpu(), 3: networks[3]}, dataset, keys, args, "short")
    args = argparse.Namespace(**vars(args) | {"val_batch_size": 2})
    np.testing.assert_allclose(predict({0: SmallGpu()}, dataset, keys[:11], args, "short").sum(1), 1, atol=1e-5)


def test_a_prediction_that_is_nan_is_refused_with_its_fold(job):
    networks, dataset, keys, args = job
    broken = copy.deepcopy(networks[3])
    broken.fc.bias.data[1] = float("nan")
    with pytest.raises(InputError, match="the network of fold 3 predicts nan, so nothing is written"):
        predict({0: networks[0], 3: broken}, dataset, keys, args, "short")
