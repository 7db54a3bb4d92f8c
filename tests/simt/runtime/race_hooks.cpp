// SPDX-License-Identifier: Apache-2.0
// What g++ calls with -fsanitize=thread, linked in place of its own runtime. The names are a stable interface: the
// Linux kernel's race detector stands behind them in the same way.
#include "race_hooks.h"

#include <link.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "state.h"

namespace simt::race {
namespace {

// "file:line" of a place in this program; the address where addr2line does not know it.
void describe(Place place, char* text, size_t bytes) {
  if (place == kEndOfBlock) {
    std::snprintf(text, bytes, "the end of its block");
    return;
  }
  const char* const call = static_cast<const char*>(place) - 1;  // a return address lies behind the call
  std::snprintf(text, bytes, "%p", static_cast<const void*>(call));
  const auto base = reinterpret_cast<const char*>(_r_debug.r_map->l_addr);  // of the main program
  char command[100];
  std::snprintf(command, sizeof command, "addr2line -ie /proc/%d/exe 0x%zx", getpid(),
                static_cast<size_t>(call - base));
  FILE* const output = popen(command, "r");
  if (output == nullptr) return;
  char line[300];
  while (std::fgets(line, sizeof line, output) != nullptr) {  // what was inlined, innermost first
    if (line[0] == '?') continue;
    line[std::strcspn(line, " \n")] = '\0';
    std::snprintf(text, bytes, "%s", line);
    if (std::strstr(line, "/simt/runtime/") == nullptr) break;
  }
  pclose(output);
}

}  // namespace

void report_race(ThreadNumber before_thread, Place before, const char* before_did, Place now, const char* now_does,
                 uintptr_t address) {
  char here[300], there[300];
  describe(now, here, sizeof here);
  describe(before, there, sizeof there);
  const unsigned per_block = running->block_size.x * running->block_size.y * running->block_size.z;
  fail(Site{}, "race: %s of 0x%zx at %s, not ordered after the %s by block %u thread %u at %s", now_does,
       static_cast<size_t>(address), here, before_did, before_thread / per_block, before_thread % per_block, there);
}

}  // namespace simt::race

using simt::race::on_access;

#define SIMT_HERE __builtin_return_address(0)
#define SIMT_HOOK(name, bytes, is_write) \
  void __tsan_##name##bytes(void* address) { on_access(address, bytes, is_write, SIMT_HERE); }
#define SIMT_HOOKS(bytes)                 \
  SIMT_HOOK(read, bytes, false)           \
  SIMT_HOOK(write, bytes, true)           \
  SIMT_HOOK(unaligned_read, bytes, false) \
  SIMT_HOOK(unaligned_write, bytes, true)

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_read_range(void* address, size_t bytes) { on_access(address, bytes, false, SIMT_HERE); }
void __tsan_write_range(void* address, size_t bytes) { on_access(address, bytes, true, SIMT_HERE); }
// Of the atomics only this one, in the guards of static variables of host code: kernels' atomics come by simt::change.
unsigned char __tsan_atomic8_load(const volatile unsigned char* address, int) { return *address; }
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
}
