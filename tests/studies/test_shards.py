"""A dataset made in shares by several processes: the same as by one, and what is refused."""

import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
from otdrg.cli import main
from otdrg.runtime.output_lock import OutputLockedError
from otdrg.studies import open_source
from otdrg.studies.build import BuildOptions, build_share, build_studies_dataset, merge_shares
from otdrg.studies.loading import load_prepared
from otdrg.studies.shards import Share
from PIL import Image
from processes import Process

OPTIONS = BuildOptions(studies_per_shard=2)

#: A task that is killed in the middle of its share.
KILLED = """
import os, signal, sys
from otdrg.studies.build import BuildOptions, build_share
from otdrg.studies.csv_table import CSVSource
from otdrg.studies.shards import Share

class Killed(CSVSource):
    read_studies = 0

    def read(self, entry):
        self.read_studies += 1
        if self.read_studies == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(entry)

table, output, share = sys.argv[1:]
build_share(Killed(table=table), output, Share.parse(share), BuildOptions(studies_per_shard=2))
"""


@pytest.fixture
def table(tmp_path):
    """40 studies, of which 8 are skipped because their image is missing."""
    rng = np.random.default_rng(0)
    lines = ["id,image,report"]
    for place in range(40):
        if place % 5 != 3:
            pixels = rng.integers(0, 256, (20, 20), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{place}.png")
        lines.append(f"s{place},{place}.png,Report {place}.")
    (tmp_path / "reports.csv").write_text("\n".join(lines))
    return str(tmp_path / "reports.csv")


def content(folder):
    """The bytes of all files, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shares_some_killed_give_the_dataset_of_one_process(table, tmp_path):
    source = open_source("csv", table=table)
    whole = build_studies_dataset(source, tmp_path / "whole", OPTIONS)
    output = tmp_path / "shares"
    killed = [Process(["-c", KILLED, table, output, f"{index}/8"]) for index in (2, 5)]
    for index in (7, 1, 8, 3):
        build_share(source, output, Share(index, 8), OPTIONS)
    assert [process.wait(60) for process in killed] == [-signal.SIGKILL] * 2
    with pytest.raises(ValueError, match=r"--shard 2/8, 4/8, 5/8, 6/8 not finished: \d files are missing"):
        merge_shares(source, output, OPTIONS)
    reports = [build_share(source, output, Share(index, 8), OPTIONS) for index in (6, 5, 4, 2)]
    assert reports[0].files == 2 and reports[0].all_files == 20
    merged = merge_shares(source, output, OPTIONS)
    assert content(output) == content(tmp_path / "whole")
    assert merged.skipped == 8 and replace(merged, folder=whole.folder) == whole
    assert load_prepared(output)["train"]._fingerprint == load_prepared(whole.folder)["train"]._fingerprint
    # A task that is started once more changes nothing.
    assert build_share(source, output, Share(2, 8), OPTIONS) == merged
    assert merge_shares(source, output, OPTIONS) == merged
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*"))


def test_shares_more_than_files_are_empty(table, tmp_path):
    source = open_source("csv", table=table)
    options = BuildOptions(studies_per_shard=500, parquet_only=True)
    build_share(source, tmp_path / "o", Share(1, 5), options)
    assert "shard 5/5: nothing to do, because there are only 3 files" in str(
        build_share(source, tmp_path / "o", Share(5, 5), options)
    )
    with pytest.raises(ValueError, match="--shard 2/5, 3/5 not finished: 2 files"):
        merge_shares(source, tmp_path / "o", options)


def test_shares_of_other_options_sources_or_counts_are_refused(table, tmp_path):
    source, output = open_source("csv", table=table), tmp_path / "o"
    with pytest.raises(ValueError, match=r"o\.partial does not exist: expected the shards of the same command"):
        merge_shares(source, output, OPTIONS)
    build_share(source, output, Share(1, 2), OPTIONS)
    other = open_source("csv", table=table, seed=3)
    for refused in (
        lambda: build_share(other, output, Share(2, 2), OPTIONS),
        lambda: merge_shares(other, output, OPTIONS),
    ):
        with pytest.raises(ValueError, match=r"was made with other settings \(source\.seed=0, now 3\)"):
            refused()
    with pytest.raises(ValueError, match=r"other settings \(shorter_side=None, now 64\)"):
        build_share(source, output, Share(2, 2), replace(OPTIONS, shorter_side=64))
    with pytest.raises(ValueError, match=r"was begun with --shard I/2, not with --shard I/3"):
        build_share(source, output, Share(2, 3), OPTIONS)
    with pytest.raises(ValueError, match=r"was begun with --shard I/2, not without --shard: --merge puts"):
        build_studies_dataset(source, output, OPTIONS, resume=True)


def test_shares_hints_do_not_name_overwrite(table, tmp_path):
    source, output = open_source("csv", table=table), tmp_path / "o"
    build_share(source, output, Share(1, 2), OPTIONS)
    with pytest.raises(ValueError, match=r"or deleting \S+o\.partial, which starts anew$"):
        build_share(source, output, Share(2, 2), replace(OPTIONS, limit=3))
    (tmp_path / "o.partial" / "build.json").unlink()
    with pytest.raises(ValueError, match=r"is missing or damaged: deleting \S+o\.partial starts anew$"):
        build_share(source, output, Share(2, 2), OPTIONS)
    shutil.rmtree(tmp_path / "o.partial")
    build_studies_dataset(source, output, OPTIONS)
    with pytest.raises(ValueError, match=r"other settings .* or deleting \S+o, which starts anew$"):
        build_share(source, output, Share(1, 2), replace(OPTIONS, limit=3))
    (tmp_path / "o.partial").mkdir()
    with pytest.raises(ValueError, match=r"o exists: delete it to replace it, another --output keeps it$"):
        build_share(source, output, Share(1, 2), OPTIONS)


def test_shares_source_changed_since_is_refused(table, tmp_path):
    output = tmp_path / "o"
    for index in (1, 2):
        build_share(open_source("csv", table=table), output, Share(index, 2), OPTIONS)
    with open(table, "a") as file:
        file.write("\nnew,0.png,Report of one more.")
    with pytest.raises(ValueError, match=r"files are missing or of studies that have changed"):
        merge_shares(open_source("csv", table=table), output, OPTIONS)


def test_share_made_twice_at_once_is_refused(table, tmp_path):
    source, output = open_source("csv", table=table), tmp_path / "o"
    build_share(source, output, Share(1, 2), OPTIONS)

    class Busy(type(source)):
        def read(self, entry):
            for refused in (
                lambda: build_share(source, output, Share(2, 2), OPTIONS),
                lambda: merge_shares(source, output, OPTIONS),
                lambda: build_studies_dataset(source, output, OPTIONS, overwrite=True),
            ):
                with pytest.raises(OutputLockedError, match=r"shard-2-of-2 is being written by process \d+ on"):
                    refused()
            return super().read(entry)

    build_share(Busy(table=table), output, Share(2, 2), OPTIONS)
    assert merge_shares(source, output, OPTIONS).skipped == 8


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "-1/3", "1/0", "", "1/3/5", " 1/3"])
def test_share_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match="expected I/N with I from 1 to N, such as 1/64 for the first of 64"):
        Share.parse(text)


def test_label_shares_give_the_dataset_of_one_process(table, tmp_path, capsys, monkeypatch):
    build_studies_dataset(open_source("csv", table=table), tmp_path / "studies", OPTIONS)
    command = ["label", str(tmp_path / "studies"), "--labeler", "rules"]
    shares = [*command, "--output", str(tmp_path / "shares")]
    assert main([*command, "--output", str(tmp_path / "whole")]) == 0
    for share in ("3/3", "1/3"):
        assert main([*shares, "--shard", share]) == 0
    assert " studies labelled, in 7 of 20 files of" in capsys.readouterr().out
    for wrong, message in (
        (["--merge"], "--shard 2/3 not finished: 7 files are missing"),
        (["--shard", "2/3", "--relabel"], "other settings (relabel=False, now True)"),
        (["--shard", "2/4"], "was begun with --shard I/3, not with --shard I/4"),
        (["--shard", "2/3", "--overwrite"], "--overwrite cannot be used with --shard or --merge"),
    ):
        assert main([*shares, *wrong]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert main([*shares, "--shard", "2/3"]) == 0
    # The machine that merges needs no labeler.
    monkeypatch.setattr("otdrg.commands.label.labeler_of", None)
    assert main([*shares, "--merge"]) == 0
    assert "| train | " in capsys.readouterr().out
    assert content(tmp_path / "shares") == content(tmp_path / "whole")
