"""Check the nodes of a cluster before the first worker starts: memory, versions, the images."""

import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import raysl
from raysl.data.plan import Plan
from raysl.data.stream import BlockSpec
from raysl.errors import ClusterError, counted
from raysl.report.terminal import say
from raysl.run.nodes import ANYWHERE, Node, Roles
from raysl.run.ray_cluster import Layout, all_nodes, worker_runtime_env
from raysl.run.ray_data import packing_for, plan_for
from raysl.run.ray_errors import wrapped_errors
from raysl.run.waiting import Note, Patience, WaitMessages
from raysl.sources.source import Source, Unreadable

if TYPE_CHECKING:  # the recipe loads torch; a node's answer must not wait for that
    from raysl.run.recipe import RunConfig

_ANSWER_S = 60.0
_POLL_S = 0.5
_ROLES = "roles"
_SHM = "/dev/shm"
_SHOWN = 5
_MIB = 1 << 20


class NodeFacts(NamedTuple):
    """What matters of a node to a run."""

    versions: dict[str, str]
    """Of Python, Ray, torch and raysl, without patch level and build."""
    shm_bytes: int | None
    """Size of the shared memory; None if there is none."""
    problem: str | None
    """Why the node cannot read an image that it should, as a sentence fragment."""


Answers = Sequence[tuple[str, NodeFacts | str | None]]
"""Of each node, its address and its facts, or why there are none; None for no answer in time."""


def check_cluster(config: "RunConfig[Any]", source: Source, layout: Layout) -> list[str]:
    """Check that the connected cluster can hold a run's views and that each node can make them.

    A single node is not asked: this process runs on it.

    Args:
        config: The run's configuration.
        source: The training images.
        layout: The workers of the run.

    Returns:
        The nodes of each role, and notes on nodes that will be slow or did not answer.

    Raises:
        ClusterError: If the object store is too small, or a node has other versions or cannot read
            the images.
    """
    from raysl.run.recipe import block_spec, plan_of  # noqa: PLC0415 - torch, in this process only

    need = bytes_in_flight(
        plan_of(config, source),
        block_spec(config.data),
        layout,
        prefetch_batches=config.cluster.prefetch_batches,
    )
    roles, everywhere = config.cluster.roles, all_nodes()
    nodes = roles.members(everywhere)
    bytes_of = {
        node["NodeID"]: float(node["Resources"].get("object_store_memory", 0.0))
        for node in ray.nodes()
    }
    for names, asked, members in (
        (("data", "train"), "", nodes),
        (("data",), roles.of_data, roles.data_nodes(nodes)),
        (("train",), roles.of_train, roles.train_nodes(nodes)),
    ):
        store_bytes = sum(bytes_of[node.node_id] for node in members)
        check_store({name: need[name] for name in names}, store_bytes, layout, asked=asked)
    stores = {node.name: bytes_of[node.node_id] for node in nodes}
    lines = roles_lines(roles, nodes, layout)
    if len(everywhere) == 1:
        return lines + notes_on([(nodes[0].name, facts_here(None))], stores)
    here = facts_here(source)
    answers = ask_nodes(nodes, ray.put(source if here.problem is None else None))
    raise_problems(here, answers)
    return lines + notes_on(answers, stores)


def wait_for_roles(config: "RunConfig[Any]") -> None:
    """Wait until the cluster has a node that may train and one that may make views.

    Raises:
        ClusterError: If it has none for ``cluster.max_wait_s``.
    """
    roles, note = config.cluster.roles, Note(_ROLES, "")
    patience = Patience(config.cluster.max_wait_s)
    messages = WaitMessages(lambda: note, say)
    while (missing := roles.missing(all_nodes())) is not None:
        note = Note(_ROLES, f"waits for {missing}")
        messages.look()
        if (problem := patience.too_long(note)) is not None:
            raise ClusterError(problem)
        time.sleep(_POLL_S)


def roles_lines(roles: Roles, nodes: Sequence[Node], layout: Layout) -> list[str]:
    """Return which nodes have which role, in one line; none if all may have both."""
    if roles == ANYWHERE:
        return []
    train = roles.train_nodes(nodes, use_gpu=layout.use_gpu)
    return [f"trains on {_names(train)}; makes views on {_names(roles.data_nodes(nodes))}"]


