"""The command line: typos, devices, what an out-of-memory error says."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import QUICK, REPO, refusal

import train
from harness import devices
from harness.console import parse_args, say
from harness.devices import check_gpus, choose_device, choose_precision, compute_exactly, enough_memory
from harness.run import Run
from inference import load_trained
from models import LeafModule
from predict import make_photo_parser
from utils import CLASSES, make_prediction_parser, make_training_parser, split_folds


def parse(*options):
    return parse_args(make_training_parser(""), list(map(str, options)))


def start(*options):
    return Run(parse(*options), 5, CLASSES)


def check(n_photos, *options):
    """Let a start with these options look whether it can train on so many photos."""
    start(*options).check(split_folds(n_photos, 0), np.eye(4)[np.arange(n_photos) % 4])


PRINT = """
import sys
from harness.console import Parser, parse_args, say
parse_args(Parser("")), say("叶 " * 10_000), print("更", file=sys.stderr), open("made", "w")
"""


@pytest.mark.parametrize("stdout", ["> /dev/full 2>&1", "2>&- >&-", "| head -c 1", "> out"])
def test_what_cannot_be_printed_is_lost_and_the_work_goes_on(stdout, tmp_path):
    where = {"PYTHONPATH": str(REPO), "PYTHONIOENCODING": "ascii", "PATH": os.environ["PATH"]}
    shell = ["bash", "-o", "pipefail", "-c", f'{sys.executable} -c "$0" {stdout}', PRINT]
    done = subprocess.run(shell, cwd=tmp_path, env=where, text=True, capture_output=True)
    assert (tmp_path / "made").exists() and "Traceback" not in done.stderr and done.returncode == 0, done.stderr
    if stdout == "> out":
        assert (tmp_path / "out").read_text().endswith("\\u53f6 \n") and done.stderr == "\\u66f4\n"


def test_the_originals_names_and_short_options():
    args = parse(*"-tbs 8 -vbs 4 -backbone resnet18 --gpus 0 1 --precision 16 --image_size 96 144".split())
    assert (args.train_batch_size, args.val_batch_size, args.backbone, args.gpus) == (8, 4, "resnet18", [0, 1])
    assert args.image_size == [96, 144] and "seed" not in args.typed and "gpus" in args.typed
    defaults = parse()
    assert (defaults.train_batch_size, defaults.val_batch_size, defaults.max_epochs) == (32, 16, 70)
    assert (defaults.image_size, defaults.seed, defaults.gradient_clip_val) == ([480, 768], 2020, 1.0)
    assert defaults.typed == set() and defaults.log_dir == "logs"
    shown = " ".join(make_training_parser(train.__doc__).format_help().split())
    assert "--max_epochs MAX_EPOCHS epochs per fold (default: 70)" in shown and "python train.py --train" in shown


def test_a_home_folder_that_the_shell_has_left_is_found(monkeypatch):
    """bash expands ~/logs but leaves --log_dir=~/logs as it is."""
    monkeypatch.setenv("HOME", "/home/anna")
    for name in ("log_dir", "data_dir", "cache_dir", "weights", "soft_labels_filename"):
        for end in ("", "/logs"):
            assert vars(parse(f"--{name}=~{end}"))[name] == f"/home/anna{end}"


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--max_epochs 0", "argument --max_epochs: 0 is not 1 or more"),
        ("--max_ep 3", "unrecognized option --max_ep, did you mean --max_epochs?"),
        ("--image_size 96", "argument --image_size: expected 2 arguments"),
        ("--image_size 31 96", "argument --image_size: 31 is not 32 pixels or more, which the network needs"),
        ("--folds 5", "argument --folds: invalid choice: 5"),
        ("--seed -1", "argument --seed: -1 is not between 0 and"),
        ("--precision fp16", "argument --precision: invalid choice: 'fp16'"),
        ("--gradient_clip_val -1", "argument --gradient_clip_val: -1 is not a positive number"),
        ("--soft_share 1.1", "argument --soft_share: 1.1 is not between 0 and 1"),
        ("--gpus 0 --cpu_processes 1", "argument --cpu_processes: not allowed with argument --gpus"),
        ("--lr 1e-4", "unrecognized option --lr, did you mean --lr_schedule?"),
        ("-tb 8", "unrecognized option -tb"),
        ("extra", "unrecognized arguments: extra"),
        *(
            (f"--{option} {name}", f"argument --{option}: {shown} is no plain name of a file or folder")
            for option in ("log_dir", "soft_labels_filename")
            # what Lightning takes for a URL; and of an old zip: neither a record nor TensorBoard could hold it
            for name, shown in (("exp::1", "'exp::1'"), (os.fsdecode(b"logs-\xe4"), "'logs-\\udce4'"))
        ),
    ],
)
def test_wrong_values_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*arguments.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith(f"error: {said}")


def test_an_option_that_a_script_does_not_read_is_refused(capsys):
    said = "--soft_share does nothing without --soft_labels_filename: type both"
    assert said in refusal(parse, "--soft_share", 0.5)
    with pytest.raises(SystemExit):
        parse_args(make_photo_parser(), ["x.jpg", "--data_dir", "y"])
    assert "unrecognized option --data_dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, said",
    [
        ("--data_dir nowhere", "nowhere/train.csv does not exist"),
        ("--backbone se_resnext50", "pretrainedmodels has alexnet"),
        ("--backbone alexnet", "alexnet does not fit .* or our head"),
        ("--backbone bninception", "bninception was made for BGR photos"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(option, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.search(said, refusal(train.main, parse(*option.split())))
    assert not list(tmp_path.iterdir())


def test_an_unknown_schedule_is_refused_with_the_known_ones(sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = parse("--data_dir", sample, *QUICK, "--lr_schedule", "cosin")
    assert refusal(train.main, args) == "error: --lr_schedule cosin: models.py has cosine, triangular"
    assert not list(tmp_path.iterdir())  # no photo is decoded yet


def pretend_gpus(monkeypatch, n):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n)


def test_gpus_that_are_not_there_and_what_to_type_instead(monkeypatch):
    pretend_gpus(monkeypatch, 0)
    assert "leave --gpus out" in refusal(choose_device, [0, 1])
    assert choose_device(None) == ("cpu", [0])
    pretend_gpus(monkeypatch, 4)
    assert choose_device(None, 1) == ("cpu", [0])  # asked for, though there are GPUs
    pretend_gpus(monkeypatch, 1)
    assert refusal(choose_device, [0, 1]).endswith("type --gpus 0")
    assert choose_device([0]) == choose_device(None) == ("cuda", [0])


def test_a_gpu_that_torch_counts_but_cannot_use_is_named_at_once(monkeypatch):
    """Never the CPU in silence."""

    def ones(*_, device):
        if device.index == 1:
            raise RuntimeError("The NVIDIA driver on your system is too old\nmore")
        return torch.zeros(1)

    monkeypatch.setattr(devices.torch, "ones", ones)
    check_gpus([0, 2])
    said = refusal(check_gpus, [0, 1])
    assert said.startswith("error: GPU 1 cannot be used (The NVIDIA driver on your system is too old")
    assert "if its memory is full, wait" in said and "install another build of torch or a newer driver" in said


def test_devices_that_cannot_share_the_batch_or_the_photos_to_validate_on_are_refused(monkeypatch):
    pretend_gpus(monkeypatch, 3)
    run = start("--train_batch_size", 32)
    assert run.indices == [0, 1, 2] and run.launches
    said = refusal(check, 200, "--train_batch_size", 32)
    assert re.search("32 cannot be split into 3 equal parts .devices.* of 2 photos or more", said)
    check(200, "--train_batch_size", 32, "--gpus", 0, 2)
    check(200, "--train_batch_size", 32, "--parallel_folds")  # each has the whole batch
    said = refusal(check, 50, "--cpu_processes", 12, "--train_batch_size", 24)
    assert "a fold has 10 photos to validate on, too few for 12 devices" in said


def test_workers_by_default_share_the_cores_of_a_machine(monkeypatch):
    monkeypatch.setattr("joblib.cpu_count", lambda: 8)
    assert start().args.num_workers == 8
    assert start("--cpu_processes", 4).args.num_workers == 2
    assert start("--cpu_processes", 4, "--num_workers", 8).args.num_workers == 8


def test_a_rank_that_no_launcher_has_set_does_not_silence_the_process(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")  # as some clusters do for every container
    say("heard")
    assert "heard" in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    say("unheard")
    assert "unheard" not in capsys.readouterr().out


def test_precision_is_never_changed_silently(monkeypatch):
    assert "--precision 16 needs a GPU" in refusal(choose_precision, "16", "cpu")
    assert choose_precision(None, "cuda") == "16"
    assert choose_precision("32", "cuda") == "32"
    for bf16, amx, expected in ((True, False, "bf16"), (False, True, "bf16"), (False, False, "32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=bf16: found)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda found=amx: found)
        assert choose_precision(None, "cpu") == expected


def test_float32_means_float32_and_algorithms_are_fixed(two_folds, monkeypatch, tmp_path):
    """TF32, on by default in cuDNN, has 10 bits; the original predicts in float32, with deterministic algorithms."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    monkeypatch.setattr(cudnn, "benchmark", True)
    monkeypatch.setattr(cudnn, "deterministic", False)
    cudnn.allow_tf32 = matmul.allow_tf32 = True
    compute_exactly("16")
    assert cudnn.allow_tf32 and cudnn.deterministic and not cudnn.benchmark
    monkeypatch.chdir(tmp_path)
    options = ["--log_dir", str(two_folds / "logs"), "--folds", "0"]
    load_trained(parse_args(make_prediction_parser(""), options))
    assert not cudnn.allow_tf32 and not matmul.allow_tf32 and cudnn.deterministic


