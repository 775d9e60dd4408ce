#!/usr/bin/env bash
# Expected: a second `ray.init(address="local")` on a machine takes as long as the first: without a dashboard, it asks for
#   no port that another Ray could have.
# What happens (ray 2.60.0): the agent of each node listens on port 52365 if no other is given, and `ray.init` cannot give
#   one. While it is taken, the agent tries six times with growing pauses, and the raylet, and so ray.init, waits for it
#   for 3 to 4 s; then the agent serves no HTTP. An agent that outlives its Ray for a moment costs the next start as much.
# Who is hit: whoever starts one script after the other, or two at a time, on one machine; tests above all.
# raysl: gives the agent any free port where it starts a Ray itself.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q --disable-pip-version-check install "ray[default]==2.60.0"
cd "$work"
cat > start.py <<'PY'
import glob, os, subprocess, sys, time
import ray

began = time.monotonic()
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
seconds = time.monotonic() - began
logs = ray._private.worker._global_node.get_logs_dir_path()
text = "".join(open(path).read() for path in glob.glob(f"{logs}/dashboard_agent.log"))
tries, gave_up = text.count("Failed to bind to port 52365"), "failed to bind after 6 attempts" in text
print(f"{sys.argv[1]} | ray.init took {seconds:.1f} s | pauses because port 52365 was taken: {tries} | "
      f"the agent gave up: {gave_up}", flush=True)
after = True
if sys.argv[1] == "first":
    print("ray", ray.__version__)
    command = [sys.executable, "-W", "ignore", __file__, "second, at the same time"]
    after = subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
ray.shutdown()
sys.exit(not (after and (tries, gave_up) == ((0, False) if sys.argv[1] == "first" else (5, True))))
PY
"$work/venv/bin/python" -W ignore start.py first 2>"$work/log"
