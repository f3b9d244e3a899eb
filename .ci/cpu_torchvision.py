"""Makes torchvision from PyPI importable beside a torch built for CPUs: run once with the environment's Python.

vLLM asks for torchvision, and PyPI's is built for CUDA: its compiled operators do not load, and its import ends with
"operator torchvision::nms does not exist". Nothing here calls them; it is enough to declare them before that import,
in child processes too. So this file copies itself into the environment, with a .pth file that imports it at start-up.
"""

import importlib.abc
import sys


class Declare(importlib.abc.MetaPathFinder):
    """Finds nothing; declares the operators when torchvision is about to be imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch
            from torch import library

            if torch.version.cuda is None:
                signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                for op in ("nms", "qnms"):
                    library.define(f"torchvision::{op}", signature)


if __name__ == "__main__":
    import shutil
    import sysconfig
    from pathlib import Path

    site = Path(sysconfig.get_path("purelib"))
    shutil.copyfile(__file__, site / "cpu_torchvision.py")
    (site / "cpu_torchvision.pth").write_text("import cpu_torchvision\n")
else:
    sys.meta_path.insert(0, Declare())
