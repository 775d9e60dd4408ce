"""Write the networks of a run: its encoder, its projection head, its classifier."""

from typing import Any

from raysl.encoder.file import save_encoder
from raysl.methods.base import Method
from raysl.nn.classifier import save_classifier, save_head
from raysl.run.build import describe
from raysl.run.recipe import RunConfig
from raysl.track.run_folder import RunFolder


def save_networks(folder: RunFolder, method: Method, config: RunConfig[Any]) -> None:
    """Write each network of a finished run to its own file in the run folder.

    Args:
        folder: The run folder.
        method: The trained method.
        config: The run.
    """
    description = describe(config)
    save_encoder(folder.encoder, method.encoder, description=description)
    if method.projection_head is not None:
        save_head(folder.projection_head, method.projection_head, description=description)
    if method.label_classifier is not None:
        save_classifier(folder.classifier, method.label_classifier, description=description)
