// SPDX-License-Identifier: Apache-2.0
// A function on a stack of its own, that can stop in the middle and go on later. Boost.Context switches; where there is
// no Boost, the ucontext of the C library does (SIMT_UCONTEXT), at two system calls a switch.
//
// Boost's lower layer, because its fiber class unwinds the stack of a fiber that never ended, and a thread that lost a
// race stops within a call that the compiler takes for one that cannot throw.
#pragma once

#include <cstddef>

#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#else
#include <boost/context/detail/fcontext.hpp>
#endif

namespace simt {

class Context {
 public:
  explicit Context(void (*body)(void*), void* argument);
  ~Context();  // also where the body has not ended: then it never will
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  void resume();   // until the body suspends itself or ends
  void suspend();  // called by the body

  const void* stack() const { return stack_; }
  static constexpr size_t kStackBytes = 128 << 10;

 private:
  static void enter(Context* self);
  void* stack_;
  void (*body_)(void*);
  void* argument_;
  // What AddressSanitizer wants to know about a switch.
  void* own_frames_ = nullptr;
  void* callers_frames_ = nullptr;
  const void* callers_stack_ = nullptr;
  size_t callers_stack_bytes_ = 0;
#if defined(SIMT_UCONTEXT)
  static void start(unsigned high, unsigned low);
  ucontext_t own_, caller_;
#else
  static void start(boost::context::detail::transfer_t transfer);
  boost::context::detail::fcontext_t own_, caller_ = nullptr;
#endif
};

}  // namespace simt
