"""The benchmark of data preparation runs, and finds the documents of both contestants equal."""

import re

import benchmark_data


def test_data_on_a_small_source(tmp_path, capsys):
    paths = benchmark_data.make_source(tmp_path)
    for path in paths[1:]:
        path.unlink()
    assert benchmark_data.main([f"--source={paths[0]}", "--rounds=1", "--repeats=1"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"1 files, [\d.]+ MB of text all kept, equal ids", printed)
    assert re.search(r"ours +[\d.]+ +[\d.]+ to [\d.]+ +[\d.]+ +[\d.]+ +\d+\n", printed)
