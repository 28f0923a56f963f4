#include "team.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace llmserve {
namespace {

// Rounds of waiting before a thread sleeps: some 20 us within a run and 50 us between two, which is
// what the caller needs to prepare the next step (docs/lab-log.md, 2026-11-25).
constexpr int kSpinsInRun = 400;
constexpr int kSpinsBetweenRuns = 1000;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#else
  std::this_thread::yield();
#endif
}

uint32_t sequence_of(uint64_t ticket) { return static_cast<uint32_t>(ticket >> 32); }
uint64_t first_of(uint32_t sequence) { return static_cast<uint64_t>(sequence) << 32; }
bool is_before(uint32_t a, uint32_t b) { return static_cast<int32_t>(a - b) < 0; }

}  // namespace

Team::Team(int num_threads, int64_t most_phases) {
  // A slot is used again only after as many phases as a straggler could be behind: two runs.
  uint32_t size = 64;
  while (size < 4 * static_cast<uint64_t>(most_phases + 1)) size *= 2;
  slots_.reset(new Slot[size]());
  mask_ = size - 1;
  for (int i = 1; i < num_threads; ++i)
    workers_.emplace_back([this, i] { work(i, false); });
}

Team::~Team() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_closing_.store(true);
  }
  changed_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Team::run(const std::vector<Phase>& phases, Item item, void* context) {
  item_ = item;
  context_ = context;
  // The sequence between two runs has no items: who comes late takes none.
  const uint32_t begin = end_.load(std::memory_order_relaxed) + 1;
  uint32_t end = begin;
  for (const Phase& phase : phases) {
    if (phase.num_items == 0) continue;
    Slot& place = slot(end++);
    place.tag = phase.tag;
    place.num_items.store(phase.num_items, std::memory_order_relaxed);
    place.num_done.store(0, std::memory_order_relaxed);
  }
  if (begin == end) return;
  slot(end).num_items.store(0, std::memory_order_relaxed);
  end_.store(end, std::memory_order_relaxed);
  advance(begin);
  work(0, true);
}

void Team::work(int thread, bool is_caller) {
  int spins = 0;
  uint64_t seen = ticket_.load();
  while (!is_closing_.load(std::memory_order_relaxed)) {
    if (take(thread)) {
      spins = 0;
      continue;
    }
    const uint64_t now = ticket_.load(std::memory_order_acquire);
    const bool is_over = !is_before(sequence_of(now), end_.load(std::memory_order_relaxed));
    if (is_over && is_caller) return;
    if (sequence_of(now) != sequence_of(seen)) spins = 0;
    seen = now;
    if (++spins < (is_over ? kSpinsBetweenRuns : kSpinsInRun)) {
      pause();
      continue;
    }
    sleep(now);
    spins = 0;
  }
}

// Does one item of the phase under way, if there is one left.
bool Team::take(int thread) {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  const uint32_t looked_at = sequence_of(ticket);
  if (!is_before(looked_at, end_.load(std::memory_order_relaxed))) return false;
  if (static_cast<int64_t>(ticket & 0xffffffffu) >=
      slot(looked_at).num_items.load(std::memory_order_relaxed))
    return false;
  // The phase may have changed meanwhile: what counts is what the ticket says now.
  ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
  const uint32_t sequence = sequence_of(ticket);
  if (!is_before(sequence, end_.load(std::memory_order_relaxed))) return false;
  Slot& phase = slot(sequence);
  const int64_t item = static_cast<int64_t>(ticket & 0xffffffffu);
  const int64_t num_items = phase.num_items.load(std::memory_order_relaxed);
  if (item >= num_items) return false;
  item_(context_, phase.tag, item, thread);
  if (phase.num_done.fetch_add(1, std::memory_order_acq_rel) + 1 == num_items)
    advance(sequence + 1);
  return true;
}

void Team::advance(uint32_t sequence) {
  ticket_.store(first_of(sequence));
  if (num_sleeping_.load() > 0) {
    { const std::lock_guard<std::mutex> lock(mutex_); }
    changed_.notify_all();
  }
}

// Until the phase is another one than `seen` names.
void Team::sleep(uint64_t seen) {
  std::unique_lock<std::mutex> lock(mutex_);
  num_sleeping_.fetch_add(1);
  changed_.wait(lock, [&] {
    return is_closing_.load() || sequence_of(ticket_.load()) != sequence_of(seen);
  });
  num_sleeping_.fetch_sub(1);
}

}  // namespace llmserve
