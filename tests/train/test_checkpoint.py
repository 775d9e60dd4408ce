import errno
import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysl.errors import RunFolderError
from raysl.track.run_folder import checkpoint_path, latest_step, list_checkpoints
from raysl.train import checkpoint
from raysl.train.checkpoint import load_checkpoint, save_checkpoint, set_damaged_aside
from raysl.train.keep import newest

CPU = torch.device("cpu")


def state(value: float) -> dict[str, Any]:
    return {"method": {"w": torch.full((3, 2), value)}, "optimizer": {"lr": [0.1]}, "step": 5}


def save(folder: Path, step: int, *, keep: int = 10) -> Path:
    return save_checkpoint(folder, state(step), step=step, keep=newest(keep))


def value_at(folder: Path, step: int) -> float:
    return float(load_checkpoint(folder, step=step, device=CPU)["method"]["w"][0, 0])


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert path == checkpoint_path(tmp_path, 7) == tmp_path / "step-000000007"
    loaded = load_checkpoint(tmp_path, step=7, device=CPU)
    assert torch.equal(loaded["method"]["w"], torch.full((3, 2), 7.0))
    assert (loaded["optimizer"], loaded["step"]) == ({"lr": [0.1]}, 5)


def test_a_real_optimizer_and_module_make_the_round_trip(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    both = {"method": module.state_dict(), "optimizer": optimizer.state_dict()}
    save_checkpoint(tmp_path, both, step=1, keep=newest(1))
    loaded = load_checkpoint(tmp_path, step=1, device=CPU)
    other = torch.nn.Linear(3, 2)
    other.load_state_dict(loaded["method"])
    again = torch.optim.AdamW(other.parameters())
    again.load_state_dict(loaded["optimizer"])
    for network, steps in ((module, optimizer), (other, again)):
        steps.zero_grad()
        network(torch.ones(1, 3)).sum().backward()
        steps.step()
    assert torch.equal(other.weight, module.weight)
    assert torch.equal(other.bias, module.bias)


def test_steps_are_listed_in_order_and_the_newest_is_the_latest(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "nowhere") == []
    assert latest_step(tmp_path / "nowhere") == 0
    for step in (2, 1000, 30):
        save(tmp_path, step)
    (tmp_path / "step-7").mkdir()
    (tmp_path / "notes.txt").touch()
    assert list_checkpoints(tmp_path) == [2, 30, 1000]
    assert latest_step(tmp_path) == 1000


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
    assert list_checkpoints(tmp_path) == [4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000004", "step-000000005"]


def test_a_process_killed_before_the_rename_leaves_no_checkpoint_and_its_rest_is_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt  # like a kill: no handler of ours runs

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert any(path.name.startswith(".tmp-") for path in tmp_path.iterdir())
    assert list_checkpoints(tmp_path) == [1]
    assert value_at(tmp_path, 1) == 1.0
    save(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000001", "step-000000003"]


@pytest.mark.parametrize("again", [1, 3])
def test_a_process_killed_while_it_deletes_leaves_complete_checkpoints_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: int
) -> None:
    """Both when an old one goes (step 3) and when the same step is written again (step 1)."""
    save(tmp_path, 1)
    if again == 3:
        save(tmp_path, 2)

    def killed_halfway(path: Path, **_: object) -> None:
        if Path(path).exists():
            os.unlink(Path(path) / "state.pt")
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed_halfway)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, again, keep=1)
    for step in list_checkpoints(tmp_path):
        assert value_at(tmp_path, step) == step
    assert again == 3 or list_checkpoints(tmp_path) == [1]
    save(tmp_path, 4, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000004"]


def test_the_same_step_again_replaces_the_old_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save_checkpoint(tmp_path, state(99.0), step=1, keep=newest(2))
    assert value_at(tmp_path, 1) == 99.0


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    ],
)
def test_a_full_disk_is_named_and_the_earlier_checkpoints_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save(tmp_path, 1, keep=1)

    def half_then_full(_: object, file: io.BufferedWriter) -> None:
        file.write(b"half a checkpoint")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", half_then_full)
        with pytest.raises(RunFolderError) as caught:
            save(tmp_path, 2, keep=1)
    told = f"{tmp_path}/step-000000002: the checkpoint cannot be written: {error}"
    assert str(caught.value) == told
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    assert value_at(tmp_path, 1) == 1.0


def test_a_file_that_cannot_be_synced_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunFolderError, match="Disk quota exceeded"):
            save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == []


def cut(path: Path, kept_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:kept_bytes])


def flip_a_bit(path: Path) -> None:
    """Change one bit of the tensor, which torch would load as another weight."""
    content = bytearray(path.read_bytes())
    step = int(path.parent.name.removeprefix("step-"))
    content[content.index(np.full(6, step).tobytes())] ^= 4
    path.write_bytes(content)


DAMAGE: list[Callable[[Path], None]] = [
    lambda path: cut(path, 0),
    lambda path: cut(path, 100),
    lambda path: cut(path, -10),
    flip_a_bit,
    Path.unlink,
]


@pytest.mark.parametrize("damage", DAMAGE)
class TestDamage:
    def test_is_an_error_that_says_how_to_go_on(
        self, tmp_path: Path, damage: Callable[[Path], None]
    ) -> None:
        save(tmp_path, 1)
        path = save(tmp_path, 2) / "state.pt"
        damage(path)
        with pytest.raises(RunFolderError) as caught:
            load_checkpoint(tmp_path, step=2, device=CPU)
        assert str(caught.value).startswith(f"{path}: the checkpoint is damaged: ")
        assert "The same command sets it aside and resumes from the one before" in str(caught.value)
        assert value_at(tmp_path, 1) == 1.0

    def test_is_set_aside_so_that_the_one_before_is_the_newest(
        self, tmp_path: Path, damage: Callable[[Path], None]
    ) -> None:
        for step in (1, 2, 3):
            save(tmp_path, step)
        for step in (2, 3):
            damage(checkpoint_path(tmp_path, step) / "state.pt")
        lines = set_damaged_aside(tmp_path)
        assert [line.partition(": ")[0] for line in lines] == [
            str(checkpoint_path(tmp_path, step)) for step in (3, 2)
        ]
        assert lines[-1].endswith("in damaged-step-000000002, and the run resumes from step 1")
        assert list_checkpoints(tmp_path) == [1]
        assert (tmp_path / "damaged-step-000000003").is_dir()
        # The same again: the one that was set aside before makes room.
        damage(save(tmp_path, 2) / "state.pt")
        assert len(set_damaged_aside(tmp_path)) == 1
        assert list_checkpoints(tmp_path) == [1]
        damage(checkpoint_path(tmp_path, 1) / "state.pt")
        assert set_damaged_aside(tmp_path)[0].endswith("and the run starts over")


def test_intact_checkpoints_stay(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    assert set_damaged_aside(tmp_path) == []
    assert list_checkpoints(tmp_path) == [1, 2]
    assert set_damaged_aside(tmp_path / "none") == []


class _Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_code_in_a_file_is_not_run(tmp_path: Path, how: str) -> None:
    trace = tmp_path / "trace"
    path = save(tmp_path, 1) / "state.pt"
    payload = {"method": _Malicious(f"touch {trace}")}
    if how == "torch":
        torch.save(payload, path)
    else:
        path.write_bytes(pickle.dumps(payload))
    with pytest.raises(RunFolderError):
        load_checkpoint(tmp_path, step=1, device=CPU)
    assert not trace.exists()
    pickle.loads(pickle.dumps(payload))  # the payload itself would have worked
    assert trace.exists()
