import logging

import numpy as np
import pytest
import torch

from fedkd_flwr.algorithms.fedkd import FedKDOptions
from fedkd_flwr.algorithms.guidance import Guidance, Wanted, find_guidance, projections_of
from fedkd_flwr.core.protocols import Models
from tests.algorithms.conftest import SEED
from tests.algorithms.little import Little, Net


def between(
    teacher: Net,
    student: Net,
    hidden: Wanted = "auto",
    attention: Wanted = "auto",
    layers: tuple[int, ...] | None = None,
) -> Guidance:
    little = Little(teachers=(teacher,), student=student)
    models: Models = little.build_models(SEED)
    return find_guidance(little, models.teacher, models.student, hidden, attention, layers)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "fedkd"]


def test_by_itself_everything_is_compared_that_can_be(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fedkd"):
        found = between(Net(num_layers=4, width=6), Net(num_layers=2, width=4))
    assert found == Guidance(True, True, (2, 4), ((4, 6), (4, 6)))
    assert not found.same_width
    assert lines(caplog) == []


@pytest.mark.parametrize(
    ("teacher", "student", "who"),
    [
        (Net(hidden=False), Net(), "the teacher returns"),
        (Net(), Net(hidden=False), "the student returns"),
        (Net(hidden=False), Net(hidden=False), "these models return"),
    ],
)
def test_what_a_model_does_not_return_is_off_with_a_line_that_says_why(
    teacher: Net, student: Net, who: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="fedkd"):
        found = between(teacher, student)
    assert (found.hidden, found.attention, found.layers, found.widths) == (False, True, (1, 2), ())
    assert lines(caplog) == [f"algorithm.hidden is off: {who} no hidden states"]


def test_models_that_return_nothing_leave_the_outputs_to_learn_from(caplog: pytest.LogCaptureFixture) -> None:
    blank = Net(num_layers=3, hidden=False, attention=False)
    with caplog.at_level(logging.WARNING, logger="fedkd"):
        # Their layers need no map then.
        assert between(blank, Net(num_layers=2, hidden=False, attention=False)) == Guidance()
    assert len(lines(caplog)) == 2


def test_other_numbers_of_tokens_turn_both_terms_off(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fedkd"):
        assert between(Net(), Net(num_layers=1, stride=2)) == Guidance()
    assert lines(caplog) == [
        "algorithm.hidden is off: hidden states of teacher and student are not of the same tokens, their shapes are "
        "[1, 6, 4] and [1, 3, 4]",
        "algorithm.attention is off: attention maps of teacher and student are not of the same tokens, their shapes "
        "are [1, 2, 6, 6] and [1, 2, 3, 3]",
    ]


def test_other_numbers_of_heads_do_not(caplog: pytest.LogCaptureFixture) -> None:
    assert between(Net(num_heads=3), Net()).attention


def test_a_term_that_is_off_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fedkd"):
        assert between(Net(hidden=False), Net(), hidden=False, attention=False) == Guidance()
        assert between(Net(hidden=False), Net(), hidden=False) == Guidance(False, True, (1, 2), ())
        assert between(Net(attention=False), Net(), attention=False).widths == ((4, 4), (4, 4))
    assert lines(caplog) == []


@pytest.mark.parametrize(
    ("teacher", "student", "key", "message"),
    [
        (Net(hidden=False), Net(), "hidden", "the teacher returns no hidden states; set hidden to auto or false"),
        (Net(), Net(attention=False), "attention", "the student returns no attention maps; set attention to auto or"),
        (Net(), Net(stride=3), "hidden", "hidden states of teacher and student are not of the same tokens"),
        (Net(stride=3), Net(), "attention", "attention maps of teacher and student are not of the same tokens"),
    ],
)
def test_a_term_that_is_asked_for_must_be_possible(teacher: Net, student: Net, key: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        between(teacher, student, **{key: True})  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"algorithm.{key}: {message}")


@pytest.mark.parametrize("wanted", [True, "auto"])
def test_layers_that_do_not_divide_evenly_ask_for_a_map_in_any_case(wanted: Wanted) -> None:
    with pytest.raises(ValueError, match=r"^algorithm\.layer_map: 3 teacher layers over 2 student layers"):
        between(Net(num_layers=3), Net(num_layers=2), hidden=wanted, attention=wanted)
    assert between(Net(num_layers=3), Net(num_layers=2), wanted, wanted, (1, 3)).layers == (1, 3)


def test_attention_maps_alone_are_mapped_without_hidden_states() -> None:
    found = between(Net(num_layers=4, hidden=False), Net(hidden=False), hidden=False, attention=True)
    assert found == Guidance(False, True, (2, 4), ())


def test_a_none_for_each_layer_is_nothing() -> None:
    class Nones(Little):
        def forward(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
            out = super().forward(*args, **kwargs)  # type: ignore[arg-type]
            object.__setattr__(out, "attentions", (None, None))
            return out

    little = Nones()
    models = little.build_models(SEED)
    found = find_guidance(little, models.teacher, models.student, "auto", "auto", None)  # type: ignore[arg-type]
    assert (found.hidden, found.attention) == (True, False)


def test_w_h_is_the_identity_between_equal_widths_and_drawn_from_the_seed_between_others() -> None:
    guidance = Guidance(True, False, (1, 2), ((4, 4), (4, 6)))
    torch.manual_seed(1)
    first = projections_of(guidance, 5)
    torch.manual_seed(2)
    again, other = projections_of(guidance, 5), projections_of(guidance, 6)
    assert first[0].weight.tolist() == np.eye(4).tolist()
    assert torch.equal(first[1].weight, again[1].weight)
    assert not torch.equal(first[1].weight, other[1].weight)


@pytest.mark.parametrize("value", [True, False, "auto"])
def test_the_options_take_yes_no_and_auto(value: Wanted) -> None:
    options = FedKDOptions(hidden=value, attention=value)
    assert options.model_dump(mode="json")["hidden"] == value
    assert FedKDOptions().hidden == "auto"


@pytest.mark.parametrize("value", ["sometimes", 2, None])
def test_the_options_take_nothing_else(value: object) -> None:
    with pytest.raises(ValueError, match="Input should be True, False or 'auto'"):
        FedKDOptions.model_validate({"hidden": value})
