#!/usr/bin/env bash
# Expected: a metric that is infinite is read back as infinity, or the run with it can be told from others.
# What happens (mlflow 3.17.2, SQLite store): infinity is stored as 1.797...e308, the largest double, and
#   minus infinity as its negative; NaN is kept as NaN. Ordered by the metric, largest first, the run that
#   diverged stands above all others, and the axis of every chart with it in reaches to 1.8e308.
# Who is hit: whoever logs a loss or a gradient norm that overflows before it becomes NaN.
# raysl: only finite values are sent; that there were others is said in a tag, not_finite.METRIC.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q --disable-pip-version-check install mlflow==3.17.2
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PY' 2>"$work/log"
import math, sys
import mlflow
from mlflow.tracking import MlflowClient

print("mlflow", mlflow.__version__)
client = MlflowClient("sqlite:///mlflow.db")
experiment = client.create_experiment("e")
best, diverged = (client.create_run(experiment, run_name=name) for name in ("best", "diverged"))
client.log_metric(best.info.run_id, "score", 0.9)
for step, value in enumerate((0.5, math.nan, -math.inf, math.inf)):
    client.log_metric(diverged.info.run_id, "score", value, step=step)
values = [m.value for m in client.get_metric_history(diverged.info.run_id, "score")]
first = client.search_runs([experiment], order_by=["metrics.score DESC"])[0].info.run_name
print("logged: 0.5, nan, -inf, inf | read back:", values, "| largest first:", first)
same = values[0] == 0.5 and math.isnan(values[1]) and values[2:] == [-sys.float_info.max, sys.float_info.max]
sys.exit(not (same and first == "diverged"))
PY
