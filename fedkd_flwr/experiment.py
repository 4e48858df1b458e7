"""One YAML file is one experiment: read, changed by overrides, checked once, frozen.

Each axis has a table of plug-ins, and each plug-in's options live in its own file. Whatever is wrong is one
`ConfigError` that names the key, what is allowed and what was got.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, Union, cast, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from fedkd_flwr.algorithms import ALGORITHMS, Algorithm, AlgorithmOptions, Baseline
from fedkd_flwr.compressors import COMPRESSORS, CompressorOptions
from fedkd_flwr.core.arrays import Spec
from fedkd_flwr.core.protocols import ActingTask, Codec, Direction, Task
from fedkd_flwr.core.quoting import cut, quoted
from fedkd_flwr.core.seeds import derive_seed
from fedkd_flwr.disk import unwritable_place
from fedkd_flwr.measure.link import NetworkOptions
from fedkd_flwr.privacy import PrivacyOptions
from fedkd_flwr.server_options import DpFixedClippingAggregation, EarlyStopOptions, ServerOptions
from fedkd_flwr.tasks import TASKS, TaskOptions
from fedkd_flwr.yaml_text import YAML_ERRORS, read_yaml

CONFIG_FILE = "config.yaml"  # the resolved experiment, in the directory of each run
_NAME_LENGTH = 64
_MOST_CHARACTERS = 2000  # of an error's text, which may quote a file
_MOST_LEVELS = 32  # of an override's key
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"  # experiment names and client keys become file names


class ConfigError(Exception):
    """An experiment that can't be run as written. The message is one line for the person who wrote it."""


def _one_of(table: Mapping[str, type[BaseModel]]) -> Any:
    """The type of a section whose `name` picks one of the table's options."""
    kinds = tuple(table.values())
    return Annotated[Union[kinds], Field(discriminator="name")] if len(kinds) > 1 else kinds[0]  # noqa: UP007


if TYPE_CHECKING:
    AnyTask = TaskOptions
    AnyAlgorithm = AlgorithmOptions
    AnyCompressor = CompressorOptions
else:
    AnyTask = _one_of(TASKS)
    AnyAlgorithm = _one_of(ALGORITHMS)
    AnyCompressor = _one_of(COMPRESSORS)

_TABLES: dict[str, Mapping[str, type[BaseModel]]] = {
    "task": TASKS,
    "algorithm": ALGORITHMS,
    "compressor": COMPRESSORS,
}


