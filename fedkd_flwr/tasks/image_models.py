"""Models that see images: the small convolutional network, and any of Hugging Face with a head for image classes."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkd_flwr.core.modules import on_device_of
from fedkd_flwr.core.protocols import Batch, Models, Outputs
from fedkd_flwr.tasks.base import ClientsTeacher
from fedkd_flwr.tasks.cnn import Cnn, CnnOptions, ImageShape, save_cnn
from fedkd_flwr.tasks.images import ImageTaskOptions
from fedkd_flwr.tasks.layers import LayersOptions
from fedkd_flwr.tasks.source import reason_of
from fedkd_flwr.tasks.transformer import TransformerOptions, Transformers, save_transformer

IMAGE_HEAD = "AutoModelForImageClassification"


def _named(value: object) -> object:
    """A model without a name is what its keys belong to; a `Cnn` where they say nothing."""
    if not isinstance(value, Mapping) or "name" in value:
        return value
    kind = "transformers" if {"source", "config"} & value.keys() else "layers" if "num_layers" in value else "cnn"
    return {"name": kind, **value}


ImageTeacher = Annotated[CnnOptions | TransformerOptions, Field(discriminator="name"), BeforeValidator(_named)]
ImageStudent = Annotated[
    CnnOptions | LayersOptions | TransformerOptions, Field(discriminator="name"), BeforeValidator(_named)
]


class OtherImageTeacher(ClientsTeacher):
    """Another teacher for some clients, of either kind."""

    model: ImageTeacher


class ImageModels:
    """Builds, runs and writes the models of one task.

    Args:
        options: the models, and how pixels are standardised.
        shape: of the images.
        label_names: of the classes.
        class_weights: [classes], see `Outputs`; None counts every class alike.

    Raises:
        ValueError: if a convolutional network is too deep for such images.
    """

    def __init__(
        self, options: ImageTaskOptions, shape: ImageShape, label_names: tuple[str, ...], class_weights: Tensor | None
    ) -> None:
        self._options = options
        self._shape = shape
        self._label_names = label_names
        self._class_weights = class_weights
        channels, height, width = shape
        settings = {"image_size": height if height == width else [height, width], "num_channels": channels}
        self._transformers = Transformers(options, IMAGE_HEAD, label_names, settings, class_weights)
        for key, model in chosen_models(options).items():
            if isinstance(model, CnnOptions):
                try:
                    model.num_features(shape)
                except ValueError as error:
                    raise ValueError(f"task.{key}: {error}") from None

    def build(self, seed: int) -> Models:
        """Version 0 of every model, those without pretrained weights drawn from `seed`.

        Raises:
            ValueError: naming the key of a model that can't be built, or does not take such images.
        """
        models = self._transformers.build(seed, self._load)
        built = (models.teacher, models.student, *models.other_teachers)
        for key, model in zip(chosen_models(self._options), built, strict=True):
            self._require_images_fit(f"task.{key}", model)
        return models

    def failing_on_one(self, models: Models) -> Mapping[str, str]:
        """Keys below `task` of models that can't be trained on a single image, each with the reason.

        A batch norm over maps of one pixel has nothing to take a variance of; over larger ones it has.
        """
        reasons = {}
        built = (models.teacher, models.student, *models.other_teachers)
        for key, model in zip(chosen_models(self._options), built, strict=True):
            if not any(isinstance(module, _BatchNorm) for module in model.modules()):
                continue
            batch = self.example_batch()
            try:
                with torch.random.fork_rng(devices=[]), torch.no_grad():
                    # A copy, for a forward pass changes the running averages.
                    self.forward(copy.deepcopy(model).train(), batch, hidden_states=False, attentions=False)
            except ValueError as error:
                size = f"{self._shape[2]}x{self._shape[1]}"
                reasons[key] = (
                    f"a {type(model).__name__} normalises over a batch, which takes two images of {size} pixels "
                    f"({reason_of(error)})"
                )
        return reasons

    def example_batch(self) -> Batch:
        """A grey image."""
        return {"pixel_values": torch.zeros(1, *self._shape), "labels": torch.zeros(1, dtype=torch.int64)}

    def forward(self, model: nn.Module, batch: Batch, *, hidden_states: bool, attentions: bool) -> Outputs:
        """Run a model on images of shape [batch, channels, height, width]; a `Cnn` has no hidden states to return."""
        if not isinstance(model, Cnn):
            return self._transformers.forward(model, batch, hidden_states=hidden_states, attentions=attentions)
        batch = on_device_of(model, batch)
        logits = model(batch["pixel_values"])
        weights = None if self._class_weights is None else self._class_weights.to(logits.device)
        return Outputs(logits, batch["labels"], class_weights=weights)

    def export(self, model: nn.Module, directory: Path) -> None:
        """Write a directory: one that `load_cnn` loads, or `from_pretrained` and `pipeline`."""
        if isinstance(model, Cnn):
            kept = {"image_size", "channels", "pixel_mean", "pixel_std"}
            pixels = self._options.model_dump(mode="json", include=kept)
            save_cnn(model, directory, {"pixels": pixels, "label_names": list(self._label_names)})
        else:
            save_transformer(model, directory, image_processor(self._options, self._shape))

    def _load(self, options: CnnOptions | TransformerOptions, key: str) -> nn.Module:
        if isinstance(options, CnnOptions):
            return options.build(self._shape, len(self._label_names))
        return self._transformers.load(options, key)

    def _require_images_fit(self, key: str, model: nn.Module) -> None:
        was_training = model.training
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                out = self.forward(model.eval(), self.example_batch(), hidden_states=False, attentions=False)
            shape, expected = list(out.logits.shape), [1, len(self._label_names)]
            if shape != expected:
                raise ValueError(f"its outputs are {shape} instead of {expected}")
        except Exception as error:  # of the library's code, for which images this small may leave nothing
            raise ValueError(
                f"{key}: a {type(model).__name__} can't take images of {self._shape[2]}x{self._shape[1]} pixels "
                f"({reason_of(error)}); change its config (such as patch_size), or set task.image_size"
            ) from error
        if not out.logits.isfinite().all():
            raise ValueError(
                f"{key}: the outputs of this {type(model).__name__} are not finite even for a grey image; "
                "its weights or its config are damaged, take another"
            )
        model.train(was_training)


def chosen_models(options: ImageTaskOptions) -> Mapping[str, Any]:
    """Options of each model by its key below `task`: teacher, student, other teachers."""
    others = {f"other_teachers.{n}.model": other.model for n, other in enumerate(options.other_teachers)}
    return {"teacher": options.teacher, "student": options.student, **others}


def image_processor(options: ImageTaskOptions, shape: ImageShape) -> Any:
    """What makes of an image the numbers that the task makes of it, for users of an exported model.

    Pipelines turn every image into RGB before it comes here, so a model of grey images can't be used in one: it needs
    images that the user has converted. So do images of 16 bits and transparent ones, which a pipeline does not make
    what the task makes of them.
    """
    import transformers

    # The library's other one needs torchvision; what is written is the same, and each reads it as its own.
    kind = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    channels, height, width = shape
    mean, std = (
        list(constants) if len(constants) == channels else list(constants) * channels
        for constants in (options.pixel_mean, options.pixel_std)
    )
    return kind(
        do_resize=options.image_size is not None,
        size={"height": height, "width": width},
        resample=2,  # bilinear, as the task has it
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=mean,
        image_std=std,
        do_convert_rgb=channels == 3,
    )
