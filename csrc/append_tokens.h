// New tokens go to the end of the steady zone.
#pragma once

#include "views.h"

namespace retro {

struct AppendTokensParams {
  int64_t batch, heads, tokens, row_bytes;
  Rows keys, values;                // [B, Hkv, T, D]; strides in elements
  const bool* mask;                 // [B, T]: tokens to append; may be nullptr (all)
  Rows steady_keys, steady_values;  // [B, Hkv, S, D]
  int64_t element_bytes;
  int64_t* counters;  // [B, kCounters]
};

}  // namespace retro
