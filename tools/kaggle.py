"""All five steps in one session on Kaggle's machines, where the competition's data lies, or as many as fit.

  python -m tools.kaggle NAME                 # your name at Kaggle
  kaggle kernels push -p kaggle_push --accelerator NvidiaTeslaT4 --timeout 42600
  kaggle kernels output NAME/plant-pathology-1 -p kaggle_output
  python -m tools.kaggle NAME --session 2     # if the first says that another one is needed; then push again

Reads   the scripts of the five steps, every file of this repository that they import, and requirements.txt.
Writes  kaggle_push/: kernel-metadata.json and run.py. That is this file with all of them inside: at Kaggle it runs the
        steps, on /kaggle/input: the data; perhaps the output of the session before, weights, wheels.
Expect  at Kaggle each command as it is run, and in the end /kaggle/working/submission_mix.csv.
"""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

PACKED = {}  # in run.py: repository and files, dicts of name to bytes; the options of train.py, session and hours
if not PACKED:  # at Kaggle the repository is still to be unpacked
    from harness.console import InputError, Parser, file_or_folder, parse_args, positive, positive_number, say
    from harness.files import atomic_write
    from harness.record import source_files

STEPS = ("train.py", "generate_soft_labels.py", "generate_distilled_submission.py", "blend.py")
# As the original on two GPUs: 16 photos at a time in batch norm. Half the memory of 32, for a T4 of 16 GB.
OPTIONS = "--train_batch_size 32 --accumulate_grad_batches 2 --parallel_folds"


def write_script(path, files, **settings):
    """Write the one file that Kaggle runs. files: names of files to lay out beside the results."""
    for name in files:
        if not Path(name).is_file() or Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"--files: {name} is not a file in the working directory or in a folder below it")
    scripts = {name: script.read_bytes() for step in STEPS for name, script in source_files(step).items()}
    scripts["requirements.txt"] = (Path(__file__).parent.parent / "requirements.txt").read_bytes()
    beside = {Path(name).as_posix(): Path(name).read_bytes() for name in files}
    packed = {"repository": scripts, "files": beside, **settings}
    text = Path(__file__).read_text(encoding="utf-8").replace("\nPACKED = {}", f"\nPACKED = {packed!r}")
    if len(text) > 1_000_000:
        raise InputError(f"{path} would have {len(text) / 1e6:.1f} MB, but Kaggle takes 1 MB: pack fewer --files")
    with atomic_write(path, "w") as file:
        file.write(text)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("name", help="your name at Kaggle, as in the address of your profile")
    add("--session", type=positive, default=1, metavar="N", help="2 for the one that goes on from the first, …")
    add("--options", default=OPTIONS, help="options of train.py, in quotes: --options='…'")
    add("--files", nargs="+", metavar="FILE", help="files that an edit reads, such as a CSV of an earlier run")
    add("--dataset", nargs="+", metavar="OWNER/NAME", help="data sets to attach: ImageNet weights, Python wheels")
    add("--hours", type=positive_number, default=11.5, help="stop after this time; what is done is kept")
    add("--out", type=file_or_folder, default="kaggle_push", metavar="FOLDER", help="folder to write")
    args = parse_args(parser)
    script = Path(args.out) / "run.py"
    write_script(script, args.files or [], options=args.options, session=args.session, hours=args.hours)
    kernel = {"id": f"{args.name}/plant-pathology-{args.session}", "title": f"plant-pathology-{args.session}"}
    kernel |= {"language": "python", "kernel_type": "script", "code_file": "run.py", "is_private": True}
    # some who left out the machine got a P100, for which today's torch holds no code
    kernel |= {"enable_gpu": True, "enable_internet": True, "machine_shape": "NvidiaTeslaT4"}
    kernel |= {"competition_sources": ["plant-pathology-2020-fgvc7"], "dataset_sources": args.dataset or []}
    kernel["kernel_sources"] = [f"{args.name}/plant-pathology-{args.session - 1}"] if args.session > 1 else []
    with atomic_write(Path(args.out) / "kernel-metadata.json", "w") as file:
        json.dump(kernel, file, indent=2)
    push = f"kaggle kernels push -p {args.out} --accelerator NvidiaTeslaT4 --timeout 42600"
    say(f"wrote {script} and kernel-metadata.json. Now: {push}")


