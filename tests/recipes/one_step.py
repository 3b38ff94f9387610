"""One optimisation step of a tiny model on fixed rows; prints a digest of loss sums and weights. Run alone or by
torchrun."""

import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "embedded"))

import mix
import objective
import parallel
import train
from data import Branch, Row
from model import Model, Shape

rank, world = parallel.start()
rng = random.Random(1)


def ids(n: int) -> list[int]:
    return [rng.randrange(3, 90) for _ in range(n)]


rows = []
for factor in (None, 2.0, 4.0, None, 3.0):
    content = ids(12)
    branches = [Branch(ids(7), 4, "answer"), Branch(ids(5), 2, "answer")]
    if factor:
        branches.append(Branch([91, *content, 2], 1, "reconstruct"))
    rows.append(Row([1], [(content, factor)], branches, language_model=1.0 if factor is None else 0.0))
torch.manual_seed(0)
model = Model(Shape(vocab_size=90, hidden_size=32, num_layers=4, num_heads=4, intermediate_size=48, lora_rank=4))
with torch.no_grad():
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.1)
optimizers = train.make_optimizers(model, "joint", train.Schedule())
outcome = objective.forward(model, parallel.share(rows, [mix.cost(r) for r in rows], rank, world), [3], naming=0.5)
outcome.loss.backward()
parallel.sum_gradients(model.parameters())
gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
for optimizer in optimizers:
    optimizer.step()
if rank == 0:
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    print(world, *(f"{outcome.sums[k]:.4f}" for k in ("answer", "reconstruct", "lm")), outcome.counts["answer"],
          f"{float(gradient.norm()):.5f}", f"{float(weights.norm()):.6f}")
