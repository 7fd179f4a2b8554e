"""All five steps in one session on Kaggle's machines, where the competition's data lies, or as many as fit.

  python -m tools.kaggle NAME                 # your name at Kaggle
  kaggle kernels push -p kaggle_push --accelerator NvidiaTeslaT4 --timeout 42600
  kaggle kernels status NAME/plant-pathology-1
  kaggle kernels output NAME/plant-pathology-1 -p kaggle_output
  python -m tools.kaggle NAME --session 2     # if the first says that another one is needed; then push again

Reads   the scripts of the five steps, every file of this repository that they import, and requirements.txt.
Writes  kaggle_push/: kernel-metadata.json and run.py. That is this file with all of them inside: at Kaggle it runs the
        steps, on /kaggle/input: the data; perhaps the output of the session before, weights, wheels.
Expect  at Kaggle each command as it is run, and in the end /kaggle/working/submission_mix.csv.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

PACKED = {}  # in run.py: two archives, the options of train.py, the session's number and its hours
if not PACKED:  # at Kaggle the repository is still to be unpacked
    from harness.console import InputError, Parser, file_or_folder, parse_args, positive, positive_number, say
    from harness.files import atomic_write
    from harness.record import source_files

STEPS = ("train.py", "generate_soft_labels.py", "generate_distilled_submission.py", "blend.py")
SLUG = "plant-pathology"
LARGEST_SCRIPT = 1_000_000  # bytes that Kaggle takes
# As the original on two GPUs: 16 photos at a time in batch norm. Half the memory of 32, for a T4 of 16 GB.
OPTIONS = "--train_batch_size 32 --accumulate_grad_batches 2 --parallel_folds"

# ---------------------------------------------------------------------------------------------- here


def pack(files):
    """Files, dict of name to path, as a tar archive in base64, text. The same files give the same text."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for name, path in sorted(files.items()):
            member, content = tarfile.TarInfo(name), Path(path).read_bytes()
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return base64.b64encode(buffer.getvalue()).decode()


def write_script(path, files, **settings):
    """Write the one file that Kaggle runs. files: names of files to lay out beside the results."""
    scripts = {name: script for step in STEPS for name, script in source_files(step).items()}
    scripts["requirements.txt"] = Path(__file__).parent.parent / "requirements.txt"
    packed = {"repository": pack(scripts), "files": pack({name: name for name in files}), **settings}
    text = Path(__file__).read_text(encoding="utf-8").replace("\nPACKED = {}", f"\nPACKED = {packed!r}")
    if len(text) > LARGEST_SCRIPT:
        raise InputError(f"{path} would have {len(text) / 1e6:.1f} MB, but Kaggle takes 1 MB: pack fewer --files")
    with atomic_write(path, "w") as file:
        file.write(text)


def describe_kernel(name, session, datasets):
    """kernel-metadata.json, dict. A session after the first has the output of the one before among its inputs."""
    kind = {"language": "python", "kernel_type": "script", "code_file": "run.py", "is_private": True}
    # some who left out the machine got a P100, for which today's torch holds no code
    machine = {"enable_gpu": True, "enable_internet": True, "machine_shape": "NvidiaTeslaT4"}
    inputs = {"competition_sources": ["plant-pathology-2020-fgvc7"], "dataset_sources": datasets}
    inputs["kernel_sources"] = [f"{name}/{SLUG}-{session - 1}"] if session > 1 else []
    return {"id": f"{name}/{SLUG}-{session}", "title": f"{SLUG}-{session}", **kind, **machine, **inputs}


def kaggle_name(text):
    if not re.fullmatch(r"[a-z0-9-]+", text):
        raise argparse.ArgumentTypeError(f"{text} is no name at Kaggle: lower case letters, digits and - only")
    return text


def packable_file(text):
    if not Path(text).is_file() or Path(text).is_absolute() or ".." in Path(text).parts:
        raise argparse.ArgumentTypeError(f"{text} is not a file in the working directory or in a folder below it")
    return Path(text).as_posix()


def main():
    """Read the command line and pack."""
    parser = Parser(__doc__)
    add, files = parser.add_argument, {"type": packable_file, "nargs": "+", "metavar": "FILE"}
    add("name", type=kaggle_name, help="your name at Kaggle, as in the address of your profile")
    add("--session", type=positive, default=1, metavar="N", help="2 for the one that goes on from the first, …")
    add("--options", default=OPTIONS, help="options of train.py, in quotes: --options='…'")
    add("--files", **files, help="files that an edit of the recipe reads, such as a CSV of an earlier run")
    add("--dataset", nargs="+", metavar="OWNER/NAME", help="data sets to attach: ImageNet weights, Python wheels")
    add("--hours", type=positive_number, default=11.5, help="stop after this time; what is done is kept")
    add("--out", type=file_or_folder, default="kaggle_push", metavar="FOLDER", help="folder to write")
    args = parse_args(parser)
    script = Path(args.out) / "run.py"
    write_script(script, args.files or [], options=args.options, session=args.session, hours=args.hours)
    with atomic_write(Path(args.out) / "kernel-metadata.json", "w") as file:
        json.dump(describe_kernel(args.name, args.session, args.dataset or []), file, indent=2)
    push = f"kaggle kernels push -p {args.out} --accelerator NvidiaTeslaT4 --timeout 42600"
    say(f"wrote {script} ({script.stat().st_size / 1e3:.0f} kB) and kernel-metadata.json. Now: {push}")


