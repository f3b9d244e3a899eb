"""One of two ranks: the bytes alive at the peak of a real update with FSDP, for test_plan.py."""

import sys

import plan_cases
import torch

from nanolmmr1.model.qwen import Qwen25VL
from nanolmmr1.parallel import dist, fsdp

how, images = sys.argv[1], int(sys.argv[2])
dist.start("cpu", 60)
cfg, model_cfg, pack = plan_cases.case(2, how, images)
with torch.device("meta"):
    model = Qwen25VL(model_cfg)
fsdp.shard(model, dist.mesh("cpu", "all", 60), torch.float32)
model.to_empty(device="cpu")
with torch.no_grad():
    for parameter in model.parameters():
        parameter.to_local().fill_(0.01)
peak = plan_cases.real_update(cfg, model, pack, torch.float32)
if dist.rank() == 0:
    print("peak", peak)
dist.leave()
