// Finds the state dict of a param by identity, without calling Tensor.__hash__ (0.4 us).
#pragma once

#include <cstdint>
#include <vector>

#include "host/python.h"

namespace fusedopt::host {

class StateIndex {
 public:
  struct Slot {
    PyObject* param = nullptr;
    PyObject* state = nullptr;  // borrowed from the optimizer's state; null where there is none
    bool visited = false;       // the param has been met in a group of this step
  };

  void build(PyObject* state, size_t params) {
    size_t capacity = 16;
    while (capacity < 2 * (params + static_cast<size_t>(PyDict_GET_SIZE(state)))) capacity *= 2;
    slots_.assign(capacity, Slot{});
    mask_ = capacity - 1;
    PyObject *param, *entry;
    for (Py_ssize_t at = 0; PyDict_Next(state, &at, &param, &entry);) find(param).state = entry;
  }

  // The param's slot, a new one where it has none.
  Slot& find(PyObject* param) {
    // Objects are 16-byte aligned; the multiplier spreads neighbours.
    size_t at = (reinterpret_cast<uintptr_t>(param) >> 4) * 0x9E3779B97F4A7C15u >> 20;
    for (;; ++at) {
      Slot& slot = slots_[at & mask_];
      if (slot.param == param) return slot;
      if (slot.param == nullptr) {
        slot.param = param;
        return slot;
      }
    }
  }

 private:
  std::vector<Slot> slots_;
  size_t mask_ = 0;
};

}  // namespace fusedopt::host
