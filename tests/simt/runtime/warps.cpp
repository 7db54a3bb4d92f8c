// SPDX-License-Identifier: Apache-2.0
#include "warps.h"

#include "state.h"

namespace simt {
namespace {

Fiber* lane_of(const Fiber& fiber, unsigned lane) {
  const auto& threads = fiber.block->threads;
  const unsigned number = fiber.warp() * 32 + lane;
  return number < threads.size() ? threads[number].get() : nullptr;
}

// A whole mask may be written for a warp that has fewer lanes.
unsigned existing_lanes(const Fiber& fiber, unsigned mask, Site site) {
  const size_t lanes = fiber.block->threads.size() - fiber.warp() * 32;
  const unsigned existing = lanes >= 32 ? 0xffffffffu : (1u << lanes) - 1;
  if (mask != 0xffffffffu && (mask & ~existing) != 0) fail(site, "mask 0x%08x names lanes that do not exist", mask);
  return mask & existing;
}

// True where every lane of the mask waits in this exchange; fails where one never will.
bool all_arrived(const Fiber& fiber, unsigned mask, Site site) {
  bool all = true;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0 || lane == fiber.lane()) continue;
    const Fiber& other = *lane_of(fiber, lane);
    if (other.state == Fiber::State::kExited) fail(site, "mask 0x%08x names lane %u, which has exited", mask, lane);
    const bool waits = other.state == Fiber::State::kInExchange;
    // It may be with others now and come later; but one that waits for this lane must have come from here.
    if (waits && (other.mask >> fiber.lane() & 1) != 0 &&
        (other.mask != mask || other.waits_at.line() != site.line() || other.waits_at.column() != site.column())) {
      fail(site, "divergent warp: mask 0x%08x here, but lane %u waits with mask 0x%08x at %s:%u", mask, lane,
           other.mask, other.waits_at.file_name(), other.waits_at.line());
    }
    all &= waits && (other.mask >> fiber.lane() & 1) != 0;
  }
  return all;
}

const Exchange& meet(unsigned mask, uint64_t operand, bool orders_memory, Site site) {
  Fiber& fiber = self();
  if ((mask >> fiber.lane() & 1) == 0) fail(site, "mask 0x%08x does not name the calling lane %u", mask, fiber.lane());
  mask = existing_lanes(fiber, mask, site);
  const bool is_last = all_arrived(fiber, mask, site);
  fiber.mask = mask;
  fiber.operand = operand;
  fiber.state = Fiber::State::kInExchange;
  fiber.waits_at = site;
  if (is_last) {
    Exchange all{};
    all.lanes = mask;
    race::ThreadNumber numbers[32];
    unsigned count = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      all.operand[lane] = lane_of(fiber, lane)->operand;
      numbers[count++] = lane_of(fiber, lane)->race_number;
    }
    if (orders_memory && race::checker != nullptr) race::checker->synchronize({numbers, count});
    for (unsigned lane = 0; lane < 32; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      lane_of(fiber, lane)->exchange = all;
      wake(*lane_of(fiber, lane));
    }
  }
  fiber.context->suspend();
  return fiber.exchange;
}

}  // namespace

const Exchange& exchange(unsigned mask, uint64_t operand, Site site) { return meet(mask, operand, false, site); }

void warp_barrier(unsigned mask, Site site) {
  if (!is_removed(site)) meet(mask, 0, true, site);
}

}  // namespace simt
