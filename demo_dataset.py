"""Make a demo category: woven carpet, good and with five kinds of defects, in the layout of MVTec AD.

Every yarn is modelled: its position, thickness, colour and twist, and where it passes under the yarns that it crosses.
So a cut pushes yarns apart, in a hole they are missing, and no two images have the same light, colour or weave.
"""

import argparse
import json
import math
import shutil
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFilter
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "src"))

from student_teacher.runtime.errors import UserError, run  # noqa: E402
from student_teacher.runtime.paths import category_name  # noqa: E402
from student_teacher.runtime.prefetch import processors  # noqa: E402

DEFECTS = ("cut", "hole", "thread", "stain", "metal")
VERSION = 1  # of the pictures: increase it with every change that alters a pixel
UNIT = 256  # lengths below are in pixels of an image this wide
OVERSAMPLING = 2  # the weave is drawn this much larger, so that its edges come out smooth
PERIOD = 9.0  # from one yarn to the next
WEAKEST = 0.5  # strength of the least visible defect; the most visible has 1

WARP_COLOUR = np.array([0.57, 0.49, 0.40], np.float32)
WEFT_COLOUR = np.array([0.66, 0.60, 0.51], np.float32)
BACKING_COLOUR = np.array([0.30, 0.25, 0.20], np.float32)
THREAD_COLOURS = np.array([[0.93, 0.92, 0.88], [0.62, 0.13, 0.12], [0.13, 0.18, 0.42], [0.10, 0.10, 0.10]], np.float32)
STAIN_COLOURS = np.array([[0.36, 0.22, 0.12], [0.30, 0.13, 0.14], [0.20, 0.20, 0.22]], np.float32)


