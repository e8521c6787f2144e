"""The demo's wiring; `make demo` itself takes minutes and is run by hand."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import demo
from common.settings import config_from_constants
from training.checks import check_arguments

ROOT = Path(demo.__file__).parent


@pytest.mark.parametrize("stage", range(len(demo.stages("data", "out"))))
def test_every_stage_is_a_script_that_knows_its_settings(stage):
    title, argv = demo.stages("data", "out")[stage]
    name = argv[1] if argv[0] == "-m" else argv[0].removesuffix(".py")
    argv = argv[2 if argv[0] == "-m" else 1 :]
    module = importlib.import_module(name)
    config = config_from_constants(vars(module), argv)  # refuses an unknown name or a wrong type
    if name == "train":
        check_arguments(argv, config.finetune)
    assert title and ROOT in Path(module.__file__).parents


def test_a_stage_that_fails_ends_the_demo_with_its_code(capsys):
    with pytest.raises(SystemExit) as end:
        demo.run_stage("Fail", ["-c", "raise SystemExit(7)"], "somewhere")
    assert end.value.code == 7 and "delete somewhere" in capsys.readouterr().out


def test_ctrl_c_lets_the_stage_finish_its_saving(tmp_path):
    """The terminal interrupts both; the demo must wait for what the stage still has to do."""
    stage = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(1)
    pathlib.Path("saved").touch()
    sys.exit(130)
signal.signal(signal.SIGINT, save)
pathlib.Path("ready").touch()
time.sleep(60)
"""
    (tmp_path / "stage.py").write_text(stage)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import demo\n"
    code += "demo.run_stage('Stage', ['stage.py'], 'out')"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, start_new_session=True)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130 and (tmp_path / "saved").exists()
