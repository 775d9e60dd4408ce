from typing import Any

import pytest
from pydantic import ValidationError

from raysl.evaluate.finetune import FinetuneConfig


class TestFinetuneConfig:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"label_fraction": 0.0},
            {"label_fraction": 1.5},
            {"head_layers": -1},
            {"epochs": 0},
            {"batch_size": 1},
            {"sgd_momentum": 0.0},
            {"min_scale": 0.0},
        ],
    )
    def test_refuses_what_makes_no_sense(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            FinetuneConfig(**wrong)

    def test_a_dump_loads_again(self) -> None:
        config = FinetuneConfig(label_fraction=0.01, head_layers=1, epochs=60)
        assert FinetuneConfig.model_validate(config.model_dump()) == config
