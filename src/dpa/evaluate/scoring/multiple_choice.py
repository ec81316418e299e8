"""MMBench, AI2D, CV-Bench, MMVP and NaturalBench."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from dpa.errors import DataError
from dpa.evaluate.scoring.options import (
    cambrian_cvbench_options,
    cambrian_mmvp_options,
    first_word,
    strict_option,
    strict_word,
    vlmevalkit_option,
)
from dpa.evaluate.scoring.rows import Row, refuse_incomplete, refuse_twice
from dpa.evaluate.scoring.types import Outcome, ScoredRecord, ScoringRules, Unit

NO_KIND = "all"
_ROLL = 1_000_000
"""MMBench's index is question + roll * 1,000,000."""
_SOURCES = ("ADE20K", "COCO", "Omni3D")
_QUADRUPLE = ("q0-i0", "q0-i1", "q1-i0", "q1-i1")
"""NaturalBench: two questions about two images; the right answers alternate within a question and within an image."""
_WORDS = {"yes_no": ("Yes", "No"), "multiple_choice": ("A", "B")}


def mean(values: Iterable[float]) -> float:
    """On 0 to 100; at least one value."""
    items = list(values)
    return 100 * sum(items) / len(items)


def means_by(prefix: str, scored: Iterable[tuple[str, float]]) -> dict[str, float]:
    """``prefix/NAME`` -> mean, in the order of the names."""
    by_name: dict[str, list[float]] = {}
    for name, score in scored:
        by_name.setdefault(name, []).append(score)
    return {f"{prefix}/{name}": mean(by_name[name]) for name in sorted(by_name) if name}


def record_of(row: Row, readings: Iterable[str], right: str, *, group: str, kind: str) -> ScoredRecord:
    """``readings``: the options that the answer may stand for."""
    found = set(readings)
    empty = not row.prediction.strip()
    return ScoredRecord(
        id=row.id,
        group=group,
        kind=kind,
        score=float(right in found),
        parsed=bool(found) and not empty,
        empty=empty,
    )


def _one(found: str | None) -> tuple[str, ...]:
    return () if found is None else (found,)


def _letter_record(row: Row, rules: ScoringRules, *, group: str, kind: str) -> ScoredRecord:
    """By VLMEvalKit's rules (paper) or strictly."""
    choices = row.choices()
    if rules.profile == "strict":
        found = strict_option(row.prediction, choices)
    else:
        found = vlmevalkit_option(row.prediction, choices, rules.vlmevalkit)
    return record_of(row, _one(found), row.letter(choices), group=group, kind=kind)


def score_ai2d(rows: Sequence[Row], rules: ScoringRules, complete: bool) -> Outcome:
    """Accuracy over rows."""
    records = [_letter_record(row, rules, group=row.id, kind=row.text("category", NO_KIND)) for row in rows]
    metrics = {"accuracy": mean(record.score for record in records)}
    metrics |= means_by("category", ((row.text("category", ""), r.score) for row, r in zip(rows, records, strict=True)))
    units = tuple(Unit(id=record.id, group=record.group, score=record.score) for record in records)
    return Outcome(metrics, "accuracy", tuple(records), units)


def score_mmbench(rows: Sequence[Row], rules: ScoringRules, complete: bool) -> Outcome:
    """CircularEval: a question counts only if it is answered rightly under every order (roll) of its options.

    VLMEvalKit's ``mcq_circular_eval`` without a judge. A question with k options has k rolls.
    """
    refuse_twice("mmbench", "index", [(row.index(), row) for row in rows])
    questions: dict[int, dict[int, Row]] = {}
    for row in rows:
        roll, question = divmod(row.index(), _ROLL)
        questions.setdefault(question, {})[roll] = row
    if complete:
        _refuse_missing_rolls(questions)
    records = [
        _letter_record(row, rules, group=str(row.index() % _ROLL), kind=row.text("category", NO_KIND)) for row in rows
    ]
    score_of = {row.index(): record.score for row, record in zip(rows, records, strict=True)}
    units = tuple(
        Unit(
            id=str(question),
            group=str(question),
            score=min(score_of[roll * _ROLL + question] for roll in rolls),
        )
        for question, rolls in questions.items()
    )
    metrics = {
        "overall": mean(unit.score for unit in units),
        "vanilla": mean(record.score for record in records),
        "rolls_per_question": len(rows) / len(questions),
    }
    first_rows = [rolls[min(rolls)] for rolls in questions.values()]
    for name in ("l2_category", "category"):
        named = ((row.text(name, ""), unit.score) for row, unit in zip(first_rows, units, strict=True))
        metrics |= means_by(name, named)
    return Outcome(metrics, "overall", tuple(records), units)


