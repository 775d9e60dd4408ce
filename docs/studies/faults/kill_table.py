"""Do harm to small runs, and tell how they go on: the kill table of docs/results.md.

    python docs/studies/faults/kill_table.py run FOLDER --faults driver "train worker" --times 5
    python docs/studies/faults/kill_table.py table FOLDER

A run has the same fault several times, ten steps apart, two steps after a checkpoint. At its end
the losses of all steps and its weights are compared with those of an undisturbed run: the loss of a
step depends on its images and on all steps before, so equal losses mean that no image was lost or
repeated. ``--code CHECKOUT --build NAME`` does the same to another version.
"""

import argparse
import json
import shutil
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from faults.case import Case
from faults.cases import CASES
from faults.running import Running
from faults.trial import HERE, Trial, differing, end_all


def undisturbed(arguments: argparse.Namespace, case: Case) -> Path:
    """Return the folder of a run of the same settings without a fault; make it if need be."""
    times = case.times(arguments.times)
    alone = f"{case.alike}-{case.most_workers}-{case.every}-{times}"
    name = f"kt-{arguments.build}-alone-{alone}"
    run = Running(Trial(arguments.folder / name, arguments.code), case.alone(times))
    if not (run.folder / "encoder.safetensors").exists():
        run.start()
        if not run.end(600):
            raise RuntimeError(f"the undisturbed run did not end: {run.trial.log}")
        end_all(run.trial.mark)
    return run.folder


def try_fault(arguments: argparse.Namespace, name: str) -> None:
    """Do one kind of fault several times in one run; append what happened to ``trials.jsonl``."""
    case = CASES[name]
    expected = undisturbed(arguments, case) if case.compares else None
    place = arguments.folder / f"kt-{arguments.build}-{name.replace(' ', '-')}"
    shutil.rmtree(place, ignore_errors=True)
    trial = Trial(place, arguments.code)
    shutil.rmtree(trial.ray_folder, ignore_errors=True)
    trial.ray_folder.mkdir()
    times = case.times(arguments.times)
    row: dict[str, Any] = {"build": arguments.build, "fault": name, "trials": []}
    try:
        with case.prepared(trial, times) as run:
            run.start()
            for number in range(times):
                run.reach(case.step(number))
                at = case.harm(run)
                outcome = run.recover(at, limit_s=arguments.limit_s, start_over=case.starts_over)
                row["trials"].append({**outcome._asdict(), **case.measured(run, at)})
                print(f"{arguments.build}, {name}: {row['trials'][-1]}", flush=True)
            if not run.end():
                row["differs"] = ["it did not end"]
            elif expected is not None:
                row["differs"] = differing(run.folder, expected)
            row |= case.at_end(run)
    except (TimeoutError, RuntimeError) as error:
        row["problem"] = str(error)
    finally:
        end_all(trial.mark)
        shutil.rmtree(trial.ray_folder, ignore_errors=True)
    print(f"{arguments.build}, {name}: differs {row.get('differs')} {row.get('problem', '')}")
    with open(arguments.folder / "trials.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def table(folder: Path) -> str:
    """Return the Markdown table of the trials so far: the newest of each build and fault."""
    rows = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    newest = {(row["build"], row["fault"]): row for row in rows}
    lines = ["| fault | build | goes on | s to the next step | steps again | equal |"]
    lines.append("|---|---|---|---|---|---|")
    for name in CASES:
        for (build, fault), row in newest.items():
            if fault == name:
                lines.append(f"| {name} | {build} | {' | '.join(_cells(row))} |")
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    trials = row["trials"]
    found = sorted({trial["by"] for trial in trials})
    ways = [f"{way}: {sum(t['by'] == way for t in trials)} of {len(trials)}" for way in found]
    seconds = [trial["seconds"] for trial in trials if trial["seconds"] is not None]
    wasted = [trial["wasted"] for trial in trials if trial["wasted"] is not None]
    shown = (
        f"{statistics.median(seconds):.1f} ({min(seconds)} to {max(seconds)})" if seconds else ""
    )
    differs = [row["problem"]] if "problem" in row else row.get("differs")
    return [
        ", ".join(ways),
        shown,
        f"{statistics.median(wasted):g}" if wasted else "",
        f"no: {len(differs)} ({differs[0]})" if differs else "yes" if differs is not None else "",
    ]


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("verb", choices=["run", "table"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--faults", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--times", type=int, default=5, help="faults in a run")
    parser.add_argument("--limit_s", type=float, default=150, help="longer is for ever")
    parser.add_argument("--build", default="new", help="name of the version in the table")
    parser.add_argument("--code", type=Path, default=HERE.parents[2], help="checkout that trains")
    arguments = parser.parse_args()
    arguments.folder = arguments.folder.absolute()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.verb == "table":
        print(table(arguments.folder))
        return
    # A shell lets what it starts with & ignore Ctrl-C, and so would what is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in arguments.faults:
        try_fault(arguments, name)


if __name__ == "__main__":
    main()
