"""What `make gpu-check` does that needs no GPU: the checks on the CPU, what each would notice, the table."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import run_script

from tools import gpu_check


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """What main finds out about a machine without a GPU; a quick network and small photos."""
    monkeypatch.setattr(gpu_check, "BACKBONE", "squeezenet1_1")
    monkeypatch.setattr(gpu_check, "SMALL_SIZE", (32, 64))
    found = {"device": torch.device("cpu"), "gpu": False, "size": (32, 64), "batch": 2, "step": 1.0, "precision": "32"}
    return SimpleNamespace(**found, folder=tmp_path, synchronise=lambda: None)


def results(rows):
    return [row["result"] for row in rows]


def test_the_table_on_a_machine_without_a_gpu(machine, monkeypatch, tmp_path, capsys):
    """Every row is printed and kept; a check that ends in an error loses no other."""

    def broken(machine):
        yield gpu_check.row("before the error", 1.0)
        raise ValueError("broken here")

    def too_large(machine):
        raise RuntimeError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setattr(gpu_check, "QUICK", [broken, too_large, *gpu_check.QUICK])
    options = {"image_size": (32, 64), "batches": [2], "num_workers": 0, "quick": True}
    with pytest.raises(SystemExit, match="^error: broken: see the table"):
        gpu_check.main(SimpleNamespace(**options, out=str(tmp_path / "table.json")))
    printed, kept = capsys.readouterr().out, json.loads((tmp_path / "table.json").read_text())
    assert "CPU: there is no GPU" in printed and kept["device"] in printed and kept["environment"]["torch"]
    rows = {row["check"].strip(): row for row in kept["checks"]}
    assert all(f"{name} " in printed and row["result"] in printed for name, row in rows.items())
    assert rows["too_large"]["result"] == "left out" and "broken here" in rows["broken"]["about"]
    assert results(kept["checks"])[:4] == ["figure", "failed", "left out", "ok"]
    assert rows["float32 logits as on the CPU"]["value"] == 0
    assert set(results(kept["checks"])[4:]) == {"figure"} and rows["all five steps at 480x768, computed"]["value"] > 0
    assert len(rows) == len(kept["checks"]) >= 8


def test_other_weights_and_lower_precision_would_be_noticed(machine, monkeypatch):
    """bf16 in place of float32 moves these small logits by 0.0002 only, but by far more than their spread allows."""
    draw = gpu_check.draw_network

    def draw_careless(device):
        network = draw("cpu")
        plain = network.forward
        if device != "cpu":  # the second of the two
            network.forward = lambda images: torch.autocast("cpu", torch.bfloat16)(plain)(images)
        return network

    with monkeypatch.context() as unseeded:
        unseeded.setattr(torch, "manual_seed", lambda seed: None)
        assert results(gpu_check.check_logits(machine)) == ["failed"]
    monkeypatch.setattr(gpu_check, "draw_network", draw_careless)
    monkeypatch.setattr(gpu_check, "BACKBONE", "se_resnext50_32x4d")
    assert results(gpu_check.check_logits(machine)) == ["failed"]


def test_the_estimate_counts_every_photo(machine):
    # 70 epochs of 5 folds: 4 of 5 photos are trained on, one is validated; both rounds; then the predictions
    training, validating = 70 * 5 * 1821 * 4 / 5, 70 * 5 * 1821 / 5
    expected = (2 * (training * 0.05 + validating * 0.002) + (1821 + 2 * 1821 * 8 * 5) * 0.01) / 3600
    machine.fed, machine.validate, machine.predict = 2 * 0.05, 2 * 0.002, 2 * 0.01  # of a batch of 2
    for machine.size, factor in (((480, 768), 1), ((240, 384), 4)):
        assert next(gpu_check.estimate_hours(machine))["value"] == pytest.approx(factor * expected)


@pytest.mark.slow
def test_a_killed_training_is_compared_with_one_that_was_not(machine, monkeypatch):
    def run(command, cwd, env, **_):
        return run_script(*command[1:], cwd=cwd, check=False, **env)

    monkeypatch.setattr(gpu_check, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    row = next(gpu_check.check_resume(machine))
    assert (row["result"], row["value"], row["about"]) == ("ok", 0, "to the bit")
    ended = SimpleNamespace(returncode=0, stderr="")
    monkeypatch.setattr(gpu_check, "subprocess", SimpleNamespace(run=lambda *_, **__: ended))
    with pytest.raises(RuntimeError, match="status 0"):  # a training that was not killed is no proof
        gpu_check.train(machine, "training", killed_before=2)


def replace_train(monkeypatch, apart=0.0, says="going on after epoch 1"):
    """In place of gpu_check.train: what is killed differs by `apart`. Returns a list to which what is asked for is added."""
    asked = []

    def train(machine, log_dir, *options, killed_before=99):
        asked.append((log_dir, options, killed_before))
        return pd.DataFrame({"train_loss": [3.0, 2.0, 1.0 + apart * log_dir.startswith("killed")]}), says

    monkeypatch.setattr(gpu_check, "train", train)
    return asked


@pytest.mark.parametrize("gpu, apart, expected", [(False, 1e-9, "failed"), (True, 1e-3, "ok"), (True, 0.1, "failed")])
def test_other_metrics_after_a_kill_are_noticed(machine, monkeypatch, gpu, apart, expected):
    machine.gpu = gpu
    replace_train(monkeypatch, apart)
    row = next(gpu_check.check_resume(machine))
    assert (row["result"], row["about"]) == (expected, "not to the bit")
    replace_train(monkeypatch, says="begun anew")
    with pytest.raises(RuntimeError, match="did not go on"):
        next(gpu_check.check_resume(machine))


def test_compiled_trainings_are_killed_and_continued_too(machine, monkeypatch):
    asked, compiled = replace_train(monkeypatch), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: compiled.append(network))
    assert results(gpu_check.measure_compiling(machine)) == ["figure", "ok"] and len(compiled) == 1
    whole, killed = (f"{kind}--compile" for kind in ("whole", "killed"))
    assert asked == [(name, ("--compile",), kill) for name, kill in ((whole, 99), (killed, 2), (killed, 99))]
