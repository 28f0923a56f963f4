// The extension module llmserve.native._kernels, in Python's limited C API. Arrays come as buffers
// that numpy made contiguous (llmserve/native/{program,weights}.py). That they are as long as they
// have to be is checked here again, so that a short one is an exception and not a crash; ids, slots
// and addresses are believed.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "executor.h"
#include "machine.h"
#include "pack.h"
#include "paths.h"
#include "sampler_binding.h"

namespace {

using namespace llmserve;

constexpr const char* kCapsule = "llmserve.native.Executor";

// A borrowed view of an argument's memory, given back at the end of its scope.
class View {
 public:
  View() { std::memset(&buffer_, 0, sizeof buffer_); }
  ~View() {
    if (buffer_.obj != nullptr) PyBuffer_Release(&buffer_);
  }
  View(const View&) = delete;
  View& operator=(const View&) = delete;
  View(View&& other) noexcept : buffer_(other.buffer_) { other.buffer_.obj = nullptr; }

  Py_buffer* raw() { return &buffer_; }
  bool get(PyObject* object, int flags = PyBUF_SIMPLE) {
    return PyObject_GetBuffer(object, &buffer_, flags) == 0;
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(buffer_.buf);
  }
  template <typename T>
  int64_t count() const {
    return static_cast<int64_t>(buffer_.len) / static_cast<int64_t>(sizeof(T));
  }

 private:
  Py_buffer buffer_;
};

// Does some work without the interpreter's lock. False, with an exception, where memory ran out.
template <typename Work>
bool unlocked(Work work) {
  bool has_memory = true;
  Py_BEGIN_ALLOW_THREADS
  try {
    work();
  } catch (const std::bad_alloc&) {
    has_memory = false;
  }
  Py_END_ALLOW_THREADS
  if (!has_memory) PyErr_NoMemory();
  return has_memory;
}

PyObject* fail(const char* message) {
  PyErr_SetString(PyExc_ValueError, message);
  return nullptr;
}

PyObject* paths(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const char* name : {"amx", "avx512", "avx2", "neon", "portable"}) {
    if (find_kernels(name) == nullptr) continue;
    PyObject* text = PyUnicode_FromString(name);
    PyList_Append(names, text);
    Py_DECREF(text);
  }
  return names;
}

Executor* executor_of(PyObject* capsule) {
  return static_cast<Executor*>(PyCapsule_GetPointer(capsule, kCapsule));
}

void destroy(PyObject* capsule) { delete executor_of(capsule); }

template <typename T>
T* address(int64_t value) {
  return reinterpret_cast<T*>(value);
}

std::vector<Op> read_ops(const View& codes, const View& reals) {
  constexpr int kColumns = kArguments + 2;
  std::vector<Op> ops(static_cast<size_t>(codes.count<int64_t>() / kColumns));
  for (size_t i = 0; i < ops.size(); ++i) {
    const int64_t* row = codes.as<int64_t>() + i * kColumns;
    ops[i].code = static_cast<Code>(row[0]);
    ops[i].domain = static_cast<Domain>(row[1]);
    std::memcpy(ops[i].a, row + 2, sizeof ops[i].a);
    std::memcpy(ops[i].r, reals.as<double>() + i * 4, sizeof ops[i].r);
  }
  return ops;
}

std::vector<Linear> read_linears(const View& table) {
  constexpr int kColumns = 12;
  std::vector<Linear> linears(static_cast<size_t>(table.count<int64_t>() / kColumns));
  for (size_t i = 0; i < linears.size(); ++i) {
    const int64_t* row = table.as<int64_t>() + i * kColumns;
    linears[i] = {static_cast<WeightKind>(row[0]), row[1] != 0, row[2], row[3], row[4], row[5],
                  row[6], address<const uint8_t>(row[7]), address<const uint8_t>(row[8]),
                  static_cast<Number>(row[9]), address<const uint8_t>(row[10]),
                  address<const float>(row[11])};
  }
  return linears;
}

std::vector<Slot> read_slots(const View& table) {
  constexpr int kColumns = 9;
  std::vector<Slot> slots(static_cast<size_t>(table.count<int64_t>() / kColumns));
  for (size_t i = 0; i < slots.size(); ++i) {
    const int64_t* row = table.as<int64_t>() + i * kColumns;
    slots[i] = {static_cast<Domain>(row[0]), row[1], row[2], row[3], row[4], row[5], row[6],
                row[7], address<const int32_t>(row[8])};
  }
  return slots;
}

