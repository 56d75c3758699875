#include "checks.h"

#include <string>

#ifndef RETRO_OPS_VERSION
#error "setup.py defines RETRO_OPS_VERSION, the version in pyproject.toml"
#endif

namespace retro {
namespace {

std::string library_version() { return RETRO_OPS_VERSION; }

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CompositeExplicitAutograd, m) {
  m.impl("library_version", TORCH_BOX(&retro::library_version));
}
