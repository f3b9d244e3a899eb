"""`nanolmmr1.kernels` is the top-level `kernels/` folder.

That folder has no `__init__.py` on purpose: the import name `kernels` belongs to Hugging Face's
package, which transformers imports when it is installed, and ours must never shadow it.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "kernels")]