// new(path, threads, geometry, ops, reals, linears, buffers, slots, layer_groups, windows, adapters)
PyObject* executor_new(PyObject*, PyObject* args) {
  const char* path;
  int threads;
  View geometry, codes, reals, linears, buffers, slots, groups, windows, adapters;
  if (!PyArg_ParseTuple(args, "siy*y*y*y*y*y*y*y*y*", &path, &threads, geometry.raw(), codes.raw(),
                        reals.raw(), linears.raw(), buffers.raw(), slots.raw(), groups.raw(),
                        windows.raw(), adapters.raw()))
    return nullptr;
  const Kernels* kernels = find_kernels(path);
  if (kernels == nullptr) return fail("this processor does not have the instruction set");
  if (threads < 1 || geometry.count<int64_t>() != 7) return fail("malformed program");
  Geometry shape;
  std::memcpy(&shape, geometry.as<int64_t>(), sizeof shape);
  if (shape.head_dim > 256) return fail("heads wider than 256 are not supported");
  std::vector<Buffer> memory;
  for (int64_t i = 0; i + 1 < buffers.count<int64_t>(); i += 2)
    memory.push_back({buffers.as<int64_t>()[i],
                      static_cast<Domain>(buffers.as<int64_t>()[i + 1]), {}});
  const int64_t* g = groups.as<int64_t>();
  const int64_t* w = windows.as<int64_t>();
  const int64_t* l = adapters.as<int64_t>();
  try {
    Executor* executor = new Executor(
        *kernels, threads, shape, read_ops(codes, reals), read_linears(linears), std::move(memory),
        read_slots(slots), {g, g + groups.count<int64_t>()}, {w, w + windows.count<int64_t>()},
        {l, l + adapters.count<int64_t>()});
    return PyCapsule_New(executor, kCapsule, destroy);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_MemoryError, error.what());
    return nullptr;
  }
}

// set_cache(executor, addresses int64 [layers], kind, block_size)
PyObject* set_cache(PyObject*, PyObject* args) {
  PyObject* capsule;
  View addresses;
  long long kind, block_size, num_kv_heads, head_dim;
  if (!PyArg_ParseTuple(args, "Oy*LLLL", &capsule, addresses.raw(), &kind, &block_size,
                        &num_kv_heads, &head_dim))
    return nullptr;
  Executor* executor = executor_of(capsule);
  if (executor == nullptr) return nullptr;
  if (block_size < 16 || block_size % 16 != 0) return fail("blocks must be multiples of 16 tokens");
  std::vector<LayerCache> layers;
  for (int64_t i = 0; i < addresses.count<int64_t>(); ++i)
    layers.push_back({address<uint8_t>(addresses.as<int64_t>()[i]), static_cast<Number>(kind),
                      block_size, num_kv_heads, head_dim});
  executor->set_cache(std::move(layers));
  Py_RETURN_NONE;
}

// set_rope_table(executor, index, address)
PyObject* set_rope_table(PyObject*, PyObject* args) {
  PyObject* capsule;
  long long index, table;
  if (!PyArg_ParseTuple(args, "OLL", &capsule, &index, &table)) return nullptr;
  Executor* executor = executor_of(capsule);
  if (executor == nullptr) return nullptr;
  executor->set_rope_table(index, address<const float>(table));
  Py_RETURN_NONE;
}

PyObject* buffer_view(Executor* executor, int64_t index, int64_t rows) {
  const Buffer& buffer = executor->buffer(index);
  return PyMemoryView_FromMemory(reinterpret_cast<char*>(buffer.data.get()),
                                 static_cast<Py_ssize_t>(rows * buffer.width) * 4, PyBUF_WRITE);
}

