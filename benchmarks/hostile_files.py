"""Whether hostile files pass unseen: broken, misnamed or huge ones, links, pipes, among good images.

Makes a folder of about 300 such files, always the same ones, and gives it to detection (--input), to --watch, and as a
category's train/good and test/bad to mvtec_dataset.sh. The detector is trained first, on --category at 128 x 128.

    python3 benchmarks/hostile_files.py

Prints a table: how many files of each kind there are, and how many of them each command decided on or took, named as
not read, or passed over and counted. Below it stand time and highest memory of each command. What must hold: every
command ends in time with the exit status that docs/production.md gives and without a traceback; every file is decided
on, named or counted; every good image is decided on; memory stays below --memory. What does not is a line "WRONG", and
the exit status is then 1.
"""

import csv
import io
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

import measuring  # noqa: E402

from student_teacher.images.reading import encoded  # noqa: E402
from student_teacher.runtime.errors import run, shown  # noqa: E402
from student_teacher.runtime.paths import add_folders  # noqa: E402
from tests.tiff import tiff_of  # noqa: E402

FORMATS = ("PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "PPM", "JPEG2000", "TGA", "PCX", "ICO", "SGI", "DDS", "AVIF")
ENDINGS = ("png", "jpg", "tif", "gif", "webp", "bmp", "ppm", "jp2", "tga", "pcx", "ico", "sgi", "dds", "avif", "eps")
Maker = Callable[[np.random.Generator, int], Iterator[tuple[str, bytes]]]


def noise(random: np.random.Generator, height: int = 40, width: int = 40) -> Image.Image:
    """A picture of random pixels."""
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(width: int, height: int, rows: bytes, *, kind: int = 0, more: bytes = b"") -> bytes:
    """A PNG of one byte a pixel, grey (kind 0), with `rows` as its compressed content."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def blank(length: int) -> bytes:
    """So many zeros, compressed, without holding them in memory."""
    packer, block = zlib.compressobj(9), bytes(2**20)
    parts = [packer.compress(block) for _ in range(length // len(block))]
    return b"".join([*parts, packer.compress(bytes(length % len(block))), packer.flush()])


def truncated(random: np.random.Generator, index: int) -> Iterator[tuple[str, bytes]]:
    """The beginning of a file of each format."""
    for kind, ending in zip(FORMATS, ENDINGS, strict=False):
        content = bytes(encoded(noise(random), kind))
        yield f"cut{index}.{ending}", content[: int(len(content) * random.uniform(0.05, 0.9))]


def random_bytes(random: np.random.Generator, index: int) -> Iterator[tuple[str, bytes]]:
    """Random bytes with the endings of images."""
    for ending in ENDINGS:
        yield f"bytes{index}.{ending}", random.bytes(int(random.integers(1, 5000)))


def headed_bytes(random: np.random.Generator, index: int) -> Iterator[tuple[str, bytes]]:
    """Right at the beginning, random behind it."""
    for kind, ending in zip(FORMATS, ENDINGS, strict=False):
        content = bytes(encoded(noise(random), kind))
        kept = int(random.integers(8, 200))
        yield f"head{index}.{ending}", content[:kept] + random.bytes(len(content) - kept)


def bombs(random: np.random.Generator, index: int) -> Iterator[tuple[str, bytes]]:
    """Small files that say they are huge, or become so."""
    for side, name in ((60_000, "huge"), (13_000, "large")):  # beyond what is read, and within
        yield f"{name}{index}.png", png(side, side, blank(side * (side + 1)) if side < 20_000 else blank(10**8))
    yield f"text{index}.png", png(8, 8, blank(72), more=_chunk(b"zTXt", b"a\0\0" + blank(2**30)))
    yield f"wide{index}.gif", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0\xff\xff\xff\xff\0;"
    yield f"huge{index}.tif", _deflated_tiff(65_000, 65_000, 1, blank(10**8))
    yield f"float{index}.tif", _deflated_tiff(10_000, 10_000, 4, blank(4 * 10**8))
    yield f"large{index}.tif", _deflated_tiff(13_000, 13_000, 1, blank(13_000**2))


def _chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _deflated_tiff(width, height, size, content):
    """A grey TIFF of one strip, of 8 bits or of floating point."""
    tags = [(256, width), (257, height), (258, 8 * size), (259, 8), (262, 1), (273, 8 + 2 + 9 * 12 + 4), (277, 1)]
    tags += [(278, height), (279, len(content))]
    tags += [(339, 3)] if size == 4 else []
    tags = [(tag, value + 12 * (size == 4) if tag == 273 else value) for tag, value in tags]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + content


def odd_sizes(random: np.random.Generator, index: int) -> Iterator[tuple[str, bytes]]:
    """Single pixels, rows and columns."""
    for height, width in ((1, 1), (1, 60_000), (60_000, 1), (1, 3), (2, 2000)):
        for kind, ending in (("PNG", "png"), ("JPEG", "jpg"), ("TIFF", "tif")):
            yield f"{width}x{height}-{index}.{ending}", encoded(noise(random, height, width), kind)


def floats(random: np.random.Generator, index: int) -> Iterator[tuple[str, bytes]]:
    """Floating point that is not finite."""
    for name, value in (("nan", np.nan), ("inf", np.inf), ("minus", -np.inf), ("most", np.finfo(np.float32).max)):
        for form in (np.float32, np.float64):
            pixels = random.random((30, 30)).astype(form)
            pixels[5:9] = value
            yield f"{name}{index}-{form.__name__}.tif", tiff_of(pixels)
    yield f"allnan{index}.tif", tiff_of(np.full((30, 30), np.nan, np.float32))


def wrong_endings(random: np.random.Generator, index: int) -> Iterator[tuple[str, bytes]]:
    """Files of other kinds than their endings say."""
    for number, (kind, ending) in enumerate(zip(FORMATS, ENDINGS[1:], strict=False)):
        yield f"swapped{index}-{number}.{ending}", encoded(noise(random), kind)
    yield f"page{index}.jpg", b"<!DOCTYPE html><html><body>404</body></html>"
    yield f"program{index}.png", b"\x7fELF" + random.bytes(200)
    yield f"loop{index}.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n%%EOF\n"
    yield f"loop{index}.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n%%EOF\n"
    yield f"scan{index}.dcm", random.bytes(300)
    yield f"notes{index}.txt", b"no image"
    yield f"no_ending{index}", encoded(noise(random), "PNG")
    yield f"scan{index}.001", encoded(noise(random), "TIFF")


def empty(random: np.random.Generator, index: int) -> Iterator[tuple[str, bytes]]:
    """Files of no bytes."""
    for ending in ENDINGS:
        yield f"empty{index}.{ending}", b""


def names(random: np.random.Generator, index: int) -> Iterator[tuple[str, bytes]]:
    """Names that lines, tables and file systems may not take."""
    content = bytes(encoded(noise(random), "PNG"))
    for name in (
        "line\nbreak",
        "quote'\"",
        "page#2",
        "😀🎉",
        "x" * 240,
        "a,b;c",
        "-rf",
        "$(id)",
        "\x1b[31mred",
        "<b>&",
    ):
        yield f"{name}{index}.png", content
        yield f"broken {name[:200]}{index}.png", content[:60]
    yield f"hash{index}.png#2", content
    yield f"not\udcff utf-8 {index}.png", content
    yield f"broken not\udcff utf-8 {index}.png", content[:60]
    yield f"{'é' * 120}{index}.png", content
    yield f".hidden{index}.png", content


def pages(random: np.random.Generator, index: int) -> Iterator[tuple[str, bytes]]:
    """Files of several images."""
    frames = [noise(random) for _ in range(3)]
    for kind, ending in (("GIF", "gif"), ("WEBP", "webp"), ("PNG", "png"), ("TIFF", "tif")):
        content = bytes(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
        yield f"pages{index}.{ending}", content
        yield f"cut_pages{index}.{ending}", content[: len(content) * 2 // 3]
    yield f"twin{index}.tif", encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    yield f"twin{index}.tif#2", encoded(frames[0], "TIFF")  # which may be taken for the second page


def tiff_folders(random: np.random.Generator, index: int) -> Iterator[tuple[str, bytes]]:
    """TIFFs whose directories are missing, empty, too long or in a circle."""
    content = bytearray(encoded(noise(random), "TIFF"))
    start = struct.unpack("<I", content[4:8])[0]
    count = struct.unpack("<H", content[start : start + 2])[0]
    following = start + 2 + 12 * count
    loop = content[:following] + struct.pack("<I", start) + content[following + 4 :]
    yield f"ifd_loop{index}.tif", bytes(loop)
    yield f"ifd_none{index}.tif", bytes(content[:4]) + bytes(4) + bytes(content[8:])
    yield f"ifd_empty{index}.tif", b"II*\0" + struct.pack("<IHI", 8, 0, 0)
    yield f"ifd_empty_loop{index}.tif", b"II*\0" + struct.pack("<IHI", 8, 0, 8)
    yield f"ifd_beyond{index}.tif", bytes(content[:4]) + struct.pack("<I", 2**31) + bytes(content[8:])
    yield f"ifd_count{index}.tif", b"II*\0" + struct.pack("<IH", 8, 65535) + random.bytes(100)
    yield f"zero{index}.png", png(0, 0, blank(0))


def broken_exif(random: np.random.Generator, index: int) -> Iterator[tuple[str, bytes]]:
    """JPEGs whose EXIF is not EXIF, or turns the image in no known way."""
    picture = noise(random)
    for number, exif in enumerate((random.bytes(200), b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0" + bytes(50))):
        yield f"exif{index}-{number}.jpg", encoded(picture, "JPEG", exif=exif)
    text = b"Exif\0\0II*\0" + struct.pack("<IHHHI4sI", 8, 1, 0x0112, 2, 4, b"six\0", 0)  # a word for the orientation
    yield f"exif{index}-text.jpg", encoded(picture, "JPEG", exif=text)
    beyond = b"Exif\0\0II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, 99, 0, 0)
    yield f"exif{index}-99.jpg", encoded(picture, "JPEG", exif=beyond)


def colours(random: np.random.Generator, index: int) -> Iterator[tuple[str, bytes]]:
    """Colour profiles and modes."""
    picture = noise(random)
    profile = random.bytes(3 * 10**6)
    yield f"profile{index}.jpg", encoded(picture, "JPEG", icc_profile=profile)
    yield f"profile{index}.png", encoded(picture, "PNG", icc_profile=profile)
    yield f"profile_bomb{index}.png", png(8, 8, blank(72), more=_chunk(b"iCCP", b"a\0\0" + blank(2**30)))
    yield f"cmyk{index}.jpg", encoded(picture.convert("CMYK"), "JPEG")
    yield f"cmyk{index}.tif", encoded(picture.convert("CMYK"), "TIFF")
    yield f"lab{index}.tif", encoded(Image.merge("LAB", picture.split()), "TIFF")
    palette = picture.convert("P", palette=Image.Palette.ADAPTIVE)
    yield f"palette{index}.png", encoded(palette, "PNG", transparency=bytes(range(256)))
    yield f"palette{index}.gif", encoded(palette, "GIF", transparency=3)
    yield f"one_bit{index}.png", encoded(picture.convert("1"), "PNG")


MAKERS: dict[str, tuple[Maker, int]] = {  # and how often each is called
    "truncated": (truncated, 3),
    "random bytes": (random_bytes, 3),
    "random bytes behind a head": (headed_bytes, 3),
    "bombs": (bombs, 1),
    "odd sizes": (odd_sizes, 1),
    "NaN and infinite": (floats, 1),
    "wrong endings": (wrong_endings, 1),
    "empty": (empty, 1),
    "odd names": (names, 1),
    "several pages": (pages, 1),
    "TIFF directories": (tiff_folders, 1),
    "broken EXIF": (broken_exif, 2),
    "colours and profiles": (colours, 1),
}
ODD = "no plain files"


def make_odd(folder: Path) -> Iterator[Path]:
    """Pipes, sockets, links that lead nowhere, in a circle or to devices; folders named as images."""
    os.mkfifo(folder / "pipe.png")
    place = Path.cwd()
    os.chdir(folder)  # a socket's path has room for 107 characters
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
    os.chdir(place)
    links = {"nowhere.png": "missing.png", "circle.png": "circle.png", "zero.png": "/dev/zero", "tty.png": "/dev/tty"}
    links |= {"random.tif": "/dev/urandom", "to_pipe.jpg": "pipe.png", "maps.png": "/proc/self/maps", "up": "."}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (folder / "folder.png").mkdir()
    (folder / "empty.tif").mkdir()
    yield from (folder / name for name in ("pipe.png", "socket.png", *(name for name in links if name != "up")))


def make(folder: Path, *, seed: int = 0, often: int | None = None) -> dict[Path, str]:
    """Fill the folder with hostile files: the kind of each, by its path. `often` replaces the numbers of MAKERS."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    kinds = {path: ODD for path in make_odd(folder)}
    for kind, (maker, times) in MAKERS.items():
        for index in range(times if often is None else often):
            for name, content in maker(random, index):
                path = folder / name
                path.write_bytes(content)
                kinds[path] = kind
    return kinds


def add_good(folder: Path, sources: list[Path]) -> dict[Path, str]:
    """Copies of good images, in the folder and in folders below it, one of them linked."""
    elsewhere = folder.parent / f"{folder.name} linked"
    elsewhere.mkdir()
    (folder / "linked").symlink_to(elsewhere)
    places = [folder, folder / "folder.png", folder / "linked"]
    found = {}
    for number, source in enumerate(sources):
        path = places[number % len(places)] / f"good{number}{source.suffix}"
        shutil.copyfile(source, path)
        found[path] = "good images"
    return found


@dataclass
class Run:
    """What a command did."""

    status: int
    out: str
    err: str
    seconds: float
    gigabytes: float  # the most memory that it held
    wrong: list[str] = field(default_factory=list)

    def names(self, path: Path, folder: Path) -> bool:
        """Whether the command says of a file that it can't be read."""
        told = shown(path), shown(path.relative_to(folder.parent)), shown(path.relative_to(folder))
        return any(re.search(rf"(^|\s|: ){re.escape(each)}(#\d+)?: ", self.err, re.MULTILINE) for each in told)

    @property
    def passed_over(self) -> int:
        """How many files it counts as passed over."""
        return sum(map(int, re.findall(r"passed over (\d+) files?", self.err)))


def called(command: list, timeout: float, *, until: Callable[[], bool] | None = None, **options) -> Run:
    """Run a command; SIGINT once `until` holds. After the timeout it is killed: status -9."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(
            [*map(str, command)], stdout=out, stderr=err, **{"stdin": subprocess.DEVNULL} | options
        )
        found = 0, 0, None
        while not found[0]:
            time.sleep(0.2)
            if time.monotonic() - start > timeout:
                child.kill()
            elif until and until():
                child.send_signal(signal.SIGINT)
                until = None
            found = os.wait4(child.pid, os.WNOHANG)
        child.returncode = os.waitstatus_to_exitcode(found[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="surrogateescape"))
    return Run(child.returncode, *texts, time.monotonic() - start, found[2].ru_maxrss / 2**20)


def decided(run: Run, table: str, kinds: dict[Path, str]) -> set[Path]:
    """The files that a table of decisions names, themselves or a page of theirs."""
    # Tables are UTF-8, with question marks for what is not.
    by_name = {shown(path).replace("\\udcff", "?"): path for path in kinds}
    found = set()
    for row in csv.DictReader(io.StringIO(table, newline="")):
        name = shown(row["path"])
        name = name if name in by_name else re.sub(r"#\d+$", "", name)
        if name in by_name:
            found.add(by_name[name])
        else:
            run.wrong.append(f"decides on {name}, which is not there")
    return found


def judge(run: Run, kinds: dict[Path, str], taken: set[Path], *, folder: Path, status: int, memory: float) -> Counter:
    """Count each kind's files by what became of them; what must hold and does not is added to `run.wrong`."""
    fates = {
        path: "decided" if path in taken else "named" if run.names(path, folder) else "passed over" for path in kinds
    }
    run.wrong += [f"{shown(path)}: good, but {fates[path]}" for path, kind in kinds.items() if kind == "good images"
                  and fates[path] != "decided"]  # fmt: skip
    silent = [path for path, fate in fates.items() if fate == "passed over"]
    if len(silent) != run.passed_over:
        run.wrong.append(f"{run.passed_over} counted as passed over, {len(silent)} are: {[*map(shown, silent)][:40]}")
    judge_ending(run, status, memory)
    return Counter((kinds[path], fate) for path, fate in fates.items())


def judge_ending(run: Run, status: int, memory: float) -> None:
    """What must hold of every command."""
    if run.status != status:
        run.wrong.append(f"exit status {run.status}, not {status}: {run.err[-1500:]}")
    if "Traceback" in run.err:
        run.wrong.append(f"a traceback: {run.err[-1500:]}")
    if run.gigabytes > memory:
        run.wrong.append(f"{run.gigabytes:.1f} GB of memory")


def inspected(args: Namespace, base: list, folder: Path, kinds: dict[Path, str]) -> tuple[Run, Counter]:
    """--input."""
    output = args.scratch / "inspection"
    found = called([*base, "--input", folder, "--output", output], args.timeout)
    table = output / "decisions.csv"
    text = table.read_bytes().decode(errors="surrogateescape") if table.exists() else "path\n"
    return found, judge(found, kinds, decided(found, text, kinds), folder=folder, status=3, memory=args.memory)


def watched(args: Namespace, base: list, folder: Path, kinds: dict[Path, str]) -> tuple[Run, Counter]:
    """--watch --input, until nothing more is decided for 20 seconds."""
    output = args.scratch / "watch"
    table = output / "decisions.csv"

    def quiet() -> bool:
        return table.exists() and table.stat().st_size > 100 and time.time() - table.stat().st_mtime > args.quiet

    found = called([*base, "--watch", "--input", folder, "--output", output], args.timeout, until=quiet)
    text = table.read_bytes().decode(errors="surrogateescape") if table.exists() else "path\n"
    return found, judge(found, kinds, decided(found, text, kinds), folder=folder, status=0, memory=args.memory)


def named_in_lines(args: Namespace, base: list, folder: Path, kinds: dict[Path, str]) -> tuple[Run, Counter]:
    """--input -, with every path on a line, but those that have an end of line in them."""
    lines = {path: kind for path, kind in kinds.items() if "\n" not in str(path)}
    output = args.scratch / "lines"
    text = b"\n".join(os.fsencode(path) for path in lines) + b"\n\n" + b"x" * 5000 + b"\nzero\0byte.png\n"
    given = args.scratch / "lines.txt"
    given.write_bytes(text)
    with given.open("rb") as file:
        found = called([*base, "--input", "-", "--output", output], args.timeout, stdin=file)
    table = output / "decisions.csv"
    text = table.read_bytes().decode(errors="surrogateescape") if table.exists() else "path\n"
    return found, judge(found, lines, decided(found, text, lines), folder=folder, status=3, memory=args.memory)


def indexed(args: Namespace, sources: list[Path]) -> tuple[Run, Counter]:
    """mvtec_dataset.sh: with all files, and again without those that it has named, until it writes the index."""
    category, left = args.scratch / "hostile", {}
    for seed, part in enumerate(("train/good", "test/bad"), args.seed):
        left |= make(category / part, seed=seed, often=args.often)
        for name in ("folder.png", "empty.tif"):  # folders where images should be are named first, and alone
            (category / part / name).rmdir()
        (category / part / "up").unlink()
    for number, source in enumerate(sources):
        path = category / "train/good" / f"good{number}{source.suffix}"
        shutil.copyfile(source, path)
        left[path] = "good images"
    counts, wrong, rounds = Counter(), [], []
    while not rounds or (rounds[-1].status == 2 and len(rounds) < 4 and not wrong):
        found = called(
            [ROOT / "mvtec_dataset.sh", "hostile", "--data", args.scratch],
            args.timeout,
            env=os.environ | {"PYTHON": sys.executable},
        )
        rounds.append(found)
        named = [path for path in left if found.names(path, category)]
        counts.update((left.pop(path), "named") for path in named)
        judge_ending(found, 2 if named else 0, args.memory)
        wrong += found.wrong
        for path in named:
            path.unlink()
    index = category / "hostile.csv"
    text = index.read_bytes().decode(errors="surrogateescape") if index.exists() else "image_name\n"
    rows = {shown(row["image_name"]) for row in csv.DictReader(io.StringIO(text, newline=""))}
    rows |= {re.sub(r"#\d+$", "", row) for row in rows}
    fates = {path: "decided" if shown(path.relative_to(category)) in rows else "passed over" for path in left}
    silent = [shown(path) for path, fate in fates.items() if fate == "passed over"]
    if len(silent) != found.passed_over:
        wrong.append(f"{found.passed_over} counted as passed over, {len(silent)} are: {silent[:40]}")
    counts.update((left[path], fate) for path, fate in fates.items())
    longest, most = (max(getattr(each, name) for each in rounds) for name in ("seconds", "gigabytes"))
    return Run(rounds[0].status, "", "", longest, most, wrong), counts


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("--category", default="demo_carpet", help="to train on, and to take good images from")
    add_folders(options, "data")
    options.add_argument("--seed", type=int, default=0, help="of the files (default 0)")
    options.add_argument("--often", type=int, help="how often each maker of files is called (default about 300 files)")
    options.add_argument("--timeout", type=float, default=600, help="seconds for each command (default 600)")
    options.add_argument("--quiet", type=float, default=20, help="seconds without a decision that end --watch")
    options.add_argument(
        "--memory",
        type=float,
        default=5,
        help="gigabytes that a command may take (default 5: images of 170 megapixels are among them)",
    )
    options.add_argument(
        "--commands", nargs="*", default=["input", "watch", "lines", "dataset"], help="(default: all four)"
    )
    options.add_argument("--detector", type=Path, help="a folder for --model with a detector, instead of training one")
    return options.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Make the files, give them to the commands, print what became of them. Returns 1 if anything is wrong."""
    args = parse_arguments(arguments)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    args.data = args.data.absolute()
    with tempfile.TemporaryDirectory() as scratch:
        args.scratch = Path(scratch)
        model = args.detector or args.scratch / "model"
        stage = ROOT / "src/students_training.py"
        if not args.detector:
            training = [
                sys.executable,
                stage,
                args.category,
                "--image-size",
                128,
                "--data",
                args.data,
                "--model",
                model,
            ]
            assert called(training, args.timeout).status == 0
        folder = args.scratch / "hostile files"
        kinds = make(folder, seed=args.seed, often=args.often)
        sources = sorted((args.data / args.category / "test/good").iterdir())[:12]
        kinds |= add_good(folder, sources)
        detect = ROOT / "src/anomaly_detection.py"
        base = [sys.executable, detect, args.category, "--data", args.data, "--model", model]
        works = {
            "input": lambda: inspected(args, base, folder, kinds),
            "watch": lambda: watched(args, base, folder, kinds),
        }
        works["lines"] = lambda: named_in_lines(args, base, folder, kinds)
        works["dataset"] = lambda: indexed(args, sources)
        done = {name: works[name]() for name in args.commands}
    return report(done, kinds, args)


def report(done: dict[str, tuple[Run, Counter]], kinds: dict[Path, str], args: Namespace) -> int:
    """Print the table, what each command took, and what is wrong. Returns the exit status."""
    rows = []
    for kind, number in Counter(kinds.values()).items():
        fates = [" + ".join(str(counts[kind, fate]) for fate in ("decided", "named", "passed over"))
                 for _, counts in done.values()]  # fmt: skip
        rows.append((kind, str(number), *fates))
    print(measuring.table(("kind", "files", *(f"{name}: decided + named + passed over" for name in done)), rows))
    for name, (found, _) in done.items():
        print(f"{name}: exit status {found.status}, {found.seconds:.0f} s, at most {found.gigabytes:.2f} GB")
        for line in found.wrong:
            print(f"WRONG, {name}: {line}")
    return int(any(found.wrong for found, _ in done.values()))


if __name__ == "__main__":
    run(main, resumes=False)
