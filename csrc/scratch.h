// Scratch memory that outlives a call: the decode step allocates nothing once it is warm.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace retro {

// Hands out 64-byte aligned pieces of one block per thread. Pieces of one op are valid until the same
// thread starts the next one; begin() says how much the whole op takes.
class Scratch {
 public:
  static Scratch& of_this_thread() {
    static thread_local Scratch scratch;
    return scratch;
  }

  void begin(size_t total_bytes) {
    if (total_bytes > capacity_) {
      memory_.reset();
      capacity_ = 0;
      const size_t capacity =
          (total_bytes + total_bytes / 4 + kAlignment - 1) / kAlignment * kAlignment;
      memory_.reset(static_cast<char*>(std::aligned_alloc(kAlignment, capacity)));
      if (!memory_) throw std::bad_alloc();
      capacity_ = capacity;
    }
    used_ = 0;
  }

  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(memory_.get() + used_);
    used_ += bytes<T>(count);
    return piece;
  }

  template <typename T>
  static size_t bytes(int64_t count) {
    const size_t size = static_cast<size_t>(count) * sizeof(T);
    return (size + kAlignment - 1) / kAlignment * kAlignment;
  }

 private:
  static constexpr size_t kAlignment = 64;

  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };

  std::unique_ptr<char, Free> memory_;
  size_t capacity_ = 0;
  size_t used_ = 0;
};

}  // namespace retro