// step(executor, token_ids, positions, cu_seqlens, context_lens, row_indices,
//      ((slots, tables, copies), ...), adapter_ids or None, vocab_size,
//      (constants, positions, edits, ids, is_usable, logprob, num_top, top_ids, top_logprobs),
//      num_rounds, ends): rounds computed; ids and is_usable have room for all of them
PyObject* step(PyObject*, PyObject* args) {
  PyObject *capsule, *groups, *sampling, *adapters;
  View ids, positions, offsets, lengths, rows, adapter_ids, ends;
  long long vocab_size, num_rounds;
  if (!PyArg_ParseTuple(args, "Oy*y*y*y*y*OOLOLy*", &capsule, ids.raw(), positions.raw(),
                        offsets.raw(), lengths.raw(), rows.raw(), &groups, &adapters, &vocab_size,
                        &sampling, &num_rounds, ends.raw()))
    return nullptr;
  if (adapters != Py_None && !adapter_ids.get(adapters)) return nullptr;
  Executor* executor = executor_of(capsule);
  if (executor == nullptr) return nullptr;
  StepInput input{};
  input.token_ids = ids.as<int64_t>();
  input.positions = positions.as<int64_t>();
  input.num_tokens = ids.count<int64_t>();
  input.cu_seqlens = offsets.as<int64_t>();
  input.context_lens = lengths.as<int64_t>();
  input.num_seqs = lengths.count<int64_t>();
  input.row_indices = rows.as<int64_t>();
  input.num_rows = rows.count<int64_t>();
  input.adapter_ids = adapter_ids.as<int64_t>();
  if (adapters != Py_None && adapter_ids.count<int64_t>() != input.num_seqs)
    return fail("the adapters do not fit the sequences");
  if (positions.count<int64_t>() != input.num_tokens ||
      offsets.count<int64_t>() != input.num_seqs + 1 || input.num_seqs < 1)
    return fail("the step's arrays do not fit each other");
  if (num_rounds < 1 || (num_rounds > 1 && (sampling == Py_None ||
                                            input.num_tokens != input.num_seqs ||
                                            input.num_rows != input.num_seqs)))
    return fail("several rounds are for sequences with one token and one row each");
  const Py_ssize_t num_groups = PyTuple_Size(groups);
  if (num_groups < 0) return nullptr;
  std::vector<View> views(static_cast<size_t>(3 * num_groups));
  for (Py_ssize_t i = 0; i < num_groups; ++i) {
    PyObject* group = PyTuple_GetItem(groups, i);
    for (Py_ssize_t j = 0; j < 3; ++j) {
      PyObject* array = group == nullptr ? nullptr : PyTuple_GetItem(group, j);
      if (array == nullptr || !views[static_cast<size_t>(3 * i + j)].get(array)) return nullptr;
    }
    const View* view = &views[static_cast<size_t>(3 * i)];
    if (view[0].count<int64_t>() != input.num_tokens) return fail("a slot mapping does not fit");
    input.groups.push_back({view[0].as<int64_t>(), view[1].as<int64_t>(),
                            view[1].count<int64_t>() / input.num_seqs, view[2].as<int64_t>(),
                            view[2].count<int64_t>() / 2});
    const int64_t room = input.groups.back().table_width * executor->block_size();
    for (int64_t s = 0; num_rounds > 1 && s < input.num_seqs; ++s)
      if (input.positions[s] + num_rounds > room) return fail("a table has no block for a round");
  }
  std::vector<SampleRow> how;
  std::vector<View> buffers(9);
  SampleStep sample{};
  if (sampling != Py_None) {
    for (Py_ssize_t i = 0; i < 9; ++i) {
      PyObject* object = PyTuple_GetItem(sampling, i);
      if (object == nullptr ||
          !buffers[static_cast<size_t>(i)].get(object, i < 3 ? PyBUF_SIMPLE : PyBUF_WRITABLE))
        return nullptr;
    }
    const PackedRows packed{buffers[0].as<uint8_t>(), static_cast<size_t>(buffers[0].count<uint8_t>()),
                            buffers[1].as<int64_t>(), static_cast<size_t>(input.num_rows),
                            buffers[2].as<int32_t>(), static_cast<size_t>(buffers[2].count<int32_t>())};
    const int64_t count = input.num_rows;
    if (buffers[1].count<int64_t>() != count ||
        buffers[3].count<int64_t>() != count * num_rounds ||
        buffers[4].count<uint8_t>() != count * num_rounds || buffers[5].count<double>() != count ||
        buffers[6].count<int32_t>() != count)
      return fail("the buffers of the rows do not have the same number of rows");
    const char* fault = decode_rows(packed, vocab_size, how);
    if (fault != nullptr) return fail(fault);
    sample = {&how, buffers[3].as<int64_t>(), buffers[4].as<uint8_t>(),
              {buffers[5].as<double>(), buffers[6].as<int32_t>(), buffers[7].as<int32_t>(),
               buffers[8].as<double>()},
              count == 0 ? 0 : buffers[7].count<int32_t>() / count};
    for (const SampleRow& row : how)
      if (sample.width < std::min<int64_t>(row.num_logprobs, vocab_size))
        return fail("a row asks for more log-probabilities than its buffer holds");
  }
  const Rounds rounds{num_rounds, ends.as<int64_t>(), ends.count<int64_t>()};
  int64_t done = 0;
  if (!unlocked([&] { done = executor->step(input, sample, rounds); })) return nullptr;
  return PyLong_FromLongLong(done);
}

