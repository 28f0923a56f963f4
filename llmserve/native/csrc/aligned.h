// Memory that begins at a cache line, so that no whole vector and no row of a tile lies in two.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace llmserve {

template <typename T>
class Aligned {
 public:
  // `count` items, all zero, in place of those before.
  T* renew(int64_t count) {
    data_.reset();
    count_ = 0;
    const size_t line = 64, bytes = static_cast<size_t>(count) * sizeof(T);
    const size_t size = (bytes + line) / line * line;
    data_.reset(static_cast<T*>(std::aligned_alloc(line, size)));
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(static_cast<void*>(data_.get()), 0, size);
    count_ = count;
    return data_.get();
  }
  // At least `count` items: those before, or new ones.
  T* reserve(int64_t count) { return count <= count_ ? data_.get() : renew(count); }
  T* get() const { return data_.get(); }
  void reset() {
    data_.reset();
    count_ = 0;
  }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t count_ = 0;
};

}  // namespace llmserve
