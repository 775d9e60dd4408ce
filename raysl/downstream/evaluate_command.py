"""`raysl evaluate`: measure an encoder by versioned protocols with fixed settings."""

import argparse
import os
from contextlib import ExitStack
from typing import Any

import torch

from raysl.downstream.evaluation import (
    EvaluationBackend,
    EvaluationRequest,
    evaluate,
    run_here,
)
from raysl.downstream.evaluation_config import (
    NOT_FROM_RUN,
    EncoderOrigin,
    EvaluationConfig,
    evaluation_place,
    labels_note,
    load_evaluation,
)
from raysl.downstream.evaluation_folder import EVALUATION, EvaluationFolder
from raysl.downstream.evaluation_record import EvaluationResult, write_evaluation_result
from raysl.downstream.evaluation_report import evaluation_table, json_of, send
from raysl.downstream.evaluation_runs import run_of, train_unit
from raysl.downstream.evaluation_sets import (
    EvaluationSets,
    check_labels,
    open_sets,
    too_few_for_few_shot,
)
from raysl.downstream.ray_evaluate import run_on_ray
from raysl.embed.ray_embed import features_on_ray
from raysl.embed.source import other_decoding
from raysl.errors import ConfigError, counted
from raysl.evaluate.embedding import features_here
from raysl.evaluate.registry import (
    DEFAULT,
    PROTOCOLS,
    TRANSFER,
    TRANSFERRED,
    check_protocols,
    refuse_unmeasured,
    units_of,
)
from raysl.report.progress import CountView
from raysl.report.terminal import console, mapping_table, print_json, say, say_notes
from raysl.run.held import check_reachable, held_folder
from raysl.run.local import pretrain_here
from raysl.run.places import dropped_settings_note
from raysl.run.ray_cluster import connect, disconnect, plan_layout
from raysl.run.ray_train import pretrain_on_ray
from raysl.run.recipe import RunConfig
from raysl.sources.source import Source
from raysl.track.results import Results
from raysl.track.run_folder import RunFolder, working_folder
from raysl.track.uri import check_tracking_uri

