"""One type for each column of a data set, whose files may have several: decided where there is no doubt, else refused.

Numbers of different widths are the wider, numbers and texts are texts. What a file calls the numbers of its classes is
kept for those who read them; the numbers stay as they are.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import ClassLabel, Features
from datasets.features.features import generate_from_arrow_type
from datasets.table import table_cast

from fedkd_flwr.tasks.source import DataFileError

_SHOWN = 60  # characters of a type in an error


@dataclass(frozen=True, slots=True)
class FileSchema:
    """The columns of a file, or of some rows of it.

    Attributes:
        split: that it belongs to.
        name: as an error gives it.
        schema: with the library's own types, where it has those.
        first_row: the first of its rows that the schema is of.
        empty: columns without any value.
    """

    split: str
    name: str
    schema: pa.Schema
    first_row: int = 0
    empty: Sequence[str] = ()


def plain_type(kind: pa.DataType) -> pa.DataType:
    """A type without what only says how it is stored: dictionaries, views and 64-bit offsets.

    Raises:
        TypeError: of an extension type that is no text.
    """
    if isinstance(kind, pa.BaseExtensionType):
        if type(kind).__module__.startswith("datasets.") or isinstance(kind, pa.JsonType):
            return kind
        storage = plain_type(kind.storage_type)
        if storage != pa.string():
            raise TypeError(kind.extension_name)
        return storage
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
        return pa.string()
    if pa.types.is_binary_view(kind) or pa.types.is_large_binary(kind):
        return pa.binary()
    if pa.types.is_struct(kind):
        return pa.struct([inner.with_type(plain_type(inner.type)) for inner in kind])
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(plain_type(kind.value_type), kind.list_size)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or _is_list_view(kind):
        return pa.list_(plain_type(kind.value_type))
    return kind


def _is_list_view(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind))


def plain_schema(schema: pa.Schema, name: str) -> pa.Schema:
    """A file's columns by `plain_type`.

    Args:
        schema: of the file.
        name: of the file, for errors.

    Raises:
        DataFileError: naming a column of another library's type.
    """
    fields = []
    for column in schema:
        try:
            fields.append(column.with_type(plain_type(column.type)))
        except TypeError as error:
            raise DataFileError(
                f"file {name!r}: column {column.name!r} is of the extension type {error}, which can't be read; "
                "store it as text or numbers, or remove it"
            ) from None
    return pa.schema(fields, metadata=schema.metadata)


@dataclass(slots=True)
class Schemas:
    """Those of all files of a data set, in the order in which they are read."""

    of_files: list[FileSchema] = field(default_factory=list)
    _known: dict[tuple[str, str], list[pa.Schema]] = field(default_factory=dict)

    def add(self, found: FileSchema) -> None:
        """One more; what says nothing new of its file is left out."""
        known = self._known.setdefault((found.split, found.name), [])
        if not any(schema.equals(found.schema) for schema in known):
            known.append(found.schema)
            self.of_files.append(found)

    def columns(self) -> dict[str, list[str]]:
        """Those of each split."""
        found: dict[str, dict[str, None]] = {}
        for one in self.of_files:
            found.setdefault(one.split, {}).update(dict.fromkeys(one.schema.names))
        return {split: list(names) for split, names in found.items()}

    def agreed(self, *, same_columns: bool = True) -> Features:
        """The type of each column over all files.

        Args:
            same_columns: whether all files of a split must have the same columns.

        Raises:
            DataFileError: naming a column whose types don't go together, both of them and where they are.
        """
        agreed: dict[str, Any] = {}
        first: dict[str, FileSchema] = {}
        for one in self.of_files:
            for name, feature in Features.from_arrow_schema(one.schema).items():
                if name in agreed:
                    agreed[name] = _together(name, agreed[name], first[name], feature, one)
                else:
                    agreed[name] = feature
                first.setdefault(name, one)
        if same_columns:
            self._require_columns()
        return Features(agreed)

    def agreed_kinds(self, kinds: Mapping[str, Any]) -> pa.Schema:
        """The same of delimited files, whose cells are texts whatever they look like."""
        self._require_columns()
        return pa.schema([(name, kind.type) for name, kind in kinds.items()])

    def _require_columns(self) -> None:
        """Check that files of one split have the same columns."""
        files: dict[str, dict[str, dict[str, None]]] = {}
        for one in self.of_files:
            of_file = files.setdefault(one.split, {}).setdefault(one.name, {})
            of_file.update(dict.fromkeys(one.schema.names))
        for of_split in files.values():
            (name, columns), *others = of_split.items()
            for other, theirs in others:
                if lacking := [column for column in columns if column not in theirs]:
                    raise DataFileError(f"file {other!r} has no column {lacking[0]!r}, which {name!r} has; {_ALIKE}")
                if more := [column for column in theirs if column not in columns]:
                    raise DataFileError(f"file {name!r} has no column {more[0]!r}, which {other!r} has; {_ALIKE}")

    def classes(self, agreed: Features) -> dict[str, dict[str, list[str]]]:
        """Of each split the columns whose numbers have other class names there than those agreed on.

        Args:
            agreed: see `agreed`.

        Returns:
            Names in order; none where two files of the split name them in different order.
        """
        found: dict[str, dict[str, list[str]]] = {}
        for one in self.of_files:
            for name, feature in Features.from_arrow_schema(one.schema).items():
                if isinstance(feature, ClassLabel):
                    known = found.setdefault(one.split, {}).setdefault(name, list(feature.names))
                    if known != list(feature.names):
                        found[one.split][name] = []
        return {
            split: {name: names for name, names in own.items() if names != getattr(agreed[name], "names", None)}
            for split, own in found.items()
        }

    def cast(self, table: pa.Table, features: Features) -> pa.Table:
        """Some rows of a file with the types of all files.

        Args:
            table: the rows.
            features: of all files.

        Raises:
            ValueError: see `cast_to`.
        """
        have = table.column_names
        columns = [stored_plainly(table[name]) if name in have else pa.nulls(len(table)) for name in features]
        return cast_to(pa.Table.from_arrays(columns, names=list(features)), features)


def cast_to(table: pa.Table, features: Features) -> pa.Table:
    """Some rows of a file with the types that are asked for.

    Args:
        table: the rows.
        features: of the same columns.

    Raises:
        ValueError: naming a column with a value that can't be of its type, but not the file.
    """
    try:
        return table_cast(table, features.arrow_schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, TypeError, ValueError) as error:
        raise ValueError(f"{_culprit(table, features)} ({error})") from error


_ALIKE = "files of one split must have the same columns"


def stored_plainly(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column by `plain_type`, where it is of one."""
    try:
        plain = plain_type(column.type)
    except TypeError:
        return column
    return column if plain == column.type else column.cast(plain)


