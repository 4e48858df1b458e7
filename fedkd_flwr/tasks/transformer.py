"""Hugging Face models as teacher and student: loaded, built from a configuration, or cut from the teacher.

Any architecture that the library can put a classification head on will do. Nothing of a model is run but the library's
own code, and weights are read from safetensors only, never from a pickle.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, Field, field_validator, model_validator
from torch import Tensor, nn

from fedkd_flwr.core.modules import not_finite, on_device_of
from fedkd_flwr.core.protocols import Batch, Models, Outputs
from fedkd_flwr.core.seeds import derive_seed
from fedkd_flwr.disk import refuse_unwritable
from fedkd_flwr.tasks.base import ClientsTeacher, ModelsOptions, copy_shared_tensors, quiet, save_pretrained
from fedkd_flwr.tasks.calls import (
    accepted_inputs,
    answer_in_full,
    as_tokens,
    asked_of,
    show_attentions,
)
from fedkd_flwr.tasks.checkpoint_config import checkpoint_width
from fedkd_flwr.tasks.classification_head import checkpoint_head, fit_head
from fedkd_flwr.tasks.layers import LayersOptions, cut_student
from fedkd_flwr.tasks.source import absolute_if_local, reason_of

Load = Callable[[Any, str], nn.Module]

# Of a checkpoint's own numbers: a head and a pooler may be missing, a whole encoder may not.
_MAX_MISSING_SHARE = 0.5
_DERIVED = {"out_features", "out_indices", "stage_names"}  # of a configuration, from the number of its stages


class TransformerOptions(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """A Hugging Face model: pretrained by `source`, or with random weights by `config` alone.

    Attributes:
        source: id of a model of the Hugging Face Hub, or a folder with config.json and model.safetensors.
        revision: commit, branch or tag of a model of the Hub; pin it, or version 0 may differ between machines.
        config: without `source`, `model_type` and whatever its configuration class takes; with it, what to change.
    """

    name: Literal["transformers"] = "transformers"
    source: str | None = Field(None, min_length=1)
    revision: str | None = Field(None, min_length=1)
    config: dict[str, Any] | None = None

    @field_validator("source")
    @classmethod
    def _absolute(cls, source: str | None) -> str | None:
        return source and absolute_if_local(source)

    @model_validator(mode="after")
    def _source_or_config(self) -> Self:
        if self.source is None and (self.config is None or "model_type" not in self.config):
            raise ValueError(
                "needs source (a hub id or a folder), or config with model_type and the sizes of a model with "
                "random weights"
            )
        if self.source is not None and self.config is not None and "model_type" in self.config:
            raise ValueError("config.model_type can't be changed: source says what it is; leave one of the two away")
        return self

    def width(self) -> int:
        """Width of the hidden states of the checkpoint."""
        return checkpoint_width(str(self.source), self.revision)


StudentOptions = Annotated[LayersOptions | TransformerOptions, Field(discriminator="name")]


class OtherTeacher(ClientsTeacher):
    """Another Hugging Face model for some clients."""

    model: TransformerOptions


class TransformerTaskOptions(ModelsOptions):
    """Options of tasks whose models are all Hugging Face models.

    Attributes:
        teacher: the large model.
        student: the small one: cut from the teacher, or a model of its own, of any width or family.
        other_teachers: for clients that hold another teacher than the rest.
    """

    teacher: TransformerOptions
    student: StudentOptions = LayersOptions()
    other_teachers: tuple[OtherTeacher, ...] = ()


class Transformers:
    """Builds and runs the models of one task.

    Args:
        options: the models.
        head: the library's class for the task, such as "AutoModelForSequenceClassification".
        label_names: of the classes.
        settings: further values of every configuration, where it has them (such as `pad_token_id`).
        class_weights: [classes], see `Outputs`; None counts every class alike.
    """

    def __init__(
        self,
        options: ModelsOptions,
        head: str,
        label_names: tuple[str, ...],
        settings: Mapping[str, Any] | None = None,
        class_weights: Tensor | None = None,
    ) -> None:
        self._options = options
        self._head = head
        self._label_names = label_names
        self._settings = dict(settings or {})
        self._class_weights = class_weights

    def build(self, seed: int, load: Load | None = None) -> Models:
        """Version 0 of every model. What has no pretrained weights is drawn from `seed`.

        Args:
            seed: any integer.
            load: makes a model of its options, in a task that has models of other kinds too; None is `self.load`.

        Raises:
            ValueError: naming the key of a model that can't be loaded, built or cut.
        """
        options, load = self._options, load or self.load
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            teacher = load(options.teacher, "task.teacher")
            if isinstance(options.student, LayersOptions):
                student = cut_student(teacher, options.student)
            else:
                student = load(options.student, "task.student")
                if getattr(options.student, "source", None) is None:
                    copy_shared_tensors(teacher, student)
            torch.manual_seed(derive_seed(seed, "other teachers"))
            others = tuple(
                load(other.model, f"task.other_teachers.{n}.model") for n, other in enumerate(options.other_teachers)
            )
        if options.freeze_embeddings:
            for model in (teacher, student, *others):
                if hasattr(model, "base_model"):  # of the library's
                    freeze_embeddings(model)
        return Models(teacher, student, others)

    def load(self, options: TransformerOptions, key: str) -> nn.Module:
        """One model; `key` names its options in errors. See `load_transformer`."""
        if options.source is None and self._options.freeze_embeddings:
            raise ValueError(
                f"task.freeze_embeddings: {key} has random embeddings, which would never learn; "
                "give it a source, or set freeze_embeddings to false"
            )
        names = self._label_names
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
        if not names:
            labels = {}  # an encoder alone: empty ones would leave its config without the library's own
        model = load_transformer(options, self._head, labels, self._settings, key)
        if names and options.source is not None:
            fit_head(model, checkpoint_head(options.source, options.revision).classes, names, key)
            config: Any = model.config
            if getattr(config, "problem_type", None) is not None:  # or a pipeline would not read logits as we do
                config.problem_type = "single_label_classification"
        return model

    def forward(self, model: nn.Module, batch: Batch, *, hidden_states: bool, attentions: bool) -> Outputs:
        """Run a model on a batch; "labels" stays outside."""
        inputs = on_device_of(model, batch)
        labels = inputs["labels"]
        if attentions:
            show_attentions(model)
        out = model(
            **{name: value for name, value in inputs.items() if name in accepted_inputs(model)},
            **asked_of(model, hidden_states=hidden_states, attentions=attentions),
        )
        weights = None if self._class_weights is None else self._class_weights.to(out.logits.device)
        return Outputs(
            out.logits,
            labels,
            as_tokens(out.hidden_states) if hidden_states else None,
            tuple(out.attentions) if attentions and getattr(out, "attentions", None) else None,
            inputs.get("attention_mask"),
            weights,
        )


def load_transformer(
    options: TransformerOptions, head: str, labels: Mapping[str, Any], settings: Mapping[str, Any], key: str
) -> nn.Module:
    """One Hugging Face model in float32.

    Args:
        options: which.
        head: the library's class, such as "AutoModelForTokenClassification".
        labels: id2label and label2id of the configuration; empty for a model without classes.
        settings: values of its configuration that the task decides; those it does not know are left out.
        key: of the options in the experiment, for errors.

    Raises:
        ValueError: if it can't be loaded or built.
    """
    # Imported here: it takes seconds, and checking a configuration should not.
    import transformers

    kind = getattr(transformers, head)
    changes = {k: v for k, v in (options.config or {}).items() if k != "model_type"}
    with quiet():
        try:
            if options.source is None:
                assert options.config is not None
                config = transformers.AutoConfig.for_model(options.config["model_type"])
            else:
                config = transformers.AutoConfig.from_pretrained(
                    options.source, revision=options.revision, trust_remote_code=False
                )
        except Exception as error:  # the library's own, and those of the network and the disk
            raise ValueError(_failure(options, key, error)) from error
        if unknown := sorted(k for k in changes if not hasattr(config, k)):
            raise ValueError(
                f"{key}.config: a model of type {config.model_type!r} has no option {unknown[0]!r}; see the library's "
                f"{type(config).__name__}"
            )
        if (named := changes.pop("num_labels", None)) is not None and labels and named != len(labels["id2label"]):
            raise ValueError(
                f"{key}.config.num_labels: must be {len(labels['id2label'])}, the classes that the task has, got "
                f"{named!r}; leave it away"
            )
        known = _settings_of(config, settings, random=options.source is None)
        made_for = {k: getattr(config, k, None) for k in known}
        # Numbers that follow from others are left to the library: of defaults they would contradict what is changed.
        given = {} if options.source is None else {k: v for k, v in config.to_dict().items() if k not in _DERIVED}
        # None there makes the library fail where a family has several classes for one task.
        given["architectures"] = config.architectures or []
        try:
            config = type(config).from_dict({**given, **changes, **known, **labels})
            if options.source is None:
                model = kind.from_config(config, dtype=torch.float32, trust_remote_code=False)
                missing: set[str] = set()
                reshaped: dict[str, tuple[Any, Any]] = {}
            else:
                model, info = kind.from_pretrained(
                    options.source,
                    revision=options.revision,
                    config=config,
                    dtype=torch.float32,
                    use_safetensors=True,
                    trust_remote_code=False,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
                missing = set(info["missing_keys"])
                reshaped = {name: (list(there), list(here)) for name, there, here in info["mismatched_keys"]}
        except Exception as error:
            raise ValueError(_failure(options, key, error)) from error
    for module in model.modules():
        if hasattr(module, "config"):
            answer_in_full(module.config)
    if options.source is not None:
        _require_finite(key, options.source, model)
    # A head of other classes is replaced; an encoder with parts of another shape would be worth little.
    if wrong := sorted(name for name in reshaped if name.startswith(f"{model.base_model_prefix}.")):
        there, here = reshaped[wrong[0]]
        differing = [f"{k} is {made_for[k]} there, {v} here" for k, v in known.items() if made_for[k] != v]
        raise ValueError(
            f"{key}.source: {options.source!r} has weights of other shapes, {wrong[0]} is {there} and must be {here}"
            f"{' (' + '; '.join(differing) + ')' if differing else ''}; change the task's sizes or {key}.config"
        )
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if sum(size for name, size in sizes.items() if name in missing) > _MAX_MISSING_SHARE * sum(sizes.values()):
        raise ValueError(
            f"{key}.source: {options.source!r} holds no weights for most of a {type(model).__name__}; "
            "give the folder or id of a pretrained model of that kind, or config for random weights"
        )
    # Fewer layers than a checkpoint has are a choice; more would be random ones on top of those that learned.
    begins = f"{model.base_model_prefix}."
    if added := [n for n in sizes if n in missing and n.startswith(begins) and any(map(str.isdigit, n.split(".")))]:
        raise ValueError(
            f"{key}.config: {options.source!r} has no weights for {added[0]!r}; ask for no more layers than it has"
        )
    found: nn.Module = model
    return found


def freeze_embeddings(model: nn.Module) -> None:
    """Keep what a model's embedding layer holds, positions and norm included, as it is."""
    base = getattr(model, "base_model", model)
    # Encoders gather theirs in one module; of a decoder there is the table of tokens.
    embeddings = getattr(base, "embeddings", getattr(base, "embedder", None))
    if not isinstance(embeddings, nn.Module):
        try:
            embeddings = model.get_input_embeddings()  # type: ignore[operator]
        except NotImplementedError:
            raise ValueError(
                f"task.freeze_embeddings: a {type(model).__name__} has no embeddings; set freeze_embeddings to false"
            ) from None
    embeddings.requires_grad_(False)


