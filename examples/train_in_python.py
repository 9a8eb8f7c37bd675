"""Train from Python, without a recipe file.

python examples/train_in_python.py runs/python
"""

from __future__ import annotations

import argparse
import logging

from otdrg.training.recipe import recipe_from
from otdrg.training.run import run_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="folder of the run")
    parser.add_argument("--studies", type=int, default=400, help="training phantoms (default: 400)")
    parser.add_argument("--max-steps", type=int, default=100, help="steps of each stage (default: 100)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    # The keys are those of a recipe. The sections of the stages also take every field of TrainingArguments.
    phantoms = {
        "train": options.studies,
        "validation": max(2, options.studies // 20),
        "test": 0,
        "image_size": 112,
        "views": ["frontal"],
    }
    stage = {"max_steps": options.max_steps, "per_device_train_batch_size": 16, "learning_rate": 1e-3}
    recipe = recipe_from(
        {
            "output_dir": options.output,
            "stages": ["predictor", "report"],
            "studies": {"source": "phantom", "options": phantoms},
            "model": {"preset": "tiny", "overrides": {"ot_epsilon": 0.02, "ot_contrastive_weight": 1.0}},
            "predictor": {**stage, "vision": "full", "eval_strategy": "no"},
            "report": {
                **stage,
                "text": "full",
                "eval_strategy": "no",
                "generation": {"num_beams": 1, "max_new_tokens": 60},
                "evaluation": {"metrics": ["bleu_4", "rouge_l"], "controls": ["shuffled"]},
            },
        }
    )
    results = run_recipe(recipe)
    for row, scores in results["report"]["evaluation"]["rows"].items():
        print(f"{row}: BLEU-4 {scores['bleu_4']:.3f}, ROUGE-L {scores['rouge_l']:.3f}")
    print(f"the model is in {options.output}/model")


if __name__ == "__main__":
    main()