_EPILOG = """\
Protocols (default: {default}); the settings of each are PROTOCOL.KEY=VALUE:
{protocols}
  transfer       knn and linear on other labelled images: transfer.source=...

  raysl evaluate runs/mine                               on the images that it was trained on
  raysl evaluate runs/mine data.source=photos/ data.test_source=photos-test/
  raysl evaluate encoder.safetensors data.source=cifar10 --protocols knn,linear,semi_1
  raysl evaluate resnet18 data.source=cifar10 features.size_px=32     random weights, as a baseline

Features and protocols are computed once: the same command resumes a stopped evaluation, and other
protocols are added to it. Without labels, only measures that need none are computed.
cluster.num_train_workers=0 computes in this process, without Ray.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG.format(
        default=",".join(DEFAULT),
        protocols="\n".join(f"  {p.name:14} {p.text(p.settings())}" for p in PROTOCOLS.values()),
    )
    parser.add_argument(
        "encoder",
        help="a run folder, an encoder file, the address of one in a store, or a backbone's name",
    )
    parser.add_argument("overrides", nargs="*", help="section.key=value, typed as YAML")
    parser.add_argument("--protocols", metavar="A,B", help="protocols to measure")
    parser.add_argument("--name", help="folder of the evaluation, below evaluations/ of the run")
    parser.add_argument("--json", action="store_true", help="end with one JSON object of results")
    parser.add_argument(
        "--fresh", action="store_true", help="start over; rename an earlier evaluation"
    )


def run(arguments: argparse.Namespace) -> int:
    """Evaluate an encoder, or resume its evaluation."""
    names = None
    if arguments.protocols is not None:
        words = arguments.protocols.split(",")
        names = check_protocols([name.strip() for name in words if name.strip()])
    home = working_folder()
    overrides = list(arguments.overrides)
    if arguments.name is not None:
        overrides.append(f"name={arguments.name}")
    refuse_unmeasured(overrides, names or DEFAULT)
    config, origin = load_evaluation(arguments.encoder, overrides, home=home)
    if config.track.mlflow:
        check_tracking_uri(config.track.tracking_uri)
    note = dropped_settings_note(
        origin.encoder, overrides, test_key="data.test_source", never=NOT_FROM_RUN
    )
    if note:
        say(note)
    if TRANSFER in (names or ()) and config.transfer is None:
        raise ConfigError("--protocols transfer needs labelled images: set transfer.source=...")
    place = evaluation_place(config, origin)
    check_reachable(str(place), uses_ray=config.cluster.uses_ray)
    with held_folder(place, EvaluationFolder, EVALUATION, fresh=arguments.fresh) as folder:
        request = _request(config, origin, folder, names)
        transfer = _transfer(request) if TRANSFER in (names or ()) else None
        record = _evaluate(request, transfer)
        _draw(request)
        send(request, record, home=home)
        _say_results(request, record)
    if arguments.json:
        print_json(json_of(record))
    return 0


def _request(
    config: EvaluationConfig,
    origin: EncoderOrigin,
    folder: EvaluationFolder,
    names: tuple[str, ...] | None,
) -> EvaluationRequest:
    """Open and check everything before any work is done."""
    notes = [labels_note(config, origin), *other_decoding(origin.encoder, config.data)]
    for note in filter(None, notes):
        say(f"  {note}")
    sets = _open(config, origin)
    if names is None:
        names = DEFAULT if sets.labelled else ()
        if not sets.labelled:
            say("  only measures that need no labels are computed")
        if problem := too_few_for_few_shot(config, sets, names):
            names = tuple(name for name in names if name != "few_shot")
            say(f"  few_shot is skipped: {problem}")
    protocols = tuple(name for name in names if name != TRANSFER)
    if protocols:
        check_labels(config, sets, protocols)
    request = EvaluationRequest(config, protocols, origin, sets, folder)
    for name in protocols:
        if PROTOCOLS[name].measure is None:
            for unit in units_of(config, name):
                run_of(request, unit)  # raises if the settings are not valid
    return request


def _transfer(request: EvaluationRequest) -> EvaluationRequest:
    """Return the request to measure the same encoder on the images of ``transfer``."""
    assert request.config.transfer is not None
    config = request.config.model_copy(update={"data": request.config.transfer})
    sets = _open(config, request.origin)
    check_labels(config, sets, TRANSFERRED)
    place = request.folder.path / TRANSFER
    place.mkdir(parents=True, exist_ok=True)
    return EvaluationRequest(config, TRANSFERRED, request.origin, sets, EvaluationFolder(place))


def _open(config: EvaluationConfig, origin: EncoderOrigin) -> EvaluationSets:
    sets = open_sets(
        config.data,
        size_px=config.features.size_px or origin.size_px,
        crop_fraction=config.features.crop_fraction,
        num_threads=os.cpu_count() or 1,
    )
    for note in sets.notes:
        say(f"  {note}")
    return sets


def _evaluate(request: EvaluationRequest, transfer: EvaluationRequest | None) -> EvaluationResult:
    view = CountView()
    with ExitStack() as stack:
        stack.callback(view.close)
        record = _evaluate_sets(request, view, stack, where=request.folder.shown())
        if transfer is not None:
            where = request.folder.shown(transfer.folder.path)
            transferred = _evaluate_sets(transfer, view, stack, where=where)
            for name, values in transferred["protocols"].items():
                key = TRANSFER if name == "linear" else f"{TRANSFER}_{name}"
                record["protocols"][key] = {**values, "source": transferred["source"]}
            write_evaluation_result(request.folder.record, record)
    return record


def _evaluate_sets(
    request: EvaluationRequest, view: CountView, stack: ExitStack, *, where: str
) -> EvaluationResult:
    sets = request.sets
    say(
        f"evaluating {request.origin.place} on {len(sets.train):,} training and "
        f"{len(sets.test):,} test images of {sets.test.source.name}\n  {where}"
    )
    say_notes(sets.train.source)
    if sets.test.source.fingerprint != sets.train.source.fingerprint:
        say_notes(sets.test.source, title=f"  {sets.test.source.name}:")
    return evaluate(request, _backend(request, view, stack))


def _backend(request: EvaluationRequest, view: CountView, stack: ExitStack) -> EvaluationBackend:
    """Return the functions that compute; Ray starts only when one of them needs it."""
    cluster, total = request.config.cluster, len(request.sets.train) + len(request.sets.test)
    on_ray = cluster.uses_ray
    threads = cluster.threads_per_train_worker or os.cpu_count() or 1
    started = False

    def start_ray() -> None:
        if on_ray and connect():
            stack.callback(disconnect)

    def embed(source: Source, rows: Any, spec: Any, *, advance: Any) -> Any:
        nonlocal started
        if not started:
            view.begin("embedding", total=total, done=0)
            started = True
        if not on_ray:
            return features_here(source, rows, spec, num_threads=threads, advance=advance)
        start_ray()
        return features_on_ray(source, rows, spec, advance=advance)

    def run_units(units: Any, probe_sets: Any) -> Any:
        view.close()
        if not on_ray:
            torch.set_num_threads(threads)
            yield from run_here(units, probe_sets)
            return
        start_ray()
        yield from run_on_ray(units, probe_sets, device=cluster.device)

    def train(config: RunConfig[Any], folder: RunFolder, source: Source) -> Results:
        view.close()
        say(f"training {folder.path.name}: {folder.shown()}")
        if not on_ray:
            return pretrain_here(config, folder=folder, source=source)
        start_ray()
        return pretrain_on_ray(config, folder=folder, source=source, layout=plan_layout(config))

    return EvaluationBackend(
        embed, run_units, lambda unit: train_unit(request, unit, train=train), view.advance, say
    )


def _draw(request: EvaluationRequest) -> None:
    say("drawing the report")
    # Matplotlib takes a second.
    from raysl.downstream.evaluation_page import draw_evaluation  # noqa: PLC0415

    for picture, problem in draw_evaluation(
        request.folder.path,
        encoder=request.origin.encoder,
        train=request.sets.train,
        test=request.sets.test,
        shown=request.folder.shown(),
    ):
        say(f"  {picture} could not be drawn: {problem}")


def _say_results(request: EvaluationRequest, record: EvaluationResult) -> None:
    out = console()
    if record["protocols"]:
        out.print(evaluation_table(record))
    if record["label_free"]:
        out.print(mapping_table("Without labels", record["label_free"]))
    if record["bad_images"]:
        say(f"{counted(record['bad_images'], 'bad image')} replaced by black, and measured too")
    folder = request.folder
    lines = [
        f"numbers   {folder.shown(folder.record)}",
        f"report    {folder.shown(folder.report)}",
    ]
    out.print("\n".join(lines), markup=False)
