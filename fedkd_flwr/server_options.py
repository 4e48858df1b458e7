"""Options of the server: whom it asks, how long it waits, what it believes, and how uploads become one.

Names of aggregators are those of Flower's strategies; `fedkd_flwr.flower.aggregators` runs them.
"""

from abc import ABC
from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

MAX_TIMEOUT_SECONDS = 30 * 86_400.0

Weighting = Literal["auto", "uniform", "num_examples"]


class AggregatorOptions(BaseModel, ABC, extra="forbid", frozen=True, allow_inf_nan=False):
    """How uploads become one, `name` first."""

    name: str

    @property
    def num_clients_needed(self) -> int:
        """Uploads without which the rule promises nothing; a round with fewer good ones is skipped."""
        return 1

    @property
    def robust(self) -> bool:
        """Whether the rule is meant for rounds with hostile clients."""
        return False

    def weighted(self, weighting: Weighting) -> Self:
        """The same rule, with a weighting that was left open decided."""
        if getattr(self, "weighting", None) != "auto":
            return self
        return self.model_copy(update={"weighting": "uniform" if self.robust else weighting})

    @property
    def of_mean(self) -> bool:
        """Whether the aggregate follows from the mean of the updates and from earlier ones alone."""
        return False


class FedAvgAggregation(AggregatorOptions):
    """The mean.

    Attributes:
        weighting: "uniform" counts every client alike, as the FedKD paper does; "num_examples" by its training data,
            of at most `validation.max_weight_ratio` times the median's. "auto" is the latter, but uniform with
            `privacy`, for `fedkd_paper`, and where the algorithm has a rule of its own.
    """

    name: Literal["fedavg"] = "fedavg"
    weighting: Weighting = "auto"

    @property
    def of_mean(self) -> bool:
        """It is the mean."""
        return True


