import pytest

from raysl.report.measure import duration_text, measure, number_text, short_names, value_text


class TestMeasure:
    def test_an_accuracy_is_shown_in_percent(self) -> None:
        shown = measure("eval/knn_top1")
        assert shown.title == "Nearest-neighbour accuracy, %"
        assert shown.text(0.91234) == "91.2"
        assert measure("final/finetune_top1").title == "Accuracy after fine-tuning, %"

    def test_a_metric_of_a_method_has_its_section_and_name(self) -> None:
        shown = measure("moco/queue_age")
        assert (shown.title, shown.scale) == ("moco: queue age", 1.0)
        assert shown.text(-2.34567) == "-2.346"

    def test_an_unknown_share_or_accuracy_is_percent_too(self) -> None:
        assert measure("final/untrained_few_shot_top1").title == "final: untrained few shot, %"
        assert measure("swav/used_share").text(0.5) == "50.0"


class TestShortNames:
    def test_is_the_last_part_in_words(self) -> None:
        keys = ["method.temperature", "train.global_batch_size", "config"]
        assert list(short_names(keys).values()) == ["temperature", "global batch size", "config"]

    def test_two_that_share_their_last_part_get_more_of_it(self) -> None:
        keys = ["optim.base_lr", "adversary_optim.base_lr", "train.epochs"]
        names = list(short_names(keys).values())
        assert names == ["optim base lr", "adversary optim base lr", "epochs"]

    def test_what_is_chosen_by_name_is_called_by_its_section(self) -> None:
        assert short_names(["backbone.name", "method.name"]) == {
            "backbone.name": "backbone",
            "method.name": "method",
        }


@pytest.mark.parametrize(
    ("value", "text"),
    [(65536, "65,536"), (0.034712, "0.03471"), (True, "true"), (None, "none"), ("a_b", "a_b")],
)
def test_a_value_is_short_and_as_in_a_configuration(value: object, text: str) -> None:
    assert value_text(value) == text


def test_numbers_keep_what_tells_them_apart() -> None:
    texts = [number_text(value) for value in (0.99, 0.999, 1e-5, 999.94, 12345.6)]
    assert texts == ["0.99", "0.999", "1e-05", "999.9", "12,346"]


def test_times_have_the_unit_that_suits_them() -> None:
    assert [duration_text(s) for s in (1.25, 119, 180, 7199, 9000)] == [
        "1.2 s",
        "119.0 s",
        "3 min",
        "120 min",
        "2.5 h",
    ]
