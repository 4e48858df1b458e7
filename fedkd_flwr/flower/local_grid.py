"""A Grid in this process: the same apps and the same messages, without Ray, in seconds.

Every message goes through Flower's serialisation both ways, so nothing passes that would not pass a network, and no
value is shared between server and clients.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from traceback import format_exception
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

UserConfig = Mapping[str, bool | float | int | str]
ClientFunction = Callable[[Message, Context], Message]

_SERVER_NODE_ID = 1
_FIRST_CLIENT_NODE_ID = 1000


class LocalGrid(Grid):
    """Runs clients when their replies are pulled, one after the other, in the order of pushing.

    Args:
        client_app: what a node runs.
        node_configs: one for each node.
        run_config: Flower's.
    """

    def __init__(self, client_app: ClientFunction, node_configs: Iterable[UserConfig], run_config: UserConfig) -> None:
        self._client_app = client_app
        self._contexts = {
            node_id: Context(1, node_id, dict(node_config), RecordDict(), dict(run_config))
            for node_id, node_config in enumerate(node_configs, _FIRST_CLIENT_NODE_ID)
        }
        self._instructions: dict[str, Message] = {}
        self._num_messages = 0

    def set_run(self, run: Run) -> None:
        """There is one run."""

    @property
    def run(self) -> Run:
        """Not available here."""
        raise RuntimeError("an in-process grid has no run record")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages as they are now; a node that is not there gets an empty id, as Flower does it."""
        ids = []
        for message in messages:
            if message.metadata.dst_node_id not in self._contexts:
                ids.append("")
                continue
            self._num_messages += 1
            message_id = f"{self._num_messages:064x}"
            copy = through_the_wire(message)
            copy.metadata.__dict__["_message_id"] = message_id
            self._instructions[message_id] = copy
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Let the nodes work, and give their replies."""
        for message_id in sorted(message_ids):
            if (message := self._instructions.pop(message_id, None)) is not None:
                yield through_the_wire(self._handle(message))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, then pull."""
        return list(self.pull_messages(self.push_messages(messages)))

    def _handle(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        try:
            return self._client_app(message, context)
        except Exception as error:  # what Flower does with whatever a ClientApp raises
            reason = "".join(format_exception(error))
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def through_the_wire(message: Message) -> Message:
    """What arrives at the other end."""
    return message_from_proto(message_to_proto(message))


@contextmanager
def task_identity() -> Iterator[None]:
    """Let this process make messages, as Flower lets the processes that it starts.

    Flower has no public way to do it. The identity is global to the process: one in-process run at a time.
    """
    identity: Any = TaskIdentity
    names = ("_run_id", "_node_id", "_task_id")
    before = {name: getattr(identity, name) for name in names}
    for name in names:
        setattr(identity, name, _SERVER_NODE_ID)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(identity, name, value)
