"""From a round's uploads to the next version, which is taken only if the server's own scores of it are numbers."""

from collections.abc import Mapping
from time import perf_counter

from fedkd_flwr.algorithms.base import Assignment, LearningServer, Metrics
from fedkd_flwr.core.arrays import Array, Arrays
from fedkd_flwr.core.protocols import Examples
from fedkd_flwr.core.seeds import derive_seed
from fedkd_flwr.flower.archive import Archive
from fedkd_flwr.flower.merger import Merger
from fedkd_flwr.flower.reference import Reference
from fedkd_flwr.flower.replies import reason_of
from fedkd_flwr.flower.round import Round
from fedkd_flwr.flower.runtime import Runtime
from fedkd_flwr.flower.validation import require_finite_scores


class Advance:
    """Moves the reference, and the server's own model where the algorithm has one, and scores each version once.

    Args:
        runtime: the experiment.
        reference: what clients and server hold.
    """

    def __init__(self, runtime: Runtime, reference: Reference) -> None:
        self._runtime = runtime
        self._server = runtime.algorithm.server
        self._reference = reference
        self._test_data: Examples = runtime.task.test_data()
        self._scored: tuple[int, Metrics | None] | None = None  # the version that was scored last, and its scores
        if isinstance(self._server, LearningServer):
            self._server.begin()

    def take(self, merger: Merger, current: Round) -> None:
        """Go to the next version. Where this raises nothing has moved, on either end.

        Raises:
            ValueError: if there is no aggregate, or it leads to a version that can't be used.
        """
        seed = derive_seed(self._runtime.experiment.seed, "server", current.number)
        num_rounds = self._runtime.experiment.num_rounds
        assignment = Assignment.of_round(current.number, num_rounds, progress=current.progress, seed=seed)
        before = self._state(), self._scored
        try:
            started = perf_counter()
            aggregate = merger.result()
            broadcast = self._server.broadcast(aggregate, self._reference.shared, assignment)
            current.timed("aggregate", started)
            self._move(broadcast, assignment, current)
        except ValueError:
            merger.undo()
            learned, self._scored = before
            if isinstance(self._server, LearningServer):
                self._server.restore(learned)
            raise

    def _move(self, broadcast: Arrays, assignment: Assignment, current: Round) -> None:
        started, judged = perf_counter(), 0.0

        def judge(shared: Arrays) -> None:
            nonlocal judged
            since = perf_counter()
            try:
                if isinstance(self._server, LearningServer):
                    self._server.learn(shared, assignment)
                scores = self._score(shared, self._reference.version + 1, current)
            except Exception as error:  # what NaN does to a sampler or a metric is an error of any kind
                raise ValueError(f"the next version can't be scored, so it is not taken: {reason_of(error)}") from error
            require_finite_scores(scores)
            judged = perf_counter() - since

        seed = derive_seed(assignment.seed, "encode")
        current.payload_bytes = self._reference.advance(
            broadcast, progress=assignment.progress, seed=seed, approve=judge
        )
        current.spent({"encode": perf_counter() - started - judged})

    def scores(self, current: Round) -> Metrics | None:
        """Of the version as it is, on the server's test set; None where nothing is shared.

        Args:
            current: whose time it takes, where that version has not been scored yet.
        """
        return self._score(self._reference.shared, self._reference.version, current)

    def _score(self, shared: Arrays, version: int, current: Round) -> Metrics | None:
        if self._scored is None or self._scored[0] != version:
            started = perf_counter()
            self._scored = version, self._server.evaluate(shared, self._test_data)
            current.timed("evaluate", started)
        return self._scored[1]

    def saved(self) -> dict[str, Archive]:
        """For a checkpoint: the part that holds the server's own model, where there is one."""
        return {"server half": Archive({}, self._state())} if isinstance(self._server, LearningServer) else {}

    def restore(self, parts: Mapping[str, Archive], scores: Metrics | None) -> None:
        """Go on from a checkpoint.

        Args:
            parts: of the checkpoint.
            scores: of the reference's version.
        """
        if isinstance(self._server, LearningServer):
            self._server.restore(parts["server half"].arrays)
        self._scored = self._reference.version, scores

    def _state(self) -> dict[str, Array]:
        return dict(self._server.state()) if isinstance(self._server, LearningServer) else {}
