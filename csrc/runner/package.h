// A package that `python -m retro_ops export` wrote: two programs, their weights, what it says of itself.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "graph.h"

namespace retro {

// Opens an op library, e.g. retro_ops/_C.abi3.so, which registers its ops; throws std::runtime_error.
void load_library(const std::string& path);

// The version of the op library that is loaded; throws std::runtime_error if none is.
std::string library_version();

// Of an error of torch, which puts places in its sources on lines of their own.
std::string first_line(const std::string& message);

class Package {
 public:
  // Throws std::runtime_error where the file is no package, is for another device than `device` (empty: any), needs
  // another version of the op library than the one that is loaded or kernels that no library has, or where there is no
  // memory for its state. A package for a GPU gives the calling thread, which has to make all calls, a stream of its
  // own unless it has one, and records the step as a CUDA graph, unless `graph` is false. It is made and used inside a
  // c10::InferenceMode, or both outside.
  Package(const std::string& path, const std::string& device, bool graph = true);
  Package(const Package&) = delete;  // nor moved: what it frees, its programs point to
  Package& operator=(const Package&) = delete;

  int64_t context() const { return context_; }              // tokens that a row can hold
  int64_t batch_size() const { return batch_size_; }        // rows
  int64_t vocabulary() const { return vocabulary_; }        // tokens that there are
  const std::vector<int64_t>& eos() const { return eos_; }  // tokens that end a row
  bool has_graph() const { return graph_ != nullptr; }      // of the step

  // Forgets what the rows held and reads a prompt, [B, T] int64 with 1 <= T <= context; returns logits [B, V].
  // `starts`, [B] int64 in 0..T-1, says how many tokens at the beginning of each row are padding.
  at::Tensor prefill(const at::Tensor& ids, const at::Tensor& starts);
  // Takes one more token of each row, [B, 1] int64; returns logits [B, V], which the next step overwrites. Throws
  // std::runtime_error where there was no prompt.
  at::Tensor decode(const at::Tensor& ids);

 private:
  using Loader = torch::inductor::AOTIModelPackageLoader;

  // Tensors that programs point to. A program takes a reference to each one, which it never gives back: their memory is
  // freed by hand, when the programs are gone.
  struct Weights : std::vector<at::Tensor> {
    ~Weights() {
      for (const at::Tensor& tensor : *this) tensor.storage().unsafeGetStorageImpl()->reset();
    }
  };

  at::Tensor run(Loader& program, const at::Tensor& ids);
  void make_state(const std::string& path);
  void read_weights(const std::string& path);

  std::unordered_map<std::string, std::string> metadata_;
  int64_t context_, batch_size_, vocabulary_;
  at::Device device_ = at::kCPU;
  std::vector<int64_t> eos_;
  std::vector<at::Tensor> state_;  // in the order in which the programs take them
  at::Tensor starts_;              // one of them
  bool has_prompt_ = false;        // before, the state is that of no conversation
  Weights weights_;                // outlive the programs
  std::unique_ptr<Loader> decode_, prefill_;
  at::Tensor step_ids_, step_logits_;  // what the graph reads and writes
  std::unique_ptr<Graph> graph_;
};

}  // namespace retro
