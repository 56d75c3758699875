// The page cache of a (row, KV head): how its tables are laid out. Each tensor has one writer, named here,
// and whatever a table for the policy says, attention reads the right tokens: page_gather checks it.
#pragma once

#include "views.h"

namespace retro {

// Columns before the pages of `free_pages`, int32 [B, Hkv, kFreeHeader + P]; page_gather writes it.
enum FreeHeader : int64_t {
  kFreeStep = 0,  // gathers so far: the number of the last one
  kFreeCount,  // free pages; they stand in the first columns behind the header, used from the end
  kFreeHeader,
};

// Columns before the ids of `requests`, int32 [B, Hkv, kRequestHeader + R]; page_gather writes it.
enum RequestHeader : int64_t {
  kRequestStep = 0,  // number of the gather that retrieved these clusters
  kRequestFree,      // pages that it left free
  kRequestMissed,    // pages that were not in the cache when it came
  kRequestHeader,
};

// Columns before the clusters of `decisions`, int32 [B, Hkv, kDecisionHeader + P]; update_pages writes it.
enum DecisionHeader : int64_t {
  kDecisionStep = 0,  // number of the gather whose requests were known; 0: nothing decided yet
  kDecisionCount,     // clusters that may go, the first one first
  kDecisionHeader,
};

// Pages of a cluster in `cached`, uint8 [B, Hkv, C]; page_gather writes it. More pages count as 255.
inline constexpr int64_t kMostPagesCounted = 255;

RETRO_HOST_DEVICE inline int64_t page_count(int64_t tokens, int64_t page_size) {
  return (tokens + page_size - 1) / page_size;
}

// Where the pages of a cluster begin in the page table, int32 [B, Hkv, N / page_size + C] of one (row,
// head): the page of its token j is at first_entry + j / page_size; -1: read it from the store.
//
// The entries of two clusters never overlap. Cluster c of n > 0 tokens from slot a on has entries a / S + c
// to a / S + c + ceil(n / S) - 1, that of the next cluster begin at (a + n) / S + c + 1. Since
// floor((a + n) / S) >= floor(a / S) + floor(n / S) and floor(n / S) + 1 >= ceil(n / S), it begins behind
// them. With c <= C - 1 and a + n <= N the same sum says that the last entry is at most N / S + C - 1.
// The index grows at its end only, so what it held keeps its entries; clusters that grow_index makes anew
// have none in use, since page_gather leaves them out until then.
RETRO_HOST_DEVICE inline int64_t first_entry(
    int64_t first_slot, int64_t cluster, int64_t page_size) {
  return first_slot / page_size + cluster;
}

// Tables that page_gather and the policy share are read by one while the other may write: each number
// whole, not all of them at one moment. What stands before a published step is there when that is read.
template <typename T>
T shared(const T& number) {
  return __atomic_load_n(&number, __ATOMIC_RELAXED);
}
template <typename T>
void set_shared(T& number, T value) {
  __atomic_store_n(&number, value, __ATOMIC_RELAXED);
}
inline int32_t published(const int32_t& step) { return __atomic_load_n(&step, __ATOMIC_ACQUIRE); }
inline void publish(int32_t& step, int32_t value) {
  __atomic_store_n(&step, value, __ATOMIC_RELEASE);
}

}  // namespace retro