class Carpet:
    """One piece of carpet in front of the camera: its weave, its light, and the defect on it, if any.

    Arrays are (S,S), with S = OVERSAMPLING x the size of the image; lengths are in pixels of an image UNIT wide.
    """

    def __init__(self, rng: np.random.Generator, image_size: int):
        self.rng = rng
        self.size = image_size * OVERSAMPLING
        axis = (np.arange(self.size, dtype=np.float32) + 0.5) * (UNIT / self.size)
        self.x, self.y = np.meshgrid(axis, axis)

        # How this piece differs from all others.
        self.period = [PERIOD * rng.uniform(0.95, 1.05) for _ in range(2)]
        self.angle = math.radians(rng.normal(0, 1.5))
        self.phase = [rng.uniform(40, 60) for _ in range(2)]  # in yarns: indices stay positive over the whole image
        self.tint = rng.normal(1, 0.012, 3).astype(np.float32)
        self.brightness = rng.uniform(0.88, 1.10)
        self.light = math.radians(rng.normal(225, 12))  # where it comes from: the upper left
        self.yarns = [self._yarns() for _ in range(2)]  # of the warp and of the weft; so all lists of two
        self.drift = [self.smooth_noise(90) * 0.14 + self.smooth_noise(25) * 0.055 for _ in range(2)]
        self.thickness = [self.smooth_noise(14) * 0.035 for _ in range(2)]
        self.wear = self.smooth_noise(60) * 0.022 + self.smooth_noise(12) * 0.018
        self.fibre = [self._streaks(vertical) for vertical in (True, False)]
        self.grain = rng.standard_normal((self.size, self.size), np.float32)
        self.light_slope = [rng.normal(0, 0.055) for _ in range(2)]
        self.vignette = rng.uniform(0.0, 0.07)

    def _yarns(self):
        count = 128
        return {
            "width": self.rng.normal(0.95, 0.035, count).astype(np.float32),
            "offset": self.rng.normal(0, 0.03, count).astype(np.float32),
            "shade": self.rng.normal(1, 0.045, count).astype(np.float32),
            "twist": self.rng.uniform(0, 1, count).astype(np.float32),
        }

    def smooth_noise(self, wavelength: float) -> np.ndarray:
        """Smooth noise with a standard deviation of about 1 that varies over `wavelength`: (S,S)."""
        cells = max(2, int(np.ceil(UNIT / wavelength)) + 1)
        return self._stretched(cells, cells)

    def _stretched(self, rows, columns):
        coarse = Image.fromarray(1.5 * self.rng.standard_normal((rows, columns), np.float32))
        return np.asarray(coarse.resize((self.size, self.size), Image.Resampling.BICUBIC))

    def _streaks(self, vertical):
        """Single fibres along the yarns."""
        along, across = UNIT // 8, int(UNIT / 0.9)
        return self._stretched(along, across) if vertical else self._stretched(across, along)

    def yarn_coordinates(self, x, y) -> tuple[np.ndarray, np.ndarray]:
        """Position in the weave: the number of the warp yarn (left to right) and of the weft yarn, with fractions."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        u = (cos * (x - UNIT / 2) - sin * (y - UNIT / 2)) / self.period[0] + self.phase[0] + self.drift[0]
        v = (sin * (x - UNIT / 2) + cos * (y - UNIT / 2)) / self.period[1] + self.phase[1] + self.drift[1]
        return u, v

    def render(self, push=None, no_warp=None, no_weft=None) -> tuple[np.ndarray, np.ndarray]:
        """Draw the bare weave.

        Args:
            push: (x, y), each (S,S): how far the yarns were pushed away from where they belong.
            no_warp, no_weft: (S,S), 1 where yarns of that direction are missing.

        Returns:
            the colours (S,S,3), linear, before light falls on them, and the height (S,S), in yarns.
        """
        x, y = (self.x, self.y) if push is None else (self.x - push[0], self.y - push[1])
        u, v = self.yarn_coordinates(x, y)
        warp_height, warp_colour = self._yarn(0, u, v)
        weft_height, weft_colour = self._yarn(1, v, u)
        if no_warp is not None:
            warp_height = np.where(no_warp > 0.5, -1.0, warp_height)
        if no_weft is not None:
            weft_height = np.where(no_weft > 0.5, -1.0, weft_height)

        height = np.maximum(np.maximum(warp_height, weft_height), -0.55)
        colour = np.where((warp_height > weft_height)[..., None], warp_colour, weft_colour)
        mesh = 0.85 + 0.25 * np.sin(2 * np.pi * 1.5 * u) * np.sin(2 * np.pi * 1.5 * v) + 0.1 * self.grain
        colour = np.where((height <= -0.55)[..., None], BACKING_COLOUR * mesh[..., None], colour)
        return colour * (1 + self.wear)[..., None], height

    def _yarn(self, direction, across, along):
        """Height and colour of the yarns of one direction: 0 for the warp, 1 for the weft."""
        yarns, side, colour = self.yarns[direction], (1, -1)[direction], (WARP_COLOUR, WEFT_COLOUR)[direction]
        floor = np.floor(across)
        index = floor.astype(np.int32)
        width = yarns["width"][index] + self.thickness[direction]
        offset = 2 * (across - floor - 0.5 - yarns["offset"][index]) / width  # -1..1 from edge to edge
        round_ = np.sqrt(np.clip(1 - offset**2, 0, 1))
        # Over one crossing yarn, under the next; odd yarns the other way about.
        swing = side * (1 - 2 * (index % 2)).astype(np.float32) * np.sin(np.pi * along)
        height = np.where(round_ > 0, 0.34 * round_ + 0.24 * swing, -1)
        # Two plies twisted around each other, and their fibres.
        ply = np.sin(2 * np.pi * (0.95 * along + 0.42 * offset * side + yarns["twist"][index]))
        height = height + 0.022 * ply
        shade = yarns["shade"][index] * (1 + 0.075 * ply + 0.055 * self.fibre[direction])
        return height, colour * shade[..., None]

    def shade(self, colour: np.ndarray, height: np.ndarray) -> np.ndarray:
        """Let light fall from the side onto the relief: (S,S,3)."""
        relief = blurred(height, 0.35 * self.size / UNIT)
        slope_y, slope_x = np.gradient(relief, UNIT / self.size / PERIOD)
        towards = math.cos(self.light) * slope_x + math.sin(self.light) * slope_y
        lit = 1.0 + 0.20 * -towards / np.sqrt(1 + 0.3 * (slope_x**2 + slope_y**2))
        # Little light reaches what lies lower than its surroundings.
        sunk = np.clip(blurred(height, 3.0 * self.size / UNIT) - height, -0.3, 0.9)
        return colour * (np.clip(lit, 0.35, 1.6) * (1 - 0.62 * sunk))[..., None]

    def photograph(self, colour: np.ndarray) -> Image.Image:
        """Uneven light, lens and sensor: an RGB picture of the size asked for."""
        across, down = self.x / UNIT - 0.5, self.y / UNIT - 0.5
        light = (
            1 + self.light_slope[0] * across + self.light_slope[1] * down - 2 * self.vignette * (across**2 + down**2)
        )
        fuzz = 1 + 0.035 * self.grain
        colour = colour * (self.brightness * light * fuzz)[..., None] * self.tint
        side = self.size // OVERSAMPLING
        small = colour.reshape(side, OVERSAMPLING, side, OVERSAMPLING, 3).mean(axis=(1, 3))
        small = small + 0.008 * self.rng.standard_normal(small.shape, np.float32)
        return Image.fromarray(np.rint(np.clip(small, 0, 1) * 255).astype(np.uint8))

    def somewhere(self, margin: float) -> np.ndarray:
        """A random point (x, y) at least `margin` away from the border."""
        return self.rng.uniform(margin, UNIT - margin, 2)

    def curve(self, length: float, bend: float, middle: np.ndarray) -> np.ndarray:
        """A smooth random curve through about `middle`: (K,2) points, half a pixel apart."""
        count = int(length * 2)
        knots = max(3, int(length / 22))
        turn = np.interp(np.linspace(0, 1, count), np.linspace(0, 1, knots), self.rng.normal(0, bend, knots))
        direction = self.rng.uniform(0, 2 * np.pi) + np.cumsum(turn) * 0.5
        points = np.cumsum(np.stack([np.cos(direction), np.sin(direction)], axis=1), axis=0) * 0.5
        return points - points.mean(axis=0) + middle

    def along_curve(self, points: np.ndarray, reach: float) -> tuple[np.ndarray, np.ndarray]:
        """Signed distance from a curve, and the place along it as 0..1, within `reach`: each (S,S).

        Farther away the distance is infinite.
        """
        distance = np.full((self.size, self.size), np.inf, np.float32)
        place = np.zeros((self.size, self.size), np.float32)
        tangent = np.gradient(points, axis=0)
        scale = self.size / UNIT
        for number, ((px, py), (tx, ty)) in enumerate(zip(points, tangent, strict=True)):
            left, right = np.clip([int((px - reach) * scale), int((px + reach) * scale) + 2], 0, self.size)
            top, bottom = np.clip([int((py - reach) * scale), int((py + reach) * scale) + 2], 0, self.size)
            window = np.s_[top:bottom, left:right]
            dx, dy = self.x[window] - px, self.y[window] - py
            away = np.hypot(dx, dy)
            nearer = (away < np.abs(distance[window])) & (away <= reach)
            distance[window][nearer] = (away * np.where(tx * dy - ty * dx >= 0, 1, -1))[nearer]
            place[window][nearer] = number / (len(points) - 1)
        return distance, place


def blurred(values: np.ndarray, radius: float) -> np.ndarray:
    """`values` (S,S), averaged over squares of about `radius` around each pixel, twice."""
    reach = max(1, round(radius))
    for _ in range(2):
        for axis in (0, 1):
            pad = [(0, 0), (0, 0)]
            pad[axis] = (reach + 1, reach)
            total = np.cumsum(np.pad(values, pad, mode="edge"), axis=axis, dtype=np.float64)
            length = values.shape[axis]
            ahead = total.take(range(2 * reach + 1, 2 * reach + 1 + length), axis=axis)
            values = ((ahead - total.take(range(length), axis=axis)) / (2 * reach + 1)).astype(np.float32)
    return values


def smooth_step(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((values - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def over(below: np.ndarray, above: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """`above` laid over `below` (S,S,3) where `cover` (S,S) is 1."""
    return below + (above - below) * cover[..., None]


def shadow(carpet: Carpet, cover: np.ndarray, drop: float) -> np.ndarray:
    """The shadow, 0..1, of a thing that covers `cover` and lies `drop` pixels above the weave."""
    scale = carpet.size / UNIT
    shift = np.rint(-drop * scale * np.array([np.sin(carpet.light), np.cos(carpet.light)])).astype(int)
    return blurred(np.roll(cover, tuple(shift), axis=(0, 1)), 0.8 * scale)


def one_piece(mask: np.ndarray, seed: np.ndarray) -> np.ndarray:
    """The part of `mask` (S,S) connected to where `seed` is set, small gaps closed: no stray pixels as regions."""
    mask, seed = (Image.fromarray(np.where(part > 0.5, 255, 0).astype(np.uint8)) for part in (mask, seed))
    closed = mask.filter(ImageFilter.MaxFilter(7)).filter(ImageFilter.MinFilter(7))
    # A feature narrower than this would not survive the reduction to the size of the image.
    closed = ImageChops.lighter(closed.filter(ImageFilter.MinFilter(3)).filter(ImageFilter.MaxFilter(3)), seed)
    piece, before = ImageChops.darker(closed, seed), None
    while piece != before:
        before, piece = piece, ImageChops.darker(piece.filter(ImageFilter.MaxFilter(5)), closed)
    return np.asarray(piece, dtype=np.float32) / 255


def good(carpet: Carpet, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """No defect."""
    colour, height = carpet.render()
    return carpet.shade(colour, height), np.zeros_like(carpet.x)


def cut(carpet: Carpet, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """A knife's slit: the yarns gape, their ends fray, and the dark backing shows."""
    rng = carpet.rng
    length, gape = 34 + 62 * strength + rng.uniform(0, 14), 1.5 + 2.6 * strength
    points = carpet.curve(length, 0.02, carpet.somewhere(length / 2 + 8))
    distance, place = carpet.along_curve(points, 16)
    ragged = 1 + 0.28 * carpet.smooth_noise(4) + 0.22 * carpet.smooth_noise(1.6)
    half = gape * np.sqrt(np.clip(1 - (2 * place - 1) ** 2, 0, 1)) ** 0.7
    open_ = np.where(np.isfinite(distance), smooth_step(half * ragged - np.abs(distance), -0.35, 0.35), 0)

    # What stood in the slit is squeezed to its two sides.
    near = np.where(np.isfinite(distance), np.exp(-np.abs(distance) / 4.5), 0)
    tangent = np.gradient(points, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    at = np.rint(place * (len(points) - 1)).astype(int)
    aside = np.sign(np.where(np.isfinite(distance), distance, 0)) * half * near
    push = (-tangent[at, 1] * aside, tangent[at, 0] * aside)
    colour, height = carpet.render(push)
    rim = np.where(np.isfinite(distance), np.exp(-np.clip(np.abs(distance) - half, 0, None) / 1.6), 0) * (half > 0.3)
    lit = carpet.shade(colour * (1 + 0.16 * rim * (1 - open_))[..., None], height - 0.35 * rim * open_)

    deep = BACKING_COLOUR * (0.42 + 0.07 * carpet.grain[..., None])
    lit = over(lit, deep, open_)
    strands, tone = np.zeros_like(carpet.x), np.ones_like(carpet.x)
    for _ in range(int(length / 4.5)):  # loose fibres across the slit and on its rim
        where = rng.integers(len(points) // 12, len(points) - len(points) // 12)
        fibre = carpet.curve(rng.uniform(4, 6 + 4 * strength), 0.25, points[where] + rng.normal(0, gape * 0.55, 2))
        away, _ = carpet.along_curve(fibre, 1.2)
        on_it = np.isfinite(away)
        strands[on_it] = np.maximum(strands[on_it], smooth_step(-np.abs(away[on_it]), -0.62, -0.22))
        tone[on_it] = rng.uniform(0.72, 1.12)
    mask = np.maximum(open_, strands * (np.abs(distance) < half + 1.5))
    return over(lit, WEFT_COLOUR * tone[..., None], strands * 0.85), one_piece(mask, np.abs(distance) < 0.8)


def hole(carpet: Carpet, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Yarns are missing: where those of both directions are, the backing shows; else the others lie bare."""
    rng = carpet.rng
    u, v = carpet.yarn_coordinates(carpet.x, carpet.y)
    radius = 0.95 + 1.55 * strength + rng.uniform(0, 0.25)  # in yarns
    middle = carpet.somewhere(radius * PERIOD + 8)
    row, column = (middle[::-1] * carpet.size / UNIT).astype(int)

    def missing(across, along, reach):
        """Every yarn ends somewhere else, and in a frayed tip."""
        index = np.floor(across).astype(int)
        half = np.sqrt(np.clip(reach**2 - (index + 0.5 - across[row, column]) ** 2, 0, None))
        half = np.where(half > 0, half + rng.uniform(-0.30, 0.30, 128)[index], 0)
        frayed = 0.16 * carpet.smooth_noise(1.4)
        return ((half > 0) & (np.abs(along - along[row, column]) + frayed < half)).astype(np.float32)

    # In a faint hole one direction is hardly hurt.
    no_warp = missing(u, v, radius)
    no_weft = missing(v, u, radius * (0.55 + 0.45 * strength))
    whole, _ = carpet.render()
    colour, height = carpet.render(None, no_warp, no_weft)
    changed = (np.abs(colour - whole).max(axis=-1) > 1e-4).astype(np.float32)
    gone = blurred(np.maximum(no_warp, no_weft), 1.0 * carpet.size / UNIT)
    lit = carpet.shade(colour * (1 - 0.18 * gone)[..., None], height)
    gap = no_warp * no_weft
    return lit, one_piece(np.maximum(changed, gap), gap)


def thread(carpet: Carpet, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """A loose thread from elsewhere lies on top."""
    rng = carpet.rng
    length, half = 45 + 85 * strength + rng.uniform(0, 15), 1.4 + 0.8 * strength
    points = carpet.curve(length, 0.075, carpet.somewhere(50))
    distance, place = carpet.along_curve(points, half + 2)
    offset = distance / half
    cover = np.where(np.isfinite(distance), smooth_step(-np.abs(offset), -1.15, -0.8), 0)

    # The fainter, the more like the carpet.
    colour = THREAD_COLOURS[rng.integers(len(THREAD_COLOURS))]
    colour = colour + (WEFT_COLOUR * 1.25 - colour) * (1 - strength) * 0.75
    inside = np.clip(np.where(np.isfinite(offset), offset, 0), -1, 1)
    ply = 0.86 + 0.16 * np.sin(2 * np.pi * (place * length / 4.2 + 0.32 * inside))
    body = colour * ((0.62 + 0.46 * np.sqrt(1 - inside**2)) * ply)[..., None]
    lit, _ = good(carpet, 0)
    lit = lit * (1 - 0.42 * shadow(carpet, cover, 1.6) * (1 - cover))[..., None]
    return over(lit, body, cover), cover


def stain(carpet: Carpet, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Something was spilt: darker, of another hue, soft at its edge, with the rim that drying leaves."""
    rng = carpet.rng
    radius = rng.uniform(14, 24) * (0.8 + 0.4 * strength)
    x0, y0 = carpet.somewhere(radius + 10)
    turn, flat = rng.uniform(0, np.pi), rng.uniform(0.65, 1.0)
    dx, dy = carpet.x - x0, carpet.y - y0
    across, along = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
    # Its edge wanders, and creeps along the yarns.
    reach = np.hypot(across, along / flat) / radius
    reach = reach + 0.10 * carpet.smooth_noise(22) + 0.06 * carpet.smooth_noise(7) + 0.02 * carpet.fibre[0]
    soaked = smooth_step(-reach, -1.18, -0.66)
    rim = np.exp(-(((reach - 0.84) / 0.12) ** 2)) * soaked
    amount = np.clip((0.27 + 0.45 * strength) * soaked * (1 + 0.35 * rim + 0.08 * carpet.smooth_noise(9)), 0, 0.9)
    colour, height = carpet.render()
    hue = STAIN_COLOURS[rng.integers(len(STAIN_COLOURS))]
    absorbed = 1 - amount[..., None] * (1 - hue / WEFT_COLOUR)
    return carpet.shade(colour * absorbed, height), one_piece(soaked, reach < 0.4)


def metal(carpet: Carpet, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """A small splinter or washer of metal: dark and bright at once, with a hard edge and a shadow."""
    rng = carpet.rng
    radius = 9.0 + 7.0 * strength + rng.uniform(0, 1.5)
    x0, y0 = carpet.somewhere(radius + 10)
    dx, dy = carpet.x - x0, carpet.y - y0
    if rng.random() < 0.35:  # a washer
        from_middle = np.hypot(dx, dy)
        inside = np.minimum(radius * 0.85 - from_middle, from_middle - radius * 0.38)
    else:  # a splinter: what a few straight cuts leave
        corners = rng.integers(4, 7)
        angles = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * np.pi / corners + rng.uniform(0, 6)
        reach = radius * rng.uniform(0.45, 1.05, corners)
        inside = np.min(
            [r - np.cos(a) * dx - np.sin(a) * dy for a, r in zip(angles, reach, strict=True)], axis=0
        )  # distance from the nearest cut
    cover = smooth_step(inside, -0.3, 0.3)

    # Polished metal mirrors the room: a bright window, dark corners, scratches along the rolling direction.
    lie = rng.uniform(0, np.pi)
    position = (np.cos(lie) * dx + np.sin(lie) * dy) / radius
    scratch = 0.05 * np.sin(9.0 * (np.cos(lie) * dy - np.sin(lie) * dx) + 3 * carpet.smooth_noise(30))
    window = rng.uniform(-0.35, 0.35)
    mirror = 0.34 + 0.20 * position + scratch + 0.85 * np.exp(-(((position - window) / 0.20) ** 2))
    bevel = np.exp(-np.clip(inside, 0, None) / 0.7)
    facing = -(np.cos(carpet.light) * dx + np.sin(carpet.light) * dy) / radius
    mirror = mirror - bevel * 0.30 * np.clip(facing * 1.5, -1, 1)
    dull = 0.50 + 0.04 * carpet.grain
    mirror = dull + (mirror - dull) * (0.45 + 0.55 * strength)
    lit, _ = good(carpet, 0)
    lit = lit * (1 - 0.60 * shadow(carpet, cover, 1.8) * (1 - cover))[..., None]
    return over(lit, mirror[..., None] * np.array([0.96, 0.99, 1.03]), cover), cover


MAKERS = {"good": good, "cut": cut, "hole": hole, "thread": thread, "stain": stain, "metal": metal}


def make_image(kind: str, strength: float, seed: list[int], image_size: int) -> tuple[Image.Image, Image.Image]:
    """One picture and its mask.

    Args:
        kind: "good" or one of DEFECTS.
        strength: of the defect, from 0 (invisible, nearly) to 1 (plain).
        seed: same seed, same picture.
        image_size: pixels of a side.

    Returns:
        the picture (RGB) and its mask (L, 255 on pixels at least half of which the defect covers).
    """
    carpet = Carpet(np.random.default_rng(seed), image_size)
    lit, mask = MAKERS[kind](carpet, strength)
    cover = mask.reshape(image_size, OVERSAMPLING, image_size, OVERSAMPLING).mean(axis=(1, 3))
    return carpet.photograph(lit), Image.fromarray(np.where(cover >= 0.5, 255, 0).astype(np.uint8))


def plan(train: int, test_good: int, test_per_kind: int) -> list[tuple[str, str, float]]:
    """Every picture's folder, kind and strength of defect; in a kind, the last is the hardest to see."""
    pictures = [("train/good", "good", 0.0)] * train + [("test/good", "good", 0.0)] * test_good
    for kind in DEFECTS:
        pictures += [(f"test/{kind}", kind, float(s)) for s in np.linspace(1, WEAKEST, test_per_kind)]
    return pictures


def _write_picture(category: Path, planned: tuple[str, str, float], number: int, parameters: dict[str, int]):
    folder, kind, strength = planned
    # A picture depends on its own name alone, not on how many others there are.
    seed = [parameters["seed"], zlib.crc32(folder.encode()), number]
    picture, mask = make_image(kind, strength, seed, parameters["image_size"])
    picture.save(category / folder / f"{number:03d}.png")
    if kind != "good":
        mask.save(category / "ground_truth" / kind / f"{number:03d}_mask.png")


def write_category(category: Path, parameters: dict[str, int]) -> bool:
    """Fill the folder `category`, unless it already holds just this.

    Args:
        category: the folder to make. It appears complete or not at all.
        parameters: `seed`, `image_size`, `train`, `test_good`, `test_per_kind`.

    Returns:
        whether anything had to be made.

    Raises:
        UserError: the folder exists and was not made by this generator.
    """
    record = category / "demo_dataset.json"
    contents = json.dumps({"generator": "demo_dataset.py", "version": VERSION, **parameters}, indent=2) + "\n"
    pictures = plan(parameters["train"], parameters["test_good"], parameters["test_per_kind"])
    if category.exists() or category.is_symlink():
        if category.is_symlink() or not record.is_file():
            raise UserError(f"{category}: exists and is not a demo category; remove it or choose another --category")
        files = len(list(category.glob("t*/*/*.png"))) if record.read_text(encoding="utf-8") == contents else -1
        if files == len(pictures):
            return False

    category.parent.mkdir(parents=True, exist_ok=True)
    unfinished, outdated = (category.parent / f".{category.name}.{state}" for state in ("unfinished", "outdated"))
    for leftover in (unfinished, outdated):
        shutil.rmtree(leftover, ignore_errors=True)
    for folder, kind, _ in set(pictures):
        (unfinished / folder).mkdir(parents=True, exist_ok=True)
        if kind != "good":
            (unfinished / "ground_truth" / kind).mkdir(parents=True, exist_ok=True)
    (unfinished / record.name).write_text(contents, encoding="utf-8")

    numbers = {}
    with ThreadPoolExecutor(processors()) as pool:  # NumPy computes outside the interpreter's lock
        jobs = []
        for planned in pictures:
            numbers[planned[0]] = numbers.get(planned[0], -1) + 1
            jobs.append(pool.submit(_write_picture, unfinished, planned, numbers[planned[0]], parameters))
        try:
            for job in tqdm(as_completed(jobs), total=len(jobs), desc=category.name, unit="image", disable=None):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if category.exists():
        category.rename(outdated)
    unfinished.rename(category)
    shutil.rmtree(outdated, ignore_errors=True)
    return True


def main():
    """Read the command line and make the category."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder of the categories (%(default)s)")
    parser.add_argument("--category", default="demo_carpet", help="name of the category to make (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another carpet (%(default)s)")
    parser.add_argument("--image-size", type=int, default=256, help="pixels of a side (%(default)s)")
    parser.add_argument("--train", type=int, default=80, help="good images to train on (%(default)s)")
    parser.add_argument("--test-good", type=int, default=16, help="good images to test on (%(default)s)")
    parser.add_argument(
        "--test-per-kind",
        type=int,
        default=8,
        help="test images of each defect, from plain to hard to see (%(default)s)",
    )
    arguments = parser.parse_args()
    if arguments.image_size < 32 or arguments.train < 1 or min(arguments.test_good, arguments.test_per_kind) < 0:
        raise UserError("--image-size must be at least 32, --train at least 1, the others at least 0")
    if arguments.seed < 0:
        raise UserError("--seed must be 0 or more")
    category = arguments.data / category_name(arguments.category)
    names = ("seed", "image_size", "train", "test_good", "test_per_kind")
    try:
        made = write_category(category, {name: getattr(arguments, name) for name in names})
    except OSError as error:
        raise UserError(f"{error.filename or category}: cannot be written ({error.strerror})") from None
    print(f"{category}: {'made' if made else 'already there, unchanged'}")


if __name__ == "__main__":
    run(main)
