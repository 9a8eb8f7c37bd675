# /// script
# requires-python = ">=3.11"
# dependencies = ["otdrg[metrics]"]
#
# [tool.uv]
# find-links = ["/wheels"]
# ///
"""Train a recipe on a machine of the Hugging Face Hub, and push the model of the stage `report` at its end.

pip wheel --no-deps --wheel-dir wheels .
hf jobs uv run --flavor l40sx1 --timeout 12h --secrets HF_TOKEN \
    --volume ./wheels:/wheels --volume ./recipes:/recipes --volume hf://datasets/org/studies:/studies \
    recipes/hf_job.py /recipes/own_data.yaml studies.options.folder=/studies --model org/otdrg
"""

from __future__ import annotations

import argparse
import subprocess
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run `train_hf.py` on all GPUs of the machine, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="YAML file with the stage report")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="fields to change")
    parser.add_argument("--model", required=True, help="repository on the Hub, created as a private one")
    options = parser.parse_intermixed_args(arguments)
    push = ["report.push_to_hub=true", f"report.hub_model_id={options.model}", "report.hub_private_repo=true"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "-m", "otdrg.train_hf"]
    return subprocess.run([*launch, options.recipe, *push, *options.overrides]).returncode


if __name__ == "__main__":
    sys.exit(main())
