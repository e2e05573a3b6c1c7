"""A contact sheet of the suite: pictures with their questions and answers, for the eye."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from megatron_ext.config.schema import DataConfig
from megatron_ext.data.chat import IMAGE
from megatron_ext.data.digits import Split
from megatron_ext.data.suite.draw import draw_dialogue
from megatron_ext.data.suite.render import render

_MARGIN, _LINE = 12, 13


def contact_sheet(config: DataConfig, split: Split, kind: str, seed: int, rows: int, columns: int, magnify: int = 5) -> Image.Image:
    """`rows` x `columns` conversations of one kind: the picture magnified, its turns beneath."""
    dialogues = [draw_dialogue(split, kind, seed, index, config) for index in range(rows * columns)]
    tiles_IHWC = render([dialogue.scene for dialogue in dialogues], config.image_size)
    captions = [[f"{question.removeprefix(IMAGE).strip()} -> {answer}" for question, answer in dialogue.turns] for dialogue in dialogues]
    side = config.image_size * magnify
    height = side + _MARGIN + _LINE * max(sum(1 + line.count("\n") for line in lines) for lines in captions) + _MARGIN
    width = _MARGIN + max(side, *(round(ImageFont.load_default().getlength(text)) for lines in captions for line in lines for text in line.split("\n")))
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (tile_HWC, lines) in enumerate(zip(tiles_IHWC, captions, strict=True)):
        left, top = index % columns * width + _MARGIN, index // columns * height + _MARGIN
        sheet.paste(Image.fromarray(tile_HWC).resize((side, side), Image.Resampling.NEAREST), (left, top))
        pen.multiline_text((left, top + side + 2), "\n".join(lines), "black", spacing=2)
    return sheet
