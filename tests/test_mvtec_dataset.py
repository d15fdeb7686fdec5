import csv
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image, ImageFilter

import mvtec_dataset
from AnomalyDataset import AnomalyDataset
from student_teacher.images.folders import images_below
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.paths import ROOT

SCRIPT = ROOT / "mvtec_dataset.sh"


def picture(path, size=(12, 10), value=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)


def make_category(folder):
    for number in range(3):
        picture(folder / f"train/good/{number:03d}.png")
    picture(folder / "test/good/000.png")
    for number in range(2):
        picture(folder / f"test/cut/{number:03d}.png")
        picture(folder / f"ground_truth/cut/{number:03d}_mask.png", value=255)
    return folder


@pytest.fixture
def category(tmp_path):
    return make_category(tmp_path / "data" / "tiny")


def script(category, *options, data, **environment):
    """Run the command as a user does, with this Python in place of .venv."""
    command = [SCRIPT, category, "--data", data, *options]
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def index(category):
    with (category / f"{category.name}.csv").open(newline="") as file:
        return list(csv.reader(file))


def files(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


def test_options_of_the_script_reach_the_check_for_leaks(category):
    plain, checked = (script("tiny", *options, data=category.parent) for options in ((), ("--check-leaks",)))
    assert plain.returncode == checked.returncode == 0, checked.stderr
    assert checked.stdout.startswith(plain.stdout) and "of 3 test images are likely to show a part" in checked.stdout


def refused(category):
    """What `prepare` says of a category that it must refuse, and that it leaves everything as it was."""
    before = files(category)
    with pytest.raises(UserError) as error:
        mvtec_dataset.prepare(category)
    assert files(category) == before
    return str(error.value)


# The folder as published


def test_index_of_a_published_folder(category):
    result = script("tiny", data=category.parent)
    assert result.returncode == 0, result.stderr
    assert "3 good to train, 1 good to test, 2 with defects (2 cut)" in result.stdout
    assert index(category) == [
        ["image_name", "gt_name", "label", "type"],
        ["train/good/000.png", "", "0", "train"],
        ["train/good/001.png", "", "0", "train"],
        ["train/good/002.png", "", "0", "train"],
        ["test/cut/000.png", "ground_truth/cut/000_mask.png", "1", "test"],
        ["test/cut/001.png", "ground_truth/cut/001_mask.png", "1", "test"],
        ["test/good/000.png", "", "0", "test"],
    ]


def test_run_twice_changes_nothing(category):
    assert script("tiny", data=category.parent).returncode == 0
    before = files(category.parent)
    assert script("tiny", data=category.parent).returncode == 0
    assert files(category.parent) == before


def test_no_test_and_no_ground_truth(tmp_path):
    picture(tmp_path / "own set, 1/train/good/a.JPG")
    assert script("own set, 1", data=tmp_path).returncode == 0
    assert index(tmp_path / "own set, 1")[1:] == [["train/good/a.JPG", "", "0", "train"]]


def test_any_accepted_suffix_and_masks_without_an_ending(tmp_path):
    category = tmp_path / "mixed"
    picture(category / "train/good/0.tif")
    picture(category / "test/cut/1.jpg")
    picture(category / "ground_truth/cut/1.bmp", value=255)
    picture(category / "test/cut/2.bmp")
    picture(category / "ground_truth/cut/2_mask.tif", value=255)
    assert [row["gt_name"] for row in mvtec_dataset.prepare(category)] == [
        "",
        "ground_truth/cut/1.bmp",
        "ground_truth/cut/2_mask.tif",
    ]


def test_files_that_are_no_images_are_counted_and_named(category, capsys):
    for name in ("readme.txt", "license.txt", "train/good/notes.txt", "train/good/.hidden", "test/cut/000.xml"):
        (category / name).write_text("no image")
    (category / "test/.ipynb_checkpoints").mkdir()
    picture(category / "ground_truth/cut/009_mask.png")
    assert len(mvtec_dataset.prepare(category)) == 6
    told = capsys.readouterr().err
    assert "passed over 5 files" in told
    for name in ("train/good/.hidden", "train/good/notes.txt", "test/cut/000.xml", "cut/009_mask.png"):
        assert name in told


def test_what_network_drives_and_desktops_leave_is_passed_over_quietly(category, capsys):
    for name in ("Thumbs.db", ".DS_Store", "._000.png", "desktop.ini"):
        for folder in (".", "train", "train/good", "test/cut", "ground_truth/cut"):
            (category / folder / name).write_text("no image")
    for name in ("@eaDir", "#recycle", "__MACOSX"):
        for folder in (".", "train", "test", "test/cut", "ground_truth/cut"):
            picture(category / folder / name / "000.png" / "thumbnail.jpg")
    assert len(mvtec_dataset.prepare(category)) == 6
    assert "passed over" not in capsys.readouterr().err
    picture(category / "train/good/@eaDir/001.png/thumbnail.jpg")
    assert len(AnomalyDataset(category)) == 6
    assert capsys.readouterr().out == ""
    assert images_below(category / "test")[1] == []


def test_every_format_that_pillow_reads_is_trained_on(category):
    for name in ("a.webp", "b.jfif", "c.GIF"):
        picture(category / "train/good" / name)
    (category / "train/good/000.png").rename(category / "train/good/000")
    names = [row["image_name"] for row in mvtec_dataset.prepare(category) if row["type"] == "train"]
    assert [name[11:] for name in names] == ["000", "001.png", "002.png", "a.webp", "b.jfif", "c.GIF"]


def test_a_photograph_that_can_t_be_read_is_named_in_train_too(category):
    (category / "train/good/a.heic").write_bytes(b"no HEIF")
    assert "train/good/a.heic: " in refused(category)


def test_defects_without_any_ground_truth_are_told(category):
    shutil.rmtree(category / "ground_truth")
    rows = mvtec_dataset.prepare(category)
    assert [row["label"] for row in rows if row["type"] == "test"] == [1, 1, 0]
    assert {row["gt_name"] for row in rows} == {""}
    assert "No defect has a mask" in mvtec_dataset.summary(category, rows)


def drawn_mask(path, kind):
    """A mask with two defects: clean, with JPEG's traces in a PNG, with soft edges, or black on white."""
    mask = np.zeros((80, 80), np.uint8)
    mask[10:30, 10:30] = mask[50:70, 40:60] = 255
    picture = Image.fromarray(255 - mask if kind == "inverted" else mask)
    if kind == "jpeg":
        traces = io.BytesIO()
        picture.save(traces, "JPEG", quality=75)
        picture = Image.open(traces)
    elif kind == "soft":
        picture = picture.filter(ImageFilter.GaussianBlur(2))
    picture.save(path)


@pytest.mark.parametrize("kind", ["clean", "jpeg", "soft", "inverted"])
def test_odd_masks_are_told_with_numbers(tmp_path, capsys, kind):
    category = tmp_path / "data" / "odd"
    picture(category / "train/good/0.png")
    picture(category / "test/cut/0.png", size=(80, 80))
    (category / "ground_truth/cut").mkdir(parents=True)
    drawn_mask(category / "ground_truth/cut/0_mask.png", kind)
    mvtec_dataset.prepare(category)
    told = capsys.readouterr().err
    clean = np.zeros((80, 80), bool)
    clean[10:30, 10:30] = clean[50:70, 40:60] = True
    assert ("grey values in 1 of 1 masks" in told) == (kind in ("jpeg", "soft"))
    assert ("more than half of the image marked" in told) == (kind == "inverted")
    assert ("regions of fewer than 4 pixels" in told) == (kind == "jpeg")
    if kind == "inverted":
        assert "0_mask.png (88%)" in told
        return
    if kind != "clean":
        regions, left = map(
            int, re.search(r"--mask-threshold 127 would leave (\d+) of (\d+) regions", told).groups()[::-1]
        )
        assert left == 2 and (regions > 2 if kind == "jpeg" else regions == 2)
        assert int(re.search(r"regions and (\d+)% of the area", told)[1]) < 90
    mvtec_dataset.main(["odd", "--data", str(category.parent), "--mask-threshold", "127"])
    assert "grey values" not in capsys.readouterr().err
    mvtec_dataset.prepare(category)  # it stays
    marked = np.asarray(AnomalyDataset(category, type="test")[0]["mask"]) > 0
    assert (marked != clean).sum() <= (24 if kind == "soft" else 0)  # at the corners


def test_a_mask_threshold_that_is_none_is_refused(category):
    for value in ("255", "-1", "x"):
        result = script("tiny", "--mask-threshold", value, data=category.parent)
        assert result.returncode == 2
        assert "takes a number from 0 to below 255, or auto" in result.stderr


def test_each_page_of_a_file_is_an_image_with_its_own_mask(category):
    def stack(name, *values):
        pages = [Image.new("L", (12, 10), value) for value in values]
        pages[0].save(category / name, save_all=True, append_images=pages[1:])

    stack("train/good/003.tif", 10, 20)
    stack("test/cut/005.tif", 30, 40)
    stack("ground_truth/cut/005_mask.tif", 255, 0)
    stack("test/cut/006.tif", 50, 60)
    picture(category / "ground_truth/cut/006#2_mask.png", value=255)
    rows = mvtec_dataset.prepare(category)
    assert [row["image_name"] for row in rows][3:5] == ["train/good/003.tif#1", "train/good/003.tif#2"]
    assert [(row["image_name"][9:], row["gt_name"][17:]) for row in rows if row["label"]][2:] == [
        ("005.tif#1", "005_mask.tif#1"),
        ("005.tif#2", "005_mask.tif#2"),
        ("006.tif#1", ""),
        ("006.tif#2", "006#2_mask.png"),
    ]
    dataset = AnomalyDataset(category, label=1)
    assert [sample["image"].getpixel((0, 0))[0] for sample in dataset] == [90, 90, 30, 40, 50, 60]
    assert [sample["mask"].getpixel((0, 0)) for sample in dataset] == [255, 255, 255, 0, 0, 255]


def deep(path, *values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array([values], np.uint16)).save(path)


@pytest.fixture
def cameras(tmp_path):
    """A category of 12-bit images, and one of 8 bits among them."""
    category = tmp_path / "data" / "cameras"
    for number in range(3):
        deep(category / f"train/good/{number}.png", 0, 2048, 3900 + number)
    picture(category / "train/good/3.png", size=(3, 1), value=90)
    deep(category / "test/good/0.png", 0, 2048, 9000)
    return category


def test_a_camera_s_value_range_is_found_shown_kept_and_used(cameras):
    result = script("cameras", data=cameras.parent)
    assert result.returncode == 0, result.stderr
    assert "values 0 to 4095 become black to white (found; " in result.stdout
    assert "3 training images have 0 to 3902" in result.stdout
    assert "values beyond 0 to 4095 are cut, in 1 image: test/good/0.png" in result.stderr
    dataset = AnomalyDataset(cameras)
    assert dataset.value_range == (0, 4095)
    assert [sample["image"].getpixel((1, 0))[0] for sample in dataset] == [128, 128, 128, 90, 128]


def test_a_value_range_that_was_given_stays(cameras):
    first = script("cameras", "--value-range", "-100", "1e4", data=cameras.parent)
    assert "values -100 to 10000 become black to white (given)" in first.stdout, first.stderr
    mvtec_dataset.prepare(cameras)
    assert AnomalyDataset(cameras).value_range == (-100, 10000)
    mvtec_dataset.prepare(cameras, value_range="auto")
    assert AnomalyDataset(cameras).value_range == (0, 4095)


@pytest.mark.parametrize("words", [("3",), ("5", "5"), ("a", "b"), ("1", "nan"), ("1", "2", "3")])
def test_a_value_range_that_is_none_is_refused(cameras, words):
    with pytest.raises(UserError, match="takes two numbers, LOW below HIGH"):
        mvtec_dataset.main(["cameras", "--data", str(cameras.parent), "--value-range", *words])
    assert not (cameras / "cameras.csv").exists()


def test_integers_and_floating_point_have_no_common_range(cameras):
    Image.fromarray(np.ones((1, 3), np.float32)).save(cameras / "train/good/4.tif")
    assert "train/good/4.tif: train/good/0.png holds integers, this one floating point" in refused(cameras)
    mvtec_dataset.prepare(cameras, value_range=(0, 1))


def test_a_mask_that_marks_nothing_is_told(category, capsys):
    picture(category / "ground_truth/cut/001_mask.png", value=0)
    mvtec_dataset.prepare(category)
    assert "ground_truth/cut/001_mask.png: marks nothing" in capsys.readouterr().err


def test_a_link_to_a_category_keeps_its_own_name(category):
    link = category.parent / "linked"
    link.symlink_to(category, target_is_directory=True)
    mvtec_dataset.prepare(link)
    assert (category / "linked.csv").is_file()


# What is wrong is named


def test_every_problem_is_named_at_once(category):
    picture(category / "train/good/003.png")
    whole = (category / "train/good/003.png").read_bytes()
    (category / "train/good/003.png").write_bytes(whole[:-30])
    (category / "test/good/000.png").write_bytes(b"")
    picture(category / "test/hole/000.png")
    picture(category / "ground_truth/cut/000_mask.png", size=(10, 12))
    (category / "ground_truth/cut/001_mask.png").write_text("no image")
    picture(category / "test/loose.png")
    picture(category / "test/cut/more/000.png")
    picture(category / "train/cut/000.png")
    before = files(category)

    result = script("tiny", data=category.parent)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    named = {line.split(":")[0].strip() for line in result.stderr.splitlines()[1:]}
    assert named == {
        "train/good/003.png",
        "test/good/000.png",
        "ground_truth/cut/000_mask.png",
        "ground_truth/cut/001_mask.png",
        "test/loose.png",
        "test/cut/more",
        "train/cut",
    }
    assert "7 problems" in result.stderr
    assert files(category) == before


def test_a_mask_of_another_size_says_both_sizes(category):
    picture(category / "ground_truth/cut/000_mask.png", size=(10, 12))
    assert re.search(r"000_mask\.png: 10x12, but test/cut/000\.png is 12x10", refused(category))


def test_defects_without_a_mask_are_taken_and_named(category):
    (category / "ground_truth/cut/001_mask.png").unlink()
    rows = mvtec_dataset.prepare(category)
    assert [row["gt_name"] for row in rows if row["label"]] == ["ground_truth/cut/000_mask.png", ""]
    assert "Without a mask, and so not in figures of pixels: test/cut/001.png;" in mvtec_dataset.summary(category, rows)


@pytest.mark.parametrize("emptied", ["train/good", "train"])
def test_nothing_to_train_on(category, emptied):
    shutil.rmtree(category / emptied)
    assert "train/good: no images to train on" in refused(category)


def test_a_former_index_outlives_a_failure(category):
    mvtec_dataset.prepare(category)
    (category / "test/good/000.png").write_bytes(b"")
    assert "test/good/000.png" in refused(category)


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "--unknown"])
def test_names_that_are_no_category(tmp_path, name):
    result = script(name, data=tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_nothing_there_says_where_to_get_it_and_does_nothing(tmp_path):
    # Neither the environment is touched (this Python would fail) nor the data folder made.
    result = script("carpet", data=tmp_path / "data", PYTHON="/bin/false")
    assert result.returncode == 2
    assert "https://www.mvtec.com/company/research/datasets/mvtec-ad" in result.stderr
    assert "CC BY-NC-SA 4.0" in result.stderr
    assert not any(tmp_path.iterdir())


def test_the_worker_alone_names_the_way_out(tmp_path):
    with pytest.raises(UserError, match=r"\./mvtec_dataset\.sh carpet"):
        mvtec_dataset.prepare(tmp_path / "carpet")


# Archives


def make_archive(path, *categories, top="", extra=()):
    """An archive as MVTec's: its folders and files may only be read."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def read_only(member):
        member.mode = 0o555 if member.isdir() else 0o444
        return member

    with tarfile.open(path, "w:xz") as tar:
        for category in categories:
            tar.add(category, arcname=f"{top}{category.name}", filter=read_only)
        for member in extra:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return path


@pytest.fixture
def published(tmp_path):
    """Two categories to be packed."""
    folders = [make_category(tmp_path / "published" / name) for name in ("tiny", "other")]
    for folder in folders:
        (folder / "license.txt").write_text("CC BY-NC-SA 4.0")
    return folders


@pytest.mark.parametrize(
    ("name", "top"),
    [
        ("tiny.tar.xz", ""),
        ("mvtec_anomaly_detection.tar.xz", "./"),
        ("mvtec_anomaly_detection.tar.xz", "mvtec_anomaly_detection/"),
    ],
)
def test_one_category_is_taken_out_and_writable(tmp_path, published, name, top):
    data = tmp_path / "data"
    make_archive(data / name, *published, top=top)
    result = script("tiny", data=data)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in data.iterdir()) == sorted([name, "tiny"])
    assert len(index(data / "tiny")) == 7
    assert (data / "tiny/license.txt").read_text() == "CC BY-NC-SA 4.0"
    assert all(path.stat().st_mode & 0o200 for path in data.rglob("*"))
    before = files(data)
    assert script("tiny", data=data).returncode == 0
    assert files(data) == before


def test_an_archive_s_validation_and_public_tests_come_out_too(tmp_path, published):
    picture(published[0] / "validation/good/000.png")
    picture(published[0] / "test_public/bad/000.png")
    picture(published[0] / "test_public/ground_truth/bad/000_mask.png", value=255)
    picture(published[0] / "test_private/000.png")
    make_archive(tmp_path / "data/tiny.tar.xz", *published)
    rows = mvtec_dataset.prepare(tmp_path / "data/tiny")
    added = [tuple(row.values()) for row in rows if row["image_name"].split("/")[0] not in ("train", "test")]
    assert added == [
        ("validation/good/000.png", "", 0, "validation"),
        ("test_public/bad/000.png", "test_public/ground_truth/bad/000_mask.png", 1, "test"),
        ("test_private/000.png", "", -1, "test_private"),
    ]


def test_an_archive_with_train_at_its_top(tmp_path, published):
    data = tmp_path / "data"
    data.mkdir()
    with tarfile.open(data / "tiny.tar.xz", "w:xz") as tar:
        tar.add(published[0], arcname=".")
    assert len(mvtec_dataset.prepare(data / "tiny")) == 6


def test_an_archive_without_the_category_lists_what_it_has(tmp_path, published):
    make_archive(tmp_path / "data/mvtec_anomaly_detection.tar.xz", *published)
    result = script("carpet", data=tmp_path / "data")
    assert result.returncode == 2
    assert "does not hold carpet; it holds other, tiny" in result.stderr
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mvtec_anomaly_detection.tar.xz"]


@pytest.mark.parametrize("kept", [0, 5, 0.5, -4])
def test_a_damaged_archive_leaves_nothing(tmp_path, published, kept):
    archive = make_archive(tmp_path / "data/tiny.tar.xz", *published)
    content = archive.read_bytes()
    archive.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    result = script("tiny", data=tmp_path / "data")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "tiny.tar.xz: broken" in result.stderr
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["tiny.tar.xz"]


def test_remains_of_an_interrupted_unpacking_do_no_harm(tmp_path, published):
    make_archive(tmp_path / "data/tiny.tar.xz", *published)
    picture(tmp_path / "data/.tiny.unfinished/train/good/999.png")
    assert len(mvtec_dataset.prepare(tmp_path / "data/tiny")) == 6
    assert not (tmp_path / "data/.tiny.unfinished").exists()


def test_an_archive_cannot_write_elsewhere(tmp_path, published):
    outside = tarfile.TarInfo("tiny/train/good/../../../../escaped.png")
    absolute = tarfile.TarInfo(f"{tmp_path}/tiny/train/absolute.png")
    link = tarfile.TarInfo("tiny/test/away")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
    through = tarfile.TarInfo("tiny/test/away/through.png")
    outside.size = absolute.size = through.size = 3
    make_archive(tmp_path / "data/tiny.tar.xz", published[0], extra=[outside, absolute, link, through])
    before = {path for path in tmp_path.rglob("*") if (tmp_path / "data") not in path.parents}
    with pytest.raises(UserError, match=r"through\.png"):  # it came out as a plain broken image
        mvtec_dataset.prepare(tmp_path / "data/tiny")
    assert {path for path in tmp_path.rglob("*") if (tmp_path / "data") not in path.parents} == before
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


# Archives from an address


class Server(ThreadingHTTPServer):
    """Serves one file, in ranges or whole; `breaks_at` bytes of the first answer, where set, are all that comes."""

    def __init__(self, content, ranges=True, breaks_at=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.breaks_at = content, ranges, breaks_at
        self.asked = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def address(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        start = int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted and server.ranges else 0
        total = len(server.content)
        if start >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.end_headers()
            return
        self.send_response(206 if wanted and server.ranges else 200)
        if wanted and server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Length", str(total - start))
        self.end_headers()
        body = server.content[start:]
        if server.breaks_at:
            body, server.breaks_at = body[: server.breaks_at], None
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def packed(tmp_path, published):
    """The bytes of an archive large enough to break off in the middle."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 200), dtype=np.uint8)
    Image.fromarray(noise).save(published[0] / "train/good/noise.png")
    return make_archive(tmp_path / "packed.tar.xz", *published).read_bytes()


def test_url_of_a_file(tmp_path, packed):
    result = script("tiny", "--url", f"file://{tmp_path}/packed.tar.xz", data=tmp_path / "data")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "data/tiny.tar.xz").read_bytes() == packed
    assert len(index(tmp_path / "data/tiny")) == 8


