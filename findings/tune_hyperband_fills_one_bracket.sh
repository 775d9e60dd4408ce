#!/usr/bin/env bash
# Expected: HyperBandScheduler stops the worse trials at half time, whatever number of them runs at once.
# What happens (ray 2.60.0): where a searcher hands over one trial after the other, which is so with
#   max_concurrent_trials=1 or as many places as trials of one bracket, the first bracket is the one that
#   never halves, and a trial that has ended frees its seat in it for the next. Six trials of two rounds,
#   reduction factor 2: all six run to their end. The same six, all running at once: some are stopped.
# Who is hit: whoever sweeps with HyperBand on fewer places than brackets have seats, a laptop above all.
# raysl: a HyperBand of its own, whose brackets follow from a trial's number.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q --disable-pip-version-check install 'ray[tune]==2.60.0'
cd "$work"
RAY_AIR_NEW_OUTPUT=0 "$work/venv/bin/python" -W ignore - "$work" <<'PY' 2>"$work/log"
import sys
import ray
from ray import tune
from ray.tune.schedulers import HyperBandScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

ROUNDS = 2


def train(config):
    for _ in range(ROUNDS):
        tune.report({"score": config["x"]})


def ended_early(places):
    results = tune.Tuner(
        tune.with_resources(train, {"cpu": 0.1}),
        param_space={"x": tune.grid_search([0, 1, 2, 3, 4, 5])},
        tune_config=tune.TuneConfig(
            scheduler=HyperBandScheduler(max_t=ROUNDS, reduction_factor=2),
            search_alg=BasicVariantGenerator(max_concurrent=places),
            metric="score",
            mode="max",
        ),
        run_config=tune.RunConfig(storage_path=sys.argv[1], verbose=0),
    ).fit()
    return sum(result.metrics["training_iteration"] < ROUNDS for result in results)


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
found = {places: ended_early(places) for places in (1, 6)}
ray.shutdown()
print("ray", ray.__version__, "| six trials, stopped at half time:", found[1], "one at a time,", found[6], "all at once")
sys.exit(not (found[1] == 0 and found[6] > 0))
PY
