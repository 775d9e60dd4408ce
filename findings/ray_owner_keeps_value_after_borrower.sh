#!/usr/bin/env bash
# Expected: a value leaves the memory of the process that owns it once no reference to it is left.
# What happens (ray 2.60.0): an actor starts tasks and returns their references. If the actor drops its own
#   references first and the caller drops the last ones, the reference counts of the actor go to 0, but the
#   entries stay in its in-process store for as long as it lives: whole values below 100 kB, a mark for larger
#   ones. If the actor drops its references last, nothing stays. `ray memory` lists references, so it shows none.
# Who is hit: long-lived actors that hand out references, among them the coordinator of Dataset.streaming_split:
#   each block that it passes on leaves an entry (17 kB for a block of 16 kB).
# raysl: its coordinators make and drop a reference of their own to each block that went out of scope.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q --disable-pip-version-check install ray==2.60.0
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PY' 2>"$work/log"
import gc, sys, time
import ray

COUNT = 50


@ray.remote
def make(size):
    return bytes(size)


@ray.remote
class Owner:
    def give(self, size, keep):
        refs = [make.remote(size) for _ in range(COUNT)]
        ray.wait(refs, num_returns=COUNT)
        self.kept = refs if keep else None
        return refs

    def drop(self):
        self.kept = None

    def state(self):
        worker = ray._private.worker.global_worker.core_worker
        return worker.get_memory_store_size(), len(worker.get_all_reference_counts())


ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
print("ray", ray.__version__)
found = []
for size in (10_000, 200_000):
    for keep in (True, False):
        owner = Owner.remote()
        for _ in range(2):
            refs = ray.get(owner.give.remote(size, keep))
            ray.get(refs)
            del refs
            gc.collect()
            time.sleep(2)
            ray.get(owner.drop.remote())
            time.sleep(2)
        entries, references = ray.get(owner.state.remote())
        found.append((entries, references))
        last = "owner" if keep else "caller"
        print(f"{size} bytes, {last} drops last | values made: {2 * COUNT} | "
              f"entries left: {entries} | references left: {references}")
ray.shutdown()
sys.exit(found != [(0, 0), (2 * COUNT, 0)] * 2)
PY