def _names(nodes: Sequence[Node]) -> str:
    names = [node.name for node in nodes]
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def bytes_in_flight(
    plan: Plan, spec: BlockSpec, layout: Layout, *, prefetch_batches: int
) -> dict[str, int]:
    """Return the least bytes of views that the object store must hold, by who holds them."""
    workers = layout.num_train_workers
    plan = plan_for(plan, spec, num_workers=workers)
    packing = packing_for(plan, spec, start_step=0, num_workers=workers)
    block = packing.steps_per_block * plan.item_size * spec.bytes_per_image
    batch = max(block, plan.global_batch_size // workers * spec.bytes_per_image)
    return {
        "data": layout.num_data_workers * block,
        "train": workers * (prefetch_batches + 1) * batch,
    }


def check_store(
    need: Mapping[str, int], store_bytes: float, layout: Layout, *, asked: str = ""
) -> None:
    """Raise ClusterError if an object store cannot hold the views in flight.

    Args:
        need: Bytes of views, by who holds them: ``data`` and ``train`` workers.
        store_bytes: Bytes of the store of the nodes that these are on.
        layout: The workers of the run.
        asked: What is asked of these nodes; of all nodes nothing.
    """
    if sum(need.values()) <= store_bytes:
        return
    who = {
        "data": f"{counted(layout.num_data_workers, 'data worker')} make",
        "train": f"{counted(layout.num_train_workers, 'train worker')} prefetch",
    }
    parts = [f"{who[name]} {size / _MIB:,.0f} MiB" for name, size in need.items()]
    raise ClusterError(
        f"views in flight need {sum(need.values()) / _MIB:,.0f} MiB of object store, and "
        f"{f'the nodes{asked} have' if asked else 'the cluster has'} "
        f"{store_bytes / _MIB:,.0f} MiB: {', '.join(parts)}. Lower cluster.prefetch_batches, "
        f"cluster.num_data_workers or train.global_batch_size, or start Ray with a larger "
        f"--object-store-memory"
    )


def facts_here(source: Source | None) -> NodeFacts:
    """Return the facts about the node of this process; without a source none is read."""
    versions = {"Python": platform.python_version().rpartition(".")[0], "raysl": raysl.__version__}
    for package in ("ray", "torch"):
        try:  # not of the module, which takes seconds to load
            versions[package] = version(package).partition("+")[0]  # a node may have no CUDA
        except PackageNotFoundError:
            versions[package] = "none"
    try:
        shm_bytes = shutil.disk_usage(_SHM).total
    except OSError:
        shm_bytes = None
    return NodeFacts(versions, shm_bytes, None if source is None else _read_problem(source))


def _read_problem(source: Source) -> str | None:
    try:
        (image,) = source.read([0])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return image.reason if isinstance(image, Unreadable) else None


def ask_nodes(nodes: Sequence[Node], source: Any) -> Answers:
    """Ask all nodes with CPUs at once for their facts.

    Args:
        nodes: The nodes.
        source: Object reference of the source, or of None.
    """
    probe = ray.remote(num_cpus=0, max_retries=0)(facts_here)
    asked: list[tuple[str, Any]] = []
    for node in nodes:
        if node.cpus > 0:
            there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
            options = {"scheduling_strategy": there, "runtime_env": worker_runtime_env()}
            asked.append((node.name, probe.options(**options).remote(source)))
    references = [each for _, each in asked]
    answered, _ = ray.wait(references, num_returns=len(references), timeout=_ANSWER_S)
    return [(name, _answer(each) if each in answered else None) for name, each in asked]


def _answer(reference: Any) -> NodeFacts | str:
    try:
        facts: NodeFacts = ray.get(reference)
    except ray.exceptions.RayError as error:
        own = next(wrapped_errors(error), None)
        return str(own or error).strip().splitlines()[-1]
    return facts


def raise_problems(here: NodeFacts, answers: Answers) -> None:
    """Raise ClusterError with each node that would not do what this process does."""
    lines = []
    for name, answer in answers:
        if isinstance(answer, str):
            lines.append(f"{name}: cannot run raysl: {answer}")
        elif answer is not None:
            other = [
                f"{package} {answer.versions.get(package)} instead of {wanted}"
                for package, wanted in here.versions.items()
                if answer.versions.get(package) != wanted
            ]
            other += [f"cannot read the images: {answer.problem}"] if answer.problem else []
            lines += [f"{name}: {', '.join(other)}"] if other else []
    if lines:
        more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise ClusterError(
            "\n  ".join(
                [
                    f"{counted(len(lines), 'node')} of the cluster cannot take part in this run:",
                    *lines[:_SHOWN],
                    *more,
                ]
            )
            + "\nGive all nodes the same versions and access to data.source, or stop these nodes"
        )


def notes_on(answers: Answers, stores: Mapping[str, float]) -> list[str]:
    """Return notes on nodes that did not answer, or whose shared memory is too small for Ray.

    Args:
        answers: What the nodes answered.
        stores: Bytes of the object store of each node, by address.
    """
    notes = []
    for name, answer in answers:
        store_bytes = stores.get(name, 0.0)
        if answer is None:
            notes.append(f"node {name} did not answer within {_ANSWER_S:.0f} s")
        elif isinstance(answer, NodeFacts) and (answer.shm_bytes or 0) < store_bytes:
            notes.append(
                f"node {name}: {_SHM} has {(answer.shm_bytes or 0) / _MIB:,.0f} MiB, less than its "
                f"object store of {store_bytes / _MIB:,.0f} MiB, so Ray keeps views on disk; "
                f"enlarge it (docker run --shm-size)"
            )
    return notes
