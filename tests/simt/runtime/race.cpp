// SPDX-License-Identifier: Apache-2.0
// The race checker. Two accesses to a byte race if one writes, not both are atomic, and no barrier or fence puts one
// before the other; in which order this run happened to make them does not matter. The compiler reports the accesses
// (-fsanitize=thread, race_hooks.cpp), the runtime the barriers.
//
// Each thread counts its epochs, a new one at every barrier, and knows of each other thread up to which epoch all that
// it did is past. A barrier is everybody learning what anybody knew. Of each byte the last write, the last two
// atomics and the last two reads are remembered: of three reads or atomics that nothing orders, one may escape what
// comes later.
#include "race.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "race_hooks.h"

namespace simt::race {
namespace {

using Epoch = uint32_t;
using Knowledge = std::vector<Epoch>;  // of every thread of the grid

struct Access {
  static constexpr ThreadNumber kNobody = ~0u;
  ThreadNumber thread = kNobody;
  Epoch epoch = 0;
  Place place = nullptr;
  bool is_atomic = false;
};

struct Byte {
  Access write;
  std::array<Access, 2> atomics;  // apart: an atomic by the thread that wrote would hide the write from others' atomics
  std::array<Access, 2> reads;
};

constexpr uintptr_t kPageBytes = 1024;
using Page = std::array<Byte, kPageBytes>;

struct ThreadState {
  std::shared_ptr<const Knowledge> knows;  // shared: after a barrier all know the same
  Epoch epoch = 1;
  std::shared_ptr<const Knowledge> at_fence;  // what its atomics tell others
  Knowledge heard;                            // what atomics of others have told it, to be known after a fence
};

void learn(Knowledge& knows, const Knowledge& other) {
  for (size_t i = 0; i < other.size(); ++i) knows[i] = std::max(knows[i], other[i]);
}

class RaceChecker final : public Checker {
 public:
  RaceChecker() { checker = this; }

  void begin_grid(unsigned threads) override {
    pages_.clear();
    last_page_ = nullptr;
    told_.clear();
    const auto nothing = std::make_shared<const Knowledge>(threads, 0);
    threads_.assign(threads, ThreadState{nothing, 1, nullptr, {}});
    in_grid_ = true;
  }

  void end_grid() override { in_grid_ = false; }

  void run(ThreadNumber thread, const void* stack, size_t stack_bytes) override {
    running_ = thread;
    stack_ = reinterpret_cast<uintptr_t>(stack);
    stack_bytes_ = stack_bytes;
  }

  void synchronize(std::span<const ThreadNumber> threads) override {
    auto all = std::make_shared<Knowledge>(*threads_[threads[0]].knows);
    const Knowledge* last = nullptr;
    for (const ThreadNumber thread : threads) {
      ThreadState& state = threads_[thread];
      if (state.knows.get() != last) learn(*all, *state.knows);
      last = state.knows.get();
    }
    for (const ThreadNumber thread : threads) (*all)[thread] = threads_[thread].epoch++;
    for (const ThreadNumber thread : threads) threads_[thread].knows = all;
  }

  void fence() override {
    ThreadState& state = threads_[running_];
    auto knows = std::make_shared<Knowledge>(*state.knows);
    if (!state.heard.empty()) learn(*knows, state.heard);
    state.heard.clear();
    state.knows = knows;
    auto tells = std::make_shared<Knowledge>(*knows);
    (*tells)[running_] = state.epoch++;
    state.at_fence = tells;
  }

  void atomic(const void* address, size_t bytes) override {
    if (!in_grid_) return;
    access(reinterpret_cast<uintptr_t>(address), bytes, true, true, __builtin_return_address(0));
    Knowledge& told = told_[reinterpret_cast<uintptr_t>(address)];
    ThreadState& state = threads_[running_];
    told.resize(threads_.size());
    state.heard.resize(threads_.size());
    learn(state.heard, told);
    if (state.at_fence != nullptr) learn(told, *state.at_fence);
  }

  void begin_memory(const void* address, size_t bytes) override {
    for (size_t i = 0; i < bytes; ++i) byte_at(reinterpret_cast<uintptr_t>(address) + i) = Byte{};
  }

  void end_memory(const void* address, size_t bytes) override {
    access(reinterpret_cast<uintptr_t>(address), bytes, true, false, kEndOfBlock);
  }

  // An access by the running thread, from instrumented code.
  void access(uintptr_t address, size_t bytes, bool is_write, bool is_atomic, Place place) {
    if (!in_grid_ || address - stack_ < stack_bytes_) return;
    const Access now{running_, threads_[running_].epoch, place, is_atomic};
    for (size_t i = 0; i < bytes; ++i) {
      Byte& byte = byte_at(address + i);
      if (races(byte.write, now)) report(byte.write, "write", now, is_write, address + i);
      for (const Access& atomic : byte.atomics) {
        if (races(atomic, now)) report(atomic, "atomic", now, is_write, address + i);
      }
      if (is_write) {
        for (const Access& read : byte.reads) {
          if (races(read, now)) report(read, "read", now, is_write, address + i);
        }
        if (is_atomic) {
          remember(byte.atomics, now);
        } else {
          byte = {.write = now, .atomics = {}, .reads = {}};
        }
      } else {
        remember(byte.reads, now);
      }
    }
  }

 private:
  bool races(const Access& before, const Access& now) const {
    return !(before.is_atomic && now.is_atomic) && is_unordered(before);
  }

  bool is_unordered(const Access& before) const {
    if (before.thread == Access::kNobody || before.thread == running_) return false;
    return (*threads_[running_].knows)[before.thread] < before.epoch;
  }

  // The last one, and before it one of another thread that is no more past than the last: otherwise the thread that
  // came last would hide the others from itself.
  void remember(std::array<Access, 2>& last_two, const Access& now) const {
    if (is_unordered(last_two[0])) last_two[1] = last_two[0];
    last_two[0] = now;
  }

  void report(const Access& before, const char* before_did, const Access& now, bool is_write, uintptr_t address) const {
    report_race(before.thread, before.place, before_did, now.place, is_write ? "write" : "read", address);
  }

  Byte& byte_at(uintptr_t address) {
    const uintptr_t number = address / kPageBytes;
    if (last_page_ == nullptr || number != last_number_) {
      std::unique_ptr<Page>& page = pages_[number];
      if (page == nullptr) page = std::make_unique<Page>();
      last_number_ = number;
      last_page_ = page.get();
    }
    return (*last_page_)[address % kPageBytes];
  }

  bool in_grid_ = false;
  ThreadNumber running_ = 0;
  uintptr_t stack_ = 0;
  size_t stack_bytes_ = 0;
  std::vector<ThreadState> threads_;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  uintptr_t last_number_ = 0;
  Page* last_page_ = nullptr;
  std::unordered_map<uintptr_t, Knowledge> told_;  // by atomics, per address
};

RaceChecker the_checker;

}  // namespace

void on_access(const void* address, size_t bytes, bool is_write, Place place) {
  the_checker.access(reinterpret_cast<uintptr_t>(address), bytes, is_write, false, place);
}

}  // namespace simt::race
