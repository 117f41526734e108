/* A team of threads that compute one step together, phase by phase.
 *
 * A phase is over when its tasks are done, no matter by whom: a thread that the system has not let run since is not
 * waited for. Between phases and between steps a thread waits busily for a bounded time, since the next work is
 * microseconds away; then it lets others run, and between steps it sleeps: an idle team burns nothing, and more threads
 * than processors slow each other but do not collapse.
 */
#ifndef PASTALM_THREADS_H
#define PASTALM_THREADS_H
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace pastalm {

/* What a team does together. A thread may come when all is done and the job is over: `run` then finds nothing to do, so
 * it may read only what the job itself owns. */
struct Job {
  virtual ~Job() = default;
  virtual void run(int thread) = 0;
};

/* Waits until something is so, busily first. */
void wait_for_count(const std::atomic<int32_t> &counter, int32_t count);

/* The tasks of one phase. */
struct alignas(64) Phase {
  std::atomic<int32_t> next{0}, done{0};

  /* Tasks 0 .. count - 1 in runs [first, last) that one thread does: large ones first, single tasks at the end, so that
   * all are done at about the same time, also where another program slows a thread. Returns when all are done. */
  template <typename F>
  void each(int32_t count, int threads, F &&task) {
    int32_t own = 0;
    for (int32_t first = next.load(std::memory_order_relaxed); first < count;) {
      const int32_t last = first + std::max((count - first) / (2 * threads), 1);
      if (!next.compare_exchange_weak(first, last, std::memory_order_relaxed)) continue;
      task(first, last);
      own += last - first;
      first = next.load(std::memory_order_relaxed);
    }
    if (own) done.fetch_add(own, std::memory_order_acq_rel);
    wait_for_count(done, count);
  }
};

class Team {
 public:
  explicit Team(int size);
  ~Team();
  int size() const { return size_; }

  /* Calls job->run(0) on the calling thread, and run(i) for i below size on others that come in time. */
  void run(std::shared_ptr<Job> job);

 private:
  void serve(int index);
  void end();

  const int size_;
  bool ending_ = false;
  std::shared_ptr<Job> job_;
  alignas(64) std::atomic<uint32_t> jobs_{0}; /* so far */
  alignas(64) std::atomic<int> sleeping_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
};

}  // namespace pastalm
#endif
