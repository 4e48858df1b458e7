"""FedKD by the equations of its paper and nothing else, to compare with.

Wu et al., "Communication-efficient federated learning via knowledge distillation", Nature Communications 13:2032
(2022), https://doi.org/10.1038/s41467-022-29763-x, equations 1 to 7. The paper's compressor is `svd` with energy_start
and energy_end; its mean over clients is uniform, which is the default of `server.aggregator`.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from fedkd_flwr.algorithms.base import Algorithm, AlgorithmOptions, Baseline
from fedkd_flwr.algorithms.fedkd import FedKDOptions
from fedkd_flwr.algorithms.guidance import Wanted
from fedkd_flwr.algorithms.loop import LocalTraining, OptimizerOptions
from fedkd_flwr.core.protocols import Task

SMALLEST_DIVISOR = 1e-8  # the paper divides by a sum of losses, which float32 may round to 0


class FedKDPaperOptions(AlgorithmOptions):
    """Options of FedKD as published: what the paper leaves open. See `FedKDOptions`, whose other options are fixed.

    The divisor has no floor, every term counts in full from the first step on, and the teacher predicts. What the paper
    does not say is read strictly: each model gets the gradient of its own loss, and the other one and the divisor are
    constants in it.

    Attributes:
        hidden: MSE between mapped hidden states. auto: "if available".
        attention: MSE between attention maps, likewise.
        layer_map: teacher layer for each student layer, counted from 1; null spreads them evenly.
        local: how a client trains in a round.
        student_optimizer: the student's; its moments begin afresh in each round.
        teacher_optimizer: the teacher's and W_h's.
    """

    weighs_by_examples: ClassVar[bool] = False
    name: Literal["fedkd_paper"] = "fedkd_paper"
    hidden: Wanted = "auto"
    attention: Wanted = "auto"
    layer_map: tuple[int, ...] | None = None
    local: LocalTraining = LocalTraining()
    student_optimizer: OptimizerOptions = OptimizerOptions()
    teacher_optimizer: OptimizerOptions = OptimizerOptions()

    def build(self, task: Task, seed: int) -> Algorithm:
        """FedKD between the task's teachers and its student.

        Raises:
            ValueError: if the layers can't be mapped, or a term asks for what the models don't return.
        """
        return self.spelt_out().build(task, seed)

    def baselines(self) -> Sequence[Baseline]:
        """Those of FedKD."""
        return self.spelt_out().baselines()

    def spelt_out(self) -> FedKDOptions:
        """The same as options of FedKD, none of them left to a default."""
        return FedKDOptions(
            mutual=True,
            hidden=self.hidden,
            attention=self.attention,
            adaptive=True,
            temperature=1.0,
            divisor_floor=SMALLEST_DIVISOR,
            layer_map=self.layer_map,
            hidden_warmup_rounds=0,
            trust="all",
            student_guidance=1.0,
            teacher_guidance=1.0,
            guide_warmup=0.0,
            logit_adjustment=0.0,
            proximal_mu=0.0,
            teacher_anchor=0.0,
            predict_with="teacher",
            local=self.local,
            student_optimizer=self.student_optimizer,
            teacher_optimizer=self.teacher_optimizer,
            keep_student_moments=False,
            keep_teacher_moments=True,
        )
