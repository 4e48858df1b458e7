"""What a run will move, found out without running it.

One client trains its first round here, and its update is encoded as it would be; the messages around it are made and
counted like real ones. Later rounds differ: ranks change as training goes on and the energy rises.
"""

from dataclasses import dataclass

from flwr.app import Message

from fedkd_flwr.algorithms.base import Assignment
from fedkd_flwr.core.seeds import derive_seed
from fedkd_flwr.experiment import Experiment
from fedkd_flwr.flower.local_grid import task_identity
from fedkd_flwr.flower.records import TRAIN, Instruction, Reply
from fedkd_flwr.flower.runtime import runtime_of
from fedkd_flwr.flower.traffic import traffic_of
from fedkd_flwr.measure.summary import FLOAT_BYTES

KILOBYTE = 1e3


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes expected of one client in one round.

    Attributes:
        uplink_bytes: its reply, measured on a first update.
        downlink_bytes: its instruction with a broadcast of the same size.
        dense_bytes: one float32 copy of the teacher's trainable parameters, for comparison.
        num_clients: that train in a round.
        num_rounds: of the run.
    """

    uplink_bytes: int
    downlink_bytes: int
    dense_bytes: int
    num_clients: int
    num_rounds: int

    def describe(self) -> str:
        """One line for a person."""
        total = (self.uplink_bytes + self.downlink_bytes) * self.num_clients * self.num_rounds / KILOBYTE**2
        return (
            f"about {self.uplink_bytes / KILOBYTE:.1f} kB up and {self.downlink_bytes / KILOBYTE:.1f} kB down per "
            f"client and round (FedAvg of the teacher: {self.dense_bytes / KILOBYTE:.1f} kB each way), {total:.1f} MB "
            f"in {self.num_rounds} rounds of {self.num_clients} clients; measured on one client's first update"
        )


def forecast(experiment: Experiment) -> Forecast:
    """Train and encode one client's first round.

    Raises:
        ConfigError: if the experiment can't be built.
    """
    runtime = runtime_of(experiment)
    half = runtime.algorithm.client
    data = runtime.task.client_data(0)
    seed = derive_seed(experiment.seed, "forecast")
    trained = half.train(runtime.initial, half.initial_private(), data, Assignment(0.0, seed))
    scores = half.evaluate(runtime.initial, trained.private, data)
    payload: bytes | None = None
    if runtime.wires is not None and trained.upload is not None:
        uplink = runtime.wires.uplink
        payload, _ = uplink.encode(trained.upload, uplink.initial_state(), progress=0.0, seed=seed)
    instruction = Instruction("0" * 16, 1, 1, 1, bytes(32), 0.0, 1, 0, (payload,) if payload else ())
    reply = Reply(
        server_round=1,
        attempt=1,
        version=1,
        lineage=bytes(32),
        num_examples=len(data.train),
        num_test_examples=len(data.test),
        payload=payload,
        shared=scores.get("shared", {}),
        private=scores.get("private", {}),
        train=trained.metrics,
        seconds=dict.fromkeys(("evaluate", "client_train", "encode", "decode"), 0.0),
    )
    with task_identity():
        down = Message(instruction.to_records(), 1, TRAIN)
        up = Message(reply.to_records(), reply_to=down)
    return Forecast(
        uplink_bytes=traffic_of(up, "uplink").wire_bytes,
        downlink_bytes=traffic_of(down, "downlink").wire_bytes,
        dense_bytes=FLOAT_BYTES * runtime.algorithm.num_teacher_parameters,
        num_clients=experiment.num_sampled,
        num_rounds=experiment.num_rounds,
    )
