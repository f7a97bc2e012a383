"""Training on a cluster: the scripts start the command that there is, once a machine."""

import argparse
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from mm_gpt.commands.train import COMMANDS

FOLDER = Path(__file__).parent.parent / "examples/cluster"
TRAIN = ["tiny", "--data", "/shared/pictures", "--out", "/shared/runs/tiny", "train.steps=20"]


@pytest.fixture
def tools(tmp_path: Path) -> dict[str, str]:
    """An environment in which the cluster's programs and torchrun only say what they were asked for."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "srun": 'shift; exec "$@"',  # after its one option
        "scontrol": f'echo "$@" >> {tmp_path}/scontrol; [ "$1" != show ] || printf "first\\nsecond\\n"',
        "scancel": f'echo "$@" > {tmp_path}/scancel',
        "torchrun": f'''printf "%s\\n" "$@" > {tmp_path}/torchrun
            if [ -n "${{OUT_OF_TIME:-}}" ]; then
                kill -USR1 "$PPID"
                while [ ! -s {tmp_path}/scancel ]; do sleep 0.02; done
                sleep 0.2 # it saves
                touch {tmp_path}/saved
            fi
            exit "${{STATUS:-0}}"''',
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_ID": "17",
        "SKYPILOT_NODE_IPS": "first\nsecond",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    }


def check_command(words: list[str]) -> None:
    """torchrun and `mm-gpt train` both understand their part of it."""
    launch = get_args_parser().parse_args(words)
    assert (launch.nnodes, launch.nproc_per_node, launch.rdzv_endpoint) == ("2", "8", "first:29500")
    assert (launch.module, launch.training_script) == (True, "mm_gpt")
    name, *rest = launch.training_script_args
    parser = argparse.ArgumentParser(exit_on_error=False)
    COMMANDS[name].add_arguments(parser)
    chosen = parser.parse_intermixed_args(rest)
    assert chosen.recipe == "tiny"
    assert chosen.overrides == ["train.steps=20"]
    assert str(chosen.out) == "/shared/runs/tiny"
    assert chosen.resume


def test_slurm(tools: dict[str, str], tmp_path: Path) -> None:
    script = FOLDER / "slurm.sh"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in script.read_text().splitlines()
        if line.startswith("#SBATCH")
    )
    assert options["ntasks-per-node"] == "1"  # torchrun starts the others
    assert options["signal"].startswith("B:USR1@")
    subprocess.run([script, *TRAIN], env=tools, check=True)
    check_command((tmp_path / "torchrun").read_text().splitlines())


@pytest.mark.parametrize("status", [0, 1])
def test_slurm_does_not_repeat_what_has_ended(tools: dict[str, str], tmp_path: Path, status: int) -> None:
    """What fails would fail for ever."""
    ended = subprocess.run([FOLDER / "slurm.sh", *TRAIN], env=tools | {"STATUS": str(status)})
    assert ended.returncode == status
    assert "requeue" not in (tmp_path / "scontrol").read_text()


def test_slurm_lets_a_run_save_before_its_time_is_up(tools: dict[str, str], tmp_path: Path) -> None:
    """And queues it again: torchrun itself ends with 1."""
    ended = subprocess.run([FOLDER / "slurm.sh", *TRAIN], env=tools | {"STATUS": "1", "OUT_OF_TIME": "1"}, timeout=60)
    assert ended.returncode == 1
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "scancel").read_text().split() == ["--signal=TERM", "17"]
    assert (tmp_path / "scontrol").read_text().splitlines()[-1] == "requeue 17"


def test_skypilot(tools: dict[str, str], tmp_path: Path) -> None:
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    assert task["num_nodes"] == 2
    assert "/shared" in task["volumes"]
    assert all(word.startswith("/shared") for word in task["envs"]["TRAIN"].split() if word.startswith("/"))
    home = tmp_path / "home/mm-gpt"
    home.mkdir(parents=True)
    (home / "bin").symlink_to(tmp_path / "bin")
    environment = tools | {"HOME": str(tmp_path / "home"), "TRAIN": " ".join(TRAIN)}
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)
    subprocess.run(["bash", "-euo", "pipefail"], input=task["run"], text=True, env=environment, check=True)
    check_command((tmp_path / "torchrun").read_text().splitlines())
