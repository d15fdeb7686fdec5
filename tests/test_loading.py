import json
import os
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import ResNet18_Weights
from torchvision.transforms import Normalize

from student_teacher.images import preprocessing
from student_teacher.images.store import ImageStore
from student_teacher.runtime import checkpoints, files, prefetch
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.prefetch import prefetched, processors, size_of
from student_teacher.runtime.resume_log import ResumeLog

# prefetch


def test_results_are_in_the_items_order_whichever_is_done_first():
    found = prefetched(lambda item: time.sleep(0.002 * (item % 3)) or item * item, range(40))
    assert list(found) == [item * item for item in range(40)]


def test_only_a_few_are_computed_ahead():
    drawn = []

    def items():
        for item in range(10_000):
            drawn.append(item)
            yield item

    results = prefetched(str, items())
    assert [next(results), next(results)] == ["0", "1"]
    assert 2 < len(drawn) <= 2 * processors() + 2
    results.close()
    assert len(drawn) < 10_000


def most_ahead(function, items=range(300)):
    """How many items were drawn, but not given back yet."""
    drawn, most = [], 0
    for count, _ in enumerate(prefetched(function, (drawn.append(item) or item for item in items))):
        most = max(most, len(drawn) - count)
    return most


@pytest.mark.parametrize("several", [False, True])
def test_large_results_are_computed_ahead_while_they_fit_into_the_budget(monkeypatch, several):
    monkeypatch.setattr(prefetch, "processors", lambda: 64)
    monkeypatch.setattr(prefetch, "BUDGET", 30_000)
    assert most_ahead(lambda _: None) == 129
    assert most_ahead(lambda _: [np.zeros(5000, np.uint8)] * 2 if several else np.zeros(10_000, np.uint8)) == 4
    assert most_ahead(lambda _: {"image": torch.zeros(100_000)}) == 2
    given = [Image.new("RGB", (100, 100)) for _ in range(30)]  # held in memory, too
    assert most_ahead(lambda _: None, given) == 2


def test_as_many_threads_as_processors_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 6}, raising=False)
    assert processors() == 3
    assert most_ahead(str) == 7
    monkeypatch.delattr(os, "sched_getaffinity")
    assert processors() == 64


def test_the_size_of_pictures_and_of_what_holds_them():
    picture, array, tensor = Image.new("RGB", (5, 4)), np.zeros((2, 3), np.float32), torch.zeros(7, dtype=torch.uint8)
    assert [size_of(value) for value in (picture, array, tensor, "text", None)] == [60, 24, 7, 0, 0]
    assert size_of((1, {"image": picture, "both": [array, tensor]})) == 91