class Experiment(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """A validated experiment.

    Attributes:
        name: names the results.
        seed: source of all randomness.
        num_clients: how many clients the data is divided among and the server waits for.
        num_rounds: rounds of training.
        output_dir: where `fedkd run` puts results, relative to where it is called.
        task: what is learned.
        algorithm: what a client optimises.
        compressor: what an update weighs on the wire.
        server: sampling, waiting, counting.
        privacy: what a client does to its update before anybody else sees it; null: nothing.
        network: links over which the ledger's bytes are turned into time; null: they are not. It changes nothing else.
    """

    name: str = Field(pattern=NAME_PATTERN)
    seed: int = Field(0, ge=0, lt=2**63)
    num_clients: int = Field(ge=1, le=100_000)
    num_rounds: int = Field(ge=1, le=1_000_000)
    output_dir: str = Field("results", min_length=1)
    task: AnyTask
    algorithm: AnyAlgorithm
    compressor: AnyCompressor = Field(default_factory=COMPRESSORS["transform_coding"])
    server: ServerOptions = ServerOptions()
    privacy: PrivacyOptions | None = None
    network: NetworkOptions | None = None

    @property
    def num_sampled(self) -> int:
        """Clients that train in each round."""
        return self.server.num_sampled(self.num_clients)

    @model_validator(mode="after")
    def _decided(self) -> Self:
        """What one section leaves open and another decides, so that the resolved configuration shows it."""
        widths = self.task.loaded_width("teacher"), self.task.loaded_width("student")
        # In place: pydantic hands out the instance that it validates, and nobody has seen this one yet.
        self.__dict__["algorithm"] = self.algorithm.for_widths(*widths)
        by_examples = self.algorithm.weighs_by_examples and self.privacy is None
        aggregator = self.server.aggregator.weighted("num_examples" if by_examples else "uniform")
        self.__dict__["server"] = self.server.model_copy(update={"aggregator": aggregator})
        return self

    @model_validator(mode="after")
    def _enough_clients(self) -> Self:
        self.server.check_clients(self.num_clients)
        return self

    @model_validator(mode="after")
    def _private(self) -> Self:
        """Noise on the updates has no use, or no account, beside some other options."""
        if self.privacy is None:
            return self
        aggregator = self.server.aggregator
        if objection := self.compressor.objection_to_noise():
            raise ValueError(f"compressor.{objection}, with privacy")
        if getattr(aggregator, "weighting", "uniform") != "uniform":
            raise ValueError(
                "server.aggregator.weighting must be uniform with privacy, because numbers of examples have no noise; "
                f"got {getattr(aggregator, 'weighting', None)}"
            )
        if aggregator.name == "qfedavg" and not self.privacy.share_metrics:
            raise ValueError(
                "server.aggregator: qfedavg weighs by losses, which privacy keeps; take another, such as fedavg"
            )
        if isinstance(aggregator, DpFixedClippingAggregation):
            raise ValueError(
                "server.aggregator: dp_fixed_clipping adds noise at the server; give it or privacy, got both"
            )
        return self

    @property
    def noise_facts(self) -> dict[str, Any] | None:
        """What is needed to account for noise on updates, by whomever; None where there is none."""
        aggregator = self.server.aggregator
        if self.privacy is not None:
            facts = self.privacy.model_dump(include={"noise_multiplier", "delta", "adjacency", "share_metrics"})
            return facts | {"clip_norm": self.privacy.clip_norm, "noise_by": "clients", "is_mean": aggregator.of_mean}
        if isinstance(aggregator, DpFixedClippingAggregation):
            facts = aggregator.model_dump(include={"noise_multiplier", "delta", "adjacency"})
            clip = {"clip_norm": aggregator.clipping_norm}
            return facts | clip | {"noise_by": "server", "is_mean": True, "share_metrics": True}
        return None

    def build_task(self, data_path: Path | None = None) -> Task:
        """The task, its data divided among the clients; or over the data of one node.

        Args:
            data_path: where that is.

        Raises:
            ConfigError: if the data can't be divided so, or the node's can't be used.
        """
        try:
            task = self.task if data_path is None else self.task.at_node(data_path)
            return task.build(self.num_clients, self.seed)
        except (ValueError, RuntimeError, MemoryError, OSError) as error:
            raise ConfigError(unwritable_place(error) or _one_line(str(error)) or "no memory for the data") from error

    def build_algorithm(self, task: Task) -> Algorithm:
        """The algorithm on that task.

        Raises:
            ConfigError: if the task's models are not what it needs.
        """
        if isinstance(task, ActingTask) and not self.algorithm.learns_by_acting:
            able = ", ".join(sorted(name for name, options in ALGORITHMS.items() if options.learns_by_acting))
            raise ConfigError(
                f"algorithm.name: must be one of {able} for {self.task.name}, which is learned by acting, "
                f"got {self.algorithm.name}"
            )
        try:
            algorithm = self.algorithm.build(task, derive_seed(self.seed, "models"))
        except (ValueError, RuntimeError, MemoryError) as error:  # torch says RuntimeError when memory is short
            raise ConfigError(_one_line(str(error)) or "not enough memory for the models") from error
        name = self.algorithm.name
        if self.privacy is not None and algorithm.exchanges == "outputs":
            raise ConfigError(f"privacy: must be null with {name}, which exchanges outputs, not updates")
        if self.privacy is not None and algorithm.make_aggregator:
            raise ConfigError(f"privacy: must be null with {name}, whose uploads are more than an update of a model")
        if algorithm.make_aggregator and self.server.aggregator.name != "fedavg":
            raise ConfigError(
                f"server.aggregator: must be left out with {name}, which has a rule of its own for outputs, "
                f"got {self.server.aggregator.name}"
            )
        return algorithm

    def build_codec(self, spec: Spec, direction: Direction) -> Codec:
        """The codec of one direction; a robust aggregator, or noise, may ask for another one up than down.

        Raises:
            ConfigError: if the options don't fit these tensors.
        """
        buffers = [tensor.name for tensor in spec if tensor.kind == "buffer"]
        if self.noise_facts is not None and buffers:
            key = "privacy: must be null" if self.privacy is not None else "server.aggregator: must be another"
            raise ConfigError(
                f"{key} for a model with statistics, which have no noise, got {buffers[0]}; take one without BatchNorm"
            )
        feedback_pays = not self.server.aggregator.robust and self.privacy is None
        try:
            return self.compressor.build_for(spec, direction, uplink_feedback=feedback_pays)
        except ValueError as error:
            raise ConfigError(_one_line(str(error))) from error

    def to_yaml(self) -> str:
        """The resolved experiment, every default written out; `parse` reads it back to an equal one."""
        return self._resolved

    @cached_property
    def _resolved(self) -> str:
        # Written once: a simulation asks for it with every message.
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def baselines_of(experiment: Experiment) -> list[tuple[Baseline, Experiment]]:
    """The same experiment without what its algorithm does beyond others: same clients, same seed, same budget.

    Nothing stops early, because what stops at different rounds can't be compared.
    """
    found = []
    for baseline in experiment.algorithm.baselines():
        if baseline.common_teacher and getattr(experiment.task, "other_teachers", None):
            continue
        changed: dict[str, Any] = {
            "name": f"{experiment.name[: _NAME_LENGTH - len(baseline.name) - 1]}_{baseline.name}",
            "algorithm": baseline.algorithm,
            "server": experiment.server.model_copy(update={"early_stop": EarlyStopOptions()}),
        }
        if baseline.dense:
            changed["compressor"] = COMPRESSORS["identity"](name="identity")
        found.append((baseline, Experiment(**{**dict(experiment), **changed})))
    return found


def load(path: Path, overrides: Iterable[str] = ()) -> Experiment:
    """Read an experiment from a YAML file.

    Args:
        path: the file.
        overrides: "key.key=value", each value read as YAML.

    Raises:
        ConfigError: if the file can't be read or is not an experiment.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        remedy = "put --set before every change" if "=" in str(path) else "give the path of a YAML file"
        raise ConfigError(f"config file {str(path)!r} does not exist; {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r} can't be read: {error}") from None
    return parse(text, overrides, source=str(path))


def parse(text: str, overrides: Iterable[str] = (), source: str = "config") -> Experiment:
    """Read an experiment from YAML text; see `load`."""
    try:
        raw = read_yaml(text)
    except YAML_ERRORS as error:
        raise ConfigError(f"{source} is not YAML: {_one_line(str(error))}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{source} must be a mapping with keys like name, task and algorithm, got {_kind(raw)}")
    for override in overrides:
        raw = _overridden(raw, override)
    try:
        return Experiment.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(describe(error)) from None


def _overridden(raw: dict[str, Any], override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    path, shown = key.strip().split("."), cut(key)
    if not separator or not all(path) or len(path) > _MOST_LEVELS:
        raise ConfigError(f"an override must look like key.key=value, got {quoted(override)}")
    try:
        value = read_yaml(text)
    except YAML_ERRORS:
        raise ConfigError(f"override {shown}: {quoted(text)} is not a YAML value") from None
    if len(path) > 1 and path[-1] == "name":
        kept = _kept_options(raw, path[:-1], value)
        return cast(dict[str, Any], _set(raw, path[:-1], kept | {"name": value}, shown))
    return cast(dict[str, Any], _set(raw, path, value, shown))


def _kept_options(raw: dict[str, Any], path: list[str], name: object) -> dict[str, Any]:
    """Options of a section that the plug-in of another name knows too."""
    options: object = raw
    candidates: list[type[BaseModel]] = [Experiment]
    for part in path:
        options = options.get(part) if isinstance(options, dict) else None
        named = options.get("name") if isinstance(options, dict) else None
        fields = [model.model_fields[part] for model in candidates if part in model.model_fields]
        candidates = [model for info in fields for model in _models_in(info.annotation)]
        if part != path[-1] and len(candidates) > 1:
            candidates = [model for model in candidates if model.model_fields["name"].default == named]
    known = {key for m in candidates if m.model_fields["name"].default == name for key in m.model_fields}
    if len(candidates) == 1:  # one kind of section, whose `name` is an ordinary option, such as an optimiser's
        known = set(candidates[0].model_fields)
    return {k: v for k, v in options.items() if k in known} if isinstance(options, dict) else {}


def _set(node: object, path: list[str], value: object, key: str) -> object:
    if not path:
        return value
    if node is None:
        node = {}
    if not isinstance(node, dict):
        raise ConfigError(f"override {key}: {quoted(path[0])} is inside {_kind(node)}, not inside a mapping")
    return node | {path[0]: _set(node.get(path[0]), path[1:], value, key)}


def describe(error: ValidationError) -> str:
    """The first thing that is wrong, in one line: key, what is allowed, what was got."""
    details = error.errors(include_url=False)
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return _describe(details[0]) + more


def _describe(detail: ErrorDetails) -> str:
    key, model = _locate(detail["loc"])
    got = detail["input"]
    context = detail.get("ctx", {})
    kind = detail["type"]
    if kind == "extra_forbidden":
        allowed = f"; allowed: {', '.join(model.model_fields)}" if model else ""
        return f"{key}: unknown key{allowed}"
    if kind == "missing":
        return f"{key}: required, got nothing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = context.get("expected_tags", "")
        name = got.get("name") if isinstance(got, Mapping) else got
        names = str(tags) or ", ".join(repr(n) for n in _names_in(detail["loc"]))
        return f"{key}.name: must be one of {names}, got {quoted(name)}"
    message = _one_line(detail["msg"].removeprefix("Value error, "))
    if kind == "value_error":
        return f"{key}: {message}" if key else message
    if kind in ("model_type", "model_attributes_type"):
        message = "a mapping"
    elif kind == "string_pattern_mismatch":
        message = "1 to 64 letters, digits, dots, dashes or underscores, the first a letter or digit"
    elif kind == "string_too_short":
        message = "text that is not empty"
    elif kind.startswith(("int_", "float_")) and kind.endswith(("parsing", "type", "from_float")):
        message = "a whole number" if kind.startswith("int_") else "a number"
    elif kind.startswith("bool_"):
        message = "true or false"
    elif kind in ("tuple_type", "list_type"):
        message = "a list"
    elif kind == "invalid_key":
        message = "text, as every key"
    allowed = message.removeprefix("Input should be ").removeprefix("a valid ")
    return f"{key}: must be {allowed}, got {_kind(got) if isinstance(got, dict | list) else quoted(got)}"


def _locate(location: tuple[int | str, ...]) -> tuple[str, type[BaseModel] | None]:
    """The dotted key of an error, without the plug-in names that pydantic puts in; and the model that holds the key."""
    key: list[str] = []
    holder: type[BaseModel] | None = None
    candidates: list[type[BaseModel]] = [Experiment]
    for part in location:
        if len(candidates) > 1 and (chosen := [m for m in candidates if m.model_fields["name"].default == part]):
            candidates = chosen
            continue
        key.append(cut(str(part)))
        holder = candidates[0] if len(candidates) == 1 else None
        info = holder.model_fields.get(str(part)) if holder else None
        candidates = _models_in(info.annotation) if info else []
    return ".".join(key), holder


def _names_in(location: tuple[int | str, ...]) -> list[str]:
    """Names that a section of plug-ins may have."""
    key, holder = _locate(location)
    info = holder.model_fields.get(key.rsplit(".", 1)[-1]) if holder else None
    return [str(model.model_fields["name"].default) for model in (_models_in(info.annotation) if info else [])]


def _models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _kind(value: object) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing"}
    return names.get(type(value)) or quoted(value)


def _one_line(text: str) -> str:
    return cut(text, _MOST_CHARACTERS)
