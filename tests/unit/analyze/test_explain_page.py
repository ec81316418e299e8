"""The page and the figure, from numbers made up here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from dpa.analyze.explain import Explanation, Token, rule_of
from dpa.analyze.explain_figure import write_figure
from dpa.analyze.explain_page import page, parts_of, probability, scale_of, signed, write_page
from dpa.errors import UserError


def made(name: str = "a/<b>", relevance: float | None = 0.3, *, kind: str = "cmo", side: int = 8) -> Explanation:
    tokens = (
        Token("<script>", -0.1, -2.0, relevance, 0.25, 0, True),
        Token(" dog$", -3.0, -1.0, -0.02, 0.05, 0, False),
        Token("", -0.5, None, None, 0.2, 0, None),
        Token("\n", -1e-9, -20.0, 0.0, 0.05, 1, None),
    )
    picture = Image.new("RGB", (side, side // 2), (200, 30, 30))
    return Explanation(name, rule_of(kind), "photo & co.jpg", ("what?", ""), (picture,), "pad", tokens)


def test_page_is_whole_and_harmless(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "page.html"
    write_page(path, [(made(), made("other", 0.7)), (made(side=2000), made("other"))], title="<i>T</i>")
    html = path.read_text(encoding="utf-8")
    assert "<script" not in html
    assert "http" not in html.replace("http-equiv", "")
    assert "a/&lt;b&gt;" in html
    assert "photo &amp; co.jpg" in html
    assert "<i>" not in html.split("<style>")[0]
    assert html.count("data:image/png;base64,") == 1
    assert html.count("data:image/jpeg;base64,") == 1
    assert len(html) < 60_000
    assert "prefers-color-scheme: dark" in html
    # every token can be reached without a mouse, says its numbers, and stands in the table
    assert html.count('tabindex="0"') == 16
    assert "&lt;script&gt;: relevance +0.700, p with image 0.905, without 0.135, weight 0.250" in html
    assert html.count("<td>&lt;script&gt;</td>") == 4
    assert html.count("yes</td>") == 4
    assert "what?" in html
    # the pooled numbers of each model
    assert "all 2 samples" in html


def test_one_scale_for_both_sides() -> None:
    html = page([(made("a", 0.3), made("b", 0.7))])
    shares = re.findall(r'class="t see" style="--a:([\d.]+)"', html)
    assert shares == ["0.3", "0.7"]  # of 1, not each of its own
    assert "−1" in html
    with pytest.raises(UserError, match="2 rules"):
        page([(made(), made(kind="cal"))])


@pytest.mark.parametrize(
    ("largest", "scale"), [(0.3, 0.5), (0.02, 0.02), (0.021, 0.05), (1.0, 1.0), (7.2, 10.0), (0.0, 0.02)]
)
def test_scale_is_a_round_number(largest: float, scale: float) -> None:
    assert scale_of([made(relevance=largest)]) == pytest.approx(scale)


def test_words_for_numbers_and_spaces() -> None:
    assert probability(-20.0) == "2e-9"
    assert probability(0.0) == "1.000"
    assert signed(-0.0004) == "0.000"
    assert signed(-0.5) == "−0.500"
    assert parts_of(" a b ") == (" ", "a b", " ")
    assert parts_of("\n") == ("", "⏎", "\n")
    assert parts_of("  ") == ("", "␣␣", "")
    assert parts_of("") == ("", "▫", "")


def test_figure_for_papers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    long = made()
    words = tuple(Token(f" word{k}", -1.0, -1.0 - k, k / 60, 0.1, 0, k % 2 == 0) for k in range(60))
    many = Explanation("c", long.rule, "s", ("p",), long.pictures, "crop", words)
    write_figure(one, [made()])
    write_figure(two, [many, made("b" * 200)])
    small, large = Image.open(one), Image.open(two)
    assert small.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    assert small.width == large.width == round(6.9 * 300)
    assert large.height > small.height
    # nothing is drawn beyond the right margin
    strip = large.convert("L").crop((large.width - 6, 0, large.width, large.height))
    assert strip.getextrema() == (255, 255)
    assert any(pixel[0] > pixel[2] + 80 for _, pixel in small.convert("RGB").getcolors(1 << 24) or [])  # orange
    with pytest.raises(UserError, match="name it"):
        write_figure(tmp_path / "one.pdf", [made()])
