"""The journal of a command that has one output: kept when it is interrupted, deleted when it is done."""

import pytest
from otdrg.runtime.journal import append_rows
from otdrg.runtime.shared_work import temporary_journal

ROW = [{"id": "a"}]


def interrupted(journal, **options):
    with pytest.raises(KeyboardInterrupt) as stop, temporary_journal(journal, **options):
        append_rows(journal, ROW)
        raise KeyboardInterrupt
    return str(stop.value)


@pytest.mark.parametrize("overwrite", [False, True])
def test_interrupted_work_is_kept_for_the_same_settings(tmp_path, overwrite):
    journal = tmp_path / "work.jsonl"
    message = interrupted(journal, settings=lambda: {"limit": 1}, overwrite=overwrite)
    assert message == f"what was finished is kept in {journal}; the same command continues"
    with temporary_journal(journal, lambda: {"limit": 1}, overwrite):
        assert journal.read_text() == '{"id": "a"}\n'
    assert not list(tmp_path.iterdir())


def test_work_without_settings_is_replaced_on_request_only(tmp_path):
    journal = tmp_path / "mine.jsonl"
    journal.write_text('{"id": "a"}\n{"id": "b"}')
    with pytest.raises(ValueError, match=r"has no mine\.settings\.json"), temporary_journal(journal, dict, False):
        pass
    assert journal.read_text() == '{"id": "a"}\n{"id": "b"}'
    with temporary_journal(journal, dict, True):
        assert not journal.exists()


def test_work_of_other_settings_is_replaced_on_request_only(tmp_path):
    journal = tmp_path / "work.jsonl"
    interrupted(journal, settings=lambda: {"limit": 1}, overwrite=False)
    with pytest.raises(ValueError, match="limit=1, now 2"), temporary_journal(journal, lambda: {"limit": 2}, False):
        pass
    assert journal.exists()
    with temporary_journal(journal, lambda: {"limit": 2}, True):
        assert not journal.exists()
