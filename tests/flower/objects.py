"""A grid that hands over replies as the objects that they travel as, in a deployment as here."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from flwr.app import Context, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import InflatableObject, get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

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


def _unused(message: Message, context: Context) -> Message:
    raise AssertionError("answers are given as objects")


def answered(content: Callable[[], RecordDict], change: Callable[[Objects], None] = lambda _: None) -> Answer:
    """An answer with that content, whose objects are changed."""

    def answer(message: Message) -> Objects:
        objects = Objects.of(Message(content(), reply_to=message))
        change(objects)
        return objects

    return answer