// head(executor, row_indices, buffer): logits of other rows of the last step
PyObject* head(PyObject*, PyObject* args) {
  PyObject* capsule;
  View rows;
  long long index;
  if (!PyArg_ParseTuple(args, "Oy*L", &capsule, rows.raw(), &index)) return nullptr;
  Executor* executor = executor_of(capsule);
  if (executor == nullptr) return nullptr;
  const int64_t count = rows.count<int64_t>();
  if (!unlocked([&] { executor->head(rows.as<int64_t>(), count); })) return nullptr;
  return buffer_view(executor, index, count);
}

// hidden(executor, row_indices, buffer): final hidden states of rows of the last step
PyObject* hidden(PyObject*, PyObject* args) {
  PyObject* capsule;
  View rows;
  long long index;
  if (!PyArg_ParseTuple(args, "Oy*L", &capsule, rows.raw(), &index)) return nullptr;
  Executor* executor = executor_of(capsule);
  if (executor == nullptr) return nullptr;
  const int64_t count = rows.count<int64_t>();
  if (!unlocked([&] { executor->hidden(rows.as<int64_t>(), count); })) return nullptr;
  return buffer_view(executor, index, count);
}

// buffer(executor, index, rows): for tests
PyObject* buffer(PyObject*, PyObject* args) {
  PyObject* capsule;
  long long index, rows;
  if (!PyArg_ParseTuple(args, "OLL", &capsule, &index, &rows)) return nullptr;
  Executor* executor = executor_of(capsule);
  if (executor == nullptr) return nullptr;
  return buffer_view(executor, index, rows);
}

bool parse_shape(PyObject* numbers, Shape* shape, Placement* placement) {
  long long values[6];
  if (PyTuple_Size(numbers) != 6) {
    if (PyErr_Occurred() == nullptr) fail("a shape is six numbers");
    return false;
  }
  for (int i = 0; i < 6; ++i) {
    PyObject* item = PyTuple_GetItem(numbers, i);
    if (item == nullptr) return false;
    values[i] = PyLong_AsLongLong(item);
    if (PyErr_Occurred() != nullptr) return false;
  }
  *shape = {values[0], values[1], values[2], values[3]};
  *placement = {values[4], values[5]};
  return true;
}

struct PackPlan {  // bytes that a packing reads, and writes for each block of 16 outputs
  int64_t source_bytes, value_bytes, scale_bytes;
};

// source_bytes is -1 for a name that is none.
PackPlan plan_of(const std::string& kind, const Shape& shape, Number source) {
  const int64_t weights = shape.out * shape.width, inputs = shape.num_groups() * shape.padded_group;
  const int64_t scales = shape.out * shape.num_groups(), per_block = 16 * shape.num_groups();
  const int64_t number_bytes = source == Number::kFloat32 ? 4 : 2;
  if (kind == "words") return {shape.out * ((shape.width + 7) / 8) * 4, 8 * inputs, 0};
  if (kind == "int4") return {weights, 8 * inputs, 0};
  if (kind == "int8") return {weights, 16 * inputs, 0};
  if (kind == "float32") return {weights * number_bytes, 64 * shape.width, 0};
  if (kind == "bfloat16") return {weights * number_bytes, 64 * ((shape.width + 1) / 2), 0};
  if (kind == "scales-float32") return {4 * scales, 4 * per_block, 0};
  if (kind == "scales-bfloat16") return {4 * scales, 2 * per_block, 0};
  if (kind == "zeros") return {scales, per_block, 0};
  if (kind == "quantize-int4") return {weights * number_bytes, 8 * inputs, 4 * per_block};
  if (kind == "quantize-int8") return {weights * number_bytes, 16 * inputs, 4 * per_block};
  return {-1, 0, 0};
}

// The block after the last that a matrix has a row in.
int64_t end_block(const Shape& shape, const Placement& placement) {
  return shape.out == 0 ? 0 : placement.place(shape.out - 1) / 16 + 1;
}

