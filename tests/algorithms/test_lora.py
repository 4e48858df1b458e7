"""Low-rank adapters: what is trained, what is frozen, what travels and what is written."""

import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from fedkd_flwr.algorithms.base import Algorithm
from fedkd_flwr.algorithms.lora import LoraOptions, adapted, backbone_digest, plain
from fedkd_flwr.algorithms.lora_avg import LoraAvgOptions
from fedkd_flwr.core.modules import read_arrays
from fedkd_flwr.core.protocols import ClientData, Task
from tests.algorithms.conftest import FIRST, LOCAL, SEED, same
from tests.algorithms.little import Little, Net
from tests.conftest import Run, small

LORA = LoraOptions(rank=2)


class Convolutional(nn.Module):
    """A convolution, a norm over the batch, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.convolution(images)).mean(dim=(2, 3)))


def build(task: Task, **options: object) -> Algorithm:
    return LoraAvgOptions.model_validate({"lora": LORA, "local": LOCAL, **options}).build(task, SEED)


def moved(model: nn.Module) -> nn.Module:
    """The model with every trainable number changed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def test_an_adapter_changes_nothing_before_it_is_trained(task: Task) -> None:
    teacher = task.build_models(SEED).teacher
    model = adapted(teacher, LORA, 0)
    batch = next(task.test_data().batches(8))
    before, after = (task.forward(m.eval(), batch, hidden_states=False, attentions=False) for m in (teacher, model))
    assert torch.equal(before.logits, after.logits)


def test_adapters_and_head_are_all_that_trains(task: Task) -> None:
    model = adapted(task.build_models(SEED).teacher, LORA, 0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".lora_" in name or name.startswith("classifier.") for name in trained)
    assert sum("_proj.lora_A" in name for name in trained) == 4  # query and value of two layers


def test_the_backbone_is_shared_between_adapters_of_other_ranks(task: Task) -> None:
    teacher = task.build_models(SEED).teacher
    models = [adapted(teacher, LoraOptions(rank=rank), 0) for rank in (1, 3)]
    pointers = [{p.data_ptr() for p in model.parameters() if not p.requires_grad} for model in models]
    assert pointers[0] == pointers[1]
    assert backbone_digest(models[0]) == backbone_digest(models[1])


def test_a_plain_copy_says_what_the_adapted_model_says(task: Task) -> None:
    model = moved(adapted(task.build_models(SEED).teacher, LORA, 0))
    batch = next(task.test_data().batches(8))
    copied = plain(model)
    a, b = (task.forward(m.eval(), batch, hidden_states=False, attentions=False).logits for m in (model, copied))
    torch.testing.assert_close(a, b)
    assert copied.state_dict().keys() == task.build_models(SEED).teacher.state_dict().keys()


def test_convolutions_can_have_adapters_and_a_frozen_norm_keeps_its_statistics() -> None:
    images = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    model = moved(adapted(Convolutional(), LORA, 0))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names == [
        "convolution.lora_A.default.weight",
        "convolution.lora_B.default.weight",
        "head.weight",
        "head.bias",
    ]
    LOCAL.prepare(model)
    frozen = backbone_digest(model)
    torch.testing.assert_close(model(images), plain(model.eval())(images))
    LOCAL.prepare(model)
    model(images)
    assert backbone_digest(model) == frozen
    assert not any("running" in name for name in read_arrays(model, frozen=False))


def test_what_is_frozen_is_bit_equal_after_a_round_and_is_neither_sent_nor_kept(task: Task, data: ClientData) -> None:
    algorithm = build(task)
    shared = algorithm.shared.initial()
    digest = algorithm.foundations()["frozen backbone"]
    trained = algorithm.client.train(shared, {}, data, FIRST)
    assert trained.upload is not None
    assert trained.upload.keys() == shared.keys()
    assert all(".lora_" in name or name.startswith("classifier.") for name in shared)
    assert any(value.any() for value in trained.upload.values())
    assert backbone_digest(algorithm.client._shared.module) == digest  # type: ignore[attr-defined]
    assert trained.private == {}


