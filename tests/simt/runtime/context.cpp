// SPDX-License-Identifier: Apache-2.0
#include "context.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <vector>

// Present in binaries with AddressSanitizer. The runtime itself is never instrumented: it copies memory that kernels
// have left in any state.
extern "C" {
void __sanitizer_start_switch_fiber(void** frames, const void* stack, size_t bytes) __attribute__((weak));
void __sanitizer_finish_switch_fiber(void* frames, const void** stack, size_t* bytes) __attribute__((weak));
void __asan_unpoison_memory_region(const volatile void* address, size_t bytes) __attribute__((weak));
}

namespace simt {
namespace {

constexpr size_t kGuardBytes = 4096;

// Stacks are used again: a page below each catches what runs over.
std::vector<void*>& free_stacks() {
  static std::vector<void*> stacks;
  return stacks;
}

void* take_stack() {
  std::vector<void*>& stacks = free_stacks();
  if (!stacks.empty()) {
    void* const stack = stacks.back();
    stacks.pop_back();
    return stack;
  }
  void* const memory = mmap(nullptr, kGuardBytes + Context::kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) throw std::bad_alloc();
  return static_cast<char*>(memory) + kGuardBytes;
}

void leave(void** frames, const void* stack, size_t bytes) {
  if (__sanitizer_start_switch_fiber != nullptr) __sanitizer_start_switch_fiber(frames, stack, bytes);
}

void arrive(void* frames, const void** stack, size_t* bytes) {
  if (__sanitizer_finish_switch_fiber != nullptr) __sanitizer_finish_switch_fiber(frames, stack, bytes);
}

}  // namespace

Context::~Context() {
  if (__asan_unpoison_memory_region != nullptr) __asan_unpoison_memory_region(stack_, kStackBytes);
  free_stacks().push_back(stack_);
}

void Context::enter(Context* self) {
  arrive(nullptr, &self->callers_stack_, &self->callers_stack_bytes_);
  self->body_(self->argument_);
  leave(nullptr, self->callers_stack_, self->callers_stack_bytes_);
}

#if defined(SIMT_UCONTEXT)

Context::Context(void (*body)(void*), void* argument) : stack_(take_stack()), body_(body), argument_(argument) {
  getcontext(&own_);
  own_.uc_stack.ss_sp = stack_;
  own_.uc_stack.ss_size = kStackBytes;
  own_.uc_link = &caller_;
  const uintptr_t self = reinterpret_cast<uintptr_t>(this);  // makecontext passes on nothing wider than an int
  makecontext(&own_, reinterpret_cast<void (*)()>(&Context::start), 2, static_cast<unsigned>(self >> 32),
              static_cast<unsigned>(self));
}

void Context::start(unsigned high, unsigned low) {
  enter(reinterpret_cast<Context*>(uintptr_t{high} << 32 | low));  // then on with uc_link
}

void Context::resume() {
  leave(&callers_frames_, stack_, kStackBytes);
  swapcontext(&caller_, &own_);
  arrive(callers_frames_, nullptr, nullptr);
}

void Context::suspend() {
  leave(&own_frames_, callers_stack_, callers_stack_bytes_);
  swapcontext(&own_, &caller_);
  arrive(own_frames_, &callers_stack_, &callers_stack_bytes_);
}

#else

Context::Context(void (*body)(void*), void* argument)
    : stack_(take_stack()),
      body_(body),
      argument_(argument),
      own_(boost::context::detail::make_fcontext(static_cast<char*>(stack_) + kStackBytes, kStackBytes, &start)) {}

void Context::start(boost::context::detail::transfer_t transfer) {
  Context* const self = static_cast<Context*>(transfer.data);
  self->caller_ = transfer.fctx;
  enter(self);
  boost::context::detail::jump_fcontext(self->caller_, nullptr);
}

void Context::resume() {
  leave(&callers_frames_, stack_, kStackBytes);
  own_ = boost::context::detail::jump_fcontext(own_, this).fctx;
  arrive(callers_frames_, nullptr, nullptr);
}

void Context::suspend() {
  leave(&own_frames_, callers_stack_, callers_stack_bytes_);
  caller_ = boost::context::detail::jump_fcontext(caller_, nullptr).fctx;
  arrive(own_frames_, &callers_stack_, &callers_stack_bytes_);
}

#endif

}  // namespace simt
