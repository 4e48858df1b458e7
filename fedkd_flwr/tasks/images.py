"""Images of a table as tensors: which can be read, and how large they are; decoding; batches.

All images are looked at before anything is trained, most of them without decoding, and what was found is kept on disk
for the next process. A process decodes only the rows it is asked for, and keeps them as bytes.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from fedkd_flwr.core.protocols import Batch
from fedkd_flwr.tasks.base import ModelsOptions, TensorExamples
from fedkd_flwr.tasks.cnn import ImageShape
from fedkd_flwr.tasks.data_notes import image_digests
from fedkd_flwr.tasks.partition import Rows
from fedkd_flwr.tasks.source import RowNames, require_column

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image as Picture

KEY = "task.data.columns.image"
MODES = {1: "L", 3: "RGB"}  # Pillow's name for images of so many channels
DECODED_BYTES = 256 * 2**20  # of clients' images that one process keeps
ROWS_AT_ONCE = 256
CACHE_FORMAT = 3  # of the sizes on disk; raise it with any change to what they are, or old ones would be read for new

_MISSING, _UNREADABLE, _WIDE, _LARGE, _ABSENT = (
    (-1, -1),
    (0, 0),
    (-2, -2),
    (-3, -3),
    (-4, -4),
)  # in the place of a width and a height
_WIDE_MODES = {"I", "F"}  # Pillow's, of 32 bits a pixel: nothing says which of their values is white
_TRANSPARENT_MODES = {"RGBA", "RGBa", "LA", "PA"}

Size = tuple[int, int]  # width, height
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def _one_or_each(value: object) -> object:
    return (value,) if isinstance(value, int | float) else value


class ImageTaskOptions(ModelsOptions):
    """Options of tasks whose models see images.

    Attributes:
        image_size: side in pixels to which images are resized; null leaves them, and they must be of one size.
        channels: 1 is grey, 3 is RGB; images are converted.
        pixel_mean: subtracted from pixels in [0, 1]; one number, or one for each channel.
        pixel_std: divides what is left.
    """

    image_size: int | None = Field(None, ge=1, le=4096)
    channels: Literal[1, 3] = 3
    pixel_mean: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], BeforeValidator(_one_or_each)] = (0.5,)
    pixel_std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_one_or_each)] = (0.5,)

    @model_validator(mode="after")
    def _constants_fit_channels(self) -> Self:
        for name in ("pixel_mean", "pixel_std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise ValueError(
                    f"{name} must be one number, or one for each of channels ({self.channels}), "
                    f"got {len(getattr(self, name))}"
                )
        return self


def image_column(table: "Dataset", chosen: str | None) -> str:
    """The column of a table that holds its images: the one chosen, or else the only one of type Image.

    Raises:
        ValueError: if none is chosen and there is not exactly one.
    """
    from datasets import Image

    found = [name for name, feature in table.features.items() if isinstance(feature, Image)]
    if chosen is None and len(found) != 1:
        number = "several columns are" if found else "no column is"
        named = ", ".join(found or table.column_names)
        raise ValueError(f"{KEY}: {number} of type Image in split {str(table.split)!r}; name one of: {named}")
    return chosen or found[0]


class Images:
    """The images of one split.

    Args:
        table: the split.
        column: holds the images: of the library's type, their bytes, or paths of files.
        options: how they are decoded.
        folder: that relative paths start at, where there is such a file; None leaves them to the working directory,
            which differs between the processes of a run.

    Attributes:
        split: what it is called, such as "train[:80%]".
        missing: mask of [rows], those without an image.
        unreadable: mask of [rows], those whose image is damaged, or none at all.
        absent: mask of [rows], those whose image is a file that is not there.
        large: mask of [rows], those whose image has more pixels than are read.
        wide: mask of [rows], those whose image has pixels of 32 bits, which can't be made bytes.

    Raises:
        ValueError: if the column is not there or can't hold images.
    """

    def __init__(self, table: "Dataset", column: str, options: ImageTaskOptions, folder: Path | None = None) -> None:
        # Imported here: it takes seconds, and checking a configuration should not.
        from datasets import Image

        require_column(table, column, KEY)
        try:
            self._encoded = table.select_columns([column]).cast_column(column, Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's are among them
            raise ValueError(
                f"{KEY}: {column!r} holds no images but {table.features[column]}; name another column"
            ) from error
        self._column = column
        self._decode = Image().decode_example
        self.split = str(table.split)
        self._options = options
        self._folder = folder
        self._sizes = _sizes(self._encoded, column, folder, table._fingerprint)
        self.missing, self.unreadable, self.wide, self.large, self.absent = (
            (self._sizes == of).all(axis=1) for of in (_MISSING, _UNREADABLE, _WIDE, _LARGE, _ABSENT)
        )
        self.names = ImageNames(table, self._encoded, column, folder)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._sizes)

    def digests(self) -> Rows:
        """A number for each image, the same for images of the same bytes: [rows]."""
        return image_digests(self._encoded, self._column, lambda value: _located(value, self._folder))

    def shape_of(self, row: int) -> ImageShape:
        """Of a row's image, once it is converted and resized."""
        width, height = (
            self._sizes[row].tolist() if self._options.image_size is None else (self._options.image_size,) * 2
        )
        return self._options.channels, height, width

    def require_shape(self, rows: Rows, shape: ImageShape) -> None:
        """Check that these rows, all of which can be read, have images of one shape.

        Raises:
            ValueError: naming the first that has another.
        """
        if self._options.image_size is None:
            other = rows[(self._sizes[rows] != (shape[2], shape[1])).any(axis=1)]
            if len(other):
                self._refuse(int(other[0]), self.shape_of(int(other[0])), shape)

    def examples(self, rows: Rows, labels: Rows, shape: ImageShape, *, join_last: bool) -> "ImageExamples":
        """Decode some rows.

        Args:
            rows: which.
            labels: of these rows.
            shape: that they must have.
            join_last: see `TensorExamples`.

        Raises:
            ValueError: if an image can't be read after all, or has another shape.
        """
        images = np.empty((len(rows), *shape), np.uint8)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[start : start + ROWS_AT_ONCE].tolist()
            for position, (row, value) in enumerate(zip(some, self._encoded[some][self._column], strict=True), start):
                pixels = self._pixels(row, value)
                if pixels.shape != shape:
                    self._refuse(row, pixels.shape, shape)
                images[position] = pixels
        constants = [torch.tensor(c).reshape(-1, 1, 1) for c in (self._options.pixel_mean, self._options.pixel_std)]
        return ImageExamples(torch.from_numpy(images), torch.from_numpy(labels), *constants, join_last=join_last)

    def _pixels(self, row: int, encoded: Any) -> Pixels:
        from PIL.Image import Resampling

        try:
            image = _of_bytes(self._decode(_located(encoded, self._folder))).convert(MODES[self._options.channels])
        except Exception as error:  # each file format has its own
            raise ValueError(
                f"{KEY}: the image of {self.names(row)} (split {self.split!r}) can't be read "
                f"({type(error).__name__}); remove or replace it"
            ) from error
        if (side := self._options.image_size) is not None:
            image = image.resize((side, side), Resampling.BILINEAR)
        return np.asarray(image).reshape(image.height, image.width, -1).transpose(2, 0, 1)

    def _refuse(self, row: int, got: tuple[int, ...], shape: ImageShape) -> None:
        raise ValueError(
            f"task.image_size: images differ in size: {self.names(row)} (split {self.split!r}) is {got[2]}x{got[1]} "
            f"pixels, the first training image {shape[2]}x{shape[1]}; set image_size to resize them"
        )


