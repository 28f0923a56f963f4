"""What each operation of the native runner is, in plain numpy: the oracle of its tests.

Two kinds. Where the order of float32 operations is part of the contract (products, quantization,
rotation, what the cache stores), a function gives the very bits that every instruction set must
give. Elsewhere (norms, activations, attention, experts) it is the definition in float64, and a
function beside it the bound of the kernels' error. `U` below is half a unit in the last place of a
float32 at 1, 2**-24.
"""
