"""Fonts for names in Chinese, Japanese or Korean: those that the machine has, as Matplotlib's own lacks them."""

from functools import cache
from pathlib import Path

from matplotlib import font_manager

# Usual ones of Linux, macOS and Windows, those with the most characters first.
FAMILIES = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans CJK TC", "Noto Sans CJK KR", "Source Han Sans"),
    *("Noto Sans JP", "Noto Sans SC", "Noto Sans TC", "Noto Sans KR", "Arial Unicode MS", "Droid Sans Fallback"),
    *("Hiragino Sans", "PingFang SC", "PingFang HK", "Heiti TC", "Apple SD Gothic Neo", "AppleGothic"),
    *("Yu Gothic", "Meiryo", "MS Gothic", "Microsoft YaHei", "SimHei", "Microsoft JhengHei", "Malgun Gothic"),
    *("WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "IPAexGothic", "IPAGothic", "TakaoGothic", "VL Gothic"),
    *("NanumGothic", "UnDotum", "Unifont"),
)


@cache
def families() -> tuple[str, ...]:
    """Those of FAMILIES that the machine has."""
    there = set(font_manager.get_font_names())
    return tuple(family for family in FAMILIES if family in there)


def file_for(words: str, own: Path) -> str | Path:
    """The font file that has most of the characters: `own`, unless one of FAMILIES has more of them."""
    files = [own, *map(font_manager.findfont, families())]
    return max(files, key=lambda file: sum(ord(character) in _characters(file) for character in words))


@cache
def _characters(file):
    return frozenset(font_manager.get_font(file).get_charmap())
