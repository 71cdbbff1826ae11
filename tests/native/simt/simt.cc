#include "simt/simt.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

namespace simt {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kGuardBytes = 4096;
constexpr unsigned char kGuard = 0xa5;

enum class Waiting { kNothing, kBarrier, kLanes };

constexpr const char* kDifferent = "lanes of a warp are at different shuffles or products";

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

// Started by a ucontext, and from then on switched by _setjmp and _longjmp: swapcontext makes two
// system calls each time.
struct Fiber {
  ucontext_t start;
  jmp_buf jump;
  bool started = false;
  std::unique_ptr<char[]> stack;
  Waiting waiting = Waiting::kNothing;
  bool done = false;
  Work work = nullptr;  // for which it waits with the other lanes
  void* given = nullptr;
  std::vector<Copy> copies;  // that it has not waited for
};

int64_t bytes_read = 0;

class Block {
 public:
  Block(const Grid& grid, uint32_t seed, const std::function<void()>& kernel)
      : grid(grid),
        kernel_(kernel),
        random_(seed),
        fibers_(grid.threads),
        order_(grid.threads),
        resting_(grid.threads / kWarp) {
    for (Fiber& fiber : fibers_) {
      fiber.stack.reset(new char[kStackBytes]);
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.get();
      fiber.start.uc_stack.ss_size = kStackBytes;
      makecontext(&fiber.start, &Block::Enter, 0);
    }
    std::iota(order_.begin(), order_.end(), 0);
    memory_.resize(grid.shared_bytes + 2 * kGuardBytes + 64);
    const auto address = reinterpret_cast<uintptr_t>(memory_.data()) + kGuardBytes;
    shared = reinterpret_cast<char*>((address + 63) / 64 * 64);
  }

  std::string Run(int64_t index) {
    block = index;
    std::fill(memory_.begin(), memory_.end(), static_cast<char>(kGuard));
    std::memset(shared, 0xff, grid.shared_bytes);  // NaN of every type
    for (Fiber& fiber : fibers_) fiber.done = false;
    std::string error;
    fault.clear();
    while (error.empty() && Step(&error)) {
      error = fault;
    }
    for (Fiber& fiber : fibers_) {
      if (error.empty() && !fiber.copies.empty()) error = "a copy that its thread has not awaited";
      fiber.copies.clear();
    }
    if (error.empty()) error = CheckGuards();
    return error.empty() ? error : error + " in block " + std::to_string(index);
  }

