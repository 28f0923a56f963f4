// The sampler for Python, for tests: llmserve/runners/native_sampling.py packs its arguments.
#pragma once
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

namespace llmserve {

// sample(path, logits, constants, positions, edits, token_ids, is_usable, logprobs, num_top,
//        top_ids, top_logprobs): logits float32 [R, V], changed; the buffers after `edits` are
// written: int64 [R], bool [R], float64 [R], int32 [R], int32 [R, K], float64 [R, K]. K is at
// least what any row asks for, or V.
PyObject* py_sample(PyObject* module, PyObject* args);

// prompt_logprobs(path, logits, targets, num_top_asked, logprobs, num_top, top_ids, top_logprobs):
// targets int64 [R]; the others as above.
PyObject* py_prompt_logprobs(PyObject* module, PyObject* args);

// weigh(path, logits, largest, scale, steps, weights): float32 [V]; float64 and int64 [V] are
// written.
PyObject* py_weigh(PyObject* module, PyObject* args);

}  // namespace llmserve
