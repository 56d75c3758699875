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

namespace retro {

// Opens an op library, e.g. retro_ops/_C.abi3.so, which registers its ops; throws std::runtime_error.
void load_library(const std::string& path);

// The version of the op library that is loaded; throws std::runtime_error if none is.
std::string library_version();

class Package {
 public:
  // Throws std::runtime_error where the file is no package, is for another device than `device` (empty: any), or needs
  // another version of the op library than the one that is loaded.
  Package(const std::string& path, const std::string& device);

  int64_t context() const { return context_; }        // tokens that a row can hold
  int64_t batch_size() const { return batch_size_; }  // rows
  int64_t vocabulary() const { return vocabulary_; }  // tokens that there are

  // Forgets what the rows held and reads a prompt, [B, T] int64 with 1 <= T <= context; returns logits [B, V].
  at::Tensor prefill(const at::Tensor& ids);
  // Takes one more token of each row, [B, 1] int64; returns logits [B, V].
  at::Tensor decode(const at::Tensor& ids);

 private:
  using Loader = torch::inductor::AOTIModelPackageLoader;

  at::Tensor run(Loader& program, const at::Tensor& ids);
  void read_weights(const std::string& path);

  std::unordered_map<std::string, std::string> metadata_;
  int64_t context_, batch_size_, vocabulary_;
  at::Device device_ = at::kCPU;
  std::vector<at::Tensor> state_;    // in the order in which the programs take them
  std::vector<at::Tensor> weights_;  // which the programs only point to
  std::unique_ptr<Loader> decode_, prefill_;
};

}  // namespace retro
