"""How `datasets` reads files here: its own builders, made strict where they would read something else than is written.

The library finds the files and keeps an Arrow copy; what a column is, over all files of a data set, is decided here.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets.builder import Key
from datasets.packaged_modules.arrow.arrow import Arrow
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet

from fedkd_flwr.tasks.cells import Kind
from fedkd_flwr.tasks.column_types import FileSchema, Schemas, cast_to, plain_schema, stored_plainly
from fedkd_flwr.tasks.delimited import Survey, named, survey, tables
from fedkd_flwr.tasks.source import DataFileError, Reading
from fedkd_flwr.tasks.split_names import files_by_split

FORMAT = 1  # of what is read: raise it with any change to that, or copies that older code made are read

_MAX_REASON = 200
_FILES_OF_JSON = ("original_files", "base_files", "files_iterables")
_DELIMITERS = {".tsv": "\t", ".tab": "\t"}


def load(
    path: str,
    config: str | None,
    *,
    revision: str | None = None,
    split: str | list[str],
    data_files: Any = None,
    names: Sequence[str] | None = None,
) -> Any:
    """What `datasets.load_dataset` gives, read by the builders of this module where there is one for the format.

    Args:
        path: a folder, or the id of a data set of the Hub.
        config: one of its configurations.
        revision: of a data set of the Hub.
        split: one or several.
        data_files: some of its files, as the library takes them.
        names: of the columns of delimited files that have no header.

    Raises:
        ValueError: if a file can't be read; the library's own errors besides.
    """
    if Path(path, datasets.config.DATASET_STATE_JSON_FILENAME).exists():
        raise ValueError("it was written by save_to_disk; write each split by to_parquet instead")
    if data_files is None and os.path.isdir(path):
        data_files = files_by_split(path)
    builder = datasets.load_dataset_builder(path, config, revision=revision, data_files=data_files)
    if os.path.isdir(builder.cache_dir):
        builder.info = _declared(path, builder.config.name, revision, data_files)
    for theirs, ours in _BUILDERS.items():
        if isinstance(builder, theirs):
            builder = _like(builder, ours, names)
            break
    builder.download_and_prepare()
    found = builder.as_dataset(split=split)
    return [_of_own_columns(table) for table in found] if isinstance(found, list) else _of_own_columns(found)


def _declared(path: str, config: str, revision: str | None, data_files: Any) -> datasets.DatasetInfo:
    """What a data set says of itself: a builder knows only what an older copy was, where there is one."""
    module = datasets.load.dataset_module_factory(path, revision=revision, data_files=data_files)
    return (module.dataset_infos or {}).get(config) or datasets.DatasetInfo()


def _like(found: Any, ours: Any, names: Sequence[str] | None) -> Any:
    """A builder of ours for the files that one of the library's was made for."""
    options: dict[str, Any] = {}
    if ours is DelimitedTables:
        options["sep"] = found.config.sep
        if names is not None:
            options["names"] = list(names)
    built = ours(
        dataset_name=found.dataset_name,
        config_name=found.config.name,
        hash=f"{found.hash}-{FORMAT}",
        base_path=found.base_path,
        repo_id=found.repo_id,
        info=found.info.copy(),
        features=found.config.features or found.info.features,
        data_files=found.config.data_files,
        **options,
    )
    built.info.builder_name = found.name  # of the format
    return built


def _of_own_columns(table: datasets.Dataset) -> datasets.Dataset:
    """A split without columns that only other splits have."""
    reading = Reading.of(table)
    own = None if reading is None else reading.columns.get(str(table.split).partition("[")[0])
    if own is None or len(own) == len(table.column_names):
        return table
    return table.select_columns([name for name in table.column_names if name in own])


@contextmanager
def _naming(name: str, problem: str = "") -> Iterator[None]:
    """Let an error say which file it is about."""
    try:
        yield
    except DataFileError:
        raise
    except (ValueError, OSError) as error:  # pyarrow's are among them
        reason = " ".join(str(error).split())[:_MAX_REASON]
        raise DataFileError(f"file {name!r} {problem}{reason}") from error


