import subprocess
import sys

from raysl.data.block import BAD, FLAW, INDEX, STEP, is_view_column, view_column, view_kind
from raysl.data.block import numbers_column as numbers


def test_no_two_columns_have_one_name() -> None:
    columns = [INDEX, STEP, BAD, FLAW]
    for kind in range(12):
        columns += [view_column(kind), numbers(kind)]
    assert len(set(columns)) == len(columns)


def test_columns_of_views_tell_their_kind_and_others_are_none() -> None:
    assert [view_kind(view_column(kind)) for kind in range(12)] == list(range(12))
    assert all(is_view_column(view_column(kind)) for kind in range(12))
    assert not any(map(is_view_column, [INDEX, STEP, BAD, FLAW, numbers(0)]))


def test_who_reads_blocks_loads_nothing_of_what_makes_them() -> None:
    code = "import sys, raysl.data.block; print({'cv2', 'PIL', 'torch', 'ray'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"
