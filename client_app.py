"""Flower ClientApp: each message to the client's end of the exchange."""

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedkd_flwr.flower import client

APP_DIR = Path(__file__).resolve().parent

app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Say who this is."""
    return client.hello(message, context, APP_DIR)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train for one round."""
    return client.train(message, context, APP_DIR)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score at the end."""
    return client.evaluate(message, context, APP_DIR)