@dataclass
class DelimitedConfig(datasets.BuilderConfig):  # type: ignore[misc]
    """Of delimited files. Attributes: `sep`, unless a file's name says it; `names`, of columns without a header."""

    features: datasets.Features | None = None
    sep: str = ","
    names: list[str] | None = None


class DelimitedTables(datasets.ArrowBasedBuilder):  # type: ignore[misc]
    """CSV and TSV; see `delimited`."""

    BUILDER_CONFIG_CLASS = DelimitedConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=self.config.features)

    def _split_generators(self, dl_manager: Any) -> list[Any]:
        files = _unpacked(dl_manager, self.config.data_files, self.base_path)
        schemas, notes = Schemas(), []
        found: dict[str, list[Survey]] = {}
        for split, places in files.items():
            found[split] = []
            for name, path in places:
                of_file = self._survey(name, path)
                found[split].append(of_file)
                notes += [f"file {name!r}: {note}" for note in of_file.notes]
                types = [kind.type for kind in of_file.kinds]
                empty = [n for n, kind in zip(of_file.names, of_file.kinds, strict=True) if kind is Kind.EMPTY]
                schemas.add(FileSchema(split, name, pa.schema(zip(of_file.names, types, strict=True)), empty=empty))
        rows = {
            split: [(name, s.num_rows) for (name, _), s in zip(files[split], of_split, strict=True)]
            for split, of_split in found.items()
        }
        self.info.description = Reading(rows, schemas.columns(), notes).text()
        if self.info.features is None:
            self.info.features = datasets.Features.from_arrow_schema(schemas.agreed_kinds(_kinds_of(found)))
        return [
            datasets.SplitGenerator(
                name=split, gen_kwargs={"names": [name for name, _ in files[split]], "surveys": of_split}
            )
            for split, of_split in found.items()
        ]

    def _survey(self, name: str, path: str) -> Survey:
        suffixes = [suffix.lower() for suffix in Path(name).suffixes]
        delimiter = next((_DELIMITERS[suffix] for suffix in suffixes if suffix in _DELIMITERS), self.config.sep)
        with _naming(name):
            return survey(path, delimiter=delimiter, names=self.config.names)

    def _generate_tables(self, names: Sequence[str], surveys: Sequence[Survey]) -> Iterator[tuple[Key, pa.Table]]:
        features = self.info.features
        schema = features.arrow_schema
        for place, (file, found) in enumerate(zip(names, surveys, strict=True)):
            kinds = [_kind_of_feature(features.get(name)) for name in found.names]
            with _naming(file):
                for batch, table in enumerate(tables(found, kinds)):
                    yield Key(place, batch), cast_to(_completed(table, schema), features)


def _kinds_of(found: Mapping[str, Sequence[Survey]]) -> dict[str, Kind]:
    """The kind of each column over all files."""
    kinds: dict[str, Kind] = {}
    for of_split in found.values():
        for one in of_split:
            for name, kind in zip(one.names, one.kinds, strict=True):
                kinds[name] = kinds.get(name, Kind.EMPTY) | kind
    return kinds


def _kind_of_feature(feature: Any) -> Kind:
    """What cells are made of a column; of types that a data set declares itself the library makes what is asked for.

    Cells of a ClassLabel stay texts: they may be names, and a number may be one.
    """
    if feature is None or isinstance(feature, datasets.ClassLabel):
        return Kind.TEXT
    kinds = {"bool": Kind.TRUTH, "int64": Kind.INTEGER, "float64": Kind.NUMBER}
    return kinds.get(str(getattr(feature, "dtype", None)), Kind.TEXT)