# ---------------------------------------------------------------------------------------------- at Kaggle

STARTED = time.monotonic()
ROOT = Path(os.environ.get("KAGGLE_ROOT", "/kaggle"))
INPUT, WORKING, TEMP = ROOT / "input", ROOT / "working", ROOT / "temp"  # the last is no part of the output
REPO, STEPS_DONE = TEMP / "repository", WORKING / "steps_done.txt"
ANALYSIS = ("matplotlib", "Jinja2", "cleanlab", "ImageHash")  # the five steps do without them


def unpack(files, folder):
    """Write files, dict of name to bytes, but for those that are there: in WORKING those of the session before count."""
    for name, content in files.items():
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def install():
    """Install the packages of requirements.txt that are missing here, too old or too new, and no others."""
    lines = [line.split("#")[0].strip() for line in (REPO / "requirements.txt").read_text().splitlines()]
    wanted = [Requirement(line) for line in lines if line]
    needed = [str(package) for package in wanted if package.name not in ANALYSIS and not is_there(package)]
    if needed:
        wheels = sorted({f"--find-links={path.parent}" for path in INPUT.rglob("*.whl")})
        run([sys.executable, "-m", "pip", "install", "--quiet", *["--no-index"] * bool(wheels), *wheels, *needed])


def is_there(package):
    """Whether what is installed meets a Requirement; any build of OpenCV is taken for ours, as two break each other."""
    builds = [f"opencv-{kind}" for kind in ("python-headless", "python", "contrib-python", "contrib-python-headless")]
    for name in builds if package.name in builds else [package.name]:
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
            following = f"python -m tools.kaggle NAME --session {PACKED['session'] + 1}"
            print(f"The session is nearly over. To go on: {following}")
            raise SystemExit(0)
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"error: that command ended with status {process.returncode}")


def run_steps():
    outputs = [path.parent.parent for path in INPUT.rglob("logs/hparams.yaml")]  # of the session before, read-only
    if outputs and not (WORKING / "logs").exists():
        print(f"going on from {outputs[0]}", flush=True)
        shutil.copytree(outputs[0], WORKING, dirs_exist_ok=True, copy_function=shutil.copyfile)
    shutil.rmtree(REPO, ignore_errors=True)  # of another push in the same session
    unpack(PACKED["repository"], REPO)
    for folder in (WORKING, REPO):  # where it is looked for beside the source file that reads it
        unpack(PACKED["files"], folder)
    install()
    data = sorted(str(path.parent) for path in INPUT.rglob("train.csv") if (path.parent / "images").is_dir())
    if not data:
        raise SystemExit(f"error: no train.csv beside images/ in {INPUT}: attach the competition's data")
    places = ["--data_dir", data[0], "--cache_dir", str(TEMP / "image_cache")]  # of 4 GB, the output may have 20
    weights = sorted(f"--weights={path}" for path in INPUT.rglob("*se_resnext50_32x4d*.pth"))  # or they are downloaded
    train = [STEPS[0], *places, *weights[:1], *shlex.split(PACKED["options"])]
    again = [*train, "--soft_labels_filename", "soft_labels.csv", "--log_dir", "logs_submit_distill"]
    for step in (train, [STEPS[1], *places], again, [STEPS[2], *places], [STEPS[3]]):
        # after an edit or with other options the step itself says whether what is there can be kept
        key = hashlib.sha256(repr((PACKED["repository"], step)).encode()).hexdigest()
        if not STEPS_DONE.exists() or key not in STEPS_DONE.read_text():
            run([sys.executable, str(REPO / step[0]), *step[1:]])
            with open(STEPS_DONE, "a") as file:
                file.write(f"{step[0]} {key}\n")
    print(f"done after {(time.monotonic() - STARTED) / 60:.0f} minutes: {WORKING / 'submission_mix.csv'}", flush=True)


if __name__ == "__main__":
    run_steps() if PACKED else main()
