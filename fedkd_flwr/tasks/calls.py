"""How a model of the library is called, whatever its family, and what of its answer is read."""

import inspect
from typing import Any

from torch import Tensor, nn


def answer_in_full(config: Any) -> None:
    """Let a model return what it is asked for, by name, whatever its configuration says."""
    for name, value in {"return_dict": True, "output_hidden_states": False, "output_attentions": False}.items():
        if getattr(config, name, value) is not value:
            setattr(config, name, value)


def show_attentions(model: nn.Module) -> None:
    """Switch to the implementation of attention that returns its maps; faster ones return none."""
    if getattr(model.config, "_attn_implementation", "eager") != "eager" and returns_attentions(model):
        model.set_attn_implementation("eager")  # type: ignore[operator]


def returns_attentions(model: nn.Module) -> bool:
    """Whether a model has attention maps at all: a convolutional network has none."""
    return hasattr(model.config, "num_attention_heads")


def accepted_inputs(model: nn.Module) -> frozenset[str]:
    """Names that a model's forward pass takes, apart from its labels, which tasks keep to themselves."""
    return frozenset(inspect.signature(model.forward).parameters) - {"labels"}


def asked_of(model: nn.Module, *, hidden_states: bool, attentions: bool) -> dict[str, bool]:
    """Arguments of a forward pass that say what a model shall return beside its outputs."""
    asked = {"output_hidden_states": hidden_states}
    if attentions and returns_attentions(model):
        asked["output_attentions"] = True
    if _can_cache(model):
        asked["use_cache"] = False  # nothing is generated, and some mixtures of layers can't do it
    return asked


def _can_cache(model: nn.Module) -> bool:
    """Whether a model takes `use_cache`, or hands it on to the text model inside of it."""
    taken = inspect.signature(model.forward).parameters
    inner = getattr(getattr(model, "config", None), "text_config", None)
    return "use_cache" in taken or ("kwargs" in taken and hasattr(inner, "use_cache"))


def as_tokens(states: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
    """Hidden states as [batch, tokens, width]: the maps of a convolutional network have a token for each pixel."""
    if not states:
        return None
    return tuple(state.flatten(2).transpose(1, 2) if state.ndim == 4 else state for state in states)
