"""The command line: help, typos, devices, what an out-of-memory error says."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import QUICK, REPO, run_script

import models
import train
from harness.command_line import parse_args
from harness.console import InputError, say
from harness.devices import choose_device, choose_precision, compute_exactly
from harness.run import Run
from inference import load_trained
from utils import CLASSES, make_prediction_parser, make_training_parser, split_folds

SCRIPTS = ("train.py", "generate_soft_labels.py", "generate_distilled_submission.py", "blend.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_command_and_the_defaults(script, tmp_path):
    done = run_script(script, "--help", cwd=tmp_path, cold=True)
    assert f"python {script}" in done.stdout and "(default: " in done.stdout and "Writes" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_misspelt_option_stops_at_once(script, tmp_path):
    done = run_script(script, "--max_epoch", "3", cwd=tmp_path, check=False, cold=True)
    assert done.returncode == 2 and "--max_epoch" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_originals_names_and_short_options():
    parser = make_training_parser("")
    args = parse_args(parser, "-tbs 8 -vbs 4 -backbone resnet18 --gpus 0 1 --precision 16 --image_size 96 144".split())
    assert (args.train_batch_size, args.val_batch_size, args.backbone, args.gpus) == (8, 4, "resnet18", [0, 1])
    assert args.image_size == [96, 144] and "seed" not in args.typed and "gpus" in args.typed
    defaults = parse_args(parser, [])
    assert (defaults.train_batch_size, defaults.val_batch_size, defaults.max_epochs) == (32, 16, 70)
    assert (defaults.image_size, defaults.seed, defaults.gradient_clip_val) == ([480, 768], 2020, 1.0)
    assert defaults.typed == set() and defaults.log_dir == "logs"


def test_a_home_folder_that_the_shell_has_left_is_found(monkeypatch):
    """bash expands ~/logs but leaves --log_dir=~/logs as it is."""
    monkeypatch.setenv("HOME", "/home/anna")
    options = "--log_dir=~/logs --data_dir=~/data --cache_dir=~ --weights=~/w.pth --soft_labels_filename=~/s.csv"
    args = parse_args(make_training_parser(""), options.split())
    found = [args.log_dir, args.data_dir, args.cache_dir, args.weights, args.soft_labels_filename]
    assert found == [f"/home/anna{end}" for end in ("/logs", "/data", "", "/w.pth", "/s.csv")]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--max_epochs 0", "argument --max_epochs: 0 is not 1 or more"),
        ("--max_ep 3", "unrecognized arguments: --max_ep 3"),
        ("--image_size 96", "argument --image_size: expected 2 arguments"),
        ("--image_size 31 96", "argument --image_size: 31 is too small: the network needs 32 pixels or more"),
        ("--folds 5", "argument --folds: invalid choice: 5"),
        ("--seed -1", "argument --seed: -1 is not between 0 and"),
        ("--precision fp16", "argument --precision: invalid choice: 'fp16'"),
        ("--gradient_clip_val -1", "argument --gradient_clip_val: -1 is not a positive number"),
        ("--gradient_clip_val nan", "argument --gradient_clip_val: nan is not a positive number"),
        ("--soft_share 1.1", "argument --soft_share: 1.1 is not between 0 and 1"),
        ("--seed 5000000000", "argument --seed: 5000000000 is not between 0 and"),
        ("--gpus 0 --cpu_processes 1", "argument --cpu_processes: not allowed with argument --gpus"),
        ("-t 8", "unrecognized option -t"),
        ("-tb 8", "unrecognized option -tb"),
        ("extra", "unrecognized arguments: extra"),
    ],
)
def test_wrong_values_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(make_training_parser(""), arguments.split())
    assert stop.value.code == 2 and f"error: {said}" in capsys.readouterr().err


def test_an_unknown_schedule_is_refused_with_the_known_ones(sample, tmp_path):
    options = ["--data_dir", sample, *QUICK, "--lr_schedule", "cosin"]
    done = run_script("train.py", *options, cwd=tmp_path, check=False)
    assert done.stderr.splitlines()[-1] == "error: --lr_schedule cosin: models.py has cosine, triangular"
    assert done.returncode == 1 and not (tmp_path / "logs").exists()


def pretend_gpus(monkeypatch, *capabilities, built=("sm_75", "sm_80", "sm_90", "compute_120")):
    """Let torch see GPUs: of each its compute capability, or the error that asking for it raises."""

    def capability(gpu):
        if isinstance(capabilities[gpu], Exception):
            raise capabilities[gpu]
        return capabilities[gpu]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: f"Card {gpu}")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built))


def test_gpus_that_are_not_there_and_what_to_type_instead(monkeypatch):
    pretend_gpus(monkeypatch)
    with pytest.raises(InputError, match="leave --gpus out"):
        choose_device([0, 1])
    assert choose_device(None) == ("cpu", [0])
    pretend_gpus(monkeypatch, *[(8, 0)] * 4)
    assert choose_device(None, 1) == ("cpu", [0])  # asked for, though there are GPUs
    pretend_gpus(monkeypatch, (8, 6))
    with pytest.raises(InputError, match="type --gpus 0$"):
        choose_device([0, 1])
    assert choose_device([0]) == choose_device(None) == ("cuda", [0])


UNUSABLE = {  # why a GPU cannot be used: its capability or torch's error, what is said
    "too old a driver": (
        RuntimeError("The NVIDIA driver on your system is too old"),
        "GPU 0 cannot be used: The NVIDIA",
    ),
    "too old a card": ((6, 0), r"GPU 0 \(Card 0, sm_60\) cannot be used: this torch holds code for sm_75 sm_80"),
    "a minor version too old": ((7, 0), r"GPU 0 \(Card 0, sm_70\) cannot be used"),
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_a_gpu_that_torch_counts_but_cannot_use_is_named_at_once(monkeypatch, capsys, reason):
    problem, said = UNUSABLE[reason]
    pretend_gpus(monkeypatch, problem)
    for gpus in (None, [0]):  # never the CPU in silence
        with pytest.raises(InputError, match=said + ".*type --cpu_processes 1 to run on the CPU$"):
            choose_device(gpus)
    pretend_gpus(monkeypatch, problem, (8, 9), (9, 0), (12, 0))
    with pytest.raises(InputError, match=said + ".*type --gpus 1 2 3$"):
        choose_device([0, 1])
    assert choose_device(None) == ("cuda", [1, 2, 3]) and choose_device([3, 1]) == ("cuda", [1, 3])
    assert re.search("note: " + said + ".*; going on without", capsys.readouterr().out)


def start(*options):
    return Run(parse_args(make_training_parser(""), list(map(str, options))), 5, CLASSES)


@pytest.mark.parametrize("n, used", [(1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (6, 4), (7, 4), (8, 8)])
def test_without_gpus_typed_as_many_are_used_as_divide_the_batch(monkeypatch, capsys, n, used):
    pretend_gpus(monkeypatch, *[(8, 0)] * n)
    run = start("--train_batch_size", 32)
    assert run.indices == list(range(used))
    noted = "note: a batch of 32 cannot be shared by all GPUs: " in capsys.readouterr().out
    assert noted == (used < n)
    assert len(start("--train_batch_size", 32, "--parallel_folds").indices) == n  # each has the whole batch
    folds, labels = split_folds(200, 0), np.eye(4)[np.arange(200) % 4]
    run.check(folds, labels)
    if used < n:
        with pytest.raises(InputError, match=f"32 cannot be split into {n} equal parts.*; type --gpus 0 1"):
            start("--train_batch_size", 32, "--gpus", *range(n)).check(folds, labels)


def test_more_devices_than_a_fold_has_photos_to_validate_on_are_refused():
    run = start("--cpu_processes", 12, "--train_batch_size", 24)
    with pytest.raises(InputError, match="a fold has 10 photos to validate on, too few for 12 devices"):
        run.check(split_folds(50, 0), np.eye(4)[np.arange(50) % 4])


def test_workers_by_default_share_the_cores_of_a_machine(monkeypatch):
    monkeypatch.setattr("joblib.cpu_count", lambda: 8)
    assert start().args.num_workers == 8
    assert start("--cpu_processes", 4).args.num_workers == 2
    assert start("--cpu_processes", 4, "--num_workers", 8).args.num_workers == 8


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid(), reason="only root can mount another /dev/shm, on Linux")
def test_a_shared_memory_too_small_for_the_workers_is_told_before_anything_is_done(sample, tmp_path):
    """docker gives 64 MB; here it is 1 MB, and the photos are smaller too."""
    command = [sys.executable, REPO / "train.py", "--data_dir", sample, *QUICK, "--image_size", 480, 768]
    inside = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'

    def train(workers):
        words = ["unshare", "-m", "sh", "-c", inside, "sh", *command, "--num_workers", workers]
        return subprocess.run(list(map(str, words)), cwd=tmp_path, capture_output=True, text=True)

    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no name space can be made here")
    done = train(1)
    said = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert re.match("error: /dev/shm has 1.05 MB free, the 1 workers .* need 17.7 MB: type --num_workers 0, or", said)
    assert "--shm-size 2g" in said and done.returncode == 1 and not list(tmp_path.iterdir())


def test_a_rank_that_no_launcher_has_set_does_not_silence_the_process(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")  # as some clusters do for every container
    say("heard")
    assert "heard" in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    say("unheard")
    assert "unheard" not in capsys.readouterr().out


def test_precision_is_never_changed_silently(monkeypatch):
    with pytest.raises(InputError, match="--precision 16 needs a GPU"):
        choose_precision("16", "cpu")
    assert choose_precision(None, "cuda") == "16"
    assert choose_precision("32", "cuda") == "32"
    for bf16, amx, expected in ((True, False, "bf16"), (False, True, "bf16"), (False, False, "32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=bf16: found)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda found=amx: found)
        assert choose_precision(None, "cpu") == expected


def test_float32_means_float32_and_algorithms_are_fixed(trained, monkeypatch, tmp_path):
    """TF32, on by default in cuDNN, has 10 bits; the original predicts in float32, with deterministic algorithms."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    monkeypatch.setattr(cudnn, "benchmark", True)
    monkeypatch.setattr(cudnn, "deterministic", False)
    cudnn.allow_tf32 = matmul.allow_tf32 = True
    compute_exactly("16")
    assert cudnn.allow_tf32 and cudnn.deterministic and not cudnn.benchmark
    monkeypatch.chdir(tmp_path)
    options = ["--log_dir", str(trained / "logs"), "--folds", "0"]
    load_trained(parse_args(make_prediction_parser(""), options))
    assert not cudnn.allow_tf32 and not matmul.allow_tf32 and cudnn.deterministic


