"""Open the images of a sweep once for all trials, and check that they have not changed."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from raysl.config.load import read_mapping
from raysl.config.yaml_text import to_yaml
from raysl.errors import RunFolderError
from raysl.evaluate.training_source import open_training_source
from raysl.folder.whole import read_json, write_text
from raysl.report.terminal import say, say_notes
from raysl.run.check import check_lengths, check_names, check_start
from raysl.run.places import read_run, with_absolute_files, with_absolute_sources
from raysl.run.recipe import RunConfig
from raysl.run.source_record import is_same, record_source, source_facts, what_changed
from raysl.sources.source import Source
from raysl.sources.subset import whole_source
from raysl.sweep.config import IF_CHANGED
from raysl.sweep.ray_trial import source_key
from raysl.track.run_folder import RunFolder, working_folder


class Sources:
    """The training images of a sweep's runs; equal configurations share one open source."""

    def __init__(self) -> None:
        self.opened: dict[str, Source] = {}
        self._checked: set[str] = set()

    def of(self, config: RunConfig[Any]) -> Source:
        """Return the training images of a run."""
        config = with_absolute_sources(config)
        key = source_key(config)
        if key not in self.opened:
            self.opened[key] = open_training_source(config.data, config.evaluate, config.method)
        return self.opened[key]

    def check(self, config: RunConfig[Any]) -> None:
        """Check that a run can start on its images; networks of equal shapes are built once.

        Raises:
            RayslError: If it cannot start.
        """
        check_names(config)
        config = with_absolute_files(config, working_folder())
        source = self.of(config)
        check_lengths(config, source)
        shape = _shape_of(config)
        if shape not in self._checked:
            check_start(config, source)
            self._checked.add(shape)

    def say_notes(self) -> None:
        """Print the notes of each source once."""
        wholes = {whole.fingerprint: whole for whole in map(whole_source, self.opened.values())}
        for whole in wholes.values():
            say_notes(whole, title=f"{whole.name}:")

    def check_unchanged(
        self,
        unfinished: Iterable[RunFolder],
        ended: Iterable[RunFolder],
        settings: Mapping[str, Any],
    ) -> None:
        """Check that the images have not changed since the sweep began, before trials resume.

        Args:
            unfinished: Folders of the trials to start or resume. Their configurations are updated:
                paths of images become absolute, ``data.if_changed`` is the current setting.
            ended: Folders of the ended trials, whose images are compared with the current ones.
            settings: The sweep's section ``set``.

        Raises:
            RunFolderError: If the images have changed.
        """
        unfinished = list(unfinished)
        if not unfinished:
            return
        policy = settings.get(IF_CHANGED, "stop")
        if policy == "stop":
            self._check_ended(ended)
        printed: set[str] = set()
        for folder in unfinished:
            config = read_run(folder)
            data = config.data.model_copy(update={"if_changed": policy})
            config = config.model_copy(update={"data": data})
            values = config.model_dump(mode="json")
            if values != read_mapping(folder.config):
                write_text(folder.config, to_yaml(values))
            lines = record_source(folder, self.of(config), config)
            for line in lines:
                if line not in printed:
                    say(f"trial {folder.path.name}: {line}" if line == lines[0] else line)
            printed |= set(lines)

    def _check_ended(self, ended: Iterable[RunFolder]) -> None:
        for folder in ended:
            record = read_json(folder.source)
            if record is None:
                continue
            facts = source_facts(self.of(read_run(folder)))
            if not is_same(record, facts):
                changed = "\n  ".join(what_changed(record, facts))
                raise RunFolderError(
                    f"{folder.path}: the images have changed since this trial ended:\n  {changed}\n"
                    f"The unfinished trials would not be comparable with it: restore the images, "
                    f"give the sweep another name=..., or set {IF_CHANGED}=go_on to continue with "
                    f"the current images"
                )


def _shape_of(config: RunConfig[Any]) -> str:
    """Return a key that is equal for runs whose networks have the same shapes and images.

    It leaves out float settings of the method, which do not change shapes.
    """
    method = config.method.model_dump(mode="json")
    return json.dumps(
        {
            "method": {key: v for key, v in method.items() if not isinstance(v, float)},
            "sizes": [config.view_sizes_px, config.optim.name, config.train.micro_batch_size],
            "batch": [config.train.global_batch_size, config.worker_counts],
            **config.model_dump(mode="json", include={"backbone", "evaluate"}),
            "source": source_key(config),
        }
    )
