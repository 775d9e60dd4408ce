#!/usr/bin/env bash
# Expected: the detached actor that frees the room of a dead controller of Ray Train asks its own cluster whether the
#   controller lives.
# What happens (ray 2.60.0): it asks the dashboard of whatever cluster it finds on its machine. If a second Ray runs
#   there, it finds two, and its thread ends with an error in a log. The dead controller's placement group keeps its CPUs
#   and GPUs for as long as the job lives, and the actor, some 100 MiB, as long as the cluster.
# Who is hit: a head node or workstation on which somebody also starts a local Ray.
# raysl: its cleaner asks the control store of its own cluster.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q --disable-pip-version-check install "ray[default,train]==2.60.0"
cd "$work"
cat > train.py <<'PY'
import logging, os, signal, threading, time
import ray
from ray.train import ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

ray.init(address="local", num_cpus=2, include_dashboard=True, log_to_driver=False, logging_level=logging.ERROR)


def train():
    time.sleep(600)


def actors(name):
    return [a for a in ray._private.state.actors().values() if a["ActorClassName"] == name]


def states(name):
    return [a["State"] for a in actors(name)]


def group_states():
    return [group["state"] for group in ray.util.placement_group_table().values()]


trainer = DataParallelTrainer(train, scaling_config=ScalingConfig(num_workers=1))
threading.Thread(target=trainer.fit, daemon=True).start()
deadline = time.monotonic() + 120
while not (states("RayTrainWorker") == ["ALIVE"] and group_states() == ["CREATED"]):
    assert time.monotonic() < deadline
    time.sleep(0.5)
time.sleep(15)  # the cleaner knows of the group
os.kill(actors("TrainController")[0]["Pid"], signal.SIGKILL)
time.sleep(60)
print("a minute after the controller died: controller", *states("TrainController"), "| its placement group",
      *group_states(), "| the cleaner", *states("PlacementGroupCleaner"))
os._exit(0)
PY
cat > both.py <<'PY'
import subprocess, sys
import ray

print("ray", ray.__version__)
found = {}
for name in ("one Ray", "two Rays"):
    if name == "two Rays":
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    done = subprocess.run([sys.executable, "-W", "ignore", "train.py"], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True)
    found[name] = [line for line in done.stdout.splitlines() if line.startswith("a minute")][-1]
    print(f"{name} on the machine | {found[name]}", flush=True)
ray.shutdown()
told = "a minute after the controller died: controller DEAD | its placement group {} | the cleaner {}"
sys.exit(found != {"one Ray": told.format("REMOVED", "DEAD"), "two Rays": told.format("CREATED", "ALIVE")})
PY
"$work/venv/bin/python" -W ignore both.py 2>"$work/log"