def save_transformer(model: nn.Module, directory: Path, tokenizer: Any = None) -> None:
    """Write a directory that `from_pretrained` and `pipeline` load."""
    save_pretrained(model, directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def vocabulary_of(options: TransformerOptions) -> int | None:
    """Tokens that a model knows by its configuration; None where that can't be read or does not say."""
    import transformers

    changes = options.config or {}
    try:
        if options.source is None:
            config = transformers.AutoConfig.for_model(**changes)
        else:
            config = transformers.AutoConfig.from_pretrained(
                options.source, revision=options.revision, trust_remote_code=False
            )
        size = changes.get("vocab_size", getattr(config.get_text_config(), "vocab_size", None))
    except Exception:  # which loading the model will say, with its key
        return None
    return size if isinstance(size, int) else None


def _settings_of(config: Any, settings: Mapping[str, Any], *, random: bool) -> dict[str, Any]:
    """Of the task's settings those that a family has.

    How texts end and where a decoder begins is a pretrained model's own; of random ones with an encoder and a decoder,
    which read off their answer there, it must be what the task's tokenizer writes.
    """
    known = {k: v for k, v in settings.items() if hasattr(config, k) and k != "eos_token_id"}
    if random and config.is_encoder_decoder and "eos_token_id" in settings:
        known["eos_token_id"] = settings["eos_token_id"]
        if getattr(config, "decoder_start_token_id", None) is None:
            known["decoder_start_token_id"] = settings["pad_token_id"]
    return known


def _require_finite(key: str, source: str, model: nn.Module) -> None:
    """Check the numbers of a checkpoint: training would only ever say that they are no numbers, not where from."""
    if (name := not_finite(model)) is not None:
        raise ValueError(
            f"{key}.source: {source!r} holds numbers that are not finite in {name!r}"
            f"{_file_of(source, name)}; take another checkpoint, or one of an earlier step"
        )


def _file_of(source: str, name: str) -> str:
    """Which of several files of a folder has a tensor, as far as names are the same there."""
    from safetensors import safe_open

    for path in sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else ():
        with safe_open(path, "pt") as file:
            if any(name == there or name.endswith(f".{there}") for there in file.keys()):  # noqa: SIM118
                return f" ({path.name})"
    return ""


def _failure(options: TransformerOptions, key: str, error: Exception) -> str:
    refuse_unwritable(error)
    reason = reason_of(error)
    if options.source is None:
        return f"{key}.config: no model can be built ({reason}); see the library's documentation of its model_type"
    if Path(options.source).exists():
        return (
            f"{key}.source: {options.source!r} can't be loaded ({reason}); "
            "it must hold config.json and model.safetensors of a model that suits the task"
        )
    return (
        f"{key}.source: {options.source!r} is no folder here, and can't be loaded from the Hugging Face Hub "
        f"({reason}); check source, revision, the connection, and that its weights are kept as safetensors"
    )