def _refuse_missing_rolls(questions: Mapping[int, Mapping[int, Row]]) -> None:
    """A file in which no question has a second roll is scored as it is: ``rolls_per_question`` then says 1."""
    circular = any(len(rolls) > 1 for rolls in questions.values())
    missing = {}
    for question, rolls in questions.items():
        row = next(iter(rolls.values()))
        expected = row.count("rolls") or (len(row.choices()) if circular else 1)
        lacks = sorted(set(range(expected)) - set(rolls))
        if lacks:
            missing[f"question {question}"] = [f"roll {roll}" for roll in lacks]
    refuse_incomplete(
        "mmbench",
        f"of {len(questions)} questions lack rolls",
        missing,
        "Roll r of question q is the row with index q + 1,000,000 r, and a question has as many rolls as options: "
        "answer all rows of the benchmark's file (a limit cuts questions apart) and score again",
    )


def score_cvbench(rows: Sequence[Row], rules: ScoringRules, complete: bool) -> Outcome:
    """Mean of 2D and 3D, where 2D is the mean of ADE20K and COCO and 3D is Omni3D: not the mean over rows."""
    records = []
    for row in rows:
        choices, source = row.choices(), row.name("source", _SOURCES)
        readings: Iterable[str]
        if rules.profile == "strict":
            readings = _one(strict_option(row.prediction, choices))
        else:
            readings = cambrian_cvbench_options(row.prediction, choices, with_texts=source == "Omni3D")
        records.append(record_of(row, readings, row.letter(choices), group=row.id, kind=source))
    by_source = {source: [r.score for r in records if r.kind == source] for source in _SOURCES}
    there = [source for source in _SOURCES if by_source[source]]
    if complete and len(there) < len(_SOURCES):
        counts = ", ".join(f"{source} {len(by_source[source])}" for source in _SOURCES)
        raise DataError(
            f"cvbench: {len(_SOURCES) - len(there)} of {len(_SOURCES)} sources have no row ({counts}). 2D is the mean "
            "of ADE20K and COCO, 3D is Omni3D: answer rows of all three (CV-Bench's test split has 2,638) and score again"
        )
    accuracy = {source: mean(by_source[source]) for source in there}
    halves = {"2D": [source for source in there if source != "Omni3D"], "3D": [s for s in there if s == "Omni3D"]}
    halves = {name: sources for name, sources in halves.items() if sources}
    in_halves = {name: sum(accuracy[source] for source in sources) / len(sources) for name, sources in halves.items()}
    metrics = {"overall": sum(in_halves.values()) / len(in_halves), **in_halves, **accuracy}
    metrics["row_accuracy"] = mean(record.score for record in records)
    metrics |= means_by("task", ((row.text("task", ""), r.score) for row, r in zip(rows, records, strict=True)))
    weight = {
        source: 1 / len(halves) / len(sources) / len(by_source[source])
        for sources in halves.values()
        for source in sources
    }
    units = tuple(Unit(id=r.id, group=r.group, score=r.score, weight=weight[r.kind]) for r in records)
    return Outcome(metrics, "overall", tuple(records), units)


