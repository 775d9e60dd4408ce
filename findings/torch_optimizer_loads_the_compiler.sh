#!/usr/bin/env bash
# Expected: a program that never compiles anything does not load torch's compiler: `import torch` leaves it out.
# What happens (torch 2.15.0): making any optimizer imports torch._dynamo, and with it sympy and most of torch.fx and
#   torch.distributed: some 900 modules, which take about as long as `import torch` itself. Only functions of the optimizer
#   that are excluded from compilation need it, at their first call. TORCHDYNAMO_DISABLE=1 does not prevent it.
# Who is hit: whoever waits for a first step: short runs, tests, and every worker process of a cluster, each for itself.
# raysl: its worker processes are forked from one that has imported it while the command was busy with something else.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q --disable-pip-version-check install torch==2.15.0 numpy
cd "$work"
cat > optimizer.py <<'PY'
import sys, time

def state():
    return len(sys.modules), time.process_time(), "torch._dynamo" in sys.modules, "sympy" in sys.modules

began = state()
import torch
imported = state()
torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
made = state()
torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
again = state()
print("torch", torch.__version__)
for what, before, after in (("import torch", began, imported), ("an optimizer", imported, made), ("another", made, again)):
    print(f"{what}: {after[0] - before[0]} modules, {after[1] - before[1]:.2f} CPU seconds, "
          f"torch._dynamo loaded: {after[2]}, sympy: {after[3]}")
surprise = not imported[2] and made[2] and made[3] and made[0] - imported[0] > 500 and again[0] == made[0]
sys.exit(not surprise)
PY
for disabled in 0 1; do
  echo "TORCHDYNAMO_DISABLE=$disabled"
  TORCHDYNAMO_DISABLE=$disabled "$work/venv/bin/python" optimizer.py
done
