#include "executor.h"

#include <algorithm>
#include <cstring>

namespace llmserve {
namespace {

// Rows times width up to which every thread prepares a product's input for itself: about a
// microsecond's work, less than meeting once more.
constexpr int64_t kPrivateValues = 8192;
// Bytes of activations that stay in a core's cache while weights pass by.
constexpr int64_t kRowBytes = 384 << 10;
// Bytes of weights below which taking an item costs more than it spares.
constexpr int64_t kLeastItemBytes = 16 << 10;
constexpr int64_t kItemsPerThread = 12;
constexpr int64_t kSlackValues = 64;  // values that kernels may touch behind a buffer

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const void* pointer(int64_t address) { return reinterpret_cast<const void*>(address); }

Norm norm_of(int64_t kind, int64_t weight, int64_t bias, double eps) {
  return {static_cast<NormKind>(kind), static_cast<const float*>(pointer(weight)),
          static_cast<const float*>(pointer(bias)), static_cast<float>(eps)};
}

int64_t weight_bytes(const Linear& w) {
  const int64_t inputs = w.num_groups * w.padded_group;
  const int64_t bits = w.kind == WeightKind::kFloat32 ? 32 : w.kind == WeightKind::kBfloat16 ? 16
                       : w.kind == WeightKind::kInt8  ? 8
                                                      : 4;
  return kPanelBlocks * 16 * inputs * bits / 8;
}

struct Grid {  // how a product is cut into items
  int64_t row_step, num_row_steps, panel_step, num_panel_steps, num_panels;
};

Grid grid_of(const Linear& w, int64_t num_rows, int threads) {
  Grid grid;
  grid.num_panels = ceil_div(w.num_blocks(), kPanelBlocks);
  const int64_t most = std::max<int64_t>(24, kRowBytes / std::max<int64_t>(1, w.width) / 6 * 6);
  grid.num_row_steps = ceil_div(num_rows, most);
  grid.row_step = ceil_div(num_rows, grid.num_row_steps);
  const int64_t wanted = std::max<int64_t>(1, kItemsPerThread * threads / grid.num_row_steps);
  // With many rows an item is long enough however few its weights.
  const int64_t least = ceil_div(ceil_div(kLeastItemBytes, num_rows), weight_bytes(w));
  grid.panel_step = std::max(least, ceil_div(grid.num_panels, wanted));
  grid.num_panel_steps = ceil_div(grid.num_panels, grid.panel_step);
  return grid;
}

}  // namespace

void PreparedRows::reserve(const Slot& slot, int64_t num_rows) {
  view = {};
  num_rows += kTileRows - 1;  // a tile of the matrix unit is read whole
  if (slot.has_values) {
    view.stride = slot.value_stride();
    view.values = values.renew(num_rows * view.stride + kSlackValues);
  }
  if (slot.has_integers) {
    view.digit_stride = slot.digit_stride();
    view.integer_stride = slot.num_digits * view.digit_stride;
    view.integers = integers.renew(num_rows * view.integer_stride + kSlackValues);
    view.scales = scales.renew(num_rows * slot.num_groups);
    view.sums = sums.renew(num_rows * slot.num_groups * slot.num_digits);
  }
  if (slot.has_parts) {
    view.part_stride = slot.part_stride();
    view.parts = parts.renew(num_rows * 2 * view.part_stride);
  }
}

Executor::Executor(const Kernels& kernels, int num_threads, const Geometry& geometry,
                   std::vector<Op> ops, std::vector<Linear> linears, std::vector<Buffer> buffers,
                   std::vector<Slot> slots, std::vector<int64_t> layer_groups,
                   std::vector<int64_t> windows, std::vector<int64_t> adapters)
    : kernels_(kernels),
      team_(num_threads, static_cast<int64_t>(ops.size())),
      geometry_(geometry),
      ops_(std::move(ops)),
      linears_(std::move(linears)),
      buffers_(std::move(buffers)),
      slots_(std::move(slots)),
      layer_groups_(std::move(layer_groups)),
      windows_(std::move(windows)),
      adapters_(std::move(adapters)),
      rope_tables_(2, nullptr),
      shared_(slots_.size()),
      private_(slots_.size() * static_cast<size_t>(num_threads)),
      made_(private_.size(), 0),
      scratch_(static_cast<size_t>(num_threads)),
      samplers_(static_cast<size_t>(num_threads)),
      items_(windows_.size()) {
  for (auto& one : scratch_)
    one.resize(static_cast<size_t>(attend_scratch(geometry_.head_dim)));
  std::vector<int64_t> last(slots_.size(), -1);
  prepared_by_.assign(ops_.size(), -1);
  for (size_t i = 0; i < ops_.size(); ++i) {
    if (ops_[i].code == Code::kPrepare) last[static_cast<size_t>(ops_[i].a[1])] = int64_t(i);
    const bool is_product = ops_[i].code == Code::kLinear || ops_[i].code == Code::kExperts;
    if (is_product || ops_[i].code == Code::kLora)
      prepared_by_[i] = last[static_cast<size_t>(ops_[i].a[0])];
    if (is_product && kernels_.has_parts &&
        linears_[static_cast<size_t>(ops_[i].a[1])].kind == WeightKind::kBfloat16)
      slots_[static_cast<size_t>(ops_[i].a[0])].has_parts = true;
  }
  for (size_t i = 0; i < private_.size(); ++i) {
    const Slot& slot = slots_[i % slots_.size()];
    private_[i].reserve(slot, std::max<int64_t>(1, kPrivateValues / slot.width));
  }
}

// A new cache begins a new use: buffers as large as some step tried before are given back.
void Executor::set_cache(std::vector<LayerCache> layers) {
  layers_ = std::move(layers);
  token_room_ = row_room_ = 0;
  for (Buffer& buffer : buffers_) buffer.data.reset();
  for (PreparedRows& rows : shared_) rows = {};
}

void Executor::set_rope_table(int64_t index, const float* table) {
  rope_tables_[static_cast<size_t>(index)] = table;
}

void Executor::reserve(int64_t num_tokens, int64_t num_rows) {
  const bool has_tokens = num_tokens <= token_room_, has_rows = num_rows <= row_room_;
  if (has_tokens && has_rows) return;
  token_room_ = std::max(num_tokens, token_room_);
  row_room_ = std::max(num_rows, row_room_);
  for (Buffer& buffer : buffers_) {
    if (buffer.domain == Domain::kRows ? has_rows : has_tokens) continue;
    const int64_t rows = room_of(buffer.domain);
    buffer.data.reset();
    buffer.data.renew(rows * buffer.width + kSlackValues);
  }
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].domain == Domain::kRows ? has_rows : has_tokens) continue;
    shared_[i].reserve(slots_[i], room_of(slots_[i].domain));
  }
}

