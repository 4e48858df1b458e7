"""A small ResNet that has seen half of the classes of CIFAR-10, as the frozen backbone of conf/cifar10_lora_*.yaml.

python benchmarks/backbone.py --source data/cifar10 [--epochs N] [--output DIR]

Trains on images of the first five classes among the first half of the training split; the experiments divide the other
half, of all ten classes, among their clients. So a backbone knows the domain, five of ten classes, and none of the
clients' images: that is what a pretrained model usually is. Prints the accuracy on the five classes of the test split
and writes a directory that `from_pretrained` loads. Ten epochs take five minutes without a GPU.
"""

import argparse
from pathlib import Path

import torch
from torch.nn import functional

from fedkd_flwr.tasks.image_classification import ImageClassificationOptions

NUM_KNOWN = 5
BATCH = 64
CONFIG = {
    "model_type": "resnet",
    "embedding_size": 32,
    "hidden_sizes": [32, 64, 128],
    "depths": [2, 2, 2],
    "layer_type": "basic",
}


def main() -> None:
    """Train, score, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("resnet_cifar10_half"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = ImageClassificationOptions.model_validate(
        {
            "data": {"source": options.source, "train_split": "train[:50%]"},
            "partition": {"name": "iid"},
            "client_test_fraction": 0.01,
            "pixel_mean": [0.491, 0.482, 0.447],
            "pixel_std": [0.247, 0.243, 0.262],
            "teacher": {"name": "transformers", "config": CONFIG},
            "student": {"name": "cnn"},
        }
    ).build(1, 0)
    model = task.build_models(0).teacher
    train = task.client_data(0).train
    steps = options.epochs * -(-len(train) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for epoch in range(options.epochs):
        model.train()
        for batch in train.batches(BATCH, seed=epoch):
            known = batch["labels"] < NUM_KNOWN
            if known.sum() > 1:
                pixels, labels = batch["pixel_values"][known], batch["labels"][known]
                pixels = pixels.flip(-1) if torch.rand(()) < 0.5 else pixels
                inputs = {"pixel_values": pixels, "labels": labels}
                out = task.forward(model, inputs, hidden_states=False, attentions=False)
                functional.cross_entropy(out.logits, labels).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
            schedule.step()
        print(f"epoch {epoch + 1}", flush=True)
    model.eval()
    right = total = 0
    with torch.inference_mode():
        for batch in task.test_data().batches(256):
            known = batch["labels"] < NUM_KNOWN
            inputs = {name: values[known] for name, values in batch.items()}
            logits = task.forward(model, inputs, hidden_states=False, attentions=False).logits
            right += int((logits.argmax(dim=-1) == inputs["labels"]).sum())
            total += int(known.sum())
    print(f"accuracy on {NUM_KNOWN} classes: {right / total:.3f} of {total} test images")
    task.export(model, options.output)


if __name__ == "__main__":
    main()