OUT_OF_MEMORY = [
    "CUDA out of memory. Tried to allocate 2.00 GiB.\nmore",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: out of memory",
    "NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'",
    "[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory",
    "could not create a primitive",
    "cuDNN error: CUDNN_STATUS_HOST_ALLOCATION_FAILED",
]
LOST_WORKER = [  # the second and third are of a /dev/shm that is too small: docker gives 64 MB
    "DataLoader worker (pid 17) is killed by signal: Killed.",
    "unable to write to file </torch_17_4711_0>: No space left on device (28)",
    "unable to allocate shared memory(shm) for file </torch_17_4711_0>: Resource temporarily unavailable (11)",
]
OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("NCCL error: Cuda failure 217 'peer access is not supported'"),
    FileNotFoundError(2, "No such file or directory"),
    RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nof an edited augmentation, say"),
]


def fail(error):
    with enough_memory("do this"):
        raise error


def test_errors_of_memory_are_recognised_whoever_raises_them():
    for error in (MemoryError(), OSError(12, "Cannot allocate memory"), *map(RuntimeError, OUT_OF_MEMORY)):
        assert re.match(r"error: too little memory \([^\n]+\): do this$", refusal(fail, error))
    for worker in map(RuntimeError, LOST_WORKER):
        assert re.search(r"too little memory \(.* type a smaller --num_workers.*--shm-size", refusal(fail, worker))
    for error in OTHERS:
        with pytest.raises(type(error), match=re.escape(str(error))):
            fail(error)


def test_an_out_of_memory_error_says_what_to_type_and_that_works(sample, tmp_path, monkeypatch):
    """A GPU that holds two photos: its error comes from within Lightning's fit, as a real one does."""
    step = LeafModule.training_step

    def small_gpu(self, batch, batch_idx):
        if len(batch["image"]) > 2:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY[0])
        return step(self, batch, batch_idx)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LeafModule, "training_step", small_gpu)
    options = ["--data_dir", sample, *QUICK, "--folds", 0, "--accumulate_grad_batches"]
    said = refusal(train.main, parse(*options, 2))
    assert re.search("too little memory .* type --accumulate_grad_batches 2 or more", said)
    train.main(parse(*options, 4))
    assert (tmp_path / "logs" / "results.csv").exists()