int64_t Executor::step(const StepInput& input, const SampleStep& sampling, const Rounds& rounds) {
  input_ = input;
  sampling_ = sampling;
  row_indices_ = input.row_indices;
  num_rows_ = input.num_rows;
  reserve(input.num_tokens, input.num_rows);
  copy_blocks(input);
  plan_attention();
  run(true, true);
  has_ended_.assign(static_cast<size_t>(rounds.count > 1 ? num_rows_ : 0), 0);
  int64_t done = 1;
  for (; done < rounds.count && goes_on(rounds); ++done) {
    advance();
    plan_attention();
    run(true, true);
  }
  sampling_.rows = nullptr;
  return done;
}

// Whether there is something to draw after the round that was just computed.
bool Executor::goes_on(const Rounds& rounds) {
  const int64_t* last = rounds.ends + rounds.num_ends;
  bool is_over = true;
  for (int64_t row = 0; row < num_rows_; ++row) {
    if (!sampling_.is_usable[row]) return false;
    uint8_t& has_ended = has_ended_[static_cast<size_t>(row)];
    has_ended |= std::find(rounds.ends, last, sampling_.token_ids[row]) != last;
    is_over &= has_ended != 0;
  }
  return !is_over;
}

// Makes what was drawn the input of the next round.
void Executor::advance() {
  const size_t count = static_cast<size_t>(input_.num_seqs);
  if (input_.positions != positions_.data()) {
    positions_.assign(input_.positions, input_.positions + count);
    context_lens_.assign(input_.context_lens, input_.context_lens + count);
    round_slots_.resize(input_.groups.size());
  }
  for (size_t s = 0; s < count; ++s) ++positions_[s], ++context_lens_[s];
  const int64_t block_size = layers_[0].block_size;
  for (size_t g = 0; g < round_slots_.size(); ++g) {
    GroupInput& group = input_.groups[g];
    round_slots_[g].resize(count);
    for (size_t s = 0; s < count; ++s) {
      const int64_t* table = group.block_tables + static_cast<int64_t>(s) * group.table_width;
      round_slots_[g][s] =
          table[positions_[s] / block_size] * block_size + positions_[s] % block_size;
    }
    group.slots = round_slots_[g].data();
  }
  input_.token_ids = sampling_.token_ids;
  input_.positions = positions_.data();
  input_.context_lens = context_lens_.data();
  sampling_.token_ids += num_rows_;
  sampling_.is_usable += num_rows_;
  for (SampleRow& row : *sampling_.rows) ++row.position;
}

