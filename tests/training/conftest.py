import os
import subprocess
import sys

import pytest
import yaml

TINY_RECIPE = {
    "studies": {
        "source": "phantom",
        "options": {"train": 16, "validation": 5, "test": 0, "image_size": 112, "views": ["frontal"]},
    },
    "model": {
        "vocab_size": 400,
        "overrides": {
            "image_tokens": 9,
            "ot_epsilon": 0.05,
            "vision_config": {
                "architecture": "swin_tiny_patch4_window7_224",
                "model_args": {
                    "img_size": 112,
                    "patch_size": 8,
                    "embed_dim": 8,
                    "depths": [1, 1],
                    "num_heads": [1, 2],
                    "window_size": 7,
                },
                "initializer_range": 0.2,
            },
            # Wide initial weights and a head of its own, so that what an untrained LLM writes depends on its prompt.
            "text_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "initializer_range": 0.3,
                "tie_word_embeddings": False,
            },
            "lora": {"r": 2, "lora_alpha": 2, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        },
    },
    "predictor": {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1},
    "report": {
        "max_steps": 4,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": None,
        "ot_weight_warmup": 0.5,
        "ot_epsilon_start": 0.2,
        "generation": {"num_beams": 1, "max_new_tokens": 12},
        "evaluation": {"split": "none"},
    },
}


def launch_processes(arguments, processes=2, **variables):
    """Python once for each process, as torchrun would start it."""
    port = 20000 + os.getpid() % 20000
    running = [
        subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **variables,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(processes)
    ]
    try:
        told = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), told
    return [out for out, _ in told]


@pytest.fixture(scope="session")
def launch():
    """A function that runs Python with its arguments in two processes and gives what each of them printed."""
    return launch_processes


@pytest.fixture(scope="session")
def tiny_dinov2():
    """`vision_config` of a DINOv2 with stochastic depth, whose weights have other names in files than in memory."""
    return {
        "model_type": "dinov2",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 112,
        "patch_size": 14,
        "drop_path_rate": 0.1,
    }


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory):
    """Path of a recipe that runs both stages in about a second."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    run = {"output_dir": str(path.parent / "run"), **TINY_RECIPE}
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def trained_run(tiny_recipe):
    """Folder of a finished run of `tiny_recipe`."""
    from otdrg.train_hf import main

    assert main([str(tiny_recipe)]) == 0
    return tiny_recipe.parent / "run"
