"""Which of the shown articles does a user click? Any news data set with impressions, any Hugging Face encoder.

The set-up is that of FedKD's authors on MIND (Wu et al., Nature Communications 13:2032, 2022): a click is to be told
from some articles that were shown with it and not clicked, and models distil their softmax over these candidates.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from fedkd_flwr.core.modules import on_device_of
from fedkd_flwr.core.predictions import Numbers, Predictions
from fedkd_flwr.core.protocols import Batch, DataReport, Examples, Models, Outputs
from fedkd_flwr.core.seeds import derive_seed
from fedkd_flwr.tasks.base import TableTask, copy_shared_tensors
from fedkd_flwr.tasks.impressions import Articles, ImpressionExamples, Ragged
from fedkd_flwr.tasks.labels import Labels
from fedkd_flwr.tasks.news import NewsData, read_impressions, read_news
from fedkd_flwr.tasks.partition import IidPartition, NaturalPartition, OwnPartition, Rows, SizePartition
from fedkd_flwr.tasks.recommender import NewsRecommender, require_text_encoder, save_recommender, score
from fedkd_flwr.tasks.scores import EVALUATION_BATCH, RANKING_METRICS, ranking_scores
from fedkd_flwr.tasks.table import ClientRows, load_tables
from fedkd_flwr.tasks.text import ENCODED_BYTES, TextTaskOptions, require_positions, require_vocabulary
from fedkd_flwr.tasks.transformer import Transformers, as_tokens, show_attentions

if TYPE_CHECKING:
    from datasets import Dataset

# Impressions have no class, so there is none to divide them by.
ImpressionPartition = Annotated[
    IidPartition | SizePartition | NaturalPartition | OwnPartition, Field(discriminator="name")
]


class NewsRecommendationOptions(TextTaskOptions):
    """Options of news recommendation; those of the models and the tokenizer are in `TextTaskOptions`.

    Attributes:
        data: news and impressions.
        use_abstract: whether an article is read with its abstract after the title.
        max_length: word pieces of an article; what is longer is cut. 24 and the sizes below are FedKD's.
        max_history: newest articles of a user's history that are read.
        npratio: articles without a click that a clicked one is told from in training, drawn anew in every epoch.
        news_dim: width of the vector of an article and of a user.
        attention_dim: hidden size of the attention over word pieces and of that over articles.
        partition: how the training impressions are divided.
        client_test_fraction: share of its training impressions that a client keeps for its own score, in (0, 1),
            unless a natural partition gives it some of the test split.
    """

    name: Literal["news_recommendation"] = "news_recommendation"
    data: NewsData
    use_abstract: bool = False
    max_length: int = Field(24, ge=4, le=100_000)
    max_history: int = Field(50, ge=1)
    npratio: int = Field(4, ge=1)
    news_dim: int = Field(64, ge=1)
    attention_dim: int = Field(200, ge=1)
    partition: ImpressionPartition = IidPartition()
    client_test_fraction: float = Field(0.2, gt=0, lt=1)

    def build(self, num_clients: int, seed: int) -> "NewsRecommendation":
        """The task, its training impressions divided among `num_clients`."""
        self.check_clients(num_clients)
        return NewsRecommendation(self, num_clients, seed)


class NewsRecommendation(TableTask):
    """The news recommendation task; see the module's text."""

    counts_labels = False  # which of the candidates was clicked is no class
    metrics = RANKING_METRICS

    def __init__(self, options: NewsRecommendationOptions, num_clients: int, seed: int) -> None:
        self._options = options
        columns = options.data.columns
        train, test = load_tables(options.data, options.partition)
        self._tokenizer = options.load_tokenizer()
        news = read_news(options.data, self._tokenizer, options.max_length, use_abstract=options.use_abstract)
        self._articles = news.articles
        of_train, of_test = (
            read_impressions(table, columns, news.numbers, options.max_history) for table in (train, test)
        )
        self._tables = {"train": of_train.table, "test": of_test.table}
        alike = Labels(("impressions",), np.zeros(len(train), np.int64), np.zeros(len(test), np.int64))
        rows = ClientRows(
            (train, test),
            (of_train.usable, of_test.usable),
            alike.train,
            options.partition,
            num_clients,
            seed,
            options.client_test_fraction,
        )
        super().__init__(options, rows, of_test.usable, ENCODED_BYTES)
        self._report = rows.report(alike, (*news.notes, *of_train.notes, *of_test.notes), rows_of=self._rows_of)
        settings = {"pad_token_id": self._tokenizer.pad_token_id}
        self._encoders = Transformers(options, "AutoModel", (), settings)

    def data_report(self) -> DataReport:
        """Impressions that each client learns from, and what was left out."""
        return self._report

    def build_models(self, seed: int) -> Models:
        """Teacher and student as the options say; heads are drawn from `seed`, the student's are its teacher's.

        Raises:
            ValueError: if a model can't be had, reads no text, or does not know every token.
        """
        encoders, options = self._encoders.build(seed), self._options
        named = {"teacher": encoders.teacher, "student": encoders.student} | {
            f"other_teachers.{n}.model": encoder for n, encoder in enumerate(encoders.other_teachers)
        }
        for name, encoder in named.items():
            require_text_encoder(f"task.{name}", encoder)
            require_vocabulary(name, encoder, self._tokenizer)
            require_positions(name, encoder, options.max_length)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "heads"))
            teacher, student, *others = (
                NewsRecommender(encoder, options.news_dim, options.attention_dim) for encoder in named.values()
            )
        copy_shared_tensors(teacher.heads, student.heads)
        return Models(teacher, student, tuple(others))

    def example_batch(self) -> Batch:
        """One impression of two word pieces."""
        ids = torch.full((1, 2), int(self._tokenizer.pad_token_id))
        place = torch.zeros((1, 1), dtype=torch.int64)
        return {
            "candidates": place.expand(1, self._options.npratio + 1),
            "labels": place[0],
            "history": place,
            "history_mask": torch.ones_like(place),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
        }

    def forward(self, model: nn.Module, batch: Batch, *, hidden_states: bool, attentions: bool) -> Outputs:
        """Run a model on a batch of `ImpressionExamples`.

        Logits are [batch, 1 + npratio]; hidden states, attention maps and their mask are those of the distinct
        articles of the batch.
        """
        assert isinstance(model, NewsRecommender)
        inputs = on_device_of(model, batch)
        if attentions:
            show_attentions(model.encoder)
        logits, out = model(inputs, hidden_states=hidden_states, attentions=attentions)
        return Outputs(
            logits,
            inputs["labels"],
            as_tokens(out.hidden_states) if hidden_states else None,
            tuple(out.attentions) if attentions and getattr(out, "attentions", None) else None,
            inputs["attention_mask"],
        )

    def predict(self, model: nn.Module, examples: Examples) -> Predictions:
        """Log-probabilities of the softmax over all candidates of each impression."""
        assert isinstance(examples, ImpressionExamples)
        labels = [examples.labels[row] for row in range(len(examples.labels))]
        return Predictions([_log_softmax(scores) for scores in impression_scores(model, examples)], labels)

    def score(self, predictions: Predictions, examples: Examples) -> dict[str, float]:
        """AUC, MRR, nDCG@5 and nDCG@10 over whole impressions, see `ranking_scores`.

        `loss` is the mean over clicks of the cross-entropy of the softmax over all candidates, in nats.
        """
        labels, found = predictions.labels, predictions.log_probabilities
        losses = [-of_one[clicks == 1] for of_one, clicks in zip(found, labels, strict=True)]
        # A model that has diverged prefers nothing; its loss tells. One that rules a candidate out has not.
        ranked = [np.zeros_like(of_one) if np.isnan(of_one).any() else of_one for of_one in found]
        return ranking_scores(labels, ranked) | {"loss": float(np.concatenate(losses).mean())}

    def export(self, model: nn.Module, directory: Path) -> None:
        """Write a directory that `load_recommender` loads, and from which `AutoModel` loads the encoder."""
        assert isinstance(model, NewsRecommender)
        reading = self._options.model_dump(include={"use_abstract", "max_length", "max_history"})
        save_recommender(model, directory, self._tokenizer, reading)

    def _examples(self, split: str, rows: Rows) -> ImpressionExamples:
        table: Dataset = self._tables[split].select(rows.tolist())
        histories, candidates, labels = (Ragged.read(table, name) for name in ("history", "candidates", "labels"))
        return ImpressionExamples(self._articles, histories, candidates, labels, self._options.npratio)