void Executor::head(const int64_t* row_indices, int64_t num_rows) {
  row_indices_ = row_indices;
  num_rows_ = num_rows;
  reserve(0, num_rows);
  run(false, true);
}

void Executor::hidden(const int64_t* row_indices, int64_t num_rows) {
  row_indices_ = row_indices;
  num_rows_ = num_rows;
  reserve(0, num_rows);
  run(false, false);
}

void Executor::run(bool has_tokens, bool has_head) {
  ++step_;
  phases_.clear();
  for (size_t i = 0; i < ops_.size(); ++i) {
    const Op& op = ops_[i];
    if ((op.domain != Domain::kRows && !has_tokens) || rows_of(op) == 0) continue;
    if (op.code == Code::kLora && input_.adapter_ids == nullptr) continue;
    if (op.code == Code::kSample && sampling_.rows == nullptr) continue;
    phases_.push_back({static_cast<int64_t>(i), num_items(op)});
    if (op.code == Code::kNorm && !has_head) break;
  }
  team_.run(
      phases_,
      [](void* self, int64_t tag, int64_t item, int thread) {
        static_cast<Executor*>(self)->do_item(tag, item, thread);
      },
      this);
}

bool Executor::is_private(const Op& prepare) const {
  return rows_of(prepare) * slots_[static_cast<size_t>(prepare.a[1])].width <= kPrivateValues;
}

int64_t Executor::num_items(const Op& op) {
  const int64_t rows = rows_of(op);
  switch (op.code) {
    case Code::kPrepare:
      if (is_private(op)) return 0;
      break;
    case Code::kLinear: {
      const Grid grid = grid_of(linears_[static_cast<size_t>(op.a[1])], rows, team_.size());
      return grid.num_row_steps * grid.num_panel_steps;
    }
    case Code::kAttend:
      return static_cast<int64_t>(
          items_[static_cast<size_t>(layer_groups_[static_cast<size_t>(op.a[1])])].size());
    case Code::kRope:
      if (rows <= 4) return 1;
      break;
    case Code::kSample:
      return rows;
    case Code::kLora:
      return input_.num_seqs;
    case Code::kRoute:
      return 1;
    case Code::kExperts: {
      const Grid grid =
          grid_of(linears_[static_cast<size_t>(op.a[1])], rows / op.a[4] + 1, team_.size());
      return op.a[4] * grid.num_panel_steps;
    }
    default:
      break;
  }
  return std::min<int64_t>(rows, 4 * team_.size());
}

PrepareCall Executor::prepare_call(const Op& op) const {
  const Slot& slot = slots_[static_cast<size_t>(op.a[1])];
  PrepareCall call;
  call.input = buffers_[static_cast<size_t>(op.a[0])].data.get();
  call.stride = stride(op.a[0]);
  call.width = op.a[2];
  call.norm = norm_of(op.a[3], op.a[4], op.a[5], op.r[0]);
  call.has_values = slot.has_values != 0;
  call.has_integers = slot.has_integers != 0;
  call.has_parts = slot.has_parts;
  call.group_size = slot.group_size;
  call.padded_group = slot.padded_group;
  call.num_groups = slot.num_groups;
  call.num_digits = slot.num_digits;
  call.order = slot.order;
  return call;
}

