"""All five steps in one Kaggle session, or as many as fit; the next session goes on. Packed and sent by tools.kaggle.

Reads   /kaggle/input: the competition's data; perhaps the output of the session before, weights, wheels.
Writes  /kaggle/working: the log directories, the CSV files of the steps, in the end submission_mix.csv.
Expect  each command as it is run; in the end what is done, or that another session is needed.
"""

import base64
import hashlib
import io
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

STARTED = time.monotonic()
PACKED = {}  # tools.kaggle puts here: two archives, the options of train.py, the session's number and its hours
ROOT = Path(os.environ.get("KAGGLE_ROOT", "/kaggle"))
INPUT, WORKING, TEMP = ROOT / "input", ROOT / "working", ROOT / "temp"  # the last is no part of the output
REPO, STEPS_DONE = TEMP / "repository", WORKING / "steps_done.txt"
ANALYSIS = ("matplotlib", "Jinja2", "grad-cam", "cleanlab", "ImageHash")  # the five steps do without them
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


def find_data():
    """The folder of the competition's data among the inputs."""
    for path in sorted(INPUT.rglob("train.csv")):
        if (path.parent / "images").is_dir():
            return path.parent
    raise SystemExit(f"error: no train.csv beside images/ in {INPUT}: attach the competition's data, accept its rules")


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


def main():
    WORKING.mkdir(parents=True, exist_ok=True)
    take_over()
    shutil.rmtree(REPO, ignore_errors=True)  # of another push in the same session
    unpack(PACKED["repository"], REPO)
    unpack(PACKED["files"], WORKING)
    install()
    # the image cache has 4 GB: not into the 20 GB of the output
    places = ["--data_dir", str(find_data()), "--cache_dir", str(TEMP / "image_cache")]
    weights = sorted(map(str, INPUT.rglob("*se_resnext50_32x4d*.pth")))[:1]  # attached, or they are downloaded
    train = ["train.py", *places, *(["--weights", *weights] if weights else []), *shlex.split(PACKED["options"])]
    soft = ["--soft_labels_filename", "soft_labels.csv", "--log_dir", "logs_submit_distill"]
    predict, predict_again = (["generate_soft_labels.py", *places], ["generate_distilled_submission.py", *places])
    for step in (train, predict, [*train, *soft], predict_again, ["blend.py"]):
        # after a change of files or options the step itself says whether what is there can be kept
        key = hashlib.sha256((PACKED["repository"] + PACKED["files"] + shlex.join(step)).encode()).hexdigest()
        if not STEPS_DONE.exists() or key not in STEPS_DONE.read_text():
            run([sys.executable, str(REPO / step[0]), *step[1:]])
            with open(STEPS_DONE, "a") as file:
                file.write(f"{step[0]} {key}\n")
    print(f"done after {(time.monotonic() - STARTED) / 60:.0f} minutes: {WORKING / 'submission_mix.csv'}", flush=True)


if __name__ == "__main__":
    main()
