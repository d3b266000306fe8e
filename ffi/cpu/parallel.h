// Phases of tasks on a thread pool that is never blocked.
//
// A handler runs on a thread of the pool that it schedules on, so waiting for a job that has not
// started can wait for ever. Here the caller works through every task itself if it must; helper
// jobs join in when the pool gets to them. A participant waits only at the end of a phase, where
// every task has been taken by a thread that is running it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "ffi/cpu/float_env.h"

namespace jax_moe::cpu {

// A thread pool: how many threads it has, and how to start a job on one of them.
struct Executor {
  int64_t threads = 1;
  std::function<void(std::function<void()>)> schedule;
};

// Tasks 0 .. tasks - 1 in any order and on any thread; all end before the next phase starts.
struct Phase {
  int64_t tasks;
  std::function<void(int64_t task)> run;
};

namespace internal {

struct PhaseState {
  explicit PhaseState(const Phase& phase) : tasks(phase.tasks), run(&phase.run) {}
  const int64_t tasks;
  // Valid while a task is unfinished: only a thread that has taken one follows this pointer.
  const std::function<void(int64_t)>* const run;
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int64_t> done{0};
};

// Outlives the call: a helper job that the pool starts late finds no task and leaves.
struct SharedPhases {
  explicit SharedPhases(const std::vector<Phase>& phases) {
    for (const Phase& phase : phases) states.push_back(std::make_unique<PhaseState>(phase));
  }

  void Participate() {
    ScopedIeeeFloat ieee;
    for (const auto& state : states) {
      int64_t finished = 0;
      for (int64_t i; (i = state->next.fetch_add(1, std::memory_order_relaxed)) < state->tasks;) {
        (*state->run)(i);
        ++finished;
      }
      if (finished > 0) state->done.fetch_add(finished, std::memory_order_acq_rel);
      for (int spins = 0; state->done.load(std::memory_order_acquire) < state->tasks; ++spins) {
        if (spins < 4096) {
          Pause();
        } else {
          std::this_thread::yield();
        }
      }
    }
  }

  static void Pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  std::vector<std::unique_ptr<PhaseState>> states;
};

}  // namespace internal

// Runs the phases in order and returns when the last has ended. `parallel` false: on this thread
// only.
inline void RunPhases(const Executor& executor, const std::vector<Phase>& phases, bool parallel) {
  if (!parallel || executor.threads <= 1 || !executor.schedule) {
    ScopedIeeeFloat ieee;
    for (const Phase& phase : phases) {
      for (int64_t i = 0; i < phase.tasks; ++i) phase.run(i);
    }
    return;
  }
  auto shared = std::make_shared<internal::SharedPhases>(phases);
  int64_t most_tasks = 0;
  for (const Phase& phase : phases) most_tasks = std::max(most_tasks, phase.tasks);
  const int64_t helpers = std::min(executor.threads, most_tasks) - 1;
  for (int64_t i = 0; i < helpers; ++i) {
    executor.schedule([shared] { shared->Participate(); });
  }
  shared->Participate();
}

}  // namespace jax_moe::cpu
