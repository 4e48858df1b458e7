"""A grid that hands over replies as the objects that they travel as, in a deployment as here."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import Metadata, ObjectTree, PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import InflatableObject, get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.superlink.grid.http_grid import HttpGrid

from fedkd_flwr.flower.local_grid import LocalGrid

Answer = Callable[[Message], "Objects"]
_DIVIDER = b"\x00"  # between the head of an object and its body


@dataclass
class Objects:
    """One message as objects.

    Attributes:
        root: identifier of the message itself.
        contents: bytes of each object, by identifier. Whoever changes them leaves the identifiers as they are.
    """

    root: str
    contents: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, message: Message) -> "Objects":
        return cls(message.object_id, {key: item.deflate() for key, item in get_all_nested_objects(message).items()})

    def of_kind(self, kind: str) -> str:
        """Identifier of the first object of a kind."""
        return next(key for key, content in self.contents.items() if content.startswith(kind.encode() + b" "))

    def body(self, identifier: str) -> bytes:
        return self.contents[identifier].partition(_DIVIDER)[2]

    def set_body(self, identifier: str, body: bytes) -> None:
        """Another body, with a head that fits."""
        kind, children, _ = self.head(identifier)
        self.contents[identifier] = f"{kind} {children} {len(body)}".encode() + _DIVIDER + body

    def head(self, identifier: str) -> list[str]:
        return self.contents[identifier].partition(_DIVIDER)[0].decode().split(" ")

    def set_head(self, identifier: str, *parts: str) -> None:
        body = self.body(identifier)
        self.contents[identifier] = " ".join(parts).encode() + _DIVIDER + body

    def set_json(self, identifier: str, **values: object) -> None:
        """Change entries of a body that is JSON."""
        self.set_body(identifier, json.dumps(json.loads(self.body(identifier)) | values).encode())


class ObjectGrid(LocalGrid):
    """As Flower's grid of a deployment: what is pulled together is inflated together, or raises together.

    Args:
        answers: what each node answers; the first has the smallest id.
    """

    def __init__(self, answers: Iterable[Answer]) -> None:
        kept = list(answers)
        super().__init__(_unused, [{} for _ in kept], {})
        self._answers = dict(zip(self.get_node_ids(), kept, strict=True))
        self.num_pulled: list[int] = []  # of each pull that gave anything

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        asked = [self._instructions.pop(key) for key in sorted(message_ids) if key in self._instructions]
        if asked:
            self.num_pulled.append(len(asked))
        pulled: list[InflatableObject] = []
        for message in asked:
            objects = self._answers[message.metadata.dst_node_id](message)
            pulled.append(inflate_object_from_contents(objects.root, dict(objects.contents)))
            pulled[-1].metadata.__dict__["_message_id"] = objects.root  # type: ignore[attr-defined]
        return iter(pulled)  # type: ignore[arg-type]


class UploadGrid(ObjectGrid):
    """Flower's own grid of a deployment, before a SuperLink whose nodes have announced what they upload.

    Args:
        answers: what each node answers; an object without bytes is one that it has not uploaded.
    """

    def __init__(self, answers: Iterable[Answer]) -> None:
        super().__init__(answers)
        self._http = _http_grid(self)
        self._uploaded: dict[str, bytes] = {}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        return iter(self._http.pull_messages(message_ids))

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:
        found = PullAppMessagesResponse()
        for key in [key for key in request.message_ids if key in self._instructions]:
            asked = self._instructions.pop(key)
            objects = self._answers[asked.metadata.dst_node_id](asked)
            self._uploaded |= objects.contents
            metadata = Metadata(message_id=objects.root, reply_to_message_id=key)
            found.messages_list.append(MessageProto(metadata=metadata))
            parts = [ObjectTree(object_id=part) for part in objects.contents if part != objects.root]
            found.message_object_trees.append(ObjectTree(object_id=objects.root, children=parts))
        return found

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:
        content = self._uploaded[request.object_id]
        return PullObjectResponse(object_found=True, object_available=content != b"", object_content=content)

    def ConfirmMessageReceived(self, request: object) -> None:
        """It may be forgotten."""


def _http_grid(client: Any) -> HttpGrid:
    """Flower's grid, connected to a client that is given."""
    grid = HttpGrid(insecure=True, token="unused")
    grid._client, grid._run = client, Run.create_empty(1)
    return grid


def _unused(message: Message, context: Context) -> Message:
    raise AssertionError("answers are given as objects")


def answered(content: Callable[[], RecordDict], change: Callable[[Objects], None] = lambda _: None) -> Answer:
    """An answer with that content, whose objects are changed."""

    def answer(message: Message) -> Objects:
        objects = Objects.of(Message(content(), reply_to=message))
        change(objects)
        return objects

    return answer
