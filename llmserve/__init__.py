"""Train a language model of your own, quantize it with proof, serve it on the machine you have."""

from pathlib import Path

__version__ = "0.1.0"

# In a bare clone the folders training, export, server and benchmarks lie beside this package;
# in a wheel they are inside it (docs/decisions/0001-package-layout.md).
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))
