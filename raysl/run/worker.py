"""Pretrain as one worker: build, resume, train, evaluate, write the encoder."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysl.data.decode import Flaw
from raysl.data.flaw import reason_of
from raysl.evaluate.features import EvalImages, embed
from raysl.evaluate.protocol import LabelledSets, facts_of, measure_probes, protocol_texts
from raysl.evaluate.training_source import labels_record
from raysl.folder.whole import appears_whole, disk_errors_named, write_json
from raysl.methods.base import Progress
from raysl.nn.backbones import Backbone
from raysl.nn.batchnorm import average_statistics
from raysl.nn.collectives import barrier, gather_objects, rank_and_size
from raysl.run.build import (
    build_method,
    build_optimizers,
    build_trainer,
    save_networks,
    schedule_of,
    views_on,
)
from raysl.run.checkpoints import Checkpoints
from raysl.run.classify import ClassifierEvaluation
from raysl.run.labelled_sets import open_sets
from raysl.run.measuring import Measuring, Place
from raysl.run.method_pictures import write_method_pictures
from raysl.run.online import EvaluationStarter
from raysl.run.protocol_runs import protocols_to_train
from raysl.run.recipe import Derived, RunConfig, derive_for, training_set
from raysl.run.resume import open_metrics, repeated_steps
from raysl.run.watchdog import OnHang, watch
from raysl.sources.source import Source
from raysl.track.bad_images import BadImages
from raysl.track.results import Features, Results, accuracies_of, with_prefix
from raysl.track.run_folder import MetricsFile, RunFolder
from raysl.train.batches import NumpyBatch, batch_converter, input_converter
from raysl.train.loop import Doing, Hooks, Log, Trainer
from raysl.train.memory import peak_bytes

# Largest number of images whose features are drawn as a map.
_MAP_IMAGES = 1500


def pretrain(
    config: RunConfig[Any],
    *,
    folder: RunFolder,
    source: Source,
    place: Place,
    start_step: int,
    open_batches: Callable[[], Iterator[NumpyBatch]],
    evaluated: Log | None = None,
    sets: LabelledSets | None = None,
    begin: EvaluationStarter | None = None,
    stops: Callable[[], bool] = lambda: False,
    on_hang: OnHang | None = None,
) -> Results:
    """Run one worker of a pretraining, from ``start_step`` to the written encoder.

    Every rank calls it with the same arguments except ``place``. Rank 0 writes into the folder.

    Args:
        config: The run's configuration.
        folder: The run folder.
        source: The training images, for evaluation.
        place: This worker's device and threads.
        start_step: Step of the checkpoint to resume from; 0 starts from scratch.
        open_batches: Opens this rank's stream at ``start_step``, while the model is built.
        evaluated: Called with each evaluation's metrics and step, after the checkpoint; may raise.
        sets: The labelled images of the run, if already open; None opens them.
        begin: Starts an evaluation in the background; None evaluates in the workers.
        stops: Whether to stop after this step, with a checkpoint.
        on_hang: What to do if a step hangs, see ``health.max_step_s``; None lets it hang.

    Returns:
        The results; rank 0 writes ``results.json`` unless protocols are trained after the run.

    Raises:
        StoppedError: If ``stops`` asked for it.
        DivergedError: If the loss is not finite; RanksDifferError if the ranks' weights differ.
        CollapsedError: If the features are the same for all images.
        RunFolderError: If a checkpoint cannot be written or read.
    """
    torch.set_num_threads(place.threads)
    derived = derive_for(config, source)
    batches = open_batches() if start_step < derived.total_steps else None
    worker = _Worker(config, folder=folder, source=source, place=place, sets=sets)
    if start_step:
        worker.checkpoints.restore(start_step, device=place.device)
    metrics = open_metrics(folder, start_step) if worker.rank == 0 else None
    worker.measuring.open(metrics, begin, start_step=start_step)
    if batches is not None:
        trainer = worker.trainer(derived)
        log = _log_into(metrics, worker)
        limit_s = config.health.max_step_s
        watched = watch(folder, start_step=start_step, limit_s=limit_s, on_hang=on_hang)
        with watched as doing, worker.checkpoints.written(metrics):
            hooks = worker.hooks(log, evaluated, stops, doing)
            trainer.run(batches, start_step=start_step, rank=worker.rank, hooks=hooks)
    return _end(worker, derived, metrics)


def _end(worker: "_Worker", derived: Derived, metrics: MetricsFile | None) -> Results:
    """Write the networks of a trained run and measure its results. Collective."""
    average_statistics(worker.method)
    if metrics is not None:  # before the evaluation, so that its errors do not lose the networks
        save_networks(worker.folder, worker.method, worker.config)
        worker.bad_images.close()
        worker.draw(derived)
    counts: Results = {
        "steps": derived.total_steps,
        "repeated_steps": repeated_steps(worker.folder),
        "num_bad_images": len(worker.bad_images),
        "peak_memory_bytes": peak_bytes(worker.place.device),
    }
    results = worker.results() | counts
    worker.checkpoints.raise_trouble()  # such as a folder that was deleted meanwhile
    if metrics is not None:
        _write_results(worker.config, worker.folder, metrics, results, worker.measuring)
    barrier()
    return results


def _log_into(metrics: MetricsFile | None, worker: "_Worker") -> Log:
    is_elastic = worker.config.cluster.is_elastic
    always = {"cluster/train_workers": float(rank_and_size()[1])} if is_elastic else {}

    def log(values: Mapping[str, float], step: int) -> None:
        if metrics is not None:  # on rank 0
            metrics.log({**values, **always}, step=step)
            worker.measuring.collect()

    return log


def _write_results(
    config: RunConfig[Any],
    folder: RunFolder,
    metrics: MetricsFile,
    results: Results,
    measuring: Measuring,
) -> None:
    results["num_failed_evaluations"] = measuring.finish()
    accuracies = {f"final/{k}": v for k, v in accuracies_of(results).items()}
    metrics.log(accuracies, step=results["steps"])
    metrics.close()
    if not protocols_to_train(config):  # otherwise the driver adds their results
        folder.write_results(results)
    folder.publish(waits=True)


class _Worker:
    """One rank's method and optimizers, with checkpoints, evaluation and results."""

    def __init__(
        self,
        config: RunConfig[Any],
        *,
        folder: RunFolder,
        source: Source,
        place: Place,
        sets: LabelledSets | None,
    ) -> None:
        self.config = config
        self.folder = folder
        self.source = source
        self.place = place
        self.rank, _ = rank_and_size()
        self.data = training_set(config, source)
        self.method = build_method(config, self.data, device=place.device)
        derived = derive_for(config, source)
        self.optimizers = build_optimizers(self.method, config, derived)
        self.checkpoints = Checkpoints(config, folder, self.method, self.optimizers, derived)
        self.to_input = input_converter(
            device=place.device,
            mean=config.data.mean,
            std=config.data.std,
            channels_last=config.train.channels_last,
        )
        self.to_views = views_on(config, device=place.device)
        self.bad_images = BadImages(
            folder.bad_images,
            num_images=int(source.group_sizes.sum()),
            max_share=config.data.bad_images.max_share,
            name=source.where,
            row_id=source.row_id,
            reason=lambda row, flaw: reason_of(source, row, Flaw(flaw)),
            writes=self.rank == 0,
        )
        self.sets = sets or open_sets(config, source, num_threads=place.threads)
        self.classifier_evaluation: ClassifierEvaluation | None = None
        if self.method.label_classifier is not None and self.sets is not None:
            model = self.method.label_classifier
            self.classifier_evaluation = ClassifierEvaluation(
                model, self.sets, to_input=self.to_input
            )
        used_labels = labels_record(source, config.data.labels)
        if self.rank == 0 and used_labels is not None:
            write_json(folder.labels, used_labels)
        self.measuring = Measuring(
            config,
            self.method,
            folder=folder,
            source=source,
            labelled=self.sets,
            to_input=self.to_input,
            place=place,
        )

    def trainer(self, derived: Derived) -> Trainer:
        """Return the training loop of this rank's method."""
        return build_trainer(
            self.config,
            self.method,
            self.optimizers,
            schedule=schedule_of(self.config, derived),
            source=self.source,
            device=self.place.device,
        )

    def hooks(
        self, log: Log, evaluated: Log | None, stops: Callable[[], bool], doing: Doing
    ) -> Hooks:
        """Return the callbacks of the loop on this rank."""

        def evaluated_with_checkpoint(metrics: Mapping[str, float], step: int) -> None:
            assert evaluated is not None
            self.checkpoints.wait()  # who is told may refer to the step's checkpoint
            evaluated(metrics, step)

        return Hooks(
            log=log,
            checkpoint=self.checkpoints.save,
            evaluate=self.evaluate,
            bad_images=self.report_bad_images,
            evaluated=None if evaluated is None else evaluated_with_checkpoint,
            stops=stops,
            troubled=self.checkpoints.troubled,
            raise_trouble=self.checkpoints.raise_trouble,
            doing=doing,
        )

    def report_bad_images(self, flaws: Mapping[int, int], step: int) -> float:
        """Merge the bad images of all ranks; return the number of bad images so far."""
        merged = {row: flaw for part in gather_objects(flaws) for row, flaw in part.items()}
        return float(self.bad_images.add(merged, step=step))

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Return the classifier's metrics, or those of the encoder that are already available."""
        if self.classifier_evaluation is not None:
            return self.classifier_evaluation.evaluate(step)
        return self.measuring.evaluate(step)

    def results(self) -> Results:
        """Return the final results on rank 0; they are incomplete on the other ranks."""
        if self.classifier_evaluation is not None:
            return self._classifier_results(self.classifier_evaluation)
        self.measuring.measure_last()
        return self._probe_results()

    def _classifier_results(self, classifier_evaluation: ClassifierEvaluation) -> Results:
        total = derive_for(self.config, self.source).total_steps
        results = classifier_evaluation.results(total, self.source)
        assert self.sets is not None
        features = embed(self.method.encoder, self.sets.test, to_input=self.to_input)
        if self.rank == 0:
            _write_features(self.folder, features, self.sets.test, self.sets.class_names)
        return results

    def _probe_results(self) -> Results:
        """Measure the encoder, the same encoder before training, and the bare pixels.

        Collective: every rank embeds its share, rank 0 computes the accuracies.
        """
        average_statistics(self.method)
        if self.sets is None:
            self._write_unlabelled_features()
            return {}
        evaluate = self.config.evaluate
        if evaluate.is_quick:
            return self._knn_only()
        encoders: dict[Features, Backbone] = {"": self.method.encoder}
        if evaluate.measures_untrained:
            untrained = build_method(self.config, self.data, device=self.place.device)
            encoders["untrained_"] = untrained.encoder
        features = {prefix: self._embed(each, self.sets) for prefix, each in encoders.items()}
        if self.rank != 0:
            return {}
        _write_features(self.folder, features[""][1], self.sets.test, self.sets.class_names)
        if evaluate.measures_pixels:
            train, test = (torch.from_numpy(s.pixels()) for s in (self.sets.train, self.sets.test))
            features["pixels_"] = train, test
        measured: Results = {}
        for prefix, (train, test) in features.items():
            measured |= with_prefix(prefix, measure_probes(evaluate, self.sets, train, test))
        return measured | facts_of(evaluate, self.sets)

    def _knn_only(self) -> Results:
        evaluate = self.config.evaluate
        if self.rank == 0:  # features of another encoder, from an earlier end of the run
            self.folder.features.unlink(missing_ok=True)
        if not evaluate.probes:
            return {}
        total = derive_for(self.config, self.source).total_steps
        top1 = self.measuring.metrics_at(total)["eval/knn_top1"]
        return {"knn_top1": top1, "protocols": protocol_texts(evaluate, evaluate.probes)}

    def draw(self, derived: Derived) -> None:
        """Save the pictures that the method makes of a few training images, if any."""
        total = derived.total_steps
        write_method_pictures(
            self.folder.method_pictures,
            self.method,
            source=self.source,
            views=self.config.data.views.views(),
            to_batch=batch_converter(self.to_views, device=self.place.device),
            progress=Progress(total, total, derived.steps_per_epoch, self.config.seed),
            mean=self.config.data.mean,
            std=self.config.data.std,
        )

    def _embed(self, encoder: Backbone, sets: LabelledSets) -> tuple[Tensor, Tensor]:
        train = embed(encoder, sets.train, to_input=self.to_input)
        return train, embed(encoder, sets.test, to_input=self.to_input)

    def _write_unlabelled_features(self) -> None:
        rows = np.arange(min(_MAP_IMAGES, int(self.source.group_sizes.sum())))
        images = EvalImages(
            self.source,
            rows,
            np.full(len(rows), -1, dtype=np.int64),
            size_px=self.config.image_size_px,
            crop_fraction=self.config.evaluate.crop_fraction,
            num_threads=self.place.threads,
        )
        features = embed(self.method.encoder, images, to_input=self.to_input)
        if self.rank == 0:
            _write_features(self.folder, features, images, [])


def _write_features(
    folder: RunFolder, features: Tensor, images: EvalImages, class_names: list[str]
) -> None:
    """Save the features, labels and thumbnails for the report's map."""
    count = min(len(images), _MAP_IMAGES)
    pixels = np.concatenate(list(images.batches(np.arange(count))))
    with disk_errors_named(folder.features), appears_whole(folder.features) as temporary:
        np.savez(
            temporary,
            features=features[:count].numpy(),
            labels=images.labels[:count],
            thumbnails=pixels,
            class_names=np.array(class_names, dtype=np.str_),
        )
