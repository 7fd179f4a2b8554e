"""Pack the five steps as a script for Kaggle's machines, where the competition's data lies: what `kaggle` pushes.

  python -m tools.kaggle NAME                 # your name at Kaggle
  kaggle kernels push -p kaggle_push --accelerator NvidiaTeslaT4 --timeout 42600
  kaggle kernels status NAME/plant-pathology-1
  kaggle kernels output NAME/plant-pathology-1 -p kaggle_output
  python -m tools.kaggle NAME --session 2     # if the first says that another one is needed; then push again

Reads   the scripts of the five steps, every file of this repository that they import, and requirements.txt.
Writes  kaggle_push/: run.py, which holds them all, and kernel-metadata.json.
"""

import argparse
import base64
import io
import json
import re
import tarfile
from pathlib import Path

from harness.console import InputError, Parser, file_or_folder, parse_args, positive, positive_number, say
from harness.files import atomic_write
from harness.record import source_files

REPO = Path(__file__).parent.parent.parent
STEPS = ("train.py", "generate_soft_labels.py", "generate_distilled_submission.py", "blend.py")
SLUG = "plant-pathology"
LARGEST_SCRIPT = 1_000_000  # bytes that Kaggle takes
# As the original on two GPUs: 16 photos at a time in batch norm. Half the memory of 32, for a T4 of 16 GB.
OPTIONS = "--train_batch_size 32 --accumulate_grad_batches 2 --parallel_folds"


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
    """Write the one file that Kaggle runs: session.py, which holds what the steps import, `files` and the settings."""
    scripts = {name: script for step in STEPS for name, script in source_files(step).items()}
    repository = pack(scripts | {"requirements.txt": REPO / "requirements.txt"})
    packed = {"repository": repository, "files": pack({name: name for name in files}), **settings}
    text = (Path(__file__).parent / "session.py").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("PACKED = "))
    text = text.replace(line, f"PACKED = {packed!r}")
    if len(text) > LARGEST_SCRIPT:
        raise InputError(f"{path} would have {len(text) / 1e6:.1f} MB, but Kaggle takes 1 MB: pack fewer --files")
    with atomic_write(path, "w") as file:
        file.write(text)


def describe_kernel(name, session, datasets):
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
        "competition_sources": ["plant-pathology-2020-fgvc7"],
        "dataset_sources": datasets,
        "kernel_sources": [f"{name}/{SLUG}-{session - 1}"] if session > 1 else [],
    }


def kaggle_name(text):
    if not re.fullmatch(r"[a-z0-9-]+", text):
        raise argparse.ArgumentTypeError(f"{text} is no name at Kaggle: lower case letters, digits and - only")
    return text


def packable_file(text):
    if not Path(text).is_file() or Path(text).is_absolute() or ".." in Path(text).parts:
        raise argparse.ArgumentTypeError(f"{text} is not a file in the working directory or in a folder below it")
    return Path(text).as_posix()


def main(args):
    script, metadata = Path(args.out) / "run.py", Path(args.out) / "kernel-metadata.json"
    write_script(script, args.files, options=args.options, session=args.session, hours=args.hours)
    with atomic_write(metadata, "w") as file:
        json.dump(describe_kernel(args.name, args.session, args.dataset), file, indent=2)
    push = f"kaggle kernels push -p {args.out} --accelerator NvidiaTeslaT4 --timeout 42600"
    say(f"wrote {script} ({script.stat().st_size / 1e3:.0f} kB) and {metadata.name}. Now: {push}")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("name", type=kaggle_name, help="your name at Kaggle, as in the address of your profile")
    parser.add_argument("--session", type=positive, default=1, metavar="N", help="number of this session")
    parser.add_argument("--options", default=OPTIONS, help="options of train.py, in quotes")
    files = {"type": packable_file, "nargs": "+", "default": [], "metavar": "FILE"}
    parser.add_argument(
        "--files", **files, help="files that an edit of the recipe reads, such as a CSV of an earlier run"
    )
    data = {"nargs": "+", "default": [], "metavar": "OWNER/NAME"}
    parser.add_argument("--dataset", **data, help="Kaggle data sets to attach: ImageNet weights, Python wheels")
    parser.add_argument(
        "--hours", type=positive_number, default=11.5, help="stop after this time; what is done is kept"
    )
    parser.add_argument("--out", type=file_or_folder, default="kaggle_push", metavar="FOLDER", help="folder to write")
    main(parse_args(parser))
