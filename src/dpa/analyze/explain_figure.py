"""Explanations as a PNG for papers: the picture, the coloured text in lines, one colour bar."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Text

from dpa.analyze.explain import Explanation, Token
from dpa.analyze.explain_page import FORMULAS, facts_of, parts_of, scale_of
from dpa.errors import UserError
from dpa.log import get_logger
from dpa.store import write_output

log = get_logger(__name__)

POSITIVE, NEGATIVE = "#ff850a", "#4896ff"
"""As on the page, light: orange and blue, which colour-blind readers tell apart; black text is readable on both."""
DPI = 300
WIDTH = 6.9
"""Inches: two columns of a conference paper."""
_PICTURE = 1.5
"""Inches, width of the picture."""
_MARGIN = 0.08
_SIZE = 9
"""Points."""
_SMALL = 6.5
_BAR = 0.6
"""Inches for the colour bar, its numbers and its title."""
_LINE = 0.235
"""Inches from line to line."""
_FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans", "Arial Unicode MS", "Hiragino Sans")
"""The first is matplotlib's own; others fill in what it lacks, where they are installed."""


def write_figure(path: Path, row: Sequence[Explanation]) -> None:
    """Writes the picture.

    Args:
        path: PNG file; its folder is made.
        row: one sample under one or more models, one below the other.

    Raises:
        UserError: another suffix than .png.
        StorageError, UserError: the disk is full or not writable.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: the figure is written as PNG; name it .png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message="Glyph .* missing from font")
        figure = _draw(row)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=DPI, metadata={"Software": None}, pil_kwargs={"optimize": True})
    write_output(path, picture.getvalue())
    missing = {str(item.message) for item in caught if "missing from" in str(item.message)}
    if missing:
        log.warning("%s: no font here has %d of its characters; boxes stand in their place", path, len(missing))


def _draw(row: Sequence[Explanation]) -> Figure:
    fonts = {font.name for font in font_manager.fontManager.ttflist}
    family = [name for name in _FONTS if name in fonts]
    figure = Figure(figsize=(WIDTH, 1.0), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    left = _PICTURE + 3 * _MARGIN
    writer = _Writer(figure, canvas, family, left, WIDTH - _MARGIN, scale_of(row))
    for number, explanation in enumerate(row):
        if number:
            writer.down(_LINE * 0.5)
        if len(row) > 1:
            writer.heading(explanation.checkpoint)
        for segment, tokens in groupby(explanation.tokens, key=lambda token: token.segment):
            writer.line()
            if segment < len(explanation.prompts):
                writer.plain(explanation.prompts[segment])
            writer.tokens(list(tokens))
        writer.line()
        facts = facts_of(explanation.health)
        writer.plain(", ".join(f"{name} {value}" for name, value in facts if name != "tokens"), size=_SMALL)
    picture = row[0].pictures[0]
    tall = _PICTURE * picture.height / picture.width
    height = max(writer.bottom + _MARGIN + _BAR, tall + 2 * _MARGIN)
    _finish(figure, height, writer)
    axes = figure.add_axes((_MARGIN / WIDTH, 1 - (_MARGIN + tall) / height, _PICTURE / WIDTH, tall / height))
    axes.imshow(picture, interpolation="nearest" if max(picture.size) <= 160 else "auto")
    axes.set_axis_off()
    _colour_bar(figure, height, left, row, writer.scale)
    return figure


def _colour_bar(figure: Figure, height: float, left: float, row: Sequence[Explanation], scale: float) -> None:
    signed = any(token.relevance is not None and token.relevance < 0 for e in row for token in e.tokens)
    colours = [NEGATIVE, "#ffffff", POSITIVE] if signed else ["#ffffff", POSITIVE]
    normal = Normalize(-scale if signed else 0.0, scale)
    axes = figure.add_axes((left / WIDTH, 0.24 / height, 2.6 / WIDTH, 0.09 / height))
    mappable = ScalarMappable(normal, LinearSegmentedColormap.from_list("relevance", colours))
    drawn = figure.colorbar(mappable, cax=axes, orientation="horizontal")
    drawn.outline.set_linewidth(0.4)
    axes.tick_params(labelsize=7, length=2, width=0.4, pad=1.5)
    drawn.set_ticks([-scale, -scale / 2, 0, scale / 2, scale] if signed else [0, scale / 2, scale])
    kind = row[0].rule.kind
    label = f"relevance ({kind}): {FORMULAS[kind]}"
    if any(token.visual is not None for e in row for token in e.tokens):
        label += "; underlined: visual words"
    figure.text(left / WIDTH, 0.39 / height, label, fontsize=7, va="bottom", ha="left")


class _Writer:
    """Sets tokens into lines, measuring each; places are inches from the left and from the top."""

    def __init__(
        self, figure: Figure, canvas: FigureCanvasAgg, family: list[str], left: float, right: float, scale: float
    ) -> None:
        self._figure = figure
        self._renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
        self._family = family
        self._left, self._right = left, right
        self._x, self._top = left, _MARGIN
        self.scale = scale
        self.placed: list[tuple[Text | FancyBboxPatch, float, float]] = []
        """Artist, inches from the left, inches from the top to its middle."""
        self._space = self._width("x x", _SIZE) - self._width("xx", _SIZE)

    @property
    def bottom(self) -> float:
        """Inches from the top to the end of the last line."""
        return self._top if self._x == self._left else self._top + _LINE

    def line(self) -> None:
        """Ends a line that has begun."""
        if self._x > self._left:
            self._x = self._left
            self._top += _LINE

    def down(self, inches: float) -> None:
        """Leaves room."""
        self._top += inches

    def heading(self, text: str) -> None:
        """A line of its own, bold."""
        self._put(self._shortened(text, _SIZE), weight="bold")
        self.line()

    def plain(self, text: str, *, size: float = _SIZE) -> None:
        """Words without colour, wrapped."""
        for word in text.split():
            self._make_room(self._width(word, size))
            self._put(word, size=size, color="#626770")
            self._x += self._space * size / _SIZE
        self.line()

    def tokens(self, tokens: Sequence[Token]) -> None:
        """An answer; a line breaks before a word only, as far as words fit into a line."""
        parts = [parts_of(token.text) for token in tokens]
        widths = [self._width(body, _SIZE) for _, body, _ in parts]
        for place, (token, (lead, body, tail)) in enumerate(zip(tokens, parts, strict=True)):
            end = place + 1
            while end < len(parts) and not parts[end][0] and not parts[end - 1][2]:
                end += 1
            if "\n" in lead:
                self.line()
            elif self._x > self._left:
                self._x += self._space * len(lead)
            begins = place == 0 or bool(lead or parts[place - 1][2])
            word = sum(widths[place:end])
            self._make_room(word if begins and word <= self._right - self._left else widths[place])
            self._token(token, body, widths[place])
            self._x += self._space * len(tail.replace("\n", ""))
            if "\n" in tail:
                self.line()

    def _token(self, token: Token, body: str, width: float) -> None:
        share = 0.0 if token.relevance is None else min(1.0, abs(token.relevance) / self.scale)
        if share > 0:
            colour = NEGATIVE if token.relevance is not None and token.relevance < 0 else POSITIVE
            box = FancyBboxPatch(
                (0, 0), width, _LINE * 0.78, boxstyle="round,pad=0,rounding_size=0.02", linewidth=0, zorder=1
            )
            box.set_facecolor(_mixed(colour, share))
            self.placed.append((box, self._x, self._top + _LINE / 2))
        if token.visual:
            line = FancyBboxPatch((0, 0), width, 0.011, boxstyle="square,pad=0", linewidth=0, zorder=3)
            line.set_facecolor("#000000")
            self.placed.append((line, self._x, self._top + _LINE * 0.83))
        self._put(body)

    def _make_room(self, width: float) -> None:
        if self._x + width > self._right:
            self.line()

    def _put(self, text: str, *, size: float = _SIZE, color: str = "#000000", weight: str = "normal") -> None:
        artist = Text(
            0, 0, text, fontsize=size, color=color, fontweight=weight, va="center_baseline", parse_math=False, zorder=2
        )
        artist.set_fontfamily(self._family)
        self.placed.append((artist, self._x, self._top + _LINE / 2))
        self._x += self._width(text, size, weight)

    def _width(self, text: str, size: float, weight: str = "normal") -> float:
        """Inches."""
        artist = Text(0, 0, text, fontsize=size, fontweight=weight, parse_math=False)
        artist.set_fontfamily(self._family)
        artist.set_figure(self._figure)
        return float(artist.get_window_extent(self._renderer).width) / DPI

    def _shortened(self, text: str, size: float) -> str:
        while text and self._width(text, size, "bold") > self._right - self._left:
            text = "…" + text.lstrip("…")[1:]
        return text


def _finish(figure: Figure, height: float, writer: _Writer) -> None:
    """The height is known only now: everything goes to its place, in inches of the whole figure."""
    figure.set_size_inches(WIDTH, height)
    figure.patch.set_facecolor("#ffffff")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(height, 0)
    for artist, x, y in writer.placed:
        if isinstance(artist, Text):
            artist.set_position((x, y))
            axes._add_text(artist)  # type: ignore[attr-defined]
        else:
            artist.set_bounds(x, y - artist.get_height() / 2, artist.get_width(), artist.get_height())
            axes.add_patch(artist)


def _mixed(colour: str, share: float) -> tuple[float, float, float]:
    """Between white and the colour."""
    red, green, blue = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    return 1 - share * (1 - red), 1 - share * (1 - green), 1 - share * (1 - blue)
