// Reads the hyperparameters of a param group.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "core/dlpack_abi.h"
#include "core/table.h"
#include "host/dict_reader.h"
#include "host/python.h"

namespace fusedopt::host {

class GroupReader {
 public:
  // The keys in the order of the rule's Hyper struct; "betas[2]" is a pair. With `on_device`, an lr
  // that is a tensor on that kind of device is left there, and its address taken.
  GroupReader(const std::vector<std::string>& hyper_keys,
              std::optional<dlpack::DeviceType> on_device);

  // Fills in `out` and returns group["params"] as a list or tuple. Raises KeyError for what is
  // missing, TypeError for what is no number; `index` is for the message.
  Ref read(PyObject* group, size_t index, Group* out);

 private:
  bool take_address(PyObject* lr, Group* out) const;

  struct Key {
    PyObject* name;
    int count;
  };

  std::vector<Key> keys_;
  std::optional<dlpack::DeviceType> on_device_;
  DictReader reader_;  // "params", "maximize", the keys
};

}  // namespace fusedopt::host
