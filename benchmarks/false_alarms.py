"""Whether the false-alarm rate is kept: the rate that was asked beside the rate observed on good images.

The good images that no student has learned, held back from training or from the test images, are split at random again
and again: one part calibrates, and the rates are counted on the other, as detection does it.

    python3 benchmarks/false_alarms.py magnetic_tile
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import measuring
import numpy as np
import torch

import device
import scoring
import stages
from AnomalyDataset import AnomalyDataset
from command_line import UserError, add_folders, run
from Detector import conformal_p_value, load_detector
from prefetch import prefetched


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("category", help="a category whose students have been trained")
    options.add_argument("--rates", type=stages.share, nargs="+", default=[0.02, 0.05, 0.1, 0.2], metavar="X")
    options.add_argument("--splits", type=stages.positive, default=20, help="random ones (default 20)")
    options.add_argument("--image-score", choices=scoring.IMAGE_SCORES, default=scoring.IMAGE_SCORES[0])
    options.add_argument("--seed", type=stages.seed, default=0)
    options.add_argument("--device", default="auto")
    add_folders(options, "data", "model")
    options.add_argument("--output", type=Path, help="write the figures here, as JSON")
    return options.parse_args(arguments)


def rate_on(held_back: torch.Tensor, tested: Sequence[float], rate: float) -> float:
    """Share of the tested scores whose conformal p-value is `rate` or less."""
    return np.mean([conformal_p_value(held_back, score) <= rate for score in tested])


def observed_rates(scores: np.ndarray, calibrating: int, rate: float, splits: int, seed: int) -> np.ndarray:
    """Share of good images whose conformal p-value is `rate` or less, for each random split of their scores (n,)."""
    found = []
    for split in range(splits):
        order = np.random.default_rng(device.seed_of(seed, "split", split)).permutation(scores)
        held_back, tested = order[:calibrating], order[calibrating:]
        found.append(rate_on(torch.from_numpy(held_back), tested, rate))
    return np.array(found)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write JSON."""
    args = parse_arguments(arguments)
    path = args.model / args.category / "detector.pt"
    detector = load_detector(path, device_name=args.device)
    held_back = detector.calibration.scores(args.image_score).numpy()
    good = AnomalyDataset(args.data / args.category, type="test", label=0)
    if not good.rows:
        raise UserError(f"{args.data / args.category} has no good test images: there is nothing to count on")
    samples = stages.with_bar(prefetched(good.__getitem__, range(len(good))), len(good), "good images")
    tested = [detector.look_at(sample["image"], args.image_score)[1] for sample in samples]
    rows = []
    for rate in args.rates:
        observed = observed_rates(np.concatenate([held_back, tested]), len(held_back), rate, args.splits, args.seed)
        rows.append(
            {
                "asked": rate,
                "observed_mean": observed.mean(),
                "observed_deviation": observed.std(),
                "on_test_images": rate_on(torch.from_numpy(held_back), tested, rate),
            }
        )
    print(f"{len(held_back)} held-back and {len(tested)} test images, {args.splits} random splits")
    lines = [
        (row["asked"], f"{row['observed_mean']:.3f} +- {row['observed_deviation']:.3f}", f"{row['on_test_images']:.3f}")
        for row in rows
    ]
    print(measuring.table(("asked", "observed, random splits", "observed on the test images"), lines))
    measuring.write_json(args.output, "false_alarms", args, measuring.machine(device.choose(args.device)), rows=rows)


if __name__ == "__main__":
    run(main, resumes=False)
