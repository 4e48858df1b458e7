import io
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from fedkd_flwr.tasks import images as image_reading
from fedkd_flwr.tasks.base import TensorExamples
from tests.tasks.conftest import everything, images
from tests.tasks.image_data import (
    NATURAL,
    NUM_CLIENTS,
    NUM_TEST,
    NUM_TRAIN,
    SIDE,
    SMALL,
    build,
    columns,
    encoded,
    png,
    refusal,
    rows,
    write,
    write_both,
)

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_both(tmp_path_factory.mktemp("images"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data that a test may spoil."""
    return write_both(tmp_path / "data")


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFeature, "decode_example", lambda *_: pytest.fail("decoded"))


def write_images(folder: Path, image: Any) -> None:
    """Both splits, of one image six times."""
    for split in ("train", "test"):
        write(folder, split, {"image": [image] * 6, "label": [0, 1, 2] * 2})


def test_pixels_are_standardised_and_keep_their_labels(stored: Path) -> None:
    batch = everything(build(stored).test_data())
    source = rows(NUM_TEST, first=NUM_TRAIN)
    for row, (pixels, label) in enumerate(zip(batch["pixel_values"], batch["labels"], strict=True)):
        raw = np.array(Image.open(io.BytesIO(source["image"][row]["bytes"])), np.float32)
        np.testing.assert_allclose(pixels[0], raw / 127.5 - 1, atol=1e-6)
        assert label == source["label"][row]


def test_every_channel_has_its_own_constants(tmp_path: Path) -> None:
    colour = np.full((SIDE, SIDE, 3), (255, 51, 0), np.uint8)
    data = {"image": [{"bytes": png(colour), "path": None}] * 6, "label": [0, 1, 2] * 2}
    for split in ("train", "test"):
        write(tmp_path, split, data)
    task = build(tmp_path, 1, channels=3, pixel_mean=[0.5, 0.1, 0.0], pixel_std=[0.5, 0.1, 0.2])
    pixels = everything(task.test_data())["pixel_values"]
    assert pixels.shape == (6, 3, SIDE, SIDE)
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([1.0, 1.0, 0.0]))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_mode_are_converted(channels: int, tmp_path: Path) -> None:
    grey = np.full((SIDE, SIDE), 200, np.uint8)
    modes = [Image.fromarray(grey).convert(mode) for mode in ("L", "RGB", "RGBA", "P", "LA", "CMYK")]
    for split in ("train", "test"):
        write(tmp_path, split, {"image": [encoded(image, "TIFF") for image in modes], "label": [0, 1, 2] * 2})
    pixels = everything(build(tmp_path, 1, channels=channels).test_data())["pixel_values"]
    torch.testing.assert_close(pixels, torch.full((6, channels, SIDE, SIDE), 200 / 127.5 - 1), atol=0.02, rtol=0)


@pytest.mark.parametrize(("dtype", "kind"), [("<u2", "PNG"), ("<u2", "TIFF"), (">u2", "TIFF"), ("<u2", "PPM")])
def test_sixteen_bits_become_eight_and_nothing_is_cut_off(dtype: str, kind: str, tmp_path: Path) -> None:
    ramp = np.linspace(0, 2**16 - 1, SIDE * SIDE).astype(dtype).reshape(SIDE, SIDE)
    write_images(tmp_path, encoded(Image.fromarray(ramp), kind))
    for channels in (1, 3):
        pixels = everything(build(tmp_path, 1, channels=channels).test_data())["pixel_values"]
        assert pixels.mean() == pytest.approx(0, abs=0.01)
        expected = torch.linspace(-1, 1, SIDE * SIDE).reshape(SIDE, SIDE).expand_as(pixels)
        torch.testing.assert_close(pixels, expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_images_of_32_bits_are_left_out_with_the_remedy(dtype: Any, folder: Path, no_decoding: None) -> None:
    data = rows(NUM_TRAIN)
    data["image"][4] = encoded(Image.fromarray(np.full((SIDE, SIDE), 1000, dtype)), "TIFF")
    write(folder, "train", data)
    assert build(folder).data_report().notes == (
        "split 'train': 1 of 48 rows is left out: "
        "1 has an image of 32-bit pixels, to be saved with 8 or 16 bits (the first is row 4 of 'train.parquet')",
    )


def half_transparent(mode: str) -> dict[str, Any]:
    """Black: opaque above, transparent below."""
    if mode == "P":
        places = np.repeat([0, 1], SIDE * SIDE // 2).astype(np.uint8).reshape(SIDE, SIDE)
        image = Image.fromarray(places).convert("P")
        image.putpalette([0] * 6)
        return encoded(image, transparency=1)
    image = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, SIDE // 2, SIDE, SIDE))
    return encoded(image.convert(mode))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_transparent_lies_on_white(channels: int, mode: str, tmp_path: Path) -> None:
    write_images(tmp_path, half_transparent(mode))
    pixels = everything(build(tmp_path, 1, channels=channels).test_data())["pixel_values"]
    assert (pixels[:, :, : SIDE // 2] == -1).all()
    assert (pixels[:, :, SIDE // 2 :] == 1).all()


def test_images_of_different_sizes_are_resized(folder: Path) -> None:
    write(folder, "test", rows(NUM_TEST, side=11))
    task = build(folder, image_size=6)
    assert everything(task.test_data())["pixel_values"].shape == (NUM_TEST, 1, 6, 6)
    assert task.example_batch()["pixel_values"].shape == (1, 1, 6, 6)


def test_images_need_not_be_square(tmp_path: Path) -> None:
    wide = {"image": [{"bytes": png(np.zeros((6, 10), np.uint8)), "path": None}] * 6, "label": [0, 1, 2] * 2}
    for split in ("train", "test"):
        write(tmp_path, split, wide)
    task = build(tmp_path, 1)
    batch = next(iter(task.test_data().batches(2)))
    assert batch["pixel_values"].shape == (2, 1, 6, 10)
    assert task.forward(task.build_models(0).teacher, batch, hidden_states=False, attentions=False).logits.shape[0] == 2


def test_a_folder_of_images_in_folders_of_classes_is_read(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(4):
                pixels = np.full((SIDE, SIDE), 200 if label == "dog" else i, np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / label / f"{i}.png")
    batch = everything(build(tmp_path, 2).test_data())
    assert torch.equal(batch["pixel_values"].mean(dim=(1, 2, 3)) > 0, batch["labels"] == 1)


def test_a_client_decodes_its_own_rows_only_and_once(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = build(stored, partition=NATURAL)
    decoded: list[object] = []
    decode = ImageFeature.decode_example
    for part in (task._train, task._test):
        monkeypatch.setattr(part, "_decode", lambda value: (decoded.append(value), decode(ImageFeature(), value))[1])
    first = task.client_data(2)
    assert len(decoded) == len(first.train) + len(first.test) == (NUM_TRAIN + NUM_TEST) / NUM_CLIENTS
    assert task.client_data(2) is first
    assert len(decoded) == len(first.train) + len(first.test)


def test_images_are_kept_as_bytes(stored: Path) -> None:
    examples: Any = build(stored).test_data()
    assert examples.num_bytes == NUM_TEST * (SIDE * SIDE + 8)  # and eight for the label
    assert everything(examples)["pixel_values"].dtype == torch.float32


def test_the_column_of_images_is_found_by_its_type(folder: Path, stored: Path) -> None:
    for split, data in (("train", rows(NUM_TRAIN)), ("test", rows(NUM_TEST, first=NUM_TRAIN))):
        table = Dataset.from_dict(data).cast_column("image", ImageFeature())
        table.rename_column("image", "img").to_parquet(folder / f"{split}.parquet")
    assert images(build(folder).test_data()) == images(build(stored).test_data())


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["image", "scan"], "several columns are of type Image in split 'train'; name one of: image, scan"),
        ([], "no column is of type Image in split 'train'; name one of: label, site"),
    ],
    ids=["two", "none"],
)
def test_a_column_of_images_that_is_in_doubt_must_be_named(names: list[str], said: str, folder: Path) -> None:
    data = rows(12)
    for split in ("train", "test"):
        table = Dataset.from_dict(
            dict.fromkeys(names, data["image"]) | {name: data[name] for name in ("label", "site")}
        )
        for name in names:
            table = table.cast_column(name, ImageFeature())
        table.to_parquet(folder / f"{split}.parquet")
    assert refusal(folder) == f"task.data.columns.image: {said}"


def test_images_of_different_sizes_are_refused_with_the_row_and_the_remedy(folder: Path) -> None:
    data = rows(NUM_TRAIN)
    data["image"][7] = rows(1, side=9)["image"][0]
    write(folder, "train", data)
    assert refusal(folder) == (
        "task.image_size: images differ in size: row 7 of 'train.parquet' (split 'train') is 9x9 pixels, the first "
        "training image 8x8; set image_size to resize them"
    )


def damaged_inside() -> bytes:
    """A PNG whose checksums are right, and whose pixels are no compressed data."""
    whole = png(np.zeros((SIDE, SIDE), np.uint8))
    start = whole.index(b"IDAT")
    length = int.from_bytes(whole[start - 4 : start], "big")
    chunk = b"IDAT" + b"x" * length
    return whole[:start] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + whole[start + 8 + length :]


def jpeg() -> bytes:
    content: bytes = encoded(Image.open(io.BytesIO(rows(1)["image"][0]["bytes"])), "JPEG")["bytes"]
    return content


@pytest.mark.parametrize(
    "damaged", [b"no image", png(np.zeros((8, 8), np.uint8))[:-30], jpeg()[:-40]], ids=["text", "png", "jpeg"]
)
def test_an_image_that_can_not_be_read_is_left_out_before_anything_is_trained(damaged: bytes, folder: Path) -> None:
    data = rows(NUM_TRAIN)
    for row in (5, 9):
        data["image"][row] = {"bytes": damaged, "path": None}
    data["image"][2] = None
    data["label"][3] = None
    write(folder, "train", data)
    task = build(folder)
    assert task.data_report().notes == (
        "split 'train': 4 of 48 rows are left out: 1 has no image (the first is row 2 of 'train.parquet'), "
        "2 have an image that can't be read (the first is row 5 of 'train.parquet'), "
        "1 has no label (the first is row 3 of 'train.parquet')",
    )
    clients = [task.client_data(client) for client in range(NUM_CLIENTS)]
    assert sum(len(data.train) + len(data.test) for data in clients) == NUM_TRAIN - 4


def test_a_damaged_image_of_the_test_split_is_left_out_too(folder: Path) -> None:
    data = rows(NUM_TEST)
    data["image"][2] = {"bytes": b"", "path": None}
    write(folder, "test", data)
    task = build(folder)
    assert len(task.test_data()) == NUM_TEST - 1
    assert "split 'test': 1 of 12 rows is left out" in task.data_report().notes[0]


def test_an_image_that_only_decoding_shows_to_be_damaged_is_refused_with_its_row(folder: Path) -> None:
    data = rows(NUM_TRAIN)
    data["image"][5] = {"bytes": damaged_inside(), "path": None}
    write(folder, "train", data)
    start = "task.data.columns.image: the image of row 5 of 'train.parquet' (split 'train') can't be read ("
    assert refusal(folder).startswith(start)


def test_images_are_looked_at_once_and_whole_ones_are_not_decoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = rows(NUM_TRAIN)
    data["image"][1] = {"bytes": jpeg(), "path": None}
    write(folder, "train", data)
    looked: list[object] = []
    look = image_reading._size_of_whole
    monkeypatch.setattr(image_reading, "_size_of_whole", lambda value: (looked.append(value), look(value))[1])
    with monkeypatch.context() as patch:
        patch.setattr(ImageFeature, "decode_example", lambda *_: pytest.fail("decoded"))
        first = build(folder)
    assert len(looked) == NUM_TRAIN + NUM_TEST
    second = build(folder)
    assert len(looked) == NUM_TRAIN + NUM_TEST
    assert first.data_report() == second.data_report()


def write_paths(folder: Path, place: str) -> list[dict[str, Any]]:
    """A table of images by relative path, with a file of its own or a folder's; the ways to name it as data."""
    (folder / "table").mkdir(parents=True)
    (folder / place).mkdir()
    lines = []
    for row, (image, label) in enumerate(zip(*(rows(NUM_TRAIN)[name] for name in ("image", "label")), strict=True)):
        (folder / place / f"{row}.png").write_bytes(image["bytes"])
        lines.append(f"{os.path.relpath(folder / place, folder / 'table')}/{row}.png,{label}\n")
    for split, part in (("train", lines), ("test", lines[:NUM_TEST])):
        (folder / "table" / f"{split}.csv").write_text("image,label\n" + "".join(part))
    whole = columns(folder / "table", image="image")
    slices = {"train_split": "train[:36]", "test_split": "train[36:]"}
    return [whole, {**whole, "source": str(folder / "table" / "train.csv"), **slices}]


@pytest.mark.parametrize("place", ["table/pictures", "pictures"])
def test_relative_paths_start_at_the_tables_folder_wherever_a_process_stands(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for data in write_paths(tmp_path / "data", place):
        found = []
        for directory in (tmp_path, tmp_path / "data" / "table"):
            monkeypatch.chdir(directory)
            task = build(tmp_path, data=data)
            assert not [note for note in task.data_report().notes if "left out" in note]
            found.append(images(task.test_data()))
        assert found[0] == found[1]


def test_relative_paths_that_are_none_of_the_tables_folder_start_where_the_process_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_paths(tmp_path / "data", "table/pictures")[0]
    (tmp_path / "data" / "table" / "pictures").rename(tmp_path / "pictures")
    said = (
        "task.data: no row of split 'train' can be used: 48 name an image file that is not there (the first is row 0, "
        "'pictures/0.png')"
    )
    assert refusal(tmp_path, data=data) == said
    monkeypatch.chdir(tmp_path)
    assert len(build(tmp_path, data=data).test_data()) == NUM_TEST


def test_a_file_that_is_put_right_is_looked_at_anew(tmp_path: Path) -> None:
    data = write_paths(tmp_path / "data", "table/pictures")[0]
    file = tmp_path / "data" / "table" / "pictures" / "5.png"
    whole = file.read_bytes()
    notes = []
    for content in (b"", None, whole):
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        notes.append([note for note in build(tmp_path, data=data).data_report().notes if "left out" in note])
    assert list(map(len, notes)) == [2, 2, 0]


def test_sizes_that_another_version_kept_are_not_read(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[object] = []
    look = image_reading._size_of_whole
    monkeypatch.setattr(image_reading, "_size_of_whole", lambda value: (looked.append(value), look(value))[1])
    for _ in range(2):
        build(stored)
    assert len(looked) == NUM_TRAIN + NUM_TEST
    monkeypatch.setattr(image_reading, "CACHE_FORMAT", image_reading.CACHE_FORMAT + 1)
    build(stored)
    assert len(looked) == 2 * (NUM_TRAIN + NUM_TEST)


def test_an_image_that_says_that_it_lies_on_its_side_is_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # the tag of the orientation: a quarter to the right
    turned = [encoded(Image.fromarray(np.zeros((4, 10), np.uint8)), kind, exif=exif) for kind in ("JPEG", "PNG")]
    for split in ("train", "test"):
        write(tmp_path, split, {"image": turned * 3, "label": [0, 1, 2] * 2})
    task = build(tmp_path, 1, student={**SMALL, "kernel_size": 1}, teacher={**SMALL, "kernel_size": 1})
    assert everything(task.test_data())["pixel_values"].shape == (6, 1, 10, 4)


def test_a_last_image_that_would_be_alone_joins_the_batch_before_it_where_a_model_may_normalise_over_a_batch() -> None:
    tensors = {"pixel_values": torch.arange(9.0).reshape(9, 1, 1, 1), "labels": torch.arange(9)}
    alone, joined = (
        [len(batch["labels"]) for batch in TensorExamples(tensors, join_last=join).batches(4, seed=0)]
        for join in (False, True)
    )
    assert (alone, joined) == ([4, 4, 1], [4, 5])
    assert [len(batch["labels"]) for batch in TensorExamples(tensors, join_last=True).batches(5)] == [5, 4]
    assert [len(batch["labels"]) for batch in TensorExamples(tensors, join_last=True).batches(1)] == [1] * 7 + [2]
