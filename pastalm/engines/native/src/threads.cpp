#include "threads.h"

#include <chrono>

namespace pastalm {
namespace {

constexpr int SPINS = 4096;                      /* looks at a counter before others are let run */
constexpr std::chrono::microseconds AWAKE(2000); /* how long a thread waits busily for the next step */

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

}  // namespace

void wait_for_count(const std::atomic<int32_t> &counter, int32_t count) {
  for (int spins = 1; counter.load(std::memory_order_acquire) < count; spins++) {
    pause();
    if (spins >= SPINS) std::this_thread::yield();
  }
}

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
    jobs_.fetch_add(1, std::memory_order_seq_cst);
  }
  wake_.notify_all();
  for (std::thread &thread : threads_) thread.join();
}

void Team::run(std::shared_ptr<Job> job) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    job_ = job;
    jobs_.fetch_add(1, std::memory_order_seq_cst);
  }
  if (sleeping_.load(std::memory_order_seq_cst)) wake_.notify_all();
  job->run(0);
}

void Team::serve(int index) {
  for (uint32_t seen = 0;;) {
    const auto begun = std::chrono::steady_clock::now();
    for (int spins = 1; jobs_.load(std::memory_order_acquire) == seen; spins++) {
      pause();
      if (spins % 64) continue;
      std::this_thread::yield();
      if (std::chrono::steady_clock::now() - begun < AWAKE) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      sleeping_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, [&] { return jobs_.load(std::memory_order_seq_cst) != seen; });
      sleeping_.fetch_sub(1, std::memory_order_seq_cst);
    }
    std::shared_ptr<Job> job;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (ending_) return;
      job = job_;
      seen = jobs_.load(std::memory_order_relaxed);
    }
    job->run(index);
  }
}

}  // namespace pastalm
