"""`flower-superlink` for one user: it answers nobody else on the machine.

A SuperLink on loopback asks for no credentials, and whoever can open a connection to it may start an app in it, as the
user who runs it. Flower has accounts only in an edition of its own. But whose the other end of a connection on
loopback is, the system says itself: Linux lists the user of every socket. So each request is looked up there, and what
does not come from the user whose SuperLink it is gets no answer but a refusal. No client has to know a secret.
"""

import os
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import uvicorn

from fedkd_flwr.flower.processes import LOOPBACK

PRIVATE_SUPERLINK = (sys.executable, "-m", "fedkd_flwr.flower.private_superlink")
# The SuperLink's older doors, which only some environments open, and which nobody guards.
CLOSED_DOORS = {"FLWR_INTERNAL_GRPC_CONTROL_API": "0", "FLWR_INTERNAL_GRPC_FLEET_API": "0"}
SOCKETS = Path("/proc/net/tcp")
_FORBIDDEN = 403

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Any, Send], Awaitable[None]]


def can_tell_users_apart() -> bool:
    """Whether this system says whose a connection on loopback is, tried on one."""
    try:
        with socket.create_server((LOOPBACK, 0)) as server, socket.create_connection(server.getsockname()) as client:
            return _user_of(client.getsockname(), server.getsockname()) == os.getuid()
    except OSError:
        return False


class OneUser:
    """An ASGI application that serves one user of this machine.

    Args:
        application: what is served.
        user_id: the user.
    """

    def __init__(self, application: Application, user_id: int) -> None:
        self._application = application
        self._user_id = user_id

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] == "lifespan" or _user_of(scope.get("client"), scope.get("server")) == self._user_id:
            await self._application(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": _FORBIDDEN, "headers": headers})
            await send({"type": "http.response.body", "body": b"this SuperLink serves another user\n"})
        else:
            await send({"type": "websocket.close"})


def _user_of(client: object, server: object) -> int | None:
    """User id of the client's end of a connection; None where the system does not know it."""
    try:
        ends = [_as_listed(*client), _as_listed(*server)]  # type: ignore[misc]
    except (OSError, TypeError, ValueError):
        return None
    for line in SOCKETS.read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1:3] == ends:
            return int(fields[7])
    return None


def _as_listed(host: str, port: int) -> str:
    """An address as the list of sockets has it: the bytes of IPv4 in the machine's own order."""
    number = int.from_bytes(socket.inet_aton(host), sys.byteorder)
    return f"{number:08X}:{port:04X}"


def main() -> None:
    """Run `flower-superlink` with its own arguments, for whoever runs it."""
    from flwr.superlink.cli import flower_superlink  # seconds to import

    serve = uvicorn.run

    def serve_one_user(app: Any, **options: Any) -> None:
        # What a request says of where it comes from is not believed.
        serve(OneUser(app, os.getuid()), **(options | {"proxy_headers": False}))

    uvicorn.run = serve_one_user
    flower_superlink()


if __name__ == "__main__":
    main()