def most_pixels() -> int | None:
    """Of an image that is read: Pillow refuses more, which a small file may unpack to; None without a limit."""
    from PIL import Image

    # Pillow warns from this number on, and refuses from twice that on.
    return None if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS


class ImageNames(RowNames):
    """What rows with images are called: by the image's own file, where it has one.

    Args:
        table: the split.
        encoded: its images as they are stored.
        column: that holds them.
        folder: that names start at.
    """

    def __init__(self, table: "Dataset", encoded: "Dataset", column: str, folder: Path | None) -> None:
        super().__init__(table)
        self._encoded, self._column, self._folder = encoded, column, folder

    def __call__(self, row: int) -> str:
        """Of one row."""
        value = self._encoded[row][self._column]
        path = None if value is None or value["bytes"] is not None else value["path"]
        if not path:
            return super().__call__(row)
        below = self._folder is not None and Path(path).is_relative_to(self._folder)
        return f"row {row}, {str(Path(path).relative_to(str(self._folder)) if below else path)!r}"


class ImageExamples:
    """Images in memory, one byte for each value, standardised batch by batch.

    Args:
        images: [examples, channels, height, width], bytes.
        labels: [examples].
        mean: [1 or channels, 1, 1], of pixels in [0, 1].
        std: likewise.
        join_last: see `TensorExamples`.
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor, *, join_last: bool = False) -> None:
        self._stored = TensorExamples({"pixel_values": images, "labels": labels}, join_last=join_last)
        self._mean, self._std = mean, std
        self.num_bytes = images.nbytes + labels.nbytes

    def __len__(self) -> int:
        """Number of images."""
        return len(self._stored)

    def batches(self, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        """All images once, in batches; shuffled by `seed`, in order when it is None."""
        for batch in self._stored.batches(batch_size, seed):
            pixels = batch["pixel_values"].float() / 255
            yield {**batch, "pixel_values": (pixels - self._mean) / self._std}


def _of_bytes(image: "Picture") -> "Picture":
    """An image that Pillow converts as one sees it: it would cut off 16 bits at 255, and ignore what is transparent."""
    import PIL.Image

    if _has_16_bits(image):
        values = np.asarray(image).astype(np.uint32)
        return PIL.Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in _TRANSPARENT_MODES or "transparency" in image.info:
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image


def _has_16_bits(image: "Picture") -> bool:
    # Two formats of at most 16 bits are given more room by some versions of Pillow.
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in {"PNG", "PPM"})


def _sizes(encoded: "Dataset", column: str, folder: Path | None, fingerprint: str) -> Rows:
    """Width and height of each image, or why it has none: [rows, 2]; read once, and kept in the library's cache.

    Args:
        encoded: the images as they are stored.
        column: holds them.
        folder: see `Images`.
        fingerprint: of the table.
    """
    from datasets import Features, Image, Value

    decode = Image().decode_example

    def measure(rows: Mapping[str, list[Any]]) -> Mapping[str, list[int]]:
        sizes = (_size(_located(value, folder), decode) for value in rows[column])
        widths, heights = zip(*sizes, strict=True)
        return {"width": list(widths), "height": list(heights)}

    # A fingerprint of our own: the library's would not know this function again after any change to the module.
    key = hashlib.sha256("\n".join([f"image sizes {CACHE_FORMAT}", fingerprint, column]).encode())
    for state in _files(encoded, column, folder):
        key.update(state.encode(errors="surrogateescape"))
    found = encoded.map(
        measure,
        batched=True,
        batch_size=ROWS_AT_ONCE,
        remove_columns=[column],
        features=Features({"width": Value("int64"), "height": Value("int64")}),
        new_fingerprint=key.hexdigest()[:32],
    )
    return np.stack([np.array(found[name][:], np.int64) for name in ("width", "height")], axis=1)


def _files(encoded: "Dataset", column: str, folder: Path | None) -> Iterable[str]:
    """The file of each image that a table has by path alone, as it is now: one that is put right is looked at anew."""
    import pyarrow.compute  # type: ignore[import-untyped]

    for rows in encoded.with_format("arrow").iter(ROWS_AT_ONCE):  # which leaves the bytes of images on disk
        content, path = (pyarrow.compute.struct_field(rows.column(column), name) for name in ("bytes", "path"))
        for value in path.filter(pyarrow.compute.is_null(content)).to_pylist():
            if value is None:
                continue
            place = _path_from(value, folder)
            try:
                found = os.stat(place)
                yield f"\n{place}\n{found.st_mtime_ns} {found.st_size}"
            except (OSError, ValueError):  # the latter of a path that none can be
                yield f"\n{place}\nabsent"


def _located(value: Any, folder: Path | None) -> Any:
    """An image as it is stored, its path as `_path_from` has it."""
    if value is None or value["bytes"] is not None or value["path"] is None:
        return value
    return {**value, "path": _path_from(value["path"], folder)}


def _path_from(path: str, folder: Path | None) -> str:
    """A path of a table, absolute where it is that of a file here; what is a URL stays."""
    if "://" in path:
        return path
    inside = os.path.join(folder or "", path)
    return os.path.abspath(inside if os.path.exists(inside) else path)


def _size(value: Any, decode: Any) -> Size:
    """Width and height of one image, or why it has none."""
    from PIL.Image import DecompressionBombError

    if value is None or (value["bytes"] is None and value["path"] is None):
        return _MISSING
    if value["bytes"] is None and "://" not in value["path"] and not os.path.exists(value["path"]):
        return _ABSENT
    try:
        size = _size_of_whole(value) or _size_in(decode(value))
    except DecompressionBombError:
        return _LARGE
    except Exception:  # each file format has its own
        return _UNREADABLE
    return size


def _size_in(image: "Picture") -> Size:
    return _WIDE if image.mode in _WIDE_MODES and not _has_16_bits(image) else image.size


def _size_of_whole(value: Mapping[str, Any]) -> Size | None:
    """The size of an image that is complete as far as can be told without decoding it; None where in doubt.

    A PNG has checksums, a JPEG a mark at its end. What says that it is to be turned is left to the decoder.
    """
    import PIL.ExifTags
    import PIL.Image

    content = value["bytes"]
    if content is None:
        content = Path(value["path"]).read_bytes() if os.path.isfile(value["path"]) else b""
    try:
        with PIL.Image.open(BytesIO(content)) as image:
            size = _size_in(image)
            if size == _WIDE:  # and complete or not, it is of no use
                return size
            if image.format == "PNG" and b"eXIf" not in content:
                image.verify()
                return size
            ends = image.format == "JPEG" and content.endswith(b"\xff\xd9")
            return size if ends and PIL.ExifTags.Base.Orientation not in image.getexif() else None
    except PIL.Image.DecompressionBombError:
        return _LARGE
    except Exception:  # as above; the decoder has the last word
        return None
