/* A team of threads that compute one step together, phase by phase.
 *
 * Between phases and between steps a thread waits busily for a bounded time, since the next work is microseconds away;
 * then it lets others run, and between steps it sleeps: an idle team burns nothing, and more threads than processors
 * slow each other but do not collapse.
 */
#ifndef PASTALM_THREADS_H
#define PASTALM_THREADS_H
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace pastalm {

class Team {
 public:
  explicit Team(int size);
  ~Team();
  int size() const { return size_; }

  /* Calls work(argument, i) once for each i below size, i = 0 on the calling thread; returns when all have returned. */
  void run(void (*work)(void *, int), void *argument);

  /* Inside `run`: waits until every thread of the team has come here. */
  void barrier();

 private:
  void serve(int index);
  void end();

  const int size_;
  void (*work_)(void *, int) = nullptr;
  void *argument_ = nullptr;
  bool ending_ = false;
  alignas(64) std::atomic<uint32_t> job_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  alignas(64) std::atomic<int> sleeping_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
};

}  // namespace pastalm
#endif
