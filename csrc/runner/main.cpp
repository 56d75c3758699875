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
#include <optional>
#include <sstream>
#include <stdexcept>

#include "package.h"

namespace {

constexpr const char* kUsage =
    R"(usage: retro_runner MODEL.pt2 --ops LIBRARY [--ops LIBRARY]... [options]

Reads token ids, one row of the batch per line, and writes the tokens that follow, one row per line.
Rows may be of different length. A row ends with an end token of the model, which is written too.

  MODEL.pt2          written by `python -m retro_ops export`
  --ops LIBRARY      the op library, retro_ops/_C.abi3.so; for a GPU _C_cuda.abi3.so after it
  --tokens FILE      the prompts (default: standard input)
  --new-tokens N     tokens to generate at most (64)
  --eos ID[,ID]...   tokens that end a row (default: those of the model); none: no token does
  --device DEVICE    refuse packages that are not for this device, cpu or cuda
  --threads N        CPU threads (one per core)
  --no-graph         on a GPU: run every step anew instead of recording it as a CUDA graph
  --help             this text

The time of the prompt and of a token goes to standard error. Exit status 2: bad input, in one line.
)";

struct Options {
  std::string model, tokens, device;
  std::vector<std::string> libraries;
  std::optional<std::vector<int64_t>> eos;  // nothing: those of the package
  int64_t new_tokens = 64, threads = 0;
  bool graph = true, help = false;
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

std::vector<int64_t> end_tokens(const std::string& text) {
  std::vector<int64_t> ends;
  std::istringstream words(text);
  for (std::string word; text != "none" && std::getline(words, word, ',');) {
    ends.push_back(whole_number(word, "--eos", 0));
  }
  return ends;
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
    else if (word == "--eos") options.eos = end_tokens(value());
    else if (word == "--no-graph") options.graph = false;
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

struct Prompt {
  at::Tensor ids;     // [B, T], padded on the left
  at::Tensor starts;  // [B], first token of each row
};

Prompt read_prompt(const Options& options, const retro::Package& package) {
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
  size_t longest = 0;
  for (const auto& row : rows) longest = std::max(longest, row.size());
  const auto tokens = static_cast<int64_t>(longest);
  // The last token is never fed back.
  if (options.new_tokens > package.context() - tokens + 1) {
    throw std::runtime_error(
        "a prompt of " + std::to_string(tokens) + " tokens and " +
        std::to_string(options.new_tokens) + " new ones exceed the context of " +
        std::to_string(package.context()) +
        " that the package was exported for; export it with a larger --context");
  }
  Prompt prompt{at::zeros({count, tokens}, at::kLong), at::empty({count}, at::kLong)};
  for (int64_t b = 0; b < count; ++b) {
    const int64_t padding = tokens - static_cast<int64_t>(rows[b].size());
    prompt.starts.data_ptr<int64_t>()[b] = padding;
    std::copy(
        rows[b].begin(), rows[b].end(), prompt.ids.data_ptr<int64_t>() + b * tokens + padding);
  }
  return prompt;
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
  retro::Package package(options.model, options.device, options.graph);
  const double load = clock.lap();
  const Prompt prompt = read_prompt(options, package);
  const std::vector<int64_t>& ends = options.eos ? *options.eos : package.eos();

  std::vector<std::vector<int64_t>> written(prompt.ids.size(0));
  // Adds the tokens of a step to the rows that have not ended; whether all have. The tokens are on the host then, so
  // that a GPU has done its work before the clock stops.
  const auto write = [&](const at::Tensor& chosen) {
    const at::Tensor tokens = chosen.cpu();
    bool ended = true;
    for (size_t b = 0; b < written.size(); ++b) {
      std::vector<int64_t>& row = written[b];
      const auto is_end = [&](int64_t id) {
        return std::find(ends.begin(), ends.end(), id) != ends.end();
      };
      if (row.empty() || !is_end(row.back())) row.push_back(tokens.data_ptr<int64_t>()[b]);
      ended &= is_end(row.back());
    }
    return ended;
  };
  clock.lap();
  at::Tensor chosen = package.prefill(prompt.ids, prompt.starts).argmax(1, true);
  bool ended = write(chosen);
  const double prefill = clock.lap();
  std::vector<double> steps;
  while (!ended && static_cast<int64_t>(steps.size()) + 1 < options.new_tokens) {
    // Rows that have ended go on unseen: a step takes a token of every row.
    chosen = package.decode(chosen).argmax(1, true);
    ended = write(chosen);
    steps.push_back(clock.lap());
  }

  for (const std::vector<int64_t>& row : written) {
    for (size_t t = 0; t < row.size(); ++t) {
      std::printf("%s%lld", t ? " " : "", static_cast<long long>(row[t]));
    }
    std::printf("\n");
  }
  std::fprintf(
      stderr, "load %.0f ms, prompt of %lld tokens %.1f ms", load,
      static_cast<long long>(prompt.ids.size(1)), prefill);
  if (!steps.empty()) {
    const auto middle = steps.begin() + steps.size() / 2;
    std::nth_element(steps.begin(), middle, steps.end());
    std::fprintf(
        stderr, ", then %.3f ms per token (median of %zu%s)", *middle, steps.size(),
        package.has_graph() ? ", one CUDA graph" : "");
  }
  std::fprintf(stderr, "\n");
}

}  // namespace

int main(int count, char** words) {
  try {
    const Options options = read_options(count, words);
    if (options.help) std::fputs(kUsage, stdout);
    else run(options);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "retro_runner: %s\n", retro::first_line(error.what()).c_str());
    return 2;
  }
}