void Executor::do_item(int64_t index, int64_t item, int thread) {
  const Op& op = ops_[static_cast<size_t>(index)];
  if (op.code == Code::kLinear) return do_linear(op, item, thread);
  if (op.code == Code::kAttend) return do_attend(op, item, thread);
  if (op.code == Code::kSample) return do_sample(op, item, thread);
  if (op.code == Code::kLora) return do_lora(op, item, thread);
  if (op.code == Code::kRoute) return do_route(op);
  if (op.code == Code::kExperts) return do_experts(op, item, thread);
  const int64_t rows = rows_of(op), count = num_items(op);
  const int64_t first = rows * item / count, last = rows * (item + 1) / count;
  switch (op.code) {
    case Code::kEmbed: {
      const EmbedCall call{input_.token_ids, input_.positions, pointer(op.a[1]),
                           static_cast<Number>(op.a[2]), op.a[3], static_cast<float>(op.r[0]),
                           pointer(op.a[4]), static_cast<Number>(op.a[5]), data(op.a[0]),
                           stride(op.a[0])};
      kernels_.embed(call, first, last);
      break;
    }
    case Code::kPrepare:
      kernels_.prepare(prepare_call(op), shared_[static_cast<size_t>(op.a[1])].view, first, last);
      break;
    case Code::kRope: {
      const size_t layer = static_cast<size_t>(op.a[1]);
      const size_t group = static_cast<size_t>(layer_groups_[layer]);
      const NormKind kind = op.a[4] != 0 ? NormKind::kRms : NormKind::kNone;
      const RopeCall call{data(op.a[0]), stride(op.a[0]), geometry_.num_heads, op.a[2],
                          rope_tables_[static_cast<size_t>(op.a[3])], input_.positions,
                          input_.groups[group].slots,
                          norm_of(static_cast<int64_t>(kind), op.a[4], 0, op.r[0]),
                          norm_of(static_cast<int64_t>(kind), op.a[5], 0, op.r[0]),
                          op.a[6] != 0, layers_[layer]};
      kernels_.rope(call, first, last);
      break;
    }
    case Code::kAddNorm:
      kernels_.add_norm(data(op.a[0]), data(op.a[1]), stride(op.a[1]), op.a[2],
                        norm_of(op.a[3], op.a[4], op.a[5], op.r[0]), first, last);
      break;
    case Code::kGate:
      kernels_.gate(data(op.a[0]), data(op.a[1]), data(op.a[2]), stride(op.a[2]),
                    static_cast<Epilogue>(op.a[3]), first, last);
      break;
    case Code::kDispatch:
      for (int64_t choice = first; choice < last; ++choice)
        std::memcpy(data(op.a[1]) + routed_row_[static_cast<size_t>(choice)] * stride(op.a[1]),
                    data(op.a[0]) + choice / geometry_.num_experts_per_token * stride(op.a[0]),
                    static_cast<size_t>(stride(op.a[1])) * sizeof(float));
      break;
    case Code::kCombine:
      do_combine(op, first, last);
      break;
    case Code::kAdd:
      for (int64_t row = first; row < last; ++row)
        kernels_.add_scaled(data(op.a[0]) + row * stride(op.a[0]), 1.0f,
                            data(op.a[1]) + row * stride(op.a[1]), stride(op.a[1]), true);
      break;
    case Code::kAddGated:
      kernels_.add_gated(data(op.a[0]), data(op.a[1]), stride(op.a[1]), data(op.a[2]),
                         stride(op.a[2]), first, last);
      break;
    case Code::kNorm:
      kernels_.norm(data(op.a[0]), stride(op.a[0]), op.a[1],
                    norm_of(op.a[2], op.a[3], op.a[4], op.r[0]), first, last);
      break;
    case Code::kGather:
      for (int64_t row = first; row < last; ++row)
        std::memcpy(data(op.a[1]) + row * stride(op.a[1]),
                    data(op.a[0]) + row_indices_[row] * stride(op.a[0]),
                    static_cast<size_t>(stride(op.a[1])) * sizeof(float));
      break;
    default:
      break;
  }
}

// What `op` multiplies: the team's rows, or this thread's own, made now if they are not yet.
const Prepared& Executor::prepared_for(const Op& op, int thread) {
  const size_t slot = static_cast<size_t>(op.a[0]);
  const int64_t by = prepared_by_[static_cast<size_t>(&op - ops_.data())];
  const Op& prepare = ops_[static_cast<size_t>(by)];
  if (!is_private(prepare)) return shared_[slot].view;
  const size_t place = static_cast<size_t>(thread) * slots_.size() + slot;
  const uint64_t wanted = step_ << 20 | static_cast<uint64_t>(by);
  if (made_[place] != wanted) {
    kernels_.prepare(prepare_call(prepare), private_[place].view, 0, rows_of(prepare));
    made_[place] = wanted;
  }
  return private_[place].view;
}

