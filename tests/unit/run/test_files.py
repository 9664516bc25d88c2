"""The ledger of faults outlives a line that was cut off."""

import pytest

from moce_dist.run.files import forget_faults, read_faults, record_fault


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
