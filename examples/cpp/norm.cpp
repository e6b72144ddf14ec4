// The path-norm of any weights of one architecture, without Python and without fxpath.
//
//   norm PROGRAM.pt2 [WEIGHTS.safetensors]
//
// PROGRAM.pt2 is what `program.save("PROGRAM.pt2", kind="aoti")` or `fxpath export --aoti` wrote.
// Without WEIGHTS it speaks of the weights that it was saved with.  It prints mantissa and exponent of
// the path-norm, and the path-norm itself.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

namespace {

// A reader of the header of a safetensors file, which is JSON: objects, lists, strings and numbers.
class Header {
 public:
  struct Entry {
    std::string dtype;
    std::vector<int64_t> shape;
    std::vector<int64_t> offsets;
  };

  explicit Header(const std::string& text) : text_(text) {}

  std::map<std::string, Entry> entries() {
    std::map<std::string, Entry> found;
    expect('{');
    while (!take('}')) {
      const std::string name = string();
      expect(':');
      if (name == "__metadata__") {
        metadata();
      } else {
        found[name] = entry();
      }
      take(',');
    }
    return found;
  }

 private:
  Entry entry() {
    Entry found;
    expect('{');
    while (!take('}')) {
      const std::string key = string();
      expect(':');
      if (key == "dtype") {
        found.dtype = string();
      } else {
        (key == "shape" ? found.shape : found.offsets) = numbers();
      }
      take(',');
    }
    return found;
  }

  void metadata() {
    expect('{');
    while (!take('}')) {
      string();
      expect(':');
      string();
      take(',');
    }
  }

  std::vector<int64_t> numbers() {
    std::vector<int64_t> found;
    expect('[');
    while (!take(']')) {
      size_t read = 0;
      found.push_back(std::stoll(text_.substr(at_, 20), &read));
      at_ += read;
      take(',');
    }
    return found;
  }

  std::string string() {
    expect('"');
    std::string found;
    while (text_.at(at_) != '"') {
      if (text_[at_] == '\\') ++at_;  // names of tensors hold nothing that would need more
      found += text_.at(at_++);
    }
    ++at_;
    return found;
  }

  void blanks() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
  }

  bool take(char c) {
    blanks();
    if (text_.at(at_) != c) return false;
    ++at_;
    blanks();
    return true;
  }

  void expect(char c) {
    if (!take(c)) throw std::runtime_error(std::string("safetensors header: no ") + c);
  }

  const std::string& text_;
  size_t at_ = 0;
};

at::ScalarType format(const std::string& name) {
  if (name == "F64") return at::kDouble;
  if (name == "F32") return at::kFloat;
  if (name == "F16") return at::kHalf;
  if (name == "BF16") return at::kBFloat16;
  if (name == "I64") return at::kLong;
  if (name == "BOOL") return at::kBool;
  throw std::runtime_error("safetensors: no reader for tensors of " + name);
}

std::unordered_map<std::string, at::Tensor> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
  uint64_t length = 0;
  if (bytes.size() < sizeof(length)) throw std::runtime_error(path + ": cannot be read");
  std::memcpy(&length, bytes.data(), sizeof(length));
  const std::string header(bytes.data() + sizeof(length), length);
  const char* start = bytes.data() + sizeof(length) + length;
  std::unordered_map<std::string, at::Tensor> found;
  for (const auto& [name, entry] : Header(header).entries()) {
    const auto options = at::TensorOptions(format(entry.dtype));
    at::Tensor tensor = at::empty(entry.shape, options);
    std::memcpy(tensor.data_ptr(), start + entry.offsets.at(0), tensor.nbytes());
    found[name] = tensor;
  }
  return found;
}

std::string root(const std::string& name) { return name.substr(0, name.find('.')); }

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::cerr << "usage: norm PROGRAM.pt2 [WEIGHTS.safetensors]\n";
    return 2;
  }
  try {
    torch::inductor::AOTIModelPackageLoader program(argv[1]);
    if (argc > 2) {
      const auto stored = read(argv[2]);
      std::unordered_map<std::string, at::Tensor> weights;
      std::set<std::string> roots;
      for (const auto& [name, tensor] : stored) roots.insert(root(name));
      for (const std::string& name : program.get_constant_fqns()) {
        if (stored.count(name)) {
          weights[name] = stored.at(name);
        } else if (name.rfind("steps", 0) == 0 && !roots.count(root(name))) {
          // The program's own, under a name that nothing of the model has; said, as it stays.
          std::cerr << "norm: " << name << " stays as it was saved\n";
        } else {
          throw std::runtime_error("no weights for " + name);
        }
      }
      program.load_constants(weights, /*use_inactive=*/false, /*check_full_update=*/false);
    }
    // Results stand in the order in which the program was saved: mantissa and exponent first.
    const std::vector<at::Tensor> results = program.run({});
    const double mantissa = results.at(0).item<double>();
    const double exponent = results.at(1).item<double>();
    std::printf("%.17g %.17g\n", mantissa, exponent);
    std::printf("path-norm %.9g\n", std::ldexp(mantissa, static_cast<int>(exponent)));
  } catch (const std::exception& error) {
    std::cerr << "norm: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