def test_training_from_the_same_seed_gives_the_same_update(task: Task, data: ClientData) -> None:
    uploads = [build(task).client.train(build(task).shared.initial(), {}, data, FIRST).upload for _ in range(2)]
    assert uploads[0] is not None and uploads[1] is not None
    assert same(uploads[0], uploads[1])


def test_bytes_of_an_upload_are_those_of_adapters_and_head(run: Run) -> None:
    run_dir = run("algorithm={name: lora_avg, lora: {rank: 2}}", "compressor.name=identity", "num_rounds=1")
    # Query and value of two layers of width 16, and a head of ten classes; a form for each tensor, and a header.
    num_floats = 2 * 2 * (2 * 16 + 16 * 2) + 16 * 10 + 10
    num_tensors, header = 2 * 2 * 2 + 2, 13
    ledger = (run_dir / "ledger.jsonl").read_text(encoding="utf-8")
    assert f'"payload_bytes": {4 * num_floats + num_tensors + header}' in ledger


def test_a_client_keeps_no_backbone_on_disk(run: Run) -> None:
    run_dir = run("algorithm={name: lora_avg, lora: {rank: 2}}", "num_rounds=1")
    files = [f for f in (run_dir / "state").rglob("*.safetensors") if "private_model" not in f.parts]
    names = {name for file in files for name in load_file(file)}
    assert any("lora_A" in name for name in names)
    assert not any("fc1" in name or "embeddings" in name or "base_layer" in name for name in names)


def test_the_exported_model_is_one_without_adapters(run: Run) -> None:
    from transformers import ViTForImageClassification

    run_dir = run("algorithm={name: lora_avg, lora: {rank: 2}}", "num_rounds=1")
    loaded = read_arrays(ViTForImageClassification.from_pretrained(run_dir / "student"))
    before = read_arrays(small().build_task().build_models(0).teacher)
    assert loaded.keys() == before.keys()


def test_a_node_with_another_backbone_is_not_taken_in_and_says_why(run: Run) -> None:
    from flwr.app import Context, Message

    import client_app

    def app(message: Message, context: Context) -> Message:
        foundations = message.content.config_records.get("foundations")
        if foundations is not None and context.node_config["partition-id"] == 1:
            foundations["frozen backbone"] = bytes(32)
        return client_app.app(message, context)

    run_dir = run(
        "algorithm={name: lora_avg, lora: {rank: 2}}",
        "num_rounds=1",
        "server.min_available=2",
        "server.connect_timeout_seconds=5",
        app=app,
    )
    ledger = (run_dir / "ledger.jsonl").read_text(encoding="utf-8")
    assert "not taken in (node " in ledger
    assert "the frozen backbone must be the same on all nodes" in ledger


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"target_modules": ["dense"]},
            "algorithm.lora.target_modules: a ViT.* no linear or convolutional layer 'dense'",
        ),
        ({"trained_modules": ["pooler"]}, "algorithm.lora.trained_modules: no module of a ViT.* is called 'pooler'"),
        ({"target_modules": ["classifier"]}, "algorithm.lora.target_modules"),
    ],
)
def test_names_of_no_module_are_one_clear_line(task: Task, lora: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        LoraAvgOptions.model_validate({"lora": lora}).build(task, SEED)
    assert "\n" not in str(caught.value)


def test_a_backbone_without_any_layer_for_an_adapter_is_refused() -> None:
    module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"algorithm\.lora: a Sequential has no linear or convolutional layer"):
        adapted(module, LORA, 0)


def test_clients_with_other_backbones_cant_average_their_adapters() -> None:
    with pytest.raises(ValueError, match="different teachers"):
        build(Little(teachers=(Net(), Net(width=6))))


def test_the_server_keeps_no_backbone_and_a_run_can_be_repeated(run: Run) -> None:
    from fedkd_flwr.flower.checkpoint import Checkpoints

    runs = [run("algorithm={name: lora_avg, lora: {rank: 2}}", "num_rounds=2") for _ in range(2)]
    checkpoint = Checkpoints(runs[0], 1).latest()
    assert checkpoint is not None
    assert not any("base_layer" in name or "fc1" in name for name in checkpoint.parts["reference"].arrays)
    first, second = (load_file(run_dir / "student" / "model.safetensors") for run_dir in runs)
    assert same(first, second)
