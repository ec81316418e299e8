"""The seven benchmarks and the lab in miniature: a dozen made-up questions each, in the true file formats.

``python -m dpa.testing.benchmarks OUT`` writes them, ``dpa eval CHECKPOINT --benchmarks all --data OUT --limit 100``
runs on them. Columns and quirks are the real files'; questions and pictures are ours. ``OUT/hub`` holds copies of three
benchmarks as the Hugging Face hub has them.
"""

from __future__ import annotations

import ast
import base64
import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

COLOURS = ("red", "blue", "green", "yellow", "white", "black")
_SHAPES = ("circle", "square")
ROWS = 12


def write_benchmarks(folder: Path) -> Path:
    """Writes all files; returns the folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    mmbench = _mmbench()
    write_tsv(folder / "MMBench_DEV_EN.tsv", mmbench)
    write_tsv(folder / "AI2D_TEST.tsv", _ai2d())
    write_tsv(folder / "DocVQA_VAL.tsv", _docvqa())
    ocrbench = _ocrbench()
    write_tsv(folder / "OCRBench.tsv", ocrbench)
    for dimension in ("2D", "3D"):
        write_tsv(folder / f"CV-Bench-{dimension}.tsv", _cvbench(dimension))
    _write_mmvp(folder / "mmvp")
    naturalbench = _naturalbench()
    write_tsv(folder / "NaturalBenchDataset.tsv", naturalbench)
    _write_lab(folder / "lab")
    write_hub(folder / "hub", mmbench=mmbench, ocrbench=ocrbench, naturalbench=naturalbench)
    return folder


def picture(number: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A shape of one colour on grey."""
    image = Image.new("RGB", size, (128, 128, 128))
    draw = ImageDraw.Draw(image)
    box = (size[0] // 4, size[1] // 4, 3 * size[0] // 4, 3 * size[1] // 4)
    colour = COLOURS[number % len(COLOURS)]
    draw.ellipse(box, fill=colour) if number % 2 == 0 else draw.rectangle(box, fill=colour)
    return image


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    """The bytes of a file."""
    with io.BytesIO() as file:
        image.save(file, format=form)
        return file.getvalue()


def odd_pictures() -> list[bytes]:
    """What strangers' files hold: palettes, transparency, 16 bit, grey, CMYK, turned by EXIF, a page, a line."""
    grey16 = Image.fromarray((np.arange(64 * 48, dtype=np.uint16) * 20).reshape(48, 64))
    turned = Image.Exif()
    turned[0x0112] = 6
    with io.BytesIO() as file:
        picture(3).save(file, format="JPEG", exif=turned)
        exif = file.getvalue()
    return [
        encoded(picture(0).convert("P")),
        encoded(picture(1).convert("RGBA")),
        encoded(grey16),
        encoded(picture(2).convert("L"), "JPEG"),
        encoded(picture(4).convert("CMYK"), "JPEG"),
        exif,
        encoded(picture(5, (1700, 2200)), "JPEG"),
        encoded(picture(6, (200, 3))),
    ]


def text64(data: bytes) -> str:
    """A TSV's cell."""
    return base64.b64encode(data).decode()


def write_tsv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """As pandas writes it: missing cells are empty, cells with tabs, quotes or newlines are quoted."""
    header = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(header)
        writer.writerows([["" if row.get(name) is None else row[name] for name in header] for row in rows])


def _mmbench() -> list[dict[str, Any]]:
    """Four questions with 4, 3, 3 and 2 options, each asked once per option, options rolled by one.

    Rolls come after all first rows, their image cells name the first row; "None" and "NA" are options.
    """
    asked: list[tuple[str, str | None, list[str], str]] = [
        ("Which colour has the shape?", "Look at the middle.\nNot at the edge.", ["red", "blue", "None", "NA"], "red"),
        ("Quelle forme voyez-vous – « ○ » ou « □ » ?", None, ["○ (un cercle)", "□ (un carré)", "n/a"], "□ (un carré)"),
        ('Which text is "quoted"?\tAnd tabbed?', None, ["a\tb", 'say "b"', "c, d"], "c, d"),
        ("Is the shape small?", None, ["yes", "no"], "no"),
    ]
    rows = []
    for roll in range(4):
        for number, (question, hint, options, answer) in enumerate(asked):
            if roll >= len(options):
                continue
            rolled = options[roll:] + options[:roll]
            index = 3 + 7 * number
            rows.append(
                {
                    "index": index + 1_000_000 * roll,
                    "question": question,
                    "hint": hint,
                    **{"ABCD"[place]: rolled[place] if place < len(rolled) else None for place in range(4)},
                    "answer": "ABCD"[rolled.index(answer)],
                    "category": ("attribute_recognition", "physical_relation")[number % 2],
                    "image": str(index) if roll else text64(odd_pictures()[number]),
                    "source": "drawn",
                    "l2-category": ("finegrained_perception", "relation_reasoning")[number % 2],
                    "comment": None,
                    "split": "dev",
                }
            )
    return rows


def _ai2d() -> list[dict[str, Any]]:
    return [
        {
            "index": number,
            "question": f"What does the arrow {number} point at?",
            "A": "the sun" if number != 5 else "None",
            "B": "a leaf",
            "C": "a root" if number % 3 else None,
            "D": "l'été – naïve 日本" if number % 3 else None,
            "answer": "AB"[number % 2],
            "image": text64(encoded(picture(number))) if number % 4 == 0 else str(number - number % 4),
            "category": "default",
        }
        for number in range(ROWS)
    ]


def _docvqa() -> list[dict[str, Any]]:
    """Two or three questions about a page; answers are lists, or one text."""
    answers = ["['4,500', '4500']", "['None']", "['O\\'Neill']", "May 3, 1999", "['[2]']", "['naïve café']"]
    pages = [odd_pictures()[6], encoded(picture(1, (300, 400))), encoded(picture(2, (300, 401)), "JPEG")]
    return [
        {
            "index": 49153 + number,
            "question": f"What is written in line {number}?",
            "answer": answers[number % len(answers)],
            "image": text64(pages[number // 5]) if number % 5 == 0 else str(49153 + number - number % 5),
        }
        for number in range(ROWS)
    ]


def _ocrbench() -> list[dict[str, Any]]:
    kinds = (
        "Regular Text Recognition",
        "Irregular Text Recognition",
        "Artistic Text Recognition",
        "Handwriting Recognition",
        "Digit String Recognition",
        "Non-Semantic Text Recognition",
        "Scene Text-centric VQA",
        "Doc-oriented VQA",
        "Key Information Extraction",
        "Handwritten Mathematical Expression Recognition",
        "Scene Text-centric VQA",
        "Key Information Extraction",
    )
    return [
        {
            "index": number + 1,
            "dataset": "drawn",
            "question": "what is written in the image?",
            "answer": repr(["\\frac { x } { 2 }"] if "Math" in kind else [f"word {number}", "NA"]),
            "category": kind,
            "image": text64(odd_pictures()[number % 8]),
        }
        for number, kind in enumerate(kinds)
    ]


def _cvbench(dimension: str) -> list[dict[str, Any]]:
    rows = []
    for number in range(ROWS // 2):
        choices = ["two", "three", "zero"] if dimension == "2D" else ["the red box", "the blue box"]
        listed = "\n".join(f"({letter}) {choice}" for letter, choice in zip("ABC", choices, strict=False))
        question = f"How many shapes are in picture {number}?" if dimension == "2D" else "Which is closer?"
        rows.append(
            {
                "index": number,
                "split": dimension,
                "task": "Count" if dimension == "2D" else "Depth",
                "question": question,
                **{letter: choices[place] if place < len(choices) else None for place, letter in enumerate("ABCDEF")},
                "answer": "AB"[number % 2],
                "prompt": f"{question} Select from the following choices.\n{listed}",
                "source": ("ADE20K", "COCO", "COCO")[number % 3] if dimension == "2D" else "Omni3D",
                "image": text64(encoded(picture(number), "JPEG")),
            }
        )
    return rows


def _write_mmvp(folder: Path) -> None:
    """The table's first heading is spelt with the letter l, as in the original; a byte order mark is before it."""
    pictures = folder / "MMVP Images"
    pictures.mkdir(parents=True, exist_ok=True)
    with open(folder / "Questions.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["lndex", "Question", "Options", "Correct Answer"])
        for number in range(1, ROWS + 1):
            pair = (number - 1) // 2
            options = ("(a) Open (b) Closed", "(a) Yes (b) No", "(a) left, then right (b) None")[pair % 3]
            question = ("Is the door open or closed?", "Is it day?", 'Where does the "arrow" point?')[pair % 3]
            writer.writerow([number, question, options, "(a)" if number % 2 else "(b)"])
            picture(number).save(pictures / f"{number}.jpg")


def _naturalbench() -> list[dict[str, Any]]:
    """Three groups of two questions and two images; multiple-choice questions name their options themselves."""
    rows: list[dict[str, Any]] = []
    for group in range(ROWS // 4):
        kind = "multiple_choice" if group == 1 else "yes_no"
        for place, (question, image) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
            right = question == image
            options = "\nOption: A: red; B: blue;" if kind == "multiple_choice" else ""
            rows.append(
                {
                    "index": group * 4 + place,
                    "question": f"Is shape {group} a {_SHAPES[question]}?{options}",
                    "answer": ("Yes" if right else "No") if kind == "yes_no" else ("A" if right else "B"),
                    "type": kind,
                    "source": "Flickr30K",
                    "image": text64(encoded(picture(2 * group + image), "JPEG")),
                }
            )
    return rows


def _write_lab(folder: Path) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(ROWS // 2):
        picture(number, (32, 32)).save(folder / "images" / f"{number}.png")
        colour = COLOURS[number % len(COLOURS)]
        asked = [
            ("colour", "what colour is it?", colour, list(COLOURS)),
            ("shape", "is it a circle?", "yes", ["yes", "no"]),
        ]
        for kind, question, answer, choices in asked:
            right = answer if kind == "colour" or number % 2 == 0 else "no"
            record = {"id": f"{number}-{kind}", "scene": f"scene-{number}", "image": f"images/{number}.png"}
            lines.append({**record, "question": question, "answer": right, "kind": kind, "choices": choices})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")


def write_hub(
    folder: Path,
    *,
    mmbench: Sequence[Mapping[str, Any]],
    ocrbench: Sequence[Mapping[str, Any]],
    naturalbench: Sequence[Mapping[str, Any]],
) -> None:
    """MMBench as parquet in two files (missing cells are the text "nan"), OCRBench as ``save_to_disk`` writes it,
    NaturalBench with four questions in a row."""
    first = {str(row["index"]): row["image"] for row in mmbench if len(row["image"]) > 64}
    tables = [
        {
            **{name: "nan" if row[name] is None else str(row[name]) for name in row if name != "l2-category"},
            "L2-category": row["l2-category"],
            "image": _struct(first.get(row["image"], row["image"])),
        }
        for row in mmbench
    ]
    place = folder / "mmbench" / "en"
    place.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate((tables[:7], tables[7:])):
        pq.write_table(pa.Table.from_pylist(part), place / f"dev-{number:05d}-of-00002.parquet", row_group_size=3)
    (folder / "ocrbench" / "test").mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(
        [
            {
                "dataset": row["dataset"],
                "question": row["question"],
                "question_type": row["category"],
                "answer": ast.literal_eval(row["answer"]),
                "image": _struct(row["image"]),
            }
            for row in ocrbench
        ]
    )
    path = str(folder / "ocrbench" / "test" / "data-00000-of-00001.arrow")
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    (folder / "naturalbench" / "data").mkdir(parents=True, exist_ok=True)
    groups = pa.Table.from_pylist([_group(naturalbench[start : start + 4]) for start in range(0, len(naturalbench), 4)])
    pq.write_table(groups, folder / "naturalbench" / "data" / "train-00000-of-00001.parquet")


def _group(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "Index": rows[0]["index"] // 4,
        "Image_0": _struct(rows[0]["image"]),
        "Image_1": _struct(rows[1]["image"]),
        "Question_0": rows[0]["question"],
        "Image_0_Question_0": rows[0]["answer"],
        "Image_1_Question_0": rows[1]["answer"],
        "Question_1": rows[2]["question"],
        "Image_0_Question_1": rows[2]["answer"],
        "Image_1_Question_1": rows[3]["answer"],
        "Question_Type": rows[0]["type"],
        "Source": rows[0]["source"],
    }


def _struct(cell: str) -> dict[str, Any]:
    return {"bytes": base64.b64decode(cell), "path": None}


if __name__ == "__main__":
    print(write_benchmarks(Path(sys.argv[1])))