@pytest.mark.parametrize("ranges", [True, False])
def test_a_transfer_that_broke_off_goes_on(tmp_path, packed, ranges):
    server = Server(packed, ranges, breaks_at=20_000)
    url = server.address("mvtec_anomaly_detection.tar.xz?download=1")
    first = script("tiny", f"--url={url}", data=tmp_path / "data")
    assert first.returncode == 2
    assert "not fetched" in first.stderr
    assert [path.suffix for path in (tmp_path / "data").iterdir()] == [".part"]

    second = script("tiny", f"--url={url}", data=tmp_path / "data")
    assert second.returncode == 0, second.stderr
    assert server.asked[:2] == [None, "bytes=20000-"]
    assert (tmp_path / "data/mvtec_anomaly_detection.tar.xz").read_bytes() == packed
    assert len(index(tmp_path / "data/tiny")) == 8

    asked = len(server.asked)
    assert script("tiny", f"--url={url}", data=tmp_path / "data").returncode == 0
    assert len(server.asked) == asked  # nothing is fetched that is there
    server.shutdown()


@pytest.mark.parametrize("whole", [True, False])
def test_a_transfer_with_nothing_left_to_fetch(tmp_path, packed, whole):
    server = Server(packed, breaks_at=20_000)
    url = server.address("tiny.tar.xz")
    script("tiny", "--url", url, data=tmp_path / "data")
    (part,) = (tmp_path / "data").iterdir()
    part.write_bytes(packed if whole else bytes(len(packed)))
    result = script("tiny", "--url", url, data=tmp_path / "data")
    assert result.returncode == 0, result.stderr
    assert len(server.asked) == (2 if whole else 3)
    assert (tmp_path / "data/tiny.tar.xz").read_bytes() == packed
    server.shutdown()