# ---------------------------------------------------------------------------------------------- at Kaggle

STARTED = time.monotonic()
ROOT = Path(os.environ.get("KAGGLE_ROOT", "/kaggle"))
INPUT, WORKING, TEMP = ROOT / "input", ROOT / "working", ROOT / "temp"  # the last is no part of the output
REPO, STEPS_DONE = TEMP / "repository", WORKING / "steps_done.txt"
ANALYSIS = ("matplotlib", "Jinja2", "cleanlab", "ImageHash")  # the five steps do without them
# Builds of OpenCV: one is enough, two break each other.
BUILDS = [f"opencv-{kind}" for kind in ("python-headless", "python", "contrib-python", "contrib-python-headless")]


def take_over():
    """Copy the output of the session before, which is attached as an input and so read-only, to WORKING."""
    outputs = {path.parent.parent for path in INPUT.rglob("logs/hparams.yaml")}
    latest = sorted(outputs, key=lambda folder: [int(n) for n in re.findall(r"\d+", str(folder))])[-1:]
    for output in latest if not (WORKING / "logs").exists() else ():
        print(f"going on from {output}", flush=True)
        shutil.copytree(output, WORKING, dirs_exist_ok=True, copy_function=shutil.copyfile)


def unpack(packed, folder):
    """Lay out an archive in `folder`, but for the files that are there: in WORKING those of the session before count."""
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(packed))) as archive:
        missing = [member for member in archive if not (folder / member.name).exists()]
        archive.extractall(folder, missing, filter="data")


def install():
    """Install the packages of requirements.txt that are missing here, too old or too new, and no others."""
    lines = [line.split("#")[0].strip() for line in (REPO / "requirements.txt").read_text().splitlines()]
    wanted = [Requirement(line) for line in lines if line]
    needed = [str(package) for package in wanted if package.name not in ANALYSIS and not is_there(package)]
    if needed:
        wheels = sorted({f"--find-links={path.parent}" for path in INPUT.rglob("*.whl")})
        run([sys.executable, "-m", "pip", "install", "--quiet", *["--no-index"] * bool(wheels), *wheels, *needed])


def is_there(package):
    """Whether a Requirement is met by what is installed: for OpenCV by any of its builds."""
    for name in BUILDS if package.name in BUILDS else [package.name]:
        try:
            return package.specifier.contains(version(name), prereleases=True)
        except PackageNotFoundError:
            continue
    return False


def run(command):
    """Run a command to its end, or kill it when the session is nearly over: what it has written is whole."""
    print("$ " + shlex.join(command), flush=True)
    process = subprocess.Popen(command, cwd=WORKING, start_new_session=True)
    while process.poll() is None:
        if time.monotonic() > STARTED + PACKED["hours"] * 3600:
            os.killpg(process.pid, signal.SIGKILL)
            again = f"python -m tools.kaggle NAME --session {PACKED['session'] + 1}"
            print(f"The session is nearly over. Send the next one, which goes on from this output: {again}", flush=True)
            raise SystemExit(0)
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"error: that command ended with status {process.returncode}")


def run_steps():
    WORKING.mkdir(parents=True, exist_ok=True)
    take_over()
    shutil.rmtree(REPO, ignore_errors=True)  # of another push in the same session
    unpack(PACKED["repository"], REPO)
    unpack(PACKED["files"], WORKING)
    install()
    data = sorted(str(path.parent) for path in INPUT.rglob("train.csv") if (path.parent / "images").is_dir())
    if not data:
        raise SystemExit(
            f"error: no train.csv beside images/ in {INPUT}: attach the competition's data, accept its rules"
        )
    places = ["--data_dir", data[0], "--cache_dir", str(TEMP / "image_cache")]  # of 4 GB, the output may have 20
    weights = sorted(str(path) for path in INPUT.rglob("*se_resnext50_32x4d*.pth"))[:1]  # or they are downloaded
    train = [STEPS[0], *places, *(["--weights", *weights] if weights else []), *shlex.split(PACKED["options"])]
    again = [*train, "--soft_labels_filename", "soft_labels.csv", "--log_dir", "logs_submit_distill"]
    for step in (train, [STEPS[1], *places], again, [STEPS[2], *places], [STEPS[3]]):
        # after an edit or with other options the step itself says whether what is there can be kept
        key = hashlib.sha256((PACKED["repository"] + shlex.join(step)).encode()).hexdigest()
        if not STEPS_DONE.exists() or key not in STEPS_DONE.read_text():
            run([sys.executable, str(REPO / step[0]), *step[1:]])
            with open(STEPS_DONE, "a") as file:
                file.write(f"{step[0]} {key}\n")
    print(f"done after {(time.monotonic() - STARTED) / 60:.0f} minutes: {WORKING / 'submission_mix.csv'}", flush=True)


if __name__ == "__main__":
    run_steps() if PACKED else main()
