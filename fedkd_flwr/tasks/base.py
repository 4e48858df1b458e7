"""What tasks share: options, several teachers, examples in memory, data of clients, a student's first tensors."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from fedkd_flwr.core.modules import not_finite
from fedkd_flwr.core.protocols import (
    Batch,
    ClientData,
    CommonAnswer,
    DataReport,
    Examples,
    PublicExamples,
    Task,
)
from fedkd_flwr.tasks.partition import NaturalPartition, OwnPartition, Rows, WholePartition, largest_class
from fedkd_flwr.tasks.table import ClientRows


class TaskOptions(BaseModel, ABC, extra="forbid", frozen=True, allow_inf_nan=False):
    """Options of one task, `name` first. They build the task for a number of clients."""

    name: str

    @abstractmethod
    def build(self, num_clients: int, seed: int) -> Task:
        """The task, its data divided among `num_clients`.

        Raises:
            ValueError: if the data can't be divided so; the message starts with the key to change.
        """

    def loaded_width(self, model: Literal["teacher", "student"]) -> Callable[[], int] | None:
        """Gives the width of a model's hidden states where its weights are loaded; None where they are drawn."""
        return None

    def at_node(self, data_path: Path) -> Self:
        """The same task over data of a node's own.

        Args:
            data_path: the folder or file that it is in.

        Raises:
            ValueError: if the task can't take its data from there, or leaves open what must be the same on all nodes.
        """
        raise ValueError(f"task.name: {self.name} has its own data; leave data-path out of the node's configuration")