def score_mmvp(rows: Sequence[Row], rules: ScoringRules, complete: bool) -> Outcome:
    """Pairs (1, 2), (3, 4), ... of which both are right."""
    groups = _grouped("mmvp", rows, size=2, start=1)
    if complete:
        refuse_incomplete(
            "mmvp",
            f"of {len(groups)} pairs have one half",
            {_pair(pair): [f"index {2 * pair + 1 + place}" for place in places] for pair, places in _gaps(groups, 2)},
            "Pairs are indices 1 and 2, 3 and 4, ...: answer both rows of each and score again",
        )
    records = []
    for row in rows:
        choices = row.choices()
        readings: Iterable[str]
        if rules.profile == "strict":
            readings = _one(strict_option(row.prediction, choices))
        else:
            readings = cambrian_mmvp_options(row.prediction, choices)
        pair = _pair((row.index() - 1) // 2)
        records.append(record_of(row, readings, row.letter(choices), group=pair, kind=NO_KIND))
    score_of = {record.id: record.score for record in records}
    units = tuple(
        Unit(id=_pair(pair), group=_pair(pair), score=min(score_of[row.id] for row in found.values()))
        for pair, found in groups.items()
    )
    metrics = {
        "pair_accuracy": mean(unit.score for unit in units),
        "row_accuracy": mean(record.score for record in records),
    }
    return Outcome(metrics, "pair_accuracy", tuple(records), units)


def _pair(number: int) -> str:
    return f"pair {2 * number + 1}-{2 * number + 2}"


def score_naturalbench(rows: Sequence[Row], rules: ScoringRules, complete: bool) -> Outcome:
    """Acc over rows; Q-Acc, I-Acc, G-Acc: shares of questions, images, groups of which all answers are right."""
    groups = _grouped("naturalbench", rows, size=4, start=0)
    if complete:
        refuse_incomplete(
            "naturalbench",
            f"of {len(groups)} groups of four are not whole",
            {
                f"group {group}": [f"index {4 * group + place} ({_QUADRUPLE[place]})" for place in places]
                for group, places in _gaps(groups, 4)
            },
            "Rows are numbered from 0 in the order q0-i0, q0-i1, q1-i0, q1-i1: answer all four and score again",
        )
    records = [_naturalbench_record(row, rules) for row in rows]
    score_of = {record.id: record.score for record in records}
    metrics = {"Acc": mean(record.score for record in records)}
    whole = [[score_of[found[i].id] for i in range(4)] for found in groups.values() if len(found) == 4]
    sides: dict[str, Callable[[list[float]], list[float]]] = {
        "Q-Acc": lambda s: [min(s[0], s[1]), min(s[2], s[3])],
        "I-Acc": lambda s: [min(s[0], s[2]), min(s[1], s[3])],
        "G-Acc": lambda s: [min(s)],
    }
    if whole:
        metrics |= {name: mean(value for scores in whole for value in side(scores)) for name, side in sides.items()}
    units = tuple(Unit(id=record.id, group=record.group, score=record.score) for record in records)
    return Outcome(metrics, "Acc", tuple(records), units)


def _naturalbench_record(row: Row, rules: ScoringRules) -> ScoredRecord:
    """By the answer in the record. VLMEvalKit takes Yes or A for q0-i0 and q1-i1, No or B for the others, unread: the
    same for the benchmark's own rows."""
    kind = row.name("question_type", _WORDS)
    words = _WORDS[kind]
    right = next((word for word in words if word.lower() == row.text("answer").strip().lower()), None)
    if right is None:
        raise row.wrong("answer", f"is {row.text('answer')!r}; for {kind} it is {' or '.join(words)}")
    if rules.profile == "paper":
        found = first_word(row.prediction, words)
    elif kind == "yes_no":
        found = strict_word(row.prediction, words)
    else:
        given = row.record.get("choices") is not None
        found = strict_option(row.prediction, row.choices() if given else {"A": "A", "B": "B"})
    return record_of(row, _one(found), right, group=str(row.index() // 4), kind=kind)


def _grouped(benchmark: str, rows: Sequence[Row], *, size: int, start: int) -> dict[int, dict[int, Row]]:
    """Group -> place in the group -> row, by index."""
    refuse_twice(benchmark, "index", [(row.index(), row) for row in rows])
    groups: dict[int, dict[int, Row]] = {}
    for row in rows:
        number = row.index() - start
        if number < 0:
            raise row.wrong("index", f"is {row.index()}; {benchmark} counts from {start}")
        groups.setdefault(number // size, {})[number % size] = row
    return groups


def _gaps(groups: Mapping[int, Mapping[int, Row]], size: int) -> list[tuple[int, list[int]]]:
    """(group, missing places) of the groups that are not whole."""
    places = {group: [place for place in range(size) if place not in found] for group, found in groups.items()}
    return [(group, missing) for group, missing in places.items() if missing]
