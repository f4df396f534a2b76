// Which addresses were seen.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fusedopt::host {

class AddressSet {
 public:
  // Empties the set, and makes room for `count` addresses.
  void reset(size_t count) {
    bits_ = 1;
    while ((size_t{1} << bits_) < 2 * count) ++bits_;
    slots_.assign(size_t{1} << bits_, nullptr);
  }

  // False where the address is in the set already.
  bool add(const void* address) {
    const size_t mask = slots_.size() - 1;
    // Addresses are multiples of 4 to 64: the product's upper bits depend on all of theirs.
    const uint64_t hash = reinterpret_cast<uintptr_t>(address) * 0x9E3779B97F4A7C15u;
    for (size_t i = hash >> (64 - bits_);; i = (i + 1) & mask) {
      if (slots_[i] == address) return false;
      if (slots_[i] == nullptr) {
        slots_[i] = address;
        return true;
      }
    }
  }

 private:
  int bits_ = 1;
  std::vector<const void*> slots_{nullptr, nullptr};  // a power of two, at most half full
};

}  // namespace fusedopt::host