void Executor::do_linear(const Op& op, int64_t item, int thread) {
  const Linear& weight = linears_[static_cast<size_t>(op.a[1])];
  const int64_t rows = rows_of(op);
  const Grid grid = grid_of(weight, rows, team_.size());
  LinearCall call;
  call.weight = &weight;
  call.epilogue = static_cast<Epilogue>(op.a[2]);
  call.out = data(op.a[3]) + op.a[4];
  call.stride = stride(op.a[3]);
  call.cap = static_cast<float>(op.r[0]);
  call.input = prepared_for(op, thread);
  const int64_t row_step = item / grid.num_panel_steps, panel_step = item % grid.num_panel_steps;
  const int64_t first_row = row_step * grid.row_step, first_panel = panel_step * grid.panel_step;
  kernels_.linear(call, first_row, std::min(first_row + grid.row_step, rows), first_panel,
                  std::min(first_panel + grid.panel_step, grid.num_panels));
}

// All are read before any is written, as the protocol has it.
void Executor::copy_blocks(const StepInput& input) {
  std::vector<uint8_t> held;
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    const GroupInput& group = input.groups[static_cast<size_t>(layer_groups_[layer])];
    if (group.num_copies == 0) continue;
    const LayerCache& cache = layers_[layer];
    const size_t bytes = static_cast<size_t>(cache.num_kv_heads * cache.head_bytes());
    held.resize(bytes * static_cast<size_t>(group.num_copies));
    for (int64_t i = 0; i < group.num_copies; ++i)
      std::memcpy(held.data() + static_cast<size_t>(i) * bytes, cache.head(group.copies[2 * i], 0),
                  bytes);
    for (int64_t i = 0; i < group.num_copies; ++i)
      std::memcpy(cache.head(group.copies[2 * i + 1], 0),
                  held.data() + static_cast<size_t>(i) * bytes, bytes);
  }
}

Executor::HeadTiles Executor::head_tiles() const {
  const int64_t heads = geometry_.num_heads / geometry_.num_kv_heads;
  const int64_t head_step = std::min(heads, kMostRows);
  return {heads, head_step, std::max<int64_t>(1, kMostRows / head_step)};
}

void Executor::plan_attention() {
  num_counters_ = 0;
  partial_floats_ = 0;
  const HeadTiles tiles = head_tiles();
  int64_t count = 0;
  for (int64_t s = 0; s < input_.num_seqs; ++s)
    count += ceil_div(input_.cu_seqlens[s + 1] - input_.cu_seqlens[s], tiles.query_step) *
             geometry_.num_kv_heads;
  // Splitting contexts pays only where there would be too few items for the team.
  const bool is_split = count < 4 * team_.size();
  for (size_t group = 0; group < windows_.size(); ++group) {
    items_[group].clear();
    for (int64_t s = 0; s < input_.num_seqs; ++s)
      plan_sequence(static_cast<int64_t>(group), s, is_split);
  }
  if (static_cast<int64_t>(partials_.size()) < partial_floats_)
    partials_.resize(static_cast<size_t>(partial_floats_));
  if (num_counters_ > most_counters_) {
    most_counters_ = num_counters_;
    counters_.reset(new std::atomic<int64_t>[static_cast<size_t>(most_counters_)]());
  }
  for (auto& items : items_)
    for (Item& item : items)
      item.attend.partial = partials_.data() + item.partial_offset;
}

