"""C++ kernels for CPUs and the executor that runs a model's program on them.

`csrc/` holds the C++; `program.py` writes a program down, `describe.py` makes one from a model's
configuration, `weights.py` puts the weights into the kernels' layout, `reference/` says in plain
numpy what each operation is. The extension module `_kernels` is built by installing the package
where there is a compiler; `kernels.py` is its door.
"""
