// SPDX-License-Identifier: Apache-2.0
// Options, and the barriers and fences that have been seen: what tests/simt/mutants/run works with.
//
//   SIMT_REMOVED=file:line   this barrier or fence does nothing, in the whole process
//   SIMT_SITES=file          the process leaves a list of all that it came across there, file:line each
#include <cstdlib>
#include <fstream>

#include "state.h"

namespace simt {
namespace {

struct Sites {
  std::set<std::pair<const char*, unsigned>> seen;  // one site may have several pointers

  ~Sites() {
    const char* const path = std::getenv("SIMT_SITES");
    if (path == nullptr) return;
    std::ofstream list(path);
    for (const SyncSite& site : names()) list << site.file << ':' << site.line << '\n';
  }

  std::set<SyncSite> names() const {
    std::set<SyncSite> names;
    for (const auto& [file, line] : seen) names.insert({file, line});
    return names;
  }
};
Sites sites;

Options from_environment() {
  Options options;
  const char* const removed = std::getenv("SIMT_REMOVED");
  if (removed == nullptr) return options;
  const std::string text = removed;
  const size_t colon = text.rfind(':');
  if (colon == text.npos) throw std::invalid_argument("SIMT_REMOVED must be file:line; got " + text);
  options.removed = SyncSite{text.substr(0, colon), static_cast<unsigned>(std::stoul(text.substr(colon + 1)))};
  return options;
}

}  // namespace

Options& options() {
  static Options options = from_environment();
  return options;
}

std::set<SyncSite> sync_sites() { return sites.names(); }

bool is_removed(Site site) {
  sites.seen.insert({site.file_name(), site.line()});
  const std::optional<SyncSite>& removed = options().removed;
  return removed.has_value() && removed->line == site.line() && removed->file == site.file_name();
}

}  // namespace simt
