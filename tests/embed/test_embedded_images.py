"""The images of embeddings, opened again, and what is searched for with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from raysl.embed.config import EmbedConfig
from raysl.embed.embeddings import Embeddings
from raysl.embed.images import embed_config, open_queries, reopen_source
from raysl.embed.shards import embeddings_folder
from raysl.embed.source import other_decoding
from raysl.sources.open import open_source
from raysl.sources.pixels import PLAIN, Bits, Percentiles
from raysl.sources.source import DataConfig


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    cv2.imwrite(str(tmp_path / "photos" / "1.png"), np.zeros((8, 8, 3), np.uint8))
    return tmp_path / "photos" / "1.png"


@pytest.mark.parametrize(
    "pixels",
    [
        {},
        {"intensity": (0.0, 4095.0), "color_profile": "ignore"},
        {"intensity": Bits(bits=12)},
        {"intensity": Percentiles(percentile=(1.0, 99.0)), "pages": "first"},
    ],
)
def test_queries_are_decoded_as_the_embeddings_were(
    image: Path, write_embeddings: Callable[..., Embeddings], pixels: dict[str, Any]
) -> None:
    config = EmbedConfig(source=str(image.parent), **pixels, filter=(("bytes", ">", 1),))
    source = open_source(config, data=DataConfig(source=config.source))
    out = image.parents[1] / "out"
    write_embeddings(out, np.ones((1, 4), np.float32))
    about = {
        "embed_dim": 4,
        "images": 1,
        "source": config.source,
        "settings": json.loads(config.model_dump_json()),
        "wanted": {"fingerprint": source.fingerprint},
    }
    embeddings_folder(str(out)).write_claim(about)
    embeddings = Embeddings(str(out))
    assert embed_config(embeddings) == config
    assert reopen_source(embeddings).decoding(0) == config.decoding()
    queries, _ = open_queries(str(image), decoding=embed_config(embeddings).decoding())
    assert queries.decoding(0) == config.decoding()
    assert open_queries(str(image))[0].decoding(0) == PLAIN


def test_other_pixels_than_the_encoder_knows_are_told(tiny_encoder: Callable[..., Path]) -> None:
    bits = EmbedConfig(source="a", intensity=Bits(bits=12))
    known = {"intensity": {"bits": 12}, "color_profile": "convert", "pages": "refuse"}
    encoder = tiny_encoder("told", decoding=known)
    assert other_decoding(encoder, bits) == []
    (line,) = other_decoding(encoder, EmbedConfig(source="a"))
    assert line.startswith('intensity=null here, but the encoder was trained with intensity={"bits')
    assert other_decoding(tiny_encoder("not told"), bits) == []
