// XLA's intra-op thread pool as the kernels' ParallelFor.
#ifndef CURVAX_CSRC_CPU_PARALLEL_FOR_H_
#define CURVAX_CSRC_CPU_PARALLEL_FOR_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "curvax/types.h"
#include "xla/ffi/api/ffi.h"

namespace curvax {

// The calling thread and the pool's threads take indices from one counter.
//
// XLA does not promise that scheduled tasks ever run beside the caller: every worker may be inside
// a handler like this one. So the caller waits only for indices that a running thread has already
// taken, never for a task to start. A task that starts late finds nothing left, and touches only
// the shared state, which it keeps alive itself.
class XlaParallelFor {
 public:
  explicit XlaParallelFor(xla::ffi::ThreadPool pool)
      : pool_(pool), threads_(std::max<int64_t>(1, pool.num_threads())) {}

  ParallelFor view() { return {&XlaParallelFor::Run, this, threads_}; }

 private:
  struct State {
    State(int64_t count, ParallelFor::Body body, void* context)
        : count(count), body(body), context(context) {}

    // Takes indices until none are left.
    void Work() {
      int64_t index = next.fetch_add(1);
      if (index >= count) return;
      const int64_t worker = next_worker.fetch_add(1);
      int64_t finished = 0;
      for (; index < count; index = next.fetch_add(1)) {
        body(context, worker, index);
        ++finished;
      }
      if (done.fetch_add(finished) + finished == count) {
        // The lock orders this notification after the caller's check of its condition.
        std::lock_guard<std::mutex> lock(mutex);
        all_done.notify_all();
      }
    }
    void Wait() {
      std::unique_lock<std::mutex> lock(mutex);
      all_done.wait(lock, [this] { return done.load() == count; });
    }

    const int64_t count;
    const ParallelFor::Body body;
    void* const context;
    std::atomic<int64_t> next{0}, next_worker{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };

  static void Run(void* self, int64_t count, ParallelFor::Body body, void* context) {
    static_cast<XlaParallelFor*>(self)->Run(count, body, context);
  }
  void Run(int64_t count, ParallelFor::Body body, void* context) {
    const int64_t helpers = std::min(threads_, count) - 1;
    if (helpers <= 0) {
      for (int64_t i = 0; i < count; ++i) body(context, 0, i);
      return;
    }
    auto state = std::make_shared<State>(count, body, context);
    for (int64_t i = 0; i < helpers; ++i) pool_.Schedule([state] { state->Work(); });
    state->Work();
    state->Wait();
  }

  xla::ffi::ThreadPool pool_;
  const int64_t threads_;
};

}  // namespace curvax

#endif  // CURVAX_CSRC_CPU_PARALLEL_FOR_H_
