"""Which format a file of a photo has, by how it begins, and which of them cannot be decoded here."""

import io
import re

from PIL import Image

# What cameras and phones write and OpenCV does not decode, or of which it decodes a thumbnail only
FOREIGN = {
    "HEIC": "heic heif hif",
    "JPEG XL": "jxl",
    "Photoshop": "psd psb",
    "raw": "3fr arw cr2 cr3 crw dcr dng erf fff iiq kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw x3f",
}
FOREIGN_SUFFIXES = {f".{suffix}": name for name, suffixes in FOREIGN.items() for suffix in suffixes.split()}
SUFFIXES = {f".{suffix}" for suffix in "jpg jpeg jpe jfif png tif tiff bmp dib webp jp2 j2k gif avif".split()}
FOREIGN_BEGINNINGS = {
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"8BPS": "Photoshop",
    **dict.fromkeys((b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FOVb", b"\0MRM"), "raw"),
}
JPEG, PNG = b"\xff\xd8", b"\x89PNG"
TIFF = (b"II*\0", b"MM\0*")
BEGINNINGS = (JPEG + b"\xff", PNG, *TIFF, b"GIF8", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
WEAK_BEGINNINGS = (b"BM", b"P4", b"P5", b"P6", b"#?R")  # bitmaps, Netpbm, Radiance
# what Pillow raises for a file that it cannot read, its protections against huge ones included
PILLOW_ERRORS = (OSError, ValueError, SyntaxError, TypeError, EOFError, OverflowError, Image.DecompressionBombError)
REDUCED, DNG_VERSION = 254, 50706  # TIFF tags: that the picture is a smaller copy of another, and what only a DNG has


def foreign_format(path, content):
    """The name of a format that holds photos but that we cannot decode, or None; content: the file's bytes, uint8 (n,)."""
    head = content[:64].tobytes()
    for beginning, name in FOREIGN_BEGINNINGS.items():
        if head.startswith(beginning):
            return name
    if head[4:8] == b"ftyp" and b"avif" not in head and re.match(rb"he[iv][a-z]|m[is]f1", head[8:12]):
        return "HEIC"
    if head[4:12] == b"ftypcrx " or head.startswith(TIFF) and (head[8:10] == b"CR" or holds_raw(content)):
        return "raw"
    return None if head.startswith((JPEG, PNG)) else FOREIGN_SUFFIXES.get(path.suffix.lower())


def holds_raw(content):
    """Whether a TIFF is a camera's raw file: its first picture is a reduced one, or it says that it is a DNG."""
    try:
        with Image.open(io.BytesIO(content)) as picture:
            return bool(picture.tag_v2.get(REDUCED, 0) & 1) or DNG_VERSION in picture.tag_v2
    except PILLOW_ERRORS:  # OpenCV decides about it
        return False
