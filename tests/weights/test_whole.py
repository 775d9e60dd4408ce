import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raysl.weights.whole import appears_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [OSError("No space left"), KeyboardInterrupt()])
def test_what_fails_leaves_the_older_file_and_nothing_beside(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "deep" / "file.bin"
    with appears_whole(path) as temporary:
        temporary.write_bytes(b"older")

    def fail() -> None:
        with appears_whole(path) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_bytes() == b"older"
    assert names(path.parent) == ["file.bin"]


def test_a_folder_is_exchanged_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for content in ("a", "b"):
        with appears_whole(path) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
        assert names(path) == [content]

    def fail() -> None:
        with appears_whole(path) as temporary:
            temporary.mkdir()
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert (names(path), names(tmp_path)) == (["b"], ["folder"])


def test_a_process_that_is_killed_leaves_no_half_file(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"older")
    script = (
        "import os, signal; from pathlib import Path\n"
        "from raysl.weights.whole import appears_whole\n"
        "with appears_whole(Path('file.bin')) as temporary:\n"
        "    temporary.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"older"
    with appears_whole(path) as temporary:
        temporary.write_bytes(b"newer")
    assert (path.read_bytes(), names(tmp_path)) == (b"newer", ["file.bin"])
