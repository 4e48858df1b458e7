"""What a split's own files call the numbers of its labels.

The library takes the names of a ClassLabel from the first file of a data set and reads the numbers of all others by
them, though each file says what its own numbers mean.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkd_flwr.tasks.class_names import listed
from fedkd_flwr.tasks.source import DataSource, reason_of
from fedkd_flwr.tasks.split_names import files_by_split

if TYPE_CHECKING:
    from datasets import Dataset

Names = tuple[str, ...]

_READERS = frozenset(("parquet", "arrow"))  # of the library, for formats whose files have types


def stored_names(data: DataSource, table: "Dataset", column: str, key: str) -> Names | None:
    """The names that a split's files give to the numbers of a ClassLabel, or of a list of them.

    Args:
        data: where the table comes from. Of a data set of the Hub the library itself sees to it that files agree when
            they are uploaded.
        table: the split, or a slice.
        column: holds the labels.
        key: of the option that names the column, for errors.

    Returns:
        None where the files name none, or can't.

    Raises:
        ValueError: if two files of the split name them in different order.
    """
    if table.info.builder_name not in _READERS or not os.path.exists(data.source):
        return None
    first: tuple[str, Names] | None = None
    for file in _files(data, table):
        if (names := _names_in(file, column, key)) is None:
            continue
        if first is None:
            first = file, names
        elif names != first[1]:
            here, there = (Path(path).name for path in (file, first[0]))
            raise ValueError(
                f"{key}: {column!r} of split {str(table.split)!r} has the classes {listed(first[1])} in {there} and "
                f"{listed(names)} in {here}; write all files of a split with the same classes in the same order"
            )
    return first and first[1]


def _files(data: DataSource, table: "Dataset") -> list[str]:
    """The files that the rows of a table come from."""
    from datasets import ReadInstruction, load_dataset_builder

    path, files = os.path.split(data.source) if os.path.isfile(data.source) else (data.source, None)
    chosen = files_by_split(path) if files is None else files
    found: Mapping[Any, Sequence[Any]] = (
        load_dataset_builder(path, data.config, data_files=chosen).config.data_files or {}
    )
    by_split = {str(split): [str(file) for file in of_split] for split, of_split in found.items()}
    sizes = {name: info.num_examples for name, info in (table.info.splits or {}).items()}
    parts = ReadInstruction.from_spec(str(table.split)).to_absolute(sizes)
    return [file for name in dict.fromkeys(part.splitname for part in parts) for file in by_split.get(name, ())]


def _names_in(file: str, column: str, key: str) -> Names | None:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]
    from datasets import Features

    try:
        schema = _arrow_schema(file) if file.endswith(".arrow") else pyarrow.parquet.read_schema(file)
        feature = Features.from_arrow_schema(schema).get(column)
    except Exception as error:  # of a damaged file, and of types that the library does not know
        raise ValueError(f"{key}: the types of {Path(file).name} can't be read ({reason_of(error)})") from error
    names = getattr(getattr(feature, "feature", feature), "names", None)
    return None if names is None else tuple(names)


def _arrow_schema(file: str) -> Any:
    import pyarrow

    with pyarrow.memory_map(file) as stored:
        try:
            return pyarrow.ipc.open_stream(stored).schema
        except pyarrow.ArrowInvalid:
            return pyarrow.ipc.open_file(stored).schema