void Executor::plan_sequence(int64_t group, int64_t sequence, bool is_split) {
  const GroupInput& input = input_.groups[static_cast<size_t>(group)];
  const int64_t window = windows_[static_cast<size_t>(group)];
  const int64_t first_row = input_.cu_seqlens[sequence];
  const int64_t num_queries = input_.cu_seqlens[sequence + 1] - first_row;
  const int64_t position = input_.context_lens[sequence] - num_queries;
  const auto [heads, head_step, query_step] = head_tiles();
  const int64_t state = 32 + (geometry_.head_dim + 15) / 16 * 16;
  std::vector<Item>& items = items_[static_cast<size_t>(group)];
  // The last queries see most: first what takes longest.
  for (int64_t tile = ceil_div(num_queries, query_step) - 1; tile >= 0; --tile)
    for (int64_t kv = 0; kv < geometry_.num_kv_heads; ++kv)
      for (int64_t head = 0; head < heads; head += head_step) {
        Item item{};
        item.attend.first_row = first_row;
        item.attend.first_position = position;
        item.attend.first_query = tile * query_step;
        item.attend.last_query = std::min(num_queries, (tile + 1) * query_step);
        item.attend.kv_head = kv;
        item.attend.first_head = kv * heads + head;
        item.attend.num_heads = std::min(head_step, heads - head);
        item.attend.block_table = input.block_tables + sequence * input.table_width;
        item.attend.partition = -1;
        const int64_t end = position + item.attend.last_query;
        const int64_t seen_from =
            window > 0 ? std::max<int64_t>(0, position + item.attend.first_query + 1 - window) : 0;
        const int64_t first = seen_from / kPartitionTokens, last = ceil_div(end, kPartitionTokens);
        if (!is_split || last - first == 1) {
          items.push_back(item);
          continue;
        }
        item.first_partition = first;
        item.last_partition = last;
        item.counter = num_counters_++;
        for (int64_t part = first; part < last; ++part) {
          item.attend.partition = part;
          item.partial_offset = partial_floats_;
          partial_floats_ += item.attend.num_rows() * state;
          items.push_back(item);
        }
      }
}

void Executor::do_attend(const Op& op, int64_t index, int thread) {
  const size_t layer = static_cast<size_t>(op.a[1]);
  const int64_t group = layer_groups_[layer];
  const AttendCall call{data(op.a[0]), stride(op.a[0]), data(op.a[2]), stride(op.a[2]),
                        geometry_.num_heads, static_cast<float>(op.r[0]),
                        static_cast<float>(op.r[1]), windows_[static_cast<size_t>(group)],
                        layers_[layer]};
  const Item& item = items_[static_cast<size_t>(group)][static_cast<size_t>(index)];
  float* scratch = scratch_[static_cast<size_t>(thread)].data();
  kernels_.attend(call, item.attend, scratch);
  if (item.attend.partition < 0) return;
  // Who ends the last partition joins them all.
  std::atomic<int64_t>& done = counters_[static_cast<size_t>(item.counter)];
  const int64_t count = item.last_partition - item.first_partition;
  if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < count) return;
  done.store(0, std::memory_order_relaxed);
  const int64_t state = 32 + (geometry_.head_dim + 15) / 16 * 16;
  const float* partials =
      item.attend.partial -
      (item.attend.partition - item.first_partition) * item.attend.num_rows() * state;
  kernels_.join(call, item.attend, count, partials, scratch);
}

// out += B (A x) for the rows of a sequence that has an adapter; the scale is in B.
void Executor::do_lora(const Op& op, int64_t sequence, int thread) {
  const int64_t adapter = input_.adapter_ids[sequence];
  if (adapter == 0) return;
  const size_t entry = static_cast<size_t>(
      (op.a[1] * geometry_.num_adapters + adapter - 1) * 2);
  if (adapters_[entry] < 0) return;
  const Linear& a = linears_[static_cast<size_t>(adapters_[entry])];
  const Linear& b = linears_[static_cast<size_t>(adapters_[entry + 1])];
  const int64_t first = input_.cu_seqlens[sequence];
  const int64_t count = input_.cu_seqlens[sequence + 1] - first;
  const int64_t inner = a.num_blocks() * 16;
  std::vector<float> between(static_cast<size_t>(count * inner + kSlackValues));
  LinearCall call{};
  call.weight = &a;
  call.input = prepared_for(op, thread);
  call.input.values += first * call.input.stride;
  call.epilogue = Epilogue::kStore;
  call.out = between.data();
  call.stride = inner;
  kernels_.linear(call, 0, count, 0, ceil_div(a.num_blocks(), kPanelBlocks));
  call.weight = &b;
  call.input = {};
  call.input.values = between.data();
  call.input.stride = inner;
  call.epilogue = Epilogue::kAdd;
  call.stride = stride(op.a[2]);
  call.out = data(op.a[2]) + first * call.stride + op.a[3];
  kernels_.linear(call, 0, count, 0, ceil_div(b.num_blocks(), kPanelBlocks));
}

