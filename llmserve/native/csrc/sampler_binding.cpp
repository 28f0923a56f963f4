#include "sampler_binding.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "paths.h"
#include "sampler.h"

namespace llmserve {
namespace {

// A buffer of the caller's, given back at the end. Beginnings are aligned, as numpy's and bytes'
// are, or `is_of` refuses them.
struct Held {
  Py_buffer view{};

  ~Held() {
    if (view.obj != nullptr) PyBuffer_Release(&view);
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(view.buf);
  }
  size_t bytes() const { return static_cast<size_t>(view.len); }
  size_t count(size_t item_bytes) const { return bytes() / item_bytes; }
  bool is_of(size_t num_items, size_t item_bytes) const {
    return bytes() == num_items * item_bytes &&
           reinterpret_cast<uintptr_t>(view.buf) % item_bytes == 0;
  }
};

// Where the log-probabilities of all rows go.
struct LogprobBuffers {
  Held logprobs, num_top, top_ids, top_logprobs;
  size_t width = 0;  // entries of a row

  bool fits(size_t num_rows) {
    width = num_rows == 0 ? 0 : top_ids.count(4) / num_rows;
    return logprobs.is_of(num_rows, 8) && num_top.is_of(num_rows, 4) &&
           top_ids.is_of(num_rows * width, 4) && top_logprobs.is_of(num_rows * width, 8);
  }
  bool has_room(int64_t num_asked, int64_t vocab_size) const {
    return static_cast<int64_t>(width) >= std::min(num_asked, vocab_size);
  }
  RowLogprobs row(size_t index) const {
    return {logprobs.as<double>() + index, num_top.as<int32_t>() + index,
            top_ids.as<int32_t>() + index * width, top_logprobs.as<double>() + index * width};
  }
};

PyObject* refuse(const char* message) {
  PyErr_SetString(PyExc_ValueError, message);
  return nullptr;
}

const SamplerLoops* find_loops(const char* path) {
  const Kernels* kernels = find_kernels(path);
  if (kernels == nullptr) {
    PyErr_Format(PyExc_ValueError, "this processor has no path called %s", path);
    return nullptr;
  }
  return kernels->sampler;
}

}  // namespace

PyObject* py_sample(PyObject*, PyObject* args) {
  const char* path;
  Held logits, constants, positions, edits, token_ids, is_usable;
  LogprobBuffers out;
  if (!PyArg_ParseTuple(args, "sw*y*y*y*w*w*w*w*w*w*", &path, &logits.view, &constants.view,
                        &positions.view, &edits.view, &token_ids.view, &is_usable.view,
                        &out.logprobs.view, &out.num_top.view, &out.top_ids.view,
                        &out.top_logprobs.view))
    return nullptr;
  const SamplerLoops* loops = find_loops(path);
  if (loops == nullptr) return nullptr;
  const size_t num_rows = positions.count(8);
  if (num_rows == 0) Py_RETURN_NONE;
  const size_t vocab_size = logits.count(4) / num_rows;
  if (!logits.is_of(num_rows * vocab_size, 4) || vocab_size == 0 || !positions.is_of(num_rows, 8) ||
      !token_ids.is_of(num_rows, 8) || !is_usable.is_of(num_rows, 1) || !out.fits(num_rows))
    return refuse("the buffers of the rows do not have the same number of rows");
  const auto width = static_cast<int64_t>(vocab_size);
  std::vector<SampleRow> rows;
  const PackedRows packed = {constants.as<uint8_t>(), constants.bytes(), positions.as<int64_t>(),
                             num_rows,                edits.as<int32_t>(), edits.count(4)};
  const char* fault = decode_rows(packed, width, rows);
  if (fault != nullptr) return refuse(fault);
  for (const SampleRow& row : rows)
    if (!out.has_room(row.num_logprobs, width))
      return refuse("a row asks for more log-probabilities than its buffer holds");
  Sampler sampler(*loops, width);
  Py_BEGIN_ALLOW_THREADS
  for (size_t i = 0; i < num_rows; ++i) {
    float* row_logits = logits.as<float>() + i * vocab_size;
    const int64_t id = sampler.draw(row_logits, rows[i]);
    token_ids.as<int64_t>()[i] = std::max<int64_t>(id, 0);
    is_usable.as<uint8_t>()[i] = id >= 0;
    if (id >= 0 && rows[i].num_logprobs >= 0)
      sampler.logprobs(row_logits, id, rows[i].num_logprobs, out.row(i));
  }
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

PyObject* py_prompt_logprobs(PyObject*, PyObject* args) {
  const char* path;
  Held logits, targets;
  long long num_asked;
  LogprobBuffers out;
  if (!PyArg_ParseTuple(args, "sy*y*Lw*w*w*w*", &path, &logits.view, &targets.view, &num_asked,
                        &out.logprobs.view, &out.num_top.view, &out.top_ids.view,
                        &out.top_logprobs.view))
    return nullptr;
  const SamplerLoops* loops = find_loops(path);
  if (loops == nullptr) return nullptr;
  const size_t num_rows = targets.count(8);
  if (num_rows == 0) Py_RETURN_NONE;
  const size_t vocab_size = logits.count(4) / num_rows;
  if (!logits.is_of(num_rows * vocab_size, 4) || vocab_size == 0 || !targets.is_of(num_rows, 8) ||
      !out.fits(num_rows))
    return refuse("the buffers of the rows do not have the same number of rows");
  const auto width = static_cast<int64_t>(vocab_size);
  if (num_asked < 0 || !out.has_room(num_asked, width))
    return refuse("more log-probabilities are asked for than the buffers hold");
  const int64_t* ids = targets.as<int64_t>();
  if (std::any_of(ids, ids + num_rows, [&](int64_t id) { return id < 0 || id >= width; }))
    return refuse("a target is not one of the vocabulary's ids");
  Sampler sampler(*loops, width);
  Py_BEGIN_ALLOW_THREADS
  for (size_t i = 0; i < num_rows; ++i)
    sampler.logprobs(logits.as<const float>() + i * vocab_size, ids[i], num_asked, out.row(i));
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

PyObject* py_weigh(PyObject*, PyObject* args) {
  const char* path;
  double largest, scale;
  Held logits, steps, weights;
  if (!PyArg_ParseTuple(args, "sy*ddw*w*", &path, &logits.view, &largest, &scale, &steps.view,
                        &weights.view))
    return nullptr;
  const SamplerLoops* loops = find_loops(path);
  if (loops == nullptr) return nullptr;
  const size_t count = logits.count(4);
  if (!logits.is_of(count, 4) || !steps.is_of(count, 8) || !weights.is_of(count, 8))
    return refuse("steps and weights are not as many as the logits");
  loops->weigh(logits.as<float>(), static_cast<int64_t>(count), largest, scale,
               steps.as<double>(), weights.as<int64_t>());
  Py_RETURN_NONE;
}

}  // namespace llmserve
