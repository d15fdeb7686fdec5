"""README.md and docs/: the files, links, commands and options that they name are there."""

import contextlib
import io
import re
import runpy
import sys
from functools import cache

import pytest

from student_teacher.runtime.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "data" / "README.md", ROOT / "model" / "pretrained" / "README.md"]
PLACES = ROOT, ROOT / "src", ROOT / "src" / "student_teacher"  # that files are named relative to
LARGEST_README = 8_192  # bytes
FENCED = re.compile(r"^```.*?\n(.*?)^```", re.DOTALL | re.MULTILINE)

pages = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


def pieces_of_code(page):
    """The lines of code blocks without comments, and what stands between backticks."""
    text = page.read_text()
    for block in FENCED.findall(text):
        yield from (line.split(" #")[0] for line in block.replace("\\\n", " ").splitlines())
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCED.sub("", text)))


def commands(page):
    """Script and options of each command that runs a Python script."""
    for piece in pieces_of_code(page):
        if found := re.search(r"(\S+\.py)(\s.*|$)", piece):
            yield found[1], options_in(found[2])


def options_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


def place_of(name, page):
    """Where a file or folder is that a page names; None where it is missing."""
    return next((path for place in (*PLACES, page.parent) if (path := place / name).exists()), None)


@cache
def known_options(script):
    """What --help of a script names."""
    before, shown = (sys.argv, list(sys.path)), io.StringIO()
    sys.argv = [str(script), "--help"]
    try:
        with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as ending:
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before
    assert ending.value.code == 0
    return options_in(shown.getvalue())


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= LARGEST_README


def test_the_readme_names_every_page_and_room():
    text = (ROOT / "README.md").read_text()
    rooms = [path.parent.name for path in (ROOT / "src" / "student_teacher").glob("*/__init__.py")]
    wanted = [f"({page.relative_to(ROOT)})" for page in PAGES[1:-1]] + [f"    {room}/" for room in rooms]
    assert [name for name in wanted if name not in text] == []


@pages
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)), f"{target}#{anchor}"


@pages
def test_files_that_are_named_exist(page):
    code = "\n".join(pieces_of_code(page))
    files = re.findall(r"[\w./-]+\.(?:py|sh|md|txt|toml)\b", code)
    folders = re.findall(r"(?<![\w/])(?:src|tests|benchmarks|docs|examples|model/pretrained)/[\w./-]*", code)
    assert [name for name in files + folders if place_of(name, page) is None] == []


@pages
def test_options_of_commands_are_known(page):
    for script, options in commands(page):
        if options:
            assert options <= known_options(place_of(script, page)), script


def test_options_that_stand_alone_are_those_of_a_command():
    known = options_in((ROOT / "mvtec_dataset.sh").read_text())
    for script in {place_of(script, page) for page in PAGES for script, options in commands(page) if options}:
        known |= known_options(script)
    for page in PAGES:
        alone = {option for piece in pieces_of_code(page) if piece.startswith("--") for option in options_in(piece)}
        assert alone <= known, page
