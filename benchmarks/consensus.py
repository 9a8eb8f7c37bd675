"""Time the utilities and the states of consensus decoding beside the sampling of the candidates.

python benchmarks/consensus.py runs/quickstart
python benchmarks/consensus.py runs/iu_xray_small --candidates 32 --studies 8
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from otdrg.bank_otdrg import ReportBank
from otdrg.inference.collation import PromptCollator
from otdrg.inference.loading import consensus_decoder, load_published
from otdrg.training.data import bank_studies
from otdrg.training.recipe import published_recipe


def main() -> None:
    """Print seconds per study of sampling and of ranking, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a run with a recipe, whose training reports are the bank")
    parser.add_argument("--candidates", type=int, default=32, metavar="N")
    parser.add_argument("--studies", type=int, default=4, metavar="N", help="studies in the batch (default: 4)")
    parser.add_argument("--max-new-tokens", type=int, default=60, metavar="N")
    options = parser.parse_args()
    model, processor = load_published(options.model)
    studies = bank_studies(None, published_recipe(options.model))
    rows = [studies[place] for place in range(options.studies)]
    batch = PromptCollator(processor)(rows)
    prompt = {name: batch.pop(name) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        study = model.read_study(**batch)
    # Weights come from random features: the time does not depend on them.
    reports, size = list(studies["report"]), study.view_features.shape[-1]
    bank = ReportBank(reports, np.random.default_rng(0).normal(size=(len(reports), size)))
    decoder = consensus_decoder(model, processor, options.candidates, bank)
    start = time.perf_counter()
    bank.own_utilities()
    print(f"{len(bank)} distinct reports; utilities of all pairs, once: {time.perf_counter() - start:.2f} s")
    start = time.perf_counter()
    samples = decoder.sample(model, processor, prompt, study, {"max_new_tokens": options.max_new_tokens})
    sampling = (time.perf_counter() - start) / options.studies
    weights = bank.weights(np.random.default_rng(1).normal(size=(options.studies, size)))
    decoder.rank(samples[0], np.zeros(14), weights[0])  # reads the states of the bank, once
    start = time.perf_counter()
    for row, texts in enumerate(samples):
        decoder.rank(texts, np.zeros(14), weights[row])
    ranking = (time.perf_counter() - start) / options.studies
    pairs = len({text for text, _ in samples[0]}) * len(bank)
    print(f"sampling {options.candidates} candidates: {sampling:.3f} s a study")
    print(f"utilities and states: {ranking:.3f} s a study ({1e6 * ranking / pairs:.2f} µs a pair)")
    print(f"utilities / sampling: {ranking / sampling:.3f}")


if __name__ == "__main__":
    main()
