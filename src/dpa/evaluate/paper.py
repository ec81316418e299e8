"""What the paper reports (arXiv 2509.14735), as far as it is known here: averages without the numbers behind them."""

from __future__ import annotations

from dataclasses import dataclass

from dpa.errors import UserError


@dataclass(frozen=True, slots=True)
class PaperRow:
    """Averages over the seven benchmarks, 0 to 100, for one LLM and one set of captions."""

    llm: str
    captions: str
    averages: dict[str, float]
    """Method -> average."""


PAPER_ROWS: dict[str, PaperRow] = {
    "qwen2.5-7b/sharegpt4v": PaperRow(
        "Qwen2.5-7B-Instruct", "ShareGPT4V-PT", {"vanilla": 49.0, "cal": 51.0, "dpa": 51.7}
    ),
    "llama3.1-8b/sharegpt4v": PaperRow(
        "Llama-3.1-8B-Instruct", "ShareGPT4V-PT", {"vanilla": 47.0, "cal": 46.0, "dpa": 49.9}
    ),
    "gemma2-9b/sharegpt4v": PaperRow("Gemma-2-9B-it", "ShareGPT4V-PT", {"vanilla": 48.2, "cal": 47.4, "dpa": 50.0}),
}
"""The authors' README repeats these; the tables per benchmark are in the paper's PDF alone and are not copied here."""


def paper_row(name: str) -> PaperRow:
    """Raises UserError for a row that is not known; says which are."""
    if name not in PAPER_ROWS:
        raise UserError(f"no row {name!r} of the paper is known; known: {', '.join(PAPER_ROWS)}")
    return PAPER_ROWS[name]
