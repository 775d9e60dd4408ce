"""Fine-tune a copy of the pretrained network at the end of a run (``evaluate.finetune``)."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from raysl.errors import ConfigError, DivergedError
from raysl.evaluate.finetune import FinetuneConfig
from raysl.evaluate.training_source import seen_part
from raysl.nn.collectives import on_its_own
from raysl.run.from_run import finetune_data
from raysl.run.local_stream import open_local
from raysl.run.recipe import Derived, RunConfig, run_from_values
from raysl.sources.source import Source
from raysl.sources.subset import whole_source
from raysl.track.results import Results
from raysl.track.run_folder import RunFolder, latest_step
from raysl.train.batches import NumpyBatch

Train = Callable[..., Results]


def finetune_copy(
    config: RunConfig[Any],
    finetune: FinetuneConfig,
    *,
    folder: RunFolder,
    source: Source,
    threads: int,
    train: Train,
) -> Results:
    """Run a fine-tuning in this process alone, from the files of a run whose weights are written.

    It is a run like any other, of method ``supervised``, in ``finetune`` of the run's folder: one
    that was interrupted goes on from its checkpoint. The other ranks wait meanwhile.

    Args:
        config: The pretraining.
        finetune: How.
        folder: The pretraining's.
        source: Its images.
        threads: That make views.
        train: Trains a run as :func:`raysl.run.worker.pretrain` does, but for the place.

    Returns:
        ``finetune_top1`` and ``finetune_labels``, the number of labels that were used.

    Raises:
        DivergedError: If the loss is not finite.
    """
    whole = whole_source(source)
    below = RunFolder(folder.finetune)
    below.path.mkdir(exist_ok=True)
    run = finetune_run(config, finetune, folder=folder, source=whole)
    seen = seen_part(whole, run.data, run.evaluate, run.method)
    start_step = latest_step(below.checkpoints)

    def open_batches(_: Derived) -> Iterator[NumpyBatch]:
        return open_local(run, seen, start_step=start_step, num_threads=threads)

    with on_its_own():
        try:
            results = train(
                run, folder=below, source=seen, start_step=start_step, open_batches=open_batches
            )
        except DivergedError as error:
            raise DivergedError(
                f"evaluate.finetune: {error}; lower evaluate.finetune.base_lr={finetune.base_lr:g}"
            ) from None
    return {"finetune_top1": results["top1"], "finetune_labels": results["num_labels"]}


def finetune_run(
    config: RunConfig[Any], finetune: FinetuneConfig, *, folder: RunFolder, source: Source
) -> RunConfig[Any]:
    """Return the run that fine-tunes a pretraining's encoder as ``evaluate.finetune`` says.

    Args:
        config: The pretraining.
        finetune: How.
        folder: Where its weights are.
        source: All of its images.

    Raises:
        ConfigError: If the settings make no run.
    """
    data = finetune_data(config)
    data["views"] |= {"min_scale": finetune.min_scale, "flip_prob": finetune.flip_prob}
    data["labels"] = {"fraction": finetune.label_fraction, "seed": finetune.seed, "only": True}
    values = config.model_dump(mode="json", exclude={"adversary_optim"})
    head = str(folder.path) if finetune.head_layers else None
    backbone = values["backbone"] | {"weights": str(folder.encoder), "batch_norm": "worker"}
    if config.method.finetuned_pool is not None:
        backbone["pool"] = config.method.finetuned_pool
    build = partial(run_from_values, where="evaluate.finetune")
    values |= {
        "seed": finetune.seed,
        "data": data,
        "backbone": backbone,
        "method": {"name": "supervised", "head": head, "head_layers": finetune.head_layers},
        "optim": {
            "name": "sgd",
            "base_lr": finetune.base_lr,
            "nesterov": True,
            "sgd_momentum": finetune.sgd_momentum,
            "weight_decay": finetune.weight_decay,
        },
        "train": values["train"]
        | {
            "epochs": float(finetune.epochs),
            "steps": None,
            "global_batch_size": 1,
            "micro_batch_size": None,
            "checkpoint_every": {"fraction": 1.0},
        },
        "evaluate": values["evaluate"] | {"finetune": None, "every": None},
        "cluster": values["cluster"] | {"num_train_workers": 0},
    }
    run = build(values)
    num_images = int(seen_part(source, run.data, run.evaluate, run.method).group_sizes.sum())
    if num_images < 2:
        raise ConfigError(
            f"evaluate.finetune.label_fraction={finetune.label_fraction:g}: leaves {num_images} "
            f"labels; raise it"
        )
    values["train"]["global_batch_size"] = min(finetune.batch_size, num_images)
    return build(values)