def test_an_address_that_gives_a_web_page(tmp_path):
    server = Server(b"<html>Please log in</html>")
    result = script("tiny", "--url", server.address("tiny.tar.xz"), data=tmp_path / "data")
    server.shutdown()
    assert result.returncode == 2
    assert "did not give a tar.xz archive" in result.stderr
    assert not any((tmp_path / "data").iterdir())


def test_an_address_where_nothing_is(tmp_path):
    result = script("tiny", "--url", f"file://{tmp_path}/missing.tar.xz", data=tmp_path / "data")
    assert result.returncode == 2
    assert "missing.tar.xz: not fetched" in result.stderr
    assert not (tmp_path / "data/tiny").exists()


# The environment


def test_environment_is_made_once_and_follows_its_requirements(tmp_path):
    """With a python3 in front of the real one that notes what it is asked to do."""
    shutil.copy(ROOT / "environment.sh", tmp_path)
    (tmp_path / "requirements.txt").write_text("numpy\n")
    (tmp_path / "requirements-dev.txt").write_text("pytest\n")
    tools = tmp_path / "tools"
    tools.mkdir()
    stand_in = tools / "python3"
    stand_in.write_text(
        '#!/bin/bash\necho "$*" >> "$LOG"\n'
        'if [[ $2 == venv ]]; then mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; fi\n'
        'if [[ "$*" == *install* && -n "${BROKEN:-}" ]]; then exit 1; fi\n'
    )
    stand_in.chmod(0o755)
    log = tmp_path / "log"

    def prepare(**more):
        log.write_text("")
        code = 'set -euo pipefail; source environment.sh; prepare_environment "$@"; echo "$PYTHON"'
        names = ("requirements.txt", "requirements-dev.txt")
        environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "LOG": str(log), **more}
        environment.pop("PYTHON", None)
        result = subprocess.run(
            ["bash", "-c", code, "bash", *names], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        installed = [line.split("install ")[1] for line in log.read_text().splitlines() if " install " in line]
        return result, [re.findall(r"requirements\S*", line) for line in installed]

    both = [["requirements.txt", "requirements-dev.txt"]]
    result, installed = prepare(BROKEN="yes")
    assert result.returncode == 1
    assert installed == both
    result, installed = prepare()  # an installation that failed is done again
    assert result.returncode == 0
    assert result.stdout.strip() == str(tmp_path / ".venv/bin/python")
    assert installed == both
    result, installed = prepare()
    assert (installed, result.stderr) == ([], "")
    (tmp_path / "requirements.txt").write_text("numpy==2\n")
    assert prepare()[1] == [["requirements.txt"]]
