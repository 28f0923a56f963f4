#include "machine.h"

#include <algorithm>
#include <chrono>

#include "paths.h"
#include "team.h"

namespace llmserve {
namespace {

constexpr int64_t kItemsPerThread = 32;     // of the round that says how many make a long one
constexpr double kRoundSeconds = 0.01;      // a thread may take a while to get its core
constexpr int64_t kReadBytes = 512 << 10;   // of one item
constexpr int kRepeats = 3;

struct Job {
  float (*multiply)(const Operands&);  // or null, then there is what to read
  const Operands* operands;
  float (*read)(const uint8_t* memory, int64_t num_bytes);
  const uint8_t* memory;
  int64_t num_bytes;
};

// The result goes where the compiler cannot see that nobody reads it.
void do_item(void* context, int64_t, int64_t item, int) {
  const Job& job = *static_cast<const Job*>(context);
  const int64_t first = item * kReadBytes;
  volatile float sink =
      job.multiply != nullptr
          ? job.multiply(*job.operands)
          : job.read(job.memory + first, std::min(kReadBytes, job.num_bytes - first));
  static_cast<void>(sink);
}

double round_seconds(Team& team, int64_t num_items, Job& job) {
  const auto start = std::chrono::steady_clock::now();
  team.run({{0, num_items}}, do_item, &job);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double best_seconds(Team& team, int64_t num_items, Job& job) {
  double best = round_seconds(team, num_items, job);
  for (int i = 1; i < kRepeats; ++i) best = std::min(best, round_seconds(team, num_items, job));
  return best;
}

// Calls per second of all threads.
double call_rate(Team& team, Job& job) {
  const int64_t few = kItemsPerThread * team.size();
  const double seconds = round_seconds(team, few, job);
  const double times = std::max(1.0, kRoundSeconds / seconds);
  const int64_t items = static_cast<int64_t>(static_cast<double>(few) * times);
  return static_cast<double>(items) / best_seconds(team, items, job);
}

Operands make_operands() {
  Operands operands;
  for (int64_t i = 0; i < 64 * kLines; ++i) operands.weights[i] = static_cast<uint8_t>(i % 16);
  for (int64_t i = 0; i < 16 * kLines; ++i) operands.floats[i] = static_cast<float>(i % 7);
  for (int32_t i = 0; i < 16; ++i) operands.rows[i] = 0x01020304 + i;
  operands.factor = 0.5f;
  return operands;
}

}  // namespace

MachineRates measure_machine(const Kernels& kernels, int num_threads, const uint8_t* memory,
                             int64_t num_bytes) {
  const MachineLoops& loops = *kernels.machine;
  const Operands operands = make_operands();
  Team team(num_threads, 1);
  const auto rate_of = [&](float (*multiply)(const Operands&), double operations) {
    Job job{multiply, &operands, nullptr, nullptr, 0};
    return operations * call_rate(team, job);
  };
  // The memory is the same for all paths: the best one's loop reads it.
  Job reading{nullptr, nullptr, find_kernels("auto")->machine->read, memory, num_bytes};
  const int64_t reads = (num_bytes + kReadBytes - 1) / kReadBytes;
  return {static_cast<double>(num_bytes) / best_seconds(team, reads, reading),
          rate_of(loops.int4_dots, loops.num_dots), rate_of(loops.int8_dots, loops.num_dots),
          rate_of(loops.floats, loops.num_floats)};
}

}  // namespace llmserve