def impression_scores(model: nn.Module, examples: ImpressionExamples) -> list[Numbers]:
    """For each impression, the score of each candidate: [candidates]. Every article is encoded once."""
    assert isinstance(model, NewsRecommender)
    model.eval()
    histories, candidates = examples.histories, examples.candidates
    with torch.inference_mode():
        distinct = np.unique(np.concatenate([histories.values, candidates.values]))
        vectors = _vectors(model, examples.articles, distinct)
        read, shown = (Ragged(np.searchsorted(distinct, of.values), of.offsets) for of in (histories, candidates))
        scores: list[Numbers] = []
        for start in range(0, len(read), EVALUATION_BATCH):
            rows = np.arange(start, min(start + EVALUATION_BATCH, len(read)))
            history, among = (torch.from_numpy(of.padded(rows, -1)).to(vectors.device) for of in (read, shown))
            users = model.heads.users(vectors[history.clamp(min=0)], history >= 0)
            padded = score(vectors[among.clamp(min=0)], users).double().cpu().numpy()
            scores += [row[:length] for row, length in zip(padded, shown.lengths[rows], strict=True)]
    return scores


def _vectors(model: NewsRecommender, articles: Articles, chosen: Rows) -> Tensor:
    """Vectors of some distinct articles, in their order: [chosen, news_dim]."""
    ordered = articles.by_length(chosen)
    parts = [
        model.encode(on_device_of(model, articles.batch(ordered[start : start + EVALUATION_BATCH])))
        for start in range(0, len(ordered), EVALUATION_BATCH)
    ]
    # `chosen` is sorted, so sorting brings these back.
    return torch.cat(parts)[torch.from_numpy(np.argsort(ordered))]


def _log_softmax(scores: Numbers) -> Numbers:
    """Along the only axis: [candidates]."""
    shifted = scores - scores.max()
    found: Numbers = shifted - np.log(np.exp(shifted).sum())
    return found
