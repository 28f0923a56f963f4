// Everything of one instruction set: included by path_*.cpp inside a namespace of its own, with the
// compiler told what it may use. All standard headers must be included before.

#include "math.h"
#include "prepare.h"
#include "embed.h"
#include "linear.h"
#include "experts.h"
#include "rope.h"
#include "attention.h"
#include "sampler_loops.h"
#include "machine_loops.h"

static const Kernels kKernels = {
    PATH_NAME, embed,     prepare, linear,  rope,       attend,    join_partitions, add_norm,
    norm_rows, gate,      softmax, add_scaled, add_gated, &kSamplerLoops, &kMachineLoops, false};
