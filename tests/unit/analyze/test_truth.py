from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpa.analyze.truth import spans_of, visual_tokens
from dpa.errors import DataError


def test_a_token_is_visual_if_any_of_its_letters_is() -> None:
    text = "a red ring."
    pieces = ["a", " re", "d ", "", "ring", ".", "\n"]
    assert visual_tokens(pieces, text, ((2, 5), (6, 10))) == [False, True, True, None, True, False, None]
    # an answer behind something of the template's
    assert visual_tokens([" ", "a", " red", "<end>"], "a red", ((2, 5),)) == [None, False, True, None]
    assert visual_tokens(["A", " red"], "a red", ((2, 5),)) is None


def test_spans_of_files(tmp_path: Path) -> None:
    def record(text: str, spans: object) -> dict[str, object]:
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": text}]
        return {"id": "1", "conversations": turns, "visual_spans": spans}

    listed, lines = tmp_path / "a.json", tmp_path / "b.jsonl"
    listed.write_text(json.dumps([record("a red ring", [[2, 5]]), record("a blue ring", [[2, 6]])]))
    lines.write_text(json.dumps(record("two rings", [])) + "\n")
    found = spans_of([tmp_path / "x.parquet", listed, lines], ["a blue ring", "two rings", "not there"])
    assert found == {"a blue ring": ((2, 6),), "two rings": ()}
    plain = tmp_path / "plain.json"
    plain.write_text('[{"conversations": []}, {"visual_spans": "never read"}]')
    assert spans_of([plain], ["x"]) == {}
    for wrong, message in (([[2, 99]], "10 characters"), ([[2]], "a list of"), ("no", "a list of")):
        listed.write_text(json.dumps([record("a red ring", wrong)]))
        with pytest.raises(DataError, match=f"record 1.*{message}"):
            spans_of([listed], ["a red ring"])
