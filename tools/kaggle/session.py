"""All five steps in one Kaggle session, or as many as fit; the next session goes on. Packed and sent by tools.kaggle.

Reads   /kaggle/input: the competition's data; perhaps the output of the session before, weights, wheels.
Writes  /kaggle/working: the log directories, the CSV files of the steps, in the end submission_mix.csv.
Expect  each command as it is run; in the end what is done, or that another session is needed.
"""

import base64
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

STARTED = time.monotonic()
PACKED = {}  # tools.kaggle puts here: the repository, the options of train.py, the session's number and its hours
ROOT = Path(os.environ.get("KAGGLE_ROOT", "/kaggle"))
INPUT, WORKING, REPO = ROOT / "input", ROOT / "working", ROOT / "temp" / "repository"
LOG_DIRS = ("logs", "logs_submit_distill")
ANALYSIS = ("matplotlib", "Jinja2", "grad-cam", "cleanlab", "ImageHash")  # what the five steps do without
BUILDS = (  # of OpenCV: one is enough, two break each other
    "opencv-python-headless",
    "opencv-python",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
)


def end(message):
    raise SystemExit(f"error: {message}")


def unpack():
    """Lay out the repository in ROOT/temp, which is no part of the output."""
    REPO.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(PACKED["repository"]))) as archive:
        archive.extractall(REPO, filter="data")


def install():
    """Install the packages of requirements.txt that are missing here, or too old or new, and no others."""
    needed = []
    for line in (REPO / "requirements.txt").read_text().splitlines():
        requirement = line.split("#")[0].replace(" ", "")
        if requirement and not re.match("|".join(ANALYSIS), requirement) and not is_there(requirement):
            needed.append(requirement)
    if needed:
        wheels = sorted({str(path.parent) for path in INPUT.rglob("*.whl")})
        offline = ["--no-index", *(word for folder in wheels for word in ("--find-links", folder))] if wheels else []
        run([sys.executable, "-m", "pip", "install", "--quiet", *offline, *needed])


def is_there(requirement):
    """Whether a requirement, NAME with ==, >= or < and a version, is met by what is installed."""
    name, limits = re.fullmatch(r"([\w.-]+)(.*)", requirement).groups()
    names = BUILDS if name in BUILDS else (name,)
    found = next((numbers(there) for there in map(installed_version, names) if there), None)
    if found is None:
        return False
    for limit in filter(None, limits.split(",")):
        operator, wanted = re.fullmatch(r"(==|>=|<)(.*)", limit).groups()
        wanted = numbers(wanted)
        length = max(len(found), len(wanted))
        found, wanted = (parts + (0,) * (length - len(parts)) for parts in (found, wanted))
        if not {"==": found == wanted, ">=": found >= wanted, "<": found < wanted}[operator]:
            return False
    return True


def installed_version(name):
    """The version of an installed package, text, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def numbers(text):
    """A version as a tuple that can be compared; what comes after a + or a letter is left out."""
    return tuple(int(part) for part in re.match(r"[\d.]*\d", text).group().split("."))


def find_data():
    """The folder of the competition's data among the inputs."""
    for path in sorted(INPUT.rglob("train.csv")):
        if (path.parent / "images").is_dir():
            return path.parent
    end(f"no train.csv beside images/ below {INPUT}: attach the competition's data and accept its rules")


def take_over():
    """Copy what an earlier session has left, attached as an input, which is read-only, to ROOT/working."""
    found = [path.parent for path in INPUT.rglob("hparams.yaml") if path.parent.name in LOG_DIRS]
    kept = sorted(
        found, key=lambda folder: [int(n) for n in re.findall(r"\d+", str(folder))], reverse=True
    )  # last first
    for folder in kept:
        if not (WORKING / folder.name).exists():
            print(f"going on from {folder}", flush=True)
            shutil.copytree(folder, WORKING / folder.name, copy_function=shutil.copyfile)
            for path in folder.parent.glob("*.csv"):
                shutil.copyfile(path, WORKING / path.name)


def find_weights():
    """The option that names the starting weights: an attached file, or none, so that they are downloaded."""
    found = sorted(INPUT.rglob("*se_resnext50_32x4d*.pth"))
    return ["--weights", str(found[0])] if found else []


def run(command):
    """Run a command to its end, or to that of the session: then it is told to stop, which keeps what it has done."""
    print("$ " + shlex.join(command), flush=True)
    process = subprocess.Popen(command, cwd=WORKING, start_new_session=True)
    while process.poll() is None:
        if time.monotonic() > STARTED + PACKED["hours"] * 3600:
            os.kill(process.pid, signal.SIGTERM)
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # what it has written is whole
            print(
                "The session is nearly over; what is done is kept. Send the next one, which goes on from this output: "
                f"python -m tools.kaggle NAME --session {PACKED['session'] + 1}",
                flush=True,
            )
            raise SystemExit(0)
        time.sleep(0.2)
    if process.returncode:
        end(f"that command ended with status {process.returncode}")


def main():
    WORKING.mkdir(parents=True, exist_ok=True)
    unpack()
    install()
    data, cache = find_data(), ROOT / "temp" / "image_cache"  # of 4 GB: not into the 20 GB of the output
    take_over()
    places = ["--data_dir", str(data), "--cache_dir", str(cache)]
    training = [*places, *find_weights(), *shlex.split(PACKED["options"])]
    steps = [  # the script, its options, and the file that is there when nothing of it is left to do
        ("train.py", training, None),
        ("generate_soft_labels.py", places, "submission.csv"),
        ("train.py", [*training, "--soft_labels_filename", "soft_labels.csv", "--log_dir", LOG_DIRS[1]], None),
        ("generate_distilled_submission.py", places, "submission_distill.csv"),
        ("blend.py", [], "submission_mix.csv"),
    ]
    for script, options, result in steps:
        if result is None or not (WORKING / result).exists():
            run([sys.executable, str(REPO / script), *options])
    print(f"done after {(time.monotonic() - STARTED) / 60:.0f} minutes: {WORKING / 'submission_mix.csv'}", flush=True)


if __name__ == "__main__":
    PACKED = json.loads(PACKED) if isinstance(PACKED, str) else PACKED
    main()
