"""What `make gpu-check` does that needs no GPU: fp16 with the loss scaler on the CPU, the table, the estimate."""

import argparse
import json

import numpy as np
import pytest
import torch
from conftest import run_script
from pytorch_lightning.plugins import MixedPrecision

from tools import gpu_check
from tools.gpu_check import (
    Table,
    check_accumulation,
    check_agreement,
    check_fp16,
    check_resume,
    estimate_hours,
    make_step,
)

CPU = torch.device("cpu")


def results(table):
    return {row["check"]: row["result"] for row in table.rows}


def test_fp16_with_the_loss_scaler_learns_and_is_clipped_after_unscaling():
    """Lightning's own 16-mixed becomes bf16 on a CPU, so the plugin is handed in, as on a GPU."""
    table = Table()
    check_fp16(table, CPU, (32, 64), steps=4)
    assert results(table) == {
        "fp16 with the loss scaler: the loss falls": "ok",
        "fp16: clipped at 1, after unscaling": "ok",
    }
    assert table.rows[1]["value"] == pytest.approx(1, abs=0.01)  # it was longer, and was clipped


@pytest.mark.parametrize("fused", (True, False))
def test_gradients_that_are_clipped_before_they_are_unscaled_would_be_noticed(monkeypatch, fused):
    """They are 1,024 times too long then. Lightning unscales them itself, but not for a fused optimizer."""
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr, **_: adam(parameters, lr, fused=fused))
    monkeypatch.setattr(gpu_check, "UnscaleFirst", MixedPrecision)
    table = Table()
    check_fp16(table, CPU, (32, 64), steps=2)
    assert results(table)["fp16: clipped at 1, after unscaling"] == ("failed" if fused else "ok")


def test_checks_fail_where_something_is_wrong(monkeypatch):
    table = Table()
    check_agreement(table, CPU)
    check_accumulation(table, CPU)
    assert set(results(table).values()) == {"ok"}
    made = iter(range(10))

    def another(device):
        torch.manual_seed(next(made))
        return gpu_check.LeafNet().to(device)

    monkeypatch.setattr(gpu_check, "draw_network", another)
    table = Table()
    check_agreement(table, CPU)
    check_accumulation(table, CPU)
    assert set(results(table).values()) == {"failed"}


def test_the_estimate_counts_every_photo():
    # 70 epochs of 5 folds: 4 of 5 photos are trained on, one is validated; both rounds; then the predictions
    training, validating = 70 * 5 * 1821 * 4 / 5, 70 * 5 * 1821 / 5
    expected = 2 * (training * 0.05 + validating * 0.002) + (1821 + 2 * 1821 * 8 * 5) * 0.01
    assert estimate_hours(0.05, 0.002, 0.01, (480, 768)) == pytest.approx(expected / 3600)
    assert estimate_hours(0.05, 0.002, 0.01, (240, 384)) == pytest.approx(4 * expected / 3600)


@pytest.mark.parametrize("channels_last", (True, False))
def test_what_is_not_channels_last_is_so_nowhere(channels_last):
    """A convolution computes in channels last if its photos or its weights are: weights alone decide nothing."""
    step, seen = make_step(CPU, (64, 96), 2, "bf16", channels_last=channels_last), []

    def look(module, inputs):
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size[0] > 1:  # a weight of 1 x 1 is always both
            both = inputs[0], module.weight
            seen.append(any(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in both))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    step()
    hook.remove()
    assert len(seen) == 17 and set(seen) == {channels_last}


def test_one_check_that_ends_in_an_error_loses_no_other(monkeypatch, tmp_path, capsys):
    def broken(*arguments, **options):
        raise ValueError("broken here")

    for name in ("check_agreement", "check_fp16", "measure_memory", "measure_ratio"):
        monkeypatch.setattr(gpu_check, name, broken)
    monkeypatch.setattr(gpu_check, "SMALL_SIZE", (32, 64))
    with pytest.raises(SystemExit, match="float32 logits as on the CPU; fp16 with the loss scaler; memory; "):
        gpu_check.main(argparse.Namespace(num_workers=0, quick=True, out=str(tmp_path / "gpu_check.json")))
    rows = {row["check"]: row for row in json.loads((tmp_path / "gpu_check.json").read_text())["checks"]}
    assert "broken here" in rows["memory"]["about"]
    for name in (
        "the gradient of two parts is that of the whole",
        "steps fed by the loader, against data on the device",
    ):
        assert rows[name]["result"] in ("ok", "figure")
    assert "all five steps at 480x768 on this device, computed" in rows


def test_lower_precision_would_be_noticed(monkeypatch):
    """bf16 in place of float32 moves these small logits by 0.0002 only, but by far more than their spread allows."""
    draw = gpu_check.draw_network

    def careless(device):
        network = draw("cpu")
        if device == CPU:  # the second of the two
            plain = network.forward
            network.forward = lambda images: torch.autocast("cpu", torch.bfloat16)(plain)(images)
        return network

    monkeypatch.setattr(gpu_check, "draw_network", careless)
    table = Table()
    check_agreement(table, CPU)
    assert set(results(table).values()) == {"failed"}


def test_a_training_that_was_not_killed_is_no_proof(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "KILLED", "import sys; print('done already')")
    with pytest.raises(RuntimeError, match="status 0"):
        check_resume(Table(), tmp_path, CPU)


@pytest.mark.slow
def test_a_killed_training_is_compared_with_one_that_was_not(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "BACKBONE", "resnet18")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    table = Table()
    check_resume(table, tmp_path, CPU)
    (row,) = table.rows
    assert (row["result"], row["value"], row["about"]) == ("ok", 0, "to the bit")


@pytest.mark.slow
def test_on_a_machine_without_a_gpu_it_runs_on_the_cpu_and_says_so(tmp_path, monkeypatch):
    done = run_script("tools.gpu_check", "--quick", "--num_workers", 0, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert "CPU: there is no GPU, so this shows only that the checks work" in done.stdout
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    rows = {row["check"]: row for row in record["checks"]}
    assert record["environment"]["torch"] and rows["memory at 64x96, batch 32"]["result"] == "left out"
    assert rows["float32 logits as on the CPU"]["value"] == 0
    assert np.isfinite(rows["all five steps at 480x768 on this device, computed"]["value"])
    assert not [row for row in record["checks"] if row["result"] == "failed"]
    for name, row in rows.items():
        assert f"{name} " in done.stdout and row["result"] in done.stdout
