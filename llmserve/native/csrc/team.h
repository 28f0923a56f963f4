// A persistent team of threads that works through phases, the caller one of its members.
//
// A phase is a number of items; threads take them one by one, so a thread that lost its core to
// another process holds up one item and not a share of every phase. A phase begins when the last
// item of the one before is done, not when all threads have arrived. Who finds nothing to do spins
// for some microseconds and then sleeps: on a machine with as many busy threads as cores, spinning
// on would cost the one who is waited for its core.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace llmserve {

class Team {
 public:
  // One piece of work. `tag` is the phase's, given to `run`.
  using Item = void (*)(void* context, int64_t tag, int64_t item, int thread);

  struct Phase {
    int64_t tag;
    int64_t num_items;
  };

  // Room for `most_phases` in one run.
  Team(int num_threads, int64_t most_phases);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Works through the phases; returns when the last is done. One caller at a time.
  void run(const std::vector<Phase>& phases, Item item, void* context);

 private:
  struct Slot {
    int64_t tag;
    std::atomic<int64_t> num_items;
    std::atomic<int64_t> num_done;
  };

  void work(int thread, bool is_caller);
  bool take(int thread);
  void advance(uint32_t sequence);
  void sleep(uint64_t seen);
  Slot& slot(uint32_t sequence) { return slots_[sequence & mask_]; }

  // The phase under way, counted over all runs, and its next item: sequence << 32 | item.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<uint32_t> end_{0};  // sequence after the run's last phase
  std::atomic<int> num_sleeping_{0};
  std::atomic<bool> is_closing_{false};
  std::unique_ptr<Slot[]> slots_;
  uint32_t mask_;
  Item item_ = nullptr;
  void* context_ = nullptr;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::thread> workers_;
};

}  // namespace llmserve
