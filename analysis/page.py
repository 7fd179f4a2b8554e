"""Pages in one file, that need no network, from the templates beside this file."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from analysis.figures import colours
from harness.files import atomic_write
from utils import CLASSES


def write_page(path, template, page):
    """Fill a template of this folder with a dict, and write it whole or not at all."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    text = environment.get_template(template).render(classes=CLASSES, colours=colours(len(CLASSES)), **page)
    with atomic_write(path, "w") as file:
        file.write(text)
