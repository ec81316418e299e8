"""Tables as the Hugging Face repositories have them, with drawn pictures, and a tiny checkpoint."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dpa.models.checkpoint_io import save_checkpoint
from tests.unit.evaluate.conftest import tiny_vlm

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(number: int) -> dict[str, Any]:
    """An image cell, as ``datasets`` stores it."""
    rng = np.random.default_rng(number)
    content = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(content, format="PNG")
    return {"bytes": content.getvalue(), "path": None}


def write_table(path: Path, rows: list[dict[str, Any]], *, image: str = "image") -> Path:
    """Rows as parquet, with the note in the schema by which ``datasets`` knows that a column holds images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        name: pa.array([row[name] for row in rows], type=IMAGE_TYPE if name == image else None) for name in rows[0]
    }
    table = pa.table(columns)
    features = {
        field.name: {"_type": "Image"} if field.name == image else _feature(field.type) for field in table.schema
    }
    note = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(note), path)
    return path


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(kind):
        return {"_type": "List", "feature": _feature(kind.value_type)}
    return {"_type": "Value", "dtype": str(kind)}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of random weights; answers differ from question to question."""
    folder = tmp_path_factory.mktemp("harness")
    save_checkpoint(tiny_vlm(folder / "parts", "lab"), folder / "checkpoint")
    return folder / "checkpoint"
