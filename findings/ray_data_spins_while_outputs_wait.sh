#!/usr/bin/env bash
# Expected: an execution of Ray Data whose outputs have no room in its budget sleeps until the consumer takes one.
# What happens (ray 2.60.0): its scheduling loop waits only for tasks without a finished output. If each task has one that
#   waits for room, the loop goes round without a pause and takes most of a core until the consumer ends. Once all blocks
#   are made, it is quiet.
# Who is hit: training that is slower than its input, with many more blocks than fit into the object store. On two cores
#   the loop takes a core from the training process, or from its threads that wait for each other.
# raysl: a callback of the execution pauses after a step that changed nothing, until an output is taken.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q --disable-pip-version-check install "ray[data]==2.60.0"
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PY' 2>"$work/log"
import logging, sys, time
import numpy as np
import ray

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=400 << 20)
logging.getLogger("ray.data").setLevel(logging.ERROR)
ray.data.DataContext.get_current().enable_progress_bars = False
print("ray", ray.__version__)


class Make:
    def __call__(self, batch):
        return {"pixels": np.zeros((len(batch["id"]), 1 << 20), np.uint8)}


def share_of_a_core(blocks):
    dataset = ray.data.range(blocks, override_num_blocks=blocks).map_batches(
        Make, batch_size=1, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=1
    )
    batches = iter(dataset.iter_batches(batch_size=None))
    next(batches)
    time.sleep(30)  # nobody takes a block; those that have room are made
    cpu, wall = time.process_time(), time.perf_counter()
    time.sleep(10)
    return (time.process_time() - cpu) / (time.perf_counter() - wall)


found = {}
for name, blocks in (("all blocks made", 50), ("outputs wait for room", 3000)):
    found[name] = share_of_a_core(blocks)
    print(f"{name} | blocks: {blocks} | the consumer sleeps, its process takes {found[name]:.2f} of a core")
ray.shutdown()
sys.exit(found["all blocks made"] > 0.1 or found["outputs wait for room"] < 0.2)
PY
