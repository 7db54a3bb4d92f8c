// SPDX-License-Identifier: Apache-2.0
#include "warps.h"

#include <bit>

#include "state.h"

namespace simt {
namespace {

// A whole mask may be written for a warp that has fewer lanes.
unsigned existing_lanes(const Fiber& fiber, unsigned mask, Site site) {
  const size_t lanes = fiber.block->threads.size() - fiber.warp() * 32;
  const unsigned existing = lanes >= 32 ? 0xffffffffu : (1u << lanes) - 1;
  if (mask != 0xffffffffu && (mask & ~existing) != 0) fail(site, "mask 0x%08x names lanes that do not exist", mask);
  return mask & existing;
}

// Joins those who wait with the same mask, or is the first to. Fails where a lane of the mask never can come.
Meeting& join(const Fiber& fiber, unsigned mask, Site site) {
  Warp& warp = fiber.block->warps[fiber.warp()];
  const unsigned lane = 1u << fiber.lane();
  if ((warp.exited & mask) != 0) {
    fail(site, "mask 0x%08x names lane %d, which has exited", mask, std::countr_zero(warp.exited & mask));
  }
  for (Meeting& meeting : warp.meetings) {
    if ((meeting.mask & lane) == 0) continue;  // they do not wait for this lane
    if (meeting.mask != mask || meeting.site.line() != site.line() || meeting.site.column() != site.column()) {
      fail(site, "divergent warp: mask 0x%08x here, but lanes 0x%08x wait with mask 0x%08x at %s:%u", mask,
           meeting.arrived, meeting.mask, meeting.site.file_name(), meeting.site.line());
    }
    meeting.arrived |= lane;
    return meeting;
  }
  return warp.meetings.emplace_back(Meeting{mask, lane, site});
}

template <class Visit>
void for_each_lane(const Fiber& fiber, unsigned mask, Visit visit) {
  for (unsigned lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const unsigned lane = static_cast<unsigned>(std::countr_zero(lanes));
    visit(lane, *fiber.block->threads[fiber.warp() * 32 + lane]);
  }
}

const Exchange& meet(unsigned mask, uint64_t operand, bool orders_memory, Site site) {
  Fiber& fiber = self();
  if ((mask >> fiber.lane() & 1) == 0) fail(site, "mask 0x%08x does not name the calling lane %u", mask, fiber.lane());
  mask = existing_lanes(fiber, mask, site);
  Meeting& meeting = join(fiber, mask, site);
  fiber.operand = operand;
  fiber.state = Fiber::State::kInExchange;
  fiber.waits_at = site;
  if (meeting.arrived == mask) {
    std::vector<Meeting>& meetings = fiber.block->warps[fiber.warp()].meetings;
    meetings.erase(meetings.begin() + (&meeting - meetings.data()));
    Exchange all{};
    all.lanes = mask;
    race::ThreadNumber numbers[32];
    unsigned count = 0;
    for_each_lane(fiber, mask, [&](unsigned lane, const Fiber& other) {
      all.operand[lane] = other.operand;
      numbers[count++] = other.race_number;
    });
    if (orders_memory && race::checker != nullptr) race::checker->synchronize({numbers, count});
    for_each_lane(fiber, mask, [&](unsigned, Fiber& other) {
      other.exchange = all;
      wake(other);
    });
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
