"""The ledger of faults outlives a line that was cut off."""

import pytest

from moce_dist.run.files import (
    forget_faults,
    read_faults,
    read_faults_from,
    record_fault,
    replacing,
)


@pytest.mark.parametrize("cut", [b'{"stage": "moce", "st', b'\xff\xfe{"a"'])
def test_a_line_that_was_cut_off_costs_no_other(tmp_path, cut, caplog):
    ledger = tmp_path / "faults.jsonl"
    record_fault(ledger, stage="mae", step=1)
    with ledger.open("ab") as file:
        file.write(cut)
    record_fault(ledger, stage="moce", step=2)
    record_fault(ledger, stage="moce", step=7)
    assert [f["step"] for f in read_faults(ledger)] == [1, 2, 7]
    assert f"{ledger}: 1 damaged lines are left out" in caplog.text
    forget_faults(ledger, "moce", 5)
    assert [f["step"] for f in read_faults(ledger)] == [1, 2]


def test_a_ledger_is_read_on_from_where_its_reader_was(tmp_path):
    ledger = tmp_path / "faults.jsonl"
    assert read_faults_from(ledger, 0) == ([], 0)
    record_fault(ledger, stage="mae", step=1)
    faults, offset = read_faults_from(ledger, 0)
    assert [f["step"] for f in faults] == [1] and offset == ledger.stat().st_size
    # the end of a line that another process is writing waits for its newline
    with ledger.open("a") as file:
        file.write('{"stage": "mae", "st')
    assert read_faults_from(ledger, offset) == ([], offset)
    with ledger.open("a") as file:
        file.write('ep": 2}\n')
    faults, end = read_faults_from(ledger, offset)
    assert [f["step"] for f in faults] == [2] and end == ledger.stat().st_size


def test_writers_of_equal_process_numbers_do_not_write_one_file(tmp_path):
    # pods have equal numbers; here both writers are this process
    path = tmp_path / "table"
    with replacing(path) as early, early.open("w") as first:
        first.write("early ")
        with replacing(path) as late:
            late.write_text("late")
        assert path.read_text() == "late"
        first.write("and whole")
    assert path.read_text() == "early and whole"
    assert [file.name for file in tmp_path.iterdir()] == ["table"]
