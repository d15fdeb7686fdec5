"""Test images of parts that are in training, too, are found by their thumbnails."""

import numpy as np
import pytest
import torch
from PIL import Image

import mvtec_dataset
from student_teacher.images import leaks
from student_teacher.reports.leak_report import find_leaks, report
from student_teacher.runtime.errors import UserError


def make_category(folder, shared=0.0, moved=4, masks=True):
    """Twelve parts in training. Good test images show four of them, `moved`, defective ones parts of their own.

    `shared`: how much of a picture is the same for all parts. No two photographs have the same noise.
    """
    random = np.random.default_rng(0)
    common = random.integers(0, 256, (26, 26))
    for number in range(20):
        pixels = shared * common + (1 - shared) * random.integers(0, 256, (26, 26))
        picture = Image.fromarray(pixels.astype(np.uint8)).resize((104, 104))
        shown = [("train/good", 0)] if number < 12 else [(f"test/{'hole' if number < 16 else 'cut'}", 0)]
        if number < 4:
            shown.append(("test/good", moved))
        for kind, left in shown:
            (folder / kind).mkdir(parents=True, exist_ok=True)
            photograph = np.array(picture.crop((left, 4, left + 96, 100))) + random.normal(0, 5, (96, 96))
            Image.fromarray(photograph.clip(0, 255).astype(np.uint8)).save(folder / kind / f"{number:02}.png")
            if masks and kind in ("test/hole", "test/cut"):
                path = folder / kind.replace("test", "ground_truth") / f"{number:02}_mask.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (96, 96), 255).save(path)


@pytest.mark.parametrize(("shared", "moved"), [(0, 4), (0.7, 0)])
def test_parts_that_are_in_training_are_found_though_all_look_alike(tmp_path, capsys, shared, moved):
    make_category(tmp_path / "knit", shared, moved)
    mvtec_dataset.main(["knit", "--data", str(tmp_path), "--check-leaks"])
    found = find_leaks(tmp_path / "knit")
    assert [(seen.kind, seen.images, seen.seen_before) for seen in found.kinds] == [
        *(("all", 12, 4), ("good", 4, 4), ("cut", 4, 0), ("hole", 4, 0))
    ]
    assert [seen.image_au_roc for seen in found.kinds] == [1, None, 1, 1]
    assert sorted(pair[:2] for pair in found.pairs) == [
        (f"test/good/0{n}.png", f"train/good/0{n}.png") for n in range(4)
    ]
    printed = capsys.readouterr().out
    assert report(found) in printed
    assert "4 of 12 test images" in printed and "good: 4 of 4" in printed and "image AU-ROC of 1.000" in printed


def test_a_split_by_parts_leaves_nothing_to_be_known(tmp_path, capsys):
    make_category(tmp_path / "knit")
    options = ["knit", "--data", str(tmp_path)]
    split = tmp_path / "parts.csv"
    mvtec_dataset.main([*options, "--split-by-parts", str(split)])
    assert (
        f"{split}: 4 images change sides, 12 are then learned from, and 4 good ones tested" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="is there already"):
        mvtec_dataset.main([*options, "--split-by-parts", str(split)])
    mvtec_dataset.main([*options, "--split-csv", str(split)])
    found = find_leaks(tmp_path / "knit")
    assert [(seen.kind, seen.images, seen.seen_before) for seen in found.kinds] == [
        *(("all", 12, 0), ("good", 4, 0), ("cut", 4, 0), ("hole", 4, 0))
    ]
    mvtec_dataset.main([*options, "--split-csv", "auto"])
    assert find_leaks(tmp_path / "knit").kinds[0].seen_before == 4


def test_without_defects_there_is_nothing_to_rank_and_without_test_images_nothing_to_compare(tmp_path):
    make_category(tmp_path / "knit", masks=False)
    for kind in ("cut", "hole"):
        for file in (folder := tmp_path / "knit" / "test" / kind).iterdir():
            file.unlink()
        folder.rmdir()
    mvtec_dataset.main(["knit", "--data", str(tmp_path)])
    found = find_leaks(tmp_path / "knit")
    assert [seen.image_au_roc for seen in found.kinds] == [None, None]
    assert "AU-ROC" not in report(found)
    for file in (tmp_path / "knit" / "test" / "good").iterdir():
        file.unlink()
    mvtec_dataset.main(["knit", "--data", str(tmp_path)])
    with pytest.raises(UserError, match="no test images"):
        find_leaks(tmp_path / "knit")


def test_correlations_are_the_highest_over_all_shifts():
    torch.manual_seed(0)
    tested, good = torch.rand(2, 48, 48) - 0.5, torch.rand(3, 48, 48) - 0.5
    found = leaks.correlations(tested, good)
    for i, j in ((0, 0), (1, 2)):
        padded = torch.nn.functional.pad(good[j], (leaks.SHIFT,) * 4)
        windows = padded.unfold(0, 48, 1).unfold(1, 48, 1)
        assert found[i, j].item() == pytest.approx((windows * tested[i]).sum((2, 3)).max().item(), abs=1e-4)