class FedAvgMAggregation(AggregatorOptions):
    """The mean with server momentum, Hsu et al. 2019, https://arxiv.org/abs/1909.06335.

    Attributes:
        eta: server learning rate; 1 with momentum 0 is the mean.
        momentum: in [0, 1).
        weighting: of the mean.
    """

    name: Literal["fedavgm"] = "fedavgm"
    eta: float = Field(gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weighting: Weighting = "auto"

    @property
    def of_mean(self) -> bool:
        """It is the mean, moved."""
        return True


class AdaptiveAggregation(AggregatorOptions):
    """A server optimiser with one rate for each parameter, Reddi et al. 2021, https://arxiv.org/abs/2003.00295.

    Attributes:
        eta: server learning rate, in the parameters' own units: the step of each parameter is about `eta` however
            small the clients' updates are. It has no default, because a wrong one undoes the training.
        tau: added to the root of the second moment; the larger, the closer to plain averaging.
        weighting: of the mean.
    """

    eta: float = Field(gt=0)
    tau: float = Field(1e-3, gt=0)
    weighting: Weighting = "auto"

    @property
    def of_mean(self) -> bool:
        """It is the mean, scaled."""
        return True


class FedAdamAggregation(AdaptiveAggregation):
    """Adam on the mean update; `beta_1` and `beta_2` are the decays of its moments."""

    name: Literal["fedadam"] = "fedadam"
    beta_1: float = Field(0.9, ge=0, lt=1)
    beta_2: float = Field(0.99, ge=0, lt=1)


class FedYogiAggregation(AdaptiveAggregation):
    """Yogi on the mean update; `beta_1` and `beta_2` are the decays of its moments."""

    name: Literal["fedyogi"] = "fedyogi"
    beta_1: float = Field(0.9, ge=0, lt=1)
    beta_2: float = Field(0.99, ge=0, lt=1)


class FedAdagradAggregation(AdaptiveAggregation):
    """Adagrad on the mean update."""

    name: Literal["fedadagrad"] = "fedadagrad"


class DpFixedClippingAggregation(AggregatorOptions):
    """The mean of updates that the server clips, with the server's noise: central differential privacy.

    McMahan et al., ICLR 2018, https://arxiv.org/abs/1710.06963. Clients trust the server with their updates; who sees
    only broadcasts or the model is what this is against. The noise is drawn as clients draw theirs, from the operating
    system; no seed repeats it.

    Attributes:
        clipping_norm: length (2-norm over all parameters) that no update exceeds.
        noise_multiplier: standard deviation of the noise on the sum of a round's updates, in units of `clipping_norm`.
        delta: for which epsilon is stated.
        adjacency: as in `privacy`: "replace" or "zero_out".
    """

    name: Literal["dp_fixed_clipping"] = "dp_fixed_clipping"
    clipping_norm: float = Field(gt=0)
    noise_multiplier: float = Field(gt=0)
    delta: float = Field(1e-5, gt=0, lt=1)
    adjacency: Literal["replace", "zero_out"] = "replace"

    @property
    def of_mean(self) -> bool:
        """It is the mean, with noise."""
        return True


class FedMedianAggregation(AggregatorOptions):
    """The median of every coordinate, Yin et al. 2018, https://arxiv.org/abs/1803.01498."""

    name: Literal["fedmedian"] = "fedmedian"

    @property
    def robust(self) -> bool:
        """It is."""
        return True


class FedTrimmedAvgAggregation(AggregatorOptions):
    """The mean of every coordinate without its tails, Yin et al. 2018, https://arxiv.org/abs/1803.01498.

    Attributes:
        beta: share cut off at either end, in [0, 0.5).
    """

    name: Literal["fedtrimmedavg"] = "fedtrimmedavg"
    beta: float = Field(0.2, ge=0, lt=0.5)

    @property
    def robust(self) -> bool:
        """It is."""
        return True


class RobustSelection(AggregatorOptions):
    """Rules that look for the uploads that lie close together.

    Attributes:
        num_malicious_nodes: how many of a round's clients may be hostile.
    """

    num_malicious_nodes: int = Field(1, ge=0)

    @property
    def num_clients_needed(self) -> int:
        """Krum's guarantee needs 2 f + 3 clients where f are hostile."""
        return 2 * self.num_malicious_nodes + 3

    @property
    def robust(self) -> bool:
        """It is."""
        return True


class KrumAggregation(RobustSelection):
    """The one upload closest to its neighbours, Blanchard et al. 2017, https://arxiv.org/abs/1703.02757."""

    name: Literal["krum"] = "krum"


class MultiKrumAggregation(RobustSelection):
    """The mean of the uploads closest to their neighbours.

    Attributes:
        num_nodes_to_select: how many of them; None for all but `num_malicious_nodes`.
        weighting: of the mean. "auto" is uniform, because a hostile client that is selected would claim many examples.
    """

    name: Literal["multikrum"] = "multikrum"
    num_nodes_to_select: int | None = Field(None, ge=1)
    weighting: Weighting = "auto"


class BulyanAggregation(RobustSelection):
    """A selection as Multi-Krum's, then a mean about the median, after El Mhamdi et al. 2018.

    https://arxiv.org/abs/1802.07927; Flower selects all at once, where the paper selects one after the other.
    """

    name: Literal["bulyan"] = "bulyan"

    @property
    def num_clients_needed(self) -> int:
        """4 f + 3 clients where f are hostile."""
        return 4 * self.num_malicious_nodes + 3


class QFedAvgAggregation(AggregatorOptions):
    """Clients with a higher loss count for more, Li et al. 2020, https://arxiv.org/abs/1905.10497.

    Attributes:
        q: 0 is the mean; the larger, the more equal the clients' losses become. The loss is what a client says it is,
            up to ten times the round's median.
        client_learning_rate: of local training; the paper's estimate of the loss's curvature is its inverse.
    """

    name: Literal["qfedavg"] = "qfedavg"
    q: float = Field(0.1, ge=0)
    client_learning_rate: float = Field(0.1, gt=0)


AnyAggregation = Annotated[
    FedAvgAggregation
    | FedAvgMAggregation
    | FedAdamAggregation
    | FedYogiAggregation
    | FedAdagradAggregation
    | DpFixedClippingAggregation
    | FedMedianAggregation
    | FedTrimmedAvgAggregation
    | KrumAggregation
    | MultiKrumAggregation
    | BulyanAggregation
    | QFedAvgAggregation,
    Field(discriminator="name"),
]


class ValidationOptions(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """What the server believes of a client.

    Attributes:
        max_norm_ratio: an update's length (2-norm over all parameters) may be at most this many times the running
            median of accepted ones; None for no bound.
        excess_norm: what becomes of a longer one: "reject" costs the reply, "clip" scales it down to the bound.
        max_examples_ratio: a client may claim at most this many times the median number of examples, or it is not
            asked to train; None for no bound.
        max_weight_ratio: a client counts in a mean weighted by examples for at most this many times the median number
            of examples, because the number is its own claim; None for no bound.
    """

    max_norm_ratio: float | None = Field(5.0, gt=1)
    excess_norm: Literal["reject", "clip"] = "reject"
    max_examples_ratio: float | None = Field(10.0, gt=1)
    max_weight_ratio: float | None = Field(3.0, ge=1)


class EarlyStopOptions(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """When to end before `num_rounds`. The learning schedule is not shortened.

    Attributes:
        metric: of the shared model on the global test set.
        target: end after the first round in which it is at least this.
        max_wire_bytes: begin no round that would, if it moves what the last one did, bring all messages together
            above this. The final evaluation comes on top.
    """

    metric: str = Field("accuracy", min_length=1)
    target: float | None = None
    max_wire_bytes: int | None = Field(None, gt=0)


class ServerOptions(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Whom the server asks, what it waits for and how it counts.

    Attributes:
        aggregator: how uploads become one.
        fraction_train: share of the clients that trains in each round, in (0, 1].
        num_train: how many clients train in each round, instead of a share.
        min_available: clients that must be connected before a round begins; by default `num_clients` before the first
            and `min_replies` before the others. The run fails when they are not there within the connect timeout.
        min_replies: a round with fewer good replies is skipped.
        allow_single_reply: permits `min_replies: 1`. The aggregate of one reply is that client's update.
        num_attempts: how often a client whose reply failed is asked within one round.
        share_history: let clients that join late catch up by the chain of past broadcasts where that is smaller. It
            shows them every aggregate since the beginning, so by default they get the model as it is. With lora_kd
            there is no such model: what was said of public examples is what they need, and they always get it.
        max_resyncs_per_round: clients that may be sent again, in one round, what they were sent before; by default
            half of those that train. Each one waits twice as long as the time before.
        validation: what the server believes of a client.
        early_stop: when to end before `num_rounds`.
        max_skipped_rounds: skipped rounds in a row that end the run as failed. A run in which no round counted has
            failed, too, however short it is. A resumed run begins its count anew.
        bind_names: to whom a client's name belongs. "registered": to the public key that had it first, of nodes that
            were registered under a name (`fedkd deploy register`), which takes a SuperLink with node authentication;
            other nodes draw a new key at every start, and a name is theirs for as long as they are connected. "all":
            to the first key in any case, for a SuperLink whose keys were registered without names. "none": to no key.
        release_names: names that the next key to claim them gets; for a resumed run, when a node has lost its key.
        round_timeout_seconds: how long a round waits for replies.
        grace_seconds: how long a round, or the final evaluation, waits for the others once as many clients as a round
            needs (`min_replies`) have given a good reply; None: until all have answered, or the round timeout. Who is
            late then depends on the clock, so by default nobody is: the same seed gives the same bytes.
        connect_timeout_seconds: how long the server waits for clients before it gives up.
        keep_checkpoints: how many checkpoints stay on disk.
    """

    aggregator: AnyAggregation = FedAvgAggregation()
    fraction_train: float = Field(1.0, gt=0, le=1)
    num_train: int | None = Field(None, ge=1)
    min_available: int | None = Field(None, ge=1)
    min_replies: int = Field(2, ge=1)
    allow_single_reply: bool = False
    num_attempts: int = Field(1, ge=1, le=10)
    share_history: bool = False
    max_resyncs_per_round: int | None = Field(None, ge=0)
    validation: ValidationOptions = ValidationOptions()
    early_stop: EarlyStopOptions = EarlyStopOptions()
    max_skipped_rounds: int = Field(5, ge=1)
    bind_names: Literal["registered", "all", "none"] = "registered"
    release_names: tuple[str, ...] = ()
    round_timeout_seconds: float = Field(600.0, gt=0, le=MAX_TIMEOUT_SECONDS)
    grace_seconds: float | None = Field(None, ge=0, le=MAX_TIMEOUT_SECONDS)
    connect_timeout_seconds: float = Field(120.0, gt=0, le=MAX_TIMEOUT_SECONDS)
    keep_checkpoints: int = Field(2, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _mean_by_default(cls, raw: object) -> object:
        """Options of an aggregator without a name are the mean's."""
        if isinstance(raw, dict) and isinstance(options := raw.get("aggregator"), dict):
            return raw | {"aggregator": {"name": "fedavg"} | options}
        return raw

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_replies < 2 and not self.allow_single_reply:
            raise ValueError(
                "min_replies must be at least 2, got 1: the aggregate of one reply is that client's update; set "
                "allow_single_reply to true to permit it"
            )
        if self.num_train is not None and self.fraction_train != 1.0:
            raise ValueError("give either fraction_train or num_train, got both")
        return self

    def num_sampled(self, num_clients: int) -> int:
        """Clients that train in each round."""
        return self.num_train if self.num_train is not None else round(num_clients * self.fraction_train)

    def check_clients(self, num_clients: int) -> None:
        """Refuse what can't work with so many clients.

        Raises:
            ValueError: naming the key.
        """
        sampled = self.num_sampled(num_clients)
        if sampled < 1:
            raise ValueError(f"server.fraction_train: {self.fraction_train} of {num_clients} clients is none; raise it")
        if sampled > num_clients:
            raise ValueError(f"server.num_train must be at most num_clients, {num_clients}, got {sampled}")
        if sampled < self.min_replies:
            raise ValueError(
                f"server.min_replies must be at most the {sampled} clients that train in a round, "
                f"got {self.min_replies}"
            )
        if self.min_available is not None and self.min_available < self.min_replies:
            raise ValueError(
                f"server.min_available must be at least min_replies, {self.min_replies}, got {self.min_available}"
            )
        if self.min_available is not None and self.min_available > num_clients:
            raise ValueError(
                f"server.min_available must be at most num_clients, {num_clients}, got {self.min_available}"
            )
        if sampled < self.aggregator.num_clients_needed:
            raise ValueError(
                f"server.aggregator: {self.aggregator.name} needs {self.aggregator.num_clients_needed} clients in a "
                f"round, {sampled} train; sample more or lower num_malicious_nodes"
            )
