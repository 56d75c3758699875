// Generates greedily with a package of `python -m retro_ops export`, without Python.
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "package.h"

namespace {

constexpr const char* kUsage =
    R"(usage: retro_runner MODEL.pt2 --ops LIBRARY [--ops LIBRARY]... [options]

Reads token ids, one row of the batch per line, and writes the tokens that follow, one row per line.

  MODEL.pt2          written by `python -m retro_ops export`
  --ops LIBRARY      the op library, retro_ops/_C.abi3.so; for a GPU _C_cuda.abi3.so after it
  --tokens FILE      the prompts (default: standard input)
  --new-tokens N     tokens to generate (64)
  --device DEVICE    refuse packages that are not for this device, cpu or cuda
  --threads N        CPU threads (one per core)
  --help             this text

The time of the prompt and of a token goes to standard error. Exit status 2: bad input, in one line.
)";

struct Options {
  std::string model, tokens, device;
  std::vector<std::string> libraries;
  int64_t new_tokens = 64, threads = 0;
  bool help = false;
};

int64_t whole_number(const std::string& text, const std::string& what, int64_t low) {
  int64_t value = 0;
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || rest != end || value < low) {
    throw std::runtime_error(
        what + " must be a whole number from " + std::to_string(low) + " on, got '" + text + "'");
  }
  return value;
}

Options read_options(int count, char** words) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    const auto value = [&]() -> std::string {
      if (i + 1 == count) throw std::runtime_error(word + " needs a value; see --help");
      return words[++i];
    };
    if (word == "--help") options.help = true;
    else if (word == "--ops") options.libraries.push_back(value());
    else if (word == "--tokens") options.tokens = value();
    else if (word == "--new-tokens") options.new_tokens = whole_number(value(), word, 1);
    else if (word == "--threads") options.threads = whole_number(value(), word, 1);
    else if (word == "--device") options.device = value();
    else if (word.rfind("--", 0) == 0 || !options.model.empty())
      throw std::runtime_error("unknown argument '" + word + "'; see --help");
    else options.model = word;
  }
  if (options.help) return options;
  if (!options.device.empty() && options.device != "cpu" && options.device != "cuda") {
    throw std::runtime_error("--device must be cpu or cuda, got '" + options.device + "'");
  }
  if (options.model.empty()) throw std::runtime_error("no package named; see --help");
  if (options.libraries.empty()) {
    throw std::runtime_error("no op library named; give --ops retro_ops/_C.abi3.so");
  }
  return options;
}

std::vector<std::vector<int64_t>> read_rows(std::istream& in, int64_t vocabulary) {
  std::vector<std::vector<int64_t>> rows;
  for (std::string line, word; std::getline(in, line);) {
    std::vector<int64_t> row;
    for (std::istringstream words(line); words >> word;) {
      row.push_back(whole_number(word, "token ids", 0));
      if (row.back() >= vocabulary) {
        throw std::runtime_error(
            "token ids must lie in 0.." + std::to_string(vocabulary - 1) + ", got " + word);
      }
    }
    if (!row.empty()) rows.push_back(std::move(row));
  }
  return rows;
}

at::Tensor read_prompt(const Options& options, const retro::Package& package) {
  std::vector<std::vector<int64_t>> rows;
  if (options.tokens.empty()) {
    rows = read_rows(std::cin, package.vocabulary());
  } else {
    std::ifstream file(options.tokens);
    if (!file) throw std::runtime_error("cannot read '" + options.tokens + "'");
    rows = read_rows(file, package.vocabulary());
  }
  const auto count = static_cast<int64_t>(rows.size());
  if (count == 0) throw std::runtime_error("no token ids given: one row per line is expected");
  if (count != package.batch_size()) {
    throw std::runtime_error(
        "the package was exported for batch size " + std::to_string(package.batch_size()) +
        ", got " + std::to_string(count) + " rows; export it with --batch-size " +
        std::to_string(count));
  }
  const auto tokens = static_cast<int64_t>(rows[0].size());
  for (const auto& row : rows) {
    if (static_cast<int64_t>(row.size()) != tokens) {
      throw std::runtime_error(
          "rows must have equal length, got " + std::to_string(tokens) + " and " +
          std::to_string(row.size()) + " tokens; run them one by one with --batch-size 1");
    }
  }
  // The last token is never fed back.
  if (options.new_tokens > package.context() - tokens + 1) {
    throw std::runtime_error(
        "a prompt of " + std::to_string(tokens) + " tokens and " +
        std::to_string(options.new_tokens) + " new ones exceed the context of " +
        std::to_string(package.context()) +
        " that the package was exported for; export it with a larger --context");
  }
  at::Tensor ids = at::empty({count, tokens}, at::kLong);
  for (int64_t b = 0; b < count; ++b) {
    std::copy(rows[b].begin(), rows[b].end(), ids.data_ptr<int64_t>() + b * tokens);
  }
  return ids;
}

class Clock {
 public:
  // Milliseconds since the last call.
  double lap() {
    const auto now = std::chrono::steady_clock::now();
    const std::chrono::duration<double, std::milli> passed = now - last_;
    last_ = now;
    return passed.count();
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

void run(const Options& options) {
  const c10::InferenceMode inference;
  if (options.threads) at::set_num_threads(static_cast<int>(options.threads));
  for (const std::string& library : options.libraries) retro::load_library(library);
  Clock clock;
  retro::Package package(options.model, options.device);
  const double load = clock.lap();
  const at::Tensor ids = read_prompt(options, package);

  // A token is on the host before the clock stops, so that a GPU has done its work.
  const auto choose = [](const at::Tensor& logits) { return logits.argmax(1, true).cpu(); };
  clock.lap();
  std::vector<at::Tensor> chosen{choose(package.prefill(ids))};
  const double prefill = clock.lap();
  std::vector<double> steps;
  while (static_cast<int64_t>(chosen.size()) < options.new_tokens) {
    chosen.push_back(choose(package.decode(chosen.back())));
    steps.push_back(clock.lap());
  }

  for (int64_t b = 0; b < ids.size(0); ++b) {
    for (size_t t = 0; t < chosen.size(); ++t) {
      std::printf("%s%lld", t ? " " : "", static_cast<long long>(chosen[t].data_ptr<int64_t>()[b]));
    }
    std::printf("\n");
  }
  std::fprintf(
      stderr, "load %.0f ms, prompt of %lld tokens %.1f ms", load,
      static_cast<long long>(ids.size(1)), prefill);
  if (!steps.empty()) {
    const auto middle = steps.begin() + steps.size() / 2;
    std::nth_element(steps.begin(), middle, steps.end());
    std::fprintf(stderr, ", then %.3f ms per token (median of %zu)", *middle, steps.size());
  }
  std::fprintf(stderr, "\n");
}

// The first line, without the place in a source file that torch puts before and behind it.
std::string first_line(const std::string& message) { return message.substr(0, message.find('\n')); }

}  // namespace

int main(int count, char** words) {
  try {
    const Options options = read_options(count, words);
    if (options.help) std::fputs(kUsage, stdout);
    else run(options);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "retro_runner: %s\n", first_line(error.what()).c_str());
    return 2;
  }
}
