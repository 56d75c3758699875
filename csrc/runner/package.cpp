#include "package.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <caffe2/serialize/inline_container.h>
#include <dlfcn.h>

#include <fstream>
#include <iomanip>
#include <sstream>
#include <stdexcept>

namespace retro {
namespace {

constexpr const char* kFormat = "3";

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A tensor as a package describes it: "float32 2x1x8x64"; "-" is the shape of a scalar.
struct Description {
  at::ScalarType dtype;
  std::vector<int64_t> shape;
};

Description parse(std::istream& words) {
  static const std::map<std::string, at::ScalarType> kTypes = {
      {"float32", at::kFloat},  {"bfloat16", at::kBFloat16}, {"float16", at::kHalf},
      {"float64", at::kDouble}, {"bool", at::kBool},         {"uint8", at::kByte},
      {"int8", at::kChar},      {"int16", at::kShort},       {"int32", at::kInt},
      {"int64", at::kLong},
  };
  std::string dtype, shape, size;
  words >> dtype >> shape;
  const auto type = kTypes.find(dtype);
  if (type == kTypes.end()) fail("the package has a tensor of unknown type '", dtype, "'");
  Description description{type->second, {}};
  std::istringstream sizes(shape);
  while (shape != "-" && std::getline(sizes, size, 'x')) {
    description.shape.push_back(std::stoll(size));
  }
  return description;
}

// What a state is made of, and where it lies.
struct StateTensor {
  std::string name;
  Description description;
  bool on_host;
};

std::vector<StateTensor> parse_state(const std::string& text) {
  std::vector<StateTensor> tensors;
  std::istringstream lines(text);
  for (std::string name, place; lines >> name;) {
    Description description = parse(lines);
    lines >> place;
    tensors.push_back({name, std::move(description), place == "host"});
  }
  return tensors;
}

double gibibytes(const Description& description) {
  double bytes = static_cast<double>(c10::elementSize(description.dtype));
  for (const int64_t size : description.shape) bytes *= static_cast<double>(size);
  return bytes / (1 << 30);
}

// Zeros in memory of the host that the device of `like` sees as its own.
at::Tensor host_tensor(const at::Tensor& like, const std::vector<int64_t>& shape) {
  torch::jit::Stack stack{like, shape};
  c10::Dispatcher::singleton().findSchemaOrThrow("retro::host_tensor", "").callBoxed(&stack);
  return stack.front().toTensor();
}

// One op stands for all: the two libraries have the kernels of a device each.
void require_kernels(const std::string& path, const std::string& device) {
  const bool cuda = device == "cuda";
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("retro::append_tokens", "");
  if (op.hasKernelForDispatchKey(cuda ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU)) return;
  fail(
      path, " was exported for ", device,
      ", and no op library with kernels for it is loaded; add --ops retro_ops/",
      cuda ? "_C_cuda" : "_C", ".abi3.so");
}

}  // namespace

void load_library(const std::string& path) {
  // With a slash dlopen looks for a file, not through the system's folders.
  const std::string file = path.find('/') == std::string::npos ? "./" + path : path;
  if (!dlopen(file.c_str(), RTLD_NOW | RTLD_GLOBAL)) fail("cannot load op library: ", dlerror());
}

std::string library_version() {
  const auto op = c10::Dispatcher::singleton().findSchema({"retro::library_version", ""});
  if (!op) fail("no op library of retro_ops is loaded; name one with --ops");
  torch::jit::Stack stack;
  op->callBoxed(&stack);
  return stack.front().toStringRef();
}

std::string first_line(const std::string& message) { return message.substr(0, message.find('\n')); }

Package::Package(const std::string& path, const std::string& device, bool graph) {
  if (!std::ifstream(path)) fail("no package '", path, "'");
  try {
    metadata_ = Loader::load_metadata_from_package(path, "decode");
  } catch (const std::exception&) {
    // No package at all, which has no format either.
  }
  const std::string format = metadata_["retro.format"];
  if (format != kFormat) {
    fail(
        path, " is not a package of this version of retro_ops (format ",
        format.empty() ? "unknown" : format, ", not ", kFormat,
        "); make one with `python -m retro_ops export`");
  }
  const std::string needed = metadata_["retro.ops"], loaded = library_version();
  if (needed != loaded) {
    fail(
        path, " needs version ", needed, " of the op library, version ", loaded,
        " is loaded; export it anew, or load version ", needed);
  }
  const std::string own = metadata_["retro.device"];
  if (!device.empty() && device != own) {
    fail(
        path, " was exported for ", own, ", not for ", device, "; export it with --device ",
        device);
  }
  if (own == "cuda" && !at::hasCUDA()) {
    fail(path, " was exported for cuda, and there is no GPU here");
  }
  require_kernels(path, own);
  context_ = std::stoll(metadata_["retro.context"]);
  batch_size_ = std::stoll(metadata_["retro.batch_size"]);
  vocabulary_ = std::stoll(metadata_["retro.vocabulary"]);
  std::istringstream ends(metadata_["retro.eos"]);
  for (int64_t id; ends >> id;) eos_.push_back(id);
  if (own == "cuda") {
    device_ = at::Device(at::kCUDA, 0);
    at::globalContext().lazyInitDevice(at::kCUDA);
    use_own_stream(device_);
  }

  make_state(path);
  if (!starts_.defined()) fail(path, " is damaged: its state has no 'starts'");
  decode_ = std::make_unique<Loader>(path, "decode", /*run_single_threaded=*/true);
  prefill_ = std::make_unique<Loader>(path, "prefill", /*run_single_threaded=*/true);
  read_weights(path);
  if (own == "cuda" && graph) {
    step_ids_ = at::zeros({batch_size_, 1}, at::TensorOptions(device_).dtype(at::kLong));
    // What its steps leave in the state the first prompt forgets.
    graph_ = std::make_unique<Graph>([this] { step_logits_ = run(*decode_, step_ids_); });
  }
}

void Package::make_state(const std::string& path) {
  const std::vector<StateTensor> tensors = parse_state(metadata_["retro.state"]);
  try {
    for (const auto& [name, description, on_host] : tensors) {
      const at::TensorOptions options = at::TensorOptions(device_).dtype(description.dtype);
      state_.push_back(
          on_host ? host_tensor(at::empty({0}, options), description.shape)
                  : at::zeros(description.shape, options));
      if (name == "starts") starts_ = state_.back();
    }
  } catch (const std::exception& error) {
    double host = 0, device = 0;
    for (const auto& [name, description, on_host] : tensors) {
      (on_host || device_.is_cpu() ? host : device) += gibibytes(description);
    }
    std::ostringstream need;
    need << std::fixed << std::setprecision(2) << host << " GiB on the host";
    if (!device_.is_cpu()) need << " and " << device << " GiB on the GPU";
    fail(
        path, " needs ", need.str(),
        " for its state, which cannot be had; export it with a smaller --context or --batch-size (",
        first_line(error.what()), ")");
  }
}

void Package::read_weights(const std::string& path) {
  caffe2::serialize::PyTorchStreamReader archive(path);
  const auto [list, bytes] = archive.getRecord("weights/list");
  std::istringstream lines(std::string(static_cast<const char*>(list.get()), bytes));
  std::unordered_map<std::string, at::Tensor> records;
  std::unordered_map<std::string, std::unordered_map<std::string, at::Tensor>> weights;
  for (std::string program, name, record; lines >> program >> name >> record;) {
    const Description description = parse(lines);
    at::Tensor& tensor = records[record];
    if (!tensor.defined()) {
      tensor = at::empty(description.shape, description.dtype);
      const size_t size = archive.getRecord(record, tensor.data_ptr(), tensor.nbytes());
      if (size != tensor.nbytes()) fail(path, " is damaged: weight ", name, " is not whole");
      tensor = tensor.to(device_);
    }
    weights[program][name] = tensor;
    weights_.push_back(tensor);
  }
  for (const auto& [program, name] :
       {std::pair(decode_.get(), "decode"), {prefill_.get(), "prefill"}}) {
    program->load_constants(
        weights[name], /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
  }
}

at::Tensor Package::prefill(const at::Tensor& ids, const at::Tensor& starts) {
  has_prompt_ = false;  // one that fails half way is none
  // The program takes two tokens or more: padding goes before a single one.
  const bool single = ids.size(1) == 1;
  starts_.copy_(single ? starts + 1 : starts);
  const at::Tensor logits = run(*prefill_, single ? at::constant_pad_nd(ids, {1, 0}) : ids);
  has_prompt_ = true;
  return logits;
}

at::Tensor Package::decode(const at::Tensor& ids) {
  if (!has_prompt_) fail("a step needs a prompt before it");
  if (!graph_) return run(*decode_, ids);
  step_ids_.copy_(ids);
  graph_->replay();
  return step_logits_;
}

at::Tensor Package::run(Loader& program, const at::Tensor& ids) {
  std::vector<at::Tensor> inputs{ids.to(device_).contiguous()};
  inputs.insert(inputs.end(), state_.begin(), state_.end());
  return program.run(inputs).front();
}

}  // namespace retro
