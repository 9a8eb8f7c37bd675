"""Training steps of the quick start's size: reads lines, and for each makes four steps and writes their seconds."""

import os
import sys
import time
from itertools import repeat

import torch
from numpy.random import default_rng
from otdrg.studies.phantom import sample_states, write_report
from otdrg.training.model import build_model, set_trained_parts
from otdrg.training.recipe import ModelRecipe

torch.set_num_threads(int(os.environ.get("OTDRG_STEP_THREADS", "2")))
torch.manual_seed(0)
stream = default_rng(0)
states = [sample_states(stream) for _ in range(16)]
reports = [write_report(row, stream) for row in states]
model, processor = build_model(ModelRecipe(), reports)
frozen = set_trained_parts(model, vision="frozen", text="full", predictor="frozen", joining=True)
model.train()
for part in frozen:
    part.eval()
batch = processor.encode_text([1] * 16, report=reports, finding_states=[row.tolist() for row in states])
with torch.no_grad():
    batch["view_features"] = model.encode_views(torch.randn(16, 1, 3, 112, 112))
optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)

for _ in sys.stdin:
    start = time.perf_counter()
    for _ in repeat(None, 4):
        model(**model.expand_finding_text(**batch)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(time.perf_counter() - start, flush=True)
