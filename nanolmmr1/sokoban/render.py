"""Pictures of levels: square cells of 16 pixels, drawn here, then enlarged.

The seven kinds of cells differ in shape and in colour, and every cell of a kind has the same pixels.

Next: plan.py, the reward.
"""

import functools
import io

import numpy as np
from PIL import Image, ImageDraw

from nanolmmr1.sokoban.level import BOX, BOX_ON_TARGET, PLAYER, PLAYER_ON_TARGET, TARGET, WALL, Level

SIDE = 16  # pixels of a cell
HEIGHT = 640  # pixels of a picture, as in LMM-R1
LEGEND = ("Dark bricks are walls, a red ring is a target, a brown crate is a box, a green crate is a box on a target, "
          "and the blue figure is you.")  # fmt: skip


def draw(level: Level, height: int = HEIGHT) -> Image.Image:
    """A picture of a level, RGB, `height` pixels high."""
    cells = _cells()[level.codes()]  # (rows, columns, SIDE, SIDE, 3)
    pixels = cells.swapaxes(1, 2).reshape(level.rows * SIDE, level.columns * SIDE, 3)
    size = (round(height * level.columns / level.rows), height)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def png(level: Level, height: int = HEIGHT) -> bytes:
    """The bytes of `draw` as PNG."""
    file = io.BytesIO()
    draw(level, height).save(file, "PNG")
    return file.getvalue()


@functools.cache
def _cells() -> np.ndarray:
    """Pixels by code, uint8 (7, SIDE, SIDE, 3)."""
    return np.stack([np.asarray(_cell(code)) for code in range(PLAYER_ON_TARGET + 1)])


def _cell(code: int) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), (238, 232, 213))
    pen = ImageDraw.Draw(image)
    if code == WALL:
        pen.rectangle((0, 0, 15, 15), (70, 76, 88))
        for line in ((0, 7, 15, 7), (0, 15, 15, 15), (7, 0, 7, 7), (15, 8, 15, 15), (3, 8, 3, 15)):
            pen.line(line, (38, 42, 50))
    if code in (TARGET, PLAYER_ON_TARGET):
        pen.ellipse((1, 1, 14, 14), outline=(214, 40, 40), width=2)
    if code in (BOX, BOX_ON_TARGET):
        fill, edge = ((176, 112, 48), (92, 54, 18)) if code == BOX else ((72, 168, 84), (22, 88, 34))
        pen.rectangle((1, 1, 14, 14), fill, edge, 2)
        pen.line((3, 3, 12, 12), edge, 2)
        pen.line((3, 12, 12, 3), edge, 2)
    if code in (PLAYER, PLAYER_ON_TARGET):
        pen.ellipse((5, 2, 10, 7), (24, 74, 168))
        pen.rectangle((4, 8, 11, 13), (24, 74, 168))
    return image
