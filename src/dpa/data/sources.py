"""Which files a source is, and their rows: JSON, parquet, folders written by ``save_to_disk``, patterns."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dpa.data.formats import COLUMNS, Context, Row, RowFormat, format_of, parse_row
from dpa.data.image_store import ImageStore, embedded_name, read_urls
from dpa.data.json_rows import SUFFIXES, json_rows, layout_of
from dpa.data.settings import DataSource
from dpa.data.tables import IMAGE_COLUMNS, TableImages, TableKind, columns_of, image_columns, table_rows
from dpa.errors import DataError

Kind = Literal["list", "lines", "parquet", "arrow"]
_UNITS: dict[Kind, str] = {"list": "record", "lines": "line", "parquet": "row", "arrow": "row"}
_TABLES: dict[str, TableKind] = {".parquet": "parquet", ".arrow": "arrow"}
_SPLIT = re.compile(r"([A-Za-z_]+)-\d+-of-\d+")
"""File names of a data set on the hub: ``train-00000-of-00004.parquet``."""
_PATTERN = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class Files:
    """The files of a source, in order."""

    kind: Kind
    paths: tuple[Path, ...]
    root: Path
    """Folder that image paths are relative to where the recipe names none."""

    @property
    def unit(self) -> str:
        """What a number counts, for messages."""
        return _UNITS[self.kind]

    @property
    def table(self) -> TableKind | None:
        """None: JSON."""
        return "parquet" if self.kind == "parquet" else "arrow" if self.kind == "arrow" else None


def files_of(path: Path) -> Files:
    """Finds the files of a source.

    Raises:
        DataError: nothing there, or something else; says what.
    """
    if path.is_dir():
        return _folder(path)
    if not path.exists() and _PATTERN & set(str(path)):
        found = sorted(Path(item) for item in glob.glob(str(path), recursive=True) if Path(item).is_file())
        if not found:
            raise DataError(f"data files {path}: the pattern fits no file")
        plain = path
        while _PATTERN & set(str(plain)):
            plain = plain.parent
        return _alike(found, plain)
    if not path.is_file():
        raise DataError(f"data file {path} {'is not a file' if path.exists() else 'does not exist'}")
    return _alike([path], path.parent)


def _alike(paths: list[Path], root: Path) -> Files:
    kinds: dict[Kind, Path] = {_kind(path): path for path in paths}
    if len(kinds) > 1:
        (one, first), (two, second), *_ = kinds.items()
        raise DataError(f"{first} holds {_UNITS[one]}s, {second} holds {_UNITS[two]}s; make them two sources")
    return Files(next(iter(kinds)), tuple(paths), root)


def _kind(path: Path) -> Kind:
    suffix = path.suffix.lower()
    return _TABLES[suffix] if suffix in _TABLES else layout_of(path)


def _folder(path: Path) -> Files:
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(item.name for item in path.iterdir() if item.is_dir()))
        raise DataError(f"{path} holds several splits ({splits}); name one of them, e.g. {path}/train")
    if (path / "state.json").is_file():
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            listed = [str(item["filename"]) for item in state["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path / 'state.json'}: not what save_to_disk writes ({error})") from None
        paths = tuple(path / Path(name).name for name in listed)
        missing = [item.name for item in paths if not item.is_file()]
        if missing or not paths:
            raise DataError(f"{path}: state.json names {len(paths)} files, missing: {', '.join(missing) or 'all'}")
        return Files("arrow", paths, path)
    found = sorted(item for item in path.rglob("*.parquet") if item.is_file() and not item.name.startswith("."))
    if found:
        matches = (_SPLIT.match(item.name) for item in found)
        names = sorted({match[1] for match in matches if match})
        if len(names) > 1:
            raise DataError(
                f"{path} holds several splits ({', '.join(names)}), which one source would mix; name one, e.g. "
                f"'{found[0].parent}/{names[-1]}-*.parquet'"
            )
        return Files("parquet", tuple(found), path)
    lists = sorted(item.name for item in path.iterdir() if item.suffix.lower() in SUFFIXES)
    hint = f"; it holds {', '.join(lists[:5])}: name the file itself" if lists else ""
    raise DataError(f"{path}: a folder without parquet files and not written by save_to_disk{hint}")


@dataclass(frozen=True, slots=True)
class Opened:
    """A source whose files and format are known."""

    files: Files
    format: RowFormat
    store: ImageStore
    urls: Path | None
    """PixMo: the list of urls in the image folder, where there is one."""

    def rows(self) -> Iterator[Row]:
        """All rows in order, as a stream.

        Raises:
            DataError: names file and record or line, what was found, and what to do.
        """
        urls = read_urls(self.urls) if self.urls is not None else {}
        for file, path in enumerate(self.files.paths):
            number = 0
            for number, value in self._values(path):
                where = f"{path}, {self.files.unit} {number}"

                def name(place: int, file: int = file, row: int = number - 1) -> str:
                    return embedded_name(file, row, place)

                row = parse_row(self.format, value, number, Context(where, name, urls))
                yield replace(row, file=file)
            if number == 0:
                raise DataError(f"{path}: holds no sample; an empty file or list cannot be trained on")

    def _values(self, path: Path) -> Iterator[tuple[int, Any]]:
        table = self.files.table
        if table is not None:
            return table_rows(table, path, COLUMNS[self.format])
        return json_rows(path, "list" if self.files.kind == "list" else "lines")


def open_source(source: DataSource) -> Opened:
    """Files, format and image folders of a source.

    Raises:
        DataError: nothing there, no such format, an image folder is missing.
    """
    files = files_of(source.path)
    folders = source.images if isinstance(source.images, dict) else {"": source.images or files.root}
    for prefix, folder in folders.items():
        if not folder.is_dir():
            named = f" (for paths below {prefix!r})" if prefix else ""
            wrong = "is not a folder" if folder.exists() else "does not exist"
            raise DataError(
                f"image folder {folder} of {source.path}{named} {wrong}; set `images` to the folder of its images"
            )
    images = None
    format = source.format if source.format != "auto" else _detect(files)
    if files.table is not None:
        # not of the first file alone: a shard whose images are all null may have a column without a type
        found = {name for path in files.paths for name in image_columns(files.table, path)}
        columns = [name for name in IMAGE_COLUMNS if name in found]
        images = TableImages(files.table, files.paths, columns) if columns else None
    urls = folders[""] / "urls.jsonl" if format == "pixmo" and "" in folders else None
    return Opened(files, format, ImageStore(folders, images), urls if urls is not None and urls.is_file() else None)


def _detect(files: Files) -> RowFormat:
    """From the columns of a table, or the keys of the first row."""
    first = files.paths[0]
    if files.table is not None:
        return format_of(columns_of(files.table, first), str(first))
    for number, value in json_rows(first, "list" if files.kind == "list" else "lines"):
        if isinstance(value, dict):
            return format_of(value, f"{first}, {files.unit} {number}")
        break
    return "llava"  # its reader says what is wrong with the row, or that there is none
