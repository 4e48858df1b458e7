"""`fedkd deploy ...`: keys and certificates for machines of your own, and who may come in."""

from pathlib import Path
from typing import Annotated

import typer

from fedkd_flwr.console import Terminal
from fedkd_flwr.experiment import ConfigError
from fedkd_flwr.flower.certificates import CA_DAYS, make_certificates, make_node_key
from fedkd_flwr.flower.commands import Commands, add_connection, require_connection
from fedkd_flwr.flower.errors import RunError
from fedkd_flwr.flower.settings import flower_home

deploy = typer.Typer(invoke_without_command=True)
out = Terminal()


@deploy.command()
def certificates(
    directory: Annotated[Path, typer.Argument(help="for ca.crt, ca.key, server.crt, server.key, superexec.secret")],
    hosts: Annotated[list[str], typer.Option("--host", help="name or address by which nodes call the server; repeat")],
    days: Annotated[int, typer.Option("--days", min=1, max=CA_DAYS, help="validity of the server's certificate")] = 365,
) -> None:
    """Make a SuperLink's certificate, and the authority that signs it unless there is one in that directory."""
    make_certificates(directory, hosts, days)
    out.print(f"certificates: {directory}", highlight=False, markup=False, soft_wrap=True)


@deploy.command()
def node_key(file: Annotated[Path, typer.Argument(help="for the private key; the public one is FILE.pub")]) -> None:
    """Make the key of one SuperNode, best on that node: only FILE.pub has to leave it."""
    out.print(f"public key: {make_node_key(file)}", highlight=False, markup=False, soft_wrap=True)


@deploy.command()
def connection(
    name: Annotated[str, typer.Argument(help="name for the SuperLink in Flower's commands")],
    address: Annotated[str, typer.Argument(help="host:port of the SuperLink")],
    ca: Annotated[Path, typer.Argument(help="ca.crt of the authority that signed its certificate")],
) -> None:
    """Tell Flower's commands of this user where the SuperLink is."""
    if not ca.is_file():
        raise ConfigError(f"{str(ca)!r} does not exist; give the ca.crt of the SuperLink's authority")
    file = add_connection(flower_home(), name, address, ca)
    out.print(f"connection {name}: {file}", highlight=False, markup=False, soft_wrap=True)


@deploy.command()
def register(
    name: Annotated[str, typer.Argument(help="the SuperLink's connection")],
    keys: Annotated[list[Path], typer.Argument(help="public keys of nodes, before those are started")],
) -> None:
    """Let nodes in: each key is registered under the name of its file."""
    if missing := [key for key in keys if not key.is_file()]:
        raise ConfigError(f"{str(missing[0])!r} does not exist; give the .pub file of a node's key")
    require_connection(flower_home(), name)
    flower = Commands(flower_home(), name)
    refused = []
    for key in keys:
        try:
            said = f"node {flower.register(key.resolve(), key.stem)}"
        except RunError as error:
            refused.append(key.stem)
            said = str(error)
        out.print(f"{key.stem}: {said}", highlight=False, markup=False, soft_wrap=True)
    if refused:
        raise RunError(f"{len(refused)} of {len(keys)} were not registered: {', '.join(refused)}")
