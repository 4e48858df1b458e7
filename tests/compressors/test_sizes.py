"""No payload is larger than the numbers themselves, for any tensor alone and for whole models."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
import transformers

from fedkd_flwr.compressors import COMPRESSORS
from fedkd_flwr.compressors.payload import HEADER_BYTES
from fedkd_flwr.compressors.transform_coding import TransformCodingOptions
from fedkd_flwr.core.arrays import Array, Arrays, Spec, TensorSpec, difference, num_elements
from fedkd_flwr.core.modules import exchanged_spec, read_arrays
from fedkd_flwr.core.protocols import Codec

LOSSY = ["transform_coding", "svd", "quantize", "top_k", "powersgd"]
SHAPES = [
    (),
    (1,),
    (3,),
    (65,),
    (1, 9),
    (9, 1),
    (2, 2),
    (2, 3),
    (3, 3),
    (7, 40),
    (64, 64),
    (2, 300),
    (8, 4, 3, 3),
    (1, 17, 64),
]


def raw_bytes(spec: Spec) -> int:
    return HEADER_BYTES + len(spec) + 4 * num_elements(spec)


def codec_of(name: str, spec: Spec) -> Codec:
    return COMPRESSORS[name](name=name).build(spec)


def sent(name: str, spec: Spec, update: Arrays) -> int:
    codec = codec_of(name, spec)
    payload, _ = codec.encode(update, codec.initial_state(), progress=0.0, seed=0)
    codec.decode(payload, codec.initial_state())
    return len(payload)


def gaussian(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape)


def low_rank(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    rows = shape[0] if shape else 1
    cols = int(np.prod(shape[1:]))
    values = np.outer(rng.standard_normal(rows), rng.standard_normal(cols)) + 0.01 * rng.standard_normal((rows, cols))
    return values.reshape(shape)


def sparse(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape) * (rng.random(shape) < 0.05)


def outlier(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    values = np.asarray(1e-3 * rng.standard_normal(shape))
    values.flat[int(rng.integers(values.size))] = 1e3
    return values


KINDS: list[Callable[[np.random.Generator, tuple[int, ...]], Array]] = [gaussian, low_rank, sparse, outlier]


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_is_larger_than_raw(name: str, kind: Callable[[np.random.Generator, tuple[int, ...]], Array]) -> None:
    for seed, shape in enumerate(SHAPES):
        spec: Spec = (TensorSpec("w", shape),)
        update = {"w": np.asarray(kind(np.random.default_rng(seed), shape), np.float32)}
        assert sent(name, spec, update) <= raw_bytes(spec), shape


@pytest.mark.parametrize("name", ["transform_coding", "svd", "quantize", "powersgd"])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int4"])
def test_no_precision_makes_a_tensor_larger_than_raw(name: str, precision: str) -> None:
    options = {"name": name} if name == "transform_coding" else {"name": name, "precision": precision}
    if name == "transform_coding":
        options["energy_start"] = {"float32": 0.9999, "float16": 0.999, "int8": 0.99, "int4": 0.3}[precision]
    for seed, shape in enumerate(SHAPES):
        spec: Spec = (TensorSpec("w", shape),)
        codec = COMPRESSORS[name].model_validate(options).build(spec)
        for kind in KINDS:
            update = {"w": np.asarray(kind(np.random.default_rng(seed), shape), np.float32)}
            payload, _ = codec.encode(update, codec.initial_state(), progress=0.0, seed=0)
            assert len(payload) <= raw_bytes(spec), (shape, kind.__name__)


# Ten architectures

TEXT = {"vocab_size": 120, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT |= {"max_position_embeddings": 24}
IMAGE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE |= {"image_size": 16, "patch_size": 4}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
ARCHITECTURES = {
    "bert": ("BertConfig", TEXT),
    "roberta": ("RobertaConfig", TEXT),
    "distilbert": (
        "DistilBertConfig",
        {"vocab_size": 120, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 24},
    ),
    "electra": ("ElectraConfig", {**TEXT, "embedding_size": 8}),
    "vit": ("ViTConfig", IMAGE),
    "deit": ("DeiTConfig", IMAGE),
    "resnet": ("ResNetConfig", {**STAGES, "embedding_size": 8}),
    "convnext": ("ConvNextConfig", {**STAGES, "num_stages": 2}),
    "gpt2": ("GPT2Config", {"vocab_size": 120, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24}),
    "llama": ("LlamaConfig", {**TEXT, "num_key_value_heads": 1}),
}
each_architecture = pytest.mark.parametrize("name", sorted(ARCHITECTURES))


@cache
def trained(name: str) -> tuple[Spec, dict[str, Array]]:
    """The update of three steps of SGD on a made-up task."""
    kind, options = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(getattr(transformers, kind)(**options)).train()
    before, spec = read_arrays(model), exchanged_spec(model)
    is_text = "vocab_size" in options
    inputs = (
        torch.randint(5, 100, (4, 10))
        if is_text
        else torch.randn(4, 3, *([16, 16] if "image_size" in options else [32, 32]))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    target = None
    for _ in range(3):
        hidden = model(inputs).last_hidden_state
        target = torch.randn_like(hidden) if target is None else target
        optimizer.zero_grad()
        (hidden - target).square().mean().backward()
        optimizer.step()
    return spec, difference(read_arrays(model), before, spec)


def low_rank_and_noise(spec: Spec) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {t.name: np.asarray(low_rank(rng, t.shape), np.float32) for t in spec}


@each_architecture
def test_every_tensor_of_an_architecture_alone_is_not_larger_than_raw(name: str) -> None:
    spec, update = trained(name)
    random = low_rank_and_noise(spec)
    assert any(value.any() for value in update.values())
    for tensor in spec:
        for values in (update, random):
            assert sent("transform_coding", (tensor,), {tensor.name: values[tensor.name]}) <= raw_bytes((tensor,))


@each_architecture
@pytest.mark.parametrize("compressor", LOSSY)
def test_the_update_of_an_architecture_is_smaller_than_raw(name: str, compressor: str) -> None:
    spec, update = trained(name)
    assert sent(compressor, spec, update) < raw_bytes(spec)
    assert sent(compressor, spec, low_rank_and_noise(spec)) < raw_bytes(spec)


@each_architecture
def test_six_tenths_of_the_energy_take_a_tenth_of_the_bytes(name: str) -> None:
    spec, update = trained(name)
    codec = TransformCodingOptions(energy_start=0.6, energy_end=0.6).build(spec)
    payload, _ = codec.encode(update, {}, progress=0.0, seed=0)
    found, _ = codec.decode(payload, {})
    parameters = [t.name for t in spec if t.kind == "parameter"]
    missed = sum(np.square(found[n].astype(np.float64) - update[n]).sum() for n in parameters)
    assert missed <= 0.4 * sum(np.square(update[n].astype(np.float64)).sum() for n in parameters)
    buffers = sum(4 * t.size for t in spec if t.kind == "buffer")
    assert len(payload) - buffers < 0.1 * raw_bytes(spec) + len(spec)