def _culprit(table: pa.Table, features: Features) -> str:
    for name, feature in features.items():
        try:
            table_cast(table.select([name]), Features({name: feature}).arrow_schema)
        except Exception:  # whatever the type raises
            return f"has a value in column {name!r} that is none of {_named_type(feature)}"
    return "has a value that can't be read"


def _together(name: str, known: Any, first: FileSchema, new: Any, one: FileSchema) -> Any:
    """The type of a column in two files."""
    if known == new:
        return known
    types = [Features({name: feature}).arrow_schema.field(name).type for feature in (known, new)]
    if _has_classes(known) or _has_classes(new):
        # Numbers and texts go with numbers of classes: those who read labels know what each file calls its own.
        if pa.types.is_null(types[0]):
            return new
        if types[0] == types[1] or pa.types.is_null(types[1]) or {*map(_of_items, types)} == {pa.int64(), pa.string()}:
            return known
        raise DataFileError(_differ(name, known, first, new, one))
    joined = _joined(*types)
    if joined is None:
        raise DataFileError(_differ(name, known, first, new, one))
    return generate_from_arrow_type(joined)


def _has_classes(feature: Any) -> bool:
    return isinstance(getattr(feature, "feature", feature), ClassLabel)


def _of_items(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_list(kind) else kind


def _differ(name: str, known: Any, first: FileSchema, new: Any, one: FileSchema) -> str:
    there, here = (_named_type(one) for one in (known, new))
    return (
        f"column {name!r} holds {there} in {first.name!r} and {here} in {one.name!r} (from row {one.first_row} on); "
        "store it alike in all files"
    )


def _names(labels: ClassLabel) -> str:
    shown = ", ".join(labels.names)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def _named_type(feature: Any) -> str:
    if isinstance(feature, ClassLabel):
        return f"numbers of the classes {_names(feature)}"
    kind = str(getattr(feature, "dtype", feature))
    words = {"string": "text", "large_string": "text", "bool": "truth values", "dict": "objects"}
    if isinstance(feature, dict):
        return f"objects of {', '.join(feature)}"[:_SHOWN]
    return words.get(kind, kind)[:_SHOWN]


def _joined(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """The type that values of both types have without a doubt; None where there is none."""
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if _is_number(a) and _is_number(b):
        whole = pa.types.is_integer(a) and pa.types.is_integer(b)
        return pa.int64() if whole else pa.float64()
    if _is_scalar(a) and _is_scalar(b):
        return pa.string() if pa.string() in (a, b) or pa.bool_() in (a, b) else None
    if {a, b} == {pa.string(), pa.binary()}:
        return pa.string()
    if pa.types.is_list(a) and pa.types.is_list(b):
        inner = _joined(a.value_type, b.value_type)
        return None if inner is None else pa.list_(inner)
    if pa.types.is_struct(a) and pa.types.is_struct(b):
        return _joined_structs(a, b)
    return None


def _joined_structs(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    fields: dict[str, pa.DataType] = {}
    for inner in _fields([a, b]):
        joined = _joined(fields[inner.name], inner.type) if inner.name in fields else inner.type
        if joined is None:
            return None
        fields[inner.name] = joined
    return pa.struct(list(fields.items()))


def _fields(structs: Iterable[pa.DataType]) -> Iterable[pa.Field]:
    return (inner for struct in structs for inner in struct)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _is_scalar(kind: pa.DataType) -> bool:
    other = pa.types.is_boolean(kind) or pa.types.is_temporal(kind)
    return bool(other or _is_number(kind) or kind == pa.string())