// Experts of each token: the likeliest, of equals the lowest, listed by ascending index; then the
// places of all (token, expert) pairs, expert after expert.
void Executor::do_route(const Op& op) {
  const int64_t num_experts = op.a[1], per_token = op.a[2], tokens = input_.num_tokens;
  std::vector<float> shares(static_cast<size_t>(stride(op.a[0]) + kSlackValues));
  std::vector<int64_t> chosen(static_cast<size_t>(tokens * per_token));
  std::vector<int64_t> order(static_cast<size_t>(num_experts));
  routed_row_.resize(chosen.size());
  routed_weight_.resize(chosen.size());
  expert_start_.assign(static_cast<size_t>(num_experts) + 1, 0);
  for (int64_t token = 0; token < tokens; ++token) {
    kernels_.softmax(data(op.a[0]) + token * stride(op.a[0]), shares.data(), num_experts);
    for (int64_t e = 0; e < num_experts; ++e) order[static_cast<size_t>(e)] = e;
    std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) {
      return shares[static_cast<size_t>(x)] > shares[static_cast<size_t>(y)];
    });
    std::sort(order.begin(), order.begin() + per_token);
    float sum = 0.0f;
    for (int64_t i = 0; i < per_token; ++i)
      sum += shares[static_cast<size_t>(order[static_cast<size_t>(i)])];
    for (int64_t i = 0; i < per_token; ++i) {
      const size_t place = static_cast<size_t>(token * per_token + i);
      const int64_t expert = order[static_cast<size_t>(i)];
      const float share = shares[static_cast<size_t>(expert)];
      chosen[place] = expert;
      routed_weight_[place] = op.a[3] != 0 ? share / sum : share;
      ++expert_start_[static_cast<size_t>(expert) + 1];
    }
  }
  for (int64_t e = 0; e < num_experts; ++e)
    expert_start_[static_cast<size_t>(e) + 1] += expert_start_[static_cast<size_t>(e)];
  std::vector<int64_t> next(expert_start_.begin(), expert_start_.end() - 1);
  for (size_t i = 0; i < chosen.size(); ++i)
    routed_row_[i] = next[static_cast<size_t>(chosen[i])]++;
}

void Executor::do_experts(const Op& op, int64_t item, int thread) {
  const Linear& one = linears_[static_cast<size_t>(op.a[1])];
  const Grid grid = grid_of(one, rows_of(op) / op.a[4] + 1, team_.size());
  const int64_t expert = item / grid.num_panel_steps, step = item % grid.num_panel_steps;
  const int64_t first = expert_start_[static_cast<size_t>(expert)];
  const int64_t last = expert_start_[static_cast<size_t>(expert) + 1];
  if (first == last) return;
  LinearCall call{};
  call.weight = &linears_[static_cast<size_t>(op.a[1] + expert)];
  call.input = prepared_for(op, thread);
  call.epilogue = static_cast<Epilogue>(op.a[2]);
  call.out = data(op.a[3]);
  call.stride = stride(op.a[3]);
  const int64_t panel = step * grid.panel_step;
  kernels_.linear(call, first, last, panel, std::min(panel + grid.panel_step, grid.num_panels));
}

// Each token's experts, by ascending index: out = the sum of weight times output.
void Executor::do_combine(const Op& op, int64_t first, int64_t last) {
  const int64_t per_token = geometry_.num_experts_per_token, width = stride(op.a[1]);
  for (int64_t token = first; token < last; ++token) {
    float* out = data(op.a[1]) + token * width;
    for (int64_t i = 0; i < per_token; ++i) {
      const size_t place = static_cast<size_t>(token * per_token + i);
      kernels_.add_scaled(data(op.a[0]) + routed_row_[place] * width, routed_weight_[place], out,
                          width, i > 0);
    }
  }
}

void Executor::do_sample(const Op& op, int64_t row, int thread) {
  std::unique_ptr<Sampler>& sampler = samplers_[static_cast<size_t>(thread)];
  if (sampler == nullptr) sampler = std::make_unique<Sampler>(*kernels_.sampler, op.a[1]);
  const SampleRow& how = (*sampling_.rows)[static_cast<size_t>(row)];
  float* logits = data(op.a[0]) + row * stride(op.a[0]);
  const int64_t id = sampler->draw(logits, how);
  sampling_.token_ids[row] = std::max<int64_t>(id, 0);
  sampling_.is_usable[row] = id >= 0;
  if (id < 0 || how.num_logprobs < 0) return;
  const RowLogprobs& all = sampling_.logprobs;
  const int64_t place = row * sampling_.width;
  sampler->logprobs(logits, id, how.num_logprobs,
                    {all.logprob + row, all.num_top + row, all.top_ids + place,
                     all.top_logprobs + place});
}

}  // namespace llmserve
