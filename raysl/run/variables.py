"""Environment variables of a run's processes. Ray reads most of them only when it is imported."""

import os
import secrets

WORKER_VARIABLES = {
    # Waiting torch threads must sleep: spinning threads take the cores from the data workers
    # (65 instead of 245 images/s on two busy cores).
    "OMP_WAIT_POLICY": "passive",
    # But not at once: bfloat16 on CPU waits so often that it would be 50 times slower (ADR 5).
    "GOMP_SPINCOUNT": "30000",
    # If on, a driver under `uv run` starts every worker through uv with a copy of the folder.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Train workers start when there is room, so a start without it has a node that was just lost.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Workers keep the driver's current folder, so that relative paths resolve.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
"""Variables of every process of a run, unless the user has set them."""

_OWN_RAY = {
    # No watcher for preempted nodes: the only node is this machine.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # How often the controller asks its workers whether they are done; Ray's default is 2 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # No record of each task for a dashboard: the control store keeps the last 100,000, and grew by
    # some 75 MiB an hour.
    "RAY_task_events_report_interval_ms": "0",
}


def has_own_ray() -> bool:
    """Return whether a run starts a Ray of its own: no RAY_ADDRESS names a cluster."""
    return "RAY_ADDRESS" not in os.environ


def set_worker_variables() -> None:
    """Set the variables that every process of a run has in this process."""
    for name, value in WORKER_VARIABLES.items():
        os.environ.setdefault(name, value)


def set_own_variables() -> None:
    """Set also the variables of a Ray that this process starts; its children inherit them."""
    set_worker_variables()
    for name, value in _OWN_RAY.items():
        os.environ.setdefault(name, value)
    # A new Ray asks for a token unless RAY_AUTH_MODE says otherwise, because who reaches one of its
    # ports can start processes. This one only this process and its children know. Ray would write
    # its own to a file in the home folder, and later clusters would require that.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