def test_an_exception_is_raised_at_its_items_turn():
    results = prefetched(lambda item: 6 // item, [3, 2, 0, 1])
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_no_threads_remain_if_reading_stops_early():
    before = threading.active_count()
    results = prefetched(str, range(100))
    next(results)
    assert threading.active_count() > before
    results.close()
    assert threading.active_count() == before


def test_with_finish_pending_calls_are_completed_at_a_stop():
    stopped, done = threading.Event(), []

    def items():
        yield from range(2 * processors())
        stopped.set()
        raise KeyboardInterrupt

    def work(item):
        if item:  # the first one is waited for before others start
            stopped.wait(10)
        done.append(item)

    with pytest.raises(KeyboardInterrupt):
        list(prefetched(work, items(), finish=True))
    assert sorted(done) == list(range(2 * processors()))


# resume_log


def test_results_are_kept_after_a_stop(tmp_path):
    path = tmp_path / "results" / "unfinished"
    first = ResumeLog(path, "weights 1")
    first.put("test/good/000.png", 0.1)
    first.put("ü\n\udcff", -3.0)
    second = ResumeLog(path, "weights 1")
    second.put("later", 2.5)
    third = ResumeLog(path, "weights 1")
    assert [third.get(name) for name in ("test/good/000.png", "ü\n\udcff", "later", "never")] == [0.1, -3.0, 2.5, None]


def test_another_key_drops_the_results(tmp_path):
    path = tmp_path / "unfinished"
    ResumeLog(path, "weights 1").put("a", 1.0)
    assert ResumeLog(path, "weights 2").get("a") is None
    assert ResumeLog(path, "weights 1").get("a") is None


def test_another_process_s_results_of_another_key_do_not_come_back(tmp_path):
    path = tmp_path / "unfinished"
    ResumeLog(path, "weights 1").put("a", 1.0)
    path.rename(tmp_path / "unfinished.1")  # as the second of several processes leaves it
    assert ResumeLog(path, "weights 1").get("a") == 1.0
    path.rename(tmp_path / "unfinished.1")
    assert ResumeLog(path, "weights 2").get("a") is None  # overwrites the results of weights 1
    assert ResumeLog(path, "weights 1").get("a") is None


def test_a_truncated_line_is_ignored_and_nothing_after_it_is_lost(tmp_path):
    path = tmp_path / "unfinished"
    ResumeLog(path, "key").put("a", 1.0)
    with path.open("a") as file:
        file.write(json.dumps(["b", 2.0])[:-3])
    log = ResumeLog(path, "key")
    assert (log.get("a"), log.get("b")) == (1.0, None)
    log.put("c", 3.0)
    assert ResumeLog(path, "key").get("c") == 3.0


def test_a_finished_job_leaves_nothing(tmp_path):
    path = tmp_path / "unfinished"
    log = ResumeLog(path, "key")
    log.put("a", 1.0)
    log.finish()
    assert list(tmp_path.iterdir()) == []
    assert ResumeLog(path, "key").get("a") is None


# image_store


class Loader:
    """Images of 48 bytes, or for odd indices of 24; counts how often each was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, index):
        self.asked.append(index)
        return torch.full((3, 4 - 2 * (index % 2), 4), index, dtype=torch.uint8)


def test_images_within_the_budget_are_loaded_once():
    load = Loader()
    store = ImageStore(load, 4)
    for _ in range(2):
        groups = list(store.batches([[2, 0], [0]]))
    assert sorted(load.asked) == [0, 1, 2, 3]
    assert [[group.shape for group in batch] for batch in groups] == [[(2, 3, 4, 4)], [(1, 3, 4, 4)]]
    assert groups[0][0][:, 0, 0, 0].tolist() == [2, 0]


def test_images_beyond_the_budget_are_loaded_each_time():
    load = Loader()
    store = ImageStore(load, 4, budget=48 + 24)
    load.asked.clear()
    first, second = (next(store.batches([[0, 1, 2, 3]])) for _ in range(2))
    assert sorted(load.asked) == [2, 2, 3, 3]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_batch_of_several_sizes_is_gathered_by_size():
    (groups,) = ImageStore(Loader(), 5).batches([[3, 0, 1, 4]])
    assert [group[:, 0, 0, 0].tolist() for group in groups] == [[3, 1], [0, 4]]
    assert [group.shape for group in groups] == [(2, 3, 2, 4), (2, 3, 4, 4)]


# files


def test_bytes_and_text_are_written_into_folders_that_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    files.write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    files.write_atomically(path, "größer\udcff")
    assert path.read_text(encoding="utf-8") == "größer?"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of Unix")
@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_permissions_are_those_that_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        files.write_atomically(tmp_path / "folder" / "file", "text")
        checkpoints.save(tmp_path / "folder" / "model.pt", "teacher", "carpet", {})
    finally:
        os.umask(before)
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask
    for name in ("file", "model.pt"):
        assert (tmp_path / "folder" / name).stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"file can't be written: No space left on device"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_way_is_said(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(UserError, match="folder can't be written"):
        files.write_atomically(tmp_path / "folder", "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


# preprocessing


def test_normalise_equals_torchvisions():
    pixels = torch.randint(0, 256, (2, 3, 5, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    theirs = ResNet18_Weights.IMAGENET1K_V1.transforms()
    expected = Normalize(theirs.mean, theirs.std)(pixels.float() / 255)
    torch.testing.assert_close(preprocessing.normalise(pixels), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_normalise_leaves_its_input_alone(dtype):
    pixels = torch.arange(24, dtype=dtype).view(1, 3, 2, 4)
    before = pixels.clone()
    assert preprocessing.normalise(pixels).dtype == torch.float32
    assert torch.equal(pixels, before)


def test_pictures_become_tensors_of_rows_and_columns():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    tensor = preprocessing.to_tensor(Image.fromarray(pixels))
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((3, 2, 4), torch.uint8, True)
    assert tensor[:, 1, 3].tolist() == pixels[1, 3].tolist() == [21, 22, 23]
    grey = preprocessing.to_tensor(Image.fromarray(pixels[..., 0]))
    assert (grey.shape, grey[0, 1, 3].item()) == ((1, 2, 4), 21)


def test_resize_takes_height_then_width():
    picture = Image.new("RGB", (10, 6))
    assert preprocessing.resize(picture, (3, 5)).size == (5, 3)
    assert preprocessing.resize(picture, None) is picture
    assert preprocessing.resize(picture, (6, 10)) is picture
    assert preprocessing.image_transform((3, 5))(picture).shape == (3, 3, 5)


def test_resize_does_not_alias():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = preprocessing.image_transform((8, 8))(Image.fromarray(stripes))
    assert 118 <= small.min() <= small.max() <= 137  # a picture of every eighth pixel would be black, or white
