"""kill -9 in the middle of every training stage, then the same command: the same bytes as a run left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tiny

COMMON = [
    "--max_length", "128", "--disable_progress", "true", "--logging_steps", "2", "--save_steps", "3",
    "--max_steps", "8", "--learning_rate", "1e-3",
]  # fmt: skip
STAGES = {
    "sft": ["sft", "--dataset_name", "sft.jsonl", "--gradient_accumulation_steps", "2"],
    "reward": ["reward", "--dataset_name", "pairs.jsonl", "--gradient_accumulation_steps", "2",
               "--num_train_epochs", "9", "--per_device_train_batch_size", "2", "--lm_loss_weight", "0.1"],
    "grpo": ["grpo", "--dataset_name", "prompts.jsonl", "--reward_funcs", "rewards.py:length", "--kl_top_k", "32",
             "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--num_iterations", "2",
             "--max_completion_length", "6", "--ptx_dataset_name", "sft.jsonl", "--ptx_kl_weight", "0.1",
             "--reward_std_floor", "0.1", "--num_train_epochs", "9"],
    "pas": ["pas", "--dataset_name", "pas.jsonl", "--gradient_accumulation_steps", "2", "--max_length", "300"],
}  # fmt: skip
KILLED_AT_STEP = 5  # not a multiple of save_steps, nor of logging_steps, nor of num_iterations

# Runs the command line and kills its own process, as hard as it goes, when it has taken KILLED_AT_STEP steps.
KILLER = """
import os, signal, sys
from nova_train import loop
from nova_train.__main__ import main
step = loop.train_step
def deadly(run):
    if run.step == int(os.environ["KILLED_AT_STEP"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(run)
loop.train_step = deadly
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    tiny.save_model(folder / "model")
    tiny.sft_file(folder / "sft.jsonl")
    tiny.pair_file(folder / "pairs.jsonl")
    tiny.prompt_file(folder / "prompts.jsonl")
    tiny.pas_file(folder / "pas.jsonl")
    (folder / "rewards.py").write_text(
        "def length(prompts, completions, **columns):\n    return [float(len(c[0]['content'])) for c in completions]\n"
    )
    return folder


# One loop runs all stages: one of them in every run of the tests.
@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=() if stage == "sft" else pytest.mark.slow) for stage in STAGES]
)
def test_a_killed_run_continues_byte_for_byte(folder: Path, stage: str) -> None:
    def run(output: str, *, killed_at: int = -1) -> int:
        arguments = list(STAGES[stage])
        rest = [word for word in COMMON if True]
        for flag in set(arguments) & set(rest):  # a stage's own value wins
            place = rest.index(flag)
            if flag.startswith("--"):
                del rest[place : place + 2]
        command = [*arguments, *rest, "--model_name_or_path", "model", "--output_dir", output]
        environment = {**os.environ, "KILLED_AT_STEP": str(killed_at), "PYTHONPATH": os.getcwd()}
        return subprocess.run([sys.executable, "-c", KILLER, *command], cwd=folder, env=environment).returncode

    killed, whole = f"{stage}-killed", f"{stage}-whole"
    assert run(killed, killed_at=KILLED_AT_STEP) == -signal.SIGKILL
    assert (folder / killed / "checkpoint-3").is_dir() and not (folder / killed / "finished.json").exists()
    assert run(killed) == 0
    assert run(whole) == 0
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (folder / killed / name).read_bytes() == (folder / whole / name).read_bytes(), name