def _completed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of a schema in its order; those that a file does not have are empty."""
    nothing = pa.nulls(len(table))
    return pa.Table.from_arrays(
        [table[name] if name in table.column_names else nothing for name in schema.names], names=schema.names
    )


def _unpacked(dl_manager: Any, data_files: Mapping[str, Any], base: str) -> dict[str, list[tuple[str, str]]]:
    """Files of each split as they lie on this machine, unpacked, each with the name that an error gives it."""
    found: dict[str, list[tuple[str, str]]] = {}
    for split, files in data_files.items():
        found[str(split)] = []
        for file in files:
            name, local = named(str(file), base), str(dl_manager.download_and_extract(file))
            inside = list(dl_manager.iter_files(local)) if os.path.isdir(local) else []
            found[str(split)] += [(f"{name}/{Path(path).name}", path) for path in inside] or [(name, local)]
    return found


class ParquetTables(Parquet):  # type: ignore[misc]
    """Parquet whose files need not have the same types."""

    def _split_generators(self, dl_manager: Any) -> list[Any]:
        self._schemas = Schemas()
        rows: dict[str, list[tuple[str, int]]] = {}
        for split, files in self.config.data_files.items():
            rows[str(split)] = []
            for file, local in zip(files, dl_manager.download(files), strict=True):
                name = named(str(file), self.base_path)
                with _naming(name, "is no whole Parquet file: "):
                    found = pq.read_metadata(local)
                rows[str(split)].append((name, found.num_rows))
                schema = plain_schema(found.schema.to_arrow_schema(), name)
                self._schemas.add(FileSchema(str(split), name, schema))
        if self.info.features is None:
            self.info.features = self._schemas.agreed()
        classes = self._schemas.classes(self.info.features)
        self.info.description = Reading(rows, self._schemas.columns(), [], classes).text()
        return list(super()._split_generators(dl_manager))

    def _generate_tables(self, files: Sequence[Any], row_groups_list: Sequence[Any]) -> Iterator[tuple[Key, pa.Table]]:
        for place, (file, groups) in enumerate(zip(files, row_groups_list, strict=True)):
            with _naming(named(str(file), self.base_path)):
                for batch, (_, table) in enumerate(super()._generate_tables([file], [groups])):
                    yield Key(place, batch), table

    def _cast_table(self, table: pa.Table) -> pa.Table:
        return self._schemas.cast(table, self.info.features)


class JsonTables(Json):  # type: ignore[misc]
    """JSON that keeps dates as text, and whose columns may hold numbers in one row and texts in another."""

    _surveying = False

    def _split_generators(self, dl_manager: Any) -> list[Any]:
        declared = self.info.features
        self.info.features = declared or datasets.Features()  # or the library would take those of the first rows
        splits = list(super()._split_generators(dl_manager))
        self._schemas = Schemas()
        if declared is None:
            self.info.features, self._surveying = None, True
            rows = {str(split.name): self._survey(str(split.name), split.gen_kwargs) for split in splits}
            self.info.features, self._surveying = self._schemas.agreed(same_columns=False), False
            self.info.description = Reading(rows, self._schemas.columns(), []).text()
        return splits

    def _generate_tables(self, **files: Any) -> Iterator[tuple[Key, pa.Table]]:
        for place, (original, base, unpacked) in enumerate(zip(*(files[key] for key in _FILES_OF_JSON), strict=True)):
            one = dict(zip(_FILES_OF_JSON, ([original], [base], [unpacked]), strict=True))
            with _naming(named(str(original), self.base_path)):
                for batch, (_, table) in enumerate(super()._generate_tables(**one)):
                    yield Key(place, batch), table

    def _survey(self, split: str, files: Mapping[str, Any]) -> list[tuple[str, int]]:
        """Add what types a split's files have; the number of rows of each."""
        found: list[tuple[str, int]] = []
        for original, base, unpacked in zip(*(files[key] for key in _FILES_OF_JSON), strict=True):
            name, num_rows = named(str(original), self.base_path), 0
            one = dict(zip(_FILES_OF_JSON, ([original], [base], [list(unpacked)]), strict=True))
            with _naming(name, "is no JSON that can be read: "):
                for _, table in super()._generate_tables(**one):
                    self._schemas.add(FileSchema(split, name, plain_schema(table.schema, name), num_rows))
                    num_rows += len(table)
            found.append((name, num_rows))
        return found

    def _cast_table(self, table: pa.Table, json_field_paths: Sequence[Any] = ()) -> pa.Table:
        for name in [path[0] for path in json_field_paths if len(path) == 1]:
            table = _scalars_as_text(table, name)
        kept = [path for path in json_field_paths if len(path) != 1 or not _is_text(table, path[0])]
        for name in table.column_names:
            if pa.types.is_timestamp(table[name].type):
                table = table.set_column(table.column_names.index(name), name, _dates(table[name]))
        if self._surveying or self.info.features is None:
            return super()._cast_table(table, json_field_paths=kept)
        return self._schemas.cast(table, self.info.features)


