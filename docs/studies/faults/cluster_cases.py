"""Faults of runs on a cluster that outlives them: jobs, nodes, the head."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from faults.case import Case, kill
from faults.running import EVERY, Running, Settings
from faults.trial import (
    Head,
    Trial,
    lines,
    processes,
    records,
    waiting,
)


class OnCluster(Case):
    """A fault of a run on a cluster that outlives it."""

    num_cpus = 2

    @contextmanager
    def prepared(self, trial: Trial, times: int) -> Iterator[Running]:
        """Provide the run on a cluster of its own."""
        self.head = Head(trial, num_cpus=self.num_cpus, **self.environment(trial))
        self.head.start()
        yield self.running(trial, times)

    def environment(self, trial: Trial) -> dict[str, str]:
        """Return further environment of the cluster."""
        return {}

    def running(self, trial: Trial, times: int) -> Running:
        """Return the run."""
        return Running(trial, self.settings(times), head=self.head)


class DataWorkerLost(OnCluster):
    """A data worker is killed, in a run whose views do not fit into the object store at once."""

    alike = "large"

    def settings(self, times: int) -> Settings:
        """Return settings by which data workers have work until after the last fault."""
        return self._large(super().settings(times))

    def alone(self, times: int) -> Settings:
        """Return the same for the undisturbed run."""
        return self._large(super().alone(times))

    def _large(self, config: Settings) -> Settings:
        config["data"]["views"]["kinds"][0]["size_px"] = 224
        config["backbone"]["stem"] = "imagenet"
        config["train"]["steps"] += 4 * EVERY
        return config


class JobStop(OnCluster):
    """``ray job stop``, and the job submitted again."""

    def running(self, trial: Trial, times: int) -> Running:
        """Return the run as a job, once the cluster takes jobs."""
        command = ["ray", "job", "list", f"--address=http://127.0.0.1:{self.head.dashboard}"]
        for _ in waiting(60):
            if trial.run(command, RAY_ADDRESS=f"http://127.0.0.1:{self.head.dashboard}") == 0:
                break
        return Running(trial, self.settings(times), head=self.head, as_job=True)

    def harm(self, run: Running) -> float:
        """Stop the job."""
        now = time.time()
        address = f"http://127.0.0.1:{self.head.dashboard}"
        command = ["ray", "job", "stop", f"--address={address}", f"job-{run.jobs}"]
        run.trial.run(command, RAY_ADDRESS=address)
        for _ in waiting(60):
            if run.status() is not None:
                break
        return now


class HeadLost(OnCluster):
    """All processes of the head die, and it is started again."""

    def harm(self, run: Running) -> float:
        """Kill the head and what runs on it, but not the driver; start a new one."""
        now = time.time()
        kill({p.pid for p in processes(run.trial.mark) if p.role != "driver"})
        for _ in waiting(20):
            if run.status() is not None:
                break
        self.head.start()
        return now


class ControlStoreLost(OnCluster):
    """The control store of Ray dies, keeps its state in RocksDB, and is started again."""

    def environment(self, trial: Trial) -> dict[str, str]:
        """Return Ray's settings of the store."""
        return {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(trial.folder / "gcs")}

    def harm(self, run: Running) -> float:
        """Kill the store; start it as it was started after five seconds."""
        (store,) = run.trial.find("gcs")
        words = Path(f"/proc/{store.pid}/cmdline").read_bytes().decode().split("\0")[:-1]
        environment = Path(f"/proc/{store.pid}/environ").read_bytes().decode().split("\0")
        env = dict(each.split("=", 1) for each in environment if "=" in each)
        now = run.hit("gcs")
        time.sleep(5)
        run.trial.start(words, **env)
        return now


class NodeLost(OnCluster):
    """One of two nodes dies with a train worker on it; the other has room for all of them."""

    num_cpus = 0
    every = 25

    def settings(self, times: int) -> Settings:
        """Return settings by which every free CPU makes views."""
        config = super().settings(times)
        config["cluster"] |= {"num_data_workers": None, "cpus_per_train_worker": 1}
        return config

    def running(self, trial: Trial, times: int) -> Running:
        """Return the run, with two nodes."""
        self.nodes = [self.head.add_node(3), self.head.add_node(3)]
        return super().running(trial, times)

    def harm(self, run: Running) -> float:
        """Kill a node with a train worker; the one that took its place came before."""
        if len(self.nodes) == 1:
            self.nodes.append(self.head.add_node(3))
            run.reach(run.step() + 2)  # Ray has heard of it
        of_workers = {psutil.Process(p.pid).ppid() for p in run.trial.find("train worker")}
        lost = next(node for node in self.nodes if node & of_workers)
        now = time.time()
        kill(lost | {p.pid for p in processes(run.trial.mark) if _parent(p.pid) in lost})
        self.nodes.remove(lost)
        return now


def _parent(pid: int) -> int | None:
    with suppress(psutil.Error):
        return psutil.Process(pid).ppid()
    return None


class NodeAdded(OnCluster):
    """A node comes, and a run that may have two train workers gets the second."""

    compares = False  # two workers round otherwise than one
    every = 25  # restarts

    def settings(self, times: int) -> Settings:
        """Return settings of an elastic run, long enough for its restarts."""
        config = super().settings(times)
        config["cluster"] |= {
            "num_train_workers": {"min": 1, "max": 2},
            "cpus_per_train_worker": 1,
            "resize_every_s": 0,
        }
        config["backbone"] |= {"batch_norm": "sync"}
        config["method"] |= {"pace_s": 1.0}
        return config

    def running(self, trial: Trial, times: int) -> Running:
        """Return the run on one node."""
        self.node: set[int] = set()
        return super().running(trial, times)

    def harm(self, run: Running) -> float:
        """Add a node, and wait for the first step of two workers."""
        if self.node:
            kill(self.node)
            for _ in waiting(150):
                if _workers(run) == 1:
                    break
        now = time.time()
        self.node = self.head.add_node(2)
        self.seconds = None
        for _ in waiting(150):
            if _workers(run) == 2:
                self.seconds = round(time.time() - now, 1)
                break
        return now

    def measured(self, run: Running, at: float) -> dict[str, Any]:
        """Return the seconds to the first step of two workers."""
        return {"seconds": self.seconds, "wasted": None}

    def at_end(self, run: Running) -> dict[str, Any]:
        """Return the events of the run, which tell the steps that were done again."""
        return {"events": [e.get("text") for e in lines(run.folder / "events.jsonl")]}


def _workers(run: Running) -> int:
    """Return the number of train workers of the newest step."""
    found = [r for r in records(run.folder) if "cluster/train_workers" in r]
    return int(found[-1]["cluster/train_workers"]) if found else 0
