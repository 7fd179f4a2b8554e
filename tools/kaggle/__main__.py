"""Pack the five steps as a script for Kaggle's machines, where the competition's data lies: what `kaggle` pushes.

  python -m tools.kaggle NAME                 # your name at Kaggle
  kaggle kernels push -p kaggle_push --accelerator NvidiaTeslaT4 --timeout 42600
  kaggle kernels status NAME/plant-pathology-1
  kaggle kernels output NAME/plant-pathology-1 -p kaggle_output
  python -m tools.kaggle NAME --session 2     # if the first says that another one is needed; then push again

Reads   the scripts, harness/ and requirements.txt of this repository.
Writes  kaggle_push/: run.py, which holds them all, and kernel-metadata.json.
"""

import argparse
import base64
import io
import json
import re
import tarfile
from pathlib import Path

from harness.console import Parser, file_or_folder, parse_args, positive, positive_number, say
from harness.files import atomic_write

REPO = Path(__file__).parent.parent.parent
SLUG = "plant-pathology"
COMPETITION = "plant-pathology-2020-fgvc7"
# As the original on two GPUs: 16 photos at a time in batch norm. Half the memory of 32, for a T4 of 16 GB.
OPTIONS = "--train_batch_size 32 --accumulate_grad_batches 2 --parallel_folds"


def pack_repository():
    """The files that the five steps run, as a tar archive in base64, text."""
    files = [*REPO.glob("*.py"), *REPO.glob("harness/*.py"), REPO / "requirements.txt"]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for path in sorted(files):
            archive.add(path, path.relative_to(REPO).as_posix())
    return base64.b64encode(buffer.getvalue()).decode()


def write_script(path, options, session, hours):
    """Write the one file that Kaggle runs: session.py with the repository inside it."""
    packed = json.dumps({"repository": pack_repository(), "options": options, "session": session, "hours": hours})
    text = (Path(__file__).parent / "session.py").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("PACKED = "))
    with atomic_write(path, "w") as file:
        file.write(text.replace(line, f"PACKED = {packed!r}"))


def describe_kernel(name, session, datasets=()):
    """kernel-metadata.json, dict. A session after the first has the output of the one before among its inputs."""
    return {
        "id": f"{name}/{SLUG}-{session}",
        "title": f"{SLUG}-{session}",
        "code_file": "run.py",
        "language": "python",
        "kernel_type": "script",
        "is_private": True,
        "enable_gpu": True,
        "enable_internet": True,
        "machine_shape": "NvidiaTeslaT4",  # some who left it out got a P100, for which today's torch holds no code
        "competition_sources": [COMPETITION],
        "dataset_sources": list(datasets),
        "kernel_sources": [f"{name}/{SLUG}-{session - 1}"] if session > 1 else [],
    }


def kaggle_name(text):
    if not re.fullmatch(r"[a-z0-9-]+", text):
        raise argparse.ArgumentTypeError(f"{text} is no name at Kaggle: lower case letters, digits and - only")
    return text


def main(args):
    folder = Path(args.out)
    write_script(folder / "run.py", args.options, args.session, args.hours)
    with atomic_write(folder / "kernel-metadata.json", "w") as file:
        json.dump(describe_kernel(args.name, args.session, args.dataset), file, indent=2)
    size = (folder / "run.py").stat().st_size
    say(
        f"wrote {folder}: run.py ({size / 1e3:.0f} kB) and kernel-metadata.json. Now: kaggle kernels push -p {folder} "
        "--accelerator NvidiaTeslaT4 --timeout 42600"
    )


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("name", type=kaggle_name, help="your name at Kaggle, as in the address of your profile")
    group = parser.add_argument_group("the session")
    group.add_argument("--session", type=positive, default=1, metavar="N", help="the N-th, after N - 1 were cut short")
    group.add_argument(
        "--dataset", nargs="+", default=[], metavar="OWNER/NAME", help="data sets to attach: ImageNet weights, wheels"
    )
    group.add_argument("--options", default=OPTIONS, help="of train.py, in one word")
    group.add_argument("--hours", type=positive_number, default=11.5, help="after so many hours what is done is kept")
    group.add_argument("--out", type=file_or_folder, default="kaggle_push", metavar="FOLDER", help="where it is packed")
    main(parse_args(parser))
