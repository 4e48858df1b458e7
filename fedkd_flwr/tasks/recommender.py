"""A news recommender: any encoder of the Hugging Face library, and heads that make vectors of articles and of users.

An article's vector is an attention-weighted mean of its word pieces, a user's one of the articles that they read; the
score is their dot product. Wu et al., "Empowering news recommendation with pre-trained language models", SIGIR 2021,
https://arxiv.org/abs/2104.07413, with the additive attention of Wu et al., "Neural news recommendation with attentive
multi-view learning", IJCAI 2019, https://arxiv.org/abs/1907.05576.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedkd_flwr.core.protocols import Batch
from fedkd_flwr.tasks.base import require_finite
from fedkd_flwr.tasks.calls import accepted_inputs, asked_of
from fedkd_flwr.tasks.transformer import save_transformer

HEADS_FILE = "recommender.safetensors"
CONFIG_FILE = "recommender.json"


class AdditiveAttention(nn.Module):
    """A weighted mean of vectors x: weights softmax(q tanh(W x + b)) over those that a mask keeps.

    Args:
        width: of a vector.
        hidden_size: rows of W.
    """

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.key = nn.Linear(width, hidden_size)
        self.query = nn.Linear(hidden_size, 1, bias=False)  # a bias would cancel in the softmax

    def forward(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """The mean, 0 where the mask keeps nothing.

        Args:
            vectors: [..., items, width].
            mask: [..., items], true where there is an item.

        Returns:
            [..., width].
        """
        kept = torch.where(mask[..., None], vectors, 0.0)  # whatever stands in a gap, NaN included, must not get in
        scores = self.query(torch.tanh(self.key(kept))).squeeze(-1)
        # The least number rather than -inf, which would make NaN of a row without items.
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1) * mask
        mean: Tensor = (weights[..., None] * kept).sum(dim=-2)
        return mean


class RecommenderHeads(nn.Module):
    """What comes after the encoder.

    Args:
        width: of the encoder's hidden states.
        news_dim: of the vector of an article or a user.
        attention_dim: hidden size of both attentions.
    """

    def __init__(self, width: int, news_dim: int, attention_dim: int) -> None:
        super().__init__()
        self.sizes = {"width": width, "news_dim": news_dim, "attention_dim": attention_dim}
        self.over_pieces = AdditiveAttention(width, attention_dim)
        self.projection = nn.Linear(width, news_dim)
        self.over_history = AdditiveAttention(news_dim, attention_dim)
        # The vector of a user of whom nothing is known: it learns what most people click.
        self.unknown_user = nn.Parameter(torch.zeros(news_dim))

    def articles(self, states: Tensor, mask: Tensor) -> Tensor:
        """Vectors of articles, [articles, news_dim], from hidden states [articles, tokens, width] and their mask."""
        vectors: Tensor = self.projection(self.over_pieces(states, mask))
        return vectors

    def users(self, histories: Tensor, mask: Tensor) -> Tensor:
        """Vectors of users, [users, news_dim], from what they read, [users, articles, news_dim], and its mask."""
        known = mask.any(dim=-1, keepdim=True)
        return torch.where(known, self.over_history(histories, mask), self.unknown_user)


class NewsRecommender(nn.Module):
    """An encoder with heads.

    Args:
        encoder: a Hugging Face model without a head; its config gives the width.
        news_dim: see `RecommenderHeads`.
        attention_dim: likewise.
    """

    def __init__(self, encoder: nn.Module, news_dim: int, attention_dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = RecommenderHeads(int(encoder.config.hidden_size), news_dim, attention_dim)  # type: ignore[union-attr, arg-type]
        if isinstance(pooler := getattr(encoder, "pooler", None), nn.Module):
            # Nothing here reads it: frozen it stays loadable, and is not exchanged.
            pooler.requires_grad_(False)

    def forward(self, batch: Batch, *, hidden_states: bool = False, attentions: bool = False) -> tuple[Tensor, Any]:
        """Score candidates.

        Args:
            batch: the distinct articles of some impressions, input_ids and attention_mask [articles, tokens] and what
                else the encoder takes; candidates [batch, candidates] and history [batch, read], places among these
                articles; history_mask [batch, read], 0 where a history is shorter.
            hidden_states: whether the encoder returns them.
            attentions: likewise.

        Returns:
            Scores, [batch, candidates], and what the encoder returned for the articles.
        """
        vectors, out = self._encoded(batch, hidden_states=hidden_states, attentions=attentions)
        users = self.heads.users(vectors[batch["history"]], batch["history_mask"].bool())
        return score(vectors[batch["candidates"]], users), out

    def encode(self, batch: Batch) -> Tensor:
        """Vectors of articles, [articles, news_dim], from their word pieces and mask, each [articles, tokens]."""
        return self._encoded(batch, hidden_states=False, attentions=False)[0]

    def _encoded(self, batch: Batch, *, hidden_states: bool, attentions: bool) -> tuple[Tensor, Any]:
        out = encoded_by(self.encoder, batch, hidden_states=hidden_states, attentions=attentions)
        return self.heads.articles(out.last_hidden_state, batch["attention_mask"].bool()), out


def encoded_by(encoder: nn.Module, batch: Batch, *, hidden_states: bool, attentions: bool) -> Any:
    """What an encoder returns of a batch, of which it takes what it knows."""
    accepted = accepted_inputs(encoder)
    return encoder(
        **{name: tensor for name, tensor in batch.items() if name in accepted},
        **asked_of(encoder, hidden_states=hidden_states, attentions=attentions),
    )


def states_of(encoder: nn.Module, batch: Batch) -> Tensor:
    """Last hidden states of texts, [texts, tokens, width].

    Raises:
        ValueError: if there is none for each token.
    """
    states: Tensor = encoded_by(encoder, batch, hidden_states=False, attentions=False).last_hidden_state
    if states.shape != (expected := (*batch["input_ids"].shape, encoder.config.hidden_size)):  # type: ignore[union-attr]
        raise ValueError(f"its last hidden states are {list(states.shape)} instead of {list(expected)}")
    return states


def score(candidates: Tensor, users: Tensor) -> Tensor:
    """Dot products, [batch, candidates], of [batch, candidates, news_dim] with [batch, news_dim]."""
    return (candidates * users[:, None]).sum(dim=-1)


def require_text_encoder(key: str, model: nn.Module) -> None:
    """Check that a model makes one vector of each word piece.

    Args:
        key: of the model in the experiment.
        model: as the library built it.

    Raises:
        ValueError: if it reads no text, or has a decoder that wants another one.
    """
    reads = "input_ids" in accepted_inputs(model)
    if not reads or getattr(model.config, "is_encoder_decoder", False) or not hasattr(model.config, "hidden_size"):
        what = "has an encoder and a decoder" if reads else "reads no text"
        raise ValueError(f"{key}: must be an encoder of texts such as BERT, a {type(model).__name__} {what}")


def save_recommender(
    model: NewsRecommender, directory: Path, tokenizer: Any, reading: Mapping[str, int | bool]
) -> None:
    """Write the encoder as a directory that `AutoModel` loads, the heads as two files beside it.

    Args:
        model: to write.
        directory: to write into.
        tokenizer: that goes with it.
        reading: how impressions were read, for whoever uses the model.
    """
    save_transformer(model.encoder, directory, tokenizer)
    heads = {name: tensor.detach().cpu().contiguous() for name, tensor in model.heads.state_dict().items()}
    save_file(heads, directory / HEADS_FILE)
    text = json.dumps({"heads": model.heads.sizes, "reading": dict(reading)}, indent=2)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def load_recommender(directory: Path) -> NewsRecommender:
    """The model that `save_recommender` wrote, ready to score.

    Raises:
        ValueError: if it holds numbers that are not finite.
    """
    # Imported here: it takes seconds, and checking a configuration should not.
    from transformers import AutoModel

    sizes = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))["heads"]
    encoder = AutoModel.from_pretrained(directory, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
    model = NewsRecommender(encoder, sizes["news_dim"], sizes["attention_dim"])
    model.heads.load_state_dict(load_file(directory / HEADS_FILE))
    require_finite(model, directory)
    return model.eval()
