"""The arguments of ``raysl pretrain`` are known at once."""

import subprocess
import sys


def test_help_and_mistyped_arguments_load_neither_torch_nor_ray() -> None:
    code = "import sys, raysl.run.command; assert not {'torch', 'ray', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