  // Called by a fiber: gives way until what it waits for has happened.
  void Wait(Waiting what) {
    Fiber& fiber = fibers_[thread];
    fiber.waiting = what;
    if (_setjmp(fiber.jump) == 0) _longjmp(scheduler_, 1);
  }
  void MeetLanes(Work work, void* given) {
    fibers_[thread].work = work;
    fibers_[thread].given = given;
    Wait(Waiting::kLanes);
  }
  void StartCopy(const Copy& copy) {
    const auto misaligned = [&](const void* p) {
      return reinterpret_cast<uintptr_t>(p) % copy.bytes != 0;
    };
    const char* to = static_cast<char*>(copy.to);
    if (misaligned(copy.to) || misaligned(copy.from)) {
      fault = "a misaligned copy";
    } else if (to < shared || to + copy.bytes > shared + grid.shared_bytes) {
      fault = "a copy outside the shared memory";
    } else {
      std::memset(copy.to, 0xff, copy.bytes);
      fibers_[thread].copies.push_back(copy);
    }
  }
  void FinishCopies() {
    std::vector<Copy>& copies = fibers_[thread].copies;
    for (const Copy& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
    copies.clear();
  }

  const Grid grid;
  int thread = 0;
  int64_t block = 0;
  char* shared;
  std::string fault;  // of a fiber

 private:
  static void Enter();

  // Runs every fiber that can go on, in a new order, then frees those that have met. About half of
  // the warps rest after a barrier until the others can go no further. False: all are done.
  bool Step(std::string* error) {
    std::shuffle(order_.begin(), order_.end(), random_);
    bool ran = false, left = false;
    for (const int t : order_) {
      if (!CanRun(fibers_[t])) continue;
      if (resting_[t / kWarp]) {
        left = true;
      } else {
        Resume(t);
        ran = true;
      }
    }
    if (MeetInWarps(error) || ran || !error->empty()) return error->empty();
    if (left) {
      resting_.assign(resting_.size(), false);
      return true;
    }
    for (size_t w = 0; w < resting_.size(); ++w) resting_[w] = random_() % 2 == 0;
    return MeetInBlock(error);
  }
  static bool CanRun(const Fiber& fiber) {
    return !fiber.done && fiber.waiting == Waiting::kNothing;
  }

  void Resume(int t) {
    thread = t;
    if (_setjmp(scheduler_) != 0) return;
    if (fibers_[thread].started) _longjmp(fibers_[thread].jump, 1);
    fibers_[thread].started = true;
    setcontext(&fibers_[thread].start);
  }

  bool MeetInWarps(std::string* error) {
    bool any = false;
    for (size_t first = 0; first < fibers_.size(); first += kWarp) {
      Fiber* warp = &fibers_[first];
      const int lanes = static_cast<int>(std::min<size_t>(kWarp, fibers_.size() - first));
      int count = 0;
      for (int lane = 0; lane < lanes; ++lane) count += warp[lane].waiting == Waiting::kLanes;
      if (count == 0) continue;
      if (count != kWarp) {
        *error = "a shuffle or a product of matrices lacks lanes of its warp";
        return false;
      }
      void* given[kWarp];
      const char* wrong = nullptr;
      for (int lane = 0; lane < kWarp; ++lane) {
        given[lane] = warp[lane].given;
        if (warp[lane].work != warp[0].work) wrong = kDifferent;
        warp[lane].waiting = Waiting::kNothing;
      }
      if (wrong == nullptr) wrong = warp[0].work(given);
      if (wrong != nullptr) {
        *error = wrong;
        return false;
      }
      any = true;
    }
    return any;
  }

  bool MeetInBlock(std::string* error) {
    int waiting = 0;
    for (const Fiber& fiber : fibers_) waiting += fiber.waiting == Waiting::kBarrier;
    if (waiting == 0) return false;  // all are done: none can run, and none waits
    if (waiting != grid.threads) {
      *error = "a barrier that not all threads of the block have met";
      return false;
    }
    for (Fiber& fiber : fibers_) fiber.waiting = Waiting::kNothing;
    return true;
  }

  std::string CheckGuards() const {
    const char* end = shared + grid.shared_bytes;
    const auto intact = [](const char* from, const char* to) {
      return std::all_of(from, to, [](char c) { return static_cast<unsigned char>(c) == kGuard; });
    };
    const char* memory_end = memory_.data() + memory_.size();
    return intact(memory_.data(), shared) && intact(end, memory_end)
               ? ""
               : "a write outside the shared memory";
  }

  const std::function<void()>& kernel_;
  std::mt19937 random_;
  std::vector<Fiber> fibers_;
  std::vector<int> order_;
  std::vector<bool> resting_;  // by warp
  std::vector<char> memory_;
  jmp_buf scheduler_;
};

struct Shuffled {
  uint64_t bits;
  int mask;
};
const char* Shuffle(void* const (&lanes)[kWarp]) {
  uint64_t given[kWarp];
  const int mask = static_cast<Shuffled*>(lanes[0])->mask;
  for (int lane = 0; lane < kWarp; ++lane) {
    const Shuffled& shuffled = *static_cast<Shuffled*>(lanes[lane]);
    given[lane] = shuffled.bits;
    if (shuffled.mask != mask) return kDifferent;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    static_cast<Shuffled*>(lanes[lane])->bits = given[lane ^ mask];
  }
  return nullptr;
}

thread_local Block* current = nullptr;

void Block::Enter() {
  for (;;) {  // once for every block of the grid
    current->kernel_();
    current->fibers_[current->thread].done = true;
    current->Wait(Waiting::kNothing);
  }
}

}  // namespace

int ThreadIndex() { return current->thread; }
int BlockSize() { return current->grid.threads; }
int64_t BlockIndex() { return current->block; }
int64_t BlockCount() { return current->grid.blocks; }
char* SharedMemory() { return current->shared; }
void SyncThreads() { current->Wait(Waiting::kBarrier); }
void MeetLanes(Work work, void* given) { current->MeetLanes(work, given); }
uint64_t ShuffleBits(uint64_t bits, int mask) {
  Shuffled shuffled = {bits, mask};
  MeetLanes(&Shuffle, &shuffled);
  return shuffled.bits;
}

void CopyAsyncBytes(void* to, const void* from, int bytes) {
  CountRead(bytes);
  current->StartCopy({to, from, bytes});
}
void WaitForCopies() { current->FinishCopies(); }
void CountRead(int64_t bytes) { bytes_read += bytes; }
int64_t TakeBytesRead() { return std::exchange(bytes_read, 0); }

std::string Run(const Grid& grid, uint32_t seed, const std::function<void()>& kernel) {
  if (grid.threads % kWarp != 0) return "the number of threads is not a multiple of a warp's";
  Block block(grid, seed, kernel);
  current = &block;
  std::string error;
  for (int64_t b = grid.first_block; b < grid.blocks && error.empty(); ++b) error = block.Run(b);
  current = nullptr;
  return error;
}

}  // namespace simt
