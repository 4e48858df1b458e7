"""What a checkpoint says of itself in its config.json, read before any model is loaded."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

_WIDTH_KEYS = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim")  # families of the library name it differently
_USUAL_WIDTH = 768  # of base-sized models, for a checkpoint that names none


def checkpoint_width(source: str, revision: str | None) -> int:
    """Width of the hidden states of a checkpoint.

    Args:
        source: a folder with config.json, or the id of a model of the Hugging Face Hub.
        revision: commit, branch or tag of a model of the Hub.
    """
    facts = _facts(source, revision)
    widths = [width for key in _WIDTH_KEYS if isinstance(width := facts.get(key), int) and width > 0]
    return widths[0] if widths else _USUAL_WIDTH


@lru_cache(maxsize=32)
def _facts(source: str, revision: str | None) -> Mapping[str, Any]:
    """What a checkpoint's config.json says; nothing where it can't be read, which loading the model will report."""
    try:
        if not Path(source).exists():
            from huggingface_hub import hf_hub_download

            source = str(Path(hf_hub_download(source, "config.json", revision=revision)).parent)
        facts = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    except Exception:  # those of the hub, the network and the disk
        return {}
    return facts if isinstance(facts, dict) else {}