def _scalars_as_text(table: pa.Table, name: str) -> pa.Table:
    """A column of JSON of any kind as texts, unless there are lists or objects in it."""
    values = [None if cell is None else json.loads(cell) for cell in table[name].to_pylist()]
    if any(isinstance(value, list | dict) for value in values):
        return table
    texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    field = pa.field(name, pa.string(), metadata={"plain": "text"})
    return table.set_column(table.column_names.index(name), field, pa.array(texts, pa.string()))


def _is_text(table: pa.Table, name: str) -> bool:
    return bool((table.schema.field(name).metadata or {}).get(b"plain"))


def _dates(moments: pa.ChunkedArray) -> pa.ChunkedArray:
    """Moments as texts: days alone, where all of them are midnight."""
    days = pc.floor_temporal(moments, unit="day")
    all_days = pc.all(pc.equal(days, moments)).as_py()
    return pc.strftime(moments, format="%Y-%m-%d" if all_days else "%Y-%m-%d %H:%M:%S")


class ArrowTables(Arrow):  # type: ignore[misc]
    """Arrow files whose texts may be stored in any way."""

    def _split_generators(self, dl_manager: Any) -> list[Any]:
        splits = list(super()._split_generators(dl_manager))
        schema = plain_schema(self.info.features.arrow_schema, "of Arrow")
        self.info.features = datasets.Features.from_arrow_schema(schema)
        return splits

    def _cast_table(self, table: pa.Table) -> pa.Table:
        plain = [stored_plainly(table[name]) for name in table.column_names]
        return super()._cast_table(pa.Table.from_arrays(plain, names=table.column_names))


class ImageFolders(ImageFolder):  # type: ignore[misc]
    """Folders of images whose metadata.csv are read as every CSV is, their columns of one type in all of them."""

    def _split_generators(self, dl_manager: Any) -> list[Any]:
        self._kinds: dict[str, Kind] = {}
        self._surveys: dict[str, Survey] = {}
        files = [file for of_split in self.config.data_files.values() for file in of_split]
        for file in (file for file in files if os.path.basename(str(file)) == "metadata.csv"):
            self._surveyed(str(dl_manager.download(file)), str(file))
        return list(super()._split_generators(dl_manager))

    def _surveyed(self, local: str, file: str) -> Survey:
        """What a file holds, once its columns are counted among those of all."""
        if local not in self._surveys:
            with _naming(named(file, self.base_path)):
                found = self._surveys[local] = survey(local, delimiter=",")
            for name, kind in zip(found.names, found.kinds, strict=True):
                self._kinds[name] = self._kinds.get(name, Kind.EMPTY) | kind
        return self._surveys[local]

    def _read_metadata(self, metadata_file: str, metadata_ext: str = "") -> Iterable[pa.Table]:
        if metadata_ext != ".csv":
            yield from super()._read_metadata(metadata_file, metadata_ext=metadata_ext)
            return
        found = self._surveyed(metadata_file, metadata_file)  # one within an archive is not known before
        yield from tables(found, [self._kinds[name] for name in found.names])


_BUILDERS: dict[Any, Any] = {
    Csv: DelimitedTables,
    Parquet: ParquetTables,
    Json: JsonTables,
    Arrow: ArrowTables,
    ImageFolder: ImageFolders,
}