class ClientsTeacher(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Another teacher for some clients. Attributes: `clients`, their partition numbers; `model`, the teacher."""

    clients: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    model: Any


class ModelsOptions(TaskOptions):
    """Options of tasks whose models the user chooses; each task says of what kinds they can be.

    Attributes:
        teacher: the large model.
        student: the small one.
        other_teachers: for clients that hold another teacher than the rest.
        freeze_embeddings: whether the embeddings of every Hugging Face model stay as they are; then they are not
            exchanged.
        data: where the examples come from.
        partition: how those to train on are divided.
        public: examples that every node has, for algorithms that ask what models say of them; null: none.
    """

    teacher: Any
    student: Any
    other_teachers: tuple[ClientsTeacher, ...] = ()
    freeze_embeddings: bool = False
    data: Any = None
    partition: Any = None
    public: Any = None

    def loaded_width(self, model: Literal["teacher", "student"]) -> Callable[[], int] | None:
        """As `TaskOptions.loaded_width`; a student that is cut from its teacher has the teacher's weights."""
        is_cut = getattr(self.student, "name", None) == "layers"
        options = self.teacher if model == "teacher" or is_cut else self.student
        return options.width if getattr(options, "source", None) is not None else None

    @model_validator(mode="after")
    def _nodes_agree(self) -> Self:
        if isinstance(self.partition, OwnPartition):
            self.require_agreement()
        return self

    def require_agreement(self) -> None:
        """Check that nothing is left to the data that must be the same wherever it lies.

        Raises:
            ValueError: naming an option that is not set.
        """
        for name in ("label_names", "image_size"):
            if getattr(self, name, ...) is None:
                raise ValueError(
                    f"{name} is required where nodes bring their own data, so that it is the same on all of them"
                )
        if self.public is not None and self.public.source is None:
            raise ValueError(
                "public.source is required where nodes bring their own data, so that it is the same on all of them"
            )

    def at_node(self, data_path: Path) -> Self:
        """The same task over data of a node's own; see `TaskOptions.at_node`."""
        if self.data is None:
            return super().at_node(data_path)
        self.require_agreement()
        natural = isinstance(self.partition, NaturalPartition)
        whole = WholePartition(group_column=self.partition.column if natural and self.partition.grouped else None)
        return self.model_copy(update={"data": self.data.at(data_path), "partition": whole})

    @model_validator(mode="after")
    def _each_client_has_one_teacher(self) -> Self:
        named = [client for other in self.other_teachers for client in other.clients]
        if twice := sorted({client for client in named if named.count(client) > 1}):
            raise ValueError(f"other_teachers names client {twice[0]} twice; give each client one teacher")
        return self

    def teacher_of(self, client: int) -> int:
        """Which teacher a client has; see `ClientData.teacher`."""
        return next((n for n, other in enumerate(self.other_teachers, 1) if client in other.clients), 0)

    def check_clients(self, num_clients: int) -> None:
        """Check the clients that `other_teachers` names.

        Raises:
            ValueError: if there is no such client.
        """
        for other in self.other_teachers:
            if max(other.clients) >= num_clients:
                raise ValueError(
                    f"task.other_teachers: clients must be in [0, {num_clients - 1}], got {max(other.clients)}"
                )


class TensorExamples:
    """Examples held in memory: one tensor for each model input, first axis the examples.

    Args:
        tensors: by name of the input.
        join_last: let a last batch of a single example join the one before it, for models that normalise over a batch.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, join_last: bool = False) -> None:
        self._tensors = dict(tensors)
        self._join_last = join_last
        self._length = len(next(iter(self._tensors.values())))

    def __len__(self) -> int:
        """Number of examples."""
        return self._length

    def batches(self, batch_size: int, seed: int | None = None) -> Iterator[Batch]:
        """All examples once, in batches; shuffled by `seed`, in order when it is None."""
        order = torch.arange(self._length)
        if seed is not None:
            order = torch.randperm(self._length, generator=torch.Generator().manual_seed(seed))
        parts = list(torch.split(order, batch_size))
        if self._join_last and len(parts) > 1 and len(parts[-1]) == 1:
            parts[-2:] = [torch.cat(parts[-2:])]
        for indices in parts:
            yield {name: tensor[indices] for name, tensor in self._tensors.items()}


class RecentClients:
    """Data of the clients last asked for: as many as fit in `limit` bytes, and always the newest.

    A process asks for a client's data with every message, and a simulation's processes serve all clients.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: OrderedDict[int, tuple[ClientData, int]] = OrderedDict()

    def get(self, client: int, make: Callable[[], tuple[ClientData, int]]) -> ClientData:
        """A client's data; `make` gives it with its size in bytes where it is not here."""
        if client not in self._kept:
            self._kept[client] = make()
        self._kept.move_to_end(client)
        while len(self._kept) > 1 and sum(size for _, size in self._kept.values()) > self._limit:
            self._kept.popitem(last=False)
        return self._kept[client][0]


class SizedExamples(Examples, Protocol):
    """Examples that know how much memory they hold."""

    @property
    def num_bytes(self) -> int:
        """Bytes of them that are in memory."""


class TableTask(ABC):
    """What tasks on the rows of a table share: examples made of a client's rows when they are first asked for.

    Args:
        options: of the task.
        rows: of the clients.
        usable_test: rows of the test split that can be used.
        limit: bytes of clients' examples that a process keeps.
    """

    counts_labels = True

    def __init__(self, options: ModelsOptions, rows: ClientRows, usable_test: Rows, limit: int) -> None:
        self._teacher_of = options.teacher_of
        self._rows = rows
        self._usable_test = usable_test
        self._clients = RecentClients(limit)

    def client_data(self, partition_id: int) -> ClientData:
        """Data of one client: its part of the training split, and its part of the test split or a share of the former.

        Raises:
            ValueError: if there is no such client, or an example can't be read after all.
        """
        return self._clients.get(partition_id, lambda: self._client_data(partition_id))

    def test_data(self) -> Examples:
        """The whole test split."""
        return self._test_data

    def public_examples(self) -> PublicExamples | None:
        """Those that every node has, where the experiment names any; a task with an option for it has them."""
        return None

    def common_answer(self) -> CommonAnswer | None:
        """The largest class of the training split, where labels are classes; see `HasCommonAnswer`."""
        return largest_class(self.data_report()) if self.counts_labels else None

    @abstractmethod
    def data_report(self) -> DataReport:
        """How the labels lie among the clients, and what was left out."""

    @abstractmethod
    def _examples(self, split: Literal["train", "test"], rows: Rows) -> SizedExamples:
        """Some rows of a split."""

    def _label_counts(self, rows: Rows) -> tuple[int, ...] | None:
        """Labels of each class in some rows of the training split; None where labels are no classes."""
        return None

    def _rows_of(self, client: int) -> tuple[Rows, Rows]:
        """Rows that a client learns from and rows that it scores on; see `ClientRows.of`."""
        return self._rows.of(client)

    def _client_data(self, client: int) -> tuple[ClientData, int]:
        train, test = self._rows_of(client)
        learns = self._examples("train", train)
        scores = self._examples("test" if self._rows.scores_on_test(client) else "train", test)
        data = ClientData(learns, scores, self._teacher_of(client), self._label_counts(train), client)
        return data, learns.num_bytes + scores.num_bytes

    @cached_property
    def _test_data(self) -> SizedExamples:
        return self._examples("test", self._usable_test)


def copy_shared_tensors(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the values of every tensor that `source` has under the same name and shape.

    A student with fewer layers than its teacher thus becomes the teacher's first layers, embeddings and head.
    """
    values = source.state_dict()
    matching = {n: values[n] for n, t in target.state_dict().items() if n in values and values[n].shape == t.shape}
    target.load_state_dict(matching, strict=False)


def save_pretrained(model: nn.Module, directory: Path) -> None:
    """Write a Hugging Face model's directory, without the library's progress bar."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(directory)  # type: ignore[operator]


def require_finite(module: nn.Module, directory: Path) -> None:
    """Check numbers that were read from a directory.

    Raises:
        ValueError: naming the first tensor that holds others than finite ones.
    """
    if (name := not_finite(module)) is not None:
        raise ValueError(f"{str(directory)!r} holds numbers that are not finite in {name!r}; take another checkpoint")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's progress bars, and without its report of the head that a checkpoint does not have."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
