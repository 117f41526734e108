#include "threads.h"

#include <chrono>

namespace pastalm {
namespace {

constexpr int SPINS = 4096;                      /* looks at a barrier before others are let run */
constexpr std::chrono::microseconds AWAKE(2000); /* how long a thread waits busily for the next step */

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

}  // namespace

Team::Team(int size) : size_(size) {
  try {
    for (int i = 1; i < size; i++) threads_.emplace_back([this, i] { serve(i); });
  } catch (...) { /* the system has no more threads: those that began end first */
    end();
    throw;
  }
}

Team::~Team() { end(); }

void Team::end() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ending_ = true;
    job_.fetch_add(1, std::memory_order_seq_cst);
  }
  wake_.notify_all();
  for (std::thread &thread : threads_) thread.join();
}

void Team::run(void (*work)(void *, int), void *argument) {
  work_ = work, argument_ = argument;
  job_.fetch_add(1, std::memory_order_seq_cst);
  if (sleeping_.load(std::memory_order_seq_cst)) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  work(argument, 0);
  barrier();
}

void Team::serve(int index) {
  for (uint32_t done = 0;; done++) {
    const auto begun = std::chrono::steady_clock::now();
    for (int spins = 1; job_.load(std::memory_order_acquire) == done; spins++) {
      pause();
      if (spins % 64) continue;
      std::this_thread::yield();
      if (std::chrono::steady_clock::now() - begun < AWAKE) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      sleeping_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, [&] { return job_.load(std::memory_order_seq_cst) != done; });
      sleeping_.fetch_sub(1, std::memory_order_seq_cst);
    }
    if (ending_) return;
    work_(argument_, index);
    barrier();
  }
}

void Team::barrier() {
  const uint32_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spins = 1; phase_.load(std::memory_order_acquire) == phase; spins++) {
    pause();
    if (spins >= SPINS) std::this_thread::yield();
  }
}

}  // namespace pastalm