// pack(kind, shape, source, source kind, order, values, scales): kind is one of words, int4, int8,
// float32, bfloat16, scales-float32, scales-bfloat16, zeros, quantize-int4, quantize-int8
PyObject* pack(PyObject*, PyObject* args) {
  const char* name;
  PyObject *numbers, *order_object;
  View source, values, scales, order;
  long long number;
  if (!PyArg_ParseTuple(args, "sOy*LOw*w*", &name, &numbers, source.raw(), &number, &order_object,
                        values.raw(), scales.raw()))
    return nullptr;
  Shape shape;
  Placement placement;
  if (!parse_shape(numbers, &shape, &placement)) return nullptr;
  if (order_object != Py_None && !order.get(order_object)) return nullptr;
  const std::string kind = name;
  const PackPlan plan = plan_of(kind, shape, static_cast<Number>(number));
  if (plan.source_bytes < 0) return fail("there is no packing of that name");
  if (source.count<uint8_t>() < plan.source_bytes)
    return fail("there are fewer weights than the shape says");
  if (order_object != Py_None && order.count<int32_t>() < shape.width)
    return fail("the order has fewer entries than there are inputs");
  const int64_t blocks = end_block(shape, placement);
  if (values.count<uint8_t>() < blocks * plan.value_bytes ||
      scales.count<uint8_t>() < blocks * plan.scale_bytes)
    return fail("the packed weights do not fit the memory given");
  uint8_t* out = values.as<uint8_t>();
  const Number source_kind = static_cast<Number>(number);
  bool is_finite = true;
  const auto work = [&] {
    if (kind == "words") pack_words(source.as<uint32_t>(), shape, placement, out);
    else if (kind == "int4" || kind == "int8")
      pack_integers(source.as<int8_t>(), kind == "int4" ? 4 : 8, shape, placement,
                    order.as<int32_t>(), out);
    else if (kind == "float32" || kind == "bfloat16")
      pack_floats(source.as<void>(), source_kind, shape, placement, kind == "bfloat16", out);
    else if (kind == "scales-float32" || kind == "scales-bfloat16")
      pack_scales(source.as<float>(), shape, placement, kind == "scales-bfloat16", out);
    else if (kind == "zeros") pack_zeros(source.as<uint8_t>(), shape, placement, out);
    else
      is_finite = quantize_floats(source.as<void>(), source_kind, kind == "quantize-int4" ? 4 : 8,
                                  shape, placement, out, scales.as<float>());
  };
  if (!unlocked(work)) return nullptr;
  return PyBool_FromLong(is_finite ? 1 : 0);
}

// measure_machine(path, threads, memory): bytes read and multiply-adds of int4 and int8 dot products
// and of float32, per second
PyObject* py_measure_machine(PyObject*, PyObject* args) {
  const char* path;
  int threads;
  View memory;
  if (!PyArg_ParseTuple(args, "siy*", &path, &threads, memory.raw())) return nullptr;
  const Kernels* kernels = find_kernels(path);
  if (kernels == nullptr) return fail("this processor does not have the instruction set");
  if (threads < 1 || memory.count<uint8_t>() == 0) return fail("no threads or no memory");
  MachineRates rates{};
  const auto work = [&] {
    rates = measure_machine(*kernels, threads, memory.as<uint8_t>(), memory.count<uint8_t>());
  };
  if (!unlocked(work)) return nullptr;
  return Py_BuildValue("dddd", rates.read_bytes, rates.int4_dots, rates.int8_dots, rates.floats);
}

PyMethodDef kMethods[] = {
    {"paths", paths, METH_NOARGS, "Names of the instruction sets to be had, best first."},
    {"new", executor_new, METH_VARARGS, "An executor of a program."},
    {"set_cache", set_cache, METH_VARARGS, "Says where keys and values are."},
    {"set_rope_table", set_rope_table, METH_VARARGS, "Says where cosines and sines are."},
    {"step", step, METH_VARARGS, "Runs one step and draws its tokens."},
    {"sample", py_sample, METH_VARARGS, "Draws tokens from logits."},
    {"weigh", py_weigh, METH_VARARGS, "Weights of logits."},
    {"prompt_logprobs", py_prompt_logprobs, METH_VARARGS, "Log-probabilities of given ids."},
    {"head", head, METH_VARARGS, "Logits of other rows of the last step."},
    {"hidden", hidden, METH_VARARGS, "Final hidden states of rows of the last step."},
    {"buffer", buffer, METH_VARARGS, "A view of one of the executor's buffers."},
    {"measure_machine", py_measure_machine, METH_VARARGS, "What the machine can do at most."},
    {"pack", pack, METH_VARARGS, "Puts weights into the kernels' layout."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_kernels",
                       "C++ kernels and the executor of llmserve's native runner.", -1, kMethods,
                       nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__kernels() { return PyModule_Create(&kModule); }