def test_missing_data_is_said_before_anything_is_written(tmp_path):
    done = run_script("train.py", cwd=tmp_path, check=False)
    assert done.returncode == 1 and "train.csv does not exist" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_unknown_backbone_is_refused():
    with pytest.raises(InputError, match="pretrainedmodels has alexnet"):
        train.LeafNet("se_resnext50")
    with pytest.raises(InputError, match="do not fit this head"):
        train.LeafNet("alexnet")


@pytest.mark.parametrize("backbone", ["resnet18", "densenet121", "xception"])
def test_other_backbones_that_fit(backbone):
    with torch.no_grad():
        assert train.LeafNet(backbone).eval()(torch.zeros(1, 96, 96, 3, dtype=torch.uint8)).shape == (1, 4)


def test_an_out_of_memory_error_says_what_to_type_and_that_works(sample, tmp_path, monkeypatch):
    """A GPU that holds two photos: its error comes from within Lightning's fit, as a real one does."""
    step = models.LeafModule.training_step

    def small_gpu(self, batch, batch_idx):
        if len(batch["image"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return step(self, batch, batch_idx)

    def no_gpu(self, batch, batch_idx):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models.LeafModule, "training_step", small_gpu)
    parser = make_training_parser("")
    options = ["--data_dir", str(sample), *QUICK, "--folds", "0", "--accumulate_grad_batches"]
    with pytest.raises(InputError, match="Type --accumulate_grad_batches 4: the same 8 photos a step, in 4 parts"):
        train.main(parse_args(parser, [*options, "2"]))
    train.main(parse_args(parser, [*options, "4", "--accept_changes"]))
    assert (tmp_path / "logs" / "results.csv").exists()
    options[options.index("--folds") + 1] = "1"  # beside a fold that is finished, whose record names 4 parts
    monkeypatch.setattr(models.LeafModule, "training_step", no_gpu)
    with pytest.raises(InputError, match="Type --accumulate_grad_batches 2 --accept_changes: the same"):
        train.main(parse_args(parser, [*options, "1", "--accept_changes"]))

    with pytest.raises(InputError, match="a smaller --image_size"):
        train.main(parse_args(parser, [*options, "4", "--fresh", "--folds", "0"]))


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' /proc")
def test_a_cpu_without_memory_says_what_to_type_and_that_works(sample, tmp_path):
    """A real process whose memory is limited, as by `ulimit -v`: far too little for 32 photos, enough for two."""
    train = ["train.py", "--data_dir", sample, *QUICK, "--folds", 0, "--image_size", 224, 224, "--train_batch_size", 32]
    run = run_script(*train, cwd=tmp_path, check=False, memory=1_000_000_000)
    said = run.stderr.splitlines()[-1]
    assert run.returncode == 1 and said.startswith("error: the memory is too small") and "Traceback" not in run.stderr
    assert said.endswith("Type --accumulate_grad_batches 2: the same 32 photos a step, in 2 parts")
    run_script(*train, "--accumulate_grad_batches", 16, "--fresh", cwd=tmp_path, memory=1_000_000_000)
